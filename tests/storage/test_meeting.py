"""Runs that meet, and what comes to a destination meanwhile."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lines_cli.storage import destination, renames, staging
from support import forked, race
from support.files import snapshot, write_checkpoint
from support.owning import EDIT, STAGING, meanwhile, stopped
from support.run import run_lines

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


@pytest.mark.slow
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


@pytest.mark.slow
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

    monkeypatch.setattr(staging, "ours", other)
    monkeypatch.setattr(staging, "_PATIENCE", 0.1)
    for command in (EDIT, [*EDIT, "--force"], [*EDIT, "--dry-run"], ["clean", "out"]):
        ran = run_lines(*command)
        assert (ran.code, ran.trace) == (6, "")
        assert "another run is writing it" in ran.err
        assert "cannot be written" not in ran.err


def test_what_is_torn_is_looked_at_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal of one run beside the files of the next is nobody's fault; what stands still is refused as it is."""
    ours, looks = staging.ours, []

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

    monkeypatch.setattr(staging, "ours", torn)
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
@pytest.mark.slow
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


@pytest.mark.slow
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
