"""What docs/evidence.md says of soups and of WiSE-FT on texts with typing errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from evidence.figures import curves
from evidence.policies import LAYERS, SAMPLES, WEIGHTS, front
from evidence.results import (
    PAPER,
    Result,
    Results,
    best,
    counted,
    direction,
    in_words,
    said,
    seeds_of,
    spread,
    table,
    verdict,
)
from evidence.section_one import FAMILIES
from evidence.setup import FULL
from evidence.soups import MEMBERS
from evidence.statistics import Paired, lead, paired

Point = Mapping[str, Any]
MIXED = {"plain": "the plain mixture", "lines": "LiNeS with alpha = beta = 1", "constant": "the mixture times 1.5"}


KINDS = ("uniform", "greedy")


def _of_soup(result: Result, soup: str, family: str) -> list[Point]:
    return [point for point in result["points"] if (point["soup"], point["family"]) == (soup, family)]


def _plain(result: Result, soup: str) -> float:
    """A soup as it is, on test texts."""
    return float(next(p for p in _of_soup(result, soup, "lines") if p["beta"] == 0)["test"]["clean"])


def _chosen(result: Result, soup: str, family: str) -> float:
    return float(best(_of_soup(result, soup, family))["test"]["clean"])


def soup_gains(results: Results, family: str = "lines") -> dict[str, Paired]:
    """What LiNeS adds to each kind of soup, or another family."""
    return {
        soup: paired((one["seed"], _chosen(one, soup, family) - _plain(one, soup)) for one in results["soups"])
        for soup in KINDS
    }


def _used(results: Sequence[Result], soup: str, family: str) -> int:
    """In how many soups a family was chosen with another value than that of the soup as it is."""
    key, same = ("beta", 0.0) if family == "lines" else ("alpha", 1.0)
    return sum(best(_of_soup(one, soup, family))[key] != same for one in results)


def soup_told(results: Results, soup: str) -> str:
    """What LiNeS does to one kind of soup, by its choice of beta: 0 is the soup as it is."""
    own, test = results["soups"], soup_gains(results)[soup]
    used = _used(own, soup, "lines")
    if not used:
        unused = f"was chosen in each of {len(own)}, so that LiNeS was not used"
        return f"{soup.capitalize()}: beta = 0, the soup as it is, {unused}"
    return (
        f"{soup.capitalize()}: LiNeS, which was chosen in {used} of {len(own)} (beta above 0), adds {said(test)}, "
        f"{verdict(test, 'better', 'worse')}"
    )


def soups(results: Results) -> tuple[str, dict[str, str]]:
    """Of soups; there is no figure."""
    own = results["soups"]
    rows = [
        ["the best member, chosen on validation", spread(own, lambda one: _chosen(one, "single", "single")), "", ""],
        [
            "members, mean",
            spread(own, lambda one: fmean(p["test"]["clean"] for p in _of_soup(one, "single", "single"))),
            "",
            "",
        ],
    ]
    sentences, constant = [], soup_gains(results, "constant")
    for soup, test in soup_gains(results).items():
        rows.append(
            [
                f"{soup} soup",
                spread(own, lambda one, soup=soup: _plain(one, soup)),  # type: ignore[misc]
                spread(own, lambda one, soup=soup: _chosen(one, soup, "lines")),  # type: ignore[misc]
                spread(own, lambda one, soup=soup: _chosen(one, soup, "constant")),  # type: ignore[misc]
            ]
        )
        before, after = PAPER["soups"][soup]
        used = _used(own, soup, "constant")
        scaled = f"A constant other than 1 was chosen in {used} of {len(own)}, and adds {said(constant[soup])}."
        sentences.append(
            f"* {soup_told(results, soup)}. As published, of 70 fine-tunes on ImageNet, {before} -> {after}"
            f"{f': here {direction(after - before, test)}' if _used(own, soup, 'lines') else ''}. {scaled}"
        )
    head = ["% of the target's test texts right", "as it is", "with LiNeS, beta chosen", "scaled, constant chosen"]
    members = fmean(one["members"] for one in own)
    text = (
        f"Soups of {counted(len({one['task'] for one in own}), 'task')}, {in_words(seeds_of(own))}: {MEMBERS} "
        f"fine-tunes each, of two rates and other orders of texts; a greedy soup has {members:.1f} of them in the "
        f"mean. beta and the constant are chosen on {FULL.sizes.validation} texts only, so the choice is rough; of "
        "equal values the first is taken, which is the soup as it is."
    )
    return "\n\n".join(["## 3. Soups and robustness", "### Soups", text, table(head, rows), "\n".join(sentences)]), {}


def policy_gains(results: Results, *, alike: bool = False) -> dict[tuple[str, str], Paired]:
    """What a mixture has more than another, each reward weighted as its policy, or both alike; in nats a word."""

    def gain(result: Result, family: str, than: str) -> float:
        """The mean over mixtures, which are of the same two policies."""
        pairs = zip(WEIGHTS, front(result["points"], family), front(result["points"], than), strict=True)
        shares = ((0.5 if alike else weight, one, two) for weight, one, two in pairs)
        return fmean(share * (one[0] - two[0]) + (1 - share) * (one[1] - two[1]) for share, one, two in shares)

    against = (("lines", "plain"), ("constant", "plain"), ("lines", "constant"))
    return {
        (family, than): paired((one["seed"], gain(one, family, than)) for one in results["policies"])
        for family, than in against
    }


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
    alike = policy_gains(results, alike=True)
    spans = [abs(fronts["plain"][-1][at] - fronts["plain"][0][at]) for at in (0, 1)]
    sentences = [
        f"* {MIXED[family][0].upper()}{MIXED[family][1:]} minus {MIXED[than]}, each reward weighted as its policy: "
        f"{said(test, 'nats a word', 3)}: {verdict(test, 'higher rewards', 'lower rewards')}; both weighted alike: "
        f"{said(alike[family, than], 'nats a word', 3)}, "
        f"{verdict(alike[family, than], 'higher rewards', 'lower rewards')}."
        for (family, than), test in policy_gains(results).items()
    ]
    sentences.append("* The paper gives fronts as pictures, without numbers: with LiNeS they lie further out.")
    text = (
        f"A causal language model of {LAYERS} blocks, trained here on all texts; two policies by policy gradients, "
        f"rewarded for words of `{styles[0]}` and of `{styles[1]}` (log-odds against all texts, nats a word), mixed "
        f"w to 1 - w; {SAMPLES} texts drawn of each. {counted(len(own), 'seed')}. "
        f"Pre-trained {pre[0]:+.2f} / {pre[1]:+.2f}; from one policy to the other the rewards change by "
        f"{spans[0]:.1f} and {spans[1]:.1f}."
    )
    drawn = {
        f"{'reversed' if family == 'plain' else family}: {called.partition(' with ')[0]}": fronts[family]
        for family, called in MIXED.items()
    }
    figure = curves("Rewarded soups", f"reward for {styles[0]}", f"reward for {styles[1]}", drawn)
    name = "evidence-policies.svg"
    parts = ["### Rewarded soups", text, table(["w", *MIXED.values()], rows), "\n".join(sentences)]
    return "\n\n".join([*parts, f"![Two rewards, with and without LiNeS.]({name})"]), {name: figure}


def _path(result: Result, family: str) -> list[Point]:
    points = [point for point in result["points"] if point["family"] == family]
    return sorted(points, key=lambda point: float(point["gamma"]))


def _curve(result: Result, family: str) -> list[tuple[float, float]]:
    return [(point["test"]["clean"], point["test"]["misspelt"]) for point in _path(result, family)]


def wise_lead(results: Results) -> Paired:
    """How much more LiNeS has on misspelt texts than the plain mixture, at the same accuracy on clean ones."""
    return paired(
        (one["seed"], lead(_curve(one, "lines"), _curve(one, "constant")) or 0.0) for one in results["wise"]
    )  # both begin at the base


def wise(results: Results) -> tuple[str, dict[str, str]]:
    """Of WiSE-FT."""
    own = results["wise"]

    def at(result: Result, family: str, number: int, text: str) -> float:
        return float(_path(result, family)[number]["test"][text])

    rows = [
        [
            f"{called}, gamma {point['gamma']:g}",
            *(
                spread(own, lambda one, family=family, number=number, text=text: at(one, family, number, text))  # type: ignore[misc]
                for text in ("clean", "misspelt")
            ),
        ]
        for family, called in FAMILIES.items()
        for number, point in enumerate(_path(own[0], family))
    ]
    test = wise_lead(results)
    drawn = {
        f"{family}: {called}": [
            (fmean(x for x, _ in points), fmean(y for _, y in points))
            for points in zip(*(_curve(one, family) for one in own), strict=True)
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
        "The mixing weight gamma goes from the base (0) to the fine-tune (1); with LiNeS to the fine-tune scaled with "
        "alpha = beta = 0.5, with reversed depth to the one scaled the other way round. "
        f"{counted(len(own), 'fine-tune')}, {in_words(seeds_of(own))}. At the same accuracy on clean texts, LiNeS "
        f"minus the plain mixture is {said(test)} on misspelt ones: "
        f"{verdict(test, 'LiNeS is more robust', 'the plain mixture is more robust')}. The paper gives curves for "
        "CLIP on shifted ImageNets, as pictures: with LiNeS they lie further out."
    )
    name = "evidence-wise.svg"
    parts = ["### WiSE-FT on texts with typing errors", text, table(["", "clean", "misspelt"], rows)]
    return "\n\n".join([*parts, f"![Clean against misspelt texts.]({name})"]), {name: figure}
