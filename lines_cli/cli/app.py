"""The command line: which commands there are, and the one place where an exception becomes a message and an exit
code.
"""

from __future__ import annotations

import functools
import gc
import io
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from lines_cli.cli import signals
from lines_cli.cli.clean import clean
from lines_cli.cli.edit import edit
from lines_cli.cli.inspect import inspect
from lines_cli.cli.merge import merge
from lines_cli.cli.verify import verify
from lines_cli.errors import LinesError, aftermath_of, as_argument
from lines_cli.version import __version__

EXIT_CODES = {
    0: "done; or, with --dry-run, the headers show no problem",
    1: "out of memory; or a bug in lines: please report it with the traceback",
    2: "the command line or the recipe says something impossible",
    3: "an input cannot be found or read, or is of a kind lines does not edit",
    4: "the inputs do not fit together, or depth cannot be decided from the names",
    5: "NaN or Inf in an input, or a value that the output dtype cannot hold; lines inspect --check found something; "
    "lines verify found a difference",
    6: "the destination exists, is an input, or cannot be written",
    130: "interrupted (Ctrl-C), and the destination is as it was (129: SIGHUP, 143: SIGTERM)",
}
"""What the process ends with."""

app = typer.Typer(
    name="lines",
    help="Edit and merge model checkpoints so that a model keeps what it learnt and stops forgetting what it knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it reads well without colour, and starts faster
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(**options: Any) -> None:
        try:
            with signals.at_work():
                command(**options)
        except (LinesError, KeyboardInterrupt, MemoryError) as error:
            signals.too_late()
            raise typer.Exit(_say(error, writes=command in (edit, merge))) from error

    return guarded


def _say(error: BaseException, *, writes: bool) -> int:
    """Say why a command ends, and what it leaves; the exit code.

    Args:
        error: what ended it.
        writes: whether the command writes a destination.
    """
    from lines_cli.cli import console

    aftermath, code = aftermath_of(error), 1
    match error:
        case LinesError():
            console.refuse(error.message, error.hint)
            code = error.exit_code
        case KeyboardInterrupt():
            number = error.number if isinstance(error, signals.Signalled) else signal.SIGINT
            if aftermath.in_place is not None:
                console.remark(f"interrupted ({number.name}) after {aftermath.in_place} was in place: it is whole")
                code = 0
            else:
                unchanged = "; the destination is as it was" if writes else ""
                console.refuse(f"interrupted ({number.name}){unchanged}")
                code = 128 + number
        case _:
            message = ": ".join(filter(None, ("out of memory", str(error))))
            console.refuse(message, "Try fewer --workers: each has buffers of its own.")
    if aftermath.kept is not None:
        removes = f"lines clean {as_argument(aftermath.output)} removes it"
        if aftermath.in_place is not None:
            console.remark(f"what it replaced is still in {aftermath.kept}: {removes}")
        else:
            console.remark(
                f"what was finished is kept in {aftermath.kept}: the same command with --resume continues from there, "
                f"{removes}"
            )
    return code


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"lines {__version__}")
        raise typer.Exit


@app.callback()
def _lines(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


app.command("edit")(_guarded(edit))
app.command("merge")(_guarded(merge))
app.command("inspect")(_guarded(inspect))
app.command("verify")(_guarded(verify))
app.command("clean")(_guarded(clean))


def main() -> None:
    """The console script."""
    # A run is short and makes hardly a cycle. Looking for them, again and again through torch's modules and a plan's
    # objects, takes a tenth of the time that importing torch takes, and doubles that of planning 100,000 tensors.
    gc.disable()
    signals.install()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    try:
        app()
    finally:
        signals.too_late()
