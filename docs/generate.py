"""Write docs/cli.md from the commands' own help, so that the two cannot differ (a test holds that the page is fresh).

python docs/generate.py
"""

from __future__ import annotations

from pathlib import Path

import typer.main
from typer.testing import CliRunner

from lines_cli.cli import EXIT_CODES, app

PAGE = Path(__file__).with_name("cli.md")


def cli_reference() -> str:
    """The whole page, as Markdown."""
    parts = ["# Command line", "Written by `make docs` from `--help`: change the code, not this page."]
    for command in ([], *([name] for name in sorted(app_commands()))):
        parts += [f"## `{' '.join(['lines', *command])}`", f"```text\n{help_of(command)}\n```"]
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    parts += ["## Exit codes", f"| code | meaning |\n|---|---|\n{codes}"]
    return "\n\n".join(parts) + "\n"


def app_commands() -> list[str]:
    """The names of all commands."""
    return list(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def help_of(command: list[str]) -> str:
    """What `lines COMMAND --help` prints on a terminal of 80 columns."""
    result = CliRunner().invoke(app, [*command, "--help"], prog_name="lines", env={"COLUMNS": "80", "NO_COLOR": "1"})
    return result.stdout.strip()


if __name__ == "__main__":
    PAGE.write_text(cli_reference(), encoding="utf-8")
