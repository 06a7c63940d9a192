"""The output in the making, while parts of one run write into it at once, on one machine or on several.

`lines plan` begins it (`begin`), each part opens it (`Shared`), and the run that finishes takes it over as it would the
work of a run that was killed (`storage/staging`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from types import TracebackType

from lines_cli.errors import OutputError, as_argument
from lines_cli.storage.destination import naming
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import Json
from lines_cli.storage.lock import RunLock
from lines_cli.storage.part_records import ROOM, Records, plan_of
from lines_cli.storage.staging import NEW, Staging, is_alone, ours, staging_of


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
    """Make room for the parts of a plan beside the destination; what another plan has left there is discarded, and what
    this very plan has is kept. Gives what a person should know.

    Args:
        output: the destination.
        run, names, replaceable: as of `Staging`.
        plan: the plan's digest.
        foreseen: the files that parts will write, and their sizes.
        anew: discard what this very plan has left, too.

    Raises:
        OutputError: the destination is taken, or a run is at work on it.
    """
    if not anew and is_of_plan(output, plan):
        return ()
    with Staging(output, run, names, replaceable=replaceable) as staging:
        for name, nbytes in foreseen:
            staging.create(name, nbytes)
        with naming(output):
            Records(staging.folder / ROOM, plan).begin()
        staging.keep()
    return tuple(staging.remarks)


def is_of_plan(output: Path, plan: str) -> bool:
    """Whether an output is in the making by this very plan.

    Raises:
        OutputError: its folder cannot be read.
    """
    with naming(output):
        return plan_of(staging_of(output) / ROOM) == plan


class Shared:
    """It, open for parts of a plan, for the length of a `with` block. Only a run that needs it alone is kept away.

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
        self.folder = staging_of(output)
        self.records = Records(self.folder / ROOM, plan)
        self._lock: RunLock | None = None

    def __enter__(self) -> Shared:
        with naming(self.output):
            try:
                self._lock = RunLock(self.folder, self.output, shared=True)
            except FileNotFoundError:
                raise self._nothing() from None
            try:
                self._look()
            except BaseException:
                self._lock.release()
                raise
        return self

    def _look(self) -> None:
        contents = ours(self.output)
        there = plan_of(self.folder / ROOM) if contents is not None else None
        if there is None:
            raise self._nothing()
        if there != self._plan:
            raise OutputError(
                f"{self.folder} holds the parts of another plan than {self._source}",
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
        if self._lock is not None:
            self._lock.release()

    def open(self, name: str, nbytes: int) -> NewFile:
        """A file of the output, to write into: all of them are there since the plan."""
        path = self.folder / NEW / name
        if not is_alone(path, nbytes):
            raise OutputError(
                f"{path} is not the file that lines plan made there, of {nbytes:,} bytes",
                hint=f"Discard what there is, and plan again: lines clean {as_argument(self.output)}",
            )
        with naming(self.output):
            return NewFile(path, nbytes, begun=True)
