"""Consensus merging with TALL masks (Wang 2024, arXiv 2405.07813): keep what matters to several models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from lines_cli.methods import fused
from lines_cli.methods.method import Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Conflict, Note, Remark, Said, Values
from lines_cli.methods.sparsify import (
    DENSITY,
    TRIM,
    Bounds,
    ByMagnitude,
    any_dropped,
    keep_between,
    largest,
    review_trim,
    trims_globally,
)
from lines_cli.methods.sums import LAMBDA, WEIGHT, weighted_sum
from lines_cli.methods.ties import elect as elect_by_ties
from lines_cli.methods.ties import ties

if TYPE_CHECKING:
    from torch import Tensor


def consensus(
    task_vectors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    mask_lambda: Sequence[float],
    k: float = 2,
    on: Literal["sum", "ties"] = "sum",
    bounds: Sequence[Bounds] = (),
    majority: int = 1,
) -> Tensor:
    """Keep an entry of the merged task vector where at least `k` models' TALL masks agree on it.

    `mask_i = |tau_i| > |tau_merged - tau_i| * mask_lambda_i`, on the task vectors as they are, without weights or trim.

    Args:
        task_vectors: N of [n].
        weight: N, for the merged task vector.
        mask_lambda: N; the smaller, the more a model keeps.
        k: 0 keeps all, more than N nothing.
        on: the merged task vector is the weighted sum, or TIES with agreement by sum.
        bounds: for `on: ties`, of its trim (`keep_between`).
        majority: for `on: ties`.
    """
    if on == "ties":
        trimmed = keep_between([tau.clone() for tau in task_vectors], bounds)
        merged = ties(trimmed, weight=weight, factor=[1.0] * len(trimmed), agreement="sum", majority=majority)
    else:
        merged = weighted_sum(task_vectors, weight, overwrite=False)
    if fused.votes(merged, task_vectors, scale=mask_lambda, k=k):
        return merged
    votes = None
    for tau, scale in zip(task_vectors, mask_lambda, strict=True):
        others = (merged - tau).abs_().mul_(scale)
        agrees = tau.abs_().gt_(others)  # 1.0 and 0.0
        votes = agrees if votes is None else votes.add_(agrees)
    assert votes is not None
    return merged.mul_(votes.ge_(k))


def elect(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], bounds: Sequence[Bounds], waiting: bool, **_: object
) -> tuple[Tensor, bool]:
    """The signs of the TIES that is masked."""
    trimmed = keep_between([tau.clone() for tau in task_vectors], bounds)
    return elect_by_ties(trimmed, weight=weight, factor=[1.0] * len(trimmed), waiting=waiting)


def _keywords(values: Values, measured: Measured) -> Values:
    keywords = {key: values[key] for key in ("weight", "mask_lambda", "k", "on")}
    return {**keywords, "bounds": measured.bounds, "majority": measured.majority}


def _review(said: Said) -> Iterator[Remark]:
    if said.values("on")[0] == "sum" and any(density != 1 for density in said.values("density")):
        yield Conflict("density is used with on: ties; with on: sum nothing is trimmed")
    yield from review_trim(said, "density")
    if said.first["k"] > said.models:
        there = "is 1" if said.models == 1 else f"are {said.models}"
        yield Note(
            f"k: {said.first['k']:g} masks have to agree, and there {there}: no entry is kept, which gives the base"
        )


METHODS = {
    "consensus": Method(
        consensus,
        "Keep what several models' TALL masks select (consensus merging, Wang 2024).",
        paper="2405.07813",
        use="many tasks, of which each changes what others do not need",
        parameters={
            "weight": WEIGHT,
            "mask_lambda": Parameter(0.4, "of a model's TALL mask; smaller keeps more", per_model=True, low=0),
            "k": Parameter(2.0, "how many masks have to agree", varies=False, low=0, whole=True),
            "on": Parameter(
                "sum",
                "what is masked: the weighted sum, or TIES by sum",
                varies=False,
                choices={"sum": "sum", "ties": "ties"},
            ),
            "density": DENSITY,
            "trim": TRIM,
            "lambda": LAMBDA,
        },
        # The masks are of whole task vectors: the function trims what it merges.
        sparsifier=ByMagnitude(largest, trims_globally, any_dropped, apply=None),
        needs=lambda values: frozenset({"majority"} if values["on"] == "ties" and trims_globally(values) else ()),
        keywords=_keywords,
        elect=elect,
        fused=True,
        scale="lambda",
        review=_review,
    ),
}
