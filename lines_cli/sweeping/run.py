"""One sweep: candidates are made, evaluated and judged; the best is written as an output."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from lines_cli.api.calls import RunOptions, carry_out
from lines_cli.engine.candidate_files import remove
from lines_cli.engine.candidates import Candidates, nbytes_merged
from lines_cli.errors import DataError, MismatchError, OutputError, RecipeError, size
from lines_cli.methods import METHODS
from lines_cli.plan.plan import Plan
from lines_cli.plan.resources import Resources
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import recipe_from
from lines_cli.storage.destination import check_destination, is_one_file, naming
from lines_cli.storage.files import read_small
from lines_cli.storage.lock import RunLock
from lines_cli.storage.names import RECIPE
from lines_cli.sweeping.config import Sweep
from lines_cli.sweeping.evaluate import Result, command_for, function_named, run_command
from lines_cli.sweeping.live import Live
from lines_cli.sweeping.metrics import Metrics, NonsenseError, average
from lines_cli.sweeping.page import page
from lines_cli.sweeping.report import BASELINES, Judge, Judged, best, front, repeats, verdict
from lines_cli.sweeping.store import FILE, JOURNAL, Evaluation, Store
from lines_cli.sweeping.trials import Trial, check_recipe, shown, trials_of

Say = Callable[[str], None]
_MANY = 1000  # trials
_CANDIDATES, _LOGS = "candidates", "logs"
REPORT, _WINNER = "report.html", "winner.json"
_MOST_SAID = 2**24  # bytes


@dataclass(frozen=True)
class Options:
    """What a sweep may use, and how it goes about it.

    Attributes:
        resources: for making candidates.
        parallel: how many evaluations run at a time.
        force: discard another sweep's trials; replace an existing output.
        retry: evaluate once more what failed before.
        say: gets a line about each trial, and whatever else a person should know.
    """

    resources: Resources = field(default_factory=Resources)
    parallel: int = 1
    force: bool = False
    retry: bool = False
    say: Say = lambda _: None


@dataclass(frozen=True)
class Found:
    """What a sweep found.

    Attributes:
        sweep: what was asked.
        judged: every trial, baselines first.
        winner: the best of the grid; None where every trial failed.
        front: with several objectives the trials that none beats.
        said: which family did best (`report.verdict`).
        folder: with trials and report.
        summary: of the output that was written; None of a sweep with several objectives.
        notes: what a person should know.
    """

    sweep: Sweep
    judged: tuple[Judged, ...]
    winner: Judged | None
    front: tuple[Judged, ...]
    said: Mapping[str, Any]
    folder: Path
    summary: Mapping[str, Any] | None
    notes: tuple[str, ...]

    @property
    def shown(self) -> list[Judged]:
        """The best trials of each family, best first, or those that none beats; and all that failed, as far as there is
        room.
        """
        objective = self.sweep.objectives[0]
        ids = {one.trial.id for one in self.front}
        shown: list[Judged] = []
        for family in dict.fromkeys(one.trial.family for one in self.judged):
            own = [one for one in self.judged if one.trial.family == family and family not in BASELINES]
            valid = [one for one in own if one.objectives]
            valid.sort(key=lambda one: one.objectives[0], reverse=not objective.minimize)  # the first of equals first
            if self.front:
                valid = [one for one in valid if one.trial.id in ids]
            shown += [*valid[: _MOST_ON_FRONT if self.front else _SHOWN]]
            shown += [one for one in own if not one.objectives][:_SHOWN]
        return shown

    def to_json(self) -> dict[str, Any]:
        """As `--json` has it (docs/json.md)."""
        return {
            "winner": dict(self.winner.trial.settings) if self.winner else None,
            "objective": self.winner.objectives[0] if self.winner else None,
            "front": [one.trial.id for one in self.front],
            **{key: self.said.get(key) for key in ("won", "said", "difference", "noise", "families")},
            "trials": [one.to_json() for one in self.judged],
            "folder": str(self.folder),
            "output": None if self.summary is None else self.summary["output"],
            "notes": list(self.notes),
        }


_SHOWN, _MOST_ON_FRONT = 5, 20  # of a family


def folder_of(output: Path) -> Path:
    """Where a sweep keeps its trials and its report: beside its output."""
    return output.with_name(f"{output.name}.sweep")


def plan_sweep(sweep: Sweep, options: Options) -> dict[str, Any]:
    """What a sweep would do, and what it would take, as plain values; nothing is written or evaluated.

    Raises:
        LinesError: what can be refused before anything runs.
    """
    notes: list[str] = []
    trials = _trials(sweep, notes)
    plan = _largest_plan(sweep, trials, Candidates(options.resources), Path("candidate"))
    return {
        "trials": _numbers(sweep, trials, notes),
        "baselines": list(sweep.baselines),
        "evaluations": _evaluations(sweep, trials),
        "candidate_bytes": plan.bytes_written,
        "scratch_bytes": 0 if sweep.in_process else _scratch(sweep, plan, options),
        "notes": [*plan.notes, *notes, *_cost(sweep, trials, plan)],
    }


def _trials(sweep: Sweep, notes: list[str]) -> list[Trial]:
    """The trials of a grid; of a search one for each draw, whose values are not known yet."""
    if sweep.search is not None:
        from lines_cli.sweeping.search import middle

        trials = [Trial("lines", middle(sweep))]
        for trial in trials:
            check_recipe(sweep, trial)
        return trials
    return trials_of(sweep, notes)


def _largest_plan(sweep: Sweep, trials: Sequence[Trial], candidates: Candidates, output: Path) -> Plan:
    """The plan that writes most, where a grid's values decide how much that is (dtype, method, models); the first of
    equals.
    """
    differ: dict[str, Trial] = {}
    for trial in trials:
        words = {key: value for key, value in trial.settings.items() if not _is_number(value)}
        words.pop("lines.schedule", None)
        differ.setdefault(json.dumps(words, sort_keys=True), trial)
    found: Plan | None = None
    for trial in differ.values():
        try:
            plan = candidates.plan(sweep.recipe_of(trial.settings), output)
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


def _scratch(sweep: Sweep, plan: Plan, options: Options) -> int:
    """Bytes of scratch at most: a candidate for each evaluation that runs, or an input that is evaluated itself; and
    merged task vectors.
    """
    largest = plan.bytes_written
    if sweep.baselines:
        largest = max(largest, *(checkpoint.nbytes for checkpoint in plan.inputs.checkpoints))
    return largest + (options.parallel - 1) * plan.bytes_written + nbytes_merged(plan)


def _cost(sweep: Sweep, trials: Sequence[Trial], plan: Plan) -> Iterator[str]:
    number = _evaluations(sweep, trials)
    if number > _MANY:
        written = size(len(trials) * plan.bytes_written)
        where = "in memory" if sweep.in_process else "on the disk, one after the other"
        yield f"{number:,} evaluations: {written} of candidates are made for them, {where}"


class Sweeping:
    """A sweep at work.

    Args:
        sweep: what is asked.
        output: where the winner goes.
        options: what may be used.

    Raises:
        LinesError: what can be refused before anything runs.
    """

    def __init__(self, sweep: Sweep, output: Path, options: Options) -> None:
        if is_one_file(output):
            raise RecipeError(f"-o {output}: the winner of a sweep is a folder", hint="Give a folder.")
        self.sweep, self.output, self.options = sweep, output, options
        self.folder = folder_of(output)
        self.notes: list[str] = []
        self.trials = _trials(sweep, self.notes)
        self.stopping = threading.Event()
        self._making = threading.Lock()
        self._last: dict[int, tuple[Path, Recipe, Plan]] = {}
        """For each evaluation that runs at a time: the folder of its last candidate, and what made that."""
        self._logging = threading.Lock()
        self.candidates = Candidates(options.resources, scratch=None if sweep.in_process else self.folder / _CANDIDATES)
        self.plan = _largest_plan(sweep, self.trials, self.candidates, output)
        self.notes += [*self.plan.notes, *_cost(sweep, self.trials, self.plan)]
        self._begun = time.monotonic()

    def run(self) -> Found:
        """Run it: go on from where an earlier run ended, if there was one.

        Raises:
            LinesError: an input is refused, the objective asks for what no evaluation says, or every trial failed.
        """
        check_destination(
            self.output,
            inputs=self.plan.read_paths,
            nbytes=0,
            force=self.options.force or self._is_own(),
        )
        with naming(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = RunLock(self.folder, self.output)
        try:
            return self._run()
        finally:
            lock.release()

    def _run(self) -> Found:
        with naming(self.folder):
            remove(self.folder / _CANDIDATES)
            for name in (_CANDIDATES, _LOGS):
                (self.folder / name).mkdir(exist_ok=True)
        store = self._store()
        try:
            self._refuse_full_disk()
            judge = Judge(self.sweep, self._baselines(store))
            judged = self._judged(store, judge)
        finally:
            self.stopping.set()
            store.close()
            self.candidates.close()
            remove(self.folder / _CANDIDATES)
        return self._finish(judged)

    def _store(self) -> Store:
        try:
            return Store(self.folder, self._same(), retry=self.options.retry)
        except OutputError:
            if not self.options.force:
                raise
        with naming(self.folder):
            for name in (FILE, JOURNAL):
                (self.folder / name).unlink(missing_ok=True)
        return Store(self.folder, self._same())

    def _same(self) -> dict[str, Any]:
        """What makes evaluations this sweep's."""
        recipe = self.sweep.recipe.model_dump(mode="json", exclude_none=True)
        inputs = {os.path.realpath(p): [s.nbytes, s.mtime_ns, s.header] for p, s in self._inputs()}
        return {"recipe": recipe, "inputs": inputs, "evaluate": self.sweep.evaluate, "tasks": list(self.sweep.tasks)}

    def _inputs(self) -> Iterator[tuple[Path, Any]]:
        yield from zip(self.plan.paths, self.plan.states, strict=True)

    def _refuse_full_disk(self) -> None:
        if self.sweep.in_process:
            return
        needed, free = _scratch(self.sweep, self.plan, self.options), shutil.disk_usage(self.folder).free
        if needed > free:
            raise OutputError(
                f"{self.folder}: candidates need {size(needed)} of scratch, and {size(free)} are free",
                hint="Give an -o on another disk, or a smaller --parallel.",
            )

    # --- baselines ---

    def _baselines(self, store: Store) -> dict[str, Metrics]:
        """The metrics of the base and of the fine-tune, those that the objectives ask for."""
        found: dict[str, Metrics] = {}
        for which in self.sweep.baselines:
            trial = Trial(which, {})
            self._evaluate(store, trial, self._recipes_of(which))
            evaluations = [one for one in store.done.values() if one.trial.id == trial.id]
            failed = [one for one in evaluations if one.result.metrics is None]
            name = "the base" if which == "pre" else "the fine-tune"
            if failed:
                raise DataError(
                    f"the evaluation of {name}, which the objective asks for (_{which}), failed: "
                    f"{failed[0].result.error}",
                    hint="Mend the evaluation, and run the same command with --retry; what succeeded is kept.",
                )
            try:
                found[which] = average(repeats(evaluations))
            except NonsenseError as error:
                raise DataError(f"the evaluation of {name}: {error}") from error
        return found

    def _recipes_of(self, which: str) -> Callable[[str | None], Recipe]:
        """What makes a baseline: of several models each task's own."""
        recipe = self.sweep.recipe
        models = [source.model for source in recipe.merged]

        def made_by(task: str | None) -> Recipe:
            if which == "pre":
                if recipe.base_model is None:
                    raise RecipeError(
                        f"{self.sweep.where}: the objective asks for the base (_pre), and the recipe has none"
                    )
                return self._recipe_of_one(recipe.base_model)
            if task is not None:
                return self._recipe_of_one(self.sweep.tasks[task])
            if len(models) > 1:
                raise RecipeError(
                    f"{self.sweep.where}: the objective asks for the fine-tune (_ft), and the recipe has {len(models)}",
                    hint="Write {task} into evaluate: then each task is judged by its own model.",
                )
            return self._recipe_of_one(models[0])

        return made_by

    def _recipe_of_one(self, model: str) -> Recipe:
        """The recipe that gives one model back as it is. What is evaluated is a copy of an input, never the input: an
        evaluation may write into its checkpoint, or remove it.
        """
        own = self.sweep.recipe
        said: dict[str, Any] = {"models": [{"model": model}], "like": "ft", "max_shard_size": own.max_shard_size}
        if own.base_model is not None:
            said["base_model"] = own.base_model
        else:
            said["merge_method"] = next(name for name, method in METHODS.items() if method.models == (1, 1))
        if own.variant is not None:
            said["variant"] = own.variant
        if self.sweep.in_process and own.dtype is not None:
            said["dtype"] = own.dtype
        return recipe_from(said, where=self.sweep.where)

    # --- trials ---

    @property
    def parallel(self) -> int:
        """How many evaluations run at a time: in this process one."""
        return 1 if self.sweep.in_process else self.options.parallel

    def _judged(self, store: Store, judge: Judge) -> list[Judged]:
        sweep = self.sweep
        if sweep.search is not None:
            from lines_cli.sweeping.search import search

            return [*self._of_baselines(store, judge), *search(self, store, judge)]
        todo = {trial.id: trial for trial in self.trials if not self.is_done(store, trial)}
        before = len(self.trials) - len(todo)
        if before:
            self.options.say(f"{before} of {len(self.trials)} trials were evaluated before")
        judged = {trial.id: judge.judge(trial, self.of(store, trial)) for trial in self.trials if trial.id not in todo}
        for one in judged.values():
            self.refuse_missing_metric(one)
        for number, trial in enumerate(self.each(store, list(todo.values())), before + 1):
            one = judged[trial.id] = judge.judge(trial, self.of(store, trial))
            self.refuse_missing_metric(one)
            self.report(one, number, len(self.trials), len(todo), number - before)
        return [*self._of_baselines(store, judge), *(judged[trial.id] for trial in self.trials)]

    def _of_baselines(self, store: Store, judge: Judge) -> list[Judged]:
        return [judge.judge(Trial(which, {}), self.of(store, Trial(which, {}))) for which in self.sweep.baselines]

    def is_done(self, store: Store, trial: Trial) -> bool:
        """Whether all evaluations of a trial are there; or one of them failed, so that the others are of no use."""
        found = self.of(store, trial)
        return any(one.result.metrics is None for one in found) or len(found) == len(self._runs())

    def of(self, store: Store, trial: Trial) -> list[Evaluation]:
        """The evaluations of a trial that are there."""
        return [store.done[key] for task, seed in self._runs() if (key := (trial.id, task, seed)) in store.done]

    def _runs(self) -> list[tuple[str | None, int]]:
        """Task and seed of each evaluation of one trial."""
        tasks: Sequence[str | None] = list(self.sweep.tasks) if self.sweep.by_task else [None]
        return [(task, seed) for task in tasks for seed in range(self.sweep.repeats)]

    def each(self, store: Store, trials: Sequence[Trial]) -> Iterator[Trial]:
        """Evaluate trials, several at a time; gives each as it is done."""
        parallel = min(self.parallel, len(trials))
        if parallel <= 1:
            for trial in trials:
                self.evaluate(store, trial)
                yield trial
            return
        left, done = iter(trials), queue.SimpleQueue[Trial | BaseException | None]()
        taking = threading.Lock()

        def work(number: int) -> None:
            try:
                while not self.stopping.is_set():
                    with taking:
                        trial = next(left, None)
                    if trial is None:
                        break
                    self.evaluate(store, trial, slot=number)
                    done.put(trial)
                done.put(None)
            except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits
                done.put(error)

        threads = [
            threading.Thread(target=work, args=[n], name=f"lines-trial-{n}", daemon=True) for n in range(parallel)
        ]
        for thread in threads:
            thread.start()
        try:
            running = parallel
            while running:
                found = done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()
            self.stopping.clear()

    def evaluate(self, store: Store, trial: Trial, *, slot: int = 0) -> None:
        """Make a candidate, evaluate it, and keep what came of it."""
        self._evaluate(store, trial, lambda _: self.sweep.recipe_of(trial.settings), slot=slot)

    def _evaluate(self, store: Store, trial: Trial, made_by: Callable[[str | None], Recipe], *, slot: int = 0) -> None:
        for task, seed in self._runs():
            if (trial.id, task, seed) in store.done:
                continue
            result = self._one(trial, made_by(task), task, seed, slot)
            with self._logging:
                store.add(Evaluation(trial, task, seed, result))
            if result.metrics is None:
                break  # the others would be of no use

    def _one(self, trial: Trial, recipe: Recipe, task: str | None, seed: int, slot: int) -> Result:
        log = self.folder / _LOGS / f"{trial.id}{f'-{_plain(task)}' if task else ''}-{seed}.log"
        folder = Path(os.path.abspath(self.folder / _CANDIDATES / trial.id))
        try:
            with self._making:
                if self.stopping.is_set():
                    raise KeyboardInterrupt
                self._make(slot, folder, recipe)
        except DataError as error:
            return Result(None, f"the candidate cannot be made: {error.message}", 0.0)
        if self.sweep.in_process:
            return self._live.evaluate(trial, task, seed, log)
        command = command_for(self.sweep.evaluate, checkpoint=folder, task=task or "", seed=seed, id=trial.id)
        with naming(log):
            log.parent.mkdir(parents=True, exist_ok=True)
            return run_command(
                command,
                log=log,
                timeout=self.sweep.timeout,
                environment=self._environment(trial, task, seed, slot),
                stop=self.stopping.is_set,
            )

    def _make(self, slot: int, folder: Path, recipe: Recipe) -> None:
        """Make a candidate in the module, or in a folder that takes the place of the last one. The same one is made
        again for another repeat or task, because the last evaluation may have changed it.

        Raises:
            DataError: it cannot be made.
        """
        before, made_by, plan = self._last.pop(slot, (None, None, None))
        if plan is None or (before, made_by) != (folder, recipe):
            try:
                plan = self.candidates.plan(recipe, folder)
            except (MismatchError, RecipeError) as error:  # of these settings: those of the first trial were planned
                raise DataError(error.message, hint=error.hint) from error
        if self.sweep.in_process:
            self.candidates.put(plan, self._live.tensors)
        else:
            try:
                self.candidates.write(plan, folder, before=before)
            except BaseException:
                self.candidates.forget(folder)
                raise
        self._last[slot] = folder, recipe, plan

    def _environment(self, trial: Trial, task: str | None, seed: int, slot: int) -> dict[str, str]:
        found = {"LINES_TRIAL": trial.id, "LINES_SEED": str(seed), "LINES_TASK": task or ""}
        devices = _devices()
        if self.options.parallel > 1 and devices:
            found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return found

    @property
    def _live(self) -> Live:
        if not hasattr(self, "_held_live"):
            function = function_named(self.sweep.evaluate, where=f"{self.sweep.where}: evaluate")
            make = function_named(self.sweep.model, where=f"{self.sweep.where}: model") if self.sweep.model else None
            self._held_live = Live(function, make, self.plan, self.sweep.timeout)
        return self._held_live

    # --- what is said ---

    def refuse_missing_metric(self, one: Judged) -> None:
        """Refuse an objective that asks for what evaluations do not say: no later trial would say it.

        Raises:
            RecipeError: names what they do say.
        """
        if one.failure is None or one.metrics is not None or "no metric is called" not in one.failure:
            return
        raise RecipeError(
            f"{self.sweep.where}: the objective cannot be computed: {one.failure}",
            hint="Correct the objective and run it again: what was evaluated is kept.",
        )

    def report(self, one: Judged, number: int, total: int, todo: int, done: int) -> None:
        """A line about a trial that was judged."""
        left = todo - done
        elapsed = time.monotonic() - self._begun
        eta = f", {_duration(elapsed / done * left)} left" if left and done else ""
        what = f"failed: {one.failure}" if one.failure else "objective " + ", ".join(f"{v:.6g}" for v in one.objectives)
        self.options.say(
            f"{number}/{total} {one.trial.family} {shown(one.trial.settings)}: {what} ({one.seconds:.1f} s{eta})"
        )

    def _finish(self, judged: Sequence[Judged]) -> Found:
        sweep = self.sweep
        own = [one for one in judged if one.trial.family not in BASELINES]
        if not any(one.objectives for one in own):
            first = next((one for one in own if one.failure), None)
            why = "there was none" if first is None else first.failure
            if first is not None and first.said_metrics:
                raise DataError(
                    f"{sweep.where}: all {len(own)} trials failed, the first by its objective: {why}",
                    hint="Correct the objective and run it again: what was evaluated is kept.",
                )
            raise DataError(
                f"all {len(own)} trials failed; the first: {why}",
                hint=f"What each said is in {self.folder / _LOGS}. Mend the evaluation, and run it again with --retry.",
            )
        winner, on_front, summary = None, tuple[Judged, ...](), None
        if len(sweep.objectives) == 1:
            winner = best(own, sweep.objectives[0], "lines")
            if winner is None:
                raise DataError("all trials of the grid failed; those of the controls did not")
            summary = self._publish(winner)
        else:
            on_front = tuple(front(own, sweep.objectives))
        found = Found(
            sweep, tuple(judged), winner, on_front, verdict(sweep, judged), self.folder, summary, tuple(self.notes)
        )
        with naming(self.folder):
            (self.folder / REPORT).write_text(page(found), encoding="utf-8")
        return found

    def _publish(self, winner: Judged) -> Mapping[str, Any]:
        """Write the winner, as `lines edit` and `lines merge` do; or find that it is there. An earlier winner of this
        sweep makes way.
        """
        settings = dict(winner.trial.settings)
        replaces = self._is_own() and self._record().get("settings") != settings
        how = RunOptions(force=self.options.force or replaces, resume=True, verify=False, verify_inputs=False)
        record = self.folder / _WINNER
        with naming(record):
            self.folder.mkdir(exist_ok=True)
            record.write_text(json.dumps({"settings": settings, "recipe": None}) + "\n")
        recipe = self.sweep.recipe_of(settings)
        summary = carry_out(recipe, self.output, self.options.resources, how, quiet=True).summary
        with naming(record):
            record.write_text(json.dumps({"settings": settings, "recipe": _digest(self.output / RECIPE)}) + "\n")
        return summary

    def _is_own(self) -> bool:
        """Whether what stands at the output is an earlier winner of this sweep, and nobody's since."""
        record = self._record()
        return "recipe" in record and record["recipe"] in (None, _digest(self.output / RECIPE))

    def _record(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            said = json.loads(read_small(self.folder / _WINNER, _MOST_SAID))
            return said if isinstance(said, dict) else {}
        return {}


def _digest(path: Path) -> str | None:
    with suppress(OSError):
        return sha256(read_small(path, _MOST_SAID)).hexdigest()
    return None


def _plain(text: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)[:100]


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def _devices() -> list[str]:
    """The CUDA devices that evaluations may be given, one each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one for one in visible.split(",") if one.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
