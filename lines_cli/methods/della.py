"""DELLA (Deep 2024, arXiv 2406.11617): drop entries at random, small ones of a row more often than large ones; rescale
what is left, and merge it by TIES or by sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.method import Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Remark, Said, Values
from lines_cli.methods.sparsify import DENSITY, RNG_BLOCK, SEED, Drawn, Where, random_numbers
from lines_cli.methods.sums import LAMBDA, NORMALIZE, WEIGHT, task_arithmetic, whole_and_unweighted
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

_AT_ONCE = 2**20  # entries whose ranks are looked at together, or one row
_NO_NORM = 1e-7  # a norm below this is not divided by, as in mergekit


def probabilities(rows: Tensor, density: float, epsilon: float) -> Tensor:
    """How likely each entry is kept: `density - epsilon` for the smallest magnitude of a row to `density + epsilon` for
    the largest, in equal steps of rank. Of equal magnitudes the first has the lower rank. [rows, n], in float64.
    """
    import torch

    length = rows.shape[1]
    order = rows.abs().argsort(dim=1, stable=True)
    ranks = torch.empty_like(order)
    ranks.scatter_(1, order, torch.arange(length, device=rows.device).expand_as(order))
    share = ranks.double().div_(length - 1) if length > 1 else ranks.double().fill_(0.5)
    return share.mul_(2 * epsilon).add_(density - epsilon)


def rows_of(tensor: Tensor) -> Tensor:
    """The rows within which entries are ranked: a vector is one; a batch of matrices, as fused experts are, has those
    of all of them; of more axes all but the first make a row.
    """
    if tensor.ndim < 2:
        return tensor.reshape(1, -1)
    return tensor.flatten(0, -2) if tensor.ndim < 4 else tensor.flatten(1)


def _masks(task_vectors: Sequence[Tensor], values: Values, where: Where) -> Iterator[Tensor | None]:
    for model, (tau, density, epsilon) in enumerate(
        zip(task_vectors, values["density"], values["epsilon"], strict=True)
    ):
        yield magprune(
            tau, density, epsilon, rescale=values["rescale"], seed=int(values["seed"]), model=model, where=where
        )


def magprune(
    task_vector: Tensor, density: float, epsilon: float, *, rescale: str | bool, seed: int, model: int, where: Where
) -> Tensor | None:
    """What each entry of one task vector is multiplied by: 0 where it is dropped (section 3, step 1).

    What is drawn depends on the seed, the model's place in the recipe, the tensor's name and the entry's place in it,
    as in DARE (`sparsify.random_masks`).

    Args:
        task_vector: of a tensor's shape.
        density: 1 keeps all, 0 nothing.
        epsilon: how far probabilities go from it to both sides.
        rescale: kept entries stay (False), are divided by their probability (`density`), or restore the tensor's L1
            norm (`l1`).
        seed, model: of the draws.
        where: which entries these are.
    """
    import torch

    if density >= 1:
        return None
    mask = torch.zeros_like(task_vector)
    if density <= 0 or not task_vector.numel():
        return mask
    rows, flat = rows_of(task_vector), mask.view(-1)
    length = rows.shape[1]
    at_once = max(1, _AT_ONCE // max(length, 1))
    for first in range(0, len(rows), at_once):
        likely = probabilities(rows[first : first + at_once], density, epsilon).view(-1)
        done = 0
        while done < len(likely):
            block, skip = divmod(where.first + first * length + done, RNG_BLOCK)
            drawn, rest = random_numbers(f"{seed}\0{model}\0{block}\0{where.tensor}")
            drawn = drawn[skip : skip + len(likely) - done].to(likely.device)
            part = likely[done : done + len(drawn)]
            # One of 2**16 numbers: whether the number after the last that keeps is rounded up, the block's rest says.
            kept = drawn < torch.floor(part * 2**16 + rest / 2**32).sub_(2**15)
            into = flat[first * length + done : first * length + done + len(drawn)]
            into.copy_(kept / part if rescale == "density" else kept)
            done += len(drawn)
    if rescale == "l1":
        before = float(torch.linalg.vector_norm(task_vector, 1, dtype=torch.float64))
        after = float(torch.linalg.vector_norm(task_vector * mask, 1, dtype=torch.float64))
        if before >= _NO_NORM and after >= _NO_NORM:
            mask.mul_(before / after)
    return mask


def della(task_vectors: Sequence[Tensor], *, weight: Sequence[float], agreement: Agreement = "mean") -> Tensor:
    """TIES over what is left of each task vector; a zero sum counts as plus.

    Args:
        task_vectors: N of a tensor's shape, with entries dropped and rescaled (`magprune`); overwritten.
        weight: N.
        agreement: what is made of the models that agree with the sign.
    """
    return ties(task_vectors, weight=weight, factor=[1.0] * len(task_vectors), agreement=agreement)


def della_linear(task_vectors: Sequence[Tensor], *, weight: Sequence[float], normalize: bool = False) -> Tensor:
    """Task arithmetic over what is left of each task vector (`magprune`)."""
    return task_arithmetic(task_vectors, weight=weight, normalize=normalize)


def _ties_keywords(values: Values, _: Measured) -> Values:
    return {"weight": values["weight"], "agreement": agreement_of(values, default="mean")}


def _beyond(values: Values) -> str | None:
    for density, epsilon in zip(values["density"], values["epsilon"], strict=True):
        if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
            return (
                f"density {density:g} with epsilon {epsilon:g} makes probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g}, and they have to lie between 0 and 1; a smaller epsilon does"
            )
    return None


def _review(said: Said) -> Iterator[Remark]:
    yield from agreement_or_normalize(said)


def _workspace(shape: Sequence[int]) -> int:
    """A mask and the norm's product; and what is ranked at once: order, ranks, probabilities, draws."""
    numel = math.prod(shape)
    return 2 * 8 * numel + 48 * min(numel, max(_AT_ONCE, shape[-1] if shape else 1))


_DRAWN = Drawn(_masks)
_PARAMETERS = {
    "weight": WEIGHT,
    "density": DENSITY,
    "epsilon": Parameter(
        0.15, "how far probabilities go from the density, by rank of magnitude in a row", per_model=True, low=0, high=1
    ),
    "lambda": LAMBDA,
    "rescale": Parameter(
        "l1",
        "what is kept restores the tensor's L1 norm (l1 or true, as in mergekit); or is divided by its probability, as "
        "published (density); or stays (false)",
        varies=False,
        choices={"l1": "l1", True: "l1", "density": "density", False: False},
    ),
    "seed": SEED,
}

METHODS = {
    "della": Method(
        della,
        "TIES over task vectors of which small entries are dropped more often (DELLA, Deep 2024).",
        paper="2406.11617",
        use="fine-tunes that moved little; rows decide what is dropped",
        sees="tensors",
        parameters={**_PARAMETERS, "agreement": agreement_parameter("the mean"), "normalize": MAYBE_NORMALIZE},
        sparsifier=_DRAWN,
        keywords=_ties_keywords,
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        review=_review,
        wrong=_beyond,
        workspace=_workspace,
    ),
    "della_linear": Method(
        della_linear,
        "The sum of task vectors of which small entries are dropped more often (DELLA, Deep 2024).",
        paper="2406.11617",
        use="the same, summed without an election of signs",
        sees="tensors",
        parameters={**_PARAMETERS, "normalize": NORMALIZE},
        sparsifier=_DRAWN,
        keywords=lambda values, _: {key: values[key] for key in ("weight", "normalize")},
        one_is_itself=whole_and_unweighted,
        scale="lambda",
        wrong=_beyond,
        workspace=_workspace,
    ),
}
