"""What rounding leaves of a task vector, summed on the way to the disk."""

from __future__ import annotations

import math

import torch

from lines_cli.engine.arithmetic import NAN, TORCH_DTYPES, add_scaled, cast, dot, is_finite
from lines_cli.plan.plan import TensorPlan
from lines_cli.plan.realised import BIN_OF_ONE, NOTHING_REALISED, UNIT_BITS, Forecast, Lost, Realised

_IN_CACHE = 64 * 1024  # entries: in float64 they stay in a core's cache
_ON_CUDA = 2**20  # entries: their temporaries are 24 MB


def realised(
    stored: torch.Tensor, base: torch.Tensor, task_vector: torch.Tensor, *, first: int = 0, every: int = 1
) -> Realised:
    """The sums behind the realised coefficient, in float64, over the entries that are finite in all three.

    Args:
        stored: [n], what is written, in the output dtype.
        base: [n], in the compute dtype.
        task_vector: [n], the same, before it was scaled.
        first: the number of the first of these entries in its tensor.
        every: look at one of so many runs of 16,384 entries of the tensor, and count it for all of them.
    """
    size = len(stored)
    if every == 1:
        step = _IN_CACHE if stored.device.type == "cpu" else _ON_CUDA
        if size <= step:
            return _sums(stored, base, task_vector)
        parts = [slice(at, at + step) for at in range(0, size, step)]
    else:  # runs are counted from the tensor's beginning, wherever it is cut
        begin = first // _RUN
        runs = range(begin + -begin % every, -(-(first + size) // _RUN), every)
        parts = [slice(max(0, run * _RUN - first), (run + 1) * _RUN - first) for run in runs]
    found = NOTHING_REALISED
    for part in parts:
        found += _sums(stored[part], base[part], task_vector[part])
    return found if every == 1 else found.times(every)


def lost(exact: torch.Tensor, stored: torch.Tensor) -> Lost:
    """What storing [n] entries lost of them, in float64, over those that are finite.

    Args:
        exact, stored: [n], in the compute dtype.
    """
    step, found = _IN_CACHE if exact.device.type == "cpu" else _ON_CUDA, Lost()
    for first in range(0, len(exact), step):
        wide = exact[first : first + step].to(torch.float64)
        error = stored[first : first + step].to(torch.float64) - wide
        if not is_finite(error):
            kept = error.isfinite()
            wide, error = wide[kept], error[kept]
        found += Lost(dot(error, error), dot(wide, wide))
    return found


def every_for(tensor: TensorPlan) -> int:
    """Of how many runs of a tensor one is looked at: of large ones inside the blocks one in eight. Updates go through
    all of these; those of embeddings may lie in a few rows.
    """
    return 8 if tensor.place is not None and tensor.info.numel > _LARGE else 1


_RUN, _LARGE = 16 * 1024, 2 * 2**20  # entries; an update of 114,688 in a row is seen


def _sums(stored: torch.Tensor, base: torch.Tensor, task_vector: torch.Tensor) -> Realised:
    difference = stored.to(base.dtype, copy=True).sub_(base)
    wide, tau = difference.to(torch.float64), task_vector.to(torch.float64)
    product, squares = dot(wide, tau), dot(tau, tau)
    if not math.isfinite(product + squares):
        finite = wide.isfinite() & tau.isfinite()
        if not bool(finite.all()):
            return _sums(stored[finite], base[finite], task_vector[finite])
    signs = torch.sign(difference)
    return Realised(product, squares, int(dot(signs, signs)), len(stored))  # whole numbers far below 2**24: exact


def forecast(base: torch.Tensor, fine_tuned: torch.Tensor, *, coefficient: float, dtype: str) -> Forecast:
    """What rounding to nearest would leave of an edit, by the arithmetic of the edit.

    Args:
        base, fine_tuned: [n], in the compute dtype.
        coefficient: exact in it; 0 and 1 are copies.
        dtype: of the output, as safetensors names it.
    """
    step = _IN_CACHE if base.device.type == "cpu" else _ON_CUDA
    found = Forecast()
    for first in range(0, len(base), step):
        part = slice(first, first + step)
        found += _forecast(base[part], fine_tuned[part], coefficient, TORCH_DTYPES[dtype])
    return found


def _forecast(base: torch.Tensor, fine_tuned: torch.Tensor, coefficient: float, dtype: torch.dtype) -> Forecast:
    tau, stored = fine_tuned - base, torch.empty(len(base), dtype=dtype, device=base.device)
    cast(fine_tuned if coefficient == 1 else add_scaled(base, tau, coefficient), stored)
    found = realised(base if coefficient == 0 else stored, base, tau)  # an edit does not measure the base's copies
    return Forecast(found, _units(base, fine_tuned, stored))


def _units(base: torch.Tensor, fine_tuned: torch.Tensor, rounded: torch.Tensor) -> dict[int, int]:
    """How far entries moved, in numbers of the output dtype; `rounded` is overwritten."""
    places = []
    wide = torch.int32 if rounded.element_size() == 2 else torch.int64
    for values in (base, fine_tuned):
        cast(values, rounded)
        bits = rounded.view(NAN[rounded.dtype][0]).to(wide)
        least = -(2 ** (8 * rounded.element_size() - 1))
        places.append(torch.where(bits < 0, least - bits, bits))  # in order, both zeros in one place
    moved = (places[0] - places[1]).abs_()
    if not (is_finite(base) and is_finite(fine_tuned)):
        moved = moved[base.isfinite() & fine_tuned.isfinite()]
    bins = (moved.to(torch.float32).view(torch.int32) >> UNIT_BITS).sub_(BIN_OF_ONE - 1).clamp_(0)  # `unit_bin`
    counts = torch.bincount(bins).tolist()
    return {number: entries for number, entries in enumerate(counts) if entries}
