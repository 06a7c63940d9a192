"""Every way lines refuses, and the exit code each family of refusals ends with.

    LinesError
    |-- RecipeError          2   an option or a recipe key says something impossible
    |-- CheckpointError      3   an input cannot be found or read
    |   |-- ChangedInputError    it is not, or no longer, what it was when the run began
    |   |-- HubError
    |   `-- UnsupportedError     readable, but a kind of checkpoint lines does not edit (quantised, a pickled module)
    |-- MismatchError        4   two inputs disagree (names, shapes), or with each other's config
    |   `-- DepthError           no single reading of which tensor stands at which depth
    |-- DataError            5   the numbers themselves: NaN, Inf, overflow; or they are not what a recipe makes
    |-- OutputError          6   the destination: exists, is an input, cannot be written, no space
    `-- PushError            8   the Hub does not take an output; what is on the disk stays as it is

A message names the file, the tensor and both inputs of the disagreement; `hint` is the next step, where there is
one. `cli.app` is the only place that turns these into text and an exit code.

What a library says may hold a password or a token; no message shows one (`without_secrets`).
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote, unquote


class LinesError(Exception):
    """A refusal with a message for the person who ran the command.

    Args:
        message: what is wrong, naming the file and the tensor.
        hint: what to do next.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        message = "\n".join(_shortened(line, _LONGEST_READ) for line in as_known(message).split("\n"))
        message = "\n".join(_shortened(line, _LONGEST_LINE) for line in without_secrets(message).split("\n"))
        super().__init__(message)
        self.message = message
        self.hint = None if hint is None else without_secrets(as_known(hint))


_known_as: dict[str, str] = {}


def know_as(folder: Path, url: str) -> None:
    """Have messages name what a person knows, in place of a folder of this process into which it is fetched.

    Args:
        folder: which is gone when the message is read.
        url: what it holds files of.
    """
    _known_as[str(folder)] = url


def as_known(text: str) -> str:
    """A text with what a person knows in place of such folders."""
    for folder, url in _known_as.items():
        text = text.replace(folder, url)
    return text


_LONGEST_LINE = 1000
_LONGEST_READ = 20_000  # of what is looked through for secrets


def _shortened(line: str, longest: int) -> str:
    """A line of a message, without the middle where a stranger's name makes it very long."""
    if len(line) <= longest:
        return line
    end = longest // 4
    return f"{line[: longest - end]} [...] {line[-end:]}"


class RecipeError(LinesError):
    """What was asked for is impossible, whatever the checkpoints hold."""

    exit_code = 2


class CheckpointError(LinesError):
    """An input is missing, malformed or truncated."""

    exit_code = 3


class ChangedInputError(CheckpointError):
    """An input is not, or no longer, what it was when its header was read: what was made of it is of no use."""


class HubError(CheckpointError):
    """The Hugging Face Hub could not give what was asked of it."""


class UnsupportedError(CheckpointError):
    """A well-formed input of a kind that lines does not edit."""


class MismatchError(LinesError):
    """The inputs do not fit together."""

    exit_code = 4


class DepthError(MismatchError):
    """Tensor names leave open which tensor stands at which depth."""


class DataError(LinesError):
    """A NaN or Inf in an input, or a value the output dtype cannot hold.

    Attributes:
        report: of `inspect` with `check`: what was inspected, in which something is wrong.
    """

    exit_code = 5
    report: dict[str, Any] | None = None


class OutputError(LinesError):
    """The destination is in the way, is an input, or cannot be written."""

    exit_code = 6


class PushError(LinesError):
    """An output could not be put on the Hugging Face Hub; on the disk it is as it was."""

    exit_code = 8


OF_NO_USE = (DataError, ChangedInputError, MismatchError, RecipeError)
"""Errors after which what was finished is of no use: it is made of an input that changed, or would be refused again."""


@dataclass(frozen=True, slots=True)
class Aftermath:
    """What an error leaves of the run that it ended.

    Attributes:
        kept: the folder in which what was finished is kept, to `resume` from; None where nothing is.
        in_place: the destination, if the new output had taken its place before; None where that is as it was.
        output: the destination, to name in the commands that go on from there.
        unpushed: of an output that was being put on the Hub: the command that goes on with it.
        state: what has become of the destination, in words, where it is not as it was.
    """

    kept: Path | None = None
    in_place: Path | None = None
    output: Path | None = None
    unpushed: str | None = None
    state: str | None = None


def attach_aftermath(error: BaseException, aftermath: Aftermath) -> None:
    """Have an error say what it leaves."""
    error.aftermath = aftermath  # type: ignore[attr-defined]


def aftermath_of(error: BaseException) -> Aftermath:
    """What an error leaves; nothing, where no run had begun."""
    found = getattr(error, "aftermath", None)
    return found if isinstance(found, Aftermath) else Aftermath()


_HIDDEN = "***"
_SECRETS = (  # what stands for a secret, and what is left of it
    (re.compile(r"(?<=://)[^\s/?#'\"<>]*@"), f"{_HIDDEN}@"),  # http://user:password@host
    (re.compile(r"(?<=%2F%2F)[^\s/&]{0,100}?%40", re.IGNORECASE), f"{_HIDDEN}%40"),  # the same within a query
    (
        re.compile(
            r"([?&;][\w.%-]{0,60}(?:token|key|secret|sig|passw|pwd|auth|credential|policy)[\w.%-]{0,60}=)[^\s&#'\"<>]+",
            re.IGNORECASE,
        ),
        rf"\1{_HIDDEN}",
    ),
    (
        re.compile(r"\b((?:token|secret|password|passwd|api_?key)=[\"']?)[^\s&'\",;)]+", re.IGNORECASE),
        rf"\1{_HIDDEN}",
    ),
    (
        re.compile(
            r"\b(authorization\b[\"']?\s*[,:=]\s*(?:b(?=[\"']))?[\"']?)(?:[a-z]+\s+)?[^\s\"',;)]+", re.IGNORECASE
        ),
        rf"\1{_HIDDEN}",
    ),
    (re.compile(r"\b((?:set-)?cookie[\"']?\s*[,:=]\s*)[^\r\n]+", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"\b(bearer\s+)[^\s\"',;)]{6,}", re.IGNORECASE), rf"\1{_HIDDEN}"),
    (re.compile(r"\b([Bb]asic\s+)(?=[a-z+/]*[A-Z0-9=])[\w+/=]{6,}"), rf"\1{_HIDDEN}"),
    (re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{16,}"), rf"\1_{_HIDDEN}"),  # the Hub's tokens
)
_HOLD_SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AZURE_STORAGE_ACCOUNT_KEY",
)
_SHORTEST = 4  # characters of a password that is looked for wherever it stands


def without_secrets(text: str) -> str:
    """A text without the credentials in it: the user and password of a URL, tokens in its query, headers that log in,
    the Hub's tokens; and what this process has been given as such, wherever it stands.
    """
    for secret in _own_secrets():
        text = text.replace(secret, _HIDDEN)
    for pattern, left in _SECRETS:
        text = pattern.sub(left, text)
    return text


def _own_secrets() -> list[str]:
    """The tokens and passwords in the environment, as they may be spelt; the longest first."""
    found: set[str] = set()
    for name, value in os.environ.items():
        if name in _HOLD_SECRETS:
            found.add(value.strip())
        elif name == "HF_ENDPOINT" or name.lower().endswith("_proxy"):
            rest = value.partition("://")[2] or value
            login = rest.partition("/")[0].rpartition("@")[0] or rest.rpartition("@")[0]
            password = login.partition(":")[2]
            found |= {login, password, unquote(password), quote(password, safe=""), quote(unquote(password), safe="")}
    return sorted((secret for secret in found if len(secret) >= _SHORTEST), key=len, reverse=True)


def printable(text: str) -> str:
    """A name from a stranger's file as one line without control characters, so that it cannot steer a terminal."""
    return text if text.isprintable() else "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def as_argument(path: object) -> str:
    """A path as the argument of a command in a hint: quoted for a shell, and not to be taken for an option."""
    text = str(path)
    return shlex.quote(f"./{text}" if text.startswith("-") else text)


def tidied(name: str) -> str:
    """A path without doubled slashes and steps back, as its letters tell; a URL as it is."""
    return name if "://" in name else os.path.normpath(name)


def in_short(path: object) -> str:
    """A path without `..` in its middle, where it leads to the same place without; a Hub id as it is."""
    text = str(path)
    short = tidied(text)
    if ".." not in text.split(os.sep) or os.path.realpath(short) != os.path.realpath(text):
        return text
    return short if os.path.isabs(short) or short.startswith(".") else f"./{short}"


def size(nbytes: float) -> str:
    """Bytes as people say them, decimal: `3.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first `limit` names, one to an indented line, and how many more there are."""
    shown = [f"  {printable(name)}" for name in names[:limit]]
    if len(names) > limit:
        shown.append(f"  ... and {len(names) - limit:,} more")
    return "\n".join(shown)
