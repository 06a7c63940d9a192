"""Parts of a divided run: each measures a share, or writes ranges of the output, and says so in a record.

What a part needs of earlier stages it takes from the records of their parts; of those that have none yet it makes them
itself, so that parts may run in any order. Who comes second with the same finds the same, and its record is not needed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.devices import Devices
from lines_cli.engine.fast import prepare
from lines_cli.engine.input_files import allow_open_files, opened, refuse_changed, with_views
from lines_cli.engine.jobs import job_of, worker_of
from lines_cli.engine.measure import Track, untracked
from lines_cli.engine.measure_share import Common, How, NotOfAShareError, measure_share, with_shares
from lines_cli.engine.pool import Pool
from lines_cli.engine.write import OutputRange, Target, Write, output_ranges
from lines_cli.errors import OutputError, as_argument
from lines_cli.plan.division import WRITING, Division, Part
from lines_cli.plan.plan import SCALES, THRESHOLDS, Plan
from lines_cli.plan.resolve import resolve
from lines_cli.plan.resources import Resources
from lines_cli.storage.destination import naming
from lines_cli.storage.digest import GrowingDigest
from lines_cli.storage.journal import Json, WrittenRange, line_of
from lines_cli.storage.part_records import MEASURED
from lines_cli.storage.shared_staging import Shared

_SAMPLE = "sample"


@dataclass(frozen=True, slots=True)
class PartDone:
    """What became of a part: how long it took, whether it was done before, and what a person should know of it."""

    part: Part
    seconds: float
    before: bool = False
    remark: str | None = None


def run_parts(
    plan: Plan,
    division: Division,
    staging: Shared,
    wanted: Sequence[Part],
    resources: Resources | None = None,
    *,
    track: Track = untracked,
    done: Callable[[PartDone], None] = lambda _: None,
) -> list[PartDone]:
    """Do parts of a run, those that were not done before.

    Args:
        plan: of the whole run, not yet resolved.
        division: its parts.
        staging: where they write; open.
        wanted: which of them.
        resources: workers, device, chunk; they change no byte.
        track: wraps the stream of byte counts of each part.
        done: is told of each part, as soon as it is done.

    Raises:
        DataError: NaN or Inf in an input, or an overflow in the output dtype.
        CheckpointError: an input ends early, cannot be read, or has changed.
        OutputError: the output cannot be written.
    """
    found: list[PartDone] = []
    devices = Devices(resources or Resources())
    remark = prepare(plan, devices, share=len(wanted) / len(division.parts))
    with _Running(plan, division, staging, devices, track) as running:
        for part in wanted:
            started = time.perf_counter()
            before = staging.is_done(part.number) and not running.is_open(part)
            if not before:
                running(part)
            found.append(PartDone(part, time.perf_counter() - started, before, None if found else remark))
            done(found[-1])
    return found


class _Running:
    """The open inputs, and what is known so far of what was measured."""

    def __init__(self, plan: Plan, division: Division, staging: Shared, devices: Devices, track: Track) -> None:
        self.plan, self.division, self.staging, self.track = plan, division, staging, track
        self.records = staging.records
        self.devices = devices
        self._reached = 0  # the stages before this one are measured, and the plan knows what they found
        self._stack = ExitStack()
        self._common: Common | None = None
        self._looks = 0

    def __enter__(self) -> _Running:
        keep_freed_memory()
        allow_open_files(len(self.plan.paths) + 2 * len(self.plan.outputs))
        try:
            self._fds = self._stack.enter_context(opened(self.plan.paths))
            self._stack.enter_context(self.devices.bounded())
            self._refuse_changed()
            self._sources = with_views(self._fds, self.plan.views)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _refuse_changed(self) -> None:
        refuse_changed(self.plan.paths, self._fds, self.plan.states)

    def _how(self, part: Part) -> How:
        called = f"part {part.number}/{len(self.division.parts)}"
        return (
            self._sources,
            self.devices,
            lambda title, total, stream: self.track(f"{called}: {title.partition(' 1/')[0]}", total, stream),
        )

    def __call__(self, part: Part) -> None:
        """Do a part, and before it what it needs of others."""
        self._reach(part.stage)
        if self.division.stages[part.stage] == WRITING:
            self._write(part)
        elif self._is_common(part.stage):
            self._look(part)
        else:
            self._measure(part)

    # --- what is measured ---

    def _is_common(self, stage: int) -> bool:
        return self.division.stages[stage] == THRESHOLDS and self.plan.trims_globally

    def is_open(self, part: Part) -> bool:
        """Whether a part with a record has more to do: a further look for thresholds, where one did not settle them."""
        if part.stage < self._reached or not self._is_common(part.stage):
            return False
        self._begin_common(part)
        assert self._common is not None
        while not self._common.is_over:
            if self._of_look(part) is None:
                return True
            if any(self._of_look(other) is None for other in self.division.of_stage(part.stage)):
                return False  # it waits for others
            self._settle(part.stage)
        return False

    def _reach(self, stage: int) -> None:
        """Have all stages before this one measured, and the plan know what they found."""
        while self._reached < stage:
            now = self._reached
            parts = self.division.of_stage(now)
            if self.division.stages[now] == SCALES:
                self._resolve()
            if self._is_common(now):
                self.plan = self._all_looks(parts)
            else:
                self.plan = self._all_shares(now, parts)
            self._reached += 1
        if self.division.stages[stage] in (SCALES, WRITING):
            self._resolve()
        if self.division.stages[stage] == WRITING and stage and not self.records.is_there(MEASURED):
            with naming(self.staging.output):
                self.records.write(MEASURED, [self.plan.statistics.to_json()])

    def _resolve(self) -> None:
        if self.plan.needs:
            self.plan = resolve(self.plan, self.plan.statistics)

    def _all_shares(self, stage: int, parts: Sequence[Part]) -> Plan:
        what = self.division.stages[stage]
        for part in parts:
            if not self.records.is_there(str(part.number)):
                self._measure(part)
        shares = [self._only_line(str(part.number)) for part in parts]
        try:
            return with_shares(self.plan, what, shares)
        except NotOfAShareError as error:
            raise self._damaged(what) from error

    def _measure(self, part: Part) -> None:
        found = measure_share(self.plan, self.division.stages[part.stage], part.tensors, self._how(part))
        self._refuse_changed()
        with naming(self.staging.output):
            self.records.write(str(part.number), [found])

    # --- thresholds that all tensors have in common: look by look ---

    def _begin_common(self, part: Part) -> None:
        if self._common is not None:
            return
        common = Common(self.plan)
        if not self.records.is_there(_SAMPLE):
            sample = common.sample(self._how(part))
            with naming(self.staging.output):
                self.records.write(_SAMPLE, [sample])
        try:
            common.begin(self._only_line(_SAMPLE))  # the first that was written counts
        except NotOfAShareError as error:
            raise self._damaged(THRESHOLDS) from error
        self._common, self._looks = common, 1

    def _name_of_look(self, part: Part) -> str:
        return str(part.number) if self._looks == 1 else f"{part.number}-{self._looks}"

    def _of_look(self, part: Part) -> list[Json] | None:
        return self.records.read(self._name_of_look(part))

    def _look(self, part: Part) -> None:
        self._begin_common(part)
        assert self._common is not None
        parts = self.division.of_stage(part.stage)
        while not self._common.is_over and self._of_look(part) is not None:
            if any(self._of_look(other) is None for other in parts):
                return  # it is the others' turn
            self._settle(part.stage)
        if not self._common.is_over:
            self._take_look(part)

    def _take_look(self, part: Part) -> None:
        assert self._common is not None
        found = self._common.look(part.tensors, self._how(part))
        self._refuse_changed()
        with naming(self.staging.output):
            self.records.write(self._name_of_look(part), [found])

    def _settle(self, stage: int) -> None:
        assert self._common is not None
        shares = [self._only_line(self._name_of_look(part)) for part in self.division.of_stage(stage)]
        try:
            self._common.settle(shares)
        except NotOfAShareError as error:
            raise self._damaged(THRESHOLDS) from error
        self._looks += 1

    def _all_looks(self, parts: Sequence[Part]) -> Plan:
        for part in parts[:1]:
            self._begin_common(part)
        if self._common is None:
            return self.plan
        while not self._common.is_over:
            for part in parts:
                if self._of_look(part) is None:
                    self._take_look(part)
            self._settle(parts[0].stage)
        return self._common.found()

    def _only_line(self, name: str) -> Json:
        lines = self.records.read(name)
        return lines[0] if lines else {}

    def _damaged(self, what: str) -> OutputError:
        return OutputError(
            f"{self.records.shelf.folder}: what parts have measured there of {what} does not fit together",
            hint=f"Discard it, and plan again: lines clean {as_argument(self.staging.output)}",
        )

    # --- what is written ---

    def _write(self, part: Part) -> None:
        self.staging.until_done(part.number, lambda: self._write_once(part))

    def _write_once(self, part: Part) -> None:
        plan = self.plan
        own = {number: (plan.outputs[number].name, plan.outputs[number].nbytes) for number, _, _ in part.ranges}
        lines: list[Json] = []
        with self.staging.files(part.number, own) as files:
            targets = [
                Target(files.targets.get(number, _NOT_OF_THIS_PART), GrowingDigest(file.nbytes))
                for number, file in enumerate(plan.outputs)
            ]
            job = job_of(plan, targets, self.devices, measures=True)
            ranges: Iterable[OutputRange[Any]] = output_ranges(plan.outputs, plan.tensors, self.division.step)
            spans = (span for span in ranges if _is_within(span, part))
            worker = worker_of(plan, self._sources, self.devices)
            pool: Pool[Any, Any, Any] = Pool(worker, spans, job, self.devices, at_end=files.stop)
            journal: Any = _Into(lines.append)
            with closing(pool.in_order()) as results:
                done = (job.take(result, journal) for result in results)
                for _ in self._how(part)[2](WRITING, part.writes, done):
                    pass
            self._refuse_changed()
            if isinstance(job, Write) and job.looked:
                lines.append({"unchanged": sorted(job.unchanged)})
            self.staging.finish(part.number, files, lines)


def _is_within(span: OutputRange[Any], part: Part) -> bool:
    return any(span.file == file and start <= span.start < end for file, start, end in part.ranges)


class _NotOfThisPart:
    """A file that a part does not write."""

    def write(self, view: memoryview, offset: int) -> None:
        raise AssertionError(f"{len(view)} bytes at {offset} are another part's")


_NOT_OF_THIS_PART = _NotOfThisPart()


class _Into:
    """A part's record, as the job that writes takes a journal."""

    def __init__(self, add: Callable[[Json], None]) -> None:
        self._add = add

    def wrote(self, part: WrittenRange) -> None:
        """A range that was written."""
        self._add(line_of(part))
