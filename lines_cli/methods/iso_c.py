"""Isotropic merging in the common subspace (Iso-C; Marczak 2025, arXiv 2502.04959): the sum of the task vectors with a
flat spectrum, so that no direction drowns another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.spectrum import each_matrix, is_matrix, polar, spectrum_of, workspace, workspace_in_float64
from lines_cli.methods.sums import LAMBDA, WEIGHT, divided_by_number, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def iso_c(task_vectors: Sequence[Tensor], *, weight: Sequence[float]) -> Tensor:
    """`mean(s) * U V^T` with `sum(w_i * tau_i) = U diag(s) V^T` for every matrix: the mean singular value times the
    polar factor.

    A tensor of three axes is a batch of matrices, as fused experts are. Any other tensor that is no matrix is averaged:
    `sum(w_i * tau_i) / N`.

    The mean is over all r = min(out, in) singular values. A direction whose singular value is zero to rounding, at most
    `max(out, in) * eps * max(s)`, has no partner that is more than noise: it stays 0, and counts as 0 in the mean.

    The error against exact arithmetic on the same sum, relative to the result by the Frobenius norm, is below 1e-6 in
    float64, and what rounding to float32 adds (about 3e-8); mostly it is far smaller (`spectrum`).

    Args:
        task_vectors: N of [out, in], [experts, out, in], or any other shape, in the compute dtype (of which eps is).
            The decomposition runs in float64. Overwritten.
        weight: N.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix whose sum is not finite.
    """
    total = weighted_sum(task_vectors, weight)
    if not is_matrix(total):
        return divided_by_number(total, len(task_vectors))
    return each_matrix(_flat_spectrum, [total])


def _flat_spectrum(total: Sequence[Tensor]) -> Tensor:
    """Every singular value of [out, in] set to their mean; overwritten."""
    import torch

    (matrix,) = total
    spectrum = spectrum_of(matrix, eps=torch.finfo(matrix.dtype).eps)
    return polar(matrix, spectrum, float(spectrum.values.mean()) / spectrum.scale)


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
        workspace=workspace,
        workspace_in_float64=workspace_in_float64,
    ),
}
