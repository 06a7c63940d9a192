"""A search in place of a grid: Optuna draws values, and is told what came of them. Each family has a study of its own,
with as many trials.

What was drawn is written down in Optuna's own journal beside the trials, so that a search that was killed goes on with
what it had learnt.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.errors import RecipeError
from lines_cli.sweep.config import Range, Space, Sweep
from lines_cli.sweep.report import Judge, Judged
from lines_cli.sweep.store import JOURNAL, Store
from lines_cli.sweep.trials import LINES, Trial, complete, constant, reversed_, span, why_not

if TYPE_CHECKING:
    from lines_cli.sweep.run import Sweeping


def middle(sweep: Sweep) -> dict[str, Any]:
    """Settings of a search of which every value is in the middle of its range, or the first of its list."""
    drawn: dict[str, Any] = {}
    for key, said in sweep.grid.items():
        if isinstance(said, Range):
            value = (said.low + said.high) / 2
            drawn[key] = value if said.points is None else [value] * said.points
        elif isinstance(said, tuple):
            drawn[key] = said[0]
    return complete(sweep, drawn)


def search(sweeping: Sweeping, store: Store, judge: Judge) -> list[Judged]:
    """Draw, evaluate and judge, family by family.

    Raises:
        RecipeError: Optuna is not installed.
    """
    sweep = sweeping.sweep
    assert sweep.search is not None
    families = [LINES]
    for control in sweep.controls:
        if why := why_not(sweep, control):
            sweeping.notes.append(f"no {control} control: {why}")
        else:
            families.append(control)
    judged: list[Judged] = []
    total = sweep.search.trials * len(families)
    for family in families:
        judged += _one_family(sweeping, store, judge, family, len(judged), total)
    return judged


def _one_family(sweeping: Sweeping, store: Store, judge: Judge, family: str, before: int, total: int) -> list[Judged]:
    sweep, optuna = sweeping.sweep, _optuna()
    assert sweep.search is not None
    study = optuna.create_study(
        storage=_storage(optuna, sweeping.folder / JOURNAL),
        study_name=family,
        sampler=_sampler(optuna, sweep),
        directions=["minimize" if objective.minimize else "maximize" for objective in sweep.objectives],
        load_if_exists=True,
    )
    found: dict[str, Judged] = {}
    begun = [trial for trial in study.trials if trial.state == optuna.trial.TrialState.RUNNING]
    drawn: Any
    for number in range(sweep.search.trials):
        finished = study.trials[number] if number < len(study.trials) else None
        if finished is not None and finished.state != optuna.trial.TrialState.RUNNING:
            trial = _trial_of(sweep, family, json.loads(finished.user_attrs["drawn"]))
            found[trial.id] = judge.judge(trial, sweeping.of(store, trial))
            continue
        if finished is not None:  # it was drawn, and then the sweep was killed
            drawn, running = json.loads(finished.user_attrs.get("drawn", "null")), begun[0]
            if drawn is None:
                study.tell(finished.number, state=optuna.trial.TrialState.FAIL)
                continue
            trial, at = _trial_of(sweep, family, drawn), running.number
        else:
            asked = study.ask()
            drawn = _draw(sweep, family, asked)
            asked.set_user_attr("drawn", json.dumps(drawn))
            trial, at = _trial_of(sweep, family, drawn), asked.number
        if not sweeping.is_done(store, trial):
            sweeping.evaluate(store, trial)
        one = found[trial.id] = judge.judge(trial, sweeping.of(store, trial))
        sweeping.refuse_missing_metric(one)
        if one.objectives:
            study.tell(at, list(one.objectives))
        else:
            study.tell(at, state=optuna.trial.TrialState.FAIL)
        sweeping.report(one, before + number + 1, total, total, before + number + 1)
    return list(found.values())


def _draw(sweep: Sweep, family: str, asked: Any) -> dict[str, Any]:
    """Values for what the grid leaves open; of the constant control one coefficient in place of alpha and beta."""
    drawn: dict[str, Any] = {}
    for key, said in sweep.grid.items():
        if family == "constant" and key in ("lines.alpha", "lines.beta", "lines.schedule"):
            continue
        if isinstance(said, Range):
            names = [key] if said.points is None else [f"{key}[{at}]" for at in range(said.points)]
            values = [asked.suggest_float(name, said.low, said.high, step=said.step, log=said.log) for name in names]
            drawn[key] = values[0] if said.points is None else values
        elif isinstance(said, tuple):
            drawn[key] = json.loads(asked.suggest_categorical(key, [json.dumps(value) for value in said]))
    if family == "constant":
        low, high = _ends(sweep)
        drawn["constant"] = asked.suggest_float("constant", low, high) if low < high else low
    return drawn


def _ends(sweep: Sweep) -> tuple[float, float]:
    """The least and the largest coefficient that LiNeS's own family can give a layer."""
    ends: list[float] = []
    picks: tuple[Callable[[Range], float], ...] = (lambda r: r.low, lambda r: r.high)
    for pick in picks:
        drawn: dict[str, Any] = {}
        for key, said in sweep.grid.items():
            if isinstance(said, Range):
                drawn[key] = pick(said) if said.points is None else [pick(said)] * said.points
            elif isinstance(said, tuple):
                drawn[key] = said[0]
        ends += span(sweep, complete(sweep, drawn))
    return min(ends), max(ends)


def _trial_of(sweep: Sweep, family: str, drawn: Mapping[str, Any]) -> Trial:
    values = {key: value for key, value in drawn.items() if key != "constant"}
    if family == "constant":
        return Trial(family, constant(_completed(sweep, values), float(drawn["constant"])))
    settings = complete(sweep, values)
    return Trial(family, reversed_(settings) if family == "reversed" else settings)


def _completed(space: Space, drawn: Mapping[str, Any]) -> dict[str, Any]:
    """What is drawn of keys that are no coefficients; arithmetic over coefficients is left out."""
    return {key: value for key, value in drawn.items() if key in space.grid}


def _storage(optuna: Any, path: Path) -> Any:
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.storages.JournalStorage(backend)


def _sampler(optuna: Any, sweep: Sweep) -> Any:
    assert sweep.search is not None
    seed = sweep.search.seed
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sweep.search.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        if sweep.search.sampler == "nsga2":
            return samplers.NSGAIISampler(seed=seed)
        return samplers.TPESampler(seed=seed)


def _optuna() -> Any:
    try:
        optuna: Any = import_module("optuna")
        import_module("optuna.storages.journal")
    except ImportError as error:
        raise RecipeError(
            "search: Optuna is not installed",
            hint="Install it (pip install optuna); or give grid: lists of values, and no search.",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
