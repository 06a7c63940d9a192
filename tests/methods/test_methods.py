"""Every method of `lines merge`, from file to file, bit for bit against `support/whole_model.py`; and what no byte
may depend on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from support import whole_model
from support.bits import raw, wide_model
from support.files import write_checkpoint
from support.method_cases import CASES, SCALING, TABLE, WHOLE_WEIGHTS, Case
from support.run import Ran, run_lines
from support.whole_model import Tensors, coefficient, norm1, plain_sum, task_vectors, trimmed


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors of a hundred entries are not worth dividing among cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LAYERS = 4
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "input_layernorm.weight": (8,),
            "mlp.up_proj.weight": (13, 8),
        }.items()
    },
    "model.norm.weight": (8,),
    "lm_head.weight": (11, 8),
}

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
DTYPES: dict[str, tuple[Sequence[torch.dtype], Sequence[torch.dtype]]] = {
    "bf16": ([BF16], [BF16]),
    "fp16": ([FP16], [FP16]),
    "fp32": ([FP32], [FP32]),
    "fp32 on bf16": ([BF16], [FP32]),
    "16 bits on fp32": ([FP32], [BF16, FP16, BF16]),
    "by turns": ([BF16, FP32, FP16, FP16, BF16], [FP16, FP16, BF16, FP32]),
    "some fp64": ([FP32, FP64, FP32, BF16, FP32], [FP32, FP32, BF16, FP32, FP64, FP16, FP32]),
}
"""Of the base's and of the models' tensors, by turns."""


def made(seed: int, dtypes: Sequence[torch.dtype], base: Tensors | None = None) -> Tensors:
    """A model, or with a base a fine-tune of it. Half of all values lie on a coarse grid, so that many sums are exactly
    zero and many magnitudes the same; zeros have both signs.
    """
    random = np.random.default_rng(seed)
    model = {}
    for number, (name, shape) in enumerate(SHAPES.items()):
        grid = random.integers(-8, 9, shape) / 16
        fine = random.normal(0, 0.3, shape)
        values = np.where(random.random(shape) < 0.5, grid, fine)
        values = np.where(random.random(shape) < 0.1, -0.0, values)
        if base is not None:
            shifted = base[name].double().numpy() + values / 4
            values = np.where(random.random(shape) < 0.1, base[name].double().numpy(), shifted)
        model[name] = torch.from_numpy(values).to(dtypes[(number + seed) % len(dtypes)])
    return model


def family(number: int, dtypes: str = "bf16", seed: int = 1) -> tuple[Tensors, list[Tensors]]:
    """A base and that many fine-tunes of it."""
    of_base, of_models = DTYPES[dtypes]
    base = made(seed, of_base)
    return base, [made(seed + 1 + model, of_models, base) for model in range(number)]


TASK_VECTOR_METHODS = {method for method, entry in TABLE.items() if not entry.on_weights}


def save(folder: Path, base: Tensors | None, models: Sequence[Tensors]) -> None:
    if base is not None:
        write_checkpoint(folder / "base.safetensors", base)
    for number, model in enumerate(models):
        write_checkpoint(folder / f"{number}.safetensors", model)


def merge(folder: Path, recipe: Mapping[str, Any], *arguments: object) -> Ran:
    """`lines merge` with a recipe beside the inputs, into `out`."""
    (folder / "merge.yaml").write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
    return run_lines("merge", "--config", folder / "merge.yaml", "-o", folder / "out", "--quiet", *arguments)


def written(ran: Ran, folder: Path) -> Tensors:
    assert ran.code == 0, ran.err + ran.trace
    return {name: tensor for file in (folder / "out").glob("*.safetensors") for name, tensor in load_file(file).items()}


def alpha_of(out: Path) -> float:
    """As the recipe in an output folder has it."""
    alpha: float = yaml.safe_load((out / "lines_recipe.yaml").read_text(encoding="utf-8"))["lines"]["alpha"]
    return alpha


def assert_same(got: Tensors, expected: Tensors, *, to_the_bit: bool = True) -> None:
    """Names, dtypes, shapes and bytes; or numbers that are next to each other."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (name, got[name].dtype, got[name].shape) == (name, tensor.dtype, tensor.shape)
        if not to_the_bit:
            eps = max(2 * torch.finfo(tensor.dtype).eps, 1e-9)  # the reference's own error, in float64
            torch.testing.assert_close(got[name], tensor, rtol=eps, atol=min(eps, 1e-6), msg=name)
            continue
        if raw(got[name]) != raw(tensor):
            at = (got[name].flatten().view(torch.uint8) != tensor.flatten().view(torch.uint8)).nonzero()
            entry = int(at[0]) // tensor.element_size()
            values = (float(got[name].flatten()[entry]), float(tensor.flatten()[entry]))
            raise AssertionError(f"{name}[{entry}] is {values[0]!r}, expected {values[1]!r}; {len(at)} bytes differ")


def merged_task_vector(case: Case, base: Tensors, models: Sequence[Tensors]) -> Tensors:
    """The reference's, which for methods on whole weights is what they give minus the base."""
    if case.method in TASK_VECTOR_METHODS:
        (pre,) = whole_model.in_compute_dtype(base, *models)[:1]
        return case.merged(task_vectors(base, models), pre)
    pre, *weights = whole_model.in_compute_dtype(base, *models)
    return {name: tensor - pre[name] for name, tensor in case.merged(weights).items()}


def with_lines(
    base: Tensors, merged: Tensors, alpha: float, beta: float, gamma: float = 1, scale: float = 1
) -> Tensors:
    return whole_model.added_to_base(
        base, merged, lambda name: coefficient(name, alpha, beta, gamma, scale, layers=LAYERS)
    )


def measured_alpha(case: Case, base: Tensors, models: Sequence[Tensors], merged: Tensors) -> float:
    """`(1/N) * norm1(sum of tau_i) / norm1(tau_merged)`; the sum is of trimmed task vectors for task arithmetic
    alone.
    """
    taus = task_vectors(base, models)
    if case.method == "task_arithmetic":
        share = [case.each.get("density", [case.top.get("density", 1.0)] * 8)[n] for n in range(len(taus))]
        taus = trimmed(taus, share, case.top.get("trim", "global"))
    return 1 / len(taus) * norm1(plain_sum(taus)) / norm1(merged)


def assert_as_measured(
    case: Case, base: Tensors, models: Sequence[Tensors], got: Tensors, out: Path, extra: Tensors | None = None
) -> None:
    """The alpha that the recipe in `out` holds is the reference's, and with it `got` is, too: beta 0.5, gamma 1.1."""
    merged = merged_task_vector(case, base, models)
    assert alpha_of(out) == pytest.approx(
        measured_alpha(case, base, models, merged), rel=1e-12 if case.to_the_bit else 1e-7
    )
    expected = with_lines(base, merged, alpha_of(out), 0.5, 1.1) | (extra or {})
    assert_same(got, expected, to_the_bit=case.to_the_bit)


AUTO = {"beta": 0.5, "gamma": 1.1}


# --- every method against the whole-model reference ---


def by_turns(cases: Mapping[str, Case], numbers: Sequence[int], *marks: pytest.MarkDecorator) -> list[Any]:
    """Every case with some combinations of dtypes, the next case with the next three. (What slerp makes of float64
    depends on how an angle is summed; it has a test of its own.)
    """
    found = []
    for number, (name, case) in enumerate(cases.items()):
        choices = [dtypes for dtypes in DTYPES if case.method != "slerp" or dtypes != "some fp64"]
        chosen = [choices[(3 * number + n) % len(choices)] for n in numbers]
        found += [pytest.param(name, dtypes, id=f"{name}-{dtypes}", marks=marks) for dtypes in chosen]
    return found


@pytest.mark.parametrize(("case", "dtypes"), [*by_turns(CASES, [0]), *by_turns(CASES, [1], pytest.mark.slow)])
@pytest.mark.some(15)
def test_every_method_in_every_dtype(case: str, dtypes: str, tmp_path: Path) -> None:
    """Three models (as many as the method takes) are merged and scaled over depth as on whole models, bit for bit."""
    chosen = CASES[case]
    number = 3 if 3 in chosen.numbers else chosen.numbers[0]
    base, models = family(number, dtypes)
    save(tmp_path, base, models)
    scale = {} if chosen.method not in TASK_VECTOR_METHODS else {"scale": 1.3}
    recipe = chosen.recipe(number, base_model="base.safetensors", lines=SCALING, **scale)
    expected = with_lines(base, merged_task_vector(chosen, base, models), **SCALING, **scale)
    assert_same(written(merge(tmp_path, recipe), tmp_path), expected, to_the_bit=chosen.to_the_bit)


def all_said(method: str) -> str:
    """Of a method's cases the one that says most of its models."""
    return max(TABLE[method].cases, key=lambda name: (len(CASES[name].each), len(CASES[name].top)))


MOST_SAID = {all_said(method) for method in TABLE}


def few(name: str, at: int, number: int) -> bool:
    """Whether the default suite merges so many models: two and three where all is said, one or two in other cases."""
    if name in MOST_SAID:
        return number in (2, 3) or len(CASES[name].numbers) == 1
    return number <= 2 and at % 4 < 2


@pytest.mark.parametrize(
    ("case", "number"),
    [
        pytest.param(name, n, marks=() if few(name, at, n) else pytest.mark.slow)
        for at, (name, case) in enumerate(CASES.items())
        for n in (case.numbers if name in MOST_SAID else case.numbers[at % 2 :: 2] or case.numbers)
    ],
)
@pytest.mark.some(7)
def test_alpha_auto_with_any_number_of_models(case: str, number: int, tmp_path: Path) -> None:
    """alpha: auto is the ratio of L1 norms over the whole model, and the result is what that alpha gives."""
    chosen = CASES[case]
    base, models = family(number, "by turns" if number < 8 else "bf16", seed=number)
    save(tmp_path, base, models)
    recipe = chosen.recipe(number, base_model="base.safetensors", lines=AUTO)
    ran = merge(tmp_path, recipe)
    if norm1(merged_task_vector(chosen, base, models)) == 0:
        assert ran.code == 4
        assert "alpha: auto cannot be measured" in ran.err
        return
    assert_as_measured(chosen, base, models, written(ran, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("case", ["average", "weighted sum", "ties", "consensus", "dare", "dare_ties"])
def test_without_lines_the_coefficient_is_lambda(case: str, tmp_path: Path) -> None:
    """Without `lines:` the merged task vector is scaled by `lambda` alone, everywhere."""
    base, models = family(2, "by turns")
    save(tmp_path, base, models)
    got = written(merge(tmp_path, CASES[case].recipe(2, base_model="base.safetensors", scale=0.7)), tmp_path)
    merged = merged_task_vector(CASES[case], base, models)
    assert_same(got, whole_model.added_to_base(base, merged, lambda _: 0.7))


@pytest.mark.parametrize(("case", "dtypes"), by_turns(WHOLE_WEIGHTS, [0, 1]))
@pytest.mark.some(6)
def test_methods_on_whole_weights_without_a_base(case: str, dtypes: str, tmp_path: Path) -> None:
    """Without a base, linear, slerp and passthrough give their sum as it is, in the first model's dtypes."""
    chosen = WHOLE_WEIGHTS[case]
    number = chosen.numbers[-1]
    base, models = family(number, dtypes)
    models[0] = base  # so that the first has other dtypes than the rest
    save(tmp_path, None, models)
    merged = chosen.merged(whole_model.in_compute_dtype(*models))
    expected = {name: whole_model.rounded(tensor, base[name].dtype) for name, tensor in merged.items()}
    got = written(merge(tmp_path, chosen.recipe(number)), tmp_path)
    assert_same(got, expected, to_the_bit=chosen.to_the_bit)


# --- single rules, with numbers written by hand ---


def by_hand(
    folder: Path, base: Mapping[str, list[float]], taus: Sequence[Mapping[str, list[float]]], **recipe: Any
) -> dict[str, list[float]]:
    """Merge task vectors that are given as lists; the merged task vector, as lists."""
    pre = {name: torch.tensor(values) for name, values in base.items()}
    save(folder, pre, [{name: pre[name] + torch.tensor(tau[name]) for name in pre} for tau in taus])
    models = [{"model": f"{number}.safetensors"} for number in range(len(taus))]
    ran = merge(folder, {"base_model": "base.safetensors", "models": models, **recipe})
    return {name: (tensor - pre[name]).tolist() for name, tensor in written(ran, folder).items()}


ZERO_SUMS = {"a": [1.0, -2.0, 0.0, 4.0], "b": [0.5, 0.25]}, {"a": [-1.0, 2.0, 0.0, 1.0], "b": [-0.5, 0.25]}
"""Entries 0 and 1 of a and 0 of b sum to zero and wait for the majority; two other sums are positive."""
BASE = {"a": [0.0] * 4, "b": [0.0] * 2}


@pytest.mark.parametrize(
    ("agreement", "trim", "signs", "expected"),
    [
        ("mean", "global", (1, 1), {"a": [1, 2, 0, 2.5], "b": [0.5, 0.25]}),
        ("mean", "global", (-1, -1), {"a": [-1, -2, 0, -2.5], "b": [-0.5, -0.25]}),
        ("mean", "global", (1, -1), {"a": [-1, -2, 0, 2.5], "b": [-0.5, -0.25]}),
        ("mean", "tensor", (-1, -1), {"a": [1, 2, 0, -2.5], "b": [0.5, -0.25]}),
        ("mean", "tensor", (1, -1), {"a": [1, 2, 0, 2.5], "b": [0.5, -0.25]}),
        ("sum", "global", (1, 1), {"a": [1, 2, 0, 5], "b": [0.5, 0.5]}),
        ("sum", "global", (1, -1), {"a": [-1, -2, 0, 5], "b": [-0.5, -0.5]}),
        ("max", "global", (1, 1), {"a": [1, 2, 0, 4], "b": [0.5, 0.25]}),
        ("max", "global", (-1, -1), {"a": [-1, -2, 0, -4], "b": [-0.5, -0.25]}),
        ("max", "global", (1, -1), {"a": [-1, -2, 0, 4], "b": [-0.5, -0.25]}),
        ("max", "tensor", (-1, -1), {"a": [1, 2, 0, -4], "b": [0.5, -0.25]}),
    ],
)
def test_zero_sums_take_the_sign_of_the_majority(
    agreement: str, trim: str, signs: tuple[int, int], expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """A zero sum has the sign of most sums of the whole model, minus where they balance; plus with trim: tensor."""
    taus = [
        {name: [sign * entry for entry in tau[name]] for name, sign in zip("ab", signs, strict=True)}
        for tau in ZERO_SUMS
    ]
    parameters = {"agreement": agreement, "trim": trim}
    assert by_hand(tmp_path, BASE, taus, merge_method="ties", parameters=parameters) == expected


def test_the_majority_is_of_signs_and_not_of_sizes(tmp_path: Path) -> None:
    """One large positive sum against two small negative ones leaves the majority negative."""
    taus = [{"a": [1.0, 100.0, -0.5, -0.5]}, {"a": [-1.0, 0.0, 0.0, 0.0]}]
    got = by_hand(tmp_path, {"a": [0.0] * 4}, taus, merge_method="ties")
    assert got == {"a": [-1, 100, -0.5, -0.5]}


def test_the_majority_is_counted_after_the_trim(tmp_path: Path) -> None:
    """Entries that are trimmed away have no say in the majority."""
    taus = [{"a": [4.0, 8.0, -1.0, -1.0, -1.0]}, {"a": [-4.0, 2.0, -0.5, -0.5, -0.5]}]
    got = by_hand(tmp_path, {"a": [0.0] * 5}, taus, merge_method="ties", parameters={"density": 0.4})
    assert got == {"a": [4, 5, 0, 0, 0]}


def test_the_majority_is_of_weighted_sums(tmp_path: Path) -> None:
    """Weights can turn sums around, and create zero sums."""
    taus = [{"a": [1.0, 3.0, 3.0, 3.0]}, {"a": [-0.5, -2.0, -2.0, -2.0]}]
    models = [{"model": f"{n}.safetensors", "parameters": {"weight": weight}} for n, weight in enumerate([1.0, 2.0])]
    got = by_hand(tmp_path, {"a": [0.0] * 4}, taus, merge_method="ties", models=models)
    assert got == {"a": [-0.5, -2, -2, -2]}


def test_layers_that_are_not_scaled_count_for_the_majority(tmp_path: Path) -> None:
    """The whole vector decides, also the part of it that a filter leaves at the base."""
    taus = [{"a": [1.0, 0.5], "b": [-1.0, -1.0]}, {"a": [-1.0, 0.0], "b": [-1.0, -1.0]}]
    scaling = {"alpha": 1, "beta": 0, "filter": {"b": "base"}}
    got = by_hand(tmp_path, {"a": [0.0] * 2, "b": [0.0] * 2}, taus, merge_method="ties", lines=scaling)
    assert got == {"a": [-1, 0.5], "b": [0, 0]}


@pytest.mark.parametrize("signs", [(1, 1), (-1, -1), (1, -1)])
def test_alpha_is_measured_with_the_majority(signs: tuple[int, int], tmp_path: Path) -> None:
    """The norm of the merged task vector is that of what zero sums come to; minus, where signs balance."""
    waiting = -1.0 if signs == (1, 1) else 1.0  # weighted, 2 against -2 or the other way round
    taus = [
        {"a": [2 * waiting, 3.0 * signs[0], 3.0 * signs[1]]},
        {"a": [-waiting, 1.0 * signs[0], 1.0 * signs[1]]},
    ]
    models = [{"model": f"{n}.safetensors", "parameters": {"weight": weight}} for n, weight in enumerate([1.0, 2.0])]
    recipe = {"merge_method": "ties", "models": models, "lines": {"beta": 0}}
    by_hand(tmp_path, {"a": [0.0] * 3}, taus, **recipe)
    assert alpha_of(tmp_path / "out") == pytest.approx(0.5 * (1 + 4 + 4) / (1 + 5 / 3 + 5 / 3), rel=1e-6)


def test_in_dare_ties_a_zero_sum_is_plus(tmp_path: Path) -> None:
    """DARE counts no majority."""
    taus = [{"a": [1.0, -3.0, -3.0]}, {"a": [-1.0, -1.0, -1.0]}]
    assert by_hand(tmp_path, {"a": [0.0] * 3}, taus, merge_method="dare_ties") == {"a": [1, -4, -4]}


def test_weights_that_cancel_are_not_divided_by(tmp_path: Path) -> None:
    """Where the weights of the models that agree add up to 0, TIES' mean is their sum."""
    taus = [{"a": [2.0, 2.0]}, {"a": [-1.0, 1.0]}]
    models = [{"model": f"{n}.safetensors", "parameters": {"weight": weight}} for n, weight in enumerate([1.0, -1.0])]
    assert by_hand(tmp_path, {"a": [0.0] * 2}, taus, merge_method="ties", models=models) == {"a": [3, 2]}


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
@pytest.mark.parametrize(
    ("density", "trim", "expected"),
    [
        (0.5, "global", {"a": [3, -3, 3, 0], "b": [0, 0, -3, 0]}),  # k is 4, and four share the fourth place
        (0.25, "global", {"a": [3, -3, 3, 0], "b": [0, 0, -3, 0]}),  # k is 2, and all four are as large
        (0.125, "global", {"a": [3, -3, 3, 0], "b": [0, 0, -3, 0]}),
        (0, "global", {"a": [3, -3, 3, 0], "b": [0, 0, -3, 0]}),  # at least one is kept
        (0.74, "global", {"a": [3, -3, 3, 0], "b": [2, 0, -3, 0]}),  # k is 5
        (0.75, "global", {"a": [3, -3, 3, 1], "b": [2, -1, -3, 0]}),  # k is 6, and two share the sixth place
        (0.875, "global", {"a": [3, -3, 3, 1], "b": [2, -1, -3, 0]}),
        (0.25, "tensor", {"a": [3, -3, 3, 0], "b": [0, 0, -3, 0]}),
        (0.5, "tensor", {"a": [3, -3, 3, 0], "b": [2, 0, -3, 0]}),
        (0.75, "tensor", {"a": [3, -3, 3, 0], "b": [2, -1, -3, 0]}),
        (1, "tensor", {"a": [3, -3, 3, 1], "b": [2, -1, -3, 0]}),
    ],
)
def test_all_ties_at_the_threshold_are_kept(
    method: str, density: float, trim: str, expected: dict[str, list[float]], tmp_path: Path
) -> None:
    """What is at least as large as the k-th largest is kept, with k = max(1, int(density * n))."""
    tau = {"a": [3.0, -3.0, 3.0, 1.0], "b": [2.0, -1.0, -3.0, 0.0]}
    base = {"a": [0.0] * 4, "b": [0.0] * 4}
    parameters = {"density": density, "trim": trim}
    assert by_hand(tmp_path, base, [tau], merge_method=method, parameters=parameters) == expected


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize(("density", "k"), [(0.29, 28), (0.2, 20), (0.57, 56), (0.009, 1), (0.01, 1), (0.999, 99)])
def test_how_many_a_density_keeps(density: float, k: int, trim: str, tmp_path: Path) -> None:
    """Of 100 different magnitudes int(density * 100) are kept, as Python multiplies; 0.29 * 100 is below 29."""
    tau = {"a": [float(n * (-1) ** n) for n in range(1, 101)]}
    parameters = {"density": density, "trim": trim}
    got = by_hand(tmp_path, {"a": [0.0] * 100}, [tau], merge_method="ties", parameters=parameters)
    assert got == {"a": [0] * (100 - k) + tau["a"][100 - k :]}


@pytest.mark.slow
def test_a_threshold_of_neighbouring_numbers(tmp_path: Path) -> None:
    """Magnitudes that differ in the last bit are told apart, the smallest and the largest of float32 too."""
    tops = np.array([3e38, 1.0, 2.0**-126, 1e-45], dtype=np.float32)
    for number, top in enumerate(tops):
        below = [top]
        for _ in range(4):
            below.append(np.nextafter(below[-1], np.float32(0), dtype=np.float32))
        folder = tmp_path / str(number)
        folder.mkdir()
        tau = {"a": [float(value) for value in below]}
        got = by_hand(folder, {"a": [0.0] * 5}, [tau], merge_method="ties", parameters={"density": 0.4})
        distinct = [value for value in tau["a"] if value >= tau["a"][1]]
        assert got == {"a": distinct + [0.0] * (5 - len(distinct))}


@pytest.mark.parametrize(
    ("k", "mask_lambda", "expected"),
    [
        (2, 0.4, [3, 0, 0, 2]),
        (2, [0.4, 0.4], [3, 0, 0, 2]),
        (0, 0.4, [3, 2, 0, 2]),
        (1, 0.4, [3, 2, 0, 2]),
        (3, 0.4, [0, 0, 0, 0]),
        (2, [0.4, 0], [3, 2, 0, 2]),
        (2, [0, 0.4], [3, 0, 0, 2]),
        (2, [0.9, 0.5], [0, 0, 0, 2]),  # entry 0 of the second is 1, exactly half of what the other has
        (2, 1, [0, 0, 0, 0]),
    ],
)
def test_consensus_keeps_what_enough_masks_select(
    k: int, mask_lambda: float | list[float], expected: list[float], tmp_path: Path
) -> None:
    """An entry of the sum is kept where |tau_i| > |sum - tau_i| * mask_lambda_i for at least k models."""
    taus = [{"a": [2.0, 3.0, 0.0, 1.0]}, {"a": [1.0, -1.0, 0.0, 1.0]}]
    each = mask_lambda if isinstance(mask_lambda, list) else [mask_lambda] * 2
    models = [{"model": f"{n}.safetensors", "parameters": {"mask_lambda": scale}} for n, scale in enumerate(each)]
    recipe = {"merge_method": "consensus", "models": models, "parameters": {"k": k}}
    assert by_hand(tmp_path, {"a": [0.0] * 4}, taus, **recipe) == {"a": expected}


# --- what is scaled, and by how much ---


@pytest.mark.parametrize("case", ["sum", "ties by tensor", "linear, no normalize"])
def test_where_the_coefficient_is_0_there_is_the_base(case: str, tmp_path: Path) -> None:
    """A coefficient of 0, from a filter or from alpha and beta, gives the base's bytes, negative zeros included."""
    base, models = family(3, "fp32 on bf16")
    save(tmp_path, base, models)
    recipe = CASES[case].recipe(3, base_model="base.safetensors")
    scaling = {**SCALING, "filter": {"mlp": "base", "norm": 0}}
    got = written(merge(tmp_path, {**recipe, "lines": scaling}), tmp_path)
    expected = with_lines(base, merged_task_vector(CASES[case], base, models), **SCALING)
    kept = {name for name in base if "mlp" in name or "norm" in name}
    assert 0 < len(kept) < len(base)
    assert_same(got, {name: base[name] if name in kept else expected[name] for name in base})
    got = written(merge(tmp_path, {**recipe, "lines": {"alpha": 0, "beta": 0}}, "--force"), tmp_path)
    assert_same(got, base)


def test_a_lambda_of_0_gives_the_base(tmp_path: Path) -> None:
    """lambda: 0 leaves nothing of the merged task vector."""
    base, models = family(2)
    save(tmp_path, base, models)
    assert_same(
        written(merge(tmp_path, CASES["ties"].recipe(2, base_model="base.safetensors", scale=0)), tmp_path), base
    )


@pytest.mark.parametrize("scaling", [None, {"alpha": 1, "beta": 0}, {"alpha": 0.5, "beta": 0, "gamma": 2}])
@pytest.mark.parametrize(
    "method", ["average", "task_arithmetic", "ties", "dare_linear", "dare_ties", "linear", "passthrough"]
)
def test_one_model_comes_back_byte_for_byte(method: str, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """One model with weight 1, nothing dropped and coefficient 1 is its own bytes, which the formula would lose."""
    base, (model,) = wide_model(1, FP32, BF16, FP16), [wide_model(2, FP32, BF16, FP16)]
    save(tmp_path, base, [model])
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": "0.safetensors"}]}
    if scaling or method in TASK_VECTOR_METHODS:
        recipe["base_model"] = "base.safetensors"
    if scaling:
        recipe["lines"] = scaling
    assert_same(written(merge(tmp_path, recipe), tmp_path), model)


@pytest.mark.parametrize("case", ["linear", "linear, no normalize", "slerp", "passthrough"])
def test_whole_weights_with_coefficient_1_need_no_detour_by_the_base(case: str, tmp_path: Path) -> None:
    """With a base and coefficient 1 a method on whole weights gives what it gives without a base."""
    number = CASES[case].numbers[-1]
    base, models = family(number, "fp32")
    save(tmp_path, base, models)
    without = written(merge(tmp_path, CASES[case].recipe(number)), tmp_path)
    scaling = {"base_model": "base.safetensors", "lines": {"alpha": 1, "beta": 0}}
    assert_same(written(merge(tmp_path, CASES[case].recipe(number, **scaling), "--force"), tmp_path), without)


@pytest.mark.parametrize("case", ["weighted sum", "ties", "consensus"])
def test_lambda_multiplies_and_may_be_a_gradient(case: str, tmp_path: Path) -> None:
    """A lambda that varies over depth multiplies LiNeS's coefficient of each layer; outside it has its first value."""
    base, models = family(3)
    save(tmp_path, base, models)
    values = [0.5, 1.0, 2.5]
    recipe = CASES[case].recipe(3, base_model="base.safetensors", lines=SCALING, scale=values)

    def scale(name: str) -> float:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        return float(np.interp(2 * layer / (LAYERS - 1), [0, 1, 2], values))

    expected = whole_model.added_to_base(
        base,
        merged_task_vector(CASES[case], base, models),
        lambda name: coefficient(name, **SCALING, scale=scale(name), layers=LAYERS),
    )
    assert_same(written(merge(tmp_path, recipe), tmp_path), expected)


def test_lambda_may_differ_by_name(tmp_path: Path) -> None:
    """The first filter that is part of a tensor's name gives its lambda."""
    base, models = family(2)
    save(tmp_path, base, models)
    values = [{"filter": "mlp", "value": 0.25}, {"filter": "layers", "value": -0.5}, {"value": 3}]
    got = written(merge(tmp_path, CASES["ties"].recipe(2, base_model="base.safetensors", scale=values)), tmp_path)
    merged = merged_task_vector(CASES["ties"], base, models)
    scale = lambda name: 0.25 if "mlp" in name else -0.5 if "layers" in name else 3
    assert_same(got, whole_model.added_to_base(base, merged, scale))


def test_a_weight_may_be_a_gradient(tmp_path: Path) -> None:
    """Each tensor is merged with the weights of its depth, and alpha: auto is measured with them."""
    base, models = family(2, "fp32")
    save(tmp_path, base, models)
    of_model = [[0.0, 1.0], [2.0, 0.5]]
    recipe = Case("task_arithmetic", each={"weight": of_model}).recipe(2, base_model="base.safetensors")
    got = written(merge(tmp_path, {**recipe, "lines": {"beta": 0.5}}), tmp_path)
    taus = task_vectors(base, models)
    merged = {}
    for name in base:
        layer = int(name.split(".")[2]) if "layers" in name else 0
        weight = [np.interp(layer / (LAYERS - 1), [0, 1], ends) for ends in of_model]
        merged |= whole_model.task_arithmetic([{name: tau[name]} for tau in taus], weight=weight, density=[1, 1])
    assert alpha_of(tmp_path / "out") == pytest.approx(norm1(plain_sum(taus)) / 2 / norm1(merged), rel=1e-12)
    assert_same(got, with_lines(base, merged, alpha_of(tmp_path / "out"), 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 8])
def test_alpha_of_a_plain_sum_is_one_over_n(number: int, tmp_path: Path) -> None:
    """With weights of 1 both norms are the same, so that alpha is 1/N to the last bit, trimmed or not."""
    save(tmp_path, *family(number))
    for case in ("sum", "sum of the largest"):
        recipe = CASES[case].recipe(number, base_model="base.safetensors", lines=AUTO)
        written(merge(tmp_path, recipe, "--force"), tmp_path)
        assert alpha_of(tmp_path / "out") == 1 / number


@pytest.mark.slow
@pytest.mark.parametrize("case", ["weighted sum", "ties", "dare, l1", "consensus on ties"])
def test_alpha_is_measured_before_lambda_gamma_and_filters(case: str, tmp_path: Path) -> None:
    """Neither lambda nor gamma, nor what filters and stacks do with the result, changes the measured alpha."""
    save(tmp_path, *family(3))
    plain = CASES[case].recipe(3, base_model="base.safetensors", lines=AUTO)
    written(merge(tmp_path, plain), tmp_path)
    alpha = alpha_of(tmp_path / "out")
    scaling = {"beta": 0.1, "gamma": 3, "filter": {"mlp": "base", "embed": 0.5}, "outside": "keep"}
    more = CASES[case].recipe(3, base_model="base.safetensors", lines=scaling, scale=[0.1, 7])
    written(merge(tmp_path, more, "--force"), tmp_path)
    assert alpha_of(tmp_path / "out") == alpha


# --- DARE's draws, and slerp's rounding ---


def draws(
    folder: Path, names: Sequence[str], size: int, number: int, **parameters: Any
) -> list[dict[str, torch.Tensor]]:
    """Which entries each model keeps: model i's task vector is all 4**i, so that the sum tells who is in it."""
    base = {name: torch.zeros(size) for name in names}
    save(folder, base, [{name: torch.full((size,), 4.0**n) for name in names} for n in range(number)])
    recipe = Case("dare_linear", {"rescale": False, **parameters}).recipe(number, base_model="base.safetensors")
    got = written(merge(folder, recipe, "--force"), folder)
    return [{name: got[name].long() >> (2 * n) & 1 for name in names} for n in range(number)]


@pytest.mark.slow
def test_draws_differ_by_model_tensor_block_and_seed(tmp_path: Path) -> None:
    """The share that is kept is the density, and two draws agree as often as independent ones do."""
    size, density = 4 * whole_model.BLOCK, 0.3
    one = draws(tmp_path, ["a", "b"], size, 2, density=density)
    two = draws(tmp_path, ["a", "b"], size, 2, density=density, seed=1)
    masks = [model[name].float() for seed in (one, two) for model in seed for name in ("a", "b")]
    spread = (density * (1 - density) / size) ** 0.5
    assert all(abs(float(mask.mean()) - density) < 5 * spread for mask in masks)
    halves = [part for mask in masks for part in mask.split(whole_model.BLOCK)]
    together = torch.corrcoef(torch.stack(halves)) - torch.eye(len(halves))
    assert float(together.abs().max()) < 6 / whole_model.BLOCK**0.5


@pytest.mark.parametrize("density", [1e-7, 1e-5, 0.5 + 2**-17, 1 - 2**-17, 0.99999, 1 - 1e-7])
@pytest.mark.slow
def test_a_density_between_two_steps(density: float, tmp_path: Path) -> None:
    """Densities that 16 bits cannot say, to the last below 1, are kept on average."""
    size = 64 * whole_model.BLOCK
    (mask,) = (model["a"].double() for model in draws(tmp_path, ["a"], size, 1, density=density))
    spread = (density * (1 - density) / size) ** 0.5 + 2**-17 / 64**0.5  # of entries, and of blocks' steps
    assert abs(float(mask.mean()) - density) < 5 * spread


def test_draws_do_not_depend_on_the_other_models(tmp_path: Path) -> None:
    """A model's draws stay as they are when another one follows it, and when the base is listed among the models."""
    one = draws(tmp_path, ["a"], 1000, 1, density=0.4)
    two = draws(tmp_path, ["a"], 1000, 2, density=0.4)
    assert raw(one[0]["a"]) == raw(two[0]["a"])
    without = (tmp_path / "out" / "model.safetensors").read_bytes()
    recipe = Case("dare_linear", {"rescale": False, "density": 0.4}).recipe(2, base_model="base.safetensors")
    recipe["models"].insert(0, {"model": "base.safetensors"})
    written(merge(tmp_path, recipe, "--force"), tmp_path)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == without


@pytest.mark.parametrize("t", [0, 0.25, 1])
@pytest.mark.parametrize("dtypes", ["fp32", "some fp64", "bf16"])
def test_slerp_is_the_arc_in_float64_but_for_four_roundings(dtypes: str, t: float, tmp_path: Path) -> None:
    """Both shares, both products and the sum are rounded to the compute dtype, and the result to the output's."""
    _, models = family(2, dtypes)
    save(tmp_path, None, models)
    got = written(merge(tmp_path, Case("slerp", {"t": t}).recipe(2)), tmp_path)
    for name, tensor in got.items():
        first, second = (model[name].double() for model in models)
        shares = whole_model.slerp_shares(t, first, second)
        parts = shares[0] * first, shares[1] * second
        compute = FP64 if FP64 in (models[0][name].dtype, models[1][name].dtype) else FP32
        slack = 2 * torch.finfo(compute).eps * (parts[0].abs() + parts[1].abs())
        slack = slack + torch.finfo(tensor.dtype).eps / 2 * (parts[0] + parts[1]).abs() * (1 + 2**-7) + 1e-300
        assert bool(((tensor.double() - parts[0] - parts[1]).abs() <= slack).all()), name


def test_slerp_of_opposite_parallel_and_empty_directions(tmp_path: Path) -> None:
    """Where two tensors are nearly parallel or opposite the line is taken; a tensor of zeros is at a right angle, as in
    mergekit.
    """
    v = torch.tensor([3.0, -4.0])
    first = {
        "same": v,
        "opposite": v.clone(),
        "zero": torch.zeros(2),
        "right": torch.tensor([1.0, 0.0]),
        "zeros": 0 * v,
    }
    second = {"same": 2 * v, "opposite": -v, "zero": v.clone(), "right": torch.tensor([0.0, 1.0]), "zeros": 0 * v}
    save(tmp_path, None, [first, second])
    got = written(merge(tmp_path, Case("slerp", {"t": 0.25}).recipe(2)), tmp_path)
    c, s = np.cos(np.pi / 8), np.sin(np.pi / 8)
    expected = {"same": 1.25 * v, "opposite": 0.5 * v, "zero": s * v, "right": torch.tensor([c, s]), "zeros": 0 * v}
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor.float(), rtol=1e-6, atol=0, msg=name)


@pytest.mark.slow
def test_the_base_of_slerp_comes_first(tmp_path: Path) -> None:
    """As in mergekit t runs from the base, whichever of the two models it is, listed or not."""
    _, models = family(2)
    save(tmp_path, None, models)
    first = written(merge(tmp_path, Case("slerp", {"t": 0.2}).recipe(2)), tmp_path)
    turned = {**Case("slerp", {"t": 0.2}).recipe(2), "base_model": "0.safetensors"}
    turned["models"].reverse()
    assert_same(written(merge(tmp_path, turned, "--force"), tmp_path), first)
    alone = {**turned, "models": [{"model": "1.safetensors"}]}
    assert_same(written(merge(tmp_path, alone, "--force"), tmp_path), first)


# --- what is no part of the task vectors ---


@pytest.mark.slow
def test_integers_empty_tensors_and_single_numbers(tmp_path: Path) -> None:
    """Integers are the base's and count for nothing; a tensor may have one entry and no axis, or no entry."""
    base, models = family(3, "by turns")
    base |= {"model.a": torch.tensor(1.5), "model.b": torch.zeros(0, 8), "model.c": torch.arange(2000)}
    for number, model in enumerate(models):
        model |= {"model.a": torch.tensor(2.0 - number), "model.b": torch.zeros(0, 8), "model.c": torch.arange(2000)}
    save(tmp_path, base, models)
    for name in ("ties", "ties by tensor, sum", "dare, l1", "consensus on ties", "linear"):
        case = CASES[name]
        ran = merge(tmp_path, case.recipe(3, base_model="base.safetensors", lines=AUTO), "--force")
        assert_as_measured(case, base, models, written(ran, tmp_path), tmp_path / "out")


@pytest.mark.parametrize("case", ["sum of the largest", "ties", "ties by tensor", "dare, l1", "consensus", "linear"])
def test_rows_of_one_side_alone_are_merged_with_nothing(case: str, tmp_path: Path) -> None:
    """With resize: ft the rows that all have are merged and measured, the first model's further rows are copied."""
    base, models = family(3)
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    grown = [dict(model) for model in models]
    for number, model in enumerate(grown):
        for name in vocabulary:
            model[name] = torch.cat([model[name], torch.full((2, 8), number + 0.5, dtype=BF16)])
    save(tmp_path, base, grown)
    recipe = CASES[case].recipe(3, base_model="base.safetensors", lines=AUTO, resize="ft")
    got = written(merge(tmp_path, recipe), tmp_path)
    for name in vocabulary:
        got[name], further = got[name][:-2], got[name][-2:]
        assert raw(further) == raw(grown[0][name][-2:])
    assert_as_measured(CASES[case], base, models, got, tmp_path / "out")


@pytest.mark.parametrize("case", ["ties", "dare, l1", "consensus on ties", "slerp"])
def test_tensors_that_one_model_lacks_count_for_nothing(case: str, tmp_path: Path) -> None:
    """With missing: copy a tensor that not all have is the base's, and neither trimmed nor measured."""
    number = 3 if case != "slerp" else 2
    base, models = family(number)
    save(tmp_path, base, [{n: t for n, t in models[0].items() if n != "lm_head.weight"}, *models[1:]])
    recipe = CASES[case].recipe(number, base_model="base.safetensors", lines=AUTO, missing="copy")
    got = written(merge(tmp_path, recipe), tmp_path)
    head = base["lm_head.weight"]
    for model in (base, *models):
        del model["lm_head.weight"]
    assert_as_measured(CASES[case], base, models, got, tmp_path / "out", extra={"lm_head.weight": head})


@pytest.mark.slow
def test_a_model_may_be_named_twice(tmp_path: Path) -> None:
    """The same model twice is two models, each with its own parameters."""
    base, models = family(1)
    save(tmp_path, base, models)
    recipe = CASES["ties, all said"].recipe(2, base_model="base.safetensors", lines=AUTO)
    recipe["models"][1]["model"] = "0.safetensors"
    got = written(merge(tmp_path, recipe), tmp_path)
    assert_as_measured(CASES["ties, all said"], base, models * 2, got, tmp_path / "out")


# --- what no byte depends on ---


def run_api(folder: Path, recipe: Mapping[str, Any], name: str, **resources: Any) -> Tensors:
    """The same by way of the Python API, into a folder called `name`."""
    (folder / "merge.yaml").write_text(yaml.safe_dump(dict(recipe)), encoding="utf-8")
    loaded = lines.load_recipe(folder / "merge.yaml")
    plan = lines.make_plan(loaded, lines.open_inputs(loaded), folder / name)
    lines.run(plan, lines.Resources(**{"device": "cpu", **resources}))
    return {n: t for file in (folder / name).glob("*.safetensors") for n, t in load_file(file).items()}


def assert_same_files(folder: Path, names: Sequence[str]) -> None:
    """Weights, and the alpha in the recipe, byte for byte."""
    for name in names[1:]:
        assert (folder / name / "model.safetensors").read_bytes() == (
            folder / names[0] / "model.safetensors"
        ).read_bytes()
        one, other = (yaml.safe_load((folder / which / "lines_recipe.yaml").read_text()) for which in (name, names[0]))
        del one["card"], other["card"]  # its title is the folder's name
        assert one == other, name


SUMMED = {name: case for name, case in CASES.items() if not name.endswith(" of none")}
"""Of which something is left: `alpha: auto` cannot be measured of a sum of nothing."""


@pytest.mark.parametrize(
    ("case", "dtypes"),
    [
        *by_turns({name: case for name, case in SUMMED.items() if name in MOST_SAID}, [2]),
        *by_turns({name: case for name, case in SUMMED.items() if name not in MOST_SAID}, [2], pytest.mark.slow),
    ],
)
@pytest.mark.slow
def test_small_chunks_and_workers_change_no_byte(case: str, dtypes: str, tmp_path: Path) -> None:
    """Chunks of 7 in three workers give what one worker gives at once; and that is the reference's."""
    chosen = CASES[case]
    number = 3 if 3 in chosen.numbers else chosen.numbers[0]
    base, models = family(number, dtypes, seed=3)
    save(tmp_path, base, models)
    recipe = chosen.recipe(number, base_model="base.safetensors", lines=AUTO)
    whole = run_api(tmp_path, recipe, "whole", workers=1)
    run_api(tmp_path, recipe, "sevens", workers=3, chunk=7)
    assert_same_files(tmp_path, ["whole", "sevens"])
    assert_as_measured(chosen, base, models, whole, tmp_path / "whole")


def test_the_sign_of_a_zero_does_not_depend_on_chunks(tmp_path: Path) -> None:
    """Where the largest of several zeros is taken, the vector units and the rest of a chunk choose the same one."""
    zeros = {"a": torch.full((100,), -0.0)}
    save(tmp_path, zeros, [{"a": torch.zeros(100)}] * 2)
    case = Case("ties", {"agreement": "max"}, {"weight": (-1.0, 1.0)})
    recipe = case.recipe(2, base_model="base.safetensors")
    run_api(tmp_path, recipe, "whole")
    run_api(tmp_path, recipe, "sevens", chunk=7)
    assert_same_files(tmp_path, ["whole", "sevens"])


LARGE = 3 * whole_model.BLOCK + 4321


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors, list[Tensors]]:
    """Three fine-tunes of a model whose tensors have up to four blocks of 65,536 entries, whole and not."""
    folder = tmp_path_factory.mktemp("large")
    random = torch.Generator().manual_seed(5)
    names = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.weight" for layer in range(LAYERS))]
    sizes = [LARGE, 70_001, 100, whole_model.BLOCK, 1000]
    base = {n: torch.randn(size, generator=random).to(BF16) for n, size in zip(names, sizes, strict=True)}
    noise = [{n: torch.randn(len(t), generator=random) for n, t in base.items()} for _ in range(3)]
    models = [{n: (base[n].float() + 0.03 * more[n]).to(BF16) for n in base} for more in noise]
    save(folder, base, models)
    return folder, base, models


@pytest.mark.parametrize(
    "case",
    [
        *("ties, all said", "consensus on ties", "dare, l1"),
        *(
            pytest.param(case, marks=pytest.mark.slow)
            for case in ("weighted sum", "ties by tensor, max", "dare_ties, mean")
        ),
    ],
)
def test_blocks_and_chunks_change_no_byte(
    case: str, large: tuple[Path, Tensors, list[Tensors]], tmp_path: Path
) -> None:
    """Tensors of several blocks, in chunks that cut blocks and in chunks that do not, come out as on whole models."""
    folder, base, models = large
    recipe = CASES[case].recipe(3, base_model="base.safetensors", lines=AUTO)
    recipe["base_model"] = str(folder / recipe["base_model"])
    for source in recipe["models"]:
        source["model"] = str(folder / source["model"])
    whole = run_api(tmp_path, recipe, "default")
    run_api(tmp_path, recipe, "1000", chunk=1000, workers=3)
    run_api(tmp_path, recipe, "65536", chunk=65536, workers=1)
    assert_same_files(tmp_path, ["default", "1000", "65536"])
    assert_as_measured(CASES[case], base, models, whole, tmp_path / "default")


@pytest.mark.parametrize(
    "case",
    ["weighted sum of the largest", "ties", "ties by tensor", "consensus on ties", "dare, l1", "linear", "slerp"],
)
@pytest.mark.slow
def test_shards_change_no_byte(case: str, tmp_path: Path) -> None:
    """However inputs and output are sharded, tensors and the measured alpha are the same to the last bit."""
    number = CASES[case].numbers[-1] if case == "slerp" else 3
    base, models = family(number, "by turns")
    save(tmp_path, base, models)
    recipe = CASES[case].recipe(number, base_model="base.safetensors", lines=AUTO)
    plain = written(merge(tmp_path, recipe), tmp_path)
    alpha = alpha_of(tmp_path / "out")
    write_checkpoint(tmp_path / "base", dict(reversed(base.items())), shards=3)
    for n, model in enumerate(models):
        write_checkpoint(tmp_path / str(n), model, shards=n + 1)
        recipe["models"][n]["model"] = str(n)
    sharded = written(merge(tmp_path, {**recipe, "base_model": "base", "max_shard_size": 300}, "--force"), tmp_path)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3
    assert alpha_of(tmp_path / "out") == alpha
    assert_same(sharded, plain)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["ties, all said", "dare, l1", "consensus on ties, all said", "linear"])
def test_the_written_recipe_gives_the_same_weights(case: str, tmp_path: Path) -> None:
    """lines_recipe.yaml, in which alpha is a number, makes the same file again."""
    save(tmp_path, *family(3))
    written(merge(tmp_path, CASES[case].recipe(3, base_model="base.safetensors", lines=AUTO)), tmp_path)
    ran = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again", "--quiet")
    assert ran.code == 0, ran.err + ran.trace
    assert alpha_of(tmp_path / "again") == alpha_of(tmp_path / "out")
    assert_same(load_file(tmp_path / "again" / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].method != "slerp" and CASES[name].to_the_bit])
def test_cuda_gives_the_bytes_of_the_cpu(case: str, tmp_path: Path) -> None:
    """The device changes no byte of what is computed entry by entry; divisions by a number least of all."""
    number = 3 if 3 in CASES[case].numbers else 1
    base, models = family(number, "by turns")
    save(tmp_path, base, models)
    recipe = CASES[case].recipe(number, base_model="base.safetensors", lines=SCALING)
    run_api(tmp_path, recipe, "cpu")
    run_api(tmp_path, recipe, "cuda", device="cuda", chunk=50)
    assert_same_files(tmp_path, ["cpu", "cuda"])
