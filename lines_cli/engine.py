"""Plan -> bytes. Knows tensors, files and workers; knows no command, no recipe format and no screen.

A few workers take chunks of the plan in file order. Each has buffers of its own, so memory is bounded by workers x
chunk, whatever the model's size: `pread` the chunk from both inputs, compute on the run's device, `pwrite` it where
the plan says. No chunk depends on another, so how many workers there are and how large the chunks changes no byte.
"""

from __future__ import annotations

import ctypes
import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lines_cli.arithmetic import TORCH_DTYPES, add_scaled_task_vector, cast, compute_dtype, extremes, first_nonfinite
from lines_cli.checkpoint.header import itemsize
from lines_cli.checkpoint.positional import read_into, write_from
from lines_cli.checkpoint.writer import Staging, check_destination, naming
from lines_cli.errors import CheckpointError, DataError, RecipeError, printable
from lines_cli.plan import Piece, Plan, Resources, Slice, TensorPlan

Track = Callable[[Iterable[int]], Iterable[int]]
"""Wraps the stream of finished byte counts, to show progress; `iter` shows nothing."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        seconds: from opening the inputs to the output being in place.
        nonfinite: tensors in which NaN, Inf or an overflow was let through (`allow_nonfinite`), and what was found
            first.
    """

    seconds: float
    nonfinite: dict[str, str]


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


def run(plan: Plan, resources: Resources | None = None, *, force: bool = False, track: Track = iter) -> Outcome:
    """Carry out a plan: write every file beside the destination, then rename it into place. Any failure leaves no
    trace.

    Args:
        plan: from `make_plan`.
        resources: workers, device, chunk; they change speed and memory, never the bytes.
        force: replace an existing output, once the new one is whole.
        track: wraps the stream of written byte counts.

    Raises:
        DataError: NaN or Inf in an input, or an overflow in the output dtype.
        CheckpointError: an input ends early or cannot be read.
        OutputError: the destination is taken, is an input, or cannot be written.
    """
    started = time.perf_counter()
    resources = resources or Resources()
    device = choose_device(resources.device)
    check_destination(plan.output, inputs=plan.read_paths, nbytes=plan.bytes_written, force=force)
    with Staging(plan.output) as staging, _opened(plan.inputs) as sources:
        targets = []
        for file in plan.outputs:
            targets.append(staging.create(file.name, file.nbytes))
            with naming(plan.output):
                write_from(targets[-1], file.head, 0)
        workers = _Workers(plan, sources, targets, device, resources.chunk)
        # Closing stops and joins the threads, whatever interrupts this one, before the files they write are closed.
        with closing(workers.run(resources.threads)) as written:
            for _ in track(written):
                pass
        for sidecar in plan.sidecars:
            staging.add(sidecar)
        staging.publish(force=force)
    return Outcome(time.perf_counter() - started, workers.nonfinite)


@contextmanager
def _opened(paths: Iterable[Path]) -> Iterator[list[int]]:
    """The inputs' file descriptors, for the length of a `with` block."""
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            except OSError as error:
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Part of a piece: entries `first` to `first + numel` of it."""

    tensor: TensorPlan
    piece: Piece
    first: int
    numel: int


def _chunks(plan: Plan, size: int) -> Iterator[_Chunk]:
    for tensor in plan.tensors:
        for piece in tensor.pieces:
            for first in range(0, piece.numel, size):
                yield _Chunk(tensor, piece, first, min(size, piece.numel - first))


class _Workers:
    """The workers of one run and what they share: the chunks still to do, and the first failure."""

    def __init__(self, plan: Plan, sources: list[int], targets: list[int], device: torch.device, chunk: int) -> None:
        self.plan, self.sources, self.targets, self.device, self.chunk = plan, sources, targets, device, chunk
        self.nonfinite: dict[str, str] = {}
        self._chunks = _chunks(plan, chunk)
        self._take = threading.Lock()
        self._stop = threading.Event()
        self._done: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()

    def run(self, number: int) -> Generator[int, None, None]:
        """Run the workers; yields the size of every chunk written. The first failure stops all of them and is
        raised here.
        """
        threads = [threading.Thread(target=self._worker, name=f"lines-worker-{n}", daemon=True) for n in range(number)]
        try:
            for thread in threads:
                thread.start()
            running = number
            while running:
                item = self._done.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            self._stop.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            torch.set_num_threads(torch.get_num_threads())  # the workers' setting is the default of new threads, too

    def _worker(self) -> None:
        try:
            torch.set_num_threads(1)  # for this thread alone; the workers are the parallelism
            if self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            buffers = _Buffers(self.device, self.chunk)
            with torch.inference_mode():
                while not self._stop.is_set():
                    with self._take:
                        chunk = next(self._chunks, None)
                    if chunk is None:
                        break
                    self._done.put(self._one(buffers, chunk))
            self._done.put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits, which raises it
            self._done.put(error)

    def _one(self, buffers: _Buffers, chunk: _Chunk) -> int:
        """Make one chunk of the output; returns its bytes."""
        dtype = chunk.tensor.info.dtype
        base = self._read(buffers.base, chunk.piece.base, chunk)
        ft = self._read(buffers.ft, chunk.piece.ft, chunk)
        if base is not None and ft is not None:
            values: torch.Tensor | None = self._combine(buffers, chunk, base, ft)
            raw: memoryview | None = None
        else:
            only = base or ft
            assert only is not None
            values = only.values() if only.dtype in TORCH_DTYPES else None
            raw = only.raw if only.dtype == dtype else None
        if values is not None:
            self._check(chunk, base, ft, extremes(values))
        if raw is None:
            assert values is not None
            cast(values, buffers.out.device_view(chunk.numel, TORCH_DTYPES[dtype]))
            raw = buffers.out.to_host(chunk.numel * itemsize(dtype))
        start = chunk.tensor.info.offset + (chunk.piece.start + chunk.first) * itemsize(dtype)
        with naming(self.plan.output):
            write_from(self.targets[chunk.tensor.file], raw, start)
        return len(raw)

    def _combine(self, buffers: _Buffers, chunk: _Chunk, base: _Loaded, ft: _Loaded) -> torch.Tensor:
        """The formula on one chunk: [numel], in the compute dtype."""
        dtype = compute_dtype(TORCH_DTYPES[base.dtype], TORCH_DTYPES[ft.dtype])
        result, scratch = buffers.result(chunk.numel, dtype), buffers.scratch(chunk.numel, dtype)
        add_scaled_task_vector(base.values(), ft.values(), chunk.piece.coefficient, scratch=scratch, result=result)
        return result

    def _read(self, buffer: _Buffer, source: Slice | None, chunk: _Chunk) -> _Loaded | None:
        if source is None:
            return None
        width = itemsize(source.dtype)
        view = buffer.host(chunk.numel * width)
        path = self.plan.inputs[source.file]
        try:
            got = read_into(self.sources[source.file], view, source.offset + chunk.first * width)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if got < len(view):
            raise CheckpointError(
                f"{path}: ends in the middle of tensor {printable(chunk.tensor.name)}; it was whole a moment ago",
                hint="Something shortened it meanwhile. Run it again when the file is at rest.",
            )
        return _Loaded(buffer, source.dtype, chunk.numel, view)

    def _check(self, chunk: _Chunk, base: _Loaded | None, ft: _Loaded | None, extreme: torch.Tensor) -> None:
        """Find NaN, Inf and overflow by the extremes of what is about to be written: rounding is monotonic."""
        stored = torch.empty(2, dtype=TORCH_DTYPES[chunk.tensor.info.dtype], device=extreme.device)
        cast(extreme, stored)
        if bool(stored.isfinite().all()):
            return
        found, hint = self._what_is_wrong(chunk, base, ft)
        if not self.plan.recipe.allow_nonfinite:
            raise DataError(found, hint=hint)
        self.nonfinite.setdefault(chunk.tensor.name, found)

    def _what_is_wrong(self, chunk: _Chunk, base: _Loaded | None, ft: _Loaded | None) -> tuple[str, str]:
        """What the output would hold that no model should, and the way out."""
        tensor = f"tensor {printable(chunk.tensor.name)}"
        for loaded, source in ((base, chunk.piece.base), (ft, chunk.piece.ft)):
            if loaded is not None and source is not None and (bad := first_nonfinite(loaded.values())):
                where = f"first at entry {chunk.piece.start + chunk.first + bad[0]:,}"
                found = f"{self.plan.inputs[source.file]}: {tensor} holds {bad[1]}, {where}"
                return found, "--allow-nonfinite lets such values through."
        return (
            f"{tensor}: a value is beyond what {chunk.tensor.info.dtype}, its output dtype, can hold",
            "Write a wider --dtype, or let infinities through with --allow-nonfinite.",
        )


# --- buffers ---


class _Buffer:
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


class _Buffers:
    """One worker's, made once and used for every chunk: two inputs, the output, and two for the arithmetic.

    Raises:
        MemoryError: there is not enough memory, on the host or on the device.
    """

    def __init__(self, device: torch.device, chunk: int) -> None:
        try:
            self.base, self.ft, self.out = (_Buffer(device, chunk * 8) for _ in range(3))
            self._scratch, self._result = (torch.empty(chunk * 8, dtype=torch.uint8, device=device) for _ in range(2))
        except RuntimeError as error:  # torch's way to say it
            raise MemoryError(str(error)) from error

    def scratch(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """[numel] of `dtype` on the device, to be overwritten."""
        return self._scratch[: numel * dtype.itemsize].view(dtype)

    def result(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """[numel] of `dtype` on the device, to be overwritten."""
        return self._result[: numel * dtype.itemsize].view(dtype)


@dataclass(slots=True)
class _Loaded:
    """A chunk of one input, read into a buffer."""

    buffer: _Buffer
    dtype: str
    numel: int
    raw: memoryview

    def values(self) -> torch.Tensor:
        """[numel], on the worker's device."""
        self.buffer.to_device(len(self.raw))
        return self.buffer.device_view(self.numel, TORCH_DTYPES[self.dtype])
