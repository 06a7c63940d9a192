"""Plan -> bytes. Knows tensors, files and workers; knows no command, no recipe format and no screen.

What the plan needs to know of the numbers is measured first. Then a few workers take spans of the output files, whole
blocks of their digests: for each chunk in it `pread` all inputs, compute on the worker's device, hash and `pwrite` the
result while it is in cache. No chunk depends on another, so how many workers there are and how large the chunks changes
no byte.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import replace
from functools import partial
from typing import Any, overload

from lines_cli.checkpoint.crosscheck import refuse_misread
from lines_cli.checkpoint.header import TensorInfo
from lines_cli.engine.adapter_write import AdapterOutcome
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.devices import Devices
from lines_cli.engine.fast import prepare
from lines_cli.engine.input_files import Opened, allow_open_files, opened, refuse_changed, with_views
from lines_cli.engine.jobs import job_of, sized, worker_of
from lines_cli.engine.measure import Measurement, Track, measure, untracked
from lines_cli.engine.pool import Pool
from lines_cli.engine.scales import measure_scales, with_scales
from lines_cli.engine.write import Outcome, Target, Write, output_ranges
from lines_cli.errors import OutputError
from lines_cli.plan.adapter_plan import AdapterPlan, AnyPlan
from lines_cli.plan.identity import digests_of, identity, is_same_run, replaceable
from lines_cli.plan.plan import SCALES, Plan
from lines_cli.plan.realised import record_of as record_of_layers
from lines_cli.plan.resolve import resolve
from lines_cli.plan.resources import Resources
from lines_cli.plan.sidecars import contents_beside
from lines_cli.plan.statistics import NOTHING_MEASURED, Statistics
from lines_cli.storage.destination import naming
from lines_cli.storage.digest import (
    DIGEST_BLOCK,
    DIGEST_BLOCKS_ON_CUDA,
    FileRecord,
    GrowingDigest,
    record_of,
)
from lines_cli.storage.making import Making, check_destination, leftover, making, recover


@overload
def run(
    plan: Plan,
    resources: Resources | None = ...,
    *,
    force: bool = ...,
    resume: bool = ...,
    verify: bool = ...,
    verify_inputs: bool = ...,
    track: Track = ...,
    at_last: Callable[[], None] = ...,
) -> Outcome: ...
@overload
def run(
    plan: AdapterPlan,
    resources: Resources | None = ...,
    *,
    force: bool = ...,
    resume: bool = ...,
    verify: bool = ...,
    verify_inputs: bool = ...,
    track: Track = ...,
    at_last: Callable[[], None] = ...,
) -> AdapterOutcome: ...


def run(
    plan: AnyPlan,
    resources: Resources | None = None,
    *,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    track: Track = untracked,
    at_last: Callable[[], None] = lambda: None,
) -> Outcome | AdapterOutcome:
    """Carry a plan out: measure, write, publish. On any failure before that the destination is as it was, and what was
    finished is kept beside it, to `resume` from, unless an input holds NaN or has changed. In this process glibc keeps
    freed memory from then on, and the limit of open files is raised as is needed.

    Args:
        plan: from `make_plan`.
        resources: workers, device, chunk; they change speed and memory, never the bytes.
        force: replace an existing output, once the new one is whole.
        resume: go on from what such a run has left that was killed, if there is anything.
        verify: read back what was written before it is published.
        verify_inputs: take digests of all inputs first, to record them, and to hold those against them that a run had
            which is resumed.
        track: wraps the stream of byte counts of each pass.
        at_last: is called before the output is put into place, when all that takes time is done.

    Raises:
        DataError: NaN or Inf in an input, or an overflow in the output dtype.
        CheckpointError: an input ends early or cannot be read.
        MismatchError: `alpha: auto` cannot be measured.
        OutputError: the destination is taken, is an input, or cannot be written; another run is writing it; or what is
            to be resumed is of another recipe, or other inputs.
    """
    started = time.perf_counter()
    resources = resources or Resources()
    devices = Devices(resources)
    keep_freed_memory()
    before = leftover(plan.output)
    if before is not None and before.set_aside:
        recover(plan.output)
    if isinstance(plan, AdapterPlan):
        check_destination(plan.output, inputs=plan.read_paths, nbytes=0, force=force)
        same = resume and before is not None and is_same_run(plan, before.run)
        plan = sized(plan, devices, track, known=before.measured if same and before is not None else None)
    needed = plan.bytes_written - (before.nbytes if before else 0)
    # Whose the files are that --force would replace is looked at under the lock, when nobody else replaces them.
    check_destination(plan.output, inputs=plan.read_paths, nbytes=needed, force=force)
    identified = identity(plan)
    if verify_inputs:
        identified["contents"] = digests_of(plan.paths)
    remark = prepare(plan, devices) if isinstance(plan, Plan) else None
    identified["step"] = DIGEST_BLOCK * (DIGEST_BLOCKS_ON_CUDA if devices.has_own_memory else 1)
    allow_open_files(len(plan.paths) + 2 * len(plan.outputs))
    with (
        making(
            plan.output,
            identified,
            plan.names,
            replaceable=partial(replaceable, plan) if force else None,
            resume=resume,
        ) as staging,
        opened(plan.paths) as fds,
        devices.bounded(),
    ):
        staging.remarks.extend([remark] if remark is not None else [])
        refuse_changed(plan.paths, fds, plan.states)
        sources = with_views(fds, plan.views)
        records = _carried_over(staging, plan)
        measurement = _measured(staging, plan, sources, devices, track)
        if isinstance(plan, Plan) and plan.needs:
            plan = resolve(plan, measurement.statistics)
        if isinstance(plan, Plan) and plan.to_quantise:
            plan, measurement = _with_scales(staging, plan, measurement, (sources, devices, track))
        targets = [Target(staging.create(f.name, f.nbytes), GrowingDigest(f.nbytes)) for f in plan.outputs]
        job = job_of(plan, targets, devices, measures=True)
        finished = job.take_over(staging.contents.parts) if staging.contents else set()
        if isinstance(job, Write) and staging.contents and job.taken_over == plan.bytes_written:
            job.all_seen_by_parts(staging.contents.unchanged)
        ranges: Iterable[Any] = output_ranges(plan.outputs, plan.tensors, staging.step)
        spans = (span for span in ranges if (span.file, span.start) not in finished)
        pool: Pool[Any, Any, Any] = Pool(worker_of(plan, sources, devices), spans, job, devices, at_end=staging.stop)
        number = len(plan.passes) + 1
        title = f"writing {number}/{number}" if number > 1 else "writing"
        # Closing stops and joins the threads, whatever interrupts this one, before the files they write are closed.
        with closing(pool.in_order()) as results:
            done = (job.take(result, staging.journal) for result in results)
            for _ in track(title, plan.bytes_written - job.taken_over, done):
                pass
        refuse_changed(plan.paths, fds, plan.states)
        records |= job.records()
        outcome: Outcome | AdapterOutcome
        layers: Sequence[Mapping[str, Any]] = ()
        if isinstance(job, Write):
            outcome = job.outcome(measurement)
            layers = record_of_layers(outcome.realised)
        else:
            outcome = job.outcome()
        for name, content in contents_beside(plan, identified, records, layers):
            staging.add(name, content)
        if verify:
            _verify(staging, records)
        _refuse_misread(staging, plan)
        staging.publish(at_last)
    return replace(outcome, seconds=time.perf_counter() - started, remarks=tuple(staging.remarks))


def _carried_over(staging: Making, plan: AnyPlan) -> dict[str, FileRecord]:
    """Copy what stands beside the weights before anything else, while it is there; what was written of each."""
    records: dict[str, FileRecord] = {}
    for sidecar in plan.sidecars:
        if sidecar.source is not None:
            content = sidecar.read()
            staging.add(sidecar.name, content)
            records[sidecar.name] = record_of(content)
            del content  # before the next is read
    return records


def _measured(staging: Making, plan: AnyPlan, sources: Sequence[Opened], devices: Devices, track: Track) -> Measurement:
    """What the plan needs to know, from the journal if it was measured before."""
    if isinstance(plan, AdapterPlan):
        if plan.found and (staging.contents is None or staging.contents.measured is None):
            with naming(plan.output):
                staging.journal.measured({"ranks": {name: [*found] for name, found in plan.found.items()}})
        return Measurement(NOTHING_MEASURED, 0, 0)
    if staging.contents is not None and staging.contents.measured is not None and plan.needs:
        with suppress(KeyError, TypeError, ValueError, AttributeError):  # no journal of ours would
            return Measurement(Statistics.of(staging.contents.measured, plan.number_of_models), 0, 0)
    measurement = measure(plan, sources, devices, track)
    if plan.needs:
        with naming(plan.output):
            staging.journal.measured(measurement.statistics.to_json())
    return measurement


def _with_scales(
    staging: Making, plan: Plan, measurement: Measurement, how: tuple[Sequence[Opened], Devices, Track]
) -> tuple[Plan, Measurement]:
    """The plan with the scales of what is stored in 8 bits, from the journal if they were measured before."""
    if staging.contents is not None and staging.contents.measured is not None:
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            known = Statistics.of(staging.contents.measured, plan.number_of_models)
            if (found := with_scales(plan, known)) is not None:
                return found, measurement
    nbytes = plan.bytes_of_pass(SCALES)
    plan = measure_scales(plan, *how)
    with naming(plan.output):
        staging.journal.measured(plan.statistics.to_json())
    return plan, Measurement(plan.statistics, measurement.passes + 1, measurement.bytes_read + nbytes)


def _verify(staging: Making, records: Mapping[str, FileRecord]) -> None:
    """Read back what was written.

    Raises:
        OutputError: the disk gives something else.
    """
    staging.sync()
    for name, written in records.items():
        found = staging.digest(name)
        if found != written.digest:
            raise OutputError(
                f"{staging.output}: {name} reads back as {found}, but {written.digest} was written",
                hint="The disk, or the memory on the way to it, does not return what it got. Write to another disk.",
            )


def _refuse_misread(staging: Making, plan: AnyPlan) -> None:
    """Have the safetensors package open what was written.

    Raises:
        OutputError: it reads something else than what was planned.
    """
    planned: list[dict[str, TensorInfo]] = [{} for _ in plan.outputs]
    for tensor in plan.tensors:
        planned[tensor.file][tensor.name.removeprefix(plan.outputs[tensor.file].prefix)] = tensor.info
    for file, tensors in zip(plan.outputs, planned, strict=True):
        with staging.opened(file.name, file.head) as path:
            refuse_misread(path, tensors, called=f"{plan.output}: {file.name}")
