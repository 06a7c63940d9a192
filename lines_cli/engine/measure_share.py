"""One share of a measuring pass, and what all shares come to.

A share is some of the tensors, in the order of their names. What is found of it is written down so that what the shares
come to is what one run over all tensors finds, to the bit: counts as whole numbers, sums per tensor, and sums over the
model block by block, to be added in the same order.
"""

from __future__ import annotations

import zlib
from array import array
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lines_cli.engine.chunks import PlanChunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened
from lines_cli.engine.measure import Elected, Election, Measuring, Track
from lines_cli.engine.scales import measure_scales
from lines_cli.engine.threshold import Counter, Counters, Search, Sought, Window
from lines_cli.plan.plan import L1_NORMS, SCALES, SUMS, THRESHOLDS, WEIGHTS, Plan, TensorPlan, pass_of_rule
from lines_cli.plan.statistics import Statistics
from lines_cli.plan.tensors import Segment

Json = dict[str, Any]
How = tuple[Sequence[Opened], Devices, Track]
"""The open inputs, the devices to compute on, and what wraps the stream of byte counts."""


class NotOfAShareError(ValueError):
    """What is to be what a share has found is something else."""


def measure_share(plan: Plan, what: str, names: Sequence[str], how: How) -> Json:
    """What one share of a pass finds; of thresholds that tensors have in common see `Common`.

    Args:
        plan: with what earlier passes have found; of scales a resolved one.
        what: the pass (`Plan.passes`).
        names: the tensors of the share.
        how: inputs and devices.

    Raises:
        DataError: NaN or Inf in an input.
        CheckpointError: an input ends early or cannot be read.
    """
    if what == SCALES:
        found = measure_scales(replace(plan, statistics=replace(plan.statistics, scales={})), *how, only=names)
        return {"statistics": Statistics(scales=found.statistics.scales).to_json()}
    measuring = Measuring(replace(plan, statistics=plan.statistics), *how, only=_tensors(plan, names))
    if what == THRESHOLDS:
        measuring.thresholds_by_tensor()
        found_here = measuring.plan.statistics
        return {"statistics": Statistics(thresholds=found_here.thresholds, kept=found_here.kept).to_json()}
    if what == L1_NORMS:
        measuring.l1_norms()
        return {"statistics": Statistics(l1=measuring.plan.statistics.l1).to_json()}
    if what == SUMS:
        measuring.sums()
        return {"statistics": Statistics(sums=measuring.plan.statistics.sums).to_json()}
    if what == WEIGHTS:
        squares = _Squares(plan.number_of_models)
        measuring.squares(squares.add)
        return {"squares": squares.to_json()}
    if (rule := _rule_of(plan, what)) is not None:
        measuring.scores(rule)
        return {"statistics": Statistics(scores={rule: measuring.plan.statistics.scores[rule]}).to_json()}
    blocks = _Blocks()
    measuring.elect(_words(what), blocks.add)
    return {"elections": blocks.to_json()}


def with_shares(plan: Plan, what: str, shares: Sequence[Mapping[str, Any]]) -> Plan:
    """The plan with what all shares of a pass have found.

    Args:
        plan: with what earlier passes have found.
        what: the pass.
        shares: of each, in order, what `measure_share` gave.

    Raises:
        NotOfAShareError: one is something else.
    """
    try:
        return _with_shares(plan, what, shares)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NotOfAShareError(str(error)) from error


def _with_shares(plan: Plan, what: str, shares: Sequence[Mapping[str, Any]]) -> Plan:
    known = plan.statistics
    measuring = _Nothing(plan)
    if what == WEIGHTS:
        totals = [0.0] * plan.number_of_models
        for share in shares:
            for model, blocks in enumerate(_Squares.of(share["squares"], len(totals))):
                for block in blocks:
                    totals[model] += block
        measuring.found_squares(totals)
        return measuring.plan
    rule = _rule_of(plan, what)
    if what in (THRESHOLDS, L1_NORMS, SUMS, SCALES) or rule is not None:
        each = [Statistics.of(share["statistics"], plan.number_of_models) for share in shares]
        if what == THRESHOLDS:
            thresholds = {key: bounds for one in each for key, bounds in one.thresholds.items()}
            by_model = zip(*(one.kept for one in each), strict=True)
            kept = tuple((sum(own for own, _ in model), sum(of for _, of in model)) for model in by_model)
            known = replace(known, thresholds=thresholds, kept=kept)
        elif what == L1_NORMS:
            known = replace(known, l1={name: sums for one in each for name, sums in one.l1.items()})
        elif what == SUMS:
            known = replace(known, sums={name: sums for one in each for name, sums in one.sums.items()})
        elif rule is not None:
            scores = {name: numbers for one in each for name, numbers in one.scores[rule].items()}
            known = replace(known, scores={**known.scores, rule: scores})
        else:
            known = replace(known, scales={name: own for one in each for name, own in one.scales.items()})
        return replace(plan, statistics=known)
    elected = Elected()
    for share in shares:
        elected.add(_Blocks.of(share["elections"]))
    measuring.found_in(_words(what), elected)
    return measuring.plan


def _rule_of(plan: Plan, what: str) -> str | None:
    """The depth rule that asks for a pass; None if none does."""
    return next((rule for rule in plan.needs.scores if pass_of_rule(rule) == what), None)


def _words(what: str) -> tuple[str, ...]:
    """What a pass of elections finds (`Plan.elections`)."""
    return tuple(what.split(" and "))


def _tensors(plan: Plan, names: Iterable[str]) -> list[TensorPlan]:
    wanted = set(names)
    return [tensor for tensor in plan.merged_by_name if tensor.name in wanted]


class _Nothing(Measuring):
    """What only takes account of what was found, and reads nothing."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.models, self.tensors = plan, range(plan.number_of_models), plan.merged_by_name


class _Blocks:
    """The elections of a share: the sums of every block, in order."""

    def __init__(self) -> None:
        self.balance = 0
        self.sums = [array("d") for _ in range(3)]

    def add(self, result: Election) -> None:
        """Take account of a chunk."""
        self.balance += result.balance
        for own, blocks in zip(self.sums, (result.total, result.with_plus, result.with_minus), strict=True):
            own.extend(blocks)

    def to_json(self) -> Json:
        total, plus, minus = (_text(own) for own in self.sums)
        return {
            "balance": self.balance,
            "total": total,
            "with_plus": plus,
            **({} if minus == plus else {"with_minus": minus}),
        }

    @classmethod
    def of(cls, told: Mapping[str, Any]) -> Election:
        """What `to_json` gave, as one election.

        Raises:
            KeyError, TypeError, ValueError: it gave something else.
        """
        if type(told["balance"]) is not int:
            raise TypeError(told["balance"])
        total, plus = _numbers(told["total"]), _numbers(told["with_plus"])
        return Election(told["balance"], total, plus, _numbers(told["with_minus"]) if "with_minus" in told else plus)


class _Squares:
    """Of a share, for each model the squared norm of every block, in order."""

    def __init__(self, models: int) -> None:
        self.by_model = [array("d") for _ in range(models)]

    def add(self, result: list[list[float]]) -> None:
        """Take account of a chunk."""
        for own, blocks in zip(self.by_model, result, strict=True):
            own.extend(blocks)

    def to_json(self) -> list[str]:
        return [_text(own) for own in self.by_model]

    @staticmethod
    def of(told: Sequence[str], models: int) -> list[array[float]]:
        """What `to_json` gave.

        Raises:
            TypeError, ValueError: it gave something else.
        """
        found = [_numbers(text) for text in told]
        if len(found) != models:
            raise ValueError("squares of other models")
        return found


def _text(numbers: array[float]) -> str:
    return b64encode(zlib.compress(_little(numbers).tobytes(), 1)).decode()


def _little(numbers: array[float]) -> array[float]:
    """The same in the byte order in which they are written down."""
    import sys

    if sys.byteorder == "big":
        numbers = array("d", numbers)
        numbers.byteswap()
    return numbers


def _numbers(text: str) -> array[float]:
    found = array("d")
    try:
        found.frombytes(zlib.decompress(b64decode(text, validate=True)))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return _little(found)


class Common:
    """The search for thresholds that all tensors, or all of a component, have in common: look by look, each in shares.

    Args:
        plan: before anything was measured.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._searches = _Nothing(plan).searches()
        self._windows: dict[str | None, dict[Sought, Window]] = {}

    @property
    def searches(self) -> dict[str | None, Search]:
        """By what is searched together."""
        return {name: search for name, (_, search) in self._searches.items()}

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to look for."""
        return not any(self._windows.values())

    def sample(self, how: How) -> Json:
        """Where to look first, as a sample of all tensors says."""
        measuring = Measuring(self.plan, *how)
        for name, (segments, search) in self._searches.items():
            self._windows[name] = search.begin(
                segments, lambda items, windows, nbytes: measuring.count(items, windows, total=nbytes)
            )
        return {"windows": self._listed()}

    def begin(self, told: Mapping[str, Any]) -> None:
        """The same, as `sample` gave it on whatever machine.

        Raises:
            NotOfAShareError: it gave something else.
        """
        try:
            self._windows = {name: {} for name in self._searches}
            for name, model, n, low, high in told["windows"]:
                self._windows[name][int(model), int(n)] = Window(int(low), int(high))
        except (KeyError, TypeError, ValueError) as error:
            raise NotOfAShareError(str(error)) from error

    def look(self, names: Sequence[str], how: How) -> Json:
        """What one share finds in this look."""
        wanted = set(names)
        measuring = Measuring(self.plan, *how, only=_tensors(self.plan, names))
        counted = []
        for name, (segments, _) in self._searches.items():
            own: list[tuple[TensorPlan, Segment]] = [one for one in segments if one[0].name in wanted]
            items: Iterable[list[PlanChunk]] = items_of(own)
            counters = measuring.count(items, self._windows[name]) if own and self._windows[name] else {}
            counted += [[name, *sought, counter.to_json()] for sought, counter in counters.items()]
        return {"windows": self._listed(), "counted": counted}

    def settle(self, shares: Sequence[Mapping[str, Any]]) -> None:
        """Take account of a look: of each share, in order, what `look` gave.

        Raises:
            NotOfAShareError: one is something else, or looked through other windows.
        """
        counters: dict[str | None, Counters] = {
            name: {sought: Counter(window) for sought, window in windows.items()}
            for name, windows in self._windows.items()
        }
        try:
            for share in shares:
                if share["windows"] != self._listed():
                    raise NotOfAShareError("other windows")
                for name, model, n, told in share["counted"]:
                    counters[name][model, n].join_json(told)
        except (KeyError, TypeError, ValueError) as error:
            raise NotOfAShareError(str(error)) from error
        self._windows = {name: search.settle(counters[name]) for name, search in self.searches.items()}

    def found(self) -> Plan:
        """The plan with the thresholds, once nothing is left to look for."""
        measuring = _Nothing(self.plan)
        measuring.found_by(self.searches)
        return measuring.plan

    def _listed(self) -> list[list[Any]]:
        return [
            [name, *sought, window.low, window.high]
            for name, windows in self._windows.items()
            for sought, window in windows.items()
        ]
