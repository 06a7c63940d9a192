"""What the parts of a divided run have done: a record for each, beside the output in the making. On a disk it is a
file, in an object store an object.

A record appears whole, in one step. The first to come stays: two processes that do the same part harm nothing, and
whoever reads a record reads a whole one. Lines are those of a journal (`storage/journal`).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lines_cli.storage.destination import sync_folder
from lines_cli.storage.files import read_small
from lines_cli.storage.journal import Json, WrittenRange, range_of, whole_lines, written_line
from lines_cli.storage.object_store import asked_of_the_store, content_if_there, listed, put_content

ROOM = "parts"
"""The folder that they lie in, in the staging folder."""
PLAN, MEASURED = "plan", "measured"
"""Records of their own: which plan the parts are of; and what all measuring parts have found, in the end."""

_NAME = re.compile(r"(?:plan|measured|sample|\d{1,9}(?:-\d{1,9})?)(?:\.[0-9a-f]{16})?")
_LARGEST = 2**30  # bytes of a record
_THREADS = 4


def is_record(name: str) -> bool:
    """Whether a file in the folder could be one of ours, by its name: a record, or one in the making."""
    return _NAME.fullmatch(name) is not None


def in_the_making(name: str) -> str:
    """A name for what is to become a record; nobody else's."""
    return f"{name}.{secrets.token_hex(8)}"


class Shelf(Protocol):
    """Where records lie.

    Attributes:
        folder: where that is, for messages.
    """

    folder: Path

    def begin(self) -> None:
        """Make room for them."""

    def read(self, name: str) -> bytes | None:
        """One; None where there is none."""

    def names(self) -> list[str]:
        """The names of all that lies there."""

    def put(self, name: str, content: bytes, counts: Callable[[], bool]) -> None:
        """Put one there, whole, in one step; but one that is there stays, if it `counts`."""


class FolderShelf:
    """A folder of records: each is written under a name of its own, flushed, and then given its name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def begin(self) -> None:
        """Make room for them."""
        self.folder.mkdir(exist_ok=True)
        sync_folder(self.folder.parent)

    def read(self, name: str) -> bytes | None:
        """One; None where there is none."""
        try:
            return read_small(self.folder / name, _LARGEST, follow=False)
        except FileNotFoundError:
            return None

    def names(self) -> list[str]:
        """The names of all that lies there."""
        return os.listdir(self.folder)

    def put(self, name: str, content: bytes, counts: Callable[[], bool]) -> None:
        """Put one there, whole, in one step; but one that is there stays, if it `counts`."""
        made, target = self.folder / in_the_making(name), self.folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        try:
            with open(os.open(made, flags, 0o666), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(made, target)
            except FileExistsError:
                if not counts():
                    os.replace(made, target)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                    raise
                os.replace(made, target)  # a filesystem without second names
        finally:
            with suppress(OSError):
                made.unlink(missing_ok=True)
        sync_folder(self.folder)


class ObjectShelf:
    """Records below a URL: each an object, which appears whole.

    Args:
        folder: where.
        before: is called before one is put there; if it raises, none is.
    """

    def __init__(self, folder: Path, before: Callable[[], None] = lambda: None) -> None:
        self.folder, self._before = folder, before

    def begin(self) -> None:
        """Make room for them: a store has always some."""

    def read(self, name: str) -> bytes | None:
        """One; None where there is none."""
        with asked_of_the_store():
            return content_if_there(f"{self.folder}/{name}", _LARGEST)

    def names(self) -> list[str]:
        """The names of all that lies there."""
        with asked_of_the_store():
            return list(listed(str(self.folder)))

    def put(self, name: str, content: bytes, counts: Callable[[], bool]) -> None:
        """Put one there, whole, in one step; but one that is there stays, if it `counts`."""
        self._before()
        url = f"{self.folder}/{name}"
        with asked_of_the_store():
            if not put_content(url, content, new=True) and not counts():
                put_content(url, content)


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one plan.

    Attributes:
        shelf: where they are.
        plan: the digest of the plan.
    """

    shelf: Shelf
    plan: str

    def read(self, name: str) -> list[Json] | None:
        """The lines of a record; None if there is none, it is damaged, or another plan's.

        Raises:
            OSError: it cannot be read.
        """
        return _read(self.shelf, name, self.plan)

    def is_there(self, name: str) -> bool:
        """Whether there is such a record, and it is whole."""
        return self.read(name) is not None

    def write(self, name: str, lines: Iterable[Json], *, counts: Callable[[], bool] | None = None) -> None:
        """Write a record, unless there is one that counts: that stays, as others may have read it.

        Args:
            name: of the record.
            lines: that it is to hold.
            counts: whether one that is there does; unless said, if it is whole, and of this plan.

        Raises:
            OSError: it cannot be written.
        """
        own = list(lines)
        whole = [{"plan": self.plan, "record": name}, *own, {"lines": len(own) + 1}]
        self.shelf.put(name, b"".join(map(written_line, whole)), counts or (lambda: self.is_there(name)))

    def begin(self) -> None:
        """Say which plan these are of.

        Raises:
            OSError: it cannot be written.
        """
        self.shelf.begin()
        self.write(PLAN, ())


def _read(shelf: Shelf, name: str, plan: str) -> list[Json] | None:
    content = shelf.read(name)
    if content is None:
        return None
    lines: list[Json] = []
    with suppress(ValueError, RecursionError):
        lines = [line for line, _ in whole_lines(content)]
    if len(lines) < 2 or lines[-1].get("lines") != len(lines) - 1 or lines[0].get("record") != name:
        return None
    return lines[1:-1] if lines[0].get("plan") == plan else None


def plan_of(shelf: Shelf) -> str | None:
    """The digest of the plan whose parts lie somewhere; None where there are none.

    Raises:
        OSError: it cannot be read.
    """
    with suppress(ValueError, RecursionError):
        for line, _ in whole_lines(shelf.read(PLAN) or b""):
            if isinstance(line.get("plan"), str):
                return str(line["plan"])
    return None


@dataclass(frozen=True, slots=True)
class PartsDone:
    """What all finished parts have done.

    Attributes:
        written: what they have written, in the order of the files.
        measured: what was measured, if all of that was.
        unchanged: as of `JournalContents`.
        stored: in an object store: of each file its object, as it was when its part was done.
    """

    written: tuple[WrittenRange, ...] = ()
    measured: Json | None = None
    unchanged: frozenset[int] | None = None
    stored: dict[int, tuple[int, int, str]] = field(default_factory=dict)


def done_in(shelf: Shelf) -> PartsDone:
    """What the records say.

    Raises:
        OSError: one cannot be read.
    """
    plan = plan_of(shelf)
    if plan is None:
        return PartsDone()
    found: dict[tuple[int, int], WrittenRange] = {}
    unchanged: frozenset[int] | None = None
    stored: dict[int, tuple[int, int, str]] = {}
    numbers = sorted(name for name in shelf.names() if name.isdigit())
    with ThreadPoolExecutor(_THREADS) as pool:
        records = list(pool.map(lambda name: _read(shelf, name, plan) or (), numbers))
    for lines in records:
        for part in _ranges(lines):
            found[part.file, part.start] = part
        stored |= stored_in(lines)
        for line in lines:
            if isinstance(line.get("unchanged"), list):
                own = frozenset(number for number in line["unchanged"] if type(number) is int)
                unchanged = own if unchanged is None else unchanged & own
    measured = _read(shelf, MEASURED, plan)
    written = tuple(found[key] for key in sorted(found))
    return PartsDone(written, measured[0] if measured else None, unchanged, stored)


def stored_in(lines: Sequence[Json]) -> dict[int, tuple[int, int, str]]:
    """What a record says of the objects that its part has made, by the numbers of their files."""
    found = {}
    for line in lines:
        with suppress(KeyError, TypeError, ValueError):
            if "stored" in line:
                nbytes, mtime, tag = line["stored"]
                found[int(line["object"])] = (int(nbytes), int(mtime), str(tag))
    return found


def _ranges(lines: Sequence[Json]) -> Iterator[WrittenRange]:
    for line in lines:
        with suppress(KeyError, TypeError, ValueError, AttributeError, OverflowError):  # no record of ours
            if "blocks" in line:
                yield range_of(line)
