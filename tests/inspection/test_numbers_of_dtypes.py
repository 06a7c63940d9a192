"""The numbers of any dtype and of any magnitude, against the float64 reference."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from support.inspect_reference import (
    FLOATS,
    JOINT,
    agree,
    agree_all,
    check,
    inspect,
    toy,
    toy_reference,
    tuned,
    written,
)
from support.run import run_lines


@pytest.mark.slow
@pytest.mark.parametrize("base_dtype", FLOATS)
def test_every_combination_of_dtypes(base_dtype: str, tmp_path: Path) -> None:
    """Whatever dtypes the sides have, differences are those of the stored values, in float64."""
    base = toy(1, 2, FLOATS[base_dtype])
    fts = []
    for seed, dtype in enumerate(FLOATS.values()):
        moved = tuned({name: tensor.double() for name, tensor in base.items()}, seed, size=0.02)
        fts.append({name: tensor.to(dtype) for name, tensor in moved.items()})
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))
    for number, ft in enumerate(fts):
        check(inspect(*written(tmp_path / f"{number}", base, [ft])), toy_reference(base, [ft]))


@pytest.mark.slow
def test_dtypes_that_change_from_tensor_to_tensor(tmp_path: Path) -> None:
    """Each tensor may have its own dtype on each side."""
    dtypes = itertools.cycle(itertools.product(FLOATS.values(), FLOATS.values(), FLOATS.values()))
    base, fts = toy(4, 6), [tuned(toy(4, 6), seed) for seed in (1, 2)]
    for name in base:
        base[name], fts[0][name], fts[1][name] = (
            side[name].to(dtype) for side, dtype in zip((base, *fts), next(dtypes), strict=True)
        )
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


def powers(seed: int, low: float, high: float, dtype: torch.dtype, count: int = 301) -> torch.Tensor:
    """Values of both signs, whose exponents spread evenly."""
    random = np.random.default_rng(seed)
    values = random.choice([-1.0, 1.0], count) * np.exp2(random.uniform(low, high, count))
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("F32", 120, 127.999),
        ("F32", -149, -126),
        ("F32", -149, 127.999),
        ("BF16", -133, 127.99),
        ("F16", -24, 15.99),
        ("F64", -400, 400),
        ("F64", 300, 500),
        ("F64", -500, -300),
    ],
)
def test_magnitudes_of_all_sizes(dtype: str, low: float, high: float, tmp_path: Path) -> None:
    """From subnormal numbers to the greatest ones nothing overflows, vanishes or is rounded to float32."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    sides = [{name: powers(10 * s + i, low, high, FLOATS[dtype]) for i, name in enumerate(names)} for s in range(3)]
    base, *fts = sides
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


@pytest.mark.parametrize(("base_dtype", "ft_dtype"), [("F32", "F64"), ("F64", "F32"), ("F64", "F64"), ("F32", "BF16")])
def test_differences_that_float32_would_round(base_dtype: str, ft_dtype: str, tmp_path: Path) -> None:
    """Entries whose exponents lie far apart, and ones that nearly cancel, are subtracted in float64."""
    random = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    base = {n: (1 + torch.rand(64, generator=random, dtype=torch.float64)).to(FLOATS[base_dtype]) for n in names}
    ft = {n: (t.double() * (1 + 1e-9) + 1e-12).to(FLOATS[ft_dtype]) for n, t in base.items()}
    ft[names[1]] = torch.full((64,), 1e-30, dtype=torch.float64).to(FLOATS[ft_dtype])
    check(inspect(*written(tmp_path, base, [ft])), toy_reference(base, [ft]))


def test_zeros_of_both_signs_are_equal(tmp_path: Path) -> None:
    """An entry that went from 0.0 to -0.0 is unchanged, and no direction for signs to oppose."""
    for dtype in FLOATS.values():
        base = {f"model.layers.{i}.mlp.w": torch.tensor([0.0, -0.0, 1.0, 0.0], dtype=dtype) for i in range(2)}
        fts = [
            {name: torch.tensor(v, dtype=dtype) for name in base} for v in ([-0.0, 0.0, 2.0, 1.0], [-0.0, -0.0, 0, -1])
        ]
        told = inspect(*written(tmp_path / str(dtype), base, fts))
        check(told, toy_reference(base, fts))
        assert [one["unchanged"] for one in told["fine_tunes"]] == [0.5, 0.5]
        assert told["together"]["disagreement"] == 0.5


@pytest.mark.parametrize("exponent", [200, -200])
def test_entries_whose_squares_float64_cannot_hold(exponent: int, tmp_path: Path) -> None:
    """Where squares are beyond float64 a norm is told as it is, or not at all; never as another number."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.full((4,), 10.0**exponent, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    assert [one[key] for key in ("update_norm", "relative_norm", "scaled_norm", "first_third")] == [None] * 4
    agree([one["largest"], one["unchanged"]], [10.0**exponent, 0.0], "largest")


def test_updates_of_several_whose_squares_vanish(tmp_path: Path) -> None:
    """Of several, too, a norm whose squares float64 cannot hold is null, though the sum of squares is 0."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    fts = [{name: torch.full((4,), size, dtype=torch.float64) for name in base} for size in (1e-200, 2e-200)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    for key in ("norm_of_sum", "sum_of_norms", "scaled_norm_of_sum", "scaled_sum_of_norms"):
        assert together[key] is None, key


@pytest.mark.parametrize("bad", [1.0, math.nan])
def test_differences_beyond_float64(bad: float, tmp_path: Path) -> None:
    """A difference beyond float64 is left out as NaN is, with and without a NaN nearby."""
    top = torch.finfo(torch.float64).max
    base = {f"model.layers.{i}.mlp.w": torch.tensor([top, 1.0, 1.0], dtype=torch.float64) for i in range(2)}
    ft = {name: torch.tensor([-top, 2.0, bad], dtype=torch.float64) for name in base}
    told = inspect(*written(tmp_path / "one", base, [ft]))
    check(told, toy_reference(base, [ft]))
    one = told["fine_tunes"][0]
    assert (one["compared"]["left_out"], one["largest"]) == (4 if math.isnan(bad) else 2, 1.0)
    fts = [ft, {name: tensor + 1 for name, tensor in base.items()}]
    ref = toy_reference(base, fts)
    agree_all(inspect(*written(tmp_path / "two", base, fts))["together"], ref.joint(ref.names), "together", JOINT)


def test_a_base_whose_square_is_beyond_float64(tmp_path: Path) -> None:
    """Relative to a norm that is not told, nothing is told: null and not zero."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), 1e200, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.cat([tensor[:3], torch.tensor([0.0], dtype=torch.float64)]) for name, tensor in base.items()}
    base = {name: torch.cat([tensor[:3], torch.tensor([1e150], dtype=torch.float64)]) for name, tensor in base.items()}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    assert one["update_norm"] == pytest.approx(math.sqrt(2) * 1e150)
    assert one["relative_norm"] is None


def test_a_base_whose_squares_vanish(tmp_path: Path) -> None:
    """A base too small for its squares has no norm to be relative to."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), 1e-200, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.ones(4, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    agree([one["update_norm"], one["relative_norm"], one["scaled_relative_norm"]], [math.sqrt(8), None, None], "one")


def test_cosines_of_updates_whose_squares_are_beyond_float64(tmp_path: Path) -> None:
    """Where a norm cannot be told there is no cosine, and no sum of norms."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    fts = [{name: torch.full((4,), size, dtype=torch.float64) for name in base} for size in (1e200, 1.0)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    assert together["cosine"] == [[None, None], [None, 1.0]]
    assert [together["norm_of_sum"], together["sum_of_norms"]] == [None, None]


@pytest.mark.parametrize("alpha", ["1e153", "1e200", "-1e300"])
def test_coefficients_whose_squares_float64_cannot_hold(alpha: str, tmp_path: Path) -> None:
    """A coefficient that float64 holds is taken as it is for float64 tensors: its scaled norm is told."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.full((4,), 0.5, dtype=torch.float64) for name in base}
    told = inspect(*written(tmp_path, base, [ft]), f"--alpha={alpha}", "--beta", 0)
    one = told["fine_tunes"][0]
    expected = pytest.approx(math.sqrt(2) * abs(float(alpha)))
    assert one["scaled_norm"] == expected
    agree(one["scaled_largest"], abs(float(alpha)) / 2, "largest")


def test_a_scaled_norm_whose_squares_vanish(tmp_path: Path) -> None:
    """A scaled norm is null, and not 0.0, where float64 cannot hold its squares."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.ones(4, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]), "--alpha", 1e-200, "--beta", 0)["fine_tunes"][0]
    assert one["update_norm"] == pytest.approx(math.sqrt(8))
    assert one["scaled_largest"] == 1e-200
    assert one["scaled_norm"] != 0.0


@pytest.mark.parametrize(
    ("dtypes", "options", "refuses"),
    [
        (("F32", "F32"), ("--alpha", "1e39", "--beta", 0), True),
        (("F32", "F32"), ("--alpha", "3e38", "--beta", 0), False),
        (("BF16", "BF16"), ("--filter", "layers.1=-4e38"), True),
        (("F32", "F32"), ("--gamma", "1e20", "--alpha", "1e20", "--beta", 0), True),
        (("F64", "F64"), ("--alpha", "1e39", "--beta", 0), False),
        (("F64", "F64"), ("--alpha", "1e200", "--gamma", "1e200", "--beta", 0), True),
        (("F32", "F64"), ("--alpha", "1e39", "--beta", 0), False),
        (("F64", "F32"), ("--alpha", "1e39", "--beta", 0), False),
    ],
)
def test_coefficients_that_an_edit_refuses(
    dtypes: tuple[str, str], options: tuple[object, ...], refuses: bool, tmp_path: Path
) -> None:
    """A coefficient beyond float32, or for float64 tensors beyond float64, is refused as an edit refuses it."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=FLOATS[dtypes[0]]) for i in range(2)}
    ft = {name: torch.ones(4, dtype=FLOATS[dtypes[1]]) for name in base}
    f, _, b = written(tmp_path, base, [ft])
    edit = run_lines("edit", b, f, "-o", tmp_path / "out", "--dry-run", "--json", "--quiet", *options)
    assert edit.code == (2 if refuses else 0), edit.err
    told = run_lines("inspect", f, "--base", b, "--json", "--quiet", *options)
    assert (told.code, told.trace) == (edit.code, ""), told.err
