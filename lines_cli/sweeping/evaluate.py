"""Runs an evaluation: a command in a process group of its own, or a Python function in this process."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from lines_cli.errors import RecipeError, printable, size, without_secrets
from lines_cli.sweeping.metrics import Metrics, NonsenseError, metrics_of, read_metrics

_PLACES = re.compile(r"\{(checkpoint|task|seed|id)\}")
_PATIENCE = 5.0  # seconds between asking a process to end and ending it
_STEP = 0.05
_LARGEST_OUTPUT = 2**30  # bytes; who says more is ended
_KEPT = 2**22  # bytes of stdout, and of stderr, from their ends
_SHOWN = 400  # characters of what a failed command said last


@dataclass(frozen=True, slots=True)
class Result:
    """What came of one evaluation: metrics, or why there are none."""

    metrics: Metrics | None
    error: str | None
    seconds: float


def command_for(evaluate: str, **places: object) -> str:
    """The command with its places filled in, each quoted for a shell; other braces stay."""
    return _PLACES.sub(lambda match: shlex.quote(str(places.get(match[1], match[0]))), evaluate)


def run_command(
    command: str, *, log: Path, timeout: float | None, environment: Mapping[str, str], stop: Callable[[], bool]
) -> Result:
    """Run a command, and read the metrics off the last line of its stdout.

    Args:
        command: for a shell.
        log: gets what it says, stderr and then stdout, the last of it.
        timeout: seconds that it may take.
        environment: what it sees beside the environment of this process.
        stop: asked again and again; true ends it.

    Raises:
        KeyboardInterrupt: `stop` said so.
    """
    started = time.monotonic()
    for kind in (".err", ".out"):  # into one that is there an earlier evaluation may still be writing
        log.with_suffix(kind).unlink(missing_ok=True)
    with open(log.with_suffix(".err"), "w+b") as errors, open(log.with_suffix(".out"), "w+b") as output:
        process = subprocess.Popen(  # noqa: S603 - the user's own command line
            ["/bin/sh", "-c", _ONCE_WATCHED, command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=errors,
            env={**os.environ, **environment},
            start_new_session=True,  # so that what it starts can be ended with it
        )
        with _ended_with_this_process(process):
            why = _wait(process, timeout, stop, started, (output, errors))
        said = _end_of(output)
        with open(log, "wb") as file:
            file.write(_end_of(errors) + said)
    for kind in (".err", ".out"):
        log.with_suffix(kind).unlink(missing_ok=True)
    seconds = time.monotonic() - started
    if why is not None:
        return Result(None, f"{why}{_last_words(log)}", seconds)
    if process.returncode:
        code = process.returncode
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return Result(None, f"{how}{_last_words(log)}", seconds)
    try:
        return Result(read_metrics(said.decode("utf-8", "replace")), None, seconds)
    except NonsenseError as error:
        return Result(None, str(error), seconds)


@contextmanager
def _ended_with_this_process(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """End a command and all that it started, in the end; also if this process is ended without a chance to do it: by
    SIGKILL, or by Ray, whose driver was lost, and which ends the children of this process, but not theirs, and then
    this process. Of a pipe that only this process can write to a child's child reads the end then. The command begins
    when that child's child says so, and not at all if nobody is left who could.
    """
    assert process.stdin is not None
    reads, writes = os.pipe()
    try:
        try:
            with process.stdin as begins:
                watch = subprocess.Popen(  # noqa: S603 - of our own words and a number
                    ["/bin/sh", "-c", _WATCH, str(process.pid)],
                    stdin=reads,
                    stdout=begins,
                    stderr=subprocess.DEVNULL,
                    start_new_session=True,
                )
        except BaseException:
            _end(process)
            raise
        try:
            yield
        finally:
            _end(process)  # before it is watched no more: of a command whose shell is gone more may be left
            with suppress(BrokenPipeError):
                os.write(writes, b"over\n")
            watch.wait()
    finally:
        os.close(reads)
        os.close(writes)


_ONCE_WATCHED = """\
read -r LINES_BEGINS || { echo 'no process could be started that ends it with the sweep' >&2; exit 1; }
exec /bin/sh -c "$0" < /dev/null
"""
_WATCH = """\
exec 3<&0
{ echo; exec > /dev/null; read -r said <&3; [ -n "$said" ] || kill -s KILL -- "-$0"; } &
exec > /dev/null
wait
"""


def _wait(
    process: subprocess.Popen[bytes],
    timeout: float | None,
    stop: Callable[[], bool],
    started: float,
    outputs: Sequence[IO[bytes]],
) -> str | None:
    """Wait until it ends; why it has to be ended."""
    while True:
        try:
            process.wait(_STEP)
        except subprocess.TimeoutExpired:
            if stop():
                raise KeyboardInterrupt from None
            if timeout is not None and time.monotonic() - started > timeout:
                return f"took longer than timeout: {timeout:g} s"
            if sum(os.fstat(output.fileno()).st_size for output in outputs) > _LARGEST_OUTPUT:
                return f"printed more than {size(_LARGEST_OUTPUT)}"
        else:
            return None


def _end_of(output: IO[bytes]) -> bytes:
    """The last of what was said."""
    nbytes = output.seek(0, os.SEEK_END)
    output.seek(max(0, nbytes - _KEPT))
    left_out = f"({nbytes - _KEPT:,} bytes before this are left out)\n".encode() if nbytes > _KEPT else b""
    return left_out + output.read(_KEPT)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it and all that it started: first kindly. What it left running after its own end goes, too."""
    for how, patience in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, _PATIENCE)):
        alone = process.poll() is not None
        try:
            os.killpg(process.pid, how)
        except (ProcessLookupError, PermissionError):
            break
        if alone:
            continue
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    process.wait()


def _last_words(log: Path) -> str:
    with suppress(OSError):
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - 4 * _SHOWN))
            lines = [line for line in file.read().decode("utf-8", "replace").splitlines() if line.strip()]
        if lines:
            last = printable(without_secrets(lines[-1].strip()))
            return f": {last[:_SHOWN]} (all of it: {log})"
    return ""


def function_named(name: str, *, where: str) -> Callable[..., Any]:
    """A Python function by `module:function`; modules are looked for in the current folder, too.

    Raises:
        RecipeError: there is none.
    """
    module, _, path = name.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(f"{where}: {name}: {module} cannot be imported: {error}") from error
    except Exception as error:
        raise RecipeError(f"{where}: {name}: importing {module} fails: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        found = getattr(found, part, None)
        if found is None:
            raise RecipeError(f"{where}: {name}: {module} has no {path}")
    if not callable(found):
        raise RecipeError(f"{where}: {name} is a {type(found).__name__}, not a function")
    function: Callable[..., Any] = found
    return function


def call(function: Callable[..., Any], *arguments: Any, log: Path) -> Result:
    """Call a function for metrics; what it raises is a failed evaluation, with its traceback in `log`. What it prints
    goes to stderr.
    """
    started = time.monotonic()
    try:
        with redirect_stdout(sys.stderr):
            metrics = metrics_of(function(*arguments))
    except NonsenseError as error:
        return Result(None, str(error), time.monotonic() - started)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the user's own code
        with suppress(OSError), open(log, "a", encoding="utf-8") as file:
            file.write(traceback.format_exc())
        said = printable(without_secrets(f"{type(error).__name__}: {error}"))[:_SHOWN]
        return Result(None, f"raised {said} (all of it: {log})", time.monotonic() - started)
    return Result(metrics, None, time.monotonic() - started)
