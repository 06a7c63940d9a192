"""Isotropic merging in the common subspace (Iso-C; Marczak 2025, arXiv 2502.04959): the sum of the task vectors with a
flat spectrum, so that no direction drowns another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.sums import LAMBDA, WEIGHT, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def iso_c(task_vectors: Sequence[Tensor], *, weight: Sequence[float]) -> Tensor:
    """`mean(s) * U V^T` with `sum(w_i * tau_i) = U diag(s) V^T` for every matrix.

    A tensor of three axes is a batch of matrices, as fused experts are. Any other tensor that is no matrix is averaged:
    `sum(w_i * tau_i) / N`.

    The mean is over all r = min(out, in) singular values, zeros included. A direction whose singular value is zero to
    rounding, at most `max(out, in) * eps * max(s)`, has no partner that is more than noise: it stays 0.

    Args:
        task_vectors: N of [out, in], [experts, out, in], or any other shape, in the compute dtype (of which eps is).
            The decomposition runs in float64. Overwritten.
        weight: N.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix whose sum is not finite.
    """
    total = weighted_sum(task_vectors, weight)
    if total.ndim in (2, 3):
        return _flat_spectrum(total)
    # By a tensor: by a number, CUDA multiplies with its reciprocal, which has other bits.
    return total.div_(total.new_full((), len(task_vectors)))


def _flat_spectrum(total: Tensor) -> Tensor:
    """Every singular value of [out, in], or of each of [experts, out, in], set to their mean; overwritten."""
    import torch

    if total.ndim == 3:
        for matrix in total:
            _flat_spectrum(matrix)
        return total
    if total.numel() == 0:
        return total
    if not bool(total.isfinite().all()):
        return total.fill_(torch.nan)
    u, s, vh = torch.linalg.svd(total.double(), full_matrices=False)
    null = max(total.shape) * torch.finfo(total.dtype).eps * s[0]
    # Scaled before the product is taken, where it is the smaller factor.
    level = torch.where(s > null, s.mean(), 0.0)
    smaller, at = (u, 0) if u.shape[0] <= vh.shape[1] else (vh, 1)
    smaller.mul_(level if at == 0 else level.unsqueeze(1))
    return total.copy_(u @ vh)


def _workspace(shape: Sequence[int]) -> int:
    """Bytes, all in float64: a matrix and LAPACK's copy of it, U and V, the product; and what LAPACK works in."""
    if len(shape) not in (2, 3):
        return 0
    rows, columns = shape[-2:]
    return 8 * (4 * rows * columns + 6 * min(rows, columns) ** 2)


METHODS = {
    "iso_c": Method(
        iso_c,
        "The sum of the task vectors, all singular values set to their mean (Iso-C, Marczak 2025).",
        paper="2502.04959",
        use="many tasks of which a few would drown the others",
        sees="tensors",
        parameters={"weight": WEIGHT, "lambda": LAMBDA},
        keywords=lambda values, _: {"weight": values["weight"]},
        scale="lambda",
        workspace=_workspace,
    ),
}
