"""Where the names can be read in more than one way: other lists than those that were taken could as well be the layers.

A list of lists may be counted by its units or by what is in them, run through or stand side by side; of two groups
of lists neither may be plainer. `numbered_lists` and `running_order` decide which reading is taken; here it is
found that it was a toss-up, and what the other side would be.
"""

from __future__ import annotations

import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from lines_cli.scaling.numbered_lists import NumberedList, Prefix, is_index, word_of
from lines_cli.scaling.running_order import inner_names, mirrored

# A list of these is one of whole models, or of towers; others of lists are of stages.
_WHOLE = re.compile(
    r".*(?:models?|members?|ensembles?|estimators?|towers?|encoders?|decoders?|transformers?|backbones?|berts?|gpts?|vits?"
    r"|unets?|agents?|critics?|actors?|policy|policies|students?|teachers?|nets|networks)"
)
_FEWEST_IN_A_UNIT = 3


@dataclass(frozen=True, slots=True)
class Toss:
    """Two readings of the same names that the names do not tell apart.

    Attributes:
        taken, other: each in words, with its number of layers.
        names: of the tensors whose depth hangs on it.
        to_take, to_change: the options that say the one, or the other.
    """

    taken: str
    other: str
    names: tuple[str, ...]
    to_take: str
    to_change: str


def tosses(
    found: list[NumberedList],
    passed_over: list[NumberedList],
    lists: Mapping[Prefix, NumberedList],
    barred: Callable[[NumberedList], bool],
    counts: Mapping[Prefix, int],
) -> Iterator[Toss]:
    """Every decision that could as well have gone the other way.

    Args:
        found: the lists that were taken for stacks.
        passed_over: a group of lists that hold nearly as much, or more, and were not.
        lists: every numbered list.
        barred: whether a name on the way to a list rules out that it holds layers.
        counts: how many layers those that were taken have, by prefix.
    """
    if passed_over:
        yield _of_two_groups(found, passed_over)
    for one in found:
        counted = counts[one.prefix]
        by_units = counted == len(one.tails)
        stages = {} if by_units else inner_names(one)
        if len(stages) > 1:
            yield _of_two_kinds_of_blocks(one, stages, counted)
        for rest, inner in _inside(one, lists).items():
            if barred(next(iter(inner.values()))):
                continue
            if by_units and _is_as_plain(one, inner):
                yield _of_units_and_parts(one, rest, inner)
            elif not by_units and _stand_side_by_side(one, rest, inner, lists):
                yield _of_a_row_and_a_rank(one, rest, inner, counted)


def _inside(one: NumberedList, lists: Mapping[Prefix, NumberedList]) -> dict[Prefix, dict[int, NumberedList]]:
    """The lists inside the units of one, by their path in it: unit -> list."""
    inside: dict[Prefix, dict[int, NumberedList]] = defaultdict(dict)
    at = len(one.prefix) - one.numbered + 1
    for prefix, other in lists.items():
        if len(prefix) > at and (index := one.index_of(prefix)) is not None and not other.numbered:
            rest = prefix[at:]
            if not any(map(is_index, rest)):
                inside[rest][index] = other
    return inside


def _is_as_plain(one: NumberedList, inner: Mapping[int, NumberedList]) -> bool:
    """Whether the parts of most units are as much like layers as the units: called so or not as those are, alike, and
    most of what there is.
    """
    like = [part for part in inner.values() if part.of_a_kind and not part.bare]
    if 2 * len(like) < len(one.tails) or 2 * sum(part.size for part in inner.values()) < one.size:
        return False
    return like[0].called_layers == one.called_layers


def _is_of_a_u_net(one: NumberedList, lists: Mapping[Prefix, NumberedList]) -> bool:
    """Whether numbered encoders and the decoders that mirror them stand beside each other."""
    return mirrored(one.prefix) in lists or any(mirrored(prefix) == one.prefix for prefix in lists)


def _stand_side_by_side(
    one: NumberedList, rest: Prefix, inner: Mapping[int, NumberedList], lists: Mapping[Prefix, NumberedList]
) -> bool:
    """Whether the units could be whole models: called so, and each with all that the others have."""
    if one.called_layers or not one.prefix or not rest or len(inner) != len(one.tails):
        return False
    if one.numbered and _is_of_a_u_net(one, lists):
        return False
    if not _WHOLE.fullmatch(word_of(one.prefix[-1])) or any(
        len(part.tails) < _FEWEST_IN_A_UNIT for part in inner.values()
    ):
        return False
    held = [frozenset(tail for tail, _ in tails) for tails in one.tails.values()]
    return len(held) > 1 and all(tails == held[0] for tails in held)


def _of_units_and_parts(one: NumberedList, rest: Prefix, inner: Mapping[int, NumberedList]) -> Toss:
    parts = sum(len(part.tails) for part in inner.values())
    return Toss(
        f"{one.name} ({_layers(len(one.tails))})",
        f"the {'.'.join(rest)} in each of them ({_layers(parts)})",
        _names(one),
        _series(one),
        _counting(one, rest),
    )


def _of_a_row_and_a_rank(one: NumberedList, rest: Prefix, inner: Mapping[int, NumberedList], counted: int) -> Toss:
    each = sorted({len(part.tails) for part in inner.values()})
    many = f"{each[0]}" if len(each) == 1 else f"{each[0]} to {each[-1]}"
    stack = rf"{re.escape(one.text)}{_joint(one)}\d+"
    begin = rf"^(?P<stack>{stack})[./]{_escaped(rest)}[./](?P<index>\d+)[./]"
    return Toss(
        f"{one.name} in a row ({_layers(counted)})",
        f"each {one.name} for itself ({len(one.tails)} stacks of {many} layers)",
        _names(one),
        _series(one),
        f"--layers {shlex.quote(begin)}",
    )


def _of_two_kinds_of_blocks(one: NumberedList, kinds: Mapping[str, int], counted: int) -> Toss:
    taken, other = list(kinds)[:2]
    return Toss(
        f"the {taken or 'numbered parts'} in {one.name} ({_layers(counted)})",
        f"the {other or 'numbered parts'} in it ({_layers(kinds[other])})",
        _names(one),
        _counting(one, (taken,)),
        _counting(one, (other,)),
    )


def _of_two_groups(found: list[NumberedList], passed_over: list[NumberedList]) -> Toss:
    def said(group: list[NumberedList]) -> str:
        return " and ".join(
            f"{one.name or 'the numbers at the front'} ({_layers(len(one.tails))})" for one in group[:4]
        )

    begins = "|".join(re.escape(one.text) for one in passed_over)
    return Toss(
        said(found),
        said(passed_over),
        tuple(name for group in (found, passed_over) for one in group for name in _names(one)),
        f"--not-layers {shlex.quote(f'^(?:{begins})' if len(passed_over) > 1 else f'^{begins}')}",
        " ".join(map(_series, passed_over)),
    )


def _counting(one: NumberedList, within: Prefix) -> str:
    """The expression that counts through the parts of each unit."""
    begin = _escaped(within) + "[./]" if any(within) else ""
    if one.numbered and begin:
        begin = rf"{_escaped(within).rstrip('-')}(?:\d+-)?(?:[./])?"  # the blocks' numbers may be glued, too
    inner = rf"(?:{begin}(?P<index2>\d+)[./])?"
    pattern = rf"^{re.escape(one.text)}{_joint(one)}(?P<index>\d+)[./]{inner}"
    return f"--layers {shlex.quote(pattern)}"


def _layers(number: int) -> str:
    return f"{number} layer" + "s" * (number != 1)


def _joint(one: NumberedList) -> str:
    return "" if one.numbered or not one.text else "[./]"


def _escaped(segments: Prefix) -> str:
    return "[./]".join(map(re.escape, segments))


def _series(one: NumberedList) -> str:
    return f"--series {shlex.quote(one.name)}"


def _names(one: NumberedList) -> tuple[str, ...]:
    return tuple(name for tails in one.tails.values() for _, name in tails)
