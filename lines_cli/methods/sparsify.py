"""Which entries of a task vector are dropped before they are merged: by their magnitude, or by a seeded draw.

What is dropped becomes 0. Nothing here loads torch before it is called.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Conflict, Note, Remark, Said, Settled, Values

Bounds = tuple[float, ...]
"""The magnitudes, in float32, between which a model's entries are kept: the least, and perhaps the greatest; none keeps
all.
"""
Ranks = tuple[int, ...]
"""Which places among the magnitudes of n entries, 1 for the largest, are those of the `Bounds`."""


@dataclass(frozen=True, slots=True)
class ByMagnitude:
    """Entries are kept whose magnitudes lie between two ranks, all those included that lie exactly on a bound.

    Attributes:
        ranks: for a tensor's values and a number of entries: for each model which magnitudes it asks for.
        of_model: whether the ranks count over a model's whole task vector; otherwise over each tensor.
        drops: whether anything is dropped with these values.
        apply: sets to 0 what lies outside the bounds, in place; None leaves that to the method's function.
    """

    ranks: Callable[[Values, int], tuple[Ranks, ...]]
    of_model: Callable[[Values], bool]
    drops: Callable[[Values], bool]
    apply: Callable[[Sequence[Tensor], Sequence[Bounds]], object] | None


@dataclass(frozen=True, slots=True)
class Drawn:
    """Entries are kept at random.

    Attributes:
        masks: for task vectors ([n] each, or in the tensor's shape where the method sees that whole), a tensor's
            values, and where these entries stand: for each model what an entry is multiplied by, 0.0 where it is
            dropped (their shape, dtype and device), or None where all are kept.
    """

    masks: Callable[[Sequence[Tensor], Values, Where], Iterable[Tensor | None]]


# --- by magnitude ---


def rank(density: float, numel: int) -> int:
    """How many of `numel` entries a density keeps (TIES, as published), those apart that share the last place."""
    return max(1, int(density * numel))


def largest(values: Values, numel: int) -> tuple[Ranks, ...]:
    """The trim of TIES: each model's `density` says the share of entries that are kept, the largest."""
    return tuple(() if density == 1 else (rank(density, numel),) for density in values["density"])


def trims_globally(values: Values) -> bool:
    """Whether `trim` says global."""
    return bool(values["trim"] == "global")


def any_dropped(values: Values) -> bool:
    """Whether any model's `density` is below 1."""
    return any(density != 1 for density in values["density"])


def keep_between(task_vectors: Sequence[Tensor], bounds: Sequence[Bounds]) -> Sequence[Tensor]:
    """Set to 0 what lies outside each model's bounds. Every entry that lies exactly on one is kept. NaN is larger than
    all else, so a greatest magnitude drops it.

    Args:
        task_vectors: N of [n]; overwritten.
        bounds: N; or none, which keeps all.
    """
    if not bounds:
        return task_vectors
    trim(task_vectors, threshold=[bound[0] if bound else None for bound in bounds])
    for tau, bound in zip(task_vectors, bounds, strict=True):
        if len(bound) > 1 and not math.isnan(bound[1]):
            magnitudes = tau.abs().float()  # to which the bounds are rounded
            tau.masked_fill_(~(magnitudes <= bound[1]), 0)
    return task_vectors


def trim(task_vectors: Sequence[Tensor], *, threshold: Sequence[float | None]) -> Sequence[Tensor]:
    """Set to 0 what is smaller in magnitude than the threshold of its model: the trim of TIES (Yadav 2023, arXiv
    2306.01708, section 4.2, step 1). Every entry that lies exactly on the threshold is kept. NaN is larger than all
    else.

    Args:
        task_vectors: N of [n]; overwritten.
        threshold: N magnitudes in float32, to which those of float64 are rounded; None keeps all, as does no threshold.
    """
    import torch

    for tau, least in zip(task_vectors, threshold, strict=bool(threshold)):
        if not least:
            continue
        if math.isnan(least):  # which is the largest
            tau.masked_fill_(~tau.isnan(), 0)
        elif tau.dtype == torch.float32:
            torch.hardshrink(tau, _before(least), out=tau)  # keeps what is larger than the number before
        else:
            tau.masked_fill_(tau.abs().to(torch.float32) < least, 0)
    return task_vectors


def _before(magnitude: float) -> float:
    """The next smaller float32 of one above 0."""
    (bits,) = struct.unpack("<I", struct.pack("<f", magnitude))
    (before,) = struct.unpack("<f", struct.pack("<I", bits - 1))
    return float(before)


LARGEST = ByMagnitude(largest, trims_globally, any_dropped, keep_between)
"""Keeps the largest share of each model's entries."""


# --- at random ---

RNG_BLOCK = 64 * 1024
"""Entries that are drawn from one generator: torch's cannot jump ahead. A multiple of 4."""


@dataclass(frozen=True, slots=True)
class Where:
    """Which entries a method is given: the tensor's name, and the first one's number in it."""

    tensor: str
    first: int


def random_masks(
    task_vectors: Sequence[Tensor], *, density: Sequence[float], seed: float, where: Where
) -> list[Tensor | None]:
    """1 with probability `density`, else 0: the drop of DARE (Yu 2024, arXiv 2311.03099); None for a model that keeps
    all. What is drawn depends on the seed, the model's place in the recipe, the tensor's name and the entry's place in
    it, and on nothing else: not on chunks, workers, files or devices.

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
        block, skip = divmod(where.first + done, RNG_BLOCK)
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
    of them keep it.

    A density lies between two of the 2**16 steps as a rule: some blocks take the one, the others the next, so that an
    entry is kept with the very probability that was asked for (within 2**-48).
    """
    drawn, rest = random_numbers(f"{seed}\0{model}\0{block}\0{tensor}")
    return drawn, int(density * 2**16 + rest / 2**32)


def random_numbers(key: str) -> tuple[Tensor, int]:
    """What a key gives, always the same: for each entry of a block one of 2**16 numbers, from -2**15 on, that are
    equally likely ([RNG_BLOCK], int16, on the CPU: CUDA's generator gives others); and 32 random bits more.
    """
    import torch

    digest = blake2b(key.encode(), digest_size=12).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    # 64 random bits at a time, for four entries
    drawn = torch.empty(RNG_BLOCK // 4, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return drawn.view(torch.int16), int.from_bytes(digest[8:], "little")


SEEDED = Drawn(
    lambda task_vectors, values, where: random_masks(
        task_vectors, density=values["density"], seed=values["seed"], where=where
    )
)
"""Keeps each entry with the probability that its model's `density` says."""


# --- the parameters, and what is said of them ---

DENSITY = Parameter(1.0, "share of entries kept", per_model=True, low=0, high=1)
TRIM = Parameter(
    "global",
    "what the density is a share of: the whole model, as published; or each tensor, as in mergekit",
    varies=False,
    choices={"global": "global", "tensor": "tensor"},
)
RESCALE = Parameter(
    "density",
    "what is kept is multiplied by 1/density, as published; or restores the tensor's L1 norm (l1 or true, as in "
    "mergekit); or stays (false)",
    varies=False,
    choices={"density": "density", "l1": "l1", True: "l1", False: False},
)
RESCALE_TRIMMED = Parameter(
    False,
    "restore the tensor's L1 norm after trimming (l1 or true), as mergekit can",
    varies=False,
    choices={False: False, "l1": "l1", True: "l1"},
)
SEED = Parameter(0.0, "of the random choice", varies=False, low=0, high=2**53, whole=True)


def norms_to_restore(values: Values) -> frozenset[Any]:
    """The L1 norms, where `rescale` is to restore them and anything is dropped."""
    return frozenset({"l1"} if values["rescale"] == "l1" and any_dropped(values) else ())


def factors(values: Values, l1: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """What each model's kept entries are multiplied by, as `rescale` says.

    Args:
        values: a tensor's.
        l1: for each model the tensor's L1 norm before and after entries were dropped.
    """
    if values["rescale"] == "density":
        return tuple(1 / density if density else 1.0 for density in values["density"])
    if values["rescale"] == "l1" and l1:
        return tuple(before / after if after else 1.0 for before, after in l1)
    return (1.0,) * len(values["density"])  # nothing is dropped, or what is kept stays


def review_trim(said: Said, *shares: str, default: str | None = None) -> list[Remark]:
    """What `trim` and the shares that it is of come to: one threshold for a whole model needs one share for it.

    Args:
        said: by the recipe.
        shares: the parameters that say what is kept.
        default: a note on the default, for where nothing is said of it.
    """
    drops = any(density != 1 for density in said.values("density"))
    varying = [share for share in shares if said.varies(share)]
    open_ = "trim" not in said.top
    remarks: list[Remark] = []
    if drops and varying and said.top.get("trim") == "global":
        what = f"one {varying[0]} for the whole model is needed to trim globally; trim: tensor takes one for each"
        remarks.append(Conflict(what, "trim"))
    elif drops and varying and open_ and said.parameters["trim"].default == "global":
        remarks.append(Note(f"{varying[0]} varies, so each tensor is trimmed by itself (trim: tensor)"))
    elif drops and open_ and default:
        remarks.append(Note(default))
    if varying and open_:
        remarks.append(Settled("trim", "tensor"))
    return remarks
