"""DARE (Yu 2024, arXiv 2311.03099): drop entries at random, rescale the rest.

Which entries are dropped depends on the seed, the model's place in the recipe, the tensor's name and the entry's
place in it, and on nothing else: not on chunks, workers, files or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from lines_cli.methods.sums import sparse, task_arithmetic
from lines_cli.methods.ties import Agreement, ties

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64 * 1024
"""Entries that are drawn from one generator: torch's cannot jump ahead."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which entries a method is given: the tensor's name, and the first one's number in it."""

    tensor: str
    first: int


def random_masks(
    task_vectors: Sequence[Tensor], *, density: Sequence[float], seed: float, where: Where
) -> list[Tensor] | None:
    """1 with probability `density`, else 0: the drop of DARE.

    Args:
        task_vectors: N of [n]; only their number, length, dtype and device count.
        density: N. If all are 1 there are no masks.
        seed: a whole number.
        where: which entries these are.
    """
    if all(share == 1 for share in density):
        return None
    return [
        _mask(tau, share, int(seed), model, where)
        for model, (tau, share) in enumerate(zip(task_vectors, density, strict=True))
    ]


def _mask(like: Tensor, density: float, seed: int, model: int, where: Where) -> Tensor:
    import torch

    if density == 1:
        return torch.ones_like(like)
    drawn = torch.empty(len(like), dtype=torch.float32)
    done = 0
    while done < len(like):
        block, skip = divmod(where.first + done, BLOCK)
        fresh = _draw(seed, model, where.tensor, block)[skip : skip + len(like) - done]
        drawn[done : done + len(fresh)] = fresh
        done += len(fresh)
    # 24 random bits in [0, 1): each is below `density` with a probability within 2**-24 of it.
    return drawn.lt_(density).to(device=like.device, dtype=like.dtype)


def _draw(seed: int, model: int, tensor: str, block: int) -> Tensor:
    """[BLOCK] numbers in [0, 1), always from the CPU's generator: CUDA's gives others."""
    import torch

    key = blake2b(f"{seed}\0{model}\0{block}\0{tensor}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key, "little", signed=True))
    return torch.rand(BLOCK, generator=generator)


def dare_linear(
    task_vectors: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    weight: Sequence[float],
    factor: Sequence[float],
    normalize: bool = False,
) -> Tensor:
    """Task arithmetic over what is left of each task vector, rescaled by its `factor`."""
    return task_arithmetic(sparse(task_vectors, masks, factor), weight=weight, normalize=normalize)


def dare_ties(
    task_vectors: Sequence[Tensor],
    *,
    masks: Sequence[Tensor] | None = None,
    weight: Sequence[float],
    factor: Sequence[float],
    agreement: Agreement = "sum",
) -> Tensor:
    """TIES over what is left of each task vector, rescaled by its `factor`; a zero sum counts as plus."""
    return ties(sparse(task_vectors, masks, factor), weight=weight, agreement=agreement)
