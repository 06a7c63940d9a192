"""What each part of the work takes by itself: one thread, 0.5 GB of bf16, chunk by chunk as the workers do it.

python benchmarks/parts.py [--rounds 5]

Processor seconds (of the user and the system) per GB of output, and nanoseconds per entry: medians, least and greatest.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import torch

from lines_cli.engine.arithmetic import add_scaled, is_finite, task_vector
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.threshold import Window, look
from lines_cli.methods import fused
from lines_cli.methods.consensus import consensus
from lines_cli.methods.sparsify import Where, random_masks, trim
from lines_cli.methods.ties import elect, ties
from lines_cli.storage.files import start_writeback

CHUNK, CHUNKS = 256 * 1024, 1000  # entries of a chunk; so many make 0.5 GB
BYTES = 2 * CHUNK
BLOCK = 4 * 2**20


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


def writing(path: Path, flags: int, *, writeback: bool = False) -> Callable[[], object]:
    """A new file, in blocks of 4 MiB, and made durable."""
    block = mmap.mmap(-1, BLOCK)  # where a page begins, as O_DIRECT wants it
    block.write(os.urandom(BLOCK))

    def write() -> None:
        path.unlink(missing_ok=True)
        with opened(path, os.O_WRONLY | os.O_CREAT | flags) as fd:
            for offset in range(0, CHUNKS * BYTES // BLOCK * BLOCK, BLOCK):
                os.pwrite(fd, block, offset)
                if writeback:
                    start_writeback(fd, offset, BLOCK)
            os.fsync(fd)

    return write


def repeated(action: Callable[[], object]) -> Callable[[], object]:
    """The same chunk over and over."""

    def repeat() -> None:
        for _ in range(CHUNKS):
            action()

    return repeat


def by_kernels(action: Callable[[], object]) -> Callable[[], object]:
    """The same with compiled kernels."""
    from lines_cli.methods import kernels

    kernels.compile_all()

    def with_kernels() -> None:
        fused.use(kernels)
        action()
        fused.use(None)

    return with_kernels


def parts(folder: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each part's name, and what does it 1,000 times."""
    source, target = folder / "source", folder / "target"
    with open(source, "wb") as file:
        file.writelines(os.urandom(BYTES) for _ in range(CHUNKS))
    buffer = bytearray(BYTES)

    def read() -> None:
        with opened(source, os.O_RDONLY) as fd:
            for chunk in range(CHUNKS):
                os.preadv(fd, [buffer], chunk * BYTES)

    yield "read one input out of the page cache", read
    raw = (0.02 * torch.randn(CHUNK)).bfloat16()
    wide, tuned, out = torch.empty(CHUNK), torch.empty(CHUNK), torch.empty(CHUNK, dtype=torch.bfloat16)
    yield "widen one input to float32", repeated(lambda: wide.copy_(raw))
    yield "  the same by shifting bits", repeated(lambda: raw.view(torch.int16).to(torch.int32).bitwise_left_shift_(16))
    yield "the formula: -, *, +", repeated(lambda: add_scaled(wide, task_vector(tuned.zero_(), wide), 0.5))
    yield "round to bf16", repeated(lambda: out.copy_(tuned))
    yield "look for NaN and Inf", repeated(lambda: is_finite(out))
    yield "  the same by isfinite", repeated(lambda: bool(out.isfinite().all()))
    yield "SHA-256", repeated(lambda: sha256(buffer).digest())
    yield "write, fsync", writing(target, 0)
    yield "  with early write-back", writing(target, 0, writeback=True)
    if hasattr(os, "O_DIRECT"):
        yield "  past the page cache (O_DIRECT)", writing(target, os.O_DIRECT)

    taus = [0.002 * torch.randn(CHUNK) for _ in range(3)]
    threshold = float(taus[0].abs().kthvalue(int(0.8 * CHUNK)).values)
    bits = int(torch.tensor(threshold).view(torch.int32))
    window = Window(bits - 2**16, bits + 2**16)
    magnitudes, ones = torch.stack(taus).abs_(), [1.0] * 3

    def fresh() -> list[torch.Tensor]:
        return [tau.clone() for tau in taus]

    def draw() -> object:
        return random_masks(taus[:1], density=[0.2], seed=0, where=Where("t", 0))

    yield "copy three task vectors (to be taken off below)", repeated(fresh)

    def count_signs() -> object:
        return elect(taus, weight=ones, factor=ones, waiting=False)[0].sum(dtype=torch.float64)

    with_kernels: list[tuple[str, Callable[[], object]]] = [
        ("threshold: look for three through narrow windows", lambda: look(magnitudes, [window] * 3)),
        ("TIES: signs of three", count_signs),
        ("TIES: merge three", lambda: ties(fresh(), weight=ones, factor=ones)),
        ("consensus of three", lambda: consensus(fresh(), weight=ones, mask_lambda=[0.4] * 3)),
    ]
    for name, action in with_kernels:
        yield name, repeated(action)
        if find_spec("numba") is not None:
            yield "  the same by a kernel", by_kernels(repeated(action))
    yield "threshold: trim three", repeated(lambda: trim(fresh(), threshold=[threshold] * 3))
    yield "DARE: draw for one", repeated(draw)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    keep_freed_memory()
    print(f"{'':52}{'s per GB':>10}{'':18}{'ns per entry':>14}")
    with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as folder, torch.inference_mode():
        for name, action in parts(Path(folder)):
            seconds = []
            for _ in range(rounds):
                started = time.process_time()
                action()
                seconds.append((time.process_time() - started) / (CHUNKS * BYTES / 1e9))
            spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"{name:52}{statistics.median(seconds):10.2f} {spread:17}{2 * statistics.median(seconds):14.2f}")


if __name__ == "__main__":
    main()
