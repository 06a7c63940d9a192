"""Asks the system for what is read next, where reads wait for the disk.

Of each file the system itself reads ahead a window, 128 to 256 KiB as a rule: one or two requests, where a disk behind
a network wants dozens at a time. What is asked for goes into the page cache while threads compute; no buffer is taken
for it. Where reads do not wait, nothing is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from lines_cli.checkpoint.header import itemsize
from lines_cli.engine.chunks import Chunk
from lines_cli.engine.input_files import Opened, Sources
from lines_cli.plan.tensors import SourceRange
from lines_cli.storage.files import ask_for

Item = TypeVar("Item")

AHEAD = 32 * 2**20
"""Bytes that are asked for before a thread takes them: at 3 ms for each request, what 10 GB/s want."""


@runtime_checkable
class _HasChunks(Protocol):
    """A range of the output."""

    chunks: Sequence[Chunk[Any]]


class ReadAhead(Generic[Item]):
    """Items of work, in order. Of those that nobody has taken yet the first were asked for, once reads wait.

    Args:
        items: lists of chunks, or what has `chunks`; nothing is asked for others.
    """

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = enumerate(items)
        self._asked: deque[tuple[tuple[int, Item], int]] = deque()
        self._ahead = 0  # bytes of them

    def take(self, sources: Sequence[Opened]) -> tuple[int, Item] | None:
        """The next item with its number; None at the end. One thread at a time.

        Args:
            sources: the opened inputs.
        """
        waiting = _waiting(sources)
        while waiting and self._ahead < AHEAD and (item := next(self._items, None)) is not None:
            nbytes = _ask_for_all(_chunks_of(item[1]), waiting)
            self._asked.append((item, nbytes))
            if not nbytes:
                break
            self._ahead += nbytes
        if not self._asked:
            return next(self._items, None)
        item, nbytes = self._asked.popleft()
        self._ahead -= nbytes
        return item


def _chunks_of(item: object) -> Iterator[Chunk[Any]]:
    chunks = item.chunks if isinstance(item, _HasChunks) else item
    return (chunk for chunk in chunks if isinstance(chunk, Chunk)) if isinstance(chunks, (list, tuple)) else iter(())


def _waiting(sources: Sequence[Opened]) -> dict[int, int]:
    """The inputs that lie on disks that are waited for: their numbers, and the open files."""
    paces = sources.paces if isinstance(sources, Sources) else []
    each = enumerate(zip(paces, sources, strict=False))
    return {n: fd for n, (pace, fd) in each if isinstance(fd, int) and pace is not None and pace.waits}


def _ask_for_all(chunks: Iterable[Chunk[Any]], files: Mapping[int, int]) -> int:
    """Ask for the bytes of chunks in some inputs, given their numbers and open files; how many bytes these are."""
    runs: dict[int, list[list[int]]] = {}  # of each file: starts and ends, in the order of the chunks
    for chunk in chunks:
        for source in chunk.segment.sources:
            for file, start, end in _stored(source, chunk.first, chunk.numel):
                if file not in files:
                    continue
                of_file = runs.setdefault(file, [])
                if of_file and of_file[-1][1] == start:
                    of_file[-1][1] = end
                else:
                    of_file.append([start, end])
    asked = 0
    for file, of_file in runs.items():
        for start, end in of_file:
            ask_for(files[file], start, end - start)
            asked += end - start
    return asked


def _stored(source: SourceRange, first: int, numel: int) -> Iterator[tuple[int, int, int]]:
    """Where entries of a range are: files, first bytes and ends. Gathered rows and turned matrices are left out."""
    width = itemsize(source.dtype)
    if source.gathered is not None:
        return
    if not source.parts:
        yield source.file, source.offset + first * width, source.offset + (first + numel) * width
    for part in source.parts:
        begin, end = max(first, part.start), min(first + numel, part.start + part.numel)
        if part.strides == (1,) and begin < end:
            offset = part.offset - part.start * width
            yield part.file, offset + begin * width, offset + end * width
