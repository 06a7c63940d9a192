"""Many results of one recipe that differ in coefficients: made one after another in one process.

What does not depend on coefficients is done once: statistics are measured once, and where several models are merged
the merged task vector is kept, in a scratch file or in memory, so that each candidate after that is
`base + c(l) * tau`. Nothing is flushed to the disk and no digest is taken; the bytes are those of a run.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

import torch

from lines_cli.checkpoint.formulas import Difference
from lines_cli.checkpoint.header import StoredTensor, itemsize
from lines_cli.checkpoint.reader import FileState
from lines_cli.engine.arithmetic import TORCH_DTYPES
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.candidate_files import CandidateFiles, same_of
from lines_cli.engine.chunks import PlanChunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened, Sources, allow_open_files, opened, refuse_changed, with_views
from lines_cli.engine.jobs import worker_of
from lines_cli.engine.measure import Track, measure, untracked
from lines_cli.engine.merge_chunk import merge_chunk
from lines_cli.engine.pool import Pool
from lines_cli.engine.scales import measure_scales
from lines_cli.engine.workers import Worker
from lines_cli.engine.write import Write
from lines_cli.errors import MismatchError, printable
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.merged import infos_of_merged, mergeable, nbytes_merged
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.resolve import resolve
from lines_cli.plan.resources import Resources
from lines_cli.plan.statistics import NOTHING_MEASURED, Needs, Statistics
from lines_cli.plan.tensors import Segment
from lines_cli.recipe.schema import Recipe, Source
from lines_cli.storage.destination import naming
from lines_cli.storage.files import write_from


@dataclass
class Known:
    """What is known of the inputs of candidates: plain values, which hold in other processes, too.

    Attributes:
        states: the files, as they were first seen.
        measured: statistics, by what decides them.
    """

    states: dict[Path, FileState] = field(default_factory=dict)
    measured: dict[tuple[object, Needs], Statistics] = field(default_factory=dict)


class Candidates:
    """Makes candidates.

    Args:
        resources: workers, device, chunk.
        scratch: a folder in which merged task vectors may be stored; None keeps them in memory, if they take at most
            half of what is free.
        track: wraps the stream of byte counts of each pass.
        known: what others have measured.
        keep_merged: whether merged task vectors are stored; it is not worth it for a candidate or two.
    """

    def __init__(
        self,
        resources: Resources | None = None,
        *,
        scratch: Path | None = None,
        track: Track = untracked,
        known: Known | None = None,
        keep_merged: bool = True,
    ) -> None:
        self._devices, self._scratch, self._track = Devices(resources or Resources()), scratch, track
        self._files, self._keep_merged = CandidateFiles(), keep_merged
        self.known = known or Known()
        self._merged: tuple[object, Merged] | None = None  # the last one: it is as large as a model
        keep_freed_memory()

    def plan(self, recipe: Recipe, output: Path) -> Plan:
        """The resolved plan of a candidate.

        Raises:
            LinesError: as `make_plan`, and as a run would end that measures.
        """
        plan = make_plan(recipe, open_inputs(recipe, quiet=True), output)
        for path, state in zip(plan.paths, plan.states, strict=True):
            if self.known.states.setdefault(path, state) != state:
                with opened([path]) as fds:
                    refuse_changed([path], fds, [self.known.states[path]])
        if plan.needs:
            key, measured = (same_of(plan), plan.needs), self.known.measured
            if key not in measured:
                with opened(plan.paths) as fds, self._devices.bounded():
                    sources = with_views(fds, plan.views)
                    measured[key] = measure(plan, sources, self._devices, self._track).statistics
            plan = resolve(plan, measured[key])
        return plan

    def write(self, plan: Plan, folder: Path, *, before: Path | None = None) -> None:
        """Write a candidate's weights and all that stands beside them.

        Args:
            plan: from `plan`.
            folder: which is there already only if it is `before`.
            before: the folder of an earlier candidate that is of no use any more. It is renamed, and what is the same
                in both stays in it.

        Raises:
            LinesError: as a run.
        """
        carried = self._with_merged(plan)
        allow_open_files(len(carried.paths) + len(plan.outputs))
        with naming(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            if before is not None:
                self._files.take_over(before, folder)
            folder.mkdir(exist_ok=True)
            for sidecar in plan.sidecars:
                path = folder / sidecar.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(sidecar.read())
        with self._sources(carried) as sources:
            carried = self._with_scales(carried, sources)
            with naming(folder), self._files.opened(carried, same_of(plan), folder) as files:
                job, title = _ToFiles(carried, files.fds), "writing"
                self._run(carried, sources, job.of_item, segments_of(files.tensors), title)

    def forget(self, folder: Path) -> None:
        """Remove a candidate's folder, if it is there."""
        self._files.forget(folder)

    def put(self, plan: Plan, into: Mapping[str, torch.Tensor]) -> None:
        """Put a candidate's tensors into those of a live module.

        Args:
            plan: from `plan`.
            into: by name, each of the shape and dtype of the plan's tensor; on any device.

        Raises:
            MismatchError: one is missing, or of another shape or dtype.
            LinesError: as a run.
        """
        for tensor in plan.tensors:
            _refuse_other(tensor, into)
        carried = self._with_merged(plan)
        for device in {tensor.device for tensor in into.values() if tensor.is_cuda}:
            torch.cuda.synchronize(device)  # what was computed with the last candidate is done with it
        with self._sources(carried) as sources:
            carried = self._with_scales(carried, sources)
            job = _ToTensors(carried, into)
            self._run(carried, sources, job.of_item, segments_of(carried.tensors), "computing")

    def close(self) -> None:
        """Let go of merged task vectors."""
        if self._merged is not None:
            self._merged[1].close()
            self._merged = None

    def _with_scales(self, plan: Plan, sources: Sequence[Opened]) -> Plan:
        """The plan with the scales of what is stored in 8 bits: these depend on coefficients."""
        if not plan.to_quantise:
            return plan
        with self._devices.bounded():
            return measure_scales(plan, sources, self._devices, self._track)

    @contextmanager
    def _sources(self, plan: Plan) -> Iterator[Sources]:
        """The inputs of a plan, open; behind them merged task vectors, if it reads any."""
        merged = self._merged[1] if self._merged is not None and self._merged[1].path in plan.paths else None
        paths = [path for path in plan.paths if merged is None or path != merged.path]
        with opened(paths) as fds:
            sources = with_views(fds, plan.views)
            yield sources if merged is None else Sources([*sources, merged.opened])

    # --- merged task vectors ---

    def _with_merged(self, plan: Plan) -> Plan:
        """The plan, where merged task vectors are read that were kept, if that is less work."""
        if not self._keep_merged or not nbytes_merged(plan):
            return plan
        key = same_of(plan)
        if self._merged is None or self._merged[0] != key:
            self.close()
            if (merged := self._merge(plan)) is None:
                return plan
            self._merged = key, merged
        return self._merged[1].put_into(plan)

    def _merge(self, plan: Plan) -> Merged | None:
        """None where there is no room for it in memory."""
        if self._scratch is not None:
            self._scratch.mkdir(parents=True, exist_ok=True)
        elif 2 * nbytes_merged(plan) > free_memory():
            return None
        with naming(self._scratch or Path("memory")):
            merged = Merged(plan, self._scratch)
        behind = merged.opened
        try:
            with self._sources(plan) as sources, naming(merged.path):

                def store(worker: Worker, item: list[PlanChunk]) -> int:
                    for chunk in worker.cut(item):
                        values = merge_chunk(worker, chunk).values.cpu().contiguous()
                        offset = merged.offset_of(chunk.tensor) + (chunk.segment.start + chunk.first) * values.itemsize
                        merged.write(behind, _bytes_of(values), offset)
                    return sum(chunk.nbytes for chunk in item)

                self._run(plan, sources, store, mergeable(plan), "merging the task vectors")
        except BaseException:
            merged.close()
            raise
        return merged

    def _run(
        self,
        plan: Plan,
        sources: Sources,
        job: Callable[[Worker, list[PlanChunk]], int],
        segments: Iterable[tuple[TensorPlan, Segment]],
        title: str,
    ) -> None:
        devices, listed = self._devices, list(segments)
        with devices.bounded():
            pool = Pool(worker_of(plan, sources, devices), items_of(listed), job, devices)
            total = sum(segment.numel * itemsize(source.dtype) for _, segment in listed for source in segment.sources)
            with closing(pool.in_order()) as done:
                for _ in self._track(title, total, done):
                    pass


def segments_of(tensors: Iterable[TensorPlan]) -> Iterator[tuple[TensorPlan, Segment]]:
    """All that tensors are made of."""
    return ((tensor, segment) for tensor in tensors for segment in tensor.segments)


class Merged:
    """Merged task vectors, in the dtype of the arithmetic.

    Args:
        plan: whose.
        scratch: a folder for the file that has them; None keeps them in memory.
    """

    def __init__(self, plan: Plan, scratch: Path | None) -> None:
        self.path = (
            scratch or Path("memory")
        ) / "merged.bin"  # in messages: the file has no name, so none can change it
        self._infos = infos_of_merged(plan)
        self._held: _InMemory | BinaryIO
        self._held = _InMemory(nbytes_merged(plan)) if scratch is None else TemporaryFile(dir=scratch)  # noqa: SIM115 - `close`

    @property
    def opened(self) -> Opened:
        """To be read, or written."""
        return self._held if isinstance(self._held, _InMemory) else self._held.fileno()

    @staticmethod
    def write(into: Opened, values: memoryview, offset: int) -> None:
        """Write some entries to their place."""
        if isinstance(into, _InMemory):
            into.view[offset : offset + len(values)] = values
        else:
            assert isinstance(into, int)
            write_from(into, values, offset)

    def close(self) -> None:
        """Let go of it."""
        if isinstance(self._held, _InMemory):
            self._held = _InMemory(0)
        else:
            self._held.close()

    def offset_of(self, tensor: TensorPlan) -> int:
        """Where a tensor begins."""
        return self._infos[tensor.name].offset

    def put_into(self, plan: Plan) -> Plan:
        """The plan of the same result, of which this is the only model's task vector."""
        number = len(plan.paths)
        lines = plan.recipe.lines
        alone = Recipe(
            base_model=plan.recipe.base_model,
            models=(Source(model=plan.recipe.merged[0].model),),
            lines=lines,
            dtype=plan.recipe.dtype,
            rounding=plan.recipe.rounding,
            rounding_seed=plan.recipe.rounding_seed,
            allow_nonfinite=plan.recipe.allow_nonfinite,
        )
        values = alone.values("", 0.0)
        tensors = tuple(
            tensor._replace(
                spec=tensor.spec._replace(values=values),
                segments=tuple(self._of_one(tensor, segment, number) for segment in tensor.segments),
            )
            for tensor in plan.tensors
        )
        return replace(plan, recipe=alone, paths=(*plan.paths, self.path), tensors=tensors, statistics=NOTHING_MEASURED)

    def _of_one(self, tensor: TensorPlan, segment: Segment, number: int) -> Segment:
        if not segment.models or tensor.name not in self._infos:
            return segment
        assert segment.base is not None
        info = self._infos[tensor.name]
        step = Difference(tensor.name, (("update", StoredTensor(number, info)),), info.shape)
        model = segment.base._replace(steps=(*segment.base.steps, step), first=segment.start)
        return segment._replace(base=segment.base._replace(first=segment.start), models=(model,))


def free_memory() -> int:
    """Bytes of memory that this machine has left, as far as that can be told; else half of what it has."""
    with suppress(OSError, ValueError, StopIteration), open("/proc/meminfo", encoding="ascii") as file:
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return 0


class _InMemory:
    """Bytes that are read as a file is."""

    def __init__(self, nbytes: int) -> None:
        self.view = memoryview(bytearray(0) if not nbytes else mmap.mmap(-1, nbytes))

    def read_into(self, view: memoryview, offset: int) -> int:
        found = self.view[offset : offset + len(view)]
        view[: len(found)] = found
        return len(found)


# --- where a candidate goes ---


class _ToFiles(Write):
    """The job of making some chunks, and writing each to its place."""

    def __init__(self, plan: Plan, fds: Sequence[int | None]) -> None:
        super().__init__(plan, [])
        self._fds = fds

    def of_item(self, worker: Worker, item: list[PlanChunk]) -> int:
        for chunk in worker.cut(item):
            raw = self._make(worker, chunk, self.nothing())
            info = chunk.tensor.info
            offset = info.offset + (chunk.segment.start + chunk.first) * itemsize(info.dtype)
            fd = self._fds[chunk.tensor.file]
            assert fd is not None, "a tensor of a file that is left as it is"
            write_from(fd, raw, offset)
        return sum(chunk.nbytes for chunk in item)


class _ToTensors(Write):
    """The job of making some chunks, and putting each into its tensor."""

    def __init__(self, plan: Plan, into: Mapping[str, torch.Tensor]) -> None:
        super().__init__(plan, [])
        self._into = into

    def of_item(self, worker: Worker, item: list[PlanChunk]) -> int:
        for chunk in worker.cut(item):
            raw = self._make(worker, chunk, self.nothing())
            if len(raw):
                into = self._place_of(chunk)
                into.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(into.dtype))
        if worker.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # the module is used in another stream
        return sum(chunk.nbytes for chunk in item)

    def _place_of(self, chunk: PlanChunk) -> torch.Tensor:
        first = chunk.segment.start + chunk.first
        return self._into[chunk.tensor.name].view(-1)[first : first + chunk.numel]

    def _stored(self, worker: Worker, chunk: PlanChunk) -> torch.Tensor:
        into = self._place_of(chunk)
        return into if into.device == worker.device else super()._stored(worker, chunk)

    def _raw(self, worker: Worker, chunk: PlanChunk) -> memoryview:
        return memoryview(b"") if self._place_of(chunk).device == worker.device else super()._raw(worker, chunk)


def _refuse_other(tensor: TensorPlan, into: Mapping[str, torch.Tensor]) -> None:
    """Refuse a module that cannot hold a candidate's tensor as it is."""
    found = into.get(tensor.name)
    if found is None:
        raise MismatchError(
            f"the model has no tensor {printable(tensor.name)}",
            hint="Load it with the class that the checkpoint was saved from (architectures in its config.json).",
        )
    dtype = TORCH_DTYPES.get(tensor.info.dtype, found.dtype)
    if tuple(found.shape) != tuple(tensor.info.shape) or found.dtype != dtype:
        raise MismatchError(
            f"the model's {printable(tensor.name)} is {found.dtype} {list(found.shape)}, the candidate's {dtype} "
            f"{list(tensor.info.shape)}",
            hint="Load the model in the checkpoint's dtype, or say dtype: in the recipe.",
        )
    if not found.is_contiguous():
        raise MismatchError(
            f"the model's {printable(tensor.name)} is not contiguous: {list(found.shape)} with strides "
            f"{list(found.stride())}, and a candidate is written in the order of its bytes",
            hint="Replace its data with parameter.data.contiguous() first.",
        )


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
