"""FP8 weights are read as `code * scale`, in every format, wherever weights are; what is wrong is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.plan.resources import Resources
from support.bits import raw
from support.crossed import by_turns
from support.files import write_checkpoint
from support.fp8 import E4M3, FORMATS, LAYERS, Tensors, near, of_blocks, plain, quantise, scaled
from support.inspecting import told
from support.merging import merge
from support.run import Ran, run_lines


def coefficient(name: str, alpha: float = 0.25, beta: float = 0.5) -> torch.Tensor:
    layer = name.split(".")[2]
    exact = alpha + beta * int(layer) / (LAYERS - 1) if layer.isdigit() else alpha
    return torch.tensor(exact, dtype=torch.float64).float()


def edited(base: Tensors, ft: Tensors, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """The formula, in float32, of what is stored for float64 here; rounded once."""
    return {
        name: (base[name].float() + coefficient(name) * (ft[name].float() - base[name].float())).to(dtype)
        for name in ft
    }


def equal(found: Tensors, wanted: Tensors) -> None:
    assert sorted(found) == sorted(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@by_turns(kind=FORMATS, side=["base", "ft", "both"])
def test_an_edit_of_fp8_is_that_of_its_numbers(kind: str, side: str, tmp_path: Path) -> None:
    """Every format, as the base, as the fine-tune, as both; the output is whole, and its config says so."""
    models = {"base": plain(), "ft": near(plain(), 1)}
    whole = {name: {n: w.double() for n, w in model.items()} for name, model in models.items()}
    for name, model in models.items():
        if side in (name, "both"):
            stored = FORMATS[kind](model)
            whole[name] = stored.whole
            write_checkpoint(tmp_path / name, stored.tensors, config=stored.config, shards=2)
        else:
            write_checkpoint(tmp_path / name, model, config={"num_hidden_layers": LAYERS})
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.25, beta=0.5)
    equal(load_file(tmp_path / "out" / "model.safetensors"), edited(whole["base"], whole["ft"]))
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    said = [note for note in summary["notes"] if "stored in 8 bits" in note]
    assert len(said) == (2 if side == "both" else 1)


@pytest.mark.slow
def test_chunks_workers_and_shards_change_no_byte(tmp_path: Path) -> None:
    """Blocks are cut anywhere: within a row, a block, a row of blocks."""
    written = []
    for kind in ("blocks", "small blocks", "rows", "columns", "exponents as bytes"):
        for name, model in (("base", plain()), ("ft", near(plain(), 1))):
            stored = FORMATS[kind](model)
            write_checkpoint(tmp_path / kind / name, stored.tensors, config=stored.config)
        recipe = lines.edit_recipe(str(tmp_path / kind / "base"), str(tmp_path / kind / "ft"))
        for workers, chunk in ((1, None), (3, 3 * 997), (2, 7 * 200 + 1)):
            out = tmp_path / kind / f"{chunk}.safetensors"
            lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), out), Resources(workers, "cpu", chunk=chunk))
            written.append((kind, out.read_bytes()))
    assert len(set(written)) == 5


@pytest.mark.slow
def test_merges_of_fp8(tmp_path: Path) -> None:
    """A merge of an FP8 and a whole model on an FP8 base, by methods that measure, is that of whole models."""
    models = {"base": plain(), "a": near(plain(), 1), "b": near(plain(), 2)}
    for name, model in models.items():
        kind = {"base": "blocks", "a": "rows"}.get(name)
        stored = FORMATS[kind](model) if kind else None
        numbers = {n: w.float() for n, w in (stored.whole if stored else model).items()}
        (tmp_path / "whole").mkdir(exist_ok=True)
        write_checkpoint(tmp_path / name, stored.tensors if stored else model, config=stored and stored.config)
        write_checkpoint(tmp_path / "whole" / name, numbers, config={"num_hidden_layers": LAYERS})
    for recipe in (
        {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
        {"merge_method": "dare_linear", "parameters": {"density": 0.5, "rescale": "l1"}},
        {"merge_method": "slerp", "parameters": {"t": 0.3}, "base_model": "a"},
    ):
        out = {}
        for folder in (tmp_path, tmp_path / "whole"):
            ran = merge(folder, "--force", **{"dtype": "float32"} | recipe)
            assert ran.code == 0, ran.err
            out[folder] = load_file(folder / "out" / "model.safetensors")
        equal(out[tmp_path], out[tmp_path / "whole"])


def test_an_adapter_on_an_fp8_base(tmp_path: Path) -> None:
    """Its update is added to the numbers that the codes stand for."""
    import json

    stored = FORMATS["blocks"](plain())
    write_checkpoint(tmp_path / "base", stored.tensors, config=stored.config)
    factors, made = {}, {}
    for layer in range(LAYERS):
        a, b = torch.randn(4, 200), 0.01 * torch.randn(300, 4)
        made[f"model.layers.{layer}.q_proj.weight"] = 2.0 * (b.double() @ a.double())
        module = f"base_model.model.model.layers.{layer}.q_proj"
        factors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    write_checkpoint(tmp_path / "adapter", factors, stem="adapter_model")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=0.25, beta=0.5, dtype="float32")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        wanted = stored.whole[name]
        if name in made:
            wanted = wanted + coefficient(name).double() * made[name]
        torch.testing.assert_close(tensor.double(), wanted, rtol=3e-7, atol=1e-8)


@pytest.mark.parametrize("scales", ["blocks", "matrix", "row", "halves", "scalar"])
def test_experts_in_one_tensor(scales: str, tmp_path: Path) -> None:
    """Fused experts are a batch of matrices, each with its own scales; gate and up may have their own blocks."""
    random = torch.Generator().manual_seed(0)
    name, whole = "model.layers.{}.mlp.experts.gate_up_proj", {}
    tensors: Tensors = {"model.embed_tokens.weight": torch.randn(4, 4, generator=random)}
    for layer in range(LAYERS):
        weight = torch.randn(3, 2 * 192, 160, generator=random)
        size = {"blocks": (128, 128), "halves": (128, 128), "matrix": (384, 160), "row": (1, 160)}.get(scales)
        if scales == "halves":
            codes, scale = quantise(weight.view(6, 192, 160), (128, 128))
            numbers = (codes.double() * _wide(scale, (192, 160), (128, 128))).view(3, 384, 160)
            codes, scale = codes.view(3, 384, 160), scale.view(3, 4, 2)
        elif size is None:
            codes, scale = weight.clamp(-2, 2).to(E4M3), torch.tensor(0.3)
            numbers = codes.double() * scale.double()
        else:
            codes, scale = quantise(weight, size)
            numbers = codes.double() * _wide(scale, (384, 160), size)
        if scales == "matrix":
            scale = scale.reshape(3)
        tensors |= {name.format(layer): codes, name.format(layer) + "_scale_inv": scale}
        whole[name.format(layer)] = numbers
    said = {"quant_method": "fp8", "weight_block_size": [128, 128] if scales in ("blocks", "halves") else None}
    write_checkpoint(tmp_path / "q", tensors, config={"num_hidden_layers": LAYERS, "quantization_config": said})
    zeros = {n: torch.zeros(w.shape) for n, w in whole.items()}
    write_checkpoint(tmp_path / "zero", zeros | {"model.embed_tokens.weight": torch.zeros(4, 4)})
    lines.edit(tmp_path / "zero", tmp_path / "q", tmp_path / "out", alpha=1, beta=0, dtype="float32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for key, numbers in whole.items():
        assert torch.equal(found[key], numbers.float()), key


def _wide(scale: torch.Tensor, shape: tuple[int, int], block: tuple[int, int]) -> torch.Tensor:
    return scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., : shape[0], : shape[1]]


@pytest.mark.slow
def test_a_scale_for_each_entry_of_a_very_long_row(tmp_path: Path) -> None:
    """More scales than are held at a time in one row: they are read with the entries that they are of."""
    random = torch.Generator().manual_seed(0)
    name, width = "model.layers.{}.q_proj.weight", 150_001
    tensors, whole = {}, {}
    for layer in range(LAYERS):
        codes = torch.randint(0, 0x7E, (2, width), generator=random, dtype=torch.uint8).view(E4M3)
        scale = torch.rand(2, -(-width // 2), generator=random)
        tensors |= {name.format(layer): codes, f"{name.format(layer)}_scale_inv": scale}
        whole[name.format(layer)] = codes.double() * _wide(scale, (2, width), (1, 2))
    said = {"quant_method": "fp8", "weight_block_size": [1, 2]}
    write_checkpoint(tmp_path / "q", tensors, config={"num_hidden_layers": LAYERS, "quantization_config": said})
    write_checkpoint(tmp_path / "zero", {n: torch.zeros(w.shape) for n, w in whole.items()})
    recipe = lines.edit_recipe(str(tmp_path / "zero"), str(tmp_path / "q"), alpha=1, beta=0, dtype="float32")
    for chunk in (None, 70_000):
        out = tmp_path / f"{chunk}.safetensors"
        lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), out), Resources(2, "cpu", chunk=chunk))
        equal(load_file(out), {n: w.float() for n, w in whole.items()})


# --- what a person is told ---


def test_inspecting_fp8(tmp_path: Path) -> None:
    """Headers: what is stored, with the scales in its bytes and without them among the parameters."""
    stored = FORMATS["tensors"](plain())
    write_checkpoint(tmp_path / "q", stored.tensors, config=stored.config)
    report = told(tmp_path / "q", "--tensors")
    assert (report["quantised"], report["stored_as"]) == (None, "F8_E4M3, one scale for each tensor")
    assert report["parameters"] == sum(w.numel() for w in stored.whole.values())
    assert report["tensors"] == len(stored.whole) == len(report["map"])
    codes = [w for name, w in stored.tensors.items() if w.dtype == E4M3]
    assert report["dtypes"]["F8_E4M3"]["bytes"] == sum(w.numel() + 4 for w in codes)
    assert report["files"][0]["tensors"] == len(stored.tensors)
    assert report["files"][0]["bytes"] == sum(w.numel() * w.element_size() for w in stored.tensors.values())
    (layers,) = [stack["layers"] for stack in report["stacks"]]
    assert layers == LAYERS


def test_inspecting_fp8_against_its_whole_weights(tmp_path: Path) -> None:
    """What quantising changed is what `lines inspect --base` finds, in float64."""
    model, stored = plain(dtype=torch.float32), FORMATS["blocks"](plain(dtype=torch.float32))
    write_checkpoint(tmp_path / "whole", model, config={"num_hidden_layers": LAYERS})
    write_checkpoint(tmp_path / "q", stored.tensors, config=stored.config)
    report = told(tmp_path / "q", "--base", tmp_path / "whole")
    error = sum(float((stored.whole[n] - w.double()).square().sum()) for n, w in model.items()) ** 0.5
    assert report["fine_tunes"][0]["update_norm"] == pytest.approx(error, rel=1e-12)


def test_health_of_fp8(tmp_path: Path) -> None:
    """NaN codes, scales that are Inf, and weights that are the same, codes and scales, are found."""
    stored = FORMATS["blocks"](plain())
    tensors, name = stored.tensors, "model.layers.{}.{}.weight"
    tensors[name.format(0, "q_proj")].view(torch.uint8)[5, 5] = 0x7F
    tensors[name.format(1, "q_proj") + "_scale_inv"][0, 1] = float("inf")
    for part in ("", "_scale_inv"):
        tensors[name.format(2, "o_proj") + part] = tensors[name.format(0, "o_proj") + part].clone()
    tensors[name.format(2, "down_proj")] = tensors[name.format(0, "down_proj")].clone()  # with other scales
    write_checkpoint(tmp_path / "q", tensors, config=stored.config)
    (health,) = run_lines("inspect", tmp_path / "q", "--check", "--json").json["health"]
    bad = {row["tensor"]: (row["nan"], row["inf"]) for row in health["nonfinite"]}
    assert bad.keys() == {name.format(0, "q_proj"), name.format(1, "q_proj")}
    assert bad[name.format(0, "q_proj")] == (1, 0)
    assert {"tensor": name.format(2, "o_proj"), "as": name.format(0, "o_proj")} in health["same"]
    assert all("down_proj" not in row["tensor"] for row in health["same"])


def test_scales_of_activations_stay_behind_and_are_named(tmp_path: Path) -> None:
    """They mean nothing to whole weights."""
    stored = FORMATS["tensors"](plain())
    write_checkpoint(tmp_path / "base", stored.tensors, config=stored.config)
    write_checkpoint(tmp_path / "ft", near(plain(), 1))
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.25, beta=0.5)
    (said,) = [note for note in summary["notes"] if "scale activations" in note]
    assert f"{len(stored.beside)} tensor(s)" in said
    assert "k_proj.k_scale" in said
    assert not [name for name in load_file(tmp_path / "out" / "model.safetensors") if "scale" in name]


@pytest.mark.slow
@pytest.mark.parametrize("allow", [False, True])
def test_codes_that_are_nan_and_scales_that_are_infinite(allow: bool, tmp_path: Path) -> None:
    """The tensor, its file and the entry are named; let through, they are NaN or Inf, and no other entry changes."""
    stored, model = FORMATS["blocks"](plain()), near(plain(), 1)
    name = "model.layers.1.q_proj.weight"
    for kind in ("code", "scale"):
        tensors = {n: w.clone() for n, w in stored.tensors.items()}
        if kind == "code":
            tensors[name].view(torch.uint8)[130, 3] = 0x7F
        else:
            tensors[f"{name}_scale_inv"][1, 0] = float("inf")
        base = write_checkpoint(tmp_path / kind / "base", tensors, config=stored.config)
        ft = write_checkpoint(tmp_path / kind / "ft", model)
        flags = ["--allow-nonfinite"] if allow else []
        ran = run_lines("edit", base, ft, "-o", tmp_path / kind / "out", "--alpha", 0.25, "--beta", 0.5, *flags)
        if not allow:
            assert (ran.code, ran.trace) == (5, "")
            what = "holds NaN, first at entry 26,003" if kind == "code" else f"what {name}_scale_inv makes of tensor"
            assert what in ran.err
            assert name in ran.err
            assert "base/model.safetensors" in ran.err
            continue
        found = load_file(tmp_path / kind / "out" / "model.safetensors")[name]
        wanted = edited(stored.whole, {n: w.double() for n, w in model.items()})[name]
        bad = torch.zeros_like(wanted, dtype=torch.bool)
        bad[130, 3] = True
        if kind == "scale":
            bad[128:256, :128] = True
        assert torch.equal(~found.isfinite(), bad)
        assert torch.equal(found[~bad], wanted[~bad])


def test_scales_of_zero(tmp_path: Path) -> None:
    """They make zeros."""
    stored = FORMATS["blocks"](plain())
    name = "model.layers.1.q_proj.weight"
    stored.tensors[f"{name}_scale_inv"][0, 0] = 0.0
    stored.whole[name][:128, :128] = 0.0
    write_checkpoint(tmp_path / "base", stored.tensors, config=stored.config)
    ft = near(plain(), 1)
    write_checkpoint(tmp_path / "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.25, beta=0.5)
    wanted = edited(stored.whole, {n: w.double() for n, w in ft.items()})
    equal(load_file(tmp_path / "out" / "model.safetensors"), wanted)


# --- what contradicts itself ---


def broken(tmp_path: Path, change: Any, said: Any = None) -> Ran:
    stored = of_blocks(plain(), said=said or {"quant_method": "fp8", "weight_block_size": [128, 128]})
    change(stored.tensors)
    base = write_checkpoint(tmp_path / "base", stored.tensors, config=stored.config)
    return run_lines("edit", base, write_checkpoint(tmp_path / "ft", plain()), "-o", tmp_path / "out")


NAME = "model.layers.1.q_proj.weight"
SCALE = f"{NAME}_scale_inv"


def shaped(*shape: int, dtype: torch.dtype = torch.float32) -> Any:
    return lambda tensors: tensors.update({SCALE: torch.ones(shape).to(dtype)})


CONTRADICTIONS: dict[str, tuple[Any, Any, int, list[str]]] = {
    "a scale is missing": (lambda tensors: tensors.pop(SCALE), None, 3, [NAME, "no scale beside", "_scale_inv"]),
    "too few scales": (shaped(2, 2), None, 3, [SCALE, "[2, 2]", "[300, 200]", "128 x 128", "fp8"]),
    "too many scales": (shaped(3, 3), None, 3, [SCALE, "[3, 3]", "[300, 200]"]),
    "scales across": (shaped(2, 3), None, 3, [SCALE, "[2, 3]"]),
    "one scale where the config says blocks": (shaped(), None, 3, [SCALE, "[]", "128 x 128"]),
    "rows where the config says blocks": (shaped(300, 1), None, 3, [SCALE, "[300, 1]", "128 x 128"]),
    "scales that are integers": (shaped(3, 2, dtype=torch.int32), None, 3, [SCALE, NAME, "I32", "F8_E4M3"]),
    "scales in 8-bit floats": (shaped(3, 2, dtype=E4M3), None, 3, [SCALE, NAME, "F8_E4M3"]),
    "the config has other blocks": (
        lambda tensors: None,
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        3,
        ["_scale_inv", "64 x 64", "fp8"],
    ),
    "blocks of nothing": (
        lambda tensors: None,
        {"quant_method": "fp8", "weight_block_size": [0, 128]},
        3,
        ["config.json", "weight_block_size", "[0, 128]"],
    ),
    "blocks in words": (
        lambda tensors: None,
        {"quant_method": "fp8", "weight_block_size": "128"},
        3,
        ["weight_block_size", "'128'"],
    ),
    "zero points": (
        lambda tensors: tensors.update({f"{NAME}_zero_point": torch.ones(3, 2).to(E4M3)}),
        None,
        3,
        [f"{NAME}_zero_point", "quantised"],
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_what_contradicts_itself(case: str, tmp_path: Path) -> None:
    """Both sides are named, and nothing is written; inspecting shows what is stored."""
    change, said, code, words = CONTRADICTIONS[case]
    ran = broken(tmp_path, change, said)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    assert [word for word in words if word not in ran.err] == [], ran.err
    assert not (tmp_path / "out").exists()
    report = told(tmp_path / "base")
    assert "F8_E4M3" in report["dtypes"]
    assert report["quantised"]


HOSTILE = [
    {"quant_method": ["fp8"]},
    {"quant_method": {"a": 1}, "weight_block_size": {"b": [128, 128]}},
    {"quant_method": "fp8", "weight_block_size": [128, -128]},
    {"quant_method": "fp8", "weight_block_size": [True, 128]},
    {"quant_method": "fp8", "weight_block_size": [10**400, 128]},
    {"quant_method": "fp8", "weight_block_size": [[128], 128]},
    {"quant_method": "\x1b[31m\n", "weight_block_size": [1, 1]},
    {"config_groups": [1, 2]},
    {"config_groups": {"a": None, "b": {"weights": 7}, "c": {"weights": {"block_structure": "x" * 10**6}}}},
    {"config_groups": {"a": {"weights": {"block_structure": ["128", None], "group_size": -1}}}},
    {"config_groups": {"a": {"weights": {"block_structure": "9" * 10**5 + "x1", "group_size": 10**400}}}},
    [1],
    "fp8",
    0,
]


@by_turns(at=range(len(HOSTILE)), nested=[False, True])
def test_hostile_configs(at: int, nested: bool, tmp_path: Path) -> None:
    """Whatever a config says of quantisation, weights are read by what they are, or it is an error of one line."""
    stored = of_blocks(plain())
    said = {"quantization_config": HOSTILE[at]}
    config = {"text_config": said, "num_hidden_layers": LAYERS} if nested else said
    base = write_checkpoint(tmp_path / "base", stored.tensors, config=config)
    ran = run_lines("edit", base, write_checkpoint(tmp_path / "ft", plain()), "-o", tmp_path / "out")
    assert ran.trace == ""
    assert ran.code in (0, 3)
    assert "\x1b" not in ran.err
    assert len(ran.err) < 3_000
    assert run_lines("inspect", base, "--json").code == 0


def test_no_scale_anywhere(tmp_path: Path) -> None:
    """8-bit floats without any scale are refused by name, as before."""
    tensors = {n: w.to(E4M3) if "proj" in n else w for n, w in plain().items()}
    base = write_checkpoint(tmp_path / "base", tensors)
    ran = run_lines("edit", base, write_checkpoint(tmp_path / "ft", plain()), "-o", tmp_path / "out")
    assert (ran.code, "_proj.weight is F8_E4M3" in ran.err) == (3, True)


def test_what_is_no_scale_of_activations(tmp_path: Path) -> None:
    """A parameter of such a name in a model of whole weights is a parameter."""
    model = plain() | scaled("attn.k_scale")
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", near(model, 1))
    assert run_lines("edit", base, ft, "-o", tmp_path / "out").code == 0
    assert "model.layers.0.attn.k_scale" in load_file(tmp_path / "out" / "model.safetensors")


def test_in_memory(tmp_path: Path) -> None:
    """Tensors in memory are read as those of files."""
    stored, ft = FORMATS["exponents"](plain()), near(plain(), 1)
    found = lines.edit_state_dict(stored.tensors, ft, alpha=0.25, beta=0.5, config=stored.config)
    equal(found, edited(stored.whole, {n: w.double() for n, w in ft.items()}))
    write_checkpoint(tmp_path / "base", stored.tensors, config=stored.config)
    write_checkpoint(tmp_path / "ft", ft)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.25, beta=0.5)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {n: raw(w) for n, w in found.items()} == {n: raw(w) for n, w in written.items()}


# --- what is not read ---

U8, I8, I32, F16 = torch.uint8, torch.int8, torch.int32, torch.float16
OTHERS: dict[str, tuple[dict[str, torch.dtype], str, str]] = {
    "GPTQ": ({"qweight": I32, "qzeros": I32, "scales": F16, "g_idx": I32}, "gptq", "quantised from"),
    "AWQ": ({"qweight": I32, "qzeros": I32, "scales": F16}, "awq", "quantised from"),
    "bitsandbytes (8 bits)": ({"weight": I8, "SCB": torch.float32}, "bitsandbytes", "model.dequantize()"),
    "bitsandbytes (4 bits)": (
        {
            "weight": U8,
            "weight.absmax": U8,
            "weight.quant_map": torch.float32,
            "weight.quant_state.bitsandbytes__nf4": U8,
        },
        "bitsandbytes",
        "model.dequantize()",
    ),
    "compressed-tensors (pack-quantized)": (
        {"weight_packed": I32, "weight_scale": torch.bfloat16, "weight_shape": torch.int64},
        "compressed-tensors",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "compressed-tensors (int-quantized)": (
        {"weight": I8, "weight_scale": torch.bfloat16},
        "compressed-tensors",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "MXFP4": ({"proj_blocks": U8, "proj_scales": U8}, "mxfp4", "Mxfp4Config(dequantize=True)"),
    "NVFP4": (
        {"weight": U8, "weight_scale": E4M3, "weight_scale_2": torch.float32, "input_scale": torch.float32},
        "modelopt",
        "quantised from",
    ),
    "MLX": ({"weight": torch.uint32, "scales": F16, "biases": F16}, "", "quantised from"),
    "HQQ": ({"W_q": U8, "scale": F16, "zero": F16}, "hqq", "quantised from"),
    "8-bit floats without scales": ({"weight": E4M3}, "", "cast them to bfloat16"),
}


@by_turns(kind=OTHERS, config=[True, False])
def test_other_formats_are_named(kind: str, config: bool, tmp_path: Path) -> None:
    """With a config and as a lone file: the format, a tensor of it, and what to do."""
    parts, method, way = OTHERS[kind]
    tensors = plain()
    for layer in range(LAYERS):
        for part, dtype in parts.items():
            shape = (16, 4, 16) if part == "proj_blocks" else (16, 4)
            tensors[f"model.layers.{layer}.gate.{part}"] = torch.ones(shape).to(dtype)
    said = {"quantization_config": {"quant_method": method}} if method else {}
    base = write_checkpoint(tmp_path / "q", tensors, config=said) if config else tmp_path / "q.safetensors"
    write_checkpoint(base, tensors, config=said)
    ran = run_lines("edit", base, write_checkpoint(tmp_path / "ft", plain()), "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (3, "")
    named = kind if kind != "8-bit floats without scales" else "F8_E4M3"
    assert [word for word in (named, way, "model.layers.", "quantised") if word not in ran.err] == [], ran.err
    assert told(base)["quantised"]


def test_a_scale_for_each_row_is_not_one_for_each_block(tmp_path: Path) -> None:
    """[32, 1] beside [32, 4096] has a scale for each row, though there are 32 blocks of 128 columns."""
    torch.manual_seed(0)
    wide = {
        f"model.layers.{i}.in_proj.weight": torch.randn(32, 4096) * torch.linspace(0.1, 3, 32)[:, None] for i in (0, 1)
    }
    scales = {name: weight.abs().amax(1, keepdim=True) / 448 for name, weight in wide.items()}
    codes = {name: (weight / scales[name]).to(torch.float8_e4m3fn) for name, weight in wide.items()}
    stored = codes | {f"{name}_scale": scale for name, scale in scales.items()}
    base = write_checkpoint(tmp_path / "base", stored)
    ft = write_checkpoint(tmp_path / "ft", {name: weight.bfloat16() for name, weight in wide.items()})
    ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--alpha", 0, "--beta", 0, "--dtype", "float32")
    assert ran.code == 0, ran.err
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], codes[name].float() * scales[name]) for name in wide)
