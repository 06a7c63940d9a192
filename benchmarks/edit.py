"""How fast and how small is `lines edit`? Against the disk, and against the script one would write without it.

    python benchmarks/edit.py             # a 3 GB bf16 model, 5 rounds, a few minutes and 12 GB of disk
    python benchmarks/edit.py --quick     # 0.3 GB, 3 rounds

The contenders run in turn, round after round, as whole processes:

    floor    cat base > /dev/null; cp ft out; sync out: both inputs read, one output written and made durable
    lines    lines edit base ft -o out, which flushes its output to the disk before it names it
    plain    load both with safetensors, loop over the tensors, save, sync (benchmarks/plain.py)

What is quoted are medians and the ratio to the floor of the same round. Importing torch costs the same whoever does it,
and is timed by itself in every round: `net` is the time without it.
"""

from __future__ import annotations

import argparse
import json
import sys

from timing import HERE, LINES, MODELS, Contender, describe_machine, make_model, rounds_of, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="0.3 GB and 3 rounds")
    parser.add_argument("--rounds", type=int, help="rounds (5; 3 with --quick)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results-edit.json")
    options = parser.parse_args()
    layers, width = (12, 1024) if options.quick else (28, 2048)
    rounds = options.rounds or (3 if options.quick else 5)

    base, ft = make_model("base", layers, width, 0.0), make_model("ft", layers, width, 0.002)
    out = MODELS / "out"
    weights = [sorted(folder.glob("*.safetensors")) for folder in (base, ft)]
    size = sum(path.stat().st_size for path in weights[1])

    floor = f"cat {base}/*.safetensors > /dev/null && mkdir {out} && cp {ft}/*.safetensors {out} && sync {out}/*"
    edit = [str(LINES), "edit", str(base), str(ft), "-o", str(out), "--device", "cpu", "--quiet"]
    plain = [sys.executable, str(HERE / "plain.py"), str(base), str(ft), str(out)]
    contenders = [
        Contender("import torch", [sys.executable, "-c", "import torch"]),
        Contender("floor", ["sh", "-c", floor]),
        Contender("lines", edit, imports_torch=True),
        Contender("plain", plain, imports_torch=True),
    ]

    hold = 1 if options.quick else 8
    rounds_of(contenders, rounds, inputs=weights[0] + weights[1], out=out, size=size, hold=hold)
    print(f"\n{size / 1e9:.2f} GB bf16 in {len(weights[1])} shards, {rounds} rounds, {describe_machine()}")
    rows = table(contenders)
    if options.save:
        report = {"model_bytes": size, "rounds": rounds, "machine": describe_machine(), "results": rows}
        (HERE / "results-edit.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
