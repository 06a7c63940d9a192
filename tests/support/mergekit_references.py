"""The methods of mergekit's set on whole models, each as its paper or page writes it, in a few lines of numpy or torch:
all vectors are there, nothing is derived from dot products, and steps that come to nothing are taken.

Shares and angles are float64; what they multiply is rounded as in `whole_model`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from support.whole_model import (
    Tensors,
    added,
    by_name,
    divided,
    elected_and_merged,
    numbers_drawn,
    plain_sum,
    times,
    weighted,
)


def _flat(tensors: Sequence[Tensor]) -> list[np.ndarray]:
    return [tensor.double().numpy().reshape(-1) for tensor in tensors]


def _arc(t: float, one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    lengths = [max(math.sqrt(float(v @ v)), 1e-7) for v in (one, other)]
    cosine = min(1.0, max(-1.0, float((one / lengths[0]) @ (other / lengths[1]))))
    if 1 - cosine * cosine <= 1e-16:
        return 1 - t, t
    phi = math.acos(cosine)
    return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def nuslerp(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensors:
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total

    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        if nuslerp_flatten or tensors[0].ndim < 2:
            shares = _arc(t, *_flat(tensors))
            return added([times(share, tensor) for share, tensor in zip(shares, tensors, strict=True)])
        last = -1 if not nuslerp_row_wise else 0
        one, other = (np.moveaxis(tensor.double().numpy(), last, -1) for tensor in tensors)
        made = [np.empty(one.shape), np.empty(one.shape)]
        for index in np.ndindex(one.shape[:-1]):
            made[0][index], made[1][index] = _arc(t, one[index], other[index])
        shares = [torch.from_numpy(np.moveaxis(side, -1, last).copy()).to(tensors[0].dtype) for side in made]
        return added([share * tensor for share, tensor in zip(shares, tensors, strict=True)])

    return by_name(taus, merged)


def _in_span(target: np.ndarray, vectors: list[np.ndarray]) -> list[float]:
    """The shares by which vectors add up to one in their span."""
    if not any(map(np.any, vectors)):
        return [0.0] * len(vectors)
    return [float(share) for share in np.linalg.lstsq(np.stack(vectors, 1), target, rcond=1e-12)[0]]


def _written(target: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(target).to(like.dtype).view(like.shape)


def multislerp(
    taus: Sequence[Tensors], *, weight: Sequence[float], normalize_weights: bool = True, eps: float = 1e-8
) -> Tensors:
    """With the step in the tangent space, which comes to nothing."""
    shares = np.array(weight)
    shares = shares / shares.sum() if normalize_weights else shares

    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        vectors = np.stack(_flat(tensors))
        lengths = np.linalg.norm(vectors, axis=1)
        units = vectors / (lengths[:, None] + eps)
        mean = shares @ units
        if np.linalg.norm(mean) < eps:
            return _written(shares @ vectors, tensors[0])
        mean = mean / np.linalg.norm(mean)
        tangent = shares @ (units - (units @ mean)[:, None] * mean)
        length = np.linalg.norm(tangent) + eps
        point = mean * np.cos(length) + tangent * (np.sin(length) / length)
        return _written(point * (lengths @ shares), tensors[0])

    return by_name(taus, merged)


def karcher(models: Sequence[Tensors], *, max_iter: int = 10, tol: float = 1e-5) -> Tensors:
    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        if len(tensors) == 1:
            return tensors[0]
        vectors = _flat(tensors)
        lengths = [float(np.linalg.norm(vector)) for vector in vectors]
        units = [vector / length for vector, length in zip(vectors, lengths, strict=True) if length > tol]
        if not units:
            return torch.zeros_like(tensors[0])
        mean = sum(units) / len(units)
        mean = mean / np.linalg.norm(mean) if np.linalg.norm(mean) >= tol else units[0]
        for _ in range(max_iter):
            steps = []
            for unit in units:
                cosine = float(np.clip(mean @ unit, -1, 1))
                angle = math.acos(cosine)
                if tol <= angle <= math.pi - tol:
                    steps.append(angle / math.sin(angle) * (unit - cosine * mean) / len(units))
            step = sum(steps) if steps else np.zeros_like(mean)
            length = float(np.linalg.norm(step))
            if length < tol:
                break
            mean = math.cos(length) * mean + math.sin(length) * step / length
            mean = mean / np.linalg.norm(mean)
        return _written(mean * (sum(lengths) / len(lengths)), tensors[0])

    return by_name(models, merged)


def model_stock(taus: Sequence[Tensors], *, filter_wise: bool = False) -> Tensors:
    number = len(taus)

    def ratio(vectors: Sequence[np.ndarray]) -> float:
        cosines = []
        for one, other in itertools.combinations(vectors, 2):
            product = np.linalg.norm(one) * np.linalg.norm(other)
            cosines.append(min(1.0, max(-1.0, float(one @ other) / max(float(product), 1e-6))))
        cosine = sum(cosines) / len(cosines)
        divisor = 1 + (number - 1) * cosine
        return number * cosine / divisor if abs(divisor) >= 1e-6 else 0.0

    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        total = added(tensors)
        if not filter_wise or total.ndim < 2:
            return times(ratio(_flat(tensors)) / number, total)
        rows = [tensor.double().numpy() for tensor in tensors]
        ratios = np.empty((*total.shape[:-1], 1))
        for index in np.ndindex(total.shape[:-1]):
            ratios[index] = ratio([row[index] for row in rows]) / number
        return total * torch.from_numpy(ratios).to(total.dtype)

    return by_name(taus, merged)


# --- DELLA ---


def likely(tau: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    """The probability of each entry, by its rank among its row's magnitudes."""
    rows = tau.reshape(1, -1) if tau.ndim < 2 else tau.reshape(-1, tau.shape[-1])
    if tau.ndim > 3:
        rows = tau.reshape(len(tau), -1)
    found = np.empty(rows.shape)
    for number, row in enumerate(np.abs(rows)):
        for rank, at in enumerate(sorted(range(len(row)), key=lambda place: (row[place], place))):
            share = rank / (len(row) - 1) if len(row) > 1 else 0.5
            found[number, at] = density - epsilon + share * 2 * epsilon
    return found.reshape(tau.shape)


def _pruned(
    taus: Sequence[Tensors], density: Sequence[float], epsilon: Sequence[float], rescale: object, seed: int
) -> list[Tensors]:
    def left(model: int, name: str, tau: Tensor) -> Tensor:
        share, spread = density[model], epsilon[model]
        if share >= 1:
            return tau
        if share <= 0 or not tau.numel():
            return torch.zeros_like(tau)
        chance = torch.from_numpy(likely(tau.numpy(), share, spread))
        numbers, up = numbers_drawn(seed, model, name, tau.numel())
        kept = (numbers < torch.floor(chance.flatten() * 2**16 + up)).view(tau.shape)
        if rescale == "density":
            return tau * (kept / chance).to(tau.dtype)
        by = 1.0
        if rescale in ("l1", True):
            before, after = (float(one.double().abs().sum()) for one in (tau, tau * kept))
            by = before / after if before >= 1e-7 and after >= 1e-7 else 1.0
        return tau * (kept * torch.tensor(by, dtype=tau.dtype))

    return [{name: left(model, name, tensor) for name, tensor in tau.items()} for model, tau in enumerate(taus)]


def della(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: object = "l1",
    seed: int = 0,
    agreement: str | None = None,
    normalize: bool = True,
) -> Tensors:
    agreement = agreement or ("mean" if normalize else "sum")
    return elected_and_merged(_pruned(taus, density, epsilon, rescale, seed), weight, agreement, 1)


def della_linear(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    epsilon: Sequence[float],
    rescale: object = "l1",
    seed: int = 0,
    normalize: bool = False,
) -> Tensors:
    total = plain_sum(weighted(_pruned(taus, density, epsilon, rescale, seed), weight))
    return divided(total, weight) if normalize else total


# --- others ---


def sce(taus: Sequence[Tensors], *, select_topk: float = 1.0) -> Tensors:
    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        if select_topk < 1:
            variance = torch.stack(tensors).var(0, unbiased=False)
            kept = int(int((variance != 0).sum()) * select_topk)
            least = variance.flatten().sort(descending=True).values[kept - 1] if kept else math.inf
            tensors = [tensor * (variance >= least) for tensor in tensors]
        squares = [float(tensor.double().square().mean()) if tensor.numel() else 0.0 for tensor in tensors]
        total = sum(squares)
        shares = [1 / len(squares)] * len(squares) if total < 1e-6 else [square / total for square in squares]
        sign = torch.where(added(tensors) >= 0, 1, -1)
        weights = [
            times(share, (tensor.sign() == sign).to(tensor.dtype))
            for share, tensor in zip(shares, tensors, strict=True)
        ]
        products = [weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]
        return added(products) / added(weights).clamp(min=1e-6)

    return by_name(taus, merged)


def ramplus_tl(taus: Sequence[Tensors], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2) -> Tensors:
    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        changed = [tensor.abs() > epsilon for tensor in tensors]
        count = torch.stack(changed).sum(0)
        total = torch.zeros_like(tensors[0])
        for tensor, own in zip(tensors, changed, strict=True):
            shared, alone = int((own & (count > 1)).sum()), int((own & (count == 1)).sum())
            boost = 1 + r * min(shared / max(alone, epsilon), alpha)
            total = total + torch.where(own & (count == 1), times(boost, tensor), 0)
            total = total + torch.where(own & (count > 1), tensor, 0)
        return total / count.clamp(min=1)

    return by_name(taus, merged)


def ram(taus: Sequence[Tensors], *, epsilon: float = 1e-5) -> Tensors:
    return ramplus_tl(taus, epsilon=epsilon, r=0.0)


def nearswap(taus: Sequence[Tensors], *, t: float) -> Tensors:
    return by_name(taus, lambda _, tensors: tensors[0] * (t / tensors[0].abs().clamp(min=1e-6)).clamp(max=1))


def arcee_fusion(taus: Sequence[Tensors], *, base: Tensors) -> Tensors:
    def distribution(row: np.ndarray) -> np.ndarray:
        powers = np.exp(row - row.max())
        return powers / powers.sum() + 1e-8

    def merged(name: str, tensors: list[Tensor]) -> Tensor:
        (tau,) = tensors
        if not tau.numel():
            return tau
        rows = tau.reshape(1, -1) if tau.ndim < 2 else tau.reshape(-1, tau.shape[-1])
        before = base[name].reshape(rows.shape)
        after = before + rows
        importance = []
        for row, p_of, q_of in zip(rows, after.double().numpy(), before.double().numpy(), strict=True):
            p, q = distribution(p_of), distribution(q_of)
            importance.append(row.abs() * float(np.sum(p * np.log(p / q))))
        scores = torch.cat(importance)
        in_order = scores.sort().values
        low, median, high = (in_order[int(q * (len(in_order) - 1))] for q in (0.25, 0.5, 0.75))
        return tau * (scores >= median + 1.5 * (high - low)).view(tau.shape)

    return by_name(taus, merged)
