"""What is refused has a way out, and the message says which: tensors of other shapes and kinds, strangers' files."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lines_cli.errors import CheckpointError
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.recipe.validate import edit_recipe
from support.files import write_checkpoint
from support.run import run_lines

VIT = {"model_type": "vit", "num_hidden_layers": 4}
BLOCK = "vit.encoder.layer.1.output.dense.weight"


def vit(seed: int, classes: int = 10, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A vision transformer of four blocks of width 4, with a classifier of so many classes."""
    g = torch.Generator().manual_seed(seed)
    model = {"vit.embeddings.cls_token": torch.randn(1, 1, 4, generator=g)}
    model |= {"classifier.weight": torch.randn(classes, 4, generator=g), "classifier.bias": torch.randn(classes)}
    for i in range(4):
        model[f"vit.encoder.layer.{i}.output.dense.weight"] = torch.randn(4, 4, generator=g)
    return model | more


def write_pair(tmp: Path, base: dict[str, torch.Tensor], ft: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """Two folders."""
    return (
        write_checkpoint(tmp / "base", base, config=VIT),
        write_checkpoint(tmp / "ft", ft, config=VIT),
    )


def merge_file(tmp: Path, text: str) -> Path:
    """A recipe beside the checkpoints."""
    (tmp / "m.yaml").write_text(text)
    return tmp / "m.yaml"


# --- a tensor of another shape or kind ---


@pytest.mark.parametrize(
    ("flags", "whose"),
    [
        (("--filter", "classifier=keep"), "ft"),
        (("--filter", "classifier=1"), "ft"),
        (("--missing", "ft"), "ft"),
        (("--missing", "copy"), "ft"),
        (("--outside", "keep"), "ft"),
        (("--outside", "position"), "ft"),
        (("--filter", "classifier=base"), "base"),
        (("--filter", "classifier=0"), "base"),
        (("--outside", "base"), "base"),
    ],
)
def test_a_replaced_classifier(flags: tuple[str, ...], whose: str, tmp_path: Path) -> None:
    """One side's head as it is, the blocks by the formula, and a note that says so."""
    sides = {"base": vit(0, 1000), "ft": vit(50, 10)}
    ran = run_lines("edit", *write_pair(tmp_path, **sides), "-o", tmp_path / "out", *flags, "--json")
    assert ran.code == 0, ran.err
    out = load_file(tmp_path / "out/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(out[name], sides[whose][name])
    expected = sides["base"][BLOCK] + 0.4 * (sides["ft"][BLOCK] - sides["base"][BLOCK])
    assert torch.allclose(out[BLOCK], expected, atol=1e-6)
    said = next(note for note in ran.json["notes"] if "do not fit together" in note)
    assert "classifier.weight: [1000, 4] and [10, 4]" in said
    assert ("does it fit?" in said) is (whose == "base")
    assert run_lines("verify", tmp_path / "out").code == 0


def test_the_refusal_names_the_ways_out(tmp_path: Path) -> None:
    """What it offers works as it stands, and matches no tensor that fits."""
    folders = write_pair(tmp_path, vit(0, 1000), vit(1))
    ran = run_lines("edit", *folders, "-o", tmp_path / "out")
    assert (ran.code, "another model" in ran.err) == (4, False)
    assert "--filter classifier=keep" in ran.err
    assert "--filter classifier=base" in ran.err
    assert "--missing ft" in ran.err
    # A module whose name is part of others' is not offered, but its tensor is.
    odd = {"vit.weight": torch.ones(3)}, {"vit.weight": torch.ones(2)}
    ran = run_lines("edit", *write_pair(tmp_path, vit(0) | odd[0], vit(1) | odd[1]), "-o", tmp_path / "out")
    assert "--filter vit.weight=keep" in ran.err


NAMES = {
    "distilbert": ("pre_classifier.weight", "classifier.weight", "classifier.bias"),
    "a module called like those in blocks": ("vit.encoder.layer.0.mlp.fc.weight", "fc.weight", "fc.bias"),
    "the end of another's name": ("overhead.weight", "head.weight", "head.bias"),
    "a name of its own": ("other.weight", "head.weight", "head.bias"),
}


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_no_hint_names_what_fits(names: tuple[str, ...], tmp_path: Path) -> None:
    """Each command in the hint, run as it stands, leaves the coefficients of all tensors that fit as they are."""
    fits, *replaced = names

    def model(seed: int, classes: int) -> dict[str, torch.Tensor]:
        chance = torch.Generator().manual_seed(seed)
        own = {fits: torch.randn(4, 4, generator=chance)}
        own |= {name: torch.randn(classes, *(() if "bias" in name else (4,))) for name in replaced}
        return {name: tensor for name, tensor in vit(seed).items() if "classifier" not in name} | own

    base, ft = model(0, 7), model(1, 3)
    folders = write_pair(tmp_path, base, ft)
    ran = run_lines("edit", *folders, "-o", tmp_path / "out")
    assert ran.code == 4
    hint = ran.err.partition("hint: ")[2]
    ways = [re.findall(r"--(?:filter|missing|outside) \S+", line) for line in hint.splitlines() if " takes " in line]
    assert ways
    expected = base[BLOCK] + 0.4 * (ft[BLOCK] - base[BLOCK])
    first = base[fits] + 0.1 * (ft[fits] - base[fits])
    for way in [[one for one in line if one.startswith("--filter")] or line[:1] for line in ways]:
        flags = [word for one in way for word in shlex.split(one.rstrip(".,;"))]
        assert run_lines("edit", *folders, "-o", tmp_path / "out", "--force", *flags).code == 0, flags
        out = load_file(tmp_path / "out/model.safetensors")
        assert torch.allclose(out[BLOCK], expected, atol=1e-6), flags
        assert torch.allclose(out[fits], first, atol=1e-6), flags
        assert out[replaced[0]].shape[0] == (7 if any("=base" in flag for flag in flags) else 3)


def test_another_shape_within_a_block(tmp_path: Path) -> None:
    """--missing ft does not reach into blocks, a filter and a layer's coefficient of 1 do."""
    name = "vit.encoder.layer.3.output.dense.weight"
    base, ft = vit(0), vit(1) | {name: torch.ones(5, 4)}
    folders = write_pair(tmp_path, base, ft)
    other = "vit.encoder.layer.2.output.dense.weight"
    assert run_lines("edit", *folders, "-o", tmp_path / "last").code == 0  # alpha + beta is 1
    assert torch.equal(load_file(tmp_path / "last/model.safetensors")[name], ft[name])
    folders = write_pair(tmp_path, base, vit(1) | {other: torch.ones(5, 4)})
    ran = run_lines("edit", *folders, "-o", tmp_path / "out", "--missing", "ft")
    assert ran.code == 4
    assert "--filter vit.encoder.layer.2.output.dense=keep" in ran.err
    assert "--missing ft" not in ran.err
    way = ("--filter", "vit.encoder.layer.2.output.dense=keep")
    assert run_lines("edit", *folders, "-o", tmp_path / "out", *way).code == 0


@pytest.mark.parametrize("name", ["attn.relative_position_bias_table", "attn.rel_pos", "rel_pos", "output.dense.gain"])
@pytest.mark.parametrize("rule", ["keep", "base"])
def test_another_shape_in_every_block(name: str, rule: str, tmp_path: Path) -> None:
    """As where a Swin was fine-tuned with larger windows: one filter names the tensors of all blocks, and no others."""

    def model(seed: int, rows: int) -> dict[str, torch.Tensor]:
        chance = torch.Generator().manual_seed(seed)
        each = {
            f"swin.layers.{i}.{part}": torch.randn(n, 4, generator=chance)
            for i in range(12)
            for part, n in ((name, rows), ("attn.qkv.weight", 4), ("output.dense.weight", 4))
        }
        return each | {"head.weight": torch.randn(rows, 4, generator=chance)}

    base, ft = model(0, 5), model(1, 9)
    folders = write_pair(tmp_path, base, ft)
    ran = run_lines("edit", *folders, "-o", tmp_path / "out")
    assert ran.code == 4
    flags = shlex.split(re.findall(rf"((?:--filter \S+={rule} ?)+)", ran.err.replace("\n  ", " "))[0])
    assert len(flags) == 4
    ran = run_lines("edit", *folders, "-o", tmp_path / "out", *flags)
    assert ran.code == 0, ran.err
    for key, tensor in load_file(tmp_path / "out/model.safetensors").items():
        layer = re.search(r"\d+", key)
        if base[key].shape == ft[key].shape:
            coefficient = 0.1 + 0.9 * int(layer[0]) / 11 if layer else 0.1
            assert torch.allclose(tensor, torch.lerp(base[key], ft[key], coefficient), atol=1e-5), key
        else:
            assert torch.equal(tensor, (ft if rule == "keep" else base)[key]), key


def test_matrices_that_are_transposed(tmp_path: Path) -> None:
    """No filter is offered: square matrices would be mixed with their own transposes, and no shape shows it."""

    def model(seed: int, *, transposed: bool) -> dict[str, torch.Tensor]:
        chance = torch.Generator().manual_seed(seed)
        each = {
            f"h.{i}.{name}.weight": torch.randn(shape, generator=chance)
            for i in range(4)
            for name, shape in (("attn.c_proj", (4, 4)), ("mlp.c_fc", (4, 8)), ("ln", (4,)))
        }
        return {
            name: tensor.T.contiguous() if transposed and tensor.ndim == 2 else tensor for name, tensor in each.items()
        }

    ran = run_lines(
        "edit", *write_pair(tmp_path, model(0, transposed=False), model(1, transposed=True)), "-o", tmp_path / "out"
    )
    assert (ran.code, "transposed" in ran.err, "--filter" in ran.err) == (4, True, False)
    folders = write_pair(tmp_path, vit(0) | {"x.w": torch.ones(2, 3)}, vit(1) | {"x.w": torch.ones(3, 2)})
    ran = run_lines("edit", *folders, "-o", tmp_path / "out")  # one alone is rather another module
    assert (ran.code, "--filter x.w=keep" in ran.err or "--filter x=keep" in ran.err) == (4, True)


def test_most_tensors_of_other_shapes(tmp_path: Path) -> None:
    """Then the question is whether it is one model at all."""
    wider = {name: torch.cat([tensor, tensor]) for name, tensor in vit(1).items()}
    ran = run_lines("edit", *write_pair(tmp_path, vit(0), wider), "-o", tmp_path / "out")
    assert (ran.code, "of one model?" in ran.err) == (4, True)


@pytest.mark.parametrize("rule", ["keep", "base"])
def test_whole_numbers_against_floats(rule: str, tmp_path: Path) -> None:
    """A counter that one side stores as float16 is either side's, in that side's dtype."""
    ids = torch.arange(5).reshape(1, 5)
    base, ft = vit(0) | {"vit.position_ids": ids}, vit(1) | {"vit.position_ids": ids.half() * 0.999}
    folders = write_pair(tmp_path, base, ft)
    assert run_lines("edit", *folders, "-o", tmp_path / "no").code == 4
    assert run_lines("edit", *folders, "-o", tmp_path / "out", "--filter", f"position_ids={rule}").code == 0
    got = load_file(tmp_path / "out/model.safetensors")["vit.position_ids"]
    expected = (ft if rule == "keep" else base)["vit.position_ids"]
    assert (got.dtype, torch.equal(got, expected)) == (expected.dtype, True)


@pytest.mark.parametrize(
    ("said", "whose"),
    [
        ("missing: ft", "a"),
        ("missing: copy", "base"),
        ("lines: {alpha: 0.5, beta: 0.5, filter: {classifier: base}}", "base"),
        ("parameters: {weight: [{filter: classifier, value: 0}, {value: 1}]}", "base"),
    ],
)
def test_a_merge_with_a_replaced_classifier(said: str, whose: str, tmp_path: Path) -> None:
    """The same in a recipe's words."""
    sides = {"base": vit(0, 1000), "a": vit(1, 10), "b": vit(2, 7)}
    for name, model in sides.items():
        write_checkpoint(tmp_path / name, model, config=VIT)
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    refused = run_lines("merge", "--config", merge_file(tmp_path, recipe), "-o", tmp_path / "out")
    assert (refused.code, "missing: ft" in refused.err, "value: 0" in refused.err) == (4, True, True)
    ran = run_lines("merge", "--config", merge_file(tmp_path, recipe + said + "\n"), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["classifier.weight"], sides[whose]["classifier.weight"])


def test_one_model_has_all_the_weight_of_a_head(tmp_path: Path) -> None:
    """Without a base, a filter of 0 for the other model keeps this one's head, whatever its shape."""
    sides = {"a": vit(1, 10), "b": vit(2, 7)}
    for name, model in sides.items():
        write_checkpoint(tmp_path / name, model, config=VIT)
    weight = "[{filter: classifier, value: 0}, {value: 1}]"
    models = f"models:\n- {{model: a, parameters: {{weight: {weight}}}}}\n- {{model: b, parameters: {{weight: 1}}}}\n"
    ran = run_lines(
        "merge", "--config", merge_file(tmp_path, f"merge_method: linear\n{models}"), "-o", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["classifier.weight"], sides["b"]["classifier.weight"])
    assert torch.allclose(got[BLOCK], (sides["a"][BLOCK] + sides["b"][BLOCK]) / 2, atol=1e-6)


def test_empty_weights(tmp_path: Path) -> None:
    """Placeholders of size 0 are called empty, and no option passes them off as a fine-tune's."""
    ft = {name: torch.zeros(0) if "dense" in name else tensor for name, tensor in vit(1).items()}
    for flags in ((), ("--missing", "ft"), ("--outside", "keep")):
        ran = run_lines("edit", *write_pair(tmp_path, vit(0), ft), "-o", tmp_path / "out", *flags)
        assert (ran.code, "4 of 7 tensors" in ran.err, "empty" in ran.err, "ZeRO" in ran.err) == (4, True, True, True)


# --- files that are not what they seem ---

LLAMA = {"model_type": "llama", "num_hidden_layers": 4}
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n"


def layers(seed: int, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Four layers of width 4."""
    g = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.mlp.weight": torch.randn(4, 4, generator=g) for i in range(4)} | more


@pytest.mark.parametrize(
    "file", ["model.safetensors", "config.json", "tokenizer.model", "model.safetensors.index.json"]
)
def test_a_git_lfs_pointer(file: str, tmp_path: Path) -> None:
    """Weights, a config, an index and a file that is only copied are called pointers, with the command to run."""
    write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    ft = write_checkpoint(tmp_path / "ft", layers(1), config=LLAMA, shards=2 if "index" in file else 1)
    (ft / file).write_text(POINTER)
    ran = run_lines("edit", tmp_path / "base", ft, "-o", tmp_path / "out")
    assert (ran.code, f"{file}: a Git LFS pointer" in ran.err, "git lfs pull" in ran.err) == (3, True, True)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("where", ["base", "ft"])
def test_a_quantisation_config_left_behind(where: str, tmp_path: Path) -> None:
    """Whole weights are edited, a note says so, and no config of the output claims otherwise."""
    said = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    for seed, side in enumerate(("base", "ft")):
        config = LLAMA | said | {"text_config": said} if side == where else LLAMA
        more = {"model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
        write_checkpoint(tmp_path / side, layers(seed, **more), config=config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert any("says quantised (bitsandbytes)" in note for note in ran.json["notes"])
    assert "quantization" not in (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize(
    "more",
    [
        {"model.layers.0.mlp.packed": torch.ones(4, 2, dtype=torch.int32)},
        {"model.layers.0.mlp.weight.absmax": torch.ones(4)},
        {"model.layers.0.mlp.codebooks": torch.ones(4)},
        {"model.layers.0.mlp.w_q": torch.ones(4, 4, dtype=torch.int16)},
        {"model.layers.0.mlp2.dense_weights": torch.ones(64, dtype=torch.int64)},  # SpQR's are one run
    ],
)
def test_a_quantisation_config_that_is_true(more: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With codes or scales among the weights it is refused, and names one of them."""
    config = LLAMA | {"quantization_config": {"quant_method": "x"}}
    for seed, side in enumerate(("base", "ft")):
        write_checkpoint(tmp_path / side, layers(seed, **more), config=config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert (ran.code, "is quantised" in ran.err, next(iter(more)) in ran.err) == (3, True, True)


def shards_of_a_variant(folder: Path, variant: str, seed: int, *, new: bool) -> None:
    """Two shards and their index, as diffusers names them, in its new or its old way."""
    write_checkpoint(folder, layers(seed), config=LLAMA, shards=2)
    text = (folder / "model.safetensors.index.json").read_text()
    for number in (1, 2):
        old, part = f"model-0000{number}-of-00002.safetensors", f"-0000{number}-of-00002"
        named = f"model{part}.{variant}.safetensors" if new else f"model.{variant}{part}.safetensors"
        text = text.replace(old, named)
        (folder / old).rename(folder / named)
    (folder / "model.safetensors.index.json").unlink()
    (folder / f"model.safetensors.index.{variant}.json").write_text(text)


@pytest.mark.parametrize("new", [True, False])
def test_shards_of_a_variant(new: bool, tmp_path: Path) -> None:
    """The only set is taken; the output has the names that loaders look for."""
    write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    shards_of_a_variant(tmp_path / "ft", "fp16", 1, new=new)
    out = tmp_path / "out"
    assert run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", out).code == 0
    last = "model.layers.3.mlp.weight"
    assert torch.equal(load_file(out / "model.safetensors")[last], layers(1)[last])
    assert run_lines("verify", out).code == 0
    (tmp_path / "ft/model.safetensors.index.fp16.json").unlink()
    assert run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", out, "--force").code == 3


@pytest.mark.slow
def test_a_variant_is_inspected(tmp_path: Path) -> None:
    """`inspect` takes the variant that an edit takes, alone and against a base, and refuses one that nothing has."""
    write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    for seed, stem in ((0, "model.fp16"), (2, "model.ema")):
        write_checkpoint(tmp_path / "ft", layers(seed), config=LLAMA, stem=stem)
    base, ft = tmp_path / "base", tmp_path / "ft"
    assert run_lines("inspect", ft).code == 3
    changed = {}
    for variant in ("fp16", "ema"):
        assert run_lines("inspect", ft, "--variant", variant).code == 0
        ran = run_lines("inspect", ft, "--base", base, "--variant", variant, "--json")
        changed[variant] = ran.json["fine_tunes"][0]["update_norm"]
        assert ran.json["merge"]["variant"] == variant
    assert (changed["fp16"] == 0, changed["ema"] > 0) == (True, True)
    for against in ((), ("--base", base)):
        ran = run_lines("inspect", base, *against, "--variant", "bf16")
        assert (ran.code, "variant bf16: no input has" in ran.err) == (3, True), ran.err
    ran = run_lines("inspect", ft, "--variant", "../ema")
    assert (ran.code, ran.trace, "variant" in ran.err) == (2, "", True)
    recipe = merge_file(tmp_path, "base_model: base\nmodels: [{model: ft}]\nvariant: ema\n")
    assert run_lines("inspect", "--config", recipe).code == 0
    ran = run_lines("inspect", "--config", recipe, "--variant", "fp16")
    assert (ran.code, "--config already gives" in ran.err) == (2, True)


@pytest.mark.slow
def test_several_variants(tmp_path: Path) -> None:
    """Which one is meant has to be said; where there is one without a variant, that is meant."""
    write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    for seed, stem in ((1, "model.fp16"), (2, "model.ema")):
        write_checkpoint(tmp_path / "ft", layers(seed), config=LLAMA, stem=stem)
    ft, out, last = tmp_path / "ft", tmp_path / "out.safetensors", "model.layers.3.mlp.weight"
    ran = run_lines("edit", tmp_path / "base", ft, "-o", out)
    assert (ran.code, "ema\n" in ran.err, "--variant ema" in ran.err) == (3, True, True)
    for seed, variant in ((1, "fp16"), (2, "ema")):
        ran = run_lines("edit", tmp_path / "base", ft, "-o", out, "--variant", variant, "--force")
        assert ran.code == 0, ran.err
        assert torch.equal(load_file(out)[last], layers(seed)[last])
    ran = run_lines("edit", tmp_path / "base", ft, "-o", out, "--variant", "bf16", "--force")
    assert (ran.code, "ema\n" in ran.err) == (3, True)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "base", "-o", out, "--variant", "bf16", "--force")
    assert (ran.code, "variant bf16: no input has" in ran.err) == (3, True)
    recipe = merge_file(tmp_path, "base_model: base\nmodels: [{model: ft}]\nvariant: ema\n")
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "folder").code == 0
    assert torch.equal(load_file(tmp_path / "folder/model.safetensors")[last], layers(2)[last])
    assert run_lines("verify", tmp_path / "folder").code == 0
    write_checkpoint(ft, layers(3), config=LLAMA)
    assert run_lines("edit", tmp_path / "base", ft, "-o", out, "--force").code == 0
    assert torch.equal(load_file(out)[last], layers(3)[last])


def test_an_index_as_an_argument(tmp_path: Path) -> None:
    """It stands for its folder: config and tokenizer come along, and the recipe makes the same again."""
    write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    ft = write_checkpoint(tmp_path / "ft", layers(1), config=LLAMA | {"of": "ft"}, shards=2)
    write_checkpoint(ft, layers(2), stem="other")
    out = tmp_path / "out"
    ran = run_lines("edit", tmp_path / "base", ft / "model.safetensors.index.json", "-o", out)
    assert ran.code == 0, ran.err
    assert json.loads((out / "config.json").read_text())["of"] == "ft"
    assert run_lines("verify", out).code == 0
    refused = run_lines("edit", tmp_path / "base", ft / "model.safetensors.index.json", "-o", ft, "--force")
    assert (refused.code, "replace an input" in refused.err) == (6, True)


@pytest.mark.slow
def test_a_complex_buffer(tmp_path: Path) -> None:
    """The same on both sides it is copied; else an error, unless one side's is asked for."""
    table = torch.ones(5, dtype=torch.complex64)
    base = write_checkpoint(tmp_path / "base", layers(0, freqs_cis=table), config=LLAMA)
    ft = write_checkpoint(tmp_path / "ft", layers(1, freqs_cis=table), config=LLAMA)
    assert run_lines("edit", base, ft, "-o", tmp_path / "out").code == 0
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["freqs_cis"], table)
    write_checkpoint(ft, layers(1, freqs_cis=2j * table), config=LLAMA)
    for flags in ((), ("--dry-run",)):
        ran = run_lines("edit", base, ft, "-o", tmp_path / "no", *flags)
        assert (ran.code, "freqs_cis: complex numbers, and not the same" in ran.err) == (4, True)
        assert "--filter freqs_cis=keep" in ran.err
        assert not (tmp_path / "no").exists()
    for rule, expected in (("keep", 2j * table), ("base", table)):
        ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--filter", f"freqs={rule}", "--force")
        assert ran.code == 0, ran.err
        assert torch.equal(load_file(tmp_path / "out/model.safetensors")["freqs_cis"], expected)


@pytest.mark.slow
@pytest.mark.parametrize("at", [0, 2**17 + 1, 3 * 2**17 - 1])
def test_complex_buffers_are_compared_while_planning(at: int, tmp_path: Path) -> None:
    """Wherever they differ, of every input of a merge, and before anything is measured or written."""
    table = torch.ones(3 * 2**17, dtype=torch.complex64)
    other = table.clone()
    other[at] = 2j
    for seed, side in enumerate(("base", "a", "b")):
        write_checkpoint(tmp_path / side, layers(seed, freqs_cis=other if side == "b" else table), config=LLAMA)
    text = "base_model: base\nmodels: [{model: a}, {model: b}]\nlines: {alpha: 0.1, beta: 0.9%s}\n"
    recipe = merge_file(tmp_path, text % "")
    ran = run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--dry-run")
    assert (ran.code, "freqs_cis: complex numbers, and not the same" in ran.err) == (4, True), ran.err
    assert 'lines.filter: {"freqs_cis": base}' in ran.err
    recipe = merge_file(tmp_path, text % ", filter: {freqs_cis: base}")
    ran = run_lines("merge", "--config", recipe, "-o", tmp_path / "out")
    assert (ran.code, "freqs_cis" in ran.err) == (0, True), ran.err
    assert torch.equal(load_file(tmp_path / "out/model.safetensors")["freqs_cis"], table)
    assert run_lines("verify", tmp_path / "out").code == 0
    text = (
        "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: base, parameters: {weight: 1}}]\n"
    )
    recipe = merge_file(tmp_path, text)
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--force").code == 0


def test_a_complex_buffer_that_is_cut(tmp_path: Path) -> None:
    """An input that ends early, because it was cut since its header was read, is an error with its name."""
    table = torch.ones(5, dtype=torch.complex64)
    base = write_checkpoint(tmp_path / "base.safetensors", {"t.0.w": table, "t.1.w": torch.ones(2)})
    ft = write_checkpoint(tmp_path / "ft.safetensors", {"t.0.w": table, "t.1.w": torch.ones(2)})
    recipe = edit_recipe(str(base), str(ft))
    inputs = open_inputs(recipe)
    os.truncate(ft, ft.stat().st_size - 44)
    with pytest.raises(CheckpointError, match=r"ft.safetensors ends early"):
        make_plan(recipe, inputs, tmp_path / "out")
    ft.unlink()
    with pytest.raises(CheckpointError, match=r"ft.safetensors: cannot be read"):
        make_plan(recipe, inputs, tmp_path / "out")


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,), (2, 0, 3)])
def test_a_tensor_that_is_empty_on_all_sides(shape: tuple[int, ...], tmp_path: Path) -> None:
    """It is copied as the fine-tune has it, whatever its shape in the base, in blocks and outside, with one note."""
    there = {"extra": torch.zeros(0, 4), "model.layers.1.none": torch.zeros(0, 4), "ids": torch.zeros(0, 4).int()}
    empty = {name: torch.zeros(shape, dtype=tensor.dtype) for name, tensor in there.items()}
    base = write_checkpoint(tmp_path / "base", layers(0, **there), config=LLAMA)
    ft = write_checkpoint(tmp_path / "ft", layers(1, **empty), config=LLAMA)
    ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    (note,) = (note for note in ran.json["notes"] if "empty" in note)
    assert note.startswith("3 tensor(s) are empty (size 0) in all inputs, and copied\n"), note
    out = load_file(tmp_path / "out/model.safetensors")
    assert {name: (out[name].shape, out[name].dtype) for name in empty} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in empty.items()
    }
    assert ran.json["copied"]["tensors"] >= 3
    assert run_lines("verify", tmp_path / "out").code == 0


def test_models_that_are_empty(tmp_path: Path) -> None:
    """Of inputs in which most tensors hold nothing the note asks whether they were saved without their weights."""
    nothing = {f"model.layers.{i}.w": torch.zeros(0) for i in range(4)}
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, nothing | {"norm.weight": torch.ones(3)}, config=LLAMA)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert (ran.code, "4 tensor(s) are empty" in ran.err, "without their weights?" in ran.err) == (0, True, True)


def test_a_folder_of_the_hubs_cache(tmp_path: Path) -> None:
    """Its snapshots are named, and each can be given."""
    folders = write_pair(tmp_path, vit(0), vit(1))
    cached = tmp_path / "models--org--name"
    (cached / "snapshots").mkdir(parents=True)
    shutil.move(folders[1], cached / "snapshots" / "abc")
    ran = run_lines("edit", folders[0], cached, "-o", tmp_path / "out")
    assert (ran.code, f"{cached}/snapshots/abc" in ran.err.replace("\n  ", "")) == (3, True)
    assert run_lines("edit", folders[0], cached / "snapshots" / "abc", "-o", tmp_path / "out").code == 0


def test_a_pipeline_of_components(tmp_path: Path) -> None:
    """Where its index names none, those that are there are named, and one of them is edited."""
    for seed, side in enumerate(("p0", "p1")):
        for component in ("transformer", "vae"):
            write_checkpoint(tmp_path / side / component, layers(seed), stem="diffusion_pytorch_model", config={})
        (tmp_path / side / "model_index.json").write_text("{}")
        (tmp_path / side / "scheduler").mkdir()
    ran = run_lines("edit", tmp_path / "p0", tmp_path / "p1", "-o", tmp_path / "out")
    assert (ran.code, "  transformer\n  vae\n" in ran.err.replace("      ", "  ")) == (3, True), ran.err
    pair = (tmp_path / "p0/transformer", tmp_path / "p1/transformer")
    assert run_lines("edit", *pair, "-o", tmp_path / "out").code == 0


@pytest.mark.parametrize("name", ["out.pt", "out.bin", "OUT.PTH", "out.ckpt", "out.gguf", "out.safetensor"])
def test_an_output_of_another_format(name: str, tmp_path: Path) -> None:
    """Nothing is written into a folder of that name."""
    base = write_checkpoint(tmp_path / "base", layers(0), config=LLAMA)
    ran = run_lines("edit", base, base, "-o", tmp_path / name)
    assert (ran.code, "safetensors" in ran.err, (tmp_path / name).exists()) == (2, True, False)


def test_check_finds_empty_weights(tmp_path: Path) -> None:
    """Exit code 5, with their number and names."""
    path = write_checkpoint(tmp_path / "x", layers(0) | {"model.layers.1.mlp.weight": torch.zeros(0)}, config=LLAMA)
    ran = run_lines("inspect", path, "--check", "--json")
    assert (ran.code, ran.json["health"][0]["empty"]) == (5, ["model.layers.1.mlp.weight"])
    assert "tensors of size 0: 1" in ran.err


# --- mergekit's files ---


def two_models(tmp: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Models `a` and `b` with an embedding."""
    sides = {name: layers(seed, **{"model.embed.weight": torch.ones(3, 4) * seed}) for seed, name in enumerate("ab")}
    for name, tensors in sides.items():
        write_checkpoint(tmp / name, tensors, config=LLAMA)
    return sides


def sources(first: int, end: int, *, of_b: str = "") -> str:
    return f"sources: [{{model: a, layer_range: [{first}, {end}]}}, {{model: b, layer_range: [{first}, {end}]{of_b}}}]"


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (("{weight: 0.2}", "{weight: 0.8}"), [0.2, 0.8, 0.8, 0.8]),
        (("{weight: 0.5}", "{weight: [0, 0.5, 1]}"), [0.5, 0.0, 0.5, 1.0]),
        (("{weight: 0.5}", "{weight: 0.5}"), [0.5] * 4),
        (
            ("{weight: [{filter: mlp, value: 0.1}, {value: 7}]}", "{weight: [{filter: mlp, value: 0.3}, {value: 9}]}"),
            [0.1, 0.3, 0.3, 0.3],
        ),
    ],
)
def test_slices_that_together_hold_whole_models(
    parameters: tuple[str, str], expected: list[float], tmp_path: Path
) -> None:
    """Each layer has its slice's parameters, by the plain sum of the weights."""
    sides = two_models(tmp_path)
    text = "merge_method: linear\nparameters: {normalize: false}\nslices:\n"
    for (first, end), said in zip(((0, 1), (1, 4)), parameters, strict=True):
        text += f"- {sources(first, end, of_b=', parameters: ' + said)}\n  parameters: {{weight: 1}}\n"
    out = tmp_path / "out"
    ran = run_lines("merge", "--config", merge_file(tmp_path, text), "-o", out, "--json")
    assert ran.code == 0, ran.err
    got = load_file(out / "model.safetensors")
    for i, weight in enumerate(expected):
        name = f"model.layers.{i}.mlp.weight"
        assert torch.allclose(got[name], sides["a"][name] + weight * sides["b"][name], atol=1e-6), name
    assert run_lines("verify", out).code == 0


TWO = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (("const_tag: &A a\nmerge_method: linear\nmodels: [{model: *A, parameters: &P {weight: 1}}, "
         "{model: b, parameters: *P}]\n"), "const_tag holds"),
        (("shared: {of: [1, &W 0.5]}\nmerge_method: linear\nmodels: [{model: a, parameters: {weight: *W}}, "
         "{model: b, parameters: {weight: *W}}]\n"), "shared holds"),
        ("name: mine\nmerge_method: linear\n" + TWO, "name is accepted"),
        ("trust_remote_code: true\nmerge_method: linear\n" + TWO, "trust_remote_code is accepted"),
        (("merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
         "parameters: {t: 0.5, embed_slerp: true}\n"), "embed_slerp is accepted"),
    ],
)  # fmt: skip
def test_keys_without_effect_here(text: str, said: str, tmp_path: Path) -> None:
    """mergekit runs such files; each such key is a note."""
    sides = two_models(tmp_path)
    ran = run_lines("merge", "--config", merge_file(tmp_path, text), "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert [note for note in ran.json["notes"] if said in note]
    if "linear" in text:
        name = "model.layers.1.mlp.weight"
        expected = (sides["a"][name] + sides["b"][name]) / 2
        assert torch.allclose(load_file(tmp_path / "out/model.safetensors")[name], expected, atol=1e-6)


@pytest.mark.parametrize("key", ["paramters: &P {weight: 1}", "other: {weight: 1}", "alias: *A", "modls: &P []"])
def test_an_unknown_key_without_an_anchor_is_still_one(key: str, tmp_path: Path) -> None:
    """An anchor excuses no key that is a letter off, and an alias no other."""
    two_models(tmp_path)
    text = f"merge_method: &A linear\n{key}\n{TWO}"
    ran = run_lines("merge", "--config", merge_file(tmp_path, text), "-o", tmp_path / "out")
    assert (ran.code, f"{key.partition(':')[0]} is not a key" in ran.err) == (2, True)


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
def test_a_source_as_it_was_written_before(key: str, tmp_path: Path) -> None:
    """`model:b` is model b."""
    two_models(tmp_path)
    for side in "ab":
        (tmp_path / side / "tokenizer.json").write_text(side)
        (tmp_path / side / "chat_template.jinja").write_text(side)
    text = f"merge_method: linear\n{key}: 'model:b'\n{TWO}"
    assert run_lines("merge", "--config", merge_file(tmp_path, text), "-o", tmp_path / "out").code == 0
    file = "tokenizer.json" if key == "tokenizer_source" else "chat_template.jinja"
    assert (tmp_path / "out" / file).read_text() == "b"


def test_a_tokenizer_source_where_there_is_none(tmp_path: Path) -> None:
    """If no input has a tokenizer a note says so; if another has, the name was wrong."""
    two_models(tmp_path)
    path = merge_file(tmp_path, f"merge_method: linear\ntokenizer_source: a\n{TWO}")
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out", "--json")
    assert (ran.code, "tokenizer_source says nothing" in str(ran.json["notes"])) == (0, True)
    (tmp_path / "b/tokenizer.json").write_text("b")
    assert run_lines("merge", "--config", path, "-o", tmp_path / "out", "--force").code == 3


# --- a letter off ---


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("alpa: 1", "lines.alpha"),
        ("scheduel: linear", "lines.schedule"),
        ("densty: 1", "parameters.density"),
        ("nomalize: true", "parameters.normalize"),
        ("parameters: {outsid: 1}", "lines.outside"),
        ("parameters: {wieght: 1}", "weight"),
        ("lines: {alpha: 1, beta: 0, weigth: 1}", "parameters.weight"),
        ("lines: {alpha: 1, beta: 0, dtyp: float32}", "dtype"),
    ],
)
def test_a_key_that_is_a_letter_off(said: str, meant: str, tmp_path: Path) -> None:
    """Wherever it stands, and wherever the right one would."""
    two_models(tmp_path)
    text = f"base_model: a\nmodels: [{{model: b}}]\n{said}\n"
    ran = run_lines("merge", "--config", merge_file(tmp_path, text), "-o", tmp_path / "out")
    assert (ran.code, f"did you mean {meant}?" in " ".join(ran.err.split())) == (2, True), ran.err


def test_a_filter_that_is_a_letter_off(tmp_path: Path) -> None:
    """It matches nothing, and the message names the nearest part of a name."""
    ran = run_lines("edit", *write_pair(tmp_path, vit(0), vit(1)), "-o", tmp_path / "out", "--filter", "clasifier=keep")
    assert (ran.code, "did you mean classifier?" in " ".join(ran.err.split())) == (2, True)
