"""stdout and stderr that may be closed or full: what can no longer be printed is dropped, and the command goes on. An
output that is in place is not a failure because nobody reads the summary.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from lines_cli.cli.log import Log


class Stream:
    """A text stream that never fails.

    Attributes:
        error: what the system said when it took no more; None as long as it takes everything.
        used: whether any text has been given to it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.error: OSError | None = None
        self.used = False
        self._closed = stream is None  # by whoever started the process: `>&-`
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115

    def write(self, text: str) -> int:
        """Print a text; drop it if the stream takes no more."""
        if text and isinstance(text, str):
            self.used = True
            if self._closed:
                self._give_up(OSError(errno.EBADF, os.strerror(errno.EBADF)))
        if self.error is not None and isinstance(text, str):
            return len(text)
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        except ValueError as error:
            if not self._stream.closed:  # a character that the encoding lacks
                raise
            self._give_up(OSError(errno.EBADF, str(error)))
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Print several."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand everything to the system."""
        if self.error is not None:
            return
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)
        except ValueError:  # closed meanwhile, with nothing left to print
            pass

    def _give_up(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError, ValueError, io.UnsupportedOperation):  # so that Python, at its end, has nothing to flush
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


_in_place: str | None = None


def holds(text: str) -> None:
    """Say what is true whatever can be printed from now on: `out is in place and whole`."""
    global _in_place  # noqa: PLW0603 - there is one process, and one command at a time in it
    _in_place = text


@contextmanager
def watched(*, as_json: bool = False) -> Iterator[Stream]:
    """Within it stdout (which it gives) and stderr never fail; `as_json` has stderr be lines of JSON."""
    global _in_place  # noqa: PLW0603
    before = sys.stdout, sys.stderr
    out, err = (Stream(stream) for stream in before)
    told: Any = Log(cast("TextIO", err)) if as_json else err
    sys.stdout, sys.stderr = cast("TextIO", out), told
    _in_place = None
    try:
        yield out
        out.flush()
        if out.error is not None and (why := _unprinted(out.error)):
            told.write(f"warning: {why}\n")
    finally:
        out.flush()
        if as_json:
            told.close()
        err.flush()
        sys.stdout, sys.stderr = before


def _unprinted(error: OSError) -> str | None:
    """What to say of a stdout that took no more; nothing where whoever reads it had enough, and nothing was made."""
    said = error.strerror or str(error)
    if _in_place is not None:
        return f"{_in_place}; what was done could not be printed (stdout: {said})"
    return None if error.errno == errno.EPIPE else f"not everything could be printed (stdout: {said})"


def occupy() -> None:
    """Where stdin, stdout or stderr were closed for this process, put a way to nowhere in their place: the next file
    that is opened would get the number, and what a library prints would land in it.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
