"""Candidates, one after another in one process: the bytes of a run of each, on the disk and in a live module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.engine.candidates import Candidates
from lines_cli.plan.resources import Resources
from lines_cli.sweeping.config import space_from
from lines_cli.sweeping.trials import combinations
from support.files import write_checkpoint

LAYERS = 3
RECIPES: dict[str, dict[str, Any]] = {
    "an edit": {"models": ["ft"]},
    "task arithmetic": {"parameters": {"weight": 0.4}},
    "average": {"merge_method": "average"},
    "ties": {"merge_method": "ties", "parameters": {"density": 0.4}},
    "ties by tensor": {"merge_method": "ties", "parameters": {"density": 0.4, "trim": "tensor"}},
    "dare": {"merge_method": "dare_linear", "parameters": {"density": 0.5, "seed": 3}},
    "consensus": {"merge_method": "consensus"},
    "breadcrumbs": {"merge_method": "breadcrumbs", "parameters": {"density": 0.7}},
    "stochastic rounding": {"merge_method": "ties", "rounding": "stochastic", "rounding_seed": 2},
    "another dtype": {"dtype": "float32"},
    "iso_c": {"merge_method": "iso_c"},
    "slerp": {"merge_method": "slerp", "parameters": {"t": 0.3}},
}
GRID: dict[str, Any] = {"lines.alpha": [1.0, 0.3, 0.0, 0.3, "auto"], "lines.beta": [0.0, 0.4]}
PARTS: list[dict[str, Any]] = [
    {"lines.alpha": [1.0, 0.3, "auto"], "lines.beta": [0.4]},
    {"lines.alpha": [0.3, 0.0, 0.3], "lines.beta": [0.4]},
    {"lines.alpha": [0.3], "lines.beta": [0.0, 0.4]},
]
DTYPES = ("bfloat16", "float32")


def cases(first: int) -> list[Any]:
    """Every recipe with every dtype and the whole grid; by default with the dtypes in turn and a part of the grid."""
    made = []
    for number, (name, said) in enumerate(RECIPES.items()):
        made += [pytest.param(one, said, GRID, marks=pytest.mark.slow, id=f"{one}-{name}") for one in DTYPES]
        dtype = DTYPES[(first + number) % 2]
        made.append(pytest.param(dtype, said, PARTS[number % 3], id=f"{dtype}-{name}-a part of the grid"))
    return made


def model(seed: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    tensors = {f"model.layers.{layer}.{part}.weight": torch.randn(16, 24) for layer in range(LAYERS) for part in "ab"}
    tensors |= {"model.embed.weight": torch.randn(40, 24), "model.norm.weight": torch.randn(24)}
    torch.manual_seed(seed)
    made = {name: (t + 0.1 * seed * torch.randn_like(t)).to(dtype) for name, t in tensors.items()}
    return made | {"model.layers.0.steps": torch.tensor([7])}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> Path:
    """A folder with a base and three fine-tunes, in which the process works."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "ft", "ft2", "ft3")):
        write_checkpoint(tmp_path / name, model(seed, getattr(torch, dtype)), config={"num_hidden_layers": LAYERS})
    return tmp_path


def recipe_of(said: dict[str, Any]) -> dict[str, Any]:
    models = said.get("models", ["ft", "ft2"] if said.get("merge_method") == "slerp" else ["ft", "ft2", "ft3"])
    values = {"base_model": "base", "lines": {"alpha": 0.2, "beta": 0.5}, "max_shard_size": 2000, **said}
    return {**values, "models": [{"model": name} for name in models]}


def grid_of(said: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    if said.get("merge_method") == "slerp":
        return {**grid, "lines.alpha": [alpha for alpha in grid["lines.alpha"] if alpha != "auto"]}
    return grid


def reference(recipe: dict[str, Any], settings: dict[str, Any]) -> dict[str, bytes]:
    """What `lines merge` writes at the same values: its weight files."""
    Path("recipe.yaml").write_text(json.dumps(recipe))
    lines.merge("recipe.yaml", "reference", sets=settings, force=True)
    return {path.name: path.read_bytes() for path in Path("reference").glob("*.safetensors")}


@pytest.mark.parametrize(("dtype", "said", "grid"), cases(0))
@pytest.mark.slow
def test_each_candidate_is_what_a_run_writes(here: Path, said: dict[str, Any], grid: dict[str, Any]) -> None:
    """On the disk, in the place of the one before; with an index and config of its own."""
    recipe, grid = recipe_of(said), grid_of(said, grid)
    space = space_from(recipe, grid)
    making = Candidates(Resources(workers=2, device="cpu"), scratch=here / "scratch")
    before = None
    for number, settings in enumerate(combinations(space)):
        folder = here / "scratch" / str(number)
        making.write(making.plan(space.recipe_of(settings), folder), folder, before=before)
        before = folder
        expected = reference(recipe, settings)
        assert {path.name: path.read_bytes() for path in folder.glob("*.safetensors")} == expected, settings
        for name in ("config.json", "model.safetensors.index.json"):
            if (here / "reference" / name).exists():
                assert (folder / name).read_bytes() == (here / "reference" / name).read_bytes()
    making.close()
    assert before is not None
    assert list((here / "scratch").iterdir()) == [before]


@pytest.mark.parametrize(("dtype", "said", "grid"), cases(1))
@pytest.mark.slow
def test_a_live_module_holds_the_same(here: Path, said: dict[str, Any], grid: dict[str, Any]) -> None:
    """And at the end what it held before."""
    recipe, grid = recipe_of(said), grid_of(said, grid)
    other = torch.float32 if said.get("dtype") == "float32" else None
    module = torch.nn.Module()
    for name, tensor in load_file("base/model.safetensors").items():
        *path, last = name.split(".")
        inner = module
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        inner.register_buffer(last, tensor.to(other) if other and tensor.is_floating_point() else tensor)
    held = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for candidate in lines.candidates(recipe, grid, module, device="cpu", workers=2):
        reference(recipe, dict(candidate.settings))
        expected: dict[str, torch.Tensor] = {}
        for path in Path("reference").glob("*.safetensors"):
            expected |= load_file(path)
        found = module.state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert torch.equal(tensor, expected[name]), (candidate.settings, name)
    assert all(torch.equal(tensor, held[name]) for name, tensor in module.state_dict().items())
