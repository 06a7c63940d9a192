"""The first lines of docs/evidence.md: what all sections come to, computed as they are."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from evidence import section_merging
from evidence.results import Result, Results, counted, said
from evidence.section_one import baseline, chosen, control_of, leads, target_of


def summary(results: Results) -> str:
    """What a reader should take away, as far as there are results for it."""
    sentences = []
    for rate, group in groupby(sorted(results.get("one", []), key=_rate), _rate):
        sentences += _of(list(group), f"The sentence encoder at learning rate {rate:g}")
    if results.get("digits"):
        sentences += _of(results["digits"], "The vision transformer on digits")
    if results.get("merging"):
        sentences.append(f"* **Merging**: {section_merging.verdicts(*section_merging.by_method(results))}")
    return "\n".join(["## In short", "", *sentences, "", _advice(results)]) if sentences else ""


def _rate(result: Result) -> float:
    return float(result["rate"])


def _of(results: Sequence[Result], name: str) -> list[str]:
    def mean(family: str) -> str:
        points = [(one, chosen(one, family)) for one in results]
        return f"{fmean(target_of(*each) for each in points):.1f} / {fmean(control_of(*each) for each in points):.1f}"

    def ends(which: str) -> str:
        points = [(one, baseline(one, which)) for one in results]
        return f"{fmean(target_of(*each) for each in points):.1f} / {fmean(control_of(*each) for each in points):.1f}"

    test = leads(results, "lines")
    alike = "LiNeS and constant scaling keep alike"
    better = "constant scaling keeps more" if test.mean < 0 else "LiNeS keeps more"
    text = (
        f"* **{name}**, {counted(len(results), 'fine-tune')}, target / controls: pre-trained {ends('pre')}, fine-tuned "
        f"{ends('ft')}; chosen on validation: LiNeS {mean('lines')}, constant scaling {mean('constant')}, reversed "
        f"{mean('reversed')}. At the same target "
        f"{better if test.beyond_noise else alike} of the controls: LiNeS has {said(test)}."
    )
    return [text]


def _advice(results: Results) -> str:
    """What to try first, by which of the two kept more at the same target."""
    groups: list[Sequence[Result]] = [
        list(group) for _, group in groupby(sorted(results.get("one", []), key=_rate), _rate)
    ]
    groups += [results["digits"]] if results.get("digits") else []
    tests = [leads(group, "lines") for group in groups]
    if any(test.beyond_noise and test.mean > 0 for test in tests):
        found = "LiNeS kept more than constant scaling in at least one of these set-ups"
    elif any(test.beyond_noise for test in tests):
        found = "constant scaling kept as much as LiNeS, or more, in each of these set-ups"
    else:
        found = "no difference between LiNeS and constant scaling was beyond noise in these set-ups"
    return (
        f"**What to try first**: {found}. The paper's margins, on CLIP's vision transformers, are larger than what "
        "runs here can show or refute. So measure both on your own model: `lines sweep` gives constant scaling and "
        "reversed depth as many trials as LiNeS, and says which did best ([how](sweeping.md), [for CLIP and for a 7B "
        "model](at-scale.md))."
    )
