"""One run in parts: planned, done in any order, again, twice at once, killed; the same bytes as in one piece."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import shutil
import signal
import time
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from golden.recipes import CASES, DIGESTS, MERGES, write_inputs
from lines_cli.api.parts import open_parts, plan_parts, run_parts
from lines_cli.engine import threshold
from lines_cli.methods import METHODS
from lines_cli.plan import division
from lines_cli.plan.division import digest_of, in_runs
from lines_cli.storage import staging
from lines_cli.storage.files import NewFile
from lines_cli.storage.shared_staging import Shared
from support import forked
from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.run import Ran, run_lines

STAGING = ".out.lines"
QUICK = lines.Resources(workers=2, device="cpu", chunk=64 * 1024)
TIES = {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}}
RECIPES: dict[str, dict[str, Any]] = {
    "ties": TIES,
    "ties by tensor": {**TIES, "parameters": {"density": 0.3, "trim": "tensor"}},
    "dare": {"merge_method": "dare_ties", "parameters": {"density": 0.4, "rescale": "l1"}},
    "weights measured": {"merge_method": "task_arithmetic", "parameters": {"weight": "equal_norm", "density": 0.5}},
    "calibrated": {**TIES, "calibrate": "svc"},
    "layers measured": {"merge_method": "ties", "lines": {"schedule": "esm", "alpha": 0.2, "beta": 0.5}},
    "sum": {"merge_method": "task_arithmetic", "lines": {"alpha": 0.2, "beta": 0.3}},
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of 24 MB each, in two shards: six blocks of 4 MiB."""
    folder = tmp_path_factory.mktemp("models")
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(1500, 1000, generator=chance) for i in range(4)}
        tensors["layers.3.steps"] = torch.tensor(0)
        write_checkpoint(folder / side, tensors, shards=2, config={"model_type": "tiny"})
    return folder


@pytest.fixture
def models(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same files, where we are."""
    for side in ("base", "ft", "ft2"):
        shutil.copytree(pair / side, tmp_path / side, copy_function=os.link)
    write_recipe(tmp_path, **TIES)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, **keys: Any) -> None:
    values = {"base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}], **keys}
    (folder / "merge.yaml").write_text(yaml.safe_dump(values))


def ran(*arguments: object) -> Ran:
    """A command that is to succeed."""
    done = run_lines(*arguments)
    assert not done.trace, done.trace
    assert done.code == 0, done.err
    return done


def planned(*flags: object, parts: int = 3) -> int:
    """Plan `merge.yaml`; how many parts there are."""
    ran("plan", "--config", "merge.yaml", "-o", "out", "--parts", parts, *flags)
    return len(json.loads(Path("plan.json").read_text())["parts"])


def refused(code: int, *arguments: object) -> Ran:
    """A command that is to be refused so."""
    done = run_lines(*arguments)
    assert not done.trace, done.trace
    assert done.code == code, done.err
    return done


def in_one_piece(folder: str = "out") -> dict[str, bytes]:
    """All files of an output that one command makes."""
    ran("merge", "--config", "merge.yaml", "-o", folder)
    files = contents(Path(folder))
    shutil.rmtree(folder)
    return files


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the same bytes ---


@by_turns(  # a small model is calibrated below
    recipe=[pytest.param(name, marks=pytest.mark.slow if name == "calibrated" else (), id=name) for name in RECIPES],
    order=["forward", "backward", "shuffled"],
)
@pytest.mark.some(2)
def test_parts_in_any_order(models: Path, recipe: str, order: str) -> None:
    """Every file of the output is the same to the byte, the recipe with its digests among them."""
    write_recipe(models, **RECIPES[recipe], max_shard_size="13MB")
    whole = in_one_piece()
    total = planned()
    numbers = list(range(1, total + 1))
    if order == "backward":
        numbers.reverse()
    elif order == "shuffled":
        random.Random(recipe).shuffle(numbers)
    for number in numbers:
        ran("run", "plan.json", "--part", f"{number}/{total}", "--workers", 1 + number % 2)
    ran("finish", "plan.json")
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


RECORDED = json.loads(DIGESTS.read_text(encoding="utf-8"))["outputs"]
BY_DEFAULT = {
    "edit-shards", "average-wide", "sum-trimmed-by-tensor", "ties-wide", "ties-float64", "consensus-on-ties",
    "dare-wide",
}  # fmt: skip


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("golden")
    write_inputs(made)
    return made


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in BY_DEFAULT else pytest.mark.slow)
        for name, case in CASES.items()
        if not case.adapter  # an output that is an adapter is made in one part
    ],
)
@pytest.mark.slow
def test_parts_of_every_method(name: str, golden: Path, tmp_path: Path) -> None:
    """What every golden recipe makes, it makes in parts, the last part first."""
    case = CASES[name]
    plan = case.plan(golden, tmp_path)
    file = tmp_path / "plan.json"
    opened = plan_parts(plan.recipe, plan.output, file, shares=3)
    total = len(opened.division.parts)
    for number in (*range(total, 0, -2), *range(total - 1, 0, -2)):
        run_parts(open_parts(file), f"{number}/{total}", QUICK)
    ran("finish", file)
    made = [plan.output] if plan.output.is_file() else sorted(plan.output.iterdir())
    found = {
        f"{name}/{path.name}": sha256(path.read_bytes()).hexdigest()
        for path in made
        if path.name not in ("README.md", "lines_recipe.yaml")
    }
    assert found == {line: digest for line, digest in RECORDED.items() if line.startswith(f"{name}/")}


WITHOUT = sorted(METHODS.keys() - {str(case.recipe["merge_method"]) for case in MERGES.values()})
"""Methods without a golden recipe: their last places are the linear algebra's."""


CALIBRATED = {"merge_method": "ties", "calibrate": "svc", "lines": {"alpha": "auto", "beta": 0.3}}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [*({"merge_method": method} for method in WITHOUT), CALIBRATED], ids=str)
def test_parts_of_other_methods(recipe: Mapping[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that sees whole matrices makes in parts what it makes in one piece on the same machine."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(40, 30, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "tiny"})
    write_recipe(tmp_path, **recipe, max_shard_size="10KB")
    whole = in_one_piece()
    total = planned()
    for number in range(total, 0, -1):
        ran("run", "plan.json", "--part", f"{number}/{total}")
    ran("finish", "plan.json")
    assert contents(tmp_path / "out") == whole


@pytest.mark.slow
def test_a_sample_that_misleads(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that settles nothing is followed by others, each in shares; a share with a look left is not done."""
    whole = in_one_piece()
    total = planned()

    def nowhere(search: threshold.Search, *_: object) -> dict[threshold.Sought, threshold.Window]:
        return dict.fromkeys(search._wanted, threshold.Window(2**30, 2**30 + 1))

    monkeypatch.setattr(threshold.Search, "begin", nowhere)
    for round_of_all in range(2):
        for number in range(1, 4):
            ran("run", "plan.json", "--part", f"{number}/{total}")
            assert (models / STAGING / "parts" / (str(number) + ("-2" if round_of_all else ""))).exists()
    ran("run", "plan.json")
    ran("finish", "plan.json")
    assert contents(models / "out") == whole


@pytest.mark.slow
def test_one_file(models: Path) -> None:
    """An output that is one file is made in parts, too."""
    ran("merge", "--config", "merge.yaml", "-o", "one.safetensors")
    ran("plan", "--config", "merge.yaml", "-o", "many.safetensors", "--parts", 3)
    ran("run", "plan.json")
    ran("finish", "plan.json", "--verify")
    assert (models / "many.safetensors").read_bytes() == (models / "one.safetensors").read_bytes()


@pytest.mark.slow
def test_a_plan_moves_with_its_models(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in plan.json count from its folder: parts may run from any other."""
    whole = in_one_piece()
    total = planned()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    ran("run", "../plan.json", "--part", f"1-{total}/{total}")
    ran("run", models / "plan.json")
    ran("finish", "../plan.json")
    assert contents(models / "out") == whole


# --- what a plan says ---


def test_what_a_plan_says(models: Path) -> None:
    """Each part has what it does, its bytes and its memory; together they are the run's."""
    shown = ran("plan", "--config", "merge.yaml", "-o", "out", "--parts", 3, "--json").json
    assert shown == json.loads((models / "plan.json").read_text())
    assert shown["stages"] == ["thresholds", "signs and norms", "writing"]
    assert [part["part"] for part in shown["parts"]] == list(range(1, 10))
    foreseen = ran("merge", "--config", "merge.yaml", "--dry-run", "--json").json
    assert sum(part["writes"] for part in shown["parts"]) == foreseen["bytes"]["written"]
    by_stage = [sum(part["reads"] for part in shown["parts"][first : first + 3]) for first in (0, 3, 6)]
    assert by_stage[:2] == [each["bytes"] for each in foreseen["passes"]]
    assert by_stage[2] == pytest.approx(foreseen["bytes"]["read"], rel=1e-3)
    assert {part["memory"] for part in shown["parts"]} == {foreseen["peak_memory"]}


@pytest.mark.slow
def test_fewer_parts_than_asked(models: Path) -> None:
    """No part is empty: where there is less to cut, there are fewer."""
    write_recipe(models, merge_method="task_arithmetic")
    assert planned(parts=500) == 6  # blocks of 4 MiB
    assert planned(parts=1) == 1
    for wrong in (0, -3, 10_001):
        assert f"--parts {wrong}" in refused(2, "plan", "--config", "merge.yaml", "-o", "out", "--parts", wrong).err


@pytest.mark.parametrize(("numbers", "said"), [([3], "3"), ([1, 2, 3], "1-3"), ([1, 3, 4, 7], "1,3-4,7"), ([], "")])
def test_numbers_in_runs(numbers: list[int], said: str) -> None:
    assert in_runs(numbers) == said


@pytest.mark.parametrize("said", ["3", "0/9", "10/9", "1/8", "3-2/9", "a/9", "1/9/9", "", "1-/9", "-1/9", "²/9"])
def test_parts_that_there_are_not(models: Path, said: str) -> None:
    """A part is named as one of how many, so that an array of jobs of another plan does not do half of this one."""
    assert planned() == 9
    assert "--part" in refused(2, "run", "plan.json", f"--part={said}").err
    assert not list((models / STAGING / "parts").glob("[0-9]*"))


# --- what is missing, or stale ---


@pytest.mark.slow
def test_a_part_that_is_missing(models: Path) -> None:
    """It is named, with a command that makes it; nothing is changed by then."""
    whole = in_one_piece()
    total = planned()
    ran("run", "plan.json", "--part", f"7/{total}")
    before = snapshot(models)
    error = refused(6, "finish", "plan.json").err
    assert "8-9 are missing" in error
    assert snapshot(models) == before
    command = re.search(r"lines (run plan\.json --part \S+)", error)
    assert command is not None
    ran(*shlex.split(command[1]))
    ran("finish", "plan.json")
    assert contents(models / "out") == whole
    assert "is finished" in ran("finish", "plan.json").err, "once more does nothing"
    assert contents(models / "out") == whole
    assert "is finished, or was cleaned away" in refused(6, "run", "plan.json", "--part", f"1/{total}").err


@pytest.mark.slow
def test_a_damaged_record_counts_for_nothing(models: Path) -> None:
    """A record that was cut short, changed, or is another part's: the part is missing, and is made again."""
    whole = in_one_piece()
    total = planned()
    ran("run", "plan.json")
    for number, damage in enumerate(("cut", "changed", "swapped"), 7):
        record = models / STAGING / "parts" / str(number)
        content = record.read_bytes()
        if damage == "cut":
            record.write_bytes(content[:-3])
        elif damage == "changed":
            record.write_bytes(content.replace(b'"start"', b'"begin"'))
        else:
            shutil.copy(models / STAGING / "parts" / "7", record)
        assert f"{number} is missing" in refused(6, "finish", "plan.json").err
        ran("run", "plan.json", "--part", f"{number}/{total}")
    ran("finish", "plan.json")
    assert contents(models / "out") == whole


def changed_input(models: Path) -> None:
    path = models / "ft" / "model-00001-of-00002.safetensors"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("command", [["run", "plan.json"], ["finish", "plan.json"]])
def test_inputs_that_changed(models: Path, command: list[str]) -> None:
    """An input that is another file than it was planned with is refused by name, before anything is read of it."""
    planned()
    ran("run", "plan.json")
    changed_input(models)
    error = refused(3, *command).err
    assert "ft/model-00001-of-00002.safetensors" in error
    assert "ft2" not in error
    assert not (models / "out").exists()


@pytest.mark.parametrize(
    "edit",
    [
        {"force": True},
        {"shares": 2},
        {"output": "elsewhere"},
        {"run": "sha256:0"},
        {"parts": []},
        {"recipe": {"merge_method": "average"}},
        {"digest": "sha256:0"},
        {"more": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.some(6)
def test_a_plan_that_was_edited(models: Path, edit: dict[str, Any], *, signed: bool) -> None:
    """Whatever was changed in it, it is refused; also where the digest was put right."""
    planned()
    document = {**json.loads((models / "plan.json").read_text()), **edit}
    if signed:
        document["digest"] = digest_of(document)
    (models / "plan.json").write_text(json.dumps(document))
    if signed and "digest" in edit:
        return  # as it was
    done = run_lines("run", "plan.json")
    assert done.code in (2, 3, 4, 6), done.err
    assert not done.trace
    assert "plan.json" in done.err or "recipe" in done.err
    assert not (models / "out").exists()
    assert not list((models / STAGING / "parts").glob("[0-9]*"))


@pytest.mark.slow
def test_a_plan_that_was_only_laid_out_anew(models: Path) -> None:
    """White space is no change."""
    planned()
    (models / "plan.json").write_text(json.dumps(json.loads((models / "plan.json").read_text())))
    ran("run", "plan.json", "--part", "1/9")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"lines_plan": 1}', "\udcff", '{"lines_plan": 2}'], ids=repr)
def test_what_is_no_plan(models: Path, content: str) -> None:
    (models / "plan.json").write_bytes(content.encode(errors="surrogateescape"))
    assert "plan.json" in refused(2, "run", "plan.json").err
    assert "plan.json" in refused(2, "finish", "plan.json").err
    assert "no-plan.json" in refused(2, "run", "no-plan.json").err


def test_another_version_s_plan(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both versions are named."""
    planned()
    monkeypatch.setattr(division, "__version__", "99.1")
    error = refused(2, "run", "plan.json").err
    assert "99.1" in error
    assert lines.__version__ in error


@pytest.mark.slow
def test_parts_of_another_plan(models: Path) -> None:
    """A plan of the same output that was made since is not mixed with the old one, whose parts are refused."""
    ran("plan", "--config", "merge.yaml", "-o", "out", "--plan", "old.json", "--parts", 3)
    ran("run", "old.json")
    write_recipe(models, merge_method="average")
    whole = in_one_piece("other")
    again = ran("plan", "--config", "merge.yaml", "-o", "out", "--parts", 3)
    assert "discarding unfinished work" in again.err
    for command in (["run", "old.json"], ["finish", "old.json"]):
        assert "another plan than old.json" in refused(6, *command).err
    ran("run", "plan.json")
    ran("finish", "plan.json")
    weights = {name: content for name, content in whole.items() if "safetensors" in name}
    assert {name: (models / "out" / name).read_bytes() for name in weights} == weights


@pytest.mark.slow
def test_the_same_plan_again(models: Path) -> None:
    """Planning once more what is in the making keeps what parts have done."""
    total = planned()
    ran("run", "plan.json", "--part", f"1-7/{total}")
    before = snapshot(models / STAGING)
    planned()
    assert snapshot(models / STAGING) == before
    assert "was done before" in ran("run", "plan.json", "--part", f"7/{total}").err


# --- beside other runs ---


@pytest.mark.slow
def test_whoever_needs_it_alone_waits(models: Path) -> None:
    """While a part runs, neither a whole run nor `lines clean` nor `lines finish` takes its folder from it."""
    planned()
    opened = open_parts(Path("plan.json"))
    with Shared(opened.divided.output, opened.divided.digest, opened.divided.file):
        for command in (["merge", "--config", "merge.yaml", "-o", "out"], ["clean", "out"]):
            assert "another run is writing it" in refused(6, *command).err
        ran("run", "plan.json")  # another part may
        assert "another run is writing it" in refused(6, "finish", "plan.json").err
    ran("finish", "plan.json")


@pytest.mark.slow
def test_a_whole_run_goes_on_from_parts(models: Path) -> None:
    """`lines merge --resume` keeps what parts have written, and does the rest."""
    whole = in_one_piece()
    total = planned()
    ran("run", "plan.json", "--part", f"7-8/{total}")
    told = ran("merge", "--config", "merge.yaml", "-o", "out", "--resume", "--json").json
    assert told["resumed"] == 16 * 2**20
    assert contents(models / "out") == whole


@pytest.mark.slow
def test_what_parts_left_is_cleaned_away(models: Path) -> None:
    planned()
    ran("run", "plan.json", "--part", "7/9")
    assert "35% finished" in ran("clean", "out").err
    assert not (models / STAGING).exists()


def test_a_stranger_s_file_among_the_records(models: Path) -> None:
    """What is not ours is named, and neither read nor removed."""
    planned()
    stranger = models / STAGING / "parts" / "notes.txt"
    stranger.write_text("mine")
    for command in (["run", "plan.json"], ["finish", "plan.json"], ["clean", "out"]):
        assert "parts/notes.txt" in refused(6, *command).err
    assert stranger.read_text() == "mine"


def test_a_link_among_the_records(models: Path) -> None:
    """A record that is a link is not followed."""
    planned()
    (models / "outside").write_text("")
    (models / STAGING / "parts" / "7").symlink_to(models / "outside")
    assert "parts/7" in refused(6, "run", "plan.json").err
    assert (models / "outside").read_text() == ""


@pytest.mark.slow
def test_an_output_that_exists(models: Path) -> None:
    """Without --force it is refused when it is planned; with it, it is replaced when all is done, and not before."""
    ran("merge", "--config", "merge.yaml", "-o", "out", "--set", "lines.beta=0.7")
    old = contents(models / "out")
    refused(6, "plan", "--config", "merge.yaml", "-o", "out")
    assert not (models / "plan.json").exists()
    planned("--force")
    ran("run", "plan.json")
    assert contents(models / "out") == old
    ran("finish", "plan.json")
    assert contents(models / "out") != old


def test_a_file_in_place_of_the_plan(models: Path) -> None:
    """What is no plan is not replaced by one, nor is a plan put into the output."""
    (models / "plan.json").write_text('{"mine": 1}')
    assert "not a plan" in refused(6, "plan", "--config", "merge.yaml", "-o", "out").err
    assert (models / "plan.json").read_text() == '{"mine": 1}'
    assert "in the output's folder" in refused(6, "plan", "--config", "merge.yaml", "-o", "out", "--plan", "out/p").err


@pytest.mark.slow
def test_nan_in_one_part(models: Path) -> None:
    """The part that reads it is refused with the tensor's name; the others are done, and kept."""
    write_recipe(models, merge_method="task_arithmetic")
    bad = {f"layers.{i}.w": torch.ones(1500, 1000) for i in range(4)} | {"layers.3.steps": torch.tensor(0)}
    bad["layers.3.w"][7, 0] = float("nan")
    shutil.rmtree(models / "ft")
    write_checkpoint(models / "ft", bad, config={"model_type": "tiny"})
    total = planned()
    ran("run", "plan.json", "--part", f"1/{total}")
    assert "layers.3.w" in refused(5, "run", "plan.json", "--part", f"3/{total}").err
    assert "2-3 are missing" in refused(6, "finish", "plan.json").err


def test_an_adapter_is_made_in_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused when it is planned, and nothing is left."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("b", "f")):
        write_checkpoint(tmp_path / side, {f"h.{i}.w.weight": torch.ones(2, 3) * seed for i in range(2)})
    (tmp_path / "merge.yaml").write_text(
        yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": "b", "models": [{"model": "f"}],
                        "as_adapter": True, "rank": 1})
    )  # fmt: skip
    assert "in one part" in refused(3, "plan", "--config", "merge.yaml", "-o", "out").err
    assert {path.name for path in tmp_path.iterdir()} == {"b", "f", "merge.yaml"}


# --- twice at once, and killed ---


@pytest.mark.slow
def test_the_same_part_twice_at_once(models: Path) -> None:
    """Two processes that do the same part, whatever it measures or writes, harm nothing."""
    whole = in_one_piece()
    total = planned()
    for numbers in ("1-3", "2-6", "4-9", "7-9"):
        command = forked.command("run", "plan.json", "--part", f"{numbers}/{total}", "-q", "--workers", 1)
        with forked.Forked(command) as one, forked.Forked(command) as other:
            assert [one.wait(), other.wait()] == [0, 0], one.read()[1] + other.read()[1]
    ran("finish", "plan.json")
    assert contents(models / "out") == whole


@pytest.mark.slow
def test_all_parts_at_once(models: Path) -> None:
    """Where all parts begin at once, those that write measure first what nobody has yet."""
    whole = in_one_piece()
    total = planned()
    parts = [
        forked.Forked(forked.command("run", "plan.json", "--part", f"{number}/{total}", "-q", "--workers", 1))
        for number in range(1, total + 1)
    ]
    for part in parts:
        with part:
            assert part.wait(120) == 0, part.read()[1]
    ran("finish", "plan.json")
    assert contents(models / "out") == whole


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write takes a moment, so that a kill comes between two."""
    write = NewFile.write

    def slow(file: NewFile, view: memoryview, offset: int) -> None:
        time.sleep(0.01)
        write(file, view, offset)

    monkeypatch.setattr(NewFile, "write", slow)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_again_and_again(models: Path, slowly: None, kills: int) -> None:
    """A process that is killed leaves no part half done: the same command goes on, and the bytes are the same."""
    whole = in_one_piece()
    total = planned()
    chance = random.Random(kills)
    for n in range(kills):
        number = chance.randint(1, total)
        with forked.Forked(forked.command("run", "plan.json", "--part", f"{number}/{total}", "-q")) as fork:
            time.sleep(chance.uniform(0.02, 0.4))
            fork.send_signal([signal.SIGKILL, signal.SIGTERM, signal.SIGINT][n % 3])
            fork.wait()
    assert not (models / "out").exists()
    ran("run", "plan.json")
    with forked.Forked(forked.command("finish", "plan.json", "-q")) as fork:
        time.sleep(chance.uniform(0.0, 0.1))
        fork.kill()
        fork.wait()
    ran("finish", "plan.json")
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("at", ["amid the records", "after the records", "after the journal"])
def test_a_finish_that_is_killed_as_it_tidies_up(models: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The output is in place: the same command ends well, and removes what is left."""
    whole = in_one_piece()
    planned()
    ran("run", "plan.json")

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def some_cleared(folder: Path) -> None:
        if at == "amid the records":
            (folder / "parts" / "plan").unlink()
        else:
            clear(folder)
        killed()

    clear = staging._clear_records
    with monkeypatch.context() as patched:
        patched.setattr(staging, *(("remove_with", killed) if "journal" in at else ("_clear_records", some_cleared)))
        assert forked.run(forked.command("finish", "plan.json", "-q")).returncode == -signal.SIGKILL
    assert (models / STAGING).exists()
    ran("finish", "plan.json")
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


def killed_in_place(*command: str) -> None:
    """A command that is killed once its output is in place, before anything is tidied up."""

    def run() -> None:
        staging._clear = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
        forked.command(*command)()

    assert forked.run(run).returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("then", ["finish", "merge", "plan"])
def test_what_was_replaced_is_not_what_parts_wrote(models: Path, then: str) -> None:
    """It lies where they wrote, under the same names, once outputs were exchanged. The new one is moved away then, and
    no command takes the old weights for the new.
    """
    whole = in_one_piece()
    ran("merge", "--config", "merge.yaml", "-o", "out", "--set", "lines.beta=0.9")
    planned("--force")
    ran("run", "plan.json")
    killed_in_place("finish", "plan.json")
    assert contents(models / "out") == whole
    (models / "out").rename(models / "moved")
    assert "no output is in the making" in refused(6, "finish", "plan.json").err
    assert "no output is in the making" in refused(6, "run", "plan.json").err
    if then == "finish":
        assert not (models / "out").exists()
        return
    if then == "plan":
        planned()
        assert "missing" in refused(6, "finish", "plan.json").err
        ran("run", "plan.json")
        ran("finish", "plan.json")
    else:
        ran("merge", "--config", "merge.yaml", "-o", "out", "--resume")
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


@pytest.mark.slow
def test_one_file_whose_finish_is_killed(models: Path) -> None:
    """There is no recipe beside it; what the run has left says that it is in place."""
    ran("merge", "--config", "merge.yaml", "-o", "out.safetensors")
    whole = Path("out.safetensors").read_bytes()
    Path("out.safetensors").unlink()
    ran("plan", "--config", "merge.yaml", "-o", "out.safetensors", "--parts", 2)
    ran("run", "plan.json")
    killed_in_place("finish", "plan.json")
    assert "no record of its digest" in refused(6, "finish", "plan.json", "--verify").err
    with open("out.safetensors", "r+b") as file:  # as cp writes: into the same file
        file.write(b"\x08\0\0\0\0\0\0\0{}")
    assert "no output is in the making" in refused(6, "finish", "plan.json").err
    Path("out.safetensors").write_bytes(whole)
    ran("finish", "plan.json")
    assert Path("out.safetensors").read_bytes() == whole
    assert not (models / ".out.safetensors.lines").exists()


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "altered"])
def test_an_output_that_is_damaged_behind_a_kill(models: Path, damage: str) -> None:
    """A run was killed as it tidied up, and its output was damaged: a job that always resumes makes it again."""
    whole = in_one_piece()
    command = ["merge", "--config", "merge.yaml", "-o", "out"]
    ran(*command, "--set", "lines.beta=0.9")
    killed_in_place(*command, "--force")
    weights = next((models / "out").glob("*.safetensors"))
    if damage == "missing":
        weights.unlink()
    else:
        weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    again = ran(*command, "--resume", "--force", "--verify")
    assert "holds unfinished work of another run" not in again.err
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


@pytest.mark.slow
def test_a_plan_over_an_output_of_the_same_recipe(models: Path) -> None:
    """It was damaged, and is made again: the old one is no reason not to put the new one into place."""
    ran("merge", "--config", "merge.yaml", "-o", "out")
    whole = contents(models / "out")
    weights = next((models / "out").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
    damaged = contents(models / "out")
    planned("--force")
    assert "missing" in refused(6, "finish", "plan.json").err
    assert contents(models / "out") == damaged
    ran("run", "plan.json")
    ran("finish", "plan.json")
    assert contents(models / "out") == whole
    assert not (models / STAGING).exists()


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["cleaned", "finished"])
def test_finish_makes_nothing_by_itself(models: Path, gone: str) -> None:
    """Without work there another's output stays, though the plan was made with --force."""
    ran("merge", "--config", "merge.yaml", "-o", "out", "--set", "lines.beta=0.9")
    planned("--force")
    if gone == "cleaned":
        ran("clean", "out")
    else:
        ran("run", "plan.json")
        ran("finish", "plan.json")
        ran("merge", "--config", "merge.yaml", "-o", "out", "--set", "lines.beta=0.1", "--force")
    before = contents(models / "out")
    assert "no output is in the making" in refused(6, "finish", "plan.json").err
    assert contents(models / "out") == before


@pytest.mark.slow
def test_tidying_up_leaves_what_has_begun(models: Path) -> None:
    """Another run may have begun since somebody saw that all was over."""
    planned()
    ran("run", "plan.json")
    before = snapshot(models / STAGING)
    assert staging.clean(Path("out"), only_over=True) is None
    assert snapshot(models / STAGING) == before


@pytest.mark.slow
def test_finish_says_what_it_takes_from_parts(models: Path) -> None:
    """The summary of `lines finish` is that of a whole run, but for the time and what was done before."""
    told = ran("merge", "--config", "merge.yaml", "-o", "out", "--json").json
    shutil.rmtree("out")
    planned()
    ran("run", "plan.json")
    again = ran("finish", "plan.json", "--json").json
    apart = {"seconds", "resumed"}
    assert {key: value for key, value in again.items() if key not in apart} == {
        key: value for key, value in told.items() if key not in apart
    }
    assert again["resumed"] == told["bytes"]["written"]


@pytest.mark.slow
def test_a_model_that_is_its_base(models: Path) -> None:
    """It is said by `lines finish` as by a whole run, though no part sees all of it."""
    shutil.rmtree("ft2")
    shutil.copytree("base", "ft2")
    told = ran("merge", "--config", "merge.yaml", "-o", "out", "--json").json
    shutil.rmtree("out")
    planned()
    ran("run", "plan.json")
    again = ran("finish", "plan.json", "--json").json
    assert len(told["unchanged"]) == 1
    assert again["unchanged"] == told["unchanged"]


@pytest.mark.slow
def test_a_file_of_the_output_that_was_replaced(models: Path) -> None:
    """What a part wrote into a file that is another now, or is gone, is not taken for what it is."""
    planned()
    ran("run", "plan.json", "--part", "1-7/9")
    file = next((models / STAGING / "new").glob("*.safetensors"))
    file.unlink()
    error = refused(6, "run", "plan.json", "--part", "8/9").err
    assert file.name in error
    assert "lines clean out" in error
