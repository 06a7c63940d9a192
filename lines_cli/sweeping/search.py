"""A search in place of a grid: Optuna draws values, and is told what came of them. Each family has a study of its own,
with as many trials.

What was drawn is written down in Optuna's own journal beside the trials, so that a search that was killed goes on with
what it had learnt.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.errors import OutputError, RecipeError
from lines_cli.sweeping.config import Range, Sweep
from lines_cli.sweeping.expression import Expression
from lines_cli.sweeping.report import Judge, Judged
from lines_cli.sweeping.store import JOURNAL, Store
from lines_cli.sweeping.trials import LINES, Trial, complete, constant, is_end, ranges_of, reversed_, span, why_not

if TYPE_CHECKING:
    from lines_cli.sweeping.run import Sweeping


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


def families_of(sweep: Sweep, notes: list[str]) -> list[str]:
    """The families that values are drawn for.

    Args:
        sweep: with a search.
        notes: gets a line for a control that makes no sense here.
    """
    families = [LINES]
    for control in sweep.controls:
        if why := why_not(sweep, control):
            notes.append(f"no {control} control: {why}")
        else:
            families.append(control)
    return families


def search(sweeping: Sweeping, store: Store, judge: Judge) -> list[Judged]:
    """Draw, evaluate and judge, family by family: as many at a time as evaluations run at a time.

    Raises:
        RecipeError: Optuna is not installed, or what a sampler of it needs.
        OutputError: its journal cannot be read.
    """
    sweep = sweeping.sweep
    assert sweep.search is not None
    families = families_of(sweep, sweeping.notes)
    numbers = sum(isinstance(said, Range) for said in sweep.grid.values())
    if sweep.search.sampler == "cmaes" and numbers < 2 and not any(r.points for r in ranges_of(sweep).values()):
        sweeping.notes.append("cmaes needs at least two ranges: with one, values are drawn at random")
    progress = _Progress(sweeping, sweep.search.trials * len(families))
    return [one for family in families for one in _one_family(sweeping, store, judge, family, progress)]


class _Progress:
    """Which of all trials is at hand."""

    def __init__(self, sweeping: Sweeping, total: int) -> None:
        self._sweeping, self._total, self._known, self._new = sweeping, total, 0, 0

    def known(self) -> None:
        """One more that had been evaluated before, or was drawn once more."""
        self._known += 1

    def add(self, one: Judged) -> None:
        self._new += 1
        self._sweeping.report(one, self._known + self._new, self._total, self._total - self._known, self._new)


def _one_family(sweeping: Sweeping, store: Store, judge: Judge, family: str, progress: _Progress) -> Iterable[Judged]:
    sweep, optuna = sweeping.sweep, _optuna(sweeping.sweep)
    assert sweep.search is not None
    study = _study(optuna, sweep, family, sweeping.folder / JOURNAL)
    found: dict[str, Judged] = {}
    for first in range(0, sweep.search.trials, sweeping.batch):
        numbers = range(first, min(first + sweeping.batch, sweep.search.trials))
        asked = {number: _asked(optuna, study, sweep, family, number) for number in numbers}
        todo = {trial.id: trial for trial in asked.values() if not sweeping.is_done(store, trial)}
        for _ in range(len(asked) - len(todo)):
            progress.known()
        for trial in sweeping.each(store, list(todo.values())):
            progress.add(judge.judge(trial, sweeping.of(store, trial)))
        for number, trial in asked.items():
            one = found[trial.id] = judge.judge(trial, sweeping.of(store, trial))
            sweeping.refuse_missing_metric(one)
            if study.trials[number].state == optuna.trial.TrialState.RUNNING:
                said = {"values": list(one.objectives)} if one.objectives else {"state": optuna.trial.TrialState.FAIL}
                study.tell(number, **said)
    return found.values()


def _asked(optuna: Any, study: Any, sweep: Sweep, family: str, number: int) -> Trial:
    """What was drawn as the study's trial of this number, or is drawn now.

    A sampler is made anew for each, from the search's seed and the number, so that a search that was killed draws what
    it would have drawn.
    """
    known = study.trials
    there = number < len(known)
    if there and _DRAWN in known[number].user_attrs:
        return _trial_of(sweep, family, json.loads(known[number].user_attrs[_DRAWN]))
    study.sampler = _sampler(optuna, sweep, number)
    # What an earlier version had begun to draw stays where another search was written down behind it.
    asked = optuna.trial.Trial(study, known[number]._trial_id) if there else study.ask()  # noqa: SLF001
    drawn = _draw(sweep, family, asked)
    asked.set_user_attr(_DRAWN, json.dumps(drawn))
    return _trial_of(sweep, family, drawn)


def _study(optuna: Any, sweep: Sweep, family: str, path: Path) -> Any:
    """A family's study: the same as long as the same is drawn from and judged in the same way.

    Raises:
        OutputError: the journal cannot be read.
    """
    assert sweep.search is not None
    judged = [[objective.expression.text, objective.minimize] for objective in sweep.objectives]
    grid = {key: said.text if isinstance(said, Expression) else said for key, said in sweep.grid.items()}
    same = repr([grid, judged, sweep.search.sampler, sweep.search.seed, sweep.repeats])
    try:
        _without_half_drawn(path)
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=_NoLock())
        return optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name=f"{family}-{sha256(same.encode()).hexdigest()[:10]}",
            directions=["minimize" if objective.minimize else "maximize" for objective in sweep.objectives],
            load_if_exists=True,
        )
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise OutputError(
            f"{path}: cannot be read as Optuna's journal: {error}",
            hint="Move it away and run the same command: evaluations are in trials.jsonl, and values are drawn again.",
        ) from error


class _NoLock:
    """For Optuna: a sweep's folder is locked already."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


_DRAWN = "drawn"
"""What a trial is given last, once all its values are drawn: these."""


def _without_half_drawn(path: Path) -> None:
    """Cut off what a process that was killed had begun to write: a torn line, behind which Optuna would write on; and a
    trial whose values were being drawn. A sampler that is made anew would draw the rest of them as if they were the
    first.
    """
    from optuna.storages.journal._storage import JournalOperation

    raw = path.read_bytes() if path.exists() else b""
    end = begun = raw.rfind(b"\n") + 1
    at = 0
    for line in raw[:end].splitlines(keepends=True):
        said = json.loads(line)
        if said["op_code"] == JournalOperation.CREATE_TRIAL:
            begun = at
        elif _DRAWN in said.get("user_attr", ()):
            begun = end
        at += len(line)
    if begun < len(raw):
        os.truncate(path, begun)


def _draw(sweep: Sweep, family: str, asked: Any) -> dict[str, Any]:
    """Values for what the grid leaves open; of the constant control one coefficient in place of alpha and beta."""
    drawn: dict[str, Any] = {}
    for key, said in sweep.grid.items():
        if family == "constant" and is_end(key):
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
    if family == "constant":
        value = float(drawn["constant"])
        ends = {key: value for key in sweep.grid if is_end(key)}  # what arithmetic over them comes to
        return Trial(family, constant(complete(sweep, {**ends, **drawn}), value))
    settings = complete(sweep, drawn)
    return Trial(family, reversed_(settings) if family == "reversed" else settings)


def _sampler(optuna: Any, sweep: Sweep, number: int) -> Any:
    assert sweep.search is not None
    seed = (sweep.search.seed * 1_000_003 + number) % 2**32
    samplers = optuna.samplers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if sweep.search.sampler == "cmaes":
            return samplers.CmaEsSampler(seed=seed)
        if sweep.search.sampler == "nsga2":
            # A generation of Optuna's own choice would be all of most searches: nothing but chance.
            return samplers.NSGAIISampler(population_size=min(50, max(4, sweep.search.trials // 4)), seed=seed)
        return samplers.TPESampler(seed=seed)


def _optuna(sweep: Sweep) -> Any:
    assert sweep.search is not None
    for name in ("optuna", *(["cmaes"] if sweep.search.sampler == "cmaes" else [])):
        try:
            import_module(name)
        except ImportError as error:
            raise RecipeError(
                f"search: the package {name} is not installed",
                hint="Install what a search needs (pip install optuna cmaes); or give lists of values, and no search.",
            ) from error
    optuna: Any = import_module("optuna")
    import_module("optuna.storages.journal")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna
