"""The inputs of a merge are matched: tensors that some lack, tied heads, prefixes, vocabularies, shapes, dtypes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.bits import raw
from support.crossed import by_turns, crossed
from support.files import snapshot, write_checkpoint
from support.merging import WIDTH, Tensors, merge, output, refused, same, tensors, total, write

# --- tensors that some lack ---

OWNERS = ["base", "a", "b", "base a", "base b", "a b"]


@crossed(owners=OWNERS, name=["layers.1.extra", "pooler"], missing=["error", "copy", "ft", "skip"])
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


@by_turns(wrapped=["base", "a", "b", "ab", "base b"], method=["task_arithmetic", "ties"])
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
@pytest.mark.some(6)
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
@pytest.mark.some(8)
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


@pytest.mark.slow
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
