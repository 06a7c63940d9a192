"""What a sweep will do, and what it will take, before anything is computed: without torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lines_cli.api.on_ray import address_of
from lines_cli.errors import MismatchError, RecipeError, size
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.merged import nbytes_merged
from lines_cli.plan.plan import Plan
from lines_cli.plan.resources import Resources
from lines_cli.recipe.schema import Recipe
from lines_cli.sweeping.config import Sweep
from lines_cli.sweeping.trials import Trial, check_recipe, trials_of

Say = Callable[[str], None]
_MANY = 1000  # trials


@dataclass(frozen=True)
class Options:
    """What a sweep may use, and how it goes about it.

    Attributes:
        resources: for making candidates; on a cluster also what each trial takes of it.
        parallel: how many evaluations run at a time; None for 1, and on a cluster for as many as there is room for (of
            a search 1, since what is drawn depends on it).
        on: the engine that runs trials elsewhere, as `--on` says it; None for this machine.
        force: discard another sweep's trials; replace an existing output.
        retry: evaluate once more what failed before.
        say: gets a line about each trial, and whatever else a person should know.
    """

    resources: Resources = field(default_factory=Resources)
    parallel: int | None = None
    on: str | None = None
    force: bool = False
    retry: bool = False
    say: Say = lambda _: None

    def __post_init__(self) -> None:
        if self.on is not None:
            address_of(self.on)  # refused before anything is planned


def plan_sweep(sweep: Sweep, options: Options) -> dict[str, Any]:
    """What a sweep would do, and what it would take, as plain values; nothing is written or evaluated.

    Raises:
        LinesError: what can be refused before anything runs.
    """
    notes: list[str] = []
    trials = trials_to_come(sweep, notes)
    plan = largest_plan(sweep, trials, _unmeasured)
    return {
        "trials": _numbers(sweep, trials, notes),
        "baselines": list(sweep.baselines),
        "evaluations": _evaluations(sweep, trials),
        "candidate_bytes": plan.bytes_written,
        "scratch_bytes": 0 if sweep.in_process else scratch_bytes(sweep, plan, options),
        "notes": [*plan.notes, *notes, *cost(sweep, trials, plan)],
    }


def trials_to_come(sweep: Sweep, notes: list[str]) -> list[Trial]:
    """The trials of a grid; of a search one for each draw, whose values are not known yet."""
    if sweep.search is not None:
        from lines_cli.sweeping.search import middle

        trials = [Trial("lines", middle(sweep))]
        for trial in trials:
            check_recipe(sweep, trial)
        return trials
    return trials_of(sweep, notes)


def _unmeasured(recipe: Recipe) -> Plan:
    return make_plan(recipe, open_inputs(recipe, quiet=True), Path("candidate"))


def largest_plan(sweep: Sweep, trials: Sequence[Trial], plan_of: Callable[[Recipe], Plan]) -> Plan:
    """The plan that writes most, where a grid's values decide how much that is (dtype, method, models); the first of
    equals.

    Args:
        sweep: what is asked.
        trials: of it.
        plan_of: makes a plan of a recipe.

    Raises:
        LinesError: as `plan_of` for the first trial.
    """
    differ: dict[str, Trial] = {}
    for trial in trials:
        words = {key: value for key, value in trial.settings.items() if not _is_number(value)}
        words.pop("lines.schedule", None)
        differ.setdefault(json.dumps(words, sort_keys=True), trial)
    found: Plan | None = None
    for trial in differ.values():
        try:
            plan = plan_of(sweep.recipe_of(trial.settings))
        except (MismatchError, RecipeError):
            if found is None:
                raise
            continue  # a later trial that cannot be made fails by itself
        if found is None or _written(plan) > _written(found):
            found = plan
    assert found is not None
    return found


def _written(plan: Plan) -> int:
    return plan.bytes_written + nbytes_merged(plan)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _numbers(sweep: Sweep, trials: Sequence[Trial], notes: list[str]) -> dict[str, int]:
    """How many trials each family has."""
    if sweep.search is not None:
        from lines_cli.sweeping.search import families_of

        return dict.fromkeys(families_of(sweep, notes), sweep.search.trials)
    return {family: sum(t.family == family for t in trials) for family in dict.fromkeys(t.family for t in trials)}


def _evaluations(sweep: Sweep, trials: Sequence[Trial]) -> int:
    number = len(trials)
    if sweep.search is not None:
        number = sum(_numbers(sweep, trials, []).values())
    return (number + len(sweep.baselines)) * sweep.repeats * (len(sweep.tasks) if sweep.by_task else 1)


def scratch_bytes(sweep: Sweep, plan: Plan, options: Options) -> int:
    """Bytes of scratch at most: a candidate for each evaluation that runs, or an input that is evaluated itself; and
    merged task vectors.
    """
    largest = plan.bytes_written
    if sweep.baselines:
        largest = max(largest, *(checkpoint.nbytes for checkpoint in plan.inputs.checkpoints))
    merged = nbytes_merged(plan) if options.on is None else 0
    return largest + ((options.parallel or 1) - 1) * plan.bytes_written + merged


def cost(sweep: Sweep, trials: Sequence[Trial], plan: Plan) -> Iterator[str]:
    """A note where very many candidates are made."""
    number = _evaluations(sweep, trials)
    if number > _MANY:
        written = size(len(trials) * plan.bytes_written)
        where = "in memory" if sweep.in_process else "on the disk, one after the other"
        yield f"{number:,} evaluations: {written} of candidates are made for them, {where}"
