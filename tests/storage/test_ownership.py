"""Whose is it? Runs that meet, what comes to a destination meanwhile, and what others keep where `lines` works."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.errors import as_argument
from lines_cli.storage import destination, renames, staging
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import written_line
from support import forked, race
from support.crossed import by_turns, crossed
from support.files import snapshot, write_checkpoint
from support.run import run_lines

STAGING = ".out.lines"
EDIT = ["edit", "base", "ft", "-o", "out"]


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pair, where we are."""
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(3000, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "tiny"})
    (tmp_path / "ft" / "vocab.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stopped(monkeypatch: pytest.MonkeyPatch, *command: str, error: BaseException | None = None) -> Any:
    """A run that is stopped when all its weights are written, before they are flushed."""
    with monkeypatch.context() as patch:

        def sync(_: NewFile) -> None:
            raise error or KeyboardInterrupt

        patch.setattr(NewFile, "sync", sync)
        ran = run_lines(*command)
    assert ran.code != 0
    assert ran.trace == ""
    return ran


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], Any]) -> None:
    """Have something happen while a run writes: before it looks a last time at what it replaces."""
    refuse = staging.Staging._refuse_torn

    def acting(self: staging.Staging) -> None:
        refuse(self)
        act()

    monkeypatch.setattr(staging.Staging, "_refuse_torn", acting)


# --- runs that meet ---


def raced(folder: Path, number: int, seconds: float) -> Counter[str]:
    """What so many processes have seen that write one destination."""
    with contextlib.ExitStack() as stack:
        programs = [functools.partial(race.main, folder, seconds, n / 10) for n in range(number)]
        running = [stack.enter_context(forked.Forked(program)) for program in programs]
        told = [process.communicate(timeout=seconds + 120)[0] for process in running]
    assert not any(process.returncode for process in running)
    seen = Counter[str]()
    for one in told:
        seen.update(json.loads(one))
    return seen


@pytest.mark.parametrize(("number", "seconds"), [(3, 1), pytest.param(5, 60, marks=pytest.mark.slow)])
def test_runs_into_one_destination(number: int, seconds: float, models: Path) -> None:
    """Each publishes a whole output or is refused; none loses a file under its feet."""
    seen = raced(models, number, seconds)
    known = {f"refused: {words}" for words in race.ALLOWED}
    known |= {"published", "seen whole", "seen replaced", "seen absent"}
    assert seen.keys() <= known, seen
    assert seen["published"] >= 5
    assert seen["seen whole"] >= 5
    assert race.whole(models / "out") == "whole"
    assert not list(models.glob(".*")), "nothing is left beside it"
    print(seen)


class Vanishing:
    """While the block runs, a path is removed just before the system is asked for the so-manieth time about it or what
    is in it; `asked` says how often it was.
    """

    def __init__(self, path: Path, at: int) -> None:
        self.path, self.at, self.asked = str(path), at, 0

    def __enter__(self) -> Vanishing:
        self._patch = pytest.MonkeyPatch()
        for name in ("stat", "lstat", "listdir", "scandir", "open", "access"):
            self._patch.setattr(os, name, self._watched(getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _watched(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def asking(path: Any = ".", *args: Any, **more: Any) -> Any:
            if not isinstance(path, int) and f"{os.path.abspath(os.fspath(path))}/".startswith(f"{self.path}/"):
                self.asked += 1
                if self.asked == self.at:
                    self._patch.undo()
                    shutil.rmtree(self.path)
            return real(path, *args, **more)

        return asking


def test_a_leftover_that_goes_while_it_is_looked_at(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At whatever moment another run removes it: then there is nothing left, or what was seen before."""
    stopped(monkeypatch, *EDIT)
    shutil.copytree(models / STAGING, models / "kept")
    whole = staging.leftover(Path("out"))
    assert whole is not None
    at, found = 1, set()
    while True:
        with Vanishing(models / STAGING, at) as vanishing:
            found.add(staging.leftover(Path("out")) is None)
        if vanishing.asked < at:
            break
        at += 1
        shutil.copytree(models / "kept", models / STAGING, dirs_exist_ok=True)
    assert at > 20
    assert True in found


def test_a_destination_that_goes_while_it_is_looked_at(models: Path) -> None:
    """Where folders cannot be exchanged, another run moves the old output away for a moment: that is no refusal."""
    assert run_lines(*EDIT).code == 0
    (models / "out").rename(models / "kept")
    at = 1
    while True:
        shutil.copytree(models / "kept", models / "out", dirs_exist_ok=True)
        with Vanishing(models / "out", at) as vanishing:
            destination.check_destination(Path("out"), inputs=[], nbytes=0, force=True)
        if vanishing.asked < at:
            break
        at += 1
    assert at > 3


def test_a_folder_that_does_not_come_to_rest(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where names come and go at each look, another run is writing, even if its lock is not met."""
    (models / STAGING).mkdir()

    def other(*_: Any) -> None:
        (models / STAGING / "new").mkdir()
        (models / STAGING / "new").rmdir()
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(models / STAGING / "new"))

    monkeypatch.setattr(staging, "_ours", other)
    monkeypatch.setattr(staging, "_PATIENCE", 0.1)
    for command in (EDIT, [*EDIT, "--force"], [*EDIT, "--dry-run"], ["clean", "out"]):
        ran = run_lines(*command)
        assert (ran.code, ran.trace) == (6, "")
        assert "another run is writing it" in ran.err
        assert "cannot be written" not in ran.err


def test_what_is_torn_is_looked_at_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of one run beside the files of the next is nobody's fault; what stands still is refused as it is."""
    ours, looks = staging._ours, []

    def torn(*args: Any) -> Any:
        looks.append(1)
        if len(looks) == 1:
            (models / STAGING).mkdir()
            (models / STAGING / "mine.txt").touch()
            try:
                return ours(*args)
            finally:
                shutil.rmtree(models / STAGING)
        return ours(*args)

    monkeypatch.setattr(staging, "_ours", torn)
    assert staging.leftover(Path("out")) is None
    assert len(looks) == 2
    (models / STAGING).mkdir()
    (models / STAGING / "mine.txt").touch()
    ran = run_lines(*EDIT)
    assert (ran.code, "mine.txt" in ran.err, "another run" in ran.err) == (6, True, False)


def test_a_folder_that_goes_while_it_is_made(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found there and gone the next moment: it is made again."""
    mkdir, gone = Path.mkdir, []

    def racing(path: Path, *args: Any, **more: Any) -> None:
        if path.name == STAGING and not gone:
            gone.append(path)
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        mkdir(path, *args, **more)

    monkeypatch.setattr(Path, "mkdir", racing)
    ran = run_lines(*EDIT)
    assert (ran.code, ran.trace, len(gone)) == (0, "", 1), ran.err


def test_the_lock_goes_last(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a run's folder is removed, another finds it locked, to its last file."""
    held = []
    unlink = Path.unlink

    def watched(path: Path, *args: Any, **kwargs: Any) -> None:
        if STAGING in path.parts and path.name != "lock":
            held.append(staging.is_locked(models / STAGING))
        unlink(path, *args, **kwargs)

    monkeypatch.setattr(Path, "unlink", watched)
    monkeypatch.setattr("lines_cli.storage.lock._PATIENCE", 0.0)
    assert run_lines(*EDIT).code == 0
    assert held
    assert all(held)


@pytest.mark.parametrize("what", ["lost", "another", "stranger", "lock"])
def test_nothing_is_published_but_what_was_written(what: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every planned file is there, by name and inode, and no other; else nothing is put into place."""
    refuse = staging.Staging._refuse_torn
    new = models / STAGING / "new"

    def act(self: staging.Staging) -> None:
        match what:
            case "lost":
                (new / "vocab.txt").unlink()
            case "another":
                shutil.copy(new / "model.safetensors", new / "copy")
                os.replace(new / "copy", new / "model.safetensors")
            case "stranger":
                (new / "theirs.txt").write_text("precious")
            case "lock":
                os.replace(models / STAGING, models / "gone")
                shutil.copytree(models / "gone", models / STAGING)
        refuse(self)

    monkeypatch.setattr(staging.Staging, "_refuse_torn", act)
    ran = run_lines(*EDIT)
    assert (ran.code, ran.trace) == (6, "")
    assert {"lost": "vocab.txt", "another": "model.safetensors", "stranger": "theirs.txt", "lock": STAGING}[
        what
    ] in ran.err
    assert not (models / "out").exists()


# --- what comes to the destination meanwhile ---


@pytest.mark.parametrize("exchanges", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("what", ["added", "in a folder", "changed", "replaced"])
def test_what_arrives_while_it_writes_is_not_deleted(
    what: str, exchanges: bool, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An evaluation's results in the old output: refused, named, kept for --resume, which runs once they are away."""
    assert run_lines(*EDIT).code == 0
    out = models / "out"

    def act() -> None:
        match what:
            case "added":
                (out / "results.json").write_text("{}")
            case "in a folder":
                (out / "logs").mkdir()
                (out / "logs" / "run.txt").write_text("x")
            case "changed":
                (out / "vocab.txt").write_text("mine")
            case "replaced":
                os.rename(out, models / "moved")
                shutil.copytree(models / "moved", out)

    with monkeypatch.context() as patch:
        meanwhile(patch, act)
        if not exchanges:
            patch.setattr(staging, "exchange", lambda *_: False)
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert {"added": "results.json", "in a folder": "logs", "changed": "vocab.txt", "replaced": "config.json"}[
        what
    ] in ran.err
    assert "--resume" in ran.err
    after = snapshot(out)
    if what == "added":
        assert after["results.json"] == b"{}"
        assert run_lines(*EDIT, "--alpha", "0.5", "--force", "--resume").code == 6, "it is still there"
        (out / "results.json").unlink()
    elif what == "in a folder":
        shutil.rmtree(out / "logs")
    flags = ["--force", "--resume"]
    if what in (
        "changed",
        "replaced",
    ):  # what is new cannot be told from what was there: it takes a run that begins anew
        ran = run_lines(*EDIT, "--alpha", "0.5", *flags)
        assert (ran.code, ran.trace) == (6, "")
        assert "without --resume" in ran.err
        assert snapshot(out) == after
        flags = ["--force"]
    ran = run_lines(*EDIT, "--alpha", "0.5", *flags)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert snapshot(out)["lines_recipe.yaml"] != after["lines_recipe.yaml"]
    assert not (models / STAGING).exists()


@pytest.mark.parametrize("flags", [[], ["--force"]])
@pytest.mark.parametrize("kind", ["folder", "file", "link", "lone file"])
def test_an_output_that_appears_meanwhile(
    kind: str, flags: list[str], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was not there when the run began is not replaced, --force or not."""
    name = "out.safetensors" if kind == "lone file" else "out"
    there = models / name

    def act() -> None:
        if kind == "folder":
            write_checkpoint(there, {"w": torch.ones(3)})
        elif kind == "link":
            there.symlink_to(models / "nowhere")
        else:
            there.write_text("precious")

    command = ["edit", "base", "ft", "-o", name, *flags]
    with monkeypatch.context() as patch:
        meanwhile(patch, act)
        ran = run_lines(*command)
    assert (ran.code, ran.trace) == (6, "")
    assert "was created" in ran.err
    assert os.path.lexists(there)
    assert kind not in ("file", "lone file") or there.read_text() == "precious"
    shutil.rmtree(there) if kind == "folder" else there.unlink()
    assert run_lines(*command, "--resume").code == 0


def test_what_arrives_at_the_last_moment_is_put_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the last look and the exchange: what came out is looked at again, and changes back."""
    assert run_lines(*EDIT).code == 0
    change = renames.exchange
    made = []

    def late(one: Path, other: Path) -> bool:
        if not made:
            (models / "out" / "results.json").write_text("{}")
            made.append(True)
        return change(one, other)

    monkeypatch.setattr(staging, "exchange", late)
    ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert (models / "out" / "results.json").read_text() == "{}"
    assert "as it was" not in ran.err


def test_what_arrives_in_the_old_output_once_it_is_replaced(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that stands in the old folder goes on writing there: that is kept, and told."""
    assert run_lines(*EDIT).code == 0
    remove = staging.Staging._remove_old

    def late(self: staging.Staging) -> None:
        (models / STAGING / "new" / "results.json").write_text("{}")
        remove(self)

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "_remove_old", late)
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert (ran.code, ran.trace) == (0, "")
    assert "results.json" in ran.err
    assert (models / STAGING / "new" / "results.json").read_text() == "{}"
    assert run_lines("clean", "out").code == 6, "it is not ours"
    (models / STAGING / "new" / "results.json").unlink()
    assert run_lines("clean", "out").code == 0
    assert not (models / STAGING).exists()


# --- what --force may replace ---

PROJECT: dict[str, str] = {
    "train.py": "print()",
    "dataset.pkl": "x",
    "optimizer.pt": "x",
    "eval_results.json": "{}",
    "runs/1/log.txt": "x",
    "empty/": "",
    ".gitignore": "*",
    "notes.md": "x",
    "checkpoint-100/model.safetensors": "x",
    "tokenizer.json": "{}",
    "stray.safetensors": "x",
    "LICENSE": "x",
}


def put(folder: Path, name: str, content: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if name.endswith("/"):
        (folder / name).mkdir()
    else:
        (folder / name).write_text(content)


@by_turns(name=PROJECT, ours=[True, False])
def test_a_project_is_no_checkpoint(name: str, ours: bool, models: Path) -> None:
    """Whatever else stands beside the weights is named, and nothing is deleted."""
    if ours:
        assert run_lines(*EDIT).code == 0
    else:
        write_checkpoint(models / "out", {"w": torch.ones(3)}, config={})
    put(models / "out", name, PROJECT[name])
    before = snapshot(models)
    for flags in (["--force"], ["--force", "--dry-run"], ["--force", "--resume"]):
        ran = run_lines(*EDIT, "--alpha", "0.5", *flags)
        assert (ran.code, ran.trace) == (6, "")
        assert name.split("/", maxsplit=1)[0] in ran.err
        assert "--force will not" in ran.err
    assert snapshot(models) == before


def test_a_readme_without_a_recipe_is_a_persons(models: Path) -> None:
    """And so is a recipe without a record."""
    for name in ("README.md", "lines_recipe.yaml"):
        write_checkpoint(models / "out", {"w": torch.ones(3)})
        (models / "out" / name).write_text("base_model: x\n")
        ran = run_lines(*EDIT, "--force")
        assert (ran.code, ran.trace) == (6, "")
        assert name in ran.err
        shutil.rmtree(models / "out")


HOW = ["edited", "emptied", "a link", "a link to the same", "listed among the files", "another recipe", "no record"]


@pytest.mark.parametrize("how", HOW)
def test_a_model_card_that_a_person_edited_is_theirs(how: str, models: Path) -> None:
    """--force names it, replaces nothing, and goes on once it is out of the folder. The same for a dry run."""
    assert run_lines(*EDIT).code == 0
    card, recipe = models / "out" / "README.md", models / "out" / "lines_recipe.yaml"
    written = card.read_bytes()
    match how:
        case "edited":
            card.write_bytes(written.replace(b"lines", b"LINES", 1))
        case "emptied":
            card.write_bytes(b"")
        case "a link":
            (models / "card.md").write_text("mine")
            card.unlink()
            card.symlink_to(models / "card.md")
        case "a link to the same":
            card.rename(models / "card.md")
            card.symlink_to(models / "card.md")
        case "listed among the files":
            card.write_bytes(b"mine")
            recipe.write_text(recipe.read_text() + '  README.md: {bytes: 1, digest: "x"}\n')
        case "another recipe":
            recipe.write_text("# Written by lines 9.9.9. It may say what this version does not know.\nnew: key\n")
        case "no record":
            values = yaml.safe_load(recipe.read_text())
            del values["card"]
            recipe.write_text(yaml.safe_dump(values))
    before = snapshot(models)
    for flags in (["--force"], ["--force", "--dry-run"], ["--force", "--resume"]):
        ran = run_lines(*EDIT, "--alpha", "0.5", *flags)
        assert (ran.code, ran.trace) == (6, "")
        assert "README.md (a model card, of which nothing records that it is as lines wrote it)" in ran.err
        assert "Move" in ran.err
    assert snapshot(models) == before
    os.rename(card, models / "mine.md")
    (models / "out" / "vocab.txt").write_text("other files are made from the inputs, so an edit is made there")
    if how == "another recipe":
        (models / "out" / "vocab.txt").unlink()
    assert run_lines(*EDIT, "--force").code == 0
    assert card.read_bytes() == written
    assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 0, "the card that is there is ours again"


@pytest.mark.parametrize(("output", "named"), [("my out", "'my out'"), ("-nb", "./-nb"), ("--x y", "'./--x y'")])
def test_commands_in_hints_can_be_run(output: str, named: str) -> None:
    """Whatever the output is called."""
    assert as_argument(Path(output)) == named


def test_a_model_card_that_is_edited_while_it_writes(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks it is seen by its time; the run that resumes sees what it holds."""
    assert run_lines(*EDIT).code == 0
    card = models / "out" / "README.md"
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: card.write_bytes(b"mine"))
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert "README.md" in ran.err
    assert card.read_bytes() == b"mine"
    for flags in (["--force", "--resume"], ["--force"]):
        assert run_lines(*EDIT, "--alpha", "0.5", *flags).code == 6
        assert card.read_bytes() == b"mine"
    os.rename(card, models / "mine.md")
    assert run_lines(*EDIT, "--alpha", "0.5", "--force", "--resume").code == 0


def test_a_recipe_elsewhere_lists_nothing(models: Path) -> None:
    """A link to another's recipe, out of the folder, does not say what is ours in it."""
    assert run_lines("edit", "base", "ft", "-o", "far").code == 0
    write_checkpoint(models / "out", {"w": torch.ones(3)})
    (models / "out" / "vocab.txt").write_text("mine")
    (models / "out" / "lines_recipe.yaml").symlink_to(models / "far" / "lines_recipe.yaml")
    (models / "ft" / "vocab.txt").unlink()
    before = snapshot(models / "out")
    ran = run_lines(*EDIT, "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert "vocab.txt" in ran.err
    assert snapshot(models / "out") == before


def test_what_the_recipe_lists_may_be_replaced(models: Path) -> None:
    """An output of more shards, with a tokenizer that the next one lacks; a name in it that leads out helps nobody."""
    (models / "ft" / "1_Pooling").mkdir()
    (models / "ft" / "1_Pooling" / "config.json").write_text("{}")
    assert run_lines(*EDIT, "--max-shard-size", "13000").code == 0
    assert (models / "out" / "1_Pooling" / "config.json").exists()
    (models / "ft" / "vocab.txt").unlink()
    shutil.rmtree(models / "ft" / "1_Pooling")
    assert run_lines(*EDIT, "--force").code == 0
    names = ["README.md", "config.json", "lines_recipe.yaml", "model.safetensors"]
    assert sorted(snapshot(models / "out")) == names
    recipe = yaml.safe_load((models / "out" / "lines_recipe.yaml").read_text())
    recipe["files"]["../base/config.json"] = recipe["files"]["config.json"]
    (models / "out" / "lines_recipe.yaml").write_text(yaml.safe_dump(recipe))
    before = snapshot(models / "base")
    assert run_lines(*EDIT, "--force").code == 0
    assert snapshot(models / "base") == before


def test_a_link_in_an_output_is_removed_and_not_followed(models: Path) -> None:
    """A weight file that is a link: the link goes, what it leads to stays. A linked folder is not ours."""
    assert run_lines(*EDIT).code == 0
    (models / "far").mkdir()
    os.rename(models / "out" / "vocab.txt", models / "far" / "vocab.txt")
    (models / "out" / "vocab.txt").symlink_to(models / "far" / "vocab.txt")
    (models / "out" / "folder").symlink_to(models / "far")
    assert run_lines(*EDIT, "--force").code == 6
    (models / "out" / "folder").unlink()
    assert run_lines(*EDIT, "--force").code == 0
    assert (models / "far" / "vocab.txt").read_text() == "a\nb\n"


# --- other people's files where it works ---


def a_file() -> None:
    Path(STAGING).write_text("precious")


def a_link() -> None:
    Path("far").mkdir()
    Path("far", "precious.txt").write_text("x")
    Path(STAGING).symlink_to("far")


def a_dangling_link() -> None:
    Path(STAGING).symlink_to("nowhere")


def a_folder_of_theirs() -> None:
    Path(STAGING).mkdir()
    Path(STAGING, "precious.txt").write_text("x")


def beside_a_leftover() -> None:
    Path(STAGING, "precious.txt").write_text("x")


def in_new() -> None:
    Path(STAGING, "new", "precious.txt").write_text("x")


def a_linked_new() -> None:
    Path("far").mkdir()
    Path("far", "precious.txt").write_text("x")
    shutil.rmtree(Path(STAGING, "new"))
    Path(STAGING, "new").symlink_to(Path("far").resolve())


def a_linked_weight_file() -> None:
    Path("precious.txt").write_text("x")
    Path(STAGING, "new", "model.safetensors").unlink()
    Path(STAGING, "new", "model.safetensors").symlink_to(Path("precious.txt").resolve())


def a_diary() -> None:
    Path(STAGING, "journal").write_text("Dear diary\n")


def a_pipe() -> None:
    Path(STAGING, "journal").unlink()
    os.mkfifo(Path(STAGING, "journal"))


def a_linked_journal() -> None:
    Path(STAGING, "journal").unlink()
    Path(STAGING, "journal").symlink_to("/dev/zero")


def a_dangling_lock() -> None:
    Path(STAGING, "lock").unlink()
    Path(STAGING, "lock").symlink_to(Path("made_by_it").resolve())


def a_lock_that_is_a_pipe() -> None:
    Path(STAGING, "lock").unlink()
    os.mkfifo(Path(STAGING, "lock"))


def a_lock_with_something_in_it() -> None:
    Path(STAGING, "lock").write_text("12345")


FOREIGN = [a_file, a_link, a_dangling_link, a_folder_of_theirs]
IN_A_LEFTOVER = [
    *(beside_a_leftover, in_new, a_linked_new, a_linked_weight_file, a_diary, a_pipe, a_linked_journal),
    *(a_dangling_lock, a_lock_that_is_a_pipe, a_lock_with_something_in_it),
]


@pytest.mark.parametrize("what", [*FOREIGN, *IN_A_LEFTOVER])
def test_what_is_not_ours_is_left_alone(
    what: Callable[[], None], models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where `lines` keeps unfinished output stands something else: every command refuses it, by name, and at once."""
    if what in IN_A_LEFTOVER:
        stopped(monkeypatch, *EDIT)
    what()
    before = snapshot(models) if what not in (a_pipe, a_lock_that_is_a_pipe) else None
    for command in (EDIT, [*EDIT, "--resume"], [*EDIT, "--force"], [*EDIT, "--dry-run"], ["clean", "out"]):
        ran = run_lines(*command)
        assert (ran.code, ran.trace) == (6, ""), command
        assert STAGING in ran.err
    assert before is None or snapshot(models) == before
    assert not Path("made_by_it").exists()
    assert not Path("out").exists()


def test_a_file_that_a_backup_shares_is_not_written_to(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`cp -al` of a leftover: what is gone on from is a file of our own."""
    stopped(monkeypatch, *EDIT)
    kept = models / "backup.safetensors"
    os.link(models / STAGING / "new" / "model.safetensors", kept)
    before = kept.read_bytes()
    with open(models / STAGING / "new" / "model.safetensors", "r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\1")
    before = kept.read_bytes()
    assert run_lines(*EDIT, "--resume").code == 0
    assert kept.read_bytes() == before
    assert run_lines("inspect", "out", "--check").code == 0


def test_what_was_set_aside_does_not_replace_what_came_since(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run was killed between two renames; somebody put something else there: both stay, and are named."""
    assert run_lines(*EDIT).code == 0
    old = snapshot(models / "out")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", lambda *_: False)
        patch.setattr(staging.Staging, "__exit__", lambda self, *_: self._lock.release())
        patch.setattr(staging, "_bring_back", lambda *_: None)
        rename = os.rename

        def killed(source: Any, target: Any) -> None:
            if Path(target).name == "out":
                raise KeyboardInterrupt
            rename(source, target)

        patch.setattr(os, "rename", killed)
        assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 130
    assert snapshot(models / STAGING / "old") == old
    for flags, code in (([], 6), (["--force"], 0)):
        ran = run_lines(*EDIT, "--dry-run", *flags)
        assert (ran.code, ran.trace) == (code, "")
        assert "the old" in ran.err
    assert snapshot(models / STAGING / "old") == old, "--dry-run puts nothing back"
    (models / "out").mkdir()
    (models / "out" / "theirs.txt").write_text("x")
    for command in (EDIT, [*EDIT, "--force", "--resume"], ["clean", "out"]):
        ran = run_lines(*command)
        assert (ran.code, ran.trace) == (6, "")
        assert "theirs.txt" in ran.err
    shutil.rmtree(models / "out")
    assert run_lines("clean", "out").code == 0
    assert snapshot(models / "out") == old


# --- journals and leftovers that are a stranger's ---


def planted(names: list[str], old: list[str]) -> None:
    """A leftover from an archive or a shared folder, its journal with right checksums."""
    Path(STAGING, "new").mkdir(parents=True)
    lines_ = [{"run": {}}, {"names": names}, {"publishing": [1, 2], "old": old}]
    Path(STAGING, "journal").write_bytes(b"".join(map(written_line, lines_)))


@crossed(
    where=["names", "old"],
    name=["{here}/home/thesis.tex", "../../home/thesis.tex", "a/../../../home/thesis.tex", "a\0b"],
    command=[EDIT, [*EDIT, "--force"], ["clean", "out"]],
)
def test_a_journal_steers_no_removal(name: str, where: str, command: list[str], models: Path) -> None:
    """What it names outside of its folder is not looked for, be its checksums right."""
    (models / "home").mkdir()
    (models / "home" / "thesis.tex").write_text("precious")
    name = name.format(here=models)
    planted([name] if where == "names" else [], [name] if where == "old" else [])
    ran = run_lines(*command)
    assert ran.trace == ""
    assert (models / "home" / "thesis.tex").read_text() == "precious"


def test_a_link_in_a_leftover_is_not_followed(models: Path) -> None:
    """Where a run has made a folder stands a link: it is refused, or it goes; what it leads to stays."""
    (models / "victim").mkdir()
    (models / "victim" / "config.json").write_text("precious")
    planted(["1_Pooling/config.json"], ["1_Pooling", "1_Pooling/config.json"])
    Path(STAGING, "new", "1_Pooling").symlink_to(models / "victim")
    for command in (EDIT, ["clean", "out"]):
        assert run_lines(*command).trace == ""
        assert (models / "victim" / "config.json").read_text() == "precious"


def test_a_folder_without_a_journal_is_not_emptied(models: Path) -> None:
    """Be its files called as ours."""
    Path(STAGING, "new").mkdir(parents=True)
    Path(STAGING, "new", "model.safetensors").write_text("precious")
    for command in (EDIT, [*EDIT, "--resume"], ["clean", "out"]):
        assert run_lines(*command).code == 6
    assert Path(STAGING, "new", "model.safetensors").read_text() == "precious"


@pytest.mark.parametrize("content", [b"", b"\0" * 500, b'{"run":{"a"', None])
def test_a_journal_after_a_power_cut(content: bytes | None, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its length without its lines, or a part of it: the same command begins anew; clean says what to do."""
    stopped(monkeypatch, *EDIT)
    journal = models / STAGING / "journal"
    journal.write_bytes(journal.read_bytes().replace(b"lines", b"Lines", 1) if content is None else content)
    ran = run_lines("clean", "out")
    assert (ran.code, ran.trace) == (6, "")
    assert "damaged" in ran.err
    assert "by hand" in ran.err
    ran = run_lines(*EDIT, "--resume")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert not (models / STAGING).exists()


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
def test_a_second_look_that_fails(error: BaseException, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came out of the exchange cannot be looked at: it goes back, whatever it is."""
    assert run_lines(*EDIT).code == 0
    before = snapshot(models / "out")
    look = staging.survey

    def failing(folder: Path) -> Any:
        recipe = folder / "lines_recipe.yaml"
        if STAGING in folder.parts and recipe.exists() and recipe.read_bytes() == before["lines_recipe.yaml"]:
            raise error
        return look(folder)

    with monkeypatch.context() as patch:
        patch.setattr(staging, "survey", failing)
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert ran.code == (6 if isinstance(error, OSError) else 130)
    assert snapshot(models / "out") == before
    assert run_lines(*EDIT, "--alpha", "0.5", "--force", "--resume").code == 0


def test_finished_with_another_run_s_leftover(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume of what is finished does not remove what another run has begun."""
    assert run_lines(*EDIT).code == 0
    stopped(monkeypatch, *EDIT, "--alpha", "0.5", "--force")
    ran = run_lines(*EDIT, "--resume")
    assert (ran.code, ran.trace) == (0, "")
    assert STAGING in ran.err
    assert (models / STAGING / "new" / "model.safetensors").exists()


def test_a_lone_file_killed_once_it_was_in_place(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume says that it is finished, and removes what is left."""
    command = ["edit", "base", "ft", "-o", "out.safetensors"]
    assert run_lines(*command).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "__exit__", lambda self, *_: self._lock.release())
        assert run_lines(*command, "--alpha", "0.5", "--force").code == 0
    ran = run_lines(*command, "--alpha", "0.5", "--resume")
    assert (ran.code, ran.trace) == (0, "")
    assert "finished" in ran.err
    assert not list(models.glob(".*"))


def test_a_folder_that_was_moved_away_is_not_discarded(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another's leftover stands where ours was: a run that fails touches it not."""
    from lines_cli.errors import ChangedInputError

    def swapped(self: NewFile) -> None:
        os.rename(models / STAGING, models / "moved")
        planted(["model.safetensors"], [])
        raise ChangedInputError("changed")

    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "sync", swapped)
        assert run_lines(*EDIT).code == 3
    assert (models / STAGING / "journal").exists()


def test_private_stays_private(models: Path) -> None:
    """An output that only its owner may read is replaced by such a one."""
    assert run_lines(*EDIT).code == 0
    (models / "out").chmod(0o700)
    assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 0
    assert (models / "out").stat().st_mode & 0o777 == 0o700


def test_what_systems_leave_by_themselves(models: Path) -> None:
    """A desktop's files, and what NFS keeps of a file that is read, are in nobody's way."""
    assert run_lines(*EDIT).code == 0
    for name in (".DS_Store", "._model.safetensors", ".nfs0000000001"):
        (models / "out" / name).write_text("x")
    assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 0


def test_a_lone_file_that_is_none_of_ours(models: Path) -> None:
    """A text under the name of weights, or behind a link of that name, is not replaced."""
    (models / "notes.md").write_text("precious")
    (models / "out.safetensors").symlink_to("notes.md")
    ran = run_lines("edit", "base", "ft", "-o", "out.safetensors", "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert (models / "notes.md").read_text() == "precious"


def test_parents_that_are_not_there_yet(models: Path) -> None:
    """`new/../out` is `out`, before `new` is there, too."""
    assert run_lines(*EDIT).code == 0
    assert run_lines("edit", "base", "ft", "-o", "new/../out").code == 6
    assert run_lines("edit", "base", "ft", "-o", "new/../out", "--force").code == 0


# --- what is kept ---


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_once(number: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that hiccups in the last tensor: what was finished is kept."""
    from lines_cli.engine import input_files, workers, write
    from lines_cli.engine import run as engine

    read, calls = input_files.read_into, []

    def failing(fd: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 8:
            raise OSError(number, os.strerror(number))
        return read(fd, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(input_files, "read_into", failing)
        patch.setattr(engine, "DIGEST_BLOCK", 16384)
        patch.setattr(write, "DIGEST_BLOCK", 16384)
        patch.setattr(staging, "DIGEST_BLOCK", 16384)
        patch.setattr("lines_cli.storage.digest.DIGEST_BLOCK", 16384)
        patch.setattr(workers, "WRITE_SIZE", 4096)
        ran = run_lines(*EDIT, "--workers", "1")
        assert (ran.code, ran.trace) == (3, "")
        assert STAGING in ran.err
        assert "--resume" in ran.err
        patch.setattr(input_files, "read_into", read)
        assert run_lines(*EDIT, "--resume").code == 0
    assert run_lines(*EDIT[:-1], "again").code == 0
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (models / "out" / name).read_bytes() == (models / "again" / name).read_bytes()


def test_a_sidecar_that_goes_in_the_last_second(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside the weights is read first: it is in the output, though it has gone since."""
    meanwhile(monkeypatch, (models / "ft" / "vocab.txt").unlink)
    assert run_lines(*EDIT).code == 0
    assert (models / "out" / "vocab.txt").read_text() == "a\nb\n"


def test_a_sidecar_that_cannot_be_read_is_refused_first(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are written, not after an hour of it."""
    wrote = []
    monkeypatch.setattr(NewFile, "write", lambda *args: wrote.append(args))
    recipe = lines.edit_recipe("base", "ft")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    (models / "ft" / "vocab.txt").unlink()
    with pytest.raises(lines.LinesError, match=r"vocab\.txt"):
        lines.run(plan)
    assert not wrote
    assert not (models / STAGING).exists()


# --- what is said, and when ---


@pytest.mark.durable
@pytest.mark.parametrize("when", ["removing", "parent", "interrupted"])
def test_what_is_said_once_it_is_in_place(when: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the destination is not as it was, and nobody says so."""
    assert run_lines(*EDIT).code == 0
    before = snapshot(models / "out")["model.safetensors"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "removing":
            patch.setattr(staging.Staging, "_remove_old", interrupted)
        elif when == "interrupted":
            change = renames.exchange
            patch.setattr(staging, "exchange", lambda *paths: change(*paths) and interrupted())
        else:
            sync = destination.sync_folder

            def failing(folder: Path) -> None:
                if folder == models and (models / STAGING / "new" / "README.md").exists():
                    raise OSError(errno.EIO, "Input/output error")
                sync(folder)

            patch.setattr(staging, "sync_folder", failing)
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert ran.trace == ""
    assert "as it was" not in ran.err
    assert "is in place" in ran.err or "was in place" in ran.err
    assert ran.code == (6 if when == "parent" else 0)
    assert snapshot(models / "out")["model.safetensors"] != before
    assert run_lines("inspect", "out", "--check").code == 0
    assert run_lines("clean", "out").code == 0
    assert not (models / STAGING).exists()


MOMENTS = {"a few": (0, 2, 4), "the others": (1, 3, 5, 6, 7)}


@pytest.mark.parametrize(
    ("number", "moments"),
    [
        (signal.SIGINT, "a few"),
        pytest.param(signal.SIGTERM, "a few", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "a few", marks=pytest.mark.slow),
        *(
            pytest.param(number, "the others", marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_while_it_starts(number: signal.Signals, moments: str, models: Path) -> None:
    """At any moment of the start and of torch's import: 128 + the signal and a message, never a traceback, an abort, or
    another signal's code.
    """
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lines_cli.__main__ import main\n"
        "from lines_cli.cli import signals; signals.install()\n"
        "print('!', end='', file=sys.stderr, flush=True); sys.argv[0] = 'lines'; main()"
    )
    codes = Counter[int]()
    for step in MOMENTS[moments]:
        command = [sys.executable, "-c", program, "edit", "base", "ft", "-o", "out"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            assert process.stderr.read(1) == b"!"
            time.sleep(step * 0.15)
            process.send_signal(number)
            err = process.stderr.read().decode()
            codes[process.wait(60)] += 1
        assert process.returncode in (128 + number, 0), err
        assert "Traceback" not in err
        if process.returncode:
            assert f"interrupted ({number.name})" in err
            assert not (models / "out").exists()
        shutil.rmtree(models / "out", ignore_errors=True)
        shutil.rmtree(models / STAGING, ignore_errors=True)
    assert codes[128 + number] >= 2


def test_home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output=~/out` is in the home folder, as a shell would have it; so are a recipe, a plot and what is cleaned."""
    monkeypatch.setenv("HOME", str(models / "home"))
    (models / "home").mkdir()
    assert run_lines("edit", "base", "ft", "--output=~/out").code == 0
    assert (models / "home" / "out" / "config.json").exists()
    assert run_lines("merge", "--config=~/out/lines_recipe.yaml", "--output=~/again").code == 0
    assert (models / "home" / "again" / "config.json").exists()
    assert run_lines("inspect", "ft", "--base", "base", "--plot=~/plot.svg").code == 0
    assert (models / "home" / "plot.svg").exists()
    assert "nothing to remove" in run_lines("clean", "~/out").err
    ran = run_lines("edit", "base", "ft", "--output=~nobody-of-that-name/out")
    assert (ran.code, ran.trace) == (2, "")
    assert "nobody-of-that-name" in ran.err
    assert not list(models.glob("~*"))


def test_a_dry_run_writes_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a lock, and a leftover stays as it is; nor does it with --resume where all is finished."""

    def times() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in [models, *models.rglob("*")]}

    before = times()
    assert run_lines(*EDIT, "--dry-run").code == 0
    assert times() == before
    stopped(monkeypatch, *EDIT)
    (models / STAGING / "lock").unlink()
    before = times()
    for flags in ([], ["--resume"], ["--force"], ["--verify"]):
        assert run_lines(*EDIT, "--dry-run", *flags).code == 0
        assert times() == before
    shutil.move(models / STAGING, models / "kept")
    assert run_lines(*EDIT).code == 0
    shutil.move(models / "kept", models / STAGING)
    before = times()
    assert run_lines(*EDIT, "--dry-run", "--resume").code == 0
    assert times() == before


def test_verify_of_what_is_finished(models: Path) -> None:
    """--resume --verify --verify-inputs reads an output that is finished, and its inputs, as it would a new one."""
    flags = ["--resume", "--verify", "--verify-inputs"]
    assert run_lines(*EDIT, "--verify-inputs").code == 0
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (0, "")
    assert "reads back as it was written" in ran.err
    weights = models / "out" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    assert run_lines(*EDIT, "--resume").code == 0, "it is not read, unless asked for"
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (6, "")
    assert "model.safetensors" in ran.err
    weights.write_bytes(content)
    source = models / "ft" / "model.safetensors"
    there = source.stat()
    source.write_bytes(source.read_bytes()[:-1] + b"\1")
    os.utime(source, ns=(there.st_atime_ns, there.st_mtime_ns))
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (3, "")
    assert "ft/model.safetensors" in ran.err
    shutil.rmtree(models / "out")
    assert run_lines(*EDIT).code == 0
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (6, "")
    assert "without --verify-inputs" in ran.err


@contextlib.contextmanager
def overlay(folder: Path, lower: Path) -> Iterator[Path]:
    """A folder whose content comes from an image, as in a container."""
    for name in ("upper", "work", "merged"):
        (folder / name).mkdir()
    options = f"lowerdir={lower},upperdir={folder / 'upper'},workdir={folder / 'work'}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(folder / "merged")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no overlayfs here")
    try:
        yield folder / "merged"
    finally:
        subprocess.run(["umount", str(folder / "merged")], check=True)


@pytest.mark.durable
@pytest.mark.parametrize("what", ["a leftover", "an output", "both"])
def test_folders_that_came_with_an_image(what: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On overlayfs these cannot be renamed or exchanged (EXDEV): their files are moved."""
    if what != "a leftover":
        assert run_lines(*EDIT, "--alpha", "0.5").code == 0
    if what != "an output":
        stopped(monkeypatch, *EDIT, "--force")
    (models / "overlay").mkdir()
    lower = models / "lower"
    lower.mkdir()
    for entry in ("base", "ft", "out", STAGING):
        if (models / entry).exists():
            shutil.move(models / entry, lower / entry)
    with overlay(models / "overlay", lower) as merged:
        monkeypatch.chdir(merged)
        ran = run_lines(*EDIT, "--force")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        assert run_lines("inspect", "out", "--check").code == 0
        assert not list(merged.glob(".*"))
        assert run_lines(*EDIT, "--alpha", "0.7", "--force").code == 0
        monkeypatch.chdir(models)


@pytest.mark.durable
@pytest.mark.parametrize("after", range(1, 8))
def test_killed_while_files_are_moved(after: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder has to be moved file by file, a kill at any of them loses none: the old output comes back."""
    assert run_lines(*EDIT).code == 0
    old = snapshot(models / "out")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", lambda *_: False)
        patch.setattr(staging.Staging, "__exit__", lambda self, *_: self._lock.release())
        patch.setattr(staging, "_bring_back", lambda *_: None)
        rename, move, moved = os.rename, renames.put, []

        def cannot(source: Any, target: Any) -> None:
            if Path(source).name == "out":
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            if Path(target).name == "out":
                raise KeyboardInterrupt
            rename(source, target)

        def killed(source: Path, target: Path) -> None:
            moved.append(source)
            if len(moved) == after:
                raise KeyboardInterrupt
            move(source, target)

        patch.setattr(os, "rename", cannot)
        patch.setattr(renames, "put", killed)
        assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 130
    assert len(snapshot(models / "out") if (models / "out").exists() else {}) == max(0, len(old) - after + 1)
    assert run_lines("clean", "out").code == 0
    assert snapshot(models / "out") == old


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(models: Path) -> None:
    """The soft limit of open files is raised as far as outputs need it, too."""
    tensors = {f"layers.{i}.w": torch.randn(8) for i in range(300)}
    for side in ("base", "ft"):
        write_checkpoint(models / side, tensors, config={"model_type": "tiny"})

    def program() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        forked.command(*EDIT, "--max-shard-size", "32")()

    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1000
    ran = forked.run(program)
    assert ran.returncode == 0, ran.stderr
    assert len(list((models / "out").glob("*.safetensors"))) == 300


@pytest.mark.durable
def test_folders_are_flushed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subfolders of the output and parents that were made for it, too: else their names may be lost with the power."""
    (models / "ft" / "1_Pooling").mkdir()
    (models / "ft" / "1_Pooling" / "config.json").write_text("{}")
    flushed = []
    sync = os.fsync

    def watched(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    assert run_lines("edit", "base", "ft", "-o", "deep/er/out").code == 0
    new = models / "deep" / "er" / STAGING / "new"
    for folder in (models, models / "deep", models / "deep" / "er", new, new / "1_Pooling"):
        assert str(folder) in flushed


@pytest.mark.durable
def test_a_bad_line_ends_the_story(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digit that changed in a journal is noticed: that line and all behind it are made again."""
    assert run_lines(*EDIT).code == 0
    expected = snapshot(models / "out")
    shutil.rmtree(models / "out")
    stopped(monkeypatch, *EDIT)
    journal = models / STAGING / "journal"
    lines_ = journal.read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines_) if b'"blocks"' in line)
    lines_[at] = lines_[at].replace(b'"start":0', b'"start":4')
    journal.write_bytes(b"".join(lines_))
    wrote: list[int] = []
    write = NewFile.write
    monkeypatch.setattr(NewFile, "write", lambda *args: (wrote.append(1), write(*args))[1])
    assert run_lines(*EDIT, "--resume").code == 0
    assert wrote
    assert snapshot(models / "out") == expected


def test_progress_is_told(models: Path) -> None:
    """The library's own user is told of what was left behind."""

    def track(_: str, __: int, done: Iterable[int]) -> Iterable[int]:
        return done

    recipe = lines.edit_recipe("base", "ft")
    outcome = lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path("out")), track=track)
    assert outcome.remarks == ()
