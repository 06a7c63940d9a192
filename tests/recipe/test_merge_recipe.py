"""The recipe of `lines merge` as its user meets it: what mergekit's keys mean, refusals, --set, paths, --dry-run."""

from __future__ import annotations

import copy
import json
import random
import re
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import RecipeError
from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.run import Ran, run_lines

LAYERS = 4
BLOCKS = [f"model.layers.{i}.{part}.w" for i in range(LAYERS) for part in ("attn", "mlp")]
OUTSIDE = ["model.embed.w", "model.norm.w", "head.w"]
VALUES = {"base": 0.0, "a": 1.0, "b": 2.0, "c": 4.0}
TOKENIZERS = {"base": "of base", "a": "of a", "b": "of b"}


def write_models(folder: Path, names: list[str], values: dict[str, float]) -> None:
    """A checkpoint for each model in which every entry is the same, so that a merged entry tells the weights."""
    for model, value in values.items():
        tensors = {name: torch.full((3,), value) for name in names}
        write_checkpoint(folder / model, tensors, config={"model_type": "toy", "torch_dtype": "float32"})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a, b and c (no tokenizer) of constant tensors; noisy-base, -a and -b of random ones."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder, [*OUTSIDE, *BLOCKS], VALUES)
    for model, text in TOKENIZERS.items():
        (folder / model / "tokenizer.json").write_text(json.dumps({"version": text}))
        (folder / model / "chat_template.jinja").write_text(text)
    generator = torch.Generator().manual_seed(4)
    for model in ("noisy-base", "noisy-a", "noisy-b"):
        tensors = {name: torch.randn(40, generator=generator) for name in [*OUTSIDE, *BLOCKS]}
        write_checkpoint(folder / model, tensors)
    return folder


def recipe_text(folder: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """The recipe with `folder` before the names of models, so that it may stand anywhere."""
    recipe = copy.deepcopy(recipe)
    for key in ("base_model", "tokenizer_source", "chat_template"):
        if recipe.get(key) not in (None, "union") and not (key != "base_model" and recipe[key] == "base"):
            recipe[key] = str(folder / recipe[key])
    for source in recipe.get("models", ()):
        source["model"] = str(folder / source["model"])
    return recipe


def merge(models: Path, to: Path, recipe: dict[str, Any], *args: object) -> Ran:
    """Run a recipe whose models lie in `models`, into `to/out`."""
    to.mkdir(exist_ok=True)
    (to / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, recipe), sort_keys=False))
    return run_lines("merge", "--config", to / "merge.yaml", "-o", to / "out", *args)


def merged(models: Path, to: Path, recipe: dict[str, Any], *args: object) -> dict[str, float]:
    """The one value of every tensor that a recipe makes of constant ones."""
    ran = merge(models, to, recipe, *args)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return {name: float(tensor[0]) for name, tensor in load_file(to / "out" / "model.safetensors").items()}


def of(*names: str, **parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """`models:`, with parameters for some."""
    return [{"model": name, **({"parameters": parameters[name]} if name in parameters else {})} for name in names]


def said(ran: Ran) -> str:
    """A refusal's message, on one line."""
    assert ran.trace == ""
    return " ".join(ran.err.split())


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


def test_one_slice_of_whole_models_is_models(models: Path, tmp_path: Path) -> None:
    """`slices` with one slice makes the same weights as `models`, and says how it was read."""
    recipe = {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": [0.5, 2]}}),
        "parameters": {"density": 0.5},
    }
    assert merge(models, tmp_path / "models", recipe).code == 0
    ran = merge(models, tmp_path / "slices", sliced(recipe, models))
    assert ran.code == 0
    assert "slice" in ran.err
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
        ({}, [0, 2], "layer_range"),
        ({}, [1, 4], "layer_range"),
        ({}, [0], "layer_range"),
        ({}, "all", "layer_range"),
    ],
)
def test_other_slices_are_refused(of_slice: Any, layers: Any, word: str, models: Path, tmp_path: Path) -> None:
    """A slice that is not of whole models, or that says what is not understood, is refused by what it says."""
    recipe = sliced({"base_model": "base", "models": of("a")}, models, **of_slice)
    if layers:
        recipe["slices"][0]["sources"][0]["layer_range"] = layers
    ran = merge(models, tmp_path, recipe, "--dry-run")
    assert ran.code == 2
    assert word in said(ran)


def test_a_part_of_a_model_is_refused_whatever_depth_says(tmp_path: Path) -> None:
    """A layer_range cannot be checked where depth is unknown, so it is refused there, too."""
    write_models(tmp_path, ["one.w", "two.w"], {"base": 0.0, "a": 1.0})
    recipe = sliced({"base_model": "base", "models": of("a")}, tmp_path)
    ran = merge(tmp_path, tmp_path / "to", recipe, "--dry-run")
    assert ran.code in (2, 4)
    assert "layer_range" in said(ran)


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


@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_union_is_refused_by_name(key: str, models: Path, tmp_path: Path) -> None:
    """A union of vocabularies is refused by that word, and what can be said instead is named."""
    value = {"source": "union"} if key == "tokenizer" else "union"
    ran = merge(models, tmp_path, {"base_model": "base", "models": of("a"), key: value})
    assert ran.code == 2
    assert "union" in said(ran)
    assert "base" in said(ran)


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


# --- refusals of files: file, line, key, nearest key ---

HEAD = "merge_method: ties\nbase_model: base\n"
MODELS = "models:\n  - model: a\n  - model: b\n"
FILES: dict[str, tuple[str, int, list[str]]] = {
    # name: the text, the line, what the message has
    "top": (HEAD + MODELS + "\n# a comment\ndtpye: float16\n", 8, ["dtpye", "mean dtype"]),
    "first": ("merge_mehtod: ties\n" + MODELS + "base_model: base\n", 1, ["merge_mehtod", "mean merge_method"]),
    "method": ("base_model: base\n\nmerge_method: tise\n" + MODELS, 3, ["tise", "mean ties"]),
    "of a model": (HEAD + MODELS + "    paramters: {weight: 1}\n", 6, ["models.1.paramters", "parameters"]),
    "no model": (HEAD + "models:\n  - model: a\n  - modle: b\n", 5, ["models.1.model"]),
    "weight too high up": (HEAD + MODELS + "    weight: 0.5\n", 6, ["models.1.weight", "parameters"]),
    "weight at the top": (HEAD + "weight: 0.5\n" + MODELS, 3, ["weight", "parameters"]),
    "parameter": (HEAD + MODELS + "parameters:\n  weight: 1\n  densty: 1\n", 8, ["densty", "mean density"]),
    "parameter of a model": (
        HEAD + "models:\n  - model: a\n    parameters:\n      weight: 1\n      densty: 1\n",
        7,
        ["models.0.parameters.densty", "mean density"],
    ),
    "parameter of all": (
        HEAD + "models:\n  - model: a\n    parameters:\n      normalize: true\n",
        6,
        ["models.0.parameters.normalize", "parameters"],
    ),
    "parameter of another method": (HEAD + MODELS + "parameters:\n  t: 0.5\n", 7, ["parameters.t", "slerp"]),
    "dtype below parameters": (
        HEAD + MODELS + "parameters:\n  dtype: float16\n",
        7,
        ["parameters.dtype", "stands at the top"],
    ),
    "alpha below parameters": (HEAD + MODELS + "parameters:\n  alpha: 1\n", 7, ["parameters.alpha", "lines.alpha"]),
    "alpha at the top": (HEAD + MODELS + "alpha: 1\n", 6, ["alpha", "lines.alpha"]),
    "lambda below lines": (HEAD + MODELS + "lines:\n  beta: 1\n  lambda: 1\n", 8, ["lines.lambda", "parameters"]),
    "key of lines": (HEAD + MODELS + "lines:\n  beta: 1\n  gama: 1\n", 8, ["lines.gama", "mean lines.gamma"]),
    "no beta": (HEAD + MODELS + "lines:\n  alpha: 1\n", 6, ["lines", "beta"]),
    "flow style": (
        HEAD + "models: [{model: a},\n  {model: b,\n   parameters: {weight: 1,\n     densty: 1}}]\n",
        6,
        ["models.1.parameters.densty"],
    ),
    "flow parameters": (HEAD + MODELS + "parameters: {weight: 1,\n\n  density: 2}\n", 8, ["parameters.density", "2"]),
    "in a stack": (
        HEAD + MODELS + "lines:\n  beta: 1\n  stacks:\n    text:\n      alpha: 0\n      beta: x\n",
        11,
        ["lines.stacks.text.beta"],
    ),
    "a filter of lines": (HEAD + MODELS + "lines:\n  beta: 1\n  filter:\n    norm: drop\n", 9, ["lines.filter.norm"]),
    "a number for a key": (HEAD + MODELS + "7: x\n", 6, ["7"]),
    "yes for a key": (HEAD + "yes: x\n" + MODELS, 3, []),
    "a number for a parameter": (HEAD + MODELS + "parameters:\n  weight: 1\n  7: 1\n", 8, ["7"]),
    "out_dtype": (HEAD + MODELS + "dtype: float32\nout_dtype: int8\n", 7, ["out_dtype", "int8"]),
    "dtype below out_dtype": (HEAD + MODELS + "dtype: int8\nout_dtype: float16\n", 6, ["dtype", "int8"]),
    "tokenizer": (HEAD + MODELS + "tokenizer:\n  source: union\n", 7, ["tokenizer", "union"]),
    "tokenizer's tokens": (HEAD + MODELS + "tokenizer:\n  source: base\n  tokens: {}\n", 6, ["tokenizer", "source"]),
    "tokenizer twice": (HEAD + MODELS + "tokenizer_source: a\ntokenizer:\n  source: a\n", 7, ["tokenizer_source"]),
    "tokenizer of a stranger": (HEAD + MODELS + "tokenizer_source: d\n", 6, ["tokenizer_source", "'d'"]),
    "a slice's source": (
        HEAD + "slices:\n  - sources:\n      - model: a\n      - model: b\n        parameters:\n          wieght: 1\n",
        8,
        ["wieght", "mean weight"],
    ),
    "a slice's parameters": (
        HEAD + "slices:\n  - sources:\n      - model: a\n    parameters:\n      wieght: 1\n",
        7,
        ["wieght", "mean weight"],
    ),
    "slices of other models": (
        HEAD + "slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n- sources: [{model: b, layer_range: [2, 4]}]\n",
        3,
        ["slices", "same models"],
    ),
    "slices and models": (HEAD + MODELS + "slices:\n  - sources: [{model: a}]\n", 6, ["slices", "models"]),
    "notes": (HEAD + MODELS + "notes: [mine]\n", 6, ["notes"]),
    "misplaced model": (HEAD + MODELS + "model: c\n", 6, ["model", "models"]),
    "linear and a base": (
        "models: [{model: a}]\nmerge_method: linear\n\nbase_model: base\n",
        4,
        ["base_model", "lines"],
    ),
    "passthrough and a base": (
        "base_model: base\nmodels: [{model: a}]\nmerge_method: passthrough\n",
        1,
        ["base_model", "lines"],
    ),
    "a key twice": (HEAD + MODELS + "base_model: c\n", 6, ["base_model", "twice"]),
}


@pytest.mark.parametrize(("text", "line", "words"), FILES.values(), ids=FILES)
def test_a_refusal_names_file_line_and_key(text: str, line: int, words: list[str], tmp_path: Path) -> None:
    """A key that is wrong is named with its file and line, and with the key that was meant."""
    path = tmp_path / "merge.yaml"
    path.write_text(text)
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out", "--dry-run")
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    message = said(ran)
    assert str(path) in message
    assert re.search(rf"\bline {line}\b", message), message
    assert [word for word in words if word not in message] == [], message


def test_a_refusal_is_the_same_from_python(tmp_path: Path) -> None:
    """`load_recipe` raises what the command line prints, as a LinesError."""
    path = tmp_path / "merge.yaml"
    path.write_text(HEAD + MODELS + "lines:\n  bta: 1\n")
    with pytest.raises(lines.LinesError, match=r"line 7: lines\.bta .*lines\.beta") as refused:
        lines.load_recipe(path)
    assert refused.value.message in said(run_lines("merge", "--config", path))


def test_several_mistakes_are_named_at_once(tmp_path: Path) -> None:
    """All of a file's unknown keys are named in one go, each with its line."""
    path = tmp_path / "merge.yaml"
    path.write_text(HEAD + MODELS + "dtpye: float16\nlines:\n  beta: 1\n  gama: 2\n")
    message = said(run_lines("merge", "--config", path))
    assert "line 6: dtpye" in message
    assert "line 9: lines.gama" in message


SHAPES = {
    "models a mapping": "models: {a: 1}",
    "models null": "models:",
    "models of null": "models: [null]",
    "models of names": "models: [a, b]",
    "models empty": "models: []",
    "models without one": "models: [{parameters: {weight: 1}}]",
    "models misspelt": "models: [{model: a, wieght: 1}]",
    "models a number": "models: 3",
    "lines a number": "models: [{model: a}]\nlines: 3",
    "lines a word": "models: [{model: a}]\nlines: auto",
    "parameters a list": "models: [{model: a}]\nparameters: []",
    "parameters of a model a list": "models: [{model: a, parameters: [1]}]",
    "parameters with a number for a key": "models: [{model: a}]\nparameters: {1: 2}",
    "method null": "models: [{model: a}]\nmerge_method:",
    "output a list": "models: [{model: a}]\noutput: [out]",
}


@pytest.mark.parametrize("text", SHAPES.values(), ids=SHAPES)
def test_a_refusal_speaks_of_the_file(text: str, tmp_path: Path) -> None:
    """A value of the wrong shape is refused once, in words of YAML and not of the library that found it."""
    path = tmp_path / "merge.yaml"
    path.write_text(f"base_model: base\n{text}\n")
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out")
    assert ran.code == 2
    assert not re.search(r"[Tt]uple|dictionary|instance of|\[key\]|after validation|\bNone\b", said(ran)), ran.err
    assert said(ran).count(": models: ") <= 1, ran.err


# --- impossible values ---

VALUES_REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    # name: method, what is added to the recipe, what the message has
    "density above 1": ("ties", {"parameters": {"density": 1.01}}, ["parameters.density", "0 to 1", "1.01"]),
    "density below 0": ("dare_ties", {"parameters": {"density": -0.1}}, ["parameters.density", "0 to 1"]),
    "density in a gradient": ("ties", {"parameters": {"density": [0.5, 2]}}, ["parameters.density", "2"]),
    "density in a filter": (
        "ties",
        {"parameters": {"density": [{"filter": "mlp", "value": [0.1, 7]}]}},
        ["parameters.density", "7"],
    ),
    "density of a model": ("ties", {"models": of("a", "b", b={"density": 3})}, ["models.1.parameters.density", "3"]),
    "weight NaN": ("ties", {"parameters": {"weight": float("nan")}}, ["parameters.weight", "nan"]),
    "weight NaN spelt": ("ties", {"parameters": {"weight": "NaN"}}, ["parameters.weight", "NaN"]),
    "weight Inf": ("ties", {"parameters": {"weight": float("inf")}}, ["parameters.weight", "inf"]),
    "weight true": ("ties", {"parameters": {"weight": True}}, ["parameters.weight", "rue"]),
    "weight a word": ("ties", {"parameters": {"weight": "much"}}, ["parameters.weight", "much"]),
    "weight an empty list": ("ties", {"parameters": {"weight": []}}, ["parameters.weight", "list"]),
    "weight a list of lists": ("ties", {"parameters": {"weight": [[1, 2]]}}, ["parameters.weight"]),
    "weight half filters": (
        "ties",
        {"parameters": {"weight": [{"filter": "mlp", "value": 1}, 0.5]}},
        ["parameters.weight", "filter"],
    ),
    "filter without value": ("ties", {"parameters": {"weight": [{"filter": "mlp"}]}}, ["parameters.weight", "value"]),
    "filter with more": (
        "ties",
        {"parameters": {"weight": [{"filter": "mlp", "value": 1, "model": "a"}]}},
        ["parameters.weight", "filter"],
    ),
    "filter empty": ("ties", {"parameters": {"weight": [{"filter": "", "value": 1}]}}, ["parameters.weight", "filter"]),
    "filter a number": (
        "ties",
        {"parameters": {"weight": [{"filter": 3, "value": 1}]}},
        ["parameters.weight", "filter"],
    ),
    "normalize a word": ("ties", {"parameters": {"normalize": "much"}}, ["parameters.normalize", "true", "false"]),
    "trim a word": ("ties", {"parameters": {"trim": "layer"}}, ["parameters.trim", "global", "tensor", "layer"]),
    "trim a list": ("ties", {"parameters": {"trim": ["global", "tensor"]}}, ["parameters.trim"]),
    "agreement a word": ("ties", {"parameters": {"agreement": "avg"}}, ["parameters.agreement", "mean", "sum", "max"]),
    "agreement sum, normalize": (
        "ties",
        {"parameters": {"agreement": "sum", "normalize": True}},
        ["agreement", "normalize"],
    ),
    "agreement max, normalize": (
        "dare_ties",
        {"parameters": {"agreement": "max", "normalize": True}},
        ["agreement", "normalize"],
    ),
    "agreement mean, no normalize": (
        "ties",
        {"parameters": {"agreement": "mean", "normalize": False}},
        ["agreement", "normalize"],
    ),
    "trim global, gradient": (
        "ties",
        {"parameters": {"trim": "global", "density": [0.1, 0.2]}},
        ["parameters.trim", "density", "tensor"],
    ),
    "trim global, filter of a model": (
        "task_arithmetic",
        {
            "models": of("a", "b", a={"density": [{"filter": "mlp", "value": 0.1}]}),
            "parameters": {"trim": "global"},
        },
        ["parameters.trim", "density", "tensor"],
    ),
    "rescale a word": ("dare_linear", {"parameters": {"rescale": "l2"}}, ["parameters.rescale", "density", "l1"]),
    "seed a fraction": ("dare_linear", {"parameters": {"seed": 0.5}}, ["parameters.seed", "whole"]),
    "seed negative": ("dare_linear", {"parameters": {"seed": -1}}, ["parameters.seed"]),
    "seed a list": ("dare_linear", {"parameters": {"seed": [1, 2]}}, ["parameters.seed"]),
    "k negative": ("consensus", {"parameters": {"k": -1}}, ["parameters.k", "0 or more"]),
    "k a fraction": ("consensus", {"parameters": {"k": 1.5}}, ["parameters.k", "whole", "1.5"]),
    "k true": ("consensus", {"parameters": {"k": True}}, ["parameters.k", "whole"]),
    "k infinite": ("consensus", {"parameters": {"k": float("inf")}}, ["parameters.k"]),
    "mask_lambda negative": ("consensus", {"parameters": {"mask_lambda": -0.1}}, ["parameters.mask_lambda"]),
    "on a word": ("consensus", {"parameters": {"on": "dare"}}, ["parameters.on", "sum", "ties"]),
    "density on a sum": ("consensus", {"parameters": {"density": 0.5}}, ["density", "on: ties"]),
    "density on a sum, gradient": ("consensus", {"parameters": {"density": [1, 0.5]}}, ["density", "on: ties"]),
    "density on a sum, filter": (
        "consensus",
        {"parameters": {"density": [{"filter": "mlp", "value": 0.5}]}},
        ["density", "on: ties"],
    ),
    "density on a sum, of a model": (
        "consensus",
        {"models": of("a", "b", b={"density": 0.5})},
        ["density", "on: ties"],
    ),
    "t missing": ("slerp", {"base_model": None}, ["parameters.t", "missing"]),
    "t above 1": ("slerp", {"base_model": None, "parameters": {"t": 1.5}}, ["parameters.t", "0 to 1"]),
    "t of a model": ("slerp", {"base_model": None, "models": of("a", "b", a={"t": 0.5})}, ["models.0.parameters.t"]),
    "t for some tensors": (
        "slerp",
        {"base_model": None, "parameters": {"t": [{"filter": "mlp", "value": 0.5}]}},
        ["parameters.t"],
    ),
    "slerp of one": (
        "slerp",
        {"base_model": None, "models": of("a"), "parameters": {"t": 0.5}},
        ["models", "slerp", "2"],
    ),
    "slerp of three": (
        "slerp",
        {"base_model": None, "models": of("a", "b", "c"), "parameters": {"t": 0.5}},
        ["models", "slerp", "2", "3"],
    ),
    "slerp with a third for its base": ("slerp", {"parameters": {"t": 0.5}}, ["base_model", "slerp"]),
    "ties without a base": ("ties", {"base_model": None}, ["base_model", "missing", "ties"]),
    "average without a base": ("average", {"base_model": None}, ["base_model", "missing", "average"]),
    "lines without a base": ("linear", {"base_model": None, "lines": {"beta": 1}}, ["base_model", "lines"]),
    "linear with a base": ("linear", {}, ["base_model", "linear"]),
    "passthrough of two": ("passthrough", {"base_model": None}, ["models", "passthrough", "1", "2"]),
    "passthrough with a base": ("passthrough", {"models": of("a")}, ["base_model", "passthrough"]),
    "weights of an average": ("average", {"parameters": {"weight": 1}}, ["parameters.weight", "average"]),
    "alpha a word": ("ties", {"lines": {"alpha": "automatic", "beta": 1}}, ["lines.alpha", "auto"]),
    "outside a word": ("ties", {"lines": {"beta": 1, "outside": "deep"}}, ["lines.outside", "position"]),
    "a stack that is not there": ("ties", {"lines": {"beta": 1, "stacks": {"text": "keep"}}}, ["text"]),
    "base, and none": ("linear", {"base_model": None, "tokenizer_source": "base"}, ["tokenizer_source", "base_model"]),
}


def test_a_parameter_s_filter_that_matches_nothing_says_nothing(models: Path, tmp_path: Path) -> None:
    """As in mergekit a filter without a match falls through to the next place, and a note names it."""
    weights = {"a": [{"filter": "xyzzy", "value": 9}]}
    recipe = {"base_model": "base", "models": [{"model": "a", "parameters": {"weight": weights["a"]}}, {"model": "b"}]}
    plain = merged(models, tmp_path / "plain", {"base_model": "base", "models": of("a", "b")})
    ran = merge(models, tmp_path / "to", recipe, "--dry-run")
    assert "xyzzy" in said(ran)
    filtered = merged(models, tmp_path / "filtered", recipe)
    assert filtered == plain


@pytest.mark.parametrize(("method", "more", "words"), VALUES_REFUSED.values(), ids=VALUES_REFUSED)
def test_an_impossible_value_is_refused(
    method: str, more: dict[str, Any], words: list[str], models: Path, tmp_path: Path
) -> None:
    """What no checkpoint could make possible is refused by its key and value, before anything is written."""
    recipe = {"merge_method": method, "base_model": "base", "models": of("a", "b"), **more}
    if recipe["base_model"] is None:
        del recipe["base_model"]
    for arguments in (["--dry-run"], []):
        ran = merge(models, tmp_path, recipe, *arguments)
        message = said(ran)
        assert ran.code == 2, message
        assert [word for word in words if word not in message] == [], message
    assert not (tmp_path / "out").exists()


def test_a_key_that_yaml_takes_for_a_switch(models: Path, tmp_path: Path) -> None:
    """`on: ties` needs no quotes, although YAML reads a bare `on` as true."""
    paths = "".join(f"  - model: {models / name}\n" for name in ("noisy-a", "noisy-b"))
    found = []
    for number, key in enumerate(("on", "'on'")):
        text = f"merge_method: consensus\nbase_model: {models / 'noisy-base'}\nmodels:\n{paths}"
        (tmp_path / "merge.yaml").write_text(f"{text}parameters:\n  density: 0.5\n  {key}: ties\n  k: 1\n")
        ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / f"{number}.safetensors")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        found.append((tmp_path / f"{number}.safetensors").read_bytes())
    assert found[0] == found[1]


# --- --set ---

PLAIN = "base_model: /x/base\nmodels:\n  - model: /x/a\n  - model: /x/b\n    parameters: {weight: 0.5, density: 0.5}\n"


def loaded(tmp_path: Path, text: str, *sets: str) -> dict[str, Any]:
    """The recipe of a text with these overrides, as plain values."""
    (tmp_path / "merge.yaml").write_text(text)
    return lines.load_recipe(tmp_path / "merge.yaml", sets).model_dump(mode="json")


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("merge_method", "ties", "ties"),
        ("dtype", "bfloat16", "bfloat16"),
        ("lines.beta", "0.4", 0.4),
        ("lines.beta", "4e-1", 0.4),
        ("models.0.parameters.weight", "0.3", 0.3),
        ("models.1.parameters.weight", "0.3", 0.3),
        ("models.1.parameters.weight", "[0, 0.5]", [0.0, 0.5]),
        ("models.0.model", "/x/c", "/x/c"),
        (
            "parameters.weight",
            "[{filter: mlp, value: 0.5}, {value: 2}]",
            [{"filter": "mlp", "value": 0.5}, {"value": 2.0}],
        ),
        ("parameters.normalize", "true", True),
        ("max_shard_size", "1KB", 1000),
        ("allow_nonfinite", "yes", True),
    ],
)
def test_set_overrules(key: str, given: str, value: Any, tmp_path: Path) -> None:
    """--set KEY=VALUE puts a YAML value where the key points, and makes the mappings on the way to it."""
    text = PLAIN + ("lines: {alpha: 0.1, beta: 9}\n" if key != "merge_method" else "")
    values = loaded(tmp_path, text, f"{key}={given}")
    assert at(values, key) == value
    before = loaded(tmp_path, text)
    top = key.partition(".")[0]
    assert {name: said for name, said in values.items() if name != top} == {
        name: said for name, said in before.items() if name != top
    }


def test_set_makes_what_is_missing(tmp_path: Path) -> None:
    """lines.beta can be set where the file has no lines, and a stack's ends below that."""
    values = loaded(tmp_path, PLAIN, "lines.beta=0.5", "lines.stacks.text.alpha=0.25")
    assert values["lines"]["beta"] == 0.5
    assert values["lines"]["stacks"] == {"text": {"alpha": 0.25, "beta": 0.75}}


def test_the_last_set_counts(tmp_path: Path) -> None:
    """Of two that set one key the later one counts, and a part can be set of what an earlier one set."""
    assert at(loaded(tmp_path, PLAIN, "lines.beta=1", "lines.beta=2"), "lines.beta") == 2
    values = loaded(tmp_path, PLAIN, "models=[{model: /x/c}, {model: /x/d}]", "models.1.parameters.weight=3")
    assert values["models"] == [{"model": "/x/c"}, {"model": "/x/d", "parameters": {"weight": 3.0}}]


@pytest.mark.parametrize("output", ["a=b", "a=b=c"])
def test_set_takes_a_value_with_an_equals_sign(output: str, tmp_path: Path) -> None:
    """Only the first = parts the key from the value."""
    (tmp_path / "merge.yaml").write_text(PLAIN)
    recipe = lines.load_recipe(tmp_path / "merge.yaml", [f"output={output}"])
    assert recipe.output is not None
    assert Path(recipe.output).name == output


def test_set_can_take_back(tmp_path: Path) -> None:
    """null unsays what the file says."""
    assert loaded(tmp_path, PLAIN + "lines: {beta: 1}\ndtype: float16\n", "lines=null", "dtype=")["lines"] is None


def test_set_changes_one_of_two_that_share_an_anchor(tmp_path: Path) -> None:
    """Where two models share their parameters by a YAML alias, setting one's leaves the other's as they are."""
    text = "base_model: /x/base\nmodels:\n- {model: /x/a, parameters: &same {weight: 1}}\n"
    values = loaded(tmp_path, text + "- {model: /x/b, parameters: *same}\n", "models.0.parameters.weight=0.25")
    assert [source["parameters"]["weight"] for source in values["models"]] == [0.25, 1.0]


def test_yaml_merge_keys(tmp_path: Path) -> None:
    """`<<: *same` takes over another model's parameters, and what stands beside it overrules them."""
    text = "base_model: /x/base\nmodels:\n- {model: /x/a, parameters: &same {weight: 0.5, density: 0.25}}\n"
    values = loaded(tmp_path, text + "- {model: /x/b, parameters: {<<: *same, weight: 2}}\n")
    assert values["models"][1]["parameters"] == {"weight": 2.0, "density": 0.25}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["KEY=VALUE"]),
        ("lines.beta", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("lines..beta=1", ["KEY=VALUE"]),
        (".lines=1", ["KEY=VALUE"]),
        ("lines.=1", ["KEY=VALUE"]),
        ("dtype=[", ["YAML", "dtype=["]),
        ("dtype={a: 1, a: 2}", ["twice"]),
        ("dtype=2024-13-45", ["dtype=2024-13-45"]),
        ("dtype=!!int x", ["dtype=!!int x"]),
        ("dtype=" + "[" * 2000, ["YAML"]),
        ("dtype=!!python/name:os.system", ["YAML"]),
        ("models.2.model=x", ["models", "2"]),
        ("models.-1.model=x", ["models", "-1"]),
        ("models.first.model=x", ["models", "first"]),
        ("models.0.model.name=x", ["models.0.model"]),
        ("lines.bta=1", ["lines.bta", "lines.beta"]),
        ("modles.0.weight=1", ["modles"]),
        ("models.0.weight=1", ["models.0.weight", "parameters"]),
        ("dtype=int8", ["dtype", "int8"]),
        ("parameters.density=2", ["parameters.density", "2"]),
    ],
)
def test_a_bad_set_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    """What cannot be set is refused with the words of the command line and the way to write it."""
    (tmp_path / "merge.yaml").write_text(PLAIN)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out", "--set", text)
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    assert [word for word in words if word not in said(ran)] == [], ran.err
    assert len(said(ran)) < 4000


@pytest.mark.parametrize("key", ["lines.beta", "dtype", "models.1.parameters.density", "parameters.weight"])
def test_a_value_from_set_is_not_blamed_on_the_file(key: str, tmp_path: Path) -> None:
    """A wrong value from the command line is said to come from --set, and not from a line that does not hold it."""
    (tmp_path / "merge.yaml").write_text(PLAIN + "lines:\n  beta: 1\ndtype: float16\nparameters:\n  weight: 1\n")
    message = said(run_lines("merge", "--config", tmp_path / "merge.yaml", "--set", f"{key}=much"))
    assert key in message
    assert "--set" in message
    assert not re.search(r"line \d", message), message


def test_set_leaves_other_lines_right(tmp_path: Path) -> None:
    """After --set a mistake in the file is still found on its own line."""
    (tmp_path / "merge.yaml").write_text(PLAIN + "lines:\n  beta: 1\n  gama: 2\n")
    message = said(run_lines("merge", "--config", tmp_path / "merge.yaml", "--set", "lines.beta=2"))
    assert "line 8: lines.gama" in message


# --- output, paths ---


def test_no_output_is_refused(models: Path, tmp_path: Path) -> None:
    """With neither -o nor output: the message names both."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, {"base_model": "base", "models": of("a")})))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert (ran.code, ran.out) == (2, "")
    assert "-o" in said(ran)
    assert "output:" in said(ran)


def test_an_empty_output_is_blamed_where_it_stands(models: Path, tmp_path: Path) -> None:
    """`output: ""` in the file is called output, not -o."""
    recipe = recipe_text(models, {"base_model": "base", "models": of("a"), "output": ""})
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml")
    assert ran.code == 2
    assert "output" in said(ran).partition("hint:")[0]


def test_the_command_lines_output_wins(models: Path, tmp_path: Path) -> None:
    """-o overrules output:, and only one of them is written."""
    assert merge(models, tmp_path, {"base_model": "base", "models": of("a"), "output": "other"}).code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merge.yaml", "out"]


def test_paths_count_from_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From another folder, in which other models have the same names, those beside the recipe are meant."""
    names = ["layers.0.w", "layers.1.w"]
    write_models(tmp_path / "desk" / "in", names, {"base": 100.0, "a": 200.0})
    write_models(tmp_path / "recipe" / "in", names, {"base": 0.0, "a": 1.0})
    for side in ("base", "a"):
        (tmp_path / "recipe" / "in" / side / "tokenizer.json").write_text(f'{{"version": "{side}"}}')
    (tmp_path / "recipe" / "merge.yaml").write_text(
        "base_model: ./in/base\nmodels: [{model: in/../in/a}]\ntokenizer_source: in/../in/a\noutput: made/out\n"
    )
    monkeypatch.chdir(tmp_path / "desk")
    ran = run_lines("merge", "--config", "../recipe/merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    out = tmp_path / "recipe" / "made" / "out"
    assert set(load_file(out / "model.safetensors")["layers.0.w"].tolist()) == {1.0}
    assert json.loads((out / "tokenizer.json").read_text()) == {"version": "a"}
    assert not (tmp_path / "desk" / "made").exists()


def test_an_output_counts_from_here_on_the_command_line(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """-o counts from the working folder, while --set output= counts from the recipe's."""
    (tmp_path / "desk").mkdir()
    (tmp_path / "recipe").mkdir()
    recipe = recipe_text(models, {"base_model": "base", "models": of("a")})
    (tmp_path / "recipe" / "merge.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path / "desk")
    assert run_lines("merge", "--config", "../recipe/merge.yaml", "-o", "one.safetensors").code == 0
    assert run_lines("merge", "--config", "../recipe/merge.yaml", "--set", "output=two.safetensors").code == 0
    found = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.safetensors")}
    assert found == {"desk/one.safetensors", "recipe/two.safetensors"}


# --- the recipe in the output ---

AGAIN: dict[str, dict[str, Any]] = {
    "ties, alpha auto": {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b", **{"noisy-a": {"weight": 0.7}}),
        "parameters": {"density": 0.3, "lambda": [0.5, 1.1]},
        "lines": {"beta": 0.4},
    },
    "ties, density over depth": {
        "merge_method": "ties",
        "base_model": "noisy-base",
        "models": of("noisy-base", "noisy-a", "noisy-b"),
        "parameters": {"density": [0.2, 0.9]},
        "lines": {"alpha": "auto", "beta": 0.4, "schedule": "power:2"},
    },
    "dare with a seed": {
        "merge_method": "dare_ties",
        "base_model": "noisy-base",
        "models": of("noisy-base", "noisy-b", "noisy-a"),
        "parameters": {"density": 0.5, "seed": 7, "rescale": True},
    },
    "dare, alpha auto": {
        "merge_method": "dare_linear",
        "base_model": "noisy-base",
        "models": of("noisy-b", "noisy-a"),
        "parameters": {"density": 0.4},
        "lines": {"beta": 0.1, "filter": {"norm": "keep"}},
    },
    "consensus on ties": {
        "merge_method": "consensus",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"on": "ties", "k": 1, "density": 0.5, "mask_lambda": 0.3},
        "lines": {"beta": 0.3},
    },
    "slerp": {
        "merge_method": "slerp",
        "base_model": "noisy-b",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]},
    },
    "slerp with lines": {
        "merge_method": "slerp",
        "base_model": "noisy-base",
        "models": of("noisy-a", "noisy-b"),
        "parameters": {"t": 0.3},
        "lines": {"beta": 0.3},
    },
    "linear": {
        "merge_method": "linear",
        "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": 0.1}}),
        "parameters": {"int8_mask": True},
        "out_dtype": "float16",
    },
    "passthrough": {"merge_method": "passthrough", "models": of("noisy-a", **{"noisy-a": {"scale": 0.3}})},
}


@pytest.mark.parametrize("recipe", AGAIN.values(), ids=AGAIN)
def test_the_outputs_recipe_makes_the_same_bytes(
    recipe: dict[str, Any], models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An output's own recipe, run from elsewhere, makes every file again, and holds nothing left to be measured."""
    for name in ("noisy-base", "noisy-a", "noisy-b"):
        (tmp_path / "in" / name).mkdir(parents=True)
        (tmp_path / "in" / name / "model.safetensors").write_bytes((models / name / "model.safetensors").read_bytes())
    recipe = copy.deepcopy(recipe) | {"output": "../made/one"}
    (tmp_path / "in" / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    monkeypatch.chdir(tmp_path / "in")
    ran = run_lines("merge", "--config", "merge.yaml")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    one, two = tmp_path / "made" / "one", tmp_path / "made" / "two"
    monkeypatch.chdir(tmp_path)
    ran = run_lines("merge", "--config", "made/one/lines_recipe.yaml", "-o", "made/two")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    first, second = snapshot(one), snapshot(two)
    for found in (first, second):
        found["lines_recipe.yaml"] = yaml.safe_load(found["lines_recipe.yaml"])  # but for comments
        found["README.md"] = found["README.md"].replace(b"# one", b"# two")  # its title
        assert "auto" not in json.dumps(found["lines_recipe.yaml"])
        del found["lines_recipe.yaml"]["run"]  # which was one with auto
        del found["lines_recipe.yaml"]["card"]  # whose title is another
    assert first == second


# --- --dry-run, --json ---

TIES = {
    "merge_method": "ties",
    "base_model": "noisy-base",
    "models": of("noisy-a", "noisy-b", **{"noisy-b": {"weight": 0.25}}),
    "parameters": {"density": 0.375},
    "lines": {"beta": 0.5},
}


def test_dry_run_writes_nothing_and_loads_no_torch(models: Path, tmp_path: Path) -> None:
    """A merge is planned without torch, and without a trace on the disk."""
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe_text(models, {**TIES, "output": "out"})))
    before = snapshot(tmp_path), snapshot(models)
    program = (
        "import sys\nfrom lines_cli.cli.app import app\napp(standalone_mode=False)\nassert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, "merge", "--config", "merge.yaml", "--dry-run"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr
    assert "thresholds" in run.stdout
    assert (snapshot(tmp_path), snapshot(models)) == before


def test_dry_run_shows_passes_and_models(models: Path, tmp_path: Path) -> None:
    """It says which passes measure what, each model's weight and density, and that alpha is still to be measured."""
    ran = merge(models, tmp_path, TIES, "--dry-run")
    assert ran.code == 0
    measured = next(line for line in ran.out.splitlines() if line.startswith("measure"))
    assert "threshold" in measured
    assert "norms" in measured
    for name, weight in (("noisy-a", "1"), ("noisy-b", "0.25")):
        row = next(line for line in ran.out.splitlines() if name in line and "0.375" in line)
        assert weight in row.replace(name, "").split()
    assert "auto" in ran.out


def no_constant(word: str) -> None:
    raise AssertionError(f"{word} is not JSON")


@pytest.mark.parametrize("recipe", AGAIN.values(), ids=AGAIN)
def test_json_is_json(recipe: dict[str, Any], models: Path, tmp_path: Path) -> None:
    """stdout is one JSON object, without NaN or Infinity, and the real run's keys are the dry run's but for the map."""
    dry = merge(models, tmp_path, recipe, "--json", "--dry-run")
    real = merge(models, tmp_path, recipe, "--json")
    assert (dry.code, real.code) == (0, 0)
    planned, done = (json.loads(ran.out, parse_constant=no_constant) for ran in (dry, real))
    assert (planned["dry_run"], done["dry_run"]) == (True, False)
    assert planned.keys() - done.keys() == {"map", "peak_memory"}
    if recipe.get("lines"):
        assert planned["alpha"] is None
        assert done["alpha"] == pytest.approx(done["norms"]["sum"] / done["norms"]["merged"] / 2)
        assert all(stack["first"] is not None for stack in done["stacks"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "linear", "dare_linear"])
def test_json_is_json_with_nan_let_through(method: str, value: float, tmp_path: Path) -> None:
    """Where NaN and Inf are let through, a norm that they spoil is null."""
    write_models(tmp_path, ["layers.0.w", "layers.1.w"], {"base": 0.0, "a": 1.0, "b": value})
    recipe = {"merge_method": method, "models": of("a", "b"), "allow_nonfinite": True}
    recipe |= {} if method == "linear" else {"base_model": "base"}
    ran = merge(tmp_path, tmp_path / "to", recipe, "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert json.loads(ran.out, parse_constant=no_constant)["nonfinite"]


# --- whatever a file says ---

ODD: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 0.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, 10**400),
    *("", "a", "base", "b", "*", "nan", "1e3", "0.5,1", "power:2", "mlp", "(", "auto", "keep", "\0", "é\n", ".", ".."),
    *([], {}, [None], [[]], [True], {"a": 1}, {1: 2}, [0.1, 0.9], [[0.1]], ["a"], date(2024, 1, 1), b"bytes"),
    *({"filter": "mlp", "value": [0, 1]}, [{"filter": None, "value": 0.1}], [{"value": {"value": 1}}], [{"value": []}]),
    *(
        {"model": "a"},
        [{"model": "a"}],
        {"source": "a"},
        [{"sources": [{"model": "a"}]}],
        {None: 1},
        [{}],
        {"alpha": "x"},
    ),
]
KEYS = (
    "merge_method base_model models parameters lines dtype out_dtype tokenizer_source tokenizer chat_template like "
    "missing resize allow_nonfinite max_shard_size output notes slices model weight density alpha beta gamma schedule "
    "outside layers stacks filter lambda normalize trim agreement rescale seed t k on mask_lambda scale int8_mask "
    "value layer_range"
).split()
SOUND: list[dict[str, Any]] = [
    *({key: value for key, value in recipe.items() if key != "output"} for recipe in AGAIN.values()),
    {
        "slices": [{"sources": [{"model": "noisy-a", "layer_range": [0, LAYERS], "parameters": {"weight": 1}}]}],
        "base_model": "noisy-base",
        "tokenizer": {"source": "base"},
        "lines": {"alpha": 0.5, "beta": 0.5, "stacks": {"layers": {"alpha": 1, "beta": 0}}, "outside": "keep"},
    },
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) within a value."""
    found: list[tuple[Any, Any]] = []
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in list(inside):
        found += [(value, key), *places(part)]
    return found


def spoilt(rng: random.Random) -> dict[Any, Any]:
    """A recipe with one to three things wrong in it."""
    recipe: dict[Any, Any] = copy.deepcopy(rng.choice(SOUND))
    for _ in range(rng.randint(1, 3)):
        where = places(recipe)
        if not where:
            break
        container, key = rng.choice(where)
        odd = copy.deepcopy(rng.choice(ODD))
        match rng.randrange(6):
            case 0 | 1:
                container[key] = odd
            case 2:
                container[key] = [container[key], odd]
            case 3 if isinstance(container, dict):
                container[rng.choice([*KEYS, 7, True, None, ""])] = odd
            case 4 if isinstance(container, dict):
                container[rng.choice(KEYS)] = container.pop(key)
            case _:
                del container[key]
    return recipe


@pytest.fixture
def beside(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models in it, with nothing to be fetched."""
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def complaint(folder: Path, text: str, *args: object) -> str:
    """What is wrong with how a recipe ends, if anything: a traceback, or an exit code that is not for its user."""
    (folder / "merge.yaml").write_text(text)
    for arguments in (["--dry-run"], []):
        ran = run_lines("merge", "--config", "merge.yaml", "-o", "made", "--force", "--json", *args, *arguments)
        if ran.trace or ran.code not in (0, 2, 3, 4, 5, 6):
            return f"{arguments} exit code {ran.code}\n{text}\n{args}\n{ran.trace[-700:]}"
        if ran.code == 0:
            try:
                json.loads(ran.out, parse_constant=no_constant)
            except (AssertionError, ValueError) as error:
                return f"{arguments} {error}\n{text}\n{args}"
        elif not ran.err.startswith("error: "):
            return f"{arguments} exit code {ran.code} without a word\n{text}\n{args}"
        if ran.code == 2 and not arguments and "beyond what float32" not in ran.err:  # alpha had to be measured
            return f"a dry run found nothing wrong, and the run refuses:\n{text}\n{args}\n{ran.err}"
        if ran.code:
            break
    return ""


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 8))])
def test_no_recipe_ends_in_a_traceback(seed: int, beside: Path) -> None:
    """A recipe with wrong types, missing, misplaced and unknown keys is done or refused: no traceback, valid JSON."""
    rng = random.Random(seed)
    texts = [yaml.safe_dump(spoilt(rng), sort_keys=False) for _ in range(40)]
    assert [found for text in texts if (found := complaint(beside, text))] == []


PARAMETERS: dict[str, list[Any]] = {
    "weight": [0, 1, -1, 0.3, 1e-9],
    "density": [0, 1, 0.5, 1e-9],
    "lambda": [0, 1, 0.7],
    "scale": [0, 1, 0.5],
    "t": [0, 1, 0.4],
    "mask_lambda": [0, 0.4, 5],
    "normalize": [True, False],
    "trim": ["global", "tensor"],
    "agreement": ["mean", "sum", "max"],
    "rescale": ["density", "l1", True, False],
    "on": ["sum", "ties"],
    "k": [0, 1, 2, 9],
    "seed": [0, 7],
}
OF_ONE_MODEL = ("weight", "density", "mask_lambda", "scale")
MAY_VARY = (*OF_ONE_MODEL, "lambda", "t")
OF_METHOD = {
    "average": "lambda",
    "task_arithmetic": "weight density trim normalize lambda",
    "ties": "weight density trim agreement normalize lambda",
    "consensus": "weight mask_lambda k on density trim lambda",
    "dare_linear": "weight density lambda rescale seed normalize",
    "dare_ties": "weight density lambda rescale seed normalize agreement",
    "linear": "weight normalize",
    "slerp": "t",
    "passthrough": "scale",
}


def well_formed(rng: random.Random) -> dict[str, Any]:
    """A recipe in which each thing is possible by itself, if not all together."""

    def setting(key: str) -> Any:
        one = lambda: rng.choice(PARAMETERS[key])
        if key not in MAY_VARY or rng.random() < 0.5:
            return one()
        if rng.random() < 0.4:
            return [one() for _ in range(rng.randint(1, 3))]
        parts = rng.sample(["mlp", "attn", "head", "layers.1", "*"], rng.randint(1, 3))
        return [{"filter": part, "value": rng.choice([one(), [one(), one()]])} for part in parts]

    method = rng.choice(list(OF_METHOD))
    keys = OF_METHOD[method].split()
    count = {"slerp": 2, "passthrough": 1}.get(method, rng.randint(1, 3))
    listed = []
    for name in rng.choices(["noisy-a", "noisy-b", "noisy-base"], k=count):
        own = {key: setting(key) for key in keys if key in OF_ONE_MODEL and rng.random() < 0.3}
        listed.append({"model": name, **({"parameters": own} if own else {})})
    recipe: dict[str, Any] = {"merge_method": method, "models": listed}
    recipe["parameters"] = {key: setting(key) for key in keys if rng.random() < 0.5 or key == "t"}
    if rng.random() < 0.5:
        ends = {"alpha": rng.choice(["auto", 0, 0.5, 1]), "beta": rng.choice([0, 0.5, 1])}
        recipe["lines"] = rng.choice([ends, {"schedule": [0, 0.5, 1]}, ends | {"stacks": {"layers": "keep"}}])
    if "lines" in recipe or method not in ("linear", "passthrough"):
        recipe["base_model"] = rng.choice(["noisy-base", "noisy-base", "noisy-a"])
    return recipe


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_no_well_formed_recipe_ends_in_a_traceback(seed: int, beside: Path) -> None:
    """Every method with possible values of its parameters, models, scaling and filters is done or refused."""
    rng = random.Random(seed)
    texts = [yaml.safe_dump(well_formed(rng), sort_keys=False) for _ in range(25)]
    assert [found for text in texts if (found := complaint(beside, text, "--quiet"))] == []


@pytest.mark.parametrize("seed", range(2))
def test_no_text_ends_in_a_traceback(seed: int, beside: Path) -> None:
    """A recipe's text with characters lost, doubled and put in is done or refused, too."""
    rng = random.Random(seed)
    texts = []
    for _ in range(40):
        text = list(yaml.safe_dump(rng.choice(SOUND), sort_keys=False, default_flow_style=rng.random() < 0.5))
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(text))
            text[place : place + rng.randint(0, 2)] = rng.choice(
                ["", " ", "\n", ":", "- ", "[", "}", "&x ", "*x", "!!set "]
            )
        texts.append("".join(text).replace("/", ""))
    assert [found for text in texts if (found := complaint(beside, text))] == []


@pytest.mark.parametrize("seed", range(2))
def test_no_set_ends_in_a_traceback(seed: int, beside: Path) -> None:
    """Whatever --set puts wherever into a sound recipe is done or refused."""
    rng = random.Random(seed)
    found = []
    for _ in range(40):
        recipe = rng.choice(SOUND)
        path = [str(part) for part in rng.sample([*KEYS, "0", "1", "9"], rng.randint(1, 3))]
        if rng.random() < 0.6:
            path = [rng.choice(["models", "lines", "parameters"]), *path[: rng.randint(0, 2)]]
        value = yaml.safe_dump(rng.choice(ODD), default_flow_style=True).removesuffix("...\n").strip()
        found.append(complaint(beside, yaml.safe_dump(recipe), "--set", f"{'.'.join(path)}={value}"))
    assert [one for one in found if one] == []


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [*a]",
        "models: &m [{model: a, parameters: *m}]",
        "? [a, b]\n: 1",
        "? {a: b}\n: 1",
        "models: !!set {a, b}",
        "models: !!omap [a: 1]",
        "base_model: !!binary YQ==\nmodels: [{model: a}]",
        "<<: {base_model: base}\nmodels: [{model: a}]",
        "<<: 3",
        "\ufeffbase_model: base\nmodels: [{model: a}]",
        "base_model: 2024-13-45\nmodels: [{model: a}]",
        "base_model: " + "9" * 5000,
        "base_model: base\nmodels: [{model: a}]\nparameters: {weight: " + "9" * 4000 + "}",
        "base_model: base\nmodels: [{model: a}]\nlines: {beta: 1, gamma: " + "9" * 400 + "}",
        "base_model: base\nmodels: [{model: a, layer_range: [0, " + "9" * 400 + "]}]",
    ],
)
def test_yamls_own_oddities(text: str, beside: Path) -> None:
    """Anchors within themselves, keys that are no text, sets, bytes, dates and endless numbers are done or refused."""
    assert complaint(beside, text) == ""


def test_recipe_error_is_what_load_recipe_raises(tmp_path: Path) -> None:
    """From Python, too, every malformed shape is a RecipeError."""
    rng = random.Random(11)
    path = tmp_path / "merge.yaml"
    refused = 0
    for _ in range(60):
        path.write_text(yaml.safe_dump(spoilt(rng), sort_keys=False))
        try:
            lines.load_recipe(path)
        except RecipeError:
            refused += 1
    assert refused > 20
