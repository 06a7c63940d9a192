"""GGUF files are looked at by their headers, and refused as inputs with the way out; a stranger's does no harm."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from lines_cli.checkpoint.gguf import _TYPES, read_gguf
from lines_cli.errors import CheckpointError
from support import forked
from support.files import write_checkpoint
from support.gguf import header, text, value, write_gguf
from support.inspecting import ok, refused, told
from support.run import run_lines

MODEL: dict[str, tuple[str, list[int]]] = {
    "token_embd.weight": ("Q8_0", [100, 64]),
    **{f"blk.{i}.ffn_up.weight": ("Q4_K", [96, 256]) for i in range(4)},
    **{f"blk.{i}.attn_norm.weight": ("F32", [64]) for i in range(4)},
    "output_norm.weight": ("F32", [64]),
}
FACTS = {"llama__block_count": 4, "general__file_type": 15, "general__name": "tiny"}


@pytest.mark.slow
@pytest.mark.parametrize("alignment", [32, 64])
def test_inspecting_a_file(alignment: int, tmp_path: Path) -> None:
    """Tensors, parameters, bytes by type, depth, and what the file says of itself."""
    tokens = [f"token {i}" for i in range(50_000)]  # beyond what is read at first
    lists = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__scores": [0.5] * 50_000}
    path = write_gguf(tmp_path / "q.gguf", MODEL, alignment=alignment, **FACTS, **lists)
    report = told(path, "--tensors")
    assert report["stored_as"] == "GGUF 3, llama, Q4_K_M"
    assert "is a GGUF file" in report["quantised"]
    assert (report["tensors"], report["parameters"]) == (10, 6400 + 4 * 96 * 256 + 5 * 64)
    assert {dtype: counts["bytes"] for dtype, counts in report["dtypes"].items()} == {
        "F32": 5 * 64 * 4,
        "Q4_K": 4 * 96 * 144,
        "Q8_0": 200 * 34,
    }
    assert [(stack["name"], stack["layers"]) for stack in report["stacks"]] == [("blk", 4)]
    rows = {row["name"]: row for row in report["map"]}
    assert (rows["blk.1.ffn_up.weight"]["shape"], rows["blk.1.ffn_up.weight"]["dtype"]) == ([96, 256], "Q4_K")
    assert "GGUF 3, llama, Q4_K_M" in ok(path).out


def test_a_folder_with_one(tmp_path: Path) -> None:
    """A folder is looked at by its only GGUF file; of several the error lists them."""
    write_gguf(tmp_path / "q4.gguf", MODEL, **FACTS)
    assert told(tmp_path)["tensors"] == 10
    write_gguf(tmp_path / "q8.gguf", MODEL, **FACTS)
    refused(3, tmp_path, words=("q4.gguf", "q8.gguf", "GGUF"))


def test_as_an_input_it_is_refused_with_the_way_out(tmp_path: Path) -> None:
    """As base, as fine-tune, with whole weights only, in a folder, against a base."""
    path = write_gguf(tmp_path / "f32.gguf", {"blk.0.ffn_up.weight": ("F32", [4, 4])})
    (tmp_path / "folder").mkdir()
    write_gguf(tmp_path / "folder" / "q.gguf", MODEL, **FACTS)
    plain = write_checkpoint(tmp_path / "plain.safetensors", {"layers.0.w": torch.ones(4, 4)})
    for given in (path, tmp_path / "folder"):
        for sides in ((given, plain), (plain, given)):
            ran = run_lines("edit", *sides, "-o", tmp_path / "out")
            assert (ran.code, ran.trace) == (3, "")
            assert [
                word for word in (".gguf", "GGUF", "gguf_file", "convert_hf_to_gguf.py") if word not in ran.err
            ] == []
        refused(3, given, "--base", plain, words=("GGUF", "hint: "))
    under_another_name = tmp_path / "q.safetensors"
    under_another_name.write_bytes(path.read_bytes())
    refused(3, under_another_name, words=("by its content a GGUF file", ".gguf"))


def test_health_of_whole_tensors(tmp_path: Path) -> None:
    """--check looks through its floats, and says what it did not look into."""
    path = write_gguf(tmp_path / "q.gguf", MODEL, **FACTS)
    (health,) = run_lines("inspect", path, "--check", "--json").json["health"]
    assert (health["tensors"], health["not_looked_into"]) == (5, {"Q4_K": 4, "Q8_0": 1})


def test_a_type_that_is_not_known_yet(tmp_path: Path) -> None:
    """It is named by its number, and reaches up to the next tensor."""
    head = header({}, [("a", [64], 200, 0), ("b", [4], 0, 96)])
    head += bytes(-len(head) % 32)
    (tmp_path / "q.gguf").write_bytes(head + bytes(96 + 16))
    rows = {row["name"]: row for row in told(tmp_path / "q.gguf", "--tensors")["map"]}
    assert (rows["a"]["dtype"], rows["a"]["bytes"], rows["b"]["bytes"]) == ("type 200", 96, 16)


def test_a_part_of_a_file_that_was_split(tmp_path: Path) -> None:
    """It says which part it is, and its depth is that of what it holds."""
    path = write_gguf(tmp_path / "q-00001-of-00002.gguf", MODEL, **FACTS, split__no=0, split__count=2)
    assert told(path)["stored_as"] == "GGUF 3, llama, Q4_K_M, part 1 of 2"


LIST_OF_LISTS = struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 8
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "does not begin with GGUF"),
    "another format": (b"GGML" + bytes(60), "does not begin with GGUF"),
    "cut off": (header(FACTS, [])[:-3], "beyond the end of the file"),
    "version 1": (header({}, [], version=1) + bytes(64), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "2^60 tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "more than any model"),
    "2^60 pairs": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60), "more than any model"),
    "a text of 2^63 bytes": (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "beyond the end"),
    "a list of 2^62 numbers": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 4, 2**62),
        "beyond the end",
    ),
    "a list of 2^62 texts": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQ", 9, 8, 2**62),
        "beyond the end",
    ),
    "a text in a list that is too long": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<IIQQQ", 9, 8, 2, 2**63, 0),
        "beyond the end",
    ),
    "lists in lists": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + LIST_OF_LISTS, "of type 9"),
    "a value of no type": (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("a") + struct.pack("<I", 99), "type 99"),
    "a name that is no text": (
        b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 2) + b"\xff\xfe" + bytes(40),
        "no UTF-8",
    ),
    "a key twice": (
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + 2 * (text("a") + value(1)),
        "stands twice",
    ),
    "a tensor twice": (header({}, [("a", [1], 0, 0), ("a", [1], 0, 32)]) + bytes(128), "stands twice"),
    "2^32 axes": (header({}, [])[:8] + struct.pack("<QQ", 1, 0) + text("a") + b"\xff" * 4 + bytes(64), "axes"),
    "2^120 entries": (header({}, [("a", [2**60, 2**60], 0, 0)]) + bytes(64), "no file could hold"),
    "no whole blocks": (header({}, [("a", [33], 8, 0)]) + bytes(128), "blocks of 32"),
    "beyond the end": (header({}, [("a", [4096], 0, 0)]) + bytes(64), "but the file"),
    "far beyond the end": (header({}, [("a", [4], 0, 2**63)]) + bytes(64), "but the file"),
    "tensors that overlap": (header({}, [("a", [64], 0, 0), ("b", [64], 0, 32)]) + bytes(512), "overlaps"),
    "an alignment of 0": (header({"general.alignment": 0}, []) + bytes(64), "power of two"),
    "an alignment of 3": (header({"general.alignment": 3}, []) + bytes(64), "power of two"),
    "an alignment in words": (header({"general.alignment": "many"}, []) + bytes(64), "power of two"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers(case: str, tmp_path: Path) -> None:
    """What is wrong is said, in one line, before anything of such a size is taken."""
    content, words = HOSTILE[case]
    (tmp_path / "x.gguf").write_bytes(content)
    ran = refused(3, tmp_path / "x.gguf", words=("x.gguf", words))
    assert len(ran.err) < 700


@pytest.mark.parametrize(
    "facts", [{"general.architecture": 5}, {"general.architecture": "\x1b[31m\n", "general.file_type": -1.0}], ids=str
)
def test_facts_of_other_kinds(facts: dict[str, Any], tmp_path: Path) -> None:
    """Numbers for text, control characters: shown, and harmless."""
    head = header(facts | {"split.no": "x", "split.count": 2**31}, [("blk.0.w", [4], 0, 0), ("blk.1.w", [4], 0, 32)])
    head += bytes(-len(head) % 32)
    (tmp_path / "x.gguf").write_bytes(head + bytes(64))
    assert "\x1b" not in ok(tmp_path / "x.gguf").out
    assert told(tmp_path / "x.gguf")["tensors"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("times", [500, pytest.param(2_000, marks=pytest.mark.slow)])
def test_mutated_files(times: int, tmp_path: Path) -> None:
    """Many files with bytes changed, in a process with little memory: read, or refused."""
    path = write_gguf(tmp_path / "q.gguf", MODEL, **FACTS, tokenizer__ggml__tokens=["a", "bc"] * 9)
    whole = path.read_bytes()
    end = whole.index(b"output_norm.weight") + 60

    def program() -> None:
        forked.allow_more_memory(2**28)
        chance, outcomes = random.Random(0), [0, 0]
        for _ in range(times):
            content = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                content[chance.randrange(4, end)] = chance.choice([0, 1, 255, chance.randrange(256)])
            path.write_bytes(content[: chance.choice([len(content), len(content), chance.randrange(len(content))])])
            try:
                found = read_gguf(path)
            except CheckpointError:
                outcomes[1] += 1
                continue
            outcomes[0] += 1
            for info in found.tensors.values():
                assert 0 <= info.offset <= info.offset + info.nbytes <= len(content)
        print(*outcomes)

    ran = forked.run(program, timeout=300)
    assert ran.returncode == 0, ran.stderr[-3000:]
    read, wrong = map(int, ran.stdout.split())
    assert min(read, wrong) > times // 20


@pytest.mark.slow
def test_as_the_formats_own_library_writes_it(tmp_path: Path) -> None:
    """Types, shapes, offsets and bytes of the gguf package, of every type that it has."""
    gguf = pytest.importorskip("gguf")
    numpy = pytest.importorskip("numpy")
    sizes = {kind.name: size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert {name: (block, each) for name, block, each in _TYPES.values()} == sizes
    writer = gguf.GGUFWriter(tmp_path / "q.gguf", "llama")
    writer.add_block_count(2)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_K_M)
    writer.add_token_list(["a", "b"])
    for at, (kind, (block, each)) in enumerate(gguf.GGML_QUANT_SIZES.items()):
        if kind.name in ("F16", "F32", "F64", "I8", "I16", "I32", "I64"):
            dtype = {"F": "float", "I": "int"}[kind.name[0]] + kind.name[1:]
            writer.add_tensor(f"blk.{at}.w", numpy.zeros((3, 5), dtype=dtype))
        else:
            writer.add_tensor(f"blk.{at}.w", numpy.zeros((3, 2 * each), dtype=numpy.uint8), raw_dtype=kind)
        assert block
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    ours, theirs = read_gguf(tmp_path / "q.gguf"), gguf.GGUFReader(tmp_path / "q.gguf")
    assert ours.described == "GGUF 3, llama, Q4_K_M"
    assert ours.config["num_hidden_layers"] == 2
    assert len(theirs.tensors) == len(ours.tensors) == len(sizes)
    for tensor in theirs.tensors:
        info = ours.tensors[tensor.name]
        assert (info.dtype, info.offset, info.nbytes) == (tensor.tensor_type.name, tensor.data_offset, tensor.n_bytes)
        assert list(info.shape) == list(reversed(tensor.shape.tolist()))
