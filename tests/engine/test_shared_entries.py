"""Equal is equal: entries that all inputs share stay as they are, NaN and Inf too; and what is said of inputs
that differ in nothing, or of variances below zero.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.plan.resources import Resources
from support.files import write_checkpoint
from support.method_cases import TABLE, TYPICAL
from support.run import run_lines

INF = float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def mask(dtype: torch.dtype) -> torch.Tensor:
    """Like a causal mask: -inf above the diagonal; and a NaN with a payload, an Inf."""
    found = torch.triu(torch.full((9, 9), -INF), 1).to(dtype)
    found[4, 1] = INF
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    quiet = torch.tensor(INF, dtype=dtype).view(bits) | (1 << {2: 6, 4: 22, 8: 51}[dtype.itemsize])
    found.view(bits)[5, 2] = (quiet if dtype != torch.float16 else torch.tensor(0x7E00, dtype=bits)) + 1
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.fixture
def sides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, torch.Tensor]]:
    """A base and three models, each with a mask of every dtype in each layer, which is the same in all."""
    monkeypatch.chdir(tmp_path)
    found = {}
    for seed, side in enumerate(("base", "a", "b", "c")):
        chance = torch.Generator().manual_seed(seed)
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(4):
            tensors[f"layers.{layer}.w"] = torch.randn(9, 9, generator=chance)
            tensors[f"layers.{layer}.mask"] = mask(DTYPES[layer])
        write_checkpoint(tmp_path / side, tensors)
        found[side] = tensors
    return found


@pytest.mark.parametrize("case", TYPICAL)
@pytest.mark.slow
def test_what_all_share_stays(case: str, sides: dict[str, dict[str, torch.Tensor]]) -> None:
    """In every method, whatever passes it needs, for every coefficient and chunk."""
    method, parameters = TYPICAL[case]
    models = [{"model": side} for side in ("a", "b", "c")[: TABLE[method].models or 3]]
    recipe: dict[str, Any] = {"merge_method": method, "models": models, "parameters": dict(parameters)}
    recipe["base_model"] = "a" if method == "slerp" else "base"
    recipe["lines"] = {"alpha": 0.0, "beta": 1.0}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", "merge.yaml", "-o", "out")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert "the same in all inputs; these entries stay as they are" in ran.err
    out = load_file("out/model.safetensors")
    for layer in range(4):
        name = f"layers.{layer}.mask"
        assert same_bits(out[name], sides["base"][name]), name
        assert out[f"layers.{layer}.w"].isfinite().all()
    asked = lines.load_recipe(Path("merge.yaml"))
    lines.run(lines.make_plan(asked, lines.open_inputs(asked), Path("again")), Resources(workers=2, chunk=13))
    assert Path("out/model.safetensors").read_bytes() == Path("again/model.safetensors").read_bytes()


@pytest.mark.slow
def test_an_edit(sides: dict[str, dict[str, torch.Tensor]]) -> None:
    """With coefficients from 0, a copy of the base, to 1, a copy of the fine-tune; and written as another dtype."""
    assert run_lines("edit", "base", "a", "-o", "out", "--alpha", "0", "--beta", "1").code == 0
    out = load_file("out/model.safetensors")
    assert all(same_bits(out[name], tensor) for name, tensor in sides["base"].items() if name.endswith("mask"))
    assert run_lines("edit", "base", "a", "-o", "half", "--dtype", "float16").code == 0
    for name, tensor in load_file("half/model.safetensors").items():
        expected = sides["base"][name].to(torch.float16)
        if name.endswith("mask"):
            assert torch.equal(tensor.nan_to_num(7, 8, 9), expected.nan_to_num(7, 8, 9))
    assert run_lines("verify", "out").code == 0


@pytest.mark.parametrize("value", [float("nan"), INF, -INF])
@pytest.mark.parametrize("layer", [0, 2, 3])
def test_what_one_has_alone_is_refused(
    value: float, layer: int, sides: dict[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Also where it stands beside entries that all share, where the other has another of them, and in a copy."""
    tensors = dict(sides["a"])
    changed = tensors[f"layers.{layer}.mask"].clone()
    changed[8, 0] = value
    write_checkpoint(tmp_path / "a", tensors | {f"layers.{layer}.mask": changed})
    ran = run_lines("edit", "base", "a", "-o", "out", "--alpha", "0", "--beta", "1")
    assert (ran.code, ran.trace) == ((0, "") if layer == 0 else (5, "")), ran.err  # there the base is copied
    if layer:
        assert f"tensor layers.{layer}.mask holds {'NaN' if math.isnan(value) else 'Inf'}, first at entry 72" in ran.err
    Path("merge.yaml").write_text("merge_method: linear\nmodels: [{model: a}]\nparameters: {weight: 1.0}\n")
    ran = run_lines("merge", "--config", "merge.yaml", "-o", "alone")
    assert ran.code == 5  # one input shares nothing


@pytest.mark.slow
def test_a_fine_tune_that_is_its_base(sides: dict[str, dict[str, torch.Tensor]]) -> None:
    """It is said, by name; and of none that differs in one entry."""
    ran = run_lines("edit", "base", "base", "-o", "out", "--json")
    assert ran.code == 0
    assert "base is the base: none of the entries that were merged differs" in ran.err
    assert ran.json["unchanged"] == ["base"]
    Path("merge.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: same}]\nparameters: {density: 0.5}\n"
    )
    write_checkpoint(Path("same"), sides["base"])
    assert run_lines("merge", "--config", "merge.yaml", "-o", "merged", "--json").json["unchanged"] == ["./same"]
    last = sides["base"]["layers.2.w"].clone()
    last[8, 8] += 1
    write_checkpoint(Path("same"), sides["base"] | {"layers.2.w": last})
    assert run_lines("merge", "--config", "merge.yaml", "-o", "other", "--json").json["unchanged"] == []


@pytest.mark.parametrize("name", ["bn.running_var", "bn.moving_variance"])
def test_a_variance_below_zero(name: str, tmp_path: Path) -> None:
    """Coefficients that add up to more than 1 push it there; it is said, with the tensor and the least entry."""
    for side, value in (("base", 1.0), ("a", 0.4), ("b", 0.3)):
        tensors = {f"layers.{i}.conv.weight": torch.full((2, 2), value) for i in range(4)}
        tensors |= {f"layers.{i}.{name}": torch.full((2,), value) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors)
    models = "".join(f"  - model: {tmp_path / side}\n" for side in "ab")
    recipe = f"merge_method: task_arithmetic\nbase_model: {tmp_path / 'base'}\nmodels:\n{models}"
    (tmp_path / "m.yaml").write_text(recipe)
    ran = run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out", "--json")
    assert ran.code == 0
    assert ran.json["negative_variances"] == {f"layers.{i}.{name}": pytest.approx(-0.3) for i in range(4)}
    assert f"layers.0.{name} is a variance and has entries below 0" in ran.err
    assert "conv.weight" not in ran.err


# --- masks that the sides write differently ---

LEAST = {str(dtype)[6:]: torch.finfo(dtype).min for dtype in (torch.float32, torch.bfloat16, torch.float16)}


def causal(hides: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A causal mask that hides with this number."""
    return torch.triu(torch.full((1, 1, 9, 9), hides), 1).to(dtype)


def write_masked(side: str, seed: int, mask: torch.Tensor) -> None:
    """A model of four layers, each with the mask; and with a bias whose name ends as a mask's might."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(4):
        tensors[f"h.{layer}.attn.c_attn.bias"] = torch.randn(9, generator=chance)
        tensors[f"h.{layer}.attn.bias"] = mask.clone()
    write_checkpoint(Path(side), tensors)


@pytest.mark.parametrize(
    ("base", "ft", "rule"),
    [
        (causal(-INF), causal(LEAST["float32"]), "keep"),
        (causal(LEAST["bfloat16"]), causal(-INF), "base"),
        (causal(-INF, torch.float16), causal(LEAST["float16"], torch.float16), "keep"),
        (causal(LEAST["float32"]), causal(LEAST["bfloat16"], torch.bfloat16), "keep"),  # beyond bfloat16, rounded
        (causal(-INF, torch.bfloat16), causal(LEAST["bfloat16"], torch.bfloat16), "keep"),
    ],
    ids=["base -inf", "fine-tune -inf", "halves", "two least numbers", "bfloat16"],
)
def test_a_mask_that_is_written_differently(
    base: torch.Tensor, ft: torch.Tensor, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The filter that takes the finite side's is named, for all layers; it does, and leaves the other bias alone."""
    monkeypatch.chdir(tmp_path)
    write_masked("base", 0, base)
    write_masked("ft", 1, ft)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--alpha", "0.2", "--beta", "0.7")
    assert (ran.code, f"--filter .attn.bias={rule} takes" in ran.err) == (5, True), ran.err
    assert not Path("out").exists()
    options = ("--alpha", "0.2", "--beta", "0.7", "--filter", f".attn.bias={rule}")
    assert run_lines("edit", "base", "ft", "-o", "out", *options).code == 0
    out = load_file("out/model.safetensors")
    expected = (base if rule == "base" else ft).to(ft.dtype)
    for layer in range(4):
        assert same_bits(out[f"h.{layer}.attn.bias"], expected)
        trained = f"h.{layer}.attn.c_attn.bias"
        assert not torch.equal(out[trained], load_file("ft/model.safetensors")[trained])


@pytest.mark.parametrize("method", ["task_arithmetic", "iso_c"])
def test_such_a_mask_in_a_merge(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe's filter is named, which takes the base's."""
    monkeypatch.chdir(tmp_path)
    write_masked("base", 0, causal(LEAST["float32"]))
    write_masked("a", 1, causal(LEAST["float32"]))
    write_masked("b", 2, causal(-INF))
    recipe: dict[str, Any] = {"merge_method": method, "base_model": "base", "models": [{"model": s} for s in "ab"]}
    recipe["lines"] = {"alpha": 0.2, "beta": 0.7}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", "merge.yaml", "-o", "out")
    assert (ran.code, 'lines.filter: {".attn.bias": base} takes' in ran.err) == (5, True), ran.err
    recipe["lines"]["filter"] = {".attn.bias": "base"}
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    assert run_lines("merge", "--config", "merge.yaml", "-o", "out").code == 0
    assert load_file("out/model.safetensors")["h.2.attn.bias"].isfinite().all()


@pytest.mark.slow
def test_a_weight_is_no_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a mask is said of weights, of what is NaN, and of what is in no dtype of the output finite."""
    monkeypatch.chdir(tmp_path)
    write_masked("base", 0, torch.randn(1, 1, 9, 9))
    for bad in (causal(float("nan")), causal(-INF), torch.randn(1, 1, 9, 9) / 0):
        write_masked("ft", 1, bad)
        ran = run_lines("edit", "base", "ft", "-o", "out")
        assert (ran.code, "mask" in ran.err, "--allow-nonfinite" in ran.err) == (5, False, True), ran.err
    write_masked("base", 0, causal(-INF))
    write_masked("ft", 1, -causal(-INF))
    ran = run_lines("edit", "base", "ft", "-o", "out")
    assert (ran.code, "--filter" in ran.err) == (5, False), ran.err
