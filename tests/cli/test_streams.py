"""A closed or a full stdout: an output that is in place is never told as a failure, and there is never a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lines_cli.cli.app import EXIT_CODES
from support import forked
from support.files import snapshot, write_checkpoint
from support.inspecting import llama, tuned
from support.run import run_lines


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, a fine-tune, a recipe, and an output."""
    folder = tmp_path_factory.mktemp("pair")
    write_checkpoint(folder / "base", llama())
    write_checkpoint(folder / "ft", tuned(llama(), 1))
    (folder / "merge.yaml").write_text("base_model: base\nmodels: [{model: ft}]\n")
    assert run_lines("edit", folder / "base", folder / "ft", "-o", folder / "made").code == 0
    return folder


def full() -> int:
    """A disk without room, as stdout."""
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full here")
    return os.open("/dev/full", os.O_WRONLY)


def gone() -> int:
    """A pipe that nobody reads any more."""
    reads, writes = os.pipe()
    os.close(reads)
    return writes


def ended(pair: Path, stdout: int, *args: object) -> forked.Ended:
    """`lines ARGS` with this stdout."""
    try:
        return forked.run(forked.command(*args), cwd=pair, stdout=stdout)
    finally:
        os.close(stdout)


@pytest.mark.parametrize("stdout", [full, gone])
@pytest.mark.parametrize(
    "arguments",
    [
        ["edit", "base", "ft", "-o"],
        ["edit", "base", "ft", "--json", "-o"],
        ["merge", "--config", "merge.yaml", "-o"],
    ],
    ids=["edit", "edit --json", "merge"],
)
@pytest.mark.slow
def test_an_output_in_place(arguments: list[str], stdout: Callable[[], int], pair: Path, tmp_path: Path) -> None:
    """One line on stderr says that the output is in place and whole, and the exit code is one of its own."""
    ran = ended(pair, stdout(), *arguments, tmp_path / "out")
    assert ran.returncode == 7
    assert 7 in EXIT_CODES
    (line,) = [line for line in ran.stderr.splitlines() if not line.startswith("note: ")]
    assert line.startswith(f"warning: {tmp_path / 'out'} is in place and whole; ")
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("stdout", [full, gone])
def test_an_output_that_was_finished_before(stdout: Callable[[], int], pair: Path) -> None:
    """--resume that has nothing to do, and cannot print that, leaves it as it is and says so."""
    before = snapshot(pair / "made")
    ran = ended(pair, stdout(), "edit", "base", "ft", "-o", "made", "--resume", "--json")
    assert ran.returncode == 7
    assert "made is in place and whole" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert snapshot(pair / "made") == before


COMMANDS = {
    "dry run": ["edit", "base", "ft", "-o", "out", "--dry-run"],
    "inspect": ["inspect", "base"],
    "inspect --json": ["inspect", "ft", "--base", "base", "--json"],
    "verify": ["verify", "made"],
    "help": ["--help"],
    "help of a command": ["edit", "--help"],
    "version": ["--version"],
}


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.slow
def test_other_commands(arguments: list[str], pair: Path) -> None:
    """On a full disk a line says that it is the printing that failed; a reader who had enough is told nothing. Neither
    is a traceback, nor an error.
    """
    ran = ended(pair, full(), *arguments)
    assert ran.returncode == 7
    assert "warning: not everything could be printed (stdout: No space left on device)" in ran.stderr
    closed = ended(pair, gone(), *arguments)
    assert closed.returncode == 7
    assert "warning: " not in closed.stderr
    for text in (ran.stderr, closed.stderr):
        assert not any(word in text for word in ("error: ", "Traceback", "Exception", "place"))
    assert not (pair / "out").exists()


@pytest.mark.slow
def test_what_is_found_counts_more(pair: Path, tmp_path: Path) -> None:
    """What a command finds, or refuses, decides the exit code, whether it can be printed or not."""
    broken = tuned(llama(), 1)
    broken["model.norm.weight"][0] = float("nan")
    write_checkpoint(tmp_path / "broken", broken)
    for arguments in (
        ["inspect", tmp_path / "broken", "--check"],
        ["inspect", tmp_path / "broken", "--check", "--json"],
    ):
        ran = ended(pair, full(), *arguments)
        assert ran.returncode == 5
        assert "error: --check found:" in ran.stderr
    ran = ended(pair, full(), "edit", "base", "ft", "-o", "made", "--json")
    assert (ran.returncode, "error: made exists" in ran.stderr) == (6, True)


@pytest.mark.slow
def test_nothing_to_print(pair: Path, tmp_path: Path) -> None:
    """With --quiet a full stdout is no matter."""
    ran = ended(pair, full(), "edit", "base", "ft", "-o", tmp_path / "out", "--quiet")
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.slow
def test_stderr_and_stdout_gone(pair: Path, tmp_path: Path) -> None:
    """`2>&1 | head`: nothing can be said any more, and the exit code alone tells it."""
    both = gone()
    try:
        code = forked.run(
            forked.command("edit", "base", "ft", "-o", tmp_path / "out"), cwd=pair, stdout=both, stderr=both
        ).returncode
    finally:
        os.close(both)
    assert code == 7
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
@pytest.mark.parametrize("closed", [">&-", pytest.param(">&- 2>&-", marks=pytest.mark.slow), ">&- 2>&- <&-"])
def test_descriptors_that_are_closed(closed: str, pair: Path, tmp_path: Path) -> None:
    """Where the shell closes them, no file of the output gets their numbers, nor what libraries print."""
    out = tmp_path / "out"
    program = "import os; from lines_cli.__main__ import main\ntry: main()\nfinally: os.write(1, b'stray')"
    script = f"exec {closed}; exec '{sys.executable}' -c \"$0\" edit base ft -o '{out}'"
    ran = subprocess.run(["sh", "-c", script, program], cwd=pair, capture_output=True, text=True, check=False)
    assert ran.returncode == 7
    assert ran.stderr == "" or f"{out} is in place and whole" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert run_lines("verify", out).code == 0


@pytest.mark.slow
def test_many_lines_and_a_reader_who_leaves(tmp_path: Path) -> None:
    """A report of thousands of lines, of which one is read."""
    path = write_checkpoint(tmp_path / "m", {f"layers.{i}.w{j}": torch.ones(1) for i in range(30) for j in range(80)})
    reads, writes = os.pipe()
    with forked.Forked(forked.command("inspect", path, "--tensors"), stdout=writes) as running:
        os.close(writes)
        os.read(reads, 10)
        os.close(reads)
        assert running.wait() == 7
        assert running.read()[1] == ""
