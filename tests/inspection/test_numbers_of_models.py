"""The numbers of real models, and of random ones, against the float64 reference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from support import zoo
from support.files import write_checkpoint
from support.inspect_reference import (
    FLOATS,
    TOY_KINDS,
    Reference,
    Tensors,
    check,
    defaults,
    inspect,
    linear,
    loaded,
    spots_of,
    toy_spots,
)

# --- real models ---


@dataclass(frozen=True)
class Family:
    """What stands where in a real model, by hand: beginnings of names, and words that tell kinds."""

    stacks: Mapping[str, int]
    before: tuple[str, ...]
    kinds: Mapping[str, str]


FAMILIES = {
    "llama": Family({"model.layers": 3}, ("model.embed_tokens",), TOY_KINDS),
    "mixtral": Family({"model.layers": 3}, ("model.embed_tokens",), TOY_KINDS | {"block_sparse_moe": "mlp"}),
    "t5": Family(
        {"encoder.block": 3, "decoder.block": 2},
        ("shared",),
        {"Attention.": "attention", "Dense": "mlp", "layer_norm": "norm", "shared": "embedding", "lm_head": "head"},
    ),
    "clip": Family(
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
        ("text_model.embeddings", "vision_model.embeddings", "vision_model.pre_layrnorm"),
        {
            "self_attn": "attention",
            "mlp": "mlp",
            "norm": "norm",
            "embeddings": "embedding",
            "_projection": "head",
            "logit_scale": "other",
        },
    ),
}


@pytest.mark.zoo
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.slow
def test_models_of_transformers(family: str, tmp_path: Path) -> None:
    """Real models, saved by transformers and perturbed, have the layers, sides, kinds and numbers written here."""
    expected = FAMILIES[family]
    module = zoo.ZOO[family]()
    module.save_pretrained(tmp_path / "base")
    for number in (1, 2):
        random = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for position, parameter in enumerate(module.parameters()):
                parameter.add_(0.001 * (position + 1) * torch.randn(parameter.shape, generator=random))
        module.to([torch.bfloat16, torch.float32][number - 1]).save_pretrained(
            tmp_path / f"ft{number}", max_shard_size="9KB"
        )
    paths = [tmp_path / "ft1", tmp_path / "ft2"]
    base, fts = loaded(tmp_path / "base"), [loaded(path) for path in paths]
    assert len(list(paths[0].glob("*.safetensors"))) > 1
    spots = spots_of(base, expected.stacks, expected.before, expected.kinds)
    for models in ([0], [1], [0, 1]):
        told = inspect(*(paths[m] for m in models), "--base", tmp_path / "base", "--tensors")
        check(told, Reference(base, [fts[m] for m in models], spots, defaults(spots, len(models))))
        assert {row["name"]: row["layers"] for row in told["stacks"]} == expected.stacks


# --- anything ---


def random_tensors(random: np.random.Generator, layers: int) -> Tensors:
    """Names of a toy with shapes of up to four dimensions, some of them empty, and the odd buffer."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    for i in range(layers):
        parts = ["self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight", "mlp.down_proj.bias"]
        names += [f"model.layers.{i}.{part}" for part in parts if part[0] == "s" or random.random() < 0.8]
    tensors = {}
    for name in names:
        shape = tuple(int(n) for n in random.integers(0 if random.random() < 0.1 else 1, 9, int(random.integers(0, 5))))
        values = torch.from_numpy(np.asarray(random.standard_normal(shape) * 10.0 ** random.uniform(-3, 3)))
        tensors[name] = values.to(torch.int64) if random.random() < 0.08 else values
    return tensors


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 30))])
@pytest.mark.slow
def test_random_checkpoints(seed: int, tmp_path: Path) -> None:
    """Whatever shapes, dtypes, shards and numbers of fine-tunes come together, the numbers are the reference's."""
    random = np.random.default_rng(seed)
    layers, number = int(random.integers(1, 7)), int(random.integers(1, 5))
    dtypes = list(FLOATS.values())
    master = random_tensors(random, layers)
    sides: list[Tensors] = []
    for side in range(number + 1):
        tensors = {}
        for name, tensor in master.items():
            if not tensor.is_floating_point():
                tensors[name] = tensor + side
                continue
            values = tensor.clone()
            if side and random.random() < 0.85:
                noise = random.standard_normal(tensor.shape) * (random.random(tensor.shape) < random.random())
                values += torch.from_numpy(np.asarray(noise)) * 10.0 ** random.uniform(-4, 1)
            values = values.to(dtypes[int(random.integers(4))])
            if seed % 3 == 0 and values.numel() and random.random() < 0.2:
                where = int(random.integers(values.numel()))
                values.reshape(-1)[where] = float(random.choice([math.nan, math.inf, -math.inf]))
            tensors[name] = values
        sides.append(tensors)
    if number > 1 and seed % 4 == 1:  # lacking in one, of another shape in another
        sides[int(random.integers(2))].pop("model.norm.weight")
        sides[2]["lm_head.weight"] = torch.ones(3, 1, 3, 1, 3)
    alpha, beta, gamma = (float(value) for value in random.uniform(-1, 2, 3).round(3))
    paths = [write_checkpoint(tmp_path / f"{i}", s, shards=int(random.integers(1, 5))) for i, s in enumerate(sides)]
    options = [f"--alpha={alpha}", f"--beta={beta}", f"--gamma={gamma}", "--workers", int(random.integers(1, 4))]
    told = inspect(*paths[1:], "--base", paths[0], *options, "--tensors")
    spots = toy_spots(sides[1])
    check(told, Reference(sides[0], sides[1:], spots, linear(spots, alpha, beta, gamma)))
    for health, side in zip(told["health"], sides, strict=True):
        floats = {name: tensor for name, tensor in side.items() if tensor.is_floating_point() and tensor.numel()}
        assert health["tensors"] == len(floats)
        bad = {n: (int(t.isnan().sum()), int(t.isinf().sum())) for n, t in floats.items() if not t.isfinite().all()}
        assert {row["tensor"]: (row["nan"], row["inf"]) for row in health["nonfinite"]} == bad
        assert set(health["zero"]) == {name for name, tensor in floats.items() if not tensor.count_nonzero()}
