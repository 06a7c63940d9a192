"""What the parts of a divided run have done: one file for each, in a folder beside the output in the making.

A record is written under a name of its own, flushed, and then given the part's name, in one step. The first to come
stays: two processes that do the same part harm nothing, and whoever reads a record reads a whole one. Lines are those
of a journal (`storage/journal`).
"""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lines_cli.storage.destination import sync_folder
from lines_cli.storage.files import read_small
from lines_cli.storage.journal import Json, WrittenRange, whole_lines, written_line

ROOM = "parts"
"""The folder that they lie in, in the staging folder."""
PLAN, MEASURED = "plan", "measured"
"""Records of their own: which plan the parts are of; and what all measuring parts have found, in the end."""

_NAME = re.compile(r"(?:plan|measured|sample|\d{1,9}(?:-\d{1,9})?)(?:\.[0-9a-f]{16})?")
_LARGEST = 2**30  # bytes


def is_record(name: str) -> bool:
    """Whether a file in the folder could be one of ours, by its name: a record, or one in the making."""
    return _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class Records:
    """The records of one plan.

    Attributes:
        folder: where they are.
        plan: the digest of the plan.
    """

    folder: Path
    plan: str

    def read(self, name: str) -> list[Json] | None:
        """The lines of a record; None if there is none, it is damaged, or another plan's.

        Raises:
            OSError: it cannot be read.
        """
        return _read(self.folder / name, self.plan)

    def is_there(self, name: str) -> bool:
        """Whether there is such a record, and it is whole."""
        return self.read(name) is not None

    def write(self, name: str, lines: Iterable[Json]) -> None:
        """Write a record, unless there is one: that stays, as others may have read it.

        Raises:
            OSError: it cannot be written.
        """
        with self.open(name) as (add, keep):
            for line in lines:
                add(line)
            keep()

    def open(self, name: str) -> RecordInTheMaking:
        """The same, line by line."""
        return RecordInTheMaking(self, name)

    def begin(self) -> None:
        """Say which plan these are of.

        Raises:
            OSError: it cannot be written.
        """
        self.folder.mkdir(exist_ok=True)
        self.write(PLAN, ())
        sync_folder(self.folder.parent)


class RecordInTheMaking:
    """A record that is being written. Leaving the `with` block without `keep` removes what there is of it."""

    def __init__(self, records: Records, name: str) -> None:
        self._records, self._name = records, name
        self._path = records.folder / f"{name}.{secrets.token_hex(8)}"
        self._fd, self._lines = -1, 0

    def __enter__(self) -> tuple[Callable[[Json], None], Callable[[], None]]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._fd = os.open(self._path, flags, 0o666)
        self.add({"plan": self._records.plan, "record": self._name})
        return self.add, self.keep

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        with suppress(OSError):
            self._path.unlink(missing_ok=True)

    def add(self, line: Json) -> None:
        """A line more."""
        left = written_line(line)
        while left:
            left = left[os.write(self._fd, left) :]
        self._lines += 1

    def keep(self) -> None:
        """That is all: from now on it counts, unless another came first."""
        self.add({"lines": self._lines})
        os.fsync(self._fd)
        target = self._records.folder / self._name
        try:
            os.link(self._path, target)
        except FileExistsError:
            if not self._records.is_there(self._name):  # damaged, or of another plan
                os.replace(self._path, target)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
                raise
            os.replace(self._path, target)  # a filesystem without second names
        sync_folder(self._records.folder)


def _read(path: Path, plan: str | None) -> list[Json] | None:
    try:
        content = read_small(path, _LARGEST, follow=False)
    except FileNotFoundError:
        return None
    lines: list[Json] = []
    with suppress(ValueError, RecursionError):
        lines = [line for line, _ in whole_lines(content)]
    if len(lines) < 2 or lines[-1].get("lines") != len(lines) - 1 or lines[0].get("record") != path.name:
        return None
    return lines[1:-1] if plan is None or lines[0].get("plan") == plan else None


def plan_of(folder: Path) -> str | None:
    """The digest of the plan whose parts lie in a folder; None where there are none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        content = read_small(folder / PLAN, _LARGEST, follow=False)
    except FileNotFoundError:
        return None
    with suppress(ValueError, RecursionError):
        for line, _ in whole_lines(content):
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
    """

    written: tuple[WrittenRange, ...] = ()
    measured: Json | None = None
    unchanged: frozenset[int] | None = None


def done_in(folder: Path) -> PartsDone:
    """What the records in a folder say.

    Raises:
        OSError: it cannot be read.
    """
    plan = plan_of(folder)
    if plan is None:
        return PartsDone()
    found: dict[tuple[int, int], WrittenRange] = {}
    unchanged: frozenset[int] | None = None
    for name in sorted(os.listdir(folder)):
        lines = (_read(folder / name, plan) if name.isdigit() else None) or ()
        for part in _ranges(lines):
            found[part.file, part.start] = part
        for line in lines:
            if isinstance(line.get("unchanged"), list):
                own = frozenset(number for number in line["unchanged"] if type(number) is int)
                unchanged = own if unchanged is None else unchanged & own
    measured = _read(folder / MEASURED, plan)
    return PartsDone(tuple(found[key] for key in sorted(found)), measured[0] if measured else None, unchanged)


def _ranges(lines: Sequence[Json]) -> Iterator[WrittenRange]:
    for line in lines:
        with suppress(KeyError, TypeError, ValueError):  # no record of ours
            if "blocks" in line:
                blocks = tuple(bytes.fromhex(block) for block in line["blocks"])
                yield WrittenRange(int(line["file"]), int(line["start"]), blocks, dict(line.get("told", {})))
