"""The k-th largest magnitude of task vectors that are large enough to be sampled, whatever the sample says: held
against sorting all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.engine import threshold
from lines_cli.recipe.yaml_file import load_recipe
from support.files import write_checkpoint

NUMEL = 400_000  # which is worth a sample


def chance(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(NUMEL, generator=chance(seed))


def between(low: float, high: float) -> torch.Tensor:
    return low + (high - low) * torch.rand(NUMEL, generator=chance())


def unseen() -> torch.Tensor:
    """Where a sample may look there is almost nothing: it says that the threshold is far below where it lies."""
    values = normal()
    for at in range(0, NUMEL, 8 * threshold._RUN + threshold._RUN // 4 + 1):
        values[at : at + threshold._RUN] *= 1e-6
    return values


def overseen() -> torch.Tensor:
    """The other way round: what a sample sees is larger than all else."""
    return 1e-6 / unseen().clamp(min=1e-30)


def with_some(value: float) -> torch.Tensor:
    values = normal()
    values[::7] = value
    return values


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "normal": normal,
    "of bfloat16": lambda: normal().bfloat16().float(),
    "zeros": lambda: torch.zeros(NUMEL),
    "one number": lambda: torch.full((NUMEL,), -0.3),
    "one number of odd bits": lambda: torch.full((NUMEL,), 0.1),
    "two numbers": lambda: normal().sign(),
    "three neighbours": lambda: (
        (torch.tensor(0.1).view(torch.int32) + torch.arange(NUMEL) % 3).int().view(torch.float32)
    ),
    "mostly zeros": lambda: normal() * (normal(1) > 2),
    "heavy tails": lambda: normal().pow(9),
    "sorted": lambda: normal().sort().values,
    "a narrow range": lambda: between(1, 1 + 2**-8),
    "an octave": lambda: between(1, 2),
    "denormal numbers": lambda: between(0, 1e-40),
    "huge numbers": lambda: between(1e37, 1.5e38),
    "unseen by a sample": unseen,
    "overseen by a sample": overseen,
}
DENSITIES = [0.2, *(pytest.param(density, marks=pytest.mark.slow) for density in (1e-9, 0.001, 0.5, 0.999))]


def thresholds(folder: Path, models: list[dict[str, torch.Tensor]], **recipe: Any) -> lines.Outcome:
    """Merge models whose base is zeros."""
    write_checkpoint(folder / "base", {name: torch.zeros_like(tensor) for name, tensor in models[0].items()})
    for number, model in enumerate(models):
        write_checkpoint(folder / f"m{number}", model)
    listed = [{"model": f"m{number}"} for number in range(len(models))]
    values = {"merge_method": "task_arithmetic", "base_model": "base", "models": listed, **recipe}
    (folder / "merge.yaml").write_text(yaml.safe_dump(values))
    asked = load_recipe(folder / "merge.yaml")
    plan = lines.make_plan(asked, lines.open_inputs(asked), folder / "out.safetensors")
    return lines.run(plan, lines.Resources(workers=2, device="cpu"), force=True)


def sorted_out(magnitudes: torch.Tensor, density: float) -> tuple[float, int]:
    """By sorting: the threshold, and how many are kept. NaN is larger than all else."""
    in_order = magnitudes.sort(descending=True).values
    threshold = in_order[max(1, int(density * len(in_order))) - 1]
    if threshold.isnan():
        return math.nan, int(magnitudes.isnan().sum())
    return float(threshold), int((~(magnitudes < threshold)).sum())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.some(6)
def test_of_the_whole_model(kind: str, density: float, tmp_path: Path) -> None:
    """One large tensor and two small ones, in one order; exactly, ties included."""
    values = KINDS[kind]()
    model = {"a": values, "b": normal(2)[:1000].clamp(-1, 1) * values.abs().max(), "c": torch.ones(3)}
    outcome = thresholds(tmp_path, [model], parameters={"density": density})
    found, number = sorted_out(torch.cat([tensor.abs() for tensor in model.values()]), density)
    statistics = outcome.plan.statistics
    assert statistics.thresholds == {(0, None): (found,)}
    assert statistics.kept == ((number, NUMEL + 1003),)


EACH = {"normal", "one number", "mostly zeros", "unseen by a sample"}  # the others are ordered alike, by tensor or not


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [kind if kind in EACH else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
@pytest.mark.parametrize("density", DENSITIES)
def test_of_each_tensor(kind: str, density: float, tmp_path: Path) -> None:
    """Two models at once, each tensor by itself."""
    models = [{"b": KINDS[kind](), "a": normal(seed)[:5000], "c": torch.ones(1)} for seed in (2, 3)]
    outcome = thresholds(tmp_path, models, parameters={"density": density, "trim": "tensor"})
    expected = {
        (number, name): sorted_out(tensor.abs(), density)
        for number, model in enumerate(models)
        for name, tensor in model.items()
    }
    statistics = outcome.plan.statistics
    assert statistics.thresholds == {key: (threshold,) for key, (threshold, _) in expected.items()}
    assert statistics.kept == tuple(
        (sum(kept for (model, _), (_, kept) in expected.items() if model == number), NUMEL + 5001) for number in (0, 1)
    )


@pytest.mark.slow
@pytest.mark.parametrize("value", [math.inf, pytest.param(-math.inf, marks=pytest.mark.slow), math.nan])
@pytest.mark.parametrize("density", [0.01, 0.3])
@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_what_is_not_finite_is_largest(value: float, density: float, trim: str, tmp_path: Path) -> None:
    """Where that is let through: of Inf and NaN there are more than a density of 0.01 keeps, fewer than one of 0.3."""
    values = with_some(value)
    parameters = {"density": density, "trim": trim}
    outcome = thresholds(tmp_path, [{"a": values}], parameters=parameters, allow_nonfinite=True)
    ((found,),) = outcome.plan.statistics.thresholds.values()
    expected, number = sorted_out(values.abs(), density)
    assert found == expected or (math.isnan(found) and math.isnan(expected))
    assert outcome.plan.statistics.kept == ((number, NUMEL),)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_the_threshold_is_nan_that_alone_is_kept(dtype: torch.dtype, tmp_path: Path) -> None:
    """Inf is smaller; what is dropped is 0."""
    values = with_some(math.nan).to(dtype)
    values[1] = math.inf
    thresholds(tmp_path, [{"a": values}], parameters={"density": 0.01}, allow_nonfinite=True)
    got = load_file(tmp_path / "out.safetensors")["a"]
    assert torch.equal(got.isnan(), values.isnan())
    assert not got.nan_to_num().any()


@pytest.mark.slow
def test_float64_is_ordered_as_float32(tmp_path: Path) -> None:
    """Magnitudes are rounded before they are compared."""
    values = normal().double() * (1 + 1e-9)
    outcome = thresholds(tmp_path, [{"a": values}], parameters={"density": 0.2})
    found, number = sorted_out(values.abs().float(), 0.2)
    assert outcome.plan.statistics.thresholds == {(0, None): (found,)}
    assert outcome.plan.statistics.kept == ((number, NUMEL),)


@pytest.mark.slow
def test_one_pass_as_a_rule(tmp_path: Path) -> None:
    """Fine-tunes of one kind or another: their thresholds are known after everything was read once, and a sample
    that says where to look.
    """
    models = [
        {"a": normal(), "b": normal(1) * 3},
        {"a": normal(2).bfloat16().float(), "b": normal(3).pow(3)},
        {"a": KINDS["one number of odd bits"](), "b": KINDS["three neighbours"]()},
    ]
    outcome = thresholds(tmp_path, models, parameters={"density": 0.2})
    assert outcome.passes == 2
    assert outcome.bytes_read < 2.2 * outcome.plan.bytes_read


def test_another_pass_where_the_sample_misleads(tmp_path: Path) -> None:
    """And the one that it takes is counted."""
    assert thresholds(tmp_path, [{"a": unseen()}], parameters={"density": 0.2}).passes > 2
