"""What rounding leaves of a task vector, summed on the way to the disk."""

from __future__ import annotations

import math

import torch

from lines_cli.engine.arithmetic import dot
from lines_cli.plan.realised import NOTHING_REALISED, Realised

_IN_CACHE = 64 * 1024  # entries: in float64 they stay in a core's cache
_ON_CUDA = 2**20  # entries: their temporaries are 24 MB


def realised(stored: torch.Tensor, base: torch.Tensor, task_vector: torch.Tensor) -> Realised:
    """The sums behind the realised coefficient, in float64, over the entries that are finite in all three.

    Args:
        stored: [n], what is written, in the output dtype.
        base: [n], in the compute dtype.
        task_vector: [n], the same, before it was scaled.
    """
    step = _IN_CACHE if stored.device.type == "cpu" else _ON_CUDA
    found = NOTHING_REALISED
    for first in range(0, len(stored), step):
        part = slice(first, first + step)
        found += _sums(stored[part], base[part], task_vector[part])
    return found


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
