"""Whole reads and writes at an offset, however short the system's own may be; past the page cache where that is faster.

Threads may share a file descriptor as long as nobody relies on its position: `preadv` and `pwrite` do not. Where they
are missing, a lock around seek-and-read does the same, one call at a time.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from contextlib import suppress
from pathlib import Path

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has put in another's place."""
FETCH_LFS = "Fetch the file itself: git lfs install, then git lfs pull in that folder."

_HAS_POSITIONAL = hasattr(os, "preadv") and hasattr(os, "pwrite")
_position = threading.Lock()


def open_to_stream(path: Path) -> int:
    """Open a file that is read front to back, more or less: the system may read further ahead than it does else."""
    fd = open_regular(path)
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return fd


def read_small(path: Path, most: int, *, follow: bool = True) -> bytes:
    """The content of a small file: an index, a config, a journal, a lock. A pipe or a device is not waited for, and a
    file that claims to be larger, or grows meanwhile, is not read.

    Args:
        path: the file.
        most: how many bytes it may have.
        follow: whether it may be a symbolic link.

    Raises:
        OSError: it cannot be read, is no regular file, or is larger; `strerror` says so in words.
    """
    with open(open_regular(path, follow=follow), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EOVERFLOW, f"it has {size:,} bytes; at most {most:,} are read", str(path))
        content = file.read(size + 1)  # one more, to see whether it has grown; in one copy
        while content and len(content) <= size and (more := file.read(size + 1 - len(content))):
            content += more
        if len(content) > size:
            raise OSError(errno.EBUSY, "it grew while it was read", str(path))
        return content


def open_regular(path: Path, *, follow: bool = True) -> int:
    """Open a regular file to read it. A pipe or a device is not waited for, whenever it took the file's place.

    Args:
        path: the file.
        follow: whether it may be a symbolic link.

    Raises:
        OSError: it cannot be opened, or is no regular file; `strerror` says so in words.
    """
    if not stat.S_ISREG((os.stat(path) if follow else os.lstat(path)).st_mode):  # opening a device may do something
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | (0 if follow else getattr(os, "O_NOFOLLOW", 0))
    fd = os.open(path, os.O_RDONLY | flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, NOT_REGULAR, str(path))
    return fd


NOT_REGULAR = "not a regular file"


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


def ask_for(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to read these bytes of a file into the page cache, as far as they are not there. It waits
    only where the disk has as many requests already as it takes.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a filesystem may know no advice
            for start in range(offset, offset + nbytes, _ASKED_AT_ONCE):
                step = min(_ASKED_AT_ONCE, offset + nbytes - start)
                os.posix_fadvise(fd, start, step, os.POSIX_FADV_WILLNEED)


_ASKED_AT_ONCE = 256 * 1024  # Linux reads no more than its window (128 KiB, twice that where a file is streamed)


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


def in_whole_pages(nbytes: int) -> memoryview:
    """A buffer that begins where a page does, as writes past the page cache want it."""
    return memoryview(mmap.mmap(-1, nbytes))


class NewFile:
    """A file of a known size, written by several threads, each at its own offset.

    Whole pages go straight to the disk (`O_DIRECT`) as long as it keeps up: they take a tenth of the processor time,
    and drive nothing out of the page cache. The rest, a slow disk, and a system that has no such thing, are served
    through the page cache, from which the system begins to move them to the disk at once.

    Args:
        path: must not exist, unless it was begun.
        nbytes: its size.
        begun: what is there of it is kept.

    Raises:
        OSError: it exists, or cannot be created.
    """

    def __init__(self, path: Path, nbytes: int, *, begun: bool = False) -> None:
        flags = os.O_WRONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._fds = [os.open(path, flags | os.O_CREAT | (0 if begun else os.O_EXCL), 0o666)]
        self._straight: int | None = None
        self._pace = 0.0  # seconds that a byte takes on its way to the disk, a running mean
        try:
            os.ftruncate(self._fds[0], nbytes)
            if hasattr(os, "O_DIRECT") and _HAS_POSITIONAL:
                with suppress(OSError):  # not on this filesystem
                    self._straight = os.open(path, flags | os.O_DIRECT)
                    self._fds.append(self._straight)
        except BaseException:
            self.close()
            raise

    def write(self, view: memoryview, offset: int) -> None:
        """Write all of `view` (bytes) at `offset`."""
        done, straight = 0, self._straight  # which another thread may give up meanwhile
        if straight is not None and len(view) % mmap.PAGESIZE == offset % mmap.PAGESIZE == 0:
            done = self._write_straight(straight, view, offset)
        if done < len(view):
            write_from(self._fds[0], view[done:], offset + done)
            start_writeback(self._fds[0], offset + done, len(view) - done)

    def _write_straight(self, fd: int, view: memoryview, offset: int) -> int:
        """Write past the page cache, once; returns how many bytes were taken, and gives it up where it does not pay."""
        started = time.perf_counter()
        try:
            done = os.pwrite(fd, view, offset)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
            self._straight = None  # not here, or not from such a buffer
            return 0
        if done:
            took = min((time.perf_counter() - started) / done, _MOST_COUNTED)
            self._pace += (took - self._pace) / _REMEMBERED
            if self._pace > 1 / _SLOW:
                self._straight = None
        return done

    @property
    def identity(self) -> tuple[int, int]:
        """Its device and inode: what `path` leads to as long as nobody replaces it."""
        there = os.fstat(self._fds[0])
        return there.st_dev, there.st_ino

    def sync(self) -> None:
        """Return when all of it is on the disk.

        Raises:
            OSError: it could not be written.
        """
        os.fsync(self._fds[0])

    def close(self) -> None:
        """Close it; as it is, if it was not synced."""
        while self._fds:
            os.close(self._fds.pop())


_SLOW = 100e6  # bytes per second of one thread: a disk that takes less should not be waited for at each step
_REMEMBERED = 64  # writes: a disk that is fast may still take a third of a second for one of some hundreds
_MOST_COUNTED = 4 / _SLOW  # of one write, however long it took: a pause of the disk is that of all threads that write


def start_writeback(fd: int, offset: int, nbytes: int) -> None:
    """Have the system begin to move these bytes of a file to the disk, so that the last `fsync` finds little left.

    Linux does so when it is advised that they are not needed; what it has not moved yet stays in the page cache.
    """
    if hasattr(os, "posix_fadvise"):
        with suppress(OSError):  # a filesystem may know no advice
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
