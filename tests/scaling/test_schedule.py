"""Coefficients over depth: --schedule, --alpha, --beta, --gamma, and all options together."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import lines_cli as lines
from support.files import snapshot
from support.schedules import (
    FIXED,
    MODELS,
    Model,
    dry,
    in_yaml,
    one_value,
    over_depth,
    planned,
    refused,
    summary,
    written,
)

Asked = dict[str, Any]
"""A recipe's `lines:`, as YAML has it."""

# --- models: every tensor's place is written by hand ---


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
@pytest.mark.slow
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
@pytest.mark.slow
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
            assert one_value(tensor) == (exact if tensor.is_floating_point() else float(exact != 0)), (name, asked)
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
    "cosine": lambda x, a, b: a + b * np.sin(np.pi * x / 2) ** 2,
    "sigmoid": lambda x, a, b: a + b * logistic(x, 10),
    "sigmoid:0.5": lambda x, a, b: a + b * logistic(x, 0.5),
    "sigmoid:1e4": lambda x, a, b: a + b * np.where(x == 0.5, 0.5, x > 0.5),
}


def logistic(x: Any, steepness: float) -> Any:
    """The logistic curve around 1/2, stretched from 0 to 1."""
    low, high, at = (1 / (1 + np.exp(-steepness * (place - 0.5))) for place in (0.0, 1.0, x))
    return (at - low) / (high - low)


def depths(layers: int) -> Any:
    """x = (l - 1) / (L - 1) for every layer; a lone one stands at the deep end."""
    return np.linspace(0, 1, layers) if layers > 1 else np.ones(1)


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
@pytest.mark.some(6)
def test_a_schedule_over_depth(schedule: str, layers: int, tmp_path: Path) -> None:
    """Every layer has gamma * (alpha + beta * f(x)), one layer alone gamma * (alpha + beta), outside gamma * alpha."""
    for gamma in (1.0, -0.5):
        given = ("--schedule", schedule, "--alpha", 0.25, "--beta", 0.6, "--gamma", gamma)
        got = over_depth(tmp_path / f"{gamma}", layers, *given)
        inside = gamma * SCHEDULES[schedule](depths(layers), 0.25, 0.6)
        assert got == [close(c) for c in (gamma * 0.25, *inside)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.some(6)
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
@pytest.mark.some(5)
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


@pytest.mark.slow
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
