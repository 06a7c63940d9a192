"""Inputs in an object store: headers and ranges over HTTP, against as much of S3 as that needs, on loopback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lines_cli.errors import RecipeError
from lines_cli.recipe.yaml_file import load_recipe_file
from lines_cli.storage import object_store
from support.files import write_checkpoint
from support.run import ran, refused, run_lines
from support.s3_server import S3Server, at_hand

pytest.importorskip("obstore")
CONFIG = {"model_type": "llama", "num_hidden_layers": 4}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    with at_hand(monkeypatch) as server:
        yield server


@pytest.fixture
def here(store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base and two fine-tunes, in folders and in the store."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"model.layers.{i}.w": torch.randn(60, 1000, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, shards=1 + seed, config=CONFIG)
        (tmp_path / side / "tokenizer.json").write_text("{}")
        for path in (tmp_path / side).iterdir():
            store.put(f"models/{side}/{path.name}", path.read_bytes())
    return tmp_path


def weights(folder: Path) -> dict[str, bytes]:
    names = {"README.md", "lines_recipe.yaml"}
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in names}


MERGE = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": "ft"}, {"model": "ft2"}],
    "parameters": {"density": 0.3},
    "lines": {"alpha": "auto", "beta": 0.5},
}


def write_recipes() -> None:
    """The same merge, of folders and of what is in the store."""
    Path("local.yaml").write_text(yaml.safe_dump(MERGE))
    remote = json.loads(json.dumps(MERGE).replace('"base"', '"s3://models/base"').replace('"ft', '"s3://models/ft'))
    Path("remote.yaml").write_text(yaml.safe_dump(remote))


def test_inspect_reads_headers_only(here: Path, store: S3Server) -> None:
    """What is told is what is told of the folder; of the weights a few thousand bytes are read."""
    remote = ran("inspect", "s3://models/ft2", "--json").json
    local = ran("inspect", "ft2", "--json").json
    assert remote["stacks"] == local["stacks"]
    assert (remote["parameters"], remote["files"]) == (local["parameters"], local["files"])
    asked = {path.rpartition("/")[2] for method, path, span in store.asked if method == "GET" and not span}
    assert not [name for name in asked if name.endswith(".safetensors")]
    assert store.bytes_asked <= 3 * 2**16


@pytest.mark.slow
def test_an_edit_of_what_is_in_a_store(here: Path, store: S3Server) -> None:
    """The bytes are those of the same folders; config and tokenizer come along; nothing is left on this disk."""
    ran("edit", "base", "ft", "-o", "local")
    ran("edit", "s3://models/base", "s3://models/ft", "-o", "remote")
    assert weights(here / "remote") == weights(here / "local")
    assert (here / "remote" / "tokenizer.json").exists()
    recipe = yaml.safe_load((here / "remote" / "lines_recipe.yaml").read_text())
    assert recipe["base_model"] == "s3://models/base"
    assert "s3://models/ft/model-00001-of-00002.safetensors" in recipe["inputs"]
    assert "s3:" not in (here / "remote" / "README.md").read_text().partition("\n---")[0]
    assert ran("verify", "remote", "--json").json["same"] is True


@pytest.mark.slow
def test_a_lone_file_in_a_store(here: Path) -> None:
    """A file is named as one on a disk is; its neighbours are not looked at."""
    ran("edit", "base", "ft", "-o", "local.safetensors")
    ran("edit", "s3://models/base/model.safetensors", "s3://models/ft/", "-o", "remote.safetensors")
    assert (here / "remote.safetensors").read_bytes() == (here / "local.safetensors").read_bytes()


@pytest.mark.slow
def test_a_merge_in_parts_of_what_is_in_a_store(here: Path) -> None:
    """Parts read only what they need, and the bytes are those of one run over folders."""
    write_recipes()
    ran("merge", "--config", "local.yaml", "-o", "local")
    ran("plan", "--config", "remote.yaml", "-o", "remote", "--parts", 2)
    ran("run", "plan.json")
    ran("finish", "plan.json")
    assert weights(here / "remote") == weights(here / "local")


@pytest.mark.parametrize("kind", ["503", "slow", "drop"])
@pytest.mark.slow
def test_what_passes_is_asked_again(here: Path, store: S3Server, kind: str) -> None:
    """A server that has too much to do, is slow, or drops connections costs time and no byte."""
    ran("edit", "base", "ft", "-o", "local")
    count = 0

    def fault(method: str, path: str) -> str | None:
        nonlocal count
        count += method == "GET" and path.endswith(".safetensors")
        return kind if method == "GET" and path.endswith(".safetensors") and count % 5 == 1 else None

    store.fault = fault
    ran("edit", "s3://models/base", "s3://models/ft", "-o", "remote")
    assert count > 5
    assert weights(here / "remote") == weights(here / "local")


def test_a_server_that_is_gone(here: Path, store: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not pass, the URL and the reason are named, and nothing is written."""
    monkeypatch.setattr(object_store, "_PATIENCE", 0)
    object_store._store.cache_clear()
    store.fault = lambda method, path: "503" if path.endswith(".safetensors") else None
    assert "s3://models/base/model.safetensors" in refused(3, "edit", "s3://models/base", "s3://models/ft", "-o", "out")
    assert not list(here.glob("*out*"))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("s3://nowhere/base", "no such bucket"),
        ("s3://models/nothing", "nothing lies there"),
        ("s3://models/base/other.safetensors", "no such object"),
        ("s3://", "not the URL"),
        ("s3:///x", "not the URL"),
    ],
)
def test_what_is_not_there(here: Path, name: str, said: str) -> None:
    error = refused(3, "inspect", name)
    assert said in error
    assert "xml" not in error


def test_no_right_to_read(here: Path, store: S3Server) -> None:
    """A refusal says where credentials are looked for, and shows none."""
    store.fault = lambda method, path: "403"
    error = refused(3, "inspect", "s3://models/base")
    assert "refuses access" in error
    assert "AWS_ACCESS_KEY_ID" in error


@pytest.mark.slow
def test_an_object_that_is_replaced_meanwhile(here: Path, store: S3Server) -> None:
    """A range is asked for with the tag of the object that was opened: another one in its place is noticed."""
    key, count = "models/ft/model-00001-of-00002.safetensors", 0

    def fault(method: str, path: str) -> None:
        nonlocal count
        count += path == key and method == "GET"
        if count == 3:
            old = bytearray(store.objects[key].content)
            old[-1] ^= 1
            store.objects[key].content = bytes(old)

    store.fault = fault
    assert "was replaced while" in refused(3, "edit", "s3://models/base", "s3://models/ft", "-o", "out")
    assert not (here / "out").exists()
    assert not (here / ".out.lines").exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "pytorch_model.bin", "model_index.json"])
def test_what_is_read_from_a_disk_only(here: Path, store: S3Server, file: str) -> None:
    """It is refused by name, with what to do."""
    store.put(f"models/other/{file}", b"x" * 100)
    assert file in refused(3, "inspect", "s3://models/other")


def test_digests_of_what_is_in_a_store(here: Path) -> None:
    """`--verify-inputs` would read all of it twice: it is refused."""
    error = refused(3, "edit", "s3://models/base", "ft", "-o", "out", "--verify-inputs")
    assert "--verify-inputs" in error


def test_without_obstore(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not installed it reads what to install."""
    import sys

    for name in ("obstore", "obstore.store"):
        monkeypatch.setitem(sys.modules, name, None)
    assert "obstore is not installed" in refused(3, "inspect", "s3://models/base")
    shutil.rmtree("ft")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_against_another_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is not ours (moto's): pushed, inspected, edited, read back; a folder and a file."""
    server = pytest.importorskip("moto.server")
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    try:
        host, port = running.get_host_and_port()
        settings = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_REGION": "us-east-1"}
        for name, value in {**settings, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}.items():
            monkeypatch.setenv(name, value)
        object_store._store.cache_clear()
        urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=30).close()  # of another test
        urlopen(Request(f"http://{host}:{port}/models", method="PUT"), timeout=30).close()
        monkeypatch.chdir(tmp_path)
        for seed, side in enumerate(("base", "ft")):
            chance = torch.Generator().manual_seed(seed)
            tensors = {f"model.layers.{i}.w": torch.randn(60, 1000, generator=chance) for i in range(4)}
            write_checkpoint(tmp_path / side, tensors, config=CONFIG)
        ran("edit", "base", "ft", "-o", "out", "--max-shard-size", "300KB")
        monkeypatch.setattr(object_store, "PART", 5 * 2**20)
        ran("push", "out", "s3://models/out")
        assert ran("inspect", "s3://models/out", "--json").json["parameters"] == 240_000
        ran("edit", "out", "ft", "-o", "local", "--alpha", "0.4")
        ran("edit", "s3://models/out", "ft", "-o", "remote", "--alpha", "0.4")
        assert weights(tmp_path / "remote") == weights(tmp_path / "local")
        assert "nothing lies there" in refused(3, "inspect", "s3://models/nothing")
        assert "no such bucket" in refused(3, "inspect", "s3://nowhere/base")
    finally:
        running.stop()
        object_store._store.cache_clear()


@pytest.mark.parametrize("command", ["edit", "inspect"])
def test_files_beside_are_called_by_their_url(command: str, here: Path, store: S3Server) -> None:
    """Not by the folder to which they are fetched: that is gone when a person reads the message."""
    store.put("models/ft/config.json", b"{")
    options = {"edit": ["s3://models/base", "s3://models/ft", "-o", here / "out"], "inspect": ["s3://models/ft"]}
    error = refused(3, command, *options[command])
    assert "s3://models/ft/config.json: not valid JSON" in error
    assert "/lines-" not in error


@pytest.mark.parametrize("recipe", [b"[", b"lines: {alpha: 7}", b"models: 3\n"])
def test_a_recipe_in_a_store_that_is_none(recipe: bytes, here: Path, store: S3Server) -> None:
    """`verify` names what it could not read by its URL, too."""
    store.put("models/ft/lines_recipe.yaml", recipe)
    error = refused(2, "verify", "s3://models/ft")
    assert "s3://models/ft/lines_recipe.yaml: " in error
    assert "/lines-" not in error


def test_verify_in_a_store_shows_nothing_of_this_machine(here: Path, store: S3Server) -> None:
    """Neither in its notes nor in JSON; and what it says to do can be done."""
    ran("edit", here / "base", here / "ft", "-o", "s3://models/out")
    done = ran("verify", "s3://models/out", "--json")
    assert done.json["recipe"] == "s3://models/out/lines_recipe.yaml"
    assert "/lines-" not in done.out + done.err
    content = bytearray(store.objects["models/out/model.safetensors"].content)
    content[-1] ^= 1
    store.put("models/out/model.safetensors", bytes(content))
    error = refused(5, "verify", "s3://models/out")
    assert "/lines-" not in error
    assert "copy lines_recipe.yaml to a disk" in error


def copied(store: S3Server, folder: Path, key: str) -> None:
    """A folder's files in the store, as a person copies them there."""
    for path in folder.iterdir():
        store.put(f"{key}/{path.name}", path.read_bytes())


@pytest.mark.parametrize("option", [[], ["--verify-inputs"]])
def test_inputs_of_a_recipe_in_a_store_count_from_its_folder(option: list[str], here: Path, store: S3Server) -> None:
    """An output that was copied to a store with its inputs is verified there; a message names what is gone."""
    ran("edit", "base", "ft", "-o", "out", *option)
    copied(store, here / "out", "models/out")
    done = ran("verify", "s3://models/out", "--json")
    assert {read["path"].rpartition("/")[0] for read in done.json["inputs"]} == {"s3://models/base", "s3://models/ft"}
    assert "../base (s3://models/base)" in done.err
    inspected = ran("inspect", "s3://models/out")
    assert "s3://models/ft on s3://models/base" in inspected.out
    content = bytearray(store.objects["models/base/model.safetensors"].content)
    content[len(content) // 8] ^= 1  # of the first layer
    store.put("models/base/model.safetensors", bytes(content))
    changed = run_lines("verify", "s3://models/out")
    assert changed.code == 5
    assert ("input   s3://models/base/model.safetensors: it holds " in changed.out) == bool(option)
    for key in [key for key in store.objects if key.startswith("models/base/")]:
        del store.objects[key]
    error = refused(3, "verify", "s3://models/out")
    assert "s3://models/base: nothing lies there" in error
    assert error.endswith("--input ../base=PATH\n")
    assert "/lines-" not in error
    ran("verify", "s3://models/out", "--input", "../base=base")


@pytest.mark.parametrize("name", ["chat+math", "ft[1]", "a b", "*"])
def test_a_name_in_a_store_is_taken_as_it_is(name: str, here: Path, store: S3Server) -> None:
    """It is no pattern and no base with an adapter, be it found beside the recipe or given elsewhere."""
    (here / "ft").rename(here / name)
    ran("edit", "base", name, "-o", "out")
    copied(store, here / "out", "models/out")
    copied(store, here / name, f"models/{name}")
    ran("verify", "s3://models/out")
    for key in [key for key in store.objects if key.startswith(f"models/{name}/")]:
        del store.objects[key]
    ran("verify", "s3://models/out", "--input", f"../{name}={name}")
    (here / name).rename(here / "moved")
    ran("verify", "out", "--input", f"../{name}=moved")


def test_a_recipe_in_a_store_looks_for_nothing_on_this_machine(here: Path, store: S3Server) -> None:
    """What a stranger's pattern would match here is not asked for there."""
    ran("edit", "base", "ft", "-o", "out")
    copied(store, here / "out", "models/a/b/c/d/e/f/g/out")
    key = "models/a/b/c/d/e/f/g/out/lines_recipe.yaml"
    recipe = store.objects[key].content.replace(b"../ft", b"../../../../../../../tmp/*")
    store.put(key, recipe)
    asked = len(store.asked)
    refused(3, "verify", "s3://models/a/b/c/d/e/f/g/out", "--input", "../base=base")
    assert not any(here.name in path for _, path, _ in store.asked[asked:])


@pytest.mark.parametrize(
    ("name", "url"),
    [
        ("../base", "s3://models/base"),
        ("./base/", "s3://models/2026/base"),
        ("base", "s3://models/2026/base"),
        ("..", "s3://models"),
        ("../x.safetensors#ema", "s3://models/x.safetensors#ema"),
        ("../a+b", "s3://models/a+b"),
        ("org/name", "org/name"),
        ("org/name@main", "org/name@main"),
        ("/base", "/base"),
        ("gs://other/base", "gs://other/base"),
    ],
)
def test_a_name_beside_a_recipe_in_a_store(name: str, url: str, tmp_path: Path) -> None:
    """It is a URL; what is no relative path is left as it is."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"base_model": name, "models": [{"model": "/ft"}]}))
    assert load_recipe_file(file, url="s3://models/2026").recipe.base_model == url


@pytest.mark.parametrize("name", ["../../base", "../../../base", "../../models2/base"])
def test_a_name_beside_a_recipe_in_a_store_stays_in_its_bucket(name: str, tmp_path: Path) -> None:
    """Else it is refused, with the way out; given elsewhere it is there."""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"base_model": name, "models": [{"model": "/ft"}]}))
    with pytest.raises(RecipeError, match="leads out of the bucket, seen from s3://models/2026") as refusal:
        load_recipe_file(file, url="s3://models/2026")
    assert refusal.value.hint == f"Say where it is: --input {name}=PATH"
    found = load_recipe_file(file, elsewhere={name: "s3://other/base"}, url="s3://models/2026")
    assert found.recipe.base_model == "s3://other/base"


def test_what_a_person_typed_is_shown_as_it_was(here: Path) -> None:
    """One slash too few is to be seen in the message."""
    assert "error: s3:/models/base: there is no such" in refused(3, "inspect", "s3:/models/base")
    error = refused(2, "verify", "s3://models/ft", "--config", "s3://models/out/lines_recipe.yaml")
    assert "s3://models/out/lines_recipe.yaml: cannot be read" in error
    assert "hint: A recipe is read from a disk" in error


def test_notes_name_inputs_in_a_store_by_their_url(here: Path, store: S3Server) -> None:
    """Of another content than recorded."""
    ran("edit", "s3://models/base", "s3://models/ft", "-o", "out")
    save_file(load_file(here / "base/model.safetensors"), here / "new.safetensors", metadata={"by": "another"})
    store.put("models/base/model.safetensors", (here / "new.safetensors").read_bytes())
    done = ran("merge", "--config", "out/lines_recipe.yaml", "-o", "again")
    assert "note: s3://models/base/model.safetensors is not the file that the recipe records" in done.err


def test_a_key_that_is_longer_than_a_file_name(store: S3Server) -> None:
    """It is refused as any other that holds no model."""
    store.put(f"models/{'n' * 300}/config.json", b"{}")
    assert "s3://models/nnn" in refused(3, "inspect", f"s3://models/{'n' * 300}")


@pytest.mark.parametrize(
    "content",
    [b"\xff" * 40, b"\x02" + bytes(7) + b"{]", b"\x40" + bytes(7) + b"{}" + b" " * 62 + b"?", b""],
    ids=["length", "json", "bytes left over", "empty"],
)
def test_a_damaged_file_is_called_by_its_url(content: bytes, here: Path, store: S3Server) -> None:
    """Not by a path made of it, which has one slash and is nothing to paste."""
    name = "models/ft/model-00001-of-00002.safetensors"
    store.put(name, content)
    error = refused(3, "edit", here / "base", "s3://models/ft", "-o", here / "out")
    assert f"s3://{name}" in error
    assert "s3:/m" not in error


def test_a_lone_file_that_was_cut_off_is_called_by_its_url(here: Path, store: S3Server) -> None:
    """It may be an adapter, for which it is read first."""
    store.put("models/base/model.safetensors", (here / "base/model.safetensors").read_bytes()[:-4])
    assert "error: s3://models/base/model.safetensors: its tensors end" in refused(3, "inspect", "s3://models/base")
