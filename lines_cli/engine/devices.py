"""Which device each thread of a run computes on, and how much memory of it a run may take."""

from __future__ import annotations

import re
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


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch says that a device is out of memory. Its allocator has a kind of error for it; the driver, which is
    asked for pinned memory, streams and contexts, and libraries that want a workspace have only words.
    """
    return isinstance(error, torch.cuda.OutOfMemoryError) or _OUT_OF_MEMORY.search(str(error)) is not None


_OUT_OF_MEMORY = re.compile(
    r"error: out of memory|_STATUS_ALLOC_FAILED|cudaErrorMemoryAllocation|allocate memory on GPU device"
)


def first_line(error: BaseException) -> str:
    """What an error of torch says, without the advice for developers below it."""
    return str(error).partition("\n")[0]


@contextmanager
def out_of_memory_on(device: torch.device) -> Iterator[None]:
    """Within it a device that is too full to be used at all is a `MemoryError`."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryError(f"{device} is too full to be used: {first_line(error)}") from error


def give_back(device: torch.device) -> None:
    """Have torch return what it keeps of freed memory: of CUDA devices, and pinned memory of the host where it can. A
    pass has streams of its own, and what is kept for those of another is of no use to it.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
        empty_host_cache = getattr(getattr(torch, "accelerator", None), "empty_host_cache", None)  # since torch 2.10
        if empty_host_cache is not None:
            empty_host_cache()


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
        chunk = self.resources.chunk_for(per_entry, fits=fits, whole_blocks=whole_blocks)
        # Torch pins powers of two, whatever it is asked for.
        return chunk if fits is None or chunk < SUM_BLOCK else 1 << chunk.bit_length() - 1

    def _gpu_memory(self) -> int:
        """Bytes that a run may take of each device."""
        total = min(_total_memory(device) for device in self.devices)
        return min(total, self.resources.gpu_memory or min(total // 8, 2 * 2**30))

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """Within it torch's allocator takes no more of any CUDA device than the run may have, whatever a method makes
        meanwhile: beyond that it reports to be out of memory, and chunks are halved. A caller's own limit still holds,
        and is in force again afterwards.
        """
        devices = self.devices if self.has_own_memory and torch.cuda.is_available() else ()
        before: dict[torch.device, float] = {}
        try:
            for device in devices:
                with out_of_memory_on(device):
                    taken = torch.cuda.memory_reserved(device)  # by whoever called us
                    share = (taken + self._gpu_memory()) / _total_memory(device)
                    limit = _fraction(device)
                    torch.cuda.set_per_process_memory_fraction(min(limit, share), device)
                    before[device] = limit
            yield
        finally:
            for device, limit in before.items():
                torch.cuda.set_per_process_memory_fraction(limit, device)


_ROUNDED_UP = 40 * 2**20
"""Bytes of a device that torch's allocator takes for each worker beyond what it is asked for: it rounds to 20 MiB."""


def _total_memory(device: torch.device) -> int:
    with out_of_memory_on(device):
        return torch.cuda.get_device_properties(device).total_memory


def _fraction(device: torch.device) -> float:
    """How much of a device torch's allocator may take; versions before 2.5 do not say."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if ask is None else float(ask(device))


SLOTS = 2  # inputs that are on their way to a device at a time
