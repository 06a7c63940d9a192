"""results.json as text: RESULTS.md, and the tables that a run prints."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cases import DIGESTS, FLOOR, IMPORT, LIVE, MERGEKIT, OF_ADAPTER, ON_DISK, TEN, UNMEASURED

Found = dict[str, dict[str, Any]]
"""Cases by name, as run.py keeps them."""

NOTHING: dict[str, Any] = {"contenders": [], "inputs": {}}
"""A case that was not run."""

SECTIONS = {
    "Editing": (
        "edit",
        "realised",
        "edit-cold",
        "edit-fp32",
        "adapter",
        "pickles",
        "fp8",
        "fp8-out",
        "huge",
        "tiny",
        "tensors",
        "verify",
        "candidates",
    ),
    "Merging": (
        "three",
        "three-cold",
        "three-methods",
        "kernels",
        "eight-methods",
        "ties-peers",
        "dare-peers",
        "set-peers",
    ),
    "Inspecting and planning": ("inspect-headers", "inspect-base-1", "inspect-base-3", "planning"),
}
MANY_TENSORS = ("tiny", "tensors")  # whose names and places take memory of their own
ELEMENT_WISE = ("edit", "task_arithmetic", "average", "consensus", "dare_linear")

HEAD = """# Measured

Contenders run in turn, round after round, as whole processes: medians, in brackets least and greatest. Ratios are taken
within a round, so that a slow minute of the machine is everyone's; look at them rather than at seconds.

- **net**: without the time that `import torch` takes in the same round, for all that import it.
- **floor**: all inputs but one read (`cat`), that one copied (`cp`), the copy made durable (`sync`).
- **floor + digests**: the same with the digests that lines takes of what it writes (SHA-256 of 4 MiB blocks, a thread
  per core). The targets mean this one. It works file by file, digests and `sync` beside the next `cp`: with several
  files it can be the faster of the two.
- **resident**, **anonymous**: peak memory in MB. Resident memory counts the pages of mapped files, anonymous does not.
- **passes**: bytes that lines asked the system for, over those of the inputs.

Inputs are in the page cache, but for the cases called cold; outputs of all contenders are flushed to the disk. The
models are random numbers in the shape of a Llama.
"""


# --- figures of a case ---


def size(nbytes: int) -> str:
    return f"{_short(nbytes / 1e9)} GB"


def _short(value: float) -> str:
    """Three digits, or as many as stand before the point."""
    digits = 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:,.{digits}f}"


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


def _spread(values: list[float], show: Callable[[float], str] = _short) -> str:
    """The median, and the least and greatest where there are several."""
    middle = show(statistics.median(values))
    return middle if len(values) == 1 else f"{middle} ({show(min(values))} to {show(max(values))})"


def _named(case: dict[str, Any], name: str) -> dict[str, Any]:
    return next((contender for contender in case["contenders"] if contender["name"] == name), {})


def _values(case: dict[str, Any], name: str, column: str) -> list[float]:
    return [value for value in _named(case, name).get(column, []) if value is not None]


def _peak(case: dict[str, Any], name: str, column: str) -> float | None:
    return max(_values(case, name, column), default=None)


def _net(case: dict[str, Any], name: str) -> list[float | None]:
    """Seconds without those that importing torch took in the same round."""
    contender = _named(case, name)
    seconds: list[float | None] = contender.get("seconds", [])
    importing = _named(case, IMPORT).get("seconds") if contender.get("imports_torch") and name != IMPORT else None
    if importing is None:
        return seconds
    return [None if whole is None else whole - part for whole, part in zip(seconds, importing, strict=True)]


def _ratios(case: dict[str, Any], name: str, to: str) -> list[float]:
    """Round by round, the net time of one over that of another."""
    pairs = zip(_net(case, name), _net(case, to), strict=False)
    return [ours / theirs for ours, theirs in pairs if ours is not None and theirs is not None]


def _passes(case: dict[str, Any], name: str) -> list[float]:
    """How often the inputs were read."""
    read = sum(case["inputs"].values())
    asked_for = _values(case, name, "read_bytes")
    return [value / read for value in asked_for] if read > 10**8 and name.startswith("lines") else []


# --- tables ---


def _table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown that is readable as it is; columns without a word in them are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    widths = [max(len(line[i]) for line in [head, *rows]) for i in kept]
    lines = [[line[i] for i in kept] for line in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def _case_table(case: dict[str, Any]) -> str:
    if "left_out" in case:
        return f"Left out: {case['left_out']}."
    steps = {name: values for contender in case["contenders"] for name, values in contender.get("steps", {}).items()}
    if steps:
        rows = [
            [f"`{name}`", f"{middle:.2f} ({least:.2f} to {most:.2f})"] for name, (middle, least, most) in steps.items()
        ]
        return _table(["", "seconds"], rows)
    reference = case["reference"]
    head = [
        "",
        "seconds",
        "net",
        "to the floor",
        "to floor + digests",
        f"to {reference}",
        "resident",
        "anonymous",
        "passes",
    ]
    rows = []
    for contender in case["contenders"]:
        name = contender["name"]
        net = [value for value in _net(case, name) if value is not None]
        ratios = [_ratios(case, name, to) if name != IMPORT else [] for to in (FLOOR, DIGESTS, reference)]
        memory = [_peak(case, name, column) for column in ("resident_mb", "anonymous_mb")]
        passes = _passes(case, name)
        rows.append(
            [
                name,
                _spread(_values(case, name, "seconds")),
                _short(statistics.median(net)) if name != IMPORT and _named(case, IMPORT) else "",
                *(_short(statistics.median(found)) if found else "" for found in ratios),
                *map(_whole, memory),
                f"{statistics.median(passes):.1f}" if passes else "",
            ]
        )
    return _table(head, rows)


def tables(found: Found) -> str:
    """What a run prints when it is done."""
    return "\n".join(f"\n{case['title']}\n\n{_case_table(case)}" for case in found.values())


def _scaling(found: Found) -> str:
    """One table of all sizes, with time and memory as pictures."""
    cases = _by_size(found)
    if len(cases) < 2:
        return ""
    ours = "lines edit"
    rows = []
    for case in cases:
        net = [value for value in _net(case, ours) if value is not None]
        rows.append(
            [
                size(case["writes"]),
                _spread(_values(case, ours, "seconds")),
                _short(statistics.median(net)),
                _short(statistics.median(net) / case["writes"] * 1e9),
                *(_short(statistics.median(_ratios(case, ours, floor))) for floor in (FLOOR, DIGESTS)),
                *(_whole(_peak(case, ours, column)) for column in ("resident_mb", "anonymous_mb")),
            ]
        )
    head = ["", "seconds", "net", "net per GB", "to the floor", "to floor + digests", "resident", "anonymous"]
    pictures = [
        _bars(title, {row[0]: float(row[head.index(title)].replace(",", "")) for row in rows})
        for title in ("net", "resident")
    ]
    return "\n".join(["### `lines edit` as models grow", "", _table(head, rows), "", "```text", *pictures, "```", ""])


def _by_size(found: Found) -> list[dict[str, Any]]:
    """The same edit of models of all sizes, the smallest first."""
    cases = [case for name, case in found.items() if name == "edit" or name.startswith("scaling-")]
    return sorted(cases, key=lambda case: int(case["writes"]))


def _bars(title: str, values: dict[str, float]) -> str:
    """A bar for each value, the longest of sixty characters."""
    longest = max(values.values())
    return "\n".join(
        [title, *(f"{label:>9} {'#' * round(60 * value / longest)} {value:g}" for label, value in values.items())]
    )


# --- targets ---


@dataclass(frozen=True)
class Target:
    """A figure that was set, and what was measured of it, in which case: one value, or one for each round."""

    aim: str
    limit: float
    case: str
    measured: list[float]
    at_most: bool = True

    def row(self, machine: str) -> list[str]:
        """What it was, what it is, where, and whether that will do."""
        if not self.measured:
            return [self.aim, "not measured", "", ""]
        value = statistics.median(self.measured)
        reached = value <= self.limit if self.at_most else value >= self.limit
        return [self.aim, _spread(self.measured), machine, "yes" if reached else "**no**"]


def targets(found: Found, letters: Mapping[str, str] | None = None) -> str:
    """The table of all targets: what was set, what was measured, on which machine, and whether it is reached."""

    def ratios(case: str, ours: str, to: str) -> list[float]:
        return _ratios(found[case], ours, to) if case in found else []

    def memory_above_torch(case: str, ours: str, column: str) -> list[float]:
        own, theirs, torch = (_peak(found.get(case, NOTHING), name, column) or 0 for name in (ours, MERGEKIT, IMPORT))
        return [(own - torch) / (theirs - torch)] if own and theirs else []

    sum_of, edit = "lines task_arithmetic", "lines edit"
    passes = [value - 1 for value in _passes(found.get("three-methods", NOTHING), "lines ties")]
    resident = [
        peak
        for name, case in found.items()
        for method in ELEMENT_WISE
        for peak in [_peak(case, f"lines {method}", "resident_mb")]
        if name not in MANY_TENSORS and peak
    ]
    peaks = [_peak(case, edit, "resident_mb") or 0 for case in _by_size(found)]
    of_adapter = _peak(found.get("adapter", NOTHING), OF_ADAPTER, "resident_mb")
    planning = _named(found.get("planning", NOTHING), "plan.py").get("steps", {})
    planned = planning.get("edit: total", [])
    rows = [
        Target("`edit`: at most 1.15 times floor + digests", 1.15, "edit", ratios("edit", edit, DIGESTS)),
        Target(
            "`edit`: at most 1.1 times an edit that measures no realised coefficient",
            1.1,
            "realised",
            ratios("realised", edit, UNMEASURED),
        ),
        Target(
            "`edit` of an adapter of rank 16: at most 1.3 times that of a fine-tune",
            1.3,
            "adapter",
            ratios("adapter", OF_ADAPTER, edit),
        ),
        Target(
            "`edit` of an adapter of rank 16: at most 300 MB resident",
            300,
            "adapter",
            [of_adapter] if of_adapter else [],
        ),
        Target("`task_arithmetic` of three: at most 1.3 times", 1.3, "three", ratios("three", sum_of, DIGESTS)),
        Target(
            "`average` of eight: at most 1.3 times",
            1.3,
            "eight-methods",
            ratios("eight-methods", "lines average", DIGESTS),
        ),
        *(
            Target(
                f"`{method}` of {number}: at most {limit} times our `task_arithmetic`",
                limit,
                f"{number}-methods",
                ratios(f"{number}-methods", f"lines {method}", sum_of),
            )
            for method, limit in (("ties", 4), ("consensus", 5), ("dare_linear", 5))
            for number in ("three", "eight")
        ),
        Target("`ties`: at most two passes over the inputs before the last", 2.05, "three-methods", passes),
        *(
            Target(
                f"{words}: at least {limit} times as fast as mergekit",
                limit,
                case,
                ratios(case, MERGEKIT, ours),
                at_most=False,
            )
            for words, limit, case, ours in (
                ("`edit`", 4, "edit", edit),
                ("`task_arithmetic` of three", 4, "three", sum_of),
                ("`ties` of three", 20, "ties-peers", "lines ties"),
                ("`ties by tensor` of three", 20, "ties-peers", "lines ties by tensor"),
                ("`dare_linear` of three", 6, "dare-peers", "lines dare_linear"),
            )
        ),
        Target(
            "element-wise methods: at most 300 MB resident, at any size", 300, "", [max(resident)] if resident else []
        ),
        Target(
            "`edit`: the largest model takes at most 1.05 times the memory of the smallest",
            1.05,
            "",
            [peaks[-1] / peaks[0]] if len(peaks) > 1 else [],
        ),
        *(
            Target(
                f"{words}: {kind} memory above `import torch` at most a tenth of mergekit's",
                0.1,
                case,
                memory_above_torch(case, name, f"{kind}_mb"),
            )
            for words, case, name in (("`edit`", "edit", edit), ("`task_arithmetic` of three", "three", sum_of))
            for kind in ("resident", "anonymous")
        ),
        Target(
            "ten candidates on the disk: at most a third of ten edits",
            1 / 3,
            "candidates",
            ratios("candidates", ON_DISK, TEN),
        ),
        Target(
            "ten candidates in a live module: at most a tenth of ten edits",
            0.1,
            "candidates",
            ratios("candidates", LIVE, TEN),
        ),
        Target("planning an edit of 100,000 tensors, from headers on: at most 2 s", 2, "planning", planned),
    ]
    letters = letters or {}
    machines = {name: letters.get(_machine(case), "") for name, case in found.items()}
    return _table(["target", "measured", "machine", "reached"], [row.row(machines.get(row.case, "")) for row in rows])


# --- the document ---


def document(found: Found, on_cuda: Found, earlier: Found, limits: str) -> str:
    """RESULTS.md: what was found on the CPU, with a GPU where one was at hand, and earlier on another machine."""
    others = {"On a GPU": on_cuda, "Earlier, on another machine": earlier}
    everything = {**found, **{f"{name}, {where}": case for where, own in others.items() for name, case in own.items()}}
    letters = _letters(everything)

    def section(case: dict[str, Any]) -> str:
        return _section(case, f"Machine {letters[_machine(case)]}." if letters else "")

    parts = [
        HEAD,
        "## Targets\n\nRatios are of net times; mergekit is 0.1.5 with its best flags.\n",
        targets(found, letters),
        "",
    ]
    for heading, names in SECTIONS.items():
        parts.append(f"## {heading}\n")
        parts += [section(found[name]) for name in names if name in found]
        if heading == "Editing":
            parts.append(_scaling(found))
    parts.append(limits)
    for where, own in others.items():
        parts += [f"## {where}\n", *map(section, own.values())] if own else []
    parts += ["## Machines\n", *_machines(everything)]
    return "\n".join([*parts, "", "## Commands\n", _commands(found)])


def _section(case: dict[str, Any], machine: str = "") -> str:
    rounds = f"{case['rounds']} rounds." if case["rounds"] > 1 else "One round."
    share = case.get("in_page_cache")
    cached = f"Only {share:.0%} of the inputs were in the page cache." if share and 0.01 < share < 0.99 else ""
    words = textwrap.fill(" ".join(filter(None, [case["about"], rounds, machine, cached])), 120)
    return f"### {case['title']}\n\n{words}\n\n{_case_table(case)}\n"


HARDWARE = ("cores", "processor", "vectors", "memory_gib", "filesystem", "kernel", "device", "gpu")
"""What tells machines apart; the rest are versions of what ran on them."""


def _machine(case: dict[str, Any]) -> str:
    """The machine on which a case ran, in words."""
    told = case["machine"]
    return "; ".join(f"{key.replace('_gib', ' (GiB)')}: {told[key]}" for key in HARDWARE if key in told)


def _letters(found: Found) -> dict[str, str]:
    """A letter for each machine, in the order of the cases; none where there is one machine only."""
    machines = list(dict.fromkeys(map(_machine, found.values())))
    return {told: chr(ord("A") + at) for at, told in enumerate(machines)} if len(machines) > 1 else {}


def _machines(found: Found) -> list[str]:
    """Each machine on which cases ran, with what they ran with, and the days."""
    letters = _letters(found)
    cases: dict[str, list[dict[str, Any]]] = {}
    for case in found.values():
        cases.setdefault(_machine(case), []).append(case)
    rows = []
    for told, own in cases.items():
        versions = {key: value for case in own for key, value in case["machine"].items() if key not in HARDWARE}
        words = ", ".join(f"{key} {value}" for key, value in versions.items())
        days = ", ".join(sorted({case["date"] for case in own}))
        rows.append(f"- {f'**{letters[told]}**: ' if letters else ''}{told}; {words}. {days}.")
    return rows


def _commands(found: Found) -> str:
    """What was run: enough to run any of it by hand."""
    text = [
        "As they ran, in benchmarks/models, `lines` and `python` being the virtual environment's. Floors are alike and",
        "shown once; all commands and the recipes are in [results.json](results.json).\n",
        "```sh",
    ]
    shown = set()
    for name, case in found.items():
        text.append(f"# {name}")
        text += [each["command"] for each in case["contenders"] if each["name"] not in shown]
        shown = {IMPORT, FLOOR, DIGESTS}
    return "\n".join([*text, "```", ""])
