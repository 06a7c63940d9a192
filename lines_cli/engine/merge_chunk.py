"""What becomes of one chunk: entries are read, dropped as the method's sparsifier says, and merged. The pass that
writes, the one that counts signs and the ones that take norms all do it here.

A method that sees whole tensors is given all of a segment at once, and so is a calibration of what it makes; a chunk is
then a part of the result, which the workers share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lines_cli.engine.arithmetic import dot, is_finite, task_vector
from lines_cli.engine.chunks import Chunk, PlanChunk
from lines_cli.engine.whole_tensors import Whole
from lines_cli.engine.workers import Worker
from lines_cli.errors import DataError, printable
from lines_cli.methods import ByMagnitude, CannotMergeError, Drawn
from lines_cli.methods.sparsify import Where

Look = Callable[[torch.Tensor | None, Sequence[torch.Tensor]], object]
"""Is shown a chunk's entries in the base (None without one) and in each model: [n] each, not to be changed."""


@dataclass(frozen=True, slots=True)
class Merged:
    """A chunk of what a method makes.

    Attributes:
        base: the base's entries, [n] in the compute dtype; None where there is no base.
        values: the merged entries, the same. May be overwritten.
        squares: for each model the squared L2 norm of its task vector; empty where that was not taken.
        kept: for each model how many entries were kept; empty where none are drawn.
        entries: of how many, and for how many the squares are.
    """

    base: torch.Tensor | None
    values: torch.Tensor
    squares: tuple[float, ...] = ()
    kept: tuple[float, ...] = ()
    entries: int = 0


def merge_chunk(
    worker: Worker,
    chunk: PlanChunk,
    *,
    given: Look | None = None,
    left: Look | None = None,
    majority: int | None = None,
) -> Merged:
    """Read a chunk and merge it.

    Args:
        worker: the thread's.
        chunk: of a segment that is merged.
        given: is shown what models hold (task vectors, or weights), before anything is dropped.
        left: is shown what is left after dropping.
        majority: the sign of the majority, in place of the one that was measured.

    Raises:
        DataError: NaN or Inf in a tensor that is merged whole, unless that is allowed.
    """
    if worker.plan.merges_whole(chunk.tensor, chunk.segment):
        return _part_of_whole(worker, chunk, given, left)
    base, tensors = read_chunk(worker, chunk)
    if given is not None:
        given(base, tensors)
    squares = _squares(worker, tensors)
    kept = drop_entries(worker, chunk, tensors)
    if left is not None:
        left(base, tensors)
    values = merge_entries(worker, chunk, tensors, base=base, majority=majority)
    return Merged(base, values, squares, kept, chunk.numel)


def read_chunk(worker: Worker, chunk: PlanChunk) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """The base's entries, and each model's task vector or weights, as the method takes them: [n] each, in the compute
    dtype, to be overwritten.
    """
    if worker.plan.recipe.method.takes == "task vectors":
        return worker.task_vectors(chunk)
    return worker.inputs(chunk)


def drop_entries(worker: Worker, chunk: PlanChunk, tensors: list[torch.Tensor]) -> tuple[float, ...]:
    """Set to 0, in place, what the method's sparsifier drops.

    Returns:
        How many entries of each model are kept, where they are drawn; else nothing.
    """
    sparsifier, tensor = worker.plan.recipe.method.sparsifier, chunk.tensor
    if isinstance(sparsifier, ByMagnitude) and sparsifier.apply is not None:
        sparsifier.apply(tensors, worker.plan.measured(tensor).bounds)
    if not isinstance(sparsifier, Drawn):
        return ()
    # A head and the embedding it is tied to are one weight, and lose the same entries.
    where = Where(tensor.spec.counts_as, chunk.segment.start + chunk.first)
    kept = []
    for tau, mask in zip(tensors, sparsifier.masks(tensors, tensor.values, where), strict=True):
        kept.append(float(chunk.numel) if mask is None else float(mask.count_nonzero()))
        if mask is not None:
            tau.mul_(mask)
    return tuple(kept)


def merge_entries(
    worker: Worker,
    chunk: PlanChunk,
    tensors: Sequence[torch.Tensor],
    *,
    base: torch.Tensor | None = None,
    majority: int | None = None,
) -> torch.Tensor:
    """What the method makes of tensors from which entries were dropped; overwrites them.

    Raises:
        DataError: of these numbers it can make nothing.
    """
    method = worker.plan.recipe.method
    try:
        keywords = worker.keywords(chunk.tensor, majority=majority)
    except CannotMergeError as error:
        raise DataError(f"{printable(chunk.tensor.name)}: {error}") from None
    return method.merge(tensors, base=base, **keywords) if method.given_base else method.merge(tensors, **keywords)


def nonfinite_behind(worker: Worker, chunk: PlanChunk) -> str | None:
    """Which input of a chunk, or of the whole tensor that it is a part of, holds NaN or Inf, and where; None if none
    does.
    """
    if worker.plan.merges_whole(chunk.tensor, chunk.segment):
        return _whole(worker, chunk).nonfinite
    return worker.nonfinite(chunk)


def _squares(worker: Worker, tensors: Sequence[torch.Tensor]) -> tuple[float, ...]:
    if worker.plan.needs or len(tensors) == 1 or worker.plan.recipe.method.takes != "task vectors":
        return ()  # asked for where several task vectors are merged to be written
    return tuple(dot(tau, tau) for tau in tensors)


# --- whole tensors ---


def _part_of_whole(worker: Worker, chunk: PlanChunk, given: Look | None, left: Look | None) -> Merged:
    whole = _whole(worker, chunk)
    if given is not None or left is not None:
        base, tensors = read_chunk(worker, chunk)
        if given is not None:
            given(base, tensors)
        if left is not None:
            drop_entries(worker, chunk, tensors)
            left(base, tensors)
    else:
        base = worker.base(chunk)
    values = whole.values[chunk.first : chunk.first + chunk.numel].clone()
    if chunk.first:
        return Merged(base, values)
    return Merged(base, values, whole.squares, whole.kept, chunk.segment.numel)  # of all, said with its first part


def _whole(worker: Worker, chunk: PlanChunk) -> Whole:
    """All that is made of a chunk's segment. Only where other workers may need a part, too, it is shared."""
    key = (chunk.tensor.name, chunk.segment.start, str(worker.device))
    if worker.last_whole is not None and worker.last_whole[0] == key:
        return worker.last_whole[1]
    worker.last_whole = None
    if worker.alone:
        worker.last_whole = key, _make_whole(worker, chunk)
        return worker.last_whole[1]
    found = worker.shared.get(key, lambda: _make_whole(worker, chunk))
    if worker.device.type == "cuda":  # so that its memory is not used again before this thread's stream is done with it
        found.values.record_stream(torch.cuda.current_stream())
    return found


def _make_whole(worker: Worker, chunk: PlanChunk) -> Whole:
    """Read all of a segment, in chunks, and merge it.

    Raises:
        DataError: NaN or Inf in an input, unless that is allowed.
    """
    tensor, segment, method = chunk.tensor, chunk.segment, worker.plan.recipe.method
    calibration = worker.plan.recipe.calibration if worker.plan.calibrated(tensor, segment) else None
    sees_whole = method.sees_whole(tensor.values)

    def room(number: int) -> list[torch.Tensor]:
        dtype = torch.float64 if tensor.in_float64 else torch.float32
        return [torch.empty(segment.numel, dtype=dtype, device=worker.device) for _ in range(number)]

    tensors = room(len(segment.models))
    before = room(len(segment.models) if calibration is not None else 0)  # anything was dropped or weighted
    bases = room(1 if method.given_base or (before and method.takes == "weights") else 0)
    kept: tuple[float, ...] = ()
    squares: tuple[float, ...] = ()
    nonfinite: str | None = None
    for part in Chunk(tensor, segment, 0, segment.numel).cut(worker.chunk):
        of_base, held = read_chunk(worker, part)
        if nonfinite is None and not all(map(is_finite, held)):
            nonfinite = worker.nonfinite(part)
            if nonfinite is not None and not worker.plan.recipe.allow_nonfinite:
                raise DataError(nonfinite, hint=worker.hint_of_nonfinite(part))
            of_base, held = read_chunk(worker, part)  # looking for it went through the same buffers
        squares = _added(squares, _squares(worker, held))
        here = slice(part.first, part.first + part.numel)
        for whole, entries in zip(before, held, strict=bool(before)):
            whole[here].copy_(entries)
        for whole in bases:
            assert of_base is not None, "something that needs a base, without one"
            whole[here].copy_(of_base)
        if not sees_whole:
            kept = _added(kept, drop_entries(worker, part, held))
        for whole, entries in zip(tensors, held, strict=True):
            whole[here].copy_(entries)
    shape = tensor.shape_of(segment)
    if sees_whole:
        tensors, bases = ([whole.view(shape) for whole in every] for every in (tensors, bases))
        kept = drop_entries(worker, Chunk(tensor, segment, 0, segment.numel), tensors)
    base = bases[0] if bases else None
    values = merge_entries(worker, chunk, tensors, base=base).reshape(-1)
    if calibration is not None:
        of_weights = base.reshape(-1) if base is not None and method.takes == "weights" else None
        if of_weights is not None:
            for weights in (values, *before):
                task_vector(weights, of_weights)
        counting = [before[model].view(shape) for model in method.counting(tensor.values, len(before))]
        values = calibration.calibrate(values.view(shape), counting).reshape(-1)
        if of_weights is not None:
            values.add_(of_weights)
    assert values.numel() == segment.numel, "a method made a tensor of another size"
    if worker.device.type == "cuda":
        torch.cuda.current_stream().synchronize()  # others read it in streams of their own
    return Whole(values, squares, kept, nonfinite)


def _added(total: tuple[float, ...], more: Sequence[float]) -> tuple[float, ...]:
    return tuple(a + b for a, b in zip(total, more, strict=True)) if total else tuple(more)
