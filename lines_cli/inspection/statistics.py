"""What the numbers in checkpoints say, as far as `lines inspect` tells it: sums over tensors, which add up to sums over
layers and models. Plain values, without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lines_cli.plan.realised import Forecast
from lines_cli.plan.statistics import Norms


@dataclass(frozen=True, slots=True)
class UpdateStats:
    """What one fine-tune changed: sums in float64 over the entries that are finite on both sides. Two of them add up.

    Attributes:
        numel: how many those are.
        squares: of the update: the sum of `(ft - base)**2`.
        base_squares: the same of the base's entries.
        unchanged: how many entries are equal.
        largest: the greatest `|ft - base|`.
    """

    numel: int = 0
    squares: float = 0.0
    base_squares: float = 0.0
    unchanged: int = 0
    largest: float = 0.0

    def __add__(self, other: UpdateStats) -> UpdateStats:
        return UpdateStats(
            self.numel + other.numel,
            self.squares + other.squares,
            self.base_squares + other.base_squares,
            self.unchanged + other.unchanged,
            max(self.largest, other.largest),
        )


@dataclass(frozen=True, slots=True)
class Interference:
    """How the updates of several fine-tunes go together, over the entries that are finite in all. Two of them add up.

    Attributes:
        numel: how many those are.
        squares: of each model's update: the sum of squares.
        products: for each pair of models, (0, 1), (0, 2), ..., (1, 2), ...: the dot product of their updates.
        opposed: for each pair, how many entries one increases and the other decreases.
        disagreeing: how many entries any one increases and any other decreases.
        sum_squares, sum_l1: of the sum of all updates: the sum of squares and of magnitudes.
    """

    numel: int
    squares: tuple[float, ...]
    products: tuple[float, ...]
    opposed: tuple[int, ...]
    disagreeing: int
    sum_squares: float
    sum_l1: float

    def __add__(self, other: Interference) -> Interference:
        return Interference(
            self.numel + other.numel,
            tuple(a + b for a, b in zip(self.squares, other.squares, strict=True)),
            tuple(a + b for a, b in zip(self.products, other.products, strict=True)),
            tuple(a + b for a, b in zip(self.opposed, other.opposed, strict=True)),
            self.disagreeing + other.disagreeing,
            self.sum_squares + other.sum_squares,
            self.sum_l1 + other.sum_l1,
        )


@dataclass(frozen=True, slots=True)
class ValueStats:
    """What entries of one checkpoint hold. Two of them add up.

    Attributes:
        numel: how many.
        nan, inf: how many are not finite.
        low, high: the least and the greatest of those that are; inf and -inf if none is.
        bits: the sum of their bytes, read as whole numbers: equal tensors have equal ones.
    """

    numel: int = 0
    nan: int = 0
    inf: int = 0
    low: float = math.inf
    high: float = -math.inf
    bits: int = 0

    def __add__(self, other: ValueStats) -> ValueStats:
        return ValueStats(
            self.numel + other.numel,
            self.nan + other.nan,
            self.inf + other.inf,
            min(self.low, other.low),
            max(self.high, other.high),
            self.bits + other.bits,
        )


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        changes: tensor -> what each fine-tune changed of it.
        forecasts: tensor -> what rounding would leave of the scaled update; of one fine-tune.
        joint: tensor -> how they go together; empty for one fine-tune.
        seen: (checkpoint, tensor) -> what it holds; checkpoints as in `Inspection.checkpoints`.
        same: for each checkpoint, groups of tensors that hold the same bytes.
        norms: what a merge's `alpha: auto` rests on, where that was measured.
        scores: what depth rules asked for, where that was measured (`Statistics.scores`).
        files: for each output of ours how many files its recipe recorded, and those that differ -> how.
        bytes_read, seconds: of the pass.
    """

    changes: Mapping[str, tuple[UpdateStats, ...]] = field(default_factory=dict)
    forecasts: Mapping[str, Forecast] = field(default_factory=dict)
    joint: Mapping[str, Interference] = field(default_factory=dict)
    seen: Mapping[tuple[int, str], ValueStats] = field(default_factory=dict)
    same: Mapping[int, Sequence[tuple[str, ...]]] = field(default_factory=dict)
    norms: Norms | None = None
    scores: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    files: Mapping[int, tuple[int, Mapping[str, str]]] = field(default_factory=dict)
    bytes_read: int = 0
    seconds: float = 0.0
