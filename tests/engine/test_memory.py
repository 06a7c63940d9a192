"""Memory is bounded by workers and chunk, not by the model."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lines_cli.checkpoint.header import lay_out

MB = 10**6

# VmHWM is the process's own high-water mark; a child's ru_maxrss would begin with its parent's.
PROGRAM = """
import sys
from pathlib import Path
import lines_cli as lines

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

recipe = lines.edit_recipe(sys.argv[1], sys.argv[2])
plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(sys.argv[3]))
import torch
before = peak()
resources = lines.Resources(workers=2, device="cpu")
lines.run(plan, resources)
print(peak() - before, plan.buffer_bytes(resources))
"""


def sparse(path: Path, tensors: int, nbytes: int) -> Path:
    """A checkpoint of zeros that takes no room on the disk."""
    names = [(f"layers.{i}.w", "BF16", (nbytes // tensors // 2,)) for i in range(tensors)]
    head, infos = lay_out(names, {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(info.nbytes for info in infos.values()))
    return path


def growth(out: Path, tensors: int, nbytes: int) -> tuple[int, int]:
    """How much an edit's peak resident memory lies above that of importing torch, and its buffers' size; in bytes."""
    sides = [sparse(out.parent / f"{side}.safetensors", tensors, nbytes) for side in ("base", "ft")]
    command = [sys.executable, "-c", PROGRAM, *map(str, sides), str(out)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    above, buffers = map(int, ran.stdout.split())
    return above, buffers


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("tensors", "out"), [(1, "out.safetensors"), (40, "out")], ids=["one tensor", "many tensors"])
def test_memory_does_not_grow_with_the_model(tensors: int, out: str, tmp_path: Path) -> None:
    """A model of 400 MB takes no more memory than one of 80 MB: the buffers, and little else; a file or a folder."""
    small, buffers = growth(tmp_path / out, tensors, 80 * MB)
    large, _ = growth(tmp_path / out, tensors, 400 * MB)
    assert large < small + 10 * MB
    assert large < buffers + 40 * MB
