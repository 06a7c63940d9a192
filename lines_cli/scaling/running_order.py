"""The order in which layers run: within a list, and over lists that run one after the other or side by side.

A list of stages counts through the blocks in them; a list may run backwards; of two lists, one may run behind the
other (`double_blocks`, `single_blocks`), or beside it, unit by unit (`res_blocks`, `attention_blocks`).
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from lines_cli.errors import DepthError
from lines_cli.scaling.numbered_lists import (
    NumberedList,
    Prefix,
    begin_of,
    dotted,
    is_bare,
    is_index,
    is_layer_name,
    module_of,
    never_holds_layers,
)

Unit = list[str]
"""The tensors of one layer."""

# What is said of lists that run one after the other, where that is all that tells their names apart.
_EARLIER = frozenset({"down", "input", "in", "double", "joint", "dual", "serial"})
_LATER = frozenset({"up", "output", "out", "single", "parallel", "cls", "class", "only", "global", "post"})
_BETWEEN = frozenset({"mid", "middle", "bottleneck"})
_ONE_UNIT = re.compile(  # of these, all is one layer
    r"(?:mid|middle|bottleneck|bottle_neck|center|centre|bridge)(?:_?(?:block|layer|level|stage))?"
)
_DOWN = frozenset({"down", "input", "in"})
_UP = frozenset({"up", "output", "out"})
# What is said of lists whose units run in turn with those of a list beside them, and belong to the same layers.
_IN_TURN = frozenset({"cross", "ffn", "ffns", "mlp", "temporal", "time", "global"})
_ATTENTION = frozenset({"self", "attn", "attention", "attentions"})
_NORMS = frozenset({"norm", "norms"})
_WHOLE = re.compile(r".*(?:enc|dec)(?:oders?)?(?:_.*)?|(?:.*_)?(?:first|final|last|refine\w*|tail|head)(?:_.*)?")
_PARTS = _IN_TURN | _ATTENTION | _NORMS
_UPSAMPLERS = re.compile(r"ups|upsampl\w*")
_SIDE_BY_SIDE = re.compile(r"(?:\w*_)?(?:res|mrf|amp)\w*", re.ASCII)  # a vocoder's blocks, of several widths
_UP_TO_A_DECODER = re.compile(r"up(?:_?(?:convs?|samples?|samplers?))?_?|(?:trans|conv)?_?up_?")
_GLUED_NUMBER = re.compile(r"(?P<word>[a-zA-Z_-]*[a-zA-Z][_-]?)(?P<number>\d{1,6})", re.ASCII)
_CLOSES_A_STAGE = re.compile(r"(?:.*_)?(?:transition|upsampl\w*|out|post|final|last)(?:_.*)?")


@dataclass(slots=True, eq=False)
class Lane:
    """A stack ready to be counted.

    Attributes:
        name: what it is called.
        units: the tensors of each layer, first to last.
        lists: the numbered lists it consists of; more than one where they run one after the other.
        path: the segments of its first list's prefix.
    """

    name: str
    units: list[Unit]
    lists: list[NumberedList]
    path: Prefix = ()


@dataclass(slots=True)
class Order:
    """The stacks in the order of their names, and what a person should know of how their layers were ordered; and how
    many layers each list has by itself.
    """

    lanes: list[Lane] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    counts: dict[Prefix, int] = field(default_factory=dict)


def in_order(
    found: list[NumberedList], lists: Mapping[Prefix, NumberedList], names: list[str], every: int = 1
) -> Order:
    """The stacks with their layers in the order they run, those that run one after the other joined into one.

    Args:
        found: the lists that are stacks.
        lists: every numbered list in the names.
        names: every tensor name.
        every: of how many layers one has a unit in a list beside them, as the config says.

    Raises:
        DepthError: a list that starts in the middle.
    """
    order = Order()
    for one in found:
        backwards = _runs_backwards(one, lists)
        if backwards:
            last = max(one.tails)
            order.notes.append(
                f"{one.name} runs backwards, to judge by its names: layer {last} is counted first. "
                "--series says otherwise"
            )
        order.lanes.append(Lane(one.name, units_of(one, lists, backwards=backwards), [one], one.prefix))
        order.counts[one.prefix] = len(order.lanes[-1].units)
    lanes = _by_their_numbers(_in_turn(order.lanes, lists, every), lists, order.notes)
    order.lanes = _one_after_the_other(lanes, lists, names)
    order.notes += [note for lane in order.lanes for note in _notes_of_ways_up(lane, lists)]
    for lane in order.lanes:
        for one in lane.lists:
            _refuse_a_part(one, stages=len(lane.units) > len(one.tails))
    order.lanes.sort(key=lambda lane: lane.name)
    return order


def _notes_of_ways_up(lane: Lane, lists: Mapping[Prefix, NumberedList]) -> Iterator[str]:
    """A note for `up1` to `up4`: some U-Nets count them as they run, some by the level that they come back to."""
    for one in lane.lists:
        if one.numbered and _words(one.prefix[-1]) & _UP and not _runs_backwards(one, lists):
            series = ",".join(f"reversed({name})" if name == one.name else name for name in lane.name.split("+"))
            counted = f"{one.name} is counted from {min(one.tails)} to {max(one.tails)}"
            yield f"{counted}; where its highest number runs first, --series {shlex.quote(series)} says so"


def _refuse_a_part(one: NumberedList, *, stages: bool) -> None:
    first = min(one.tails)
    if first > (2 if one.numbered and stages else 1):  # `res2` is the first stage behind the stem
        raise DepthError(
            f"{one.name} starts at layer {first}: this is a part of a model, and depth is counted over the whole",
            hint="Give the whole checkpoint (all shards, with their index), or place the layers with --layers REGEX.",
        )


# --- within one list ---


def _runs_backwards(one: NumberedList, lists: Mapping[Prefix, NumberedList]) -> bool:
    """Whether the last unit runs first: an `up` path whose first-numbered unit alone does not upsample, or numbered
    decoders that mirror numbered encoders beside them (`encoder1`, `decoder1`), or a numbered way up that lacks the
    deepest level of the way down (`down4`), or levels that mirror those of the way down (`up_levels`, `down_levels`).
    """
    if not one.prefix:
        return False
    own = one.prefix[-1]
    if one.numbered:
        down = lists.get((*one.prefix[:-1], own.replace("up", "down")))
        lacks_the_deepest = "up" in _words(own) and down and sorted(down.tails)[:-1] == sorted(one.tails)
        return mirrored(one.prefix) in lists or bool(lacks_the_deepest)
    if "up" not in _words(own):
        return False
    down = lists.get((*one.prefix[:-1], own.replace("up", "down")))
    if down and _words(own) & {"level", "levels"} and down.tails.keys() == one.tails.keys():
        return True
    upsampling = {index for index, tails in one.tails.items() if any("upsample" in tail for tail, _ in tails)}
    return bool(upsampling) and max(one.tails) in upsampling and min(one.tails) not in upsampling


def mirrored(prefix: Prefix) -> Prefix | None:
    """The prefix of the encoders that decoders of this prefix mirror (`enc` for `dec`); None if not of decoders."""
    own = prefix[-1] if prefix else ""
    return (*prefix[:-1], own.replace("dec", "enc")) if re.search(r"(?:^|_)dec(?:oder)?", own) else None


def units_of(one: NumberedList, lists: Mapping[Prefix, NumberedList], *, backwards: bool = False) -> list[Unit]:
    """The tensors of each layer in order; stages that hold alike blocks are counted through."""
    stages = sorted(_without_ends(one), reverse=backwards)
    inner = _inner_blocks([one.tails[stage] for stage in stages], glued=one.numbered)
    if inner is None:
        return _with_upsamplers(one, lists, {index: [name for _, name in one.tails[index]] for index in stages})

    closing, _ = _beside(one, lists, re.compile(r".*(?:transition|downsampl\w*|reduction)"))
    loose: dict[str, set[int]] = defaultdict(set)  # stage-level modules in no block -> the stages that have one
    for stage in stages:
        for tail, _ in one.tails[stage]:
            if _split_inner(tail, inner) is None:
                loose[tail.split(".")[0]].add(stage)
    units: list[Unit] = []
    waiting: Unit = []
    staged = [at for at, stage in enumerate(stages) if any(_split_inner(tail, inner) for tail, _ in one.tails[stage])]
    for at, stage in enumerate(stages):
        if staged[0] < at < staged[-1] and _is_between_stages(one.tails[stage]):
            waiting += [name for _, name in one.tails[stage]]
            continue
        blocks, rest = _blocks_of(one.tails[stage], inner)
        ordered = [blocks[index] for index in sorted(blocks)] or [[]]
        for module, name in rest:
            ordered[-1 if _closes(module, loose.get(module, set()), stages) else 0].append(name)
        ordered[-1] += [name for _, name in closing.get(stage, [])]
        ordered[0] += waiting
        waiting = []
        units.extend(ordered)
    return units


def _blocks_of(tails: list[tuple[str, str]], inner: str) -> tuple[dict[int, Unit], list[tuple[str, str]]]:
    """A stage's blocks by their numbers, and what lies in none: the module, and the tensor. Attention and norms in a
    list beside the blocks (`block.0`, `attn.0`) lie in those of the same numbers.
    """
    blocks: dict[int, Unit] = defaultdict(list)
    rest = []
    beside: dict[str, dict[int, Unit]] = defaultdict(lambda: defaultdict(list))
    plain = _is_plain(tails)
    for tail, name in tails:
        block = None if plain else _split_inner(tail, inner)
        module, _, after = tail.partition(".")
        number = after.partition(".")[0]
        if block is not None:
            blocks[block[0]].append(name)
        elif is_index(number) and _words(module) & (_ATTENTION | _IN_TURN | _NORMS):
            beside[module][int(number)].append(name)
        else:
            rest.append((module, name))
    for module, units in beside.items():
        for number_of, unit in units.items():
            if units.keys() == blocks.keys():
                blocks[number_of] += unit
            else:
                rest += [(module, name) for name in unit]
    return blocks, rest


def _is_between_stages(tails: list[tuple[str, str]]) -> bool:
    """Whether a unit of a list of stages is no stage, but a downsampling: a matrix or a convolution, and its norm."""
    modules = {module_of(tail) for tail, _ in tails}
    return len(modules) <= _MOST_OF_A_DOWNSAMPLING and not any("." in module for module in modules)


_MOST_OF_A_DOWNSAMPLING = 2


def _closes(module: str, having: set[int], stages: list[int]) -> bool:
    """Whether a module in no block runs behind the blocks of its stage: that the first stage has and the last lacks; or
    by its name, where the first does not lack it.
    """
    if stages[0] not in having:
        return False
    return stages[-1] not in having or _CLOSES_A_STAGE.fullmatch(module) is not None


def _without_ends(one: NumberedList) -> list[int]:
    """The indices that are layers: of an `nn.Sequential` that is a whole network, not its stem or last convolution."""
    indices = sorted(one.tails)
    if one.called_layers or one.numbered:
        return indices
    rich = [index for index in indices if not _is_plain(one.tails[index])]
    return [index for index in indices if rich[0] <= index <= rich[-1]] if len(rich) > 1 else indices


def _is_plain(tails: list[tuple[str, str]]) -> bool:
    return is_bare(tail for tail, _ in tails)


def _beside(
    one: NumberedList, lists: Mapping[Prefix, NumberedList], word: re.Pattern[str]
) -> tuple[dict[int, list[tuple[str, str]]], int]:
    """What stands in a list of that name beside `one`: its tails, and how many indices it has."""
    for prefix, other in lists.items():
        if prefix and prefix[:-1] == one.prefix[:-1] and other.numbered == one.numbered and word.fullmatch(prefix[-1]):
            return other.tails, len(other.tails)
    return {}, 0


def _with_upsamplers(one: NumberedList, lists: Mapping[Prefix, NumberedList], by_index: dict[int, Unit]) -> list[Unit]:
    """A vocoder's blocks: behind each upsampling stand as many side by side, numbered in one list, and are averaged.
    And the decoders of a U-Net, each with the upsampling of its number before it.
    """
    units = list(by_index.values())
    if one.numbered and mirrored(one.prefix) in lists:
        before, _ = _beside(one, lists, _UP_TO_A_DECODER)
        if before.keys() == by_index.keys() and all(map(_is_plain, before.values())):
            return [[name for _, name in before[index]] + unit for index, unit in by_index.items()]
    if not one.prefix or not _SIDE_BY_SIDE.fullmatch(one.prefix[-1]):
        return units
    upsamplers, count = _beside(one, lists, _UPSAMPLERS)
    if not count or len(units) % count:
        return units
    width = len(units) // count
    together = []
    for number, index in enumerate(sorted(upsamplers)):
        blocks = units[number * width : (number + 1) * width]
        together.append([name for _, name in upsamplers[index]] + [name for block in blocks for name in block])
    return together


def _inner_blocks(stages: list[list[tuple[str, str]]], *, glued: bool) -> str | None:
    """The name of the blocks within each stage (empty for `layer1.0`), or None if the units are no stages. Where the
    stages' numbers are glued to a word, so may the blocks' be (`denseblock1.denselayer2`).
    """
    kinds = _kinds_of_blocks(stages, glued=glued)
    return kinds[0].name if kinds and not _is_sequential(kinds[0].several, stages) else None


def inner_names(one: NumberedList) -> dict[str, int]:
    """What the blocks in a list of stages may be called, each with their number; the first is what is counted, and the
    others hold nearly as much.
    """
    stages = [one.tails[stage] for stage in sorted(_without_ends(one))]
    if _inner_blocks(stages, glued=one.numbered) is None:
        return {}
    kinds = _kinds_of_blocks(stages, glued=one.numbered)
    return {kind.name: kind.number for kind in kinds if kind.size >= _NEARLY * kinds[0].size}


_NEARLY = 0.8


@dataclass(frozen=True, slots=True)
class _Kind:
    """Blocks of stages: what they are called, how many there are, how many tensors they hold, and the children of each
    in every stage that has several.
    """

    name: str
    number: int
    size: int
    several: list[dict[int, set[str]]]


def _kinds_of_blocks(stages: list[list[tuple[str, str]]], *, glued: bool) -> list[_Kind]:
    """The kinds of blocks that most stages hold, and that are alike; those that hold most are first."""
    different = {tail for tails in stages for tail, _ in tails}  # few, where all units are alike
    names = {name for tail in different if (name := _inner_name(tail, glued)) is not None}
    kinds = []
    for name in names:
        blocks: list[dict[int, set[str]]] = []
        for tails in stages:
            of_stage: dict[int, set[str]] = defaultdict(set)
            for tail, _ in () if _is_plain(tails) else tails:
                if (split := _split_inner(tail, name)) is not None:
                    of_stage[split[0]].add(split[1])
            blocks.append(of_stage)
        several = [of_stage for of_stage in blocks if len(of_stage) > 1]
        alike = sum(_alike(of_stage) for of_stage in several)
        if several and 2 * sum(map(bool, blocks)) > len(blocks) and 2 * alike > len(several):
            size = sum(len(held) for of_stage in blocks for held in of_stage.values())
            kinds.append(_Kind(name, sum(map(len, blocks)), size, several))
    return sorted(kinds, key=lambda kind: (-kind.size, kind.name == "", kind.name))


def _is_sequential(several: list[dict[int, set[str]]], stages: list[list[tuple[str, str]]]) -> bool:
    """Whether the blocks of stages are single modules beside others: a convolution and its norm, not blocks."""
    blocks = [held for of_stage in several for held in of_stage.values()]
    bare = all("." not in tail for held in blocks for tail in held)
    return bare and (any(held != blocks[0] for held in blocks) or len({_first(t) for s in stages for t, _ in s}) > 1)


def _first(tail: str) -> str:
    first = tail.partition(".")[0]
    return "" if is_index(first) else first


_GLUED_INNER = re.compile(r"([a-zA-Z_]*[a-zA-Z](?:\d+-)?[_-]?)(\d{1,6})", re.ASCII)


def _inner_name(tail: str, glued: bool) -> str | None:
    """What the blocks are called of which a tail would lie in one."""
    first, dot, rest = tail.partition(".")
    if is_index(first):
        return ""
    if dot and is_layer_name(first) and not never_holds_layers(first) and is_index(rest.partition(".")[0]):
        return first
    if glued and (match := _GLUED_INNER.fullmatch(first)):
        word = match[1]
        return _of_any_number(word) if is_layer_name(word) or word == "b" else None
    return None


def _of_any_number(word: str) -> str:
    """`block1-` -> `block-`: the number of the stage is no part of what its blocks are called."""
    return re.sub(r"\d+", "", word)


def _split_inner(tail: str, inner: str) -> tuple[int, str] | None:
    """`blocks.3.norm.weight` -> (3, `norm.weight`) for the inner name `blocks`; `b3.norm.weight` for `b`."""
    first, _, rest = tail.partition(".")
    if not inner:
        return (int(first), rest) if is_index(first) else None
    if first == inner:
        number, _, rest = rest.partition(".")
        return (int(number), rest) if is_index(number) else None
    if first.startswith(inner.rstrip("_-")) and (match := _GLUED_INNER.fullmatch(first)):
        return (int(match[2]), rest) if _of_any_number(match[1]) == inner else None
    return None


def _alike(blocks: Mapping[int, set[str]]) -> bool:
    """Whether the blocks of a stage are of one kind: at least half of all child names stand in every block. Where there
    are enough, the first and the last do not count: they may change the width, or end the stage.
    """
    sets = [blocks[index] for index in sorted(blocks)]
    sets = sets[1:-1] if len(sets) > 3 else sets
    return 2 * len(set.intersection(*sets)) >= len(set.union(*sets))


# --- over several lists ---


@lru_cache(maxsize=4096)
def _words(segment: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+", segment.lower()))


def _difference(one: Prefix, other: Prefix) -> tuple[int, frozenset[str], frozenset[str], bool] | None:
    """Where two prefixes differ, if in one segment only: its place, the words of each that the other lacks, and whether
    they share any.
    """
    if len(one) != len(other):
        return None
    places = [at for at in range(len(one)) if one[at] != other[at]]
    if len(places) != 1:
        return None
    here, there = _words(one[places[0]]), _words(other[places[0]])
    return places[0], here - there, there - here, bool(here & there)


def _rank(words: frozenset[str]) -> int | None:
    """Whether a list runs first (0), between (1) or last (2), by the words that tell it from another."""
    for rank, known in enumerate((_EARLIER, _BETWEEN, _LATER)):
        if words & known:
            return rank
    return None if words else 0


def _in_turn(lanes: list[Lane], lists: Mapping[Prefix, NumberedList], every: int) -> list[Lane]:
    """Lists whose units belong to the layers of a list beside them are merged into that, unit by unit."""
    beside: dict[Prefix, list[Lane]] = defaultdict(list)
    for lane in lanes:
        if any(_words(segment) & (_IN_TURN | _ATTENTION) for segment in lane.path[-1:]):
            beside[lane.path[:-1]].append(lane)
    gone: set[Lane] = set()
    composite: set[Lane] = set()
    for main in lanes:
        for lane in beside[main.path[:-1]]:
            if not gone & {main, lane} and main is not lane and (step := _belongs(lane, main, every)):
                _merge(dict(zip(sorted(lane.lists[0].tails), lane.units, strict=True)), main, step)
                gone.add(lane)
                composite.add(main)
    merged = [lane for lane in lanes if lane not in gone]
    taken = {lane.path for lane in lanes}
    for main in merged:
        norms_only = main.lists[0].called_layers
        for one in _of_the_same_numbers(main, lists) if main in composite or not norms_only else ():
            if one.prefix not in taken and (not norms_only or "norm" in one.prefix[-1]):
                _merge({index: [name for _, name in tails] for index, tails in one.tails.items()}, main, 1)
    return merged


def _merge(units: Mapping[int, Unit], main: Lane, step: int) -> None:
    """Put each unit of a list into the layer whose number is `step` times its own."""
    place = {index: at for at, index in enumerate(sorted(main.lists[0].tails))}
    for index, unit in units.items():
        main.units[place[step * index]] += unit


def _belongs(lane: Lane, main: Lane, every: int) -> int:
    """Whether each unit of a list runs with a unit of another: they stand side by side, and have the same numbers (1),
    or some of them with gaps between (1), or every so-manieth layer has one, as the config says. 0 if not.
    """
    difference = _difference(main.path, lane.path)
    if difference is None or difference[0] != len(main.path) - 1:
        return 0
    _, of_main, words, _ = difference
    in_turn = words & _IN_TURN or (words & _ATTENTION and not of_main & _ATTENTION)
    if not in_turn or of_main & _IN_TURN or words & ((_EARLIER | _LATER) - _IN_TURN):
        return 0
    here, there = set(main.lists[0].tails), set(lane.lists[0].tails)
    if not all(_counts_units(each) for each in (main, lane)):
        return 0
    if there == here or (there < here and there != set(range(len(there)))):
        return 1
    return every if len(here) == every * len(there) and here == set(range(len(here))) else 0


def _counts_units(lane: Lane) -> bool:
    """Whether each number of a list is a layer; it is not where stages are counted through."""
    return len(lane.units) == len(lane.lists[0].tails)


def _of_the_same_numbers(main: Lane, lists: Mapping[Prefix, NumberedList]) -> list[NumberedList]:
    """The lists beside one that have the same numbers. Where that is not called layers, or lists were merged into it, a
    layer is a unit of each (`attentions.3`, `layer_norm1.3`, `ffns.3`).
    """
    one = main.lists[0]
    if one.numbered or not one.prefix or not _counts_units(main):
        return []
    beside = (other for prefix, other in lists.items() if prefix[:-1] == one.prefix[:-1] and not other.numbered)
    alike = [other for other in beside if set(other.tails) == set(one.tails)]
    return [other for other in alike if _is_part(other)]


def _is_part(one: NumberedList) -> bool:
    """Whether a unit is a part of a layer: by its name, or as it is one module and neither a way nor an end."""
    own = one.prefix[-1]
    return bool(_words(own) & _PARTS) or (one.bare and not _WHOLE.fullmatch(own))


def _by_their_numbers(lanes: list[Lane], lists: Mapping[Prefix, NumberedList], notes: list[str]) -> list[Lane]:
    """Numbers of one row under two words: HRNet's `layer1`, whose blocks are numbered, before `stage2` to `stage4`."""
    for lane in lanes:
        match = _GLUED_NUMBER.fullmatch(lane.path[-1]) if lane.path and len(lane.lists) == 1 else None
        if match is None or not lane.lists[0].called_layers or lane.lists[0].numbered:
            continue
        number = int(match["number"])
        for rest in lanes:
            one = rest.lists[0]
            goes_on = one.numbered and one.called_layers and min(one.tails) == number + 1
            if goes_on and rest.path[:-1] == lane.path[:-1]:
                between, _ = _beside(one, lists, re.compile(r".*(?:transition|downsampl\w*|reduction)"))
                lane.units[-1] += [name for _, name in between.get(number, [])]
                joined = Lane(f"{lane.name}+{rest.name}", lane.units + rest.units, lane.lists + rest.lists, lane.path)
                before = f"{lane.name} runs before {rest.name}{number + 1}"
                notes.append(f"{before}, to judge by their numbers. --series says otherwise")
                return [joined, *(other for other in lanes if other not in (lane, rest))]
    return lanes


def _one_after_the_other(lanes: list[Lane], lists: Mapping[Prefix, NumberedList], names: list[str]) -> list[Lane]:
    """Lists that run in a row joined into one, with what lies between them."""
    waiting = _with_middles(lanes, lists, names)
    joined: list[Lane] = []
    while waiting:
        chain = _chain(waiting)
        waiting = [lane for lane in waiting if lane not in chain]
        if (between := _between(chain, waiting)) is not None:
            waiting.remove(between)
            chain.insert(1, between)
        parts = [one for lane in chain for one in lane.lists]
        units = [unit for lane in chain for unit in lane.units]
        joined.append(Lane("+".join(lane.name for lane in chain), units, parts, chain[0].path))
    return joined


def _chain(waiting: list[Lane]) -> list[Lane]:
    """The lanes that run in a row with the first that waits, in order."""
    first = waiting[0]
    if whole := _there_and_back(first, waiting):
        return whole
    ranks = {first.name: 0}
    chain = [first]
    says = _says_an_order(first)
    for lane in waiting[1:]:
        if not (says or _says_an_order(lane)):
            continue  # what most do is seen fastest
        difference = _difference(*_comparable(first, lane))
        if difference is None:
            continue
        _, here, there, share = difference
        mine, its = _rank(here), _rank(there)
        if mine is None or its is None or mine == its or not (share or (here and there)):
            continue
        ranks[first.name], ranks[lane.name] = mine, its
        chain.append(lane)
    return sorted(chain, key=lambda lane: ranks[lane.name])


def _there_and_back(first: Lane, waiting: list[Lane]) -> list[Lane]:
    """Encoders, what is between, and the decoders that mirror them: a U-Net, if something is between, or if the last of
    numbered encoders has no decoder.
    """
    own = first.path[-1] if first.path and first.lists else ""
    if "enc" not in own and "dec" not in own:
        return []
    by_path = {lane.path: lane for lane in waiting if lane.lists}
    up = first if mirrored(first.path) else by_path.get((*first.path[:-1], own.replace("enc", "dec")))
    down = by_path.get(mirrored(up.path) or ()) if up else None
    if up is None or down is None or first not in (up, down):
        return []
    middles = [lane for lane in waiting if not lane.lists and lane.path[:-1] == first.path[:-1]]
    lacks_one = down.lists[0].numbered and max(down.lists[0].tails) == max(up.lists[0].tails) + 1
    return [down, *middles, up] if len(middles) == 1 or (not middles and lacks_one) else []


def _says_an_order(lane: Lane) -> bool:
    """Whether a word in a lane's path says that it runs first, between or last."""
    return any(_words(segment) & _ORDER for segment in lane.path)


_ORDER = _EARLIER | _BETWEEN | _LATER


def _comparable(one: Lane, other: Lane) -> tuple[Prefix, Prefix]:
    """The paths of two lanes; of what lies beside a middle, as far as the module that does."""
    if one.lists and other.lists:
        return one.path, other.path
    length = min(len(lane.path) for lane in (one, other) if not lane.lists)
    return one.path[:length], other.path[:length]


def _way(lane: Lane) -> int | None:
    """Which segment of its path says that a list is a U-Net's way down or up."""
    return next((at for at, segment in enumerate(lane.path) if _words(segment) & (_DOWN | _UP)), None)


def _after(begin: str, name: str) -> str:
    return name[len(begin) :] if name.startswith(begin) else ""


def _with_middles(lanes: list[Lane], lists: Mapping[Prefix, NumberedList], names: list[str]) -> list[Lane]:
    """The lanes, with the module beside a way down or up that is the middle of a U-Net, or an end of one: one layer,
    whatever is numbered in it; but where the way is counted by the blocks in its levels, so is a level in the middle.
    """
    middles: dict[Prefix, Unit] = {}
    ways = {lane.path[:at] for lane in lanes if (at := _way(lane)) is not None}
    paths = {lane.path for lane in lanes}
    ways |= {lane.path[:-1] for lane in lanes if mirrored(lane.path) in paths}
    for parent in ways:
        begin = "".join(f"{segment}." for segment in parent)
        for name in names:
            module, dot, _ = _after(begin, dotted(name)).partition(".")
            if dot and _ONE_UNIT.fullmatch(module):
                middles.setdefault((*parent, module), []).append(name)
    outside = [lane for lane in lanes if not any(lane.path[: len(path)] == path for path in middles)]
    by_blocks = {lane.path[:-1] for lane in lanes if lane.lists and not _counts_units(lane)}
    for path, unit in middles.items():
        units, level = [unit], lists.get(path)
        if level is not None and path[:-1] in by_blocks and _alike(_children(level)):
            units = units_of(level, lists)
        outside.append(Lane(begin_of(unit[0], path), units, [], path))
    return outside


def _children(one: NumberedList) -> dict[int, set[str]]:
    return {index: {tail for tail, _ in tails} for index, tails in one.tails.items()}


def _between(chain: list[Lane], waiting: list[Lane]) -> Lane | None:
    """The one list that stands beside a way down and a way up which have no middle: it runs between them."""
    at = _way(chain[0])
    if at is None or len(chain) != 2 or at == len(chain[0].path) - 1:
        return None
    words = [_words(lane.path[at]) for lane in chain]
    beside = [lane for lane in waiting if lane.path[:-1] == chain[0].path[:at]]
    return beside[0] if words[0] & _DOWN and words[1] & _UP and len(beside) == 1 else None
