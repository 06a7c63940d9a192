"""How a tensor is made of the entries of others: put together, cut apart, turned. Nothing here reads any."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise, product
from typing import NamedTuple


class Piece(NamedTuple):
    """A box of a tensor that holds entries of a source.

    Attributes:
        source: the name of the tensor they are of.
        start, sizes: where the box begins in the tensor, and its size, for each axis.
        first: which entry of the source stands at its beginning.
        strides: how many entries of the source a step along each axis is.
    """

    source: str
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    first: int
    strides: tuple[int, ...]


class Pieced(NamedTuple):
    """A tensor of a shape, made of pieces that cover it."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Run(NamedTuple):
    """Entries of a tensor that stand one behind the other, and are read from one source.

    Attributes:
        start, numel: which entries.
        source, first: where they begin.
        sizes, strides: as a box of the source, which is gone through row by row; with one axis and a stride of 1 they
            stand side by side there, too.
    """

    start: int
    numel: int
    source: str
    first: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


def whole(name: str, shape: tuple[int, ...]) -> Pieced:
    """A source as it is."""
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return Pieced(shape, (Piece(name, (0,) * len(shape), shape, 0, strides),))


def stacked(parts: Sequence[Pieced]) -> Pieced | None:
    """Tensors of one shape, put together along a new first axis; None if their shapes differ."""
    if len({part.shape for part in parts}) != 1:
        return None
    pieces = [
        piece._replace(start=(number, *piece.start), sizes=(1, *piece.sizes), strides=(0, *piece.strides))
        for number, part in enumerate(parts)
        for piece in part.pieces
    ]
    return Pieced((len(parts), *parts[0].shape), tuple(pieces))


def unstacked(tensor: Pieced) -> list[Pieced]:
    """The tensors along its first axis."""
    return [
        Pieced(
            tensor.shape[1:],
            tuple(
                Piece(
                    piece.source,
                    piece.start[1:],
                    piece.sizes[1:],
                    piece.first + (number - piece.start[0]) * piece.strides[0],
                    piece.strides[1:],
                )
                for piece in tensor.pieces
                if piece.start[0] <= number < piece.start[0] + piece.sizes[0]
            ),
        )
        for number in range(tensor.shape[0])
    ]


def joined(parts: Sequence[Pieced], axis: int) -> Pieced | None:
    """Tensors that differ in one axis only, one behind the other along it; None if they differ in others."""
    rest = {(*part.shape[:axis], *part.shape[axis + 1 :]) for part in parts}
    if len(rest) != 1 or any(len(part.shape) <= axis for part in parts):
        return None
    sizes = [part.shape[axis] for part in parts]
    pieces = [
        piece._replace(start=_moved(piece.start, axis, begin))
        for part, begin in zip(parts, accumulate(sizes, initial=0), strict=False)
        for piece in part.pieces
    ]
    shape = parts[0].shape
    return Pieced((*shape[:axis], sum(sizes), *shape[axis + 1 :]), tuple(pieces))


def cut(tensor: Pieced, axis: int, sizes: Sequence[int]) -> list[Pieced] | None:
    """A tensor cut into parts of these sizes along one axis; None if they do not add up."""
    if len(tensor.shape) <= axis or sum(sizes) != tensor.shape[axis]:
        return None
    parts = []
    for begin, end in pairwise(accumulate(sizes, initial=0)):
        pieces = []
        for piece in tensor.pieces:
            first, last = max(begin, piece.start[axis]), min(end, piece.start[axis] + piece.sizes[axis])
            if first < last:
                start = (*piece.start[:axis], first - begin, *piece.start[axis + 1 :])
                size = (*piece.sizes[:axis], last - first, *piece.sizes[axis + 1 :])
                at = piece.first + (first - piece.start[axis]) * piece.strides[axis]
                pieces.append(piece._replace(start=start, sizes=size, first=at))
        shape = (*tensor.shape[:axis], end - begin, *tensor.shape[axis + 1 :])
        parts.append(Pieced(shape, tuple(pieces)))
    return parts


def turned(tensor: Pieced, one: int, other: int) -> Pieced | None:
    """A tensor with two of its axes exchanged; None if it has fewer."""
    if len(tensor.shape) <= max(one, other):
        return None
    order = list(range(len(tensor.shape)))
    order[one], order[other] = other, one

    def exchanged(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(values[axis] for axis in order)

    pieces = [
        Piece(piece.source, exchanged(piece.start), exchanged(piece.sizes), piece.first, exchanged(piece.strides))
        for piece in tensor.pieces
    ]
    return Pieced(exchanged(tensor.shape), tuple(pieces))


def _moved(start: tuple[int, ...], axis: int, by: int) -> tuple[int, ...]:
    return (*start[:axis], start[axis] + by, *start[axis + 1 :])


def runs(tensor: Pieced) -> list[Run] | None:
    """A tensor as runs of its entries, in their order; None where its pieces do not cover it, or where some could only
    be read entry by entry.
    """
    cuts = [_cut_to_runs(piece, tensor.shape) for piece in tensor.pieces]
    if sum(math.prod(piece.sizes[:inner]) for piece, inner in zip(tensor.pieces, cuts, strict=True)) > _MOST_RUNS:
        return None
    pairs = zip(tensor.pieces, cuts, strict=True)
    found = sorted(run for piece, inner in pairs for run in _runs_of(piece, tensor.shape, inner))
    ends = accumulate((run.numel for run in found), initial=0)
    if sum(run.numel for run in found) != math.prod(tensor.shape):
        return None
    if any(run.start != end for run, end in zip(found, ends, strict=False)):
        return None
    joined_up: list[Run] = []
    for run in found:
        last = joined_up[-1] if joined_up else None
        if last is not None and _goes_on(last, run):
            joined_up[-1] = last._replace(numel=last.numel + run.numel, sizes=(last.numel + run.numel,))
        else:
            joined_up.append(run)
    return joined_up if all(map(_can_be_read, joined_up)) else None


_MOST_RUNS = 2**20


def _cut_to_runs(piece: Piece, shape: tuple[int, ...]) -> int:
    """Along how many of its first axes a piece is cut: where it does not reach over all of the others, and, where its
    entries do not stand side by side, to boxes of two axes.
    """
    inner = len(shape)  # the axes from here on are reached over wholly, but for the first of them
    while inner and (inner == len(shape) or piece.sizes[inner] == shape[inner]):
        inner -= 1
    while inner < len(shape) and len(_simplified(piece.sizes[inner:], piece.strides[inner:])[0]) > _MOST_AXES:
        inner += 1
    return inner


def _runs_of(piece: Piece, shape: tuple[int, ...], inner: int) -> Iterator[Run]:
    """A piece as runs, cut along so many of its first axes."""
    sizes, strides = _simplified(piece.sizes[inner:], piece.strides[inner:])
    numel = math.prod(sizes)
    for place in product(*(range(size) for size in piece.sizes[:inner])):
        steps = (*place, *([0] * (len(shape) - inner)))
        start = 0
        for size, begin, step in zip(shape, piece.start, steps, strict=True):
            start = start * size + begin + step
        first = piece.first + sum(step * stride for step, stride in zip(steps, piece.strides, strict=True))
        yield Run(start, numel, piece.source, first, sizes, strides)


_MOST_AXES = 2


def _simplified(sizes: tuple[int, ...], strides: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same box with as few axes as describe it."""
    kept: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if kept and kept[-1][1] == size * stride:
            kept[-1] = (kept[-1][0] * size, stride)
        else:
            kept.append((size, stride))
    kept = kept or [(1, 1)]
    return tuple(size for size, _ in kept), tuple(stride for _, stride in kept)


def _goes_on(last: Run, run: Run) -> bool:
    alike = last.source == run.source and last.strides == run.strides == (1,)
    return alike and last.first + last.numel == run.first


def _can_be_read(run: Run) -> bool:
    return run.strides == (1,) or (len(run.strides) == _MOST_AXES and 1 in run.strides)
