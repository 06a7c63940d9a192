"""`--dtype fp8`: the output is stored in 8 bits as an input is, with scales of its own, and says what that cost."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import DataError, RecipeError
from lines_cli.plan.resources import Resources
from lines_cli.storage.files import NewFile
from support.crossed import by_turns
from support.files import write_checkpoint
from support.fp8 import E4M3, E5M2, FORMATS, LAYERS, Stored, Tensors, expanded, near, of_blocks, plain, quantise
from support.layouts import LAYOUTS
from support.merging import merge
from support.run import run_lines

BLOCKS = {"blocks": (128, 128), "small blocks": (64, 32), "rows": (1, 10**6), "columns": (10**6, 1)}
EDIT = {"alpha": 0.25, "beta": 0.5}


def coefficient(name: str) -> torch.Tensor:
    layer = name.split(".")[2]
    exact = 0.25 + 0.5 * int(layer) / (LAYERS - 1) if layer.isdigit() else 0.25
    return torch.tensor(exact, dtype=torch.float64).float()


def exactly(base: Mapping[str, torch.Tensor], ft: Mapping[str, torch.Tensor]) -> Tensors:
    """The formula in float32, not rounded any further."""
    return {n: base[n].float() + coefficient(n) * (ft[n].float() - base[n].float()) for n in ft}


def same(found: Tensors, wanted: Tensors) -> None:
    """Names, dtypes, shapes and bits."""
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = [x.contiguous().reshape(-1).view(torch.uint8) for x in (found[name], tensor)]
        assert torch.equal(*bits), name


def written(tmp_path: Path, side: str, stored: Stored | Tensors) -> None:
    tensors, config = (stored.tensors, stored.config) if isinstance(stored, Stored) else (stored, {"x": 1})
    write_checkpoint(tmp_path / side, tensors, config=config)


def output(tmp_path: Path, out: str = "out") -> Tensors:
    return load_file(tmp_path / out / "model.safetensors")


@by_turns(kind=FORMATS, side=["base", "ft", "both"])
@pytest.mark.slow
def test_an_edit_is_quantised_as_its_input(kind: str, side: str, tmp_path: Path) -> None:
    """Codes and scales are those of the exact result, quantised by itself; whatever else there is, is as it was."""
    models = {"base": plain(), "ft": near(plain(), 1)}
    stored = {name: FORMATS[kind](model) for name, model in models.items()}
    whole = {}
    for name, model in models.items():
        is_fp8 = side in (name, "both")
        written(tmp_path, name, stored[name] if is_fp8 else model)
        whole[name] = stored[name].whole if is_fp8 else model
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    result = exactly(whole["base"], whole["ft"])
    wanted = FORMATS[kind](result)
    found = output(tmp_path)
    norms = {n: result[n].bfloat16() for n in result if "proj" not in n}
    same(found, wanted.tensors | norms)
    like = "the base" if side == "base" else "the fine-tune"
    assert [note for note in summary["notes"] if f"as {like} does" in note]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("quantization_config") == stored["base"].config.get("quantization_config")
    assert {layer["index"] for layer in summary["layers"] if 0.005 < layer["error"] < 0.06} == set(range(LAYERS))
    assert lines.verify(tmp_path / "out").same
    assert lines.inspect(tmp_path / "out")["parameters"] == sum(w.numel() for w in result.values())


@pytest.mark.slow
def test_the_error_of_each_layer(tmp_path: Path) -> None:
    """Relative to what should be stored: the root of the mean square, over what is stored in 8 bits; printed, too."""
    base, ft = FORMATS["blocks"](plain()), near(plain(), 1)
    written(tmp_path, "base", base)
    written(tmp_path, "ft", ft)
    flags = ("--alpha", 0.25, "--beta", 0.5, "--dtype", "fp8")
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json", *flags)
    wanted = exactly(base.whole, ft)
    again = FORMATS["blocks"](wanted).whole
    for layer in ran.json["layers"]:
        of_it = [n for n in wanted if n.startswith(f"model.layers.{layer['index']}.") and "proj" in n]
        error = sum(float((again[n] - wanted[n].double()).square().sum()) for n in of_it)
        squares = sum(float(wanted[n].double().square().sum()) for n in of_it)
        assert layer["error"] == pytest.approx((error / squares) ** 0.5, rel=1e-6)
    out = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "again", *flags).out
    (line,) = [line for line in out.splitlines() if line.startswith("8-bit error")]
    assert line.split()[2:4] == ["0:", f"{ran.json['layers'][0]['error']:.2%}"]
    whole = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "whole", "--json").json
    assert not any("error" in layer for layer in whole["layers"])


@pytest.mark.parametrize(("alpha", "beta", "whose"), [(1.0, 0.0, "ft"), (0.0, 0.0, "base")])
def test_coefficients_of_0_and_1_copy_codes_and_scales(alpha: float, beta: float, whose: str, tmp_path: Path) -> None:
    """Byte for byte, even where quantising anew would give other codes; the other side may be whole."""
    for side, seed in (("base", 0), ("ft", 1)):
        stored = FORMATS["tensors"](near(plain(), seed))
        for name, codes in stored.tensors.items():  # as a calibrated scale, larger than it need be
            if codes.dtype == E4M3:
                stored.tensors[name] = (codes.float() / 3).to(E4M3)
                stored.tensors[f"{name}_scale"] = stored.tensors[f"{name}_scale"] * 3
        written(tmp_path, side, stored)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=alpha, beta=beta, dtype="fp8")
    same(output(tmp_path), load_file(tmp_path / whose / "model.safetensors"))
    assert summary["bytes"]["written"] == (tmp_path / whose / "model.safetensors").stat().st_size
    assert not any("error" in layer for layer in summary["layers"])
    assert not summary["passes"]


def test_a_layer_that_is_copied_beside_one_that_is_computed(tmp_path: Path) -> None:
    """The default ends with a coefficient of 1: that layer is the fine-tune's to the byte, and counts as 1."""
    base, ft = FORMATS["blocks"](plain()), FORMATS["blocks"](near(plain(), 1))
    written(tmp_path, "base", base)
    written(tmp_path, "ft", ft)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", alpha=0.5, beta=0.5)
    found = output(tmp_path)
    last = {n: w for n, w in ft.tensors.items() if n.startswith(f"model.layers.{LAYERS - 1}.")}
    same({n: found[n] for n in last}, last)
    assert summary["layers"][-1]["realised"] == pytest.approx(1.0, abs=1e-9)
    assert summary["layers"][0]["realised"] == pytest.approx(0.5, abs=0.05)


@pytest.mark.slow
def test_other_scales_are_no_copy(tmp_path: Path) -> None:
    """A fine-tune in rows on a base in blocks: at 1 the output has its codes; at 0 the base is quantised anew."""
    written(tmp_path, "base", base := FORMATS["blocks"](plain()))
    written(tmp_path, "ft", FORMATS["rows"](near(plain(), 1)))
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "zero", alpha=0, beta=0, dtype="fp8")
    as_rows = FORMATS["rows"]({n: w.float() for n, w in base.whole.items()}).tensors
    same(output(tmp_path, "zero"), {n: w if "proj" in n else w.bfloat16() for n, w in as_rows.items()})
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "one", alpha=1, beta=0, dtype="fp8")
    same(output(tmp_path, "one"), load_file(tmp_path / "ft" / "model.safetensors"))


@pytest.mark.slow
def test_chunks_workers_and_shards_change_no_byte(tmp_path: Path) -> None:
    """Blocks are cut anywhere, and their largest entries found in any order."""
    for kind in BLOCKS:
        written(tmp_path / kind, "base", FORMATS[kind](plain()))
        written(tmp_path / kind, "ft", near(plain(), 1))
        recipe = lines.edit_recipe(str(tmp_path / kind / "base"), str(tmp_path / kind / "ft"), dtype="fp8")
        made = set()
        for workers, chunk in ((1, None), (3, 3 * 997), (2, 7 * 200 + 1)):
            out = tmp_path / kind / f"{chunk}.safetensors"
            lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), out), Resources(workers, "cpu", chunk=chunk))
            made.add(out.read_bytes())
        assert len(made) == 1
        sharded = lines.edit(
            tmp_path / kind / "base",
            tmp_path / kind / "ft",
            tmp_path / kind / "out",
            dtype="fp8",
            max_shard_size=70_000,
        )
        assert len(sharded["files"]) > 3
        index = json.loads((tmp_path / kind / "out" / "model.safetensors.index.json").read_text())
        parts = [load_file(file) for file in sorted((tmp_path / kind / "out").glob("*.safetensors"))]
        together = {name: tensor for part in parts for name, tensor in part.items()}
        same(together, load_file(tmp_path / kind / "None.safetensors"))
        assert index["metadata"]["total_parameters"] == sum(w.numel() for w in plain().values())
        assert set(index["weight_map"]) == set(together)


@pytest.mark.slow
def test_merges(tmp_path: Path) -> None:
    """With thresholds, signs, norms and draws: what float32 would be, quantised."""
    models = {"base": plain(), "a": near(plain(), 1), "b": near(plain(), 2)}
    for name, model in models.items():
        written(tmp_path, name, FORMATS["rows"](model) if name == "b" else model)
    for recipe in (
        {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
        {"merge_method": "dare_linear", "parameters": {"density": 0.5}},
        {"merge_method": "iso_c"},
        {"merge_method": "slerp", "parameters": {"t": 0.3}, "base_model": "b", "models": ["a"]},
    ):
        made = {}
        for dtype in ("float32", "fp8"):
            ran = merge(tmp_path, "--force", "--json", **{"dtype": dtype} | recipe)
            assert ran.code == 0, ran.err
            made[dtype] = output(tmp_path)
        wanted = FORMATS["rows"](made["float32"]).tensors
        same({n: made["fp8"][n] for n in wanted if "proj" in n}, {n: w for n, w in wanted.items() if "proj" in n})


def test_float64(tmp_path: Path) -> None:
    """A fine-tune in float64 is computed in it, and rounded once to codes."""
    base = FORMATS["blocks"](plain())
    ft = {n: w.double() + 1e-9 for n, w in near(plain(), 1).items()}
    written(tmp_path, "base", base)
    written(tmp_path, "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    found = output(tmp_path)
    for name, weight in ft.items():
        if "proj" not in name:
            continue
        exact = base.whole[name] + coefficient_64(name) * (weight - base.whole[name])
        scale = found[f"{name}_scale_inv"]
        back = found[name].double() * expanded(scale, tuple(weight.shape), (128, 128))
        step = expanded(scale, tuple(weight.shape), (128, 128)) * 448
        assert float(((back - exact).abs() / step).max()) <= 16 / 448 * 1.0001
        _, largest = quantise(exact.float(), tuple(min(128, n) for n in weight.shape))
        torch.testing.assert_close(scale.reshape(-1), largest.reshape(-1), rtol=2e-7, atol=0)


def coefficient_64(name: str) -> float:
    layer = name.split(".")[2]
    return 0.25 + 0.5 * int(layer) / (LAYERS - 1) if layer.isdigit() else 0.25


EXTREMES: dict[str, Any] = {
    "zeros": torch.zeros(130, 140),
    "one entry": torch.zeros(130, 140).index_put_((torch.tensor(129), torch.tensor(139)), torch.tensor(5.0)),
    "tiny": torch.full((130, 140), 1e-40),
    "small": 1e-6 * torch.randn(130, 140, generator=torch.Generator().manual_seed(0)),
    "huge": 1e37 * torch.randn(130, 140, generator=torch.Generator().manual_seed(0)),
    "mixed": torch.randn(130, 140, generator=torch.Generator().manual_seed(0)) ** 9,
}


@by_turns(case=EXTREMES, scales=[torch.float32, torch.bfloat16, torch.float16])
def test_extremes(case: str, scales: torch.dtype, tmp_path: Path) -> None:
    """Scales are above 0 and finite; nothing becomes NaN; what is stored is within half a step, or at the end."""
    ones = {f"model.layers.{i}.q_proj.weight": torch.ones(130, 140) for i in range(LAYERS)}
    stored = of_blocks(ones, scales=scales, said={"quant_method": "fp8", "weight_block_size": [128, 128]})
    written(tmp_path, "base", stored)
    ft = {name: EXTREMES[case] * (layer + 1) for layer, name in enumerate(ones)}
    written(tmp_path, "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=1, beta=0, dtype="fp8")
    found = output(tmp_path)
    for name, exact in ft.items():
        codes, scale = found[name], found[f"{name}_scale_inv"]
        assert (scale.float() > 0).all()
        assert scale.isfinite().all()
        assert codes.float().isfinite().all()
        wide = expanded(scale, (130, 140), (128, 128))
        error = (codes.double() * wide - exact.double()).abs() / wide
        clamped = exact.double().abs() > 448 * wide * (1 + 1e-6)
        steps = (exact.double().abs() / wide).clamp(min=2.0**-6).log2().floor().exp2() * 2.0**-4
        assert bool((error[~clamped] <= steps[~clamped] * 1.001).all())
        assert not bool(clamped.any()) or scales != torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_nan_and_inf_let_through(dtype: torch.dtype, tmp_path: Path) -> None:
    """They are refused by name; let through, NaN is NaN, and Inf is Inf where codes have it; the scales stay."""
    name = "model.layers.1.q_proj.weight"
    stored = of_blocks(plain(), dtype=dtype)
    written(tmp_path, "base", stored)
    ft = near(plain(), 1)
    ft[name][3, 4], ft[name][200, 5] = torch.nan, -torch.inf
    written(tmp_path, "ft", ft)
    with pytest.raises(DataError, match=name):
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    assert not (tmp_path / "out").exists()
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", allow_nonfinite=True, **EDIT)
    found, exact = output(tmp_path), exactly(stored.whole, ft)[name]
    bad = ~exact.isfinite()
    codes, scale = quantise(exact.masked_fill(bad, 0.0), (128, 128), dtype=dtype)
    assert torch.equal(found[f"{name}_scale_inv"], scale)
    assert torch.equal(found[name].view(torch.uint8)[~bad], codes.view(torch.uint8)[~bad])
    assert found[name].float()[3, 4].isnan()
    value = found[name].float()[200, 5]
    assert value.isnan() if dtype == E4M3 else value == -torch.inf


@pytest.mark.slow
def test_what_all_inputs_share_stays(tmp_path: Path) -> None:
    """A NaN code that base and fine-tune have is no reason to refuse, and stays."""
    base, ft = FORMATS["blocks"](plain()), FORMATS["blocks"](near(plain(), 1))
    name = "model.layers.1.q_proj.weight"
    for side, stored in (("base", base), ("ft", ft)):
        stored.tensors[name].view(torch.uint8)[7, 7] = 0x7F
        written(tmp_path, side, stored)
    for dtype in ("fp8", "bfloat16"):
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype=dtype, force=True, **EDIT)
        found = output(tmp_path)[name].float()
        assert found.isnan().nonzero().tolist() == [[7, 7]]


def test_an_adapter_on_an_fp8_base(tmp_path: Path) -> None:
    """The output has the base's layout; what the adapter does not change is the base's to the byte."""
    stored = FORMATS["blocks"](plain())
    written(tmp_path, "base", stored)
    factors, whole = {}, dict(stored.whole)
    for layer in range(LAYERS):
        a, b = torch.randn(4, 200), 0.01 * torch.randn(300, 4)
        whole[f"model.layers.{layer}.q_proj.weight"] = whole[f"model.layers.{layer}.q_proj.weight"] + b @ a
        module = f"base_model.model.model.layers.{layer}.q_proj"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    write_checkpoint(tmp_path / "adapter", factors, stem="adapter_model")
    said = json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4})
    (tmp_path / "adapter" / "adapter_config.json").write_text(said)
    lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp8", **EDIT)
    found = output(tmp_path)
    same(
        {n: w for n, w in found.items() if "q_proj" not in n},
        {n: w for n, w in stored.tensors.items() if "q_proj" not in n},
    )
    for name in (n for n in whole if "q_proj" in n):
        exact = stored.whole[name] + coefficient(name).double() * (whole[name] - stored.whole[name])
        back = found[name].double() * expanded(found[f"{name}_scale_inv"], (300, 200), (128, 128))
        assert float((back - exact).norm() / exact.norm()) < 0.04


def test_names_with_a_prefix(tmp_path: Path) -> None:
    """The base's layout under the fine-tune's names; scales of activations under theirs."""
    written(tmp_path, "base", FORMATS["tensors"](plain()))
    written(tmp_path, "ft", {n.removeprefix("model."): w for n, w in near(plain(), 1).items()})
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert sorted(output(tmp_path)) == sorted(n.removeprefix("model.") for n in base)


@pytest.mark.slow
def test_files_that_say_how_weights_are_quantised(tmp_path: Path) -> None:
    """ModelOpt's hf_quant_config.json goes with an output in FP8, not with a whole one; nested configs keep theirs."""
    stored = FORMATS["tensors of modelopt"](plain())
    said = stored.config.pop("quantization_config")
    stored.config["text_config"] = {"quantization_config": said, "num_hidden_layers": LAYERS}
    written(tmp_path, "base", stored)
    (tmp_path / "base" / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    ft = FORMATS["tensors of modelopt"](near(plain(), 1))
    ft.config["text_config"] = {"num_hidden_layers": LAYERS}
    del ft.config["quantization_config"]
    write_checkpoint(tmp_path / "ft", {n: w.bfloat16() for n, w in ft.whole.items()}, config=ft.config)
    for dtype in ("fp8", None):
        summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype=dtype, force=True, **EDIT)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert (tmp_path / "out" / "hf_quant_config.json").exists() == (dtype == "fp8")
        assert config["text_config"].get("quantization_config") == (said if dtype else None)
        assert "quantization_config" not in config
        assert any("--dtype fp8" in note for note in summary["notes"]) == (dtype is None)


@pytest.mark.slow
def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    """An embedding in FP8 with other rows: its grid of scales follows."""
    for side, rows in (("base", 300), ("ft", 400)):
        model = near(plain(), rows)
        model["model.embed_tokens.q_proj"] = model.pop("model.embed_tokens.weight")
        random = torch.Generator().manual_seed(rows)
        model["model.embed_tokens.q_proj"] = torch.randn(rows, 200, generator=random)
        stored = of_blocks(model)
        stored.tensors = {
            n.replace("embed_tokens.q_proj.weight_scale", "embed_tokens.weight_scale"): w
            for n, w in stored.tensors.items()
        }
        stored.tensors = {n.replace("embed_tokens.q_proj", "embed_tokens.weight"): w for n, w in stored.tensors.items()}
        written(tmp_path, side, stored)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", resize="base", **EDIT)
    found = output(tmp_path)
    assert found["model.embed_tokens.weight"].shape == (300, 200)
    assert found["model.embed_tokens.weight_scale_inv"].shape == (3, 2)
    assert summary["layers"]


# --- what is refused ---


def test_no_layout_to_have(tmp_path: Path) -> None:
    """Nothing is guessed where no input is in FP8."""
    written(tmp_path, "base", plain())
    written(tmp_path, "ft", near(plain(), 1))
    with pytest.raises(RecipeError, match="no input is stored in FP8"):
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8")


def test_no_draws(tmp_path: Path) -> None:
    """Stochastic rounding to codes is refused, in a recipe with its line."""
    ran = run_lines("edit", "base", "ft", "-o", tmp_path / "out", "--dtype", "fp8", "--rounding", "stochastic")
    assert (ran.code, "rounding: stochastic does not go with dtype: fp8" in ran.err) == (2, True)
    recipe = {"merge_method": "linear", "models": [{"model": "a"}], "dtype": "fp8", "rounding": "stochastic"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    ran = run_lines("edit", "--adapter", "a", "-o", tmp_path / "out", "--dtype", "fp8")
    assert (ran.code, ran.trace, "not in fp8" in ran.err) == (2, "", True)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
    assert (ran.code, "line 5" in ran.err) == (2, True)


@pytest.mark.slow
def test_a_layout_that_is_not_the_outputs(tmp_path: Path) -> None:
    """Experts that the base has one by one in FP8, and the fine-tune fused: like which is it?"""
    of = LAYOUTS["qwen3_moe"]
    apart = of.apart(0)
    stored: Tensors = {}
    for name, weight in apart.items():
        stored[name] = weight
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"] = quantise(weight, (4, 3))
    said = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 3]}}
    write_checkpoint(tmp_path / "base", stored, config=of.config | said)
    write_checkpoint(tmp_path / "ft", of.together(of.apart(1)), config=of.config)
    with pytest.raises(RecipeError, match="another layout") as refused:
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8")
    assert "gate_up_proj" in refused.value.message
    ran = merge(tmp_path, dtype="fp8", models=("ft",), like="base", lines={"alpha": 0.5, "beta": 0.0})
    assert ran.code == 0, ran.err
    found = output(tmp_path)
    assert {n: w.dtype for n, w in found.items()} == {n: w.dtype for n, w in stored.items()}
    name = next(name for name in apart if "experts" in name)
    exact = 0.5 * (expanded(stored[f"{name}_scale_inv"], tuple(apart[name].shape), (4, 3)) * stored[name].double())
    exact = exact + 0.5 * of.apart(1)[name].double()
    back = found[name].double() * expanded(found[f"{name}_scale_inv"], tuple(apart[name].shape), (4, 3))
    assert float((back - exact).norm() / exact.norm()) < 0.04


# --- a run that is interrupted, planned, verified ---


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output of three digest blocks."""
    monkeypatch.chdir(tmp_path)
    for side, seed in (("base", 0), ("ft", 1)):
        random = torch.Generator().manual_seed(seed)
        model = {f"model.layers.{i}.q_proj.weight": torch.randn(1500, 1600, generator=random) for i in range(5)}
        stored = of_blocks(model)
        written(tmp_path, side, stored if side == "base" else {n: w.bfloat16() for n, w in model.items()})
    return tmp_path


@pytest.mark.durable
@pytest.mark.parametrize("after", [0, 5, 9])
@pytest.mark.slow
def test_resumed(after: int, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scales of the run before are taken, and the bytes are those of a run that was left alone."""
    flags = ("--dtype", "fp8", "--workers", 1)
    assert run_lines("edit", "base", "ft", "-o", "undisturbed", *flags).code == 0
    number, write = [0], NewFile.write

    def writing(file: NewFile, view: memoryview, offset: int) -> None:
        number[0] += 1
        if number[0] > after:
            raise KeyboardInterrupt
        write(file, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "write", writing)
        assert run_lines("edit", "base", "ft", "-o", "out", *flags).code == 130
    from lines_cli.engine import run as engine

    def not_again(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(engine, "measure_scales", not_again)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--resume", "--json", *flags)
    assert (ran.code, ran.trace) == (0, "")
    assert ran.json["resumed"] == (0 if after < 5 else 4 * 2**20 * (after // 4))
    names = ("model.safetensors", "config.json")
    assert [(large / "out" / n).read_bytes() for n in names] == [
        (large / "undisturbed" / n).read_bytes() for n in names
    ]
    assert all(0.02 < layer["error"] < 0.03 for layer in ran.json["layers"][:-1])


@pytest.mark.slow
def test_planned_and_verified(large: Path) -> None:
    """--dry-run says the pass, its bytes and the memory; verify finds a code and a scale that were changed."""
    plan = run_lines("edit", "base", "ft", "-o", "out", "--dtype", "fp8", "--dry-run", "--json").json
    (said,) = plan["passes"]
    assert said["measures"] == "FP8 scales"
    assert said["bytes"] == 5 * 1500 * 1600 * 3
    assert (
        "measure FP8 scales: 36 MB" in run_lines("edit", "base", "ft", "-o", "out", "--dtype", "fp8", "--dry-run").out
    )
    assert run_lines("edit", "base", "ft", "-o", "out", "--dtype", "fp8").code == 0
    assert run_lines("verify", "out").code == 0
    content = bytearray((large / "out" / "model.safetensors").read_bytes())
    for at, tensor in ((-5, "model.layers.4.q_proj.weight"), (1600, "weight_scale_inv")):
        changed = bytearray(content)
        changed[at] ^= 1
        (large / "out" / "model.safetensors").write_bytes(changed)
        ran = run_lines("verify", "out", "--json")
        assert ran.code == 5
        assert tensor in next(file["difference"]["tensor"] for file in ran.json["files"] if file["difference"])
    shutil.rmtree(large / "out")


@pytest.mark.slow
def test_in_memory(tmp_path: Path) -> None:
    """Tensors in memory give what files would hold; at 1 they are the fine-tune's own."""
    base, ft = FORMATS["blocks"](plain()), near(plain(), 1)
    found = lines.edit_state_dict(base.tensors, ft, config=base.config, dtype="fp8", **EDIT)
    written(tmp_path, "base", base)
    written(tmp_path, "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    same(found, output(tmp_path))
    again = FORMATS["blocks"](ft)
    own = lines.edit_state_dict(base.tensors, again.tensors, config=base.config, dtype="fp8", alpha=1, beta=0)
    assert all(own[name] is again.tensors[name] for name in own)


# --- what others make of it ---


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["blocks of compressed-tensors", "tensors", "rows"])
def test_compressed_tensors_reads_it(kind: str, tmp_path: Path) -> None:
    """Its decompressor makes of the input what lines reads, and of the output what lines says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("compressed_tensors")
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
    base, ft = FORMATS[kind](plain()), near(plain(), 1)
    said = base.config["quantization_config"]
    weights = said.get(
        "config_groups", {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}}
    )
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights["group_0"]["weights"]})
    reader = BaseCompressor.get_value_from_registry(said.get("format", "float-quantized"))
    written(tmp_path, "base", base)
    written(tmp_path, "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "zero", dtype="float32", alpha=0, beta=0)
    found, zero = output(tmp_path), output(tmp_path, "zero")
    exact = exactly(base.whole, ft)
    for name in (n for n in ft if "proj" in n):
        scale = f"{name}_scale"
        theirs = {
            n: reader.decompress({"weight": t[name], "weight_scale": _as_float(t[scale])}, scheme)["weight"]
            for n, t in (("in", base.tensors), ("out", found))
        }
        narrow = theirs["in"].dtype
        assert torch.equal(theirs["in"], zero[name].to(narrow)) or torch.allclose(
            theirs["in"].float(), zero[name], rtol=2.0**-8, atol=0
        )
        assert float((theirs["out"].double() - exact[name].double()).norm() / exact[name].double().norm()) < 0.05


def _as_float(scale: torch.Tensor) -> torch.Tensor:
    return scale.reshape(1) if scale.dim() == 0 else scale


@pytest.mark.slow
def test_transformers_loads_it(tmp_path: Path) -> None:
    """A Llama that transformers quantised, edited in FP8: it loads, and its weights are what lines says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

        torch.manual_seed(0)
        sizes = {"hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3, "vocab_size": 64}
        config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
        fp8 = transformers.FineGrainedFP8Config(weight_block_size=(128, 128))
        quantizer = type("Quantizer", (), {"quantization_config": fp8})()
        models = {}
        for side in ("base", "ft"):
            model = transformers.LlamaForCausalLM(config).bfloat16()
            state = model.state_dict()
            models[side] = state if side == "ft" else {}
            if side == "base":
                for name, weight in state.items():
                    codes = Fp8Quantize(quantizer).convert({name: weight}) if "_proj" in name else {name: weight}
                    models[side] |= codes
            model.config.save_pretrained(tmp_path / side)
            said = json.loads((tmp_path / side / "config.json").read_text())
            if side == "base":
                said["quantization_config"] = fp8.to_dict() | {"weight_block_size": [128, 128]}
            write_checkpoint(tmp_path / side, {n: w.clone() for n, w in models[side].items()}, config=said)
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype="fp8", **EDIT)
        lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "zero", dtype="float32", alpha=0, beta=0)
        found, zero = output(tmp_path), output(tmp_path, "zero")
        dequantise = Fp8Dequantize(quantizer)._dequantize_one
        for name, weight in models["base"].items():
            if weight.dtype == E4M3:
                theirs = dequantise(weight, models["base"][f"{name}_scale_inv"], torch.float32)
                assert torch.equal(theirs, zero[name])
        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, weight in found.items():
        if weight.dtype == E4M3:
            wanted = dequantise(weight, found[f"{name}_scale_inv"], torch.float32)
            torch.testing.assert_close(loaded[name].float(), wanted, rtol=2.0**-8, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8"
