"""Ten candidates of an edit, one after another in a live module: `candidates.py BASE FT`.

The module holds the tensors of BASE by their names; nothing is computed with it. It is made before the first candidate
and restored after the last, as `lines.candidates` does.
"""

from __future__ import annotations

import argparse
import time

import torch

import lines_cli as lines

ALPHAS = [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base")
    parser.add_argument("ft")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    where = "cuda" if options.device.startswith("cuda") else "cpu"
    module = torch.nn.Module()
    for name, tensor in shapes(options.base).items():
        *path, last = name.split(".")
        inner = module
        for part in path:
            if not hasattr(inner, part):
                inner.add_module(part, torch.nn.Module())
            inner = getattr(inner, part)
        inner.register_parameter(last, torch.nn.Parameter(tensor.to(where), requires_grad=False))
    for number, _ in enumerate(
        lines.candidates(
            {"base": options.base, "ft": options.ft}, {"lines.alpha": ALPHAS}, module, device=options.device
        )
    ):
        print(number, f"{time.perf_counter():.2f}", f"{time.process_time():.2f}", flush=True)


def shapes(folder: str) -> dict[str, torch.Tensor]:
    from pathlib import Path

    from safetensors.torch import load_file

    found = {}
    for path in Path(folder).glob("*.safetensors"):
        found |= load_file(path)
    return found


if __name__ == "__main__":
    main()
