"""`make reproduce`: its parts on a tiny random encoder and a few texts; and its page, which is what its data says."""

from __future__ import annotations

import gzip
import json
import math
import random
import re
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
import yaml

from evidence import (
    ablations,
    judge,
    merging,
    one,
    page,
    policies,
    section_ablations,
    section_merging,
    section_one,
    section_soups,
    setup,
    sources,
    summary,
    texts,
    vision,
)
from evidence.__main__ import phases, run_job
from evidence.encoder import Encoder, prototypes, write_model
from evidence.page import DOCS, PAGE, SECTIONS, processors_of, render, told
from evidence.policies import Size as PolicySize
from evidence.results import brief, direction, read_results, runs_of, said, spread, verdict
from evidence.setup import Setup, run_lines
from evidence.statistics import Paired, at_target, corrected, correlation, lead, paired, together
from lines_cli.storage.names import RECIPE
from support.run import run_lines as in_process

WORDS = [f"w{at}" for at in range(60)]
SIZES = texts.Sizes(prototypes=3, train=64, validation=12, test=18, retrieval=6)


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
    """Three tasks of texts that are told apart by their words, and a random encoder of three blocks."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    draw = random.Random(0)
    pools = {
        name: {f"{name}-{at}": [_text(draw, 20 * number + 5 * at) for _ in range(60)] for at in range(3)}
        for number, name in enumerate(("a", "b", "c"))
    }
    work = tmp_path / "work"
    work.mkdir()
    words = {f"w{at}": f"w{at + 1} w{at + 2} w{at}" for at in range(20)}
    (work / "texts.json").write_text(json.dumps([pools, words]), encoding="utf-8")
    vocabulary = {token: at for at, token in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    folder = tmp_path / "source"
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    config.architectures = ["BertModel"]
    config.save_pretrained(folder)
    write_model(BertModel(config), work / "base", folder)
    _in_this_process(monkeypatch)
    return Setup(seeds=(1,), tasks=("a", "b", "c"), rate=5e-3, epochs=8, sizes=SIZES, grid=(0.1, 0.5), work=str(work))


def _text(draw: random.Random, start: int) -> str:
    return " ".join(f"w{(start + draw.randrange(12)) % 60}" for _ in range(draw.randrange(4, 9)))


def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `lines` commands of the harness run here, which saves the start of a process for each."""

    def run(*arguments: object, context: dict[str, Any] | None = None) -> dict[str, Any]:
        monkeypatch.setenv(setup.VARIABLE, json.dumps(context))
        for own in (judge, vision):
            own._judge.cache_clear()
        return in_process(*arguments, "--json").json

    for module in (one, setup):
        monkeypatch.setattr(module, "run_lines", run)


def test_the_page_is_what_the_data_says() -> None:
    """docs/evidence.md and its figures come from evidence/results alone: `python -m evidence page` writes them anew."""
    text, figures = render(read_results(), processors_of())
    assert (DOCS / PAGE).read_text(encoding="utf-8") == text
    assert {path.name for path in DOCS.glob("evidence-*.svg")} == figures.keys()
    for name, drawing in figures.items():
        assert (DOCS / name).read_text(encoding="utf-8") == drawing


@pytest.mark.slow
def test_one_fine_tune(tiny: Setup) -> None:
    """A fine-tune is trained once and swept once; what a killed run left behind is gone on with."""
    one.run(tiny, 1, "a", tiny.rate)
    (result,) = read_results(tiny.results)["one"]
    points = result["points"]
    assert [point["family"] for point in points].count("lines") == len(tiny.grid)
    assert {point["family"] for point in points} == {"pre", "ft", "lines", "constant", "reversed"}
    assert {*points[0]["test"]} == {"a", "b", "c", texts.RETRIEVAL}
    pre, ft = (next(p for p in points if p["family"] == which) for which in ("pre", "ft"))
    assert ft["test"]["a"] > pre["test"]["a"], "it learnt nothing"
    work = Path(tiny.work)
    weights = work / "seed1" / f"a-{tiny.rate:g}" / "ft" / "model.safetensors"
    trials = work / "seed1" / f"a-{tiny.rate:g}" / "one" / "best.sweep" / "trials.jsonl"
    path = setup.result_path(tiny, "one", 1, "a", f"{tiny.rate:g}")
    before, lines = (weights.stat().st_mtime_ns, path.read_bytes()), trials.read_text().splitlines()
    one.run(tiny, 1, "a", tiny.rate)
    path.unlink()
    trials.write_text("\n".join(lines[:-2]) + "\n")  # killed before its last trials
    one.run(tiny, 1, "a", tiny.rate)
    assert (weights.stat().st_mtime_ns, path.read_bytes()) == before
    assert [json.loads(line)["trial"] for line in trials.read_text().splitlines()[1:]] == [
        json.loads(line)["trial"] for line in lines[1:]
    ]


@pytest.mark.slow
def test_merging(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family of a method has as many points, and the page can be made of them."""
    monkeypatch.setattr(merging, "STEPS", (0.3, 1.0))
    for task in tiny.tasks:
        one.run(tiny, 1, task, tiny.rate)
    for method in ("task_arithmetic", "average"):
        merging.run(tiny, 1, method)
    results = read_results(tiny.results)
    assert [result["method"] for result in results["merging"]] == ["average", "task_arithmetic"]
    for result in results["merging"]:
        assert [point["family"] for point in result["points"]] == [f for f in merging.FAMILIES for _ in range(2)]
    average, total = ([p for p in r["points"] if p["family"] == "plain"] for r in results["merging"])
    for mean, whole in zip(average, total, strict=True):  # a mean is tried further than a sum
        assert mean["parameters.lambda"] == pytest.approx(4 * whole["parameters.lambda"])
    text, figures = render(results)
    assert "`task_arithmetic`" in text
    assert len(figures) == 1


@pytest.mark.slow
def test_one_coefficient_is_the_mean(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each value of beta there is a merge whose blocks all have the mean of the coefficients, and nothing else is
    another: so it is the same task vector in the mean.
    """
    monkeypatch.setattr(merging, "STEPS", (0.4, 1.0))
    merging.run_alone(tiny, 1, "task_arithmetic")
    (result,) = read_results(tiny.results)["depth-alone"]
    betas = {family: [p["beta"] for p in result["points"] if p["family"] == family] for family in ("lines", "even")}
    assert betas == {"lines": [0.4, 1.0], "even": [0.2, 0.5]}
    work = Path(tiny.work) / "seed1" / "depth-alone" / "task_arithmetic"
    recipes = [yaml.safe_load((work / name / "best" / RECIPE).read_text()) for name in ("lines", "even")]
    steps, even = ([layer["coefficient"] for layer in recipe["layers"]] for recipe in recipes)
    at, half = (recipe["lines"]["beta"] for recipe in recipes)
    alpha = 1 / len(tiny.tasks)
    assert fmean(steps) == pytest.approx(alpha + at / 2)
    assert even == [pytest.approx(alpha + half)] * len(steps)
    assert [recipe["lines"]["alpha"] for recipe in recipes] == [pytest.approx(alpha)] * 2


@pytest.mark.slow
def test_rewarded_soups(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ends of the plain mixture are the policies themselves; and what stands behind a text's end does not count."""
    monkeypatch.setattr(policies, "run_lines", one.run_lines)
    monkeypatch.setattr(policies, "Size", lambda: PolicySize(pretrain=4, policy=2, batch=4))
    policies.run(tiny, 1, "styles")
    (result,) = read_results(tiny.results)["policies"]
    folder, found = Path(tiny.work) / "seed1" / "policies", policies.texts_of(tiny)
    for style, at in zip(result["styles"], (-1, 0), strict=True):
        alone = policies._rewards(folder / style, found, 1)
        assert policies.front(result["points"], "plain")[at] == pytest.approx(alone, abs=1e-4)
    assert len(result["points"]) == 1 + 3 * len(policies.WEIGHTS)
    rows = torch.tensor([[0, 1, 2, 0, 2], [0, 0, 1, 1, 1]])
    assert policies.reward(rows, torch.tensor([9.0, 1.0, 3.0])).tolist() == [2.0, 0.0]


@pytest.mark.slow
def test_every_item(tiny: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """All jobs of a full run, in their order; then the page says something of each item, and no job is done twice."""
    monkeypatch.setattr(merging, "methods_of", lambda _: ("task_arithmetic", "ties"))
    monkeypatch.setattr(merging, "STEPS", (0.3, 1.0))
    monkeypatch.setattr(merging, "SOME_METHODS", ("ties",))
    monkeypatch.setattr(vision, "DOMAINS", vision.DOMAINS[:3])
    for module in (ablations, policies):
        monkeypatch.setattr(module, "run_lines", one.run_lines)
    monkeypatch.setattr(policies, "Size", lambda: PolicySize(pretrain=4, policy=2, batch=4))
    monkeypatch.setattr(vision, "trained", _random_digits)
    monkeypatch.setattr(vision, "pretrained", lambda *of: _random_digits(*of, ""))
    full = replace(tiny, strong=2e-2, light=1e-3, full=True)
    jobs = [job for phase in phases(full, "1") for job in phase]
    for job in jobs:
        run_job(full, job)
    assert all(setup.result_path(full, *job).exists() for job in jobs if job[0] != "train")
    results = read_results(full.results)
    text, figures = render(results)
    assert results.keys() == SECTIONS.keys()
    assert "Not run yet" not in text
    assert len(re.findall("^##", text, re.MULTILINE)) == 25
    assert len(figures) == 5
    before = {path: path.stat().st_mtime_ns for path in Path(full.work).rglob("*.json*")}
    for job in jobs:
        run_job(full, job)
    assert before == {path: path.stat().st_mtime_ns for path in before}


def _random_digits(full: Setup, seed: int, target: str) -> Path:
    """An encoder of digits that has learnt nothing."""
    folder = vision.folder_of(full, seed) / (target or "pretrained") / "ft"
    if not folder.exists():
        torch.manual_seed(len(target) + seed)
        vision.digits.save_encoder(vision.digits.Encoder(), folder)
    return folder


@pytest.mark.slow
def test_a_command_that_fails_is_an_error(tmp_path: Path) -> None:
    """What `lines` says is not lost."""
    with pytest.raises(RuntimeError, match=r"exit code 3\n(.|\n)*nothing"):
        run_lines("edit", tmp_path / "nothing", tmp_path / "nothing", "-o", tmp_path / "out")


def test_texts_are_dealt_without_overlap() -> None:
    """No text is in two parts; classes are as even as can be; another seed deals otherwise."""
    pool = {"x": [f"x{at}" for at in range(40)], "y": [f"y{at}" for at in range(40)]}
    sizes = texts.Sizes(prototypes=2, train=30, validation=10, test=20)
    task, other = (texts.deal(pool, "t", seed, sizes) for seed in (1, 2))
    parts = [task.prototypes, task.train, task.validation, task.test]
    assert [len(part.texts) for part in parts] == [4, 30, 10, 20]
    assert len({text for part in parts for text in part.texts}) == 64
    assert [part.labels.count(0) for part in parts] == [2, 15, 5, 10]
    assert all(
        text[0] == task.classes[label] for part in parts for text, label in zip(part.texts, part.labels, strict=True)
    )
    assert task == texts.deal(pool, "t", 1, sizes) != other
    with pytest.raises(ValueError, match="t: 76 texts, expected 630 and more"):
        texts.deal(pool, "t", 1, texts.Sizes(prototypes=2, train=600, validation=10, test=20))


def test_a_text_of_two_classes_counts_for_neither() -> None:
    assert texts._largest([("x", "one"), ("y", "one"), ("x", " two  three ")]) == {"x": ["two three"]}


def test_typing_errors() -> None:
    """About as many as asked for, the same for the same seed, and none in what is no letter."""
    text = "the quick brown fox jumps over the lazy dog " * 20
    assert texts.misspelt(text, 1) == texts.misspelt(text, 1) != texts.misspelt(text, 2)
    assert texts.misspelt(text, 1, rate=0.0) == text
    assert texts.misspelt("12 34, 56!", 1, rate=1.0) == "12 34, 56!"


def test_a_source_that_changed_is_refused(tmp_path: Path) -> None:
    """Whatever lies there, it has the digest that is expected."""
    (tmp_path / "downloads").mkdir()
    source = sources.SOURCES["encoder"]
    (tmp_path / "downloads" / source.file).write_bytes(b"something else")
    with pytest.raises(sources.SourceError, match="is not what it was: SHA-256"):
        sources.fetched(tmp_path)


def test_the_dated_copy() -> None:
    """Of each section as many descriptions, and a date."""
    with gzip.open(sources.DESCRIPTIONS, "rt", encoding="utf-8") as file:
        head, *lines = file.read().splitlines()
    assert head.startswith("# Debian 12, section main, 20")
    rows = [line.split("\t") for line in lines]
    assert {section: sum(row[0] == section for row in rows) for section in sources.SECTIONS} == dict.fromkeys(
        sources.SECTIONS, sources.EACH
    )
    assert all(len(row) == 4 and all(row) for row in rows)


@pytest.mark.zoo
def test_features_do_not_depend_on_batches(tiny: Setup) -> None:
    """A text has one feature, whatever it is encoded with."""
    encoder = Encoder(Path(tiny.work) / "base", half=False)
    many = [" ".join(WORDS[: 1 + at % 9]) for at in range(70)]
    torch.testing.assert_close(encoder.encoded(many)[3:4], encoder.encoded(many[3:4]), atol=1e-5, rtol=1e-5)
    head = prototypes(encoder, texts.Labelled(tuple(many[:4]), (0, 1, 0, 1)))
    own = torch.stack([encoder.encoded(many[:4])[at::2].mean(0) for at in (0, 1)])
    torch.testing.assert_close(head, own / own.norm(dim=1, keepdim=True), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("means", [[1.0, 2.0, 3.0, -0.5], [0.1, 0.2, 0.15], [0.0, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
def test_a_seed_counts_once(means: list[float]) -> None:
    """Pairs of one seed, which have much in common, are no more evidence than their mean is: the t-test has one value
    of each seed, whatever it is called and however many pairs it has.
    """
    pairs = [(7 * seed, mean + shift) for seed, mean in enumerate(means) for shift in (-1.0, 0.25, 0.75)]
    found = paired(pairs)
    assert found.mean == pytest.approx(sum(means) / len(means))
    assert (found.seeds, found.pairs) == (len(means), 3 * len(means))
    assert found.positive == sum(difference > 0 for _, difference in pairs)
    mean, deviation = (
        each.item() for each in (torch.tensor(means).double().mean(), torch.tensor(means).double().std())
    )
    assert found.error == pytest.approx(deviation / len(means) ** 0.5, abs=1e-9)
    if deviation:  # p by integrating the t distribution's density
        t, free = mean / (deviation / len(means) ** 0.5), len(means) - 1
        x = torch.linspace(0, abs(t), 100_001, dtype=torch.float64)
        scale = math.gamma((free + 1) / 2) / (math.sqrt(free * math.pi) * math.gamma(free / 2))
        inside = torch.trapezoid(scale * (1 + x**2 / free) ** (-(free + 1) / 2), x).item()
        assert found.p == pytest.approx(1 - 2 * inside, abs=1e-6)
    else:  # of one number, again and again, no test can tell
        assert found.p == (None if mean else 1.0)


def test_few_seeds_are_not_tested() -> None:
    """Of one or two nothing is said of noise, however large the difference."""
    assert paired([(1, 5.0), (1, 6.0)]) == Paired(5.5, None, 2, 0, 2, 1, None)
    assert paired([(1, 5.0), (2, 6.0)]) == Paired(5.5, pytest.approx(0.5), 2, 0, 2, 2, None)
    assert verdict(paired([(1, 5.0), (2, 6.0)]), "more", "less") == "too few seeds to tell"
    three = paired([(1, 5.0), (2, 6.0), (3, 5.5)])
    assert (verdict(three, "more", "less"), direction(1.0, three)) == ("more", "same direction")
    assert direction(-1.0, three) == "the other direction here"
    assert verdict(paired([(1, 5.0), (2, -6.0), (3, 0.5)]), "more", "less") == "within noise"


@pytest.mark.slow
def test_false_alarms_are_rare() -> None:
    """Where there is no difference, but pairs of one seed have much in common, one test in twenty says there is."""
    draw = random.Random(0)
    alarms = 0
    for _ in range(1000):
        shared = [draw.gauss(0, 1) for _ in range(4)]
        alarms += paired(
            [(seed, own + draw.gauss(0, 0.5)) for seed, own in enumerate(shared) for _ in range(5)]
        ).beyond_noise
    assert 25 <= alarms <= 80


def test_many_tests_are_corrected_together() -> None:
    """Holm's: the smallest p times their number, the next times one less, never falling."""
    assert corrected([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert corrected([0.5, 0.9]) == [1.0, 1.0]
    assert corrected([]) == []
    one, other = (paired([(1, shift), (2, shift + 0.2), (3, shift + 0.1)]) for shift in (0.2, 1.0))
    assert one.p is not None
    assert other.p is not None
    found = together({"one": one, "other": other})
    assert (found["one"], found["other"].p) == (one, pytest.approx(2 * other.p))
    few = paired([(1, 1.0)])
    assert together({"one": one, "few": few}) == {"one": one, "few": few}


def test_differences_in_words() -> None:
    """Ups, equals and downs are counted apart; p is told where there is one."""
    test = paired([(1, 1.0), (1, 0.0), (2, 1.0), (2, -0.5), (3, 0.75), (3, 0.75)])
    assert test.p is not None
    assert said(test) == f"+0.5 ± 0.1 points (up in 4, equal in 1, down in 1 of 6, p = {test.p:.3f})"
    assert brief(test) == f"+0.5 ± 0.1 (p = {test.p:.3f})"
    assert said(paired([(1, -0.01), (1, -0.03)]), "nats", 2) == "-0.02 nats (down in 2 of 2)"
    assert brief(paired([(1, -0.01)])) == "+0.0"


def _merge(seed: int, values: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """A result of two tasks: of each family (validation, test) of the first task, of the second 10 less."""
    points = [
        {
            "family": family,
            "parameters.lambda" if family == "plain" else "beta": float(at),
            "objective": validation - 5,
            "tasks": {"a": validation, "b": validation - 10},
            "test": {"a": test, "b": test - 10},
        }
        for family, each in values.items()
        for at, (validation, test) in enumerate(each)
    ]
    return {"seed": seed, "method": "ties", "tasks": ["a", "b"], "points": points}


def test_merges_tuned_and_untuned() -> None:
    """Tuned is the test of what validation chose; untuned the mean of validation over all values."""
    results = [
        _merge(
            seed, {"plain": [(60, 61), (70 + seed, 72), (50, 90)], "lines": [(70, 75), (69, 99)], "reversed": [(1, 2)]}
        )
        for seed in (1, 2, 3)
    ]
    assert section_merging.gain(results).mean == pytest.approx(3.0)
    assert section_merging.untuned(results).mean == pytest.approx(69.5 - (60 + 72 + 50) / 3)
    assert section_merging.untuned(results, of="ends").mean == pytest.approx(69.5 - 55)
    assert section_merging.untuned(results, of="middle").mean == pytest.approx(69 - 72)
    assert section_merging.untuned(results, "reversed").positive == 0
    assert section_merging._edges({"ties": results}, ["ties"]) == (
        "Where the value chosen was the largest tried, or the smallest, one beyond might do better (seeds): "
        "the smallest with it: `ties` (3)."
    )
    results[0]["points"][4]["objective"] = 99.0
    edges = section_merging._edges({"ties": results}, ["ties"])
    assert edges.endswith(": the largest with it: `ties` (1); the smallest with it: `ties` (2).")


def test_depth_alone() -> None:
    """What LiNeS has more than one coefficient for all blocks; what that has more than the plain merge is not depth."""
    families = {"plain": [(50, 0), (60, 40)], "even": [(60, 0), (62, 41)], "lines": [(64, 44), (62, 0)]}
    results = [_merge(seed, {**families, "lines": [(64 + seed, 44), (62, 0)]}) for seed in (1, 2, 3)]
    depth = section_merging.untuned(results, "lines", "even")
    assert (depth.mean, depth.pairs, depth.positive) == (pytest.approx(3.0), 6, 6)
    text, _ = section_merging.alone({"depth-alone": results})
    row = "| `ties` | 50.0 ± 0.0 | 56.0 ± 0.0 | 59.0 ± 0.5 | +3.0 ± 0.3 (p = 0.009) | +9.0 ± 0.3 (p = 0.001) |"
    assert row in text
    assert "At the smallest value it adds +6.0 ± 0.6 points" in text
    assert "at the largest +0.0 ± 0.0 points" in text
    assert "one coefficient adds +6.0 ± 0.0 points" in text
    assert "on validation, depth alone adds on test +3.0 ± 0.0 points" in text


def test_what_to_try_first() -> None:
    """The advice follows the tests: of merges that are better untuned it says so, of others nothing."""
    better = {"plain": [(60, 61), (70, 72)], "lines": [(70, 72), (71, 72)], "reversed": [(1, 2)]}
    told = summary.expect({"merging": [_merge(seed, better) for seed in (1, 2)]})
    assert "too few seeds to tell" in told
    assert "So" not in told
    results = [_merge(seed, {**better, "lines": [(70 + seed, 72), (71, 72)]}) for seed in (1, 2, 3)]
    assert summary.expect({"merging": results}).endswith(
        "**So**, on models like these: a merge risks less with LiNeS where nobody tunes its coefficient: at the "
        "smallest and the largest that we tried it is better in the mean over methods; once the coefficient is tuned, "
        "no difference could be shown."
    )


def test_a_soup_that_took_no_lines_is_not_said_to_gain_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """beta = 0 is the soup as it is: a gain of 0 is then no finding."""

    def result(seed: int, beta: float) -> dict[str, Any]:
        points = [
            {
                "soup": "greedy",
                "family": "lines",
                "beta": at,
                "objective": float(at == beta),
                "test": {"clean": 70 + at},
            }
            for at in (0.0, 0.5)
        ]
        return {"seed": seed, "points": points}

    none = {"soups": [result(seed, 0.0) for seed in (1, 2, 3)]}
    monkeypatch.setattr(section_soups, "KINDS", ("greedy",))
    assert section_soups.soup_told(none, "greedy") == (
        "Greedy: beta = 0, the soup as it is, was chosen in each of 3, so that LiNeS was not used"
    )
    some = {"soups": [result(seed, 0.5 * (seed > 1)) for seed in (1, 2, 3)]}
    told = section_soups.soup_told(some, "greedy")
    assert told.startswith("Greedy: LiNeS, which was chosen in 2 of 3 (beta above 0), adds +0.3 ± 0.2 points")


def test_items_are_compared_on_the_same_fine_tunes_only() -> None:
    """Another processor trains another fine-tune from the same texts: the norms of one are not the other's."""
    results = read_results()
    for item in ("depth", "inspect"):
        for result in results.get(item, []):
            one = section_ablations._one_of(results, result)
            assert one is not None
            assert one["on"] == result["on"]
            ends = {point["family"]: point for point in one["points"] if point["family"] in ("pre", "ft")}
            for point in result.get("points", []):
                if point["family"] in ends:  # measured in both
                    assert point["test"] == ends[point["family"]]["test"]
    elsewhere = [{**result, "on": "another"} for result in results.get("inspect", [])]
    assert section_ablations.inspect({**results, "inspect": elsewhere})[0] == "### What `lines inspect` tells of alpha"


def test_a_seed_that_was_run_twice_counts_once() -> None:
    """In tables as in tests: on another processor the same seed is no other evidence."""
    once = [{"seed": seed, "task": "a", "value": value} for seed, value in ((1, 60.0), (2, 70.0))]
    twice = [*once, {"seed": 2, "task": "a", "value": 80.0, "on": "another"}]
    assert spread(once, lambda one: one["value"]) == "65.0 ± 7.1"
    assert spread(twice, lambda one: one["value"]) == "67.5 ± 10.6"
    results = read_results()["one"]
    (first, *_), ran = results, {one["on"] for one in results}
    again = {**first, "on": "another"}
    heading, text, table = section_one.again([first, again])
    assert heading == "### The same on another processor"
    assert f"1 fine-tune (seed {first['seed']})" in text
    assert f"| {first['rate']:g} on another |" in table
    assert section_one.again([one for one in results if one["on"] == min(ran)]) == []
    assert runs_of([first, again]) == "2 runs of 1 fine-tune"
    assert runs_of([first]) == "1 fine-tune"


def test_curves_at_equal_height() -> None:
    """Straight lines between points; where a curve comes to a target again, the mean of the first time and the last."""
    baseline = [(50.0, 70.0), (60.0, 68.0), (60.0, 66.0), (70.0, 60.0)]
    assert at_target(baseline, 55.0) == 69.0
    assert at_target(baseline, 60.0) == 67.0
    assert at_target(baseline, 65.0) == 63.0
    assert (at_target(baseline, 45.0), at_target(baseline, 75.0)) == (None, None)
    assert at_target([(50.0, 70.0), (60.0, 60.0), (50.0, 40.0)], 55.0) == 57.5
    assert lead([(55.0, 70.0), (65.0, 64.0)], baseline) == pytest.approx(0.5, abs=0.02)  # +1 to -1, then +1
    assert lead(baseline, baseline) == 0.0
    assert lead([(71.0, 99.0)], baseline) is None
    assert lead([(65.0, 64.0)], baseline) == 1.0


def test_neither_curve_is_preferred() -> None:
    """The other way round a lead is the opposite, whatever the curves look like."""
    draw = random.Random(0)
    for _ in range(50):
        one, other = ([(draw.uniform(0, 9), draw.uniform(0, 9)) for _ in range(5)] for _ in range(2))
        ahead, behind = lead(one, other), lead(other, one)
        assert (ahead is None) == (behind is None)
        if ahead is not None and behind is not None:
            assert ahead == pytest.approx(-behind)


def test_published_results_replace_what_was_there(tiny: Setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of an earlier run nothing stays, and nothing of one that writes; what explains the folder does."""
    kept = tmp_path / "kept"
    for path, text in (("one/1-old.json", "{}"), ("README.md", "Raw results")):
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        (kept / path).write_text(text)
    setup.check_setup(tiny)
    setup.save_result(tiny.results / "one" / "1-new.json", {"seed": 1})
    (tiny.results / "one" / "1-next.json.part7").write_text("{")
    monkeypatch.setattr(page, "RESULTS", kept)
    monkeypatch.setattr(page, "write_page", lambda: None)
    page.publish(tiny)
    there = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    assert there == {"README.md", "setup.json", "one/1-new.json"}
    line = " ".join(page.processors_of(kept).split())
    assert line.startswith("* **Processors**: ")
    assert line.endswith(": seed 1 of one fine-tune.")
    made = json.loads((kept / "setup.json").read_text())
    setup.write_json(kept / "setup.json", {**made, "on": [*made["on"], {"processor": "another", "bfloat16": True}]})
    setup.write_json(kept / "one" / "2-a.json", {"seed": 2, "on": "another"})
    setup.write_json(kept / "soups" / "1-a.json", {"seed": 1, "on": "another"})
    line = " ".join(page.processors_of(kept).split())
    assert ": seed 1 of one fine-tune. another, where the sentence encoder computes in bfloat16" in line
    assert ": seed 1 of soups; seed 2 of one fine-tune. What stands under both" in line
    assert "trains its fine-tunes there anew" in line


def test_results_of_another_set_up_are_not_mixed(tiny: Setup) -> None:
    """A short run may go on as a full one; other texts, rates or points may not."""
    setup.check_setup(tiny)
    setup.check_setup(replace(tiny, seeds=(1, 2, 3), full=True, strong=1e-2))
    with pytest.raises(SystemExit, match=r"results of another set-up: rate was 0.005 and is 0.5.\nRemove"):
        setup.check_setup(replace(tiny, rate=0.5))
    assert len(json.loads((tiny.results / "setup.json").read_text())["on"]) == 1


def test_readme_says_what_was_measured() -> None:
    """What README.md says is to be expected is the page's, to the letter."""
    readme = (DOCS.parent / "README.md").read_text(encoding="utf-8")
    assert told(readme, read_results()) == readme
    with pytest.raises(ValueError, match=r"README\.md lacks <!-- evidence -->"):
        told("nothing", read_results())


def test_ranks_are_correlated_as_scipy_does_it() -> None:
    from scipy.stats import spearmanr

    one_side, other = [1.0, 2.0, 2.0, 5.0, 4.0], [3.0, 1.0, 4.0, 4.0, 9.0]
    assert correlation(one_side, other) == pytest.approx(spearmanr(one_side, other).statistic)
    assert correlation([1.0, 1.0], [1.0, 2.0]) == 0.0
