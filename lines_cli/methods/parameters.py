"""The `parameters:` of a merge: what may be said, and what a setting says of one tensor.

A setting is what mergekit lets it be: one value; a gradient, which is a list of numbers spread over the depth of a
stack; or a list of `{filter, value}`, of which the first whose filter is part of the tensor's name counts (`*`, or no
filter, is part of every name). Where none is, the setting says nothing, and the next one is asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Value = float | bool | str | None

MOST_RULES = 1000
"""How many entries a list of rules may have: each is tried on every tensor's name."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method.

    Attributes:
        default: what holds where nothing is said.
        about: for its documentation, one line.
        per_model: it may stand under a model, too, and a method gets one value for each.
        varies: it may be a gradient or a list of filters.
        low, high: the bounds of a number.
        whole: only whole numbers.
        choices: for anything but a number: what may be written -> what it means.
        required: it has no default, and has to be said.
        rules: words that stand for a number of each model's that is measured, where one value is said.
    """

    default: Value
    about: str
    per_model: bool = False
    varies: bool = True
    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    choices: Mapping[str | bool, Value] = field(default_factory=dict)
    required: bool = False
    rules: tuple[str, ...] = ()

    def check(self, setting: Any) -> Any:
        """A setting as it will be evaluated: numbers as float, choices as what they mean.

        Raises:
            ValueError: it is nothing that this parameter can be; the message says what it can.
        """
        if (rule := self.rule_in(setting)) is not None:
            return rule
        if isinstance(setting, dict):  # one condition alone
            setting = [setting]
        if not isinstance(setting, list):
            return self._one(setting)
        if not self.varies:
            raise ValueError(f"expected one value, not a list: {self.expected()}")
        if not setting:
            raise ValueError("an empty list says nothing")
        if len(setting) > MOST_RULES:
            raise ValueError(f"a list of {len(setting):,}; at most {MOST_RULES:,} are read")
        if not any(isinstance(part, dict) for part in setting):
            return [self._one(part) for part in setting]
        return [self._condition(part) for part in setting]

    def rule_in(self, setting: Any) -> str | None:
        """The rule that a setting says; of a number that is none, as YAML reads .nan, the one of that name."""
        if isinstance(setting, float) and math.isnan(setting):
            setting = "nan"
        word = setting.lower() if isinstance(setting, str) else ""
        return word if word in self.rules else None

    def _condition(self, part: Any) -> dict[str, Any]:
        if not isinstance(part, dict) or not {"value"} <= part.keys() <= {"filter", "value"}:
            raise ValueError(f"each entry of the list must be {{filter, value}}, and {part!r} is not")
        name, value = part.get("filter"), part["value"]
        if name is not None and (not isinstance(name, str) or not name):
            raise ValueError(f"a filter is a part of tensor names, or * for all, and {name!r} is not")
        checked = [self._one(number) for number in value] if isinstance(value, list) and value else self._one(value)
        return {"filter": name, "value": checked} if name is not None else {"value": checked}

    def _one(self, value: Any) -> Value:
        if self.choices:
            if isinstance(value, (str, bool, int, float)) and value in self.choices:  # 1 is true, as in mergekit
                return self.choices[value]  # type: ignore[index]
            raise ValueError(f"expected {self.expected()} (got {value!r})")
        if (rule := self.rule_in(value)) is not None:  # in a list, or it would have been taken as one
            raise ValueError(
                f"expected a number: {rule} is of a whole model, and stands alone, in no filter and no gradient"
            )
        if isinstance(value, bool):
            raise ValueError(f"expected {self.expected()} (got {value!r})")
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            raise ValueError(f"expected {self.expected()} (got {value!r})") from None
        inside = math.isfinite(number) and self.low <= number <= self.high
        if not inside or (self.whole and not number.is_integer()):
            raise ValueError(f"expected {self.expected()} (got {value!r})")
        return int(number) if self.whole else number

    def expected(self) -> str:
        """What it can be, in words."""
        if self.choices:
            words = [str(choice).lower() if isinstance(choice, bool) else choice for choice in self.choices]
            return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.low) and math.isinf(self.high):
            return " or ".join((kind, *self.rules))
        return (
            f"{kind} of {self.low:g} or more" if math.isinf(self.high) else f"{kind} from {self.low:g} to {self.high:g}"
        )


def evaluate(setting: Any, name: str, position: float) -> Value:
    """What a checked setting says of one tensor; None where it says nothing.

    Args:
        setting: from `Parameter.check`.
        name: the tensor's.
        position: of its layer in its stack, 0 for the first to 1 for the last; 0 outside the blocks.
    """
    if not isinstance(setting, list):
        return setting  # type: ignore[no-any-return]
    if not isinstance(setting[0], dict):
        return _gradient(setting, position)
    for part in setting:
        if part.get("filter", "*") == "*" or part["filter"] in name:
            return evaluate(part["value"], name, position)
    return None


def _gradient(values: list[float], position: float) -> float:
    """Values at equal distances, interpolated linearly; the order of operations is mergekit's."""
    scaled = position * (len(values) - 1)
    left = int(scaled)
    right = min(len(values) - 1, left + 1)
    share = scaled - left
    return (1 - share) * values[left] + share * values[right]


def values_of(setting: Any) -> Iterator[Value]:
    """Every value that stands in a checked setting."""
    for part in setting if isinstance(setting, list) else [setting]:
        if isinstance(part, dict):
            yield from values_of(part["value"])
        else:
            yield part


def filters_of(setting: Any) -> Iterator[str]:
    """Every filter that stands in a checked setting, `*` apart."""
    for part in setting if isinstance(setting, list) else []:
        if isinstance(part, dict) and part.get("filter", "*") != "*":
            yield part["filter"]
