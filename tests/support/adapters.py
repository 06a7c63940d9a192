"""Small adapters as PEFT writes them, and what they do to a base, in float64."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


def factors(
    modules: Mapping[str, tuple[int, int]], rank: int | Mapping[str, int], seed: int, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Random factors of modules, given out and in of each."""
    chance = torch.Generator().manual_seed(seed)
    made: Tensors = {}
    for module, (rows, columns) in modules.items():
        r = rank if isinstance(rank, int) else rank[module]
        made[f"{PREFIX}{module}.lora_A.weight"] = torch.randn(r, columns, generator=chance).to(dtype)
        made[f"{PREFIX}{module}.lora_B.weight"] = torch.randn(rows, r, generator=chance).to(dtype)
    return made


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], **config: Any) -> Path:
    """An adapter's folder: its tensors and its config."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    modules = {match[1] for name in tensors if (match := re.match(r"(?:.*\.)?([^.]+)\.(?:lora_|hada_|lokr_)", name))}
    values = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": sorted(modules), **config}
    (folder / "adapter_config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def updates(folder: Path) -> Tensors:
    """What an adapter adds to each weight, `scale * B @ A`, by the weight's name: in float64, written from PEFT's rules
    (`get_pattern_key`, `LoraLayer.update_layer`, `get_delta_weight`).
    """
    from safetensors.torch import load_file

    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found: Tensors = {}
    for name, down in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        up = tensors[name.replace("lora_A", "lora_B")]
        rank = _of_module(config.get("rank_pattern"), module, config["r"])
        alpha = _of_module(config.get("alpha_pattern"), module, config["lora_alpha"])
        assert down.shape[0] == up.shape[1] == rank
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        product = scale * (up.double().flatten(1) @ down.double().flatten(1))
        found[f"{module}.weight"] = product.view(up.shape[0], *down.shape[1:])
    return found


def _of_module(pattern: Mapping[str, int] | None, module: str, default: int) -> int:
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def layers_of(number: int, sizes: Mapping[str, tuple[int, int]], only: Sequence[int] | None = None) -> dict[str, Any]:
    """Modules of a model's layers, by their names."""
    numbers = range(number) if only is None else only
    return {f"model.layers.{i}.{module}": size for i in numbers for module, size in sizes.items()}
