"""Tensors in memory in place of files: the same plans, workers and arithmetic, so that the bytes are those that the
files would hold.

An input is read through `read_into`, as a file is, in chunks; nothing of a model is copied whole. Results are put into
tensors that are made for them, but for those that come to what an input holds: these are the input's own.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from lines_cli.api import arguments
from lines_cli.api.calls import Dtype, Missing, Outside, Resize, Rounding, config_values, state_dict_of
from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint, as_model
from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.chunks import PlanChunk, items_of
from lines_cli.engine.devices import Devices
from lines_cli.engine.fast import prepare
from lines_cli.engine.measure import Track, measure, untracked
from lines_cli.engine.pool import Pool
from lines_cli.engine.scales import measure_scales
from lines_cli.engine.workers import Worker
from lines_cli.engine.write import Write
from lines_cli.errors import RecipeError, UnsupportedError, printable
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import inputs_of
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.resolve import resolve
from lines_cli.plan.tensors import SourceRange
from lines_cli.recipe.validate import edit_recipe, make_recipe

if TYPE_CHECKING:
    from lines_cli.api.arguments import Pairs, Series
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe

Tensors = Mapping[str, torch.Tensor] | torch.nn.Module

_EXACT = {
    name: getattr(torch, dtype)
    for name, dtype in {
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
    }.items()
    if hasattr(torch, dtype)  # unsigned ones came with torch 2.3
}
_DTYPES: dict[str, torch.dtype] = {**TORCH_DTYPES, **_EXACT, "C64": torch.complex64}
_NAMES = {dtype: name for name, dtype in {**_DTYPES, **FLOAT8, "C64": torch.complex64}.items()}
if hasattr(torch, "float8_e8m0fnu"):  # scales of codes; torch 2.7 and later
    _NAMES[torch.float8_e8m0fnu] = "F8_E8M0"
_OF_RESULTS = {name: dtype for dtype, name in _NAMES.items()}


def edit_state_dict(
    base: Tensors,
    ft: Tensors,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    prefix: str | None = None,
    missing: Missing | None = None,
    missing_in_blocks: int | None = None,
    resize: Resize | None = None,
    allow_nonfinite: bool = False,
    dtype: Dtype | None = None,
    rounding: Rounding | None = None,
    rounding_seed: int | None = None,
    config: Any = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    track: Track | None = None,
) -> dict[str, torch.Tensor]:
    """Scale a fine-tune's update over depth, as `lines.edit` does, without files.

    Args:
        base, ft: tensors by name, on the CPU or on CUDA; or modules, whose `state_dict` is taken. They are not changed.
        alpha, ..., rounding_seed: as in `lines.edit`.
        config: of the models, as a mapping or a transformers config: says how many layers there are, and which heads
            are tied. Unless given, each module's own is used.
        workers, device, gpu_memory, track: as in `lines.edit`.

    Returns:
        The tensors of the result, in the order of the fine-tune, each on the device of the fine-tune's. One that comes
        to what an input holds (its coefficient is 0 or 1, or it is only copied) is that input's own tensor.

    Raises:
        LinesError: as `lines.edit`; messages call the two `base` and `ft`.
    """
    recipe = edit_recipe(
        "base",
        "ft",
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=arguments.pairs("--stack", stack),
        filter=arguments.pairs("--filter", filter),
        layers=layers,
        series=series,
        not_layers=not_layers,
        prefix=prefix,
        missing=missing,
        missing_in_blocks=missing_in_blocks,
        resize=resize,
        allow_nonfinite=allow_nonfinite or None,
        dtype=dtype,
        rounding=rounding,
        rounding_seed=rounding_seed,
    )
    resources = arguments.resources(workers, device, gpu_memory)
    return _computed(recipe, {"base": base, "ft": ft}, config, resources, track)


def merge_state_dicts(
    base: Tensors | None,
    models: Iterable[Tensors],
    method: str = "task_arithmetic",
    *,
    parameters: Mapping[str, Any] | None = None,
    model_parameters: Sequence[Mapping[str, Any] | None] | None = None,
    calibrate: Literal["svc"] | None = None,
    lines: Mapping[str, Any] | None = None,
    like: Literal["base", "ft"] | None = None,
    prefix: str | None = None,
    missing: Missing | None = None,
    missing_in_blocks: int | None = None,
    resize: Resize | None = None,
    allow_nonfinite: bool = False,
    dtype: Dtype | None = None,
    rounding: Rounding | None = None,
    rounding_seed: int | None = None,
    config: Any = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    track: Track | None = None,
) -> dict[str, torch.Tensor]:
    """Merge models, as `lines.merge` does, without files.

    Args:
        base: what they were fine-tuned from: tensors by name, or a module; None for a method that needs none.
        models: the fine-tunes, in the same forms. The base may be one of them.
        method: `merge_method` of a recipe.
        parameters: of the method, for all models.
        model_parameters: for each model those that differ.
        calibrate: how what the method makes is calibrated before it is scaled, as in a recipe.
        lines: the scaling over depth, with the keys of a recipe.
        like, prefix, missing, missing_in_blocks, resize, allow_nonfinite, dtype, rounding, rounding_seed: as in a
            recipe.
        config, workers, device, gpu_memory, track: as in `edit_state_dict`.

    Returns:
        The tensors of the result, in the order of the input that it is like (`like`), each on the device of that one's.
        One that comes to what an input holds is that input's own tensor.

    Raises:
        LinesError: as `lines.merge`; messages call the inputs `base` and `models[0]`.
    """
    given: dict[str, Any] = {} if base is None else {"base": base}
    names = []
    for number, model in enumerate(models):
        same = next((name for name, other in given.items() if other is model), None)
        names.append(same or f"models[{number}]")
        given.setdefault(names[-1], model)
    own = list(model_parameters or [None] * len(names))
    if len(own) != len(names):
        raise RecipeError(f"model_parameters: there are {len(own)}, for {len(names)} models")
    values = {
        "merge_method": method,
        "base_model": None if base is None else "base",
        "models": [
            {"model": name, **({"parameters": dict(said)} if said else {})}
            for name, said in zip(names, own, strict=True)
        ],
        "parameters": dict(parameters or {}),
        "calibrate": calibrate,
        "lines": None if lines is None else dict(lines),
        "like": like,
        "prefix": prefix,
        "missing": missing,
        "missing_in_blocks": missing_in_blocks,
        "resize": resize,
        "allow_nonfinite": allow_nonfinite or None,
        "dtype": dtype,
        "rounding": rounding,
        "rounding_seed": rounding_seed,
    }
    recipe = make_recipe({key: value for key, value in values.items() if value is not None}, where="recipe")
    return _computed(recipe, given, config, arguments.resources(workers, device, gpu_memory), track)


class _InMemory(Checkpoint):
    """A checkpoint of which nothing is on the disk."""

    @property
    def folder(self) -> None:
        """None."""
        return


class _Tensors:
    """A side's tensors as one input, in which each begins at an offset of its own.

    Args:
        name: what messages call the side.
        given: its tensors by name, or a module.

    Raises:
        UnsupportedError: it holds what no checkpoint could, or a tensor without numbers.
    """

    def __init__(self, name: str, given: Any) -> None:
        self.name = name
        self.tensors: dict[str, torch.Tensor] = {}
        self.infos: dict[str, TensorInfo] = {}
        given = state_dict_of(given)
        if not isinstance(given, Mapping):
            raise UnsupportedError(f"{name} is a {type(given).__name__}, not a mapping of names to tensors")
        end = 0
        for key, value in given.items():
            tensor = _checked(name, key, value)
            nbytes = tensor.numel() * tensor.element_size()
            self.tensors[key] = tensor
            self.infos[key] = TensorInfo(_NAMES[tensor.dtype], tuple(tensor.shape), end, nbytes)
            end += -(-max(nbytes, 1) // _ALIGNED) * _ALIGNED
        self._all = list(self.tensors.values())
        self._starts = [info.offset for info in self.infos.values()]

    def checkpoint(self, config: Mapping[str, Any]) -> Checkpoint:
        """What a plan is made with.

        Raises:
            UnsupportedError: it is quantised.
        """
        path = Path(self.name)
        stored = {name: StoredTensor(0, info) for name, info in self.infos.items()}
        return as_model(_InMemory(self.name, path, (path,), stored, (), "model", config))

    def at(self, offset: int) -> tuple[torch.Tensor, int]:
        """The tensor that a byte belongs to, and where in it the byte stands."""
        number = bisect_right(self._starts, offset) - 1
        return self._all[number], offset - self._starts[number]

    def read_into(self, view: memoryview, offset: int) -> int:
        """Fill `view` with the bytes from `offset` on, all of one tensor, as a file would hold them."""
        tensor, inside = self.at(offset)
        if len(view):
            into = torch.frombuffer(view, dtype=torch.uint8).view(tensor.dtype)
            _copy_entries(tensor, inside // tensor.element_size(), into)
        return len(view)


_ALIGNED = 8  # bytes: no two tensors begin in one place, not even empty ones


def _checked(side: str, name: Any, value: Any) -> torch.Tensor:
    """A tensor as its numbers are to be read."""
    if not isinstance(name, str):
        raise UnsupportedError(f"{side}: the name {name!r} is a {type(name).__name__}, not text")
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"{side}: {printable(name)} is a {type(value).__name__}, not a tensor")
    kind = None
    if value.layout != torch.strided:
        kind = f"has the layout {value.layout}"
    elif value.device.type == "meta":
        kind = "is on the meta device and holds no numbers"
    elif value.dtype not in _NAMES:
        kind = f"is {value.dtype}, which safetensors does not have"
    if kind is not None:
        raise UnsupportedError(f"{side}: tensor {printable(name)} {kind}")
    return value if type(value) is torch.Tensor and not value.requires_grad else value.detach()


def _copy_entries(tensor: torch.Tensor, first: int, into: torch.Tensor) -> None:
    """Copy entries of a tensor, counted row by row from `first` on, into `into` [n]; however it lies in memory, no more
    than these are copied.
    """
    if tensor.is_contiguous():
        into.copy_(tensor.view(-1)[first : first + into.numel()])
        return
    row = tensor[0].numel()
    while into.numel():
        number, inside = divmod(first, row)
        rows = 0 if inside else into.numel() // row
        if rows:
            done = rows * row
            into[:done].view(rows, *tensor.shape[1:]).copy_(tensor[number : number + rows])
        else:
            done = min(row - inside, into.numel())
            _copy_entries(tensor[number], inside, into[:done])
        first += done
        into = into[done:]


@dataclass(frozen=True, slots=True)
class _Result:
    """One tensor of the result, and whether it is an input's own."""

    tensor: torch.Tensor
    shared: bool


def _computed(
    recipe: Recipe, given: Mapping[str, Any], config: Any, resources: Resources, track: Track | None
) -> dict[str, torch.Tensor]:
    """What the recipe makes of the inputs, which it names as `given` does."""
    track = track or untracked
    held = {name: _Tensors(name, tensors) for name, tensors in given.items()}
    checkpoints = {name: side.checkpoint(config_values(config, given[name])) for name, side in held.items()}
    base = [str(recipe.base_model)] if recipe.base_model is not None and recipe.subtracts_base else []
    names = [*base, *(source.model for source in recipe.merged)]
    inputs = inputs_of(recipe, *(checkpoints[name] for name in names))
    plan = make_plan(recipe, inputs, Path("result.safetensors"))
    sources = [held[name] for name in names]
    devices = Devices(resources)
    keep_freed_memory()
    _wait_for(chain.from_iterable(side.tensors.values() for side in held.values()))
    prepare(plan, devices)
    if plan.needs:
        with devices.bounded():
            plan = resolve(plan, measure(plan, sources, devices, track).statistics)
    if plan.to_quantise:
        with devices.bounded():
            plan = measure_scales(plan, sources, devices, track)
    results = {tensor.name: _result(plan, tensor, sources) for tensor in plan.tensors}
    job = _Keep(plan, results)
    segments = [
        (tensor, segment)
        for tensor in plan.tensors
        for segment in tensor.segments
        if not (results[tensor.name].shared and tensor.info.dtype in _EXACT)  # there is nothing to see about these
    ]
    with devices.bounded():
        size = devices.chunk(plan.per_entry, whole=plan.whole_bytes(len(devices.members)))
        shared, turned = devices.whole_tensors(), devices.turned(plan.turned_sides)
        pool = Pool(
            lambda device: Worker(plan, sources, device, size, shared, turned), items_of(segments), job.of_item, devices
        )
        total = sum(segment.numel * itemsize(tensor.info.dtype) for tensor, segment in segments)
        with closing(pool.in_order()) as done:
            for _ in track("computing", total, done):
                pass
    ordered = dict.fromkeys([*(name for name in inputs.leading.tensors if name in results), *results])
    return {name: results[name].tensor for name in ordered}


def _wait_for(tensors: Iterable[torch.Tensor]) -> None:
    """Wait until what the caller's streams compute is there: the workers have streams of their own."""
    for device in {tensor.device for tensor in tensors if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def _result(plan: Plan, tensor: TensorPlan, sources: Sequence[_Tensors]) -> _Result:
    """The tensor of an input, where that is the result; else one that is yet to be filled."""

    def of(source: SourceRange) -> torch.Tensor:
        return sources[source.file].at(source.offset)[0]

    segment, dtype = tensor.segments[0], _OF_RESULTS[tensor.info.dtype]
    shape = torch.Size(tensor.info.shape)
    if not segment.sources:  # scales that were measured
        weight = next(one for one in plan.tensors if one.name == tensor.spec.scales_of)
        return _Result(
            torch.empty(shape, dtype=dtype, device=_result(plan, weight, sources).tensor.device), shared=False
        )
    merged = (*((segment.base,) if segment.base else ()), *segment.models)
    like = of(segment.copy or merged[plan.inputs.lead])
    whole = segment.copy is not None and not segment.copy.parts and len(tensor.segments) == 1
    whole = whole and (tensor.spec.quantised is None or tensor.as_stored is not None)
    if whole and (like.dtype, like.shape) == (dtype, shape):
        return _Result(like, shared=True)
    return _Result(torch.empty(shape, dtype=dtype, device=like.device), shared=False)


class _Keep(Write):
    """The job of making some chunks of the result, and putting them into its tensors."""

    def __init__(self, plan: Plan, results: Mapping[str, _Result]) -> None:
        super().__init__(plan, [])
        self._results = results

    def of_item(self, worker: Worker, item: list[PlanChunk]) -> int:
        """Make some chunks; their bytes. One that is an input's own is made, too, to see that it is finite."""
        for chunk in worker.cut(item):
            raw = self._make(worker, chunk, type(self.tally).nothing(self.models))
            result = self._results[chunk.tensor.name]
            if not result.shared:
                first = chunk.segment.start + chunk.first
                into = result.tensor.view(-1)[first : first + chunk.numel]
                into.copy_(torch.frombuffer(raw, dtype=torch.uint8).view(into.dtype))
        return sum(chunk.numel * itemsize(chunk.tensor.info.dtype) for chunk in item)
