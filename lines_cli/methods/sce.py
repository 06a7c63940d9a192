"""SCE (Wan 2024, arXiv 2408.07990): select the entries that vary most between models, weight each model by how much it
changed, erase what is against the elected sign.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lines_cli.methods.method import Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Values
from lines_cli.methods.sums import LAMBDA, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_NOTHING = 1e-6  # a sum of mean squares below this says nothing, and a divisor is at least this, as in mergekit
_AT_ONCE = 2**20


def sce(task_vectors: Sequence[Tensor], *, select_topk: float = 1.0, weight: Sequence[float] | None = None) -> Tensor:
    """`sum(w_i * tau_i) / sum(w_i)` over the models whose entry has the sign of `sum(tau_i)`, w_i the share of model
    i's mean square; of the entries whose variance between models is among the largest.

    Args:
        task_vectors: N of [n]; with `select_topk` below 1, of a tensor's shape. Overwritten.
        select_topk: the share of the entries with any variance that is merged: `int(share * count)`, and those that
            share the last place; the others stay as in the base.
        weight: N, from `sce_weights`; measured here where entries are selected.
    """
    flat = [tau.view(-1) for tau in task_vectors]
    if select_topk < 1:
        _select(flat, select_topk)
    if weight is None:
        import torch

        squares = [float(torch.linalg.vector_norm(tau, dtype=torch.float64)) ** 2 for tau in flat]
        weight = sce_weights(squares, flat[0].numel())
    for first in range(0, len(flat[0]), _AT_ONCE):
        _merge([tau[first : first + _AT_ONCE] for tau in flat], weight)
    return task_vectors[0]


def _merge(task_vectors: Sequence[Tensor], weight: Sequence[float]) -> None:
    """Merge runs of entries into the first."""
    total = weighted_sum(task_vectors, [1.0] * len(task_vectors), overwrite=False)
    elected = total.ge_(0).mul_(2).sub_(1)  # 1.0 and 0.0 to +1 and -1
    divisor = elected.new_zeros(elected.shape)
    merged = task_vectors[0]
    for model, (tau, w) in enumerate(zip(task_vectors, weight, strict=True)):
        agrees = (tau * elected).gt_(0).mul_(w)  # w and 0.0
        divisor.add_(agrees)
        tau.mul_(agrees)
        if model:
            merged.add_(tau)
    merged.div_(divisor.clamp_(min=_NOTHING))


def _select(task_vectors: Sequence[Tensor], share: float) -> None:
    """Set to 0 all but the entries with the largest variances."""
    import torch

    variance = torch.empty_like(task_vectors[0])
    for first in range(0, len(variance), _AT_ONCE):
        here = torch.stack([tau[first : first + _AT_ONCE] for tau in task_vectors])
        variance[first : first + _AT_ONCE] = here.var(0, unbiased=False)
    kept = int(int(variance.count_nonzero()) * share)
    if kept:
        least = variance.kthvalue(len(variance) - kept + 1).values
        selected = variance.ge_(least)  # 1.0 and 0.0
    else:
        selected = variance.zero_()
    for tau in task_vectors:
        tau.mul_(selected)


def sce_weights(squares: Sequence[float], numel: int) -> tuple[float, ...]:
    """Each model's share of all mean squares; the same for all where these are next to nothing.

    Args:
        squares: for each model, the sum over its entries.
        numel: of how many.
    """
    means = [square / numel if numel else 0.0 for square in squares]
    total = sum(means)
    return (1 / len(means),) * len(means) if total < _NOTHING else tuple(mean / total for mean in means)


def _squares(task_vectors: Sequence[Tensor], _: Values) -> Iterator[Tensor]:
    for tau in task_vectors:
        yield tau.double().square_()
    yield task_vectors[0].new_ones(task_vectors[0].shape)  # how many there are


def _keywords(values: Values, measured: Measured) -> dict[str, Any]:
    if not _all_selected(values):
        return {"select_topk": values["select_topk"]}
    *squares, numel = measured.sums or (0.0, 0.0)
    return {"weight": sce_weights(squares, int(numel))}


def _all_selected(values: Values) -> bool:
    return bool(values["select_topk"] >= 1)


def _workspace(shape: Sequence[int]) -> int:
    """Variances; a copy of them with its indices, while the bound is looked for; and runs of entries."""
    return math.prod(shape) * (8 + 8 + 8) + 64 * _AT_ONCE


METHODS = {
    "sce": Method(
        sce,
        "The entries that vary most, weighted by how much each model changed, by elected sign (SCE, Wan 2024).",
        paper="2408.07990",
        use="models of different strength, weighted by what they changed",
        sees="tensors",
        streams=_all_selected,
        parameters={
            "select_topk": Parameter(
                1.0, "share of entries merged, of those that vary between models the ones that vary most", low=0, high=1
            ),
            "lambda": LAMBDA,
        },
        needs=lambda values: frozenset({"sums"} if _all_selected(values) else ()),
        sums=_squares,
        keywords=_keywords,
        one_is_itself=_all_selected,
        scale="lambda",
        ignored=frozenset({"int8_mask", "embed_slerp", "normalize", "rescale", "weight", "density"}),
        workspace=_workspace,
    )
}
