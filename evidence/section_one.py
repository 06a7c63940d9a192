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
    listed,
    said,
    seeds_of,
    spread,
    table,
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


def leads(results: Sequence[Result], family: str) -> Paired:
    """How much more control than constant scaling a family has at the same target."""
    return paired([lead(curve(result, family)[:-1], curve(result, "constant")) for result in results])


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
        figures[name] = _figure(group, rate)
        parts += [_of_one_rate(group, rate), f"![Target against controls, learning rate {rate:g}.]({name})"]
    return "\n\n".join([*parts, _paper(groups)]), figures


def _of_one_rate(results: Sequence[Result], rate: float) -> str:
    rows: dict[str, Any] = {
        "pre-trained": lambda one: baseline(one, "pre"),
        "fine-tuned": lambda one: baseline(one, "ft"),
        "LiNeS, defaults (alpha 0.1)": lambda one: _at(one, "lines", 0.1),
        **{f"{called}, chosen": lambda one, family=family: chosen(one, family) for family, called in FAMILIES.items()},
    }
    body = [
        [
            name,
            spread(results, lambda one, take=take: target_of(one, take(one))),  # type: ignore[misc]
            spread(results, lambda one, take=take: control_of(one, take(one))),  # type: ignore[misc]
            spread(results, lambda one, take=take: take(one)["test"][RETRIEVAL]),  # type: ignore[misc]
        ]
        for name, take in rows.items()
    ]
    tasks, seeds = {one["task"] for one in results}, seeds_of(results)
    lines, turned = leads(results, "lines"), leads(results, "reversed")
    alphas = {family: fmean(chosen(one, family).get("alpha", 1.0) for one in results) for family in FAMILIES}
    head = (
        f"### Learning rate {rate:g}: {counted(len(results), 'fine-tune')} "
        f"({counted(len(tasks), 'task')}, {'seed' if len(seeds) == 1 else 'seeds'} {listed(seeds)})"
    )
    note = "Means over fine-tunes"
    if len(seeds) > 1:
        note += "; behind ± the standard deviation between seeds"
    note += f". Mean alphas chosen: {'; '.join(f'{FAMILIES[family]} {alpha:.2f}' for family, alpha in alphas.items())}."
    verdict = (
        f"**At the same target accuracy** LiNeS has, against constant scaling, {said(lines)} of the controls: "
        f"{_verdict(lines, 'LiNeS')} Reversed depth has {said(turned)}: {_verdict(turned, 'reversed depth')}"
    )
    return "\n\n".join([head, table(["% of test texts right", "target", "controls", "retrieval"], body), note, verdict])


def _at(result: Result, family: str, alpha: float) -> Point:
    """The point of a family at one alpha."""
    return next(p for p in result["points"] if p["family"] == family and abs(p["alpha"] - alpha) < 1e-9)


def _verdict(test: Paired, name: str) -> str:
    if not test.beyond_noise:
        return "within noise."
    return f"{name} keeps more." if test.mean > 0 else "constant scaling keeps more."


def _figure(results: Sequence[Result], rate: float) -> str:
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
    title = f"What is learnt against what is kept: {counted(len(results), 'fine-tune')}, learning rate {rate:g}"
    return curves(title, "target, % of test texts right", "controls, % of test texts right", drawn, ends)


def _paper(groups: Mapping[float, Sequence[Result]]) -> str:
    head = ["CLIP ViT-B/32, 8 tasks, as published", "target", "control"]
    rows = [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER["one"].items()]
    published = {name: values[1] for name, values in PAPER["one"].items()}
    sentences = []
    for rate, group in groups.items():
        back = paired([control_of(one, chosen(one, "lines")) - control_of(one, baseline(one, "ft")) for one in group])
        cost = paired([target_of(one, chosen(one, "lines")) - target_of(one, baseline(one, "ft")) for one in group])
        lost = fmean(control_of(one, baseline(one, "pre")) - control_of(one, baseline(one, "ft")) for one in group)
        share = f" of {lost:.1f} lost" if lost > 0 else ""
        sentences.append(
            f"* At {rate:g}, LiNeS as chosen changes the controls by {said(back)}{share}, and the target by "
            f"{cost.mean:+.1f}. As published it gives {published['LiNeS'] - published['fine-tuned']:.1f} of "
            f"{published['pre-trained'] - published['fine-tuned']:.1f} back: "
            f"{direction(published['LiNeS'] - published['fine-tuned'], back)}."
        )
    return "\n\n".join(["### Beside the paper", table(head, rows), "\n".join(sentences)])
