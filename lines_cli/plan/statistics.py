"""What a plan needs to know of the numbers in its inputs, and what was measured of them."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any

from lines_cli.methods.sparsify import Bounds
from lines_cli.scaling.depth_rules import Numbers


@dataclass(frozen=True, slots=True)
class Norms:
    """What `alpha: auto` rests on: L1 norms over the whole model, in float64.

    Attributes:
        total: of the sum of all task vectors, without weights.
        merged: of the merged task vector, before lambda and gamma.
        models: N.
    """

    total: float
    merged: float
    models: int

    @property
    def alpha(self) -> float:
        """`(1/N) * norm1(sum of tau_i) / norm1(tau_merged)`, LiNeS's heuristic for many tasks (arXiv 2410.17146)."""
        return 1 / self.models * (self.total / self.merged)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was measured of the numbers in the inputs.

    Attributes:
        thresholds: (model, tensor, or None for all of them, or `all of NAME` for a component's) -> the magnitudes that
            the sparsifier asked for: the least that is kept, and perhaps the greatest.
        kept: for each model, how many entries are kept, and of how many; empty where that was not counted.
        majority: the sign that most elections gave.
        l1: tensor -> for each model the L1 norm of its task vector, before and after entries were dropped.
        sums: tensor -> what is summed over it (`Method.sums`).
        norms: for `alpha: auto`.
        squares: the squared L2 norm of each model's task vector, over everything that is merged; empty where no weight
            rests on it.
        scores: depth rule -> matrix -> what the rule measured of it (`DepthRule`).
        scales: weights of the output that are stored in 8 bits -> their scales, as the output stores them.
    """

    thresholds: Mapping[tuple[int, str | None], Bounds] = field(default_factory=dict)
    kept: tuple[tuple[int, int], ...] = ()
    majority: int = 1
    l1: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    sums: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    norms: Norms | None = None
    squares: tuple[float, ...] = ()
    scores: Mapping[str, Mapping[str, Numbers]] = field(default_factory=dict)
    scales: Mapping[str, bytes] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """All of it as JSON has it, every number exactly."""
        return {
            "thresholds": [[*key, value] for key, value in self.thresholds.items()],
            "kept": self.kept,
            "majority": self.majority,
            "l1": self.l1,
            "sums": self.sums,
            "norms": self.norms and [self.norms.total, self.norms.merged, self.norms.models],
            **({"squares": self.squares} if self.squares else {}),
            **({"scores": self.scores} if self.scores else {}),
            **({"scales": {name: b64encode(own).decode() for name, own in self.scales.items()}} if self.scales else {}),
        }

    @classmethod
    def of(cls, json: Mapping[str, Any], models: int) -> Statistics:
        """What `to_json` gave, of so many models.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it gave something else.
        """
        found = cls(
            {(model, tensor): tuple(map(_number_or_none, bounds)) for model, tensor, bounds in json["thresholds"]},
            tuple((kept, of) for kept, of in json["kept"]),
            json["majority"],
            {
                name: tuple((_number(before), _number(after)) for before, after in sums)
                for name, sums in json["l1"].items()
            },
            {name: tuple(map(_number, sums)) for name, sums in json["sums"].items()},
            Norms(*map(_number, json["norms"])) if json["norms"] else None,
            tuple(map(_number, json.get("squares", ()))),
            {
                str(rule): {str(name): tuple(map(_number, numbers)) for name, numbers in measured.items()}
                for rule, measured in json.get("scores", {}).items()
            },
            {name: b64decode(own, validate=True) for name, own in json.get("scales", {}).items()},
        )
        counted = [number for pair in found.kept for number in pair]
        if (
            any(
                type(m) is not int or not 0 <= m < models or type(t) not in (str, NoneType) for m, t in found.thresholds
            )
            or any(type(number) is not int or number < 0 for number in counted)
            or len(found.kept) not in (0, models)
            or len(found.squares) not in (0, models)
            or type(found.majority) is not int
            or found.majority not in (-1, 0, 1)
            or any(len(sums) != models for sums in found.l1.values())
            or (found.norms is not None and found.norms.models != models)
        ):
            raise ValueError(json)
        return found


def _number_or_none(value: Any) -> Any:
    return None if value is None else _number(value)


def _number(value: Any) -> Any:
    """It, a number.

    Raises:
        TypeError: it is none.
    """
    if type(value) not in (int, float):
        raise TypeError(value)
    return value


NOTHING_MEASURED = Statistics()


@dataclass(frozen=True, slots=True)
class Needs:
    """Which statistics a plan needs before it can be carried out."""

    thresholds: bool = False
    l1: bool = False
    sums: bool = False
    majority: bool = False
    norms: bool = False
    weights: bool = False
    scores: tuple[str, ...] = ()
    """Depth rules, by name."""

    def __bool__(self) -> bool:
        by_merging = self.majority or self.norms or bool(self.scores)
        return self.thresholds or self.l1 or self.sums or self.weights or by_merging
