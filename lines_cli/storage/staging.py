"""The output in the making: a hidden sibling of the destination, which only one run at a time may write, which outlives
a run that was killed, and which takes the destination's place in one step.

    .out.lines/
        lock       held by the run that writes
        journal    what it has finished
        new/       the output, taking shape; once it is in place, what it replaced
        old/       what `--force` replaces, for the moment between two renames, where the system cannot exchange folders
        moved/     `new` on its way to a folder that can be renamed
        parts/     what parts of a divided run have done (`storage/part_records`)

Nothing in it is removed, replaced or written to before it is seen to be ours: a folder with these names alone, whose
files are those that the journal names. What is replaced is removed file by file, by the names that it had when it was
looked at.
"""

from __future__ import annotations

import enum
import errno
import math
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TypeVar

from lines_cli.errors import OF_NO_USE, Aftermath, OutputError, as_argument, attach_aftermath, some
from lines_cli.storage.destination import (
    Entry,
    Survey,
    arrivals,
    is_noise,
    is_one_file,
    naming,
    refuse_to_replace,
    survey,
    sync_folder,
)
from lines_cli.storage.digest import DIGEST_BLOCK, file_digest, intact, is_part, is_step
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import (
    Journal,
    JournalContents,
    Json,
    NoJournalError,
    Publishing,
    WrittenRange,
    read_journal,
)
from lines_cli.storage.lock import NAME as LOCK
from lines_cli.storage.lock import RunLock, is_locked, refusal, remove_with
from lines_cli.storage.names import RECIPE
from lines_cli.storage.part_records import ROOM as _PARTS
from lines_cli.storage.part_records import FolderShelf, done_in, is_record
from lines_cli.storage.renames import exchange, move_folder, put

_JOURNAL, _OLD, _MOVED = "journal", "old", "moved"
NEW = "new"
"""The folder in which the output takes shape."""

_LONGEST_NAME = 240  # bytes, so that the whole fits into a file name
_PATIENCE = 1.0  # seconds for which a folder is looked at that changes all the time
_TICK = 0.02  # seconds after which a change shows in the times of a folder


def staging_of(output: Path) -> Path:
    """Where the output is built: beside the destination, or what that is a link to."""
    target = output.resolve()
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = (
            os.fsencode(name)[: _LONGEST_NAME - 17].decode(errors="ignore")
            + "-"
            + sha256(name.encode()).hexdigest()[:16]
        )
    return target.parent / f".{name}.lines"


# --- whose is it? ---


def ours(output: Path, names: Collection[str] | None = ()) -> JournalContents | None:
    """What the journal of a staging folder tells, once all that the folder holds is seen to be ours.

    Args:
        output: the destination, whose staging folder may be anything, or nothing.
        names: files that a run is about to make in it; None where they are not known yet, and a run will look again.

    Raises:
        OutputError: it is a link, or holds something that is not ours.
        OSError: it cannot be read.
    """
    folder = staging_of(output)
    try:
        there = folder.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISDIR(there.st_mode):
        what = "a symbolic link" if stat.S_ISLNK(there.st_mode) else "not a folder"
        raise OutputError(
            f"{folder} is {what}; lines keeps unfinished output in a folder of that name",
            hint="Move it away, or choose another destination with -o.",
        )
    if hasattr(os, "geteuid") and os.geteuid() not in (0, there.st_uid):
        raise OutputError(
            f"{folder} belongs to another user, and so does the unfinished output in it",
            hint=f"Ask them to finish or remove it ({_cleaning(output)}), or choose another destination with -o.",
        )
    try:
        contents = read_journal(folder / _JOURNAL)
    except NoJournalError:
        raise _foreign(folder, [_JOURNAL]) from None
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ELOOP):  # a link, a pipe, a folder
            raise _foreign(folder, [_JOURNAL]) from None
        raise
    if contents is None and not os.path.lexists(folder / _JOURNAL):
        names = ()  # no run of ours has come so far as to make a file there
    made, replaced = {*(names or ()), *(contents.names if contents else ())}, _replaced(contents)
    rooms = {NEW: (made, replaced), _OLD: ((), replaced), _MOVED: (made, ())}
    found = survey(folder)
    if not os.path.lexists(output.resolve()):  # what was set aside comes back, whatever it is
        found = {name: entry for name, entry in found.items() if not name.startswith(f"{_OLD}/")}
    if names is None and contents is None:
        found = {name: entry for name, entry in found.items() if not name.startswith((f"{NEW}/", f"{_MOVED}/"))}
    foreign = [name for name, entry in found.items() if not (_belongs(name, entry, rooms) or is_noise(name))]
    if foreign:
        raise _foreign(folder, sorted(foreign), damaged=contents is None and os.path.lexists(folder / _JOURNAL))
    if contents is not None:
        parts = done_in(FolderShelf(folder / _PARTS))
        measured = contents.measured or parts.measured
        contents = replace(contents, settled=parts.written, measured=measured, unchanged=parts.unchanged)
        if _is_published(contents, folder):  # then it holds what was replaced, under the same names
            contents = replace(contents, settled=(), parts=())
    return contents


def _belongs(name: str, entry: Entry, rooms: Mapping[str, tuple[Collection[str], Collection[str]]]) -> bool:
    """Whether what stands in a staging folder is ours.

    Args:
        name: relative to the folder.
        entry: what it is.
        rooms: the folders in it, each with the names of files that a run has made there, and of what it replaced.
    """
    room, _, inner = name.partition("/")
    if room in (LOCK, _JOURNAL):
        return not inner and stat.S_ISREG(entry.kind) and (room == _JOURNAL or entry.nbytes == 0)
    if room == _PARTS:
        return stat.S_ISREG(entry.kind) and is_record(inner) if inner else stat.S_ISDIR(entry.kind)
    if room not in rooms:
        return False
    made, replaced = rooms[room]
    if stat.S_ISDIR(entry.kind) or not inner:
        is_folder = not inner or any(known.startswith(f"{inner}/") for known in (*made, *replaced))
        return is_folder and stat.S_ISDIR(entry.kind)
    return inner in replaced or (inner in made and stat.S_ISREG(entry.kind))


def _foreign(folder: Path, names: Sequence[str], *, damaged: bool = False) -> OutputError:
    if damaged:
        return OutputError(
            f"{folder}: its journal is damaged, so nothing tells whether these are unfinished output:\n{some(names)}",
            hint="If you need nothing in it, remove the folder by hand, and run the command again.",
        )
    return OutputError(
        f"{folder} holds files that lines did not put there:\n{some(names)}",
        hint="lines keeps unfinished output in a folder of that name, and removes it then. Move these files away, or "
        "choose another destination with -o.",
    )


def _cleaning(output: Path) -> str:
    """The command that removes what is unfinished."""
    return f"lines clean {as_argument(output)}"


def refuse_another(own: Json, run: Json, folder: Path, output: Path) -> None:
    """Refuse to go on with what another recipe, or other inputs, have begun.

    Args:
        own: which run it is that would go on.
        run: which began.
        folder: where that has left its work.
        output: the destination.

    Raises:
        OutputError: what is not the same.
    """
    if "contents" in own and "contents" not in run:
        raise OutputError(
            f"{output}: the work in {folder} was begun without --verify-inputs, so it has no digests of its inputs to "
            "compare with",
            hint="Continue without --verify-inputs, or start over without --resume.",
        )
    sought = (own.keys() | (run.keys() - {"contents"})) - {"step"}
    different = sorted(key for key in sought if run.get(key) != own.get(key))
    if not different:
        return
    before, now = run.get("inputs"), own.get("inputs")
    if "inputs" in different and isinstance(before, dict) and isinstance(now, dict):
        of_both = [path for path in now if path in before and before[path] != now[path]]
        different[different.index("inputs")] = f"inputs ({', '.join(of_both) or 'others'})"
    raise OutputError(
        f"{folder} holds the unfinished work of another run, with different {', '.join(different)}",
        hint=f"Run it without --resume to discard that work, or remove it: {_cleaning(output)}",
    )


def _replaced(contents: JournalContents | None) -> frozenset[str]:
    """The names of what a run was about to replace when it was stopped."""
    return contents.publishing.old if contents is not None and contents.publishing is not None else frozenset()


def _is_published(contents: JournalContents | None, folder: Path) -> bool:
    """Whether what a run was about to put into place has left the staging folder."""
    if contents is None or contents.publishing is None:
        return False
    new = folder / NEW
    for path in (new, *(new.iterdir() if new.is_dir() else ())):
        there = path.lstat() if os.path.lexists(path) else None
        if there is not None and (there.st_dev, there.st_ino) == contents.publishing.new:
            return False
    return True


def is_published(output: Path) -> bool:
    """Whether a run has put its output into place, wherever that is by now, and has left its staging folder.

    Raises:
        OSError: it cannot be read.
    """
    folder = staging_of(output)
    try:
        return _is_published(read_journal(folder / _JOURNAL), folder)
    except NoJournalError:
        return False


def _is_at(target: Path, contents: JournalContents | None) -> bool:
    """Whether what a run has put into place stands there."""
    try:
        there = target.lstat()
    except OSError:
        return False
    return (
        contents is not None
        and contents.publishing is not None
        and (there.st_dev, there.st_ino) == contents.publishing.new
    )


def _is_busy(folder: Path) -> bool:
    """Whether a run is at work in a folder, whatever stands there."""
    with suppress(OSError):
        return folder.is_dir() and not folder.is_symlink() and is_locked(folder)
    return False


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Remove files, and folders that are empty by then, by their names; what else has come into them stays.

    Raises:
        OSError: something cannot be removed.
    """
    for name in sorted(names, key=lambda name: -name.count("/")):  # what is in a folder before the folder
        path = folder / name
        if path.is_dir() and not path.is_symlink():
            with suppress(OSError):
                path.rmdir()
        else:
            path.unlink(missing_ok=True)


def _clear(folder: Path, names: Collection[str]) -> None:
    """Remove files from a folder within the staging folder, and the folder, if nothing else is in it. What is not there
    by these names is not looked for: they may be a stranger's, and a link in the folder is not followed.
    """
    if folder.is_symlink():
        return
    _remove(folder, [name for name in survey(folder) if name in names])
    with suppress(OSError):
        folder.rmdir()


# --- what an earlier run has left ---


@dataclass(frozen=True, slots=True)
class Unfinished:
    """What a run left that did not come to its end.

    Attributes:
        folder: where it is.
        written: bytes of the weight files that were finished.
        total: bytes that they have in the end; 0 where that is not known.
        nbytes: what all of it takes on the disk.
        set_aside: whether the old output is in it, and not at the destination: a run was killed between two renames.
        run: which run it was; None where that is not known.
        is_over: whether that run's output is in place, and what is left is what it replaced.
        measured: what it had measured; None where that was not finished.
        remarks: what removing it does not remove.
    """

    folder: Path
    written: int
    total: int
    nbytes: int
    set_aside: bool = False
    run: Json | None = None
    is_over: bool = False
    measured: Json | None = None
    remarks: tuple[str, ...] = ()

    @property
    def description(self) -> str:
        """How far it came, in words."""
        if self.is_over:
            return "what a finished run has left"
        return f"{self.written / self.total:.0%} finished" if self.total else "nothing finished"


def leftover(output: Path) -> Unfinished | None:
    """What an earlier run has left of this output, if there is anything. Nothing is written to find out.

    Raises:
        OutputError: a run is at work on it, or there is something else in that place.
    """
    with naming(output):
        if _is_busy(folder := staging_of(output)):
            raise refusal(folder, output)
        return _at_rest(output, lambda: _unfinished(output))


def _unfinished(output: Path) -> Unfinished | None:
    folder = staging_of(output)
    contents = ours(output, None)
    if not folder.exists():
        return None
    total = written = 0
    if contents is not None:
        with suppress(KeyError, TypeError, ValueError, IndexError):  # no journal of ours would
            sizes = [int(size) for _, size, _ in contents.run["outputs"]]
            step = contents.run["step"]
            done = {(part.file, part.start): part for part in (*contents.parts, *contents.settled)}.values()
            whole = (part for part in done if is_part(part.file, part.start, part.blocks, sizes, step))
            written = sum(min(step, sizes[part.file] - part.start) for part in whole) if is_step(step) else 0
            total = sum(sizes)
    is_over = _is_published(contents, folder) and _is_at(output.resolve(), contents)
    set_aside = os.path.lexists(folder / _OLD) and not is_over
    run = contents.run if contents else None
    measured = contents.measured if contents else None
    return Unfinished(folder, written, total, _taken_by(folder), set_aside, run, is_over, measured)


_Found = TypeVar("_Found")


def _at_rest(output: Path, look: Callable[[], _Found]) -> _Found:
    """What a look at a staging folder finds, without its lock. What vanishes or changes meanwhile is a run at work, or
    one that has just come to its end: it is looked at again. A refusal holds once the same is found twice in a folder
    that has stood still between.

    Raises:
        OutputError: what `look` refuses; or another run is at work, as one is where the folder does not come to rest.
        OSError: the folder cannot be read.
    """
    folder, until = staging_of(output), math.inf
    last = None
    while True:
        state = _state_of(folder)
        try:
            return look()
        except (OutputError, OSError) as error:
            if _is_busy(folder):
                raise refusal(folder, output) from None
            found = (state, type(error), str(error))
            if found == last and state == _state_of(folder):
                raise
            if time.monotonic() > until:
                raise refusal(folder, output) from error
            until = min(until, time.monotonic() + _PATIENCE)
            last = found
        time.sleep(_TICK)


def _state_of(folder: Path) -> tuple[int, ...] | None:
    """Another one once a name has come into the folder or has left it; None where it is not there."""
    try:
        there = folder.lstat()
    except OSError:
        return None
    return there.st_dev, there.st_ino, there.st_ctime_ns


def recover(output: Path) -> None:
    """Put back what a run had set aside that was killed between two renames, if any was.

    Raises:
        OutputError: a run is at work, or something else stands at the destination.
    """
    with naming(output):
        folder = staging_of(output)
        try:
            lock = RunLock(folder, output)
        except FileNotFoundError:  # another has done so
            return
        try:
            _put_back(folder, output.resolve(), ours(output))
        finally:
            lock.release()


def clean(output: Path, *, only_over: bool = False) -> Unfinished | None:
    """Remove what an earlier run has left of this output.

    Args:
        output: the destination.
        only_over: unless it is work that another may go on from.

    Raises:
        OutputError: a run is at work on it, or what is there is not ours.
    """
    found = leftover(output)
    if found is not None:
        with naming(output):
            try:
                lock = RunLock(found.folder, output)
            except FileNotFoundError:  # the run that had it came to its end
                return None
            try:
                now = _unfinished(output) if only_over else None  # another may have begun since it was looked at
                if now is not None and now.run is not None and not now.is_over:
                    return None
                _put_back(found.folder, output.resolve(), ours(output))
                _empty(found.folder, ours(output))
                remove_with(lock, found.folder)
            finally:
                lock.release()
    return found


def _empty(folder: Path, contents: JournalContents | None, names: Collection[str] = ()) -> None:
    """Remove all that a staging folder of ours holds, its lock apart: by the names that the journal knows."""
    known = {*names, *(contents.names if contents else ()), *_replaced(contents)}
    known |= {str(parent) for name in known for parent in PurePosixPath(name).parents}
    for room in (_MOVED, NEW, _OLD):
        _clear(folder / room, known)
    _clear_records(folder)
    (folder / _JOURNAL).unlink(missing_ok=True)


def _clear_records(folder: Path) -> None:
    """Remove what parts of a divided run have written down."""
    room = folder / _PARTS
    _clear(room, [name for name in survey(room) if is_record(name)])


def _put_back(folder: Path, target: Path, contents: JournalContents | None) -> None:
    """Bring back what was set aside, if a run was killed before its own output was in place.

    Raises:
        OutputError: something else has taken its place.
    """
    old = folder / _OLD
    if not os.path.lexists(old) or (_is_published(contents, folder) and os.path.lexists(target)):
        return
    _bring_back(old, target, _replaced(contents))


def _bring_back(old: Path, target: Path, names: Collection[str]) -> None:
    """Move what was set aside back to the destination, where nothing stands, or the rest of it by these names."""
    there = survey(target)
    aside = {name for name, entry in survey(old).items() if not stat.S_ISDIR(entry.kind)}
    others = sorted(name or str(target) for name in there if name not in names or name in aside)
    if others:
        raise OutputError(
            f"{target} was created while its old content was in {old}:\n{some(others)}",
            hint="Move one of the two away.",
        )
    move_folder(old, target)


def _taken_by(folder: Path) -> int:
    """Bytes on the disk; a file that is yet to be written has holes."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.lstat().st_blocks * 512
    return found


# --- the output in the making ---


class State(enum.Enum):
    """How far an output has come."""

    BEGUN = "the destination is as it was"
    PUBLISHING = "the output is being put into place"
    IN_PLACE = "the output is in place"


class Staging:
    """The output in the making. Leaving the `with` block without `publish` keeps what is finished, and removes it where
    it is of no use.

    Args:
        output: the destination, a folder; or a file, if its name ends in `.safetensors`.
        run: which run it is; among that `outputs`, each weight file's name, size and the digest of its header, and
            `step`, how many bytes of a file are written at a time, which alone may differ from a run that is resumed.
        names: every file that will be written, relative to the destination.
        replaceable: gives the names in an existing output that may be replaced (`refuse_to_replace`); is asked when the
            lock is held. None if nothing may be.
        resume: go on from what a run of the same kind has left.

    Attributes:
        contents: what such a run has left, held against its digests; None where this one begins anew.
        state: how far it has come.
        remarks: what a person should know of how it ended.
    """

    def __init__(
        self,
        output: Path,
        run: Json,
        names: Iterable[str],
        *,
        replaceable: Callable[[], Collection[str]] | None = None,
        resume: bool = False,
    ) -> None:
        self.output, self._run, self._names, self._resume = output, run, frozenset(names), resume
        self._replaceable = replaceable
        self._target, self.folder = output.resolve(), staging_of(output)
        self._new = self.folder / NEW
        self._open: list[NewFile] = []
        self._made: list[Path] = []
        self._written: dict[str, tuple[int, int]] = {}  # each file's device and inode
        self._replaces: Survey = {}
        self._confirmed = False  # that what was replaced was seen to be what was to be replaced, and the new is durable
        self._journal: Journal | None = None
        self._lock: RunLock | None = None
        self.contents: JournalContents | None = None
        self.state = State.BEGUN
        self.remarks: list[str] = []

    def __enter__(self) -> Staging:
        with naming(self.output):
            self._made = [parent for parent in self._target.parents if not parent.exists()]
            _at_rest(self.output, lambda: ours(self.output, self._names))  # before anything is made in it
            fresh = False
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                for parent in self._made:
                    sync_folder(parent.parent)
                self._lock = RunLock(self.folder, self.output, make=True)
                fresh = os.listdir(self.folder) == [LOCK]
                found = ours(self.output, self._names)  # now that it stands still
                _put_back(self.folder, self._target, found)
                goes_on = self._resume and found is not None and not _is_published(found, self.folder)
                begun = self._of_this_run(found) if goes_on and found is not None else None
                self._look_at_old(begun)
                self._begin(found, begun)
                sync_folder(self.folder)
            except BaseException:
                if self._journal is not None:
                    self._journal.close()
                try:
                    if fresh:
                        self._discard()
                finally:
                    if self._lock is not None:
                        self._lock.release()
                self._remove_parents()
                raise
        return self

    def _begin(self, found: JournalContents | None, begun: JournalContents | None) -> None:
        path = self.folder / _JOURNAL
        if begun is not None and is_step(begun.run.get("step")):
            self._make_movable()
            self.contents = self._checked(begun)
            self._journal = Journal(path, self._names, keep=begun.nbytes)
            self._journal.replaces(self._replaces)
            has_parts = (self.folder / _PARTS).exists()  # of a divided run, which may be at work
            self._journal.empty = not (self.contents.parts or self.contents.measured is not None or has_parts)
            return
        _empty(self.folder, found, self._names)
        self._journal = Journal(path, self._names, self._run)
        self._journal.replaces(self._replaces)
        self._new.mkdir()

    @property
    def _is_mine(self) -> bool:
        """Whether the staging folder is the one that this run has locked."""
        return self._lock is not None and self._lock.holds(self.folder / LOCK)

    def _of_this_run(self, found: JournalContents) -> JournalContents | None:
        """What an earlier run has left, if that was this run. Where an existing output may be replaced, another run's
        work is begun anew: a job that always resumes must not wait for a person.
        """
        try:
            refuse_another(self._run, found.run, self.folder, self.output)
        except OutputError as error:
            if self._replaceable is None:
                raise
            self.remarks.append(f"{error.message}; it was discarded")
            return None
        return found

    def _look_at_old(self, begun: JournalContents | None) -> None:
        """Take note of what stands at the destination, which is to be replaced. A run that is resumed is held to the
        note of the one that began: what has come since is not to be deleted.

        Raises:
            OutputError: some of it is not ours, or has come since.
        """
        self._replaces = {name: entry for name, entry in survey(self._target).items() if not is_noise(name)}
        if self._replaceable is not None:
            refuse_to_replace(self.output, self._replaces, self._replaceable())
        elif self._replaces:
            raise OutputError(f"{self.output} exists", hint="Replace it with --force, or choose another with -o.")
        if self._replaces and not is_one_file(self.output) and RECIPE not in self._replaces:
            self.remarks.append(f"{self.output} was replaced; lines had not written it")
        if begun is not None and begun.replaces is not None:
            before = {name: Entry(*entry) for name, entry in begun.replaces.items()}
            if new := arrivals(before, self._replaces):
                raise OutputError(
                    f"{self.output} has changed since the interrupted run began:\n"
                    f"{some([name or str(self.output) for name in new])}",
                    hint="Move it away; or, to replace it, start over with --force and without --resume.",
                )

    def _make_movable(self) -> None:
        """Have `new` be a folder that can be renamed: on overlayfs one that came with the image cannot."""
        moved = self.folder / _MOVED
        if self._new.exists():
            move_folder(self._new, moved)
        if moved.exists():
            os.rename(moved, self._new)

    def _checked(self, contents: JournalContents) -> JournalContents:
        """The story without the parts that are not on the disk as it says."""
        outputs, step = self._run["outputs"], contents.run["step"]
        sizes = [nbytes for _, nbytes, _ in outputs]
        settled = {(part.file, part.start): part for part in contents.settled if self._is_part(part, sizes, step)}
        valid = [part for part in contents.parts if self._is_part(part, sizes, step)]
        valid = [part for part in valid if (part.file, part.start) not in settled]
        parts: list[WrittenRange] = []
        self._new.mkdir(exist_ok=True)
        # What stands beside the weights is made anew; all else was of another output.
        others = survey(self._new).keys() - {name for name, _, _ in outputs}
        _remove(self._new, others)
        for number, (name, nbytes, _) in enumerate(outputs):
            path = self._new / name
            own = [part for part in valid if part.file == number]
            flushed = [part for part in settled.values() if part.file == number]
            if (own or flushed) and is_alone(path, nbytes):
                parts += flushed
                blocks = {part.start + DIGEST_BLOCK * n: block for part in own for n, block in enumerate(part.blocks)}
                whole = intact(path, blocks)
                parts += [
                    part for part in own if all(part.start + DIGEST_BLOCK * n in whole for n in range(len(part.blocks)))
                ]
            else:
                path.unlink(missing_ok=True)
        parts.sort(key=lambda part: (part.file, part.start))  # so that sums are those of one run
        return replace(contents, parts=tuple(parts), publishing=None)

    @staticmethod
    def _is_part(part: WrittenRange, sizes: Sequence[int], step: int) -> bool:
        return is_part(part.file, part.start, part.blocks, sizes, step)

    @property
    def step(self) -> int:
        """Bytes of a file that are written at a time: those of the run that is resumed, so that its parts fit."""
        return int((self.contents.run if self.contents else self._run)["step"])

    @property
    def journal(self) -> Journal:
        """Where what is finished is written down."""
        assert self._journal is not None
        return self._journal

    def create(self, name: str, nbytes: int) -> NewFile:
        """A file of `nbytes`, new or as an earlier run has left it, open for writing until `publish`."""
        with naming(self.output):
            (self._new / name).parent.mkdir(parents=True, exist_ok=True)
            file = NewFile(self._new / name, nbytes, begun=self.contents is not None)
            self._open.append(file)
            self._written[name] = file.identity
        return file

    def add(self, name: str, content: bytes) -> None:
        """Write one of the files beside the weights."""
        with naming(self.output):
            path = self._new / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                there = os.fstat(file.fileno())
            self._written[name] = (there.st_dev, there.st_ino)

    def keep(self) -> None:
        """What there is so far is worth going on from."""
        self.journal.empty = False

    def sync(self) -> None:
        """Return when all files are on the disk."""
        with naming(self.output):
            for file in self._open:
                file.sync()

    @contextmanager
    def opened(self, name: str, head: bytes) -> Iterator[Path]:  # noqa: ARG002 - which a disk gives back
        """A weight file as another program opens it, to read its header."""
        yield self._new / name

    def digest(self, name: str) -> str:
        """The digest of a file, read back."""
        with naming(self.output):
            return file_digest(self._new / name)

    def stop(self) -> None:
        """The run comes to its end: nothing that is to be written waits any more. On a disk nothing does."""

    # --- into place ---

    def publish(self, at_last: Callable[[], None] = lambda: None) -> None:
        """Flush everything and put it into place in one step.

        Args:
            at_last: is called before that step, when all that takes time is done.

        Raises:
            OutputError: something has come to the destination meanwhile, or into the staging folder; or the system
                refuses.
        """
        self.sync()
        with naming(self.output):
            self._close_files()
            for folder in {parent for name in self._written for parent in PurePosixPath(name).parents}:
                sync_folder(self._new / folder)
            at_last()
            self._refuse_torn()
            self._refuse_arrivals(survey(self._target))
            new = self._new / self.output.name if is_one_file(self.output) else self._new
            if os.path.lexists(self._target):
                with suppress(OSError):  # what was private stays so
                    os.chmod(new, stat.S_IMODE(self._target.stat().st_mode))
            there = new.stat()
            self.journal.publishing(Publishing((there.st_dev, there.st_ino), frozenset(self._replaces)))
            self.state = State.PUBLISHING
            self._put_into_place(new, (there.st_dev, there.st_ino))
        try:
            sync_folder(self._target.parent)
        except OSError as error:
            raise OutputError(
                f"{self.output} is in place, but it may not be safe on the disk yet: {error.strerror or error}",
                hint=f"Check the disk, and read the output back: lines inspect {as_argument(self.output)} --check",
            ) from error
        self._confirmed = True

    def _refuse_torn(self) -> None:
        """Refuse to publish anything but the files that were written, all of them."""
        if not self._is_mine:
            raise OutputError(f"{self.folder} was replaced while {self.output} was written", hint="Run it again.")
        found = {}
        for name, entry in survey(self._new).items():
            if not stat.S_ISDIR(entry.kind) and not is_noise(name):
                found[name] = (os.lstat(self._new / name).st_dev, entry.inode)
        names = found.keys() | self._written.keys()
        if wrong := sorted(name for name in names if found.get(name) != self._written.get(name)):
            raise OutputError(
                f"{self._new} does not hold what was written into it; another program has changed it:\n{some(wrong)}",
                hint="Move away what is not from this run; the same command with --resume makes again what is missing.",
            )

    def _refuse_arrivals(self, now: Survey) -> None:
        """Refuse to replace what was not there when the run began, or has changed since."""
        new = arrivals(self._replaces, {name: entry for name, entry in now.items() if not is_noise(name)})
        if new and not self._replaces:
            raise OutputError(
                f"{self.output} was created while the new output was written", hint=f"Move it away. {_GOES_ON}"
            )
        if new:
            raise OutputError(
                f"{self.output} has changed while the new output was written; --force will not delete what is new:\n"
                f"{some([name or str(self.output) for name in new])}",
                hint=f"Move it away. {_GOES_ON}",
            )

    def _put_into_place(self, new: Path, identity: tuple[int, int]) -> None:
        """Put the new output into place. One that is there stays whole until then, and is exchanged for the new one;
        where the system cannot, it is away between two renames, and comes back if the second fails.
        """
        try:
            if not self._replaces or not os.path.lexists(self._target):
                put(new, self._target)
            elif exchange(new, self._target):
                try:
                    self._refuse_arrivals(survey(new))
                except BaseException:  # nothing is known of what came out, then
                    exchange(new, self._target)
                    raise
            elif is_one_file(self.output):
                self._refuse_arrivals(survey(self._target))  # at the last moment: there is no way back
                os.replace(new, self._target)
            else:
                self._rename_twice(new)
        except OSError as error:
            if error.errno in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR):
                self._refuse_arrivals(survey(self._target))
            raise
        finally:
            with suppress(OSError):
                there = self._target.lstat()
                self.state = State.IN_PLACE if (there.st_dev, there.st_ino) == identity else State.BEGUN

    def _rename_twice(self, new: Path) -> None:
        aside = self.folder / _OLD
        try:
            move_folder(self._target, aside)
            self._refuse_arrivals(survey(aside))
            os.rename(new, self._target)
        except BaseException:
            if new.exists() and aside.exists():  # else it is in place, or nothing was moved
                _bring_back(aside, self._target, self._replaces.keys())
            raise

    def _close_files(self) -> None:
        while self._open:
            self._open.pop().close()

    # --- the end ---

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._close_files()
            worth_it = self._journal is not None and not self._journal.empty
            if self._journal is not None:
                self._journal.close()
            if self.state is State.IN_PLACE:
                self._remove_old()
            elif not worth_it or isinstance(error, OF_NO_USE):
                self._discard()
            if self._lock is not None:
                self._lock.release()
            if error is not None:
                attach_aftermath(error, self._aftermath())
        except BaseException as another:
            attach_aftermath(another, self._aftermath())
            raise
        finally:
            if self._lock is not None:
                self._lock.release()

    def _aftermath(self) -> Aftermath:
        in_place = self.output if self.state is State.IN_PLACE else None
        return Aftermath(self.folder if (self.folder / _JOURNAL).exists() else None, in_place, self.output)

    def _remove_old(self) -> None:
        """What was replaced, as it was when it was looked at; whatever else is found there stays, and is named."""
        if not self._is_mine:
            return
        why = "the run ended before it could remove it"
        try:
            if self._confirmed:
                for room in (NEW, _OLD):
                    _clear(self.folder / room, self._still_there(self.folder / room))
                _clear_records(self.folder)
                rest = sorted(name for name in survey(self.folder) if name not in (LOCK, _JOURNAL, NEW, _OLD))
                if not [name for name in rest if not is_noise(name)]:
                    (self.folder / _JOURNAL).unlink(missing_ok=True)
                    assert self._lock is not None
                    remove_with(self._lock, self.folder)
                    return
                why = f"it holds files that were not there before:\n{some(rest)}"
        except OSError as error:
            why = f"it cannot be removed: {error.strerror or error}"
        self.remarks.append(f"{self.output} is in place; what it replaced is still in {self.folder}: {why}")

    def _still_there(self, room: Path) -> set[str]:
        """Of what was replaced, the names under which the same files stand, and their folders."""
        alone = self._replaces.get("") if is_one_file(self.output) else None
        before = {self.output.name: alone} if alone is not None else self._replaces
        now = survey(room)
        return {name for name, entry in now.items() if stat.S_ISDIR(entry.kind) or before.get(name) == entry}

    def _discard(self) -> None:
        """All that was made, and the folders that were made for it."""
        if not self._is_mine:
            return
        assert self._lock is not None
        with suppress(OSError):
            _empty(self.folder, self.contents, self._names)
            remove_with(self._lock, self.folder)
        self._remove_parents()

    def _remove_parents(self) -> None:
        """Those that were made for the staging folder."""
        for parent in self._made:  # innermost first
            try:
                parent.rmdir()
            except OSError:
                break


_GOES_ON = "Then the same command with --resume continues from what is finished."


def is_alone(path: Path, nbytes: int) -> bool:
    """Whether it is a regular file of that size that goes by no other name: a backup may share it."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(there.st_mode) and there.st_size == nbytes and there.st_nlink == 1
