"""Hub ids, through the real client, against a Hub on loopback.

The client reads its environment when it is imported, so each look-up runs in a fork of its own, which imports it anew;
refusals, which leave nothing behind, share one.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import save

from lines_cli.errors import CheckpointError
from lines_cli.hub.download import locate
from support import forked
from support.hub_server import HubServer, User


def weights(**values: float) -> bytes:
    """A safetensors file with one small tensor per keyword."""
    return save({name: np.full((2, 2), value, np.float32) for name, value in values.items()})


def pickled(**values: float) -> bytes:
    """The same, as torch.save writes it."""
    into = io.BytesIO()
    torch.save({name: torch.full((2, 2), float(value)) for name, value in values.items()}, into)
    return into.getvalue()


def index(**weight_map: str) -> bytes:
    return json.dumps({"metadata": {}, "weight_map": weight_map}).encode()


WHOLE = {"config.json": b"{}", "model.safetensors": weights(a=1)}
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": index(a="model-00001-of-00002.safetensors", b="model-00002-of-00002.safetensors"),
    "model-00001-of-00002.safetensors": weights(a=1),
    "model-00002-of-00002.safetensors": weights(b=2),
}
WANTED = WHOLE | {
    name: name.encode()  # no two alike: the cache keeps equal files once
    for name in (
        *(
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "vocab[1].json",
        ),
        *(
            "preprocessor_config.json",
            "chat_template.jinja",
            "1_Pooling/config.json",
            "configuration_own.py",
            "LICENSE",
            "README.md",
        ),
    )
}
UNWANTED = {
    name: name.encode()
    for name in (
        *(".gitattributes", "eval_results.json", "vocab1.json.bak", "onnx/config.json"),
        *("model.fp16.safetensors", "consolidated.safetensors", "checkpoint-10/model.safetensors", "pytorch_model.bin"),
        *("onnx/model.onnx", "training_args.bin", "optimizer.pt", "trainer_state.json", "adapter_config.json"),
    )
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


@pytest.mark.slow
def test_of_a_repository_only_what_an_edit_needs_is_fetched(hub: HubServer, user: User) -> None:
    """One set of weights and the carried-over files are fetched, once each, and nothing else."""
    commit = hub.push("org/model", WANTED | UNWANTED)
    [found] = user.locates("org/model")
    assert found["hub_id"] == f"org/model@{commit}"
    assert found["name"] == "org/model"
    assert found["tensors"] == ["a"]
    assert found["files"] == sorted(WANTED)
    assert hub.fetched() == set(WANTED)
    contents = [request.file for request in hub.requests if request.method == "GET" and request.kind == "content"]
    assert contents == ["model.safetensors"]


@pytest.mark.slow
def test_a_second_run_fetches_no_file(hub: HubServer, user: User) -> None:
    """What is in the cache is not fetched again, and few questions are asked."""
    hub.push("org/model", WANTED)
    hub.push("org/sharded", SHARDED)
    first = user.locates("org/model", "org/sharded")
    hub.requests.clear()
    assert user.locates("org/model", "org/sharded") == first
    assert hub.fetched() == set()
    assert len(hub.requests) <= 3 * 2  # 2 each; 3 with a client that keeps no listing


@pytest.mark.slow
def test_where_there_are_no_safetensors_what_torch_saved_is_fetched(hub: HubServer, user: User) -> None:
    """In one file or in shards; what a trainer kept beside them is not. Offline the cache gives the same."""
    kept = {"config.json": b"{}", "training_args.bin": b"a", "optimizer.pt": b"b", "rng_state.pth": b"c"}
    hub.push("org/one", kept | {"pytorch_model.bin": pickled(a=1)})
    shards = {f"pytorch_model-0000{n}-of-00002.bin": pickled(**{name: n}) for n, name in ((1, "a"), (2, "b"))}
    at = index(a="pytorch_model-00001-of-00002.bin", b="pytorch_model-00002-of-00002.bin")
    hub.push("org/two", kept | shards | {"pytorch_model.bin.index.json": at})
    one, two = user.locates("org/one", "org/two")
    assert (one["tensors"], two["tensors"]) == (["a"], ["a", "b"])
    assert one["files"] == ["config.json", "pytorch_model.bin"]
    assert two["files"] == sorted([*shards, "config.json", "pytorch_model.bin.index.json"])
    assert user.locates("org/one", "org/two", HF_HUB_OFFLINE="1") == [one, two]


@pytest.mark.slow
def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, user: User) -> None:
    """Each gives the files of that commit, and of a sharded repository exactly the index's shards."""
    stale = {"model-00003-of-00003.safetensors": weights(c=3)}
    first = hub.push("org/model", SHARDED | stale)
    second = hub.push("org/model", WHOLE, branch="refs/pr/1")
    hub.push("org/model", {"config.json": b"{}", "model.safetensors": weights(z=1)})
    by_commit, by_branch, newest = user.locates(f"org/model@{first}", "org/model@refs/pr/1", "org/model")
    assert by_commit["hub_id"] == f"org/model@{first}"
    assert by_commit["files"] == sorted(SHARDED)
    assert by_commit["tensors"] == ["a", "b"]
    assert by_branch["hub_id"] == f"org/model@{second}"
    assert by_branch["tensors"] == ["a"]
    assert newest["tensors"] == ["z"]


@pytest.mark.slow
def test_all_files_are_of_one_commit(hub: HubServer, user: User) -> None:
    """A push between the first question and the download does not mix two commits."""
    first = hub.push("org/model", {**SHARDED, "tokenizer.json": b"old"})
    hub.after_info = lambda: hub.push("org/model", {**SHARDED, "tokenizer.json": b"new"})
    [found] = user.locates("org/model")
    assert found["hub_id"] == f"org/model@{first}"
    assert found["tensors"] == ["a", "b"]
    assert Path(found["path"], "tokenizer.json").read_bytes() == b"old"


@pytest.mark.slow
def test_without_a_connection_the_cache_serves(hub: HubServer, user: User) -> None:
    """Offline, or while the Hub is down, what an earlier run fetched is found again, by branch and by commit."""
    hub.push("org/model", WANTED | UNWANTED)
    hub.push("org/sharded", SHARDED)
    first = user.locates("org/model", "org/sharded")
    names = ["org/model", "org/sharded", first[1]["hub_id"]]
    hub.requests.clear()
    offline = user.locates(*names, HF_HUB_OFFLINE="1")
    assert [found["files"] for found in offline] == [sorted(WANTED), sorted(SHARDED), sorted(SHARDED)]
    assert [found["hub_id"] for found in offline[:2]] == [found["hub_id"] for found in first]
    assert hub.requests == []
    hub.broken |= {"org/model", "org/sharded"}
    assert user.locates(*names) == offline


@pytest.mark.slow
def test_offline_an_absent_or_partial_copy_is_refused(hub: HubServer, user: User) -> None:
    """The refusal says that it is offline, what is lacking, and where."""
    hub.push("org/sharded", SHARDED)
    [found] = user.locates("org/sharded")
    Path(found["path"], "model-00002-of-00002.safetensors").unlink()
    partial, absent = user.locates("org/sharded", "org/other", HF_HUB_OFFLINE="1")
    assert partial["error"] == absent["error"] == "HubError"
    assert "is offline (HF_HUB_OFFLINE is set)" in partial["message"]
    assert "model-00002-of-00002.safetensors" in partial["message"]
    assert found["path"] in partial["hint"]
    assert absent["message"].startswith("org/other: no such file or folder here, and no copy of org/other")
    assert "is offline (HF_HUB_OFFLINE is set)" in absent["message"]


@pytest.mark.slow
def test_without_the_clients_listing_a_lone_shard_is_not_taken_for_a_model(hub: HubServer, user: User) -> None:
    """Of a snapshot that another tool fetched file by file, only weights under a library's own name are used."""
    hub.push("org/model", WANTED | UNWANTED)
    hub.push("org/sharded", SHARDED)

    def fetch() -> None:
        import huggingface_hub as anew

        for name in ("config.json", "model.safetensors"):
            anew.hf_hub_download("org/model", name)
        anew.hf_hub_download("org/sharded", "model-00001-of-00002.safetensors")

    assert user.runs(fetch).returncode == 0
    whole, shard = user.locates("org/model", "org/sharded", HF_HUB_OFFLINE="1")
    assert whole["files"] == ["config.json", "model.safetensors"]
    assert "complete is not known" in shard["message"]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(huggingface_hub, "get_cached_repo_tree"), reason="this client keeps no listings")
def test_offline_a_lone_file_of_any_name_is_found_again(hub: HubServer, user: User) -> None:
    """The client's listing says that the cached file is all there is."""
    hub.push("org/lone", {"vae.safetensors": weights(a=1)})
    assert user.locates("org/lone") == user.locates("org/lone", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_an_unreachable_hub_is_said_to_be_unreachable(user: User) -> None:
    """No network is no traceback: the address and the reason are named."""
    [refused] = user.locates("org/model", HF_ENDPOINT="http://127.0.0.1:1")
    assert refused["error"] == "HubError"
    assert "http://127.0.0.1:1 cannot be reached" in refused["message"]
    assert "\n" not in refused["message"]


@pytest.mark.slow
def test_a_path_that_exists_wins(hub: HubServer, user: User) -> None:
    """A folder named like a Hub id is that folder: no request, and the client is not even imported."""
    folder = user.home.parent / "org" / "model"
    folder.mkdir(parents=True)
    for name, content in WHOLE.items():
        (folder / name).write_bytes(content)
    (folder.parent / "model@v1").symlink_to(folder)
    hub.push("org/model", SHARDED)
    found = user.locates("org/model", "org/model@v1", str(folder))
    assert [entry["hub_id"] for entry in found] == [None, None, None]
    assert [entry["path"] for entry in found] == ["org/model", "org/model@v1", str(folder)]
    assert not any(entry["client"] for entry in found)
    assert hub.requests == []


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`~` in a recipe, where no shell has seen it, is the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    assert locate("~/model.safetensors").path == tmp_path / "model.safetensors"


@pytest.mark.parametrize("name", ["gpt2", "a/b/c", "./a/b", "../a/b", "/a/b", "~/a", "a/", "a b/c", "-a/b", "", "a\0b"])
def test_what_is_neither_path_nor_id_is_a_missing_path(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name without the form of a Hub id is never asked of the Hub."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        locate(name)


@pytest.mark.parametrize("revision", ["", "a b", "../../x", "/main", "main/", "a//b", "a:b", "a\\b", "x\ny"])
def test_an_impossible_revision_is_refused_unasked(revision: str) -> None:
    """What git allows in no name never becomes part of an address or of a path in the cache."""
    with pytest.raises(CheckpointError, match="is not a valid revision"):
        locate(f"org/model@{revision}")


@pytest.mark.slow
def test_a_private_repository_takes_a_token(hub: HubServer, user: User) -> None:
    """With HF_TOKEN it is fetched, and the token stays with the Hub; with a wrong one, access is refused."""
    hub.push("org/private", WHOLE, private=True)
    hub.push("org/gated", WHOLE, gated=True)
    for found in user.locates("org/private", "org/gated", HF_TOKEN=hub.token):
        assert found["tensors"] == ["a"]
    assert {request.token for request in hub.requests if request.kind == "content"} == {None}
    [refused] = user.locates("org/private", HF_TOKEN="hf_wrong")
    assert refused["error"] == "HubError"
    assert "refuses access to org/private (401)" in refused["message"]
    assert "HF_TOKEN" in refused["hint"]


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, user: User) -> None:
    """A failure of the disk is told apart from one of the Hub."""
    hub.push("org/model", WHOLE)
    in_the_way = user.home.with_name("file")
    in_the_way.touch()
    [refused] = user.locates("org/model", HF_HOME=str(in_the_way))
    assert refused["error"] == "HubError"
    assert "the Hub's cache cannot be used" in refused["message"]
    assert "HF_HOME" in refused["hint"]


OUTSIDE = {
    "model.safetensors.index.json": index(a="../../../../escaped.safetensors"),
    "../../../../escaped.safetensors": b"",
}
REFUSALS: dict[str, tuple[dict[str, bytes] | None, dict[str, Any], str, str, str]] = {
    # name: what the repository holds (None: there is none), how it is pushed, the error, what its message and hint hold
    "org/absent": (None, {}, "HubError", r"^org/absent: no such file or folder here, and the Hub shows no", "HF_TOKEN"),
    "org/secret": (WHOLE, {"private": True}, "HubError", "shows no model org/secret", "hf auth login"),
    "org/gated": (WHOLE, {"gated": True}, "HubError", "org/gated is gated", "/org/gated, then log in"),
    "org/whole@v9": (WHOLE, {}, "HubError", "org/whole is on the Hub, but has no revision 'v9'", "branches and tags"),
    "org/bad--name": (None, {}, "HubError", "it is not a valid Hub id", ""),
    "org/tensorflow": ({"config.json": b"{}", "tf_model.h5": b""}, {}, "UnsupportedError", "tf_model.h5", "save"),
    "org/several": ({"x.safetensors": b"", "y.safetensors": b""}, {}, "CheckpointError", "several sets", ""),
    "org/empty": ({"README.md": b""}, {}, "CheckpointError", r"org/empty \(on the Hub\) holds no", ""),
    "org/lacking": (
        {k: v for k, v in SHARDED.items() if "00002-of" not in k},
        {},
        "CheckpointError",
        "names shards that",
        "",
    ),
    "org/outside": (OUTSIDE, {}, "CheckpointError", "outside the folder", ""),
    "org/escaping": ({**WHOLE, "..\\..\\evil.model": b""}, {}, "HubError", "outside its own folder", ""),
}


@pytest.fixture(scope="module")
def refusals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mapping[str, dict[str, Any]]]:
    """Every refusal of the table, from one process; and that nothing was fetched for them but indices."""
    with HubServer() as hub:
        for name, (files, how, *_) in REFUSALS.items():
            if files is not None:
                hub.push(name.partition("@")[0], files, **how)
        folder = tmp_path_factory.mktemp("refused")
        said = User(hub, folder / "home").locates(*REFUSALS)
        contents = {request.file for request in hub.requests if request.kind == "content"}
        assert contents <= {"model.safetensors"}
        assert {path.name for path in folder.iterdir()} == {"home"}
        yield dict(zip(REFUSALS, said, strict=True))


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_says_what_is_wrong_and_what_to_do(name: str, refusals: Mapping[str, dict[str, Any]]) -> None:
    """Each way in which a repository cannot be had is one of our errors, with the client's traceback nowhere."""
    *_, error, message, hint = REFUSALS[name]
    assert refusals[name]["error"] == error
    assert re.search(message, refusals[name]["message"]), refusals[name]
    assert hint in refusals[name]["hint"]


@pytest.mark.slow
def test_names_that_lead_out_of_the_repository_are_not_fetched(hub: HubServer, user: User) -> None:
    """What a repository lists above its own folder is left alone."""
    stray = {"../config.json": b"", "../../evil_tokenizer.json": b"", "/etc/tokenizer.json": b"", "*.json": b""}
    hub.push("org/model", WHOLE | stray)
    [found] = user.locates("org/model")
    assert found["files"] == sorted(WHOLE)
    assert hub.fetched() == set(WHOLE)


def layers(value: float) -> bytes:
    names = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))]
    return weights(**dict.fromkeys(names, value))


def test_edit_takes_hub_ids_and_pins_them(hub: HubServer, user: User) -> None:
    """`lines edit org/base org/ft -o out` writes a folder whose recipe names both commits, and runs offline from it."""
    config = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
    base = hub.push("org/base", {"config.json": config, "model.safetensors": layers(1)})
    ft = hub.push("org/ft", {"config.json": config, "model.safetensors": layers(2), "tokenizer.json": b"{}"})
    done = user.runs(forked.command("edit", "org/base", "org/ft", "-o", "out", "--json"))
    assert done.returncode == 0, done.stderr
    out = user.home.parent / "out"
    recipe = yaml.safe_load((out / "lines_recipe.yaml").read_text())
    assert recipe["base_model"] == f"org/base@{base}"
    assert recipe["models"] == [{"model": f"org/ft@{ft}"}]
    assert (out / "tokenizer.json").is_file()
    again = ["merge", "--config", "out/lines_recipe.yaml", "-o", "again"]
    done = user.runs(forked.command(*again), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert (out.with_name("again") / "model.safetensors").read_bytes() == (out / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_line_for_each_model(hub: HubServer, user: User) -> None:
    """What is fetched is said on stderr, model by model: when it begins, and how much it was, without what the plan
    has fetched. What is in the cache already is not mentioned, and --quiet says nothing.
    """
    commit = hub.push("org/model", SHARDED)
    hub.push("org/base", WHOLE | {"model.safetensors": weights(a=2, b=3)})
    edit = ["edit", "org/base", "org/model", "-o", "out", "--force", "--alpha", "0.5", "--beta", "0"]
    first, second = user.commands(edit, edit)
    assert (first.code, second.code) == (0, 0), first.err
    said = [line for line in first.err.splitlines() if line.startswith("fetch")]
    assert said[2] == f"fetching org/model from the Hub (commit {commit[:7]})"
    nbytes = sum(len(content) for name, content in SHARDED.items() if name.endswith(".safetensors"))
    assert re.fullmatch(rf"fetched org/model: 2 files, {nbytes} B in [\d.]+ s \(.*B/s\)", said[3])
    assert [line.split()[:2] for line in said[:2]] == [["fetching", "org/base"], ["fetched", "org/base:"]]
    assert "fetch" not in second.err
    hub.push("org/model", WHOLE)
    [quiet] = user.commands([*edit, "--quiet", "--missing", "copy"])
    assert quiet.code == 0, quiet.err
    assert "fetch" not in quiet.err
