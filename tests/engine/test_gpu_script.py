"""`make gpu` is for the minutes in which a GPU is at hand: that the script works is known before."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The script, as a module."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setitem(sys.modules, "gpu", None)
    del sys.modules["gpu"]
    return import_module("gpu")


def verdicts(printed: str) -> list[str]:
    """The verdict of each check: all lines but the first, about the machine, and the last, which counts."""
    return [line[:8].strip() for line in printed.splitlines()[1:-1]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_without_a_gpu_it_refuses(device: str, gpu: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It ends with 2, says why, and prints no verdict."""
    assert gpu.main(["--device", device]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "sees no CUDA device here\nhint: --device cpu --small" in printed.err


@pytest.mark.slow
def test_a_short_rehearsal(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the CPU, and with one method of each kind: every check passes, or says why it is left out."""
    gpu.METHODS = {name: gpu.METHODS[name] for name in ("task_arithmetic", "slerp", "iso_c")}
    rehearsal = ["--device", "cpu", "--small", "--folder", str(tmp_path), "--only", *"abd"]
    assert gpu.main(rehearsal) == 0
    found = verdicts(capsys.readouterr().out)
    assert set(found) == {"ok", "left out"}
    assert found.count("left out") == 5  # of a device's own memory
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_whole_rehearsal(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every method and every check."""
    assert gpu.main(["--device", "cpu", "--small", "--folder", str(tmp_path), "--seconds", "1000"]) == 0
    printed = capsys.readouterr().out
    assert set(verdicts(printed)) <= {"ok", "left out", "missed"}
    assert all(f"({letter}) " in printed for letter in "abcdef")


@pytest.mark.slow
def test_other_bytes_are_seen(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A device whose arithmetic differs in one bit of one entry fails; the other checks are made all the same."""
    gpu.METHODS = {"slerp": gpu.METHODS["slerp"]}
    made, read = gpu.digests, []

    def digests(folder: Path) -> dict[str, str]:
        read.append(folder)
        if len(read) % 2 == 0:  # the GPU's, after the CPU's
            path = next(folder.glob("*.safetensors"))
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        return made(folder)

    gpu.digests = digests
    assert gpu.main(["--device", "cpu", "--small", "--folder", str(tmp_path), "--only", "b"]) == 1
    printed = capsys.readouterr().out
    assert "FAILED   (b) slerp: AssertionError: {'model.safetensors': " in printed
    assert "ok       (b) inspect" in printed
    assert "1 FAILED" in printed


def test_no_check_begins_when_the_time_is_up(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out, by name; that is no failure."""
    options = ["--device", "cpu", "--small", "--folder", str(tmp_path), "--only", "b", "--seconds", "0"]
    assert gpu.main(options) == 0
    printed = capsys.readouterr().out
    assert set(verdicts(printed)) == {"left out"}
    assert "(b) slerp: no time is left" in printed
