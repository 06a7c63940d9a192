"""Numbers in: from coefficients, some of them measured, follows what is computed and what is copied."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lines_cli.checkpoint.header import COMPLEX, EXACT_DTYPES, WIDER, TensorInfo
from lines_cli.checkpoint.reader import gc_paused
from lines_cli.errors import (
    MismatchError,
    printable,
    some,
)
from lines_cli.plan.coefficients import Coefficients, coefficient_of, rounded_coefficient
from lines_cli.plan.fp8 import scales_copied
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import Names
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.realised import groups_of
from lines_cli.plan.sidecars import with_numbers
from lines_cli.plan.statistics import Needs, Statistics
from lines_cli.plan.tensors import Segment, TensorSpec, taken_whole
from lines_cli.plan.weights import with_weights
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap
from lines_cli.scaling.schedule import Rules


def settle_misfits(
    specs: Sequence[TensorSpec],
    recipe: Recipe,
    inputs: Inputs,
    rows: Mapping[str, Names],
    depth: DepthMap,
    rules: Rules,
    notes: list[str],
) -> list[TensorSpec]:
    """The specs, where what does not fit together is taken whole from one input if that is all that is asked of it:
    its coefficient is 0 or 1, or the recipe says whose it is. Nothing is computed with it.

    Args:
        specs: of `specify_tensors`.
        recipe, inputs, rows, depth, rules: what they were made of.
        notes: gets a line for every input from which some are taken.
    """
    settled, taken = [], dict[int, list[TensorSpec]]()
    for spec in specs:
        side = _side_kept(spec, recipe, inputs, depth, rules) if spec.misfit else None
        if spec.of_other_tokens and side != inputs.lead:  # the output has another tokenizer
            side = None
        there = None if side is None else rows[spec.name][side]
        if side is not None and there is not None:
            taken.setdefault(side, []).append(spec)
            spec = taken_whole(spec, recipe, inputs, side, there)  # noqa: PLW2901 - what has become of it
        settled.append(spec)
    for side, of_it in taken.items():
        listed = some([f"{printable(spec.name)}: {spec.misfit}" for spec in of_it])
        config = "" if side == inputs.lead else f"; the config is that of {inputs.called(inputs.lead)}: does it fit?"
        whose = f"copied from {inputs.called(side)}{config}"
        notes.append(f"{len(of_it):,} tensor(s) do not fit together, and are {whose}\n{listed}")
    return settled


def _side_kept(spec: TensorSpec, recipe: Recipe, inputs: Inputs, depth: DepthMap, rules: Rules) -> int | None:
    """The number of the input whose tensor is asked for as it is, if one is."""
    coefficient = coefficient_of(recipe, depth, rules, spec)
    rounded = rounded_coefficient(spec.name, coefficient, in_float64=False)
    first_model = 1 if inputs.has_base else 0
    counting = recipe.method.counting(spec.values, len(recipe.merged))
    if inputs.has_base and (rounded == 0 or not counting):
        return 0
    if (not inputs.has_base or rounded == 1) and len(counting) == 1 and _is_itself(recipe, spec, counting[0]):
        return first_model + counting[0]
    if recipe.missing == "ft" and not spec.inside:
        return first_model
    return inputs.lead if recipe.missing == "copy" and not spec.inside else None


def _is_itself(recipe: Recipe, spec: TensorSpec, model: int) -> bool:
    """Whether merging gives one model as it is, where the others count for nothing."""
    of_it = {key: (value[model],) if isinstance(value, tuple) else value for key, value in spec.values.items()}
    return recipe.method.one_is_itself(of_it)


@gc_paused()
def resolve(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with what was measured in it: every coefficient a number, every operation decided.

    Raises:
        RecipeError: a coefficient is beyond float32.
        MismatchError: alpha, a weight or a share cannot be measured, because nothing was merged, or something is not
            finite.
    """
    plan = with_weights(plan, statistics.squares)
    norms = statistics.norms
    if norms is not None and not (0 < norms.merged < math.inf and norms.total < math.inf):
        raise MismatchError(
            f"alpha: auto cannot be measured: the merged task vector's L1 norm is {norms.merged:g}, the sum's "
            f"{norms.total:g}",
            hint="The models are the same as their base, or the method keeps nothing of them. "
            "Otherwise give lines.alpha as a number."
            if norms.merged == 0
            else "Look for NaN, Inf or very large weights in the inputs (lines inspect --check). Otherwise give "
            "lines.alpha as a number.",
        )
    placed = ((tensor.spec, tensor.file, tensor.info) for tensor in plan.tensors)
    plan = decided(replace(plan, needs=Needs(), statistics=statistics), placed)
    if norms is not None and norms.alpha > _MUCH:
        what = (
            f"alpha: auto is {norms.alpha:.4g}: hardly anything was merged, compared with the sum of the task vectors"
        )
        plan = replace(
            plan, notes=(*plan.notes, f"{what}. A density may be too low, or the models may cancel each other out.")
        )
    rewritten = {sidecar.name: sidecar for sidecar in with_numbers(plan)}
    return replace(plan, sidecars=tuple(rewritten.get(sidecar.name, sidecar) for sidecar in plan.sidecars))


def decided(plan: Plan, placed: Iterable[tuple[TensorSpec, int, TensorInfo]]) -> Plan:
    """The plan with the coefficients that are known, and the operations that follow from them.

    Args:
        plan: with whatever tensors.
        placed: its tensors, each with the number of its file and its place there.
    """
    alpha = None
    if plan.recipe.lines is not None and plan.recipe.lines.needs_alpha and not plan.needs.norms:
        norms = plan.statistics.norms
        alpha = norms.alpha if norms else 1 / plan.number_of_models  # the merged task vector is the sum
    rules = plan.recipe.rules(plan.depth, alpha=alpha, scores=plan.statistics.scores)
    plan = replace(plan, rules=rules)
    coefficients = Coefficients(plan.recipe, plan.depth, rules)
    return _with_scales(
        _measured_whole(replace(plan, tensors=tuple([_decide(plan, coefficients, *one) for one in placed])))
    )


def _with_scales(plan: Plan) -> Plan:
    """The plan, where scales are copied with the codes that they belong to."""
    if plan.needs or not any(tensor.spec.scales_of for tensor in plan.tensors):
        return plan
    weights = {tensor.name: tensor for tensor in plan.tensors if tensor.spec.quantised is not None}
    tensors = []
    for tensor in plan.tensors:
        copied = weights[tensor.spec.scales_of].as_stored if tensor.spec.scales_of else None
        tensors.append(tensor if copied is None else tensor._replace(segments=(scales_copied(copied),)))
    return replace(plan, tensors=tuple(tensors))


def _measured_whole(plan: Plan) -> Plan:
    """The plan, where of what has one coefficient, a layer for example, nothing or all is measured: a copy of a
    fine-tune's tensor beside one that is computed or rounded is measured, too, and the base is read for it.
    """
    if plan.needs:
        return plan
    groups = groups_of(plan)
    tensors = []
    for tensor in plan.tensors:
        copies = [segment for segment in tensor.segments if segment.copy is not None]
        number = groups.of.get(tensor.name) if copies else None
        if number is not None and number in groups.measured and groups.groups[number].coefficient:
            segments = zip(tensor.spec.segments, tensor.segments, strict=True)
            beside = tuple(
                own._replace(base=spec.base) if own.copy and spec.models and own.copy != spec.base else own
                for spec, own in segments
            )
            if beside != tensor.segments:
                tensor = tensor._replace(segments=beside)  # noqa: PLW2901 - what has become of it
        tensors.append(tensor)
    return replace(plan, tensors=tuple(tensors))


_MUCH = 3.0  # alpha lies below 1 in the paper's uses


def _decide(plan: Plan, coefficients: Coefficients, spec: TensorSpec, file: int, info: TensorInfo) -> TensorPlan:
    """A tensor with its coefficient, and with the copies that follow from it."""
    place = plan.depth.places.get(spec.name)
    if not spec.paired:
        return TensorPlan(spec, file, info, place, 0.0 if _is_of_base(plan, spec) else 1.0, spec.segments)
    coefficient, rounded = coefficients(spec)
    return TensorPlan(spec, file, info, place, coefficient, _segments(plan, spec, rounded))


def _is_of_base(plan: Plan, spec: TensorSpec) -> bool:
    files_of_base = len(plan.inputs.checkpoints[0].files) if plan.inputs.has_base else 0
    return all(source.file < files_of_base for segment in spec.segments for source in segment.sources)


def _segments(plan: Plan, spec: TensorSpec, coefficient: float) -> tuple[Segment, ...]:
    """What is done for entries that all inputs have. Where it comes to what one of them holds they are a copy; the
    formula is not exact there.

    Integers and booleans have no task vector: they are those of the input that the output is like, and of the base
    where the coefficient is 0. In a merge the others are compared; and of complex numbers those of an edit, too, unless
    the coefficient asks for one side's.
    """
    if spec.dtype in EXACT_DTYPES:
        asked = spec.dtype != COMPLEX or (plan.inputs.has_base and coefficient == 0)
        asked = asked or (coefficient == 1 and plan.gives_one(spec.values))
        return tuple(
            _copied_whole(plan.inputs, segment, of_base=coefficient == 0, alike=not asked) for segment in spec.segments
        )
    if plan.needs:  # measured is what the inputs hold, whatever becomes of it
        return spec.segments
    has_base = plan.inputs.has_base
    unchanged = plan.recipe.method.takes == "task vectors" and spec.is_the_base_s
    if has_base and (coefficient == 0 or unchanged):
        return tuple(Segment(segment.start, segment.numel, segment.copy or segment.base) for segment in spec.segments)
    if (not has_base or coefficient == 1) and plan.gives_one(spec.values):
        return tuple(_own(spec, segment) for segment in spec.segments)
    return spec.segments


def _own(spec: TensorSpec, segment: Segment) -> Segment:
    """A copy of the only model's. Where it has to be rounded, the base is read, too: what is left of the update is
    measured, and what is the base's stays.
    """
    if segment.copy is not None:
        return segment
    copied = segment.models[0]
    if spec.as_stored((Segment(segment.start, segment.numel, copied),)) is not None and len(spec.segments) == 1:
        return Segment(segment.start, segment.numel, copied)
    rounded = bool(copied.steps) or (copied.dtype != spec.dtype and (copied.dtype, spec.dtype) not in WIDER)
    return Segment(segment.start, segment.numel, copied, base=segment.base if rounded else None)


def _copied_whole(inputs: Inputs, segment: Segment, *, of_base: bool, alike: bool) -> Segment:
    """What is never computed with: a copy of one input's, that others are compared with if all should be `alike`."""
    if segment.copy is not None:
        return segment
    ranges = (*((segment.base,) if segment.base else ()), *segment.models)
    copied = segment.base if of_base and segment.base else ranges[inputs.lead]
    others = () if inputs.of_an_edit and not alike else tuple(source for source in ranges if source is not copied)
    return Segment(segment.start, segment.numel, copy=copied, compare=others)
