"""Memory is bounded by workers and chunk, not by the model."""

from __future__ import annotations

import ctypes
import re
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

import lines_cli as lines
from lines_cli.checkpoint.header import lay_out
from support import forked

MB = 10**6


def peak() -> int:
    """The most bytes of memory that this process has held."""
    (kilobytes,) = re.findall(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())
    return 1024 * int(kilobytes)


def edits(suffix: str) -> None:
    """Edit the small pair, then the large one, and print what more memory each has taken, and its buffers."""
    with suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what this process has freed, a run could take without being seen
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    resources = lines.Resources(workers=2, device="cpu")
    for size in ("small", "large"):
        recipe = lines.edit_recipe(f"{size}-base.safetensors", f"{size}-ft.safetensors")
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(size + suffix))
        before = peak()
        lines.run(plan, resources)
        print(peak() - before, plan.buffer_bytes(resources))


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
@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tensors: int, suffix: str, tmp_path: Path) -> None:
    """A model of 180 MB takes no more memory than one of 60 MB: the buffers, and little else; a file or a folder."""
    for size, nbytes in (("small", 60 * MB), ("large", 180 * MB)):
        for side in ("base", "ft"):
            sparse(tmp_path / f"{size}-{side}.safetensors", tensors, nbytes)
    ran = forked.run(partial(edits, suffix), cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    small, buffers, more, _ = map(int, ran.stdout.split())
    assert more < 10 * MB + buffers / 2  # those of a worker that had nothing to do with the small one
    assert small + more < buffers + 40 * MB
