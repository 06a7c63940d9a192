"""Labelled texts: five tasks of classification, and the retrieval of words by their glosses.

A pool is all that a source has, by class. A seed deals each pool into prototypes, training, validation and test texts.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from evidence.sources import DESCRIPTIONS, fetched, member

TASKS = ("verbs", "nouns", "packages", "computing", "sentiment")
RETRIEVAL = "retrieval"
CLASSES = 10  # of each task: those with the most texts
WORDS = 48  # of a text, at most; encoders cut at 64 tokens

Pool = dict[str, list[str]]  # class -> texts


@dataclass(frozen=True)
class Sizes:
    """How many texts a seed takes of each task: prototypes of each class; the rest over all classes."""

    prototypes: int = 20
    train: int = 1200
    validation: int = 80
    test: int = 300
    retrieval: int = 200


@dataclass(frozen=True)
class Labelled:
    """Texts and their classes, as positions in a sorted list of names."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """What one seed deals of one task."""

    name: str
    classes: tuple[str, ...]
    prototypes: Labelled
    train: Labelled
    validation: Labelled
    test: Labelled


@dataclass(frozen=True)
class Pairs:
    """Glosses, and the word that each explains: gloss i belongs to word i."""

    glosses: tuple[str, ...]
    words: tuple[str, ...]


# --- what the sources say ---


def pools(work: Path) -> tuple[dict[str, Pool], dict[str, str]]:
    """All texts: of each task by class, and glosses by the word that they explain. Kept in `WORK/texts.json`."""
    path = work / "texts.json"
    if not path.exists():
        folders = fetched(work)
        nouns, words = _nouns(folders["wordnet"])
        found = {
            "verbs": _largest(_glosses(folders["wordnet"], "verb")),
            "nouns": _largest(nouns),
            "packages": _largest(_packages()),
            "computing": _largest(_foldoc(folders["foldoc"])),
            "sentiment": _largest(_vader(folders["vader"])),
        }
        part = path.with_suffix(".part")
        part.write_text(json.dumps([found, words]), encoding="utf-8")
        part.rename(path)
    tasks, words = json.loads(path.read_text(encoding="utf-8"))
    return tasks, words


def _largest(pairs: Iterable[tuple[str, str]]) -> Pool:
    """The classes with the most texts; a text that two classes have counts for neither."""
    classes: dict[str, set[str]] = defaultdict(set)
    for label, text in pairs:
        if cut := " ".join(text.split()[:WORDS]):
            classes[cut].add(label)
    pool: Pool = defaultdict(list)
    for text in sorted(classes):
        if len(classes[text]) == 1:
            pool[next(iter(classes[text]))].append(text)
    largest = sorted(pool, key=lambda label: (-len(pool[label]), label))[:CLASSES]
    return {label: pool[label] for label in sorted(largest)}


# Numbers of lexicographer files, lexnames(5WN).
_LEXICOGRAPHERS = dict(
    enumerate(
        "adj.all adj.pert adv.all noun.Tops noun.act noun.animal noun.artifact noun.attribute noun.body noun.cognition "
        "noun.communication noun.event noun.feeling noun.food noun.group noun.location noun.motive noun.object "
        "noun.person noun.phenomenon noun.plant noun.possession noun.process noun.quantity noun.relation noun.shape "
        "noun.state noun.substance noun.time verb.body verb.change verb.cognition verb.communication verb.competition "
        "verb.consumption verb.contact verb.creation verb.emotion verb.motion verb.perception verb.possession "
        "verb.social verb.stative verb.weather adj.ppl".split()
    )
)


def _synsets(folder: Path, part: str) -> Iterator[tuple[int, str, str, str]]:
    """Offset, class, first word, gloss without its examples, of every synset."""
    for line in member(folder, f"wordnet/data.{part}").read_text(encoding="utf-8").splitlines():
        if line[:1].isdigit():
            fields, _, gloss = line.partition(" | ")
            offset, lexicographer, _, _, word, *_ = fields.split()
            yield int(offset), _LEXICOGRAPHERS[int(lexicographer)], word, gloss.split('; "')[0].strip()


def _glosses(folder: Path, part: str) -> Iterator[tuple[str, str]]:
    return ((label, gloss) for _, label, _, gloss in _synsets(folder, part))


def _nouns(folder: Path) -> tuple[list[tuple[str, str]], dict[str, str]]:
    """Of every second noun the class and the gloss; of the others the word and the gloss, if it is plain."""
    labelled: list[tuple[str, str]] = []
    words: dict[str, str] = {}
    for number, (_, label, word, gloss) in enumerate(_synsets(folder, "noun")):
        if number % 2 == 0:
            labelled.append((label, gloss))
        elif re.fullmatch("[a-z]{4,}", word) and word not in gloss and len(gloss.split()) >= 4:
            words.setdefault(word, gloss)
    return labelled, words


def _packages() -> Iterator[tuple[str, str]]:
    with gzip.open(DESCRIPTIONS, "rt", encoding="utf-8") as file:
        for line in file:
            if not line.startswith("#"):
                section, _, _, synopsis = line.rstrip("\n").split("\t")
                yield section, synopsis


def _foldoc(folder: Path) -> Iterator[tuple[str, str]]:
    """The first paragraph of each entry, by the first of its subjects."""
    with gzip.open(member(folder, "dictd/foldoc.dict.dz"), "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    for paragraph in text.split("\n\n"):
        plain = " ".join(paragraph.replace("{", "").replace("}", "").split())
        if found := re.match(r"<([a-z ]+)(?:, [^>]*)?> (.*)", plain):
            yield found[1], found[2]


def _vader(folder: Path) -> Iterator[tuple[str, str]]:
    """Rated snippets of tweets and reviews; those that were rated as neither this nor that are left out."""
    with tarfile.open(member(folder, "additional_resources/hutto_ICWSM_2014.tar.gz")) as archive:
        for kind in ("tweets", "movieReviewSnippets", "amazonReviewSnippets"):
            raw = archive.extractfile(f"hutto_ICWSM_2014/{kind}_GroundTruth.txt")
            assert raw is not None
            for line in io.TextIOWrapper(raw, "utf-8", "replace"):
                _, rating, text = line.rstrip("\n").split("\t", 2)
                mean = float(rating)
                label = "negative" if mean < -1 else "positive" if mean > 1 else "neutral" if abs(mean) < 0.5 else ""
                if label and len(text.split()) >= 4:
                    yield label, text


# --- what a seed deals ---


def deal(pool: Pool, name: str, seed: int, sizes: Sizes) -> Task:
    """Texts of one task: disjoint, and of every class as many as can be.

    Raises:
        ValueError: the pool is too small.
    """
    draw = random.Random(f"{name} {seed}")  # noqa: S311 - not for secrets
    classes = sorted(pool)
    left = {label: draw.sample(pool[label], len(pool[label])) for label in classes}
    prototypes = [(left[label].pop(), at) for at, label in enumerate(classes) for _ in range(sizes.prototypes)]
    in_turn = [
        (text, at)
        for row in zip_longest(*(left[label] for label in classes))
        for at, text in enumerate(row)
        if text is not None
    ]
    parts = {"test": sizes.test, "validation": sizes.validation, "train": sizes.train}
    if len(in_turn) < sum(parts.values()):
        raise ValueError(f"{name}: {len(in_turn)} texts, expected {sum(parts.values())} and more")
    dealt: dict[str, Labelled] = {}
    for part, size in parts.items():
        taken, in_turn = in_turn[:size], in_turn[size:]
        dealt[part] = _labelled(draw.sample(taken, size))
    return Task(name, tuple(classes), _labelled(prototypes), **dealt)


def _labelled(pairs: list[tuple[str, int]]) -> Labelled:
    return Labelled(tuple(text for text, _ in pairs), tuple(label for _, label in pairs))


def deal_pairs(words: Mapping[str, str], seed: int, sizes: Sizes) -> Pairs:
    """Glosses and their words."""
    draw = random.Random(f"{RETRIEVAL} {seed}")  # noqa: S311
    chosen = draw.sample(sorted(words), sizes.retrieval)
    return Pairs(tuple(words[word] for word in chosen), tuple(chosen))


def misspelt(text: str, seed: int, rate: float = 0.15) -> str:
    """A text with typing errors: of its letters about `rate` are swapped with the next, doubled, or left out."""
    draw = random.Random(f"{seed} {text}")  # noqa: S311
    letters, at, out = list(text), 0, []
    while at < len(letters):
        letter = letters[at]
        if letter.isalpha() and draw.random() < rate:
            what = draw.choice(("swap", "double", "drop"))
            if what == "swap" and at + 1 < len(letters):
                out += [letters[at + 1], letter]
                at += 1
            elif what == "double":
                out += [letter, letter]
        else:
            out.append(letter)
        at += 1
    return "".join(out)
