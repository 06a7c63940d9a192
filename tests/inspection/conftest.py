"""What the tests of this folder share."""

from __future__ import annotations

from pathlib import Path

import pytest

from lines_cli.cli import console
from support.files import write_checkpoint
from support.inspecting import TWO, llama, merged, tuned
from support.run import run_lines


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests."""
    monkeypatch.setattr(console._out, "_width", 80)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, a and b, and with outputs of lines edit and lines merge in several shards each."""
    tmp = tmp_path_factory.mktemp("outputs")
    for at, name in enumerate(("base", "a", "b")):
        model = tuned(llama(), at) if at else llama()
        folder = write_checkpoint(tmp / name, model, config={"model_type": "llama", "tie_word_embeddings": False})
        (folder / "tokenizer.json").write_text("{}")
    ran = run_lines("edit", tmp / "base", tmp / "a", "-o", tmp / "edit", "--max-shard-size", "600B")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    merged(tmp, f"merge_method: ties\n{TWO}max_shard_size: 600B\nlines: {{alpha: auto, beta: 0.5}}\n")
    return tmp
