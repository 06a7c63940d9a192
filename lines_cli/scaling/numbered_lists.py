"""The numbered lists of modules in tensor names, and which of them hold the layers of a network.

Every whole-number segment of a name counts something, and so does the number at the end of `layer1` or `denseblock_2`:
what stands before it is the list's prefix, the number an index. Which lists are stacks of layers follows from what they
are called, from what their units hold, and from what lies inside what. Plain strings only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile

Prefix = tuple[str, ...]

# The word in front of a number that counts layers, and the same where the number is glued to it (`layer1`, `b2`).
_LAYER_NAME = re.compile(r".*(?:layer|block|stage)s?|(?:.*_)?(?:layers|blocks)_\w+|(?:.*_)?(?:blks?|levels|h)")
_NUMBERED_NAME = re.compile(r"([\w-]*[a-zA-Z](?:\d+-)?[_-]?)(\d{1,6})", re.ASCII)
_GLUED_NAME = re.compile(r".*(?:layer|block|stage)s?|.*blk")
# What stands before, between and behind the stacks, with all that lies in it, unless it holds most of the model.
_BRIDGE = re.compile(
    r".*(?:projector|projection|connector|merger|aligner|resampler|sampling|adapter|lora|quantiz|perceiver|reassembl).*"
    r"|qformer|prenet|.*postnet|downsample.*|mtp(?:_.*)?|(?:.*_)?refiner(?:_.*)?",
    re.DOTALL,  # with a line break in a name, `.*x.*` would try every x there is
)
# Small networks, whose lists are no layers of the model; but a transformer may lie in one.
_HEAD = re.compile(r".*(?:predictor|classifier).*|.*_proj|.*_?mlps?|.*_?heads?", re.DOTALL)
_EMBEDDER = re.compile(r".*embed(?:s|der|ders|ding|dings)?")
# Lists of these names are of parts that stand side by side.
_ABREAST = re.compile(
    r".*(?:expert|lateral|codebook).*|conv_layers?|linear_layers?|.*norms?(?:_layers?)?|branch(?:es)?|discriminators?",
    re.DOTALL,
)
_STEM = re.compile(r"(?:conv|linear)_layers?")
"""Lists that are a stem's, unless stacks lie in them."""
_NORM = re.compile(r"norm|\bbn|\bln")
_FEWEST_UNNAMED = 3
"""Of units, and of modules that all of them hold, before a list is a stack whose name does not say so."""


def is_index(text: str) -> bool:
    """A whole number that could count layers: 0 to 999,999, zeros before it allowed."""
    return text.isdecimal() and text.isascii() and len(text) <= 6


def dotted(name: str) -> str:
    """A name with dots between its segments, as torch has them; JAX has slashes."""
    return name.replace("/", ".") if "/" in name else name


def begin_of(name: str, prefix: Prefix) -> str:
    """As much of a name as a prefix is long, with the name's own separators."""
    return name[: len(".".join(prefix))]


def word_of(segment: str) -> str:
    """What a segment says, without the number or the joint at its end, in lower case."""
    return segment.rstrip("_-0123456789").lower()


def is_layer_name(segment: str) -> bool:
    """Whether a list of this name, without its number, is called layers."""
    return _LAYER_NAME.fullmatch(word_of(segment)) is not None


def never_holds_layers(segment: str) -> bool:
    """Whether a list of this name is of parts of something else."""
    word = word_of(segment)
    return any(kind.fullmatch(word) for kind in (_BRIDGE, _HEAD, _ABREAST))


def module_of(tail: str) -> str:
    """The module that a tensor belongs to, by its dotted name: without its last part, and what parametrises it."""
    module, parametrised, _ = tail.partition("parametrizations.")
    return module.rstrip(".") if parametrised else tail.rpartition(".")[0]


@dataclass(slots=True)
class NumberedList:
    """A prefix and, for each index behind it, what follows it in every name (with dots), and that name.

    Attributes:
        prefix: its segments.
        text: how names begin that are in it, with their own separators.
        common: how many leading segments all names of the checkpoint share: a wrapper's name, which says nothing.
        tails: index -> (what follows, whole name) of every tensor.
        numbered: `layer1`, `layer2`: the number is part of the segment.
    """

    prefix: Prefix
    text: str = ""
    common: int = 0
    tails: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))
    numbered: bool = False

    @property
    def name(self) -> str:
        return self.text.rstrip("_-")

    @property
    def size(self) -> int:
        """How many tensors it holds."""
        return sum(map(len, self.tails.values()))

    @property
    def called_layers(self) -> bool:
        """Whether its own name says that it holds layers."""
        if not self.prefix:
            return False
        word = word_of(self.prefix[-1])
        return (_GLUED_NAME if self.numbered else _LAYER_NAME).fullmatch(word) is not None

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

    @property
    def bare(self) -> bool:
        """Whether every unit is a single module, such as a table or one matrix of an MLP."""
        return all(is_bare(tail for tail, _ in tails) for tails in self.tails.values())

    @property
    def of_a_kind(self) -> bool:
        """Whether the units are alike and hold so much that they are layers, whatever the list is called."""
        if len(self.tails) < _FEWEST_UNNAMED or min(self.tails) > 1 + self.numbered:
            return False
        shared: set[str] | None = None
        for tails in self.tails.values():
            held = {child for tail, _ in tails if (child := _child(tail))}
            shared = held if shared is None else shared & held
            if len(shared) < _FEWEST_UNNAMED:
                return False
        return any(_NORM.search(tail) for tail, _ in self.tails[min(self.tails)])

    @property
    def of_sequences(self) -> bool:
        """Whether the units are three or more times two convolutions, or one and its norm, in an `nn.Sequential`."""
        if len(self.tails) < _FEWEST_UNNAMED:
            return False
        return all(len({module_of(tail) for tail, _ in tails}) > 1 for tails in self.tails.values())

    @property
    def of_codebooks(self) -> bool:
        """Whether every unit holds one: the quantisers of a codec stand side by side, whatever they are called."""
        return all(any("codebook" in tail for tail, _ in tails) for tails in self.tails.values())

    def index_of(self, prefix: Prefix) -> int | None:
        """The index under which `prefix` lies; None if it lies elsewhere."""
        at = len(self.prefix) - self.numbered
        if len(prefix) <= at or prefix[:at] != self.prefix[:at]:
            return None
        if self.numbered:
            match = _NUMBERED_NAME.fullmatch(prefix[at])
            return int(match[2]) if match and match[1] == self.prefix[at] else None
        return int(prefix[at]) if is_index(prefix[at]) else None


def is_bare(tails: Iterable[str]) -> bool:
    """Whether a unit is one module (a matrix, a table), or a convolution and its norm in an `nn.Sequential`."""
    modules = set()
    for tail in tails:
        modules.add(module_of(tail))
        if len(modules) > 2:
            return False
    if len(modules) == 1:
        return all(not module or is_index(module) or _ONE_MODULE.fullmatch(module) for module in modules)
    return len(modules) == 2 and all(is_index(module) for module in modules)


_ONE_MODULE = re.compile(r"\w*(?:conv|linear|codebook|embed|proj|dense|fc|norm|bn)\w*", re.ASCII)


def _child(tail: str) -> str:
    """The named module in a unit, or in one of its blocks, that a tensor belongs to."""
    first, dot, rest = tail.partition(".")
    if is_index(first):
        first, dot, _ = rest.partition(".")
    return first if dot and not is_index(first) else ""


def read_lists(names: Iterable[str]) -> dict[Prefix, NumberedList]:
    """Every numbered list in the names, by its prefix."""
    names = list(names)
    reader = _Reader(_segments_of_all(names))
    known, match_begin = reader.begins, _BEGIN.match
    begin = "\n"
    found: _Found | None = ()
    unnumbered: set[str] = set()  # what follows the last number, which is mostly what followed it in the name before
    for name in names:
        plain = name.replace("/", ".") if "/" in name else name  # as `dotted`
        if not (plain.startswith(begin) and plain[len(begin) :] in unnumbered):
            match = match_begin(plain)
            if match is None:
                continue
            begin = match[0]
            unnumbered.add(plain[len(begin) :])
            found = known.get(begin)
            if found is None:
                found = reader.read(begin, name)
        assert found is not None
        for tails, at in found:
            tails.append((plain[at:], name))
    return reader.lists


_BEGIN = re.compile(r".*[0-9](?=\.|\Z)", re.DOTALL)  # a name up to its last segment with a number at the end
_Found = tuple[tuple[list[tuple[str, str]], int], ...]
"""The tails of each list that a name is counted in, and where in the name that behind it starts."""


class _Reader:
    """Reads the beginnings of names, each once: those of 500 experts share all but the last segment."""

    def __init__(self, common: int) -> None:
        self.common = common
        self.lists: dict[Prefix, NumberedList] = {}
        self.begins: dict[str, _Found] = {}
        self._heads: dict[str, tuple[Prefix, _Found, bool]] = {"": ((), (), True)}

    def read(self, begin: str, name: str) -> _Found:
        """What names that begin so are counted in; `name` is one of them."""
        at = begin.rfind(".") + 1
        last = begin[at:]
        segments, found, first = self._heads.get(begin[:at]) or self._read_head(begin[:at], name)
        if is_index(last):
            prefix, number, glued = segments, int(last), False
        else:
            word, counted, _ = _counts(last, len(segments), self.common, first=first)
            prefix, number, glued = (*segments, word), counted or 0, True
            if counted is None:
                self.begins[begin] = found
                return found
        one = self.lists.get(prefix)
        if one is None and len(segments) < _MOST_SEGMENTS:
            text = begin_of(name, prefix)
            one = self.lists[prefix] = NumberedList(prefix, text, self.common, numbered=glued)
        if one is not None and one.numbered is glued and len(segments) < _MOST_SEGMENTS:
            found = (*found, (one.tails[number], len(begin) + 1))
        self.begins[begin] = found
        return found

    def _read_head(self, head: str, name: str) -> tuple[Prefix, _Found, bool]:
        """What stands before a last segment, with the dot: its segments, what names that begin so are counted in, and
        whether a number that is glued to any word could follow.
        """
        segments = tuple(head[:-1].split("."))
        match = _BEGIN.match(".".join(segments[:_MOST_SEGMENTS]))
        found: _Found = ()
        first = True
        if match is not None:
            found = self.begins[match[0]] if match[0] in self.begins else self.read(match[0], name)
            for at, segment in enumerate(segments[:_MOST_SEGMENTS]):
                if segment[-1:].isdigit():
                    first = _counts(segment, at, self.common, first=first)[2]
        known = self._heads[head] = segments, found, first
        return known


def _segments_of_all(names: list[str]) -> int:
    """How many leading segments all names share."""
    if not names:
        return 0
    pairs = zip(dotted(min(names)).split("."), dotted(max(names)).split("."), strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _numbers(segments: Prefix, common: int) -> Iterator[tuple[int, Prefix, int]]:
    """Which segments count something: where each stands, the prefix of its list, and the number. A prefix is as long
    as what stands before the segment, or longer by the name in `layer1`.
    """
    first = True
    for at, segment in enumerate(segments[:_MOST_SEGMENTS]):
        if segment[-1:].isdigit():  # what most are not
            word, number, first = _counts(segment, at, common, first=first)
            if number is not None:
                yield at, (*segments[:at], word) if word else segments[:at], number


def _counts(segment: str, at: int, common: int, *, first: bool) -> tuple[str, int | None, bool]:
    """What a segment counts: the word that its number is glued to, if it is, and the number, or None; and what `first`
    is behind it.

    A number that is glued to another word (`res2`) counts layers only where nothing before it does (`first`), behind
    the segments that all names have in common.
    """
    if is_index(segment):
        return "", int(segment), first and at < common
    match = _NUMBERED_NAME.fullmatch(segment)
    if match is None:
        return "", None, first
    called = _GLUED_NAME.fullmatch(word_of(match[1])) is not None
    number = int(match[2]) if called or first else None
    return match[1], number, first and (not called or at < common)


_MOST_SEGMENTS = 64  # of a name that are looked at; with each a longer prefix would be kept


def stems(prefix: Prefix) -> Iterator[Prefix]:
    """The prefixes of lists that `prefix` may lie in."""
    return (stem for _, stem, _ in _numbers(prefix, len(prefix)))


# --- which of them are stacks ---


@dataclass(frozen=True, slots=True)
class Choice:
    """Which lists are stacks, sorted by prefix; and what else was in question.

    Attributes:
        found: those that are.
        passed_over: a group that was not taken, though it holds nearly as much, or more.
        barred: whether a name on the way to a list rules out that it holds layers.
    """

    found: list[NumberedList]
    passed_over: list[NumberedList]
    barred: Callable[[NumberedList], bool]


def choose_stacks(lists: Mapping[Prefix, NumberedList], names: list[str]) -> Choice:
    """The stacks that lie inside no other.

    A list that is called layers is one, unless all its units are single modules and a richer one is there. One that is
    not called so is one, too, if its units are alike and hold much; or where nothing else is.
    """
    barred = _barred_in(names)
    stacks = [one for one in lists.values() if one.is_stack]
    shut = {one.prefix: one for one in stacks if one.called_layers and barred(one) and not _is_stem(one)}
    free = [one for one in stacks if not barred(one) and not _lies_in(one, shut)]
    called = _with_lists_of_lists(outermost(one for one in free if one.called_layers), lists, barred)
    rich = [one for one in called if not one.bare]
    if rich:
        beside = (one for one in free if not one.called_layers and one.of_a_kind and not _overlaps(one, rich))
        found = rich + outermost(beside)
        bare = [one for one in called if one.bare and not _ABREAST.fullmatch(word_of(one.prefix[-1]))]
        return Choice(_sorted(found), _rival(found, bare), barred)
    unnamed = [one for one in outermost(one for one in free if not one.called_layers) if not one.bare]
    unnamed = [one for one in unnamed if not one.numbered or len(one.tails) >= _FEWEST_UNNAMED]
    hidden = [one for one in outermost(shut.values()) if not one.bare]
    hidden = [one for one in hidden if not never_holds_layers(one.prefix[-1])]
    best, other = sorted((unnamed, hidden), key=_size, reverse=True)
    if best:
        return Choice(_sorted(best), _rival(best, other), barred)
    return Choice(_sorted(called or outermost(one for one in free if not one.numbered or one.of_sequences)), [], barred)


def _size(group: Iterable[NumberedList]) -> int:
    return sum(one.size for one in group)


def _rival(found: list[NumberedList], other: list[NumberedList]) -> list[NumberedList]:
    """A group of lists that was not taken, where it holds nearly as much."""
    other = [one for one in other if len(one.tails) >= _FEWEST_UNNAMED]
    return _sorted(other) if _size(other) >= _NEARLY * _size(found) else []


_NEARLY = 0.8


def _sorted(lists: Iterable[NumberedList]) -> list[NumberedList]:
    return sorted(lists, key=lambda one: one.prefix)


def _barred_in(names: list[str]) -> Callable[[NumberedList], bool]:
    """Whether a name on the way to a list rules out that it holds layers."""
    held: dict[Prefix, bool] = {}

    def holds_most(prefix: Prefix) -> bool:
        """Whether a module is the model, whatever it is called."""
        if any(is_index(segment) for segment in prefix):
            return False
        if prefix not in held:
            begin = ".".join(prefix) + "."
            held[prefix] = 2 * sum(dotted(name).startswith(begin) for name in names) > len(names)
        return held[prefix]

    def barred(one: NumberedList) -> bool:
        if len(one.prefix) <= one.common:  # all there is
            return False
        own = word_of(one.prefix[-1])
        if never_holds_layers(own) or _EMBEDDER.fullmatch(own) or one.of_codebooks:
            return True
        named = [at for at in range(one.common, len(one.prefix) - 1) if not is_index(one.prefix[at])]
        bars = [at for at in named if _BRIDGE.fullmatch(word_of(one.prefix[at]))]
        nearest = word_of(one.prefix[named[-1]]) if named else ""  # `bbox_embed.0.layers`: looked through numbers
        is_tower = one.called_layers and one.of_a_kind
        if (_EMBEDDER.fullmatch(nearest) and not is_tower) or (_HEAD.fullmatch(nearest) and "transformer" not in own):
            bars.append(named[-1])
        return any(not holds_most(one.prefix[: at + 1]) for at in bars)

    return barred


def outermost(lists: Iterable[NumberedList]) -> list[NumberedList]:
    """Those that lie inside no other of them."""
    kept: dict[Prefix, NumberedList] = {}
    for one in sorted(lists, key=lambda one: len(one.prefix) - one.numbered):
        if not _lies_in(one, kept):
            kept[one.prefix] = one
    return list(kept.values())


def _is_stem(one: NumberedList) -> bool:
    return bool(one.prefix) and _STEM.fullmatch(word_of(one.prefix[-1])) is not None


def _lies_in(one: NumberedList, others: Mapping[Prefix, NumberedList]) -> bool:
    """Whether a list lies inside a unit of another."""
    outer = (others.get(stem) for stem in stems(one.prefix))
    return any(other is not None and other.index_of(one.prefix) is not None for other in outer)


def _with_lists_of_lists(
    found: list[NumberedList], lists: Mapping[Prefix, NumberedList], barred: Callable[[NumberedList], bool]
) -> list[NumberedList]:
    """Where several lie under different numbers of one list (`conformer.0.ffw_layer`, `conformer.1.ffw_layer`), that
    list is the stack, whatever it is called.
    """
    inside: dict[Prefix, set[int]] = defaultdict(set)
    for one in found:
        for stem in stems(one.prefix):
            if stem in lists and (index := lists[stem].index_of(one.prefix)) is not None:
                inside[stem].add(index)
    for stem in sorted((stem for stem, indices in inside.items() if len(indices) > 1), key=len):
        outer = lists[stem]
        if (_STEM.fullmatch(outer.prefix[-1] if stem else "") or not barred(outer)) and any(
            outer.index_of(one.prefix) is not None for one in found
        ):
            found = [outer, *(one for one in found if outer.index_of(one.prefix) is None)]
    return found


def _overlaps(one: NumberedList, others: Iterable[NumberedList]) -> bool:
    """Whether a list lies inside one of others, or holds one."""
    return any(other.index_of(one.prefix) is not None or one.index_of(other.prefix) is not None for other in others)


def survey(lists: Mapping[Prefix, NumberedList]) -> list[str]:
    """A line for each numbered prefix, those with most tensors first, for an error message."""
    lines = []
    for one in sorted(lists.values(), key=lambda one: -one.size):
        indices = sorted(one.tails)
        shown = ", ".join(map(str, indices[:4])) + (f", ... {indices[-1]}" if len(indices) > 4 else "")
        lines.append(f"{one.name or '(no prefix)'}: {one.size:,} tensors at {shown}")
    return lines
