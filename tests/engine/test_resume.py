"""Runs that are killed, interrupted or refused half way: nothing is lost, and another goes on from what is there."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.cli import signals
from lines_cli.engine import run as engine
from lines_cli.engine import write
from lines_cli.errors import Aftermath, CheckpointError, OutputError, aftermath_of
from lines_cli.methods import fused
from lines_cli.storage import lock, staging
from lines_cli.storage.files import NewFile
from lines_cli.storage.journal import written_line
from support import forked
from support.files import snapshot, write_checkpoint
from support.run import run_lines

pytestmark = pytest.mark.durable
STAGING = ".out.lines"
MIB = 2**20


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and two fine-tunes of 24 MB each: several parts of a file, two shards."""
    folder = tmp_path_factory.mktemp("models")
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(1_500_000, generator=chance) for i in range(4)}
        tensors["layers.3.steps"] = torch.tensor(seed)
        write_checkpoint(folder / side, tensors, shards=2, config={"model_type": "tiny"})
    return folder


@pytest.fixture
def models(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same files, where we are; who writes into one makes it its `own` first."""
    for side in ("base", "ft", "ft2"):
        shutil.copytree(pair / side, tmp_path / side, copy_function=os.link)
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}]}
    recipe |= {"parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own(file: Path) -> Path:
    """No link any more: a copy, of the same time."""
    shutil.copy2(file, file.with_suffix(".copy"))
    os.replace(file.with_suffix(".copy"), file)
    return file


EDIT = ["edit", "base", "ft", "-o", "out", "--max-shard-size", "13MB"]
MERGE = ["merge", "--config", "merge.yaml", "-o", "out"]


def weights(folder: Path) -> dict[str, bytes]:
    """The weight files, and their index."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if "safetensors" in path.name}


@pytest.fixture
def undisturbed(models: Path) -> Callable[[list[str]], dict[str, bytes]]:
    """What a command gives if nothing happens."""

    def of(command: list[str]) -> dict[str, bytes]:
        assert run_lines(*("undisturbed" if word == "out" else word for word in command)).code == 0
        found = weights(models / "undisturbed")
        shutil.rmtree(models / "undisturbed")
        return found

    return of


@pytest.fixture(scope="module")
def pair_edited(pair: Path) -> dict[str, bytes]:
    """What the edit gives if nothing happens."""
    assert run_lines("edit", pair / "base", pair / "ft", "-o", pair / "edited", *EDIT[5:]).code == 0
    found = weights(pair / "edited")
    shutil.rmtree(pair / "edited")
    return found


class Stopped:
    """Has the run raise when so many pieces of 1 MiB have been written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, after: int, error: BaseException) -> None:
        self.after, self.error, self.written = after, error, 0
        write = NewFile.write

        def writing(file: NewFile, view: memoryview, offset: int) -> None:
            self.written += 1
            if self.written > self.after:
                raise self.error
            write(file, view, offset)

        monkeypatch.setattr(NewFile, "write", writing)


def stop(
    monkeypatch: pytest.MonkeyPatch, command: list[str], after: int = 11, error: BaseException | None = None
) -> str:
    """Run a command until it is stopped; what it says."""
    with monkeypatch.context() as patch:
        Stopped(patch, after, error or KeyboardInterrupt())
        ran = run_lines(*command, "--workers", "1")
    assert ran.code != 0
    assert ran.trace == ""
    return ran.err


def written(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """How many pieces a command writes, which succeeds."""
    with monkeypatch.context() as patch:
        counted = Stopped(patch, 10**9, AssertionError())
        ran = run_lines(*command)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return counted.written


# --- interrupted, and on again ---


@pytest.mark.slow
@pytest.mark.parametrize("after", [0, 11], ids=["measured", "half written"])
@pytest.mark.parametrize(("first", "then"), [("0", "1"), ("1", "0")], ids=["with", "without"])
def test_resume_with_other_kernels(
    first: str,
    then: str,
    after: int,
    undisturbed: Callable[[list[str]], dict[str, bytes]],
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A merge that began without compiled kernels goes on with them, or the other way round: the same bytes."""
    pytest.importorskip("numba")
    monkeypatch.setattr(fused, "_kernels", None)
    monkeypatch.setenv("LINES_FAST", "0")
    expected = undisturbed(MERGE)
    monkeypatch.setenv("LINES_FAST", first)
    stop(monkeypatch, MERGE, after)
    assert fused.in_use() == (first == "1")
    monkeypatch.setenv("LINES_FAST", then)
    ran = run_lines(*MERGE, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert bool(ran.json["resumed"]) == bool(after)
    assert fused.in_use() == (then == "1")
    assert weights(models / "out") == expected


@pytest.mark.parametrize("command", [EDIT, MERGE], ids=["edit", "merge"])
def test_resume_gives_the_same_bytes_and_does_not_begin_anew(
    command: list[str],
    models: Path,
    undisturbed: Callable[[list[str]], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An interrupted run says where it kept what it had finished; --resume goes on from there."""
    expected = undisturbed(command)
    err = stop(monkeypatch, command)
    assert str(models / STAGING) in err
    assert "--resume" in err
    assert not (models / "out").exists()
    assert written([*command, "--resume"], monkeypatch) <= 24 - 8 + 1
    assert weights(models / "out") == expected
    assert not (models / STAGING).exists()
    assert run_lines("inspect", "out", "--check").code == 0


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The passes before the last are spared, once they are done; coefficients and norms are told as ever."""
    undisturbed = run_lines(*MERGE, "--json").json
    shutil.rmtree(models / "out")
    stop(monkeypatch, MERGE)
    resumed = run_lines(*MERGE, "--resume", "--json").json
    assert resumed["resumed"] > undisturbed["resumed"] == 0
    for tally in (undisturbed, resumed):
        del tally["seconds"], tally["resumed"]
        norms = [model.pop("norm") for model in tally["models"]]
        assert norms == pytest.approx([3464.0, 3464.0], rel=1e-3)
    assert resumed == undisturbed
    recipe = lines.load_recipe(models / "merge.yaml")
    with monkeypatch.context() as patch:
        Stopped(patch, 9, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path("again")))
    outcome = lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path("again")), resume=True)
    assert outcome.passes == 1
    assert weights(models / "again") == weights(models / "out")


@pytest.mark.slow
def test_a_lone_file_is_resumed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a folder is."""
    command = ["edit", "base", "ft", "-o", "out.safetensors"]
    assert run_lines(*command).code == 0
    expected = (models / "out.safetensors").read_bytes()
    (models / "out.safetensors").unlink()
    stop(monkeypatch, command)
    assert written([*command, "--resume"], monkeypatch) <= 24 - 8 + 1
    assert (models / "out.safetensors").read_bytes() == expected
    assert not list(models.glob(".*"))


@pytest.mark.slow
def test_nothing_to_resume_simply_runs(models: Path) -> None:
    """So that a job can say --resume from the start."""
    assert run_lines(*EDIT, "--resume").code == 0
    assert (models / "out" / "config.json").exists()


@pytest.mark.slow
def test_what_is_finished_is_not_made_again(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume says so and ends with 0; with another recipe the destination is taken."""
    assert run_lines(*EDIT).code == 0
    before = snapshot(models)
    ran = run_lines(*EDIT, "--resume")
    assert ran.code == 0
    assert "finished" in ran.err
    assert run_lines(*EDIT, "--resume", "--json").json["done_before"] is True
    assert run_lines(*EDIT, "--resume", "--alpha", "0.3").code == 6
    assert snapshot(models) == before
    (models / "out" / "config.json").unlink()
    assert run_lines(*EDIT, "--resume").code == 6


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda folder: ["--alpha", "0.3"], "recipe"),
        (lambda folder: ["--max-shard-size", "1GB"], "outputs"),
        (
            lambda folder: os.utime(own(folder / "ft" / "model-00001-of-00002.safetensors"), (1, 1)),
            "model-00001-of-00002",
        ),
    ],
    ids=["another recipe", "other shards", "an input written since"],
)
@pytest.mark.slow
def test_what_another_run_has_begun_is_refused(
    change: Callable[[Path], list[str] | None], word: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--resume of something else names what differs and touches nothing; without --resume it is replaced, and told."""
    stop(monkeypatch, EDIT)
    changed = [*EDIT, *(change(models) or [])]
    before = snapshot(models)
    ran = run_lines(*changed, "--resume")
    assert (ran.code, ran.trace) == (6, "")
    assert word in ran.err
    assert "lines clean" in ran.err
    assert snapshot(models) == before
    ran = run_lines(*changed)
    assert ran.code == 0
    assert STAGING in ran.err
    assert "finished" in ran.err
    assert not (models / STAGING).exists()


@pytest.mark.slow
def test_inputs_whose_content_alone_changed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Size, time and header tell nothing of it; --verify-inputs does, if both runs have it."""
    file = own(models / "ft" / "model-00002-of-00002.safetensors")
    stop(monkeypatch, [*EDIT, "--verify-inputs"])
    there = file.stat()
    with open(file, "r+b") as stream:
        stream.seek(-5, os.SEEK_END)
        stream.write(b"\1")
    os.utime(file, ns=(there.st_atime_ns, there.st_mtime_ns))
    ran = run_lines(*EDIT, "--resume", "--verify-inputs")
    assert (ran.code, ran.trace) == (6, "")
    assert "contents" in ran.err
    assert run_lines(*EDIT, "--resume").code == 0

    shutil.rmtree(models / "out")
    stop(monkeypatch, EDIT)
    ran = run_lines(*EDIT, "--resume", "--verify-inputs")
    assert (ran.code, ran.trace) == (6, "")
    assert "without --verify-inputs" in ran.err


@pytest.mark.slow
def test_the_recipe_records_what_was_read(models: Path) -> None:
    """Size, time and header of each input; with --verify-inputs its digest, which is that of the file."""
    assert run_lines(*EDIT, "--verify-inputs").code == 0
    recipe = yaml.safe_load((models / "out" / "lines_recipe.yaml").read_text())
    assert len(recipe["inputs"]) == 4
    for name, tally in recipe["inputs"].items():
        path = models / "out" / name
        assert tally["bytes"] == path.stat().st_size
        assert tally["mtime_ns"] == path.stat().st_mtime_ns
        assert tally["digest"] == lines.storage.digest.file_digest(path)
    assert run_lines("merge", "--config", "out/lines_recipe.yaml", "-o", "again").code == 0
    assert weights(models / "again") == weights(models / "out")


# --- what a dead run has left is not trusted ---


def damage_a_part(folder: Path) -> None:
    with open(folder / "new" / "model-00001-of-00002.safetensors", "r+b") as stream:
        stream.seek(MIB)
        stream.write(b"damaged")


def damage_the_journal(folder: Path) -> None:
    path = folder / "journal"
    lines_ = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines_[:-1]) + lines_[-1][:20])


def lose_a_file(folder: Path) -> None:
    (folder / "new" / "model-00001-of-00002.safetensors").unlink()


def cut_a_file(folder: Path) -> None:
    os.truncate(folder / "new" / "model-00001-of-00002.safetensors", 5 * MIB)


def lose_all(folder: Path) -> None:
    shutil.rmtree(folder / "new")


def lose_the_journal(folder: Path) -> None:
    (folder / "journal").write_bytes(b'{"run"')


@pytest.mark.parametrize(
    "what", [damage_a_part, damage_the_journal, lose_a_file, cut_a_file, lose_all, lose_the_journal]
)
@pytest.mark.slow
def test_damaged_parts_are_made_again(
    what: Callable[[Path], None],
    models: Path,
    undisturbed: Callable[[list[str]], dict[str, bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is not as the journal says is not built upon."""
    expected = undisturbed(EDIT)
    stop(monkeypatch, EDIT, after=18)
    what(models / STAGING)
    assert written([*EDIT, "--resume"], monkeypatch) > 8
    assert weights(models / "out") == expected
    assert sorted(path.name for path in (models / "out").glob("model-*")) == sorted(
        name for name in expected if name.startswith("model-")
    )


ODD_JOURNALS: list[tuple[str, dict[str, Any]]] = [
    ("run", {"step": 0}),
    ("run", {"step": float("inf")}),
    ("file", {"start": -4 * MIB}),
    ("file", {"start": float("inf")}),
    ("file", {"file": 99}),
    ("file", {"blocks": []}),
    ("file", {"told": {"squares": ["x"], "kept": [0], "entries": 0, "differing": {}, "nonfinite": {}}}),
    ("file", {"told": {"squares": [1], "kept": [0], "entries": 0, "differing": [], "nonfinite": {}}}),
]
ODD_JOURNALS_MORE: list[tuple[str, dict[str, Any]]] = [
    ("run", {"step": -1}),
    ("run", {"step": 1}),
    ("run", {"step": "x"}),
    ("file", {"start": 1}),
    ("file", {"file": -1}),
    ("file", {"blocks": ["00"]}),
    ("file", {"told": {"x": 1}}),
    ("file", {"told": {"squares": [1, 2, 3], "kept": [0], "entries": 0, "differing": {}, "nonfinite": {}}}),
]


@pytest.mark.parametrize(
    ("key", "odd"),
    [*ODD_JOURNALS, *(pytest.param(*odd, marks=pytest.mark.slow) for odd in ODD_JOURNALS_MORE)],
    ids=str,
)
@pytest.mark.slow
def test_a_journal_that_no_run_would_write(
    key: str, odd: dict[str, Any], models: Path, pair_edited: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checksums are right, its values are not: what it says of these parts is not built upon."""
    stop(monkeypatch, EDIT, after=11)
    path = models / STAGING / "journal"
    tally = [json.loads(line) for line in path.read_bytes().splitlines()]
    for line in tally:
        line.pop("crc32")
        if key in line:
            (line["run"] if key == "run" else line).update(odd)
    path.write_bytes(b"".join(written_line(line) for line in tally))
    ran = run_lines(*EDIT, "--resume")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert weights(models / "out") == pair_edited


@pytest.mark.slow
def test_killed_once_folders_were_exchanged(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the old output stands where the new one was: none of it comes back, and the next run removes it."""
    write_checkpoint(models / "out", {"w": torch.ones(3)}, shards=1)
    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "__exit__", lambda self, *_: self._lock.release())
        assert run_lines(*EDIT, "--force").code == 0
    assert (models / STAGING / "new" / "model.safetensors").exists()
    new = snapshot(models / "out")
    ran = run_lines(*EDIT, "--resume")
    assert (ran.code, ran.trace) == (0, "")
    assert snapshot(models / "out") == new
    assert not (models / STAGING).exists()


def test_told_once(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers that differ, and NaN that is let through, are told by a resumed run, too."""
    stop(monkeypatch, MERGE, after=22)
    ran = run_lines(*MERGE, "--resume", "--json")
    assert list(ran.json["differing"]) == ["layers.3.steps"]


# --- two runs ---


@pytest.mark.slow
def test_a_second_run_is_refused(models: Path) -> None:
    """While one is at work, which here stands still; clean is refused, too, and neither disturbs the first."""
    with begun(EDIT) as process:
        process.send_signal(signal.SIGSTOP)
        for command in (EDIT, [*EDIT, "--resume"], [*EDIT, "--force"], [*EDIT, "--dry-run"], ["clean", "out"]):
            ran = run_lines(*command)
            assert (ran.code, ran.trace) == (6, ""), command
            assert "another run is writing it" in ran.err
        GOES_ON.touch()
        process.send_signal(signal.SIGCONT)
        assert process.wait(60) == 0
    assert (models / "out" / "config.json").exists()
    assert not (models / STAGING).exists()


GOES_ON = Path("goes on")


def held(*command: str) -> forked.Program:
    """A run that stands still once it has finished a part more, until it is told to end, or to go on."""

    def run() -> None:
        write, before = NewFile.write, finished_parts()

        def waits(*args: Any) -> None:
            while finished_parts() > before and signals.raised() is None and not GOES_ON.exists():
                time.sleep(0.01)
            write(*args)

        NewFile.write = waits  # type: ignore[method-assign]
        forked.command(*command, "--workers", "1")()

    return run


class begun(forked.Forked):  # noqa: N801 - reads as what it is
    """A run in a process of its own that has finished a part, and stands still."""

    def __init__(self, command: list[str]) -> None:
        super().__init__(held(*command))
        until = time.monotonic() + 300
        while not finished_parts():
            assert self.poll() is None
            assert time.monotonic() < until
            time.sleep(0.01)


def finished_parts() -> int:
    try:
        return Path(STAGING, "journal").read_bytes().count(b'"blocks"')
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)]
)
def test_a_signal_in_the_middle(
    number: signal.Signals, models: Path, undisturbed: Callable[[list[str]], dict[str, bytes]]
) -> None:
    """Exit code 128 + signal, the staging folder is named, the old output is whole; a resumed run comes to its end."""
    expected = undisturbed(EDIT)
    write_checkpoint(models / "out", {"w": torch.ones(3)})
    old = snapshot(models / "out")
    with begun([*EDIT, "--force"]) as process:
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    assert number == signal.SIGKILL or str(models / STAGING) in err
    assert snapshot(models / "out") == old
    ran = run_lines(*EDIT, "--resume", "--force")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert weights(models / "out") == expected
    assert not (models / STAGING).exists()


# --- into place ---


@pytest.mark.slow
@pytest.mark.parametrize("can", [True, False])
def test_the_old_is_whole_until_the_new_is_in_place(can: bool, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where folders can be exchanged there is no moment without an output; else none in which it is lost."""
    write_checkpoint(models / "out", {"w": torch.ones(3)})
    old = snapshot(models / "out")
    if not can:
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    rename, seen = os.rename, []

    def watched(source: Any, target: Any) -> None:
        rename(source, target)
        seen.append((models / "out").exists())

    monkeypatch.setattr(os, "rename", watched)
    assert run_lines(*EDIT, "--force").code == 0
    assert seen == ([] if can else [False, True])
    assert (models / "out" / "config.json").exists()
    assert snapshot(models / "out") != old
    assert sorted(path.name for path in models.glob(".*")) == []


@pytest.mark.slow
def test_what_was_set_aside_comes_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between the two renames, where folders cannot be exchanged, leaves the old output aside: the next run, and
    clean, put it back.
    """
    write_checkpoint(models / "out", {"w": torch.ones(3)})
    old = snapshot(models / "out")
    stop(monkeypatch, [*EDIT, "--force"])
    for command in (["clean", "out"], [*EDIT, "--resume"], EDIT):
        (models / STAGING).mkdir(exist_ok=True)
        os.rename(models / "out", models / STAGING / "old")
        ran = run_lines(*command)
        assert ran.code == (0 if command[0] == "clean" else 6), ran.err
        assert snapshot(models / "out") == old


def test_exchange_is_one_step(tmp_path: Path) -> None:
    """Two folders change places; where one is missing, nothing happens."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not staging.exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("not on this system")
    assert (tmp_path / "a" / "b").exists()
    assert (tmp_path / "b" / "a").exists()
    with pytest.raises(FileNotFoundError):
        staging.exchange(tmp_path / "a", tmp_path / "c")


@pytest.mark.slow
def test_a_linked_destination(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a link leads to is replaced, and the work is done beside that; the link stays."""
    (models / "far").mkdir()
    write_checkpoint(models / "far" / "real", {"w": torch.ones(3)})
    (models / "out").symlink_to(models / "far" / "real")
    stop(monkeypatch, [*EDIT, "--force"])
    assert (models / "far" / ".real.lines").exists()
    assert run_lines(*EDIT, "--force", "--resume").code == 0
    assert (models / "out").is_symlink()
    assert (models / "far" / "real" / "config.json").exists()
    assert sorted(path.name for path in (models / "far").iterdir()) == ["real"]


# --- read back ---


@pytest.mark.slow
def test_verify_reads_back(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that gives back something else is found before anything is published."""
    assert run_lines(*EDIT, "--verify").code == 0
    shutil.rmtree(models / "out")
    write = NewFile.write

    def wrong(file: NewFile, view: memoryview, offset: int) -> None:
        write(file, memoryview(bytes(view[:-1]) + b"\x7f") if offset == 2 * MIB else view, offset)

    monkeypatch.setattr(NewFile, "write", wrong)
    ran = run_lines(*EDIT, "--verify")
    assert (ran.code, ran.trace) == (6, "")
    assert "model-00001-of-00002.safetensors reads back as" in ran.err
    assert not (models / "out").exists()
    monkeypatch.undo()
    monkeypatch.chdir(models)
    assert written([*EDIT, "--resume", "--verify"], monkeypatch) <= 8, "only the damaged parts"
    assert run_lines("inspect", "out", "--check").code == 0


# --- bad input, full disks ---


@pytest.mark.slow
def test_bad_data_leaves_nothing(models: Path) -> None:
    """NaN in the last tensor: what was finished before is of no use, and is removed."""
    tensors = {f"layers.{i}.w": torch.randn(1_500_000) for i in range(4)}
    tensors["layers.3.w"][-1] = torch.nan
    tensors["layers.3.steps"] = torch.tensor(1)
    shutil.rmtree(models / "ft")
    write_checkpoint(models / "ft", tensors)
    before = snapshot(models)
    assert run_lines(*EDIT).code == 5
    assert snapshot(models) == before


@pytest.mark.slow
@pytest.mark.parametrize("content", ["touched", "cut", "grown"])
def test_an_input_that_changes_while_it_is_read(content: str, models: Path) -> None:
    """It is noticed at the end at the latest; the output would be of neither state."""
    recipe = lines.edit_recipe("base", "ft")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    file = own(models / "ft" / "model-00002-of-00002.safetensors")

    def meanwhile(_title: str, _total: int, done: Iterable[int]) -> Iterator[int]:
        for number, nbytes in enumerate(done):
            if number == 1:
                if content == "touched":
                    os.utime(file)
                else:
                    os.truncate(file, file.stat().st_size + (-4 if content == "cut" else 4))
            yield nbytes

    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors"):
        lines.run(plan, track=meanwhile)
    assert not (models / "out").exists()
    assert not (models / STAGING).exists()


@pytest.mark.slow
def test_a_full_disk_keeps_what_is_finished(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says so; when there is room, --resume goes on."""
    err = stop(monkeypatch, EDIT, error=OSError(28, "No space left on device"))
    assert "no space left" in err
    assert str(models / STAGING) in err
    assert written([*EDIT, "--resume"], monkeypatch) <= 24 - 8 + 1


@pytest.mark.slow
def test_room_that_a_dead_run_takes_is_counted(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of it will be replaced or built upon, and is no reason to refuse."""
    stop(monkeypatch, EDIT)
    usage = shutil.disk_usage(models)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20 * MIB))
    assert run_lines(*EDIT, "--resume").code == 0
    shutil.rmtree(models / "out")
    assert run_lines(*EDIT).code == 6


@pytest.mark.slow
def test_a_worker_that_fails(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong with one worker, the others stop, and the error names the tensor."""
    make = write.Write._make

    def failing(self: Any, worker: Any, chunk: Any, tally: Any) -> memoryview:
        if chunk.tensor.name == "layers.2.w":
            raise ZeroDivisionError("division by zero")
        return make(self, worker, chunk, tally)

    monkeypatch.setattr(write.Write, "_make", failing)
    recipe = lines.edit_recipe("base", "ft")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    with pytest.raises(ZeroDivisionError, match=r"at tensor layers\.2\.w"):
        engine.run(plan, lines.Resources(workers=3))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lines-worker")]
    monkeypatch.undo()
    monkeypatch.chdir(models)
    assert run_lines("edit", "base", "ft", "-o", "out", "--resume").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_filesystem_without_locks(number: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are not kept apart there, and work."""

    def flock(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    stop(monkeypatch, EDIT)
    assert run_lines(*EDIT, "--resume").code == 0


# --- clean ---


@pytest.mark.slow
def test_clean(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Removes what is left, says what it was, and touches nothing else; again, there is nothing to do."""
    before = snapshot(models)
    stop(monkeypatch, EDIT)
    ran = run_lines("clean", "out")
    assert ran.code == 0
    assert str(models / STAGING) in ran.err
    assert "% finished" in ran.err
    assert snapshot(models) == before
    ran = run_lines("clean", "out")
    assert ran.code == 0
    assert "nothing to remove" in ran.err
    assert run_lines("clean", "out", "--quiet").err == ""


# --- many kills ---


def killed_often(
    command: list[str],
    kills: int,
    chance: random.Random,
    *,
    between: tuple[float, float],
    program: Callable[..., forked.Program] = forked.command,
) -> int:
    """Kill a run and its successors at random moments until one comes to its end, over and over; how many were killed
    while they were writing.
    """
    inside = 0
    old = snapshot(Path("out"))
    while inside < kills:
        with forked.Forked(program(*command, "--resume")) as process:
            before, until = finished_parts(), time.monotonic() + 300
            while finished_parts() <= before and process.poll() is None:
                assert time.monotonic() < until
                time.sleep(0.001)
            time.sleep(chance.uniform(*between))
            process.kill()
            _, err = process.communicate()
        if process.returncode == 0:
            return inside
        assert process.returncode == -signal.SIGKILL, err
        if snapshot(Path("out")) != old:  # killed when all was in place: the caller sees whether it is whole
            return inside
        inside += finished_parts() > before
    return inside


@pytest.mark.slow
@pytest.mark.parametrize("command", [EDIT, pytest.param(MERGE, marks=pytest.mark.slow)], ids=["edit", "merge"])
def test_a_few_kills(command: list[str], models: Path, undisturbed: Callable[[list[str]], dict[str, bytes]]) -> None:
    """Killed inside the write, the old output is whole; resumed, the bytes are those of a run that was left alone."""
    expected = undisturbed(command)
    write_checkpoint(models / "out", {"w": torch.ones(3)})
    assert killed_often([*command, "--force"], 2, random.Random(0), between=(0, 0.1), program=held) == 2
    ran = run_lines(*command, "--force", "--resume")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert weights(models / "out") == expected


@pytest.mark.slow
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("method", ["edit", "merge"])
def test_many_kills(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 kills at random moments inside the write of 1.6 GB in several shards, and of a merge of three passes."""
    monkeypatch.chdir(tmp_path)
    layers, numel = (40, 20_000_000) if method == "edit" else (20, 10_000_000)
    for seed, side in enumerate(("base", "ft", "ft2") if method == "merge" else ("base", "ft")):
        values = torch.randn(numel, generator=torch.Generator().manual_seed(seed)).bfloat16()
        tensors = {f"layers.{i}.w": values.roll(i) for i in range(layers)}
        write_checkpoint(tmp_path / side, tensors, shards=4, config={"model_type": "tiny"})
    recipe = {"merge_method": "ties", "base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}]}
    recipe |= {"parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    edit = ["edit", "base", "ft", "-o", "out", "--max-shard-size", "400MB"]
    command = edit if method == "edit" else MERGE
    assert run_lines(*(word if word != "out" else "expected" for word in command)).code == 0
    expected = {name: staging_digest(tmp_path / "expected" / name) for name in os.listdir(tmp_path / "expected")}
    shutil.rmtree(tmp_path / "expected")

    chance, kills, rounds = random.Random(0), 0, 0
    while kills < 30:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        write_checkpoint(tmp_path / "out", {"w": torch.ones(3)})
        kills += killed_often([*command, "--force"], 30 - kills, chance, between=(0, 0.15))
        ran = run_lines(*command, "--force", "--resume")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        for name, digest in expected.items():
            if "safetensors" in name:
                assert staging_digest(tmp_path / "out" / name) == digest
        rounds += 1
    print(f"{method}: {kills} kills inside the write, {rounds} outputs")


def staging_digest(path: Path) -> str:
    return lines.storage.digest.file_digest(path)


@pytest.mark.slow
def test_journal_is_plain_text(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A line of JSON for whatever was finished: for people, too."""
    stop(monkeypatch, MERGE)
    tally = [json.loads(line) for line in (models / STAGING / "journal").read_text().splitlines()]
    assert all("crc32" in line for line in tally)
    assert [next(iter(line)) for line in tally[:4]] == ["run", "names", "replaces", "measured"]
    assert all({"file", "start", "blocks"} <= line.keys() for line in tally[4:])


def test_runs_from_python(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error says where what was finished is kept."""
    recipe = lines.edit_recipe("base", "ft")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    Stopped(monkeypatch, 11, OSError(5, "Input/output error"))
    with pytest.raises(OutputError) as failed:
        engine.run(plan, lines.Resources(workers=1))  # two may be in the middle of a part each
    assert aftermath_of(failed.value) == Aftermath(kept=models / STAGING, output=Path("out"))
