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
    w, d = (_of_norm_1(matrix.reshape(matrix.shape[0], -1)) for matrix in (base, update))
    rank, of_update = _effective_rank(w), _effective_rank(d)
    if w is None or d is None:
        return rank, of_update, 0.0
    product = w @ d.T
    return rank, of_update, float((product - product.T).norm())


def _of_norm_1(matrix: Tensor) -> Tensor | None:
    """A copy in float64 over its Frobenius norm, the smaller side first; None where that norm is 0. It is divided by
    the largest entry before, so that no square is lost.
    """
    import torch

    if matrix.numel() == 0:
        return None
    low, high = (float(end) for end in matrix.aminmax())
    largest = max(-low, high)
    if largest == 0:
        return None
    copied = matrix.to(torch.float64, copy=True).div_(largest)
    copied.div_(copied.norm())
    return copied.T if copied.shape[0] > copied.shape[1] else copied


def _effective_rank(matrix: Tensor | None) -> float:
    """Of [r, n] with r <= n, in float64, of norm 1: from the eigenvalues of its Gram matrix, the squared singular
    values. NaN where something is not finite.
    """
    import torch

    if matrix is None:
        return 0.0
    gram = matrix @ matrix.T
    if not bool(gram.isfinite().all()):
        return math.nan
    shares = torch.linalg.eigvalsh(gram).clamp_(min=0)
    return math.exp(float(torch.special.entr(shares / shares.sum()).sum()))
