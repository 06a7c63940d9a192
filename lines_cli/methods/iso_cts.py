"""Isotropic merging in common and task-specific subspaces (Iso-CTS; Marczak 2025, arXiv 2502.04959): the directions
that the sum of all tasks has in common, beside those of single tasks that it would lose, all equally strong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.spectrum import (
    Spectrum,
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


def iso_cts(task_vectors: Sequence[Tensor], *, weight: Sequence[float], common_space_fraction: float) -> Tensor:
    """With D_i = `w_i * tau_i`, r = min(out, in), and d, k from `dimensions`: the first k directions of `sum(D_i)`,
    with U_k on the left; and of each `(I - U_k U_k^T) D_i` the first d. All side by side, U and V; the result is
    `m * U' V'^T`, where U' and V' are the polar factors of U and V, and m is the sum of all their singular values,
    over r.

    A tensor of three axes is a batch of matrices; any other that is no matrix is averaged: `sum(w_i * tau_i) / N`.

    Directions whose singular value is zero to rounding are left out, and count as 0 in the mean, as in `iso_c`; of what
    a task has beside the common space also those that are at most eps of the task's Frobenius norm. The error is that
    of `tsv_m`.

    Args:
        task_vectors: N of [out, in], [experts, out, in], or any other shape, in the compute dtype. Overwritten.
        weight: N.
        common_space_fraction: the share of the r directions that are common ones; 0.8 as published.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix where one is not finite.
    """
    if not is_matrix(task_vectors[0]):
        return divided_by_number(weighted_sum(task_vectors, weight), len(task_vectors))
    return each_matrix(lambda matrices: _merged(matrices, common_space_fraction), scaled(task_vectors, weight))


def dimensions(r: int, tasks: int, fraction: float) -> tuple[int, int]:
    """How many of r directions are common, and how many each task has of its own: as many each as come nearest to the
    rest beside `int(fraction * r)`, as in the authors' code.
    """
    each = min(r // tasks, round((r - int(fraction * r)) / tasks))
    return r - each * tasks, each


def _merged(task_vectors: Sequence[Tensor], fraction: float) -> Tensor:
    """`m * U' V'^T` of N matrices [out, in]: the same, of float64."""
    import torch

    first = task_vectors[0]
    eps, r = torch.finfo(first.dtype).eps, min(first.shape)
    common, each = dimensions(r, len(task_vectors), fraction)
    total = first.double()  # with two tasks what is beside the common space cancels out but for the last digits
    for tau in task_vectors[1:]:
        total = total.add_(tau) if total is not first else total + tau
    spectrum = spectrum_of(total, eps=eps, top=common)
    u_common, s, v_common = spectrum.triplets(total, common)
    level = float(s.sum()) / spectrum.scale
    del total
    own = [_of_task(tau, spectrum, u_common, each, eps=eps) for tau in task_vectors] if each else []
    level += sum(strength for _, _, strength in own)
    v = torch.cat([*(right for _, right, _ in own), v_common], dim=1)
    if not own:
        return u_common @ v.mT * (level / r)  # both orthonormal
    u = torch.cat([left for left, _, _ in own], dim=1)
    k = u.shape[1]
    whitened = whitener(v)  # of U that of the common part is 1, for each other direction is orthogonal to it
    core = torch.cat([whitener(u) @ whitened[:k], whitened[k:]]) * (level / r)
    return torch.cat([u, u_common], dim=1) @ core @ v.mT


def _of_task(
    tau: Tensor, spectrum: Spectrum, u_common: Tensor, each: int, *, eps: float
) -> tuple[Tensor, Tensor, float]:
    """The first directions of a task beside the common space: left [out, k], right [in, k], and the sum of their
    singular values.
    """
    tall = tau.double()
    least = eps * float(tall.norm())
    if spectrum.wide:  # the space beside it is known, and small
        beside = spectrum.near[:, u_common.shape[1] :]
        rest = beside.mT @ tall
    else:
        rest = tall - u_common @ (u_common.mT @ tall)
    found = spectrum_of(rest, eps=eps, least=least, top=each)
    u, s, v = found.triplets(rest, each)
    return (beside @ u if spectrum.wide else u), v, float(s.sum()) / found.scale


def _workspace(shape: Sequence[int]) -> int:
    """Bytes: the sum of all; a task, what is beside the common space of it, and the product; U and V twice."""
    return workspace(shape) + _beside(shape)


def _workspace_in_float64(shape: Sequence[int]) -> int:
    return workspace_in_float64(shape) + _beside(shape)


def _beside(shape: Sequence[int]) -> int:
    if len(shape) not in (2, 3):
        return 0
    rows, columns = shape[-2:]
    r = min(rows, columns)
    return 8 * (4 * rows * columns + 2 * r * (rows + columns))


METHODS = {
    "iso_cts": Method(
        iso_cts,
        "Common directions of the sum, and own ones of each task, all equally strong (Iso-CTS, Marczak 2025).",
        paper="2502.04959",
        use="as iso_c, where tasks are many and differ much",
        sees="tensors",
        parameters={
            "weight": WEIGHT,
            "common_space_fraction": Parameter(0.8, "share of directions that are of the sum", low=0, high=1),
            "lambda": LAMBDA,
        },
        keywords=lambda values, _: {key: values[key] for key in ("weight", "common_space_fraction")},
        scale="lambda",
        workspace=_workspace,
        workspace_in_float64=_workspace_in_float64,
    ),
}
