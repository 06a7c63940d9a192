"""What a file held when it was written, as a line of text, so that it can be told later whether it still does.

A *tree digest* is the SHA-256 of the SHA-256 digests of a file's consecutive blocks, the last of which may be short.
Its blocks can be hashed by several threads and in any order, each while it is in the page cache; a plain digest of a
large file would be one thread's work after all else is done.
"""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from lines_cli.checkpoint.positional import read_into
from lines_cli.checkpoint.reader import leads_out
from lines_cli.errors import CheckpointError

BLOCK = 4 * 2**20
"""Bytes of a block."""

_KIND = "sha256-tree-4MiB:"  # names the algorithm and the block: another of either is another kind
_PIECE = 2**18  # bytes read at a time, so that they are in the core's cache when they are hashed
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
    """The tree digest of a file that several threads are writing, each range of it in whatever order.

    Every byte is written exactly once, so a block is whole when as many bytes of it were written as it has. It is then
    read back, out of the page cache, and hashed by the thread that completed it.

    Args:
        fd: the file, open for reading, too.
        nbytes: its size in the end.
    """

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd, self._nbytes = fd, nbytes
        self._missing = [min(BLOCK, nbytes - start) for start in range(0, nbytes, BLOCK)]
        self._digests = [b""] * len(self._missing)
        self._counting = threading.Lock()

    def wrote(self, start: int, end: int) -> None:
        """Take account of the bytes from `start` up to `end`, which have been written.

        Raises:
            OSError: they cannot be read back.
        """
        whole = []
        with self._counting:
            for block in range(start // BLOCK, -(-end // BLOCK)):
                self._missing[block] -= min(end, (block + 1) * BLOCK) - max(start, block * BLOCK)
                assert self._missing[block] >= 0, "a byte was written twice"
                if not self._missing[block]:
                    whole.append(block)
        for block in whole:
            self._digests[block] = _of_block(self._fd, block * BLOCK, self._nbytes)

    def record(self) -> FileRecord:
        """What was written, when all of it is."""
        assert not any(self._missing), "a byte was not written"
        return FileRecord(self._nbytes, _root(self._digests))


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
