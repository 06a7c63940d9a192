"""Depth as a user gives it: the expressions of `--layers` and `--not-layers`, and the lists of `--series`.

Recipes and adapters come from strangers, too, so an expression is searched for under a time limit.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from lines_cli.errors import DepthError, RecipeError, printable, some
from lines_cli.scaling.numbered_lists import NumberedList, Prefix, dotted, is_index
from lines_cli.scaling.running_order import Lane, units_of

if TYPE_CHECKING:
    import regex

LAYERS_HINT = (
    "Say where the layer's number stands: --layers REGEX, with a group `index` (and `index2` for blocks in stages) "
    r"and, for more than one stack, `stack`, as in --layers '^(?P<stack>\w+)\.cell(?P<index>\d+)\.'"
)
SERIES_HINT = (
    "Each name is that of a stack, of a numbered list, or of a module that is one layer; "
    "reversed(NAME) runs against its numbers: --series 'encoder.down,encoder.mid' --series 'reversed(decoder.up)'"
)
SECONDS_TO_MATCH = 3.0
"""How long a user's expression may be searched for, in all names together."""
_SOON = 1e-3
_LONGEST_PATTERN = 1000

Key = tuple[int, int]
"""A layer's number, and that of the block in it; -1 where a name has none."""


def place_by_pattern(names: Sequence[str], pattern: str) -> list[Lane]:
    """The stacks that `--layers` gives, their layers in the order of their numbers.

    Raises:
        RecipeError: not a usable expression, or one that takes too long.
        DepthError: it matches no name.
    """
    groups = _compiled(pattern, "--layers").groupindex
    if "index" not in groups:
        raise RecipeError(f"--layers {pattern!r} has no group `index`", hint=LAYERS_HINT)
    found: dict[str, dict[Key, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name, match in found_in(names, pattern, "--layers"):
        if match["index"] is not None:
            stack = match["stack"] if "stack" in groups else "layers"
            found[stack or "layers"][_key(name, match, pattern)].append(name)
    if not found:
        raise DepthError(
            f"--layers {pattern!r} matches none of {len(names):,} tensor names, such as\n{some(list(names), 4)}",
            hint=LAYERS_HINT,
        )
    return [Lane(stack, [by_key[key] for key in sorted(by_key)], []) for stack, by_key in _grouped(found).items()]


def without(names: Sequence[str], pattern: str) -> list[str]:
    """The names in which `--not-layers` is not found; what it is found in lies outside the blocks.

    Raises:
        RecipeError: not a usable expression, or one that takes too long, or that is found nowhere.
    """
    found = {name for name, _ in found_in(names, pattern, "--not-layers")}
    if not found:
        raise RecipeError(
            f"--not-layers {pattern!r} matches none of {len(names):,} tensor names, such as\n{some(list(names), 4)}"
        )
    return [name for name in names if name not in found]


def _key(name: str, match: regex.Match[str], pattern: str) -> Key:
    numbers = [match["index"], match["index2"] if "index2" in match.re.groupindex else None]
    for group, number in zip(("index", "index2"), numbers, strict=True):
        if number is not None and not is_index(number):
            raise RecipeError(
                f"--layers {pattern!r}: in {name!r} the group `{group}` is {number!r}, not a whole number"
            )
    return int(numbers[0]), -1 if numbers[1] is None else int(numbers[1])


def _grouped(found: Mapping[str, dict[Key, list[str]]]) -> dict[str, dict[Key, list[str]]]:
    """What has a first number only opens the first block of that number, if there is one."""
    grouped: dict[str, dict[Key, list[str]]] = {}
    for stack, by_key in found.items():
        first: dict[int, Key] = {}
        for key in sorted(by_key):
            if key[0] not in first or first[key[0]][1] < 0:
                first[key[0]] = key
        grouped[stack] = defaultdict(list)
        for key, tensors in by_key.items():
            grouped[stack][first[key[0]] if key[1] < 0 else key] += tensors
    return grouped


def _compiled(pattern: str, option: str) -> regex.Pattern[str]:
    import regex  # `re`, with a limit to the time that a search may take

    if len(pattern) > _LONGEST_PATTERN:
        raise RecipeError(
            f"{option}: an expression of {len(pattern):,} characters; at most {_LONGEST_PATTERN:,} are used"
        )
    try:
        compiled: regex.Pattern[str] = regex.compile(pattern, regex.VERSION0)
    except Exception as error:  # its own for most, but also those of Python for odd ones
        raise RecipeError(f"{option} {pattern!r} is not a regular expression: {error}") from error
    return compiled


def found_in(
    names: Sequence[str], pattern: str, option: str, *, of: str = "tensor", ends: float | None = None
) -> Iterable[tuple[str, regex.Match[str]]]:
    """Every name in which an expression is found, with its match.

    Args:
        names: of tensors, or of what `of` says.
        pattern: the expression.
        option: what says it, for messages.
        of: what has these names.
        ends: when the search has to be over, by `time.monotonic`; `SECONDS_TO_MATCH` from now, unless given.

    Raises:
        RecipeError: not a usable expression, or one that takes too long.
    """
    expression = _compiled(pattern, option)
    ends = time.monotonic() + SECONDS_TO_MATCH if ends is None else ends
    for name in names:
        try:
            match = expression.search(name, timeout=max(ends - time.monotonic(), _SOON))
        except TimeoutError as error:
            raise RecipeError(
                f"{option} {pattern!r} takes more than {SECONDS_TO_MATCH:g} s over {len(names):,} {of} names; "
                f"the last was {printable(name[:100])}",
                hint="Start it with ^, and avoid repeats within repeats, such as (a+)+.",
            ) from error
        if match is not None:
            yield name, match


# --- which stack ---


def select_stack(stacks: Sequence[str], part: str) -> str:
    """The name of the one stack that `part` names: its whole prefix, or any run of segments of it (of each of its
    prefixes, where several are joined).

    Raises:
        RecipeError: no stack, or several.
    """
    if part in stacks:
        return part
    matching = [
        name for name in stacks if all(f".{dotted(part)}." in f".{dotted(joined)}." for joined in name.split("+"))
    ]
    if len(matching) == 1:
        return matching[0]
    what = "names several stacks" if matching else "names no stack"
    raise RecipeError(f"stack {part!r} {what}; there are:\n{some(matching or list(stacks))}")


# --- series ---

_REVERSED = re.compile(r"reversed\((?P<name>.*)\)")


def member_of(text: str) -> tuple[str, bool]:
    """The name that stands in a series, and whether it runs against its numbers: `reversed(decoder.up)`.

    Raises:
        ValueError: it is no name.
    """
    match = _REVERSED.fullmatch(text.strip())
    name = match["name"].strip() if match else text.strip()
    if not name or any(sign in name for sign in "(),"):
        raise ValueError(f"{text!r} is no name; a series is written A,B,C, each a name or reversed(NAME)")
    return name, match is not None


def join_series(
    lanes: list[Lane],
    series: Sequence[Sequence[str]],
    lists: Mapping[Prefix, NumberedList],
    names: Sequence[str],
) -> tuple[list[Lane], set[str]]:
    """The stacks, those of each series joined in its order into one that runs from the first to the last; and the
    tensors of the series.

    Args:
        lanes: the stacks as they were found.
        series: each the names of stacks, lists or modules.
        lists: every numbered list in the names.
        names: every tensor name.

    Raises:
        RecipeError: a name that is nothing in this model, or that two series hold.
    """
    earlier: set[str] = set()
    for one in series:
        try:
            members = [member_of(text) for text in one]
        except ValueError as error:
            raise RecipeError(f"--series: {error}", hint=SERIES_HINT) from error
        chain = [_member(name, backwards, lanes, lists, names) for name, backwards in members]
        taken = [tensor for lane in chain for unit in lane.units for tensor in unit]
        if len(set(taken)) < len(taken) or not earlier.isdisjoint(taken):
            raise RecipeError(
                f"--series {','.join(one)} names what it, or another series, holds already: "
                f"{min(earlier & set(taken) or taken)}"
            )
        earlier.update(taken)
        lanes = [rest for lane in lanes if (rest := _less(lane, set(taken))).units]
        joined = [unit for lane in chain for unit in lane.units]
        lanes.append(Lane("+".join(lane.name for lane in chain), joined, [p for lane in chain for p in lane.lists]))
    return sorted(lanes, key=lambda lane: lane.name), earlier


def _less(lane: Lane, taken: set[str]) -> Lane:
    """A stack without the tensors that a series takes; layers that are left empty go."""
    units = [[tensor for tensor in unit if tensor not in taken] for unit in lane.units]
    rest = [part for part in lane.name.split("+") if any(_begins(part, tensor) for unit in units for tensor in unit)]
    return Lane("+".join(rest) or lane.name, [unit for unit in units if unit], lane.lists, lane.path)


def _begins(part: str, name: str) -> bool:
    """Whether a tensor lies in the list or the module of that name."""
    return re.match(rf"{re.escape(part)}[._/-]?(?:\d|[./])", name) is not None


def _member(
    name: str, backwards: bool, lanes: list[Lane], lists: Mapping[Prefix, NumberedList], names: Sequence[str]
) -> Lane:
    """What a name in a series means: a numbered list, a module that is one layer, or a stack."""
    exact = next((one for one in lists.values() if one.name == name), None)
    if exact is None:
        module = [tensor for tensor in names if tensor.startswith((f"{name}.", f"{name}/"))]
        by_name = {lane.name: lane for lane in lanes}
        if name not in by_name and module and not any(_holds(module, lane) for lane in lanes):
            return Lane(name, [module], [])
        try:
            lane = by_name[select_stack(list(by_name), name)]
        except RecipeError as error:
            raise RecipeError(f"--series: {error.message}", hint=SERIES_HINT) from error
        if len(lane.lists) != 1 or lane.name != lane.lists[0].name:
            return Lane(lane.name, lane.units[::-1] if backwards else lane.units, lane.lists)
        exact = lane.lists[0]
    return Lane(exact.name, units_of(exact, lists, backwards=backwards), [exact])


def _holds(module: list[str], lane: Lane) -> bool:
    """Whether all of a stack lies in a module, so that the module's name means the stack."""
    return {tensor for unit in lane.units for tensor in unit} <= set(module)
