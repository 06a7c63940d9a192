"""Plan -> bytes. Knows tensors, files and workers; knows no command, no recipe format and no screen.

What the plan needs to know of the numbers is measured first. Then a few workers take spans of the output files, whole
blocks of their digests: for each chunk in it `pread` all inputs, compute on the worker's device, hash and `pwrite` the
result while it is in cache. No chunk depends on another, so how many workers there are and how large the chunks changes
no byte.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from lines_cli.arithmetic import TORCH_DTYPES, add_scaled, cast, dot, is_finite, task_vector
from lines_cli.checkpoint.digest import BLOCK, FileRecord, GrowingDigest, RangeWriter
from lines_cli.checkpoint.header import itemsize
from lines_cli.checkpoint.positional import NewFile
from lines_cli.checkpoint.writer import Staging, check_destination, is_one_file, naming
from lines_cli.errors import DataError, printable
from lines_cli.measure import Measurement, Track, measure, untracked
from lines_cli.plan import Plan, TensorPlan
from lines_cli.planning import contents_beside, resolve, to_float32
from lines_cli.resources import Resources
from lines_cli.workers import ALLOW_NONFINITE, Chunk, Crew, PlanChunk, Pool, Worker, keep_freed_memory, opened


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        plan: what was carried out: the plan, with what was measured in it.
        seconds: from opening the inputs to the output being in place, measuring included.
        passes: how often the inputs were read, wholly or in part.
        bytes_read: of tensor data, by all passes.
        nonfinite: tensors in which NaN, Inf or an overflow was let through (`allow_nonfinite`), and what was found
            first.
        norms: for each model the L2 norm of its task vector over all that was merged; empty where none was taken.
        kept: for each model the share of entries that were kept; empty where none are dropped.
        differing: integer and boolean tensors that are not the same in all inputs -> the inputs that differ from the
            one that was copied.
    """

    plan: Plan
    seconds: float
    passes: int
    bytes_read: int
    nonfinite: dict[str, str]
    norms: tuple[float, ...]
    kept: tuple[float, ...]
    differing: dict[str, tuple[str, ...]]


def run(plan: Plan, resources: Resources | None = None, *, force: bool = False, track: Track = untracked) -> Outcome:
    """Carry a plan out: measure, write, publish. On any failure the destination is as it was, and staging leaves no
    trace. In this process glibc keeps freed memory from then on, and the limit of open files is raised as is needed.

    Args:
        plan: from `make_plan`.
        resources: workers, device, chunk; they change speed and memory, never the bytes.
        force: replace an existing output, once the new one is whole.
        track: wraps the stream of byte counts of each pass.

    Raises:
        DataError: NaN or Inf in an input, or an overflow in the output dtype.
        CheckpointError: an input ends early or cannot be read.
        MismatchError: `alpha: auto` cannot be measured.
        OutputError: the destination is taken, is an input, or cannot be written.
    """
    started = time.perf_counter()
    resources = resources or Resources()
    crew = Crew(resources)
    keep_freed_memory()
    check_destination(plan.output, inputs=plan.read_paths, nbytes=plan.bytes_written, force=force)
    with Staging(plan.output) as staging, opened(plan.inputs) as sources, crew.bounded():
        measurement = measure(plan, sources, crew, track)
        if plan.needs:
            plan = resolve(plan, measurement.statistics)
        targets = []
        for file in plan.outputs:
            new = staging.create(file.name, file.nbytes)
            # A lone file has no recipe beside it that could record its digest.
            targets.append(_Target(new, None if is_one_file(plan.output) else GrowingDigest(file.nbytes)))
        job = _Write(plan, targets)
        size = crew.chunk(plan.room)
        span = BLOCK * (_BLOCKS_ON_CUDA if crew.apart else 1)
        pool = Pool(lambda device: Worker(plan, sources, device, size), spans_of(plan, span), job, crew)
        number = len(plan.passes) + 1
        title = f"writing {number}/{number}" if number > 1 else "writing"
        # Closing stops and joins the threads, whatever interrupts this one, before the files they write are closed.
        with closing(pool.in_order()) as results:
            for _ in track(title, plan.bytes_written, (job.tally(result) for result in results)):
                pass
        for name, content in contents_beside(plan, job.records()):
            staging.add(name, content)
        staging.publish(force=force)
    return job.outcome(time.perf_counter() - started, measurement)


_BLOCKS_ON_CUDA = 8  # of a file that a worker makes in one go there, where chunks are larger


@dataclass(frozen=True, slots=True)
class Span:
    """Part of an output file, from `start` up to `end`, and the chunks that make it, in order.

    It is cut without regard to tensors, yet never within an entry: a file begins with the widest, at a multiple of 8.
    """

    file: int
    start: int
    end: int
    chunks: tuple[PlanChunk, ...]


def spans_of(plan: Plan, size: int) -> Iterator[Span]:
    """All of the output files, in steps of `size` bytes."""
    by_file: dict[int, list[TensorPlan]] = defaultdict(list)
    for tensor in plan.tensors:
        by_file[tensor.file].append(tensor)
    for number, file in enumerate(plan.outputs):
        start, chunks = 0, []
        for tensor in by_file[number]:
            width = itemsize(tensor.info.dtype)
            for piece in tensor.pieces:
                at = tensor.info.offset + piece.start * width
                assert at % width == 0, "an entry lies across a cut"
                done = 0
                while done < piece.numel:
                    end = min(piece.numel, max(done, (start + size - at) // width))
                    if end > done:
                        chunks.append(Chunk(tensor, piece, done, end - done))
                    done = end
                    if at + end * width >= start + size:
                        yield Span(number, start, start + size, tuple(chunks))
                        start, chunks = start + size, []
        if start < file.nbytes:
            yield Span(number, start, file.nbytes, tuple(chunks))


@dataclass(frozen=True, slots=True)
class _Target:
    """A weight file in the making, and its digest where one is taken."""

    file: NewFile
    digest: GrowingDigest | None


@dataclass(frozen=True, slots=True)
class _Made:
    """What is to be told of a chunk that was made."""

    chunk: PlanChunk
    squares: tuple[float, ...] = ()
    kept: Sequence[float] = ()
    differing: tuple[str, ...] = ()
    nonfinite: str | None = None


class _Write:
    """The job of making a span of the output and writing it; and the sum of what is to be told of all of them."""

    def __init__(self, plan: Plan, targets: list[_Target]) -> None:
        self.plan, self.targets, self.models = plan, targets, plan.number_of_models
        self.draws = plan.recipe.method.masks == "random"
        self.nonfinite: dict[str, str] = {}
        self.differing: dict[str, dict[str, None]] = defaultdict(dict)
        self.squares, self.kept, self.entries = [0.0] * self.models, [0.0] * self.models, 0

    def __call__(self, worker: Worker, span: Span) -> tuple[int, list[_Made]]:
        """Make one span: its bytes, and what is to be told of its chunks."""
        target, told = self.targets[span.file], []
        writer = RangeWriter(target.file, span.start, target.digest, worker.piece)
        with naming(self.plan.output):
            writer.write(self.plan.outputs[span.file].head[span.start : span.end])
        for chunk in worker.cut(span.chunks):
            raw, made = self._make(worker, chunk)
            if made is not None:
                told.append(made)
            with naming(self.plan.output):
                writer.write(raw)
        assert writer.at == span.end, "the chunks of a span do not fill it"
        with naming(self.plan.output):
            writer.close()
        return span.end - span.start, told

    def _make(self, worker: Worker, chunk: PlanChunk) -> tuple[memoryview, _Made | None]:
        """One chunk as it is to be written, in a buffer of the worker's; and what is to be told of it."""
        dtype, copy = chunk.tensor.info.dtype, chunk.piece.copy
        squares: tuple[float, ...] = ()
        kept: Sequence[float] = ()
        differing: tuple[str, ...] = ()
        nonfinite: str | None = None
        raw: memoryview | None = None
        if copy is None:
            values, squares, kept = self._merge(worker, chunk)
        else:
            loaded = worker.read(chunk, copy)
            if chunk.piece.compare:
                differing = self._compare(worker, chunk, loaded.raw)
            if self.draws and loaded.dtype in TORCH_DTYPES and any(copy in d.models for d in chunk.tensor.draft.pieces):
                kept = (float(chunk.numel),)  # to be merged, but one model with nothing dropped is itself
            if loaded.dtype == dtype:
                raw = loaded.raw
            if dtype in TORCH_DTYPES:
                values = loaded.values()
        if raw is None:
            stored = worker.out.device_view(chunk.numel, TORCH_DTYPES[dtype])
            cast(values, stored)
            values = stored
        if dtype in TORCH_DTYPES and not is_finite(values):
            nonfinite = self._say_nonfinite(worker, chunk)
            if raw is not None:  # looking for it read other inputs into the same buffer
                assert copy is not None
                raw = worker.read(chunk, copy).raw
        if raw is None:
            raw = worker.out.to_host(chunk.numel * itemsize(dtype))
        told = squares or kept or differing or nonfinite
        return raw, _Made(chunk, squares, kept, differing, nonfinite) if told else None

    def _merge(self, worker: Worker, chunk: PlanChunk) -> tuple[torch.Tensor, tuple[float, ...], Sequence[float]]:
        """The merged entries [numel] in the compute dtype; each model's squared norm and number of entries kept."""
        coefficient = self._coefficient(chunk)
        if self.plan.recipe.method.takes == "task vectors":
            base, vectors = worker.task_vectors(chunk)
            squares: tuple[float, ...] = ()
            if len(vectors) > 1:
                squares = tuple(dot(tau, tau) for tau in vectors)
            kept = worker.drop(chunk, vectors)
            return add_scaled(base, worker.merge(chunk, vectors), coefficient), squares, kept or ()
        maybe_base, weights = worker.inputs(chunk)
        merged = worker.merge(chunk, weights)
        if maybe_base is None or coefficient == 1:  # exactly what was merged
            return merged, (), ()
        return add_scaled(maybe_base, task_vector(merged, maybe_base), coefficient), (), ()

    @staticmethod
    def _coefficient(chunk: PlanChunk) -> float:
        """Rounded to the dtype that the arithmetic runs in."""
        exact = chunk.tensor.coefficient
        return exact if chunk.tensor.in_float64 else to_float32(exact)

    def _compare(self, worker: Worker, chunk: PlanChunk, copied: memoryview) -> tuple[str, ...]:
        """Which inputs hold something else than what is copied."""
        return tuple(
            str(self.plan.inputs[source.file])
            for source in chunk.piece.compare
            if worker.read(chunk, source, worker.out).raw != copied
        )

    def _say_nonfinite(self, worker: Worker, chunk: PlanChunk) -> str:
        """Say what is not finite of a chunk that is about to be written, where that is let through.

        Raises:
            DataError: what was found, where that is not allowed.
        """
        found, hint = worker.nonfinite(chunk), ALLOW_NONFINITE
        if found is None:
            name, dtype = printable(chunk.tensor.name), chunk.tensor.info.dtype
            found = f"tensor {name}: a value is beyond what {dtype}, its output dtype, can hold"
            hint = f"Write a wider dtype. {ALLOW_NONFINITE}"
        if not self.plan.recipe.allow_nonfinite:
            raise DataError(found, hint=hint)
        return found

    def tally(self, written: tuple[int, list[_Made]]) -> int:
        """Add a span, in the order of the files, to what will be told; its bytes."""
        nbytes, chunks = written
        for made in chunks:
            name = made.chunk.tensor.name
            for model, square in enumerate(made.squares):
                self.squares[model] += square
            for model, kept in enumerate(made.kept):
                self.kept[model] += kept
            self.entries += made.chunk.numel if made.kept else 0
            for path in made.differing:
                self.differing[name][path] = None
            if made.nonfinite is not None:
                self.nonfinite.setdefault(name, made.nonfinite)
        return nbytes

    def records(self) -> dict[str, FileRecord]:
        """What was written into each file of which a digest was taken."""
        files = zip(self.plan.outputs, self.targets, strict=True)
        return {file.name: target.digest.record() for file, target in files if target.digest is not None}

    def outcome(self, seconds: float, measurement: Measurement) -> Outcome:
        """What the whole run did."""
        shares = [model["kept"] for model in self.plan.models()] if self.plan.statistics.kept else []
        if self.draws and self.entries:
            shares = [kept / self.entries for kept in self.kept]
        return Outcome(
            self.plan,
            seconds,
            1 + measurement.passes,
            measurement.bytes_read + self.plan.bytes_read,
            self.nonfinite,
            tuple(math.sqrt(square) for square in self.squares) if any(self.squares) else (),
            tuple(share for share in shares if share is not None),
            {name: tuple(paths) for name, paths in self.differing.items()},
        )
