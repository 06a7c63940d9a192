"""Weights that follow from how large the task vectors are: `weight: nan` and `weight: equal_norm`.

Both weigh a task vector by the inverse of its L2 norm over the whole model, so that none drowns the others because it
was trained longer or faster; they differ in how large the result is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence


def _inverse_norms(norms: Sequence[float]) -> list[float]:
    """`(1/n_i) / sum(1/n_j)`, which sum to 1: an average (NAN; Si 2025, arXiv 2505.16148)."""
    smallest = min(norms)
    shares = [smallest / norm for norm in norms]  # of the largest weight: no overflow
    return [share / sum(shares) for share in shares]


def _equal_norms(norms: Sequence[float]) -> list[float]:
    """`mean(n) / n_i`: a sum of task vectors that all have the mean of their norms."""
    mean = sum(norms) / len(norms)
    return [mean / norm for norm in norms]


WEIGHT_RULES: Mapping[str, Callable[[Sequence[float]], list[float]]] = {
    "nan": _inverse_norms,
    "equal_norm": _equal_norms,
}
"""A rule -> given the norm of each task vector that it is said of, all above 0, the weight of each."""
