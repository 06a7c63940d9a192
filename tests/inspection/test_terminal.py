"""What `lines inspect` prints: tables that fold and fit, no escape codes, names from strangers, bars."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from lines_cli.inspection.tables import count, size
from support import forked
from support.files import write_checkpoint, write_raw
from support.inspecting import CONTROL, llama, ok, process, rows_of, told, tuned
from support.run import run_lines


@pytest.mark.parametrize("layers", [1, 12, 13, 126])
@pytest.mark.parametrize("tunes", [0, 1, 2])
@pytest.mark.slow
def test_folding(layers: int, tunes: int, tmp_path: Path) -> None:
    """A stack shows at most 12 layers, the first and the last among them, and all of them with --full."""
    model = llama(layers)
    base = write_checkpoint(tmp_path / "base.safetensors", model)
    fts = [write_checkpoint(tmp_path / f"{at}.safetensors", tuned(model, at)) for at in range(tunes)]
    arguments = [*fts, "--base", base] if tunes else [base]
    for full in ([], ["--full"]):
        out = ok(*arguments, *full).out
        shown = [int(row[0]) for row in rows_of(out, "model.layers") if row[0].isdecimal()]
        assert shown == sorted(set(shown))
        assert (shown[0], shown[-1]) == (0, layers - 1)
        assert len(shown) == (layers if full else min(12, layers))
        assert ("--full shows all" in out) == (not full and layers > 12)
        if not full and layers > 12:
            gaps = {b - a for a, b in pairwise(shown)}
            assert max(gaps) - min(gaps) <= 1


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?[%x]?|-")


@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("tunes", [0, 1, 3, 8])
@pytest.mark.parametrize("flags", [[], ["--tensors"], ["--check", "--full"]], ids=["", "tensors", "check"])
@pytest.mark.slow
def test_columns(tunes: int, flags: list[str], columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is no wider than the terminal unless its numbers need that: long names are elided in their middle, each
    row is one line, and no number is cut. Off a terminal names are whole.
    """
    monkeypatch.chdir(tmp_path)
    model = llama(14)
    write_checkpoint(tmp_path / "Llama-3.1-8B", model)
    fts = [f"Llama-3.1-8B-Instruct-task-{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at))
    arguments = [*fts, "--base", "Llama-3.1-8B"] if tunes else ["Llama-3.1-8B"]
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = run_lines("inspect", *arguments, *flags)
    monkeypatch.setenv("COLUMNS", str(columns))
    ran = run_lines("inspect", *arguments, *flags)
    assert (ran.code, whole.code) == (0, 0), ran.trace
    for line in ran.out.splitlines():
        fact = re.match(r"[a-zA-Z]+ {2,}|1 file|\(|\d+   |.*: \d+ float tensors|.*: 12 of 14 layers", line)
        if len(line) > columns and not fact:
            first, *cells = re.split(r" +", line)
            assert len(first) <= 8, line
            assert cells
    rows = rows_of(ran.out, "model.layers")
    assert len(rows) == (14 if "--full" in flags else 12) + bool(tunes)
    numbers = {0: 5, 1: 7}.get(tunes, 2 + tunes)  # "704 B" counts as one
    for row in rows:
        assert len([cell for cell in row if NUMBER.fullmatch(cell)]) == numbers - 2 * (row[0] == "all"), row
    assert len(ran.out.splitlines()) == len(whole.out.splitlines())
    if "--tensors" in flags:
        for out in (ran.out, whole.out):
            *_, table = out.split("\ntensors\n")
            starts = [line.split(" ")[0] for line in table.split("\n\n")[0].splitlines()[1:]]
            assert len(starts) == len(model)
            for start in starts:
                begin, dots, end = start.partition("…")
                if end.endswith("…"):  # of names that would look alike, what is from where they differ
                    assert begin == ""
                    assert any(end[:-1] in name for name in model), start
                else:
                    assert any(name.startswith(begin) and name.endswith(end) for name in model), start
                assert not (dots and out is whole.out)


@pytest.mark.slow
@pytest.mark.parametrize(("tunes", "columns"), [(8, 8), (9, 3)])
def test_many_fine_tunes(tunes: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8 fine-tunes a table tells the lowest, the mean and the highest, with --full a column for each."""
    monkeypatch.chdir(tmp_path)
    model = llama(3)
    write_checkpoint(tmp_path / "base", model)
    fts = [f"ft{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at, by=0.01 * (at + 1)))
    out = ok(*fts, "--base", "base").out
    assert ("lowest    mean  highest" in out) == (tunes > 8)
    report = told(*fts, "--base", "base")
    for at, row in enumerate(rows_of(out, "model.layers")[:3]):
        values = [tune["layers"][at]["relative_norm"] for tune in report["fine_tunes"]]
        if tunes > 8:
            values = [min(values), sum(values) / tunes, max(values)]
        assert len(row) == 2 + columns
        assert [float(cell[:-1]) for cell in row[2:]] == pytest.approx([100 * value for value in values], rel=2e-2)
    cosines = rows_of(out, "cosine similarity of the updates")
    assert [row[1] for row in cosines] == fts
    if tunes > 8:  # a model with itself does not count
        others = [
            [value for to, value in enumerate(row) if to != at] for at, row in enumerate(report["together"]["cosine"])
        ]
        expected = [[f"{v + 0.0:.3f}" for v in (min(o), sum(o) / len(o), max(o))] for o in others]
        assert [row[2:] for row in cosines] == expected
    full = ok(*fts, "--base", "base", "--full").out
    assert {len(row) for row in rows_of(full, "cosine similarity of the updates")} == {2 + tunes}
    assert {len(row) for row in rows_of(full, "model.layers")[:3]} == {2 + tunes}


@pytest.mark.parametrize(("tunes", "by"), [(8, 1e-7), (12, 1e-2)], ids=["8, tiny updates", "12"])
def test_no_number_is_cut(tunes: int, by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fine-tunes there are, a number stands on one line."""
    monkeypatch.chdir(tmp_path)
    model = llama(3)
    write_checkpoint(tmp_path / "base", model)
    fts = [f"ft{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at, by=by))
    for row in rows_of(ok(*fts, "--base", "base").out, "model.layers"):
        assert all(cell.endswith("%") for cell in row[2:]), row


@pytest.mark.slow
@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}, {"TERM": "xterm-256color"}])
def test_no_escape_codes_in_a_pipe(env: dict[str, str], tmp_path: Path) -> None:
    """Piped output holds no escape codes, with colour forbidden or not."""
    path = write_checkpoint(tmp_path / "m", llama())
    with process(path, **env) as running:
        out, err = running.communicate()
    assert running.returncode == 0, err
    assert "\x1b" not in out + err
    assert "model.layers" in out


@pytest.mark.slow
@pytest.mark.parametrize("forced", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_on_a_terminal(forced: dict[str, str], tmp_path: Path) -> None:
    """On a terminal, too, NO_COLOR and TERM=dumb leave no colour."""
    import pty

    path = write_checkpoint(tmp_path / "m", llama())
    leader, follower = pty.openpty()
    with process(path, stdout=follower, stderr=follower, **forced) as running:
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
        os.close(leader)
        assert running.wait() == 0
    assert not re.search(rb"\x1b\[[\d;]*[34]\d[\d;]*m", seen)
    if forced == {"TERM": "dumb"}:
        assert b"\x1b" not in seen


@pytest.mark.slow
def test_an_ascii_stdout(tmp_path: Path) -> None:
    """Where stdout holds only ASCII, bars are drawn with #, and names are escaped."""
    path = write_checkpoint(tmp_path / "m.safetensors", {f"layers.{i}.gewicht_ü_权": torch.ones(2) for i in range(3)})
    for options in ([], ["--tensors"], ["--json", "--tensors"]):
        with process(path, *options, PYTHONIOENCODING="ascii", PYTHONUTF8="0") as running:
            out, err = running.communicate()
        assert running.returncode == 0, err
        assert out.isascii()
        assert ("#" * 12 in out) == ("--json" not in options)
        assert ("\\xfc_" in out or "\\u00fc_" in out) == ("--tensors" in options)


@pytest.mark.slow
def test_a_closed_pipe(tmp_path: Path) -> None:
    """`lines inspect ... | head` ends without a traceback."""
    path = write_checkpoint(tmp_path / "m", {f"layers.{i}.w{j}": torch.ones(1) for i in range(40) for j in range(80)})
    program = "import sys; from lines_cli.cli.app import main; main()"
    command = [sys.executable, "-c", program, "inspect", str(path), "--tensors"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.readline()
        running.stdout.close()
        err = running.stderr.read()
    assert b"Traceback" not in err


EVIL = {
    "escape": "\x1b[31mowned\x1b[0m",
    "bell, CR and C1": "a\rb\x07\x9b31m",
    "right to left": "a\u202eb\u2066c",
    "markup": "[red]x[/red][bold]",
    "broken markup": "[/]",
    "math": r"$\frac{1}{0}$",
    "script": "<script>alert(1)</script>\"'&amp;",
    "DEL and NUL": "a\x7f\0b",
    "very long": "x" * 3000,
    "braces": "{l}{s}{0}%s",
    "emoji": ":warning: 🎉",
}


def evil_model(tmp: Path, evil: str, seed: int = 0) -> Path:
    """A file whose names, of a stack and of what lies outside, are as hostile as JSON lets them be."""
    names = [*(f"{evil}.layers.{i}.w" for i in range(3)), f"outside.{evil}", evil]
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    data = torch.randn(2 * len(names), generator=torch.Generator().manual_seed(seed)).numpy().tobytes()
    return write_raw(tmp / f"m{seed}.safetensors", header, data)


@pytest.mark.parametrize("what", EVIL)
def test_hostile_names(what: str, tmp_path: Path) -> None:
    """A tensor's name is told as text: it moves no cursor, sets no colour, and is the same name in the JSON."""
    evil = EVIL[what]
    base, ft = (evil_model(tmp_path, evil, seed) for seed in range(2))
    for arguments in ([base], [ft, "--base", base]):
        ran = ok(*arguments, "--tensors")
        assert not CONTROL.search(ran.out + ran.err)
        parsed = ok(*arguments, "--tensors", "--json")
        assert not CONTROL.search(parsed.out)
        assert {row["name"] for row in parsed.json["map"]} >= {evil, f"outside.{evil}"}
        assert [stack["name"] for stack in parsed.json["stacks"]] == [f"{evil}.layers"]
    if what in ("markup", "script", "braces"):
        assert evil in "".join(line.split(" ", 1)[0] for line in ok(base, "--tensors").out.splitlines())


@pytest.mark.parametrize("options", [["--tensors"], ["--check"], []], ids=["tensors", "check", "headers"])
def test_a_name_of_several_lines(options: list[str], tmp_path: Path) -> None:
    """A line break in a name makes no line of its own: it is escaped, as in messages."""
    forged = "model.layers.9.w                F32     9x9       9  attention  0.9"
    names = [f"a\n{forged}", *(f"b\n{forged}.layers.{i}.w" for i in range(2))]
    path = write_checkpoint(tmp_path / "m.safetensors", {name: torch.zeros(2) for name in names})
    out = run_lines("inspect", path, *options).out
    assert not [line for line in out.splitlines() if line.split()[:1] == ["model.layers.9.w"]]


def test_a_hostile_path(tmp_path: Path) -> None:
    """A checkpoint's path is told as harmlessly as its names, and a recipe's models are, too."""
    folder = tmp_path / "\x1b[31m[red]\udcff"
    path = write_checkpoint(folder, llama(), config={"quantization_config": {"quant_method": "\x1b[31m"}})
    (path / "lines_recipe.yaml").write_text('base_model: /b\nmodels: [{model: "/a\\e[31m\\n\\rerror: x"}]\n')
    ran = ok(path)
    assert not CONTROL.search(ran.out + ran.err)
    assert not CONTROL.search(ok(path, "--json").out)


@pytest.mark.slow
def test_the_terminal_tells_what_json_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the tables are those of the JSON, rounded."""
    monkeypatch.chdir(tmp_path)
    model = llama(6)
    write_checkpoint(tmp_path / "base", model)
    for at in range(2):
        write_checkpoint(tmp_path / f"ft{at}", tuned(model, at + 1))
    report, out = told("ft0", "--base", "base"), ok("ft0", "--base", "base").out
    for row, layer in zip(rows_of(out, "model.layers"), report["layers"], strict=False):
        assert row[:2] == [str(layer["index"]), f"{layer['update_norm']:.4g}"]
        assert float(row[2][:-1]) == pytest.approx(100 * layer["relative_norm"], abs=0.006)
        most = max(layer["relative_norm"] for layer in report["layers"])
        bar = row.pop(3)  # in eighths of twelve characters
        assert 8 * len(bar) == pytest.approx(96 * layer["relative_norm"] / most, abs=8)
        assert float(row[3][:-1]) == pytest.approx(100 * layer["unchanged"], abs=0.06)
        assert row[4:7] == [f"{layer[key]:.4g}" for key in ("largest", "coefficient", "scaled_norm")]
    (tune,) = report["fine_tunes"]
    assert f"norm {tune['update_norm']:.4g}" in out
    assert f"{tune['largest']:.4g} in {tune['largest_in']}" in out
    report, out = told("ft0", "ft1", "--base", "base"), ok("ft0", "ft1", "--base", "base").out
    together = report["together"]
    assert f"norm {together['norm_of_sum']:.4g}, where the norms of all add up to {together['sum_of_norms']:.4g}" in out
    norms = [f"{together[key]:.4g}" for key in ("scaled_norm_of_sum", "scaled_sum_of_norms")]
    assert f"scaled   norm {norms[0]}, where the norms of all add up to {norms[1]}" in out
    assert f"1 ft0   1.000  {together['cosine'][0][1]:.3f}".replace("  -", " -") in out.replace("  -", " -")
    assert f"alpha {together['auto']['alpha']:.4g}" in out
    report, out = told("base"), ok("base").out
    assert f"{report['tensors']} tensors, {report['parameters']} parameters, 1.42 kB (F32)" in out.replace(
        f"{report['parameters'] / 1000:.3g} K", str(report["parameters"])
    ).replace(size(report["bytes"]), "1.42 kB")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 K"), (1_530_000_000, "1.53 B"), (999_499, "999 K")],
)
def test_counts_in_words(value: int, shown: str) -> None:
    """Parameters are told in three digits."""
    assert count(value) == shown


@pytest.mark.parametrize("value", [999_500, 999_999, 999_600_000, 999_999_999_999])
def test_just_below_the_next_unit(value: int) -> None:
    """What rounds up to a thousand of a unit is one of the next."""
    assert "e+" not in count(value) + size(value)
    assert count(value).startswith("1 ")


@pytest.mark.slow
def test_bars_do_not_disturb(outputs: Path) -> None:
    """On a terminal a bar is drawn for each pass, on stderr alone; --quiet draws none; the report is the same."""
    import pty

    def program() -> None:
        from lines_cli.cli.app import app

        for flags in ([], ["--quiet"]):
            app(["inspect", "--config", "r.yaml", *flags], standalone_mode=False)
            for stream in (sys.stdout, sys.stderr):
                print(end="\f", flush=True, file=stream)

    leader, follower = pty.openpty()
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    env["TERM"] = "xterm-256color"
    with forked.Forked(program, stderr=follower, cwd=outputs, env=env, fresh=["lines_cli.cli"]) as running:
        os.close(follower)
        drawn = b""
        with suppress(OSError):
            while part := os.read(leader, 65536):
                drawn += part
        os.close(leader)
        told, _ = running.communicate()
    assert running.returncode == 0
    out, quiet, _ = told.split("\f")
    seen, silent, _ = drawn.split(b"\f")
    assert b"comparing" in seen
    assert b"measuring" in seen or seen.count(b"\x1b[?25l") > 1
    assert "\x1b" not in out
    assert (quiet, b"comparing" in silent) == (out, False)
    assert out == ok("--config", outputs / "r.yaml").out.replace(f"{outputs}/", "./")


def test_bars_have_the_scale_of_their_table(tmp_path: Path) -> None:
    """The longest bar of a table fills its column, and no other does, however much larger other tables' values are."""
    base = {f"h.{i}.{part}": torch.ones(4) for i in range(2) for part in ("attn.w", "mlp.w")} | {
        "wte.weight": torch.ones(4)
    }
    grown = {"h.0.attn.w": 1.01, "h.0.mlp.w": 1.0, "h.1.attn.w": 1.02, "h.1.mlp.w": 1.0, "wte.weight": 3.0}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", {name: tensor * grown[name] for name, tensor in base.items()})
    lines = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base").out.splitlines()
    lines = lines[: lines.index("h in float32")] + lines[lines.index("outside the blocks") :]
    bars = {line.split()[0]: line.count("█") for line in lines if "%" in line and "norm" not in line}
    assert bars["1"] == bars["embedding"] == bars["before"] == 12
    assert bars["0"] == 6
    assert bars["attention"] == bars["mlp"] == 0
