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
from lines_cli.cli.extract import extract
from lines_cli.cli.inspect import inspect
from lines_cli.cli.merge import merge
from lines_cli.cli.options import VARIABLES
from lines_cli.cli.parser import CODE_UNPRINTED, Command, Lines, variable_behind
from lines_cli.cli.parts import finish, plan, run
from lines_cli.cli.push import push
from lines_cli.cli.sweep import sweep
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
    "lines verify found a difference; the evaluation of a sweep's base or fine-tune failed, or all its trials did",
    6: "the destination exists, is an input, or cannot be written",
    CODE_UNPRINTED: "all was done, and an output is in place and whole; but stdout was closed or full, so that not "
    "everything could be printed",
    8: "the Hub does not take an output: no right to write, no connection, weights of others in its place; what is on "
    "the disk is in place and whole, and lines push goes on from there",
    130: "interrupted (Ctrl-C), and the destination is as it was (129: SIGHUP, 143: SIGTERM)",
}
"""What the process ends with."""

PAGES = {
    "five minutes to look around": ("lines inspect CHECKPOINT", "docs/tour.md"),
    "a base and its fine-tune": ("lines edit BASE FT -o OUT", "docs/editing.md"),
    "a fine-tune that forgot too much": ("lines edit ... --alpha NUMBER", "docs/forgetting.md"),
    "an evaluation that decides": ("lines sweep --config FILE -o OUT", "docs/sweeping.md"),
    "several fine-tunes of one base": ("lines merge --config FILE", "docs/merging.md"),
    "a mergekit file": ("lines merge --config FILE", "docs/mergekit.md"),
    "fine-tunes with other tokens": ("tokenizer_source: union", "docs/vocabularies.md"),
    "a LoRA adapter": ("lines edit BASE ADAPTER -o OUT", "docs/adapters.md"),
    "adapters to scale or to merge": ("lines edit --adapter ADAPTER -o OUT", "docs/adapters-out.md"),
    "a full fine-tune, for an adapter": ("lines extract FT --base BASE ...", "docs/adapters-out.md"),
    "weights in FP8, GGUF and the like": ("lines edit BASE FT -o OUT", "docs/quantised.md"),
    "a .pt, .bin or .ckpt file": ("lines edit base.pt ft.ckpt -o out", "docs/pickles.md"),
    "a diffusers folder": ("lines edit BASE FT -o OUT", "docs/diffusion.md"),
    "a question about a checkpoint": ("lines inspect CHECKPOINT", "docs/inspecting.md"),
    "an output, and a doubt": ("lines verify OUT", "docs/reliability.md"),
    "an output, for the Hub": ("lines push OUT org/name", "docs/hub.md"),
    "a job in CI, or a shared disk": ("lines edit ... --resume --force", "docs/jobs.md"),
    "a model too large for one machine": ("lines plan --config FILE -o OUT", "docs/scale.md"),
    "a script that reads the result": ("lines ... --json", "docs/json.md"),
    "a notebook": ("import lines_cli as lines", "docs/notebooks.md"),
}
"""What a person comes with: what to type, and where to read on."""


def pages_by_what_you_have() -> str:
    """The last part of `lines --help`."""
    rows = "\n".join(f"  {what}\n      {command:<33} {page}" for what, (command, page) in PAGES.items())
    return f"\b\nWhat do you have?\n{rows}"


_HELP = """Edit and merge model checkpoints so that a model keeps what it learnt and stops forgetting what it knew.

\b
  lines edit BASE FT -o OUT     # a fine-tune that forgets less
"""

app = typer.Typer(
    name="lines",
    cls=Lines,
    help=_HELP,
    epilog=pages_by_what_you_have(),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: it reads well without colour, and starts faster
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _guarded(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def guarded(**options: Any) -> None:
        try:
            with signals.at_work():
                command(**options)
        except (Exception, KeyboardInterrupt) as error:
            ended: BaseException | None = error if isinstance(error, (LinesError, MemoryError)) else signals.raised()
            if ended is None and not isinstance(error, KeyboardInterrupt):
                raise
            ended = ended or error
            signals.too_late()
            writes = command in (edit, extract, merge, sweep, run, finish)
            raise typer.Exit(_say(ended, error, writes=writes, json=options.get("json", False))) from error

    return guarded


def _say(error: BaseException, told: BaseException, *, writes: bool, json: bool) -> int:
    """Say why a command ends, and what it leaves; the exit code.

    Args:
        error: what ended it.
        told: the exception that tells what is left: the same, or what a library made of it.
        writes: whether the command writes a destination.
        json: whether stdout is to say it, too.
    """
    from lines_cli.cli import console

    aftermath, code = aftermath_of(told), 1
    message, hint = "", None
    match error:
        case LinesError():
            message, hint, code = error.message, error.hint, error.exit_code
            for flag in VARIABLES:
                if message.startswith(f"{flag} ") and (variable := variable_behind([flag])):
                    message = f"{variable} says {message}"
        case KeyboardInterrupt():
            number = error.number if isinstance(error, signals.Signalled) else signal.SIGINT
            if aftermath.unpushed is not None:
                message = f"interrupted ({number.name}) while {aftermath.in_place} was pushed; on the disk it is whole"
                hint, code = f"To go on: {aftermath.unpushed}", 128 + number
            elif aftermath.in_place is not None:
                console.remark(f"interrupted ({number.name}) after {aftermath.in_place} was in place: it is whole")
                code = 0
            else:
                unchanged = "; the destination is as it was" if writes and aftermath.state is None else ""
                message, code = f"interrupted ({number.name}){unchanged}", 128 + number
        case _:
            message = ": ".join(filter(None, ("out of memory", str(error))))
            hint = "Try fewer --workers: each has buffers of its own."
    if message:
        console.refuse(message, hint, code=code)
    if aftermath.state is not None:
        console.remark(aftermath.state)
    if aftermath.kept is not None and aftermath.unpushed is None:
        removes = f"lines clean {as_argument(aftermath.output)} removes it"
        if aftermath.in_place is not None:
            console.remark(f"what it replaced is still in {aftermath.kept}: {removes}")
        else:
            kept = (
                f"what was finished is kept in {aftermath.kept}: the same command with --resume continues from there, "
                f"{removes}"
            )
            console.remark(kept)
            hint = hint or f"{kept[0].upper()}{kept[1:]}."
    if message and json:
        console.show_error(code, message, hint)
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


for _name, _command, _pages in (
    ("edit", edit, "docs/editing.md, docs/finding-depth.md, docs/reliability.md"),
    ("merge", merge, "docs/merging.md, docs/merge-methods.md, docs/reliability.md"),
    ("extract", extract, "docs/adapters-out.md, docs/finding-depth.md, docs/reliability.md"),
    ("sweep", sweep, "docs/sweeping.md, docs/forgetting.md"),
    ("plan", plan, "docs/scale.md"),
    ("run", run, "docs/scale.md"),
    ("finish", finish, "docs/scale.md"),
    ("inspect", inspect, "docs/inspecting.md, docs/finding-depth.md"),
    ("verify", verify, "docs/reliability.md"),
    ("push", push, "docs/hub.md"),
    ("clean", clean, "docs/reliability.md"),
):
    app.command(_name, cls=Command, epilog=f"More: {_pages}")(_guarded(_command))


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
    except SystemExit as end:
        if signals.raised() is not None and isinstance(end.code, int):
            signals.leave_with(end.code)
        raise
    finally:
        signals.too_late()
        gc.freeze()  # or else Python, at its end, looks for cycles in all of torch: 0.3 s
