"""The threads that stream a plan's inputs: each has buffers of its own and takes one chunk after another.

Memory is bounded by workers x chunk x models, whatever the model's size. What is done with a chunk is a job's business:
the engine's writes it, the measuring passes count or sum over it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import torch

from lines_cli.arithmetic import FLOAT8, TORCH_DTYPES, first_nonfinite, task_vector
from lines_cli.checkpoint.header import itemsize
from lines_cli.checkpoint.positional import read_into
from lines_cli.draft import Piece, Slice
from lines_cli.errors import CheckpointError, DataError, RecipeError, printable
from lines_cli.methods import Values
from lines_cli.methods.dare import Where, random_masks
from lines_cli.methods.ties import magnitude_masks
from lines_cli.plan import Plan, TensorPlan

Item = TypeVar("Item")
Result = TypeVar("Result")
Thread = TypeVar("Thread", bound="Reader")


def choose_device(name: str) -> torch.device:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"--device {name}: torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices here"
        )
    return device


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[list[int]]:
    """The inputs' file descriptors, for the length of a `with` block."""
    paths = list(paths)
    _allow_open_files(len(paths))
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            except OSError as error:
                hint = None
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    hint = f"{len(paths):,} files are read at once. Allow more (ulimit -n), or merge larger shards."
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=hint) from error
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def _allow_open_files(number: int) -> None:
    """Raise this process's own limit of open files as far as is needed and allowed, where there is one."""
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256  # outputs, libraries, and what the caller has open
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next chunk, where it would hand it back to the system each time: then
    every temporary of 1 MiB is 300 page faults, and TIES takes three times as long. Only glibc can be told.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 2**20)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h


class Streamed(Protocol):
    """A tensor that is read piece by piece: what a plan makes, or what is only looked at."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def in_float64(self) -> bool:
        """Whether its entries are widened to float64; else to float32."""

    @property
    def pieces(self) -> Sequence[Piece]:
        """Where its entries come from."""


Tensor = TypeVar("Tensor", bound=Streamed)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Tensor]):
    """Part of a piece: entries `first` to `first + numel` of it."""

    tensor: Tensor
    piece: Piece
    first: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return sum(self.numel * itemsize(source.dtype) for source in self.piece.sources)


PlanChunk = Chunk[TensorPlan]


def chunks_of(tensors: Iterable[Tensor], size: int) -> Iterator[Chunk[Tensor]]:
    """All of the tensors' pieces, in steps of at most `size` entries."""
    for tensor in tensors:
        for piece in tensor.pieces:
            for first in range(0, piece.numel, size):
                yield Chunk(tensor, piece, first, min(size, piece.numel - first))


class Reader:
    """One thread's buffers: reads a chunk's entries in any input, and holds them widened.

    Args:
        paths: the inputs.
        sources: the same, opened.
        device: where entries are held.
        chunk: most entries of one.
        stored: bytes of the widest entry, as inputs store it.
        width: bytes of the widest, as it is held.
        held: from how many inputs entries are held at a time.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sources: Sequence[int],
        device: torch.device,
        *,
        chunk: int,
        stored: int,
        width: int,
        held: int,
    ) -> None:
        self.paths, self.sources = paths, sources
        try:
            self.raw = Buffer(device, chunk * stored)
            self._held = [torch.empty(chunk * width, dtype=torch.uint8, device=device) for _ in range(held)]
        except RuntimeError as error:  # torch's way to say it
            raise MemoryError(str(error)) from error

    def held(self, chunk: Chunk[Tensor]) -> list[torch.Tensor]:
        """A place for the chunk's entries in each input: [numel] each, in the dtype they are widened to."""
        dtype = torch.float64 if chunk.tensor.in_float64 else torch.float32
        return [buffer[: chunk.numel * dtype.itemsize].view(dtype) for buffer in self._held]

    def read(self, chunk: Chunk[Tensor], source: Slice, buffer: Buffer | None = None) -> Loaded:
        """A chunk's entries in one input, as they are stored.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        buffer = buffer or self.raw
        width = itemsize(source.dtype)
        view = buffer.host(chunk.numel * width)
        path = self.paths[source.file]
        try:
            got = read_into(self.sources[source.file], view, source.offset + chunk.first * width)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if got < len(view):
            raise CheckpointError(
                f"{path}: ends in the middle of tensor {printable(chunk.tensor.name)}; it was whole a moment ago",
                hint="Something shortened it meanwhile. Run it again when the file is at rest.",
            )
        return Loaded(buffer, source.dtype, chunk.numel, view)


class Worker(Reader):
    """One thread's buffers, and what it computes of a plan with them.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(self, plan: Plan, sources: list[int], device: torch.device, chunk: int) -> None:
        stored, written = plan.widths
        width, held = 8 if plan.in_float64 else 4, plan.number_of_models + 1
        super().__init__(plan.inputs, sources, device, chunk=chunk, stored=stored, width=width, held=held)
        self.plan = plan
        self._told: tuple[TensorPlan, Values] | None = None  # of the last tensor
        try:
            self.out = Buffer(device, chunk * max(stored, written))
        except RuntimeError as error:
            raise MemoryError(str(error)) from error

    def inputs(self, chunk: PlanChunk) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """What is merged: the base's entries, if there is a base, and each model's; [numel] each, in the compute dtype,
        to be overwritten.
        """
        held = self.held(chunk)
        base = None
        if chunk.piece.base is not None:
            base = held[0].copy_(self.read(chunk, chunk.piece.base).values())
        models = [
            into.copy_(self.read(chunk, source).values())
            for into, source in zip(held[1:], chunk.piece.models, strict=False)
        ]
        return base, models

    def task_vectors(self, chunk: PlanChunk) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The base's entries, and what each model changed of them: `f32(model) - f32(base)`, rounded."""
        base, models = self.inputs(chunk)
        assert base is not None
        return base, [task_vector(model, base) for model in models]

    def masks(self, chunk: PlanChunk, task_vectors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """Which entries of each model are kept, where the method drops some."""
        tensor, kind = chunk.tensor, self.plan.recipe.method.masks
        if kind == "magnitude" and self.plan.statistics.thresholds:
            return magnitude_masks(task_vectors, threshold=self.plan.measured(tensor).threshold)
        if kind == "random":  # a head and the embedding it is tied to are one weight, and lose the same entries
            values, where = tensor.values, Where(tensor.draft.counts_as, chunk.piece.start + chunk.first)
            return random_masks(task_vectors, density=values["density"], seed=values["seed"], where=where)
        return None

    def merge(
        self,
        chunk: PlanChunk,
        tensors: list[torch.Tensor],
        masks: list[torch.Tensor] | None,
        told: Values | None = None,
    ) -> torch.Tensor:
        """What the method makes of them: [numel]. It may overwrite them."""
        if told is None:
            if self._told is None or self._told[0] is not chunk.tensor:
                self._told = chunk.tensor, self.plan.told(chunk.tensor)
            told = self._told[1]
        merged: torch.Tensor = self.plan.recipe.method.merge(tensors, masks=masks, **told)
        return merged

    def nonfinite(self, chunk: PlanChunk) -> str | None:
        """Which of a chunk's inputs holds NaN or Inf, and where; None if none does."""
        for source in chunk.piece.sources:
            loaded = self.read(chunk, source)
            bad = first_nonfinite(loaded.values()) if source.dtype in TORCH_DTYPES else None
            if bad:
                name, at = printable(chunk.tensor.name), chunk.piece.start + chunk.first + bad[0]
                path = self.plan.inputs[source.file]
                return f"{path}: tensor {name} holds {bad[1]}, first at entry {at:,}"
        return None

    def refuse_nonfinite(self, chunk: PlanChunk) -> None:
        """Refuse a chunk in whose inputs something is not finite, unless that is allowed.

        Raises:
            DataError: which tensor of which file, and where.
        """
        if not self.plan.recipe.allow_nonfinite and (found := self.nonfinite(chunk)):
            raise DataError(found, hint=ALLOW_NONFINITE)


ALLOW_NONFINITE = "allow_nonfinite: true in the recipe (--allow-nonfinite of lines edit) lets such values through."


class Pool(Generic[Thread, Item, Result]):
    """Threads that do one job to every item of a stream.

    Args:
        new_worker: makes a thread's worker, in that thread.
        items: what there is to do, in order.
        job: what is done with each.
        device: where workers compute.
    """

    def __init__(
        self,
        new_worker: Callable[[], Thread],
        items: Iterable[Item],
        job: Callable[[Thread, Item], Result],
        device: torch.device,
    ) -> None:
        self._new_worker, self._job, self._device = new_worker, job, device
        self._items = enumerate(items)
        self._take = threading.Lock()
        self._stop = threading.Event()
        self._done: queue.SimpleQueue[tuple[int, Result] | BaseException | None] = queue.SimpleQueue()

    def run(self, threads: int) -> Generator[tuple[int, Result], None, None]:
        """Run it; yields every item's number and result as it is done. The first failure stops all and is raised."""
        workers = [threading.Thread(target=self._work, name=f"lines-worker-{n}", daemon=True) for n in range(threads)]
        try:
            for worker in workers:
                worker.start()
            running = threads
            while running:
                found = self._done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            self._stop.set()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            torch.set_num_threads(torch.get_num_threads())  # the workers' setting is the default of new threads, too

    def in_order(self, threads: int) -> Generator[Result, None, None]:
        """Run it; yields the results in the order of the items, so that sums do not depend on who was faster."""
        early: dict[int, Result] = {}
        due = 0
        with closing(self.run(threads)) as results:
            for number, result in results:
                early[number] = result
                while due in early:
                    yield early.pop(due)
                    due += 1

    def _work(self) -> None:
        try:
            torch.set_num_threads(1)  # for this thread alone; the workers are the parallelism
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with torch.inference_mode():
                worker = self._new_worker()
                while not self._stop.is_set():
                    with self._take:
                        item = next(self._items, None)
                    if item is None:
                        break
                    self._done.put((item[0], self._job(worker, item[1])))
            self._done.put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits, which raises it
            self._done.put(error)


class Buffer:
    """Reusable bytes on the host and, for CUDA, as many on the device; on the CPU the two are one."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_gpu = device.type == "cuda"
        self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_gpu)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device) if on_gpu else self._host
        self._memory = memoryview((ctypes.c_char * nbytes).from_address(self._host.data_ptr())).cast("B")

    def host(self, nbytes: int) -> memoryview:
        """The first bytes on the host, to read a file into or write a file from."""
        return self._memory[:nbytes]

    def device_view(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The first entries on the device, as `dtype`."""
        return self._device[: numel * dtype.itemsize].view(dtype)

    def to_device(self, nbytes: int) -> None:
        """Copy the first bytes from the host; returns when they have arrived."""
        if self._device is not self._host:
            self._device[:nbytes].copy_(self._host[:nbytes])

    def to_host(self, nbytes: int) -> memoryview:
        """The first bytes, copied from the device; returns when they have arrived."""
        if self._device is not self._host:
            self._host[:nbytes].copy_(self._device[:nbytes])
        return self.host(nbytes)


@dataclass(slots=True)
class Loaded:
    """A chunk of one input, read into a buffer."""

    buffer: Buffer
    dtype: str
    numel: int
    raw: memoryview

    def values(self) -> torch.Tensor:
        """[numel], as stored, on the worker's device."""
        self.buffer.to_device(len(self.raw))
        return self.buffer.device_view(self.numel, (TORCH_DTYPES | FLOAT8)[self.dtype])

    def bits(self) -> int:
        """The sum of the stored bytes, read as whole numbers of 8 bytes, modulo 2**64; once `values` were asked for."""
        whole = len(self.raw) // 8
        total = int(self.buffer.device_view(whole, torch.int64).sum()) + int.from_bytes(self.raw[8 * whole :], "little")
        return total % 2**64
