"""What `lines inspect` looks at, as far as headers tell: a checkpoint's tensors, each with its place, its kind and the
coefficient that LiNeS would give it; and with a base, which entries are to be compared.

Nothing here reads tensor data or needs torch. What is found in the numbers (`Findings`) is for `comparison` to measure.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.header import EXACT_DTYPES, FLOAT_DTYPES, TensorInfo
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint, unsupported_in
from lines_cli.checkpoint.sidecars import RECIPE
from lines_cli.depth import DepthMap, Place, Side, Stack, find_depth
from lines_cli.draft import Draft, Piece, Slice, draft_tensors, refuse_idle_filters
from lines_cli.errors import DepthError, LinesError, RecipeError, printable, some
from lines_cli.hub import locate
from lines_cli.kinds import Kind, kind_of
from lines_cli.layout import natural
from lines_cli.pairing import Names, Sides, aligned_names, match_names, says_tied, strangers, tied_embedding
from lines_cli.planning import sides_of
from lines_cli.recipe import Recipe, Scaling
from lines_cli.recipe_check import edit_recipe, make_recipe
from lines_cli.recipe_file import load_recipe
from lines_cli.schedule import Rules


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of what is inspected.

    Attributes:
        name: its own.
        info: dtype, shape, bytes.
        place: its stack and layer; None outside the blocks.
        side: where it stands outside the blocks; None inside.
        kind: what it is a parameter of.
        coefficient: what LiNeS would scale its update by, in float64.
    """

    name: str
    info: TensorInfo
    place: Place | None
    side: Side | None
    kind: Kind
    coefficient: float


@dataclass(frozen=True, slots=True)
class Span:
    """A run of entries that is read: of one tensor alone, or of the base and every fine-tune, to compare them.

    Attributes:
        name: the tensor's.
        pieces: one, with where its entries come from.
        counts_for: for each of its sources the checkpoint (a number into `Inspection.checkpoints`) and tensor that
            health is told of; None where another span tells it.
    """

    name: str
    pieces: tuple[Piece]
    counts_for: tuple[tuple[int, str] | None, ...]
    in_float64: bool = True  # all sums are taken in it

    @property
    def compares(self) -> bool:
        """Whether it is read to be compared."""
        return self.pieces[0].base is not None


@dataclass(frozen=True, slots=True)
class Compared:
    """A tensor that the base and every fine-tune have: its name in each, and where their common entries lie."""

    name: str
    names: Names
    piece: Piece


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, or fine-tunes and their base.

    Attributes:
        checkpoints: the base, if there is one; then what is inspected.
        has_base: whether there is one.
        depth: stacks and places; no stack where depth cannot be decided.
        scaling: alpha, beta and the like.
        rules: what decides the coefficients.
        parts: every tensor of the (first) inspected checkpoint.
        compared: what the fine-tunes are compared with the base by.
        made_by: the recipe of an output of ours.
        tied: whether the config ties the head to the token embedding; and such heads that are stored all the same,
            each with its embedding.
        quantised: why it cannot be computed with.
        notes: what a person should know.
    """

    checkpoints: tuple[Checkpoint, ...]
    has_base: bool
    depth: DepthMap
    scaling: Scaling
    rules: Rules
    parts: tuple[Part, ...]
    compared: tuple[Compared, ...]
    made_by: Recipe | None
    tied: tuple[bool, dict[str, str]]
    quantised: str | None
    notes: tuple[str, ...]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """What is inspected, the base apart."""
        return self.checkpoints[1 if self.has_base else 0 :]

    @property
    def checkpoint(self) -> Checkpoint:
        """What is inspected; of several fine-tunes the first."""
        return self.models[0]

    @cached_property
    def inputs(self) -> tuple[Path, ...]:
        """Every file, as `Slice.file` counts them."""
        return tuple(file for checkpoint in self.checkpoints for file in checkpoint.files)

    def spans(self) -> list[Span]:
        """Everything that is read to compare the checkpoints, and to see what they hold: every float entry of each."""
        spans: list[Span] = []
        told: set[tuple[int, str]] = set()
        for tensor in sorted(self.compared, key=lambda tensor: natural(tensor.name)):
            counts_for: list[tuple[int, str] | None] = []
            for side, name in enumerate(tensor.names):
                assert name is not None
                whole = tensor.piece.numel == self.checkpoints[side].tensors[name].info.numel
                fresh = whole and (side, name) not in told  # two heads may be read from one embedding
                counts_for.append((side, name) if fresh else None)
                if fresh:
                    told.add((side, name))
            spans.append(Span(tensor.name, (tensor.piece,), tuple(counts_for)))
        first = 0
        for side, checkpoint in enumerate(self.checkpoints):
            for name, stored in checkpoint.tensors.items():
                if (side, name) not in told and stored.info.dtype in FLOAT_DTYPES:
                    source = Slice(first + stored.file, stored.info.offset, stored.info.dtype)
                    spans.append(Span(name, (Piece(0, stored.info.numel, copy=source),), ((side, name),)))
            first += len(checkpoint.files)
        return spans


# --- what the numbers say ---


@dataclass(frozen=True, slots=True)
class Change:
    """What one fine-tune changed: sums in float64 over the entries that are finite on both sides. Two of them add up.

    Attributes:
        numel: how many those are.
        squares: of the update: the sum of `(ft - base)**2`.
        base_squares: the same of the base's entries.
        unchanged: how many entries are equal.
        largest: the greatest `|ft - base|`.
    """

    numel: int = 0
    squares: float = 0.0
    base_squares: float = 0.0
    unchanged: int = 0
    largest: float = 0.0

    def __add__(self, other: Change) -> Change:
        return Change(
            self.numel + other.numel,
            self.squares + other.squares,
            self.base_squares + other.base_squares,
            self.unchanged + other.unchanged,
            max(self.largest, other.largest),
        )


@dataclass(frozen=True, slots=True)
class Joint:
    """How the updates of several fine-tunes go together. Where one is not finite it counts as zero. Two of them add up.

    Attributes:
        numel: entries.
        products: for each pair of models, (0, 1), (0, 2), ..., (1, 2), ...: the dot product of their updates.
        opposed: for each pair, how many entries one increases and the other decreases.
        disagreeing: how many entries any one increases and any other decreases.
        sum_squares, sum_l1: of the sum of all updates: the sum of squares and of magnitudes.
    """

    numel: int
    products: tuple[float, ...]
    opposed: tuple[int, ...]
    disagreeing: int
    sum_squares: float
    sum_l1: float

    def __add__(self, other: Joint) -> Joint:
        return Joint(
            self.numel + other.numel,
            tuple(a + b for a, b in zip(self.products, other.products, strict=True)),
            tuple(a + b for a, b in zip(self.opposed, other.opposed, strict=True)),
            self.disagreeing + other.disagreeing,
            self.sum_squares + other.sum_squares,
            self.sum_l1 + other.sum_l1,
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """What entries of one checkpoint hold. Two of them add up.

    Attributes:
        numel: how many.
        nan, inf: how many are not finite.
        low, high: the least and the greatest of those that are; inf and -inf if none is.
        bits: the sum of their bytes, read as whole numbers: equal tensors have equal ones.
    """

    numel: int = 0
    nan: int = 0
    inf: int = 0
    low: float = math.inf
    high: float = -math.inf
    bits: int = 0

    def __add__(self, other: Seen) -> Seen:
        return Seen(
            self.numel + other.numel,
            self.nan + other.nan,
            self.inf + other.inf,
            min(self.low, other.low),
            max(self.high, other.high),
            self.bits + other.bits,
        )


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        changes: tensor -> what each fine-tune changed of it.
        joint: tensor -> how they go together; empty for one fine-tune.
        seen: (checkpoint, tensor) -> what it holds; checkpoints as in `Inspection.checkpoints`.
        same: for each checkpoint, tensors that hold the same bytes, each with the first that does.
        changed_files: for each checkpoint, files that are not as its recipe recorded -> how they differ.
        bytes_read, seconds: of the pass.
    """

    changes: Mapping[str, tuple[Change, ...]] = field(default_factory=dict)
    joint: Mapping[str, Joint] = field(default_factory=dict)
    seen: Mapping[tuple[int, str], Seen] = field(default_factory=dict)
    same: Mapping[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    changed_files: Mapping[int, Mapping[str, str]] = field(default_factory=dict)
    bytes_read: int = 0
    seconds: float = 0.0


# --- opening ---


def open_inspection(
    models: Sequence[str], *, base: str | None = None, quiet: bool = False, **scaling: Any
) -> Inspection:
    """Open what is to be inspected: headers, configs, recipes.

    Args:
        models: one checkpoint; or with a base its fine-tunes, one or several.
        base: what they were fine-tuned from.
        quiet: no progress bars while fetching from the Hub.
        scaling: the fields of `Scaling`. One that is None keeps its default; if all are, an output of ours keeps those
            of its recipe.

    Raises:
        CheckpointError: one cannot be found or read.
        UnsupportedError: with a base: one is quantised.
        MismatchError: with a base: no tensor is in all of them.
        RecipeError: an impossible option; several checkpoints, and no base.
    """
    if base is None and len(models) > 1:
        raise RecipeError(
            f"{len(models)} checkpoints, and no base to compare them with",
            hint="Name it with --base BASE; or inspect them one at a time.",
        )
    if base in models:
        raise RecipeError(f"{base} is the base, and is also to be compared with it", hint="Name it once.")
    opened = [_opened(name, to_look_at=base is None, quiet=quiet) for name in (*([base] if base else ()), *models)]
    lead = opened[1 if base else 0]
    notes: list[str] = []
    made_by = _recipe_of(lead, notes)
    chosen = edit_recipe(base or models[0], models[0], **scaling).lines
    assert chosen is not None
    if base is None and made_by and made_by.lines and all(value is None for value in scaling.values()):
        chosen = made_by.lines

    if base is None:
        depth = _depth(lead.tensors, lead.config, chosen, notes)
        rules = chosen.rules(depth)
        refuse_idle_filters(rules, lead.tensors)
        compared: list[Compared] = []
        config = lead.config
    else:
        recipe = _comparing(base, models, chosen)
        sides = sides_of(recipe, *opened)
        own = aligned_names(sides, notes)
        rows = _rows(sides, own, notes)
        config = sides.config_of(sides.lead)
        depth = _depth((name for names in own for name in names), config, chosen, notes)
        rules = chosen.rules(depth)
        compared = _compared(sides, draft_tensors(recipe, sides, depth, rules, rows), rows, notes)
    heads = {name: tied for name in lead.tensors if (tied := tied_embedding(name, lead, config)) is not None}
    quantised = unsupported_in(lead)
    return Inspection(
        tuple(opened),
        base is not None,
        depth,
        chosen,
        rules,
        tuple(_parts(lead, depth, rules, heads)),
        tuple(compared),
        made_by,
        (says_tied(config), heads),
        quantised.message if quantised else None,
        (*notes, *depth.notes),
    )


def _opened(name: str, *, to_look_at: bool, quiet: bool) -> Checkpoint:
    found = locate(name, quiet=quiet)
    return open_checkpoint(found.path, name=found.name, hub_id=found.hub_id, to_look_at=to_look_at)


def _recipe_of(checkpoint: Checkpoint, notes: list[str]) -> Recipe | None:
    """The recipe in the folder of an output of ours."""
    path = checkpoint.folder / RECIPE if checkpoint.folder else None
    if path is None or not path.is_file():
        return None
    try:
        return load_recipe(path)
    except LinesError as error:
        notes.append(f"its recipe cannot be read: {error.message}")
        return None


def _depth(names: Iterable[str], config: Mapping[str, Any], scaling: Scaling, notes: list[str]) -> DepthMap:
    try:
        return find_depth(dict.fromkeys(names), config=config, layers=scaling.layers)
    except DepthError as error:
        notes.append(f"depth is unknown: {error.message}\n{error.hint or ''}".strip())
        return DepthMap((), {})


def _comparing(base: str, models: Sequence[str], scaling: Scaling) -> Recipe:
    """The recipe that scales each fine-tune's update: what they have in common is paired as an edit would."""
    sources = [{"model": model} for model in models]
    settled = {"like": "ft", "resize": "ft", "missing": "skip"}
    return make_recipe({"base_model": base, "models": sources, "lines": scaling, **settled}, where="inspect")


def _rows(sides: Sides, own: Sequence[Mapping[str, str]], notes: list[str]) -> dict[str, Names]:
    """The tensors that all have; a note tells of the others."""
    rows, incomplete = match_names(sides, own, resize=True, notes=notes)
    if not rows:
        raise strangers(sides)
    by_owners: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        by_owners[tuple(side for side, there in enumerate(row) if there is not None)].append(name)
    for owners, names in by_owners.items():
        whose = " and ".join(sides.called(side) for side in owners)
        notes.append(f"{len(names):,} tensor(s) of {whose} alone, not compared:\n{some(sorted(names))}")
    return rows


def _compared(sides: Sides, drafts: Sequence[Draft], rows: Mapping[str, Names], notes: list[str]) -> list[Compared]:
    """Where the entries lie that all have; a note tells of tensors that do not fit."""
    if misfits := [f"{printable(draft.name)}: {draft.misfit}" for draft in drafts if draft.misfit]:
        notes.append(f"{len(misfits):,} tensor(s) that do not fit, not compared (base first):\n{some(misfits)}")
    for draft in drafts:
        if draft.rows and not draft.misfit:
            others = " and ".join(f"{number:,}" for number in sorted(draft.rows[0]))
            what = f"{draft.rows[1]:,} rows in {sides.called(1)}, {others} in others"
            notes.append(f"{printable(draft.name)}: {what}; those that all have are compared")
    pieces = {draft.name: draft.pieces[0] for draft in drafts if not draft.misfit}
    return [
        Compared(name, rows[name], piece)
        for name, piece in pieces.items()
        if not any(source.dtype in EXACT_DTYPES for source in piece.sources)
    ]


def _parts(checkpoint: Checkpoint, depth: DepthMap, rules: Rules, heads: Mapping[str, str]) -> Iterator[Part]:
    """Every tensor; a head that is tied to its embedding has that one's coefficient, as in an edit."""
    for name in sorted(checkpoint.tensors, key=natural):
        place = depth.places.get(name)
        side = None if place else depth.side_of(name)
        coefficient = rules.coefficient(name if place else heads.get(name, name), depth)
        info = checkpoint.tensors[name].info
        yield Part(name, info, place, side, kind_of(name, inside=place is not None), coefficient)


def pattern_of(stack: Stack, depth: DepthMap) -> str | None:
    """How the names of a stack's tensors begin, with what counts its layers in braces: `model.layers.{l}`, or
    `layers.{s}.blocks.{l}` where stages are counted through. None where the stack's name is no prefix of theirs.
    """
    names = [name for name, place in depth.places.items() if place.stack == stack.name]
    begins, layers = [], 0
    for prefix in stack.name.split("+"):
        numbered = re.compile(rf"(?P<begin>{re.escape(prefix)}[._]?)(?P<number>\d+)(?P<rest>\..*)")
        found = [match for name in names if (match := numbered.match(name))]
        if not found:
            return None
        numbers = {match["number"] for match in found}
        layers += len(numbers)
        inner = [match["begin"] for each in found if (match := _INNER_NUMBER.match(each["rest"]))]
        begins.append((found[0]["begin"], inner[0] if inner else ""))
    if layers == stack.layers:
        return " + ".join(f"{begin}{{l}}" for begin, _ in begins)
    return " + ".join(f"{begin}{{s}}{inner}{{l}}" if inner else f"{begin}{{l}}" for begin, inner in begins)


_INNER_NUMBER = re.compile(r"(?P<begin>\.(?:\w+\.)?)\d+(?:\.|$)")
