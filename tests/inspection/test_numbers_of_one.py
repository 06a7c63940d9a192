"""Every number that `lines inspect --base --json` tells of one fine-tune, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.inspect_reference import (
    Reference,
    Spot,
    agree,
    at,
    check,
    coefficients,
    inspect,
    loaded,
    norm,
    pair_of_stacks,
    pair_spots,
    toy,
    toy_reference,
    tuned,
    vector,
    written,
)
from support.run import run_lines


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 12])
def test_every_number_of_one_fine_tune(layers: int, tmp_path: Path) -> None:
    """Whole, stacks, layers, sides, kinds and tensors are told as the plain computation has them, at any depth."""
    base = toy(layers, layers)
    ft = tuned(base, layers)
    told = inspect(*written(tmp_path, base, [ft]), "--tensors")
    check(told, toy_reference(base, [ft]))
    assert len(told["map"]) == len(base)
    assert told["bytes_read"] == 2 * sum(tensor.nbytes for tensor in base.values())


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [
        (1, [], []),
        (2, [0], [1]),
        (3, [0], [2]),
        (4, [0], [3]),
        (7, [0, 1], [5, 6]),
        (12, [0, 1, 2, 3], [8, 9, 10, 11]),
    ],
)
def test_which_layers_the_thirds_hold(layers: int, first: list[int], last: list[int], tmp_path: Path) -> None:
    """A third holds the layers listed here, whose squares are powers of two, so that their sum says which they are."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(1, dtype=torch.float64) for i in range(layers)}
    ft = {f"model.layers.{i}.mlp.w": torch.tensor([2.0**i], dtype=torch.float64) for i in range(layers)}
    told = inspect(*written(tmp_path, base, [ft]), "--alpha", 0.5, "--beta", 1)["fine_tunes"][0]
    c = [0.5 + i / (layers - 1) if layers > 1 else 1.5 for i in range(layers)]
    for scaled, prefix in ((False, ""), (True, "scaled_")):
        square = [4.0**i * (c[i] ** 2 if scaled else 1) for i in range(layers)]
        for key, held in (("first_third", first), ("last_third", last)):
            agree(told[prefix + key], sum(square[i] for i in held) / sum(square), key)


RULES: dict[str, Callable[[str, Spot], float]] = {
    "": coefficients(lambda x: 0.1 + 0.9 * x, 0.1),
    "--alpha 0.3": coefficients(lambda x: 0.3 + 0.7 * x, 0.3),
    "--alpha 0.2 --beta 0.5 --gamma 0.5": coefficients(lambda x: 0.2 + 0.5 * x, 0.2, gamma=0.5),
    "--alpha -0.4 --beta 2 --gamma -1.5": coefficients(lambda x: -0.4 + 2 * x, -0.4, gamma=-1.5),
    "--alpha 0 --beta 0": coefficients(lambda _: 0.0, 0.0),
    "--alpha 1 --beta 0": coefficients(lambda _: 1.0, 1.0),
    "--gamma 0": coefficients(lambda _: 0.0, 0.0),
    "--schedule power:2": coefficients(lambda x: 0.1 + 0.9 * x**2, 0.1),
    "--schedule power:0.5 --alpha 0.4 --beta 1.1 --gamma 2": coefficients(lambda x: 0.4 + 1.1 * x**0.5, 0.4, gamma=2),
    "--schedule constant --alpha 0.2 --beta 0.5": coefficients(lambda _: 0.7, 0.2),
    "--schedule 0.1,0.6,1.0": coefficients(at([0.1, 0.6, 1.0]), 0.1),
    "--schedule 0.7": coefficients(at([0.7]), 0.7),
    "--schedule 0.9,0.1,0.4,0.3,0.8 --gamma 0.5": coefficients(at([0.9, 0.1, 0.4, 0.3, 0.8]), 0.9, gamma=0.5),
    "--schedule 0.9,0.1,0.4,0.8 --outside position": coefficients(at([0.9, 0.1, 0.4, 0.8]), 0.9, 0.8),
    "--outside position --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 0.1, 1.0, gamma=0.5),
    "--outside base --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 0, gamma=0.5, outside_gamma=1),
    "--outside keep --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 1, gamma=0.5, outside_gamma=1),
    "--stack encoder=keep --outside keep": coefficients(
        lambda x: 0.1 + 0.9 * x, 1, stacks={"encoder.block": lambda _: 1.0}
    ),
    "--stack decoder.block=base --gamma 3": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, gamma=3, stacks={"decoder.block": lambda _: 0.0}
    ),
    "--stack decoder=0.3,0.2 --stack encoder=0.5,-0.5 --gamma 0.5": coefficients(
        lambda _: math.nan,
        0.1,
        gamma=0.5,
        stacks={"decoder.block": lambda x: 0.5 * (0.3 + 0.2 * x), "encoder.block": lambda x: 0.5 * (0.5 - 0.5 * x)},
    ),
    "--filter layer_norm=keep --filter decoder=0.25 --gamma 0.5": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, gamma=0.5, filters={"layer_norm": 1.0, "decoder": 0.25}
    ),
    "--filter block.1=base --filter *=0.3": coefficients(
        lambda _: math.nan, math.nan, filters={"block.1": 0.0, "*": 0.3}
    ),
    "--filter lm_head=-2 --outside position --stack encoder=0,1": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, 1.0, stacks={"encoder.block": lambda x: x}, filters={"lm_head": -2.0}
    ),
}


@pytest.mark.parametrize("options", RULES)
def test_coefficients_of_every_rule(options: str, tmp_path: Path) -> None:
    """The update that LiNeS would leave follows the rule that the options name, computed by hand."""
    base = pair_of_stacks(1)
    ft = tuned(base, 1)
    spots = pair_spots(base)
    c = {name: RULES[options](name, spot) for name, spot in spots.items()}
    told = inspect(*written(tmp_path, base, [ft]), *options.split(), "--tensors")
    check(told, Reference(base, [ft], spots, c))
    if "filter" in options:
        return
    for row in told["layers"]:  # without filters a layer's coefficient is that of any of its tensors
        inside = [c[name] for name, spot in spots.items() if (spot.stack, spot.index) == (row["stack"], row["index"])]
        agree(row["coefficient"], inside[0], "layer", absolute=1e-15)
    for row in told["stacks"]:
        ends = {spot.index: c[name] for name, spot in spots.items() if spot.stack == row["name"]}
        agree([row["first"], row["last"]], [ends[0], ends[max(ends)]], "stack", absolute=1e-15)
    agree(told["outside"]["before"]["coefficient"], c["shared.weight"], "before")
    agree(told["outside"]["after"]["coefficient"], c["lm_head.weight"], "after")


def test_coefficient_of_a_row_is_filters_apart(tmp_path: Path) -> None:
    """A layer's coefficient is that of its depth, though a filter says otherwise of all its tensors."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    told = inspect(*written(tmp_path, base, [ft]), "--filter", "layers.1=0.75", "--tensors")
    assert [row["coefficient"] for row in told["layers"]] == pytest.approx([0.1, 0.55, 1.0])
    middle = told["layers"][1]
    assert middle["scaled_norm"] == pytest.approx(0.75 * middle["update_norm"], rel=1e-12)
    assert {row["coefficient"] for row in told["map"] if row["index"] == 1} == {0.75}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--alpha", 0.3, "--gamma", 0.7, "--outside", "position"),
        ("--schedule", "0.2,0.9,0.4", "--filter", "norm=keep", "--filter", "lm_head=base"),
    ],
)
def test_scaled_norm_is_what_an_edit_leaves(options: tuple[object, ...], tmp_path: Path) -> None:
    """The norm of `out - base` after `lines edit` is the scaled norm that was told of the layer, to 1e-4."""
    base = toy(5, 5)
    ft = tuned(base, 5)
    ft_path, _, base_path = written(tmp_path, base, [ft])
    told = inspect(ft_path, "--base", base_path, *options)
    out = tmp_path / "out.safetensors"
    assert run_lines("edit", base_path, ft_path, "-o", out, "--quiet", *options).code == 0
    edited = loaded(out)
    for row in told["layers"]:
        names = [name for name in base if name.startswith(f"model.layers.{row['index']}.")]
        left = norm(vector(edited[n] for n in names) - vector(base[n] for n in names))
        assert row["scaled_norm"] == pytest.approx(left, rel=1e-4)
    names = [name for name in base if not name.startswith("model.layers.")]
    left = norm(vector(edited[n] for n in names) - vector(base[n] for n in names))
    assert told["outside"]["scaled_norm"] == pytest.approx(left, rel=1e-4)


def test_a_fine_tune_equal_to_its_base(tmp_path: Path) -> None:
    """Nothing changed: norms of zero, all unchanged, no tensor with the largest change, and no share of nothing."""
    base = toy(1)
    told = inspect(*written(tmp_path, base, [base]))
    check(told, toy_reference(base, [base]))
    one = told["fine_tunes"][0]
    assert (one["update_norm"], one["unchanged"], one["largest"], one["largest_in"]) == (0.0, 1.0, 0.0, None)
    assert [one[f"{kind}{end}_third"] for kind in ("", "scaled_") for end in ("first", "last")] == [None] * 4


def test_a_base_of_zeros(tmp_path: Path) -> None:
    """Relative to a base of zeros nothing can be told, and the norms are those of the fine-tune."""
    ft = toy(1)
    base = {name: torch.zeros_like(tensor) for name, tensor in ft.items()}
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert told["fine_tunes"][0]["relative_norm"] is None
