"""Every number of several fine-tunes, against the float64 reference."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from support.inspect_reference import (
    Reference,
    agree,
    check,
    inspect,
    linear,
    refused,
    toy,
    toy_reference,
    toy_spots,
    tuned,
    written,
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 3, 5])
def test_every_number_of_several_fine_tunes(number: int, tmp_path: Path) -> None:
    """Cosines, opposed and disagreeing signs, norms and auto are told as the plain computation has them."""
    base = toy(7, 3)
    fts = [tuned(base, seed, size=0.05 * (1 + seed)) for seed in range(number)]
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_identical_updates(number: int, tmp_path: Path) -> None:
    """Equal updates have cosine 1, oppose nowhere, and the norm of their sum is the sum of their norms."""
    base = toy(1, 2)
    ft = tuned(base, 1)
    told = inspect(*written(tmp_path, base, [ft] * number))
    check(told, toy_reference(base, [ft] * number))
    together = told["together"]
    agree(together["cosine"], [[1.0] * number] * number, "cosine")
    assert together["opposed"] == [[0.0] * number] * number
    assert together["disagreement"] == 0.0
    assert together["norm_of_sum"] == pytest.approx(together["sum_of_norms"], rel=1e-12)


@pytest.mark.slow
def test_a_cosine_is_never_above_one(tmp_path: Path) -> None:
    """Cosines lie between -1 and 1, the last bit of a division included."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(5, dtype=torch.float64) for i in range(64)}
    random = torch.Generator().manual_seed(0)
    ft = {name: torch.randn(5, generator=random, dtype=torch.float64) for name in base}
    third = {name: 0.3 * tensor for name, tensor in ft.items()}
    against = {name: -0.7 * tensor for name, tensor in ft.items()}
    together = inspect(*written(tmp_path, base, [ft, third, against]))["together"]
    cosines = [c for row in (together, *together["layers"]) for line in row["cosine"] for c in line]
    assert min(cosines) >= -1
    assert max(cosines) <= 1


def test_opposite_updates(tmp_path: Path) -> None:
    """An update and its negative have cosine -1, oppose wherever anything changed, and sum to nothing."""
    base = {name: tensor.double() for name, tensor in toy(1, 2).items()}
    step = {name: (torch.rand_like(tensor) > 0.5) * 0.25 for name, tensor in base.items()}
    base = {name: (tensor * 8).round() / 8 for name, tensor in base.items()}  # so that both differences are exact
    fts = [{name: base[name] + sign * step[name] for name in base} for sign in (1, -1)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    changed = sum(int((by != 0).sum()) for by in step.values()) / sum(by.numel() for by in step.values())
    together = told["together"]
    assert together["opposed"][0][1] == together["disagreement"] == pytest.approx(changed, rel=1e-12)
    assert together["cosine"][0][1] == pytest.approx(-1.0, rel=1e-12)
    assert together["norm_of_sum"] == 0.0
    assert together["auto"] == {"method": "task_arithmetic", "alpha": None, "sum": 0.0, "merged": 0.0}


@pytest.mark.slow
def test_updates_of_disjoint_entries(tmp_path: Path) -> None:
    """Updates that never meet are at right angles, disagree nowhere, and their norms add up in squares."""
    base = toy(3, 3)
    moved = [tuned(base, seed, keep=0) for seed in range(3)]
    turn = {name: torch.arange(tensor.numel()).reshape(tensor.shape) % 3 for name, tensor in base.items()}
    fts = [{n: torch.where(turn[n] == i, ft[n], base[n]) for n in base} for i, ft in enumerate(moved)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    together = told["together"]
    assert together["cosine"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert together["disagreement"] == 0.0
    squares = sum(one["update_norm"] ** 2 for one in told["fine_tunes"])
    assert together["norm_of_sum"] == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_one_of_several_is_the_base_itself(tmp_path: Path) -> None:
    """A fine-tune that changed nothing has no cosine with any, and opposes none."""
    base = toy(2, 2)
    fts = [tuned(base, 1), base, tuned(base, 2)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    assert told["together"]["cosine"][1] == [None, None, None]
    assert [row[1] for row in told["together"]["opposed"]] == [0.0, 0.0, 0.0]


def test_a_layer_that_only_one_changed(tmp_path: Path) -> None:
    """Where only one of three fine-tunes changed a layer, cosines there are null, and its norm is that of the sum."""
    base = toy(2, 3)
    fts = [
        {n: t if "layers.1." in n or seed == 0 else base[n] for n, t in tuned(base, seed).items()} for seed in (0, 1)
    ]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    first = told["together"]["layers"][0]
    assert first["cosine"] == [[1.0, None], [None, None]]
    assert first["norm_of_sum"] == first["sum_of_norms"] == told["fine_tunes"][0]["layers"][0]["update_norm"]


@pytest.mark.parametrize("number", [1, 2])
def test_no_float_tensor_in_common(number: int, tmp_path: Path) -> None:
    """Where nothing can be compared at all, be it integers alone or no shape that fits, that is refused."""
    base = {"model.layers.0.steps": torch.tensor([1, 2]), "model.layers.1.steps": torch.tensor([3, 4])}
    refused(4, *written(tmp_path / "integers", base, [base] * number))
    base = {f"model.layers.{i}.mlp.w": torch.ones(2) for i in range(2)}
    fts = [{name: torch.ones(3) for name in base}, base]
    assert "layers.1.mlp.w" in refused(4, *written(tmp_path / "shapes", base, fts[:number]))


def test_one_checkpoint_twice(tmp_path: Path) -> None:
    """The same checkpoint twice, be it the base or a fine-tune, and by another path, is refused."""
    base = toy(1, 2)
    a, b, flag, c = written(tmp_path, base, [tuned(base, 1), tuned(base, 2)])
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "ft0.safetensors")
    (tmp_path / "sub").mkdir()
    for models in (
        [a, a],
        [a, b, tmp_path / "link.safetensors"],
        [b, tmp_path / "sub/../ft1.safetensors"],
        [c],
        [a, c],
    ):
        refused(2, *models, flag, c)


@pytest.mark.slow
def test_coefficients_of_several(tmp_path: Path) -> None:
    """Of several, alpha is 1/N and beta 0.5 unless alpha or a schedule is given; what is given counts."""
    base = toy(3, 3)
    fts = [tuned(base, seed) for seed in range(4)]
    spots = toy_spots(base)
    args = written(tmp_path, base, fts)
    for options, c in (
        ((), linear(spots, 0.25, 0.5)),
        (("--beta", 1.5), linear(spots, 0.25, 1.5)),
        (("--gamma", 2), linear(spots, 0.25, 0.5, 2)),
        (("--alpha", "auto", "--beta", 0.25), linear(spots, 0.25, 0.25)),
        (("--alpha", 0.3), linear(spots, 0.3, 0.7)),
        (("--schedule", "0.2,0.7"), linear(spots, 0.2, 0.5)),
        (("--filter", "mlp=-2"), linear(spots, 0.25, 0.5) | {name: -2.0 for name in spots if ".mlp." in name}),
    ):
        told = inspect(*args, *options, "--tensors")
        check(told, Reference(base, fts, spots, c))
        alpha = None if "--schedule" in options else c["model.embed_tokens.weight"] / (2 if "--gamma" in options else 1)
        assert told["scaling"]["of"] == "asked"
        agree(told["scaling"]["alpha"], alpha, "alpha")
