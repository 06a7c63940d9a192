"""Recipe and headers in, plan out. All that can be refused before the first tensor is read is refused here.

What a recipe needs to know of the numbers in the tensors (`Needs`) is measured by the engine, and `resolve` puts it
in: a plan without needs has been resolved. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lines_cli.checkpoint.header import EXACT_DTYPES
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint
from lines_cli.checkpoint.sidecars import RECIPE, Card, Sidecar, carry_over, index_file, model_card
from lines_cli.checkpoint.writer import is_one_file
from lines_cli.depth import DepthMap, find_depth
from lines_cli.draft import STORED, Piece, draft_tensors
from lines_cli.errors import DepthError, MismatchError, RecipeError, printable
from lines_cli.hub import locate
from lines_cli.layout import lay_out_files
from lines_cli.pairing import Sides, aligned_names, is_vocabulary, pair_tensors
from lines_cli.plan import Needs, Plan, Statistics, TensorPlan
from lines_cli.recipe import Recipe, Scaling
from lines_cli.recipe_file import dump_recipe
from lines_cli.schedule import Rules


def open_inputs(recipe: Recipe, *, quiet: bool = False) -> Sides:
    """Open the recipe's base and models, fetching from the Hub what is no path; `quiet` without progress bars.

    Raises:
        CheckpointError: one cannot be found or read.
    """
    opened: dict[str, Checkpoint] = {}

    def opening(name: str) -> Checkpoint:
        if name not in opened:
            found = locate(name, quiet=quiet)
            opened[name] = open_checkpoint(found.path, name=found.name, hub_id=found.hub_id)
        return opened[name]

    base = [opening(recipe.base_model)] if recipe.base_model is not None and recipe.subtracts_base else []
    return sides_of(recipe, *base, *(opening(source.model) for source in recipe.merged))


def sides_of(recipe: Recipe, *checkpoints: Checkpoint) -> Sides:
    """The inputs in their roles: the base first, if the recipe subtracts one, then the models of `recipe.merged`."""
    has_base = recipe.subtracts_base
    first_model = 1 if has_base else 0
    named = [source.model for source in recipe.merged]
    lead = 0 if has_base or recipe.base_model not in named else named.index(str(recipe.base_model))
    if recipe.like == "ft":
        lead = first_model
    return Sides(checkpoints, has_base, lead, recipe.like == "ft" and len(checkpoints) == 2 and has_base)


def make_plan(recipe: Recipe, sides: Sides, output: Path) -> Plan:
    """Decide every byte of the output, as far as it does not depend on the numbers in the inputs.

    Raises:
        MismatchError: names, shapes or dtypes of the inputs do not fit and the recipe does not say what to do.
        DepthError: which tensor stands at which depth cannot be decided.
        RecipeError: a stack or a filter names nothing there, or a coefficient is beyond float32.
    """
    notes: list[str] = list(recipe.notes)
    own = aligned_names(sides, notes)
    rows = pair_tensors(sides, own, recipe, notes)
    depth = _depth(recipe, sides, [name for names in own for name in names], notes)
    rules = (recipe.lines or _UNSCALED).rules(depth)
    notes += [
        f"filter {part!r} among the parameters is part of no tensor name, and says nothing"
        for part in sorted(recipe.filters)
        if not any(part in name for name in rows)
    ]
    drafts = {draft.name: draft for draft in draft_tensors(recipe, sides, depth, rules, rows)}

    files, placed = lay_out_files(
        {name: (draft.dtype, draft.shape) for name, draft in drafts.items()},
        stem=sides.leading.stem,
        one_file=output.name if is_one_file(output) else None,
        max_shard_size=recipe.max_shard_size,
    )
    planned = tuple(
        TensorPlan(
            name,
            number,
            info,
            depth.places.get(name),
            drafts[name].counts_as,
            drafts[name].values,
            math.nan,
            drafts[name].filter,
            drafts[name].pieces,
            drafts[name].paired,
        )
        for name, number, info in placed
    )
    plan = Plan(
        recipe,
        sides,
        tuple(file for checkpoint in sides.checkpoints for file in checkpoint.files),
        output,
        tuple(files),
        planned,
        depth,
        rules,
        _needs(recipe, planned),
        Statistics(),
        (),
        (*notes, *depth.notes),
        {other: draft.rows[1] for draft in drafts.values() if draft.rows for other in sorted(draft.rows[0])},
    )
    return _decided(plan)


def resolve(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with what was measured in it: every coefficient a number, every operation decided.

    Raises:
        RecipeError: a coefficient is beyond float32.
        MismatchError: alpha cannot be measured, because nothing was merged.
    """
    norms = statistics.norms
    if norms is not None and (norms.merged == 0 or not math.isfinite(norms.total / norms.merged)):
        raise MismatchError(
            f"alpha: auto cannot be measured: the merged task vector's L1 norm is {norms.merged:g}, the sum's "
            f"{norms.total:g}",
            hint="The models are the same as their base, or the method keeps nothing of them. "
            "Else give lines.alpha as a number.",
        )
    return _decided(replace(plan, needs=Needs(), statistics=statistics))


def _decided(plan: Plan) -> Plan:
    """The plan with the coefficients that are known, and the operations that follow from them."""
    alpha = None
    if plan.recipe.lines is not None and plan.recipe.lines.needs_alpha and not plan.needs.norms:
        norms = plan.statistics.norms
        alpha = norms.alpha if norms else 1 / len(plan.recipe.merged)  # the merged task vector is the sum
    rules = (plan.recipe.lines or _UNSCALED).rules(plan.depth, alpha=alpha)
    tensors = tuple(_with_coefficient(plan, rules, tensor) for tensor in plan.tensors)
    plan = replace(plan, rules=rules, tensors=tensors)
    return plan if is_one_file(plan.output) else _with_sidecars(plan)


_UNSCALED = Scaling(alpha=1.0, beta=0.0)
"""What the merged task vector is scaled by where the recipe has no `lines:`, lambda apart."""


def _depth(recipe: Recipe, sides: Sides, names: Iterable[str], notes: list[str]) -> DepthMap:
    try:
        layers = recipe.lines.layers if recipe.lines else None
        depth = find_depth(dict.fromkeys(names), config=sides.config_of(sides.lead), layers=layers)
    except DepthError as error:
        if any(source.layer_range for source in recipe.models):
            raise RecipeError(f"layer_range cannot be checked: {error.message}", hint=error.hint) from error
        if (recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary:
            raise
        notes.append(f"depth is unknown, and makes no difference with one coefficient for all: {error.message}")
        return DepthMap((), {})
    for source in recipe.models:
        if source.layer_range and all(source.layer_range != (0, stack.layers) for stack in depth.stacks):
            there = " and ".join(f"{stack.name!r} of {stack.layers}" for stack in depth.stacks)
            raise RecipeError(
                f"layer_range {list(source.layer_range)} of {source.model} is not a whole stack; there is {there}",
                hint="lines merges whole models; it does not stack parts of them.",
            )
    return depth


def _needs(recipe: Recipe, tensors: Sequence[TensorPlan]) -> Needs:
    method = recipe.method
    values = list({id(tensor.values): tensor.values for tensor in tensors if tensor.edited}.values())
    drops = any(density != 1 for v in values for density in v.get("density", ()))
    auto = recipe.lines is not None and recipe.lines.needs_alpha
    plain_sum = method.sums and all(not v["normalize"] and set(v["weight"]) == {1} for v in values)
    return Needs(
        thresholds=method.masks == "magnitude" and drops,
        l1=drops and any(v.get("rescale") == "l1" for v in values),
        products=recipe.merge_method == "slerp",
        majority=len(recipe.merged) > 1 and any(method.elects(v) for v in values),
        norms=auto and not plain_sum and bool(values),
    )


# --- what follows from the coefficients ---


def _with_coefficient(plan: Plan, rules: Rules, tensor: TensorPlan) -> TensorPlan:
    """The tensor with its coefficient, and with the copies that follow from it."""
    if not tensor.paired:
        return replace(tensor, coefficient=0.0 if _is_of_base(plan, tensor) else 1.0)
    scale = tensor.values.get("lambda", 1.0)
    coefficient = rules.coefficient(tensor.counts_as, plan.depth, scale=scale)
    if not math.isnan(coefficient) and not math.isfinite(to_float32(coefficient)):
        raise RecipeError(
            f"the coefficient of {printable(tensor.name)} is {coefficient:g}, beyond what float32 can hold",
            hint="Coefficients usually lie between 0 and 2.",
        )
    rounded = coefficient if tensor.in_float64 else to_float32(coefficient)
    pieces = tuple(_decide(plan, tensor, piece, rounded) for piece in tensor.pieces)
    return replace(tensor, coefficient=coefficient, pieces=pieces)


def _is_of_base(plan: Plan, tensor: TensorPlan) -> bool:
    files_of_base = len(plan.sides.checkpoints[0].files) if plan.sides.has_base else 0
    return all(source.file < files_of_base for piece in tensor.pieces for source in piece.sources)


def _decide(plan: Plan, tensor: TensorPlan, piece: Piece, coefficient: float) -> Piece:
    """What is done for entries that all inputs have. Where it comes to what one of them holds they are a copy; the
    formula is not exact there.

    Integers and booleans have no task vector: they are those of the input that the output is like, and of the base
    where the coefficient is 0. In a merge the others are compared.
    """
    if piece.copy is not None:
        return piece
    slices = (*((piece.base,) if piece.base else ()), *piece.models)
    if slices[0].dtype in EXACT_DTYPES:
        copied = piece.base if coefficient == 0 and piece.base else slices[plan.sides.lead]
        others = () if plan.sides.of_an_edit else tuple(source for source in slices if source is not copied)
        return Piece(piece.start, piece.numel, copy=copied, compare=others)
    if plan.needs:  # measured is what the inputs hold, whatever becomes of it
        return piece
    if piece.base is not None and coefficient == 0:
        return Piece(piece.start, piece.numel, copy=piece.base)
    if (piece.base is None or coefficient == 1) and _is_alone(plan, tensor):
        return Piece(piece.start, piece.numel, copy=piece.models[0])
    return piece


def _is_alone(plan: Plan, tensor: TensorPlan) -> bool:
    """Whether merging gives the one model there is as it is."""
    values = tensor.values
    nothing_done = all(share == 1 for key in ("weight", "density") for share in values.get(key, ()))
    return (
        len(plan.recipe.merged) == 1
        and plan.recipe.method.alone_is_itself
        and nothing_done
        and (values.get("scale") in (None, (None,), (1.0,)))
    )


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even; beyond its range, infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


# --- what stands beside the weights ---


def _with_sidecars(plan: Plan) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the index comes last, so that it is
    written last.
    """
    recipe, sides = plan.recipe, plan.sides
    by_name = dict(zip((source.model for source in recipe.merged), sides.models, strict=True))
    if recipe.base_model is not None and sides.has_base:
        by_name[recipe.base_model] = sides.checkpoints[0]

    def named_source(name: str | None) -> Checkpoint | None:
        return by_name[str(recipe.base_model) if name == "base" else name] if name is not None else None

    first_model = 1 if sides.has_base else 0
    keeping = 0 if recipe.resize == "base" else first_model
    tokenizer = named_source(recipe.tokenizer_source)
    if tokenizer is not None and (other_rows := plan.rows.keys() & _vocabularies(tokenizer)):
        raise RecipeError(
            f"tokenizer_source: {tokenizer.name} has {min(other_rows):,} rows of token embeddings, and "
            f"resize: {recipe.resize} keeps {plan.rows[min(other_rows)]:,}",
            hint="Take the tokenizer of the input whose rows are kept.",
        )
    carried, notes = carry_over(
        [sides.leading, *(c for number, c in enumerate(sides.checkpoints) if number != sides.lead)],
        called=[sides.called(sides.lead), *(sides.called(n) for n in range(len(sides.checkpoints)) if n != sides.lead)],
        dtype=recipe.dtype,
        stored=_most_common_dtype(plan),
        rows=plan.rows,
        rows_of=sides.checkpoints[keeping],
        tokenizer=tokenizer,
        chat_template=named_source(recipe.chat_template),
    )
    named = {name: _seen_from(plan.output, checkpoint) for name, checkpoint in by_name.items()}
    norms = plan.statistics.norms
    why = f"(1/{norms.models}) * {norms.total!r} / {norms.merged!r}" if norms else f"1/{len(recipe.merged)}"
    text = dump_recipe(recipe, named=named, alpha=plan.alpha, why=why)
    card = model_card(
        Card(
            title=os.path.basename(os.path.abspath(plan.output)),
            method=recipe.merge_method,
            about=recipe.method.about,
            base=sides.checkpoints[0] if sides.has_base else None,
            models=sides.models,
            like=sides.leading,
            scaled=recipe.lines is not None,
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.rules.filters,
        )
    )
    sidecars = [*carried, card, Sidecar(RECIPE, content=text.encode())]
    if len(plan.outputs) > 1:
        weight_map = {tensor.name: plan.outputs[tensor.file].name for tensor in plan.tensors}
        nbytes = sum(tensor.info.nbytes for tensor in plan.tensors)
        sidecars.append(index_file(sides.leading.stem, weight_map, nbytes=nbytes, parameters=plan.parameters))
    return replace(plan, sidecars=tuple(sidecars), notes=tuple(dict.fromkeys((*plan.notes, *notes))))


def _vocabularies(checkpoint: Checkpoint) -> set[int]:
    """How many rows its token embeddings and heads have."""
    return {n for name, stored in checkpoint.tensors.items() if is_vocabulary(name) for n in stored.info.shape[:1]}


def _most_common_dtype(plan: Plan) -> str | None:
    """What most of the output's float entries are stored as, as configs name it."""
    names = {stored: name for name, stored in STORED.items()}
    entries = Counter[str]()
    for tensor in plan.tensors:
        if tensor.info.dtype in names:
            entries[names[tensor.info.dtype]] += tensor.info.numel
    return entries.most_common(1)[0][0] if entries else None


def _seen_from(folder: Path, checkpoint: Checkpoint) -> str:
    """How a recipe in `folder` names an input: a relative path stays relative, so that inputs and output can
    move together.
    """
    if checkpoint.hub_id:
        return checkpoint.hub_id
    if checkpoint.path.is_absolute():
        return str(checkpoint.path)
    return os.path.relpath(os.path.abspath(checkpoint.path), os.path.realpath(folder))
