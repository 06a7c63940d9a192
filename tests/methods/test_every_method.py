"""What holds for every merge method, and for those that installed packages add."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli import installed
from lines_cli.errors import DataError, RecipeError
from lines_cli.methods import METHODS, Method, find_method, registry
from lines_cli.methods.iso_c import iso_c as own_iso_c
from support.files import write_checkpoint
from support.method_cases import CASES, TABLE, TYPICAL, Case
from support.run import run_lines
from support.spectral_references import iso_c
from support.whole_model import norm1, plain_sum, task_vectors

ROOT = Path(__file__).parents[2]
Tensors = dict[str, torch.Tensor]
SHAPES = {
    "model.embed_tokens.weight": (23, 12),
    **{f"model.layers.{n}.mlp.experts.up": (3, 10, 7) for n in range(2)},
    **{f"model.layers.{n}.mlp.up.weight": (31, 12) for n in range(2)},
    **{f"model.layers.{n}.norm.weight": (12,) for n in range(2)},
    "model.scale": (),
    "model.conv.weight": (4, 3, 2, 2),
}


def model(seed: int, rows: int = 23) -> Tensors:
    chance = torch.Generator().manual_seed(seed)
    shapes = SHAPES | {"model.embed_tokens.weight": (rows, 12)}
    return {name: torch.randn(shape, generator=chance) for name, shape in shapes.items()}


def save(folder: Path, models: list[Tensors]) -> None:
    for name, tensors in zip(("base", "a", "b", "c"), models, strict=False):
        write_checkpoint(folder / name, tensors)


def recipe(method: str, said: Any, names: str = "abc", **more: Any) -> dict[str, Any]:
    entry = TABLE.get(method)
    names = names[: entry.models] if entry is not None and entry.models else names
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in names],
        "parameters": dict(said),
        **more,
    }


def merged(folder: Path, asked: dict[str, Any], out: str = "out", **resources: Any) -> lines.Outcome:
    (folder / "merge.yaml").write_text(yaml.safe_dump(asked))
    loaded = lines.load_recipe(folder / "merge.yaml")
    plan = lines.make_plan(loaded, lines.open_inputs(loaded), folder / out)
    return lines.run(plan, lines.Resources(**{"device": "cpu", **resources}))


def test_every_method_is_in_the_table() -> None:
    """A method that is added is tried by every test that goes through them all."""
    assert TABLE.keys() == METHODS.keys()
    assert all(any(case.method == method for case in CASES.values()) for method in METHODS)
    assert all(entry.typical for entry in TABLE.values())
    assert {m for m, entry in TABLE.items() if entry.on_weights} == {
        m for m in METHODS if METHODS[m].takes == "weights"
    }


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_documented(method: str) -> None:
    """In the reference, in the help, and with a source or a reason in its docstring."""
    assert f"\n## `{method}`\n" in (ROOT / "docs" / "merge-methods.md").read_text()
    assert method in run_lines("merge", "--help").out
    assert METHODS[method].merge.__doc__


FIRST = [pytest.param(case, marks=() if case.endswith("-0") else pytest.mark.slow) for case in TYPICAL]


@pytest.mark.parametrize("case", FIRST)
@pytest.mark.slow
def test_inspect_tells_the_alpha_of_the_merge(case: str, tmp_path: Path) -> None:
    """`lines inspect --config` measures what the merge of the recipe measures, and that is the reference's."""
    method, said = TYPICAL[case]
    models = [model(seed) for seed in range(4)]
    save(tmp_path, models)
    asked = recipe(method, said, lines={"beta": 0.5})
    outcome = merged(tmp_path, asked)
    told = run_lines("inspect", "--config", tmp_path / "merge.yaml", "--json").json
    assert told["scaling"]["alpha"] == outcome.plan.alpha
    if "weight" not in said and not TABLE[method].on_weights and method != "task_arithmetic":
        taus = task_vectors(models[0], models[1 : 1 + (TABLE[method].models or 3)])
        reference = Case(method, {key: value for key, value in said.items() if key != "lambda"}).merged(taus, models[0])
        assert outcome.plan.alpha == pytest.approx(norm1(plain_sum(taus)) / norm1(reference) / len(taus), rel=1e-6)


# --- whole tensors ---


@pytest.mark.parametrize("rows", [23, 20])
def test_whole_tensors_for_any_chunk_and_any_number_of_workers(rows: int, tmp_path: Path) -> None:
    """The same bytes and the same alpha; with another vocabulary only the rows that all have are merged."""
    models = [model(0), *(model(seed, rows) for seed in (1, 2))]
    save(tmp_path, models)
    asked = recipe("iso_c", {}, "ab", lines={"beta": 0.5}, resize="base")
    plain = merged(tmp_path, asked, "plain", workers=1)
    for workers, chunk in ((3, 7), (2, 100), (4, 1)):
        name = f"{workers}-{chunk}"
        other = merged(tmp_path, asked, name, workers=workers, chunk=chunk)
        assert other.plan.alpha == plain.plan.alpha
        assert (tmp_path / name / "model.safetensors").read_bytes() == (
            tmp_path / "plain" / "model.safetensors"
        ).read_bytes()
    embedding = "model.embed_tokens.weight"
    base, *others = ({**m, embedding: m[embedding][:rows]} for m in models)
    expected = iso_c(task_vectors(base, others), weight=[1, 1])
    alpha = plain.plan.alpha
    assert alpha is not None
    got = load_file(tmp_path / "plain" / "model.safetensors")
    torch.testing.assert_close(
        got[embedding][:rows], base[embedding] + alpha * expected[embedding], rtol=1e-5, atol=1e-5
    )
    assert torch.equal(got[embedding][rows:], models[0][embedding][rows:])


@pytest.mark.slow
def test_a_tensor_over_several_spans_is_merged_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By one worker for all of them, in each pass."""
    large = {"layers.0.w": (2_500_000,), "layers.1.w": (3, 4)}
    chance = torch.Generator().manual_seed(0)
    save(tmp_path, [{name: torch.randn(shape, generator=chance) for name, shape in large.items()} for _ in range(3)])
    calls: list[torch.Size] = []
    counted = Method(
        lambda tensors, **said: calls.append(tensors[0].shape) or own_iso_c(tensors, **said),  # type: ignore[func-returns-value]
        "counts",
        sees="tensors",
        parameters=METHODS["iso_c"].parameters,
        keywords=METHODS["iso_c"].keywords,
    )
    monkeypatch.setattr(registry, "METHODS", {**METHODS, "counted": counted})
    find_method.cache_clear()
    merged(tmp_path, recipe("counted", {}, "ab"), workers=3, chunk=70_000)
    assert sorted(calls) == [torch.Size([3, 4]), torch.Size([2_500_000])]
    find_method.cache_clear()


def test_whole_tensors_are_in_the_forecast(tmp_path: Path) -> None:
    """Of the largest tensors one for each worker, from all models', with the method's workspace."""
    save(tmp_path, [model(seed) for seed in range(3)])

    def forecast(method: str, workers: int) -> int:
        (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe(method, {}, "ab")))
        loaded = lines.load_recipe(tmp_path / "merge.yaml")
        plan = lines.make_plan(loaded, lines.open_inputs(loaded), tmp_path / "out")
        return plan.whole_bytes(workers)

    up = 31 * 12 * 4 * 4 + METHODS["iso_c"].workspace((31, 12))
    assert forecast("average", 2) == 0
    assert forecast("iso_c", 1) == up
    assert forecast("iso_c", 2) == 2 * up


def test_null_directions_stay_null() -> None:
    """Of a sum of rank 2 no other direction is written; the mean counts the zeros."""
    chance = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(n, 2, generator=chance).double()).Q for n in (9, 6))
    tau = (u * torch.tensor([3.0, 1.0]).double() @ v.T).float()
    got = own_iso_c([tau.clone()], weight=[1.0])
    torch.testing.assert_close(got, (4 / 6 * u @ v.T).float())
    assert not own_iso_c([torch.zeros(4, 5)], weight=[1.0]).any()
    assert own_iso_c([torch.zeros(0, 5)], weight=[1.0]).shape == (0, 5)


@pytest.mark.slow
def test_nan_in_a_whole_tensor_names_the_input(tmp_path: Path) -> None:
    """Wherever in the tensor it stands; let through, it fills the matrix that it stands in."""
    models = [model(seed) for seed in range(3)]
    models[2]["model.layers.1.mlp.experts.up"][1, 4, 5] = torch.nan
    save(tmp_path, models)
    with pytest.raises(DataError, match=r"b/model.safetensors: tensor model.layers.1.mlp.experts.up holds NaN"):
        merged(tmp_path, recipe("iso_c", {}, "ab"), workers=2, chunk=7)
    outcome = merged(tmp_path, recipe("iso_c", {}, "ab", allow_nonfinite=True), workers=2, chunk=7)
    assert outcome.nonfinite.keys() == {"model.layers.1.mlp.experts.up"}
    assert "first at entry 103" in outcome.nonfinite["model.layers.1.mlp.experts.up"]
    got = load_file(tmp_path / "out" / "model.safetensors")["model.layers.1.mlp.experts.up"]
    assert got.isnan().flatten(1).any(1).tolist() == got.isnan().flatten(1).all(1).tolist() == [False, True, False]


# --- packages that add methods ---


def added(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Installed packages that add methods."""
    found = [EntryPoint(name, value, registry.GROUP) for name, value in points.items()]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found if group == registry.GROUP else [])
    find_method.cache_clear()
    installed.added.cache_clear()


def test_a_package_that_fails_to_import_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe that asks for its method, and by no other."""
    save(tmp_path, [model(seed) for seed in range(2)])
    added(monkeypatch, broken="no_such_module:METHOD", odd="json:dumps", ties="no_such_module:TIES")
    for name, words in (("broken", "no_such_module"), ("odd", "json:dumps is function, not lines_cli.methods.Method")):
        with pytest.raises(RecipeError, match=f"'{name}' is a method of the package") as refused:
            merged(tmp_path, recipe(name, {}, "a"))
        assert words in str(refused.value)
    with pytest.raises(RecipeError, match="did you mean broken"):
        merged(tmp_path, recipe("brokem", {}, "a"))
    assert find_method("ties") is METHODS["ties"]
    merged(tmp_path, recipe("ties", {}, "a"))
    find_method.cache_clear()
    installed.added.cache_clear()


@pytest.mark.slow
def test_the_example_package_of_the_docs(tmp_path: Path) -> None:
    """docs/add-a-merge-method.md: its package is installed, and merges."""
    page = (ROOT / "docs" / "add-a-merge-method.md").read_text()
    package = tmp_path / "package"
    package.mkdir()
    for file, text in re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", page, re.DOTALL):
        (package / file).write_text(text)
    assert {path.name for path in package.iterdir()} == {"pyproject.toml", "lines_median.py"}
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--target", tmp_path / "site", package], check=True)
    models = [model(seed) for seed in range(4)]
    save(tmp_path, models)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe("median", {"lambda": 0.5}, "abc")))
    command = [sys.executable, "-m", "lines_cli", "merge", "--config", "merge.yaml", "-o", "out", "--quiet"]
    path = f"{tmp_path / 'site'}:{ROOT}"
    subprocess.run(command, check=True, cwd=tmp_path, env={"PYTHONPATH": path, "PATH": "/usr/bin:/bin"})
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        taus = torch.stack([other[name] - models[0][name] for other in models[1:]])
        assert torch.equal(tensor, models[0][name] + 0.5 * taus.median(0).values)
