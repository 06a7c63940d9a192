"""How far a run is: lines off a terminal, a bar on one, what --resume keeps."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import count as counting
from pathlib import Path

import pytest
import torch

from lines_cli.cli import console
from lines_cli.storage.files import NewFile
from support import forked
from support.files import write_checkpoint
from support.run import run_lines

LINE = re.compile(r"(\w[\w /]*): (\d+)% \((.+) of (.+), (.+)/s(?:, (.+) left)?\)")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of some megabytes, where we are."""
    for seed, side in enumerate(("base", "ft", "ft2")):
        made = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{at}.w": torch.randn(500_000, generator=made) for at in range(24)}
        write_checkpoint(tmp_path / side, tensors)
    (tmp_path / "merge.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: ft}, {model: ft2}]\nparameters: {density: 0.5}\n"
        "lines: {beta: 0.5}\n"
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def _lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is without `conftest.py`."""
    monkeypatch.setattr(console, "_SILENT", 2.0)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes a second on each time it is read."""
    ticks = counting()
    monkeypatch.setattr(console, "_clock", lambda: float(next(ticks)))


COMMANDS = {
    "edit": ["edit", "base", "ft", "-o", "out"],
    "merge": ["merge", "--config", "merge.yaml", "-o", "out"],
    "inspect": ["inspect", "ft", "--base", "base"],
    "check": ["inspect", "ft", "--check"],
}


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.slow
def test_lines_off_a_terminal(command: list[str], here: Path) -> None:
    """A long run says on stderr how far it is, at most ten times a pass; --quiet says nothing, stdout is the same."""
    ran = run_lines(*command, "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert isinstance(ran.json, dict)
    found = [match for line in ran.err.splitlines() if (match := LINE.fullmatch(line))]
    passes: list[list[tuple[str, int]]] = []
    for match in found:
        title, tenth = match[1], int(match[2])
        if not passes or passes[-1][-1][0] != title or passes[-1][-1][1] >= tenth:
            passes.append([])
        passes[-1].append((title, tenth))
    assert (len(passes) == 1) == (command[0] != "merge")
    for lines in passes:
        assert len(lines) <= 10
        assert all(tenth % 10 == 0 for _, tenth in lines)
        assert lines[-1][1] == 100
    if "out" in command:
        command = [*command, "--force"]
    assert not [line for line in run_lines(*command, "--quiet").err.splitlines() if LINE.fullmatch(line)]


@pytest.mark.slow
def test_a_short_run_says_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of a moment has no lines."""
    monkeypatch.setattr(console, "_clock", lambda: 0.0)
    ran = run_lines(*COMMANDS["edit"])
    assert (ran.code, "%" in ran.err) == (0, False)


def steps(sizes: Iterable[int]) -> Iterator[int]:
    yield from sizes


@pytest.mark.parametrize("chunks", [1, 3, 7, 10, 64, 1000])
def test_a_line_every_tenth(chunks: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines are those of tenths that were reached, whatever the chunks; sizes are the summary's; all bytes pass."""
    ticks = counting()
    monkeypatch.setattr(console, "_clock", lambda: 3.0 * next(ticks))
    sizes = [1000] * chunks
    assert list(console._in_lines("writing", sum(sizes), steps(sizes))) == sizes
    found = [LINE.fullmatch(line) for line in capsys.readouterr().err.splitlines()]
    tenths = [int(match[2]) for match in found if match]
    assert len(tenths) == len(found)
    assert tenths == sorted({10 * (10 * at // chunks) for at in range(1, chunks + 1)} - {0})
    last = found[-1]
    assert last
    assert (last[2], last[3], last[6]) == ("100", last[4], None)


def test_the_speed_is_a_moving_average(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is that of the last seconds: what was slow long ago counts no more, and one late chunk is no jump."""
    now = [0.0]
    monkeypatch.setattr(console, "_clock", lambda: now[0])
    pace = console._Pace(100_000_000)
    for _ in range(100):  # 10 kB/s
        now[0] += 1
        pace.add(10_000)
    assert ", 10 kB/s, " in str(pace)
    for _ in range(20):  # 1 MB/s
        now[0] += 1
        pace.add(1_000_000)
    assert ", 1 MB/s, " in str(pace)
    assert "21 MB of 100 MB" in str(pace)
    assert str(pace).endswith("1 min 19 s left")
    now[0] += 2  # a chunk that took twice as long
    pace.add(1_000_000)
    rate = float(re.search(r", (\d+) kB/s", str(pace))[1])  # type: ignore[index]
    assert 800 < rate < 1000


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (59.4, "59 s"), (60, "1 min"), (200, "3 min 20 s"), (599, "9 min 59 s"), (3599, "59 min"),
     (7500, "2 h 5 min"), (360_000, "100 h 0 min")],
)  # fmt: skip
def test_times_in_words(seconds: float, said: str) -> None:
    """What is left is said as people say it."""
    assert console._duration(seconds) == said


def on_a_terminal(here: Path, term: str, *flags: str) -> bytes:
    """What is drawn on a terminal of this kind by an edit."""
    import pty

    def program() -> None:
        from lines_cli.cli import console

        console._SILENT = 0.0
        forked.command(*COMMANDS["edit"], *flags)()

    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")} | {"TERM": term}
    leader, follower = pty.openpty()
    with forked.Forked(program, stderr=follower, cwd=here, env=env, fresh=["lines_cli.cli"]) as running:
        os.close(follower)
        drawn = b""
        with suppress(OSError):
            while part := os.read(leader, 65536):
                drawn += part
        os.close(leader)
        assert running.wait() == 0
    return drawn


@pytest.mark.slow
def test_a_bar_on_a_terminal(here: Path) -> None:
    """Stage, sizes and speed stand beside the bar, in the summary's units; it is gone in the end."""
    drawn = on_a_terminal(here, "xterm-256color").decode()
    assert "writing" in drawn
    assert re.search(r"[\d.]+ MB of 48 MB, [\d.]+ [kMG]B/s", drawn)
    _, _, after = drawn.rpartition("\x1b[1A\x1b[2K")  # the cursor is back on an empty line
    assert after != drawn
    assert "writing" not in after
    assert on_a_terminal(here, "xterm-256color", "--force", "--quiet") == b""


@pytest.mark.parametrize("term", ["dumb", "unknown"])
@pytest.mark.slow
def test_a_dumb_terminal(term: str, here: Path) -> None:
    """A terminal that cannot move its cursor gets whole lines, and nothing is left behind."""
    drawn = on_a_terminal(here, term).decode().replace("\r\n", "\n")
    assert "\x1b" not in drawn
    assert "\r" not in drawn
    assert drawn.endswith("\n")
    assert all(LINE.fullmatch(line) or line.startswith("note: ") for line in drawn.splitlines())


@pytest.mark.slow
def test_what_resume_keeps(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume says how much of an earlier run it keeps: when it starts, in the summary, and in the JSON."""
    (here / "before").mkdir()
    command = ["edit", "base", "ft", "-o", "out", "--workers", "1"]
    write = NewFile.write

    def interrupt() -> None:
        calls = counting()

        def writing(*args: object) -> None:
            if next(calls) == 20:
                raise KeyboardInterrupt
            write(*args)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(NewFile, "write", writing)
            assert run_lines(*command).code == 130

    interrupt()
    ran = run_lines(*command, "--resume", "--json")
    assert ran.code == 0, ran.err
    resumed, written = ran.json["resumed"], ran.json["bytes"]["written"]
    assert 0 < resumed < written
    said = re.search(r"holds unfinished work \((\d+)% finished\): (.+) of it is kept", ran.err)
    assert said
    assert int(said[1]) == round(100 * resumed / written)
    (here / "out").rename(here / "first")
    interrupt()
    ran = run_lines(*command, "--resume")
    kept = re.search(r"wrote 48 MB \((.+) of it before\) in ", ran.out)
    assert kept
    assert kept[1] == said[2]
    assert run_lines("edit", "base", "ft", "-o", "whole", "--json").json["resumed"] == 0
    assert (here / "out/model.safetensors").read_bytes() == (here / "first/model.safetensors").read_bytes()
