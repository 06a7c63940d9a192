"""Sums of task vectors: model soups and task arithmetic.

Like every method these are plain functions on a run of entries: one tensor [n] of float32 (float64 where an input is)
for each model, in recipe order, and keywords named as in the recipe. They may overwrite what they are given. Sums are
taken in recipe order, each operation rounded: `((w1 * tau1) + w2 * tau2) + ...`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lines_cli.methods.method import Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Note, Remark, Said, Values
from lines_cli.methods.sparsify import DENSITY, LARGEST, TRIM, review_trim
from lines_cli.methods.weight_rules import WEIGHT_RULES

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
    return total if len(task_vectors) == 1 else divided_by_number(total, len(task_vectors))


def divided_by_number(total: Tensor, number: int) -> Tensor:
    """`total / number`, overwritten."""
    # By a tensor: by a number, CUDA multiplies with its reciprocal, which has other bits.
    return total.div_(total.new_full((), number))


def task_arithmetic(task_vectors: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = False) -> Tensor:
    """`sum(w_i * tau_i)` (Ilharco 2023, arXiv 2212.04089, section 2), over `sum(w_i)` with `normalize`."""
    return divided(weighted_sum(task_vectors, weight), weight, normalize=normalize)


def divided(total: Tensor, weight: Sequence[float], *, normalize: bool) -> Tensor:
    """`total / sum(w_i)`: [n], overwritten; as it is where that sum is 1 or negligible, or without `normalize`."""
    if not normalize:
        return total
    divisor = total.new_zeros(())  # summed in the same dtype
    for w in weight:
        divisor = divisor + w
    return total if divisor == 1 or divisor.abs() < NEGLIGIBLE else total.div_(divisor)


ON_OFF: dict[str | bool, Any] = {True: True, False: False}
WEIGHT = Parameter(1.0, "of the model in the sum", per_model=True, rules=tuple(WEIGHT_RULES))
LAMBDA = Parameter(1.0, "scale of the merged task vector")
NORMALIZE = Parameter(False, "divide by the sum of the weights", varies=False, choices=ON_OFF)


def all_are_1(values: Values, *keys: str) -> bool:
    """Whether every model's value of some parameters is 1."""
    return all(value == 1 for key in keys for value in values[key])


def whole_and_unweighted(values: Values) -> bool:
    """Whether every `weight` is 1 and nothing is dropped: then one model is itself."""
    return all_are_1(values, "weight", "density")


def shares_of_sum(values: Values, _: int) -> tuple[float, ...] | None:
    """What each task vector is multiplied by in a weighted sum, over the sum of the weights with `normalize`; None
    where entries are dropped.
    """
    weight = tuple(float(w) for w in values["weight"])
    if not all_are_1({"density": (1.0,), **values}, "density"):
        return None
    divisor = sum(weight)
    divided_by = divisor if values["normalize"] and abs(divisor) >= NEGLIGIBLE else 1.0
    return tuple(w / divided_by for w in weight)


def _review(said: Said) -> Iterator[Remark]:
    yield from review_trim(said, "density")
    if any(density != 1 for density in said.values("density")):
        yield Note("keeps each task vector's largest entries, as density says; mergekit ignores it here")


METHODS = {
    "average": Method(
        average,
        "The mean of the task vectors: a uniform model soup (Wortsman 2022).",
        paper="2203.05482",
        use="fine-tunes of one task",
        parameters={"lambda": LAMBDA},
        keywords=lambda *_: {},
        one_is_itself=lambda _: True,
        shares=lambda _, models: (1 / models,) * models,
        scale="lambda",
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "The weighted sum of the task vectors (Ilharco 2023).",
        paper="2212.04089",
        use="the first thing to try; on language models the one that gains most reliably",
        parameters={"weight": WEIGHT, "density": DENSITY, "trim": TRIM, "normalize": NORMALIZE, "lambda": LAMBDA},
        sparsifier=LARGEST,
        keywords=lambda values, _: {key: values[key] for key in ("weight", "normalize")},
        one_is_itself=whole_and_unweighted,
        plain_sum=lambda values: not values["normalize"] and all_are_1(values, "weight"),
        shares=shares_of_sum,
        norm_of_kept=True,
        scale="lambda",
        review=_review,
        ignored=frozenset({"int8_mask", "embed_slerp", "rescale"}),
    ),
}
