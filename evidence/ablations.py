"""Item 4, what else could be done with the same fine-tunes: depth rules, what lies outside the blocks, alpha, trimming,
what `lines inspect` tells beforehand, and rounding.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from evidence import merging, one
from evidence.encoder import base_folder, read_into
from evidence.finetunes import trained
from evidence.judge import context, make_judge
from evidence.setup import Setup, result_path, run_lines, save_result, save_setup

ALPHAS = (0.1, 0.4, 0.7)
SCHEDULES = ("linear", "power:2", "power:0.5", "reversed")
OUTSIDE = ("alpha", "base", "keep")  # `position` gives the embeddings alpha, too, and the pooler is not used
# Listed coefficients for any number of blocks: half of the blocks only.
LISTS = {"deep half only": [0.0, 1.0], "shallow half only": [1.0, 0.0]}

FIXED = (0.1, 0.3, 0.5)
BETAS = (0.2, 0.6, 1.0)

# Ways to store an edit of weights in bfloat16.
ROUNDINGS: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "stochastic": ("--rounding", "stochastic"),
    "float32": ("--dtype", "float32"),
}


def run_depth(setup: Setup, seed: int, task: str) -> None:
    """Depth rules, and what lies outside the blocks, of one fine-tune."""
    path = result_path(setup, "depth", seed, task)
    if path.exists():
        return
    ft = trained(setup, seed, task, setup.rate)
    sides = {"base": str(base_folder(Path(setup.work))), "ft": str(ft)}
    blocks = len(inspected(setup, ft)["layers"])
    halves = {name: [side for side in sides_ for _ in range(blocks // 2)] for name, sides_ in LISTS.items()}
    sweeps: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "schedule": ({}, {"lines.schedule": list(SCHEDULES), "lines.alpha": list(ALPHAS)}),
        "outside": ({}, {"lines.outside": list(OUTSIDE[1:]), "lines.alpha": list(ALPHAS)}),
        "list": ({"lines": {"schedule": [1.0] * blocks}}, {"lines.schedule": list(halves.values())}),
    }
    points = []
    for what, (lines, grid) in sweeps.items():
        said = {
            "recipe": {**sides, **lines},
            "grid": grid,
            "controls": False,
            "evaluate": "evidence.judge:evaluate",
            "model": "evidence.judge:model",
            "objective": one.RULE,
        }
        found = one.sweep(ft.parent / "depth" / what, said, context(save_setup(setup), seed, task))
        points += [{"what": what, **point} for point in one.points_of(found)]
    save_result(path, {"seed": seed, "task": task, "rate": setup.rate, "points": points})


def inspected(setup: Setup, ft: Path) -> dict[str, Any]:
    """What `lines inspect` says of a fine-tune."""
    return run_lines("inspect", ft, "--base", base_folder(Path(setup.work)))


def run_inspect(setup: Setup, seed: int, task: str, rate: float) -> None:
    """How the update is spread over the layers, to be held beside the alpha that did best."""
    path = result_path(setup, "inspect", seed, task, f"{rate:g}")
    if path.exists():
        return
    found = inspected(setup, trained(setup, seed, task, rate))
    (update,) = found["fine_tunes"]
    save_result(
        path,
        {
            "seed": seed,
            "task": task,
            "rate": rate,
            "layers": [layer["update_norm"] for layer in found["layers"]],
            "relative": [layer["relative_norm"] for layer in found["layers"]],
            "outside": found["outside"]["update_norm"],
            **{key: update[key] for key in ("first_third", "last_third", "relative_norm")},
        },
    )


def run_alpha(setup: Setup, seed: int, method: str) -> None:
    """A merge with fixed alphas in place of `auto`; and, of methods that trim, each tensor in place of the whole."""
    path = result_path(setup, "alpha", seed, method)
    if path.exists():
        return
    work = Path(setup.work) / f"seed{seed}" / "alpha" / method
    recipe = merging.recipe_of(setup, seed, method)
    largest = merging.LARGEST.get(method, 1.0)
    betas = [largest * beta for beta in BETAS]
    recipe["lines"] = {"alpha": FIXED[0], "beta": betas[0]}
    fixed = merging.swept(setup, seed, work / "fixed", recipe, {"lines.alpha": list(FIXED), "lines.beta": betas})
    points = [{**point, "family": "fixed"} for point in fixed]
    if method == "ties":
        steps = [largest * step for step in merging.STEPS]
        trimmed = merging.recipe_of(setup, seed, method, trim="tensor")
        plain = merging.swept(setup, seed, work / "tensor", trimmed, {"parameters.lambda": steps})
        trimmed["lines"] = {"alpha": "auto", "beta": steps[0]}
        scaled = merging.swept(setup, seed, work / "tensor-lines", trimmed, {"lines.beta": steps})
        points += [{**point, "family": "tensor"} for point in plain]
        points += [{**point, "family": "tensor, LiNeS"} for point in scaled]
    save_result(path, {"seed": seed, "method": method, "tasks": list(setup.tasks), "points": points})


def run_rounding(setup: Setup, seed: int, task: str, rate: float) -> None:
    """One edit with the defaults, stored in three ways: the coefficients that are left, and what they do. Measured in
    float32, so that the evaluation rounds nothing.
    """
    path = result_path(setup, "rounding", seed, task, f"{rate:g}")
    if path.exists():
        return
    ft = trained(setup, seed, task, rate)
    judge = make_judge(setup, seed, half=False)
    points = []
    for name, options in ROUNDINGS.items():
        out = ft.parent / "rounding" / name
        found = run_lines("edit", base_folder(Path(setup.work)), ft, "-o", out, "--force", *options)
        read_into(judge.encoder.module, out / "model.safetensors")
        layers = [[layer["coefficient"], layer["realised"]] for layer in found["layers"]]
        points.append({"rounding": name, "layers": layers, **judge.metrics(None, task)})
    shutil.rmtree(ft.parent / "rounding")
    save_result(path, {"seed": seed, "task": task, "rate": rate, "points": points})
