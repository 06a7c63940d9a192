"""The methods on singular values of matrices, written from the papers in numpy, by way of its singular value
decomposition in float64: no Gram matrix, no blocks, no torch but for what goes in and comes out.

What is zero to rounding follows from the dtype that the methods compute in, as their docstrings say: a direction whose
singular value is at most `max(out, in) * eps` of the largest one is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from support import whole_model
from support.whole_model import Tensors

Array = NDArray[np.float64]
Triplets = tuple[Array, Array, Array]


def triplets(matrix: Array, eps: float, most: int | None = None) -> Triplets:
    """U [m, k], s [k], V^T [k, n]."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    k = int((s > max(matrix.shape) * eps * s[0]).sum()) if len(s) else 0
    k = k if most is None else min(k, most)
    return u[:, :k], s[:k], vt[:k]


def polar_factor(columns: Array) -> Array:
    """The nearest matrix with orthonormal columns; of columns that depend on each other to 3e-5 what there is."""
    if columns.shape[1] == 0:
        return columns
    p, s, qt = np.linalg.svd(columns, full_matrices=False)
    keep = s > max(3e-5, max(columns.shape) * 2.0**-23) * max(1.0, s[0])
    return p[:, keep] @ qt[keep]


def iso_c_of(matrices: Sequence[Array], eps: float) -> Array:
    """Every singular value of the sum is their mean."""
    total = sum(matrices[1:], matrices[0])
    u, s, vt = triplets(total, eps)
    return u @ vt * (s.sum() / min(total.shape))


def iso_cts_of(matrices: Sequence[Array], eps: float, common_space_fraction: float = 0.8) -> Array:
    """As in the authors' code: the common space is as much larger as makes the rest divisible by the tasks."""
    total, tasks = sum(matrices[1:], matrices[0]), len(matrices)
    r = min(total.shape)
    each = round((r - int(r * common_space_fraction)) / tasks)
    each = min(each, r // tasks)
    common, s, common_vt = triplets(total, eps, r - each * tasks)
    us, vts, level = [], [], s.sum()
    for matrix in matrices:
        rest = matrix - common @ (common.T @ matrix)
        u, s, vt = triplets(rest, eps, each)
        keep = s > eps * np.linalg.norm(matrix)
        us, vts, level = [*us, u[:, keep]], [*vts, vt[keep]], level + s[keep].sum()
    u, v = np.hstack([*us, common]), np.vstack([*vts, common_vt]).T
    return polar_factor(u) @ polar_factor(v).T * (level / r)


def tsv_m_of(matrices: Sequence[Array], eps: float) -> Array:
    """Of each task its share of the directions."""
    found = [triplets(matrix, eps, min(matrix.shape) // len(matrices)) for matrix in matrices]
    u, s, vt = (
        np.concatenate(parts, axis=axis) for parts, axis in zip(zip(*found, strict=True), (1, 0, 0), strict=True)
    )
    return (polar_factor(u) * s) @ polar_factor(vt.T).T


def wudi_of(matrices: Sequence[Array], eps: float, ridge: float = 1.0) -> Array:
    """As least squares, by numpy's solver: `D D_i^T = D_i D_i^T` for all tasks, and the ridge."""
    total, columns = sum(matrices[1:], matrices[0]), matrices[0].shape[1]
    changed = [matrix for matrix in matrices if matrix.any()]
    if not changed:
        return total
    norms = [np.linalg.norm(matrix) for matrix in changed]
    held = np.sqrt(ridge * len(changed) / columns)
    given = np.vstack([*(m / norm for m, norm in zip(changed, norms, strict=True)), held * np.eye(columns)])
    wanted = np.vstack([*(m @ m.T / norm for m, norm in zip(changed, norms, strict=True)), held * total.T])
    return np.linalg.lstsq(given, wanted, rcond=None)[0].T


def svc_of(merged: Array, tasks: Sequence[Array], eps: float) -> Array:
    """Direction by direction, as the paper has it; equal singular values together."""
    u, s, _ = triplets(merged, eps)
    changed = [task for task in tasks if task.any()]
    made, begin = merged.copy(), 0
    while begin < len(s) and changed:
        end = begin + 1
        while end < len(s) and s[end - 1] - s[end] <= 1e-6 * s[0]:
            end += 1
        direction = u[:, begin:end]
        a = direction.T @ merged
        shares = []
        for task in changed:
            of_task = direction.T @ task
            if np.linalg.norm(of_task) > 1e-6 * np.linalg.norm(task):
                shares.append(max(1 / len(changed), (a * of_task).sum() / (of_task * of_task).sum()))
        if shares:
            made += (len(shares) / sum(shares) - 1) * direction @ a
        begin = end
    return made


# --- on whole models ---


def _on_models(
    function: Callable[..., Array], taus: Sequence[Tensors], weight: Sequence[float], **said: Any
) -> Tensors:
    """Matrices, and each of a batch of them, by the function; any other tensor is averaged."""

    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        dtype = tensors[0].dtype
        # What the methods are given, and what they make of it, is rounded to the compute dtype.
        weighted = [whole_model.times(w, tensor) for w, tensor in zip(weight, tensors, strict=True)]
        too_few = function is tsv_m_of and tensors[0].ndim > 1 and min(tensors[0].shape[-2:]) < len(tensors)
        if tensors[0].ndim not in (2, 3) or tensors[0].numel() == 0 or too_few:
            return whole_model.added(weighted) / len(tensors)
        if function is iso_c_of:
            weighted = [whole_model.added(weighted)]
        batches = [tensor.double().numpy().reshape(-1, *tensor.shape[-2:]) for tensor in weighted]
        eps = torch.finfo(dtype).eps
        made = [function(list(matrices), eps, **said) for matrices in zip(*batches, strict=True)]
        return torch.from_numpy(np.stack(made)).to(dtype).view(tensors[0].shape)

    return whole_model.by_name(taus, merged)


def iso_c(taus: Sequence[Tensors], *, weight: Sequence[float]) -> Tensors:
    return _on_models(iso_c_of, taus, weight)


def iso_cts(taus: Sequence[Tensors], *, weight: Sequence[float], common_space_fraction: float = 0.8) -> Tensors:
    return _on_models(iso_cts_of, taus, weight, common_space_fraction=common_space_fraction)


def tsv_m(taus: Sequence[Tensors], *, weight: Sequence[float]) -> Tensors:
    return _on_models(tsv_m_of, taus, weight)


def wudi(taus: Sequence[Tensors], *, weight: Sequence[float], ridge: float = 1.0) -> Tensors:
    return _on_models(wudi_of, taus, weight, ridge=ridge)


def calibrated(merged: Tensors, taus: Sequence[Tensors]) -> Tensors:
    """Singular value calibration of every matrix of a merged task vector."""
    made = {}
    for name, tensor in merged.items():
        if tensor.ndim not in (2, 3) or tensor.numel() == 0:
            made[name] = tensor
            continue
        every = [tensor, *(tau[name] for tau in taus)]
        batches = [one.double().numpy().reshape(-1, *tensor.shape[-2:]) for one in every]
        eps = torch.finfo(tensor.dtype).eps
        found = [svc_of(first, rest, eps) for first, *rest in zip(*batches, strict=True)]
        made[name] = torch.from_numpy(np.stack(found)).to(tensor.dtype).view(tensor.shape)
    return made
