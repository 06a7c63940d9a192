"""A disk that answers each request after 3 ms, many at a time: what `lines` reads from it, beside readers that do
nothing else. Linux, root, /dev/fuse, a C compiler, pkg-config and libfuse3-dev.

    python benchmarks/latency.py [--rounds 3] [--latency 3] [--window 128] [--at-once 64] [--only lines]

The file system (`latency.c`) passes the models through: it waits, then answers from the page cache of the disk below.
It is mounted anew for each run, so that nothing of it is in the page cache. It runs on this machine and copies what it
answers, before other processes: the fastest row says what it can give, with as many readers as it takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from models import Model
from timing import HERE, OUT, WORK, measure

PROGRAM = WORK / "latency"
MODELS = [Model(role, "llama-8-1280") for role in ("base", "ft1", "ft2", "ft3")]
KIB = 1024


def why_not() -> str | None:
    """What is missing here, if anything is; else the file system is built."""
    if not Path("/dev/fuse").exists() or os.geteuid() != 0:
        return "a mount needs Linux, /dev/fuse and root"
    tools = [tool for tool in ("cc", "pkg-config", "chrt", "umount") if shutil.which(tool) is None]
    if tools:
        return f"there is no {', '.join(tools)}"
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], capture_output=True, text=True, check=False)
    if flags.returncode:
        return "there is no libfuse3-dev"
    WORK.mkdir(exist_ok=True)
    subprocess.run(["cc", "-O2", "-o", PROGRAM, HERE / "latency.c", *flags.stdout.split(), "-pthread"], check=True)
    return None


def contenders(mount: str, window: int) -> dict[str, str]:
    """Commands by their names."""
    files = [f"{mount}/{model.name}/*.safetensors" for model in MODELS]
    reading = f"python ../{Path(__file__).name} --window {window} --readers"
    found = {f"{n} at a time": f"{reading} {n} {' '.join(files[: 1 if n < 16 else 4])}" for n in (1, 4, 16, 32, 64)}
    found["cat"] = f"cat {' '.join(files[:2])} > /dev/null"
    found["lines edit"] = f"lines edit {mount}/{MODELS[0].name} {mount}/{MODELS[1].name} -o out --quiet"
    for method, parameters in (("task_arithmetic", "weight: 0.3"), ("ties", "density: 0.2, weight: 0.3")):
        recipe = [f"merge_method: {method}", f"base_model: {mount}/{MODELS[0].name}", "models:"]
        recipe += [f"  - model: {mount}/{model.name}" for model in MODELS[1:]]
        (WORK / f"slow-{method}.yaml").write_text("\n".join([*recipe, f"parameters: {{{parameters}}}", ""]))
        found[f"lines {method}"] = f"lines merge --config slow-{method}.yaml -o out --quiet"
    return found


def readers(number: int, window: int, files: list[str]) -> None:
    """Read files front to back with so many threads, each request by itself and of the same size."""

    def one(numbered: tuple[int, tuple[int, int]]) -> int:
        place, (fd, start) = numbered
        return os.preadv(fd, [buffers[place % len(buffers)]], start)

    buffers = [bytearray(window) for _ in range(2 * number)]  # what is read is not looked at
    fds = [os.open(file, os.O_RDONLY) for file in files]
    for fd in fds:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no reading ahead
    with ThreadPoolExecutor(number) as pool:
        list(pool.map(one, enumerate((fd, at) for fd in fds for at in range(0, os.fstat(fd).st_size, window))))


def on_a_fresh_mount(asked: argparse.Namespace, mount: str, command: str) -> tuple[float, dict[str, Any]]:
    """Run a command: its seconds, and what was asked of the file system."""
    shutil.rmtree(OUT, ignore_errors=True)
    serving = [
        "chrt",
        "--rr",
        "1",
        str(PROGRAM),
        str(WORK),
        str(int(1000 * asked.latency)),
        str(asked.at_once),
        mount,
    ]
    serving += ["-f", "-o", f"ro,allow_other,max_threads={asked.at_once + 8},max_idle_threads={asked.at_once + 8}"]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
        while not os.path.ismount(mount):
            if server.poll() is not None:
                sys.exit("the file system could not be mounted")
        try:
            device = os.stat(mount).st_dev
            ahead = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
            ahead.write_text(str(asked.window))
            sample, _ = measure(command)
        finally:
            subprocess.run(["umount", mount], check=True)
        assert server.stdout is not None
        return sample.seconds, json.loads(server.stdout.read())


def compare(asked: argparse.Namespace) -> None:
    """All contenders, in turn."""
    for model in MODELS:
        model.make()
        for file in model.files:
            file.read_bytes()  # into the page cache of the disk below
    found: dict[str, list[tuple[float, dict[str, Any]]]] = {}
    with tempfile.TemporaryDirectory() as mount:  # not below what it passes through, which would be asked of itself
        for _ in range(asked.rounds):
            for name, command in contenders(mount, asked.window).items():
                if asked.only in name:
                    found.setdefault(name, []).append(on_a_fresh_mount(asked, mount, command))
    print(f"{'':24}{'s':>7}{'GB':>6}{'MB/s':>7}{'requests':>10}{'in flight':>11}{'at most':>9}")
    for name, runs in found.items():
        seconds, mean = (statistics.median(of) for of in ([run[0] for run in runs], [run[1]["mean"] for run in runs]))
        nbytes, requests = runs[0][1]["bytes"], runs[0][1]["requests"]
        row = f"{name:24}{seconds:7.2f}{nbytes / 1e9:6.2f}{nbytes / seconds / 1e6:7.0f}{requests:10}{mean:11.1f}"
        print(f"{row}{max(run[1]['most'] for run in runs):9}")


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--latency", type=float, default=3, help="milliseconds of each request")
    parser.add_argument("--window", type=int, default=128, help="KiB that the system reads ahead of a reader")
    parser.add_argument("--at-once", type=int, default=64, help="requests that the file system has in flight at most")
    parser.add_argument("--only", default="", help="of the contenders those whose names contain this")
    parser.add_argument("--readers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.readers is not None:
        readers(asked.readers, asked.window * KIB, asked.files)
    elif missing := why_not():
        print(f"left out: {missing}")
    else:
        compare(asked)


if __name__ == "__main__":
    main()
