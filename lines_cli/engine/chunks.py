"""Tensors cut into steps that fit a thread's buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from lines_cli.checkpoint.header import itemsize
from lines_cli.plan.plan import TensorPlan
from lines_cli.plan.tensors import Segment


class Streamed(Protocol):
    """A tensor that is read segment by segment: what a plan makes, or what is only looked at."""

    @property
    def name(self) -> str:
        """What messages call it."""

    @property
    def in_float64(self) -> bool:
        """Whether its entries are widened to float64; else to float32."""

    @property
    def segments(self) -> Sequence[Segment]:
        """Where its entries come from."""


Tensor = TypeVar("Tensor", bound=Streamed)


@dataclass(frozen=True, slots=True)
class Chunk(Generic[Tensor]):
    """Part of a segment: entries `first` to `first + numel` of it."""

    tensor: Tensor
    segment: Segment
    first: int
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that are read for it."""
        return self.numel * sum(itemsize(source.dtype) for source in self.segment.sources)

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
            yield Chunk(self.tensor, self.segment, first, until - first)
            first = until


PlanChunk = Chunk[TensorPlan]

_SMALL = 32 * 1024  # entries: below that the calls take longer than the work


def small_and_plain(chunk: PlanChunk) -> bool:
    """Whether a chunk is a whole small tensor that all inputs have, merged of what they store as it is."""
    segment, spec = chunk.segment, chunk.tensor.spec
    if not 0 < chunk.numel <= _SMALL or segment.copy is not None or segment.base is None or not segment.models:
        return False
    if len(chunk.tensor.segments) > 1 or segment.as_is is not None or chunk.numel != segment.numel:
        return False
    if spec.quantised is not None or spec.scales_of:
        return False
    for source in (segment.base, *segment.models):
        if source.steps or source.parts or source.gathered is not None:
            return False
    return True


def follows(chunk: PlanChunk, before: PlanChunk) -> bool:
    """Whether the entries of a chunk stand right behind those of another in every input."""
    own, other = chunk.segment, before.segment
    pairs = zip((own.base, *own.models), (other.base, *other.models), strict=True)
    for source, earlier in pairs:
        assert source is not None
        assert earlier is not None
        if (source.file, source.dtype) != (earlier.file, earlier.dtype):
            return False
        if source.offset != earlier.offset + before.numel * itemsize(earlier.dtype):
            return False
    return True


def joined(chunks: Sequence[PlanChunk]) -> PlanChunk:
    """Chunks that follow each other as one, which is called after the first."""
    first, numel = chunks[0], sum(chunk.numel for chunk in chunks)
    return Chunk(first.tensor, first.segment._replace(numel=numel), 0, numel)


_ITEM = 2**20  # entries: what a worker takes at a time, so that small tensors do not queue one by one


def items_of(segments: Iterable[tuple[Tensor, Segment]]) -> Iterator[list[Chunk[Tensor]]]:
    """All entries of some tensors' segments, in order, some at a time: one item of work after another."""
    item: list[Chunk[Tensor]] = []
    held = 0
    for tensor, segment in segments:
        for first in range(0, segment.numel, _ITEM):
            item.append(Chunk(tensor, segment, first, min(_ITEM, segment.numel - first)))
            held += item[-1].numel
            if held >= _ITEM:
                yield item
                item, held = [], 0
    if item:
        yield item


def merged_segments(tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, Segment]]:
    """What is not copied."""
    return ((tensor, segment) for tensor in tensors for segment in tensor.segments if segment.models)
