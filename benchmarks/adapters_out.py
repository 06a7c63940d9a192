"""How long it takes to write an adapter, and how much memory: one of the shape of a 7B model scaled in place and merged
with another, and one taken from a full fine-tune.

    python benchmarks/adapters_out.py            # minutes, and 4 GB of disk
    python benchmarks/adapters_out.py --quick    # a small model, seconds

Each command runs in a process of its own. Printed are wall time, processor time, and peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

RANK = 16


class Shape(NamedTuple):
    """A Llama's sizes."""

    layers: int
    hidden: int
    inner: int
    vocabulary: int

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Of all layers, [out, in]."""
        square, up, down = (self.hidden, self.hidden), (self.inner, self.hidden), (self.hidden, self.inner)
        of_layer = {f"self_attn.{name}_proj": square for name in "qkvo"}
        of_layer |= {"mlp.gate_proj": up, "mlp.up_proj": up, "mlp.down_proj": down}
        return {f"model.layers.{i}.{name}": size for i in range(self.layers) for name, size in of_layer.items()}


OF_7B = Shape(32, 4096, 11008, 32000)
SMALL = Shape(4, 256, 688, 1000)
TO_EXTRACT = Shape(8, 1536, 4096, 8000)


def adapter(folder: Path, shape: Shape, seed: int) -> Path:
    """Random factors in bfloat16."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in shape.matrices.items():
        name = f"base_model.model.{module}.lora"
        tensors[f"{name}_A.weight"] = torch.randn(RANK, columns, generator=chance).bfloat16()
        tensors[f"{name}_B.weight"] = torch.randn(rows, RANK, generator=chance).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def model(folder: Path, shape: Shape, seed: int) -> Path:
    """Random weights in bfloat16; the fine-tune's (seed 1) are near the base's."""
    chance, own = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for module, size in (shape.matrices | {"model.embed_tokens": (shape.vocabulary, shape.hidden)}).items():
        weight = 0.02 * torch.randn(size, generator=chance)
        tensors[f"{module}.weight"] = (weight + 0.002 * seed * torch.randn(size, generator=own)).bfloat16()
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": shape.layers}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def measured(title: str, *arguments: object) -> None:
    """Run a command and print what it took."""
    command = [sys.executable, "-m", "lines_cli", *map(str, arguments), "--quiet"]
    started = time.perf_counter()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        sys.exit(f"{title} failed")
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    print(f"{title:44}{seconds:8.1f} s {usage.ru_utime + usage.ru_stime:8.1f} s CPU {peak:8.0f} MB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model")
    options = parser.parse_args()
    shape, whole = (SMALL, SMALL) if options.quick else (OF_7B, TO_EXTRACT)
    folder = Path(tempfile.mkdtemp(prefix="lines-adapters-", dir=Path(__file__).parent))
    try:
        one, other = (adapter(folder / f"adapter{seed}", shape, seed) for seed in range(2))
        nbytes = (one / "adapter_model.safetensors").stat().st_size
        print(f"adapters of {len(shape.matrices)} modules, rank {RANK}: {nbytes / 1e6:.0f} MB each")
        measured("scaled in place", "edit", "--adapter", one, "--num-layers", shape.layers, "-o", folder / "scaled")
        recipe = folder / "merge.yaml"
        recipe.write_text(json.dumps({"models": [{"model": str(one)}, {"model": str(other)}]}), encoding="utf-8")
        merge = ["merge", "--config", recipe, "--as-adapter"]
        measured("two merged", *merge, "-o", folder / "merged")
        measured(f"two merged, rank {RANK}", *merge, "--rank", RANK, "-o", folder / "reduced")
        base, ft = (model(folder / f"model{seed}", whole, seed) for seed in range(2))
        nbytes = (base / "model.safetensors").stat().st_size
        print(f"a fine-tune of {len(whole.matrices)} matrices: {nbytes / 1e6:.0f} MB")
        extract = ["extract", ft, "--base", base]
        measured(f"extracted, rank {RANK}", *extract, "--rank", RANK, "-o", folder / "extracted")
        measured("extracted, energy 0.5", *extract, "--energy", 0.5, "-o", folder / "half")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
