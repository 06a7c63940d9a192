"""The merge methods on whole models at once, in a few lines of torch each, written from the papers: what `lines merge`
is held against.

A model is a dict of tensors. Task vectors are float32 (float64 where an input is), and so is every operation on them,
one after the other. Masks multiply, as they do in the released code of TIES, TALL masks and DARE; what a trim leaves
out is 0, not -0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from support.bits import nearest

Tensors = dict[str, Tensor]
Rescale = Literal["density", "l1", False]

BLOCK = 65536


def in_compute_dtype(*models: Tensors) -> list[Tensors]:
    """The float tensors of all models as float32; as float64 where one of them is."""
    wide = {name: torch.float64 if any(m[name].dtype == torch.float64 for m in models) else None for name in models[0]}
    return [{n: t.to(wide[n] or torch.float32) for n, t in model.items() if t.is_floating_point()} for model in models]


def task_vectors(base: Tensors, models: Sequence[Tensors]) -> list[Tensors]:
    """`theta_i - theta_base`."""
    pre, *fine_tuned = in_compute_dtype(base, *models)
    return [{name: model[name] - pre[name] for name in pre} for model in fine_tuned]


def times(number: float, tensor: Tensor) -> Tensor:
    """The number is rounded to the tensor's dtype first."""
    return torch.tensor(number, dtype=tensor.dtype) * tensor


def by_name(taus: Sequence[Tensors], function: Callable[[str, list[Tensor]], Tensor]) -> Tensors:
    return {name: function(name, [tau[name] for tau in taus]) for name in taus[0]}


def added(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total


def weighted(taus: Sequence[Tensors], weight: Sequence[float]) -> list[Tensors]:
    return [{name: times(w, tau[name]) for name in tau} for tau, w in zip(taus, weight, strict=True)]


def plain_sum(taus: Sequence[Tensors]) -> Tensors:
    return by_name(taus, lambda _, tensors: added(tensors))


def divided(taus: Tensors, weight: Sequence[float]) -> Tensors:
    """By the sum of the weights, unless that is next to 0."""
    by = {dtype: added([torch.tensor(w, dtype=dtype) for w in weight]) for dtype in (torch.float32, torch.float64)}
    return {n: t if by[t.dtype].abs() < 1e-8 else t / by[t.dtype] for n, t in taus.items()}


def trimmed(taus: Sequence[Tensors], density: Sequence[float], trim: str) -> list[Tensors]:
    """The entries whose float32 magnitude is at least the k-th largest of the model's (`global`) or the tensor's."""

    def threshold(tensors: list[Tensor], share: float) -> Tensor:
        magnitudes = torch.cat([tensor.abs().to(torch.float32).flatten() for tensor in tensors])
        k = max(1, int(share * len(magnitudes)))
        return magnitudes.sort(descending=True).values[k - 1]

    kept = []
    for tau, share in zip(taus, density, strict=True):
        whole = threshold(list(tau.values()), share)
        at = {name: whole if trim == "global" else threshold([tau[name]], share) for name in tau if tau[name].numel()}
        mask = {name: tau[name].abs().to(torch.float32) >= at[name] for name in at}
        kept.append({name: tau[name] * mask[name] + 0.0 if name in mask and share != 1 else tau[name] for name in tau})
    return kept


def average(taus: Sequence[Tensors]) -> Tensors:
    return {name: total / len(taus) for name, total in plain_sum(taus).items()}


def task_arithmetic(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    trim: str = "global",
    normalize: bool = False,
) -> Tensors:
    total = plain_sum(weighted(trimmed(taus, density, trim), weight))
    return divided(total, weight) if normalize else total


def elected_and_merged(taus: Sequence[Tensors], weight: Sequence[float], agreement: str, majority: int) -> Tensors:
    """TIES after the trim: a sign for each entry, then what the models make of it that agree."""
    shares = weighted(taus, weight)

    def merged(_: str, tensors: list[Tensor]) -> Tensor:
        sign = added(tensors).sign()
        sign = torch.where(sign == 0, majority, sign)
        agrees = [torch.where(sign > 0, tensor > 0, tensor < 0) for tensor in tensors]
        chosen = [tensor * mask for tensor, mask in zip(tensors, agrees, strict=True)]
        if agreement == "max":
            return torch.stack([tensor.abs() for tensor in chosen]).amax(0) * torch.where(sign > 0, 1, -1)
        if agreement == "sum":
            return added(chosen)
        divisor = added([times(w, mask.to(sign.dtype)) for w, mask in zip(weight, agrees, strict=True)])
        return added(chosen) / torch.where(divisor.abs() < 1e-8, 1, divisor)

    return by_name(shares, merged)


def ties(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    trim: str = "global",
    agreement: str | None = None,
    normalize: bool = True,
    rescale: Rescale = False,
) -> Tensors:
    kept = trimmed(taus, density, trim)
    if rescale:
        kept = [
            {name: with_norm_of(tau[name], left[name]) for name in tau} for tau, left in zip(taus, kept, strict=True)
        ]
    balance = sum(int(total.sign().sum()) for total in plain_sum(weighted(kept, weight)).values())
    majority = (balance > 0) - (balance < 0) if trim == "global" else 1
    return elected_and_merged(kept, weight, agreement or ("mean" if normalize else "sum"), majority)


def consensus(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    mask_lambda: Sequence[float],
    k: int = 2,
    on: str = "sum",
    trim: str = "global",
) -> Tensors:
    if on == "ties":
        merged = ties(taus, weight=weight, density=density, trim=trim, agreement="sum")
    else:
        merged = plain_sum(weighted(taus, weight))

    def masked(name: str, tensors: list[Tensor]) -> Tensor:
        whole = merged[name]
        masks = [tau.abs() > times(scale, (whole - tau).abs()) for tau, scale in zip(tensors, mask_lambda, strict=True)]
        return whole * (torch.stack(masks).sum(0) >= k)

    return by_name(taus, masked)


def numbers_drawn(seed: int, model: int, name: str, numel: int) -> tuple[Tensor, Tensor]:
    """For each entry one of 2**16 numbers, from 0 on, and the share of a step by which its block rounds up: [numel].
    A generator for each (seed, model, tensor, block of 65,536 entries) gives 64 bits for four entries, and 32 bits more
    decide by block which of two neighbouring multiples of 2**-16 stands for a density.
    """
    blocks, shares = [], []
    for block in range(-(-numel // BLOCK)):
        key = blake2b(f"{seed}\0{model}\0{block}\0{name}".encode(), digest_size=12).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
        numbers = torch.empty(BLOCK // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
        quarters = torch.stack([numbers >> shift & 0xFFFF for shift in (0, 16, 32, 48)], 1).flatten()
        signed = torch.where(quarters < 2**15, quarters, quarters - 2**16)
        blocks.append(signed + 2**15)
        shares.append(torch.full((BLOCK,), int.from_bytes(key[8:], "little") / 2**32, dtype=torch.float64))
    none = torch.empty(0)
    return torch.cat([*blocks, none.long()])[:numel], torch.cat([*shares, none.double()])[:numel]


def drawn(seed: int, model: int, name: str, numel: int, density: float) -> Tensor:
    """Which entries are kept with this probability."""
    numbers, share = numbers_drawn(seed, model, name, numel)
    return numbers < torch.floor(density * 2**16 + share)


def by_halves(values: Tensor) -> float:
    """The float64 sum over blocks of 65,536 entries, in each of which halves are added to halves."""
    total = 0.0
    for block in values.flatten().double().split(BLOCK):
        sums = torch.nn.functional.pad(block, (0, BLOCK - len(block)))
        while len(sums) > 1:
            sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
        total += float(sums)
    return total


def with_norm_of(tau: Tensor, kept: Tensor) -> Tensor:
    """What is kept of a tensor, times what gives it the L1 norm of the whole."""
    return times(by_halves(tau.abs()) / by_halves(kept.abs()), kept) if kept.any() else kept


def dropped(taus: Sequence[Tensors], density: Sequence[float], rescale: Rescale, seed: int) -> list[Tensors]:
    """DARE: what is left of each task vector, rescaled."""

    def left(model: int, name: str, tau: Tensor, share: float) -> Tensor:
        if share == 1:
            return tau
        kept = tau * drawn(seed, model, name, tau.numel(), share).view(tau.shape)
        factor = 1.0
        if rescale == "density" and share:
            factor = 1 / share
        return with_norm_of(tau, kept) if rescale == "l1" else times(factor, kept)

    return [
        {name: left(model, name, tau[name], share) for name in tau}
        for model, (tau, share) in enumerate(zip(taus, density, strict=True))
    ]


def dare_linear(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    rescale: Rescale = "density",
    seed: int = 0,
    normalize: bool = False,
) -> Tensors:
    total = plain_sum(weighted(dropped(taus, density, rescale, seed), weight))
    return divided(total, weight) if normalize else total


def dare_ties(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    rescale: Rescale = "density",
    seed: int = 0,
    agreement: str | None = None,
    normalize: bool = False,
) -> Tensors:
    agreement = agreement or ("mean" if normalize else "sum")
    return elected_and_merged(dropped(taus, density, rescale, seed), weight, agreement, 1)


def linear(models: Sequence[Tensors], *, weight: Sequence[float], normalize: bool = True) -> Tensors:
    """On whole weights, not on task vectors, like the two below."""
    total = plain_sum(weighted(models, weight))
    return divided(total, weight) if normalize else total


def slerp_shares(t: float, first: Tensor, second: Tensor) -> tuple[float, float]:
    """In float64: how much of each lies on the arc between them; on the line, where they are nearly parallel."""
    a, b = first.flatten().double().numpy(), second.flatten().double().numpy()
    lengths = [math.sqrt(float(v @ v)) for v in (a, b)]
    cosine = float(a @ b) / math.prod(length if length > 1e-8 else 1.0 for length in lengths)
    if abs(cosine) > 0.9995:
        return 1 - t, t
    phi = math.acos(cosine)
    return math.sin((1 - t) * phi) / math.sin(phi), math.sin(t * phi) / math.sin(phi)


def slerp(models: Sequence[Tensors], *, t: float) -> Tensors:
    def between(_: str, tensors: list[Tensor]) -> Tensor:
        shares = slerp_shares(t, *tensors)
        return times(shares[0], tensors[0]) + times(shares[1], tensors[1])

    return by_name(models, between)


def passthrough(models: Sequence[Tensors], *, scale: Sequence[float | None]) -> Tensors:
    return {name: tensor if scale[0] is None else times(scale[0], tensor) for name, tensor in models[0].items()}


def norm1(tensors: Tensors) -> float:
    return math.fsum(float(tensor.double().abs().sum()) for tensor in tensors.values())


def coefficient(name: str, alpha: float, beta: float, gamma: float = 1.0, scale: float = 1.0, *, layers: int) -> float:
    """`gamma * lambda * (alpha + beta * (l - 1) / (L - 1))`, from left to right; outside the layers the first."""
    if "layers." not in name:
        return gamma * scale * alpha
    block = int(name.partition("layers.")[2].partition(".")[0]) + 1
    return gamma * scale * (alpha + beta if block == layers else alpha + beta * (block - 1) / (layers - 1))


def added_to_base(base: Tensors, merged: Tensors, scale: Callable[[str], float]) -> Tensors:
    """`theta_base + c * tau_merged`, rounded to what the base is stored as. Integers are the base's."""
    out = {}
    for name, pre in base.items():
        if name not in merged or scale(name) == 0:
            out[name] = pre
        else:
            tau = merged[name]
            out[name] = rounded(pre.to(tau.dtype) + times(scale(name), tau), pre.dtype)
    return out


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Once, ties to even; torch would take float64 to 16 bits by way of float32."""
    if values.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        exact = [nearest(value, dtype) for value in values.flatten().tolist()]
        values = torch.tensor(exact, dtype=torch.float64).view(values.shape)
    return values.to(dtype)
