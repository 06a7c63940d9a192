"""Measure lines against the disk and against its peers: python benchmarks/run.py, or make bench.

    python benchmarks/run.py --list                  # the cases
    python benchmarks/run.py --quick                 # all of them with small models, printed only
    python benchmarks/run.py --only edit three       # some
    python benchmarks/run.py --save                  # all, kept in results.json and told in RESULTS.md
    python benchmarks/run.py --save --device cuda    # the same with a GPU, kept in results-cuda.json

All of them take about half an hour, 24 GiB of memory so that inputs stay in the page cache, and 30 GB of disk; a model
is made when a case first needs it, and deleted when no later one does. Cases that `--save` does not run stay in
results.json as they are.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import report
from cases import QUICK, Case, Sizes, Suite
from models import Model
from timing import ENVIRONMENT, HERE, MEMORY, WORK, NotColdError, rounds_of

PEERS = HERE / ".venv-peers/bin/python"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small models, few rounds and no warm-up")
    parser.add_argument("--only", nargs="+", metavar="CASE", help="these cases; a name's beginning will do")
    parser.add_argument("--rounds", type=int, help="rounds of every case")
    parser.add_argument("--device", default="cpu", help="what lines is to compute on (cpu)")
    parser.add_argument("--save", action="store_true", help="update results.json and RESULTS.md")
    parser.add_argument("--keep", action="store_true", help="keep the models that were made")
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing")
    parser.add_argument("--render", action="store_true", help="write RESULTS.md from results.json and do nothing else")
    options = parser.parse_args()

    suite = Suite(QUICK if options.quick else Sizes(), options.device, PEERS.exists())
    names = {case.name for case in suite.cases()}
    wanted = options.only or [""]
    beginnings = tuple(name for name in wanted if name not in names)
    cases = [case for case in suite.cases() if case.name in wanted or case.name.startswith(beginnings)]
    if options.list or not cases:
        print("\n".join(f"{case.name:17}{_title(case)}" for case in suite.cases()))
        sys.exit(None if options.list else f"no case begins with {' or '.join(wanted)}")
    if not options.render:
        if not suite.peers:
            print("without mergekit and sd-mecha: make bench installs them in benchmarks/.venv-peers")
        machine, found = _machine(options.device), {}
        for number, case in enumerate(cases):
            print(f"{case.name}: {_title(case)}", flush=True)
            found[case.name] = _run(case, options.rounds or case.rounds, suite.sizes.warm_up, machine)
            if options.save:
                saved = _saved(options.device) | {case.name: found[case.name]}
                _results(options.device).write_text(json.dumps(saved, indent=1) + "\n")
            if not options.keep:
                _delete(set(case.models).difference(*(later.models for later in cases[number + 1 :])))
        print(report.tables(found))
        if not options.quick:
            print(f"\n{report.targets(found)}")
    if options.save or options.render:
        limits = "\n".join((HERE / page).read_text() for page in ("limits.md", "spectral.md"))
        (HERE / "RESULTS.md").write_text(report.document(_saved("cpu"), _saved("cuda"), _saved("earlier"), limits))


def _run(case: Case, rounds: int, warm_up: bool, machine: dict[str, Any]) -> dict[str, Any]:
    """Make the inputs and measure; returns what results.json keeps."""
    WORK.mkdir(exist_ok=True)
    for model in case.models:
        model.make()
    for name, text in case.recipes.items():
        (WORK / name).write_text(text)
    files = [file for model in case.models for file in model.files]
    told: dict[str, Any] = {
        "title": _title(case),
        "about": case.about,
        "date": dt.datetime.now(dt.timezone.utc).date().isoformat(),
        "machine": machine,
        "inputs": {model.name: model.nbytes for model in case.models},
        "writes": case.writes,
        "rounds": rounds,
        "reference": case.reference,
        "recipes": case.recipes,
    }
    try:
        measured, share = rounds_of(
            case.contenders, rounds, warm_up=warm_up, files=files, writes=case.writes, cold=case.cold
        )
    except NotColdError as error:
        return told | {"left_out": str(error), "contenders": []}
    told["in_page_cache"] = share
    told["contenders"] = [
        {"name": contender.name, "command": contender.command, "imports_torch": contender.imports_torch, **values}
        for contender, values in zip(case.contenders, measured, strict=True)
    ]
    return told


def _delete(models: set[Model]) -> None:
    for model in models:
        shutil.rmtree(WORK / model.name, ignore_errors=True)


def _title(case: Case) -> str:
    return case.title.format(size=report.size(case.models[0].nbytes if case.models else 0))


def _results(device: str) -> Path:
    """Where results are kept: beside those of the CPU those of a GPU, and what was measured `earlier` elsewhere."""
    kind = device.partition(":")[0]
    return HERE / ("results.json" if kind == "cpu" else f"results-{kind}.json")


def _saved(device: str) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads(_results(device).read_text()) if _results(device).exists() else {}
    return saved


def _machine(device: str) -> dict[str, Any]:
    """What figures depend on."""
    mount = subprocess.run(["df", "-PT", HERE], capture_output=True, text=True, check=False).stdout.split("\n")[1:2]
    told = {
        "cores": os.cpu_count(),
        "processor": _processor(),
        "vectors": _asked(sys.executable, "import torch; print(torch.backends.cpu.get_cpu_capability())"),
        "memory_gib": round(MEMORY / 2**30),
        "filesystem": mount[0].split()[1] if mount else "unknown",
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": _version(sys.executable, "torch"),
        "lines": _version(sys.executable, "lines-cli"),
        "device": device,
    }
    if device.startswith("cuda"):
        told["gpu"] = _asked(sys.executable, f"import torch; print(torch.cuda.get_device_name({device!r}))")
    if PEERS.exists():
        told |= {peer: _version(str(PEERS), peer) for peer in ("mergekit", "sd-mecha", "peft")}
    return told


def _version(python: str, package: str) -> str:
    return _asked(python, f"import importlib.metadata as m; print(m.version({package!r}))")


def _asked(python: str, program: str) -> str:
    """What a program prints."""
    command = [python, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT).stdout.strip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


if __name__ == "__main__":
    main()
