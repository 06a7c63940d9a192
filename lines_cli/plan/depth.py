"""Depth of what an output holds; and which of the tensors that some side lacks lie inside blocks.

The two differ where models differ in depth: of six layers on one side and four on the other, two lie inside blocks and
have no partner; but an output that has four is scaled over four.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lines_cli.errors import DepthError
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import Names
from lines_cli.scaling.by_hand import without
from lines_cli.scaling.find_depth import DepthMap, Place, find_depth


def places_of_all(
    inputs: Inputs, names: Iterable[str], incomplete: Mapping[str, Names], by_hand: Mapping[str, Any]
) -> dict[str, Place]:
    """Where the tensors of all sides stand, by the names of all and by the config of a side that has the tensor: what
    is a layer of its own model is one, though the output's config may not count it.

    Args:
        inputs: the inputs.
        names: of every tensor of every side, as the leading side calls it.
        incomplete: those that some side lacks.
        by_hand: what the recipe says of depth.

    Raises:
        DepthError: no reading, whatever the config says.
        RecipeError: what is said by hand does not fit.
    """
    names = list(names)
    places: dict[str, Place] = {}
    known: list[tuple[Mapping[str, Any], DepthMap]] = []
    for side, checkpoint in enumerate(inputs.checkpoints):
        if not any(row[side] is not None for row in incomplete.values()):
            continue
        config = checkpoint.config or {}
        depth = next((depth for other, depth in known if other == config), None)
        if depth is None:
            try:
                depth = find_depth(names, config=config, **by_hand)
            except DepthError:  # its own model is longer or shorter than all of them together
                depth = find_depth(names, **by_hand)
            known.append((config, depth))
        for name, place in depth.places.items():
            row = incomplete.get(name)
            if row is None or row[side] is not None:
                places.setdefault(name, place)
    return places


def depth_of_kept(
    parameters: Mapping[str, int],
    kept: Collection[str],
    config: Mapping[str, Any],
    by_hand: Mapping[str, Any],
    notes: list[str],
) -> DepthMap:
    """Where the tensors of the output stand, among themselves.

    Args:
        parameters: how many each tensor of every side holds.
        kept: the names of those that the output has.
        config: the output's.
        by_hand: what the recipe says of depth. An expression for what is no layer may be found in what is left out
            alone.
        notes: gets a line where the config counts layers that were left out.

    Raises:
        DepthError: no reading, or no single one.
        RecipeError: what is said by hand does not fit.
    """
    held = {name: size for name, size in parameters.items() if name in kept}
    if len(held) == len(parameters):
        return find_depth(held, config=config, parameters=held, **by_hand)
    expression = by_hand.get("not_layers")
    if expression is not None:
        layers = set(without(list(parameters), expression))
        if layers.issuperset(held):
            by_hand = {**by_hand, "not_layers": None}
    try:
        return find_depth(held, config=config, parameters=held, **by_hand)
    except DepthError as refusal:
        depth = find_depth(held, parameters=held, **by_hand)
        notes.append(refusal.message)
        return depth
