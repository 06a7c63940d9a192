"""What a merged task vector is calibrated by, whatever method made it: `calibrate` of a recipe.

It stands between the method and the scaling over depth: what it makes is what `lambda` and LiNeS scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lines_cli.methods.spectrum import (
    each_matrix,
    is_matrix,
    scale_of,
    spectrum_of,
    workspace,
    workspace_in_float64,
)

if TYPE_CHECKING:
    from torch import Tensor

_EQUAL = 1e-6
"""Singular values that differ by at most this share of the largest one are the same."""
_SILENT = 1e-6
"""A task whose response along a direction is at most this share of its norm does not respond."""
_COLUMNS = 512  # of a task that are held in float64 at a time


@dataclass(frozen=True, slots=True)
class Calibration:
    """A way to calibrate.

    Attributes:
        calibrate: the function: given the merged task vector, and the task vector of each model as it was before
            entries were dropped or weighted, all of one shape, it makes one of the same shape and dtype. It may
            overwrite the merged one alone.
        about: what it is, in a line, with its source.
        paper: that source, an arXiv number.
        use: when to take it.
        changes: whether it changes tensors of a shape at all; of those it sees whole ones.
        workspace: how many bytes it needs beside its input, given a tensor's shape and whether it is in float64.
    """

    calibrate: Callable[[Tensor, Sequence[Tensor]], Tensor]
    about: str
    paper: str
    use: str
    changes: Callable[[Sequence[int]], bool]
    workspace: Callable[[Sequence[int], bool], int]


def svc(merged: Tensor, task_vectors: Sequence[Tensor]) -> Tensor:
    """Singular value calibration (SVC; Li 2026, arXiv 2602.05536, algorithm 1): what tasks have in common is counted
    once. For every left direction u of a matrix `D = U diag(s) V^T`, `s <- g s`; with `a = u^T D`, `a_i = u^T D_i` of
    each of T tasks and `p_i = <a, a_i> / |a_i|^2`, `g = T / sum_i max(1 / T, p_i)`, the published default.

    The paper leaves open, and here it is:

    * A task that changed nothing of the matrix, or whose `a_i` is at most 1e-6 of `|D_i|`, has no `p_i`: it does not
      count for the matrix, or for the direction. Where none counts, nothing changes.
    * Directions whose singular values are the same to 1e-6 of the largest are not told from one another by D; iso_c and
      iso_cts make all of them so. They have one g: `<a, a_i>` and `|a_i|^2` are those of all of them together.
    * Directions whose singular value is zero to rounding, as in `iso_c`, stay as they are.

    A tensor of three axes is a batch of matrices. Any other that is no matrix stays as it is, as in the paper's code.

    The error against exact arithmetic on the same D and D_i, relative to the result by the Frobenius norm, is mostly
    below 1e-9 in float64, and below 1e-5 where singular values are small and close to each other; and what rounding to
    the compute dtype adds.

    Args:
        merged: [out, in], [experts, out, in], or any other shape, in the compute dtype. Overwritten.
        task_vectors: T of the same shape and dtype.

    Returns:
        One of the same shape and dtype. NaN throughout a matrix where one is not finite.
    """
    if not is_matrix(merged):
        return merged
    return each_matrix(lambda matrices: _calibrated(matrices[0], matrices[1:]), [merged, *task_vectors])


def _calibrated(merged: Tensor, task_vectors: Sequence[Tensor]) -> Tensor:
    """D and T of D_i, [out, in] each: the same, of float64 where anything changes."""
    import torch

    spectrum = spectrum_of(merged, eps=torch.finfo(merged.dtype).eps)
    u, s, v = spectrum.triplets(merged, spectrum.rank)
    changed = [tau for tau in task_vectors if tau.any()]
    if not len(s) or not changed:
        return merged
    steps = s[:-1] - s[1:] > _EQUAL * s[0]
    group = torch.cat([steps.new_zeros(1), steps]).cumsum(0)  # of equal singular values, by number
    scale = scale_of(changed)
    total, count = s.new_zeros(len(s)), s.new_zeros(len(s))
    for tau in changed:
        dots, squares, whole = s.new_zeros(len(s)), s.new_zeros(len(s)), 0.0
        for first in range(0, tau.shape[1], _COLUMNS):
            part = slice(first, first + _COLUMNS)
            columns = tau[:, part].double() * scale
            response = u.mT @ columns
            dots += (response * v[part].mT).sum(1)
            squares += response.square_().sum(1)
            whole += float(columns.square_().sum())
        least = _SILENT**2 * whole
        dots, squares = (_over(group, sums) for sums in (dots * (s * (scale / spectrum.scale)), squares))
        responds = squares > least
        share = torch.where(responds, dots / squares.clamp(min=least), 0.0)
        total += torch.where(responds, share.clamp(min=1 / len(changed)), 0.0)
        count += responds
    gain = torch.where(count > 0, count / total.clamp(min=1 / len(changed)), 1.0)
    by = (u * (gain - 1)) @ u.mT if spectrum.wide else (v * (gain - 1)) @ v.mT
    wide = merged.double()
    return wide + (by @ wide if spectrum.wide else wide @ by)


def _over(group: Tensor, values: Tensor) -> Tensor:
    """For each direction the sum over its group: [k]."""
    sums = values.new_zeros(int(group[-1]) + 1).index_add_(0, group, values)
    return sums[group]


def _workspace(shape: Sequence[int], in_float64: bool) -> int:
    """Bytes: U and V, the matrix in float64, what is added and the result; a part of a task; of the rest what finds the
    directions.
    """
    if len(shape) not in (2, 3) or 0 in shape:
        return 0
    rows, columns = shape[-2:]
    r = min(rows, columns)
    own = 8 * (r * (rows + columns) + 3 * rows * columns + r * r + (rows + 2 * r) * _COLUMNS)
    return own + (workspace_in_float64(shape) if in_float64 else workspace(shape))


CALIBRATIONS: Mapping[str, Calibration] = {
    "svc": Calibration(
        svc,
        "Singular values over which tasks agree are scaled back, so that what they have in common counts once "
        "(SVC, Li 2026).",
        paper="2602.05536",
        use="on top of sums of many tasks; it gained most on task arithmetic and DARE, less on spectral methods",
        changes=lambda shape: len(shape) in (2, 3) and math.prod(shape) > 0,
        workspace=_workspace,
    ),
}
