"""An output in FP8: which of its weights are stored in 8 bits, and how. It has the layout of an input: of the one that
it is like, else of the base, else of the first that is stored so.

The scales are tensors of the output of their own. They are measured once every coefficient is known (`engine.fp8`), but
for weights that come to what an input holds in this very layout: those are copied, codes and scales.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from lines_cli.checkpoint.formulas import Dequantised, Formula, InParts
from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import RecipeError, printable, some
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import Names
from lines_cli.plan.tensors import Ranges, Segment, SourceRange, TensorSpec
from lines_cli.recipe.schema import Recipe


def side_of_layout(inputs: Inputs) -> int | None:
    """The number of the input whose layout an output in FP8 has; None where none is stored so."""
    order = [inputs.lead, *range(len(inputs.checkpoints))]
    return next((side for side in order if _layout_of(inputs.checkpoints[side]).stored_as is not None), None)


def _layout_of(checkpoint: Checkpoint) -> Checkpoint:
    """What says how a checkpoint's weights are stored: of an adapter on a base the base."""
    return checkpoint.parts[0] if checkpoint.parts else checkpoint


def layout_of(recipe: Recipe, inputs: Inputs) -> Checkpoint | None:
    """The input whose layout an output in FP8 has; None where the output is whole."""
    side = side_of_layout(inputs) if recipe.dtype == "fp8" else None
    return None if side is None else _layout_of(inputs.checkpoints[side])


def in_fp8(
    specs: Mapping[str, TensorSpec], recipe: Recipe, inputs: Inputs, rows: Mapping[str, Names], notes: list[str]
) -> dict[str, TensorSpec]:
    """The specs of an output, those that are to be stored in 8 bits with their scales; `notes` gets a line for them.

    Raises:
        RecipeError: that is asked for, and no input says how.
    """
    side = side_of_layout(inputs)
    if recipe.dtype != "fp8":
        if side is not None and recipe.dtype is None:
            notes.append(
                "the output's weights are whole; --dtype fp8 (in a recipe dtype:) stores them in 8 bits, as "
                f"{inputs.called(side)} does"
            )
        return dict(specs)
    if side is None:
        raise RecipeError(
            "dtype: fp8, but no input is stored in FP8, so nothing says which weights are, and in which blocks",
            hint="Write bfloat16, and quantise that (llm-compressor, or transformers: FineGrainedFP8Config).",
        )
    like = _layout_of(inputs.checkpoints[side])
    found: dict[str, TensorSpec] = {}
    names: dict[str, str] = {}
    other_layout: list[str] = []
    for name, spec in specs.items():
        there = rows[name][side] if name in rows else None
        step = _step_of(like, there)
        if step is None or there is None:
            if there is not None and any(
                isinstance(one, InParts) and not one.adds for one in _steps_in(inputs, side, there)
            ):
                other_layout.append(name)
            found[name] = spec
            continue
        if not _fits(step, spec.shape):
            other_layout.append(name)
            continue
        scale, info = _renamed(step.name, there, name), step.factors[0][1].info
        shape = _scales_shaped(step, info.shape, spec.shape)
        placed = TensorInfo(info.dtype, shape, 0, math.prod(shape) * itemsize(info.dtype))
        step = replace(step, name=scale, factors=(("scale", StoredTensor(0, placed)),), shape=spec.shape)
        found[name] = spec._replace(dtype=like.formulas[there].stored.info.dtype, quantised=step)
        found[scale] = _of_format(spec, scale, placed, Segment(0, placed.numel), scales_of=name)
        names[there] = name
    if other_layout:
        raise RecipeError(
            f"dtype: fp8, but {len(other_layout):,} tensor(s) that {like.name} stores in 8 bits have another layout or "
            f"shape in the output:\n{some([printable(name) for name in other_layout])}",
            hint="Write bfloat16, and quantise that; or make the output like that input (in a recipe like:).",
        )
    if not names:
        raise RecipeError(
            f"dtype: fp8, but none of the tensors of {like.name} that are stored so is in the output",
            hint="Leave dtype out, and the output is whole.",
        )
    found |= _beside(inputs, side, like, names, next(iter(specs.values())))
    notes.append(
        f"{len(names):,} of {len(specs):,} tensors are stored in 8 bits, as {inputs.called(side)} does "
        f"({like.stored_as}); the others keep their dtypes"
    )
    return found


def _steps_in(inputs: Inputs, side: int, name: str) -> tuple[Formula, ...]:
    made = inputs.checkpoints[side].formulas.get(name)
    return made.steps if made is not None else ()


def _step_of(like: Checkpoint, name: str | None) -> Dequantised | None:
    made = like.formulas.get(name) if name is not None else None
    step = made.steps[0] if made is not None else None
    return step if isinstance(step, Dequantised) else None


def _fits(step: Dequantised, shape: tuple[int, ...]) -> bool:
    """Whether a tensor of a shape can be stored so: it has that shape, or is a matrix with other rows."""
    return shape == step.shape or (step.matrices == 1 and len(shape) == len(step.shape) == 2)


def _scales_shaped(step: Dequantised, scales: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of the scales of a tensor of a shape, where that of `step.shape` has such."""
    if shape == step.shape or math.prod(scales) == 1:
        return scales
    _, *grid = replace(step, shape=shape).grid
    return tuple(grid) if len(scales) == 2 else tuple(size for size in grid if size > 1) or (1,)


def _renamed(beside: str, there: str, name: str) -> str:
    """What the output calls a tensor that stands beside another one, by what it calls that."""
    return _module(name) + beside.removeprefix(_module(there))


def _module(name: str) -> str:
    return name[: name.rfind(".") + 1]


def _of_format(like: TensorSpec, name: str, info: TensorInfo, segment: Segment, *, scales_of: str) -> TensorSpec:
    """A tensor of the output that belongs to the format, and is none of the model."""
    own = TensorSpec(name, name, like.values, inside=False, dtype=info.dtype, shape=info.shape, segments=(segment,))
    return own._replace(paired=False, of_format=True, scales_of=scales_of)


def _beside(
    inputs: Inputs, side: int, like: Checkpoint, names: Mapping[str, str], any_spec: TensorSpec
) -> dict[str, TensorSpec]:
    """Scales of activations, as they are, by the output's names: those of modules that it has."""
    modules: dict[str, str] = {}
    for there, name in names.items():
        ours, theirs = name.split("."), there.split(".")
        while ours and theirs and ours[-1] == theirs[-1]:
            ours.pop()
            theirs.pop()
            modules[".".join([*theirs, ""])] = ".".join([*ours, ""])
    range_of = Ranges(inputs, side)
    found = {}
    for there, stored in like.beside.items():
        own = _module(there)
        while own and own not in modules:
            own = _module(own[:-1])
        name = modules.get(own, own) + there.removeprefix(own)
        copied = Segment(0, stored.info.numel, copy=range_of.of(stored))
        found[name] = _of_format(any_spec, name, stored.info, copied, scales_of="")
    return found


def scales_copied(copy: SourceRange) -> Segment:
    """The scales of a weight whose codes are copied, from the same input."""
    (step,) = copy.steps
    _, (file, info, _) = step.factors[0]
    return Segment(0, info.numel, copy=SourceRange(file, info.offset, info.dtype))
