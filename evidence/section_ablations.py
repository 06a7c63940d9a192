"""What docs/evidence.md says of the ablations."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from evidence.ablations import LISTS
from evidence.results import Result, Results, brief, counted, in_words, said, seeds_of, spread, table, verdict
from evidence.section_merging import chosen as chosen_merge
from evidence.section_one import baseline, by_default, chosen, control_of, curve, rule, target_of
from evidence.statistics import Paired, correlation, lead, paired, together

Point = Mapping[str, Any]
Take = Callable[[Result], Sequence[Point]]
OUTSIDE = {
    "alpha": "alpha, as the blocks' first",
    "base": "the base's",
    "keep": "the fine-tune's",
}


def _one_of(results: Results, result: Result) -> Result | None:
    """The result of item 1 of the same fine-tune, trained on the same processor; None if there is none."""
    keys = ("seed", "task", "rate", "on")
    return next((one for one in results.get("one", []) if all(one.get(key) == result.get(key) for key in keys)), None)


def depth(results: Results) -> tuple[str, dict[str, str]]:
    """Of other depth rules, and of what lies outside the blocks."""
    ones = {(each["seed"], each["task"]): one for each in results["depth"] if (one := _one_of(results, each))}
    own = [each for each in results["depth"] if (each["seed"], each["task"]) in ones]
    if not own:
        return "## 4. Ablations", {}

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
    rows, tests, said_of = [], {}, {}
    for method in sorted({result["method"] for result in own}):
        pairs = [
            (other, merge)
            for other in own
            for merge in results.get("merging", [])
            if other["method"] == merge["method"] == method
            and all(other.get(key) == merge.get(key) for key in ("seed", "on"))
        ]
        if not pairs:
            continue
        here = {point["family"] for other, _ in pairs for point in other["points"]}
        for family, (than, row, called, more, less) in COMPARED.items():
            if family not in here:
                continue
            if family == "fixed":
                rows.append([f"`{method}`, alpha auto", spread([merge for _, merge in pairs], _mean_of(than))])
            rows.append([f"`{method}`, {row}", spread([other for other, _ in pairs], _mean_of(family))])
            numbers = [_tried(one, which) for one, which in zip(pairs[0], (family, than), strict=True)]
            among = "" if len(set(numbers)) == 1 else ", chosen among {} points and {}".format(*numbers)
            name = f"`{method}`, {called}{among}"
            tests[name] = _between(pairs, family, than)
            said_of[name] = (more, less, _on_validation(pairs, family, than))
    sentences = []
    for name, test in together(tests).items():
        more, less, seen = said_of[name]
        doubted = ", on test alone" if test.beyond_noise and seen.mean * test.mean < 0 else ""
        sentences.append(f"* {name}: {said(test)}: {verdict(test, more, less)}{doubted}; on validation {brief(seen)}.")
    text = (
        "Differences on test texts, whose p are corrected together, after Holm; after each the same on validation, "
        "where both sides were chosen."
    )
    parts = ["### Alpha fixed or auto; trimming", table(["merge", "mean of the tasks"], rows), text]
    return "\n\n".join([*parts, "\n".join(sentences)]), {}


# Of each family: that of the merges it is held beside, its row, the difference, and what it comes to.
COMPARED = {
    "fixed": ("lines", "alpha fixed", "a fixed alpha minus `auto`", "fixed is better", "`auto` is better"),
    "tensor": (
        "plain",
        "each tensor trimmed, without LiNeS",
        "each tensor trimmed minus the whole model, without LiNeS",
        "by tensor is better",
        "the whole is better",
    ),
    "tensor, LiNeS": (
        "lines",
        "each tensor trimmed, with LiNeS",
        "each tensor trimmed minus the whole model, with LiNeS",
        "by tensor is better",
        "the whole is better",
    ),
}


def _mean_of(family: str) -> Callable[[Result], float]:
    """The mean over the tasks' test texts, of what was chosen."""
    return lambda one: fmean(chosen_merge(one, family)["test"][task] for task in one["tasks"])


def _tried(result: Result, family: str) -> int:
    return sum(point["family"] == family for point in result["points"])


def _on_validation(pairs: Sequence[tuple[Result, Result]], family: str, than: str) -> Paired:
    return paired(
        (other["seed"], chosen_merge(other, family)["objective"] - chosen_merge(merge, than)["objective"])
        for other, merge in pairs
    )


def _between(pairs: Sequence[tuple[Result, Result]], family: str, other: str) -> Paired:
    return paired(
        (fixed["seed"], chosen_merge(fixed, family)["test"][task] - chosen_merge(auto, other)["test"][task])
        for fixed, auto in pairs
        for task in fixed["tasks"]
    )


def inspect(results: Results) -> tuple[str, dict[str, str]]:
    """Of what the update's norms tell beforehand."""
    own = [(result, one) for result in results["inspect"] if (one := _one_of(results, result))]
    if not own:
        return "### What `lines inspect` tells of alpha", {}
    columns, blocks = {}, []
    for rate in sorted({result["rate"] for result, _ in own}):
        group, ones = zip(*(pair for pair in own if pair[0]["rate"] == rate), strict=True)
        shares, norms = ([result[key] for result in group] for key in ("first_third", "relative_norm"))
        alphas = [float(chosen(one, "lines").get("alpha", 1.0)) for one in ones]
        ahead = [lead(curve(one, "lines"), curve(one, "constant")) or 0.0 for one in ones]
        lost = [_kept(one, baseline(one, "pre")) for one in ones]
        returned = [_kept(one, by_default(one)) for one in ones]
        pairs = (
            (shares, alphas),
            (shares, returned),
            (shares, ahead),
            (norms, lost),
            (norms, returned),
            (norms, alphas),
        )
        columns[f"{rate:g} ({counted(len(group), 'fine-tune')})"] = [correlation(*pair) for pair in pairs]
        relative = [fmean(100 * result["relative"][at] for result in group) for at in range(len(group[0]["relative"]))]
        blocks.append([f"{rate:g}", *(f"{value:.2f}" for value in relative)])
    names = (
        "share of the update in the first third, and the alpha chosen",
        "the same share, and what the defaults give back to the controls",
        "the same share, and how much LiNeS is ahead of constant scaling",
        "size of the update relative to the weights, and what the controls lost",
        "the same size, and what the defaults give back to the controls",
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


def _kept(one: Result, point: Point) -> float:
    """How many points of the controls a point has more than the fine-tune; equal where only stored decimals differ."""
    return round(control_of(one, point) - control_of(one, baseline(one, "ft")), 2)


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


def rounding_cost(results: Results) -> str:
    """How much accuracies change with it, at most, in the mean over fine-tunes."""
    largest = max(abs(test.mean) for tests in _costs(results["rounding"]).values() for test in tests)
    return f"no mean accuracy changes by more than {largest:.1f} points"


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


def _costs(results: Sequence[Result]) -> dict[tuple[float, str], tuple[Paired, Paired]]:
    """How an output in one rounding differs from one in float32, on the target and on the controls, at each rate."""

    def cost(rate: float, name: str, value: Callable[[Result, Point], float]) -> Paired:
        return paired(
            (one["seed"], value(one, _stored(one, name)) - value(one, _stored(one, "float32")))
            for one in results
            if one["rate"] == rate
        )

    return {
        (rate, name): (cost(rate, name, target_of), cost(rate, name, control_of))
        for rate in sorted({result["rate"] for result in results})
        for name in ("nearest", "stochastic")
    }


def _rounded(results: Sequence[Result]) -> list[str]:
    """What rounding costs at each rate, against an output in float32."""
    told: dict[float, list[str]] = defaultdict(list)
    for (rate, name), (target, control) in _costs(results).items():
        told[rate].append(f"{name} changes the target by {said(target)} and the controls by {said(control)}")
    return [f"* At {rate:g}, against float32, {'; '.join(each)}." for rate, each in told.items()]


def _stored(result: Result, name: str) -> Point:
    return next(point for point in result["points"] if point["rounding"] == name)
