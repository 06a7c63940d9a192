"""The header of a GGUF file, to be looked at: names, types, shapes, and what it says of the model. No data, and nothing
that needs torch.

A file is `magic | version | counts | key-value pairs | tensors | padding | data`, in little-endian
(github.com/ggml-org/ggml, docs/gguf.md). Whatever a stranger wrote there, no more than a header's worth is read, and
nothing is kept that is long.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

from lines_cli.checkpoint.header import HEADER_LIMIT, TensorInfo
from lines_cli.errors import CheckpointError
from lines_cli.storage.files import open_regular

MAGIC = b"GGUF"
SUFFIX = ".gguf"


class GgufHeader(NamedTuple):
    """What a GGUF file says of itself.

    Attributes:
        tensors: by name, in file order; the dtype is ggml's name of a type (`Q4_K`), the shape has rows first.
        facts: its key-value pairs, those that are numbers or short text.
        digest: the SHA-256 of its bytes.
        version: of the format.
    """

    tensors: dict[str, TensorInfo]
    facts: Mapping[str, Any]
    digest: str
    version: int

    @property
    def described(self) -> str:
        """The format, the model and how most of it is quantised, in words."""
        said = [f"GGUF {self.version}"]
        if isinstance(architecture := self.facts.get("general.architecture"), str):
            said.append(architecture)
        kind = self.facts.get("general.file_type")
        if type(kind) is int and kind in _FILE_TYPES:
            said.append(_FILE_TYPES[kind])
        part, parts = self.facts.get("split.no"), self.facts.get("split.count")
        if type(part) is int and type(parts) is int and parts > 1:
            said.append(f"part {part + 1:,} of {parts:,}")
        return ", ".join(said)

    @property
    def config(self) -> dict[str, Any]:
        """What it says of itself, in the words of a `config.json`."""
        architecture = self.facts.get("general.architecture")
        layers = self.facts.get(f"{architecture}.block_count")
        found: dict[str, Any] = {"model_type": architecture} if isinstance(architecture, str) else {}
        whole = type(self.facts.get("split.count")) is not int
        return found | ({"num_hidden_layers": layers} if whole and type(layers) is int and layers > 0 else {})


def read_gguf(path: Path) -> GgufHeader:
    """Read and check the header of the GGUF file at `path`.

    Raises:
        CheckpointError: it cannot be read, or is no such file; a tensor lies outside of it, or in another.
    """
    try:
        with open(open_regular(path), "rb") as file:
            return _Reading(path, file).header()
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="Check that it is a file and that you may read it.",
        ) from error


class _Reading:
    """One file's header, from its beginning on."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._at = path, file, 0
        self._size = os.fstat(file.fileno()).st_size
        self._raw = bytearray(file.read(_FIRST))

    def header(self) -> GgufHeader:
        if self._raw[:4] != MAGIC:
            self._refuse("it does not begin with GGUF, as a GGUF file does")
        self._at = 4
        version = self._number("I")
        if version not in _VERSIONS:
            other = version & 0xFFFF == 0
            self._refuse(f"version {version:,} of GGUF{', or big-endian' if other else ''}; 2 and 3 are read", _OTHER)
        tensors, pairs = self._number("Q"), self._number("Q")
        if tensors > _MOST_TENSORS or pairs > _MOST_PAIRS:
            self._refuse(f"{tensors:,} tensors and {pairs:,} key-value pairs, more than any model has")
        facts: dict[str, Any] = {}
        for _ in range(pairs):
            key = self._text("a key")
            if key in facts:
                self._refuse(f"the key {key!r} stands twice")
            facts[key] = self._value(self._number("I"), key)
        described = [self._tensor() for _ in range(tensors)]
        alignment = facts.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= _MOST_ALIGNMENT or alignment & (alignment - 1):
            self._refuse(f"general.alignment is {alignment!r}, not a power of two")
        begin = -(-self._at // alignment) * alignment
        digest = f"sha256:{sha256(memoryview(self._raw)[: self._at]).hexdigest()}"
        return GgufHeader(self._placed(described, begin), _short(facts), digest, version)

    def _tensor(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._text("the name of a tensor")
        axes = self._number("I")
        if axes > _MOST_AXES:
            self._refuse(f"tensor {name!r} has {axes:,} axes")
        shape = tuple(self._number("Q") for _ in range(axes))[::-1]
        kind, offset = self._number("I"), self._number("Q")
        if math.prod(shape) > _MOST_ENTRIES or any(size > _MOST_ENTRIES for size in shape):
            self._refuse(f"tensor {name!r} has a shape that no file could hold, beginning {list(shape)}")
        return name, kind, shape, offset

    def _placed(self, described: list[tuple[str, int, tuple[int, ...], int]], begin: int) -> dict[str, TensorInfo]:
        """Where each tensor lies; of a type that is not known, up to where the next begins."""
        found: dict[str, TensorInfo] = {}
        end, before = begin, "the header"
        in_order = sorted(described, key=lambda tensor: tensor[3])
        starts = [*(begin + offset for *_, offset in in_order), max(begin, self._size)]
        for at, (name, kind, shape, _) in enumerate(in_order):
            start = starts[at]
            dtype, block, each = _TYPES.get(kind, (f"type {kind}", 0, 0))
            if name in found:
                self._refuse(f"tensor {name!r} stands twice")
            if block and shape and shape[-1] % block:
                self._refuse(f"tensor {name!r} is {list(shape)}, and {dtype} has blocks of {block} entries of a row")
            nbytes = math.prod(shape) // block * each if block else max(0, starts[at + 1] - start)
            if start < end:
                self._refuse(f"tensor {name!r} starts at byte {start:,} and overlaps {before}, which ends at {end:,}")
            if start + nbytes > self._size:
                what = f"tensor {name!r} ends at byte {start + nbytes:,}, but the file at {self._size:,}"
                self._refuse(what, "The file is incomplete: copy or download it again.")
            end, before = start + nbytes, repr(name)
            found[name] = TensorInfo(dtype, shape, start, nbytes)
        return {name: found[name] for name, *_ in described}

    def _value(self, kind: int, key: str, depth: int = 0) -> Any:
        """The value of a key; None of a list."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _TEXT:
            return self._text(f"the value of {key!r}")
        if kind != _LIST or depth > _DEEPEST:
            self._refuse(f"the value of {key!r} is of type {kind}, which GGUF does not have there")
        inner, length = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _TEXT:
            self._skip_texts(length)
        else:
            self._need(length)  # bytes: each takes one at least
            for _ in range(length):
                self._value(inner, key, depth + 1)
        return None

    def _skip_texts(self, length: int) -> None:
        """Go past a list of texts, of which tokenizers have hundreds of thousands."""
        self._need(8 * length)  # at least
        unpack, raw, at = _LENGTH.unpack_from, self._raw, self._at
        for _ in range(length):
            if at + 8 > len(raw):
                self._at = at
                self._need(8)
                raw = self._raw
            at += 8 + unpack(raw, at)[0]
        self._at = at
        self._need(0)

    def _number(self, form: str) -> Any:
        nbytes = struct.calcsize(form)
        self._need(nbytes)
        (found,) = struct.unpack_from(f"<{form}", self._raw, self._at)
        self._at += nbytes
        return found

    def _text(self, what: str) -> str:
        """A text, empty where it is long."""
        length = self._number("Q")
        begin = self._at
        self._skip(length)
        if length > _LONGEST:
            return ""
        try:
            return self._raw[begin : self._at].decode("utf-8")
        except UnicodeDecodeError:
            self._refuse(f"{what} is no UTF-8")

    def _skip(self, nbytes: int) -> None:
        self._need(nbytes)
        self._at += nbytes

    def _need(self, nbytes: int) -> None:
        """Have so many more bytes of the header at hand."""
        end = self._at + nbytes
        if end <= len(self._raw):
            return
        if end > min(self._size, HEADER_LIMIT):
            where = "the end of the file" if end > self._size else f"{HEADER_LIMIT:,} bytes, the most that is read"
            self._refuse(f"its header goes on beyond {where}", _CUT)
        self._raw += self._file.read(max(end, min(2 * len(self._raw), HEADER_LIMIT)) - len(self._raw))
        if end > len(self._raw):
            self._refuse("its header goes on beyond the end of the file", _CUT)

    def _refuse(self, what: str, hint: str = "The file is damaged: copy or download it again.") -> NoReturn:
        raise CheckpointError(f"{self._path}: {what}", hint=hint)


def _short(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if value is not None and value != ""}


_CUT = "The file is incomplete, or no GGUF file: copy or download it again."
_OTHER = "Convert it with a current llama.cpp."
_VERSIONS = (2, 3)
_LENGTH = struct.Struct("<Q")
_MOST_TENSORS, _MOST_PAIRS, _MOST_AXES, _MOST_ENTRIES = 1_000_000, 65_536, 8, 2**60
_ALIGNMENT, _MOST_ALIGNMENT = 32, 2**20
_FIRST = 2**20  # bytes that are read at first
_LONGEST = 64 * 1024  # bytes of text that is kept
_DEEPEST = 3  # lists within lists
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9

_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
"""ggml's types -> name, entries of a block, bytes of one."""

_FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S",
    12: "Q3_K_M", 13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS",
    20: "IQ2_XS", 21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M",
    28: "IQ2_S", 29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4",
    39: "NVFP4", 40: "Q1_0",
}  # fmt: skip
"""llama.cpp's numbers for how most of a file is quantised."""
