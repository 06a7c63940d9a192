"""A base, a fine-tune, and an evaluation of them that needs no torch."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from support.files import write_checkpoint

LAYERS = 4
NAMES = [f"model.layers.{layer}.w.weight" for layer in range(LAYERS)]

# Tells how near the deep layers are to the fine-tune, and the shallow ones to the base, without torch; and that it ran.
EVALUATION = """
import array, json, os, struct, sys

def read(folder):
    raw = open(os.path.join(folder, "model.safetensors"), "rb").read()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    found = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = (8 + length + at for at in info["data_offsets"])
            found[name] = array.array("f", raw[begin:end])
    return found

def near(a, b, layers):
    names = [f"model.layers.{layer}.w.weight" for layer in layers]
    return -sum((x - y) ** 2 for name in names for x, y in zip(a[name], b[name]))

made, base, ft = read(sys.argv[1]), read("base"), read("ft")
with open("ran", "a") as file:
    file.write(sys.argv[1] + "\\n")
print("so much for that")
control = {"a": near(made, base, (0,)), "b": near(made, base, (1,))}
print(json.dumps({"target": near(made, ft, (2, 3)), "control": control}))
"""
OBJECTIVE = "target - target_ft + mean(control - control_pre)"


def inputs_in(folder: Path, *, shards: bool = False) -> None:
    """Write a base, a fine-tune and the evaluation: in one file each, or with a file for each layer."""
    torch.manual_seed(1)
    base = {name: torch.randn(6, 5) for name in NAMES}
    ft = {name: tensor + 0.1 * torch.randn(6, 5) for name, tensor in base.items()}
    for name, tensors in (("base", base), ("ft", ft)):
        write_checkpoint(folder / name, tensors, shards=LAYERS if shards else 1, config={"num_hidden_layers": LAYERS})
    (folder / "evaluate.py").write_text(EVALUATION)


def python(script: str) -> str:
    """A command that runs a script which needs no package."""
    return f"{shlex.quote(sys.executable)} -S {script}"


def sweep_yaml(**said: Any) -> Path:
    """A sweep over alpha, and whatever else is said."""
    values = {
        "recipe": {"base": "base", "ft": "ft"},
        "grid": {"lines.alpha": [1.0, 0.5, 0.2, 0.0]},
        "evaluate": python("evaluate.py {checkpoint}"),
        "objective": OBJECTIVE,
        **said,
    }
    Path("sweep.yaml").write_text(yaml.safe_dump({key: value for key, value in values.items() if value is not None}))
    return Path("sweep.yaml")
