"""What a run may use of the machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lines_cli.errors import RecipeError

SUM_BLOCK = 64 * 1024
"""Entries whose sum is taken in one go when a norm is measured; no chunk that is measured cuts one."""

TURNED_AT_ONCE = 64 * 2**20
"""Bytes of a matrix that are read the other way round at a time; those of most models are smaller."""
TURNING = 2
"""How many times these bytes are held while they are turned, the result apart."""

WORTH_LOADING = 2**31
WORTH_COMPILING = 2**33
"""Of `Plan.fused_entries`, from which on compiled kernels gain more time than loading them takes (0.6 s and more), or
compiling them (5 s): TIES of three models of 240 million parameters, and of a billion.
"""

_ON_CPU = 384 * 1024  # entries: more gain nothing
_IN_CACHE = 13 * 2**20  # bytes that a step takes there, or somewhat more where that is fewer entries than BLOCK
_ON_CUDA = 4 * 2**20  # entries: there a step has to be worth its launches
_WORKERS = 4  # more only queue up at the disk, or at one GPU


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output.

    Attributes:
        workers: threads; None is one per core, up to 4 (more only queue up at the disk), and 4 for each CUDA device.
        device: `auto`, `cpu`, `cuda`, `cuda:N`, or several as in `cuda:0,cuda:1`.
        gpu_memory: most bytes on each CUDA device; None is an eighth of the device's, up to 2 GiB.
        chunk: most entries per step; None is what stays in a core's cache (`chunk_for`), or what suits the device.
    """

    workers: int | None = None
    device: str = "auto"
    gpu_memory: int | None = None
    chunk: int | None = None

    def __post_init__(self) -> None:
        said = {"workers": self.workers, "gpu_memory": self.gpu_memory, "chunk": self.chunk}
        for what, number in said.items():
            if number is not None and number < 1:
                raise RecipeError(f"{what}: {number}; at least 1 is needed")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?(,cuda:\d+)*", self.device):
            raise RecipeError(
                f"--device {self.device}: not a device", hint="Use auto, cpu, cuda, cuda:N, or cuda:0,cuda:1."
            )

    @property
    def threads(self) -> int:
        """How many workers there will be on the CPU."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, min(_WORKERS, cores))

    def threads_on_cuda(self, devices: int) -> int:
        """How many workers there will be on that many CUDA devices: while one waits for the disk, others compute."""
        return max(devices, self.workers or _WORKERS * devices)

    def chunk_for(self, per_entry: BytesPerEntry, *, fits: int | None = None, whole_blocks: bool = False) -> int:
        """Entries per step. On the CPU fewer where there are many models, so that a chunk of each, and what is computed
        of them, stays near a core's cache; yet no fewer than are worth the calls.

        Args:
            per_entry: what one entry takes.
            fits: on a device of its own memory: how many entries have room in a worker's share of it.
            whole_blocks: a multiple of BLOCK, for what is measured block by block.
        """
        if fits is None:
            most = min(_ON_CPU, _IN_CACHE // per_entry.nbytes())
            most -= min(per_entry.beside // per_entry.nbytes(), most // 3)
            chunk = self.chunk or max(SUM_BLOCK, most // SUM_BLOCK * SUM_BLOCK)
        else:
            chunk = min(self.chunk or _ON_CUDA, fits // SUM_BLOCK * SUM_BLOCK)
        return max(SUM_BLOCK, chunk // SUM_BLOCK * SUM_BLOCK) if whole_blocks else chunk


@dataclass(frozen=True, slots=True)
class BytesPerEntry:
    """What one entry of a chunk takes of a worker's buffers.

    Attributes:
        stored: bytes of the widest entry, as inputs store it.
        written: bytes of the widest, as the output stores it; 0 where nothing is written.
        width: bytes of the widest, as it is computed with.
        held: from how many inputs entries are held at a time.
        temporaries: how many more of that width a method makes meanwhile.
        beside: bytes that the worker holds whatever the chunk, for which a chunk has up to a third fewer entries.
    """

    stored: int
    written: int
    width: int
    held: int
    temporaries: int = 0
    beside: int = 0

    def nbytes(self, *, slots: int = 1) -> int:
        """Bytes where it computes; with `slots` inputs on their way there at a time."""
        return slots * self.stored + self.written + (self.held + self.temporaries) * self.width
