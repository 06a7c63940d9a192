"""Where reads wait for the disk, what is read next is asked for before; and nothing else tells."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.engine import input_files, read_ahead
from lines_cli.storage import files
from lines_cli.storage.files import ask_for, read_into
from support.files import snapshot, write_checkpoint
from support.run import run_lines

Ranges = list[tuple[str, str, int, int]]
"""`asked` or `read`, the file, the first byte and the end."""
pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="there is nobody to ask")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of 24 MB, in two shards each, with small tensors and one that is copied."""
    folder = tmp_path_factory.mktemp("models")
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(1500, 1000, generator=chance) for i in range(4)}
        tensors |= {f"layers.{i}.norm": torch.randn(1000, generator=chance) for i in range(4)}
        tensors["layers.3.steps"] = torch.arange(100_000)
        write_checkpoint(folder / side, tensors, shards=2, config={"model_type": "tiny"})
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}]}
    (folder / "ties.yaml").write_text(yaml.safe_dump(recipe))
    return folder


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Ranges:
    """What is asked for and what is read of weight files, in this order."""
    found: Ranges = []

    def name(fd: int) -> str:
        there = os.fstat(fd)
        return f"{there.st_dev}:{there.st_ino}"

    def asking(fd: int, offset: int, nbytes: int) -> None:
        assert 0 <= offset < offset + nbytes <= os.fstat(fd).st_size
        found.append(("asked", name(fd), offset, offset + nbytes))
        ask_for(fd, offset, nbytes)

    def reading(fd: int, view: memoryview, offset: int) -> int:
        found.append(("read", name(fd), offset, offset + len(view)))
        return read_into(fd, view, offset)

    monkeypatch.setattr(read_ahead, "ask_for", asking)
    monkeypatch.setattr(input_files, "read_into", reading)
    return found


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read counts as one that waited."""
    monkeypatch.setattr(input_files, "_WAITING", 1e15)


RUNS = {
    "edit": lambda folder, out: ("edit", folder / "base", folder / "ft", "-o", out),
    "ties": lambda folder, out: ("merge", "--config", folder / "ties.yaml", "-o", out),
}


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_what_is_asked_for_is_read_later(
    run: Callable[..., Any], models: Path, tmp_path: Path, seen: Ranges, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is asked for is read later, most of what is read was asked for, and the bytes are those of a run that asks
    for nothing.
    """
    monkeypatch.setattr(input_files, "_WAITING", 1e-15)
    assert run_lines(*run(models, tmp_path / "plain"), "--workers", 2).code == 0
    assert seen
    assert {kind for kind, *_ in seen} == {"read"}
    seen.clear()
    monkeypatch.setattr(input_files, "_WAITING", 1e15)
    assert run_lines(*run(models, tmp_path / "out"), "--workers", 2).code == 0
    plain, out = (snapshot(tmp_path / name) for name in ("plain", "out"))
    assert {name: of for name, of in plain.items() if name.endswith("safetensors")} == {
        name: of for name, of in out.items() if name.endswith("safetensors")
    }
    asked_for = total = 0
    for number, (kind, file, start, end) in enumerate(seen):
        after = [(s, e) for what, where, s, e in seen[number:] if what == "read" and where == file]
        if kind == "asked":
            assert _covered(start, end, after), (file, start, end)
        else:
            total += end - start
            before = [(s, e) for what, where, s, e in seen[:number] if what == "asked" and where == file]
            asked_for += (end - start) if _covered(start, end, before) else 0
    assert asked_for > total / 2


def _covered(start: int, end: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether ranges hold all bytes of another."""
    for begin, until in sorted(ranges):
        if begin > start:
            break
        start = max(start, until)
    return start >= end


@pytest.mark.slow
def test_no_more_is_asked_for_than_said(
    models: Path, tmp_path: Path, seen: Ranges, waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for and is not yet read is at most what is said, and one item: 4 MiB of each side."""
    monkeypatch.setattr(read_ahead, "AHEAD", 1)
    assert run_lines("edit", models / "base", models / "ft", "-o", tmp_path / "out", "--workers", 1).code == 0
    ahead = most = 0
    for kind, _, start, end in seen:
        ahead = ahead + end - start if kind == "asked" else max(0, ahead - (end - start))
        most = max(most, ahead)
    assert 0 < most <= 2 * 4 * 2**20


@pytest.mark.slow
def test_a_file_that_ends_early_is_named_with_its_tensor(
    models: Path, tmp_path: Path, waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is cut short after it was asked for is refused with its tensor, and nothing is left half-written."""
    for side in ("base", "ft"):
        (tmp_path / side).mkdir()
        for file in (models / side).iterdir():
            (tmp_path / side / file.name).write_bytes(file.read_bytes())
    short = tmp_path / "ft" / "model-00001-of-00002.safetensors"

    def shortening(fd: int, offset: int, nbytes: int) -> None:
        os.truncate(short, 2**20)
        ask_for(fd, offset, nbytes)

    monkeypatch.setattr(read_ahead, "ask_for", shortening)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--workers", 1)
    assert ran.code == 3
    assert f"{short.name}: ends in the middle of tensor layers." in " ".join(ran.err.split())
    assert not (tmp_path / "out").exists()


def test_a_system_that_takes_no_advice(
    models: Path, tmp_path: Path, waiting: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A filesystem that knows no advice is read all the same."""

    def refuses(*_: object) -> None:
        refused.append(True)
        raise OSError(22, "Invalid argument")

    refused: list[bool] = []
    monkeypatch.setattr(files.os, "posix_fadvise", refuses)
    assert run_lines("edit", models / "base", models / "ft", "-o", tmp_path / "out").code == 0
    assert len(refused) > len(list(models.glob("*/*.safetensors")))


@pytest.mark.slow
def test_the_benchmark_says_what_it_lacks(tmp_path: Path) -> None:
    """Without the tools that it mounts with, benchmarks/latency.py ends with a sentence."""
    script = Path(__file__).parents[2] / "benchmarks" / "latency.py"
    environment = os.environ | {"PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("left out: ")


def test_only_disks_that_wait_are_asked(models: Path) -> None:
    """Reads that wait for one disk say nothing of another, and a fast one between slow ones begins the count anew."""
    fds = [os.open(models / "base" / "config.json", os.O_RDONLY), os.open("/proc/self/status", os.O_RDONLY)]
    try:
        sources = input_files.Sources(fds)
        slow, fast = sources.paces
        assert slow is not None
        assert fast is not None
        for seconds in (1, 1, 1, 1, 1, 0):
            slow.took(seconds, 2**20)
        assert not slow.waits
        for _ in range(6):
            slow.took(1, 2**20)
        assert (slow.waits, fast.waits) == (True, False)
        assert read_ahead._waiting(sources) == {0: fds[0]}
    finally:
        for fd in fds:
            os.close(fd)
