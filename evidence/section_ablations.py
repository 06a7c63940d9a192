"""What docs/evidence.md says of the ablations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from evidence.ablations import LISTS
from evidence.results import Result, Results, brief, counted, in_words, said, seeds_of, spread, table, verdict
from evidence.section_merging import chosen as chosen_merge
from evidence.section_one import baseline, chosen, control_of, curve, rule, target_of
from evidence.statistics import Paired, correlation, lead, paired, together

Point = Mapping[str, Any]
Take = Callable[[Result], Sequence[Point]]
OUTSIDE = {
    "alpha": "alpha, as the blocks' first",
    "base": "the base's",
    "keep": "the fine-tune's",
}


def _one_of(results: Results, result: Result) -> Result:
    """The result of item 1 of the same fine-tune."""
    keys = ("seed", "task", "rate")
    return next(one for one in results["one"] if all(one[key] == result[key] for key in keys))


def depth(results: Results) -> tuple[str, dict[str, str]]:
    """Of other depth rules, and of what lies outside the blocks."""
    own = [one for one in results["depth"] if _has_one(results, one)]
    if not own:
        return "## 4. Ablations", {}
    ones = {(one["seed"], one["task"]): _one_of(results, one) for one in own}

    def points(result: Result, what: str, key: str, value: object) -> list[Point]:
        return [p for p in result["points"] if p["what"] == what and p.get(key) == value]

    def row(name: str, take: Take, test: Paired | None) -> list[str]:
        def picked(result: Result) -> Point:
            one = ones[result["seed"], result["task"]]
            return max(take(result), key=lambda point: rule(one, point))

        target = spread(own, lambda one: target_of(one, picked(one)))
        compared = "no target in common" if test is None else brief(test)
        return [name, target, spread(own, lambda one: control_of(one, picked(one))), compared]

    def ahead(take: Take) -> Paired | None:
        found = [
            (result["seed"], found)
            for result in own
            if (found := lead(_points(result, take(result)), curve(ones[result["seed"], result["task"]], "constant")))
            is not None
        ]
        return paired(found) if found else None

    def rows(takes: Mapping[str, Take]) -> list[list[str]]:
        tests = {name: test for name, take in takes.items() if (test := ahead(take)) is not None}
        tests = together(tests)
        return [row(name, take, tests.get(name)) for name, take in takes.items()]

    rules = sorted({p["schedule"] for r in own for p in r["points"] if p["what"] == "schedule" and "schedule" in p})
    halves = {name: values[0] for name, values in LISTS.items()}
    depths: dict[str, Take] = {
        f"`{name}`": lambda one, name=name: points(one, "schedule", "schedule", name)  # type: ignore[misc]
        for name in rules
    }
    for name, first in halves.items():
        depths[name] = lambda one, first=first: [p for p in points_of_list(one) if p["schedule"][0] == first]  # type: ignore[misc]

    def points_outside(result: Result, value: str) -> list[Point]:
        if value == "alpha":
            return points(result, "schedule", "schedule", "linear")
        return points(result, "outside", "outside", value)

    outside: dict[str, Take] = {
        called: lambda one, value=value: points_outside(one, value)  # type: ignore[misc]
        for value, called in OUTSIDE.items()
    }
    head = ["target", "controls", "controls minus constant scaling's at the same target"]
    text = (
        f"Of {counted(len(own), 'fine-tune')} ({in_words(seeds_of(own))}); alpha is chosen from as many values in "
        "each row; half of the blocks alone have no alpha to choose. The first block's coefficient holds outside, too. "
        "The p of each table are corrected together, after Holm. The paper has no table of these."
    )
    parts = ["## 4. Ablations", text, "### Depth rules", table(["rule", *head], rows(depths)), "### Outside the blocks"]
    return "\n\n".join([*parts, table(["embeddings (linear rule)", *head], rows(outside))]), {}


def _points(result: Result, points: Sequence[Point]) -> list[tuple[float, float]]:
    """Target and control of each, from the least of the update to the most."""
    ordered = sorted(points, key=lambda point: float(point.get("alpha", 0.0)))
    return [(target_of(result, point), control_of(result, point)) for point in ordered]


def points_of_list(result: Result) -> list[Point]:
    """The points whose coefficients are listed."""
    return [point for point in result["points"] if point["what"] == "list" and "schedule" in point]


def alpha(results: Results) -> tuple[str, dict[str, str]]:
    """Of merges with a fixed alpha, and of TIES that trims each tensor."""
    own = results["alpha"]
    rows, sentences = [], []
    for method in sorted({result["method"] for result in own}):
        pairs = [
            (fixed, auto)
            for fixed in own
            for auto in results.get("merging", [])
            if fixed["method"] == auto["method"] == method and fixed["seed"] == auto["seed"]
        ]
        if not pairs:
            continue

        def mean(result: Result, family: str) -> float:
            return fmean(chosen_merge(result, family)["test"][task] for task in result["tasks"])

        rows.append([f"`{method}`, alpha auto", spread([auto for _, auto in pairs], lambda one: mean(one, "lines"))])
        rows.append([f"`{method}`, alpha fixed", spread([fixed for fixed, _ in pairs], lambda one: mean(one, "fixed"))])
        test = _between(pairs, "fixed", "lines")
        values = [
            sum(point["family"] == family for point in one["points"])
            for one, family in zip(pairs[0], ("fixed", "lines"), strict=True)
        ]
        sentences.append(
            f"* `{method}`: a fixed alpha, chosen with beta among {values[0]} pairs, minus `auto`, of which beta alone "
            f"is chosen among {values[1]}: {said(test)}: {verdict(test, 'fixed is better', '`auto` is better')}."
        )
        if method == "ties":
            for family, called in (("tensor", "without LiNeS"), ("tensor, LiNeS", "with LiNeS")):
                other = "plain" if family == "tensor" else "lines"
                rows.append(
                    [
                        f"`ties`, each tensor trimmed, {called}",
                        spread([fixed for fixed, _ in pairs], lambda one, family=family: mean(one, family)),  # type: ignore[misc]
                    ]
                )
                test = _between(pairs, family, other)
                sentences.append(
                    f"* `ties`, each tensor trimmed minus the whole model, {called}: {said(test)}: "
                    f"{verdict(test, 'by tensor is better', 'the whole is better')}."
                )
    parts = ["### Alpha fixed or auto; trimming", table(["merge", "mean of the tasks"], rows), "\n".join(sentences)]
    return "\n\n".join(parts), {}


def _between(pairs: Sequence[tuple[Result, Result]], family: str, other: str) -> Paired:
    return paired(
        (fixed["seed"], chosen_merge(fixed, family)["test"][task] - chosen_merge(auto, other)["test"][task])
        for fixed, auto in pairs
        for task in fixed["tasks"]
    )


def inspect(results: Results) -> tuple[str, dict[str, str]]:
    """Of what the update's norms tell beforehand."""
    own = [result for result in results["inspect"] if _has_one(results, result)]
    if not own:
        return "### What `lines inspect` tells of alpha", {}
    columns, blocks = {}, []
    for rate in sorted({result["rate"] for result in own}):
        group = [result for result in own if result["rate"] == rate]
        ones = [_one_of(results, result) for result in group]
        shares, norms = ([result[key] for result in group] for key in ("first_third", "relative_norm"))
        alphas = [float(chosen(one, "lines").get("alpha", 1.0)) for one in ones]
        ahead = [lead(curve(one, "lines"), curve(one, "constant")) or 0.0 for one in ones]
        lost = [control_of(one, baseline(one, "pre")) - control_of(one, baseline(one, "ft")) for one in ones]
        columns[f"{rate:g} ({counted(len(group), 'fine-tune')})"] = [
            correlation(*pair) for pair in ((shares, alphas), (shares, ahead), (norms, lost), (norms, alphas))
        ]
        relative = [fmean(100 * result["relative"][at] for result in group) for at in range(len(group[0]["relative"]))]
        blocks.append([f"{rate:g}", *(f"{value:.2f}" for value in relative)])
    names = (
        "share of the update in the first third, and the alpha chosen",
        "the same share, and how much LiNeS is ahead of constant scaling",
        "size of the update relative to the weights, and what the controls lost",
        "the same size, and the alpha chosen",
    )
    rows = [[name, *(f"{found[at]:+.2f}" for found in columns.values())] for at, name in enumerate(names)]
    head = ["rate", *(f"block {at + 1}" for at in range(len(blocks[0]) - 1))]
    text = (
        "Rank correlations over the fine-tunes of each learning rate, which are not independent: they describe these, "
        "and are no test. Below them the update of each block, in per cent of its weights. The paper has no such table."
    )
    parts = [text, table(["rank correlation of", *columns], rows), table(head, blocks)]
    return "\n\n".join(["### What `lines inspect` tells of alpha", *parts]), {}


def _has_one(results: Results, result: Result) -> bool:
    keys = ("seed", "task", "rate")
    return any(all(one[key] == result[key] for key in keys) for one in results.get("one", []))


def left_of(results: Results, rate: float, name: str) -> tuple[float, float]:
    """The coefficient of the first block that was asked for, and what an output in one rounding has of it."""
    layers = [
        next(point for point in one["points"] if point["rounding"] == name)["layers"][0]
        for one in results["rounding"]
        if one["rate"] == rate
    ]
    return fmean(asked for asked, _ in layers), fmean(real for _, real in layers)


def rounding_told(results: Results) -> str:
    """What rounding does to the first block, at each rate."""
    parts = []
    for rate in sorted({one["rate"] for one in results["rounding"]}):
        asked, nearest = left_of(results, rate, "nearest")
        stochastic, float32 = (left_of(results, rate, name)[1] for name in ("stochastic", "float32"))
        parts.append(
            f"at learning rate {rate:g} the first block gets {nearest:.2f} of the update where {asked:.2f} was asked "
            f"for, {stochastic:.2f} with stochastic rounding, {float32:.2f} in float32"
        )
    return f"stored in bfloat16 and rounded to the nearest, {'; '.join(parts)}"


def rounding(results: Results) -> tuple[str, dict[str, str]]:
    """Of what rounding to bfloat16 leaves of an edit."""
    own = results["rounding"]
    rows = []
    for rate in sorted({result["rate"] for result in own}):
        group = [result for result in own if result["rate"] == rate]
        for name in ("nearest", "stochastic", "float32"):

            def take(result: Result, name: str = name) -> Point:
                return _stored(result, name)

            layers = [
                [asked, fmean(take(result)["layers"][at][1] for result in group)]
                for at, (asked, _) in enumerate(take(group[0])["layers"])
            ]
            rows.append(
                [
                    f"{rate:g}, {name}",
                    *(f"{real:.2f}" for _, real in layers),
                    spread(group, lambda one: target_of(one, take(one))),
                    spread(group, lambda one: control_of(one, take(one))),
                ]
            )
    asked = [f"{value:g} asked" for value, _ in own[0]["points"][0]["layers"]]
    text = (
        f"`lines edit` with the defaults, of {counted(len(own), 'fine-tune')}: the coefficients that the blocks really "
        f"get, and what the output gets right, evaluated in float32. In short: {rounding_told(results)}. The paper has "
        "nothing on rounding."
    )
    parts = ["### Rounding", text, table(["rate, output", *asked, "target", "controls"], rows)]
    return "\n\n".join([*parts, "\n".join(_rounded(own))]), {}


def _rounded(results: Sequence[Result]) -> list[str]:
    """What rounding costs at each rate, against an output in float32."""
    sentences = []
    for rate in sorted({result["rate"] for result in results}):
        told = []
        for name in ("nearest", "stochastic"):
            tests = [
                paired(
                    (one["seed"], value(one, _stored(one, name)) - value(one, _stored(one, "float32")))
                    for one in results
                    if one["rate"] == rate
                )
                for value in (target_of, control_of)
            ]
            told.append(f"{name} changes the target by {said(tests[0])} and the controls by {said(tests[1])}")
        sentences.append(f"* At {rate:g}, against float32, {'; '.join(told)}.")
    return sentences


def _stored(result: Result, name: str) -> Point:
    return next(point for point in result["points"] if point["rounding"] == name)
