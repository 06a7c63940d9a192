"""Carries out the steps by which tensors are made that no input stores as they are (`checkpoint/formulas`), chunk by
chunk: an adapter's update is never stored, and of its factors a few are held.

An update is a product of small matrices. It is computed in float64 and rounded once to the dtype of the arithmetic,
in blocks of rows that are the same however a tensor is cut into chunks: so chunks change no byte, and machines hardly
any (float64 products of other orders of summation differ by less than an entry's rounding, but for rare ties).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from lines_cli.checkpoint.formulas import Formula, LowRank, StoredUpdate
from lines_cli.checkpoint.header import StoredTensor
from lines_cli.plan.tensors import SourceRange

_BLOCK = 128 * 1024  # entries of an update that are computed at a time; more leave the cache

Load = Callable[[StoredTensor], torch.Tensor]
"""Reads a factor: in its shape, as it is stored, on the thread's device."""
LoadPart = Callable[[StoredTensor, int, int], torch.Tensor]
"""Reads some entries of one, [n]: of which, the number of the first one, and how many."""


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
        load, load_part: read a factor, or some of its entries.
        device: where entries are held.
    """

    def __init__(self, load: Load, load_part: LoadPart, device: torch.device) -> None:
        self._load, self._load_part, self._device = load, load_part, device
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
            assert isinstance(maker, (_LowRank, _Stored))
            if number == 0:
                maker.update(into, first)
            else:
                maker.apply(into, first)

    def forget(self) -> None:
        """Another tensor begins."""
        self._held.clear()

    def _maker(self, step: Formula) -> Maker:
        if step not in self._held:
            self._held[step] = _maker_of(step, self._load, self._load_part, self._device)
        return self._held[step]


def _maker_of(step: Formula, load: Load, load_part: LoadPart, device: torch.device) -> Maker:
    if isinstance(step, StoredUpdate):
        return _Stored(step, load_part)
    if isinstance(step, LowRank):
        return _LowRank(step, load, device)
    raise NotImplementedError(type(step).__name__)


class _Stored:
    """Adds what is stored."""

    def __init__(self, step: StoredUpdate, load_part: LoadPart) -> None:
        self._stored, self._load_part = step.factors[0][1], load_part

    def update(self, into: torch.Tensor, first: int) -> None:
        into.copy_(self._load_part(self._stored, first, into.numel()))

    def apply(self, entries: torch.Tensor, first: int) -> None:
        entries += self._load_part(self._stored, first, entries.numel())


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
