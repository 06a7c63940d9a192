"""`lines sweep`, held against a loop by hand: trials, winner, bytes; and what becomes of evaluations that go wrong."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import MismatchError
from lines_cli.sweeping import evaluate
from support import forked
from support.adapters import factors, write_adapter
from support.files import snapshot, write_checkpoint
from support.run import run_lines
from support.sweeps import EVALUATION, LAYERS, NAMES, inputs_in, sweep_yaml


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, a fine-tune and an evaluation, in which the process works."""
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path)
    return tmp_path


def by_hand(coefficients: Callable[[float], list[float]], alphas: list[float]) -> dict[float, float]:
    """The objective of each alpha, in plain torch."""
    base, ft = (load_file(f"{name}/model.safetensors") for name in ("base", "ft"))

    def near(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], layers: list[int]) -> float:
        return -sum(float((a[NAMES[n]].double() - b[NAMES[n]].double()).square().sum()) for n in layers)

    found = {}
    for alpha in alphas:
        made = {
            name: base[name] + torch.tensor(c) * (ft[name] - base[name])
            for name, c in zip(NAMES, coefficients(alpha), strict=True)
        }
        control = [near(made, base, [0]), near(made, base, [1])]
        found[alpha] = near(made, ft, [2, 3]) + sum(control) / 2
    return found


def test_the_winner_is_that_of_a_loop_by_hand(here: Path) -> None:
    """Over the same grid; the controls get as many trials; the output is the edit at the winner's values."""
    ran = run_lines("sweep", "--config", sweep_yaml(), "-o", "best", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    alphas = [1.0, 0.5, 0.2, 0.0]
    rising = by_hand(lambda a: [a + (1 - a) * n / (LAYERS - 1) for n in range(LAYERS)], alphas)
    falling = by_hand(lambda a: [a + (1 - a) * n / (LAYERS - 1) for n in reversed(range(LAYERS))], alphas)
    flat = by_hand(lambda a: [a] * LAYERS, alphas)
    best = max(rising, key=rising.__getitem__)
    assert ran.json["winner"] == {"lines.alpha": best, "lines.beta": 1 - best}
    assert ran.json["objective"] == pytest.approx(rising[best], rel=1e-4)
    assert ran.json["won"] == "lines"
    for family, expected in (("lines", rising), ("constant", flat), ("reversed", falling)):
        trials = [trial for trial in ran.json["trials"] if trial["family"] == family]
        found = {trial["settings"]["lines.alpha"]: trial["objective"] for trial in trials}
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    lines.edit("base", "ft", "reference", alpha=best)
    assert Path("best/model.safetensors").read_bytes() == Path("reference/model.safetensors").read_bytes()
    assert sorted(os.listdir("best.sweep")) == ["lock", "logs", "report.html", "trials.jsonl", "winner.json"]


@pytest.mark.slow
def test_a_mended_command_begins_anew_where_nothing_succeeded(here: Path) -> None:
    """A typing error in `evaluate:` is mended in the file, and the same command runs again, as its hint says."""
    wrong = {"evaluate": f"{sys.executable} -S no_such_file.py {{checkpoint}}"}
    failed = run_lines("sweep", "--config", sweep_yaml(**wrong), "-o", "best")
    assert (failed.code, "--retry" in failed.err) == (5, True)
    mended = run_lines("sweep", "--config", sweep_yaml(), "-o", "best", "--retry")
    assert mended.code == 0, mended.err
    kept = Path("best.sweep/trials.jsonl").read_text()
    assert "no_such_file" not in kept
    refused = run_lines("sweep", "--config", sweep_yaml(**wrong), "-o", "best", "--retry")
    assert refused.code == 6
    assert Path("best.sweep/trials.jsonl").read_text() == kept
    Path("best.sweep/trials.jsonl").write_text('{"notes": "of somebody else"}\n')
    assert run_lines("sweep", "--config", sweep_yaml(**wrong), "-o", "best", "--retry").code == 6
    assert "somebody else" in Path("best.sweep/trials.jsonl").read_text()


@pytest.mark.slow
def test_an_output_that_is_an_adapter_is_refused(here: Path) -> None:
    """What is evaluated is a whole model; said of the recipe or by the grid. An adapter as the fine-tune is swept."""
    write_adapter(Path("ad"), factors({name.removesuffix(".weight"): (6, 5) for name in NAMES}, 2, 3), r=2)
    recipe = {"base": "base", "ft": "ad"}
    said = {"objective": "target", "controls": False}
    for config in (
        {"recipe": recipe | {"as_adapter": True}, "grid": {"lines.alpha": [0.5]}},
        {"recipe": recipe, "grid": {"as_adapter": [True]}},
    ):
        ran = run_lines("sweep", "--config", sweep_yaml(**said, **config), "-o", "best")
        assert (ran.code, ran.trace) == (2, ""), ran.err
        assert "as_adapter: candidates are whole models" in ran.err
        assert not Path("best").exists()
    grid = {"lines.alpha": [0.5]}
    assert run_lines("sweep", "--config", sweep_yaml(**said, recipe=recipe, grid=grid), "-o", "best").code == 0
    lines.edit("base", "ad", "reference", alpha=0.5)
    assert Path("best/model.safetensors").read_bytes() == Path("reference/model.safetensors").read_bytes()


@pytest.mark.slow
def test_no_evaluation_runs_twice(here: Path) -> None:
    """The same command again, a larger grid, another objective: only what is new is evaluated."""
    two = {"lines.alpha": [1.0, 0.2]}
    assert run_lines("sweep", "--config", sweep_yaml(grid=two), "-o", "best").code == 0
    first = Path("ran").read_text().splitlines()
    assert len(first) == 2 + 3 * 2
    assert run_lines("sweep", "--config", sweep_yaml(grid=two), "-o", "best").code == 0
    assert Path("ran").read_text().splitlines() == first
    other = sweep_yaml(grid=two, objective=None, minimize="-target")
    assert run_lines("sweep", "--config", other, "-o", "best").code == 0
    assert Path("ran").read_text().splitlines() == first
    grid = {"lines.alpha": [1.0, 0.7, 0.2]}
    assert run_lines("sweep", "--config", sweep_yaml(grid=grid), "-o", "best").code == 0
    assert len(Path("ran").read_text().splitlines()) == len(first) + 3
    other = sweep_yaml(evaluate=f"{sys.executable} -S evaluate.py {{checkpoint}} x")
    refused = run_lines("sweep", "--config", other, "-o", "best")
    assert refused.code == 6
    assert "the trials of another sweep, with other settings of evaluate" in refused.err


@pytest.mark.slow
def test_a_winner_makes_way_for_the_next_one(here: Path) -> None:
    """Of the same sweep, after a change of grid or objective; what is somebody else's does not, and that is said
    before anything is evaluated.
    """
    said: dict[str, Any] = {"grid": {"lines.alpha": [1.0, 0.0]}, "controls": False}
    assert run_lines("sweep", "--config", sweep_yaml(**said, objective="target"), "-o", "best").code == 0
    first = snapshot(here / "best")
    assert run_lines("sweep", "--config", sweep_yaml(**said, objective="target"), "-o", "best").code == 0
    assert snapshot(here / "best") == first
    other = sweep_yaml(**said, minimize="target", objective=None)
    assert run_lines("sweep", "--config", other, "-o", "best").code == 0
    assert snapshot(here / "best") != first
    lines.edit("base", "ft", "best", alpha=0.7, force=True)
    Path("ran").unlink()
    said["grid"] = {"lines.alpha": [0.3, 0.4]}
    refused = run_lines("sweep", "--config", sweep_yaml(**said), "-o", "best")
    assert (refused.code, Path("ran").exists()) == (6, False), refused.err
    assert "best exists" in refused.err
    assert run_lines("sweep", "--config", sweep_yaml(**said), "-o", "best", "--force").code == 0


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo nothing useful; true {checkpoint}", "its last line is not JSON: nothing useful"),
        ("true {checkpoint}", "it printed nothing"),
        ("echo '[1]' {checkpoint}", "its last line is not JSON"),
        ("echo 3 # {checkpoint}", "expected one JSON object of metrics"),
        ("echo '{\"target\": NaN}' # {checkpoint}", "metric target is nan"),
        ('echo \'{"target": "high"}\' # {checkpoint}', "not a number"),
        ("echo '{}' # {checkpoint}", "without a metric"),
        ("echo the disk is full >&2; exit 3 # {checkpoint}", "ended with exit code 3: the disk is full"),
        ("kill -9 $$ # {checkpoint}", "ended by SIGKILL"),
    ],
)
@pytest.mark.slow
def test_evaluations_that_go_wrong_are_failed_trials(here: Path, command: str, said: str) -> None:
    """All are recorded; where all fail the sweep ends with 5, names the first, and has written no output."""
    config = sweep_yaml(evaluate=command, objective="target", controls=False)
    ran = run_lines("sweep", "--config", config, "-o", "best")
    assert (ran.code, ran.trace) == (5, ""), ran.err
    assert "all 4 trials failed; the first: " in ran.err
    assert said in ran.err
    assert not Path("best").exists()
    recorded = [json.loads(line) for line in Path("best.sweep/trials.jsonl").read_text().splitlines()[1:]]
    assert [line["metrics"] for line in recorded] == [None] * 4
    again = run_lines("sweep", "--config", config, "-o", "best")
    assert again.code == 5
    assert Path("best.sweep/trials.jsonl").read_text().count("\n") == 5


@pytest.mark.slow
def test_an_evaluation_that_hangs_is_ended_with_all_that_it_started(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After `timeout:`; what it started goes with it."""

    def seconds() -> float:
        """A clock that stands still until it has started something."""
        return time.monotonic() if Path("child").exists() and Path("child").read_text().endswith("\n") else 0.0

    monkeypatch.setattr(evaluate, "time", types.SimpleNamespace(monotonic=seconds))
    command = "sh -c 'sleep 300 & echo $! > child; wait' # {checkpoint}"
    config = sweep_yaml(evaluate=command, objective="target", controls=False, timeout="1s", grid={"lines.alpha": [0.5]})
    ran = run_lines("sweep", "--config", config, "-o", "best")
    assert ran.code == 5
    assert "took longer than timeout: 1 s" in ran.err
    assert _ends(int(Path("child").read_text()))


@pytest.mark.slow
def test_an_evaluation_ends_with_a_sweep_that_is_killed(here: Path) -> None:
    """Also where the sweep has no chance to end it."""
    config = sweep_yaml(evaluate="echo $$ > child; exec sleep 300 # {checkpoint}", controls=False)
    with forked.Forked(forked.command("sweep", "--config", config, "-o", "best")) as fork:
        while not Path("child").exists() or not Path("child").read_text().endswith("\n"):
            assert fork.poll() is None, fork.read()
            time.sleep(0.02)
        child = int(Path("child").read_text())
        assert _runs(child)
        fork.kill()
        fork.wait()
    assert _ends(child)


@pytest.mark.slow
def test_an_evaluation_does_not_begin_if_the_sweep_is_killed_before_it_is_watched(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between starting the one and the other, a sweep leaves nothing that works."""
    popen, began = subprocess.Popen, here / "began"

    def kill_instead(arguments: Any, **options: Any) -> Any:
        if evaluate._WATCH in arguments:
            os.kill(os.getpid(), signal.SIGKILL)
        process = popen(arguments, **options)
        (here / "child").write_text(str(process.pid))
        return process

    monkeypatch.setattr(subprocess, "Popen", kill_instead)
    config = sweep_yaml(evaluate=f"touch {began}; exec sleep 300 # {{checkpoint}}", controls=False)
    assert forked.run(forked.command("sweep", "--config", config, "-o", "best")).returncode == -signal.SIGKILL
    assert _ends(int((here / "child").read_text()))
    assert not began.exists()


def test_an_evaluation_that_nobody_watches_does_not_begin(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What watches was started, and ended before it could: so Ray does it, or a limit of processes."""
    popen, began = subprocess.Popen, here / "began"

    def ends_at_once(arguments: Any, **options: Any) -> Any:
        return popen(["/bin/sh", "-c", "exit"] if evaluate._WATCH in arguments else arguments, **options)

    monkeypatch.setattr(subprocess, "Popen", ends_at_once)
    found = evaluate.run_command(f"touch {began}", log=here / "log", timeout=60, environment={}, stop=lambda: False)
    assert found.error is not None
    assert "no process could be started that ends it with the sweep" in found.error
    assert not began.exists()


@pytest.mark.parametrize("name", ["told", "said"])
def test_an_evaluation_has_the_environment_of_the_sweep(here: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whatever its variables are called; an empty stdin; and no more open files than a shell has."""
    monkeypatch.setenv(name, "7")
    command = f'cat; for fd in 3 4 5 6 7 8 9; do (: >&$fd) 2>&- && echo $fd >&2; done; echo "{{\\"m\\": ${name}}}"'
    found = evaluate.run_command(command, log=here / "log", timeout=60, environment={}, stop=lambda: False)
    assert (found.metrics, found.error) == ({"m": 7.0}, None)
    assert (here / "log").read_text() == '{"m": 7}\n'


@pytest.mark.slow
def test_what_is_left_of_an_evaluation_ends_with_a_sweep_that_is_killed(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shell is ended first, and then the sweep, before it has ended what the shell started: so Ray does it."""
    monkeypatch.setattr(evaluate, "_end", lambda _: os.kill(os.getpid(), signal.SIGKILL))
    config = sweep_yaml(evaluate="sleep 300 & echo $! > child; kill -9 $$ # {checkpoint}", controls=False)
    assert forked.run(forked.command("sweep", "--config", config, "-o", "best")).returncode == -signal.SIGKILL
    assert _ends(int(Path("child").read_text()))


def _ends(pid: int) -> bool:
    until = time.monotonic() + 60  # of the 300 that it would take
    while time.monotonic() < until and _runs(pid):
        time.sleep(0.05)
    return not _runs(pid)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"objective": "tarrget"}, ["no metric is called tarrget; did you mean target", "what was evaluated is kept"]),
        ({"objective": "control"}, ["all 4 trials failed", "not one number"]),
    ],
)
def test_objectives_that_evaluations_do_not_answer(here: Path, said: dict[str, Any], words: list[str]) -> None:
    """Nothing is lost by it: the next objective finds the evaluations."""
    ran = run_lines("sweep", "--config", sweep_yaml(controls=False, **said), "-o", "best")
    assert ran.code in (2, 5)
    for word in words:
        assert word in ran.err
    before = len(Path("ran").read_text().splitlines())
    assert run_lines("sweep", "--config", sweep_yaml(controls=False, objective="target"), "-o", "best").code == 0
    assert len(Path("ran").read_text().splitlines()) == 4
    assert before <= 4


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"grid": {}}, ["grid: expected keys"]),
        ({"grid": {"lines.alpha": []}}, ["grid.lines.alpha: an empty list"]),
        ({"grid": {"lines.alpha": "1 - beta"}}, ["nothing varies"]),
        (
            {"grid": {"lines.alpha": [0.1], "lines.beta": "1 - gama"}},
            ["no number of the grid is called gama (there is alpha, lines.alpha)"],
        ),
        ({"grid": {"lines.alpha": [10**400]}}, ["grid.lines.alpha: a whole number larger than any float"]),
        ({"grid": {"lines.schedule": [[0, -(10**400)]]}}, ["grid.lines.schedule: a whole number larger"]),
        ({"grid": {"lines.schedule": [["much", 1]]}}, ["schedule=[much,1]", "lines.schedule"]),
        ({"grid": {"lines.schedule": [[None, 1]]}}, ["lines.schedule"]),
        ({"grid": {"lines.alpha": [0.5], "lines": [{"alpha": 0.3}]}}, ["grid.lines: holds lines.alpha"]),
        ({"grid": {"lines.alhpa": [1]}}, ["lines.alhpa is not a key of a recipe"]),
        ({"grid": {"lines.alpha": ["much"]}}, ["lines.alpha"]),
        ({"grid": {"lines.alpha": {"low": 0, "high": 1}}}, ["there is no search"]),
        ({"evaluate": "python evaluate.py"}, ["evaluate has no {checkpoint}"]),
        ({"evaluate": None}, ["evaluate is missing"]),
        ({"objective": None}, ["objective is missing"]),
        ({"objective": "target +"}, ["does not parse"]),
        ({"objective": ["target", "control"]}, ["2 objectives, and one can win"]),
        ({"controls": ["konstant"]}, ["controls: expected constant and reversed"]),
        ({"repeats": 0}, ["repeats: expected a whole number"]),
        ({"timeout": "soon"}, ["timeout: expected seconds"]),
        ({"objektive": "target"}, ["objektive is not a key of a sweep; did you mean objective?"]),
        ({"recipe": {"base": "base"}}, ["recipe"]),
        ({"recipe": "none.yaml"}, ["none.yaml"]),
        ({"evaluate": "nowhere_at_all:judge"}, ["nowhere_at_all cannot be imported"]),
        ({"search": {"sampler": "tpe"}}, ["search.trials"]),
    ],
)
def test_bad_sweeps(here: Path, said: dict[str, Any], words: list[str]) -> None:
    """Each is refused before anything runs, by its key; nothing is written."""
    config = sweep_yaml(**said)
    before = snapshot(here)
    ran = run_lines("sweep", "--config", config, "-o", "best")
    assert (ran.code, ran.trace) == (2, ""), ran.err
    for word in words:
        assert word in ran.err
    left = {name for name in snapshot(here) if name not in before}
    assert not {name for name in left if not str(name).startswith("best.sweep")}


@pytest.mark.slow
def test_a_dry_run_says_what_it_will_take(here: Path) -> None:
    """Numbers of trials and evaluations, and bytes; a large grid is said to be one."""
    grid = {"lines.alpha": [n / 100 for n in range(40)], "lines.gamma": [1 + n / 100 for n in range(30)]}
    config = sweep_yaml(grid=grid, repeats=2)
    before = snapshot(here)
    told = run_lines("sweep", "--config", config, "--dry-run", "--json").json
    assert told["trials"] == {"lines": 1200, "constant": 1200, "reversed": 1200}
    assert told["evaluations"] == (3 * 1200 + 2) * 2
    assert any("7,204 evaluations" in note for note in told["notes"])
    assert snapshot(here) == before


@pytest.mark.slow
def test_candidates_of_a_merge_are_its_outputs(here: Path) -> None:
    """What an evaluation sees is what `lines merge` writes at the same values, byte for byte."""
    torch.manual_seed(2)
    base = load_file("base/model.safetensors")
    write_checkpoint(
        here / "ft2", {n: t + 0.1 * torch.randn(6, 5) for n, t in base.items()}, config={"num_hidden_layers": LAYERS}
    )
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "ft"}, {"model": "ft2"}],
        "parameters": {"density": 0.4},
        "lines": {"alpha": "auto", "beta": 0.5},
    }
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    Path("keep.py").write_text(
        "import hashlib, json, sys\n"
        "digest = hashlib.sha256(open(sys.argv[1] + '/model.safetensors', 'rb').read()).hexdigest()\n"
        "print(json.dumps({'target': int(digest[:12], 16)}))\n"
    )
    config = sweep_yaml(
        recipe="merge.yaml",
        grid={"lines.beta": [0.2, 0.6], "parameters.density": [0.3, 1.0]},
        evaluate=f"{shlex.quote(sys.executable)} -S keep.py {{checkpoint}}",
        objective="target",
        controls=["constant"],
    )
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json")
    assert ran.code == 0, ran.err
    assert len(ran.json["trials"]) == 8
    import hashlib

    for trial in ran.json["trials"]:
        lines.merge("merge.yaml", "reference", sets=trial["settings"], force=True)
        digest = hashlib.sha256(Path("reference/model.safetensors").read_bytes()).hexdigest()
        assert trial["metrics"]["target"] == int(digest[:12], 16), trial["settings"]


@pytest.mark.slow
def test_by_task(here: Path) -> None:
    """`{task}`: each model's own evaluation; X_ft is each task on its own model."""
    torch.manual_seed(3)
    base = load_file("base/model.safetensors")
    write_checkpoint(
        here / "ft2", {n: t + 0.1 * torch.randn(6, 5) for n, t in base.items()}, config={"num_hidden_layers": LAYERS}
    )
    recipe = {"base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}], "lines": {"alpha": 0.5, "beta": 0.5}}
    Path("evaluate.py").write_text(EVALUATION.replace('read("ft")', "read(sys.argv[2])"))
    config = sweep_yaml(
        recipe=recipe,
        grid={"lines.beta": [0.0, 0.5]},
        evaluate=f"{shlex.quote(sys.executable)} -S evaluate.py {{checkpoint}} {{task}}",
        objective="mean(target - target_ft)",
        controls=False,
    )
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json")
    assert ran.code == 0, ran.err
    of_ft = next(trial for trial in ran.json["trials"] if trial["family"] == "ft")
    assert of_ft["metrics"]["target"] == {"ft": 0.0, "ft2": 0.0}
    assert set(ran.json["trials"][-1]["metrics"]["target"]) == {"ft", "ft2"}


JUDGE = """
import torch

def model():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Linear(5, 6, bias=False)
    class Body(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([Layer() for _ in range(4)])
    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Body()
    return Whole()

def judge(model, trial):
    return {"sum": float(sum(p.double().sum() for p in model.parameters())), "seed": trial["seed"]}
"""


def test_a_python_function_gets_a_live_module(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called with the module that holds the candidate, and no candidate is written."""
    (here / "judging.py").write_text(JUDGE)
    monkeypatch.syspath_prepend(str(here))
    monkeypatch.delitem(sys.modules, "judging", raising=False)
    config = sweep_yaml(
        evaluate="judging:judge", model="judging:model", objective="sum - sum_pre", controls=False, repeats=2
    )
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json")
    assert ran.code == 0, ran.err
    for trial in ran.json["trials"]:
        if trial["family"] == "lines":
            made = lines.edit_state_dict(
                load_file("base/model.safetensors"),
                load_file("ft/model.safetensors"),
                alpha=trial["settings"]["lines.alpha"],
            )
            assert trial["metrics"]["sum"] == float(sum(tensor.double().sum() for tensor in made.values()))


FUNCTIONS = """
import numpy, sys, torch
from judging import model

def arrays(model, trial):
    print("a word on the way")
    weights = next(model.parameters()).detach()
    return {"list": numpy.array([1.0, 2.0]), "one": weights.sum(), "tensor": weights[0], "float": numpy.float32(3)}

def leaves(model, trial):
    sys.exit("no use")

def harms(model, trial):
    found = {"sum": float(sum(p.double().sum() for p in model.parameters()))}
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    return found
"""


@pytest.mark.slow
def test_python_functions_that_are_not_polite(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Arrays and tensors are numbers; what is printed is not in the JSON; SystemExit is a failed trial; weights that a
    function changed are put back for the next repeat, and the module is whole for the next trial.
    """
    (here / "judging.py").write_text(JUDGE)
    (here / "functions.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(str(here))
    for name in ("judging", "functions"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    said: dict[str, Any] = {"model": "functions:model", "controls": False}
    config = sweep_yaml(evaluate="functions:arrays", objective="mean(list) + one + max(tensor) + float", **said)
    ran = run_lines("sweep", "--config", config, "-o", "arrays", "--json")
    assert ran.code == 0, ran.err
    assert "a word on the way" in ran.err
    assert [trial["metrics"]["list"] for trial in ran.json["trials"]] == [[1.0, 2.0]] * 4
    config = sweep_yaml(evaluate="functions:leaves", objective="m", **said)
    ran = run_lines("sweep", "--config", config, "-o", "leaves")
    assert (ran.code, ran.trace) == (5, "")
    assert "raised SystemExit: no use" in ran.err
    config = sweep_yaml(evaluate="functions:harms", objective="sum", repeats=3, **said)
    ran = run_lines("sweep", "--config", config, "-o", "harms", "--json")
    assert ran.code == 0, ran.err
    assert [trial["standard_error"] for trial in ran.json["trials"]] == [0.0] * 4


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"evaluate": "yes | head -c 30000000; echo; echo '{\"m\": 1}' # {checkpoint}"}, None),
        pytest.param(
            {"evaluate": "yes x | head -c 30000000 >&2; echo '{\"m\": 1}' # {checkpoint}"},
            None,
            marks=pytest.mark.slow,
        ),
        (
            {
                "evaluate": "echo '{\"gr\u00f6\u00dfe \u4ee4\": 1}' # {checkpoint}",
                "objective": '"gr\u00f6\u00dfe \u4ee4"',
            },
            None,
        ),
        ({"evaluate": "echo '{\"m\": [1, 2]}' # {checkpoint}", "objective": "m"}, "a list of 2, not one number"),
        (
            {
                "evaluate": 'echo {seed} {checkpoint} | cut -c1 | sed \'s/^0$/{"m":[1]}/; s/^1$/{"m":[1,2]}/\'',
                "repeats": 2,
            },
            "its repeats do not have the same metrics",
        ),
        ({"evaluate": "printf '{\"m\": 1e999}' # {checkpoint}"}, "metric m is inf"),
        ({"evaluate": 'printf \'{"m": 1, "m": 2}\' # {checkpoint}'}, None),
        ({"evaluate": "printf '\\377\\376{\"m\": 1}' # {checkpoint}"}, "not JSON"),
        ({"evaluate": "rm -rf {checkpoint}/..; echo '{\"m\": 1}'"}, None),
        ({"evaluate": "rm -rf {checkpoint}/../..; mkdir -p best.sweep; echo '{\"m\": 1}'"}, None),
        ({"evaluate": "rm -rf {checkpoint}/../..; echo '{\"m\": 1}'"}, None),
    ],
)
@pytest.mark.slow
def test_what_evaluations_print(here: Path, said: dict[str, Any], words: str | None) -> None:
    """Much, other alphabets, lists of changing length, numbers that are none; logs stay small."""
    grid = {"lines.alpha": [1.0, 0.2]}
    config = sweep_yaml(**{"objective": "mean(m)", "controls": False, "grid": grid, **said})
    ran = run_lines("sweep", "--config", config, "-o", "best")
    assert (ran.code, ran.trace) == ((0, "") if words is None else (5, "")), ran.err
    assert words is None or words in ran.err
    assert sum(path.stat().st_size for path in Path("best.sweep/logs").iterdir()) < 2 * 10 * 2**20


@pytest.mark.parametrize(
    "harm", ["rm -rf ft", "printf x >> ft/model.safetensors", "rm -rf best.sweep; touch best.sweep"]
)
def test_evaluations_that_take_the_ground_away(here: Path, harm: str) -> None:
    """An input that is gone or changed, a folder that is none: an error in words, and nothing is written."""
    config = sweep_yaml(evaluate=f"{harm}; echo '{{\"m\": 1}}' # {{checkpoint}}", objective="m", controls=False)
    ran = run_lines("sweep", "--config", config, "-o", "best")
    assert ran.code in (3, 6), ran.err
    assert ran.trace == ""
    assert "best" in ran.err or "ft" in ran.err
    assert not Path("best").exists()


@pytest.mark.slow
def test_a_coefficient_that_no_number_holds_is_a_failed_trial(here: Path) -> None:
    """The others go on; a value that is none is refused before, by its key and on one line."""
    grid = {"lines.alpha": [0.5, 1e300, 0.2]}
    ran = run_lines("sweep", "--config", sweep_yaml(grid=grid, controls=False), "-o", "best", "--json")
    assert ran.code == 0, ran.err
    assert [trial["error"] is None for trial in ran.json["trials"][2:]] == [True, False, True]
    grid = {"lines.alpha": [0.5, float("nan")]}
    ran = run_lines("sweep", "--config", sweep_yaml(grid=grid, controls=False), "-o", "other")
    assert ran.code == 2
    assert "lines.alpha: expected a finite number, or auto (got nan)" in ran.err
    assert "..." not in ran.err


def test_points_that_a_grid_has_twice(here: Path) -> None:
    """Are tried once, and the controls get as many as LiNeS then."""
    grid = {"lines.alpha": [0.5, 0.5, 0.2, 0.5]}
    found = run_lines("sweep", "--config", sweep_yaml(grid=grid), "--dry-run", "--json").json
    assert found["trials"] == {"lines": 2, "constant": 2, "reversed": 2}


@pytest.mark.slow
def test_two_sweeps_at_once(here: Path) -> None:
    """Into the same output: the second is refused, and the first is not disturbed."""
    waits = "touch begun; until test -e go; do sleep 0.05; done"
    config = sweep_yaml(evaluate=f"{waits}; {sys.executable} -S evaluate.py {{checkpoint}}", controls=False)
    with forked.Forked(forked.command("sweep", "--config", config, "-o", "best")) as first:
        while first.poll() is None and not Path("begun").exists():
            time.sleep(0.01)
        second = run_lines("sweep", "--config", config, "-o", "best")
        assert (second.code, second.trace) == (6, "")
        assert "another run is writing it" in second.err
        Path("go").touch()
        _, said = first.communicate()
    assert first.returncode == 0, said


@pytest.mark.slow
def test_candidates_in_a_live_module(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is what a file would hold, and at the end, also in the middle, the module holds what it held before."""
    namespace: dict[str, Any] = {}
    exec(JUDGE, namespace)
    module = namespace["model"]()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seen = []
    for candidate in lines.candidates({"base": "base", "ft": "ft"}, {"lines.alpha": [0.3, 0.0, 1.0]}, module):
        lines.edit("base", "ft", "reference", alpha=candidate.settings["lines.alpha"], force=True)
        expected = load_file("reference/model.safetensors")
        assert all(torch.equal(tensor, expected[name]) for name, tensor in module.state_dict().items())
        seen.append(candidate.settings["lines.alpha"])
    assert seen == [0.3, 0.0, 1.0]
    left = lines.candidates({"base": "base", "ft": "ft"}, {"lines.alpha": [0.3, 0.5]}, module)
    next(left)
    left.close()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    other = lines.candidates({"base": "base", "ft": "ft"}, {"lines.alpha": [0.3]}, module.half())
    with pytest.raises(lines.LinesError, match=r"the model's model\.layers\.0\.w\.weight is torch\.float16"):
        next(other)


@pytest.mark.slow
def test_a_search_draws_and_goes_on(here: Path) -> None:
    """Optuna's draws are judged like a grid's, with as many for the controls; the same command draws no more."""
    pytest.importorskip("optuna")
    said = {"grid": {"lines.alpha": {"low": 0, "high": 1}}, "search": {"sampler": "tpe", "trials": 5, "seed": 1}}
    config = sweep_yaml(controls=["constant"], **said)
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json")
    assert ran.code == 0, ran.err
    families = [trial["family"] for trial in ran.json["trials"]]
    assert families == ["pre", "ft", *["lines"] * 5, *["constant"] * 5]
    assert ran.json["objective"] == max(t["objective"] for t in ran.json["trials"] if t["family"] == "lines")
    number = len(Path("ran").read_text().splitlines())
    again = run_lines("sweep", "--config", config, "-o", "best", "--json").json
    assert (again["winner"], len(Path("ran").read_text().splitlines())) == (ran.json["winner"], number)


@pytest.mark.slow
def test_equal_numbers_are_one_trial(here: Path) -> None:
    """1 is 1.0, in a list and after an edit of it; so the controls have each alpha of the grid."""
    config = sweep_yaml(grid={"lines.alpha": [1, 1.0, 0.5]}, objective="target")
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json")
    alphas = [
        [t["settings"]["lines.alpha"] for t in ran.json["trials"] if t["family"] == f] for f in ("lines", "constant")
    ]
    assert [sorted(one) for one in alphas] == [[0.5, 1], [0.5, 1]]
    number = len(Path("ran").read_text().splitlines())
    config = sweep_yaml(grid={"lines.alpha": [1.0, 0.5]}, objective="target")
    assert run_lines("sweep", "--config", config, "-o", "best").code == 0
    assert len(Path("ran").read_text().splitlines()) == number == 6


@pytest.mark.parametrize("dtypes", [["float16", "float32"], ["float32", "float16"]])
def test_scratch_is_that_of_the_largest_candidate(here: Path, dtypes: list[str]) -> None:
    """Whichever dtype of the grid comes first."""
    config = sweep_yaml(grid={"dtype": dtypes, "lines.alpha": [0.5]}, objective="target")
    told = run_lines("sweep", "--config", config, "--dry-run", "--json").json
    lines.edit("base", "ft", "reference")
    size = Path("reference/model.safetensors").stat().st_size
    assert told["candidate_bytes"] >= size
    assert told["scratch_bytes"] >= size


@pytest.mark.slow
def test_an_objective_at_fault_is_called_so(here: Path) -> None:
    """Where every evaluation gave metrics, none is to be mended: no --retry, no logs."""
    ran = run_lines("sweep", "--config", sweep_yaml(objective="control"), "-o", "best")
    assert ran.code == 5
    assert "the first by its objective: control: numbers by name (a, b), not one number" in ran.err
    assert "Correct the objective" in ran.err
    assert "--retry" not in ran.err


@pytest.mark.slow
def test_the_table_is_whole_in_80_columns(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Families and settings stand there in full, and the winner first among equals."""
    monkeypatch.setenv("COLUMNS", "80")
    ran = run_lines("sweep", "--config", sweep_yaml(objective="target * 0"), "-o", "best")
    rows = ran.out.splitlines()
    assert rows[1].split()[:3] == ["LiNeS", "alpha=1", "beta=0"]
    assert rows[1].endswith("winner")
    assert "constant scaling" in ran.out
    assert "reversed depth" in ran.out
    assert "schedule=constant alpha=0.2 beta=0" in ran.out
    assert "…" not in ran.out
    assert max(map(len, rows[: rows.index(next(row for row in rows if row.startswith("LiNeS and")))])) <= 80


def test_a_module_out_of_order_is_told_why(here: Path) -> None:
    """A tensor of the right shape and dtype whose bytes are not in order."""
    config = {"base": "base", "ft": "ft"}
    module = torch.nn.Module()
    for name in NAMES:
        at = module
        *path, last = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, torch.nn.Module())
            at = at.get_submodule(part)
        at.register_parameter(last, torch.nn.Parameter(torch.zeros(5, 6).t()))
    with pytest.raises(MismatchError, match=r"is not contiguous: \[6, 5\] with strides \[1, 6\]"):
        next(iter(lines.candidates(config, {"lines.alpha": [0.5]}, module)))
