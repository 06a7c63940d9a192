"""What `edit` and `merge` have in common, recipe -> plan -> run -> report; and how all commands import torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.api.calls import RunOptions, tolerant_torch_import
from lines_cli.api.calls import carry_out as make
from lines_cli.cli import signals, streams
from lines_cli.errors import Aftermath, attach_aftermath

if TYPE_CHECKING:
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe


def carry_out(
    recipe: Recipe,
    destination: Path | None,
    resources: Resources,
    how: RunOptions,
    *,
    dry_run: bool,
    json: bool,
    quiet: bool,
) -> None:
    """Plan a recipe's result, then show it (`dry_run`) or make it and say what was done."""
    from lines_cli.cli import console

    done = make(
        recipe,
        destination,
        resources,
        how,
        dry_run=dry_run,
        quiet=quiet,
        track=console.progress(quiet=quiet),
        remark=console.remark,
        importing=interruptible_import,
        at_last=signals.too_late,
    )
    if done.before:
        streams.holds(f"{destination} is in place and whole")
        console.show_finished(done.plan, verified=how["verify"], json=json, quiet=quiet)
        return
    if done.outcome is None:
        console.show_plan(done.plan, done.summary, resources, json=json)
        return
    streams.holds(f"{destination} is in place and whole")
    try:
        console.show_outcome(done.outcome, json=json, quiet=quiet)
    except KeyboardInterrupt as interrupt:  # in a process that has not asked us to mind signals
        attach_aftermath(interrupt, Aftermath(in_place=destination))
        raise


@contextmanager
def interruptible_import() -> Iterator[None]:
    """Import torch: signals are held back until that is over."""
    with signals.held_back(), tolerant_torch_import():
        yield
