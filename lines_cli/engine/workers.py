"""The threads that stream a plan's inputs: each has a device and buffers of its own and takes one item of work after
another.

Memory is bounded by workers x chunk x models, whatever the model's size. What is done with an item is a job's business:
the engine's writes it, the measuring passes count or sum over it. On CUDA every worker has a stream: while one waits
for the disk, others copy and compute, and a worker reads the next input while the last one is on its way to the device.
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

from lines_cli.checkpoint.header import itemsize
from lines_cli.checkpoint.reader import Stamp
from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES, first_nonfinite, task_vector
from lines_cli.engine.whole_tensors import Kept
from lines_cli.errors import ChangedInputError, CheckpointError, DataError, LinesError, RecipeError, printable
from lines_cli.methods import Values
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.resources import BLOCK, Resources, Room
from lines_cli.plan.tensors import Piece, Slice
from lines_cli.storage.digest import PIECE
from lines_cli.storage.files import in_whole_pages, open_to_stream, read_into

Item = TypeVar("Item")
Result = TypeVar("Result")
Thread = TypeVar("Thread", bound="Reader")


def choose_devices(name: str) -> tuple[torch.device, ...]:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        return (torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),)
    if name == "cpu":
        return (torch.device("cpu"),)
    there = torch.cuda.device_count()
    devices = dict.fromkeys(int(one.partition(":")[2] or 0) for one in name.split(","))
    if max(devices) >= there:
        raise RecipeError(f"--device {name}: torch {torch.__version__} sees {there} CUDA devices here")
    return tuple(torch.device("cuda", index) for index in devices)


def apart(device: torch.device) -> bool:
    """Whether a device has memory of its own, into which everything has to be copied."""
    return device.type != "cpu"


class Crew:
    """Which device each worker of a run computes on.

    Args:
        resources: what was asked.

    Raises:
        RecipeError: there is no such device here.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources, self.devices = resources, choose_devices(resources.device)
        self.apart = apart(self.devices[0])
        number = resources.threads_on_cuda(len(self.devices)) if self.apart else resources.threads
        self.members = [self.devices[n % len(self.devices)] for n in range(number)]

    def whole_tensors(self) -> Kept[Whole]:
        """Where the workers of a pass keep what they merge whole."""
        return Kept(len(self.members))

    def chunk(self, room: Room, *, whole: int = 0, whole_blocks: bool = False) -> int:
        """Entries per step.

        Args:
            room: what one entry takes.
            whole: bytes that whole tensors take beside the workers' buffers.
            whole_blocks: a multiple of BLOCK.

        Raises:
            RecipeError: the share of a device's memory is too small for any.
        """
        fits = None
        if self.apart:
            most, entry = self._gpu_memory(), room.nbytes(slots=SLOTS)
            workers = -(-len(self.members) // len(self.devices))
            fits = ((most - whole) // workers - _ROUNDED_UP) // entry
            if fits < BLOCK:
                raise RecipeError(
                    f"--gpu-memory {most:,}: {workers} workers on a device need "
                    f"{workers * (BLOCK * entry + _ROUNDED_UP) + whole:,} bytes",
                    hint="Allow more, or run fewer --workers.",
                )
        return self.resources.chunk_for(room, fits=fits, whole_blocks=whole_blocks)

    def _gpu_memory(self) -> int:
        """Bytes that a run may take of each device."""
        total = min(_total_memory(device) for device in self.devices)
        return min(total, self.resources.gpu_memory or min(total // 8, 2 * 2**30))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within it torch's allocator takes no more of any CUDA device than the run may have, whatever a method makes
        meanwhile: beyond that it reports to be out of memory, and chunks are halved.
        """
        devices = self.devices if self.apart and torch.cuda.is_available() else ()
        try:
            for device in devices:
                taken = torch.cuda.memory_reserved(device)  # by whoever called us
                share = (taken + self._gpu_memory()) / _total_memory(device)
                torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
            yield
        finally:
            for device in devices:
                torch.cuda.set_per_process_memory_fraction(1.0, device)


_ROUNDED_UP = 40 * 2**20
"""Bytes of a device that torch's allocator takes for each worker beyond what it is asked for: it rounds to 20 MiB."""


def _total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[list[int]]:
    """The inputs' file descriptors, for the length of a `with` block."""
    paths = list(paths)
    allow_open_files(len(paths))
    fds: list[int] = []
    try:
        for path in paths:
            try:
                fds.append(open_to_stream(path))
            except OSError as error:
                hint = None
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    hint = f"{len(paths):,} files are read at once. Allow more (ulimit -n), or merge larger shards."
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=hint) from error
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


def refuse_changed(paths: Sequence[Path], fds: Sequence[int], stamps: Sequence[Stamp]) -> None:
    """Refuse inputs that are not, or no longer, in the state in which their headers were read.

    Raises:
        ChangedInputError: which file, and how it differs.
    """
    for path, fd, stamp in zip(paths, fds, stamps, strict=True):
        there = os.fstat(fd)
        if (there.st_size, there.st_mtime_ns) != (stamp.nbytes, stamp.mtime_ns):
            what = f"its size went from {stamp.nbytes:,} to {there.st_size:,} bytes"
            if there.st_size == stamp.nbytes:
                what = f"its time moved by {abs(there.st_mtime_ns - stamp.mtime_ns) / 1e9:.3f} s"
            raise ChangedInputError(
                f"{path} was modified while lines was reading it: {what}",
                hint="Run it again when nothing writes to it.",
            )


def allow_open_files(number: int) -> None:
    """Raise this process's own limit of open files as far as is needed and allowed, where there is one.

    Args:
        number: how many inputs and outputs are open at once.
    """
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256  # libraries, and what the caller has open
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next chunk, where it would hand it back to the system each time: then
    every temporary of 1 MiB is 300 page faults, and TIES takes three times as long. What one thread freed, others may
    use (one arena), or else it takes 30 MB more. Only glibc can be told.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 2**20)
        libc.mallopt(_ARENA_MAX, 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h


class Held(Protocol):
    """An input that is no file: tensors in memory."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """As `positional.read_into`."""


Opened = int | Held
"""An opened input: a file descriptor, or what is read in the same way."""


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
        return self.numel * sum(itemsize(source.dtype) for source in self.piece.sources)

    def cut(self, size: int) -> Iterator[Chunk[Tensor]]:
        """The same entries in steps of at most `size`, which end at multiples of it: so no block is summed in parts,
        and few random draws are made twice.
        """
        first, end = self.first, self.first + self.numel
        if first // size == (end - 1) // size:
            yield self
            return
        while first < end:
            until = min(end, (first // size + 1) * size)
            yield Chunk(self.tensor, self.piece, first, until - first)
            first = until


PlanChunk = Chunk[TensorPlan]

_ITEM = 2**20  # entries: what a worker takes at a time, so that small tensors do not queue one by one


def items_of(pieces: Iterable[tuple[Tensor, Piece]]) -> Iterator[list[Chunk[Tensor]]]:
    """All entries of some tensors' pieces, in order, some at a time: one item of work after another."""
    item: list[Chunk[Tensor]] = []
    held = 0
    for tensor, piece in pieces:
        for first in range(0, piece.numel, _ITEM):
            item.append(Chunk(tensor, piece, first, min(_ITEM, piece.numel - first)))
            held += item[-1].numel
            if held >= _ITEM:
                yield item
                item, held = [], 0
    if item:
        yield item


SLOTS = 2  # inputs that are on their way to a device at a time


class Reader:
    """One thread's device and buffers: reads a chunk's entries in any input, and holds them widened.

    Args:
        paths: the inputs.
        sources: the same, opened.
        device: where entries are held. A CUDA device gets a stream of this thread's own.
        chunk: most entries of one.
        room: what one entry takes.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(
        self, paths: Sequence[Path], sources: Sequence[Opened], device: torch.device, *, chunk: int, room: Room
    ) -> None:
        self.paths, self.sources, self.device, self.chunk, self._room = paths, sources, device, chunk, room
        if device.type == "cuda":
            torch.cuda.set_device(device)
            torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call] # this thread's
        self.at: str | None = None
        """The tensor that is being worked on."""
        self._raw: list[Buffer] = []
        self._held = torch.empty(0)
        self._views: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None  # of what is held: the last asked for
        self._out: list[Buffer] = []
        if not self._allocate():
            self.halve()

    @property
    def out(self) -> Buffer:
        """Where a chunk of the output is put."""
        return self._out[0]

    def _allocate(self) -> bool:
        """Take the memory for the buffers, if the device has it."""
        room, device, chunk = self._room, self.device, self.chunk
        slots = SLOTS if apart(device) else 1
        try:
            self._raw = [Buffer(device, chunk * room.stored) for _ in range(slots)]
            self._out = [Buffer(device, chunk * room.written)]
            self._held = torch.empty(room.held, chunk * room.width, dtype=torch.uint8, device=device)
        except torch.cuda.OutOfMemoryError:
            return False
        except RuntimeError as error:  # torch's way to say it of the host
            nbytes = chunk * room.nbytes(slots=slots)
            raise MemoryError(f"a worker's buffers are {nbytes:,} bytes") from error
        return True

    def halve(self) -> None:
        """Go on with chunks of half the size, because the device is out of memory.

        Raises:
            MemoryError: they are as small as may be.
        """
        while True:
            self._raw, self._out, self._held, self._views = [], [], torch.empty(0), None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.chunk < 2 * BLOCK:
                raise MemoryError(f"{self.device} has no room for chunks of {self.chunk:,} entries")
            self.chunk = self.chunk // 2 // BLOCK * BLOCK
            if self._allocate():
                return

    def cut(self, chunks: Iterable[Chunk[Tensor]]) -> Iterator[Chunk[Tensor]]:
        """The same entries, in steps that fit the buffers."""
        for chunk in chunks:
            self.at = chunk.tensor.name
            yield from chunk.cut(self.chunk)

    def held(self, chunk: Chunk[Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A place for the chunk's entries in each input, in the dtype they are widened to: all of it [inputs, numel],
        and each row.
        """
        dtype = torch.float64 if chunk.tensor.in_float64 else torch.float32
        if self._views is None or self._views[0].shape[1] != chunk.numel or self._views[0].dtype != dtype:
            every = self._held.view(dtype)[:, : chunk.numel]
            self._views = every, every.unbind()
        return self._views

    def read(self, chunk: Chunk[Tensor], source: Slice, buffer: Buffer | None = None) -> Loaded:
        """A chunk's entries in one input, as they are stored.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        if buffer is None:
            buffer = self._raw[0]
            self._raw.append(self._raw.pop(0))  # the next input goes into the next one
        width = itemsize(source.dtype)
        view = buffer.to_fill(chunk.numel * width)
        path = self.paths[source.file]
        try:
            got = _read(self.sources[source.file], view, source.offset + chunk.first * width)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if got < len(view):
            raise ChangedInputError(
                f"{path}: ends in the middle of tensor {printable(chunk.tensor.name)}; it was whole a moment ago",
                hint="Something shortened it. Run it again when nothing writes to it.",
            )
        return Loaded(buffer, source.dtype, chunk.numel, view)


def _read(source: Opened, view: memoryview, offset: int) -> int:
    return read_into(source, view, offset) if isinstance(source, int) else source.read_into(view, offset)


@dataclass(frozen=True, slots=True)
class Whole:
    """A piece of a tensor that was merged whole.

    Attributes:
        values: [numel], in the compute dtype, on a worker's device; not to be changed.
        squares, kept: for each model, as `merge_chunk.Merged` has them, of all of it.
        nonfinite: which input holds NaN or Inf, and where, if one does.
    """

    values: torch.Tensor
    squares: tuple[float, ...]
    kept: tuple[float, ...]
    nonfinite: str | None


class Worker(Reader):
    """One thread's device and buffers, and what it reads of a plan's inputs with them (`merge_chunk` computes).

    Args:
        plan: what is carried out.
        sources: the open inputs, as in `plan.inputs`.
        device: where entries are held.
        chunk: most entries of one.
        shared: pieces that were merged whole, for all workers of a pass.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Opened],
        device: torch.device,
        chunk: int,
        shared: Kept[Whole] | None = None,
    ) -> None:
        super().__init__(plan.inputs, sources, device, chunk=chunk, room=plan.room)
        self.plan, self.shared = plan, shared
        self.piece = in_whole_pages(PIECE)  # of the output, on its way to the disk
        self.alone = False
        """Whether no other worker needs a part of the piece that is worked on."""
        self.last_whole: tuple[tuple[str, int, str], Whole] | None = None
        """The piece that was last merged whole, if no other worker needed a part of it."""
        self._keywords: tuple[TensorPlan, int | None, Values] | None = None  # of the last tensor

    def cut(self, chunks: Iterable[PlanChunk]) -> Iterator[PlanChunk]:  # type: ignore[override]
        """The same entries, in steps that fit the buffers."""
        for chunk in chunks:
            self.at, self.alone = chunk.tensor.name, chunk.numel == chunk.piece.numel
            yield from chunk.cut(self.chunk)

    def inputs(self, chunk: PlanChunk) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """What is merged: the base's entries, if there is a base, and each model's; [numel] each, in the compute dtype,
        to be overwritten.
        """
        base = self.base(chunk)
        _, (_, *models) = self.held(chunk)
        for into, source in zip(models, chunk.piece.models, strict=False):
            into.copy_(self.read(chunk, source).values())
        return base, models[: len(chunk.piece.models)]

    def base(self, chunk: PlanChunk) -> torch.Tensor | None:
        """The base's entries, if there is a base: [numel], in the compute dtype, to be overwritten."""
        if chunk.piece.base is None:
            return None
        _, (base, *_) = self.held(chunk)
        return base.copy_(self.read(chunk, chunk.piece.base).values())

    def task_vectors(self, chunk: PlanChunk) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The base's entries, and what each model changed of them: `f32(model) - f32(base)`, rounded."""
        base, models = self.inputs(chunk)
        assert base is not None
        every, _ = self.held(chunk)
        task_vector(every[1 : 1 + len(models)], base)  # of all at once
        return base, models

    def keywords(self, tensor: TensorPlan, *, majority: int | None = None) -> Values:
        """What the method's function is given beside tensors (`Plan.keywords`)."""
        if self._keywords is None or self._keywords[0] is not tensor or self._keywords[1] != majority:
            self._keywords = tensor, majority, self.plan.keywords(tensor, majority=majority)
        return self._keywords[2]

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
        new_worker: makes a thread's worker, in that thread, given its device.
        items: what there is to do, in order.
        job: what is done with each; it can be done again, from the start.
        crew: the device of each thread.
    """

    def __init__(
        self,
        new_worker: Callable[[torch.device], Thread],
        items: Iterable[Item],
        job: Callable[[Thread, Item], Result],
        crew: Crew,
    ) -> None:
        self._new_worker, self._job, self._crew = new_worker, job, crew
        self._items = enumerate(items)
        self._take = threading.Lock()
        self._stop = threading.Event()
        self._done: queue.SimpleQueue[tuple[int, Result] | BaseException | None] = queue.SimpleQueue()

    def run(self) -> Generator[tuple[int, Result], None, None]:
        """Run it; yields every item's number and result as it is done. The first failure stops all and is raised."""
        workers = [
            threading.Thread(target=self._work, args=[device], name=f"lines-worker-{n}", daemon=True)
            for n, device in enumerate(self._crew.members)
        ]
        try:
            for worker in workers:
                try:
                    worker.start()
                except RuntimeError as error:
                    if isinstance(error.__context__, KeyboardInterrupt):  # it came while the thread began
                        raise error.__context__ from None
                    raise MemoryError(str(error)) from error  # Python's way to say that there is none for its stack
            running = len(workers)
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

    def in_order(self) -> Generator[Result, None, None]:
        """Run it; yields the results in the order of the items, so that sums do not depend on who was faster."""
        early: dict[int, Result] = {}
        due = 0
        with closing(self.run()) as results:
            for number, result in results:
                early[number] = result
                while due in early:
                    yield early.pop(due)
                    due += 1

    def _work(self, device: torch.device) -> None:
        worker = None
        try:
            torch.set_num_threads(1)  # for this thread alone; the workers are the parallelism
            with torch.inference_mode():
                worker = self._new_worker(device)
                while not self._stop.is_set():
                    with self._take:
                        item = next(self._items, None)
                    if item is None:
                        break
                    self._done.put((item[0], self._do(worker, item[1])))
            self._done.put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits, which raises it
            if not isinstance(error, (LinesError, MemoryError)) and worker is not None and worker.at is not None:
                error.args = (*error.args, f"at tensor {printable(worker.at)}")
            self._done.put(error)

    def _do(self, worker: Thread, item: Item) -> Result:
        """Do the job to one item; in smaller steps, if the device has no memory for it."""
        while True:
            try:
                return self._job(worker, item)
            except torch.cuda.OutOfMemoryError:
                pass
            except RuntimeError as error:  # torch's way to say it of the host
                if "alloc" not in str(error):
                    raise
                raise MemoryError(str(error).partition("\n")[0]) from error
            worker.halve()  # here, where no traceback holds the tensors of the attempt any more


class Buffer:
    """Reusable bytes on the host and, where a device has memory of its own, as many there; on the CPU the two are one.

    Host memory is pinned for CUDA, and copies take their turn in the thread's stream: `to_fill` waits until the last
    one to the device has left, `to_host` until its own has arrived.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_cuda = device.type == "cuda"
        nbytes = max(nbytes, 1)
        self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device) if apart(device) else self._host
        self._memory = memoryview((ctypes.c_char * nbytes).from_address(self._host.data_ptr())).cast("B")
        self._moved = torch.cuda.Event(blocking=True) if on_cuda else None  # type: ignore[no-untyped-call]

    def to_fill(self, nbytes: int) -> memoryview:
        """The first bytes on the host, to read a file into."""
        self._wait()
        return self._memory[:nbytes]

    def device_view(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The first entries on the device, as `dtype`."""
        return self._device[: numel * dtype.itemsize].view(dtype)

    def to_device(self, nbytes: int) -> None:
        """Copy the first bytes from the host, before whatever the thread's stream does next."""
        if self._device is not self._host:
            self._device[:nbytes].copy_(self._host[:nbytes], non_blocking=True)
            self._record()

    def to_host(self, nbytes: int) -> memoryview:
        """The first bytes, copied from the device after all that the thread's stream was given; they have arrived."""
        if self._device is not self._host:
            self._host[:nbytes].copy_(self._device[:nbytes], non_blocking=True)
            self._record()
            self._wait()
        return self._memory[:nbytes]

    def _record(self) -> None:
        if self._moved is not None:
            self._moved.record()

    def _wait(self) -> None:
        if self._moved is not None:
            self._moved.synchronize()


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
