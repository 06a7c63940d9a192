"""Means with their errors, paired tests over seeds, and curves compared at equal height: plain numbers in and out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

FEWEST = 3  # seeds, below which nothing is tested
STEPS = 100  # targets at which two curves are compared


@dataclass(frozen=True)
class Paired:
    """Differences of pairs, each of one seed.

    Attributes:
        mean: over seeds, of the means of each.
        error: standard error of that mean; None of one seed.
        positive: how many pairs are above zero.
        equal: how many are zero.
        pairs: how many there are.
        seeds: of how many seeds.
        p: of a t-test that the means of seeds are zero, two-sided; None of fewer than three, and where they are all one
            number that is not zero, of which no test can tell.
    """

    mean: float
    error: float | None
    positive: int
    equal: int
    pairs: int
    seeds: int
    p: float | None

    @property
    def beyond_noise(self) -> bool:
        """Whether chance gives as much in fewer than one of twenty cases."""
        return self.p is not None and self.p < 0.05


def paired(differences: Iterable[tuple[int, float]]) -> Paired:
    """A test over seeds: what one seed deals and trains is in all of its pairs, so that they count once.

    Args:
        differences: (seed, difference), at least one.
    """
    pairs = list(differences)
    of_seed: dict[int, list[float]] = defaultdict(list)
    for seed, difference in pairs:
        of_seed[seed].append(difference)
    means = [fmean(own) for own in of_seed.values()]
    deviation = stdev(means) if len(means) > 1 else None
    p = None
    if deviation is not None and len(means) >= FEWEST:
        from scipy import stats  # takes seconds

        if deviation > 1e-12:
            p = float(stats.ttest_1samp(means, 0.0).pvalue)
        elif abs(fmean(means)) < 1e-12:
            p = 1.0
    return Paired(
        mean=fmean(means),
        error=None if deviation is None else deviation / len(means) ** 0.5,
        positive=sum(difference > 1e-9 for _, difference in pairs),
        equal=sum(abs(difference) <= 1e-9 for _, difference in pairs),
        pairs=len(pairs),
        seeds=len(means),
        p=p,
    )


def together(tests: Mapping[str, Paired]) -> dict[str, Paired]:
    """Several tests that one sentence speaks of, the p of each corrected for all; as they are, where one has none."""
    known = [test.p for test in tests.values() if test.p is not None]
    if len(known) < len(tests):
        return dict(tests)
    return {name: replace(test, p=p) for (name, test), p in zip(tests.items(), corrected(known), strict=True)}


def corrected(values: Sequence[float]) -> list[float]:
    """Values of p of several tests, each as large as it is for all of them together (Holm 1979)."""
    adjusted, least = [0.0] * len(values), 0.0
    for rank, at in enumerate(sorted(range(len(values)), key=lambda at: values[at])):
        least = max(least, min(1.0, values[at] * (len(values) - rank)))
        adjusted[at] = least
    return adjusted


Curve = Sequence[tuple[float, float]]  # target, control; from the pre-trained end to the fine-tuned


def at_target(curve: Curve, target: float) -> float | None:
    """The control where a curve reaches a target, with straight lines between its points: the mean of the first time
    and the last; None if it never does.
    """
    found = []
    for (x0, y0), (x1, y1) in itertools.pairwise(curve):
        if min(x0, x1) <= target <= max(x0, x1):
            found += [y0, y1] if x0 == x1 else [y0 + (y1 - y0) * (target - x0) / (x1 - x0)]
    found += [y for x, y in curve if x == target and len(curve) == 1]
    return (found[0] + found[-1]) / 2 if found else None


def common(curve: Curve, other: Curve) -> tuple[float, float]:
    """The lowest and the highest target that both curves reach; where they have none in common the first is larger."""
    low = max(min(target for target, _ in each) for each in (curve, other))
    high = min(max(target for target, _ in each) for each in (curve, other))
    return low, high


def lead(curve: Curve, baseline: Curve) -> float | None:
    """How much more control a curve has than a baseline, in the mean over the targets that both reach; None if they
    have none in common. The other way round it is the opposite.
    """
    low, high = common(curve, baseline)
    if low > high:
        return None
    differences = []
    for step in range(STEPS + 1):
        target = low + (high - low) * step / STEPS if step < STEPS else high
        own, other = at_target(curve, target), at_target(baseline, target)
        if own is not None and other is not None:
            differences.append(own - other)
    return fmean(differences) if differences else None


def correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's; 0 where one side is constant."""
    if len(set(one)) < 2 or len(set(other)) < 2:
        return 0.0
    from scipy import stats

    found = float(stats.spearmanr(one, other).statistic)
    return 0.0 if math.isnan(found) else found
