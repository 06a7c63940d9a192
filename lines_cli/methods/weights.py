"""Methods on whole weights, which need no base: linear, SLERP, passthrough.

Functions on a run of entries, as those in `sums`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from lines_cli.methods.angles import pairs
from lines_cli.methods.method import Chosen, Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Values
from lines_cli.methods.sums import (
    NEGLIGIBLE,
    NORMALIZE,
    ON_OFF,
    WEIGHT,
    all_are_1,
    divided,
    shares_of_sum,
    weighted_sum,
)

if TYPE_CHECKING:
    from torch import Tensor


def linear(weights: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = True) -> Tensor:
    """`sum(w_i * theta_i) / sum(w_i)`: the weighted average of whole weights, without a base; the sum alone unless
    `normalize`.
    """
    return divided(weighted_sum(weights, weight), weight, normalize=normalize)


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


def _shares(values: Values, models: int) -> tuple[float, ...] | None:
    """Those of the weighted sum, where they are 1 together: else the base is multiplied, too."""
    shares = shares_of_sum(values, models)
    return shares if shares is not None and abs(sum(shares) - 1) < NEGLIGIBLE else None


def _between(values: Values, measured: Measured) -> Values:
    first, dot, second = measured.sums or (0.0, 0.0, 0.0)
    return {"shares": slerp_shares(values["t"], dot=dot, norms=(first**0.5, second**0.5))}


def _base_first(models: Sequence[str], base: str | None, _subtracted: bool) -> Chosen:
    """As in mergekit, the base is the first of the two, where it is one of them, or the only other there is."""
    own: Chosen = tuple(number for number, model in enumerate(models) if model == base)
    others = tuple(number for number, model in enumerate(models) if model != base)
    if not own and len(others) == 1 and base is not None:
        own = (None,)
    return own + others


METHODS = {
    "linear": Method(
        linear,
        "The weighted average of whole weights.",
        paper="2203.05482",
        use="fine-tunes of one task, or checkpoints of one run, without a base",
        takes="weights",
        parameters={
            "weight": replace(WEIGHT, rules=()),  # whole weights are all of about one norm
            "normalize": Parameter(True, NORMALIZE.about, varies=False, choices=ON_OFF),
        },
        one_is_itself=lambda values: all_are_1(values, "weight"),
        shares=_shares,
    ),
    "slerp": Method(
        slerp,
        "The way from one model to another along an arc (Shoemake 1985).",
        use="two models, half way or in between",
        takes="weights",
        parameters={
            "t": Parameter(
                None,
                "how far from the first (0; the base, if it is one of the two) to the second (1)",
                low=0,
                high=1,
                required=True,
            )
        },
        models=(2, 2),
        needs=lambda _: frozenset({"sums"}),
        sums=pairs,
        keywords=_between,
        choose=_base_first,
    ),
    "passthrough": Method(
        passthrough,
        "One model as it is, or times a scale.",
        use="one model that is only stored anew",
        takes="weights",
        parameters={"scale": Parameter(None, "of the weights", per_model=True)},
        models=(1, 1),
        one_is_itself=lambda values: values["scale"] in ((None,), (1.0,)),
    ),
}
