"""Item 1, one fine-tune: LiNeS, constant scaling and reversed depth, by `lines sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evidence.encoder import base_folder
from evidence.finetunes import trained
from evidence.judge import context
from evidence.setup import Setup, result_path, run_lines, save_result, save_setup

# The paper's rule for one fine-tune.
RULE = "2 * target / target_ft + mean(control / control_pre)"


def sweep(folder: Path, said: dict[str, Any], known: dict[str, Any]) -> dict[str, Any]:
    """Run a sweep in a folder, or go on with it; what `lines sweep --json` says."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(said, sort_keys=False), encoding="utf-8")
    return run_lines("sweep", "--config", path, "-o", folder / "best", "--force", "--workers", 1, context=known)


def points_of(said: dict[str, Any]) -> list[dict[str, Any]]:
    """Each trial of a sweep: its family, its settings, its objective, its metrics.

    Raises:
        RuntimeError: a trial has failed.
    """
    failed = [trial["error"] for trial in said["trials"] if trial["error"]]
    if failed:
        raise RuntimeError(f"a trial failed: {failed[0]}")
    return [
        {
            "family": trial["family"],
            **{key.removeprefix("lines."): value for key, value in trial["settings"].items()},
            "objective": trial["objective"],
            **trial["metrics"],
        }
        for trial in said["trials"]
    ]


def run(setup: Setup, seed: int, task: str, rate: float) -> None:
    """One fine-tune, trained and swept; nothing where its result is there."""
    path = result_path(setup, "one", seed, task, f"{rate:g}")
    if path.exists():
        return
    ft = trained(setup, seed, task, rate)
    said = {
        "recipe": {"base": str(base_folder(Path(setup.work))), "ft": str(ft)},
        "grid": {"lines.alpha": list(setup.grid)},
        "evaluate": "evidence.judge:evaluate",
        "model": "evidence.judge:model",
        "objective": RULE,
    }
    found = sweep(ft.parent / "one", said, context(save_setup(setup), seed, task))
    save_result(path, {"seed": seed, "task": task, "rate": rate, "points": points_of(found)})
