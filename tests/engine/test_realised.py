"""What rounding left of the coefficients: held against whole tensors in float64, and told where a person looks."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.engine.realised import realised
from lines_cli.engine.run import run
from lines_cli.errors import RecipeError
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.realised import Realised, is_off
from lines_cli.plan.resources import Resources
from lines_cli.recipe.validate import make_recipe
from support.files import write_checkpoint
from support.run import run_lines

Tensors = dict[str, torch.Tensor]
LAYERS = 5


def base_of(dtype: torch.dtype, *, rows: int = 12) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "embed_tokens.weight": (rows, 64),
        **{f"layers.{i}.{part}": (40, 64) for i in range(LAYERS) for part in ("attn.w", "mlp.w")},
        "norm.weight": (64,),
    }
    return {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}


def tuned(base: Tensors, seed: int, dtype: torch.dtype, *, scale: float = 5e-5) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (tensor.float() + torch.randn(tensor.shape, generator=generator) * scale).to(dtype)
        for name, tensor in base.items()
    }


def pair(
    folder: Path, base: torch.dtype = torch.bfloat16, ft: torch.dtype = torch.bfloat16, **how: Any
) -> tuple[Tensors, Tensors]:
    first = base_of(base)
    second = tuned(first, 1, ft, **how)
    write_checkpoint(folder / "base", first)
    write_checkpoint(folder / "ft", second)
    return first, second


def expected(base: Tensors, out: Tensors, tau: Tensors, names: list[str]) -> tuple[float, float]:
    """The realised coefficient and the share of entries that changed, of some tensors together, in float64."""
    product = squares = 0.0
    changed = entries = 0
    for name in names:
        change = out[name].double() - base[name].double()
        product += float((change * tau[name]).sum())
        squares += float((tau[name] * tau[name]).sum())
        changed += int((change != 0).sum())
        entries += change.numel()
    return product / squares, changed / entries


def of_layer(index: int, part: str = "") -> list[str]:
    return [f"layers.{index}.{name}" for name in ("attn.w", "mlp.w") if part in name]


DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16, None),
    "bf16, tuned in f32": (torch.bfloat16, torch.float32, "bfloat16"),
    "bf16 into f16": (torch.bfloat16, torch.bfloat16, "float16"),
    "f32 into bf16": (torch.float32, torch.float32, "bfloat16"),
    "f16 with subnormals": (torch.float16, torch.float16, None),
    "f32": (torch.float32, torch.float32, None),
    "f64 into f32": (torch.float64, torch.float64, "float32"),
}


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("case", DTYPES)
def test_an_edit_tells_what_was_realised(tmp_path: Path, case: str, rounding: str) -> None:
    """Of every layer, the stack, what lies outside and what a filter names: as whole tensors give it, and a coefficient
    of 1 too, where that has to be rounded.
    """
    base_dtype, ft_dtype, dtype = DTYPES[case]
    base, ft = pair(tmp_path, base_dtype, ft_dtype)
    said = {"dtype": dtype, "rounding": rounding, "filter": {"norm": 0.5}}
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.2, beta=0.8, **said)
    left = summary["realised"]
    out = load_file(tmp_path / "out" / "model.safetensors")
    tau = {name: ft[name].double() - base[name].double() for name in base}
    asked = [0.2, 0.4, 0.6, 0.8, 1.0]
    copied = out["layers.4.mlp.w"].dtype == ft_dtype or case == "bf16 into f16"
    for index, layer in enumerate(summary["layers"]):
        assert (layer["stack"], layer["index"]) == ("layers", index)
        assert layer["coefficient"] == pytest.approx(asked[index])
        realised, changed = expected(base, out, tau, of_layer(index))
        if index == LAYERS - 1 and copied and case != "bf16 into f16":
            assert (layer["realised"], layer["changed"]) == (1.0, None)  # a copy: the base is not read for it
        else:
            assert layer["realised"] == pytest.approx(realised, rel=1e-6)
            assert layer["changed"] == changed
    realised, changed = expected(base, out, tau, ["embed_tokens.weight"])
    assert (left["outside"]["realised"], left["outside"]["changed"]) == (
        pytest.approx(realised, rel=1e-6),
        changed,
    )
    realised, _ = expected(base, out, tau, ["norm.weight"])
    assert summary["realised"]["filters"][0]["realised"] == pytest.approx(realised, rel=1e-6)
    computed = [
        name
        for index in range(LAYERS if not copied or case == "bf16 into f16" else LAYERS - 1)
        for name in of_layer(index)
    ]
    stack = left["stacks"][0]
    realised, changed = expected(base, out, tau, computed)
    assert stack["realised"] == pytest.approx(realised, rel=1e-6)
    assert stack["changed"] == changed
    weights = {name: float((tau[name] ** 2).sum()) for name in computed}
    mean = sum(asked[int(name.split(".")[1])] * weight for name, weight in weights.items()) / sum(weights.values())
    assert stack["asked"] == pytest.approx(mean)


@pytest.mark.parametrize("method", ["task_arithmetic", "average", "ties", "dare_linear"])
def test_a_merge_is_held_against_its_own_task_vector(tmp_path: Path, method: str) -> None:
    """Against the merged task vector before it is scaled and rounded: in float32 output the coefficient is that which
    was asked; in bfloat16 it is what one computes from the float32 output.
    """
    base = base_of(torch.bfloat16)
    write_checkpoint(tmp_path / "base", base)
    for seed, side in enumerate("ab", 1):
        write_checkpoint(tmp_path / side, tuned(base, seed, torch.bfloat16))
    parameters = {"density": 0.6} if method in ("ties", "dare_linear") else {}
    recipe = {
        "merge_method": method,
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / side)} for side in "ab"],
        "parameters": parameters,
        "lines": {"alpha": 0.2, "beta": 0.6},
    }
    whole = lines.merge(recipe | {"lines": {"alpha": 1.0, "beta": 0.0}, "dtype": "float64"}, tmp_path / "tau")
    assert [layer["realised"] for layer in whole["layers"]] == pytest.approx([1.0] * LAYERS, abs=1e-5)
    merged = {
        name: tensor - base[name].double() for name, tensor in load_file(tmp_path / "tau" / "model.safetensors").items()
    }
    summary = lines.merge(recipe, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    for index, layer in enumerate(summary["layers"]):
        realised, changed = expected(base, out, merged, of_layer(index))
        assert layer["realised"] == pytest.approx(realised, rel=1e-3)  # tau is known here only after base + tau
        assert layer["changed"] == changed
    off = [abs(layer["realised"] - layer["coefficient"]) for layer in summary["layers"]]
    assert max(off) > 0.003  # or else there would be nothing to see


def test_filters_inside_layers_are_told_apart(tmp_path: Path) -> None:
    """A layer's number is of the tensors that have its coefficient; those of a filter stand with the filter."""
    base, ft = pair(tmp_path)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.3, filter={"mlp": 0.9})
    out = load_file(tmp_path / "out" / "model.safetensors")
    tau = {name: ft[name].double() - base[name].double() for name in base}
    for index, layer in enumerate(summary["layers"][:-1]):
        assert layer["realised"] == pytest.approx(expected(base, out, tau, of_layer(index, "attn"))[0])
    of_filter = [name for index in range(LAYERS) for name in of_layer(index, "mlp")]
    assert summary["realised"]["filters"][0]["realised"] == pytest.approx(expected(base, out, tau, of_filter)[0])


def test_copies_are_exact(tmp_path: Path) -> None:
    """A coefficient of 0 changes nothing, one of 1 all; neither is measured, and no input is read for it."""
    base, ft = pair(tmp_path)
    summary = lines.edit(
        tmp_path / "base", tmp_path / "ft", tmp_path / "out", schedule=[0, 0, 0.5, 1, 1], outside="base"
    )
    assert [layer["realised"] for layer in summary["layers"]][:2] == [0.0, 0.0]
    assert [layer["changed"] for layer in summary["layers"]][:2] == [0.0, 0.0]
    assert [(layer["realised"], layer["changed"]) for layer in summary["layers"]][3:] == [(1.0, None)] * 2
    left = summary["realised"]
    nbytes = {name: tensor.numel() * tensor.element_size() for name, tensor in base.items()}
    assert summary["bytes"]["read"] == sum(nbytes.values()) + sum(nbytes[name] for name in of_layer(2))
    assert (left["outside"]["realised"], left["outside"]["changed"]) == (0.0, 0.0)
    del ft


def test_the_base_of_a_copy_that_is_widened_is_not_read(tmp_path: Path) -> None:
    """float32 holds a bfloat16 fine-tune whole, so there is nothing to measure."""
    base, _ = pair(tmp_path)
    said = {"schedule": "constant", "alpha": 1.0, "dtype": "float32"}
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", **said)
    assert summary["bytes"]["read"] == sum(tensor.numel() * 2 for tensor in base.values())


def test_a_tensor_with_a_lambda_of_its_own_is_no_part_of_its_layer(tmp_path: Path) -> None:
    """Its coefficient is not its layer's."""
    pair(tmp_path, scale=1e-3)
    scales = [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]
    recipe = {"base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "ft")}], "dtype": "float32"}
    recipe |= {"parameters": {"lambda": scales}, "lines": {"alpha": 0.2, "beta": 0.6}}
    layers = lines.merge(recipe, tmp_path / "out")["layers"]
    assert [layer["coefficient"] for layer in layers] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8])
    assert [layer["realised"] for layer in layers] == pytest.approx([0.2, 0.35, 0.5, 0.65, 0.8], rel=1e-3)


def test_where_there_is_no_update_nothing_is_realised(tmp_path: Path) -> None:
    """A fine-tune that is its base has no direction to measure along; without a base there is no task vector."""
    base, _ = pair(tmp_path, scale=0.0)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", beta=0.5)
    assert [(layer["realised"], layer["changed"]) for layer in summary["layers"]] == [(None, 0.0)] * LAYERS
    write_checkpoint(tmp_path / "other", tuned(base, 3, torch.bfloat16))
    models = [{"model": str(tmp_path / side)} for side in ("base", "other")]
    merged = lines.merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "linear")
    assert merged["layers"] == []
    assert merged["realised"]["outside"] == {"asked": None, "realised": None, "changed": None}


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    """With NaN and Inf let through, the numbers are of the other entries."""
    base, ft = pair(tmp_path)
    ft["layers.1.mlp.w"][3, 5], ft["layers.1.mlp.w"][0, 0] = float("nan"), float("inf")
    write_checkpoint(tmp_path / "ft", ft)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", allow_nonfinite=True)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for tensors in (base, ft, out):
        tensors["layers.1.mlp.w"][3, 5] = tensors["layers.1.mlp.w"][0, 0] = 0.0
    tau = {name: ft[name].double() - base[name].double() for name in base}
    assert summary["layers"][1]["realised"] == pytest.approx(expected(base, out, tau, of_layer(1))[0], rel=1e-9)


def test_a_layer_that_is_not_finite_realises_nothing(tmp_path: Path) -> None:
    """It is computed, so it is no copy that has what was asked; nor is it said to be off."""
    base, ft = pair(tmp_path)
    for name in of_layer(1):
        ft[name].fill_(float("nan"))
    write_checkpoint(tmp_path / "ft", ft)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--allow-nonfinite", "--json")
    layer = ran.json["layers"][1]
    assert (layer["index"], layer["realised"], layer["changed"]) == (1, None, None)
    assert not any("distorted" in line and "layer 1" in line for line in ran.err.splitlines())
    del base


def test_a_copy_beside_what_has_to_be_rounded_is_measured_too(tmp_path: Path) -> None:
    """Of a layer with a coefficient of 1 whose norms alone are in float32, the numbers are of the whole layer; a copy
    keeps its bytes, those of a NaN too.
    """
    base = base_of(torch.bfloat16)
    base |= {f"layers.{i}.norm.weight": torch.rand(50) for i in range(LAYERS)}
    ft = tuned(base, 1, torch.bfloat16)
    for i in range(LAYERS):
        base[f"layers.{i}.norm.weight"] = base[f"layers.{i}.norm.weight"].bfloat16()
        ft[f"layers.{i}.norm.weight"] = base[f"layers.{i}.norm.weight"].float() + 1e-3 * torch.randn(50)
    ft["layers.2.mlp.w"].view(torch.int16)[0, 0] = 0x7FA1  # a signalling NaN with a payload
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", ft)
    said = {"schedule": "constant", "alpha": 1.0, "dtype": "bfloat16", "allow_nonfinite": True}
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", **said)
    out = load_file(tmp_path / "out" / "model.safetensors")
    for part in ("attn.w", "mlp.w"):
        for i in range(LAYERS):
            assert torch.equal(out[f"layers.{i}.{part}"].view(torch.int16), ft[f"layers.{i}.{part}"].view(torch.int16))
    for tensors in (base, ft, out):
        tensors["layers.2.mlp.w"][0, 0] = 0.0
    tau = {name: ft[name].double() - base[name].double() for name in base}
    for index, layer in enumerate(summary["layers"]):
        names = [*of_layer(index), f"layers.{index}.norm.weight"]
        assert layer["realised"] == pytest.approx(expected(base, out, tau, names)[0], rel=1e-6)
    assert summary["realised"]["outside"]["realised"] == 1.0
    assert summary["realised"]["outside"]["changed"] is None  # nothing of it is rounded: the base is not read


@pytest.mark.slow
def test_neither_workers_nor_chunks_change_it(tmp_path: Path) -> None:
    """The same numbers, and the same recipe, byte for byte, however the work is cut."""
    pair(tmp_path)
    said = {"base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "ft")}], "like": "ft"}
    recipe = make_recipe(said | {"lines": {"alpha": 0.1, "beta": 0.9}}, where="recipe")
    found = []
    for number, how in enumerate(({}, {"workers": 1, "chunk": 7}, {"workers": 3, "chunk": 100})):
        plan = make_plan(recipe, open_inputs(recipe, quiet=True), tmp_path / f"{number}" / "out")
        (tmp_path / f"{number}").mkdir()
        outcome = run(plan, Resources(device="cpu", **how))
        found.append(([row.realised for row in outcome.realised], (plan.output / "lines_recipe.yaml").read_bytes()))
    assert all(record == found[0][1] for _, record in found)
    assert all(realised == pytest.approx(found[0][0], rel=1e-12) for realised, _ in found)


def test_the_recipe_records_it_and_is_still_a_recipe(tmp_path: Path) -> None:
    """lines_recipe.yaml lists the layers of --json, in four decimals; as a recipe it makes the same output."""
    pair(tmp_path)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json")
    record = tmp_path / "out" / "lines_recipe.yaml"
    listed = yaml.safe_load(record.read_text())["layers"]
    assert len(listed) == LAYERS
    for recorded, layer in zip(listed, ran.json["layers"], strict=True):
        assert recorded.keys() == layer.keys() == {"stack", "index", "coefficient", "realised", "changed"}
        assert recorded["realised"] == round(layer["realised"], 4)
        assert recorded["coefficient"] == layer["coefficient"]
    assert run_lines("merge", "--config", record, "-o", tmp_path / "again").code == 0
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("layers", [2_001, pytest.param(10_500, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_record_of_very_many_layers_is_left_out(layers: int, tmp_path: Path) -> None:
    """A recipe may have so many values and no more; what lines wrote, lines reads."""
    base = {f"layers.{i}.w": torch.full((2,), 1.0) for i in range(layers)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", {name: tensor + 0.5 for name, tensor in base.items()})
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json")
    assert len(ran.json["layers"]) == len(base)
    assert "layers:" not in (tmp_path / "out" / "lines_recipe.yaml").read_text().splitlines()
    assert run_lines("verify", tmp_path / "out").code == 0


def test_a_regex_for_layers_is_not_taken_for_the_record() -> None:
    """`layers:` at the top of a recipe is what lines records; whoever means lines.layers is told."""
    recipe = {"base_model": "b", "models": [{"model": "f"}], "layers": r"h\.(?P<index>\d+)"}
    with pytest.raises(RecipeError, match=r"lines\.layers"):
        make_recipe(recipe, where="recipe")


@pytest.mark.parametrize(
    ("asked", "realised", "off"),
    [
        (1.0, 0.949, True),
        (1.0, 0.951, False),
        (0.1, 0.111, True),
        (0.1, 0.109, False),
        (-0.1, -0.089, True),
        (-0.1, -0.091, False),
        (2.0, 2.06, True),
        (0.0, 0.049, False),
        (0.0, -0.051, True),
        (0.5, None, False),
    ],
)
def test_off_by_more_than_a_twentieth_or_than_a_tenth_of_it(asked: float, realised: float | None, off: bool) -> None:
    """Whichever is less."""
    assert is_off(asked, realised) == off


@pytest.mark.slow
def test_the_summary_says_where_rounding_distorts_the_scaling(tmp_path: Path) -> None:
    """One line: a layer, both numbers, why, and both ways out, which do what they say. Nothing where all is well."""
    pair(tmp_path, scale=2e-5)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.code == 0
    [said] = [line for line in ran.err.splitlines() if "distorted" in line]
    for words in (
        "warning: ",
        "bfloat16",
        "of layers",
        "asked",
        "last place",
        "--rounding stochastic",
        "--dtype float32",
    ):
        assert words in said
    told = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "told", "--json").json
    worst = max(told["layers"], key=lambda layer: abs(layer["realised"] - layer["coefficient"]))
    off = [layer for layer in told["layers"] if is_off(layer["coefficient"], layer["realised"])]
    assert f"layer {worst['index']} of layers has {worst['realised']:.3g} where {worst['coefficient']:.3g} was" in said
    others = re.search(r", and (\d+) other coefficients are off\.", said)
    assert others is not None
    assert 0 <= int(others[1]) - (len(off) - 1) <= 2  # what lies before and behind the layers counts, too
    assert "realised  0: " in ran.out
    quiet = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "quiet", "--quiet")
    assert "distorted" in quiet.err
    for flags in (["--dtype", "float32"], ["--rounding", "stochastic", "--alpha", "0.5"]):
        better = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / flags[1], *flags, "--json")
        assert better.code == 0
        off = [abs(layer["realised"] - layer["coefficient"]) for layer in json.loads(better.out)["layers"]]
        assert max(off) < 0.1
    exact = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "exact", "--dtype", "float32")
    assert "distorted" not in exact.err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_way_out_is_named_where_there_is_none(tmp_path: Path, dtype: torch.dtype) -> None:
    """Updates of one unit of the dtype that the arithmetic runs in are lost before anything is rounded to the output's:
    no option helps, and none is named, before or after.
    """
    base = {f"layers.{i}.w": torch.rand(1000, dtype=dtype) + 1 for i in range(3)}
    ft = {name: torch.nextafter(tensor, torch.full_like(tensor, 9)) for name, tensor in base.items()}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", ft)
    for number, flags in enumerate(([], ["--rounding", "stochastic"], ["--dtype", "float64"])):
        ran = run_lines(
            "edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / f"{number}", "--alpha", "0.3", *flags
        )
        [said] = [line for line in ran.err.splitlines() if "the scaling:" in line]
        assert f"runs in {str(dtype).removeprefix('torch.')}, so no option changes that" in said
        assert "--" not in said
    seen = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", "--alpha", "0.3").out
    assert "no option changes that" in " ".join(seen.split())


def test_the_line_names_the_dtype_of_what_is_off(tmp_path: Path) -> None:
    """Norms in float16 beside weights in float32: it is float16 that undoes their scaling."""
    base = base_of(torch.float32)
    ft = tuned(base, 1, torch.float32)
    base["norm.weight"], ft["norm.weight"] = torch.ones(64).half(), torch.full((64,), 1 + 2.0**-10).half()
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", ft)
    command = ("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--filter", "norm=0.3")
    [said] = [line for line in run_lines(*command).err.splitlines() if "distorted" in line]
    assert "rounding to float16" in said
    assert "what norm names has 0 where 0.3 was asked" in said


def test_a_merge_names_the_keys_of_a_recipe(tmp_path: Path) -> None:
    """What helps is said as the reader would write it."""
    base, _ = pair(tmp_path, scale=2e-5)
    write_checkpoint(tmp_path / "b", tuned(base, 2, torch.bfloat16, scale=2e-5))
    recipe = {"base_model": "base", "models": [{"model": "ft"}, {"model": "b"}], "lines": {"alpha": 0.1, "beta": 0.9}}
    recipe |= {"merge_method": "task_arithmetic"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
    assert ran.code == 0
    [said] = [line for line in ran.err.splitlines() if "distorted" in line]
    assert "rounding: stochastic" in said
    assert "dtype: float32" in said
    assert "--" not in said


def test_rounding_a_whole_fine_tune_is_seen_too(tmp_path: Path) -> None:
    """A float32 fine-tune of a bfloat16 base, written as bfloat16: its copies lose updates, which is said."""
    pair(tmp_path, torch.bfloat16, torch.float32, scale=2e-5)
    ran = run_lines(
        *("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out"),
        *("--schedule", "constant", "--alpha", "1", "--dtype", "bfloat16"),
    )
    assert ran.code == 0, ran.err
    [said] = [line for line in ran.err.splitlines() if "distorted" in line]
    assert "where 1 was asked" in said


@pytest.mark.slow
def test_an_edit_that_was_interrupted_tells_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a first run measured is kept with the parts that it wrote."""
    generator = torch.Generator().manual_seed(0)
    base = {f"layers.{i}.w": (torch.randn(1_500_000, generator=generator) * 0.02).bfloat16() for i in range(4)}
    ft = tuned(base, 1, torch.bfloat16)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", ft)
    command = ("edit", tmp_path / "base", tmp_path / "ft", "--alpha", "0.2", "--beta", "0.4")
    whole = run_lines(*command, "-o", tmp_path / "whole", "--json").json
    from lines_cli.engine import write

    calls = 0
    make = write.Write._make

    def stopping(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 8:
            raise KeyboardInterrupt
        return make(*args)

    with monkeypatch.context() as patch:
        patch.setattr(write.Write, "_make", stopping)
        assert run_lines(*command, "-o", tmp_path / "out", "--workers", "1").code != 0
    ran = run_lines(*command, "-o", tmp_path / "out", "--resume", "--json")
    assert ran.code == 0, ran.err
    for layer, other in zip(ran.json["layers"], whole["layers"], strict=True):
        assert layer["realised"] == pytest.approx(other["realised"], rel=1e-12)
        assert layer["changed"] == other["changed"]


@pytest.mark.parametrize("cuts", [[], [1], [16_384], [7, 16_383, 16_385, 150_000, 300_000], [8 * 16_384 + 3]])
def test_one_run_in_eight_is_counted_for_all(cuts: list[int]) -> None:
    """However a large tensor is cut, the same runs of 16,384 entries are looked at: the first of each eight, whole."""
    run_length, every = 16_384, 8
    generator = torch.Generator().manual_seed(0)
    size = 20 * run_length + 1000
    base = torch.randn(size, generator=generator)
    tau = torch.randn(size, generator=generator) * 1e-3
    stored = (base + 0.3 * tau).bfloat16()
    looked_at = [at for at in range(size) if at // run_length % every == 0]
    change = stored.double()[looked_at] - base.double()[looked_at]
    product, squares = float((change * tau.double()[looked_at]).sum()), float((tau.double()[looked_at] ** 2).sum())
    found = Realised()
    for first, end in pairwise([0, *cuts, size]):
        part = slice(first, end)
        found += realised(stored[part], base[part], tau[part], first=first, every=every)
    assert found.product == pytest.approx(every * product, rel=1e-6)
    assert found.squares == pytest.approx(every * squares, rel=1e-12)
    assert (found.changed, found.entries) == (every * int((change != 0).sum()), every * len(looked_at))


@pytest.mark.slow
def test_large_tensors_in_blocks_are_sampled_and_others_are_not(tmp_path: Path) -> None:
    """What an edit tells of a layer with a large matrix is within 0.002 of all its entries; an embedding as large, of
    which only some rows were tuned, is looked at whole.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = 2200, 2048
    base = {
        name: (torch.randn(rows, columns, generator=generator) * 0.02).bfloat16()
        for name in ("embed_tokens.weight", "layers.0.w", "layers.1.w")
    }
    ft = tuned(base, 1, torch.bfloat16, scale=5e-5)
    ft["embed_tokens.weight"] = base["embed_tokens.weight"].clone()
    ft["embed_tokens.weight"][40:50] = tuned(base, 2, torch.bfloat16, scale=5e-5)["embed_tokens.weight"][40:50]
    for side, tensors in (("base", base), ("ft", ft)):
        write_checkpoint(tmp_path / side, tensors)
    summary = lines.edit(tmp_path / "base", tmp_path / "ft", tmp_path / "out", alpha=0.2, beta=0.4)
    out = load_file(tmp_path / "out" / "model.safetensors")
    tau = {name: ft[name].double() - base[name].double() for name in base}
    for index, layer in enumerate(summary["layers"]):
        realised_, changed = expected(base, out, tau, [f"layers.{index}.w"])
        assert layer["realised"] == pytest.approx(realised_, abs=0.002)
        assert layer["realised"] != pytest.approx(realised_, rel=1e-9)
        assert layer["changed"] == pytest.approx(changed, abs=0.005)
    realised_, changed = expected(base, out, tau, ["embed_tokens.weight"])
    outside = summary["realised"]["outside"]
    assert (outside["realised"], outside["changed"]) == (pytest.approx(realised_, rel=1e-9), changed)
