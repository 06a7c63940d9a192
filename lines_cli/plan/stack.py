"""A model stacked from layers of others, as mergekit's `slices` say: opened as one checkpoint, whose tensors lie in the
files of those.

Layers are renumbered, and the config follows: how many there are, and what lists by layer say. What stands before the
blocks is the first slice's model's, what stands behind them the last one's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import Any

from lines_cli.checkpoint.header import StoredTensor
from lines_cli.checkpoint.reader import Checkpoint, views_of
from lines_cli.errors import DepthError, MismatchError, UnsupportedError, printable, some
from lines_cli.recipe.schema import Part
from lines_cli.scaling.find_depth import DepthMap, config_counts, find_depth


def stack_layers(parts: Sequence[Part], opening: Callable[[str], Checkpoint], *, like: str | None = None) -> Checkpoint:
    """The model that has these layers, one part behind the other; one whose own layers these are, as it is.

    Args:
        parts: layers of models.
        opening: opens a model by its name.
        like: of these the one whose config and other files it has; unless it is one of them, the first.

    Raises:
        CheckpointError: as of `opening`.
        UnsupportedError: a model cannot be taken apart: a pipeline, an adapter, weights in 8 bits.
        DepthError: its layers are not one numbered list, or there are fewer.
        MismatchError: layers are not alike, or what stands outside them is not.
    """
    opened = {part.model: opening(part.model) for part in parts}
    first = parts[0]
    if len(opened) == 1 and _is_all_of(opened[first.model], parts):
        return opened[first.model]
    cut = {name: _cut(checkpoint) for name, checkpoint in opened.items()}
    layers = [_Layer(cut[part.model], index) for part in parts for index in range(*_checked(part, cut[part.model]))]
    home = cut[like] if like in cut else cut[first.model]
    for one in cut.values():
        if one.prefix != home.prefix:
            raise MismatchError(
                f"the layers of {one.model.name} are called {one.prefix}N, and those of {home.model.name} "
                f"{home.prefix}N: they cannot stand in one stack",
                hint="Save both with the same library and version first.",
            )
    in_place = all(layer.of is home and layer.index == number for number, layer in enumerate(layers))
    if not in_place:
        _refuse_unlike(layers)
        _refuse_places(home, layers)
    ends = cut[first.model], cut[parts[-1].model]
    _refuse_other_ends(*ends)
    files = list(opened.values())
    begins = dict(zip(opened, (0, *accumulate(len(checkpoint.files) for checkpoint in files)), strict=False))

    def placed(of: _Cut, name: str) -> StoredTensor:
        stored = of.model.tensors[name]
        return stored._replace(file=begins[of.name] + stored.file)

    tensors = {name: placed(ends[0], name) for name in ends[0].before}
    for number, layer in enumerate(layers):
        for rest, name in layer.tensors.items():
            tensors[f"{home.prefix}{number}.{rest}"] = placed(layer.of, name)
    tensors |= {name: placed(ends[1], name) for name in ends[1].behind}
    changes = dict(_config_changes(home, layers, in_place=in_place))
    called = " and ".join(f"{part.model} {list(part.layer_range)}" for part in parts[:_MOST_NAMED])
    more = f" and {len(parts) - _MOST_NAMED} more" if len(parts) > _MOST_NAMED else ""
    return replace(
        home.model,
        name=f"{called}{more}",
        hub_id=None,
        files=tuple(chain.from_iterable(checkpoint.files for checkpoint in files)),
        states=tuple(chain.from_iterable(checkpoint.states for checkpoint in files)),
        views=tuple(views_of(files)) if any(checkpoint.views for checkpoint in files) else (),
        tensors=tensors,
        config=_changed(home.model.config, changes),
        config_changes={**home.model.config_changes, **changes},
        metadata=home.model.metadata if len(files) == 1 else {},
        stacked=tuple(files),
        is_here=all(checkpoint.is_here for checkpoint in files),
        notes=(*dict.fromkeys(note for one in files for note in one.notes), *_notes(layers, ends)),
    )


_MOST_NAMED = 4


@dataclass(frozen=True, slots=True)
class _Cut:
    """A model taken apart.

    Attributes:
        name: as the recipe calls it.
        model: it.
        prefix: what stands before a layer's number, up to the dot.
        layers: for each layer its tensors: what stands behind the number -> their names.
        before, behind: the names of those outside the blocks.
    """

    name: str
    model: Checkpoint
    prefix: str
    layers: tuple[dict[str, str], ...]
    before: tuple[str, ...]
    behind: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer of a model."""

    of: _Cut
    index: int

    @property
    def tensors(self) -> dict[str, str]:
        return self.of.layers[self.index]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {rest: self.of.model.tensors[name].info.shape for rest, name in self.tensors.items()}


def _is_all_of(checkpoint: Checkpoint, parts: Sequence[Part]) -> bool:
    """Whether parts of one model are all of its layers in their order. Of several stacks one part may be any."""
    ranges = [part.layer_range for part in parts]
    if ranges[0][0] != 0 or any(end != first for (_, end), (first, _) in pairwise(ranges)):
        return False
    whole = [stack.layers == ranges[-1][1] for stack in _depth(checkpoint).stacks]
    return any(whole) if len(parts) == 1 else all(whole)


def _depth(checkpoint: Checkpoint) -> DepthMap:
    parameters = {name: stored.info.numel for name, stored in checkpoint.tensors.items()}
    try:
        return find_depth(parameters, config=checkpoint.config, parameters=parameters)
    except DepthError as error:
        raise DepthError(f"slices: {checkpoint.name}: {error.message}", hint=_WHOLE) from None


_WHOLE = "slices stack layers of models that have one numbered list of them; merge whole models with models:."


def _cut(checkpoint: Checkpoint) -> _Cut:
    """Take a model apart.

    Raises:
        UnsupportedError, DepthError: as `stack_layers`.
    """
    name = checkpoint.name
    if checkpoint.components:
        what = ", ".join(component.name for component in checkpoint.components)
        raise UnsupportedError(f"slices: {name} holds several models ({what}), and layers of one are stacked")
    if checkpoint.parts:
        raise UnsupportedError(
            f"slices: {name} is an adapter on a base, and cannot be taken apart by layers",
            hint="Merge it into its base first, and stack that: lines edit BASE ADAPTER --alpha 1 --beta 0 -o FT.",
        )
    if checkpoint.formulas:
        raise UnsupportedError(
            f"slices: {name} is stored in 8 bits, and cannot be taken apart by layers",
            hint="Write it in whole numbers first (passthrough, with dtype: bfloat16), and stack that.",
        )
    depth = _depth(checkpoint)
    if len(depth.stacks) != 1:
        found = " and ".join(f"{one.name} ({one.layers})" for one in depth.stacks)
        raise DepthError(f"slices: {name} has {len(depth.stacks)} stacks of layers, {found}", hint=_WHOLE)
    (only,) = depth.stacks
    prefix = f"{only.name}." if only.name else ""
    layers: list[dict[str, str]] = [{} for _ in range(only.layers)]
    for tensor, place in depth.places.items():
        begin = f"{prefix}{place.index}."
        if not tensor.startswith(begin):
            raise DepthError(
                f"slices: {name}: {printable(tensor)} is of layer {place.index}, and its name does not begin with "
                f"{begin}",
                hint=_WHOLE,
            )
        layers[place.index][tensor.removeprefix(begin)] = tensor
    outside = [tensor for tensor in checkpoint.tensors if tensor not in depth.places]
    if beyond := [tensor for tensor in outside if re.match(rf"{re.escape(prefix)}\d+\.", tensor)]:
        raise DepthError(
            f"slices: {name} has layers beyond the {only.layers} that its config counts, and no place for them:\n"
            f"{some(beyond)}",
            hint=_WHOLE,
        )
    if of_each := [tensor for tensor in outside if "per_layer" in tensor]:
        raise UnsupportedError(
            f"slices: {name} has tensors outside its layers that hold a part for each of them, and cannot be taken "
            f"apart by layers:\n{some(of_each)}",
            hint=_WHOLE,
        )
    behind = [tensor for tensor in outside if depth.side_of(tensor) == "after"]
    before = [tensor for tensor in outside if depth.side_of(tensor) == "before"]
    return _Cut(name, checkpoint, prefix, tuple(layers), tuple(before), tuple(behind))


def _checked(part: Part, of: _Cut) -> tuple[int, int]:
    """The range of a part, which its model has.

    Raises:
        DepthError: it has fewer layers.
    """
    if part.layer_range[1] > len(of.layers):
        raise DepthError(
            f"slices: layer_range {list(part.layer_range)} of {part.model}: it has {len(of.layers)} layers "
            f"({of.prefix}N), numbered from 0",
            hint="A range ends before its second number: [0, 2] are layers 0 and 1.",
        )
    return part.layer_range


def _refuse_unlike(layers: Sequence[_Layer]) -> None:
    """Refuse layers that do not hold tensors of the same names and shapes: where one stands decides what it is.

    Raises:
        MismatchError: the first two.
    """
    first, own = layers[0], layers[0].shapes
    for layer in layers[1:]:
        theirs = layer.shapes
        if theirs == own:
            continue
        differ = [
            f"{printable(rest)}: {_shape(own.get(rest))} and {_shape(theirs.get(rest))}"
            for rest in own | theirs
            if own.get(rest) != theirs.get(rest)
        ]
        raise MismatchError(
            f"slices: layer {first.index} of {first.of.name} and layer {layer.index} of {layer.of.name} are not "
            f"alike:\n{some(differ)}",
            hint="Only layers that hold the same tensors can stand in any order.",
        )


def _refuse_places(home: _Cut, layers: Sequence[_Layer]) -> None:
    """Refuse a layer in a place whose own layer holds other tensors, as ModernBERT's first lacks a norm: the model that
    is built by the config has that one's there. Where a list in the config says what each layer is, that goes along.

    Raises:
        MismatchError: the first one.
    """
    held = [frozenset(own) for own in home.layers]
    if len(set(held)) == 1 or any(_tells(values, held) for values in _lists_by_layer(home)):
        return
    for number, (layer, own) in enumerate(zip(layers, home.layers, strict=False)):
        if differ := own.keys() ^ layer.tensors.keys():
            raise MismatchError(
                f"slices: layer {layer.index} of {layer.of.name} would be layer {number}, and does not hold what layer "
                f"{number} of {home.name} does:\n{some(sorted(differ))}",
                hint="Leave such layers in their places, as in layer_range: [0, N].",
            )


def _lists_by_layer(home: _Cut) -> Iterator[list[Any]]:
    config, had = home.model.config, len(home.layers)
    for within in dict.fromkeys(tuple(key.split("."))[:-1] for key, count in _counts(config) if count == had):
        yield from (_at(config, within)[key] for key in _listed(_at(config, within), had))


def _tells(values: Sequence[Any], held: Sequence[frozenset[str]]) -> bool:
    """Whether layers of which a list says the same hold the same tensors."""
    found: dict[str, frozenset[str]] = {}
    return all(found.setdefault(repr(value), own) == own for value, own in zip(values, held, strict=True))


def _shape(shape: tuple[int, ...] | None) -> str:
    return "not there" if shape is None else str(list(shape))


def _refuse_other_ends(first: _Cut, last: _Cut) -> None:
    """Refuse what stands before and behind the blocks, where it is of two models that are not alike there.

    Raises:
        MismatchError: names both.
    """
    if first is last:
        return
    ends = [{name: one.model.tensors[name].info.shape for name in (*one.before, *one.behind)} for one in (first, last)]
    differ = [
        f"{printable(name)}: {_shape(ends[0].get(name))} and {_shape(ends[1].get(name))}"
        for name in ends[0] | ends[1]
        if ends[0].get(name) != ends[1].get(name)
    ]
    if differ:
        raise MismatchError(
            f"slices: outside their layers {first.name}, which is the first, and {last.name}, which is the last, are "
            f"not alike:\n{some(differ)}",
            hint="The output has its embeddings from the first and its head from the last: these have to fit.",
        )


# --- the config ---

# Lists with a value for each layer; and keys by which a config says of layers what they are by their number.
_BY_LAYER = re.compile(r".*(?:layer|block|attn|attention|pattern|sparsity|intermediate|heads|multipliers|rope).*")
_BY_NUMBER = re.compile(
    r"sliding_window_pattern|.*_every_n_layers|full_attention_interval|attn_layer_.*|expert_layer_.*"
    r"|decoder_sparse_step|moe_layer_freq|first_k_dense_replace|interleave_moe_layer_step|no_rope_layer_interval"
    r"|num_kv_shared_layers|max_window_layers|attention_types|num_nextn_predict_layers|.*layers?_(?:ids|idxs|indices)"
    r"|mlp_only_layers|moe_layers|cross_attention_layers|hybrid_override_pattern"
)
_OF_ATTENTION = re.compile(r"sliding_window_pattern|.*_every_n_layers|full_attention_interval|max_window_layers")
_EVERY_LAYER = ("decoder_sparse_step", "moe_layer_freq", "interleave_moe_layer_step")


def _config_changes(home: _Cut, layers: Sequence[_Layer], *, in_place: bool) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What of the config is otherwise in one with these layers.

    Args:
        home: whose config it is.
        layers: of the output.
        in_place: whether each is one of its own, under its own number.

    Raises:
        UnsupportedError: the config says by their numbers what layers are, or does not say how many there are.
    """
    config, had = home.model.config, len(home.layers)
    if not config:
        return
    counts = [tuple(key.split(".")) for key, count in _counts(config) if count == had]
    if not counts:
        raise UnsupportedError(
            f"slices: the config of {home.name} does not say under a key that is known that there are {had} layers, so "
            f"it cannot say that there are {len(layers)}",
            hint=_WHOLE,
        )
    for path in counts:
        yield path, len(layers)
    for within in dict.fromkeys(path[:-1] for path in counts):
        of_them = _at(config, within)
        listed = _listed(of_them, had)
        if not in_place:
            _refuse_by_number(home, of_them, listed)
        for key in sorted(listed):
            every = of_them[key] == list(range(had))  # the numbers of layers, of all
            new = list(range(len(layers))) if every else [_of_layer(layer, within, key) for layer in layers]
            yield (*within, key), new


def _listed(config: Mapping[str, Any], had: int) -> set[str]:
    """The keys of lists with something for each of so many layers."""
    return {
        key
        for key, value in config.items()
        if isinstance(value, list) and len(value) == had and _BY_LAYER.fullmatch(key)
    }


def _counts(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Every number of layers that a config gives; also one that repeats what another key says."""
    again = {"num_hidden_layers": config["num_hidden_layers"]} if "num_hidden_layers" in config else {}
    return list((config_counts(config) | again).items())


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        config = config[key]
    return config


def _of_layer(layer: _Layer, within: Sequence[str], key: str) -> Any:
    """What a model's own list says of one of its layers.

    Raises:
        MismatchError: it has no such list.
    """
    try:
        return _at(layer.of.model.config, within)[key][layer.index]
    except (KeyError, TypeError, IndexError):
        raise MismatchError(
            f"slices: the config of {layer.of.name} does not say what {key} is of layer {layer.index}, and that of the "
            "model whose config the output has does",
            hint="Save both with the same version of the library first.",
        ) from None


def _refuse_by_number(home: _Cut, config: Mapping[str, Any], listed: set[str]) -> None:
    """Refuse a config that says of layers what they are by their number.

    Raises:
        UnsupportedError: names the keys.
    """
    slides = config.get("use_sliding_window", True)
    said = [
        key
        for key, value in config.items()
        if _BY_NUMBER.fullmatch(key)
        and key not in listed
        and value not in (None, 0, [], False)
        and not (key in _EVERY_LAYER and value == 1)
        and not (_OF_ATTENTION.fullmatch(key) and "layer_types" in listed)
        and not (key == "no_rope_layer_interval" and "no_rope_layers" in listed)
        and not (key == "max_window_layers" and not slides)
    ]
    if said:
        what = ", ".join(f"{key}: {config[key]}" for key in said)
        raise UnsupportedError(
            f"slices: the config of {home.name} says what layers are by their numbers ({what}), and these change",
            hint="Such layers can only be left out at the end, as in layer_range: [0, N].",
        )


def _changed(config: Mapping[str, Any], changes: Mapping[tuple[str, ...], Any]) -> Mapping[str, Any]:
    made: dict[str, Any] = dict(config)
    for path, value in changes.items():
        inside = made
        for key in path[:-1]:
            inside[key] = dict(inside[key])
            inside = inside[key]
        inside[path[-1]] = value
    return made


# --- what is said ---


def _notes(layers: Sequence[_Layer], ends: tuple[_Cut, _Cut]) -> Iterator[str]:
    """Which layers the output has; and where what stands outside them comes from."""
    runs: list[list[int]] = []
    for number, layer in enumerate(layers):
        before = layers[number - 1] if number else None
        if before is not None and before.of is layer.of and before.index + 1 == layer.index:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    said = [
        f"{first} to {last} are {layers[first].index} to {layers[last].index} of {layers[first].of.name}"
        if first < last
        else f"{first} is {layers[first].index} of {layers[first].of.name}"
        for first, last in runs
    ]
    yield f"slices: {len(layers)} layers\n{some(said)}"
    first, last = ends
    if first is not last:
        outside = some([*first.before, *last.behind])
        yield (
            f"slices: {len(first.before):,} tensor(s) before the blocks are those of {first.name}, and "
            f"{len(last.behind):,} behind them those of {last.name}: make sure that the two have the same tokens\n"
            f"{outside}"
        )
