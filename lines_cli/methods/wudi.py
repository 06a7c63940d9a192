"""WUDI (Cheng 2025, arXiv 2503.08099), solved: the matrix that interferes least with the directions that each task
changed, by the equation that it satisfies in place of steps towards it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.spectrum import each_matrix, is_matrix, scale_of
from lines_cli.methods.sums import LAMBDA, WEIGHT, divided_by_number, scaled, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def wudi(task_vectors: Sequence[Tensor], *, weight: Sequence[float], ridge: float) -> Tensor:
    """The D that makes `sum_i |(D - D_i) D_i^T|^2 / |D_i|^2` least (section 4.3), with D_i = `w_i * tau_i` and
    Frobenius norms: the solution of `D A = B`, where `A = sum_i D_i^T D_i / |D_i|^2` and
    `B = sum_i D_i D_i^T D_i / |D_i|^2`.

    In directions of the input that hardly any task uses, A says next to nothing. There D is held to the sum S of all
    D_i, where the authors' steps begin: `D (A + m I) = B + m S`, with m = `ridge * N / in`, `ridge` times the mean
    eigenvalue of A. So D is a mean of the D_i, each weighted by how much it uses a direction, and with a large ridge
    the sum. The authors take 300 steps of Adam of 1e-5 each from the sum and stop, which leaves the weak directions
    near it, too: where a step is a thirtieth of an update's size, they come as near to the least objective as a ridge
    of 1, the default. Nearer to it is not better (docs/merging.md).

    A tensor of three axes is a batch of matrices; any other that is no matrix is averaged: `sum(w_i * tau_i) / N`.

    The error, relative to the result, is at most about `1e-16 * in / ridge` in float64, and what rounding to the
    compute dtype adds.

    Args:
        task_vectors: N of [out, in], [experts, out, in], or any other shape, in the compute dtype. The equation is
            solved in float64, by Cholesky's decomposition. Overwritten.
        weight: N.
        ridge: above 0.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix where one is not finite.
    """
    if not is_matrix(task_vectors[0]):
        return divided_by_number(weighted_sum(task_vectors, weight), len(task_vectors))
    return each_matrix(lambda matrices: _solved(matrices, ridge), scaled(task_vectors, weight))


def _solved(task_vectors: Sequence[Tensor], ridge: float) -> Tensor:
    """D of N matrices [out, in]: the same, of float64."""
    import torch

    rows, columns = task_vectors[0].shape
    scale = scale_of(task_vectors)
    left, right, total = (
        torch.zeros(size, dtype=torch.float64, device=task_vectors[0].device)
        for size in ((columns, columns), (rows, columns), (rows, columns))
    )
    tasks = 0
    for tau in task_vectors:
        wide = tau.double() * scale
        square = float(wide.square().sum())
        if square == 0:
            continue
        tasks += 1
        total += wide
        wide /= square**0.5
        gram = wide.mT @ wide
        left += gram
        right.add_(wide @ gram if rows >= columns else (wide @ wide.mT) @ wide, alpha=square**0.5)
    if not tasks:
        return total
    by = ridge * tasks / columns
    left.diagonal().add_(by)
    right.add_(total, alpha=by)
    del total
    factor = torch.linalg.cholesky(left)
    del left
    return torch.cholesky_solve(right.mT, factor).mT.div_(scale)


def _workspace(shape: Sequence[int]) -> int:
    """Bytes, all in float64: A, one task's part of it and the factor; and what is as large as a task, five times."""
    if len(shape) not in (2, 3):
        return 0
    rows, columns = shape[-2:]
    return 8 * (3 * columns * columns + min(rows, columns) ** 2 + 5 * rows * columns)


METHODS = {
    "wudi": Method(
        wudi,
        "The matrix that interferes least with what each task changed (WUDI, Cheng 2025), solved exactly.",
        paper="2503.08099",
        use="tasks whose inputs differ; each has the say where it alone changed much",
        sees="tensors",
        parameters={
            "weight": WEIGHT,
            "ridge": Parameter(1.0, "how strongly weak directions are held to the sum", low=1e-9),
            "lambda": LAMBDA,
        },
        keywords=lambda values, _: {key: values[key] for key in ("weight", "ridge")},
        scale="lambda",
        workspace=_workspace,
    ),
}
