"""The safetensors header: reading, checking and laying out, without torch and without the data.

A file is `u64 N | N bytes of JSON | data`. The JSON maps each tensor's name to its dtype, shape and byte range in
the data. Everything a reader could be misled by is checked here, so that the rest of lines trusts the offsets it is
given.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import accumulate
from json.encoder import encode_basestring as quoted
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lines_cli.errors import CheckpointError
from lines_cli.storage.files import FETCH_LFS, LFS_POINTER, NOT_REGULAR, open_regular

HEADER_LIMIT = 100_000_000
"""Bytes; the format's own bound on the JSON."""

_LENGTH = struct.Struct("<Q")

# Narrowest first: the order of the format's reference writer, which sorts by this (widest first), then by name.
_DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_BITS)}

FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})
"""The dtypes whose entries are edited."""
FLOAT8_DTYPES = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
"""The dtypes of quantised weights whose entries are floats, too: only looked at."""
WIDER = frozenset({("F16", "F32"), ("F16", "F64"), ("BF16", "F32"), ("BF16", "F64"), ("F32", "F64")})
"""Pairs of float dtypes of which the second holds every number of the first."""
EXACT_DTYPES = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL", "C64"})
"""The dtypes whose entries are only ever copied: whole numbers, booleans, and complex numbers."""
COMPLEX = "C64"
"""The one of them that has to be the same in all inputs, unless one side's is asked for: tables of frequencies are."""


def itemsize(dtype: str) -> int:
    """Bytes per entry of a float, integer or boolean dtype."""
    return _DTYPE_BITS[dtype] // 8


class TensorInfo(NamedTuple):
    """One tensor as its file's header describes it.

    `offset` counts bytes from the start of the file, so that it can be handed to `pread` as it is.
    """

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Part(NamedTuple):
    """A run of a tensor's entries that lies by itself, because the file has another layout (`plan.relaid`).

    Attributes:
        start, numel: which of the tensor's entries.
        file: a number into `Checkpoint.files`; of a `SourceRange` into `Plan.paths`.
        offset: the byte at which the first of them stands.
        sizes, strides: how many there are along one axis or two, and how many entries apart they stand in the file;
            with a stride of 1 along one axis they stand side by side.
        tensor: what the file calls the tensor that they are of.
        entry: which of its entries the first is.
    """

    start: int
    numel: int
    file: int
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    tensor: str
    entry: int


class StoredTensor(NamedTuple):
    """A tensor and the file it lies in (a number into `Checkpoint.files`).

    Attributes:
        file: the file; of one in parts that of the first.
        info: dtype, shape, place.
        parts: where its entries are, if they do not stand side by side.
    """

    file: int
    info: TensorInfo
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself: its tensors by name in file order, and its free-form metadata."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]
    digest: str
    """The SHA-256 of its bytes, the length before it included."""


Known = dict[tuple[bytes, int], Header]
"""Headers by their bytes and their file's size, which is all that they are checked by."""


def read_header(path: Path, known: Known | None = None) -> Header:
    """Read and check the header of the safetensors file at `path`.

    Args:
        path: the file.
        known: headers that were read before; gets this one. Checkpoints of one model mostly have the same, byte for
            byte, and then share what was made of it.

    Raises:
        CheckpointError: the file cannot be opened, or breaks any rule of the format: length, JSON, dtype, shape,
            offsets that overlap, leave holes or end anywhere but at the end of the file.
    """
    try:
        with open(open_regular(path), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            begin = file.read(8) if size >= 8 else b""  # a file of /proc has no size, and a content
            if begin == LFS_POINTER[:8]:
                begin += file.read(len(LFS_POINTER) - 8)
            raw = file.read(header_bytes(path, begin, size) - 8)
    except OSError as error:
        if error.strerror == NOT_REGULAR:
            _refuse(path, "not a file", _NOT_SAFETENSORS)
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="Check that it is a file and that you may read it.",
        ) from error
    return parse_header(path, raw, size, known)


def header_bytes(path: Path, begin: bytes, size: int) -> int:
    """How many bytes of a file come before its tensors: 8, and those of the JSON.

    Args:
        path: what messages call the file.
        begin: its first bytes, 8 or more.
        size: how many it has.

    Raises:
        CheckpointError: they are not those of a safetensors file.
    """
    if len(begin) < 8:
        _refuse(path, f"the file holds {size} bytes, too few for a safetensors header")
    if begin.startswith(LFS_POINTER):
        _refuse(path, "a Git LFS pointer, and not the weights that it points to", FETCH_LFS)
    if begin.startswith(b"GGUF"):
        _refuse(path, "by its content a GGUF file", "Give it a name that ends with .gguf, and lines inspect shows it.")
    if begin.startswith(_OF_TORCH):
        _refuse(path, "by its content a file that torch.save wrote", "Give it a name that ends with .pt.")
    (length,) = _LENGTH.unpack(begin[:8])
    if length > HEADER_LIMIT:
        # How many it claims would tell what the file holds, which may be another's.
        _refuse(
            path,
            f"its first 8 bytes give its header more than {HEADER_LIMIT:,} bytes, the format's limit",
            _NOT_SAFETENSORS,
        )
    if length > size - 8:
        _refuse(path, f"its header should be {length:,} bytes, but only {size - 8:,} follow", _INCOMPLETE)
    return 8 + int(length)


def parse_header(path: Path, raw: bytes, size: int, known: Known | None = None) -> Header:
    """The header of a safetensors file from its JSON.

    Args:
        path: what messages call the file.
        raw: the JSON, as it stands behind the first 8 bytes.
        size: how many bytes the file has.
        known: as of `read_header`.

    Raises:
        CheckpointError: as `read_header`.
    """
    known = {} if known is None else known
    header = known.get((raw, size))
    if header is None:
        header = known[raw, size] = _parse(path, raw, data_start=8 + len(raw), file_size=size)
    return header


_OF_TORCH = b"PK\x03\x04"  # a zip file, which any other could be, too
_NOT_SAFETENSORS = "This does not look like a safetensors file."
_INCOMPLETE = "The file is incomplete: copy or download it again."
_DAMAGED = "The file is damaged, or was not written as safetensors: copy or download it again."
_MOST_BITS = 8 * 2**63


def _refuse(path: Path, what: str, hint: str = _DAMAGED) -> NoReturn:
    raise CheckpointError(f"{path}: {what}", hint=hint)


def _parse(path: Path, raw: bytes, *, data_start: int, file_size: int) -> Header:
    if not raw.startswith(b"{"):
        _refuse(path, "its header does not begin with '{'", _NOT_SAFETENSORS)

    def parsed(pairs: list[tuple[str, Any]]) -> dict[str, Any] | TensorInfo:
        """A JSON object; at once as a tensor if it describes one, so that a large header never is a heap of dicts."""
        keys = dict(pairs)
        if len(keys) < len(pairs):
            seen: set[str] = set()
            name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            _refuse(path, f"its header names {name!r} twice")
        tensor = _tensor(keys, data_start)
        return tensor if isinstance(tensor, TensorInfo) else keys

    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=parsed)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not valid JSON ({error})", _NOT_SAFETENSORS)
    if isinstance(entries, TensorInfo):
        _refuse(path, "its header describes a tensor without a name")

    metadata = entries.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "its __metadata__ is not a map of strings to strings")

    if b"\\u" in raw:  # only an escape can smuggle in what UTF-8 does not have
        for name in (*entries, *metadata, *metadata.values()):
            if any("\ud800" <= character <= "\udfff" for character in name):
                _refuse(path, f"its header holds {name!r}, which is not valid text (half a character)")
    for name, tensor in entries.items():
        if not isinstance(tensor, TensorInfo):
            wrong, *with_it = _tensor(tensor, data_start)
            _refuse(path, f"tensor {name!r} {wrong.format(*with_it)}")
    in_order = dict(sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)))
    _check_layout(path, in_order, data_start, file_size)
    return Header(in_order, metadata, "sha256:" + sha256(_LENGTH.pack(len(raw)) + raw).hexdigest())


def _check_layout(path: Path, in_order: Mapping[str, TensorInfo], data_start: int, file_size: int) -> None:
    """Tensors fill the file from the header to its end: no hole, no overlap, nothing behind them."""
    expected, previous = data_start, "the header"
    for name, info in in_order.items():
        if info.offset != expected:
            wrong = "overlaps" if info.offset < expected else "leaves a hole after"
            _refuse(
                path,
                f"tensor {name!r} starts at byte {info.offset:,} and {wrong} {previous}, which ends at {expected:,}",
            )
        expected, previous = info.offset + info.nbytes, f"{name!r}"
    if expected > file_size:
        _refuse(path, f"its tensors end at byte {expected:,}, but the file ends at {file_size:,}", _INCOMPLETE)
    if expected < file_size:
        _refuse(path, f"its tensors end at byte {expected:,}, and {file_size - expected:,} unexplained bytes follow")


def _tensor(entry: Any, data_start: int) -> TensorInfo | tuple[Any, ...]:
    """The tensor that an entry of a header describes; or what is wrong with the entry, as a format and its arguments:
    it may be long, and is not written out until it is printed.
    """
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError):
        return ("lacks a dtype, a shape or data_offsets",)
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        return "has the unknown dtype {!r}", dtype
    if not _are_sizes(shape):
        return "has the impossible shape {!r}", shape
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return "has the impossible data_offsets {!r}", offsets
    start, end = offsets
    bits = _DTYPE_BITS[dtype]
    for n in shape if 0 not in shape else (0,):
        bits *= n
        if bits > _MOST_BITS:
            return "is {} of a shape that no file could hold, beginning {}", dtype, shape[:4]
    if bits % 8 or bits // 8 != end - start:
        takes = "is {} {}, which takes {:,} bytes, but its data_offsets span {:,}"
        return takes, dtype, shape[:8], bits // 8, end - start
    return TensorInfo(sys.intern(dtype), tuple(shape), data_start + start, end - start)


def _are_sizes(values: Any) -> bool:
    """Whether it is a list of whole numbers that could each count something in a file."""
    if not isinstance(values, list):
        return False
    for n in values:  # noqa: SIM110 - all() with a generator takes three times as long
        if type(n) is not int or not 0 <= n < 2**63:
            return False
    return True


def canonical_order(tensors: Mapping[str, str]) -> list[str]:
    """Names in the order the format's reference writer lays them out: widest dtype first, then by name.

    Args:
        tensors: name -> dtype.
    """
    by_rank: dict[int, list[str]] = defaultdict(list)
    for name, dtype in tensors.items():
        by_rank[_DTYPE_RANK[dtype]].append(name)
    return [name for rank in sorted(by_rank, reverse=True) for name in sorted(by_rank[rank])]


def lay_out(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, TensorInfo]]:
    """Compute the first bytes of a file (length and JSON) and where each tensor's data goes.

    Args:
        tensors: (name, dtype, shape), in the order the data is to stand.
        metadata: written as `__metadata__`.

    Returns:
        The bytes before the data, a multiple of 8 long so that the data is aligned; and each tensor with its offset
        in the file.
    """
    rows = list(tensors)
    sizes = [math.prod(shape) * _DTYPE_BITS[dtype] // 8 for _, dtype, shape in rows]
    ends = list(accumulate(sizes))
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    entries = [f'"__metadata__":{encode(dict(metadata))}'] if metadata else []
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}  # a model's tensors are of few
    for (name, dtype, shape), nbytes, end in zip(rows, sizes, ends, strict=True):
        kind = kinds.get((dtype, shape))
        if kind is None:
            kind = kinds[dtype, shape] = f'"dtype":"{dtype}","shape":[{",".join(map(str, shape))}]'
        entries.append(f'{quoted(name)}:{{{kind},"data_offsets":[{end - nbytes},{end}]}}')
    text = f"{{{','.join(entries)}}}".encode()
    padding = -len(text) % 8
    start = 8 + len(text) + padding
    return b"".join([_LENGTH.pack(start - 8), text, b" " * padding]), {
        name: TensorInfo(dtype, shape, start + end - nbytes, nbytes)
        for (name, dtype, shape), nbytes, end in zip(rows, sizes, ends, strict=True)
    }
