"""An output into an object store: in which order, what is there already, and what goes wrong."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lines_cli.storage import object_store
from support.files import write_checkpoint
from support.run import ran, run_lines
from support.s3_server import S3Server, at_hand

pytest.importorskip("obstore")


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with at_hand(monkeypatch) as server:
        yield server


@pytest.fixture
def out(store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An output of three shards."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(10_000, generator=chance) for i in range(3)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "tiny"})
    ran("edit", "base", "ft", "-o", "out", "--max-shard-size", "50KB")
    return tmp_path / "out"


def refused(*arguments: object, code: int = 8) -> str:
    done = run_lines(*arguments)
    assert (done.code, done.trace) == (code, ""), done.err
    return done.err


def there(store: S3Server) -> dict[str, bytes]:
    return {key.removeprefix("models/x/"): one.content for key, one in store.objects.items()}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_recipe_comes_last(out: Path, store: S3Server) -> None:
    """Weights, what stands beside them, the index, the recipe; and what is there can be read as it is."""
    told = ran("push", "out", "s3://models/x", "--json").json["pushed"]
    assert (told["url"], told["files"]) == ("s3://models/x", sorted(contents(out)))
    assert there(store) == contents(out)
    order = [path.rpartition("/")[2] for method, path, _ in store.asked if method == "PUT"]
    assert all(name.endswith(".safetensors") for name in order[:3])
    assert order[-2:] == ["model.safetensors.index.json", "lines_recipe.yaml"]
    assert ran("inspect", "s3://models/x", "--json").json["parameters"] == 30_000


def test_once_more_does_nothing(out: Path, store: S3Server) -> None:
    ran("push", "out", "s3://models/x")
    asked = len([1 for method, _, _ in store.asked if method == "PUT"])
    ran("push", "out", "s3://models/x")
    assert len([1 for method, _, _ in store.asked if method == "PUT"]) == asked


def test_a_dry_run(out: Path, store: S3Server) -> None:
    assert "to push" in ran("push", "out", "s3://models/x/", "--dry-run").out
    assert not store.objects


def test_large_files_go_in_parts(out: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each part is a request of its own, and no upload is left open."""
    monkeypatch.setattr(object_store, "PART", 16_000)
    ran("push", "out", "s3://models/x")
    assert there(store) == contents(out)
    assert len([1 for method, _, _ in store.asked if method == "PUT"]) > len(contents(out))
    assert not store.uploads


def test_an_upload_that_fails(out: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left of the file that failed, no index and no recipe are there; the same command does it then."""
    monkeypatch.setattr(object_store, "PART", 16_000)
    monkeypatch.setattr(object_store, "_PATIENCE", 0)
    object_store._store.cache_clear()
    parts = 0

    def fault(method: str, path: str) -> str | None:
        nonlocal parts
        parts += method == "PUT"
        return "503" if method == "PUT" and parts > 4 else None

    store.fault = fault
    error = refused("push", "out", "s3://models/x")
    assert "no output yet" in error
    assert "lines push out s3://models/x" in error
    assert not store.uploads
    assert not {"model.safetensors.index.json", "lines_recipe.yaml"} & there(store).keys()
    store.fault = lambda method, path: None
    ran("push", "out", "s3://models/x")
    assert there(store) == contents(out)


@pytest.mark.slow
def test_what_is_there_is_not_replaced(out: Path, store: S3Server) -> None:
    """Neither a stranger's object nor another output."""
    store.put("models/x/notes.txt", b"mine")
    assert "notes.txt" in refused("push", "out", "s3://models/x")
    del store.objects["models/x/notes.txt"]
    ran("push", "out", "s3://models/x")
    before = there(store)
    shutil.rmtree("out")
    ran("edit", "base", "ft", "-o", "out", "--max-shard-size", "50KB", "--alpha", "0.5")
    assert "another output" in refused("push", "out", "s3://models/x")
    assert there(store) == before


@pytest.mark.parametrize("url", ["s3://models", "s3://", "s3:///x"])
def test_where_no_folder_can_be(out: Path, url: str) -> None:
    assert "not the URL" in refused("push", "out", url, code=2)


def test_what_is_said_of_the_hub(out: Path) -> None:
    assert "--private" in refused("push", "out", "s3://models/x", "--private", code=2)
    assert "--revision" in refused("push", "out", "s3://models/x", "--revision", "v2", code=2)


def test_no_right_and_no_bucket(out: Path, store: S3Server) -> None:
    assert "no such bucket" in refused("push", "out", "s3://nowhere/x")
    store.fault = lambda method, path: "403"
    assert "refuses access" in refused("push", "out", "s3://models/x")


def test_what_is_no_longer_what_was_written(out: Path, store: S3Server) -> None:
    (out / "config.json").write_text("{}")
    assert "config.json" in refused("push", "out", "s3://models/x", code=5)
    assert not store.objects
