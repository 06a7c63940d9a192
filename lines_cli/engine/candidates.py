"""Many results of one recipe that differ in coefficients: made one after another in one process.

What does not depend on coefficients is done once: statistics are measured once, and where several models are merged
the merged task vector is stored in a scratch file, so that each candidate after that is `base + c(l) * tau`. Nothing is
flushed to the disk and no digest is taken; the bytes are those of a run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from lines_cli.checkpoint.formulas import Difference
from lines_cli.checkpoint.header import EXACT_DTYPES, StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import FileState
from lines_cli.engine.arithmetic import TORCH_DTYPES
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.chunks import PlanChunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened, allow_open_files, opened, refuse_changed, with_views
from lines_cli.engine.jobs import worker_of
from lines_cli.engine.measure import Track, measure, untracked
from lines_cli.engine.merge_chunk import merge_chunk
from lines_cli.engine.pool import Pool
from lines_cli.engine.workers import Worker
from lines_cli.engine.write import Write
from lines_cli.errors import MismatchError, printable
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import open_inputs
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.resolve import resolve
from lines_cli.plan.resources import Resources
from lines_cli.plan.statistics import NOTHING_MEASURED, Needs, Statistics
from lines_cli.plan.tensors import STORED, Segment
from lines_cli.recipe.schema import Recipe, Source
from lines_cli.storage.destination import naming
from lines_cli.storage.files import write_from


class Candidates:
    """Makes candidates.

    Args:
        resources: workers, device, chunk.
        scratch: a folder in which merged task vectors may be stored; None stores none.
        track: wraps the stream of byte counts of each pass.
    """

    def __init__(
        self, resources: Resources | None = None, *, scratch: Path | None = None, track: Track = untracked
    ) -> None:
        self._devices, self._scratch, self._track = Devices(resources or Resources()), scratch, track
        self._measured: dict[tuple[str, Needs], Statistics] = {}
        self._states: dict[Path, FileState] = {}
        self._merged: tuple[str, _Merged] | None = None  # the last one: a scratch file is as large as a model
        keep_freed_memory()

    def plan(self, recipe: Recipe, output: Path) -> Plan:
        """The resolved plan of a candidate.

        Raises:
            LinesError: as `make_plan`, and as a run would end that measures.
        """
        plan = make_plan(recipe, open_inputs(recipe, quiet=True), output)
        for path, state in zip(plan.paths, plan.states, strict=True):
            if self._states.setdefault(path, state) != state:
                with opened([path]) as fds:
                    refuse_changed([path], fds, [self._states[path]])
        if plan.needs:
            key = (_but_for_coefficients(recipe), plan.needs)
            if key not in self._measured:
                with opened(plan.paths) as fds, self._devices.bounded():
                    sources = with_views(fds, plan.views)
                    self._measured[key] = measure(plan, sources, self._devices, self._track).statistics
            plan = resolve(plan, self._measured[key])
        return plan

    def write(self, plan: Plan, folder: Path) -> None:
        """Write a candidate's weights and all that stands beside them into an empty folder.

        Raises:
            LinesError: as a run.
        """
        carried = self._with_merged(plan)
        allow_open_files(len(carried.paths) + len(plan.outputs))
        with naming(folder):
            folder.mkdir(parents=True, exist_ok=True)
            for sidecar in plan.sidecars:
                path = folder / sidecar.name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(sidecar.read())
        with naming(folder), _files(folder, plan) as fds, opened(carried.paths) as fds_of_inputs:
            job = _ToFiles(carried, fds)
            self._run(carried, fds_of_inputs, job.of_item, _all(carried), "writing")

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
        with opened(carried.paths) as fds_of_inputs:
            job = _ToTensors(carried, into)
            self._run(carried, fds_of_inputs, job.of_item, _all(carried), "computing")

    def close(self) -> None:
        """Remove the scratch file, if there is one."""
        if self._merged is not None:
            self._merged[1].path.unlink(missing_ok=True)
            self._merged = None

    # --- merged task vectors ---

    def _with_merged(self, plan: Plan) -> Plan:
        """The plan, where merged task vectors are read from a scratch file if that is less work."""
        recipe = plan.recipe
        if self._scratch is None or recipe.method.takes != "task vectors" or not plan.inputs.has_base:
            return plan
        if all(plan.gives_one(tensor.values) for tensor in plan.tensors if tensor.spec.paired):
            return plan
        key = _but_for_coefficients(recipe)
        if self._merged is None or self._merged[0] != key:
            self.close()
            self._merged = key, self._merge(plan)
        return self._merged[1].put_into(plan)

    def _merge(self, plan: Plan) -> _Merged:
        assert self._scratch is not None
        self._scratch.mkdir(parents=True, exist_ok=True)
        merged = _Merged(self._scratch / "merged.bin", plan)
        with naming(merged.path), opened(plan.paths) as fds_of_inputs:
            fd = os.open(merged.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:

                def store(worker: Worker, item: list[PlanChunk]) -> int:
                    for chunk in worker.cut(item):
                        values = merge_chunk(worker, chunk).values.cpu().contiguous()
                        offset = merged.offset_of(chunk.tensor) + (chunk.segment.start + chunk.first) * values.itemsize
                        write_from(fd, _bytes_of(values), offset)
                    return sum(chunk.nbytes for chunk in item)

                self._run(plan, fds_of_inputs, store, _mergeable(plan), "merging the task vectors")
            finally:
                os.close(fd)
        return merged

    def _run(
        self,
        plan: Plan,
        fds: Sequence[Opened],
        job: Callable[[Worker, list[PlanChunk]], int],
        segments: Iterable[tuple[TensorPlan, Segment]],
        title: str,
    ) -> None:
        devices, listed = self._devices, list(segments)
        with devices.bounded():
            views = [*plan.views, *({},) * (len(plan.paths) - len(plan.views))]  # of a scratch file none
            pool = Pool(worker_of(plan, with_views(fds, views), devices), items_of(listed), job, devices)
            total = sum(segment.numel * itemsize(source.dtype) for _, segment in listed for source in segment.sources)
            with closing(pool.in_order()) as done:
                for _ in self._track(title, total, done):
                    pass


def _all(plan: Plan) -> Iterator[tuple[TensorPlan, Segment]]:
    return ((tensor, segment) for tensor in plan.tensors for segment in tensor.segments)


def _but_for_coefficients(recipe: Recipe) -> str:
    """What of a recipe decides statistics and merged task vectors."""
    return recipe.model_copy(update={"lines": None}).model_dump_json()


def _mergeable(plan: Plan) -> Iterator[tuple[TensorPlan, Segment]]:
    """What is merged where no coefficient is 0 or 1."""
    for tensor in plan.tensors:
        if tensor.spec.paired and tensor.spec.dtype not in EXACT_DTYPES:
            yield from ((tensor, segment) for segment in tensor.spec.segments if segment.models)


class _Merged:
    """A scratch file with merged task vectors, in the dtype of the arithmetic."""

    def __init__(self, path: Path, plan: Plan) -> None:
        self.path = path
        self._infos: dict[str, TensorInfo] = {}
        end = 0
        for tensor, _ in _mergeable(plan):
            if tensor.name not in self._infos:
                dtype = STORED["float64" if tensor.in_float64 else "float32"]
                nbytes = tensor.info.numel * itemsize(dtype)
                self._infos[tensor.name] = TensorInfo(dtype, tensor.info.shape, end, nbytes)
                end += -(-nbytes // 8) * 8

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


# --- where a candidate goes ---


@contextmanager
def _files(folder: Path, plan: Plan) -> Iterator[list[int]]:
    """The weight files, open, with their heads written."""
    fds: list[int] = []
    try:
        for file in plan.outputs:
            fds.append(os.open(folder / file.name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
            os.ftruncate(fds[-1], file.nbytes)
            write_from(fds[-1], memoryview(file.head), 0)
        yield fds
    finally:
        for fd in fds:
            os.close(fd)


class _ToFiles(Write):
    """The job of making some chunks, and writing each to its place."""

    def __init__(self, plan: Plan, fds: Sequence[int]) -> None:
        super().__init__(plan, [])
        self._fds = fds

    def of_item(self, worker: Worker, item: list[PlanChunk]) -> int:
        for chunk in worker.cut(item):
            raw = self._make(worker, chunk, type(self.tally).nothing(self.models))
            info = chunk.tensor.info
            offset = info.offset + (chunk.segment.start + chunk.first) * itemsize(info.dtype)
            write_from(self._fds[chunk.tensor.file], raw, offset)
        return sum(chunk.nbytes for chunk in item)


class _ToTensors(Write):
    """The job of making some chunks, and putting each into its tensor."""

    def __init__(self, plan: Plan, into: Mapping[str, torch.Tensor]) -> None:
        super().__init__(plan, [])
        self._into = into

    def of_item(self, worker: Worker, item: list[PlanChunk]) -> int:
        for chunk in worker.cut(item):
            raw = self._make(worker, chunk, type(self.tally).nothing(self.models))
            first = chunk.segment.start + chunk.first
            into = self._into[chunk.tensor.name].view(-1)[first : first + chunk.numel]
            into.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(into.dtype))
        return sum(chunk.nbytes for chunk in item)


def _refuse_other(tensor: TensorPlan, into: Mapping[str, torch.Tensor]) -> None:
    """Refuse a module that cannot hold a candidate's tensor as it is."""
    found = into.get(tensor.name)
    if found is None:
        raise MismatchError(
            f"the model has no tensor {printable(tensor.name)}",
            hint="Load it with the class that the checkpoint was saved from (architectures in its config.json).",
        )
    dtype = TORCH_DTYPES.get(tensor.info.dtype, found.dtype)
    if tuple(found.shape) != tuple(tensor.info.shape) or found.dtype != dtype or not found.is_contiguous():
        raise MismatchError(
            f"the model's {printable(tensor.name)} is {found.dtype} {list(found.shape)}, the candidate's {dtype} "
            f"{list(tensor.info.shape)}",
            hint="Load the model in the checkpoint's dtype, or say dtype: in the recipe.",
        )


def _bytes_of(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy()).cast("B")  # type: ignore[arg-type]
