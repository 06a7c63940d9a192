"""Every way to say a coefficient: --schedule, --gamma, --outside, --stack, --filter; read off edits from zeros to ones.

With a base of zeros and a fine-tune of ones every entry of the output is its coefficient, so what is expected is
computed here from the rules that docs/editing.md gives, and never with the code under test.
"""

from __future__ import annotations

import random
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.run import Ran, run_lines

FIXED = {"keep": 1.0, "base": 0.0}
DTYPES = (torch.float64, torch.float32, torch.float64, torch.int32)

Asked = dict[str, Any]
"""A recipe's `lines:`, as YAML has it."""


# --- models: every tensor's place is written by hand ---


def stack(prefix: str, layers: int, *tails: str, name: str = "", start: int = 0) -> dict[str, tuple[str, int]]:
    """The tensors of `prefix.i` for every layer i, each with its place in the stack `name`, by default the prefix."""
    return {
        f"{prefix}.{i}.{tail}": (name or prefix, start + i) for i in range(layers) for tail in tails or ("w", "norm.w")
    }


@dataclass(frozen=True)
class Model:
    """Tensor names with their places: a stack and a layer from 0, or the side of the blocks on which they stand.

    Attributes:
        places: name -> (stack, layer), "before" or "after".
        parts: stack -> what selects it on the command line.
        config: its config.json.
        tied: head -> the embedding that it is one weight with.
    """

    places: Mapping[str, tuple[str, int] | str]
    parts: Mapping[str, Sequence[str]]
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    def layers(self, name: str) -> int:
        return 1 + max(place[1] for place in self.places.values() if not isinstance(place, str) and place[0] == name)


def llama(layers: int) -> dict[str, tuple[str, int] | str]:
    ends = {"model.embed_tokens.weight": "before", "model.norm.weight": "after", "lm_head.weight": "after"}
    return {**ends, **stack("model.layers", layers)}


FLUX = "double_blocks+single_blocks"
MODELS = {
    "decoder": Model(llama(5), {"model.layers": ["model.layers", "model", "layers"]}),
    "one layer": Model(llama(1), {"model.layers": ["layers"]}),
    "two layers": Model(llama(2), {"model.layers": ["layers"]}),
    "tied": Model(
        llama(3),
        {"model.layers": ["layers"]},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "prediction layer": Model(
        {**llama(3), "model.layers.3.w": "after", "model.layers.3.eh_proj.w": "after"},
        {"model.layers": ["layers"]},
        {"model_type": "deepseek_v3", "num_hidden_layers": 3, "tie_word_embeddings": False},
    ),
    "encoder and decoder": Model(
        {
            "shared.weight": "before",
            **stack("encoder.block", 4, "layer.0.w", "layer.1.norm.w"),
            "encoder.final_layer_norm.weight": "after",
            **stack("decoder.block", 3, "layer.0.w", "layer.1.w", "layer.2.norm.w"),
            "decoder.final_layer_norm.weight": "after",
            "lm_head.weight": "after",
        },
        {"encoder.block": ["encoder.block", "encoder"], "decoder.block": ["decoder.block", "decoder"]},
    ),
    "towers": Model(
        {
            "text_model.embeddings.token_embedding.weight": "before",
            **stack("text_model.encoder.layers", 1),
            "text_model.final_layer_norm.weight": "after",
            "text_projection.weight": "after",
            "vision_model.pre_layrnorm.weight": "before",
            **stack("vision_model.encoder.layers", 3),
            "vision_model.post_layernorm.weight": "after",
            "logit_scale": "after",
        },
        {
            "text_model.encoder.layers": ["text_model", "text_model.encoder"],
            "vision_model.encoder.layers": ["vision_model", "vision_model.encoder.layers"],
        },
    ),
    "one after the other": Model(
        {
            "img_in.weight": "before",
            **stack("double_blocks", 2, name=FLUX),
            **stack("single_blocks", 3, name=FLUX, start=2),
            "final_layer.linear.weight": "after",
        },
        {FLUX: [FLUX]},
    ),
    "stages": Model(
        {
            "patch_embed.proj.weight": "before",
            **stack("layers.0.blocks", 2, name="layers"),
            **stack("layers.1.blocks", 2, name="layers", start=2),
            "norm.weight": "after",
            "head.fc.weight": "after",
        },
        {"layers": ["layers"]},
    ),
}


def reference(model: Model, asked: Asked, name: str) -> float:
    """The documented rules, from the last word to the first."""
    name = model.tied.get(name, name)
    for pattern, value in asked.get("filter", {}).items():
        if pattern == "*" or pattern in name:
            return float(FIXED.get(value, value))
    alpha, rule = asked.get("alpha", 0.1), asked.get("schedule", "linear")
    beta, gamma = asked.get("beta", 1 - alpha), asked.get("gamma", 1.0)
    place, outside = model.places[name], asked.get("outside", "alpha")
    if isinstance(place, str):
        first, last = (rule[0], rule[-1]) if isinstance(rule, list) else (alpha, alpha + beta)
        return float(FIXED.get(outside, gamma * (last if (outside, place) == ("position", "after") else first)))
    own = next((v for part, v in asked.get("stacks", {}).items() if part in model.parts[place[0]]), None)
    if isinstance(own, str):
        return FIXED[own]
    if own is not None:
        alpha, beta = own["alpha"], own.get("beta", 1 - own["alpha"])
    layers = model.layers(place[0])
    x = place[1] / (layers - 1) if layers > 1 else 1.0
    if isinstance(rule, list):
        return float(gamma * np.interp(x, np.linspace(0, 1, len(rule)), rule))
    f = x ** float(rule[len("power:") :]) if rule.startswith("power:") else {"linear": x, "constant": 1.0}[rule]
    return float(gamma * (alpha + beta * f))


def close(expected: float) -> Any:
    """Equal, but for the last bits of a float64."""
    return pytest.approx(expected, rel=1e-13, abs=1e-14)


# --- running it ---


def sides(
    folder: Path, names: Sequence[str], config: Mapping[str, Any] | None = None, *, dtypes: Any = (torch.float64,)
) -> tuple[Path, Path]:
    """A base of zeros and a fine-tune of ones, as folders; the dtypes by turns."""
    of = {name: dtypes[i % len(dtypes)] for i, name in enumerate(names)}
    base = write_checkpoint(folder / "base", {n: torch.zeros(2, dtype=t) for n, t in of.items()}, config=config)
    ft = write_checkpoint(folder / "ft", {n: torch.ones(2, dtype=t) for n, t in of.items()}, config=config)
    return base, ft


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Both sides of every model above."""
    folder = tmp_path_factory.mktemp("models")
    return {key: sides(folder / key, list(model.places), model.config, dtypes=DTYPES) for key, model in MODELS.items()}


def flags(asked: Asked) -> list[str]:
    """The same on the command line."""

    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['alpha']!r},{value['beta']!r}"
        return value if isinstance(value, str) else repr(value)

    given = []
    for key, value in asked.items():
        if isinstance(value, dict):
            given += [f"--{key.removesuffix('s')}={part}={text(one)}" for part, one in value.items()]
        elif isinstance(value, list):
            given.append(f"--{key}={','.join(map(repr, value))}")
        else:
            given.append(f"--{key}={text(value)}")
    return given


def dry(paths: tuple[Path, Path], *options: object) -> Ran:
    """`lines edit BASE FT --dry-run OPTIONS`."""
    return run_lines("edit", *paths, "-o", paths[0].parent / "not written", "--dry-run", *options)


def summary(paths: tuple[Path, Path], *options: object) -> Any:
    """What `--dry-run --json` prints."""
    ran = dry(paths, "--json", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return ran.json


def planned(paths: tuple[Path, Path], *options: object) -> dict[str, float]:
    """Every tensor's coefficient as `--dry-run --json` gives it."""
    return {row["name"]: row["coefficient"] for row in summary(paths, *options)["map"]}


def written(out: Path, *arguments: object) -> dict[str, torch.Tensor]:
    """The tensors that `lines edit ARGUMENTS -o OUT` writes."""
    ran = run_lines("merge" if "--config" in arguments else "edit", *arguments, "-o", out, "--device", "cpu", "--quiet")
    assert (ran.code, ran.out, ran.trace) == (0, "", ""), ran.err
    tensors: dict[str, torch.Tensor] = {}
    for file in [out] if out.is_file() else sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def value(tensor: torch.Tensor) -> float:
    """The number that all entries of a tensor are."""
    first, *others = tensor.tolist()
    assert others == [first] * len(others)
    return float(first)


def refused(ran: Ran, *words: str, code: int = 2) -> None:
    """The command ended with that code, said all of these words, and wrote nothing to stdout."""
    assert (ran.code, ran.out, ran.trace) == (code, "", ""), ran.err
    assert [word for word in words if word not in ran.err] == [], ran.err
    assert "function-" not in ran.err, "the message speaks of pydantic's inside"


def in_yaml(paths: tuple[Path, Path], asked: str) -> Ran:
    """A dry run of a recipe with these lines under `lines:`."""
    file = paths[0].parent / "recipe.yaml"
    try:
        said = yaml.safe_load(f"  {asked}")
    except (yaml.YAMLError, ValueError):
        said = {}
    listed = isinstance(said.get("schedule"), (list, int, float)) or "," in str(said.get("schedule", ""))
    if not listed:  # what an edit would add
        alpha = said.get("alpha", 0.1)
        rest = {"alpha": 0.1, "beta": 1 - alpha if isinstance(alpha, (int, float)) else 0.9}
        added = [f"{key}: {value!r}" for key, value in rest.items() if key not in said]
        asked = "{" + ", ".join([*added, asked[1:]]) if asked.startswith("{") else "\n  ".join([*added, asked])
    text = f"base_model: {paths[0]}\nmodels: [{{model: {paths[1]}}}]\nlike: ft\nlines:\n  {asked}\n"
    file.write_text(text)
    return run_lines("merge", "--config", file, "-o", paths[0].parent / "not written", "--dry-run", "--json")


# --- all of it at once ---


def random_options(model: Model, rng: random.Random) -> Asked:
    """Any combination of the options that makes sense together."""

    def number() -> float:
        return rng.choice([0, 1, 0.5, rng.randint(-3, 3), round(rng.uniform(-1, 2), 3), rng.uniform(-1, 2)])

    asked: Asked = {}
    rule = rng.choice(["", "", "linear", "constant", "power:2", "power:0.37", "list", "list"])
    if rule == "list":
        asked["schedule"] = [number() for _ in range(rng.choice([1, 2, 2, 3, 4, 9]))]
    elif rule:
        asked["schedule"] = rule
    if rule != "list":
        asked |= {key: number() for key in ("alpha", "beta") if rng.random() < 0.6}
    if rng.random() < 0.5:
        asked["gamma"] = number()
    if rng.random() < 0.8:
        asked["outside"] = rng.choice(["alpha", "position", "position", "base", "keep"])
    for parts in model.parts.values():
        if rng.random() < 0.4:
            own: Any = {"alpha": number(), "beta": number()}
            own = rng.choice(["keep", "base"] if rule == "list" else ["keep", "base", own, own])
            asked.setdefault("stacks", {})[rng.choice(list(parts))] = own
    for _ in range(rng.choice([0, 0, 1, 2, 3])):
        name = rng.choice(list(model.places))
        start = rng.randrange(len(name))
        pattern = rng.choice(["*", name, name[start : start + rng.randint(1, 6)]])
        asked.setdefault("filter", {})[pattern] = rng.choice(["keep", "base", number(), number()])
    return asked


def options_of(key: str, which: range) -> list[Asked]:
    """Some of the endless sets of options of one model."""
    rng = random.Random(key)
    return [random_options(MODELS[key], rng) for _ in range(which.stop)][which.start :]


@pytest.mark.parametrize(
    "which", [range(10), pytest.param(range(10, 30), marks=pytest.mark.slow)], ids=["10", "20 more"]
)
@pytest.mark.parametrize("key", MODELS)
def test_any_combination_gives_what_the_rules_say(key: str, which: range, saved: dict[str, tuple[Path, Path]]) -> None:
    """The map of a dry run has every tensor's stack, layer and coefficient as the rules have them; YAML says the same;
    the summary's first and last values are those of the map.
    """
    model = MODELS[key]
    for asked in options_of(key, which):
        said = summary(saved[key], *flags(asked))
        places = {row["name"]: (row["stack"], row["index"]) for row in said["map"]}
        outside = {name: (None, None) for name, place in model.places.items() if isinstance(place, str)}
        assert places == {**model.places, **outside}
        coefficients = {row["name"]: row["coefficient"] for row in said["map"]}
        assert coefficients == {name: close(reference(model, asked, name)) for name in model.places}, asked
        from_yaml = in_yaml(saved[key], yaml.safe_dump(asked, sort_keys=False).replace("\n", "\n  ")).json
        assert {**from_yaml, "recipe": None} == {**said, "recipe": None}, asked
        assert from_yaml["recipe"]["lines"] == said["recipe"]["lines"]

        plain = {**asked, "filter": {}}
        for row in said["stacks"]:
            ends = [name for name, place in model.places.items() if place == (row["name"], 0)]
            assert row["layers"] == model.layers(row["name"])
            assert row["first"] == close(reference(model, plain, ends[0]))
            last = next(n for n, p in model.places.items() if p == (row["name"], row["layers"] - 1))
            assert row["last"] == close(reference(model, plain, last))
        for side, end in (("before", "first"), ("after", "last")):
            of_side = [name for name, place in model.places.items() if place == side and name not in model.tied]
            assert said["outside"][end] == close(reference(model, plain, of_side[0]))


@pytest.mark.parametrize("which", [range(2), pytest.param(range(2, 6), marks=pytest.mark.slow)], ids=["2", "4 more"])
@pytest.mark.parametrize("key", MODELS)
def test_a_run_writes_its_map_and_its_recipe_writes_it_again(
    key: str, which: range, saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """Every tensor holds the coefficient of the dry run's map (an integer: the base's where that is 0, else the
    fine-tune's), and the folder's own lines_recipe.yaml gives all its weights again, bit for bit.
    """
    for number, asked in enumerate(options_of(key, which)):
        out, again = tmp_path / f"{number}", tmp_path / f"{number} again"
        got = written(out, *saved[key], *flags(asked))
        plan = planned(saved[key], *flags(asked))
        assert got.keys() == plan.keys()
        for name, tensor in got.items():
            exact = plan[name] if tensor.dtype == torch.float64 else float(np.float32(plan[name]))
            assert value(tensor) == (exact if tensor.is_floating_point() else float(exact != 0)), (name, asked)
        written(again, "--config", out / "lines_recipe.yaml")
        first, second = ({n: c for n, c in snapshot(p).items() if n.endswith(".safetensors")} for p in (out, again))
        assert first == second


# --- schedules ---

SCHEDULES = {
    "linear": lambda x, a, b: a + b * x,
    "power:2": lambda x, a, b: a + b * x**2,
    "power:0.5": lambda x, a, b: a + b * np.sqrt(x),
    "power:1": lambda x, a, b: a + b * x,
    "power:1e3": lambda x, a, b: a + b * x**1000,
    "constant": lambda x, a, b: a + b + 0 * x,
}


def depths(layers: int) -> Any:
    """x = (l - 1) / (L - 1) for every layer; a lone one stands at the deep end."""
    return np.linspace(0, 1, layers) if layers > 1 else np.ones(1)


def over_depth(folder: Path, layers: int, *options: object, dtype: torch.dtype = torch.float64) -> list[float]:
    """The coefficients in the written file: outside the blocks, then of every layer."""
    paths = sides(folder, ["embed.weight", *(f"layers.{i}.w" for i in range(layers))], dtypes=(dtype,))
    got = written(folder / "out.safetensors", *paths, *options)
    return [value(got["embed.weight"]), *(value(got[f"layers.{i}.w"]) for i in range(layers))]


@pytest.mark.parametrize(
    ("schedule", "layers"),
    [
        *((schedule, 7) for schedule in SCHEDULES),
        *(
            pytest.param(schedule, layers, marks=() if schedule == "power:2" else pytest.mark.slow)
            for schedule in SCHEDULES
            for layers in (1, 2)
        ),
    ],
)
def test_a_schedule_over_depth(schedule: str, layers: int, tmp_path: Path) -> None:
    """Every layer has gamma * (alpha + beta * f(x)), one layer alone gamma * (alpha + beta), outside gamma * alpha."""
    for gamma in (1.0, -0.5):
        given = ("--schedule", schedule, "--alpha", 0.25, "--beta", 0.6, "--gamma", gamma)
        got = over_depth(tmp_path / f"{gamma}", layers, *given)
        inside = gamma * SCHEDULES[schedule](depths(layers), 0.25, 0.6)
        assert got == [close(c) for c in (gamma * 0.25, *inside)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_schedule_has_the_same_defaults(schedule: str, tmp_path: Path) -> None:
    """alpha is 0.1 and beta 1 - alpha with every schedule, so that the last layer is the fine-tune's; in float32."""
    for given, alpha in (((), 0.1), (("--alpha", 0.4), 0.4)):
        got = over_depth(tmp_path / f"{alpha}", 5, "--schedule", schedule, *given, dtype=torch.float32)
        inside = SCHEDULES[schedule](depths(5), alpha, 1 - alpha)
        assert got == [float(np.float32(c)) for c in (alpha, *inside)]
        assert got[-1] == 1


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (1, [1]),
        (2, [1, 1]),
        (3, [0, 1, 0]),
        (4, [0, 1, 1, 0]),
        (7, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0]),
        (8, [0, 1 / 3, 2 / 3, 1, 1, 2 / 3, 1 / 3, 0]),
    ],
)
def test_a_unet_is_deepest_in_the_middle(layers: int, shape: list[float], tmp_path: Path) -> None:
    """The middle layer, or the middle two, have gamma * (alpha + beta); the coefficient falls to alpha on both sides,
    and what lies behind the blocks has alpha, too.
    """
    given = ("--schedule", "unet", "--alpha", 0.25, "--beta", 0.6, "--gamma", 2)
    got = over_depth(tmp_path, layers, *given, "--outside", "position")
    assert got == [close(2 * c) for c in (0.25, *(0.25 + 0.6 * x for x in shape))]


LISTS = {
    "one": [0.3],
    "two": [0.1, 0.9],
    "three": [0.1, 0.6, 1.0],
    "falling and negative": [1.5, -0.5, 0.25, 0.0],
    "as many as layers": [0.2, 0.1, 0.4, 0.3, 0.9],
    "more than layers": [0.9, 0.1, 0.5, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6],
    "spaces and exponents": [1e-1, 0.5, 2e0],
    "begins below zero": [-1.0, 1.0],
    "all alike": [0.7, 0.7, 0.7],
}


@pytest.mark.parametrize("layers", [1, 5, *(pytest.param(layers, marks=pytest.mark.slow) for layers in (2, 12))])
@pytest.mark.parametrize("key", LISTS)
def test_a_list_is_interpolated_over_depth(key: str, layers: int, tmp_path: Path) -> None:
    """Listed values stand at equal distances, lines between them (numpy.interp), one layer alone has the last;
    outside has the first; gamma multiplies all.
    """
    values = LISTS[key]
    text = " 1e-1, 5e-1 ,2E0" if key == "spaces and exponents" else ",".join(map(str, values))
    inside = np.interp(depths(layers), np.linspace(0, 1, len(values)), values)
    for gamma, given in ((1.0, ()), (0.5, ("--gamma", 0.5))):
        got = over_depth(tmp_path / f"{gamma}", layers, "--schedule", text, *given)
        assert got == [close(gamma * c) for c in (values[0], *inside)]


@pytest.mark.parametrize("layers", [12, 26, 50])
def test_a_value_per_layer_is_that_layer_s(layers: int, tmp_path: Path) -> None:
    """With as many values as layers each layer has its own to the bit: a 0 copies the base, a 1 the fine-tune."""
    values = [float(i % 2) for i in range(layers)]
    got = over_depth(tmp_path, layers, "--schedule", ",".join(map(str, values)), dtype=torch.float32)
    assert got == [values[0], *values]


@pytest.mark.parametrize(
    ("alpha", "beta", "last"), [(0.3, None, 1.0), (0.05, None, 1.0), (0.3, -0.3, 0.0), (0.1, -0.1, 0.0)]
)
@pytest.mark.parametrize("layers", [4, 7])
def test_the_last_layer_has_alpha_plus_beta(
    layers: int, alpha: float, beta: float | None, last: float, tmp_path: Path
) -> None:
    """Where alpha + beta is 0 or 1 the last layer is copied whole, however many layers there are."""
    assert alpha + (1 - alpha if beta is None else beta) == last
    got = over_depth(tmp_path, layers, "--alpha", alpha, *(() if beta is None else ("--beta", beta)))
    assert got[-1] == last


@pytest.mark.parametrize("rule", ["linear", "power:3", "constant", "0.25,0.5,0.75"])
def test_beyond_the_fine_tune_and_before_the_base(rule: str, tmp_path: Path) -> None:
    """Coefficients over 1 and under 0 extrapolate."""
    got = over_depth(tmp_path, 3, "--schedule", rule, "--gamma", -8)
    assert min(got) < 0
    assert max(map(abs, got)) > 1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--alpha", 0.1], "alpha"),
        (["--beta", 0.9], "beta"),
        (["--alpha", 0.1, "--beta", 0.9], "alpha and beta"),
        (["--stack", "layers=0.1,0.9"], "alpha and beta"),
    ],
)
def test_a_list_leaves_nothing_for_alpha_and_beta(
    options: list[object], named: str, saved: dict[str, tuple[Path, Path]]
) -> None:
    """Naming alpha or beta beside a list, also of one stack, is an error that says so; even at their defaults."""
    refused(dry(saved["decoder"], "--schedule", "0.1,0.6,1", *options), named, "list")


def test_a_list_in_yaml_leaves_nothing_for_alpha(saved: dict[str, tuple[Path, Path]]) -> None:
    """The same in a recipe."""
    refused(in_yaml(saved["decoder"], "{schedule: [0.1, 1], alpha: 0.1}"), "alpha", "list")
    refused(in_yaml(saved["decoder"], "{schedule: '0.1,1', stacks: {layers: {alpha: 0.1}}}"), "alpha", "list")


BAD_SCHEDULES = [
    *["", " ", "linear ", "Linear", "lin", "power", "power:", "power:0", "power:-1", "power:nan", "power:inf"],
    *["power:1e400", "power:x", "power:1,2", "constant:0.5", ",", "0.1,", ",0.1", "0.1,,1", "0.1;1", "0.1 1"],
    *["nan", "0.1,nan", "inf,1", "-inf", "1e999", "0.1,keep", "[0.1,1]", "0x10"],
]


@pytest.mark.parametrize("text", BAD_SCHEDULES)
def test_a_schedule_that_is_none(text: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """A misspelt or non-finite schedule ends with exit code 2, what was given, and all that may be."""
    ran = dry(saved["decoder"], f"--schedule={text}")
    refused(ran, repr(text), "linear", "constant", "unet", "power:P", "0.1,0.6,1")


@pytest.mark.parametrize("option", ["--alpha", "--beta", "--gamma"])
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999"])
def test_ends_that_are_not_finite(option: str, text: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """NaN and Inf are refused by the option's name."""
    refused(dry(saved["decoder"], option, text), option[2:], "finite")


@pytest.mark.parametrize(
    "options",
    [
        ["--gamma", "1e39"],
        ["--alpha", "1e308", "--gamma", "1e10"],
        ["--schedule", "0,1e39"],
        ["--filter", "norm=-1e39"],
        ["--stack", "layers=1e38,1e39"],
        ["--outside", "position", "--alpha", "1e308", "--beta", "1e308"],
    ],
)
def test_a_coefficient_too_large_to_compute_with(options: list[str], saved: dict[str, tuple[Path, Path]]) -> None:
    """What float32 cannot hold is refused by a tensor's name, before anything is read."""
    refused(dry(saved["decoder"], *options), "coefficient", "float32")


IMPOSSIBLE = {
    "a flag among the coefficients": ("{schedule: [yes, 0.5]}", "schedule"),
    "a flag for a schedule": ("{schedule: yes}", "schedule"),
    "coefficients with keys": ("{schedule: {0.1: first, 0.9: last}}", "schedule"),
    "a set of coefficients": ("{schedule: !!set {0.9, 0.1}}", "!!set"),
    "bytes": ("{schedule: !!binary aGVsbG8=}", "!!binary"),
    "lists in a list": ("{schedule: [[0.1], 1]}", "schedule"),
    "nothing": ("{schedule: }", "schedule"),
    "an empty list": ("{schedule: []}", "schedule"),
    "NaN": ("{schedule: [0.1, .nan]}", "schedule"),
    "a number of 400 digits": (f"{{schedule: [0.1, 1{400 * '0'}]}}", "schedule"),
    "a filter's flag": ("{filter: {norm: yes}}", "filter.norm"),
    "a filter's flag for base": ("{filter: {norm: off}}", "filter.norm"),
    "a filter's number of 400 digits": (f"{{filter: {{norm: 1{400 * '0'}}}}}", "filter.norm"),
    "a filter's infinity": ("{filter: {norm: .inf}}", "filter.norm"),
    "a filter's nothing": ("{filter: {norm: }}", "filter.norm"),
    "a filter's list": ("{filter: {norm: [0.1, 0.9]}}", "filter.norm"),
    "a list of filters": ("{filter: [norm]}", "filter"),
    "a stack's number": ("{stacks: {layers: 0.5}}", "stacks.layers"),
    "a stack's flag": ("{stacks: {layers: yes}}", "stacks.layers"),
    "a stack's list": ("{stacks: {layers: [0.1, 0.9]}}", "stacks.layers"),
    "a stack without alpha": ("{stacks: {layers: {beta: 0.5}}}", "stacks.layers.alpha"),
    "a stack's misspelt key": ("{stacks: {layers: {alpha: 0.1, betta: 0.5}}}", "betta"),
    "a stack's infinite end": ("{stacks: {layers: {alpha: .inf}}}", "stacks.layers.alpha"),
    "a pattern given twice": ("{filter: {norm: 0.1, norm: 0.2}}", "norm"),
    "an empty pattern": ("{filter: {'': 0.5}}", "filter"),
    "no day": ("{schedule: 2024-99-99}", "recipe.yaml"),
    "a flag for outside": ("{outside: no}", "'alpha', 'position', 'base' or 'keep'"),
    "another outside": ("{outside: middle}", "'alpha', 'position', 'base' or 'keep'"),
    "the flag's name": ("{stack: {layers: keep}}", "mean lines.stacks"),
    "several filters": ("{filters: {norm: keep}}", "mean lines.filter"),
}


@pytest.mark.parametrize("key", IMPOSSIBLE)
def test_a_recipe_that_says_something_impossible(key: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """It ends with exit code 2 and a message that names the key."""
    text, word = IMPOSSIBLE[key]
    refused(in_yaml(saved["decoder"], text), word)


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("{schedule: 0.5}", ["--schedule", "0.5"]),
        ("{schedule: [0.5]}", ["--schedule", "0.5"]),
        ("{schedule: '0.1, 1'}", ["--schedule", "0.1,1"]),
        ("{schedule: [0, 1]}", ["--schedule", "0.0,1.0"]),
        ("{schedule: ['0.25', 1]}", ["--schedule", "0.25,1"]),
        ("{schedule: power:2}", ["--schedule", "power:2"]),
        ("{schedule: power:2.0, outside: position}", ["--schedule", "power:2", "--outside", "position"]),
        ("{stacks: {layers: {alpha: 0.25}}}", ["--stack", "layers=0.25,0.75"]),
        ("{stacks: {layers: {alpha: 1, beta: 0}}}", ["--stack", "layers=1,0"]),
        ("{stacks: {layers: keep}, filter: {norm: 1, '*': 0}}", ["--filter", "norm=keep", "--filter", "*=base"]),
        ("{filter: {norm: 5e-1, .w: '0.25'}}", ["--filter", "norm=0.5", "--filter", ".w=0.25"]),
    ],
)
def test_yaml_and_flags_say_the_same(text: str, options: list[str], saved: dict[str, tuple[Path, Path]]) -> None:
    """What the command line can say, a recipe can, a lone number for a schedule too."""
    ran = in_yaml(saved["decoder"], text)
    assert ran.code == 0, ran.err
    assert {row["name"]: row["coefficient"] for row in ran.json["map"]} == planned(saved["decoder"], *options)


def test_python_and_flags_say_the_same(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """`edit_recipe` takes the same options as plain values: tuples and whole numbers, numpy's too."""
    paths = saved["encoder and decoder"]
    for options, given in (
        ({"schedule": (0, 0.5, 1), "outside": "position"}, ["--schedule", "0,0.5,1", "--outside", "position"]),
        ({"schedule": np.linspace(0.25, 1, 4), "gamma": np.float64(0.5)}, ["--schedule", "0.25,1", "--gamma", 0.5]),
        ({"schedule": "0.5", "stacks": {"decoder": "base"}}, ["--schedule", "0.5", "--stack", "decoder=base"]),
        (
            {"stacks": {"decoder": {"alpha": 0, "beta": 2}}, "filter": {"norm": 1, "*": "base"}},
            ["--stack", "decoder=0,2", "--filter", "norm=keep", "--filter", "*=0"],
        ),
    ):
        recipe = lines.edit_recipe(*map(str, paths), **options)
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")
        got = {row["name"]: row["coefficient"] for row in plan.map()}
        assert got == {name: close(c) for name, c in planned(paths, *given).items()}


# --- outside the blocks ---


@by_turns(
    key=["decoder", "one layer", "towers", "prediction layer", "tied"],
    of=[
        (["--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "constant", "--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "power:2", "--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "0.5,0.125,0.375"], 0.5, 0.375),
        (["--schedule", "0.5"], 0.5, 0.5),
    ],
)
def test_outside(key: str, of: tuple[list[object], float, float], saved: dict[str, tuple[Path, Path]]) -> None:
    """alpha is the first value, position the first before the blocks and the last behind them, both times gamma; base
    is 0 and keep 1, whatever gamma; the blocks have what they always have.
    """
    rule, first, last = of
    model = MODELS[key]
    always = planned(saved[key], *rule, "--gamma", 2)
    ends = {"alpha": (2 * first, 2 * first), "position": (2 * first, 2 * last), "base": (0, 0), "keep": (1, 1)}
    for outside, (before, after) in ends.items():
        got = planned(saved[key], *rule, "--gamma", 2, "--outside", outside)
        for name, place in model.places.items():
            side = model.places[model.tied.get(name, name)]
            expected = {"before": before, "after": after}[side] if isinstance(side, str) else always[name]
            assert got[name] == expected, (name, outside, place)


def test_outside_must_be_one_of_four(saved: dict[str, tuple[Path, Path]]) -> None:
    """Another word is refused with the four."""
    refused(dry(saved["decoder"], "--outside", "middle"), "'alpha', 'position', 'base', 'keep'")


# A tensor of a block, I being its number; what stands before the blocks; what stands behind them.
FAMILIES: dict[str, dict[str, str]] = yaml.safe_load("""
llama:
  block: model.layers.I.mlp.up_proj.weight
  before: model.embed_tokens.weight model.rotary_emb.inv_freq
  after: model.norm.weight lm_head.weight lm_head.bias score.weight v_head.summary.weight
mistral's own:
  block: layers.I.attention.wq.weight
  before: tok_embeddings.weight
  after: norm.weight output.weight
gpt2:
  block: transformer.h.I.mlp.c_fc.weight
  before: transformer.wte.weight transformer.wpe.weight
  after: transformer.ln_f.weight transformer.ln_f.bias lm_head.weight multiple_choice_head.summary.weight
gpt_neox:
  block: gpt_neox.layers.I.mlp.dense_h_to_4h.weight
  before: gpt_neox.embed_in.weight
  after: gpt_neox.final_layer_norm.weight embed_out.weight
bloom:
  block: transformer.h.I.input_layernorm.weight
  before: transformer.word_embeddings.weight transformer.word_embeddings_layernorm.weight
  after: transformer.ln_f.bias
opt:
  block: model.decoder.layers.I.fc1.weight
  before: model.decoder.embed_tokens.weight model.decoder.embed_positions.weight model.decoder.project_in.weight
  after: model.decoder.project_out.weight model.decoder.final_layer_norm.weight
chatglm:
  block: transformer.encoder.layers.I.mlp.dense_h_to_4h.weight
  before: transformer.embedding.word_embeddings.weight transformer.rotary_pos_emb.inv_freq
  after: transformer.encoder.final_layernorm.weight transformer.output_layer.weight
olmo's own:
  block: transformer.blocks.I.ff_proj.weight
  before: transformer.wte.weight
  after: transformer.ff_out.weight
mamba:
  block: backbone.layers.I.mixer.A_log
  before: backbone.embeddings.weight
  after: backbone.norm_f.weight lm_head.weight
rwkv:
  block: rwkv.blocks.I.ln1.weight
  before: rwkv.embeddings.weight
  after: rwkv.ln_out.weight head.weight
jamba:
  block: model.layers.I.mamba.D
  before: model.embed_tokens.weight
  after: model.final_layernorm.weight lm_head.weight
bert:
  block: bert.encoder.layer.I.output.LayerNorm.weight
  before: bert.embeddings.word_embeddings.weight bert.embeddings.position_embeddings.weight
    bert.embeddings.position_ids bert.embeddings.token_type_embeddings.weight bert.embeddings.LayerNorm.weight
  after: bert.pooler.dense.weight cls.predictions.transform.dense.weight cls.predictions.transform.LayerNorm.weight
    cls.predictions.decoder.weight cls.predictions.bias classifier.weight qa_outputs.weight
distilbert:
  block: distilbert.transformer.layer.I.ffn.lin1.weight
  before: distilbert.embeddings.LayerNorm.bias
  after: vocab_transform.weight vocab_layer_norm.weight vocab_projector.bias classifier.bias
roberta:
  block: roberta.encoder.layer.I.output.dense.weight
  before: roberta.embeddings.word_embeddings.weight
  after: lm_head.dense.weight lm_head.layer_norm.weight lm_head.decoder.bias classifier.out_proj.weight
electra:
  block: electra.encoder.layer.I.output.dense.weight
  before: electra.embeddings_project.weight electra.embeddings.LayerNorm.weight
  after: discriminator_predictions.dense.weight generator_predictions.LayerNorm.weight generator_lm_head.bias
xlnet:
  block: transformer.layer.I.ff.layer_1.weight
  before: transformer.mask_emb transformer.word_embedding.weight
  after: lm_loss.weight lm_loss.bias logits_proj.weight
modernbert:
  block: model.layers.I.mlp.Wi.weight
  before: model.embeddings.tok_embeddings.weight model.embeddings.norm.weight
  after: model.final_norm.weight head.dense.weight head.norm.weight
deberta:
  block: deberta.encoder.layer.I.output.dense.weight
  before: deberta.encoder.rel_embeddings.weight deberta.encoder.LayerNorm.weight
  after: pooler.dense.weight lm_predictions.lm_head.dense.weight
t5:
  block: encoder.block.I.layer.0.SelfAttention.q.weight
  before: shared.weight encoder.embed_tokens.weight
  after: encoder.final_layer_norm.weight lm_head.weight classification_head.dense.weight
bart:
  block: model.decoder.layers.I.fc1.weight
  before: model.shared.weight model.encoder.embed_positions.weight model.encoder.layernorm_embedding.weight
  after: final_logits_bias classification_head.out_proj.weight
whisper:
  block: model.encoder.layers.I.fc1.weight
  before: model.encoder.conv1.weight model.encoder.conv2.bias model.encoder.embed_positions.weight
  after: model.encoder.layer_norm.weight model.decoder.layer_norm.weight proj_out.weight
wav2vec2:
  block: wav2vec2.encoder.layers.I.layer_norm.weight
  before: wav2vec2.feature_extractor.conv_layers.0.conv.weight
    wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight wav2vec2.feature_projection.layer_norm.weight
    wav2vec2.feature_projection.projection.weight wav2vec2.masked_spec_embed
    wav2vec2.encoder.pos_conv_embed.conv.weight_v
  after: lm_head.weight
vit:
  block: vit.encoder.layer.I.output.dense.weight
  before: vit.embeddings.cls_token vit.embeddings.position_embeddings
    vit.embeddings.patch_embeddings.projection.weight
  after: vit.layernorm.weight vit.pooler.dense.weight classifier.weight
swin:
  block: swin.encoder.layers.0.blocks.I.layernorm_after.weight
  before: swin.embeddings.norm.weight swin.embeddings.patch_embeddings.projection.weight
  after: swin.layernorm.weight classifier.weight
clip:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: text_model.embeddings.token_embedding.weight vision_model.embeddings.class_embedding
    vision_model.embeddings.patch_embedding.weight vision_model.pre_layrnorm.weight
  after: vision_model.post_layernorm.weight text_model.final_layer_norm.weight visual_projection.weight
    text_projection.weight logit_scale
siglip:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: vision_model.embeddings.position_embedding.weight
  after: vision_model.head.probe vision_model.head.attention.in_proj_weight vision_model.head.mlp.fc1.weight
    text_model.head.weight logit_bias
open_clip:
  block: visual.transformer.resblocks.I.ln_1.weight
  before: positional_embedding token_embedding.weight visual.class_embedding visual.conv1.weight
    visual.ln_pre.weight
  after: visual.ln_post.weight visual.proj ln_final.weight text_projection logit_scale
timm_vit:
  block: blocks.I.norm1.weight
  before: cls_token reg_token pos_embed patch_embed.proj.weight norm_pre.weight
  after: norm.weight fc_norm.weight head.weight attn_pool.latent attn_pool.norm.weight
timm_convnext:
  block: stages.0.blocks.I.norm.weight
  before: stem.0.weight stem.1.weight
  after: head.norm.weight head.fc.weight
resnet:
  block: layer1.I.conv1.weight
  before: conv1.weight bn1.weight bn1.running_mean
  after: fc.weight fc.bias
llava:
  block: language_model.model.layers.I.mlp.up_proj.weight
  before: multi_modal_projector.linear_1.weight image_newline vision_tower.vision_model.pre_layrnorm.weight
  after: vision_tower.vision_model.post_layernorm.weight language_model.model.norm.weight
    language_model.lm_head.weight
qwen2_vl:
  block: visual.blocks.I.norm1.weight
  before: visual.patch_embed.proj.weight visual.merger.ln_q.weight visual.merger.mlp.0.weight
  after: model.norm.weight
idefics:
  block: model.text_model.layers.I.mlp.up_proj.weight
  before: model.connector.modality_projection.proj.weight model.connector.perceiver_resampler.norm.weight
  after: model.text_model.norm.weight
blip2:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: query_tokens qformer.layernorm.weight language_projection.weight
  after: vision_model.post_layernorm.weight
flux:
  block: double_blocks.I.img_mlp.0.weight
  before: img_in.weight txt_in.weight time_in.in_layer.weight vector_in.out_layer.weight
    guidance_in.out_layer.weight
  after: final_layer.linear.weight final_layer.adaLN_modulation.1.weight
diffusers:
  block: transformer_blocks.I.norm1.linear.weight
  before: x_embedder.weight context_embedder.weight pos_embed.proj.weight
    time_text_embed.text_embedder.linear_1.weight
  after: norm_out.linear.weight proj_out.weight
unet:
  block: down_blocks.I.resnets.0.norm1.weight
  before: conv_in.weight time_embedding.linear_1.weight
  after: conv_norm_out.weight conv_out.weight
""")


def side(block: str, names: Sequence[str], folder: Path) -> dict[str, str]:
    """On which side `--outside position` puts the names, beside two blocks; with alpha 0 and beta 1 that is 0 or 1."""
    paths = sides(folder, [*(block.replace("I", str(i)) for i in range(2)), *names])
    found = planned(paths, "--outside", "position", "--alpha", 0, "--beta", 1)
    return {name: {0.0: "before", 1.0: "after"}[found[name]] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_on_which_side_a_name_stands(family: str, tmp_path: Path) -> None:
    """Embeddings, stems, first norms and projectors stand before the blocks; final norms, poolers and heads behind."""
    inputs_of = {key: FAMILIES[family][key].split() for key in ("before", "after")}
    expected = {name: key for key, names in inputs_of.items() for name in names}
    assert side(FAMILIES[family]["block"], list(expected), tmp_path) == expected


def test_the_table_is_long_enough() -> None:
    """At least 100 real names outside the blocks are held to a side."""
    names = {name for family in FAMILIES.values() for key in ("before", "after") for name in family[key].split()}
    assert len(names) >= 100


MISLEADING = [  # where each stands in its model's forward pass, as transformers, open_clip or colpali run it
    ("distilbert", "distilbert.transformer.layer.I.ffn.lin1.weight", "pre_classifier.weight", "after"),
    ("bert", "bert.encoder.layer.I.output.dense.weight", "cls.seq_relationship.weight", "after"),
    ("xlnet", "transformer.layer.I.ff.layer_1.weight", "sequence_summary.summary.weight", "after"),
    ("modernbert", "model.layers.I.mlp.Wi.weight", "decoder.bias", "after"),
    ("esm", "esm.encoder.layer.I.output.dense.weight", "esm.encoder.emb_layer_norm_after.weight", "after"),
    ("blip", "text_encoder.encoder.layer.I.output.dense.weight", "text_proj.weight", "after"),
    ("clap", "audio_model.audio_encoder.layers.0.blocks.I.w", "audio_projection.linear1.weight", "after"),
    ("colpali", "model.language_model.layers.I.mlp.up_proj.weight", "custom_text_proj.weight", "after"),
    ("open_clip", "visual.layer1.I.conv1.weight", "visual.attnpool.positional_embedding", "after"),
    ("gemma3n", "model.layers.I.mlp.up_proj.weight", "model.altup_unembed_projections.0.weight", "after"),
    ("gemma3n", "model.layers.I.mlp.up_proj.weight", "model.per_layer_projection_norm.weight", "before"),
    ("janus", "model.language_model.layers.I.mlp.up_proj.weight", "model.aligner.fc1.weight", "before"),
    ("glm4v", "model.visual.blocks.I.norm1.weight", "model.visual.post_conv_layernorm.weight", "before"),
    ("qwen3_next", "model.layers.I.mlp.up_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "after"),
    ("qwen3_next", "model.layers.I.mlp.up_proj.weight", "mtp.pre_fc_norm_hidden.weight", "after"),
    ("mimo", "model.layers.I.mlp.up_proj.weight", "model.mtp_layers.0.input_proj.weight", "after"),
]


@pytest.mark.parametrize(
    ("block", "name", "expected"), [pytest.param(*row[1:], id=f"{row[0]} {row[2]}") for row in MISLEADING]
)
def test_on_which_side_a_misleading_name_stands(block: str, name: str, expected: str, tmp_path: Path) -> None:
    """Heads, final norms and prediction layers stand behind the blocks, and what feeds a tower before them, though
    their names hold a word for the other side or for none.
    """
    assert side(block, [name], tmp_path) == {name: expected}


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [(r"^(?P<stack>encoder)\.cell(?P<index>\d+)\.", "encoder"), (r"cell(?P<index>\d+)", "layers")],
)
def test_a_stack_called_as_the_user_likes_moves_no_embedding(pattern: str, prefix: str, tmp_path: Path) -> None:
    """With --layers, an embedding whose name begins with the stack's stands before the blocks all the same."""
    names = [f"{prefix}.cell{i}.w" for i in range(3)]
    ends = {f"{prefix}.embed_tokens.weight": 0.0, f"{prefix}.final_norm.weight": 1.0}
    paths = sides(tmp_path, [*names, *ends])
    got = planned(paths, "--layers", pattern, "--outside", "position", "--alpha", 0)
    assert {name: got[name] for name in ends} == ends


# --- tied heads ---

TIED = {"model_type": "llama", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "options",
    [
        ["--outside", "position"],
        ["--outside", "position", "--schedule", "0.2,0.8", "--gamma", 0.5],
        ["--outside", "position", "--filter", "embed=0.3"],
        ["--filter", "lm_head=keep"],
        ["--filter", "lm_head=keep", "--filter", "*=base"],
        ["--outside", "keep", "--filter", "embed=base"],
    ],
)
def test_a_tied_head_has_its_embedding_s_coefficient(
    options: list[object], saved: dict[str, tuple[Path, Path]]
) -> None:
    """They are one weight, so no option, not a filter either, tells them apart."""
    got = planned(saved["tied"], *options)
    assert got["lm_head.weight"] == got["model.embed_tokens.weight"]


def test_an_untied_head_has_its_own(tmp_path: Path) -> None:
    """Where the config says they are two weights, they are."""
    paths = sides(tmp_path, list(llama(3)), {"model_type": "llama", "tie_word_embeddings": False})
    got = planned(paths, "--outside", "position")
    assert (got["model.embed_tokens.weight"], got["lm_head.weight"]) == (0.1, 1.0)


def test_a_tied_head_follows_the_config_that_the_output_gets(tmp_path: Path) -> None:
    """A fine-tune that is one file takes over the base's config; if that ties the head, the head is tied."""
    base, ft = sides(tmp_path, list(llama(3)), TIED)
    got = written(tmp_path / "out", base, ft / "model.safetensors", "--outside", "position")
    assert "tie_word_embeddings" in (tmp_path / "out" / "config.json").read_text()
    assert value(got["lm_head.weight"]) == value(got["model.embed_tokens.weight"])


def test_a_filter_is_not_said_to_have_worked_where_it_has_not(saved: dict[str, tuple[Path, Path]]) -> None:
    """A dry run counts under a filter only tensors that have its coefficient; a tied head follows its embedding."""
    assert planned(saved["tied"], "--filter", "lm_head=keep")["lm_head.weight"] == 0.1
    ran = dry(saved["tied"], "--filter", "lm_head=keep")
    assert ran.code != 0 or not re.search(r"lm_head: 1 tensor", ran.out)


@pytest.mark.parametrize(
    ("prefix", "names", "config", "options"),
    [
        (
            "encoder.block",
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight", "lm_head.weight"],
            {"model_type": "t5", "tie_word_embeddings": True},
            ["--filter", "shared=0.5"],
        ),
        (
            "model.layers",
            ["model.embed_tokens.weight", "model.layers.2.embed_tokens.weight", "lm_head.weight"],
            {**TIED, "num_hidden_layers": 2},
            ["--outside", "position"],
        ),
    ],
    ids=["t5", "prediction layer"],
)
def test_sharding_does_not_choose_the_embedding_of_a_tied_head(
    prefix: str, names: list[str], config: dict[str, Any], options: list[str], tmp_path: Path
) -> None:
    """However the fine-tune is sharded, and in whatever order, the head's coefficient is the same."""
    tensors = {name: torch.ones(2) for name in [*names, *stack(prefix, 2)]}
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros(2) for name in tensors}, config=config)
    found = set()
    for number, order in enumerate((list(tensors), list(tensors)[::-1])):
        for shards in (1, len(order)):
            ordered = {name: tensors[name] for name in order}
            ft = write_checkpoint(tmp_path / f"ft{number}{shards}", ordered, shards=shards, config=config)
            found.add(planned((base, ft), *options)["lm_head.weight"])
    assert len(found) == 1


# --- stacks ---


@pytest.mark.parametrize("part", ["decoder", "decoder.block"])
@pytest.mark.parametrize(
    ("rule", "decoder"),
    [("0.25,0.5", [0.25, 0.5, 0.75]), ("0.25, -1e0", [0.25, -0.25, -0.75]), ("keep", [1] * 3), ("base", [0] * 3)],
)
def test_a_stack_of_its_own(part: str, rule: str, decoder: list[float], saved: dict[str, tuple[Path, Path]]) -> None:
    """One stack's rule is its own, times gamma unless it is fixed; the other and what is outside are as they were."""
    for gamma in (1, 4):
        got = planned(saved["encoder and decoder"], "--stack", f"{part}={rule}", "--gamma", gamma)
        factor = 1 if rule in FIXED else gamma
        assert [got[f"decoder.block.{i}.layer.1.w"] for i in range(3)] == [factor * c for c in decoder]
        others = planned(saved["encoder and decoder"], "--gamma", gamma)
        assert {n: c for n, c in got.items() if not n.startswith("decoder.block")} == {
            n: c for n, c in others.items() if not n.startswith("decoder.block")
        }


@pytest.mark.parametrize(("schedule", "middle"), [("power:2", 0.25 + 0.5 / 4), ("constant", 0.75), ("linear", 0.5)])
def test_a_stack_s_ends_follow_the_schedule(schedule: str, middle: float, saved: dict[str, tuple[Path, Path]]) -> None:
    """A stack's own alpha and beta take the place of the recipe's in the same f(x); outside keeps the recipe's."""
    got = planned(saved["encoder and decoder"], "--schedule", schedule, "--stack", "decoder=0.25,0.5")
    assert got["decoder.block.1.layer.1.w"] == middle
    assert got["decoder.final_layer_norm.weight"] == 0.1


def test_stacks_beside_a_list(saved: dict[str, tuple[Path, Path]]) -> None:
    """With listed coefficients a stack can be kept or taken back; the other has the list."""
    got = planned(saved["encoder and decoder"], "--schedule", "0.5,1", "--stack", "encoder=base", "--gamma", 0.5)
    assert {got[f"encoder.block.{i}.layer.0.w"] for i in range(4)} == {0}
    assert [got[f"decoder.block.{i}.layer.0.w"] for i in range(3)] == [0.25, 0.375, 0.5]


@pytest.mark.parametrize("part", ["block", "layers", "enc", "coder", "decoder.", ".decoder", "block.0", "*", "shared"])
def test_a_part_that_names_no_single_stack(part: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """An ambiguous or unknown part is refused with the names of the stacks."""
    what = "several" if part == "block" else "no stack"
    ran = dry(saved["encoder and decoder"], "--stack", f"{part}=keep")
    refused(ran, repr(part), what, "\n  decoder.block\n", "\n  encoder.block\n")
    refused(in_yaml(saved["encoder and decoder"], f"{{stacks: {{'{part}': keep}}}}"), repr(part), "encoder.block")


def test_a_whole_name_goes_before_a_part_of_another(tmp_path: Path) -> None:
    """A stack whose name is a part of another's is still selected by its own."""
    paths = sides(tmp_path, [*stack("transformer.resblocks", 2, "w"), *stack("visual.transformer.resblocks", 2, "w")])
    got = planned(paths, "--stack", "transformer.resblocks=keep", "--stack", "visual=base")
    assert set(got.values()) == {0, 1}
    assert {name for name, c in got.items() if c == 0} == {f"visual.transformer.resblocks.{i}.w" for i in range(2)}
    refused(dry(paths, "--stack", "transformer=keep"), "several", "\n  visual.transformer.resblocks\n")


@pytest.mark.parametrize(
    ("first", "second"), [("decoder", "decoder"), ("decoder", "decoder.block"), ("decoder.block", "decoder")]
)
def test_a_stack_named_twice(first: str, second: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Two rules for one stack contradict each other, whichever of its names each uses."""
    refused(dry(saved["encoder and decoder"], "--stack", f"{first}=keep", "--stack", f"{second}=base"), second)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("part", ["double_blocks", "single_blocks"])
def test_half_of_a_joined_stack_is_not_the_whole(part: str, prefix: str, tmp_path: Path) -> None:
    """Blocks that run one after the other are one stack: naming half of it is refused with the whole name, so that
    nobody who means the single blocks sets the double ones; under any prefix.
    """
    paths = sides(tmp_path, [f"{prefix}{name}" for name in MODELS["one after the other"].places])
    whole = f"{prefix}double_blocks+{prefix}single_blocks"
    assert planned(paths, "--stack", f"{whole}=keep")[f"{prefix}double_blocks.0.w"] == 1
    refused(dry(paths, "--stack", f"{part}=keep"), whole)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("decoder", "NAME=VALUE"),
        ("=keep", "NAME=VALUE"),
        ("decoder=", "keep, base"),
        ("decoder=0.5", "alpha and beta"),
        ("decoder=KEEP", "keep, base"),
        ("decoder=0.1,0.2,0.3", "alpha and beta"),
        ("decoder=0.1,", "stacks.decoder.beta"),
        ("decoder=,0.1", "stacks.decoder.alpha"),
        ("decoder=nan,0.1", "finite"),
        ("decoder=0.1,inf", "finite"),
        ("decoder=keep,base", "stacks.decoder.alpha"),
    ],
)
def test_a_stack_s_rule_that_is_none(given: str, word: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Exit code 2 and what is missing or allowed."""
    refused(dry(saved["encoder and decoder"], "--stack", given), word)


# --- filters ---


def test_the_first_filter_that_matches_has_the_last_word(saved: dict[str, tuple[Path, Path]]) -> None:
    """A filter's number goes over stack, schedule, outside and gamma; of several, the first; `*` is all."""
    rules = ("--stack", "encoder=keep", "--outside", "keep", "--gamma", 7)
    given = ("--filter", "block.1.=0.5", "--filter", "norm=-2", "--filter", "shared=base")
    got = planned(saved["encoder and decoder"], *rules, *given)
    assert (got["encoder.block.1.layer.1.norm.w"], got["decoder.block.1.layer.0.w"]) == (0.5, 0.5)
    assert (got["encoder.block.2.layer.1.norm.w"], got["encoder.final_layer_norm.weight"]) == (-2, -2)
    assert (got["shared.weight"], got["encoder.block.0.layer.0.w"], got["lm_head.weight"]) == (0, 1, 1)
    got = planned(saved["encoder and decoder"], *rules, *given, "--filter", "*=0.125")
    assert set(got.values()) == {0.5, -2, 0, 0.125}
    got = planned(saved["encoder and decoder"], *rules, "--filter", "*=0.125", *given)
    assert set(got.values()) == {0.125}


@pytest.mark.parametrize("pattern", ["norm.w", "layers.1", ".", "model.norm.weight", "t", "layers.1.w"])
def test_a_pattern_is_part_of_a_name(pattern: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Every name that contains the text matches, and no other: letters are letters, a dot is a dot."""
    got = planned(saved["decoder"], "--filter", f"{pattern}=-3")
    assert {name for name, c in got.items() if c == -3} == {n for n in MODELS["decoder"].places if pattern in n}


@pytest.mark.parametrize("pattern", ["a=b", "=", "c,d", ",", "=b,", "y=0.25x"])
def test_a_pattern_may_hold_what_separates(pattern: str, tmp_path: Path) -> None:
    """The last equals sign parts pattern and value; commas and other equals signs belong to the pattern."""
    paths = sides(
        tmp_path, ["layers.0.a=b,c", "layers.0.c,d", "layers.0.w", "layers.1.a=b,c", "layers.1.y=0.25x", "layers.1.w"]
    )
    got = planned(paths, "--filter", f"{pattern}=-3")
    assert {name for name, c in got.items() if c == -3} == {name for name in got if pattern in name}


@pytest.mark.parametrize("pattern", ["nope", "*norm", "n*rm", "norm$", "NORM", "model.norm.weight."])
def test_a_pattern_that_matches_nothing(pattern: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """A filter that no name contains is an error that shows it; a star in a pattern is no wildcard."""
    refused(dry(saved["decoder"], "--filter", f"{pattern}=1", "--filter", "*=0"), repr(pattern), "matches none")


def test_integers_and_whole_numbers(tmp_path: Path) -> None:
    """A filter's 0 and 1 copy base and fine-tune, whole numbers count on, integers have the base's only at 0."""
    names = [f"layers.{i}.{kind}" for i in range(4) for kind in ("float", "int")]
    paths = sides(tmp_path, names, dtypes=(torch.float32, torch.int64))
    given = ("0.=0", "1.=1", "2.=3", "3.=-0.0")
    got = written(tmp_path / "out.safetensors", *paths, *(x for g in given for x in ("--filter", f"layers.{g}")))
    assert [value(got[f"layers.{i}.float"]) for i in range(4)] == [0, 1, 3, 0]
    assert [value(got[f"layers.{i}.int"]) for i in range(4)] == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ("norm", "=VALUE"),
        ("=0.5", "=VALUE"),
        ("norm=", "a number, keep or base"),
        ("norm=drop", "a number, keep or base"),
        ("norm=0.1,0.9", "a number, keep or base"),
        ("norm=KEEP", "a number, keep or base"),
        ("norm=nan", "filter.norm"),
        ("norm=-inf", "filter.norm"),
        ("norm=1e999", "filter.norm"),
    ],
)
def test_a_filter_that_is_none(given: str, word: str, saved: dict[str, tuple[Path, Path]]) -> None:
    """Exit code 2 and what is missing or allowed."""
    refused(dry(saved["decoder"], "--filter", given), word)


def test_a_pattern_given_twice(saved: dict[str, tuple[Path, Path]]) -> None:
    """Two values for one pattern contradict each other."""
    refused(dry(saved["decoder"], "--filter", "norm=0.5", "--filter", "norm=0.6"), "norm=0.6", "once")


# --- together with the rest ---


def test_what_one_side_lacks_is_in_the_map_as_it_is_copied(tmp_path: Path) -> None:
    """With --missing copy a tensor of the fine-tune alone has 1 in the map and one of the base alone 0, whatever a
    filter says; that is what is written.
    """
    base = {name: torch.zeros(2) for name in [*stack("layers", 2, "w"), "norm.weight", "old.weight"]}
    ft = {name: torch.ones(2) for name in [*stack("layers", 2, "w"), "norm.weight", "new.weight"]}
    paths = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", ft)
    options = ("--missing", "copy", "--filter", "weight=0.5")
    plan, got = planned(paths, *options), written(tmp_path / "out", *paths, *options)
    assert plan == {"layers.0.w": 0.1, "layers.1.w": 1, "norm.weight": 0.5, "old.weight": 0, "new.weight": 1}
    assert {name: value(tensor) for name, tensor in got.items()} == {n: float(np.float32(c)) for n, c in plan.items()}
    options = ("--missing", "skip", "--filter", "new=0.5")
    refused(dry(paths, *options), "new", "matches none")


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--beta", 0], 0),
        (["--schedule", "0.5"], 0),
        (["--schedule", "0.5,0.5", "--gamma", 0.5], 0),
        (["--schedule", "power:2", "--beta", 0, "--filter", "ffn=keep"], 0),
        (["--schedule", "constant", "--alpha", 0.5, "--beta", 0], 0),
        ([], 4),
        (["--schedule", "0.5,0.6"], 4),
        (["--schedule", "constant"], 4),
        (["--beta", 0, "--outside", "base"], 4),
        (["--beta", 0, "--stack", "albert=keep"], 4),
    ],
)
def test_depth_is_needed_only_where_it_makes_a_difference(options: list[object], code: int, tmp_path: Path) -> None:
    """Without a reading of depth one coefficient for all can be given, and nothing that tells tensors apart by it."""
    name = "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
    ran = dry(sides(tmp_path, [name, "albert.embeddings.word_embeddings.weight"]), *options)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    assert name in ran.err


def test_names_from_the_user_s_expression(tmp_path: Path) -> None:
    """--stack and --filter take the stacks that --layers names."""
    names = [f"net.{side}_cell{i}.w" for side in ("left", "right") for i in range(3)]
    given = ("--layers", r"(?P<stack>left|right)_cell(?P<index>\d+)", "--stack", "left=base", "--filter", "cell1=0.5")
    got = planned(sides(tmp_path, names), *given)
    assert [got[name] for name in names] == [0, 0.5, 0, 0.1, 0.5, 1]


# --- what is said of it ---


def test_a_dry_run_shows_the_ends_and_what_is_outside(saved: dict[str, tuple[Path, Path]]) -> None:
    """Per stack its layers, tensors, first and last coefficient; every tensor outside with its own; the filters."""
    given = ("--alpha", 0.25, "--beta", 0.5, "--stack", "decoder=base", "--outside", "position", "--filter", "lm_=keep")
    ran = dry(saved["encoder and decoder"], *given)
    assert ran.code == 0, ran.err
    rows = [re.split(r" {2,}", line.strip()) for line in ran.out.splitlines()]
    assert ["decoder.block", "3", "9", "18", "0", "0"] in rows
    assert ["encoder.block", "4", "8", "16", "0.25", "0.75"] in rows
    assert ["outside the blocks", "4", "8", "0.25", "0.75"] in rows
    outside = {"shared": 0.25, "encoder.final_layer_norm": 0.75, "decoder.final_layer_norm": 0.75, "lm_head": 1}
    for name, c in outside.items():
        assert [f"{c}", f"{name}.weight"] in rows
    assert ["names with lm_", "1", "2", "1", "1"] in rows
    assert not (saved["decoder"][0].parent / "not written").exists()


def test_a_dry_run_says_how_many_names_it_leaves_out(tmp_path: Path) -> None:
    """Of many tensors outside the first are shown, and how many more there are."""
    names = [f"extra_{chr(97 + i)}.weight" for i in range(20)]
    ran = dry(sides(tmp_path, [*stack("layers", 2, "w"), *names]))
    shown = [name for name in names if name in ran.out]
    assert 0 < len(shown) < 20
    assert f"{20 - len(shown)} more" in ran.out


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--schedule", "0.125,0.75,0.5", "--outside", "position", "--gamma", 0.3],
        ["--schedule", "constant", "--stack", "text_model=base"],
        ["--stack", "text_model=0.3,0.4", "--stack", "vision_model=keep", "--outside", "base"],
        ["--schedule", "power:3", "--outside", "keep", "--alpha", -0.123456789],
    ],
)
def test_card_and_summary_agree_with_the_map(
    options: list[object], saved: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """The model card and the summary of the run give the first and last coefficient of the dry run, and those are the
    map's.
    """
    model, plan = MODELS["towers"], summary(saved["towers"], *options)
    ran = run_lines("edit", *saved["towers"], "-o", tmp_path / "out", "--json", *options)
    assert ran.code == 0, ran.err
    keys = ("stacks", "outside", "edited", "copied", "recipe", "bytes")
    assert {key: ran.json[key] for key in keys} == {key: plan[key] for key in keys}

    coefficients = {row["name"]: row["coefficient"] for row in plan["map"]}
    card = (tmp_path / "out" / "README.md").read_text()
    for row in plan["stacks"]:
        ends = {0: row["first"], row["layers"] - 1: row["last"]} if row["layers"] > 1 else {0: row["last"]}
        for name, place in model.places.items():
            if not isinstance(place, str) and place[0] == row["name"] and place[1] in ends:
                assert coefficients[name] == ends[place[1]], name
        assert f"| `{row['name']}` | {row['layers']} | {row['first']:.6g} | {row['last']:.6g} |" in card
    for name, place in model.places.items():
        if isinstance(place, str):
            assert coefficients[name] == plan["outside"]["first" if place == "before" else "last"]
    assert f"| outside the blocks | | {plan['outside']['first']:.6g} | {plan['outside']['last']:.6g} |" in card


def test_card_and_table_do_not_hide_a_filter(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """A card whose table says 0.1 to 1 must say, too, that a filter gave all of it another coefficient; so must what
    the run prints.
    """
    ran = run_lines("edit", *saved["decoder"], "-o", tmp_path / "out", "--filter", "*=0.375")
    assert ran.code == 0, ran.err
    assert "0.375" in (tmp_path / "out" / "README.md").read_text()
    assert "0.375" in ran.out


def test_the_recipe_says_it_as_it_was_said(saved: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """lines_recipe.yaml holds every option, filters in their order, and no alpha or beta beside a list."""
    given = ("--stack", "decoder=0.25,0.5", "--stack", "encoder=keep", "--filter", "z=0.5", "--filter", "a=base")
    paths = sides(tmp_path, [*MODELS["encoder and decoder"].places, "z.a"])
    written(tmp_path / "out", *paths, "--outside", "position", "--schedule", "power:2", *given)
    asked = yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())["lines"]
    assert (asked["outside"], asked["schedule"]) == ("position", "power:2")
    assert asked["stacks"] == {"decoder": {"alpha": 0.25, "beta": 0.5}, "encoder": "keep"}
    assert list(asked["filter"].items()) == [("z", 0.5), ("a", "base")]
    written(tmp_path / "list", *paths, "--schedule", "0.1,0.7")
    asked = yaml.safe_load((tmp_path / "list" / "lines_recipe.yaml").read_text())["lines"]
    assert asked["schedule"] == [0.1, 0.7]
    assert not {"alpha", "beta", "stacks", "filter"} & asked.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_coefficient_is_rounded_once_to_the_dtype_of_the_arithmetic(dtype: torch.dtype, tmp_path: Path) -> None:
    """A list's and a power's values reach the file as the nearest number of the arithmetic, then of the dtype."""
    c = 0.1 + 0.8 * (1 / 3) ** 2
    got = over_depth(tmp_path, 4, "--schedule", "power:2", "--alpha", 0.1, "--beta", 0.8, dtype=dtype)
    single = struct.unpack("<f", struct.pack("<f", c))[0]
    assert got[2] == (c if dtype == torch.float64 else torch.tensor(single, dtype=dtype).item())
