"""What every JSON object begins with, and errors as JSON."""

from __future__ import annotations

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest

import lines_cli as lines
from lines_cli.storage.files import NewFile
from support.files import write_checkpoint
from support.inspecting import llama, tuned
from support.run import run_lines

FIRST = [("schema", 1), ("lines", lines.__version__)]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A base, a fine-tune and a recipe, where we are."""
    write_checkpoint(tmp_path / "base", llama())
    write_checkpoint(tmp_path / "ft", tuned(llama(), 1))
    (tmp_path / "merge.yaml").write_text("base_model: base\nmodels: [{model: ft}]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_every_object_begins_alike(pair: Path) -> None:
    """`schema` and `lines` come first in what each command prints, and in what each call returns."""
    for arguments in (
        ["edit", "base", "ft", "-o", "out", "--dry-run"],
        ["edit", "base", "ft", "-o", "out"],
        ["edit", "base", "ft", "-o", "out", "--resume"],
        ["merge", "--config", "merge.yaml", "-o", "merged", "--dry-run"],
        ["merge", "--config", "merge.yaml", "-o", "merged"],
        ["inspect", "base"],
        ["inspect", "ft", "--base", "base", "--check"],
        ["verify", "out"],
    ):
        ran = run_lines(*arguments, "--json")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        assert list(ran.json.items())[:2] == FIRST, arguments
    for told in (
        lines.edit("base", "ft", "again"),
        lines.edit("base", "ft", "never", dry_run=True),
        lines.merge("merge.yaml", "once more"),
        lines.inspect("base"),
        lines.verify("out").report(),
    ):
        assert list(told.items())[:2] == FIRST


ERRORS: dict[str, tuple[list[str], int, str]] = {
    "an option that there is not": (["edit", "base", "ft", "-o", "out", "--alhpa", "1"], 2, "--alhpa"),
    "a value that is none": (["edit", "base", "ft", "-o", "out", "--alpha", "x"], 2, "--alpha"),
    "no such choice": (["inspect", "ft", "--outside", "no"], 2, "--outside"),
    "an argument that is missing": (["verify"], 2, "OUT"),
    "an option that is missing": (["merge"], 2, "--config"),
    "no such command": (["edti"], 2, "edti"),
    "impossible": (["edit", "base", "ft", "-o", "out", "--alpha", "nan"], 2, "alpha"),
    "no such input": (["edit", "base", "absent", "-o", "out"], 3, "absent"),
    "no such input to inspect": (["inspect", "absent"], 3, "absent"),
    "in a dry run": (["edit", "base", "absent", "-o", "out", "--dry-run"], 3, "absent"),
    "of another model": (["inspect", "other", "--base", "base"], 4, "other"),
    "a destination that is taken": (["edit", "base", "ft", "-o", "ft"], 6, "ft"),
    "no recipe": (["verify", "base"], 3, "base"),
}


@pytest.mark.parametrize(("arguments", "code", "word"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments: list[str], code: int, word: str, pair: Path) -> None:
    """With --json an error is an object on stdout, with the code, message and hint that stderr has in words; without
    it stdout is empty.
    """
    write_checkpoint(pair / "other", {"conv.3.weight": llama()["model.norm.weight"]})
    plain, ran = run_lines(*arguments), run_lines(*arguments, "--json")
    assert (plain.code, plain.out, plain.trace) == (code, "", "")
    assert (ran.code, ran.err, ran.trace) == (code, plain.err, "")
    assert list(ran.json.items())[:2] == FIRST
    assert ran.json.keys() == {"schema", "lines", "error"}
    error = ran.json["error"]
    assert list(error) == ["code", "message", "hint"]
    assert error["code"] == code
    assert word in error["message"]
    assert f"error: {error['message']}".replace("\n", " ").split() == ran.err.split("\nhint: ")[0].split()
    assert error["hint"] is None or f"hint: {error['hint']}" in ran.err


@pytest.mark.slow
def test_a_report_is_the_one_object(pair: Path) -> None:
    """What was printed before the error is all that stdout has: --check and verify say in it what is wrong."""
    broken = tuned(llama(), 1)
    broken["model.norm.weight"][0] = float("nan")
    write_checkpoint(pair / "broken", broken)
    ran = run_lines("inspect", "broken", "--check", "--json")
    assert (ran.code, "error: " in ran.err) == (5, True)
    assert ran.json["health"][0]["nonfinite"]
    assert run_lines("edit", "base", "ft", "-o", "out").code == 0
    (pair / "out" / "config.json").write_text("{}")
    ran = run_lines("verify", "out", "--json")
    assert (ran.code, ran.json["same"]) == (5, False)


@pytest.mark.parametrize(
    ("raised", "code"),
    [(KeyboardInterrupt(), 128 + signal.SIGINT), (MemoryError("buffers"), 1)],
    ids=["Ctrl-C", "memory"],
)
def test_what_is_no_refusal(raised: BaseException, code: int, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C and too little memory are objects, too."""

    def fail(*_: Any) -> None:
        raise raised

    monkeypatch.setattr(NewFile, "write", fail)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--json")
    assert (ran.code, ran.trace) == (code, "")
    assert ran.json["error"]["code"] == code


def test_kept_work_is_in_the_hint(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where an interrupted run keeps what it had finished, the hint says how to continue."""
    write, written = NewFile.write, []

    def third(*args: Any) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(write(*args))

    monkeypatch.setattr(NewFile, "write", third)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--max-shard-size", "300", "--workers", "1", "--json")
    assert (ran.code, ran.trace) == (130, "")
    assert re.fullmatch(r"What was finished is kept in .*--resume continues.*", ran.json["error"]["hint"])


def test_a_bug(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug is an object and a traceback."""

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("never")

    monkeypatch.setattr(NewFile, "write", fail)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--json")
    assert ran.code == 1
    assert "ZeroDivisionError" in ran.trace
    assert "a bug in lines: ZeroDivisionError: never" in json.loads(ran.out)["error"]["message"]


def test_secrets_and_control_characters(pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error's message holds no token and no control character, in JSON as in words."""
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken0123456789")
    ran = run_lines("edit", "base", "./hf_averysecrettoken0123456789\x1b[31m", "-o", "out", "--json")
    assert ran.code == 3
    assert "averysecret" not in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err
    ran = run_lines("edit", "base", "ft", "-o", "out", "--alpha=hf_averysecrettoken0123456789\x1b[31m", "--json")
    assert ran.code == 2
    assert "averysecret" not in ran.out + ran.err
    assert "\x1b" not in ran.out + ran.err
