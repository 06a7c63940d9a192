"""Item 3: soups of fine-tunes of one task, and WiSE-FT on texts with typing errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evidence.encoder import base_folder
from evidence.finetunes import trained
from evidence.judge import context
from evidence.one import points_of, sweep
from evidence.setup import Setup, result_path, save_result, save_setup

MEMBERS = 4  # fine-tunes in a soup: as many orders of the texts, at two rates in turn
BETAS = (0.0, 0.1, 0.2, 0.3, 0.5)  # of LiNeS on a soup with alpha 1; 0 is the soup itself
CONSTANTS = (1.0, 1.1, 1.2, 1.3, 1.5)  # as many for constant scaling
GAMMAS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)  # the families meet at 0


def run_soup(setup: Setup, seed: int, task: str) -> None:
    """A uniform and a greedy soup, each as it is, with LiNeS, and scaled by a constant."""
    path = result_path(setup, "soups", seed, task)
    if path.exists():
        return
    rates = [setup.rate, setup.rate / 2]
    members = [trained(setup, seed, task, rates[order % 2], order) for order in range(MEMBERS)]
    work = Path(setup.work) / f"seed{seed}" / "soups" / task
    single = []
    for number, member in enumerate(members):
        said = {
            "recipe": {"base": str(base_folder(Path(setup.work))), "ft": str(member)},
            "grid": {"lines.alpha": [1.0]},
            **_judged(),
        }
        (found,) = points_of(sweep(work / f"single-{number}", said, context(save_setup(setup), seed, task)))
        single.append(found)
    points = [{**point, "soup": "single", "family": "single"} for point in single]
    order = sorted(range(MEMBERS), key=lambda at: -float(single[at]["target"]))
    points += _of_soup(setup, seed, task, work / "uniform", members, "uniform")
    chosen, held = [members[order[0]]], float(single[order[0]]["target"])
    for at in order[1:]:  # greedy: a member stays in if validation does not suffer
        tried = _soup(setup, seed, task, work / f"greedy-{at}", [*chosen, members[at]], {"lines.beta": [0.0]}, 1.0)
        if float(tried[0]["target"]) >= held:
            chosen, held = [*chosen, members[at]], float(tried[0]["target"])
    points += _of_soup(setup, seed, task, work / "greedy", chosen, "greedy")
    save_result(path, {"seed": seed, "task": task, "members": len(chosen), "points": points})


def _judged() -> dict[str, Any]:
    return {
        "controls": False,
        "evaluate": "evidence.judge:evaluate_robustness",
        "model": "evidence.judge:model",
        "objective": "target",
    }


def _of_soup(setup: Setup, seed: int, task: str, folder: Path, members: list[Path], name: str) -> list[dict[str, Any]]:
    lines = _soup(setup, seed, task, folder / "lines", members, {"lines.beta": list(BETAS)}, 1.0)
    grid = {"lines.alpha": list(CONSTANTS)}
    constant = _soup(setup, seed, task, folder / "constant", members, grid, 1.0)
    families = {"lines": lines, "constant": constant}
    return [{**point, "soup": name, "family": family} for family, found in families.items() for point in found]


def _soup(
    setup: Setup, seed: int, task: str, folder: Path, members: list[Path], grid: dict[str, Any], alpha: float
) -> list[dict[str, Any]]:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "merge_method": "average",
        "base_model": str(base_folder(Path(setup.work))),
        "models": [{"model": str(member)} for member in members],
        "lines": {"alpha": alpha, "beta": 0.0},
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    said = {"recipe": "merge.yaml", "grid": grid, **_judged()}
    return points_of(sweep(folder, said, context(save_setup(setup), seed, task)))


def run_wise(setup: Setup, seed: int, task: str) -> None:
    """WiSE-FT on texts with typing errors: from the base to the fine-tune, as it is, with LiNeS, and reversed."""
    path = result_path(setup, "wise", seed, task)
    if path.exists():
        return
    ft = trained(setup, seed, task, setup.rate)
    points = []
    for family, lines in {
        "constant": {"alpha": 1.0, "beta": 0.0},
        "lines": {"alpha": 0.5, "beta": 0.5},
        "reversed": {"alpha": 0.5, "beta": 0.5, "schedule": "reversed"},
    }.items():
        said = {
            "recipe": {"base": str(base_folder(Path(setup.work))), "ft": str(ft), "lines": lines},
            "grid": {"lines.gamma": list(GAMMAS)},
            **_judged(),
        }
        found = points_of(sweep(ft.parent / "wise" / family, said, context(save_setup(setup), seed, task)))
        points += [{**point, "family": family} for point in found]
    save_result(path, {"seed": seed, "task": task, "rate": setup.rate, "points": points})
