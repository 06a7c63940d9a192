"""Small real checkpoints, and what lies in a folder."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any


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
