"""What `edit` and `merge` have in common, recipe -> plan -> run -> report; and how all commands import torch."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lines_cli.recipe import Recipe
    from lines_cli.resources import Resources


def carry_out(
    recipe: Recipe, output: str, resources: Resources, *, force: bool, dry_run: bool, json: bool, quiet: bool
) -> None:
    """Plan a recipe's result, then show it (`dry_run`) or make it and say what was done."""
    from lines_cli import console
    from lines_cli.checkpoint.writer import check_destination
    from lines_cli.errors import RecipeError
    from lines_cli.planning import make_plan, open_inputs

    if not output:
        raise RecipeError("-o is empty", hint="Name a folder, or a file that ends in .safetensors.")
    inputs = [name for name in (recipe.base_model, *(source.model for source in recipe.models)) if name is not None]
    named = [Path(os.path.expanduser(name)) for name in inputs]
    check_destination(Path(output), inputs=named, nbytes=0, force=force)  # before anything is fetched
    plan = make_plan(recipe, open_inputs(recipe, quiet=quiet), Path(output))
    if dry_run:
        check_destination(plan.output, inputs=plan.read_paths, nbytes=plan.bytes_written, force=force)
        console.show_plan(plan, resources, json=json)
        return

    with interruptible_import():
        from lines_cli.engine import run

    outcome = run(plan, resources, force=force, track=console.progress(quiet=quiet))
    try:
        console.show_outcome(outcome, json=json, quiet=quiet)
    except KeyboardInterrupt:
        console.remark(f"interrupted while it was told; {output} is whole")


@contextmanager
def interruptible_import() -> Iterator[None]:
    """Hold Ctrl-C back until the import of torch is over, which swallows it, or dies of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        with _without_numpy():
            yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        with _without_numpy():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@contextmanager
def _without_numpy() -> Iterator[None]:
    """Keep torch's warning of a missing numpy from the user; nothing here needs it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        yield
