"""Model stock (Jang 2024, arXiv 2403.19522): how far from the base towards the average of the fine-tunes, by the angles
between their task vectors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

from lines_cli.methods.angles import Gram, gram, pairs
from lines_cli.methods.method import Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Values
from lines_cli.methods.sums import LAMBDA, ON_OFF, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-6  # two lengths' product below this counts as this, as in mergekit
_SINGULAR = 1e-6


def model_stock(task_vectors: Sequence[Tensor], *, ratio: float | None = None) -> Tensor:
    """`t * mean(tau_i)` with `t = N * cos / (1 + (N - 1) * cos)`, cos the mean cosine of two task vectors (section 4).

    Args:
        task_vectors: N of [n]; without a ratio, N of a tensor's shape. Overwritten.
        ratio: t of the whole tensor (`stock_ratio`); None for one of each row, along the last axis.
    """
    number = len(task_vectors)
    if ratio is not None:
        return weighted_sum(task_vectors, [1.0] * number).mul_(ratio / number)
    import torch

    shape = task_vectors[0].shape
    rows = [tau.view(1, -1) if tau.ndim < 2 else tau for tau in task_vectors]
    lengths = [torch.linalg.vector_norm(tau, dim=-1, dtype=torch.float64) for tau in rows]
    total = torch.zeros_like(lengths[0])
    for a, b in combinations(range(number), 2):
        dot = (rows[a].double() * rows[b].double()).sum(-1)
        total += (dot / (lengths[a] * lengths[b]).clamp_(min=_SHORTEST)).clamp_(-1, 1)
    cosine = total / math.comb(number, 2)
    divisor = 1 + (number - 1) * cosine
    singular = divisor.abs() < _SINGULAR
    ratios = (number * cosine / divisor.masked_fill_(singular, 1)).masked_fill_(singular, 0)
    merged = weighted_sum(rows, [1.0] * number)
    return merged.mul_((ratios / number).unsqueeze(-1).to(merged.dtype)).view(shape)


def stock_ratio(products: Gram) -> float:
    """t, from the dot products of N task vectors; 0 where they pull apart so far that there is none."""
    lengths = [max(products[n][n], 0.0) ** 0.5 for n in range(len(products))]
    cosines = [
        max(-1.0, min(1.0, products[a][b] / max(lengths[a] * lengths[b], _SHORTEST)))
        for a, b in combinations(range(len(products)), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (len(products) - 1) * cosine
    return 0.0 if abs(divisor) < _SINGULAR else len(products) * cosine / divisor


def _keywords(values: Values, measured: Measured) -> dict[str, Any]:
    if values["filter_wise"]:
        return {}
    models = round(((8 * len(measured.sums) + 1) ** 0.5 - 1) / 2)
    return {"ratio": stock_ratio(gram(measured.sums, max(models, 2)))}


METHODS = {
    "model_stock": Method(
        model_stock,
        "The average of the fine-tunes, as near to the base as the angles between them say (Jang 2024).",
        paper="2403.19522",
        use="few fine-tunes of one task, two suffice",
        sees="tensors",
        streams=lambda values: not values["filter_wise"],
        parameters={
            "filter_wise": Parameter(
                False, "measure angles by rows, in place of whole tensors", varies=False, choices=ON_OFF
            ),
            "lambda": LAMBDA,
        },
        models=(2, None),
        needs=lambda values: frozenset(() if values["filter_wise"] else {"sums"}),
        sums=pairs,
        keywords=_keywords,
        scale="lambda",
        ignored=frozenset({"int8_mask", "embed_slerp", "normalize", "rescale", "weight", "density"}),
        workspace=lambda shape: 3 * 8 * math.prod(shape),
    )
}
