"""The first lines of docs/evidence.md, and what README.md says of it: what all sections come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import groupby

from evidence import section_ablations, section_merging, section_soups
from evidence.results import PAPER, Result, Results, brief, counted, mean_of, runs_of, said, sized, verdict
from evidence.section_one import (
    Point,
    baseline,
    chosen,
    control_of,
    has_retrieval,
    leads,
    lost_by,
    retrieval_of,
    retrieval_told,
    target_of,
)

MORE, LESS = "LiNeS keeps more", "constant scaling keeps more"


def summary(results: Results) -> str:
    """What a reader should take away, as far as there are results for it."""
    sentences = [_of(group, called) for called, group in _groups(results).items()]
    for called, merges in _merges(results).items():
        sentences.append(
            f"**{called}**. {section_merging.verdicts(*section_merging.by_method(merges), brief, short=True)}"
        )
    if results.get("soups"):
        told = [section_soups.soup_told(results, soup) for soup in section_soups.KINDS]
        sentences.append(f"**Soups**. {'. '.join(told)}.")
    if results.get("wise"):
        test = section_soups.wise_lead(results)
        sentences.append(
            "**WiSE-FT on misspelt texts**, LiNeS minus the plain mixture at the same accuracy on clean ones: "
            f"{said(test)}, {verdict(test, 'more robust', 'less robust')}."
        )
    if results.get("policies"):
        gains_ = section_soups.policy_gains(results)
        alike = section_soups.policy_gains(results, alike=True)
        told = [
            f"beside {section_soups.MIXED[than]} {said(gains_['lines', than], 'nats a word', 3)}, "
            f"{verdict(gains_['lines', than], 'higher rewards', 'lower rewards')} (both weighted alike "
            f"{alike['lines', than].mean:+.3f}, {verdict(alike['lines', than], 'higher', 'lower')})"
            for than in ("plain", "constant")
        ]
        means = "the mean of two rewards, each weighted as its policy"
        sentences.append(f"**Rewarded soups**, {means}: LiNeS {'; '.join(told)}.")
    if results.get("rounding"):
        sentences.append(
            f"**Rounding**: {section_ablations.rounding_told(results)}; {section_ablations.rounding_cost(results)}."
        )
    if not sentences:
        return ""
    return "\n".join(["## In short", "", *(f"* {each}" for each in sentences), "", _advice(results)])


def _groups(results: Results) -> dict[str, Sequence[Result]]:
    """What item 1 was run on: a sentence encoder at each rate, and digits."""
    groups: dict[str, Sequence[Result]] = {
        f"the sentence encoder (6 blocks) at learning rate {rate:g}": list(group)
        for rate, group in groupby(sorted(results.get("one", []), key=_rate), _rate)
    }
    if results.get("digits"):
        groups["the vision transformer on digits (12 blocks)"] = results["digits"]
    return groups


def _rate(result: Result) -> float:
    return float(result["rate"])


def _of(results: Sequence[Result], called: str) -> str:
    def both(take: Callable[[Result], Point]) -> str:
        values = (mean_of(results, lambda one, value=value: value(one, take(one))) for value in (target_of, control_of))  # type: ignore[misc]
        return " / ".join(f"{value:.1f}" for value in values)

    def mean(family: str) -> str:
        return both(lambda one: chosen(one, family))

    def ends(which: str) -> str:
        return both(lambda one: baseline(one, which))

    test, turned = leads(results, "lines"), leads(results, "lines", "reversed")
    return (
        f"**{called[0].upper()}{called[1:]}**, {runs_of(results)}, target / controls: pre-trained "
        f"{ends('pre')}, fine-tuned {ends('ft')}; chosen on validation: LiNeS {mean('lines')}, constant scaling "
        f"{mean('constant')}, reversed {mean('reversed')}. At the same target the controls of LiNeS minus those "
        f"of constant scaling are {said(test)}: {verdict(test, MORE, LESS)}; minus those of reversed depth "
        f"{said(turned)}: {verdict(turned, MORE, 'reversed depth keeps more')}.{retrieval_told(results)}"
    )


def _merges(results: Results, item: str = "merging") -> dict[str, Sequence[Result]]:
    """What item 2 was run on; or depth alone."""
    called = {item: "Merges of sentence encoders", f"digits-{item}": "Merges of vision transformers on digits"}
    return {name: results[own] for own, name in called.items() if results.get(own)}


def _advice(results: Results) -> str:
    """What to try first, for what kind of model."""
    gains = [after - before for counts in PAPER["merging"].values() for before, after in counts.values()]
    pre, ft, edited = (PAPER["one"][name] for name in ("pre-trained", "fine-tuned", "LiNeS"))
    text = (
        "These models are small. The paper's are CLIP's vision transformers: there LiNeS gives back "
        f"{edited[1] - ft[1]:.1f} of {pre[1] - ft[1]:.1f} points lost for {ft[0] - edited[0]:.1f} of target, and "
        f"adds {min(gains):.1f} to {max(gains):.1f} points to merges. This page does not test that. So measure "
        "both on your own model: `lines sweep` gives constant scaling and reversed depth as many trials as LiNeS, and "
        "says which did best ([how](sweeping.md), [for CLIP and for a 7B model](at-scale.md))."
    )
    return "\n\n".join(["**What to try first**:", expect(results), text])


def expect(results: Results) -> str:
    """For each kind of model that was measured, LiNeS or constant scaling; and merges. A list in Markdown, which
    README.md has, too.
    """
    told = [_choice(called, group) for called, group in _groups(results).items()]
    alone = _merges(results, "depth-alone")
    told += [_of_merges(called, merges, alone.get(called, ())) for called, merges in _merges(results).items()]
    told += _so(results)
    return "\n".join(f"* {each}" for each in told)


def _of_merges(called: str, merges: Sequence[Result], alone: Sequence[Result]) -> str:
    """What LiNeS adds to merges on one kind of model, where their coefficient is tuned and where it is not; and what
    depth alone adds, if that was measured.
    """
    ends, middle = (section_merging.untuned(merges, of="ends"), section_merging.untuned(merges, of="middle"))
    tests = {"with the best coefficient": section_merging.gain(merges), "with the middle one of those tried": middle}
    tests["with the smallest and the largest"] = ends
    told = [f"{brief(test, 'points')} {where}, {verdict(test, *['beyond noise'] * 2)}" for where, test in tests.items()]
    text = (
        f"**{called}**, in the mean over methods. LiNeS adds {'; '.join(told)}. Part of the last is not depth: the "
        "mean coefficient of LiNeS varies less."
    )
    if not alone:
        return text
    whole, depth = (section_merging.untuned(alone, "lines", than, "ends") for than in ("plain", "even"))
    return (
        f"{text} There, with {counted(len({result['method'] for result in alone}), 'method')}, it adds "
        f"{brief(whole, 'points')}; depth alone, beside one coefficient for all blocks that is the mean of LiNeS', "
        f"{brief(depth, 'points')}, {verdict(depth, *['beyond noise'] * 2)}."
    )


def _so(results: Results) -> list[str]:
    """What follows from all of these, where they agree."""
    tests = [leads(group, "lines") for group in _groups(results).values()]
    tuned, far = (
        [measure(merges) for merges in _merges(results).values()]
        for measure in (section_merging.gain, lambda own: section_merging.untuned(own, of="ends"))
    )
    so = []
    if tests and all(test.p is not None for test in tests):
        ahead, behind = (any(test.beyond_noise and sign * test.mean > 0 for test in tests) for sign in (1, -1))
        if behind and not ahead:
            so.append(
                "for one fine-tune try constant scaling first (as in `--alpha 0.5 --beta 0`), and LiNeS beside it"
            )
        elif ahead and not behind:
            so.append("for one fine-tune try LiNeS first")
    if far and all(test.beyond_noise and test.mean > 0 for test in far):
        so.append(
            "a merge risks less with LiNeS where nobody tunes its coefficient: at the smallest and the largest that we "
            "tried it is better in the mean over methods"
        )
        other = [
            section_merging.untuned(alone, "even", of="ends") for alone in _merges(results, "depth-alone").values()
        ]
        if other and all(test.beyond_noise and test.mean > 0 for test in other):
            so.append(
                "much of that comes of coefficients that vary less, and one coefficient for all blocks, alpha + beta / "
                "2, has it, too"
            )
        if not any(test.beyond_noise for test in tuned):
            so.append("once the coefficient is tuned, no difference could be shown")
    return [f"**So**, on models like these: {'; '.join(so)}."] if so else []


def _choice(called: str, results: Sequence[Result]) -> str:
    """LiNeS or constant scaling, on one kind of model."""
    test = leads(results, "lines")
    more, less = ("LiNeS", "constant scaling") if test.mean > 0 else ("constant scaling", "LiNeS")
    size = sized(replace(test, mean=abs(test.mean))).removeprefix("+")
    lost = f"whose fine-tunes lost {lost_by(results):.1f} points of the controls"
    text = (
        f"**{called[0].upper()}{called[1:]}**, {lost}. At the same target {more} keeps {size} points more of them than "
        f"{less}"
    )
    if test.p is None:
        return f"{text}: {verdict(test, MORE, LESS)}."
    found = leads(results, "lines", kept=retrieval_of) if has_retrieval(results) else None
    other = ""
    if found is not None and found.beyond_noise:
        other = f"; in retrieval {'LiNeS' if found.mean > 0 else 'constant scaling'} keeps {abs(found.mean):.1f} more"
    if not test.beyond_noise:
        return f"{text}, within noise{other}."
    return f"{text}{other}: {'there is little between them' if abs(test.mean) < 0.5 else f'begin with {more}'}."
