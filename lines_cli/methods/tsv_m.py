"""Task singular vectors (TSV-M; Gargiulo 2025, arXiv 2412.00081): of each task the directions that matter most, made
orthogonal to those of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.spectrum import (
    each_matrix,
    is_matrix,
    spectrum_of,
    whitener,
    workspace,
    workspace_in_float64,
)
from lines_cli.methods.sums import LAMBDA, WEIGHT, divided_by_number, scaled, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def tsv_m(task_vectors: Sequence[Tensor], *, weight: Sequence[float]) -> Tensor:
    """Of every `w_i * tau_i = U_i diag(s_i) V_i^T` the first `int(r / N)` directions, r = min(out, in); side by side U,
    s and V; the result is `U' diag(s) V'^T`, where U' and V' are the polar factors of U and V, the nearest matrices
    with orthonormal columns.

    A tensor of three axes is a batch of matrices; any other that is no matrix is averaged: `sum(w_i * tau_i) / N`. So
    is a matrix with fewer directions than there are tasks, such as a class token's or a head's of one row, of which
    nothing would be left.

    Directions whose singular value is zero to rounding (as in `iso_c`) have no partner that is more than noise, and are
    left out; so is what remains of directions of several tasks that are the same to 3e-5 when one of them is taken.
    The error, relative to the result by the Frobenius norm, is below 1e-6 in float64 where the last direction that is
    taken is told from the next by its singular value, and what rounding to the compute dtype adds.

    Args:
        task_vectors: N of [out, in], [experts, out, in], or any other shape, in the compute dtype. Overwritten.
        weight: N.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix where one is not finite.
    """
    first = task_vectors[0]
    if not is_matrix(first) or min(first.shape[-2:]) < len(task_vectors):
        return divided_by_number(weighted_sum(task_vectors, weight), len(task_vectors))
    return each_matrix(_merged, scaled(task_vectors, weight))


def _merged(task_vectors: Sequence[Tensor]) -> Tensor:
    """`U' diag(s) V'^T` of N matrices [out, in]: the same, of float64."""
    import torch

    most = min(task_vectors[0].shape) // len(task_vectors)
    parts = []
    for tau in task_vectors:
        spectrum = spectrum_of(tau, eps=torch.finfo(tau.dtype).eps, top=most)
        u, s, v = spectrum.triplets(tau, most)
        parts.append((u, s / spectrum.scale, v))
    u, s, v = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
    return u @ (whitener(u) * s @ whitener(v)) @ v.mT


def _workspace(shape: Sequence[int]) -> int:
    """Bytes: U and V twice, while they are put together, and the product; of the rest the largest part at a time."""
    return workspace(shape) + _of_directions(shape)


def _workspace_in_float64(shape: Sequence[int]) -> int:
    return workspace_in_float64(shape) + _of_directions(shape)


def _of_directions(shape: Sequence[int]) -> int:
    if len(shape) not in (2, 3):
        return 0
    rows, columns = shape[-2:]
    r = min(rows, columns)
    return 8 * (2 * r * (rows + columns) + rows * columns)


METHODS = {
    "tsv_m": Method(
        tsv_m,
        "The first singular directions of each task, made orthogonal to those of the others (TSV-M, Gargiulo 2025).",
        paper="2412.00081",
        use="several tasks that are to stand beside each other, each with its strongest directions",
        sees="tensors",
        parameters={"weight": WEIGHT, "lambda": LAMBDA},
        keywords=lambda values, _: {"weight": values["weight"]},
        scale="lambda",
        workspace=_workspace,
        workspace_in_float64=_workspace_in_float64,
    ),
}
