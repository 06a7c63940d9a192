"""Coefficient rules: from a tensor's place in the depth to the number its task vector is scaled by. Plain floats only.

Every rule is a function of the layer l = 1..L of a stack. A stack of one layer (L = 1), for which the paper's formula
divides by zero, stands at the deep end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from lines_cli.scaling.find_depth import DepthMap, Side, position

Outside = Literal["alpha", "position", "base", "keep"]


class Schedule(Protocol):
    """A coefficient for every depth, in float64."""

    def at(self, index: int, layers: int) -> float:
        """The coefficient of layer `index` (from 0; the paper's l is one more) of a stack of `layers`."""

    @property
    def first(self) -> float:
        """alpha, or the first value of a list; also the reference's value outside the blocks."""

    @property
    def last(self) -> float:
        """The value of the last layer."""

    @property
    def ends(self) -> tuple[float, float]:
        """What lies before the blocks gets, and what lies behind them, where that goes by its position."""

    @property
    def flat(self) -> bool:
        """Whether every value is the same, so that depth makes no difference."""


@dataclass(frozen=True, slots=True)
class Linear:
    """LiNeS's layer-increasing scaling: `alpha + beta * (l - 1) / (L - 1)` (arXiv 2410.17146, eq. 2).

    Evaluated from left to right in float64. The last layer is alpha + beta, without the detour that could miss it by
    the last bit, so that a sum of 0 or 1 copies.
    """

    alpha: float
    beta: float

    def at(self, index: int, layers: int) -> float:
        return self.alpha + (self.beta if index == layers - 1 else self.beta * index / (layers - 1))

    @property
    def first(self) -> float:
        return self.alpha

    @property
    def last(self) -> float:
        return self.alpha + self.beta

    @property
    def ends(self) -> tuple[float, float]:
        return self.first, self.last

    @property
    def flat(self) -> bool:
        return self.beta == 0


@dataclass(frozen=True, slots=True)
class Power(Linear):
    """`alpha + beta * x**exponent` with `x = (l - 1) / (L - 1)`: above 1, the middle layers keep less of the update."""

    exponent: float

    def at(self, index: int, layers: int) -> float:
        return self.last if index == layers - 1 else self.alpha + self.beta * (index / (layers - 1)) ** self.exponent


@dataclass(frozen=True, slots=True)
class Constant(Linear):
    """`alpha + beta` in every block: no dependence on depth, and the control for one that has it."""

    def at(self, index: int, layers: int) -> float:  # noqa: ARG002 - a rule of depth that ignores it
        return self.last


@dataclass(frozen=True, slots=True)
class Reversed(Linear):
    """`alpha + beta * (L - l) / (L - 1)`: the deep blocks stay near the base. The control for LiNeS: the same
    coefficients, in the other order. What lies outside the blocks gets alpha all the same.
    """

    def at(self, index: int, layers: int) -> float:
        return self.alpha + (self.beta if index == 0 else self.beta * (layers - 1 - index) / (layers - 1))

    @property
    def last(self) -> float:
        return self.alpha

    @property
    def ends(self) -> tuple[float, float]:
        return self.alpha + self.beta, self.alpha


@dataclass(frozen=True, slots=True)
class UpAndDown(Linear):
    """`alpha + beta * x`, where x grows from 0 at the first layer to 1 at the middle and falls to 0 at the last: the
    bottleneck of a U-Net is its deepest point. The paper did not study it.
    """

    def at(self, index: int, layers: int) -> float:
        steps, most = min(index, layers - 1 - index), (layers - 1) // 2
        return self.alpha + (self.beta if steps == most else self.beta * steps / most)

    @property
    def last(self) -> float:
        return self.alpha


@dataclass(frozen=True, slots=True)
class Shaped(Linear):
    """`alpha + beta * share(x)` with `x = (l - 1) / (L - 1)`: a rule of depth (`depth_rules`) and its number."""

    share: Callable[[float, float | None], float]
    number: float | None = None

    def at(self, index: int, layers: int) -> float:
        return self._of(position(index, layers))

    @property
    def last(self) -> float:
        return self._of(1.0)

    @property
    def ends(self) -> tuple[float, float]:
        return self._of(0.0), self._of(1.0)

    def _of(self, x: float) -> float:
        return self.alpha + self.beta * self.share(x, self.number) if self.beta else self.alpha


@dataclass(frozen=True, slots=True)
class Scored(Linear):
    """`alpha + beta * share` with the share of each layer of one stack as it was measured (`depth_rules`); NaN until
    then. Outside the blocks, where nothing is measured, shares are those of a linear schedule.
    """

    shares: tuple[float, ...] | None = None

    def at(self, index: int, layers: int) -> float:  # noqa: ARG002 - there is a share for each
        if not self.beta:
            return self.alpha
        return math.nan if self.shares is None else self.alpha + self.beta * self.shares[index]


@dataclass(frozen=True, slots=True)
class Listed:
    """Given values at equal distances from the first layer to the last, interpolated linearly (mergekit's gradient)."""

    values: tuple[float, ...]

    def at(self, index: int, layers: int) -> float:
        if layers == 1 or len(self.values) == 1:
            return self.last
        position = index * (len(self.values) - 1) / (layers - 1)
        left = min(int(position), len(self.values) - 2)
        share = position - left
        return (1 - share) * self.values[left] + share * self.values[left + 1]

    @property
    def first(self) -> float:
        return self.values[0]

    @property
    def last(self) -> float:
        return self.values[-1]

    @property
    def ends(self) -> tuple[float, float]:
        return self.first, self.last

    @property
    def flat(self) -> bool:
        return len(set(self.values)) == 1


@dataclass(frozen=True, slots=True)
class Rules:
    """Everything that decides a coefficient; what is said later here overrules what is said earlier.

    Attributes:
        schedule: the coefficient over depth.
        gamma: multiplies whatever a schedule gives; fixed values stay as they are.
        outside: what a tensor outside the blocks gets: the schedule's first value, as in the paper's reference code
            (`alpha`); the first before the blocks and the last behind them (`position`); 0 (`base`); 1 (`keep`).
        stacks: for a stack by its name: a schedule of its own, or one fixed coefficient.
        filters: (pattern, coefficient): for every tensor whose name contains the pattern, the first that matches;
            `*` matches all.
        components: of several models those that have rules of their own, filters and stacks apart.
    """

    schedule: Schedule
    gamma: float = 1.0
    outside: Outside = "alpha"
    stacks: Mapping[str, Schedule | float] = field(default_factory=dict)
    filters: tuple[tuple[str, float], ...] = ()
    components: Mapping[str, Rules] = field(default_factory=dict)

    def of(self, component: str | None) -> Rules:
        """The rules of one of several models."""
        return self.components.get(component, self) if component is not None else self

    def coefficient(self, name: str, depth: DepthMap, *, scale: float = 1.0) -> float:
        """The coefficient of one tensor, in float64, times `scale`: a merge's `lambda` for the tensor."""
        pattern = self.filter_of(name)
        if pattern is not None:
            return scale * dict(self.filters)[pattern]
        own = self.of(depth.component_of(name)) if self.components else self
        place = depth.places.get(name)
        if place is None:
            return own.outside_value(depth.side_of(name), scale=scale)
        return own.inside_value(place.stack, place.index, depth.layers[place.stack], scale=scale)

    def filter_of(self, name: str) -> str | None:
        """The pattern that decides a tensor's coefficient, if one does."""
        for pattern, _ in self.filters:
            if pattern in name or pattern == "*":
                return pattern
        return None

    def inside_value(self, stack: str, index: int, layers: int, *, scale: float = 1.0) -> float:
        """The coefficient of a layer, filters apart."""
        rule = self.stacks.get(stack, self.schedule)
        return scale * rule if isinstance(rule, float) else self.gamma * scale * rule.at(index, layers)

    def outside_value(self, side: Side, *, scale: float = 1.0) -> float:
        """The coefficient of what lies outside the blocks, on one side of them, filters apart."""
        if self.outside in ("base", "keep"):
            return 0.0 if self.outside == "base" else scale
        if self.outside == "position":
            return self.gamma * scale * self.schedule.ends[side == "after"]
        return self.gamma * scale * self.schedule.first
