"""The first lines of docs/evidence.md, and what README.md says of it: what all sections come to."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from statistics import fmean

from evidence import section_ablations, section_merging, section_soups
from evidence.results import Result, Results, counted, listed, said, seeds_of, verdict
from evidence.section_one import baseline, chosen, control_of, leads, target_of
from evidence.statistics import FEWEST, Paired

MORE, LESS = "LiNeS keeps more", "constant scaling keeps more"


def summary(results: Results) -> str:
    """What a reader should take away, as far as there are results for it."""
    sentences = [_of(group, called) for called, group in _groups(results).items()]
    if results.get("merging"):
        sentences.append(f"**Merging**: {section_merging.verdicts(*section_merging.by_method(results))}")
    if results.get("soups"):
        gains = section_soups.soup_gains(results)
        told = [f"{soup} {said(test)}, {verdict(test, 'better', 'worse')}" for soup, test in gains.items()]
        sentences.append(f"**Soups**, LiNeS against the soup as it is: {'; '.join(told)}.")
    if results.get("wise"):
        test = section_soups.wise_lead(results)
        sentences.append(
            "**WiSE-FT on misspelt texts**, LiNeS against the plain mixture at the same accuracy on clean ones: "
            f"{said(test)}, {verdict(test, 'more robust', 'less robust')}."
        )
    if results.get("policies"):
        gains_ = section_soups.policy_gains(results)
        told = [
            f"against {section_soups.MIXED[than]} {said(gains_['lines', than], 'nats a word', 3)}, "
            f"{verdict(gains_['lines', than], 'more', 'less')}"
            for than in ("plain", "constant")
        ]
        sentences.append(f"**Rewarded soups**, both rewards, LiNeS {'; '.join(told)}.")
    if results.get("rounding"):
        sentences.append(f"**Rounding**: {section_ablations.rounding_told(results)}.")
    if not sentences:
        return ""
    return "\n".join(["## In short", "", *(f"* {each}" for each in sentences), "", _advice(results)])


def _groups(results: Results) -> dict[str, Sequence[Result]]:
    """What item 1 was run on: a sentence encoder at each rate, and digits."""
    groups: dict[str, Sequence[Result]] = {
        f"the sentence encoder at learning rate {rate:g}": list(group)
        for rate, group in groupby(sorted(results.get("one", []), key=_rate), _rate)
    }
    if results.get("digits"):
        groups["the vision transformer on digits"] = results["digits"]
    return groups


def _rate(result: Result) -> float:
    return float(result["rate"])


def _of(results: Sequence[Result], called: str) -> str:
    def mean(family: str) -> str:
        points = [(one, chosen(one, family)) for one in results]
        return f"{fmean(target_of(*each) for each in points):.1f} / {fmean(control_of(*each) for each in points):.1f}"

    def ends(which: str) -> str:
        points = [(one, baseline(one, which)) for one in results]
        return f"{fmean(target_of(*each) for each in points):.1f} / {fmean(control_of(*each) for each in points):.1f}"

    test, turned = leads(results, "lines"), leads(results, "lines", "reversed")
    return (
        f"**{called[0].upper()}{called[1:]}**, {counted(len(results), 'fine-tune')}, target / controls: pre-trained "
        f"{ends('pre')}, fine-tuned {ends('ft')}; chosen on validation: LiNeS {mean('lines')}, constant scaling "
        f"{mean('constant')}, reversed {mean('reversed')}. At the same target LiNeS has of the controls, against "
        f"constant scaling, {said(test)}: {verdict(test, MORE, LESS)}; against reversed depth {said(turned)}: "
        f"{verdict(turned, MORE, 'reversed depth keeps more')}."
    )


def _advice(results: Results) -> str:
    """What to try first, for what kind of model."""
    return (
        f"**What to try first**: {expect(results)} These models are small, and the paper's are CLIP's vision "
        "transformers, on which it reports margins larger than any here: nothing here shows or refutes those. So "
        "measure both on your own model: `lines sweep` gives constant scaling and reversed depth as many trials as "
        "LiNeS, and says which did best ([how](sweeping.md), [for CLIP and for a 7B model](at-scale.md))."
    )


def expect(results: Results) -> str:
    """For each kind of model that was measured, LiNeS or constant scaling; and merges. README.md has it, too."""
    choices: dict[str, list[str]] = {}
    for called, group in _groups(results).items():
        choices.setdefault(_choice(leads(group, "lines")), []).append(called)
    sentences = [f"on {listed(names)} {choice}" for choice, names in choices.items()]
    if results.get("merging"):
        sentences.append(_of_merges(results))
    if not sentences:
        return ""
    text = "; ".join(sentences)
    seeds = seeds_of([one for item in ("one", "digits", "merging") for one in results.get(item, [])])
    few = ": too few to tell from noise" if len(seeds) < FEWEST else ""
    return f"{text[0].upper()}{text[1:]} ({counted(len(seeds), 'seed')}{few})."


def _choice(test: Paired) -> str:
    text = (
        f"LiNeS keeps {abs(test.mean):.1f} points {'more' if test.mean > 0 else 'less'} of the controls than constant "
        "scaling"
    )
    if test.beyond_noise:
        return f"{text}: begin with {'LiNeS' if test.mean > 0 else 'constant scaling'}"
    return text if test.p is None else f"{text}, {verdict(test, MORE, LESS)}"


def _of_merges(results: Results) -> str:
    methods, order = section_merging.by_method(results)
    gains = {name: section_merging.gain(methods[name]).mean for name in order}
    better = sum(gain > 0 for gain in gains.values())
    return (
        f"in merges LiNeS adds {min(gains.values()):+.1f} to {max(gains.values()):+.1f} points, above zero with "
        f"{better} of {counted(len(gains), 'method')}"
    )
