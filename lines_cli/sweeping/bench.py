"""Where candidates are made and evaluated: in this process, for a sweep that runs in it or for trials that Ray has
placed in it.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path

from lines_cli.engine.candidates import Candidates, Known
from lines_cli.errors import DataError, MismatchError, RecipeError
from lines_cli.plan.plan import Plan
from lines_cli.plan.resources import Resources
from lines_cli.recipe.schema import Recipe
from lines_cli.storage.destination import naming
from lines_cli.sweeping.config import Sweep
from lines_cli.sweeping.evaluate import Result, command_for, function_named, run_command
from lines_cli.sweeping.live import Live
from lines_cli.sweeping.trials import Trial

CANDIDATES, LOGS = "candidates", "logs"
"""Folders in that of a sweep."""


class Bench:
    """Makes candidates, and has them evaluated.

    Args:
        sweep: what is asked.
        resources: for making candidates.
        folder: of the sweep, where what evaluations say is kept.
        scratch: candidates are made in it.
        slots: how many evaluations may run at a time, each with a CUDA device of its own, where there are any; None
            for one at a time, on what this process has.
        known: what others have measured of the inputs.
        keep_merged: whether a candidate of several models is made from merged task vectors that were kept.
    """

    def __init__(
        self,
        sweep: Sweep,
        resources: Resources,
        folder: Path,
        scratch: Path,
        *,
        slots: int | None = None,
        known: Known | None = None,
        keep_merged: bool = True,
    ) -> None:
        self.sweep, self._folder, self._scratch, self._slots = sweep, folder, scratch, slots
        self.stopping = threading.Event()
        of_merged = None if sweep.in_process else scratch
        self.candidates = Candidates(resources, scratch=of_merged, known=known, keep_merged=keep_merged)
        self._making = threading.Lock()
        self._last: dict[int, tuple[Path, Recipe, Plan]] = {}
        """For each slot: the folder of its last candidate, and what made that."""
        self._held: Live | None = None

    def evaluate(self, trial: Trial, recipe: Recipe, task: str | None, seed: int, slot: int = 0) -> Result:
        """Make a trial's candidate, and evaluate it once.

        Raises:
            LinesError: what is at fault is no single trial.
            KeyboardInterrupt: the sweep stops.
        """
        log = self._folder / LOGS / f"{trial.id}{f'-{_plain(task)}' if task else ''}-{seed}.log"
        folder = Path(os.path.abspath(self._scratch / trial.id))
        try:
            with self._making:
                if self.stopping.is_set():
                    raise KeyboardInterrupt
                live = self._make(slot, folder, recipe)
        except DataError as error:
            return Result(None, f"the candidate cannot be made: {error.message}", 0.0)
        if live is not None:
            return live.evaluate(trial, task, seed, log)
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

    def clear(self) -> None:
        """Remove the candidates that are there."""
        while self._last:
            _, (folder, _, _) = self._last.popitem()
            self.candidates.forget(folder)

    def _make(self, slot: int, folder: Path, recipe: Recipe) -> Live | None:
        """Make a candidate in a folder that takes the place of the last one; or in the module, which is given back.
        The same one is made again for another repeat or task, because the last evaluation may have changed it.

        Raises:
            DataError: it cannot be made.
        """
        before, made_by, plan = self._last.pop(slot, (None, None, None))
        if plan is None or (before, made_by) != (folder, recipe):
            try:
                plan = self.candidates.plan(recipe, folder)
            except (MismatchError, RecipeError) as error:  # of these settings: those of the first trial were planned
                raise DataError(error.message, hint=error.hint) from error
        live = self._live(plan) if self.sweep.in_process else None
        if live is not None:
            self.candidates.put(plan, live.tensors)
        else:
            try:
                self.candidates.write(plan, folder, before=before)
            except BaseException:
                self.candidates.forget(folder)
                raise
        self._last[slot] = folder, recipe, plan
        return live

    def _environment(self, trial: Trial, task: str | None, seed: int, slot: int) -> dict[str, str]:
        found = {"LINES_TRIAL": trial.id, "LINES_SEED": str(seed), "LINES_TASK": task or ""}
        if self._slots is not None and self._slots > 1 and (devices := _devices()):
            found["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        return found

    def _live(self, plan: Plan) -> Live:
        """The module that candidates are put into."""
        if self._held is None:
            function = function_named(self.sweep.evaluate, where=f"{self.sweep.where}: evaluate")
            make = function_named(self.sweep.model, where=f"{self.sweep.where}: model") if self.sweep.model else None
            self._held = Live(function, make, plan, self.sweep.timeout)
        return self._held


def _plain(text: str) -> str:
    """A name as a part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in text)[:100]


def _devices() -> list[str]:
    """The CUDA devices that evaluations may be given, one each."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [one for one in visible.split(",") if one.strip()]
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]
