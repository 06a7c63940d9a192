"""Headers in, drafts out: what every output tensor will be made of, before its coefficient and its place are known."""

from __future__ import annotations

import json
import math
import re
import shlex
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from difflib import get_close_matches
from operator import mul
from typing import NamedTuple

from lines_cli.checkpoint.formulas import Dequantised, Formula
from lines_cli.checkpoint.header import EXACT_DTYPES, Part, StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import gc_paused
from lines_cli.errors import (
    MismatchError,
    RecipeError,
    printable,
    some,
)
from lines_cli.methods import Values
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import Names
from lines_cli.plan.rows import Gathered, RowsAsIs, Runs
from lines_cli.plan.tied_weights import is_vocabulary
from lines_cli.plan.vocabulary import Difference, TableRows, Vocabulary, in_words, row_axis, rows_in
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap
from lines_cli.scaling.schedule import Rules

STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Float dtypes as recipes and configs name them, and as safetensors does."""


class SourceRange(NamedTuple):
    """A run of entries in an input: which file (a number into `Plan.paths`), where its bytes start, and how to
    read them; and what is done with them, where the input does not store them as they are.

    Attributes:
        file, offset: of the first entry.
        dtype: how entries are stored.
        steps: what makes the entries of those that are stored (`checkpoint.formulas`).
        first: the number of the first one within its tensor, for the steps and for gathered rows.
        parts: where they are, if they do not stand side by side.
        gathered: where the rows are read, if they do not follow one another in that file: then `offset` says nothing,
            `file` is the one that most are in, and `dtype` is what all are widened to.
    """

    file: int
    offset: int
    dtype: str
    steps: tuple[Formula, ...] = ()
    first: int = 0
    parts: tuple[Part, ...] = ()
    gathered: Gathered | None = None

    def place_of(self, entry: int) -> tuple[int, str | None, int]:
        """Where an entry is: the file, what that calls the tensor (None: as the output does), and which of its entries
        it is there.
        """
        if not self.parts:
            return self.file, None, entry
        part = self.parts[bisect_right(self.parts, entry, key=lambda part: part.start) - 1]
        inside = entry - part.start
        steps = divmod(inside, part.sizes[1]) if len(part.sizes) > 1 else (inside,)
        return part.file, part.tensor, part.entry + sum(map(mul, steps, part.strides))

    def behind(self, entries: int) -> SourceRange:
        """The same without its first entries."""
        if not self.parts:
            return self._replace(offset=self.offset + entries * itemsize(self.dtype), first=self.first + entries)
        assert all(part.strides == (1,) for part in self.parts), "rows of a vocabulary are never turned"
        rest = []
        for part in self.parts:
            gone = min(max(entries - part.start, 0), part.numel)
            if gone < part.numel:
                offset = part.offset + gone * itemsize(self.dtype)
                numel, start = part.numel - gone, part.start + gone - entries
                rest.append(part._replace(start=start, numel=numel, offset=offset, sizes=(numel,)))
        first = self.first + entries
        return self._replace(file=rest[0].file, offset=rest[0].offset, first=first, parts=tuple(rest))

    def update_on(self, base: SourceRange) -> tuple[Formula, ...] | None:
        """The steps that add an update to another range's entries and so make its own; none where both are the same.
        None where it is made otherwise, and the two have to be subtracted.
        """
        place = self.file, self.offset, self.dtype, self.parts
        if place != (base.file, base.offset, base.dtype, base.parts) or self.gathered is not None:
            return () if self == base else None
        own = len(base.steps)
        same = self.steps[:own] == base.steps and all(step.adds for step in self.steps[own:])
        return self.steps[own:] if same else None


class Ranges:
    """Where the tensors of one input are read from.

    Args:
        inputs: all inputs.
        side: the number of that one.
    """

    def __init__(self, inputs: Inputs, side: int) -> None:
        checkpoint = inputs.checkpoints[side]
        self._tensors, self._made, self._numbers = checkpoint.tensors, checkpoint.formulas, inputs.file_numbers[side]

    def __call__(self, name: str) -> SourceRange:
        """All of a tensor, by its name there."""
        if name in self._made:
            (file, info, parts), steps = self._made[name]
            placed = tuple(step.placed(self._numbers.__getitem__) for step in steps)
            return SourceRange(self._numbers[file], info.offset, info.dtype, placed, parts=self._placed(parts))
        file, info, parts = self._tensors[name]
        if parts:
            return SourceRange(self._numbers[file], info.offset, info.dtype, parts=self._placed(parts))
        return SourceRange(self._numbers[file], info.offset, info.dtype)

    def _placed(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        return tuple([part._replace(file=self._numbers[part.file]) for part in parts])

    def of(self, stored: StoredTensor) -> SourceRange:
        """All of what is stored, whatever it is called."""
        return SourceRange(self._numbers[stored.file], stored.info.offset, stored.info.dtype)


class Segment(NamedTuple):
    """A run of entries of one output tensor, made by one operation.

    Either they are a copy, cast to the output dtype; or they are merged: `base + coefficient * merged task vector`, or,
    without a base, the merged weights.

    Attributes:
        start: the first entry, within the output tensor.
        numel: how many.
        copy: where the entries come from as they are.
        base, models: where those come from that are merged, the models in recipe order.
        compare: of a copy: where the same entries are expected to stand, too.
        as_is: of what is merged: rows that are the same in all sources, for one input alone has them.
    """

    start: int
    numel: int
    copy: SourceRange | None = None
    base: SourceRange | None = None
    models: tuple[SourceRange, ...] = ()
    compare: tuple[SourceRange, ...] = ()
    as_is: RowsAsIs | None = None

    @property
    def sources(self) -> tuple[SourceRange, ...]:
        """Everything that is read for it."""
        single = (self.copy,) if self.copy is not None else ()
        return (*single, *((self.base,) if self.base is not None else ()), *self.models, *self.compare)


class TensorSpec(NamedTuple):
    """An output tensor before its place in a file is known; `misfit` says why it cannot be made."""

    name: str
    counts_as: str  # the name that decides its coefficient and parameters: its own, or the embedding's it is tied to
    values: Values  # the method's parameters for it
    inside: bool  # whether it stands in a block
    dtype: str
    shape: tuple[int, ...]
    segments: tuple[Segment, ...] = ()
    filter: str | None = None  # the pattern that decides its coefficient, if one does
    in_float64: bool = False  # whether it is computed in float64, because an input is stored so
    rows: tuple[frozenset[int], int] | None = None  # numbers of vocabulary rows, where they differ: others', the kept
    paired: bool = True  # whether all inputs have it; otherwise it is a copy of the one that does
    misfit: str | None = None
    may_resize: bool = False  # of a misfit: whether `resize` would settle it
    transposed: bool = False  # of a misfit: whether a matrix has the same two sides in the other order
    table: TableRows | None = None  # where rows are paired by token: which they are
    of_other_tokens: bool = False  # of a misfit: whether it is that
    quantised: Dequantised | None = None  # how it is stored in 8 bits: the step that reads it, with its scales' name
    of_format: bool = False  # whether it belongs to how weights are stored, and is no tensor of the model
    scales_of: str = ""  # of such: the weight whose scales it holds

    def as_stored(self, segments: tuple[Segment, ...]) -> SourceRange | None:
        """Where codes and scales are copied from, if what the tensor is made of is stored as it is to be."""
        copy = segments[0].copy if len(segments) == 1 else None
        if copy is None or self.quantised is None or copy.gathered is not None or copy.parts or copy.first:
            return None
        (step,) = copy.steps if len(copy.steps) == 1 else (None,)
        if not isinstance(step, Dequantised) or copy.dtype != self.dtype:
            return None
        own, there = self.quantised.factors[0][1].info, step.factors[0][1].info
        alike = (step.shape, step.matrices, step.block) == (
            self.quantised.shape,
            self.quantised.matrices,
            self.quantised.block,
        )
        return copy if alike and (own.dtype, own.shape) == (there.dtype, there.shape) else None

    @property
    def is_the_base_s(self) -> bool:
        """Whether all models have the base's very entries, as with tensors that no adapter changes."""
        for segment in self.segments:
            for source in segment.models:
                if source != segment.base:  # mostly the first; `all` takes three times as long
                    return False
        return True


@gc_paused()
def specify_tensors(
    recipe: Recipe,
    inputs: Inputs,
    depth: DepthMap,
    rules: Rules,
    rows: Mapping[str, Names],
    vocabulary: Vocabulary | Difference | None = None,
) -> list[TensorSpec]:
    """What makes each output tensor. Those whose shapes or dtypes differ, and of which the recipe does not say what to
    do, are misfits (`refuse_misfits`).

    Args:
        recipe, inputs, depth, rules: as in a plan.
        rows: the tensors, and where each is read from.
        vocabulary: where rows of a vocabulary are paired by token: which they are; or why they have to be.

    Raises:
        RecipeError: a filter matches no tensor.
    """
    refuse_idle_filters(rules, rows)
    held = [(checkpoint.tensors, Ranges(inputs, side)) for side, checkpoint in enumerate(inputs.checkpoints)]
    heads = inputs.tied_heads
    values_for, places = TensorValues(recipe, depth), depth.places

    specs = []
    for name, row in rows.items():
        inside = name in places
        # A head that is tied to its embedding is one weight with it, and has one coefficient.
        counts_as = name if inside else heads.get(name, name)
        ranges, infos = [], []
        for (tensors, range_of), there in zip(held, row):  # noqa: B905 - as many by `Names`; strictness takes time
            if there is not None:
                ranges.append(range_of(there))
                infos.append(tensors[there].info)
        begun = (name, counts_as, values_for(counts_as), inside)
        decided_by = rules.filter_of(counts_as) if rules.filters else None
        of_vocabulary = not inside and is_vocabulary(name)
        spec = None
        if of_vocabulary and vocabulary is not None:
            sides: list[tuple[SourceRange, TensorInfo] | None] = []
            read = iter(zip(ranges, infos, strict=True))
            sides = [None if there is None else next(read) for there in row]
            spec = _by_token(recipe, inputs, begun, sides, decided_by=decided_by, vocabulary=vocabulary)
        specs.append(
            spec
            or _specify(recipe, inputs, begun, tuple(ranges), infos, decided_by=decided_by, may_resize=of_vocabulary)
        )
    for key, parameter in recipe.method.parameters.items():
        silent = [spec.name for spec in specs if parameter.required and spec.paired and spec.values[key] is None]
        if silent:
            raise RecipeError(
                f"parameters.{key} says nothing of {len(silent):,} tensors, such as {printable(silent[0])}",
                hint="Add `- value: NUMBER` as its last entry, for all that no filter matches.",
            )
    return specs


def taken_whole(spec: TensorSpec, recipe: Recipe, inputs: Inputs, side: int, there: str) -> TensorSpec:
    """A tensor that cannot be merged as one input has it, under the name `there`."""
    info = inputs.checkpoints[side].tensors[there].info
    whole = Segment(0, info.numel, copy=Ranges(inputs, side)(there))
    kept = spec._replace(dtype=_written_as(recipe, info.dtype), shape=info.shape, segments=(whole,))
    return kept._replace(in_float64=False, paired=False, misfit=None)


def settle_empty(
    specs: Sequence[TensorSpec], recipe: Recipe, inputs: Inputs, rows: Mapping[str, Names], notes: list[str]
) -> list[TensorSpec]:
    """The specs, where tensors that hold nothing in any input are copied as the leading one has them, whatever their
    shapes; `notes` gets a line for them.
    """
    tensors = [checkpoint.tensors for checkpoint in inputs.checkpoints]
    settled, empty = [], list[str]()
    for spec in specs:
        if 0 in spec.shape and spec.paired and _hold_nothing(row := rows[spec.name], tensors):
            empty.append(spec.name)
            lead = row[inputs.lead]
            assert lead is not None
            spec = taken_whole(spec, recipe, inputs, inputs.lead, lead)  # noqa: PLW2901 - what has become of it
        settled.append(spec)
    if empty:
        asked = ": were they saved without their weights?" if 2 * len(empty) > len(specs) else ""
        notes.append(f"{len(empty):,} tensor(s) are empty (size 0) in all inputs, and copied{asked}\n{some(empty)}")
    return settled


def _hold_nothing(row: Names, tensors: Sequence[Mapping[str, StoredTensor]]) -> bool:
    """Whether what an output tensor is read from has no entry on any side."""
    return all(there is None or 0 in held[there].info.shape for held, there in zip(tensors, row, strict=True))


def refuse_empty(inputs: Inputs, rows: Mapping[str, Names]) -> None:
    """Refuse an input whose tensors hold nothing where another's hold something: a sharded training run that was saved
    without its weights leaves such.

    Raises:
        MismatchError: names the input and the tensors.
    """
    empty: dict[int, list[str]] = {}
    for name, row in rows.items():
        numels = {
            side: inputs.checkpoints[side].tensors[there].info.numel
            for side, there in enumerate(row)
            if there is not None
        }
        if 0 in numels.values() and any(numels.values()):
            for side in [side for side, numel in numels.items() if not numel]:
                empty.setdefault(side, []).append(name)
    for side, names in empty.items():
        checkpoint = inputs.checkpoints[side]
        raise MismatchError(
            f"{len(names):,} of {len(checkpoint.tensors):,} tensors of {checkpoint.name} are empty (size 0), and not "
            f"in the other input(s):\n{some(names)}",
            hint="It was saved without its weights, as DeepSpeed ZeRO-3 does by default: gather them on saving "
            "(stage3_gather_16bit_weights_on_model_save) or afterwards (zero_to_fp32.py), and give that.",
        )


def refuse_misfits(
    specs: Sequence[TensorSpec], recipe: Recipe, inputs: Inputs, difference: Difference | None = None
) -> None:
    """Refuse inputs that do not fit together, with the ways to keep one side's.

    Args:
        specs, recipe, inputs: of a plan.
        difference: why rows of vocabularies are not of the same tokens, if they are not.

    Raises:
        MismatchError: names every misfit.
    """
    misfits = [spec for spec in specs if spec.misfit]
    if not misfits:
        return
    if difference is not None and all(spec.of_other_tokens for spec in misfits):
        names = some([printable(spec.name) for spec in misfits])
        raise MismatchError(
            f"{in_words(difference, inputs)}\nSo rows of one number are not of one token in\n{names}",
            hint=_ways_of_other_tokens(inputs),
        )
    between = " and ".join(checkpoint.name for checkpoint in inputs.checkpoints)
    listed = some([f"{printable(spec.name)}: {spec.misfit}" for spec in misfits])
    ways = _ways_of_an_edit(misfits, specs) if inputs.of_an_edit else _ways_of_a_merge(misfits, specs, recipe, inputs)
    if any(spec.may_resize for spec in misfits):
        said = "--resize ft or --resize base"
        if not inputs.of_an_edit:
            said = "resize: base or resize: ft in the recipe, or tokenizer_source: union, which keeps all tokens"
        ways.insert(0, f"Rows of token embeddings and their heads can be settled with {said}.")
    if sum(spec.transposed for spec in misfits) > 1:  # then square ones are, too, and nobody would notice
        ways = [_TRANSPOSED]
    if 2 * len(misfits) > sum(spec.paired for spec in specs):
        ways.insert(0, "Most tensors do not fit: are these inputs of one model?")
    raise MismatchError(
        f"{len(misfits):,} tensor(s) do not fit between {between} "
        f"({'base first' if inputs.has_base else 'in that order'}):\n{listed}",
        hint="\n".join(ways),
    )


def _ways_of_other_tokens(inputs: Inputs) -> str:
    if inputs.of_an_edit:
        return (
            "--resize ft pairs rows by token, and keeps the fine-tune's vocabulary; --resize base keeps the base's. "
            "--outside keep takes the fine-tune's rows as they are."
        )
    return (
        "In the recipe, tokenizer_source: union pairs rows by token, and keeps the tokens of all inputs; "
        "tokenizer_source: base, or a model, keeps those of that input."
    )


def _ways_of_an_edit(misfits: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> list[str]:
    ways = []
    outside = not any(spec.inside for spec in misfits)
    if patterns := _patterns(misfits, specs):
        keep, base = (
            " ".join(f"--filter {shlex.quote(f'{pattern}={rule}')}" for pattern in patterns)
            for rule in ("keep", "base")
        )
        also = "; so does --missing ft, or --outside keep" if outside else ""
        ways += [f"{keep} takes the fine-tune's as it is{also}.", f"{base} takes the base's."]
    elif outside:
        ways.append("--missing ft takes the fine-tune's as it is; so does --outside keep.")
    return ways or [_NO_FILTER]


def _ways_of_a_merge(
    misfits: Sequence[TensorSpec], specs: Sequence[TensorSpec], recipe: Recipe, inputs: Inputs
) -> list[str]:
    ways = []
    if not all(spec.inside for spec in misfits):
        first, lead = inputs.models[0].name, inputs.leading.name
        ways.append(
            f"Outside the blocks, missing: ft in the recipe takes such a tensor as it is from {first}, and missing: "
            f"copy from {lead}, which the output is like."
        )
    patterns = _patterns(misfits, specs)
    if patterns and recipe.lines is not None and inputs.has_base:
        rules = ", ".join(f"{json.dumps(pattern)}: base" for pattern in patterns)
        ways.append(f"lines.filter: {{{rules}}} takes the base's.")
    if patterns and (key := recipe.method.counts_by):
        zero = ", ".join(f"{{filter: {json.dumps(pattern)}, value: 0}}" for pattern in patterns)
        ways.append(f"A {key} of 0 for all models but one ({zero}), and of 1 for that, takes that one's.")
    return ways or ["Leave out the model whose tensors differ."]


_TRANSPOSED = (
    "One side holds its matrices transposed (as GPT-2's Conv1D and JAX do), also those that are square, which no shape "
    "shows: transpose those of one side first. A filter for what does not fit would not be enough."
)
_MOST_PATTERNS = 8
_MANY_PATTERNS = 3
_NO_FILTER = "No few filters name these tensors and no others: rename them, or make the sides fit first."


def _patterns(misfits: Sequence[TensorSpec], specs: Sequence[TensorSpec]) -> list[str]:
    """Parts of names that are in those of all misfits and in no other: their modules', else their own; where these are
    many, what they are called in every layer (`relative_position_bias_table`). None where some misfit has none, or
    they are too many to say: a filter would name others, too.
    """
    fitting = [spec.counts_as for spec in specs if spec.paired and not spec.misfit]  # what is copied anyway, is so
    names = list(dict.fromkeys(spec.counts_as for spec in misfits))
    of_each = _parts_of(names, fitting, lambda name: (name.rpartition(".")[0], name))
    if 0 < len(of_each) < _MANY_PATTERNS:
        return of_each
    return _parts_of(names, fitting, _behind_numbers) or of_each


def _behind_numbers(name: str) -> tuple[str, ...]:
    """What a tensor is called within its layer: `relative_position_bias_table`, else `attn.qkv.weight`."""
    rest = _UP_TO_A_NUMBER.sub("", name)
    return (rest.rpartition(".")[2], rest)


_UP_TO_A_NUMBER = re.compile(r".*(?:\A|\.)\d+\.", re.DOTALL)


def _parts_of(names: Sequence[str], fitting: Sequence[str], parts: Callable[[str], Sequence[str]]) -> list[str]:
    """For each name one of its parts that no other name has, or that of another; none where a name has none, or where
    they are too many.
    """
    patterns: list[str] = []
    for name in names:
        if any(pattern in name for pattern in patterns):
            continue
        own = next((part for part in parts(name) if part and not any(part in other for other in fitting)), None)
        if own is None:
            return []
        patterns.append(own)
        if len(patterns) > _MOST_PATTERNS:
            return []
    return patterns if all(map(str.isprintable, patterns)) else []


def refuse_idle_filters(rules: Rules, names: Collection[str]) -> None:
    """Refuse a filter of coefficients that says nothing.

    Raises:
        RecipeError: it matches none of the tensor names.
    """
    for pattern, _ in rules.filters:
        if pattern != "*" and not any(pattern in name for name in names):
            such_as = f", such as {printable(next(iter(names)))}" if names else ""
            near = get_close_matches(pattern[:100], {part for name in names for part in name.split(".")}, n=1)
            such_as += f"; did you mean {printable(near[0])}?" if near else ""
            raise RecipeError(f"lines.filter: {pattern!r} matches none of {len(names):,} tensor names{such_as}")


class TensorValues:
    """The method's parameters by tensor; tensors for which they are the same share one value."""

    def __init__(self, recipe: Recipe, depth: DepthMap) -> None:
        self._recipe, self._depth, self._filters = recipe, depth, sorted(recipe.filters)
        self._known: dict[tuple[tuple[str | int | None, ...], tuple[bool, ...]], Values] = {}

    def __call__(self, name: str) -> Values:
        place, component = self._depth.places.get(name), self._depth.component_of(name)
        outside = self._depth.side_of(name) if place is None and self._recipe.slices else None
        where = (component, outside) if place is None else (component, place.stack, place.index)
        key = (where, tuple([part in name for part in self._filters]) if self._filters else ())
        values = self._known.get(key)
        if values is None:
            at = self._depth.position_of(name)
            values = self._known[key] = self._recipe.values(name, at, component, outside=outside)
        return values


def _specify(
    recipe: Recipe,
    inputs: Inputs,
    begun: tuple[str, str, Values, bool],
    ranges: tuple[SourceRange, ...],
    infos: Sequence[TensorInfo],
    *,
    decided_by: str | None,
    may_resize: bool,
) -> TensorSpec:
    """One spec: of the inputs that have the tensor (`ranges` and `infos` are theirs), what they hold put together."""
    if len(infos) < len(inputs.checkpoints):  # not merged: as it is in the first that has it
        info, whole = infos[0], Segment(0, infos[0].numel, copy=ranges[0])
        return TensorSpec(*begun, _written_as(recipe, info.dtype), info.shape, (whole,), paired=False)
    lead = infos[inputs.lead]
    dtype = _written_as(recipe, lead.dtype)
    base, models = (ranges[0], ranges[1:]) if inputs.has_base else (None, ranges)
    if not [info for info in infos if info is not lead and (info.shape != lead.shape or info.dtype != lead.dtype)]:
        whole = Segment(0, lead.numel, None, base, models)
        return TensorSpec(*begun, dtype, lead.shape, (whole,), decided_by, lead.dtype == "F64")

    dtypes = dict.fromkeys(info.dtype for info in infos)
    in_float64 = "F64" in dtypes
    if len(dtypes) > 1 and not EXACT_DTYPES.isdisjoint(dtypes):
        misfit = f"{' and '.join(dtypes)}, of which one cannot be computed with"
        return TensorSpec(*begun, dtype, lead.shape, filter=decided_by, misfit=misfit)
    if len({info.shape for info in infos}) == 1:
        whole = Segment(0, lead.numel, base=base, models=models)
        return TensorSpec(*begun, dtype, lead.shape, (whole,), decided_by, in_float64)

    misfit = " and ".join(str(list(info.shape)) for info in infos)
    axis = _row_axis([info.shape for info in infos]) if may_resize else None
    if axis is None or recipe.resize == "error":
        if axis is not None:
            misfit += f", which {'--resize' if inputs.of_an_edit else 'resize:'} would settle"
        ways = (lead.shape, lead.shape[::-1], (*lead.shape[:-2], *lead.shape[-2:][::-1]))  # the last of many matrices
        swapped = [info.shape in ways for info in infos]
        return TensorSpec(
            *begun,
            dtype,
            lead.shape,
            filter=decided_by,
            misfit=misfit,
            may_resize=axis is not None,
            transposed=len(lead.shape) > 1 and all(swapped),
        )
    keeping = 0 if recipe.resize == "base" else len(ranges) - len(models)
    kept, source = infos[keeping], ranges[keeping]
    shared = min(info.numel for info in infos)
    segments = [Segment(0, shared, base=base, models=models)]
    if kept.numel > shared:  # rows that only the kept side surely has: as they are there
        segments.append(Segment(shared, kept.numel - shared, copy=source.behind(shared)))
    others = frozenset(info.shape[axis] for info in infos if info.shape != kept.shape)
    return TensorSpec(*begun, dtype, kept.shape, tuple(segments), decided_by, in_float64, (others, kept.shape[axis]))


# --- rows of a vocabulary, paired by token ---


def _by_token(
    recipe: Recipe,
    inputs: Inputs,
    begun: tuple[str, str, Values, bool],
    sides: Sequence[tuple[SourceRange, TensorInfo] | None],
    *,
    decided_by: str | None,
    vocabulary: Vocabulary | Difference,
) -> TensorSpec | None:
    """The spec of a table with a row for each token; None of a table that is not such a one."""
    infos = [None if side is None else side[1] for side in sides]
    having = [info for info in infos if info is not None]
    lead = infos[inputs.lead] or having[0]
    if len({_but_rows(info.shape) for info in having}) > 1:
        return None  # which is a misfit
    dtype = _written_as(recipe, lead.dtype)
    if isinstance(vocabulary, Difference):
        if len(having) < len(sides):
            return None
        misfit = "its rows are of other tokens"
        return TensorSpec(
            *begun, dtype, lead.shape, filter=decided_by, misfit=misfit, may_resize=True, of_other_tokens=True
        )
    if not vocabulary.covers(infos):
        return None
    table, axis = vocabulary.rows(infos), row_axis(lead.shape)
    shape = (*lead.shape[:axis], table.numel, *lead.shape[axis + 1 :])
    width, numel = math.prod(shape[axis + 1 :]), math.prod(shape)
    sources = _gathered(sides, table, width)
    others = frozenset(rows_in(info.shape) for info in having) - {table.numel}
    spec = TensorSpec(
        *begun,
        dtype,
        shape,
        filter=decided_by,
        in_float64=any(info.dtype == "F64" for info in having),
        rows=(others, table.numel),
        table=table,
    )
    if len(having) < len(sides):  # not merged: as it is in the first that has it
        first = next(side for side, info in enumerate(infos) if info is not None)
        return spec._replace(segments=(Segment(0, numel, copy=sources[first]),), in_float64=False, paired=False)
    base, models = (sources[0], sources[1:]) if inputs.has_base else (None, sources)
    as_is = None if table.as_is is None else RowsAsIs(table.as_is, width)
    return spec._replace(segments=(Segment(0, numel, base=base, models=models, as_is=as_is),))


def _but_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    axis = row_axis(shape)
    return (*shape[:axis], 0, *shape[axis + 1 :])


def _gathered(
    sides: Sequence[tuple[SourceRange, TensorInfo] | None], table: TableRows, width: int
) -> tuple[SourceRange, ...]:
    """Where each side's rows are read; those of a side that has them all in their order as they stand."""
    tables = tuple(() if side is None else (side[0],) for side in sides)
    plain = next(side[0] for side in sides if side is not None)

    def of(runs: Runs, parts: tuple[tuple[SourceRange, ...], ...], own: int) -> SourceRange:
        used = [source for part in set(runs.parts) if part < len(parts) for source in parts[part]]
        like = sides[own]
        first = like[0] if like is not None else plain
        padding = len(sides) + 1 if len(parts) > len(sides) and len(sides) + 1 in set(runs.parts) else -1
        widened = padding >= 0 or any(source.steps for source in used) or len({source.dtype for source in used}) > 1
        widened = widened or any(len(parts[part]) > 1 for part in set(runs.parts))
        dtype = used[0].dtype if used else first.dtype
        if widened:
            dtype = "F64" if any(source.dtype == "F64" for source in used) else "F32"
        mean_of = table.numel if padding < 0 else _first_of(runs, padding)
        return SourceRange(
            first.file, first.offset, dtype, gathered=Gathered(width, runs, parts, own, padding, mean_of)
        )

    own = [of(runs, (tables[side], ()), 0) for side, runs in enumerate(table.own)]
    means = tuple(tuple(own[side] for side in mean) for mean in table.means)
    parts = (*tables, (), (), *means)  # behind the tables: zeros, and the mean of all rows
    found = []
    for side, runs in enumerate(table.runs):
        mine = sides[side]
        in_order = len(runs.starts) == 1 and runs.parts[0] == side and runs.rows[0] == 0
        found.append(mine[0] if in_order and mine is not None else of(runs, parts, side))
    return tuple(found)


def in_common(spec: TensorSpec) -> Segment:
    """What is read to compare a tensor on all sides: its first segment; of rows that are paired by token those that all
    have, one behind the other.
    """
    segment, table = spec.segments[0], spec.table
    if table is None:
        return segment
    width = math.prod(spec.shape[row_axis(spec.shape) + 1 :])
    read = []
    for side, (source, runs) in enumerate(zip(segment.sources, table.in_common(), strict=True)):
        own = source if source.gathered is None else source.gathered.parts[side][0]
        dtype = "F32" if own.steps and own.dtype != "F64" else own.dtype
        read.append(SourceRange(own.file, own.offset, dtype, gathered=Gathered(width, runs, ((own,), ()))))
    numel = table.merged * width
    return Segment(0, numel, base=read[0], models=tuple(read[1:]))


def _first_of(runs: Runs, part: int) -> int:
    """The first row that comes from a part."""
    return runs.starts[list(runs.parts).index(part)]


def _written_as(recipe: Recipe, dtype: str) -> str:
    """What entries stored so are stored as in the output."""
    return STORED[recipe.dtype] if recipe.dtype in STORED and dtype not in EXACT_DTYPES else dtype


def _row_axis(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The one axis on which shapes differ, if only ones stand before it: then rows are runs of entries."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    return differing[0] if len(differing) == 1 and all(n == 1 for n in shapes[0][: differing[0]]) else None
