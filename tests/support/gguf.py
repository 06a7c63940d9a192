"""GGUF files, written by hand as the format's page says."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

KINDS = {"F32": (0, 1, 4), "F16": (1, 1, 2), "Q8_0": (8, 32, 34), "Q4_K": (12, 256, 144), "BF16": (30, 1, 2)}


def text(value: str) -> bytes:
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(of: Any) -> bytes:
    """A value with its type before it: bool, int (uint32), float (float32), text, or a list of one of them."""
    match of:
        case bool():
            return struct.pack("<I?", 7, of)
        case int():
            return struct.pack("<II", 4, of)
        case float():
            return struct.pack("<If", 6, of)
        case str():
            return struct.pack("<I", 8) + text(of)
        case list():
            inner = value(of[0])[:4] if of else struct.pack("<I", 4)
            return struct.pack("<I", 9) + inner + struct.pack("<Q", len(of)) + b"".join(value(one)[4:] for one in of)
    raise TypeError(of)


def header(
    facts: Mapping[str, Any], tensors: Sequence[tuple[str, Sequence[int], int, int]], *, version: int = 3
) -> bytes:
    """What stands before the data: pairs, and tensors with name, shape (rows first), number of the type, offset."""
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(facts))
    head += b"".join(text(key) + value(of) for key, of in facts.items())
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", kind, offset)
    return head


def write_gguf(
    path: Path, tensors: Mapping[str, tuple[str, Sequence[int]]], *, alignment: int = 32, **facts: Any
) -> Path:
    """A whole file whose data are zeros: name -> type, shape."""
    said = {"general.architecture": "llama"} | ({"general.alignment": alignment} if alignment != 32 else {})
    said |= {key.replace("__", "."): of for key, of in facts.items()}
    rows, at = [], 0
    for name, (kind, shape) in tensors.items():
        number, block, each = KINDS[kind]
        numel = 1
        for size in shape:
            numel *= size
        rows.append((name, shape, number, at))
        at += -(-numel // block * each // alignment) * alignment
    head = header(said, rows)
    path.write_bytes(head + bytes(-len(head) % alignment) + bytes(at))
    return path
