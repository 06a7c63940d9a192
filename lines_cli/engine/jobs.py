"""What carries a plan out, whatever it makes: measuring before the destination is touched, the job, its threads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch

from lines_cli.engine.adapter_write import AdapterWrite, FactorReader, measured
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened, opened, refuse_changed, with_views
from lines_cli.engine.measure import Track
from lines_cli.engine.workers import Worker
from lines_cli.engine.write import Target, Write
from lines_cli.plan.adapter_layout import settled
from lines_cli.plan.adapter_plan import AdapterPlan, AnyPlan, Found
from lines_cli.plan.realised import groups_of

AnyJob = Write | AdapterWrite


def sized(plan: AnyPlan, devices: Devices, track: Track, *, known: Mapping[str, Any] | None = None) -> AnyPlan:
    """The plan with all that decides how large its output is: the ranks of an adapter, measured where they have to be.

    Args:
        plan: as headers give it.
        devices: the devices to compute on.
        track: wraps the stream of what a pass has done.
        known: what an earlier run has measured of the same.
    """
    if not isinstance(plan, AdapterPlan) or not plan.needs:
        return plan
    names = {module.name for module in plan.modules} | {rest.name for rest in plan.rest}
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # no journal of ours would
        found = {str(name): Found(int(rank), norm) for name, (rank, norm) in (known or {})["ranks"].items()}
        if found.keys() == names:
            return settled(plan, found)
    with opened(plan.paths) as fds, devices.bounded():
        refuse_changed(plan.paths, fds, plan.states)
        return settled(plan, measured(plan, with_views(fds, plan.views), devices, track))


def job_of(plan: AnyPlan, targets: list[Target], devices: Devices, *, measures: bool) -> AnyJob:
    """What makes the ranges of a plan's output.

    Args:
        plan: what is carried out.
        targets: where the ranges go.
        devices: the devices to compute on.
        measures: whether what rounding leaves of coefficients is measured by the way.
    """
    if isinstance(plan, AdapterPlan):
        return AdapterWrite(plan, targets, len(devices.members))
    return Write(plan, targets, groups_of(plan) if measures else None)


def worker_of(plan: AnyPlan, sources: Sequence[Opened], devices: Devices) -> Callable[[torch.device], Any]:
    """Makes a thread's worker, given its device."""
    size = devices.chunk(plan.per_entry, whole=plan.whole_bytes(len(devices.members)))
    if isinstance(plan, AdapterPlan):
        adapter, matrices = plan, devices.turned(1)
        return lambda device: FactorReader(adapter, sources, device, size, matrices)
    whole, shared, turned = plan, devices.whole_tensors(), devices.turned(plan.turned_sides)
    return lambda device: Worker(whole, sources, device, size, shared, turned)
