"""Help, what the option parser refuses, and shell completion."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support import forked
from support.run import run_lines

ROOT = Path(__file__).parents[2]
COMMANDS = ["edit", "merge", "inspect", "verify", "push", "clean"]
PANELS = ["Adapter:", "Scaling:", "When the inputs disagree:", "Output:", "The Hub:", "Recovery:", "Machine:"]


def test_options_in_panels() -> None:
    """`lines edit --help` shows options by what they are for, each under one heading, and no option is left out."""
    out = run_lines("edit", "--help").out
    headings = re.findall(r"^\S[^:\n]*:$", out, re.MULTILINE)
    assert headings == ["Arguments:", *PANELS, "Other:"]
    bodies = dict(zip(headings, re.split(r"^\S[^:\n]*:$", out, flags=re.MULTILINE)[1:], strict=True))
    found = {heading: re.findall(r"^  (?:-\w, )?(--[\w-]+)", body, re.MULTILINE) for heading, body in bodies.items()}
    for heading, option in zip(
        PANELS, ["--adapter", "--alpha", "--missing", "--dtype", "--push-to", "--resume", "--workers"], strict=True
    ):
        assert option in found[heading]
    assert found["Other:"] == ["--help"]
    listed = [option for options in found.values() for option in options]
    assert len(listed) == len(set(listed)) == 42


@pytest.mark.parametrize("command", COMMANDS)
def test_an_example_first(command: str) -> None:
    """A command's help begins with one sentence and a command to type, and ends with the pages to read."""
    out = run_lines(command, "--help").out
    _, _, sentence, _, example, *_, last = out.strip().split("\n") if command == "clean" else _lines_of(out)
    assert sentence.strip()
    assert example.startswith(f"    lines {command} ")
    pages = re.findall(r"docs/[\w-]+\.md", last)
    assert pages
    assert all((ROOT / page).is_file() for page in pages)


def _lines_of(out: str) -> list[str]:
    """The lines, with the first paragraph as one."""
    usage, sentence, rest = out.strip().split("\n\n", 2)
    return [usage, "", sentence, "", *rest.split("\n")]


def test_where_to_begin() -> None:
    """`lines --help` says what to type for what a person has, and every page that it names is there."""
    out = run_lines("--help").out
    pages = re.findall(r"docs/[\w-]+\.md", out)
    assert {"docs/editing.md", "docs/merging.md", "docs/notebooks.md"} <= set(pages)
    assert all((ROOT / page).is_file() for page in pages)
    assert all(re.search(rf"lines {command}\b", out) for command in ("edit", "merge", "inspect", "verify"))


def test_every_page_for_what_one_has() -> None:
    """`lines --help` names each page that the table of README names for what a person has, and the tour."""
    _, _, table = (ROOT / "README.md").read_text().partition("## What do you have?")
    named = re.findall(r"docs/[\w-]+\.md", table.partition("\n## ")[0])
    assert len(named) > 5
    assert {*named, "docs/tour.md"} <= set(re.findall(r"docs/[\w-]+\.md", run_lines("--help").out))


@pytest.mark.parametrize("columns", [60, 80, 120])
@pytest.mark.parametrize("command", [[], *([command] for command in COMMANDS)], ids=str)
def test_help_fits(command: list[str], columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of help is wider than 80 columns, or than the terminal where that is wider."""
    monkeypatch.setenv("COLUMNS", str(columns))
    for line in run_lines(*command, "--help").out.splitlines():
        assert len(line) <= max(80, min(columns, 100)), line


USAGE = {
    "a typo": (["edit", "a", "b", "--alhpa", "1"], "no such option: --alhpa", "Did you mean --alpha?"),
    "no number": (["edit", "a", "b", "--alpha", "x"], "--alpha: expected a number (got 'x')", "lines edit --help"),
    "no whole number": (["edit", "a", "b", "--workers=1.5"], "--workers: expected a whole number (got '1.5')", ""),
    "too few": (["edit", "a", "b", "--workers", "0"], "--workers: expected at least 1 (got '0')", ""),
    "too many": (["edit", "a", "b", "--workers", "99"], "--workers: expected at most 64 (got '99')", ""),
    "no choice": (["edit", "a", "b", "--dtype", "int8"], "--dtype: 'int8' is not one of 'float64'", ""),
    "an argument": (["edit", "a"], "FT is missing", "lines edit [OPTIONS] BASE FT"),
    "an option": (["merge"], "--config is missing", "Add --config FILE."),
    "a value": (["edit", "a", "b", "--alpha"], "--alpha", "lines"),
    "one too many": (["edit", "a", "b", "c", "-o", "d"], "(c)", "lines edit --help"),
    "a flag's value": (["edit", "a", "b", "--force=1"], "--force", ""),
    "a command": (["edti"], "no such command 'edti'", "Did you mean edit?"),
    "a control character": (["edit", "a", "b", "--\x1b[31m"], "no such option", ""),
}


@pytest.mark.parametrize(("arguments", "message", "hint"), USAGE.values(), ids=USAGE)
def test_one_style_of_message(arguments: list[str], message: str, hint: str) -> None:
    """What the option parser refuses is said as everything else is: `error: `, `hint: `, no word of a library."""
    ran = run_lines(*arguments)
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    first, second = ran.err.splitlines()
    assert first.startswith("error: ")
    assert second.startswith("hint: ")
    assert message in first
    assert hint in second
    assert not re.search(r"Value error|Input should|Usage:|Try '|Error:|\x1b", ran.err)


@pytest.mark.parametrize(
    "recipe",
    [
        "lines: {alpha: x}",
        "lines: {schedule: nonsense}",
        "lines: {schedule: [1, x]}",
        "lines: {stacks: {a: 3x}}",
        "lines: {filter: {a: {}}}",
        "lines: {series: [a, a]}",
        "lines: {outside: no}",
        "max_shard_size: many",
        "dtype: int8",
        "missing: perhaps",
        "resize: 3",
        "rounding_seed: -1",
        "rounding: up",
        "parameters: {density: x}",
        "models: [{model: [1]}]",
        "models: [{model: a, layer_range: x}]",
        "merge_method: nonsense",
        "output: [1]",
    ],
)
def test_no_words_of_a_library_in_recipes(recipe: str, tmp_path: Path) -> None:
    """Neither in what is said of a recipe."""
    own = "" if recipe.startswith("models") else "models: [{model: ft}]\n"
    (tmp_path / "r.yaml").write_text(f"base_model: base\n{own}{recipe}\n")
    ran = run_lines("merge", "--config", tmp_path / "r.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) in ((2, ""), (3, ""))
    assert ran.err.startswith("error: ")
    assert not re.search(r"Value error|Assertion failed|Input should|validation error|pydantic", ran.err)


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_by_module(shell: str) -> None:
    """`python -m lines_cli` names the command that is installed, in hints and in what it hands to a shell."""
    module = [sys.executable, "-m", "lines_cli"]
    ran = subprocess.run([*module, "edit", "a"], check=False, capture_output=True, text=True, cwd=ROOT)
    assert ran.stderr == "error: FT is missing\nhint: Write lines edit [OPTIONS] BASE FT.\n"
    env = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    show = [*module, "--show-completion", shell]
    ran = subprocess.run(show, check=True, capture_output=True, text=True, cwd=ROOT, env=env)
    assert ran.stderr == ""
    assert "_LINES_COMPLETE=complete_" + shell in ran.stdout
    assert "python" not in ran.stdout.lower()


def completed(*words: str, cwd: Path | None = None) -> list[str]:
    """What bash is offered for the last word."""
    env = {**os.environ, "COMP_WORDS": " ".join(["lines", *words]), "COMP_CWORD": str(len(words))}
    env |= {"_LINES_COMPLETE": "complete_bash"}
    ran = forked.run(forked.command(), env=env, cwd=cwd)
    assert ran.stderr == ""
    return ran.stdout.split()


@pytest.mark.slow
def test_completion() -> None:
    """Commands, options and choices are offered to a shell."""
    assert set(completed("")) >= set(COMMANDS)
    assert completed("ed") == ["edit"]
    assert set(completed("edit", "--missing")) == {"--missing", "--missing-in-blocks"}
    assert set(completed("edit", "--outside", "")) == {"alpha", "position", "base", "keep"}
    assert completed("edit", "--dtype", "b") == ["bfloat16"]
    assert set(completed("edit", "--schedule", "")) >= {"linear", "constant", "unet"}
    assert "cpu" in completed("edit", "--device", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [["edit", ""], ["edit", "ba"], ["merge", "--config", "ba"], ["edit", "-o", "ba"], ["clean", "ba"]], ids=str
)
def test_completion_of_paths(words: list[str], tmp_path: Path) -> None:
    """Where a path goes nothing is offered, and so the shell offers files."""
    (tmp_path / "base").mkdir()
    assert completed(*words, cwd=tmp_path) == []


@pytest.mark.slow
def test_completion_in_bash(tmp_path: Path) -> None:
    """The script that is installed works: choices and files complete in a shell."""
    home = tmp_path / "home"
    home.mkdir()
    (tmp_path / "base.safetensors").touch()
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    (bin_folder / "lines").write_text(f"#!{sys.executable}\nfrom lines_cli.__main__ import main\nmain()\n")
    (bin_folder / "lines").chmod(0o755)
    env = {**os.environ, "HOME": str(home), "PATH": f"{bin_folder}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    shown = subprocess.run(
        ["lines", "--show-completion", "bash"], env=env | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    script = (
        f"{shown.stdout}\n"
        "complete -p lines\n"
        "COMP_WORDS=(lines edit --outside po); COMP_CWORD=3; _lines_completion lines; echo ${COMPREPLY[@]}\n"
    )
    ran = subprocess.run(["bash", "-c", script], env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    installed, offered = ran.stdout.splitlines()
    assert "-o default" in installed  # files, where nothing is offered
    assert offered == "position"
