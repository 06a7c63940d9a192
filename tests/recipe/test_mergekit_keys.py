"""What mergekit's keys mean in a recipe: parameters, models, slices, tokenizer, dtype; and where that differs."""

from __future__ import annotations

import copy
import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.crossed import by_turns
from support.recipes_of_merges import BLOCKS, LAYERS, TOKENIZERS, VALUES, merge, merged, of, said, write_models
from support.run import run_lines

# --- mergekit's meaning: parameters ---


def position(name: str) -> float:
    """Where a tensor stands in the depth, as mergekit has it: 0 outside the blocks."""
    return int(name.split(".")[2]) / (LAYERS - 1) if name in BLOCKS else 0.0


def reads(setting: Any, name: str) -> float | None:
    """What mergekit reads from a setting for one tensor."""
    if isinstance(setting, list) and isinstance(setting[0], dict):
        for condition in setting:
            if condition.get("filter", "*") == "*" or condition["filter"] in name:
                return reads(condition["value"], name)
        return None
    if isinstance(setting, list):
        return float(np.interp(position(name), np.linspace(0, 1, len(setting)), setting))
    return setting


def any_setting(rng: random.Random) -> Any:
    """A number, a gradient, or filters over both."""
    number = lambda: rng.choice([0.0, 0.25, 0.5, 1.0, 1.5, -0.75])
    gradient = lambda: [number() for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.25:
        return number()
    if rng.random() < 0.3:
        return gradient()
    parts = rng.sample(["mlp", "attn", "head", "layers.1", "embed", "w", "*", None], rng.randint(1, 4))
    values = [gradient() if rng.random() < 0.4 else number() for _ in parts]
    return [
        {"value": value} if part is None else {"filter": part, "value": value}
        for part, value in zip(parts, values, strict=True)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_parameters_are_read_as_mergekit_reads_them(seed: int, models: Path, tmp_path: Path) -> None:
    """Of a model's setting, the top's and the default the first counts that says something of the tensor."""
    rng = random.Random(seed)
    places: dict[str, dict[str, Any]] = {place: {} for place in ("a", "b", "top")}
    for place in places.values():
        if rng.random() < 0.7:
            place["weight"] = any_setting(rng)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": of("a", "b", **places)}
    found = merged(models, tmp_path, {**recipe, "parameters": places["top"]})
    for name, value in found.items():
        expected = 0.0
        for model in ("a", "b"):
            settings = [places[place]["weight"] for place in (model, "top") if "weight" in places[place]]
            weights = [weight for setting in settings if (weight := reads(setting, name)) is not None]
            expected += VALUES[model] * (weights[0] if weights else 1.0)
        assert value == pytest.approx(expected, rel=1e-6, abs=1e-6), (name, places)


def test_a_filter_alone_needs_no_list(models: Path, tmp_path: Path) -> None:
    """mergekit reads one {filter, value} as a list of one."""
    recipe = {"base_model": "base", "models": of("b"), "parameters": {"weight": {"filter": "mlp", "value": 0.25}}}
    found = merged(models, tmp_path, recipe)
    assert {name: value for name, value in found.items() if value == 0.5}.keys() == {n for n in BLOCKS if "mlp" in n}
    assert set(found.values()) == {0.5, 2.0}


@pytest.mark.parametrize("outside", ["alpha", "position", "base", "keep"])
def test_a_gradient_has_its_first_value_outside_the_blocks(outside: str, models: Path, tmp_path: Path) -> None:
    """Whatever lines.outside says of the coefficient, a gradient's first value holds before and behind the blocks."""
    recipe = {
        "base_model": "base",
        "models": of("b"),
        "parameters": {"weight": [0.5, 0.75]},
        "lines": {"alpha": 0.25, "beta": 0.25, "outside": outside},
    }
    found = merged(models, tmp_path, recipe)
    by = {"alpha": (0.25, 0.25), "position": (0.25, 0.5), "base": (0, 0), "keep": (1, 1)}[outside]
    assert (found["model.embed.w"], found["head.w"]) == (by[0] * 1.0, by[1] * 1.0)
    assert (found["model.layers.0.mlp.w"], found["model.layers.3.mlp.w"]) == (0.25, 0.75)


@pytest.mark.parametrize("key", ["weight", "lambda"])
def test_a_gradient_over_one_layer(key: str, tmp_path: Path) -> None:
    """A stack of one layer takes a gradient's last value, and what lies outside it the first."""
    write_models(tmp_path / "in", ["embed.w", "layers.0.w", "norm.w"], {"base": 0.0, "a": 1.0})
    recipe = {"base_model": "base", "models": of("a"), "parameters": {key: [0.25, 0.5, 2.0]}}
    assert merged(tmp_path / "in", tmp_path, recipe) == {"embed.w": 0.25, "layers.0.w": 2.0, "norm.w": 0.25}


def test_a_gradient_needs_depth(tmp_path: Path) -> None:
    """Where depth cannot be told from the names a gradient is refused, and one number is not."""
    write_models(tmp_path / "in", ["one.w", "two.w"], {"base": 0.0, "a": 1.0})
    recipe = {"base_model": "base", "models": of("a")}
    ran = merge(tmp_path / "in", tmp_path, {**recipe, "parameters": {"weight": [0, 1]}})
    assert (ran.code, ran.trace) == (4, "")
    assert set(merged(tmp_path / "in", tmp_path, {**recipe, "parameters": {"weight": 0.5}}).values()) == {0.5}


@pytest.mark.parametrize(
    ("method", "by_default", "the_other_way"),
    [
        ("task_arithmetic", 3.0, (True, 1.5)),
        ("ties", 1.5, (False, 3.0)),
        ("dare_linear", 3.0, (True, 1.5)),
        ("dare_ties", 3.0, (True, 1.5)),
        ("linear", 1.5, (False, 3.0)),
        ("average", 1.5, None),
    ],
)
def test_normalize_has_its_own_default(
    method: str, by_default: float, the_other_way: tuple[bool, float] | None, models: Path, tmp_path: Path
) -> None:
    """Weights default to 1; ties and linear divide by their sum unless told not to, the others only when told."""
    recipe = {"merge_method": method, "base_model": "base", "models": of("a", "b")}
    if method == "linear":
        del recipe["base_model"]
    assert set(merged(models, tmp_path, recipe).values()) == {by_default}
    if the_other_way:
        normalize, value = the_other_way
        told = {**recipe, "parameters": {"normalize": normalize}}
        assert set(merged(models, tmp_path, told, "--force").values()) == {value}


@pytest.mark.parametrize(("written", "value"), [("1", 1.5), ("1.0", 1.5), ("0.0", 3.0)])
def test_a_switch_may_be_a_number(written: str, value: float, models: Path, tmp_path: Path) -> None:
    """Many a mergekit file says normalize: 1.0, which mergekit takes for true."""
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": of("a", "b"),
        "parameters": {"normalize": yaml.safe_load(written)},
    }
    assert set(merged(models, tmp_path, recipe).values()) == {value}


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [True, "l1", False, "density"])
def test_dare_without_a_density(method: str, rescale: Any, models: Path, tmp_path: Path) -> None:
    """With the default density of 1 nothing is dropped, so that no way to rescale changes anything."""
    recipe = {"merge_method": method, "base_model": "base", "models": of("a", "b"), "parameters": {"rescale": rescale}}
    assert set(merged(models, tmp_path, recipe).values()) == {3.0}


@pytest.mark.parametrize("where", ["top", "model"])
@pytest.mark.parametrize("value", [True, False, 1.0])
def test_int8_mask_is_accepted(where: str, value: Any, models: Path, tmp_path: Path) -> None:
    """int8_mask changes nothing, and that is said once."""
    mask = {"int8_mask": value}
    recipe = {"base_model": "base", "models": of("a", **({"a": mask} if where == "model" else {}))}
    ran = merge(models, tmp_path, {**recipe, **({"parameters": mask} if where == "top" else {})})
    assert ran.code == 0
    assert ran.err.count("int8_mask") == 1
    assert set(load_file(tmp_path / "out" / "model.safetensors")["head.w"].tolist()) == {1.0}


@pytest.mark.parametrize("empty", ["top", "model", "tokenizer_source", "dtype", "lines"])
def test_a_key_may_be_empty(empty: str, models: Path, tmp_path: Path) -> None:
    """A key with nothing behind it, such as `parameters:` before a comment, says nothing, as in mergekit."""
    recipe: dict[str, Any] = {"base_model": "base", "models": of("a")}
    if empty == "model":
        recipe["models"][0]["parameters"] = None
    else:
        recipe[{"top": "parameters"}.get(empty, empty)] = None
    assert set(merged(models, tmp_path, recipe).values()) == {1.0}


# --- mergekit's meaning: models, slices, tokenizer, dtype ---


@by_turns(method=["task_arithmetic", "ties", "average", "consensus", "dare_linear", "dare_ties"], at=[0, 1, 2])
def test_a_base_among_the_models_is_ignored(method: str, at: int, models: Path, tmp_path: Path) -> None:
    """A base that is listed, with parameters or without, has no task vector and changes no byte."""
    random_ones = {"parameters": {"density": 0.5}} if method.startswith("dare") else {}
    listed = of("noisy-a", "noisy-b")
    recipe = {"merge_method": method, "base_model": "noisy-base", "models": listed, **random_ones}
    assert merge(models, tmp_path / "without", recipe).code == 0
    weight = {} if method == "average" else {"parameters": {"weight": 7.0}}
    beside = {**recipe, "models": [*listed[:at], {"model": "noisy-base", **weight}, *listed[at:]]}
    assert merge(models, tmp_path / "with", beside).code == 0
    without, with_base = ((tmp_path / side / "out" / "model.safetensors").read_bytes() for side in ("without", "with"))
    assert without == with_base


def test_a_base_goes_by_any_of_its_names(models: Path, tmp_path: Path) -> None:
    """`./base` and `base` are one input: it is ignored among the models under either name."""
    for name in ("base", "a"):
        (tmp_path / name).symlink_to(models / name)
    text = "base_model: ./base\nmodels: [{model: base}, {model: a}]\nmerge_method: average\noutput: out\n"
    (tmp_path / "merge.yaml").write_text(text)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert float(load_file(tmp_path / "out" / "model.safetensors")["head.w"][0]) == 1.0


@pytest.mark.parametrize(
    "line",
    [
        "base_model: ./a\nmerge_method: slerp\nparameters: {t: 0}",
        "base_model: a/\nmerge_method: slerp\nparameters: {t: 0}",
        "merge_method: linear\ntokenizer_source: ./a",
        "merge_method: linear\nchat_template: ./a",
    ],
)
def test_an_input_goes_by_any_of_its_names(line: str, models: Path, tmp_path: Path) -> None:
    """Wherever a recipe names one of the models, another way to write the same path will do."""
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "merge.yaml").write_text(f"{line}\nmodels: [{{model: a}}, {{model: b}}]\noutput: out\n")
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err


@pytest.mark.parametrize(
    ("base", "listed", "t", "value"),
    [
        (None, ["a", "b"], 0, 1.0),
        (None, ["a", "b"], 1, 2.0),
        ("a", ["a", "b"], 0, 1.0),
        ("b", ["a", "b"], 0, 2.0),
        ("b", ["a", "b"], 1, 1.0),
        ("b", ["a"], 0, 2.0),
        ("b", ["a"], 0.25, 1.75),
    ],
)
def test_slerp_starts_at_the_base(
    base: str | None, listed: list[str], t: float, value: float, models: Path, tmp_path: Path
) -> None:
    """slerp goes from the base to the other model, as in mergekit, and without a base in the order of the list."""
    recipe = {"merge_method": "slerp", "models": of(*listed), "parameters": {"t": t}}
    assert set(merged(models, tmp_path, recipe | ({"base_model": base} if base else {})).values()) == {value}


def test_mergekits_own_slerp_example(models: Path, tmp_path: Path) -> None:
    """The well-known file with one slice, a t for attention, one for MLPs and a fallback runs unchanged."""
    sources = [{"model": str(models / model), "layer_range": [0, LAYERS]} for model in ("a", "b")]
    t = [
        {"filter": "attn", "value": [0, 0.5, 0.3, 0.7, 1]},
        {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
        {"value": 0.5},
    ]
    recipe = {
        "slices": [{"sources": sources}],
        "merge_method": "slerp",
        "base_model": "a",
        "parameters": {"t": t},
        "dtype": "float32",
    }
    found = merged(models, tmp_path, recipe)
    assert found == pytest.approx({name: 1 + float(reads(t, name) or 0) for name in found})


def sliced(recipe: dict[str, Any], models: Path, **of_slice: Any) -> dict[str, Any]:
    """The recipe with one slice of whole models in the place of `models`."""
    recipe = copy.deepcopy(recipe)
    sources = [
        {**source, "model": str(models / source["model"]), "layer_range": [0, LAYERS]} for source in recipe["models"]
    ]
    del recipe["models"]
    return {**recipe, "slices": [{"sources": sources, **of_slice}]}


@pytest.mark.slow
def test_one_slice_of_whole_models_is_models(models: Path, tmp_path: Path) -> None:
    """`slices` with one slice of all layers makes the same weights as `models`."""
    recipe = {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": [0.5, 2]}}),
        "parameters": {"density": 0.5},
    }
    assert merge(models, tmp_path / "models", recipe).code == 0
    ran = merge(models, tmp_path / "slices", sliced(recipe, models))
    assert ran.code == 0
    plain, cut = ((tmp_path / side / "out" / "model.safetensors").read_bytes() for side in ("models", "slices"))
    assert plain == cut


def test_a_slices_parameters_stand_between_the_models_and_the_tops(models: Path, tmp_path: Path) -> None:
    """What a slice's filters leave open is asked of the top's parameters, as in mergekit."""
    recipe = {"base_model": "base", "models": of("b"), "parameters": {"weight": 0.5}}
    weight = {"weight": [{"filter": "mlp", "value": 0.25}]}
    found = merged(models, tmp_path, sliced(recipe, models, parameters=weight))
    assert found == {name: 0.5 if "mlp" in name else 1.0 for name in found}


@pytest.mark.parametrize(
    ("of_slice", "layers", "word"),
    [
        ({"parameters": 3}, None, "parameters"),
        ({"parameters": [{"weight": 1}]}, None, "parameters"),
        ({"parameters": {"wieght": 1}}, None, "wieght"),
        ({"residual_weight": 1}, None, "residual_weight"),
        ({}, [0, 99], "layer_range"),
        ({}, [0], "layer_range"),
        ({}, "all", "layer_range"),
    ],
)
def test_other_slices_are_refused(of_slice: Any, layers: Any, word: str, models: Path, tmp_path: Path) -> None:
    """A slice that says what is not understood, or of layers that are not there, is refused by what it says."""
    recipe = sliced({"base_model": "base", "models": of("a")}, models, **of_slice)
    if layers:
        recipe["slices"][0]["sources"][0]["layer_range"] = layers
    ran = merge(models, tmp_path, recipe, "--dry-run")
    assert ran.code in (2, 4)
    assert word in said(ran)


def test_a_part_of_a_model_is_refused_whatever_depth_says(tmp_path: Path) -> None:
    """Where depth is unknown, nobody knows which layers are meant."""
    write_models(tmp_path, ["one.w", "two.w"], {"base": 0.0, "a": 1.0})
    recipe = sliced({"base_model": "base", "models": of("a")}, tmp_path)
    ran = merge(tmp_path, tmp_path / "to", recipe, "--dry-run")
    assert ran.code == 4
    assert "slices" in said(ran)


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer", "chat_template"])
@pytest.mark.parametrize("source", ["base", "a", "b"])
def test_tokenizer_and_template_of_a_named_input(key: str, source: str, models: Path, tmp_path: Path) -> None:
    """The tokenizer, or the chat template, comes from the base or from the model that is named; the rest does not."""
    recipe: dict[str, Any] = {"base_model": "base", "models": of("a", "b")}
    path = source if source == "base" else str(models / source)
    recipe[key] = {"source": path} if key == "tokenizer" else path
    merged(models, tmp_path, recipe)
    tokenizer = json.loads((tmp_path / "out" / "tokenizer.json").read_text())["version"]
    template = (tmp_path / "out" / "chat_template.jinja").read_text()
    assert (template if key == "chat_template" else tokenizer) == TOKENIZERS[source]
    if key == "chat_template":
        assert tokenizer == TOKENIZERS["base"]


@pytest.mark.parametrize(("method", "source"), [("task_arithmetic", "base"), ("linear", "a")])
def test_config_and_tokenizer_come_from_the_base(method: str, source: str, models: Path, tmp_path: Path) -> None:
    """Unless told otherwise the tokenizer is the base's, or the first model's where there is no base."""
    recipe = {"merge_method": method, "models": of("a", "b")}
    merged(models, tmp_path, recipe | ({"base_model": "base"} if method == "task_arithmetic" else {}))
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["version"] == TOKENIZERS[source]


TOKENIZER_KEYS: dict[str, dict[str, Any]] = {
    "tokenizer_source": {"tokenizer_source": "union"},
    "source": {"tokenizer": {"source": "union"}},
    "source, and nothing else": {"tokenizer": {"source": "union", "tokens": None, "pad_to_multiple_of": None}},
}


@pytest.mark.parametrize("case", TOKENIZER_KEYS)
def test_union_is_read(case: str, models: Path, tmp_path: Path) -> None:
    """A union of vocabularies may be said in mergekit's two ways; without token embeddings it says nothing."""
    ran = merge(models, tmp_path, {"base_model": "base", "models": of("a"), **TOKENIZER_KEYS[case]}, "--json")
    assert ran.code == 0, ran.err
    assert ran.json["recipe"]["tokenizer_source"] == "union"
    assert any("tokenizer_source: union says nothing" in note for note in ran.json["notes"])


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        ({"tokens": {"x": {"source": "d"}}}, ["tokenizer.tokens", "'d'"]),
        ({"tokens": {"x": {"source": {"kind": "zeros"}}}}, ["tokenizer.tokens.x.source", "kind: zero"]),
        ({"tokens": {"x": {"source": {"kind": "model_token", "model": "a"}}}}, ["token_id"]),
        (
            {"tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": "y", "token_id": 1}}}},
            ["token_id"],
        ),
        ({"tokens": {"x": {"force": True}}}, ["tokenizer.tokens.x", "force"]),
        ({"tokens": {"x": {"sources": "a"}}}, ["tokenizer.tokens.x.sources"]),
        ({"pad_to_multiple_of": 0}, ["tokenizer.pad_to_multiple_of"]),
        ({"pad_to_multiple_of": True}, ["tokenizer.pad_to_multiple_of"]),
        ({"source": "d", "pad_to_multiple_of": 8}, ["tokenizer.source", "'d'", "union"]),
        ({"source": "union", "padding": 8}, ["tokenizer.padding"]),
    ],
)
def test_what_tokenizer_may_say(tokenizer: dict[str, Any], words: list[str], models: Path, tmp_path: Path) -> None:
    """What is wrong under `tokenizer` is named with its place."""
    ran = merge(models, tmp_path, {"base_model": "base", "models": of("a"), "tokenizer": tokenizer})
    assert ran.code == 2
    assert all(word in said(ran) for word in words), said(ran)


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("name", ["base", "a"])
def test_a_model_may_be_called_base(key: str, name: str, models: Path, tmp_path: Path) -> None:
    """Without a base_model, `base` can only be the model of that name, and never ends in a traceback."""
    for model in ("base", "a"):
        (tmp_path / model).symlink_to(models / model)
    text = f"merge_method: linear\nmodels: [{{model: a}}, {{model: base}}]\n{key}: {name}\noutput: out\n"
    (tmp_path / "merge.yaml").write_text(text)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert ran.trace == ""
    assert ran.code in ((0, 2) if name == "base" else (0,))
    if ran.code == 0 and key == "tokenizer_source":
        assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["version"] == TOKENIZERS[name]


@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        ({}, torch.float32),
        ({"dtype": "float16"}, torch.float16),
        ({"out_dtype": "bfloat16"}, torch.bfloat16),
        ({"dtype": "float32", "out_dtype": "bfloat16"}, torch.bfloat16),
        ({"out_dtype": "float16", "dtype": "bfloat16"}, torch.float16),
        ({"dtype": "float16", "out_dtype": None}, torch.float16),
    ],
)
def test_out_dtype_wins(dtypes: dict[str, Any], stored: torch.dtype, models: Path, tmp_path: Path) -> None:
    """Every float tensor is written as out_dtype, else as dtype, else as the base has it."""
    assert merge(models, tmp_path, {"base_model": "base", "models": of("a"), **dtypes}).code == 0
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {stored}


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_dtype_never_lowers_the_arithmetic(method: str, tmp_path: Path) -> None:
    """With dtype: bfloat16 a difference that bfloat16 cannot hold still counts when it is weighted up."""
    write_models(tmp_path, ["layers.0.w", "layers.1.w"], {"base": 1.0, "a": 1 + 2.0**-12})
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "linear":
        weights = {"a": {"weight": 64}, "base": {"weight": -63}}
        recipe |= {"models": of("a", "base", **weights), "parameters": {"normalize": False}}
    else:
        recipe |= {"base_model": "base", "models": of("a"), "parameters": {"weight": 64}}
    assert set(merged(tmp_path, tmp_path / "to", recipe).values()) == {1 + 2.0**-6}


# --- deliberate differences are said ---


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("method", "parameters", "words"),
    [
        ("ties", {"density": 0.5}, ["trim: tensor", "whole model"]),
        ("ties", {"density": [0.5, 1]}, ["tensor"]),
        ("ties", {"density": 0.5, "trim": "global"}, []),
        ("ties", {"density": 0.5, "trim": "tensor"}, []),
        ("ties", {}, []),
        ("dare_linear", {"density": 0.5}, ["rescale: l1"]),
        ("dare_ties", {"density": 0.5}, ["rescale: l1"]),
        ("dare_ties", {"density": 0.5, "rescale": True}, []),
        ("dare_linear", {}, []),
    ],
)
def test_differences_from_mergekit_are_noted(
    method: str, parameters: Any, words: list[str], dry_run: bool, models: Path, tmp_path: Path
) -> None:
    """Where a mergekit file means something else here a note says what and how to have it; else there is none."""
    recipe = {"merge_method": method, "base_model": "noisy-base", "models": of("noisy-a"), "parameters": parameters}
    ran = merge(models, tmp_path, recipe, *(["--dry-run"] if dry_run else []))
    assert ran.code == 0
    notes = [line for line in ran.err.splitlines() if line.startswith("note: ") and "config.json" not in line]
    assert len(notes) == bool(words), ran.err
    assert [word for word in words if word not in notes[0]] == []


def test_a_note_contradicts_nothing(models: Path, tmp_path: Path) -> None:
    """A density that varies is trimmed as mergekit trims, so the note does not make a difference of it."""
    recipe = {"merge_method": "ties", "base_model": "noisy-base", "models": of("noisy-a")}
    ran = merge(models, tmp_path, {**recipe, "parameters": {"density": [0.5, 1]}}, "--dry-run")
    notes = [line for line in ran.err.splitlines() if "trim" in line]
    assert notes
    assert not any(re.search(r"tensor by tensor.*; mergekit trims tensor by tensor", note) for note in notes)


@pytest.mark.parametrize(
    ("parameters", "listed", "is_said"), [({}, ["a"], True), ({"k": 3}, ["a", "b"], True), ({}, ["a", "b"], False)]
)
def test_a_consensus_that_nothing_can_reach_is_said(
    parameters: Any, listed: list[str], is_said: bool, models: Path, tmp_path: Path
) -> None:
    """Where k is more than there are models the result is the base, and a note says so before it is written."""
    recipe = {"merge_method": "consensus", "base_model": "base", "models": of(*listed), "parameters": parameters}
    ran = merge(models, tmp_path, recipe, "--dry-run")
    assert ran.code == 0
    assert bool(re.search(r"^(note|warning): .*\bk\b.*base", ran.err, re.MULTILINE)) == is_said, ran.err
