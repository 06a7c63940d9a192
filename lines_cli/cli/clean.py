"""`lines clean`: remove what a run has left that did not come to its end."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.cli import options as opt


def clean(output: opt.Cleaned, *, quiet: opt.Quiet = False) -> None:
    """Remove what a run left that was killed or interrupted.

    \b
      lines clean OUT

    Such a run keeps its finished work beside OUT, for --resume; so does lines verify --resume. A run that is still at
    work is left alone, and so is OUT itself.

    Of OUT in an object store (s3://bucket/folder) what the run has put there goes, too. There nothing tells whether it
    is at work: if it is, it ends with an error.
    """
    from lines_cli.api.on_ray import plan_beside
    from lines_cli.api.parts import is_free_for_a_plan, remove_plan
    from lines_cli.cli import console
    from lines_cli.storage.making import clean as remove
    from lines_cli.storage.object_store import url_of
    from lines_cli.storage.verified import forget

    destination = arguments.destination(output)
    found = remove(destination)
    if is_free_for_a_plan(plan := plan_beside(destination)):  # of a run on Ray, whose parts are gone
        remove_plan(plan)
    forgotten = forget(destination) if url_of(destination) is None else None
    if forgotten is not None and not quiet:
        console.remark(f"removed {forgotten}, the progress of lines verify")
    if (found is not None or forgotten is None) and not quiet:
        console.show_cleaned(output, found)
