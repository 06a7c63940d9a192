"""Where a tensor stands: its stack of blocks, and its place in it, read off tensor names.

Coefficients grow with depth, so a parameter on the wrong layer spoils everything after it. A few general rules, no
list of architectures:

1. Every whole-number segment of a dotted name is a candidate: what stands before it is a prefix, the number an index.
   `layer1.0.conv1` is read as `layer` 1, too.
2. A prefix is a stack if its last segment is a name for layers (`layers`, `h`, `blocks`, `stages`, ...), its indices
   are near-contiguous, its layers share at least one child name, and they are not all single modules while another
   list's are more. A list of another name is one, too, if its units are alike and hold several modules each; or where
   there is nothing else, as a plain `nn.Sequential`.
3. The outermost stack wins; what lies deeper belongs to its layer (`encoder.block.5.layer.0` to block 5,
   `layers.30.experts.3` to layer 30).
4. Stages that hold alike blocks (`layers.s.blocks.b`, `layer1.0`) count through, stage by stage.
5. Stacks that run one after the other count on (`double_blocks` then `single_blocks`; `down_blocks`, `mid_block`,
   `up_blocks`), and lists that run in turn are one; all others (the towers of CLIP, encoder and decoder) have a depth
   of their own.
6. Routed experts, projectors, embedders, prediction heads are never stacks; an index at or beyond the layers that the
   config counts is outside (multi-token prediction).
7. What a wrapper of training puts into a name (`layers.3._orig_mod.mlp`) is not looked at.

`numbered_lists` decides 1 to 3 and 6, `running_order` 4 and 5; `readings` finds what was a toss-up. What the user says
(`by_hand`) overrules all of it, and what could be read otherwise is said. Nothing here reads a file or needs torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

from lines_cli.errors import DepthError, some
from lines_cli.scaling import by_hand, doubts
from lines_cli.scaling.by_hand import LAYERS_HINT
from lines_cli.scaling.numbered_lists import (
    NumberedList,
    Prefix,
    choose_stacks,
    dotted,
    is_index,
    never_holds_layers,
    read_lists,
    survey,
)
from lines_cli.scaling.readings import Toss, tosses
from lines_cli.scaling.running_order import Lane, in_order
from lines_cli.scaling.wrappers import without_wrappers

_SHARED_LAYERS = "layer_groups"
_CONFIG_COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
    "depth",
)
_OTHER_TOWER = re.compile(r"vis|image|audio|speech|encoder")
_MOST_EXTRA_LAYERS = 4  # multi-token prediction adds a few layers behind the counted ones, never a second model


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's place: its stack's name and the layer's position in it, from 0 (the paper's l is `index + 1`)."""

    stack: str
    index: int


@dataclass(frozen=True, slots=True)
class Stack:
    """A run of residual blocks. `name` is its dotted prefix, `layers` its L; `component` is the model that it is of,
    where there are several.
    """

    name: str
    layers: int
    component: str | None = None


Side = Literal["before", "after"]
"""On which side of the blocks a tensor outside them stands."""

# Words in the names of what follows the blocks (final norm, head, pooler), and of what does not, though it has a norm
# or an output of its own (embeddings, stems, and the projectors that feed one tower's output into another).
_SURELY_AFTER = re.compile(r"mtp(?:_.*)?|attn_?pool|pre_classifier|.*unembed.*|embed_out|vocab_.*", re.DOTALL)
_NOT_AFTER = re.compile(
    r"embeddings?|.*embed(?:der|ding)?s?_.*|.*_emb(?:ed)?(?:der|ding)?s?|patch.*|.*stem.*|.*_in|pre_.*|.*_pre|prenet"
    r"|.*(?:projector|merger|connector|aligner|resampler|qformer|adapter).*|feature_.*|per_layer_.*|post_conv_.*",
    re.DOTALL,
)
_AFTER = re.compile(
    r"(?:.*_)?(?:norm|layernorm|ln)(?:_?(?:f|final|post|out|after))?|(?:final|post)_?.*norm.*|final_layer|score|proj"
    r"|fc\d*|out|.*head.*|lm_.*|.*classifier.*|.*pool.*|.*pred|.*predict.*|.*_out(?:_\d+)?|.*output.*|.*logit.*"
    r"|generator.*|.*postnet|(?:text|visual|audio)_projection|.*(?:text|vision)_proj|seq_relationship|.*summary",
    re.DOTALL,
)


def position(index: int, layers: int) -> float:
    """How deep a layer lies: 0 for the first of a stack to 1 for the last; 1 for the only one."""
    return index / (layers - 1) if layers > 1 else 1.0


@dataclass(frozen=True, slots=True)
class Region:
    """What the names of a model's tensors begin with, where there are several models.

    Attributes:
        prefix: that; empty for all names that begin with no other's.
        component: the model.
        added: whether the names are its own behind that, as in a folder of several.
        after: whether it has no blocks and stands behind those of another.
    """

    prefix: str
    component: str
    added: bool = True
    after: bool = False


@dataclass(frozen=True)
class DepthMap:
    """Which tensor stands where. A name that `places` lacks is outside the blocks.

    `notes` are what a person should know of how it was decided; `regions` say which of several models a name is of.
    """

    stacks: tuple[Stack, ...]
    places: dict[str, Place]
    notes: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()

    @cached_property
    def layers(self) -> dict[str, int]:
        """Each stack's L, by name."""
        return {stack.name: stack.layers for stack in self.stacks}

    def position_of(self, name: str) -> float:
        """How deep a tensor's layer lies in its stack (`position`); 0 outside the blocks."""
        place = self.places.get(name)
        return 0.0 if place is None else position(place.index, self.layers[place.stack])

    def region_of(self, name: str) -> Region | None:
        """Which of several models a tensor belongs to; None where there is one."""
        fitting = [region for region in self.regions if name.startswith(region.prefix)]
        return max(fitting, key=lambda region: len(region.prefix), default=None)

    def component_of(self, name: str) -> str | None:
        """The name of that model."""
        region = self.region_of(name) if self.regions else None
        return region.component if region is not None else None

    def side_of(self, name: str) -> Side:
        """On which side of the blocks a tensor outside them stands; before them, where its name does not tell."""
        region = self.region_of(name)
        if region is not None and region.after:
            return "after"
        name = dotted(name)
        for stack in self.stacks:
            inside, prefix, rest = name.partition(f"{dotted(stack.name)}.")
            if prefix and not inside and is_index(rest.partition(".")[0]):
                return "after"  # a layer beyond those that the config counts
        if region is not None and region.added:
            name = name.removeprefix(dotted(region.prefix))
        *modules, last = name.split(".")
        words = modules if last in ("weight", "bias") and modules else [*modules, last]
        if words == ["decoder"] or any(_SURELY_AFTER.fullmatch(word) for word in words):
            return "after"
        if any(_NOT_AFTER.fullmatch(word) for word in words):
            return "before"
        return "after" if any(_AFTER.fullmatch(word) for word in words) else "before"

    def select(self, part: str) -> str:
        """The name of the one stack that `part` names (`select_stack`).

        Raises:
            RecipeError: no stack, or several.
        """
        return by_hand.select_stack([stack.name for stack in self.stacks], part)


def find_depth(
    names: Iterable[str],
    *,
    config: Mapping[str, Any] | None = None,
    layers: str | None = None,
    series: Sequence[Sequence[str]] = (),
    not_layers: str | None = None,
    parameters: Mapping[str, int] | None = None,
) -> DepthMap:
    """Map tensor names to stacks and layers.

    Args:
        names: every tensor name of the checkpoint.
        config: its parsed `config.json`, against which the number of layers is checked.
        layers: a regular expression that overrules detection, searched in every name: group `index` is the layer's
            number, the optional group `index2` that of the block in it, the optional group `stack` the stack's name.
        series: for each stack to be joined the names of what it consists of, in the order in which they run: stacks,
            numbered lists, or modules that are one layer; `reversed(NAME)` runs against its numbers.
        not_layers: a regular expression; names in which it is found are outside the blocks, as if they were not there.
        parameters: how many each tensor holds, by which what lies outside is weighed; without it, each counts as one.

    Raises:
        DepthError: no reading; the message lists what was found. Or two that are as plain as each other, or a list that
            is not called layers, hold most of the model.
        RecipeError: `layers` or `not_layers` is not a usable expression, or takes too long; `series` names what is not
            there.
    """
    names = list(names)
    if not_layers is not None:
        names = by_hand.without(names, not_layers)
    if layers is None and (wrapped := without_wrappers(names)):
        plain = {name: wrapped.get(name, name) for name in names}
        held = {plain[name]: (parameters or {}).get(name, 1) for name in names}
        depth = find_depth(held, config=config, series=series, parameters=held if parameters else None)
        return replace(depth, places={name: depth.places[at] for name, at in plain.items() if at in depth.places})
    lists = {} if layers is not None and not series else read_lists(names)
    notes: list[str] = []
    tossed: list[Toss] = []
    said: set[str] = set()
    if layers is not None:
        lanes = by_hand.place_by_pattern(names, layers)
    else:
        lanes, notes, tossed = _detected(names, lists, config or {}, series)
    if series:
        lanes, said = by_hand.join_series(lanes, series, lists, names)
    places: dict[str, Place] = {}
    for lane in lanes:
        for index, unit in enumerate(lane.units):
            places.update(dict.fromkeys(unit, Place(lane.name, index)))
    if layers is None:
        notes += doubts.tossed(tossed, names, said, parameters)
        notes += doubts.left_outside(lists, names, places, parameters)
        notes += doubts.little_inside(places, parameters or {})
        notes += doubts.shared_layers(names, config or {})
    return DepthMap(tuple(Stack(lane.name, len(lane.units)) for lane in lanes), places, tuple(notes))


def joined(parts: Sequence[tuple[DepthMap, Sequence[Region]]]) -> DepthMap:
    """The depth of several models that stand beside each other.

    Args:
        parts: of each its depth, by its own names, and its regions, mostly of one component. Where a region is `added`,
            its prefix is put before every name.
    """
    all_regions = tuple(region for _, regions in parts for region in regions)
    whole = DepthMap((), {}, regions=all_regions)
    stacks: list[Stack] = []
    places: dict[str, Place] = {}
    notes: list[str] = []
    for depth, regions in parts:
        one = {region.component for region in regions}
        before = next((region.prefix for region in regions if region.added), "")
        called = {stack.name: _behind(before, stack.name) for stack in depth.stacks}
        for stack in depth.stacks:
            name = called[stack.name]
            stacks.append(Stack(name, stack.layers, min(one) if len(one) == 1 else whole.component_of(f"{name}.")))
        places |= {before + name: Place(called[place.stack], place.index) for name, place in depth.places.items()}
        notes += [f"{min(one)}: {note}" if len(one) == 1 else note for note in depth.notes]
    return DepthMap(tuple(stacks), places, tuple(notes), all_regions)


def _behind(before: str, stack: str) -> str:
    """A stack's name with a prefix before each name that it is made of."""
    return "+".join(before + name if name else before.rstrip(".") for name in stack.split("+")) if before else stack


def _detected(
    names: list[str], lists: Mapping[Prefix, NumberedList], config: Mapping[str, Any], series: Sequence[Sequence[str]]
) -> tuple[list[Lane], list[str], list[Toss]]:
    """The stacks by the names and the config, and what a person should know of them who has not said it in a series;
    and what could as well be read otherwise.
    """
    shared = [name for name in names if _SHARED_LAYERS in name]
    if shared:
        raise DepthError(
            f"{shared[0]}: the layers of this model share their weights (as ALBERT's do), "
            "so a weight has no depth of its own",
            hint="Scale all of it alike with --beta 0, or place the layers yourself with --layers REGEX. If they are a "
            "part of a larger model, --not-layers REGEX leaves them outside.",
        )
    choice = choose_stacks(lists, names)
    found = choice.found
    if not found:
        numbered = "Numbered prefixes:\n" + some(survey(lists)) if lists else "No name has a number in it."
        raise DepthError(
            f"no stack of layers could be found in {len(names):,} tensor names. {numbered}", hint=LAYERS_HINT
        )
    order = in_order(found, lists, names, _every(config))
    tossed = list(tosses(found, choice.passed_over, lists, choice.barred, order.counts))
    notes = _check_against_config(order.lanes, config)
    if series:
        return order.lanes, notes, tossed
    notes += order.notes
    if not any(part.called_layers for lane in order.lanes for part in lane.lists):
        taken = " and ".join(f"{lane.name or 'the numbers at the front'} ({len(lane.units)})" for lane in order.lanes)
        notes.append(f"no list is called layers or blocks; taken for layers: {taken}. --layers REGEX says otherwise")
    return order.lanes, notes, tossed


def pattern_of(stack: Stack, depth: DepthMap) -> str | None:
    """How the names of a stack's tensors begin, with what counts its layers in braces: `model.layers.{l}`, or
    `layers.{s}.blocks.{l}` where stages are counted through. None where the stack's name is no prefix of theirs.
    """
    names = [name for name, place in depth.places.items() if place.stack == stack.name]
    begins: list[tuple[str, str | None]] = []
    layers = 0
    prefixes = stack.name.split("+")
    for prefix in prefixes:
        numbered = re.compile(rf"(?P<begin>{re.escape(prefix)}[._/-]?)(?P<number>\d+)(?P<rest>[./].*)")
        found = [match for name in names if (match := numbered.match(name))]
        if not found and len(prefixes) > 1 and any(name.startswith(f"{prefix}.") for name in names):
            begins.append((prefix, None))  # a single unit, as a U-Net's middle
            layers += 1
            continue
        if not found:
            return None
        numbers = {match["number"] for match in found}
        layers += len(numbers)
        inner = [match["begin"] for each in found if (match := _INNER_NUMBER.match(each["rest"]))]
        begins.append((found[0]["begin"], inner[0] if inner else ""))
    counted = layers == stack.layers
    return " + ".join(
        begin if inner is None else f"{begin}{{s}}{inner}{{l}}" if inner and not counted else f"{begin}{{l}}"
        for begin, inner in begins
    )


_INNER_NUMBER = re.compile(r"(?P<begin>\.(?:\w+\.)?)\d+(?:\.|$)")


# --- the config's word on the number of layers ---


def config_counts(config: Mapping[str, Any]) -> dict[str, int]:
    """Every number of layers that a config gives, nested configs included: dotted key -> count."""
    counts = {key: n for key, n in config.items() if key in _CONFIG_COUNTS and type(n) is int and n > 0}
    if len(counts) > 1:
        counts.pop("num_hidden_layers", None)  # repeats what the family's own key says
    for key, value in config.items():
        nested = isinstance(value, Mapping) and key.endswith("config")
        if nested and not never_holds_layers(key.removesuffix("_config")):
            counts.update((f"{key}.{inner}", count) for inner, count in config_counts(value).items())
    return counts


def _check_against_config(lanes: list[Lane], config: Mapping[str, Any]) -> list[str]:
    """Hold the stacks against the numbers of layers that the config gives; returns what a person should know.

    Layers that a config does not count (multi-token prediction) are taken off the end of their stack.

    Raises:
        DepthError: the model's one stack has fewer layers than its config says.
    """
    every = config_counts(config)
    counts = _of_its_tower(lanes[0], every) if len(lanes) == 1 else every
    notes = [note for lane in lanes for note in _gaps(lane)]
    for lane in lanes:
        counted = _counted_layers(lane, len(lanes), counts)
        if counted is not None:
            key, count = counted
            indices = lane.lists[0].tails
            inside = sum(index - min(indices) < count for index in indices)
            notes.append(f"{lane.name}: {key} is {count}, so the layers from {count} on are outside the stack")
            lane.units = lane.units[:inside]
    found = Counter(n for lane in lanes for n in {len(lane.units), *(len(part.tails) for part in lane.lists)})
    unmet = {key: count for key, count in every.items() if not found[count]}
    repeated = Counter(every.values()) - found if len(lanes) > 1 else Counter()
    if not unmet and not repeated:
        return notes
    said = ", ".join(f"{key} is {count}" for key, count in (unmet or every).items())
    stacks = " and ".join(f"{lane.name} has {len(lane.units)} layers" for lane in lanes)
    if len(lanes) == 1 and _says_how_many(config, counts, lanes[0]) and len(lanes[0].units) < min(counts.values()):
        raise DepthError(
            f"{lanes[0].name} holds {len(lanes[0].units)} layers, but in the config {said}",
            hint="Is the checkpoint complete? If it is, say where the layer's number stands with --layers REGEX.",
        )
    return [*notes, f"in the config {said}; by the names {stacks}"]


def _every(config: Mapping[str, Any]) -> int:
    """Of how many layers one has cross-attention, by the config; 1 if it does not say."""
    own = [n for key, n in config.items() if _INTERVAL.fullmatch(key) and type(n) is int and n > 0]
    nested = [_every(value) for key, value in config.items() if isinstance(value, Mapping) and key.endswith("config")]
    return max([*own, *nested], default=1)


_INTERVAL = re.compile(r"cross_.*(?:interval|every).*")


def _of_its_tower(lane: Lane, counts: Mapping[str, int]) -> dict[str, int]:
    """Without the numbers that nested configs of other towers give, which the names may lack: a language model's layers
    are not those of `vision_config`.
    """
    own = _OTHER_TOWER.search(lane.name)
    return {key: n for key, n in counts.items() if own or "." not in key or not _OTHER_TOWER.search(key.split(".")[0])}


def _says_how_many(config: Mapping[str, Any], counts: Mapping[str, int], lane: Lane) -> bool:
    """Whether a config's number of layers means those of a stack: there is one number, and neither the config nor the
    names count by stages (EfficientNet's `num_hidden_layers` is four times the stages' repeats, ResNet's `depth` 50).
    """
    staged = any(_BY_STAGE.fullmatch(key) and isinstance(value, list) for key, value in config.items())
    of_one_list = len(lane.units) == len(lane.lists[0].tails)
    return len(set(counts.values())) == 1 and of_one_list and not staged


_BY_STAGE = re.compile(r"(?:.*_)?(?:depths|repeats)|(?:num_|n_)?(?:blocks|layers)(?:_per_stage)?")


def _gaps(lane: Lane) -> list[str]:
    """Numbers that a list called layers leaves out, which may be layers that the file lacks."""
    notes = []
    for part in lane.lists:
        missing = [index for index in range(min(part.tails), max(part.tails)) if index not in part.tails]
        if missing and part.called_layers:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            notes.append(f"{part.name} holds nothing at {shown}; its layers are counted without")
    return notes


def _counted_layers(lane: Lane, lanes: int, counts: Mapping[str, int]) -> tuple[str, int] | None:
    """The config's key and count of a stack that holds a few layers more than it counts.

    Which count speaks of which stack is plain only where there is one stack, or where a nested config is the language
    model's.
    """
    total = len(lane.units)
    if len(lane.lists) > 1 or total != len(lane.lists[0].tails) or total in counts.values():
        return None
    if lanes > 1:
        of_text = not _OTHER_TOWER.search(lane.name)
        counts = {key: count for key, count in counts.items() if key.startswith("text_config.") and of_text}
    fitting = [(count, key) for key, count in counts.items() if count < total <= count + _MOST_EXTRA_LAYERS]
    return max(fitting)[::-1] if fitting else None
