"""`lines inspect`: what it tells is what the files hold, what it cannot tell it says, and no name steers it."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.cli import console
from lines_cli.inspection import compare as comparison
from lines_cli.inspection.tables import count, size
from support.files import snapshot, write_checkpoint, write_raw
from support.run import Ran, run_lines

DOCS = Path(__file__).parents[2] / "docs" / "inspecting.md"
NAN, INF = float("nan"), float("inf")
HEADERS_ONLY = "checkpoint base tensors parameters bytes files dtypes stacks layers outside kinds tied".split()
HEADERS_ONLY += "quantised recipe scaling notes".split()


@pytest.fixture(autouse=True)
def _eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the terminal that runs the tests."""
    monkeypatch.setattr(console._out, "_width", 80)


def ok(*args: object) -> Ran:
    """`lines inspect ARGS`, which succeeds."""
    ran = run_lines("inspect", *args)
    assert (ran.code, ran.trace) == (0, ""), ran.trace or ran.err
    return ran


def told(*args: object) -> Any:
    """What `lines inspect ARGS --json` prints; NaN and Inf are no JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(ok(*args, "--json").out, parse_constant=refuse)


def refused(code: int, *args: object, words: tuple[str, ...] = ()) -> Ran:
    """`lines inspect ARGS`, which says why not on stderr, and nothing on stdout."""
    ran = run_lines("inspect", *args)
    assert (ran.code, ran.out, ran.trace) == (code, "", ""), ran.trace or ran.err
    assert ran.err.startswith("error: ")
    assert all(word in ran.err for word in words), ran.err
    return ran


def process(*args: object, program: str = "from lines_cli.cli.app import main; main()", **env: str) -> Any:
    """The command in a process of its own."""
    command = [sys.executable, "-c", program, "inspect", *map(str, args)]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR", "NO_COLOR")}
    return subprocess.run(command, capture_output=True, check=False, timeout=120, env=environment | env)


def llama(layers: int = 4, seed: int = 0, *, head: bool = True) -> dict[str, torch.Tensor]:
    """A decoder with names as transformers writes them."""
    made = torch.Generator().manual_seed(seed)
    model = {"model.embed_tokens.weight": torch.randn(10, 4, generator=made)}
    for layer in range(layers):
        model[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(4, 4, generator=made)
        model[f"model.layers.{layer}.mlp.up_proj.weight"] = torch.randn(6, 4, generator=made)
        model[f"model.layers.{layer}.input_layernorm.weight"] = torch.randn(4, generator=made)
    model["model.norm.weight"] = torch.randn(4, generator=made)
    return model | ({"lm_head.weight": torch.randn(10, 4, generator=made)} if head else {})


def tuned(model: Mapping[str, torch.Tensor], seed: int, by: float = 0.01) -> dict[str, torch.Tensor]:
    """A fine-tune, of which a quarter of the entries stay."""
    made = torch.Generator().manual_seed(seed)
    return {
        name: value + by * torch.randn(value.shape, generator=made) * (torch.rand(value.shape, generator=made) > 0.25)
        for name, value in model.items()
    }


def named(*names: str) -> dict[str, torch.Tensor]:
    """Small tensors, no two alike."""
    return {name: torch.full((2, 2), float(at + 1)) for at, name in enumerate(names)}


def headed(path: Path, dtypes: Mapping[str, tuple[str, list[int], int]]) -> Path:
    """A file whose tensors are of any dtype: name -> dtype, shape, bytes."""
    header, at = {}, 0
    for name, (dtype, shape, nbytes) in dtypes.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    return write_raw(path, header, bytes(at))


# --- what headers tell ---

MIXED = {
    "model.embed_tokens.weight": torch.randn(7, 4).bfloat16(),
    "model.layers.0.self_attn.q_proj.weight": torch.randn(4, 4).half(),
    "model.layers.0.mlp.up_proj.weight": torch.randn(5, 4),
    "model.layers.1.self_attn.q_proj.weight": torch.randn(4, 4).half(),
    "model.layers.1.mlp.up_proj.weight": torch.randn(3, 4).double(),
    "model.layers.2.self_attn.q_proj.weight": torch.randn(4, 4).half(),
    "model.layers.2.mlp.up_proj.weight": torch.zeros(0, 4),
    "model.layers.2.position_ids": torch.arange(6),
    "model.norm.weight": torch.randn(4),
    "model.scale": torch.tensor(2.0),
    "model.mask": torch.tensor([True, False, True]),
    "lm_head.weight": torch.randn(7, 4).bfloat16(),
}
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "int64": "I64", "bool": "BOOL"}


def counted(model: Mapping[str, torch.Tensor], belongs: Callable[[str], bool]) -> dict[str, int]:
    own = [tensor for name, tensor in model.items() if belongs(name)]
    return {
        "tensors": len(own),
        "parameters": sum(tensor.numel() for tensor in own),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in own),
    }


@pytest.mark.parametrize("shards", [0, 1, 3])
def test_counts(shards: int, tmp_path: Path) -> None:
    """Tensors, parameters and bytes are those of the files, in all, by dtype, by stack, layer, side and kind."""
    path = write_checkpoint(tmp_path / ("m" if shards else "m.safetensors"), MIXED, shards=shards or 1)
    report = told(path)
    assert {key: report[key] for key in ("tensors", "parameters", "bytes")} == counted(MIXED, lambda _: True)
    assert report["dtypes"] == {
        DTYPES[dtype]: counted(MIXED, lambda name, dtype=dtype: str(MIXED[name].dtype) == f"torch.{dtype}")
        for dtype in DTYPES
    }
    files = sorted((path if shards else tmp_path).glob("*.safetensors"))
    assert [file["name"] for file in report["files"]] == [file.name for file in files]
    for at, file in enumerate(report["files"]):
        there = list(MIXED)[at :: shards or 1]
        assert {key: file[key] for key in ("tensors", "bytes")} == {
            key: counted(MIXED, there.__contains__)[key] for key in ("tensors", "bytes")
        }
    (stack,) = report["stacks"]
    assert (stack["name"], stack["layers"], stack["names"]) == ("model.layers", 3, "model.layers.{l}")
    inside = counted(MIXED, lambda name: "layers" in name)
    assert {key: stack[key] for key in inside} == inside
    for layer in report["layers"]:
        own = counted(MIXED, lambda name, at=layer["index"]: f"layers.{at}." in name)
        assert layer == {"stack": "model.layers", "coefficient": layer["coefficient"], "index": layer["index"], **own}
    assert [layer["index"] for layer in report["layers"]] == [0, 1, 2]
    outside = report["outside"]
    after = counted(MIXED, lambda name: name in ("model.norm.weight", "lm_head.weight"))
    assert {key: outside["after"][key] for key in after} == after
    assert {key: outside[key] for key in after} == counted(MIXED, lambda name: "layers" not in name)
    assert all(outside["before"][key] + outside["after"][key] == outside[key] for key in after)
    kinds = {kind.pop("kind"): kind for kind in report["kinds"]}
    assert kinds["attention"] == counted(MIXED, lambda name: "self_attn" in name)
    assert kinds["mlp"] == counted(MIXED, lambda name: "mlp" in name)
    assert kinds["norm"] == counted(MIXED, lambda name: "norm" in name)
    assert kinds["head"] == counted(MIXED, lambda name: "lm_head" in name)
    assert sum(kind["tensors"] for kind in kinds.values()) == len(MIXED)


def test_only_headers_are_told(tmp_path: Path) -> None:
    """Without --base and --check nothing stands in the JSON that would need the weights."""
    report = told(write_checkpoint(tmp_path / "m", llama()))
    assert list(report) == HEADERS_ONLY
    assert (report["base"], report["quantised"], report["recipe"], report["notes"]) == (None, None, None, [])


def test_every_tensor(tmp_path: Path) -> None:
    """--tensors lists each tensor once, with its dtype, shape, place, kind and coefficient; the layers are its sums."""
    report = told(write_checkpoint(tmp_path / "m", MIXED, shards=2), "--tensors", "--filter", "mlp=0.25")
    rows = {row["name"]: row for row in report["map"]}
    assert len(report["map"]) == len(rows) == len(MIXED)
    for name, tensor in MIXED.items():
        row = rows[name]
        assert (row["shape"], row["parameters"]) == (list(tensor.shape), tensor.numel())
        assert DTYPES[str(tensor.dtype).removeprefix("torch.")] == row["dtype"]
        match = re.match(r"model\.layers\.(\d)\.", name)
        assert (row["stack"], row["index"]) == (("model.layers", int(match[1])) if match else (None, None))
        assert (row["side"] is None) == (match is not None)
        expected = 0.25 if "mlp" in name else 0.1 + 0.9 * int(match[1]) / 2 if match else 0.1
        assert row["coefficient"] == pytest.approx(expected, rel=1e-15)
    assert rows["model.embed_tokens.weight"]["side"] == "before"
    assert rows["lm_head.weight"]["side"] == "after"


NAMES = {
    "llama": (named(*(f"model.layers.{i}.mlp.w" for i in range(3)), "lm_head.weight"), ["model.layers.{l}"], [3]),
    "clip": (
        named(*(f"{t}_model.encoder.layers.{i}.w" for t, n in (("text", 2), ("vision", 3)) for i in range(n))),
        ["text_model.encoder.layers.{l}", "vision_model.encoder.layers.{l}"],
        [2, 3],
    ),
    "t5": (
        named(
            *(
                f"{tower}.block.{i}.layer.{part}"
                for tower in ("encoder", "decoder")
                for i in range(3)
                for part in ("0.SelfAttention.q", "0.layer_norm", "1.DenseReluDense.wi", "1.DenseReluDense.wo")
            )
        ),
        ["decoder.block.{l}", "encoder.block.{l}"],
        [3, 3],
    ),
    "moe": (
        named(*(f"model.layers.{i}.mlp.experts.{j}.w" for i in range(3) for j in range(8))),
        ["model.layers.{l}"],
        [3],
    ),
    "swin": (
        named(
            *(f"swin.layers.{s}.blocks.{b}.attn.w" for s, n in enumerate((2, 1, 3)) for b in range(n)),
            *(f"swin.layers.{s}.downsample.norm" for s in range(2)),
        ),
        ["swin.layers.{s}.blocks.{l}"],
        [6],
    ),
    "resnet": (
        named(*(f"layer{s + 1}.{b}.conv1.weight" for s, n in enumerate((2, 2, 3)) for b in range(n)), "fc.weight"),
        ["layer{s}.{l}"],
        [7],
    ),
    "flux": (
        named(*(f"double_blocks.{i}.a.w" for i in range(3)), *(f"single_blocks.{i}.b.w" for i in range(2))),
        ["double_blocks.{l} + single_blocks.{l}"],
        [5],
    ),
    "no prefix": (named(*(f"{i}.weight" for i in range(4)), *(f"{i}.bias" for i in range(4))), ["{l}"], [4]),
    "wrapped": (named(*(f"a.b.h.{i}.w" for i in range(2)), "a.b.wte.weight"), ["a.b.h.{l}"], [2]),
    "with gaps": (named(*(f"layers.{i}.w" for i in (0, 1, 3))), ["layers.{l}"], [3]),
    "one layer": (named("layers.0.w", "layers.0.v", "head"), ["layers.{l}"], [1]),
}


@pytest.mark.parametrize("which", NAMES)
def test_how_names_begin(which: str, tmp_path: Path) -> None:
    """Each stack says how its names begin, with the one number that counts depth in braces, and how deep it is."""
    model, patterns, layers = NAMES[which]
    report = told(write_checkpoint(tmp_path / "m.safetensors", model))
    assert [stack["names"] for stack in report["stacks"]] == patterns
    assert [stack["layers"] for stack in report["stacks"]] == layers
    assert ", ".join(patterns) in ok(tmp_path / "m.safetensors").out


def test_how_the_names_of_a_unet_begin(tmp_path: Path) -> None:
    """Where a stack was found in the names, these are told, also if one of its lists is a single block."""
    parts = [f"{side}_blocks.{i}.resnets.{j}.w" for side in ("down", "up") for i in range(2) for j in range(2)]
    (stack,) = told(write_checkpoint(tmp_path / "m.safetensors", named(*parts, "mid_block.resnets.0.w")))["stacks"]
    assert stack["layers"] == 5
    assert stack["names"] is not None


def test_layers_by_expression(tmp_path: Path) -> None:
    """--layers says where depth stands; such a stack has no names to tell."""
    path = write_checkpoint(tmp_path / "m.safetensors", named(*(f"net.cell{i}x.w" for i in range(5)), "head"))
    report = told(path, "--layers", r"^(?P<stack>\w+)\.cell(?P<index>\d+)x")
    assert [(s["name"], s["layers"], s["names"]) for s in report["stacks"]] == [("net", 5, None)]
    assert [layer["coefficient"] for layer in report["layers"]] == [0.1 + 0.9 * i / 4 for i in range(4)] + [1.0]
    assert report["notes"] == []


@pytest.mark.parametrize(
    "model",
    [
        named("a.w", "b.w"),
        named(*(f"albert.encoder.albert_layer_groups.0.albert_layers.0.{w}" for w in "wv")),
        named(*(f"layers.{i}.w" for i in (7, 8, 9))),
        {},
    ],
    ids=["no number", "shared layers", "one part", "nothing"],
)
def test_an_unknown_depth(model: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """Where depth cannot be told the rest is told all the same, and a note says why and what helps."""
    path = write_checkpoint(tmp_path / "m.safetensors", model)
    report = told(path)
    assert (report["stacks"], report["layers"]) == ([], [])
    assert report["outside"]["tensors"] == report["tensors"] == len(model)
    (note,) = report["notes"]
    assert "depth is unknown" in note
    assert "--layers" in note
    ran = ok(path)
    assert "depth is unknown" in ran.err
    assert "depth is unknown" not in ran.out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("", None),
        ("--outside keep", None),
        ("--alpha 0.5 --beta 0", 0.5),
        ("--alpha 0.5 --beta 0 --gamma 0.5", 0.25),
        ("--schedule 0.3", 0.3),
        ("--schedule constant", None),
    ],
)
def test_coefficients_of_an_unknown_depth(options: str, expected: float | None, tmp_path: Path) -> None:
    """Where depth is unknown coefficients are, too, unless depth makes no difference."""
    path, ft = (write_checkpoint(tmp_path / f"{at}.safetensors", tuned(named("a.w", "b.w"), at)) for at in range(2))
    report = told(path, "--tensors", *options.split())
    assert [row["coefficient"] for row in report["map"]] == [expected] * 2
    assert [report["outside"][side]["coefficient"] for side in ("before", "after")] == [expected] * 2
    (tune,) = told(ft, "--base", path, *options.split())["fine_tunes"]
    norm = None if expected is None else pytest.approx(expected * tune["update_norm"])
    assert tune["scaled_norm"] == norm
    assert (rows_of(ok(path, "--tensors", *options.split()).out, "tensors")[0][-1] == "-") == (expected is None)


# --- ties, quantised weights, what is no model ---


@pytest.mark.parametrize(
    ("config", "head", "expected"),
    [
        ({"tie_word_embeddings": True}, False, {"config": True, "stored": []}),
        (
            {"tie_word_embeddings": True},
            True,
            {"config": True, "stored": [["lm_head.weight", "model.embed_tokens.weight"]]},
        ),
        ({"tie_word_embeddings": False}, True, {"config": False, "stored": []}),
        ({"model_type": "llama", "transformers_version": "5.1.0"}, True, {"config": False, "stored": []}),
        (None, True, {"config": False, "stored": []}),
    ],
)
def test_ties(config: Any, head: bool, expected: Any, tmp_path: Path) -> None:
    """Told are the config's word on the tie, and each head that is stored all the same; it has its embedding's rule."""
    path = write_checkpoint(tmp_path / "m", llama(head=head), config=config)
    assert told(path)["tied"] == expected
    out = ok(path).out
    assert ("tied  " in out) == (expected["config"])
    assert ("both are stored" in out) == bool(expected["stored"])
    if head:
        rows = {r["name"]: r for r in told(path, "--tensors", "--filter", "embed_tokens=0.75")["map"]}
        assert rows["lm_head.weight"]["coefficient"] == (0.75 if expected["stored"] else 0.1)


QUANTISED = {
    "config": lambda tmp: write_checkpoint(
        tmp / "q",
        llama() | {"model.layers.0.mlp.up_proj.codes": torch.ones(2, 2, dtype=torch.int32)},
        config={"quantization_config": {"quant_method": "awq"}},
    ),
    "gptq": lambda tmp: write_checkpoint(
        tmp / "q", {f"model.layers.{i}.mlp.up_proj.qweight": torch.ones(2, 2, dtype=torch.int32) for i in range(3)}
    ),
    "int8": lambda tmp: write_checkpoint(
        tmp / "q", {f"model.layers.{i}.mlp.up_proj.weight": torch.ones(2, 2, dtype=torch.int8) for i in range(3)}
    ),
    "fp8": lambda tmp: headed(
        tmp / "q.safetensors", {f"model.layers.{i}.mlp.w.weight": ("F8_E4M3", [2, 2], 4) for i in range(3)}
    ),
    "fp4": lambda tmp: headed(
        tmp / "q.safetensors", {f"model.layers.{i}.mlp.w.weight": ("F4", [2, 2], 2) for i in range(3)}
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised(kind: str, tmp_path: Path) -> None:
    """Quantised weights are looked at, and said to be so; compared they are not."""
    path = QUANTISED[kind](tmp_path)
    report = told(path)
    assert "quantised" in report["quantised"]
    assert sum(layer["bytes"] for layer in report["layers"]) > 0
    assert "quantised" in ok(path).out
    base = write_checkpoint(tmp_path / "base", llama())
    refused(3, path, "--base", base, words=("quantised", "hint: "))
    refused(3, base, "--base", path, words=("quantised",))


def random_codes(path: Path, dtype: str, each: int) -> Path:
    """Four layers of 64 entries of a dtype, no two alike, none of which is NaN."""
    names = [f"model.layers.{i}.mlp.w.weight" for i in range(4)]
    offsets = [[at * each, (at + 1) * each] for at in range(4)]
    header = {
        name: {"dtype": dtype, "shape": [64], "data_offsets": ends} for name, ends in zip(names, offsets, strict=True)
    }
    return write_raw(path, header, bytes((7 * at + at // each) % 0x70 + 1 for at in range(4 * each)))


def test_8_bit_floats_are_looked_through(tmp_path: Path) -> None:
    """--check looks through 8-bit floats as through any others, and finds what they hold."""
    path = random_codes(tmp_path / "q.safetensors", "F8_E4M3", 64)
    (health,) = told(path, "--check")["health"]
    assert (health["tensors"], health["not_looked_into"]) == (4, {})
    assert "4 float tensors, nothing wrong in them\n" in ok(path, "--check").out
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")  # E4M3's NaN
    ran = run_lines("inspect", path, "--check", "--json")
    assert ran.code == 5
    assert ran.json["health"][0]["nonfinite"] == [{"tensor": "model.layers.3.mlp.w.weight", "nan": 1, "inf": 0}]


@pytest.mark.parametrize(("dtype", "each"), [("F4", 32), ("I8", 64), ("I32", 256)])
def test_what_is_not_looked_into_is_told(dtype: str, each: int, tmp_path: Path) -> None:
    """Of codes and integers nothing is said but that nobody looked: least of all that nothing is wrong."""
    path = random_codes(tmp_path / "q.safetensors", dtype, each)
    (health,) = told(path, "--check")["health"]
    assert (health["tensors"], health["not_looked_into"]) == (0, {dtype: 4})
    out = ok(path, "--check").out
    assert f"0 float tensors; not looked into: 4 {dtype}\n" in out
    assert "nothing wrong" not in out


def test_some_are_looked_into(tmp_path: Path) -> None:
    """Where floats stand beside integers both are told: what was looked through, and what was not."""
    path = write_checkpoint(tmp_path / "m", llama() | {"steps": torch.arange(3), "more": torch.arange(4).bool()})
    assert "15 float tensors, nothing wrong in them; not looked into: 1 BOOL, 1 I64\n" in ok(path, "--check").out


def pickled(tmp: Path) -> Path:
    torch.save(llama(), tmp / "m.pt")
    return tmp / "m.pt"


def adapter(tmp: Path) -> Path:
    write_checkpoint(tmp / "m", named("base_model.layers.0.lora_A.weight"), stem="adapter_model")
    return tmp / "m"


def pickles(tmp: Path) -> Path:
    (tmp / "m").mkdir()
    (tmp / "m" / "pytorch_model.bin").write_bytes(b"x" * 100)
    return tmp / "m"


def emptied(tmp: Path) -> Path:
    (tmp / "m").mkdir()
    return tmp / "m"


def cut(tmp: Path) -> Path:
    path = write_checkpoint(tmp / "m.safetensors", llama())
    os.truncate(path, path.stat().st_size - 1)
    return path


def beheaded(tmp: Path) -> Path:
    (tmp / "m.safetensors").write_bytes(b"\x10\0\0")
    return tmp / "m.safetensors"


def shardless(tmp: Path) -> Path:
    path = write_checkpoint(tmp / "m", llama(), shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    return path


def broken_config(tmp: Path) -> Path:
    path = write_checkpoint(tmp / "m", llama(), config={})
    (path / "config.json").write_text("{")
    return path


def prose(tmp: Path) -> Path:
    (tmp / "notes.txt").write_text("No weights at all, but a longer text.\n")
    return tmp / "notes.txt"


NO_MODEL = {
    "missing": (lambda tmp: tmp / "absent", "no such file"),
    "a pickle": (pickled, "safetensors"),
    "a folder of pickles": (pickles, "another format"),
    "an adapter": (adapter, "adapter"),
    "an empty folder": (emptied, "no .safetensors"),
    "cut short": (cut, "ends"),
    "three bytes": (beheaded, "m.safetensors"),
    "a shard missing": (shardless, "model-00002-of-00003.safetensors"),
    "a broken config": (broken_config, "config.json"),
    "text": (prose, "notes.txt"),
    "a device": (lambda _: Path("/dev/null"), "/dev/null"),
}


@pytest.mark.parametrize("mode", ["headers", "check", "against a base", "as a base"])
@pytest.mark.parametrize("what", NO_MODEL)
def test_what_is_no_model(what: str, mode: str, tmp_path: Path) -> None:
    """What cannot be read as a checkpoint is named, with exit code 3, however it is to be looked at."""
    build, word = NO_MODEL[what]
    path = build(tmp_path)
    good = write_checkpoint(tmp_path / "good", llama())
    before = snapshot(tmp_path)
    arguments = {
        "headers": [path],
        "check": [path, "--check", "--json"],
        "against a base": [path, "--base", good],
        "as a base": [good, "--base", path],
    }
    refused(3, *arguments[mode], words=(str(path), word))
    assert snapshot(tmp_path) == before


# --- coefficients ---


def linear(alpha: float, beta: float, layers: int = 4) -> list[float]:
    return [alpha + beta * i / (layers - 1) for i in range(layers - 1)] + [alpha + beta]


COEFFICIENTS = {
    # options: coefficients of 4 layers, before, behind
    "": (linear(0.1, 0.9), 0.1, 0.1),
    "--alpha 0.4": (linear(0.4, 0.6), 0.4, 0.4),
    "--alpha 0.4 --beta 0.2": (linear(0.4, 0.2), 0.4, 0.4),
    "--beta 0": ([0.1] * 4, 0.1, 0.1),
    "--alpha 0.4 --gamma 0.5": ([0.5 * c for c in linear(0.4, 0.6)], 0.2, 0.2),
    "--alpha=-1 --beta 3": (linear(-1, 3), -1, -1),
    "--schedule constant": ([1.0] * 4, 0.1, 0.1),
    "--schedule power:2 --alpha 0": ([0, 1 / 9, 4 / 9, 1], 0, 0),
    "--schedule 0.1,0.6,1": ([0.1, 0.1 / 3 + 2 * 0.6 / 3, 2 * 0.6 / 3 + 1 / 3, 1], 0.1, 0.1),
    "--schedule 0.3 --gamma 2": ([0.6] * 4, 0.6, 0.6),
    "--outside position": (linear(0.1, 0.9), 0.1, 1),
    "--outside position --gamma 0.5": ([0.5 * c for c in linear(0.1, 0.9)], 0.05, 0.5),
    "--outside base": (linear(0.1, 0.9), 0, 0),
    "--outside keep --gamma 0.5": ([0.5 * c for c in linear(0.1, 0.9)], 1, 1),
    "--stack layers=keep --gamma 0.5": ([1] * 4, 0.05, 0.05),
    "--stack model=base": ([0] * 4, 0.1, 0.1),
    "--stack model.layers=0.5,0.25": (linear(0.5, 0.25), 0.1, 0.1),
}


@pytest.mark.parametrize("options", COEFFICIENTS)
def test_coefficients(options: str, tmp_path: Path) -> None:
    """The coefficients of layers, of both sides and of every tensor follow from the options as the method says."""
    inside, before, after = COEFFICIENTS[options]
    report = told(write_checkpoint(tmp_path / "m", llama()), "--tensors", *options.split())
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(inside, rel=1e-14)
    assert report["outside"]["before"]["coefficient"] == pytest.approx(before)
    assert report["outside"]["after"]["coefficient"] == pytest.approx(after)
    (stack,) = report["stacks"]
    assert (stack["first"], stack["last"]) == pytest.approx((inside[0], inside[-1]))
    for row in report["map"]:
        expected = {None: inside[row["index"] or 0], "before": before, "after": after}[row["side"]]
        assert row["coefficient"] == pytest.approx(expected)


def test_a_filter_has_the_last_word(tmp_path: Path) -> None:
    """A filter decides the tensors it names, the first that matches, and changes no layer's coefficient."""
    path = write_checkpoint(tmp_path / "m", llama())
    report = told(path, "--tensors", "--filter", "norm=keep", "--filter", "layers.1=0.25", "--filter", "mlp=base")
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    for row in report["map"]:
        name = row["name"]
        if "norm" in name or "layers.1" in name or "mlp" in name:
            assert row["coefficient"] == (1 if "norm" in name else 0.25 if "layers.1" in name else 0)
    assert report["scaling"]["lines"]["filter"] == {"norm": "keep", "layers.1": 0.25, "mlp": "base"}
    assert "norm=keep" in ok(path, "--filter", "norm=keep").out


def test_two_stacks_of_their_own(tmp_path: Path) -> None:
    """--stack names a stack by any part of its name; the other stays as it was; one layer alone stands at the end."""
    model = named(*(f"encoder.block.{i}.w" for i in range(3)), "decoder.block.0.w", "decoder.block.0.v")
    path = write_checkpoint(tmp_path / "m.safetensors", model)
    report = told(path, "--stack", "encoder=0.5,0.25")
    found = {(layer["stack"], layer["index"]): layer["coefficient"] for layer in report["layers"]}
    assert found == {
        ("encoder.block", 0): 0.5,
        ("encoder.block", 1): 0.625,
        ("encoder.block", 2): 0.75,
        ("decoder.block", 0): 1.0,
    }


IMPOSSIBLE = {
    "--alpha nan": "alpha",
    "--beta inf": "beta",
    "--gamma=-inf": "gamma",
    "--alpha x": "alpha",
    "--schedule wavy": "schedule",
    "--schedule power:0": "schedule",
    "--schedule 1,2 --alpha 0.1": "alpha",
    "--outside inside": "outside",
    "--stack layers": "--stack",
    "--stack layers=a": "stack",
    "--stack layers=keep --stack layers=base": "--stack",
    "--filter x": "--filter",
    "--filter =1": "--filter",
    "--filter x=many": "filter",
    "--workers 0": "workers",
    "--device abacus": "abacus",
    "--stack nowhere=keep": "nowhere",
    "--stack layers=keep --stack model=base": "named already",
    "--filter nothing=keep": "nothing",
    "--layers (": "--layers",
    "--layers layers": "index",
}


@pytest.mark.parametrize("mode", [[], ["--check"], ["--base"]], ids=["headers", "check", "base"])
@pytest.mark.parametrize("options", IMPOSSIBLE)
def test_impossible_options(options: str, mode: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be meant is refused with exit code 2, before any weight is read."""
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the weights were read"))
    path = write_checkpoint(tmp_path / "m", llama())
    base = [write_checkpoint(tmp_path / "base", llama())] if mode == ["--base"] else []
    ran = run_lines("inspect", path, *mode, *base, *options.split())
    assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
    assert IMPOSSIBLE[options] in ran.err


@pytest.mark.parametrize(
    "options",
    [
        "--alpha nan",
        "--schedule wavy",
        "--schedule 1,2 --alpha 0.1",
        "--plot x.pdf",
        "--device abacus",
        "--stack layers",
        "--alpha auto",
        "--workers 0",
    ],
)
def test_impossible_options_come_first(options: str, tmp_path: Path) -> None:
    """What is impossible whatever the checkpoint holds is refused before one is looked for, or fetched from the Hub."""
    for mode in ([], ["--base", tmp_path / "absent2"]):
        if options == "--alpha auto" and mode:  # of one fine-tune it is 1
            options += " --schedule wavy"
        ran = run_lines("inspect", tmp_path / "absent", *mode, *options.split())
        assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
        assert "absent" not in ran.err


@pytest.mark.parametrize(
    "options",
    [
        "--alpha 1e308 --gamma 1e308",
        "--base --alpha 1e200",
        "--check --alpha 1e308 --gamma 1e308",
        "--alpha 3.5e38",
        "--filter norm=1e39",
        "--stack layers=0,1e300",
        "--schedule 0,-1e300",
    ],
)
def test_a_coefficient_beyond_all_bounds(options: str, tmp_path: Path) -> None:
    """A coefficient beyond float32, which lines edit refuses, is refused here, too, and is no traceback."""
    path, base = (write_checkpoint(tmp_path / side, llama()) for side in ("ft", "base"))
    arguments = options.replace("--base", f"--base {base}").split()
    refused(2, path, *arguments, "--json", words=("coefficient",))


def test_a_filter_on_nothing(tmp_path: Path) -> None:
    """A filter on a file without tensors matches none of them, and is refused as any such."""
    refused(2, write_checkpoint(tmp_path / "m.safetensors", {}), "--filter", "x=1", words=("matches none",))


# --- recipes ---


def test_an_edit_tells_its_recipe(tmp_path: Path) -> None:
    """An output of lines edit is shown with the recipe and coefficients that made it, unless options are given."""
    model = llama()
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    options = ["--alpha", "0.25", "--beta", "0.5", "--filter", "norm=keep", "--schedule", "power:2"]
    assert run_lines("edit", base, ft, "-o", tmp_path / "out", *options).code == 0
    report = told(tmp_path / "out", "--tensors")
    assert report["recipe"]["merge_method"] == "task_arithmetic"
    assert [os.path.basename(source["model"]) for source in report["recipe"]["models"]] == ["ft"]
    assert report["scaling"] == {"of": "output", "lines": report["recipe"]["lines"], "lambda": None, "alpha": 0.25}
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(
        [0.25 + 0.5 * (i / 3) ** 2 for i in range(4)]
    )
    assert all(row["coefficient"] == 1 for row in report["map"] if "norm" in row["name"])
    out = ok(tmp_path / "out").out
    assert re.search(r"^LiNeS +as in its recipe: alpha 0.25, beta 0.5, .*, filter norm=keep$", out, re.MULTILINE)
    assert "task_arithmetic of" in out

    given = told(tmp_path / "out", "--alpha", "0.5")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.5, 0.5)
    assert given["scaling"]["of"] == "asked"
    assert "filter" not in given["scaling"]["lines"]
    assert given["recipe"] == report["recipe"]


def test_a_merge_tells_its_recipe(tmp_path: Path) -> None:
    """An output of lines merge tells method, models, parameters, and the alpha that was measured."""
    model = llama()
    for at, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / name, tuned(model, at) if at else model)
    (tmp_path / "r.yaml").write_text(
        "merge_method: ties\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
        "parameters: {density: 0.5}\nlines: {alpha: auto, beta: 0.5}\n"
    )
    assert run_lines("merge", "--config", tmp_path / "r.yaml", "-o", tmp_path / "out").code == 0
    report = told(tmp_path / "out")
    assert report["recipe"]["merge_method"] == "ties"
    alpha = report["recipe"]["lines"]["alpha"]
    assert 0 < alpha < 2
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(linear(alpha, 0.5))
    out = ok(tmp_path / "out").out
    assert "ties of" in out
    assert "density 0.5" in out


def merged(tmp: Path, recipe: str, *options: object) -> Path:
    """An output of lines merge of the recipe, with base, a and b beside it."""
    for at, name in enumerate(("base", "a", "b")):
        write_checkpoint(tmp / name, tuned(llama(), at) if at else llama())
    (tmp / "r.yaml").write_text(recipe)
    ran = run_lines("merge", "--config", tmp / "r.yaml", "-o", tmp / "out", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return tmp / "out"


TWO = "base_model: base\nmodels: [{model: a}, {model: b}]\n"


def test_a_merge_without_lines(tmp_path: Path) -> None:
    """An output that was not scaled says so, and every coefficient is 1."""
    weighted = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
    path = merged(tmp_path, f"merge_method: linear\n{weighted}\n")
    report = told(path, "--tensors")
    assert report["scaling"] == {"of": "output", "lines": None, "lambda": None, "alpha": None}
    assert {row["coefficient"] for key in ("layers", "map") for row in report[key]} == {1}
    out = ok(path).out
    assert "linear of" in out
    assert re.search(r"^LiNeS +as in its recipe: none; every coefficient is lambda, 1$", out, re.MULTILINE)


@pytest.mark.parametrize(("lines", "alpha"), [("", 1.0), ("lines: {alpha: 0.4, beta: 0.5}\n", 0.4)])
def test_lambda_multiplies(lines: str, alpha: float, tmp_path: Path) -> None:
    """The coefficients of an output are those of its recipe times its lambda; without LiNeS lambda alone."""
    recipe = f"merge_method: task_arithmetic\n{TWO}parameters: {{lambda: 0.5}}\n{lines}"
    path = merged(tmp_path, recipe)
    report = told(path, "--tensors")
    inside = [0.5 * c for c in linear(alpha, 0.5 if lines else 0.0)]
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(inside)
    assert [report["outside"][side]["coefficient"] for side in ("before", "after")] == [0.5 * alpha] * 2
    for row in report["map"]:
        assert row["coefficient"] == pytest.approx(0.5 * alpha if row["index"] is None else inside[row["index"]])
    scaling = report["scaling"]
    assert (scaling["of"], scaling["lambda"], scaling["alpha"]) == ("output", 0.5, alpha if lines else None)
    assert (scaling["lines"] is None) == (not lines)
    words = "times lambda, 0.5" if lines else "none; every coefficient is lambda, 0.5"
    assert re.search(rf"^LiNeS +as in its recipe: .*{words}$", ok(path).out, re.MULTILINE)


def test_a_lambda_by_filter_and_depth(tmp_path: Path) -> None:
    """A lambda that depends on names and on depth decides each tensor's coefficient, and nothing breaks."""
    parameters = "{lambda: [{filter: mlp, value: 0.25}, {value: [0.1, 1.0]}]}"
    path = merged(tmp_path, f"merge_method: task_arithmetic\n{TWO}parameters: {parameters}\n")
    for row in told(path, "--tensors")["map"]:
        depth = 0.1 if row["index"] is None else 0.1 + 0.9 * row["index"] / 3
        assert row["coefficient"] == pytest.approx(0.25 if "mlp" in row["name"] else depth)
    assert ok(path).err == ""


DAMAGED = {
    "no YAML": "{",
    "empty": "",
    "a list": "- 1",
    "an unknown key": "base_model: b\nmodels: [{model: a}]\nsecret: 1\n",
    "not finite": "base_model: b\nmodels: [{model: a}]\nlines: {alpha: .nan}\n",
    "deep": "[" * 1200,
    "a tag": "!!python/object/apply:os.system ['echo owned']",
    "bytes": "\udcff\udcfe",
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_recipe(what: str, tmp_path: Path) -> None:
    """A recipe that cannot be read is a note, and the defaults hold."""
    path = write_checkpoint(tmp_path / "m", llama())
    (path / "lines_recipe.yaml").write_text(DAMAGED[what], encoding="utf-8", errors="surrogateescape")
    report = told(path)
    assert report["recipe"] is None
    assert any("recipe" in note for note in report["notes"])
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    assert "recipe" in ok(path).err


@pytest.mark.parametrize(
    "lines",
    [
        "{beta: 1, alpha: 0, filter: {nope: 1}}",
        "{beta: 1, alpha: 0, stacks: {nope: keep}}",
        "{beta: 1, alpha: 1.0e+39}",
        "{beta: 1, alpha: 0, layers: '('}",
    ],
)
def test_a_recipe_that_does_not_fit(lines: str, tmp_path: Path) -> None:
    """A recipe that says nothing usable of these weights (a stray file) is a note, and the defaults hold."""
    path = write_checkpoint(tmp_path / "m", llama())
    (path / "lines_recipe.yaml").write_text(f"base_model: /b\nmodels: [{{model: /a}}]\nlines: {lines}\n")
    report = told(path)
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.1, 0.9)
    assert report["scaling"]["of"] == "asked"
    (note,) = report["notes"]
    assert "its recipe" in note
    assert "its recipe" in ok(path).err


def test_an_alpha_that_was_never_measured(tmp_path: Path) -> None:
    """A recipe whose alpha is still auto gives coefficients that nobody knows: null, and - on the screen."""
    path = write_checkpoint(tmp_path / "m", llama())
    recipe = "base_model: /b\nmodels: [{model: /a}, {model: /c}]\nlines: {alpha: auto, beta: 0.5, filter: {mlp: 1}}\n"
    (path / "lines_recipe.yaml").write_text("merge_method: ties\nparameters: {density: 0.5}\n" + recipe)
    report = told(path, "--tensors")
    assert (report["scaling"]["of"], report["scaling"]["alpha"]) == ("output", None)
    assert {layer["coefficient"] for layer in report["layers"]} == {None}
    assert (report["stacks"][0]["first"], report["outside"]["before"]["coefficient"]) == (None, None)
    assert {row["coefficient"] for row in report["map"] if "mlp" not in row["name"]} == {None}
    assert {row["coefficient"] for row in report["map"] if "mlp" in row["name"]} == {1}
    out = ok(path, "--tensors", "--check").out
    assert "auto is to be measured" in out
    assert rows_of(out, "model.layers")[0][-1] == "-"
    (path / "lines_recipe.yaml").write_text(recipe)  # of a sum it is 1/N
    assert [layer["coefficient"] for layer in told(path)["layers"]] == linear(0.5, 0.5)


# --- nothing is loaded or read that need not be ---

LOADED = (
    "import sys\nfrom lines_cli.cli.app import main\n"
    "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
    "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
)


@pytest.mark.parametrize("options", [[], ["--json", "--tensors"], ["--full", "--schedule", "0.1,1"]])
def test_headers_load_no_torch(options: list[str], tmp_path: Path) -> None:
    """A checkpoint of a claimed terabyte is told from its header, without torch, numpy, matplotlib and the Hub."""
    each = 2**38
    header = {"model.layers.0.w": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 4 * each]}}
    path = write_raw(tmp_path / "m.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + 4 * each)
    except OSError:
        pytest.skip("no sparse file of that size here")
    ran = process(path, *options, program=LOADED)
    assert ran.returncode == 0, ran.stderr
    assert (b"1.1 TB" in ran.stdout) or (b'"bytes": 1099511627776' in ran.stdout)
    assert not {"torch", "numpy", "matplotlib", "huggingface_hub"} & set(ran.stderr.decode().split())


def test_headers_of_many_shards_are_quick(tmp_path: Path) -> None:
    """A thousand tensors in fifty shards take little time."""
    names = [f"model.layers.{i}.p{j}.weight" for i in range(50) for j in range(20)]
    path = write_checkpoint(tmp_path / "m", {name: torch.ones(1) for name in names}, shards=50)
    started = time.process_time()
    report = told(path)
    assert time.process_time() - started < 5
    assert (report["tensors"], len(report["files"]), report["stacks"][0]["layers"]) == (1000, 50, 50)


def test_several_need_a_base(tmp_path: Path) -> None:
    """Several checkpoints without a base are refused before any is opened."""
    refused(2, tmp_path / "absent", tmp_path / "absent2", words=("2 checkpoints", "--base"))


def test_none_at_all() -> None:
    """A command without a checkpoint is refused."""
    ran = run_lines("inspect")
    assert (ran.code, ran.out, ran.trace) == (2, "", "")


# --- the terminal ---


def rows_of(out: str, heading: str) -> list[list[str]]:
    """The rows of the table with the title `heading`, its own headings apart."""
    titles = [at for at, line in enumerate(out.splitlines()) if re.match(rf"(?:.*, )?{heading}(?:$|:)", line)]
    lines = out.splitlines()[titles[0] + 2 :]
    rows = []
    for line in lines:
        if not line.strip():
            break
        rows.append(line.split())
    return rows


@pytest.mark.parametrize("layers", [1, 12, 13, 126])
@pytest.mark.parametrize("tunes", [0, 1, 2])
def test_folding(layers: int, tunes: int, tmp_path: Path) -> None:
    """A stack shows at most 12 layers, the first and the last among them, and all of them with --full."""
    model = llama(layers)
    base = write_checkpoint(tmp_path / "base.safetensors", model)
    fts = [write_checkpoint(tmp_path / f"{at}.safetensors", tuned(model, at)) for at in range(tunes)]
    arguments = [*fts, "--base", base] if tunes else [base]
    for full in ([], ["--full"]):
        out = ok(*arguments, *full).out
        shown = [int(row[0]) for row in rows_of(out, "model.layers") if row[0].isdecimal()]
        assert shown == sorted(set(shown))
        assert (shown[0], shown[-1]) == (0, layers - 1)
        assert len(shown) == (layers if full else min(12, layers))
        assert ("--full shows all" in out) == (not full and layers > 12)
        if not full and layers > 12:
            gaps = {b - a for a, b in pairwise(shown)}
            assert max(gaps) - min(gaps) <= 1


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?[%x]?|-")


@pytest.mark.parametrize("tunes", [0, 1, 3, 8])
@pytest.mark.parametrize("flags", [[], ["--tensors"], ["--check", "--full"]], ids=["", "tensors", "check"])
def test_eighty_columns(tunes: int, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is no wider than 80 columns unless its numbers need that; a long first column is broken, no number is."""
    monkeypatch.chdir(tmp_path)
    model = llama(14)
    write_checkpoint(tmp_path / "Llama-3.1-8B", model)
    fts = [f"Llama-3.1-8B-Instruct-task-{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at))
    arguments = [*fts, "--base", "Llama-3.1-8B"] if tunes else ["Llama-3.1-8B"]
    ran = run_lines("inspect", *arguments, *flags)
    assert ran.code == 0, ran.trace
    for line in ran.out.splitlines():
        fact = re.match(r"[a-zA-Z]+ {2,}|1 file|\(|\d+   ", line)
        if len(line) > 80 and not fact:
            first, *cells = re.split(r" {2,}", line)
            assert len(first) <= 12, line
            assert cells
    rows = rows_of(ran.out, "model.layers")
    assert len(rows) == (14 if "--full" in flags else 12) + bool(tunes)
    numbers = {0: 5, 1: 7}.get(tunes, 2 + tunes)  # "704 B" counts as one
    for row in rows:
        assert len([cell for cell in row if NUMBER.fullmatch(cell)]) == numbers - 2 * (row[0] == "all"), row
    if "--tensors" in flags:
        *_, table = ran.out.split("\ntensors\n")
        starts = [line.split(" ")[0] for line in table.split("\n\n")[0].splitlines()[1:]]
        joined = "".join(starts)
        assert all(name in joined for name in model)


@pytest.mark.parametrize(("tunes", "columns"), [(8, 8), (9, 3)])
def test_many_fine_tunes(tunes: int, columns: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 8 fine-tunes a table tells the lowest, the mean and the highest, with --full a column for each."""
    monkeypatch.chdir(tmp_path)
    model = llama(3)
    write_checkpoint(tmp_path / "base", model)
    fts = [f"ft{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at, by=0.01 * (at + 1)))
    out = ok(*fts, "--base", "base").out
    assert ("lowest    mean  highest" in out) == (tunes > 8)
    report = told(*fts, "--base", "base")
    for at, row in enumerate(rows_of(out, "model.layers")[:3]):
        values = [tune["layers"][at]["relative_norm"] for tune in report["fine_tunes"]]
        if tunes > 8:
            values = [min(values), sum(values) / tunes, max(values)]
        assert len(row) == 2 + columns
        assert [float(cell[:-1]) for cell in row[2:]] == pytest.approx([100 * value for value in values], rel=2e-2)
    cosines = rows_of(out, "cosine similarity of the updates")
    assert [row[1] for row in cosines] == fts
    if tunes > 8:  # a model with itself does not count
        others = [
            [value for to, value in enumerate(row) if to != at] for at, row in enumerate(report["together"]["cosine"])
        ]
        expected = [[f"{v + 0.0:.3f}" for v in (min(o), sum(o) / len(o), max(o))] for o in others]
        assert [row[2:] for row in cosines] == expected
    full = ok(*fts, "--base", "base", "--full").out
    assert {len(row) for row in rows_of(full, "cosine similarity of the updates")} == {2 + tunes}
    assert {len(row) for row in rows_of(full, "model.layers")[:3]} == {2 + tunes}


@pytest.mark.parametrize(("tunes", "by"), [(8, 1e-7), (12, 1e-2)], ids=["8, tiny updates", "12"])
def test_no_number_is_cut(tunes: int, by: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many fine-tunes there are, a number stands on one line."""
    monkeypatch.chdir(tmp_path)
    model = llama(3)
    write_checkpoint(tmp_path / "base", model)
    fts = [f"ft{at}" for at in range(tunes)]
    for at, ft in enumerate(fts):
        write_checkpoint(tmp_path / ft, tuned(model, at, by=by))
    for row in rows_of(ok(*fts, "--base", "base").out, "model.layers"):
        assert all(cell.endswith("%") for cell in row[2:]), row


@pytest.mark.parametrize("env", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {}, {"TERM": "xterm-256color"}])
def test_no_escape_codes_in_a_pipe(env: dict[str, str], tmp_path: Path) -> None:
    """Piped output holds no escape codes, with colour forbidden or not."""
    path = write_checkpoint(tmp_path / "m", llama())
    ran = process(path, **env)
    assert ran.returncode == 0, ran.stderr
    assert b"\x1b" not in ran.stdout + ran.stderr
    assert "model.layers" in ran.stdout.decode()


@pytest.mark.parametrize("forced", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colour_on_a_terminal(forced: dict[str, str], tmp_path: Path) -> None:
    """On a terminal, too, NO_COLOR and TERM=dumb leave no colour."""
    import pty

    path = write_checkpoint(tmp_path / "m", llama())
    leader, follower = pty.openpty()
    command = [sys.executable, "-c", "from lines_cli.cli.app import main; main()", "inspect", str(path)]
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "FORCE_COLOR")}
    with subprocess.Popen(command, stdout=follower, stderr=follower, env=environment | forced) as running:
        os.close(follower)
        seen = b""
        while True:
            try:
                part = os.read(leader, 65536)
            except OSError:
                break
            if not part:
                break
            seen += part
    os.close(leader)
    assert running.returncode == 0
    assert not re.search(rb"\x1b\[[\d;]*[34]\d[\d;]*m", seen)
    if forced == {"TERM": "dumb"}:
        assert b"\x1b" not in seen


def test_an_ascii_stdout(tmp_path: Path) -> None:
    """Where stdout holds only ASCII, bars are drawn with #, and names are escaped."""
    path = write_checkpoint(tmp_path / "m.safetensors", {f"layers.{i}.gewicht_ü_权": torch.ones(2) for i in range(3)})
    for options in ([], ["--tensors"], ["--json", "--tensors"]):
        ran = process(path, *options, PYTHONIOENCODING="ascii", PYTHONUTF8="0")
        assert ran.returncode == 0, ran.stderr
        out = ran.stdout.decode("ascii")
        assert ("#" * 12 in out) == ("--json" not in options)
        assert ("\\xfc_" in out or "\\u00fc_" in out) == ("--tensors" in options)


def test_a_closed_pipe(tmp_path: Path) -> None:
    """`lines inspect ... | head` ends without a traceback."""
    path = write_checkpoint(tmp_path / "m", {f"layers.{i}.w{j}": torch.ones(1) for i in range(40) for j in range(80)})
    program = "import sys; from lines_cli.cli.app import main; main()"
    command = [sys.executable, "-c", program, "inspect", str(path), "--tensors"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.readline()
        running.stdout.close()
        err = running.stderr.read()
    assert b"Traceback" not in err


EVIL = {
    "escape": "\x1b[31mowned\x1b[0m",
    "bell, CR and C1": "a\rb\x07\x9b31m",
    "right to left": "a\u202eb\u2066c",
    "markup": "[red]x[/red][bold]",
    "broken markup": "[/]",
    "math": r"$\frac{1}{0}$",
    "script": "<script>alert(1)</script>\"'&amp;",
    "DEL and NUL": "a\x7f\0b",
    "very long": "x" * 3000,
    "braces": "{l}{s}{0}%s",
    "emoji": ":warning: 🎉",
}
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def evil_model(tmp: Path, evil: str, seed: int = 0) -> Path:
    """A file whose names, of a stack and of what lies outside, are as hostile as JSON lets them be."""
    names = [*(f"{evil}.layers.{i}.w" for i in range(3)), f"outside.{evil}", evil]
    header = {name: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, name in enumerate(names)}
    data = torch.randn(2 * len(names), generator=torch.Generator().manual_seed(seed)).numpy().tobytes()
    return write_raw(tmp / f"m{seed}.safetensors", header, data)


@pytest.mark.parametrize("what", EVIL)
def test_hostile_names(what: str, tmp_path: Path) -> None:
    """A tensor's name is told as text: it moves no cursor, sets no colour, and is the same name in the JSON."""
    evil = EVIL[what]
    base, ft = (evil_model(tmp_path, evil, seed) for seed in range(2))
    for arguments in ([base], [ft, "--base", base]):
        ran = ok(*arguments, "--tensors")
        assert not CONTROL.search(ran.out + ran.err)
        parsed = ok(*arguments, "--tensors", "--json")
        assert not CONTROL.search(parsed.out)
        assert {row["name"] for row in parsed.json["map"]} >= {evil, f"outside.{evil}"}
        assert [stack["name"] for stack in parsed.json["stacks"]] == [f"{evil}.layers"]
    if what in ("markup", "script", "braces"):
        assert evil in "".join(line.split(" ", 1)[0] for line in ok(base, "--tensors").out.splitlines())


@pytest.mark.parametrize("options", [["--tensors"], ["--check"], []], ids=["tensors", "check", "headers"])
def test_a_name_of_several_lines(options: list[str], tmp_path: Path) -> None:
    """A line break in a name makes no line of its own: it is escaped, as in messages."""
    forged = "model.layers.9.w                F32     9x9       9  attention  0.9"
    names = [f"a\n{forged}", *(f"b\n{forged}.layers.{i}.w" for i in range(2))]
    path = write_checkpoint(tmp_path / "m.safetensors", {name: torch.zeros(2) for name in names})
    out = run_lines("inspect", path, *options).out
    assert not [line for line in out.splitlines() if line.split()[:1] == ["model.layers.9.w"]]


def test_a_hostile_path(tmp_path: Path) -> None:
    """A checkpoint's path is told as harmlessly as its names, and a recipe's models are, too."""
    folder = tmp_path / "\x1b[31m[red]\udcff"
    path = write_checkpoint(folder, llama(), config={"quantization_config": {"quant_method": "\x1b[31m"}})
    (path / "lines_recipe.yaml").write_text('base_model: /b\nmodels: [{model: "/a\\e[31m\\n\\rerror: x"}]\n')
    ran = ok(path)
    assert not CONTROL.search(ran.out + ran.err)
    assert not CONTROL.search(ok(path, "--json").out)


def test_the_terminal_tells_what_json_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers in the tables are those of the JSON, rounded."""
    monkeypatch.chdir(tmp_path)
    model = llama(6)
    write_checkpoint(tmp_path / "base", model)
    for at in range(2):
        write_checkpoint(tmp_path / f"ft{at}", tuned(model, at + 1))
    report, out = told("ft0", "--base", "base"), ok("ft0", "--base", "base").out
    for row, layer in zip(rows_of(out, "model.layers"), report["layers"], strict=False):
        assert row[:2] == [str(layer["index"]), f"{layer['update_norm']:.4g}"]
        assert float(row[2][:-1]) == pytest.approx(100 * layer["relative_norm"], abs=0.006)
        most = max(layer["relative_norm"] for layer in report["layers"])
        bar = row.pop(3)  # in eighths of twelve characters
        assert 8 * len(bar) == pytest.approx(96 * layer["relative_norm"] / most, abs=8)
        assert float(row[3][:-1]) == pytest.approx(100 * layer["unchanged"], abs=0.06)
        assert row[4:7] == [f"{layer[key]:.4g}" for key in ("largest", "coefficient", "scaled_norm")]
    (tune,) = report["fine_tunes"]
    assert f"norm {tune['update_norm']:.4g}" in out
    assert f"{tune['largest']:.4g} in {tune['largest_in']}" in out
    report, out = told("ft0", "ft1", "--base", "base"), ok("ft0", "ft1", "--base", "base").out
    together = report["together"]
    assert f"norm {together['norm_of_sum']:.4g}, where the norms of all add up to {together['sum_of_norms']:.4g}" in out
    norms = [f"{together[key]:.4g}" for key in ("scaled_norm_of_sum", "scaled_sum_of_norms")]
    assert f"scaled   norm {norms[0]}, where the norms of all add up to {norms[1]}" in out
    assert f"1 ft0   1.000  {together['cosine'][0][1]:.3f}".replace("  -", " -") in out.replace("  -", " -")
    assert f"alpha {together['auto']['alpha']:.4g}" in out
    report, out = told("base"), ok("base").out
    assert f"{report['tensors']} tensors, {report['parameters']} parameters, 1.42 kB (F32)" in out.replace(
        f"{report['parameters'] / 1000:.3g} K", str(report["parameters"])
    ).replace(size(report["bytes"]), "1.42 kB")


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (999, "999"), (1000, "1 K"), (1_530_000_000, "1.53 B"), (999_499, "999 K")],
)
def test_counts_in_words(value: int, shown: str) -> None:
    """Parameters are told in three digits."""
    assert count(value) == shown


@pytest.mark.parametrize("value", [999_500, 999_999, 999_600_000, 999_999_999_999])
def test_just_below_the_next_unit(value: int) -> None:
    """What rounds up to a thousand of a unit is one of the next."""
    assert "e+" not in count(value) + size(value)
    assert count(value).startswith("1 ")


# --- the page that documents it ---


def documented() -> dict[str, tuple[str, str]]:
    """Key -> when it is there, and what is said of it."""
    page = DOCS.read_text(encoding="utf-8")
    section = page[page.index("## What `--json` prints") :].split("\n## ")[0]
    found = {}
    for keys, when, value in re.findall(r"^\| (`.+?) \| (.+?) \| (.+?) \|$", section, re.MULTILINE):
        found.update(dict.fromkeys(re.findall(r"`(\w+)`", keys), (when, value)))
    return found


@pytest.fixture(scope="module")
def modes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What --json prints, in every mode."""
    tmp = tmp_path_factory.mktemp("modes")
    model = llama()
    base = write_checkpoint(tmp / "base", model, config={"tie_word_embeddings": True})
    a, b = (write_checkpoint(tmp / f"ft{at}", tuned(model, at)) for at in range(2))
    return {
        "always": told(a),
        "--tensors": told(a, "--tensors"),
        "--base": told(a, "--base", base, "--tensors"),
        "several": told(a, b, "--base", base, "--tensors"),
        "--check": told(a, "--check"),
    }


def test_json_is_documented(modes: dict[str, Any]) -> None:
    """docs/inspecting.md names every key that --json prints, no other, and says when it is there."""
    described = documented()
    assert described.keys() == set().union(*modes.values())
    for mode, report in modes.items():
        for key, (when, _) in described.items():
            asked = {"always", "--tensors"} if mode == "--tensors" else {"always", "--base", "--tensors"}
            asked = {"always", "--check"} if mode == "--check" else {"always"} if mode == "always" else asked
            assert (key in report) == any(word in when for word in asked), (mode, key)


def test_nested_keys_are_documented(modes: dict[str, Any]) -> None:
    """The keys within each value are those that docs/inspecting.md lists, in every mode that has it."""
    described = documented()
    numbers = re.search(
        r"The numbers of an update are (.+?)(?:, all null|\.|;)", DOCS.read_text(encoding="utf-8"), re.DOTALL
    )
    update = set(re.findall(r"`(\w+)`", numbers[1]))
    assert len(update) == 7
    pair = {"cosine", "opposed", "disagreement", "norm_of_sum", "sum_of_norms"}
    pair |= {"scaled_cosine", "scaled_norm_of_sum", "scaled_sum_of_norms"}
    extra = {"fine_tunes": update, "together": pair}
    for mode, report in modes.items():
        for key, value in report.items():
            listed = re.search(r"`\{(.+?)\}`", described[key][1])
            item = (value[0] if isinstance(value, list) else value) if value else None
            if listed is None or not isinstance(item, dict):
                continue
            expected = set(listed[1].split(", ")) | extra.get(key, set())
            if key in ("stacks", "layers", "kinds", "outside", "map") and mode == "--base":
                expected |= update
            if key == "dtypes":
                item = next(iter(item.values()))
            assert item.keys() == expected, (mode, key)
    report = modes["--base"]
    for side in ("before", "after"):
        assert report["outside"][side].keys() == {"coefficient", "tensors", "parameters", "bytes"} | update
    (tune,) = report["fine_tunes"]
    assert tune["compared"].keys() == {"tensors", "parameters", "left_out"}
    for group in ("stacks", "layers", "kinds"):
        assert all(row.keys() >= update for row in tune[group])
    together = modes["several"]["together"]
    assert together["auto"].keys() == {"method", "alpha", "sum", "merged"}
    assert all(row.keys() >= pair for group in ("stacks", "layers", "kinds") for row in together[group])


# --- against a base ---


def flat(model: Mapping[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([model[name].double().flatten() for name in names])


def test_an_update_against_a_reference(tmp_path: Path) -> None:
    """Norms, shares and thirds of one update, whole, by layer and by kind, are those of plain torch in float64."""
    model = llama(7)
    ft = tuned(model, 1)
    base = write_checkpoint(tmp_path / "base", model, shards=2)
    report = told(write_checkpoint(tmp_path / "ft", ft, shards=3), "--base", base, "--filter", "mlp=0.5", "--tensors")
    (tune,) = report["fine_tunes"]
    scale = {row["name"]: row["coefficient"] for row in report["map"]}

    def check(row: Mapping[str, Any], names: list[str]) -> None:
        tau = flat(ft, names) - flat(model, names)
        scaled = torch.cat([scale[n] * (ft[n].double() - model[n].double()).flatten() for n in names])
        whole = flat(model, names).norm()
        expected = (tau.norm(), tau.norm() / whole, (tau == 0).double().mean(), tau.abs().max(), scaled.norm())
        keys = ("update_norm", "relative_norm", "unchanged", "largest", "scaled_norm")
        assert [row[key] for key in keys] == pytest.approx([float(e) for e in expected], rel=1e-12)
        assert row["scaled_relative_norm"] == pytest.approx(float(scaled.norm() / whole), rel=1e-12)

    check(tune, list(model))
    for layers in (tune["layers"], report["layers"]):
        for row in layers:
            check(row, [name for name in model if f"layers.{row['index']}." in name])
    kinds = {"attention": "self_attn", "mlp": "mlp", "norm": "norm", "embedding": "embed", "head": "lm_head"}
    for row in tune["kinds"]:
        check(row, [name for name in model if kinds[row["kind"]] in name])
    for row in report["map"]:
        check(row, [row["name"]])
    check(tune["outside"]["after"], ["model.norm.weight", "lm_head.weight"])
    squares = [row["update_norm"] ** 2 for row in tune["layers"]]
    assert tune["first_third"] == pytest.approx(sum(squares[:2]) / sum(squares))  # (l - 1/2) / 7 < 1/3: l = 1, 2
    assert tune["last_third"] == pytest.approx(sum(squares[-2:]) / sum(squares))
    scaled = [row["scaled_norm"] ** 2 for row in tune["layers"]]
    assert tune["scaled_last_third"] == pytest.approx(sum(scaled[-2:]) / sum(scaled))
    assert report["bytes_read"] == 2 * report["bytes"]


def test_several_against_a_reference(tmp_path: Path) -> None:
    """Cosines, opposed and disagreeing signs, norms of sums and alpha of three updates are those of plain torch."""
    model = llama()
    tunes = [tuned(model, at + 1, by=0.01 * (at + 1)) for at in range(3)]
    base = write_checkpoint(tmp_path / "base", model)
    paths = [write_checkpoint(tmp_path / f"ft{at}", ft) for at, ft in enumerate(tunes)]
    together = told(*paths, "--base", base)["together"]

    def check(row: Mapping[str, Any], names: list[str]) -> None:
        taus = torch.stack([flat(ft, names) - flat(model, names) for ft in tunes])
        for a, b in combinations(range(3), 2):
            cosine = float(taus[a] @ taus[b] / (taus[a].norm() * taus[b].norm()))
            assert row["cosine"][a][b] == row["cosine"][b][a] == pytest.approx(cosine, abs=1e-12)
            opposed = float((taus[a].sign() * taus[b].sign() < 0).double().mean())
            assert row["opposed"][a][b] == row["opposed"][b][a] == pytest.approx(opposed)
        disagree = ((taus > 0).any(0) & (taus < 0).any(0)).double().mean()
        assert row["disagreement"] == pytest.approx(float(disagree))
        assert row["norm_of_sum"] == pytest.approx(float(taus.sum(0).norm()))
        assert row["sum_of_norms"] == pytest.approx(float(taus.norm(dim=1).sum()))

    check(together, list(model))
    for row in together["layers"]:
        check(row, [name for name in model if f"layers.{row['index']}." in name])
    total = (sum(flat(ft, list(model)) for ft in tunes) - 3 * flat(model, list(model))).abs().sum()
    assert together["auto"]["sum"] == pytest.approx(float(total), rel=1e-9)
    assert together["auto"]["alpha"] == pytest.approx(1 / 3)


def test_a_fine_tune_that_is_the_base(tmp_path: Path) -> None:
    """Where nothing changed norms are 0, all is unchanged, and what is a share of nothing is null."""
    path = write_checkpoint(tmp_path / "a", llama())
    copy = write_checkpoint(tmp_path / "b", llama())
    (tune,) = told(copy, "--base", path)["fine_tunes"]
    keys = ("update_norm", "relative_norm", "unchanged", "largest", "largest_in", "first_third")
    assert [tune[key] for key in keys] == [0, 0, 1, 0, None, None]
    several = told(copy, write_checkpoint(tmp_path / "c", llama()), "--base", path)["together"]
    assert several["auto"]["alpha"] is None
    assert several["cosine"][0][1] is None
    assert several["scaled_norm_of_sum"] == several["norm_of_sum"] == 0
    assert re.search(r"^auto +unknown$", ok(copy, tmp_path / "c", "--base", path).out, re.MULTILINE)


def test_one_checkpoint_twice(tmp_path: Path) -> None:
    """A fine-tune named twice, or the base among the fine-tunes, is refused before anything is compared."""
    model = llama()
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    for given in ([ft, ft], [base], [ft, base], [base, ft]):
        refused(2, *given, "--base", base, words=("are one checkpoint", "hint: "))


@pytest.mark.parametrize("spelt", ["./m", "m/", "x/../m", "link"])
def test_one_checkpoint_by_another_way(spelt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its path is spelt, no checkpoint is compared with itself."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "m", llama())
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("m")
    refused(2, spelt, "--base", "m", words=("one checkpoint",))
    write_checkpoint(tmp_path / "base", llama(seed=1))
    refused(2, "m", spelt, "--base", "base", words=("one checkpoint",))
    (tmp_path / "r.yaml").write_text(f"base_model: m\nmodels: [{{model: {spelt}}}]\nlines: {{alpha: 0, beta: 1}}\n")
    refused(2, "--config", "r.yaml")


def test_strangers(tmp_path: Path) -> None:
    """Checkpoints without a tensor in common do not fit together, and no weight is read."""
    a = write_checkpoint(tmp_path / "a", llama())
    b = write_checkpoint(tmp_path / "b", named(*(f"transformer.h.{i}.c" for i in range(3))))
    refused(4, b, "--base", a, words=(str(a), str(b), "no tensor in common"))
    c = write_checkpoint(tmp_path / "c", llama())
    refused(4, c, b, "--base", a, words=("no tensor in common",))


def test_another_architecture(tmp_path: Path) -> None:
    """Of a fine-tune whose shapes and names differ what fits is compared, and the rest is named."""
    model = llama(3)
    other = llama(4) | {"model.layers.1.mlp.up_proj.weight": torch.ones(9, 9), "extra.bias": torch.ones(3)}
    del other["model.layers.2.self_attn.q_proj.weight"]
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", other)
    report = told(ft, "--base", base)
    why = {entry["tensor"]: entry["why"] for entry in report["not_compared"]}
    own = {"extra.bias", "model.layers.2.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert why.keys() == own | {name for name in other if "layers.3" in name}
    assert "[6, 4] and [9, 9]" in why["model.layers.1.mlp.up_proj.weight"]
    assert "extra.bias" in ok(ft, "--base", base, "--full").out
    (tune,) = report["fine_tunes"]
    assert tune["compared"]["tensors"] == len(model) - 2
    assert [layer["update_norm"] for layer in tune["layers"]][3] is None
    assert report["tensors"] == len(other)
    assert "-" in rows_of(ok(ft, "--base", base).out, "model.layers")[3]


def test_vocabularies_of_different_sizes(tmp_path: Path) -> None:
    """Over the rows that both have embeddings are compared, and a note says so."""
    model = llama()
    grown = dict(model) | {
        name: torch.cat([model[name] + 1, torch.ones(3, 4)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", grown)
    report = told(ft, "--base", base, "--tensors")
    rows = {row["name"]: row for row in report["map"]}
    assert rows["lm_head.weight"]["update_norm"] == pytest.approx(math.sqrt(40), rel=1e-6)
    assert any("lm_head.weight" in note and "13" in note for note in report["notes"])
    assert report["fine_tunes"][0]["compared"]["left_out"] == 0


def test_prefixes_and_ties(tmp_path: Path) -> None:
    """Names are paired through a prefix and through a tied head."""
    model = llama()
    bare = {name.removeprefix("model."): value for name, value in model.items() if name != "lm_head.weight"}
    base = write_checkpoint(tmp_path / "base", bare, config={"tie_word_embeddings": True})
    ft = write_checkpoint(tmp_path / "ft", model, config={"tie_word_embeddings": False})
    report = told(ft, "--base", base)
    assert report["fine_tunes"][0]["compared"]["tensors"] == len(model)
    assert any("model." in note for note in report["notes"])


def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    """A device that is not there is refused by name, as an impossible option."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = write_checkpoint(tmp_path / "m", llama())
    refused(2, path, "--check", "--device", "cuda", words=("cuda",))


def test_workers_make_no_difference(tmp_path: Path) -> None:
    """The same numbers, to the bit, whatever the number of workers."""
    model = {f"layers.{i}.w": torch.randn(300, 700) for i in range(3)}
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    other = write_checkpoint(tmp_path / "other", tuned(model, 2))
    found = [told(ft, other, "--base", base, "--workers", n) for n in (1, 2, 7)]
    for report in found:
        del report["seconds"]
    assert found[0] == found[1] == found[2]


def test_quiet(tmp_path: Path) -> None:
    """--quiet leaves what was asked for; there is no other output to leave out."""
    path = write_checkpoint(tmp_path / "m", llama())
    assert ok(path, "--quiet").out == ok(path).out


# --- health ---


def sound() -> dict[str, torch.Tensor]:
    """Four layers without anything to find."""
    return {name: value + 0.0 for name, value in llama().items()}


Q0, Q1, UP0 = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
)


def with_entry(name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = sound()
    model[name] = model[name].to(dtype)
    model[name].view(-1)[5] = value
    return model


FINDINGS: dict[str, tuple[dict[str, torch.Tensor], str, Any]] = {
    "NaN": (with_entry(Q0, NAN), "nonfinite", [{"tensor": Q0, "nan": 1, "inf": 0}]),
    "Inf": (with_entry(Q0, -INF), "nonfinite", [{"tensor": Q0, "nan": 0, "inf": 1}]),
    "half Inf": (with_entry(Q0, INF, torch.half), "nonfinite", [{"tensor": Q0, "nan": 0, "inf": 1}]),
    "beyond half": (with_entry(Q0, 65520.0), "beyond", [{"tensor": Q0, "largest": 65520.0, "dtypes": ["float16"]}]),
    "beyond bfloat16": (
        with_entry(Q0, -3.4e38),
        "beyond",
        [{"tensor": Q0, "largest": float(torch.tensor(3.4e38)), "dtypes": ["bfloat16", "float16"]}],
    ),
    "beyond float32": (
        with_entry(Q0, 1e300, torch.float64),
        "beyond",
        [{"tensor": Q0, "largest": 1e300, "dtypes": ["float32", "bfloat16", "float16"]}],
    ),
    "bfloat16 beyond half": (
        with_entry(Q0, 65536.0, torch.bfloat16),
        "beyond",
        [{"tensor": Q0, "largest": 65536.0, "dtypes": ["float16"]}],
    ),
    "zeros": (sound() | {UP0: torch.zeros(6, 4)}, "zero", [UP0]),
    "negative zeros": (sound() | {UP0: -torch.zeros(6, 4)}, "zero", [UP0]),
    "a duplicate": (sound() | {Q1: sound()[Q0]}, "same", [{"tensor": Q1, "as": Q0}]),
    "a constant matrix twice": (
        sound() | {Q1: torch.ones(4, 4), Q0: torch.ones(4, 4)},
        "same",
        [{"tensor": Q1, "as": Q0}],
    ),
}


@pytest.mark.parametrize("what", FINDINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_check_that_finds_something(what: str, shards: int, tmp_path: Path) -> None:
    """--check tells each kind of finding in the JSON and in the table, then ends with exit code 5 and a summary."""
    model, key, expected = FINDINGS[what]
    path = write_checkpoint(tmp_path / "m", model, shards=shards)
    ran = run_lines("inspect", path, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    (health,) = ran.json["health"]
    assert (health["tensors"], health["checkpoint"]) == (len(model), str(path))
    if key == "same":
        assert [{found["tensor"], found["as"]} for found in health["same"]] == [{Q0, Q1}]
    else:
        assert health[key] == expected
    assert not any(health[other] for other in {"nonfinite", "beyond", "zero", "same"} - {key})
    assert ran.err.startswith("error: ")
    assert str(path) in ran.err
    table = run_lines("inspect", path, "--check")
    assert (table.code, table.err) == (5, ran.err)
    assert "nothing wrong" not in table.out
    assert "nothing wrong" in table.out or (expected[0] if key == "zero" else expected[0]["tensor"]) in table.out


NOTHING: dict[str, dict[str, torch.Tensor]] = {
    "a sound model": sound(),
    "the largest that half holds": with_entry(Q0, 65519.0),
    "new norms": sound() | {f"model.layers.{i}.input_layernorm.weight": torch.ones(4) for i in range(4)},
    "integers": sound() | {"model.steps": torch.zeros(3, dtype=torch.int64), "model.more": torch.zeros(3).long()},
    "same values, other shape": sound() | {Q1: sound()[Q0].reshape(2, 8)},
    "same values, other dtype": sound() | {Q1: sound()[Q0].half().float(), Q0: sound()[Q0].half()},
    "a permutation": sound() | {Q1: sound()[Q0].flip(0)},
}


@pytest.mark.parametrize("what", NOTHING)
def test_a_check_that_finds_nothing(what: str, tmp_path: Path) -> None:
    """--check of a sound checkpoint says so and ends with 0."""
    path = write_checkpoint(tmp_path / "m", NOTHING[what])
    (health,) = told(path, "--check")["health"]
    assert not any(health[key] for key in ("nonfinite", "beyond", "zero", "same", "changed_files"))
    assert "nothing wrong" in ok(path, "--check").out


def test_a_stored_tie_is_no_duplicate(tmp_path: Path) -> None:
    """A head stored beside the embedding it is tied to is no finding; without the tie it is."""
    model = llama()
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    ok(write_checkpoint(tmp_path / "tied", model, config={"tie_word_embeddings": True}), "--check")
    loose = write_checkpoint(tmp_path / "loose", model, config={"tie_word_embeddings": False})
    assert run_lines("inspect", loose, "--check").code == 5


def test_health_with_a_base(tmp_path: Path) -> None:
    """With --base the health of every checkpoint is told, the base first, and only --check makes it an error."""
    model = llama()
    bad = {name: value.clone() for name, value in model.items()}
    bad[Q0].view(-1)[0] = NAN
    bad[Q0].view(-1)[1] = INF
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", bad)
    report = told(ft, "--base", base)
    assert [health["checkpoint"] for health in report["health"]] == [str(base), str(ft)]
    assert report["health"][1]["nonfinite"] == [{"tensor": Q0, "nan": 1, "inf": 1}]
    (tune,) = report["fine_tunes"]
    assert tune["compared"]["left_out"] == 2
    assert tune["compared"]["parameters"] == sum(v.numel() for v in model.values()) - 2
    assert tune["update_norm"] == 0
    assert "2 entries that are not finite left out" in ok(ft, "--base", base).out
    ran = run_lines("inspect", ft, "--base", base, "--check", "--json")
    assert ran.code == 5
    assert ran.json["fine_tunes"] == report["fine_tunes"]
    assert str(ft) in ran.err
    assert str(base) not in ran.err.replace(str(ft), "")


def test_many_findings_are_folded(tmp_path: Path) -> None:
    """Of many findings some are shown, with how many more there are; all with --full, and in the JSON."""
    path = write_checkpoint(tmp_path / "m", {f"layers.{i}.w": torch.zeros(3) for i in range(30)})
    out = run_lines("inspect", path, "--check").out
    assert "22 more (--full)" in out
    assert run_lines("inspect", path, "--check", "--full").out.count(".w") == 30
    assert len(run_lines("inspect", path, "--check", "--json").json["health"][0]["zero"]) == 30


def test_float64_at_its_limit(tmp_path: Path) -> None:
    """Norms beyond float64 are null, not a traceback and not Infinity."""
    model = {f"layers.{i}.w": torch.full((4,), 1e200 * (i + 1), dtype=torch.float64) for i in range(3)}
    base = write_checkpoint(tmp_path / "base", model)
    fts = [
        write_checkpoint(tmp_path / f"ft{at}", {name: value * -(at + 2.0) for name, value in model.items()})
        for at in range(2)
    ]
    assert told(fts[0], "--base", base)["fine_tunes"][0]["update_norm"] is None
    assert told(*fts, "--base", base)["together"]["norm_of_sum"] is None
    ok(*fts, "--base", base)


def test_nothing_to_compare(tmp_path: Path) -> None:
    """Where the only tensors in common hold whole numbers, or have other shapes, there is nothing to compare."""
    whole, other = torch.arange(3), torch.ones(2, 3)
    for at, values in enumerate([(whole, whole, whole), (other, other.T.contiguous(), torch.ones(3, 3))]):
        base, *fts = (
            write_checkpoint(tmp_path / f"{at}{name}", {f"layers.{i}.w": value.clone() for i in range(2)})
            for name, value in zip("abc", values, strict=True)
        )
        refused(4, fts[0], "--base", base, words=("nothing can be compared", str(base), str(fts[0])))
        refused(4, *fts, "--base", base, words=("nothing can be compared",))


def test_nothing_in_what_is_compared(tmp_path: Path) -> None:
    """Tensors without entries are compared, which tells nothing, and nothing fails."""
    path, copy, third = (
        write_checkpoint(tmp_path / name, {f"layers.{i}.w": torch.zeros(0) for i in range(2)}) for name in "abc"
    )
    (tune,) = told(copy, "--base", path)["fine_tunes"]
    assert (tune["update_norm"], tune["scaled_norm"], tune["compared"]["parameters"]) == (None, None, 0)
    ok(copy, "--base", path)
    together = told(copy, third, "--base", path)["together"]
    assert (together["cosine"][0][1], together["norm_of_sum"], together["disagreement"]) == (None, None, None)
    ok(copy, third, "--base", path)


# --- files that are held against their record ---


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


@pytest.fixture
def output(outputs: Path, tmp_path: Path) -> Path:
    """An output of lines edit, to be damaged."""
    return Path(shutil.copytree(outputs / "edit", tmp_path / "edit"))


def changed(path: Path) -> dict[str, str]:
    """The files that --check finds to be others, of a checkpoint that is whole otherwise."""
    ran = run_lines("inspect", path, "--check", "--json")
    (health,) = ran.json["health"]
    assert (ran.code, ran.trace) == (5 if health["changed_files"] else 0, "")
    assert not any(health[key] for key in ("nonfinite", "beyond", "zero", "same"))
    table = run_lines("inspect", path, "--check")
    assert (table.code, table.err) == (ran.code, ran.err)
    for name, how in health["changed_files"].items():
        assert re.search(rf"^(changed| {{7}})   {name}: {re.escape(how)[:40]}", table.out, re.MULTILINE)
    number = len(health["changed_files"])
    if number:
        assert f"{path}: files that are not as lines wrote them: {number}\n" in ran.err
        assert "nothing wrong" not in table.out
    return dict(health["changed_files"])


SHARDS = [f"model-0000{at}-of-00002.safetensors" for at in (1, 2)]


@pytest.mark.parametrize("which", ["edit", "out"])
def test_an_untouched_output_passes(which: str, outputs: Path) -> None:
    """All files of an output of edit and of merge are as the recipe recorded them; --check says how many that are."""
    (health,) = told(outputs / which, "--check")["health"]
    assert (health["recorded_files"], health["changed_files"]) == (5, {})
    names = {file.name for file in (outputs / which).iterdir()}
    assert names == {*SHARDS, "model.safetensors.index.json", "config.json", "tokenizer.json"} | {
        "README.md",
        "lines_recipe.yaml",
    }
    assert "15 float tensors and 5 files, nothing wrong in them\n" in ok(outputs / which, "--check").out
    sides = told(outputs / which, "--base", outputs / "base", "--check")["health"]
    assert [(side["recorded_files"], side["changed_files"]) for side in sides] == [(None, {}), (5, {})]


def test_without_check_no_file_is_held_against_its_record(output: Path, outputs: Path) -> None:
    """Without --check nothing is told of files, also where all weights are read."""
    (output / "tokenizer.json").unlink()
    for side in told(output, "--base", outputs / "base")["health"]:
        assert (side["recorded_files"], side["changed_files"]) == (None, {})
    ok(output)


@pytest.mark.parametrize("shard", SHARDS)
def test_a_flipped_bit(shard: str, output: Path) -> None:
    """One bit of a weight that is another is told, and the file it is in; the report is printed."""
    content = bytearray((output / shard).read_bytes())
    content[-5] ^= 1
    (output / shard).write_bytes(content)
    found = changed(output)
    assert list(found) == [shard]
    assert re.fullmatch(r"holds sha256-tree-4MiB:\w{64}, sha256-tree-4MiB:\w{64} was written", found[shard])


def test_every_file_is_told(output: Path, outputs: Path) -> None:
    """An edited config, a tokenizer that is gone, and an index that is a folder: each is told, with how it differs."""
    (output / "config.json").write_text('{"model_type": "llama"}')
    (output / "tokenizer.json").unlink()
    found = changed(output)
    assert set(found) == {"config.json", "tokenizer.json"}
    assert re.fullmatch(r"holds 23 bytes, but [\d,]+ were written", found["config.json"])
    assert found["tokenizer.json"] == "is missing"
    (output / "tokenizer.json").mkdir()
    assert changed(output)["tokenizer.json"] == "is not a file"
    ran = run_lines("inspect", output, "--base", outputs / "base", "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    assert [set(side["changed_files"]) for side in ran.json["health"]] == [set(), {"config.json", "tokenizer.json"}]
    ran = run_lines("inspect", outputs / "a", "--base", output, "--check", "--json")
    assert [set(side["changed_files"]) for side in ran.json["health"]] == [{"config.json", "tokenizer.json"}, set()]


def test_the_same_size_and_another_content(output: Path) -> None:
    """A file that is as long as it was and holds something else is told."""
    (output / "tokenizer.json").write_text("[]")
    assert list(changed(output)) == ["tokenizer.json"]


@pytest.mark.parametrize("shard", SHARDS)
def test_a_shard_cut_short(shard: str, output: Path) -> None:
    """A shard that ends early is no checkpoint, with or without --check."""
    os.truncate(output / shard, (output / shard).stat().st_size - 4)
    for flags in ([], ["--check"]):
        refused(3, output, *flags, words=(shard, "ends at"))
    os.truncate(output / shard, 20)
    refused(3, output, "--check", words=(shard,))
    (output / shard).unlink()
    refused(3, output, "--check", words=(shard,))


def test_what_people_may_do(output: Path) -> None:
    """A file more, an edited model card, another place, and a link for a file: none of it is told."""
    (output / "extra.txt").write_text("x")
    (output / "README.md").write_text("Mine.")
    (output / "tokenizer.json").rename(output.parent / "elsewhere.json")
    (output / "tokenizer.json").symlink_to("../elsewhere.json")
    assert changed(output) == {}
    moved = output.rename(output.parent / "another name")
    assert changed(moved) == {}
    (moved / "README.md").unlink()
    assert changed(moved) == {}


@pytest.mark.parametrize("what", [what for what in DAMAGED if what != "deep"])
def test_a_damaged_record(what: str, output: Path) -> None:
    """A recipe that cannot be read holds no record: that is told of it, and no traceback."""
    (output / "lines_recipe.yaml").write_text(DAMAGED[what], encoding="utf-8", errors="surrogateescape")
    ran = run_lines("inspect", output, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    (health,) = ran.json["health"]
    assert list(health["changed_files"]) == ["lines_recipe.yaml"]
    assert health["changed_files"]["lines_recipe.yaml"].startswith("cannot be read: ")
    table = run_lines("inspect", output, "--check")
    assert re.search(r"^changed +lines_recipe.yaml: cannot be read: ", table.out, re.MULTILINE)
    assert not CONTROL.search(table.out + table.err)


def test_a_recipe_without_a_record(output: Path) -> None:
    """A recipe of an older lines recorded nothing, and one that is gone says nothing; both pass."""
    recipe = output / "lines_recipe.yaml"
    recipe.write_text(recipe.read_text().split("# What was read")[0])
    for _ in range(2):
        (health,) = told(output, "--check")["health"]
        assert not health["recorded_files"]
        assert health["changed_files"] == {}
        assert "15 float tensors, nothing wrong in them\n" in ok(output, "--check").out
        recipe.unlink(missing_ok=True)


@pytest.mark.parametrize(
    "name", ["../a/tokenizer.json", "/etc/passwd", "x/../../a/tokenizer.json", "..", "\x1b[31m/../.."]
)
def test_a_record_that_leads_out(name: str, output: Path) -> None:
    """A stranger's recipe whose file names lead out of the folder is refused, and nothing out there is told."""
    recipe = output / "lines_recipe.yaml"
    text = recipe.read_text().replace("  tokenizer.json:\n", f"  {json.dumps(name)}:\n")
    recipe.write_text(text)
    ran = refused(3, output, "--check", words=("outside the folder", str(output)))
    assert "sha256" not in ran.err
    assert not CONTROL.search(ran.err)
    ok(output)  # nobody looks


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("sha256-tree-4MiB:", "md5:", "cannot be compared"),
        ("sha256-tree-4MiB:", "sha256-tree-4MiB:\x1b[31m\n", "holds sha256"),
        ("sha256-tree-4MiB:", "", "cannot be compared"),
    ],
)
def test_hostile_digests(old: str, new: str, words: str, output: Path) -> None:
    """A digest is a stranger's text: another kind is told as such, and it steers no terminal."""
    recipe = yaml.safe_load((output / "lines_recipe.yaml").read_text())
    record = recipe["files"]["tokenizer.json"]
    record["digest"] = record["digest"].replace(old, new)
    (output / "lines_recipe.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("inspect", output, "--check")
    assert (ran.code, ran.trace) == (5, "")
    assert re.search(rf"^changed +tokenizer.json: {words}.*$", ran.out, re.MULTILINE)
    assert not CONTROL.search(ran.out + ran.err)


@pytest.mark.parametrize(
    "record", ["{bytes: -1, digest: x}", "{bytes: 1}", "{digest: x}", "[]", "1", "{bytes: x, digest: y}"]
)
def test_records_that_are_none(record: str, output: Path) -> None:
    """A record that lines would not write is a recipe that cannot be read."""
    recipe = output / "lines_recipe.yaml"
    head = recipe.read_text().split("files:\n")[0]
    recipe.write_text(f"{head}files:\n  tokenizer.json: {record}\n")
    ran = run_lines("inspect", output, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    assert list(ran.json["health"][0]["changed_files"]) == ["lines_recipe.yaml"]


# --- a merge that is planned ---


@pytest.mark.parametrize(
    "extra",
    [
        ["{a}"],
        ["--base", "{base}"],
        ["--alpha", "0.1"],
        ["--beta", "0"],
        ["--gamma", "1"],
        ["--schedule", "constant"],
        ["--outside", "keep"],
        ["--stack", "layers=keep"],
        ["--filter", "norm=keep"],
        ["--layers", r"(?P<index>\d+)"],
    ],
)
def test_a_recipe_says_it_all(extra: list[str], outputs: Path) -> None:
    """--config goes with no checkpoint, no base and no scaling of one's own."""
    named = [word.format(a=outputs / "a", base=outputs / "base") if word[0] == "{" else word for word in extra]
    refused(2, "--config", outputs / "r.yaml", *named, words=("--config", "hint: "))
    refused(2, "--config", outputs / "absent.yaml", *named)  # before the recipe is opened
    assert "absent.yaml" not in run_lines("inspect", "--config", outputs / "absent.yaml", *named).err


def test_nothing_to_inspect() -> None:
    """Without a checkpoint and a recipe there is nothing to do, whatever else is said."""
    for options in ([], ["--json"], ["--check"], ["--base", "absent"], ["--alpha", "0.1"]):
        refused(2, *options, words=("nothing to inspect", "--config"))


BAD_RECIPES = {
    "absent": None,
    "no base": "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
    "no YAML": "{",
    "unknown key": f"{TWO}lines: {{alpha: 0, beta: 1}}\nsecret: 1\n",
    "one model twice": "base_model: base\nmodels: [{model: a}, {model: ./a}]\n",
    "a filter of nothing": f"{TWO}lines: {{alpha: 0, beta: 1, filter: {{nope: 1}}}}\n",
    "beyond float32": f"{TWO}lines: {{alpha: 1.0e+39, beta: 1}}\n",
}


@pytest.mark.parametrize("what", BAD_RECIPES)
def test_a_recipe_that_cannot_be(what: str, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recipe that no merge could follow is refused with exit code 2, before any weight is read."""
    monkeypatch.setattr(comparison, "compare", lambda *_, **__: pytest.fail("the weights were read"))
    for name in ("base", "a", "b"):
        (tmp_path / name).symlink_to(outputs / name)
    text = BAD_RECIPES[what]
    if text is not None:
        (tmp_path / "r.yaml").write_text(text)
    ran = run_lines("inspect", "--config", tmp_path / "r.yaml")
    assert (ran.code, ran.out, ran.trace) == (2, "", ""), ran.trace or ran.err
    assert ran.err.startswith("error: ")


def recipe_beside(outputs: Path, name: str, text: str) -> Path:
    (outputs / name).write_text(text)
    return outputs / name


def test_a_planned_merge_tells_its_alpha(outputs: Path) -> None:
    """--config tells where the coefficients come from, what auto is, and the same as the merge that is then made."""
    ran = ok("--config", outputs / "r.yaml", "--tensors")
    report = told("--config", outputs / "r.yaml", "--tensors")
    recipe = told(outputs / "out")["recipe"]
    alpha = report["together"]["auto"]["alpha"]
    assert alpha == recipe["lines"]["alpha"]
    assert report["scaling"] == {"of": "merge", "lines": report["merge"]["lines"], "lambda": None, "alpha": alpha}
    assert report["scaling"]["lines"]["alpha"] == "auto"
    assert [layer["coefficient"] for layer in report["layers"]] == pytest.approx(linear(alpha, 0.5))
    assert re.search(
        rf"^LiNeS +as in the recipe: alpha auto, beta 0.5, .*; auto is {alpha:.4g}$", ran.out, re.MULTILINE
    )
    assert re.search(rf"^auto +alpha {alpha:.4g} = 1/2 \* .*, the L1 norms of .* ties merges$", ran.out, re.MULTILINE)
    assert [os.path.basename(tune["model"]) for tune in report["fine_tunes"]] == ["a", "b"]
    assert os.path.basename(report["base"]) == "base"
    for tensor in report["map"]:
        expected = alpha if tensor["index"] is None else alpha + 0.5 * tensor["index"] / 3
        assert tensor["coefficient"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("recipe", "alpha", "words"),
    [
        (f"{TWO}lines: {{alpha: auto, beta: 0.5}}\n", 0.5, "alpha auto, beta 0.5, .*; auto is 0.5$"),
        (f"{TWO}lines: {{alpha: 0.3, beta: 0.5}}\n", 0.3, "alpha 0.3, beta 0.5, .*outside alpha$"),
        (
            f"{TWO}parameters: {{lambda: 0.5}}\nlines: {{alpha: 0.3, beta: 0.5}}\n",
            0.15,
            "alpha 0.3, beta 0.5, .*; times lambda, 0.5$",
        ),
        (f"{TWO}parameters: {{lambda: 0.3}}\n", 0.3, "none; every coefficient is lambda, 0.3$"),
        (TWO, 1.0, "none; every coefficient is lambda, 1$"),
        ("base_model: base\nmodels: [{model: a}]\nlines: {alpha: 0.2, beta: 0.5}\n", 0.2, "alpha 0.2, beta 0.5, "),
    ],
)
def test_where_coefficients_come_from(recipe: str, alpha: float, words: str, outputs: Path) -> None:
    """The text says that they are the recipe's, and what they are."""
    path = recipe_beside(outputs, "other.yaml", recipe)
    assert re.search(rf"^LiNeS +as in the recipe: {words}", ok("--config", path).out, re.MULTILINE)
    report = told("--config", path)
    assert report["layers"][0]["coefficient"] == pytest.approx(alpha)
    assert report["fine_tunes"][0]["layers"][0]["coefficient"] == pytest.approx(alpha)


def test_the_default_of_several(outputs: Path) -> None:
    """Of several fine-tunes the coefficients are those of alpha auto, 1/N, and beta 0.5; of one an edit's."""
    base = ["--base", outputs / "base"]
    report = told(outputs / "a", outputs / "b", *base)
    assert [layer["coefficient"] for layer in report["layers"]] == linear(0.5, 0.5)
    assert (report["scaling"]["of"], report["scaling"]["alpha"]) == ("asked", 0.5)
    assert "auto is 0.5" in ok(outputs / "a", outputs / "b", *base).out
    assert [layer["coefficient"] for layer in told(outputs / "a", *base)["layers"]] == linear(0.1, 0.9)
    given = told(outputs / "a", outputs / "b", *base, "--alpha", "0.2")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.2, 0.8)
    given = told(outputs / "a", outputs / "b", *base, "--beta", "0.25")
    assert [layer["coefficient"] for layer in given["layers"]] == linear(0.5, 0.25)


def test_bars_do_not_disturb(outputs: Path) -> None:
    """On a terminal a bar is drawn for each pass, on stderr alone; --quiet draws none; the report is the same."""
    import pty

    program = (
        "import sys\nfrom lines_cli.cli.app import app\n"
        "for flags in ([], ['--quiet']):\n"
        "    app(['inspect', '--config', 'r.yaml', *flags], standalone_mode=False)\n"
        "    print(end='\\f', flush=True)\n"
        "    print(end='\\f', file=sys.stderr, flush=True)\n"
    )
    leader, follower = pty.openpty()
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=follower,
        cwd=outputs,
        env=environment | {"TERM": "xterm-256color"},
    ) as running:
        os.close(follower)
        told, drawn = running.stdout.read(), b""
        with suppress(OSError):
            while part := os.read(leader, 65536):
                drawn += part
    os.close(leader)
    assert running.returncode == 0
    out, quiet, _ = told.split(b"\f")
    seen, silent, _ = drawn.split(b"\f")
    assert b"comparing" in seen
    assert b"measuring" in seen or seen.count(b"\x1b[?25l") > 1
    assert b"\x1b" not in out
    assert (quiet, b"comparing" in silent) == (out, False)
    assert out.decode() == ok("--config", outputs / "r.yaml").out.replace(f"{outputs}/", "./")


def test_bars_have_the_scale_of_their_table(tmp_path: Path) -> None:
    """The longest bar of a table fills its column, and no other does, however much larger other tables' values are."""
    base = {f"h.{i}.{part}": torch.ones(4) for i in range(2) for part in ("attn.w", "mlp.w")} | {
        "wte.weight": torch.ones(4)
    }
    grown = {"h.0.attn.w": 1.01, "h.0.mlp.w": 1.0, "h.1.attn.w": 1.02, "h.1.mlp.w": 1.0, "wte.weight": 3.0}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", {name: tensor * grown[name] for name, tensor in base.items()})
    lines = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base").out.splitlines()
    bars = {line.split()[0]: line.count("█") for line in lines if "%" in line and "norm" not in line}
    assert bars["1"] == bars["embedding"] == bars["before"] == 12
    assert bars["0"] == 6
    assert bars["attention"] == bars["mlp"] == 0
