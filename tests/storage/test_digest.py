"""An output folder's recipe says what was written into each file, and whoever checks later is told what changed."""

from __future__ import annotations

import errno
import fcntl
import itertools
import mmap
import os
import random
import shutil
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.errors import CheckpointError, RecipeError
from lines_cli.storage.digest import FileRecord, GrowingDigest, RangeWriter, altered, file_digest, record_of
from lines_cli.storage.files import NewFile, in_whole_pages
from support.files import snapshot, write_checkpoint
from support.run import run_lines

MIB = 2**20


def tree_digest(content: bytes) -> str:
    """The definition: SHA-256 of the SHA-256 digests of blocks of 4 MiB."""
    blocks = [sha256(content[start : start + 4 * MIB]).digest() for start in range(0, len(content), 4 * MIB)]
    return "sha256-tree-4MiB:" + sha256(b"".join(blocks)).hexdigest()


def recorded(out: Path) -> dict[str, dict[str, Any]]:
    """`files` as another reader of YAML finds it."""
    files: dict[str, dict[str, Any]] = yaml.safe_load((out / "lines_recipe.yaml").read_text())["files"]
    return files


def found(out: Path) -> dict[str, dict[str, Any]]:
    """The same from what lies in the folder."""
    return {
        name: {"bytes": len(content), "digest": tree_digest(content)}
        for name, content in snapshot(out).items()
        if isinstance(content, bytes) and name not in ("lines_recipe.yaml", "README.md")
    }


# --- the digest ---

SIZES = [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 8 * MIB, 17 * MIB + 5]


@pytest.mark.parametrize("size", SIZES)
def test_a_digest_is_what_its_definition_says(size: int, tmp_path: Path) -> None:
    """In memory and on disk, for files of no block, of whole blocks and of a short last one."""
    content = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(content)
    assert file_digest(tmp_path / "file") == tree_digest(content)
    assert record_of(content) == FileRecord(size, tree_digest(content))


def test_digests_stay_as_they_are() -> None:
    """Recipes that exist hold digests of this form: of nothing, and of three bytes."""
    assert record_of(b"").digest == "sha256-tree-4MiB:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert record_of(b"abc").digest == (
        "sha256-tree-4MiB:4f8b42c22dd3729b519ba6f68d2da7cc5b2d606d05daed5ad5128cc03e6c6358"
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("blocks", [1, 3])
def test_the_order_of_writing_makes_no_difference(size: int, blocks: int, tmp_path: Path) -> None:
    """Several threads write ranges of whole blocks, in any order and pieces of any size, and the digest is that of the
    file.
    """
    chance = random.Random(size)
    content = chance.randbytes(size)
    step = blocks * 4 * MIB
    starts = list(range(0, size, step))
    chance.shuffle(starts)
    file = NewFile(tmp_path / "file", size)
    digest = GrowingDigest(size)

    def write(start: int) -> None:
        end, at = min(size, start + step), start
        writer = RangeWriter(file, start, digest, in_whole_pages(MIB))
        while at < end:
            until = min(end, at + random.Random(at).choice([1, 7, 5000, MIB // 4 - 1, MIB // 4, MIB, 9 * MIB]))
            writer.write(memoryview(content)[at:until])
            at = until
            assert writer.at == at
        writer.close()

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(write, starts))
    file.close()
    assert (tmp_path / "file").read_bytes() == content
    assert digest.record() == FileRecord(size, tree_digest(content))


@pytest.mark.durable
@pytest.mark.parametrize("behaviour", ["refuses", "takes a page at a time", "takes odd numbers", "is slow"])
def test_a_system_that_does_not_write_past_the_page_cache(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where writes past the page cache are refused, cut short or slow, the rest goes through it: the same bytes."""
    content = random.Random(0).randbytes(9 * MIB + 5000)
    file, calls = NewFile(tmp_path / "file", len(content)), []
    write, slow = os.pwrite, behaviour == "is slow"

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        straight = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & getattr(os, "O_DIRECT", 0))
        calls.append(straight)
        if straight and behaviour == "refuses":
            raise OSError(errno.EINVAL, "Invalid argument")
        if straight and not slow:
            view = view[: {"takes a page at a time": mmap.PAGESIZE, "takes odd numbers": 1000}[behaviour]]
            # only whole pages may really be written that way
            return write(fd if len(view) % mmap.PAGESIZE == 0 else file._fds[0], view, offset)
        return write(fd, view, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(time, "perf_counter", itertools.count(step=1 if slow else 0).__next__)
    writer = RangeWriter(file, 0, digest := GrowingDigest(len(content)), in_whole_pages(MIB // 16))
    writer.write(content)
    writer.close()
    file.sync()
    file.close()
    assert (tmp_path / "file").read_bytes() == content
    assert digest.record().digest == tree_digest(content)
    if any(calls) and behaviour == "refuses":
        assert sum(calls) == 1, "it is tried once, and then given up"
    if any(calls) and slow:
        assert 1 < sum(calls) < 40, "some slow writes are a pause, dozens of them a slow disk"


def test_a_block_that_was_not_written_has_no_digest(tmp_path: Path) -> None:
    """A file of which a part is missing has no digest."""
    file = NewFile(tmp_path / "file", 5 * MIB)
    digest = GrowingDigest(5 * MIB)
    writer = RangeWriter(file, 0, digest, in_whole_pages(MIB))
    writer.write(bytes(4 * MIB))
    writer.close()
    file.close()
    with pytest.raises(AssertionError):
        digest.record()


def test_a_large_file_is_digested_in_little_memory(tmp_path: Path) -> None:
    """64 MiB take no more than a few."""
    with open(tmp_path / "file", "wb") as file:
        file.truncate(64 * MIB)
    tracemalloc.start()
    try:
        file_digest(tmp_path / "file")
        assert tracemalloc.get_traced_memory()[1] < 8 * MIB
    finally:
        tracemalloc.stop()


# --- what an output records ---


CONFIG = {"model_type": "tiny", "torch_dtype": "bfloat16"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a and b in two shards each, with tensors larger than a block, a config and a tokenizer."""
    models, generator = tmp_path_factory.mktemp("models"), torch.Generator().manual_seed(1)
    for name in ("base", "a", "b"):
        tensors = {f"layers.{i}.w": torch.randn(1_200_003 + i, generator=generator) for i in range(3)}
        folder = write_checkpoint(models / name, {**tensors, "odd": torch.ones(3).half()}, shards=2, config=CONFIG)
        (folder / "tokenizer.json").write_text(f'{{"of": "{name}"}}')
        (folder / "LICENSE").write_bytes(b"")
    return models


@pytest.fixture
def inputs(models: Path, tmp_path: Path) -> Path:
    """The same files in a fresh folder, only to be read."""
    shutil.copytree(models, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    return tmp_path


def edit(folder: Path, out: str, *options: object) -> Path:
    ran = run_lines("edit", folder / "base", folder / "a", "-o", folder / out, *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return folder / out


def merge(folder: Path, out: str, *options: object) -> Path:
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}]}
    recipe |= {"parameters": {"density": 0.5}, "lines": {"alpha": "auto", "beta": 0.5}}
    (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))
    return run_recipe(folder / "merge.yaml", folder / out, *options)


def run_recipe(recipe: Path, out: Path, *options: object) -> Path:
    ran = run_lines("merge", "--config", recipe, "-o", out, *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return out


SHARDED = {edit: ("--max-shard-size", "10MB"), merge: ("--set", "max_shard_size=10MB")}


@pytest.mark.durable
@pytest.mark.parametrize("make", SHARDED, ids=["edit", "merge"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.slow
def test_the_recipe_records_every_file(make: Callable[..., Path], sharded: bool, inputs: Path) -> None:
    """Weights, index and what is carried over are recorded as they lie in the folder; so is a config that changed."""
    dtype = ("--dtype", "float32") if make is edit else ("--set", "dtype=float32")
    out = make(inputs, "out", *dtype, *(SHARDED[make] if sharded else ()))
    weights = {f"model-{n:05d}-of-00002.safetensors" for n in (1, 2)} | {"model.safetensors.index.json"}
    beside = {"config.json", "tokenizer.json", "LICENSE"}
    assert recorded(out) == found(out)
    assert recorded(out).keys() == (weights if sharded else {"model.safetensors"}) | beside
    assert (out / "config.json").read_bytes() != (inputs / "a" / "config.json").read_bytes()
    assert altered(out, lines.load_recipe(out / "lines_recipe.yaml").files) == {}


@pytest.mark.slow
def test_the_record_does_not_depend_on_the_workers(inputs: Path) -> None:
    """One worker or seven, large chunks or small: the recipe is the same text."""
    one = edit(inputs, "one", "--workers", "1")
    many = edit(inputs, "two", "--workers", "7")  # a name as long, which the model card has for a title
    texts = [(out / "lines_recipe.yaml").read_text() for out in (one, many)]
    cards = [record_of((out / "README.md").read_bytes()).digest for out in (one, many)]
    assert texts[0].replace(cards[0], cards[1]) == texts[1]
    recipe = lines.edit_recipe(str(inputs / "base"), str(inputs / "a"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), inputs / "small")
    lines.run(plan, lines.Resources(workers=3, chunk=10_007))
    assert recorded(inputs / "small") == recorded(one)


@pytest.mark.slow
@pytest.mark.durable
def test_the_record_without_positional_reads(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where preadv and pwrite are missing, threads do not get in each other's way."""
    monkeypatch.setattr("lines_cli.storage.files._HAS_POSITIONAL", False)
    out = edit(inputs, "out", "--workers", "3")
    monkeypatch.undo()
    assert recorded(out) == found(out)
    assert found(edit(inputs, "plain")) == found(out)


@pytest.mark.parametrize("make", SHARDED, ids=["edit", "merge"])
@pytest.mark.slow
def test_a_recorded_recipe_runs_again(make: Callable[..., Path], inputs: Path) -> None:
    """It makes the same files again, and its record says nothing of the next output: that has its own."""
    out = make(inputs, "out")
    again = run_recipe(out / "lines_recipe.yaml", inputs / "again")
    assert found(again) == found(out)
    assert recorded(again) == recorded(out)
    other = run_recipe(out / "lines_recipe.yaml", inputs / "other", "--set", "max_shard_size=10MB")
    assert recorded(other) == found(other) != found(out)


@pytest.mark.slow
def test_a_wrong_record_has_no_influence(inputs: Path) -> None:
    """Whatever a recipe says was written, the result is that of the other keys; --json shows those alone."""
    out = edit(inputs, "out")
    text = (out / "lines_recipe.yaml").read_text().replace("bytes: ", "bytes: 1").replace("MiB:", "MiB:0")
    (inputs / "wrong.yaml").write_text(text + "  ../x:\n    bytes: 0\n    digest: none\n")
    ran = run_lines("merge", "--config", inputs / "wrong.yaml", "-o", inputs / "again", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert "files" not in ran.json["recipe"]
    assert recorded(inputs / "again") == found(inputs / "again") == found(out)


@pytest.mark.parametrize(
    "files",
    [
        None,
        "model.safetensors",
        ["model.safetensors"],
        {"x": None},
        {"x": 128},
        {"x": {"bytes": 128}},
        {"x": {"digest": "d"}},
        {"x": {"bytes": -1, "digest": "d"}},
        {"x": {"bytes": True, "digest": "d"}},
        {"x": {"bytes": 1.5, "digest": "d"}},
        {"x": {"bytes": "128", "digest": "d"}},
        {"x": {"bytes": 128, "digest": 5}},
        {"x": {"bytes": 128, "digest": "d", "more": 1}},
    ],
    ids=str,
)
def test_a_record_of_another_shape_is_refused(files: Any, tmp_path: Path) -> None:
    """What lines would not have written is an error with its line and its key, like any other wrong key."""
    (tmp_path / "merge.yaml").write_text("models: [{model: a}]\nbase_model: b\n" + yaml.safe_dump({"files": files}))
    with pytest.raises(RecipeError, match=r"line [34]: files(\.x)?: expected") as refused:
        lines.load_recipe(tmp_path / "merge.yaml")
    assert str(tmp_path / "merge.yaml") in refused.value.message


# --- what is noticed later ---


def flip(path: Path) -> None:
    with open(path, "r+b") as file:
        file.seek(5 * MIB)
        byte = file.read(1)
        file.seek(5 * MIB)
        file.write(bytes([byte[0] ^ 1]))


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "a flipped bit": ("model.safetensors", flip, "holds sha256-tree-4MiB:"),
    "one byte less": ("model.safetensors", lambda path: os.truncate(path, 14_400_000), "holds 14,400,000 bytes, "),
    "emptied": ("tokenizer.json", lambda path: os.truncate(path, 0), "holds 0 bytes, but 11 were written"),
    "no longer empty": ("LICENSE", lambda path: path.write_text("free"), "holds 4 bytes, but 0 were written"),
    "deleted": ("model.safetensors", Path.unlink, "is missing"),
    "an edited config": (
        "config.json",
        lambda path: path.write_text(path.read_text().replace("tiny", "tidy")),
        "holds sha256-tree-4MiB:",
    ),
    "a folder now": ("config.json", as_folder, "is not a file"),
}


@pytest.mark.parametrize(("name", "change", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.some(6)
def test_a_change_is_noticed(name: str, change: Callable[[Path], object], words: str, inputs: Path) -> None:
    """Whatever became of a file, it is named, both sides are, and no other file is."""
    out = edit(inputs, "out")
    change(out / name)
    differences = altered(out, lines.load_recipe(out / "lines_recipe.yaml").files)
    assert differences.keys() == {name}
    assert differences[name].startswith(words)
    if "sha256" in words:
        assert recorded(out)[name]["digest"] in differences[name]


@pytest.mark.slow
def test_people_may_edit_the_model_card(inputs: Path) -> None:
    """The card is recorded by itself, and the recipe not at all, nor what was not there when the output was written."""
    out = edit(inputs, "out")
    recipe = lines.load_recipe(out / "lines_recipe.yaml")
    assert recipe.card == record_of((out / "README.md").read_bytes())
    for name in ("README.md", "lines_recipe.yaml", "notes.txt"):
        (out / name).write_text("mine")
    assert altered(out, recipe.files) == {}


def test_several_changes_are_told_at_once(tmp_path: Path) -> None:
    """Every file that differs is named, in the order of the record; a folder that is gone lacks all of them."""
    files = {name: record_of(b"it") for name in ("c", "a", "in/b")}
    (tmp_path / "c").write_bytes(b"is")
    (tmp_path / "in").write_bytes(b"no folder")
    differences = altered(tmp_path, files)
    assert list(differences) == ["c", "a", "in/b"]
    assert differences["a"] == differences["in/b"] == "is missing"
    assert set(altered(tmp_path / "gone", files).values()) == {"is missing"}


def test_a_digest_of_another_kind_is_no_match(tmp_path: Path) -> None:
    """What cannot be compared is not taken for unchanged."""
    (tmp_path / "a").write_bytes(b"it")
    differences = altered(tmp_path, {"a": FileRecord(2, "md5:0d149b90e7394297301c90191ae775f0")})
    assert "md5:0d149b90e7394297301c90191ae775f0" in differences["a"]


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "x/../../a", "x\\a", "a\0"])
def test_no_record_leads_out_of_the_folder(name: str, tmp_path: Path) -> None:
    """A stranger's record cannot have other files read."""
    with pytest.raises(CheckpointError, match="outside the folder") as refused:
        altered(tmp_path, {"fine": record_of(b""), name: record_of(b"")})
    assert repr(name) in refused.value.message


def test_what_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    """A file that is there but cannot be read is neither unchanged nor changed; the error names it."""
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match="cannot be read") as refused:
        altered(tmp_path, {"loop": record_of(b"")})
    assert str(tmp_path / "loop") in refused.value.message
