"""What the tests of this folder share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from support.files import write_checkpoint
from support.recipes_of_merges import BLOCKS, OUTSIDE, TOKENIZERS, VALUES, write_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b and c (no tokenizer) of constant tensors; noisy-base, -a and -b of random ones."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, [*OUTSIDE, *BLOCKS], VALUES)
    for model, text in TOKENIZERS.items():
        (folder / model / "tokenizer.json").write_text(json.dumps({"version": text}))
        (folder / model / "chat_template.jinja").write_text(text)
    generator = torch.Generator().manual_seed(4)
    for model in ("noisy-base", "noisy-a", "noisy-b"):
        tensors = {name: torch.randn(40, generator=generator) for name in [*OUTSIDE, *BLOCKS]}
        write_checkpoint(folder / model, tensors)
    return folder
