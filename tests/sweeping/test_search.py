"""A search with Optuna: what it draws from, what it goes on with, and fronts of several objectives."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from support.files import write_checkpoint
from support.run import run_lines
from support.sweeps import inputs_in, python, sweep_yaml

pytest.importorskip("optuna")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, a fine-tune and an evaluation, in which the process works."""
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path)
    return tmp_path


ONE = {"lines.alpha": {"low": 0, "high": 1}}
TWO = {**ONE, "lines.beta": {"low": 0, "high": 0.5}}
PAIR = ["target - target_ft", "mean(control - control_pre)"]


def sweep(said: dict[str, Any], *more: object, out: str = "best") -> Any:
    config = sweep_yaml(**said)
    ran = run_lines("sweep", "--config", config, "-o", out, "--json", *more)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return ran.json


def ran() -> int:
    """How many evaluations there were."""
    return len(Path("ran").read_text().splitlines())


def key_facts(found: Any) -> Any:
    return found["winner"], found["front"], [[t[key] for key in ("id", "objective")] for t in found["trials"]]


SAMPLERS: list[dict[str, Any]] = [
    {"grid": ONE, "search": {"sampler": "tpe", "trials": 12, "seed": 3}, "controls": False},
    {"grid": TWO, "search": {"sampler": "cmaes", "trials": 12, "seed": 1}, "controls": ["constant"]},
    {"grid": TWO, "search": {"sampler": "nsga2", "trials": 12}, "objective": PAIR, "controls": ["reversed"]},
]


@pytest.mark.parametrize(
    "said",
    [SAMPLERS[0], *(pytest.param(said, marks=pytest.mark.slow) for said in SAMPLERS[1:])],
    ids=["tpe", "cmaes", "nsga2"],
)
@pytest.mark.slow
def test_a_search_goes_on_with_what_it_would_have_drawn(here: Path, said: dict[str, Any]) -> None:
    """In steps, with torn lines in both of its files, it draws the same as in one go; and evaluates nothing twice."""
    if said["search"]["sampler"] == "cmaes":
        pytest.importorskip("cmaes")
    whole = sweep(said, out="whole")
    assert len({trial["id"] for trial in whole["trials"]}) == len(whole["trials"])
    number = ran()
    Path("ran").unlink()
    for trials in (1, 2, 7):
        sweep({**said, "search": {**said["search"], "trials": trials}} if trials < 7 else said)
        if said["search"]["sampler"] == "nsga2" and trials < 7:  # the size of a generation goes by the number of trials
            Path("best.sweep/optuna.log").unlink()
        with open("best.sweep/optuna.log", "a") as journal, open("best.sweep/trials.jsonl", "a") as lines_of_json:
            journal.write('{"op_code": 5, "worker')
            lines_of_json.write('{"trial": "li')
    found = sweep(said)
    assert key_facts(found) == key_facts(whole)
    if said["search"]["sampler"] != "nsga2":
        assert ran() == number


def test_several_at_a_time(here: Path) -> None:
    """Rounds of as many as run at a time; killed or not, the same."""
    said = {"grid": TWO, "search": {"sampler": "tpe", "trials": 13}, "controls": False}
    found = sweep(said, "--parallel", 3)
    assert len({trial["id"] for trial in found["trials"]}) == 2 + 13
    number = ran()
    assert key_facts(sweep(said, "--parallel", 3)) == key_facts(found)
    assert ran() == number


@pytest.mark.slow
def test_another_search_into_the_same_output(here: Path) -> None:
    """Draws of another grid, sampler or objective are not taken for this one's; evaluations that fit are."""
    said: dict[str, Any] = {"grid": ONE, "search": {"sampler": "tpe", "trials": 3}, "controls": False}
    sweep(said)
    number = ran()
    sweep({**said, "objective": "-target"})
    assert ran() == number  # the first draws are chance, and the same
    found = sweep({**said, "grid": {"lines.alpha": {"low": 0, "high": 0.1}}})
    assert max(t["settings"].get("lines.alpha", 0) for t in found["trials"]) <= 0.1
    found = sweep({**said, "grid": {**ONE, "lines.gamma": [1.0, 0.5]}})
    assert all("lines.gamma" in t["settings"] for t in found["trials"] if t["family"] == "lines")


@pytest.mark.slow
def test_a_front_of_several_objectives(here: Path) -> None:
    """In JSON, table and page it is what a loop over all pairs finds, each objective in its own direction."""
    said: dict[str, Any] = {
        "grid": TWO, "search": {"sampler": "nsga2", "trials": 8}, "controls": ["constant"],
        "objective": "target", "minimize": "-mean(control)",
    }  # fmt: skip
    found = sweep(said)
    own = [trial for trial in found["trials"] if trial["family"] in ("lines", "constant")]
    assert 12 < len(own) <= 16  # a generation may draw a parent once more

    def beats(one: Any, other: Any) -> bool:
        (a, b), (c, d) = one["objective"], other["objective"]
        return (a, b) != (c, d) and a >= c and b <= d

    expected = [one["id"] for one in own if not any(beats(other, one) for other in own)]
    assert found["front"] == expected
    assert 1 < len(expected) < len(own)
    assert (found["winner"], found["output"]) == (None, None)
    assert not Path("best").exists()
    shares = [sum(name.startswith(family) for name in expected) for family in ("lines", "constant")]
    assert f"{shares[0] or 'none'} by LiNeS, {shares[1] or 'none'} by constant scaling" in found["said"]
    page = Path("best.sweep/report.html").read_text()
    assert page.count("<tr class=w>") == len(expected)
    figure = page[page.index("<svg") : page.index("</svg>")]
    assert figure.count('r="8"') == len(expected)
    shown = run_lines("sweep", "--config", sweep_yaml(**said), "-o", "best")
    assert len(re.findall(r"front$", shown.out, re.MULTILINE)) == min(len(expected), 40)
    assert "target, -mean(control)" in shown.out


def a_merge(here: Path) -> dict[str, Any]:
    """A recipe of two fine-tunes of an encoder and a decoder."""
    torch.manual_seed(5)
    names = [f"{side}.layers.{n}.w.weight" for side in ("encoder", "decoder") for n in range(3)]
    base = {name: torch.randn(4, 4) for name in names}
    for folder in ("base", "ft", "ft2"):
        tensors = {n: t + (0.1 * torch.randn(4, 4) if folder != "base" else 0) for n, t in base.items()}
        write_checkpoint(here / "seq" / folder, tensors, config={"num_hidden_layers": 3})
    return {
        "merge_method": "ties",
        "base_model": "seq/base",
        "models": [{"model": "seq/ft"}, {"model": "seq/ft2"}],
        "parameters": {"density": 0.5},
        "lines": {"alpha": 0.3, "beta": 0.5},
    }


SPACES: dict[str, dict[str, Any]] = {
    "alpha, beta and gamma": {
        "lines.alpha": {"low": 0.1, "high": 1, "log": True},
        "lines.beta": "1 - alpha",
        "lines.gamma": {"low": 0.5, "high": 1.5, "step": 0.25},
    },
    "density": {"parameters.density": {"low": 0.1, "high": 1.0}, "lines.alpha": [0.2, "auto"]},
    "weights": {
        "models.0.parameters.weight": {"low": 0, "high": 1},
        "models.1.parameters.weight": '1 - "models.0.parameters.weight"',
    },
    "a list of points": {"lines.schedule": {"low": 0, "high": 1, "points": 4}},
    "stacks": {
        "lines.stacks.encoder.alpha": {"low": 0, "high": 1},
        "lines.stacks.decoder.alpha": {"low": 0, "high": 1},
        "lines.stacks.decoder.beta": {"low": 0, "high": 0.5},
    },
    "a method": {"merge_method": ["ties", "task_arithmetic"], "lines.alpha": {"low": 0, "high": 1}},
}


QUICK = ("alpha, beta and gamma", "stacks")


@pytest.mark.parametrize(
    "grid",
    [pytest.param(grid, marks=() if name in QUICK else pytest.mark.slow, id=name) for name, grid in SPACES.items()],
)
@pytest.mark.slow
def test_what_can_be_searched(here: Path, grid: dict[str, Any]) -> None:
    """Each trial's settings are those of a merge, in all families; the winner's output is that merge."""
    recipe = a_merge(here)
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    Path("count.py").write_text(
        "import json, os, sys\n"
        "raw = open(os.path.join(sys.argv[1], 'model.safetensors'), 'rb').read()\n"
        "print(json.dumps({'said': sum(raw) % 997}))\n"
    )
    found = sweep(
        {
            "recipe": "merge.yaml", "grid": grid, "search": {"sampler": "tpe", "trials": 3},
            "evaluate": python("count.py {checkpoint}"), "objective": "said",
        }
    )  # fmt: skip
    families = [trial["family"] for trial in found["trials"]]
    assert set(families) >= {"lines", "constant"}
    assert families.count("constant") == families.count("lines")
    for trial in found["trials"]:
        values = json.loads(json.dumps(recipe))
        sets = [f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in trial["settings"].items()]
        if isinstance(trial["settings"].get("lines.schedule"), list):
            values["lines"] = {}
        if trial["family"] == "constant":
            assert trial["settings"]["lines.schedule"] == "constant"
            assert not any("stacks" in key for key in trial["settings"])
        Path("one.yaml").write_text(yaml.safe_dump(values))
        merged = run_lines(
            "merge", "--config", "one.yaml", "-o", "one", "--force", *[x for s in sets for x in ("--set", s)]
        )
        assert merged.code == 0, merged.err
        raw = Path("one/model.safetensors").read_bytes()
        assert trial["metrics"]["said"] == sum(raw) % 997, trial["settings"]
        if trial["settings"] == found["winner"] and trial["family"] == "lines":
            assert raw == Path("best/model.safetensors").read_bytes()
    assert lines.inspect("best") is not None


@pytest.mark.slow
def test_a_journal_that_is_none(here: Path) -> None:
    """Is said to be one; without it the same is drawn, and nothing is evaluated again."""
    said = {"grid": ONE, "search": {"sampler": "tpe", "trials": 3}, "controls": False}
    found = sweep(said)
    number = ran()
    journal = Path("best.sweep/optuna.log")
    for text in ("nonsense\nmore\n", '{"op_code": 99}\n' * 2, "[]\n[]\n"):
        journal.write_text(text)
        refused = run_lines("sweep", "--config", sweep_yaml(**said), "-o", "best")
        assert (refused.code, refused.trace) == (6, ""), text
        assert "cannot be read as Optuna's journal" in refused.err
    journal.unlink()
    assert key_facts(sweep(said)) == key_facts(found)
    assert ran() == number


@pytest.mark.slow
def test_failed_trials_are_drawn_on_from_and_can_be_retried(here: Path) -> None:
    """`--retry` evaluates them once more, though the study knows them as failed."""
    Path("evaluate.py").write_text(
        Path("evaluate.py").read_text().replace('print("so', "if not os.path.exists('mended'): sys.exit(3)\nprint(\"so")
    )
    said = {"grid": ONE, "search": {"sampler": "tpe", "trials": 3}, "controls": False, "objective": "target"}
    failed = run_lines("sweep", "--config", sweep_yaml(**said), "-o", "best")
    assert (failed.code, failed.trace) == (5, "")
    Path("mended").touch()
    found = sweep(said, "--retry")
    assert [trial["error"] for trial in found["trials"]] == [None] * 3
