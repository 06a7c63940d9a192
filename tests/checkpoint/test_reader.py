"""Opening checkpoints: files, folders, shards, and everything that looks like one and is not."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lines_cli.checkpoint.header import Known
from lines_cli.checkpoint.reader import Checkpoint, gc_paused, open_checkpoint
from lines_cli.errors import CheckpointError, LinesError, UnsupportedError
from support.files import write_checkpoint, write_raw
from support.run import Ran, run_lines


def small() -> dict[str, torch.Tensor]:
    return {
        "layers.1.w": torch.arange(6.0).view(2, 3).bfloat16(),
        "layers.0.w": torch.arange(6.0, 12.0).view(2, 3),
        "norm": torch.ones(3).half(),
        "steps": torch.tensor(7),
        "mask": torch.tensor([True, False, True]),
        "none": torch.zeros(0, 4),
    }


def test_the_garbage_collector_is_held_back_and_no_longer() -> None:
    """It is as it was afterwards: enabled or not, and also where something was refused."""
    assert gc.isenabled()
    for enabled in (True, False):
        (gc.enable if enabled else gc.disable)()
        try:
            with gc_paused():
                assert not gc.isenabled()
            assert gc.isenabled() == enabled
            with pytest.raises(CheckpointError):
                open_checkpoint(Path("absent"))
            assert gc.isenabled() == enabled
        finally:
            gc.enable()


def test_headers_that_are_the_same_are_shared(tmp_path: Path) -> None:
    """Of two files with one header each holds its own bytes; one that ends too early is refused all the same."""
    twin = {name: torch.zeros_like(tensor) for name, tensor in small().items()}
    paths = [write_checkpoint(tmp_path / f"{i}.safetensors", tensors) for i, tensors in enumerate((small(), twin))]
    known: Known = {}
    ours, other = (open_checkpoint(path, known=known) for path in paths)
    assert_holds(ours, small())
    assert_holds(other, twin)
    assert len(known) == 1
    assert all(ours.tensors[name].info is other.tensors[name].info for name in twin)
    paths[1].write_bytes(paths[1].read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=str(paths[1])):
        open_checkpoint(paths[1], known=known)


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    """Dtype, shape and the bytes at the offset are the tensor's own."""
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, stored in checkpoint.tensors.items():
        raw = Path(checkpoint.where(name)).read_bytes()[stored.info.offset :][: stored.info.nbytes]
        flat = tensors[name].flatten()
        assert raw == bytes(flat.view(torch.uint8).tolist())
        assert stored.info.shape == tuple(tensors[name].shape)


# --- what can be opened ---


@pytest.mark.parametrize("shards", [1, 2, 5])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model", "open_clip_model", "custom"])
def test_opens_a_folder(stem: str, shards: int, tmp_path: Path) -> None:
    """A folder's tensors are found in one file or in shards, with its config and the stem of its weight files."""
    path = write_checkpoint(tmp_path / "ckpt", small(), shards=shards, stem=stem, config={"model_type": "tiny"})
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, small())
    assert (checkpoint.stem, len(checkpoint.files), checkpoint.folder) == (stem, shards, path)
    assert checkpoint.config == {"model_type": "tiny"}
    assert checkpoint.nbytes == 12 + 24 + 6 + 8 + 3


@pytest.mark.parametrize(("name", "stem"), [("x", "model"), ("model", "model"), ("open_clip_model", "open_clip_model")])
def test_opens_a_lone_file(name: str, stem: str, tmp_path: Path) -> None:
    """A lone file's neighbours, config.json too, are not taken for parts of it."""
    path = write_checkpoint(tmp_path / f"{name}.safetensors", small())
    (tmp_path / "config.json").write_text('{"quantization_config": {}, "num_hidden_layers": 99}')
    checkpoint = open_checkpoint(path)
    assert_holds(checkpoint, small())
    assert (checkpoint.stem, checkpoint.folder, checkpoint.config) == (stem, None, {})


def test_opens_what_links_point_to(tmp_path: Path) -> None:
    """Links are followed, as the Hub's cache needs: to a folder, and from a folder to its shards."""
    real = write_checkpoint(tmp_path / "real", small(), shards=2)
    linked = tmp_path / "linked"
    linked.mkdir()
    for number, file in enumerate(sorted(real.iterdir())):
        blob = file.rename(tmp_path / f"blob{number}")
        (linked / file.name).symlink_to(blob)
    (tmp_path / "alias").symlink_to(linked)
    assert_holds(open_checkpoint(tmp_path / "alias"), small())


def test_a_library_s_own_name_wins(tmp_path: Path) -> None:
    """Beside `model`, a file of another name (consolidated, an adapter) is not part of the weights."""
    path = write_checkpoint(tmp_path / "ckpt", small(), shards=2)
    save_file({"other": torch.ones(1)}, path / "consolidated.safetensors")
    save_file({"lora": torch.ones(1)}, path / "adapter_model.safetensors")
    assert_holds(open_checkpoint(path), small())


def test_a_shard_in_a_subfolder(tmp_path: Path) -> None:
    """An index may name files in folders below its own."""
    path = write_checkpoint(tmp_path / "ckpt", {})
    (path / "model.safetensors").unlink()
    write_checkpoint(path / "weights" / "a.safetensors", small())
    (path / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(small(), "weights/a.safetensors")})
    )
    assert_holds(open_checkpoint(path), small())


def test_integers_and_booleans_are_no_sign_of_quantisation(tmp_path: Path) -> None:
    """Position ids, counters and masks of any width are opened."""
    dtypes = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint64, torch.bool)
    tensors = {f"buffer.{dtype}": torch.ones(3).to(dtype) for dtype in dtypes}
    assert_holds(open_checkpoint(write_checkpoint(tmp_path / "x.safetensors", tensors)), tensors)


# --- what cannot ---


def indexed(folder: Path, index: Any, **shards: dict[str, torch.Tensor]) -> Path:
    """A folder with an index, as wrong as one likes, and shards `a.safetensors`, `b.safetensors`."""
    folder.mkdir()
    text = index if isinstance(index, str) else json.dumps(index)
    (folder / "model.safetensors.index.json").write_text(text)
    for name, tensors in shards.items():
        save_file(tensors, folder / f"{name}.safetensors")
    return folder


def folder_of(*names: str) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        for name in names:
            path = tmp / "ckpt" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                save_file({"w": torch.ones(1)}, path)
            else:
                path.write_bytes(b"\x80\x02}q\x00.")
        (tmp / "ckpt").mkdir(exist_ok=True)
        return tmp / "ckpt"

    return build


def mapped_to(shard: object) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        save_file({"w": torch.ones(1)}, tmp / "outside.safetensors")
        return indexed(tmp / "ckpt", {"weight_map": {"v": "a.safetensors", "w": shard}}, a={"v": torch.ones(1)})

    return build


def index_of(index: object) -> Callable[[Path], Path]:
    return lambda tmp: indexed(tmp / "ckpt", index, a={"v": torch.ones(1)})


def with_config(config: str) -> Callable[[Path], Path]:
    def build(tmp: Path) -> Path:
        path = write_checkpoint(tmp / "ckpt", {"w": torch.ones(1)})
        (path / "config.json").write_bytes(config.encode("latin-1"))
        return path

    return build


def holding(name: str, dtype: torch.dtype) -> Callable[[Path], Path]:
    return lambda tmp: write_checkpoint(tmp / "x.safetensors", {name: torch.zeros(4).to(dtype)})


def raw_dtype(dtype: str, shape: list[int], nbytes: int) -> Callable[[Path], Path]:
    header = {"w.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, nbytes]}}
    return lambda tmp: write_raw(tmp / "x.safetensors", header, bytes(nbytes))


def quantised(method: str) -> Callable[[Path], Path]:
    config = {"quantization_config": {"quant_method": method}}
    return lambda tmp: write_checkpoint(tmp / "ckpt", {"w": torch.ones(1), "scales": torch.ones(1)}, config=config)


def fifo(tmp: Path) -> Path:
    os.mkfifo(tmp / "pipe")
    return tmp / "pipe"


def with_folder_for_a_file(tmp: Path) -> Path:
    (tmp / "ckpt" / "model.safetensors").mkdir(parents=True)
    return tmp / "ckpt"


# A checkpoint that cannot be opened -> the kind of refusal, and what its message must hold.
REFUSED: dict[str, tuple[Callable[[Path], Path], type[LinesError], list[str]]] = {
    "nothing there": (lambda tmp: tmp / "absent", CheckpointError, ["absent", "no such"]),
    "a pipe": (fifo, CheckpointError, ["pipe", "neither a file nor a folder"]),
    "a folder where the file should be": (with_folder_for_a_file, CheckpointError, ["model.safetensors"]),
    "an empty folder": (folder_of(), CheckpointError, ["ckpt", "no .safetensors"]),
    "no weights": (folder_of("README.md", "notes.txt"), CheckpointError, ["ckpt", "no .safetensors"]),
    "pickles only": (folder_of("pytorch_model.bin"), UnsupportedError, ["ckpt", "pytorch_model.bin"]),
    "GGUF only": (folder_of("q4.gguf"), UnsupportedError, ["ckpt", "q4.gguf"]),
    "an adapter": (
        folder_of("adapter_model.safetensors", "adapter_config.json"),
        UnsupportedError,
        ["ckpt", "adapter"],
    ),
    "several sets": (folder_of("a.safetensors", "b.safetensors"), CheckpointError, ["a.safetensors", "b.safetensors"]),
    "index and single file": (
        folder_of("model.safetensors", "model.safetensors.index.json"),
        CheckpointError,
        ["model.safetensors\n", "model.safetensors.index.json"],
    ),
    "shards without their index": (
        folder_of("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        CheckpointError,
        ["ckpt", "index"],
    ),
    "one shard of two, and no index": (
        folder_of("model-00001-of-00002.safetensors"),
        CheckpointError,
        ["model-00001-of-00002.safetensors"],
    ),
    "index not JSON": (index_of("{"), CheckpointError, ["index.json", "JSON"]),
    "index a list": (index_of([]), CheckpointError, ["index.json", "weight_map"]),
    "index without a map": (index_of({"metadata": {}}), CheckpointError, ["index.json", "weight_map"]),
    "index with an empty map": (index_of({"weight_map": {}}), CheckpointError, ["index.json", "weight_map"]),
    "index with a list for a map": (index_of({"weight_map": ["v"]}), CheckpointError, ["index.json", "weight_map"]),
    "index without a tensor": (
        index_of({"weight_map": {"other": "a.safetensors"}}),
        CheckpointError,
        ["a.safetensors", "other"],
    ),
    "index with too few tensors": (
        lambda tmp: indexed(
            tmp / "ckpt", {"weight_map": {"v": "a.safetensors"}}, a={"v": torch.ones(1), "extra": torch.ones(1)}
        ),
        CheckpointError,
        ["a.safetensors", "extra"],
    ),
    "tensors of two shards swapped": (
        lambda tmp: indexed(
            tmp / "ckpt",
            {"weight_map": {"v": "b.safetensors", "w": "a.safetensors"}},
            a={"v": torch.ones(1)},
            b={"w": torch.ones(1)},
        ),
        CheckpointError,
        ["a.safetensors", "w"],
    ),
    "mapped to a number": (mapped_to(1), CheckpointError, ["index.json", "'w'", "1"]),
    "mapped to nothing": (mapped_to(""), CheckpointError, ["index.json", "'w'"]),
    "mapped to what is missing": (mapped_to("b.safetensors"), CheckpointError, ["index.json", "b.safetensors"]),
    "mapped to the folder above": (mapped_to("../outside.safetensors"), CheckpointError, ["'w'", "outside the folder"]),
    "mapped up and down": (mapped_to("x/../../outside.safetensors"), CheckpointError, ["'w'", "outside the folder"]),
    "mapped to the root": (mapped_to("/etc/passwd"), CheckpointError, ["'w'", "/etc/passwd", "outside the folder"]),
    "mapped with a backslash": (mapped_to("..\\outside.safetensors"), CheckpointError, ["'w'", "outside the folder"]),
    "mapped to a NUL": (mapped_to("a\0.safetensors"), CheckpointError, ["'w'", "outside the folder"]),
    "config not JSON": (with_config("{'a': 1}"), CheckpointError, ["config.json", "JSON"]),
    "config not UTF-8": (with_config('{"a": "\xff"}'), CheckpointError, ["config.json", "JSON"]),
    "config a list": (with_config("[]"), CheckpointError, ["config.json", "object"]),
    "config too deep": (with_config("[" * 100_000), CheckpointError, ["config.json", "JSON"]),
    "quantised by GPTQ": (quantised("gptq"), UnsupportedError, ["ckpt", "quantised", "gptq"]),
    "quantised by bitsandbytes": (quantised("bitsandbytes"), UnsupportedError, ["ckpt", "quantised", "bitsandbytes"]),
    "GPTQ names": (holding("a.qweight", torch.int32), UnsupportedError, ["x.safetensors", "a.qweight", "quantised"]),
    "bitsandbytes 8 bit": (holding("a.SCB", torch.float32), UnsupportedError, ["a.SCB", "quantised"]),
    "bitsandbytes 4 bit": (holding("a.weight.absmax", torch.float32), UnsupportedError, ["a.weight.absmax"]),
    "compressed-tensors": (holding("a.weight_packed", torch.int32), UnsupportedError, ["a.weight_packed"]),
    "an int8 weight": (holding("a.weight", torch.int8), UnsupportedError, ["a.weight", "I8", "quantised"]),
    "FP8": (holding("a.weight", torch.float8_e4m3fn), UnsupportedError, ["a.weight", "F8_E4M3", "quantised"]),
    "FP4": (raw_dtype("F4", [2, 2], 2), UnsupportedError, ["w.weight", "F4", "quantised"]),
}


@pytest.mark.parametrize(("build", "kind", "words"), REFUSED.values(), ids=REFUSED)
def test_refuses(build: Callable[[Path], Path], kind: type[LinesError], words: list[str], tmp_path: Path) -> None:
    """What is no whole, plain checkpoint is refused by name, saying why."""
    with pytest.raises(CheckpointError) as refused:
        open_checkpoint(build(tmp_path))
    assert type(refused.value) is kind
    assert [word for word in words if word not in refused.value.message] == []


def test_a_lone_shard_is_no_checkpoint(tmp_path: Path) -> None:
    """One shard of several, given as a file, is refused: depth counted over a part of a model would be wrong."""
    path = write_checkpoint(tmp_path / "ckpt", small(), shards=2)
    with pytest.raises(CheckpointError, match="00001-of-00002"):
        open_checkpoint(path / "model-00001-of-00002.safetensors")


# --- names that try to steer the terminal ---

CONTROL = {
    "escape": "\x1b[31m",
    "CSI in one character": "\x9b31m",
    "carriage return": "\r",
    "newline": "\nerror: all is well",
    "delete": "\x7f",
    "NUL": "\0",
    "right-to-left override": "\u202e",
    "line separator": "\u2028",
}


def evil_runs(text: str, tmp: Path) -> list[Ran]:
    """Every place where a tensor's or a stack's name is printed: refusals, tables, JSON, warnings."""
    names = [f"x{text}.layers.{index}.w{text}" for index in range(3)]
    evil = write_checkpoint(tmp / "evil.safetensors", {name: torch.ones(2) for name in names})
    nan = write_checkpoint(tmp / "nan.safetensors", {name: torch.full((2,), torch.nan) for name in names})
    wide = write_checkpoint(tmp / "wide.safetensors", {name: torch.ones(3) for name in names})
    good = write_checkpoint(tmp / "good.safetensors", {"layers.0.w": torch.ones(2), "layers.1.w": torch.ones(2)})
    flat = write_checkpoint(tmp / "flat.safetensors", {f"w{text}": torch.ones(2)})
    fp8 = write_checkpoint(tmp / "fp8.safetensors", {f"w{text}": torch.ones(2).to(torch.float8_e5m2)})
    broken = write_raw(tmp / "broken.safetensors", {f"w{text}": None})
    listed = indexed(tmp / "ckpt", {"weight_map": {f"w{text}": f"shard{text}.safetensors"}})
    out = tmp / "out.safetensors"
    runs = [
        run_lines("edit", evil, other, "-o", out, *flags)
        for other, *flags in (
            (good,),
            (wide,),
            (nan,),
            (broken,),
            (fp8,),
            (listed,),
            (nan, "--allow-nonfinite", "--force"),
            (evil, "--force"),
            (evil, "--force", "--json"),
            (evil, "--force", "--dry-run"),
            (evil, "--force", "--dry-run", "--json"),
            (evil, "--layers", "nothing(?P<index>)"),
            (evil, "--layers", r"(?P<index>w)"),
        )
    ]
    return [*runs, run_lines("edit", flat, flat, "-o", out, "--force")]


@pytest.mark.parametrize("text", CONTROL.values(), ids=CONTROL)
@pytest.mark.slow
def test_no_name_reaches_the_terminal_unescaped(text: str, tmp_path: Path) -> None:
    """Control characters, line breaks and direction marks in names are printed as escapes, whatever is printed."""
    for ran in evil_runs(text, tmp_path):
        assert not ran.trace
        assert text not in ran.out + ran.err
        assert {c for c in ran.out + ran.err if not c.isprintable()} <= {"\n"}


# --- codes and factors, by what stands beside them ---

Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]
I8, U8, I16, I32, I64, F16, F32 = (
    torch.int8,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
)
U32 = getattr(torch, "uint32", torch.int32)  # came with torch 2.3

# What stands in a module `m` of each format; of those that have another name for a file, too.
CODES: dict[str, Kinds] = {
    "GPTQ": {"qweight": (I32, (4, 64)), "qzeros": (I32, (1, 8)), "scales": (F16, (1, 64)), "g_idx": (I32, (32,))},
    "AWQ": {"qweight": (I32, (32, 8)), "qzeros": (I32, (1, 8)), "scales": (F16, (1, 64))},
    "bitsandbytes in 8 bits": {"weight": (I8, (8, 16)), "SCB": (F32, (8,)), "weight_format": (U8, ())},
    "bitsandbytes in 4 bits": {"weight": (U8, (64, 1)), "weight.absmax": (F32, (2,)), "weight.quant_map": (F32, (16,))},
    "HQQ": {"W_q": (U8, (8, 16)), "scale": (F16, (8, 1)), "zero": (F16, (8, 1))},
    "compressed-tensors": {"weight_packed": (I32, (8, 2)), "weight_scale": (F16, (8, 1)), "weight_shape": (I64, (2,))},
    "torchao": {"_weight_qdata": (I8, (8, 16)), "_weight_scale": (F32, (8,))},
    "torchao before": {"weight": (I32, (1, 1, 32, 4)), "scales_and_zeros": (F16, (1, 8, 2))},
    "quanto": {"weight._data": (I8, (8, 16)), "weight._scale": (F16, (8, 1))},
    "MLX": {"weight": (U32, (8, 2)), "scales": (F16, (8, 1)), "biases": (F16, (8, 1))},
    "MXFP4": {"w1_blocks": (U8, (2, 8, 1, 16)), "w1_scales": (U8, (2, 8, 1)), "w1_bias": (F16, (2, 8))},
    "EETQ": {"weight": (I8, (8, 16)), "weight_scales": (F16, (16,))},
    "AQLM": {"codes": (I8, (8, 2, 1)), "codebooks": (F16, (1, 256, 1, 8)), "scales": (F16, (8, 1, 1, 1))},
    "QuIP": {"Qidxs": (I64, (8, 2)), "SU": (F16, (16,)), "SV": (F16, (8,))},
    "EXL2": {"q_weight": (I32, (4, 64)), "q_scale": (I32, (1, 8)), "q_scale_max": (F16, (1,))},
    "EXL3": {"trellis": (I16, (1, 4, 64)), "suh": (F16, (16,)), "svh": (F16, (64,))},
    "one that nobody has heard of": {"body": (I16, (8, 4)), "steps_of_each_row": (F32, (8, 1))},
    "named after its tensor": {"kernel": (I32, (8, 4)), "kernel_scale": (F32, ())},
    "after an index": {"row_index": (I32, (8, 4)), "row_index_scale": (F32, (8, 1))},
    "VPTQ": {"indices": (I16, (1, 8, 4)), "weight_scale": (F16, (8,)), "weight_bias": (F16, (8,))},
    "one scale for all": {"kernel": (I8, (8, 4)), "scale": (F32, ())},
    "a weight of integers": {"weight": (I32, (8, 4)), "scales": (F16, (2, 2))},
    "HQQ by columns": {"W_q": (U8, (4, 32)), "scale": (F16, (1, 32)), "zero": (F16, (1, 32)), "bias": (F16, (256,))},
    "HQQ in 4 bits": {"W_q": (U8, (4, 16)), "scale": (F16, (8, 1)), "zero": (F16, (8, 1))},
    "HQQ in 3 bits": {"W_q": (I32, (2, 16)), "scale": (F16, (20, 1)), "zero": (F16, (20, 1))},
    "beside a bias": {"qw": (I8, (8, 16)), "delta": (F16, (8, 2)), "bias": (F16, (8,))},
}
# What integers stand beside floats in honest models.
HONEST: dict[str, Kinds] = {
    "positions": {"position_ids": (I64, (1, 16)), "position_embedding": (F32, (16, 4)), "class_embedding": (F32, (4,))},
    "positions in 32 bits": {"position_ids": (I32, (2, 16)), "position_embeddings": (F32, (1, 16, 4))},
    "batch norm": {"num_batches_tracked": (I64, ()), "running_mean": (F32, (4,)), "weight": (F32, (4,))},
    "Swin": {"relative_position_index": (I64, (49, 49)), "relative_position_bias_table": (F32, (169, 4))},
    "Swin in 32 bits": {"relative_position_index": (I32, (49, 49)), "relative_position_bias_table": (F32, (169, 4))},
    "Swin 2": {"relative_position_index": (I64, (64, 64)), "logit_scale": (F32, (4, 1, 1)), "q_bias": (F32, (64,))},
    "LeViT": {"attention_bias_idxs": (I64, (16, 16)), "attention_biases": (F32, (4, 16))},
    "LeViT in 32 bits": {"attention_bias_idxs": (I32, (16, 16)), "attention_biases": (F32, (4, 16))},
    "GPT-2": {"bias": (U8, (1, 1, 16, 16)), "masked_bias": (F32, ()), "weight": (F32, (16, 4))},
    "a mask beside a scale": {"attn_mask": (U8, (16, 16)), "scale": (F32, (1,))},
    "a map of vocabularies": {"d2t": (I64, (32,)), "weight": (F32, (32, 4))},
    "experts by token": {"tid2eid": (I32, (64, 4)), "weight": (F32, (4, 16)), "bias": (F32, (4,))},
    "buckets": {"relative_buckets": (I64, (16, 16)), "scale": (F32, (1,))},
    "integers by themselves": {"table": (I32, (16, 16))},
    "coordinates": {"rel_coords": (I32, (16, 16)), "bias": (F32, (16,)), "scale": (F32, (16,))},
    "coordinates of pairs": {"rel_coords": (I32, (16, 16, 2)), "rel_pos_table": (F32, (1, 16, 2))},
    "an index of the size of heads": {"relative_position_index": (I32, (16, 16)), "scale": (F32, (16, 1))},
    "a map of experts": {"expert_map": (I32, (8, 4)), "scale": (F32, (8,)), "weight": (F32, (8, 16))},
    "a wide map of experts": {"expert_map": (I64, (8, 4)), "scales": (F32, (8, 1))},
    "a bias that is a mask": {"selfbias": (U8, (1, 1, 16, 16)), "weight": (F32, (16, 4)), "bias": (F32, (16,))},
    "a mask of rows": {"selfbias": (I32, (16, 16)), "slopes": (F32, (16, 1)), "scale": (F32, (16,))},
    "beside a whole weight": {"layout": (I32, (8, 4)), "weight": (F32, (8, 64)), "slopes": (F32, (8, 1))},
    "beside a bias alone": {"layout": (I32, (8, 4)), "bias": (F32, (8,)), "gamma": (F32, (8,))},
    "a scale and no zero of it": {"layout": (I32, (8, 4)), "scale": (F32, ()), "zeroed_rows": (F32, (3,))},
    "a scale of all": {"layout": (I32, (8, 4)), "scale": (F32, ())},
    "tokens by name": {"token_types": (I32, (1, 16)), "cls_token": (F32, (1, 4)), "pos_embed": (F32, (1, 16))},
}


def modules(tmp: Path, kind: Kinds, **more: torch.Tensor) -> Path:
    """A lone file with the module in each of two layers, and with `more` once."""
    return write_checkpoint(
        tmp / "lone.safetensors",
        {
            f"model.layers.{layer}.m.{name}": torch.ones(shape).to(dtype)
            for layer in range(2)
            for name, (dtype, shape) in kind.items()
        }
        | more,
    )


@pytest.mark.parametrize("kind", CODES)
def test_codes_by_what_stands_beside_them(kind: str, tmp_path: Path) -> None:
    """Integers with scales in their module are quantised weights, in a lone file without a config, too."""
    with pytest.raises(UnsupportedError, match=r"lone.safetensors is quantised: it holds model"):
        open_checkpoint(modules(tmp_path, CODES[kind]))
    assert open_checkpoint(tmp_path / "lone.safetensors", to_look_at=True).tensors


@pytest.mark.parametrize("kind", HONEST)
def test_integers_that_are_no_codes(kind: str, tmp_path: Path) -> None:
    """Buffers that number entries, and masks, are none, whatever floats stand beside them."""
    assert open_checkpoint(modules(tmp_path, HONEST[kind])).tensors


A, B = (F32, (2, 4)), (F32, (4, 2))
FACTORS: dict[str, Kinds] = {
    "PEFT": {"q_proj.lora_A.weight": A, "q_proj.lora_B.weight": B},
    "PEFT, by name": {"q_proj.lora_A.default.weight": A, "q_proj.lora_B.default.weight": B},
    "PEFT, embeddings": {"wte.lora_embedding_A": A, "wte.lora_embedding_B": B},
    "DoRA": {"q.lora_A.weight": A, "q.lora_B.weight": B, "q.lora_magnitude_vector": (F32, (4,))},
    "LoHa": {f"q.hada_w{n}_{part}": A for n in (1, 2) for part in "ab"},
    "LoKr": {"q.lokr_w1": A, "q.lokr_w2_a": A, "q.lokr_w2_b": B},
    "IA3": {"k_proj.ia3_l": (F32, (4, 1))},
    "OFT": {"q_proj.oft_R.weight": A},
    "VeRA": {"q_proj.vera_lambda_b": (F32, (4,)), "q_proj.vera_lambda_d": (F32, (2,))},
    "kohya": {"lora_unet_q.lora_down.weight": A, "lora_unet_q.lora_up.weight": B, "lora_unet_q.alpha": (F32, ())},
    "kohya, DoRA": {"u.lora_down.weight": A, "u.lora_up.weight": B, "u.dora_scale": (F32, (4, 1))},
    "diffusers": {"processor.to_q_lora.down.weight": A, "processor.to_q_lora.up.weight": B},
    "x-flux": {"processor.qkv_lora1.down.weight": A, "processor.qkv_lora1.up.weight": B},
    "MLX": {"q_proj.lora_a": B, "q_proj.lora_b": A},
    "with a point": {"q_proj.lora.A": A, "q_proj.lora.B": B},
    "with a point, small": {"q_proj.lora.a.weight": A, "q_proj.lora.b.weight": B},
    "in one word": {"q_proj.loraA.weight": A, "q_proj.loraB.weight": B},
    "in capitals": {"q_proj.LoRA_A.weight": A, "q_proj.LoRA_B.weight": B},
    "down and up": {"q_proj.lora.down.weight": A, "q_proj.lora.up.weight": B},
    "in and out": {"q_proj.lora_in.weight": A, "q_proj.lora_out.weight": B},
    "left and right": {"q_proj.lora_left": B, "q_proj.lora_right": A},
    "of one of several": {"qkv.lora_a_q.weight": A, "qkv.lora_b_q.weight": B},
    "numbered": {"qkv.lora0.A": A, "qkv.lora0.B": B, "qkv.lora1.A": A, "qkv.lora1.B": B},
    "the module behind it": {"lora.q_proj.A.weight": A, "lora.q_proj.B.weight": B},
    "convolutions": {"c.lora.down.weight": (F32, (2, 4, 3, 3)), "c.lora.up.weight": (F32, (4, 2, 1, 1))},
    "a parametrization": {"q.parametrizations.weight.0.lora_A": A, "q.parametrizations.weight.0.lora_B": B},
}


@pytest.mark.parametrize("more", [{}, {"lm_head": torch.ones(3, 4)}], ids=["alone", "with a whole tensor"])
@pytest.mark.parametrize("kind", FACTORS)
def test_an_adapter_by_its_factors(kind: str, more: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """A lone file of factors is an adapter, whatever its name, also with something that was trained whole."""
    with pytest.raises(UnsupportedError, match=r"lone.safetensors is an adapter"):
        open_checkpoint(modules(tmp_path, FACTORS[kind], **more))


@pytest.mark.parametrize(
    "whole",
    [
        {"q_proj.base_layer.weight": (F32, (4, 4)), **{f"q_proj.lora_{p}.{of}.weight": A for p in "AB" for of in "xy"}},
        {"q_proj.weight": (F32, (4, 4)), "q_proj.lora_A.weight": A, "q_proj.lora_B.weight": B},
        {"q_proj.weight": (F32, (4, 4)), "k.weight": A, "v.weight": A, "o.lora_A.weight": A, "o.lora_B.weight": B},
        {"attn.w_lora.lora.0.weight": A, "attn.w_lora.lora.2.weight": B, "attn.alpha": (F32, ())},
        {f"att.{part}_lora.lora.{at}.weight": kind for part in "wavg" for at, kind in ((0, A), (2, B))},
        {"attn.q_a_proj.weight": A, "attn.q_b_proj.weight": B, "attn.kv_a_proj_with_mqa.weight": A},
        {"q.lora.A": A, "q.lora.B": (F32, (5, 3))},
        {"q.lora.A": A, "q.weight": A},
        {"q.linear.weight": (F32, (4, 4)), "q.lora.A": A, "q.lora.B": B},
        {
            "q.parametrizations.weight.original": (F32, (4, 4)),
            **{f"q.parametrizations.weight.0.lora_{p}": A for p in "AB"},
        },
        {"flora.a": A, "flora.b": B, "explora.up.weight": A, "explora.down.weight": B},
        {"lora_alpha": A, "lora.bias": B, "lora.block.up_proj.weight": A, "lora.block.down_proj.weight": B},
    ],
    ids=[
        "two adapters inside",
        "beside their weight",
        "a few",
        "parts that only sound so",
        "RWKV",
        "projections of low rank",
        "no product",
        "one alone",
        "beside a layer of its own",
        "beside what is parametrized",
        "words that end so",
        "a module that is called so",
    ],
)
def test_a_whole_model_with_factors_inside(whole: Kinds, tmp_path: Path) -> None:
    """Factors beside the weights that they change, or a few among others, make no adapter of a model."""
    assert open_checkpoint(modules(tmp_path, whole)).tensors
