"""How fast and how small is `lines edit`? Against the disk, and against the script one would write without it.

    python benchmarks/edit.py             # a 3 GB bf16 model, 5 rounds, a few minutes and 12 GB of disk
    python benchmarks/edit.py --quick     # 0.3 GB, 3 rounds

The contenders run in turn, round after round, as whole processes:

    floor    cat base > /dev/null; cp ft out; sync out: both inputs read, one output written and made durable
    lines    lines edit base ft -o out, which flushes its output to the disk before it names it
    plain    load both with safetensors, loop over the tensors, save, sync (benchmarks/plain.py)

What is quoted are medians and the ratio to the floor of the same round. Importing torch costs the same whoever does it,
and is timed by itself in every round: `net` is the time without it. This process stays small and imports no torch,
because a child's peak resident memory starts from its parent's.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
LINES = Path(sys.executable).with_name("lines")


@dataclass
class Contender:
    """A command and what was measured of it."""

    name: str
    command: list[str]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.3 GB and 3 rounds")
    parser.add_argument("--rounds", type=int, help="rounds (5; 3 with --quick)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results-edit.json")
    options = parser.parse_args()
    layers, width = (12, 1024) if options.quick else (28, 2048)
    rounds = options.rounds or (3 if options.quick else 5)

    work = HERE / "models"
    base, ft, out = work / f"base-{layers}-{width}", work / f"ft-{layers}-{width}", work / "out"
    for folder, noise in ((base, 0.0), (ft, 0.002)):
        if not (folder / "config.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            print(f"making {folder.name} ...", flush=True)
            program = [sys.executable, str(HERE / "make_model.py")]
            subprocess.run([*program, str(folder), str(layers), str(width), str(noise)], check=True)
    weights = [sorted(folder.glob("*.safetensors")) for folder in (base, ft)]
    size = sum(path.stat().st_size for path in weights[1])

    floor = f"cat {base}/*.safetensors > /dev/null && mkdir {out} && cp {ft}/*.safetensors {out} && sync {out}/*"
    contenders = [
        Contender("import torch", [sys.executable, "-c", "import torch"]),
        Contender("floor", ["sh", "-c", floor]),
        Contender("lines", [str(LINES), "edit", str(base), str(ft), "-o", str(out), "--device", "cpu", "--quiet"]),
        Contender("plain", [sys.executable, str(HERE / "plain.py"), str(base), str(ft), str(out)]),
    ]
    for number in range(rounds + 1):  # the first round only warms up
        for contender in contenders:
            shutil.rmtree(out, ignore_errors=True)
            settle(weights[0] + weights[1], 1 if options.quick else 8)
            seconds, peak = timed(contender.command)
            if contender.name in ("lines", "plain"):
                written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
                assert abs(written - size) < 1e6, f"{contender.name} wrote {written:,} bytes of {size:,}"
            if number:
                contender.seconds.append(seconds)
                contender.peak_mb.append(peak)
        shown = ", ".join(f"{c.name} {c.seconds[-1]:.2f} s" for c in contenders if c.seconds)
        print(f"round {number} of {rounds}: {shown or 'warm-up'}", flush=True)
    shutil.rmtree(out, ignore_errors=True)

    importing, baseline = contenders[0].seconds, contenders[1].seconds
    print(f"\n{size / 1e9:.2f} GB bf16 in {len(weights[1])} shards, {rounds} rounds, {describe_machine()}\n")
    print(f"{'':14}{'median':>9}{'min':>8}{'max':>8}{'net':>8}{'net/floor':>11}{'peak RSS':>10}")
    rows = []
    for contender in contenders:
        has_torch = contender.name in ("lines", "plain")
        net = [s - (i if has_torch else 0) for s, i in zip(contender.seconds, importing, strict=True)]
        ratio = statistics.median(n / f for n, f in zip(net, baseline, strict=True))
        row = {
            "contender": contender.name,
            "seconds": {"median": statistics.median(contender.seconds), "all": contender.seconds},
            "net_seconds": statistics.median(net),
            "net_ratio_to_floor": ratio,
            "peak_resident_mb": max(contender.peak_mb),
        }
        rows.append(row)
        s = contender.seconds
        times = f"{statistics.median(s):8.2f}s{min(s):7.2f}s{max(s):7.2f}s{statistics.median(net):7.2f}s"
        print(f"{contender.name:14}{times}{ratio:10.2f}x{max(contender.peak_mb):7.0f} MB")
    if options.save:
        report = {"model_bytes": size, "rounds": rounds, "machine": describe_machine(), "results": rows}
        (HERE / "results-edit.json").write_text(json.dumps(report, indent=2) + "\n")


def describe_machine() -> str:
    """Cores, memory and versions, for whoever compares figures."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    torch = subprocess.run(
        [sys.executable, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    ).stdout.strip()
    python = platform.python_version()
    return f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}, Python {python}, torch {torch}"


if __name__ == "__main__":
    main()
