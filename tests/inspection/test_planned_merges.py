"""`lines inspect --config`: a merge that is planned."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from lines_cli.inspection import compare as comparison
from support.inspecting import TWO, linear, ok, refused, told
from support.run import run_lines


@pytest.mark.parametrize(
    "extra",
    [
        ["{a}"],
        ["--base", "{base}"],
        ["--alpha", "0.1"],
        ["--beta", "0"],
        ["--gamma", "1"],
        ["--schedule", "constant"],
        ["--outside", "keep"],
        ["--stack", "layers=keep"],
        ["--filter", "norm=keep"],
        ["--layers", r"(?P<index>\d+)"],
    ],
)
def test_a_recipe_says_it_all(extra: list[str], outputs: Path) -> None:
    """--config goes with no checkpoint, no base and no scaling of one's own."""
    named = [word.format(a=outputs / "a", base=outputs / "base") if word[0] == "{" else word for word in extra]
    refused(2, "--config", outputs / "r.yaml", *named, words=("--config", "hint: "))
    refused(2, "--config", outputs / "absent.yaml", *named)  # before the recipe is opened
    assert "absent.yaml" not in run_lines("inspect", "--config", outputs / "absent.yaml", *named).err


def test_nothing_to_inspect() -> None:
    """Without a checkpoint and a recipe there is nothing to do, whatever else is said."""
    for options in ([], ["--json"], ["--check"], ["--base", "absent"], ["--alpha", "0.1"]):
        refused(2, *options, words=("nothing to inspect", "--config"))


BAD_RECIPES = {
    "absent": None,
    "no base": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
    "no YAML": "{",
    "unknown key": f"{TWO}lines: {{alpha: 0, beta: 1}}\nsecret: 1\n",
    "one model twice": "base_model: base\nmodels: [{model: a}, {model: ./a}]\n",
    "a filter of nothing": f"{TWO}lines: {{alpha: 0, beta: 1, filter: {{nope: 1}}}}\n",
    "beyond float32": f"{TWO}lines: {{alpha: 1.0e+39, beta: 1}}\n",
}


@pytest.mark.parametrize("what", BAD_RECIPES)
def test_a_recipe_that_cannot_be(what: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that no merge could follow is refused with exit code 2, before any weight is read."""
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the weights were read"))
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(outputs / name)
    text = BAD_RECIPES[what]
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    ran = run_lines("inspect", "--config", tmp_path / "r.yaml")
    assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
    assert ran.err.startswith("error: ")


def recipe_beside(outputs: Path, name: str, text: str) -> Path:
    (outputs / name).write_text(text)
    return outputs / name


def test_a_planned_merge_tells_its_alpha(outputs: Path) -> None:
    """--config tells where the coefficients come from, what auto is, and the same as the merge that is then made."""
    ran = ok("--config", outputs / "r.yaml", "--tensors")
    report = told("--config", outputs / "r.yaml", "--tensors")
    recipe = told(outputs / "out")["recipe"]
    alpha = report["together"]["auto"]["alpha"]
    assert alpha == recipe["lines"]["alpha"]
    assert report["scaling"] == {"of": "merge", "lines": report["merge"]["lines"], "lambda": None, "alpha": alpha}
    assert report["scaling"]["lines"]["alpha"] == "auto"
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(linear(alpha, 0.5))
    assert re.search(
        rf"^LiNeS +as in the recipe: alpha auto, beta 0.5, .*; auto is {alpha:.4g}$", ran.out, re.MULTILINE
    )
    assert re.search(rf"^auto +alpha {alpha:.4g} = 1/2 \* .*, the L1 norms of .* ties merges$", ran.out, re.MULTILINE)
    assert [os.path.basename(tune["model"]) for tune in report["fine_tunes"]] == ["a", "b"]
    assert os.path.basename(report["base"]) == "base"
    for tensor in report["map"]:
        expected = alpha if tensor["index"] is None else alpha + 0.5 * tensor["index"] / 3
        assert tensor["coefficient"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "alpha", "words"),
    [
        (f"{TWO}lines: {{alpha: auto, beta: 0.5}}\n", 0.5, "alpha auto, beta 0.5, .*; auto is 0.5$"),
        (f"{TWO}lines: {{alpha: 0.3, beta: 0.5}}\n", 0.3, "alpha 0.3, beta 0.5, .*outside alpha$"),
        (
            f"{TWO}parameters: {{lambda: 0.5}}\nlines: {{alpha: 0.3, beta: 0.5}}\n",
            0.15,
            "alpha 0.3, beta 0.5, .*; times lambda, 0.5$",
        ),
        (f"{TWO}parameters: {{lambda: 0.3}}\n", 0.3, "none; every coefficient is lambda, 0.3$"),
        (TWO, 1.0, "none; every coefficient is lambda, 1$"),
        ("base_model: base\nmodels: [{model: a}]\nlines: {alpha: 0.2, beta: 0.5}\n", 0.2, "alpha 0.2, beta 0.5, "),
    ],
)
@pytest.mark.some(3)
def test_where_coefficients_come_from(recipe: str, alpha: float, words: str, outputs: Path) -> None:
    """The text says that they are the recipe's, and what they are."""
    path = recipe_beside(outputs, "other.yaml", recipe)
    assert re.search(rf"^LiNeS +as in the recipe: {words}", ok("--config", path).out, re.MULTILINE)
    report = told("--config", path)
    assert report["layers"][0]["coefficient"] == pytest.approx(alpha)
    assert report["fine_tunes"][0]["layers"][0]["coefficient"] == pytest.approx(alpha)


@pytest.mark.slow
def test_the_default_of_several(outputs: Path) -> None:
    """Of several fine-tunes the coefficients are those of alpha auto, 1/N, and beta 0.5; of one an edit's."""
    base = ["--base", outputs / "base"]
    report = told(outputs / "a", outputs / "b", *base)
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.5, 0.5)
    assert (report["scaling"]["of"], report["scaling"]["alpha"]) == ("asked", 0.5)
    assert "auto is 0.5" in ok(outputs / "a", outputs / "b", *base).out
    assert [layer["coefficient"] for layer in told(outputs / "a", *base)["layers"]] == linear(0.1, 0.9)
    given = told(outputs / "a", outputs / "b", *base, "--alpha", "0.2")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.2, 0.8)
    given = told(outputs / "a", outputs / "b", *base, "--beta", "0.25")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.5, 0.25)
