"""The names of a part of a model, such as an adapter has, made up to those of all layers: where only some layers are
there, names do not tell how many there are, and a layer's number has to be told from its place among those that are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

from lines_cli.errors import DepthError, RecipeError, printable, some
from lines_cli.scaling.by_hand import select_stack
from lines_cli.scaling.find_depth import DepthMap
from lines_cli.scaling.numbered_lists import is_index, is_layer_name, never_holds_layers

Part = tuple[str, int, str]
"""A name in three: the list of layers that it lies in, its number there, and the rest."""


def layers_held(names: Iterable[str]) -> dict[str, set[int]]:
    """The lists of layers in the names of a part of a model, each with the numbers that are there."""
    held: dict[str, set[int]] = defaultdict(set)
    for name in names:
        if (part := _in_a_layer(name)) is not None:
            held[part[0]].add(part[1])
    return dict(held)


def completed(names: Iterable[str], layers: int | Mapping[str, int]) -> list[str]:
    """The names with those of the layers that are lacking, each as those that are there.

    Args:
        names: of some tensors of a model.
        layers: how many layers the model has; or of each list of layers, by its name or a part of it.

    Raises:
        DepthError: there are several lists, and it is not said of each how many layers it has.
        RecipeError: a layer has a number beyond that; or the name of a list is none.
    """
    names = list(names)
    parts = [(name, _in_a_layer(name)) for name in names]
    tails: dict[str, dict[str, None]] = defaultdict(dict)
    for _, part in parts:
        if part is not None:
            tails[part[0]][part[2]] = None
    counts = _counts(list(tails), layers)
    for name, part in parts:
        if part is not None and part[1] >= counts[part[0]]:
            raise RecipeError(
                f"num_layers is {counts[part[0]]:,}, and {printable(name)} lies in layer {part[1]:,}, counted from 0",
                hint="Say how many layers the base has.",
            )
    found = dict.fromkeys(names)
    for stack, ends in tails.items():
        for index in range(counts[stack]):
            found.update(dict.fromkeys(f"{stack}.{index}.{end}" for end in ends))
    return list(found)


def refuse_other_counts(depth: DepthMap, names: Iterable[str], layers: int | Mapping[str, int]) -> None:
    """Refuse a reading of completed names in which a stack has another number of layers than was said: blocks lie in
    stages, say.

    Raises:
        DepthError: which stack.
    """
    held = layers_held(names)
    counts = _counts(list(held), layers)
    wrong = [stack for stack in depth.stacks if counts.get(stack.name, stack.layers) != stack.layers]
    if wrong or (held and not depth.stacks):
        said = [f"{stack.name}: {stack.layers} layers, and {counts[stack.name]} were said" for stack in wrong]
        raise DepthError(
            "the number of layers does not fit the names of what is changed"
            + (f":\n{some(said)}" if said else ": no stack of layers is found in them"),
            hint="Give the base: --base BASE, of which headers are read.",
        )


def _counts(stacks: list[str], layers: int | Mapping[str, int]) -> dict[str, int]:
    if isinstance(layers, int):
        if len(stacks) > 1:
            each = " ".join(f"--num-layers {stack}=L" for stack in stacks[:4])
            raise DepthError(
                f"there are {len(stacks):,} lists of layers, and one number of layers is said:\n{some(stacks)}",
                hint=f"Say it of each ({each}), or give the base: --base BASE.",
            )
        return dict.fromkeys(stacks, layers)
    counts = {select_stack(stacks, name): number for name, number in layers.items()}
    if lacking := [stack for stack in stacks if stack not in counts]:
        raise DepthError(
            f"of {len(lacking):,} lists of layers it is not said how many there are:\n{some(lacking)}",
            hint=f"Add --num-layers {lacking[0]}=L, or give the base: --base BASE.",
        )
    return counts


def _in_a_layer(name: str) -> Part | None:
    """The list of layers that a name lies in: the outermost that is called layers, else the outermost that may be."""
    segments = name.split(".")
    numbered = [at for at in range(1, len(segments) - 1) if is_index(segments[at])]
    called = [at for at in numbered if is_layer_name(segments[at - 1])]
    others = [at for at in numbered if not never_holds_layers(segments[at - 1])]
    if not called and not others:
        return None
    at = (called or others)[0]
    return ".".join(segments[:at]), int(segments[at]), ".".join(segments[at + 1 :])
