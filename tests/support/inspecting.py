"""Running `lines inspect`, and small models for it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from support import forked
from support.files import write_checkpoint
from support.run import Ran, run_lines


def ok(*args: object) -> Ran:
    """`lines inspect ARGS`, which succeeds."""
    ran = run_lines("inspect", *args)
    assert (ran.code, ran.trace) == (0, ""), ran.trace or ran.err
    return ran


def told(*args: object) -> Any:
    """What `lines inspect ARGS --json` prints; NaN and Inf are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(ok(*args, "--json").out, parse_constant=refuse)


def refused(code: int, *args: object, words: tuple[str, ...] = ()) -> Ran:
    """`lines inspect ARGS`, which says why not on stderr, and on stdout nothing, or with --json the same."""
    ran = run_lines("inspect", *args)
    assert (ran.code, ran.trace) == (code, ""), ran.trace or ran.err
    assert (list(ran.json) == ["schema", "lines", "error"]) if "--json" in args else (ran.out == "")
    assert ran.err.startswith("error: ")
    assert all(word in ran.err for word in words), ran.err
    return ran


def process(*args: object, stdout: int | None = None, stderr: int | None = None, **env: str) -> forked.Forked:
    """`lines inspect ARGS` in a fork, with another environment, whose terminal is looked at anew."""
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    program = forked.command("inspect", *args)
    return forked.Forked(program, env=environment | env, stdout=stdout, stderr=stderr, fresh=["lines_cli.cli"])


def llama(layers: int = 4, seed: int = 0, *, head: bool = True) -> dict[str, torch.Tensor]:
    """A decoder with names as transformers writes them."""
    made = torch.Generator().manual_seed(seed)
    model = {"model.embed_tokens.weight": torch.randn(10, 4, generator=made)}
    for layer in range(layers):
        model[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(4, 4, generator=made)
        model[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(6, 4, generator=made)
        model[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(4, generator=made)
    model["model.norm.weight"] = torch.randn(4, generator=made)
    return model | ({"lm_head.weight": torch.randn(10, 4, generator=made)} if head else {})


def tuned(model: Mapping[str, torch.Tensor], seed: int, by: float = 0.01) -> dict[str, torch.Tensor]:
    """A fine-tune, of which a quarter of the entries stay."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=made) * (torch.rand(value.shape, generator=made) > 0.25)
        for name, value in model.items()
    }


def named(*names: str) -> dict[str, torch.Tensor]:
    """Small tensors, no two alike."""
    return {name: torch.full((2, 2), float(at + 1)) for at, name in enumerate(names)}


def linear(alpha: float, beta: float, layers: int = 4) -> list[float]:
    return [alpha + beta * i / (layers - 1) for i in range(layers - 1)] + [alpha + beta]


def merged(tmp: Path, recipe: str, *options: object) -> Path:
    """An output of lines merge of the recipe, with base, a and b beside it."""
    for at, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp / name, tuned(llama(), at) if at else llama())
    (tmp / "r.yaml").write_text(recipe)
    ran = run_lines("merge", "--config", tmp / "r.yaml", "-o", tmp / "out", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return tmp / "out"


TWO = "base_model: base\nmodels: [{model: a}, {model: b}]\n"


DAMAGED = {
    "no YAML": "{",
    "empty": "",
    "a list": "- 1",
    "an unknown key": "base_model: b\nmodels: [{model: a}]\nsecret: 1\n",
    "not finite": "base_model: b\nmodels: [{model: a}]\nlines: {alpha: .nan}\n",
    "deep": "[" * 1200,
    "a tag": "!!python/object/apply:os.system ['echo owned']",
    "bytes": "\udcff\udcfe",
}


def rows_of(out: str, heading: str) -> list[list[str]]:
    """The rows of the table with the title `heading`, its own headings apart."""
    titles = [at for at, line in enumerate(out.splitlines()) if re.match(rf"(?:.*, )?{heading}(?:$|:)", line)]
    lines = out.splitlines()[titles[0] + 2 :]
    rows = []
    for line in lines:
        if not line.strip():
            break
        rows.append(line.split())
    return rows


CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
