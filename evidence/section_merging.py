"""What docs/evidence.md says of merges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any, Literal

from evidence.merging import STEPS, methods_of
from evidence.results import (
    PAPER,
    Result,
    Results,
    best,
    brief,
    counted,
    direction,
    in_words,
    listed,
    mean_of,
    said,
    seeds_of,
    spread,
    table,
    verdict,
)
from evidence.section_one import baseline, target_of
from evidence.setup import FULL
from evidence.statistics import Paired, paired, together

Say = Callable[[Paired, str], str]

Which = Literal["all", "ends", "smallest", "middle", "largest"]
BEYOND = "beyond noise"
FAMILIES = {"plain": "without", "lines": "with LiNeS", "reversed": "reversed"}


def chosen(result: Result, family: str) -> Mapping[str, Any]:
    """The best on validation of a family's points."""
    return best(_points(result, family))


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


def untuned(results: Sequence[Result], family: str = "lines", than: str = "plain", of: Which = "all") -> Paired:
    """The same in the mean over values that were tried, on validation, task by task: what is to be expected of a
    coefficient that nobody tuned.

    Args:
        results: of merges.
        family: that is held beside another.
        than: the other.
        of: all values; the smallest and the largest; or one of these, or the middle one.
    """
    return paired(
        (result["seed"], _mean(result, family, [task], of) - _mean(result, than, [task], of))
        for result in results
        for task in result["tasks"]
    )


def _mean(result: Result, family: str, tasks: Sequence[str], of: Which = "all") -> float:
    """What values of a family get right of tasks' validation texts."""
    points = sorted(_points(result, family), key=_coefficient)
    middle = len(points) // 2
    taken = {
        "all": points,
        "ends": [points[0], points[-1]],
        "smallest": points[:1],
        "middle": points[middle : middle + 1],
        "largest": points[-1:],
    }[of]
    return fmean(point["tasks"][task] for point in taken for task in tasks)


def by_method(results: Sequence[Result]) -> tuple[dict[str, list[Result]], list[str]]:
    """The results of each method; and the methods, the best without LiNeS first."""
    methods: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        methods[result["method"]].append(result)
    return methods, sorted(methods, key=lambda name: -fmean(score(one, "plain") for one in methods[name]))


def section(results: Results) -> tuple[str, dict[str, str]]:
    """Of sentence encoders; there is no figure."""
    own = results["merging"]
    parts = [
        "## 2. Merging",
        "### Sentence encoders",
        _compared(own, results.get("one", []), "test texts"),
        _left_out(),
    ]
    return "\n\n".join(parts), {}


def vision(results: Results) -> tuple[str, dict[str, str]]:
    """Of the demo's vision transformers; there is no figure."""
    own = results["digits-merging"]
    parts = ["### Vision transformers on digits", _compared(own, results.get("digits", []), "test images")]
    return "\n\n".join(parts), {}


def tasks(results: Results) -> tuple[str, dict[str, str]]:
    """Of merges of fewer models, and of all; there is no figure."""
    every = [*results["digits-tasks"], *results.get("digits-merging", [])]
    methods = {result["method"] for result in results["digits-tasks"]}
    counts = sorted({len(result["tasks"]) for result in every})
    groups = {
        f"`{method}`, {count} tasks": [one for one in every if (one["method"], len(one["tasks"])) == (method, count)]
        for method in sorted(methods)
        for count in counts
    }
    groups = {name: own for name, own in groups.items() if own}
    text = (
        "The same vision transformers, fewer or more of them in one model, each measured on its own tasks. The paper "
        "merges 8 to 20. The p of a column are corrected together, after Holm."
    )
    return "\n\n".join(["### More tasks", text, _rows(groups, "merge")]), {}


def alone(results: Results) -> tuple[str, dict[str, str]]:
    """What depth alone does to merges of sentence encoders; there is no figure."""
    return _alone(results["depth-alone"], results.get("merging", [])), {}


def alone_on_digits(results: Results) -> tuple[str, dict[str, str]]:
    """What depth alone does to merges of the demo's vision transformers; there is no figure."""
    return _alone(results["digits-depth-alone"], results.get("digits-merging", [])), {}


ALONE = {"plain": "without", "even": "one coefficient", "lines": "with LiNeS"}


def _alone(results: Sequence[Result], merges: Sequence[Result]) -> str:
    """Each method without LiNeS, with it, and with one coefficient for all blocks, which is the mean of LiNeS'.

    Args:
        results: of these.
        merges: of the same methods and others, reversed, too.
    """
    methods: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        methods[result["method"]].append(result)
    texts = {name: {family: _spread_of(own, family) for family in ALONE} for name, own in methods.items()}
    order = sorted(methods, key=lambda name: -fmean(_mean(one, "plain", one["tasks"]) for one in methods[name]))
    depth = together({name: untuned(own, "lines", "even") for name, own in methods.items()})
    whole = together({name: untuned(own) for name, own in methods.items()})
    rows = [[f"`{name}`", *texts[name].values(), brief(depth[name]), brief(whole[name])] for name in order]
    head = ["on validation", *ALONE.values(), "LiNeS minus one coefficient", "LiNeS minus without"]
    text = (
        f"{counted(len(methods), 'method')} (the paper's, the mean, and what had done best on texts), each over its "
        f"{len(STEPS)} values: without LiNeS, with it, and with one "
        "coefficient for all blocks, the mean of LiNeS' (alpha + beta / 2; what lies outside the blocks has alpha in "
        "both). So LiNeS minus one coefficient is what depth does by itself; the rest of what LiNeS adds is that its "
        "coefficients are others in the mean. All are merges of the same fine-tunes, on validation, where nothing is "
        "chosen. The p of a column are corrected together, after Holm."
    )
    return "\n\n".join(["#### Depth alone", text, table(head, rows), " ".join(_told_alone(results, depth, merges))])


def _spread_of(results: Sequence[Result], family: str) -> str:
    return spread(results, lambda one: _mean(one, family, one["tasks"]))


def _told_alone(results: Sequence[Result], depth: Mapping[str, Paired], merges: Sequence[Result]) -> list[str]:
    """What depth alone comes to, in sentences."""

    def told(test: Paired) -> str:
        return f"{said(test)}, {verdict(test, BEYOND, BEYOND)}"

    mean, rest = untuned(results, "lines", "even"), untuned(results, "even", of="ends")
    small, large = (untuned(results, "lines", "even", of) for of in ("smallest", "largest"))
    number = sum(test.beyond_noise for test in depth.values()) or "none"
    each = f"; beyond noise with {number} of {counted(len(depth), 'method')}" if mean.p is not None else ""
    parts = [
        f"In the mean over methods depth alone adds {told(mean)}{each}.",
        f"At the smallest value it adds {told(small)}; at the largest {told(large)}.",
        f"At the smallest and the largest one coefficient adds {told(rest)}: that is not depth.",
        f"With each tuned on validation, depth alone adds on test {told(gain(results, 'lines', 'even'))}.",
    ]
    turned = untuned(merges, "lines", "reversed") if merges else None
    if turned is not None and turned.beyond_noise and turned.mean > 0 and not mean.beyond_noise:
        parts.append(
            "Reversed depth, which has the same mean, is worse than LiNeS (above): so the direction matters, but that "
            "growing coefficients are better than even ones is not shown here."
        )
    return parts


def _left_out() -> str:
    """Methods that were not run, and why."""
    from lines_cli.methods import METHODS

    ran = methods_of(FULL)
    names = [f"`{name}`" for name in METHODS if name not in ran]
    return f"Not here are the methods that merge two models only, or weights in place of task vectors: {listed(names)}."


def _compared(results: Sequence[Result], ones: Sequence[Result], test: str) -> str:
    """Each method without LiNeS, with it and reversed, and the paper's numbers.

    Args:
        results: of the merges.
        ones: of the fine-tunes that were merged, and others.
        test: what is tested on.
    """
    methods, order = by_method(results)
    merged = max((result["tasks"] for result in results), key=len)
    text = (
        f"{counted(len(merged), 'fine-tune')} of one seed in one model, {in_words(seeds_of(results))}; mean over the "
        f"{len(merged)} tasks' {test}. {_ends(ones, seeds_of(results))} Tuned: `lambda` without LiNeS, beta with it "
        f"and reversed (alpha: auto), are chosen on validation from {len(STEPS)} values, a fifth to the whole "
        f"of the largest{_largest(methods)}. Untuned: the mean over all of these values, on "
        "validation. With LiNeS and reversed the coefficients are the same, in "
        "opposite orders. Part of what they add untuned is not depth: their mean coefficient, alpha + beta / 2, varies "
        "less than lambda, about another middle. The p of a column are corrected together, after Holm."
    )
    table_ = _rows({f"`{name}`": methods[name] for name in order}, "method")
    return "\n\n".join([text, table_, verdicts(methods, order), _edges(methods, order), _paper(methods)])


def _rows(groups: Mapping[str, Sequence[Result]], what: str) -> str:
    """A table of merges, tuned and untuned."""
    tuned_ = together({name: gain(own) for name, own in groups.items()})
    loose_ = together({name: untuned(own) for name, own in groups.items()})
    rows = [
        [
            name,
            *(spread(own, lambda one, family=family: score(one, family)) for family in FAMILIES),  # type: ignore[misc]
            brief(tuned_[name]),
            brief(loose_[name]),
        ]
        for name, own in groups.items()
    ]
    return table([what, *FAMILIES.values(), "LiNeS minus without", "the same, untuned"], rows)


def _ends(ones: Sequence[Result], seeds: Sequence[int]) -> str:
    """Between what merges lie: the pre-trained model, and each fine-tune on its own task."""
    rates = [one.get("rate") for one in ones]
    own = [one for one in ones if one["seed"] in seeds and one.get("rate") == max(set(rates), key=rates.count)]
    if not own:
        return ""
    pre, ft = (mean_of(own, lambda one, which=which: target_of(one, baseline(one, which))) for which in ("pre", "ft"))  # type: ignore[misc]
    return f"Pre-trained {pre:.1f}; each fine-tune on its own task {ft:.1f}."


def _points(result: Result, family: str) -> list[Mapping[str, Any]]:
    return [point for point in result["points"] if point["family"] == family]


def _coefficient(point: Mapping[str, Any]) -> float:
    """lambda, or beta: what a family is tuned by."""
    return float(point["beta" if "beta" in point else "parameters.lambda"])


def _largest(methods: Mapping[str, Sequence[Result]]) -> str:
    """Up to which lambda, and beta, methods were tried."""
    reached: dict[float, list[str]] = defaultdict(list)
    for name, results in sorted(methods.items()):
        points = [point for one in results for point in one["points"] if point["family"] == "plain"]
        reached[round(max(map(_coefficient, points)), 6)].append(f"`{name}`")
    usual = max(reached, key=lambda value: len(reached[value]))
    others = [f"{value:g} with {listed(names)}" for value, names in sorted(reached.items()) if value != usual]
    return f", which is {usual:g}{f'; {listed(others)}' if others else ''}"


def _edges(methods: Mapping[str, Sequence[Result]], order: Sequence[str]) -> str:
    """Where the largest value that was tried was chosen, or the smallest, so that one beyond might have done better."""
    told = []
    for end, called in ((max, "largest"), (min, "smallest")):
        for family, which in (("plain", "without LiNeS"), ("lines", "with it"), ("reversed", "reversed")):
            names = []
            for name in order:
                tried = [(one, [*map(_coefficient, _points(one, family))]) for one in methods[name]]
                at = sum(len(of) > 1 and _coefficient(chosen(one, family)) == end(of) for one, of in tried)
                names += [f"`{name}` ({at})"] if at else []
            told += [f"the {called} {which}: {listed(names)}"] if names else []
    if not told:
        return "The value chosen was never the largest tried, nor the smallest."
    return (
        "Where the value chosen was the largest tried, or the smallest, one beyond might do better (seeds): "
        f"{'; '.join(told)}."
    )


def verdicts(
    methods: Mapping[str, Sequence[Result]], order: Sequence[str], say: Say = said, *, short: bool = False
) -> str:
    """With which methods LiNeS helps and hurts, tuned; what it does untuned; and the best merge on validation."""
    every = [one for own in methods.values() for one in own]
    turned = gain(every, "reversed")
    reversed_ = f"Reversed depth adds {say(turned, 'points')}, {verdict(turned, BEYOND, BEYOND)}"
    untuned_ = _with_each(methods, untuned, say) if short else loose(methods, say)
    sentences = [
        f"**Tuned**, {tuned(methods, say)}. {reversed_}.",
        f"**Untuned**, in the mean over all values tried, on validation, {untuned_}.",
    ]
    name, family = max(
        ((name, family) for name in order for family in FAMILIES),
        key=lambda which: fmean(float(chosen(one, which[1])["objective"]) for one in methods[which[0]]),
    )
    score_ = fmean(score(one, family) for one in methods[name])
    sentences.append(f"Best on validation: `{name}` {FAMILIES[family]}, {score_:.1f} on test.")
    return " ".join(sentences)


def tuned(methods: Mapping[str, Sequence[Result]], say: Say = said) -> str:
    """What LiNeS does to merges that are tuned: in the mean over methods, and with each."""
    return _with_each(methods, gain, say)


def loose(methods: Mapping[str, Sequence[Result]], say: Say = said) -> str:
    """What LiNeS and reversed depth do to merges that nobody tuned: over all values tried, and at three of them."""
    every = [one for own in methods.values() for one in own]

    def told(test: Paired) -> str:
        return f"{say(test, 'points')}, {verdict(test, BEYOND, BEYOND)}"

    parts = [f"{_with_each(methods, untuned, say)}."]
    for called, family in (("LiNeS", "lines"), ("reversed depth", "reversed")):
        ends, middle = untuned(every, family, of="ends"), untuned(every, family, of="middle")
        parts.append(
            f"At the smallest and the largest value {called} adds {told(ends)}; at the middle one {told(middle)}."
        )
    parts.append(f"Over all, LiNeS minus reversed depth is {told(untuned(every, 'lines', 'reversed'))}")
    return " ".join(parts)


def _with_each(methods: Mapping[str, Sequence[Result]], measure: Callable[..., Paired], say: Say) -> str:
    """What LiNeS adds, in the mean over methods and with each."""
    whole = measure([one for own in methods.values() for one in own])
    tests = together({name: measure(results) for name, results in methods.items()})
    text = f"LiNeS adds {say(whole, 'points')}, {verdict(whole, BEYOND, BEYOND)}"
    if len(tests) == 1:
        return text
    gains = [round(test.mean, 1) + 0.0 for test in tests.values()]
    text += f"; by method {min(gains):+.1f} to {max(gains):+.1f}"
    if any(test.p is None for test in tests.values()):
        return text
    shown = [
        f"it {what} {listed(names)}"
        for what, sign in (("helps", 1), ("hurts", -1))
        if (names := [f"`{name}`" for name, test in tests.items() if test.beyond_noise and sign * test.mean > 0])
    ]
    number = sum(test.beyond_noise for test in tests.values()) or "none"
    of = f"{BEYOND} with {number} of {counted(len(tests), 'method')} (p corrected together, after Holm)"
    return f"{text}, {of}{': ' if shown else ''}{' and '.join(shown)}"


def _paper(methods: Mapping[str, Sequence[Result]]) -> str:
    tests = together({name: gain(own) for name, own in methods.items()})
    rows = []
    for name, published in PAPER["merging"].items():
        here = "not run"
        if name in tests:
            here = f"{brief(tests[name])}: {direction(published['8'][1] - published['8'][0], tests[name])}"
        rows.append([f"`{name}`", *(f"{a:.1f} -> {b:.1f}" for a, b in published.values()), here])
    head = ["CLIP ViT-B/32, as published", *(f"{count} tasks" for count in PAPER["merging"]["ties"]), "here"]
    return "\n\n".join(["#### Beside the paper", table(head, rows)])
