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
