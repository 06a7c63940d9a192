"""The cases of `scaling/depth_cases`, and what a checkpoint of each holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support import shared, zoo

CASES = zoo.load_cases()
PLACED = [case for case in CASES if not case.refuse]


@cache
def saved(build: str) -> tuple[list[str], dict[str, Any]]:
    """The tensor names of a tiny model as it is saved, and its config.json; built once, whatever process asks."""
    names, config = shared.once(f"zoo-{build}", lambda: _built(build))
    return names, config


def _built(build: str) -> tuple[list[str], dict[str, Any]]:
    with TemporaryDirectory() as folder:
        names = zoo.saved_names(zoo.ZOO[build](), Path(folder))
        config = Path(folder) / "config.json"
        return names, json.loads(config.read_text(encoding="utf-8")) if config.exists() else {}


def names_and_config(case: zoo.Case) -> tuple[list[str], Mapping[str, Any]]:
    """What a checkpoint of this case holds."""
    return saved(case.build) if case.build else (list(case.names), case.config)
