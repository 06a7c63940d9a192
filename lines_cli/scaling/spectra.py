"""What the spectra of a matrix and of its update say, for the depth rules that read them (LARV, arXiv 2602.09413)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def ranks_and_commutator(base: Tensor, update: Tensor) -> tuple[float, float, float]:
    """The effective ranks of a matrix W and of its update D, and how far the two are from commuting.

    The effective rank is `exp(H(p))`, the entropy of `p_j = s_j^2 / sum(s^2)` for the singular values s: 1 for a single
    direction, r for r equal ones; 0 for a matrix of zeros. The commutator term is `|W D^T - D W^T| / (|W| |D|)` in
    Frobenius norms, of the transposed matrices where these are smaller; from 0 to 2, 0 where either is zero.

    Args:
        base, update: [out, in], of any float dtype; computed in float64. Three axes are a batch of matrices, as fused
            experts are, and count by their mean; more are a matrix of [out, rest].

    Returns:
        The three numbers.
    """
    if base.ndim == 3:
        each = [ranks_and_commutator(one, other) for one, other in zip(base, update, strict=True)]
        changed = [numbers for numbers in each if numbers[0] > 0 and numbers[1] > 0]
        if not changed:
            return 0.0, 0.0, 0.0
        ranks, of_updates, terms = (sum(column) / len(changed) for column in zip(*changed, strict=True))
        return ranks, of_updates, terms
    w, d = (matrix.reshape(matrix.shape[0], -1).double() for matrix in (base, update))
    if w.shape[0] > w.shape[1]:
        w, d = w.T, d.T
    product = w @ d.T
    norms = float(w.norm()) * float(d.norm())
    term = float((product - product.T).norm()) / norms if norms else 0.0
    return _effective_rank(w), _effective_rank(d), term


def _effective_rank(matrix: Tensor) -> float:
    """Of [r, n] with r <= n, in float64: from the eigenvalues of its Gram matrix, the squared singular values."""
    import torch

    largest = float(matrix.abs().max()) if matrix.numel() else 0.0
    if not 0 < largest < math.inf:
        return 0.0 if largest == 0 else math.nan
    matrix = matrix / largest  # so that no square is lost
    squares = torch.linalg.eigvalsh(matrix @ matrix.T).clamp_(min=0)
    shares = squares / squares.sum()
    return math.exp(float(torch.special.entr(shares).sum()))
