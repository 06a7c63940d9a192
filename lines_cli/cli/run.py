"""What `edit` and `merge` have in common, recipe -> plan -> run -> report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.api.calls import RunOptions, put_on_the_hub
from lines_cli.api.calls import carry_out as make
from lines_cli.cli import signals, streams
from lines_cli.errors import Aftermath, PushError, aftermath_of, attach_aftermath

if TYPE_CHECKING:
    from lines_cli.api.calls import Done
    from lines_cli.api.push import Push
    from lines_cli.api.summary import Summary
    from lines_cli.hub.upload import Target
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe


def carry_out(
    recipe: Recipe,
    destination: Path | None,
    resources: Resources,
    how: RunOptions,
    *,
    target: Target | None,
    dry_run: bool,
    json: bool,
    quiet: bool,
    on: str | None = None,
) -> None:
    """Plan a recipe's result, then show it (`dry_run`) or make it and say what was done; and put it on the Hub, if a
    target there is named.
    """
    from lines_cli.cli import console

    pushing = None
    if target is not None:
        from lines_cli.api.push import Push

        pushing = Push(target, quiet=quiet, say=(lambda _: None) if quiet else console.remark)

    done = make(
        recipe,
        destination,
        resources,
        how,
        dry_run=dry_run,
        quiet=quiet,
        track=console.progress(quiet=quiet),
        remark=console.remark,
        at_last=signals.too_late,
        pushing=pushing,
        on=on,
    )
    if done.outcome is None and not done.before:
        console.show_plan(done.plan, done.summary, resources, json=json)
        if pushing is not None and not json:
            console.show_pushed(done.summary, json=False, quiet=quiet)
        return
    streams.holds(f"{destination} is in place and whole")
    told, refused = done.summary, None
    try:
        if pushing is not None and json:  # one object says both
            told, refused = _pushed(pushing, done)
        if done.outcome is None:
            console.show_finished(
                done.plan, told, verified=how["verify"] or pushing is not None, json=json, quiet=quiet
            )
        else:
            console.show_outcome(done.outcome, told, json=json, quiet=quiet)
    except KeyboardInterrupt as interrupt:  # in a process that has not asked us to mind signals
        if aftermath_of(interrupt).unpushed is None:
            attach_aftermath(interrupt, Aftermath(in_place=destination))
        raise
    if pushing is not None and not json:
        told, refused = _pushed(pushing, done)
        if refused is None:
            console.show_pushed(told, json=False, quiet=quiet)
    if refused is not None:
        raise refused


def _pushed(pushing: Push, done: Done) -> tuple[Summary, PushError | None]:
    """Put an output that is in place on the Hub: the summary, and why it is not there if it is not."""
    signals.again()
    try:
        return put_on_the_hub(pushing, done), None
    except PushError as error:
        said = {"code": error.exit_code, "message": error.message, "hint": error.hint}
        return {**done.summary, "pushed": None, "error": said}, error
