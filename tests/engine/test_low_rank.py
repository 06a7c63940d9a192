"""Products with fewer ranks and nearest matrices, held against a full singular value decomposition."""

from __future__ import annotations

import pytest
import torch

from lines_cli.engine.low_rank import balanced, nearest, rank_for, reduced, same_signs, spectrum_of_gram


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Of full rank, its singular values falling over six orders of magnitude."""
    chance = torch.Generator().manual_seed(seed)
    k = min(rows, columns)
    u, _ = torch.linalg.qr(torch.randn(rows, k, generator=chance, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(columns, k, generator=chance, dtype=torch.float64))
    return u @ torch.diag(10.0 ** -torch.linspace(0, 6, k, dtype=torch.float64)) @ v.T


def best(m: torch.Tensor, rank: int) -> torch.Tensor:
    """The truncated decomposition (Eckart and Young 1936)."""
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (40, 24), (32, 32), (1, 9), (9, 1)])
@pytest.mark.parametrize("rank", [1, 2, 5, 24])
def test_a_product_is_reduced_to_the_nearest(rows: int, columns: int, rank: int) -> None:
    """Error, kept norm and product are those of the decomposition of the whole product."""
    chance = torch.Generator().manual_seed(3)
    up = torch.randn(rows, 12, generator=chance, dtype=torch.float64)
    down = torch.randn(12, columns, generator=chance, dtype=torch.float64)
    rank = min(rank, rows, columns, 12)
    whole = up @ down
    new_down, new_up, kept, total = reduced(down, up, rank)
    assert (new_down.shape, new_up.shape) == ((rank, columns), (rows, rank))
    torch.testing.assert_close(new_up @ new_down, best(whole, rank), rtol=1e-10, atol=1e-10)
    assert total == pytest.approx(float(whole.square().sum()))
    assert total - kept == pytest.approx(float((whole - new_up @ new_down).square().sum()), abs=1e-9 * total)
    norms = [torch.linalg.vector_norm(factor, dim=dim) for factor, dim in ((new_up, 0), (new_down, 1))]
    torch.testing.assert_close(*norms)  # balanced


@pytest.mark.parametrize(("rows", "columns"), [(24, 40), (16, 200), (32, 32), (1, 9)])
@pytest.mark.parametrize("rank", [1, 3, 10, 32])
def test_the_gram_matrix_gives_the_nearest(rows: int, columns: int, rank: int) -> None:
    """Projected onto its eigenvectors a matrix is as near to itself as the decomposition's truncation."""
    m = matrix(rows, columns)
    rank = min(rank, rows)
    basis = nearest(m @ m.T, rank)
    left, right = basis, basis.T @ m
    balanced(left, right)
    error = torch.linalg.matrix_norm(m - left @ right)
    least = torch.linalg.matrix_norm(m - best(m, rank))
    assert float(error) <= float(least) * (1 + 1e-9) + 1e-7 * float(torch.linalg.matrix_norm(m))
    if rank == rows:
        torch.testing.assert_close(left @ right, m, rtol=1e-12, atol=1e-14)
    norms = [torch.linalg.vector_norm(factor, dim=dim) for factor, dim in ((left, 0), (right, 1))]
    torch.testing.assert_close(*norms)


def test_a_matrix_of_low_rank_is_itself() -> None:
    """What ranks it lacks are zeros, not noise."""
    chance = torch.Generator().manual_seed(1)
    m = torch.randn(20, 3, generator=chance, dtype=torch.float64) @ torch.randn(3, 30, generator=chance).double()
    basis = nearest(m @ m.T, 8)
    left, right = basis, basis.T @ m
    balanced(left, right)
    torch.testing.assert_close(left @ right, m, rtol=1e-12, atol=1e-12)
    assert left.isfinite().all()
    assert float(left[:, 3:].abs().max()) < 1e-6


def test_zero_is_itself() -> None:
    """Nothing is divided by 0."""
    left, right = torch.eye(4, 2, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    balanced(left, right)
    same_signs(right, left)
    assert not left.any()
    assert not right.any()
    down, up, kept, total = reduced(torch.zeros(3, 5).double(), torch.ones(4, 3).double(), 2)
    assert kept == total == 0
    assert not (up @ down).any()


def test_signs_are_the_same_for_opposite_vectors() -> None:
    """The largest entry of each column of the left factor is positive, whatever sign it came with."""
    down, up = torch.randn(3, 5).double(), torch.randn(4, 3).double()
    flipped = down * torch.tensor([[-1.0], [1.0], [-1.0]]), up * torch.tensor([-1.0, 1.0, -1.0])
    same_signs(down, up)
    same_signs(*flipped)
    assert torch.equal(down, flipped[0])
    assert torch.equal(up, flipped[1])
    assert (up.gather(0, up.abs().argmax(0, keepdim=True)) > 0).all()


@pytest.mark.parametrize(
    ("squares", "energy", "rank"),
    [
        ([4.0, 3.0, 2.0, 1.0], 0.4, 1),
        ([4.0, 3.0, 2.0, 1.0], 0.41, 2),
        ([4.0, 3.0, 2.0, 1.0], 0.9, 3),
        ([4.0, 3.0, 2.0, 1.0], 1.0, 4),
        ([4.0, 3.0, 0.0, 0.0], 1.0, 2),
        ([5.0], 0.01, 1),
        ([0.0, 0.0], 0.5, 0),
        ([0.1] * 10, 1.0, 10),
    ],
)
def test_the_smallest_rank_that_keeps_a_share(squares: list[float], energy: float, rank: int) -> None:
    """Of the squared norm; of nothing, none."""
    assert rank_for(torch.tensor(squares, dtype=torch.float64), energy) == rank


def test_the_spectrum_is_that_of_the_decomposition() -> None:
    """Down to what rounding leaves of the squares."""
    m = matrix(30, 50)
    found = spectrum_of_gram(m @ m.T)
    torch.testing.assert_close(found, torch.linalg.svdvals(m).square(), rtol=1e-2, atol=1e-13)
    assert (found >= 0).all()
