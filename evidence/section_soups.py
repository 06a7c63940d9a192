"""What docs/evidence.md says of soups and of WiSE-FT on texts with typing errors."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean
from typing import Any

from evidence.figures import curves
from evidence.policies import LAYERS, SAMPLES, WEIGHTS, front
from evidence.results import PAPER, Result, Results, best, counted, direction, listed, said, seeds_of, spread, table
from evidence.section_one import FAMILIES
from evidence.soups import MEMBERS
from evidence.statistics import lead, paired

Point = Mapping[str, Any]
MIXED = {"plain": "plain mixture", "lines": "with LiNeS, alpha = beta = 1", "constant": "times 1.5"}


def soups(results: Results) -> tuple[str, dict[str, str]]:
    """Of soups; there is no figure."""
    own = results["soups"]

    def of(result: Result, soup: str, family: str) -> list[Point]:
        return [point for point in result["points"] if (point["soup"], point["family"]) == (soup, family)]

    def plain(result: Result, soup: str) -> float:
        return float(next(p for p in of(result, soup, "lines") if p["beta"] == 0)["test"]["clean"])

    def chosen(result: Result, soup: str, family: str) -> float:
        return float(best(of(result, soup, family))["test"]["clean"])

    rows = [
        ["the best member, chosen on validation", spread(own, lambda one: chosen(one, "single", "single")), "", ""],
        [
            "members, mean",
            spread(own, lambda one: fmean(p["test"]["clean"] for p in of(one, "single", "single"))),
            "",
            "",
        ],
    ]
    sentences = []
    for soup in ("uniform", "greedy"):
        rows.append(
            [
                f"{soup} soup",
                spread(own, lambda one, soup=soup: plain(one, soup)),  # type: ignore[misc]
                spread(own, lambda one, soup=soup: chosen(one, soup, "lines")),  # type: ignore[misc]
                spread(own, lambda one, soup=soup: chosen(one, soup, "constant")),  # type: ignore[misc]
            ]
        )
        test = paired([chosen(one, soup, "lines") - plain(one, soup) for one in own])
        before, after = PAPER["soups"][soup]
        sentences.append(
            f"* {soup}: LiNeS adds {said(test)}; as published, of 70 fine-tunes on ImageNet, {before} -> {after}: "
            f"{direction(after - before, test)}."
        )
    head = ["% of the target's test texts right", "as it is", "with LiNeS, beta chosen", "scaled, constant chosen"]
    members = fmean(one["members"] for one in own)
    text = (
        f"Soups of {counted(len({one['task'] for one in own}), 'task')}, seeds {listed(seeds_of(own))}: {MEMBERS} "
        f"fine-tunes each, of two rates and other orders of texts; a greedy soup has {members:.1f} of them."
    )
    return "\n\n".join(["## 3. Soups and robustness", "### Soups", text, table(head, rows), "\n".join(sentences)]), {}


def policies(results: Results) -> tuple[str, dict[str, str]]:
    """Of rewarded soups."""
    own = results["policies"]
    styles = own[0]["styles"]
    fronts = {
        family: [
            (fmean(one for one, _ in points), fmean(other for _, other in points))
            for points in zip(*(front(result["points"], family) for result in own), strict=True)
        ]
        for family in MIXED
    }
    rows = [
        [f"{weight:g}", *(f"{one:+.2f} / {other:+.2f}" for one, other in (fronts[family][at] for family in MIXED))]
        for at, weight in enumerate(WEIGHTS)
    ]
    pre = [fmean(result["points"][0]["rewards"][at] for result in own) for at in (0, 1)]
    sentences = []
    for family in ("lines", "constant"):
        test = paired(
            [
                weight * (mixed[0] - plain[0]) + (1 - weight) * (mixed[1] - plain[1])
                for result in own
                for weight, mixed, plain in zip(
                    WEIGHTS, front(result["points"], family), front(result["points"], "plain"), strict=True
                )
            ]
        )
        sentences.append(
            f"* {MIXED[family]} minus the plain mixture, each reward weighted as its policy: {test.mean:+.3f} nats a "
            f"word ({test.positive} of {test.pairs} above zero, p = {test.p:.3f}): "
            f"{'beyond' if test.beyond_noise else 'within'} noise."
        )
    text = (
        f"A causal language model of {LAYERS} blocks, trained here on all texts; two policies by policy gradients, "
        f"rewarded for words of `{styles[0]}` and of `{styles[1]}` (log-odds against all texts, nats a word), mixed "
        f"w to 1 - w; {SAMPLES} texts drawn of each. {counted(len(own), 'seed')}. "
        f"Pre-trained {pre[0]:+.2f} / {pre[1]:+.2f}."
    )
    drawn = {f"{'reversed' if family == 'plain' else family}: {MIXED[family]}": fronts[family] for family in MIXED}
    figure = curves("Rewarded soups", f"reward for {styles[0]}", f"reward for {styles[1]}", drawn)
    name = "evidence-policies.svg"
    parts = ["### Rewarded soups", text, table(["w", *MIXED.values()], rows), "\n".join(sentences)]
    return "\n\n".join([*parts, f"![Two rewards, with and without LiNeS.]({name})"]), {name: figure}


def wise(results: Results) -> tuple[str, dict[str, str]]:
    """Of WiSE-FT."""
    own = results["wise"]

    def path(result: Result, family: str) -> list[Point]:
        points = [point for point in result["points"] if point["family"] == family]
        return sorted(points, key=lambda point: float(point["gamma"]))

    def curve(result: Result, family: str) -> list[tuple[float, float]]:
        return [(point["test"]["clean"], point["test"]["misspelt"]) for point in path(result, family)]

    def at(result: Result, family: str, number: int, text: str) -> float:
        return float(path(result, family)[number]["test"][text])

    rows = [
        [
            f"{called}, gamma {point['gamma']:g}",
            *(
                spread(own, lambda one, family=family, number=number, text=text: at(one, family, number, text))  # type: ignore[misc]
                for text in ("clean", "misspelt")
            ),
        ]
        for family, called in FAMILIES.items()
        for number, point in enumerate(path(own[0], family))
    ]
    test = paired([lead(curve(one, "lines"), curve(one, "constant")) for one in own])
    drawn = {
        f"{family}: {called}": [
            (fmean(x for x, _ in points), fmean(y for _, y in points))
            for points in zip(*(curve(one, family) for one in own), strict=True)
        ]
        for family, called in FAMILIES.items()
    }
    figure = curves(
        "WiSE-FT: the target's texts as they are, and misspelt",
        "target, % of test texts right",
        "with typing errors, % right",
        drawn,
    )
    text = (
        f"The mixing weight gamma goes from the base (0) to the fine-tune (1); with LiNeS alpha = beta = 0.5. "
        f"{counted(len(own), 'fine-tune')}, {listed(seeds_of(own))}. At the same accuracy on clean texts LiNeS has, "
        f"against the plain mixture, {said(test)} on misspelt ones: "
        f"{'beyond' if test.beyond_noise else 'within'} noise."
    )
    name = "evidence-wise.svg"
    parts = ["### WiSE-FT on texts with typing errors", text, table(["", "clean", "misspelt"], rows)]
    return "\n\n".join([*parts, f"![Clean against misspelt texts.]({name})"]), {name: figure}
