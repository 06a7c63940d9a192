"""Model breadcrumbs (Davari and Belilovsky 2024, arXiv 2312.06795): of each task vector drop the largest entries, which
are outliers, and the smallest, which are noise; merge what is left by sum, or by TIES.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Measured, Method, Statistic
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Note, Remark, Said, Values
from lines_cli.methods.sparsify import (
    RESCALE_TRIMMED,
    ByMagnitude,
    Ranks,
    any_dropped,
    factors,
    keep_between,
    norms_to_restore,
    rank,
    review_trim,
    trims_globally,
)
from lines_cli.methods.sums import LAMBDA, NORMALIZE, WEIGHT, scaled, task_arithmetic, whole_and_unweighted
from lines_cli.methods.ties import (
    MAYBE_NORMALIZE,
    agreement_of,
    agreement_or_normalize,
    agreement_parameter,
    elect,
    ties,
)

if TYPE_CHECKING:
    from torch import Tensor


def breadcrumb_ranks(density: float, gamma: float, numel: int) -> Ranks:
    """The ranks of the least and the greatest magnitude that are kept: the largest `int(gamma * numel)` entries are
    dropped, and of the next `max(1, int(density * numel))` are kept. The names are mergekit's; the paper names the
    shares that are dropped at either end. Where there are too few, fewer of the largest are dropped, as in mergekit.

    Returns:
        (least, greatest); the least alone where none of the largest is dropped; none where density is 1.
    """
    if density == 1:
        return ()
    kept = rank(density, numel)
    outliers = min(int(gamma * numel), numel - kept)
    return (outliers + kept, outliers + 1) if outliers else (kept,)


def breadcrumbs(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], factor: Sequence[float], normalize: bool = False
) -> Tensor:
    """`sum(w_i * f_i * tau_i)` over what is left of each task vector; over `sum(w_i)` with `normalize`.

    Args:
        task_vectors: N of [n] in the compute dtype, with the largest and smallest entries dropped; overwritten.
        weight: N.
        factor: N; what a model's kept entries are multiplied by.
        normalize: whether to divide by the sum of the weights.
    """
    return task_arithmetic(scaled(task_vectors, factor), weight=weight, normalize=normalize)


def _ranks(values: Values, numel: int) -> tuple[Ranks, ...]:
    pairs = zip(values["density"], values["gamma"], strict=True)
    return tuple(breadcrumb_ranks(density, gamma, numel) for density, gamma in pairs)


def _sum_keywords(values: Values, measured: Measured) -> Values:
    return {
        "weight": values["weight"],
        "normalize": values["normalize"],
        "factor": factors(values, measured.l1),
    }


def _ties_keywords(values: Values, measured: Measured) -> Values:
    return {
        "weight": values["weight"],
        "agreement": agreement_of(values, default="sum"),
        "majority": measured.majority,
        "factor": factors(values, measured.l1),
    }


def _ties_needs(values: Values) -> frozenset[Statistic]:
    return norms_to_restore(values) | ({"majority"} if trims_globally(values) else frozenset())


def _review(said: Said) -> Iterator[Remark]:
    yield from review_trim(said, "density", "gamma")
    if all(density == 1 for density in said.values("density")):
        yield Note("density is 1, so nothing is dropped, whatever gamma says (as in mergekit)")


def _review_ties(said: Said) -> Iterator[Remark]:
    yield from agreement_or_normalize(said)
    yield from _review(said)


_BETWEEN = ByMagnitude(_ranks, trims_globally, any_dropped, keep_between)
_PARAMETERS = {
    "weight": WEIGHT,
    "density": Parameter(
        1.0, "share of entries kept, below the largest; 1 drops nothing", per_model=True, low=0, high=1
    ),
    "gamma": Parameter(0.01, "share of entries dropped as outliers, the largest", per_model=True, low=0, high=1),
    "trim": Parameter(
        "tensor",
        "what density and gamma are shares of: each tensor, as published and in mergekit; or the whole model",
        varies=False,
        choices={"global": "global", "tensor": "tensor"},
    ),
    "rescale": RESCALE_TRIMMED,
    "lambda": LAMBDA,
}

METHODS = {
    "breadcrumbs": Method(
        breadcrumbs,
        "The weighted sum of task vectors without their largest and smallest entries (Davari 2024).",
        paper="2312.06795",
        use="task vectors with outliers",
        parameters={**_PARAMETERS, "normalize": NORMALIZE},
        sparsifier=_BETWEEN,
        needs=norms_to_restore,
        keywords=_sum_keywords,
        one_is_itself=whole_and_unweighted,
        plain_sum=lambda values: whole_and_unweighted(values) and not values["normalize"],
        scale="lambda",
        review=_review,
    ),
    "breadcrumbs_ties": Method(
        ties,
        "TIES over task vectors without their largest and smallest entries (Davari 2024; Yadav 2023).",
        paper="2312.06795",
        use="the same, where signs disagree, too",
        parameters={**_PARAMETERS, "agreement": agreement_parameter("the sum"), "normalize": MAYBE_NORMALIZE},
        sparsifier=_BETWEEN,
        needs=_ties_needs,
        keywords=_ties_keywords,
        elect=elect,
        fused=True,
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        review=_review_ties,
    ),
}
