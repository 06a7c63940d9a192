"""Make a synthetic Llama-shaped checkpoint in bf16, in shards of 1 GB: make_model.py FOLDER LAYERS WIDTH NOISE [SEED].

The same layers and width give the same weights; NOISE > 0 adds a fine-tune's update of that size to them, and another
SEED gives another update.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file

SHARD = 1_000_000_000
VOCABULARY = 32_000


def shapes(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    """Every tensor's shape, by name."""
    block: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (3 * width, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, 3 * width),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {
        "model.embed_tokens.weight": (VOCABULARY, width),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()},
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCABULARY, width),
    }


def make(folder: Path, layers: int, width: int, noise: float, seed: int = 0) -> None:
    """Write the checkpoint, with its index and a small config."""
    folder.mkdir(parents=True)
    groups: list[list[str]] = [[]]
    held = 0
    wanted = shapes(layers, width)
    sizes = {name: 2 * torch.Size(shape).numel() for name, shape in wanted.items()}
    for name, size in sizes.items():
        if held + size > SHARD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        tensors = {}
        for name in names:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            value = 0.02 * torch.randn(wanted[name], generator=generator)
            if noise:
                if seed:
                    generator.manual_seed(zlib.crc32(f"{seed} {name}".encode()))
                value += noise * torch.randn(wanted[name], generator=generator)
            tensors[name] = value.bfloat16()
            weight_map[name] = file
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "num_hidden_layers": layers, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    make(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), *map(int, sys.argv[5:6]))
