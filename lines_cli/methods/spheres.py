"""Spherical means of whole tensors: NuSLERP, multi-SLERP and the Karcher mean.

Each is a weighted sum of the tensors whose shares follow from their lengths and angles. So these are measured by
streaming, in float64 (`angles.pairs`), and then the tensors are added entry by entry. NuSLERP by rows sees them whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lines_cli.methods.angles import Gram, combined_norm, gram, pairs
from lines_cli.methods.method import CannotMergeError, Chosen, Measured, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Values
from lines_cli.methods.sums import LAMBDA, ON_OFF, WEIGHT, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_SHORTEST = 1e-7  # lengths below this count as this, as in mergekit
_OF_A_LINE = 1e-8  # a sine that is not divided by


def _sum_of_shares(tensors: Sequence[Tensor], *, shares: Sequence[float]) -> Tensor:
    return weighted_sum(tensors, shares)


# --- NuSLERP ---


def nuslerp(
    tensors: Sequence[Tensor], *, t: float = 0.5, shares: Sequence[float] | None = None, axis: int = -1
) -> Tensor:
    """`(sin((1 - t) * phi) * v_1 + sin(t * phi) * v_2) / sin(phi)` with the angle phi between the two (Shoemake 1985,
    as mergekit's NuSLERP has it): of whole tensors, or of each vector along an axis. Where the two are parallel, the
    line takes the place of the arc.

    Args:
        tensors: two of [n], task vectors or weights; with `axis` two of a tensor's shape. Overwritten.
        t: how far from the first (0) to the second (1): `w_2 / (w_1 + w_2)`.
        shares: of whole tensors, from `nuslerp_shares`; None for vectors along `axis`.
        axis: along which vectors lie.
    """
    if shares is not None:
        return weighted_sum(tensors, shares)
    import torch

    one, other = tensors
    if one.ndim == 0:
        one, other = one.view(1), other.view(1)
    axis = axis if one.ndim > 1 else -1
    dot = (one.double() * other.double()).sum(axis, keepdim=True)
    lengths = [torch.linalg.vector_norm(v, dim=axis, keepdim=True, dtype=torch.float64) for v in (one, other)]
    cosine = (dot / lengths[0].clamp_(min=_SHORTEST) / lengths[1].clamp_(min=_SHORTEST)).clamp_(-1, 1)
    parallel = 1 - cosine.square() <= _OF_A_LINE**2
    phi = torch.acos(cosine.masked_fill(parallel, 0))
    sine = torch.sin(phi).masked_fill_(parallel, 1)
    first = torch.where(parallel, 1 - t, torch.sin((1 - t) * phi) / sine).to(one.dtype)
    second = torch.where(parallel, t, torch.sin(t * phi) / sine).to(one.dtype)
    return one.mul_(first).add_(other.mul_(second)).view(tensors[0].shape)


def nuslerp_shares(t: float, products: Gram) -> tuple[float, float]:
    """The shares of two whole tensors, from their dot products."""
    lengths = [max(products[n][n] ** 0.5, _SHORTEST) for n in (0, 1)]
    cosine = max(-1.0, min(1.0, products[0][1] / lengths[0] / lengths[1]))
    if 1 - cosine**2 <= _OF_A_LINE**2:
        return 1 - t, t
    phi = math.acos(cosine)
    return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def _nuslerp_keywords(values: Values, measured: Measured) -> Values:
    first, second = values["weight"]
    t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
    if values["nuslerp_flatten"]:
        return {"shares": nuslerp_shares(t, gram(measured.sums, 2))}
    return {"t": t, "axis": 0 if values["nuslerp_row_wise"] else -1}


def _nuslerp_workspace(shape: Sequence[int]) -> int:
    return 3 * 8 * math.prod(shape)


# --- multi-SLERP ---


def multislerp_shares(weight: Sequence[float], products: Gram, *, normalize: bool, eps: float) -> tuple[float, ...]:
    """The shares of N tensors in mergekit's multi-SLERP: the direction is that of `m = sum(w_i * v_i / |v_i|)`, the
    length `sum(w_i * |v_i|)`. Interpolation in the tangent space at m, with the same weights, adds nothing to m.

    Raises:
        CannotMergeError: m is zero, and there are more than two that are not.
    """
    if len(weight) == 1:
        return (1.0,)
    total = sum(weight)
    weight = [w / total for w in weight] if normalize else weight
    lengths = [max(products[n][n], 0.0) ** 0.5 for n in range(len(weight))]
    of_units = [w / (length + eps) for w, length in zip(weight, lengths, strict=True)]
    norm = combined_norm(of_units, products)
    if norm < eps:
        if len(weight) == 2:
            return tuple(weight)
        if not any(lengths):
            return (0.0,) * len(weight)
        raise CannotMergeError(
            "the directions of the models, times their weights, add up to nothing, and so say none: other weights do"
        )
    length = sum(w * of_it for w, of_it in zip(weight, lengths, strict=True))
    return tuple(length * share / norm for share in of_units)


def multislerp(tensors: Sequence[Tensor], *, shares: Sequence[float]) -> Tensor:
    """`sum(s_i * v_i)` with `shares` from `multislerp_shares`: barycentric interpolation on the sphere (mergekit's
    multi-SLERP; Goddard, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea).

    Args:
        tensors: N of [n], task vectors or weights; overwritten.
        shares: N.
    """
    return _sum_of_shares(tensors, shares=shares)


def _multislerp_keywords(values: Values, measured: Measured) -> Values:
    weight = values["weight"]
    products = gram(measured.sums, len(weight))
    normalize = bool(values["normalize_weights"])
    return {"shares": multislerp_shares(weight, products, normalize=normalize, eps=values["eps"])}


def _no_sum_to_divide_by(values: Values) -> str | None:
    if len(values["weight"]) > 1 and values["normalize_weights"] and sum(values["weight"]) == 0:
        return "the weights add up to 0, and normalize_weights divides by their sum; normalize_weights: false does not"
    return None


# --- the Karcher mean ---


def karcher_shares(products: Gram, *, max_iter: int, tol: float) -> tuple[float, ...]:
    """The shares of N tensors in their Karcher mean: the point of the unit sphere from which the N directions, along
    the arcs that lead to them, add up to nothing; times the mean length.

    All steps are taken in the span of the N tensors, where a vector is its N coefficients. Tensors no longer than `tol`
    have no direction, and those opposite to the mean none that leads to them.

    Args:
        products: of the N.
        max_iter: steps, at most.
        tol: lengths and angles below it count as none; a shorter step is the last.
    """
    models = len(products)
    if models == 1:
        return (1.0,)
    lengths = [max(products[n][n], 0.0) ** 0.5 for n in range(models)]
    valid = [n for n, length in enumerate(lengths) if length > tol]
    if not valid:
        return (0.0,) * models
    units = [[products[n][m] / lengths[n] / lengths[m] for m in valid] for n in valid]
    share = 1 / len(valid)
    mean = [share] * len(valid)
    norm = combined_norm(mean, units)
    mean = [part / norm for part in mean] if norm >= tol else [1.0, *[0.0] * (len(valid) - 1)]
    for _ in range(int(max_iter)):
        step = [0.0] * len(valid)
        for number, row in enumerate(units):
            cosine = max(-1.0, min(1.0, sum(part * product for part, product in zip(mean, row, strict=True))))
            angle = math.acos(cosine)
            if angle < tol or math.pi - angle < tol:
                continue
            by = share * angle / math.sin(angle)
            step = [own - by * cosine * part for own, part in zip(step, mean, strict=True)]
            step[number] += by
        length = combined_norm(step, units)
        if length < tol:
            break
        mean = [math.cos(length) * part + math.sin(length) * own / length for part, own in zip(mean, step, strict=True)]
        norm = combined_norm(mean, units)
        mean = [part / norm for part in mean] if norm > tol else mean
    scale = sum(lengths) / models
    found = dict(zip(valid, mean, strict=True))
    return tuple(scale * found[n] / lengths[n] if n in found else 0.0 for n in range(models))


def karcher(weights: Sequence[Tensor], *, shares: Sequence[float]) -> Tensor:
    """`sum(s_i * theta_i)` with `shares` from `karcher_shares`: the Karcher mean of whole weights on the sphere, as
    mergekit has it (arXiv 2603.04972).

    Args:
        weights: N of [n]; overwritten.
        shares: N.
    """
    return _sum_of_shares(weights, shares=shares)


def _karcher_keywords(values: Values, measured: Measured) -> dict[str, Any]:
    models = round(((8 * len(measured.sums) + 1) ** 0.5 - 1) / 2) if measured.sums else 1
    products = gram(measured.sums, models)
    return {"shares": karcher_shares(products, max_iter=values["max_iter"], tol=values["tol"])}


def _base_is_one_of_them(models: Sequence[str], base: str | None, subtracted: bool) -> Chosen:
    """As in mergekit a base is one of the models that are merged, if it is not listed, the last; but with `lines:`,
    where it is the base, only if it is listed.
    """
    every: Chosen = tuple(range(len(models)))
    return every if base is None or base in models or subtracted else (*every, None)


_IDLE = frozenset({"int8_mask", "embed_slerp", "normalize", "rescale", "density"})

METHODS = {
    "nuslerp": Method(
        nuslerp,
        "The way from one task vector, or model, to another along an arc (mergekit's NuSLERP; Shoemake 1985).",
        use="two models or task vectors whose norm is to be kept",
        base_is_optional=True,
        sees="tensors",
        streams=lambda values: bool(values["nuslerp_flatten"]),
        parameters={
            "weight": Parameter(
                1.0, "of the model: the second's share of both is how far the way goes", per_model=True
            ),
            "nuslerp_flatten": Parameter(
                True, "one arc for the whole tensor; else one for each of its rows", varies=False, choices=ON_OFF
            ),
            "nuslerp_row_wise": Parameter(
                False,
                "without nuslerp_flatten: an arc for each vector along the first axis, in place of the last",
                varies=False,
                choices=ON_OFF,
            ),
            "lambda": LAMBDA,
        },
        models=(2, 2),
        needs=lambda values: frozenset({"sums"} if values["nuslerp_flatten"] else ()),
        sums=pairs,
        keywords=_nuslerp_keywords,
        scale="lambda",
        ignored=_IDLE,
        workspace=_nuslerp_workspace,
    ),
    "multislerp": Method(
        multislerp,
        "The mean of several task vectors, or models, on a sphere (mergekit's multi-SLERP).",
        use="several, whose norm is to be kept",
        base_is_optional=True,
        parameters={
            "weight": WEIGHT,
            "normalize_weights": Parameter(True, "divide the weights by their sum", varies=False, choices=ON_OFF),
            "eps": Parameter(1e-8, "added to lengths; below it one counts as none", low=0),
            "lambda": LAMBDA,
        },
        needs=lambda _: frozenset({"sums"}),
        sums=pairs,
        keywords=_multislerp_keywords,
        one_is_itself=lambda _: True,
        scale="lambda",
        wrong=_no_sum_to_divide_by,
        ignored=_IDLE,
    ),
    "karcher": Method(
        karcher,
        "The Karcher mean of whole weights on a sphere (arXiv 2603.04972).",
        paper="2603.04972",
        use="several whole models, without a base",
        takes="weights",
        parameters={
            "max_iter": Parameter(10, "steps towards the mean, at most", low=0, high=10_000, whole=True),
            "tol": Parameter(1e-5, "a shorter step is the last; shorter tensors have no direction", low=0),
        },
        needs=lambda _: frozenset({"sums"}),
        sums=pairs,
        keywords=_karcher_keywords,
        one_is_itself=lambda _: True,
        choose=_base_is_one_of_them,
        ignored=_IDLE | {"weight"},
    ),
}
