"""What a run has finished, line by line, so that another can go on from there after it was killed.

Line 1 says which run it is: whatever decides a byte of the output. Then come what was measured, and every part of a
file that was written, with the digests of its blocks. Lines are appended as things are done and are not flushed: after
a power cut the file may say more than the disk holds, which is why the blocks are held against their digests before
anything is built on them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Told = dict[str, Any]
"""What JSON can hold."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an output file that was written.

    Attributes:
        file: the file's number.
        start: where in it the part begins, in bytes; a multiple of the digest's block.
        blocks: the SHA-256 digest of each of its blocks.
        told: what the run has to tell of it.
    """

    file: int
    start: int
    blocks: tuple[bytes, ...]
    told: Told


@dataclass(frozen=True, slots=True)
class Story:
    """What a journal holds.

    Attributes:
        run: which run it is.
        measured: what was measured; None if that was not finished.
        parts: what was written.
        nbytes: how much of the file can be read; the last line may be cut short.
    """

    run: Told
    measured: Told | None
    parts: tuple[Part, ...]
    nbytes: int


class Journal:
    """A journal that is being written.

    Args:
        path: the file.
        run: which run it is, for a new one; None appends to what is there.
        keep: of an old one, its first so many bytes.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, path: Path, run: Told | None = None, *, keep: int = 0) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0), 0o666)
        os.ftruncate(self._fd, keep)
        self.empty = True
        """Whether there is nothing in it that would be worth going on from."""
        if run is not None:
            self._append({"run": run})

    def measured(self, told: Told) -> None:
        """What was measured."""
        self._append({"measured": told})
        self.empty = False

    def wrote(self, part: Part) -> None:
        """A part that was written."""
        blocks = [block.hex() for block in part.blocks]
        self._append(
            {"file": part.file, "start": part.start, "blocks": blocks, **({"told": part.told} if part.told else {})}
        )
        self.empty = False

    def _append(self, line: Mapping[str, Any]) -> None:
        left = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        while left:
            left = left[os.write(self._fd, left) :]

    def close(self) -> None:
        """Close it; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_journal(path: Path) -> Story | None:
    """What a journal holds, as far as it can be read; None if there is none, or not even its first line is whole.

    Raises:
        OSError: it cannot be read.
    """
    run, measured, parts, nbytes = None, None, dict[tuple[int, int], Part](), 0
    try:
        for line, end in _lines(path):
            if run is None:
                run = dict(line["run"])
            elif "measured" in line:
                measured = dict(line["measured"])
            else:
                blocks = tuple(bytes.fromhex(block) for block in line["blocks"])
                part = Part(int(line["file"]), int(line["start"]), blocks, dict(line.get("told", {})))
                parts[part.file, part.start] = part  # the last word counts: one may have been made again
            nbytes = end
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass  # cut short, or damaged: what comes before it holds
    return None if run is None else Story(run, measured, tuple(parts.values()), nbytes)


def _lines(path: Path) -> Iterator[tuple[Any, int]]:
    """Each whole line's value, and where the line ends."""
    end = 0
    with open(path, "rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                return
            end += len(line)
            yield json.loads(line), end
