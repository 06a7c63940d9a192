"""Stochastic rounding: held against exact fractions, against the theory of its mean and variance, and against itself on
other workers, chunks and shards.
"""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.engine.arithmetic import cast
from lines_cli.engine.rounding import cast_at_random
from lines_cli.engine.run import run
from lines_cli.errors import RecipeError
from lines_cli.methods.sparsify import RNG_BLOCK, Where, random_masks
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.resources import Resources
from lines_cli.recipe.validate import make_recipe
from support.bits import FORMATS, nearest, raw, wide
from support.files import write_checkpoint
from support.run import run_lines

HALVES = [torch.float16, torch.bfloat16]
CASTS = [
    *((torch.float32, dtype) for dtype in HALVES),
    *((torch.float64, dtype) for dtype in (*HALVES, torch.float32)),
]
HERE = Where("layers.0.w", 0)


def drawn(
    values: torch.Tensor, dtype: torch.dtype, *, seed: int = 0, where: Where = HERE, **settled: Any
) -> torch.Tensor:
    out = torch.empty(len(values), dtype=dtype)
    cast_at_random(values, out, seed=seed, where=where, **settled)
    return out


def neighbours(value: float, dtype: torch.dtype) -> tuple[Fraction, Fraction]:
    """The two numbers of `dtype` around a finite value, by exact arithmetic; twice the same if it is one."""
    bits, lowest, _ = FORMATS[dtype]
    if value == 0:
        return Fraction(0), Fraction(0)
    unit = Fraction(2) ** (max(math.frexp(value)[1] - 1, lowest) - bits + 1)
    steps = Fraction(value) / unit
    return math.floor(steps) * unit, math.ceil(steps) * unit


def up(value: float, dtype: torch.dtype) -> float:
    """With which probability a value is to become the upper one."""
    low, high = neighbours(value, dtype)
    return float((Fraction(value) - low) / (high - low)) if high > low else 0.0


@pytest.mark.parametrize(("source", "dtype"), CASTS)
def test_only_the_two_neighbours_are_drawn(source: torch.dtype, dtype: torch.dtype) -> None:
    """Over all exponents, subnormals included: one of the two numbers around a value; the value itself if that is one,
    with the sign of its zero.
    """
    limit = FORMATS[dtype][2]
    values = torch.cat([wide(1, source, limit, 3000), wide(2, dtype, limit, 1000).to(source)])
    found = drawn(values, dtype)
    assert not bool(found.isnan().any())
    for value, got in zip(values.tolist(), found.tolist(), strict=True):
        assert Fraction(got) in neighbours(value, dtype), value
    exact = values.to(dtype).to(source) == values
    assert raw(found[exact]) == raw(values[exact].to(dtype))
    assert bool((found.signbit() == values.signbit()).all())  # what is rounded to 0 keeps its sign, too


def telling(dtype: torch.dtype) -> list[float]:
    """Values around powers of two, below the largest finite number, among subnormals and near zero."""
    bits, lowest, highest = FORMATS[dtype]
    unit, tiny = 2.0 ** (1 - bits), 2.0 ** (lowest - bits + 1)
    largest = (2 - unit) * 2.0**highest
    found = [1 + unit / 3, 2 - unit / 2, 2 - unit / 64, 1 + unit * 0.9, 0.02, 3 * 2.0**lowest * (1 + unit / 5)]
    found += [largest * (1 - unit / 5), 2.0**lowest * (1 - unit / 3), tiny * 0.3, tiny * 2.75, tiny * 0.001]
    return [*found, *(-value for value in found)]


@pytest.mark.parametrize(("source", "dtype"), CASTS)
@pytest.mark.some(2)
def test_mean_and_variance_are_those_of_theory(source: torch.dtype, dtype: torch.dtype) -> None:
    """As many entries go up as a coin with that probability gives, and with its spread over tensors: the mean is the
    value, the variance p (1 - p) times the squared distance of the neighbours.
    """
    count, parts = 2**15, 16
    for value in torch.tensor(telling(dtype), dtype=torch.float64).to(source).tolist():
        low, high = neighbours(value, dtype)
        p = up(value, dtype)
        found = [drawn(torch.full((count,), value, dtype=source), dtype, where=Where(f"{i}", 0)) for i in range(parts)]
        went_up = [int((part.to(torch.float64) == float(high)).sum()) if high > low else 0 for part in found]
        total, deviation = count * parts, math.sqrt(count * parts * p * (1 - p))
        assert abs(sum(went_up) - total * p) <= 5 * deviation + 1e-9, (value, p)
        if p * (1 - p) * count > 50:
            spread = sum((ups - count * p) ** 2 for ups in went_up) / (count * p * (1 - p))
            assert 2 < spread < 45  # of a chi squared with 16 degrees of freedom, all but 1 in 10,000


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_a_probability_below_the_sixteenth_bit(dtype: torch.dtype) -> None:
    """Sixteen random bits decide nearly always; where they do not, more are drawn: nothing is cut off."""
    unit = 2.0 ** (1 - FORMATS[dtype][0])
    share = 0.5 * 2.0**-16  # which 16 bits would make 0
    values = torch.full((2**22,), 1 + unit * share, dtype=torch.float64)
    ups = int((drawn(values, dtype) > 1).sum())
    assert 8 < ups < 64  # 32 are expected
    values = torch.full((2**22,), unit * 2.0 ** FORMATS[torch.float16][1] * share, dtype=torch.float32)
    if dtype == torch.float16:  # in float32 it happens below the smallest normal number
        assert 8 < int((drawn(values, dtype) > 0).sum()) < 64


@pytest.mark.slow
def test_a_probability_of_the_sixteenth_bit_among_subnormals() -> None:
    """The largest number that can be drawn is enough, and without more bits."""
    tiny = 2.0**-24
    values = torch.full((2**22,), tiny * 2.0**-16)
    assert 30 < int((drawn(values, torch.float16) > 0).sum()) < 110  # 64 are expected
    values = torch.full((2**22,), tiny * (1 - 2.0**-16))
    assert 30 < int((drawn(values, torch.float16) == 0).sum()) < 110


@pytest.mark.parametrize(("source", "dtype"), CASTS)
def test_nothing_is_drawn_beyond_the_largest_number(source: torch.dtype, dtype: torch.dtype) -> None:
    """NaN and Inf stay, and beyond the largest finite number nearest decides: it, or Inf."""
    largest = torch.finfo(dtype).max
    step = largest - float(torch.nextafter(torch.tensor(largest, dtype=dtype), torch.tensor(0, dtype=dtype)))
    values = [largest, largest + step / 4, largest + step * 0.49, largest + step * 0.6, largest * 2, math.inf, math.nan]
    given = torch.tensor([*values, *(-value for value in values)], dtype=torch.float64).to(source).repeat(500)
    expected = torch.empty(len(given), dtype=dtype)
    cast(given, expected)
    found = drawn(given, dtype)
    assert bool((found.isnan() == expected.isnan()).all())
    zero = torch.zeros((), dtype=dtype)
    assert raw(torch.where(found.isnan(), zero, found)) == raw(torch.where(expected.isnan(), zero, expected))


@pytest.mark.parametrize(("source", "dtype"), CASTS)
def test_a_draw_depends_on_its_place_alone(source: torch.dtype, dtype: torch.dtype) -> None:
    """However a tensor is cut, each entry is rounded alike; another seed, another tensor, another block are others."""
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(2 * RNG_BLOCK + 100, generator=generator, dtype=torch.float64).mul_(1e-4).to(source)
    whole = drawn(values, dtype)
    for cuts in ([0, 1, 7, RNG_BLOCK - 3, RNG_BLOCK + 5, len(values)], [0, RNG_BLOCK, len(values)]):
        parts = [drawn(values[first:end], dtype, where=Where(HERE.tensor, first)) for first, end in pairwise(cuts)]
        assert raw(torch.cat(parts)) == raw(whole)
    assert raw(drawn(values, dtype, seed=1)) != raw(whole)
    assert raw(drawn(values, dtype, where=Where("another", 0))) != raw(whole)
    same = torch.full((2 * RNG_BLOCK,), 1 + 0.5 * 2.0 ** (1 - FORMATS[dtype][0]), dtype=source)
    blocks = drawn(same, dtype).view(2, RNG_BLOCK)
    assert raw(blocks[0]) != raw(blocks[1])


@pytest.mark.slow
@pytest.mark.parametrize("value", [1 + 2.0**-9 + 2.0**-24, 2.0**-134 + 2.0**-150])
def test_further_bits_depend_on_their_place_alone(value: float) -> None:
    """Where sixteen bits do not decide, one entry in 65,536: here some thirty, in normal numbers and in subnormals."""
    values = torch.full((2**21,), value, dtype=torch.float64)
    cuts = [0, 1001, 2**20 + 3, len(values)]
    parts = [drawn(values[at:end], torch.bfloat16, where=Where(HERE.tensor, at)) for at, end in pairwise(cuts)]
    assert raw(torch.cat(parts)) == raw(drawn(values, torch.bfloat16))


def test_what_dare_drops_and_what_rounds_up_are_independent() -> None:
    """With one seed, tensor and place: for each model as many of the kept entries go up as of the dropped ones."""
    count = 2 * RNG_BLOCK
    went_up = drawn(torch.full((count,), 1 + 2.0**-8), torch.bfloat16) > 1
    tensors = [torch.zeros(count)] * 3
    for mask in random_masks(tensors, density=[0.5] * 3, seed=0, where=HERE):
        assert mask is not None
        both = float((went_up & (mask == 1)).float().mean())
        assert abs(both - 0.25) < 5 * math.sqrt(0.25 * 0.75 / count)


def test_what_is_settled_goes_to_the_nearest() -> None:
    """Entries that the caller settles are rounded to nearest; the others as they would be anyway."""
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    values[7] = math.inf  # which settles itself, and leaves the others as they are
    settled = torch.arange(5000) % 3 == 0
    found, free = drawn(values, torch.bfloat16, settled=settled), drawn(values, torch.bfloat16)
    assert raw(found[settled]) == raw(values.to(torch.bfloat16)[settled])
    assert raw(found[~settled]) == raw(free[~settled])
    assert raw(free[settled]) != raw(found[settled])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_output_that_holds_every_value_draws_nothing(dtype: torch.dtype) -> None:
    """As of float32 arithmetic that is written as float32 or float64."""
    values = wide(1, torch.float32, 120)
    assert raw(drawn(values, dtype)) == raw(values.to(dtype))


# --- whole edits and merges ---


def light(seed: int, base: dict[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """A fine-tune of small updates, in which half of the entries stay."""
    generator = torch.Generator().manual_seed(seed)

    def tuned(tensor: torch.Tensor) -> torch.Tensor:
        wide_ = tensor.float()
        update = (
            torch.randn(tensor.shape, generator=generator)
            * 1e-4
            * (torch.rand(tensor.shape, generator=generator) < 0.5)
        )
        return (wide_ + update).to(dtype or tensor.dtype)

    return {name: tuned(tensor) for name, tensor in base.items()}


def pretrained(dtype: torch.dtype = torch.bfloat16, *, layers: int = 4, size: int = 3000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": 600, **{f"layers.{i}.w": size for i in range(layers)}, "norm.weight": 50}
    return {
        name: (torch.randn(numel, generator=generator) * 0.02).reshape(10, -1).to(dtype)
        for name, numel in shapes.items()
    }


def made(folder: Path, out: str, recipe: dict[str, Any], **resources: Any) -> dict[str, bytes]:
    """The bytes of every weight that a recipe makes."""
    checked = make_recipe(recipe, where="recipe")
    run(make_plan(checked, open_inputs(checked, quiet=True), folder / out), Resources(device="cpu", **resources))
    files = (folder / out).glob("*.safetensors") if (folder / out).is_dir() else [folder / out]
    return {name: raw(tensor) for file in files for name, tensor in load_file(file).items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two light fine-tunes."""
    folder = tmp_path_factory.mktemp("light")
    base = pretrained()
    write_checkpoint(folder / "base", base, config={"model_type": "tiny"})
    for seed, side in enumerate("ab", 1):
        write_checkpoint(folder / side, light(seed, base))
    return folder


def recipe_of(folder: Path, models: str = "a", **said: Any) -> dict[str, Any]:
    values = {"base_model": str(folder / "base"), "models": [{"model": str(folder / side)} for side in models]}
    return {"rounding": "stochastic", "lines": {"alpha": 0.1, "beta": 0.8}, **values, **said}


MERGES: dict[str, dict[str, Any]] = {
    "edit": {"like": "ft"},
    "task_arithmetic": {"models": "ab"},
    "dare_linear": {"models": "ab", "merge_method": "dare_linear", "parameters": {"density": 0.5}},
    "ties": {"models": "ab", "merge_method": "ties", "parameters": {"density": 0.4}},
    "linear": {"models": "ab", "merge_method": "linear", "parameters": {"weight": 1.0}},
    "iso_c": {"models": "ab", "merge_method": "iso_c"},
    "in float16": {"dtype": "float16"},
}


@pytest.mark.parametrize("case", MERGES)
@pytest.mark.slow
def test_the_same_bytes_however_it_is_computed(models: Path, tmp_path: Path, case: str) -> None:
    """Workers, chunks and shards change no bit; rounding to nearest gives others, and so does another seed."""
    said = dict(MERGES[case])
    recipe = recipe_of(models, said.pop("models", "a"), **said)
    plain = made(tmp_path, "plain", recipe)
    assert made(tmp_path, "one", recipe, workers=1, chunk=997) == plain
    assert made(tmp_path, "three", recipe, workers=3, chunk=64) == plain
    assert made(tmp_path, "sharded", recipe | {"max_shard_size": 7000}, workers=2) == plain
    assert made(tmp_path, "nearest", recipe | {"rounding": "nearest"}) != plain
    assert made(tmp_path, "seed", recipe | {"rounding_seed": 1}) != plain


def test_a_wider_output_is_the_same_drawn_or_not(models: Path, tmp_path: Path) -> None:
    """float64 holds whatever float32 arithmetic makes."""
    recipe = recipe_of(models, dtype="float64")
    drawn_ = made(tmp_path, "drawn.safetensors", recipe)
    assert drawn_ == made(tmp_path, "nearest.safetensors", recipe | {"rounding": "nearest"})


def test_copies_and_unchanged_entries_stay(models: Path, tmp_path: Path) -> None:
    """A coefficient of 0 or 1 is a copy, and an entry that the fine-tune did not change is the base's, bit for bit."""
    recipe = recipe_of(models, lines={"alpha": 0.0, "beta": 1.0})
    made(tmp_path, "out.safetensors", recipe)
    base, ft = load_file(models / "base" / "model.safetensors"), load_file(models / "a" / "model.safetensors")
    out = load_file(tmp_path / "out.safetensors")
    assert raw(out["layers.0.w"]) == raw(base["layers.0.w"])
    assert raw(out["layers.3.w"]) == raw(ft["layers.3.w"])
    for name in ("layers.1.w", "layers.2.w"):
        still = base[name].view(torch.int16) == ft[name].view(torch.int16)
        assert bool(still.any())
        assert bool((~still).any())
        assert raw(out[name][still]) == raw(base[name][still])


def test_what_both_sides_share_is_not_drawn_where_it_has_to_be_rounded(tmp_path: Path) -> None:
    """From float32 to bfloat16: an entry without an update is the base's, to nearest; the others are drawn, those of a
    coefficient of 1, too, and only what belongs to no update is cast.
    """
    base = pretrained(torch.float32)
    ft = light(1, base)
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "a", ft)
    recipe = recipe_of(tmp_path, dtype="bfloat16", lines={"alpha": 0.0, "beta": 1.0})
    made(tmp_path, "out.safetensors", recipe)
    out = load_file(tmp_path / "out.safetensors")
    assert raw(out["layers.0.w"]) == raw(base["layers.0.w"].to(torch.bfloat16))
    for name in ("layers.1.w", "layers.3.w"):
        still = base[name] == ft[name]
        assert raw(out[name][still]) == raw(base[name].to(torch.bfloat16)[still])
    last = out["layers.3.w"]
    assert raw(last) != raw(ft["layers.3.w"].to(torch.bfloat16))
    unit = (ft["layers.3.w"].abs() * 2.0**-7).clamp_min(2.0**-133)
    assert bool(((last.float() - ft["layers.3.w"]).abs() <= unit).all())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "slerp"])
def test_entries_that_all_models_share_stay_in_a_merge_of_weights(tmp_path: Path, method: str) -> None:
    """Weights that add up to one leave an entry that all models share a little beside itself in float32: it is not
    drawn, but stays.
    """
    first = pretrained()
    second = light(1, first)
    write_checkpoint(tmp_path / "a", first)
    write_checkpoint(tmp_path / "b", second)
    names = [{"model": str(tmp_path / side)} for side in "ab"]
    parameters = {"t": 0.3} if method == "slerp" else {}
    if method == "linear":
        names = [{**name, "parameters": {"weight": weight}} for name, weight in zip(names, (0.3, 0.7), strict=True)]
    recipe = {"merge_method": method, "models": names, "parameters": parameters, "rounding": "stochastic"}
    differing = 0
    for seed in range(20):
        made(tmp_path, f"{seed}.safetensors", recipe | {"rounding_seed": seed})
        out = load_file(tmp_path / f"{seed}.safetensors")
        for name, tensor in out.items():
            still = first[name] == second[name]
            differing += int((tensor[still] != first[name][still]).sum())
    assert differing == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
def test_updates_of_one_and_two_units_come_out_as_the_ramp(tmp_path: Path, dtype: torch.dtype) -> None:
    """A million entries, with updates of 0, 1 and 2 units in the last place: rounded to nearest the ramp is a step,
    drawn it is the ramp, within 0.01.
    """
    generator = torch.Generator().manual_seed(0)
    layers, size = 6, 2**20
    base = {f"layers.{i}.w": torch.empty(size).uniform_(1.0, 1.9, generator=generator).to(dtype) for i in range(layers)}
    unit = 2.0 ** (1 - FORMATS[dtype][0])
    ft = {
        name: (tensor.float() + unit * torch.randint(0, 3, (size,), generator=generator)).to(dtype)
        for name, tensor in base.items()
    }
    for side, tensors in (("base", base), ("a", ft)):
        write_checkpoint(tmp_path / f"{side}.safetensors", tensors)
    asked = [0.1, 0.28, 0.46, 0.64, 0.82, 1.0]
    realised = {}
    for rounding in ("nearest", "stochastic"):
        out = tmp_path / f"{rounding}.safetensors"
        summary = lines.edit(tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, rounding=rounding)
        edited = load_file(out)
        realised[rounding] = []
        for number, (name, layer) in enumerate(zip(base, summary["layers"], strict=True)):
            tau = ft[name].double() - base[name].double()
            change = edited[name].double() - base[name].double()
            realised[rounding].append(float((change * tau).sum() / (tau * tau).sum()))
            assert layer["realised"] == pytest.approx(realised[rounding][-1], rel=1e-12)
            assert (layer["stack"], layer["index"]) == ("layers", number)
    assert realised["stochastic"] == pytest.approx(asked, abs=0.01)
    # of 1 unit nothing is left below a half, of 2 units one from a quarter on: <out - base, tau> / <tau, tau> in fifths
    assert realised["nearest"] == pytest.approx([0.0, 0.4, 0.4, 0.6, 1.0, 1.0], abs=0.01)


@pytest.mark.slow
def test_a_recorded_recipe_makes_the_same_again(models: Path, tmp_path: Path) -> None:
    """lines_recipe.yaml says how was rounded, lines verify computes it again, and tensors in memory are the same."""
    out = tmp_path / "out"
    ran = run_lines(
        "edit", models / "base", models / "a", "-o", out, "--rounding", "stochastic", "--rounding-seed", 7, "--json"
    )
    assert ran.code == 0, ran.err
    record = yaml.safe_load((out / "lines_recipe.yaml").read_text())
    assert (record["rounding"], record["rounding_seed"]) == ("stochastic", 7)
    assert run_lines("merge", "--config", out / "lines_recipe.yaml", "-o", tmp_path / "again").code == 0
    first, again = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == again
    assert run_lines("verify", out).code == 0
    base, ft = (load_file(models / side / "model.safetensors") for side in ("base", "a"))
    in_memory = lines.edit_state_dict(base, ft, rounding="stochastic", rounding_seed=7)
    assert {name: raw(tensor) for name, tensor in in_memory.items()} == {
        name: raw(tensor) for name, tensor in load_file(out / "model.safetensors").items()
    }
    plain = run_lines("edit", models / "base", models / "a", "-o", tmp_path / "plain")
    assert plain.code == 0
    assert "rounding" not in yaml.safe_load((tmp_path / "plain" / "lines_recipe.yaml").read_text())


def test_a_stored_head_is_rounded_like_the_embedding_it_is_tied_to(tmp_path: Path) -> None:
    """Both are one weight, and stay one."""
    base = pretrained()
    base["lm_head.weight"] = base["embed_tokens.weight"].clone()
    ft = light(1, base)
    ft["lm_head.weight"] = ft["embed_tokens.weight"].clone()
    for side, tensors in (("base", base), ("a", ft)):
        write_checkpoint(tmp_path / side, tensors, config={"model_type": "llama", "tie_word_embeddings": True})
    lines.edit(tmp_path / "base", tmp_path / "a", tmp_path / "out", alpha=0.4, rounding="stochastic")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert raw(out["lm_head.weight"]) == raw(out["embed_tokens.weight"])
    assert raw(out["lm_head.weight"]) not in (raw(base["lm_head.weight"]), raw(ft["lm_head.weight"]))


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"rounding": "up"}, ("rounding", "nearest", "stochastic", "'up'")),
        ({"rounding_seed": 3}, ("rounding_seed", "nearest", "rounding: stochastic")),
        ({"rounding": "stochastic", "rounding_seed": -1}, ("rounding_seed", "-1")),
        ({"rounding": "stochastic", "rounding_seed": True}, ("rounding_seed", "number")),
        ({"roundng": "stochastic"}, ("roundng", "did you mean rounding")),
    ],
)
def test_what_is_said_of_rounding_is_checked(models: Path, said: dict[str, Any], words: tuple[str, ...]) -> None:
    """An impossible value is refused by name."""
    with pytest.raises(RecipeError) as refused:
        make_recipe(recipe_of(models) | {"rounding": "nearest"} | said, where="recipe")
    assert [word for word in words if word not in str(refused.value)] == []


def test_the_recipe_of_a_drawn_output_rounds_to_nearest_too(models: Path) -> None:
    """It records the seed 0, which does not stand in the way of `--set rounding=nearest`."""
    recipe = make_recipe(recipe_of(models) | {"rounding": "nearest", "rounding_seed": 0}, where="recipe")
    assert recipe == make_recipe(recipe_of(models) | {"rounding": "nearest"}, where="recipe")


def test_fractions_are_exact() -> None:
    """The reference itself: nearest is one of the neighbours."""
    for value in (0.02, 1e-40, 3.3, -7.77):
        assert Fraction(nearest(value, torch.bfloat16)) in neighbours(value, torch.bfloat16)
