"""Tensors that a checkpoint does not store as they are: what is stored, and the steps that make a tensor of it.

Here a step only says what it is and which stored tensors it needs (its factors); `engine/formulas` carries it out,
chunk by chunk. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from lines_cli.checkpoint.header import StoredTensor


@dataclass(frozen=True)
class Formula:
    """A step on the way from what is stored to a tensor.

    Attributes:
        name: what messages call it: the module that an adapter changes.
        factors: each with its role in the formula: the stored tensors that it needs beside the entries themselves.
        shape: of the tensor that it gives.
    """

    name: str
    factors: tuple[tuple[str, StoredTensor], ...]
    shape: tuple[int, ...]

    @property
    def adds(self) -> bool:
        """Whether the step adds an update that does not depend on the entries: then that is the task vector."""
        return False

    def placed(self, number_of: Callable[[int], int]) -> Formula:
        """The same, with other numbers of the files that its factors lie in."""
        factors = tuple((role, stored._replace(file=number_of(stored.file))) for role, stored in self.factors)
        return replace(self, factors=factors)

    @property
    def file(self) -> int:
        """The file that a message names: the one of its first factor."""
        return self.factors[0][1].file


@dataclass(frozen=True)
class LowRank(Formula):
    """`W + scale * B @ A` (LoRA: Hu 2021, section 4.1), for each matrix of a batch.

    Factors `A` [r, in] and `B` [out, r]; those of a convolution have their kernel behind, `A` [r, in, ...] and
    `B` [out, r, 1, ...], and are taken as matrices.

    Attributes:
        scale: multiplies the product; the adapter's alpha over its rank.
        transposed: the product is transposed before it is added, as where weights are stored [in, out].
    """

    scale: float = 1.0
    transposed: bool = False

    @property
    def adds(self) -> bool:
        """It does."""
        return True


@dataclass(frozen=True)
class Dequantised(Formula):
    """`code * scale`, a product of floats: one scale for each block of each of a batch of matrices.

    Its one factor, `scale`, has a number for each block, row by row of blocks: [matrices, ceil(rows / block rows),
    ceil(columns / block columns)], in whatever shape; blocks at the ends of rows and columns may be cut short. It holds
    floats, or (U8, F8_E8M0) exponents of two, 127 too large. Its `name` is that of the tensor of scales.

    Attributes:
        matrices: how many matrices the tensor is: its first axes, or its halves where two are stacked.
        block: the rows and columns that share a scale.
    """

    matrices: int = 1
    block: tuple[int, int] = (1, 1)

    @property
    def columns(self) -> int:
        """Of a matrix, and so of the tensor."""
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        """Of a matrix."""
        return math.prod(self.shape[:-1]) // self.matrices

    @property
    def grid(self) -> tuple[int, int, int]:
        """How many matrices, blocks above each other, and blocks beside each other there are."""
        return self.matrices, -(-self.rows // self.block[0]), -(-self.columns // self.block[1])

    @property
    def granularity(self) -> str:
        """What has a scale of its own, in words."""
        _, down, across = self.grid
        if down == across == 1 and self.matrices > 1:
            return "matrix"
        if down == across == 1:
            return "tensor"
        if across == 1 and self.block[0] == 1:
            return "row"
        if down == 1 and self.block[1] == 1:
            return "column"
        if self.block[0] == 1:
            return f"{self.block[1]} entries of a row"
        return f"block of {self.block[0]} x {self.block[1]}"


class OfPart(NamedTuple):
    """What is done to some entries of a tensor that is put together of others.

    Attributes:
        start, numel: which of its entries.
        first: which entry the first of them is in the tensor that they are of.
        steps: that one's.
    """

    start: int
    numel: int
    first: int
    steps: tuple[Formula, ...]


@dataclass(frozen=True)
class InParts(Formula):
    """The steps of other tensors, each on those entries that are its own: for a tensor that is put together of them.

    Attributes:
        parts: in order; entries that are in none stay as they are.
    """

    parts: tuple[OfPart, ...] = ()

    def __hash__(self) -> int:
        first = self.parts[0]
        return hash((self.name, self.shape, len(self.parts), first.start, first.first))

    @property
    def adds(self) -> bool:
        """Whether all of them do."""
        return all(step.adds for part in self.parts for step in part.steps)

    def placed(self, number_of: Callable[[int], int]) -> Formula:
        """As that of one step."""
        parts = tuple(part._replace(steps=tuple(step.placed(number_of) for step in part.steps)) for part in self.parts)
        return replace(self, parts=parts)

    @property
    def file(self) -> int:
        """That of the first."""
        return self.parts[0].steps[0].file


class Made(NamedTuple):
    """What a tensor is made of.

    Attributes:
        stored: what is read for it, entry by entry.
        steps: what is done with that, in this order.
    """

    stored: StoredTensor
    steps: tuple[Formula, ...]
