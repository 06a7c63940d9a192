"""The pass that finds the scales of an output in FP8: it computes what will be written, and keeps of it the largest
magnitude of each block. The pass that writes computes it once more. So the inputs are read twice, and no tensor has to
be held; a maximum is the same in whatever order it is found.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import closing
from dataclasses import replace

import torch

from lines_cli.engine.chunks import PlanChunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.fp8 import Largest, look
from lines_cli.engine.input_files import Opened
from lines_cli.engine.measure import Track
from lines_cli.engine.pool import Pool
from lines_cli.engine.workers import Worker
from lines_cli.engine.write import Write
from lines_cli.plan.plan import SCALES, Plan, bytes_of
from lines_cli.plan.statistics import Statistics

Seen = list[tuple[str, list[tuple[int, int, torch.Tensor]]]]


def with_scales(plan: Plan, known: Statistics | None) -> Plan | None:
    """The plan with scales that were measured before; None where these are not those it needs."""
    if known is None:
        return None
    for tensor in plan.to_quantise:
        step = tensor.spec.quantised
        assert step is not None
        if len(known.scales.get(tensor.name, b"")) != step.factors[0][1].info.nbytes:
            return None
    return replace(plan, statistics=replace(plan.statistics, scales=known.scales))


def measure_scales(
    plan: Plan,
    sources: Sequence[Opened],
    devices: Devices,
    track: Track,
    *,
    only: Collection[str] | None = None,
) -> Plan:
    """The plan with the scales of its tensors `to_quantise`.

    Args:
        plan: with every coefficient known.
        sources: the open inputs, as in `plan.paths`.
        devices: the devices to compute on.
        track: wraps the stream of byte counts.
        only: names of the tensors that are looked at; all of them, unless said.

    Raises:
        DataError: NaN or Inf in an input that is merged whole.
        CheckpointError: an input ends early or cannot be read.
    """
    job = Write(plan, [])
    tensors = [tensor for tensor in plan.to_quantise if only is None or tensor.name in only]
    largest: dict[str, Largest] = {}
    dtypes = {}
    for tensor in tensors:
        assert tensor.spec.quantised is not None
        largest[tensor.name], dtypes[tensor.name] = Largest(tensor.spec.quantised), tensor.info.dtype

    def seen(worker: Worker, item: list[PlanChunk]) -> tuple[Seen, int]:
        found: Seen = []
        for chunk in worker.cut(item):
            step = chunk.tensor.spec.quantised
            assert step is not None
            values = job.exact(worker, chunk).values
            found.append((chunk.tensor.name, look(values, step, chunk.segment.start + chunk.first)))
        return found, sum(chunk.nbytes for chunk in item)

    def add(result: tuple[Seen, int]) -> int:
        for name, blocks in result[0]:
            largest[name].add(blocks)
        return result[1]

    size = devices.chunk(plan.per_entry, whole=plan.whole_bytes(len(devices.members)))
    shared, turned = devices.whole_tensors(), devices.turned(plan.turned_sides)
    segments = ((tensor, segment) for tensor in tensors for segment in tensor.segments)
    pool = Pool(lambda device: Worker(plan, sources, device, size, shared, turned), items_of(segments), seen, devices)
    title, total = f"measuring {SCALES}", bytes_of(segment for tensor in tensors for segment in tensor.segments)
    with closing(pool.in_order()) as results:
        for _ in track(title, total, map(add, results)):
            pass
    scales = {name: of_it.scales(dtypes[name]) for name, of_it in largest.items()}
    return replace(plan, statistics=replace(plan.statistics, scales=scales))
