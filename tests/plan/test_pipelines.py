"""A pipeline's components: each edited by its own depth or taken whole, and what lies beside carried over."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file

import lines_cli as lines
from support.files import snapshot, write_checkpoint
from support.fp8 import FORMATS, LAYERS, near, plain
from support.layouts import LAYOUTS
from support.pipelines import (
    COMPONENTS,
    DEPTHS,
    EVERYTHING,
    FILES,
    TEXT,
    UNET,
    loaded,
    scaled,
    tensors,
    write_everything,
    write_modules,
    write_pipeline,
)
from support.run import Ran, run_lines
from support.tokenizers import WORDS, write_tokenizer


def write_pair(tmp_path: Path, **changed: Any) -> tuple[Path, Path]:
    """A base, and a fine-tune of all of it that is written with `changed`."""
    return write_pipeline(tmp_path / "base", 0), write_pipeline(tmp_path / "ft", 1, **changed)


def edit(tmp_path: Path, *flags: object, base: str = "base", ft: str = "ft") -> Ran:
    ran = run_lines("edit", tmp_path / base, tmp_path / ft, "-o", tmp_path / "out", *flags)
    assert not ran.trace, ran.trace
    return ran


def edited(tmp_path: Path, *flags: object, **sides: str) -> dict[str, Any]:
    ran = edit(tmp_path, "--json", *flags, **sides)
    assert ran.code == 0, ran.err
    return ran.json


def refused(ran: Ran, code: int, *words: object) -> None:
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert [word for word in words if str(word) not in ran.err.replace("\n  ", " ")] == [], ran.err


def same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    assert [n for n in got if got[n].dtype != expected[n].dtype or not torch.equal(got[n], expected[n])] == []


# --- what is made ---


@pytest.mark.slow
def test_each_component_by_its_own_depth(tmp_path: Path) -> None:
    """U-Net and text encoder are scaled, each over its own layers; the VAE and all that has no weights is carried over;
    the folder is verified, and made again by its own recipe.
    """
    write_pair(tmp_path)
    told = edited(tmp_path)
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    assert out.keys() == COMPONENTS.keys()
    for name, layers in DEPTHS.items():
        same(out[name], scaled(base[name], ft[name], layers))
    same(out["vae"], ft["vae"])
    for name in FILES.keys() | {"model_index.json", "unet/config.json", "text_encoder/config.json", "vae/config.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "ft" / name).read_bytes(), name
    as_whole = {component["name"]: component["as"] for component in told["components"]}
    assert as_whole == {"unet": None, "text_encoder": None, "vae": str(tmp_path / "ft")}
    assert [stack["layers"] for stack in told["stacks"]] == [7, 4]
    assert run_lines("verify", tmp_path / "out").code == 0
    again = run_lines("merge", "--config", tmp_path / "out/lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    for file in told["files"]:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


@pytest.mark.slow
def test_everything_is_recorded(tmp_path: Path) -> None:
    """The recipe has a digest of every file in every folder, and says what was read; no folder is left beside."""
    write_pair(tmp_path)
    edited(tmp_path, "--verify")
    written = {name for name, content in snapshot(tmp_path / "out").items() if content is not None}
    record = yaml.safe_load((tmp_path / "out/lines_recipe.yaml").read_text())
    assert record["files"].keys() == written - {"lines_recipe.yaml", "README.md"}
    read = {name.rpartition("/")[0].rpartition("/")[2] for name in record["inputs"]}
    assert read == COMPONENTS.keys()
    assert len(record["inputs"]) == 5  # of the base, the VAE is not read
    assert sorted(os.listdir(tmp_path)) == ["base", "ft", "out"]


@pytest.mark.slow
def test_a_component_gives_what_it_gives_by_itself(tmp_path: Path) -> None:
    """The same tensors as an edit of its folder alone, with the same options."""
    write_pair(tmp_path)
    edited(tmp_path, "--alpha", 0.3, "--schedule", "unet", "--outside", "position")
    for name in DEPTHS:
        pair = (tmp_path / "base" / name, tmp_path / "ft" / name)
        options = ("--alpha", 0.3, "--schedule", "unet", "--outside", "position")
        assert run_lines("edit", *pair, "-o", tmp_path / name, *options).code == 0
        same(loaded(tmp_path / "out")[name], loaded(tmp_path / name)["."])


def test_one_component_is_named(tmp_path: Path) -> None:
    """The others are the fine-tune's, to the last bit of every tensor."""
    write_pair(tmp_path)
    told = edited(tmp_path, "--component", "unet")
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    same(out["unet"], scaled(base["unet"], ft["unet"], DEPTHS["unet"]))
    same(out["text_encoder"], ft["text_encoder"])
    same(out["vae"], ft["vae"])
    assert told["recipe"]["components"] == {"unet": "edit", "*": "keep"}
    assert told["outside"]["tensors"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "alphas", "vae"),
    [
        (["unet=0.3", "text_encoder=0.5,0.2"], {"unet": (0.3, 0.7), "text_encoder": (0.5, 0.2)}, "ft"),
        (["vae=base"], {"unet": (0.1, 0.9), "text_encoder": (0.1, 0.9)}, "base"),
        (["text_encoder=base"], {"unet": (0.1, 0.9), "text_encoder": (0.0, 0.0)}, "ft"),
        (["text_encoder=keep", "unet=0"], {"unet": (0.0, 1.0), "text_encoder": (1.0, 0.0)}, "ft"),
    ],
)
def test_what_is_said_of_components(
    flags: list[str], alphas: dict[str, tuple[float, float]], vae: str, tmp_path: Path
) -> None:
    """An alpha of its own brings its beta; one can be the base's, or the fine-tune's."""
    write_pair(tmp_path)
    edited(tmp_path, *(part for flag in flags for part in ("--component", flag)))
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    for name, ends in alphas.items():
        same(out[name], scaled(base[name], ft[name], DEPTHS[name], *ends))
    same(out["vae"], (base if vae == "base" else ft)["vae"])
    assert run_lines("verify", tmp_path / "out").code == 0


def test_a_vae_is_edited_if_it_is_named(tmp_path: Path) -> None:
    """Its two halves are two stacks."""
    write_pair(tmp_path)
    told = edited(tmp_path, "--component", "vae")
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    name = "encoder.down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(out["vae"][name], base["vae"][name] + torch.tensor(0.1) * (ft["vae"][name] - base["vae"][name]))
    assert len(told["stacks"]) == 2
    same(out["unet"], ft["unet"])


def test_a_component_of_the_base_as_it_is(tmp_path: Path) -> None:
    """Though it has other tensors, another dtype and another config: it comes whole, with what lies beside it."""
    write_pair(tmp_path)
    other = {"_class_name": "AutoencoderTiny", "scaling_factor": 1.0}
    shutil.rmtree(tmp_path / "base/vae")
    held = tensors(["encoder.layers.0.w", "decoder.x"], 9, torch.float16)
    write_checkpoint(tmp_path / "base/vae", held, config=other, stem="diffusion_pytorch_model")
    edited(tmp_path, "--component", "vae=base", "--dtype", "bfloat16")
    out = loaded(tmp_path / "out")
    same(out["vae"], held)
    assert json.loads((tmp_path / "out/vae/config.json").read_text()) == other
    assert {tensor.dtype for tensor in out["unet"].values()} == {torch.bfloat16}
    assert run_lines("verify", tmp_path / "out").code == 0


RECIPE: dict[str, Any] = {
    "base_model": "base",
    "models": [{"model": "ft"}],
    "lines": {"alpha": 0.1, "beta": 0.9},
    "like": "ft",
}


def merge(tmp_path: Path, *flags: object, **more: Any) -> Ran:
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(RECIPE | more))
    ran = run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out", *flags)
    assert not ran.trace, ran.trace
    return ran


@pytest.mark.slow
def test_a_recipe_says_it_of_each(tmp_path: Path) -> None:
    """Schedule, layers and what lies outside, each of one component; and the record says it again."""
    write_pair(tmp_path)
    own = {"alpha": 0.3, "schedule": "unet", "outside": "base"}
    layers = {"layers": r"encoder\.layers\.(?P<index>[01])\.", "beta": 0.5}
    assert merge(tmp_path, components={"unet": own, "text_encoder": layers, "vae": "edit"}).code == 0
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    middle, first = "mid_block.resnets.0.conv1.weight", "down_blocks.0.resnets.0.conv1.weight"
    assert torch.equal(out["unet"][middle], ft["unet"][middle])
    update = ft["unet"][first] - base["unet"][first]
    assert torch.equal(out["unet"][first], base["unet"][first] + torch.tensor(0.3) * update)
    assert torch.equal(out["unet"]["conv_in.weight"], base["unet"]["conv_in.weight"])
    same(out["text_encoder"], scaled(base["text_encoder"], ft["text_encoder"], DEPTHS["text_encoder"][:2], 0.1, 0.5))
    record = yaml.safe_load((tmp_path / "out/lines_recipe.yaml").read_text())
    assert record["components"]["unet"] == own
    assert run_lines("verify", tmp_path / "out").code == 0


def test_a_merge_of_pipelines(tmp_path: Path) -> None:
    """Several fine-tunes by TIES, with a density of its own for one component: each is what a merge of its folders
    gives. The output is like the base, and so is what is not scaled.
    """
    for seed, side in enumerate(("base", "ft", "ft2")):
        write_pipeline(tmp_path / side, seed)
    ties: dict[str, Any] = {
        "merge_method": "ties",
        "models": [{"model": "ft"}, {"model": "ft2"}],
        "parameters": {"density": 0.5},
        "like": "base",
    }
    ran = merge(tmp_path, "--json", components={"unet": {"parameters": {"density": 0.25}}}, **ties)
    assert ran.code == 0, ran.err
    for name, density in (("unet", 0.25), ("text_encoder", 0.5)):
        models = [{"model": f"{side}/{name}"} for side in ("ft", "ft2")]
        alone = RECIPE | ties | {"base_model": f"base/{name}", "models": models, "parameters": {"density": density}}
        (tmp_path / "one.yaml").write_text(yaml.safe_dump(alone))
        assert run_lines("merge", "--config", tmp_path / "one.yaml", "-o", tmp_path / name).code == 0
        same(loaded(tmp_path / "out")[name], loaded(tmp_path / name)["."])
    same(loaded(tmp_path / "out")["vae"], loaded(tmp_path / "base")["vae"])
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_shards_each_in_its_folder(tmp_path: Path) -> None:
    """Inputs are sharded or not; the output's components have an index each, with their own names and files."""
    write_pair(tmp_path, unet={"shards": 3})
    told = edited(tmp_path, "--max-shard-size", "200B")
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == set(UNET)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out/unet" / file, "pt") as shard:
            assert name in shard.keys()  # noqa: SIM118 - it is no mapping
    assert (tmp_path / "out/text_encoder/model.safetensors.index.json").exists()
    assert any(file.startswith("unet/diffusion_pytorch_model-00001-of-") for file in told["files"])
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    same(out["unet"], scaled(base["unet"], ft["unet"], DEPTHS["unet"]))
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_other_names_of_one_component(tmp_path: Path) -> None:
    """A text encoder that another version saved without its prefix is paired, by itself; the output has the
    fine-tune's names.
    """
    held = {name.removeprefix("text_model."): tensor for name, tensor in tensors(TEXT, 7).items()}
    write_pair(tmp_path, text_encoder=held)
    edited(tmp_path)
    base, out = loaded(tmp_path / "base")["text_encoder"], loaded(tmp_path / "out")["text_encoder"]
    assert out.keys() == held.keys()
    for index, name in enumerate(f"encoder.layers.{i}.mlp.w" for i in range(3)):
        old = base[f"text_model.{name}"]
        assert torch.equal(out[name], old + torch.tensor(0.1 + 0.9 * index / 3) * (held[name] - old))


@pytest.mark.parametrize("which", ["base", "ft"])
def test_weights_in_variants_and_under_two_names(which: str, tmp_path: Path) -> None:
    """--variant reads those of that variant where there are any; of two names the one that diffusers loads is read.
    What is not read is not carried over.
    """
    write_pair(tmp_path)
    unet = tmp_path / which / "unet"
    half = tensors(UNET, 5, torch.float16)
    write_checkpoint(unet / "diffusion_pytorch_model.fp16.safetensors", half)
    write_checkpoint(unet / "model.safetensors", tensors(["x"], 6))
    edited(tmp_path, "--variant", "fp16", "--component", "unet")
    base, ft = loaded(tmp_path / "base"), loaded(tmp_path / "ft")
    read = {"base": load_file(tmp_path / "base/unet/diffusion_pytorch_model.safetensors")}
    read |= {"ft": load_file(tmp_path / "ft/unet/diffusion_pytorch_model.safetensors"), which: half}
    assert sorted(file.name for file in (tmp_path / "out/unet").glob("*.safetensors")) == [
        "diffusion_pytorch_model.safetensors"
    ]
    same(loaded(tmp_path / "out")["unet"], scaled(read["base"], read["ft"], DEPTHS["unet"]))
    assert base.keys() == ft.keys() == COMPONENTS.keys()


# --- components that are stored in other ways ---


def other_ways(way: str, side: str) -> dict[str, Any]:
    """A text encoder, as keywords of `write_checkpoint`, that is stored otherwise on one of the sides."""
    seed = int(side == "ft")
    if way == "layout":
        model = LAYOUTS["qwen3_moe"]
        held = model.apart(seed) if side == "base" else model.together(model.apart(seed))
        return {"tensors": held, "config": model.config, "shards": 2}
    if side == "ft":
        return {"tensors": near(plain(), 1), "config": {"num_hidden_layers": LAYERS}}
    stored = FORMATS["blocks"](plain())
    return {"tensors": stored.tensors, "config": stored.config}


@pytest.mark.parametrize("way", ["fp8", "layout"])
@pytest.mark.parametrize("flags", [(), ("--component", "text_encoder")], ids=["all", "one"])
@pytest.mark.slow
def test_a_component_in_fp8_or_another_layout(way: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    """It is read as it would be by itself, wherever its files stand among those of all."""
    for seed, side in enumerate(("base", "ft")):
        write_pipeline(tmp_path / side, seed, text_encoder=other_ways(way, side))
    edited(tmp_path, *flags)
    pair = (tmp_path / "base/text_encoder", tmp_path / "ft/text_encoder")
    assert run_lines("edit", *pair, "-o", tmp_path / "alone").code == 0
    same(loaded(tmp_path / "out")["text_encoder"], loaded(tmp_path / "alone")["."])
    verified = run_lines("verify", tmp_path / "out")
    assert verified.code == 0, verified.err
    report = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", "--json")
    assert report.code == 0, report.err
    assert report.json["not_compared"] == []


@pytest.mark.slow
def test_a_component_in_fp8_that_is_kept(tmp_path: Path) -> None:
    """It is written as the numbers that it stands for, and its config no longer says otherwise."""
    stored = FORMATS["blocks"](plain())
    encoder = {"tensors": stored.tensors, "config": stored.config | {"model_type": "x"}}
    write_pair(tmp_path, text_encoder=encoder)
    edited(tmp_path, "--component", "unet", "--dtype", "float16")
    config = json.loads((tmp_path / "out/text_encoder/config.json").read_text())
    assert (config["model_type"], "quantization_config" in config) == ("x", False)
    out = loaded(tmp_path / "out")["text_encoder"]
    assert out.keys() == stored.whole.keys()
    for name, tensor in out.items():
        assert torch.equal(tensor, stored.whole[name].to(tensor.dtype))


@pytest.mark.slow
def test_a_component_that_is_stored_in_fp8_again(tmp_path: Path) -> None:
    """With its scales and its config, as by itself; the other components keep their dtypes."""
    for seed, side in enumerate(("base", "ft")):
        write_pipeline(tmp_path / side, seed, text_encoder=other_ways("fp8", side))
    edited(tmp_path, "--dtype", "fp8")
    pair = (tmp_path / "base/text_encoder", tmp_path / "ft/text_encoder")
    assert run_lines("edit", *pair, "-o", tmp_path / "alone", "--dtype", "fp8").code == 0
    out, alone = (load_file(tmp_path / of / "model.safetensors") for of in ("out/text_encoder", "alone"))
    assert {name: str(tensor.dtype) for name, tensor in out.items()} == {n: str(t.dtype) for n, t in alone.items()}
    assert [name for name in out if not torch.equal(out[name].float(), alone[name].float())] == []
    configs = [json.loads((tmp_path / of / "config.json").read_text()) for of in ("out/text_encoder", "alone")]
    assert configs[0] == configs[1]
    assert {tensor.dtype for tensor in loaded(tmp_path / "out")["unet"].values()} == {torch.float32}
    verified = run_lines("verify", tmp_path / "out")
    assert verified.code == 0, verified.err


def test_filters_and_stacks_by_full_names(tmp_path: Path) -> None:
    """A component's name stands before its tensors', and its stack may be named by it."""
    write_pair(tmp_path)
    edited(tmp_path, "--filter", "unet.conv_out=keep", "--stack", "text_encoder=0.5,0.5", "--stack", "unet=base")
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    assert torch.equal(out["unet"]["conv_out.weight"], ft["unet"]["conv_out.weight"])
    middle = "mid_block.resnets.0.conv1.weight"
    assert torch.equal(out["unet"][middle], base["unet"][middle])
    first = "text_model.encoder.layers.0.mlp.w"
    old, new = base["text_encoder"][first], ft["text_encoder"][first]
    assert torch.equal(out["text_encoder"][first], old + torch.tensor(0.5) * (new - old))


def test_names_that_two_components_could_have(tmp_path: Path) -> None:
    """They are refused: `unet.ema` of its own, and `ema` in `unet`."""
    unet = tensors([*UNET, "ema.w"], 1)
    write_pair(tmp_path, unet=unet)
    write_checkpoint(tmp_path / "ft/unet.ema", tensors(["x"], 0), config={})
    path = tmp_path / "ft/model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"unet.ema": ["diffusers", "X"]}))
    refused(edit(tmp_path), 3, "may be of unet and of unet.ema")


@pytest.mark.slow
def test_pickles_in_components(tmp_path: Path) -> None:
    """What torch.save wrote is read as safetensors are, and written as these, whether it is edited or kept."""
    write_pair(tmp_path)
    expected = loaded(tmp_path / "ft")
    for side in ("base", "ft"):
        for file in (tmp_path / side).rglob("*.safetensors"):
            stem = "pytorch_model" if file.stem == "model" else file.stem
            torch.save(load_file(file), file.with_name(f"{stem}.bin"))
    edited(tmp_path)
    whole = loaded(tmp_path / "out")
    for side in ("base", "ft"):
        for file in (tmp_path / side).rglob("*.safetensors"):
            file.unlink()
    told = edited(tmp_path, "--force")
    of_diffusers = {f"{name}/diffusion_pytorch_model.safetensors" for name in ("unet", "vae")}
    assert set(told["files"]) == of_diffusers | {"text_encoder/model.safetensors"}
    for name, held in loaded(tmp_path / "out").items():
        same(held, whole[name])
    same(loaded(tmp_path / "out")["vae"], expected["vae"])
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_tokens_of_sentence_transformers(tmp_path: Path) -> None:
    """Rows are paired by token, and the tokenizer gets what is new, as for a transformer by itself."""
    for seed, (side, words) in enumerate((("base", ["<unk>", *WORDS]), ("ft", ["<unk>", *WORDS[::-1], "new"]))):
        write_modules(tmp_path / side, seed)
        held = {"embeddings.word_embeddings.weight": tensors(["w"], seed)["w"].repeat(3, 1)[: len(words)]}
        held |= tensors([f"encoder.layer.{i}.w" for i in range(3)], seed)
        config = {"model_type": "bert", "num_hidden_layers": 3, "vocab_size": len(words)}
        write_checkpoint(tmp_path / side, held, config=config)
        write_tokenizer(tmp_path / side, words)
        shutil.copytree(tmp_path / side, tmp_path / f"plain-{side}")
        (tmp_path / f"plain-{side}/modules.json").unlink()
    edited(tmp_path, "--resize", "ft")
    ran = run_lines("edit", tmp_path / "plain-base", tmp_path / "plain-ft", "-o", tmp_path / "alone", "--resize", "ft")
    assert ran.code == 0, ran.err
    same(loaded(tmp_path / "out")["."], loaded(tmp_path / "alone")["."])
    for name in ("tokenizer.json", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
    assert run_lines("verify", tmp_path / "out").code == 0


# --- one model beside a pipeline ---


@pytest.mark.slow
def test_a_base_that_is_one_component(tmp_path: Path) -> None:
    """It is paired with the component that it is; the others are the fine-tune's. A note says so."""
    write_pair(tmp_path)
    told = edited(tmp_path, base="base/unet")
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    same(out["unet"], scaled(base["unet"], ft["unet"], DEPTHS["unet"]))
    same(out["text_encoder"], ft["text_encoder"])
    assert any("is one model, paired with unet of" in note for note in told["notes"])
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_a_fine_tune_that_is_one_component(tmp_path: Path) -> None:
    """Of the base the same is read, whichever it is; the output is one model."""
    write_pair(tmp_path)
    for name in ("unet", "vae"):
        told = edited(tmp_path, "--force", ft=f"ft/{name}")
        pair = (tmp_path / "base" / name, tmp_path / "ft" / name)
        assert run_lines("edit", *pair, "-o", tmp_path / name).code == 0
        same(loaded(tmp_path / "out")["."], loaded(tmp_path / name)["."])
        assert told["components"] == []
        assert run_lines("verify", tmp_path / "out").code == 0


def test_a_model_that_is_no_component(tmp_path: Path) -> None:
    """The components are listed, with the way out."""
    write_pair(tmp_path)
    write_checkpoint(tmp_path / "other", tensors([f"layers.{i}.w" for i in range(3)], 0), config={})
    refused(edit(tmp_path, base="other"), 4, "none of which it clearly is", "unet text_encoder vae", "ft/unet")
    refused(edit(tmp_path, ft="other"), 4, "none of which it clearly is", "base/unet")
    assert not (tmp_path / "out").exists()


def test_components_that_one_side_has(tmp_path: Path) -> None:
    """Of the fine-tune it is taken as it is; of the base it is left out, for no index names it there."""
    write_pipeline(tmp_path / "base", 0, leave_out=["text_encoder"])
    write_pipeline(tmp_path / "ft", 1, leave_out=["vae"])
    told = edited(tmp_path)
    same(loaded(tmp_path / "out")["text_encoder"], loaded(tmp_path / "ft")["text_encoder"])
    assert not (tmp_path / "out/vae").exists()
    assert any(note.startswith("text_encoder: as the fine-tune has it") for note in told["notes"])
    refused(edit(tmp_path, "--force", "--component", "text_encoder"), 2, "cannot be edited", "text_encoder=keep")
    refused(edit(tmp_path, "--force", "--component", "vae=base"), 2, "which the output is like")


# --- what is refused ---


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--component", "tunet"], ["'tunet'", "unet", "text_encoder", "vae"]),
        (["--component", "scheduler"], ["'scheduler'", "none of that name with weights"]),
        (["--component", "unet", "--component", "unet"], ["each NAME once"]),
        (["--component", "unet="], ["NAME=RULE"]),
        (["--component", "=keep"], ["NAME=RULE"]),
        (["--component", "unet=1,2,3"], ["NAME=RULE"]),
        (["--component", "unet=much"], ["components.unet.alpha", "number"]),
        (["--layers", r"layers\.(?P<index>\d+)"], ["several are edited", "--component unet"]),
        (["--not-layers", "mid_block"], ["several are edited"]),
        (["--series", "down_blocks,up_blocks"], ["several are edited"]),
        (["--filter", "vae.=0.5"], ["matches none"]),
        (["--stack", "vae.decoder.up_blocks=keep"], ["names no stack"]),
        (["--prefix", "nothing."], ["prefix 'nothing.'"]),
        (["--missing", "ft", "--missing-in-blocks", "3"], ["no tensor inside blocks is missing"]),
    ],
)
def test_what_does_not_fit_a_pipeline(flags: list[str], words: list[str], tmp_path: Path) -> None:
    """A name that is not there lists those that are; what is said of depth is said of one component."""
    write_pair(tmp_path)
    ran = edit(tmp_path, *flags)
    refused(ran, 4 if "--prefix" in flags or "--missing" in flags else 2, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("components", "words"),
    [
        ({"unet": "scale"}, ["line", "components.unet", "edit, keep, base"]),
        ({"unet": {"alpah": 0.3}}, ["components.unet.alpah is not a key", "alpha?"]),
        ({"unet": {"filter": {"conv": 1}}}, ["components.unet.filter", "lines.filter"]),
        ({"unet": {"density": 0.2}}, ["density stands under parameters"]),
        ({"unet": {"parameters": {"select": 1}}}, ["components.unet.parameters.select is not a parameter of"]),
        ({"unet": {"schedule": [0.1, 1], "alpha": 0.3}}, ["components.unet", "lists the coefficients"]),
        ({"unet": {"alpha": "auto"}}, ["components.unet.alpha"]),
        ({"unet": 3}, ["components.unet"]),
        ({"": "keep"}, ["empty name"]),
        (["unet"], ["components"]),
    ],
)
def test_a_recipe_that_says_what_cannot_be(components: Any, words: list[str], tmp_path: Path) -> None:
    """Every wrong key is named, with its place."""
    write_pair(tmp_path)
    refused(merge(tmp_path, components=components), 2, *words)


def test_components_of_a_single_model(tmp_path: Path) -> None:
    """They are refused, in an edit, a recipe and an inspection."""
    write_pair(tmp_path)
    refused(edit(tmp_path, "--component", "unet", base="base/unet", ft="ft/unet"), 2, "is one model")
    refused(run_lines("inspect", tmp_path / "ft/unet", "--component", "unet"), 2, "is one model")
    models = {"base_model": "base/unet", "models": [{"model": "ft/unet"}]}
    refused(merge(tmp_path, components={"unet": "keep"}, **models), 2, "is one model")
    of_weights = {"merge_method": "linear", "models": [{"model": "ft", "parameters": {"weight": 1}}], "like": "base"}
    ran = merge(tmp_path, base_model=None, lines=None, components={"vae": "base"}, **of_weights)
    refused(ran, 2, "no base is read")


def test_an_adapter_of_a_pipeline(tmp_path: Path) -> None:
    """An adapter is made of one model; of several the folders are named, and so is what says it of components."""
    write_pair(tmp_path)
    made = {"as_adapter": True, "rank": 2, "like": "base"}
    refused(merge(tmp_path, **made), 3, "holds no weights itself", "unet", "vae")
    refused(merge(tmp_path, components={"unet": "edit"}, **made), 2, "components: that is of whole models")


def test_a_component_that_does_not_fit(tmp_path: Path) -> None:
    """It is named, with the way to leave it as it is, which works."""
    unet = tensors(UNET, 1) | {"conv_in.weight": torch.zeros(4, 9)}
    write_pair(tmp_path, unet=unet)
    refused(edit(tmp_path), 4, "unet: ", "conv_in.weight", "--component text_encoder", "components: {unet: keep}")
    edited(tmp_path, "--component", "text_encoder")
    same(loaded(tmp_path / "out")["unet"], unet)


def test_names_that_are_not_the_same(tmp_path: Path) -> None:
    """Another architecture under the same name is refused as that component's."""
    write_pair(tmp_path, unet={"tensors": tensors([f"transformer_blocks.{i}.w" for i in range(4)], 1)})
    refused(edit(tmp_path), 4, "unet: ", "no tensor in common", "--component text_encoder")


def test_each_config_checks_its_own_depth(tmp_path: Path) -> None:
    """A text encoder with fewer layers than its config says is refused, and named."""
    held = tensors(TEXT[:-1], 1)
    write_pair(tmp_path, text_encoder=held)
    write_checkpoint(tmp_path / "base/text_encoder", held, config=COMPONENTS["text_encoder"][2])
    refused(edit(tmp_path), 4, "text_encoder: ", "holds 3 layers", "num_hidden_layers is 4", "--component unet")
    edited(tmp_path, "--component", "unet")


def test_one_file_for_a_pipeline(tmp_path: Path) -> None:
    """It is refused before anything is written."""
    write_pair(tmp_path)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out.safetensors")
    refused(ran, 2, "is a pipeline", "-o OUT", "ft/unet")


@pytest.mark.slow
def test_a_folder_that_the_index_names_is_missing(tmp_path: Path) -> None:
    """It is refused; but not where nothing of it would be read."""
    write_pair(tmp_path)
    shutil.rmtree(tmp_path / "base/vae")
    edited(tmp_path)
    refused(edit(tmp_path, "--force", "--component", "vae"), 3, "base", "1 folder(s) that are not there", "vae")
    shutil.rmtree(tmp_path / "ft/tokenizer")
    refused(edit(tmp_path, "--force"), 3, "ft", "tokenizer", "incomplete")
    for name in COMPONENTS:
        for file in (tmp_path / "ft" / name).glob("*.safetensors"):
            file.unlink()
    (tmp_path / "ft/tokenizer").mkdir()
    refused(edit(tmp_path, "--force"), 3, "none of the folders", "holds weights")


@pytest.mark.parametrize("name", ["../base", "/etc", "a/b", "..", ".", "a\\b", "", "x\0", "~", "unet/../../base"])
def test_an_index_that_leads_elsewhere(name: str, tmp_path: Path) -> None:
    """A component is a folder beside its index, and nothing else is looked at."""
    write_pair(tmp_path)
    path = tmp_path / "ft/model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: ["diffusers", "X"]}))
    refused(edit(tmp_path), 3, "no folder beside it")


@pytest.mark.parametrize("content", ["", "[]", "3", '{"unet": "unet"}', "{}", '{"unet": [1, 2, 3]}', '{"unet": []}'])
def test_an_index_of_another_form(content: str, tmp_path: Path) -> None:
    """It is refused, and no folder is guessed."""
    write_pair(tmp_path)
    (tmp_path / "ft/model_index.json").write_text(content)
    refused(edit(tmp_path), 3, "ft")


@pytest.mark.parametrize("which", ["unet", "vae", "tokenizer", "unet/config.json", "scheduler/scheduler_config.json"])
def test_links_out_of_the_folder(which: str, tmp_path: Path) -> None:
    """What lies in the folder by its name and elsewhere in truth is not read, and not copied."""
    write_pair(tmp_path)
    path, away = tmp_path / "ft" / which, tmp_path / "away"
    shutil.move(path, away)
    path.symlink_to(away)
    refused(edit(tmp_path), 3, "leaves its folder")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_links_of_weights_and_within(tmp_path: Path) -> None:
    """Weights may lie where their user keeps them, as those of one model may; a link within the folder is followed."""
    write_pair(tmp_path)
    file = tmp_path / "ft/unet/diffusion_pytorch_model.safetensors"
    shutil.move(file, tmp_path / "kept.safetensors")
    file.symlink_to(tmp_path / "kept.safetensors")
    os.rename(tmp_path / "ft/vae", tmp_path / "ft/my_vae")
    (tmp_path / "ft/vae").symlink_to("my_vae")
    edited(tmp_path)
    assert not (tmp_path / "out/vae").is_symlink()
    same(loaded(tmp_path / "out")["vae"], loaded(tmp_path / "ft")["my_vae"])


def test_weights_that_cannot_be_read(tmp_path: Path) -> None:
    """A pickle, a damaged file, an adapter: the component is named."""
    write_pair(tmp_path)
    file = tmp_path / "ft/text_encoder/model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    refused(edit(tmp_path), 3, "text_encoder/model.safetensors")


def test_nan_in_a_component(tmp_path: Path) -> None:
    """It is refused by its full name."""
    held = tensors(UNET, 1)
    held["conv_in.weight"][0, 0] = torch.nan
    write_pair(tmp_path, unet=held)
    ran = edit(tmp_path)
    assert (ran.code, "unet.conv_in.weight" in ran.err, (tmp_path / "out").exists()) == (5, True, False)


# --- what lies beside ---


@pytest.mark.slow
def test_custom_code_is_named_and_not_run(tmp_path: Path) -> None:
    """In the notes and in the model card; of a single model, too."""
    write_pair(tmp_path)
    told = edited(tmp_path)
    (note,) = [note for note in told["notes"] if "custom code" in note]
    assert note.endswith(": pipeline.py, unet/my_unet.py")
    card = (tmp_path / "out/README.md").read_text()
    assert "`pipeline.py`, `unet/my_unet.py`" in card
    assert "library_name: diffusers" in card
    edited(tmp_path, "--force", base="base/unet", ft="ft/unet")
    assert "`my_unet.py`" in (tmp_path / "out/README.md").read_text()


def test_what_is_not_carried_over(tmp_path: Path) -> None:
    """Other weights, pickles and folders that the index does not name stay behind; what may be missed is named."""
    write_pair(tmp_path)
    ft = tmp_path / "ft"
    write_checkpoint(ft / "v1-5-pruned.safetensors", tensors(["x"], 0))
    write_checkpoint(ft / "pytorch_lora_weights.safetensors", tensors(["y"], 0))
    write_checkpoint(ft / "controlnet", tensors(["z"], 0), config={})
    (ft / "unet/diffusion_pytorch_model.bin").write_bytes(b"x")
    (ft / "vae/optimizer.pt").write_bytes(b"x")
    (ft / "images").mkdir()
    told = edited(tmp_path)
    names = {name for name, content in snapshot(tmp_path / "out").items() if content is not None}
    assert not [name for name in names if "lora" in name or name.endswith((".bin", ".pt")) or "controlnet" in name]
    (note,) = [note for note in told["notes"] if "not carried over" in note]
    assert [word for word in ("v1-5-pruned", "lora", "controlnet/") if word not in note] == []
    assert "images" not in note


@pytest.mark.slow
def test_force_replaces_what_is_ours(tmp_path: Path) -> None:
    """A copy of the pipeline, or an earlier output; a stranger's file in any of its folders is left, and named."""
    write_pair(tmp_path)
    shutil.copytree(tmp_path / "ft", tmp_path / "out")
    refused(edit(tmp_path), 6, "exists")
    edited(tmp_path, "--force")
    first = snapshot(tmp_path / "out")
    edited(tmp_path, "--force")
    assert snapshot(tmp_path / "out") == first
    (tmp_path / "out/vae/mine.txt").write_text("mine")
    (tmp_path / "out/notes").mkdir()
    refused(edit(tmp_path, "--force"), 6, "vae/mine.txt", "notes/")
    assert (tmp_path / "out/vae/mine.txt").read_text() == "mine"


@pytest.mark.slow
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was finished of any component is kept, and the rest is made; else nothing of it is left."""
    from lines_cli.storage.files import NewFile

    write_pair(tmp_path)
    edited(tmp_path)
    whole = snapshot(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    write, written = NewFile.write, []

    def writing(file: NewFile, view: memoryview, offset: int) -> None:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(offset)
        write(file, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "write", writing)
        assert edit(tmp_path, "--workers", 1).code == 130
    assert (tmp_path / ".out.lines").exists()
    told = edited(tmp_path, "--resume")
    assert told["resumed"] > 0
    assert {n: c for n, c in snapshot(tmp_path / "out").items() if n != "lines_recipe.yaml"} == {
        n: c for n, c in whole.items() if n != "lines_recipe.yaml"
    }
    assert edit(tmp_path, "--resume", "--verify").code == 0
    shutil.rmtree(tmp_path / "out")
    written.clear()
    with monkeypatch.context() as patch:
        patch.setattr(NewFile, "write", writing)
        edit(tmp_path, "--workers", 1)
    assert run_lines("clean", tmp_path / "out").code == 0
    assert sorted(os.listdir(tmp_path)) == ["base", "ft"]


@pytest.mark.slow
def test_verify_finds_what_was_changed(tmp_path: Path) -> None:
    """In any folder: another byte, a file that is missing, and one that is not of it."""
    write_pair(tmp_path)
    edited(tmp_path)
    path = tmp_path / "out/vae/diffusion_pytorch_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    (tmp_path / "out/scheduler/scheduler_config.json").unlink()
    (tmp_path / "out/unet/evil.py").write_text("")
    ran = run_lines("verify", tmp_path / "out", "--json")
    assert ran.code == 5
    wrong = {file["name"]: file["difference"] for file in ran.json["files"] if not file["same"]}
    assert wrong.keys() == {"vae/diffusion_pytorch_model.safetensors", "scheduler/scheduler_config.json"}
    assert wrong["vae/diffusion_pytorch_model.safetensors"]["tensor"].startswith("vae.")
    assert ran.json["unexpected"] == ["unet/evil.py"]


# --- to look at ---


@pytest.mark.slow
def test_inspect_shows_every_component(tmp_path: Path) -> None:
    """Alone and against a base: each with its stacks, its size and its update; a VAE has 1 throughout."""
    write_pair(tmp_path)
    alone = run_lines("inspect", tmp_path / "ft", "--json").json
    sizes = {one["name"]: one["tensors"] for one in alone["components"]}
    assert sizes == {"unet": 15, "text_encoder": 6, "vae": 4}
    first = {stack["name"]: stack["first"] for stack in alone["stacks"]}
    assert first["vae.decoder.up_blocks"] == 1
    assert first["text_encoder.text_model.encoder.layers"] == pytest.approx(0.1)
    report = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", "--json").json
    base, ft = loaded(tmp_path / "base"), loaded(tmp_path / "ft")
    for one in report["fine_tunes"][0]["components"]:
        name = one["name"]
        update = torch.cat([(ft[name][n].double() - base[name][n].double()).flatten() for n in ft[name]])
        assert one["update_norm"] == pytest.approx(update.norm().item())
    assert report["not_compared"] == []
    shown = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base")
    assert [word for word in ("by model", "unet", "text_encoder", "vae") if word not in shown.out] == []


@pytest.mark.slow
def test_inspect_with_components_named(tmp_path: Path) -> None:
    """The coefficients are those of an edit with the same option; and those of an output, of its recipe."""
    write_pair(tmp_path)
    edited(tmp_path, "--component", "unet=0.3", "--component", "text_encoder=base")
    options = ("--component", "unet=0.3", "--component", "text_encoder=base")
    for ran in (
        run_lines("inspect", tmp_path / "ft", "--json", *options),
        run_lines("inspect", tmp_path / "out", "--json"),
    ):
        ends = {stack["name"].partition(".")[0]: (stack["first"], stack["last"]) for stack in ran.json["stacks"]}
        assert ends == {"unet": (pytest.approx(0.3), 1), "text_encoder": (0, 0), "vae": (1, 1)}
    assert run_lines("inspect", tmp_path / "out", "--check").code == 0
    compared = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base/unet", "--json").json
    assert {row["tensor"].partition(".")[0] for row in compared["not_compared"]} == {"text_encoder", "vae"}


def test_coefficients_of_a_pipeline(tmp_path: Path) -> None:
    """By the full name of each tensor; those of what is not scaled are 1."""
    found = lines.coefficients(write_pipeline(tmp_path / "ft", 1))
    assert found["unet.down_blocks.0.resnets.0.conv1.weight"] == pytest.approx(0.1)
    assert found["unet.up_blocks.2.resnets.0.conv1.weight"] == 1
    assert {value for name, value in found.items() if name.startswith("vae.")} == {1}


@pytest.mark.slow
def test_a_call_from_python(tmp_path: Path) -> None:
    """`component` takes what a recipe says, or the option's texts."""
    base, ft = write_pair(tmp_path)
    lines.edit(base, ft, tmp_path / "a", component={"unet": {"alpha": 0.3}, "*": "keep"})
    lines.edit(base, ft, tmp_path / "b", component=["unet=0.3"])
    assert {n: c for n, c in snapshot(tmp_path / "a").items() if n.endswith(".safetensors")} == {
        n: c for n, c in snapshot(tmp_path / "b").items() if n.endswith(".safetensors")
    }


# --- sentence-transformers ---


@pytest.mark.slow
@pytest.mark.parametrize("within", ["", "0_Transformer"])
def test_modules_of_sentence_transformers(within: str, tmp_path: Path) -> None:
    """The transformer by its own depth, wherever it lies; a dense layer as what lies outside the blocks; the rest is
    carried over.
    """
    write_modules(tmp_path / "base", 0, within=within)
    write_modules(tmp_path / "ft", 1, within=within, more={"config_sentence_transformers.json": "{}"})
    (tmp_path / "ft/2_Dense/more").mkdir()
    (tmp_path / "ft/2_Dense/more/vocab.txt").write_text("a")
    told = edited(tmp_path)
    base, ft, out = (loaded(tmp_path / side) for side in ("base", "ft", "out"))
    layers = [[f"encoder.layer.{i}."] for i in range(3)]
    same(out[within or "."], scaled(base[within or "."], ft[within or "."], layers))
    same(out["2_Dense"], scaled(base["2_Dense"], ft["2_Dense"], []))
    carried = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json", "2_Dense/more/vocab.txt")
    for name in (*carried, f"{within}/tokenizer.json".lstrip("/"), "config_sentence_transformers.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "ft" / name).read_bytes()
    assert any(note.startswith("2_Dense: it has no layers") for note in told["notes"])
    assert run_lines("verify", tmp_path / "out").code == 0
    edited(tmp_path, "--force", "--outside", "position")
    same(loaded(tmp_path / "out")["2_Dense"], ft["2_Dense"])  # it runs behind the blocks
    edited(tmp_path, "--force", "--component", "0_Transformer")
    same(loaded(tmp_path / "out")["2_Dense"], ft["2_Dense"])


@pytest.mark.slow
def test_a_transformer_as_the_base_of_modules(tmp_path: Path) -> None:
    """It is paired with theirs, wherever that lies; the other modules are the fine-tune's."""
    write_modules(tmp_path / "base", 0)
    write_modules(tmp_path / "ft", 1, within="0_Transformer")
    edited(tmp_path)
    out = loaded(tmp_path / "out")
    layers = [[f"encoder.layer.{i}."] for i in range(3)]
    expected = scaled(loaded(tmp_path / "base")["."], loaded(tmp_path / "ft")["0_Transformer"], layers)
    same(out["0_Transformer"], expected)
    (tmp_path / "base/modules.json").unlink()
    edited(tmp_path, "--force")
    out = loaded(tmp_path / "out")
    same(out["0_Transformer"], expected)
    same(out["2_Dense"], loaded(tmp_path / "ft")["2_Dense"])
    assert run_lines("verify", tmp_path / "out").code == 0


def test_modules_in_one_file(tmp_path: Path) -> None:
    """It holds the transformer alone, and a note says so."""
    for seed, side in enumerate(("base", "ft")):
        write_modules(tmp_path / side, seed)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert load_file(tmp_path / "out.safetensors").keys() == loaded(tmp_path / "ft")["."].keys()
    assert any("without 2_Dense" in note for note in ran.json["notes"])


@pytest.mark.slow
def test_modules_that_lie_deeper_or_elsewhere(tmp_path: Path) -> None:
    """A module's path of several folders is one; a link out of the folder is refused."""
    for seed, side in enumerate(("base", "ft")):
        folder = write_modules(tmp_path / side, seed)
        (folder / "more").mkdir()
        os.rename(folder / "2_Dense", folder / "more/dense")
        modules = json.loads((folder / "modules.json").read_text())
        modules[2]["path"] = "more/dense"
        (folder / "modules.json").write_text(json.dumps(modules))
    edited(tmp_path)
    base, ft, out = (loaded(tmp_path / side)["more/dense"] for side in ("base", "ft", "out"))
    same(out, scaled(base, ft, []))
    edited(tmp_path, "--force")
    assert sorted(os.listdir(tmp_path)) == ["base", "ft", "out"]
    shutil.move(tmp_path / "ft/more/dense", tmp_path / "away")
    (tmp_path / "ft/more/dense").symlink_to(tmp_path / "away")
    refused(edit(tmp_path, "--force"), 3, "leaves its folder")


# --- one file with everything ---

_UNET, _VAE, _TEXT, _OTHERS = EVERYTHING.values()
SDXL = {
    "model.diffusion_model.": _UNET,
    "first_stage_model.": _VAE,
    "conditioner.embedders.0.transformer.": _TEXT,
    "conditioner.embedders.1.model.": [f"transformer.resblocks.{i}.mlp.w" for i in range(4)],
    "": ["denoiser.sigmas"],
}
FLUX = {
    "model.diffusion_model.": [f"{kind}_blocks.{i}.w" for kind in ("double", "single") for i in range(3)],
    "vae.": _VAE,
    "text_encoders.clip_l.transformer.": _TEXT,
    "text_encoders.t5xxl.transformer.": [f"encoder.block.{i}.layer.0.w" for i in range(3)],
}


def write_files(tmp_path: Path, parts: Mapping[str, Sequence[str]]) -> None:
    for seed, side in enumerate(("base", "ft")):
        write_everything(tmp_path / f"{side}.safetensors", seed, parts)


@pytest.mark.parametrize(
    ("parts", "names"),
    [
        (SDXL, ["unet", "vae", "text_encoder", "text_encoder_2", "others"]),
        (EVERYTHING, ["unet", "vae", "text_encoder", "others"]),
        (FLUX, ["transformer", "vae", "text_encoder", "text_encoder_2"]),
    ],
    ids=["sdxl", "sd1", "flux"],
)
def test_one_file_with_everything(parts: Mapping[str, Sequence[str]], names: list[str], tmp_path: Path) -> None:
    """Its components are known by what their names begin with; the VAE is as the fine-tune has it; each stack has its
    own depth, and the file its own names.
    """
    write_files(tmp_path, parts)
    pair = (tmp_path / "base.safetensors", tmp_path / "ft.safetensors")
    ran = run_lines("edit", *pair, "-o", tmp_path / "out.safetensors", "--json")
    assert ran.code == 0, ran.err
    assert sorted(one["name"] for one in ran.json["components"]) == sorted(names)
    base, ft = map(load_file, pair)
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == ft.keys()
    for name, tensor in out.items():
        if name.startswith(("vae.", "first_stage_model.")):
            assert torch.equal(tensor, ft[name])
    text = next(prefix for prefix in parts if "encoder.layers.0" in parts[prefix][0])
    layers = [[f"{text}text_model.encoder.layers.{i}."] for i in range(4)]
    expected = scaled(base, ft, layers)
    same(
        {n: t for n, t in out.items() if n.startswith(text)}, {n: t for n, t in expected.items() if n.startswith(text)}
    )
    only = names[0]
    ran = run_lines("edit", *pair, "-o", tmp_path / "out.safetensors", "--force", "--component", only)
    assert ran.code == 0, ran.err
    alone = load_file(tmp_path / "out.safetensors")
    changed = {name.partition(".diffusion_model.")[0] for name in alone if not torch.equal(alone[name], ft[name])}
    assert changed == {"model"}
    same({n: alone[n] for n in alone if n.startswith("model.")}, {n: out[n] for n in out if n.startswith("model.")})


def test_depth_by_hand_of_one_file(tmp_path: Path) -> None:
    """An expression is searched for in all of its names, whatever component they are of."""
    write_files(tmp_path, EVERYTHING)
    pair = (tmp_path / "base.safetensors", tmp_path / "ft.safetensors")
    layers = r"(?P<stack>\w+)_blocks\.(?P<index>\d+)\."
    ran = run_lines("edit", *pair, "-o", tmp_path / "out.safetensors", "--json", "--layers", layers)
    assert ran.code == 0, ran.err
    assert {stack["name"]: stack["layers"] for stack in ran.json["stacks"]} == {"input": 3, "output": 3}


@pytest.mark.parametrize("whole", ["base", "ft"])
def test_a_file_of_one_component_beside_one_of_all(whole: str, tmp_path: Path) -> None:
    """It is paired with that component, whichever side has the others; the output has what the fine-tune has."""
    write_files(tmp_path, EVERYTHING)
    other = "ft" if whole == "base" else "base"
    unet = {name: t for name, t in load_file(tmp_path / f"{other}.safetensors").items() if name.startswith("model.")}
    write_checkpoint(tmp_path / f"{other}.safetensors", unet)
    pair = (tmp_path / "base.safetensors", tmp_path / "ft.safetensors")
    ran = run_lines("edit", *pair, "-o", tmp_path / "out.safetensors")
    assert ran.code == 0, ran.err
    base, ft = map(load_file, pair)
    out = load_file(tmp_path / "out.safetensors")
    assert out.keys() == ft.keys()
    first, middle = (f"model.diffusion_model.{name}" for name in ("input_blocks.0.0.w", "middle_block.0.w"))
    assert torch.equal(out[first], base[first] + torch.tensor(0.1) * (ft[first] - base[first]))
    assert torch.equal(out[middle], base[middle] + torch.tensor(0.1 + 0.9 * 3 / 6) * (ft[middle] - base[middle]))
    assert [name for name in out if not name.startswith("model.") and not torch.equal(out[name], ft[name])] == []


def test_a_file_beside_a_folder(tmp_path: Path) -> None:
    """The same model in two layouts is refused, with the way to convert it."""
    write_pair(tmp_path)
    write_files(tmp_path, EVERYTHING)
    refused(edit(tmp_path, ft="ft.safetensors"), 4, "one file with everything", "save_pretrained")
    refused(edit(tmp_path, base="base.safetensors"), 4, "one file with everything", "save_pretrained")
