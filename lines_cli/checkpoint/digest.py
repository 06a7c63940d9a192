"""What a file held when it was written, as a line of text, so that it can be told later whether it still does.

A *tree digest* is the SHA-256 of the SHA-256 digests of a file's consecutive blocks, the last of which may be short.
Its blocks can be hashed by several threads and in any order, each on its way to the file; a plain digest of a large
file would be one thread's work after all else is done.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lines_cli.checkpoint.positional import read_into, start_writeback, write_from
from lines_cli.checkpoint.reader import leads_out
from lines_cli.errors import CheckpointError

BLOCK = 4 * 2**20
"""Bytes of a block."""

_KIND = "sha256-tree-4MiB:"  # names the algorithm and the block: another of either is another kind
_PIECE = 2**18  # bytes at a time, so that they are in the core's cache when they are hashed
_THREADS = 4


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What was written into a file: how many bytes, and their tree digest."""

    nbytes: int
    digest: str


def record_of(content: bytes) -> FileRecord:
    """The record of a file whose content is in memory."""
    view = memoryview(content)
    blocks = (sha256(view[start : start + BLOCK]).digest() for start in range(0, len(view), BLOCK))
    return FileRecord(len(content), _root(blocks))


def file_digest(path: Path) -> str:
    """The tree digest of a file on disk, read in bounded memory.

    Raises:
        OSError: it cannot be read.
    """
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    try:
        nbytes = os.fstat(fd).st_size
        # hashlib lets other threads run.
        with ThreadPoolExecutor(_THREADS) as pool:
            return _root(pool.map(lambda start: _of_block(fd, start, nbytes), range(0, nbytes, BLOCK)))
    finally:
        os.close(fd)


class GrowingDigest:
    """The tree digest of a file whose blocks are written by several threads, in whatever order.

    Args:
        nbytes: the file's size in the end.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._blocks = [b""] * -(-nbytes // BLOCK)

    def wrote(self, start: int, digest: bytes) -> None:
        """Take account of the block from `start` on, which has been written, and of its digest."""
        self._blocks[start // BLOCK] = digest

    def record(self) -> FileRecord:
        """What was written, when all of it is."""
        assert all(self._blocks), "a block was not written"
        return FileRecord(self._nbytes, _root(self._blocks))


class RangeWriter:
    """Writes part of a file, from the start of a block on, front to back, and hashes it on its way, while it is in the
    core's cache.

    Args:
        fd: the file.
        start: where to begin, a multiple of BLOCK.
        digest: of the whole file; None where none is taken.
    """

    def __init__(self, fd: int, start: int, digest: GrowingDigest | None) -> None:
        self._fd, self._start, self._digest = fd, start, digest
        self._at = start
        self._waiting = bytearray()  # small tensors, to be written together
        self._hash = sha256()

    @property
    def at(self) -> int:
        """Where in the file the next byte goes."""
        return self._at + len(self._waiting)

    def write(self, view: memoryview | bytes) -> None:
        """Put these bytes next."""
        if len(view) < _PIECE:
            self._waiting += view
            if len(self._waiting) >= _PIECE:
                self._flush()
        else:
            self._flush()
            self._put(memoryview(view))

    def close(self) -> None:
        """Write what is left, and have the system begin to move all of it to the disk."""
        self._flush()
        if self._at % BLOCK:
            self._end_block()
        start_writeback(self._fd, self._start, self._at - self._start)

    def _flush(self) -> None:
        if self._waiting:
            self._put(memoryview(self._waiting))
            self._waiting = bytearray()

    def _put(self, view: memoryview) -> None:
        write_from(self._fd, view, self._at)
        if self._digest is None:
            self._at += len(view)
            return
        while view:
            part = view[: BLOCK - self._at % BLOCK]
            self._hash.update(part)
            self._at += len(part)
            view = view[len(part) :]
            if self._at % BLOCK == 0:
                self._end_block()

    def _end_block(self) -> None:
        if self._digest is not None:
            self._digest.wrote((self._at - 1) // BLOCK * BLOCK, self._hash.digest())
            self._hash = sha256()


def altered(folder: Path, files: Mapping[str, FileRecord]) -> dict[str, str]:
    """Which files are no longer what was written, each with what differs, in words; empty where all are.

    Args:
        folder: where they were written.
        files: what was recorded, by names relative to the folder. They may be a stranger's.

    Raises:
        CheckpointError: a file cannot be read, or a name leads out of the folder.
    """
    for name in files:
        if leads_out(name):
            raise CheckpointError(
                f"{folder}: a file is recorded as {name!r}, which is outside the folder",
                hint="Recorded are the files of the folder itself: do not trust this record.",
            )
    found = {name: _difference(folder / name, written) for name, written in files.items()}
    return {name: difference for name, difference in found.items() if difference is not None}


def _difference(path: Path, written: FileRecord) -> str | None:
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):
            return "is not a file"
        if there.st_size != written.nbytes:
            return f"holds {there.st_size:,} bytes, {written.nbytes:,} were written"
        if not written.digest.startswith(_KIND):
            return f"cannot be compared: {written.digest!r} is no digest of the kind {_KIND.rstrip(':')}"
        digest = file_digest(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint="May you read it?") from error
    return None if digest == written.digest else f"holds {digest}, {written.digest} was written"


def _of_block(fd: int, start: int, nbytes: int) -> bytes:
    """The digest of the block that begins at `start` in a file of `nbytes`."""
    digest, end = sha256(), min(start + BLOCK, nbytes)
    buffer = memoryview(bytearray(min(_PIECE, end - start)))
    for offset in range(start, end, _PIECE):
        piece = buffer[: end - offset]
        digest.update(piece[: read_into(fd, piece, offset)])
    return digest.digest()


def _root(blocks: Iterable[bytes]) -> str:
    return _KIND + sha256(b"".join(blocks)).hexdigest()
