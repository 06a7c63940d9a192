"""Streams a base and its fine-tunes, or one checkpoint alone, and sums up what `lines inspect` tells of the numbers:
what changed, how several changes go together, and what a checkpoint holds that it should not.

Everything is summed in float64, chunk by chunk in the order of the spans, in bounded memory: how many workers there are
makes no difference.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from lines_cli.checkpoint.header import StoredTensor, itemsize
from lines_cli.checkpoint.reader import Checkpoint, views_of
from lines_cli.engine.arithmetic import dot, task_vector
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.chunks import Chunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened, opened, read_input, with_views
from lines_cli.engine.measure import Track, measure, untracked
from lines_cli.engine.pool import Pool
from lines_cli.engine.realised import forecast
from lines_cli.engine.workers import Reader
from lines_cli.errors import RecipeError
from lines_cli.inspection.open import Inspection, ReadRange, recipe_of
from lines_cli.inspection.statistics import Findings, Interference, UpdateStats, ValueStats
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.plan import Plan
from lines_cli.plan.realised import Forecast
from lines_cli.plan.resources import BytesPerEntry, Resources
from lines_cli.plan.statistics import NOTHING_MEASURED, Statistics
from lines_cli.recipe.schema import Scaling
from lines_cli.storage.digest import altered
from lines_cli.storage.names import RECIPE, natural


def compare(
    inspection: Inspection, resources: Resources | None = None, *, files: bool = False, track: Track = untracked
) -> Findings:
    """Read every float entry once, and say what was found. In this process glibc keeps freed memory from then on, and
    the limit of open files is raised as is needed.

    Args:
        inspection: what to read; without a base nothing is compared. Of a merge that is planned (`open_merge`) the
            norms behind `alpha: auto` are measured, too, in passes of their own.
        resources: workers, device, chunk.
        files: also hold the files of an output of ours against the digests in its recipe.
        track: wraps the stream of byte counts of each pass.

    Raises:
        CheckpointError: an input ends early or cannot be read.
        LinesError: of a merge that is planned, whatever `lines merge` would refuse.
    """
    started = perf_counter()
    resources = resources or Resources()
    devices = Devices(resources)
    keep_freed_memory()
    merge = _merge(inspection)  # refuses before anything is read
    sums = _Sums()
    found = NOTHING_MEASURED
    if merge is not None and merge.needs.scores:  # which decide what is foreseen
        found = _measured(merge, devices, track)
        alpha = found.norms.alpha if found.norms else 1 / len(inspection.models)
        inspection = inspection.with_measured(
            alpha=alpha if inspection.scaling.needs_alpha else None, scores=found.scores
        )
    with devices.bounded():
        _stream(inspection, devices, track, sums)
    if merge is not None and not merge.needs.scores:
        found = _measured(merge, devices, track)
    return Findings(
        changes=sums.changes,
        forecasts=sums.forecasts,
        joint=sums.joint,
        seen=sums.seen,
        same=sums.same,
        norms=found.norms,
        scores=found.scores,
        files=_files(inspection) if files else {},
        bytes_read=sums.bytes_read,
        seconds=perf_counter() - started,
    )


def _merge(inspection: Inspection) -> Plan | None:
    """The plan of what is inspected, if something is to be measured of it: alpha of a merge, unless that follows from
    the number of models; and what a depth rule asks for.
    """
    recipe = inspection.recipe
    by_rule = bool(recipe.measured_rules) and inspection.has_base and inspection.knows_coefficients
    if inspection.of != "merge" and not by_rule:
        return None
    if by_rule and recipe.lines is not None:
        alpha = "auto" if inspection.of == "merge" else recipe.lines.alpha
        lines = recipe.lines.model_copy(update={"alpha": alpha})
    else:
        lines = Scaling(alpha="auto", beta=0.0, layers=inspection.scaling.layers)
    others: dict[str, Any] = {}
    if inspection.of != "merge":  # what is compared is whatever they have in common
        inside = inspection.missing_in_blocks or None
        others = {"missing": "skip", "missing_in_blocks": inside, "resize": "ft", "like": "ft"}
    recipe = recipe.model_copy(update={"lines": lines, **others})
    plan = make_plan(recipe, open_inputs(recipe, quiet=True), Path("inspected"))
    return plan if plan.needs.norms or plan.needs.scores else None


def _measured(plan: Plan, devices: Devices, track: Track) -> Statistics:
    with opened(plan.paths) as fds, devices.bounded():
        return measure(plan, with_views(fds, plan.views), devices, track).statistics


def _files(inspection: Inspection) -> dict[int, tuple[int, dict[str, str]]]:
    """For each output of ours how many files its recipe recorded, and those that are no longer so."""
    found: dict[int, tuple[int, dict[str, str]]] = {}
    for side, checkpoint in enumerate(inspection.checkpoints):
        try:
            recipe = recipe_of(checkpoint)
        except RecipeError as error:
            found[side] = 0, {RECIPE: f"cannot be read: {error.message}"}
            continue
        if recipe is not None and recipe.files and checkpoint.folder is not None:
            found[side] = len(recipe.files), altered(checkpoint.folder, recipe.files)
    return found


@dataclass(slots=True)
class _Found:
    """What a chunk adds: for each source what it holds, for each fine-tune what it changed, how these go together."""

    chunk: Chunk[ReadRange]
    holds: list[ValueStats]
    changes: tuple[UpdateStats, ...] = ()
    joint: Interference | None = None
    forecast: Forecast | None = None


class _Sums:
    """The sums over what was read so far."""

    def __init__(self) -> None:
        self.changes: dict[str, tuple[UpdateStats, ...]] = {}
        self.joint: dict[str, Interference] = {}
        self.forecasts: dict[str, Forecast] = {}
        self.seen: dict[tuple[int, str], ValueStats] = {}
        self.same: dict[int, list[tuple[str, ...]]] = {}
        self.bytes_read = 0

    def add(self, found: _Found) -> int:
        """Add a chunk, in the order of the spans; its bytes."""
        span, name = found.chunk.tensor, found.chunk.tensor.name
        for counts_for, holds in zip(span.counts_for, found.holds, strict=True):
            if counts_for is not None:
                self.seen[counts_for] = self.seen.get(counts_for, ValueStats()) + holds
        if found.changes:
            before = self.changes.get(name, (UpdateStats(),) * len(found.changes))
            self.changes[name] = tuple(a + b for a, b in zip(before, found.changes, strict=True))
        if found.joint is not None:
            self.joint[name] = self.joint[name] + found.joint if name in self.joint else found.joint
        if found.forecast is not None:
            self.forecasts[name] = self.forecasts.get(name, Forecast()) + found.forecast
        self.bytes_read += found.chunk.nbytes
        return found.chunk.nbytes


def _stream(inspection: Inspection, devices: Devices, track: Track, sums: _Sums) -> None:
    """Read everything once, and sum it up."""
    segments = [(span, segment) for span in inspection.spans() for segment in span.segments]
    stored = max((itemsize(source.dtype) for _, segment in segments for source in segment.sources), default=1)
    per_entry = BytesPerEntry(
        stored=stored, written=0, width=8, held=len(inspection.checkpoints), temporaries=_TEMPORARIES
    )
    size = devices.chunk(per_entry, whole_blocks=True)
    items = list(items_of(segments))
    total = sum(chunk.nbytes for item in items for chunk in item)
    with opened(inspection.inputs) as fds:
        sources = with_views(fds, views_of(inspection.checkpoints))

        def look(worker: Reader, item: list[Chunk[ReadRange]]) -> list[_Found]:
            return [_look(worker, chunk) for chunk in worker.cut(item)]

        turned = devices.turned(len(inspection.checkpoints) if any(inspection.relaid) else 0)

        def reader(device: torch.device) -> Reader:
            return Reader(inspection.inputs, sources, device, chunk=size, per_entry=per_entry, turned=turned)

        pool = Pool(reader, items, look, devices)
        title = "comparing" if inspection.has_base else "checking"
        with closing(pool.in_order()) as results:
            for _ in track(title, total, (sum(map(sums.add, found)) for found in results)):
                pass
        sums.same = _same(inspection, sums.seen, sources)


_TEMPORARIES = 8  # chunks that are made beside what is held


def _look(worker: Reader, chunk: Chunk[ReadRange]) -> _Found:
    holds: list[ValueStats] = []
    values: list[torch.Tensor] = []
    for source, into in zip(chunk.segment.sources, worker.held(chunk)[1], strict=False):
        loaded = worker.read(chunk, source)
        values.append(worker.made_of(loaded, chunk, source, into))
        holds.append(_seen(values[-1], loaded.bits()))
    if not chunk.tensor.compares:
        return _Found(chunk, holds)
    base, *models = values
    planned = chunk.tensor.planned
    foreseen = None
    if planned is not None:
        dtype = torch.float64 if planned.in_float64 else torch.float32
        sides = (side.to(dtype) for side in (base, models[0]))
        foreseen = forecast(*sides, coefficient=planned.coefficient, dtype=planned.dtype)
    changes, bad = zip(*(_change(task_vector(model, base), base) for model in models), strict=True)
    if len(models) == 1:
        return _Found(chunk, holds, changes, forecast=foreseen)
    numel, squares = chunk.numel, tuple(change.squares for change in changes)
    if any(left_out is not None for left_out in bad):
        in_any = torch.stack([left_out for left_out in bad if left_out is not None]).any(0)
        numel -= int(in_any.sum())
        squares = tuple(dot(update, update) for update in (model.masked_fill_(in_any, 0) for model in models))
    return _Found(chunk, holds, changes, _joint(models, numel, squares))


def _seen(values: torch.Tensor, bits: int) -> ValueStats:
    """What [n] entries in float64 hold."""
    low, high = _extremes(values)
    nan = inf = 0
    if not math.isfinite(low + high):
        nan, inf = int(values.isnan().sum()), int(values.isinf().sum())
        low, high = _extremes(values[values.isfinite()])
    return ValueStats(values.numel(), nan, inf, low, high, bits)


def _extremes(values: torch.Tensor) -> tuple[float, float]:
    if values.numel() == 0:
        return math.inf, -math.inf
    low, high = torch.stack(torch.aminmax(values)).tolist()
    return low, high


def _change(update: torch.Tensor, base: torch.Tensor) -> tuple[UpdateStats, torch.Tensor | None]:
    """What [n] entries of an update sum up to, and which of them are not finite: these are set to zero and left out."""
    numel, left_out = update.numel(), None
    low, high = _extremes(update)
    if numel and not math.isfinite(low + high):
        left_out = ~update.isfinite()
        base = base.masked_fill(left_out, 0)
        numel -= int(left_out.sum())
        low, high = _extremes(update.masked_fill_(left_out, 0))
    unchanged = numel - int(torch.count_nonzero(update))
    return UpdateStats(numel, dot(update, update), dot(base, base), unchanged, max(-low, high, 0.0)), left_out


def _joint(updates: list[torch.Tensor], numel: int, squares: tuple[float, ...]) -> Interference:
    """How several updates of [n] entries go together; `numel` of them count. The updates are overwritten."""
    products = tuple(dot(a, b) for a, b in combinations(updates, 2))
    total = updates[0] + updates[1]
    for update in updates[2:]:
        total += update
    sum_squares, sum_l1 = dot(total, total), float(total.abs_().sum())
    signs = [update.sign_() for update in updates]
    most, least = signs[0].clone(), signs[0].clone()
    for sign in signs[1:]:
        torch.maximum(most, sign, out=most)
        torch.minimum(least, sign, out=least)
    spread = most.sub_(least)  # 2 where signs disagree, else 0 or 1
    disagreeing = (dot(spread, spread) - float(spread.sum())) / 2
    agreement = [dot(a, b) for a, b in combinations(signs, 2)]  # agreeing less opposed
    for sign in signs:
        sign.abs_()
    both = [dot(a, b) for a, b in combinations(signs, 2)]  # agreeing and opposed
    opposed = tuple(round((b - a) / 2) for a, b in zip(agreement, both, strict=True))
    return Interference(numel, squares, products, opposed, round(disagreeing), sum_squares, sum_l1)


# --- duplicates ---


def _same(
    inspection: Inspection, seen: Mapping[tuple[int, str], ValueStats], sources: Sequence[Opened]
) -> dict[int, list[tuple[str, ...]]]:
    """For each checkpoint, the tensors that hold the same bytes as others: groups of them, in the order of their names.

    Left out are tensors of zeros, which are listed as such; of one dimension whose entries are all the same, new norms
    and biases; buffers that every layer has; and other names of what is stored once, as torch.save stores tied weights.
    """
    places = [
        (side, file) for side, checkpoint in enumerate(inspection.checkpoints) for file in range(len(checkpoint.files))
    ]
    source_of = dict(zip(places, sources, strict=True))
    alike: dict[tuple[int, str, tuple[int, ...], int], list[str]] = defaultdict(list)
    stored_once: set[tuple[int, StoredTensor]] = set()
    for side, name in sorted(seen, key=lambda key: natural(key[1])):
        there = inspection.checkpoints[side]
        found, info, stored = seen[side, name], there.as_stored(name), there.tensors[name]
        known = (side, stored) in stored_once
        stored_once.add((side, stored))
        constant = found.low == found.high and not found.nan and not found.inf
        told_elsewhere = constant and (found.high == 0 or len(info.shape) < 2)
        held = _held(there, name)
        if found.numel and held and not known and not told_elsewhere and not _BUFFER.fullmatch(name):
            alike[side, info.dtype, info.shape, found.bits].append(name)
    same: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for (side, *_), names in alike.items():
        checkpoint = inspection.checkpoints[side]

        def begins(stored: StoredTensor, side: int = side) -> tuple[Opened, int]:
            return source_of[side, stored.file], stored.info.offset

        groups: list[list[str]] = []
        for name in names:
            this = _held(checkpoint, name)
            for group in groups:
                pairs = list(zip(this, _held(checkpoint, group[0]), strict=True))
                alike_too = all((a.info.dtype, a.info.nbytes) == (b.info.dtype, b.info.nbytes) for a, b in pairs)
                if alike_too and all(_equal(begins(a), begins(b), a.info.nbytes) for a, b in pairs):
                    group.append(name)
                    break
            else:
                groups.append([name])
        same[side] += [tuple(group) for group in groups if len(group) > 1]
    return same


def _held(checkpoint: Checkpoint, name: str) -> tuple[StoredTensor, ...]:
    """What a tensor is stored as: itself, or codes and scales; nothing of one that is made otherwise, or in parts."""
    if (codes := checkpoint.codes(name)) is not None:
        return codes
    stored = checkpoint.tensors[name]
    return () if name in checkpoint.formulas or stored.parts else (stored,)


# Rotary frequencies and causal masks, which older checkpoints store once for every layer.
_BUFFER = re.compile(r"(?:.*\.)?(?:inv_freq|masked_bias|attn\.bias|attention\.bias|relative_position_index)")


def _equal(a: tuple[Opened, int], b: tuple[Opened, int], nbytes: int) -> bool:
    """Whether two runs of bytes, each in an open file from an offset on, are the same."""
    buffers = bytearray(min(_STEP, nbytes)), bytearray(min(_STEP, nbytes))
    for at in range(0, nbytes, _STEP):
        views = [memoryview(buffer)[: min(_STEP, nbytes - at)] for buffer in buffers]
        for (source, offset), view in zip((a, b), views, strict=True):
            read_input(source, view, offset + at)
        if views[0] != views[1]:
            return False
    return True


_STEP = 2**20
