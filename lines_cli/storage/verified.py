"""What `lines verify --resume` has compared of an output, in a hidden file beside it, so that another run goes on from
there.

Each line is JSON with a checksum, as in a journal. Line 1 says what is compared: the recipe, the state of its inputs
and of the output's files. Then come what was measured, and every part that was compared. The file belongs to one run at
a time, and is removed at the end.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Any

from lines_cli.errors import OF_NO_USE, Aftermath, OutputError, attach_aftermath
from lines_cli.storage.digest import is_step
from lines_cli.storage.files import read_into, read_small
from lines_cli.storage.journal import whole_lines, written_line

try:
    import fcntl
except ImportError:  # no Unix: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

_OURS = b'{"verify":'
_LARGEST = 512 * 2**20  # bytes: 100 for each block of 4 MiB, so this is of 20 TB


def verified_beside(output: Path) -> Path:
    """Where it stands: beside the output, or what that is a link to."""
    target = output.resolve()
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = sha256(os.fsencode(name)).hexdigest()
    return target.parent / f".{name}.lines-verified"


_LONGEST_NAME = 235  # bytes, so that the whole fits into a file name


class Verified:
    """The file, held by this run. Leaving the `with` block removes it, unless the run was interrupted.

    Args:
        output: what is verified.
        run: what is compared, as JSON has it; all but `step` has to be the same to go on.

    Attributes:
        path: where it is.
        lines: what an earlier run has left, without the first line; empty where there is nothing to go on from.
        differs: what is not as it was when that run began, so that this one begins anew; empty where all is.
        step: that of the run that began; one that no run would have, as `1`, is nothing to go on from.

    Raises:
        OutputError: another run has it, something else is in its place, or it cannot be written.
    """

    def __init__(self, output: Path, run: Mapping[str, Any]) -> None:
        self.output, self.path = output, verified_beside(output)
        self.lines: list[dict[str, Any]] = []
        self.differs: tuple[str, ...] = ()
        self.step, self._run, self._worth_it = int(run["step"]), dict(run), False
        with _refusals_of(self.path):
            self._fd = _locked(self.path, make=True)
            try:
                self._begin()
            except BaseException:
                os.close(self._fd)
                raise

    def _begin(self) -> None:
        content = _content(self.path)
        before, lines, end = _parsed(content)
        self.differs = tuple(
            sorted(
                key for key in (before.keys() | self._run.keys()) - {"step"} if before.get(key) != self._run.get(key)
            )
        )
        if before and not self.differs and is_step(before.get("step")):
            self.lines, self.step, self._worth_it = lines, before["step"], bool(lines)
            os.ftruncate(self._fd, end)
            return
        self.differs = self.differs if before else ()
        os.ftruncate(self._fd, 0)
        self.add(self._run)
        self._worth_it = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Write down what was done."""
        left = written_line(line)
        with _refusals_of(self.path):
            while left:
                left = left[os.write(self._fd, left) :]
        self._worth_it = True

    def __enter__(self) -> Verified:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, OF_NO_USE) and self._worth_it:
            attach_aftermath(error, Aftermath(kept=self.path, output=self.output))
        else:
            with suppress(OSError):
                self.path.unlink()
        os.close(self._fd)


@contextmanager
def _refusals_of(path: Path) -> Iterator[None]:
    """Turn the system's refusals into an `OutputError` that says what the file is for."""
    try:
        yield
    except OSError as error:
        why = error.strerror or error
        raise OutputError(
            f"{path}, where lines verify --resume keeps its progress, cannot be written: {why}",
            hint="Make room or get permission there, or leave out --resume: then nothing is written.",
        ) from error


def forget(output: Path) -> Path | None:
    """Remove what was kept of an output; where it was, or None if there was nothing of ours.

    Raises:
        OutputError: a run is at work on it, or it cannot be removed.
    """
    path = verified_beside(output)
    with _refusals_of(path):
        try:
            fd = _locked(path)
        except FileNotFoundError:
            return None
        except _NotOursError:
            return None
        try:
            path.unlink()
        finally:
            os.close(fd)
    return path


class _NotOursError(OutputError):
    """Something else stands there."""


def _locked(path: Path, *, make: bool = False) -> int:
    """The file, open for appending; no other run may have it.

    Raises:
        OutputError: another run has it, or it is no such file.
        OSError: it is not there (unless it is to be made), or cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | (os.O_CREAT if make else 0)
    flags |= getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(path.lstat().st_mode):  # opening a device may do something
                raise _no_file_of_ours(path)
        try:
            fd = os.open(path, flags, 0o666)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR):
                raise _no_file_of_ours(path) from error
            raise
        try:
            _lock(fd, path)
            _refuse_what_is_not_ours(fd, path)
            if _is_at(fd, path):  # and was not removed by the run that had it before
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise OutputError(f"{path}: another run is verifying this output", hint="Wait until it ends.") from None
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
            raise  # else the filesystem has no locks


def _refuse_what_is_not_ours(fd: int, path: Path) -> None:
    if stat.S_ISREG(os.fstat(fd).st_mode):
        start = bytearray(len(_OURS))
        if _OURS.startswith(start[: read_into(fd, memoryview(start), 0)]):  # it may be empty
            return
    raise _no_file_of_ours(path)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except FileNotFoundError:
        return False


def _no_file_of_ours(path: Path) -> _NotOursError:
    return _NotOursError(
        f"{path} is where --resume keeps its progress, but lines verify did not write this file",
        hint="Move it away, or leave out --resume.",
    )


def _content(path: Path) -> bytes:
    return read_small(path, _LARGEST, follow=False)


def _parsed(content: bytes) -> tuple[dict[str, Any], list[dict[str, Any]], int]:
    """The first line, those behind it as far as they can be read, and where the last of these ends."""
    lines: list[dict[str, Any]] = []
    end = 0
    with suppress(ValueError, RecursionError):
        for value, after in whole_lines(content):
            lines.append(value)
            end = after
    return (lines[0], lines[1:], end) if lines else ({}, [], 0)
