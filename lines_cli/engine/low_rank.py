"""Matrices of low rank: products with fewer ranks, and the nearest one to a matrix. Plain functions over torch tensors,
all in float64.

The best approximation of rank k is the truncated singular value decomposition (Eckart and Young 1936). Factors are
balanced: each has the square roots of the singular values. A singular vector has no sign of its own: the largest entry
of each column of the left factor is positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def core_of(down: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`up @ down` as `left @ core @ right.T` with orthonormal columns on both sides, by QR of each factor: all that
    follows is done to a core as small as the rank.

    Args:
        down, up: [r, in] and [out, r].
    """
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.T)
    return left, upper @ lower.T, right


def reduced(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor, float, float]:
    """The nearest product of fewer ranks to `up @ down`, and the squared norms of what is kept and of all.

    Args:
        down, up: [r, in] and [out, r].
        rank: at most the smaller of r, in and out.

    Returns:
        [rank, in] and [out, rank].
    """
    left, core, right = core_of(down, up)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    squares = s.square()
    root = s[:rank].sqrt()
    new_up = (left @ u[:, :rank]) * root
    new_down = root.unsqueeze(1) * (vh[:rank] @ right.T)
    same_signs(new_down, new_up)
    return new_down, new_up, float(squares[:rank].sum()), float(squares.sum())


def spectrum_of_product(down: Tensor, up: Tensor) -> Tensor:
    """The squared singular values of `up @ down`, the largest first."""
    _, core, _ = core_of(down, up)
    squares: Tensor = torch.linalg.svdvals(core).square()
    return squares


def nearest(gram: Tensor, rank: int) -> Tensor:
    """Orthonormal columns [n, rank] that span what the nearest matrix of that rank has of the smaller side.

    The eigenvectors of the Gram matrix are the singular vectors. What is projected onto them keeps its part in their
    span exactly, so the error is that of Eckart and Young but for terms of the order of 1e-15 of the squared norm.

    Args:
        gram: `M @ M.T` [n, n], n being the smaller side of the matrix M.
        rank: at most n.
    """
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors[:, -rank:].flip(1)


def spectrum_of_gram(gram: Tensor) -> Tensor:
    """The squared singular values, the largest first; those below rounding are 0."""
    values: Tensor = torch.linalg.eigvalsh(gram).flip(0)
    floor = len(values) * torch.finfo(values.dtype).eps * values[:1]
    return torch.where(values > floor, values, 0.0)


def balanced(one: Tensor, other: Tensor) -> None:
    """Give both factors the square roots of the singular values, in place.

    Args:
        one: [n, rank], orthonormal columns.
        other: [rank, m], whose rows have the singular values as their norms.
    """
    s = torch.linalg.vector_norm(other, dim=1)
    root = s.sqrt()
    other /= torch.where(root > 0, root, 1.0).unsqueeze(1)
    one *= root


def same_signs(down: Tensor, up: Tensor) -> None:
    """Give singular vectors the signs that the largest entries of `up`'s columns are positive, in place."""
    if up.numel() == 0:
        return
    at = up.abs().argmax(0, keepdim=True)
    signs = torch.where(up.gather(0, at) < 0, -1.0, 1.0)
    up *= signs
    down *= signs.T


def rank_for(squares: Tensor, energy: float) -> int:
    """The smallest rank that keeps a share of the squared norm; 0 where that is 0.

    Args:
        squares: squared singular values, the largest first.
        energy: the share, above 0 and at most 1.
    """
    total = float(squares.sum())
    if total <= 0:
        return 0
    kept = squares.cumsum(0)
    enough = kept >= energy * total
    first = int(enough.to(torch.uint8).argmax()) if bool(enough.any()) else len(squares) - 1
    return min(first + 1, int((squares > 0).sum()))


def stacked(downs: Sequence[Tensor], ups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Factors side by side, whose product is the sum of the products."""
    return torch.cat(list(downs), 0), torch.cat(list(ups), 1)
