"""What a run may use of the machine."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from lines_cli.errors import RecipeError

BLOCK = 64 * 1024
"""Entries whose sum is taken in one go when a norm is measured; no chunk that is measured cuts one."""

_IN_CACHE = 1024 * 1024  # entries of all models together


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output.

    Attributes:
        workers: threads; None is one per core, up to 4 (more only queue up at the disk).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        chunk: most entries per step. The default makes 2 MiB of float32, which stays in a core's cache together with
            its sources; with three models and more it is less (`chunk_for`).
    """

    workers: int | None = None
    device: str = "auto"
    chunk: int = 512 * 1024

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.chunk < 1:
            raise RecipeError(
                f"{self.workers} workers and chunks of {self.chunk} entries: at least one of each is needed"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise RecipeError(f"--device {self.device}: not a device", hint="Say auto, cpu, cuda, or cuda:N.")

    @property
    def threads(self) -> int:
        """How many workers there will be."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, min(4, cores))

    def chunk_for(self, models: int, *, whole_blocks: bool = False) -> int:
        """Entries per step with that many models: fewer where there are many, so that memory stays bounded.

        Args:
            models: how many are merged.
            whole_blocks: a multiple of BLOCK, for what is measured block by block.
        """
        chunk = min(self.chunk, max(BLOCK, _IN_CACHE // max(1, models) // BLOCK * BLOCK))
        return max(BLOCK, chunk // BLOCK * BLOCK) if whole_blocks else chunk
