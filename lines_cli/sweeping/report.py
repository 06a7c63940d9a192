"""What a sweep found, as plain values: each trial's objective, the best of each family, what can be said of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lines_cli.sweeping.config import Objective, Sweep
from lines_cli.sweeping.expression import ExpressionError, Value
from lines_cli.sweeping.metrics import Metrics, NonsenseError, average, by_task
from lines_cli.sweeping.store import Evaluation
from lines_cli.sweeping.trials import LINES, Trial

BASELINES = ("pre", "ft")


@dataclass(frozen=True)
class Judged:
    """A trial, and what came of it.

    Attributes:
        trial: which.
        metrics: averaged over the repeats; None where it failed.
        objectives: a value for each objective of the sweep; empty where it failed.
        errors: of each the standard error over the repeats; None where there was one only.
        failure: why it has no objective.
        seconds: that its evaluations took.
        said_metrics: whether all evaluations gave metrics; where there is no objective, it is the objective's fault.
    """

    trial: Trial
    metrics: Metrics | None = None
    objectives: tuple[float, ...] = ()
    errors: tuple[float | None, ...] = ()
    failure: str | None = None
    seconds: float = 0.0
    said_metrics: bool = False

    def to_json(self) -> dict[str, Any]:
        """As `--json` has it."""
        several = len(self.objectives) > 1
        value = (list(self.objectives) if several else self.objectives[0]) if self.objectives else None
        error = (list(self.errors) if several else self.errors[0]) if self.errors else None
        return {
            "id": self.trial.id,
            "family": self.trial.family,
            "settings": dict(self.trial.settings),
            "metrics": self.metrics,
            "objective": value,
            "standard_error": error,
            "error": self.failure,
            "seconds": self.seconds,
        }


class Judge:
    """Computes objectives.

    Args:
        sweep: what is asked.
        baselines: `pre` and `ft` -> their metrics, those that the objectives ask for.
    """

    def __init__(self, sweep: Sweep, baselines: Mapping[str, Metrics]) -> None:
        self._sweep, self._baselines = sweep, baselines

    def known(self, metrics: Metrics) -> dict[str, Value]:
        """The names that an objective may ask for, with a candidate's metrics."""
        names: dict[str, Value] = {}
        for which, of_it in self._baselines.items():
            names |= {f"{name}_{which}": value for name, value in of_it.items()}
        return {**names, **metrics}

    def values(self, metrics: Metrics) -> tuple[float, ...]:
        """The objectives.

        Raises:
            ExpressionError: one has no value.
        """
        known = self.known(metrics)
        return tuple(objective.expression.number(known) for objective in self._sweep.objectives)

    def judge(self, trial: Trial, evaluations: Sequence[Evaluation]) -> Judged:
        """What came of a trial.

        Args:
            trial: which.
            evaluations: all of its.
        """
        seconds = sum(one.result.seconds for one in evaluations)
        failed = [one for one in evaluations if one.result.metrics is None]
        if failed:
            return Judged(trial, failure=failed[0].result.error, seconds=seconds)
        try:
            of_repeats = repeats(evaluations)
            metrics = average(of_repeats)
            values = [self.values(one) for one in of_repeats]
            objectives = self.values(metrics) if len(of_repeats) == 1 else tuple(map(_mean, zip(*values, strict=True)))
        except ExpressionError as error:
            return Judged(trial, failure=str(error), seconds=seconds, said_metrics=True)
        except NonsenseError as error:
            return Judged(trial, failure=str(error), seconds=seconds)
        errors = tuple(map(standard_error, zip(*values, strict=True)))
        return Judged(trial, metrics, objectives, errors, seconds=seconds, said_metrics=True)


def repeats(evaluations: Sequence[Evaluation]) -> list[Metrics]:
    """The metrics of each repeat, its tasks put together.

    Raises:
        NonsenseError: tasks have other metrics than others.
    """
    by_seed: dict[int, dict[str | None, Metrics]] = defaultdict(dict)
    for one in evaluations:
        assert one.result.metrics is not None
        by_seed[one.seed][one.task] = one.result.metrics
    found = []
    for _, of_seed in sorted(by_seed.items()):
        tasks = {task: metrics for task, metrics in of_seed.items() if task is not None}
        found.append(by_task(tasks) if tasks else of_seed[None])
    return found


def _mean(numbers: Iterable[float]) -> float:
    listed = list(numbers)
    return math.fsum(listed) / len(listed)


def standard_error(numbers: Iterable[float]) -> float | None:
    """Of a mean over repeats: the sample's standard deviation over the root of their number; None of one alone."""
    listed = list(numbers)
    if len(listed) < 2:
        return None
    mean = _mean(listed)
    return math.sqrt(math.fsum((number - mean) ** 2 for number in listed) / (len(listed) - 1) / len(listed))


# --- who won ---


def best(judged: Iterable[Judged], objective: Objective, family: str | None = None) -> Judged | None:
    """The trial with the best objective, the first of equals; of one family, if that is said. None where all failed."""
    found: Judged | None = None
    for one in judged:
        counts = bool(one.objectives) and one.trial.family not in BASELINES and family in (None, one.trial.family)
        if counts and (found is None or objective.better(one.objectives[0], found.objectives[0])):
            found = one
    return found


def front(judged: Iterable[Judged], objectives: Sequence[Objective]) -> list[Judged]:
    """The trials that no other one beats in every objective (the Pareto front), in their order."""
    valid = [one for one in judged if one.objectives and one.trial.family not in BASELINES]
    signs = [-1.0 if objective.minimize else 1.0 for objective in objectives]
    points = [tuple(sign * value for sign, value in zip(signs, one.objectives, strict=True)) for one in valid]

    def beaten(point: tuple[float, ...]) -> bool:
        return any(other != point and all(a >= b for a, b in zip(other, point, strict=True)) for other in points)

    return [one for one, point in zip(valid, points, strict=True) if not beaten(point)]


def better_up(objective: Objective, known: Mapping[str, Value], name: str) -> bool:
    """Whether an objective gets better, not worse, as a metric grows a little from what it is."""
    try:
        before = objective.expression.number(known)
        after = objective.expression.number({**known, name: _grown(known[name])})
    except ExpressionError:
        return True
    return not objective.better(before, after)


def _grown(value: Value) -> Value:
    if isinstance(value, dict):
        return {name: _grown_number(number) for name, number in value.items()}
    return [_grown_number(number) for number in value] if isinstance(value, list) else _grown_number(value)


def _grown_number(number: float) -> float:
    return number + (abs(number) * 1e-3 or 1e-6)


def _said_of_front(sweep: Sweep, judged: Sequence[Judged], families: Sequence[str]) -> tuple[str, str]:
    """Whose the trials are that none beats in every objective: the family of all of them, and that in words."""
    families_on_it = [one.trial.family for one in front(judged, sweep.objectives)]
    shares = [f"{families_on_it.count(family) or 'none'} by {called(family)}" for family in families]
    number = len(families_on_it)
    said = f"{number} trial{'s are' if number > 1 else ' is'} beaten by none in every objective: {', '.join(shares)}"
    return (families_on_it[0] if len(set(families_on_it)) == 1 else "undecided"), said


def verdict(sweep: Sweep, judged: Sequence[Judged]) -> dict[str, Any]:
    """Which family did best, and whether the difference is more than noise, as plain values and in words; and how many
    trials failed, if some did and not all.
    """
    found = _compared(sweep, judged)
    if len(sweep.objectives) == 1:
        found["said"] += _of_inputs(sweep, judged)
    failed = sum(one.failure is not None for one in judged)
    if 0 < failed < len(judged):
        found["said"] += f"; {failed} of {len(judged)} trials failed"
    return found


def _of_inputs(sweep: Sweep, judged: Sequence[Judged]) -> str:
    """Which inputs, as they are, do no worse than the best trial: nothing has to be made to have them. Of a merge the
    fine-tune is each task's own, which no one model is.
    """
    objective, inputs = sweep.objectives[0], BASELINES if sweep.of_an_edit else ("pre",)
    if (tried := best(judged, objective)) is None:
        return ""
    said = ""
    for one in judged:
        if one.trial.family in inputs and one.objectives:
            ours, own = tried.objectives[0], one.objectives[0]
            if not objective.better(ours, own):
                said += f"; {called(one.trial.family)} itself does {'as well' if own == ours else 'better'}"
    return said


def _compared(sweep: Sweep, judged: Sequence[Judged]) -> dict[str, Any]:
    objective = sweep.objectives[0]
    families = [family for family in (LINES, *sweep.controls) if any(one.trial.family == family for one in judged)]
    leaders = {family: best(judged, objective, family) for family in families}
    found = {
        family: {
            "trials": sum(one.trial.family == family for one in judged),
            "failed": sum(one.trial.family == family and one.failure is not None for one in judged),
            "best": None if leader is None else leader.to_json(),
        }
        for family, leader in leaders.items()
    }
    won = best([leader for leader in leaders.values() if leader is not None], objective)
    others = [leader for leader in leaders.values() if leader is not None and leader is not won]
    if won is None:
        return {"families": found, "won": None, "said": "every trial failed: nothing can be said"}
    if len(sweep.objectives) > 1:
        whose, said = _said_of_front(sweep, judged, families)
        return {"families": found, "won": whose, "said": said}
    if not others:
        return {"families": found, "won": won.trial.family, "said": _alone(sweep)}
    second = best(others, objective)
    assert second is not None
    difference = abs(won.objectives[0] - second.objectives[0])
    noise = _noise(won, second)
    helped = won.trial.family == LINES
    if difference == 0:
        said = f"{called(LINES)} and {called(second.trial.family if helped else won.trial.family)} did equally well"
        return {"families": found, "won": "undecided", "said": said, "difference": 0.0, "noise": noise}
    said = (
        f"LiNeS did best: by {difference:.4g} better than {called(second.trial.family)}"
        if helped
        else f"LiNeS did not help here: {called(won.trial.family)} did better"
    )
    if not helped and (own := leaders.get(LINES)) is not None:
        said += f", by {abs(won.objectives[0] - own.objectives[0]):.4g}"
    if noise is None:
        said += "; how much of that is noise is not known (repeats: 3 measures it)"
    elif difference <= noise:
        said += f", which is within the noise (two standard errors of the difference: {noise:.2g})"
    else:
        said += f", which exceeds the noise (two standard errors of the difference: {noise:.2g})"
    within = noise is not None and difference <= noise
    decided = "undecided" if within else won.trial.family
    return {"families": found, "won": decided, "said": said, "difference": difference, "noise": noise}


def _alone(sweep: Sweep) -> str:
    return "no control was tried" if not sweep.controls else "of the controls none has a result"


def _noise(one: Judged, other: Judged) -> float | None:
    """Two standard errors of the difference of two objectives; None where they are not known."""
    if not one.errors or not other.errors or one.errors[0] is None or other.errors[0] is None:
        return None
    return 2 * math.hypot(one.errors[0], other.errors[0])


_NAMES = {
    LINES: "LiNeS",
    "constant": "constant scaling",
    "reversed": "reversed depth",
    "pre": "the base",
    "ft": "the fine-tune",
}


def called(family: str) -> str:
    """What people call a family."""
    return _NAMES[family]
