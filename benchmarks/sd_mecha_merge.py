"""What sd-mecha is asked to do: sd_mecha_merge.py sum|ties OUT FIRST LAST BASE FT ...

The coefficient of a layer runs from FIRST to LAST; everything outside the layers has FIRST. `sum` adds up what the
fine-tunes changed, `ties` trims it to a fifth tensor by tensor, elects signs by their number, and averages. sd-mecha
reads and writes single files, so shards are merged one by one, each with its namesakes.
"""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path

import sd_mecha
import torch
from safetensors import safe_open


def main(method: str, out: Path, first: float, last: float, base: Path, *tuned: Path) -> None:
    out.mkdir()
    names = {}
    for file in sorted(base.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names[file.name] = list(opened.keys())
    depths = {name: re.search(r"layers\.(\d+)\.", name) for held in names.values() for name in held}
    deepest = max(int(found[1]) for found in depths.values() if found)
    coefficients = {
        name: first + (last - first) * int(found[1]) / deepest if found else first for name, found in depths.items()
    }
    for file_name, held in names.items():
        start = sd_mecha.model((base / file_name).resolve())
        deltas = [sd_mecha.model((folder / file_name).resolve()) - start for folder in tuned]
        by_tensor = {name: coefficients[name] for name in held}
        merged = sd_mecha.ties_sum(*deltas, k=0.2) if method == "ties" else deltas[0]
        recipe = start + merged * by_tensor
        for delta in deltas[1:] if method == "sum" else []:
            recipe = recipe + delta * by_tensor
        sd_mecha.merge(
            recipe,
            output=(out / file_name).resolve(),
            merge_dtype=torch.float32,
            output_dtype=torch.bfloat16,
            omit_non_finite_inputs=False,
        )


if __name__ == "__main__":
    logging.disable()
    kind, folder, at_first, at_last, *models = sys.argv[1:]
    main(kind, Path(folder), float(at_first), float(at_last), *map(Path, models))
