"""Numbers in: from coefficients, some of them measured, follows what is computed and what is copied."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from lines_cli.checkpoint.header import EXACT_DTYPES, TensorInfo
from lines_cli.checkpoint.reader import no_collecting
from lines_cli.errors import (
    MismatchError,
)
from lines_cli.plan.coefficients import coefficient_of, rounded_coefficient
from lines_cli.plan.inputs import Sides
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.sidecars import with_numbers
from lines_cli.plan.statistics import Needs, Statistics
from lines_cli.plan.tensors import Draft, Piece, is_alone
from lines_cli.recipe.schema import Scaling


@no_collecting()
def resolve(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with what was measured in it: every coefficient a number, every operation decided.

    Raises:
        RecipeError: a coefficient is beyond float32.
        MismatchError: alpha cannot be measured, because nothing was merged, or something is not finite.
    """
    norms = statistics.norms
    if norms is not None and not (0 < norms.merged < math.inf and norms.total < math.inf):
        raise MismatchError(
            f"alpha: auto cannot be measured: the merged task vector's L1 norm is {norms.merged:g}, the sum's "
            f"{norms.total:g}",
            hint="The models are the same as their base, or the method keeps nothing of them. "
            "Else give lines.alpha as a number."
            if norms.merged == 0
            else "Are there NaN, Inf or immense weights among the inputs? Else give lines.alpha as a number.",
        )
    placed = ((tensor.draft, tensor.file, tensor.info) for tensor in plan.tensors)
    plan = decided(replace(plan, needs=Needs(), statistics=statistics), placed)
    if norms is not None and norms.alpha > _MUCH:
        what = f"alpha: auto is {norms.alpha:.4g}: next to the sum of the task vectors hardly anything was merged"
        plan = replace(plan, notes=(*plan.notes, f"{what}. Is a density too low, or do the models cancel out?"))
    rewritten = {sidecar.name: sidecar for sidecar in with_numbers(plan)}
    return replace(plan, sidecars=tuple(rewritten.get(sidecar.name, sidecar) for sidecar in plan.sidecars))


def decided(plan: Plan, placed: Iterable[tuple[Draft, int, TensorInfo]]) -> Plan:
    """The plan with the coefficients that are known, and the operations that follow from them.

    Args:
        plan: with whatever tensors.
        placed: its tensors, each with the number of its file and its place there.
    """
    alpha = None
    if plan.recipe.lines is not None and plan.recipe.lines.needs_alpha and not plan.needs.norms:
        norms = plan.statistics.norms
        alpha = norms.alpha if norms else 1 / plan.number_of_models  # the merged task vector is the sum
    rules = (plan.recipe.lines or UNSCALED).rules(plan.depth, alpha=alpha)
    plan = replace(plan, rules=rules)
    return replace(plan, tensors=tuple([_decide(plan, draft, file, info) for draft, file, info in placed]))


_MUCH = 3.0  # alpha lies below 1 in the paper's uses


UNSCALED = Scaling(alpha=1.0, beta=0.0)
"""What the merged task vector is scaled by where the recipe has no `lines:`, lambda apart."""


def _decide(plan: Plan, draft: Draft, file: int, info: TensorInfo) -> TensorPlan:
    """A tensor with its coefficient, and with the copies that follow from it."""
    place = plan.depth.places.get(draft.name)
    if not draft.paired:
        return TensorPlan(draft, file, info, place, 0.0 if _is_of_base(plan, draft) else 1.0, draft.pieces)
    coefficient = coefficient_of(plan.recipe, plan.depth, plan.rules, draft)
    rounded = rounded_coefficient(draft.name, coefficient, in_float64=draft.in_float64)
    return TensorPlan(draft, file, info, place, coefficient, _pieces(plan, draft, rounded))


def _is_of_base(plan: Plan, draft: Draft) -> bool:
    files_of_base = len(plan.sides.checkpoints[0].files) if plan.sides.has_base else 0
    return all(source.file < files_of_base for piece in draft.pieces for source in piece.sources)


def _pieces(plan: Plan, draft: Draft, coefficient: float) -> tuple[Piece, ...]:
    """What is done for entries that all inputs have. Where it comes to what one of them holds they are a copy; the
    formula is not exact there.

    Integers and booleans have no task vector: they are those of the input that the output is like, and of the base
    where the coefficient is 0. In a merge the others are compared.
    """
    if draft.dtype in EXACT_DTYPES:
        return tuple(_copied_whole(plan.sides, piece, of_base=coefficient == 0) for piece in draft.pieces)
    if plan.needs:  # measured is what the inputs hold, whatever becomes of it
        return draft.pieces
    has_base = plan.sides.has_base
    if has_base and coefficient == 0:
        return tuple(Piece(piece.start, piece.numel, piece.copy or piece.base) for piece in draft.pieces)
    if (not has_base or coefficient == 1) and is_alone(plan.recipe, draft.values):
        return tuple(Piece(piece.start, piece.numel, piece.copy or piece.models[0]) for piece in draft.pieces)
    return draft.pieces


def _copied_whole(sides: Sides, piece: Piece, *, of_base: bool) -> Piece:
    """Integers or booleans: a copy of one input's."""
    if piece.copy is not None:
        return piece
    slices = (*((piece.base,) if piece.base else ()), *piece.models)
    copied = piece.base if of_base and piece.base else slices[sides.lead]
    others = () if sides.of_an_edit else tuple(source for source in slices if source is not copied)
    return Piece(piece.start, piece.numel, copy=copied, compare=others)
