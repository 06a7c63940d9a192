"""Write docs/cli.md from the commands' own help, docs/merge-methods.md from the table of methods, and what the
commands in README.md and docs/tour.md print. A test checks that all are fresh.

python docs/generate.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import typer.main
from typer.testing import CliRunner

from lines_cli.cli.app import EXIT_CODES, app
from lines_cli.methods import METHODS, Method
from lines_cli.methods.parameters import Parameter
from rerun import rerun

HERE = Path(__file__).parent


def cli_reference() -> str:
    """The whole page, as Markdown."""
    parts = ["# Command line", "Written by `make docs` from `--help`: change the code, not this page."]
    for command in ([], *([name] for name in sorted(app_commands()))):
        parts += [f"## `{' '.join(['lines', *command])}`", f"```text\n{help_of(command)}\n```"]
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    parts += ["## Exit codes", f"| code | meaning |\n|---|---|\n{codes}"]
    return "\n\n".join(parts) + "\n"


_WRITTEN = (
    "Written by `make docs` from the table of methods: change the code, not this page. [Merging](merging.md) shows how "
    "to write a recipe, and [what each method computes](merging.md#exactly-these-bits), to the bit."
)


def methods_reference() -> str:
    """The page of merge methods, as Markdown."""
    parts = [
        "# Merge methods",
        _WRITTEN,
        *(_method(name, method) for name, method in METHODS.items()),
    ]
    return "\n\n".join(parts) + "\n"


def _method(name: str, method: Method) -> str:
    least, most = method.models
    models = f"{least}" if least == most else f"{least} or more"
    takes = f"Takes {method.takes}{', so it needs a base' if method.takes == 'task vectors' else ''}; models: {models}."
    rows = [
        f"| `{key}` | {_values(known)} | {_default(known)} | {_about(known)} |"
        for key, known in method.parameters.items()
    ]
    table = "\n".join(["| parameter | values | default | what it is |", "|---|---|---|---|", *rows])
    return f"## `{name}`\n\n{method.about} {takes}\n\n{table}"


def _values(parameter: Parameter) -> str:
    return parameter.expected().removeprefix("a ").removeprefix("number from ")


def _default(parameter: Parameter) -> str:
    if parameter.default is None:
        return ""
    return f"{parameter.default:g}" if isinstance(parameter.default, float) else f"`{str(parameter.default).lower()}`"


def _about(parameter: Parameter) -> str:
    more = [
        text
        for text, holds in (
            ("may differ by model", parameter.per_model),
            ("may vary over depth and names", parameter.varies),
        )
        if holds
    ]
    return parameter.about + (f" ({'; '.join(more)})" if more else "")


def app_commands() -> list[str]:
    """The names of all commands."""
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def help_of(command: list[str]) -> str:
    """What `lines COMMAND --help` prints on a terminal of 80 columns."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="lines", env={"COLUMNS": "80", "NO_COLOR": "1"})
    return result.stdout.strip()


PAGES: dict[Path, Callable[[], str]] = {HERE / "cli.md": cli_reference, HERE / "merge-methods.md": methods_reference}
PAGES |= {page: partial(rerun, page) for page in (HERE / "tour.md", HERE.parent / "README.md")}


if __name__ == "__main__":
    for page, text in PAGES.items():
        page.write_text(text(), encoding="utf-8")
