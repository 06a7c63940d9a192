"""Files that torch.save wrote, as inputs: what torch reads of them is what is edited, and nothing in them is run."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lines_cli.checkpoint.pickles import MOST_STEPS
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint, views_of
from lines_cli.engine.input_files import opened, read_input, with_views
from lines_cli.errors import CheckpointError, LinesError, UnsupportedError
from lines_cli.storage.zip_members import read_directory
from support import forked
from support.files import snapshot, write_checkpoint
from support.run import Ran, run_lines
from support.torch_files import Calls, Rebuilt, Stored, harmful, pickled, write_folder, write_old, write_zip

LAYERS = 4
SIX = b"\0\0\x80?" * 6  # six ones in float32


def model(seed: int = 0) -> OrderedDict[str, torch.Tensor]:
    """A small model with all kinds of views: transposed, cut out, tied, repeated, of no axis and of no entry."""
    torch.manual_seed(seed)
    fused = torch.randn(30, 8)
    found = OrderedDict({"embed_tokens.weight": torch.randn(20, 6)})
    for i in range(LAYERS):
        found[f"layers.{i}.q"] = fused[:, i : i + 4]
        found[f"layers.{i}.w"] = torch.randn(5, 7).t()
        found[f"layers.{i}.conv"] = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
        found[f"layers.{i}.half"] = torch.randn(9).to(torch.bfloat16 if i % 2 else torch.float16)[1:]
        found[f"layers.{i}.norm"] = nn.Parameter(torch.randn(6))
    found["mask"] = torch.ones(1, 1, 4, dtype=torch.bool).expand(3, 5, 4)
    found["steps"] = torch.tensor(3 + seed)
    found["freqs"] = torch.polar(torch.ones(3, 2), torch.arange(6.0).view(3, 2))
    found["wide"] = torch.randn(3).double()
    found["none"] = torch.empty(0, 3)
    found["lm_head.weight"] = found["embed_tokens.weight"]
    return found


def plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same as safetensors can hold it."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


def bytes_of(checkpoint: Checkpoint) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """What a checkpoint's tensors hold, read as the engine reads them."""
    found = {}
    with opened(checkpoint.files) as fds:
        sources = with_views(fds, views_of([checkpoint]))
        for name, stored in checkpoint.tensors.items():
            info = stored.info
            into = memoryview(bytearray(info.nbytes))
            assert read_input(sources[stored.file], into, info.offset) == info.nbytes
            found[name] = info.dtype, info.shape, bytes(into)
    return found


def as_safetensors(tensors: Mapping[str, torch.Tensor], folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    return bytes_of(open_checkpoint(write_checkpoint(folder / "oracle.safetensors", plain(tensors)), to_look_at=True))


def saved(value: Any, path: Path, **how: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **how)
    return path


OLD: dict[str, Any] = {"_use_new_zipfile_serialization": False}

# --- what is read ---


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "M.PT"])
@pytest.mark.parametrize("how", [{}, OLD, {"pickle_protocol": 4}, {"pickle_protocol": 5} | OLD], ids=str)
def test_it_holds_what_torch_loads(how: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Every tensor, of either kind of file, by every name: dtype, shape, and each byte in order."""
    path = saved(model(), tmp_path / name, **how)
    found = bytes_of(open_checkpoint(path))
    assert found == as_safetensors(torch.load(path, weights_only="pickle_protocol" not in how), tmp_path)
    assert list(found) == list(model())


def test_every_dtype_that_safetensors_has(tmp_path: Path) -> None:
    """Those of today's torch, too, which it stores in another way; what cannot be computed with is only looked at."""
    dtypes = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool complex64"
    dtypes += " float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz"
    tensors = {name: torch.arange(6).view(2, 3).t().to(getattr(torch, name)) for name in dtypes.split()}
    for how in ({}, OLD):
        found = open_checkpoint(saved(tensors, tmp_path / "m.pt", **how), to_look_at=True)
        assert bytes_of(found) == as_safetensors(tensors, tmp_path)


def test_views_of_storages_in_old_files(tmp_path: Path) -> None:
    """Before torch 1.6 a storage could be a part of another: its entries are counted from there."""
    part = Stored("7", 24, view=("8", 5, 12))  # 12 of 24 entries, from the fifth on
    numbers = struct.pack("<24f", *range(24))
    write_old(tmp_path / "m.pt", {"a.0.w": Rebuilt(part, 2, (2, 3), (3, 1))}, {"7": (24, numbers)})
    assert load_file_like(tmp_path / "m.pt") == {"a.0.w": [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]}
    loaded = torch.load(tmp_path / "m.pt", weights_only=True)
    assert loaded["a.0.w"].flatten().tolist() == [7.0, 8.0, 9.0, 10.0, 11.0, 12.0]


def load_file_like(path: Path) -> dict[str, list[float]]:
    """Of a checkpoint in float32, its entries."""
    return {name: np.frombuffer(raw, "<f4").tolist() for name, (_, _, raw) in bytes_of(open_checkpoint(path)).items()}


def test_texts_of_python_2(tmp_path: Path) -> None:
    """A file that Python 2 wrote has its names as bytes, and a dict as a list of pairs."""
    value = pickled(Calls(OrderedDict, [["a.0.w", Rebuilt(Stored("0", 6), 0, (6,), (1,))]]), old=True)
    name = value.index(b"X\x05\0\0\0a.0.w")
    value = value[:name] + b"U\x05a.0.w" + value[name + 10 :]
    write_old(tmp_path / "m.pt", value, {"0": (6, SIX)})
    assert torch.load(tmp_path / "m.pt", weights_only=False).keys() == {"a.0.w"}
    assert load_file_like(tmp_path / "m.pt") == {"a.0.w": [1.0] * 6}


def test_a_zip_file_of_more_than_4_gib(tmp_path: Path) -> None:
    """Sizes and places that take 64 bits are read where they stand; the file is a sparse one."""
    path = saved({"a.0.w": torch.arange(6.0)}, tmp_path / "m.pt")
    with zipfile.ZipFile(path) as file:
        raw = file.read("m/data.pkl")
        content = file.read("m/data/0")
    far = 5 * 2**30
    name, data = b"m/data.pkl", b"m/data/0"
    local = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0, 0, len(name), 0) + name
    with path.open("wb") as file_:
        file_.write(local + raw)
        file_.seek(far)
        file_.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 45, 0, 0, 0, 0, 0, 0, 0, len(data), 0) + data + content)
        start = file_.tell()
        most = 2**32 - 1
        for called, nbytes, at in ((name, len(raw), 0), (data, len(content), far)):
            extra = struct.pack("<HHQQQ", 1, 24, nbytes, nbytes, at)
            entry = (b"PK\x01\x02", 45, 45, 0, 0, 0, 0, 0, most, most, len(called), len(extra), 0, 0, 0, 0, most)
            file_.write(struct.pack("<4s6H3I5HII", *entry) + called + extra)
        end = file_.tell()
        file_.write(struct.pack("<4sQHHIIQQQQ", b"PK\x06\x06", 44, 45, 45, 0, 0, 2, 2, end - start, start))
        file_.write(struct.pack("<4sIQI", b"PK\x06\x07", 0, end, 1))
        file_.write(struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, 2**16 - 1, 2**16 - 1, most, most, 0))
    with path.open("rb") as file_:
        assert read_directory(file_.fileno(), path.stat().st_size).members["m/data/0"].at == far
    assert load_file_like(path) == {"a.0.w": [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]}


# --- what is made of it ---

KINDS: dict[str, Callable[[Mapping[str, Any], Path], Path]] = {
    "zip": lambda tensors, at: saved(tensors, at / "m.pt"),
    "old": lambda tensors, at: saved(tensors, at / "m.pth", **OLD),
    "nested": lambda tensors, at: saved({"epoch": 3, "state_dict": tensors, "lr_schedulers": []}, at / "m.ckpt"),
    "a folder": lambda tensors, at: write_folder(at / "m", tensors),
    "shards": lambda tensors, at: write_folder(at / "m", tensors, shards=3),
    "an index": lambda tensors, at: write_folder(at / "m", tensors, shards=2) / "pytorch_model.bin.index.json",
}


def digests(folder: Path) -> dict[str, Any]:
    return {name: of for name, of in snapshot(folder).items() if name.endswith((".safetensors", ".index.json"))}


@pytest.mark.parametrize("options", [(), ("--alpha", 0.3, "--max-shard-size", "2KB", "--workers", 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.some(6)
def test_an_edit_is_that_of_the_same_tensors(kind: str, options: tuple[Any, ...], tmp_path: Path) -> None:
    """To the byte; and its blocks are what torch computes of whole tensors."""
    base, ft = model(0), model(1)
    sides = (write_checkpoint(tmp_path / f"{side}.safetensors", plain(of)) for side, of in (("b", base), ("f", ft)))
    ok(run_lines("edit", *sides, "-o", tmp_path / "expected", *options))
    paths = (KINDS[kind](of, tmp_path / side) for side, of in (("base", base), ("ft", ft)))
    ok(run_lines("edit", *paths, "-o", tmp_path / "out", *options))
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    if not options:
        out = load_file(tmp_path / "out" / "model.safetensors")
        for i, alpha in enumerate([0.1, 0.4, 0.7, 1.0]):
            before, after = (of[f"layers.{i}.w"].detach() for of in (base, ft))
            expected = before + torch.tensor(alpha) * (after - before)
            torch.testing.assert_close(out[f"layers.{i}.w"], expected, rtol=1e-6, atol=1e-6)


def ok(ran: Ran) -> Ran:
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return ran


@pytest.mark.slow
def test_a_merge_of_all_kinds_with_whole_matrices(tmp_path: Path) -> None:
    """Files of both kinds, a folder and a part of a file in a recipe, with measured passes and whole tensors: the bytes
    of the same in safetensors. The record makes it again, and it is verified.
    """
    models = [model(seed) for seed in range(4)]
    for number, tensors in enumerate(models):
        write_checkpoint(tmp_path / f"{number}.safetensors", plain(tensors))
    saved(models[0], tmp_path / "0.pt")
    saved(models[1], tmp_path / "1.pth", **OLD)
    saved({"ema": models[2], "model": models[0]}, tmp_path / "2.ckpt")
    write_folder(tmp_path / "m3", models[3], shards=2)
    for out, names in (
        ("expected", [f"{number}.safetensors" for number in range(4)]),
        ("out", ["0.pt", "1.pth", "2.ckpt#ema", "m3"]),
    ):
        sources = "".join(f"  - model: {name}\n" for name in names[1:])
        text = f"base_model: {names[0]}\nmodels:\n{sources}merge_method: iso_c\nlines: {{alpha: auto, beta: 0.5}}\n"
        (tmp_path / f"{out}.yaml").write_text(text)
        ok(run_lines("merge", "--config", tmp_path / f"{out}.yaml", "-o", tmp_path / out))
    assert digests(tmp_path / "out") == digests(tmp_path / "expected")
    record = (tmp_path / "out" / "lines_recipe.yaml").read_text()
    assert "2.ckpt#ema" in record
    ok(run_lines("verify", tmp_path / "out"))
    again = ("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again")
    ok(run_lines(*again))
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    assert "is not the file" not in ok(run_lines(*again, "--force")).err
    saved({"ema": models[2], "model": models[3]}, tmp_path / "2.ckpt")
    assert "2.ckpt is not the file that the recipe records" in run_lines(*again, "--force").err


@pytest.mark.slow
def test_two_parts_of_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher and a student in one file are two checkpoints, for an edit, a comparison and a record."""
    monkeypatch.chdir(tmp_path)
    base, ft = model(0), model(1)
    saved({"student": base, "teacher": {"backbone": ft}}, Path("dino.pth"))
    write_checkpoint(Path("b.safetensors"), plain(base))
    write_checkpoint(Path("f.safetensors"), plain(ft))
    ok(run_lines("edit", "b.safetensors", "f.safetensors", "-o", "expected"))
    ok(run_lines("edit", "dino.pth#student", "dino.pth#teacher.backbone", "-o", "out"))
    assert digests(Path("out")) == digests(Path("expected"))
    ok(run_lines("verify", "out"))
    told = ok(run_lines("inspect", "dino.pth#teacher", "--base", "dino.pth#student", "--json")).json
    assert told["checkpoint"] == "dino.pth#teacher"
    twice = run_lines("inspect", "dino.pth#student", "--base", "dino.pth#student")
    assert (twice.code, "are one checkpoint" in twice.err) == (2, True)
    Path("sub").mkdir()
    shutil.copy("dino.pth", "sub/d.pth")
    Path("sub/r.yaml").write_text(
        "base_model: d.pth#student\nmodels: [{model: ./d.pth#teacher}]\nlike: ft\nlines: {alpha: 0, beta: 1}\n"
    )
    ok(run_lines("merge", "--config", "sub/r.yaml", "-o", "again"))


def test_a_file_whose_name_has_a_number_sign(tmp_path: Path) -> None:
    """What is there by the whole name is meant by it."""
    path = saved(model(), tmp_path / "ft#model")
    path = path.rename(tmp_path / "a#b.pt")
    assert open_checkpoint(path).tensors.keys() == model().keys()
    ran = ok(run_lines("inspect", path, "--json"))
    assert ran.json["tensors"] == len(model())
    saved({"a": model(), "b": model(1)}, path)
    assert "a#b.pt#b" in ok(run_lines("inspect", f"{path}#b", "--json")).out


@pytest.mark.slow
def test_an_interrupted_edit_goes_on(tmp_path: Path) -> None:
    """What was begun from a file is finished with `--resume`, as from safetensors; a file that changed is refused."""
    base, ft = (saved(model(seed), tmp_path / f"{seed}.pt") for seed in range(2))
    command = ("edit", base, ft, "-o", tmp_path / "out", "--resume")
    ok(run_lines(*command))
    before = digests(tmp_path / "out")
    assert "finished" in ok(run_lines(*command)).err + ok(run_lines(*command)).out
    saved(model(2), ft)
    again = run_lines(*command)
    assert again.code == 6
    ok(run_lines(*command, "--force"))
    assert digests(tmp_path / "out") != before


def test_one_storage_under_two_names_is_no_duplicate(tmp_path: Path) -> None:
    """torch.save keeps tied weights tied: the check has nothing to say. In the output each has its own bytes."""
    tied = {f"layers.{i}.w": torch.randn(4, 4).t() for i in range(3)}
    tied["head.weight"] = tied["embed.weight"] = torch.randn(6, 4).t()
    path = saved(tied, tmp_path / "m.pt")
    assert ok(run_lines("inspect", path, "--check")).out.count("nothing wrong") == 1
    tied["head.weight"] = tied["embed.weight"].clone()
    assert run_lines("inspect", saved(tied, path), "--check").code == 5
    ok(run_lines("edit", path, path, "-o", tmp_path / "out.safetensors"))
    assert load_file(tmp_path / "out.safetensors").keys() == tied.keys()


def test_a_folder_of_pickles_loads_as_safetensors(tmp_path: Path) -> None:
    """Config and stem are carried over; the pickles, and what the trainer kept, are not."""
    base, ft = (write_folder(tmp_path / f"{seed}", model(seed), config={"model_type": "tiny"}) for seed in range(2))
    for name in ("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "scaler.pt"):
        saved({"w": torch.ones(3)}, ft / name)
    ok(run_lines("edit", base, ft, "-o", tmp_path / "out"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "lines_recipe.yaml", "README.md"}


@pytest.mark.parametrize(("name", "stem"), [
    ("pytorch_model.bin", "model"), ("diffusion_pytorch_model.bin", "diffusion_pytorch_model"),
    ("open_clip_pytorch_model.bin", "open_clip_model"), ("best.ckpt", "model"), ("pytorch_model.fp16.bin", "model"),
    ("diffusion_pytorch_model.fp16.bin", "diffusion_pytorch_model"), ("weights.bin", "model"),
])  # fmt: skip
def test_what_the_output_is_called(name: str, stem: str, tmp_path: Path) -> None:
    """As the library that wrote it calls safetensors."""
    saved(model(), tmp_path / "m" / name)
    assert open_checkpoint(tmp_path / "m").stem == stem
    assert open_checkpoint(tmp_path / "m" / name).stem == stem


CHOICES: dict[str, tuple[list[str], str | None, str]] = {
    # the names in a folder, the variant that is asked for, what is read
    "safetensors first": (["pytorch_model.bin", "model.safetensors"], None, "model.safetensors"),
    "any safetensors": (["pytorch_model.bin", "other.safetensors"], None, "other.safetensors"),
    "what a library calls so": (["best.pt", "pytorch_model.bin"], None, "pytorch_model.bin"),
    "without a variant": (["pytorch_model.bin", "pytorch_model.fp16.bin"], None, "pytorch_model.bin"),
    "a variant": (["pytorch_model.bin", "pytorch_model.fp16.bin"], "fp16", "pytorch_model.fp16.bin"),
    "no pickle's variant": (["model.safetensors", "pytorch_model.fp16.bin"], "fp16", "model.safetensors"),
    "the only variant": (["pytorch_model.fp16.bin", "pytorch_model.fp32.bin.bak"], None, "pytorch_model.fp16.bin"),
    "what trainers keep": (["m.pt", "optimizer.bin", "training_args.bin", "rng_state_1.pth"], None, "m.pt"),
    "a part of a state": (["m.pt", "mp_rank_00_model_states.pt"], None, "m.pt"),
    "beside an adapter": (["adapter_model.bin", "pytorch_model.bin", "x.bin"], None, "pytorch_model.bin"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_which_file_of_a_folder(case: str, tmp_path: Path) -> None:
    """Safetensors, where there are any; else what a library calls weights; else the only file that could be."""
    names, variant, chosen = CHOICES[case]
    for name in names:
        if name.endswith(".safetensors"):
            write_checkpoint(tmp_path / name, {"a.0.w": torch.ones(1)})
        else:
            saved({"a.0.w": torch.ones(1)}, tmp_path / name)
    assert [path.name for path in open_checkpoint(tmp_path, variant=variant).files] == [chosen]


@pytest.mark.slow
def test_no_torch_for_headers(tmp_path: Path) -> None:
    """A file of torch's is inspected, and an edit of it planned, without torch."""
    saved({"state_dict": model(), "args": argparse.Namespace(a=1)}, tmp_path / "m.ckpt")
    saved(model(1), tmp_path / "o.pt", **OLD)
    program = """
import sys
from lines_cli.cli.app import app
for command in (["inspect", "m.ckpt"], ["edit", "m.ckpt", "o.pt", "-o", "out", "--dry-run"]):
    sys.argv[1:] = command
    app(standalone_mode=False)
    assert not {"torch", "numpy"} & sys.modules.keys()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert run.stdout.count("layers") > 2


# --- where the weights are ---

W = {f"layers.{i}.w": torch.full((3, 4), float(i)) for i in range(2)}
FOUND: dict[str, tuple[Any, str | None, list[str]]] = {
    # what was saved, the keys under which the weights are, what the note names
    "flat": (W, None, []),
    "Lightning": (
        {
            "state_dict": W,
            "epoch": 1,
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1}]}],
            "callbacks": {argparse.Namespace: {"best_model_score": torch.tensor(0.5), "scores": torch.ones(4)}},
            "hyper_parameters": argparse.Namespace(x=np.float64(3)),
        },
        "state_dict",
        ["epoch", "optimizer_states", "callbacks", "hyper_parameters"],
    ),
    "fairseq": ({"args": argparse.Namespace(), "model": W, "last_optimizer_state": {"a": W}}, "model", ["args"]),
    "whisper": ({"dims": {"n_mels": 80}, "model_state_dict": W}, "model_state_dict", ["dims"]),
    "DeepSpeed": ({"module": W, "optimizer": None, "lr_scheduler": {"x": torch.ones(2)}}, "module", ["optimizer"]),
    "LiNeS": (W | {"model_name": "ViT-B-32"}, None, ["model_name"]),
    "averaged": ({"n_averaged": torch.tensor(3), "module": W}, "module", ["n_averaged"]),
    "a queue beside it": ({"net": W, "queue": torch.ones(8, 8)}, "net", ["queue"]),
    "a loss with a centre": ({"teacher": W, "dino_loss": {"center": torch.ones(1, 9)}}, "teacher", ["dino_loss"]),
    "deep": ({"a": {"b.c": {"d": W}}, "e": 1}, "a.b.c.d", ["e"]),
    "in a tuple": ((W, {"lr": 0.1}), "0", ["1"]),
    "beside its module": ({"model": nn.Linear(2, 2), "state_dict": W}, "state_dict", ["model"]),
    "settings among them": (W | {"version": 3, "config": {"a": [1]}, "x": None}, None, ["version", "config", "x"]),
    "statistics among them": (W | {"stats": {"mean": torch.ones(3)}}, None, ["stats"]),
    "random states": ({"rng_state": torch.ones(9, dtype=torch.uint8), "weights": W}, "weights", ["rng_state"]),
    "quantiser's": (W | {"layers.0._extra_state": {"scale": torch.ones(2)}}, None, ["layers.0._extra_state"]),
}


@pytest.mark.parametrize("how", [{}, OLD], ids=["zip", "old"])
@pytest.mark.parametrize("case", FOUND)
def test_where_the_weights_are(case: str, how: dict[str, Any], tmp_path: Path) -> None:
    """They are found by what they are; a note says where, and what is left out."""
    value, keys, left_out = FOUND[case]
    path = saved(value, tmp_path / "m.pt", **how)
    found = open_checkpoint(path)
    assert bytes_of(found) == as_safetensors(W, tmp_path)
    text = "\n".join(found.notes)
    assert all(repr(name) in text for name in left_out)
    assert bool(found.notes) == (keys is not None or bool(left_out))
    if keys is not None:
        assert f"{path}: the weights are those under {keys!r}" in text
        assert bytes_of(open_checkpoint(path, part=keys)) == bytes_of(found)
    noted = run_lines("edit", path, path, "-o", tmp_path / "out.safetensors")
    assert all(noted.err.replace("\n", " ").count(note) == 1 for note in found.notes), noted.err


SEVERAL: dict[str, tuple[dict[str, Any], list[str]]] = {
    "an average": ({"params": W, "params_ema": dict(W)}, ["params (2 tensors)", "params_ema (2 tensors)"]),
    "timm": ({"state_dict": W, "state_dict_ema": dict(W), "epoch": 1}, ["state_dict (2", "state_dict_ema (2"]),
    "DINO": ({"student": W, "teacher": dict(W), "optimizer": {"state": {}}}, ["student (2", "teacher (2"]),
    "two networks": ({"g": W, "d": {"net": {"w": torch.ones(3)}}}, ["g (2 tensors)", "d.net (1 tensor)"]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_state_dicts(case: str, tmp_path: Path) -> None:
    """They are listed, and how to name one; which then is read."""
    value, listed = SEVERAL[case]
    path = saved(value, tmp_path / "m.pt")
    ran = run_lines("edit", path, path, "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (3, "")
    assert all(words in ran.err for words in listed)
    first = listed[0].partition(" ")[0]
    assert f"{path}#{first}" in ran.err
    assert open_checkpoint(path, part=first).tensors.keys() == W.keys()
    wrong = run_lines("inspect", f"{path}#emma")
    assert wrong.code == 3
    assert "nothing in it is called 'emma'" in wrong.err
    assert all(words in wrong.err for words in listed)


@pytest.mark.parametrize("name", ["m.pt#x", "m.safetensors#x", "absent.pt#x", "m.pt#", "#x"])
def test_a_part_that_is_not_there(name: str, tmp_path: Path) -> None:
    """Of a file that is one state dict, of safetensors, of nothing."""
    saved(W, tmp_path / "m.pt")
    write_checkpoint(tmp_path / "m.safetensors", W)
    ran = run_lines("inspect", tmp_path / name)
    assert (ran.code, ran.trace) == (3, "")
    assert name.partition("#")[0] in ran.err


# --- what is refused ---


def module(folder: Path) -> Path:
    """As the paper's code saves an image encoder: the module whole."""
    return saved(nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.LayerNorm(3)), folder / "zeroshot.pt")


def script(folder: Path) -> Path:
    torch.jit.script(nn.Linear(3, 3)).save(str(folder / "m.pt"))
    return folder / "m.pt"


def optimizer(folder: Path) -> Path:
    layer = nn.Linear(3, 3)
    adam = torch.optim.Adam(layer.parameters())
    layer(torch.ones(3)).sum().backward()
    adam.step()
    return saved(adam.state_dict(), folder / "optimizer.pt")


def repacked(folder: Path, how: int, **changed: bytes) -> Path:
    """The members of a file once more."""
    path = saved(W, folder / "n.pt")
    with zipfile.ZipFile(path) as file, zipfile.ZipFile(folder / "m.pt", "w", how) as again:
        for name in file.namelist():
            again.writestr(name, changed.get(name.rpartition("/")[2], file.read(name)))
    return folder / "m.pt"


def cut(folder: Path, nbytes: int, **how: Any) -> Path:
    path = saved(W, folder / "m.pt", **how)
    os.truncate(path, path.stat().st_size - nbytes if nbytes > 0 else -nbytes)
    return path


def with_w(**more: Any) -> Callable[[Path], Path]:
    return lambda folder: saved(W | more, folder / "m.pt")


def of_bytes(content: bytes) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        (folder / "m.pt").write_bytes(content)
        return folder / "m.pt"

    return made


def named(name: str) -> Callable[[Path], Path]:
    return lambda folder: saved(W, folder / name)


def folder_of(*names: str) -> Callable[[Path], Path]:
    def made(folder: Path) -> Path:
        for name in names:
            saved(W, folder / "m" / name)
        return folder / "m"

    return made


TENSOR = {"a.0.w": Rebuilt(Stored("0", 6), 0, (6,), (1,))}
REFUSED: dict[str, tuple[Callable[[Path], Path], type[LinesError], list[str]]] = {
    "a whole module": (module, UnsupportedError, ["zeroshot.pt", "whole pickled module", "container.Sequential"]),
    "a module in a dict": (
        lambda folder: saved({"epoch": 1, "model": nn.Linear(3, 3)}, folder / "m.pt"),
        UnsupportedError,
        ["whole pickled module", "linear.Linear, under 'model'"],
    ),
    "a TorchScript program": (script, UnsupportedError, ["TorchScript"]),
    "an optimizer": (optimizer, UnsupportedError, ["no weights", "optimizer"]),
    "an averaged model in an optimizer": (
        lambda folder: saved({"optimizer": {"average": W}}, folder / "m.pt"),
        CheckpointError,
        ["belong to training", "optimizer.average (2 tensors)"],
    ),
    "training arguments": (
        lambda folder: saved(argparse.Namespace(lr=1), folder / "training_args.bin"),
        UnsupportedError,
        ["no weights", "argparse.Namespace"],
    ),
    "a pickle that torch did not write": (
        of_bytes(pickle.dumps({"w": 1})), UnsupportedError, ["not by torch.save"],
    ),
    "sparse": (with_w(s=torch.eye(3).to_sparse()), UnsupportedError, ["s is a sparse tensor"]),
    "sparse rows": (
        lambda folder: saved(W | {"s": torch.eye(3).to_sparse_csr()}, folder / "m.pt"),
        UnsupportedError,
        ["s is a sparse tensor"],
    ),
    "quantised": (
        lambda folder: saved(
            W | {"q": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8)}, folder / "m.pt"
        ),
        UnsupportedError,
        ["q is a quantised"],
    ),
    "on meta": (with_w(m=torch.ones(3, device="meta")), UnsupportedError, ["m is on the meta device"]),
    "complex128": (with_w(c=torch.ones(3, dtype=torch.complex128)), UnsupportedError, ["c is complex128"]),
    "conjugated": (with_w(c=torch.ones(3, dtype=torch.complex64).conj()), UnsupportedError, ["c is a view"]),
    "numpy's": (with_w(n=np.ones(3)), UnsupportedError, ["n is an array of numpy"]),
    "a module among tensors": (with_w(n=nn.Linear(2, 2)), UnsupportedError, ["n is an object of", "linear.Linear"]),
    "a storage": (with_w(s=torch.ones(3).untyped_storage()), UnsupportedError, ["s is a storage"]),
    "a name that is none": (lambda folder: saved({**W, 5: torch.ones(3)}, folder / "m.pt"), UnsupportedError, ["5"]),
    "a name of two": (
        lambda folder: saved({**W, ("a", "b"): torch.ones(3)}, folder / "m.pt"), UnsupportedError, ["another kind"],
    ),
    "a reserved name": (with_w(__metadata__=torch.ones(3)), UnsupportedError, ["__metadata__"]),
    "half a character": (
        lambda folder: saved({**W, "\ud800": torch.ones(3)}, folder / "m.pt"), UnsupportedError, ["does not allow"],
    ),
    "one tensor": (lambda folder: saved(torch.ones(3), folder / "m.pt"), UnsupportedError, ["one tensor"]),
    "nothing": (lambda folder: saved({}, folder / "m.pt"), UnsupportedError, ["no weights"]),
    "integers alone": (
        lambda folder: saved({"cpu": torch.ones(9, dtype=torch.uint8)}, folder / "m.pt"), UnsupportedError, ["no wei"],
    ),
    "compressed": (lambda folder: repacked(folder, zipfile.ZIP_DEFLATED), UnsupportedError, ["compressed"]),
    "big-endian": (
        lambda folder: repacked(folder, zipfile.ZIP_STORED, byteorder=b"big"), UnsupportedError, ["big-endian"],
    ),
    "cut in its directory": (lambda folder: cut(folder, 10), CheckpointError, ["its end is missing"]),
    "cut in its data": (lambda folder: cut(folder, -700), CheckpointError, ["its end is missing"]),
    "old, cut in its data": (lambda folder: cut(folder, 3, **OLD), CheckpointError, ["it ends within its storage"]),
    "old, cut before its data": (lambda folder: cut(folder, -150, **OLD), CheckpointError, ["ends within its pickle"]),
    "empty": (of_bytes(b""), CheckpointError, ["torch.save did not write it"]),
    "text": (of_bytes(b"<html>"), CheckpointError, ["torch.save did not write it"]),
    "a Git LFS pointer": (
        of_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), CheckpointError, ["Git LFS pointer"],
    ),
    "a tar file": (of_bytes(b"x" * 257 + b"ustar\x0000" + b"\0" * 300), UnsupportedError, ["tar file"]),
    "another zip file": (
        lambda folder: shutil.make_archive(str(folder / "a"), "zip", Path(__file__).parent / "..", "golden")
        and (folder / "a.zip").rename(folder / "m.pt"),
        UnsupportedError,
        ["no data.pkl"],
    ),
    "safetensors by another name": (
        lambda folder: write_checkpoint(folder / "m.safetensors", W).rename(folder / "m.bin"),
        UnsupportedError,
        ["by its content a safetensors file"],
    ),
    "of torch by another name": (
        lambda folder: saved(W, folder / "m.safetensors"), CheckpointError, ["by its content a file that torch.save"],
    ),
    "a part of a state": (named("mp_rank_00_model_states.pt"), UnsupportedError, ["one part of a training state"]),
    "ZeRO's": (named("zero_pp_rank_0_mp_rank_00_model_states.pt"), UnsupportedError, ["one part of a training"]),
    "a folder of parts": (
        folder_of("__0_0.distcp", "__1_0.distcp"),
        UnsupportedError,
        ["__0_0.distcp", "parts of a training"],
    ),
    "a folder of ZeRO's": (
        folder_of("mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"),
        UnsupportedError,
        ["parts of a training"],
    ),
    "what trainers keep alone": (folder_of("optimizer.pt", "rng_state.pth"), CheckpointError, ["no weights"]),
    "several files": (folder_of("a.pt", "b.ckpt"), CheckpointError, ["several sets of weights", "a.pt", "b.ckpt"]),
    "shards without an index": (
        folder_of("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"),
        CheckpointError,
        ["no index"],
    ),
    "one shard": (named("pytorch_model-00001-of-00002.bin"), CheckpointError, ["one shard of several"]),
    "an adapter of PEFT's": (folder_of("adapter_model.bin", "non_lora_trainables.bin"), UnsupportedError, ["adapter"]),
    "several variants": (folder_of("pytorch_model.a.bin", "pytorch_model.b.bin"), CheckpointError, ["several vari"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    """The message names the file, and what it is; the hint says what to do."""
    make, kind, words = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(LinesError) as refused:
        open_checkpoint(path, to_look_at=True)
    assert type(refused.value) is kind
    assert str(path) in refused.value.message
    assert all(word in refused.value.message for word in words), refused.value.message
    assert refused.value.hint


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["a whole module", "a module in a dict", "a TorchScript program", "compressed",
                                  "a pickle that torch did not write"])  # fmt: skip
def test_the_two_lines_of_a_refusal(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the hint says to run gives a file that is read, with the same tensors."""
    monkeypatch.chdir(tmp_path)
    make, *_ = REFUSED[case]
    path = make(Path())
    if case == "a pickle that torch did not write":
        path.write_bytes(pickle.dumps(W))
    with pytest.raises(UnsupportedError) as refused:
        open_checkpoint(path)
    lines = [line.strip() for line in str(refused.value.hint).splitlines() if line.startswith("    ")]
    assert len(lines) == 2
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    written = Path(f"{path.stem}-state.pt")
    held = names.get("model", names.get("found"))
    expected = held.state_dict() if isinstance(held, nn.Module) else held
    assert bytes_of(open_checkpoint(written)) == as_safetensors(expected, Path())


# --- what is hostile ---


def lies(**said: Any) -> Any:
    """A tensor of which something is said that is not so; what is stored is six entries."""
    given = {"first": 0, "shape": (6,), "strides": (1,), "numel": 6} | said
    return {"a.0.w": Rebuilt(Stored("0", given["numel"]), given["first"], given["shape"], given["strides"])}


LIES: dict[str, dict[str, Any]] = {
    "beyond its storage": {"first": 1},
    "larger than its storage": {"shape": (7,)},
    "strides beyond": {"shape": (2, 3), "strides": (4, 1)},
    "more than is stored": {"numel": 7, "shape": (7,)},
    "far beyond": {"first": 2**62},
    "as large as can be": {"shape": (2**62,), "strides": (1,)},
    "larger than any": {"shape": (2**62, 2**62), "strides": (0, 0)},
    "repeated without end": {"shape": (10**6, 10**6), "strides": (0, 0)},
    "repeated some thousand times": {"shape": (100_000, 6), "strides": (0, 1)},
    "negative": {"first": -1},
    "of negative size": {"shape": (-6,)},
    "of negative strides": {"first": 5, "strides": (-1,)},
    "of more sizes than strides": {"shape": (2, 3)},
    "of sizes that are no numbers": {"shape": ("6",)},
    "of half an entry": {"shape": (0.5,)},
    "of too many axes": {"shape": (1,) * 65, "strides": (1,) * 65},
    "of numbers of great length": {"first": 10**5000},
    "of a storage of great length": {"numel": 10**5000},
    "of a negative storage": {"numel": -6},
}


@pytest.mark.parametrize("kind", ["zip", "old"])
@pytest.mark.parametrize("case", LIES)
def test_what_is_said_of_a_tensor_and_is_not_so(case: str, kind: str, tmp_path: Path) -> None:
    """No tensor reaches beyond its storage, and no storage beyond the file."""
    value = lies(**LIES[case])
    if kind == "zip":
        path = write_zip(tmp_path / "m.pt", value, {"0": SIX})
    else:
        path = write_old(tmp_path / "m.pt", value, {"0": (6, SIX)})
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_checkpoint(path)


def entries_of(raw: bytes) -> list[int]:
    """Where the entries of a zip directory begin."""
    return [at for at in range(len(raw)) if raw.startswith(b"PK\x01\x02", at)]


def rewritten(path: Path, member: str, field: int, form: str, value: int) -> Path:
    """A zip file of whose directory one number is another."""
    raw = bytearray(path.read_bytes())
    (at,) = (at for at in entries_of(bytes(raw)) if raw[at + 46 :].startswith(member.encode()))
    struct.pack_into(form, raw, at + field, value)
    path.write_bytes(raw)
    return path


def changed_end(path: Path, field: int, form: str, value: int) -> Path:
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, raw.rindex(b"PK\x05\x06") + field, value)
    path.write_bytes(raw)
    return path


def two_pickles(path: Path) -> Path:
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("other/data.pkl", b"")
    return path


def renamed(path: Path, name: bytes, other: bytes) -> Path:
    path.write_bytes(path.read_bytes().replace(name, other))
    return path


def overlapping(path: Path) -> Path:
    """A storage within another: its own header stands in the other's content."""
    inner = struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", 20, 0, 0, 0, 0, 0, 0, 0, 14, 0) + b"archive/data/1"
    value = {name: Rebuilt(Stored(name, 20), 0, (6,), (1,)) for name in ("0", "1")}
    write_zip(path, value, {"0": inner + b"\0" * 100, "1": b"\0" * 80})
    raw = path.read_bytes()
    return rewritten(path, "archive/data/1", 42, "<I", raw.index(inner))


ZIPS: dict[str, Callable[[Path], Path]] = {
    "a member that begins elsewhere": lambda path: rewritten(path, "archive/data/0", 42, "<I", 0),
    "a member that begins beyond the end": lambda path: rewritten(path, "archive/data/0", 42, "<I", 2**31),
    "a member that is larger": lambda path: rewritten(
        rewritten(path, "archive/data/0", 24, "<I", 2**30), "archive/data/0", 20, "<I", 2**30
    ),
    "a pickle that is larger": lambda path: rewritten(
        rewritten(path, "archive/data.pkl", 24, "<I", 2**30), "archive/data.pkl", 20, "<I", 2**30
    ),
    "a member that is compressed": lambda path: rewritten(path, "archive/data/0", 10, "<H", 8),
    "a member that is encrypted": lambda path: rewritten(path, "archive/data/0", 8, "<H", 1),
    "a size in a field that is missing": lambda path: rewritten(path, "archive/data/0", 24, "<I", 2**32 - 1),
    "more members than there are": lambda path: changed_end(path, 10, "<H", 60_000),
    "a directory that begins elsewhere": lambda path: changed_end(path, 16, "<I", 40),
    "a directory beyond the end": lambda path: changed_end(path, 16, "<I", 2**31),
    "a directory of great size": lambda path: changed_end(path, 12, "<I", 2**31),
    "a storage that is missing": lambda path: write_zip(path, TENSOR, {"1": SIX}),
    "two pickles": two_pickles,
    "one name twice": lambda path: renamed(path, b"archive/data/0", b"archive/data/1"),
    "one name in two places": overlapping,
}


@pytest.mark.parametrize("case", ZIPS)
def test_zip_files_that_lie(case: str, tmp_path: Path) -> None:
    """No number in a directory is believed."""
    value = {name: Rebuilt(Stored(name, 6), 0, (6,), (1,)) for name in ("0", "1")}
    path = write_zip(tmp_path / "m.pt", value, {"0": SIX, "1": SIX})
    assert open_checkpoint(path).tensors.keys() == {"0", "1"}
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_checkpoint(ZIPS[case](path))


@pytest.mark.parametrize("case", ["one size", "another count", "a missing key", "a key twice", "not a list"])
def test_old_files_that_lie(case: str, tmp_path: Path) -> None:
    """Nor in an old file."""
    path = tmp_path / "m.pt"
    write_old(path, TENSOR, {"0": (7 if case == "one size" else 2**61 if case == "another count" else 6, SIX)})
    if case == "a missing key":
        write_old(path, TENSOR, {"1": (6, SIX)})
    keys = pickle.dumps(["0"], 2)
    if case == "a key twice":
        path.write_bytes(path.read_bytes().replace(keys, pickle.dumps(["0", "0"], 2)))
    if case == "not a list":
        path.write_bytes(path.read_bytes().replace(keys, pickle.dumps("0", 2)))
    with pytest.raises(CheckpointError, match=r"m\.pt"):
        open_checkpoint(path)


def test_a_harmful_pickle_of_any_kind(tmp_path: Path) -> None:
    """Also one that torch did not write is known for what it is."""
    path = of_bytes(pickle.dumps({"w": harmful(tmp_path / "mark")}))(tmp_path)
    with pytest.raises(CheckpointError, match=r"names posix\.system, which runs commands or code"):
        open_checkpoint(path)
    assert not (tmp_path / "mark").exists()


BOMBS: dict[str, Callable[[int], bytes]] = {
    # instructions -> a pickle of as many
    "dicts": lambda number: b"}" * number,
    "remembered": lambda number: b"}\x94" * (number // 2),
    "tuples in each other": lambda number: b"N" + b"\x85" * number,
    "tuples in each other, as a key": lambda number: b"}N" + b"\x85" * (number - 4) + b"Ns",
    "objects in each other": lambda number: b"ca\nb\nq\0)\x81" + b"q\x01h\0h\x01\x85\x81" * (number // 5 - 2),
    "keys of one hash": lambda number: (
        b"}("
        + b"".join(b"\x8a\x0c" + (i * (2**61 - 1)).to_bytes(12, "little") + b"N" for i in range(number // 2 - 4))
        + b"u"
    ),
    "marks": lambda number: b"(" * number,
    "a dict that holds itself": lambda number: (
        b"}q\0(" + b"".join(b"X\x06\0\0\0%06dh\0" % i for i in range(number // 20)) + b"u"
    ),
    "too many": lambda number: b"N0" * number,
    "a text without an end": lambda _: b"X\xff\xff\xff\x7f",
    "bytes without an end": lambda _: b"\x8e" + b"\xff" * 7 + b"\x7f",
}
FEWER = {"tuples in each other, as a key", "remembered"}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in FEWER else pytest.mark.slow) for case in BOMBS]
)
@pytest.mark.slow
def test_a_pickle_that_wants_all_memory(case: str, tmp_path: Path) -> None:
    """As many instructions as may be, and more, take less than 1 GiB and end; no depth is too much for the stack."""
    path = write_zip(tmp_path / "m.pt", b"\x80\x04" + BOMBS[case](MOST_STEPS - 10) + b".")

    def program() -> None:
        forked.allow_more_memory(2**30)
        with pytest.raises(CheckpointError, match=r"m\.pt"):
            open_checkpoint(path)

    ran = forked.run(program, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]


HARM: dict[str, Callable[[Path], Any]] = {
    "itself": harmful,
    "beside the weights": lambda mark: {"state_dict": W, "x": harmful(mark)},
    "among the weights": lambda mark: W | {"x": harmful(mark)},
    "in a key": lambda mark: {"model": W, harmful(mark): 1},
    "evaluated": lambda mark: W | {"x": Calls(eval, f"__import__('pathlib').Path({str(mark)!r}).touch()")},
    "executed": lambda mark: W | {"x": Calls(exec, f"__import__('pathlib').Path({str(mark)!r}).touch()")},
    "imported": lambda mark: W | {"x": Calls(__import__, "antigravity"), "mark": str(mark)},
    "run": lambda mark: W | {"x": Calls(subprocess.check_output, ["touch", str(mark)])},
    "opened": lambda mark: W | {"x": Calls(open, str(mark), "w")},
}


@pytest.mark.parametrize("kind", ["zip", "old"])
@pytest.mark.parametrize("case", HARM)
@pytest.mark.some(6)
def test_nothing_is_run(case: str, kind: str, tmp_path: Path) -> None:
    """With every command, whatever the file is called and wherever it stands; it says what the file names."""
    mark = tmp_path / "mark"
    value = HARM[case](mark)
    folder = tmp_path / "m"
    torch_file = saved(value, folder / "pytorch_model.bin", **(OLD if kind == "old" else {}))
    shutil.copy(torch_file, tmp_path / "m.ckpt")
    good = saved(W, tmp_path / "good.pt")
    (tmp_path / "r.yaml").write_text("base_model: good.pt\nmodels: [{model: m.ckpt}]\nmerge_method: ties\n")
    ok(run_lines("edit", good, good, "-o", tmp_path / "out"))
    record = tmp_path / "out" / "lines_recipe.yaml"
    record.write_text(record.read_text().replace(str(good), str(tmp_path / "m.ckpt")))
    for command in (
        ("inspect", folder),
        ("inspect", tmp_path / "m.ckpt", "--check"),
        ("inspect", f"{tmp_path / 'm.ckpt'}#state_dict"),
        ("inspect", good, "--base", folder),
        ("edit", good, folder, "-o", tmp_path / "new"),
        ("edit", folder, good, "-o", tmp_path / "new", "--dry-run"),
        ("merge", "--config", tmp_path / "r.yaml", "-o", tmp_path / "new"),
        ("verify", tmp_path / "out"),
    ):
        ran = run_lines(*command)
        assert (ran.code, ran.trace) == (3, ""), command
        assert "lines ran nothing" in ran.err
        assert not mark.exists()
    assert not (tmp_path / "new").exists()
    if case not in ("imported", "in a key", "opened"):
        torch.load(tmp_path / "m.ckpt", weights_only=False)
        assert mark.exists(), "the file would have done it"


def test_what_is_not_known_is_not_imported(tmp_path: Path) -> None:
    """Objects of classes that are not installed are no obstacle, for nothing is made of them."""
    raw = pickled({"state_dict": TENSOR, "cfg": Calls(argparse.Namespace)})
    path = write_zip(tmp_path / "m.pt", raw.replace(b"cargparse\nNamespace", b"cnot.here\nCfg"), {"0": SIX})
    with pytest.raises((ModuleNotFoundError, pickle.UnpicklingError)):
        torch.load(path, weights_only=True)
    assert load_file_like(path) == {"a.0.w": [1.0] * 6}
    assert "not" not in sys.modules
