"""Tensors that a checkpoint does not store as they are: what is stored, and the steps that make a tensor of it.

Here a step only says what it is and which stored tensors it needs (its factors); `engine/formulas` carries it out,
chunk by chunk. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from lines_cli.checkpoint.header import StoredTensor

BLOCK = 64 * 1024
"""Entries of an update that are computed at a time; more leave the cache."""
SLAB = 512 * 1024
"""Entries of a long factor that are held at a time."""
PARTS_HELD = 4
"""How many tensors a thread keeps the steps' needs of, where one is put together of them."""
_WIDE = 8  # bytes of an entry as updates are computed


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

    @property
    def numel(self) -> int:
        """Entries of the tensor that it gives."""
        return math.prod(self.shape)

    @property
    def held(self) -> int:
        """About how many bytes a thread holds that carries it out."""
        return _WIDE * sum(stored.info.numel for _, stored in self.factors)

    def factor(self, role: str) -> StoredTensor | None:
        """The factor of a role; None where it has none."""
        return next((stored for known, stored in self.factors if known == role), None)


@dataclass(frozen=True)
class LowRank(Formula):
    """`W + scale * B @ A` (LoRA: Hu 2021, section 4.1), for each matrix of a batch.

    Factors `A` [r, in] and `B` [out, r]; those of a convolution have their kernel behind, `A` [r, in, ...] and
    `B` [out, r, 1, ...], and are taken as matrices. With `mid` [r, r, ...], which has the kernel then, `A` is
    `sum_j mid[:, j] A[j]`. Those of a batch of `matrices` stand as PEFT keeps them: `A` [batch * r, in], a matrix
    after the other, and `B` [out, r * batch], each column beside the same one of the other matrices.

    Attributes:
        scale: multiplies the product; the adapter's alpha over its rank.
        transposed: the product is transposed before it is added, as where weights are stored [in, out].
        matrices: how many there are in the batch.
    """

    scale: float = 1.0
    transposed: bool = False
    matrices: int = 1

    @property
    def adds(self) -> bool:
        """It does."""
        return True

    @property
    def rank(self) -> int:
        """The rank of each product."""
        return dict(self.factors)["B"].info.numel // max(1, dict(self.factors)["B"].info.shape[0] * self.matrices)

    @property
    def held(self) -> int:
        """One factor, by which runs of the other are multiplied; of a batch those of one matrix, and `B` as stored."""
        a, b = (dict(self.factors)[role].info for role in "AB")
        columns = b.shape[0] if self.transposed else self.numel // max(1, self.matrices * b.shape[0])
        runs = a.numel if self.transposed else b.numel
        if self.matrices > 1:
            runs = a.numel // self.matrices + b.numel
        return _WIDE * (columns * self.rank + min(SLAB, runs) + BLOCK) + (b.nbytes if self.matrices > 1 else 0)


@dataclass(frozen=True)
class Rescaled(LowRank):
    """`m / norm(W + scale * B @ A) * (W + scale * B @ A)` (DoRA: Liu 2024, equation 5), the norms being those of the
    rows of a weight that is stored [out, in].

    Factors as before, and `m` with a number for each of them.

    Attributes:
        base: the tensor that W is.
        before: the steps that make W of what is stored.
        of_columns: whether the norms are those of columns, as with weights that are stored [in, out]; so it is with
            token embeddings, too, which have a norm for each of their dimensions.
    """

    base: StoredTensor | None = None
    before: tuple[Formula, ...] = ()
    of_columns: bool = False

    @property
    def adds(self) -> bool:
        return False

    def placed(self, number_of: Callable[[int], int]) -> Formula:
        """The same, with other numbers of the files that its factors and W lie in."""
        placed = super().placed(number_of)
        assert isinstance(placed, Rescaled)
        assert self.base is not None
        base = self.base._replace(file=number_of(self.base.file))
        return replace(placed, base=base, before=tuple(step.placed(number_of) for step in self.before))

    @property
    def held(self) -> int:
        """The same, with a block of W and the norms."""
        return super().held + _WIDE * (3 * BLOCK + 2 * math.prod(dict(self.factors)["m"].info.shape))


@dataclass(frozen=True)
class Hadamard(Formula):
    """`W + scale * (a1 @ b1) * (a2 @ b2)`, entry by entry (LoHa: Hyeon-Woo 2022, FedPara).

    Factors `a1`, `a2` [out, r] and `b1`, `b2` [r, in...]; with `t1`, `t2` [r, r, ...], which have a convolution's
    kernel, `a` are [r, out] and `b` [r, in], and the products `sum_ij t[i, j] a[i] b[j]`.

    Attributes:
        scale: multiplies the product.
    """

    scale: float = 1.0

    @property
    def adds(self) -> bool:
        return True

    @property
    def held(self) -> int:
        """All factors, of which `b` becomes larger where there is a `t`, and three blocks."""
        rank = max(1, dict(self.factors)["b1"].info.shape[0])
        columns = math.prod(self.shape[1:])
        return super().held + _WIDE * (2 * rank * columns + 3 * BLOCK)


@dataclass(frozen=True)
class Kronecker(Formula):
    """`W + scale * kron(w1, w2)` (LoKr: Yeh 2023, LyCORIS).

    Factors `w1` [a, c], or `w1_a` [a, r] and `w1_b` [r, c] of which it is the product; and `w2` [b, d, ...], or `w2_a`
    [b, r] and `w2_b` [r, d...], or `w2_a` [r, b] and `w2_b` [r, d] with `t2` [r, r, ...] between them.

    Attributes:
        scale: multiplies the product.
        outermost: the rows of `w2` count before those of `w1`, as with one-dimensional convolutions of a whole `w2`,
            which libraries multiply as if it were a batch.
    """

    scale: float = 1.0
    outermost: bool = False

    @property
    def adds(self) -> bool:
        return True

    @property
    def held(self) -> int:
        """All factors, what `w1` and `w2` are the products of, and a block."""
        rows = self.shape[0]
        return super().held + _WIDE * (2 * BLOCK + 2 * math.isqrt(rows) * math.prod(self.shape[1:]))


@dataclass(frozen=True)
class Difference(Formula):
    """`W + scale * D`, with one factor `D` of the tensor's shape, or of as many entries.

    Attributes:
        scale: multiplies it.
    """

    scale: float = 1.0

    @property
    def adds(self) -> bool:
        return True

    @property
    def held(self) -> int:
        """A block of it."""
        return 2 * _WIDE * BLOCK


@dataclass(frozen=True)
class Rows(Formula):
    """The tensor with some of its rows replaced: factor `rows` [n, ...].

    Attributes:
        numbers: which rows these are, in the order of the factor's.
    """

    numbers: tuple[int, ...] = ()

    @property
    def held(self) -> int:
        """A row."""
        return _WIDE * math.prod(self.shape[1:])


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

    @property
    def held(self) -> int:
        """What those parts need that a thread keeps."""
        most = max(sum(step.held for step in part.steps) for part in self.parts)
        return min(PARTS_HELD, len(self.parts)) * most


def one_by_one(steps: Iterable[Formula]) -> Iterator[Formula]:
    """Steps, with those of parts instead of what they are put together in."""
    for step in steps:
        if isinstance(step, InParts):
            for part in step.parts:
                yield from one_by_one(part.steps)
        else:
            yield step


class Made(NamedTuple):
    """What a tensor is made of.

    Attributes:
        stored: what is read for it, entry by entry.
        steps: what is done with that, in this order.
    """

    stored: StoredTensor
    steps: tuple[Formula, ...]
