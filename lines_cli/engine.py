"""Plan -> bytes. Knows tensors, files and workers; knows no command, no recipe format and no screen.

What the plan needs to know of the numbers is measured first. Then a few workers take chunks of the plan in file order:
`pread` the chunk from all inputs, compute on the run's device, `pwrite` it where the plan says. No chunk depends on
another, so how many workers there are and how large the chunks changes no byte.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass

import torch

from lines_cli.arithmetic import TORCH_DTYPES, add_scaled, cast, extremes, task_vector
from lines_cli.checkpoint.digest import FileRecord, GrowingDigest
from lines_cli.checkpoint.header import itemsize
from lines_cli.checkpoint.positional import write_from
from lines_cli.checkpoint.writer import Staging, check_destination, is_one_file, naming
from lines_cli.errors import DataError, printable
from lines_cli.measure import Track, measure, untracked
from lines_cli.plan import Plan
from lines_cli.planning import contents_beside, resolve, to_float32
from lines_cli.resources import Resources
from lines_cli.workers import (
    ALLOW_NONFINITE,
    PlanChunk,
    Pool,
    Worker,
    choose_device,
    chunks_of,
    keep_freed_memory,
    opened,
)


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
    device = choose_device(resources.device)
    keep_freed_memory()
    check_destination(plan.output, inputs=plan.read_paths, nbytes=plan.bytes_written, force=force)
    with Staging(plan.output) as staging, opened(plan.inputs) as sources:
        number = len(plan.passes) + 1
        times = sum(times for _, times in plan.passes)
        measured = times * plan.bytes_measured
        if plan.needs:
            plan = resolve(plan, measure(plan, sources, device, resources, track))
        targets = []
        for file in plan.outputs:
            fd = staging.create(file.name, file.nbytes)
            # A lone file has no recipe beside it that could record its digest.
            targets.append(_Target(fd, None if is_one_file(plan.output) else GrowingDigest(fd, file.nbytes)))
            with naming(plan.output):
                targets[-1].write(file.head, 0)
        job = _Write(plan, targets)
        size = resources.chunk_for(plan.number_of_models)
        pool = Pool(lambda: Worker(plan, sources, device, size), chunks_of(plan.tensors, size), job, device)
        # Closing stops and joins the threads, whatever interrupts this one, before the files they write are closed.
        with closing(pool.in_order(resources.threads)) as results:
            for _ in track(
                f"writing {number}/{number}" if number > 1 else "writing",
                plan.bytes_written,
                (job.tally(result) for result in results),
            ):
                pass
        for name, content in contents_beside(plan, job.records()):
            staging.add(name, content)
        staging.publish(force=force)
    return job.outcome(time.perf_counter() - started, 1 + times, measured + plan.bytes_read)


@dataclass(frozen=True, slots=True)
class _Target:
    """A weight file in the making, and its digest where one is taken."""

    fd: int
    digest: GrowingDigest | None

    def write(self, view: memoryview | bytes, offset: int) -> None:
        write_from(self.fd, view, offset)
        if self.digest is not None:
            self.digest.wrote(offset, offset + len(view))


@dataclass(frozen=True, slots=True)
class _Written:
    """What is to be told of a chunk that was written."""

    chunk: PlanChunk
    nbytes: int
    squares: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    differing: tuple[str, ...] = ()
    nonfinite: str | None = None


class _Write:
    """The job of making a chunk of the output and writing it; and the sum of what is to be told of all of them."""

    def __init__(self, plan: Plan, targets: list[_Target]) -> None:
        self.plan, self.targets, self.models = plan, targets, plan.number_of_models
        self.draws = plan.recipe.method.masks == "random"
        self.nonfinite: dict[str, str] = {}
        self.differing: dict[str, dict[str, None]] = defaultdict(dict)
        self.squares, self.kept, self.entries = [0.0] * self.models, [0.0] * self.models, 0

    def __call__(self, worker: Worker, chunk: PlanChunk) -> _Written:
        """Make one chunk of the output."""
        dtype, copy = chunk.tensor.info.dtype, chunk.piece.copy
        squares: tuple[float, ...] = ()
        kept: tuple[float, ...] = ()
        differing: tuple[str, ...] = ()
        raw: memoryview | None = None
        values: torch.Tensor | None = None
        if copy is None:
            values, squares, kept = self._merge(worker, chunk)
        else:
            loaded = worker.read(chunk, copy)
            values = loaded.values() if loaded.dtype in TORCH_DTYPES else None
            raw = loaded.raw if loaded.dtype == dtype else None
            differing = self._compare(worker, chunk, loaded.raw)
            if self.draws and values is not None and any(copy in d.models for d in chunk.tensor.draft.pieces):
                kept = (float(chunk.numel),)  # to be merged, but one model with nothing dropped is itself
        nonfinite = self._check(worker, chunk, extremes(values)) if values is not None else None
        if nonfinite is not None and copy is not None:  # looking for it read other inputs into the same buffer
            loaded = worker.read(chunk, copy)
            values, raw = loaded.values(), raw and loaded.raw
        if raw is None:
            assert values is not None
            cast(values, worker.out.device_view(chunk.numel, TORCH_DTYPES[dtype]))
            raw = worker.out.to_host(chunk.numel * itemsize(dtype))
        start = chunk.tensor.info.offset + (chunk.piece.start + chunk.first) * itemsize(dtype)
        with naming(self.plan.output):
            self.targets[chunk.tensor.file].write(raw, start)
        return _Written(chunk, len(raw), squares, kept, differing, nonfinite)

    def _merge(self, worker: Worker, chunk: PlanChunk) -> tuple[torch.Tensor, tuple[float, ...], tuple[float, ...]]:
        """The merged entries [numel] in the compute dtype; each model's squared norm and number of entries kept."""
        method = self.plan.recipe.method
        squares: tuple[float, ...] = ()
        kept: tuple[float, ...] = ()
        if method.takes == "task vectors":
            base, vectors = worker.task_vectors(chunk)
            if len(vectors) > 1:
                squares = tuple(float(torch.dot(tau, tau)) for tau in vectors)
            masks = worker.masks(chunk, vectors)
            if self.draws and masks is None:
                kept = (float(chunk.numel),) * self.models
            elif self.draws and masks is not None:
                kept = tuple(float(mask.sum(dtype=torch.float64)) for mask in masks)
            merged = worker.merge(chunk, vectors, masks)
        else:
            maybe_base, weights = worker.inputs(chunk)
            merged = worker.merge(chunk, weights, None)
            if maybe_base is None:
                return merged, (), ()
            base = maybe_base
            if self._coefficient(chunk) == 1:  # exactly what was merged
                return merged, (), ()
            merged = task_vector(merged, base)
        return add_scaled(base, merged, self._coefficient(chunk)), squares, kept

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

    def _check(self, worker: Worker, chunk: PlanChunk, extreme: torch.Tensor) -> str | None:
        """Find NaN, Inf and overflow by the extremes of what is about to be written: rounding is monotonic.

        Returns:
            What was found and let through.

        Raises:
            DataError: what was found, where that is not allowed.
        """
        stored = torch.empty(2, dtype=TORCH_DTYPES[chunk.tensor.info.dtype], device=extreme.device)
        cast(extreme, stored)
        if bool(stored.isfinite().all()):
            return None
        found, hint = worker.nonfinite(chunk), ALLOW_NONFINITE
        if found is None:
            name, dtype = printable(chunk.tensor.name), chunk.tensor.info.dtype
            found = f"tensor {name}: a value is beyond what {dtype}, its output dtype, can hold"
            hint = f"Write a wider dtype. {ALLOW_NONFINITE}"
        if not self.plan.recipe.allow_nonfinite:
            raise DataError(found, hint=hint)
        return found

    def tally(self, written: _Written) -> int:
        """Add a chunk, in the order of the plan, to what will be told; its bytes."""
        name = written.chunk.tensor.name
        for model, square in enumerate(written.squares):
            self.squares[model] += square
        for model, kept in enumerate(written.kept):
            self.kept[model] += kept
        self.entries += written.chunk.numel if written.kept else 0
        for path in written.differing:
            self.differing[name][path] = None
        if written.nonfinite is not None:
            self.nonfinite.setdefault(name, written.nonfinite)
        return written.nbytes

    def records(self) -> dict[str, FileRecord]:
        """What was written into each file of which a digest was taken."""
        files = zip(self.plan.outputs, self.targets, strict=True)
        return {file.name: target.digest.record() for file, target in files if target.digest is not None}

    def outcome(self, seconds: float, passes: int, bytes_read: int) -> Outcome:
        """What the whole run did."""
        shares = [model["kept"] for model in self.plan.models()] if self.plan.statistics.kept else []
        if self.draws and self.entries:
            shares = [kept / self.entries for kept in self.kept]
        return Outcome(
            self.plan,
            seconds,
            passes,
            bytes_read,
            self.nonfinite,
            tuple(math.sqrt(square) for square in self.squares) if any(self.squares) else (),
            tuple(share for share in shares if share is not None),
            {name: tuple(paths) for name, paths in self.differing.items()},
        )
