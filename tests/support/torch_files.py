"""Files as torch.save writes them, made by hand: as wrong as one likes."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class Stored:
    """A storage that a pickle refers to.

    Args:
        key: its name in the file.
        numel: how many entries the pickle says it has.
        kind: its type.
        view: of an old file, which part of the storage it is.
    """

    def __init__(self, key: str, numel: int, kind: Any = torch.FloatStorage, view: Any = None) -> None:
        self.reference, self.view = ("storage", kind, key, "cpu", numel), view


class Rebuilt:
    """A tensor, whatever is said of it."""

    def __init__(self, storage: Any, first: Any = 0, shape: Any = (4,), strides: Any = (1,), *more: Any) -> None:
        self.arguments = (storage, first, shape, strides, False, OrderedDict(), *more)

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


class Calls:
    """Something that is made by calling this, when it is loaded."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments


class _Pickler(pickle.Pickler):
    old = False

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Stored):
            return None
        return (*value.reference, value.view) if self.old else value.reference


def pickled(value: Any, *, old: bool = False) -> bytes:
    """The pickle in such a file."""
    into = io.BytesIO()
    pickler = _Pickler(into, 2)
    pickler.old = old
    pickler.dump(value)
    return into.getvalue()


def write_zip(
    path: Path, value: Any, storages: Mapping[str, bytes] | None = None, more: Mapping[str, bytes] | None = None
) -> Path:
    """A file of today: the pickle of a value (bytes are one already), and storages."""
    raw = value if isinstance(value, bytes) else pickled(value)
    members = {"data.pkl": raw, "version": b"3\n"} | {f"data/{key}": of for key, of in (storages or {}).items()}
    members |= more or {}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, content in members.items():
            file.writestr(f"archive/{name}", content)
    return path


def write_old(path: Path, value: Any, storages: Mapping[str, tuple[int, bytes]] | None = None) -> Path:
    """A file from before torch 1.6; of each storage how many entries it claims, and its content."""
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    storages = storages or {}
    with path.open("wb") as file:
        for part in (0x1950A86A20F9469CFC6C, 1001, system):
            file.write(pickle.dumps(part, 2))
        file.write(value if isinstance(value, bytes) else pickled(value, old=True))
        file.write(pickle.dumps(list(storages), 2))
        for numel, content in storages.values():
            file.write(numel.to_bytes(8, "little", signed=True) + content)
    return path


def write_folder(path: Path, tensors: Mapping[str, Any], *, shards: int = 1, config: Any = None) -> Path:
    """A folder as transformers wrote it before safetensors."""
    path.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if shards == 1:
        torch.save(dict(tensors), path / "pytorch_model.bin")
        return path
    names, weight_map = list(tensors), {}
    for number in range(shards):
        file = f"pytorch_model-{number + 1:05d}-of-{shards:05d}.bin"
        weight_map.update(dict.fromkeys(names[number::shards], file))
        torch.save({name: tensors[name] for name in names[number::shards]}, path / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (path / "pytorch_model.bin.index.json").write_text(json.dumps(index), encoding="utf-8")
    return path


def harmful(mark: Path) -> Calls:
    """What writes a file if a pickle with it is loaded."""
    return Calls(os.system, f"touch {mark}")
