"""Merges of models whose every tensor is one value, so that what a recipe means can be read off the output."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from support.files import write_checkpoint
from support.run import Ran, run_lines

LAYERS = 4


BLOCKS = [f"model.layers.{i}.{part}.w" for i in range(LAYERS) for part in ("attn", "mlp")]


OUTSIDE = ["model.embed.w", "model.norm.w", "head.w"]


VALUES = {"base": 0.0, "a": 1.0, "b": 2.0, "c": 4.0}


TOKENIZERS = {"base": "of base", "a": "of a", "b": "of b"}


def write_models(folder: Path, names: list[str], values: dict[str, float]) -> None:
    """A checkpoint for each model in which every entry is the same, so that a merged entry tells the weights."""
    for model, value in values.items():
        tensors = {name: torch.full((3,), value) for name in names}
        write_checkpoint(folder / model, tensors, config={"model_type": "toy", "torch_dtype": "float32"})


def recipe_text(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `folder` before the names of models, so that it may stand anywhere."""
    recipe = copy.deepcopy(recipe)
    for key in ("base_model", "tokenizer_source", "chat_template"):
        if recipe.get(key) not in (None, "union") and not (key != "base_model" and recipe[key] == "base"):
            recipe[key] = str(folder / recipe[key])
    for source in recipe.get("models", ()):
        source["model"] = str(folder / source["model"])
    return recipe


def merge(models: Path, to: Path, recipe: dict[str, Any], *args: object) -> Ran:
    """Run a recipe whose models lie in `models`, into `to/out`."""
    to.mkdir(exist_ok=True)
    (to / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, recipe), sort_keys=False))
    return run_lines("merge", "--config", to / "merge.yaml", "-o", to / "out", *args)


def merged(models: Path, to: Path, recipe: dict[str, Any], *args: object) -> dict[str, float]:
    """The one value of every tensor that a recipe makes of constant ones."""
    ran = merge(models, to, recipe, *args)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return {name: float(tensor[0]) for name, tensor in load_file(to / "out" / "model.safetensors").items()}


def of(*names: str, **parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """`models:`, with parameters for some."""
    return [{"model": name, **({"parameters": parameters[name]} if name in parameters else {})} for name in names]


def said(ran: Ran) -> str:
    """A refusal's message, on one line."""
    assert ran.trace == ""
    return " ".join(ran.err.split())


# --- the recipe in the output ---


AGAIN: dict[str, dict[str, Any]] = {
    "ties, alpha auto": {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b", **{"noisy-a": {"weight": 0.7}}),
        "parameters": {"density": 0.3, "lambda": [0.5, 1.1]},
        "lines": {"beta": 0.4},
    },
    "ties, density over depth": {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-base", "noisy-a", "noisy-b"),
        "parameters": {"density": [0.2, 0.9]},
        "lines": {"alpha": "auto", "beta": 0.4, "schedule": "power:2"},
    },
    "dare with a seed": {
        "merge_method": "dare_ties",
        "base_model": "noisy-base",
        "models": of("noisy-base", "noisy-b", "noisy-a"),
        "parameters": {"density": 0.5, "seed": 7, "rescale": True},
    },
    "dare, alpha auto": {
        "merge_method": "dare_linear",
        "base_model": "noisy-base",
        "models": of("noisy-b", "noisy-a"),
        "parameters": {"density": 0.4},
        "lines": {"beta": 0.1, "filter": {"norm": "keep"}},
    },
    "consensus on ties": {
        "merge_method": "consensus",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"on": "ties", "k": 1, "density": 0.5, "mask_lambda": 0.3},
        "lines": {"beta": 0.3},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "noisy-b",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]},
    },
    "slerp with lines": {
        "merge_method": "slerp",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"t": 0.3},
        "lines": {"beta": 0.3},
    },
    "linear": {
        "merge_method": "linear",
        "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": 0.1}}),
        "parameters": {"int8_mask": True},
        "out_dtype": "float16",
    },
    "passthrough": {"merge_method": "passthrough", "models": of("noisy-a", **{"noisy-a": {"scale": 0.3}})},
}

# --- --dry-run, --json ---


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")
