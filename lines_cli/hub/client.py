"""The Hub's own client, as both directions use it: its settings, its progress bars, and what it says without secrets.

The client decides on endpoint, token, offline mode and, unless it is told, the cache (HF_ENDPOINT, HF_TOKEN,
HF_HUB_OFFLINE, HF_HOME, ...). It is imported only once the Hub is asked: importing it takes longer than reading a
header.

An endpoint, a proxy and a token may be secret, and the client quotes them: what it says is shown and logged without.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from lines_cli.errors import HubError, printable, without_secrets

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>.*))?", re.ASCII | re.DOTALL)
NOT_IN_A_REVISION = re.compile(r"[\s\x00-\x1f\x7f\\:?*~^\[]|\.\.|//|^[/-]|/$|^$")
"""What git allows in no name of a branch, a tag or a commit."""
COMMIT = re.compile(r"[0-9a-f]{40}")

CACHE: ContextVar[Path | None] = ContextVar("CACHE", default=None)
"""The folder in which what is fetched is kept; None for the client's own choice."""


def say(text: str, *, quiet: bool) -> None:
    """A line on stderr, unless it is quiet: fetching takes longer than all else."""
    if not quiet:
        sys.stderr.write(printable(without_secrets(text)) + "\n")
        sys.stderr.flush()


def prepare(name: str, *, quiet: bool) -> None:
    """Import the client; no progress bars where it is quiet, or where stderr is no terminal.

    Raises:
        HubError: it does not accept its settings.
    """
    try:
        from huggingface_hub import HfApi  # noqa: F401 - as much of it as there will be
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ValueError as error:  # it reads its settings then; what it says of them may be part of a password
        raise HubError(
            f"{name}: the Hub's client does not accept its settings",
            hint="Check HF_ENDPOINT and the other HF_ variables in the environment.",
        ) from error
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        disable_progress_bars()


@contextmanager
def discreet() -> Iterator[None]:
    """Within it, logs and warnings hold no credentials."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = hidden(record.getMessage()), None, None
        return True

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        sys.stderr.write(hidden(warnings.formatwarning(message, category, filename, lineno)))

    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    handlers += [logging.lastResort] if logging.lastResort else []
    for handler in handlers:
        handler.addFilter(hide)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


_LIKE_A_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{6,}")


def hidden(text: str) -> str:
    """What the client says without credentials, the token that it found in its own files among them."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    return _LIKE_A_TOKEN.sub("hf_***", without_secrets(text))


def unreachable(error: BaseException, how: str = "cannot be reached") -> str | None:
    """Why the Hub could not be asked; None if it did answer, or never had to.

    Args:
        error: what the client raised.
        how: what is said of the endpoint where the connection failed.

    The client's HTTP library has changed with its versions (requests, httpx, httpx2), so its errors are known by where
    they come from.
    """
    from huggingface_hub import constants, errors

    for cause in chain(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "the Hub is offline (HF_HUB_OFFLINE is set)"
        if (status := status_of(cause)) is not None:
            return f"the Hub reports an error of its own ({status})" if status >= 500 else None
        library = type(cause).__module__.partition(".")[0]
        if library.startswith(("httpx", "httpcore", "requests", "urllib3")) or isinstance(
            cause, ConnectionError | TimeoutError
        ):
            return f"{constants.ENDPOINT} {how} ({type(cause).__name__}: {one_line(cause)})"
    return None


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, the last first."""
    while error is not None:
        yield error
        error = error.__cause__


def one_line(error: BaseException) -> str:
    return next((line.strip() for line in hidden(str(error)).splitlines() if line.strip()), "no reason given")


def is_transient(error: BaseException) -> bool:
    """Whether the same may succeed in a moment: the Hub has too much to do or a fault of its own, or the connection
    broke.
    """
    from huggingface_hub import errors

    if unreachable(error):
        return not any(isinstance(cause, errors.OfflineModeIsEnabled) for cause in chain(error))
    return any(status_of(cause) == 429 for cause in chain(error))


def status_of(error: BaseException) -> int | None:
    """The HTTP status that the Hub answered, if that is what went wrong."""
    from huggingface_hub import errors

    if not isinstance(error, errors.HfHubHTTPError):
        said = _STATUS.search(str(error))  # as hf_xet says it
        return int(said[1]) if said else None
    status = getattr(error.response, "status_code", None)
    return int(status) if status is not None else None


_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3})\b")
