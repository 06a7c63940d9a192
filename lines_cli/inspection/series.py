"""What pictures and the page draw alike of a report: short names, values by layer, pairs of models. Plain values."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

from lines_cli.errors import printable

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report

LONGEST = 28
"""Most characters of a name."""
MOST_PAIRED = 8
"""Most fine-tunes that have a row for each pair of them."""


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, its middle cut out if it is long; numbered where there are several."""
    cut = [elided(os.path.basename(os.path.normpath(model)), LONGEST) for model in models]
    return [f"{at} {name}" for at, name in enumerate(cut, 1)] if len(cut) > 1 else cut


def elided(text: str, longest: int) -> str:
    """A text on one line; of a longer one, both ends."""
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest // 2 - 3]}…{text[-longest // 2 - 2 :]}"


def called(stack: str) -> str:
    """What a stack is called."""
    return printable(stack) or "(no prefix)"


def of_stack(rows: Sequence[Report], stack: str) -> list[Report]:
    """The rows of one stack."""
    return [row for row in rows if row["stack"] == stack]


def values_of(rows: Sequence[Report], key: str) -> list[float]:
    """One number of each row; NaN where there is none."""
    return [math.nan if row[key] is None else row[key] for row in rows]


def ticked_layers(number: int, most: int) -> list[int]:
    """Layers at equal distances, the first and the last among them."""
    step = max(1, math.ceil((number - 1) / most))
    return [at for at in range(0, number - 1, step) if number - 1 - at > step / 2] + [number - 1]


def asked_and_realised(report: Report) -> tuple[str, list[Report]] | None:
    """Words for how it is known what rounding leaves of the coefficients, and the layers: recorded, or foreseen."""
    if report.get("recorded"):
        return "as its recipe records them", report["recorded"]
    if report.get("rounding"):
        return f"forecast for {report['rounding']['dtype']}", report["layers"]
    return None


def paired(models: int) -> list[tuple[str, list[tuple[int, int]]]]:
    """A row for each pair of models, with the pair; of very many models one for each, with all its pairs."""
    if models <= MOST_PAIRED:
        return [(f"{a + 1}, {b + 1}", [(a, b)]) for a, b in combinations(range(models), 2)]
    return [(f"{a + 1}", [(a, b) for b in range(models) if b != a]) for a in range(models)]


def mean(values: Sequence[float | None]) -> float:
    """Of those that are known; NaN if none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan


def widest_cosine(together: Report) -> float:
    """The end of the one scale for all cosines between two models: symmetric, and no finer than a quarter."""
    most = 0.25
    for group in [together, *together["layers"]]:
        for at, row in enumerate(group["cosine"]):
            most = max([most, *(abs(value) for value in row[:at] if value is not None)])
    return most
