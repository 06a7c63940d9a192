"""TIES (Yadav 2023, arXiv 2306.01708): where task vectors disagree in sign, merge those that agree with most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from lines_cli.methods import fused
from lines_cli.methods.method import Measured, Method, Statistic
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Conflict, Remark, Said, Values
from lines_cli.methods.sparsify import (
    DENSITY,
    LARGEST,
    RESCALE_TRIMMED,
    TRIM,
    factors,
    norms_to_restore,
    review_trim,
    trims_globally,
)
from lines_cli.methods.sums import LAMBDA, NEGLIGIBLE, ON_OFF, WEIGHT, scaled, weighted_sum, whole_and_unweighted

if TYPE_CHECKING:
    from torch import Tensor

Agreement = Literal["mean", "sum", "max"]


def ties(
    task_vectors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    agreement: Agreement = "mean",
    majority: int = 1,
    factor: Sequence[float],
) -> Tensor:
    """Elect a sign for each entry, merge the models that agree with it (section 4.2, steps 2 and 3).

    Args:
        task_vectors: N of [n], trimmed.
        weight: N.
        agreement: over the models whose weighted entry has the elected sign: `sum(w_i tau_i) / sum(w_i)`, the sum
            alone, or the entry of the largest magnitude.
        majority: the sign that an entry takes whose sum is zero; 0 counts as minus, as in the reference code.
        factor: N; what a model's kept entries are multiplied by, before the weights.
    """
    import torch

    if (merged := fused.ties(task_vectors, factor, weight, agreement, plus=majority > 0)) is not None:
        return merged
    taus = scaled(task_vectors, factor, weight)
    total = weighted_sum(taus, [1.0] * len(taus), overwrite=False)
    positive = total.ge_(0) if majority > 0 else total.gt_(0)
    elected = torch.rsub(positive, -1, alpha=-2)  # 1.0 and 0.0 to +1 and -1

    if agreement == "max":
        # abs_ takes the sign off zeros: which of 0.0 and -0.0 is the maximum depends on where in a chunk they stand.
        largest = taus[0].mul_(elected).clamp_(min=0).abs_()
        for tau in taus[1:]:
            largest = largest.maximum(tau.mul_(elected).clamp_(min=0).abs_())
        return largest.mul_(elected)
    merged = taus[0]
    divisor = None
    for model, (tau, w) in enumerate(zip(taus, weight, strict=True)):
        agrees = (tau * elected).gt_(0)  # 1.0 and 0.0
        if model:
            merged.addcmul_(tau, agrees)  # the product is exact, so this rounds once, as two steps would
        else:
            merged.mul_(agrees)
        if agreement == "mean":
            if w != 1:
                agrees.mul_(w)
            divisor = agrees if divisor is None else divisor.add_(agrees)
    if divisor is None:
        return merged
    if min(weight) >= NEGLIGIBLE:  # then it is 0, where nothing is merged, or at least that
        return merged.div_(divisor.clamp_(min=min(weight)))
    nothing = divisor.abs().lt_(NEGLIGIBLE)  # 1.0 and 0.0; to fill by a mask takes five times as long
    return merged.div_(divisor.mul_(1 - nothing).add_(nothing))


def signs(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], factor: Sequence[float] = (), waiting: bool = False
) -> tuple[Tensor, bool]:
    """How elections go: each entry's sign (-1, 0 or 1; [n]); and, if that is asked (`waiting`), whether a model that is
    not zero waits for the decision of a zero sum.

    Args:
        task_vectors: N of [n], trimmed; left as they are.
        weight, factor: as `ties` has them.
        waiting: whether to look for such models.
    """
    taus = [
        tau if by == 1 else tau * by for tau, by in zip(task_vectors, factor or [1.0] * len(task_vectors), strict=True)
    ]
    taus = [tau if by == 1 else tau * by for tau, by in zip(taus, weight, strict=True)]
    elected = weighted_sum(taus, [1.0] * len(taus), overwrite=False).sign_().nan_to_num_()
    if not waiting:
        return elected, False
    undecided = 1 - elected.abs()
    return elected, any(bool((tau * undecided).count_nonzero()) for tau in taus)


def agreement_parameter(unless_said: str) -> Parameter:
    """What is made of the models that agree."""
    return Parameter(
        None,
        f"over the models that agree with the sign: their weighted mean, their sum, or the largest; {unless_said} "
        "unless said",
        varies=False,
        choices={"mean": "mean", "sum": "sum", "max": "max"},
    )


MAYBE_NORMALIZE = Parameter(None, "true is agreement: mean, false is agreement: sum", varies=False, choices=ON_OFF)


def agreement_of(values: Values, *, default: str) -> str:
    """What `agreement`, or else `normalize`, says."""
    if values["agreement"] is not None:
        return str(values["agreement"])
    return default if values["normalize"] is None else ("mean" if values["normalize"] else "sum")


def agreement_or_normalize(said: Said) -> Iterator[Remark]:
    """The two say one thing, and must not differ in it."""
    (agreement, *_), (normalize, *_) = said.values("agreement"), said.values("normalize")
    if agreement is not None and normalize is not None and (agreement == "mean") != normalize:
        yield Conflict(
            f"agreement: {agreement} and normalize: {str(normalize).lower()} contradict each other; leave normalize out"
        )


def elect(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], factor: Sequence[float], waiting: bool, **_: object
) -> tuple[Tensor, bool]:
    """`signs`, given the keywords of `ties`; of a kernel only their sum."""
    import torch

    if (found := fused.signs(task_vectors, factor=factor, weight=weight, waiting=waiting)) is not None:
        balance, waits = found
        return task_vectors[0].new_tensor(balance, dtype=torch.float64), waits
    return signs(task_vectors, weight=weight, factor=factor, waiting=waiting)


def _keywords(values: Values, measured: Measured) -> Values:
    return {
        "weight": values["weight"],
        "agreement": agreement_of(values, default="mean"),
        "majority": measured.majority,
        "factor": factors(values, measured.l1),
    }


def _needs(values: Values) -> frozenset[Statistic]:
    return norms_to_restore(values) | ({"majority"} if trims_globally(values) else frozenset())


_DEFAULT = "trims over the whole model, as published; mergekit trims each tensor (trim: tensor)"


def _review(said: Said) -> Iterator[Remark]:
    yield from agreement_or_normalize(said)
    yield from review_trim(said, "density", default=_DEFAULT)


METHODS = {
    "ties": Method(
        ties,
        "Trim, elect signs, merge what agrees (TIES, Yadav 2023).",
        paper="2306.01708",
        use="tasks that pull single weights in opposite directions",
        parameters={
            "weight": WEIGHT,
            "density": DENSITY,
            "trim": TRIM,
            "rescale": RESCALE_TRIMMED,
            "agreement": agreement_parameter("the mean"),
            "normalize": MAYBE_NORMALIZE,
            "lambda": LAMBDA,
        },
        sparsifier=LARGEST,
        needs=_needs,
        keywords=_keywords,
        elect=elect,
        fused=True,
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        review=_review,
    ),
}
