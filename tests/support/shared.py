"""What is dear to make, and the same for all workers of one run of the tests: made by the first that asks."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

_folder: list[Path] = []


def keep_in(folder: Path) -> None:
    """Where: a folder of this run of the tests, which its workers have in common."""
    _folder[:] = [folder]


def once(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gave, in this process or in another: plain values, as JSON has them."""
    if not _folder:
        return make()
    path = _folder[0] / f"{name}.json"
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            path.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(path.read_text(encoding="utf-8"))
