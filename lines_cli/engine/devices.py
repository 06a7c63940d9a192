"""Which device each thread of a run computes on, and how much memory of it a run may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lines_cli.engine.parts import Turned
from lines_cli.engine.whole_tensors import Kept, Whole
from lines_cli.errors import RecipeError
from lines_cli.plan.resources import SUM_BLOCK, BytesPerEntry, Resources


def choose_devices(name: str) -> tuple[torch.device, ...]:
    """`auto` is the first CUDA device where there is one, else the CPU.

    Raises:
        RecipeError: no such device here.
    """
    if name == "auto":
        return (torch.device("cuda:0" if torch.cuda.is_available() else "cpu"),)
    if name == "cpu":
        return (torch.device("cpu"),)
    there = torch.cuda.device_count()
    devices = dict.fromkeys(int(one.partition(":")[2] or 0) for one in name.split(","))
    if max(devices) >= there:
        raise RecipeError(f"--device {name}: torch {torch.__version__} sees {there} CUDA devices here")
    return tuple(torch.device("cuda", index) for index in devices)


def has_own_memory(device: torch.device) -> bool:
    """Whether a device has memory of its own, into which everything has to be copied."""
    return device.type != "cpu"


class Devices:
    """Which device each worker of a run computes on.

    Args:
        resources: what was asked.

    Raises:
        RecipeError: there is no such device here.
    """

    def __init__(self, resources: Resources) -> None:
        self.resources, self.devices = resources, choose_devices(resources.device)
        self.has_own_memory = has_own_memory(self.devices[0])
        number = resources.threads_on_cuda(len(self.devices)) if self.has_own_memory else resources.threads
        self.members = [self.devices[n % len(self.devices)] for n in range(number)]

    def whole_tensors(self) -> Kept[Whole]:
        """Where the workers of a pass keep what they merge whole."""
        return Kept(len(self.members))

    def turned(self, sides: int) -> Turned:
        """Where the workers of a pass keep matrices that so many of the inputs store the other way round."""
        return Kept(sides * (len(self.members) + 1))

    def chunk(self, per_entry: BytesPerEntry, *, whole: int = 0, whole_blocks: bool = False) -> int:
        """Entries per step.

        Args:
            per_entry: what one entry takes.
            whole: bytes that whole tensors take beside the workers' buffers.
            whole_blocks: a multiple of BLOCK.

        Raises:
            RecipeError: the share of a device's memory is too small for any.
        """
        fits = None
        if self.has_own_memory:
            most, entry = self._gpu_memory(), per_entry.nbytes(slots=SLOTS)
            workers = -(-len(self.members) // len(self.devices))
            fits = ((most - whole) // workers - _ROUNDED_UP) // entry
            if fits < SUM_BLOCK:
                raise RecipeError(
                    f"--gpu-memory {most:,}: {workers} workers on a device need "
                    f"{workers * (SUM_BLOCK * entry + _ROUNDED_UP) + whole:,} bytes",
                    hint="Allow more, or run fewer --workers.",
                )
        return self.resources.chunk_for(per_entry, fits=fits, whole_blocks=whole_blocks)

    def _gpu_memory(self) -> int:
        """Bytes that a run may take of each device."""
        total = min(_total_memory(device) for device in self.devices)
        return min(total, self.resources.gpu_memory or min(total // 8, 2 * 2**30))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within it torch's allocator takes no more of any CUDA device than the run may have, whatever a method makes
        meanwhile: beyond that it reports to be out of memory, and chunks are halved.
        """
        devices = self.devices if self.has_own_memory and torch.cuda.is_available() else ()
        try:
            for device in devices:
                taken = torch.cuda.memory_reserved(device)  # by whoever called us
                share = (taken + self._gpu_memory()) / _total_memory(device)
                torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)
            yield
        finally:
            for device in devices:
                torch.cuda.set_per_process_memory_fraction(1.0, device)


_ROUNDED_UP = 40 * 2**20
"""Bytes of a device that torch's allocator takes for each worker beyond what it is asked for: it rounds to 20 MiB."""


def _total_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).total_memory


SLOTS = 2  # inputs that are on their way to a device at a time
