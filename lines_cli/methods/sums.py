"""Weighted sums: of task vectors (model soups, task arithmetic) and of whole weights (linear, SLERP, passthrough).

Like every method these are plain functions on a run of entries: one tensor [n] of float32 (float64 where an input is)
for each model, in recipe order, and keywords named as in the recipe. They may overwrite what they are given. Sums are
taken in recipe order, each operation rounded: `((w1 * tau1) + w2 * tau2) + ...`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

NEGLIGIBLE = 1e-8
"""A sum of weights nearer to 0 than this is not divided by, as in mergekit."""


def weighted_sum(vectors: Sequence[Tensor], weight: Sequence[float], *, overwrite: bool = True) -> Tensor:
    """`((w1 * v1) + w2 * v2) + ...`: [n]. Unless `overwrite`, the vectors stay as they are."""
    first, *others = (v if w == 1 else v.mul_(w) if overwrite else v * w for v, w in zip(vectors, weight, strict=True))
    if not others:
        return first if overwrite or weight[0] != 1 else first.clone()
    total = first.add_(others[0]) if overwrite else first + others[0]
    for vector in others[1:]:
        total.add_(vector)
    return total


def scaled(task_vectors: Sequence[Tensor], *factors: Sequence[float]) -> Sequence[Tensor]:
    """The task vectors, each times its factors, one after the other; overwritten."""
    for factor in factors:
        for task_vector, by in zip(task_vectors, factor, strict=True):
            if by != 1:
                task_vector.mul_(by)
    return task_vectors


def average(task_vectors: Sequence[Tensor]) -> Tensor:
    """`(tau_1 + ... + tau_N) / N`: a uniform model soup (Wortsman 2022, arXiv 2203.05482), as a task vector."""
    total = weighted_sum(task_vectors, [1.0] * len(task_vectors))
    # By a tensor: by a number, CUDA multiplies with its reciprocal, which has other bits.
    return total if len(task_vectors) == 1 else total.div_(total.new_full((), len(task_vectors)))


def task_arithmetic(task_vectors: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = False) -> Tensor:
    """`sum(w_i * tau_i)` (Ilharco 2023, arXiv 2212.04089, section 2), over `sum(w_i)` with `normalize`."""
    return _over(weighted_sum(task_vectors, weight), weight, normalize=normalize)


def linear(weights: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = True) -> Tensor:
    """`sum(w_i * theta_i) / sum(w_i)`: the weighted average of whole weights, without a base; the sum alone unless
    `normalize`.
    """
    return _over(weighted_sum(weights, weight), weight, normalize=normalize)


def _over(total: Tensor, weight: Sequence[float], *, normalize: bool) -> Tensor:
    if not normalize:
        return total
    divisor = total.new_zeros(())  # summed in the same dtype
    for w in weight:
        divisor = divisor + w
    return total if divisor == 1 or divisor.abs() < NEGLIGIBLE else total.div_(divisor)


def slerp(weights: Sequence[Tensor], *, shares: tuple[float, float]) -> Tensor:
    """`s0 * theta_1 + s1 * theta_2` with `shares` from `slerp_shares`: spherical linear interpolation between two
    tensors (Shoemake 1985).
    """
    return weighted_sum(weights, shares)


_NEARLY_PARALLEL = 0.9995


def slerp_shares(t: float, *, dot: float, norms: tuple[float, float]) -> tuple[float, float]:
    """The shares of two tensors at `t` of the way from the first (0) to the second (1), along the arc between them:
    `sin((1 - t) * phi) / sin(phi)` and `sin(t * phi) / sin(phi)` for the angle phi.

    Args:
        t: 0 to 1.
        dot: the sum over all entries of their products.
        norms: of each; where one is 0 the angle counts as a right one. Where the two are nearly parallel, at mergekit's
            bound, the line takes the place of the arc.
    """
    lengths = [norm if norm > NEGLIGIBLE else 1.0 for norm in norms]
    cosine = max(-1.0, min(1.0, dot / lengths[0] / lengths[1]))
    if abs(cosine) > _NEARLY_PARALLEL:
        return 1 - t, t
    phi = math.acos(cosine)
    return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def passthrough(weights: Sequence[Tensor], *, scale: Sequence[float | None]) -> Tensor:
    """The one model's weights, times `scale` if there is one."""
    return weights[0] if scale[0] is None else weights[0].mul_(scale[0])
