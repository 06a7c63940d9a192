"""What `edit` and `merge` have in common, recipe -> plan -> run -> report; and how all commands import torch."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

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
    from lines_cli.checkpoint.staging import clean, leftover
    from lines_cli.checkpoint.writer import check_destination
    from lines_cli.errors import RecipeError
    from lines_cli.planning import is_finished, make_plan, open_inputs

    if not output:
        raise RecipeError("-o is empty", hint="Name a folder, or a file that ends in .safetensors.")
    inputs = [name for name in (recipe.base_model, *(source.model for source in recipe.models)) if name is not None]
    named = [Path(os.path.expanduser(name)) for name in inputs]
    # Before anything is fetched. Whether what is there already is what is asked for, a plan will tell.
    check_destination(Path(output), inputs=named, nbytes=0, force=how["force"] or how["resume"])
    before = leftover(Path(output))
    plan = make_plan(recipe, open_inputs(recipe, quiet=quiet), Path(output))
    if how["resume"] and is_finished(plan):
        clean(plan.output)  # killed after its last step, it may have left the folder
        console.show_finished(plan, json=json, quiet=quiet)
        return
    if dry_run:
        needed = plan.bytes_written - (before.nbytes if before else 0)
        check_destination(plan.output, inputs=plan.read_paths, nbytes=needed, force=how["force"])
        console.show_plan(plan, resources, json=json)
        return
    if before is not None and not quiet:
        left = f"{before.folder}, left by a run that did not come to its end ({before.told})"
        what = "is checked and gone on from" if how["resume"] else "is replaced; --resume would have gone on from it"
        console.remark(f"{left}, {what}")

    with interruptible_import():
        from lines_cli.engine import run

    outcome = run(plan, resources, **how, track=console.progress(quiet=quiet))
    try:
        console.show_outcome(outcome, json=json, quiet=quiet)
    except KeyboardInterrupt:
        console.remark(f"interrupted while it was told; {output} is whole")


@contextmanager
def interruptible_import() -> Iterator[None]:
    """Hold Ctrl-C back until the import of torch is over, which swallows it, or dies of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        with _as_a_guest():
            yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        with _as_a_guest():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


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
