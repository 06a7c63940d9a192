"""Small real checkpoints, and the command line in process, for the whole suite."""

from __future__ import annotations

import json
import os
import struct
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """The cores are pytest-xdist's; and sums come out the same on any machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fifth of a small run is spent in fsync; only tests marked `durable` wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("durable") is None:
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield


@dataclass(frozen=True)
class Ran:
    """What one command ended with; `trace` holds the traceback of an exception that reached its user."""

    code: int
    out: str
    err: str
    trace: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_lines(*args: object) -> Ran:
    """Run `lines ARGS` in this process."""
    from typer.testing import CliRunner

    from lines_cli.cli.app import app

    result = CliRunner().invoke(app, [str(arg) for arg in args])
    escaped = result.exception if not isinstance(result.exception, SystemExit) else None
    trace = "".join(traceback.format_exception(escaped)) if escaped else ""
    return Ran(result.exit_code, result.stdout, result.stderr, trace)


def write_checkpoint(
    path: Path, tensors: Mapping[str, Any], *, shards: int = 1, config: Any = None, stem: str = "model"
) -> Path:
    """Write a checkpoint with safetensors' own library: one file if `path` ends in .safetensors, else a folder.

    Args:
        path: where; parents are made.
        tensors: name -> torch tensor; with shards, dealt out in turn, so that neighbours lie in different files.
        shards: how many files the folder holds; with more than one, an index.
        config: written as config.json, unless None.
        stem: what the folder's weight files are called.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(dict(tensors), path, metadata=metadata)
        return path
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        save_file(dict(tensors), path / f"{stem}.safetensors", metadata=metadata)
        return path
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05d}-of-{shards:05d}.safetensors"
        weight_map.update(dict.fromkeys(names[number::shards], file))
        save_file({name: tensors[name] for name in names[number::shards]}, path / file, metadata=metadata)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def write_raw(path: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    """Write a safetensors file by hand, as wrong as one likes: `header` is bytes, or a value to be JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def without_staging(found: Mapping[str, Any]) -> dict[str, Any]:
    """A snapshot, or paths, without what interrupted runs keep beside their destination."""
    return {name: of for name, of in found.items() if not any(part.endswith(".lines") for part in Path(name).parts)}


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Everything below `folder`, hidden names too: a file's bytes, a link's target, None for a folder."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in folder.rglob("*")
    }
