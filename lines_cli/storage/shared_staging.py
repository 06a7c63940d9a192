"""The output in the making, while parts of one run write into it at once, on one machine or on several; on a disk, or
in an object store (`object_parts`).

`lines plan` begins it (`begin`), each part opens it (`Shared`), and the run that finishes takes it over as it would the
work of a run that was killed (`storage/making`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lines_cli.errors import Aftermath, OutputError, as_argument, attach_aftermath
from lines_cli.storage.destination import naming
from lines_cli.storage.digest import Written
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import Json
from lines_cli.storage.lock import RunLock
from lines_cli.storage.making import making
from lines_cli.storage.object_parts import DoneByAnotherError, ObjectRoom
from lines_cli.storage.object_store import url_of
from lines_cli.storage.part_records import ROOM, FolderShelf, Records, Shelf, plan_of
from lines_cli.storage.staging import NEW, is_alone, is_published, ours, staging_of


def begin(
    output: Path,
    run: Json,
    names: Collection[str],
    plan: str,
    *,
    replaceable: Callable[[], Collection[str]] | None,
    foreseen: Collection[tuple[str, int]],
    anew: bool = False,
) -> tuple[str, ...]:
    """Make room for the parts of a plan beside the destination; what another plan has left there is discarded, in a
    store refused, and what this very plan has is kept. Gives what a person should know.

    Args:
        output: the destination.
        run, names, replaceable: as of `Staging`.
        plan: the plan's digest.
        foreseen: the files that parts will write, and their sizes.
        anew: discard what this very plan has left, too; in a store it is refused.

    Raises:
        OutputError: the destination is taken, or a run is at work on it.
    """
    if not anew and is_of_plan(output, plan):
        return ()
    with making(output, run, names, replaceable=replaceable) as staging:
        for name, nbytes in foreseen:
            staging.create(name, nbytes)
        with naming(output):
            Records(_room_of(output).shelf, plan).begin()
        staging.keep()
    return tuple(staging.remarks)


def is_of_plan(output: Path, plan: str) -> bool:
    """Whether an output is in the making by this very plan.

    Raises:
        OutputError: its folder cannot be read.
    """
    room = _room_of(output)
    with naming(output):
        if not room.enter():
            return False
        try:
            return plan_of(room.shelf) == plan
        finally:
            room.leave()


class PartFiles(Protocol):
    """The files that a part writes.

    Attributes:
        targets: to be written to, by their numbers.
    """

    @property
    def targets(self) -> Mapping[int, Written]:
        """To be written to, by their numbers."""

    def stop(self) -> None:
        """No more is written: nothing waits to be."""

    def settle(self) -> Iterable[Json]:
        """Return when what was written stays: what the part's record is to say of it."""


class _Room(Protocol):
    """Where the work of all parts lies."""

    @property
    def folder(self) -> Path:
        """Where that is, for messages."""

    @property
    def shelf(self) -> Shelf:
        """Their records."""

    def enter(self) -> bool:
        """Be at work in it; False where there is nothing."""

    def leave(self) -> None:
        """No more be at work."""

    def state(self) -> str | None:
        """What has become of the destination here, in words; None where it is as it was."""

    def holds(self, record: Sequence[Json]) -> bool:
        """Whether what a part has made is there still, as its record says."""

    def files(
        self, part: str, wanted: Mapping[int, tuple[str, int]], is_done: Callable[[], bool]
    ) -> AbstractContextManager[PartFiles]:
        """Files that a part makes, by their numbers: name and size. `is_done` tells whether another has done it
        meanwhile: where that is seen, `DoneByAnotherError` is raised in the block.
        """


class Shared:
    """It, open for parts of a plan, for the length of a `with` block. Only a run that needs it alone is kept away; in a
    store that is not, and parts end when it has come.

    Args:
        output: the destination.
        plan: the plan's digest.
        source: the plan's file, for messages.

    Attributes:
        records: what parts have done.

    Raises:
        OutputError: it is not there, another plan's, or a run that needs it alone is at work.
    """

    def __init__(self, output: Path, plan: str, source: Path) -> None:
        self.output, self._plan, self._source = output, plan, source
        self._room = _room_of(output)
        self.records = Records(self._room.shelf, plan)

    def __enter__(self) -> Shared:
        with naming(self.output):
            if not self._room.enter():
                raise self._nothing()
            try:
                self._look()
            except BaseException:
                self._room.leave()
                raise
        return self

    def _look(self) -> None:
        there = plan_of(self._room.shelf)
        if there is None:
            raise self._nothing()
        if there != self._plan:
            raise OutputError(
                f"{self._room.folder} holds the parts of another plan than {self._source}",
                hint="Run the parts of that plan; or discard them, and plan again: "
                f"lines clean {as_argument(self.output)}",
            )

    def _nothing(self) -> OutputError:
        return OutputError(
            f"{self._source}: no output is in the making beside {self.output}: it is finished, or was cleaned away",
            hint="To make it again, plan it again: lines plan.",
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._room.leave()
        if error is not None and (state := self._room.state()) is not None:
            attach_aftermath(error, Aftermath(state=state))

    def is_done(self, number: int) -> bool:
        """Whether a part is done, and what it has made is there."""
        record = self.records.read(str(number))
        return record is not None and self._room.holds(record)

    def files(self, number: int, wanted: Mapping[int, tuple[str, int]]) -> AbstractContextManager[PartFiles]:
        """Files that a part makes, by their numbers: name and size. Where another does the same part, and is done
        first, the block may end with `DoneByAnotherError`.
        """
        return self._room.files(str(number), wanted, lambda: self.is_done(number))

    def until_done(self, number: int, make: Callable[[], None]) -> None:
        """Make a part, and make it anew where that was left to another whose work did not last.

        Args:
            number: of the part.
            make: makes it, with `files` and `finish`.

        Raises:
            OutputError: what was made does not last.
        """
        for _ in range(_TRIES):
            try:
                return make()
            except DoneByAnotherError:
                if self.is_done(number):
                    return None
        raise self._does_not_last(number)

    def finish(self, number: int, files: PartFiles, lines: Collection[Json]) -> None:
        """A part is done: write its record, once all it has made is where it stays.

        Raises:
            OutputError: that does not last.
        """
        for _ in range(_TRIES):
            with naming(self.output):
                said = [*files.settle(), *lines]
                self.records.write(str(number), said, counts=lambda: self.is_done(number))
                if self.is_done(number):  # else another has made the same at the same moment
                    return
        raise self._does_not_last(number)

    def _does_not_last(self, number: int) -> OutputError:
        return OutputError(
            f"{self.output}: what part {number} wrote is replaced again and again",
            hint="Run it again when no other program writes there.",
        )


_TRIES = 5


class _FolderRoom:
    """On a disk: the staging folder."""

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, staging_of(output)
        self.shelf = FolderShelf(self.folder / ROOM)
        self._lock: RunLock | None = None

    def enter(self) -> bool:
        """Lock it, along with others; False where there is none."""
        try:
            self._lock = RunLock(self.folder, self.output, shared=True)
        except FileNotFoundError:
            return False
        try:
            # What was put into place is no more in the making: what lies here then is what it has replaced.
            is_begun = ours(self.output) is not None and not is_published(self.output)
        except BaseException:
            self.leave()
            raise
        if not is_begun:
            self.leave()
        return is_begun

    def leave(self) -> None:
        """Let go of the lock."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def state(self) -> None:
        """It is as it was."""

    def holds(self, record: Sequence[Json]) -> bool:  # noqa: ARG002 - nobody takes from a folder what is in it
        """Whether what a part has made is there still: that is looked at when the run is finished."""
        return True

    @contextmanager
    def files(
        self,
        part: str,  # noqa: ARG002 - which a store is told
        wanted: Mapping[int, tuple[str, int]],
        is_done: Callable[[], bool],  # noqa: ARG002 - two that write the same bytes harm nothing
    ) -> Iterator[_FolderFiles]:
        """Files of the output, to write into: all of them are there since the plan."""
        with ExitStack() as stack:
            files = _FolderFiles()
            for number, (name, nbytes) in wanted.items():
                files.targets[number] = self._open(name, nbytes)
                stack.callback(files.targets[number].close)
            yield files

    def _open(self, name: str, nbytes: int) -> NewFile:
        path = self.folder / NEW / name
        if not is_alone(path, nbytes):
            raise OutputError(
                f"{path} is not the file that lines plan made there, of {nbytes:,} bytes",
                hint=f"Discard what there is, and plan again: lines clean {as_argument(self.output)}",
            )
        with naming(self.output):
            return NewFile(path, nbytes, begun=True)


class _FolderFiles:
    """Those that a part writes into."""

    def __init__(self) -> None:
        self.targets: dict[int, NewFile] = {}

    def stop(self) -> None:
        """No more is written: nothing waits to be."""

    def settle(self) -> Iterable[Json]:
        """Return when what was written is on the disk."""
        for file in self.targets.values():
            file.sync()
        return ()


def _room_of(output: Path) -> _Room:
    return _FolderRoom(output) if url_of(output) is None else ObjectRoom(output)
