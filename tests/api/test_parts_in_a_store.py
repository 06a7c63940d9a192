"""A run in parts whose output goes into an object store: the same bytes; parts that come twice, or are killed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
import yaml

from lines_cli.engine import run_parts
from lines_cli.errors import CheckpointError
from lines_cli.storage import object_staging, object_store
from support.files import write_checkpoint
from support.ray_cluster import ON_A_CLUSTER, kill_node, nodes_of, renew, three_nodes
from support.run import ran, refused, run_lines
from support.s3_server import S3Server, at_hand

pytest.importorskip("obstore")
RECIPES: dict[str, dict[str, Any]] = {
    "three passes": {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
    "two": {"merge_method": "dare_ties", "parameters": {"density": 0.4, "rescale": "l1"}},
    "one": {"merge_method": "task_arithmetic", "lines": {"alpha": 0.2, "beta": 0.3}},
}
LAST = {"config.json", "model.safetensors.index.json", "lines_recipe.yaml"}
RECORDS = "models/.out.lines/parts/"


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with at_hand(monkeypatch) as server:
        yield server


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two fine-tunes of four tensors, and a recipe that makes four files."""
    monkeypatch.chdir(tmp_path)
    models(tmp_path, 64 * 128)
    write_recipe("three passes")
    return tmp_path


def models(folder: Path, entries: int) -> None:
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(entries, generator=chance) for i in range(4)}
        write_checkpoint(folder / side, tensors, config={"model_type": "tiny"})
        (folder / side / "tokenizer.json").write_text("{}")


def write_recipe(name: str, **keys: Any) -> None:
    base, *tuned = (str(Path.cwd() / side) for side in ("base", "ft", "ft2"))  # as an output in a store names them
    values = {"base_model": base, "models": [{"model": model} for model in tuned], "max_shard_size": "35KB"}
    Path("merge.yaml").write_text(yaml.safe_dump({**values, **RECIPES[name], **keys}))


def in_one_piece() -> dict[str, bytes]:
    ran("merge", "--config", "merge.yaml", "-o", "out")
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


def planned(parts: int = 2) -> int:
    """Plan it, each stage cut so; how many parts there are."""
    ran("plan", "--config", "merge.yaml", "-o", "s3://models/out", "--parts", parts)
    return len(json.loads(Path("plan.json").read_text())["parts"])


def part(number: int, total: int) -> list[object]:
    return ["run", "plan.json", "--part", f"{number}/{total}"]


def there(store: S3Server) -> dict[str, bytes]:
    """What lies at the destination."""
    return {
        key.removeprefix("models/out/"): one.content
        for key, one in store.objects.items()
        if key.startswith("models/out/")
    }


def is_all(store: S3Server, whole: dict[str, bytes]) -> bool:
    """Whether it is the output, and nothing else is left."""
    assert there(store) == whole
    assert len(store.objects) == len(whole), store.objects.keys()
    return not store.uploads


# --- the same bytes ---


@pytest.mark.slow
@pytest.mark.parametrize("order", [1, -1], ids=["forward", "backward"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_in_any_order(here: Path, store: S3Server, recipe: str, order: int) -> None:
    """Every file is the same to the byte; what a reader looks for is not there before all is."""
    write_recipe(recipe)
    whole, total = in_one_piece(), planned()
    for number in range(1, total + 1)[::order]:
        ran(*part(number, total))
        assert not LAST & there(store).keys()
    ran("finish", "plan.json", "--verify")
    assert is_all(store, whole)
    assert "is finished" in ran("finish", "plan.json").err
    assert "is finished, or was cleaned away" in refused(6, *part(1, total))


def test_parts_are_whole_files(here: Path, store: S3Server) -> None:
    """However many parts are asked for: an object is sent by one process."""
    ran("plan", "--config", "merge.yaml", "-o", "s3://models/out", "--parts", 500)
    parts = json.loads(Path("plan.json").read_text())["parts"]
    files = [name for one in parts for name in one.get("files", ())]
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert sum(one["writes"] > 0 for one in parts) == 4


@pytest.mark.slow
def test_no_disk_in_common(here: Path, store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs, plan and output in the store: each part may run in any folder."""
    for side in ("base", "ft", "ft2"):
        for path in (here / side).iterdir():
            store.put(f"models/in/{side}/{path.name}", path.read_bytes())
    inputs = {"base_model": "s3://models/in/base", "models": [{"model": f"s3://models/in/{x}"} for x in ("ft", "ft2")]}
    write_recipe("three passes", **inputs)
    whole, before = in_one_piece(), dict(store.objects)
    ran("plan", "--config", "merge.yaml", "-o", "s3://models/out", "--parts", 2, "--plan", "s3://models/plan.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ran("run", "s3://models/plan.json", "--part", "6/6")
    ran("run", "s3://models/plan.json")
    ran("finish", "s3://models/plan.json")
    assert there(store) == whole
    assert store.objects.keys() - before.keys() == {f"models/out/{name}" for name in whole} | {"models/plan.json"}
    error = refused(
        6, "plan", "--config", here / "merge.yaml", "-o", "s3://models/2", "--plan", "s3://models/in/base/config.json"
    )
    assert "is not a plan of lines" in error
    assert "no such object" in refused(2, "run", "s3://models/nothing.json")
    assert "no such bucket" in refused(3, "run", "s3://nowhere/plan.json")


# --- what is missing ---


@pytest.mark.slow
def test_a_part_that_is_missing(here: Path, store: S3Server) -> None:
    """It is named, with a command that makes it, and nothing is changed by then; so is one whose object has gone, or is
    another.
    """
    whole, total = in_one_piece(), planned()
    ran(*part(5, total))
    before = dict(store.objects)
    error = refused(6, "finish", "plan.json")
    assert "6 is missing" in error
    assert store.objects == before
    command = re.search(r"lines (run plan\.json --part \S+)", error)
    assert command is not None
    ran(*shlex.split(command[1]))
    del store.objects["models/out/model-00001-of-00004.safetensors"]
    store.put("models/out/model-00003-of-00004.safetensors", b"another")
    assert "parts 5-6 are missing" in refused(6, "finish", "plan.json")
    assert "model-00003-of" in refused(6, "run", "plan.json", "--part", f"5-6/{total}")
    del store.objects["models/out/model-00003-of-00004.safetensors"]
    ran("run", "plan.json", "--part", f"5-6/{total}")
    ran("finish", "plan.json")
    assert is_all(store, whole)


@pytest.mark.slow
def test_a_merge_goes_on_from_parts(here: Path, store: S3Server) -> None:
    """`lines merge --resume` sends what no part has."""
    whole, total = in_one_piece(), planned()
    ran(*part(5, total))
    store.asked.clear()
    told = ran("merge", "--config", "merge.yaml", "-o", "s3://models/out", "--resume", "--json").json
    assert told["resumed"] > 0
    assert is_all(store, whole)
    sent = {path[-22:] for method, path, _ in store.asked if method == "POST" and path.startswith("models/out/")}
    assert sent == {"00003-of-00004.safetensors"[-22:], "00004-of-00004.safetensors"[-22:]}


# --- what others put there meanwhile ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["model-00003-of-00004.safetensors", "model.safetensors", "lines_recipe.yaml"])
def test_what_comes_after_the_plan(here: Path, store: S3Server, name: str) -> None:
    """A shard's name, other weights, the recipe of a finished output: no part replaces it or puts a file beside it, and
    lines clean removes what parts have made, and not this.
    """
    write_recipe("one")
    total = planned()
    ran(*part(1, total))
    size = len(there(store)["model-00001-of-00004.safetensors"])  # that of every shard
    store.put(f"models/out/{name}", bytes(size))
    before = there(store)
    error = refused(6, *part(2, total))
    assert name in error
    assert "as it was" not in error
    assert there(store) == before
    assert not store.uploads
    refused(6, "finish", "plan.json")
    assert f"it stays:\n  {name}" in ran("clean", "s3://models/out").err
    assert {key: one.content for key, one in store.objects.items()} == {f"models/out/{name}": bytes(size)}


@pytest.mark.slow
def test_an_output_that_another_has_pushed(here: Path, store: S3Server) -> None:
    """The same, byte for byte, is still another's."""
    write_recipe("one")
    whole, total = in_one_piece(), planned()
    ran("push", "out", "s3://models/out")
    assert "lines_recipe.yaml" in refused(6, *part(1, total))
    ran("clean", "s3://models/out")
    assert is_all(store, whole)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "merge"])
def test_what_comes_while_a_file_is_sent(
    here: Path, store: S3Server, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is seen before that is whole."""
    monkeypatch.setattr(object_store, "PART", 4096)
    write_recipe("one")
    commands = {"run": [*part(1, planned())], "merge": ["merge", "--config", "merge.yaml", "-o", "s3://models/two"]}
    url = {"run": f"models/out{FIRST}", "merge": f"models/two{FIRST}"}[command]
    seen = once(store, "POST", url, lambda: store.put(url, b"mine"))  # its upload begins: no part is sent before that
    error = refused(6, *commands[command])
    assert seen
    assert FIRST[1:] in error
    assert store.objects[url].content == b"mine"
    assert not store.uploads


# --- killed while the records of finished work are removed ---


@pytest.mark.slow
@pytest.mark.parametrize(("command", "then"), [("finish", "clean"), ("finish", "finish"), ("merge", "clean")])
def test_a_removal_that_ends_half_way(
    here: Path, store: S3Server, command: str, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two removals: what the next command finds leads it to remove no file of the output."""
    write_recipe("one")
    whole = in_one_piece()
    left = [0]

    def one_by_one(urls: Sequence[str]) -> None:
        for url in urls:
            left[0] -= 1
            if left[0] < 0:
                raise CheckpointError("killed")
            object_store.remove([url])

    monkeypatch.setattr(object_staging, "remove", one_by_one)
    if command == "finish":
        ran("run", "plan.json", "--part", f"1-2/{planned()}")
        told = ran("finish", "plan.json")
    else:
        told = ran("merge", "--config", "merge.yaml", "-o", "s3://models/out")
    assert "lines clean s3://models/out" in told.err
    before = dict(store.objects)
    records = sorted(key for key in before if ".out.lines/" in key)
    assert f"models/.out.lines/{'parts/1' if command == 'finish' else '0'}" in records
    for removed in range(len(records) + 1):
        store.objects = dict(before)
        left[0] = removed
        done = run_lines("clean", "s3://models/out")
        assert (done.code == 0) == (removed == len(records))
        assert len(store.objects) == len(before) - removed
        left[0] = len(records)
        ran(*{"clean": ("clean", "s3://models/out"), "finish": ("finish", "plan.json")}[then])
        assert is_all(store, whole)


@pytest.mark.slow
def test_a_kill_before_the_removal(here: Path, store: S3Server) -> None:
    """Right after the recipe: nothing says that the work is finished, and what is there does."""
    write_recipe("one")
    whole = in_one_piece()
    store.fault = lambda method, path: (
        "403" if path.endswith("/finished") or (method, path) == ("POST", "models") else None
    )
    ran("merge", "--config", "merge.yaml", "-o", "s3://models/out")
    store.fault = lambda method, path: None
    assert {"models/.out.lines/run", "models/.out.lines/0"} <= store.objects.keys()
    ran("clean", "s3://models/out")
    assert is_all(store, whole)


@pytest.mark.slow
def test_an_output_whose_leftovers_stay(here: Path, store: S3Server) -> None:
    """Nothing takes it for unfinished, whatever becomes of its recipe, and no plan replaces it."""
    write_recipe("one")
    ran("run", "plan.json", "--part", f"1-2/{planned()}")
    store.fault = lambda method, path: "403" if (method, path) == ("POST", "models") else None
    ran("finish", "plan.json")
    store.fault = lambda method, path: None
    before = there(store)
    command = ["plan", "--config", "merge.yaml", "-o", "s3://models/out", "--plan", "other.json"]
    assert "replace none" in refused(6, *command, "--force")
    assert there(store) == before
    store.put("models/out/lines_recipe.yaml", b"edited")
    ran("clean", "s3://models/out")
    assert is_all(store, {**before, "lines_recipe.yaml": b"edited"})


@pytest.mark.slow
def test_clean_that_ends_half_way(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of unfinished work; what others have put there stays, wherever it ends."""
    write_recipe("one")
    total = planned()
    ran(*part(1, total))
    store.put("models/out/model.safetensors", b"mine")
    before, left = dict(store.objects), [0]

    def one_by_one(urls: Sequence[str]) -> None:
        for url in urls:
            left[0] -= 1
            if left[0] < 0:
                raise CheckpointError("killed")
            object_store.remove([url])

    monkeypatch.setattr(object_staging, "remove", one_by_one)
    for removed in range(len(before) - 1):
        store.objects, left[0] = dict(before), removed
        refused(6, "clean", "s3://models/out")
        assert len(store.objects) == len(before) - removed
        left[0] = len(before)
        ran("clean", "s3://models/out")
        assert there(store) == {"model.safetensors": b"mine"}
        assert len(store.objects) == 1


# --- the same part twice, and killed ---


def once(store: S3Server, method: str, name: str, do: Callable[[], object], *, after: int = 0) -> list[bool]:
    """Have something done in the midst of a request, one time; whether that was. `after` so many of them."""
    seen: list[bool] = []
    left = [after]

    def amid(asked: str, path: str) -> None:
        if asked == method and path.endswith(name) and not seen:
            left[0] -= 1
            if left[0] < 0:
                seen.append(True)
                do()

    store.amid = amid
    return seen


FIRST = "/model-00001-of-00004.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "after"),
    [("PUT", FIRST, 0), ("POST", FIRST, 1), ("PUT", f"{RECORDS}5", 0)],
    ids=["while it sends", "as it is whole", "before it is written down"],
)
def test_a_part_that_runs_twice_at_once(here: Path, store: S3Server, method: str, name: str, after: int) -> None:
    """Another does all of it, whenever that is: both end well, and the record says which object is there."""
    whole, total = in_one_piece(), planned()
    ran("run", "plan.json", "--part", f"1-4/{total}")

    def another() -> None:
        ran(*part(5, total))
        time.sleep(1.1)  # so that the same bytes are another object by their time

    seen = once(store, method, name, another, after=after)
    ran(*part(5, total))
    assert seen
    assert not store.uploads
    ran(*part(6, total))
    ran("finish", "plan.json")
    assert is_all(store, whole)


@pytest.mark.slow
def test_a_part_that_was_left_to_another(here: Path, store: S3Server) -> None:
    """It gave its second file up for another's, and then its first became whole in place of the other's: that record
    holds no more, and all of it is made again.
    """
    whole, total = in_one_piece(), planned()
    ran("run", "plan.json", "--part", f"1-4/{total}")
    second, completions = FIRST.replace("1-of", "2-of"), []
    begins, is_done = threading.Event(), threading.Event()

    def amid(asked: str, path: str) -> None:
        if asked == "POST" and path.endswith(second) and not begins.is_set():
            begins.set()
            assert is_done.wait(60)
        if asked == "POST" and path.endswith(FIRST):
            completions.append(path)
            if len(completions) == 2:
                assert begins.wait(60)
                ran(*part(5, total))
                is_done.set()
                wait_until(lambda: any(how == "DELETE" and of.endswith(second) for how, of, _ in list(store.asked)))
                time.sleep(1.1)  # so that the same bytes are another object by their time

    store.amid = amid
    ran(*part(5, total))
    assert is_done.is_set()
    ran(*part(6, total))
    ran("finish", "plan.json")
    assert is_all(store, whole)


def wait_until(is_so: Callable[[], bool], seconds: float = 300) -> None:
    """Return once it is."""
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["clean", "merge"])
def test_a_part_whose_work_is_taken_over(here: Path, store: S3Server, command: str) -> None:
    """It ends before its file is whole, leaves nothing, and does not disturb who came."""
    whole, total = in_one_piece(), planned(parts=4)
    assert total == 12
    ran("run", "plan.json", "--part", f"1-8/{total}")
    takes = {"clean": ["s3://models/out"], "merge": ["--config", "merge.yaml", "-o", "s3://models/out", "--resume"]}
    seen = once(store, "POST", FIRST, lambda: ran(command, *takes[command]))
    error = refused(6, *part(9, total))
    assert seen
    assert "no longer that of this plan" in error
    assert not store.uploads
    if command == "merge":
        assert is_all(store, whole)
    else:
        assert not store.objects


@pytest.mark.slow
def test_a_part_that_is_interrupted(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says how many whole files of it stand there, and lines clean says what they took."""
    write_recipe("one")
    monkeypatch.setattr(object_store, "PART", 16_384)
    planned(parts=1)
    came: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith("2-of-00004.safetensors"):
            if f"models/out{FIRST}" in store.objects and not came:
                came.append(path)
                os.kill(os.getpid(), signal.SIGINT)
            return "503"
        return None

    store.fault = fault
    error = refused(130, "run", "plan.json", "--workers", 1)
    assert "as it was" not in error
    whole = len(there(store))  # several are sent at once
    assert f"holds {whole} whole file" in error
    assert FIRST[1:] in there(store)
    assert not store.uploads
    store.fault = lambda method, path: None
    told = ran("clean", "s3://models/out").err
    assert f"{25 * whole}% finished" in told
    assert "(0 B" not in told
    assert not store.objects


@pytest.mark.slow
def test_a_part_that_is_killed(here: Path, store: S3Server) -> None:
    """Nothing of it counts, and it is done again; of what no listing shows, the end of the run tells."""
    whole, total = in_one_piece(), planned()
    ran("run", "plan.json", "--part", f"1-4/{total}")
    store.until = lambda: False
    store.fault = lambda method, path: "hold" if method == "PUT" and path.endswith(FIRST) else None
    command = [sys.executable, "-m", "lines_cli", *map(str, part(5, total))]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: bool(store.uploads))
        process.send_signal(signal.SIGKILL)
    store.fault = lambda method, path: None
    assert "5-6 are missing" in refused(6, "finish", "plan.json")
    ran("run", "plan.json", "--part", f"5-6/{total}")
    told = ran("finish", "plan.json").err
    assert "list-multipart-uploads --bucket models --prefix out/" in told
    assert FIRST[1:] in told
    assert there(store) == whole
    assert len(store.objects) == len(whole)


# --- remains ---


@pytest.mark.slow
@pytest.mark.parametrize("left", ["finished", "parts/1"])
def test_what_is_left_of_a_removal(here: Path, store: S3Server, left: str) -> None:
    """It is no other run's, and goes."""
    write_recipe("one")
    whole = in_one_piece()
    ran("run", "plan.json", "--part", f"1-2/{planned()}")
    ran("finish", "plan.json")
    store.put(f"models/.out.lines/{left}", b"")
    assert "another run" not in ran("finish", "plan.json").err
    assert is_all(store, whole)


@pytest.mark.slow
def test_an_output_that_is_gone_and_whose_leftovers_stay(here: Path, store: S3Server) -> None:
    """It is planned and made again: records of a finished run are of no use to the next."""
    write_recipe("one")
    whole, total = in_one_piece(), planned()
    ran("run", "plan.json", "--part", f"1-2/{total}")
    store.fault = lambda method, path: "403" if (method, path) == ("POST", "models") else None
    ran("finish", "plan.json")
    store.fault = lambda method, path: None
    store.objects = {key: one for key, one in store.objects.items() if not key.startswith("models/out/")}
    assert "is finished, or was cleaned away" in refused(6, *part(1, total))
    planned()
    ran("run", "plan.json", "--part", f"1-2/{total}")
    ran("finish", "plan.json")
    assert is_all(store, whole)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["s3://models/out", "other"])
def test_what_parts_have_measured_outlasts_a_merge(
    here: Path, store: S3Server, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in one piece that goes on from it, and is interrupted before it has anything of its own."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    ran("plan", "--config", "merge.yaml", "-o", output, "--parts", 2)
    total = len(json.loads(Path("plan.json").read_text())["parts"])
    ran(*part(1, total))
    with monkeypatch.context() as patch:
        patch.setattr("lines_cli.engine.run.measure", interrupted)
        assert "is kept" in refused(130, "merge", "--config", "merge.yaml", "-o", output, "--resume")
    assert "was done before" in ran(*part(1, total)).err


@pytest.mark.slow
def test_a_measuring_part_whose_work_is_cleaned_away(
    here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves nothing, and does not say that it is done."""
    write_recipe("two")
    total, measured = planned(), run_parts.measure_share

    def cleaned(*args: Any) -> Any:
        ran("clean", "s3://models/out")
        return measured(*args)

    monkeypatch.setattr(run_parts, "measure_share", cleaned)
    assert "no longer that of this plan" in refused(6, *part(1, total))
    assert not store.objects


@pytest.mark.slow
def test_a_part_that_gives_way_leaves_no_pieces(here: Path, store: S3Server) -> None:
    """So nobody is told to look for them."""
    total = planned()
    ran("run", "plan.json", "--part", f"1-4/{total}")
    seen = once(store, "POST", FIRST, lambda: ran(*part(5, total)))  # it has sent nothing by then
    ran(*part(5, total))
    assert seen
    assert not [key for key in store.objects if key.startswith(f"{RECORDS}5.")]
    assert "list-multipart-uploads" not in ran("clean", "s3://models/out").err


# --- leftovers, and what is in the way ---


@pytest.mark.slow
def test_clean(here: Path, store: S3Server) -> None:
    """What parts have made is removed, and their records; then there is nothing to run or to finish."""
    total = planned()
    ran(*part(5, total))
    ran("clean", "s3://models/out")
    assert not store.objects
    assert "cleaned away" in refused(6, *part(6, total))
    assert "cleaned away" in refused(6, "finish", "plan.json")


@pytest.mark.slow
def test_the_same_plan_again(here: Path, store: S3Server) -> None:
    """It keeps what parts have done. Another plan, or a run in one piece, does not begin there."""
    total = planned()
    ran(*part(5, total))
    before = dict(store.objects)
    assert planned() == total
    assert "lines clean" in refused(6, "plan", "--config", "merge.yaml", "-o", "s3://models/out", "--parts", 3)
    assert "lines clean" in refused(6, "merge", "--config", "merge.yaml", "-o", "s3://models/out")
    write_recipe("one")
    command = ["plan", "--config", "merge.yaml", "-o", "s3://models/out", "--plan", "other.json"]
    error = refused(6, *command, "--force")
    assert "lines clean" in error
    assert "add --resume" not in error  # which lines plan has not
    assert store.objects == before


def test_what_is_there_already(here: Path, store: S3Server) -> None:
    """Parts replace nothing, with --force neither; and no single object is made in parts."""
    store.put("models/out/notes.txt", b"mine")
    command = ["plan", "--config", "merge.yaml", "-o"]
    assert "exists" in refused(6, *command, "s3://models/out")
    assert "replace none" in refused(6, *command, "s3://models/out", "--force")
    assert "lines merge" in refused(2, *command, "s3://models/one.safetensors")
    hidden = [*command, "s3://models/new", "--plan", "s3://models/.new.lines/plan.json"]
    assert "another file: --plan" in refused(6, *hidden)
    assert "another file: --plan" in refused(6, *command, "out", "--plan", ".out.lines/plan.json")
    assert store.objects.keys() == {"models/out/notes.txt"}
    assert not Path("plan.json").exists()


def test_bad_data(here: Path, store: S3Server) -> None:
    """A part that finds NaN is refused, and takes back what it has sent; the others' stays."""
    tensors = {f"layers.{i}.w": torch.ones(64 * 128) for i in range(4)}
    tensors["layers.3.w"][9] = torch.nan
    write_checkpoint(here / "ft", tensors, config={"model_type": "tiny"})
    write_recipe("one")
    total = planned()
    ran(*part(1, total))
    assert "layers.3.w" in refused(5, *part(2, total))
    assert not store.uploads
    assert "model-00004-of-00004.safetensors" not in there(store)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["503", "drop"])
def test_what_passes_is_asked_again(here: Path, store: S3Server, kind: str) -> None:
    """A server that has too much to do, or drops connections, costs time and no byte."""
    whole = in_one_piece()
    number = 0

    def fault(method: str, path: str) -> str | None:
        nonlocal number
        number += 1
        return kind if number % 5 == 0 and (method, kind) != ("POST", "drop") else None

    store.fault = fault
    total = planned()
    for one in range(total, 0, -1):
        ran(*part(one, total))
    ran("finish", "plan.json")
    store.fault = lambda method, path: None
    assert there(store) == whole
    assert len(store.objects) == len(whole)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_another_s3(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not ours (moto's); no part of an upload is left."""
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        object_store._store.cache_clear()
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=30).close()  # of another test
        urlopen(Request(f"http://{host}:{port}/models", method="PUT"), timeout=30).close()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        whole, total = in_one_piece(), planned()
        for number in range(total, 0, -1):
            ran(*part(number, total))
        ran("finish", "plan.json")
        assert (object_store.marked(f"s3://models/out{FIRST}") or ("", ""))[1]
        found = client.list_objects_v2(Bucket="models")["Contents"]
        assert {one["Key"] for one in found} == {f"out/{name}" for name in whole}
        for name, content in whole.items():
            assert client.get_object(Bucket="models", Key=f"out/{name}")["Body"].read() == content
        assert not client.list_multipart_uploads(Bucket="models").get("Uploads")
    finally:
        running.stop()
        object_store._store.cache_clear()


def test_a_driver_that_is_interrupted(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not say that the destination is as it was: nodes put files there."""
    pytest.importorskip("ray")
    from lines_cli.api import on_ray

    class NoCluster:
        cpus = 2

        def say_what_is_missing(self, *_: object) -> None: ...

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(on_ray, "connected", lambda _: nullcontext(NoCluster()))
    monkeypatch.setattr(on_ray, "_stage", interrupted)
    error = refused(130, "merge", "--config", "merge.yaml", "-o", "s3://models/out", "--on", "ray")
    assert "as it was" not in error
    assert "may hold files" in error
    assert "--resume" in error


class TestOnACluster:
    """On Ray: the nodes find the store as the driver does."""

    pytestmark = ON_A_CLUSTER

    def test_on_ray(self, here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
        """The bytes of one process, with a node that is killed; nothing is left, and the plan neither."""
        models(here, 1_500_000)
        write_recipe("three passes", max_shard_size="7MB")
        whole = in_one_piece()
        with three_nodes() as cluster:
            monkeypatch.setenv("RAY_ADDRESS", cluster.address)
            command = [sys.executable, "-m", "lines_cli", "merge", "--config", "merge.yaml"]
            command += ["-o", "s3://models/out", "--on", "ray"]
            said = here / "driver.txt"  # of a node that is lost Ray says pages: too much for a pipe that nobody reads
            with said.open("w") as file, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=file) as driver:
                while f"{RECORDS}1" not in store.objects and driver.poll() is None:
                    time.sleep(0.05)
                    renew(cluster)
                kill_node(cluster, nodes_of(cluster)[0])
                while driver.poll() is None:
                    time.sleep(0.5)
                    renew(cluster)
            assert driver.returncode == 0, said.read_text()
            assert there(store) == whole
            assert len(store.objects) == len(whole), store.objects.keys()
