"""What of a map could be read otherwise, and is said: lists that stay outside, stacks that hold little of the model,
layers that share weights.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Container, Iterable, Iterator, Mapping
from itertools import repeat
from typing import Any

from lines_cli.errors import DepthError
from lines_cli.scaling.numbered_lists import NumberedList, Prefix, is_index, outermost, word_of
from lines_cli.scaling.readings import Toss

# Tables, heads and stems, which lie outside of every model and may hold most of a small one; and what they consist of.
_NO_DOUBT = re.compile(
    r".*emb(?:ed)?(?:s|d|der|ders|ding|dings)?|.*embed.*|wte|wpe|shared|.*heads?|.*(?:classifier|predictor|norm|token|vocab).*"
    r"|patch.*|.*_proj|proj_out|.*experts?|.*mlps?|stem|.*conv(?:s|_layers)?|downsampl.*",
    re.DOTALL,
)
_REPEATS = re.compile(
    r"[HhLl]_cycles|total_ut_steps|mean_recurrence|num_recurr\w*|n(?:um)?_loops?|loop_(?:count|num)|num_mem_blocks"
)
_SHARED = re.compile(r"(?:.*\.)?shared_(?:transf|layer|block)\w*")
_SMALLEST_SHARE = 0.01
"""Of the parameters, of which a list outside is worth a word."""
_MOST_NAMED = 4


def tossed(
    found: Iterable[Toss], names: list[str], said: Container[str], parameters: Mapping[str, int] | None
) -> Iterator[str]:
    """A note for each two readings of which neither is plainer.

    Args:
        found: the readings.
        names: of every tensor.
        said: those of which the user has said in which order they run.
        parameters: of every tensor; None if they are not known, and each counts as one.

    Raises:
        DepthError: the depth of most of the model hangs on it.
    """
    sizes = parameters or dict.fromkeys(names, 1)
    total = sum(map(sizes.get, names, repeat(0))) or 1
    for toss in found:
        share = sum(map(sizes.get, toss.names, repeat(0))) / total
        if share < _SMALLEST_SHARE or any(name in said for name in toss.names):
            continue
        if parameters and share > 0.5:
            raise DepthError(
                f"the names can be read in two ways, and neither is plainer: {toss.taken}, or {toss.other}. The "
                f"depth of {share:.0%} of the parameters hangs on it",
                hint=f"For the first: {toss.to_take}\nFor the second: {toss.to_change}\n"
                "Anything else: --layers REGEX, --series A,B,C, --not-layers REGEX.",
            )
        yield (
            f"the depth of {share:.0%} of the parameters can be read in two ways: {toss.taken}, which is taken, or "
            f"{toss.other}: {toss.to_change}. To confirm the first: {toss.to_take}"
        )


def left_outside(
    lists: Mapping[Prefix, NumberedList], names: list[str], places: Container[str], parameters: Mapping[str, int] | None
) -> Iterator[str]:
    """A note for the numbered lists of alike units that lie outside the blocks.

    Args:
        lists: every numbered list.
        names: of every tensor.
        places: the names of the tensors in blocks.
        parameters: of every tensor; None if they are not known, and each counts as one.

    Raises:
        DepthError: one of them holds most of the model.
    """
    sizes = parameters or dict.fromkeys(names, 1)
    total = sum(map(sizes.get, names, repeat(0))) or 1
    doubtful = (one for one in lists.values() if _is_doubtful(one, places))
    found = [(_size(one, sizes) / total, one) for one in outermost(doubtful)]
    found = sorted(((share, one) for share, one in found if share >= _SMALLEST_SHARE), key=lambda pair: -pair[0])
    for share, one in found:
        if parameters and share > 0.5:
            beside = [other.name for other in lists.values() if _may_run_on(other, one)]
            also = f"; with what runs before or after it, of {', '.join(beside)}, --series A,B,C" if beside else ""
            raise DepthError(
                f"{one.name}, of {len(one.tails)} units that are alike, holds {share:.0%} of the parameters, and by "
                "its name it is no stack of layers",
                hint=f"If it is one, --series {shlex.quote(one.name)} counts its units{also}. "
                f"If not, --not-layers {shlex.quote('^' + re.escape(one.name))} says so.",
            )
    if found:
        named = ", ".join(f"{one.name} ({len(one.tails)} units, {share:.0%})" for share, one in found[:_MOST_NAMED])
        more = f" and {len(found) - _MOST_NAMED} more" if len(found) > _MOST_NAMED else ""
        said = "--series NAME makes a stack of one"
        if series := _series_with_a_stack([one for _, one in found], lists, places):
            said += f". If they run one after the other: --series {shlex.quote(','.join(series))}"
        yield f"numbered, but outside the blocks: {named}{more} of the parameters; {said}"


_FIRST = re.compile(r"(?:.*_)?(?:prelude|pre|front|first|begin|early|entry|intro|in|input)(?:_.*)?")
_LAST = re.compile(r"(?:.*_)?(?:coda|post|back|last|final|end|late|exit|outro|tail|out|output)(?:_.*)?")


def _series_with_a_stack(
    outside: list[NumberedList], lists: Mapping[Prefix, NumberedList], places: Container[str]
) -> list[str]:
    """The names, in the order that they say, of lists outside that are like a stack beside them, and of that stack."""
    for stack in lists.values():
        first = next(iter(stack.tails.values()))
        if not stack.prefix or not stack.is_stack or first[0][1] not in places:
            continue
        children = {tail for tail, _ in first}
        alike = [
            one
            for one in outside
            if one.prefix[:-1] == stack.prefix[:-1]
            and 2 * len(children & {tail for tail, _ in next(iter(one.tails.values()))}) > len(children)
        ]
        before = [one.name for one in alike if _FIRST.fullmatch(word_of(one.prefix[-1]))]
        after = [one.name for one in alike if _LAST.fullmatch(word_of(one.prefix[-1]))]
        if before or after:
            return [*before, stack.name, *after]
    return []


def _may_run_on(one: NumberedList, other: NumberedList) -> bool:
    """Whether a list stands beside another, and its units are more than one module."""
    return one is not other and one.prefix[:-1] == other.prefix[:-1] and not one.bare


def _is_doubtful(one: NumberedList, places: Container[str]) -> bool:
    """Whether a list could be a stack for all that its units show, and lies outside."""
    if len(one.tails) < 2 or next(iter(one.tails.values()))[0][1] in places:
        return False
    words = [word_of(segment) for segment in one.prefix[-2:] if not is_index(segment)]
    if any(_NO_DOUBT.fullmatch(word) for word in words) or not one.is_stack or one.bare:
        return False
    return not any(name in places for tails in one.tails.values() for _, name in tails)


def _size(one: NumberedList, parameters: Mapping[str, int]) -> int:
    return sum(parameters.get(name, 0) for tails in one.tails.values() for _, name in tails)


def little_inside(places: Container[str], parameters: Mapping[str, int]) -> Iterator[str]:
    """A note where the stacks hold less than half of the parameters, tables and heads apart."""
    outside = [(name, size) for name, size in parameters.items() if name not in places]
    inside = sum(parameters.values()) - sum(size for _, size in outside)
    total = inside + sum(size for name, size in outside if not _is_table(name))
    if total and 2 * inside < total:
        yield f"the stacks hold only {inside / total:.0%} of the parameters, embeddings and heads apart"


def _is_table(name: str) -> bool:
    return any(_NO_DOUBT.fullmatch(word_of(segment)) for segment in name.split("."))


def shared_layers(names: list[str], config: Mapping[str, Any]) -> Iterator[str]:
    """A note where layers run more than once, as the config or a name says."""
    repeats = dict(_repeats(config))
    if repeats:
        said = ", ".join(f"{key} is {times}" for key, times in repeats.items())
        yield f"in the config {said}: layers run more than once, and each is scaled by its place in its list"
    shared = next((match[0] for name in names if "shared_" in name and (match := _SHARED.match(name))), None)
    if shared is not None:
        yield f"{shared} serves several layers, and is scaled as part of the one that it is stored in"


def _repeats(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    for key, value in config.items():
        if isinstance(value, Mapping) and key.endswith("config"):
            yield from ((f"{key}.{inner}", times) for inner, times in _repeats(value))
        elif _REPEATS.fullmatch(key) and type(value) is int and value > (key != "num_mem_blocks"):
            yield key, value
