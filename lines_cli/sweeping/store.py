"""What a sweep has found so far: one line of JSON for each evaluation, in `trials.jsonl`.

A line is written when its evaluation is over, and flushed to the disk; a sweep that was killed reads them and goes on.
The last line may be torn.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines_cli.errors import OutputError
from lines_cli.sweeping.evaluate import Result
from lines_cli.sweeping.metrics import NonsenseError, metrics_of
from lines_cli.sweeping.trials import Trial

FILE = "trials.jsonl"
JOURNAL = "optuna.log"
"""Beside it: what a search has drawn."""
SCHEMA = 1
_LARGEST = 2**30  # bytes

Key = tuple[str, str | None, int]
"""An evaluation: the trial's id, the task, the seed."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation of a trial."""

    trial: Trial
    task: str | None
    seed: int
    result: Result

    @property
    def key(self) -> Key:
        return self.trial.id, self.task, self.seed


class Store:
    """The file of evaluations.

    Args:
        folder: that it stands in.
        sweep: what makes two sweeps the same, so that one goes on with the other's evaluations: plain values.
        retry: forget the evaluations that failed.

    Raises:
        OutputError: the file is another sweep's, or cannot be read or written.
    """

    def __init__(self, folder: Path, sweep: Mapping[str, Any], *, retry: bool = False) -> None:
        self.path = folder / FILE
        self.done: dict[Key, Evaluation] = {}
        whole, differs, ours = 0, list[str](), True
        head = {"schema": SCHEMA, "sweep": dict(sweep)}
        try:
            if os.path.lexists(self.path) and os.path.getsize(self.path) > _LARGEST:
                raise OutputError(f"{self.path}: larger than any sweep's: move it away")
            raw = self.path.read_bytes() if os.path.lexists(self.path) else b""
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be read: {error.strerror or error}") from error
        for number, line in enumerate(raw.splitlines(keepends=True)):
            said = _object(line)
            if said is None:
                break  # torn; so is nothing behind it worth a reading
            if number == 0:
                differs = _differing(said, head)
                ours = said.get("schema") == SCHEMA and isinstance(said.get("sweep"), dict)
            elif (found := _evaluation(said)) is not None:
                self.done[found.key] = found
            whole += len(line)
        succeeded = any(found.result.metrics is not None for found in self.done.values())
        if differs and (succeeded or not ours):
            raise OutputError(
                f"{self.path}: the trials of another sweep, with other settings of {' and '.join(differs)}",
                hint="Give another -o; or --force, which discards those trials and begins anew.",
            )
        if differs:  # of which nothing succeeded, as where the command to evaluate had a typing error
            self.done, whole = {}, 0
        if retry:
            self.done = {key: found for key, found in self.done.items() if found.result.metrics is not None}
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
            os.ftruncate(self._fd, whole)
            os.lseek(self._fd, 0, os.SEEK_END)
            if not whole:
                self._write(head)
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def add(self, evaluation: Evaluation) -> None:
        """Keep an evaluation.

        Raises:
            OutputError: it cannot be written.
        """
        trial, result = evaluation.trial, evaluation.result
        try:
            self._write(
                {
                    "trial": trial.id,
                    "family": trial.family,
                    "settings": dict(trial.settings),
                    "task": evaluation.task,
                    "seed": evaluation.seed,
                    "metrics": result.metrics,
                    "error": result.error,
                    "seconds": round(result.seconds, 3),
                }
            )
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error
        self.done[evaluation.key] = evaluation

    def close(self) -> None:
        os.close(self._fd)

    def _write(self, said: Mapping[str, Any]) -> None:
        line = json.dumps(said).encode() + b"\n"
        while line:
            line = line[os.write(self._fd, line) :]
        os.fsync(self._fd)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return said if line.endswith(b"\n") and isinstance(said, dict) else None


def _differing(said: Mapping[str, Any], head: Mapping[str, Any]) -> list[str]:
    """In what a file's sweep is another one; empty if it is the same."""
    before, now = said.get("sweep"), head["sweep"]
    if said.get("schema") == SCHEMA and before == now:
        return []
    return [key for key in now if not isinstance(before, dict) or before.get(key) != now[key]] or ["its form"]


def _evaluation(said: Mapping[str, Any]) -> Evaluation | None:
    """An evaluation as its line has it; None where the line is no such thing."""
    try:
        trial = Trial(str(said["family"]), dict(said["settings"]))
        metrics = None if said["metrics"] is None else metrics_of(said["metrics"])
        error = None if metrics is not None else str(said["error"])
        task = None if said["task"] is None else str(said["task"])
        found = Evaluation(trial, task, int(said["seed"]), Result(metrics, error, float(said["seconds"])))
    except (KeyError, TypeError, ValueError, NonsenseError):
        return None
    return found if trial.id == said.get("trial") else None
