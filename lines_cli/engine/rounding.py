"""Stochastic rounding to the output dtype: up or down by a seeded draw, so that it is right on average.

A value between two neighbours that the output dtype can hold goes to the upper one with a probability that is equal to
the fraction of the way it has gone (Gupta 2015, arXiv 1502.02551, section 2.1), so its expected value is itself.
Rounding to nearest (`arithmetic.cast`) is closer entry by entry; but where an update is about one unit in the last
place it drops all updates of a layer or keeps all whole, and so undoes the scaling.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

import torch

from lines_cli.engine.arithmetic import cast
from lines_cli.methods.sparsify import RNG_BLOCK, Where, random_numbers


@dataclass(frozen=True, slots=True)
class _Format:
    """A float dtype: its bits as an integer dtype, and how many of them are the fraction's."""

    bits: torch.dtype
    fraction: int


_FORMATS = {
    torch.float64: _Format(torch.int64, 52),
    torch.float32: _Format(torch.int32, 23),
    torch.float16: _Format(torch.int16, 10),
    torch.bfloat16: _Format(torch.int16, 7),
}


def cast_at_random(
    values: torch.Tensor, out: torch.Tensor, *, seed: int, where: Where, settled: torch.Tensor | None = None
) -> None:
    """Write `values` into `out`, each rounded to one of its two neighbours by a draw.

    What is drawn depends on the seed, the tensor's name and the entry's place in it, and on nothing else: not on
    chunks, workers, files or devices. Nothing is drawn for an entry that `out` can hold exactly, nor for NaN and Inf;
    nor beyond the largest finite value, where there is no upper neighbour. These are rounded to nearest.

    Args:
        values: [n], float32 or float64.
        out: [n], the output dtype. One that is no narrower holds every value exactly.
        seed: a whole number.
        where: which entries these are.
        settled: [n], boolean: entries that are rounded to nearest, whatever they are.
    """
    cast(values, out)
    source, target = _FORMATS[values.dtype], _FORMATS[out.dtype]
    dropped = source.fraction - target.fraction
    if dropped <= 0 or values.numel() == 0:
        return
    drawn = _drawn(values.numel(), seed, where).to(values.device)
    rounded = _with_carry(values, dropped, drawn, seed, where)
    smallest = torch.finfo(out.dtype).smallest_normal
    if smallest > torch.finfo(values.dtype).smallest_normal:
        _round_small(values, rounded, smallest, 2.0**-target.fraction, drawn, seed, where)
    largest = torch.finfo(out.dtype).max
    low, high = (float(end) for end in torch.aminmax(values))
    if not (-largest <= low and high <= largest):  # NaN shows in both
        beyond = ~(values.abs() <= largest)
        settled = beyond if settled is None else settled | beyond
    if settled is not None:
        rounded = torch.where(settled, out.to(rounded.dtype), rounded)
    out.copy_(rounded)  # exact: every entry is one that it can hold


def _drawn(numel: int, seed: int, where: Where) -> torch.Tensor:
    """A number from 0 to 2**16 - 1 for each entry: [numel], int32, on the CPU."""
    numbers = torch.empty(numel, dtype=torch.int32)
    done = 0
    while done < numel:
        block, skip = divmod(where.first + done, RNG_BLOCK)
        # No sparsifier's key looks like this: a mask and the rounding of what it keeps are independent.
        drawn, _ = random_numbers(f"{seed}\0rounding\0{block}\0{where.tensor}")
        drawn = drawn[skip : skip + numel - done]
        numbers[done : done + len(drawn)].copy_(drawn)
        done += len(drawn)
    return numbers.add_(2**15)


def _with_carry(values: torch.Tensor, dropped: int, drawn: torch.Tensor, seed: int, where: Where) -> torch.Tensor:
    """Add random bits to the bits that are to go, and drop these: whatever carries into the bits that stay rounds up.

    Args:
        values: [n].
        dropped: how many bits of the fraction go.
        drawn: [n], 16 random bits each.
        seed, where: for more bits, where 16 do not decide.

    Returns:
        [n], the values' dtype. Wrong below the smallest normal number of the output dtype, if that is not the values'.
    """
    bits = values.view(_FORMATS[values.dtype].bits)
    if dropped <= 16:
        added = drawn if dropped == 16 else drawn >> (16 - dropped)
        bits = bits + added
    else:
        more = dropped - 16
        added = drawn.to(bits.dtype) << more
        rest = bits & (2**more - 1)
        undecided = (((bits >> more) & (2**16 - 1)) + drawn == 2**16 - 1) & (rest != 0)
        for entry in undecided.nonzero().flatten().tolist():  # one in 65,536
            added[entry] += _more_bits(seed, where, entry) >> (64 - more)
        bits = bits + added
    kept: torch.Tensor = bits & -(2**dropped)
    return kept.view(values.dtype)


def _round_small(
    values: torch.Tensor,
    rounded: torch.Tensor,
    smallest: float,
    step: float,
    drawn: torch.Tensor,
    seed: int,
    where: Where,
) -> None:
    """Round what is below the smallest normal number of the output dtype, where its numbers are equally far apart.

    Args:
        values: [n].
        rounded: [n], the same dtype; overwritten in those entries.
        smallest: that normal number.
        step: how far apart, as a multiple of it.
        drawn, seed, where: as in `_with_carry`.
    """
    small = ((values.abs() < smallest) & (values != 0)).nonzero().flatten()
    if len(small) == 0:
        return
    steps = values[small].to(torch.float64).abs_() / (smallest * step)
    whole = steps.floor()
    share = (steps - whole) * 2**16
    first = share.floor()
    rest = share - first
    reached = first.to(torch.int64) + drawn[small]
    up = reached >= 2**16
    for number in ((reached == 2**16 - 1) & (rest > 0)).nonzero().flatten().tolist():
        up[number] = float(rest[number]) > _more_bits(seed, where, int(small[number])) / 2**64
    chosen = ((whole + up) * (smallest * step)).to(values.dtype)
    rounded[small] = chosen.copysign(values[small])


def _more_bits(seed: int, where: Where, entry: int) -> int:
    """64 random bits for one entry."""
    key = f"{seed}\0rounding more\0{where.first + entry}\0{where.tensor}"
    return int.from_bytes(blake2b(key.encode(), digest_size=8).digest(), "little")
