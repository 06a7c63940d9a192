"""By which name each side knows a tensor of the leading side: its own, with a prefix on or off, or one that is known to
be the same.

Everything is decided by counting tensors that would have a partner of equal shape. Names are only spelt otherwise where
they have no partner as they are.
"""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import Literal, NamedTuple

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some
from lines_cli.plan.conversions import turning
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.relaid import Relaid, relaid, turn
from lines_cli.plan.same_names import canonical
from lines_cli.plan.tied_weights import is_vocabulary

Spelling = Callable[[str], str]


def aligned_names(
    inputs: Inputs, notes: list[str], *, prefix: str | None = None, strict: bool = True
) -> tuple[Inputs, list[dict[str, str]]]:
    """For each side, its own names by the leading side's names for the same tensors.

    Args:
        inputs: the inputs.
        notes: gets a line for every side whose names are not paired as they are.
        prefix: what the names of one side begin with and those of another do not, where that was asked for; `a.=b.`
            where those of the other begin with `b.` instead; empty for none. Unless given, it is found.
        strict: whether layouts that do not add up are refused; else they stay without partners, and are a note.

    Returns:
        The inputs, with the tensors of a side that has another layout as the leading side has them; and the names.

    Raises:
        MismatchError: two prefixes fit alike; or the one that was asked for is before no name; or layouts differ, and
            do not add up.
    """
    aligned, found = [], not prefix
    checkpoints, relaid_names = list(inputs.checkpoints), [frozenset[str]() for _ in inputs.checkpoints]
    for side, checkpoint in enumerate(inputs.checkpoints):
        if side == inputs.lead:
            aligned.append({name: name for name in checkpoint.tensors})
            continue
        names, used, converted = _names_in(checkpoint, inputs, side, prefix, notes, strict=strict)
        if converted is not None:
            checkpoints[side], relaid_names[side] = converted
        aligned.append(names)
        found = found or used
    if not found:
        raise MismatchError(
            f"prefix {prefix!r}: no tensor is called so on one side, and the same "
            f"{'with the other' if _BOTH in (prefix or '') else 'without it'} on another",
            hint=f"Names of {inputs.leading.name} are\n{some(sorted(inputs.leading.tensors), 4)}",
        )
    if any(relaid_names):
        inputs = replace(inputs, checkpoints=tuple(checkpoints), relaid=tuple(relaid_names))
    return inputs, aligned


@dataclass(frozen=True, slots=True)
class _Reading:
    """A way to read two sides' names: with a prefix that those of one have, or with none.

    Attributes:
        spelling: what is done to every name first.
        prefix: empty for none.
        of: whose names begin with it.
        instead: what those of the other side begin with in its place; mostly empty.
        equal, named: how many tensors have a partner by it, of equal shape and of any.
        alike: all prefixes by which as many have one, if there are several.
    """

    spelling: Spelling
    prefix: str = ""
    of: Literal["lead", "other"] = "lead"
    equal: int = 0
    named: int = 0
    alike: tuple[str, ...] = ()
    instead: str = ""


class _Paired(NamedTuple):
    """How two sides' names were read.

    Attributes:
        names: of all tensors of the other side, by what the leading side calls them.
        reading: the prefix.
        known: those whose names are only known to be the same.
    """

    names: dict[str, str]
    reading: _Reading
    known: dict[str, str]


def _names_in(
    other: Checkpoint, inputs: Inputs, side: int, asked: str | None, notes: list[str], *, strict: bool
) -> tuple[dict[str, str], bool, tuple[Checkpoint, frozenset[str]] | None]:
    """The tensors of one side by the names that the leading one has for them; whether a prefix was used; and the side
    with its tensors in the leading one's layout, if they are not, with the names of those.

    A model saved by itself and one saved inside another (GPT-2's `h.0` and `transformer.h.0`) differ by one prefix, as
    transformers, too, sees on loading.
    """
    lead, called = inputs.leading, inputs.called(side)
    if not asked and other.tensors.keys() == lead.tensors.keys() and not _may_be_turned(lead, other):
        return {name: name for name in other.tensors}, False, None
    paired = _read(lead, other, asked, canonical)
    converted = None
    if found := _relaid(lead, other, paired, called):
        if found.problems and strict:
            raise _unfit(found.problems, inputs, side)
        rest = replace(
            other,
            tensors={name: of for name, of in other.tensors.items() if name not in found.used},
            formulas={name: of for name, of in other.formulas.items() if name not in found.used},
        )
        others = replace(lead, tensors={name: of for name, of in lead.tensors.items() if name not in found.tensors})
        tries = [_read(others, rest, asked, spelling) for spelling in (canonical, *(r.canonical for r in found.rules))]
        again = max(tries, key=lambda one: _paired(one.names, others, rest))
        if found.tensors or _paired(again.names, others, rest) > _paired(paired.names, lead, other):
            notes += found.notes
            paired = again._replace(names=again.names | {name: name for name in found.tensors})
        if found.problems:
            notes.append(
                f"{called} and {lead.name} have layouts that differ, and do not add up in {len(found.problems):,} "
                f"place(s), which are not paired:\n{some(found.problems)}"
            )
        if found.tensors:
            relaid_side = replace(
                rest, tensors=rest.tensors | found.tensors, formulas={**rest.formulas, **found.formulas}
            )
            converted = relaid_side, frozenset(found.tensors)
    names, reading, known = paired
    if reading.alike:
        raise _ambiguous(reading, inputs, side)
    if reading.prefix:
        whose = inputs.called(inputs.lead if reading.of == "lead" else side)
        shorter = other if reading.of == "lead" else lead
        others_called = "those of the other side" if len(inputs.checkpoints) == 2 else f"those of {shorter.name}"
        those = f"{others_called} with {reading.instead!r}" if reading.instead else f"{others_called} do not"
        notes.append(f"names of {whose} begin with {reading.prefix!r}, {those}: paired without")
    if known:
        there, own = next(iter(known.items()))
        notes.append(
            f"{len(known):,} tensor(s) have another name in {called}, known to be the same, and are "
            f"paired, such as {printable(own)} with {printable(there)}"
        )
    return names, bool(reading.prefix), converted


def _read(lead: Checkpoint, other: Checkpoint, asked: str | None, spelling: Spelling) -> _Paired:
    """The names of both sides, read so that as many tensors as possible have a partner."""
    known_as = cache(spelling)  # for as long as this side is looked at
    reading = _best_reading(lead, other, _as_it_is, asked)
    names, known = _read_by(reading, lead, other, known_as)
    if _leaves_many(names, lead) or reading.alike:
        again = _best_reading(lead, other, known_as, asked)
        spelt, spelt_known = _read_by(again, lead, other, known_as)
        if _paired(spelt, lead, other) > _paired(names, lead, other):
            reading, names, known = again, spelt, spelt_known
    return _Paired(names, reading, known)


# --- layouts ---


def _may_be_turned(lead: Checkpoint, other: Checkpoint) -> bool:
    """Whether tensors of one name may be stored the other way round, and some are."""
    if not turning([lead.config, other.config]):
        return False
    return any(of.info.shape != other.tensors[name].info.shape for name, of in lead.tensors.items())


def _relaid(lead: Checkpoint, other: Checkpoint, paired: _Paired, called: str) -> Relaid | None:
    """The other side's tensors that have no partner, or none of their shape, in the leading one's layout; None where
    there is nothing to look for.
    """
    ours = [name for name in lead.tensors if name not in paired.names]
    theirs = [own for there, own in paired.names.items() if there not in lead.tensors]
    found = turn(lead, other, paired.names, called)
    if ours and theirs:
        more = relaid(lead, other, (ours, theirs), called)
        found = Relaid(
            found.tensors | more.tensors,
            found.formulas | more.formulas,
            found.used | more.used,
            more.rules,
            found.problems + more.problems,
            found.notes + more.notes,
        )
    return found if found.tensors or found.problems or found.rules else None


def _unfit(problems: list[str], inputs: Inputs, side: int) -> MismatchError:
    other, lead = inputs.checkpoints[side], inputs.leading
    option = "--missing-in-blocks N" if inputs.of_an_edit else "missing_in_blocks: N"
    return MismatchError(
        f"{other.name} and {lead.name} have layouts that differ, and do not add up in {len(problems):,} place(s):\n"
        f"{some(problems)}",
        hint="Bring one side into the other's layout first (transformers: from_pretrained, then save_pretrained). "
        f"If they are to stay without partners, {option}, beside "
        f"{'--missing' if inputs.of_an_edit else 'missing:'}, says so.",
    )


def _as_it_is(name: str) -> str:
    return name


def _leaves_many(names: Mapping[str, str], lead: Checkpoint) -> bool:
    """Whether more than a tenth of the names of the side that has fewer are without a partner."""
    paired = sum(name in lead.tensors for name in names)
    return 10 * paired < 9 * min(len(names), len(lead.tensors))


def _paired(names: Mapping[str, str], lead: Checkpoint, other: Checkpoint) -> int:
    """How many tensors have a partner of equal shape."""
    return sum(there in lead.tensors and _equal(lead, there, other, own) for there, own in names.items())


def _equal(lead: Checkpoint, there: str, other: Checkpoint, own: str) -> bool:
    return lead.tensors[there].info.shape == other.tensors[own].info.shape


# --- prefixes ---


def _best_reading(lead: Checkpoint, other: Checkpoint, spelling: Spelling, asked: str | None) -> _Reading:
    """The prefix under which most names have a partner of equal shape; none where no prefix gives more of them than
    the names as they are, or where it does not fit most names of the side that lacks it.
    """
    of_lead, of_other = _spelt(lead, spelling), _spelt(other, spelling)
    direct = [(there, of_other[key]) for key, there in of_lead.items() if key in of_other]
    equal = sum(_equal(lead, there, other, own) for there, own in direct)
    none = _Reading(spelling, equal=equal, named=len(direct))
    if asked == "":
        return none
    if asked is not None and _BOTH in asked:
        one, another = asked.split(_BOTH)
        ways = [_swapped(lead, of_lead, other, of_other, *pair) for pair in ((one, another), (another, one))]
        both = max(ways, key=lambda reading: (reading.equal, reading.named))
        return replace(both, spelling=spelling) if both.named else none
    readings = [
        _Reading(spelling, prefix, "lead", *counts)
        for prefix, counts in _prefixes(lead, of_lead, other, of_other).items()
    ] + [
        _Reading(spelling, prefix, "other", *counts)
        for prefix, counts in _prefixes(other, of_other, lead, of_lead).items()
    ]
    if asked is not None:
        return max((r for r in readings if r.prefix == asked), key=lambda r: r.equal, default=none)
    most = [
        reading
        for reading in readings
        if reading.equal > equal and 2 * reading.named > len((other if reading.of == "lead" else lead).tensors)
    ]
    best = max(most, key=lambda r: (r.equal, r.named), default=none)
    alike = sorted(r.prefix for r in most if (r.equal, r.named) == (best.equal, best.named))
    return replace(best, alike=tuple(alike)) if len(alike) > 1 else best


def _spelt(checkpoint: Checkpoint, spelling: Spelling) -> Mapping[str, str]:
    """Names as they are spelt -> as they are; without those that two would be spelt alike."""
    if spelling is _as_it_is:
        return {name: name for name in checkpoint.tensors}
    spelt: dict[str, str | None] = {}
    for name in checkpoint.tensors:
        key = spelling(name)
        spelt[key] = None if key in spelt else name
    return {key: name for key, name in spelt.items() if name is not None}


def _prefixes(
    longer: Checkpoint, its: Mapping[str, str], shorter: Checkpoint, others: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Each prefix of names of `longer`, up to a dot, behind which a name of `shorter` stands: how many tensors it
    pairs, of equal shape and of any.

    A name that both sides have says nothing of a prefix, and is not looked at.
    """
    equal: dict[str, int] = defaultdict(int)
    named: dict[str, int] = defaultdict(int)
    for key, own in its.items():
        if key in others and _equal(longer, own, shorter, others[key]):
            continue
        at = key.find(".") + 1
        for _ in range(_MOST_PARTS):
            if not at:
                break
            partner = others.get(key[at:])
            if partner is not None:
                named[key[:at]] += 1
                equal[key[:at]] += _equal(longer, own, shorter, partner)
            at = key.find(".", at) + 1
    return {prefix: (equal[prefix], count) for prefix, count in named.items()}


_MOST_PARTS = 64  # of a stranger's name that are looked at
_BOTH = "="  # between two prefixes of which one stands where the other side has the other


def _swapped(
    lead: Checkpoint,
    of_lead: Mapping[str, str],
    other: Checkpoint,
    of_other: Mapping[str, str],
    prefix: str,
    instead: str,
) -> _Reading:
    """The reading by which names of `lead` begin with `prefix` where those of `other` begin with `instead`."""
    equal = named = 0
    for key, own in of_other.items():
        there = of_lead.get(prefix + key[len(instead) :]) if key.startswith(instead) else None
        if there is not None:
            named += 1
            equal += _equal(lead, there, other, own)
    return _Reading(_as_it_is, prefix, "lead", equal, named, instead=instead)


def two_prefixes(inputs: Inputs) -> list[str]:
    """What a prefix could be where each side has one of its own before the same names (`bert.`, `model.encoder.`): as
    `a.=b.`, the base's first. Never taken unasked: the blocks of a text tower may be called as those of a vision tower.

    Returns:
        Those by which most tensors have a partner of equal shape, and more than half of one side's.
    """
    lead = inputs.leading
    for side, other in enumerate(inputs.checkpoints):
        of_lead, of_other = _spelt(lead, _as_it_is), _spelt(other, _as_it_is)
        least = min(len(of_lead), len(of_other)) // 2
        pairs = [] if side == inputs.lead else list(product(_begins(of_lead, least), _begins(of_other, least)))
        readings = [_swapped(lead, of_lead, other, of_other, *pair) for pair in pairs if pair[0] != pair[1]]
        most = max((reading.equal for reading in readings), default=0)
        best = sorted((r for r in readings if r.equal == most > least), key=lambda r: len(r.prefix))
        found: list[tuple[str, str]] = []
        for reading in best:
            pair = (reading.prefix, reading.instead)
            if not any(_is_longer(pair, shorter) for shorter in found):  # which pairs the same
                found.append(pair)
        if found:
            return [_BOTH.join(pair if inputs.lead < side else pair[::-1]) for pair in found]
    return []


def _begins(names: Iterable[str], least: int) -> list[str]:
    """What more than so many names begin with, up to a dot."""
    counted: Counter[str] = Counter()
    for name in names:
        at = name.find(".") + 1
        for _ in range(_MOST_PARTS_SHARED):
            if not at:
                break
            counted[name[:at]] += 1
            at = name.find(".", at) + 1
    return [begin for begin, times in counted.items() if times > least]


_MOST_PARTS_SHARED = 6


def _is_longer(pair: tuple[str, str], shorter: tuple[str, str]) -> bool:
    """Whether two prefixes are two others with the same words behind each."""
    rest = pair[0].removeprefix(shorter[0])
    return pair == (shorter[0] + rest, shorter[1] + rest)


def _ambiguous(reading: _Reading, inputs: Inputs, side: int) -> MismatchError:
    longer, shorter = inputs.checkpoints[side], inputs.leading
    if reading.of == "lead":
        longer, shorter = shorter, longer
    counted = [f"{prefix}: {reading.equal:,} of {len(shorter.tensors):,}" for prefix in reading.alike]
    option = "--prefix" if inputs.of_an_edit else "prefix:"
    ways = or_so(option, reading.alike)
    return MismatchError(
        f"names of {shorter.name} are found in {longer.name} behind {len(counted)} prefixes, and as many tensors "
        f"have a partner of equal shape behind each:\n{some(counted)}",
        hint=f"Say which is meant: {ways}",
    )


def or_so(option: str, prefixes: Sequence[str]) -> str:
    """The option with each of a few prefixes."""
    return " or ".join(f"{option} {shlex.quote(prefix)}" for prefix in prefixes[:_MOST_WAYS])


_MOST_WAYS = 4


# --- the names of one side by those of the leading one ---


def _read_by(
    reading: _Reading, lead: Checkpoint, other: Checkpoint, known_as: Spelling
) -> tuple[dict[str, str], dict[str, str]]:
    """All tensors of `other` by the names that `lead` has for them; and of these those whose names are only known to
    be the same.
    """
    paired = _behind_prefix(reading, lead, other) if reading.prefix else {}  # own name -> the leading side's
    taken = set(paired.values())
    for own in other.tensors:
        if own not in paired and own in lead.tensors and own not in taken:
            paired[own] = own
    taken = set(paired.values())
    rest = [own for own in other.tensors if own not in paired]
    unpaired = [name for name in lead.tensors if name not in taken] if rest else []
    known = _known(reading, lead, other, unpaired, rest, known_as)
    paired |= known
    taken |= set(known.values())
    for own in rest:
        if own not in paired:
            paired[own] = _free(own, reading, taken)
            taken.add(paired[own])
    names = {paired[own]: own for own in other.tensors}
    return names, {there: own for own, there in known.items()}


def _behind_prefix(reading: _Reading, lead: Checkpoint, other: Checkpoint) -> dict[str, str]:
    of_lead, prefix, paired = _spelt(lead, reading.spelling), reading.prefix, {}
    for key, own in _spelt(other, reading.spelling).items():
        if reading.of == "lead":
            there = of_lead.get(prefix + key[len(reading.instead) :]) if key.startswith(reading.instead) else None
        else:
            there = of_lead.get(key[len(prefix) :]) if key.startswith(prefix) else None
        if there is not None:
            paired[own] = there
    return paired


def _known(
    reading: _Reading,
    lead: Checkpoint,
    other: Checkpoint,
    of_lead: list[str],
    of_other: list[str],
    known_as: Spelling,
) -> dict[str, str]:
    """Of tensors without a partner, those whose names are known to be the same: own name -> the leading side's.

    Each is the only one of its side that is called so, and of the other's shape.
    """
    by_canonical = {known_as(name): name for name in of_lead}
    paired: dict[str, str] = {}
    for own in of_other:
        for spelt in (own, _prefixed(own, reading)):
            there = by_canonical.get(known_as(spelt))
            if there is not None and _may_be_one(lead, there, other, own):
                paired[own] = there
                break
    if not paired:
        return {}
    twice = _called_alike(lead, known_as) | _called_alike(other, known_as)
    claimed = {there for there, times in Counter(paired.values()).items() if times > 1}
    return {
        own: there
        for own, there in paired.items()
        if there not in claimed and twice.isdisjoint((known_as(own), known_as(there)))
    }


def _called_alike(side: Checkpoint, known_as: Spelling) -> set[str]:
    """What more than one tensor of a side is known as."""
    return {name for name, times in Counter(map(known_as, side.tensors)).items() if times > 1}


def _may_be_one(lead: Checkpoint, there: str, other: Checkpoint, own: str) -> bool:
    """Whether shapes are equal, but for the rows of a vocabulary, about which the recipe decides."""
    ours, theirs = lead.tensors[there].info.shape, other.tensors[own].info.shape
    return ours == theirs or (is_vocabulary(there) and ours[1:] == theirs[1:] and len(ours) == len(theirs))


def _prefixed(own: str, reading: _Reading) -> str:
    """A name as it would be on the leading side."""
    if reading.of == "other":
        return own.removeprefix(reading.prefix)
    return reading.prefix + own.removeprefix(reading.instead) if own.startswith(reading.instead) else own


def _free(own: str, reading: _Reading, taken: Container[str]) -> str:
    """What a tensor without a partner is called: as the leading side would, if no other is called so."""
    name = _prefixed(own, reading)
    if name in taken:
        name = own
    while name in taken:  # only with a prefix: without one no two are called alike
        name = reading.prefix + name
    return name
