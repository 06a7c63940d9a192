"""The command line in process, and with the rights of nobody."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from typer.main import get_command

from support.files import write_checkpoint


@dataclass(frozen=True)
class Ran:
    """What one command ended with; `trace` holds the traceback of an exception that reached its user."""

    code: int
    out: str
    err: str
    trace: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@cache
def command() -> Any:
    """What the options declare, read once, not in each of thousands of runs."""
    from lines_cli.cli.app import app

    return get_command(app)


def run_lines(*args: object) -> Ran:
    """Run `lines ARGS` in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    code, trace = 0, ""
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            command().main([str(arg) for arg in args], prog_name="lines")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # noqa: BLE001 - whatever it is, it has reached the user
            code, trace = 1, traceback.format_exc()
    told = []
    for stream in (out, err):
        stream.flush()
        told.append(stream.buffer.getvalue().decode())  # type: ignore[attr-defined]
    return Ran(code, *told, trace)


def ran(*args: object) -> Ran:
    """The same, of what has to succeed."""
    done = run_lines(*args)
    assert not done.trace, done.trace
    assert done.code == 0, done.err
    return done


def refused(code: int, *args: object) -> str:
    """The same, of what has to end with this exit code: what it says on stderr, where no credential is to stand."""
    done = run_lines(*args)
    assert not done.trace, done.trace
    assert done.code == code, (done.code, done.err)
    assert "secret" not in done.err
    return done.err


@contextmanager
def as_nobody() -> Iterator[Path]:
    """A fresh folder, and no more rights than an ordinary user's (root is bound by no mode)."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    small = {f"layers.{i}.weight": torch.ones(2) for i in range(2)}
    for flags in ([], ["--force"], ["--dry-run"]):  # imports all it needs, which an ordinary user may not read
        base, ft = (write_checkpoint(folder / name, small, config={"model_type": "tiny"}) for name in ("base", "ft"))
        run_lines("edit", base, ft, "-o", folder / "out", *flags)
    for path in folder.iterdir():
        shutil.rmtree(path)
    root = os.getuid() == 0
    try:
        if root:
            os.setresuid(65534, 65534, 0)
        yield folder
    finally:
        if root:
            os.setresuid(0, 0, 0)
        for path in [folder, *folder.rglob("*")]:
            path.chmod(0o777)
        shutil.rmtree(folder)
