"""The numbers of merges that are planned, against the float64 reference and against the merges themselves."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from support.files import write_checkpoint
from support.inspect_reference import (
    DEPTH,
    TIED,
    UPDATE,
    Reference,
    Spot,
    Tensors,
    agree,
    at,
    check,
    coefficients,
    inspect,
    linear,
    loaded,
    norm,
    pair_of_stacks,
    pair_spots,
    refused,
    toy,
    toy_spots,
    tuned,
    vector,
    written,
)
from support.run import run_lines

Flat = list[np.ndarray]


def recipe_file(folder: Path, base: Tensors, fts: Sequence[Tensors], said: Mapping[str, Any], **how: Any) -> Path:
    """A recipe, with its inputs beside it; what it says of models stands under `of_models`."""
    names = ["base", *(f"ft{n}" for n in range(len(fts)))]
    for name, side in zip(names, (base, *fts), strict=True):
        write_checkpoint(folder / name, side, **how)
    own = said.get("of_models", [{}] * len(fts))
    models = [{"model": name, "parameters": of} for name, of in zip(names[1:], own, strict=True)]
    recipe = {"base_model": "base", "models": models} | {k: v for k, v in said.items() if k != "of_models"}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def merged_by_lines(recipe: Path, out: Path, *options: object) -> Any:
    """The JSON of `lines merge`, run or planned."""
    ran = run_lines("merge", "--config", recipe, "-o", out, "--json", "--quiet", "--device", "cpu", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err + ran.trace
    return ran.json


def coefficients_in(told: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["name"]: row["coefficient"] for row in told["map"]}


def trimmed(taus: Flat, sizes: Sequence[int], density: float, trim: str) -> Flat:
    """The largest entries of each update, over the whole model or tensor by tensor."""
    bounds = [0, *np.cumsum(sizes)] if trim == "tensor" else [0, sum(sizes)]
    out = []
    for tau in taus:
        kept = np.zeros_like(tau)
        for start, end in itertools.pairwise(bounds):
            part = np.abs(tau[start:end])
            least = np.sort(part)[-max(1, int(density * len(part)))]
            kept[start:end] = np.where(part >= least, tau[start:end], 0)
        out.append(kept)
    return out


def by_ties(taus: Flat, sizes: Sequence[int], density: float, trim: str, weights: Sequence[float]) -> np.ndarray:
    """TIES: trim, elect the sign of the weighted sum, and take the weighted mean of what agrees with it."""
    kept = trimmed(taus, sizes, density, trim)
    sign = np.sign(sum(w * tau for w, tau in zip(weights, kept, strict=True)))
    if trim == "global" and not sign.all():
        sign = np.where(sign == 0, 1 if sign.sum() > 0 else -1, sign)
    sign = np.where(sign == 0, 1, sign)
    agrees = [(np.sign(w * tau) == sign) * 1.0 for w, tau in zip(weights, kept, strict=True)]
    total = sum(w * tau * yes for w, tau, yes in zip(weights, kept, agrees, strict=True))
    whole = sum(w * yes for w, yes in zip(weights, agrees, strict=True))
    return np.divide(total, whole, out=np.zeros_like(total), where=whole != 0)


def by_consensus(taus: Flat, limit: float, k: int) -> np.ndarray:
    total = np.sum(taus, 0)
    masks = [np.abs(tau) > np.abs(total - tau) * limit for tau in taus]
    return np.where(np.sum(masks, 0) >= k, total, 0.0)


def weighted(taus: Flat, weights: Sequence[float]) -> np.ndarray:
    return np.sum([w * tau for w, tau in zip(weights, taus, strict=True)], 0)


def by_slerp(a: Flat, b: Flat, t: float) -> np.ndarray:
    """Along the arc from one tensor to the other, tensor by tensor."""
    parts = []
    for x, y in zip(a, b, strict=True):
        angle = math.acos(float(x @ y) / (norm(x) * norm(y)))
        parts.append((math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle))
    return np.concatenate(parts)


WEIGHTS = [{"weight": 0.5}, {"weight": 1.5}, {"weight": -0.25}]
METHODS: dict[str, tuple[dict[str, Any], Callable[..., np.ndarray]]] = {
    "TIES, global": (
        {"merge_method": "ties", "parameters": {"density": 0.2}},
        lambda taus, sizes: by_ties(taus, sizes, 0.2, "global", [1, 1, 1]),
    ),
    "TIES, tensor": (
        {"merge_method": "ties", "parameters": {"density": 0.2, "trim": "tensor"}},
        lambda taus, sizes: by_ties(taus, sizes, 0.2, "tensor", [1, 1, 1]),
    ),
    "TIES, weights": (
        {"merge_method": "ties", "parameters": {"density": 0.4}, "of_models": [*WEIGHTS[:2], {"weight": 0.75}]},
        lambda taus, sizes: by_ties(taus, sizes, 0.4, "global", [0.5, 1.5, 0.75]),
    ),
    "consensus": ({"merge_method": "consensus"}, lambda taus, _: by_consensus(taus, 0.4, 2)),
    "consensus of one": (
        {"merge_method": "consensus", "parameters": {"k": 1, "mask_lambda": 0.9}},
        lambda taus, _: by_consensus(taus, 0.9, 1),
    ),
    "average": ({"merge_method": "average"}, lambda taus, _: weighted(taus, [1 / 3] * 3)),
    "sum": ({"merge_method": "task_arithmetic"}, lambda taus, _: weighted(taus, [1, 1, 1])),
    "sum, said": (
        {"merge_method": "task_arithmetic", "parameters": {"weight": 1, "density": 1, "lambda": 0.5}},
        lambda taus, _: weighted(taus, [1, 1, 1]),
    ),
    "weighted sum": (
        {"merge_method": "task_arithmetic", "of_models": WEIGHTS},
        lambda taus, _: weighted(taus, [0.5, 1.5, -0.25]),
    ),
    "normalised sum": (
        {"merge_method": "task_arithmetic", "of_models": WEIGHTS, "parameters": {"normalize": True}},
        lambda taus, _: weighted(taus, [0.5 / 1.75, 1.5 / 1.75, -0.25 / 1.75]),
    ),
    "linear": (
        {"merge_method": "linear", "of_models": [{"weight": 1}, {"weight": 2}, {"weight": 1}]},
        lambda taus, _: weighted(taus, [0.25, 0.5, 0.25]),
    ),
}


def flat(ref: Reference) -> tuple[Flat, list[int]]:
    """Every update in one vector, and the sizes of its tensors."""
    return ref.together(ref.names)[0], [ref.base[name].numel() for name in ref.names]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param({"beta": 0.5}, marks=pytest.mark.slow),
        {"alpha": "auto", "beta": 0.25, "gamma": 2, "outside": "position"},
    ],
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.slow
def test_auto_alpha_of_a_merge(method: str, lines: dict[str, Any], tmp_path: Path) -> None:
    """Alpha auto, its norms, and all that is scaled by it are what the merge of the same recipe makes of them."""
    base = toy(11, 3)
    fts = [tuned(base, seed, size=0.05 * (1 + seed)) for seed in range(3)]
    said, by = METHODS[method]
    recipe = recipe_file(tmp_path, base, fts, {**said, "lines": lines})
    told = inspect("--config", recipe, "--tensors")
    auto = told["together"]["auto"]
    spots = toy_spots(base)
    taus, sizes = flat(Reference(base, fts, spots, dict.fromkeys(spots, 1.0)))
    total, merged = float(np.abs(np.sum(taus, 0)).sum()), float(np.abs(by(taus, sizes)).sum())
    assert auto["method"] == said["merge_method"]
    assert auto["sum"] == pytest.approx(total, rel=1e-5)
    assert auto["merged"] == pytest.approx(merged, rel=1e-5)
    assert auto["alpha"] == pytest.approx(total / merged / 3, rel=1e-5)
    ran = merged_by_lines(recipe, tmp_path / "out")
    assert auto["alpha"] == ran["alpha"] == told["scaling"]["alpha"]
    if ran["norms"] is not None:
        assert {key: auto[key] for key in ("sum", "merged")} == ran["norms"]
    by_layer = {(row["name"], i): c for row in ran["stacks"] for i, c in enumerate(row["coefficients"])}
    assert {(row["stack"], row["index"]): row["coefficient"] for row in told["layers"]} == by_layer
    outside = [told["outside"][side]["coefficient"] for side in ("before", "after")]
    assert outside == [ran["outside"]["first"], ran["outside"]["last"]]
    assert coefficients_in(inspect(tmp_path / "out", "--tensors")) == coefficients_in(told)
    gamma, lamda = lines.get("gamma", 1), said.get("parameters", {}).get("lambda", 1)
    c = {name: lamda * value for name, value in linear(spots, auto["alpha"], lines["beta"], gamma).items()}
    if "outside" in lines:
        behind = lamda * gamma * (auto["alpha"] + lines["beta"])
        c |= {name: behind for name, spot in spots.items() if spot.side == "after"}
    check(told, Reference(base, fts, spots, c))


@pytest.mark.slow
@pytest.mark.parametrize("t", [0.25, 0.8])
@pytest.mark.parametrize("models", [1, 2])
def test_auto_alpha_of_slerp(models: int, t: float, tmp_path: Path) -> None:
    """Of slerp, too: between two models, or from the base to the only one there is."""
    base = toy(2, 3)
    fts = [tuned(base, seed, size=0.4) for seed in range(models)]
    said = {"merge_method": "slerp", "parameters": {"t": t}, "lines": {"beta": 0.5}}
    recipe = recipe_file(tmp_path, base, fts, said)
    told = inspect("--config", recipe, "--tensors")
    first, last = ([vector([side[n]]) for n in base] for side in ([base, *fts][-2], fts[-1]))
    merged = np.abs(by_slerp(first, last, t) - vector(base.values())).sum()
    total = np.abs(sum(vector(ft[n] for n in base) - vector(base.values()) for ft in fts)).sum()
    ran = merged_by_lines(recipe, tmp_path / "out")
    assert told["scaling"]["alpha"] == ran["alpha"] == pytest.approx(total / merged / 2, rel=1e-5)
    if models == 2:
        assert {key: told["together"]["auto"][key] for key in ("sum", "merged")} == ran["norms"]
    spots = toy_spots(base)
    check(told, Reference(base, fts, spots, linear(spots, ran["alpha"], 0.5)))


def ramp(values: Sequence[float], spot: Spot) -> float:
    """A gradient's value: over the depth of a stack, and its first outside."""
    return values[0] if spot.stack is None else at(values)(spot.index / (DEPTH[spot.stack] - 1))


PLANS: dict[str, tuple[dict[str, Any], Callable[[str, Spot], float]]] = {
    "without lines": ({}, lambda *_: 1.0),
    "lambda alone": ({"parameters": {"lambda": 0.3}}, lambda *_: 0.3),
    "a gradient alone": ({"parameters": {"lambda": [0.2, 1.0, 0.4]}}, lambda _, spot: ramp([0.2, 1.0, 0.4], spot)),
    "filters alone": (
        {
            "parameters": {
                "lambda": [
                    {"filter": "Attention", "value": [0.5, 2]},
                    {"filter": "layer_norm", "value": -1},
                    {"value": 0.75},
                ]
            }
        },
        lambda name, spot: ramp([0.5, 2], spot) if "Attention" in name else -1 if "layer_norm" in name else 0.75,
    ),
    "filters that leave some out": (
        {"parameters": {"lambda": [{"filter": "encoder", "value": 0.5}]}, "lines": {"alpha": 0.2, "beta": 0.6}},
        lambda n, s: (0.5 if "encoder" in n else 1) * coefficients(lambda x: 0.2 + 0.6 * x, 0.2)(n, s),
    ),
    "auto": ({"lines": {"beta": 0.75}}, coefficients(lambda x: 0.5 + 0.75 * x, 0.5)),
    "auto, gamma and lambda": (
        {"parameters": {"lambda": 3}, "lines": {"beta": 0.5, "gamma": 0.5}},
        coefficients(lambda x: 0.5 + 0.5 * x, 0.5, gamma=1.5),
    ),
    "a gradient on top": (
        {"parameters": {"lambda": [1, 0.5]}, "lines": {"alpha": 0.2, "beta": 0.8, "outside": "position"}},
        lambda n, s: ramp([1, 0.5], s) * coefficients(lambda x: 0.2 + 0.8 * x, 0.2, 1.0)(n, s),
    ),
    "stacks, filters and lambda": (
        {
            "parameters": {"lambda": [{"filter": "wi", "value": 2}, {"filter": "*", "value": [0.5, 1]}]},
            "lines": {
                "alpha": 0.3,
                "beta": 0.5,
                "gamma": 0.5,
                "stacks": {"decoder": {"alpha": 0, "beta": 2}, "encoder": "keep"},
                "filter": {"SelfAttention": 0.25, "shared": "base"},
                "outside": "keep",
            },
        },
        lambda n, s: (
            (2 if "wi" in n else ramp([0.5, 1], s))
            * coefficients(
                lambda _: math.nan,
                1.0,
                outside_gamma=1,
                stacks={"decoder.block": lambda x: 0.5 * (0 + 2 * x), "encoder.block": lambda _: 1.0},
                filters={"SelfAttention": 0.25, "shared": 0.0},
            )(n, s)
        ),
    ),
    "a list": (
        {"parameters": {"lambda": 0.5}, "lines": {"schedule": [0.9, 0.1, 0.4], "outside": "position"}},
        coefficients(at([0.9, 0.1, 0.4]), 0.9, 0.4, gamma=0.5),
    ),
    "a power": (
        {"merge_method": "average", "lines": {"alpha": 0.1, "beta": 0.9, "schedule": "power:2"}},
        coefficients(lambda x: 0.1 + 0.9 * x**2, 0.1),
    ),
    "linear, with a base": (
        {"merge_method": "linear", "lines": {"alpha": 0.25, "beta": 0.5}},
        coefficients(lambda x: 0.25 + 0.5 * x, 0.25),
    ),
}


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.slow
def test_coefficients_of_a_recipe(plan: str, tmp_path: Path) -> None:
    """Each tensor's coefficient is that of the merge, `lambda` and filters included, and what is scaled follows it."""
    base = pair_of_stacks(1)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said, c = PLANS[plan]
    recipe = recipe_file(tmp_path, base, fts, {"merge_method": "task_arithmetic", **said})
    told = inspect("--config", recipe, "--tensors")
    spots = pair_spots(base)
    check(told, Reference(base, fts, spots, {name: c(name, spot) for name, spot in spots.items()}))
    planned = merged_by_lines(recipe, tmp_path / "out", "--dry-run")
    assert coefficients_in(told) == coefficients_in(planned)
    layers = {(row["name"], i): v for row in planned["stacks"] for i, v in enumerate(row["coefficients"])}
    assert {(row["stack"], row["index"]): row["coefficient"] for row in told["layers"]} == layers
    assert told["scaling"]["of"] == "merge"
    assert told["scaling"]["lambda"] == said.get("parameters", {}).get("lambda")
    assert (told["scaling"]["lines"] is None) == ("lines" not in said)
    merged_by_lines(recipe, tmp_path / "out")
    output = inspect(tmp_path / "out", "--tensors")
    assert output["scaling"]["of"] == "output"
    assert coefficients_in(output) == coefficients_in(told)


@pytest.mark.slow
def test_what_is_told_as_merge_gives_what_is_told_as_scaled(tmp_path: Path) -> None:
    """The recipe in the report, run, changes each layer by the scaled norm of the sum."""
    base = toy(2, 4)
    fts = [tuned(base, seed) for seed in range(3)]
    told = inspect(*written(tmp_path, base, fts), "--beta", 0.8, "--filter", "mlp=0.9", "--outside", "position")
    recipe = tmp_path / "told.yaml"
    recipe.write_text(yaml.safe_dump(told["merge"]), encoding="utf-8")
    merged_by_lines(recipe, tmp_path / "out")
    out, spots = loaded(tmp_path / "out"), toy_spots(base)
    for row in told["together"]["layers"]:
        names = [name for name, spot in spots.items() if spot.index == row["index"]]
        left = norm(vector(out[n] for n in names) - vector(base[n] for n in names))
        assert row["scaled_norm_of_sum"] == pytest.approx(left, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [(), ("--alpha", 0.3, "--gamma", 0.5), ("--schedule", "0.1,0.8", "--filter", "mlp=2")]
)
def test_the_recipe_of_an_edit(options: tuple[object, ...], tmp_path: Path) -> None:
    """An edit's own recipe, of one model, tells the numbers that were told of that edit."""
    base = toy(3, 4)
    ft = tuned(base, 1)
    b, f = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", ft)
    assert run_lines("edit", b, f, "-o", tmp_path / "out", "--quiet", *options).code == 0
    asked = inspect(f, "--base", b, *options, "--tensors")
    told = inspect("--config", tmp_path / "out/lines_recipe.yaml", "--tensors")
    differing = {key for key in asked.keys() | told.keys() if asked.get(key) != told.get(key)} - {"seconds", "merge"}
    assert differing == {"scaling"}
    assert told["scaling"] == asked["scaling"] | {"of": "merge"}
    spots = toy_spots(ft)
    check(told, Reference(base, [ft], spots, {row["name"]: row["coefficient"] for row in asked["map"]}))
    output = inspect(tmp_path / "out", "--tensors")
    assert coefficients_in(output) == coefficients_in(told)


def test_one_model_of_which_a_half_is_taken(tmp_path: Path) -> None:
    """Alpha auto of one weighted model makes up for the weight."""
    base = toy(3, 3)
    ft = tuned(base, 1)
    said = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.25}, "lines": {"beta": 0.5}}
    told = inspect("--config", recipe_file(tmp_path, base, [ft], said), "--tensors")
    assert told["together"] is None
    assert told["scaling"]["alpha"] == pytest.approx(4.0)
    check(told, Reference(base, [ft], spots := toy_spots(ft), linear(spots, told["scaling"]["alpha"], 0.5)))


def nan_in_a_model(sides: list[Tensors]) -> None:
    sides[1]["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan


def inf_in_the_base(sides: list[Tensors]) -> None:
    sides[0]["lm_head.weight"][1, 1] = math.inf


def another_shape(sides: list[Tensors]) -> None:
    sides[2]["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)


def a_tensor_less(sides: list[Tensors]) -> None:
    del sides[2]["model.layers.1.mlp.up_proj.weight"]


def more_rows(sides: list[Tensors]) -> None:
    sides[1]["lm_head.weight"] = torch.ones(13, 6)


def nothing_changed(sides: list[Tensors]) -> None:
    sides[1:] = [{name: tensor.clone() for name, tensor in sides[0].items()} for _ in range(2)]


@pytest.mark.parametrize("spoil", [nan_in_a_model, inf_in_the_base, another_shape, a_tensor_less, more_rows])
def test_what_a_merge_refuses(spoil: Callable[[list[Tensors]], None], tmp_path: Path) -> None:
    """Where lines merge refuses its inputs, so does inspect, with the same exit code: no alpha is told."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    spoil(sides)
    said = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": {"beta": 0.5}}
    recipe = recipe_file(tmp_path, sides[0], sides[1:], said)
    ran = run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet")
    assert ran.code in (4, 5)
    refused(ran.code, "--config", recipe)


@pytest.mark.slow
@pytest.mark.parametrize("settled", [{"missing": "skip"}, {"missing": "copy"}, {"resize": "base"}, {"resize": "ft"}])
def test_what_a_recipe_settles(settled: dict[str, str], tmp_path: Path) -> None:
    """Where the recipe says what becomes of misfits, alpha is measured over what is merged, as by the merge."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    (a_tensor_less if "missing" in settled else more_rows)(sides)
    said = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": {"beta": 0.5}, **settled}
    said |= {"missing_in_blocks": 1} if "missing" in settled else {}
    recipe = recipe_file(tmp_path, sides[0], sides[1:], said)
    told, ran = inspect("--config", recipe, "--tensors"), merged_by_lines(recipe, tmp_path / "out")
    assert {key: told["together"]["auto"][key] for key in ("sum", "merged")} == ran["norms"]
    assert told["together"]["auto"]["alpha"] == ran["alpha"]
    cut = [side | {"lm_head.weight": side["lm_head.weight"][:11]} for side in sides]
    spots = toy_spots(sides[1])
    check(told, Reference(cut[0], cut[1:], spots, linear(spots, ran["alpha"], 0.5)))


@pytest.mark.slow
def test_a_plain_sum_of_what_is_not_finite(tmp_path: Path) -> None:
    """Of a plain sum, whose alpha needs no measuring, 1/N is told, and norms over what is finite in all."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    nan_in_a_model(sides)
    said = {"merge_method": "task_arithmetic", "lines": {"beta": 0.5}}
    told = inspect("--config", recipe_file(tmp_path, sides[0], sides[1:], said))
    spots = toy_spots(base)
    ref = Reference(sides[0], sides[1:], spots, linear(spots, 0.5, 0.5))
    check(told, ref)
    l1 = ref.joint(ref.names)["l1"]
    agree([told["together"]["auto"][key] for key in ("alpha", "sum", "merged")], [0.5, l1, l1], "auto")


FILTERED = {
    "merge_method": "average",
    "lines": {"beta": 0.5, "filter": {"embed_tokens": 0.5, "layers.0": 0.25}},
}


def test_an_alpha_that_cannot_be_measured(tmp_path: Path) -> None:
    """Where nothing is merged alpha is null, and so is all that rests on it; what a filter fixes is told."""
    sides = [base := toy(1, 3), *([] for _ in range(2))]
    nothing_changed(sides)
    recipe = recipe_file(tmp_path, sides[0], sides[1:], FILTERED)
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet").code == 4
    told = inspect("--config", recipe, "--tensors")
    assert told["together"]["auto"] == {"method": "average", "alpha": None, "sum": 0.0, "merged": 0.0}
    assert told["scaling"]["alpha"] is None
    for name, c in coefficients_in(told).items():
        assert c == (0.25 if "layers.0" in name else 0.5 if "embed_tokens" in name else None)
    assert base.keys() == coefficients_in(told).keys()


def test_what_rests_on_an_alpha_that_cannot_be_measured(tmp_path: Path) -> None:
    """Without alpha nothing that is scaled by it can be told, the largest change not either, whatever comes first."""
    base = {name: tensor.double().round() for name, tensor in toy(1, 3).items()}
    fts = [{name: tensor + by for name, tensor in base.items()} for by in (1.0, -1.0)]
    recipe = recipe_file(tmp_path, base, fts, FILTERED | {"lines": {"beta": 0.5, "filter": {"lm_head": 0.5}}})
    told = inspect("--config", recipe)
    assert told["scaling"]["alpha"] is None
    one = told["fine_tunes"][0]
    assert [one[key] for key in UPDATE[4:]] == [None] * 3


def test_recipes_that_cannot_be_inspected(tmp_path: Path) -> None:
    """A recipe without a base, with options beside it, or of one model twice is impossible: exit code 2."""
    base = toy(1, 2)
    fts = [tuned(base, 1), tuned(base, 2)]
    recipe = recipe_file(tmp_path, base, fts, {"merge_method": "task_arithmetic"})
    refused(2, "--config", recipe, "--alpha", 0.3)
    refused(2, "--config", recipe, "--base", tmp_path / "base")
    refused(2, tmp_path / "ft0", "--config", recipe)
    for models in (["ft0", "ft0"], ["ft0", "./ft0"], ["base"]):
        said = {"merge_method": "average", "base_model": "base", "models": [{"model": model} for model in models]}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
        refused(2, "--config", tmp_path / "r.yaml")
    said = {"merge_method": "linear", "models": [{"model": "ft0"}, {"model": "ft1"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    refused(2, "--config", tmp_path / "r.yaml")


def test_a_coefficient_of_a_recipe_beyond_float32(tmp_path: Path) -> None:
    """lambda counts towards what float32 has to hold, and so does an alpha that was measured."""
    base = toy(1, 2)
    fts = [tuned(base, seed) for seed in (1, 2)]
    lines = {"alpha": 1e20, "beta": 0}
    said = {"merge_method": "task_arithmetic", "parameters": {"lambda": 1e20}, "lines": lines}
    refused(2, "--config", recipe_file(tmp_path / "a", base, fts, said))
    said = {"merge_method": "task_arithmetic", "parameters": {"weight": 1e-20}, "lines": {"beta": 0, "gamma": 1e30}}
    recipe = recipe_file(tmp_path / "b", base, fts, said)
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet").code == 2
    refused(2, "--config", recipe)


@pytest.mark.slow
def test_a_base_listed_among_the_models(tmp_path: Path) -> None:
    """A base among the models has no task vector: it is no model, and N is that of the others. `linear` counts it."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    recipe = recipe_file(tmp_path, base, fts, {})
    for method, alpha in (("task_arithmetic", 0.5), ("average", 1.0), ("linear", 1.0)):
        said = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"merge_method": method, "lines": {"beta": 0.5}}
        said["models"] = [{"model": "base"}, *said["models"]]
        recipe.write_text(yaml.safe_dump(said), encoding="utf-8")
        told, ran = inspect("--config", recipe), merged_by_lines(recipe, tmp_path / method)
        assert told["together"]["models"] == [str(tmp_path / "ft0"), str(tmp_path / "ft1")]
        assert told["together"]["auto"]["alpha"] == ran["alpha"] == pytest.approx(alpha)
        said["models"] = said["models"][1:]
        recipe.write_text(yaml.safe_dump(said), encoding="utf-8")
    del said["lines"]  # then linear takes no differences, and a base listed among the models is one to compare with
    recipe.write_text(yaml.safe_dump(said | {"models": [{"model": "base"}, *said["models"]]}), encoding="utf-8")
    spots = toy_spots(base)
    check(inspect("--config", recipe), Reference(base, fts, spots, dict.fromkeys(spots, 1.0)))


def test_a_head_that_the_base_of_a_recipe_ties(tmp_path: Path) -> None:
    """A merge is like its base: a head that the base's config ties has its embedding's coefficient."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said = {"merge_method": "task_arithmetic", "lines": {"alpha": 0.1, "beta": 0.5, "outside": "position"}}
    recipe = recipe_file(tmp_path, base, fts, said, config=TIED)
    for number in (0, 1):
        (tmp_path / f"ft{number}/config.json").write_text(json.dumps(TIED | {"tie_word_embeddings": False}))
    planned = merged_by_lines(recipe, tmp_path / "out", "--dry-run")
    assert coefficients_in(inspect("--config", recipe, "--tensors")) == coefficients_in(planned)


@pytest.mark.parametrize(
    "said",
    [
        {"lines": {"alpha": 0.1, "beta": 0.5, "filter": {"text.": 0.7}}},
        {"parameters": {"lambda": [{"filter": "text.", "value": 0.7}]}},
    ],
)
def test_filters_of_a_recipe_go_by_the_names_of_its_base(said: dict[str, Any], tmp_path: Path) -> None:
    """A merge is like its base: filters match the base's names, of which the fine-tunes lack a prefix."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    prefixed = {f"text.{name}": tensor for name, tensor in base.items()}
    recipe = recipe_file(tmp_path, prefixed, fts, {"merge_method": "task_arithmetic", **said})
    planned = coefficients_in(merged_by_lines(recipe, tmp_path / "out", "--dry-run"))
    told = coefficients_in(inspect("--config", recipe, "--tensors"))
    assert {f"text.{name.removeprefix('text.')}": c for name, c in told.items()} == planned


@pytest.mark.slow
def test_the_map_of_an_output_is_that_of_its_merge(tmp_path: Path) -> None:
    """An output tells each tensor's coefficient as the merge had it, unless options ask for others."""
    base = pair_of_stacks(3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said = {
        "merge_method": "ties",
        "parameters": {"density": 0.5, "lambda": [{"filter": "wi", "value": [0.5, 1.5]}, {"value": 2}]},
        "lines": {"beta": 0.5, "stacks": {"decoder": "keep"}, "filter": {"lm_head": "base"}},
    }
    recipe = recipe_file(tmp_path, base, fts, said)
    ran = merged_by_lines(recipe, tmp_path / "out")
    told = inspect(tmp_path / "out", "--tensors")
    spots, a = pair_spots(base), ran["alpha"]
    for name, c in coefficients_in(told).items():
        scale = ramp([0.5, 1.5], spots[name]) if "wi" in name else 2.0
        stacks = {"decoder.block": lambda _: 1.0}
        rule = coefficients(lambda x: a + 0.5 * x, a, stacks=stacks, filters={"lm_head": 0.0})
        assert c == pytest.approx(scale * rule(name, spots[name]), rel=1e-12), name
    assert told["scaling"]["of"] == "output"
    assert told["scaling"]["alpha"] == a
    assert coefficients_in(inspect("--config", recipe, "--tensors")) == coefficients_in(told)
    asked = inspect(tmp_path / "out", "--alpha", 0.5, "--tensors")
    assert asked["scaling"]["of"] == "asked"
    assert coefficients_in(asked)["shared.weight"] == 0.5
