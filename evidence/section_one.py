"""What docs/evidence.md says of one fine-tune."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
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
    mean_of,
    runs_of,
    said,
    seeds_of,
    spread,
    table,
    verdict,
)
from evidence.statistics import Paired, common, lead, paired
from evidence.texts import RETRIEVAL

FAMILIES = {"lines": "LiNeS", "constant": "constant scaling", "reversed": "reversed depth"}
Point = Mapping[str, Any]
Value = Callable[[Result, Point], float]


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


def by_default(result: Result) -> Point:
    """The fine-tune as `lines edit` edits it where nothing else is said: alpha 0.1."""
    return next(p for p in result["points"] if p["family"] == "lines" and abs(p["alpha"] - 0.1) < 1e-9)


def retrieval_of(result: Result, point: Point) -> float:  # noqa: ARG001 - as the others
    """Per cent of words found by their glosses."""
    return float(point["test"][RETRIEVAL])


def curve(result: Result, family: str, kept: Value = control_of) -> list[tuple[float, float]]:
    """Target, and what is kept, of each point of a family's path."""
    return [(target_of(result, point), kept(result, point)) for point in path_of(result, family)]


def leads(results: Sequence[Result], family: str, than: str = "constant", kept: Value = control_of) -> Paired:
    """How much more than another a family has kept at the same target. Both end at the fine-tune itself, so that they
    have that target in common at least.
    """
    return paired((one["seed"], lead(curve(one, family, kept), curve(one, than, kept)) or 0.0) for one in results)


def reach(results: Sequence[Result], family: str, than: str = "constant") -> float:
    """Over how many points of the target two families are compared, in the mean."""

    def width(one: Result) -> float:
        low, high = common(curve(one, family), curve(one, than))
        return high - low

    return mean_of(results, width)


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
    parts += ["### Beside the paper", _published(), "\n".join(paper)]
    return "\n\n".join(parts + again(results["one"])), figures


def again(results: Sequence[Result]) -> list[str]:
    """What came of fine-tunes that were trained and measured on several processors; nothing where none was."""
    ran: dict[tuple[Any, ...], dict[str, Result]] = defaultdict(dict)
    for one in results:
        ran[one["rate"], one["seed"], one["task"]][one.get("on", "")] = one
    twice = {key: own for key, own in ran.items() if len(own) > 1}
    if not twice:
        return []
    groups: dict[str, list[Result]] = defaultdict(list)
    for key in sorted(twice):
        for on in sorted(twice[key]):
            groups[f"{key[0]:g} on {on}"].append(twice[key][on])
    rows = []
    for name, own in groups.items():
        ends = [f"{mean_of(own, lambda one, value=value: value(one, baseline(one, 'ft'))):.1f}" for value in ENDS]  # type: ignore[misc]
        ahead = [leads(own, "lines"), leads(own, "lines", "reversed"), leads(own, "lines", kept=retrieval_of)]
        rows.append([name, *ends, *(f"{round(test.mean, 1) + 0.0:+.1f}" for test in ahead)])
    text = (
        f"{counted(len(twice), 'fine-tune')} ({in_words(sorted({key[1] for key in twice}))}) were trained and measured "
        "on several processors, from the same texts in the same order: what the precision of products alone changes. "
        "The tables and tests above have all of them, and a seed counts once."
    )
    head = ["learning rate", "target, fine-tuned", "controls", "LiNeS minus constant scaling", "minus reversed"]
    return ["### The same on another processor", text, table([*head, "minus constant, retrieval"], rows)]


ENDS = (target_of, control_of)


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
        "LiNeS, defaults (alpha 0.1)": by_default,
        **{f"{called}, chosen": lambda one, family=family: chosen(one, family) for family, called in FAMILIES.items()},
    }
    columns: dict[str, Any] = {"target": target_of, "controls": control_of}
    if has_retrieval(results):
        columns["retrieval"] = retrieval_of
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
    alphas = {
        family: mean_of(results, lambda one, family=family: chosen(one, family).get("alpha", 1.0))  # type: ignore[misc]
        for family in FAMILIES
    }
    head = f"### {heading}: {runs_of(results)} ({counted(len(tasks), 'task')}, {in_words(seeds)})"
    note = "Means over seeds"
    if len(seeds) > 1 and len({(one["seed"], one["task"]) for one in results}) == len(seeds) * len(tasks):
        note += "; behind ± the standard deviation between seeds"
    picked = "; ".join(f"{FAMILIES[family]} {alpha:.2f}" for family, alpha in alphas.items())
    note += f". Mean alpha chosen (of constant scaling the coefficient): {picked}; "
    note += "the fine-tune itself, which every family may choose, counts as 1."
    compared = (
        f"**At the same target accuracy** the controls of LiNeS minus those of constant scaling are {said(lines)}: "
        f"{verdict(lines, 'LiNeS keeps more', 'constant scaling keeps more')}. Minus those of reversed depth they are "
        f"{said(turned)}: {verdict(turned, 'LiNeS keeps more', 'reversed depth keeps more')}. Only targets that "
        f"both reach are compared: {reach(results, 'lines'):.1f} points of them, with reversed depth "
        f"{reach(results, 'lines', 'reversed'):.1f}; constant scaling goes further down, to the base."
    )
    compared += retrieval_told(results)
    return "\n\n".join([head, table(["% of the test set right", *columns], body), note, compared])


def has_retrieval(results: Sequence[Result]) -> bool:
    """Whether retrieval was measured, too."""
    return RETRIEVAL in baseline(results[0], "pre")["test"]


def retrieval_told(results: Sequence[Result]) -> str:
    """A sentence on retrieval at the same target, if it was measured."""
    if not has_retrieval(results):
        return ""
    found = leads(results, "lines", kept=retrieval_of)
    return (
        f" In retrieval, for which nothing is trained, LiNeS minus constant scaling is {said(found)}: "
        f"{verdict(found, 'LiNeS keeps more', 'constant scaling keeps more')}."
    )


def _figure(results: Sequence[Result], what: str) -> str:
    def mean(take: Callable[[Result], Point]) -> tuple[float, float]:
        across = mean_of(results, lambda one: target_of(one, take(one)))
        return across, mean_of(results, lambda one: control_of(one, take(one)))

    drawn = {
        f"{family}: {called}": [
            mean(lambda one, family=family, at=at: path_of(one, family)[at])  # type: ignore[misc]
            for at in range(len(path_of(results[0], family)))
        ]
        for family, called in FAMILIES.items()
    }
    ends = {
        called: mean(lambda one, which=which: baseline(one, which))  # type: ignore[misc]
        for which, called in (("pre", "pre-trained"), ("ft", "fine-tuned"))
    }
    title = f"What is learnt against what is kept: {runs_of(results)}, {what}"
    return curves(title, "target, % of the test set right", "controls, % of the test set right", drawn, ends)


def _published() -> str:
    head = ["CLIP ViT-B/32, 8 tasks, as published", "target", "control"]
    return table(head, [[name, *(f"{value:.1f}" for value in values)] for name, values in PAPER["one"].items()])


def lost_by(results: Sequence[Result]) -> float:
    """How many points of the controls fine-tuning lost."""
    return mean_of(results, lambda one: control_of(one, baseline(one, "pre")) - control_of(one, baseline(one, "ft")))


def back(results: Sequence[Result], where: str) -> str:
    """What LiNeS as chosen gives back, beside what the paper says of it, and beside constant scaling as chosen."""

    def change(family: str, value: Value) -> Paired:
        pairs = [(one, chosen(one, family), baseline(one, "ft")) for one in results]
        return paired((one["seed"], value(one, point) - value(one, ft)) for one, point, ft in pairs)

    published = {name: values[1] for name, values in PAPER["one"].items()}
    lost = lost_by(results)
    share = f" of {lost:.1f} lost" if lost > 0 else ""
    gain, cost = published["LiNeS"] - published["fine-tuned"], PAPER["one"]["LiNeS"][0] - PAPER["one"]["fine-tuned"][0]
    found, constant = change("lines", control_of), change("constant", control_of)
    return (
        f"* {where}, LiNeS as chosen changes the controls by {said(found)}{share}, and the target by "
        f"{change('lines', target_of).mean:+.1f}; constant scaling as chosen the controls by {constant.mean:+.1f} and "
        f"the target by {change('constant', target_of).mean:+.1f}. As published, LiNeS gives {gain:.1f} of "
        f"{published['pre-trained'] - published['fine-tuned']:.1f} back, and changes the target by {cost:+.1f}. What "
        f"comes back: {direction(gain, found)}."
    )
