"""The methods on singular values, matrix by matrix, against numpy's decomposition in float64; and what is known of the
results by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lines_cli.methods import METHODS as REGISTERED
from lines_cli.methods.iso_c import iso_c
from lines_cli.methods.iso_cts import dimensions, iso_cts
from lines_cli.methods.spectrum import workspace
from lines_cli.methods.tsv_m import tsv_m
from lines_cli.methods.wudi import wudi
from support import spectral_references
from support.crossed import by_turns

METHODS: dict[str, tuple[Callable[..., Tensor], Callable[..., Any], dict[str, Any]]] = {
    "iso_c": (iso_c, spectral_references.iso_c, {}),
    "iso_cts": (iso_cts, spectral_references.iso_cts, {"common_space_fraction": 0.8}),
    "tsv_m": (tsv_m, spectral_references.tsv_m, {}),
    "wudi": (wudi, spectral_references.wudi, {"ridge": 1e-6}),
}
EPS = {torch.float32: 2.0**-23, torch.float64: 2.0**-52}


def low(shape: Sequence[int], rank: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of a rank, with singular values from 1 down to 0.1, rounded to the dtype."""
    chance = np.random.default_rng(seed)
    u, v = (np.linalg.qr(chance.normal(size=(n, rank)))[0] for n in shape)
    return torch.from_numpy((u * np.geomspace(1, 0.1, rank)) @ v.T).to(dtype)


def noise(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype) / 8


def uneven(shape: Sequence[int], seed: int) -> Tensor:
    """Singular values that fall as those of fine-tunes do."""
    chance = np.random.default_rng(seed)
    r = min(shape)
    u, v = (np.linalg.qr(chance.normal(size=(n, r)))[0] for n in shape)
    return torch.from_numpy((u * np.arange(1, r + 1) ** -1.0) @ v.T).float()


TASKS: dict[str, list[Tensor]] = {
    "tall": [noise((300, 40), seed) for seed in range(3)],
    "wide": [noise((40, 300), seed) for seed in range(3)],
    "square": [noise((64, 64), seed) for seed in range(3)],
    "more rows than a block": [uneven((1100, 48), seed) for seed in range(4)],
    "more columns than a block": [uneven((48, 1100), seed) for seed in range(4)],
    "small": [noise((3, 5), seed) for seed in range(2)],
    "one row": [noise((1, 7), seed) for seed in range(2)],
    "one entry": [torch.tensor([[0.5]]), torch.tensor([[-0.25]])],
    "one task": [uneven((60, 90), 5)],
    "a task that changed nothing": [uneven((60, 90), 5), torch.zeros(60, 90), uneven((60, 90), 6)],
    "more tasks than directions": [noise((2, 9), seed) for seed in range(3)],
    "float64": [noise((40, 90), seed, torch.float64) for seed in range(3)],
    "batched": [noise((4, 20, 30), seed) for seed in range(3)],
    "batched, tall": [noise((3, 31, 12), seed) for seed in range(2)],
    "large numbers": [1e30 * noise((30, 40), seed) for seed in range(2)],
    "small numbers": [1e-30 * noise((30, 40), seed) for seed in range(2)],
}
DEFICIENT: dict[str, list[Tensor]] = {
    "rank-deficient, tall": [low((300, 40), 6, seed) for seed in range(3)],
    "rank-deficient, wide": [low((40, 300), 6, seed) for seed in range(3)],
    "rank-deficient, square": [low((300, 300), 5, seed) for seed in range(2)],
    "adapters": [low((256, 192), 8, seed) for seed in range(4)],
}


def relative(got: Tensor, expected: Tensor) -> float:
    """By the Frobenius norm, of each matrix; the greatest."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    off = (got.double() - expected.double()).flatten(-2).norm(dim=-1)
    return float((off / expected.double().flatten(-2).norm(dim=-1).clamp(min=1e-300)).max())


def made(method: str, tensors: Sequence[Tensor], **said: Any) -> tuple[Tensor, Tensor]:
    """What a method makes, and its reference."""
    own, reference, defaults = METHODS[method]
    weight = said.pop("weight", [1.0] * len(tensors))
    said = {**defaults, **said}
    expected = reference([{"w": tensor.clone()} for tensor in tensors], weight=weight, **said)["w"]
    return own([tensor.clone() for tensor in tensors], weight=weight, **said), expected


LARGE = "more columns than a block"  # whose Gram matrix is dear


@pytest.mark.parametrize("tasks", [pytest.param(t, marks=pytest.mark.slow if t == LARGE else ()) for t in TASKS])
def test_wudi_as_published_against_numpy(tasks: str) -> None:
    """With the default ridge; elsewhere the tests take one that is next to nothing."""
    got, expected = made("wudi", TASKS[tasks], ridge=REGISTERED["wudi"].parameters["ridge"].default)
    assert relative(got, expected) < (1e-6 if got.dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tasks", TASKS)
@pytest.mark.some(5)
def test_against_numpy(tasks: str, method: str) -> None:
    """Within 1e-6 of what numpy's singular value decomposition in float64 gives: ten times nearer than asked."""
    tensors = TASKS[tasks]
    got, expected = made(method, tensors)
    assert expected.any()
    assert relative(got, expected) < (1e-6 if got.dtype == torch.float32 else 1e-9)


@pytest.mark.slow
@by_turns(tasks=DEFICIENT, method=["iso_c", "iso_cts", "tsv_m"])
def test_directions_that_are_zero_to_rounding_stay_out(tasks: str, method: str) -> None:
    """Rounding makes of them what is no direction; numpy is told the same threshold. What is written has no more
    directions than the tasks have between them.
    """
    tensors = DEFICIENT[tasks]
    got, expected = made(method, tensors)
    assert relative(got, expected) < 1e-5
    values = np.linalg.svd(got.double().numpy(), compute_uv=False)
    ranks = sum(int((np.linalg.svd(t.double().numpy(), compute_uv=False) > 0.05).sum()) for t in tensors)
    assert int((values > 1e-4 * values[0]).sum()) == ranks


@pytest.mark.slow
@pytest.mark.parametrize("tasks", DEFICIENT)
def test_wudi_of_rank_deficient_tasks_is_their_sum(tasks: str) -> None:
    """Where each task uses few directions of the input, which the others do not, each has its own way there; what lies
    in none of them is the sum's.
    """
    tensors = [tensor.double() for tensor in DEFICIENT[tasks]]
    got, expected = made("wudi", tensors)
    assert relative(got, expected) < 1e-6
    for tensor in tensors:
        assert float(((got - tensor) @ tensor.T).norm() / (tensor @ tensor.T).norm()) < 1e-2


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(5, 8), (8, 5), (3, 5, 8), (300, 20), (0, 5), (3, 0, 4), (0, 4, 5)], ids=str)
def test_zero_is_zero(shape: tuple[int, ...], method: str) -> None:
    """And nothing is divided by it."""
    own, _, said = METHODS[method]
    got = own([torch.zeros(shape) for _ in range(3)], weight=[1.0, 2.0, 1.0], **said)
    assert got.shape == shape
    assert not got.any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(7,), (), (4, 3, 2, 2)], ids=str)
def test_what_is_no_matrix_is_averaged(shape: tuple[int, ...], method: str) -> None:
    """Vectors and the kernels of convolutions, as in the authors' code."""
    own, _, said = METHODS[method]
    tensors = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    got = own([tensor.clone() for tensor in tensors], weight=[1.0, 2.0, 1.0], **said)
    torch.testing.assert_close(got, (tensors[0] + 2 * tensors[1] + tensors[2]) / 3)


@pytest.mark.parametrize("method", METHODS)
def test_one_matrix_of_a_batch_does_not_touch_the_others(method: str) -> None:
    """NaN fills its own; the others are what they are alone."""
    own, _, said = METHODS[method]
    tensors = [noise((3, 6, 9), seed) for seed in range(2)]
    alone = [own([t[n].clone() for t in tensors], weight=[1.0, 1.0], **said) for n in range(3)]
    tensors[1][1, 2, 3] = torch.inf
    got = own(tensors, weight=[1.0, 1.0], **said)
    assert got[1].isnan().all()
    assert torch.equal(got[0], alone[0])
    assert torch.equal(got[2], alone[2])


# --- what is known by hand ---


def test_iso_c_flattens() -> None:
    """Every singular value is the mean, whatever the shape; of equal ones nothing changes."""
    for shape in ((50, 80), (80, 50), (600, 30)):
        total = uneven(shape, 1)
        values = np.linalg.svd(total.double().numpy(), compute_uv=False)
        got = np.linalg.svd(iso_c([total.clone()], weight=[1.0]).double().numpy(), compute_uv=False)
        np.testing.assert_allclose(got, values.mean(), rtol=1e-6)
    rotation = torch.linalg.qr(noise((40, 40), 2).double()).Q.float()
    torch.testing.assert_close(iso_c([0.5 * rotation, rotation.clone()], weight=[1.0, 1.0]), 1.5 * rotation)


def test_tsv_m_of_one_task_is_the_task() -> None:
    """It has all directions, which are orthogonal already."""
    for shape in ((50, 80), (80, 50)):
        torch.testing.assert_close(tsv_m([uneven(shape, 3)], weight=[1.0]), uneven(shape, 3), rtol=1e-5, atol=1e-7)


def test_tsv_m_of_identical_tasks_takes_each_direction_once() -> None:
    """What depends on another direction is left out when that is taken: two times the same has the strength of both,
    for the first half of the directions.
    """
    tau = uneven((50, 80), 3)
    u, s, vt = np.linalg.svd(tau.double().numpy(), full_matrices=False)
    got = tsv_m([tau.clone(), tau.clone()], weight=[1.0, 1.0])
    np.testing.assert_allclose(got.numpy(), (u[:, :25] * s[:25]) @ vt[:25], atol=1e-6)


def test_tsv_m_of_tasks_that_do_not_meet_is_the_sum_of_their_first_directions() -> None:
    """Nothing has to be made orthogonal."""
    first, second = torch.zeros(60, 40), torch.zeros(60, 40)
    first[:30, :20], second[30:, 20:] = uneven((30, 20), 1), uneven((30, 20), 2)
    torch.testing.assert_close(
        tsv_m([first.clone(), second.clone()], weight=[1.0, 1.0]), first + second, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (600, 60)])
def test_iso_cts_of_one_task_is_iso_c(shape: tuple[int, int]) -> None:
    """Its own directions beside the common ones are the rest of them."""
    got = iso_cts([uneven(shape, 4)], weight=[1.0], common_space_fraction=0.8)
    torch.testing.assert_close(got, iso_c([uneven(shape, 4)], weight=[1.0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(60, 90), (90, 60)])
def test_iso_cts_of_identical_tasks_has_nothing_beside_what_is_common(shape: tuple[int, int]) -> None:
    """But for the rest of the spectrum, whose directions each task would take again: they count once, and all are
    equally strong.
    """
    tau = uneven(shape, 4)
    got = iso_cts([tau.clone(), tau.clone()], weight=[1.0, 1.0], common_space_fraction=0.8)
    u, s, vt = np.linalg.svd(2 * tau.double().numpy(), full_matrices=False)
    common, each = dimensions(60, 2, 0.8)
    k = common + each
    level = (s[:common].sum() + 2 * (s[common:k] / 2).sum()) / 60
    np.testing.assert_allclose(got.numpy(), u[:, :k] @ vt[:k] * level, atol=2e-6)


@pytest.mark.parametrize("shape", [(60, 300), (300, 60)])
def test_iso_cts_takes_no_direction_for_common_that_the_sum_does_not_have(shape: tuple[int, int]) -> None:
    """Of two tasks that cancel each other but for a few directions the sum is of low rank. What lies beside is the
    tasks' own, whatever a decomposition makes of directions whose singular value is 0.
    """
    tau, more = low(shape, 20, 1), low(shape, 4, 2)
    tensors = [tau + more, more - tau]
    got, expected = made("iso_cts", tensors, common_space_fraction=0.8)
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize(
    ("r", "tasks", "fraction", "expected"),
    [(768, 8, 0.8, (616, 19)), (768, 20, 0.8, (608, 8)), (10, 3, 0.8, (7, 1)), (10, 30, 0.8, (10, 0)),
     (12, 5, 0.0, (2, 2)), (12, 2, 1.0, (12, 0)), (7, 2, 0.0, (1, 3))],
)  # fmt: skip
def test_dimensions_of_iso_cts(r: int, tasks: int, fraction: float, expected: tuple[int, int]) -> None:
    """As the authors count: what is not common is divided evenly, and what is left over is common."""
    assert dimensions(r, tasks, fraction) == expected


# --- wudi ---


def interference(merged: Tensor, tasks: Sequence[Tensor]) -> Tensor:
    """The published objective."""
    terms = [((merged - task) @ task.mT).square().sum() / task.square().sum() for task in tasks]
    return torch.stack(terms).sum()


def iterated(tasks: Sequence[Tensor], steps: int, rate: float) -> Tensor:
    """As published: Adam from the sum."""
    merged = torch.nn.Parameter(sum(tasks[1:], tasks[0]).clone())
    adam = torch.optim.Adam([merged], lr=rate)
    for _ in range(steps):
        adam.zero_grad()
        interference(merged, tasks).backward()
        adam.step()
    return merged.detach()


@pytest.mark.slow
def test_wudi_solves_what_is_published_as_steps() -> None:
    """No step of the published form comes below its objective; with many steps it comes to the same matrix."""
    tasks = [2e-3 * uneven((12, 18), seed).double() for seed in range(3)]
    solved = wudi([task.clone() for task in tasks], weight=[1.0] * 3, ridge=1e-9)
    at_the_sum, least = (float(interference(m, tasks)) for m in (sum(tasks[1:], tasks[0]), solved))
    published = float(interference(iterated(tasks, 300, 1e-5), tasks))
    assert least < published < at_the_sum
    off = [float((iterated(tasks, steps, 1e-5) - solved).norm() / solved.norm()) for steps in (300, 3000)]
    assert off[1] < 0.5 * off[0]
    leaf = solved.clone().requires_grad_()
    (slope,) = torch.autograd.grad(interference(leaf, tasks), leaf)
    begun = sum(tasks[1:], tasks[0]).clone().requires_grad_()
    (slope_of_sum,) = torch.autograd.grad(interference(begun, tasks), begun)
    assert float(slope.norm()) < 1e-6 * float(slope_of_sum.norm())


def test_wudi_of_identical_tasks_is_the_task() -> None:
    """Not their sum: nothing interferes then."""
    tau = noise((20, 30), 3)
    torch.testing.assert_close(
        wudi([tau.clone() for _ in range(3)], weight=[1.0] * 3, ridge=1e-9), tau, rtol=1e-4, atol=1e-5
    )


def test_wudi_held_firmly_is_the_sum() -> None:
    tasks = [noise((20, 30), seed) for seed in range(3)]
    got = wudi([task.clone() for task in tasks], weight=[1.0] * 3, ridge=1e9)
    torch.testing.assert_close(got, tasks[0] + tasks[1] + tasks[2], rtol=1e-5, atol=1e-6)


# --- memory ---


def test_the_workspace_grows_with_the_smaller_side_alone() -> None:
    """A Gram matrix is as large as the smaller side, and the longer one is read block by block."""
    assert workspace((768, 100_000)) == workspace((768, 3072)) == workspace((3072, 768))
    assert workspace((8, 768, 3072)) == workspace((768, 3072))
    assert workspace((768,)) == workspace((4, 3, 2, 2)) == workspace((0, 5)) == 0
