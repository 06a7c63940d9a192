"""What docs/evidence.md says of merges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evidence.results import PAPER, Result, Results, best, counted, direction, listed, said, seeds_of, spread, table
from evidence.section_one import baseline, target_of
from evidence.statistics import Paired, corrected, paired

FAMILIES = {"plain": "without", "lines": "with LiNeS", "reversed": "reversed"}


def chosen(result: Result, family: str) -> Mapping[str, Any]:
    """The best on validation of a family's points."""
    return best(point for point in result["points"] if point["family"] == family)


def score(result: Result, family: str) -> float:
    """The mean over the tasks' test texts, of what was chosen."""
    return fmean(chosen(result, family)["test"][task] for task in result["tasks"])


def gain(results: Sequence[Result], family: str = "lines", than: str = "plain") -> Paired:
    """What a family has more than another, task by task."""
    return paired(
        (result["seed"], chosen(result, family)["test"][task] - chosen(result, than)["test"][task])
        for result in results
        for task in result["tasks"]
    )


def by_method(results: Results) -> tuple[dict[str, list[Result]], list[str]]:
    """The results of each method; and the methods, the best without LiNeS first."""
    methods: dict[str, list[Result]] = defaultdict(list)
    for result in results["merging"]:
        methods[result["method"]].append(result)
    return methods, sorted(methods, key=lambda name: -fmean(score(one, "plain") for one in methods[name]))


def section(results: Results) -> tuple[str, dict[str, str]]:
    """The section; it has no figure."""
    methods, order = by_method(results)
    rows = [
        [
            f"`{name}`",
            *(spread(methods[name], lambda one, family=family: score(one, family)) for family in FAMILIES),  # type: ignore[misc]
            said(gain(methods[name])),
            listed(seeds_of(methods[name])),
        ]
        for name in order
    ]
    head = ["method", *FAMILIES.values(), "LiNeS minus without", "seeds"]
    tasks = max((result["tasks"] for result in results["merging"]), key=len)
    parts = [
        "## 2. Merging",
        f"{counted(len(tasks), 'fine-tune')} of one seed in one model; mean over the {len(tasks)} tasks' test texts. "
        + _ends(results, seeds_of(results["merging"]))
        + " `lambda` without LiNeS and beta with it (alpha: auto) are chosen on validation from as many values"
        + f"{_largest(methods)}.",
        table(head, rows),
        verdicts(methods, order),
        _paper(methods),
    ]
    return "\n\n".join(part for part in parts if part), {}


def _ends(results: Results, seeds: Sequence[int]) -> str:
    """Between what merges lie: the pre-trained model, and each fine-tune on its own task."""
    rates = [one["rate"] for one in results.get("one", [])]
    if not rates:
        return ""
    common = max(set(rates), key=rates.count)
    own = [one for one in results["one"] if one["seed"] in seeds and one["rate"] == common]
    if not own:
        return ""
    pre, ft = (fmean(target_of(one, baseline(one, which)) for one in own) for which in ("pre", "ft"))
    return f"Pre-trained {pre:.1f}; each fine-tune on its own task {ft:.1f}."


def _largest(methods: Mapping[str, Sequence[Result]]) -> str:
    """Up to which lambda, and beta, methods were tried."""
    reached: dict[float, list[str]] = defaultdict(list)
    for name, results in sorted(methods.items()):
        points = [point for one in results for point in one["points"] if point["family"] == "plain"]
        reached[max(point["parameters.lambda"] for point in points)].append(f"`{name}`")
    usual = max(reached, key=lambda value: len(reached[value]))
    others = [f"{value:g} with {listed(names)}" for value, names in sorted(reached.items()) if value != usual]
    return f" up to {usual:g}{f', {listed(others)}' if others else ''}"


def verdicts(methods: Mapping[str, Sequence[Result]], order: Sequence[str]) -> str:
    """With which methods LiNeS helps and hurts; and the best merge on validation."""
    tests = {name: gain(methods[name]) for name in order}
    known = {name: test.p for name, test in tests.items() if test.p is not None}
    ps = dict(zip(known, corrected(list(known.values())), strict=True))
    groups: dict[str, list[str]] = defaultdict(list)
    for name, test in tests.items():
        if name in ps:
            beyond = "helps" if test.mean > 0 else "hurts"
            groups[beyond if ps[name] < 0.05 else "makes no difference beyond noise"].append(f"`{name}`")
        else:
            groups["does better" if test.mean > 0 else "does worse"].append(f"`{name}`")
    sentences = [f"LiNeS {what} with {listed(names)}." for what, names in groups.items()]
    if len(ps) > 1 and ps.keys() == tests.keys():
        sentences.append(f"(p of {counted(len(ps), 'method')} corrected together, after Holm.)")
    elif len(ps) < len(tests):
        sentences.append("Where nothing is said of noise there are too few seeds to tell it from.")
    name, family = max(
        ((name, family) for name in order for family in FAMILIES),
        key=lambda which: fmean(float(chosen(one, which[1])["objective"]) for one in methods[which[0]]),
    )
    score_ = fmean(score(one, family) for one in methods[name])
    sentences.append(f"Best on validation: `{name}` {FAMILIES[family]}, {score_:.1f} on test.")
    return " ".join(sentences)


def _paper(methods: Mapping[str, Sequence[Result]]) -> str:
    rows = []
    for name, published in PAPER["merging"].items():
        here = "not run"
        if name in methods:
            test = gain(methods[name])
            here = f"{said(test)}: {direction(published['8'][1] - published['8'][0], test)}"
        rows.append([f"`{name}`", *(f"{a:.1f} -> {b:.1f}" for a, b in published.values()), here])
    head = ["CLIP ViT-B/32, as published", *(f"{count} tasks" for count in PAPER["merging"]["ties"]), "here"]
    return "\n\n".join(["### Beside the paper", table(head, rows)])
