"""Depth rules by name: what `schedule:` may say beside the schedules of the paper's own family (`schedule`).

A rule gives each layer a share; the layer's coefficient is `alpha + beta * share`. Some rules follow from the place in
the depth alone (`share`), others read the weights: they measure every matrix of the blocks (`measure`), and then give
the layers of a stack their shares (`scores`).

An installed package adds a rule by an entry point of the group `lines.depth_rules`, whose name is the rule's; such
packages are asked only for a name that is not known here. Nothing here loads torch: `measure` uses it when it is
called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from lines_cli import installed
from lines_cli.scaling.find_depth import Place

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from torch import Tensor

GROUP = "lines.depth_rules"
"""Entry points of installed packages: the rule's name -> an object of the class `DepthRule`."""

Numbers = tuple[float, ...]
"""What was measured of one matrix."""

Layer = Mapping[str, Sequence[Numbers]]
"""What was measured of a layer: for each kind of matrix, which is its name in the layer, the numbers of each. Those of
several experts are of one kind. A layer without matrices, or whose update is zero, has none.
"""


def _five_of_float64(shape: Sequence[int]) -> int:
    return 5 * 8 * math.prod(shape)


@dataclass(frozen=True, slots=True)
class DepthRule:
    """A depth rule: either by `share`, or by `measure` and `scores`.

    Attributes:
        about: what it is, in a line, with its source.
        share: given x = (l - 1) / (L - 1), from 0 for the first layer of a stack to 1 for the last (1 for an only
            layer), and the rule's number, the layer's share.
        measure: given a matrix of the base and what is merged into it, its update before lambda and gamma, numbers
            about the two. If the rule sees `entries`, both are [n], any run of a matrix's entries in float32 (float64
            where an input is), and it gives tensors [n], whose sums over the matrix are taken in float64. If it sees
            whole `tensors`, both are [out, in] (or [experts, out, in], ... as stored), and it gives numbers, which are
            rounded to 9 significant digits so that the last bits of another machine's linear algebra change nothing.
            It overwrites neither.
        scores: given what was measured of the layers of a stack, first to last, and the rule's number, their shares.
        sees: what `measure` is given.
        number: what the number behind the rule's name (`NAME:NUMBER`, above 0) is unless it is said; None for a rule
            that takes none.
        workspace: how many bytes `measure` needs beside the two, given a tensor's shape, where it sees tensors.
    """

    about: str
    share: Callable[[float, float | None], float] | None = None
    measure: Callable[[Tensor, Tensor], Sequence[Any]] | None = None
    scores: Callable[[Sequence[Layer], float | None], Sequence[float]] | None = None
    sees: Literal["entries", "tensors"] = "entries"
    number: float | None = None
    workspace: Callable[[Sequence[int]], int] = _five_of_float64

    def __post_init__(self) -> None:
        if (self.share is None) == (self.measure is None) or (self.measure is None) != (self.scores is None):
            raise ValueError("a depth rule has either share, or both measure and scores")


def parse(text: str) -> tuple[DepthRule, str, float | None]:
    """The rule that `NAME` or `NAME:NUMBER` means, its name, and its number.

    Raises:
        ValueError: there is none of that name, it takes no such number, or its package is broken.
    """
    name, colon, said = text.partition(":")
    rule = find_rule(name)
    if not colon:
        return rule, name, rule.number
    if rule.number is None:
        raise ValueError(f"the schedule {name} takes no number (got {text!r})")
    try:
        number = float(said)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError(f"the schedule {name} takes a number above 0, as in {name}:{rule.number:g} (got {text!r})")
    return rule, name, number


@cache
def find_rule(name: str) -> DepthRule:
    """A rule by its name.

    Raises:
        ValueError: there is none of that name, or the package that has it is broken; the message says which.
    """
    if name in RULES:
        return RULES[name]
    point = _installed().get(name)
    if point is None:
        raise ValueError(f"no schedule is called {name[:_LONGEST_NAME]!r}")
    return installed.load(point, "schedule", DepthRule, "lines_cli.scaling.depth_rules.DepthRule")


_LONGEST_NAME = 100


def installed_names() -> tuple[str, ...]:
    """The rules that installed packages add."""
    return tuple(_installed())


def _installed() -> dict[str, EntryPoint]:
    return installed.added(GROUP, frozenset(RULES))


# --- rules that follow from the depth alone ---


def _cosine(x: float, _: float | None) -> float:
    """Half a period: slow at both ends."""
    return (1 - math.cos(math.pi * x)) / 2


def _sigmoid(x: float, number: float | None) -> float:
    """The logistic function of `number * (x - 1/2)`, stretched to go from 0 to 1."""
    assert number is not None
    low, high = _tanh_of(-number), _tanh_of(number)
    return (_tanh_of(number * (2 * x - 1)) - low) / (high - low) if low < high else x


def _tanh_of(steepness: float) -> float:
    return math.tanh(steepness / 4)  # 1 / (1 + exp(-s / 2)), but for a factor and a summand; it cannot overflow


# --- rules that measure ---


def kinds_of(places: Mapping[str, Place]) -> dict[str, str]:
    """What kind of matrix each is: its name, without the numbers that say which layer it lies in. Those of routed
    experts count as one kind.

    Args:
        places: of matrices, by name.
    """
    stacks: dict[str, dict[str, int]] = {}
    for name, place in places.items():
        stacks.setdefault(place.stack, {})[name] = place.index
    found: dict[str, str] = {}
    for layers in stacks.values():
        numbers = next((n for n in range(1, 5) if _says_the_layer(layers, n)), 1)
        for name in layers:
            segments, left, experts = name.split("."), numbers, False
            for at, segment in enumerate(segments):
                if segment.isdecimal() and (left or experts):
                    segments[at] = "*"
                    left -= left > 0
                experts = segment == "experts"
            found[name] = ".".join(segments)
    return found


def _says_the_layer(layers: Mapping[str, int], numbers: int) -> bool:
    """Whether what stands up to so many whole numbers of a name says its layer."""
    seen: dict[tuple[str, ...], int] = {}
    for name, index in layers.items():
        segments = name.split(".")
        ends = [at for at, segment in enumerate(segments) if segment.isdecimal()][:numbers]
        begin = tuple(segments[: ends[-1] + 1]) if ends else tuple(segments)
        if seen.setdefault(begin, index) != index:
            return False
    return True


def shares_of(
    rule: DepthRule, number: float | None, measured: Mapping[str, Numbers], places: Mapping[str, Place], layers: int
) -> tuple[float, ...]:
    """The share of each of a stack's layers.

    Args:
        rule: one that measures, and its number.
        number: the rule's.
        measured: matrix -> numbers.
        places: of the stack's matrices that were measured.
        layers: how many it has.

    Raises:
        ValueError: the rule gave something else than a finite number for each.
    """
    kinds = kinds_of(places)
    held: list[dict[str, list[Numbers]]] = [{} for _ in range(layers)]
    for name, place in places.items():
        if all(map(math.isfinite, measured[name])):
            held[place.index].setdefault(kinds[name], []).append(measured[name])
        else:
            raise ValueError(f"what was measured of {name} is not finite")
    assert rule.scores is not None
    found = tuple(map(float, rule.scores(held, number)))
    if len(found) != layers or not all(map(math.isfinite, found)):
        raise ValueError(f"the rule gave {len(found):,} shares for {layers:,} layers, or some that are not finite")
    return found


def _squares(_: Tensor, update: Tensor) -> tuple[Tensor]:
    return (update.double().square_(),)


def _polarised(layers: Sequence[Layer], number: float | None) -> list[float]:
    """`(|D_l| / mean of |D| over the layers)^2` for each kind of matrix, and the mean of that over a layer's matrices.
    A layer that has none, or a kind that no layer changes, counts as the mean: 1.
    """
    assert number is not None
    norms: dict[str, list[float]] = {}
    for layer in layers:
        for kind, matrices in layer.items():
            norms.setdefault(kind, []).extend(math.sqrt(squares) for (squares,) in matrices)
    means = {kind: sum(own) / len(own) for kind, own in norms.items()}
    found = []
    for layer in layers:
        each = [
            (math.sqrt(squares) / means[kind]) ** number
            for kind, matrices in layer.items()
            for (squares,) in matrices
            if means[kind]
        ]
        found.append(sum(each) / len(each) if each else 1.0)
    return found


def _spectra(base: Tensor, update: Tensor) -> Sequence[float]:
    from lines_cli.scaling.spectra import ranks_and_commutator

    return ranks_and_commutator(base, update)


def _larv_scores(layers: Sequence[Layer]) -> list[float | None]:
    """`e_l * sqrt(l / L) / (1 + softplus(z_l))`: e_l the mean over a layer's matrices of the effective rank of W over
    that of D, z_l the z-score over the layers of the mean of its commutator terms. None for a layer without matrices.
    """
    means: list[tuple[float, float] | None] = []
    for layer in layers:
        matrices = [numbers for own in layer.values() for numbers in own if numbers[0] > 0 and numbers[1] > 0]
        number = len(matrices)
        contrast = sum(rank / (of_update + _TINY) for rank, of_update, _ in matrices)
        means.append((contrast / number, sum(own[2] for own in matrices) / number) if number else None)
    z_scores = iter(_standardised([one[1] for one in means if one is not None]))
    return [
        None if one is None else one[0] * math.sqrt(at / len(layers)) / (1 + _softplus(next(z_scores)))
        for at, one in enumerate(means, start=1)
    ]


_TINY = 1e-12


def _softplus(value: float) -> float:
    return max(value, 0.0) + math.log1p(math.exp(-abs(value)))


def _standardised(values: Sequence[float]) -> list[float]:
    """How many standard deviations each lies above the mean; 0 where all are the same."""
    if not values:
        return []
    mean = math.fsum(values) / len(values)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / len(values))
    if deviation <= _NOISE * max(map(abs, values), default=0.0):
        return [0.0] * len(values)
    return [(value - mean) / deviation for value in values]


_NOISE = 1e-8  # of numbers of 9 digits


def _terciles(layers: Sequence[Layer], _: float | None) -> list[float]:
    """0 for the third of the layers with the least scores, 1 for that with the largest, 1/2 between."""
    scores = _larv_scores(layers)
    known = sorted(score for score in scores if score is not None)
    if not known:
        return [0.5] * len(layers)
    low, high = (_quantile(known, share) for share in (1 / 3, 2 / 3))
    return [0.5 if score is None or low <= score <= high else 0.0 if score < low else 1.0 for score in scores]


def _quantile(values: Sequence[float], share: float) -> float:
    """Of sorted values, interpolated linearly."""
    at = share * (len(values) - 1)
    left = min(int(at), len(values) - 1)
    right = min(left + 1, len(values) - 1)
    return values[left] + (at - left) * (values[right] - values[left])


def _smoothly(layers: Sequence[Layer], _: float | None) -> list[float]:
    """`(1 + tanh(z)) / 2` of the z-score of each layer's score."""
    scores = _larv_scores(layers)
    z_scores = iter(_standardised([score for score in scores if score is not None]))
    return [0.5 if score is None else (1 + math.tanh(next(z_scores))) / 2 for score in scores]


def _of_spectra(shape: Sequence[int]) -> int:
    """Bytes in float64: the two matrices, their product or a Gram matrix, and what LAPACK works in."""
    rows, columns = shape[0], math.prod(shape[1:])
    if len(shape) == 3:
        rows, columns = shape[1:]
    return 8 * (2 * rows * columns + 8 * min(rows, columns) ** 2)


RULES: Mapping[str, DepthRule] = {
    "cosine": DepthRule("Half a cosine wave from the first layer to the last: slow at both ends.", share=_cosine),
    "sigmoid": DepthRule(
        "The logistic curve of steepness K (10): flat at both ends, steep in the middle.", share=_sigmoid, number=10.0
    ),
    "esm": DepthRule(
        "The squared norm of a layer's update, relative to the mean norm of its kind (polarised scaling of ESM, 2026).",
        measure=_squares,
        scores=_polarised,
        number=2.0,
    ),
    "larv": DepthRule(
        "Three tiers by a score of the spectra of weights and update (LARV, 2026).",
        measure=_spectra,
        scores=_terciles,
        sees="tensors",
        workspace=_of_spectra,
    ),
    "larv-tanh": DepthRule(
        "The same score, through a tanh in place of tiers.",
        measure=_spectra,
        scores=_smoothly,
        sees="tensors",
        workspace=_of_spectra,
    ),
}
