"""Exceptions from a schedule: --stack, --filter; and what is said of coefficients."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from support.files import write_checkpoint
from support.run import run_lines
from support.schedules import (
    FIXED,
    MODELS,
    dry,
    in_yaml,
    one_value,
    over_depth,
    planned,
    refused,
    sides,
    stack,
    summary,
    written,
)

# --- stacks ---


@pytest.mark.parametrize("part", ["decoder", "decoder.block"])
@pytest.mark.parametrize(
    ("rule", "decoder"),
    [("0.25,0.5", [0.25, 0.5, 0.75]), ("0.25, -1e0", [0.25, -0.25, -0.75]), ("keep", [1] * 3), ("base", [0] * 3)],
)
def test_a_stack_of_its_own(part: str, rule: str, decoder: list[float], saved: dict[str, tuple[Path, Path]]) -> None:
    """One stack's rule is its own, times gamma unless it is fixed; the other and what is outside are as they were."""
    for gamma in (1, 4):
        got = planned(saved["encoder and decoder"], "--stack", f"{part}={rule}", "--gamma", gamma)
        factor = 1 if rule in FIXED else gamma
        assert [got[f"decoder.block.{i}.layer.1.w"] for i in range(3)] == [factor * c for c in decoder]
        others = planned(saved["encoder and decoder"], "--gamma", gamma)
        assert {n: c for n, c in got.items() if not n.startswith("decoder.block")} == {
            n: c for n, c in others.items() if not n.startswith("decoder.block")
        }


@pytest.mark.parametrize(("schedule", "middle"), [("power:2", 0.25 + 0.5 / 4), ("constant", 0.75), ("linear", 0.5)])
def test_a_stack_s_ends_follow_the_schedule(schedule: str, middle: float, saved: dict[str, tuple[Path, Path]]) -> None:
    """A stack's own alpha and beta take the place of the recipe's in the same f(x); outside keeps the recipe's."""
    got = planned(saved["encoder and decoder"], "--schedule", schedule, "--stack", "decoder=0.25,0.5")
    assert got["decoder.block.1.layer.1.w"] == middle
    assert got["decoder.final_layer_norm.weight"] == 0.1


def test_stacks_beside_a_list(saved: dict[str, tuple[Path, Path]]) -> None:
    """With listed coefficients a stack can be kept or taken back; the other has the list."""
    got = planned(saved["encoder and decoder"], "--schedule", "0.5,1", "--stack", "encoder=base", "--gamma", 0.5)
    assert {got[f"encoder.block.{i}.layer.0.w"] for i in range(4)} == {0}
    assert [got[f"decoder.block.{i}.layer.0.w"] for i in range(3)] == [0.25, 0.375, 0.5]


@pytest.mark.parametrize("part", ["block", "layers", "enc", "coder", "decoder.", ".decoder", "block.0", "*", "shared"])
def test_a_part_that_names_no_single_stack(part: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """An ambiguous or unknown part is refused with the names of the stacks."""
    what = "several" if part == "block" else "no stack"
    ran = dry(saved["encoder and decoder"], "--stack", f"{part}=keep")
    refused(ran, repr(part), what, "\n  decoder.block\n", "\n  encoder.block\n")
    refused(in_yaml(saved["encoder and decoder"], f"{{stacks: {{'{part}': keep}}}}"), repr(part), "encoder.block")


def test_a_whole_name_goes_before_a_part_of_another(tmp_path: Path) -> None:
    """A stack whose name is a part of another's is still selected by its own."""
    paths = sides(tmp_path, [*stack("transformer.resblocks", 2, "w"), *stack("visual.transformer.resblocks", 2, "w")])
    got = planned(paths, "--stack", "transformer.resblocks=keep", "--stack", "visual=base")
    assert set(got.values()) == {0, 1}
    assert {name for name, c in got.items() if c == 0} == {f"visual.transformer.resblocks.{i}.w" for i in range(2)}
    refused(dry(paths, "--stack", "transformer=keep"), "several", "\n  visual.transformer.resblocks\n")


@pytest.mark.parametrize(
    ("first", "second"), [("decoder", "decoder"), ("decoder", "decoder.block"), ("decoder.block", "decoder")]
)
def test_a_stack_named_twice(first: str, second: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Two rules for one stack contradict each other, whichever of its names each uses."""
    refused(dry(saved["encoder and decoder"], "--stack", f"{first}=keep", "--stack", f"{second}=base"), second)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("part", ["double_blocks", "single_blocks"])
def test_half_of_a_joined_stack_is_not_the_whole(part: str, prefix: str, tmp_path: Path) -> None:
    """Blocks that run one after the other are one stack: naming half of it is refused with the whole name, so that
    nobody who means the single blocks sets the double ones; under any prefix.
    """
    paths = sides(tmp_path, [f"{prefix}{name}" for name in MODELS["one after the other"].places])
    whole = f"{prefix}double_blocks+{prefix}single_blocks"
    assert planned(paths, "--stack", f"{whole}=keep")[f"{prefix}double_blocks.0.w"] == 1
    refused(dry(paths, "--stack", f"{part}=keep"), whole)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("decoder", "NAME=VALUE"),
        ("=keep", "NAME=VALUE"),
        ("decoder=", "keep, base"),
        ("decoder=0.5", "alpha and beta"),
        ("decoder=KEEP", "keep, base"),
        ("decoder=0.1,0.2,0.3", "alpha and beta"),
        ("decoder=0.1,", "stacks.decoder.beta"),
        ("decoder=,0.1", "stacks.decoder.alpha"),
        ("decoder=nan,0.1", "finite"),
        ("decoder=0.1,inf", "finite"),
        ("decoder=keep,base", "stacks.decoder.alpha"),
    ],
)
def test_a_stack_s_rule_that_is_none(given: str, word: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Exit code 2 and what is missing or allowed."""
    refused(dry(saved["encoder and decoder"], "--stack", given), word)


# --- filters ---


def test_the_first_filter_that_matches_has_the_last_word(saved: dict[str, tuple[Path, Path]]) -> None:
    """A filter's number goes over stack, schedule, outside and gamma; of several, the first; `*` is all."""
    rules = ("--stack", "encoder=keep", "--outside", "keep", "--gamma", 7)
    given = ("--filter", "block.1.=0.5", "--filter", "norm=-2", "--filter", "shared=base")
    got = planned(saved["encoder and decoder"], *rules, *given)
    assert (got["encoder.block.1.layer.1.norm.w"], got["decoder.block.1.layer.0.w"]) == (0.5, 0.5)
    assert (got["encoder.block.2.layer.1.norm.w"], got["encoder.final_layer_norm.weight"]) == (-2, -2)
    assert (got["shared.weight"], got["encoder.block.0.layer.0.w"], got["lm_head.weight"]) == (0, 1, 1)
    got = planned(saved["encoder and decoder"], *rules, *given, "--filter", "*=0.125")
    assert set(got.values()) == {0.5, -2, 0, 0.125}
    got = planned(saved["encoder and decoder"], *rules, "--filter", "*=0.125", *given)
    assert set(got.values()) == {0.125}


@pytest.mark.parametrize("pattern", ["norm.w", "layers.1", ".", "model.norm.weight", "t", "layers.1.w"])
def test_a_pattern_is_part_of_a_name(pattern: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Every name that contains the text matches, and no other: letters are letters, a dot is a dot."""
    got = planned(saved["decoder"], "--filter", f"{pattern}=-3")
    assert {name for name, c in got.items() if c == -3} == {n for n in MODELS["decoder"].places if pattern in n}


@pytest.mark.parametrize("pattern", ["a=b", "=", "c,d", ",", "=b,", "y=0.25x"])
def test_a_pattern_may_hold_what_separates(pattern: str, tmp_path: Path) -> None:
    """The last equals sign parts pattern and value; commas and other equals signs belong to the pattern."""
    paths = sides(
        tmp_path, ["layers.0.a=b,c", "layers.0.c,d", "layers.0.w", "layers.1.a=b,c", "layers.1.y=0.25x", "layers.1.w"]
    )
    got = planned(paths, "--filter", f"{pattern}=-3")
    assert {name for name, c in got.items() if c == -3} == {name for name in got if pattern in name}


@pytest.mark.parametrize("pattern", ["nope", "*norm", "n*rm", "norm$", "NORM", "model.norm.weight."])
def test_a_pattern_that_matches_nothing(pattern: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """A filter that no name contains is an error that shows it; a star in a pattern is no wildcard."""
    refused(dry(saved["decoder"], "--filter", f"{pattern}=1", "--filter", "*=0"), repr(pattern), "matches none")


def test_integers_and_whole_numbers(tmp_path: Path) -> None:
    """A filter's 0 and 1 copy base and fine-tune, whole numbers count on, integers have the base's only at 0."""
    names = [f"layers.{i}.{kind}" for i in range(4) for kind in ("float", "int")]
    paths = sides(tmp_path, names, dtypes=(torch.float32, torch.int64))
    given = ("0.=0", "1.=1", "2.=3", "3.=-0.0")
    got = written(tmp_path / "out.safetensors", *paths, *(x for g in given for x in ("--filter", f"layers.{g}")))
    assert [one_value(got[f"layers.{i}.float"]) for i in range(4)] == [0, 1, 3, 0]
    assert [one_value(got[f"layers.{i}.int"]) for i in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("norm", "=VALUE"),
        ("=0.5", "=VALUE"),
        ("norm=", "a number, keep or base"),
        ("norm=drop", "a number, keep or base"),
        ("norm=0.1,0.9", "a number, keep or base"),
        ("norm=KEEP", "a number, keep or base"),
        ("norm=nan", "filter.norm"),
        ("norm=-inf", "filter.norm"),
        ("norm=1e999", "filter.norm"),
    ],
)
def test_a_filter_that_is_none(given: str, word: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Exit code 2 and what is missing or allowed."""
    refused(dry(saved["decoder"], "--filter", given), word)


def test_a_pattern_given_twice(saved: dict[str, tuple[Path, Path]]) -> None:
    """Two values for one pattern contradict each other."""
    refused(dry(saved["decoder"], "--filter", "norm=0.5", "--filter", "norm=0.6"), "norm=0.6", "once")


# --- together with the rest ---


def test_what_one_side_lacks_is_in_the_map_as_it_is_copied(tmp_path: Path) -> None:
    """With --missing copy a tensor of the fine-tune alone has 1 in the map and one of the base alone 0, whatever a
    filter says; that is what is written.
    """
    base = {name: torch.zeros(2) for name in [*stack("layers", 2, "w"), "norm.weight", "old.weight"]}
    ft = {name: torch.ones(2) for name in [*stack("layers", 2, "w"), "norm.weight", "new.weight"]}
    paths = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", ft)
    options = ("--missing", "copy", "--filter", "weight=0.5")
    plan, got = planned(paths, *options), written(tmp_path / "out", *paths, *options)
    assert plan == {"layers.0.w": 0.1, "layers.1.w": 1, "norm.weight": 0.5, "old.weight": 0, "new.weight": 1}
    assert {name: one_value(tensor) for name, tensor in got.items()} == {
        n: float(np.float32(c)) for n, c in plan.items()
    }
    options = ("--missing", "skip", "--filter", "new=0.5")
    refused(dry(paths, *options), "new", "matches none")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--beta", 0], 0),
        (["--schedule", "0.5"], 0),
        (["--schedule", "0.5,0.5", "--gamma", 0.5], 0),
        (["--schedule", "power:2", "--beta", 0, "--filter", "ffn=keep"], 0),
        (["--schedule", "constant", "--alpha", 0.5, "--beta", 0], 0),
        ([], 4),
        (["--schedule", "0.5,0.6"], 4),
        (["--schedule", "constant"], 4),
        (["--beta", 0, "--outside", "base"], 4),
        (["--beta", 0, "--stack", "albert=keep"], 4),
    ],
)
def test_depth_is_needed_only_where_it_makes_a_difference(options: list[object], code: int, tmp_path: Path) -> None:
    """Without a reading of depth one coefficient for all can be given, and nothing that tells tensors apart by it."""
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    ran = dry(sides(tmp_path, [name, "albert.embeddings.word_embeddings.weight"]), *options)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    assert name in ran.err


def test_names_from_the_user_s_expression(tmp_path: Path) -> None:
    """--stack and --filter take the stacks that --layers names."""
    names = [f"net.{side}_cell{i}.w" for side in ("left", "right") for i in range(3)]
    given = ("--layers", r"(?P<stack>left|right)_cell(?P<index>\d+)", "--stack", "left=base", "--filter", "cell1=0.5")
    got = planned(sides(tmp_path, names), *given)
    assert [got[name] for name in names] == [0, 0.5, 0, 0.1, 0.5, 1]


# --- what is said of it ---


def test_a_dry_run_shows_the_ends_and_what_is_outside(saved: dict[str, tuple[Path, Path]]) -> None:
    """Per stack its layers, tensors, first and last coefficient; every tensor outside with its own; the filters."""
    given = ("--alpha", 0.25, "--beta", 0.5, "--stack", "decoder=base", "--outside", "position", "--filter", "lm_=keep")
    ran = dry(saved["encoder and decoder"], *given)
    assert ran.code == 0, ran.err
    rows = [re.split(r" {2,}", line.strip()) for line in ran.out.splitlines()]
    assert ["decoder.block", "3", "9", "18", "0", "0"] in rows
    assert ["encoder.block", "4", "8", "16", "0.25", "0.75"] in rows
    assert ["outside the blocks", "4", "8", "0.25", "0.75"] in rows
    outside = {"shared": 0.25, "encoder.final_layer_norm": 0.75, "decoder.final_layer_norm": 0.75, "lm_head": 1}
    for name, c in outside.items():
        assert [f"{c}", f"{name}.weight"] in rows
    assert ["names with lm_", "1", "2", "1", "1"] in rows
    assert not (saved["decoder"][0].parent / "not written").exists()


def test_a_dry_run_says_how_many_names_it_leaves_out(tmp_path: Path) -> None:
    """Of many tensors outside the first are shown, and how many more there are."""
    names = [f"extra_{chr(97 + i)}.weight" for i in range(20)]
    ran = dry(sides(tmp_path, [*stack("layers", 2, "w"), *names]))
    shown = [name for name in names if name in ran.out]
    assert 0 < len(shown) < 20
    assert f"{20 - len(shown)} more" in ran.out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--schedule", "0.125,0.75,0.5", "--outside", "position", "--gamma", 0.3],
        ["--schedule", "constant", "--stack", "text_model=base"],
        ["--stack", "text_model=0.3,0.4", "--stack", "vision_model=keep", "--outside", "base"],
        ["--schedule", "power:3", "--outside", "keep", "--alpha", -0.123456789],
    ],
)
def test_card_and_summary_agree_with_the_map(
    options: list[object], saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The model card and the summary of the run give the first and last coefficient of the dry run, and those are the
    map's.
    """
    model, plan = MODELS["towers"], summary(saved["towers"], *options)
    ran = run_lines("edit", *saved["towers"], "-o", tmp_path / "out", "--json", *options)
    assert ran.code == 0, ran.err
    keys = ("stacks", "outside", "edited", "copied", "recipe", "bytes")
    assert {key: ran.json[key] for key in keys} == {key: plan[key] for key in keys}

    coefficients = {row["name"]: row["coefficient"] for row in plan["map"]}
    card = (tmp_path / "out" / "README.md").read_text()
    for row in plan["stacks"]:
        ends = {0: row["first"], row["layers"] - 1: row["last"]} if row["layers"] > 1 else {0: row["last"]}
        for name, place in model.places.items():
            if not isinstance(place, str) and place[0] == row["name"] and place[1] in ends:
                assert coefficients[name] == ends[place[1]], name
        assert f"| `{row['name']}` | {row['layers']} | {row['first']:.6g} | {row['last']:.6g} |" in card
    for name, place in model.places.items():
        if isinstance(place, str):
            assert coefficients[name] == plan["outside"]["first" if place == "before" else "last"]
    assert f"| outside the blocks | | {plan['outside']['first']:.6g} | {plan['outside']['last']:.6g} |" in card


def test_card_and_table_do_not_hide_a_filter(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A card whose table says 0.1 to 1 must say, too, that a filter gave all of it another coefficient; so must what
    the run prints.
    """
    ran = run_lines("edit", *saved["decoder"], "-o", tmp_path / "out", "--filter", "*=0.375")
    assert ran.code == 0, ran.err
    assert "0.375" in (tmp_path / "out" / "README.md").read_text()
    assert "0.375" in ran.out


def test_the_recipe_says_it_as_it_was_said(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """lines_recipe.yaml holds every option, filters in their order, and no alpha or beta beside a list."""
    given = ("--stack", "decoder=0.25,0.5", "--stack", "encoder=keep", "--filter", "z=0.5", "--filter", "a=base")
    paths = sides(tmp_path, [*MODELS["encoder and decoder"].places, "z.a"])
    written(tmp_path / "out", *paths, "--outside", "position", "--schedule", "power:2", *given)
    asked = yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())["lines"]
    assert (asked["outside"], asked["schedule"]) == ("position", "power:2")
    assert asked["stacks"] == {"decoder": {"alpha": 0.25, "beta": 0.5}, "encoder": "keep"}
    assert list(asked["filter"].items()) == [("z", 0.5), ("a", "base")]
    written(tmp_path / "list", *paths, "--schedule", "0.1,0.7")
    asked = yaml.safe_load((tmp_path / "list" / "lines_recipe.yaml").read_text())["lines"]
    assert asked["schedule"] == [0.1, 0.7]
    assert not {"alpha", "beta", "stacks", "filter"} & asked.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_coefficient_is_rounded_once_to_the_dtype_of_the_arithmetic(dtype: torch.dtype, tmp_path: Path) -> None:
    """A list's and a power's values reach the file as the nearest number of the arithmetic, then of the dtype."""
    c = 0.1 + 0.8 * (1 / 3) ** 2
    got = over_depth(tmp_path, 4, "--schedule", "power:2", "--alpha", 0.1, "--beta", 0.8, dtype=dtype)
    single = struct.unpack("<f", struct.pack("<f", c))[0]
    assert got[2] == (c if dtype == torch.float64 else torch.tensor(single, dtype=dtype).item())
