"""DARE (Yu 2024, arXiv 2311.03099): drop entries at random (`sparsify.random_masks`), rescale the rest, merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Measured, Method
from lines_cli.methods.said import Note, Remark, Said, Values
from lines_cli.methods.sparsify import DENSITY, RESCALE, SEED, SEEDED, factors, norms_to_restore
from lines_cli.methods.sums import LAMBDA, NORMALIZE, WEIGHT, scaled, task_arithmetic, whole_and_unweighted
from lines_cli.methods.ties import (
    MAYBE_NORMALIZE,
    Agreement,
    agreement_of,
    agreement_or_normalize,
    agreement_parameter,
    ties,
)

if TYPE_CHECKING:
    from torch import Tensor


def dare_linear(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], factor: Sequence[float], normalize: bool = False
) -> Tensor:
    """Task arithmetic over what is left of each task vector, rescaled by its `factor`."""
    return task_arithmetic(scaled(task_vectors, factor), weight=weight, normalize=normalize)


def dare_ties(
    task_vectors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    factor: Sequence[float],
    agreement: Agreement = "sum",
) -> Tensor:
    """TIES over what is left of each task vector, rescaled by its `factor`; a zero sum counts as plus."""
    return ties(task_vectors, weight=weight, factor=factor, agreement=agreement)


def _linear_keywords(values: Values, measured: Measured) -> Values:
    return {**{key: values[key] for key in ("weight", "normalize")}, "factor": factors(values, measured.l1)}


def _ties_keywords(values: Values, measured: Measured) -> Values:
    agreement = agreement_of(values, default="sum")
    return {"weight": values["weight"], "agreement": agreement, "factor": factors(values, measured.l1)}


def _review(said: Said) -> Iterator[Remark]:
    if "rescale" not in said.top and any(density != 1 for density in said.values("density")):
        yield Note("multiplies what is kept by 1/density, as published; mergekit restores the L1 norm (rescale: l1)")


def _review_ties(said: Said) -> Iterator[Remark]:
    yield from agreement_or_normalize(said)
    yield from _review(said)


_PARAMETERS = {"weight": WEIGHT, "density": DENSITY, "lambda": LAMBDA, "rescale": RESCALE, "seed": SEED}

METHODS = {
    "dare_linear": Method(
        dare_linear,
        "Task arithmetic over randomly dropped and rescaled task vectors (DARE, Yu 2024).",
        paper="2311.03099",
        use="fine-tunes that moved little, such as those by instructions",
        parameters={**_PARAMETERS, "normalize": NORMALIZE},
        sparsifier=SEEDED,
        needs=norms_to_restore,
        keywords=_linear_keywords,
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        review=_review,
    ),
    "dare_ties": Method(
        dare_ties,
        "TIES over randomly dropped and rescaled task vectors (DARE, Yu 2024).",
        paper="2311.03099",
        use="the same, where signs disagree, too",
        parameters={**_PARAMETERS, "agreement": agreement_parameter("the sum"), "normalize": MAYBE_NORMALIZE},
        sparsifier=SEEDED,
        needs=norms_to_restore,
        keywords=_ties_keywords,
        fused=True,
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        review=_review_ties,
    ),
}
