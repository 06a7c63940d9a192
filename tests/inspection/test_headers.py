"""What `lines inspect` finds in headers: tensors, names, stacks, ties, quantised weights; and what is no model."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from support.files import snapshot, write_checkpoint, write_raw
from support.inspecting import llama, named, ok, refused, rows_of, told, tuned
from support.run import run_lines

HEADERS_ONLY = "schema lines checkpoint base tensors parameters bytes files dtypes stacks layers outside".split()
HEADERS_ONLY += "components kinds tied".split()
HEADERS_ONLY += "quantised adapter stored_as recipe scaling notes".split()


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
    torch.save(torch.nn.Linear(2, 2), tmp / "m.pt")
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
    "a pickled module": (pickled, "whole pickled module"),
    "a folder with no weights of torch's": (pickles, "torch.save did not write it"),
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


# --- nothing is loaded or read that need not be ---

LOADED = (
    "import sys\nfrom lines_cli.cli.app import main\n"
    "try: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
    "print(*sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--full", "--schedule", "0.1,1"],
        *(pytest.param(o, marks=pytest.mark.slow) for o in ([], ["--json", "--tensors"])),
    ],
)
def test_headers_load_no_torch(options: list[str], tmp_path: Path) -> None:
    """A checkpoint of a claimed terabyte is told from its header, without torch, numpy, matplotlib and the Hub."""
    each = 2**38
    header = {"model.layers.0.w": {"dtype": "F32", "shape": [2**19, 2**19], "data_offsets": [0, 4 * each]}}
    path = write_raw(tmp_path / "m.safetensors", header)
    try:
        os.truncate(path, path.stat().st_size + 4 * each)
    except OSError:
        pytest.skip("no sparse file of that size here")
    command = [sys.executable, "-c", LOADED, "inspect", str(path), *options]
    ran = subprocess.run(command, capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (b"1.1 TB" in ran.stdout) or (b'"bytes": 1099511627776' in ran.stdout)
    assert not {"torch", "numpy", "matplotlib", "huggingface_hub"} & set(ran.stderr.decode().split())


@pytest.mark.slow
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
