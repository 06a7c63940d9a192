"""A recipe's coefficients: of each layer, of what lies outside, and of one tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator

from lines_cli.errors import (
    RecipeError,
    printable,
)
from lines_cli.plan.tensors import TensorSpec
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap, Side, position
from lines_cli.scaling.schedule import Listed, Rules, UpAndDown


def layer_coefficients(recipe: Recipe, rules: Rules, depth: DepthMap) -> list[tuple[str, list[float]]]:
    """Each stack's name, and the coefficient of each of its layers (filters apart); NaN where alpha is not known."""
    return [
        (
            stack.name,
            [
                rules.of(stack.component).inside_value(
                    stack.name,
                    index,
                    stack.layers,
                    scale=scale_at(recipe, position(index, stack.layers), stack.component),
                )
                for index in range(stack.layers)
            ],
        )
        for stack in depth.stacks
    ]


def unlike_lines(recipe: Recipe, rules: Rules, depth: DepthMap, *, of_an_edit: bool) -> Iterator[str]:
    """What is unlike LiNeS in the coefficients, and may be meant otherwise: that they fall with depth; and of an edit
    that some are above 1, which nothing else would make larger than the fine-tune's.
    """
    if recipe.lines is None:
        return
    fall, above = [], []
    components = {stack.name: stack.component for stack in depth.stacks}
    for name, values in layer_coefficients(recipe, rules, depth):
        ends = f"{values[0]:.4g} to {values[-1]:.4g}" + (f" in {printable(name)}" if len(depth.stacks) > 1 else "")
        own = rules.of(components[name])
        by_hand = isinstance(own.stacks.get(name, own.schedule), (Listed, UpAndDown))
        if values[-1] < values[0] and not by_hand:
            fall.append(ends)
        if of_an_edit and max(values) > 1:
            above.append(f"{max(values):.4g}")
    if fall:
        lines = recipe.lines
        is_default = lines.beta is not None and isinstance(lines.alpha, float) and lines.beta == 1 - lines.alpha
        why = f": beta is {lines.beta:.4g}, which is 1 - alpha" if is_default and not lines.stacks else ""
        yield (
            f"the coefficients fall with depth ({', '.join(fall)}){why}. LiNeS has them grow, so that shallow layers "
            "keep what the base knew: that takes a beta above 0"
        )
    if above:
        yield (
            f"coefficients above 1 ({', '.join(dict.fromkeys(above))} at most) make the update larger than the "
            "fine-tune's own"
        )


def outside_coefficients(recipe: Recipe, rules: Rules, component: str | None = None) -> tuple[float, float]:
    """The coefficients outside the blocks, before and behind them (filters apart); of one of several models its own."""
    own = rules.of(component)
    before = own.outside_value("before", scale=scale_at(recipe, 0.0, component, outside="before"))
    return before, own.outside_value("after", scale=scale_at(recipe, 0.0, component, outside="after"))


def scale_at(recipe: Recipe, at: float, component: str | None = None, *, outside: Side | None = None) -> float:
    """The scale of what is merged, at a place in the depth, 0 to 1; or `outside` the blocks, on one of their sides."""
    return recipe.method.scale_of(recipe.values("", at, component, outside=outside))


def known(value: float) -> float | None:
    """A coefficient as JSON has it: null where alpha is not known."""
    return None if math.isnan(value) else value


def coefficient_of(recipe: Recipe, depth: DepthMap, rules: Rules, spec: TensorSpec) -> float:
    """c(l), in float64; NaN if it depends on an alpha that is not known."""
    return rules.coefficient(spec.counts_as, depth, scale=recipe.method.scale_of(spec.values))


class Coefficients:
    """The coefficient of each tensor, as it is and as its arithmetic has it; of the tensors of a layer that no filter
    tells apart it is worked out once.
    """

    def __init__(self, recipe: Recipe, depth: DepthMap, rules: Rules) -> None:
        self._recipe, self._depth, self._rules = recipe, depth, rules
        self._known: dict[tuple[str, int, int, bool], tuple[float, float]] = {}

    def __call__(self, spec: TensorSpec) -> tuple[float, float]:
        """`coefficient_of` and `rounded_coefficient`.

        Raises:
            RecipeError: it is beyond what float32 can hold.
        """
        place = self._depth.places.get(spec.counts_as)
        if place is None or self._rules.filters:
            return self._worked_out(spec)
        key = (place.stack, place.index, id(spec.values), spec.in_float64)  # all specs live as long as the plan
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = self._worked_out(spec)
        return found

    def _worked_out(self, spec: TensorSpec) -> tuple[float, float]:
        coefficient = coefficient_of(self._recipe, self._depth, self._rules, spec)
        return coefficient, rounded_coefficient(spec.name, coefficient, in_float64=spec.in_float64)


def rounded_coefficient(name: str, coefficient: float, *, in_float64: bool) -> float:
    """A tensor's coefficient as its arithmetic has it.

    Raises:
        RecipeError: that is infinite.
    """
    rounded = coefficient if in_float64 else to_float32(coefficient)
    if math.isinf(rounded):
        raise RecipeError(
            f"the coefficient of {printable(name)} is {coefficient:g}, beyond what float32 can hold",
            hint="Coefficients usually lie between 0 and 2.",
        )
    return rounded


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even; beyond its range, infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded
