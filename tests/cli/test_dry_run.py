"""`--dry-run` shows a plan: where nothing is named to write to, and where something stands there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import lines_cli as lines
from support.files import snapshot, write_checkpoint
from support.inspecting import llama, tuned
from support.run import run_lines


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a fine-tune and a recipe, where we are."""
    write_checkpoint(tmp_path / "base", llama())
    write_checkpoint(tmp_path / "ft", tuned(llama(), 1))
    (tmp_path / "merge.yaml").write_text("base_model: base\nmodels: [{model: ft}]\nlines: {alpha: 0.2, beta: 0.5}\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


EDIT, MERGE = ["edit", "base", "ft"], ["merge", "--config", "merge.yaml"]


@pytest.mark.parametrize("command", [EDIT, MERGE], ids=["edit", "merge"])
def test_no_output_is_named(command: list[str], here: Path) -> None:
    """A plan needs no destination: all but that is the same as with one. A run needs one, and says how to name it."""
    named, unnamed = run_lines(*command, "--dry-run", "-o", "out"), run_lines(*command, "--dry-run")
    assert (unnamed.code, unnamed.trace) == (0, ""), unnamed.err
    assert unnamed.out == named.out.replace(" to out ", " ")
    assert unnamed.err == named.err
    told = run_lines(*command, "--dry-run", "--json").json
    assert told == run_lines(*command, "--dry-run", "-o", "out", "--json").json | {"output": None}
    ran = run_lines(*command)
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    assert "names no output" in ran.err or "no output is named" in ran.err
    assert "-o OUT" in ran.err
    assert "--dry-run" in ran.err
    assert not (here / "out").exists()


def test_whatever_stands_there(here: Path) -> None:
    """A folder that happens to have the name that a plan without one uses is nothing to it."""
    write_checkpoint(here / "OUT", llama())
    ran = run_lines(*EDIT, "--dry-run", "--resume", "--verify")
    assert (ran.code, "exists" in ran.err) == (0, False)


def test_from_python() -> None:
    """The same from Python."""
    assert lines.edit("base", "ft", dry_run=True)["output"] is None
    assert lines.merge("merge.yaml", dry_run=True)["output"] is None
    for call in (lambda: lines.edit("base", "ft"), lambda: lines.merge("merge.yaml")):
        with pytest.raises(lines.LinesError, match="output") as refused:
            call()
        assert refused.value.exit_code == 2


def output_of_lines(here: Path) -> None:
    assert run_lines(*EDIT, "-o", "out", "--alpha", "0.7").code == 0


def foreign_files(here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "thesis.tex").write_text("precious")


def a_file(here: Path) -> None:
    (here / "out").write_text("precious")


@pytest.mark.parametrize("resume", [[], ["--resume"]], ids=["", "resume"])
@pytest.mark.parametrize("command", [EDIT, MERGE], ids=["edit", "merge"])
@pytest.mark.parametrize("there", [output_of_lines, foreign_files, a_file])
def test_a_destination_that_is_taken(
    there: Callable[[Path], None], command: list[str], resume: list[str], here: Path
) -> None:
    """What stands there is a note, with the way out, and the plan is shown all the same; the run itself refuses."""
    there(here)
    before = snapshot(here)
    ran = run_lines(*command, "-o", "out", "--dry-run", *resume)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert "note: out exists: " in ran.err
    assert "--force" in ran.err
    assert "model.layers" in ran.out
    told = run_lines(*command, "-o", "out", "--dry-run", "--json", *resume).json
    assert [note for note in told["notes"] if "out exists" in note]
    assert run_lines(*command, "-o", "out", *resume).code == 6
    assert snapshot(here) == before


def test_what_is_refused_with_force_too(here: Path) -> None:
    """With --force a dry run ends as the run would."""
    foreign_files(here)
    for flags in ([], ["--dry-run"]):
        ran = run_lines(*EDIT, "-o", "out", "--force", *flags)
        assert (ran.code, ran.trace) == (6, "")
    for output in ("ft", "base", "."):  # an input, and the folder we are in, are no place for an output at all
        assert run_lines(*EDIT, "-o", output, "--dry-run").code == 6


def test_an_empty_folder_is_no_destination_that_is_taken(here: Path) -> None:
    """Of a folder with nothing in it nothing is said."""
    (here / "out").mkdir()
    ran = run_lines(*EDIT, "-o", "out", "--dry-run")
    assert (ran.code, "exists" in ran.err) == (0, False)
