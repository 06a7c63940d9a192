"""What an evaluation says: metrics by name, read from the last line of a command's output or from a Python object."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from lines_cli.errors import printable
from lines_cli.sweeping.expression import Value

Metrics = dict[str, Value]

_LONGEST_LINE = 2**20
_MOST = 100_000  # numbers


class NonsenseError(ValueError):
    """Why what an evaluation said is not metrics."""


def read_metrics(output: str) -> Metrics:
    """The metrics of the last line that is not empty: one JSON object.

    Raises:
        NonsenseError: it is none, or holds something else than finite numbers.
    """
    lines = [line for line in output.splitlines() if line.strip()]
    if not lines:
        raise NonsenseError("it printed nothing; its last line should be one JSON object of metrics")
    last = lines[-1].strip()
    if len(last) > _LONGEST_LINE:
        raise NonsenseError(f"its last line is longer than {_LONGEST_LINE:,} characters")
    try:
        said = json.loads(last)
    except (ValueError, RecursionError):
        raise NonsenseError(
            f"its last line is not JSON: {printable(last[:_SHOWN])}{'...' if len(last) > _SHOWN else ''}"
        ) from None
    return metrics_of(said)


_SHOWN = 200


def metrics_of(said: Any) -> Metrics:
    """Metrics as plain values: numbers, lists of numbers, numbers by name.

    Raises:
        NonsenseError: they are something else, or not finite.
    """
    if not isinstance(said, Mapping):
        raise NonsenseError(f'expected one JSON object of metrics, as in {{"target": 0.9}}, not {_kind(said)}')
    if not said:
        raise NonsenseError("it is an object without a metric")
    found: Metrics = {}
    left = _MOST
    for name, value in said.items():
        found[str(name)] = _value(str(name), value)
        left -= len(found[str(name)]) if isinstance(found[str(name)], (list, dict)) else 1  # type: ignore[arg-type]
        if left < 0:
            raise NonsenseError(f"more than {_MOST:,} numbers")
    return found


def _value(name: str, value: Any) -> Value:
    if callable(plain := getattr(value, "tolist", None)):  # an array of numpy's, or a tensor
        value = plain()
    if isinstance(value, Mapping):
        if not value:
            raise NonsenseError(f"metric {printable(name)} is empty")
        return {str(key): _number(f"{name}.{key}", number) for key, number in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        if not value:
            raise NonsenseError(f"metric {printable(name)} is empty")
        return [_number(f"{name}[{at}]", number) for at, number in enumerate(value)]
    return _number(name, value)


def _number(name: str, value: Any) -> float:
    if isinstance(value, (str, bytes)) or value is None:
        raise NonsenseError(f"metric {printable(name)} is {_kind(value)}, not a number")
    try:
        number = float(value)  # what libraries count with, too: a tensor of one entry
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise NonsenseError(f"metric {printable(name)} is {_kind(value)}, not a number") from None
    if not math.isfinite(number):
        raise NonsenseError(f"metric {printable(name)} is {number}")
    return number


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        return f"the text {printable(value[:60])!r}"
    return {list: "a list", dict: "an object", bool: "true or false"}.get(type(value), type(value).__name__)


def average(several: Sequence[Metrics]) -> Metrics:
    """The mean of each metric over repeats.

    Raises:
        NonsenseError: they do not have the same metrics.
    """
    first = several[0]
    for other in several[1:]:
        if other.keys() != first.keys() or any(_shape(other[name]) != _shape(first[name]) for name in first):
            raise NonsenseError("its repeats do not have the same metrics")
    return {name: _mean([metrics[name] for metrics in several]) for name in first}


def _shape(value: Value) -> Any:
    return sorted(value) if isinstance(value, dict) else len(value) if isinstance(value, list) else None


def _mean(values: Sequence[Any]) -> Value:
    first = values[0]
    if isinstance(first, dict):
        return {name: math.fsum(value[name] for value in values) / len(values) for name in first}
    if isinstance(first, list):
        return [math.fsum(numbers) / len(values) for numbers in zip(*values, strict=True)]
    return math.fsum(values) / len(values)


def by_task(metrics: Mapping[str, Metrics]) -> Metrics:
    """Metrics of one candidate, task by task, put together: each metric as numbers by task.

    Args:
        metrics: task -> what was said of it.

    Raises:
        NonsenseError: tasks have other metrics than others, or one that is no number.
    """
    tasks = list(metrics)
    names = list(metrics[tasks[0]])
    for task in tasks[1:]:
        if list(metrics[task]) != names and set(metrics[task]) != set(names):
            raise NonsenseError(f"task {printable(task)} has other metrics than {printable(tasks[0])}")
    found: Metrics = {}
    for name in names:
        numbers: dict[str, float] = {}
        for task in tasks:
            value = metrics[task][name]
            if isinstance(value, float):
                numbers[task] = value
            else:
                flat = list(value.values()) if isinstance(value, dict) else value
                numbers[task] = math.fsum(flat) / len(flat)
        found[name] = numbers
    return found
