"""Singular values and directions of matrices, by way of the Gram matrix of their smaller side, in float64.

An eigendecomposition of `A^T A` takes half the time of the singular value decomposition of A, and needs A block by
block only. It squares the condition: of a singular value s beside the largest, s_1, it knows the direction to about
`2e-16 * (s_1 / s)^2`. So it is used where no direction that counts lies below `RESOLVED` of the largest, which keeps
that error below 1e-6; with eps of float32 the rule for what is zero to rounding sees to it, but for matrices of fewer
than 256 rows and columns, and those are small. Elsewhere the singular value decomposition itself is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

RESOLVED = 3e-5
"""What share of the largest singular value another one has to be, so that a Gram matrix tells its direction."""

_BLOCK = 512  # entries of the longer side that are held in float64 at a time; and columns of a part of the Gram matrix
EPS = 2.0**-23
"""The distance of 1 from the next float32."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of a matrix [m, n], r = min(m, n), and its directions.

    Attributes:
        scale: a power of two; the matrix times it has entries of at most 1, and is what the rest is of.
        values: [r] of float64, the largest first. What is zero to rounding is 0.
        wide: whether the smaller side is the rows.
        near: [r, r] of float64: the directions on the smaller side, a column each; orthonormal, also where the value
            is 0.
        far: those on the other side, [max(m, n), r]; None where the matrix gives them well enough.
    """

    scale: float
    values: Tensor
    wide: bool
    near: Tensor
    far: Tensor | None

    @property
    def rank(self) -> int:
        """How many values are not zero."""
        return int((self.values > 0).sum())

    def triplets(self, matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """The first `most` directions whose value is not zero, or as many as there are: U [m, k], s [k], V [n, k] in
        float64; s of the scaled matrix.
        """
        k = min(most, self.rank)
        near, values = self.near[:, :k], self.values[:k]
        if self.far is not None:
            far = self.far[:, :k]
        else:
            far = near.new_empty(max(matrix.shape), k)
            for part, block in _blocks(matrix, self.scale, wide=self.wide):
                far[part] = block @ near
            far /= values
        return (near, values, far) if self.wide else (far, values, near)


def is_matrix(tensor: Tensor) -> bool:
    """Whether it is a matrix, or a batch of them, as fused experts are."""
    return tensor.ndim in (2, 3)


def each_matrix(function: Callable[[Sequence[Tensor]], Tensor], tensors: Sequence[Tensor]) -> Tensor:
    """What a function makes of matrices, [out, in] each, or of each of batches, [experts, out, in]: written over the
    first. Nothing is done to empty ones, and NaN fills a matrix of which one is not finite.

    Args:
        function: given N of [out, in], it makes one, which may be float64.
        tensors: N of one shape.
    """
    import torch

    first = tensors[0]
    if first.numel() == 0:
        return first
    if first.ndim == 3:
        for matrices in zip(*tensors, strict=True):
            each_matrix(function, matrices)
        return first
    if not all(math.isfinite(_largest(tensor)) for tensor in tensors):
        return first.fill_(torch.nan)
    made = function(tensors)
    return made if made is first else first.copy_(made)


def spectrum_of(matrix: Tensor, *, eps: float, least: float = 0.0, top: int | None = None) -> Spectrum:
    """The singular values and directions of a matrix.

    Args:
        matrix: [m, n], finite, in float32 or float64.
        eps: values of at most `max(m, n) * eps` times the largest are zero to rounding.
        least: so are those of at most this.
        top: how many are asked for; of the others only `near` has to be right.
    """
    import torch

    wide = matrix.shape[0] <= matrix.shape[1]
    scale = scale_of([matrix])
    squares, near = torch.linalg.eigh(_gram(matrix, scale, wide=wide))
    values = squares.clamp_(min=0).sqrt_().flip(0)
    near = near.flip(1)
    null = max(max(matrix.shape) * eps * float(values[0]), least * scale)
    far: Tensor | None = None
    asked = values[:top]
    if bool(((asked > null) & (asked < RESOLVED * values[0])).any()):
        u, values, vh = torch.linalg.svd(matrix.double() * scale, full_matrices=False)
        near, far = (u, vh.mT) if wide else (vh.mT, u)
        null = max(max(matrix.shape) * eps * float(values[0]), least * scale)
    return Spectrum(scale, torch.where(values > null, values, 0.0), wide, near, far)


def polar(matrix: Tensor, spectrum: Spectrum, level: float) -> Tensor:
    """`level * U V^T` over the directions whose value is not zero; written over the matrix, [m, n].

    Args:
        matrix: that of the spectrum.
        spectrum: of it.
        level: what every singular value becomes.
    """
    if spectrum.far is not None:
        near, far = spectrum.near * ((spectrum.values > 0) * level), spectrum.far
        return matrix.copy_(near @ far.mT if spectrum.wide else far @ near.mT)
    by = _inverse(spectrum, level)
    for part, block in _blocks(matrix, spectrum.scale, wide=spectrum.wide):
        made = block @ by
        if spectrum.wide:
            matrix[:, part] = made.mT
        else:
            matrix[part] = made
    return matrix


def whitener(columns: Tensor) -> Tensor:
    """`(X^T X)^(-1/2)`, [k, k]: X times it is the polar factor of X [m, k], its nearest with orthonormal columns.
    Columns that depend on each other to 3e-5, or to rounding in float32, count as dependent: what remains of them when
    the others are taken away is left out.

    Args:
        columns: of float64, each of length 1.
    """
    import torch

    squares, near = torch.linalg.eigh(_gram(columns, 1.0, wide=False))
    null = max(RESOLVED, max(columns.shape) * EPS) ** 2 * squares[-1:].clamp(min=1.0)
    by: Tensor = torch.where(squares > null, squares.clamp(min=RESOLVED**2).rsqrt(), 0.0)
    root: Tensor = (near * by) @ near.mT
    return root


def scale_of(tensors: Sequence[Tensor]) -> float:
    """A power of two that brings the largest entry of all near 1, so that no square is beyond float64."""
    most = max(map(_largest, tensors))
    return 2.0 ** max(-1000, min(1000, -math.frexp(most)[1])) if most else 1.0


def _largest(tensor: Tensor) -> float:
    """The largest magnitude of its entries; NaN or infinite where one of them is."""
    least, most = tensor.aminmax()
    return max(abs(float(least)), abs(float(most)))


def workspace(shape: Sequence[int]) -> int:
    """Bytes that `spectrum_of` and `polar` need at a time of a float32 matrix: the Gram matrix, its eigenvectors, what
    LAPACK works in; a block and what is made of it. Of a small one those of its singular value decomposition.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        return 0
    r, long = sorted(shape[-2:])
    return workspace_in_float64(shape) if long < 256 else 8 * (5 * r * r + 4 * _BLOCK * r)


def workspace_in_float64(shape: Sequence[int]) -> int:
    """Bytes that they need of any matrix: it, LAPACK's copy of it, U and V, the product; and what LAPACK works in."""
    if len(shape) not in (2, 3) or 0 in shape:
        return 0
    r, long = sorted(shape[-2:])
    return 8 * (4 * r * long + 6 * r * r + 4 * _BLOCK * r)


def _blocks(matrix: Tensor, scale: float, *, wide: bool) -> Iterator[tuple[slice, Tensor]]:
    """The scaled matrix in float64, some of its longer side at a time: [at most `_BLOCK`, r], and where that is."""
    tall = matrix.mT if wide else matrix
    for first in range(0, tall.shape[0], _BLOCK):
        part = slice(first, first + _BLOCK)
        block = tall[part].double()
        yield part, block if scale == 1 else block * scale


def _gram(matrix: Tensor, scale: float, *, wide: bool) -> Tensor:
    """`A^T A` of the scaled matrix, or `A A^T` of a wide one: [r, r] of float64, of which only the lower triangle, all
    that is needed, and some more is filled in.
    """
    import torch

    r = matrix.shape[0] if wide else matrix.shape[1]
    found = torch.zeros(r, r, dtype=torch.float64, device=matrix.device)
    for _, block in _blocks(matrix, scale, wide=wide):
        for first in range(0, r, _BLOCK):
            found[first:, first : first + _BLOCK].addmm_(block[:, first:].mT, block[:, first : first + _BLOCK])
    return found


def _inverse(spectrum: Spectrum, level: float) -> Tensor:
    """`near diag(level / s) near^T`, [r, r], without the directions whose value is 0."""
    k = spectrum.rank
    near = spectrum.near[:, :k]
    return (near * (level / spectrum.values[:k])) @ near.mT
