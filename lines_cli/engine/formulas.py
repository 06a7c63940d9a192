"""Carries out the steps by which tensors are made that no input stores as they are (`checkpoint/formulas`), chunk by
chunk: an adapter's update is never stored, and of its factors a few are held; codes are multiplied by their scales.

An update is a product of small matrices. It is computed in float64 and rounded once to the dtype of the arithmetic,
in blocks of rows that are the same however a tensor is cut into chunks: so chunks change no byte, and machines hardly
any (float64 products of other orders of summation differ by less than an entry's rounding, but for rare ties).
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from lines_cli.checkpoint.formulas import Dequantised, Formula, InParts, LowRank
from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.plan.tensors import SourceRange

_BLOCK = 128 * 1024  # entries of an update that are computed at a time; more leave the cache

Load = Callable[[StoredTensor], torch.Tensor]
"""Reads a factor: in its shape, as it is stored, on the thread's device."""


class Maker(Protocol):
    """Carries out one step, for one tensor."""

    def apply(self, entries: torch.Tensor, first: int) -> None:
        """Put what the step makes of some entries in their place.

        Args:
            entries: [n], in float32 or float64.
            first: the number of the first one within the tensor.
        """


class Adder(Maker, Protocol):
    """Carries out a step that adds an update."""

    def update(self, into: torch.Tensor, first: int) -> None:
        """Put the update of some entries into [n]; arguments as in `apply`."""


class Makers:
    """One thread's: what the formulas of a tensor need, read when it is first asked for, kept until the next tensor.

    Args:
        load: reads a factor.
        device: where entries are held.
    """

    def __init__(self, load: Load, device: torch.device) -> None:
        self._load, self._device = load, device
        self._held: dict[Formula, Maker] = {}

    def apply(self, entries: torch.Tensor, source: SourceRange, first: int) -> None:
        """Make of stored entries those that a range stands for, in place: [n], from the `first` of the range on."""
        for step in source.steps:
            self._maker(step).apply(entries, source.first + first)

    def update(self, into: torch.Tensor, steps: tuple[Formula, ...], first: int) -> None:
        """Put the sum of the updates of some steps that add into [n], from the tensor's entry `first` on."""
        if not steps:
            into.zero_()
        for number, step in enumerate(steps):
            maker = self._maker(step)
            assert isinstance(maker, _LowRank | _InParts)
            if number == 0:
                maker.update(into, first)
            else:
                maker.apply(into, first)

    def forget(self) -> None:
        """Another tensor begins."""
        self._held.clear()

    def _maker(self, step: Formula) -> Maker:
        if step not in self._held:
            self._held[step] = _maker_of(step, self._load, self._device)
        return self._held[step]


def _maker_of(step: Formula, load: Load, device: torch.device) -> Maker:
    if isinstance(step, LowRank):
        return _LowRank(step, load, device)
    if isinstance(step, Dequantised):
        return _Dequantised(step, load, device)
    if isinstance(step, InParts):
        return _InParts(step, load, device)
    raise NotImplementedError(type(step).__name__)


class _LowRank:
    """Adds a product of two matrices, left [rows, r] and right [r, columns], whose rows are the tensor's."""

    def __init__(self, step: LowRank, load: Load, device: torch.device) -> None:
        factors = {role: load(stored).to(device=device, dtype=torch.float64) for role, stored in step.factors}
        down, up = factors["A"].flatten(1), factors["B"].flatten(1)
        left, right = (down.T, up.T) if step.transposed else (up, down)
        self._left, self._right = (left * step.scale).contiguous(), right.contiguous()
        self._columns = right.shape[1]
        self._rows = max(1, _BLOCK // max(1, self._columns))
        assert left.shape[0] * self._columns == math.prod(step.shape), "factors of another shape"
        self._block: tuple[int, torch.Tensor] | None = None  # the last one, of which the next chunk has the rest

    def update(self, into: torch.Tensor, first: int) -> None:
        numel, size = into.numel(), self._rows * self._columns
        done = 0
        while done < numel:
            number, begin = divmod(first + done, size)
            block = self._product(number)
            end = min(block.numel(), begin + numel - done)
            into[done : done + end - begin].copy_(block[begin:end])
            done += end - begin

    def apply(self, entries: torch.Tensor, first: int) -> None:
        update = torch.empty_like(entries)
        self.update(update, first)
        entries += update

    def _product(self, number: int) -> torch.Tensor:
        """A block of rows, in float64."""
        if self._block is None or self._block[0] != number:
            rows = self._left[number * self._rows : (number + 1) * self._rows]
            self._block = number, (rows @ self._right).view(-1)
        return self._block[1]


class _InParts:
    """Carries out the steps of the tensors that another is put together of, each on its own entries; what those need is
    kept for a few of them.
    """

    def __init__(self, step: InParts, load: Load, device: torch.device) -> None:
        self._parts, self._load, self._device = step.parts, load, device
        self._makers: dict[int, list[Maker]] = {}

    def update(self, into: torch.Tensor, first: int) -> None:
        into.zero_()
        for entries, inside, makers in self._within(into, first):
            for number, maker in enumerate(makers):
                assert isinstance(maker, _LowRank)
                if number == 0:
                    maker.update(entries, inside)
                else:
                    maker.apply(entries, inside)

    def apply(self, entries: torch.Tensor, first: int) -> None:
        for own, inside, makers in self._within(entries, first):
            for maker in makers:
                maker.apply(own, inside)

    def _within(self, entries: torch.Tensor, first: int) -> Iterator[tuple[torch.Tensor, int, list[Maker]]]:
        """The parts of a run: the entries of each, the number of the first within its tensor, and what is done."""
        at = max(0, bisect_right(self._parts, first, key=lambda part: part.start) - 1)
        end = first + entries.numel()
        while at < len(self._parts) and self._parts[at].start < end:
            part = self._parts[at]
            begin, until = max(first, part.start), min(end, part.start + part.numel)
            if begin < until:
                yield entries[begin - first : until - first], part.first + begin - part.start, self._of(at)
            at += 1

    def _of(self, number: int) -> list[Maker]:
        makers = self._makers.pop(number, None)
        if makers is None:
            makers = [_maker_of(step, self._load, self._device) for step in self._parts[number].steps]
        self._makers[number] = makers
        while len(self._makers) > _PARTS_HELD:
            del self._makers[next(iter(self._makers))]
        return makers


_PARTS_HELD = 4


class Part(NamedTuple):
    """Some of a run of entries: `rows` rows of `blocks` blocks of `width` entries each.

    Attributes:
        at: where the entries begin in the run; the rows lie `stride` apart.
        rows, blocks, width, stride: how they lie.
        first_row: the number of the first row, counted through all matrices.
        left: the number of the first block in its row of blocks.
    """

    at: int
    rows: int
    blocks: int
    width: int
    stride: int
    first_row: int
    left: int

    def of(self, entries: torch.Tensor) -> torch.Tensor:
        """These of a run [n]: a view [rows, blocks, width]."""
        return entries.as_strided(
            (self.rows, self.blocks, self.width), (self.stride, self.width, 1), entries.storage_offset() + self.at
        )

    def rows_of_blocks(self, step: Dequantised) -> torch.Tensor:
        """The number of the row of blocks that each row lies in: [rows], on the CPU."""
        _, down, _ = step.grid
        rows = torch.arange(self.first_row, self.first_row + self.rows)
        return rows // step.rows * down + rows % step.rows // step.block[0]


def parts_of(step: Dequantised, first: int, numel: int) -> Iterator[Part]:
    """A run of a tensor's entries, `numel` from `first` on, in parts in which blocks lie alike."""
    columns, done = step.columns, 0
    while done < numel:
        row, column = divmod(first + done, columns)
        whole = (numel - done) // columns if column == 0 else 0
        rows, end = (whole, columns) if whole else (1, min(columns, column + numel - done))
        at, width, begin = done, step.block[1], column
        while begin < end:
            left, inside = divmod(begin, width)
            blocks = 0 if inside else (end - begin) // width
            size = width if blocks else min(width - inside, end - begin)
            yield Part(at, rows, max(1, blocks), size, columns, row, left)
            begin, at = begin + max(1, blocks) * size, at + max(1, blocks) * size
        done += rows * (end - column)


class _Dequantised:
    """Multiplies codes by their scales, of which a few rows of blocks are held."""

    def __init__(self, step: Dequantised, load: Load, device: torch.device) -> None:
        self._step, self._load, self._device = step, load, device
        ((_, self._stored),) = step.factors
        matrices, down, self._across = step.grid
        self._down = matrices * down
        self._first, self._held = 0, torch.empty(0, self._across)

    def apply(self, entries: torch.Tensor, first: int) -> None:
        for part in parts_of(self._step, first, entries.numel()):
            below = part.rows_of_blocks(self._step)
            scales = self._scales(int(below[0]), int(below[-1]) + 1, entries.dtype)
            scales = scales[(below - self._first).to(self._device), part.left : part.left + part.blocks]
            part.of(entries).mul_(scales.unsqueeze(-1))

    def _scales(self, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The scales of the rows of blocks from `self._first` on, those from `begin` up to `end` among them."""
        if begin < self._first or end > self._first + len(self._held) or self._held.dtype != dtype:
            number = max(end - begin, _SCALES // max(1, self._across))
            file, info, _ = self._stored
            self._first = 0 if self._down <= number else begin
            number = min(number, self._down - self._first)
            offset = info.offset + self._first * self._across * itemsize(info.dtype)
            part = TensorInfo(info.dtype, (number, self._across), offset, number * self._across * itemsize(info.dtype))
            self._held = _as_scales(self._load(StoredTensor(file, part)), dtype)
        return self._held


_SCALES = 64 * 1024  # that are held at a time, or a row of blocks


def _as_scales(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as numbers; bytes are exponents of two, 127 too large, the largest of which is NaN (E8M0 of OCP's
    microscaling formats).
    """
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    exact = torch.ldexp(torch.ones((), dtype=torch.float64, device=stored.device), stored.to(torch.float64) - 127)
    return exact.masked_fill(stored == _NAN_EXPONENT, math.nan).to(dtype)


_NAN_EXPONENT = 255
