"""Methods on what has no direction, no length, no variance or no sum: zeros, twins, opposites, single entries."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lines_cli.methods import METHODS
from support.files import write_checkpoint
from support.method_cases import TABLE
from support.run import run_lines

Model = dict[str, torch.Tensor]
SETS = {
    "the base alone": ("same", "same", "same"),
    "zeros": ("zero", "zero", "zero"),
    "opposite task vectors": ("a", "anti", "a"),
    "opposite weights": ("opposite", "twice", "opposite"),
    "a zero model among others": ("a", "zero", "twice"),
}
MERGERS = [name for name, entry in TABLE.items() if name != "passthrough"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with tensors of every number of axes, integers and none at all; and what may be made of it."""
    folder = tmp_path_factory.mktemp("degenerate")
    shapes: dict[str, tuple[int, ...]] = {"gate": (), "one": (1,), "norm": (4,), "column": (4, 1), "w": (5, 4)}
    shapes |= {"conv": (2, 3, 2, 2), "experts": (2, 3, 4), "empty": (0, 4)}
    g = torch.Generator().manual_seed(0)
    base: Model = {"model.embed_tokens.weight": torch.randn(6, 4, generator=g)}
    for layer in range(2):
        base |= {f"model.layers.{layer}.{n}": torch.randn(shape, generator=g) for n, shape in shapes.items()}
        base[f"model.layers.{layer}.ids"] = torch.arange(3)

    def made(of: Callable[[torch.Tensor], torch.Tensor]) -> Model:
        return {name: of(tensor) if tensor.is_floating_point() else tensor for name, tensor in base.items()}

    a = made(lambda tensor: tensor + 0.1 * torch.randn(tensor.shape, generator=g))
    models = {"base": base, "same": base, "a": a, "zero": made(torch.zeros_like)}
    models |= {"opposite": made(torch.neg), "twice": made(lambda tensor: 2 * tensor)}
    models["anti"] = {n: 2 * t - a[n] if t.is_floating_point() else t for n, t in base.items()}
    for name, tensors in models.items():
        write_checkpoint(folder / name, tensors, config={"num_hidden_layers": 2, "tie_word_embeddings": False})
    return folder


def merge(world: Path, tmp: Path, recipe: dict[str, Any], *more: object, out: str = "out.safetensors") -> Any:
    (tmp / "m.yaml").write_text(yaml.safe_dump(recipe))
    return run_lines("merge", "--config", tmp / "m.yaml", "-o", tmp / out, *more)


def recipe_of(world: Path, method: str, said: dict[str, Any], models: tuple[str, ...]) -> dict[str, Any]:
    number = TABLE[method].models or 3
    recipe = {"merge_method": method, "models": [{"model": str(world / name)} for name in models[:number]]}
    has_base = METHODS[method].takes == "task vectors"
    return {**recipe, "parameters": said, **({"base_model": str(world / "base")} if has_base else {})}


@pytest.mark.parametrize("models", SETS)
@pytest.mark.parametrize("method", MERGERS)
@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["first", "every typical"])
@pytest.mark.some(12)
def test_the_result_is_finite(method: str, models: str, every: bool, world: Path, tmp_path: Path) -> None:
    """Nothing is divided by nothing, whatever shape a tensor has; models that are the base give the base; and the bytes
    are the same for one worker as for several.
    """
    for number, said in enumerate(TABLE[method].typical if every else TABLE[method].typical[:1]):
        recipe = recipe_of(world, method, dict(said), SETS[models])
        ran = merge(world, tmp_path, recipe, "--workers", "1", out=f"{number}.safetensors")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        base, made = load_file(world / "base/model.safetensors"), load_file(tmp_path / f"{number}.safetensors")
        assert made.keys() == base.keys()
        for name, tensor in made.items():
            assert bool(torch.isfinite(tensor).all()), name
            unscaled = METHODS[method].takes == "task vectors" or said.get("normalize", True)
            if models == "the base alone" and unscaled:
                torch.testing.assert_close(tensor, base[name], rtol=1e-6, atol=1e-6)
        if not every and models != "opposite task vectors":
            continue
        ran = merge(world, tmp_path, recipe, "--workers", "3", out=f"{number}-again.safetensors")
        again = (tmp_path / f"{number}-again.safetensors").read_bytes()
        assert again == (tmp_path / f"{number}.safetensors").read_bytes()


@pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (1.0, -1.0, 0.0), (-0.5, -0.5, 2.0)], ids=str)
@pytest.mark.parametrize("method", [name for name in MERGERS if "weight" in METHODS[name].parameters])
@pytest.mark.slow
def test_weights_of_nothing(method: str, weights: tuple[float, ...], world: Path, tmp_path: Path) -> None:
    """Weights that are zero, negative, or add up to nothing give a finite result, or are refused in words."""
    for number, said in enumerate(TABLE[method].typical):
        recipe = recipe_of(world, method, {k: v for k, v in said.items() if k != "weight"}, ("a", "twice", "opposite"))
        for source, weight in zip(recipe["models"], weights, strict=False):
            source["parameters"] = {"weight": weight}
        ran = merge(world, tmp_path, recipe, out=f"{number}.safetensors")
        assert ran.trace == ""
        if ran.code:
            assert (method, ran.code in (2, 5)) == ("multislerp", True)
            assert "add up to" in ran.err
            continue
        for name, tensor in load_file(tmp_path / f"{number}.safetensors").items():
            assert bool(torch.isfinite(tensor).all()), name
