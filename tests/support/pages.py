"""The pages of docs/ as programs: their files are written, their commands and their Python run, in the current
folder.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from support.run import run_lines

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str) -> list[tuple[str, str]]:
    """What stands between fences, in order: its kind (`sh`, `python`, or the file it is, as `merge.yaml`) and its text.

    A block is a file if the line before it is the file's name and a colon, as in "`merge.yaml`:".
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.findall(r"(?:^`([\w.-]+)`:\n\n)?^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [(file or kind, body) for file, kind, body in found]


def commands(text: str) -> Iterator[str]:
    """The lines of a block of shell, one command each; a `for` over words is written out."""
    lines = iter(text.replace("\\\n", " ").splitlines())
    for line in lines:
        if match := re.fullmatch(r"for (\w+) in (.*); do", line):
            body = list(iter(lambda: next(lines), "done"))
            for word in match[2].split():
                yield from (inner.strip().replace(f"${match[1]}", word) for inner in body)
        elif line.partition("#")[0].strip():
            yield line


def run_command(line: str) -> None:
    """Run one command, and hold it against what its comment says: `# ends with 3`, else 0."""
    words = shlex.split(line, comments=True)
    said = re.search(r"# .*ends with (\d+)", line)
    expected = int(said[1]) if said else 0
    if words[0] == "lines":
        ran = run_lines(*words[1:])
        assert (ran.code, ran.trace) == (expected, ""), f"{line}\n{ran.err}"
    else:
        assert subprocess.run(["sh", "-c", line], check=False).returncode == expected, line


def run_page(page: str) -> dict[str, Any]:
    """Run a page from its first block to its last. Returns what its Python has defined."""
    names: dict[str, Any] = {}
    for kind, text in blocks(page):
        if kind == "sh":
            for line in commands(text):
                run_command(line)
        elif kind == "python":
            exec(compile(text, f"docs/{page}", "exec"), names)
        elif "." in kind:
            Path(kind).write_text(text, encoding="utf-8")
        else:
            raise AssertionError(f"docs/{page}: what is a block of {kind}?")
    return names
