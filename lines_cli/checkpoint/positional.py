"""Whole reads and writes at an offset, however short the system's own may be.

Threads may share a file descriptor as long as nobody relies on its position: `preadv` and `pwrite` do not. Where they
are missing, a lock around seek-and-read does the same, one call at a time.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress

_HAS_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")
_position = threading.Lock()


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` (bytes) from `offset` on; returns how many bytes there were, fewer than asked only at the end
    of the file.
    """
    done = 0
    while done < len(view):
        rest = view[done:]
        if _HAS_POSITIONAL:
            got = os.preadv(fd, [rest], offset + done)
        else:
            with _position:
                os.lseek(fd, offset + done, os.SEEK_SET)
                piece = os.read(fd, len(rest))
            got = len(piece)
            rest[:got] = piece
        if got == 0:
            break
        done += got
    return done


def write_from(fd: int, view: memoryview | bytes, offset: int) -> None:
    """Write all of `view` at `offset`."""
    view = memoryview(view)
    done = 0
    while done < len(view):
        if _HAS_POSITIONAL:
            done += os.pwrite(fd, view[done:], offset + done)
        else:
            with _position:
                os.lseek(fd, offset + done, os.SEEK_SET)
                done += os.write(fd, view[done:])


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to move these bytes of a file to the disk, so that the last `fsync` finds little left.

    Linux does so when it is advised that they are not needed; what it has not moved yet stays in the page cache.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a filesystem may know no advice
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
