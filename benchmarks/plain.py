"""LiNeS as one would write it without lines: load both checkpoints, loop, save. `plain.py BASE FT OUT`."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's shards."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def main(base_folder: Path, ft_folder: Path, out: Path) -> None:
    base, ft = load(base_folder), load(ft_folder)
    found = {name: re.search(r"layers\.(\d+)\.", name) for name in base}
    last = max(int(match[1]) for match in found.values() if match)
    edited = {}
    for name, before in base.items():
        match = found[name]
        coefficient = 0.1 + 0.9 * int(match[1]) / last if match else 0.1
        delta = ft[name].float() - before.float()
        edited[name] = (before.float() + coefficient * delta).to(before.dtype)
    out.mkdir()
    save_file(edited, out / "model.safetensors", {"format": "pt"})
    os.sync()


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
