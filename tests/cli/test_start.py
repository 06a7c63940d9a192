"""What a command loads before it does anything: torch takes longer to import than most commands take."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support.files import write_checkpoint
from support.run import run_lines

# Runs each command line in a process in which nothing can import torch; prints the exit codes, or what importing said.
PROGRAM = """
import contextlib, io, json, os, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise RuntimeError(f"{name} was imported")

sys.meta_path.insert(0, NoTorch())
from lines_cli.cli.app import app
ended = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            app(arguments)
        except SystemExit as end:
            ended.append(end.code)
        except RuntimeError as error:
            ended.append(str(error))
print(json.dumps(ended))
"""

# What ends without a tensor: the exit code, and the command line.
COMMANDS = (
    (0, "--help"),
    (0, "--version"),
    (0, "edit --help"),
    (0, "edit base ft --dry-run"),
    (0, "edit base ft -o new --dry-run --json"),
    (0, "edit base ft -o done --resume"),
    (0, "edit base ft -o done --resume --verify"),
    (0, "merge --config ties.yaml --dry-run"),
    (0, "merge --config auto.yaml --dry-run"),
    (0, "extract ft --base base --rank 1 --dry-run"),
    (0, "edit --adapter adapter --num-layers 2 --dry-run"),
    (0, "sweep --config sweep.yaml --dry-run"),
    (0, "sweep --config sweep.yaml --dry-run --on ray"),
    (0, "sweep --config search.yaml --dry-run --json"),
    (2, "sweep --config sweep.yaml"),
    (0, "inspect base"),
    (0, "inspect done --json --tensors"),
    (0, "inspect base --plot page.html"),
    (0, "clean new"),
    (2, "edit"),
    (2, "edit base ft"),
    (2, "edit base ft -o new --alpha much"),
    (2, "edit base ft -o new --device tpu"),
    (2, "edit base ft -o new --beta 1 --schedule 0.1,0.2,0.3"),
    (2, "merge --config nowhere.yaml"),
    (2, "merge --config wrong.yaml -o new"),
    (2, "sweep --config nowhere.yaml -o new"),
    (3, "edit base nowhere -o new"),
    (3, "verify nowhere"),
    (4, "edit base other -o new"),
    (6, "edit base ft -o base --force"),
    (6, "edit base ft -o done"),
    (8, "push done nobody/nothing --dry-run"),
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models and what the commands name besides."""
    monkeypatch.chdir(tmp_path)
    for side, value in (("base", 1.0), ("ft", 2.0)):
        write_checkpoint(tmp_path / side, {f"h.{i}.w.weight": torch.full((2, 2), value) for i in range(2)})
    write_checkpoint(tmp_path / "other", {f"h.{i}.w.weight": torch.ones(3, 5) for i in range(2)})
    names = [f"base_model.model.h.{i}.w.lora_{side}.weight" for i in range(2) for side in "AB"]
    write_checkpoint(tmp_path / "adapter", {name: torch.ones((1, 2) if "A" in name else (2, 1)) for name in names})
    (tmp_path / "adapter" / "model.safetensors").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merge = "base_model: base\nmodels: [{model: ft}, {model: ft}]\n"
    (tmp_path / "ties.yaml").write_text(f"{merge}merge_method: ties\nparameters: {{density: 0.5}}\n")
    (tmp_path / "auto.yaml").write_text(f"{merge}merge_method: task_arithmetic\nlines: {{alpha: auto, beta: 0.5}}\n")
    (tmp_path / "wrong.yaml").write_text(f"{merge}merge_method: tie\n")
    judge = 'evaluate: "python eval.py {checkpoint}"\nobjective: accuracy\n'
    measured = (
        "{base_model: base, models: [{model: ft}, {model: ft}], merge_method: ties, lines: {alpha: auto, beta: 0.5}}"
    )
    grid = "grid: {parameters.density: [0.2, 0.5]}\n"
    (tmp_path / "sweep.yaml").write_text(f"recipe: {measured}\n{grid}{judge}")
    search = "grid: {lines.alpha: {low: 0.05, high: 1, log: true}}\nsearch: {sampler: tpe, trials: 5}\n"
    (tmp_path / "search.yaml").write_text(f"recipe: {{base: base, ft: ft}}\n{search}{judge}")
    assert run_lines("edit", "base", "ft", "-o", "done").code == 0
    return tmp_path


@pytest.mark.slow
def test_what_computes_nothing_imports_no_torch(folder: Path) -> None:
    """Help, plans, looks at headers, refusals and what is finished already: importing torch fails, and none notices."""
    command_lines = [line.split() for _, line in COMMANDS]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub")}
    command = [sys.executable, "-c", PROGRAM, json.dumps(command_lines)]
    ran = subprocess.run(command, cwd=folder, env={**os.environ, **offline}, capture_output=True, text=True, check=True)
    ended = dict(zip((line for _, line in COMMANDS), json.loads(ran.stdout), strict=True))
    assert ended == {line: code for code, line in COMMANDS}


@pytest.mark.parametrize("line", ["edit base ft -o new", "merge --config ties.yaml -o new", "inspect ft --base base"])
@pytest.mark.slow
def test_what_computes_imports_torch(line: str, folder: Path) -> None:
    """The same hook is heard by a command that needs tensors."""
    command = [sys.executable, "-c", PROGRAM, json.dumps([line.split()])]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == ["torch was imported"]
