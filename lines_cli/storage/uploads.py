"""Files of an output that become objects while their bytes are made.

Several threads write ranges of a file, in whatever order; an upload takes them in the file's order, in parts, and each
part is on its way while the next is made. Whoever is far ahead of what was sent waits. So memory is bounded: WINDOW
bytes that wait for their turn, and the parts of one object that are on their way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lines_cli.errors import CheckpointError, OutputError
from lines_cli.storage.object_store import AT_ONCE, Stored, looked_up, marked, part_of, put_pieces, url_of

WINDOW = 64 * 2**20
"""Bytes that may be written ahead of what was sent."""
_FILES_AT_ONCE = 4


def memory_on_the_way(output: Path, sizes: Sequence[int]) -> int:
    """About how many bytes of memory files of these sizes take on their way into a store, at most; on a disk none."""
    if url_of(output) is None:
        return 0
    return min(sum(sizes), WINDOW) + min(sum(sizes), (AT_ONCE + 1) * part_of(max(sizes, default=0)))


class UploadStoppedError(Exception):
    """The run has come to its end before this file did."""


class Uploads:
    """Those of one run.

    Args:
        before_done: is called with a file's URL before it is whole; if it raises, the file is given up.

    Attributes:
        mark: what the objects bear, to tell whose they are.
        files: each, in the order of the plan; the first that is not done is the one that all wait for.
    """

    def __init__(self, before_done: Callable[[str], None] = lambda _: None, mark: str = "") -> None:
        self._before_done, self.mark = before_done, mark
        self.files: list[Upload] = []
        self._changed = threading.Condition()
        self._over = False
        self._error: BaseException | None = None
        self._begins = 0

    def add(self, url: str, nbytes: int, *, done: Stored | None = None, held: bool = False) -> Upload:
        """A file.

        Args:
            url: what it becomes.
            nbytes: its size.
            done: what is there of it already: all.
            held: it appears only when it is let go.
        """
        made = Upload(self, len(self.files), self._begins, url, nbytes, done, held=held)
        self._begins += 0 if done else nbytes
        self.files.append(made)
        return made

    def wait(self) -> Iterator[Upload]:
        """Each file as soon as it is there; but what is held back when it has been sent, but for its last part.

        Raises:
            OutputError: the store does not take one.
        """
        for file in self.files:
            with self._changed:
                while not (file.done or (file.held and file.sent == file.nbytes)):
                    self._refuse()
                    self._changed.wait()
                self._refuse()
            yield file

    def let_go(self) -> None:
        """Nothing is held back any more."""
        with self._changed:
            for file in self.files:
                file.held = False
            self._changed.notify_all()

    @property
    def failed(self) -> bool:
        """Whether the store did not take a file; what was given up for another reason is taken back."""
        error = self._error
        return isinstance(error, CheckpointError) or isinstance(getattr(error, "__cause__", None), CheckpointError)

    def stop(self) -> None:
        """Nothing waits to be written any more; what was written goes on."""
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def end(self) -> None:
        """Remove what is under way, and return when it is gone. What is done stays."""
        with self._changed:
            self._over = True
            for file in self.files:
                file.given_up = True
            self._changed.notify_all()
        for file in self.files:
            if file.thread is not None:
                file.thread.join()

    def _refuse(self) -> None:
        """Raise why a file did not become an object, in the thread that asks."""
        if self._error is None:
            return
        if isinstance(self._error, (CheckpointError, OutputError)):
            raise OutputError(self._error.message, hint=self._error.hint) from self._error
        raise self._error

    def write(self, file: Upload, view: memoryview, offset: int) -> None:
        """Take bytes of a file; they are copied, as soon as there is room for them."""
        with self._changed:
            while not self._has_room(file, offset):
                self._refuse()
                if self._over:
                    raise UploadStoppedError(file.url)
                self._changed.wait()
            self._refuse()
            if offset < file.sent or offset in file.waiting:  # made again, after the device had no memory: the same
                return
            file.waiting[offset] = bytes(view)
            if file.thread is None:
                file.begin()
            self._changed.notify_all()

    def _has_room(self, file: Upload, offset: int) -> bool:
        first = next((one for one in self.files if not one.done), file)
        near = sum(not one.done for one in self.files[first.number : file.number]) < _FILES_AT_ONCE
        return near and file.begins + offset < first.begins + first.sent + WINDOW

    def pieces(self, file: Upload) -> Iterator[bytes]:
        """The bytes of a file, in order, as they come."""
        while file.sent < file.nbytes:
            with self._changed:
                while file.sent not in file.waiting and not file.given_up:
                    self._changed.wait()
                if file.given_up:
                    raise UploadStoppedError(file.url)
                piece = file.waiting.pop(file.sent)
                file.sent += len(piece)
                self._changed.notify_all()
            yield piece
        with self._changed:
            while file.held and not file.given_up:
                self._changed.wait()
            if file.given_up:
                raise UploadStoppedError(file.url)
        with ThreadPoolExecutor(1) as asking:  # obstore cannot be asked in the midst of an upload, by its thread
            asking.submit(self._before_done, file.url).result()

    def run(self, file: Upload) -> None:
        """Send a file: what its thread does."""
        try:
            tag = put_pieces(file.url, self.pieces(file), file.nbytes, mark=self.mark)
            there = _as_sent(file, tag, self.mark)
            with self._changed:
                file.done = there
                self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - handed over to the threads that wait, which raise it
            with self._changed:
                file.given_up = True
                if not isinstance(error, UploadStoppedError):
                    self._error = self._error or error
                self._changed.notify_all()


def _as_sent(file: Upload, tag: str, mark: str) -> Stored:
    """The object that a file has become: that of this tag, or another of this mark.

    Raises:
        OutputError: it is not what was sent.
    """
    there = looked_up(file.url)
    is_it = there is not None and there.nbytes == file.nbytes
    if is_it and there is not None and tag not in ("", there.tag):
        found = marked(file.url)
        there, is_it = (found[0], found[1] == mark) if found is not None and mark else (None, False)
    if there is None or not is_it:
        raise OutputError(
            f"{file.url} is not what was written: another program has replaced or removed it",
            hint="The same command makes it again, when no other program writes there.",
        )
    return there


class Upload:
    """A file that becomes an object.

    Attributes:
        done: what became of it; None as long as it is under way.
        sent: how many of its bytes the upload has taken.
        waiting: those that have not had their turn, by their place.
        held: it does not appear yet.
        given_up: it is not to appear at all.
    """

    def __init__(
        self, all_: Uploads, number: int, begins: int, url: str, nbytes: int, done: Stored | None, *, held: bool
    ) -> None:
        self._all, self.number, self.begins, self.url, self.nbytes = all_, number, begins, url, nbytes
        self.done, self.held, self.given_up = done, held, False
        self.sent = 0
        self.waiting: dict[int, bytes] = {}
        self.thread: threading.Thread | None = None

    @property
    def was_sent(self) -> bool:
        """Whether all of it was."""
        return self.sent == self.nbytes

    def begin(self) -> None:
        """Have it sent, by a thread of its own."""
        name = f"lines-upload-{self.number}"
        self.thread = threading.Thread(target=self._all.run, args=[self], name=name, daemon=True)
        self.thread.start()

    def write(self, view: memoryview, offset: int) -> None:
        """Take these bytes, which belong at `offset`."""
        self._all.write(self, view, offset)
