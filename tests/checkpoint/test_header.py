"""The safetensors header, against the format's own library and against bytes put together by hand."""

from __future__ import annotations

import json
import random
import struct
import time
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from lines_cli.checkpoint.header import HEADER_LIMIT, TensorInfo, canonical_order, lay_out, read_header
from lines_cli.errors import CheckpointError
from support.files import write_raw

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(**changes: object) -> dict[str, object]:
    return {**F32, **changes}


def tensors_of(*dtypes: torch.dtype) -> dict[str, torch.Tensor]:
    """Two tensors of each dtype, of odd sizes, named so that neither insertion nor sorting gives the file's order."""
    shapes = [(3,), (5, 1, 3)]
    return {
        f"{name}.{dtype}": torch.zeros(shape).to(dtype)
        for dtype in dtypes
        for name, shape in zip("ba", shapes, strict=True)
    }


# --- writing ---

GOLDEN = {
    "floats": tensors_of(torch.bfloat16, torch.float64, torch.float16, torch.float32),
    "integers": tensors_of(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    "unsigned": tensors_of(torch.uint64, torch.uint32, torch.uint16),
    "other": tensors_of(torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2),
    "scalar": {"b": torch.tensor(1.5), "a": torch.tensor(True)},
    "zero-size": {"z": torch.zeros(0, 3), "m": torch.ones(2), "a": torch.zeros(4, 0), "e": torch.zeros(0).bool()},
    "unicode": {"é.重み": torch.ones(3), "z": torch.ones(1), "\U0001f600": torch.ones(1), "￿": torch.ones(1)},
    "escapes": {'quo"te': torch.ones(1), "back\\slash": torch.ones(1), "\n\t\b\x1b\x7f/": torch.ones(1)},
    "empty name": {"": torch.ones(1)},
    "nothing": {},
}


@pytest.mark.parametrize("metadata", [{"format": "pt"}, {}], ids=["pt", "no metadata"])
@pytest.mark.parametrize("tensors", GOLDEN.values(), ids=GOLDEN)
def test_layout_is_that_of_the_reference_writer(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """A file laid out by us is, byte for byte, the one that safetensors' own library writes."""
    written = safetensors.torch.save(tensors, metadata=metadata or None)
    (length,) = struct.unpack("<Q", written[:8])
    entries = json.loads(written[8 : 8 + length])
    entries.pop("__metadata__", None)
    dtypes = {name: entries[name]["dtype"] for name in tensors}

    order = canonical_order(dtypes)
    head, places = lay_out(((name, dtypes[name], tuple(tensors[name].shape)) for name in order), metadata)

    assert head == written[: 8 + length]
    assert list(places) == order
    for name, place in places.items():
        start, end = entries[name]["data_offsets"]
        assert (place.offset, place.nbytes) == (8 + length + start, end - start)


def test_layout_spelt_out() -> None:
    """Length, JSON without spaces, padded to 8 bytes; the metadata first, tensors in the order given."""
    head, places = lay_out([("b", "BF16", (3,)), ("a", "F64", ())], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3],"data_offsets":[0,6]},'
        b'"a":{"dtype":"F64","shape":[],"data_offsets":[6,14]}}'
    )
    padded = text + b" " * (-len(text) % 8)
    assert head == len(padded).to_bytes(8, "little") + padded
    assert places == {
        "b": TensorInfo("BF16", (3,), len(head), 6),
        "a": TensorInfo("F64", (), len(head) + 6, 8),
    }


# --- reading what is legal ---


@pytest.mark.parametrize("tensors", GOLDEN.values(), ids=GOLDEN)
def test_reads_what_the_reference_writes(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Every tensor of a file of safetensors' own is found: its dtype, its shape, and the very bytes of its data."""
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    header, raw = read_header(path), path.read_bytes()
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert header.tensors.keys() == tensors.keys()
    for name, info in header.tensors.items():
        tensor = tensors[name]
        assert info.shape == tuple(tensor.shape)
        assert info.numel == tensor.numel()
        assert raw[info.offset : info.offset + info.nbytes] == bytes(tensor.flatten().view(torch.uint8).tolist())


LEGAL = {
    "no tensors": ({}, b""),
    "spaces behind": (b'{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}     ', b"x"),
    "null metadata": ({"__metadata__": None}, b""),
    "metadata like a tensor": ({"__metadata__": {"dtype": "F32", "shape": "[2]", "data_offsets": "[0,8]"}}, b""),
    "any order": (
        {"z": {"dtype": "U8", "shape": [3], "data_offsets": [2, 5]}, "a": entry(dtype="U8", data_offsets=[0, 2])},
        b"12345",
    ),
    "empty among others": (
        {
            "a": entry(dtype="U8", shape=[2], data_offsets=[0, 2]),
            "e": entry(shape=[0], data_offsets=[2, 2]),
            "b": entry(dtype="U8", shape=[1], data_offsets=[2, 3]),
        },
        b"123",
    ),
    "half bytes": ({"w": entry(dtype="F4", shape=[3, 2], data_offsets=[0, 3])}, b"123"),
    "six bits": ({"w": entry(dtype="F6_E2M3", shape=[4], data_offsets=[0, 3])}, b"123"),
    "zero times huge": ({"w": entry(shape=[0, 2**40], data_offsets=[0, 0])}, b""),
}


@pytest.mark.parametrize(("header", "data"), LEGAL.values(), ids=LEGAL)
def test_reads_what_the_format_allows(header: object, data: bytes, tmp_path: Path) -> None:
    """Files that safetensors' own library takes, though it would not write them so, are taken here too."""
    path = write_raw(tmp_path / "x.safetensors", header, data)
    theirs = dict(safetensors.deserialize(path.read_bytes()))
    ours = read_header(path).tensors
    assert {name: (info.dtype, list(info.shape), info.nbytes) for name, info in ours.items()} == {
        name: (t["dtype"], t["shape"], len(t["data"])) for name, t in theirs.items()
    }


# --- refusing the rest ---

# The bytes of a file (or a header, to be given its length, and the data), and what the message must hold.
MALFORMED: dict[str, tuple[object, bytes, list[str]]] = {
    "begins with a space": (b' {"w":1}', b"", ["'{'"]),
    "an array": (b"[]", b"", ["'{'"]),
    "header of length 0": (b"", b"", ["'{'"]),
    "JSON cut short": (b'{"w":{"dtype":', b"", ["JSON"]),
    "JSON and more": (b"{} {}", b"", ["JSON"]),
    "not UTF-8": (b'{"\xff":1}', b"", ["JSON"]),
    "not JSON": (b"{w: 1}", b"", ["JSON"]),
    "nested too deep": (b'{"w":' + b"[" * 200_000, b"", ["JSON"]),
    "a number of 5,000 digits": (b'{"w":{"shape":[' + b"9" * 5000 + b"]}}", b"", ["JSON"]),
    "a tensor twice": (b'{"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"w":{}}', b"", ["'w'", "twice"]),
    "a key twice": (b'{"w":{"dtype":"F32","dtype":"U8","shape":[8],"data_offsets":[0,8]}}', b"8" * 8, ["twice"]),
    "half a character for a name": (b'{"\\ud800":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}', b"", ["ud800"]),
    "metadata a list": ({"__metadata__": ["format"]}, b"", ["__metadata__"]),
    "metadata an empty list": ({"__metadata__": []}, b"", ["__metadata__"]),
    "metadata a string": ({"__metadata__": ""}, b"", ["__metadata__"]),
    "metadata false": ({"__metadata__": False}, b"", ["__metadata__"]),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, b"", ["__metadata__"]),
    "metadata nested": ({"__metadata__": {"format": {}}}, b"", ["__metadata__"]),
    "metadata a tensor": ({"__metadata__": entry()}, b"8" * 8, ["__metadata__"]),
    "metadata of tensors": ({"__metadata__": {"format": entry()}}, b"8" * 8, ["__metadata__"]),
    "one tensor without a name": (entry(), b"8" * 8, ["without a name"]),
    "a tensor for a dtype": ({"w": entry(dtype=entry())}, b"8" * 8, ["'w'", "dtype"]),
    "a tensor within a shape": ({"w": entry(shape=[entry()])}, b"8" * 8, ["'w'", "shape"]),
    "tensor null": ({"w": None}, b"", ["'w'"]),
    "tensor a list": ({"w": [1, 2]}, b"", ["'w'"]),
    "tensor a string": ({"w": "dtype shape data_offsets"}, b"", ["'w'"]),
    "no dtype": ({"w": {"shape": [2], "data_offsets": [0, 8]}}, b"8" * 8, ["'w'", "dtype"]),
    "no shape": ({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, b"8" * 8, ["'w'", "shape"]),
    "no offsets": ({"w": {"dtype": "F32", "shape": [2]}}, b"8" * 8, ["'w'", "data_offsets"]),
    "unknown dtype": ({"w": entry(dtype="F31")}, b"8" * 8, ["'w'", "F31"]),
    "dtype in lower case": ({"w": entry(dtype="f32")}, b"8" * 8, ["'w'", "f32"]),
    "dtype a list": ({"w": entry(dtype=["F32"])}, b"8" * 8, ["'w'", "F32"]),
    "dtype null": ({"w": entry(dtype=None)}, b"8" * 8, ["'w'", "dtype"]),
    "shape null": ({"w": entry(shape=None)}, b"8" * 8, ["'w'", "shape"]),
    "shape a number": ({"w": entry(shape=2)}, b"8" * 8, ["'w'", "shape"]),
    "shape negative": ({"w": entry(shape=[-1, -2])}, b"8" * 8, ["'w'", "shape", "-1"]),
    "shape a float": ({"w": entry(shape=[2.0])}, b"8" * 8, ["'w'", "shape", "2.0"]),
    "shape a boolean": ({"w": entry(shape=[2, True])}, b"8" * 8, ["'w'", "shape", "True"]),
    "shape of strings": ({"w": entry(shape=["2"])}, b"8" * 8, ["'w'", "shape"]),
    "shape nested": ({"w": entry(shape=[[2]])}, b"8" * 8, ["'w'", "shape"]),
    "shape NaN": (b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', b"8" * 8, ["'w'"]),
    "shape beyond 64 bits": ({"w": entry(shape=[2**64 + 2])}, b"8" * 8, ["'w'", "shape"]),
    "product of 2^64 entries": ({"w": entry(shape=[2**32, 2**32], data_offsets=[0, 0])}, b"", ["'w'", "4294967296"]),
    "product beyond any float": ({"w": entry(shape=[2**62] * 20)}, b"8" * 8, ["'w'"]),
    "offsets null": ({"w": entry(data_offsets=None)}, b"8" * 8, ["'w'", "data_offsets"]),
    "one offset": ({"w": entry(data_offsets=[0])}, b"8" * 8, ["'w'", "data_offsets"]),
    "three offsets": ({"w": entry(data_offsets=[0, 8, 8])}, b"8" * 8, ["'w'", "data_offsets"]),
    "offsets of strings": ({"w": entry(data_offsets=["0", "8"])}, b"8" * 8, ["'w'", "data_offsets"]),
    "offsets negative": ({"w": entry(data_offsets=[-8, 0])}, b"8" * 8, ["'w'", "data_offsets", "-8"]),
    "offsets reversed": ({"w": entry(data_offsets=[8, 0])}, b"8" * 8, ["'w'", "data_offsets"]),
    "offsets floats": ({"w": entry(data_offsets=[0.0, 8.0])}, b"8" * 8, ["'w'", "data_offsets"]),
    "offsets booleans": ({"w": entry(dtype="U8", shape=[1], data_offsets=[False, True])}, b"1", ["'w'", "offsets"]),
    "range too short": ({"w": entry(data_offsets=[0, 4])}, b"1234", ["'w'", "F32", "[2]", "8", "4"]),
    "range too long": ({"w": entry(data_offsets=[0, 12])}, b"1" * 12, ["'w'", "F32", "[2]", "8", "12"]),
    "half a byte over": ({"w": entry(dtype="F4", shape=[3], data_offsets=[0, 1])}, b"1", ["'w'", "F4"]),
    "overlap": ({"v": entry(), "w": entry(data_offsets=[4, 12])}, b"1" * 12, ["'w'", "'v'", "overlap"]),
    "the same range twice": ({"v": entry(), "w": entry()}, b"8" * 8, ["'w'", "'v'", "overlap"]),
    "one within another": (
        {"v": entry(shape=[3], data_offsets=[0, 12]), "w": entry(shape=[1], data_offsets=[4, 8])},
        b"1" * 12,
        ["'w'", "'v'", "overlap"],
    ),
    "a hole before": ({"w": entry(data_offsets=[4, 12])}, b"1" * 12, ["'w'", "hole"]),
    "a hole between": ({"v": entry(), "w": entry(data_offsets=[12, 20])}, b"1" * 20, ["'w'", "'v'", "hole"]),
    "past the end": ({"w": entry()}, b"1234567", ["ends"]),
    "bytes left over": ({"w": entry()}, b"123456789", ["1 ", "follow"]),
    "data of no tensor": ({}, b"1", ["follow"]),
}


@pytest.mark.parametrize(("header", "data", "words"), MALFORMED.values(), ids=MALFORMED)
def test_refuses_a_malformed_header(header: object, data: bytes, words: list[str], tmp_path: Path) -> None:
    """What the format's own library refuses is refused, with the file's name, the tensor's, and what is wrong."""
    path = write_raw(tmp_path / "bad.safetensors", header, data)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert str(path) in refused.value.message
    assert [word for word in words if word not in refused.value.message] == []
    assert len(refused.value.message) < 1000


LENGTHS = {
    "one byte more than there is": (b'{"w":1}', 8, "only 7"),
    "more than the format allows": (b"{}", HEADER_LIMIT + 1, "100,000,000"),
    "2^63": (b"{}", 2**63, "100,000,000"),
    "2^64 - 1": (b"{}", 2**64 - 1, "100,000,000"),
    "a zip, as torch.save writes": (b"archive/data.pkl", int.from_bytes(b"PK\3\4\0\0\10\10", "little"), "torch.save"),
}


@pytest.mark.parametrize(("text", "length", "word"), LENGTHS.values(), ids=LENGTHS)
def test_refuses_an_impossible_length(text: bytes, length: int, word: str, tmp_path: Path) -> None:
    """A length that the file or the format cannot hold is refused before that much is read."""
    path = write_raw(tmp_path / "bad.safetensors", text, length=length)
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert str(path) in refused.value.message
    assert word in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_refuses_a_file_too_short_for_a_length(content: bytes, tmp_path: Path) -> None:
    """A file of less than 8 bytes is said to be too short."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{len(content)} bytes, too few"):
        read_header(path)


def test_refuses_what_cannot_be_opened(tmp_path: Path) -> None:
    """A missing file and a folder are refused by name."""
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(CheckpointError, match=str(path)):
            read_header(path)


def test_a_long_shape_is_refused_at_once(tmp_path: Path) -> None:
    """A header of a megabyte that multiplies 60,000 huge sizes neither hangs nor floods the screen."""
    path = write_raw(tmp_path / "bad.safetensors", {"w": entry(shape=[2**62] * 60_000)}, b"8" * 8)
    with pytest.raises(CheckpointError) as refused:
        read_header(path)
    assert len(refused.value.message) < 1000


@pytest.mark.slow
def test_tensors_within_tensors_are_refused_at_once(tmp_path: Path) -> None:
    """What is wrong with an entry is written out once it is told, not at each of 500 levels of one within the other."""
    inner: object = [1] * 1_000_000
    for _ in range(500):
        inner = entry(shape=inner)
    path = write_raw(tmp_path / "bad.safetensors", {"__metadata__": {"format": inner}})
    started = time.process_time()
    with pytest.raises(CheckpointError, match="__metadata__"):
        read_header(path)
    assert time.process_time() - started < 3


@pytest.mark.slow
def test_never_laxer_than_the_reference(tmp_path: Path) -> None:
    """Of 1,000 damaged headers each is refused as a CheckpointError, or read as safetensors' own library reads it."""
    good = {
        "__metadata__": {"format": "pt"},
        "a.0": entry(),
        "b": entry(dtype="BF16", shape=[1, 2], data_offsets=[8, 12]),
        "c": entry(dtype="I8", shape=[], data_offsets=[12, 13]),
    }
    text, data = json.dumps(good).encode(), bytes(13)
    pieces = [
        b"0",
        b"1",
        b"8",
        b"-",
        b".5",
        b"e1",
        b'"',
        b",",
        b"[]",
        b"{}",
        b"null",
        b"true",
        b"\\u0000",
        b"\xff",
        b"",
    ]
    draw = random.Random(0)
    path, accepted = tmp_path / "x.safetensors", 0
    for _ in range(1000):
        start = draw.randrange(len(text))
        damaged = text[:start] + draw.choice(pieces) + text[start + draw.randrange(3) :]
        write_raw(path, damaged, data)
        try:
            ours = read_header(path).tensors
        except CheckpointError:
            continue
        accepted += 1
        theirs = dict(safetensors.deserialize(path.read_bytes()))
        assert {name: (info.dtype, list(info.shape)) for name, info in ours.items()} == {
            name: (t["dtype"], t["shape"]) for name, t in theirs.items()
        }, damaged
    assert accepted
