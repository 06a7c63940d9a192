"""TIES (Yadav 2023, arXiv 2306.01708) and consensus (Wang 2024, arXiv 2405.07813): what to do where task vectors
disagree.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from lines_cli.methods.sums import NEGLIGIBLE, scaled, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

Agreement = Literal["mean", "sum", "max"]


def trim(task_vectors: Sequence[Tensor], *, threshold: Sequence[float | None]) -> Sequence[Tensor]:
    """Set to 0 what is smaller in magnitude than the threshold of its model: the trim of TIES (section 4.2, step 1).
    Every entry that lies exactly on the threshold is kept. NaN is larger than all else.

    Args:
        task_vectors: N of [n]; overwritten.
        threshold: N magnitudes in float32, to which those of float64 are rounded; None keeps all, as does no threshold.
    """
    import torch

    for tau, least in zip(task_vectors, threshold, strict=bool(threshold)):
        if not least:
            continue
        if math.isnan(least):  # which is the largest
            tau.masked_fill_(~tau.isnan(), 0)
        elif tau.dtype == torch.float32:
            torch.hardshrink(tau, _before(least), out=tau)  # keeps what is larger than the number before
        else:
            tau.masked_fill_(tau.abs().to(torch.float32) < least, 0)
    return task_vectors


def _before(magnitude: float) -> float:
    """The next smaller float32 of one above 0."""
    (bits,) = struct.unpack("<I", struct.pack("<f", magnitude))
    (before,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    return float(before)


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
    taus = scaled(task_vectors, factor, weight)
    total = weighted_sum(taus, [1.0] * len(taus), overwrite=False)
    elected = (total.ge_(0) if majority > 0 else total.gt_(0)).mul_(2).sub_(1)  # 1.0 and 0.0 to +1 and -1

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
        tau.mul_(agrees)
        if model:
            merged.add_(tau)
        if agreement == "mean":
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


def consensus(
    task_vectors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    mask_lambda: Sequence[float],
    k: float = 2,
    on: Literal["sum", "ties"] = "sum",
    threshold: Sequence[float | None] = (),
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
        threshold: for `on: ties`, of its trim (`trim`).
        majority: for `on: ties`.
    """
    if on == "ties":
        trimmed = trim([tau.clone() for tau in task_vectors], threshold=threshold)
        merged = ties(trimmed, weight=weight, factor=[1.0] * len(trimmed), agreement="sum", majority=majority)
    else:
        merged = weighted_sum(task_vectors, weight, overwrite=False)
    votes = merged.new_zeros(merged.shape)
    for tau, scale in zip(task_vectors, mask_lambda, strict=True):
        others = (merged - tau).abs_().mul_(scale)
        votes.add_(tau.abs_().gt_(others))
    return merged.mul_(votes.ge_(k))
