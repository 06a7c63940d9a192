"""Where a tensor stands: its stack of blocks, and its place in it, read off tensor names.

Coefficients grow with depth, so a parameter on the wrong layer spoils everything after it. One general rule, no
list of architectures:

1. Every whole-number segment of a dotted name is a candidate: what stands before it is a prefix, the number an index.
   `layer1.0.conv1` is read as `layer` 1, too.
2. A prefix is a stack if its last segment is a name for layers (`layers`, `h`, `blocks`, `stages`, ...), its indices
   are near-contiguous, and its layers share at least one child name. Only where no prefix is called so may a plain
   `nn.Sequential` be the stack.
3. The outermost stack wins; what lies deeper belongs to its layer (`encoder.block.5.layer.0` to block 5,
   `layers.30.experts.3` to layer 30).
4. Stages that hold alike blocks (`layers.s.blocks.b`, `layer1.0`) count through, stage by stage.
5. Stacks that run one after the other count on (`double_blocks` then `single_blocks`; `down_blocks`, `mid_block`,
   `up_blocks`); all others (the towers of CLIP, encoder and decoder) have a depth of their own.
6. Routed experts, projectors, embedders, prediction heads are never stacks; an index at or beyond the layers that the
   config counts is outside (multi-token prediction).
7. What a wrapper of training puts into a name (`layers.3._orig_mod.mlp`) is not looked at.

A regular expression from the user overrules all of it; it is searched for under a time limit, for recipes come from
strangers, too. Nothing here reads a file or needs torch.
"""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, takewhile
from typing import Any, Literal

from lines_cli.errors import DepthError, RecipeError, printable, some
from lines_cli.scaling.same_names import without_wrappers

_LAYER_NAME = re.compile(r"(?:.*_)?(?:layers?|h|blocks?|resblocks?|stages?)")
_NUMBERED_NAME = re.compile(r"((?:\w+_)?(?:layer|block|stage)_?)(\d{1,6})", re.ASCII)
# Numbered lists under these names are no layers of the network: parts that stand side by side, or small networks
# before, between and behind the stacks.
_NEVER = re.compile(
    r".*(?:expert|projector|projection|connector|merger|aligner|resampler|sampling|adapter|predictor|classifier|lora).*"
    r"|.*_proj|qformer|prenet|.*postnet|conv_layers?|linear_layers?|downsample.*|.*_?mlps?|.*_?heads?|.*norms?|mtp(?:_.*)?"
    r"|(?:.*_)?refiner(?:_.*)?",
    re.DOTALL,  # with a line break in a name, `.*x.*` would try every x there is
)
_EMBEDDER = re.compile(r".*embed(?:s|der|ders|ding|dings)?")
_SERIAL = (  # how prefixes end that run one after the other; what is not named here runs on its own
    ("double_blocks", "single_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("transformer.layers", "global_transformer.layers"),
    ("down_blocks", "mid_block", "up_blocks"),
    ("input_blocks", "middle_block", "output_blocks"),
)
_ONE_UNIT = frozenset({"mid_block", "middle_block"})  # of these, what has no number of its own
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
    """A run of residual blocks. `name` is its dotted prefix, `layers` its L."""

    name: str
    layers: int


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


@dataclass(frozen=True)
class DepthMap:
    """Which tensor stands where. A name that `places` lacks is outside the blocks.

    `notes` are what a person should know of how it was decided.
    """

    stacks: tuple[Stack, ...]
    places: dict[str, Place]
    notes: tuple[str, ...] = ()

    @cached_property
    def layers(self) -> dict[str, int]:
        """Each stack's L, by name."""
        return {stack.name: stack.layers for stack in self.stacks}

    def position_of(self, name: str) -> float:
        """How deep a tensor's layer lies in its stack (`position`); 0 outside the blocks."""
        place = self.places.get(name)
        return 0.0 if place is None else position(place.index, self.layers[place.stack])

    def side_of(self, name: str) -> Side:
        """On which side of the blocks a tensor outside them stands; before them, where its name does not tell."""
        for stack in self.stacks:
            inside, prefix, rest = name.partition(f"{stack.name}.")
            if prefix and not inside and _is_index(rest.partition(".")[0]):
                return "after"  # a layer beyond those that the config counts
        *modules, last = name.split(".")
        words = modules if last in ("weight", "bias") and modules else [*modules, last]
        if words == ["decoder"] or any(_SURELY_AFTER.fullmatch(word) for word in words):
            return "after"
        if any(_NOT_AFTER.fullmatch(word) for word in words):
            return "before"
        return "after" if any(_AFTER.fullmatch(word) for word in words) else "before"

    def select(self, part: str) -> str:
        """The name of the one stack that `part` names: its whole prefix, or any run of segments of it (of each of its
        prefixes, where several are joined).

        Raises:
            RecipeError: no stack, or several.
        """
        names = [stack.name for stack in self.stacks]
        if part in names:
            return part
        matching = [name for name in names if all(f".{part}." in f".{joined}." for joined in name.split("+"))]
        if len(matching) == 1:
            return matching[0]
        what = "names several stacks" if matching else "names no stack"
        raise RecipeError(f"stack {part!r} {what}; there are:\n{some(matching or names)}")


def find_depth(names: Iterable[str], *, config: Mapping[str, Any] | None = None, layers: str | None = None) -> DepthMap:
    """Map tensor names to stacks and layers.

    Args:
        names: every tensor name of the checkpoint.
        config: its parsed `config.json`, against which the number of layers is checked.
        layers: a regular expression that overrules detection, searched in every name: group `index` is the layer's
            number, the optional group `stack` the stack's name.

    Raises:
        DepthError: no reading, or no single one; the message lists what was found.
        RecipeError: `layers` is not a usable expression, or takes too long.
    """
    names = list(names)
    if layers is not None:
        return _by_pattern(names, layers)
    if wrapped := without_wrappers(names):
        plain = {name: wrapped.get(name, name) for name in names}
        depth = find_depth(dict.fromkeys(plain.values()), config=config)
        known = depth.places
        return replace(depth, places={name: known[there] for name, there in plain.items() if there in known})
    shared = [name for name in names if _SHARED_LAYERS in name]
    if shared:
        raise DepthError(
            f"{shared[0]}: the layers of this model share their weights (as ALBERT's do), "
            "so a weight has no depth of its own",
            hint="Scale all of it alike with --beta 0, or place the layers yourself with --layers REGEX.",
        )
    candidates = _candidates(names)
    found = _outermost(candidates)
    if not found:
        raise DepthError(
            f"no stack of layers could be found in {len(names):,} tensor names. {_survey(candidates)}", hint=LAYERS_HINT
        )

    lanes = _lanes(found, names)
    notes = _check_against_config(lanes, config or {})
    if not any(part.called_layers for lane in lanes for part in lane.lists):
        taken = " and ".join(f"{lane.name or 'the numbers at the front'} ({len(lane.units)})" for lane in lanes)
        notes.append(f"no list is called layers or blocks; taken for layers: {taken}. --layers REGEX says otherwise")
    places: dict[str, Place] = {}
    for lane in lanes:
        for index, unit in enumerate(lane.units):
            places.update(dict.fromkeys(unit, Place(lane.name, index)))
    return DepthMap(tuple(Stack(lane.name, len(lane.units)) for lane in lanes), places, tuple(notes))


def pattern_of(stack: Stack, depth: DepthMap) -> str | None:
    """How the names of a stack's tensors begin, with what counts its layers in braces: `model.layers.{l}`, or
    `layers.{s}.blocks.{l}` where stages are counted through. None where the stack's name is no prefix of theirs.
    """
    names = [name for name, place in depth.places.items() if place.stack == stack.name]
    begins: list[tuple[str, str | None]] = []
    layers = 0
    prefixes = stack.name.split("+")
    for prefix in prefixes:
        numbered = re.compile(rf"(?P<begin>{re.escape(prefix)}[._]?)(?P<number>\d+)(?P<rest>\..*)")
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


LAYERS_HINT = (
    "Say where the layer's number stands: --layers REGEX, with a group `index` and, for more than one stack, a group "
    r"`stack`, as in --layers '^(?P<stack>\w+)\.cell(?P<index>\d+)\.'"
)


SECONDS_TO_MATCH = 3.0
"""How long a user's expression may be searched for, in all names together."""
_SOON = 1e-3
_LONGEST_PATTERN = 1000


def _by_pattern(names: list[str], pattern: str) -> DepthMap:
    import regex  # `re`, with a limit to the time that a search may take

    if len(pattern) > _LONGEST_PATTERN:
        raise RecipeError(
            f"--layers: an expression of {len(pattern):,} characters; at most {_LONGEST_PATTERN:,} are used"
        )
    try:
        expression = regex.compile(pattern, regex.VERSION0)
    except Exception as error:  # its own for most, but also those of Python for odd ones
        raise RecipeError(f"--layers {pattern!r} is not a regular expression: {error}") from error
    if "index" not in expression.groupindex:
        raise RecipeError(f"--layers {pattern!r} has no group `index`", hint=LAYERS_HINT)
    found: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    ends = time.monotonic() + SECONDS_TO_MATCH
    for name in names:
        try:
            match = expression.search(name, timeout=max(ends - time.monotonic(), _SOON))
        except TimeoutError as error:
            raise RecipeError(
                f"--layers {pattern!r} takes more than {SECONDS_TO_MATCH:g} s over {len(names):,} tensor names; "
                f"the last was {printable(name[:100])}",
                hint="Let it begin with ^, and repeat nothing that repeats itself, as (a+)+ does.",
            ) from error
        if match is None or match["index"] is None:
            continue
        if not _is_index(match["index"]):
            raise RecipeError(
                f"--layers {pattern!r}: in {name!r} the group `index` is {match['index']!r}, not a whole number"
            )
        stack = match["stack"] if "stack" in expression.groupindex else "layers"
        found[stack or "layers"][int(match["index"])].append(name)
    if not found:
        raise DepthError(
            f"--layers {pattern!r} matches none of {len(names):,} tensor names, such as\n{some(names, 4)}",
            hint=LAYERS_HINT,
        )
    places: dict[str, Place] = {}
    for stack, by_index in found.items():
        for position, index in enumerate(sorted(by_index)):
            places.update(dict.fromkeys(by_index[index], Place(stack, position)))
    return DepthMap(tuple(Stack(stack, len(by_index)) for stack, by_index in found.items()), places)


# --- candidates: every prefix that is followed by a number ---


@dataclass(slots=True)
class _Candidate:
    """A prefix and, for each index behind it, what follows it in every name, and that name."""

    prefix: tuple[str, ...]
    common: int  # how many leading segments all names of the checkpoint share: a wrapper's name, which says nothing
    tails: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    numbered: bool = False  # `layer1`, `layer2`: the number is part of the segment

    @property
    def name(self) -> str:
        return ".".join(self.prefix).rstrip("_")

    @property
    def may_be_stack(self) -> bool:
        """Whether no name on the way to it rules that out."""
        if len(self.prefix) <= self.common:  # all there is
            return True
        own = self.prefix[-1:]
        if any(_NEVER.fullmatch(segment) for segment in (*self.prefix[self.common : -1], *own)):
            return False
        return not any(_EMBEDDER.fullmatch(segment) for segment in (*self.prefix[self.common : -1][-1:], *own))

    @property
    def called_layers(self) -> bool:
        own = bool(self.prefix) and _LAYER_NAME.fullmatch(self.prefix[-1].rstrip("_")) is not None
        return own and self.may_be_stack

    @property
    def is_stack(self) -> bool:
        """Whether indices and children look like layers of one kind."""
        indices = sorted(self.tails)
        if len(indices) == 1:
            return self.called_layers and indices == [0] and not self.numbered
        if indices[-1] - indices[0] + 1 > 3 * len(indices):
            return False
        seen: set[str] = set()
        for tails in self.tails.values():
            children = {tail for tail, _ in tails}
            if not seen.isdisjoint(children):
                return True
            seen |= children
        return False


def _candidates(names: Iterable[str]) -> dict[tuple[str, ...], _Candidate]:
    candidates: dict[tuple[str, ...], _Candidate] = {}
    names = list(names)
    pairs = zip(min(names).split("."), max(names).split("."), strict=False) if names else ()
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))

    def lists_of(begin: str) -> list[tuple[list[tuple[str, str]], int]]:
        """The lists that a name which begins so is counted in, and where in the name its tail behind each starts."""
        segments = tuple(begin.split("."))
        lengths = list(accumulate(map(len, segments)))
        found = []
        for at, prefix, index in _numbers(segments):
            numbered = len(prefix) > at
            candidate = candidates.get(prefix)
            if candidate is None:
                candidate = candidates[prefix] = _Candidate(prefix, common, numbered=numbered)
            if candidate.numbered == numbered:
                found.append((candidate.tails[index], lengths[at] + at + 1))
        return found

    known: dict[str, list[tuple[list[tuple[str, str]], int]]] = {}
    for name in names:
        if match := _BEGIN.match(name):
            begin = match[0]
            lists = known.get(begin)
            if lists is None:
                lists = known[begin] = lists_of(begin)
            for tails, at in lists:
                tails.append((name[at:], name))
    return candidates


_BEGIN = re.compile(r".*[0-9](?=\.|\Z)", re.DOTALL)  # a name up to its last segment with a number at the end


def _numbers(segments: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...], int]]:
    """Which segments count something: where each stands, the prefix of its list, and the number. A prefix is as long
    as what stands before the segment, or longer by the name in `layer1`.
    """
    for at, segment in enumerate(segments[:_MOST_SEGMENTS]):
        if not segment[-1:].isdigit():
            continue  # what most are is seen fastest
        if _is_index(segment):
            yield at, segments[:at], int(segment)
        elif match := _NUMBERED_NAME.fullmatch(segment):
            yield at, (*segments[:at], match[1]), int(match[2])


_MOST_SEGMENTS = 64  # of a name that are looked at; with each a longer prefix would be kept


def _is_index(text: str) -> bool:
    """A whole number that could count layers: 0 to 999,999, zeros before it allowed."""
    return text.isdecimal() and text.isascii() and len(text) <= 6


def _outermost(candidates: Mapping[tuple[str, ...], _Candidate]) -> list[_Candidate]:
    """The stacks that lie inside no other. A plain `nn.Sequential` is one only where nothing is called layers."""
    stacks = [candidate for candidate in candidates.values() if candidate.may_be_stack and candidate.is_stack]
    chosen = [candidate for candidate in stacks if candidate.called_layers] or stacks
    kept: list[_Candidate] = []
    within: dict[tuple[str, ...], _Candidate] = {}
    for candidate in sorted(chosen, key=lambda c: len(c.prefix)):
        if not any(
            outer is not None and _index_within(candidate.prefix, outer) is not None
            for outer in (within.get(stem) for stem in _stems(candidate.prefix))
        ):
            kept.append(candidate)
            within[candidate.prefix] = candidate
    # Several of them under different numbers of one list (`conformer.0.ffw_layer`, `conformer.1.ffw_layer`): that list
    # is the stack, whatever it is called.
    inside: dict[tuple[str, ...], set[int]] = defaultdict(set)
    for candidate in kept:
        for stem in _stems(candidate.prefix):
            if stem in candidates and (index := _index_within(candidate.prefix, candidates[stem])) is not None:
                inside[stem].add(index)
    for stem in sorted((stem for stem, found in inside.items() if len(found) > 1), key=len):
        outer = candidates[stem]
        if outer.may_be_stack and any(_index_within(c.prefix, outer) is not None for c in kept):
            kept = [outer, *(c for c in kept if _index_within(c.prefix, outer) is None)]
    return sorted(kept, key=lambda c: c.prefix)


def _stems(prefix: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The prefixes of lists that `prefix` may lie in."""
    return (stem for _, stem, _ in _numbers(prefix))


def _index_within(prefix: tuple[str, ...], outer: _Candidate) -> int | None:
    """The index of `outer` under which `prefix` lies; None if it does not."""
    at = len(outer.prefix) - outer.numbered
    if len(prefix) <= at or prefix[:at] != outer.prefix[:at]:
        return None
    if outer.numbered:
        match = _NUMBERED_NAME.fullmatch(prefix[at])
        return int(match[2]) if match and match[1] == outer.prefix[at] else None
    return int(prefix[at]) if _is_index(prefix[at]) else None


def _survey(candidates: Mapping[tuple[str, ...], _Candidate]) -> str:
    """What numbered prefixes there are, for an error message."""
    if not candidates:
        return "No name has a number in it."
    lines = []
    for candidate in sorted(candidates.values(), key=lambda c: -sum(map(len, c.tails.values()))):
        indices = sorted(candidate.tails)
        shown = ", ".join(map(str, indices[:4])) + (f", ... {indices[-1]}" if len(indices) > 4 else "")
        lines.append(
            f"{candidate.name or '(no prefix)'}: {sum(map(len, candidate.tails.values())):,} tensors at {shown}"
        )
    return "Numbered prefixes:\n" + some(lines)


# --- lanes: stacks with their layers in the order they run ---


@dataclass(slots=True)
class _Lane:
    """A stack ready to be counted.

    Attributes:
        name: what it is called.
        units: the tensors of each layer, first to last.
        lists: the numbered lists it consists of; more than one where they run one after the other.
    """

    name: str
    units: list[list[str]]
    lists: list[_Candidate]


def _lanes(found: list[_Candidate], names: list[str]) -> list[_Lane]:
    """The stacks that were found, those that run one after the other joined into one."""
    lanes: list[_Lane] = []
    waiting = {candidate.name: candidate for candidate in found}
    for candidate in found:
        members = _serial_members(candidate, waiting, names)
        if len(members) > 1:
            lists = [waiting[name] for name in members if name in waiting]
            lanes.append(_Lane("+".join(members), [unit for units in members.values() for unit in units], lists))
            waiting = {
                name: other
                for name, other in waiting.items()
                if not any(f"{name}.".startswith(f"{member}.") for member in members)
            }
    lanes += [_Lane(name, _units(candidate), [candidate]) for name, candidate in waiting.items()]
    for candidate in (candidate for lane in lanes for candidate in lane.lists):
        _refuse_a_part(candidate)
    return sorted(lanes, key=lambda lane: lane.name)


def _serial_members(
    candidate: _Candidate, waiting: Mapping[str, _Candidate], names: list[str]
) -> dict[str, list[list[str]]]:
    """The stacks that run in a row with `candidate`, itself among them: name -> units, first to last."""
    for words in _SERIAL:
        ending = next((word for word in words if f".{candidate.name}".endswith(f".{word}")), None)
        if ending is None or candidate.name not in waiting:
            continue
        parent = candidate.name.removesuffix(ending)
        members: dict[str, list[list[str]]] = {}
        for word in words:
            name = parent + word
            if word in _ONE_UNIT:
                if middle := [tensor for tensor in names if tensor.startswith(f"{name}.")]:
                    members[name] = [middle]
            elif name in waiting:
                members[name] = _units(waiting[name])
        if len(members) > 1:
            return members
    return {}


def _refuse_a_part(candidate: _Candidate) -> None:
    first = min(candidate.tails)
    if first > 1:
        raise DepthError(
            f"{candidate.name} starts at layer {first}: this is a part of a model, and depth is counted over the whole",
            hint="Give the whole checkpoint (all shards, with their index), or place the layers with --layers REGEX.",
        )


def _units(candidate: _Candidate) -> list[list[str]]:
    """The tensors of each layer in order; stages that hold alike blocks are counted through."""
    inner = _inner_blocks(candidate)
    if inner is None:
        return [[name for _, name in candidate.tails[index]] for index in sorted(candidate.tails)]

    stages = sorted(candidate.tails)
    loose: dict[str, set[int]] = defaultdict(set)  # stage-level modules in no block -> the stages that have one
    for stage in stages:
        for tail, _ in candidate.tails[stage]:
            if _split_inner(tail, inner) is None:
                loose[tail.split(".")[0]].add(stage)
    units: list[list[str]] = []
    for stage in stages:
        split = [(_split_inner(tail, inner), tail, name) for tail, name in candidate.tails[stage]]
        blocks: dict[int, list[str]] = defaultdict(list)
        for block, _, name in split:
            if block is not None:
                blocks[block[0]].append(name)
        ordered = [blocks[index] for index in sorted(blocks)] or [[]]
        for block, tail, name in split:
            if block is None:
                # A downsampling that the first stage has and the last lacks closes its stage; otherwise it opens it.
                having = loose[tail.split(".")[0]]
                closes = stages[0] in having and stages[-1] not in having
                ordered[-1 if closes else 0].append(name)
        units.extend(ordered)
    return units


def _inner_blocks(candidate: _Candidate) -> str | None:
    """The name of the blocks within each stage (empty for `layer1.0`), or None if the candidate's layers are no
    stages.
    """
    inner_names = {tail.split(".")[0] for tails in candidate.tails.values() for tail, _ in tails}
    options = [name for name in sorted(inner_names) if _LAYER_NAME.fullmatch(name) and not _NEVER.fullmatch(name)]
    if any(_is_index(name) for name in inner_names):
        options.append("")
    for name in options:
        stages: list[dict[int, set[str]]] = []
        for tails in candidate.tails.values():
            blocks: dict[int, set[str]] = defaultdict(set)
            for tail, _ in tails:
                if (split := _split_inner(tail, name)) is not None:
                    blocks[split[0]].add(split[1])
            stages.append(blocks)
        several = [blocks for blocks in stages if len(blocks) > 1]
        if several and 2 * sum(map(bool, stages)) > len(stages) and all(_alike(blocks.values()) for blocks in several):
            return name
    return None


def _split_inner(tail: str, inner: str) -> tuple[int, str] | None:
    """`blocks.3.norm.weight` -> (3, `norm.weight`) for the inner name `blocks`."""
    if inner:
        if not tail.startswith(f"{inner}."):
            return None
        tail = tail[len(inner) + 1 :]
    number, _, rest = tail.partition(".")
    return (int(number), rest) if _is_index(number) else None


def _alike(children: Iterable[set[str]]) -> bool:
    """Whether blocks are of one kind: at least half of all child names stand in every block."""
    sets = list(children)
    return 2 * len(set.intersection(*sets)) >= len(set.union(*sets))


# --- the config's word on the number of layers ---


def _config_counts(config: Mapping[str, Any]) -> dict[str, int]:
    """Every number of layers that a config gives, nested configs included: dotted key -> count."""
    counts = {key: n for key, n in config.items() if key in _CONFIG_COUNTS and type(n) is int and n > 0}
    if len(counts) > 1:
        counts.pop("num_hidden_layers", None)  # repeats what the family's own key says
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config") and not _NEVER.fullmatch(key.removesuffix("_config")):
            counts.update((f"{key}.{inner}", count) for inner, count in _config_counts(value).items())
    return counts


def _check_against_config(lanes: list[_Lane], config: Mapping[str, Any]) -> list[str]:
    """Hold the stacks against the numbers of layers that the config gives; returns what a person should know.

    Layers that a config does not count (multi-token prediction) are taken off the end of their stack.

    Raises:
        DepthError: the model's one stack has fewer layers than its config says.
    """
    counts = _config_counts(config)
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
    unmet = {key: count for key, count in counts.items() if not found[count]}
    repeated = Counter(counts.values()) - found if len(lanes) > 1 else Counter()
    if not unmet and not repeated:
        return notes
    said = ", ".join(f"{key} is {count}" for key, count in (unmet or counts).items())
    stacks = " and ".join(f"{lane.name} has {len(lane.units)} layers" for lane in lanes)
    if len(lanes) == 1 and len(set(counts.values())) == 1 and len(lanes[0].units) < min(counts.values()):
        raise DepthError(
            f"{lanes[0].name} holds {len(lanes[0].units)} layers, but in the config {said}",
            hint="Is the checkpoint complete? If it is, say where the layer's number stands with --layers REGEX.",
        )
    return [*notes, f"in the config {said}; by the names {stacks}"]


def _gaps(lane: _Lane) -> list[str]:
    """Numbers that a list called layers leaves out, which may be layers that the file lacks."""
    notes = []
    for part in lane.lists:
        missing = [index for index in range(min(part.tails), max(part.tails)) if index not in part.tails]
        if missing and part.called_layers:
            shown = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
            notes.append(f"{part.name} holds nothing at {shown}; its layers are counted without")
    return notes


def _counted_layers(lane: _Lane, lanes: int, counts: Mapping[str, int]) -> tuple[str, int] | None:
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
