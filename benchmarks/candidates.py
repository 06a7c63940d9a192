"""Ten candidates of an edit, one after another: `candidates.py BASE FT` in a live module, `--disk OUT` on the disk.

The module holds the tensors of BASE by their names; nothing is computed with it. It is made before the first candidate
and restored after the last, as `lines.candidates` does. On the disk each candidate takes the place of the one before,
as in `lines sweep`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.engine.candidates import Candidates
from lines_cli.plan.resources import Resources
from lines_cli.sweeping.config import space_from
from lines_cli.sweeping.trials import combinations

ALPHAS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
GRID = {"lines.alpha": ALPHAS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("ft")
    parser.add_argument("--disk", type=Path, help="where the last candidate is left")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    recipe = {"base": options.base, "ft": options.ft}
    made = on_disk(recipe, options.device, options.disk) if options.disk else live(recipe, options.device)
    print("from the start of the process: seconds, and seconds of CPU time")
    for what in made:
        print(f"{what:12}{time.perf_counter() - _STARTED:8.2f}{time.process_time():8.2f}", flush=True)


_STARTED = time.perf_counter() - time.process_time()


def live(recipe: dict[str, str], device: str) -> Iterator[str]:
    yield "imported"
    module = module_of(recipe["base"], "cuda" if device.startswith("cuda") else "cpu")
    yield "module"
    for candidate in lines.candidates(recipe, GRID, module, device=device):
        yield f"alpha {candidate.settings['lines.alpha']}"
    yield "restored"


def on_disk(recipe: dict[str, str], device: str, out: Path) -> Iterator[str]:
    yield "imported"
    space = space_from(recipe, GRID)
    scratch = out.with_name("candidates")
    making = Candidates(Resources(device=device), scratch=scratch)
    before = None
    for settings in combinations(space):
        folder = scratch / f"{settings['lines.alpha']}"
        making.write(making.plan(space.recipe_of(settings), folder), folder, before=before)
        before = folder
        yield f"alpha {settings['lines.alpha']}"
    making.close()
    folder.rename(out)
    scratch.rmdir()


def module_of(folder: str, device: str) -> torch.nn.Module:
    module = torch.nn.Module()
    for path in sorted(Path(folder).glob("*.safetensors")):
        for name, tensor in load_file(path, device=device).items():
            *parts, last = name.split(".")
            inner = module
            for part in parts:
                if not hasattr(inner, part):
                    inner.add_module(part, torch.nn.Module())
                inner = getattr(inner, part)
            inner.register_parameter(last, torch.nn.Parameter(tensor, requires_grad=False))
    return module


if __name__ == "__main__":
    main()
