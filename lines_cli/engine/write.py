"""The pass that writes: the output files cut into ranges, and the job that makes one."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch

from lines_cli.checkpoint.formulas import Dequantised
from lines_cli.checkpoint.header import COMPLEX, TensorInfo, itemsize
from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES, add_scaled, cast, is_finite, same_nan, task_vector
from lines_cli.engine.chunks import Chunk, PlanChunk, Streamed, follows, joined, small_and_plain
from lines_cli.engine.fp8 import read_scales, to_codes
from lines_cli.engine.measure import Measurement
from lines_cli.engine.merge_chunk import Look, Merged, merge_chunk, nonfinite_behind
from lines_cli.engine.realised import every_for, lost, realised
from lines_cli.engine.rounding import cast_at_random
from lines_cli.engine.workers import Worker
from lines_cli.errors import ChangedInputError, DataError, MismatchError, printable
from lines_cli.methods import Drawn
from lines_cli.methods.sparsify import Where
from lines_cli.plan.coefficients import to_float32
from lines_cli.plan.layout import OutputFile
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.realised import NOTHING_LOST, NOTHING_REALISED, Groups, Lost, Realised, Row, rows_of
from lines_cli.plan.statistics import NOTHING_MEASURED
from lines_cli.storage.destination import naming
from lines_cli.storage.digest import (
    DIGEST_BLOCK,
    FileRecord,
    GrowingDigest,
    RangeWriter,
    Written,
)
from lines_cli.storage.journal import WrittenRange
from lines_cli.storage.making import Notes


class Placed(Streamed, Protocol):
    """A tensor with its place in an output file."""

    @property
    def file(self) -> int:
        """The number of the file."""

    @property
    def info(self) -> TensorInfo:
        """Its dtype and shape, and its place there."""


Tensor = TypeVar("Tensor", bound=Placed)
Thread = TypeVar("Thread", bound="Writer")
Counts = TypeVar("Counts", bound="Counted")


@dataclass(frozen=True, slots=True)
class OutputRange(Generic[Tensor]):
    """Part of an output file, from `start` up to `end`, and the chunks that make it, in order.

    It is cut without regard to tensors, yet never within an entry: a file begins with the widest, at a multiple of 8.
    """

    file: int
    start: int
    end: int
    chunks: tuple[Chunk[Tensor], ...]


def output_ranges(outputs: Sequence[OutputFile], tensors: Iterable[Tensor], size: int) -> Iterator[OutputRange[Tensor]]:
    """All of the output files, in steps of `size` bytes."""
    by_file: dict[int, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        by_file[tensor.file].append(tensor)
    for number, file in enumerate(outputs):
        start, chunks = 0, []
        for tensor in by_file[number]:
            width = itemsize(tensor.info.dtype)
            for segment in tensor.segments:
                at = tensor.info.offset + segment.start * width
                assert at % width == 0, "an entry lies across a cut"
                done = 0
                while done < segment.numel:
                    end = min(segment.numel, max(done, (start + size - at) // width))
                    if end > done:
                        chunks.append(Chunk(tensor, segment, done, end - done))
                    done = end
                    if at + end * width >= start + size:
                        yield OutputRange(number, start, start + size, tuple(chunks))
                        start, chunks = start + size, []
        if start < file.nbytes:
            yield OutputRange(number, start, file.nbytes, tuple(chunks))


@dataclass(frozen=True, slots=True)
class Target:
    """A weight file in the making, and its digest."""

    file: Written
    digest: GrowingDigest


@dataclass(slots=True)
class Tally:
    """What is counted while a part of the output is made, or all of it.

    Attributes:
        squares: for each model the squared norm of its task vector.
        kept: for each model how many entries were kept, of `entries`.
        differing: tensors that the inputs hold different copies of -> the inputs that differ.
        nonfinite: tensors -> what is not finite in them, let through.
        negative: tensors that are variances -> the least entry, below 0.
        realised: groups of tensors (numbers into `Groups.groups`) -> what rounding left of their coefficient.
        lost: groups -> what storing their weights in 8 bits lost.
    """

    squares: list[float]
    kept: list[float]
    entries: int = 0
    differing: dict[str, dict[str, None]] = field(default_factory=dict)
    nonfinite: dict[str, str] = field(default_factory=dict)
    negative: dict[str, float] = field(default_factory=dict)
    realised: dict[int, Realised] = field(default_factory=dict)
    lost: dict[int, Lost] = field(default_factory=dict)

    @classmethod
    def nothing(cls, models: int) -> Tally:
        """To begin with."""
        return cls([0.0] * models, [0.0] * models)

    @classmethod
    def of(cls, tally: Mapping[str, Any], models: int) -> Tally:
        """What a journal has of a part.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, OverflowError: it is something else.
        """
        squares, kept = ([float(number) for number in tally[key]] for key in ("squares", "kept"))
        if len(squares) != models or len(kept) != models or type(tally["entries"]) is not int:
            raise ValueError(tally)
        differing = {name: {str(path): None for path in paths} for name, paths in tally["differing"].items()}
        nonfinite = {name: str(found) for name, found in tally["nonfinite"].items()}
        negative = {name: float(least) for name, least in tally["negative"].items()}
        realised = {int(group): Realised.of(sums) for group, sums in tally["realised"].items()}
        in_8_bits = {int(group): Lost.of(sums) for group, sums in tally.get("lost", {}).items()}
        return cls(squares, kept, tally["entries"], differing, nonfinite, negative, realised, in_8_bits)

    def add(self, other: Tally) -> None:
        """Take account of another part, which comes behind."""
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]
        self.kept = [a + b for a, b in zip(self.kept, other.kept, strict=True)]
        self.entries += other.entries
        for name, paths in other.differing.items():
            self.differing.setdefault(name, {}).update(paths)
        self.nonfinite = other.nonfinite | self.nonfinite
        for name, least in other.negative.items():
            self.negative[name] = min(least, self.negative.get(name, 0.0))
        for group, sums in other.realised.items():
            self.realised[group] = self.realised.get(group, NOTHING_REALISED) + sums
        for group, of_it in other.lost.items():
            self.lost[group] = self.lost.get(group, NOTHING_LOST) + of_it


@dataclass(frozen=True, slots=True)
class Exact:
    """A chunk before it is rounded.

    Attributes:
        values: [n], in the compute dtype; may be overwritten.
        base, tau: the base's entries and the task vector before it was scaled, the same; None where there are none.
        stays: [n], boolean: NaN and Inf that all inputs share, 0 in `values`; None where there are none.
        alike: where all inputs hold the same, if rounding has to know.
        squares, kept, entries: as `Merged` has them.
    """

    values: torch.Tensor
    base: torch.Tensor | None = None
    tau: torch.Tensor | None = None
    stays: torch.Tensor | None = None
    alike: _Alike | None = None
    squares: Sequence[float] = ()
    kept: Sequence[float] = ()
    entries: int = 0


class Writer(Protocol):
    """A thread that makes ranges of the output."""

    write_buffer: memoryview

    def cut(self, chunks: Iterable[Any]) -> Iterator[Any]:
        """The same entries, in steps that fit its buffers."""


class Counted(Protocol):
    """What is counted while a part of the output is made, or all of it."""

    def add(self, other: Any) -> None:
        """Take account of another part, which comes behind."""


class RangeJob(Generic[Thread, Tensor, Counts]):
    """The job of making a range of the output and writing it; and the sum of what was counted.

    Args:
        outputs: the files of the output.
        output: the destination, for messages.
        targets: the files that are written.
        tally: nothing, yet.
    """

    def __init__(self, outputs: Sequence[OutputFile], output: Path, targets: list[Target], tally: Counts) -> None:
        self.outputs, self.output, self.targets, self.tally, self.taken_over = outputs, output, targets, tally, 0

    def nothing(self) -> Counts:
        """A tally to begin with."""
        raise NotImplementedError

    def tally_of(self, told: Mapping[str, Any]) -> Counts:
        """What a journal has of a part.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, OverflowError: it is something else.
        """
        raise NotImplementedError

    def _make(self, worker: Thread, chunk: Chunk[Tensor], tally: Counts) -> memoryview:
        """One chunk as it is to be written, in a buffer of the worker's; what is counted is added."""
        raise NotImplementedError

    def __call__(self, worker: Thread, span: OutputRange[Tensor]) -> tuple[OutputRange[Tensor], Counts]:
        """Make one range: itself, and what was counted."""
        target, tally = self.targets[span.file], self.nothing()
        writer = RangeWriter(target.file, span.start, target.digest, worker.write_buffer)
        with naming(self.output):
            writer.write(self.outputs[span.file].head[span.start : span.end])
        for raw in self._each(worker, span.chunks, tally):
            with naming(self.output):
                writer.write(raw)
        assert writer.at == span.end, "the chunks of a span do not fill it"
        with naming(self.output):
            writer.close()
        return span, tally

    def _each(self, worker: Thread, chunks: Iterable[Chunk[Tensor]], tally: Counts) -> Iterator[memoryview]:
        """All chunks of a range, as they are to be written."""
        return (self._make(worker, chunk, tally) for chunk in worker.cut(chunks))

    def take(self, done: tuple[OutputRange[Tensor], Counts], journal: Notes) -> int:
        """Add a range, in the order of the files, to the sum, and write it down; its bytes."""
        span, tally = done
        self.tally.add(tally)
        nothing = tally == self.nothing()
        blocks = self.targets[span.file].digest.blocks(span.start, span.end)
        with naming(self.output):
            told = {} if nothing else asdict(tally)  # type: ignore[call-overload]
            journal.wrote(WrittenRange(span.file, span.start, blocks, told))
        return span.end - span.start

    def take_over(self, parts: Iterable[WrittenRange]) -> set[tuple[int, int]]:
        """Take account of what an earlier run has written; where each part begins, and in which file."""
        finished: set[tuple[int, int]] = set()
        for part in parts:
            if part.tally:
                try:
                    self.tally.add(self.tally_of(part.tally))
                except (
                    KeyError,
                    TypeError,
                    ValueError,
                    AttributeError,
                    OverflowError,
                ):  # none of ours would: it is made again
                    continue
            for number, block in enumerate(part.blocks):
                self.targets[part.file].digest.wrote(part.start + DIGEST_BLOCK * number, block)
            end = part.start + DIGEST_BLOCK * len(part.blocks)
            self.taken_over += min(end, self.outputs[part.file].nbytes) - part.start
            finished.add((part.file, part.start))
        return finished

    def records(self) -> dict[str, FileRecord]:
        """What was written into each weight file."""
        files = zip(self.outputs, self.targets, strict=True)
        return {file.name: target.digest.record() for file, target in files}


class Write(RangeJob[Worker, TensorPlan, Tally]):
    """The same, of a plan's whole model.

    Args:
        plan: what is carried out.
        targets: the files.
        groups: of the plan, to measure what rounding leaves of their coefficients; None does not measure that.
    """

    def __init__(self, plan: Plan, targets: list[Target], groups: Groups | None = None) -> None:
        self.plan, self.models = plan, plan.number_of_models
        super().__init__(plan.outputs, plan.output, targets, self.nothing())
        self.groups = groups
        self.draws = isinstance(plan.recipe.method.sparsifier, Drawn)
        self._read_scales: dict[tuple[str, torch.dtype, str], torch.Tensor] = {}
        self.unchanged, self.looked = set(range(self.models)), False
        """Models of which no merged entry was seen that is not the base's; and whether any entry was."""
        method = plan.recipe.method
        self.joins = (
            (method.sees, method.takes, plan.recipe.rounding) == ("entries", "task vectors", "nearest")
            and not self.draws
            and plan.statistics is NOTHING_MEASURED
            and not any(plan.views)
        )
        """Whether tensors may be merged as one that have the same coefficient and parameters and stand side by side, as
        views in pickles do not.
        """

    def nothing(self) -> Tally:
        return Tally.nothing(self.models)

    def tally_of(self, told: Mapping[str, Any]) -> Tally:
        return Tally.of(told, self.models)

    def take_over(self, parts: Iterable[WrittenRange]) -> set[tuple[int, int]]:
        self.unchanged = set()  # what an earlier run saw of that is not known
        return super().take_over(parts)

    def all_seen_by_parts(self, unchanged: Iterable[int] | None) -> None:
        """All was written by parts: models in which these saw nothing but the base; None if none could see that."""
        self.unchanged, self.looked = set(unchanged or ()), unchanged is not None

    def _each(self, worker: Worker, chunks: Iterable[PlanChunk], tally: Tally) -> Iterator[memoryview]:
        """The same; small tensors that stand side by side in all inputs in one go, since there may be tens of thousands
        and each takes forty calls into torch.
        """
        if not self.joins:
            yield from super()._each(worker, chunks, tally)
            return
        run: list[PlanChunk] = []
        kind, held = None, 0
        for chunk in worker.cut(chunks):
            own = self._kind(chunk)
            if run and (own is None or own != kind or held + chunk.numel > worker.chunk or not follows(chunk, run[-1])):
                yield from self._all_of(worker, run, tally)
                run, held = [], 0
            if own is None:
                worker.at = chunk.tensor.name
                yield self._make(worker, chunk, tally)
            else:
                run.append(chunk)
                kind, held = own, held + chunk.numel
        yield from self._all_of(worker, run, tally)

    def _kind(self, chunk: PlanChunk) -> tuple[object, ...] | None:
        """What a small tensor has to have in common with others to be merged with them; None if it is merged alone."""
        if not small_and_plain(chunk) or self.plan.merges_whole(chunk.tensor, chunk.segment):
            return None
        tensor = chunk.tensor
        if tensor.name.endswith(("var", "variance")):  # of which the least entry is looked for
            return None
        group = self.groups.of.get(tensor.name) if self.groups is not None else None
        return tensor.coefficient, tensor.in_float64, tensor.info.dtype, id(tensor.values), group

    def _all_of(self, worker: Worker, run: Sequence[PlanChunk], tally: Tally) -> Iterator[memoryview]:
        """Tensors side by side: in one go; or one by one, if there is a word to say of any."""
        if len(run) > 1:
            worker.at = run[0].tensor.name
            with suppress(ChangedInputError):  # which of them it is in the middle of, reading one by one tells
                if (raw := self._make_joined(worker, joined(run), tally)) is not None:
                    yield raw
                    return
        for chunk in run:
            worker.at = chunk.tensor.name
            yield self._make(worker, chunk, tally)

    def _make_joined(self, worker: Worker, chunk: PlanChunk, tally: Tally) -> memoryview | None:
        """`_make` of tensors that were joined; None if some entry is not finite."""
        exact, dtype = self.exact(worker, chunk), chunk.tensor.info.dtype
        stored = worker.out.device_view(chunk.numel, TORCH_DTYPES[dtype])
        self._round(chunk, exact.values, stored, exact)
        if exact.stays is not None or not is_finite(stored):
            return None
        self._measure(chunk, stored, exact, tally)
        raw = worker.out.to_host(chunk.numel * itemsize(dtype))
        self._count(chunk, exact, tally)
        return raw

    def _make(self, worker: Worker, chunk: PlanChunk, tally: Tally) -> memoryview:
        """One chunk as it is to be written, in a buffer of the worker's; what is counted is added."""
        spec, name, dtype, copy = (
            chunk.tensor.spec,
            chunk.tensor.name,
            chunk.tensor.info.dtype,
            chunk.segment.copy,
        )
        if spec.scales_of and copy is None:
            return self._scales_among(chunk)
        if spec.quantised is not None:
            return self._make_codes(worker, chunk, spec.quantised, tally)
        raw: memoryview | None = None
        exact = None
        if copy is None or chunk.segment.base is not None or copy.steps:
            exact = self.exact(worker, chunk)
            values = exact.values
        else:
            loaded = worker.read(chunk, copy)
            if chunk.segment.compare and (differing := self._compare(worker, chunk, loaded.raw)):
                if dtype == COMPLEX:
                    raise MismatchError(
                        f"tensor {printable(name)} is complex, and not the same in {' and '.join(differing)}",
                        hint="Complex numbers are not computed with: --filter NAME=keep or NAME=base takes one side's.",
                    )
                tally.differing.setdefault(name, {}).update(dict.fromkeys(differing))
            if loaded.dtype == dtype:
                raw = loaded.raw
            if dtype in TORCH_DTYPES:
                values = loaded.values()
        if raw is None:
            stored = self._stored(worker, chunk)
            self._round(chunk, values, stored, exact)
            if exact is not None:
                self._measure(chunk, stored, exact, tally)
            values = stored
        if dtype in TORCH_DTYPES and not is_finite(values):
            said = self._say_nonfinite(worker, chunk, values)
            tally.nonfinite.setdefault(name, said)
            if copy is None or copy.dtype != dtype or copy.steps:
                same_nan(values)
            else:  # the very bytes, once more: looking for it read other inputs into the same buffer
                raw = worker.read(chunk, copy).raw
        if exact is not None and exact.stays is not None:
            worker.put_back(chunk, exact.stays, values)
            if not is_finite(values):
                tally.nonfinite.setdefault(name, _shared(name))
        if copy is None and (own := worker.as_is(chunk)) is not None:
            worker.put_back(chunk, own, values)
        if copy is None and _VARIANCE.search(name) and (least := float(values.min())) < 0:
            tally.negative[name] = min(least, tally.negative.get(name, 0.0))
        if raw is None:
            raw = self._raw(worker, chunk)
        self._count(chunk, exact, tally)
        return raw

    def _stored(self, worker: Worker, chunk: PlanChunk) -> torch.Tensor:
        """Where a chunk is put that is computed: [numel], in the output's dtype."""
        return worker.out.device_view(chunk.numel, TORCH_DTYPES[chunk.tensor.info.dtype])

    def _raw(self, worker: Worker, chunk: PlanChunk) -> memoryview:
        """The bytes of what was put there."""
        return worker.out.to_host(chunk.numel * itemsize(chunk.tensor.info.dtype))

    def exact(self, worker: Worker, chunk: PlanChunk) -> Exact:
        """What a chunk comes to, before it is rounded: of what is merged, and of copies that are made or measured."""
        copy = chunk.segment.copy
        if copy is None:
            alike = None
            if self.plan.recipe.rounding != "nearest" and self.plan.recipe.method.takes == "weights":
                alike = _Alike()
            merged = merge_chunk(worker, chunk, given=self._look(alike))
            stays = worker.stays
            values, tau = self._scaled(chunk, merged)
            return Exact(values, merged.base, tau, stays, alike, merged.squares, merged.kept, merged.entries)
        if chunk.segment.base is not None:
            return Exact(*worker.copied(chunk))
        return Exact(worker.made(chunk, copy, worker.held(chunk)[1][0]))

    def _count(self, chunk: PlanChunk, exact: Exact | None, tally: Tally) -> None:
        """Add how much of each model there is in a chunk."""
        copy, kept = chunk.segment.copy, exact.kept if exact is not None else ()
        if (
            self.draws
            and copy is not None
            and (copy.dtype in TORCH_DTYPES or copy.steps)
            and any(copy in segment.models for segment in chunk.tensor.spec.segments)
        ):
            kept = (float(chunk.numel),)  # to be merged, but one model with nothing dropped is itself
        for model, square in enumerate(exact.squares if exact is not None else ()):
            tally.squares[model] += square
        for model, number in enumerate(kept):
            tally.kept[model] += number
        entries = exact.entries if exact is not None and exact.entries else chunk.numel
        tally.entries += entries if kept else 0

    def _make_codes(self, worker: Worker, chunk: PlanChunk, step: Dequantised, tally: Tally) -> memoryview:
        """A chunk of a weight that is stored in 8 bits: its codes, in a buffer of the worker's."""
        name, copy, tensor = chunk.tensor.name, chunk.segment.copy, chunk.tensor
        copied = tensor.as_stored is not None
        exact = self.exact(worker, chunk)
        values = exact.values
        if not is_finite(values):
            tally.nonfinite.setdefault(name, self._say_nonfinite(worker, chunk, values))
        for stays in (exact.stays, worker.as_is(chunk) if copy is None else None):
            if stays is not None:
                worker.put_back(chunk, stays, values)
        if exact.stays is not None and not is_finite(values):
            tally.nonfinite.setdefault(name, _shared(name))
        if copied:
            assert copy is not None
            self._measure(chunk, values, exact, tally)
            self._count(chunk, exact, tally)
            return worker.read(chunk, copy).raw
        codes = worker.out.device_view(chunk.numel, FLOAT8[tensor.info.dtype])
        before = values.clone()
        scales = self._scales(tensor, values)
        to_codes(values, codes, step, scales, chunk.segment.start + chunk.first)
        self._measure(chunk, values, exact, tally)
        group = self.groups.of.get(name) if self.groups is not None else None
        if group is not None:
            tally.lost[group] = tally.lost.get(group, NOTHING_LOST) + lost(before, values)
        raw = worker.out.to_host(chunk.numel)
        self._count(chunk, exact, tally)
        return raw

    def _scales(self, tensor: TensorPlan, like: torch.Tensor) -> torch.Tensor:
        """The scales of a weight, [rows of blocks, blocks], in the dtype of `like` and on its device."""
        key = (tensor.name, like.dtype, str(like.device))
        found = self._read_scales.pop(key, None)
        if found is None:
            assert tensor.spec.quantised is not None
            found = read_scales(self.plan.statistics.scales[tensor.name], tensor.spec.quantised, like)
            while len(self._read_scales) >= _SCALES_KEPT:
                self._read_scales.pop(next(iter(self._read_scales), key), None)
        self._read_scales[key] = found
        return found

    def _scales_among(self, chunk: PlanChunk) -> memoryview:
        """A chunk of the scales of a weight, as they were measured."""
        width, first = itemsize(chunk.tensor.info.dtype), chunk.segment.start + chunk.first
        whole = self.plan.statistics.scales.get(chunk.tensor.spec.scales_of, b"")
        return memoryview(bytearray(whole[first * width : (first + chunk.numel) * width]))

    def _scaled(self, chunk: PlanChunk, merged: Merged) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`base + coefficient * merged task vector`, or without a base the merged weights: [numel], to be rounded; and
        the merged task vector, if there is one.
        """
        coefficient = self._coefficient(chunk)
        if self.plan.recipe.method.takes == "task vectors":
            assert merged.base is not None
            if self.groups is None and self.plan.recipe.rounding == "nearest":  # nobody asks for the task vector
                scaled = merged.values if coefficient == 1 else merged.values.mul_(coefficient)
                return scaled.add_(merged.base), None
            return add_scaled(merged.base, merged.values, coefficient), merged.values
        if merged.base is None:
            return merged.values, None
        if coefficient == 1:  # exactly what was merged
            return merged.values, merged.values - merged.base
        tau = task_vector(merged.values, merged.base)
        return add_scaled(merged.base, tau, coefficient), tau

    def _round(self, chunk: PlanChunk, values: torch.Tensor, stored: torch.Tensor, exact: Exact | None) -> None:
        """Round [numel] to the output dtype, as the recipe says; a copy of which no base is known always to nearest."""
        recipe, tensor, segment = self.plan.recipe, chunk.tensor, chunk.segment
        base, tau, alike = (exact.base, exact.tau, exact.alike) if exact is not None else (None, None, None)
        if recipe.rounding == "nearest" or (segment.copy is not None and base is None):
            cast(values, stored)
            return
        settled = None
        if tau is not None and segment.base is not None and segment.base.dtype != tensor.info.dtype:
            settled = tau == 0  # these are the base's, which the output dtype may not hold
        if alike is not None:
            cast(values, stored)
            agreed = alike.where_still(stored)
            settled = agreed if settled is None else settled | agreed
        # A head and the embedding it is tied to are one weight, and are rounded alike.
        where = Where(tensor.spec.counts_as, segment.start + chunk.first)
        cast_at_random(values, stored, seed=recipe.rounding_seed, where=where, settled=settled)

    def _measure(self, chunk: PlanChunk, stored: torch.Tensor, exact: Exact, tally: Tally) -> None:
        """Add what rounding left of the task vector to what is counted, if there is one."""
        base, tau = exact.base, exact.tau
        group = self.groups.of.get(chunk.tensor.name) if self.groups is not None else None
        if group is not None and base is not None and tau is not None:
            first, every = chunk.segment.start + chunk.first, every_for(chunk.tensor)
            found = realised(stored, base, tau, first=first, every=every)
            tally.realised[group] = tally.realised.get(group, NOTHING_REALISED) + found

    @staticmethod
    def _coefficient(chunk: PlanChunk) -> float:
        """Rounded to the dtype that the arithmetic runs in."""
        exact = chunk.tensor.coefficient
        return exact if chunk.tensor.in_float64 else to_float32(exact)

    def _compare(self, worker: Worker, chunk: PlanChunk, copied: memoryview) -> tuple[str, ...]:
        """Which inputs hold something else than what is copied."""
        return tuple(
            str(self.plan.paths[source.file])
            for source in chunk.segment.compare
            if worker.read(chunk, source, worker.out).raw != copied
        )

    def _look(self, alike: _Alike | None) -> Look | None:
        """What is to be seen of a chunk before it is merged."""
        if alike is None:
            return self._look_for_changes if self.unchanged else None

        def look(base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
            if self.unchanged:
                self._look_for_changes(base, tensors)
            alike.see(base, tensors)

        return look

    def _look_for_changes(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        """Cross out the models that are not their base. Threads may do so at once: no model comes back."""
        self.looked = True
        for model in tuple(self.unchanged):
            tau = tensors[model]
            if self.plan.recipe.method.takes == "weights":
                if base is None or not torch.equal(tau, base):
                    self.unchanged.discard(model)
            elif tau.any():
                self.unchanged.discard(model)

    def _say_nonfinite(self, worker: Worker, chunk: PlanChunk, values: torch.Tensor) -> str:
        """Say what is not finite of a chunk that is about to be written, where that is let through.

        Args:
            worker: the thread's.
            chunk: which.
            values: the chunk in the output's dtype.

        Raises:
            DataError: what was found, where that is not allowed.
        """
        found, wider = nonfinite_behind(worker, chunk), ""
        if found is None and chunk.segment.copy is not None:
            copied = chunk.segment.copy
            if not copied.steps and not (~values.isfinite() & worker.read(chunk, copied).values().isfinite()).any():
                return _shared(chunk.tensor.name)
        if found is None:
            name, dtype = printable(chunk.tensor.name), chunk.tensor.info.dtype
            found = f"tensor {name}: a value is beyond what {dtype}, its output dtype, can hold"
            wider = "Write a wider dtype. "
        if not self.plan.recipe.allow_nonfinite:
            raise DataError(found, hint=wider + worker.hint_of_nonfinite(chunk))
        return found

    def outcome(self, measurement: Measurement) -> Outcome:
        """What the whole run did, but for how long it took."""
        shares = [model["kept"] for model in self.plan.models()] if self.plan.statistics.kept else []
        tally = self.tally
        if self.draws and tally.entries:
            shares = [kept / tally.entries for kept in tally.kept]
        return Outcome(
            self.plan,
            0.0,
            1 + measurement.passes,
            measurement.bytes_read + self.plan.bytes_read,
            tally.nonfinite,
            tuple(math.sqrt(square) for square in tally.squares) if any(tally.squares) else (),
            tuple(share for share in shares if share is not None),
            {name: tuple(paths) for name, paths in tally.differing.items()},
            tuple(sorted(self.unchanged)) if self.looked else (),
            tally.negative,
            realised=rows_of(self.groups, tally.realised, tally.lost) if self.groups is not None else (),
            resumed=self.taken_over,
        )


class _Alike:
    """Where all inputs of a chunk hold the same. A merge of weights may leave that a little beside, in the last place
    that it is computed in: no reason to draw.
    """

    def __init__(self) -> None:
        self._held: torch.Tensor | None = None
        self._same: torch.Tensor | None = None

    def see(self, base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        """Look at them ([n] each), before they are merged."""
        first, *others = [*tensors, base] if base is not None else tensors
        self._held, self._same = first.clone(), torch.ones_like(first, dtype=torch.bool)
        for other in others:
            self._same &= first == other

    def where_still(self, stored: torch.Tensor) -> torch.Tensor:
        """Where they do, and what was made of it is the same once more: [n], boolean.

        Args:
            stored: [n], what was made, rounded to nearest.
        """
        assert self._held is not None
        assert self._same is not None
        return self._same & (stored == self._held.to(stored.dtype))


_SCALES_KEPT = 16  # weights whose scales are held, of all threads

_VARIANCE = re.compile(r"(^|\.)(running|moving)_var(iance)?$")
"""Names of tensors whose entries are divided by, after a root is taken: below 0 they give NaN."""


def _shared(name: str) -> str:
    return f"tensor {printable(name)} holds NaN or Inf, the same in all inputs; these entries stay as they are"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run did.

    Attributes:
        plan: what was carried out: the plan, with what was measured in it.
        seconds: from opening the inputs to the output being in place, measuring included.
        passes: how often the inputs were read, wholly or in part.
        bytes_read: of tensor data, by all passes.
        nonfinite: tensors in which NaN, Inf or an overflow was let through (`allow_nonfinite`), or that all inputs
            share; and what was found first.
        norms: for each model the L2 norm of its task vector over all that was merged; empty where none was taken.
        kept: for each model the share of entries that were kept; empty where none are dropped.
        differing: integer and boolean tensors that are not the same in all inputs -> the inputs that differ from the
            one that was copied.
        unchanged: numbers of models of which every merged entry is the base's.
        negative: variances of batch norms with entries below 0 -> the least.
        remarks: what a person should know of how it ended.
        realised: what rounding left of each coefficient; empty without a base.
        resumed: bytes of the output that an earlier run had written.
    """

    plan: Plan
    seconds: float
    passes: int
    bytes_read: int
    nonfinite: dict[str, str]
    norms: tuple[float, ...]
    kept: tuple[float, ...]
    differing: dict[str, tuple[str, ...]]
    unchanged: tuple[int, ...] = ()
    negative: dict[str, float] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    realised: tuple[Row, ...] = ()
    resumed: int = 0
