"""The output in the making, wherever it goes: on a disk (`staging`), or in an object store (`object_staging`). The only
place that chooses.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Protocol

from lines_cli.storage import destination, object_staging, staging
from lines_cli.storage.digest import Written
from lines_cli.storage.journal import JournalContents, Json, WrittenRange
from lines_cli.storage.object_store import url_of
from lines_cli.storage.staging import Unfinished


class Notes(Protocol):
    """Where what is finished is written down."""

    def measured(self, tally: Json) -> None:
        """What was measured."""

    def wrote(self, part: WrittenRange) -> None:
        """A part that was written."""


class Making(Protocol):
    """An output in the making, for the length of a `with` block; what leaving it without `publish` keeps or removes is
    said by `Staging` and `ObjectStaging`.
    """

    output: Path
    contents: JournalContents | None
    remarks: list[str]

    def __enter__(self) -> Making: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    @property
    def step(self) -> int:
        """Bytes of a file that are written at a time."""

    @property
    def journal(self) -> Notes:
        """Where what is finished is written down."""

    def create(self, name: str, nbytes: int) -> Written:
        """A weight file, to be written; in the order of the plan."""

    def add(self, name: str, content: bytes) -> None:
        """One of the files beside the weights."""

    def keep(self) -> None:
        """What there is so far is worth going on from."""

    def sync(self) -> None:
        """Return when all weights are where they stay."""

    def opened(self, name: str, head: bytes) -> AbstractContextManager[Path]:
        """A weight file as another program opens it, to read its header; `head` is what it begins with."""

    def digest(self, name: str) -> str:
        """The digest of a file, read back."""

    def stop(self) -> None:
        """The run comes to its end: nothing that is to be written waits any more."""

    def publish(self, at_last: Callable[[], None] = lambda: None) -> None:
        """Put it into place."""


def making(
    output: Path,
    run: Json,
    names: Iterable[str],
    *,
    replaceable: Callable[[], Collection[str]] | None = None,
    resume: bool = False,
) -> Making:
    """An output in the making; arguments as of `Staging`."""
    made = staging.Staging if url_of(output) is None else object_staging.ObjectStaging
    return made(output, run, names, replaceable=replaceable, resume=resume)


def check_destination(
    output: Path,
    *,
    inputs: Iterable[Path],
    nbytes: int,
    force: bool,
    ours: Collection[str] | None = None,
    may_exist: bool = False,
) -> None:
    """Refuse a destination that is taken, is one of the inputs or holds one, or has too little room; arguments as of
    the function for one on a disk.

    Raises:
        OutputError: with what is in the way.
    """
    if url_of(output) is None:
        destination.check_destination(output, inputs=inputs, nbytes=nbytes, force=force, ours=ours, may_exist=may_exist)
    else:
        object_staging.check_destination(output, inputs=inputs, force=force, ours=ours, may_exist=may_exist)


def is_taken(output: Path) -> bool:
    """Whether anything stands at a destination."""
    return destination.is_taken(output) if url_of(output) is None else object_staging.is_taken(output)


def leftover(output: Path) -> Unfinished | None:
    """What an earlier run has left of this output, if there is anything. Nothing is written to find out."""
    return staging.leftover(output) if url_of(output) is None else object_staging.leftover(output)


def refuse_unfinished(output: Path, before: Unfinished | None, *, resume: bool, resumes: str = "") -> None:
    """Refuse to begin anew in a store where a run has left something, or is at work; on a disk a lock tells.

    Args:
        output: the destination.
        before: what is left there.
        resume: it is to be gone on from.
        resumes: how to do that, if not by --resume.

    Raises:
        OutputError: what to do.
    """
    if before is not None and not before.is_over and not resume and url_of(output) is not None and before.run:
        object_staging.refuse_unfinished(output, resumes)


def room_of(output: Path) -> Path:
    """Where its unfinished work lies."""
    return staging.staging_of(output) if url_of(output) is None else object_staging.room_of(output)


def recover(output: Path) -> None:
    """Put back what a run had set aside that was killed between two renames; in a store nothing is renamed."""
    if url_of(output) is None:
        staging.recover(output)


def clean(output: Path, *, only_over: bool = False) -> Unfinished | None:
    """Remove what an earlier run has left of this output; with `only_over` unless it is work that another may go on
    from.
    """
    if url_of(output) is None:
        return staging.clean(output, only_over=only_over)
    return object_staging.clean(output, only_over=only_over)
