"""Reinforced agent merging (RAM, arXiv 2601.13572): an entry that several models changed is averaged over these; one
that a single model changed is kept, or boosted (RAM+).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lines_cli.methods.method import Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Values
from lines_cli.methods.sums import LAMBDA

if TYPE_CHECKING:
    from torch import Tensor


def ram(task_vectors: Sequence[Tensor], *, epsilon: float = 1e-5, boost: Sequence[float] = ()) -> Tensor:
    """`sum(tau_i) / count` over the models that changed an entry, by more than `epsilon`; times `boost_i` where that is
    one alone.

    Args:
        task_vectors: N of [n]; overwritten.
        epsilon: what counts as a change.
        boost: N; none for 1.
    """
    changed = [tau.abs().gt_(epsilon) for tau in task_vectors]  # 1.0 and 0.0
    count = changed[0].clone()
    for mask in changed[1:]:
        count.add_(mask)
    total = None
    for model, (tau, mask) in enumerate(zip(task_vectors, changed, strict=True)):
        if boost and boost[model] != 1:
            mask.mul_(count.eq(1).to(mask.dtype).mul_(boost[model] - 1).add_(1))
        tau.mul_(mask)
        total = tau if total is None else total.add_(tau)
    assert total is not None
    return total.div_(count.clamp_(min=1))


def ramplus_tl(task_vectors: Sequence[Tensor], *, epsilon: float = 1e-5, boost: Sequence[float] = ()) -> Tensor:
    """RAM with what a model alone changed times `1 + r * min(shared / unique, alpha)`, which counts the entries of the
    tensor that it changed with others and alone (RAM+, tensor by tensor, as mergekit has it).

    Args:
        task_vectors, epsilon, boost: as `ram` has them.
    """
    return ram(task_vectors, epsilon=epsilon, boost=boost)


def _counts(task_vectors: Sequence[Tensor], values: Values) -> Iterator[Tensor]:
    """For each model the entries that it changed with others, and those that it changed alone."""
    changed = [tau.abs().gt_(values["epsilon"]) for tau in task_vectors]
    count = changed[0].clone()
    for mask in changed[1:]:
        count.add_(mask)
    alone = count.eq(1)
    for mask in changed:
        yield mask * ~alone
        yield mask * alone


def _boosts(values: Values, measured: Measured) -> dict[str, Any]:
    shared, unique = measured.sums[::2], measured.sums[1::2]
    boost = tuple(
        1 + values["r"] * min(max(both / max(own, values["epsilon"]), 0.0), values["alpha"])
        for both, own in zip(shared, unique, strict=True)
    )
    return {"epsilon": values["epsilon"], "boost": boost}


_EPSILON = Parameter(1e-5, "a larger difference from the base counts as a change", low=0)
_IDLE = frozenset({"int8_mask", "embed_slerp", "normalize", "rescale", "weight", "density"})

METHODS = {
    "ram": Method(
        ram,
        "The average over the models that changed an entry (RAM, arXiv 2601.13572).",
        paper="2601.13572",
        use="agents trained by reinforcement, each of which changed few entries",
        parameters={"epsilon": _EPSILON, "lambda": LAMBDA},
        keywords=lambda values, _: {"epsilon": values["epsilon"]},
        scale="lambda",
        ignored=_IDLE,
        temporaries=10,
    ),
    "ramplus_tl": Method(
        ramplus_tl,
        "The same, with what a model alone changed boosted (RAM+, arXiv 2601.13572).",
        paper="2601.13572",
        use="the same, where what one alone changed is to stand out",
        parameters={
            "r": Parameter(0.1, "how much what a model alone changed is boosted", low=0),
            "alpha": Parameter(0.2, "the most that r is multiplied by", low=0),
            "epsilon": _EPSILON,
            "lambda": LAMBDA,
        },
        needs=lambda _: frozenset({"sums"}),
        sums=_counts,
        keywords=_boosts,
        scale="lambda",
        ignored=_IDLE,
        temporaries=10,
    ),
}
