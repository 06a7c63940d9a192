"""Whose is it? What --force may replace, and what others keep where `lines` works."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.errors import as_argument
from lines_cli.storage import staging
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import written_line
from support.crossed import by_turns, crossed
from support.files import snapshot, write_checkpoint
from support.owning import EDIT, STAGING, meanwhile, stopped
from support.run import run_lines

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
@pytest.mark.some(6)
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
@pytest.mark.slow
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


@pytest.mark.slow
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
@pytest.mark.some(6)
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


@pytest.mark.slow
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
    for flags in ([], ["--force"]):
        ran = run_lines(*EDIT, "--dry-run", *flags)
        assert (ran.code, ran.trace) == (0, "")
        assert "the old" in ran.err
        assert ("out exists: a run replaces it with --force alone" in ran.err) == (not flags)
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


@pytest.mark.slow
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
