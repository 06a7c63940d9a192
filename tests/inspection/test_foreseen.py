"""What rounding would leave of an edit, before it is made: the numbers of the edit itself, and of whole tensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.plan.realised import Forecast, unit_bin, unit_sizes
from support.files import write_checkpoint
from support.run import run_lines

LAYERS = 5
NUMPY = {torch.float16: np.int16, torch.bfloat16: np.int16, torch.float32: np.int32}


def pair(folder: Path, base: torch.dtype, ft: torch.dtype, *, scale: float = 4e-5, layers: int = LAYERS) -> None:
    generator = torch.Generator().manual_seed(0)
    names = ["embed_tokens.weight", *(f"layers.{i}.{part}.w" for i in range(layers) for part in ("attn", "mlp"))]
    first = {name: (torch.randn(30, 40, generator=generator) * 0.02).to(base) for name in names}
    second = {
        name: (tensor.double() + torch.randn(30, 40, generator=generator) * scale).to(ft)
        for name, tensor in first.items()
    }
    write_checkpoint(folder / "base", first)
    write_checkpoint(folder / "ft", second)


CASES = {
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "f16": (torch.float16, torch.float16, None),
    "f32 on bf16": (torch.bfloat16, torch.float32, "bfloat16"),
    "bf16 into f16": (torch.bfloat16, torch.bfloat16, "float16"),
    "f64 into f32": (torch.float64, torch.float64, "float32"),
    "bf16 into f32": (torch.bfloat16, torch.bfloat16, "float32"),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_what_the_edit_realises(tmp_path: Path, case: str) -> None:
    """Layer by layer, outside the blocks too, with a filter and a coefficient of 1: the numbers that the edit tells."""
    base, ft, dtype = CASES[case]
    pair(tmp_path, base, ft)
    said = {"alpha": 0.1, "beta": 0.9, "filter": {"mlp": 0.3}}
    report = lines.inspect(tmp_path / "ft", base=tmp_path / "base", dtype=dtype, tensors=True, **said)
    made = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", dtype=dtype, **said)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    first, second = (load_file(tmp_path / side / "model.safetensors") for side in ("base", "ft"))
    for tensor in report["map"]:
        name = tensor["name"]
        tau = second[name].double() - first[name].double()
        realised = float(((stored[name].double() - first[name].double()) * tau).sum() / (tau * tau).sum())
        assert tensor["realised"] == pytest.approx(realised, rel=1e-6)
    outside = made["realised"]["outside"]["realised"]
    assert report["outside"]["realised"] == pytest.approx(outside, rel=1e-9)
    for layer, of_edit in zip(report["layers"], made["layers"], strict=True):
        assert layer["coefficient"] == of_edit["coefficient"]
        assert layer["realised"] == pytest.approx(of_edit["realised"], rel=1e-9)  # that of a filter apart
    off = {row["index"] for row in report["rounding"]["off"]}
    for index, layer in enumerate(report["layers"]):
        far = abs(layer["realised"] - layer["coefficient"])
        assert (index in off) == (far > 0.05 or far > 0.1 * layer["coefficient"])
    rows = [(row["pattern"], row["realised"]) for row in report["rounding"]["filters_off"]]
    [of_filter] = made["realised"]["filters"]
    far = abs(of_filter["realised"] - 0.3) > 0.03
    assert rows == ([("mlp", pytest.approx(of_filter["realised"], rel=1e-9))] if far else [])
    sides = [(row["side"], row["coefficient"]) for row in report["rounding"]["outside_off"]]
    assert sides == ([("before", 0.1)] if abs(outside - 0.1) > 0.01 else [])
    assert report["rounding"]["dtype"] == (dtype or {torch.bfloat16: "bfloat16", torch.float16: "float16"}[ft])


@pytest.mark.parametrize("case", CASES)
def test_updates_in_units_in_the_last_place(tmp_path: Path, case: str) -> None:
    """Of how many numbers of the output dtype entries moved: the median, and the shares of 0, 1 and 2."""
    base, ft, dtype = CASES[case]
    pair(tmp_path, base, ft, scale=1e-4)
    report = lines.inspect(tmp_path / "ft", base=tmp_path / "base", dtype=dtype)
    out = getattr(torch, dtype) if dtype else ft
    first, second = (load_file(tmp_path / side / "model.safetensors") for side in ("base", "ft"))

    def places(tensor: torch.Tensor) -> np.ndarray:
        """The numbers of a dtype in order, from 0 at zero."""
        bits = tensor.to(out).reshape(-1).view({2: torch.int16, 4: torch.int32}[tensor.to(out).element_size()]).numpy()
        magnitude = bits.astype(np.int64) & np.iinfo(NUMPY[out]).max
        return np.where(bits < 0, -magnitude, magnitude)

    for index, layer in enumerate(report["layers"]):
        names = [f"layers.{index}.{part}.w" for part in ("attn", "mlp")]
        moved = np.concatenate([np.abs(places(first[name]) - places(second[name])) for name in names])
        shares = [float((moved == size).mean()) for size in range(3)]
        units = layer["units"]
        assert [units[word] for word in ("zero", "one", "two")] == pytest.approx(shares)
        assert units["median"] == pytest.approx(np.sort(moved)[(len(moved) - 1) // 2], rel=0.07)


def test_units_across_zero_and_beside_what_is_not_finite(tmp_path: Path) -> None:
    """From -1 to +2 of the smallest numbers it is 3 units, and both zeros are one number; NaN and Inf on either side
    are left out.
    """
    tiny, inf, nan = 2.0**-133, float("inf"), float("nan")
    first = [[-tiny, 0.0, -0.0, tiny, 1.0, inf, 1.0, inf], [1.0] * 8]
    second = [[2 * tiny, -0.0, tiny, -tiny, 1.0, inf, nan, 1.0], [1.0] * 8]
    for side, rows in (("base", first), ("ft", second)):
        tensors = {f"layers.{i}.w": torch.tensor(row, dtype=torch.bfloat16) for i, row in enumerate(rows)}
        write_checkpoint(tmp_path / side, tensors)
    units = lines.inspect(tmp_path / "ft", base=tmp_path / "base")["layers"][0]["units"]
    assert units == {"median": 1.0, "zero": 0.4, "one": 0.2, "two": 0.2}  # of 3, 0, 1, 2, 0


def test_bins_of_units() -> None:
    """Each size below 16 has a bin of its own; above, eight to an octave; in order, without a gap."""
    sizes = [*range(40), 1000, 2**20, 2**40]
    bins = [unit_bin(size) for size in sizes]
    assert len(set(bins[:16])) == 16
    assert bins == sorted(bins)
    for size, bin_ in zip(sizes, bins, strict=True):
        low, end = unit_sizes(bin_)
        assert low <= size < end
        assert end - low <= max(1, low / 8)
    total = Forecast(units={unit_bin(0): 2, unit_bin(3): 1}) + Forecast(units={unit_bin(3): 2})
    assert Forecast(units={unit_bin(size): 1 for size in range(3)}).median == 1
    assert (total.median, total.share(0), total.share(3), total.share(1)) == (3.0, 0.4, 0.6, 0.0)


def test_copies_and_no_update(tmp_path: Path) -> None:
    """Coefficients of 0 and 1 are realised as they are; without an update there is nothing to realise."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16)
    report = lines.inspect(tmp_path / "ft", base=tmp_path / "base", schedule=[0, 0.5, 1])
    realised = [layer["realised"] for layer in report["layers"]]
    assert (realised[0], realised[-1]) == (0.0, 1.0)
    pair(tmp_path, torch.bfloat16, torch.bfloat16, scale=0.0)
    report = lines.inspect(tmp_path / "ft", base=tmp_path / "base")
    assert [layer["realised"] for layer in report["layers"]] == [None] * LAYERS
    assert [layer["units"]["zero"] for layer in report["layers"]] == [1.0] * LAYERS
    assert report["rounding"]["off"] == []


def test_what_a_filter_asks_is_not_what_rounding_undoes(tmp_path: Path) -> None:
    """In float32 nothing is undone, whatever a filter asks of a part of each layer; of a recipe's `weight` for a part
    nothing is foreseen.
    """
    pair(tmp_path, torch.bfloat16, torch.bfloat16, scale=1e-3)
    said = {"base": tmp_path / "base", "dtype": "float32"}
    report = lines.inspect(tmp_path / "ft", filter={"attn": "base"}, tensors=True, **said)
    assert report["rounding"]["off"] == []
    assert [layer["realised"] for layer in report["layers"]] == pytest.approx(
        [layer["coefficient"] for layer in report["layers"]], rel=1e-3
    )
    assert {row["name"]: row["realised"] for row in report["map"]}["layers.1.attn.w"] == 0.0
    whole = lines.inspect(tmp_path / "ft", filter={"layers": 0.5}, **said)
    assert [layer["realised"] for layer in whole["layers"]] == [None] * LAYERS
    weights = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    recipe = {"base_model": str(tmp_path / "base"), "merge_method": "task_arithmetic", "dtype": "float32"}
    recipe["models"] = [{"model": str(tmp_path / "ft"), "parameters": {"weight": weights}}]
    merge = lines.inspect(config=recipe | {"lines": {"alpha": 0.2, "beta": 0.8}}, tensors=True)
    assert {row["name"]: row["realised"] for row in merge["map"]}["layers.1.mlp.w"] is None
    assert merge["rounding"]["off"] == []
    assert [layer["realised"] for layer in merge["layers"]] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--filter", "*=0.3"], "what * names would have"),
        (["--schedule", "0,0,0,0,1", "--outside", "alpha", "--filter", "attn=base"], "leaves every coefficient as it"),
        (["--alpha", "0.3", "--stack", "layers=keep"], "what lies before the blocks would have"),
    ],
)
def test_what_would_be_off_outside_the_layers_is_said_too(tmp_path: Path, flags: list[str], words: str) -> None:
    """Of a filter, and of what lies outside the blocks, as the edit says it afterwards."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16, scale=2e-5)
    ran = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", *flags)
    assert (ran.code, words in " ".join(ran.out.split())) == (0, True), ran.out
    made = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", *flags)
    said = " ".join(made.err.split())
    assert ("distorted" in said) == ("would distort" in ran.out)
    assert words.replace("would have", "has" if "would have" in words else "") in said or "leaves" in words


def test_a_base_that_has_to_be_rounded_is_still_a_copy(tmp_path: Path) -> None:
    """A coefficient of 0 is 0, here as in the edit, although rounding moves the base towards the fine-tune."""
    pair(tmp_path, torch.float32, torch.bfloat16, scale=0.0)
    report = lines.inspect(tmp_path / "ft", base=tmp_path / "base", schedule=[0, 0.5, 0.5, 0.5, 1])
    made = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", schedule=[0, 0.5, 0.5, 0.5, 1])
    assert report["layers"][0]["realised"] == made["layers"][0]["realised"] == 0.0
    assert made["layers"][0]["changed"] is None  # rounding changed some, which nobody counted
    for foreseen, layer in zip(report["layers"][1:], made["layers"][1:], strict=True):
        assert foreseen["realised"] == pytest.approx(layer["realised"], rel=1e-9)


@pytest.mark.slow
def test_it_is_said_before_anything_is_written(tmp_path: Path) -> None:
    """In words: a layer, both numbers, and what helps; a table by layer; or that all is well."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16, scale=2e-5)
    ran = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base")
    assert ran.code == 0
    for words in (
        "to bfloat16 would distort the scaling",
        "--rounding stochastic",
        "layers in bfloat16",
        "at 0 ulp",
        "outside the blocks in bfloat16",
    ):
        assert words in ran.out
    for flags in ([], ["--filter", "mlp=keep"]):  # a filter is asked, too: what it decides is not off
        fine = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", "--dtype", "float32", *flags)
        assert "to float32 leaves every coefficient as it is asked" in fine.out
    alone = run_lines("inspect", tmp_path / "ft", "--dtype", "float32")
    assert (alone.code, "--dtype" in alone.err) == (2, True)


def test_an_output_shows_what_its_recipe_records(tmp_path: Path) -> None:
    """Asked and realised, with its base or alone; what a second edit would come to is not foreseen."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16)
    made = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    for flags in ([], ["--base", tmp_path / "base"]):
        told = run_lines("inspect", tmp_path / "out", *flags, "--json").json
        assert [layer["realised"] for layer in told["recorded"]] == [
            round(row["realised"], 4) for row in made["layers"]
        ]
        assert told.get("rounding") is None
        shown = run_lines("inspect", tmp_path / "out", *flags).out
        assert "layers, as its recipe records it" in shown
        table = shown[shown.index("as its recipe records it") :].splitlines()
        assert table[1].split() == ["layer", "asked", "realised", "changed"]
        assert len(table[2].split()) == 4


def test_a_recipe_foresees_its_own_dtype(tmp_path: Path) -> None:
    """Of a planned edit in a recipe the dtype is the recipe's; of a merge of several nothing is foreseen."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16)
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / "ft")}],
        "lines": {"alpha": 0.3, "beta": 0.4},
        "dtype": "float16",
    }
    assert lines.inspect(config=recipe)["rounding"]["dtype"] == "float16"
    assert lines.inspect(config=recipe | {"rounding": "stochastic"})["rounding"] is None
    recipe["models"].append({"model": str(tmp_path / "other")})
    write_checkpoint(tmp_path / "other", load_file(tmp_path / "ft" / "model.safetensors"))
    several = lines.inspect(config=recipe)
    assert several["rounding"] is None
    assert several["fine_tunes"][0]["layers"][0]["realised"] is None


@pytest.mark.slow
def test_a_record_from_a_stranger(tmp_path: Path) -> None:
    """Whatever a recipe records of layers, of none that are there or as no numbers, is shown or refused."""
    pair(tmp_path, torch.bfloat16, torch.bfloat16)
    lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out")
    record = tmp_path / "out" / "lines_recipe.yaml"
    text = record.read_text()
    listed = text[text.index("layers:\n- ") : text.index("# What was read")]
    elsewhere = listed.replace("stack: layers", 'stack: "no\\e[31mwhere"')
    for changed in (elsewhere, "layers: nothing\n", "layers: [{stack: a}]\n", listed.replace("index: 0", "index: -1")):
        record.write_text(text.replace(listed, changed))
        for flags in ([], ["--plot", tmp_path / "plot.svg"]):
            ran = run_lines("inspect", tmp_path / "out", *flags)
            assert ran.trace == ""
            assert "\x1b" not in ran.out + ran.err
