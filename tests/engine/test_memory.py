"""Memory is bounded by workers and chunk, not by the model."""

from __future__ import annotations

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

resources = lines.Resources(workers=2, device="cpu")
for size in ("small", "large"):
    recipe = lines.edit_recipe(f"{size}-base.safetensors", f"{size}-ft.safetensors")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(size + sys.argv[1]))
    import torch
    before = peak()
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize(("tensors", "suffix"), [(1, ".safetensors"), (40, "")], ids=["one tensor", "many tensors"])
def test_memory_does_not_grow_with_the_model(tensors: int, suffix: str, tmp_path: Path) -> None:
    """A model of 180 MB takes no more memory than one of 60 MB: the buffers, and little else; a file or a folder."""
    for size, nbytes in (("small", 60 * MB), ("large", 180 * MB)):
        for side in ("base", "ft"):
            sparse(tmp_path / f"{size}-{side}.safetensors", tensors, nbytes)
    command = [sys.executable, "-c", PROGRAM, suffix]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    small, buffers, more, _ = map(int, ran.stdout.split())
    assert more < 10 * MB
    assert small + more < buffers + 40 * MB
