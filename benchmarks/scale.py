"""What a merge takes on several machines: the cost model of docs/scale.md, and a simulation from measured part times.

    python benchmarks/scale.py            # the table
    python benchmarks/scale.py --measure  # parts of a small merge, timed; three Ray nodes here, foreseen and timed

Core-seconds per GB are those of RESULTS.md ("Where the time goes"), for bf16 on the machine that is described there.
"""

from __future__ import annotations

import argparse
import heapq
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Stage:
    """One stage of a run, per GB of its output: core-seconds, GB read, GB written."""

    cpu: float
    reads: float
    writes: float = 0.0


EDIT = [Stage(1.3, 2, 1)]
SUM_OF_THREE = [Stage(4.95 / 1.67, 4, 1)]
TIES_OF_THREE = [Stage(8.0 / 1.67, 4), Stage(3.8 / 1.67, 4), Stage(7.75 / 1.67, 4, 1)]
RUNS = {"edit": EDIT, "sum of three": SUM_OF_THREE, "TIES of three": TIES_OF_THREE}
OUTPUTS = {"70 B": 141.0, "671 B": 1342.0}  # GB in bf16

WAITING = 1.6  # seconds that pass on two cores over those that core-seconds come to: RESULTS.md, 0.65 and 0.95 to 1.1
START = 3.0  # seconds of a part before it reads: Python, torch, headers


@dataclass(frozen=True)
class Cluster:
    """Machines, with what each can take from the shared disk, and what that can give to all: GB/s."""

    nodes: int
    cores: int = 16
    link: float = 3.0  # a link of 25 Gbit/s
    shared: float = 20.0


def seconds(stages: Sequence[Stage], output: float, cluster: Cluster) -> tuple[float, list[str]]:
    """What a run takes, and what each stage waits for."""
    total, waits = 0.0, []
    for stage in stages:
        bytes_moved = (stage.reads + stage.writes) * output
        ways = {
            "CPU": WAITING * stage.cpu * output / (cluster.cores * cluster.nodes),
            "link": bytes_moved / (cluster.link * cluster.nodes),
            "disk": bytes_moved / cluster.shared,
        }
        slowest = max(ways, key=lambda way: ways[way])
        total += START + ways[slowest]
        waits.append(slowest)
    return total, waits


def table() -> str:
    """The table of docs/scale.md."""
    lines = ["| model, output in bf16 | run | 1 node | 4 nodes | 16 nodes |", "|---|---|---|---|---|"]
    for model, output in OUTPUTS.items():
        for name, stages in RUNS.items():
            cells = []
            for nodes in (1, 4, 16):
                took, waits = seconds(stages, output, Cluster(nodes))
                cells.append(f"{took / 60:.1f} min ({', '.join(dict.fromkeys(waits))})")
            lines.append(f"| {model}, {output:,.0f} GB | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def makespan(parts: Sequence[float], slots: int) -> float:
    """How long parts take, each given to the slot that is free first, in order."""
    free = [0.0] * slots
    for part in parts:
        heapq.heapreplace(free, free[0] + part)
    return max(free)


def simulate(stages: Sequence[Sequence[float]], slots: int) -> float:
    """The same for stages, one after the other."""
    return sum(makespan(parts, slots) for parts in stages)


def measure() -> None:
    """Time the parts of a merge one by one, foresee three nodes, and time those."""
    import torch
    import yaml
    from safetensors.torch import save_file

    from lines_cli.api.on_ray import OnRay, do_parts
    from lines_cli.api.parts import open_parts, plan_parts, refuse_missing, run_parts
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.yaml_file import load_recipe

    warnings.simplefilter("ignore")
    one = Resources(workers=1, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for seed, side in enumerate(("base", "ft", "ft2")):
            chance = torch.Generator().manual_seed(seed)
            tensors = {f"layers.{n}.w": torch.randn(16_000_000, generator=chance).to(torch.bfloat16) for n in range(12)}
            (folder / side).mkdir()
            save_file(tensors, folder / side / "model.safetensors")
        recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}]}
        (folder / "m.yaml").write_text(yaml.safe_dump({**recipe, "parameters": {"density": 0.3}}))
        read = load_recipe(folder / "m.yaml")
        opened = plan_parts(read, folder / "one", folder / "plan.json", shares=6)
        by_stage: list[list[float]] = [[] for _ in opened.division.stages]
        for part in opened.division.parts:
            begun = time.perf_counter()
            run_parts(open_parts(folder / "plan.json"), f"{part.number}/{len(opened.division.parts)}", one)
            by_stage[part.stage].append(time.perf_counter() - begun)
        refuse_missing(opened)
        for stage, parts in zip(opened.division.stages, by_stage, strict=True):
            print(f"{stage:20} {' '.join(f'{part:.2f}' for part in parts)}")
        alone = sum(map(sum, by_stage))
        slots = min(3, os.cpu_count() or 1)  # three nodes that share this machine's cores
        from ray.cluster_utils import Cluster as Nodes

        memory = {"object_store_memory": 80 * 2**20}
        nodes: Any = Nodes(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **memory})
        for _ in range(3):
            nodes.add_node(num_cpus=1, **memory)
        nodes.wait_for_nodes()
        os.environ["RAY_ADDRESS"] = nodes.address
        found = []
        for turn in range(2):  # the first starts the workers
            shutil.rmtree(folder / f".many{turn}.lines", ignore_errors=True)
            begun = time.perf_counter()
            do_parts(read, folder / f"many{turn}", OnRay(None, one))
            found.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        do_parts(read, folder / "many1", OnRay(None, one, resume=True))  # all is done: what connecting takes
        connecting = time.perf_counter() - begun
        starting = start_of_workers()
        nodes.shutdown()
        foreseen = connecting + starting + simulate(by_stage, slots)
        print(f"{os.cpu_count()} cores; parts one by one {alone:.1f} s; on {slots} {simulate(by_stage, slots):.1f} s")
        print(f"connecting {connecting:.1f} s, starting three workers {starting:.1f} s: foreseen {foreseen:.1f} s")
        print(f"on three nodes, first run {found[0]:.1f} s, second {found[1]:.1f} s")


def start_of_workers() -> float:
    """How long it takes until three workers have imported what a part needs."""
    import ray

    def start() -> float:
        import lines_cli.engine.run_parts  # noqa: F401

        return time.time()

    quiet: Any = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init(address="auto", **quiet)
    begun = time.time()
    task: Any = ray.remote(start).options(num_cpus=1, scheduling_strategy="SPREAD")
    last = max(ray.get([task.remote() for _ in range(3)]))
    ray.shutdown()
    return float(last - begun)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true")
    if parser.parse_args().measure:
        measure()
    else:
        print(table())
