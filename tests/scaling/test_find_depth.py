"""Depth is read off tensor names: real families from the case files, and what must be refused."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from lines_cli.errors import DepthError, LinesError, RecipeError
from lines_cli.scaling.find_depth import DepthMap, find_depth
from support import zoo
from support.depth_cases import CASES, PLACED, names_and_config
from support.files import write_checkpoint
from support.run import run_lines


def places(depth: DepthMap) -> dict[str, zoo.Place]:
    """The map as plain values."""
    return {name: (place.stack, place.index) for name, place in depth.places.items()}


def stacks(depth: DepthMap) -> dict[str, int]:
    """Every stack's number of layers."""
    return {stack.name: stack.layers for stack in depth.stacks}


# --- real families ---


@pytest.mark.zoo
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_of_every_family(case: zoo.Case) -> None:
    """Stack and layer of every tensor are those that the case gives by hand; what it refuses is refused."""
    names, config = names_and_config(case)
    if case.refuse:
        with pytest.raises(DepthError) as refusal:
            find_depth(names, config=config)
        assert re.search(case.refuse, f"{refusal.value.message}\n{refusal.value.hint}")
        return
    depth = find_depth(names, config=config)
    assert places(depth) == zoo.check_case(case, names)
    assert stacks(depth) == {name: len(layers) for name, layers in case.stacks.items()}


@pytest.mark.zoo
@pytest.mark.parametrize("case", PLACED, ids=str)
def test_order_of_names_does_not_matter(case: zoo.Case) -> None:
    """Files list their tensors in any order; the map is the same for all of them."""
    names, config = names_and_config(case)
    expected = find_depth(names, config=config)
    orders = [sorted(names), sorted(names, reverse=True), list(reversed(names))]
    orders += [random.Random(seed).sample(names, len(names)) for seed in range(3)]
    for order in orders:
        depth = find_depth(order, config=config)
        assert places(depth) == places(expected)
        assert stacks(depth) == stacks(expected)


@pytest.mark.zoo
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module.0.", "encoder.", "text_embedder."])
def test_a_prefix_before_all_names_does_not_matter(prefix: str) -> None:
    """A wrapper's name in front of every tensor moves none of them to another layer, whatever it is called."""
    moved = {}
    for case in PLACED:
        names, config = names_and_config(case)
        expected = {f"{prefix}{name}": index for name, (_, index) in places(find_depth(names, config=config)).items()}
        try:
            found = places(find_depth([f"{prefix}{name}" for name in names], config=config))
        except DepthError as refusal:
            moved[case.id] = refusal.message
            continue
        if {name: index for name, (_, index) in found.items()} != expected:
            moved[case.id] = "moved"
    assert not moved


# --- names met in the wild that no tiny model stands for ---


def expand(*patterns: str) -> list[str]:
    return [name for pattern in patterns for name in zoo.expand(pattern)]


LLAMA = expand(
    "model.embed_tokens.weight", "model.layers.{0..7}.{self_attn.q_proj,mlp.up_proj}.weight", "lm_head.weight"
)


@pytest.mark.parametrize(
    ("outside", "config"),
    [
        (expand("model.mtp_layers.{0..1}.{input_proj,self_attn.q_proj}.weight"), {"num_hidden_layers": 8}),
        (expand("model.mtp_layers.0.{input_proj,self_attn.q_proj}.weight"), {"num_hidden_layers": 8}),
        (expand("mtp.layers.0.{fc,self_attn.q_proj}.weight"), {"num_hidden_layers": 8}),
        (expand("model.layers.8.{eh_proj,self_attn.q_proj}.weight"), {"num_hidden_layers": 8}),
        (expand("model.layers.8.{eh_proj,self_attn.q_proj}.weight"), {"text_config": {"num_hidden_layers": 8}}),
        (expand("model.aligner.hidden_layers.0.{weight,bias}"), {"text_config": {"num_hidden_layers": 8}}),
        (expand("encoder.subsampling.layers.{0,2,3}.{weight,bias}"), {}),
        (expand("encoder.hidden_states_norms.stage{1..4}.{weight,bias}"), {}),
        (expand("backbone.hidden_states_norms.stage{2..4}.{weight,bias}"), {}),
        (expand("object_pointer_proj.layers.0.{weight,bias}"), {}),
    ],
    ids=[
        "mimo",
        "mimo_one",
        "qwen3_next",
        "deepseek",
        "nested",
        "janus",
        "parakeet",
        "mask2former",
        "dino",
        "sam2",
    ],
)
def test_what_is_numbered_but_no_layer(outside: list[str], config: Mapping[str, Any]) -> None:
    """Prediction layers, projectors, stems and per-stage norms beside a stack lie outside it."""
    depth = find_depth(LLAMA + outside, config=config)
    assert stacks(depth) == {"model.layers": 8}
    assert not set(outside) & depth.places.keys()


@pytest.mark.parametrize(
    ("names", "in_order"),
    [
        pytest.param(
            expand("audio_tower.conformer.{0..3}.{ffw_layer_start,ffw_layer_end}.{ffw_layer_1,ffw_layer_2}.weight"),
            expand("audio_tower.conformer.{0..3}.ffw_layer_end.ffw_layer_1.weight"),
            id="gemma3n_audio",
        ),
        pytest.param(
            expand("encoder.network.{0,2,4}.blocks.{0..1}.{norm,mlp}.w", "encoder.network.{1,3}.{norm,proj}.w"),
            expand("encoder.network.{0,2,4}.blocks.{0..1}.norm.w"),
            id="swiftformer",
        ),
        pytest.param(
            expand("embedding_model.layers.{0..3}.{q,k}.w", "latent_attention_model.cross_attend_blocks.{0..1}.norm.w"),
            expand("embedding_model.layers.{0..3}.q.w"),
            id="nv_embed",
        ),
        pytest.param(
            expand("model.layers.{0..3}.q.w", "model.vision_embed_tokens.img_processor.encoder.layers.{0..2}.q.w"),
            expand("model.vision_embed_tokens.img_processor.encoder.layers.{0..2}.q.w"),
            id="phi3_vision",
        ),
    ],
)
def test_the_outermost_list_of_like_parts_is_the_stack(names: list[str], in_order: list[str]) -> None:
    """The stack is the list of blocks, not the numbered parts inside one; towers count wherever they hang."""
    found = places(find_depth(names))
    assert found.keys() >= set(in_order)
    assert len({found[name][0] for name in in_order}) == 1
    indices = [found[name][1] for name in in_order]
    assert indices == sorted(set(indices))


@pytest.mark.parametrize("pattern", ["layers.{}.w", "encoder.layer_{}.w", "{}.weight"])
def test_zero_padded_numbers(pattern: str) -> None:
    """`layers.07` is the eighth layer or a refusal, never a tensor that is left outside without a word."""
    names = [pattern.format(f"{i:02d}") for i in range(12)]
    try:
        found = places(find_depth(names))
    except DepthError:
        return
    assert {name: index for name, (_, index) in found.items()} == {name: i for i, name in enumerate(names)}


# --- a part of a model ---


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (expand("model.layers.{12..23}.{q,k}.weight"), {}),
        (expand("model.layers.{12..23}.{q,k}.weight"), {"num_hidden_layers": 24}),
        (expand("model.layers.{0..11}.{q,k}.weight"), {"num_hidden_layers": 24}),
        (expand("h.{0..11}.{q,k}.weight"), {"n_layer": 24, "num_hidden_layers": 24}),
        (expand("model.layers.{0..3}.w", "model.layers.{6..7}.w"), {"num_hidden_layers": 8}),
        (expand("double_blocks.{5..18}.w", "single_blocks.{0..37}.w"), {}),
        (expand("layer{12..23}.w"), {}),
        (expand("net.{12..23}.w"), {}),
    ],
)
def test_a_part_of_a_model_is_refused(names: list[str], config: Mapping[str, Any]) -> None:
    """Depth counted over some of the layers would be wrong, so a file that lacks layers is an error."""
    with pytest.raises(DepthError, match=r"part|holds"):
        find_depth(names, config=config)


@pytest.mark.parametrize(
    ("names", "config"),
    [
        (expand("encoder.block.{0..5}.w", "decoder.block.{0..11}.w"), {"num_layers": 12, "num_decoder_layers": 12}),
        (
            expand("text_model.encoder.layers.{0..11}.w", "vision_model.encoder.layers.{0..11}.w"),
            {"text_config": {"num_hidden_layers": 12}, "vision_config": {"num_hidden_layers": 24}},
        ),
        (expand("model.layers.{0..11}.w"), {"num_hidden_layers": 4}),
    ],
)
def test_what_the_config_contradicts_is_said(names: list[str], config: Mapping[str, Any]) -> None:
    """A number of layers that the config gives to no stack is refused, or at least noted."""
    try:
        depth = find_depth(names, config=config)
    except DepthError:
        return
    assert depth.notes


# --- --layers ---

CELLS = expand("{left,right}.cell{0..2}.{w,b}", "left.cell10.{w,b}", "stem.w")


def test_layers_without_a_stack_group() -> None:
    """The number in the group `index` orders the layers, as a number; names that do not match are outside."""
    depth = find_depth(CELLS, layers=r"cell(?P<index>\d+)")
    assert [stack.layers for stack in depth.stacks] == [4]
    assert depth.places["left.cell10.w"].index == 3
    assert depth.places["right.cell1.b"].index == 1
    assert "stem.w" not in depth.places


def test_layers_with_a_stack_group() -> None:
    """The group `stack` names the stacks, and each counts its own layers."""
    depth = find_depth(CELLS, layers=r"^(?P<stack>\w+)\.cell(?P<index>\d+)\.")
    assert stacks(depth) == {"left": 4, "right": 3}
    assert places(depth)["left.cell10.w"] == ("left", 3)


def test_layers_overrules_detection_and_config() -> None:
    """What the user says goes before what the names and the config say."""
    depth = find_depth(LLAMA, config={"num_hidden_layers": 99}, layers=r"layers\.(?P<index>\d+)\.mlp")
    assert set(depth.places) == {name for name in LLAMA if ".mlp." in name}


@pytest.mark.parametrize(
    ("expression", "error", "message"),
    [
        ("cell(", RecipeError, "not a regular expression"),
        (r"cell(\d+)", RecipeError, "no group `index`"),
        (r"(?P<stack>\w+)\.cell\d", RecipeError, "no group `index`"),
        (r"(?P<index>cell\d)", RecipeError, "not a whole number"),
        (r"block(?P<index>\d+)", DepthError, "matches none"),
    ],
)
def test_layers_that_cannot_be_used(expression: str, error: type[LinesError], message: str) -> None:
    """A useless expression is refused with what is wrong with it."""
    with pytest.raises(error, match=message) as refusal:
        find_depth(CELLS, layers=expression)
    assert "--layers" in f"{refusal.value.message}{refusal.value.hint}"


# --- from the command line ---


def test_the_refusal_shows_what_was_found(tmp_path: Path) -> None:
    """Undecided depth ends with exit code 4, the numbered prefixes with counts, and the option that settles it."""
    import torch

    names = expand("cells{0..3}.{w,b}", "embeddings.{0..5}.weight")
    sides = [write_checkpoint(tmp_path / f"{s}.safetensors", {n: torch.ones(2) for n in names}) for s in ("base", "ft")]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out.safetensors")
    assert (ran.code, ran.trace) == (4, "")
    assert "embeddings: 6 tensors at 0, 1, 2, 3" in ran.err
    assert "--layers REGEX" in ran.err
    settled = run_lines(
        "edit", *sides, "-o", tmp_path / "out.safetensors", "--layers", r"^cells(?P<index>\d)", "--json"
    )
    assert settled.code == 0
    assert [stack["layers"] for stack in settled.json["stacks"]] == [4]


@pytest.mark.parametrize("flags", [["--layers", "("], ["--layers", r"(\d+)"]])
def test_an_unusable_expression_is_a_usage_error(flags: list[str], tmp_path: Path) -> None:
    """What is wrong with the command line ends with exit code 2."""
    import torch

    sides = [write_checkpoint(tmp_path / f"{s}.safetensors", {"layers.0.w": torch.ones(2)}) for s in ("base", "ft")]
    assert run_lines("edit", *sides, "-o", tmp_path / "out", *flags).code == 2


def test_one_coefficient_needs_no_depth(tmp_path: Path) -> None:
    """With beta 0 all layers are alike, so a model whose depth is unknown is edited all the same."""
    import torch
    from safetensors.torch import load_file

    tensors = {"albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight": torch.ones(3, dtype=torch.float64)}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    sides = [write_checkpoint(tmp_path / f"{s}.safetensors", t) for s, t in (("base", zeros), ("ft", tensors))]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out.safetensors", "--alpha", 0.25, "--beta", 0)
    assert ran.code == 0
    assert [tensor.tolist() for tensor in load_file(tmp_path / "out.safetensors").values()] == [[0.25] * 3]


def test_a_close_decision_is_said() -> None:
    """Where no list is called layers and a plain Sequential is taken, a note says so."""
    assert "net (3)" in " ".join(find_depth([f"net.{i}.weight" for i in (0, 2, 4)]).notes)
    assert not find_depth([f"layers.{i}.weight" for i in range(3)]).notes
