"""How long does it take to know what to do? Depth and a whole plan for a checkpoint of 100,000 tensors, from headers.

python benchmarks/plan.py [--rounds 5] [--gc]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lines_cli.checkpoint.header import lay_out
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.recipe.validate import edit_recipe, make_recipe
from lines_cli.scaling.find_depth import find_depth

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    for layer in range(64)
    for expert in range(520)
    for part in ("gate", "up", "down")
]
OTHERS = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(64) for part in "qkvo"]


def timed(action: Callable[[], object], rounds: int) -> list[float]:
    """The seconds that an action takes, time after time."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return seconds


def told(what: str, seconds: list[float]) -> None:
    """Print the median, least and greatest."""
    print(f"{what:42} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--gc", action="store_true", help="with the garbage collector, which the command line disables")
    options = parser.parse_args()
    if not options.gc:
        gc.disable()
    names = EXPERTS + OTHERS
    print(f"{len(names):,} tensor names, garbage collector {'on' if options.gc else 'off, as in the command line'}")
    told("find_depth", timed(lambda: find_depth(names), options.rounds))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{side}.safetensors" for side in ("base", "ft", "ft2", "ft3")]
        for file in files:
            file.write_bytes(lay_out([(name, "BF16", (1,)) for name in names], {})[0] + bytes(2 * len(names)))
        other = Path(folder) / "other.safetensors"
        said = {"format": "pt"}
        other.write_bytes(lay_out([(name, "BF16", (1,)) for name in names], said)[0] + bytes(2 * len(names)))
        base, *models = map(str, files)
        recipes = {
            "edit": edit_recipe(base, models[0]),
            "edit, headers that differ": edit_recipe(base, str(other)),
            "merge of 3": make_recipe({"base_model": base, "models": [{"model": model} for model in models]}, where=""),
        }
        for what, recipe in recipes.items():
            inputs = open_inputs(recipe)
            opening = timed(lambda recipe=recipe: open_inputs(recipe), options.rounds)  # type: ignore[misc]
            planning = timed(
                lambda recipe=recipe, inputs=inputs: make_plan(recipe, inputs, Path(folder) / "out"),  # type: ignore[misc]
                options.rounds,
            )
            told(f"{what}: open_inputs", opening)
            told(f"{what}: make_plan", planning)
            told(f"{what}: total", [sum(both) for both in zip(opening, planning, strict=True)])


if __name__ == "__main__":
    main()
