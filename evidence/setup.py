"""What is run: seeds, tasks, rates, sizes; where files lie; results as small JSON, each written whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from evidence.texts import TASKS, Sizes

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "evidence" / "work"
VARIABLE = "LINES_EVIDENCE"  # names the set-up's file, for an evaluation in the process of `lines sweep`


@dataclass(frozen=True)
class Setup:
    """One run.

    Attributes:
        seeds: each deals texts anew, and trains anew. Seed 0 was used to choose this set-up, and is in none.
        tasks: that are fine-tuned; each is a control of the others.
        rate: of the fine-tunes that everything is made of.
        strong: a larger rate, at which more is forgotten; None leaves it out.
        light: a smaller rate, at which rounding matters; None leaves it out.
        grid: alphas of LiNeS and of reversed depth, and coefficients of constant scaling: the same number of each.
        full: every item, and every method.
        work: where checkpoints and results lie.
    """

    seeds: tuple[int, ...] = (1, 2)
    tasks: tuple[str, ...] = TASKS
    rate: float = 2e-4
    strong: float | None = None
    light: float | None = None
    epochs: int = 3
    sizes: Sizes = field(default_factory=Sizes)
    grid: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7)
    full: bool = False
    work: str = str(WORK)

    def in_turn(self, seed: int) -> tuple[str, ...]:
        """Two tasks of a seed, for what takes too long for all of them: over the seeds every task has its turn."""
        return tuple(dict.fromkeys(self.tasks[(2 * seed + step) % len(self.tasks)] for step in range(2)))

    @property
    def results(self) -> Path:
        return Path(self.work) / "results"


QUICK = Setup()
FULL = replace(QUICK, seeds=(1, 2, 3, 4), strong=6e-4, light=2e-5, full=True)


def save_setup(setup: Setup) -> Path:
    """Write a set-up to where the processes of a run find it."""
    path = Path(setup.work) / ("setup-full.json" if setup.full else "setup.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(setup))
    return path


def load_setup(path: Path) -> Setup:
    """Read a set-up."""
    said: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    said["sizes"] = Sizes(**said["sizes"])
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items()}
    return Setup(**values)


# --- results ---


def check_setup(setup: Setup) -> None:
    """Note what results are made with, beside them; those of another set-up are not gone on with.

    Raises:
        SystemExit: they are of another.
    """
    import torch

    from evidence.encoder import has_bfloat16

    path = setup.results / "setup.json"
    made: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"setup": {}, "on": []}
    free = ("seeds", "work", "full", "strong", "light")  # say what is run, not how
    own = json.loads(json.dumps({key: value for key, value in asdict(setup).items() if key not in free}))
    if made["setup"] and (other := [key for key in own if made["setup"].get(key) != own[key]]):
        told = "; ".join(f"{key} was {made['setup'].get(key)} and is {own[key]}" for key in other)
        raise SystemExit(f"{path}: results of another set-up: {told}.\nRemove {setup.work} to begin anew.")
    on = {"torch": torch.__version__, "processor": processor(), "bfloat16": has_bfloat16()}
    if on not in made["on"]:
        made["on"].append(on)
    write_json(path, {"setup": own, "on": made["on"]})


def processor() -> str:
    """What computes here, by its maker and kind."""
    import torch

    return str(torch.cpu.get_capabilities().get("cpu_name", "unknown"))


def save_result(path: Path, value: Mapping[str, Any]) -> None:
    """Write a result, with the processor that computed it: what is compared over items is to be of one, for a run that
    goes on on another trains its fine-tunes there anew.
    """
    write_json(path, {**value, "on": processor()})


def result_path(setup: Setup, item: str, *parts: object) -> Path:
    """The file of one result."""
    return setup.results / item / f"{'-'.join(str(part) for part in parts)}.json"


def write_json(path: Path, value: Any) -> None:
    """Write JSON that reads and compares well: keys as they come, numbers in four decimals."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    part.write_text(json.dumps(_rounded(value), indent=1) + "\n", encoding="utf-8")
    part.rename(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4) if abs(value) >= 0.01 else float(f"{value:.4g}")
    if isinstance(value, Mapping):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


# --- commands ---


def run_lines(*arguments: object, context: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Run a `lines` command with --json, and give what it prints.

    Args:
        arguments: of the command.
        context: what `evidence.judge` is to know, where the command evaluates by it.

    Raises:
        RuntimeError: the command fails; with what it says.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if context is not None:
        environment[VARIABLE] = json.dumps(context)
    command = [sys.executable, "-m", "lines_cli", *map(str, arguments), "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"lines {' '.join(map(str, arguments))}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    said: dict[str, Any] = json.loads(done.stdout)
    return said
