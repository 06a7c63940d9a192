"""stderr as lines of JSON, for a job that nobody watches: one object a line, whatever is printed (docs/json.md)."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, TextIO

from lines_cli.errors import printable, without_secrets
from lines_cli.version import ABOUT

FLAG, VARIABLE = "--log-json", "LINES_LOG_JSON"
_YES = "1 true t yes y on".split()  # what the option parser takes for it


def is_asked_for(given: Sequence[str]) -> bool:
    """Whether a command line, or the environment, asks for it; needed before the command line is parsed."""
    options = given[: given.index("--")] if "--" in given else given
    return FLAG in options or os.environ.get(VARIABLE, "").strip().lower() in _YES


class Log:
    """A text stream each of whose lines becomes an object."""

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._begun, self._rest = stream, time.monotonic(), ""
        self._lock = threading.RLock()

    def event(self, kind: str, **values: Any) -> None:
        """Write an object: the kind of event, the seconds since the command began, and these values."""
        seconds = round(time.monotonic() - self._begun, 3)
        line = json.dumps({**ABOUT, "event": kind, "seconds": seconds, **values}, allow_nan=False)
        with self._lock:
            self._stream.write(line.replace("\x7f", "\\u007f") + "\n")
            self._stream.flush()

    def write(self, text: str) -> int:
        """Take a text; each whole line of it becomes a `message`."""
        with self._lock:
            *lines, self._rest = (self._rest + text).split("\n")
            for line in lines:
                self._say(line)
        return len(text)

    def _say(self, line: str) -> None:
        if line.strip():
            self.event("message", message=printable(without_secrets(line.rstrip("\r"))))

    def writelines(self, lines: list[str]) -> None:
        """Take several."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hand what was written to the system; the beginning of a line waits for its end."""
        self._stream.flush()

    def close(self) -> None:
        """Write what is left, without its end."""
        with self._lock:
            rest, self._rest = self._rest, ""
            self._say(rest)

    def isatty(self) -> bool:
        """No: nothing is drawn on it."""
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def active() -> Log | None:
    """The log, where stderr is one."""
    return sys.stderr if isinstance(sys.stderr, Log) else None
