"""What it takes to make a merge in parts, on Ray, and in an object store, beside one process.

    python benchmarks/cluster.py [--only one parts ray store] [--recipe TIES] [--shape llama-28-2048]

Task arithmetic and TIES of two fine-tunes, 3.3 GB of bf16 each, on this machine, one run after the other: in one
process; planned, run and finished in 1, 2, 4 and 8 parts a stage, one after the other, each with both cores; on Ray,
one node of all cores that `lines` starts; and with inputs and output in a store, which is a thread of this process that
keeps objects on the disk: it takes processor time from those that it serves. Seconds by the clock, and processor
seconds of the commands; those of Ray's workers are not seen.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from models import Model
from timing import ENVIRONMENT, WORK

from support.s3_server import S3Server, Stored

RECIPES: dict[str, dict[str, Any]] = {
    "task arithmetic": {"merge_method": "task_arithmetic", "lines": {"alpha": 0.2, "beta": 0.3}},
    "TIES": {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": 0.2, "beta": 0.3}},
}
MIB = 2**20


class Content:
    """What a file holds, read by ranges."""

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, path.stat().st_size

    def __len__(self) -> int:
        return self.nbytes

    def __getitem__(self, span: slice) -> bytes:
        first, end, _ = span.indices(self.nbytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(first)
            return file.read(end - first)


@dataclass
class OnDisk(Stored):  # type: ignore[misc]
    """An object whose tag does not need its bytes."""

    @property
    def tag(self) -> str:
        return f'"{id(self.content)}-{int(self.at.timestamp())}"'


class Server(S3Server):  # type: ignore[misc]
    """Objects in files."""

    def __init__(self, folder: Path) -> None:
        super().__init__("bench")
        self.folder = folder

    def link(self, key: str, path: Path) -> None:
        """A file that is there as an object; only a large one is read by ranges alone."""
        content: Any = Content(path) if path.stat().st_size > 64 * MIB else path.read_bytes()
        self.objects[key] = OnDisk(content)

    def put(self, key: str, content: bytes) -> None:
        path = self.folder / sha256(key.encode()).hexdigest()
        path.write_bytes(content)
        self.link(key, path)


def ran(command: str, environment: dict[str, str]) -> tuple[float, float]:
    """A command's seconds by the clock, and its processor seconds."""
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "lines_cli", *command.split()],
        cwd=WORK,
        env={**ENVIRONMENT, **environment},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if status:
        sys.exit(f"lines {command}: {said.decode()}")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime


def in_parts(recipe: str, shares: int) -> list[str]:
    """The commands of a run in parts."""
    plan = f"plan --config {recipe} -o out --parts {shares} --force --quiet"
    return [plan, "run plan.json --part {part} --workers 2 --quiet", "finish plan.json --quiet"]


def timed(name: str, commands: list[str], environment: dict[str, str]) -> tuple[float, float]:
    """All commands, one after the other; what they make is removed."""
    total, used = 0.0, 0.0
    for command in commands:
        each = [command]
        if "{part}" in command:
            count = len(json.loads((WORK / "plan.json").read_text())["parts"])
            each = [command.format(part=f"{part}/{count}") for part in range(1, count + 1)]
        for one in each:
            seconds, processor = ran(one, environment)
            total, used = total + seconds, used + processor
    print(f"{name:45} {total:7.1f} s {used:7.1f} CPU s   load {os.getloadavg()[0]:.1f}", flush=True)
    shutil.rmtree(WORK / "out", ignore_errors=True)
    return total, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["one", "parts", "ray", "store"])
    parser.add_argument("--recipe", choices=[*RECIPES], nargs="+", default=[*RECIPES])
    parser.add_argument("--shape", default="llama-28-2048")
    parser.add_argument("--rounds", type=int, default=2, help="of one process, and of Ray")
    options = parser.parse_args()
    models = [Model(role, options.shape) for role in ("base", "ft1", "ft2")]
    for model in models:
        if not model.config.exists():
            model.make()
    base, *tuned = (model.name for model in models)
    for name in options.recipe:
        own = RECIPES[name]
        file = f"{name.split()[0]}.yaml"
        recipe = {"base_model": base, "models": [{"model": one} for one in tuned], "max_shard_size": "1GB", **own}
        (WORK / file).write_text(yaml.safe_dump(recipe))
        alone = f"merge --config {file} -o out --force --workers 2 --quiet"
        files = [path for model in models for path in model.files]
        subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)  # into the page cache
        if "one" in options.only:
            for _ in range(options.rounds):
                timed(f"{name}, one process", [alone], {})
        if "parts" in options.only:
            for shares in (1, 2, 4, 8):
                timed(f"{name}, {shares} parts a stage", in_parts(file, shares), {})
        if "ray" in options.only:
            for _ in range(options.rounds):
                timed(f"{name}, Ray", [alone.replace("--workers 2", "--on ray")], {})
        if "store" in options.only:
            in_a_store(name, {**recipe, "base_model": f"s3://bench/{base}"}, models)


def in_a_store(name: str, recipe: dict[str, Any], models: list[Model]) -> None:
    """The same with inputs, output, and both in a store on loopback."""
    folder = WORK / "objects"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    recipe["models"] = [{"model": f"s3://bench/{one['model']}"} for one in recipe["models"]]
    (WORK / "store.yaml").write_text(yaml.safe_dump(recipe))
    local = f"{name.split(maxsplit=1)[0]}.yaml"
    more = "--force --workers 2 --quiet"
    with Server(folder) as server:
        for model in models:
            for path in (WORK / model.name).iterdir():
                server.link(f"bench/{model.name}/{path.name}", path)
        environment = server.environment
        timed(f"{name}, inputs in a store", [f"merge --config store.yaml -o out {more}"], environment)
        timed(f"{name}, output in a store", [f"merge --config {local} -o s3://bench/one {more}"], environment)
        timed(f"{name}, both in a store", [f"merge --config store.yaml -o s3://bench/two {more}"], environment)
        parts = [command.replace("-o out", "-o s3://bench/three") for command in in_parts("store.yaml", 4)]
        timed(f"{name}, both, 4 parts a stage", parts, environment)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
