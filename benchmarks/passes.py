"""What each pass of a merge takes with compiled kernels and without, by turns, in one process.

python benchmarks/passes.py RECIPE ... [--rounds 3]

Processor seconds of all threads and seconds of each pass, medians; importing and compiling are left out.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

from lines_cli.engine.fast import VARIABLE
from lines_cli.engine.measure import Track
from lines_cli.engine.run import run
from lines_cli.methods import fused, kernels
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.recipe.yaml_file import load_recipe

Found = dict[tuple[str, str], list[tuple[float, float]]]


def into(found: Found, kind: str) -> Track:
    """Keeps what each pass takes."""

    def track(title: str, _: int, done: Iterable[int]) -> Iterator[int]:
        processor, started = time.process_time(), time.perf_counter()
        yield from done
        found[title, kind].append((time.process_time() - processor, time.perf_counter() - started))

    return track


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    kernels.compile_all()
    by_recipe: dict[Path, Found] = {path: defaultdict(list) for path in options.recipes}
    for _ in range(options.rounds):
        for path, found in by_recipe.items():
            for number, kind in enumerate(("plain", "kernels")):
                os.environ[VARIABLE] = str(number)
                fused.use(None)
                recipe = load_recipe(path)
                with tempfile.TemporaryDirectory(dir=path.resolve().parent) as folder:
                    plan = make_plan(recipe, open_inputs(recipe, quiet=True), Path(folder) / "out")
                    run(plan, track=into(found, kind))
    for path, found in by_recipe.items():
        for (title, kind), taken in sorted(found.items()):
            processor, seconds = (statistics.median(each) for each in zip(*taken, strict=True))
            print(f"{path.name:30}{title:32}{kind:9}{processor:8.2f}{seconds:8.2f}")


if __name__ == "__main__":
    main()
