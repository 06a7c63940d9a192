"""Write docs/cli.md from the commands' own help, docs/merge-methods.md from the table of methods, and what the
commands in README.md and docs/tour.md print. A test checks that all are fresh.

python docs/generate.py
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from lines_cli.cli.app import EXIT_CODES, app
from lines_cli.methods import CALIBRATIONS, METHODS, Method
from lines_cli.methods.parameters import Parameter
from lines_cli.methods.sparsify import ByMagnitude
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
        _overview(),
        *(_method(name, method) for name, method in METHODS.items()),
    ]
    return "\n\n".join(parts) + "\n"


_COLUMNS = ("method", "paper", "sees", "passes", "memory", "parameters", "when to use it")
_OF_THE_TABLE = (
    "A pass reads everything that is merged once; the passes named in the table come before the one that writes, where "
    "the parameters ask for them (`sums`: what angles, norms or variances follow from). `alpha: auto` takes one more, "
    "except for plain sums. What sees whole tensors holds those of all models in each worker, tensor by tensor, and "
    "beside them the space that stands there for one of 4096 x 11008 entries. `lambda` and `weight` are not listed."
)
_OF_CALIBRATIONS = (
    "[Calibrations](merging.md#calibration) go on top of every method. They see whole matrices, and hold those of all "
    "models once more."
)


def _overview() -> str:
    """All methods in one table, and what its columns mean."""
    rows = ["| " + " | ".join(_COLUMNS) + " |", "|---" * len(_COLUMNS) + "|"]
    rows += [f"| {' | '.join(_row(name, method))} |" for name, method in METHODS.items()]
    of_methods = "\n".join(rows) + f"\n\n{_OF_THE_TABLE}"
    columns = ("`calibrate`", "what it is", "paper", "memory", "when to use it")
    rows = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for name, known in CALIBRATIONS.items():
        memory = f"whole tensors and {_in_gb(known.workspace(_LARGE, False))}"
        rows.append(f"| `{name}` | {known.about} | {_paper(known.paper)} | {memory} | {known.use} |")
    return f"{of_methods}\n\n{_OF_CALIBRATIONS}\n\n" + "\n".join(rows)


def _paper(number: str) -> str:
    return f"[{number}](https://arxiv.org/abs/{number})" if number else ""


def _row(name: str, method: Method) -> tuple[str, ...]:
    paper = _paper(method.paper)
    whole = method.sees == "tensors"
    memory = f"whole tensors and {_in_gb(method.workspace(_LARGE))}" if whole else "chunks"
    if whole and not method.sees_whole(_defaults(method)):
        memory = f"chunks; with other parameters {memory}"
    own = ", ".join(f"`{key}`" for key in method.parameters if key not in ("lambda", "weight"))
    return f"[`{name}`](#{name})", paper, method.sees, _passes(method), memory, own, method.use


_LARGE = (4096, 11008)


def _in_gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def _passes(method: Method) -> str:
    """The pass that writes, and what is measured before it."""
    first = _defaults(method)
    measured = ["thresholds"] if isinstance(method.sparsifier, ByMagnitude) else []
    measured += ["L1 norms"] if "l1" in _all_needs(method, first) else []
    measured += ["sums"] if "sums" in _all_needs(method, first) else []
    measured += ["signs"] if method.elect is not None else []
    return ", ".join((*measured, "1"))


def _defaults(method: Method) -> dict[str, Any]:
    """Its parameters where a recipe says nothing, of one model."""
    return {key: (known.default,) if known.per_model else known.default for key, known in method.parameters.items()}


def _all_needs(method: Method, values: dict[str, Any]) -> frozenset[str]:
    """What it may need: with every choice of each parameter that has some."""
    needs: frozenset[str] = method.needs({**values, "density": (0.5,)})
    for key, known in method.parameters.items():
        for choice in known.choices.values():
            needs |= method.needs({**values, "density": (0.5,), key: (choice,) if known.per_model else choice})
    return needs


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
