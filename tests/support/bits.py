"""Numbers bit by bit: the exact rounding, and random values over all exponents of a dtype."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]

FORMATS = {torch.float16: (11, -14, 15), torch.bfloat16: (8, -126, 127), torch.float32: (24, -126, 127)}
"""Bits of the significand, least and greatest exponent (IEEE 754, and bfloat16 as the upper half of a float32)."""

LIMIT = {torch.float64: 120, torch.float32: 120, torch.float16: 13, torch.bfloat16: 120}
"""Exponents up to which random values of each dtype leave room for a difference and a factor."""


def nearest(value: float, dtype: torch.dtype) -> float:
    """The number of `dtype` nearest to `value`, ties to even, by exact arithmetic."""
    bits, lowest, highest = FORMATS[dtype]
    if value == 0 or not math.isfinite(value):
        return value
    unit = Fraction(2) ** (max(math.frexp(value)[1] - 1, lowest) - bits + 1)
    rounded = round(Fraction(value) / unit) * unit
    return math.copysign(float(abs(rounded)) if abs(rounded) < Fraction(2) ** (highest + 1) else math.inf, value)


def raw(values: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that -0.0 is not 0.0."""
    return values.reshape(-1).view(torch.uint8).numpy().tobytes()


def wide(seed: int, dtype: torch.dtype, limit: int, count: int = 257) -> torch.Tensor:
    """Random values over the exponents of `dtype` up to `limit`: subnormals, zeros of both signs, the odd extreme."""
    random = np.random.default_rng(seed)
    lowest = max(math.log2(torch.finfo(dtype).smallest_normal) - 30, -1074)
    values = random.choice([-1.0, 1.0], count) * np.exp2(random.uniform(lowest, limit, count))
    near = random.choice([-1.0, 1.0], count) * random.uniform(0.5, 2.0, count)
    values = np.where(random.random(count) < 0.5, values, near)
    values[:6] = [0.0, -0.0, 2.0**limit, -(2.0**limit), torch.finfo(dtype).tiny, -torch.finfo(dtype).tiny]
    return torch.from_numpy(random.permutation(values)).to(dtype)


def wide_model(seed: int, *dtypes: torch.dtype, layers: int = 4, limit: int | None = None) -> Tensors:
    """A model with a tensor per layer, one before and one behind the layers, dtypes by turns."""
    names = ["embed.weight", *(f"layers.{i}.weight" for i in range(layers)), "norm.weight"]
    chosen = [dtypes[i % len(dtypes)] for i in range(len(names))]
    return {
        name: wide(seed + i, dtype, LIMIT[dtype] if limit is None else limit)
        for i, (name, dtype) in enumerate(zip(names, chosen, strict=True))
    }
