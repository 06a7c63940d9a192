"""What docs/evidence.md says of one fine-tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import Any

from evidence.figures import curves
from evidence.results import (
    PAPER,
    Result,
    Results,
    counted,
    direction,
    in_words,
    said,
    seeds_of,
    spread,
    table,
    verdict,
)
from evidence.statistics import Paired, lead, paired
from evidence.texts import RETRIEVAL

FAMILIES = {"lines": "LiNeS", "constant": "constant scaling", "reversed": "reversed depth"}
Point = Mapping[str, Any]


def target_of(result: Result, point: Point) -> float:
    """Per cent right of the target's test texts."""
    return float(point["test"][result["task"]])


def control_of(result: Result, point: Point) -> float:
    """The mean over the controls' test texts."""
    return fmean(value for name, value in point["test"].items() if name not in (result["task"], RETRIEVAL))


def baseline(result: Result, family: str) -> Point:
    """The pre-trained model (`pre`), or the fine-tune as it is (`ft`)."""
    return next(point for point in result["points"] if point["family"] == family)


def path_of(result: Result, family: str) -> list[Point]:
    """A family's points, from the least of the update to the fine-tune itself."""
    own = sorted((point for point in result["points"] if point["family"] == family), key=lambda point: point["alpha"])
    return [*own, baseline(result, "ft")]


def chosen(result: Result, family: str) -> Point:
    """The best on validation of a family's points; the fine-tune itself is one of them."""
    return max(path_of(result, family), key=lambda point: rule(result, point))


def rule(result: Result, point: Point) -> float:
    """The paper's, on validation texts, of any point of a result."""
    pre, ft = baseline(result, "pre"), baseline(result, "ft")
    kept = fmean(point["control"][name] / known for name, known in pre["control"].items())
    return 2 * float(point["target"]) / float(ft["target"]) + kept


def curve(result: Result, family: str) -> list[tuple[float, float]]:
    """Target and control of each point of a family's path."""
    return [(target_of(result, point), control_of(result, point)) for point in path_of(result, family)]


def leads(results: Sequence[Result], family: str, than: str = "constant") -> Paired:
    """How much more control than another a family has at the same target. Both end at the fine-tune itself, so that
    they have that target in common at least.
    """
    return paired((one["seed"], lead(curve(one, family), curve(one, than)) or 0.0) for one in results)


def section(results: Results) -> tuple[str, dict[str, str]]:
    """The section, and its figures by file name."""
    groups = {
        rate: list(group)
        for rate, group in groupby(sorted(results["one"], key=lambda one: one["rate"]), lambda one: one["rate"])
    }
    parts = ["## 1. One fine-tune"]
    figures = {}
    for rate, group in groups.items():
        name = f"evidence-one-{rate:g}.svg"
        figures[name] = _figure(group, f"learning rate {rate:g}")
        parts += [compared(group, f"Learning rate {rate:g}"), f"![Target against controls, rate {rate:g}.]({name})"]
    paper = [back(group, f"At {rate:g}") for rate, group in groups.items()]
    return "\n\n".join([*parts, "### Beside the paper", _published(), "\n".join(paper)]), figures


def vision(results: Results) -> tuple[str, dict[str, str]]:
    """The same of the demo's vision transformer."""
    own, name = results["digits"], "evidence-digits.svg"
    text = (
        "The demo's pre-norm vision transformer of 12 blocks, pre-trained on five image domains of handwritten digits "
        "and fine-tuned on one of them; the others are the controls (`demo/digits.py`)."
    )
    parts = [compared(own, "A vision transformer on digits"), text, f"![Target against controls, digits.]({name})"]
    return "\n\n".join([*parts, back(own, "Here")]), {name: _figure(own, "digits")}


def compared(results: Sequence[Result], heading: str) -> str:
    """A table of what was chosen on validation, and families compared at the same target."""
    rows: dict[str, Any] = {
        "pre-trained": lambda one: baseline(one, "pre"),
        "fine-tuned": lambda one: baseline(one, "ft"),
        "LiNeS, defaults (alpha 0.1)": lambda one: _at(one, "lines", 0.1),
        **{f"{called}, chosen": lambda one, family=family: chosen(one, family) for family, called in FAMILIES.items()},
    }
    columns: dict[str, Any] = {"target": target_of, "controls": control_of}
    if RETRIEVAL in baseline(results[0], "pre")["test"]:
        columns["retrieval"] = lambda _, point: float(point["test"][RETRIEVAL])
    body = [
        [
            name,
            *(
                spread(results, lambda one, take=take, value=value: value(one, take(one)))  # type: ignore[misc]
                for value in columns.values()
            ),
        ]
        for name, take in rows.items()
    ]
    tasks, seeds = {one["task"] for one in results}, seeds_of(results)
    lines, turned = leads(results, "lines"), leads(results, "lines", "reversed")
    alphas = {family: fmean(chosen(one, family).get("alpha", 1.0) for one in results) for family in FAMILIES}
    head = f"### {heading}: {counted(len(results), 'fine-tune')} ({counted(len(tasks), 'task')}, {in_words(seeds)})"
    note = "Means over fine-tunes"
    if len(seeds) > 1:
        note += "; behind ± the standard deviation between seeds"
    note += f". Mean alphas chosen: {'; '.join(f'{FAMILIES[family]} {alpha:.2f}' for family, alpha in alphas.items())}."
    compared = (
        f"**At the same target accuracy** LiNeS has, against constant scaling, {said(lines)} of the controls: "
        f"{verdict(lines, 'LiNeS keeps more', 'constant scaling keeps more')}. Against reversed depth it has "
        f"{said(turned)}: {verdict(turned, 'LiNeS keeps more', 'reversed depth keeps more')}."
    )
    return "\n\n".join([head, table(["% of the test set right", *columns], body), note, compared])


def _at(result: Result, family: str, alpha: float) -> Point:
    """The point of a family at one alpha."""
    return next(p for p in result["points"] if p["family"] == family and abs(p["alpha"] - alpha) < 1e-9)


def _figure(results: Sequence[Result], what: str) -> str:
    def mean(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
        return fmean(x for x, _ in points), fmean(y for _, y in points)

    drawn = {
        f"{family}: {called}": [mean(points) for points in zip(*(curve(one, family) for one in results), strict=True)]
        for family, called in FAMILIES.items()
    }
    ends = {
        called: mean([(target_of(one, baseline(one, which)), control_of(one, baseline(one, which))) for one in results])
        for which, called in (("pre", "pre-trained"), ("ft", "fine-tuned"))
    }
    title = f"What is learnt against what is kept: {counted(len(results), 'fine-tune')}, {what}"
    return curves(title, "target, % of the test set right", "controls, % of the test set right", drawn, ends)


def _published() -> str:
    head = ["CLIP ViT-B/32, 8 tasks, as published", "target", "control"]
    return table(head, [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER["one"].items()])


def back(results: Sequence[Result], where: str) -> str:
    """What LiNeS as chosen gives back, beside what the paper says of it."""
    published = {name: values[1] for name, values in PAPER["one"].items()}
    found = paired(
        (one["seed"], control_of(one, chosen(one, "lines")) - control_of(one, baseline(one, "ft"))) for one in results
    )
    cost = fmean(target_of(one, chosen(one, "lines")) - target_of(one, baseline(one, "ft")) for one in results)
    lost = fmean(control_of(one, baseline(one, "pre")) - control_of(one, baseline(one, "ft")) for one in results)
    share = f" of {lost:.1f} lost" if lost > 0 else ""
    gain = published["LiNeS"] - published["fine-tuned"]
    return (
        f"* {where}, LiNeS as chosen changes the controls by {said(found)}{share}, and the target by {cost:+.1f}. As "
        f"published it gives {gain:.1f} of {published['pre-trained'] - published['fine-tuned']:.1f} back: "
        f"{direction(gain, found)}."
    )
