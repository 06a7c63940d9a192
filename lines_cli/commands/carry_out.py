"""What `edit` and `merge` have in common, recipe -> plan -> run -> report; and how all commands import torch."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from lines_cli.commands import options as opt
from lines_cli.commands import signals
from lines_cli.errors import Aftermath, LinesError, OutputError, attach_aftermath

if TYPE_CHECKING:
    from lines_cli.recipe import Recipe
    from lines_cli.resources import Resources


class How(TypedDict):
    """What `engine.run` is told beside the plan."""

    force: bool
    resume: bool
    verify: bool
    verify_inputs: bool


def carry_out(
    recipe: Recipe, output: str, resources: Resources, how: How, *, dry_run: bool, json: bool, quiet: bool
) -> None:
    """Plan a recipe's result, then show it (`dry_run`) or make it and say what was done."""
    from lines_cli import console
    from lines_cli.checkpoint.destination import check_destination
    from lines_cli.checkpoint.staging import clean, leftover, recover
    from lines_cli.planning import is_finished, is_same_run, make_plan, open_inputs, refuse_altered, replaceable

    destination = opt.destination(output)
    inputs = [name for name in (recipe.base_model, *(source.model for source in recipe.models)) if name is not None]
    named = [Path(os.path.expanduser(name)) for name in inputs]
    before = leftover(destination)
    if before is not None and before.set_aside:
        if dry_run:
            console.remark(f"{destination} is set aside in {before.folder}; a run, or lines clean, puts it back")
            if not how["force"]:
                raise OutputError(f"{destination} exists", hint="Replace it with --force, or choose another with -o.")
        else:
            recover(destination)
    # Before anything is fetched. Whether what is there already is what is asked for, a plan will tell.
    check_destination(destination, inputs=named, nbytes=0, force=how["force"] or how["resume"])
    plan = make_plan(recipe, open_inputs(recipe, quiet=quiet), destination)
    is_over = before is not None and before.is_over and is_same_run(plan, before.run)
    if how["resume"] and (is_over or is_finished(plan)):
        if how["verify"] or how["verify_inputs"]:
            refuse_altered(plan, output=how["verify"], inputs=how["verify_inputs"])
        if before is not None and before.is_over and not dry_run:
            clean(destination)  # killed after its last step, it has left the folder
        elif before is not None and not quiet:
            console.remark(f"{before.folder} holds another run's unfinished output, and is left alone")
        console.show_finished(plan, verified=how["verify"], json=json, quiet=quiet)
        return
    if dry_run:
        needed = plan.bytes_written - (before.nbytes if before else 0)
        ours = replaceable(plan) if how["force"] else None
        check_destination(destination, inputs=plan.read_paths, nbytes=needed, force=how["force"], ours=ours)
        console.show_plan(plan, resources, json=json)
        return
    if before is not None and before.is_over and not quiet:
        console.remark(f"{before.folder} holds what a finished run has replaced; it is removed")
    elif before is not None and not quiet:
        left = f"{before.folder}, left by a run that did not come to its end ({before.told})"
        what = "is checked and gone on from" if how["resume"] else "is replaced; --resume would have gone on from it"
        console.remark(f"{left}, {what}")

    with interruptible_import():
        from lines_cli.engine import run

    outcome = run(plan, resources, **how, track=console.progress(quiet=quiet), at_last=signals.too_late)
    try:
        console.show_outcome(outcome, json=json, quiet=quiet)
    except KeyboardInterrupt as interrupt:  # in a process that has not asked us to mind signals
        attach_aftermath(interrupt, Aftermath(in_place=destination))
        raise
    except OSError as error:
        raise LinesError(
            f"{destination} is in place and whole; what was done cannot be printed: {error.strerror or error}"
        ) from error


@contextmanager
def interruptible_import() -> Iterator[None]:
    """Import torch: signals are held back until that is over."""
    with signals.held_back(), _as_a_guest():
        yield


@contextmanager
def _as_a_guest() -> Iterator[None]:
    """Keep torch's warning of a missing numpy from the user, since nothing here needs it; and say what it means where
    its libraries do not fit into the memory that the process may have.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        try:
            yield
        except Exception as error:
            told = [line for line in str(error).splitlines() if "map segment" in line or "allocate memory" in line]
            if not told and not _memory_is_limited():
                raise
            raise MemoryError(f"torch cannot be loaded: {(told or [type(error).__name__])[0].strip()}") from error


def _memory_is_limited() -> bool:
    """Whether the process may have so much address space only: what fails then in a library may be of any kind."""
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
