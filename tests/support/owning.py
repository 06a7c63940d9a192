"""A run that is stopped, and what happens meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lines_cli.storage import staging
from lines_cli.storage.files import NewFile
from support.run import run_lines

STAGING = ".out.lines"


EDIT = ["edit", "base", "ft", "-o", "out"]


def stopped(monkeypatch: pytest.MonkeyPatch, *command: str, error: BaseException | None = None) -> Any:
    """A run that is stopped when all its weights are written, before they are flushed."""
    with monkeypatch.context() as patch:

        def sync(_: NewFile) -> None:
            raise error or KeyboardInterrupt

        patch.setattr(NewFile, "sync", sync)
        ran = run_lines(*command)
    assert ran.code != 0
    assert ran.trace == ""
    return ran


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Have something happen while a run writes: before it looks a last time at what it replaces."""
    refuse = staging.Staging._refuse_torn

    def acting(self: staging.Staging) -> None:
        refuse(self)
        act()

    monkeypatch.setattr(staging.Staging, "_refuse_torn", acting)
