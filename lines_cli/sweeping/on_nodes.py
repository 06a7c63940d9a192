"""Trials as tasks of a cluster: what a node is given, what it does, what it gives back. A task makes its candidate in
the sweep's own folder, which all nodes see, and evaluates it on its node; who asked writes down what came of it.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lines_cli.api.on_ray import Task
from lines_cli.engine.candidates import Known
from lines_cli.errors import LinesError, OutputError
from lines_cli.hub.client import CACHE
from lines_cli.plan.resources import Resources
from lines_cli.recipe.schema import Recipe
from lines_cli.storage.destination import naming
from lines_cli.storage.files import read_small
from lines_cli.sweeping.bench import CANDIDATES, Bench
from lines_cli.sweeping.config import Sweep
from lines_cli.sweeping.evaluate import Result
from lines_cli.sweeping.store import Evaluation
from lines_cli.sweeping.trials import Trial
from lines_cli.version import __version__

_MARK = ".on-nodes"
"""A file among the candidates, by which a node finds that it sees the same folder."""


class Run(NamedTuple):
    """One evaluation that a trial asks for: of what this recipe makes."""

    task: str | None
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Order:
    """What a task needs to know, the trial apart.

    Attributes:
        version: of the program that asks.
        sweep: what is asked.
        folder: of the sweep.
        cwd: from which relative paths count, and in which commands run.
        mark: what `_MARK` holds.
        resources: for making candidates.
        known: what was measured of the inputs.
        cache: what is fetched from the Hub goes there.
    """

    version: str
    sweep: Sweep
    folder: Path
    cwd: str
    mark: str
    resources: Resources
    known: Known
    cache: Path | None


class OnNodes:
    """Makes tasks of trials.

    Args:
        sweep: what is asked.
        folder: of the sweep; candidates have theirs in it.
        resources: of each task.
        known: what was measured of the inputs.
    """

    def __init__(self, sweep: Sweep, folder: Path, resources: Resources, known: Known) -> None:
        folder, mark = Path(os.path.abspath(folder)), secrets.token_hex(16)
        with naming(folder):
            (folder / CANDIDATES / _MARK).write_text(mark)
        self._order = Order(__version__, sweep, folder, os.getcwd(), mark, resources, known, CACHE.get())

    def task(self, trial: Trial, runs: Sequence[Run]) -> Task:
        """A trial's evaluations, one after the other in one task."""
        return Task(f"lines trial {trial.id}", evaluate, (self._order, trial, tuple(runs)))

    @staticmethod
    def lost(task: Task, why: str) -> list[Evaluation]:
        """What is known of a trial that ended its process again and again."""
        _, trial, runs = task.arguments
        error = f"Ray lost the process that evaluated it, again and again: {why}"
        return [Evaluation(trial, runs[0].task, runs[0].seed, Result(None, error, 0.0))]


def evaluate(order: Order, trial: Trial, runs: Sequence[Run]) -> list[Evaluation]:
    """A trial, in a process on a node: what came of its evaluations, up to the first that failed.

    Raises:
        LinesError: the node does not see the folder, or has another version; or as a sweep would end.
    """
    try:
        bench = _bench(order)
        found: list[Evaluation] = []
        try:
            for task, seed, recipe in runs:
                found.append(Evaluation(trial, task, seed, bench.evaluate(trial, recipe, task, seed)))
                if found[-1].result.metrics is None:
                    break  # the others would be of no use
        finally:
            bench.clear()
    except LinesError as error:
        raise type(error)(f"node {socket.gethostname()}: {error.message}", hint=error.hint) from error
    return found


_held: tuple[str, Bench] | None = None
"""The last sweep's, by its mark: a process of the cluster does one trial after another."""


def _bench(order: Order) -> Bench:
    global _held  # noqa: PLW0603 - what a process keeps from one task to the next
    _refuse_elsewhere(order)
    if _held is not None and _held[0] == order.mark:
        return _held[1]
    CACHE.set(order.cache)
    # Of its own: a process that a cluster has lost may still be at work.
    scratch = order.folder / CANDIDATES / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    bench = Bench(order.sweep, order.resources, order.folder, scratch, known=order.known, keep_merged=False)
    _held = order.mark, bench
    return bench


def _refuse_elsewhere(order: Order) -> None:
    """Refuse to work where the sweep's folders are not, or are others.

    Raises:
        OutputError: which; or the version is another one.
    """
    if order.version != __version__:
        raise OutputError(
            f"has lines {__version__}, and {order.version} asks",
            hint="Install the same version of lines on all nodes.",
        )
    mark = None
    with suppress(OSError):
        os.chdir(order.cwd)
        mark = read_small(order.folder / CANDIDATES / _MARK, 2**10).decode("ascii", "replace")
    if mark != order.mark:
        missing = next((path for path in (order.cwd, order.folder) if not os.path.isdir(path)), None)
        what = f"there is no {missing}" if missing else f"{order.folder} is another folder"
        raise OutputError(
            f"{what} there: a sweep on Ray needs its folders on a disk that all nodes see by the same path",
            hint="Run it in a shared folder, with inputs and -o in shared folders.",
        )
