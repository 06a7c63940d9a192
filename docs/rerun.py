"""Runs what README.md and docs/tour.md show at a prompt, and writes beneath each command what it prints now.

In a block of kind `console` a line that begins with `$ ` is a command, and all others are its output. The commands run
in a folder with a base, two fine-tunes and a recipe. Times and the forecast of memory are fixed figures.

Where the page has a line `...`, it shows a part: as many lines as before, from the line that begins as before. A
command that fails is an error, unless `$ echo $?` comes next.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import typer.main

LAYERS, WIDTH, HIDDEN, WORDS = 12, 16, 32, 64
RECIPE = """\
merge_method: ties
base_model: base
models:
  - {model: ft, parameters: {weight: 1.0}}
  - {model: ft-code, parameters: {weight: 0.7}}
parameters: {density: 0.2}
lines: {alpha: auto, beta: 0.5}
"""
STABLE = [
    (re.compile(r"\bin \d+\.\d s \([\d.]+ .?B/s( read and written)?\)"), "in 0.1 s"),
    (re.compile(r"\bin \d+\.\d s\b"), "in 0.1 s"),
    (
        re.compile(r"^memory  about .*", re.MULTILINE),
        "memory  about 266 MB, without CUDA; 2.1 MB of it buffers of 4 workers",
    ),
]


def rerun(page: Path) -> str:
    """The page's text, with what its commands print now."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder, _inside(Path(folder)):
        make_models()
        return re.sub(r"^```console\n(.*?)^```$", _block, text, flags=re.MULTILINE | re.DOTALL)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    """In this folder, and as on a terminal of 80 columns without colours."""
    before, environment = Path.cwd(), dict(os.environ)
    os.environ.pop("FORCE_COLOR", None)
    os.environ.update({"COLUMNS": "80", "NO_COLOR": "1", "LC_ALL": "C.UTF-8"})
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)


def make_models() -> None:
    """A base and two fine-tunes of it in bfloat16, whose numbers are the same on any machine."""
    from safetensors.torch import save_file
    from torch import bfloat16, tensor

    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "vocab_size": WORDS}
    config = {"model_type": "llama", "tie_word_embeddings": False, **sizes}
    base = _model(seed=1, scale=0.02)
    for name, seed in {"base": None, "ft": 2, "ft-code": 3}.items():
        update = {} if seed is None else _model(seed=seed, scale=0.001)
        folder = Path(name)
        folder.mkdir()
        tensors = {}
        for key, values in base.items():
            moved = [a + b for a, b in zip(values, update.get(key, [0.0] * len(values)), strict=True)]
            tensors[key] = (
                tensor(moved, dtype=bfloat16).view(-1, WIDTH) if len(moved) > WIDTH else tensor(moved, dtype=bfloat16)
            )
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (folder / "tokenizer.json").write_text("{}\n", encoding="utf-8")
    Path("merge.yaml").write_text(RECIPE, encoding="utf-8")


def _model(*, seed: int, scale: float) -> dict[str, list[float]]:
    """Normal numbers by tensor; in deeper layers they are a little larger."""
    chance = random.Random(seed)  # noqa: S311 - the same everywhere, which torch's generator is not
    sizes = {"model.embed_tokens.weight": WORDS * WIDTH}
    for layer in range(LAYERS):
        before = f"model.layers.{layer}"
        sizes |= {f"{before}.self_attn.{side}_proj.weight": WIDTH * WIDTH for side in "qkvo"}
        sizes |= {f"{before}.mlp.{way}_proj.weight": WIDTH * HIDDEN for way in ("gate", "up", "down")}
        sizes |= {f"{before}.input_layernorm.weight": WIDTH}
    sizes |= {"model.norm.weight": WIDTH, "lm_head.weight": WORDS * WIDTH}
    found = {}
    for name, size in sizes.items():
        layer = int(match[1]) if (match := re.search(r"layers\.(\d+)", name)) else LAYERS // 2
        spread = scale * (1 + layer / LAYERS) * (5 if "norm" in name else 1)
        found[name] = [round(chance.gauss(0, spread), 9) for _ in range(size)]
    return found


def _block(match: re.Match[str]) -> str:
    """One block anew."""
    parts = [part.partition("\n") for part in re.split(r"^\$ ", match[1], flags=re.MULTILINE)[1:]]
    commands = [command for command, _, _ in parts]
    shown, code = [], 0
    for (command, _, old), following in zip(parts, [*commands[1:], ""], strict=True):
        if command == "echo $?":
            shown.append(f"$ {command}\n{code}\n")
            continue
        code, text = _run(command)
        if code and following != "echo $?":
            raise RuntimeError(f"{command!r} ended with {code}:\n{text}")
        shown.append(f"$ {command}\n{_part(old.rstrip(), text)}")
    return "```console\n" + "\n".join(shown) + "```"


def _run(command: str) -> tuple[int, str]:
    """The exit code of a command, and what it prints on stdout and stderr, made stable."""
    if command.startswith("lines "):
        code, text = _lines(shlex.split(command)[1:])
    else:
        done = subprocess.run(
            ["sh", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        code, text = done.returncode, done.stdout
    for pattern, stable in STABLE:
        text = pattern.sub(stable, text)
    return code, "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def _part(old: str, text: str) -> str:
    """Of an output those lines that the page showed of the one before."""
    if not re.search(r"^\.\.\.$", old, re.MULTILINE):
        return text
    lines, at = text.splitlines(), 0
    shown: list[str] = []
    for segment in re.split(r"^\.\.\.$\n?", old, flags=re.MULTILINE):
        if segment.strip():
            wanted = segment.strip("\n").splitlines()
            begins = " ".join(wanted[0].split()[:2])
            found = [i for i in range(at, len(lines)) if " ".join(lines[i].split()).startswith(begins)]
            if not found:
                raise RuntimeError(f"no line begins with {begins!r} now:\n{text}")
            at = found[0]
            shown += ["..."] * (at > 0 and not shown) + lines[at : at + len(wanted)] + ["..."]
            at += len(wanted)
    return "\n".join(shown[:-1] if at >= len(lines) else shown) + "\n"


def _lines(arguments: list[str]) -> tuple[int, str]:
    """A command of `lines` in this process: its exit code, and what a terminal shows of it."""
    from lines_cli.cli.app import app

    terminal, code = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), 0
    with contextlib.redirect_stdout(terminal), contextlib.redirect_stderr(terminal):
        try:
            typer.main.get_command(app).main(arguments, prog_name="lines")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    terminal.seek(0)
    return code, terminal.read()
