"""The formula and its rounding, held against numpy, which computes in separate steps, and against exact fractions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lines_cli.engine.arithmetic import add_scaled, block_sums, cast, first_nonfinite, is_finite, task_vector
from support.bits import FORMATS, nearest, raw

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def halfway(dtype: torch.dtype) -> list[float]:
    """Values in, next to, and around the middle between neighbours of `dtype`, where rounding twice goes wrong."""
    bits, lowest, highest = FORMATS[dtype]
    found = []
    for exponent in (lowest - 1, lowest, lowest + 3, -1, 0, 1, 5, highest - 1, highest):
        unit = 2.0 ** (max(exponent, lowest) - bits + 1)
        for mantissa in (2.0 ** (bits - 1), 2.0 ** (bits - 1) + 1, 1.5 * 2.0 ** (bits - 1), 2.0**bits - 1):
            tie = (mantissa + 0.5) * unit if exponent >= lowest else (mantissa // 2 + 0.5) * unit
            nudges = (0.0, 2.0**-29, 2.0**-40, 2.0**-52)  # below a half unit in the last place of float32, and less
            found += [tie * (1 + sign * nudge) for nudge in nudges for sign in (1, -1)]
    tiny = 2.0 ** (lowest - bits + 1)
    found += [tiny / 2, math.nextafter(tiny / 2, 1), math.nextafter(tiny / 2, 0), tiny * 1.5, tiny / 4, 5e-324, 0.0]
    return [sign * value for value in found for sign in (1.0, -1.0)]


def wide(seed: int, count: int = 4000) -> torch.Tensor:
    """Random float64 values over all exponents that float32 and the 16-bit dtypes know, and beyond."""
    random = np.random.default_rng(seed)
    return torch.from_numpy(random.choice([-1.0, 1.0], count) * np.exp2(random.uniform(-160, 140, count)))


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("values", ["halfway", "wide", "near one"])
def test_float64_is_rounded_once(dtype: torch.dtype, values: str) -> None:
    """A float64 value becomes the nearest value of a narrower dtype, ties to even, as if rounded exactly once."""
    source = {
        "halfway": lambda: torch.tensor(halfway(dtype), dtype=torch.float64),
        "wide": lambda: wide(1),
        "near one": lambda: 1 + wide(2) * 2.0**-40,
    }[values]()
    out = torch.empty(len(source), dtype=dtype)
    cast(source, out)
    expected = torch.tensor([nearest(value, dtype) for value in source.tolist()], dtype=torch.float64).to(dtype)
    assert raw(out) == raw(expected)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 64, 4001])
def test_float32_is_rounded_once(stored: torch.dtype, count: int) -> None:
    """Rounding float32 does not depend on how many entries are rounded at once, vectors and their tails alike."""
    source = torch.cat([wide(3, 3000), torch.tensor(halfway(stored), dtype=torch.float64)]).to(torch.float32)[:count]
    out = torch.empty(len(source), dtype=stored)
    cast(source, out)
    expected = torch.tensor([nearest(value, stored) for value in source.tolist()], dtype=torch.float64).to(stored)
    assert raw(out) == raw(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_infinity_and_nan_survive_a_cast(dtype: torch.dtype) -> None:
    """Inf stays Inf with its sign, NaN stays NaN, and what lies beyond the range becomes Inf."""
    out = torch.empty(5, dtype=dtype)
    cast(torch.tensor([math.inf, -math.inf, 1e300, -1e300, math.nan], dtype=torch.float64), out)
    assert out[:4].tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert math.isnan(out[4])


@pytest.mark.parametrize("ft", FLOATS)
@pytest.mark.parametrize("base", FLOATS)
@pytest.mark.parametrize("coefficient", [0.1, -1.5, 3.0, 2.0**-149])
def test_each_operation_is_rounded(base: torch.dtype, ft: torch.dtype, coefficient: float) -> None:
    """Subtract, multiply, add: each rounded to the compute dtype, none fused with another."""
    compute = torch.float64 if torch.float64 in (base, ft) else torch.float32
    b, f = wide(4).clamp(-6e4, 6e4).to(base), wide(5).clamp(-6e4, 6e4).to(ft)
    scalar = float(np.float32(coefficient))
    result = add_scaled(b.to(compute), task_vector(f.to(compute, copy=True), b.to(compute)), scalar)

    exact_b, exact_f = b.to(compute).numpy(), f.to(compute).numpy()
    delta = exact_f - exact_b
    scaled = exact_f.dtype.type(scalar) * delta
    assert result.numpy().tobytes() == (exact_b + scaled).tobytes()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 1000])
def test_block_sums_add_halves_to_halves(count: int) -> None:
    """Every block's sum, in float64, by a tree of additions that numpy repeats to the bit; zeros fill a short block."""
    values = wide(6, count).clamp(-1e30, 1e30).to(torch.float32)
    expected = []
    for start in range(0, count, 16):
        block = np.zeros(16)
        block[: len(values[start : start + 16])] = values[start : start + 16].numpy()
        while len(block) > 1:
            block = block[: len(block) // 2] + block[len(block) // 2 :]
        expected.append(float(block[0]))
    assert block_sums(values, 16) == expected


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("numel", [0, 1, 100, 70_001])
def test_what_is_finite_is_said_to_be(dtype: torch.dtype, numel: int) -> None:
    """Also where the sum overflows."""
    assert is_finite(torch.linspace(-2, 3, numel).to(dtype))
    assert is_finite(torch.full((numel,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("at", [0, 1, 17, 99])
def test_what_is_not_finite_is_found(dtype: torch.dtype, at: int) -> None:
    """One NaN or Inf anywhere, or two that cancel; the exact search names its position."""
    values = torch.ones(100, dtype=dtype)
    assert first_nonfinite(values) is None
    values[at] = math.nan
    assert not is_finite(values)
    assert first_nonfinite(values) == (at, "NaN")
    values[at], values[(at + 1) % 100] = math.inf, -math.inf
    assert not is_finite(values)
    values[(at + 1) % 100] = 1
    assert not is_finite(values)
    values[at] = -math.inf
    assert first_nonfinite(values) == (at, "Inf")
