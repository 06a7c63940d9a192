"""--log-json, and the variables in the environment that set defaults."""

from __future__ import annotations

import json
import os
import signal
from itertools import count as counting
from pathlib import Path
from typing import Any

import pytest
import torch

import lines_cli as lines
from lines_cli.cli import console
from lines_cli.storage.files import NewFile
from support import forked
from support.files import write_checkpoint
from support.run import Ran, run_lines


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of some megabytes, where we are."""
    for seed, side in enumerate(("base", "ft", "ft2")):
        made = torch.Generator().manual_seed(seed)
        write_checkpoint(tmp_path / side, {f"layers.{at}.w": torch.randn(400_000, generator=made) for at in range(8)})
    (tmp_path / "merge.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: ft}, {model: ft2}]\nparameters: {density: 0.5}\n"
        "lines: {beta: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def events(ran: Ran) -> list[dict[str, Any]]:
    """Every line of stderr, each of which begins as all JSON of lines does."""
    found = [json.loads(line) for line in ran.err.splitlines()]
    for event in found:
        assert list(event)[:4] == ["schema", "lines", "event", "seconds"]
        assert (event["schema"], event["lines"]) == (1, lines.__version__)
    seconds = [event["seconds"] for event in found]
    assert seconds == sorted(seconds)
    assert found[-1]["event"] == "end"
    assert found[-1]["code"] == ran.code
    return found


COMMANDS = {
    "edit": ["edit", "base", "ft", "-o", "out"],
    "merge": ["merge", "--config", "merge.yaml", "-o", "out"],
    "inspect": ["inspect", "ft", "--base", "base"],
    "check": ["inspect", "ft", "--check"],
}


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_progress(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass has an event at its begin and at its end, and between them one every few seconds; bytes only grow."""
    ticks = counting()
    monkeypatch.setattr(console, "_clock", lambda: 5.0 * next(ticks))
    ran = run_lines(*command, "--log-json", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert isinstance(ran.json, dict)
    told = [event for event in events(ran) if event["event"] == "progress"]
    passes: list[list[dict[str, Any]]] = []
    for event in told:
        if event["done"] == 0:
            passes.append([])
        passes[-1].append(event)
    assert (len(passes) == 1) == (command[0] != "merge")
    for each in passes:
        assert len({(event["pass"], event["total"]) for event in each}) == 1
        done = [event["done"] for event in each]
        assert done == sorted(done)
        assert (done[-1], each[-1]["eta"]) == (each[0]["total"], 0)
        assert (each[0]["rate"], each[0]["eta"]) == (None, None)
        for event in each[1:-1]:
            assert event["rate"] > 0
            assert event["eta"] == pytest.approx((event["total"] - event["done"]) / event["rate"])
    assert max(map(len, passes)) > 2


@pytest.mark.slow
def test_stdout_is_the_same() -> None:
    """It holds what it holds without the option, in words and as JSON."""
    for command in (["inspect", "base"], ["edit", "base", "ft", "-o", "out", "--dry-run", "--json"]):
        assert run_lines(*command).out == run_lines(*command, "--log-json").out != ""


@pytest.mark.slow
def test_a_note_a_warning_and_what_else_is_said() -> None:
    """Notes and warnings are events of their own; what a library writes is a message, a line of it at a time."""
    tensors = {f"layers.{at}.w": torch.ones(8) for at in range(2)}
    write_checkpoint(Path("same"), tensors)
    ran = run_lines("edit", "same", "same", "-o", "out", "--log-json")
    assert ran.code == 0, ran.err
    (warning,) = (event["message"] for event in events(ran) if event["event"] == "warning")
    assert "is the base" in warning
    ran = run_lines("edit", "base", "ft", "-o", "out", "--dry-run", "--log-json")
    assert [event["message"] for event in events(ran) if event["event"] == "note"]
    assert "Nothing was written (--dry-run)." in [event.get("message") for event in events(ran)]


ERRORS = {
    "refused": (["edit", "base", "absent", "-o", "out"], 3, "absent"),
    "of the parser": (["edit", "base", "ft", "-o", "out", "--alhpa", "1"], 2, "--alhpa"),
    "a value": (["edit", "base", "ft", "-o", "out", "--workers", "x"], 2, "--workers"),
    "no such command": (["edti"], 2, "edti"),
    "taken": (["edit", "base", "ft", "-o", "ft"], 6, "ft"),
}


@pytest.mark.parametrize(("arguments", "code", "word"), ERRORS.values(), ids=ERRORS)
def test_errors(arguments: list[str], code: int, word: str) -> None:
    """An error is one event with code, message and hint, the same that --json has on stdout."""
    ran = run_lines(*arguments, "--log-json", "--json")
    assert (ran.code, ran.trace) == (code, "")
    (error,) = (event for event in events(ran) if event["event"] == "error")
    assert {key: error[key] for key in ("code", "message", "hint")} == ran.json["error"]
    assert word in error["message"]


@pytest.mark.slow
def test_an_interruption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is an error with its code, and what is kept is a note."""

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(NewFile, "sync", fail)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--log-json")
    found = events(ran)
    assert (ran.code, [event["code"] for event in found if event["event"] == "error"]) == (130, [130])
    assert any("--resume continues" in event["message"] for event in found if event["event"] == "note")


@pytest.mark.slow
def test_a_signal_in_a_process() -> None:
    """Of a process that is ended by SIGTERM every line is an object, too."""

    def program() -> None:
        write, written = NewFile.write, []

        def second(*arguments: Any) -> None:
            written.append(write(*arguments))
            if len(written) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        NewFile.write = second  # type: ignore[method-assign]
        forked.command("edit", "base", "ft", "-o", "out", "--log-json", "--workers", "1")()

    ended = forked.run(program)
    assert ended.returncode == 143
    assert events(Ran(143, ended.stdout, ended.stderr, ""))[-1]["code"] == 143


@pytest.mark.slow
def test_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --quiet there is no progress, and errors and the end are still said."""
    ran = run_lines("edit", "base", "ft", "-o", "out", "--log-json", "--quiet")
    assert [event["event"] for event in events(ran)] == ["end"]


@pytest.mark.slow
def test_no_secret_and_no_control_character(monkeypatch: pytest.MonkeyPatch) -> None:
    """As everywhere, what is said holds no token."""
    monkeypatch.setenv("HF_TOKEN", "hf_averysecrettoken0123456789")
    ran = run_lines("edit", "base", "./hf_averysecrettoken0123456789\x1b[31m", "-o", "out", "--log-json")
    assert events(ran)
    assert "averysecret" not in ran.err
    assert "\x1b" not in ran.err


@pytest.mark.slow
def test_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """LINES_LOG_JSON does the same for each command, what the option parser refuses among them."""
    monkeypatch.setenv("LINES_LOG_JSON", "1")
    for arguments in (["inspect", "base"], ["clean", "out"], ["edti"], ["edit", "--alhpa"], ["--version"]):
        assert events(run_lines(*arguments))
    monkeypatch.setenv("LINES_LOG_JSON", "0")
    assert not run_lines("inspect", "base").err.startswith("{")


# --- variables in the environment ---


def threads(ran: Ran) -> int:
    """How many workers a plan counts with."""
    (line,) = (line for line in ran.out.splitlines() if line.startswith("memory"))
    return int(line.split()[-2])


@pytest.mark.slow
def test_a_default_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable sets the default of its option; the command line comes first; an empty one says nothing."""
    plan = ["edit", "base", "ft", "--dry-run"]
    monkeypatch.setenv("LINES_WORKERS", "7")
    assert threads(run_lines(*plan)) == 7
    assert threads(run_lines(*plan, "--workers", "3")) == 3
    monkeypatch.setenv("LINES_WORKERS", "")
    assert threads(run_lines(*plan)) <= 4
    monkeypatch.setenv("LINES_QUIET", "true")
    assert run_lines("edit", "base", "ft", "-o", "out").out == ""


WRONG = {
    "LINES_WORKERS": ("x", "LINES_WORKERS says --workers: expected a whole number (got 'x')"),
    "LINES_WORKERS=": ("0", "LINES_WORKERS says --workers: expected at least 1 (got '0')"),
    "LINES_DEVICE": ("tpu", "LINES_DEVICE says --device tpu: not a device"),
    "LINES_GPU_MEMORY": ("much", "LINES_GPU_MEMORY says --gpu-memory much: a size"),
    "LINES_CACHE": ("~nobody-of-this-name", "LINES_CACHE says --cache ~nobody-of-this-name: there is no user"),
    "LINES_QUIET": ("maybe", "LINES_QUIET says --quiet"),
    "LINES_LOG_JSON": ("maybe", "LINES_LOG_JSON says --log-json"),
}


@pytest.mark.parametrize(("variable", "value", "said"), [(name.rstrip("="), *rest) for name, rest in WRONG.items()])
@pytest.mark.slow
def test_a_wrong_value_names_the_variable(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And an option on the command line, right or wrong, is blamed for nothing else than itself."""
    monkeypatch.setenv(variable, value)
    ran = run_lines("edit", "base", "ft", "-o", "out")
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    assert said in ran.err
    assert not Path("out").exists()
    right = {"LINES_WORKERS": ["--workers", "1"], "LINES_DEVICE": ["--device", "cpu"], "LINES_CACHE": ["--cache", "x"],
             "LINES_GPU_MEMORY": ["--gpu-memory", "1GB"]}  # fmt: skip
    if variable in right:
        assert run_lines("edit", "base", "ft", "-o", "out", *right[variable]).code == 0
        flag = right[variable][0]
        ran = run_lines("edit", "base", "ft", "-o", "again", f"{flag}=~nobody-else")
        assert (ran.code, variable in ran.err) == (2, False)


@pytest.mark.slow
def test_python_heeds_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are defaults of the command line."""
    monkeypatch.setenv("LINES_DEVICE", "tpu")
    monkeypatch.setenv("LINES_WORKERS", "x")
    assert lines.edit("base", "ft", "out")["done_before"] is False
