"""docs/jobs.md: every command on it ends as the page says, and the tables hold."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from lines_cli.storage.files import NewFile
from support import forked, pages
from support.files import snapshot, write_checkpoint
from support.run import run_lines

JOB = ["edit", "base", "ft", "-o", "out", "--resume", "--force"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pair and a git clone, where we are."""
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(3000, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "tiny"})
    shutil.copytree(tmp_path / "ft", tmp_path / "clone")
    (tmp_path / "clone" / ".git").mkdir()
    (tmp_path / "clone" / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def blocks() -> list[str]:
    """The page's shell, block by block."""
    return [text for kind, text in pages.blocks("jobs.md") if kind == "sh"]


@pytest.mark.slow
def test_the_page(here: Path) -> None:
    """In the order of the page, in one folder."""
    lines = [line for block in blocks() if "for " not in block for line in pages.commands(block)]
    assert len(lines) >= 10
    for line in lines:
        pages.run_command(line)
    assert not (here / ".out.lines").exists()
    assert "ref" in (here / "clone" / ".git" / "HEAD").read_text()


@pytest.mark.parametrize(("codes", "ends", "calls"), [((6, 3, 0), 0, 3), ((4,), 4, 1), ((6, 6, 6), 6, 3)])
def test_the_loop(codes: tuple[int, ...], ends: int, calls: int, here: Path) -> None:
    """It retries what the table says, three times in all, and ends with the last code."""
    (loop,) = (block for block in blocks() if "for " in block)
    (here / "codes").write_text("\n".join(map(str, codes)) + "\n")
    stand_in = "lines() { c=$(head -n 1 codes); sed -i.bak 1d codes; echo call >> calls; return $c; }\n"
    done = subprocess.run(["sh", "-c", stand_in + loop.replace("sleep $delay", ":")], check=False)
    assert done.returncode == ends
    assert len((here / "calls").read_text().splitlines()) == calls


def interrupted(monkeypatch: pytest.MonkeyPatch, *command: str, out: str = "out") -> None:
    """A job that is stopped when its weights are written."""
    with monkeypatch.context() as patch:

        def sync(_: NewFile) -> None:
            raise KeyboardInterrupt

        patch.setattr(NewFile, "sync", sync)
        ran = run_lines(*command)
    assert ran.code == 130
    assert f"lines clean {out} removes it" in ran.err


@pytest.mark.slow
def test_resume_and_force_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of what is there, row by row; and what a dry run says of it before."""
    assert run_lines(*JOB).code == 0
    first = snapshot(here / "out")
    ran = run_lines(*JOB, "--json")
    assert (ran.code, ran.json["done_before"]) == (0, True)

    interrupted(monkeypatch, *JOB, "--alpha", "0.5")
    assert snapshot(here / "out") == first
    for flags, said in {
        ("--alpha", "0.5"): "(100% finished): --resume continues it",
        ("--alpha", "0.6"): "the unfinished work of another run: --resume with --force discards it",
    }.items():
        dry = run_lines(*JOB, *flags, "--dry-run")
        assert dry.code == 0
        assert said in dry.err
    plain = ["edit", "base", "ft", "-o", "new"]
    interrupted(monkeypatch, *plain, out="new")
    assert "a run without --resume discards it" in run_lines(*plain, "--dry-run").err
    other = [*plain, "--resume", "--alpha", "0.6"]
    dry = run_lines(*other, "--dry-run")
    assert (dry.code, "--resume refuses to run (exit code 6)" in dry.err) == (0, True)
    assert run_lines(*other).code == 6

    assert "all weights of out are written" in run_lines(*JOB, "--alpha", "0.5").err, "it continues"
    assert snapshot(here / "out") != first
    interrupted(monkeypatch, *JOB, "--alpha", "0.5", "--gamma", "0.9")
    ran = run_lines(*JOB)
    assert (ran.code, "it was discarded" in ran.err) == (0, True)
    assert snapshot(here / "out") == first
    for name in ("results.json", "README.md"):
        with open(here / "out" / name, "a") as file:
            file.write("mine")
        ran = run_lines(*JOB, "--alpha", "0.5")
        assert (ran.code, name in ran.err) == (6, True)
        (here / "out" / name).unlink()


@pytest.mark.slow
def test_a_finished_output_that_is_damaged(here: Path) -> None:
    """--resume --force goes by sizes; --verify reads, and writes it again."""
    assert run_lines(*JOB).code == 0
    before = snapshot(here / "out")
    path = here / "out" / "model.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert run_lines("inspect", "out", "--check").code == 5
    assert run_lines("verify", "out").code == 5
    assert run_lines(*JOB).code == 0
    assert path.read_bytes() == damaged
    assert run_lines(*JOB, "--verify").code == 0
    assert snapshot(here / "out") == before
    path.write_bytes(damaged)
    assert run_lines("edit", "base", "ft", "-o", "out", "--force").code == 0
    assert snapshot(here / "out") == before


def wait_for(path: Path) -> None:
    until = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < until
        time.sleep(0.002)


def test_two_jobs_with_one_destination(here: Path) -> None:
    """The second ends with 6, and a retry after the first's end with 0."""
    flushes, go_on = here / "flushes", here / "go on"

    def program() -> None:
        def sync(_: NewFile) -> None:
            flushes.touch()
            wait_for(go_on)

        NewFile.sync = sync  # type: ignore[method-assign]
        forked.command(*JOB)()

    with forked.Forked(program) as first:
        wait_for(flushes)
        second = run_lines(*JOB)
        assert (second.code, "another run is writing it" in second.err) == (6, True)
        go_on.touch()
        assert first.wait() == 0
    assert run_lines(*JOB, "--json").json["done_before"] is True
