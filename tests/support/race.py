"""One of several processes that write one destination over and over: what became of each of its runs, as JSON.

An output that is seen whole stays so until it is replaced: what is read of it through an open folder counts if that
folder still stands at the destination afterwards.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from pathlib import Path

import lines_cli as lines
from lines_cli.errors import OutputError
from lines_cli.storage.digest import record_of

ALLOWED = ("another run is writing it", "has changed while the new output was written", "exists", "was created while")


def whole(out: Path) -> str:
    """Whether every file that the recipe records is there as it was written; 'replaced' where that cannot be told."""
    try:
        fd = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return "absent"
    try:
        held: dict[str, bytes | None] = {}
        for name in ("lines_recipe.yaml", "model.safetensors", "config.json", "README.md", "vocab.txt"):
            try:
                with os.fdopen(os.open(name, os.O_RDONLY, dir_fd=fd), "rb") as file:
                    held[name] = file.read()
            except FileNotFoundError:
                held[name] = None
        try:
            if not os.path.samestat(os.fstat(fd), out.stat()):
                return "replaced"
        except FileNotFoundError:
            return "replaced"
    finally:
        os.close(fd)
    if None in held.values():
        return "torn"
    copy = Path(f"seen-{os.getpid()}.yaml")
    copy.write_bytes(held["lines_recipe.yaml"] or b"")
    recipe = lines.load_recipe(copy)
    files = recipe.files | ({"README.md": recipe.card} if recipe.card else {})
    return "whole" if all(record_of(held[name] or b"") == record for name, record in files.items()) else "torn"


def main(folder: Path, seconds: float, alpha: float) -> None:
    """Write until the time is over, and a few times at least."""
    os.chdir(folder)
    recipe = lines.edit_recipe("base", "ft", alpha=alpha)
    lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path(f"warm-{alpha}")))  # imports all that it needs
    until, seen = time.monotonic() + seconds, Counter[str]()
    while time.monotonic() < until or seen.total() < 20:  # a run counts twice: what became of it, and what was seen
        try:
            lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path("out")), force=True)
            seen["published"] += 1
        except OutputError as error:
            known = next((words for words in ALLOWED if words in error.message), error.message)
            seen[f"refused: {known}"] += 1
        seen[f"seen {whole(Path('out'))}"] += 1
    print(json.dumps(seen))
