"""Raw results read back, as the sections of the page take them; and the words and tables that they have in common."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from evidence.sources import DATA
from evidence.statistics import Paired

RESULTS = Path(__file__).parent / "results"
PAPER: dict[str, Any] = json.loads((DATA / "paper.json").read_text(encoding="utf-8"))

Result = Mapping[str, Any]
Results = Mapping[str, Sequence[Result]]  # item -> what its files hold


def read_results(folder: Path = RESULTS) -> dict[str, list[Result]]:
    """All results of a folder, in the order of their names."""
    found: dict[str, list[Result]] = defaultdict(list)
    for path in sorted(folder.glob("*/*.json")):
        found[path.parent.name].append(json.loads(path.read_text(encoding="utf-8")))
    return dict(found)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def best(points: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The point with the largest objective; the first of equal ones that was tested."""
    return max(points, key=lambda point: (float(point["objective"]), "test" in point))


def mean_of(results: Sequence[Result], value: Callable[[Result], float]) -> float:
    """The mean over seeds of the means of each, as tests take it: a seed that was run twice counts once."""
    return fmean(_means(results, value).values())


def _means(results: Sequence[Result], value: Callable[[Result], float]) -> dict[int, float]:
    by_seed: dict[int, list[float]] = defaultdict(list)
    for result in results:
        by_seed[result["seed"]].append(value(result))
    return {seed: fmean(values) for seed, values in by_seed.items()}


def spread(results: Sequence[Result], value: Callable[[Result], float]) -> str:
    """The mean over seeds; behind it the standard deviation between them, if there are several, and all have the same
    tasks: else it would be one of tasks.
    """
    tasks: dict[int, set[str]] = defaultdict(set)
    for result in results:
        tasks[result["seed"]].add(str(result.get("task", result.get("tasks"))))
    means = _means(results, value).values()
    alike = len(means) > 1 and all(own == tasks[results[0]["seed"]] for own in tasks.values())
    return f"{fmean(means):.1f}{f' ± {stdev(means):.1f}' if alike else ''}"


def said(test: Paired, unit: str = "points", digits: int = 1) -> str:
    """A difference with its standard error and its test, in words."""
    p = "" if test.p is None else f", p {_p(test.p)}"
    signs = [f"up in {test.positive}", f"equal in {test.equal}", f"down in {test.pairs - test.positive - test.equal}"]
    told = [sign for sign in signs if not sign.endswith(" 0")]
    return f"{sized(test, digits)} {unit} ({', '.join(told)} of {test.pairs}{p})"


def brief(test: Paired, unit: str = "") -> str:
    """The same in short, for tables."""
    return f"{sized(test)}{f' {unit}' if unit else ''}{'' if test.p is None else f' (p {_p(test.p)})'}"


def sized(test: Paired, digits: int = 1) -> str:
    """A difference with its standard error, in one decimal more where the error would look like none."""
    if test.error is None:
        return f"{round(test.mean, digits) + 0.0:+.{digits}f}"  # no minus before a zero
    if 1e-9 < test.error < 0.5 * 10**-digits:
        digits += 1
    return f"{round(test.mean, digits) + 0.0:+.{digits}f} ± {test.error:.{digits}f}"


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"= {value:.3f}"


def verdict(test: Paired, more: str, less: str) -> str:
    """What a difference comes to: one of two things, or neither."""
    if test.p is None:
        return "too few seeds to tell"
    return (more if test.mean > 0 else less) if test.beyond_noise else "within noise"


def direction(published: float, found: Paired) -> str:
    """How a measured difference stands beside a published one."""
    same = "same direction", "the other direction here"
    return verdict(found, *(same if published > 0 else same[::-1]))


def counted(number: int, noun: str) -> str:
    """A number with its noun."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def runs_of(results: Sequence[Result]) -> str:
    """How many fine-tunes there are; and runs, where some were run on several processors."""
    own = len({(one["seed"], one["task"], one.get("rate")) for one in results})
    return counted(own, "fine-tune") if own == len(results) else f"{len(results)} runs of {counted(own, 'fine-tune')}"


def seeds_of(results: Sequence[Result]) -> list[int]:
    return sorted({result["seed"] for result in results})


def in_words(seeds: Sequence[int]) -> str:
    """Seeds as they are named in a sentence."""
    return f"{'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)}"


def listed(values: Iterable[object]) -> str:
    """Values as a list in a sentence."""
    *first, last = map(str, values)
    return f"{', '.join(first)} and {last}" if first else last
