"""Sweeps that are killed at random moments, again and again."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lines_cli.sweeping import search
from support import forked
from support.run import run_lines
from support.sweeps import EVALUATION, inputs_in, sweep_yaml

KILLS = 10
SWEEPS: dict[str, dict[str, Any]] = {
    "a grid": {"grid": {"lines.alpha": [n / 10 for n in range(11)]}, "repeats": 2},
    "a search": {"grid": {"lines.alpha": {"low": 0, "high": 1}}, "search": {"sampler": "tpe", "trials": 15}},
    "a front": {
        "grid": {"lines.alpha": {"low": 0, "high": 1}, "lines.beta": {"low": 0, "high": 1}},
        "search": {"sampler": "nsga2", "trials": 15},
        "objective": ["target", "mean(control)"],
    },
}


def changed() -> int | None:
    """When something was last made or removed among the candidates."""
    try:
        return os.stat("best.sweep/candidates").st_ctime_ns
    except OSError:
        return None


@pytest.mark.slow
@pytest.mark.parametrize("said", SWEEPS.values(), ids=SWEEPS)
@pytest.mark.parametrize("parallel", [1, 3])
def test_a_killed_sweep_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: dict[str, Any], parallel: int
) -> None:
    """It ends with the same trials and winner, none of them recorded twice, and leaves no scratch."""
    if "search" in said:
        pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path)
    Path("evaluate.py").write_text("import time\ntime.sleep(0.1)\n" + Path("evaluate.py").read_text())
    config = sweep_yaml(controls=["constant"], **said)
    options = ["--config", str(config), "--json", "--parallel", str(parallel)]
    whole = run_lines("sweep", *options, "-o", "whole").json
    chance = np.random.default_rng(7)
    killed = 0
    while killed < KILLS:
        before = changed()
        process = subprocess.Popen(
            [sys.executable, "-m", "lines_cli", "sweep", *options, "-o", "best"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and changed() == before:
            time.sleep(0.005)  # imports are no moment worth a kill
        try:
            process.wait(0.6 * float(chance.random()))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            if killed > KILLS // 2:
                break
            for made in Path().glob("best*"):  # it was too quick, and begins anew
                shutil.rmtree(made)
    ended = run_lines("sweep", *options, "-o", "best")
    assert ended.code == 0, ended.err
    found = ended.json
    for key in ("winner", "front", "won", "said"):
        assert found[key] == whole[key], key
    keys = ("id", "objective", "metrics", "settings")
    assert [[t[k] for k in keys] for t in found["trials"]] == [[t[k] for k in keys] for t in whole["trials"]]
    recorded = [json.loads(line) for line in Path("best.sweep/trials.jsonl").read_text().splitlines()[1:]]
    every = [(line["trial"], line["seed"]) for line in recorded]
    assert len(every) == len(set(every)) == len(whole["trials"]) * said.get("repeats", 1)
    assert not Path("best.sweep/candidates").exists()
    if found["output"] is not None:
        assert Path("best/model.safetensors").read_bytes() == Path("whole/model.safetensors").read_bytes()
    assert not list(Path().glob(".best*"))


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "nsga2", "cmaes"])
@pytest.mark.parametrize("at", [0, 2, 11, 13], ids=lambda at: f"trial {at}")
def test_killed_while_values_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str, at: int) -> None:
    """Between the first value of a trial and the second: both are drawn again, and are those of a whole search."""
    pytest.importorskip("optuna")
    pytest.importorskip("cmaes")
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path)
    Path("evaluate.py").write_text(EVALUATION)
    grid = {"lines.alpha": {"low": 0, "high": 1}, "lines.beta": {"low": 0, "high": 1}}
    config = sweep_yaml(grid=grid, search={"sampler": sampler, "trials": 14}, controls=False)
    command = ["sweep", "--config", str(config), "-o", "best"]
    whole = run_lines(*command[:-1], "whole", "--json").json

    def killed() -> None:
        suggest, drawn = Trial.suggest_float, itertools.count(1)

        def one_more(trial: Trial, *args: Any, **options: Any) -> float:
            value = suggest(trial, *args, **options)
            if next(drawn) == 2 * at + 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return value

        Trial.suggest_float = one_more  # type: ignore[method-assign]
        forked.command(*command)()

    from optuna.trial import Trial

    assert forked.run(killed).returncode == -signal.SIGKILL
    if at == 13:  # an older version left it, and another search was written down behind it
        sweep_yaml(grid=grid, search={"sampler": sampler, "trials": 2, "seed": 9}, controls=False)
        with monkeypatch.context() as older:
            older.setattr(search, "_without_half_drawn", lambda _: None)
            assert run_lines(*command).code == 0
        sweep_yaml(grid=grid, search={"sampler": sampler, "trials": 14}, controls=False)
        assert len(run_lines(*command, "--json").json["trials"]) >= 14  # base and fine-tune among them; draws may meet
        return
    found = run_lines(*command, "--json").json
    assert [trial["settings"] for trial in found["trials"]] == [trial["settings"] for trial in whole["trials"]]
    assert found["winner"] == whole["winner"]
