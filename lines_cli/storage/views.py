"""Tensors whose entries do not stand in their order in a file: transposed, cut out of others, repeated. What is asked
for is gathered from the file as it is read, so that no tensor is held whole.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lines_cli.storage.files import read_into

_FORMATS: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # bytes are moved, no numbers
_FEW = 64 * 1024  # bytes: that many are read in one go, whatever part of them is wanted
_WASTE = 4  # times what is wanted is read in one go, however much that is


@dataclass(frozen=True, slots=True)
class View:
    """A tensor by its strides.

    Attributes:
        offset: where its first entry stands, in bytes from the start of the file.
        shape, strides: as torch counts them, in entries.
        itemsize: bytes of an entry, a power of two up to 8.
    """

    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes that it would take in order."""
        return math.prod(self.shape) * self.itemsize


Views = Mapping[int, View]
"""The views among a file's tensors, each by a number that stands for its offset: beyond the end of the file, in rising
order, so that every byte of every view has a number of its own.
"""


def is_in_order(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor's entries stand one behind the other, as they would be written."""
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size == 0:
            return True
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


class FileWithViews:
    """An open file, and the views in it.

    Args:
        fd: the file.
        views: not empty.
    """

    def __init__(self, fd: int, views: Views) -> None:
        self.fd, self._views, self._starts = fd, views, sorted(views)

    def read_into(self, into: memoryview, offset: int) -> int:
        """As `files.read_into`, where the offset may be one that stands for a view; then all of it is that view's."""
        if offset < self._starts[0]:
            return read_into(self.fd, into, offset)
        start = self._starts[bisect_right(self._starts, offset) - 1]
        view = self._views[start]
        first, part = divmod(offset - start, view.itemsize)
        assert part == 0
        assert len(into) % view.itemsize == 0
        entries = into.cast(_FORMATS[view.itemsize])
        whole = all(self._gather(view, *box, entries) for box in _boxes(view, first, len(entries)))
        return len(into) if whole else 0

    def _gather(self, view: View, at: int, box: _Box, out: int, into: memoryview) -> bool:
        """Fill the entries of a box, the first of which stands at entry `at` of the view; whether the file has them.

        They are read in runs: along the shorter strides all that lies between the first and the last, if that is not
        much more than what is wanted; along the longer ones a run for each number.
        """
        box = tuple(sorted(box, key=lambda axis: -axis[1]))
        apart = next(axis for axis in range(len(box) + 1) if _is_dense(box[axis:], view.itemsize, alone=axis == 0))
        run = _span(box[apart:]) * view.itemsize
        raw = memoryview(bytearray(run * math.prod(size for size, _, _ in box[:apart])))
        starts = _numbers([size for size, _, _ in box[:apart]], [stride for _, stride, _ in box[:apart]])
        for number, start in enumerate(starts):
            there = raw[number * run : (number + 1) * run]
            if read_into(self.fd, there, view.offset + (at + start) * view.itemsize) < run:
                return False
        gathered, stride = list(box), run // view.itemsize
        for axis in reversed(range(apart)):
            size, _, step = box[axis]
            gathered[axis] = size, stride, step
            stride *= size
        _scatter(raw, view.itemsize, gathered, out, into)
        return True


_Box = Sequence[tuple[int, int, int]]
"""Entries in a grid: for each axis how many, how far apart in the file, and how far apart where they are put."""


def _span(box: _Box) -> int:
    """How many entries lie between the first and the last, both included."""
    return 1 + sum((size - 1) * stride for size, stride, _ in box)


def _is_dense(box: _Box, itemsize: int, *, alone: bool) -> bool:
    """Whether it is read in one go: few bytes, if there is no other run, or not many that are not wanted."""
    wanted = math.prod(size for size, stride, _ in box if stride)
    return _span(box) <= max(_WASTE * wanted, _FEW // itemsize if alone else 1)


def _numbers(sizes: Sequence[int], factors: Sequence[int]) -> list[int]:
    """For each place in a grid, row by row, the sum of its indices times the factors."""
    found = [0]
    for size, factor in zip(sizes, factors, strict=True):
        found = [number + i * factor for number in found for i in range(size)]
    return found


def _boxes(view: View, first: int, numel: int) -> Iterator[tuple[int, _Box, int]]:
    """A run of entries of a view as boxes: each with the entry of the file (counted from the view's first) where it
    begins, and the place of its first entry in the run.
    """
    rows = [math.prod(view.shape[axis + 1 :]) for axis in range(len(view.shape))]
    done = 0
    if not rows:
        yield from ((0, (), 0),) * numel
        return
    while done < numel:
        at, inside = 0, first + done
        for axis, row in enumerate(rows):
            number, inside = divmod(inside, row)
            at += number * view.strides[axis]
            left = min(view.shape[axis] - number, (numel - done) // row)
            if inside == 0 and left:  # whole rows of this axis
                sizes = (left, *view.shape[axis + 1 :])
                grid = zip(sizes, view.strides[axis:], rows[axis:], strict=True)
                yield at, tuple(of_axis for of_axis in grid if of_axis[0] > 1), done
                done += left * row
                break


def _scatter(gathered: memoryview, itemsize: int, box: _Box, out: int, into: memoryview) -> None:
    """Put the entries of a box, the first of which is the first that was gathered, into their places, the longest axis
    at a time.
    """
    form = _FORMATS[itemsize]
    raw = gathered.cast(form)
    others = sorted(box)
    size, stride, step = others.pop() if others else (1, 1, 1)
    sizes = [size for size, _, _ in others]
    starts = _numbers(sizes, [stride for _, stride, _ in others])
    for at, to in zip(starts, _numbers(sizes, [step for _, _, step in others]), strict=True):
        if stride:
            there = raw[at : at + (size - 1) * stride + 1 : stride]
        else:
            there = memoryview(raw[at : at + 1].tobytes() * size).cast(form)
        into[out + to : out + to + (size - 1) * step + 1 : step] = there
