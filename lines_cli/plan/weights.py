"""Weights that are measured (`lines_cli.methods.weight_rules`): which a plan asks for, and the plan with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lines_cli.errors import MismatchError, printable
from lines_cli.methods import Values
from lines_cli.methods.weight_rules import WEIGHT_RULES
from lines_cli.plan.plan import Plan
from lines_cli.recipe.schema import Recipe


def rules_among(recipe: Recipe, values: Values) -> set[str]:
    """The rules that stand for weights among a tensor's values."""
    return {weight for weight in _weights(recipe, values) if isinstance(weight, str)}


def _weights(recipe: Recipe, values: Values) -> tuple[Any, ...]:
    """What each model counts; none of a method whose models all count alike."""
    key = recipe.method.counts_by
    return tuple(values[key]) if key is not None else ()


def without_rules(recipe: Recipe, values: Values) -> Values:
    """A tensor's values with NaN in place of rules, for what asks only whether the numbers make sense."""
    key = recipe.method.counts_by
    if key is None or not rules_among(recipe, values):
        return values
    return {**values, key: tuple(math.nan if isinstance(own, str) else own for own in values[key])}


def with_weights(plan: Plan, squares: Sequence[float]) -> Plan:
    """The plan with numbers in place of rules.

    Args:
        plan: not yet resolved.
        squares: the squared L2 norm of each model's task vector; none where no weight rests on it.

    Raises:
        MismatchError: a model is no other than its base, or its norm is not finite.
    """
    if not squares:
        return plan
    new: dict[int, Values] = {}
    tensors = []
    for tensor in plan.tensors:
        values = tensor.spec.values
        if id(values) not in new:
            new[id(values)] = _with_numbers(plan.recipe, values, squares)
        tensors.append(tensor._replace(spec=tensor.spec._replace(values=new[id(values)])))
    return replace(plan, tensors=tuple(tensors))


def _with_numbers(recipe: Recipe, values: Values, squares: Sequence[float]) -> Values:
    key, weights = recipe.method.counts_by, list(_weights(recipe, values))
    for rule in sorted(rules_among(recipe, values)):
        models = [model for model, weight in enumerate(weights) if weight == rule]
        for model in models:
            if not 0 < squares[model] < math.inf:
                name = printable(recipe.merged[model].model)
                raise MismatchError(
                    f"{key}: {rule} cannot be measured: the squared norm of the task vector of {name} is "
                    f"{squares[model]:g}",
                    hint="The model is the same as its base: leave it out, or give it a number."
                    if squares[model] == 0
                    else "Look for NaN, Inf or very large weights in it (lines inspect --check).",
                )
        found = WEIGHT_RULES[rule]([math.sqrt(squares[model]) for model in models])
        for model, weight in zip(models, found, strict=True):
            weights[model] = weight
    if key is None:
        return values
    values = {**values, key: tuple(weights)}
    if (why := recipe.method.wrong(values)) is not None:
        raise MismatchError(f"{key} as it was measured: {why}", hint="Give numbers in place of the rule.")
    return values


def recorded(recipe: Recipe, squares: Sequence[float]) -> list[list[float | None]] | None:
    """For each of a recipe's `models` its weight where a rule stood for it, and else None; with slices for the sources
    of each slice, and else one such list. None where no rule stood anywhere; and where some models' weights have
    filters, so that what a rule comes to is not the same for all tensors: the recipe keeps its rules.
    """
    if not squares or any(_has_filters(setting) for setting in recipe.settings(recipe.method.counts_by or "")):
        return None
    layers = [one.layers for one in recipe.slices]
    begins = [sum(layers[:number]) / max(1, sum(layers) - 1) for number in range(len(layers))] or [0.0]
    places = [recipe.values("", begin) for begin in begins]
    if not any(rules_among(recipe, values) for values in places):
        return None
    found: list[list[float | None]] = []
    for values in places:
        said, weights = _weights(recipe, values), _weights(recipe, _with_numbers(recipe, values, squares))
        of_models: list[float | None] = [None] * len(recipe.models)
        for number, rule, weight in zip(recipe.chosen, said, weights, strict=True):
            if number is not None and isinstance(rule, str):
                of_models[number] = float(weight)
        found.append(of_models)
    return found


def _has_filters(setting: Any) -> bool:
    return isinstance(setting, list) and any(isinstance(part, dict) for part in setting)
