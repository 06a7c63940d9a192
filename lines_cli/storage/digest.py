"""What a file held when it was written, as a line of text, so that one can check later whether it still does.

A *tree digest* is the SHA-256 of the SHA-256 digests of a file's consecutive blocks, the last of which may be short.
Its blocks can be hashed by several threads and in any order, each on its way to the file; a plain digest of a large
file would be one thread's work after all else is done.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from lines_cli.errors import CheckpointError
from lines_cli.storage.beside import leads_out, outside
from lines_cli.storage.files import open_regular, read_into

DIGEST_BLOCK = 4 * 2**20
"""Bytes of a block."""

WRITE_SIZE = 2**20
"""Bytes that are written at a time: enough for a disk, and still in the core's cache when they are hashed."""

DIGEST_BLOCKS_ON_CUDA = 8
"""Blocks of a file that a worker makes in one go there, where chunks are larger; else one."""

_KIND = "sha256-tree-4MiB:"  # names the algorithm and the block: another of either is another kind
_READ = 2**18  # bytes that are read back at a time
_THREADS = 4


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What was written into a file: how many bytes, and their tree digest."""

    nbytes: int
    digest: str


def record_of(content: bytes) -> FileRecord:
    """The record of a file whose content is in memory."""
    view = memoryview(content)
    blocks = (sha256(view[start : start + DIGEST_BLOCK]).digest() for start in range(0, len(view), DIGEST_BLOCK))
    return FileRecord(len(content), tree_digest(blocks))


def is_step(step: Any) -> bool:
    """Whether that many bytes of a file may be written, or compared, at a time."""
    return type(step) is int and step in (DIGEST_BLOCK, DIGEST_BLOCK * DIGEST_BLOCKS_ON_CUDA)


def is_part(file: Any, start: Any, blocks: Sequence[bytes], sizes: Sequence[int], step: int) -> bool:
    """Whether what a journal calls a part is one: of which of the files of these sizes, its start, its digests."""
    if not (type(file) is type(start) is int and 0 <= file < len(sizes) and 0 <= start < sizes[file]):
        return False
    whole = len(blocks) == -(-min(step, sizes[file] - start) // DIGEST_BLOCK)
    return start % step == 0 and whole and all(len(block) == sha256().digest_size for block in blocks)


def file_digest(path: Path) -> str:
    """The tree digest of a file on disk, read in bounded memory.

    Raises:
        OSError: it cannot be read.
    """
    return tree_digest(_digests(path, range(0, path.stat().st_size, DIGEST_BLOCK)))


def intact(path: Path, blocks: Mapping[int, bytes]) -> set[int]:
    """Which blocks of a file on disk are what they should be.

    Args:
        path: the file.
        blocks: where a block begins -> its digest.

    Raises:
        OSError: it cannot be read.
    """
    found = _digests(path, blocks)
    return {start for start, digest in zip(blocks, found, strict=True) if digest == blocks[start]}


def _digests(path: Path, starts: Iterable[int]) -> list[bytes]:
    """The digests of the blocks that begin there."""
    fd = open_regular(path)
    try:
        nbytes = os.fstat(fd).st_size
        # hashlib lets other threads run.
        with ThreadPoolExecutor(_THREADS) as pool:
            return list(pool.map(lambda start: _of_block(fd, start, nbytes), starts))
    finally:
        os.close(fd)


class GrowingDigest:
    """The tree digest of a file whose blocks are written by several threads, in whatever order.

    Args:
        nbytes: the file's size in the end.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._blocks = [b""] * -(-nbytes // DIGEST_BLOCK)

    def wrote(self, start: int, digest: bytes) -> None:
        """Take account of the block from `start` on, which has been written, and of its digest."""
        self._blocks[start // DIGEST_BLOCK] = digest

    def blocks(self, start: int, end: int) -> tuple[bytes, ...]:
        """The digests of the blocks from `start`, where one begins, up to `end`."""
        return tuple(self._blocks[start // DIGEST_BLOCK : -(-end // DIGEST_BLOCK)])

    def record(self) -> FileRecord:
        """What was written, when all of it is."""
        assert all(self._blocks), "a block was not written"
        return FileRecord(self._nbytes, tree_digest(self._blocks))


class Written(Protocol):
    """What a file's content is given to, piece by piece: a new file; or one that is there already, to be compared."""

    def write(self, view: memoryview, offset: int) -> None:
        """Take these bytes, which belong at `offset`."""


class RangeWriter:
    """Writes part of a file, from the start of a block on, front to back, in pieces that are hashed while they are in
    the core's cache.

    Args:
        file: the file.
        start: where to begin, a multiple of BLOCK.
        digest: of the whole file.
        piece: room for a piece, from `in_whole_pages`; BLOCK is a multiple of its size.
    """

    def __init__(self, file: Written, start: int, digest: GrowingDigest, piece: memoryview) -> None:
        self._file, self._digest, self._piece = file, digest, piece
        self._written, self._waiting = start, 0
        self._hash = sha256()

    @property
    def at(self) -> int:
        """Where in the file the next byte goes."""
        return self._written + self._waiting

    def write(self, view: memoryview | bytes) -> None:
        """Put these bytes next."""
        view = memoryview(view)
        while view:
            taken = min(len(view), len(self._piece) - self._waiting)
            self._piece[self._waiting : self._waiting + taken] = view[:taken]
            self._waiting += taken
            view = view[taken:]
            if self._waiting == len(self._piece):
                self._flush()

    def close(self) -> None:
        """Write what is left."""
        if self._waiting:
            self._flush()
        if self._written % DIGEST_BLOCK:
            self._end_block()

    def _flush(self) -> None:
        piece = self._piece[: self._waiting]
        self._hash.update(piece)
        self._file.write(piece, self._written)
        self._written += self._waiting
        self._waiting = 0
        if self._written % DIGEST_BLOCK == 0:
            self._end_block()

    def _end_block(self) -> None:
        self._digest.wrote((self._written - 1) // DIGEST_BLOCK * DIGEST_BLOCK, self._hash.digest())
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
                hint="A record lists only files in its own folder: do not trust this one.",
            )
    found = {name: _difference(folder / name, written) for name, written in files.items()}
    return {
        # Of a file elsewhere nothing is said, neither its size nor its digest.
        name: difference if outside(folder, name) is None else "is a link that leaves the folder, to something else"
        for name, difference in found.items()
        if difference is not None
    }


def _difference(path: Path, written: FileRecord) -> str | None:
    try:
        there = path.stat()
        if not stat.S_ISREG(there.st_mode):
            return "is not a file"
        if there.st_size != written.nbytes:
            return f"holds {there.st_size:,} bytes, but {written.nbytes:,} were written"
        if not written.digest.startswith(_KIND):
            return f"cannot be compared: {written.digest!r} is not a digest of the kind {_KIND.rstrip(':')}"
        digest = file_digest(path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}", hint="Check that you may read it."
        ) from error
    return None if digest == written.digest else f"holds {digest}, {written.digest} was written"


def _of_block(fd: int, start: int, nbytes: int) -> bytes:
    """The digest of the block that begins at `start` in a file of `nbytes`."""
    digest, end = sha256(), min(start + DIGEST_BLOCK, nbytes)
    buffer = memoryview(bytearray(max(0, min(_READ, end - start))))
    for offset in range(start, end, _READ):
        piece = buffer[: end - offset]
        digest.update(piece[: read_into(fd, piece, offset)])
    return digest.digest()


def tree_digest(blocks: Iterable[bytes]) -> str:
    """The digest of a file, of the digests of its blocks."""
    return _KIND + sha256(b"".join(blocks)).hexdigest()
