"""A run cut into parts that any machine may make, in any order: shares of each measuring pass, and ranges of the output
files. `plan.json` says which there are.

A share of a pass is some of the tensors, in the order of their names. What is found in it is whole numbers, or sums
that are added up in that order later, so that the numbers are those of one machine (`engine/measure_share`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from lines_cli.errors import ChangedInputError, OutputError, RecipeError, as_argument, some
from lines_cli.plan.identity import identity, named_inputs, run_digest
from lines_cli.plan.plan import SCALES, Plan, TensorPlan, bytes_of, pass_of_rule
from lines_cli.plan.resources import Resources
from lines_cli.recipe.plain_yaml import read_yaml
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import dump_recipe, recipe_from
from lines_cli.storage.digest import DIGEST_BLOCK, DIGEST_BLOCKS_ON_CUDA
from lines_cli.storage.files import read_small
from lines_cli.storage.object_store import content_if_there, placed_at, real_name, url_of
from lines_cli.version import __version__

Json = dict[str, Any]
WRITING = "writing"
"""The last stage: the others are named by what they measure (`Plan.passes`)."""

MOST_SHARES = 10_000
_USUAL = 4 * 2**30  # bytes of the output in one part, unless it is said how many there shall be
_LARGEST = 2**30  # bytes of a plan.json
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Part:
    """One part of a run.

    Attributes:
        number: from 1, over all stages.
        stage: the number of its stage.
        tensors: of a measuring part: the names of the tensors it looks at, in order.
        ranges: of a part that writes: file, first byte, and where it ends; cut where the plan's `step` says; in a store
            whole files.
        reads, writes: bytes of tensor data; those of the output.
    """

    number: int
    stage: int
    tensors: tuple[str, ...] = ()
    ranges: tuple[tuple[int, int, int], ...] = ()
    reads: int = 0
    writes: int = 0


@dataclass(frozen=True, slots=True)
class Division:
    """All parts of a run.

    Attributes:
        stages: what each stage measures, the last one apart, which writes. All of a stage is needed by the next.
        parts: in order of their numbers, and so of the stages.
        step: bytes of a file that are written at a time.
        shares: into how many parts each stage was cut; where there was less to cut, into fewer.
    """

    stages: tuple[str, ...]
    parts: tuple[Part, ...]
    step: int
    shares: int

    def of_stage(self, stage: int) -> tuple[Part, ...]:
        """The parts of one stage."""
        return tuple(part for part in self.parts if part.stage == stage)

    def called(self, part: Part) -> str:
        """What a part does, in words."""
        what = self.stages[part.stage]
        return what if what == WRITING else f"measuring {what}"


def divide(plan: Plan, shares: int | None = None) -> Division:
    """Cut a run into parts. What is written into an object store is cut between files.

    Args:
        plan: not yet resolved.
        shares: into how many parts each stage is cut, at most; unless given, as many as give each 4 GiB of the output.

    Raises:
        RecipeError: that number is impossible.
    """
    if shares is not None and not 1 <= shares <= MOST_SHARES:
        raise RecipeError(f"--parts {shares}: from 1 to {MOST_SHARES:,} are possible")
    shares = shares or usual_shares(plan)
    large = DIGEST_BLOCK * DIGEST_BLOCKS_ON_CUDA
    step = large if plan.bytes_written >= 16 * shares * large else DIGEST_BLOCK
    stages = (*plan.passes, WRITING)
    parts: list[Part] = []
    for stage, what in enumerate(stages[:-1]):
        tensors = _looked_at(plan, what)
        sizes = [bytes_of(tensor.segments) for tensor in tensors]
        for first, end in _cut(sizes, shares):
            names = tuple(tensor.name for tensor in tensors[first:end])
            parts.append(Part(len(parts) + 1, stage, tensors=names, reads=sum(sizes[first:end])))
    steps = [
        (number, start, min(start + step, file.nbytes))
        for number, file in enumerate(plan.outputs)
        for start in range(0, file.nbytes, step)
    ]
    reads = _Reads(plan)
    if url_of(plan.output) is None:
        cuts = [_joined(steps[first:end]) for first, end in _cut([1] * len(steps), shares)]
    else:  # whole files: an object is sent by one process
        files = [(number, 0, file.nbytes) for number, file in enumerate(plan.outputs)]
        cuts = [tuple(files[first:end]) for first, end in _cut([end for _, _, end in files], shares)]
    for ranges in cuts:
        own = sum(end - start for _, start, end in ranges)
        parts.append(Part(len(parts) + 1, len(stages) - 1, (), ranges, sum(map(reads, ranges)), own))
    return Division(stages, tuple(parts), step, shares)


def _looked_at(plan: Plan, what: str) -> list[TensorPlan]:
    """The tensors that a pass is about, in the order of their names."""
    if what == SCALES:
        return list(plan.to_quantise)
    if what in map(pass_of_rule, plan.needs.scores):
        in_blocks = {tensor.name for tensor in plan.in_blocks}
        return [tensor for tensor in plan.merged_by_name if tensor.name in in_blocks]
    return plan.merged_by_name


def usual_shares(plan: Plan) -> int:
    """Into how many parts each stage is cut, unless it is said."""
    return min(MOST_SHARES, max(1, -(-plan.bytes_written // _USUAL)))


def _cut(sizes: Sequence[int], shares: int) -> list[tuple[int, int]]:
    """Consecutive items in so many groups of about the same size, or fewer: none is empty."""
    total, done = max(1, sum(sizes)), 0
    firsts: dict[int, int] = {}
    for item, size in enumerate(sizes):
        firsts.setdefault(min(shares - 1, (2 * done + size) * shares // (2 * total)), item)
        done += size
    begins = sorted(firsts.values())
    return list(zip(begins, [*begins[1:], len(sizes)], strict=True))


def _joined(steps: Iterable[tuple[int, int, int]]) -> tuple[tuple[int, int, int], ...]:
    """Consecutive steps of one file as one range."""
    found: list[tuple[int, int, int]] = []
    for file, start, end in steps:
        if found and found[-1][0] == file:
            found[-1] = (file, found[-1][1], end)
        else:
            found.append((file, start, end))
    return tuple(found)


class _Reads:
    """About how many bytes are read for a range of the output."""

    def __init__(self, plan: Plan) -> None:
        self.tensors: dict[int, list[tuple[TensorPlan, int]]] = {}
        for tensor in plan.tensors:
            self.tensors.setdefault(tensor.file, []).append((tensor, bytes_of(tensor.segments)))

    def __call__(self, within: tuple[int, int, int]) -> int:
        file, start, end = within
        total = 0
        for tensor, nbytes in self.tensors.get(file, ()):
            first, last = tensor.info.offset, tensor.info.offset + tensor.info.nbytes
            common = min(end, last) - max(start, first)
            total += nbytes * common // tensor.info.nbytes if common > 0 else 0
        return total


# --- plan.json ---


def document_of(plan: Plan, division: Division, file: Path, *, force: bool) -> Json:
    """What `plan.json` says.

    Args:
        plan: the plan of the whole run.
        division: its parts.
        file: where it will stand: paths in it count from its folder.
        force: whether an existing output is replaced in the end.
    """
    folder = _folder_of(file)
    memory = plan.peak_memory(Resources())
    listed = []
    for part in division.parts:
        files = sorted({number for number, _, _ in part.ranges})
        what = {"files": [plan.outputs[number].name for number in files]} if files else {"tensors": len(part.tensors)}
        counts = {"reads": part.reads, "writes": part.writes, "memory": memory}
        listed.append({"part": part.number, "does": division.called(part), **what, **counts})
    text = dump_recipe(plan.recipe, named=named_inputs(plan, seen_from=folder))
    said: Json = {
        "lines_plan": _FORMAT,
        "lines": __version__,
        "output": str(plan.output) if plan.output.is_absolute() else os.path.relpath(plan.output, folder),
        "force": force,
        "recipe": read_yaml(text)[0],
        "run": run_digest(identity(plan)),
        "inputs": states_of(plan),
        "shares": division.shares,
        "step": division.step,
        "stages": list(division.stages),
        "parts": listed,
    }
    return {**said, "digest": digest_of(said)}


def _folder_of(file: Path) -> Path:
    return file.parent if url_of(file) is not None else Path(os.path.abspath(file)).parent


def states_of(plan: Plan) -> dict[str, list[Any]]:
    """What each input was like when it was planned with, by its path."""
    return {real_name(path): [*state] for path, state in zip(plan.paths, plan.states, strict=True)}


def digest_of(document: Mapping[str, Any]) -> str:
    """The digest of all that a plan.json says but this."""
    own = {key: value for key, value in document.items() if key != "digest"}
    return f"sha256:{sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()}"


@dataclass(frozen=True)
class DividedPlan:
    """A `plan.json`, as it was read.

    Attributes:
        file: where it is.
        recipe: whose paths are seen from the current folder.
        output: the destination, likewise.
        document: all that it says.
    """

    file: Path
    recipe: Recipe
    output: Path
    document: Json

    @property
    def digest(self) -> str:
        """That names the plan."""
        return str(self.document["digest"])

    @property
    def force(self) -> bool:
        """Whether an existing output is replaced in the end."""
        return bool(self.document["force"])

    def command(self, *parts: int) -> str:
        """The command that makes these parts."""
        total = len(self.document["parts"])
        return f"lines run {as_argument(self.file)} --part {in_runs(parts)}/{total}"

    def divided(self, plan: Plan) -> Division:
        """The parts.

        Args:
            plan: what the recipe comes to now.

        Raises:
            ChangedInputError: the inputs are not those that were planned with.
            OutputError: it is the plan of something else.
        """
        before, there = self.document["inputs"], states_of(plan)
        if changed := sorted(path for path in {*before, *there} if before.get(path) != there.get(path)):
            raise ChangedInputError(
                f"{self.file} was made for other inputs than there are now:\n{some(changed)}",
                hint="Bring back those inputs; or plan again with these, and run all parts: lines plan.",
            )
        division = divide(plan, int(self.document["shares"]))
        now = document_of(plan, division, self.file, force=self.force)
        apart = ("recipe", "output", "digest")  # whose paths are seen from here; `run` is of what they lead to
        if any(now.get(key) != self.document.get(key) for key in {*now, *self.document} - {*apart}):
            raise OutputError(
                f"{self.file} is not what lines plan makes of its recipe here",
                hint="Plan again: lines plan. Another package with merge methods, or another Python, may be at work.",
            )
        return division


def in_runs(numbers: Sequence[int]) -> str:
    """Numbers in order, runs of them as `3-7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and found[-1][1] == number - 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)


def read_document(file: Path) -> DividedPlan:
    """Read a `plan.json`.

    Raises:
        RecipeError: it cannot be read, is none, was edited, or was made by another version.
        CheckpointError: a store cannot be asked for it.
    """
    try:
        document = json.loads(_content_of(file))
    except OSError as error:
        raise RecipeError(
            f"{file}: cannot be read: {error.strerror or error}", hint="lines plan writes such a file."
        ) from error
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{file}: not JSON: {error}", hint=_AGAIN) from error
    if not isinstance(document, dict) or "lines_plan" not in document:
        raise RecipeError(f"{file} is not a plan that lines plan wrote", hint=_AGAIN)
    if document["lines_plan"] != _FORMAT or document.get("lines") != __version__:
        raise RecipeError(
            f"{file} was written by lines {document.get('lines')}, and this is lines {__version__}",
            hint="All parts are made by the version that planned them: install it, or plan again.",
        )
    if document.get("digest") != digest_of(document):
        raise RecipeError(
            f"{file} was changed after lines plan wrote it",
            hint="A plan is not edited by hand: change the recipe, and plan again.",
        )
    recipe = recipe_from(document["recipe"], folder=file.parent, where=str(file))
    output = placed_at(document["output"])
    return DividedPlan(file, recipe, file.parent / output if url_of(output) is None else output, document)


def _content_of(file: Path) -> bytes:
    url = url_of(file)
    if url is None:
        return read_small(file, _LARGEST)
    found = content_if_there(url, _LARGEST)
    if found is None:
        raise RecipeError(f"{file}: there is no such object", hint="lines plan writes such a file.")
    return found


_AGAIN = "Make one: lines plan --config FILE -o OUT."


def parts_said(text: str, total: int) -> tuple[int, ...]:
    """The numbers that `--part` names: `3/16`, `3-5/16` or `1,4/16`.

    Raises:
        RecipeError: it names none, or parts of another number.
    """
    said = re.fullmatch(r"\s*(\d+(?:-\d+)?(?:,\d+(?:-\d+)?)*)/(\d+)\s*", text, re.ASCII)
    if said is None:
        raise RecipeError(f"--part {text}: not a part", hint="Say which of how many: 3/16, or several: 3-5/16.")
    if int(said[2]) != total:
        parts = "1 part" if total == 1 else f"{total:,} parts"
        raise RecipeError(f"--part {text}: the plan has {parts}", hint=f"Say which of these: 1/{total}.")
    numbers: list[int] = []
    for run in said[1].split(","):
        first, _, last = run.partition("-")
        if not 1 <= int(first) <= int(last or first) <= total:
            raise RecipeError(f"--part {text}: parts go from 1 to {total:,}")
        numbers += range(int(first), int(last or first) + 1)
    return tuple(dict.fromkeys(numbers))
