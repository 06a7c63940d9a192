"""`lines clean`: remove what a run has left that did not come to its end."""

from __future__ import annotations

from lines_cli import arguments
from lines_cli.commands import options as opt


def clean(output: opt.Cleaned, *, quiet: opt.Quiet = False) -> None:
    """Remove what a run has left that was killed or interrupted.

    Beside OUT it has kept what it had finished, for --resume. A run that is still at work is left alone, and so is OUT
    itself.
    """
    from lines_cli import console
    from lines_cli.checkpoint.staging import clean as remove

    found = remove(arguments.destination(output))
    if not quiet:
        console.show_cleaned(output, found)
