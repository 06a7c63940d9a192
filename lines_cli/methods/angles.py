"""Lengths and angles of whole tensors, from sums that are taken while these are streamed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lines_cli.methods.said import Values

if TYPE_CHECKING:
    from torch import Tensor

Gram = Sequence[Sequence[float]]
"""[N][N]: the dot products of N vectors."""


def pairs(tensors: Sequence[Tensor], _: Values) -> Iterator[Tensor]:
    """For each pair of N runs of entries, each with itself too, their product entry by entry, in float64: what sums up
    to dot products (`Method.sums`).
    """
    wide = [tensor.double() for tensor in tensors]
    for number, one in enumerate(wide):
        for other in wide[number:]:
            yield one * other


def gram(sums: Sequence[float], models: int) -> Gram:
    """The dot products of so many models' tensors, from what was summed of `pairs`; zeros where nothing was."""
    of = iter(sums or [0.0] * (models * (models + 1) // 2))
    products = [[0.0] * models for _ in range(models)]
    for number in range(models):
        for other in range(number, models):
            products[number][other] = products[other][number] = next(of)
    return products


def combined_norm(shares: Sequence[float], products: Gram) -> float:
    """The L2 norm of `sum(s_i * v_i)`, from the dot products of the v_i."""
    square = sum(a * b * products[n][m] for n, a in enumerate(shares) for m, b in enumerate(shares))
    return math.sqrt(max(square, 0.0))
