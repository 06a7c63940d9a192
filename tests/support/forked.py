"""A process of one's own for a hundredth of its price: a fork of this one, which has imported all that is needed.

For what a process alone has: signals, limits, an environment, an exit code. What Python does when it starts, and torch
when it is imported, it does not test.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

Program = Callable[[], object]


def command(*args: object) -> Program:
    """`lines ARGS`, as the console script runs it."""

    def run() -> None:
        from lines_cli.__main__ import main

        sys.argv = ["lines", *map(str, args)]
        main()

    return run


def allow_more_memory(nbytes: int) -> None:
    """Limit this process to the address space that it has taken, and so many bytes more, where that can be told."""
    import resource

    with suppress(FileNotFoundError):
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (taken + nbytes, taken + nbytes))


@dataclass(frozen=True)
class Ended:
    """What a fork ended with; a negative code is a signal's."""

    returncode: int
    stdout: str
    stderr: str


def run(program: Program, *, timeout: float = 120, **options: Any) -> Ended:
    """Run a program in a fork to its end; the options are those of `Forked`."""
    with Forked(program, **options) as fork:
        out, err = fork.communicate(timeout)
    assert fork.returncode is not None
    return Ended(fork.returncode, out, err)


class Forked:
    """A program in a fork, with as much of `subprocess.Popen` as tests need.

    Args:
        program: what is run; it ends as a Python program would: 0, the code of a SystemExit, or 1 and a traceback.
        cwd: where.
        env: the whole environment, or this process's.
        stdout, stderr: descriptors to write to, or files that `communicate` reads.
        fresh: modules, and all below them, that are imported anew: they read the environment when they are imported.
    """

    def __init__(
        self,
        program: Program,
        *,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        fresh: Iterable[str] = (),
    ) -> None:
        self.returncode: int | None = None
        self._files = [tempfile.TemporaryFile(), tempfile.TemporaryFile()]  # noqa: SIM115 - closed on leaving
        given = [file.fileno() if fd is None else fd for file, fd in zip(self._files, (stdout, stderr), strict=True)]
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # other threads: the Hub's, xdist's; none holds a lock
            self.pid = os.fork()
        if self.pid == 0:
            _child(program, cwd, env, given, tuple(fresh))

    def poll(self) -> int | None:
        """The code if it has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        """The code once it has ended; it is killed if that takes too long."""
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                self.kill()
                raise AssertionError(f"it did not end: {self.read()}")
            time.sleep(0.002)
        return code

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """What it has written to stdout and stderr once it has ended."""
        self.wait(timeout)
        return self.read()

    def read(self) -> tuple[str, str]:
        """What it has written so far."""
        out, err = (os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode() for file in self._files)
        return out, err

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> Forked:
        return self

    def __exit__(self, *_: object) -> None:
        if self.poll() is None:
            self.kill()
            self.wait()
        for file in self._files:
            file.close()


def _child(
    program: Program, cwd: Path | str | None, env: Mapping[str, str] | None, fds: list[int], fresh: tuple[str, ...]
) -> NoReturn:
    code = 1
    try:
        faulthandler.disable()  # whose file is closed next
        _only(os.open(os.devnull, os.O_RDONLY), *fds)
        sys.stdin = sys.__stdin__ = open(0)  # noqa: SIM115
        encoding = (env or os.environ).get("PYTHONIOENCODING") or "utf-8"
        sys.stdout = sys.__stdout__ = open(1, "w", encoding=encoding)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", 1, encoding=encoding, errors="backslashreplace")  # noqa: SIM115
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if cwd is not None:
            os.chdir(cwd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        for name in [name for name in sys.modules if f"{name}.".startswith(tuple(f"{one}." for one in fresh))]:
            del sys.modules[name]
        for name in fresh:  # its handlers write to what stderr was then
            logging.getLogger(name).handlers.clear()
        code = _code_of(program)
    except BaseException:  # noqa: BLE001 - whatever it is, pytest must not go on in two processes
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(BaseException):
                stream.flush()
        os._exit(code)


def _only(*fds: int) -> None:
    """Leave open these descriptors alone, as 0, 1, 2."""
    aside = [os.dup(fd) for fd in fds]  # one may be in another's place
    for target, fd in enumerate(aside):
        os.dup2(fd, target)
    os.closerange(3, min(2**16, os.sysconf("SC_OPEN_MAX")))


def _code_of(program: Program) -> int:
    try:
        program()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    return 0
