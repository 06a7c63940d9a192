"""Outputs straight into an object store: the same bytes, in which order they come, and what goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.errors import RecipeError, size
from lines_cli.storage import object_store, uploads
from lines_cli.storage.uploads import Uploads
from support.adapters import factors, layers_of, write_adapter
from support.files import write_checkpoint
from support.run import ran, refused
from support.s3_server import S3Server, at_hand

pytest.importorskip("obstore")
SHARDED = ("--max-shard-size", "70KB")
LAST = ["config.json", "model.safetensors.index.json", "lines_recipe.yaml"]


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with at_hand(monkeypatch) as server:
        yield server


@pytest.fixture
def here(store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two fine-tunes, and nothing in the store."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(64, 128, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "llama", "num_hidden_layers": 4})
        (tmp_path / side / "tokenizer.json").write_text("{}")
    return tmp_path


def there(store: S3Server, folder: str = "out") -> dict[str, bytes]:
    """What lies in a folder of the store; nothing else does."""
    assert not [key for key in store.objects if not key.startswith(f"models/{folder}")], store.objects.keys()
    return {key.removeprefix(f"models/{folder}/"): one.content for key, one in store.objects.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def written(store: S3Server) -> list[str]:
    """The objects that were written whole, in that order."""
    keys = [path.removeprefix("models/") for method, path, _ in store.asked if method in ("PUT", "POST")]
    order = list(dict.fromkeys(reversed(keys)))[::-1]
    return [key.removeprefix("out/") for key in order if key.startswith("out")]


def edit(here: Path, *more: object) -> list[object]:
    return ["edit", here / "base", here / "ft", *more]


def merge(here: Path, method: str, **parameters: Any) -> list[object]:
    recipe = {
        "merge_method": method,
        "base_model": str(here / "base"),
        "models": [{"model": str(here / "ft")}, {"model": str(here / "ft2")}],
        "parameters": parameters,
        "lines": {"alpha": "auto", "beta": 0.5},
    }
    (here / "merge.yaml").write_text(yaml.safe_dump(recipe))
    return ["merge", "--config", here / "merge.yaml"]


def adapter(here: Path) -> Path:
    sizes = {"mlp.up_proj": (64, 128)}
    return write_adapter(
        here / "adapter", factors(layers_of(4, sizes), 4, 7), base_model_name_or_path=str(here / "base")
    )


# --- the same bytes ---


@pytest.mark.parametrize("shards", [(), SHARDED], ids=["one", "sharded"])
def test_an_edit(here: Path, store: S3Server, shards: tuple[str, ...]) -> None:
    """Weights, config, tokenizer, index, card and recipe are those of a folder, to the byte; nothing else is left."""
    ran(*edit(here, *shards), "-o", here / "out")
    told = ran(*edit(here, *shards), "-o", "s3://models/out", "--json").json
    assert told["output"] == "s3://models/out"
    assert there(store) == contents(here / "out")
    assert not store.uploads


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("ties", {"density": 0.3, "trim": "global"}),
        ("dare_linear", {"density": 0.5}),
        ("iso_c", {}),
        ("model_stock", {}),
    ],
)
@pytest.mark.slow
def test_a_merge(here: Path, store: S3Server, method: str, parameters: dict[str, Any]) -> None:
    """The same of methods that measure, that draw, and that see matrices whole."""
    command = merge(here, method, **parameters)
    if method == "model_stock":
        recipe = yaml.safe_load((here / "merge.yaml").read_text())
        recipe["lines"]["alpha"] = 0.2
        (here / "merge.yaml").write_text(yaml.safe_dump(recipe))
    ran(*command, "-o", here / "out", "--set", "max_shard_size=70KB")
    ran(*command, "-o", "s3://models/out", "--set", "max_shard_size=70KB")
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_an_adapter_folded_in(here: Path, store: S3Server) -> None:
    command = ["edit", here / "base", f"{here / 'base'}+{adapter(here)}"]
    ran(*command, "-o", here / "out")
    ran(*command, "-o", "s3://models/out")
    assert there(store) == contents(here / "out")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["scaled", "extracted"])
def test_an_adapter(here: Path, store: S3Server, kind: str) -> None:
    """An output that is an adapter itself; one of fewer ranks is measured while it is made."""
    command: list[object] = ["edit", "--adapter", adapter(here), "--base", here / "base"]
    if kind == "extracted":
        command = ["extract", here / "ft", "--base", here / "base", "--energy", 0.5]
    ran(*command, "-o", here / "out")
    ran(*command, "-o", "s3://models/out")
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_a_file_by_itself(here: Path, store: S3Server) -> None:
    """It appears in one step, and takes the place of one that is there in one step."""
    ran(*edit(here), "-o", here / "out.safetensors")
    ran(*edit(here), "-o", "s3://models/out.safetensors")
    content = (here / "out.safetensors").read_bytes()
    assert {key: one.content for key, one in store.objects.items()} == {"models/out.safetensors": content}
    before = store.objects["models/out.safetensors"]
    assert "exists" in refused(6, *edit(here), "-o", "s3://models/out.safetensors")
    seen = set[bool]()
    store.fault = lambda method, path: seen.add(before is store.objects.get("models/out.safetensors"))  # type: ignore[func-returns-value]
    ran(*edit(here), "-o", "s3://models/out.safetensors", "--force", "--alpha", 0.4)
    assert seen == {True, False}
    assert [*store.objects] == ["models/out.safetensors"]
    assert store.objects["models/out.safetensors"].content != content


def test_inputs_and_output_in_the_store(here: Path, store: S3Server) -> None:
    """Nothing of the weights passes this disk; `lines verify` and `lines inspect` read the output where it is."""
    for side in ("base", "ft"):
        for path in (here / side).iterdir():
            store.put(f"models/out-of/{side}/{path.name}", path.read_bytes())
    ran("edit", "s3://models/out-of/base", "s3://models/out-of/ft", "-o", "s3://models/out", *SHARDED)
    assert ran("verify", "s3://models/out", "--json").json["same"] is True
    assert ran("inspect", "s3://models/out", "--json").json["parameters"] == 4 * 64 * 128
    key = "models/out/model-00002-of-00002.safetensors"
    store.objects[key].content = store.objects[key].content[:-1] + b"\0"
    error = refused(5, "verify", "s3://models/out")
    assert "is not what its recipe makes" in error


@pytest.mark.slow
def test_a_file_by_itself_is_verified(here: Path, store: S3Server) -> None:
    command = merge(here, "ties", density=0.3)
    ran(*command, "-o", "s3://models/out.safetensors")
    told = ran("verify", "s3://models/out.safetensors", "--config", here / "merge.yaml", "--json").json
    assert told["same"] is True


# --- the order, and what is there already ---


def test_the_order(here: Path, store: S3Server) -> None:
    """Weights first, then what stands beside them; last what a reader looks for: config, index, recipe."""
    ran(*edit(here, *SHARDED), "-o", "s3://models/out")
    order = written(store)
    assert all(name.endswith(".safetensors") for name in order[:2])
    assert order[-3:] == LAST


@pytest.mark.slow
def test_parts(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the output is a part of the upload."""
    monkeypatch.setattr(object_store, "PART", 2**20)
    for side in ("base", "ft"):
        tensors = {f"model.layers.{i}.w": torch.full((600, 1000), float(i)) for i in range(4)}
        write_checkpoint(here / side, tensors, config={"model_type": "llama", "num_hidden_layers": 4})
    ran(*edit(here), "-o", here / "out")
    ran(*edit(here), "-o", "s3://models/out")
    assert there(store) == contents(here / "out")
    parts = [path for method, path, _ in store.asked if method == "PUT" and path == "models/out/model.safetensors"]
    assert len(parts) == -(-len(there(store)["model.safetensors"]) // 2**20) == 10


def test_the_parts_of_large_files() -> None:
    """They are larger where there would be more than 10,000, and whole blocks of the digest."""
    assert object_store.part_of(5 * 10**9) == object_store.PART
    size = object_store.part_of(1_342 * 10**9)
    assert size % 2**22 == 0
    assert 9_000 < 1_342 * 10**9 / size <= 10_000


def test_a_destination_that_is_taken(here: Path, store: S3Server) -> None:
    """It is refused before anything is computed, at the cost of a few requests."""
    store.put("models/out/notes.txt", b"mine")
    assert "--force" in refused(6, *edit(here), "-o", "s3://models/out")
    assert {method for method, _, _ in store.asked} == {"GET", "HEAD"}
    assert len(store.asked) < 8
    assert "notes.txt" in refused(6, *edit(here), "-o", "s3://models/out", "--force")
    assert there(store) == {"notes.txt": b"mine"}


@pytest.mark.slow
def test_an_output_that_is_replaced(here: Path, store: S3Server) -> None:
    """What a reader looks for goes first, before any weight is there, and comes last: nobody sees parts of two."""
    ran(*edit(here, *SHARDED), "-o", "s3://models/out")
    seen: list[set[str]] = []

    def look(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(".safetensors"):
            seen.append(set(store.objects))

    store.fault = look
    ran(*edit(here), "-o", here / "out", "--alpha", 0.4)
    ran(*edit(here), "-o", "s3://models/out", "--alpha", 0.4, "--force")
    assert there(store) == contents(here / "out")
    assert seen == [{"models/.out.lines/run", "models/.out.lines/down"}]


def test_the_output_is_an_input(here: Path, store: S3Server) -> None:
    for path in (here / "base").iterdir():
        store.put(f"models/out/{path.name}", path.read_bytes())
    before = there(store)
    for output in ("s3://models/out", "s3://models/out/model.safetensors"):
        assert "would replace an input" in refused(6, "edit", "s3://models/out", here / "ft", "-o", output, "--force")
    assert there(store) == before


def test_a_dry_run(here: Path, store: S3Server) -> None:
    """It asks what is there, and writes nothing; the forecast of memory counts what is on its way."""
    local = ran(*edit(here), "-o", "out", "--dry-run", "--json").json
    remote = ran(*edit(here), "-o", "s3://models/out", "--dry-run", "--json").json
    assert remote["output"] == "s3://models/out"
    assert remote["peak_memory"] > local["peak_memory"]
    assert not store.objects
    assert "no such bucket" in refused(6, *edit(here), "-o", "s3://nowhere/out", "--dry-run")


# --- what goes wrong ---


@pytest.mark.parametrize("kind", ["503", "slow", "drop"])
@pytest.mark.slow
def test_what_passes_is_asked_again(here: Path, store: S3Server, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has too much to do, is slow, or drops connections costs time and no byte."""
    monkeypatch.setattr(object_store, "PART", 32_768)
    ran(*edit(here, *SHARDED), "-o", here / "out")
    count = 0

    def fault(method: str, path: str) -> str | None:
        nonlocal count
        count += 1
        return kind if count % 4 == 3 and (method, kind) != ("POST", "drop") else None

    store.fault = fault
    ran(*edit(here, *SHARDED), "-o", "s3://models/out")
    store.fault = lambda method, path: None
    assert there(store) == contents(here / "out")
    assert not store.uploads


@pytest.mark.slow
def test_an_upload_whose_beginning_is_lost(here: Path, store: S3Server) -> None:
    """It is begun again; the name of the lost one is known to nobody, and so it stays, empty."""
    lost: list[str] = []

    def fault(method: str, path: str) -> str | None:
        if method == "POST" and path.endswith(".safetensors") and not lost:
            lost.append(path)
            return "drop"
        return None

    store.fault = fault
    ran(*edit(here), "-o", here / "out")
    ran(*edit(here), "-o", "s3://models/out")
    assert there(store) == contents(here / "out")
    assert [*store.uploads.values()] == [{}]


def gone_after(store: S3Server, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A server that takes no part of one file, once the first is written down, and no patience with that."""
    monkeypatch.setattr(object_store, "_PATIENCE", 0)
    object_store._store.cache_clear()
    store.until = lambda: name != SECOND or "models/.out.lines/0" in store.objects
    store.fault = lambda method, path: "hold" if method == "PUT" and path.endswith(name) else None


FIRST, SECOND = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))


@pytest.mark.slow
def test_a_run_that_is_resumed(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What failed leaves no parts, no config, no index and no recipe. Another run does not begin there; the same with
    --resume keeps the file that was whole, and sends only the other.
    """
    ran(*edit(here, *SHARDED), "-o", here / "out")
    gone_after(store, monkeypatch, SECOND)
    error = refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    assert f"s3://models/out/{SECOND}" in error
    assert "--resume" in error
    assert "lines clean s3://models/out" in error
    assert "no output yet" in error
    assert not store.uploads
    assert not {*LAST} & there_so_far(store).keys()
    store.fault = lambda method, path: None
    assert "--resume" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert "recipe" in refused(6, *edit(here, *SHARDED, "--alpha", 0.3), "-o", "s3://models/out", "--resume")
    store.asked.clear()
    told = ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--resume", "--json").json
    assert told["resumed"] > 0
    assert there(store) == contents(here / "out")
    assert [name for name in written(store) if name.endswith(".safetensors")] == [SECOND]
    asked = len(store.asked)
    assert ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--resume", "--json").json["done_before"] is True
    assert {method for method, _, _ in store.asked[asked:]} <= {"GET", "HEAD"}


def there_so_far(store: S3Server) -> dict[str, bytes]:
    return {k.removeprefix("models/out/"): v.content for k, v in store.objects.items() if k.startswith("models/out/")}


@pytest.mark.slow
def test_what_was_measured_is_kept(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    command = merge(here, "ties", density=0.3)
    ran(*command, "-o", here / "out")
    gone_after(store, monkeypatch, "model.safetensors")
    refused(6, *command, "-o", "s3://models/out")
    store.fault = lambda method, path: None
    assert f"read {size(3 * 4 * 64 * 128 * 4)}" in ran(*command, "-o", "s3://models/out", "--resume").out  # to write
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_clean(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that an unfinished run has put there goes, and nothing else; a second time there is nothing to remove."""
    gone_after(store, monkeypatch, SECOND)
    refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    store.put("models/out-of-mine/x", b"")
    assert len(store.objects) > 2
    assert "removed s3://models/.out.lines" in ran("clean", "s3://models/out").err
    assert [*store.objects] == ["models/out-of-mine/x"]
    assert "nothing to remove" in ran("clean", "s3://models/out").err


@pytest.mark.slow
def test_clean_keeps_an_old_output(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that was to replace it, and failed before it was removed, has not touched it."""
    ran(*edit(here), "-o", "s3://models/out")
    before = there(store)
    command = merge(here, "ties", density=0.3)
    monkeypatch.setattr(object_store, "_PATIENCE", 0)
    object_store._store.cache_clear()
    store.fault = lambda method, path: "503" if path.endswith("measured") else None
    refused(6, *command, "-o", "s3://models/out", "--force")
    store.fault = lambda method, path: None
    ran("clean", "s3://models/out")
    assert there(store) == before


@pytest.mark.slow
def test_an_old_output_that_is_gone_is_said(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ran(*edit(here), "-o", "s3://models/out")
    gone_after(store, monkeypatch, "model.safetensors")
    error = refused(6, *edit(here), "-o", "s3://models/out", "--force", "--alpha", 0.4)
    assert "the old s3://models/out was removed" in error


def test_bad_data(here: Path, store: S3Server) -> None:
    """What was made of it is of no use: nothing of it stays."""
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(64, 128) for i in range(4)}
    tensors["model.layers.3.mlp.up_proj.weight"][5, 5] = torch.nan
    write_checkpoint(here / "bad", tensors, config={"model_type": "llama", "num_hidden_layers": 4})
    refused(5, "edit", here / "base", here / "bad", "-o", "s3://models/out", *SHARDED, "--workers", 1)
    assert not store.objects
    assert not store.uploads


@pytest.mark.slow
def test_ctrl_c(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload that is under way is taken back; what was whole is kept, and said."""
    monkeypatch.setattr(object_store, "PART", 16_384)
    came, lock = threading.Event(), threading.Lock()

    def interrupted() -> bool:
        """Asked again and again, by each request that is held up, while the second file's first parts are."""
        with lock:
            if f"models/out/{FIRST}" in store.objects and not came.is_set():
                came.set()
                os.kill(os.getpid(), signal.SIGINT)
        return came.is_set()

    store.until = interrupted
    store.fault = lambda method, path: "hold" if method == "PUT" and path.endswith(SECOND) else None
    error = refused(130, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    assert "interrupted" in error
    assert "the destination is as it was" not in error
    assert not store.uploads
    store.fault = lambda method, path: None
    ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--resume")
    ran(*edit(here, *SHARDED), "-o", here / "out")
    assert there(store) == contents(here / "out")


def test_ctrl_c_twice(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second one ends the cleaning up, and what is left is said all the same."""
    gone_after(store, monkeypatch, SECOND)

    def end(_: Uploads) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Uploads, "end", end)
    error = refused(130, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    assert "the destination is as it was" not in error
    assert "lines clean s3://models/out" in error


def test_another_program_writes_there(here: Path, store: S3Server) -> None:
    """What has come meanwhile is not hidden under an index."""

    def fault(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(SECOND):
            store.put("models/out/notes.txt", b"mine")

    store.fault = fault
    assert "notes.txt" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert not {*LAST} & there_so_far(store).keys()


def test_what_was_cleaned_away_is_not_published(here: Path, store: S3Server) -> None:
    def fault(method: str, path: str) -> None:
        if method == "PUT" and path.endswith(SECOND):
            store.objects.pop("models/.out.lines/run", None)

    store.fault = fault
    assert "no longer that of this run" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert not {*LAST} & there_so_far(store).keys()


def test_no_right_and_no_bucket(here: Path, store: S3Server) -> None:
    assert "no such bucket" in refused(6, *edit(here), "-o", "s3://nowhere/out")
    store.fault = lambda method, path: "403" if method != "GET" else None
    error = refused(6, *edit(here), "-o", "s3://models/out")
    assert "refuses access" in error
    assert "AWS_ACCESS_KEY_ID" in error
    store.fault = lambda method, path: "403"
    assert "refuses access" in refused(6, *edit(here), "-o", "s3://models/out")


def test_strangers_in_the_room(here: Path, store: S3Server) -> None:
    store.put("models/.out.lines/notes.txt", b"mine")
    assert "notes.txt" in refused(6, *edit(here), "-o", "s3://models/out")
    assert "notes.txt" in refused(6, "clean", "s3://models/out")
    del store.objects["models/.out.lines/notes.txt"]
    store.put("models/.out.lines/run", b"mine")
    assert "not written by lines" in refused(6, *edit(here), "-o", "s3://models/out")
    assert [*store.objects] == ["models/.out.lines/run"]


@pytest.mark.parametrize("url", ["s3://models", "s3://", "s3:///x", "s3://models/a/../b", "s3://models/."])
def test_where_no_folder_can_be(here: Path, url: str) -> None:
    assert "not the URL of a folder" in refused(2, *edit(here), "-o", url)


@pytest.mark.parametrize(
    "url", ["S3://models/out", "hf://org/name", "gcs://models/out", "s3:models/out", "HF:org/name"]
)
def test_urls_of_other_kinds(here: Path, url: str) -> None:
    """They make no folder of that name here."""
    assert "does not write to" in refused(2, *edit(here), "-o", url)
    (here / "merge.yaml").write_text("merge_method: average\nbase_model: base\nmodels: [{model: ft}]\n")
    assert "does not write to" in refused(2, "plan", "--config", here / "merge.yaml", "-o", url)
    assert sorted(path.name for path in here.iterdir()) == ["base", "ft", "ft2", "merge.yaml"]


# --- two at once ---


@pytest.mark.slow
def test_a_run_whose_work_was_taken_over(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends before its file replaces another's, and removes nothing."""
    monkeypatch.setattr(object_store, "PART", 16_384)
    taken: list[str] = []

    def fault(method: str, path: str) -> None:
        if method == "POST" and path.endswith(SECOND) and not taken:  # its upload begins: no part is sent before that
            taken.append(path)
            run = store.objects["models/.out.lines/run"].content
            store.put("models/.out.lines/run", run.replace(b'"by"', b'"by" '))
            store.put("models/out/tokenizer.json", b"{}")

    store.fault = fault
    error = refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    assert "no longer that of this run" in error
    assert "is kept" not in error
    assert not store.uploads
    assert SECOND not in there_so_far(store)
    assert there_so_far(store)["tokenizer.json"] == b"{}"


@pytest.mark.slow
def test_the_same_run_twice_at_once(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever goes on with --resume has the work, and its output is whole; the first ends, and touches nothing."""
    monkeypatch.setattr(object_store, "PART", 16_384)
    ran(*edit(here, *SHARDED), "-o", here / "out")
    second = []
    command = [sys.executable, "-m", "lines_cli", *map(str, edit(here, *SHARDED)), "-o", "s3://models/out", "--resume"]

    def fault(method: str, path: str) -> str | None:
        if method == "PUT" and path.endswith(SECOND) and not second:
            second.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True))
            return "wait"
        return None

    store.fault, store.until = fault, lambda: second[0].poll() is not None
    error = refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    assert "no longer that of this run" in error
    assert second[0].wait() == 0
    second[0].communicate()
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_another_run_is_not_discarded(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with --force either: it may be at work."""
    gone_after(store, monkeypatch, SECOND)
    refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    store.fault = lambda method, path: None
    before = {name: one.content for name, one in store.objects.items()}
    another = (*edit(here, *SHARDED, "--alpha", 0.3), "-o", "s3://models/out", "--resume", "--force")
    assert "lines clean s3://models/out" in refused(6, *another)
    assert {name: one.content for name, one in store.objects.items()} == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["config.json", "lines_recipe.yaml"])
def test_clean_while_an_output_is_put_into_place(here: Path, store: S3Server, name: str) -> None:
    """The run sees that after its last file, and does not call an output what has lost its weights."""
    came = amid_once(store, f"models/out/{name}", lambda: ran("clean", "s3://models/out"))
    assert "no longer that of this run" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert came
    assert there(store).keys() == {name}  # which was on its way


def amid_once(store: S3Server, path: str, do: Callable[[], object]) -> list[bool]:
    """Have something done while an object is put, one time; whether that was."""
    came: list[bool] = []

    def amid(method: str, asked: str) -> None:
        if (method, asked) == ("PUT", path) and not came:
            came.append(True)
            do()

    store.amid = amid
    return came


@pytest.mark.slow
def test_a_run_that_another_finishes_first(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two go on from the same work; the slower one finds all in place, and does not remove it for an input that has
    changed since.
    """
    ran(*edit(here, *SHARDED), "-o", here / "out")
    gone_after(store, monkeypatch, SECOND)
    command = (*edit(here, *SHARDED), "-o", "s3://models/out")
    refused(6, *command, "--workers", 1)
    store.fault = lambda method, path: None

    def finish() -> None:
        ran(*command, "--resume")
        os.utime(here / "ft" / "model.safetensors", (1, 1))

    came = amid_once(store, "models/.out.lines/run", finish)
    assert "has just finished s3://models/out" in refused(6, *command, "--resume")
    assert came
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_what_comes_while_an_output_is_put_into_place(here: Path, store: S3Server) -> None:
    """It is not replaced, however late it comes."""
    came = amid_once(store, "models/out/README.md", lambda: store.put("models/out/config.json", b"mine" * 2**19))
    assert "config.json" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert came
    assert there_so_far(store)["config.json"] == b"mine" * 2**19
    assert "lines_recipe.yaml" not in there_so_far(store)


def test_a_store_that_drops_metadata(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before anything is made: nothing would tell a run's own objects from others'."""
    monkeypatch.setattr(store, "put", lambda key, content, mark="": S3Server.put(store, key, content))
    assert "drops the metadata" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    assert not store.objects


@pytest.mark.slow
def test_lists_that_are_late(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a list does not show yet is asked for itself, before it is called missing, or nobody's."""
    ran(*edit(here, *SHARDED), "-o", here / "out")
    gone_after(store, monkeypatch, SECOND)
    refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    store.fault, store.unlisted = lambda method, path: None, {f"models/out/{SECOND}", "models/.out.lines/run"}
    assert "--resume" in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out")
    ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--resume")
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_clean_says_what_has_become_of_an_old_output(here: Path, store: S3Server) -> None:
    """A run that was to replace it was killed between two removals, and could not say so itself."""
    ran(*edit(here), "-o", "s3://models/out")
    removals = []

    def fault(method: str, path: str) -> str | None:
        removals.extend([path] if method == "POST" and path == "models" else [])
        return "403" if method == "POST" and len(removals) > 1 else None

    store.fault = fault
    refused(6, *edit(here), "-o", "s3://models/out", "--force", "--alpha", 0.4)
    store.fault = lambda method, path: None
    told = ran("clean", "s3://models/out").err
    assert "the old s3://models/out was removed before the new one was whole, but for" in told
    assert "model.safetensors" in told


# --- what is not ours ---


@pytest.mark.slow
def test_files_that_came_into_unfinished_work(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are nobody's but their owner's: neither --resume nor lines clean touches them."""
    gone_after(store, monkeypatch, SECOND)
    refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--workers", 1)
    store.fault = lambda method, path: None
    mine = {"config.json": b"mine", "tokenizer.json": b"mine", SECOND: b"mine"}
    for name, content in mine.items():
        store.put(f"models/out/{name}", content)
    error = refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--resume")
    assert all(name in error for name in mine)
    ran("clean", "s3://models/out")
    assert there(store) == mine


def test_what_comes_while_a_run_measures(here: Path, store: S3Server) -> None:
    command = merge(here, "ties", density=0.3)

    def fault(method: str, path: str) -> None:
        if path.endswith("measured"):
            store.put("models/out/model.safetensors", b"mine")

    store.fault = fault
    assert "model.safetensors" in refused(6, *command, "-o", "s3://models/out")
    assert there_so_far(store) == {"model.safetensors": b"mine"}


def test_force_replaces_weights_only(here: Path, store: S3Server) -> None:
    store.put("models/x.safetensors", b"precious text")
    error = refused(6, *edit(here), "-o", "s3://models/x.safetensors", "--force")
    assert "not a safetensors file" in error
    assert store.objects["models/x.safetensors"].content == b"precious text"
    assert [*store.objects] == ["models/x.safetensors"]


@pytest.mark.slow
def test_an_old_output_that_is_half_removed(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that ended between two removals is gone on with."""
    ran(*edit(here), "-o", "s3://models/out")
    ran(*edit(here), "-o", here / "out", "--alpha", 0.4)
    removals = []

    def fault(method: str, path: str) -> str | None:
        removals.extend([path] if method == "POST" and path == "models" else [])
        return "403" if method == "POST" and len(removals) > 1 else None

    store.fault = fault
    error = refused(6, *edit(here), "-o", "s3://models/out", "--force", "--alpha", 0.4)
    assert "the old s3://models/out was removed" in error
    store.fault = lambda method, path: None
    ran(*edit(here), "-o", "s3://models/out", "--force", "--alpha", 0.4, "--resume")
    assert there(store) == contents(here / "out")


@pytest.mark.slow
def test_an_old_output_that_may_not_be_removed(here: Path, store: S3Server) -> None:
    ran(*edit(here), "-o", "s3://models/out")
    before = there(store)
    store.fault = lambda method, path: "403" if method == "POST" and path == "models" else None
    error = refused(6, *edit(here), "-o", "s3://models/out", "--force", "--alpha", 0.4)
    assert "was removed" not in error
    assert there_so_far(store) == before


def test_what_needs_a_disk(here: Path, store: S3Server) -> None:
    """It is refused before anything is asked, with what to do."""
    command = merge(here, "ties", density=0.3)
    (here / "sweep.yaml").write_text(
        "recipe: {base: base, ft: ft}\ngrid: {lines.alpha: [0.1]}\nevaluate: x {checkpoint}\nobjective: x\n"
    )
    assert "lines push" in refused(2, "sweep", "--config", "sweep.yaml", "-o", "s3://models/out")
    with pytest.raises(RecipeError, match="which has to be on a disk"):
        lines.sweep("sweep.yaml", "s3://models/out")
    assert "--push-to" in refused(2, *command, "-o", "s3://models/out", "--push-to", "org/name")
    assert "--verify" in refused(2, *command, "-o", "s3://models/out.safetensors", "--verify")
    assert not store.asked


def test_verify_reads_back(here: Path, store: S3Server) -> None:
    """`--verify` reads the weights back before config, index and recipe are there; so does one that is finished."""
    ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--verify")
    assert ran(*edit(here, *SHARDED), "-o", "s3://models/out", "--resume", "--verify", "--json").json["done_before"]
    store.objects[f"models/out/{SECOND}"].content = bytes(len(store.objects[f"models/out/{SECOND}"].content))
    assert SECOND in refused(6, *edit(here, *SHARDED), "-o", "s3://models/out", "--resume", "--verify")


@pytest.mark.slow
def test_a_recipe_that_names_its_output(here: Path, store: S3Server) -> None:
    command = merge(here, "ties", density=0.3)
    with open(here / "merge.yaml", "a") as file:
        file.write("output: s3://models/out\n")
    ran(*command)
    assert "lines_recipe.yaml" in there(store)


@pytest.mark.slow
def test_memory_is_bounded(store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is ahead waits: no more than the window lies here, in whatever order and however slow the store is."""
    piece, whole, window = 1000, 40_000, 8000
    monkeypatch.setattr(uploads, "WINDOW", window)
    monkeypatch.setattr(object_store, "PART", 4000)
    store.fault = lambda method, path: "slow" if method == "PUT" else None
    sending = Uploads()
    files = [sending.add(f"s3://models/out/{number}", whole) for number in range(3)]
    most = 0
    todo = iter([(file, start) for file in files for start in range(0, whole, 4 * piece)])
    lock = threading.Lock()

    def work() -> None:
        nonlocal most
        while True:
            with lock:
                found = next(todo, None)
            if found is None:
                return
            file, start = found
            for offset in range(start, start + 4 * piece, piece):
                file.write(memoryview(bytes([file.number]) * piece), offset)
                with sending._changed:
                    most = max(most, sum(len(each) * piece for each in ([*one.waiting] for one in files)))

    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*sending.wait()] == files
    for number in range(3):
        assert store.objects[f"models/out/{number}"].content == bytes([number]) * whole
    assert 0 < most <= window


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_another_s3(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not ours (moto's): written in parts, replaced, failed; no part of an upload is left."""
    server = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        object_store._store.cache_clear()
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=30).close()  # of another test
        urlopen(Request(f"http://{host}:{port}/models", method="PUT"), timeout=30).close()
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1")
        for seed, side in enumerate(("base", "ft")):
            chance = torch.Generator().manual_seed(seed)
            tensors = {f"model.layers.{i}.w": torch.randn(2000, 1000, generator=chance) for i in range(4)}
            if side == "ft":
                tensors["model.layers.3.w"][1999, 999] = torch.nan
            write_checkpoint(here / side, tensors, config={"model_type": "llama", "num_hidden_layers": 4})
        monkeypatch.setattr(object_store, "PART", 5 * 2**20)

        def keys() -> set[str]:
            return {one["Key"] for one in client.list_objects_v2(Bucket="models").get("Contents", ())}

        refused(5, *edit(here), "-o", "s3://models/out", "--workers", 1)
        assert not client.list_multipart_uploads(Bucket="models").get("Uploads")
        assert not keys()
        ran(*edit(here, "--allow-nonfinite"), "-o", here / "out")
        ran(*edit(here, "--allow-nonfinite"), "-o", "s3://models/out", "--verify")
        assert keys() == {f"out/{name}" for name in contents(here / "out")}
        for name, content in contents(here / "out").items():
            assert client.get_object(Bucket="models", Key=f"out/{name}")["Body"].read() == content
        ran(*edit(here, "--allow-nonfinite"), "-o", "s3://models/out", "--force", "--alpha", 0.4)
        assert ran("inspect", "s3://models/out", "--json").json["parameters"] == 8_000_000
        assert "exists" in refused(6, *edit(here, "--allow-nonfinite"), "-o", "s3://models/out")
        assert not client.list_multipart_uploads(Bucket="models").get("Uploads")
    finally:
        running.stop()
        object_store._store.cache_clear()
