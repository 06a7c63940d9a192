"""How fast and how small is `lines inspect`? Headers of many shards; a base and its fine-tunes against the disk.

    python benchmarks/inspection.py           # models of 1.7 GB bf16, 4 rounds, some 5 minutes and 7 GB of disk
    python benchmarks/inspection.py --quick   # 0.46 GB, 2 rounds

The contenders run in turn, round after round, as whole processes:

    headers    1,000 tensors in 50 shards, of no size: what is told without reading a weight
    floor      the base and a fine-tune to /dev/null; of three fine-tunes all four
    others     lines inspect --base, of one fine-tune and of three

What is quoted are medians and the ratio to the floor of the same round; `net` is without importing torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from timing import HERE, LINES, MODELS, Contender, describe_machine, make_model, rounds_of, table

from lines_cli.checkpoint.header import lay_out

SHARDS, LAYERS = 50, 111


def many_shards() -> Path:
    """A checkpoint of 1,000 tensors without entries in 50 shards, and its index."""
    folder = MODELS / "headers"
    parts = [f"self_attn.{part}_proj" for part in "qkvo"] + [f"mlp.{part}_proj" for part in ("gate", "up", "down")]
    parts += ["input_layernorm", "post_attention_layernorm"]
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in parts]
    names.append("model.norm.weight")
    folder.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05d}-of-{SHARDS:05d}.safetensors"
        own = names[shard::SHARDS]
        head, _ = lay_out([(name, "BF16", (0,)) for name in own], {"format": "pt"})
        (folder / file).write_bytes(head)
        weight_map.update(dict.fromkeys(own, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.46 GB and 2 rounds")
    parser.add_argument("--rounds", type=int, help="rounds (4; 2 with --quick)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results-inspect.json")
    options = parser.parse_args()
    layers, width = (12, 1024) if options.quick else (24, 1536)
    rounds = options.rounds or (2 if options.quick else 4)

    base = make_model("base", layers, width, 0.0)
    models = [make_model(f"ft{seed}", layers, width, 0.002, seed) for seed in (1, 2, 3)]
    weights = [path for folder in (base, *models) for path in sorted(folder.glob("*.safetensors"))]
    size = sum(path.stat().st_size for path in weights) // 4
    hold = 1 if options.quick else 4
    found = {}
    for several in (models[:1], models):
        read = [base, *several]
        floor = f"cat {' '.join(f'{folder}/*.safetensors' for folder in read)} > /dev/null"
        command = [str(LINES), "inspect", *map(str, several), "--base", str(base), "--device", "cpu", "--quiet"]
        contenders = [
            Contender("import torch", [sys.executable, "-c", "import torch"]),
            Contender("floor: cat", ["sh", "-c", floor]),
            Contender("--base", command, imports_torch=True),
            Contender("headers", [str(LINES), "inspect", str(many_shards())]),
        ]
        inputs = [path for folder in read for path in sorted(folder.glob("*.safetensors"))]
        rounds_of(contenders, rounds, inputs=inputs, out=MODELS / "out", size=0, hold=hold)
        print(f"\n{len(several)} fine-tunes of {size / 1e9:.2f} GB bf16, {rounds} rounds, {describe_machine()}")
        found[f"{len(several)} fine-tunes"] = table(contenders)
    if options.save:
        report = {"model_bytes": size, "rounds": rounds, "machine": describe_machine(), "results": found}
        (HERE / "results-inspect.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
