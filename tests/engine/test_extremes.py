"""Far more of everything than models have: it works, or is refused, in bounded memory and with few files open."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

from lines_cli.checkpoint.header import lay_out
from support.files import snapshot, write_checkpoint
from support.run import run_lines

# Peak resident memory is the process's own high-water mark; a child's ru_maxrss would begin with its parent's.
PROGRAM = (
    "import sys\nfrom lines_cli.cli.app import main\n"
    "try: main()\n"
    "finally: print(*(l.split()[1] for l in open('/proc/self/status') if l.startswith('VmHWM')), file=sys.stderr)"
)


def lines_in_a_process(folder: Path, *arguments: object, files: int | None = None) -> int:
    """Run a command that succeeds, with at most so many files open; its peak resident memory in MB."""

    def limited() -> None:
        if files is not None:
            import resource

            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    command = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return int(ran.stderr.split()[-1]) // 1000


def sparse(path: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of zeros that takes no room on the disk."""
    head, infos = lay_out(((name, *of) for name, of in tensors.items()), {})
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + sum(info.nbytes for info in infos.values()))


@pytest.mark.parametrize(
    "tensors",
    [{}, {"w": torch.ones(())}, {"layers.0.w": torch.ones(0, 4), "layers.1.w": torch.ones(3)}],
    ids=["none", "a scalar", "a dimension of zero"],
)
def test_very_little(tensors: dict[str, Any], tmp_path: Path) -> None:
    """No tensors, scalars, tensors without entries: what comes out is what safetensors reads."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, tensors)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.trace == ""
    if ran.code:
        assert ran.err.startswith("error: ")
        assert ran.code in (3, 4)
        assert not (tmp_path / "out").exists()
    else:
        assert load_file(tmp_path / "out" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.slow
def test_very_long_names(tmp_path: Path) -> None:
    """Names of 10,000 characters are written as they are, and do not make messages as long."""
    names = [f"layers.{i}.{'x' * 10_000}" for i in range(4)]
    write_checkpoint(tmp_path / "base", {name: torch.zeros(4) for name in names})
    write_checkpoint(tmp_path / "ft", {name: torch.ones(4) for name in names})
    assert run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out").code == 0
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == names
    write_checkpoint(tmp_path / "other", {name: torch.ones(5) for name in names})
    assert run_lines("edit", tmp_path / "base", tmp_path / "other", "-o", tmp_path / "no").code == 4


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_one_tensor_of_8_gb(tmp_path: Path) -> None:
    """In the memory that any other takes."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip("needs 12 GB of disk")
    for side in ("base", "ft"):
        sparse(tmp_path / f"{side}.safetensors", {"layers.0.w": ("BF16", (4_000, 1_000_000))})
    command = ["edit", "base.safetensors", "ft.safetensors", "-o", "out", "--alpha", "0.5"]
    peak = lines_in_a_process(tmp_path, *command)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 8e9
    shutil.rmtree(tmp_path / "out")
    assert peak < 350


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_200_000_tensors(tmp_path: Path) -> None:
    """Planning takes memory for each, some kilobytes."""
    tensors = {f"model.layers.{i}.p{j}": ("F32", (2,)) for i in range(2000) for j in range(100)}
    for side in ("base", "ft"):
        sparse(tmp_path / f"{side}.safetensors", tensors)
    peak = lines_in_a_process(tmp_path, "edit", "base.safetensors", "ft.safetensors", "-o", "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert len(file.keys()) == 200_000
    assert peak < 1500


@pytest.mark.slow
@pytest.mark.xdist_group("large")
def test_2_000_shards(tmp_path: Path) -> None:
    """Of input and of output; open files are bounded by what the system allows, or it is said what is needed."""
    for side in ("base", "ft"):
        folder = tmp_path / side
        folder.mkdir()
        weight_map = {}
        for shard in range(2000):
            file = f"model-{shard + 1:05d}-of-02000.safetensors"
            sparse(folder / file, {f"model.layers.{shard}.w": ("F32", (1000,))})
            weight_map[f"model.layers.{shard}.w"] = file
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    lines_in_a_process(tmp_path, "edit", "base", "ft", "-o", "out", files=10_000)
    assert (tmp_path / "out" / "model.safetensors").exists()
    lines_in_a_process(tmp_path, "edit", "base", "ft", "-o", "many", "--max-shard-size", "4000", files=10_000)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) == 2000


@pytest.mark.slow
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_64_models(method: str, tmp_path: Path) -> None:
    """In one merge."""
    write_checkpoint(tmp_path / "base", {f"layers.{i}.w": torch.zeros(500_000) for i in range(4)})
    total = torch.zeros(500_000)
    for number in range(64):
        chance = torch.Generator().manual_seed(number)
        tensors = {f"layers.{i}.w": torch.randn(500_000, generator=chance) for i in range(4)}
        total += tensors["layers.0.w"]
        write_checkpoint(tmp_path / f"ft{number}", tensors)
    recipe: dict[str, Any] = {"merge_method": method, "base_model": "base"}
    recipe["models"] = [{"model": f"ft{number}"} for number in range(64)]
    recipe["parameters"] = {"weight": 1.0} | ({"density": 0.5} if method == "ties" else {})
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    merge = ("merge", "--config", "merge.yaml", "-o", "out", "--workers", 2)
    peak = lines_in_a_process(tmp_path, *merge, files=256)
    assert peak < 620  # torch takes 220, a worker 130; more workers than two would take more
    if method == "task_arithmetic":
        assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["layers.0.w"], total)
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits address space as Linux does")
@pytest.mark.parametrize("megabytes", [300, *(pytest.param(size, marks=pytest.mark.slow) for size in (200, 400))])
def test_too_little_memory(megabytes: int, tmp_path: Path) -> None:
    """A message, not a corpse: torch does not load."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, {f"layers.{i}.w": torch.ones(500_000) for i in range(4)})
    before = snapshot(tmp_path)

    def limited() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (megabytes * 10**6, megabytes * 10**6))

    command = [sys.executable, "-m", "lines_cli", "edit", "base", "ft", "-o", "out", "--device", "cpu"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=limited)
    assert "Traceback" not in ran.stderr
    assert (ran.returncode, ran.stderr[:20]) == (1, "error: out of memory")
    assert snapshot(tmp_path) == before
