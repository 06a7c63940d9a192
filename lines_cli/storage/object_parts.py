"""An output in the making in an object store, as parts of a divided run see it: each part makes whole files, which
become objects at the destination, and its record says which objects these are.

    s3://bucket/.out.lines/         as of a run that is not divided (`object_staging`), and
        parts/plan, parts/1, ...    what is done (`part_records`)
        parts/7.0123456789abcdef    a part that is sending: what it sends; of one that was killed it stays

Nothing is replaced: what stands at the destination and does not bear the run's mark is refused, before a part sends
anything, and again before each of its files is whole.

No lock keeps others away. A part looks before each of its files is whole, and before its record, whether the run is
still the one that it began with; if another run has taken the work over, or removed it, it ends. What two processes
make of one part is the same, and who comes second gives its upload up. Should both have become whole at the same
moment, the record is made to say which object is there, or the part is made anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from lines_cli.errors import CheckpointError, OutputError, some
from lines_cli.storage.journal import Json, written_line
from lines_cli.storage.object_staging import Begun, begun_of, room_of, sent_url, taken_over, there_at
from lines_cli.storage.object_store import Stored, asked_of_the_store, looked_up, marked, put_content, remove
from lines_cli.storage.part_records import ROOM, ObjectShelf, in_the_making, stored_in
from lines_cli.storage.uploads import Upload, Uploads


class DoneByAnotherError(Exception):
    """Another process has done this part meanwhile, as its record said a moment ago. A file of ours that became whole
    in that moment may have replaced one of its, so that the record no longer holds.
    """


class ObjectRoom:
    """Where the work of all parts lies.

    Args:
        output: the destination.
    """

    def __init__(self, output: Path) -> None:
        self.output, self.folder = output, room_of(output)
        self.shelf = ObjectShelf(self.folder / ROOM, self._refuse_taken_over)
        self._begun: Begun | None = None
        self._state: str | None = None
        self._is_lost = False  # to another run, or done
        self._put = set[str]()  # files that are whole

    def enter(self) -> bool:
        """Take note of whose work it is; False where none is in the making."""
        self._begun = begun_of(self.output)
        return self._begun is not None

    def leave(self) -> None:
        """Nothing is held."""

    def holds(self, record: Sequence[Json]) -> bool:
        """Whether the objects that a part has made are still there, as its record says."""
        if self._begun is None and not self.enter():
            return False
        names = self._run.names
        with asked_of_the_store():
            return all(
                number < len(names) and looked_up(self._url(number)) == Stored(*stored)
                for number, stored in stored_in(record).items()
            )

    @property
    def _run(self) -> Begun:
        assert self._begun is not None
        return self._begun

    def _url(self, number: int) -> str:
        return sent_url(self.output, self._run.names[number])

    def state(self) -> str | None:
        """What has become of the destination here, in words; None where it is as it was."""
        return f"what lies at {self.output} is finished, or another run's" if self._is_lost else self._state

    @contextmanager
    def files(
        self, part: str, wanted: Mapping[int, tuple[str, int]], is_done: Callable[[], bool]
    ) -> Iterator[ObjectFiles]:
        """Files that a part makes, by their numbers: name and size. Leaving it takes back what is not whole.

        Raises:
            DoneByAnotherError: that was seen before a file was whole.
        """

        def before_done(url: str) -> None:
            self._refuse_taken_over()
            if is_done():
                raise DoneByAnotherError
            self._refuse_arrivals([url.removeprefix(f"{self._url_of_all}/")])

        others = {*self._run.names} - {name for name, _ in wanted.values()}
        self._refuse_taken_over()
        self._refuse_arrivals(there_at(self.output).keys() - others)
        urls = {number: (self._url(number), nbytes) for number, (_, nbytes) in wanted.items()}
        made = ObjectFiles(Uploads(before_done, self._run.mark), urls, self._refuse_taken_over)
        sending = f"{self.shelf.folder}/{in_the_making(part)}"
        with asked_of_the_store():
            put_content(sending, written_line({"sends": sorted(name for name, _ in wanted.values())}))
        self._state = f"{self.output} may hold files that are whole, and is no output yet"
        try:
            yield made
        finally:
            made.uploads.end()
            self._count(made.uploads)
            if not made.uploads.failed:
                with suppress(CheckpointError):
                    remove([sending])

    def _count(self, uploads: Uploads) -> None:
        with suppress(CheckpointError):  # of one whose answer was not waited for, the store is asked
            self._put |= {
                file.url
                for file in uploads.files
                if file.done is not None or (file.was_sent and (marked(file.url) or ("", ""))[1] == uploads.mark)
            }
            number = len(self._put)
            self._state = (
                f"{self.output} holds {number} whole {'file' if number == 1 else 'files'} of this command, and "
                "is no output yet: of a part that was not done nothing counts"
                if number
                else None
            )

    def _refuse_arrivals(self, names: Iterable[str]) -> None:
        """Refuse to replace what others have put there, or to put files beside it.

        Raises:
            OutputError: what it is.
        """
        with asked_of_the_store():
            found = {name: marked(f"{self._url_of_all}/{name}") for name in names}
        if new := sorted(name for name, one in found.items() if one is not None and one[1] != self._run.mark):
            raise OutputError(
                f"{self.output} holds what no part of this plan has put there:\n{some(new)}",
                hint="Parts replace nothing. Move it away, and run the same command again; or plan it for another "
                "destination: lines plan -o.",
            )

    @property
    def _url_of_all(self) -> str:
        return sent_url(self.output, "").rstrip("/")

    def _refuse_taken_over(self) -> None:
        if self._begun is not None and taken_over(self.output, self._begun.line):
            self._is_lost = True
            raise OutputError(
                f"{self.folder} is no longer that of this plan: the output was finished or cleaned away, or another "
                "run has taken it over",
                hint="To make the output again, plan it again: lines plan.",
            )


class ObjectFiles:
    """The files of a part.

    Attributes:
        targets: to be written to, by their numbers.
    """

    def __init__(
        self, uploads: Uploads, wanted: Mapping[int, tuple[str, int]], refuse_taken_over: Callable[[], None]
    ) -> None:
        self.uploads, self._wanted, self._refuse_taken_over = uploads, wanted, refuse_taken_over
        self._mark = uploads.mark
        self.targets: dict[int, Upload] = {n: uploads.add(url, nbytes) for n, (url, nbytes) in sorted(wanted.items())}

    def stop(self) -> None:
        """No more is written."""
        self.uploads.stop()

    def settle(self) -> Iterable[Json]:
        """Return when all of them are objects: which, for the record.

        Raises:
            OutputError: the store does not take one; another program has replaced it; or the work was taken over.
        """
        for _ in self.uploads.wait():
            pass
        self._refuse_taken_over()
        lines = []
        for number, (url, nbytes) in self._wanted.items():
            with asked_of_the_store():
                found = marked(url)
            there, mark = found or (None, "")
            if there is None or there.nbytes != nbytes or (there != self.targets[number].done and mark != self._mark):
                raise OutputError(
                    f"{url} is not what was written: another program has replaced or removed it",
                    hint="The same command makes it again, when no other program writes there.",
                )
            lines.append({"object": number, "stored": [*there]})
        return lines
