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

from lines_cli import __version__
from lines_cli.commands.clean import clean
from lines_cli.commands.edit import edit
from lines_cli.commands.inspect import inspect
from lines_cli.commands.merge import merge
from lines_cli.commands.verify import verify
from lines_cli.errors import LinesError

EXIT_CODES = {
    0: "done; or, with --dry-run, nothing that headers can tell stands against it",
    1: "out of memory; or a bug in lines: please report it with the traceback",
    2: "the command line or the recipe says something impossible",
    3: "an input cannot be found or read, or is of a kind lines does not edit",
    4: "the inputs do not fit together, or depth cannot be decided from the names",
    5: "NaN or Inf in an input, or a value that the output dtype cannot hold; lines inspect --check found something; "
    "lines verify found a difference",
    6: "the destination exists, is an input, or cannot be written",
    130: "interrupted (Ctrl-C); the destination is as it was (129: SIGHUP, 143: SIGTERM)",
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
        from lines_cli import console

        try:
            command(**options)
        except LinesError as error:
            console.refuse(error.message, error.hint)
            _tell_kept(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as interrupt:
            number = interrupt.number if isinstance(interrupt, _Signalled) else signal.SIGINT
            console.refuse(f"interrupted ({number.name}); the destination is as it was")
            _tell_kept(interrupt)
            raise typer.Exit(128 + number) from None
        except MemoryError as error:
            console.refuse(
                ": ".join(filter(None, ("out of memory", str(error)))),
                "Fewer --workers need less: each holds its own buffers.",
            )
            _tell_kept(error)
            raise typer.Exit(1) from None

    return guarded


def _tell_kept(error: BaseException) -> None:
    """Say where what was finished before an error is kept, if anything is."""
    from lines_cli import console
    from lines_cli.errors import kept_by

    if (folder := kept_by(error)) is not None:
        console.remark(
            f"what was finished is kept in {folder}: the same command with --resume goes on from there, "
            "lines clean OUT removes it"
        )


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


class _Signalled(KeyboardInterrupt):
    """Another signal that asks the process to end: it is cleaned up after as Ctrl-C is."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__()
        self.number = number


def _end(number: int, _: object) -> None:
    raise _Signalled(signal.Signals(number))


def main() -> None:
    """The console script."""
    # A run is short and makes hardly a cycle. Looking for them, again and again through torch's modules and a plan's
    # objects, takes a tenth of the time that importing torch takes, and doubles that of planning 100,000 tensors.
    gc.disable()
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name that the terminal's encoding lacks
    app()
