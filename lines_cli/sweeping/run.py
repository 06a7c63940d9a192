"""One sweep: candidates are made, evaluated and judged; the best is written as an output."""

from __future__ import annotations

import json
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from lines_cli.api.calls import RunOptions, carry_out
from lines_cli.api.on_ray import Cluster, address_of, connected, needs_of
from lines_cli.engine.candidate_files import remove
from lines_cli.errors import DataError, OutputError, RecipeError, size
from lines_cli.methods import METHODS
from lines_cli.plan.resources import Resources
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import recipe_from
from lines_cli.storage.destination import check_destination, is_one_file, naming
from lines_cli.storage.files import read_small
from lines_cli.storage.lock import RunLock
from lines_cli.storage.names import RECIPE
from lines_cli.sweeping.bench import CANDIDATES, LOGS, Bench
from lines_cli.sweeping.config import Sweep
from lines_cli.sweeping.forecast import Options, cost, largest_plan, scratch_bytes, trials_to_come
from lines_cli.sweeping.metrics import Metrics, NonsenseError, average
from lines_cli.sweeping.on_nodes import OnNodes, Run
from lines_cli.sweeping.page import page
from lines_cli.sweeping.report import BASELINES, Judge, Judged, best, front, repeats, verdict
from lines_cli.sweeping.store import FILE, JOURNAL, Evaluation, Store
from lines_cli.sweeping.trials import Trial, shown

REPORT, _WINNER = "report.html", "winner.json"
_MOST_SAID = 2**24  # bytes


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
        self.trials = trials_to_come(sweep, self.notes)
        self._cluster: Cluster | None = None
        self._orders: OnNodes | None = None
        self._logging = threading.Lock()
        self.bench = Bench(sweep, options.resources, self.folder, self.folder / CANDIDATES, slots=options.parallel or 1)
        self.plan = largest_plan(sweep, self.trials, lambda recipe: self.bench.candidates.plan(recipe, output))
        self.notes += [*self.plan.notes, *cost(sweep, self.trials, self.plan)]
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
        with ExitStack() as opened:
            if self.options.on is not None:
                self._cluster = opened.enter_context(connected(address_of(self.options.on)))
            with naming(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                opened.callback(RunLock(self.folder, self.output).release)
            return self._run()

    def _run(self) -> Found:
        with naming(self.folder):
            remove(self.folder / CANDIDATES)
            for name in (CANDIDATES, LOGS):
                (self.folder / name).mkdir(exist_ok=True)
        store = self._store()
        try:
            self._refuse_full_disk()
            judge = Judge(self.sweep, self._baselines(store))
            judged = self._judged(store, judge)
        finally:
            self.bench.stopping.set()
            store.close()
            self.bench.candidates.close()
            remove(self.folder / CANDIDATES)
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
        options = self.options
        if self._cluster is not None and options.parallel is None:
            options = replace(options, parallel=self._cluster.cpus // (options.resources.workers or 1))
        needed, free = scratch_bytes(self.sweep, self.plan, options), shutil.disk_usage(self.folder).free
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
            for _ in self.each(store, [trial]):
                pass
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
    def batch(self) -> int:
        """How many trials a search draws at a time: as many as evaluations run at a time, in this process one."""
        return 1 if self.sweep.in_process and self._cluster is None else self.options.parallel or 1

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
        if self._cluster is not None:
            yield from self._each_on_ray(self._cluster, store, trials)
            return
        parallel = min(self.batch, len(trials))
        if parallel <= 1:
            for trial in trials:
                self._evaluate(store, trial)
                yield trial
            return
        left, done = iter(trials), queue.SimpleQueue[Trial | BaseException | None]()
        taking = threading.Lock()

        def work(number: int) -> None:
            try:
                while not self.bench.stopping.is_set():
                    with taking:
                        trial = next(left, None)
                    if trial is None:
                        break
                    self._evaluate(store, trial, slot=number)
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
            self.bench.stopping.set()
            for thread in threads:
                thread.join()
            self.bench.stopping.clear()

    def _evaluate(self, store: Store, trial: Trial, *, slot: int = 0) -> None:
        """Make a candidate, evaluate it, and keep what came of it."""
        for task, seed, recipe in self._left(store, trial):
            result = self.bench.evaluate(trial, recipe, task, seed, slot)
            with self._logging:
                store.add(Evaluation(trial, task, seed, result))
            if result.metrics is None:
                break  # the others would be of no use

    def _left(self, store: Store, trial: Trial) -> list[Run]:
        """The evaluations of a trial that are not there."""
        made_by = self._recipes_of(trial.family) if trial.family in BASELINES else None
        return [
            Run(task, seed, made_by(task) if made_by else self.sweep.recipe_of(trial.settings))
            for task, seed in self._runs()
            if (trial.id, task, seed) not in store.done
        ]

    def _each_on_ray(self, cluster: Cluster, store: Store, trials: Sequence[Trial]) -> Iterator[Trial]:
        """The same on the nodes of a cluster."""
        needs, orders = needs_of(self.options.resources, self._peak_memory), self._orders
        if orders is None:
            orders = self._orders = OnNodes(self.sweep, self.folder, needs.resources, self.bench.candidates.known)
            cluster.say_what_is_missing(needs, self.options.say)
        tasks = (orders.task(trial, self._left(store, trial)) for trial in trials)
        with closing(cluster.each(tasks, needs, at_once=self.options.parallel, lost=orders.lost)) as done:
            for evaluations in done:
                for one in evaluations:
                    store.add(one)
                yield evaluations[0].trial

    def _peak_memory(self, resources: Resources) -> int:
        """Of a task: to make a candidate, and of a live module the module. What a command takes nobody knows."""
        return self.plan.peak_memory(resources) + (self.plan.bytes_written if self.sweep.in_process else 0)

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
                hint=f"What each said is in {self.folder / LOGS}. Mend the evaluation, and run it again with --retry.",
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


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
