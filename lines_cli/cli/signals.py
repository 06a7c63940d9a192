"""Signals that ask the process to end: Ctrl-C, SIGTERM, SIGHUP. While it starts there is nothing to clean up, and it
ends at once; a command at work is ended by an exception; once it is done, they come too late.

Nothing here may be slow to import: it is the first thing that `lines` does.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


WORKS_IN = "lines_cli.cli.app"
"""The module whose frame stands below all that a command does."""


class Signalled(KeyboardInterrupt):
    """A signal that asks the process to end: it is cleaned up after as Ctrl-C is."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = signal.Signals(number)


_at_work = False
_raised: Signalled | None = None
_ignored: list[int] = []  # those that come too late
_code: int | None = None  # with which the process leaves


def install() -> None:
    """Take care of these signals from now on, those apart that the parent has this process ignore, as nohup does."""
    atexit.unregister(_leave)
    atexit.register(_leave)  # before any library's, and so after them
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)


def _end(number: int, frame: FrameType | None) -> None:
    global _raised  # noqa: PLW0603 - as below
    if _at_work and _imports(frame):
        _thread.start_new_thread(_again_soon, (number,))
        return
    if _at_work:
        _raised = Signalled(number)
        raise _raised
    # An exception would be swallowed, or abort the process, in whatever library is being imported.
    told = f"error: interrupted ({signal.Signals(number).name}) before anything was written\n"
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, told.encode())
    os._exit(128 + number)


def leave_with(code: int) -> None:
    """Have the process end with this code once Python has tidied up, and no library be torn down: interrupted while it
    starts its threads, a library may abort at that, and the process end with another code.
    """
    global _code  # noqa: PLW0603 - as above
    _code = code


def _leave() -> None:
    if _code is not None:
        for stream in (sys.stdout, sys.stderr):
            with suppress(AttributeError, OSError, ValueError):  # closed, or none
                stream.flush()
        os._exit(_code)


def raised() -> Signalled | None:
    """What a signal has raised, if one has; a library may have made something else of it, as pydantic's core does."""
    return _raised


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported where a signal came. An exception would leave it half made in `sys.modules`,
    for the message to stumble over; and C code within, as PyYAML's, swallows it.
    """
    while frame is not None and frame.f_globals.get("__name__") != WORKS_IN:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _again_soon(number: int) -> None:
    time.sleep(0.01)
    os.kill(os.getpid(), number)


@contextmanager
def at_work() -> Iterator[None]:
    """Within it the signals raise `Signalled`; behind it they come too late."""
    global _at_work, _raised  # noqa: PLW0603 - there is one process, and one command at a time in it
    before, _at_work, _raised = _at_work, True, None
    try:
        yield
    finally:
        too_late()
        _at_work = before


def too_late() -> None:
    """Ignore them from now on: the output is being put into place, or all is done and said. What is left to do takes a
    moment, and a process that was stopped in it could not say whether the destination is as it was.
    """
    for number in ENDING:
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.SIG_IGN)
            _ignored.append(number)


def again() -> None:
    """Mind them again: the output is in place, and what comes now takes its time."""
    while _ignored:
        signal.signal(_ignored.pop(), _end)
