"""One run at a time: a lock on a file in the folder that a run works in."""

from __future__ import annotations

import errno
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from lines_cli.errors import OutputError

try:
    import fcntl
except ImportError:  # no Unix: runs are not kept apart
    fcntl = None  # type: ignore[assignment]

NAME = "lock"
_PATIENCE = 0.3  # seconds: somebody may only be looking, or be about to remove the folder
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)
_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)


class RunLock:
    """Keeps a second run away from a folder.

    Args:
        folder: the staging folder.
        output: what messages name.
        make: the folder, if it is not there.
        shared: others may have it, too, who share it: parts of one run.

    Raises:
        OutputError: another run has it.
        OSError: the folder is not there, or not to be written; or its lock is a link.
    """

    def __init__(self, folder: Path, output: Path, *, make: bool = False, shared: bool = False) -> None:
        path, until = folder / NAME, math.inf
        while True:
            if make:
                try:
                    folder.mkdir(exist_ok=True)
                except FileExistsError:
                    if os.path.lexists(folder):
                        raise
                    continue  # the run that had it removed it this moment
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | _FLAGS, 0o666)
            except FileNotFoundError:
                if make:  # the run that had it removed it this moment
                    continue
                raise
            try:
                taken = _taken(self._fd, shared=shared)
                if not taken and self.holds(path):  # and it was not removed by the run that had it before
                    return
            except BaseException:
                self.release()
                raise
            self.release()
            if taken and time.monotonic() > until:
                raise refusal(folder, output)
            until = min(until, time.monotonic() + _PATIENCE) if taken else until  # from the first look that found it so
            time.sleep(0.01)

    def holds(self, path: Path) -> bool:
        """Whether the file that is locked stands at `path` still."""
        try:
            return os.path.samestat(os.fstat(self._fd), path.lstat())
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Let others in; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_locked(folder: Path) -> bool:
    """Whether a run is at work in a folder. Nothing is written to find out.

    Raises:
        OSError: its lock cannot be read.
    """
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | _FLAGS)
    except FileNotFoundError:
        return False
    try:
        until = math.inf
        while taken := _taken(fd, shared=True):
            if time.monotonic() > until:
                break
            until = min(until, time.monotonic() + _PATIENCE)
            time.sleep(0.01)
        return taken
    finally:
        os.close(fd)


def refusal(folder: Path, output: Path) -> OutputError:
    """What a second run reads."""
    return OutputError(f"{output}: another run is writing it", hint=f"It works in {folder}. Wait until it ends.")


def remove_with(lock: RunLock, folder: Path) -> None:
    """Remove a folder that is empty but for its lock, the lock last: whoever waits for it finds all of it gone, or a
    folder of their own.
    """
    if lock.holds(folder / NAME):
        (folder / NAME).unlink()
    with suppress(OSError):  # another run has just made its lock in it
        folder.rmdir()


def _taken(fd: int, *, shared: bool) -> bool:
    """Try to lock; whether another has it."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return True
        if error.errno not in _NO_LOCKS:
            raise  # else the filesystem has no locks
    return False
