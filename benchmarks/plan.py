"""How long does it take to know what to do? Depth and a whole plan for a checkpoint of 100,000 tensors, from headers.

python benchmarks/plan.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from lines_cli.checkpoint.header import lay_out
from lines_cli.depth import find_depth
from lines_cli.planning import make_plan, open_inputs
from lines_cli.recipe_check import edit_recipe

EXPERTS = [
    f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
    for layer in range(64)
    for expert in range(520)
    for part in ("gate", "up", "down")
]
OTHERS = [f"model.layers.{layer}.self_attn.{part}_proj.weight" for layer in range(64) for part in "qkvo"]


def timed(action: Callable[[], object], rounds: int) -> str:
    """The median, least and greatest of the seconds that an action takes."""
    seconds = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - started)
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    names = EXPERTS + OTHERS
    print(f"{len(names):,} tensor names")
    print(f"find_depth    {timed(lambda: find_depth(names), rounds)}")
    with tempfile.TemporaryDirectory() as folder:
        head, _ = lay_out([(name, "BF16", (0,)) for name in names], {})
        sides = [Path(folder) / f"{side}.safetensors" for side in ("base", "ft")]
        for side in sides:
            side.write_bytes(head)
        recipe = edit_recipe(*map(str, sides))
        inputs = open_inputs(recipe)
        print(f"open_inputs   {timed(lambda: open_inputs(recipe), rounds)}")
        print(f"make_plan     {timed(lambda: make_plan(recipe, inputs, Path(folder) / 'out'), rounds)}")


if __name__ == "__main__":
    main()
