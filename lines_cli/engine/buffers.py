"""A thread's memory, on the host and on its device, and what is read into it."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from dataclasses import dataclass

import torch

from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES
from lines_cli.engine.devices import has_own_memory


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next chunk, where it would hand it back to the system each time: then
    every temporary of 1 MiB is 300 page faults, and TIES takes three times as long. What one thread freed, others may
    use (one arena), or else it takes 30 MB more. Only glibc has such a switch.
    """
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 32 * 2**20)
        libc.mallopt(_TRIM_THRESHOLD, 128 * 2**20)
        libc.mallopt(_ARENA_MAX, 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h


class Buffer:
    """Reusable bytes on the host and, where a device has memory of its own, as many there; on the CPU the two are one.

    Host memory is pinned for CUDA, and copies take their turn in the thread's stream: `to_fill` waits until the last
    one to the device has left, `to_host` until its own has arrived.
    """

    def __init__(self, device: torch.device, nbytes: int) -> None:
        on_cuda = device.type == "cuda"
        nbytes = max(nbytes, 1)
        self._host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=on_cuda)
        self._device = torch.empty(nbytes, dtype=torch.uint8, device=device) if has_own_memory(device) else self._host
        self._memory = memoryview((ctypes.c_char * nbytes).from_address(self._host.data_ptr())).cast("B")
        self._moved = torch.cuda.Event(blocking=True) if on_cuda else None  # type: ignore[no-untyped-call]

    def to_fill(self, nbytes: int) -> memoryview:
        """The first bytes on the host, to read a file into."""
        self._wait()
        return self._memory[:nbytes]

    def device_view(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """The first entries on the device, as `dtype`."""
        return self._device[: numel * dtype.itemsize].view(dtype)

    def to_device(self, nbytes: int) -> None:
        """Copy the first bytes from the host, before whatever the thread's stream does next."""
        if self._device is not self._host:
            self._device[:nbytes].copy_(self._host[:nbytes], non_blocking=True)
            self._record()

    def to_host(self, nbytes: int) -> memoryview:
        """The first bytes, copied from the device after all that the thread's stream was given; they have arrived."""
        if self._device is not self._host:
            self._host[:nbytes].copy_(self._device[:nbytes], non_blocking=True)
            self._record()
            self._wait()
        return self._memory[:nbytes]

    def _record(self) -> None:
        if self._moved is not None:
            self._moved.record()

    def _wait(self) -> None:
        if self._moved is not None:
            self._moved.synchronize()


@dataclass(slots=True)
class Loaded:
    """A chunk of one input, read into a buffer."""

    buffer: Buffer
    dtype: str
    numel: int
    raw: memoryview

    def values(self) -> torch.Tensor:
        """[numel], as stored, on the worker's device."""
        self.buffer.to_device(len(self.raw))
        return self.buffer.device_view(self.numel, (TORCH_DTYPES | FLOAT8)[self.dtype])

    def bits(self) -> int:
        """The sum of the stored bytes, read as whole numbers of 8 bytes, modulo 2**64; once `values` were asked for."""
        whole = len(self.raw) // 8
        total = int(self.buffer.device_view(whole, torch.int64).sum()) + int.from_bytes(self.raw[8 * whole :], "little")
        return total % 2**64
