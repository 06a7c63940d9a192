"""Depth is read off tensor names: real families from the case files, and what must be refused."""

from __future__ import annotations

import random
import re
import shlex
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import lines_cli as lines
from lines_cli.errors import DepthError, LinesError, RecipeError
from lines_cli.recipe.yaml_file import load_recipe
from lines_cli.scaling.find_depth import DepthMap, find_depth
from lines_cli.scaling.numbered_lists import read_lists
from support import zoo
from support.depth_cases import CASES, PLACED, names_and_config, saved
from support.files import write_checkpoint
from support.run import run_lines


def places(depth: DepthMap) -> dict[str, zoo.Place]:
    """The map as plain values."""
    return {name: (place.stack, place.index) for name, place in depth.places.items()}


def stacks(depth: DepthMap) -> dict[str, int]:
    """Every stack's number of layers."""
    return {stack.name: stack.layers for stack in depth.stacks}


# --- real families ---


@pytest.mark.some(8)
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


@pytest.mark.some(30)
@pytest.mark.zoo
@pytest.mark.parametrize("case", PLACED, ids=str)
@pytest.mark.parametrize("more", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two", "four more"])
def test_order_of_names_does_not_matter(case: zoo.Case, more: bool) -> None:
    """Files list their tensors in any order; the map is the same for all of them."""
    names, config = names_and_config(case)
    expected = find_depth(names, config=config)
    orders = [sorted(names), random.Random(0).sample(names, len(names))]
    if more:
        orders = [sorted(names, reverse=True), list(reversed(names))]
        orders += [random.Random(seed).sample(names, len(names)) for seed in range(1, 4)]
    for order in orders:
        depth = find_depth(order, config=config)
        assert places(depth) == places(expected)
        assert stacks(depth) == stacks(expected)


PREFIXES = ["module.", "_orig_mod.", "model.", "module.0.", "encoder.", "text_embedder."]


@pytest.mark.slow
@pytest.mark.zoo
@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, len(PREFIXES)))])
def test_a_prefix_before_all_names_does_not_matter(turn: int) -> None:
    """A wrapper's name in front of every tensor moves none of them to another layer, whatever it is called."""
    moved = {}
    for at, case in enumerate(PLACED):
        prefix = PREFIXES[(at + turn) % len(PREFIXES)]
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


@pytest.mark.slow
def test_names_are_read_together_as_each_is_read_alone() -> None:
    """Beginnings that names share are read once: what each is counted in does not depend on those before it."""
    choice = random.Random(0).choice
    words = ["0", "1", "07", "1234567", "layers", "layer1", "layer_2", "b3", "res2", "block1-2", "", "x\n1", "w", "²"]
    for _ in range(200):
        lengths = (choice([1, 2, 3, 4, 6, 9, 70]) for _ in range(12))
        names = [choice("./").join(choice(words) for _ in range(length)) for length in lengths]
        names = list(dict.fromkeys([*names, *(f"{name}.{last}" for name in names for last in ("w", "3.w", "w"))]))
        together = read_lists([*names, "?"])
        alone = {name: read_lists([name, "?"]) for name in names}
        expected = {
            (prefix, index, tail, name)
            for name, lists in alone.items()
            for prefix, one in lists.items()
            for index, tails in one.tails.items()
            for tail, _ in tails
            if one.numbered == together[prefix].numbered
        }
        got = [
            (prefix, index, *held)
            for prefix, one in together.items()
            for index, tails in one.tails.items()
            for held in tails
        ]
        assert set(got) == expected
        assert len(got) == len(expected)


@pytest.mark.slow
def test_a_thousand_towers() -> None:
    """Each is a stack of its own; comparing every list with every other, again and again, took minutes."""
    letters = [f"t{a}{b}" for a in string.ascii_letters[:32] for b in string.ascii_letters[:32]]
    names = [f"{tower}.layers.{i}.{part}.w" for tower in letters for i in range(2) for part in ("norm", "mlp")]
    depth = find_depth(names)
    assert stacks(depth) == {f"{tower}.layers": 2 for tower in letters}


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


def test_layers_with_two_numbers() -> None:
    """Stage and block order the layers together; what only has a stage's number opens the stage's first block."""
    names = expand("net.s{2..3}.b{0..10}.w", "net.s3.down.w", "net.s4.w", "stem.w")
    depth = find_depth(names, layers=r"s(?P<index>\d+)\.(?:b(?P<index2>\d+))?")
    assert stacks(depth) == {"layers": 23}
    in_order = [f"net.s{s}.b{b}.w" for s in (2, 3) for b in range(11)]
    assert [places(depth)[name][1] for name in in_order] == list(range(22))
    assert places(depth)["net.s3.down.w"] == ("layers", 11)
    assert places(depth)["net.s4.w"] == ("layers", 22)


# --- --series, --not-layers ---

VAE = expand(
    "encoder.down.{0..1}.block.{0..1}.{norm,conv}.w",
    "encoder.mid.{attn,conv}.w",
    "decoder.mid.{attn,conv}.w",
    "decoder.up.{0..1}.block.{0..1}.{norm,conv}.w",
    "connector.layers.{0..2}.{q,k}.w",
)
UP_BACKWARDS = expand("decoder.up.{1,0}.block.{0..1}.norm.w")
ENCODER = [*expand("encoder.down.{0..1}.block.{0..1}.norm.w"), "encoder.mid.attn.w"]


def in_order(depth: DepthMap, stack: str) -> list[list[str]]:
    """The tensors of each layer of a stack."""
    layers: list[list[str]] = [[] for _ in range(depth.layers[stack])]
    for name, place in depth.places.items():
        if place.stack == stack:
            layers[place.index].append(name)
    return layers


@pytest.mark.parametrize(
    ("series", "expected"),
    [
        (["encoder", "connector.layers"], [*ENCODER, *expand("connector.layers.{0..2}.q.w")]),
        (["connector", "encoder"], [("connector.layers.0.q.w", "connector.layers.2.k.w"), *ENCODER]),
        (["decoder.mid", "reversed(decoder.up)"], ["decoder.mid.conv.w", *UP_BACKWARDS]),
        (["reversed(encoder)"], ENCODER[::-1]),
        ([" encoder.down ", "reversed( decoder.up )"], [*ENCODER[:4], *UP_BACKWARDS]),
    ],
    ids=str,
)
def test_a_series_joins_what_it_names(series: list[str], expected: list[Any]) -> None:
    """Stacks, numbered lists and modules, found or not, in the order given; what is reversed runs against its numbers,
    and the blocks of a stage in theirs.
    """
    depth = find_depth(VAE, series=[series])
    joined = depth.places[expected[-1]].stack
    for layer, names in zip(in_order(depth, joined), expected, strict=True):
        assert set(layer) >= ({names} if isinstance(names, str) else set(names))


def test_what_a_series_leaves_of_a_stack_stays_one() -> None:
    """A list that is taken out of a joined stack leaves the rest, under the rest of its name."""
    assert stacks(find_depth(VAE, series=[["reversed(encoder.down)"]])) == {
        "encoder.down": 4,
        "encoder.mid": 1,
        "decoder.mid+decoder.up": 5,
    }


def test_a_series_joins_what_an_expression_found() -> None:
    """With --layers, a series names the stacks that the expression gives."""
    depth = find_depth(CELLS, layers=r"^(?P<stack>\w+)\.cell(?P<index>\d+)\.", series=[["right", "reversed(left)"]])
    assert stacks(depth) == {"right+left": 7}
    assert places(depth)["right.cell0.w"] == ("right+left", 0)
    assert places(depth)["left.cell10.w"] == ("right+left", 3)
    assert places(depth)["left.cell0.w"] == ("right+left", 6)


@pytest.mark.parametrize(
    ("series", "message"),
    [
        ([["nope"]], "names no stack"),
        ([["encoder", "encoder.down"]], "holds already"),
        ([["encoder"], ["encoder.down"]], "holds already"),
        ([["reversed(encoder"]], "is no name"),
        ([[""]], "is no name"),
    ],
)
def test_a_series_that_cannot_be(series: list[list[str]], message: str) -> None:
    """A name that is nothing here, or that is held twice, is refused, and the hint shows how a series is written."""
    with pytest.raises(RecipeError, match=message):
        find_depth(VAE, series=series)


def test_not_layers_are_as_if_they_were_not_there() -> None:
    """What the expression is found in lies outside, and the rest is read without it."""
    names = LLAMA + expand("model.blocks.{0..2}.{attn,mlp.up}.weight")
    assert stacks(find_depth(names)) == {"model.layers": 8, "model.blocks": 3}
    depth = find_depth(names, not_layers=r"^model\.blocks\.")
    assert stacks(depth) == {"model.layers": 8}
    assert not any(".blocks." in name for name in depth.places)
    with pytest.raises(RecipeError, match="--not-layers 'cell' matches none"):
        find_depth(names, not_layers="cell")
    with pytest.raises(RecipeError, match="not a regular expression"):
        find_depth(names, not_layers="(")


@pytest.mark.slow
def test_depth_by_hand_is_recorded_and_runs_again(tmp_path: Path) -> None:
    """The recipe of the output says the series and what is no layer; verify and a second run read it so."""
    import torch
    import yaml
    from safetensors.torch import load_file

    for side, value in (("base", 0.0), ("ft", 1.0)):
        write_checkpoint(tmp_path / side, {name: torch.full((2,), value) for name in VAE}, config={})
    asked = ["--series", "decoder.mid, reversed(decoder.up)", "--series", "encoder", "--not-layers", "^connector"]
    out = tmp_path / "out"
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", out, "--alpha", 0, "--beta", 1, *asked)
    assert ran.code == 0, ran.err
    got = load_file(out / "model.safetensors")
    assert [got[f"decoder.up.{s}.block.{b}.conv.w"][0].item() for s in (1, 0) for b in (0, 1)] == [0.25, 0.5, 0.75, 1]
    recorded = yaml.safe_load((out / "lines_recipe.yaml").read_text())["lines"]
    assert recorded["series"] == [["decoder.mid", "reversed(decoder.up)"], ["encoder"]]
    assert recorded["not_layers"] == "^connector"
    assert run_lines("verify", out).code == 0
    assert run_lines("merge", "--config", out / "lines_recipe.yaml", "-o", tmp_path / "again").code == 0
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()
    found = lines.coefficients(VAE, 0, 1, series=["decoder.mid", "reversed(decoder.up)"], not_layers="^connector")
    assert found == {name: tensor[0].item() for name, tensor in got.items()}
    seen = run_lines("inspect", tmp_path / "ft", "--json", *asked)
    assert {stack["name"] for stack in seen.json["stacks"]} == {"decoder.mid+decoder.up", "encoder.down+encoder.mid"}


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("series: 'a, reversed(b)'", (("a", "reversed(b)"),)),
        ("series: [a, reversed(b)]", (("a", "reversed(b)"),)),
        ("series: ['a,b', c]", (("a", "b"), ("c",))),
        ("series: [[a, b], [c]]", (("a", "b"), ("c",))),
    ],
)
def test_series_in_a_recipe(said: str, expected: tuple[tuple[str, ...], ...], tmp_path: Path) -> None:
    """One series as text or as a list of names; several as a list of either."""
    path = tmp_path / "merge.yaml"
    path.write_text(f"base_model: base\nmodels:\n- model: ft\nlines:\n  alpha: 0.1\n  beta: 0.9\n  {said}\n")
    recipe = load_recipe(path)
    assert recipe.lines is not None
    assert recipe.lines.series == expected


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("serie: [a]", "line 7: lines.serie is not a key of a recipe; did you mean lines.series?"),
        ("not_layer: x", "line 7: lines.not_layer is not a key of a recipe; did you mean lines.not_layers?"),
        ("not-layers: x", "did you mean lines.not_layers?"),
        ("series: [a, 3]", "line 7: lines.series"),
        ("series: 3", "line 7: lines.series"),
        ("series: 'a,,b'", "line 7: lines.series: '' is no name"),
        ("series: 'reversed(a'", "is no name"),
        ("not_layers: [x]", "line 7: lines.not_layers: expected text"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_with_its_line(said: str, message: str, tmp_path: Path) -> None:
    """A key that is nearly one, and a value that is none."""
    path = tmp_path / "merge.yaml"
    path.write_text(f"base_model: base\nmodels:\n- model: ft\nlines:\n  alpha: 0.1\n  beta: 0.9\n  {said}\n")
    with pytest.raises(RecipeError) as refusal:
        load_recipe(path)
    assert message in refusal.value.message


# --- what could be read otherwise is said ---


def said_of(*patterns: str, config: Mapping[str, Any] | None = None, **sizes: int) -> str:
    """The notes on a model whose tensors hold ten parameters each, or what is given for a part of their names."""
    names = expand(*patterns)
    weights = {name: next((n for part, n in sizes.items() if part in name), 10) for name in names}
    return "\n".join(find_depth(names, config=config, parameters=weights).notes)


TOWER = "model.layers.{0..7}.{norm,self_attn.q_proj,mlp.up_proj}.weight"
BRIDGE = "connector.layers.{0..3}.{norm,self_attn.q_proj,mlp.up_proj}.weight"


def test_a_list_that_stays_outside_is_said() -> None:
    """Alike units that are numbered and lie outside are named with their share, and how to count them."""
    said = said_of(TOWER, BRIDGE)
    assert "connector.layers (4 units, 33%)" in said
    assert "--series" in said


def test_a_list_outside_that_holds_most_of_the_model_is_refused() -> None:
    """What decides most of the model is decided by the user: both ways out work."""
    names = expand(TOWER, BRIDGE)
    weights = {name: 100 if "connector" in name else 1 for name in names}
    with pytest.raises(DepthError, match=r"connector\.layers, of 4 units that are alike, holds 98%") as refusal:
        find_depth(names, parameters=weights)
    assert refusal.value.hint
    assert "--series connector.layers" in refusal.value.hint
    assert "--not-layers" in refusal.value.hint
    assert "connector.layers" in stacks(find_depth(names, parameters=weights, series=[["connector.layers"]]))
    assert not find_depth(names, parameters=weights, not_layers="^connector").places.keys() & set(expand(BRIDGE))


def test_a_stack_that_holds_little_is_said() -> None:
    """Less than half of what is no table or head; a large embedding alone is nothing to tell."""
    assert "the stacks hold only 19%" in said_of(TOWER, "trunk.weight", trunk=1000)
    assert not said_of(TOWER, "model.embed_tokens.weight", "lm_head.weight", embed_tokens=10**6, lm_head=10**6)


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (["dec.up.{0..2}.block.{0..1}.{conv,norm}.w", "dec.up.{1..2}.upsample.conv.w"], "dec.up runs backwards"),
        (["encoder{1..4}.{conv1,norm1,conv2}.w", "decoder{1..4}.{conv1,norm1,conv2}.w"], "layer 4 is counted first"),
        ([TOWER, "model.layers.3.shared_transformer.mlp.w"], "model.layers.3.shared_transformer serves several layers"),
    ],
)
def test_backward_lists_and_shared_blocks_are_said(patterns: list[str], words: str) -> None:
    """What runs in another order than its numbers, or more than once, by the names."""
    assert words in said_of(*patterns)


def test_the_order_of_a_numbered_way_up_is_said() -> None:
    """`up1` to `up4` may be counted as they run, or by the level that they come back to: both are an option away."""
    down, up = "down{1..4}.{conv,norm,proj}.w", "up{1..4}.{conv,norm,proj}.w"
    said = said_of(down, up)
    assert (
        "up is counted from 1 to 4; where its highest number runs first, --series 'down,reversed(up)' says so" in said
    )
    depth = find_depth(expand(down, up), series=[["down", "reversed(up)"]])
    assert [depth.places[f"up{level}.norm.w"].index for level in (4, 3, 2, 1)] == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("first", "stack", "last"),
    [
        ("prelude", "core_block", "coda"),
        ("transformer.prelude", "transformer.core_block", "transformer.coda"),
        ("model.front_units", "model.blocks", "model.tail_units"),
    ],
)
def test_a_prelude_and_a_coda_are_said_with_the_series_that_joins_them(first: str, stack: str, last: str) -> None:
    """Lists like the stack beside them, too short to be stacks by another name: the note names the series, and it is
    one that works.
    """
    inside = "{norm,attn.qkv,mlp.up}.weight"
    names = expand(f"{first}.{{0..1}}.{inside}", f"{stack}.{{0..3}}.{inside}", f"{last}.{{0..1}}.{inside}", "lm_head.w")
    depth = find_depth(names)
    assert stacks(depth) == {stack: 4}
    series = f"{first},{stack},{last}"
    assert f"If they run one after the other: --series {series}" in "\n".join(depth.notes)
    joined = find_depth(names, series=[series.split(",")])
    assert stacks(joined) == {f"{first}+{stack}+{last}": 8}
    assert not [note for note in joined.notes if "outside the blocks" in note]


def test_layer1_before_stage2_is_said() -> None:
    """Numbers of one row under two words make one stack, and a note says so; numbers that do not follow do not."""
    block = "{conv1,bn1,conv2}.w"
    said = said_of(f"layer1.{{0..3}}.{block}", f"stage{{2..4}}.{{0..1}}.{block}")
    assert "layer1 runs before stage2, to judge by their numbers" in said
    assert "runs before" not in said_of(f"layer1.{{0..3}}.{block}", f"blocks.{{0..3}}.{block}")


# --- two readings, neither plainer ---

UNIT = "{norm,attn,mlp}.w"


@pytest.mark.parametrize(
    ("patterns", "taken", "other"),
    [
        (["cells.{0..2}.ops.{0..7}." + UNIT], {"cells": 3}, {"layers": 24}),
        (["a.blocks.{0..2}.layers.{0..5}." + UNIT, "a.blocks.{0..2}.layers.{0,2,4}.{a,b,c,d}.w"], {"a.blocks": 3},
            {"layers": 18}),
        (["models.{0..4}.layers.{0..5}." + UNIT, "models.{0..4}.embed.w"], {"models": 30}, dict.fromkeys(
            (f"models.{i}" for i in range(5)), 6)),
        (["encoder_{1..2}.layers.{0..5}." + UNIT], {"encoder": 12}, {"encoder_1": 6, "encoder_2": 6}),
        (["student.nets.{0..1}.h.{0..3}." + UNIT], {"student.nets": 8}, {"student.nets.0": 4, "student.nets.1": 4}),
        (["stages.{0..2}.{conv_blocks,attn_blocks}.{0..1}.{norm,fc}.w"], {"layers": 6}, {"layers": 6}),
        (["denseblock{1..3}.{convblock,denselayer}{1..4}.{norm,fc}.w"], {"layers": 12}, {"layers": 12}),
        (["layers.{0..11}.weight", "blocks.0.{fc1,fc2}.w"], {"blocks": 1}, {"blocks": 1, "layers": 12}),
        (["net.{0..5}.{a,b}.w", "adapter.layers.{0..5}.{q,k}.w"], {"net": 6}, {"net": 6, "adapter.layers": 6}),
        (["models/{0..2}/layers/{0..3}/{norm,attn,mlp}/w"], {"models": 12}, {f"models/{i}": 4 for i in range(3)}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)  # fmt: skip
def test_two_readings_that_are_as_plain(patterns: list[str], taken: dict[str, int], other: dict[str, int]) -> None:
    """Where the depth of most of the model hangs on a toss-up it is refused with both readings; where that of less does
    it is said, with its share; and both options that are named work, and leave nothing to say.
    """
    names = expand(*patterns)
    with pytest.raises(DepthError, match="the names can be read in two ways") as refusal:
        find_depth(names, parameters=dict.fromkeys(names, 10))
    assert refusal.value.hint
    assert re.search(r"1?\d\d% of the parameters", refusal.value.message)
    for option, expected in zip(
        re.findall(r"For the (?:first|second): (.*)", refusal.value.hint), (taken, other), strict=True
    ):
        depth = find_depth(names, parameters=dict.fromkeys(names, 10), **asked(option))
        assert stacks(depth) == expected
    for counted in {**taken, **other}.values():
        assert f"{counted} layer" in refusal.value.message
    weights = dict.fromkeys(names, 10) | {"table.weight": 30 * len(names)}
    said = "\n".join(find_depth(weights, parameters=weights).notes)
    assert "the depth of 25% of the parameters can be read in two ways" in said
    assert any("can be read in two ways" in note for note in find_depth(names).notes)


def asked(options: str) -> dict[str, Any]:
    """Options of the command line as the keywords of `find_depth`."""
    words = shlex.split(options)
    said: dict[str, Any] = {}
    for option, value in zip(words[::2], words[1::2], strict=True):
        if option == "--series":
            said.setdefault("series", []).append(value.split(","))
        else:
            said[option.removeprefix("--").replace("-", "_")] = value
    return said


@pytest.mark.parametrize("beside", ["gate_layers.{0..1}.weight", "a_layers.{0..1}.{p,q}.w", "norm_layers.{0..3}.w"])
def test_the_blocks_of_a_stage_are_those_that_hold_most(beside: str) -> None:
    """Another list in each stage, that holds less, is not counted, whatever it is called; norms lie in their blocks."""
    names = expand("stages.{0..2}.layers.{0..3}." + UNIT, f"stages.{{0..2}}.{beside}")
    depth = find_depth(names, parameters=dict.fromkeys(names, 1))
    assert stacks(depth) == {"stages": 12}
    assert [depth.places[f"stages.{s}.layers.{b}.norm.w"].index for s in range(3) for b in range(4)] == list(range(12))
    if "norm" in beside:
        assert [depth.places[f"stages.{s}.norm_layers.{b}.w"].index for s in range(3) for b in range(4)] == list(
            range(12)
        )


@pytest.mark.parametrize(
    "patterns",
    [
        ["text_encoder.layers.{0..5}." + UNIT, "text_encoder_2.layers.{0..5}." + UNIT],
        ["stages.{0..2}.layers.{0..5}." + UNIT],
        ["encoder{1..4}.blocks.{0..3}." + UNIT, "bottleneck." + UNIT, "decoder{1..4}.blocks.{0..3}." + UNIT],
        ["net.{0..2}.layers.{0..5}." + UNIT, "net.0.stem.w"],
        ["blocks.{0..2}.resnets.{0..3}." + UNIT],
        ["layers.{0..5}.experts.{0..3}." + UNIT],
        ["layers.{0..5}." + UNIT, "norms.{0..40}.weight"],
        ["model.encoder.layers.{0..5}." + UNIT, "model.decoder.layers.{0..5}." + UNIT],
    ],
    ids=lambda value: value[0],
)
def test_what_is_no_toss_up(patterns: list[str]) -> None:
    """Towers, stages, U-Nets, parts of blocks, experts and norms are read in one way."""
    names = expand(*patterns)
    assert not [note for note in find_depth(names, parameters=dict.fromkeys(names, 10)).notes if "two ways" in note]


def test_a_toss_up_on_the_command_line(tmp_path: Path) -> None:
    """edit ends with 4 and both readings, inspect says that depth is unknown; the option settles it and is recorded;
    where little hangs on it the summary says so.
    """
    import torch
    import yaml

    names = expand("models.{0..1}.layers.{0..3}." + UNIT)
    small = {name: torch.ones(2) for name in names}
    sides = [write_checkpoint(tmp_path / side, small, config={}) for side in ("base", "ft")]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (4, "")
    assert "models in a row (8 layers), or each models for itself (2 stacks of 4 layers)" in ran.err
    assert not (tmp_path / "out").exists()
    assert "two ways" in "".join(run_lines("inspect", sides[1], "--json").json["notes"])
    settled = run_lines("edit", *sides, "-o", tmp_path / "out", "--series", "models", "--json")
    assert settled.code == 0, settled.err
    assert [stack["layers"] for stack in settled.json["stacks"]] == [8]
    assert yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())["lines"]["series"] == [["models"]]
    assert run_lines("verify", tmp_path / "out").code == 0
    large = small | {"table.weight": torch.ones(3 * 2 * len(names))}
    sides = [write_checkpoint(tmp_path / f"{side}2", large, config={}) for side in ("base", "ft")]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out2", "--dry-run")
    assert ran.code == 0, ran.err
    assert "the depth of 25% of the parameters can be read in two ways" in " ".join((ran.out + ran.err).split())


@pytest.mark.some(12)
@pytest.mark.zoo
@pytest.mark.parametrize("case", PLACED, ids=str)
def test_no_known_family_is_a_toss_up(case: zoo.Case) -> None:
    """Where the right map is known, no second reading is said."""
    names, config = names_and_config(case)
    depth = find_depth(names, config=config)
    assert not [note for note in depth.notes if "two ways" in note]
    assert stacks(find_depth(names, config=config, parameters=dict.fromkeys(names, 1))) == stacks(depth)


@pytest.mark.parametrize("config", [{"H_cycles": 2, "L_cycles": 3}, {"text_config": {"total_ut_steps": 4}}])
def test_layers_that_run_more_than_once_are_said(config: Mapping[str, Any]) -> None:
    """The config says so; one cycle is none."""
    assert "layers run more than once" in said_of(TOWER, config=config)
    assert not said_of(TOWER, config={"H_cycles": 1, "use_cache": True})


def test_nothing_is_said_of_plain_models() -> None:
    """A decoder, an encoder, a vision transformer, two towers and an encoder-decoder come without a note."""
    for build in ("llama", "bert", "vit", "clip", "t5", "siglip", "llava", "qwen2_vl", "mixtral", "whisper"):
        names, config = saved(build)
        assert not find_depth(names, config=config).notes, build


def test_what_is_left_outside_reaches_the_summary(tmp_path: Path) -> None:
    """The plan knows how large tensors are, and its notes say what stays outside, and how large that is."""
    import torch

    tensors = {name: torch.ones(30 if "connector" in name else 20) for name in expand(TOWER, BRIDGE)}
    sides = [write_checkpoint(tmp_path / f"{side}.safetensors", tensors) for side in ("base", "ft")]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out", "--dry-run")
    assert ran.code == 0, ran.err
    assert "connector.layers (4 units, 43%)" in ran.out + ran.err


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


def test_shared_layers_that_are_a_part_of_a_model() -> None:
    """A small ALBERT in a speech model: the refusal names the option that leaves it outside, and it does."""
    albert = "bert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    names = [albert, *(f"decoder.layers.{i}.{part}.weight" for i in range(4) for part in ("norm", "attn", "ffn"))]
    with pytest.raises(DepthError) as refusal:
        find_depth(names)
    assert "--not-layers" in str(refusal.value.hint)
    depth = find_depth(names, not_layers=r"^bert\.")
    assert depth.layers == {"decoder.layers": 4}
    assert albert not in depth.places


def test_a_refused_list_names_what_may_run_on_from_it() -> None:
    """Taken alone, `encoders` would leave `decoders` outside; both are named, and joined they are one stack."""
    names = [f"encoders.{i}.{j}.{part}.weight" for i in range(3) for j in range(4) for part in ("norm", "conv1")]
    names += [f"{list_}.{i}.0.{part}.weight" for list_ in ("middle_blks", "decoders") for i in range(3)
              for part in ("norm", "conv1")]  # fmt: skip
    names += [f"ups.{i}.weight" for i in range(3)]
    with pytest.raises(DepthError) as refusal:
        find_depth(names, parameters=dict.fromkeys(names, 1))
    assert "of middle_blks, decoders, --series A,B,C" in str(refusal.value.hint)
    depth = find_depth(names, series=[["encoders", "middle_blks", "decoders"]], parameters=dict.fromkeys(names, 1))
    assert list(depth.layers.values()) == [18]
