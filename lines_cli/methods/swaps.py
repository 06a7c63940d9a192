"""One model merged into its base, entry by entry: NearSwap where the two are near, Arcee's fusion where they differ in
what matters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.sums import LAMBDA

if TYPE_CHECKING:
    from torch import Tensor

_LEAST = 1e-6  # a smaller difference counts as this, as in mergekit
_NO_ZERO = 1e-8  # is added to probabilities
_AT_ONCE = 2**20


def nearswap(task_vectors: Sequence[Tensor], *, t: float) -> Tensor:
    """`min(t / |tau|, 1) * tau`: an entry no further than t from the base is the model's, any other goes t towards it
    (NearSwap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001).

    Args:
        task_vectors: one of [n]; overwritten.
        t: how far.
    """
    (tau,) = task_vectors
    share = tau.abs().clamp_(min=_LEAST).reciprocal_().mul_(t).clamp_(0, 1)
    return tau.mul_(share)


def arcee_fusion(task_vectors: Sequence[Tensor], *, base: Tensor) -> Tensor:
    """The task vector where its importance is at least `median + 1.5 * (q3 - q1)` of the tensor's, else 0 (Arcee
    Fusion, https://arcee.ai). The importance of an entry is its magnitude times the divergence of its row, along the
    last axis: `KL(softmax(row of the model) || softmax(row of the base))`.

    Quartiles are those of all entries: the values at place `int(q * (n - 1))` in their order. Probabilities and
    divergences are taken in float64, and 1e-8 is added to each probability.

    Args:
        task_vectors: one of a tensor's shape; overwritten.
        base: the same.
    """
    (tau,) = task_vectors
    if not tau.numel():
        return tau
    rows = tau.view(1, -1) if tau.ndim < 2 else tau.flatten(0, -2)
    of_base = base.reshape(rows.shape)
    importance = rows.abs()
    at_once = max(1, _AT_ONCE // max(rows.shape[1], 1))
    for first in range(0, len(rows), at_once):
        before = of_base[first : first + at_once].double()
        after = (of_base[first : first + at_once] + rows[first : first + at_once]).double()
        p, q = (values.softmax(-1).add_(_NO_ZERO) for values in (after, before))
        divergence = (p * (p / q).log_()).sum(-1, keepdim=True)
        importance[first : first + at_once].mul_(divergence.to(rows.dtype))
    flat = importance.view(-1)
    last = len(flat) - 1
    first_q, median, third_q = (flat.kthvalue(int(quarter * last) + 1).values for quarter in (0.25, 0.5, 0.75))
    bound = median + 1.5 * (third_q - first_q)
    return tau.mul_(importance.ge_(bound).view(tau.shape))


def _workspace(shape: Sequence[int]) -> int:
    """Importances, and a copy of them with its indices; and some rows in float64."""
    return math.prod(shape) * (8 + 8 + 8) + 6 * 8 * max(_AT_ONCE, shape[-1] if shape else 1)


_IDLE = frozenset({"int8_mask", "embed_slerp", "normalize", "rescale", "weight", "density"})

METHODS = {
    "nearswap": Method(
        nearswap,
        "The model's entry where it is near the base's, else a step towards it (NearSwap).",
        use="one model of which only small changes are wanted",
        parameters={
            "t": Parameter(None, "how near is near, and how far the step", low=0, required=True),
            "lambda": LAMBDA,
        },
        models=(1, 1),
        keywords=lambda values, _: {"t": values["t"]},
        scale="lambda",
        ignored=_IDLE,
    ),
    "arcee_fusion": Method(
        arcee_fusion,
        "The model's entry where it differs from the base's in what matters (Arcee Fusion).",
        use="one model of which only what matters most is wanted",
        sees="tensors",
        given_base=True,
        parameters={"lambda": LAMBDA},
        models=(1, 1),
        keywords=lambda *_: {},
        scale="lambda",
        ignored=_IDLE,
        workspace=_workspace,
    ),
}
