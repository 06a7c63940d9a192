"""Merging small models by `lines merge`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from support.bits import raw
from support.files import write_checkpoint
from support.run import Ran, run_lines

Tensors = dict[str, torch.Tensor]
WIDTH = 4


def tensors(seed: int = 0, *, rows: int = 6, **changes: torch.Tensor | None) -> Tensors:
    """A model of three layers, an embedding and a norm, untied; `layers_1_w=None` leaves one out."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens.weight": (rows, WIDTH), **{f"layers.{i}.w": (5, 7) for i in range(3)}, "norm": (3,)}
    model: dict[str, torch.Tensor | None] = {n: torch.randn(shape, generator=random) for n, shape in shapes.items()}
    model |= {
        key.replace("_", ".") if key.startswith("layers") else key.replace("__", "."): value
        for key, value in changes.items()
    }
    return {name: value for name, value in model.items() if value is not None}


def write(tmp_path: Path, *, configs: dict[str, Any] | None = None, **models: Tensors) -> None:
    """Write each model to a folder of its name."""
    for name, model in models.items():
        write_checkpoint(tmp_path / name, model, config=(configs or {}).get(name))


def merge(tmp_path: Path, *flags: object, models: Iterable[str] = ("a", "b"), out: str = "out", **recipe: Any) -> Ran:
    """Run `lines merge` on a recipe in `tmp_path`: task arithmetic on `base` unless it says otherwise."""
    values = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": m} for m in models]}
    values |= recipe
    text = yaml.safe_dump({key: value for key, value in values.items() if value is not None})
    (tmp_path / "merge.yaml").write_text(text)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / out, "--device", "cpu", *flags)
    assert not ran.trace, ran.trace
    assert ran.code != 1
    return ran


def output(tmp_path: Path, out: str = "out") -> Tensors:
    path = tmp_path / out
    return load_file(path if path.is_file() else path / "model.safetensors")


def total(base: torch.Tensor, *models: torch.Tensor, c: float = 1.0) -> torch.Tensor:
    """`base + c * sum(model - base)` in float32, rounded once to the base's dtype."""
    taus = [model.float() - base.float() for model in models]
    merged = taus[0]
    for tau in taus[1:]:
        merged = merged + tau
    return (base.float() + (merged if c == 1 else c * merged)).to(base.dtype)


def trimmed(taus: torch.Tensor, density: float) -> torch.Tensor:
    """[N, n] task vectors, each with only the entries at or above its k-th largest magnitude (TIES, step 1)."""
    k = max(1, int(density * taus.shape[1]))
    threshold = taus.abs().topk(k, dim=1).values[:, -1:]
    return torch.where(taus.abs() >= threshold, taus, torch.zeros(()))


def same(got: Tensors, expected: Tensors) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert got.keys() == expected.keys()
    assert [n for n in got if got[n].shape != expected[n].shape or got[n].dtype != expected[n].dtype] == []
    assert [n for n in got if raw(got[n]) != raw(expected[n])] == []


def refused(ran: Ran, code: int, *words: object) -> None:
    """It ended with this code, an error that has all of the words, and nothing on stdout."""
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert "error: " in ran.err
    assert [word for word in words if str(word) not in ran.err] == []


AUTO: dict[str, Any] = {"beta": 0.5}
