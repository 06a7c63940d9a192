"""DARE (Yu 2024, arXiv 2311.03099): drop entries at random, rescale the rest.

Which entries are dropped depends on the seed, the model's place in the recipe, the tensor's name and the entry's
place in it, and on nothing else: not on chunks, workers, files or devices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from lines_cli.methods.sums import scaled, task_arithmetic
from lines_cli.methods.ties import Agreement, ties

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = 64 * 1024
"""Entries that are drawn from one generator: torch's cannot jump ahead. A multiple of 4."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which entries a method is given: the tensor's name, and the first one's number in it."""

    tensor: str
    first: int


def random_masks(
    task_vectors: Sequence[Tensor], *, density: Sequence[float], seed: float, where: Where
) -> list[Tensor | None]:
    """1 with probability `density`, else 0: the drop of DARE; None for a model that keeps all.

    Args:
        task_vectors: N of [n]; only their number, length, dtype and device count.
        density: N.
        seed: a whole number.
        where: which entries these are.
    """
    return [
        None if share == 1 else _mask(tau, share, int(seed), model, where)
        for model, (tau, share) in enumerate(zip(task_vectors, density, strict=True))
    ]


def _mask(like: Tensor, density: float, seed: int, model: int, where: Where) -> Tensor:
    import torch

    mask = torch.empty(len(like), dtype=like.dtype)
    done = 0
    while done < len(like):
        block, skip = divmod(where.first + done, BLOCK)
        drawn, steps = _draw(density, seed, model, where.tensor, block)
        drawn = drawn[skip : skip + len(like) - done]
        part = mask[done : done + len(drawn)]
        if steps < 2**16:
            torch.lt(drawn, steps - 2**15, out=part)
        else:  # the number after the last has no 16 bits
            part.fill_(1)
        done += len(drawn)
    return mask.to(like.device)


def _draw(density: float, seed: int, model: int, tensor: str, block: int) -> tuple[Tensor, int]:
    """For each entry of a block one of 2**16 numbers, from -2**15 on, that are equally likely; and the first how many
    of them keep it. Always from the CPU's generator: CUDA's gives others.

    A density lies between two of the 2**16 steps as a rule: some blocks take the one, the others the next, so that an
    entry is kept with the very probability that was asked for (within 2**-48).
    """
    import torch

    key = blake2b(f"{seed}\0{model}\0{block}\0{tensor}".encode(), digest_size=12).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little", signed=True))
    # 64 random bits at a time, for four entries
    drawn = torch.empty(BLOCK // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    steps = int(density * 2**16 + int.from_bytes(key[8:], "little") / 2**32)
    return drawn.view(torch.int16), steps


def dare_linear(
    task_vectors: Sequence[Tensor], *, weight: Sequence[float], factor: Sequence[float], normalize: bool = False
) -> Tensor:
    """Task arithmetic over what is left of each task vector, rescaled by its `factor`."""
    return task_arithmetic(scaled(task_vectors, factor), weight=weight, normalize=normalize)


def dare_ties(
    task_vectors: Sequence[Tensor],
    *,
    weight: Sequence[float],
    factor: Sequence[float],
    agreement: Agreement = "sum",
) -> Tensor:
    """TIES over what is left of each task vector, rescaled by its `factor`; a zero sum counts as plus."""
    return ties(task_vectors, weight=weight, factor=factor, agreement=agreement)
