"""Two sides of one model in different layouts: what is put together of what, to the bit; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lines_cli as lines
from lines_cli.checkpoint.header import Part
from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.engine import parts as engine_parts
from lines_cli.engine.whole_tensors import Kept
from lines_cli.errors import MismatchError
from lines_cli.plan import conversions, pieces
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.relaid import as_loaded
from lines_cli.plan.tensors import SourceRange
from lines_cli.recipe.validate import edit_recipe
from support.files import write_checkpoint
from support.fp8 import quantise
from support.layouts import EXPERTS, HIDDEN, INNER, LAYERS, LAYOUTS, Layouts, Tensors, drawn, fused, turned
from support.merging import merge
from support.run import run_lines

ROOT = Path(__file__).parents[2]
QWEN = LAYOUTS["qwen3_moe"]


def same(got: Tensors, wanted: Tensors) -> None:
    assert got.keys() == wanted.keys()
    assert not [name for name in wanted if got[name].dtype != wanted[name].dtype]
    assert not [name for name in wanted if not torch.equal(got[name], wanted[name])]


def in_both_ways(of: Layouts) -> Iterator[tuple[Callable[[int], Tensors], Callable[[int], Tensors]]]:
    """How the base and the fine-tune are drawn."""

    def together(seed: int) -> Tensors:
        return of.together(of.apart(seed))

    yield together, of.apart
    yield of.apart, together


# --- the same bytes as in one layout ---


@pytest.mark.parametrize("model", LAYOUTS)
def test_an_edit_across_layouts(model: str) -> None:
    """What comes out has the fine-tune's layout, and the bytes of an edit in which both have it."""
    of = LAYOUTS[model]
    for base, ft in in_both_ways(of):
        wanted = lines.edit_state_dict(ft(0), ft(1), config=of.config)
        same(lines.edit_state_dict(base(0), ft(1), config=of.config), wanted)


@pytest.mark.parametrize("model", [name for name, of in LAYOUTS.items() if not of.needs_config])
@pytest.mark.parametrize("config", [{}, {"model_type": "of_my_own"}, {"model_type": "llama"}], ids=str)
@pytest.mark.slow
def test_without_a_config_that_says_which(model: str, config: dict[str, Any]) -> None:
    """Experts one by one and fused ones, and `gate_up_proj`, are known by their names and shapes."""
    of = LAYOUTS[model]
    for base, ft in in_both_ways(of):
        same(lines.edit_state_dict(base(0), ft(1), config=config), lines.edit_state_dict(ft(0), ft(1), config=config))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize("model", LAYOUTS)
@pytest.mark.some(6)
def test_a_coefficient_that_copies(model: str, alpha: float) -> None:
    """With 0 everywhere the output is the base in the fine-tune's layout, with 1 it is the fine-tune."""
    of = LAYOUTS[model]
    for base, ft in in_both_ways(of):
        got = lines.edit_state_dict(base(0), ft(1), alpha=alpha, beta=0.0, outside="alpha", config=of.config)
        same(got, ft(int(alpha)))


@pytest.mark.slow
def test_files_in_shards(tmp_path: Path) -> None:
    """Experts that lie in many files are read from there; verify, the dry run and inspect see the same."""
    apart, together = (
        {name: tensor.bfloat16() for name, tensor in model.items()} for model in (QWEN.apart(0), fused_qwen(1))
    )
    write_checkpoint(tmp_path / "base", apart, shards=4, config=QWEN.config)
    write_checkpoint(tmp_path / "like", fused_qwen(0, torch.bfloat16), config=QWEN.config)
    write_checkpoint(tmp_path / "ft", together, shards=2, config=QWEN.config)
    flags = ("--rounding", "stochastic", "--workers", 2)
    for base in ("base", "like"):
        ran = run_lines("edit", tmp_path / base, tmp_path / "ft", "-o", tmp_path / f"of-{base}", *flags)
        assert ran.code == 0, ran.err
    for file in sorted((tmp_path / "of-like").glob("*.safetensors")):
        assert file.read_bytes() == (tmp_path / "of-base" / file.name).read_bytes()
    said = (
        f"{3 * EXPERTS * LAYERS} tensor(s) of the base have another layout, and are read as {2 * LAYERS}, such as "
        "model.layers.0.mlp.experts.0.gate_proj.weight for model.layers.0.mlp.experts.gate_up_proj "
        "(qwen3_moe in transformers' table of layouts)"
    )
    dry = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "new", "--dry-run", *flags)
    assert said in dry.err
    verified = run_lines("verify", tmp_path / "of-base", "--json")
    assert verified.code == 0, verified.err
    assert verified.json["same"]
    told = [
        run_lines("inspect", tmp_path / "ft", "--base", tmp_path / base, "--tensors", "--json").json
        for base in ("base", "like")
    ]
    for report in told:
        for key in ("base", "merge", "seconds", "bytes_read", "health", "notes"):
            report.pop(key, None)
    assert told[0] == told[1]


def fused_qwen(seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    return QWEN.together({name: tensor.to(dtype) for name, tensor in QWEN.apart(seed).items()})


RECIPES: dict[str, dict[str, Any]] = {
    "task_arithmetic, alpha: auto": {"lines": {"alpha": "auto", "beta": 0.5}},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.3}},
    "dare_ties": {"merge_method": "dare_ties", "parameters": {"density": 0.5}, "lines": {"alpha": 0.2, "beta": 0.5}},
    "consensus, measured": {"merge_method": "consensus", "lines": {"alpha": "auto", "beta": 0.5}},
    "iso_c": {"merge_method": "iso_c"},
    "linear, without a base": {"merge_method": "linear", "base_model": None, "parameters": {"weight": 0.3}},
}


@pytest.mark.parametrize("like", ["base", "ft"])
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.slow
def test_merges_of_mixed_layouts(recipe: str, like: str, tmp_path: Path) -> None:
    """Every method gives the bytes that it gives where all have the layout of the one that the output is like."""
    said = {"like": like} | RECIPES[recipe]
    layout = {"base": QWEN.apart, "a": fused_qwen, "b": QWEN.apart, "c": fused_qwen}
    leading = layout["base" if like == "base" and "base_model" not in said else "a"]
    for folder, of in (("mixed", layout), ("alike", dict.fromkeys(layout, leading))):
        for seed, (name, draw) in enumerate(of.items()):
            write_checkpoint(tmp_path / folder / name, draw(seed), config=QWEN.config)
        ran = merge(tmp_path / folder, models="abc", **said)
        assert ran.code == 0, ran.err
    mixed, alike = (load_file(tmp_path / folder / "out" / "model.safetensors") for folder in ("mixed", "alike"))
    same(mixed, alike)


@pytest.mark.parametrize("at_once", [64 * 2**20, 100, 1])
@pytest.mark.parametrize("model", ["qwen3_vl_moe", "qwen3_moe"])
@pytest.mark.slow
def test_neither_chunks_nor_workers_change_a_byte(
    model: str, at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices are turned whole or some rows at a time, in any chunks: the bytes are the same."""
    monkeypatch.setattr(engine_parts, "TURNED_AT_ONCE", at_once)
    of = LAYOUTS[model]
    for base, ft in in_both_ways(of):
        wanted = lines.edit_state_dict(ft(0), ft(1), config=of.config)
        write_checkpoint(tmp_path / "base", base(0), config=of.config)
        write_checkpoint(tmp_path / "ft", ft(1), config=of.config)
        for workers in (1, 3):
            args = ("-o", tmp_path / "out", "--workers", workers, "--force")
            assert run_lines("edit", tmp_path / "base", tmp_path / "ft", *args).code == 0
            same(load_file(tmp_path / "out" / "model.safetensors"), wanted)


def test_what_is_turned_is_in_the_forecast_of_memory(tmp_path: Path) -> None:
    """A plan counts the matrices that are kept and those that are being turned."""
    of = LAYOUTS["qwen3_vl_moe"]
    write_checkpoint(tmp_path / "base", of.together(of.apart(0)), config=of.config)
    write_checkpoint(tmp_path / "ft", of.apart(1), config=of.config)
    recipe = edit_recipe(str(tmp_path / "base"), str(tmp_path / "ft"))
    plan = make_plan(recipe, open_inputs(recipe), tmp_path / "out")
    matrix = 2 * INNER * HIDDEN * 4
    assert plan.turned_sides == 1
    assert plan.turned_bytes(3) == (4 + 2 * 3) * matrix


# --- names, prefixes, towers ---


def test_the_language_model_of_a_larger_one_in_another_layout() -> None:
    """A fine-tune of the text alone, in the newer layout, is paired with the experts of its vision language model."""
    base = {re.sub(r"^model\.", "language_model.model.", name): tensor for name, tensor in QWEN.apart(0).items()}
    tower = drawn({f"visual.blocks.{i}.attn.qkv.weight": (6, 2) for i in range(LAYERS)}, 7)
    got = lines.edit_state_dict(base | tower, fused_qwen(1), missing="ft", config=QWEN.config)
    same(got, lines.edit_state_dict(fused_qwen(0), fused_qwen(1), config=QWEN.config))


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [r"_orig_mod.\g<0>", r"module.\g<0>", r"policy.\g<0>", r"my.own.\g<0>"])
def test_a_layout_behind_a_prefix(wrap: str) -> None:
    """Wrappers and prefixes stand before one layout and not before the other."""
    for base, ft in in_both_ways(QWEN):
        wanted = lines.edit_state_dict(ft(0), ft(1), config=QWEN.config)
        theirs = {re.sub(r"\A.*\Z", wrap, name): tensor for name, tensor in base(0).items()}
        same(lines.edit_state_dict(theirs, ft(1), config=QWEN.config), wanted)


def test_layers_of_a_draft_and_a_tied_head() -> None:
    """Experts of a layer behind the counted ones belong to it; a tied head is found beside them."""
    config = QWEN.config | {"num_hidden_layers": LAYERS - 1, "tie_word_embeddings": True}
    base, ft = QWEN.apart(0), fused_qwen(1)
    head = {"lm_head.weight": ft["model.embed_tokens.weight"] + 1}
    wanted = lines.edit_state_dict(fused_qwen(0), ft | head, config=config)
    same(lines.edit_state_dict(base, ft | head, config=config), wanted)


def test_layouts_that_change_from_layer_to_layer() -> None:
    """Of a fine-tune some layers may be in the one layout and some in the other."""

    def mixed(apart: Tensors) -> Tensors:
        """The same with the experts of one layer fused."""
        both = QWEN.together(apart)
        of_one = {name: tensor for name, tensor in both.items() if ".layers.1." in name}
        return of_one | {name: tensor for name, tensor in apart.items() if ".layers.1." not in name}

    wanted = lines.edit_state_dict(QWEN.apart(0), QWEN.apart(1), config=QWEN.config)
    for base in (QWEN.apart(0), fused_qwen(0), mixed(QWEN.apart(0))):
        same(lines.edit_state_dict(base, mixed(QWEN.apart(1)), config=QWEN.config), mixed(wanted))
    same(lines.edit_state_dict(mixed(QWEN.apart(0)), QWEN.apart(1), config=QWEN.config), wanted)


def test_the_names_of_an_older_vision_transformer() -> None:
    """Renamings of transformers alone are enough: nothing has another shape."""
    new = drawn({f"layers.{i}.{what}.weight": (4, 4) for i in range(3) for what in ("q_proj", "k_proj")}, 0)
    old = {name.replace("layers", "encoder.layer"): tensor + 1 for name, tensor in new.items()}
    old = {name.replace("q_proj", "attention.query").replace("k_proj", "attention.key"): t for name, t in old.items()}
    config = {"model_type": "vit", "architectures": ["ViTModel"]}
    back = {name: tensor + 1 for name, tensor in new.items()}
    same(lines.edit_state_dict(old, new, config=config), lines.edit_state_dict(back, new, config=config))


# --- what is refused ---


def refused(base: Tensors, ft: Tensors, config: dict[str, Any], **options: Any) -> str:
    with pytest.raises(MismatchError) as raised:
        lines.edit_state_dict(base, ft, config=config, **options)
    return f"{raised.value.message}\n{raised.value.hint}"


@pytest.mark.parametrize("config", [QWEN.config, {}], ids=["config", "none"])
@pytest.mark.parametrize("gone", ["experts.2.up_proj", "experts.4.down_proj", "experts.0.gate_proj"])
def test_an_expert_that_is_missing(gone: str, config: dict[str, Any]) -> None:
    """On either side it is an error that names it, and where the other side has it."""
    name = f"model.layers.1.mlp.{gone}.weight"
    where = "down_proj" if "down" in gone else "gate_up_proj"
    for base, ft in in_both_ways(QWEN):
        sides = [base(0), ft(1)]
        lacking = next(number for number, side in enumerate(sides) if name in side)
        del sides[lacking][name]
        said = refused(sides[0], sides[1], config)
        owner = ("base", "ft")[1 - lacking]
        assert f"{name} is not in {('base', 'ft')[lacking]}, and {owner} has it in" in said
        assert f"model.layers.1.mlp.experts.{where} [" in said
        assert "--missing-in-blocks" in said


def test_another_number_of_experts() -> None:
    """Each expert that one side has more is named, or the two shapes are."""
    fewer = {name: tensor for name, tensor in QWEN.apart(0).items() if f".experts.{EXPERTS - 1}." not in name}
    fewer = {name: tensor[: EXPERTS - 1] if name.endswith("gate.weight") else tensor for name, tensor in fewer.items()}
    said = refused(fewer, fused_qwen(1), QWEN.config)
    assert f"model.layers.0.mlp.experts.{EXPERTS - 1}.gate_proj.weight is not in base" in said
    said = refused(QWEN.apart(0), QWEN.together(fewer), QWEN.config)
    assert f"is [{EXPERTS - 1}, {2 * INNER}, {HIDDEN}] in ft" in said
    assert f"would make [{EXPERTS}, {2 * INNER}, {HIDDEN}] of it" in said


def test_shapes_that_do_not_add_up() -> None:
    """Of one expert, or of all: both sides are named with their shapes."""
    odd = QWEN.apart(0)
    odd["model.layers.2.mlp.experts.1.up_proj.weight"] = torch.zeros(INNER + 1, HIDDEN)
    said = refused(odd, fused_qwen(1), QWEN.config)
    assert "model.layers.2.mlp.experts.gate_up_proj is" in said
    assert "model.layers.2.mlp.experts.0.gate_proj.weight" in said
    wide = {name: tensor.repeat(1, 2) if ".experts." in name else tensor for name, tensor in QWEN.apart(0).items()}
    for base, ft in ((wide, fused_qwen(1)), (fused_qwen(1), wide)):
        assert "model.layers.0.mlp.experts" in refused(base, ft, QWEN.config)


def test_a_projection_that_is_missing() -> None:
    """Of a fused one all parts are needed."""
    of = LAYOUTS["phi3"]
    apart = of.apart(0)
    del apart["model.layers.1.self_attn.k_proj.weight"]
    said = refused(apart, of.together(of.apart(1)), of.config)
    assert "model.layers.1.self_attn.k_proj.weight is not in base, and ft has it in" in said


def test_experts_in_several_dtypes() -> None:
    """What is put together is of one dtype."""
    odd = QWEN.apart(0)
    odd["model.layers.2.mlp.experts.1.up_proj.weight"] = odd["model.layers.2.mlp.experts.1.up_proj.weight"].half()
    assert "several dtypes" in refused(odd, fused_qwen(1), QWEN.config)


def test_both_layouts_on_one_side() -> None:
    """Nothing is paired with one of the two and the other forgotten."""
    both = QWEN.apart(0) | fused_qwen(5)
    for base, ft in ((both, fused_qwen(1)), (both, QWEN.apart(1)), (fused_qwen(1), both), (QWEN.apart(1), both)):
        said = refused(base, ft, QWEN.config)
        assert "inside blocks" in said
        assert "experts" in said


def test_they_can_be_left_without_partners() -> None:
    """Who says how many have none gets what was asked for, and nothing else of them is paired."""
    base, ft = QWEN.apart(0), fused_qwen(1)
    del base["model.layers.1.mlp.experts.2.up_proj.weight"]
    alone = 2 * EXPERTS - 1 + 1  # of that layer the gates and ups, and what they would be
    got = lines.edit_state_dict(base, ft, config=QWEN.config, missing="ft", missing_in_blocks=alone)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    assert torch.equal(got[name], ft[name])
    wanted = lines.edit_state_dict(fused_qwen(0), ft, config=QWEN.config)
    same({other: got[other] for other in got if other != name}, {k: v for k, v in wanted.items() if k != name})


def test_a_square_one_of_an_unknown_model() -> None:
    """Where nothing says which way round experts are fused, they are not paired."""
    one = drawn({f"model.layers.{i}.mixer.experts.{e}.up_proj.weight": (4, 4) for i in range(3) for e in range(2)}, 0)
    one |= drawn({f"model.layers.{i}.norm.weight": (4,) for i in range(3)}, 1)
    names = [name for name in one if ".experts." not in name]
    both = {name: one[name] for name in names}
    for i in range(3):
        experts = [one[f"model.layers.{i}.mixer.experts.{e}.up_proj.weight"] for e in range(2)]
        both[f"model.layers.{i}.mixer.experts.up_proj"] = torch.stack(experts)
    assert "square" in refused(one, both, {"model_type": "of_my_own"})
    got = lines.edit_state_dict(one, both, alpha=0, beta=0, config={"model_type": "nemotron_h"})
    same(got, both)


@pytest.mark.slow
def test_fused_attention_of_an_unknown_model() -> None:
    """Whether its rows are query, key and value one behind the other is not known: both names are said."""
    of = LAYOUTS["phi3"]
    for config in ({}, {"model_type": "of_my_own"}):
        said = refused(of.apart(0), of.together(of.apart(1)), config)
        assert "qkv_proj.weight" in said
        assert "q_proj.weight" in said


def test_rows_that_are_permuted() -> None:
    """What transformers permutes for rotary embeddings is no renaming."""
    config = {"model_type": "kimi_k25"}
    base = drawn({f"vision_tower.encoder.blocks.{i}.wqkv.weight": (12, 4) for i in range(3)}, 0)
    names = [f"model.vision_tower.layers.{i}.attn.{one}_proj.weight" for i in range(3) for one in "qkv"]
    said = refused(base, drawn(dict.fromkeys(names, (4, 4)), 1), config)
    assert "PermuteForRope" in said
    assert "vision_tower.encoder.blocks.0.wqkv.weight" in said


# --- matrices that are turned ---


def test_a_square_matrix_is_turned_with_the_others() -> None:
    """Where 2I is H, nothing shows that gate_up_proj is turned but down_proj beside it."""

    def square(seed: int) -> Tensors:
        shapes: dict[str, tuple[int, ...]] = {}
        for i in range(LAYERS):
            experts = f"model.language_model.layers.{i}.mlp.experts."
            shapes |= {f"{experts}gate_up_proj": (3, 8, 8), f"{experts}down_proj": (3, 8, 4)}
        return drawn(shapes, seed)

    config = {"model_type": "qwen3_vl_moe"}
    wanted = lines.edit_state_dict(square(0), square(1), config=config)
    same(lines.edit_state_dict(turned(square(0)), square(1), config=config), wanted)
    same(lines.edit_state_dict(turned(square(0)), turned(square(1)), config=config), turned(wanted))


def test_a_turned_one_beside_one_that_is_not() -> None:
    """All experts of a module are stored the same way round, or nothing of it is believed."""
    of = LAYOUTS["qwen3_vl_moe"]
    odd = of.apart(0)
    name = "model.layers.1.mlp.experts.down_proj"
    odd[name] = odd[name].transpose(1, 2).contiguous()
    said = refused(odd, of.apart(1), of.config)
    assert "model.layers.1.mlp.experts.gate_up_proj is" in said
    assert "in ft, and what base has" in said


def test_turned_ones_of_an_unknown_model() -> None:
    """They do not fit, and it is said that one side may have them transposed; not how to do without them."""
    of = LAYOUTS["qwen3_vl_moe"]
    assert "transpose those of one side first" in refused(of.together(of.apart(0)), of.apart(1), {})


@pytest.mark.slow
def test_experts_one_by_one_and_turned() -> None:
    """They are put together and turned, as long as whole rows stay together; else both sides are named."""
    of = LAYOUTS["qwen3_vl_moe"]
    wanted = lines.edit_state_dict(QWEN.apart(0), QWEN.apart(1))
    same(lines.edit_state_dict(turned(fused_qwen(0)), QWEN.apart(1), config=of.config), wanted)
    said = refused(QWEN.apart(0), turned(fused_qwen(1)), of.config)
    assert "entry by entry" in said
    assert "model.layers.0.mlp.experts.gate_up_proj" in said


# --- weights that are not stored as they are ---


def in_fp8(tensors: Tensors) -> Tensors:
    """Every expert as codes, with a scale for each block."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            stored[name] = tensor.bfloat16()
            continue
        stored[name], stored[f"{name.removesuffix('.weight')}.weight_scale_inv"] = quantise(tensor, BLOCK)
    return stored


BLOCK = (4, 3)
IN_FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": list(BLOCK)}, "dtype": "bfloat16"}


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_a_base_in_fp8_and_in_another_layout(alpha: float, tmp_path: Path) -> None:
    """Each expert's codes have scales of their own: what is put together is what they stand for."""
    write_checkpoint(tmp_path / "base", in_fp8(QWEN.apart(0)), shards=2, config=QWEN.config | IN_FP8)
    apart = {name: tensor.bfloat16() for name, tensor in QWEN.apart(1).items()}
    write_checkpoint(tmp_path / "apart", apart, config=QWEN.config)
    write_checkpoint(tmp_path / "together", QWEN.together(apart), config=QWEN.config)
    for ft in ("apart", "together"):
        args = ("-o", tmp_path / f"of-{ft}", "--alpha", alpha, "--beta", 0.5 if alpha else 0, "--workers", 2)
        ran = run_lines("edit", tmp_path / "base", tmp_path / ft, *args)
        assert ran.code == 0, ran.err
    wanted, got = (load_file(tmp_path / f"of-{ft}" / "model.safetensors") for ft in ("apart", "together"))
    same(got, QWEN.together(wanted))
    assert run_lines("verify", tmp_path / "of-together").code == 0
    updates = [
        run_lines("inspect", tmp_path / ft, "--base", tmp_path / "base", "--json").json["fine_tunes"][0]
        for ft in ("apart", "together")
    ]
    assert updates[0]["update_norm"] == pytest.approx(updates[1]["update_norm"], rel=1e-12)


@pytest.mark.slow
def test_fused_experts_in_fp8_that_are_cut(tmp_path: Path) -> None:
    """A part of a quantised tensor has the scales of its own rows."""
    fused_codes = in_fp8(fused_qwen(0))
    renamed = {
        name.replace("gate_up_proj.weight_scale_inv", "gate_up_proj_scale_inv").replace(
            "down_proj.weight_scale_inv", "down_proj_scale_inv"
        ): tensor
        for name, tensor in fused_codes.items()
    }
    write_checkpoint(tmp_path / "base", renamed, config=QWEN.config | IN_FP8)
    apart = {name: tensor.bfloat16() for name, tensor in QWEN.apart(1).items()}
    write_checkpoint(tmp_path / "apart", apart, config=QWEN.config)
    write_checkpoint(tmp_path / "together", QWEN.together(apart), config=QWEN.config)
    for ft in ("apart", "together"):
        ran = run_lines("edit", tmp_path / "base", tmp_path / ft, "-o", tmp_path / f"of-{ft}")
        assert ran.code == 0, ran.err
    got, wanted = (load_file(tmp_path / f"of-{ft}" / "model.safetensors") for ft in ("apart", "together"))
    same(QWEN.together(got), wanted)


def write_adapter(path: Path, seed: int, *, dora: bool) -> None:
    """LoRA of rank 2 on the gates of some experts and on the attention; or DoRA, which rescales rows."""
    modules = {f"model.layers.{i}.mlp.experts.{e}.gate_proj": (INNER, HIDDEN) for i in range(LAYERS) for e in (0, 3)}
    modules |= {f"model.layers.{i}.self_attn.q_proj": (HIDDEN, HIDDEN) for i in range(LAYERS)}
    shapes: dict[str, tuple[int, ...]] = {}
    for module, (rows, columns) in modules.items():
        shapes[f"base_model.model.{module}.lora_A.weight"] = (2, columns)
        shapes[f"base_model.model.{module}.lora_B.weight"] = (rows, 2)
        if dora:
            shapes[f"base_model.model.{module}.lora_magnitude_vector"] = (rows,)
    path.mkdir()
    save_file(drawn(shapes, seed), path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": ["gate_proj", "q_proj"], "use_dora": dora}
    (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.slow
def test_an_adapter_on_a_base_in_another_layout(quantised: bool, dora: bool, tmp_path: Path) -> None:
    """An expert's update is not lost where experts are put together: the bytes are those of a merge in one layout."""
    stored = in_fp8(QWEN.apart(0)) if quantised else QWEN.apart(0)
    write_checkpoint(tmp_path / "other", stored, config=QWEN.config | (IN_FP8 if quantised else {}))
    write_adapter(tmp_path / "adapter", 5, dora=dora)
    for name, draw in (("apart", QWEN.apart), ("together", fused_qwen)):
        write_checkpoint(tmp_path / name, draw(2), config=QWEN.config)
        models = (f"{tmp_path / 'other'}+{tmp_path / 'adapter'}", "third")
        write_checkpoint(tmp_path / "third", draw(3), config=QWEN.config)
        ran = merge(tmp_path, models=models, out=f"of-{name}", base_model=name, lines={"alpha": 0.2, "beta": 0.4})
        assert ran.code == 0, ran.err
    wanted, got = (load_file(tmp_path / f"of-{name}" / "model.safetensors") for name in ("apart", "together"))
    same(got, QWEN.together(wanted))
    # the update itself, where base and model are of the same files
    for like in ("ft", "base"):
        recipe = {"base_model": "other", "like": like, "lines": {"alpha": 0.2, "beta": 0.4}, "dtype": "float32"}
        models = ("together", f"{tmp_path / 'other'}+{tmp_path / 'adapter'}")
        ran = merge(tmp_path, models=models, out=f"like-{like}", **recipe)
        assert ran.code == 0, ran.err
    of_ft, of_base = (load_file(tmp_path / f"like-{like}" / "model.safetensors") for like in ("ft", "base"))
    same(of_ft, QWEN.together(of_base))


def test_what_is_turned_has_to_be_stored_as_it_is(tmp_path: Path) -> None:
    """Codes that stand the other way round than the fine-tune's weights are refused by name."""
    of = LAYOUTS["qwen3_vl_moe"]
    codes = {
        name.replace("_proj.weight_scale_inv", "_proj_scale_inv"): tensor
        for name, tensor in in_fp8(of.together(of.apart(0))).items()
    }
    write_checkpoint(tmp_path / "base", codes, config=of.config | IN_FP8)
    write_checkpoint(tmp_path / "ft", of.apart(1), config=of.config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.code != 0
    assert "stored the other way round, and not as it is" in ran.err


# --- what is said of single tensors ---


def test_what_is_not_finite_is_named_as_its_file_names_it(tmp_path: Path) -> None:
    """The message names the expert, not what it is put together to."""
    base, ft = QWEN.apart(0), fused_qwen(1)
    base["model.layers.1.mlp.experts.3.up_proj.weight"][2, 1] = torch.nan
    write_checkpoint(tmp_path / "base", base, config=QWEN.config)
    write_checkpoint(tmp_path / "ft", ft, config=QWEN.config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.code != 0
    assert f"model.layers.1.mlp.experts.3.up_proj.weight holds NaN, first at entry {2 * HIDDEN + 1}" in ran.err
    of = LAYOUTS["qwen3_vl_moe"]
    odd = of.together(of.apart(0))
    odd["model.layers.1.mlp.experts.down_proj"][1, 2, 3] = torch.inf
    write_checkpoint(tmp_path / "base", odd, config=of.config)
    write_checkpoint(tmp_path / "ft", of.apart(1), config=of.config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    at = (1 * INNER + 2) * HIDDEN + 3
    assert f"model.layers.1.mlp.experts.down_proj holds Inf, first at entry {at}" in ran.err


def test_a_range_in_parts() -> None:
    """Where an entry is, and what is left behind the first ones."""
    parts = (Part(0, 6, 1, 100, (6,), (1,), "a", 0), Part(6, 4, 2, 900, (4,), (1,), "b", 3))
    source = SourceRange(1, 100, "BF16", parts=parts)
    assert source.place_of(5) == (1, "a", 5)
    assert source.place_of(7) == (2, "b", 4)
    assert source.behind(4).parts == (
        Part(0, 2, 1, 108, (2,), (1,), "a", 0),
        Part(2, 4, 2, 900, (4,), (1,), "b", 3),
    )
    assert source.behind(8)[:5] == (2, 904, "BF16", (), 8)


# --- pieces, against torch ---


@st.composite
def made(draw: st.DrawFn) -> tuple[pieces.Pieced, torch.Tensor, dict[str, torch.Tensor]]:
    """A tensor made by a few operations, of which torch does the same."""
    shape = draw(st.tuples(*[st.integers(1, 4)] * draw(st.integers(1, 3))))
    names = ["a", "b", "c"][: draw(st.integers(1, 3))]
    sources = {name: torch.arange(100 * at, 100 * at + torch.Size(shape).numel()) for at, name in enumerate(names)}
    held = [(pieces.whole(name, shape), sources[name].view(shape)) for name in names]
    if len(held) > 1 and draw(st.booleans()):
        one = pieces.stacked([piece for piece, _ in held])
        tensor = torch.stack([tensor for _, tensor in held])
    else:
        axis = draw(st.integers(0, len(shape) - 1))
        one = pieces.joined([piece for piece, _ in held], axis)
        tensor = torch.cat([tensor for _, tensor in held], axis)
    for _ in range(draw(st.integers(0, 4))):
        assert one is not None
        axis = draw(st.integers(0, tensor.dim() - 1))
        if draw(st.booleans()) and tensor.dim() > 1:
            other = draw(st.integers(0, tensor.dim() - 1))
            one, tensor = pieces.turned(one, axis, other), tensor.transpose(axis, other)
        elif draw(st.booleans()) and tensor.dim() > 1:
            number = draw(st.integers(0, tensor.shape[0] - 1))
            one, tensor = pieces.unstacked(one)[number], tensor[number]
        else:
            first = draw(st.integers(0, tensor.shape[axis] - 1))
            sizes = [first, tensor.shape[axis] - first]
            cut = pieces.cut(one, axis, sizes)
            assert cut is not None
            one, tensor = cut[1], tensor.split(sizes, axis)[1]
    assert one is not None
    return one, tensor, sources


@pytest.mark.slow
@given(made(), st.integers(0, 20), st.integers(1, 9), st.sampled_from([1, 5, 100]))
@settings(max_examples=200, deadline=None)
def test_pieces_are_what_torch_makes(
    case: tuple[pieces.Pieced, torch.Tensor, dict[str, torch.Tensor]], first: int, number: int, at_once: int
) -> None:
    """Put together, cut and turned by any few steps: every run of entries is read as torch has it."""
    one, tensor, sources = case
    assert one.shape == tuple(tensor.shape)
    found = pieces.runs(one)
    if found is None:  # only where entries of one row are apart in a way that no matrix is
        return
    names = list(sources)
    parts = [
        Part(
            run.start, run.numel, names.index(run.source), run.first * 8, run.sizes, run.strides, run.source, run.first
        )
        for run in found
    ]

    def read(file: int, view: memoryview, offset: int) -> None:
        held = bytes(sources[names[file]].untyped_storage())
        assert offset + len(view) <= len(held)
        view[:] = held[offset : offset + len(view)]

    first %= tensor.numel()
    number = min(number, tensor.numel() - first)
    view = memoryview(bytearray(number * 8))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_parts, "TURNED_AT_ONCE", at_once)
        engine_parts.read_parts(parts, first, view, 8, read, Kept(2))
    assert torch.equal(torch.frombuffer(view, dtype=torch.int64), tensor.reshape(-1)[first : first + number])


def test_a_tensor_of_very_many_short_rows_is_refused() -> None:
    """A stranger's shapes make no endless list."""
    shape = (2**21, 2, 3)
    turning = pieces.turned(pieces.whole("a", shape), 1, 2)
    assert turning is not None
    assert pieces.runs(turning) is None


# --- the table ---


def from_docs() -> ModuleType:
    spec = util.spec_from_file_location("conversions_of_docs", ROOT / "docs" / "conversions.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_the_table_is_that_of_transformers() -> None:
    """`python docs/conversions.py` writes what is there."""
    docs = from_docs()
    there = json.loads(docs.TABLE.read_text(encoding="utf-8"))
    made_now = json.loads(docs.as_text(docs.table()))
    assert made_now.pop("transformers"), "transformers says its version"
    there.pop("transformers")
    assert made_now == there, "transformers has changed: python docs/conversions.py, and look at the difference"


def test_every_rule_of_the_table_can_be_read() -> None:
    """Each model's rules are patterns; and what names alone say of a conversion, all models say alike."""
    by_names: dict[tuple[tuple[str, ...], tuple[str, ...]], set[Any]] = {}
    for rules in conversions.plain_rules():
        assert rules.renamed("model.layers.0.x.weight")
        for conversion in rules.conversions:
            assert conversion.can_be_carried_out
            sides = (conversion.sources, conversion.targets)
            texts = tuple(tuple(pattern.text.lstrip(".") for pattern in side) for side in sides)
            by_names.setdefault((texts[0], texts[1]), set()).add(conversion.operations)
    assert len(by_names) > 10
    assert not {names: ways for names, ways in by_names.items() if len(ways) > 1}


# --- against transformers ---


def _tiny() -> dict[str, tuple[str, dict[str, Any]]]:
    small = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "moe_intermediate_size": 12,
        "num_experts_per_tok": 2,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    text = small | {"num_experts": 4, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "out_hidden_size": 16}
    vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    latent = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 4}
    clip = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    clip |= {"image_size": 8, "patch_size": 4, "model_type": "clip_vision_model"}
    return {
        "mixtral": ("MixtralForCausalLM", small | {"num_local_experts": 4}),
        "qwen3_moe": ("Qwen3MoeForCausalLM", small | {"num_experts": 4}),
        "deepseek_v3": (
            "DeepseekV3ForCausalLM",
            small | latent | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        ),
        "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", {"text_config": text, "vision_config": vision}),
        "llava": (
            "LlavaForConditionalGeneration",
            {"text_config": small | {"model_type": "llama"}, "vision_config": clip, "image_token_index": 3},
        ),
        "vit": ("ViTModel", clip | {"model_type": "vit", "num_channels": 3}),
    }


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("model", _tiny())
def test_transformers_own_two_layouts(model: str, tmp_path: Path) -> None:
    """What save_pretrained writes and what state_dict holds are one model: an edit of one upon the other is the edit of
    what transformers itself loads.
    """
    import transformers

    name, config = _tiny()[model]
    cls = getattr(transformers, name)

    def build(seed: int) -> Any:
        torch.manual_seed(seed)
        module = cls(cls.config_class(**config))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        return module

    modules = build(0), build(1)
    for side, module in zip(("base", "ft"), modules, strict=True):
        module.save_pretrained(tmp_path / side)
    saved = [load_file(tmp_path / side / "model.safetensors") for side in ("base", "ft")]
    if model == "qwen3_vl_moe":  # which 5 loads as 4 wrote it, and writes as it has it
        saved = [turned(side) for side in saved]
    held = [{key: value.contiguous() for key, value in module.state_dict().items()} for module in modules]
    config_json = json.loads((tmp_path / "base" / "config.json").read_text(encoding="utf-8"))
    assert saved[0].keys() != held[0].keys() or any(saved[0][k].shape != held[0][k].shape for k in held[0])
    as_held = lines.edit_state_dict(held[0], held[1], config=config_json)
    same(lines.edit_state_dict(saved[0], held[1], config=config_json), as_held)
    as_saved = lines.edit_state_dict(held[0], saved[1], config=config_json)
    same(as_saved, lines.edit_state_dict(saved[0], saved[1], config=config_json))
    # What was edited in the layout of the files is loaded as what was edited in that of the modules.
    (tmp_path / "out").mkdir()
    save_file(as_saved, tmp_path / "out" / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "out" / "config.json").write_text(json.dumps(config_json))
    loaded = cls.from_pretrained(tmp_path / "out").state_dict()
    scaled = {key: value for key, value in as_held.items() if key in loaded}
    same({key: loaded[key] for key in scaled}, scaled)


def _more() -> dict[str, dict[str, Any]]:
    """Classes whose files and modules differ in names or layout, or whose parts' rules must not be taken for theirs."""
    small = _tiny()["mixtral"][1]
    image = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    image |= {"image_size": 8, "patch_size": 4}
    qwen = {"depth": 2, "hidden_size": 16, "num_heads": 4, "intermediate_size": 24, "out_hidden_size": 16}
    text = small | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 0]}}
    both = {"text_config": small, "vision_config": image}
    return {
        "ViTForImageClassification": image,
        "BeitForImageClassification": image,
        "Dinov2Model": image,
        "Qwen2_5_VLForConditionalGeneration": {"text_config": text, "vision_config": qwen},
        "PaliGemmaForConditionalGeneration": {
            "text_config": small | {"model_type": "gemma"},
            "vision_config": image | {"model_type": "siglip_vision_model"},
        },
        "CLIPModel": both,
        "CLIPTextModelWithProjection": small,
        "CLIPVisionModelWithProjection": image,
        "SiglipForImageClassification": both,
        "GPTNeoXForCausalLM": small,
        "LlamaForCausalLM": small,
        "Ernie4_5_MoeForCausalLM": small | {"moe_num_experts": 4, "moe_k": 2},
        "SegformerForSemanticSegmentation": {
            "hidden_sizes": [8, 8],
            "num_attention_heads": [1, 2],
            "depths": [1, 1],
            "sr_ratios": [2, 1],
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "mlp_ratios": [2, 2],
            "num_encoder_blocks": 2,
        },
    }


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("name", [*(name for name, _ in _tiny().values()), *_more()])
def test_what_modules_hold_is_what_transformers_loads(name: str, tmp_path: Path) -> None:
    """Names and shapes: of the files that save_pretrained writes, and of what its state_dict holds, which stays."""
    import transformers

    config = _more().get(name) or next(config for one, config in _tiny().values() if one == name)
    cls = getattr(transformers, name)
    module = cls(cls.config_class(**config))
    module.save_pretrained(tmp_path / "saved")
    wanted = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    (tmp_path / "held").mkdir()
    held = {key: value.clone() for key, value in module.state_dict().items()}
    save_file(held, tmp_path / "held" / "model.safetensors")
    module.config.save_pretrained(tmp_path / "held")
    for side in ("saved", "held"):
        checkpoint = open_checkpoint(tmp_path / side)
        loaded = as_loaded(checkpoint, json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8")))
        found = {key: stored.info.shape for key, stored in loaded.checkpoint.tensors.items()}
        assert found.items() <= wanted.items()
        assert not loaded.problems
        assert len(found) >= len(wanted) - 2  # of weights that are tied, one


def test_fused_is_what_the_models_code_reads() -> None:
    """The helper of these tests agrees with a product of matrices: expert e of [E, 2I, H] has its gate first."""
    apart = QWEN.apart(0)
    both = fused(apart, "gate_proj", "up_proj", "down_proj")["model.layers.0.mlp.experts.gate_up_proj"]
    x = torch.randn(HIDDEN)
    gate, up = (both[3] @ x).chunk(2)
    assert torch.allclose(gate, apart["model.layers.0.mlp.experts.3.gate_proj.weight"] @ x)
    assert torch.allclose(up, apart["model.layers.0.mlp.experts.3.up_proj.weight"] @ x)
