"""Recipe and headers in, Plan out: every tensor's sources, coefficient and place in the output, to the byte.

All that can be refused before the first tensor is read is refused here. A plan is a value: it can be printed
(`--dry-run`), compared, and cut by output file. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.header import EXACT_DTYPES, TensorInfo, canonical_order, itemsize, lay_out
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint
from lines_cli.checkpoint.sidecars import RECIPE, Sidecar, carry_over, index_file, model_card
from lines_cli.checkpoint.writer import is_one_file
from lines_cli.depth import DepthMap, Place, find_depth
from lines_cli.errors import DepthError, MismatchError, RecipeError, printable, some
from lines_cli.hub import locate
from lines_cli.pairing import Pair, is_vocabulary, names_in_base, pair_tensors, tied_embedding
from lines_cli.recipe import Recipe, dump_recipe
from lines_cli.schedule import Rules

FILE_METADATA = {"format": "pt"}

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

    With both sources the entries are `base + coefficient * (ft - base)`; with one they are that source's, cast to
    the output dtype.

    Attributes:
        start: the first entry, within the output tensor.
        numel: how many.
        base, ft: where the entries come from.
        coefficient: rounded to the dtype that the arithmetic runs in; never 0 or 1 with two sources, since those
            are copies.
    """

    start: int
    numel: int
    base: Slice | None
    ft: Slice | None
    coefficient: float


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One output tensor: what it is, where it goes, what makes it.

    Attributes:
        file: the output file (a number into `Plan.outputs`).
        info: dtype, shape, offset in that file, bytes.
        place: its stack and layer; None outside the blocks.
        coefficient: in float64, before rounding to the compute dtype.
        filter: the pattern that decided it, if one did.
    """

    name: str
    file: int
    info: TensorInfo
    place: Place | None
    coefficient: float
    filter: str | None
    pieces: tuple[Piece, ...]

    @property
    def edited(self) -> bool:
        """Whether any entry is computed; otherwise all are copied (or cast)."""
        return any(piece.base and piece.ft for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file of the output: its name, the bytes before its data, and its whole size."""

    name: str
    head: bytes
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """Everything about a run but the numbers in the tensors.

    Attributes:
        recipe: what was asked.
        base, ft: the opened inputs.
        inputs: every file that is read: the base's, then the fine-tune's.
        output: the destination, a folder or one file.
        outputs: the weight files to write.
        tensors: every output tensor, in file order.
        depth: stacks and places.
        rules: what decided the coefficients.
        sidecars: the other files of an output folder; empty for a single file.
        notes: what a person should know of how disagreements were settled.
    """

    recipe: Recipe
    base: Checkpoint
    ft: Checkpoint
    inputs: tuple[Path, ...]
    output: Path
    outputs: tuple[OutputFile, ...]
    tensors: tuple[TensorPlan, ...]
    depth: DepthMap
    rules: Rules
    sidecars: tuple[Sidecar, ...]
    notes: tuple[str, ...]

    @property
    def read_paths(self) -> tuple[Path, ...]:
        """Everything the output must not replace: the inputs as they were named, and all their files."""
        return (self.base.path, self.ft.path, *self.inputs)

    @property
    def bytes_read(self) -> int:
        """Bytes of tensor data read from the inputs."""
        sources = (
            (piece.numel, source)
            for tensor in self.tensors
            for piece in tensor.pieces
            for source in (piece.base, piece.ft)
            if source
        )
        return sum(numel * itemsize(source.dtype) for numel, source in sources)

    def buffer_bytes(self, resources: Resources) -> int:
        """Bytes of the workers' buffers: two inputs and the output as they are stored, and two for the arithmetic."""
        widths = {itemsize(source.dtype) for t in self.tensors for p in t.pieces for source in (p.base, p.ft) if source}
        widest = max(widths, default=0)
        written = max((itemsize(tensor.info.dtype) for tensor in self.tensors), default=0)
        return resources.threads * resources.chunk * (2 * widest + written + 2 * max(widest, 4))

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
            (s.name, s.layers, value(s.name, 0, s.layers), value(s.name, s.layers - 1, s.layers))
            for s in self.depth.stacks
        ]

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
                "coefficient": tensor.coefficient,
            }
            for tensor in self.tensors
        ]

    def summary(self) -> dict[str, Any]:
        """The plan in numbers, as plain values that JSON can hold (docs/json.md describes them)."""

        def counts(tensors: Iterable[TensorPlan]) -> dict[str, int]:
            numels = [tensor.info.numel for tensor in tensors]
            return {"tensors": len(numels), "parameters": sum(numels)}

        by_stack: dict[str | None, list[TensorPlan]] = defaultdict(list)
        for tensor in self.tensors:
            by_stack[tensor.place.stack if tensor.place else None].append(tensor)
        return {
            "output": str(self.output),
            "files": [file.name for file in self.outputs],
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "stacks": [
                {"name": name, "layers": layers, "first": first, "last": last, **counts(by_stack[name])}
                for name, layers, first, last in self.coefficients()
            ],
            "outside": {
                "first": self.rules.outside_value("before"),
                "last": self.rules.outside_value("after"),
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


@dataclass(frozen=True, slots=True)
class Resources:
    """What a run may use; none of it changes a byte of the output.

    Attributes:
        workers: threads; None is one per core, up to 4 (more only queue up at the disk).
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        chunk: entries per step. The default makes 2 MiB of float32, which stays in a core's cache together with its
            sources.
    """

    workers: int | None = None
    device: str = "auto"
    chunk: int = 512 * 1024

    def __post_init__(self) -> None:
        if (self.workers is not None and self.workers < 1) or self.chunk < 1:
            raise RecipeError(
                f"{self.workers} workers and chunks of {self.chunk} entries: at least one of each is needed"
            )
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise RecipeError(f"--device {self.device}: not a device", hint="Say auto, cpu, cuda, or cuda:N.")

    @property
    def threads(self) -> int:
        """How many workers there will be."""
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.workers or max(1, min(4, cores))


_PYTHON_WITH_TORCH = 250_000_000  # resident, with all that lines imports
_PER_TENSOR = 3_000


def open_inputs(recipe: Recipe, *, quiet: bool = False) -> tuple[Checkpoint, Checkpoint]:
    """Open the recipe's base and fine-tune, fetching from the Hub what is no path; `quiet` without progress bars.

    Raises:
        CheckpointError: one cannot be found or read.
    """
    base, ft = (locate(name, quiet=quiet) for name in (recipe.base_model, recipe.fine_tune))
    return (
        open_checkpoint(base.path, name=base.name, hub_id=base.hub_id),
        open_checkpoint(ft.path, name=ft.name, hub_id=ft.hub_id),
    )


def make_plan(recipe: Recipe, base: Checkpoint, ft: Checkpoint, output: Path) -> Plan:
    """Decide every byte of the output.

    Raises:
        MismatchError: names, shapes or dtypes of the two sides do not fit and the recipe does not say what to do.
        DepthError: which tensor stands at which depth cannot be decided.
        RecipeError: a stack or a filter names nothing there, or a coefficient is beyond float32.
    """
    notes: list[str] = []
    in_base = names_in_base(base, ft, notes)
    pairs = pair_tensors(base, ft, in_base, recipe, notes)
    depth = _depth(recipe, base, ft, [*ft.tensors, *in_base], notes)
    rules = recipe.lines.rules(depth)
    drafts = _draft(recipe, base, ft, depth, rules, pairs)

    tensors = {draft.name: draft for draft in drafts}
    files = _shards({name: (draft.dtype, draft.shape) for name, draft in tensors.items()}, recipe, ft, output)
    outputs, planned = [], []
    for number, (file, names) in enumerate(files.items()):
        head, infos = lay_out(((name, tensors[name].dtype, tensors[name].shape) for name in names), FILE_METADATA)
        outputs.append(OutputFile(file, head, len(head) + sum(info.nbytes for info in infos.values())))
        for name, info in infos.items():
            draft = tensors[name]
            place = depth.places.get(name)
            planned.append(TensorPlan(name, number, info, place, draft.coefficient, draft.filter, draft.pieces))

    plan = Plan(
        recipe,
        base,
        ft,
        (*base.files, *ft.files),
        output,
        tuple(outputs),
        tuple(planned),
        depth,
        rules,
        (),
        (*notes, *depth.notes),
    )
    if is_one_file(output):
        return plan
    return _with_sidecars(plan, dict(draft.rows for draft in drafts if draft.rows))


def _depth(recipe: Recipe, base: Checkpoint, ft: Checkpoint, names: Iterable[str], notes: list[str]) -> DepthMap:
    try:
        return find_depth(dict.fromkeys(names), config=ft.config or base.config, layers=recipe.lines.layers)
    except DepthError as error:
        if recipe.lines.needs_depth:
            raise
        notes.append(f"depth is unknown, and makes no difference with one coefficient for all: {error.message}")
        return DepthMap((), {})


# --- what each output tensor is made of ---


@dataclass(frozen=True, slots=True)
class _Draft:
    """An output tensor before its place in a file is known; `misfit` says why it cannot be made."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    coefficient: float
    pieces: tuple[Piece, ...] = ()
    rows: tuple[int, int] | None = None  # numbers of vocabulary rows, where they differ: the other side's, the kept
    filter: str | None = None
    misfit: str | None = None


def _draft(
    recipe: Recipe, base: Checkpoint, ft: Checkpoint, depth: DepthMap, rules: Rules, pairs: Mapping[str, Pair]
) -> list[_Draft]:
    """What makes each output tensor.

    Raises:
        MismatchError: shapes or dtypes differ and the recipe does not say what to do; names them all.
        RecipeError: a filter matches no tensor.
    """
    for pattern, _ in rules.filters:
        if pattern != "*" and not any(pattern in name for name in pairs):
            raise RecipeError(f"filter {pattern!r} matches none of {len(pairs):,} tensor names")
    drafts = []
    for name, (in_base, in_ft) in pairs.items():
        place = depth.places.get(name)
        # A head that is tied to its embedding is one weight with it, and has one coefficient.
        counts_as = (place is None and tied_embedding(name, ft, ft.config or base.config)) or name
        coefficient = rules.coefficient(counts_as, depth)
        if not math.isfinite(to_float32(coefficient)):
            raise RecipeError(
                f"the coefficient of {printable(name)} is {coefficient:g}, beyond what float32 can hold",
                hint="Coefficients usually lie between 0 and 2.",
            )
        b = _slice(base, in_base, first_file=0)
        f = _slice(ft, in_ft, first_file=len(base.files))
        draft = _draft_one(recipe, name, coefficient, b, f, may_resize=place is None and is_vocabulary(name))
        drafts.append(replace(draft, filter=rules.filter_of(counts_as) if b and f else None))
    misfits = [f"{printable(draft.name)}: {draft.misfit}" for draft in drafts if draft.misfit]
    if misfits:
        raise MismatchError(
            f"{len(misfits):,} tensor(s) do not fit between {base.name} and {ft.name} (base first):\n{some(misfits)}",
            hint="Rows of token embeddings and their heads can be settled with --resize ft or --resize base; "
            "any other difference means that the fine-tune is of another model, or its module was replaced.",
        )
    return drafts


def _slice(side: Checkpoint, name: str | None, *, first_file: int) -> tuple[Slice, TensorInfo] | None:
    if name is None:
        return None
    stored = side.tensors[name]
    return Slice(first_file + stored.file, stored.info.offset, stored.info.dtype), stored.info


def _draft_one(
    recipe: Recipe,
    name: str,
    coefficient: float,
    in_base: tuple[Slice, TensorInfo] | None,
    in_ft: tuple[Slice, TensorInfo] | None,
    *,
    may_resize: bool,
) -> _Draft:
    def dtype(stored: str) -> str:
        return _STORED[recipe.dtype] if recipe.dtype and stored not in EXACT_DTYPES else stored

    if in_base is None and in_ft is not None:
        source, info = in_ft
        return _Draft(name, dtype(info.dtype), info.shape, 1.0, (Piece(0, info.numel, None, source, 1.0),))
    if in_ft is None and in_base is not None:
        source, info = in_base
        return _Draft(name, dtype(info.dtype), info.shape, 0.0, (Piece(0, info.numel, source, None, 1.0),))
    assert in_base is not None
    assert in_ft is not None
    (base, base_info), (ft, ft_info) = in_base, in_ft
    draft = _Draft(name, dtype(ft.dtype), ft_info.shape, coefficient)

    if base.dtype != ft.dtype and {base.dtype, ft.dtype} & EXACT_DTYPES:
        return replace(draft, misfit=f"{base.dtype} and {ft.dtype}, of which one cannot be computed with")
    if base_info.shape == ft_info.shape:
        return replace(draft, pieces=(_combine(0, ft_info.numel, base, ft, coefficient),))

    shapes = f"{list(base_info.shape)} and {list(ft_info.shape)}"
    axis = _row_axis(base_info.shape, ft_info.shape) if may_resize else None
    if axis is None:
        return replace(draft, misfit=shapes)
    if recipe.resize == "error":
        return replace(draft, misfit=f"{shapes}, which --resize would settle")
    kept, other = (ft_info, base_info) if recipe.resize == "ft" else (base_info, ft_info)
    shared = min(kept.numel, other.numel)
    pieces = [_combine(0, shared, base, ft, coefficient)]
    if kept.numel > shared:  # rows that only the kept side has: as they are there
        source = ft if recipe.resize == "ft" else base
        rest = replace(source, offset=source.offset + shared * itemsize(source.dtype))
        sides = (None, rest) if recipe.resize == "ft" else (rest, None)
        pieces.append(Piece(shared, kept.numel - shared, sides[0], sides[1], 1.0))
    return replace(draft, shape=kept.shape, pieces=tuple(pieces), rows=(other.shape[axis], kept.shape[axis]))


def _combine(start: int, numel: int, base: Slice, ft: Slice, coefficient: float) -> Piece:
    """Entries that both sides have. Where the coefficient is 0 or 1 they are a copy; the formula is not exact there.

    Integers and booleans have no task vector: the fine-tune's, or the base's where the coefficient is 0.
    """
    if "F64" not in (base.dtype, ft.dtype):
        coefficient = to_float32(coefficient)
    if coefficient == 0:
        return Piece(start, numel, base, None, 1.0)
    if coefficient == 1 or ft.dtype in EXACT_DTYPES:
        return Piece(start, numel, None, ft, 1.0)
    return Piece(start, numel, base, ft, coefficient)


def _row_axis(a: tuple[int, ...], b: tuple[int, ...]) -> int | None:
    """The one axis on which two shapes differ, if only ones stand before it: then rows are runs of entries."""
    if len(a) != len(b):
        return None
    differing = [axis for axis, (m, n) in enumerate(zip(a, b, strict=True)) if m != n]
    return differing[0] if len(differing) == 1 and all(n == 1 for n in a[: differing[0]]) else None


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even; beyond its range, infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


# --- the output's files ---


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `layers.2` before `layers.10`."""
    parts = re.split(r"(\d+)", name)
    return [(len(part.lstrip("0")), part.lstrip("0")) if odd % 2 else (0, part) for odd, part in enumerate(parts)] + [
        (0, name)
    ]


def _shards(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], recipe: Recipe, ft: Checkpoint, output: Path
) -> dict[str, list[str]]:
    """File name -> its tensors in the order they stand. Neither depends on how the inputs are sharded.

    Files are filled layer by layer (names in natural order); inside one the order is that of the format's reference
    writer.
    """
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors, key=_natural):
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * itemsize(dtype)
        if not is_one_file(output) and groups[-1] and held + nbytes > recipe.max_shard_size:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += nbytes
    if len(groups) == 1:
        names = [output.name if is_one_file(output) else f"{ft.stem}.safetensors"]
    else:
        names = [f"{ft.stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    return {
        file: canonical_order({name: tensors[name][0] for name in group})
        for file, group in zip(names, groups, strict=True)
    }


def _with_sidecars(plan: Plan, rows: Mapping[int, int]) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the index comes last, so that it is
    written last.
    """
    recipe, base, ft = plan.recipe, plan.base, plan.ft
    carried, notes = carry_over(
        base, ft, dtype=recipe.dtype, stored=_most_common_dtype(plan), rows=rows, keep_base_rows=recipe.resize == "base"
    )
    inside = plan.coefficients()
    outside = (plan.rules.outside_value("before"), plan.rules.outside_value("after"))
    text = dump_recipe(recipe, base_model=_seen_from(plan.output, base), fine_tune=_seen_from(plan.output, ft))
    card = model_card(
        base,
        ft,
        title=os.path.basename(os.path.abspath(plan.output)),
        how=_CARD_TEXT,
        coefficients=inside,
        outside=outside,
        filters=plan.rules.filters,
    )
    sidecars = [*carried, card, Sidecar(RECIPE, content=text.encode())]
    if len(plan.outputs) > 1:
        weight_map = {tensor.name: plan.outputs[tensor.file].name for tensor in plan.tensors}
        nbytes = sum(tensor.info.nbytes for tensor in plan.tensors)
        sidecars.append(index_file(ft.stem, weight_map, nbytes=nbytes, parameters=plan.parameters))
    return replace(plan, sidecars=tuple(sidecars), notes=(*plan.notes, *notes))


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


_CARD_TEXT = """A fine-tuned model whose update to its base was scaled over depth by
[LiNeS](https://arxiv.org/abs/2410.17146): `base + c(l) * (fine-tune - base)`, with a coefficient `c` that depends on
the depth of a block. Shallow blocks stay near the base, which keeps what it knew; deep blocks keep what the fine-tune
learnt."""
