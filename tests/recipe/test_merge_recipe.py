"""The recipe of `lines merge`: paths, the recipe in the output, --dry-run, --json."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from support.files import snapshot
from support.recipes_of_merges import AGAIN, merge, no_constant, of, recipe_text, said, write_models
from support.run import run_lines

# --- output, paths ---


def test_no_output_is_refused(models: Path, tmp_path: Path) -> None:
    """With neither -o nor output: the message names both."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, {"base_model": "base", "models": of("a")})))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert "-o" in said(ran)
    assert "output:" in said(ran)


def test_an_empty_output_is_blamed_where_it_stands(models: Path, tmp_path: Path) -> None:
    """`output: ""` in the file is called output, not -o."""
    recipe = recipe_text(models, {"base_model": "base", "models": of("a"), "output": ""})
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert ran.code == 2
    assert "output" in said(ran).partition("hint:")[0]


def test_the_command_lines_output_wins(models: Path, tmp_path: Path) -> None:
    """-o overrules output:, and only one of them is written."""
    assert merge(models, tmp_path, {"base_model": "base", "models": of("a"), "output": "other"}).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "out"]


def test_paths_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, in which other models have the same names, those beside the recipe are meant."""
    names = ["layers.0.w", "layers.1.w"]
    write_models(tmp_path / "desk" / "in", names, {"base": 100.0, "a": 200.0})
    write_models(tmp_path / "recipe" / "in", names, {"base": 0.0, "a": 1.0})
    for side in ("base", "a"):
        (tmp_path / "recipe" / "in" / side / "tokenizer.json").write_text(f'{{"version": "{side}"}}')
    (tmp_path / "recipe" / "merge.yaml").write_text(
        "base_model: ./in/base\nmodels: [{model: in/../in/a}]\ntokenizer_source: in/../in/a\noutput: made/out\n"
    )
    monkeypatch.chdir(tmp_path / "desk")
    ran = run_lines("merge", "--config", "../recipe/merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    out = tmp_path / "recipe" / "made" / "out"
    assert set(load_file(out / "model.safetensors")["layers.0.w"].tolist()) == {1.0}
    assert json.loads((out / "tokenizer.json").read_text()) == {"version": "a"}
    assert not (tmp_path / "desk" / "made").exists()


def test_an_output_counts_from_here_on_the_command_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-o counts from the working folder, while --set output= counts from the recipe's."""
    (tmp_path / "desk").mkdir()
    (tmp_path / "recipe").mkdir()
    recipe = recipe_text(models, {"base_model": "base", "models": of("a")})
    (tmp_path / "recipe" / "merge.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "desk")
    assert run_lines("merge", "--config", "../recipe/merge.yaml", "-o", "one.safetensors").code == 0
    assert run_lines("merge", "--config", "../recipe/merge.yaml", "--set", "output=two.safetensors").code == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert found == {"desk/one.safetensors", "recipe/two.safetensors"}


# --- the recipe in the output ---


@pytest.mark.parametrize("recipe", AGAIN.values(), ids=AGAIN)
@pytest.mark.some(6)
def test_the_outputs_recipe_makes_the_same_bytes(
    recipe: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output's own recipe, run from elsewhere, makes every file again, and holds nothing left to be measured."""
    for name in ("noisy-base", "noisy-a", "noisy-b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "model.safetensors").write_bytes((models / name / "model.safetensors").read_bytes())
    recipe = copy.deepcopy(recipe) | {"output": "../made/one"}
    (tmp_path / "in" / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.chdir(tmp_path / "in")
    ran = run_lines("merge", "--config", "merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    one, two = tmp_path / "made" / "one", tmp_path / "made" / "two"
    monkeypatch.chdir(tmp_path)
    ran = run_lines("merge", "--config", "made/one/lines_recipe.yaml", "-o", "made/two")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    first, second = snapshot(one), snapshot(two)
    for found in (first, second):
        found["lines_recipe.yaml"] = yaml.safe_load(found["lines_recipe.yaml"])  # but for comments
        found["README.md"] = found["README.md"].replace(b"# one", b"# two")  # its title
        assert "auto" not in json.dumps(found["lines_recipe.yaml"])
        del found["lines_recipe.yaml"]["run"]  # which was one with auto
        del found["lines_recipe.yaml"]["card"]  # whose title is another
    assert first == second


# --- --dry-run, --json ---


TIES = {
    "merge_method": "ties",
    "base_model": "noisy-base",
    "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": 0.25}}),
    "parameters": {"density": 0.375},
    "lines": {"beta": 0.5},
}


@pytest.mark.slow
def test_dry_run_writes_nothing_and_loads_no_torch(models: Path, tmp_path: Path) -> None:
    """A merge is planned without torch, and without a trace on the disk."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, {**TIES, "output": "out"})))
    before = snapshot(tmp_path), snapshot(models)
    program = (
        "import sys\nfrom lines_cli.cli.app import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "merge", "--config", "merge.yaml", "--dry-run"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert "thresholds" in run.stdout
    assert (snapshot(tmp_path), snapshot(models)) == before


def test_dry_run_shows_passes_and_models(models: Path, tmp_path: Path) -> None:
    """It says which passes measure what, each model's weight and density, and that alpha is still to be measured."""
    ran = merge(models, tmp_path, TIES, "--dry-run")
    assert ran.code == 0
    measured = next(line for line in ran.out.splitlines() if line.startswith("measure"))
    assert "threshold" in measured
    assert "norms" in measured
    for name, weight in (("noisy-a", "1"), ("noisy-b", "0.25")):
        row = next(line for line in ran.out.splitlines() if name in line and "0.375" in line)
        assert weight in row.replace(name, "").split()
    assert "auto" in ran.out


@pytest.mark.parametrize("recipe", AGAIN.values(), ids=AGAIN)
def test_json_is_json(recipe: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """stdout is one JSON object, without NaN or Infinity, and the real run's keys are the dry run's but for the map."""
    dry = merge(models, tmp_path, recipe, "--json", "--dry-run")
    real = merge(models, tmp_path, recipe, "--json")
    assert (dry.code, real.code) == (0, 0)
    planned, done = (json.loads(ran.out, parse_constant=no_constant) for ran in (dry, real))
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert planned.keys() - done.keys() == {"map", "peak_memory"}
    if recipe.get("lines"):
        assert planned["alpha"] is None
        assert done["alpha"] == pytest.approx(done["norms"]["sum"] / done["norms"]["merged"] / 2)
        assert all(stack["first"] is not None for stack in done["stacks"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "dare_linear"])
def test_json_is_json_with_nan_let_through(method: str, value: float, tmp_path: Path) -> None:
    """Where NaN and Inf are let through, a norm that they spoil is null."""
    write_models(tmp_path, ["layers.0.w", "layers.1.w"], {"base": 0.0, "a": 1.0, "b": value})
    recipe = {"merge_method": method, "models": of("a", "b"), "allow_nonfinite": True}
    recipe |= {} if method == "linear" else {"base_model": "base"}
    ran = merge(tmp_path, tmp_path / "to", recipe, "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert json.loads(ran.out, parse_constant=no_constant)["nonfinite"]
