"""The coefficients that `lines inspect` shows: of options, and of the recipe beside an output."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lines_cli.inspection import compare as comparison
from support.files import write_checkpoint
from support.inspecting import DAMAGED, TWO, linear, llama, merged, named, ok, refused, rows_of, told, tuned
from support.run import run_lines

COEFFICIENTS = {
    # options: coefficients of 4 layers, before, behind
    "": (linear(0.1, 0.9), 0.1, 0.1),
    "--alpha 0.4": (linear(0.4, 0.6), 0.4, 0.4),
    "--alpha 0.4 --beta 0.2": (linear(0.4, 0.2), 0.4, 0.4),
    "--beta 0": ([0.1] * 4, 0.1, 0.1),
    "--alpha 0.4 --gamma 0.5": ([0.5 * c for c in linear(0.4, 0.6)], 0.2, 0.2),
    "--alpha=-1 --beta 3": (linear(-1, 3), -1, -1),
    "--schedule constant": ([1.0] * 4, 0.1, 0.1),
    "--schedule power:2 --alpha 0": ([0, 1 / 9, 4 / 9, 1], 0, 0),
    "--schedule 0.1,0.6,1": ([0.1, 0.1 / 3 + 2 * 0.6 / 3, 2 * 0.6 / 3 + 1 / 3, 1], 0.1, 0.1),
    "--schedule 0.3 --gamma 2": ([0.6] * 4, 0.6, 0.6),
    "--outside position": (linear(0.1, 0.9), 0.1, 1),
    "--outside position --gamma 0.5": ([0.5 * c for c in linear(0.1, 0.9)], 0.05, 0.5),
    "--outside base": (linear(0.1, 0.9), 0, 0),
    "--outside keep --gamma 0.5": ([0.5 * c for c in linear(0.1, 0.9)], 1, 1),
    "--stack layers=keep --gamma 0.5": ([1] * 4, 0.05, 0.05),
    "--stack model=base": ([0] * 4, 0.1, 0.1),
    "--stack model.layers=0.5,0.25": (linear(0.5, 0.25), 0.1, 0.1),
}


@pytest.mark.parametrize("options", COEFFICIENTS)
def test_coefficients(options: str, tmp_path: Path) -> None:
    """The coefficients of layers, of both sides and of every tensor follow from the options as the method says."""
    inside, before, after = COEFFICIENTS[options]
    report = told(write_checkpoint(tmp_path / "m", llama()), "--tensors", *options.split())
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(inside, rel=1e-14)
    assert report["outside"]["before"]["coefficient"] == pytest.approx(before)
    assert report["outside"]["after"]["coefficient"] == pytest.approx(after)
    (stack,) = report["stacks"]
    assert (stack["first"], stack["last"]) == pytest.approx((inside[0], inside[-1]))
    for row in report["map"]:
        expected = {None: inside[row["index"] or 0], "before": before, "after": after}[row["side"]]
        assert row["coefficient"] == pytest.approx(expected)


def test_a_filter_has_the_last_word(tmp_path: Path) -> None:
    """A filter decides the tensors it names, the first that matches, and changes no layer's coefficient."""
    path = write_checkpoint(tmp_path / "m", llama())
    report = told(path, "--tensors", "--filter", "norm=keep", "--filter", "layers.1=0.25", "--filter", "mlp=base")
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    for row in report["map"]:
        name = row["name"]
        if "norm" in name or "layers.1" in name or "mlp" in name:
            assert row["coefficient"] == (1 if "norm" in name else 0.25 if "layers.1" in name else 0)
    assert report["scaling"]["lines"]["filter"] == {"norm": "keep", "layers.1": 0.25, "mlp": "base"}
    assert "norm=keep" in ok(path, "--filter", "norm=keep").out


def test_two_stacks_of_their_own(tmp_path: Path) -> None:
    """--stack names a stack by any part of its name; the other stays as it was; one layer alone stands at the end."""
    model = named(*(f"encoder.block.{i}.w" for i in range(3)), "decoder.block.0.w", "decoder.block.0.v")
    path = write_checkpoint(tmp_path / "m.safetensors", model)
    report = told(path, "--stack", "encoder=0.5,0.25")
    found = {(layer["stack"], layer["index"]): layer["coefficient"] for layer in report["layers"]}
    assert found == {
        ("encoder.block", 0): 0.5,
        ("encoder.block", 1): 0.625,
        ("encoder.block", 2): 0.75,
        ("decoder.block", 0): 1.0,
    }


IMPOSSIBLE = {
    "--alpha nan": "alpha",
    "--beta inf": "beta",
    "--gamma=-inf": "gamma",
    "--alpha x": "alpha",
    "--schedule wavy": "schedule",
    "--schedule power:0": "schedule",
    "--schedule 1,2 --alpha 0.1": "alpha",
    "--outside inside": "outside",
    "--stack layers": "--stack",
    "--stack layers=a": "stack",
    "--stack layers=keep --stack layers=base": "--stack",
    "--filter x": "--filter",
    "--filter =1": "--filter",
    "--filter x=many": "filter",
    "--workers 0": "workers",
    "--device abacus": "abacus",
    "--stack nowhere=keep": "nowhere",
    "--stack layers=keep --stack model=base": "named already",
    "--filter nothing=keep": "nothing",
    "--layers (": "--layers",
    "--layers layers": "index",
}


@pytest.mark.parametrize("mode", [[], ["--check"], ["--base"]], ids=["headers", "check", "base"])
@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_impossible_options(options: str, mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be meant is refused with exit code 2, before any weight is read."""
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the weights were read"))
    path = write_checkpoint(tmp_path / "m", llama())
    base = [write_checkpoint(tmp_path / "base", llama())] if mode == ["--base"] else []
    ran = run_lines("inspect", path, *mode, *base, *options.split())
    assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
    assert IMPOSSIBLE[options] in ran.err


@pytest.mark.parametrize(
    "options",
    [
        "--alpha nan",
        "--schedule wavy",
        "--schedule 1,2 --alpha 0.1",
        "--plot x.pdf",
        "--device abacus",
        "--stack layers",
        "--alpha auto",
        "--workers 0",
    ],
)
def test_impossible_options_come_first(options: str, tmp_path: Path) -> None:
    """What is impossible whatever the checkpoint holds is refused before one is looked for, or fetched from the Hub."""
    for mode in ([], ["--base", tmp_path / "absent2"]):
        if options == "--alpha auto" and mode:  # of one fine-tune it is 1
            options += " --schedule wavy"
        ran = run_lines("inspect", tmp_path / "absent", *mode, *options.split())
        assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
        assert "absent" not in ran.err


@pytest.mark.parametrize(
    "options",
    [
        "--alpha 1e308 --gamma 1e308",
        "--base --alpha 1e200",
        "--check --alpha 1e308 --gamma 1e308",
        "--alpha 3.5e38",
        "--filter norm=1e39",
        "--stack layers=0,1e300",
        "--schedule 0,-1e300",
    ],
)
def test_a_coefficient_beyond_all_bounds(options: str, tmp_path: Path) -> None:
    """A coefficient beyond float32, which lines edit refuses, is refused here, too, and is no traceback."""
    path, base = (write_checkpoint(tmp_path / side, llama()) for side in ("ft", "base"))
    arguments = options.replace("--base", f"--base {base}").split()
    refused(2, path, *arguments, "--json", words=("coefficient",))


def test_a_filter_on_nothing(tmp_path: Path) -> None:
    """A filter on a file without tensors matches none of them, and is refused as any such."""
    refused(2, write_checkpoint(tmp_path / "m.safetensors", {}), "--filter", "x=1", words=("matches none",))


def test_an_edit_tells_its_recipe(tmp_path: Path) -> None:
    """An output of lines edit is shown with the recipe and coefficients that made it, unless options are given."""
    model = llama()
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    options = ["--alpha", "0.25", "--beta", "0.5", "--filter", "norm=keep", "--schedule", "power:2"]
    assert run_lines("edit", base, ft, "-o", tmp_path / "out", *options).code == 0
    report = told(tmp_path / "out", "--tensors")
    assert report["recipe"]["merge_method"] == "task_arithmetic"
    assert [os.path.basename(source["model"]) for source in report["recipe"]["models"]] == ["ft"]
    assert report["scaling"] == {"of": "output", "lines": report["recipe"]["lines"], "lambda": None, "alpha": 0.25}
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(
        [0.25 + 0.5 * (i / 3) ** 2 for i in range(4)]
    )
    assert all(row["coefficient"] == 1 for row in report["map"] if "norm" in row["name"])
    out = ok(tmp_path / "out").out
    assert re.search(r"^LiNeS +as in its recipe: alpha 0.25, beta 0.5, .*, filter norm=keep$", out, re.MULTILINE)
    assert "task_arithmetic of" in out

    given = told(tmp_path / "out", "--alpha", "0.5")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.5, 0.5)
    assert given["scaling"]["of"] == "asked"
    assert "filter" not in given["scaling"]["lines"]
    assert given["recipe"] == report["recipe"]


def test_a_merge_tells_its_recipe(tmp_path: Path) -> None:
    """An output of lines merge tells method, models, parameters, and the alpha that was measured."""
    model = llama()
    for at, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, tuned(model, at) if at else model)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.5}\nlines: {alpha: auto, beta: 0.5}\n"
    )
    assert run_lines("merge", "--config", tmp_path / "r.yaml", "-o", tmp_path / "out").code == 0
    report = told(tmp_path / "out")
    assert report["recipe"]["merge_method"] == "ties"
    alpha = report["recipe"]["lines"]["alpha"]
    assert 0 < alpha < 2
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(linear(alpha, 0.5))
    out = ok(tmp_path / "out").out
    assert "ties of" in out
    assert "density 0.5" in out


def test_a_merge_without_lines(tmp_path: Path) -> None:
    """An output that was not scaled says so, and every coefficient is 1."""
    weighted = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
    path = merged(tmp_path, f"merge_method: linear\n{weighted}\n")
    report = told(path, "--tensors")
    assert report["scaling"] == {"of": "output", "lines": None, "lambda": None, "alpha": None}
    assert {row["coefficient"] for key in ("layers", "map") for row in report[key]} == {1}
    out = ok(path).out
    assert "linear of" in out
    assert re.search(r"^LiNeS +as in its recipe: none; every coefficient is lambda, 1$", out, re.MULTILINE)


@pytest.mark.parametrize(("lines", "alpha"), [("", 1.0), ("lines: {alpha: 0.4, beta: 0.5}\n", 0.4)])
def test_lambda_multiplies(lines: str, alpha: float, tmp_path: Path) -> None:
    """The coefficients of an output are those of its recipe times its lambda; without LiNeS lambda alone."""
    recipe = f"merge_method: task_arithmetic\n{TWO}parameters: {{lambda: 0.5}}\n{lines}"
    path = merged(tmp_path, recipe)
    report = told(path, "--tensors")
    inside = [0.5 * c for c in linear(alpha, 0.5 if lines else 0.0)]
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(inside)
    assert [report["outside"][side]["coefficient"] for side in ("before", "after")] == [0.5 * alpha] * 2
    for row in report["map"]:
        assert row["coefficient"] == pytest.approx(0.5 * alpha if row["index"] is None else inside[row["index"]])
    scaling = report["scaling"]
    assert (scaling["of"], scaling["lambda"], scaling["alpha"]) == ("output", 0.5, alpha if lines else None)
    assert (scaling["lines"] is None) == (not lines)
    words = "times lambda, 0.5" if lines else "none; every coefficient is lambda, 0.5"
    assert re.search(rf"^LiNeS +as in its recipe: .*{words}$", ok(path).out, re.MULTILINE)


def test_a_lambda_by_filter_and_depth(tmp_path: Path) -> None:
    """A lambda that depends on names and on depth decides each tensor's coefficient, and nothing breaks."""
    parameters = "{lambda: [{filter: mlp, value: 0.25}, {value: [0.1, 1.0]}]}"
    path = merged(tmp_path, f"merge_method: task_arithmetic\n{TWO}parameters: {parameters}\n")
    for row in told(path, "--tensors")["map"]:
        depth = 0.1 if row["index"] is None else 0.1 + 0.9 * row["index"] / 3
        assert row["coefficient"] == pytest.approx(0.25 if "mlp" in row["name"] else depth)
    assert ok(path).err == ""


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_recipe(what: str, tmp_path: Path) -> None:
    """A recipe that cannot be read is a note, and the defaults hold."""
    path = write_checkpoint(tmp_path / "m", llama())
    (path / "lines_recipe.yaml").write_text(DAMAGED[what], encoding="utf-8", errors="surrogateescape")
    report = told(path)
    assert report["recipe"] is None
    assert any("recipe" in note for note in report["notes"])
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    assert "recipe" in ok(path).err


@pytest.mark.parametrize(
    "lines",
    [
        "{beta: 1, alpha: 0, filter: {nope: 1}}",
        "{beta: 1, alpha: 0, stacks: {nope: keep}}",
        "{beta: 1, alpha: 1.0e+39}",
        "{beta: 1, alpha: 0, layers: '('}",
    ],
)
def test_a_recipe_that_does_not_fit(lines: str, tmp_path: Path) -> None:
    """A recipe that says nothing usable of these weights (a stray file) is a note, and the defaults hold."""
    path = write_checkpoint(tmp_path / "m", llama())
    (path / "lines_recipe.yaml").write_text(f"base_model: /b\nmodels: [{{model: /a}}]\nlines: {lines}\n")
    report = told(path)
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    assert report["scaling"]["of"] == "asked"
    (note,) = report["notes"]
    assert "its recipe" in note
    assert "its recipe" in ok(path).err


def test_an_alpha_that_was_never_measured(tmp_path: Path) -> None:
    """A recipe whose alpha is still auto gives coefficients that nobody knows: null, and - on the screen."""
    path = write_checkpoint(tmp_path / "m", llama())
    recipe = "base_model: /b\nmodels: [{model: /a}, {model: /c}]\nlines: {alpha: auto, beta: 0.5, filter: {mlp: 1}}\n"
    (path / "lines_recipe.yaml").write_text("merge_method: ties\nparameters: {density: 0.5}\n" + recipe)
    report = told(path, "--tensors")
    assert (report["scaling"]["of"], report["scaling"]["alpha"]) == ("output", None)
    assert {layer["coefficient"] for layer in report["layers"]} == {None}
    assert (report["stacks"][0]["first"], report["outside"]["before"]["coefficient"]) == (None, None)
    assert {row["coefficient"] for row in report["map"] if "mlp" not in row["name"]} == {None}
    assert {row["coefficient"] for row in report["map"] if "mlp" in row["name"]} == {1}
    out = ok(path, "--tensors", "--check").out
    assert "auto is to be measured" in out
    assert rows_of(out, "model.layers")[0][-1] == "-"
    (path / "lines_recipe.yaml").write_text(recipe)  # of a sum it is 1/N
    assert [layer["coefficient"] for layer in told(path)["layers"]] == linear(0.5, 0.5)
