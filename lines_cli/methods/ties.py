"""TIES (Yadav 2023, arXiv 2306.01708) and consensus (Wang 2024, arXiv 2405.07813): what to do where task vectors
disagree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lines_cli.methods.sums import NEGLIGIBLE, sparse, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Agreement = Literal["mean", "sum", "max"]


def magnitude_masks(task_vectors: Sequence[Tensor], *, threshold: Sequence[float | None]) -> list[Tensor] | None:
    """1 where an entry's magnitude is at least the threshold of its model, else 0: the trim of TIES (section 4.2, step
    1). Every entry that lies exactly on the threshold is kept.

    Args:
        task_vectors: N of [n].
        threshold: N magnitudes in float32; None keeps all. If all are None there are no masks.
    """
    import torch

    if all(magnitude is None for magnitude in threshold):
        return None
    return [
        torch.ones_like(tau) if t is None else tau.abs().to(torch.float32).ge_(t).to(tau.dtype)
        for tau, t in zip(task_vectors, threshold, strict=True)
    ]


def ties(
    task_vectors: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    weight: Sequence[float],
    agreement: Agreement = "mean",
    majority: int = 1,
    factor: Sequence[float] = (),
) -> Tensor:
    """Trim, elect a sign for each entry, merge the models that agree with it (section 4.2).

    Args:
        task_vectors: N of [n]; trimmed by `masks`, then weighted.
        masks: N of [n], 1 where an entry is kept.
        weight: N.
        agreement: over the models whose weighted entry has the elected sign: `sum(w_i tau_i) / sum(w_i)`, the sum
            alone, or the entry of the largest magnitude.
        majority: the sign that an entry takes whose sum is zero; 0 counts as minus, as in the reference code.
        factor: N; what a model's kept entries are multiplied by, before the weights.
    """
    taus = sparse(task_vectors, masks, factor)
    for tau, w in zip(taus, weight, strict=True):
        if w != 1:
            tau.mul_(w)
    total = weighted_sum(taus, [1.0] * len(taus), overwrite=False)
    elected = (total.ge_(0) if majority > 0 else total.gt_(0)).mul_(2).sub_(1)  # 1.0 and 0.0 to +1 and -1

    if agreement == "max":
        # abs_ takes the sign off zeros: which of 0.0 and -0.0 is the maximum depends on where in a chunk they stand.
        largest = taus[0].mul_(elected).clamp_(min=0).abs_()
        for tau in taus[1:]:
            largest = largest.maximum(tau.mul_(elected).clamp_(min=0).abs_())
        return largest.mul_(elected)
    merged = divisor = None
    for tau, w in zip(taus, weight, strict=True):
        agrees = (tau * elected).gt_(0)
        part = tau.mul_(agrees)
        merged = part if merged is None else merged.add_(part)
        if agreement == "mean":
            agrees.mul_(w)
            divisor = agrees if divisor is None else divisor.add_(agrees)
    assert merged is not None
    if divisor is None:
        return merged
    nothing = divisor.abs().lt_(NEGLIGIBLE)  # 1.0 and 0.0; to fill by a mask takes five times as long
    return merged.div_(divisor.mul_(1 - nothing).add_(nothing))


def signs(
    task_vectors: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    weight: Sequence[float],
    factor: Sequence[float] = (),
) -> tuple[Tensor, Tensor]:
    """How elections go, without changing what is given: each entry's sign (-1, 0 or 1; [n]); and a number that is 0 if
    no model that is not zero waits for the decision of a zero sum.
    """
    taus = sparse([tau.clone() for tau in task_vectors], masks, factor)
    taus = [tau.mul_(w) for tau, w in zip(taus, weight, strict=True)]
    elected = weighted_sum(taus, [1.0] * len(taus), overwrite=False).sign_().nan_to_num_()
    undecided = 1 - elected.abs()
    waiting = [(tau.mul_(undecided)).abs_().amax() for tau in taus if tau.numel()]
    return elected, sum(waiting, start=elected.new_zeros(()))


def consensus(
    task_vectors: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    weight: Sequence[float],
    mask_lambda: Sequence[float],
    k: float = 2,
    on: Literal["sum", "ties"] = "sum",
    majority: int = 1,
) -> Tensor:
    """Keep an entry of the merged task vector where at least `k` models' TALL masks agree on it.

    `mask_i = |tau_i| > |tau_merged - tau_i| * mask_lambda_i`, on the task vectors as they are, without weights or trim.

    Args:
        task_vectors: N of [n].
        masks: N of [n]: the trim of the TIES that `on: ties` merges with.
        weight: N, for the merged task vector.
        mask_lambda: N; the smaller, the more a model keeps.
        k: 0 keeps all, more than N nothing.
        on: the merged task vector is the weighted sum, or TIES with agreement by sum.
        majority: for `on: ties`.
    """
    if on == "ties":
        merged = ties(
            [tau.clone() for tau in task_vectors], masks=masks, weight=weight, agreement="sum", majority=majority
        )
    else:
        merged = weighted_sum(task_vectors, weight, overwrite=False)
    votes = merged.new_zeros(merged.shape)
    for tau, scale in zip(task_vectors, mask_lambda, strict=True):
        others = (merged - tau).abs_().mul_(scale)
        votes.add_(tau.abs_().gt_(others))
    return merged.mul_(votes.ge_(k))
