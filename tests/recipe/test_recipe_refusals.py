"""Recipes of `lines merge` that are refused: by file, line, key and value; and whatever else a file may say."""

from __future__ import annotations

import copy
import json
import random
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

import lines_cli as lines
from lines_cli.errors import RecipeError
from support.recipes_of_merges import AGAIN, LAYERS, merge, merged, no_constant, of, said
from support.run import run_lines

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
    "tokenizer": (HEAD + MODELS + "tokenizer:\n  source: d\n", 7, ["tokenizer", "'d'", "union"]),
    "tokenizer's tokens": (
        HEAD + MODELS + "tokenizer:\n  source: base\n  tokens: [x]\n",
        8,
        ["tokenizer.tokens", "expected keys and values"],
    ),
    "a token of a stranger": (
        HEAD + MODELS + "tokenizer:\n  tokens:\n    x: {source: d}\n",
        7,
        ["tokenizer.tokens", "'d'"],
    ),
    "tokenizer that is text": (HEAD + MODELS + "tokenizer: union\n", 6, ["tokenizer", "expected keys and values"]),
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
    "slices of other sources": (
        HEAD
        + "slices:\n- sources: [{model: a, layer_range: [0, 2]}]\n"
        + "- sources: [{model: b, layer_range: [2, 4]}, {model: c, layer_range: [2, 4]}]\n",
        5,
        ["slices.1.sources", "the first slice has 1"],
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
    "lambda NaN": ("ties", {"parameters": {"lambda": float("nan")}}, ["parameters.lambda", "nan"]),
    "lambda NaN spelt": ("ties", {"parameters": {"lambda": "NaN"}}, ["parameters.lambda", "NaN"]),
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 6))])
def test_no_well_formed_recipe_ends_in_a_traceback(seed: int, beside: Path) -> None:
    """Every method with possible values of its parameters, models, scaling and filters is done or refused."""
    rng = random.Random(seed)
    texts = [yaml.safe_dump(well_formed(rng), sort_keys=False) for _ in range(25)]
    assert [found for text in texts if (found := complaint(beside, text, "--quiet"))] == []


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
