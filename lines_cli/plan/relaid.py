"""Two sides of one model in different layouts: the tensors of one side as the other has them, put together of runs of
entries that stay where they are. Which belong together is said by transformers' own rules (`plan.conversions`).

Nothing is guessed: what does not add up to the last entry is a problem that names both sides, and is not used.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from lines_cli.checkpoint.formulas import InParts, Made, OfPart
from lines_cli.checkpoint.header import Part, StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import printable
from lines_cli.plan.conversions import Conversion, Found, Pattern, Rules, loading_rules, plain_rules, rules_for
from lines_cli.plan.pieces import Pieced, Run, runs, turned, whole
from lines_cli.plan.same_names import canonical
from lines_cli.storage.names import natural

Form = Literal["sources", "targets"]
Key = tuple[int, str, str]
"""Of a site: the number of its conversion, and what stands before and behind the patterns in its names."""


@dataclass(slots=True)
class Relaid:
    """What one side's tensors are in the other's layout.

    Attributes:
        tensors: by the names of the other.
        formulas: of those of them that are not stored as they are, what they are made of.
        used: the side's own tensors that they are made of, wholly.
        rules: what they were made by, and names may be known by.
        problems: what does not add up, in words.
        notes: what was done, in words.
    """

    tensors: dict[str, StoredTensor] = field(default_factory=dict)
    formulas: dict[str, Made] = field(default_factory=dict)
    used: set[str] = field(default_factory=set)
    rules: list[Rules] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


class Site(NamedTuple):
    """A place of a model that a conversion is about, as one side has it.

    Attributes:
        form: in which of the two forms.
        names: by the number of the pattern and what its `*` stands for.
    """

    form: Form
    names: dict[tuple[int, int | None], str]


def relaid(lead: Checkpoint, other: Checkpoint, left: tuple[Sequence[str], Sequence[str]], called: str) -> Relaid:
    """The tensors of `other` in the layout of `lead`, as far as the two differ.

    Args:
        lead, other: the sides.
        left: the names of each that have no partner.
        called: what messages call `other`.
    """
    found = Relaid()
    ours, theirs = list(left[0]), list(left[1])
    rules = rules_for([lead.config, other.config])
    if rules.names:
        found.rules.append(rules)
        _convert(rules, lead, other, (ours, theirs), rules, found, called)
        ours = [name for name in ours if name not in found.tensors]
        theirs = [name for name in theirs if name not in found.used]
    if ours and theirs and not found.problems and (best := _best(ours, theirs)):
        found.rules.append(best)
        _convert(best, lead, other, (ours, theirs), rules, found, called)
    return found


def turn(lead: Checkpoint, other: Checkpoint, pairs: Mapping[str, str], called: str) -> Relaid:
    """The tensors of `other` that have a partner, but are stored the other way round: [experts, in, out] for [experts,
    out, in].

    Args:
        lead, other: the sides.
        pairs: names of the one, and those of their partners.
        called: what messages call `other`.
    """
    found = Relaid()
    rules = rules_for([lead.config, other.config])
    ways = [conversion for conversion in rules.conversions if conversion.turns]
    if not ways:
        return found
    groups: dict[str, list[tuple[str, str, tuple[int, int]]]] = defaultdict(list)
    for there, own in pairs.items():
        for conversion in ways:
            at = conversion.sources[0].find(there)
            if at is not None and not at.behind and own in other.tensors and there in lead.tensors:
                _, one, another, *_ = conversion.operations[0]
                groups[at.before].append((there, own, (one, another)))
    for group in groups.values():
        shapes = [(lead.tensors[there].info.shape, other.tensors[own].info.shape) for there, own, _ in group]
        if all(ours == theirs for ours, theirs in shapes):
            continue
        made: list[tuple[str, str, Pieced | None]] = []
        for there, own, axes in group:
            tensor = turned(whole(own, other.tensors[own].info.shape), *axes)
            made.append((there, own, tensor))
        wrong = [
            _unlike(lead, there, other, [own], tensor.shape if tensor else None)
            for there, own, tensor in made
            if tensor is None or tensor.shape != lead.tensors[there].info.shape
        ]
        found.problems += wrong
        for there, _, tensor in made if not wrong else ():
            assert tensor is not None
            _put(found, lead, other, there, tensor)
    if found.tensors:
        there = min(found.tensors, key=natural)
        found.notes.append(
            f"{len(found.tensors):,} tensor(s) of {called} are stored the other way round, and read so, such as "
            f"{printable(there)}"
        )
    return found


# --- one side by itself ---


class Loaded(NamedTuple):
    """A checkpoint's tensors as transformers' modules hold them.

    Attributes:
        checkpoint: with them, by the names of the modules' parameters.
        names: of those that its files call otherwise, by these names; those that are put together or cut apart are not
            among them.
        made: of what each tensor is made that is put together or cut apart: names of the files.
        problems: names of the files whose modules are not known -> why, in words.
    """

    checkpoint: Checkpoint
    names: Mapping[str, str]
    made: Mapping[str, Sequence[str]]
    problems: Mapping[str, str]


def as_loaded(side: Checkpoint, config: Mapping[str, Any] | None = None) -> Loaded:
    """What transformers makes of a checkpoint on loading it, as far as its rules say that of the model's type.

    Args:
        side: the checkpoint.
        config: which says the type; its own unless given.
    """
    rules = loading_rules(side.config if config is None else config)
    found, made, problems = Relaid(), dict[str, list[str]](), dict[str, str]()
    if not rules.names:
        return Loaded(side, {}, {}, {})
    for (number, *_), there in sites(rules, side.tensors).items():
        conversion = rules.conversions[number]
        site = next((site for site in there if site.form == "sources"), None)
        if site is None:
            continue
        owns, before = _in_order(site), len(found.problems)
        tensors = _forward(conversion, side, site)
        for name, tensor in tensors or ():
            at = _target_name(rules, conversion, site, name)
            _put(found, side, side, at, tensor)
            made[at] = [own for own in owns if any(piece.source == own for piece in tensor.pieces)]
        if tensors is None or len(found.problems) > before:
            targets = " and ".join(pattern.text.strip(".") for pattern in conversion.targets)
            how = f"transformers has {targets} in its place ({conversion.of} in its table of layouts)"
            problems |= dict.fromkeys(owns, how)
    used = {own for owns in made.values() for own in owns} | problems.keys()
    spelt = {own: rules.renamed(own) for own in side.tensors if own not in used}
    twice = {name for name, times in Counter(spelt.values()).items() if times > 1} | (found.tensors.keys() & {*spelt})
    names = {name: own for own, name in spelt.items() if name != own and name not in twice}
    as_it_is = {own: name if name in names else own for own, name in spelt.items()} | {own: own for own in problems}
    checkpoint = replace(
        side,
        tensors={name: side.tensors[own] for own, name in as_it_is.items()} | found.tensors,
        formulas={as_it_is[own]: of for own, of in side.formulas.items() if own in as_it_is} | found.formulas,
    )
    return Loaded(checkpoint, names, made, problems)


def _forward(conversion: Conversion, side: Checkpoint, site: Site) -> list[tuple[int, Pieced]] | None:
    """The targets of a site, by the numbers of their patterns; None where something is missing, or what is done to get
    them is not known here.
    """
    numbers = range(1 + max((number for _, number in site.names if number is not None), default=-1))
    wanted = {
        (at, number)
        for at, pattern in enumerate(conversion.sources)
        for number in (numbers if pattern.counts else (None,))
    }
    if wanted != site.names.keys() or not conversion.can_be_carried_out:
        return None
    if any(operation[0] == "split" for operation in conversion.operations):
        return None  # into sizes that the model's code has
    held = tensors_of(conversion, side, site)
    axes = [operation[1] for operation in conversion.operations if operation[0] == "chunk"]
    size = held[0][0].shape[axes[0]] if axes and len(held[0][0].shape) > axes[0] else 0
    targets = conversion.forward(held, [size // len(conversion.targets)] * len(conversion.targets) if axes else ())
    return None if targets is None else list(enumerate(targets))


def _target_name(rules: Rules, conversion: Conversion, site: Site, number: int) -> str:
    """What a target of a site is called."""
    (at, _), name = next(iter(site.names.items()))
    pattern = conversion.sources[at]
    place = pattern.find(rules.renamed(name)) or pattern.find(name)
    assert place is not None
    return f"{place.before}{conversion.targets[number].text}{place.behind}"


# --- sites ---


def sites(rules: Rules, names: Iterable[str]) -> dict[Key, list[Site]]:
    """The places that conversions are about, each in one form or in both."""
    found: dict[Key, dict[Form, dict[tuple[int, int | None], str]]] = defaultdict(dict)
    twice: set[Key] = set()
    for name in names:
        for number, form, pattern, at in _places(rules, name):
            key = (number, canonical(at.before), at.behind)
            held = found[key].setdefault(form, {})
            if (pattern, at.number) in held:
                twice.add(key)  # two names for one: which is meant?
            held[pattern, at.number] = name
    return {key: [Site(form, held) for form, held in forms.items()] for key, forms in found.items() if key not in twice}


def _places(rules: Rules, name: str) -> Iterator[tuple[int, Form, int, Found]]:
    """The conversions that a name has a place in: of its first form, which it is in if it is in any, and the others."""
    spelt = rules.renamed(name)
    for number, conversion in enumerate(rules.conversions):
        if conversion.turns:
            continue
        forms: tuple[tuple[Form, Sequence[Pattern]], ...] = (
            ("sources", conversion.sources),
            ("targets", conversion.targets),
        )
        for form, patterns in forms:
            for at, pattern in enumerate(patterns):
                place = pattern.find(spelt) or (pattern.find(name) if name != spelt else None)
                if place is not None:
                    yield number, form, at, place
                    return


def _pairs(rules: Rules, ours: Iterable[str], theirs: Iterable[str]) -> Iterator[tuple[Conversion, Site, Site]]:
    """The places that each side has in one form, and not in the same."""
    of_lead, of_other = sites(rules, ours), sites(rules, theirs)
    before = _Befores(of_lead)
    for key, there in of_other.items():
        matching = of_lead.get(before.like(key), [])
        if len(there) == len(matching) == 1 and there[0].form != matching[0].form:
            yield rules.conversions[key[0]], matching[0], there[0]


class _Befores:
    """What stands before the patterns on one side, found by what stands there on the other: the same, or one of them
    with a prefix more, if only one is.
    """

    def __init__(self, keys: Iterable[Key]) -> None:
        self._keys = frozenset(keys)
        self._tails: dict[Key, str | None] = {}
        for number, before, behind in self._keys:
            for tail in _tails(before):
                key = (number, tail, behind)
                self._tails[key] = None if key in self._tails else before

    def like(self, key: Key) -> Key:
        number, before, behind = key
        if key in self._keys:
            return key
        if (longer := self._tails.get(key)) is not None:
            return number, longer, behind
        return next((one for tail in _tails(before) if (one := (number, tail, behind)) in self._keys), key)


def _tails(before: str) -> Iterator[str]:
    """It without its first words, as long as a number is left in it."""
    for _ in range(_MOST_WORDS):
        before = before.partition(".")[2]
        if not re.search(r"\d", before):
            return
        yield before


_MOST_WORDS = 6


def _best(ours: Sequence[str], theirs: Sequence[str]) -> Rules | None:
    """The rules, of those whose conversions need no config, by which most names of both sides are accounted for; None
    if there are none, or if several account for them in different ways.
    """
    few = _few(ours), _few(theirs)
    most, best, ways = 0, None, set[frozenset[tuple[str, ...]]]()
    for rules in plain_rules():
        pairs = {
            (*sorted(site.names.values()), *sorted(there.names.values())) for _, site, there in _pairs(rules, *few)
        }
        known = [_called(rules, names) for names in few]
        pairs |= {(known[0][name], known[1][name]) for name in known[0].keys() & known[1].keys()}
        number = sum(map(len, pairs))
        if number > most:
            most, best, ways = number, rules, set()
        if number == most:
            ways.add(frozenset(pairs))
    return best if len(ways) == 1 else None


def _called(rules: Rules, names: Iterable[str]) -> dict[str, str]:
    """Names by what they are known as, without those that two are."""
    known: dict[str, str | None] = {}
    for name in names:
        key = rules.canonical(name)
        known[key] = None if key in known else name
    return {key: name for key, name in known.items() if name is not None}


def _few(names: Sequence[str]) -> list[str]:
    """Names of the first layers and their first experts, which stand for all; if there are none, the first names."""
    found = [name for name in names if all(int(number) <= _FIRST for number in _NUMBERED.findall(name))]
    return (found or list(names))[:_MOST_LOOKED_AT]


_NUMBERED = re.compile(r"(?<=\.)\d{1,9}(?=\.)")
_FIRST = 3
_MOST_LOOKED_AT = 500


# --- from one form to the other ---


def _convert(
    rules: Rules,
    lead: Checkpoint,
    other: Checkpoint,
    left: tuple[Sequence[str], Sequence[str]],
    of_config: Rules,
    found: Relaid,
    called: str,
) -> None:
    ways = [conversion for conversion in of_config.conversions if conversion.turns]
    made: dict[str, list[tuple[Conversion, Site, Site]]] = defaultdict(list)
    for conversion, ours, theirs in _pairs(rules, *left):
        if (wrong := _incomplete(conversion, lead, ours, other, theirs)) is not None:
            found.problems += wrong
            continue
        first = next(iter(ours.names.values()))
        made[_NUMBERED_LAST.sub("", first)].append((conversion, ours, theirs))
    before = len(found.tensors), len(found.used)
    example: tuple[str, str] | None = None
    of = dict[str, None]()
    for group in made.values():
        for conversion, ours, theirs in _whichever_way(group, lead, other, ways, found):
            of[conversion.of] = None
            example = example or (min(ours.names.values(), key=natural), min(theirs.names.values(), key=natural))
    if example is not None:
        there, own = example
        ours_made, theirs_used = len(found.tensors) - before[0], len(found.used) - before[1]
        found.notes.append(
            f"{theirs_used:,} tensor(s) of {called} have another layout, and are read as {ours_made:,}, such as "
            f"{printable(own)} for {printable(there)} ({' and '.join(of)} in transformers' table of layouts)"
        )


_NUMBERED_LAST = re.compile(r"\.experts?\..*|\.[^.]*(?:\.weight|\.bias)?\Z", re.DOTALL)


def _incomplete(
    conversion: Conversion, lead: Checkpoint, ours: Site, other: Checkpoint, theirs: Site
) -> list[str] | None:
    """What a side lacks of a site, in words; None if nothing."""
    if not conversion.can_be_carried_out:
        how = " and ".join(operation[0] for operation in conversion.operations)
        there, own = next(iter(ours.names.values())), next(iter(theirs.names.values()))
        what = f"{printable(there)} in {lead.name} is made of what {other.name} has as {printable(own)} by {how}"
        return [f"{what} ({conversion.of} in transformers' table of layouts), which is not done here"]
    wrong = []
    for holder, site, whose, opposite in ((lead, ours, other, theirs), (other, theirs, lead, ours)):
        for missing in _missing(conversion, site, whose, opposite):
            like = next(iter(opposite.names.values()))
            shape = list(whose.tensors[like].info.shape)
            wrong.append(
                f"{printable(missing)} is not in {holder.name}, and {whose.name} has it in {printable(like)} {shape}"
            )
    return wrong or None


def _missing(conversion: Conversion, site: Site, whose: Checkpoint, there: Site) -> list[str]:
    """The names of what a side should have, too, by what the other has."""
    patterns = conversion.sources if site.form == "sources" else conversion.targets
    wanted: set[tuple[int, int | None]] = {(at, None) for at, pattern in enumerate(patterns) if not pattern.counts}
    numbers = {number for _, number in site.names if number is not None}
    if any(pattern.counts for pattern in patterns):
        fused = [whose.tensors[name].info.shape for name in there.names.values()]
        experts = max((shape[0] for shape in fused if shape), default=0)
        numbers |= set(range(min(experts, len(site.names) + _MOST_MISSING)))
        wanted |= {(at, number) for at, pattern in enumerate(patterns) if pattern.counts for number in numbers}
    return [_name_of(patterns, site, place) for place in sorted(wanted - site.names.keys(), key=str)]


_MOST_MISSING = 1000


def _name_of(patterns: Sequence[Pattern], site: Site, place: tuple[int, int | None]) -> str:
    """What a tensor that is not there would be called, by the others that are."""
    at, number = place
    for (other, its), name in site.names.items():
        found = patterns[other].find(name)
        if found is not None:
            text = patterns[at].text.replace("*", str(number if number is not None else its))
            return f"{found.before}{text}{found.behind}"
    return patterns[at].text.replace("*", str(number))


def _whichever_way(
    group: Sequence[tuple[Conversion, Site, Site]],
    lead: Checkpoint,
    other: Checkpoint,
    ways: Sequence[Conversion],
    found: Relaid,
) -> list[tuple[Conversion, Site, Site]]:
    """Make what belongs to one module, with its matrices as they are or, where the model is known to have had them so,
    all of them the other way round. A square one says nothing of that.

    Returns:
        What was made.
    """
    tries: list[list[tuple[str, Pieced]] | None] = []
    wrong: list[str] = []
    for turning in (False, True) if ways else (False,):
        made: list[tuple[str, Pieced]] = []
        for conversion, ours, theirs in group:
            tensors = _made(conversion, lead, ours, other, theirs, ways if turning else ())
            if isinstance(tensors, str):
                wrong += [tensors] if not turning else []
                break
            made += tensors
        else:
            tries.append(made)
    unsure = not ways and _only_square(group, lead, other)
    if not tries or unsure:
        found.problems += wrong or [
            f"{printable(next(iter(ours.names.values())))} in {lead.name} and "
            f"{printable(next(iter(theirs.names.values())))} in {other.name} are square, and nothing says which way "
            "round each is"
            for _, ours, theirs in group[:1]
        ]
        return []
    for there, tensor in tries[0] or ():
        _put(found, lead, other, there, tensor)
    return list(group)


def _only_square(group: Sequence[tuple[Conversion, Site, Site]], lead: Checkpoint, other: Checkpoint) -> bool:
    """Whether all experts that are put together somewhere are square matrices, and the model is not known."""
    known = rules_for([lead.config, other.config]).names
    if any(conversion.of in known for conversion, _, _ in group):
        return False
    fused = [
        side.tensors[name].info.shape
        for conversion, ours, theirs in group
        for side, site in ((lead, ours), (other, theirs))
        if site.form == "targets" and any(pattern.counts for pattern in conversion.sources)
        for name in site.names.values()
    ]
    return bool(fused) and all(len(shape) > 2 and shape[-1] == shape[-2] for shape in fused)


def _made(
    conversion: Conversion,
    lead: Checkpoint,
    ours: Site,
    other: Checkpoint,
    theirs: Site,
    ways: Sequence[Conversion],
) -> list[tuple[str, Pieced]] | str:
    """The leading side's tensors of a site, made of the other's; or, in words, why they cannot be."""
    to_targets = ours.form == "targets"
    held = tensors_of(conversion, other, theirs)
    like = tensors_of(conversion, lead, ours)
    if to_targets:
        axes = [operation[1] for operation in conversion.operations if operation[0] in {"chunk", "split"}]
        sizes = [one[0].shape[axes[0]] if len(one[0].shape) > axes[0] else 0 for one in like] if axes else []
        targets = conversion.forward(held, sizes)
        made = None if targets is None else [[_turned(one, conversion, at, ways)] for at, one in enumerate(targets)]
    else:
        made = conversion.backward([_turned(one[0], conversion, at, ways) for at, one in enumerate(held)], like)
    names = _in_order(ours)
    flat = None if made is None else [one for of_one in made for one in of_one]
    if flat is None or len(flat) != len(names):
        return _unlike(lead, names[0], other, _in_order(theirs), None)
    for there, tensor in zip(names, flat, strict=True):
        if tensor.shape != lead.tensors[there].info.shape:
            return _unlike(lead, there, other, _in_order(theirs), tensor.shape)
    dtypes = {other.tensors[name].info.dtype: name for name in reversed(_in_order(theirs))}
    if len(dtypes) > 1:
        listed = " and ".join(f"{printable(name)} {dtype}" for dtype, name in dtypes.items())
        return f"{printable(names[0])} in {lead.name} is in {other.name} stored in several dtypes: {listed}"
    return list(zip(names, flat, strict=True))


def _turned(tensor: Pieced, conversion: Conversion, at: int, ways: Sequence[Conversion]) -> Pieced:
    """A target the other way round, if one of `ways` is about it."""
    for way in ways:
        if way.sources[0].text.lstrip(".").endswith(conversion.targets[at].text.lstrip(".")):
            _, one, another, *_ = way.operations[0]
            return turned(tensor, one, another) or tensor
    return tensor


def _in_order(site: Site) -> list[str]:
    """The names of a site, pattern by pattern."""
    return [site.names[place] for place in sorted(site.names, key=lambda place: (place[0], place[1] or 0))]


def tensors_of(conversion: Conversion, side: Checkpoint, site: Site) -> list[list[Pieced]]:
    """The tensors of a site, for each pattern."""
    held: dict[int, list[Pieced]] = defaultdict(list)
    for place in sorted(site.names, key=lambda place: (place[0], place[1] or 0)):
        name = site.names[place]
        held[place[0]].append(whole(name, side.tensors[name].info.shape))
    patterns = conversion.sources if site.form == "sources" else conversion.targets
    return [held[at] for at in range(len(patterns))]


def _unlike(lead: Checkpoint, there: str, other: Checkpoint, owns: Sequence[str], made: tuple[int, ...] | None) -> str:
    shape, of_own = list(lead.tensors[there].info.shape), list(other.tensors[owns[0]].info.shape)
    of = f"{printable(owns[0])} {of_own}"
    held = f"{len(owns):,} tensors such as {of}" if len(owns) > 1 else of
    makes = f"would make {list(made)} of it" if made is not None else "do not add up to it"
    return f"{printable(there)} is {shape} in {lead.name}, and what {other.name} has, {held}, {makes}"


def _put(found: Relaid, lead: Checkpoint, other: Checkpoint, there: str, tensor: Pieced) -> None:
    """Add a tensor under the leading side's name for it."""
    of = runs(tensor)
    owns = {piece.source for piece in tensor.pieces}
    stored = {own: other.formulas[own].stored if own in other.formulas else other.tensors[own] for own in owns}
    if (why := _obstacle(of, stored, there, other)) is not None:
        found.problems.append(
            f"{printable(there)} {list(tensor.shape)} in {lead.name} is not made of what {other.name} has, "
            f"{len(owns):,} tensor(s) such as {printable(min(owns, key=natural))}: {why}"
        )
        return
    assert of
    dtype = stored[of[0].source].info.dtype
    parts = tuple(
        Part(
            run.start,
            run.numel,
            stored[run.source].file,
            stored[run.source].info.offset + run.first * itemsize(dtype),
            run.sizes,
            run.strides,
            run.source,
            run.first,
        )
        for run in of
    )

    def as_one(dtype: str) -> StoredTensor:
        info = TensorInfo(dtype, tensor.shape, parts[0].offset, math.prod(tensor.shape) * itemsize(dtype))
        return StoredTensor(parts[0].file, info, parts)

    found.tensors[there] = as_one(other.tensors[of[0].source].info.dtype)
    found.used |= owns
    if steps := tuple(_steps(parts, other, there, tensor.shape)):
        found.formulas[there] = Made(as_one(dtype), steps)


def _obstacle(
    of: Sequence[Run] | None, stored: Mapping[str, StoredTensor], there: str, other: Checkpoint
) -> str | None:
    """Why runs of entries cannot be read as one tensor, in words; None if they can."""
    if not of:
        return "it would have to be read entry by entry"
    if there in other.tensors and there not in stored:
        return "that has a tensor of the name, too"
    if len(dtypes := sorted({one.info.dtype for one in stored.values()})) > 1:
        return f"these are stored as {' and '.join(dtypes)}"
    if any(len(run.sizes) > 1 and run.source in other.formulas for run in of):
        return "it is stored the other way round, and not as it is (quantised, or changed by an adapter)"
    return None


def _steps(parts: Sequence[Part], other: Checkpoint, there: str, shape: tuple[int, ...]) -> Iterator[InParts]:
    """What makes the entries of those that are stored: first what gives the weights, then what is only added to them,
    so that that is the task vector upon the same weights.
    """
    made, added = list[OfPart](), list[OfPart]()
    for part in parts:
        steps = other.formulas[part.tensor].steps if part.tensor in other.formulas else ()
        last = max((number for number, step in enumerate(steps, 1) if not step.adds), default=0)
        for into, own in ((made, steps[:last]), (added, steps[last:])):
            if own:
                into.append(OfPart(part.start, part.numel, part.entry, own))
    for of in (made, added):
        if of:
            yield InParts(there, (), shape, tuple(of))
