"""The inputs of a merge as they come: tensors that some lack, other shapes, odd dtypes, NaN and Inf, bad files."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from lines_cli.checkpoint.header import lay_out
from support.bits import raw
from support.files import snapshot, without_staging, write_checkpoint
from support.run import Ran, as_nobody, run_lines

Tensors = dict[str, torch.Tensor]

NAN, INF = float("nan"), float("inf")
WIDTH = 4


def tensors(seed: int = 0, *, rows: int = 6, **changes: torch.Tensor | None) -> Tensors:
    """A model of three layers, an embedding and a norm, untied; `layers_1_w=None` leaves one out."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"embed_tokens.weight": (rows, WIDTH), **{f"layers.{i}.w": (5, 7) for i in range(3)}, "norm": (3,)}
    model: dict[str, torch.Tensor | None] = {n: torch.randn(shape, generator=random) for n, shape in shapes.items()}
    model |= {
        key.replace("_", ".") if key.startswith("layers") else key.replace("__", "."): value
        for key, value in changes.items()
    }
    return {name: value for name, value in model.items() if value is not None}


def write(tmp_path: Path, *, configs: dict[str, Any] | None = None, **models: Tensors) -> None:
    """Write each model to a folder of its name."""
    for name, model in models.items():
        write_checkpoint(tmp_path / name, model, config=(configs or {}).get(name))


def merge(tmp_path: Path, *flags: object, models: Iterable[str] = ("a", "b"), out: str = "out", **recipe: Any) -> Ran:
    """Run `lines merge` on a recipe in `tmp_path`: task arithmetic on `base` unless it says otherwise."""
    values = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": m} for m in models]}
    values |= recipe
    text = yaml.safe_dump({key: value for key, value in values.items() if value is not None})
    (tmp_path / "merge.yaml").write_text(text)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / out, "--device", "cpu", *flags)
    assert not ran.trace, ran.trace
    assert ran.code != 1
    return ran


def output(tmp_path: Path, out: str = "out") -> Tensors:
    path = tmp_path / out
    return load_file(path if path.is_file() else path / "model.safetensors")


def total(base: torch.Tensor, *models: torch.Tensor, c: float = 1.0) -> torch.Tensor:
    """`base + c * sum(model - base)` in float32, rounded once to the base's dtype."""
    taus = [model.float() - base.float() for model in models]
    merged = taus[0]
    for tau in taus[1:]:
        merged = merged + tau
    return (base.float() + (merged if c == 1 else c * merged)).to(base.dtype)


def trimmed(taus: torch.Tensor, density: float) -> torch.Tensor:
    """[N, n] task vectors, each with only the entries at or above its k-th largest magnitude (TIES, step 1)."""
    k = max(1, int(density * taus.shape[1]))
    threshold = taus.abs().topk(k, dim=1).values[:, -1:]
    return torch.where(taus.abs() >= threshold, taus, torch.zeros(()))


def by_ties(base: Tensors, *models: Tensors, density: float) -> Tensors:
    """TIES as published, over the whole flattened model, with weights and lambda of 1."""
    flat = torch.cat([tensor.flatten() for tensor in base.values()])
    taus = torch.stack([torch.cat([m[name].flatten() for name in base]) - flat for m in models])
    taus = trimmed(taus, density)
    sign = taus.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    sign[sign == 0] = -1
    agree = taus * sign > 0
    merged = (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = (flat + merged).split([tensor.numel() for tensor in base.values()])
    return {name: part.view(base[name].shape) for name, part in zip(base, parts, strict=True)}


def same(got: Tensors, expected: Tensors) -> None:
    """The same names, dtypes, shapes and bytes."""
    assert got.keys() == expected.keys()
    assert [n for n in got if got[n].shape != expected[n].shape or got[n].dtype != expected[n].dtype] == []
    assert [n for n in got if raw(got[n]) != raw(expected[n])] == []


def refused(ran: Ran, code: int, *words: object) -> None:
    """It ended with this code, an error that has all of the words, and nothing on stdout."""
    assert (ran.code, ran.out) == (code, ""), ran.err
    assert "error: " in ran.err
    assert [word for word in words if str(word) not in ran.err] == []


# --- tensors that some lack ---

OWNERS = ["base", "a", "b", "base a", "base b", "a b"]


@pytest.mark.parametrize("missing", ["error", "copy", "ft", "skip"])
@pytest.mark.parametrize("name", ["layers.1.extra", "pooler"])
@pytest.mark.parametrize("owners", OWNERS)
def test_a_tensor_that_some_lack(owners: str, name: str, missing: str, tmp_path: Path) -> None:
    """It is refused, copied from the first that has it, the same if a model has it, or left out; others are merged.
    Inside a block `missing` alone does not settle it.
    """
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    for seed, side in enumerate(owners.split()):
        models[side][name] = torch.full((4,), float(seed))
    write(tmp_path, **models)
    before = snapshot(tmp_path)
    inside = {"missing_in_blocks": 1} if name.startswith("layers") else {}
    ran = merge(tmp_path, missing=missing, **inside)
    if missing == "error":
        lacking = [side for side in models if side not in owners.split()]
        way_out = "missing_in_blocks: 1" if inside else "missing: copy"
        refused(ran, 4, name, way_out, *(f"that {tmp_path / side} lacks" for side in lacking))
        (tmp_path / "merge.yaml").unlink()
        assert snapshot(tmp_path) == before
        return
    assert ran.code == 0, ran.err
    assert name in ran.err
    expected = {n: total(models["base"][n], models["a"][n], models["b"][n]) for n in tensors()}
    if missing == "copy" or (missing == "ft" and owners != "base"):
        expected[name] = torch.full((4,), 0.0)
    same(output(tmp_path), expected)


@pytest.mark.parametrize("owner", ["a", "b"])
def test_a_layer_that_one_model_has_more(owner: str, tmp_path: Path) -> None:
    """A fourth layer of one model alone is copied with missing: copy, and the depth of the others counts it."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    models[owner]["layers.3.w"] = torch.ones(5, 7)
    write(tmp_path, **models)
    ran = merge(tmp_path, "--json", missing="copy", missing_in_blocks=1, lines={"alpha": 0.0, "beta": 0.75})
    assert ran.code == 0, ran.err
    assert ran.json["stacks"][0]["layers"] == 4
    got = output(tmp_path)
    assert raw(got["layers.3.w"]) == raw(torch.ones(5, 7))
    one, two = models["a"]["layers.2.w"], models["b"]["layers.2.w"]
    assert raw(got["layers.2.w"]) == raw(total(models["base"]["layers.2.w"], one, two, c=0.5))
    assert raw(got["layers.0.w"]) == raw(models["base"]["layers.0.w"])


def test_nothing_in_common_of_three(tmp_path: Path) -> None:
    """Three models without one common name are refused whatever `missing` says, and the message names all of them."""
    write(
        tmp_path, base={"layers.0.x": torch.ones(2)}, a={"layers.0.y": torch.ones(2)}, b={"layers.0.z": torch.ones(2)}
    )
    for missing in ("error", "skip"):
        names = [tmp_path / side for side in ("base", "a", "b")]
        refused(merge(tmp_path, missing=missing), 4, *names)


def test_without_a_base_the_first_model_leads(tmp_path: Path) -> None:
    """With linear a tensor that only later models have is copied from the first of these, in that one's dtype."""
    models = {side: tensors(seed) for seed, side in enumerate("abc")}
    models["b"]["pooler"] = torch.ones(4, dtype=torch.bfloat16)
    models["c"]["pooler"] = torch.zeros(4)
    write(tmp_path, **models)
    ran = merge(tmp_path, models="abc", merge_method="linear", base_model=None, missing="copy")
    assert ran.code == 0, ran.err
    expected = {n: (models["a"][n] + models["b"][n] + models["c"][n]) / 3 for n in models["a"]}
    same(output(tmp_path), expected | {"pooler": models["b"]["pooler"]})


# --- tied heads ---

TIED, UNTIED = ({"model_type": "llama", "tie_word_embeddings": value} for value in (True, False))


def with_head(seed: int) -> Tensors:
    return tensors(seed, lm_head__weight=torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(seed + 50)))


@pytest.mark.parametrize("tied", ["a", "b", "ab"])
def test_an_untied_base_and_a_tied_model(tied: str, tmp_path: Path) -> None:
    """A model whose config ties the head has its embedding for a head, whichever of the models it is."""
    models = {"base": with_head(0), "a": with_head(1), "b": with_head(2)}
    heads = {side: model["lm_head.weight"] for side, model in models.items()}
    for side in tied:
        heads[side] = models[side]["embed_tokens.weight"]
        del models[side]["lm_head.weight"]
    write(tmp_path, configs={side: TIED if side in tied else UNTIED for side in models}, **models)
    ran = merge(tmp_path)
    assert ran.code == 0, ran.err
    assert [side for side in tied if f"is not in {tmp_path / side}, whose config ties it" not in ran.err] == []
    expected = {n: total(*(models[side][n] for side in ("base", "a", "b"))) for n in tensors()}
    same(output(tmp_path), expected | {"lm_head.weight": total(heads["base"], heads["a"], heads["b"])})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == UNTIED


@pytest.mark.parametrize("owners", ["a", "b", "ab"])
def test_a_tied_base_and_a_model_with_a_head(owners: str, tmp_path: Path) -> None:
    """A head of some models that the base's config ties is left out with a word about it; the output is tied, too."""
    models = {"base": tensors(0), "a": tensors(1), "b": tensors(2)}
    for side in owners:
        models[side] = with_head(int(side == "b") + 1)
    write(tmp_path, configs={side: UNTIED if side in owners else TIED for side in models}, **models)
    ran = merge(tmp_path)
    assert ran.code == 0, ran.err
    assert "lm_head.weight is not in the base" in ran.err
    same(output(tmp_path), {n: total(*(models[side][n] for side in ("base", "a", "b"))) for n in tensors()})
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == TIED


def test_a_head_that_no_config_ties(tmp_path: Path) -> None:
    """Among lone files, of which none says anything of ties, a head that one lacks is missing."""
    for side, model in (("base", with_head(0)), ("a", with_head(1)), ("b", tensors(2))):
        write_checkpoint(tmp_path / f"{side}.safetensors", model)
    ran = merge(tmp_path, base_model="base.safetensors", models=["a.safetensors", "b.safetensors"])
    refused(ran, 4, "lm_head.weight", "b.safetensors lacks", "missing: copy")


def test_one_tied_and_one_without(tmp_path: Path) -> None:
    """Where one model's head is its embedding and another has none at all, missing: copy takes the base's own head."""
    models = {"base": with_head(0), "a": tensors(1), "b": tensors(2)}
    write(tmp_path, configs={"base": UNTIED, "a": UNTIED, "b": TIED}, **models)
    refused(merge(tmp_path), 4, "lm_head.weight", f"{tmp_path / 'a'} lacks")
    assert merge(tmp_path, missing="copy").code == 0
    assert raw(output(tmp_path)["lm_head.weight"]) == raw(models["base"]["lm_head.weight"])


# --- prefixes ---


def renamed(model: Tensors, prefix: str) -> Tensors:
    return {f"{prefix}{name}": tensor for name, tensor in model.items()}


@pytest.mark.parametrize("wrapped", ["base", "a", "b", "ab", "base b"])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_one_model_saved_inside_another(method: str, wrapped: str, tmp_path: Path) -> None:
    """GPT-2 as `h.0` and as `transformer.h.0` merge to the same values, under the base's names, and it is said."""
    models = {
        side: {name.replace("layers", "h"): tensor for name, tensor in tensors(seed).items()}
        for seed, side in enumerate(("base", "a", "b"))
    }
    inside = wrapped.replace("ab", "a b").split()
    prefix = "transformer."
    write(tmp_path, **{side: renamed(m, prefix) if side in inside else m for side, m in models.items()})
    ran = merge(tmp_path, "--json", merge_method=method, lines={"alpha": 0.5, "beta": 0.5, "outside": "keep"})
    assert ran.code == 0, ran.err
    assert any(prefix in note for note in ran.json["notes"])
    assert ran.json["stacks"][0]["layers"] == 3
    write(tmp_path / "plain", **models)
    again = merge(tmp_path / "plain", merge_method=method, lines={"alpha": 0.5, "beta": 0.5, "outside": "keep"})
    assert (again.code, prefix in again.err) == (0, False)
    expected = output(tmp_path / "plain")
    same(output(tmp_path), renamed(expected, prefix) if "base" in inside else expected)


def test_a_prefix_and_a_head_beside_it(tmp_path: Path) -> None:
    """A bare model, and one inside another beside a head that the bare one's config ties, are one model."""
    config = {"model_type": "gpt2", "tie_word_embeddings": True}
    body = [
        {"wte.weight": m["embed_tokens.weight"], **{f"h.{i}.w": m[f"layers.{i}.w"] for i in range(3)}}
        for m in map(tensors, range(3))
    ]
    head = {"lm_head.weight": torch.ones(6, WIDTH)}
    inside = renamed(body[2], "transformer.") | head
    write(tmp_path, configs=dict.fromkeys(("base", "a", "b"), config), base=body[0], a=body[1], b=inside)
    ran = merge(tmp_path)
    assert ran.code == 0, ran.err
    assert "lm_head.weight" in ran.err
    same(output(tmp_path), {n: total(body[0][n], body[1][n], body[2][n]) for n in body[0]})


def test_a_head_without_the_prefix_on_both_sides(tmp_path: Path) -> None:
    """Where one of three has its body without the prefix and its head by the same name, the heads are paired, too."""
    wrapped = [
        renamed({f"h.{i}.w": m[f"layers.{i}.w"] for i in range(3)}, "transformer.") | {"head": m["norm"]}
        for m in map(tensors, range(3))
    ]
    bare = {name.removeprefix("transformer."): tensor for name, tensor in wrapped[2].items()}
    write(tmp_path, base=wrapped[0], a=wrapped[1], b=bare)
    ran = merge(tmp_path)
    assert ran.code == 0, ran.err
    same(output(tmp_path), {n: total(*(model[n] for model in wrapped)) for n in wrapped[0]})


def test_a_prefix_and_a_buffer_of_one_side(tmp_path: Path) -> None:
    """A long name that the wrapped model lacks does not hide the prefix: only that tensor is missing."""
    body = [{f"h.{i}.w": m[f"layers.{i}.w"] for i in range(3)} for m in map(tensors, range(3))]
    buffer = {"h.0.attention.masked_bias_of_long_name": torch.ones(1)}
    write(tmp_path, base=body[0] | buffer, a=body[1] | buffer, b=renamed(body[2], "transformer."))
    ran = merge(tmp_path, missing="skip", missing_in_blocks=1)
    assert ran.code == 0, ran.err
    same(output(tmp_path), {n: total(*(model[n] for model in body)) for n in body[0]})


# --- rows of a vocabulary ---

NEEDS = {
    "nothing": ("task_arithmetic", {}, None),
    "norms": ("average", {}, {"beta": 0.5}),
    "thresholds": ("ties", {"density": 0.5}, None),
    "thresholds by tensor": ("ties", {"density": 0.5, "trim": "tensor"}, None),
    "signs and norms": ("ties", {}, {"beta": 0.5}),
    "L1 norms": ("dare_linear", {"density": 0.5, "rescale": "l1"}, None),
    "consensus": ("consensus", {"on": "ties", "density": 0.5}, {"beta": 0.5}),
}
SIZES = [(6, 8, 10), (10, 8, 6), (8, 6, 10), (8, 10, 6)]


@pytest.mark.parametrize("keep", ["base", "ft"])
@pytest.mark.parametrize(
    ("needs", "sizes"),
    [
        pytest.param(needs, sizes, marks=() if at % len(SIZES) == number else pytest.mark.slow)
        for at, needs in enumerate(NEEDS)
        for number, sizes in enumerate(SIZES)
    ],
    ids=str,
)
def test_rows_that_all_have_are_merged(needs: str, sizes: tuple[int, int, int], keep: str, tmp_path: Path) -> None:
    """Rows that all have are merged as in models of that many rows; further rows of the kept side are its own."""
    method, parameters, lines = NEEDS[needs]
    models = {
        side: tensors(seed, rows=rows) for seed, (side, rows) in enumerate(zip(("base", "a", "b"), sizes, strict=True))
    }
    least, name = min(sizes), "embed_tokens.weight"
    write(tmp_path, **models)
    write(tmp_path / "least", **{side: model | {name: model[name][:least].clone()} for side, model in models.items()})
    recipe = {"merge_method": method, "parameters": parameters, "lines": lines}
    ran = merge(tmp_path, resize=keep, **recipe)
    assert ran.code == 0, ran.err
    assert merge(tmp_path / "least", **recipe).code == 0
    expected = output(tmp_path / "least")
    kept = models["base" if keep == "base" else "a"][name]
    same(output(tmp_path), expected | {name: torch.cat([expected[name], kept[least:]])})


def test_rows_of_two_with_slerp(tmp_path: Path) -> None:
    """With slerp the angle is that of the rows both have; the first model's further rows are copied."""
    models = {"a": tensors(1, rows=10), "b": tensors(2, rows=6)}
    write(tmp_path, **models)
    ran = merge(tmp_path, merge_method="slerp", base_model=None, parameters={"t": 0.25}, resize="ft")
    assert ran.code == 0, ran.err
    a, b = (model["embed_tokens.weight"][:6].double() for model in models.values())
    phi = torch.acos((a * b).sum() / a.norm() / b.norm())
    merged = ((0.75 * phi).sin() * a + (0.25 * phi).sin() * b) / phi.sin()
    got = output(tmp_path)["embed_tokens.weight"]
    torch.testing.assert_close(got[:6].double(), merged, rtol=1e-5, atol=1e-6)
    assert raw(got[6:]) == raw(models["a"]["embed_tokens.weight"][6:])


@pytest.mark.parametrize("sizes", [(6, 8, 8), (8, 8, 6), (6, 6, 8)], ids=str)
def test_rows_that_differ_are_refused(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Without resize: the shapes of all three are named, and the way out."""
    write(
        tmp_path,
        **{s: tensors(i, rows=rows) for i, (s, rows) in enumerate(zip(("base", "a", "b"), sizes, strict=True))},
    )
    shapes = " and ".join(f"[{rows}, {WIDTH}]" for rows in sizes)
    refused(merge(tmp_path), 4, "embed_tokens.weight", shapes, "resize: base or resize: ft", tmp_path / "b")


def rows_of(config: Any) -> list[int]:
    return [config["vocab_size"], config["text_config"]["vocab_size"]]


@pytest.mark.parametrize("keep", ["base", "ft"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_vocab_size_and_tokenizer_follow_the_rows(sizes: tuple[int, int, int], keep: str, tmp_path: Path) -> None:
    """The config is the base's with the number of rows kept; tokenizer and ids are those of the input that has them."""
    configs = {
        side: {"model_type": side, "vocab_size": n, "pad_token_id": n - 1, "text_config": {"vocab_size": n}}
        for side, n in zip(("base", "a", "b"), sizes, strict=True)
    }
    write(tmp_path, configs=configs, **{s: tensors(0, rows=n) for s, n in zip(("base", "a", "b"), sizes, strict=True)})
    for side in configs:
        (tmp_path / side / "tokenizer.json").write_text(side)
    ran = merge(tmp_path, resize=keep)
    assert ran.code == 0, ran.err
    whose = "base" if keep == "base" else "a"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    rows = configs[whose]["vocab_size"]
    assert (config["model_type"], rows_of(config), config["pad_token_id"]) == ("base", [rows, rows], rows - 1)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == whose


@pytest.mark.parametrize("keep", ["base", "ft"])
def test_vocab_size_in_a_borrowed_config(keep: str, tmp_path: Path) -> None:
    """A config that only the last model has, with a number of rows that no kept side has, follows the rows kept."""
    write_checkpoint(tmp_path / "base.safetensors", tensors(0, rows=6))
    write_checkpoint(tmp_path / "a.safetensors", tensors(1, rows=8))
    config = {"model_type": "x", "vocab_size": 10, "text_config": {"vocab_size": 10}}
    write_checkpoint(tmp_path / "b", tensors(2, rows=10), config=config)
    ran = merge(tmp_path, base_model="base.safetensors", models=["a.safetensors", "b"], resize=keep)
    assert ran.code == 0, ran.err
    rows = 6 if keep == "base" else 8
    assert output(tmp_path)["embed_tokens.weight"].shape[0] == rows
    assert rows_of(json.loads((tmp_path / "out" / "config.json").read_text())) == [rows, rows]


@pytest.mark.parametrize(("keep", "source", "fits"), [
    ("base", "a", False), ("base", "b", False), ("base", "base", True), ("ft", "base", False), ("ft", "b", False),
    ("ft", "a", True),
])  # fmt: skip
def test_a_tokenizer_of_other_rows_is_refused(keep: str, source: str, fits: bool, tmp_path: Path) -> None:
    """With three vocabularies only the tokenizer of the input whose rows are kept can go with them."""
    write(tmp_path, **{side: tensors(0, rows=rows) for side, rows in (("base", 6), ("a", 8), ("b", 10))})
    for side in ("base", "a", "b"):
        (tmp_path / side / "tokenizer.json").write_text(side)
    ran = merge(tmp_path, resize=keep, tokenizer_source=source)
    if fits:
        assert ran.code == 0, ran.err
        assert (tmp_path / "out" / "tokenizer.json").read_text() == source
    else:
        refused(ran, 2, "tokenizer_source", tmp_path / source)


# --- shapes and dtypes ---


@pytest.mark.parametrize("odd", ["base", "a", "b"])
@pytest.mark.parametrize("resize", ["error", "ft"])
@pytest.mark.parametrize("shape", [(5, 8), (35,), (1, 5, 7)], ids=str)
def test_another_shape_is_refused(shape: tuple[int, ...], resize: str, odd: str, tmp_path: Path) -> None:
    """A layer of another shape in one of three is refused, whatever resize says, with all three shapes."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    models[odd]["layers.1.w"] = torch.ones(shape)
    write(tmp_path, **models)
    shapes = " and ".join(str(list(shape)) if side == odd else "[5, 7]" for side in models)
    refused(merge(tmp_path, resize=resize), 4, f"layers.1.w: {shapes}")


@pytest.mark.parametrize("odd", ["base", "a", "b"])
@pytest.mark.parametrize(("usual", "other"), [("float32", "int64"), ("int64", "float32"), ("int64", "int32")])
def test_an_integer_against_something_else_is_refused(usual: str, other: str, odd: str, tmp_path: Path) -> None:
    """A tensor that is of whole numbers in some inputs and of another dtype in others is refused by name."""
    names = {"float32": "F32", "int64": "I64", "int32": "I32"}
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    for side, model in models.items():
        model["layers.1.n"] = torch.ones(3, dtype=getattr(torch, other if side == odd else usual))
    write(tmp_path, **models)
    refused(merge(tmp_path), 4, "layers.1.n", names[usual], names[other])


WHOLE = {
    "int64": (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4])),
    "bool": (torch.tensor([True, False]), torch.tensor([False, False])),
    "uint8 scalar": (torch.tensor(3, dtype=torch.uint8), torch.tensor(4, dtype=torch.uint8)),
    "beyond one chunk": (
        torch.zeros(2**19 + 7, dtype=torch.int8),
        torch.arange(2**19 + 7).eq(2**19 + 6).to(torch.int8),
    ),
}


LINES: dict[str, Any] = {"plain": None, "auto": {"beta": 0.5}, "zero": {"alpha": 0, "beta": 0}}


@pytest.mark.parametrize(
    ("kind", "scaled"), [*((kind, "plain") for kind in WHOLE), ("int64", "auto"), ("int64", "zero")]
)
@pytest.mark.parametrize("differs", ["", "base", "a", "b"])
def test_whole_numbers_are_the_base_s(kind: str, scaled: str, differs: str, tmp_path: Path) -> None:
    """Integers and booleans are the base's to the byte; who differs from it is said, in a warning and in --json."""
    usual, other = WHOLE[kind]
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    for side, model in models.items():
        model["layers.1.n"] = (other if side == differs else usual).clone()
        model["layers.0.n"] = usual.clone()
    write(tmp_path, **models)
    ran = merge(tmp_path, "--json", merge_method="ties", lines=LINES[scaled])
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    assert raw(got["layers.1.n"]) == raw(models["base"]["layers.1.n"])
    assert got["layers.1.n"].dtype == usual.dtype
    differing = {"": [], "base": ["a", "b"]}.get(differs, [differs])
    files = [str(tmp_path / side / "model.safetensors") for side in differing]
    assert ran.json["differing"] == ({"layers.1.n": files} if files else {})
    assert ("warning: layers.1.n" in ran.err) == bool(files)
    assert [file for file in files if file not in ran.err] == []


@pytest.mark.parametrize("method", ["linear", "slerp", "passthrough"])
def test_whole_numbers_without_a_base_are_the_first_model_s(method: str, tmp_path: Path) -> None:
    """Where nothing is subtracted they are the first model's, and the other model is named."""
    models = {"a": tensors(1, steps=torch.tensor([1, 2])), "b": tensors(2, steps=torch.tensor([1, 3]))}
    write(tmp_path, **models)
    parameters = {"slerp": {"t": 1.0}, "linear": {}, "passthrough": {"scale": 0.5}}[method]
    sides = "a" if method == "passthrough" else "ab"
    ran = merge(tmp_path, "--json", models=sides, merge_method=method, base_model=None, parameters=parameters)
    assert ran.code == 0, ran.err
    assert output(tmp_path)["steps"].tolist() == [1, 2]
    other = {} if method == "passthrough" else {"steps": [str(tmp_path / "b" / "model.safetensors")]}
    assert ran.json["differing"] == other


@pytest.mark.parametrize("dtypes", [("bfloat16", "float32", "float16"), ("float32", "bfloat16", "float64")], ids=str)
def test_float_dtypes_may_differ(dtypes: tuple[str, ...], tmp_path: Path) -> None:
    """Each input has a float dtype of its own; the sum is taken in the widest arithmetic and stored as the base's."""
    sides = ("base", "a", "b")
    models = {
        s: {n: t.to(getattr(torch, d)) for n, t in tensors(i).items()}
        for i, (s, d) in enumerate(zip(sides, dtypes, strict=True))
    }
    write(tmp_path, **models)
    assert merge(tmp_path).code == 0
    wide = torch.float64 if "float64" in dtypes else torch.float32
    expected = {}
    for name, base in models["base"].items():
        taus = [models[side][name].to(wide) - base.to(wide) for side in "ab"]
        expected[name] = (base.to(wide) + (taus[0] + taus[1])).to(base.dtype)
    same(output(tmp_path), expected)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.parametrize("shards", [(1, 2, 3), (3, 1, 2)], ids=str)
def test_shards_make_no_difference(shards: tuple[int, ...], method: str, tmp_path: Path) -> None:
    """However each input is sharded, the weights come out the same."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    write(tmp_path / "whole", **models)
    for (side, model), number in zip(models.items(), shards, strict=True):
        write_checkpoint(tmp_path / side, model, shards=number)
    recipe = {"merge_method": method, "parameters": {"density": 0.3}, "lines": {"beta": 0.5}}
    for folder in (tmp_path, tmp_path / "whole"):
        assert merge(folder, **recipe).code == 0
    weights = [(folder / "out" / "model.safetensors").read_bytes() for folder in (tmp_path, tmp_path / "whole")]
    assert weights[0] == weights[1]


# --- the same input in several places ---


@pytest.mark.parametrize("second", ["a", "./a/", "copy"])
def test_a_model_given_twice(second: str, tmp_path: Path) -> None:
    """It counts twice, by whatever name, as a copy of it would."""
    models = {"base": tensors(0), "a": tensors(1), "copy": tensors(1)}
    write(tmp_path, **models)
    ran = merge(tmp_path, "--json", models=["a", second])
    assert ran.code == 0, ran.err
    assert len(ran.json["models"]) == 2
    same(output(tmp_path), {n: total(models["base"][n], models["a"][n], models["a"][n]) for n in models["base"]})


@pytest.mark.parametrize("method", ["average", "task_arithmetic", "ties", "consensus", "dare_linear", "dare_ties"])
def test_the_base_as_its_own_model(method: str, tmp_path: Path) -> None:
    """A base merged with nothing but itself comes back as it was; dropping entries and recounting rows included."""
    base = tensors(0, layers_0_b=torch.tensor([-0.0, 0.0]))
    write(tmp_path, base=base)
    parameters = {} if method == "average" else {"density": 0.5, "weight": 0.3}
    if method == "consensus":
        parameters["on"] = "ties"
    ran = merge(tmp_path, models=["base"], merge_method=method, parameters=parameters)
    assert ran.code == 0, ran.err
    assert all(torch.equal(tensor, base[name]) for name, tensor in output(tmp_path).items())


@pytest.mark.parametrize(("method", "parameters"), [("ties", {"density": 0.2}), ("average", {}), ("consensus", {}),
                                                   ("dare_linear", {"density": 0.5}), ("linear", {})])  # fmt: skip
@pytest.mark.parametrize("models", [["base"], ["a", "b"]], ids=["itself", "two copies"])
def test_alpha_auto_of_nothing(method: str, parameters: Any, models: list[str], tmp_path: Path) -> None:
    """Where all models equal the base alpha cannot be measured: a clear error, and nothing on the disk."""
    write(tmp_path, base=tensors(0), a=tensors(0), b=tensors(0))
    before = snapshot(tmp_path)
    ran = merge(tmp_path, models=models, merge_method=method, parameters=parameters, lines={"beta": 0.5})
    refused(ran, 4, "alpha", "auto", "same as their base")
    (tmp_path / "merge.yaml").unlink()
    assert snapshot(tmp_path) == before


def test_alpha_auto_of_a_plain_sum_of_nothing(tmp_path: Path) -> None:
    """For task arithmetic alpha is 1/N by the formula, whatever the models hold; equal ones give the base."""
    write(tmp_path, base=tensors(0), a=tensors(0), b=tensors(0))
    ran = merge(tmp_path, "--json", lines={"beta": 0.5})
    assert (ran.code, ran.json["alpha"]) == (0, 0.5)
    assert all(torch.equal(tensor, tensors(0)[name]) for name, tensor in output(tmp_path).items())


# --- lone files ---


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_lone_files(out: str, tmp_path: Path) -> None:
    """Lone files merge to a lone file, or to a folder that holds weights, card and recipe only, which is said."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    for side, model in models.items():
        write_checkpoint(tmp_path / f"{side}.safetensors", model)
    (tmp_path / "config.json").write_text("{}")  # a neighbour that belongs to nobody
    ran = merge(tmp_path, out=out, base_model="base.safetensors", models=["a.safetensors", "b.safetensors"])
    assert ran.code == 0, ran.err
    same(output(tmp_path, out), {n: total(*(model[n] for model in models.values())) for n in models["base"]})
    if out == "out":
        names = sorted(path.name for path in (tmp_path / "out").iterdir())
        assert names == ["README.md", "lines_recipe.yaml", "model.safetensors"]
        assert "config.json" in ran.err
    else:
        assert (tmp_path / out).is_file()


def test_a_lone_file_among_folders(tmp_path: Path) -> None:
    """A lone base takes config and tokenizer of the first model that has a config, and that is said."""
    write_checkpoint(tmp_path / "base.safetensors", tensors(0))
    write_checkpoint(tmp_path / "a.safetensors", tensors(1))
    write_checkpoint(tmp_path / "b", tensors(2), config={"model_type": "b"})
    write_checkpoint(tmp_path / "c", tensors(3), config={"model_type": "c"})
    for side in "bc":
        (tmp_path / side / "tokenizer.json").write_text(side)
    ran = merge(tmp_path, base_model="base.safetensors", models=["a.safetensors", "b", "c"])
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "b"
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "b"
    assert f"from {tmp_path / 'b'} come config.json, tokenizer.json" in ran.err


# --- what stands beside the weights ---

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def beside(tmp_path: Path, *sides: str, **contents: Any) -> None:
    """Write the files that stand beside the weights, each saying whose it is."""
    for side in sides:
        for name in BESIDE:
            content = side if name.endswith("jinja") else json.dumps({"of": side})
            (tmp_path / side / name).write_text(content)


def whose(tmp_path: Path) -> dict[str, str]:
    """Who each of the files beside the output's weights is from."""
    found = {}
    for name in BESIDE:
        if (tmp_path / "out" / name).exists():
            text = (tmp_path / "out" / name).read_text()
            found[name] = text if name.endswith("jinja") else json.loads(text)["of"]
    return found


@pytest.mark.parametrize(
    ("method", "has_base"), [("task_arithmetic", True), ("ties", True), ("linear", False), ("linear", True)]
)
def test_files_beside_are_the_base_s(method: str, has_base: bool, tmp_path: Path) -> None:
    """Config and tokenizer are the base's, or the first model's where there is no base."""
    sides = ("base", "a", "b")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    beside(tmp_path, *sides)
    lines = {"alpha": 0.5, "beta": 0.5} if has_base else None
    ran = merge(tmp_path, merge_method=method, base_model="base" if has_base else None, lines=lines)
    assert ran.code == 0, ran.err
    lead = "base" if has_base else "a"
    assert whose(tmp_path) == dict.fromkeys(BESIDE, lead)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": lead}


@pytest.mark.parametrize("source", ["base", "a", "b"])
@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_the_tokenizer_of_a_named_input(key: str, source: str, tmp_path: Path) -> None:
    """The tokenizer and its chat template are the named input's, and so are token ids; all else stays the base's."""
    sides = ("base", "a", "b")
    configs = {s: {"model_type": s, "bos_token_id": n} for n, s in enumerate(sides)}
    write(tmp_path, configs=configs, **{s: tensors(i) for i, s in enumerate(sides)})
    beside(tmp_path, *sides)
    ran = merge(tmp_path, **{key: source if key == "tokenizer_source" else {"source": source}})
    assert ran.code == 0, ran.err
    assert whose(tmp_path) == dict.fromkeys(BESIDE, source) | {"generation_config.json": "base"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "base", "bos_token_id": sides.index(source)}


def test_ids_of_special_tokens_are_those_that_the_tokenizer_s_model_has(tmp_path: Path) -> None:
    """Ids that the named input has are set, also new ones; ids that it lacks go; the base's other settings stay."""
    configs = {
        "base": {"model_type": "x", "pad_token_id": 0, "bos_token_id": 1},
        "a": {"bos_token_id": 5, "eos_token_id": 7},
    }
    write(tmp_path, configs=configs, base=tensors(0), a=tensors(1), b=tensors(2))
    beside(tmp_path, "base", "a")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.1, "pad_token_id": 0}')
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [7, 8]}')
    assert merge(tmp_path, tokenizer_source="a").code == 0
    written = {
        name: json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    }
    assert written["config.json"] == {"model_type": "x", "bos_token_id": 5, "eos_token_id": 7}
    assert written["generation_config.json"] == {"temperature": 0.1, "eos_token_id": [7, 8]}


def test_a_tokenizer_of_a_folder_without_config(tmp_path: Path) -> None:
    """A named input that has a tokenizer and no config says nothing of token ids: the config's own stay."""
    config = {"model_type": "x", "bos_token_id": 1, "eos_token_id": 2}
    write(tmp_path, configs={"base": config}, base=tensors(0), a=tensors(1), b=tensors(2))
    (tmp_path / "a" / "tokenizer.json").write_text("a")
    assert merge(tmp_path, tokenizer_source="a").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("lone", [True, False])
def test_a_named_input_without_is_refused(key: str, lone: bool, tmp_path: Path) -> None:
    """An input that is named for a tokenizer or a chat template and has none is refused by name; so is a lone file."""
    write(tmp_path, configs={"base": {"model_type": "x"}}, base=tensors(0), a=tensors(1))
    beside(tmp_path, "base")
    source = "b.safetensors" if lone else "b"
    write_checkpoint(tmp_path / source, tensors(2))
    refused(merge(tmp_path, models=["a", source], **{key: source}), 3, key, tmp_path / source)
    assert not (tmp_path / "out").exists()


def with_template(folder: Path, kind: str, template: str) -> None:
    """Give a folder a chat template, in its tokenizer's config or in a file."""
    tokenizer = {"of": folder.name} | ({"chat_template": template} if kind == "inside" else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if kind == "file":
        (folder / "chat_template.jinja").write_text(template)


def templates(folder: Path) -> set[str]:
    """Every chat template that a folder has, wherever it is kept."""
    found = {path.read_text() for path in folder.glob("chat_template.jinja")}
    if (folder / "tokenizer_config.json").exists():
        found.add(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template", ""))
    return found - {""}


@pytest.mark.parametrize("theirs", ["inside", "file"])
@pytest.mark.parametrize("own", ["inside", "file", "none", "no tokenizer"])
def test_the_chat_template_of_a_named_input(own: str, theirs: str, tmp_path: Path) -> None:
    """The output has the named input's template and no other, wherever the two keep it; its tokenizer is the base's."""
    sides = ("base", "a", "b")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    if own != "no tokenizer":
        with_template(tmp_path / "base", own, "base's")
    with_template(tmp_path / "b", theirs, "b's")
    ran = merge(tmp_path, chat_template="b")
    assert ran.code == 0, ran.err
    assert templates(tmp_path / "out") == {"b's"}
    if own != "no tokenizer":
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["of"] == "base"


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("value", ["union", "c", "base"])
def test_a_source_that_is_none_of_the_inputs(key: str, value: str, tmp_path: Path) -> None:
    """Whoever is no input, and the base where there is none, is refused with the key's name."""
    write(tmp_path, a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, merge_method="linear", base_model=None, **{key: value})
    refused(ran, 2, key, value)


def test_the_model_card_lists_all(tmp_path: Path) -> None:
    """Front matter and table name the base and every model once, and the method."""
    sides = ("base", "ft-math", "ft-code", "ft-law")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    assert merge(tmp_path, models=sides[1:], merge_method="ties", lines={"beta": 0.5}).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # local names are no Hub ids
    assert front["tags"] == ["lines", "merge", "ties"]
    assert [side for side in sides if card.count(f"`{side}`") != 1] == []
    assert str(tmp_path) not in card


# --- NaN, Inf and overflow ---

AUTO: dict[str, Any] = {"beta": 0.5}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "task_arithmetic, weight 0": ("task_arithmetic", {"weight": 0}),
    "task_arithmetic, trimmed": ("task_arithmetic", {"density": 0.02}),
    "ties": ("ties", {"density": 0.02}),
    "ties by tensor": ("ties", {"density": 0.02, "trim": "tensor"}),
    "ties, untrimmed": ("ties", {}),
    "ties by sum": ("ties", {"density": 0.02, "agreement": "sum"}),
    "ties by max": ("ties", {"density": 0.02, "agreement": "max"}),
    "consensus": ("consensus", {"k": 2, "mask_lambda": 5.0}),
    "consensus that keeps nothing": ("consensus", {"k": 9}),
    "consensus on ties": ("consensus", {"on": "ties", "density": 0.02}),
    "dare_linear": ("dare_linear", {"density": 0.01}),
    "dare_linear of nothing": ("dare_linear", {"density": 0}),
    "dare_linear by L1": ("dare_linear", {"density": 0.01, "rescale": "l1"}),
    "dare_ties": ("dare_ties", {"density": 0.01}),
    "linear": ("linear", {}),
    "slerp": ("slerp", {"t": 0.5}),
    "slerp at the first": ("slerp", {"t": 0.0}),
}


def holed(seed: int, value: float) -> torch.Tensor:
    """A layer's weight with one impossible entry, the sixth."""
    layer = tensors(seed)["layers.1.w"]
    layer.view(-1)[5] = value
    return layer


def method_recipe(case: str) -> dict[str, Any]:
    method, parameters = METHODS[case]
    base = {"base_model": None} if method in ("linear", "slerp") else {}
    return {"merge_method": method, "parameters": parameters, **base}


@pytest.mark.parametrize("value", [NAN, -INF])
@pytest.mark.parametrize("auto", [False, True], ids=["plain", "auto"])
@pytest.mark.parametrize("case", METHODS)
def test_one_impossible_entry_is_refused(case: str, auto: bool, value: float, tmp_path: Path) -> None:
    """NaN or Inf in one model, be it masked away: exit 5 with file, tensor and entry; nothing is left on the disk."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, value)))
    recipe = method_recipe(case)
    if auto:
        recipe |= {"lines": AUTO, "base_model": "base"}
    before = snapshot(tmp_path)
    ran = merge(tmp_path, **recipe)
    what = "NaN" if math.isnan(value) else "Inf"
    refused(ran, 5, tmp_path / "b" / "model.safetensors", "layers.1.w", what, "entry 5", "allow_nonfinite")
    (tmp_path / "merge.yaml").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("side", ["base", "a", "c"])
@pytest.mark.parametrize("case", ["average", "ties", "consensus", "dare_ties"])
def test_the_file_with_the_impossible_entry_is_named(case: str, side: str, tmp_path: Path) -> None:
    """Whichever of four inputs it is in, that one is named and no other."""
    models = {s: tensors(i) for i, s in enumerate(("base", "a", "b", "c"))}
    models[side]["layers.1.w"] = holed(0, NAN)
    write(tmp_path, **models)
    ran = merge(tmp_path, models="abc", **method_recipe(case))
    refused(ran, 5, tmp_path / side / "model.safetensors", "layers.1.w", "entry 5")
    assert [s for s in models if s != side and str(tmp_path / s / "model") in ran.err] == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", ["task_arithmetic", "ties"])
def test_a_refusal_of_numbers_keeps_the_old(case: str, existing: bool, tmp_path: Path) -> None:
    """With --force an output that is there stays as it was when an input turns out to hold NaN."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, NAN)))
    if existing:
        write(tmp_path, out=tensors(3))
    before = snapshot(tmp_path)
    refused(merge(tmp_path, "--force", **method_recipe(case)), 5, "layers.1.w")
    (tmp_path / "merge.yaml").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("case", METHODS)
def test_impossible_entries_let_through(case: str, value: float, tmp_path: Path) -> None:
    """With allow_nonfinite the entry is not finite in the output, no other tensor is touched by it, and it is named."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, value)))
    ran = merge(tmp_path, "--json", allow_nonfinite=True, **method_recipe(case))
    assert ran.code == 0, ran.err
    assert list(ran.json["nonfinite"]) == ["layers.1.w"]
    assert str(tmp_path / "b" / "model.safetensors") in ran.json["nonfinite"]["layers.1.w"]
    got = output(tmp_path)
    assert [name for name in got if not got[name].isfinite().all()] == ["layers.1.w"]
    bad = ~got["layers.1.w"].flatten().isfinite()
    assert bad[5]
    if case != "dare_linear by L1":  # whose factor is of the whole tensor
        assert int(bad.sum()) == 1


@pytest.mark.parametrize("case", ["average", "ties", "consensus on ties"])
def test_alpha_auto_of_impossible_numbers(case: str, tmp_path: Path) -> None:
    """With allow_nonfinite there is no norm for alpha: auto to rest on, which is said; a given alpha works."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, NAN)))
    refused(merge(tmp_path, allow_nonfinite=True, lines=AUTO, **method_recipe(case)), 4, "alpha: auto", "nan")
    assert merge(tmp_path, allow_nonfinite=True, lines={"alpha": 0.5, **AUTO}, **method_recipe(case)).code == 0


OVERFLOWS = [("float16", 1e5, 5), ("float16", 65519.0, 0), ("bfloat16", 1e38, 0), ("float32", 1e38, 0)]


@pytest.mark.parametrize(("dtype", "value", "code"), OVERFLOWS)
@pytest.mark.parametrize("case", ["task_arithmetic", "ties, untrimmed", "linear"])
def test_overflow_of_the_output_dtype(case: str, dtype: str, value: float, code: int, tmp_path: Path) -> None:
    """A merged value beyond the output dtype is exit 5 with tensor and dtype; one that rounds to its largest is not."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    large = {name: tensor.clone() for name, tensor in zeros.items()}
    large["layers.1.w"].view(-1)[5] = value
    write(tmp_path, base=zeros, a=large, b=zeros if case != "linear" else large)
    ran = merge(tmp_path, dtype=dtype, **method_recipe(case))
    if code:
        refused(ran, 5, "layers.1.w", "F16", "beyond")
        ran = merge(tmp_path, "--json", dtype=dtype, allow_nonfinite=True, **method_recipe(case))
        assert (ran.code, list(ran.json["nonfinite"])) == (0, ["layers.1.w"])
        assert output(tmp_path)["layers.1.w"].flatten()[5] == INF
    else:
        assert ran.code == 0, ran.err
        assert output(tmp_path)["layers.1.w"].isfinite().all()


def test_the_way_out_of_an_overflow_is_one_of_a_merge(tmp_path: Path) -> None:
    """The hint names keys of the recipe: `lines merge` has no --dtype and no --allow-nonfinite."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    write(tmp_path, base=zeros, a=zeros | {"layers.1.w": torch.full((5, 7), 1e5)}, b=zeros)
    ran = merge(tmp_path, dtype="float16")
    refused(ran, 5, "hint: ", "dtype", "allow_nonfinite: true")


def test_an_overflow_of_the_difference(tmp_path: Path) -> None:
    """Finite inputs whose difference is beyond float32 are refused in either pass, not written as Inf."""
    far = torch.zeros(5, 7)
    far[0, 5] = 3e38
    write(tmp_path, base=tensors(0, layers_1_w=-far), a=tensors(1, layers_1_w=far), b=tensors(2))
    for case in ("task_arithmetic", "ties", "consensus on ties", "dare_linear by L1"):
        recipe = method_recipe(case)
        ran = merge(tmp_path, **recipe)
        refused(ran, 5, "layers.1.w")
        assert not (tmp_path / "out").exists()


# --- odd tensors ---


def odd(seed: int) -> Tensors:
    """Empty tensors, scalars and tensors of one entry among others; empty ones first and last."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a_first": (0,), "layers.0.e": (0, 4), "layers.0.s": (), "layers.0.w": (3, 3), "layers.1.e": (4, 0)}
    shapes |= {"layers.1.s": (), "layers.1.w": (1,), "z_last": (0, 0)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05, 1e-9, 0.0])
@pytest.mark.parametrize("lines", [None, {"alpha": 1.0, "beta": 0.0}])
def test_odd_tensors_with_ties(lines: Any, density: float, tmp_path: Path) -> None:
    """Tensors of no entry or one are trimmed like all others; a density below one entry keeps one (k = 1)."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    ran = merge(tmp_path, "--json", merge_method="ties", parameters={"density": density}, lines=lines)
    assert ran.code == 0, ran.err
    same(output(tmp_path), by_ties(models[0], models[1], models[2], density=density))
    if density < 1:
        assert [model["kept"] for model in ran.json["models"]] == [max(1, int(density * 12)) / 12] * 2


@pytest.mark.parametrize("case", METHODS)
def test_odd_tensors_with_every_method(case: str, tmp_path: Path) -> None:
    """Every method takes them, with alpha measured and without, and the shapes stay."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    recipe = method_recipe(case)
    assert merge(tmp_path, **recipe).code == 0
    got = output(tmp_path)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in models[0].items()}
    ran = merge(tmp_path, out="auto", **{**recipe, "lines": AUTO, "base_model": "base"})
    # The merged vector is 0, or may be, as where random draws keep none of twelve entries: alpha cannot be measured.
    nothing = "nothing" in case or "dare" in case or case in ("consensus", "task_arithmetic, weight 0")
    assert ran.code in ((0, 4) if nothing else (0,)), ran.err


def test_each_tensor_of_one_entry_keeps_it(tmp_path: Path) -> None:
    """With trim: tensor a tensor of one entry, scalars included, keeps it at any density."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    assert merge(tmp_path, merge_method="ties", parameters={"density": 0.01, "trim": "tensor"}).code == 0
    parts = [by_ties(*({name: model[name]} for model in models), density=0.01)
             for name in models[0] if models[0][name].numel()]  # fmt: skip
    signs_may_differ = {name: tensor for part in parts for name, tensor in part.items() if tensor.numel() == 1}
    got = output(tmp_path)
    assert len(signs_may_differ) == 3
    assert [n for n, expected in signs_may_differ.items() if raw(got[n]) != raw(expected)] == []


@pytest.mark.parametrize("parameters", [{}, {"density": 0.5}, {"density": 0.5, "trim": "tensor"}], ids=str)
@pytest.mark.parametrize("kind", ["empty", "whole numbers", "both"])
def test_nothing_to_merge(kind: str, parameters: Any, tmp_path: Path) -> None:
    """Models without a single float entry are copied by ties as by any method, not a crash."""
    model: Tensors = {}
    if kind != "whole numbers":
        model |= {f"layers.{i}.w": torch.zeros(0, 4) for i in range(2)}
    if kind != "empty":
        model |= {f"layers.{i}.n": torch.arange(3) for i in range(2)}
    write(tmp_path, base=model, a=model, b=model)
    ran = merge(tmp_path, merge_method="ties", parameters=parameters)
    assert ran.code == 0, ran.err
    same(output(tmp_path), model)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "consensus"])
@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_a_model_that_changed_nothing(trim: str, method: str, tmp_path: Path) -> None:
    """A task vector of zeros with density below 1 adds nothing; the other's trimmed entries come through."""
    base, other = tensors(0), tensors(1)
    write(tmp_path, base=base, a=base, b=other)
    parameters: dict[str, Any] = {"density": 0.25, "trim": trim}
    if method == "consensus":
        parameters |= {"on": "ties", "k": 1}
    ran = merge(tmp_path, merge_method=method, parameters=parameters)
    assert ran.code == 0, ran.err
    if trim == "global":
        expected = by_ties(base, base, other, density=0.25)
    else:
        expected = {n: by_ties({n: base[n]}, {n: base[n]}, {n: other[n]}, density=0.25)[n] for n in base}
    got = output(tmp_path)
    assert [n for n in got if not torch.equal(got[n], expected[n])] == []


def test_k_of_one_entry_in_a_whole_model(tmp_path: Path) -> None:
    """A global density of less than one entry leaves each model its largest change alone, wherever it is."""
    base = tensors(0)
    a, b = ({name: tensor + 0.25 for name, tensor in base.items()} for _ in "ab")
    a["layers.2.w"][1, 1] = base["layers.2.w"][1, 1] + 8
    b["norm"][0] = base["norm"][0] - 9
    write(tmp_path, base=base, a=a, b=b)
    ran = merge(tmp_path, "--json", merge_method="ties", parameters={"density": 1e-6})
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    changed = {name: (got[name] != base[name]).nonzero().tolist() for name in base}
    assert changed == {name: {"layers.2.w": [[1, 1]], "norm": [[0]]}.get(name, []) for name in base}
    entries = sum(tensor.numel() for tensor in base.values())
    assert [model["kept"] for model in ran.json["models"]] == [1 / entries] * 2


# --- files that are none, or cannot be read ---


class WaitsForEver(BaseException):
    """Nothing that is caught on the way."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A way out of what would wait for ever."""

    def late(*_: object) -> None:
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def an_empty_file(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("side", ["base", "b"])
@pytest.mark.parametrize("kind", [a_fifo, a_folder, a_dangling_link, an_empty_file], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("place", ["lone", "inside", "shard"])
def test_something_else_in_place_of_a_file(place: str, kind: Callable[[Path], None], side: str, tmp_path: Path) -> None:
    """A FIFO, a folder, a dangling link or an empty file in place of weights is exit 3 by name, at once."""
    names = {name: name for name in ("base", "a", "b")}
    write(tmp_path, **{name: tensors(i) for i, name in enumerate(names)})
    if place == "lone":
        names[side] = f"{side}.safetensors"
        path = tmp_path / names[side]
    elif place == "inside":
        path = tmp_path / side / "model.safetensors"
        path.unlink()
    else:
        (tmp_path / side / "model.safetensors").unlink()
        write_checkpoint(tmp_path / side, tensors(0), shards=2)
        path = tmp_path / side / "model-00001-of-00002.safetensors"
        path.unlink()
    kind(path)
    before = sorted(tmp_path.rglob("*"))
    with within(2):
        ran = merge(tmp_path, base_model=names["base"], models=[names["a"], names["b"]])
    refused(ran, 3, path.name)
    (tmp_path / "merge.yaml").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_fifo_beside_the_weights(name: str, tmp_path: Path) -> None:
    """A FIFO or folder called like a file that is carried over is no such file, and nobody waits for it."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    os.mkfifo(tmp_path / "base" / name)
    (tmp_path / "base" / "vocab.json").mkdir()
    with within(2):
        assert merge(tmp_path).code == 0
    assert not {name, "vocab.json"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("side", ["base", "a", "b"])
def test_a_missing_folder(side: str, tmp_path: Path) -> None:
    """A folder that is not there is exit 3 with its path beside the recipe."""
    write(tmp_path, **{name: tensors(i) for i, name in enumerate(("base", "a", "b")) if name != side})
    refused(merge(tmp_path), 3, tmp_path / side, "no such")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "b"])
@pytest.mark.parametrize("kind", ["codes", "adapter", "pickle", "no weights"])
def test_one_of_another_kind_among_several(kind: str, side: str, tmp_path: Path) -> None:
    """A quantised model, an adapter, a pickle or a bare folder among good ones is exit 3, and named."""
    models = {name: tensors(i) for i, name in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    weights = tmp_path / side / "model.safetensors"
    if kind == "codes":
        write(tmp_path, **{side: models[side] | {"layers.1.w": torch.ones(5, 7).to(torch.float8_e4m3fn)}})
    elif kind == "adapter":
        weights.rename(tmp_path / side / "adapter_model.safetensors")
    elif kind == "pickle":
        weights.unlink()
        torch.save(models[side], tmp_path / side / "pytorch_model.bin")
    else:
        weights.unlink()
    refused(merge(tmp_path), 3, tmp_path / side)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no other user to be")
@pytest.mark.parametrize(("path", "mode"), [
    ("b/model.safetensors", 0o000), ("b", 0o000), ("b/config.json", 0o000), ("a", 0o311), ("base/tokenizer.json", 0),
])  # fmt: skip
def test_no_permission_for_one_of_three(path: str, mode: int, tmp_path: Path) -> None:
    """What an ordinary user may not read among the inputs is exit 3 with its path, and nothing is left."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    for flags in ([], ["--dry-run"]):  # imports all it needs, which an ordinary user may not read
        merge(tmp_path, *flags, merge_method="ties", parameters={"density": 0.5}, out=f"warm{len(flags)}")
    with as_nobody() as folder:
        sides = ("base", "a", "b")
        write(folder, configs={s: {"model_type": "x"} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
        (folder / "base" / "tokenizer.json").write_text("{}")
        names = sorted(folder.rglob("*"))
        (folder / path).chmod(mode)
        ran = merge(folder, merge_method="ties", parameters={"density": 0.5})
        (folder / path).chmod(0o777)
        (folder / "merge.yaml").unlink()
        assert sorted(folder.rglob("*")) == names
        refused(ran, 3, folder / path, "ermission")


# --- the destination ---


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("target", ["base", "a", "b", "b/model.safetensors", ".", "link", "b/../a"])
def test_an_output_over_any_input(target: str, method: str, tmp_path: Path) -> None:
    """Whichever of the inputs the output would replace or hold, it is refused, with --force and without."""
    folder = tmp_path / "models"
    write(folder, base=tensors(0), a=tensors(1), b=tensors(2))
    (folder / "link").symlink_to("b")
    before = snapshot(folder)
    base = {"base_model": None, "models": ["base", "a", "b"]} if method == "linear" else {}
    for flags in ([], ["--force"], ["--force", "--dry-run"]):
        ran = merge(folder, *flags, out=target, merge_method=method, **base)
        refused(ran, 6, "replace an input" if flags else "models")
        (folder / "merge.yaml").unlink()
        assert snapshot(folder) == before


def test_force_replaces_a_checkpoint(tmp_path: Path) -> None:
    """An output that exists is refused without --force, and replaced as a whole with it."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    write_checkpoint(tmp_path / "out", tensors(3), shards=2, config={"old": True})
    before = snapshot(tmp_path / "out")
    refused(merge(tmp_path), 6, "exists", "--force")
    assert snapshot(tmp_path / "out") == before
    assert merge(tmp_path, "--force").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "lines_recipe.yaml", "model.safetensors")
    ]
    same(output(tmp_path), {n: total(*(model[n] for model in models.values())) for n in models["base"]})


# --- failures on the way ---

PASSES = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": AUTO}


class Reads:
    """Stands in for `os.preadv`; of the reads of weights that of a given number raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, error: BaseException | None = None):
        self.calls, self.at, self.error, self.real = 0, at, error, os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, *args: Any) -> int:
        if not os.readlink(f"/proc/self/fd/{args[0]}").endswith("model.safetensors"):
            return self.real(*args)  # a small file
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error
        return self.real(*args)


READS = 3 * 3 * 5
"""One pass for thresholds, one for signs and norms, one that writes; three inputs of five tensors."""


@pytest.mark.parametrize(("out", "existing"), [("deep/er/out", False), ("out", True), ("out.safetensors", True)])
@pytest.mark.parametrize("at", [1, 14, 16, 30, 31, READS])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
def test_a_read_that_fails(
    error: BaseException, at: int, out: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the passes an input cannot be read, or Ctrl-C comes, the destination is as it was."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    if existing:
        write_checkpoint(tmp_path / out, tensors(3))
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        reads = Reads(patch, at, error)
        ran = merge(tmp_path, "--workers", 1, "--force", out=out, **PASSES)
    if isinstance(error, OSError):
        refused(ran, 3, "model.safetensors", "Input/output error")
    else:
        refused(ran, 130, "interrupted")
    assert reads.calls == at
    (tmp_path / "merge.yaml").unlink()
    after = snapshot(tmp_path)
    kept = at > READS * 2 // 3  # what was measured is worth to be kept
    assert (after != before) == kept
    if not (kept and "/" in out):  # the parents are there for what is kept
        assert without_staging(after) == before


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_how_often_inputs_are_read(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers above cover all passes: each reads every tensor of every input once. Nothing else is read."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    reads = Reads(monkeypatch)
    assert merge(tmp_path, "--workers", 1, out=out, **PASSES).code == 0
    assert reads.calls == READS


@pytest.mark.parametrize("side", ["base", "a", "b"])
def test_an_input_that_gets_shorter_between_the_passes(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input cut short after the first pass is named with the tensor that it lost, and nothing is left."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    file = tmp_path / side / "model.safetensors"
    reads = Reads(monkeypatch)
    real = reads.real

    def cutting(*args: Any) -> int:
        if reads.calls == 15:  # all of the first pass
            os.truncate(file, file.stat().st_size - 4)
        return real(*args)

    reads.real = cutting
    ran = merge(tmp_path, "--workers", 1, **PASSES)
    refused(ran, 3, file, "norm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "merge.yaml"]


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_measuring(number: signal.Signals, tmp_path: Path) -> None:
    """A run of four times 128 MB that is asked to end while it measures: 128 + signal, and the disk as it was."""
    head, infos = lay_out([(f"layers.{i}.w", "F32", (2**23,)) for i in range(4)], {})
    for side in ("base", "a", "b", "c"):
        (tmp_path / side).mkdir()
        with open(tmp_path / side / "model.safetensors", "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(info.nbytes for info in infos.values()))
    recipe = {"base_model": "base", "models": [{"model": side} for side in "abc"], **PASSES}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lines_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "merge", "--config", "merge.yaml", "-o", "out", "--workers", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 300
        while process.poll() is None and not list(tmp_path.glob(".out.lines/journal")):
            assert time.monotonic() < until
            time.sleep(0.002)
        time.sleep(0.02)
        assert not list(tmp_path.glob(".out.lines/new/*"))  # nothing is written yet
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (128 + number, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# --- several stacks ---

_T5 = ("layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight", "layer.2.DenseReluDense.wi.weight")
STACKS = {
    "encoder and decoder": {
        "encoder": [f"encoder.block.{i}.{name}" for i in range(4) for name in (_T5[0], _T5[2].replace("2", "1"))],
        "decoder": [f"decoder.block.{i}.{name}" for i in range(3) for name in _T5],
        "": ["shared.weight", "encoder.final_layer_norm.weight", "lm_head.weight"],
    },
    "two towers": {
        "vision_model": [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(5)],
        "text_model": [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)],
        "": ["logit_scale", "visual_projection.weight", "text_model.embeddings.token_embedding.weight"],
    },
}
RULES: dict[str, tuple[dict[str, Any], dict[str, Callable[[float], float]]]] = {
    "all": ({}, {}),
    "one keeps": ({"stacks": {0: "keep"}}, {"0": lambda x: 1.0}),
    "one is the base": ({"stacks": {1: "base"}}, {"1": lambda x: 0.0}),
    "one of its own": (
        {"stacks": {1: {"alpha": 0.75, "beta": -0.5}}, "outside": "base"},
        {"1": lambda x: 0.75 - 0.5 * x, "": lambda x: 0.0},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
def test_each_stack_has_a_depth_of_its_own(method: str, kind: str, rule: str, tmp_path: Path) -> None:
    """Coefficients count through each stack alone, stacks chooses which is scaled, and the merge is scaled by them."""
    stacks = STACKS[kind]
    numbered = [name for name in stacks if name]
    said, special = RULES[rule]
    lines = {"alpha": 0.25, "beta": 0.5, **said}
    if "stacks" in lines:
        lines["stacks"] = {numbered[key]: value for key, value in lines["stacks"].items()}
    coefficients: dict[str, float] = {}
    for stack, names in stacks.items():
        key = str(numbered.index(stack)) if stack else ""
        value = special.get(key, lambda x: 0.25 + 0.5 * x)
        numbers = [int(next(part for part in name.split(".") if part.isdecimal())) for name in names] if stack else []
        for position, name in enumerate(names):
            coefficients[name] = value(numbers[position] / max(numbers) if stack else 0.0)
    base = {name: torch.zeros(2) for name in coefficients}
    models = {side: {name: torch.full((2,), size) for name in base} for side, size in (("a", 1.0), ("b", 3.0))}
    write(tmp_path, base=base, **models)
    ran = merge(tmp_path, "--json", merge_method=method, lines=lines)
    assert ran.code == 0, ran.err
    assert [stack["layers"] for stack in ran.json["stacks"]] in ([4, 3], [3, 4], [5, 2], [2, 5])
    merged = 4.0 if method == "task_arithmetic" else 2.0
    got = {name: float(tensor[0]) for name, tensor in output(tmp_path).items()}
    assert got == pytest.approx({name: c * merged for name, c in coefficients.items()}, rel=1e-6)


def test_alpha_auto_is_of_the_whole_model(tmp_path: Path) -> None:
    """Alpha is measured over all stacks and what lies outside, whichever of them lines.stacks scales."""
    names = [name for group in STACKS["encoder and decoder"].values() for name in group]
    random = torch.Generator().manual_seed(0)
    models = {side: {name: torch.randn(6, generator=random) for name in names} for side in ("base", "a", "b")}
    write(tmp_path, **models)
    recipe = {"merge_method": "ties", "parameters": {"density": 0.5}}
    ran = merge(tmp_path, "--json", lines={"beta": 0.5, "stacks": {"encoder": "base"}, "outside": "base"}, **recipe)
    assert ran.code == 0, ran.err
    base = models["base"]
    both = sum((models["a"][n] - base[n] + (models["b"][n] - base[n])).abs().sum(dtype=torch.float64) for n in names)
    flat = torch.cat([base[n] for n in names])
    taus = torch.stack([torch.cat([models[side][n] for n in names]) - flat for side in "ab"])
    taus = trimmed(taus, 0.5)
    agree = taus * taus.sum(0).sign() > 0
    merged = ((taus * agree).sum(0) / agree.sum(0).clamp(min=1)).abs().sum(dtype=torch.float64)
    assert ran.json["alpha"] == pytest.approx(float(both / merged) / 2, rel=1e-6)
    got = output(tmp_path)
    assert all(raw(got[n]) == raw(base[n]) for n in names if n.startswith("encoder") or "block" not in n)
    assert all(raw(got[n]) != raw(base[n]) for n in names if n.startswith("decoder"))


# --- memory ---

MB = 10**6

# VmHWM is the process's own high-water mark; a child's ru_maxrss would begin with its parent's.
PROGRAM = """
import sys
from pathlib import Path
import lines_cli as lines
from lines_cli.recipe.yaml_file import load_recipe

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

resources = lines.Resources(workers=2, device="cpu")
for size in ("small", "large"):
    recipe = load_recipe(Path(size, "merge.yaml"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(size, "out.safetensors"))
    import torch
    before = peak()
    lines.run(plan, resources)
print(peak() - before, peak(), plan.peak_memory(resources))
"""


def filled(path: Path, tensors: int, nbytes: int, seed: int | None) -> None:
    """A checkpoint of random bfloat16 numbers, one block of 2 MB over and over; of zeros without a seed."""
    names = [(f"layers.{i}.w", "BF16", (nbytes // tensors // 2,)) for i in range(tensors)]
    head, infos = lay_out(names, {})
    size = sum(info.nbytes for info in infos.values())
    with open(path, "wb") as file:
        file.write(head)
        if seed is not None:
            numbers = torch.randn(MB + seed, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
            block = raw(numbers)
            file.writelines(block[: size - at] for at in range(0, size, len(block)))
        file.truncate(len(head) + size)


def three(folder: Path, tensors: int, nbytes: int, recipe: dict[str, Any]) -> None:
    """A base, three fine-tunes of it, and the recipe that merges them."""
    folder.mkdir()
    for seed, side in enumerate(("base", "a", "b", "c")):
        filled(folder / f"{side}.safetensors", tensors, nbytes, seed or None)
    values = {
        "base_model": "base.safetensors",
        "models": [{"model": f"{side}.safetensors"} for side in "abc"],
        **recipe,
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(values))


LARGE: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2}, "lines": {"beta": 0.5}},
    "ties by tensor": {
        "merge_method": "ties",
        "parameters": {"density": 0.2, "trim": "tensor"},
        "lines": {"beta": 0.5},
    },
    "consensus on ties": {
        "merge_method": "consensus",
        "parameters": {"density": 0.2, "on": "ties"},
        "lines": {"beta": 0.5},
    },
    "dare_ties by L1": {
        "merge_method": "dare_ties",
        "parameters": {"density": 0.2, "rescale": "l1"},
        "lines": {"beta": 0.5},
    },
}


def flat(folder: Path, tensors: int, sizes: tuple[int, int], recipe: dict[str, Any]) -> None:
    """Four times the model takes no more memory (but for noise), and little more in all than a dry run foretells."""
    for size, nbytes in zip(("small", "large"), sizes, strict=True):
        three(folder / size, tensors, nbytes, recipe)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True)
    more, peak, foretold = map(int, ran.stdout.split())
    assert more < 20 * MB
    assert peak < 400 * MB
    assert peak < 1.1 * foretold


PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@PROC
def test_memory_is_flat(tmp_path: Path) -> None:
    """TIES with alpha measured on three models of 80 MB takes as much memory as on three of 20 MB."""
    flat(tmp_path, 1, (20 * MB, 80 * MB), LARGE["ties"])


@PROC
@pytest.mark.slow
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("tensors", [1, 40], ids=["one tensor", "many tensors"])
@pytest.mark.parametrize("case", LARGE)
def test_memory_is_flat_at_size(case: str, tensors: int, tmp_path: Path) -> None:
    """Merging three models of 400 MB takes as much memory as three of 100 MB, and less than 400 MB in all."""
    flat(tmp_path, tensors, (100 * MB, 400 * MB), LARGE[case])


# --- what is told of it ---


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_share_kept_where_density_varies(method: str, number: int, tmp_path: Path) -> None:
    """The share of entries kept counts tensors of density 1, too, whatever becomes of them."""
    base = {f"layers.{i}.{name}": torch.zeros(100) for i in range(2) for name in ("a", "b")}
    buffer = {"layers.0.steps": torch.arange(500)}  # whole numbers are no part of it
    models = {m: {name: torch.randn(100) for name in base} | buffer for m in "ab"[:number]}
    write(tmp_path, base=base | buffer, **models)
    parameters = {"density": [{"filter": ".a", "value": 0.5}, {"value": 1}]}
    ran = merge(tmp_path, "--json", models="ab"[:number], merge_method=method, parameters=parameters)
    for model in ran.json["models"]:
        assert model["kept"] == pytest.approx(0.75, abs=0.1 if method == "dare_linear" else 0)


def test_a_head_and_its_embedding_lose_the_same_entries(tmp_path: Path) -> None:
    """DARE draws once for a head and the embedding that it is tied to: they stay one weight."""
    config = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 2}
    models = {}
    for number, side in enumerate(("base", "a", "b")):
        shared = torch.randn(50, 4, generator=torch.Generator().manual_seed(number))
        models[side] = {f"model.layers.{i}.w": torch.randn(3) for i in range(2)}
        models[side] |= {"model.embed_tokens.weight": shared, "lm_head.weight": shared.clone()}
    write(tmp_path, configs=dict.fromkeys(models, config), **models)
    assert merge(tmp_path, merge_method="dare_linear", parameters={"density": 0.5}).code == 0
    got = output(tmp_path)
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert not torch.equal(got["lm_head.weight"], models["base"]["lm_head.weight"])


@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("like", ["base", "ft"])
def test_integers_do_not_depend_on_how_alpha_is_known(gamma: int, like: str, tmp_path: Path) -> None:
    """A buffer is the same whether alpha is measured or said, and when the output's own recipe is run again."""
    sides = {s: {**tensors(n), "steps": torch.tensor([n])} for n, s in enumerate(("base", "a", "b"))}
    write(tmp_path, **sides)
    recipe = {"like": like, "parameters": {"weight": 0.9}}
    for out, alpha in (("measured", "auto"), ("said", 0.5)):
        assert merge(tmp_path, out=out, lines={"alpha": alpha, "beta": 0, "gamma": gamma}, **recipe).code == 0
    again = run_lines("merge", "--config", tmp_path / "measured" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0
    found = {out: int(output(tmp_path, out)["steps"]) for out in ("measured", "said", "again")}
    assert set(found.values()) == {1 if like == "ft" and gamma else 0}


def test_an_infinite_norm_is_no_alpha(tmp_path: Path) -> None:
    """Weights beyond all bounds make the merged norm infinite: refused, rather than scaled to nothing."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, lines={"beta": 0}, parameters={"weight": 1e39})
    refused(ran, 4, "alpha: auto", "very large")
    assert not (tmp_path / "out").exists()


def test_alpha_is_not_measured_where_nothing_rests_on_it(tmp_path: Path) -> None:
    """Models that equal their base are no hindrance where every coefficient is fixed."""
    write(tmp_path, base=tensors(0), a=tensors(0), b=tensors(0))
    scaling = {"beta": 1, "outside": "keep", "stacks": {"layers": {"alpha": 0.5, "beta": 0.5}}}
    ran = merge(tmp_path, "--json", merge_method="average", lines=scaling)
    assert (ran.code, ran.json["norms"]) == (0, None)


def test_lambda_multiplies_fixed_coefficients(tmp_path: Path) -> None:
    """What `outside`, `stacks` or `filter` fix is scaled by lambda, as everything is; gamma is not for them."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    scaling = {"alpha": 1, "beta": 0, "gamma": 2, "outside": "keep", "filter": {"layers.1": 0.25}}
    ran = merge(tmp_path, "--dry-run", "--json", parameters={"lambda": 0.5}, lines=scaling)
    found = {row["name"]: row["coefficient"] for row in ran.json["map"]}
    expected = {"layers.0.w": 1, "layers.1.w": 0.125, "layers.2.w": 1, "embed_tokens.weight": 0.5, "norm": 0.5}
    assert found == expected
    assert ran.json["filters"][0]["coefficient"] == 0.125
    assert ran.json["outside"]["first"] == 0.5


def test_the_card_has_the_coefficients_that_were_applied(tmp_path: Path) -> None:
    """A filter's coefficient is told as it is applied, lambda included."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    scaling = {"alpha": 1, "beta": 0, "filter": {"layers.1": 0.25}}
    assert merge(tmp_path, parameters={"lambda": 0.5}, lines=scaling).code == 0
    assert "| names with `layers.1` | | 0.125 | 0.125 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"merge_method": "ties", "parameters": {"density": 0.5}}, ["trim: tensor"]),
        ({"merge_method": "consensus", "parameters": {"k": 3}}, ["k: 3", "there are 2"]),
        ({"parameters": {"density": 0.5}}, ["mergekit ignores it"]),
        ({"merge_method": "dare_ties", "parameters": {"density": 0.5}}, ["rescale: l1"]),
        ({"dtype": "bfloat16"}, ["bfloat16", "arithmetic is float32"]),
        ({"models": "aa"}, ["merged 2 times"]),
        ({"parameters": {"lambda": [{"filter": "w", "value": 2}]}}, ["lambda differs by name"]),
        ({"merge_method": "ties", "parameters": {"density": 0}, "lines": {"beta": 0}}, ["alpha: auto is", "density"]),
    ],
)
def test_what_a_note_says(recipe: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """What a reader of the recipe might not expect is said in a note."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, **recipe)
    assert ran.code == 0
    assert [word for word in words if word not in ran.err] == [], ran.err


def test_rows_that_are_dropped_are_told(tmp_path: Path) -> None:
    """Whose rows of the embedding are kept, and that others go, is said."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, rows=9))
    ran = merge(tmp_path, resize="ft")
    assert ran.code == 0
    assert [word for word in ("6 rows", "9", "dropped") if word not in ran.err] == []


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({}, "scaled over depth by"),
        ({"merge_method": "dare_linear", "parameters": {"density": 0.5}}, "One model, merged by `dare_linear`"),
        ({"lines": None}, "One model, merged by `task_arithmetic`"),
    ],
)
def test_the_card_of_one_model(recipe: dict[str, Any], says: str, tmp_path: Path) -> None:
    """The model card describes a scaled fine-tune as one only where nothing else was done to it."""
    write(tmp_path, base=tensors(0), a=tensors(1))
    assert merge(tmp_path, models="a", **{"lines": {"alpha": 0.5, "beta": 0.5}} | recipe).code == 0
    assert says in (tmp_path / "out" / "README.md").read_text()


def test_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    """The soft limit of open files is raised as far as is needed."""
    write_checkpoint(tmp_path / "base", {f"layers.{i}.w": torch.zeros(2) for i in range(60)}, shards=60)
    for model in "ab":
        write_checkpoint(tmp_path / model, {f"layers.{i}.w": torch.ones(2) for i in range(60)}, shards=60)
    text = yaml.safe_dump({"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]})
    (tmp_path / "merge.yaml").write_text(text)
    program = (
        "import resource\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))\n"
        "from lines_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "merge", "--config", "merge.yaml", "-o", "out", "--device", "cpu"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_a_path_below_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that counts from the recipe's folder is looked for there, not as conf/base on the Hub."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "merge.yaml").write_text("base_model: base\nmodels: [{model: ft}]\n")
    monkeypatch.chdir(tmp_path)
    ran = run_lines("merge", "--config", "conf/merge.yaml", "-o", "out")
    assert (ran.code, ran.trace) == (3, "")
    assert "conf/base" in ran.err
    assert "hub" not in ran.err.lower()
