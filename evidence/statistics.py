"""Means with their errors, paired tests, and curves compared at equal height: plain numbers in, plain numbers out."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

EXACT = 12  # up to so many pairs every flip of signs is tried
DRAWS = 4000  # of flips, with more pairs


@dataclass(frozen=True)
class Paired:
    """Differences of pairs.

    Attributes:
        mean: of the differences.
        error: standard error of that mean; None of one pair.
        positive: how many are above zero.
        pairs: how many there are.
        p: how often flipping signs at random gives a mean as far from zero; two-sided.
    """

    mean: float
    error: float | None
    positive: int
    pairs: int
    p: float

    @property
    def beyond_noise(self) -> bool:
        """Whether chance gives as much in fewer than one of twenty cases."""
        return self.p < 0.05


def paired(differences: Sequence[float]) -> Paired:
    """A test by flipping signs: if neither side is better, each difference might as well be its opposite."""
    count = len(differences)
    mean = fmean(differences)
    error = stdev(differences) / count**0.5 if count > 1 else None
    if count <= EXACT:
        flips = itertools.product((1, -1), repeat=count)
    else:
        draw = random.Random(0)  # noqa: S311 - the same page from the same data
        flips = (tuple(draw.choice((1, -1)) for _ in differences) for _ in range(DRAWS))  # type: ignore[assignment]
    means = [fmean(sign * each for sign, each in zip(signs, differences, strict=True)) for signs in flips]
    as_far = sum(abs(each) >= abs(mean) - 1e-9 for each in means)
    p = as_far / len(means) if count <= EXACT else (as_far + 1) / (len(means) + 1)
    return Paired(mean, error, sum(each > 0 for each in differences), count, p)


Curve = Sequence[tuple[float, float]]  # target, control; from the pre-trained end to the fine-tuned


def at_target(curve: Curve, target: float) -> float:
    """The control where a curve first reaches a target, with straight lines between its points; if it never does, at
    its greatest target.
    """
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if x0 >= target:
            return y0
        if x1 >= target:
            return y0 + (y1 - y0) * (target - x0) / (x1 - x0)
    return max(curve)[1]


def lead(curve: Curve, baseline: Curve) -> float:
    """How much more control a curve has than a baseline at the same target: mean over the curve's points."""
    return fmean(control - at_target(baseline, target) for target, control in curve)


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's: Pearson's of the ranks, ties sharing theirs; 0 where one side is constant."""
    ranks = [_ranks(values) for values in (one, other)]
    means = [fmean(each) for each in ranks]
    left, right = ([value - mean for value in each] for each, mean in zip(ranks, means, strict=True))
    size = (sum(value * value for value in left) * sum(value * value for value in right)) ** 0.5
    return sum(a * b for a, b in zip(left, right, strict=True)) / size if size else 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    return [
        sum(other < value for other in values) + (sum(other == value for other in values) + 1) / 2 for value in values
    ]
