"""What is tried: the candidates of a grid, in families that differ in how coefficients go with depth."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from lines_cli.errors import RecipeError, printable
from lines_cli.sweeping.config import Control, Range, Space, Sweep
from lines_cli.sweeping.expression import Expression, ExpressionError

LINES = "lines"
"""The family of what the grid says itself."""


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        family: `lines`, or the control that it belongs to: `constant`, `reversed`; or a baseline: `pre`, `ft`.
        settings: dotted keys of the recipe -> values.
    """

    family: str
    settings: Mapping[str, Any]

    @cached_property
    def id(self) -> str:
        """A short name that is the same wherever the same is tried: 1 is 1.0."""
        text = json.dumps([self.family, _as_floats(self.settings)], sort_keys=True)
        return f"{self.family}-{sha256(text.encode()).hexdigest()[:10]}"


def _as_floats(value: Any) -> Any:
    """A value with its whole numbers as floats, where they are the same."""
    if isinstance(value, Mapping):
        return {key: _as_floats(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_floats(one) for one in value]
    whole = isinstance(value, int) and not isinstance(value, bool) and abs(value) <= 2**53
    return float(value) if whole else value


def trials_of(sweep: Sweep, notes: list[str]) -> list[Trial]:
    """All candidates of a grid, each once: LiNeS's own, then those of the controls.

    Args:
        sweep: without a search.
        notes: gets a line for a control that makes no sense here.

    Raises:
        RecipeError: arithmetic of the grid that has no value, or settings that make an impossible recipe.
    """
    trials = list({trial.id: trial for trial in (Trial(LINES, one) for one in combinations(sweep))}.values())
    for trial in trials:
        check_recipe(sweep, trial)  # controls are computed from them
    own = [trial.settings for trial in trials]
    for control in sweep.controls:
        if why := why_not(sweep, control):
            notes.append(f"no {control} control: {why}")
            continue
        if control == "reversed":
            trials += [Trial(control, reversed_(settings)) for settings in own]
        else:
            trials += [Trial(control, settings) for settings in _constant(sweep, own)]
    for trial in trials[len(own) :]:
        check_recipe(sweep, trial)
    return list({trial.id: trial for trial in trials}.values())


def check_recipe(sweep: Sweep, trial: Trial) -> None:
    """Refuse a trial whose settings make an impossible recipe.

    Raises:
        RecipeError: names them.
    """
    try:
        sweep.recipe_of(trial.settings)
    except RecipeError as error:
        raise RecipeError(f"{sweep.where}: {shown(trial.settings)}: {error.message}", hint=error.hint) from error


def shown(settings: Mapping[str, Any]) -> str:
    """Settings on one line, for people."""
    return " ".join(f"{key.removeprefix('lines.')}={_short(value)}" for key, value in settings.items()) or "as it is"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return f"[{','.join(map(_short, value))}]"
    return printable(str(value))


def combinations(space: Space) -> Iterator[dict[str, Any]]:
    """Every combination of a grid's values.

    Raises:
        RecipeError: arithmetic that has no value.
    """
    lists = {key: values for key, values in space.grid.items() if isinstance(values, tuple)}
    for combination in itertools.product(*lists.values()):
        yield complete(space, dict(zip(lists, combination, strict=True)))


def complete(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with what follows from others: arithmetic of the grid; of an edit beta, which is 1 - alpha.

    Raises:
        RecipeError: arithmetic that has no value.
    """
    settings = {key: drawn[key] for key in space.grid if key in drawn}
    for key, said in space.grid.items():
        if isinstance(said, Expression):
            known = _known(settings)
            if missing := next((name for name in said.names if name not in known), None):
                there = ", ".join(map(printable, sorted(known))) or "none"
                raise RecipeError(
                    f"{space.where}: grid.{key}: no number of the grid is called {printable(missing)} "
                    f"(there is {there})",
                    hint="Arithmetic is over keys of the grid; one that stays the same is a list of one value.",
                )
            try:
                settings[key] = said.number(known)
            except ExpressionError as error:
                raise RecipeError(f"{space.where}: grid.{key}: {error}") from None
    alpha = settings.get("lines.alpha")
    if space.of_an_edit and "lines.beta" not in space.grid and isinstance(alpha, (int, float)):
        settings["lines.beta"] = 1 - alpha
    return settings


def _known(settings: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that arithmetic may ask for: by their keys, and by the last part of a key that no other has."""
    numbers = {
        key: float(value)
        for key, value in settings.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    last: dict[str, list[float]] = {}
    for key, number in numbers.items():
        last.setdefault(key.rpartition(".")[2], []).append(number)
    return {**{name: found[0] for name, found in last.items() if len(found) == 1}, **numbers}


# --- controls ---


def why_not(sweep: Sweep, control: Control) -> str | None:
    """Why a control makes no sense for a sweep; None where it does."""
    scaling = sweep.recipe.lines
    if scaling is None and not any(key.startswith("lines.") for key in sweep.grid):
        return "the recipe does not scale over depth, and the grid does not either"
    schedules = sweep.grid.get("lines.schedule", (scaling.schedule if scaling else "linear",))
    if control == "reversed" and isinstance(schedules, tuple):
        other = [one for one in schedules if isinstance(one, str) and one not in ("linear", "reversed")]
        if other:
            return f"of the schedule {printable(other[0])} there is no reversed one"
    return None


def reversed_(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same coefficients in the other order: deep blocks stay near the base."""
    schedule = settings.get("lines.schedule", "linear")
    turned = list(reversed(schedule)) if isinstance(schedule, (list, tuple)) else "reversed"
    return {**settings, "lines.schedule": "linear" if schedule == "reversed" else turned}


def constant(settings: Mapping[str, Any], value: float) -> dict[str, Any]:
    """The same with one coefficient for every block, and for what lies outside."""
    others = {key: setting for key, setting in settings.items() if not is_end(key)}
    return {**others, "lines.schedule": "constant", "lines.alpha": value, "lines.beta": 0.0}


_END = re.compile(r"lines\.(alpha|beta|schedule|stacks\..+\.(alpha|beta))")


def is_end(key: str) -> bool:
    """Whether a key says how coefficients go with depth, so that a constant one stands in its place."""
    return _END.fullmatch(key) is not None


def _constant(sweep: Sweep, own: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """As many as LiNeS has, for each combination of the other keys: with each alpha as the coefficient, if there are as
    many; else evenly from the least coefficient that a layer gets in any of them to the largest.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for settings in own:
        others = {key: value for key, value in settings.items() if not is_end(key)}
        groups.setdefault(json.dumps(others, sort_keys=True), []).append(settings)
    for group in groups.values():
        alphas = [settings.get("lines.alpha") for settings in group]
        numbers = [float(alpha) for alpha in alphas if isinstance(alpha, (int, float))]
        if len(set(numbers)) != len(group):
            spans = [span(sweep, settings) for settings in group]
            low, high = min(low for low, _ in spans), max(high for _, high in spans)
            numbers = [(low + high) / 2] if len(group) == 1 else _evenly(low, high, len(group))
        yield from (constant(settings, value) for settings, value in zip(group, numbers, strict=True))


def _evenly(low: float, high: float, number: int) -> list[float]:
    return [low + (high - low) * step / (number - 1) for step in range(number)]


def span(sweep: Sweep, settings: Mapping[str, Any]) -> tuple[float, float]:
    """The least coefficient that a layer gets, and the largest; of an alpha that is yet to be measured nothing is
    known, and beta is taken.
    """
    scaling = sweep.recipe.lines
    schedule = settings.get("lines.schedule", scaling.schedule if scaling else "linear")
    if isinstance(schedule, (list, tuple)):
        return min(map(float, schedule)), max(map(float, schedule))
    alpha = settings.get("lines.alpha", scaling.alpha if scaling else 0.0)
    beta = settings.get("lines.beta", scaling.beta if scaling else 0.0)
    ends = [(alpha, beta)]
    for key, value in settings.items():
        if key.startswith("lines.stacks.") and key.endswith(".alpha"):
            other = settings.get(f"{key.removesuffix('alpha')}beta")
            ends.append((value, 1 - value if other is None and isinstance(value, (int, float)) else other))
    found: list[float] = []
    for low, step in ends:
        rise = float(step) if isinstance(step, (int, float)) else 0.0
        found += [float(low), low + rise] if isinstance(low, (int, float)) else [0.0, rise]
    return min(found), max(found)


def ranges_of(sweep: Sweep) -> dict[str, Range]:
    """The keys that a search draws from a range."""
    return {key: said for key, said in sweep.grid.items() if isinstance(said, Range)}
