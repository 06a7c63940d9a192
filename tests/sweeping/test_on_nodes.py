"""`lines sweep --on ray`: the table, the winner and the bytes of a sweep here; nodes and drivers that are lost; what a
node refuses.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.api import on_ray
from lines_cli.engine.candidates import Known
from lines_cli.errors import OutputError
from lines_cli.plan.resources import Resources
from lines_cli.sweeping.config import load_sweep
from lines_cli.sweeping.on_nodes import OnNodes, Run, evaluate
from lines_cli.sweeping.trials import trials_of
from support.files import write_checkpoint
from support.ray_cluster import ON_A_CLUSTER, kill_node, nodes_of, renew, three_nodes
from support.run import run_lines
from support.sweeps import EVALUATION, LAYERS, inputs_in, sweep_yaml

SLOWLY = "import time\ntime.sleep(2)\n"
ON_RAY = ["sweep", "--on", "ray", "--config", "sweep.yaml"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path)
    return tmp_path


# --- without a cluster ---


def test_without_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not installed it reads what to install; nothing is written, and no evaluation runs."""
    monkeypatch.setitem(sys.modules, "ray", None)
    sweep_yaml()
    ran = run_lines(*ON_RAY, "-o", "best")
    assert (ran.code, ran.trace) == (2, "")
    assert "ray is not installed" in ran.err
    assert not [path for path in folder.iterdir() if path.name.startswith("best") or path.name == "ran"]


@pytest.mark.parametrize("options", [["-o", "best"], ["--dry-run"]], ids=str)
def test_what_is_no_engine(folder: Path, options: list[str]) -> None:
    sweep_yaml()
    ran = run_lines("sweep", "--config", "sweep.yaml", "--on", "spark", *options)
    assert (ran.code, ran.trace) == (2, "")
    assert "not an engine" in ran.err
    with pytest.raises(lines.LinesError, match="not an engine"):
        lines.sweep("sweep.yaml", "best", on="spark")


@pytest.mark.slow
def test_a_cluster_that_is_not_there(folder: Path) -> None:
    """It is refused at once, with its address."""
    pytest.importorskip("ray")
    sweep_yaml()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # which nobody has afterwards
    ran = run_lines("sweep", "--config", "sweep.yaml", "-o", "best", "--on", f"ray://127.0.0.1:{port}")
    assert (ran.code, ran.trace) == (6, ""), ran.err
    assert f"127.0.0.1:{port} cannot be reached" in ran.err
    assert not Path("best.sweep").exists()


@pytest.fixture
def orders(folder: Path) -> Iterator[OnNodes]:
    """What a node would be given; and the process is where it was."""
    sweep_yaml(repeats=2)
    (folder / "best.sweep" / "candidates").mkdir(parents=True)
    (folder / "best.sweep" / "logs").mkdir()
    yield OnNodes(load_sweep(Path("sweep.yaml")), Path("best.sweep"), Resources(workers=1), Known())
    os.chdir(folder)


@pytest.mark.slow
def test_what_a_node_does(orders: OnNodes, folder: Path) -> None:
    """A task gives what a sweep here writes down, from any folder, and leaves no candidate."""
    sweep = load_sweep(Path("sweep.yaml"))
    trial = trials_of(sweep, [])[1]
    task = orders.task(trial, [Run(None, seed, sweep.recipe_of(trial.settings)) for seed in (0, 1)])
    os.chdir("/")
    found = task.function(*task.arguments)
    assert [(one.trial.id, one.task, one.seed) for one in found] == [(trial.id, None, 0), (trial.id, None, 1)]
    assert not [path for path in Path("best.sweep/candidates").rglob("*") if path.suffix == ".safetensors"]
    here = run_lines("sweep", "--config", "sweep.yaml", "-o", "here", "--json").json
    (same,) = [one for one in here["trials"] if one["id"] == trial.id]
    assert found[0].result.metrics == found[1].result.metrics == same["metrics"]


def test_what_a_node_refuses(orders: OnNodes, folder: Path) -> None:
    """Another version, a folder that is not there, one that is another: with the node's name; nothing runs."""
    order = orders.task(trials_of(load_sweep(Path("sweep.yaml")), [])[0], []).arguments[0]
    others = [
        (replace(order, version="0.0.1"), "and 0.0.1 asks"),
        (replace(order, cwd="/no/such"), "there is no /no/such there"),
        (replace(order, folder=folder / "elsewhere"), "there is no .*elsewhere there"),
        (replace(order, mark="0" * 32), "best.sweep is another folder there"),
    ]
    for other, said in others:
        with pytest.raises(OutputError, match=f"node {socket.gethostname()}: .*{said}"):
            evaluate(other, trials_of(load_sweep(Path("sweep.yaml")), [])[0], [])
    assert not Path("ran").exists()


# --- on a cluster ---


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with three_nodes() as made:
        yield made


@pytest.fixture
def here(cluster: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    renew(cluster)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    return folder


def swept(*options: object, output: str = "best", code: int = 0) -> Any:
    """What a sweep prints."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        ran = run_lines("sweep", "--config", "sweep.yaml", "-o", output, "--json", *options)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    return ran.json if code == 0 else ran.err


KEYS = ("id", "family", "settings", "metrics", "objective", "standard_error")


def assert_same(found: Any, whole: Any, *, output: str = "best", other: str = "whole") -> None:
    """The same table, verdict and winner, and the same bytes."""
    for key in ("winner", "objective", "front", "won", "said", "difference", "noise"):
        assert found[key] == whole[key], key
    assert [[one[key] for key in KEYS] for one in found["trials"]] == [
        [one[key] for key in KEYS] for one in whole["trials"]
    ]
    assert Path(output, "model.safetensors").read_bytes() == Path(other, "model.safetensors").read_bytes()
    assert not Path(f"{output}.sweep", "candidates").exists()


def recorded(output: str = "best") -> list[tuple[str, str | None, int]]:
    """The evaluations that are written down, and one that is just being written not."""
    read = [json.loads(line) for line in Path(f"{output}.sweep", "trials.jsonl").read_text().split("\n")[1:-1]]
    return [(line["trial"], line["task"], line["seed"]) for line in read]


def of_a_merge(folder: Path) -> dict[str, Any]:
    """A sweep of a TIES merge of two, task by task."""
    torch.manual_seed(3)
    base = load_file("base/model.safetensors")
    second = {name: tensor + 0.1 * torch.randn(6, 5) for name, tensor in base.items()}
    write_checkpoint(folder / "ft2", second, config={"num_hidden_layers": LAYERS})
    Path("evaluate.py").write_text(EVALUATION.replace('read("ft")', "read(sys.argv[2])"))
    return {
        "recipe": {
            "merge_method": "ties",
            "base_model": "base",
            "models": [{"model": "ft"}, {"model": "ft2"}],
            "parameters": {"density": 0.5},
            "lines": {"alpha": "auto", "beta": 0.5},
        },
        "grid": {"lines.beta": [0.0, 0.5], "parameters.density": [0.3, 0.6]},
        "evaluate": f"{shlex.quote(sys.executable)} -S evaluate.py {{checkpoint}} {{task}}",
        "objective": "mean(target - target_ft)",
        "controls": ["constant"],
    }


SWEEPS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "grid": lambda _: {"repeats": 2},
    "merge": of_a_merge,
    "search": lambda _: {
        "grid": {"lines.alpha": {"low": 0, "high": 1}},
        "search": {"sampler": "tpe", "trials": 14},  # the first ten are drawn at random
        "controls": False,
    },
}


class TestOnACluster:
    """What takes one."""

    pytestmark = ON_A_CLUSTER

    @pytest.mark.parametrize("kind", SWEEPS)
    def test_it_is_the_sweep_here(self, here: Path, kind: str) -> None:
        """Table, verdict, winner and bytes; evaluations run where Ray puts them, in the folder that asked."""
        if kind == "search":
            pytest.importorskip("optuna")
        sweep_yaml(**SWEEPS[kind](here))
        at_once = ["--parallel", 3] if kind == "search" else []
        whole = swept(*at_once, output="whole")
        ran = len(Path("ran").read_text().splitlines())
        assert_same(swept("--on", "ray", *at_once), whole)
        assert len(Path("ran").read_text().splitlines()) == 2 * ran
        assert sorted(recorded(), key=str) == sorted(recorded("whole"), key=str)
        assert_same(swept(), whole)
        assert len(Path("ran").read_text().splitlines()) == 2 * ran  # nothing was left

    def test_a_driver_that_is_lost(self, here: Path) -> None:
        """A sweep goes on without Ray from what was written down; no evaluation of it runs on."""
        sweep_yaml()
        whole = swept(output="whole")
        hangs = next(one["id"] for one in whole["trials"] if one["family"] == "constant")
        if_it = f"if os.environ['LINES_TRIAL'] == {hangs!r}:\n    open('hangs', 'w')\n    time.sleep(600)\n"
        Path("evaluate.py").write_text(f"import os, time\n{if_it}{EVALUATION}")
        with a_driver() as driver:
            while driver.poll() is None and not (Path("hangs").exists() and len(recorded()) > 3):
                time.sleep(0.05)
            assert evaluations()
            driver.kill()
        before = recorded()
        assert 0 < len(before) < len(whole["trials"])
        Path("evaluate.py").write_text(EVALUATION)
        until = time.monotonic() + 60
        while evaluations() and time.monotonic() < until:
            time.sleep(0.1)
        assert not evaluations()
        Path("ran").unlink(missing_ok=True)
        assert_same(swept(), whole)
        assert recorded()[: len(before)] == before
        assert len(Path("ran").read_text().splitlines()) == len(recorded()) - len(before)

    def test_an_evaluation_that_fails(self, here: Path) -> None:
        """That is its trial's failure, with what it said, and Ray does not try again."""
        failing = "import sys\nopen('tried', 'a').write(sys.argv[1] + '\\n')\nsys.exit('no luck')\n"
        Path("evaluate.py").write_text(
            "import os\nif os.environ['LINES_TRIAL'].startswith('constant'):\n"
            + "".join(f"    {line}\n" for line in failing.splitlines())
            + EVALUATION
        )
        sweep_yaml(controls=["constant"])
        found = swept("--on", "ray")
        failed = [one for one in found["trials"] if one["family"] == "constant"]
        assert all("exit code 1: no luck" in one["error"] for one in failed)
        assert len(Path("tried").read_text().splitlines()) == len(failed) == found["families"]["constant"]["failed"]

    def test_a_python_function(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It gets its module on the node, where it is imported; one that only this process has is refused by name."""
        judge = Path(__file__).with_name("test_sweep.py").read_text().partition('JUDGE = """')[2].partition('"""')[0]
        (here / "judging.py").write_text(judge)
        monkeypatch.syspath_prepend(str(here))
        monkeypatch.delitem(sys.modules, "judging", raising=False)
        sweep_yaml(evaluate="judging:judge", model="judging:model", objective="sum - sum_pre", controls=False)
        whole = swept(output="whole")
        assert_same(swept("--on", "ray"), whole)
        monkeypatch.setitem(sys.modules, "in_a_notebook", types.ModuleType("in_a_notebook"))
        sweep_yaml(evaluate="in_a_notebook:judge", model="judging:model", objective="sum", controls=False)
        said = swept("--on", "ray", output="other", code=2)
        assert "in_a_notebook cannot be imported" in said
        assert f"node {socket.gethostname()}" in said

    def test_a_function_that_ends_its_process(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """When Ray gives up, that trial has failed, and the sweep goes on; stdout is the JSON alone."""
        monkeypatch.setattr(on_ray, "_RETRIES", 0)
        judge = Path(__file__).with_name("test_sweep.py").read_text().partition('JUDGE = """')[2].partition('"""')[0]
        ends = "import os\n\ndef ends(model, trial):\n    if trial['settings']['lines.alpha'] == 0.5: os._exit(3)\n"
        (here / "ending.py").write_text(f"{judge}\n{ends}    return judge(model, trial)\n")
        sweep_yaml(evaluate="ending:ends", model="ending:model", objective="sum", controls=False)
        found = swept("--on", "ray", "--parallel", 1)
        errors = {one["settings"]["lines.alpha"]: one["error"] for one in found["trials"]}
        assert "Ray lost the process" in errors.pop(0.5)
        assert set(errors.values()) == {None}

    def test_a_folder_that_no_node_sees(self, here: Path) -> None:
        """The sweep ends before an evaluation runs, and says which folder."""
        sweep_yaml()
        (here / "mine").mkdir()
        fd = os.open(here / "mine", os.O_RDONLY)  # a path of this process alone
        try:
            said = swept("--on", "ray", output=f"/proc/self/fd/{fd}/best", code=6)
        finally:
            os.close(fd)
        assert f"there is no /proc/self/fd/{fd}/best.sweep there" in said
        assert not Path("ran").exists()

    def test_from_python(self, here: Path) -> None:
        """`lines.sweep(on=)` and `lines.edit(on=)`, in a process that is connected to a cluster, and stays so."""
        import ray

        sweep_yaml()
        whole = swept(output="whole")
        ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False)
        with closing(types.SimpleNamespace(close=ray.shutdown)):
            said: list[str] = []
            assert_same(lines.sweep("sweep.yaml", "best", on="ray", say=said.append), whole)
            assert len(said) == len(whole["trials"]) - 2
            assert ray.is_initialized()
            summary = lines.edit("base", "ft", "edited", alpha=whole["winner"]["lines.alpha"], on="ray")
            assert summary["output"] == "edited"
            assert Path("edited/model.safetensors").read_bytes() == Path("best/model.safetensors").read_bytes()
            assert ray.is_initialized()

    def test_nodes_that_are_lost(self, here: Path, cluster: Any) -> None:
        """A trial goes with its node, and runs again on another; none is written down twice."""
        sweep_yaml()
        whole = swept(output="whole")
        Path("evaluate.py").write_text(SLOWLY + EVALUATION)
        with a_driver() as driver:
            for _ in range(3):
                begun = candidates()
                while driver.poll() is None and not candidates() - begun:
                    time.sleep(0.05)
                    renew(cluster)
                if driver.poll() is None:
                    kill_node(cluster, nodes_of(cluster)[0])
            while driver.poll() is None:
                time.sleep(0.5)
                renew(cluster)
            assert driver.wait() == 0, SAID.read_text()
        assert_same(swept(), whole)
        assert len(recorded()) == len(set(recorded()))


def a_driver() -> Any:
    """The command on Ray, in a process of its own. What it says goes into a file: of each node that is lost Ray says
    pages, and a pipe that nobody reads is full after a few.
    """
    command = [sys.executable, "-m", "lines_cli", *ON_RAY, "-o", "best"]
    with SAID.open("w") as said:
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said)


SAID = Path("driver.txt")


def candidates() -> set[Path]:
    """Those that are in the making, or evaluated."""
    while True:
        with suppress(FileNotFoundError):  # a folder went while it was looked through
            return set(Path("best.sweep/candidates").glob("*/*/model.safetensors"))


def evaluations() -> list[str]:
    """The command lines of evaluations in this folder that run on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(path / "cwd") == os.getcwd() and b"evaluate.py" in (path / "cmdline").read_bytes():
                found.append((path / "cmdline").read_text())
        except OSError:
            continue
    return found
