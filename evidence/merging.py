"""Item 2, merges of all tasks: every method with task vectors, tuned without LiNeS, with it, and reversed; and what
depth alone does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from evidence.encoder import base_folder
from evidence.finetunes import trained
from evidence.judge import context, make_judge
from evidence.one import points_of, sweep
from evidence.results import PAPER
from evidence.setup import Setup, result_path, save_result, save_setup
from lines_cli.storage.names import RECIPE

# What is said of a method beside its defaults: what its paper uses, where the default is not that.
SAID: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "dare_linear": {"density": 0.2},
    "dare_ties": {"density": 0.2},
    "della": {"density": 0.4},
    "della_linear": {"density": 0.4},
    "breadcrumbs": {"density": 0.9},
    "breadcrumbs_ties": {"density": 0.9},
}
# Largest coefficients where 1 is too little: of means, which are a fifth of a sum; of methods that were still improving
# at 1; and of a stock of models whose task vectors stand at right angles, for which it all but vanishes.
LARGEST = {
    "average": 4.0, "linear": 4.0, "ram": 2.5, "ramplus_tl": 2.5, "multislerp": 1.5, "ties": 1.5, "della": 1.5,
    "iso_c": 2.0, "iso_cts": 2.0, "model_stock": 75.0,
}  # fmt: skip
QUICK_METHODS = ("task_arithmetic", "ties")
# Of which depth alone is measured: the paper's, the mean, and what was best of texts.
SOME_METHODS = (*PAPER["merging"], "average", "iso_c", "tsv_m", "wudi")
# Of lambda without LiNeS, of beta with it.
STEPS = (0.6, 0.4, 0.8, 1.0, 0.2)
FAMILIES = ("plain", "lines", "reversed")


def methods_of(setup: Setup) -> tuple[str, ...]:
    """The methods that merge any number of task vectors, those of a short run first."""
    from lines_cli.methods import METHODS

    if not setup.full:
        return QUICK_METHODS
    return QUICK_METHODS + tuple(
        name
        for name, method in METHODS.items()
        if name not in QUICK_METHODS
        and method.takes == "task vectors"
        and (method.models[1] or len(setup.tasks)) >= len(setup.tasks)
    )


def recipe_of(setup: Setup, seed: int, method: str, **more: Any) -> dict[str, Any]:
    """A recipe that merges the fine-tunes of a seed; `more` are parameters of the method."""
    models = [trained(setup, seed, task, setup.rate) for task in setup.tasks]
    return recipe_for(method, base_folder(Path(setup.work)), models, **more)


def recipe_for(method: str, base: Path, models: Iterable[Path], **more: Any) -> dict[str, Any]:
    """A recipe that merges models of one base; `more` are parameters of the method."""
    return {
        "merge_method": method,
        "base_model": str(base),
        "models": [{"model": str(model)} for model in models],
        "parameters": {**SAID.get(method, {}), **more},
    }


def swept(
    setup: Setup,
    seed: int,
    folder: Path,
    recipe: dict[str, Any],
    grid: dict[str, Any],
    judge: str = "evidence.judge",
    **more: Any,
) -> list[dict[str, Any]]:
    """The points of one grid over a merge, as a module's `evaluate` judges them, which is to know `more`. The one with
    the largest `mean(tasks)` on validation is tested; of equal ones the first.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    said = {
        "recipe": path.name,
        "grid": grid,
        "controls": False,
        "evaluate": f"{judge}:evaluate",
        "model": f"{judge}:model",
        "objective": "mean(tasks)",
    }
    found = sweep(folder, said, context(save_setup(setup), seed, **more))
    points = points_of(found)
    winner = next(at for at, trial in enumerate(found["trials"]) if trial["settings"] == found["winner"])
    if "test" not in points[winner]:
        points[winner]["test"] = make_judge(setup, seed).tested(folder / "best")
    return points


def run(setup: Setup, seed: int, method: str) -> None:
    """One method of one seed, of the sentence encoder; nothing where its result is there."""
    _run(setup, seed, method, "merging", families)


def run_alone(setup: Setup, seed: int, method: str) -> None:
    """Depth alone, with one method of one seed, of the sentence encoder; nothing where its result is there."""
    _run(setup, seed, method, "depth-alone", depth_alone)


def _run(setup: Setup, seed: int, method: str, item: str, by: Callable[..., list[dict[str, Any]]]) -> None:
    path = result_path(setup, item, seed, method)
    if not path.exists():
        work = Path(setup.work) / f"seed{seed}" / item / method
        points = by(setup, seed, work, recipe_of(setup, seed, method), largest=LARGEST.get(method, 1.0))
        save_result(path, {"seed": seed, "method": method, "tasks": list(setup.tasks), "points": points})


def families(
    setup: Setup,
    seed: int,
    work: Path,
    recipe: dict[str, Any],
    *,
    largest: float,
    **judged: Any,
) -> list[dict[str, Any]]:
    """A merge tuned without LiNeS, with it, and reversed: as many points of each.

    Args:
        setup: of the run.
        seed: of the models.
        work: where the sweeps lie.
        recipe: of the merge, without LiNeS.
        largest: lambda, and beta, that is tried.
        judged: what `swept` is to know of who judges.
    """
    points, steps = [], [step * largest for step in STEPS]
    for family in FAMILIES:
        grid: dict[str, Any] = {"lines.beta": steps}
        own = recipe
        if family == "plain":
            grid = {"parameters.lambda": steps}
        else:
            schedule = "reversed" if family == "reversed" else "linear"
            own = {**recipe, "lines": {"alpha": "auto", "beta": steps[0], "schedule": schedule}}
        found = swept(setup, seed, work / family, own, grid, **judged)
        points += [{**point, "family": family} for point in found]
    return points


def depth_alone(
    setup: Setup,
    seed: int,
    work: Path,
    recipe: dict[str, Any],
    *,
    largest: float,
    **judged: Any,
) -> list[dict[str, Any]]:
    """A merge without LiNeS, with it, and with one coefficient for all blocks, the mean of LiNeS': of the last two only
    depth differs, for what lies outside the blocks has alpha in both. Arguments as of `families`.
    """
    steps = [step * largest for step in STEPS]
    grid: dict[str, Any] = {"lines.beta": steps}
    scaled = {**recipe, "lines": {"alpha": "auto", "beta": steps[0]}}
    found = {"lines": swept(setup, seed, work / "lines", scaled, grid, **judged)}
    # `auto` depends on the merge, not on beta
    alpha = yaml.safe_load((work / "lines" / "best" / RECIPE).read_text(encoding="utf-8"))["lines"]["alpha"]
    grid = {"lines.beta": [beta / 2 for beta in steps]}
    even = {**recipe, "lines": {"alpha": alpha, "beta": steps[0] / 2, "schedule": "constant"}}
    found["even"] = swept(setup, seed, work / "even", even, grid, **judged)
    found["plain"] = swept(setup, seed, work / "plain", recipe, {"parameters.lambda": steps}, **judged)
    return [{**point, "family": family} for family, points in found.items() for point in points]
