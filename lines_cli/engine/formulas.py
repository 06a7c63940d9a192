"""Carries out the steps by which tensors are made that no input stores as they are (`checkpoint/formulas`), chunk by
chunk: an adapter's update is never stored, and of its factors those of one tensor are held; codes are multiplied by
their scales.

An update is mostly a product of small matrices. It is computed in float64 and rounded once to the dtype of the
arithmetic, in blocks of rows that are the same however a tensor is cut into chunks: so chunks change no byte, and
machines hardly any (float64 products of other orders of summation differ by less than an entry's rounding, but for rare
ties).
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch

from lines_cli.checkpoint.formulas import (
    BLOCK,
    PARTS_HELD,
    SLAB,
    Dequantised,
    Difference,
    Formula,
    Hadamard,
    InParts,
    Kronecker,
    LowRank,
    Rescaled,
    Rows,
)
from lines_cli.checkpoint.header import StoredTensor
from lines_cli.engine.whole_tensors import Kept
from lines_cli.plan.tensors import SourceRange

Load = Callable[[StoredTensor, int, int], torch.Tensor]
"""Reads entries of a factor, from one on, so many: [n], as they are stored, on the thread's device."""


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
        shared: what all threads need alike.
    """

    def __init__(self, load: Load, device: torch.device, shared: Kept[torch.Tensor]) -> None:
        self._load, self.device, self.shared = load, device, shared
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
            if number == 0:
                assert step.adds
                maker.update(into, first)  # type: ignore[attr-defined] # an Adder
            else:
                maker.apply(into, first)

    def forget(self) -> None:
        """Another tensor begins."""
        self._held.clear()

    def load(self, stored: StoredTensor, first: int = 0, numel: int | None = None) -> torch.Tensor:
        """Entries of a factor, [n]; all of it in its shape unless some are asked for; as they are stored."""
        if numel is None:
            return self._load(stored, 0, stored.info.numel).view(stored.info.shape)
        return self._load(stored, first, numel)

    def stored_and_made(self, step: Rescaled, first: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Entries of the tensor that a step rescales, made of what is stored: [numel]."""
        assert step.base is not None
        entries = self._load(step.base, first, numel).to(dtype)
        for before in step.before:
            self._maker(before).apply(entries, first)
        return entries

    def _maker(self, step: Formula) -> Maker:
        if step not in self._held:
            self._held[step] = _maker_of(step, self)
        return self._held[step]


def _maker_of(step: Formula, makers: Makers) -> Maker:
    match step:
        case Rescaled():
            return _RescaledRows(step, makers)
        case LowRank():
            return _LowRank(step, makers)
        case Hadamard():
            return _Hadamard(step, makers)
        case Kronecker():
            return _Kronecker(step, makers)
        case Difference():
            return _Difference(step, makers)
        case Rows():
            return _Rows(step, makers)
        case Dequantised():
            return _Dequantised(step, makers)
        case InParts():
            return _InParts(step, makers)
    raise NotImplementedError(type(step).__name__)


class _Blocks:
    """Blocks of whole rows, of a matrix or of each of a batch of them, in the order in which their entries stand.

    Args:
        rows, columns: of a matrix.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self.rows, self.columns = rows, columns
        self.of_block = max(1, BLOCK // max(1, columns))  # rows; those of a matrix's last block may be fewer
        self._last: tuple[int, torch.Tensor] | None = None  # of which the next chunk has the rest

    def product(self, row: int, rows: int) -> torch.Tensor:
        """The update of a block that begins with a row, counted through all matrices: [rows * columns], float64."""
        raise NotImplementedError

    def blocks(self, first: int, numel: int) -> Iterator[tuple[int, int, int, int]]:
        """Those with some of the entries from `first` on: each block's first row, how many it has, and the entries in
        it that are asked for, from and up to which.
        """
        end = first + numel
        while first < end:
            row = first // self.columns
            matrix, within = divmod(row, self.rows)
            start = matrix * self.rows + within // self.of_block * self.of_block
            rows = min(self.of_block, (matrix + 1) * self.rows - start)
            begin = first - start * self.columns
            until = min(rows * self.columns, begin + end - first)
            yield start, rows, begin, until
            first += until - begin

    def block(self, row: int, rows: int) -> torch.Tensor:
        """The same as `product`, not computed again if it is the last one."""
        if self._last is None or self._last[0] != row:
            self._last = None  # one block at a time
            self._last = row, self.product(row, rows)
        return self._last[1]

    def update(self, into: torch.Tensor, first: int) -> None:
        done = 0
        for row, rows, begin, until in self.blocks(first, into.numel()):
            into[done : done + until - begin].copy_(self.block(row, rows)[begin:until])
            done += until - begin

    def apply(self, entries: torch.Tensor, first: int) -> None:
        update = torch.empty_like(entries)
        self.update(update, first)
        entries += update


class _LowRank(_Blocks):
    """Adds a product of two matrices, left [rows, r] and right [r, columns]."""

    def __init__(self, step: LowRank, makers: Makers) -> None:
        self._step, self._makers = step, makers
        factors = dict(step.factors)
        self._a, self._b, self._rank = factors["A"], factors["B"], step.rank
        outputs = self._b.info.shape[0]
        inputs = step.numel // max(1, step.matrices * outputs)
        super().__init__(*((inputs, outputs) if step.transposed else (outputs, inputs)))
        self._slab: tuple[int, torch.Tensor] | None = None  # rows of left, from which on
        self._slab_rows = max(1, SLAB // max(1, self._rank) // self.of_block) * self.of_block
        self._matrix: tuple[int, torch.Tensor, torch.Tensor] | None = None  # which of a batch, left, right
        self._right = self._whole_right() if step.matrices == 1 else None

    def product(self, row: int, rows: int) -> torch.Tensor:
        if self._right is not None:
            return (self._left(row, rows) @ self._right).view(-1)
        number, row = divmod(row, self.rows)
        if self._matrix is None or self._matrix[0] != number:
            self._matrix = number, *self._one_of_batch(number)
        _, left, right = self._matrix
        return (left[row : row + rows] @ right).view(-1)

    def _left(self, row: int, rows: int) -> torch.Tensor:
        """Some of its rows, times the scale: [rows, r]."""
        first = row // self._slab_rows * self._slab_rows
        if self._slab is None or self._slab[0] != first:
            self._slab = first, self._read_left(first, min(self._slab_rows, self.rows - first))
        return self._slab[1][row - first : row - first + rows]

    def _read_left(self, first: int, rows: int) -> torch.Tensor:
        rank, load = self._rank, self._makers.load
        if not self._step.transposed:
            left = load(self._b, first * rank, rows * rank).double().view(rows, rank)
        elif rows == self.rows:
            left = load(self._a).double().view(rank, rows).T
        else:
            left = torch.stack([load(self._a, n * self.rows + first, rows) for n in range(rank)]).double().T
        return (left * self._step.scale).contiguous()

    def _whole_right(self) -> torch.Tensor:
        if self._step.transposed:
            return self._makers.load(self._b).double().view(-1, self._rank).T.contiguous()
        right = self._makers.load(self._a).double().flatten(1)
        if (mid := self._step.factor("mid")) is None:
            return right
        return torch.einsum("rjk,ji->rik", self._makers.load(mid).double().flatten(2), right).flatten(1)

    def _one_of_batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Left and right of one matrix of a batch."""
        rank, makers = self._rank, self._makers
        down = makers.load(self._a, number * rank * self._inputs, rank * self._inputs).double().view(rank, self._inputs)

        def by_matrix() -> torch.Tensor:
            every = makers.load(self._b).view(-1, rank, self._step.matrices)
            return every.permute(2, 0, 1).contiguous()

        up = makers.shared.get(("by matrix", self._b, str(makers.device)), by_matrix)[number].double()
        left, right = (down.T, up.T) if self._step.transposed else (up, down)
        return (left * self._step.scale).contiguous(), right.contiguous()

    @property
    def _inputs(self) -> int:
        return self.rows if self._step.transposed else self.columns


class _RescaledRows:
    """Adds a product, and gives every row, or column, the norm that the adapter says."""

    def __init__(self, step: Rescaled, makers: Makers) -> None:
        self._step, self._makers, self._added = step, makers, _LowRank(step, makers)
        self._wanted = makers.load(dict(step.factors)["m"]).double().flatten()
        self._last: tuple[int, torch.Tensor] | None = None  # the block whose rows' factors are known, and these
        self._of_columns: torch.Tensor | None = None

    def apply(self, entries: torch.Tensor, first: int) -> None:
        done = 0
        for row, rows, begin, until in self._added.blocks(first, entries.numel()):
            part = entries[done : done + until - begin]
            made = self._added.block(row, rows)[begin:until] + part
            factors = self._factors(row, rows, made, entries.dtype)
            made *= factors.expand(rows, self._added.columns).reshape(-1)[begin:until]
            part.copy_(made)
            done += until - begin

    def _factors(self, row: int, rows: int, made: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """What the entries of a block are multiplied by: [rows, 1], or [columns].

        Args:
            row, rows: of the block.
            made: those of its entries that are asked for, already with the product; all of them, if it may be.
            dtype: what W is widened to.
        """
        if self._step.of_columns:
            if self._of_columns is None:
                key = ("norms", self._step, dtype, str(self._makers.device))
                norms = self._makers.shared.get(key, lambda: self._norms_of_columns(dtype))
                self._of_columns = self._wanted / norms
            return self._of_columns
        if self._last is None or self._last[0] != row:
            whole = made if made.numel() == rows * self._added.columns else self._whole(row, rows, dtype)
            norms = whole.view(rows, -1).square().sum(1).sqrt()
            self._last = row, (self._wanted[row : row + rows] / norms)[:, None]
        return self._last[1]

    def _whole(self, row: int, rows: int, dtype: torch.dtype) -> torch.Tensor:
        """A block of W with the product: [rows * columns], float64."""
        columns = self._added.columns
        stored = self._makers.stored_and_made(self._step, row * columns, rows * columns, dtype)
        return self._added.block(row, rows) + stored

    def _norms_of_columns(self, dtype: torch.dtype) -> torch.Tensor:
        """By one pass over all of W, once for all threads: [columns], float64."""
        squares = torch.zeros(self._added.columns, dtype=torch.float64, device=self._makers.device)
        for row, rows, _, _ in self._added.blocks(0, self._step.numel):
            squares += self._whole(row, rows, dtype).view(rows, -1).square().sum(0)
        return squares.sqrt()


class _Hadamard(_Blocks):
    """Adds the product, entry by entry, of two products of matrices."""

    def __init__(self, step: Hadamard, makers: Makers) -> None:
        factors = {role: makers.load(stored).double() for role, stored in step.factors}
        self._pairs = [_pair(factors[f"a{n}"], factors[f"b{n}"], factors.get(f"t{n}")) for n in "12"]
        self._scale = step.scale
        super().__init__(self._pairs[0][0].shape[0], self._pairs[0][1].shape[1])

    def product(self, row: int, rows: int) -> torch.Tensor:
        one, other = ((left[row : row + rows] @ right).view(-1) for left, right in self._pairs)
        return one.mul_(other).mul_(self._scale)


def _pair(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Left [rows, r] and right [r, columns]: as they are, or with a kernel between them."""
    if t is None:
        return a, b.flatten(1)
    return a.T.contiguous(), torch.einsum("ijk,jr->irk", t.flatten(2), b).flatten(1)


class _Kronecker(_Blocks):
    """Adds a Kronecker product."""

    def __init__(self, step: Kronecker, makers: Makers) -> None:
        factors = {role: makers.load(stored).double() for role, stored in step.factors}
        self._one = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
        if "w2" in factors:
            other = factors["w2"]
        else:
            left, right = _pair(factors["w2_a"], factors["w2_b"], factors.get("t2"))
            other = left @ right
        self._outermost, self._scale = step.outermost, step.scale
        self._other = other if step.outermost else other.flatten(1)
        super().__init__(step.shape[0], step.numel // max(1, step.shape[0]))

    def product(self, row: int, rows: int) -> torch.Tensor:
        number = torch.arange(row, row + rows, device=self._one.device)
        if self._outermost:
            of_one, of_other = number % self._one.shape[0], number // self._one.shape[0]
            made = self._other[of_other][:, :, None, :] * self._one[of_one][:, None, :, None]
        else:
            of_one, of_other = number // self._other.shape[0], number % self._other.shape[0]
            made = self._one[of_one][:, :, None] * self._other[of_other][:, None, :]
        return made.view(-1).mul_(self._scale)


class _Difference:
    """Adds a stored tensor."""

    def __init__(self, step: Difference, makers: Makers) -> None:
        self._stored, self._scale, self._load = step.factors[0][1], step.scale, makers.load

    def update(self, into: torch.Tensor, first: int) -> None:
        for begin in range(0, into.numel(), BLOCK):
            part = into[begin : begin + BLOCK]
            part.copy_(self._load(self._stored, first + begin, part.numel()).double().mul_(self._scale))

    def apply(self, entries: torch.Tensor, first: int) -> None:
        update = torch.empty_like(entries)
        self.update(update, first)
        entries += update


class _Rows:
    """Puts rows in the place of others."""

    def __init__(self, step: Rows, makers: Makers) -> None:
        self._stored, self._load = step.factors[0][1], makers.load
        self._columns = step.numel // max(1, step.shape[0])
        self._order = sorted(range(len(step.numbers)), key=step.numbers.__getitem__)
        self._numbers = [step.numbers[at] for at in self._order]

    def apply(self, entries: torch.Tensor, first: int) -> None:
        columns, end = self._columns, first + entries.numel()
        for at in range(bisect_left(self._numbers, first // max(1, columns)), len(self._numbers)):
            start = self._numbers[at] * columns
            if start >= end:
                break
            begin, until = max(first, start), min(end, start + columns)
            kept = self._load(self._stored, self._order[at] * columns + begin - start, until - begin)
            entries[begin - first : until - first].copy_(kept)


class _InParts:
    """Carries out the steps of the tensors that another is put together of, each on its own entries; what those need is
    kept for a few of them.
    """

    def __init__(self, step: InParts, makers: Makers) -> None:
        self._parts, self._all = step.parts, makers
        self._makers: dict[int, list[Maker]] = {}

    def update(self, into: torch.Tensor, first: int) -> None:
        into.zero_()
        for entries, inside, makers in self._within(into, first):
            for number, maker in enumerate(makers):
                if number == 0:
                    maker.update(entries, inside)  # type: ignore[attr-defined] # an Adder: all steps add
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
            makers = [_maker_of(step, self._all) for step in self._parts[number].steps]
        self._makers[number] = makers
        while len(self._makers) > PARTS_HELD:
            del self._makers[next(iter(self._makers))]
        return makers


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

    def __init__(self, step: Dequantised, makers: Makers) -> None:
        self._step, self._load, self._device = step, makers.load, makers.device
        ((_, self._stored),) = step.factors
        matrices, down, self._across = step.grid
        self._down = matrices * down
        self._first, self._held = 0, torch.empty(0, self._across)

    def apply(self, entries: torch.Tensor, first: int) -> None:
        for part in parts_of(self._step, first, entries.numel()):
            below = part.rows_of_blocks(self._step)
            if part.rows == 1 and self._across > _SCALES:  # of a row that is longer than any chunk
                scales = self._read(int(below[0]) * self._across + part.left, (1, part.blocks), entries.dtype)
            else:
                scales = self._scales(int(below[0]), int(below[-1]) + 1, entries.dtype)
                scales = scales[(below - self._first).to(self._device), part.left : part.left + part.blocks]
            part.of(entries).mul_(scales.unsqueeze(-1))

    def _scales(self, begin: int, end: int, dtype: torch.dtype) -> torch.Tensor:
        """The scales of the rows of blocks from `self._first` on, those from `begin` up to `end` among them."""
        if begin < self._first or end > self._first + len(self._held) or self._held.dtype != dtype:
            number = max(end - begin, _SCALES // max(1, self._across))
            self._first = 0 if self._down <= number else begin
            number = min(number, self._down - self._first)
            self._held = self._read(self._first * self._across, (number, self._across), dtype)
        return self._held

    def _read(self, first: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        """Scales from one on, which follow one another."""
        return as_scales(self._load(self._stored, first, math.prod(shape)).view(shape), dtype)


_SCALES = 64 * 1024  # that are held at a time, or a row of blocks


def as_scales(stored: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales as numbers; bytes are exponents of two, 127 too large, the largest of which is NaN (E8M0 of OCP's
    microscaling formats).
    """
    if stored.dtype != torch.uint8:
        return stored.to(dtype)
    exact = torch.ldexp(torch.ones((), dtype=torch.float64, device=stored.device), stored.to(torch.float64) - 127)
    return exact.masked_fill(stored == _NAN_EXPONENT, math.nan).to(dtype)


_NAN_EXPONENT = 255
