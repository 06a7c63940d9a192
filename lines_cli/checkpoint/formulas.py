"""Tensors that a checkpoint does not store as they are: what is stored, and the steps that make a tensor of it.

Here a step only says what it is and which stored tensors it needs (its factors); `engine/formulas` carries it out,
chunk by chunk. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

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

    adds: ClassVar[bool] = False
    """Whether the step adds an update that does not depend on the entries: then that is the task vector."""

    def placed(self, number_of: Callable[[int], int]) -> Formula:
        """The same, with other numbers of the files that its factors lie in."""
        factors = tuple((role, StoredTensor(number_of(file), info)) for role, (file, info) in self.factors)
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

    adds: ClassVar[bool] = True


@dataclass(frozen=True)
class StoredUpdate(Formula):
    """`W + update`, where the update is stored entry by entry, in the dtype of the arithmetic: factor `update`."""

    adds: ClassVar[bool] = True


class Made(NamedTuple):
    """What a tensor is made of.

    Attributes:
        stored: what is read for it, entry by entry.
        steps: what is done with that, in this order.
    """

    stored: StoredTensor
    steps: tuple[Formula, ...]
