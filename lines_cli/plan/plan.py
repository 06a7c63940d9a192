"""The plan of a run: every tensor's sources, coefficient and place in the output, to the byte.

A plan is a value: it can be printed (`--dry-run`), compared, and cut by output file. Nothing here reads tensor data or
needs torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from lines_cli.checkpoint.header import Part, TensorInfo, itemsize
from lines_cli.checkpoint.reader import FileState, views_of
from lines_cli.checkpoint.sidecars import Sidecar
from lines_cli.methods import ByMagnitude, Drawn, Measured, Values
from lines_cli.methods.sparsify import Bounds
from lines_cli.plan.coefficients import known, layer_coefficients, outside_coefficients, scale_at
from lines_cli.plan.components import Share
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.layout import OutputFile
from lines_cli.plan.resources import TURNED_AT_ONCE, TURNING, WORTH_LOADING, BytesPerEntry, Resources
from lines_cli.plan.statistics import NOTHING_MEASURED, Needs, Statistics
from lines_cli.plan.tensors import STORED, Segment, SourceRange, TensorSpec
from lines_cli.plan.vocabulary import Vocabulary
from lines_cli.plan.vocabulary import report as vocabulary_report
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.depth_rules import find_rule
from lines_cli.scaling.find_depth import DepthMap, Place
from lines_cli.scaling.schedule import Rules
from lines_cli.storage.names import natural
from lines_cli.storage.uploads import memory_on_the_way
from lines_cli.storage.views import Views


class TensorPlan(NamedTuple):
    """One output tensor: what it is, where it goes, what makes it.

    Attributes:
        spec: its name, parameters, and sources, before anything was measured.
        file: the output file (a number into `Plan.outputs`).
        info: dtype, shape, offset in that file, bytes.
        place: its stack and layer; None outside the blocks.
        coefficient: in float64, before rounding to the compute dtype; NaN until what it depends on has been measured.
        segments: what it is made of, now that the coefficient is known.
    """

    spec: TensorSpec
    file: int
    info: TensorInfo
    place: Place | None
    coefficient: float
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        """The output's name for it."""
        return self.spec.name

    @property
    def values(self) -> Values:
        """The method's parameters for it."""
        return self.spec.values

    @property
    def in_float64(self) -> bool:
        """Whether its arithmetic runs in float64, because an input does; else in float32."""
        return self.spec.in_float64

    def shape_of(self, segment: Segment) -> tuple[int, ...]:
        """The shape of a segment: the tensor's, or that of its first rows where only these are merged."""
        shape = self.info.shape
        if segment.numel == self.info.numel:
            return tuple(shape)
        axis = next(axis for axis, size in enumerate(shape) if size != 1)
        return (*shape[:axis], segment.numel // math.prod(shape[axis + 1 :]), *shape[axis + 1 :])

    @property
    def as_stored(self) -> SourceRange | None:
        """Where codes and scales are copied from, if an input stores the tensor as it is to be stored."""
        return self.spec.as_stored(self.segments)

    @property
    def edited(self) -> bool:
        """Whether any entry is computed; otherwise all are copied (or cast)."""
        return any(segment.models for segment in self.segments)


@dataclass(frozen=True)
class Plan:
    """Everything about a run but the numbers in the tensors.

    Attributes:
        recipe: what was asked.
        inputs: the opened inputs.
        paths: every file that is read: the base's, then the models'.
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
        shares: of inputs that hold several models, what becomes of each.
        vocabulary: the output's tokens, where rows are paired by them.
    """

    recipe: Recipe
    inputs: Inputs
    paths: tuple[Path, ...]
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
    shares: tuple[Share, ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def views(self) -> list[Views]:
        """The views in each of `paths`."""
        return views_of(self.inputs.checkpoints)

    @property
    def read_paths(self) -> tuple[Path, ...]:
        """Everything the output must not replace: the inputs as they were named, and all their files."""
        named = [
            part
            for checkpoint in self.inputs.checkpoints
            for part in checkpoint.parts or checkpoint.stacked or (checkpoint,)
        ]
        return (*(checkpoint.path for checkpoint in named), *self.paths)

    @property
    def names(self) -> frozenset[str]:
        """Every file that is written, by its name relative to the destination."""
        return frozenset((*(file.name for file in self.outputs), *(sidecar.name for sidecar in self.sidecars)))

    @property
    def states(self) -> tuple[FileState, ...]:
        """The state that each of `paths` was in when it was planned with."""
        return tuple(state for checkpoint in self.inputs.checkpoints for state in checkpoint.states)

    @property
    def alpha(self) -> float | None:
        """The first coefficient of the schedule; None where there is none, or it is yet to be measured."""
        if self.recipe.lines is None or isinstance(self.recipe.lines.schedule, tuple):
            return None
        return known(self.rules.schedule.first)

    @property
    def passes(self) -> tuple[str, ...]:
        """What is measured, pass by pass over everything that is merged. A pass for thresholds has to be made again
        where the sample that said where to look was no good one.
        """
        needs = self.needs
        found = [WEIGHTS] if needs.weights else []
        found += [THRESHOLDS] if needs.thresholds else []
        found += [L1_NORMS] if needs.l1 else []
        found += [SUMS] if needs.sums else []
        found += [" and ".join(words) for words in self.elections]
        found += [pass_of_rule(rule) for rule in needs.scores]
        return (*found, *((SCALES,) if self.to_quantise else ()))

    @property
    def elections(self) -> tuple[tuple[str, ...], ...]:
        """The passes that measure signs and norms, and what each finds: both together, for single entries depend on the
        majority; one after the other where what is merged is calibrated, and whole matrices depend on it.
        """
        needed = (("signs", self.needs.majority), ("norms", self.needs.norms))
        last = tuple(word for word, needs in needed if needs)
        if self.recipe.calibrate is not None:
            return tuple((word,) for word in last)
        return (last,) if last else ()

    @property
    def merged_by_name(self) -> list[TensorPlan]:
        """What is merged, in the order of names in which it is measured."""
        return sorted((tensor for tensor in self.tensors if tensor.edited), key=lambda tensor: natural(tensor.name))

    @cached_property
    def in_blocks(self) -> tuple[TensorPlan, ...]:
        """The matrices inside blocks that are merged: what depth rules measure."""
        return tuple(t for t in self.tensors if t.place is not None and len(t.info.shape) > 1 and t.edited)

    @cached_property
    def to_quantise(self) -> tuple[TensorPlan, ...]:
        """The tensors whose scales are still to be measured, for they are stored in 8 bits."""
        return tuple(
            tensor
            for tensor in self.tensors
            if tensor.spec.quantised is not None
            and tensor.info.numel
            and tensor.as_stored is None
            and tensor.name not in self.statistics.scales
        )

    def measured_with(self, tensor: TensorPlan) -> str | None:
        """What names the thresholds that a tensor shares with others (`Statistics.thresholds`): None for one model."""
        component = self.depth.component_of(tensor.name)
        return None if component is None else f"all of {component}"

    @property
    def trims_globally(self) -> bool:
        """Whether there is one threshold for all of a model's tensors."""
        return any(self._of_model(tensor) for tensor in self.tensors if tensor.edited)

    def _of_model(self, tensor: TensorPlan) -> bool:
        """Whether the thresholds for a tensor are those of the whole model."""
        sparsifier = self.recipe.method.sparsifier
        return isinstance(sparsifier, ByMagnitude) and sparsifier.of_model(tensor.values)

    @cached_property
    def number_of_models(self) -> int:
        """N: how many models are merged."""
        return len(self.recipe.merged)

    def gives_one(self, values: Values) -> bool:
        """Whether merging with a tensor's values gives the one model there is as it is."""
        return self.number_of_models == 1 and self.recipe.method.one_is_itself(values)

    def calibrated(self, tensor: TensorPlan, segment: Segment) -> bool:
        """Whether what is merged in a segment is calibrated."""
        calibration = self.recipe.calibration
        if calibration is None or not segment.models or self.gives_one(tensor.values):
            return False
        return calibration.changes(tensor.shape_of(segment))

    def merges_whole(self, tensor: TensorPlan, segment: Segment) -> bool:
        """Whether all of a segment has to be there to merge any of it."""
        whole = self.recipe.method.sees_whole(tensor.values)
        return bool(segment.models) and (whole or self.calibrated(tensor, segment))

    def keywords(self, tensor: TensorPlan, *, majority: int | None = None) -> Values:
        """The keywords of the method's function for a tensor.

        Args:
            tensor: which.
            majority: the sign of the majority, in place of the one that was measured.
        """
        measured = self.measured(tensor)
        if majority is not None:
            measured = replace(measured, majority=majority)
        return self.recipe.method.keywords(tensor.values, measured)

    def measured(self, tensor: TensorPlan) -> Measured:
        """What was measured for a tensor's merge."""
        found, name = self.statistics, tensor.name
        if found is NOTHING_MEASURED:
            return Measured()
        thresholds: tuple[Bounds, ...] = ()
        if found.thresholds:
            whole = self.measured_with(tensor) if self._of_model(tensor) else name
            thresholds = tuple(found.thresholds.get((model, whole), ()) for model in range(self.number_of_models))
        return Measured(thresholds, found.majority, found.l1.get(name, ()), found.sums.get(name, ()))

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read from the inputs by the last pass, the one that writes."""
        return bytes_of(segment for tensor in self.tensors for segment in tensor.segments)

    @property
    def bytes_measured(self) -> int:
        """Bytes of tensor data that one measuring pass reads, but for that of the scales."""
        return bytes_of(segment for tensor in self.tensors for segment in tensor.segments if segment.models)

    def bytes_of_pass(self, what: str) -> int:
        """Bytes of tensor data that one of the `passes` reads."""
        if what == SCALES:
            return bytes_of(segment for tensor in self.to_quantise for segment in tensor.segments)
        if what in map(pass_of_rule, self.needs.scores):
            return bytes_of(segment for tensor in self.in_blocks for segment in tensor.segments if segment.models)
        return self.bytes_measured

    @cached_property
    def per_entry(self) -> BytesPerEntry:
        """What one entry takes of a worker's buffers."""
        models = self.number_of_models
        stored, written = self.widths
        method = self.recipe.method
        temporaries = 0 if models == 1 else method.temporaries
        temporaries += models if isinstance(method.sparsifier, Drawn) else 0
        temporaries += 1  # the scaled task vector: what it was is compared with what is written
        temporaries += 5 if self.recipe.rounding == "stochastic" else 0
        temporaries += 4 if self.recipe.dtype == "fp8" else 0  # magnitudes; what it was, divided, and its loss
        temporaries += 2 * models + 1 if self.needs.thresholds else 0  # how far magnitudes are from a window
        temporaries += 2 * models + 4 if self.needs.sums else 0  # all in float64, a product, and its blocks
        width = 8 if self.in_float64 else 4
        return BytesPerEntry(stored, written, width, models + 1, temporaries, self.formula_bytes)

    def buffer_bytes(self, resources: Resources) -> int:
        """Bytes of the workers' buffers on the CPU: an input and the output as they are stored, and what the arithmetic
        needs.
        """
        models = self.number_of_models
        counts = models * BYTES_COUNTING if self.needs.thresholds else 0
        buffers = resources.threads * (resources.chunk_for(self.per_entry) * self.per_entry.nbytes() + counts)
        return buffers + self.whole_bytes(resources.threads) + self.turned_bytes(resources.threads)

    @cached_property
    def formula_bytes(self) -> int:
        """Bytes that a thread holds at most of what makes a tensor of its input's factors."""
        sources = (
            {step for segment in tensor.segments for source in segment.sources for step in source.steps}
            for tensor in self.tensors
        )
        return max((sum(step.held for step in steps) for steps in sources), default=0)

    def whole_bytes(self, workers: int) -> int:
        """Bytes that is held at most of whole tensors: of the factors that make tensors of inputs; and where the method
        sees tensors whole each worker makes one, the largest there are, from all models' and in what space the method
        needs, and as many results are kept; and likewise where a depth rule does that is to be measured.
        """
        held = workers * self.formula_bytes
        rules = [rule for name in self.needs.scores if (rule := find_rule(name)).sees == "tensors"]
        each = [
            2 * tensor.info.numel * (8 if tensor.in_float64 else 4)
            + max(rule.workspace(tensor.info.shape) for rule in rules)
            for tensor in (self.in_blocks if rules else ())
        ]
        held += sum(sorted(each, reverse=True)[:workers])
        each = [
            self._bytes_of_whole(tensor, segment)
            for tensor in self.tensors
            for segment in tensor.segments
            if self.merges_whole(tensor, segment)
        ]
        return held + sum(sorted(each, reverse=True)[:workers])

    def _bytes_of_whole(self, tensor: TensorPlan, segment: Segment) -> int:
        """Bytes that it takes to merge a segment as a whole, and to keep what becomes of it."""
        method, calibration = self.recipe.method, self.recipe.calibration
        shape, wide, models = tensor.shape_of(segment), tensor.in_float64, self.number_of_models
        entries, needed = segment.numel * (8 if wide else 4), models + 2
        whole = method.sees_whole(tensor.values)
        merging = method.space_for(shape, in_float64=wide) if whole else method.temporaries * entries
        calibrating = 0
        if calibration is not None and self.calibrated(tensor, segment):
            needed += models  # what they hold, once more
            calibrating = calibration.workspace(shape, wide)
        needed += method.given_base or (calibrating > 0 and method.takes == "weights")
        return entries * needed + max(merging, calibrating)

    @cached_property
    def turned_sides(self) -> int:
        """How many inputs of a tensor, at most, store its matrices the other way round."""
        return max((len(sources) for sources in self._turned), default=0)

    def turned_bytes(self, workers: int) -> int:
        """Bytes that matrices take at most which are read the other way round than they are stored: some are kept, and
        each worker may be turning one.
        """
        sizes = [itemsize(source.dtype) * part.numel for sources in self._turned for source, part in sources]
        largest = min(max(sizes, default=0), TURNED_AT_ONCE)
        return largest * (self.turned_sides * (workers + 1) + TURNING * workers)

    @cached_property
    def _turned(self) -> list[list[tuple[SourceRange, Part]]]:
        """For each segment that is read so, such a source, and its largest part that is."""
        if not any(self.inputs.relaid):
            return []
        found = []
        for tensor in self.tensors:
            for segment in tensor.segments:
                parts = [(source, [part for part in source.parts if len(part.sizes) > 1]) for source in segment.sources]
                found.append([(source, max(of_it, key=lambda part: part.numel)) for source, of_it in parts if of_it])
        return [sources for sources in found if sources]

    @cached_property
    def in_float64(self) -> bool:
        """Whether any of its arithmetic runs in float64."""
        return any(tensor.in_float64 for tensor in self.tensors)

    @cached_property
    def widths(self) -> tuple[int, int]:
        """Bytes of the widest entry that is read, and of the widest that is written."""
        read = {itemsize(source.dtype) for t in self.tensors for p in t.segments for source in p.sources}
        return max(read, default=0), max((itemsize(tensor.info.dtype) for tensor in self.tensors), default=0)

    @cached_property
    def fused_entries(self) -> int:
        """How many entries compiled kernels would go over, counted for each model and pass; 0 where they have none to
        go over.
        """
        if not (self.needs.thresholds or self.recipe.method.fused):
            return 0
        tensors = (tensor for tensor in self.tensors if not tensor.in_float64)
        entries = sum(segment.numel * len(segment.models) for tensor in tensors for segment in tensor.segments)
        return entries * (len(self.passes) + 1)

    def peak_memory(self, resources: Resources) -> int:
        """About how much resident memory a run takes at most, in bytes, on the CPU.

        Python with torch imported (measured with torch's CPU build), kernels if a run loads them (the same), the plan
        (measured, per tensor), the buffers.
        """
        scales = sum(tensor.info.numel for tensor in self.tensors if tensor.spec.scales_of)
        second = _OF_A_PASS + 8 * scales if self.to_quantise else 0  # found in float32, and as they are stored
        if self.fused_entries >= WORTH_LOADING and find_spec("numba") is not None:
            second += _KERNELS
        own = _PYTHON_WITH_TORCH + _PER_TENSOR * len(self.tensors) + self.buffer_bytes(resources) + second
        return own + memory_on_the_way(self.output, [file.nbytes for file in self.outputs])

    @cached_property
    def dtype(self) -> str | None:
        """What most of the output's float entries are stored as, as configs name it."""
        names = {stored: name for name, stored in STORED.items()}
        dtypes = {tensor.info.dtype for tensor in self.tensors}
        if len(dtypes) == 1:  # mostly
            return names.get(*dtypes)
        entries = Counter[str]()
        for tensor in self.tensors:
            if tensor.info.dtype in names:
                entries[names[tensor.info.dtype]] += tensor.info.numel
        return entries.most_common(1)[0][0] if entries else None

    @property
    def bytes_written(self) -> int:
        """Bytes of the output's weight files."""
        return sum(file.nbytes for file in self.outputs)

    def coefficients(self) -> list[tuple[str, list[float]]]:
        """Each stack's name, and the coefficient of each of its layers (filters apart)."""
        return layer_coefficients(self.recipe, self.rules, self.depth)

    def outside(self, component: str | None = None) -> tuple[float, float]:
        """The coefficients outside the blocks, before and behind them (filters apart); or those of one component."""
        return outside_coefficients(self.recipe, self.rules, component)

    @cached_property
    def taken_whole(self) -> frozenset[str]:
        """The tensors of components that are taken as one input has them."""
        whole = {share.name for share in self.shares if share.side is not None}
        if not whole:
            return frozenset()
        return frozenset(t.name for t in self.tensors if self.depth.component_of(t.name) in whole)

    def filters(self) -> list[tuple[str, float]]:
        """The patterns that fix coefficients, and the coefficient of each."""
        scale = scale_at(self.recipe, 0.0)
        return [(pattern, scale * value) for pattern, value in self.rules.filters]

    @property
    def of_model(self) -> Iterator[TensorPlan]:
        """The tensors of the model: without those that only say how weights are stored."""
        return (tensor for tensor in self.tensors if not tensor.spec.of_format)

    @property
    def parameters(self) -> int:
        """Entries of all output tensors."""
        return sum(tensor.info.numel for tensor in self.of_model)

    def map(self) -> list[dict[str, Any]]:
        """Every output tensor's stack (None outside the blocks), layer and coefficient, as plain values."""
        return [
            {
                "name": tensor.name,
                "stack": tensor.place.stack if tensor.place else None,
                "index": tensor.place.index if tensor.place else None,
                "coefficient": known(tensor.coefficient),
            }
            for tensor in self.of_model
        ]

    def models(self) -> list[dict[str, Any]]:
        """Every merged model's name, the span of each parameter that models have, and the share of entries kept."""
        per_model = [key for key, known in self.recipe.method.parameters.items() if known.per_model]
        kept = self.statistics.kept
        return [
            {
                "model": source.model,
                **{key: self._span([values[key][model] for values in self._values]) for key in per_model},
                "kept": kept[model][0] / kept[model][1] if kept and kept[model][1] else None,
                "norm": None,
            }
            for model, source in enumerate(self.recipe.merged)
        ]

    def settings(self) -> dict[str, Any]:
        """The method's parameters that are said of all models, those that the recipe says: a value, or its span."""
        said = [key for key in self.recipe.method.parameters if key in self.recipe.parameters]
        values = {key: [values[key] for values in self._values] for key in said}
        spans = {key: self._span(found) for key, found in values.items() if not isinstance(found[0], tuple)}
        return {key: span[0] if span and span[0] == span[-1] else span for key, span in spans.items()}

    @cached_property
    def _values(self) -> list[Values]:
        """The different parameters that tensors have."""
        paired = (tensor.spec for tensor in self.tensors if tensor.spec.paired)
        return list({id(spec.values): spec.values for spec in paired}.values()) or [self.recipe.values("", 0.0)]

    @staticmethod
    def _span(values: list[Any]) -> list[Any] | None:
        """The least and the greatest; where there are words and flags among them, each that there is."""
        known_values = [value for value in values if value is not None]
        if not known_values:
            return None
        if any(isinstance(value, (str, bool)) for value in known_values):
            return list(dict.fromkeys(known_values))
        return [min(known_values), max(known_values)]

    def summary(self) -> dict[str, Any]:
        """The plan in numbers, as plain values that JSON can hold (docs/json.md describes them)."""

        def counts(tensors: Iterable[TensorPlan]) -> dict[str, int]:
            numels = [tensor.info.numel for tensor in tensors]
            return {"tensors": len(numels), "parameters": sum(numels)}

        by_stack: dict[str | None, list[TensorPlan]] = defaultdict(list)
        for tensor in self.of_model:
            if tensor.name not in self.taken_whole:
                by_stack[tensor.place.stack if tensor.place else None].append(tensor)
        by_component: dict[str | None, list[TensorPlan]] = defaultdict(list)
        for tensor in self.tensors if self.shares else ():
            by_component[self.depth.component_of(tensor.name)].append(tensor)
        norms = self.statistics.norms
        return {
            "output": str(self.output),
            "files": [file.name for file in self.outputs],
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "models": self.models(),
            "parameters": self.settings(),
            "alpha": self.alpha,
            "norms": {"sum": norms.total, "merged": norms.merged} if norms else None,
            "stacks": [
                {
                    "name": name,
                    "layers": len(values),
                    "first": known(values[0]),
                    "last": known(values[-1]),
                    "coefficients": [known(value) for value in values],
                    **counts(by_stack[name]),
                }
                for name, values in self.coefficients()
            ],
            "outside": {
                **dict(zip(("first", "last"), map(known, self.outside()), strict=True)),
                **counts(by_stack[None]),
            },
            "components": [
                {
                    "name": share.name,
                    "folder": share.component.folder,
                    "as": None if share.side is None else self.inputs.checkpoints[share.side].name,
                    "stacks": [stack.name for stack in self.depth.stacks if stack.component == share.name],
                    "outside": {
                        **dict(zip(("first", "last"), map(known, self.outside(share.name)), strict=True)),
                        **counts(t for t in by_component[share.name] if t.place is None),
                    }
                    if share.side is None
                    else None,
                    **counts(by_component[share.name]),
                }
                for share in self.shares
            ],
            "filters": [
                {
                    "pattern": pattern,
                    "coefficient": value,
                    **counts(t for t in self.tensors if t.spec.filter == pattern),
                }
                for pattern, value in self.filters()
            ],
            "vocabulary": vocabulary_report(self.vocabulary, self.inputs),
            "edited": counts(tensor for tensor in self.of_model if tensor.edited),
            "copied": counts(tensor for tensor in self.of_model if not tensor.edited),
            "bytes": {"read": self.bytes_read, "written": self.bytes_written},
            "passes": [{"measures": what, "bytes": self.bytes_of_pass(what)} for what in self.passes],
            "notes": list(self.notes),
        }


def bytes_of(segments: Iterable[Segment]) -> int:
    """Of what is stored; what an adapter's entries are made of is read once, with the base's."""
    total = 0
    for segment in segments:
        ranges = {source[:3] for source in segment.sources} if len(segment.sources) > 1 else segment.sources
        total += segment.numel * sum(itemsize(source[2]) for source in ranges)
    return total


def pass_of_rule(rule: str) -> str:
    """What the pass measures that a depth rule asks for, by its name."""
    return f"{rule} scores"


WEIGHTS = "weights"
"""What the pass measures that finds how large task vectors are."""
THRESHOLDS, L1_NORMS, SUMS = "thresholds", "L1 norms", "sums"
"""What other passes measure."""


SCALES = "FP8 scales"
"""What the pass measures that finds the scales of an output in FP8."""

BYTES_COUNTING = 6 * 2**20
"""What a worker takes for each model whose magnitudes it counts."""

_PYTHON_WITH_TORCH = 250_000_000  # resident, with all that lines imports
_KERNELS = 120_000_000  # numba, and what it loads of LLVM
_OF_A_PASS = 24_000_000  # of the pass that finds scales, which the C library keeps
_PER_TENSOR = 3_000
