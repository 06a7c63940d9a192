"""How fast and how small is `lines merge`? Three fine-tunes and a base, every method, against the disk.

    python benchmarks/merge.py             # models of 1.7 GB bf16, 4 rounds, some 20 minutes and 9 GB of disk
    python benchmarks/merge.py --quick     # 0.46 GB, 2 rounds

The contenders run in turn, round after round, as whole processes:

    floor    all inputs but one to /dev/null, that one copied, the copy made durable
    others   lines merge with a recipe of that method; density 0.2 where there is one

What is quoted are medians and the ratio to the floor of the same round. Importing torch costs the same whoever does it,
and is timed by itself in every round: `net` is the time without it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from timing import HERE, LINES, MODELS, Contender, describe_machine, make_model, rounds_of, table

RECIPES = {
    "average": "merge_method: average",
    "task arithmetic": "merge_method: task_arithmetic",
    "TIES": "merge_method: ties\nparameters: {density: 0.2}",
    "TIES, alpha auto": "merge_method: ties\nparameters: {density: 0.2}",
    "TIES by tensor": "merge_method: ties\nparameters: {density: 0.2, trim: tensor}",
    "consensus": "merge_method: consensus",
    "DARE": "merge_method: dare_linear\nparameters: {density: 0.2}",
}


def recipe(name: str, base: Path, models: list[Path]) -> Path:
    """The YAML of one contender."""
    listed = "".join(f"  - model: {model.name}\n" for model in models)
    alpha = "auto" if "auto" in name else "0.3"
    text = f"base_model: {base.name}\nmodels:\n{listed}{RECIPES[name]}\nlines: {{alpha: {alpha}, beta: 0.5}}\n"
    path = MODELS / f"{name.replace(' ', '-')}.yaml"
    path.write_text(text)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.46 GB and 2 rounds")
    parser.add_argument("--rounds", type=int, help="rounds (4; 2 with --quick)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results-merge.json")
    options = parser.parse_args()
    layers, width = (12, 1024) if options.quick else (24, 1536)
    rounds = options.rounds or (2 if options.quick else 4)

    base = make_model("base", layers, width, 0.0)
    models = [make_model(f"ft{seed}", layers, width, 0.002, seed) for seed in (1, 2, 3)]
    out = MODELS / "out"
    weights = [path for folder in (base, *models) for path in sorted(folder.glob("*.safetensors"))]
    size = sum(path.stat().st_size for path in weights) // 4

    read = " ".join(f"{folder}/*.safetensors" for folder in (base, *models[:-1]))
    floor = f"cat {read} > /dev/null && mkdir {out} && cp {models[-1]}/*.safetensors {out} && sync {out}/*"
    contenders = [
        Contender("import torch", [sys.executable, "-c", "import torch"]),
        Contender("floor", ["sh", "-c", floor]),
    ]
    for name in RECIPES:
        command = [str(LINES), "merge", "--config", str(recipe(name, base, models)), "-o", str(out)]
        contenders.append(Contender(name, [*command, "--device", "cpu", "--quiet"], imports_torch=True))

    hold = 1 if options.quick else 4
    rounds_of(contenders, rounds, inputs=weights, out=out, size=size, hold=hold)
    print(f"\n3 models of {size / 1e9:.2f} GB bf16 and their base, {rounds} rounds, {describe_machine()}")
    rows = table(contenders)
    if options.save:
        report = {"model_bytes": size, "models": 3, "rounds": rounds, "machine": describe_machine(), "results": rows}
        (HERE / "results-merge.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
