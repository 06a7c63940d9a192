"""NaN and Inf that are let through: the same bytes for any chunk and any number of workers, in every method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.engine.arithmetic import same_nan
from lines_cli.plan.resources import Resources
from support.files import write_checkpoint
from support.method_cases import TABLE, TYPICAL

NUMEL = 501
SIDES = ("base", "a", "b", "c")
BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def poisoned(seed: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers, among them NaN of either sign and any payload, Inf, and what overflows."""
    chance = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=chance).to(dtype)
    at = torch.randperm(numel, generator=chance)
    values[at[:20]], values[at[20:30]] = torch.inf, -torch.inf
    values[at[30:40]] = torch.finfo(dtype).max
    bits = values.view(BITS[dtype])
    exponent = int(torch.tensor(torch.inf, dtype=dtype).view(BITS[dtype]))
    payload = torch.randint(1, 100, (40,), generator=chance).to(BITS[dtype])
    bits[at[40:80]] = exponent | payload
    bits[at[80:100]] |= torch.iinfo(BITS[dtype]).min  # some of another sign
    return values


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three models, poisoned in most of their tensors."""
    folder = tmp_path_factory.mktemp("poisoned")
    for seed, side in enumerate(SIDES):
        tensors = {f"layers.{n}.w": poisoned(seed * 100 + n, NUMEL, dtype) for n, dtype in enumerate(BITS)}
        tensors["layers.3.v"] = torch.randn(NUMEL, generator=torch.Generator().manual_seed(seed))
        write_checkpoint(folder / side, tensors)
    return folder


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, marks=pytest.mark.slow if (at + turn) % 2 else ())
        for at, case in enumerate(TYPICAL)
        for turn, dtype in enumerate((None, "bfloat16"))
    ],
)
@pytest.mark.slow
def test_the_same_bytes_for_any_chunk(case: str, dtype: str | None, models: Path, tmp_path: Path) -> None:
    """Vectors and the entries behind the last whole vector give NaN of other bits: written is one."""
    method, parameters = TYPICAL[case]
    sides = SIDES[1 : 1 + (TABLE[method].models or 3)]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": str(models / side)} for side in sides]}
    recipe["base_model"] = str(models / ("a" if method == "slerp" else "base"))
    recipe |= {"parameters": dict(parameters), "allow_nonfinite": True} | ({"dtype": dtype} if dtype else {})
    recipe["lines"] = {"alpha": 0.3, "beta": 0.5}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    asked = lines.load_recipe(tmp_path / "merge.yaml")

    def merged(name: str, **resources: Any) -> bytes:
        lines.run(lines.make_plan(asked, lines.open_inputs(asked), tmp_path / name), Resources(**resources))
        return (tmp_path / name / "model.safetensors").read_bytes()

    plain = merged("plain", workers=1)
    for chunk in (13, NUMEL - 1):
        assert merged(f"by {chunk}", workers=2, chunk=chunk) == plain


@pytest.mark.parametrize("dtype", BITS)
def test_one_nan(dtype: torch.dtype) -> None:
    """Quiet, positive, without payload; no other entry is touched."""
    values = poisoned(0, 500, dtype)
    before = values.clone()
    same_nan(values)
    expected = torch.where(before.isnan(), torch.tensor(float("nan"), dtype=dtype), before)
    assert torch.equal(values.view(BITS[dtype]), expected.view(BITS[dtype]))
    assert len(set(values[values.isnan()].view(BITS[dtype]).tolist())) == 1
