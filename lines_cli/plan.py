"""Recipe and headers in, Plan out: every tensor's sources, coefficient and place in the output, to the byte.

All that can be refused before the first tensor is read is refused here. What a recipe needs to know of the numbers in
the tensors (`Needs`) is measured by the engine, and `resolve` puts it in: a plan without needs has been resolved. A plan
is a value: it can be printed (`--dry-run`), compared, and cut by output file. Nothing here reads tensor data or needs
torch.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.header import EXACT_DTYPES, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint
from lines_cli.checkpoint.sidecars import RECIPE, Card, Sidecar, carry_over, index_file, model_card
from lines_cli.checkpoint.writer import is_one_file
from lines_cli.depth import DepthMap, Place, find_depth
from lines_cli.errors import DepthError, MismatchError, RecipeError, printable, some
from lines_cli.hub import locate
from lines_cli.layout import OutputFile, lay_out_files
from lines_cli.methods import Measured, Values
from lines_cli.pairing import Names, Sides, aligned_names, is_vocabulary, pair_tensors, tied_embedding
from lines_cli.recipe import Recipe, Scaling
from lines_cli.recipe_file import dump_recipe
from lines_cli.resources import Resources
from lines_cli.schedule import Rules

_STORED = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class Slice:
    """A run of entries in an input: which file (a number into `Plan.inputs`), where its bytes start, and how to
    read them.
    """

    file: int
    offset: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of entries of one output tensor, made by one operation.

    Either they are a copy, cast to the output dtype; or they are merged: `base + coefficient * merged task vector`, or,
    without a base, the merged weights.

    Attributes:
        start: the first entry, within the output tensor.
        numel: how many.
        copy: where the entries come from as they are.
        base, models: where those come from that are merged, the models in recipe order.
        compare: of a copy: where the same entries are expected to stand, too.
    """

    start: int
    numel: int
    copy: Slice | None = None
    base: Slice | None = None
    models: tuple[Slice, ...] = ()
    compare: tuple[Slice, ...] = ()

    @property
    def sources(self) -> tuple[Slice, ...]:
        """Everything that is read for it."""
        return tuple(source for source in (self.copy, self.base, *self.models, *self.compare) if source is not None)


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: what it is, where it goes, what makes it.

    Attributes:
        name: the output's name for it.
        file: the output file (a number into `Plan.outputs`).
        info: dtype, shape, offset in that file, bytes.
        place: its stack and layer; None outside the blocks.
        counts_as: the name that decides its coefficient and parameters: its own, or that of the embedding it is tied to.
        values: the method's parameters for it.
        coefficient: in float64, before rounding to the compute dtype; NaN until what it depends on has been measured.
        filter: the pattern that decided it, if one did.
        pieces: what it is made of.
        paired: whether all inputs have it; otherwise it is a copy of the one that does.
    """

    name: str
    file: int
    info: TensorInfo
    place: Place | None
    counts_as: str
    values: Values
    coefficient: float
    filter: str | None
    pieces: tuple[Piece, ...]
    paired: bool

    @property
    def edited(self) -> bool:
        """Whether any entry is computed; otherwise all are copied (or cast)."""
        return any(piece.models for piece in self.pieces)

    @property
    def in_float64(self) -> bool:
        """Whether its arithmetic runs in float64, because an input does; else in float32."""
        return any(s.dtype == "F64" for piece in self.pieces if piece.models for s in piece.sources)


@dataclass(frozen=True, slots=True)
class Norms:
    """What `alpha: auto` rests on: L1 norms over the whole model, in float64.

    Attributes:
        total: of the sum of all task vectors, without weights.
        merged: of the merged task vector, before lambda and gamma.
        models: N.
    """

    total: float
    merged: float
    models: int

    @property
    def alpha(self) -> float:
        """`(1/N) * norm1(sum of tau_i) / norm1(tau_merged)` (arXiv 2410.17146, section 5.2)."""
        return 1 / self.models * (self.total / self.merged)


@dataclass(frozen=True, slots=True)
class Statistics:
    """What was measured of the numbers in the inputs.

    Attributes:
        thresholds: (model, tensor, or None for all of them) -> the least magnitude that is kept.
        kept: for each model, how many entries are kept, and of how many; empty where that was not counted.
        majority: the sign that most elections gave.
        l1: tensor -> for each model the L1 norm of its task vector, before and after entries were dropped.
        products: tensor -> two models' dot product and squared L2 norms.
        norms: for `alpha: auto`.
    """

    thresholds: Mapping[tuple[int, str | None], float] = field(default_factory=dict)
    kept: tuple[tuple[int, int], ...] = ()
    majority: int = 1
    l1: Mapping[str, tuple[tuple[float, float], ...]] = field(default_factory=dict)
    products: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    norms: Norms | None = None


@dataclass(frozen=True, slots=True)
class Needs:
    """Which statistics a plan needs before it can be carried out."""

    thresholds: bool = False
    l1: bool = False
    products: bool = False
    majority: bool = False
    norms: bool = False

    def __bool__(self) -> bool:
        return self.thresholds or self.l1 or self.products or self.majority or self.norms


@dataclass(frozen=True)
class Plan:
    """Everything about a run but the numbers in the tensors.

    Attributes:
        recipe: what was asked.
        sides: the opened inputs.
        inputs: every file that is read: the base's, then the models'.
        output: the destination, a folder or one file.
        outputs: the weight files to write.
        tensors: every output tensor, in file order.
        depth: stacks and places.
        rules: what decided the coefficients.
        needs: what is still to be measured.
        statistics: what was measured.
        sidecars: the other files of an output folder; empty for a single file.
        notes: what a person should know of how disagreements were settled.
        rows: numbers of vocabulary rows that became another number.
    """

    recipe: Recipe
    sides: Sides
    inputs: tuple[Path, ...]
    output: Path
    outputs: tuple[OutputFile, ...]
    tensors: tuple[TensorPlan, ...]
    depth: DepthMap
    rules: Rules
    needs: Needs
    statistics: Statistics
    sidecars: tuple[Sidecar, ...]
    notes: tuple[str, ...]
    rows: Mapping[int, int]

    @property
    def read_paths(self) -> tuple[Path, ...]:
        """Everything the output must not replace: the inputs as they were named, and all their files."""
        return (*(checkpoint.path for checkpoint in self.sides.checkpoints), *self.inputs)

    @property
    def alpha(self) -> float | None:
        """The first coefficient of the schedule; None where there is none, or it is yet to be measured."""
        if self.recipe.lines is None or isinstance(self.recipe.lines.schedule, tuple):
            return None
        return _known(self.rules.schedule.first)

    @property
    def passes(self) -> tuple[str, ...]:
        """The passes that measure what the plan needs, by what they measure; each reads everything that is merged."""
        needs = self.needs
        found = ["thresholds"] * ROUNDS if needs.thresholds and self.trims_globally else []
        found += ["thresholds"] if needs.thresholds and not self.trims_globally else []
        found += ["L1 norms"] if needs.l1 else []
        found += ["angles"] if needs.products else []
        last = [word for word, needed in (("signs", needs.majority), ("norms", needs.norms)) if needed]
        return (*found, " and ".join(last)) if last else tuple(found)

    @property
    def trims_globally(self) -> bool:
        """Whether there is one threshold for all of a model's tensors."""
        return any(tensor.values.get("trim") == "global" for tensor in self.tensors if tensor.edited)

    def told(self, tensor: TensorPlan) -> Values:
        """What the method is told of a tensor: the keywords of its function, masks apart."""
        return self.recipe.method.told(tensor.values, self.measured(tensor))

    def measured(self, tensor: TensorPlan) -> Measured:
        """What was measured for a tensor's merge."""
        found, models = self.statistics, range(len(self.recipe.merged))
        whole = tensor.values.get("trim") == "global"
        thresholds = tuple(found.thresholds.get((model, None if whole else tensor.name)) for model in models)
        return Measured(
            thresholds, found.majority, found.l1.get(tensor.name, ()), found.products.get(tensor.name, (0.0, 0.0, 0.0))
        )

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read from the inputs by the last pass, the one that writes."""
        return _bytes_of(self.tensors)

    @property
    def bytes_measured(self) -> int:
        """Bytes of tensor data that one measuring pass reads."""
        return _bytes_of(tensor for tensor in self.tensors if tensor.edited)

    def buffer_bytes(self, resources: Resources) -> int:
        """Bytes of the workers' buffers: an input and the output as they are stored, and what the arithmetic needs."""
        models = len(self.recipe.merged)
        widths = {itemsize(source.dtype) for t in self.tensors for p in t.pieces for source in p.sources}
        written = max((itemsize(tensor.info.dtype) for tensor in self.tensors), default=0)
        wide = 8 if any(tensor.in_float64 for tensor in self.tensors) else 4
        own = 0 if models == 1 else _TEMPORARIES
        return (
            resources.threads
            * resources.chunk_for(models)
            * (max(widths, default=0) + written + (models + 1 + own) * wide)
        )

    def peak_memory(self, resources: Resources) -> int:
        """About how much resident memory a run takes at most, in bytes, on the CPU.

        Python with torch imported (measured with torch's CPU build), the plan (measured, per tensor), the buffers.
        """
        return _PYTHON_WITH_TORCH + _PER_TENSOR * len(self.tensors) + self.buffer_bytes(resources)

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(file.nbytes for file in self.outputs)

    def coefficients(self) -> list[tuple[str, int, float, float]]:
        """Each stack's name, number of layers, first and last coefficient (filters apart)."""
        value = self.rules.inside_value
        return [
            (
                stack.name,
                stack.layers,
                value(stack.name, 0, stack.layers, scale=self._scale(0.0 if stack.layers > 1 else 1.0)),
                value(stack.name, stack.layers - 1, stack.layers, scale=self._scale(1.0)),
            )
            for stack in self.depth.stacks
        ]

    def outside(self) -> tuple[float, float]:
        """The coefficients outside the blocks, before and behind them (filters apart)."""
        scale = self._scale(0.0)
        return self.rules.outside_value("before", scale=scale), self.rules.outside_value("after", scale=scale)

    def _scale(self, position: float) -> float:
        """`lambda` at a place in the depth, 0 to 1."""
        scale: float = self.recipe.values("", position).get("lambda", 1.0)
        return scale

    @property
    def parameters(self) -> int:
        """Entries of all output tensors."""
        return sum(tensor.info.numel for tensor in self.tensors)

    def map(self) -> list[dict[str, Any]]:
        """Every output tensor's stack (None outside the blocks), layer and coefficient, as plain values."""
        return [
            {
                "name": tensor.name,
                "stack": tensor.place.stack if tensor.place else None,
                "index": tensor.place.index if tensor.place else None,
                "coefficient": _known(tensor.coefficient),
            }
            for tensor in self.tensors
        ]

    def models(self) -> list[dict[str, Any]]:
        """Every merged model's name, the least and the greatest weight and density, and the share of entries kept."""
        merged = [tensor.values for tensor in self.tensors if tensor.edited]

        def span(key: str, model: int) -> list[float] | None:
            told = {values[key][model] for values in merged if isinstance(values.get(key), tuple)} - {None}
            return [min(told), max(told)] if told else None

        kept = self.statistics.kept
        return [
            {
                "model": source.model,
                "weight": span("weight", model),
                "density": span("density", model),
                "kept": kept[model][0] / kept[model][1] if kept and kept[model][1] else None,
            }
            for model, source in enumerate(self.recipe.merged)
        ]

    def summary(self) -> dict[str, Any]:
        """The plan in numbers, as plain values that JSON can hold (docs/json.md describes them)."""

        def counts(tensors: Iterable[TensorPlan]) -> dict[str, int]:
            numels = [tensor.info.numel for tensor in tensors]
            return {"tensors": len(numels), "parameters": sum(numels)}

        by_stack: dict[str | None, list[TensorPlan]] = defaultdict(list)
        for tensor in self.tensors:
            by_stack[tensor.place.stack if tensor.place else None].append(tensor)
        norms = self.statistics.norms
        return {
            "output": str(self.output),
            "files": [file.name for file in self.outputs],
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "models": self.models(),
            "alpha": self.alpha,
            "norms": {"sum": norms.total, "merged": norms.merged} if norms else None,
            "stacks": [
                {"name": name, "layers": layers, "first": _known(first), "last": _known(last), **counts(by_stack[name])}
                for name, layers, first, last in self.coefficients()
            ],
            "outside": {
                **dict(zip(("first", "last"), map(_known, self.outside()), strict=True)),
                **counts(by_stack[None]),
            },
            "filters": [
                {"pattern": pattern, "coefficient": value, **counts(t for t in self.tensors if t.filter == pattern)}
                for pattern, value in self.rules.filters
            ],
            "edited": counts(tensor for tensor in self.tensors if tensor.edited),
            "copied": counts(tensor for tensor in self.tensors if not tensor.edited),
            "bytes": {"read": self.bytes_read, "written": self.bytes_written},
            "notes": list(self.notes),
        }


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _bytes_of(tensors: Iterable[TensorPlan]) -> int:
    return sum(
        piece.numel * itemsize(source.dtype)
        for tensor in tensors
        for piece in tensor.pieces
        for source in piece.sources
    )


ROUNDS = 2
"""How often magnitudes are counted until a threshold is known to the bit."""

_PYTHON_WITH_TORCH = 250_000_000  # resident, with all that lines imports
_PER_TENSOR = 3_000
_TEMPORARIES = 5  # chunks that a method may need beside its task vectors


def open_inputs(recipe: Recipe, *, quiet: bool = False) -> Sides:
    """Open the recipe's base and models, fetching from the Hub what is no path; `quiet` without progress bars.

    Raises:
        CheckpointError: one cannot be found or read.
    """
    opened: dict[str, Checkpoint] = {}

    def opening(name: str) -> Checkpoint:
        if name not in opened:
            found = locate(name, quiet=quiet)
            opened[name] = open_checkpoint(found.path, name=found.name, hub_id=found.hub_id)
        return opened[name]

    base = [opening(recipe.base_model)] if recipe.base_model is not None and recipe.subtracts_base else []
    return sides_of(recipe, *base, *(opening(source.model) for source in recipe.merged))


def sides_of(recipe: Recipe, *checkpoints: Checkpoint) -> Sides:
    """The inputs in their roles: the base first, if the recipe subtracts one, then the models of `recipe.merged`."""
    has_base = recipe.subtracts_base
    first_model = 1 if has_base else 0
    lead = 0
    if recipe.like == "ft":
        lead = first_model
    return Sides(checkpoints, has_base, lead, recipe.like == "ft" and len(checkpoints) == 2 and has_base)


def make_plan(recipe: Recipe, sides: Sides, output: Path) -> Plan:
    """Decide every byte of the output, as far as it does not depend on the numbers in the inputs.

    Raises:
        MismatchError: names, shapes or dtypes of the inputs do not fit and the recipe does not say what to do.
        DepthError: which tensor stands at which depth cannot be decided.
        RecipeError: a stack or a filter names nothing there, or a coefficient is beyond float32.
    """
    notes: list[str] = list(recipe.notes)
    own = aligned_names(sides, notes)
    rows = pair_tensors(sides, own, recipe, notes)
    depth = _depth(recipe, sides, [name for names in own for name in names], notes)
    rules = (recipe.lines or _UNSCALED).rules(depth)
    drafts = {draft.name: draft for draft in _draft(recipe, sides, depth, rules, rows)}

    files, placed = lay_out_files(
        {name: (draft.dtype, draft.shape) for name, draft in drafts.items()},
        stem=sides.leading.stem,
        one_file=output.name if is_one_file(output) else None,
        max_shard_size=recipe.max_shard_size,
    )
    planned = tuple(
        TensorPlan(
            name,
            number,
            info,
            depth.places.get(name),
            drafts[name].counts_as,
            drafts[name].values,
            math.nan,
            drafts[name].filter,
            drafts[name].pieces,
            drafts[name].paired,
        )
        for name, number, info in placed
    )
    plan = Plan(
        recipe,
        sides,
        tuple(file for checkpoint in sides.checkpoints for file in checkpoint.files),
        output,
        tuple(files),
        planned,
        depth,
        rules,
        _needs(recipe, planned),
        Statistics(),
        (),
        (*notes, *depth.notes),
        dict(draft.rows for draft in drafts.values() if draft.rows),
    )
    return _decided(plan)


def resolve(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with what was measured in it: every coefficient a number, every operation decided.

    Raises:
        RecipeError: a coefficient is beyond float32.
        MismatchError: alpha cannot be measured, because nothing was merged.
    """
    norms = statistics.norms
    if norms is not None and (norms.merged == 0 or not math.isfinite(norms.total / norms.merged)):
        raise MismatchError(
            f"alpha: auto cannot be measured: the merged task vector's L1 norm is {norms.merged:g}, the sum's "
            f"{norms.total:g}",
            hint="Are the models the same as their base? Else give lines.alpha as a number.",
        )
    return _decided(replace(plan, needs=Needs(), statistics=statistics))


def _decided(plan: Plan) -> Plan:
    """The plan with the coefficients that are known, and the operations that follow from them."""
    alpha = None
    if plan.recipe.lines is not None and plan.recipe.lines.needs_alpha and not plan.needs.norms:
        norms = plan.statistics.norms
        alpha = norms.alpha if norms else 1 / len(plan.recipe.merged)  # the merged task vector is the sum
    rules = (plan.recipe.lines or _UNSCALED).rules(plan.depth, alpha=alpha)
    tensors = tuple(_with_coefficient(plan, rules, tensor) for tensor in plan.tensors)
    plan = replace(plan, rules=rules, tensors=tensors)
    return plan if is_one_file(plan.output) else _with_sidecars(plan)


_UNSCALED = Scaling(alpha=1.0, beta=0.0)
"""What the merged task vector is scaled by where the recipe has no `lines:`, lambda apart."""


def _depth(recipe: Recipe, sides: Sides, names: Iterable[str], notes: list[str]) -> DepthMap:
    try:
        layers = recipe.lines.layers if recipe.lines else None
        depth = find_depth(dict.fromkeys(names), config=sides.config_of(sides.lead), layers=layers)
    except DepthError as error:
        if (recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary:
            raise
        notes.append(f"depth is unknown, and makes no difference with one coefficient for all: {error.message}")
        return DepthMap((), {})
    for source in recipe.models:
        if source.layer_range and all(source.layer_range != (0, stack.layers) for stack in depth.stacks):
            there = " and ".join(f"{stack.name} of {stack.layers}" for stack in depth.stacks)
            raise RecipeError(
                f"layer_range {list(source.layer_range)} of {source.model} is not a whole stack; there is {there}",
                hint="lines merges whole models; it does not stack parts of them.",
            )
    return depth


def _needs(recipe: Recipe, tensors: Sequence[TensorPlan]) -> Needs:
    method = recipe.method
    values = list({id(tensor.values): tensor.values for tensor in tensors if tensor.edited}.values())
    drops = any(density != 1 for v in values for density in v.get("density", ()))
    auto = recipe.lines is not None and recipe.lines.needs_alpha
    plain_sum = method.sums and all(not v["normalize"] and set(v["weight"]) == {1} for v in values)
    return Needs(
        thresholds=method.masks == "magnitude" and drops,
        l1=method.masks == "random" and drops and any(v["rescale"] == "l1" for v in values),
        products=recipe.merge_method == "slerp",
        majority=len(recipe.merged) > 1 and any(method.elects(v) for v in values),
        norms=auto and not plain_sum and bool(values),
    )


# --- what each output tensor is made of ---


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output tensor before its place in a file is known; `misfit` says why it cannot be made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...] = ()
    rows: tuple[int, int] | None = None  # numbers of vocabulary rows, where they differ: another side's, the kept
    counts_as: str = ""
    values: Values = field(default_factory=dict)
    filter: str | None = None
    paired: bool = True
    misfit: str | None = None


def _draft(recipe: Recipe, sides: Sides, depth: DepthMap, rules: Rules, rows: Mapping[str, Names]) -> list[_Draft]:
    """What makes each output tensor.

    Raises:
        MismatchError: shapes or dtypes differ and the recipe does not say what to do; names them all.
        RecipeError: a filter matches no tensor.
    """
    for pattern in (*(pattern for pattern, _ in rules.filters), *sorted(recipe.filters)):
        if pattern != "*" and not any(pattern in name for name in rows):
            raise RecipeError(f"filter {pattern!r} matches none of {len(rows):,} tensor names")
    first_files = [0]
    for checkpoint in sides.checkpoints:
        first_files.append(first_files[-1] + len(checkpoint.files))
    config = sides.config_of(sides.lead)
    values_for = _Values(recipe, depth)

    drafts = []
    for name, row in rows.items():
        place = depth.places.get(name)
        # A head that is tied to its embedding is one weight with it, and has one coefficient.
        embedding = tied_embedding(name, sides.leading, config) if place is None else None
        counts_as = name if embedding is None else embedding
        stored = [
            _slice(checkpoint, there, first) if there is not None else None
            for checkpoint, there, first in zip(sides.checkpoints, row, first_files, strict=False)
        ]
        draft = _draft_one(recipe, sides, name, stored, may_resize=place is None and is_vocabulary(name))
        decided_by = rules.filter_of(counts_as) if None not in row else None
        drafts.append(replace(draft, filter=decided_by, counts_as=counts_as, values=values_for(counts_as)))
    misfits = [f"{printable(draft.name)}: {draft.misfit}" for draft in drafts if draft.misfit]
    if misfits:
        between = " and ".join(checkpoint.name for checkpoint in sides.checkpoints)
        said = "--resize ft or --resize base" if sides.of_an_edit else "resize: base or resize: ft in the recipe"
        raise MismatchError(
            f"{len(misfits):,} tensor(s) do not fit between {between} "
            f"({'base first' if sides.has_base else 'in that order'}):\n{some(misfits)}",
            hint=f"Rows of token embeddings and their heads can be settled with {said}; "
            "any other difference means that the fine-tune is of another model, or its module was replaced.",
        )
    return drafts


class _Values:
    """The method's parameters by tensor; tensors for which they are the same share one value."""

    def __init__(self, recipe: Recipe, depth: DepthMap) -> None:
        self._recipe, self._depth, self._filters = recipe, depth, sorted(recipe.filters)
        self._known: dict[tuple[float, tuple[bool, ...]], Values] = {}

    def __call__(self, name: str) -> Values:
        place, position = self._depth.places.get(name), 0.0
        if place is not None:
            last = self._depth.layers[place.stack] - 1
            position = place.index / last if last else 1.0
        key = (position, tuple(part in name for part in self._filters))
        if key not in self._known:
            self._known[key] = self._recipe.values(name, position)
        return self._known[key]


def _slice(side: Checkpoint, name: str, first_file: int) -> tuple[Slice, TensorInfo]:
    stored = side.tensors[name]
    return Slice(first_file + stored.file, stored.info.offset, stored.info.dtype), stored.info


def _draft_one(
    recipe: Recipe, sides: Sides, name: str, stored: Sequence[tuple[Slice, TensorInfo] | None], *, may_resize: bool
) -> _Draft:
    def dtype(stored: str) -> str:
        return _STORED[recipe.dtype] if recipe.dtype and stored not in EXACT_DTYPES else stored

    present = [side for side in stored if side is not None]
    if len(present) < len(stored):  # not merged: as it is in the first that has it
        source, info = present[0]
        return _Draft(name, dtype(info.dtype), info.shape, (Piece(0, info.numel, copy=source),), paired=False)
    slices, infos = [source for source, _ in present], [info for _, info in present]
    lead = infos[sides.lead]
    draft = _Draft(name, dtype(lead.dtype), lead.shape)
    base, models = (slices[0], slices[1:]) if sides.has_base else (None, slices)

    dtypes = list(dict.fromkeys(info.dtype for info in infos))
    if len(dtypes) > 1 and EXACT_DTYPES.intersection(dtypes):
        return replace(draft, misfit=f"{' and '.join(dtypes)}, of which one cannot be computed with")
    if len({info.shape for info in infos}) == 1:
        return replace(draft, pieces=(Piece(0, lead.numel, base=base, models=tuple(models)),))

    shapes = " and ".join(str(list(info.shape)) for info in infos)
    axis = _row_axis([info.shape for info in infos]) if may_resize else None
    if axis is None:
        return replace(draft, misfit=shapes)
    if recipe.resize == "error":
        return replace(draft, misfit=f"{shapes}, which {'--resize' if sides.of_an_edit else 'resize:'} would settle")
    keeping = 0 if recipe.resize == "base" else len(slices) - len(models)
    kept, source = infos[keeping], slices[keeping]
    shared = min(info.numel for info in infos)
    pieces = [Piece(0, shared, base=base, models=tuple(models))]
    if kept.numel > shared:  # rows that only the kept side surely has: as they are there
        rest = replace(source, offset=source.offset + shared * itemsize(source.dtype))
        pieces.append(Piece(shared, kept.numel - shared, copy=rest))
    other = next(info.shape[axis] for info in infos if info.shape != kept.shape)
    return replace(draft, shape=kept.shape, pieces=tuple(pieces), rows=(other, kept.shape[axis]))


def _row_axis(shapes: Sequence[tuple[int, ...]]) -> int | None:
    """The one axis on which shapes differ, if only ones stand before it: then rows are runs of entries."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    differing = [axis for axis, sizes in enumerate(zip(*shapes, strict=True)) if len(set(sizes)) > 1]
    return differing[0] if len(differing) == 1 and all(n == 1 for n in shapes[0][: differing[0]]) else None


def _with_coefficient(plan: Plan, rules: Rules, tensor: TensorPlan) -> TensorPlan:
    """The tensor with its coefficient, and with the copies that follow from it."""
    if not tensor.paired:
        return replace(tensor, coefficient=0.0 if _is_of_base(plan, tensor) else 1.0)
    scale = tensor.values.get("lambda", 1.0)
    coefficient = rules.coefficient(tensor.counts_as, plan.depth, scale=scale)
    if not math.isnan(coefficient) and not math.isfinite(to_float32(coefficient)):
        raise RecipeError(
            f"the coefficient of {printable(tensor.name)} is {coefficient:g}, beyond what float32 can hold",
            hint="Coefficients usually lie between 0 and 2.",
        )
    rounded = coefficient if tensor.in_float64 else to_float32(coefficient)
    pieces = tuple(_decide(plan, tensor, piece, rounded) for piece in tensor.pieces)
    return replace(tensor, coefficient=coefficient, pieces=pieces)


def _is_of_base(plan: Plan, tensor: TensorPlan) -> bool:
    files_of_base = len(plan.sides.checkpoints[0].files) if plan.sides.has_base else 0
    return all(source.file < files_of_base for piece in tensor.pieces for source in piece.sources)


def _decide(plan: Plan, tensor: TensorPlan, piece: Piece, coefficient: float) -> Piece:
    """What is done for entries that all inputs have. Where it comes to what one of them holds they are a copy; the
    formula is not exact there.

    Integers and booleans have no task vector: they are those of the input that the output is like, and of the base
    where the coefficient is 0. In a merge the others are compared.
    """
    if piece.copy is not None:
        return piece
    slices = (*((piece.base,) if piece.base else ()), *piece.models)
    if slices[0].dtype in EXACT_DTYPES:
        copied = piece.base if coefficient == 0 and piece.base else slices[plan.sides.lead]
        others = () if plan.sides.of_an_edit else tuple(source for source in slices if source is not copied)
        return Piece(piece.start, piece.numel, copy=copied, compare=others)
    if plan.needs:  # measured is what the inputs hold, whatever becomes of it
        return piece
    if piece.base is not None and coefficient == 0:
        return Piece(piece.start, piece.numel, copy=piece.base)
    if (piece.base is None or coefficient == 1) and _is_alone(plan, tensor):
        return Piece(piece.start, piece.numel, copy=piece.models[0])
    return piece


def _is_alone(plan: Plan, tensor: TensorPlan) -> bool:
    """Whether merging gives the one model there is as it is."""
    values = tensor.values
    nothing_done = all(share == 1 for key in ("weight", "density") for share in values.get(key, ()))
    return (
        len(plan.recipe.merged) == 1
        and plan.recipe.method.alone_is_itself
        and nothing_done
        and (values.get("scale") in (None, (None,), (1.0,)))
    )


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even; beyond its range, infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


# --- what stands beside the weights ---


def _with_sidecars(plan: Plan) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the index comes last, so that it is
    written last.
    """
    recipe, sides = plan.recipe, plan.sides
    by_name = dict(zip((source.model for source in recipe.merged), sides.models, strict=True))
    if recipe.base_model is not None and sides.has_base:
        by_name[recipe.base_model] = sides.checkpoints[0]

    def named_source(name: str | None) -> Checkpoint | None:
        return by_name[str(recipe.base_model) if name == "base" else name] if name is not None else None

    first_model = 1 if sides.has_base else 0
    keeping = 0 if recipe.resize == "base" else first_model
    tokenizer = named_source(recipe.tokenizer_source)
    if tokenizer is not None and plan.rows.keys() & _vocabularies(tokenizer):
        raise RecipeError(
            f"tokenizer_source: {tokenizer.name} has {next(iter(plan.rows.keys() & _vocabularies(tokenizer))):,} rows of "
            f"token embeddings, and resize: {recipe.resize} keeps {next(iter(plan.rows.values())):,}",
            hint="Take the tokenizer of the input whose rows are kept.",
        )
    carried, notes = carry_over(
        [sides.leading, *(c for number, c in enumerate(sides.checkpoints) if number != sides.lead)],
        called=[sides.called(sides.lead), *(sides.called(n) for n in range(len(sides.checkpoints)) if n != sides.lead)],
        dtype=recipe.dtype,
        stored=_most_common_dtype(plan),
        rows=plan.rows,
        rows_of=sides.checkpoints[keeping],
        tokenizer=tokenizer,
        chat_template=named_source(recipe.chat_template),
    )
    named = {name: _seen_from(plan.output, checkpoint) for name, checkpoint in by_name.items()}
    norms = plan.statistics.norms
    why = f"(1/{norms.models}) * {norms.total!r} / {norms.merged!r}" if norms else f"1/{len(recipe.merged)}"
    text = dump_recipe(recipe, named=named, alpha=plan.alpha, why=why)
    card = model_card(
        Card(
            title=os.path.basename(os.path.abspath(plan.output)),
            method=recipe.merge_method,
            about=recipe.method.about,
            base=sides.checkpoints[0] if sides.has_base else None,
            models=sides.models,
            like=sides.leading,
            scaled=recipe.lines is not None,
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.rules.filters,
        )
    )
    sidecars = [*carried, card, Sidecar(RECIPE, content=text.encode())]
    if len(plan.outputs) > 1:
        weight_map = {tensor.name: plan.outputs[tensor.file].name for tensor in plan.tensors}
        nbytes = sum(tensor.info.nbytes for tensor in plan.tensors)
        sidecars.append(index_file(sides.leading.stem, weight_map, nbytes=nbytes, parameters=plan.parameters))
    return replace(plan, sidecars=tuple(sidecars), notes=tuple(dict.fromkeys((*plan.notes, *notes))))


def _vocabularies(checkpoint: Checkpoint) -> set[int]:
    """How many rows its token embeddings and heads have."""
    return {n for name, stored in checkpoint.tensors.items() if is_vocabulary(name) for n in stored.info.shape[:1]}


def _most_common_dtype(plan: Plan) -> str | None:
    """What most of the output's float entries are stored as, as configs name it."""
    names = {stored: name for name, stored in _STORED.items()}
    entries = Counter[str]()
    for tensor in plan.tensors:
        if tensor.info.dtype in names:
            entries[names[tensor.info.dtype]] += tensor.info.numel
    return entries.most_common(1)[0][0] if entries else None


def _seen_from(folder: Path, checkpoint: Checkpoint) -> str:
    """How a recipe in `folder` names an input: a relative path stays relative, so that inputs and output can
    move together.
    """
    if checkpoint.hub_id:
        return checkpoint.hub_id
    if checkpoint.path.is_absolute():
        return str(checkpoint.path)
    return os.path.relpath(os.path.abspath(checkpoint.path), os.path.realpath(folder))
