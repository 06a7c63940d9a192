"""What the summary of a run says: tables that fit, why tensors are copied, and what may be meant otherwise."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch

import lines_cli as lines
from support import forked
from support.files import write_checkpoint
from support.inspecting import CONTROL, llama, tuned
from support.run import run_lines

LONG = "vision_language_model.visual_encoder_with_a_very_long_name.transformer.resblocks"


def long_names(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    names = [f"{LONG}.{at}.weight" for at in range(14)] + [f"text.layers.{at}.weight" for at in range(3)]
    return {name: torch.randn(50, 20, generator=made) for name in names} | {"embed.weight": torch.ones(3)}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of two stacks, one with a very long name, and two fine-tunes of it."""
    for at, name in enumerate(("base", "a-fine-tune-with-a-long-name-that-goes-on-and-on", "ft")):
        write_checkpoint(tmp_path / name, long_names(at))
    models = "models: [{model: a-fine-tune-with-a-long-name-that-goes-on-and-on}, {model: ft}]"
    recipe = f"merge_method: ties\nbase_model: base\n{models}\nparameters: {{density: 0.5}}\nlines: {{beta: 0.5}}\n"
    (tmp_path / "merge.yaml").write_text(recipe)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_long_names_stay_apart(encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stacks whose names begin and end alike are not shown as the same name."""
    made = torch.Generator().manual_seed(0)
    prefix = "a_long_prefix_of_a_vision_language_model"
    towers = {"language_model.model.decoder": 7, "vision_tower.vision_model.encoder": 5}
    names = [f"{prefix}.{tower}.layers.{at}.w" for tower, layers in towers.items() for at in range(layers)]
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, {name: torch.randn(8, 8, generator=made) for name in names})
    env = {**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    command = ["edit", tmp_path / "base", tmp_path / "ft", "--dry-run"]
    out = forked.run(forked.command(*command), env=env).stdout
    rows = [line for line in out.splitlines() if "language" in line or "vision" in line]
    assert [re.search("language|vision", row).group() for row in rows] == ["language", "vision"] * 2, out  # type: ignore[union-attr]
    assert all(len(row) <= 60 for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("columns", [60, 80])
@pytest.mark.parametrize("dry", [[], ["--dry-run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    "command", [["edit", "base", "ft"], ["merge", "--config", "merge.yaml"]], ids=["edit", "merge"]
)
def test_tables_fit(
    command: list[str], dry: list[str], columns: int, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the tables are one line each, no wider than the terminal; names are elided in their middle, and numbers
    are whole. Off a terminal the names are whole, too.
    """
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = run_lines(*command, "-o", "whole", *dry).out
    monkeypatch.setenv("COLUMNS", str(columns))
    out = run_lines(*command, "-o", "out", *dry).out
    assert re.search(rf"^{re.escape(LONG)} ", whole, re.MULTILINE)
    table = re.split(r"^(?:by layer|edited)", out, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
    (at,) = [at for at, line in enumerate(table) if line.startswith("stack")]
    assert re.search(r"layers +tensors +parameters +c first +c last", table[at])
    of_text, of_vision, outside = table[at + 1 :]
    assert all(len(line) <= columns for line in table if not line.startswith("alpha  ")), out
    assert re.match(r"vis\S*…\S*ocks ", of_vision)
    assert re.match(r"te\S*ers ", of_text)
    assert outside.startswith("out")
    for row, layers, parameters in ((of_text, "3", "3 K"), (of_vision, "14", "14 K")):
        assert re.search(rf" {layers} +{layers} +{parameters} +(?:auto|[\d.]+) +(?:auto|[\d.]+)\b", row), row
    along = [line for line in out.splitlines() if re.match("by layer|realised", line)]
    assert all(len(line) <= columns for line in along)
    assert all(re.match(r"(?:by layer|realised)  0: ", line) for line in along)
    assert along or (command[0] == "merge" and dry)


@pytest.mark.slow
def test_a_dull_terminal(here: Path) -> None:
    """Where stdout holds only ASCII, the middle that is left out is three dots."""
    env = {**os.environ, "COLUMNS": "60", "PYTHONIOENCODING": "ascii"}
    ran = forked.run(forked.command("edit", "base", "ft", "--dry-run"), cwd=here, env=env, fresh=["lines_cli.cli"])
    assert ran.returncode == 0
    assert ran.stdout.isascii()
    assert re.search(r"^vis\w*\.\.\.", ran.stdout, re.MULTILINE)


def test_names_cannot_steer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack's name with control characters and line breaks is one harmless row, elided or not."""
    evil = "\x1b[31mowned\nstack  9  9" + "x" * 200
    for at, side in enumerate(("base", "ft")):
        write_checkpoint(tmp_path / side, {f"{evil}.layers.{i}.w": torch.randn(2) + at for i in range(3)})
    for columns in ("60", "400"):
        monkeypatch.setenv("COLUMNS", columns)
        ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "--dry-run")
        assert (ran.code, ran.trace) == (0, "")
        assert not CONTROL.search(ran.out + ran.err)
        assert len(re.findall(r"^stack  9", ran.out, re.MULTILINE)) == 0


def copied(*flags: object, base: dict[str, torch.Tensor], ft: dict[str, torch.Tensor], tmp: Path) -> str:
    """What the summary says of the tensors that are copied."""
    paths = [write_checkpoint(tmp / side, tensors) for side, tensors in (("base", base), ("ft", ft))]
    (line,) = re.findall("^edited .*$", run_lines("edit", *paths, *flags, "--dry-run").out, re.MULTILINE)
    return line.partition("copied ")[2]


def test_why_tensors_are_copied(tmp_path: Path) -> None:
    """The summary says how many are copied for each reason."""
    base = {f"layers.{at}.w": torch.zeros(2) for at in range(3)}
    ft = {name: torch.ones(2) for name in base}
    assert copied(base=base, ft=ft, tmp=tmp_path) == "1 (2), which has a coefficient of 0 or 1"
    assert copied("--alpha", 0, "--beta", 0, base=base, ft=ft, tmp=tmp_path).endswith(
        "which have a coefficient of 0 or 1"
    )
    assert copied("--beta", 0.5, base=base, ft=ft, tmp=tmp_path) == "0 (0)"
    more = {"steps": torch.tensor(3)}
    head = {"head.weight": torch.ones(2)}
    said = copied("--missing", "ft", base=base | more, ft=ft | more | head, tmp=tmp_path)
    assert said.startswith("3 (")
    assert set(said.partition(": ")[2].split(", ")) == {
        "1 has a coefficient of 0 or 1",
        "1 is not a float",
        "1 is not merged",
    }


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_checkpoint(tmp_path / "base", llama()), write_checkpoint(tmp_path / "ft", tuned(llama(), 1))


UNLIKE = {
    "--alpha 2": ["fall with depth (2 to 1): beta is -1, which is 1 - alpha", "above 1 (2 at most)"],
    "--alpha 0.5 --beta -0.4": ["fall with depth (0.5 to 0.1)."],
    "--alpha 0.5 --beta 1": ["above 1 (1.5 at most)"],
    "--gamma 3": ["above 1 (3 at most)"],
    "--schedule 1.5,1": ["above 1 (1.5 at most)"],
    "--stack layers=0.8,-0.5": ["fall with depth (0.8 to 0.3)."],
    "--schedule power:2 --alpha 1.5": ["fall with depth (1.5 to 1)", "above 1 (1.5 at most)"],
}


@pytest.mark.parametrize("flags", UNLIKE)
def test_coefficients_unlike_lines(flags: str, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """That coefficients fall with depth, or are above 1, is a note in a dry run, in a run, and in the JSON."""
    for options in (["--dry-run"], ["-o", tmp_path / "out"]):
        ran = run_lines("edit", *pair, *options, *flags.split(), "--json")
        assert ran.code == 0, ran.err
        notes = [note for note in ran.json["notes"] if "coefficients" in note]
        assert len(notes) == len(UNLIKE[flags])
        for said, note in zip(UNLIKE[flags], notes, strict=True):
            assert said in note
    for command in (["edit", *pair, "--dry-run"], ["inspect", pair[1]], ["inspect", pair[1], "--base", pair[0]]):
        ran = run_lines(*command, *flags.split())
        assert all(said in ran.err for said in UNLIKE[flags])


@pytest.mark.parametrize(
    "flags",
    ["", "--alpha 0.5", "--alpha 1", "--schedule 0.9,0.1", "--schedule unet", "--stack layers=base", "--gamma 0.5",
     "--alpha 0.1 --beta 0", "--schedule constant --alpha 0.4 --beta -0.1"],
)  # fmt: skip
def test_coefficients_like_lines(flags: str, pair: tuple[Path, Path]) -> None:
    """Nothing is said of those that are as LiNeS has them, or that were listed one by one."""
    ran = run_lines("edit", *pair, "--dry-run", *flags.split(), "--json")
    assert (ran.code, [note for note in ran.json["notes"] if "coefficients" in note]) == (0, [])


def of(dtype: torch.dtype, seed: int) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{at}.w": torch.randn(40, generator=made).to(dtype) for at in range(3)}
    return tensors | {"layers.0.norm": torch.ones(2), "steps": torch.arange(3)}


@pytest.mark.parametrize("beside", ["folder", "one file"])
@pytest.mark.parametrize(
    ("base", "ft", "times"),
    [
        (torch.bfloat16, torch.float32, 2),
        (torch.float16, torch.float32, 2),
        (torch.bfloat16, torch.float64, 4),
        (torch.bfloat16, torch.bfloat16, 1),
        (torch.float32, torch.bfloat16, 1),
        (torch.float32, torch.float32, 1),
        (torch.bfloat16, torch.float16, 1),
    ],
)
def test_an_output_larger_than_the_base(
    base: torch.dtype, ft: torch.dtype, times: int, beside: str, tmp_path: Path
) -> None:
    """That it is, because the fine-tune is stored in wider numbers, is a note with the option."""
    paths = [write_checkpoint(tmp_path / f"m{at}", of(dtype, at)) for at, dtype in enumerate((base, ft))]
    out = tmp_path / ("out" if beside == "folder" else "out.safetensors")
    said = [note for note in lines.edit(*paths, out, dry_run=True)["notes"] if "times the size of the base" in note]
    if times == 1:
        assert said == []
        return
    (note,) = said
    names = [str(dtype).removeprefix("torch.") for dtype in (base, ft)]
    assert re.search(rf"the output is {times - 1}\.\d times|the output is {times}(?:\.\d)? times", note)
    assert f"the fine-tune is {names[1]} and the base {names[0]}: --dtype {names[0]} " in note
    for dtype in names:
        notes = lines.edit(*paths, out, dry_run=True, dtype=dtype)["notes"]
        assert not [note for note in notes if "times the size" in note]
