"""The option parser, made to speak as the commands do: help in panels, `error:` and `hint:`, JSON with `--json`, and
one end for everything that is printed.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from lines_cli.cli import log, streams
from lines_cli.cli.options import PANELS, VARIABLES

CODE_UNPRINTED = 7
"""All was done, but stdout was closed or full."""

_UsageError: Any = typer.BadParameter.__base__  # of click, which some versions of typer hold within
_ParserError: Any = _UsageError.__base__
_MOST = 22  # columns that an option and its value take before its help begins on the next line


_given: list[str] = []  # what stands on the command line, before --


def variable_behind(param_or_flags: Any) -> str | None:
    """The variable in the environment that gives an option its value: the command line does not, and it is set."""
    flags = getattr(param_or_flags, "opts", param_or_flags)
    variable = VARIABLES.get(max(flags, key=len, default=""))
    named = any(word in flags or word.partition("=")[0] in flags for word in _given)
    return variable if variable and not named and os.environ.get(variable) else None


class Command(TyperCommand):
    """A command whose help has its options in panels."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """`[OPTIONS] BASE FT`."""
        return [re.sub(r"^\{(\w+)\}$", r"\1", piece) for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Arguments, then each panel's options, their help beginning at one column."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is None:
                continue
            is_argument = param.param_type_name == "argument"
            name, said = (param.metavar or record[0], record[1]) if is_argument else record
            shown = getattr(param, "show_default", None)
            if isinstance(shown, str):
                said = said.replace(f"default: ({shown})", f"default: {shown}")
            panel = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or "Other"
            panels.setdefault(panel, []).append((name, said))
        order = ["Arguments", *PANELS, "Other"]
        width = max((len(name) for rows in panels.values() for name, _ in rows if len(name) <= _MOST), default=0)
        for panel in sorted(panels, key=order.index):
            with formatter.section(panel):
                formatter.write_dl([(name.ljust(width), said) for name, said in panels[panel]], col_max=_MOST)


class Lines(TyperGroup):
    """All commands, and how the process ends."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = "lines",
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,  # noqa: ARG002 - of another system
        **extra: Any,
    ) -> Any:
        """Run what the arguments say.

        Args:
            args: what stands behind `lines`; unless given, those of the process.
            prog_name: what the program is called, by `python -m` too: hints and completion name a command to type.
            complete_var: the variable by which a shell asks for completions.
            standalone_mode: end the process with the exit code; otherwise return, and raise what the parser raises.
            extra: as of the parser.
        """
        given = list(sys.argv[1:] if args is None else args)
        _given[:] = given[: given.index("--")] if "--" in given else given
        with streams.watched(as_json=standalone_mode and log.is_asked_for(given)) as stdout:
            if not standalone_mode:
                return super().main(given, prog_name, complete_var, False, **extra)
            told = log.active()
            code = self._code(given, prog_name, complete_var, stdout, **extra)
        code = code or (CODE_UNPRINTED if stdout.error is not None else 0)
        if told is not None:
            told.event("end", code=int(code))
        sys.exit(code)

    def _code(
        self, given: list[str], prog_name: str | None, complete_var: str | None, stdout: streams.Stream, **extra: Any
    ) -> int:
        json = "--json" in (given[: given.index("--")] if "--" in given else given)
        try:
            code = super().main(given, prog_name, complete_var, False, **extra)
        except _ParserError as error:
            return _refuse(error, given, json=json)
        except typer.Abort:
            return 1
        except SystemExit as end:
            code = end.code
        except Exception as error:
            if json and not stdout.used:
                from lines_cli.cli import console

                console.show_error(
                    1, f"a bug in lines: {type(error).__name__}: {': '.join(map(str, error.args))}", _REPORT
                )
            raise
        return code if isinstance(code, int) else 0


_REPORT = "Please report it, with the traceback on stderr."


def _refuse(error: Any, given: Sequence[str], *, json: bool) -> int:
    """Say what the command line says wrong, as a command says what is wrong with an input; the exit code."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    from lines_cli.cli import console

    message, hint = _in_our_words(error, given)
    console.refuse(message, hint, code=int(error.exit_code))
    if json:
        console.show_error(error.exit_code, message, hint)
    return int(error.exit_code)


def _in_our_words(error: Any, given: Sequence[str]) -> tuple[str, str]:
    """The message and the hint. Versions of the parser differ in what an error holds, and in how it shows it."""
    context, param, kind = getattr(error, "ctx", None), getattr(error, "param", None), type(error).__name__
    command = context.command_path if context is not None else "lines"
    said, *near = re.split(r"\.? (?:\(Possible options: |Did you mean )", error.format_message())
    names = getattr(error, "possibilities", None) or re.findall(r"'([^']+)'", "".join(near))
    if said.startswith("No such command"):
        names = getattr(getattr(context, "command", None), "commands", {})
    hint = f"{command} --help lists what there is."
    if kind == "MissingParameter":
        message = "something is missing" if param is None else f"{_named(param)} is missing"
        if param is not None and param.param_type_name == "option":
            hint = f"Add {_named(param)} {param.metavar or 'VALUE'}. {hint}"
        elif context is not None:
            hint = f"Write {context.get_usage().removeprefix('Usage: ').strip()}."
    elif param is not None and not kind.endswith("OptionUsage"):
        variable = variable_behind(param)
        value = os.environ[variable] if variable else _value(param, given)
        got = f" (got {value!r})" if value is not None and repr(value) not in error.message else ""
        says = f"{variable} says " if variable else ""
        message = f"{says}{_named(param)}: {_plainly(error.message)}{got}"
    else:
        message = (said[:1].lower() + said[1:]).rstrip(". \n")
    asked = getattr(error, "option_name", None) or "".join(re.findall(r"'([^']+)'", message)[:1])
    if names := get_close_matches(asked, set(names) - {"--help"}, n=2, cutoff=0.5):
        hint = f"Did you mean {' or '.join(names)}? {hint}"
    return message, hint


def _plainly(message: str) -> str:
    """What is expected of a value, without the words of the library that checks it."""
    message = message.replace("Value error, ", "").rstrip(". \n")
    message = re.sub(r"Input should be (.*?)(?:, (?:unable to|got) .*)?$", r"expected \1", message)
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return message


_WORDS = {
    "a valid number": "a number",
    "a valid integer": "a whole number",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def _value(param: Any, given: Sequence[str]) -> str | None:
    """What the command line says for an option."""
    for at, word in enumerate(given):
        for name in param.opts:
            if name.startswith("-") and word == name and at + 1 < len(given):
                return given[at + 1]
            if name.startswith("--") and word.startswith(f"{name}="):
                return word.removeprefix(f"{name}=")
    return None


def _named(param: Any) -> str:
    """An option by its long name, an argument as its help shows it."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name)
    return str(max(param.opts, key=len, default=param.name))
