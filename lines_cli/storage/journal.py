"""What a run has finished, line by line, so that another can go on from there after it was killed.

Each line is JSON and carries a checksum. The first says which run it is: whatever decides a byte of its output. Then
come the files that it makes, what was measured, every part of a file that was written, with the digests of its blocks,
and that the output is about to be put into place. Lines are appended as things are done and are not flushed:
after a power cut the file may say more than the disk holds, which is why the blocks are held against their digests
before anything is built on them. The first line whose checksum is wrong ends the story.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

from lines_cli.storage.beside import leads_out
from lines_cli.storage.files import read_small

Json = dict[str, Any]
"""What JSON can hold."""

_FIRST = b'{"run":'  # what a journal begins with
_CHECK = b',"crc32":"'  # of all that stands before it in the line
_LARGEST = 2**30  # bytes: a terabyte of output has lines of some 30 MB


@dataclass(frozen=True, slots=True)
class WrittenRange:
    """A part of an output file that was written.

    Attributes:
        file: the file's number.
        start: where in it the part begins, in bytes; a multiple of the digest's block.
        blocks: the SHA-256 digest of each of its blocks.
        tally: what the run counted in it.
    """

    file: int
    start: int
    blocks: tuple[bytes, ...]
    tally: Json


@dataclass(frozen=True, slots=True)
class Publishing:
    """That an output was about to be put into place.

    Attributes:
        new: its device and inode.
        old: the names of what it replaces.
    """

    new: tuple[int, int]
    old: frozenset[str]


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What a journal holds.

    Attributes:
        run: which run it is.
        names: the files that it makes.
        replaces: what stood at the destination when it began: names, each with four numbers; None if it did not say.
        measured: what was measured; None if that was not finished.
        parts: what was written.
        publishing: the last time that it began to put its output into place; None if it did not.
        nbytes: how much of the file can be read; the last line may be cut short.
        settled: what parts of a divided run have written, each flushed before it said so; in the order of the files.
        unchanged: numbers of models in which all of these parts saw nothing but the base; None if none could see that.
    """

    run: Json
    names: frozenset[str]
    replaces: dict[str, tuple[int, int, int, int]] | None
    measured: Json | None
    parts: tuple[WrittenRange, ...]
    publishing: Publishing | None
    nbytes: int
    settled: tuple[WrittenRange, ...] = ()
    unchanged: frozenset[int] | None = None


class Journal:
    """A journal that is being written.

    Args:
        path: the file.
        names: the files that the run makes.
        run: which run it is, for a new one; None appends to what is there.
        keep: of an old one, its first so many bytes.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, names: Iterable[str], run: Json | None = None, *, keep: int = 0) -> None:
        kept = b""
        if keep and path.lstat().st_nlink > 1:  # a backup shares the file
            kept, keep = read_small(path, _LARGEST, follow=False)[:keep], 0
            path.unlink()
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | flags, 0o666)
        self.empty = True
        """Whether there is nothing in it that would be worth going on from."""
        try:
            os.ftruncate(self._fd, keep)
            self._write(kept)
            if run is not None:
                self._append({"run": run})
            self._append({"names": sorted(names)})
            os.fsync(self._fd)  # after a power cut, these lines say whose the folder is
        except BaseException:
            self.close()
            raise

    def replaces(self, there: Mapping[str, tuple[int, int, int, int]]) -> None:
        """What stands at the destination, and is to be replaced."""
        self._append({"replaces": {name: [*entry] for name, entry in there.items()}})

    def measured(self, tally: Json) -> None:
        """What was measured."""
        self._append({"measured": tally})
        self.empty = False

    def wrote(self, part: WrittenRange) -> None:
        """A part that was written."""
        self._append(line_of(part))
        self.empty = False

    def publishing(self, publishing: Publishing) -> None:
        """That the output is about to be put into place; on the disk before that is done."""
        self._append({"publishing": [*publishing.new], "old": sorted(publishing.old)})
        os.fsync(self._fd)

    def _append(self, line: Mapping[str, Any]) -> None:
        self._write(written_line(line))

    def _write(self, left: bytes) -> None:
        while left:
            left = left[os.write(self._fd, left) :]

    def close(self) -> None:
        """Close it; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def line_of(part: WrittenRange) -> Json:
    """A part that was written, as a line has it."""
    blocks = [block.hex() for block in part.blocks]
    return {"file": part.file, "start": part.start, "blocks": blocks, **({"told": part.tally} if part.tally else {})}


def range_of(line: Mapping[str, Any]) -> WrittenRange:
    """The same, read.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError: it is something else.
    """
    blocks = tuple(bytes.fromhex(block) for block in line["blocks"])
    return WrittenRange(int(line["file"]), int(line["start"]), blocks, dict(line.get("told", {})))


def written_line(line: Mapping[str, Any]) -> bytes:
    """A line of JSON with a checksum as its last key."""
    text = json.dumps(line, separators=(",", ":")).encode().removesuffix(b"}")
    return text + _CHECK + b'%08x"}\n' % crc32(text)


class NoJournalError(ValueError):
    """A file in a journal's place that `lines` has not written."""


def read_journal(path: Path) -> JournalContents | None:
    """What a journal holds, as far as it can be read; None if there is none, or it does not say which run it is.

    Raises:
        NoJournalError: it is something else.
        OSError: it cannot be read.
    """
    try:
        content = read_small(path, _LARGEST, follow=False)
    except FileNotFoundError:
        return None
    content = content.rstrip(b"\0")  # a power cut may leave its length without its lines
    if content[: len(_FIRST)] != _FIRST[: len(content)]:
        raise NoJournalError(path)
    run, measured, parts, publishing, replaces = None, None, dict[tuple[int, int], WrittenRange](), None, None
    names: set[str] = set()
    nbytes = 0
    try:
        for line, end in whole_lines(content):
            if run is None:
                run = dict(line["run"])
            elif "names" in line:
                names.update(_names(line["names"]))
            elif "replaces" in line:
                _names(line["replaces"])
                replaces = {name: (int(a), int(b), int(c), int(d)) for name, (a, b, c, d) in line["replaces"].items()}
            elif "measured" in line:
                measured = dict(line["measured"])
            elif "publishing" in line:
                device, inode = line["publishing"]
                publishing = Publishing((int(device), int(inode)), _names(line["old"]))
            else:
                part = range_of(line)
                parts[part.file, part.start] = part  # the last word counts: one may have been made again
            nbytes = end
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        pass  # cut short, or damaged: what comes before it holds
    return (
        None
        if run is None
        else JournalContents(run, frozenset(names), replaces, measured, tuple(parts.values()), publishing, nbytes)
    )


def _names(of: Iterable[Any]) -> frozenset[str]:
    """Names of files within a folder; the folder itself is ''.

    Raises:
        ValueError: one leads out of it, or is no name.
    """
    for name in of:
        if not isinstance(name, str) or (name and leads_out(name)) or "" in name.split("/")[1:]:
            raise ValueError(name)
        os.fsencode(name)
    return frozenset(of)


def whole_lines(content: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Each whole line's value, as long as checksums are right, and where the line ends.

    Raises:
        ValueError, RecursionError: what a line's checksum is of is not JSON.
    """
    end = 0
    while (stop := content.find(b"\n", end)) >= 0:
        text, check, rest = content[end:stop].rpartition(_CHECK)
        if not check or rest != b'%08x"}' % crc32(text):
            return
        end = stop + 1
        yield json.loads(text + b"}"), end
