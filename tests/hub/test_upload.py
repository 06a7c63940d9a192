"""Outputs onto the Hub, through the real client, against a Hub on loopback: what is sent, refused, and gone on with."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from support import forked
from support.hub_server import Account, Fault, HubServer, User
from support.run import Ran, run_lines

CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))]
OUTPUT = {"README.md", "config.json", "lines_recipe.yaml", "model.safetensors"}


def layers(value: float, entries: int = 64) -> bytes:
    made = np.random.default_rng(int(value))
    return save({name: made.standard_normal((entries, 16)).astype(np.float32) for name in NAMES})


def with_models(hub: HubServer) -> HubServer:
    hub.push("org/base", {"config.json": CONFIG, "model.safetensors": layers(1)})
    hub.push("org/ft", {"config.json": CONFIG, "model.safetensors": layers(2)})
    return hub


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield with_models(server)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home of someone with a base and a fine-tune in the cache, and beside it an output of both, `out`."""
    home = tmp_path_factory.mktemp("made") / "home"
    with HubServer() as server:
        ran = run_on(User(with_models(server), home), ["edit", "org/base", "org/ft", "-o", "out"])
    assert ran.code == 0, ran.err
    return home


@pytest.fixture
def user(hub: HubServer, made: Path, tmp_path: Path) -> User:
    """The same, of one's own."""
    shutil.copytree(made.parent, tmp_path, dirs_exist_ok=True, symlinks=True)
    return User(hub, tmp_path / "home")


def run_all(user: User, *commands: list[str], token: str | None = "hf_letmein", **env: str) -> list[Ran]:
    """What `lines` says to each of these commands, by someone with this token. No pause is waited for between tries."""

    def program() -> None:
        time.sleep = lambda _: None  # type: ignore[assignment]
        print(json.dumps([asdict(run_lines(*command)) for command in commands]))

    done = user.runs(program, **({"HF_TOKEN": token} if token else {}), **env)
    assert done.returncode == 0, done.stderr
    assert "letmein" not in done.stderr + done.stdout
    told = [Ran(**ran) for ran in json.loads(done.stdout)]
    assert [ran.trace for ran in told] == [""] * len(told)
    return told


def run_on(user: User, *commands: list[str], token: str | None = "hf_letmein", **env: str) -> Ran:
    """What it says to the last of them."""
    return run_all(user, *commands, token=token, **env)[-1]


def out_of(user: User) -> Path:
    return user.home.parent / "out"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sent(hub: HubServer) -> list[str]:
    return [request.file for request in hub.kinds("upload") if request.nbytes]


def test_an_output_is_pushed(hub: HubServer, user: User) -> None:
    """`lines push` makes the repository and sends the files of the output; they come back byte for byte, and can be
    verified from there.
    """
    ran = run_on(user, ["push", "out", "org/made", "--json"])
    assert ran.code == 0, ran.err
    there = dict(hub.holds("org/made"))
    assert there.pop(".gitattributes")
    assert there == contents(out_of(user))
    repository = hub.repositories["org/made"]
    pushed = ran.json["pushed"]
    assert (pushed["repo"], pushed["revision"]) == ("org/made", "main")
    assert pushed["commit"] == repository.refs["main"]
    assert pushed["url"] == f"{hub.url}/org/made/commit/{pushed['commit']}"
    assert pushed["files"] == sorted(OUTPUT)
    assert pushed["bytes"] == sum(map(len, there.values()))
    assert not repository.private
    again = run_on(user, ["verify", "org/made"])
    assert again.code == 0, again.err


@pytest.mark.slow
def test_what_the_commit_and_the_card_say(hub: HubServer, user: User) -> None:
    """The card names the base models; the commit names them with their commits, the digest of each weight file as the
    record has it, and the lines that make it again and check it.
    """
    assert run_on(user, ["push", "out", "org/made"]).code == 0
    repository, there = hub.repositories["org/made"], hub.holds("org/made")
    front = yaml.safe_load(there["README.md"].decode().split("---")[1])
    assert front["base_model"] == ["org/base", "org/ft"]
    title, said = repository.said[repository.refs["main"]]
    assert "lines" in title
    record = yaml.safe_load(there["lines_recipe.yaml"])
    for model in ("base", "ft"):
        assert f"org/{model}@{hub.repositories[f'org/{model}'].refs['main']}" in said
    assert record["files"]["model.safetensors"]["digest"] in said
    assert "lines merge --config lines_recipe.yaml" in said
    assert "lines verify org/made" in said


@pytest.mark.slow
def test_only_what_belongs_is_pushed(hub: HubServer, user: User) -> None:
    """What else lies in the folder stays, whatever its name is, and is named; nothing of it is sent."""
    secrets = {".env": "HF_TOKEN=hf_secret", "notes.txt": "mine", "model.fp16.safetensors": "w", "sub/key.pem": "k",
               ".git/config": "url"}  # fmt: skip
    for name, text in secrets.items():
        (out_of(user) / name).parent.mkdir(exist_ok=True)
        (out_of(user) / name).write_text(text)
    dry = run_on(user, ["push", "out", "org/made", "--dry-run", "--json"])
    assert (dry.code, dry.json["pushed"]["files"], dry.json["pushed"]["commit"]) == (0, sorted(OUTPUT), None)
    assert "org/made" not in hub.repositories
    ran = run_on(user, ["push", "out", "org/made"])
    assert ran.code == 0, ran.err
    assert hub.holds("org/made").keys() == OUTPUT | {".gitattributes"}
    for name in secrets:
        assert name in ran.err
    assert not any(b"hf_secret" in content for content in [*hub.holds("org/made").values(), *hub.stored.values()])


@pytest.mark.slow
def test_names_that_are_patterns_and_folders(hub: HubServer, user: User) -> None:
    """Files in folders go there, and no name is read as a pattern. An output may be named by a link."""
    extra = {
        "vocab[1].json": b"{}",
        "tokenizer.json": b"[]",
        "1_Pooling/config.json": b"{ }",
        "chat_template.jinja": b"x",
    }
    hub.push("org/ft2", {**hub.holds("org/ft"), **extra})
    (user.home.parent / "link").symlink_to("new")
    made, ran = run_all(user, ["edit", "org/base", "org/ft2", "-o", "new"], ["push", "link", "org/made", "--json"])
    assert (made.code, ran.code) == (0, 0), made.err + ran.err
    (user.home.parent / "new" / "vocab1.json").write_text("mine")
    again = run_on(user, ["push", "new", "org/made"])
    assert (again.code, "vocab1.json" in again.err) == (0, True)
    there = dict(hub.holds("org/made"))
    assert {name: there[name] for name in extra} == extra
    assert there.keys() == OUTPUT | extra.keys() | {".gitattributes"}


@pytest.mark.slow
def test_an_edit_that_is_pushed(hub: HubServer, user: User) -> None:
    """`--push-to` pushes what the run has written; `--json` says both; a second run finds the output finished and
    sends nothing again.
    """
    edit = ["edit", "org/base", "org/ft", "-o", "new", "--alpha", "0.3", "--push-to", "org/made", "--private"]
    dry = run_on(user, [*edit, "--dry-run", "--json"])
    assert (dry.code, set(dry.json["pushed"]["files"]), dry.json["pushed"]["commit"]) == (0, OUTPUT, None)
    ran = run_on(user, [*edit, "--json"])
    assert ran.code == 0, ran.err
    there = dict(hub.holds("org/made"))
    del there[".gitattributes"]
    assert there == contents(user.home.parent / "new")
    assert hub.repositories["org/made"].private
    assert ran.json["done_before"] is False
    assert ran.json["pushed"]["commit"] == hub.repositories["org/made"].refs["main"]
    hub.requests.clear()
    again = run_on(user, [*edit, "--resume", "--force", "--json"])
    assert again.code == 0, again.err
    assert again.json["done_before"] is True
    assert again.json["pushed"]["commit"] == ran.json["pushed"]["commit"]
    assert sent(hub) == []
    assert hub.kinds("commit") == []


@pytest.mark.slow
def test_a_merge_is_pushed_in_words(hub: HubServer, user: User) -> None:
    """Without `--json` the summary comes first, and then the commit and its address."""
    (user.home.parent / "merge.yaml").write_text("base_model: org/base\nmodels: [{model: org/ft}]\noutput: merged\n")
    ran = run_on(user, ["merge", "--config", "merge.yaml", "--push-to", "me/merged"])
    assert ran.code == 0, ran.err
    *_, before, pushed, url = ran.out.splitlines()
    commit = hub.repositories["me/merged"].refs["main"]
    assert before.startswith("output  ")
    assert pushed.startswith("pushed  4 files, ")
    assert url == f"{hub.url}/me/merged/commit/{commit}"


# --- what is there already ---


@pytest.mark.slow
def test_an_earlier_output_is_replaced(hub: HubServer, user: User) -> None:
    """Of an earlier output, files that the new one has not go in the same commit; what others put there stays."""
    sharded = ["edit", "org/base", "org/ft", "-o", "sharded", "--max-shard-size", "8kB", "--push-to", "org/made"]
    assert run_on(user, sharded).code == 0
    assert "model.safetensors.index.json" in hub.holds("org/made")
    repository = hub.repositories["org/made"]
    repository.add({**hub.holds("org/made"), "eval.json": b"{}"}, "main")
    before = repository.refs["main"]
    ran = run_on(user, ["push", "out", "org/made", "--json"])
    assert ran.code == 0, ran.err
    assert hub.holds("org/made").keys() == OUTPUT | {".gitattributes", "eval.json"}
    assert repository.parents[repository.refs["main"]] == before
    removed = ran.json["pushed"]["removed"]
    assert "model.safetensors.index.json" in removed
    assert all(name.startswith("model") for name in removed)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        "model-00001-of-00002.safetensors",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("model.safetensors", "model.safetensors.index.json")),
    ],
)
def test_weights_of_others_are_not_replaced(other: str, hub: HubServer, user: User) -> None:
    """Weights that lines did not put there are named, in a dry run, too, and before anything is computed; a new branch
    begins empty, and takes the output.
    """
    hub.push("org/theirs", {"config.json": b"{}", other: b"weights"})
    push, edit = ["push", "out", "org/theirs"], ["edit", "org/base", "org/ft", "-o", "new", "--push-to", "org/theirs"]
    for ran in run_all(user, push, [*push, "--dry-run"], edit, [*edit, "--dry-run"]):
        assert ran.code == 8, ran.out
        assert "holds weights that lines did not write" in ran.err
        assert other in ran.err
        assert "--revision" in ran.err
    assert not (user.home.parent / "new").exists()
    assert hub.holds("org/theirs").keys() == {"config.json", other}
    repository = hub.repositories["org/theirs"]
    first = repository.add({".gitattributes": b""}, "main")
    repository.parents[first] = None
    repository.add({other: b"weights"}, "main")
    verify = ["verify", "org/theirs@lines"]
    ran, verified = run_all(user, ["push", "out", "org/theirs", "--revision", "lines", "--json"], verify)
    assert (ran.code, verified.code) == (0, 0), ran.err
    assert hub.holds("org/theirs", "lines").keys() == OUTPUT | {".gitattributes"}
    assert hub.holds("org/theirs").keys() == {other}
    assert ran.json["pushed"]["revision"] == "lines"


@pytest.mark.slow
def test_a_branch_that_would_not_begin_empty(hub: HubServer, user: User) -> None:
    """Where the first commit of a repository holds weights already, a new branch is refused, and not made."""
    hub.push("org/theirs", {"model.safetensors": b"weights"})
    ran = run_on(user, ["push", "out", "org/theirs", "--revision", "lines"])
    assert (ran.code, "would not begin empty" in ran.err) == (8, True)
    assert hub.repositories["org/theirs"].refs.keys() == {"main"}


@pytest.mark.slow
def test_a_record_of_others_makes_nothing_ours(hub: HubServer, user: User) -> None:
    """A recipe that does not begin as those of lines do owns no file there."""
    record = "files:\n  model.safetensors: {bytes: 7, digest: x}\nbase_model: a\nmodels: [{model: b}]\n"
    hub.push("org/theirs", {"lines_recipe.yaml": record.encode(), "model.safetensors": b"weights"})
    ran = run_on(user, ["push", "out", "org/theirs"])
    assert (ran.code, "model.safetensors" in ran.err) == (8, True)


@pytest.mark.slow
def test_a_model_card(hub: HubServer, user: User) -> None:
    """A card that somebody has edited on the Hub stays; one that was edited here goes there."""
    assert run_on(user, ["push", "out", "org/made"]).code == 0
    repository = hub.repositories["org/made"]
    repository.add({**hub.holds("org/made"), "README.md": b"# Edited there"}, "main")
    ran = run_on(user, ["push", "out", "org/made"])
    assert (ran.code, "model card" in ran.err) == (0, True)
    assert hub.holds("org/made")["README.md"] == b"# Edited there"
    (out_of(user) / "README.md").write_text("# Edited here")
    assert run_on(user, ["push", "out", "org/made"]).code == 0
    assert hub.holds("org/made")["README.md"] == b"# Edited here"


@pytest.mark.slow
def test_private_means_private(hub: HubServer, user: User) -> None:
    """A public repository is not pushed to with --private; a private one stays private without it."""
    hub.push("org/public", {".gitattributes": b""})
    hub.push("org/hidden", {".gitattributes": b""}, private=True)
    ran = run_on(user, ["push", "out", "org/public", "--private"])
    assert (ran.code, "everybody can see it" in ran.err) == (8, True)
    assert hub.kinds("commit") == []
    assert run_on(user, ["push", "out", "org/hidden"]).code == 0
    assert hub.repositories["org/hidden"].private


@pytest.mark.slow
@pytest.mark.parametrize("revision", ["refs/pr/1", pytest.param("main", marks=pytest.mark.slow)])
def test_a_revision_that_is_there(revision: str, hub: HubServer, user: User) -> None:
    """A pull request and the main branch are committed to as they are; a tag is no branch."""
    hub.push("org/made", {".gitattributes": b""})
    hub.push("org/made", {".gitattributes": b""}, branch=revision)
    hub.repositories["org/made"].tags["v1"] = hub.repositories["org/made"].refs["main"]
    assert run_on(user, ["push", "out", "org/made", "--revision", revision]).code == 0
    assert hub.holds("org/made", revision).keys() == OUTPUT | {".gitattributes"}
    ran = run_on(user, ["push", "out", "org/made", "--revision", "v1"])
    assert (ran.code, "is a tag" in ran.err) == (8, True)


# --- what is no whole output ---


def no_record(out: Path) -> None:
    (out / "lines_recipe.yaml").unlink()


def other_record(out: Path) -> None:
    (out / "lines_recipe.yaml").write_text("base_model: a\nmodels: [{model: b}]\n")


def no_files(out: Path) -> None:
    text = (out / "lines_recipe.yaml").read_text()
    (out / "lines_recipe.yaml").write_text(text[: text.index("files:")])


def outside(out: Path) -> None:
    text = (out / "lines_recipe.yaml").read_text()
    (out / "lines_recipe.yaml").write_text(text.replace("  config.json:", "  ../home.json:"))


def changed(out: Path) -> None:
    content = bytearray((out / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (out / "model.safetensors").write_bytes(content)


def cut(out: Path) -> None:
    os.truncate(out / "model.safetensors", 100)


def gone(out: Path) -> None:
    (out / "config.json").unlink()


def linked(out: Path) -> None:
    (out.parent / "secret").write_text("secret")
    (out / "README.md").unlink()
    (out / "README.md").symlink_to(out.parent / "secret")


def weights_linked(out: Path) -> None:
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("/etc/passwd")


def stop_in_the_middle(command: list[str]) -> None:
    from lines_cli.storage.files import NewFile

    def sync(_: NewFile) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    NewFile.sync = sync  # type: ignore[method-assign]
    run_lines(*command)


DAMAGED: dict[Callable[[Path], None], tuple[int, str]] = {
    no_record: (3, "no output of lines"),
    other_record: (3, "no output of lines"),
    no_files: (3, "does not say which files"),
    outside: (3, "outside the folder"),
    changed: (5, "model.safetensors holds sha256"),
    cut: (5, "model.safetensors holds 100 bytes"),
    gone: (5, "config.json is missing"),
    linked: (3, "a link that leaves its folder"),
    weights_linked: (5, "config.json is a link that leaves the folder"),
}


@pytest.mark.slow
def test_what_is_not_whole_is_not_pushed(hub: HubServer, user: User) -> None:
    """The Hub is not even asked."""
    folders = [out_of(user).with_name(f"out {damage.__name__}") for damage in DAMAGED]
    for damage, folder in zip(DAMAGED, folders, strict=True):
        shutil.copytree(out_of(user), folder)
        damage(folder)
    found = run_all(user, *(["push", str(folder), "org/made"] for folder in folders))
    for (code, said), ran in zip(DAMAGED.values(), found, strict=True):
        assert (ran.code, ran.out) == (code, "")
        assert said in ran.err
    assert hub.requests == []


@pytest.mark.slow
def test_unfinished_work_is_not_pushed(hub: HubServer, user: User) -> None:
    """Where a run was killed, neither its hidden folder nor the output beside it is pushed, until it is cleaned up."""
    command = ["edit", "org/base", "org/ft", "-o", "out", "--force", "--alpha", "0.7"]
    done = user.runs(partial(stop_in_the_middle, command))
    assert done.returncode == -signal.SIGKILL
    ran = run_on(user, ["push", "out", "org/made"])
    assert (ran.code, "unfinished work" in ran.err, "lines clean out" in ran.err) == (6, True, True)
    ran = run_on(user, ["push", ".out.lines/new", "org/made"])
    assert ran.code in (3, 6)
    assert "org/made" not in hub.repositories
    assert run_on(user, ["clean", "out"], ["push", "out", "org/made"]).code == 0


IMPOSSIBLE = [
    (["push", "out", "made"], "not the name of a repository"),
    (["push", "out", "org/made@main"], "not the name of a repository"),
    (["push", "out", "../made"], "not the name of a repository"),
    (["push", "out", "org/made.git"], "not the name of a repository"),
    (["push", "out", "org/made", "--revision", "a b"], "not a branch"),
    (["push", "out", "org/made", "--revision", "0" * 40], "not a branch"),
    (["edit", "org/base", "org/ft", "-o", "new", "--private"], "nothing is pushed"),
    (["edit", "org/base", "org/ft", "-o", "new", "--revision", "v1"], "nothing is pushed"),
    (["edit", "org/base", "org/ft", "-o", "new.safetensors", "--push-to", "org/made"], "a folder"),
]


@pytest.mark.slow
def test_what_is_impossible(hub: HubServer, user: User) -> None:
    """Such a command line is refused unasked; and so is what is not there, a file, or a folder of something else."""
    (user.home.parent / "model.safetensors").write_bytes(layers(1))
    for (arguments, said), ran in zip(IMPOSSIBLE, run_all(user, *(line for line, _ in IMPOSSIBLE)), strict=True):
        assert (ran.code, said in ran.err) == (2, True), (arguments, ran.err)
    for ran in run_all(user, *(["push", path, "org/made"] for path in ("absent", "model.safetensors", "home"))):
        assert ran.code == 3
    assert hub.requests == []


# --- the Hub says no ---

REFUSALS: dict[str, tuple[dict[str, Any], str, str]] = {
    # what is refused: who asks and what fails, what is said of it, and the next step
    "no token": ({"token": None}, "there is no token", "hf auth login"),
    "a wrong token": ({"token": "hf_wrong"}, "does not accept the token (401)", "HF_TOKEN"),
    "an expired token": (
        {"faults": {"commit": Fault(401, "token expired")}},
        "(401): it is wrong, or has expired",
        "new",
    ),
    "a reader's token": ({"account": Account(role="read")}, "may read and not write", "may write"),
    "no member": ({"repo": "others/made"}, "me, whose token this is, is not a member of others", "spelling"),
    "a reader of the organisation": (
        {"account": Account(orgs={"org": "read"})},
        "may read and not write",
        "administrator",
    ),
    "no right to this one": ({"there": True, "account": Account(orgs={})}, "may not write there (403)", "may write"),
    "no right after all": ({"faults": {"create": Fault(403, "no rights")}}, "may not write there (403): no rights", ""),
    "gated": ({"there": True, "faults": {"commit": Fault(403, "gated")}}, "may not write there (403): gated", ""),
    "no such organisation": ({"faults": {"create": Fault(404, "no such org")}}, "(404): no such org", "spelling"),
    "no room": ({"faults": {"batch": Fault(402, "quota")}}, "asks for payment (402)", ""),
    "too often": ({"faults": {"batch": Fault(429, "slow down")}}, "wants a pause (429)", "while"),
    "a fault of its own": ({"faults": {"commit": Fault(500, "oops")}}, "an error of its own (500)", "while"),
    "dropped at once": ({"faults": {"info": Fault(None)}}, "the connection broke", "while"),
    "dropped at the commit": ({"faults": {"commit": Fault(None)}}, "the connection broke", "while"),
    "dropped in a file": ({"faults": {"upload": Fault(None, reads=1000)}}, "the connection broke", "while"),
    "the storage": ({"faults": {"upload": Fault(403, "expired")}}, "storage answered 403", "again"),
    "someone else": ({"there": True, "faults": {"commit": Fault(412, "moved")}}, "somebody else has changed", "again"),
    "something else": ({"faults": {"preupload": Fault(400, "bad name")}}, "answered 400: bad name", ""),
    "offline": ({"env": {"HF_HUB_OFFLINE": "1"}}, "offline (HF_HUB_OFFLINE is set)", ""),
    "nobody there": ({"env": {"HF_ENDPOINT": "http://127.0.0.1:1"}}, "http://127.0.0.1:1 cannot be reached", "while"),
}


# One of each step and of each kind; what is slow is another of the same.
QUICK = ("no token", "an expired token", "no member", "a reader of the organisation", "no right after all", "no room",
         "dropped in a file", "someone else", "nobody there")  # fmt: skip


@pytest.mark.parametrize("why", [pytest.param(why, marks=() if why in QUICK else pytest.mark.slow) for why in REFUSALS])
@pytest.mark.slow
def test_a_refusal_says_which_it_was(why: str, hub: HubServer, user: User) -> None:
    """Each ends with 8, says what it was and the next step, shows no token, and leaves the output as it was."""
    how, said, step = REFUSALS[why]
    repo = how.get("repo", "org/made")
    if how.get("there"):
        hub.push(repo, {".gitattributes": b""})
    hub.accounts[hub.token] = how.get("account", Account())
    hub.faults = dict(how.get("faults", {}))
    before = contents(out_of(user))
    token = how.get("token", hub.token)
    ran = run_on(user, ["push", "out", repo, "--json"], token=token, **how.get("env", {}))
    assert ran.code == 8, ran.err
    error = ran.json["error"]
    assert (error["code"], error["message"].startswith(f"{repo}: ")) == (8, True)
    assert said in error["message"]
    assert step in (error["hint"] or "")
    assert "hf_" not in ran.err.replace("hf_***", "")
    assert contents(out_of(user)) == before


@pytest.mark.parametrize(
    ("status", "said"),
    [pytest.param(None, "no Xet storage", marks=pytest.mark.slow), (403, "may not write there (403)")],
)
@pytest.mark.slow
def test_the_storage_of_hf_xet(status: int | None, said: str, hub: HubServer, user: User) -> None:
    """Where hf_xet is installed, large files go its way, and its errors are told as those of the Hub."""
    pytest.importorskip("hf_xet")
    pytest.importorskip("huggingface_hub._upload_pipeline")  # older clients first ask whether there is one
    hub.faults = {} if status is None else {"xet": Fault(status)}
    ran = run_on(user, ["push", "out", "org/made"], HF_HUB_DISABLE_XET="0")
    assert (ran.code, said in ran.err) == (8, True), ran.err
    assert hub.kinds("xet")
    assert run_on(user, ["push", "out", "org/made"]).code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "upload",
        "commit",
        *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("info", "create", "batch", "verify")),
    ],
)
def test_what_passes(kind: str, hub: HubServer, user: User) -> None:
    """An error of a moment at any step is waited for, and then all is well."""
    hub.faults = {kind: Fault(503 if kind != "upload" else None, times=1)}
    ran = run_on(user, ["push", "out", "org/made"])
    assert ran.code == 0, ran.err
    assert hub.holds("org/made").keys() == OUTPUT | {".gitattributes"}


@pytest.mark.parametrize("as_json", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_failed_push_after_an_edit(as_json: bool, hub: HubServer, user: User) -> None:
    """The output is in place and whole, the summary is there, and the hint is a command that goes on from there."""
    hub.faults = {"commit": Fault(500)}
    edit = ["edit", "org/base", "org/ft", "-o", "new", "--push-to", "org/made", "--private", "--revision", "v 1"]
    edit[-1] = "v1"
    ran = run_on(user, [*edit, *(["--json"] if as_json else [])])
    assert ran.code == 8
    assert "new is in place and whole, but not on the Hub" in ran.err
    command = "lines push new org/made --private --revision v1"
    assert f"Then: {command}" in ran.err
    if as_json:
        assert ran.json["output"] == "new"
        assert ran.json["pushed"] is None
        assert ran.json["error"]["code"] == 8
    else:
        assert "output  new" in ran.out
    hub.faults = {}
    assert [ran.code for ran in run_all(user, ["inspect", "new", "--check"], command.split()[1:])] == [0, 0]


@pytest.mark.slow
def test_nothing_is_computed_for_a_push_that_cannot_be(hub: HubServer, user: User) -> None:
    """A token that may not write is found out before the first tensor is read, and before any weights are fetched."""
    for name in ("base2", "ft2"):
        hub.push(f"org/{name}", {"config.json": CONFIG, "model.safetensors": layers(len(name), entries=4096)})
    hub.accounts["hf_reads"] = Account(role="read")
    ran = run_on(user, ["edit", "org/base2", "org/ft2", "-o", "new", "--push-to", "org/made"], token="hf_reads")
    assert ran.code == 8
    assert not (user.home.parent / "new").exists()
    assert sum(request.nbytes for request in hub.kinds("content")) <= 2 * 65536
    assert len(hub.holds("org/ft2")["model.safetensors"]) > 2**20


@pytest.mark.slow
def test_a_card_that_the_hub_does_not_take(hub: HubServer, user: User) -> None:
    """What is wrong with it is said; with it corrected, the push ends well."""
    (out_of(user) / "README.md").write_text("---\nlicense: [mit, x]\n---\n")
    ran = run_on(user, ["push", "out", "org/made"])
    assert (ran.code, '"license" must be a string' in ran.err) == (8, True), ran.err
    (out_of(user) / "README.md").write_text("---\nlicense: mit\n---\n")
    assert run_on(user, ["push", "out", "org/made"]).code == 0


@pytest.mark.slow
def test_a_file_that_does_not_arrive(hub: HubServer, user: User) -> None:
    """A repository that ignores a file is not taken for one that holds it."""
    hub.push("org/made", {".gitattributes": b"", ".gitignore": b"*.safetensors"})
    hub.repositories["org/made"].ignored.add("model.safetensors")
    ran = run_on(user, ["push", "out", "org/made"])
    assert (ran.code, "model.safetensors: is missing" in ran.err, ".gitignore" in ran.err) == (8, True, True)


@pytest.mark.slow
def test_an_output_that_changes_meanwhile(hub: HubServer, user: User) -> None:
    """An output that another run replaces while it is sent is not taken for what was sent."""
    path = out_of(user) / "model.safetensors"
    hub.faults = {"commit": Fault(503, times=1, happens=lambda: os.utime(path, (1, 1)))}
    ran = run_on(user, ["push", "out", "org/made"])
    assert (ran.code, "was changed while it was pushed" in ran.err) == (8, True)


# --- stopped half-way ---


def many_shards(user: User) -> Path:
    made = run_on(user, ["edit", "org/base", "org/ft", "-o", "sharded", "--max-shard-size", "5kB"])
    assert made.code == 0, made.err
    return user.home.parent / "sharded"


@pytest.mark.slow
def test_killed_half_way_and_resumed(hub: HubServer, user: User) -> None:
    """A push that is killed leaves no commit behind; the next sends only the files that had not arrived."""
    folder = many_shards(user)
    shards = {hashlib.sha256(file.read_bytes()).hexdigest(): file.name for file in folder.glob("*.safetensors")}
    assert len(shards) == 4
    pids: list[int] = []

    def kill() -> None:
        """Once others have arrived; several are sent at once."""
        until = time.monotonic() + 60
        while len(sent(hub)) < 2:
            assert time.monotonic() < until
            time.sleep(0.01)
        with suppress(ProcessLookupError):  # another request did
            os.kill(pids[0], signal.SIGKILL)

    hub.faults = {"upload": Fault(None, after=2, happens=kill)}
    environment = {"HF_HOME": str(user.home), "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
    program = forked.command("push", "sharded", "org/made")
    with forked.Forked(program, env=os.environ | environment, cwd=folder.parent, fresh=["huggingface_hub"]) as fork:
        pids.append(fork.pid)
        assert fork.wait() == -signal.SIGKILL
    assert hub.holds("org/made").keys() == {".gitattributes"}
    hub.faults = {}
    assert run_on(user, ["push", "sharded", "org/made"]).code == 0
    assert sorted(shards[oid] for oid in sent(hub)) == sorted(shards.values())  # each of them once
    there = dict(hub.holds("org/made"))
    del there[".gitattributes"]
    assert there == contents(folder)


@pytest.mark.slow
def test_interrupted_and_resumed(hub: HubServer, user: User) -> None:
    """Ctrl-C while an edit is pushed: the output is in place, the exit code is the signal's, and the hint goes on."""
    pids: list[int] = []
    hub.faults = {"upload": Fault(500, happens=lambda: os.kill(pids[0], signal.SIGINT))}
    environment = {"HF_HOME": str(user.home), "HF_ENDPOINT": hub.url, "HF_TOKEN": hub.token, "HF_HUB_DISABLE_XET": "1"}
    program = forked.command("edit", "org/base", "org/ft", "-o", "new", "--push-to", "org/made")
    with forked.Forked(program, env=os.environ | environment, cwd=user.home.parent, fresh=["huggingface_hub"]) as fork:
        pids.append(fork.pid)
        out, err = fork.communicate()
    assert fork.returncode == 130, err
    assert "output  new" in out
    assert "while new was pushed; on the disk it is whole" in err
    assert "lines push new org/made" in err
    hub.faults = {}
    assert run_on(user, ["inspect", "new", "--check"], ["push", "new", "org/made"]).code == 0


@pytest.mark.slow
def test_a_large_file_in_parts(hub: HubServer, user: User) -> None:
    """Where the storage takes a file in parts, it is sent so, and put together again."""
    hub.part = 5000
    assert run_on(user, ["push", "out", "org/made"]).code == 0
    assert len(sent(hub)) > 2
    assert hub.holds("org/made")["model.safetensors"] == (out_of(user) / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_half_a_push_of_ours_is_no_stranger(hub: HubServer, user: User) -> None:
    """What a client commits in several steps, and was stopped between, is ours by its content."""
    weights = (out_of(user) / "model.safetensors").read_bytes()
    hub.push("org/made", {".gitattributes": b"", "model.safetensors": weights})
    assert run_on(user, ["push", "out", "org/made"]).code == 0
    hub.push("org/made2", {".gitattributes": b"", "model.safetensors": weights[:-1] + b"x"})
    assert run_on(user, ["push", "out", "org/made2"]).code == 8


@pytest.mark.slow
def test_from_python(hub: HubServer, user: User) -> None:
    """`lines.push` and `lines.edit(push_to=...)` return what `--json` prints."""

    def program() -> None:
        import lines_cli as lines

        first = lines.push("out", "org/made", private=True)
        second = lines.edit("org/base", "org/ft", "new", push_to="org/new")
        try:
            lines.push("out", "others/made")
        except lines.LinesError as error:
            print(json.dumps([first, second["pushed"], error.exit_code]))

    done = user.runs(program, HF_TOKEN=hub.token)
    assert done.returncode == 0, done.stderr
    first, second, code = json.loads(done.stdout)
    assert list(first) == ["schema", "lines", "dry_run", "output", "pushed"]
    assert first["pushed"]["commit"] == hub.repositories["org/made"].refs["main"]
    assert second["commit"] == hub.repositories["org/new"].refs["main"]
    assert code == 8


@pytest.mark.slow
def test_paths_in_the_recipe_are_named(hub: HubServer, user: User) -> None:
    """That a recipe names inputs by paths, which nobody can follow from the Hub, is said; its commit has their last
    part alone.
    """
    base = user.home.parent / "somewhere" / "base"
    base.mkdir(parents=True)
    (base / "config.json").write_bytes(CONFIG)
    (base / "model.safetensors").write_bytes(layers(1))
    ran = run_on(user, ["edit", str(base), "org/ft", "-o", "new"], ["push", "new", "org/made"])
    assert ran.code == 0, ran.err
    assert re.search(r"names inputs by paths.*somewhere/base", ran.err)
    repository = hub.repositories["org/made"]
    assert "`base`" in repository.said[repository.refs["main"]][1]
    assert "somewhere" not in repository.said[repository.refs["main"]][1]
