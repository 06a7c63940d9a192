"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from support.files import write_checkpoint


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small pair, where we are."""
    for seed, side in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(3000, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "tiny"})
    (tmp_path / "ft" / "vocab.txt").write_text("a\nb\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path
