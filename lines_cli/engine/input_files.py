"""The inputs as open files: opened together, and held against the state in which they were planned with."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import torch

from lines_cli.checkpoint.reader import FileState
from lines_cli.engine.whole_tensors import Kept
from lines_cli.errors import ChangedInputError, CheckpointError
from lines_cli.storage.files import open_to_stream, read_into
from lines_cli.storage.object_store import RemoteFile, url_of
from lines_cli.storage.views import FileWithViews, Views


class Held(Protocol):
    """An input that is no file: tensors in memory."""

    def read_into(self, view: memoryview, offset: int) -> int:
        """As `positional.read_into`."""


Opened = int | Held
"""An opened input: a file descriptor, or what is read in the same way."""


@contextmanager
def opened(paths: Iterable[Path]) -> Iterator[list[Opened]]:
    """The inputs, open for the length of a `with` block: file descriptors, or what reads objects in a store."""
    paths = list(paths)
    allow_open_files(len(paths))
    fds: list[Opened] = []
    try:
        for path in paths:
            if (url := url_of(path)) is not None:
                fds.append(RemoteFile(url))
                continue
            try:
                fds.append(open_to_stream(path))
            except OSError as error:
                hint = None
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    hint = f"{len(paths):,} files are read at once. Allow more (ulimit -n), or merge larger shards."
                raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=hint) from error
        yield fds
    finally:
        for fd in fds:
            if isinstance(fd, int):
                os.close(fd)


def refuse_changed(paths: Sequence[Path], fds: Sequence[Opened], states: Sequence[FileState]) -> None:
    """Refuse inputs that are not, or no longer, in the state in which their headers were read.

    Raises:
        ChangedInputError: which file, and how it differs.
    """
    for path, fd, state in zip(paths, fds, states, strict=True):
        nbytes, mtime_ns = _state_of(fd)
        if (nbytes, mtime_ns) != (state.nbytes, state.mtime_ns):
            what = f"its size went from {state.nbytes:,} to {nbytes:,} bytes"
            if nbytes == state.nbytes:
                what = f"its modification time moved by {abs(mtime_ns - state.mtime_ns) / 1e9:.3f} s"
            raise ChangedInputError(
                f"{path} was modified while lines was reading it: {what}",
                hint="Run it again when nothing writes to it.",
            )


def _state_of(source: Opened) -> tuple[int, int]:
    """The size of an open input, and when it was last written."""
    if isinstance(source, RemoteFile):
        return source.state()
    assert isinstance(source, int)
    there = os.fstat(source)
    return there.st_size, there.st_mtime_ns


def allow_open_files(number: int) -> None:
    """Raise this process's own limit of open files as far as is needed and allowed, where there is one.

    Args:
        number: how many inputs and outputs are open at once.
    """
    try:
        import resource
    except ImportError:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = number + 256  # libraries, and what the caller has open
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


class Sources(list[Opened]):
    """Opened inputs; and what the threads that read them make of them once for all."""

    def __init__(self, opened: Iterable[Opened]) -> None:
        super().__init__(opened)
        self.shared = new_shared()
        disks: dict[int, Pace] = {}
        self.paces = [disks.setdefault(os.fstat(fd).st_dev, Pace()) if isinstance(fd, int) else None for fd in self]
        """Of each that is a file: how its disk keeps up."""


class Pace:
    """How a disk keeps up with all threads.

    Attributes:
        waits: whether reads were seen to wait for it. That stays so, for what is asked for in advance is read fast.
    """

    def __init__(self) -> None:
        self.waits = False
        self._slow = 0  # reads in a row

    def took(self, seconds: float, nbytes: int) -> None:
        """Take account of a read; of small ones nothing is learned. One slow read says little: other processes may have
        had the processor meanwhile.
        """
        if not self.waits and nbytes >= _WORTH_TIMING:
            self._slow = self._slow + 1 if seconds * _WAITING > nbytes else 0
            self.waits = self._slow >= _IN_A_ROW


_WORTH_TIMING = 128 * 1024  # bytes
_WAITING = 300e6  # bytes per second of one thread: memory gives ten times as much
_IN_A_ROW = 6


def new_shared() -> Kept[torch.Tensor]:
    """Where threads keep what all of them need: norms, and factors put in another order."""
    return Kept(_MOST_SHARED)


_MOST_SHARED = 4  # of a batch's factors each is as large as its file says


def with_views(fds: Sequence[Opened], views: Sequence[Views]) -> Sources:
    """The same inputs, to be read with the views that are in them."""
    each = zip(fds, views, strict=True)
    return Sources(FileWithViews(fd, of_file) if of_file and isinstance(fd, int) else fd for fd, of_file in each)


def read_input(source: Opened, view: memoryview, offset: int) -> int:
    return read_into(source, view, offset) if isinstance(source, int) else source.read_into(view, offset)
