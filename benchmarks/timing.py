"""Contenders that run in turn as whole processes, round after round, each from the same state.

A process that times others stays small and imports no torch, because a child's peak resident memory starts from its
parent's.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
WORK = HERE / "models"
"""Where commands run: they name models, recipes and `out` without a path."""
OUT = WORK / "out"

LINUX = sys.platform == "linux"
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # `lines` and `python` are this venv's
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Contender:
    """A shell command that is timed.

    Args:
        name: what it is called in tables.
        command: run by sh in benchmarks/models.
        imports_torch: whether the time that importing torch takes is part of its own.
        rounds: in how many rounds a slow one runs, without a warm-up; 0 for all.
        reads: whether it reads the case's inputs.
        writes: whether it makes `out`, which is then to hold what the case says.
        prints: it times its own steps, runs once, and prints lines such as `step  1.23 s (1.20 to 1.34)`.
    """

    name: str
    command: str
    imports_torch: bool = True
    rounds: int = 0
    reads: bool = True
    writes: bool = True
    prints: bool = False


@dataclass(frozen=True)
class Sample:
    """One run: its seconds, peak resident and peak anonymous memory, and the bytes that it asked the system for.

    Anonymous memory, which is no file's, is sampled; it and the bytes are told by Linux only.
    """

    seconds: float
    resident_mb: float
    anonymous_mb: float | None
    read_bytes: int | None


class NotColdError(Exception):
    """The inputs are still in the page cache, so a cold run cannot be had."""


def measure(command: str) -> tuple[Sample, str]:
    """Run a command; returns what was measured, and what it printed. A failure ends the benchmark."""
    # With `exec` the shell is gone, and what is told of the process is told of the command.
    line = command if re.search(r"[;&]", command) else f"exec {command}"
    with open(WORK / "stderr.txt", "w+") as complaints:
        started = time.perf_counter()
        process = subprocess.Popen(
            ["sh", "-c", line], cwd=WORK, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=complaints, text=True
        )
        with _sampling(process.pid) as peaks:
            assert process.stdout is not None
            printed = process.stdout.read()
            read = _read_bytes_at_exit(process.pid)
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            complaints.seek(0)
            sys.exit(f"{command}\nfailed with {process.returncode}:\n{complaints.read()[-3000:]}")
    resident = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6
    return Sample(seconds, resident, max(peaks) / 1e6 if peaks else None, read), printed


@contextlib.contextmanager
def _sampling(pid: int) -> Iterator[list[int]]:
    """Collect the bytes of anonymous memory of a process and its children, fifty times a second."""
    peaks: list[int] = []
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.02):
            peaks.append(sum(map(_anonymous, _with_children(pid))))

    thread = threading.Thread(target=sample)
    if LINUX:
        thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        if LINUX:
            thread.join()


def _content(path: str) -> str:
    """What a file of /proc says; nothing when the process is gone."""
    with contextlib.suppress(OSError), open(path) as file:
        return file.read()
    return ""


def _with_children(pid: int) -> Iterator[int]:
    yield pid
    for child in _content(f"/proc/{pid}/task/{pid}/children").split():
        yield from _with_children(int(child))


def _anonymous(pid: int) -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", _content(f"/proc/{pid}/status"))
    return int(found[1]) * 1024 if found else 0


def _read_bytes_at_exit(pid: int) -> int | None:
    """Wait until a child has ended, and tell how many bytes it read before it is forgotten."""
    if not LINUX:
        return None
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    found = re.search(r"rchar: (\d+)", _content(f"/proc/{pid}/io"))
    return int(found[1]) if found else None


def in_page_cache(files: list[Path]) -> float | None:
    """The share of the files' pages that are in the page cache, as mincore tells; None where it cannot be told."""
    if not LINUX:
        return None
    libc = ctypes.CDLL(None)
    there = pages = 0
    for file in files:
        with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
            told = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
            start = ctypes.c_char.from_buffer(mapped)  # taking its address touches no page
            failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), told)
            del start
            if failed:
                return None
            there += bytes(told).count(1)
            pages += len(told)
    return there / pages if pages else None


def settle(files: list[Path], hold: int, *, cold: bool) -> float | None:
    """The same state before every run: dirty pages written, free memory really there, inputs cached, or not.

    Args:
        files: the inputs.
        hold: bytes of memory to touch and give back. A machine that lends its free memory to others is slow to have
            it again, which is not the contender's doing.
        cold: drop the inputs from the page cache instead of reading them into it.

    Returns:
        The share of the inputs that is in the page cache now, where that can be told.

    Raises:
        NotColdError: they would not be dropped.
    """
    os.sync()
    subprocess.run([sys.executable, "-c", f"bytearray(b'x') * {hold}"], check=True)
    if cold:
        _drop(files)
    elif in_page_cache(files) != 1:
        for file in files * 2:  # what was read once only is the first to be evicted
            with open(file, "rb", buffering=0) as opened:
                while opened.read(8 * 2**20):
                    pass
    cached = in_page_cache(files)
    if cold and (cached is None or cached > 0.01):
        found = "cannot be looked at" if cached is None else f"still held {cached:.0%} of the inputs"
        raise NotColdError(f"the page cache {found} after it was asked to drop them")
    return cached


def _drop(files: list[Path]) -> None:
    """Drop the inputs from the page cache; if need be, all else with them but the programs that are to read them."""
    if hasattr(os, "posix_fadvise"):
        for file in files:
            fd = os.open(file, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
    if in_page_cache(files) != 0:
        with contextlib.suppress(OSError):
            Path("/proc/sys/vm/drop_caches").write_text("3")
            for program in ("python -c 'import torch'", "lines edit --help", "cp --version", "sync --version"):
                measure(program)


def weights_in(folder: Path) -> int:
    """Bytes of tensors in the safetensors files of a folder, headers apart."""
    held = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as opened:
            held += file.stat().st_size - 8 - int(struct.unpack("<Q", opened.read(8))[0])
    return held


def rounds_of(
    contenders: list[Contender], rounds: int, *, warm_up: bool, files: list[Path], writes: int, cold: bool
) -> tuple[list[dict[str, Any]], float | None]:
    """Run all contenders, round after round.

    Args:
        contenders: what runs, in turn.
        rounds: how often.
        warm_up: whether a round that does not count comes first.
        files: the inputs.
        writes: bytes of tensors that `out` is to hold in the end.
        cold: without the inputs in the page cache.

    Returns:
        What was measured of each: lists with a value for each round, None where it sat out; or the steps that it
        printed. And the least share of the inputs that was in the page cache before a run.

    Raises:
        NotColdError: cold runs cannot be had.
    """
    samples: dict[str, list[Sample | None]] = {contender.name: [] for contender in contenders}
    printed: dict[str, str] = {}
    shares: list[float] = []
    room = MEMORY - sum(file.stat().st_size for file in files) - 3 * 10**9
    for number in range(0 if warm_up else 1, rounds + 1):
        for contender in contenders:
            first, last = (1, contender.rounds) if contender.rounds else (0, rounds)
            if contender.prints:
                first = last = rounds
            if not first <= number <= last:
                samples[contender.name] += [None] if number else []
                continue
            shutil.rmtree(OUT, ignore_errors=True)
            if contender.reads:
                # A slow one is slow because it loads whole models: let the memory for that be there, too.
                hold = writes * (4 if contender.rounds else 1) + 5 * 10**8
                share = settle(files, max(0, min(hold, room)), cold=cold)
                shares += [] if share is None else [share]
            sample, printed[contender.name] = measure(contender.command)
            if contender.reads and contender.writes and weights_in(OUT) != writes:
                sys.exit(f"{contender.command}\nwrote {weights_in(OUT):,} bytes of tensors instead of {writes:,}")
            samples[contender.name] += [sample] if number else []
        shown = ", ".join(f"{name} {own[-1].seconds:.2f} s" for name, own in samples.items() if own and own[-1])
        print(f"  round {number} of {rounds}: {shown or 'warm-up'}", flush=True)
    shutil.rmtree(OUT, ignore_errors=True)
    found = [
        {"steps": _steps(printed[contender.name])} if contender.prints else _columns(samples[contender.name])
        for contender in contenders
    ]
    return found, min(shares, default=None)


def _steps(printed: str) -> dict[str, list[float]]:
    """The median, least and greatest seconds of each step that a program timed itself."""
    found = re.findall(r"^(\S.*?)\s+([\d.]+) s \(([\d.]+) to ([\d.]+)\)", printed, re.MULTILINE)
    return {name: [float(number) for number in numbers] for name, *numbers in found}


def _columns(samples: list[Sample | None]) -> dict[str, list[float | None]]:
    names = ("seconds", "resident_mb", "anonymous_mb", "read_bytes")
    rows = [[None if sample is None else getattr(sample, name) for sample in samples] for name in names]
    return {
        name: [round(value, 3) if isinstance(value, float) else value for value in row]
        for name, row in zip(names, rows, strict=True)
    }
