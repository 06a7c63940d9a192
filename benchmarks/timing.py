"""What the benchmarks share: contenders that run in turn as whole processes, from the same state, and their figures.

A process that times others stays small and imports no torch, because a child's peak resident memory starts from its
parent's.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINES = Path(sys.executable).with_name("lines")
HERE = Path(__file__).parent
MODELS = HERE / "models"


@dataclass
class Contender:
    """A command and what was measured of it."""

    name: str
    command: list[str]
    imports_torch: bool = False
    seconds: list[float] = field(default_factory=list)
    peak_mb: list[float] = field(default_factory=list)


def timed(command: list[str]) -> tuple[float, float]:
    """Run a command; returns its seconds and its peak resident memory in MB. A failure ends the benchmark."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    complaint = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)[:200]} failed with {process.returncode}:\n{complaint.decode()[-2000:]}")
    return seconds, usage.ru_maxrss / (1 if sys.platform != "darwin" else 1024) / 1000


def settle(inputs: list[Path], gigabytes: int) -> None:
    """The same state before every run: dirty pages written, free memory really there, inputs cached."""
    subprocess.run(["sync"], check=True)
    subprocess.run([sys.executable, "-c", f"bytearray(b'x') * ({gigabytes} * 10**9)"], check=True)
    for _ in range(2):
        for path in inputs:
            with open(path, "rb", buffering=0) as file:
                while file.read(8 * 2**20):
                    pass


def rounds_of(contenders: list[Contender], rounds: int, *, inputs: list[Path], out: Path, size: int, hold: int) -> None:
    """Run all contenders, round after round; the first round only warms up.

    Args:
        contenders: what runs, in turn; their figures are added to them.
        rounds: how often, warm-up apart.
        inputs: the files that are read, in the page cache before every run.
        out: the folder that a run makes.
        size: bytes of weights that it is to hold after the run of a contender that imports torch.
        hold: gigabytes of memory to touch and release before every run.
    """
    for number in range(rounds + 1):
        for contender in contenders:
            shutil.rmtree(out, ignore_errors=True)
            settle(inputs, hold)
            seconds, peak = timed(contender.command)
            written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
            if contender.imports_torch:
                assert abs(written - size) < 1e6, f"{contender.name} wrote {written:,} bytes of {size:,}"
            if number:
                contender.seconds.append(seconds)
                contender.peak_mb.append(peak)
        shown = ", ".join(f"{c.name} {c.seconds[-1]:.2f} s" for c in contenders if c.seconds)
        print(f"round {number} of {rounds}: {shown or 'warm-up'}", flush=True)
    shutil.rmtree(out, ignore_errors=True)


def table(contenders: list[Contender]) -> list[dict[str, Any]]:
    """Print and return medians, spread, and ratios to the floor of the same round.

    The first contender imports torch and does nothing else, the second is the floor; `net` is without that import.
    """
    importing, floor = contenders[0].seconds, contenders[1].seconds
    width = max(len(contender.name) for contender in contenders) + 2
    print(f"\n{'':{width}}{'median':>9}{'min':>8}{'max':>8}{'net':>8}{'net/floor':>11}{'peak RSS':>10}")
    rows = []
    for contender in contenders:
        net = [s - (i if contender.imports_torch else 0) for s, i in zip(contender.seconds, importing, strict=True)]
        ratio = statistics.median(n / f for n, f in zip(net, floor, strict=True))
        seconds, peak = contender.seconds, max(contender.peak_mb)
        times = (
            f"{statistics.median(seconds):8.2f}s{min(seconds):7.2f}s{max(seconds):7.2f}s{statistics.median(net):7.2f}s"
        )
        print(f"{contender.name:{width}}{times}{ratio:10.2f}x{peak:7.0f} MB")
        rows.append(
            {
                "contender": contender.name,
                "seconds": {"median": statistics.median(seconds), "all": seconds},
                "net_seconds": statistics.median(net),
                "net_ratio_to_floor": ratio,
                "peak_resident_mb": peak,
            }
        )
    return rows


def make_model(name: str, layers: int, width: int, noise: float, seed: int = 0) -> Path:
    """Make a synthetic checkpoint in `benchmarks/models`, unless it is there."""
    folder = MODELS / f"{name}-{layers}-{width}"
    if not (folder / "config.json").exists():
        print(f"making {folder.name} ...", flush=True)
        shutil.rmtree(folder, ignore_errors=True)
        program = [sys.executable, str(HERE / "make_model.py")]
        subprocess.run([*program, str(folder), str(layers), str(width), str(noise), str(seed)], check=True)
    return folder


def describe_machine() -> str:
    """Cores, memory and versions, for whoever compares figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {python}, torch {torch}"
