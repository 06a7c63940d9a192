"""The checkpoints of one run as one entry of `models:`: a pattern such as `run/checkpoint-*` becomes what it matches,
in natural order, each with its weight in an average over the run.

With N checkpoints and a decay D that falls from D(0) = 1 to D(1) = 0, checkpoint j = 0..N-1 has the weight

    c_j = D(j/N) - D((j+1)/N)

Then `sum(c_j * theta_j)` is what the run would have come to if its update from checkpoint j-1 to j had been scaled by
D(j/N), as a decay of the learning rate would have scaled it (WSM, Tian 2025, arXiv 2507.17634): of a run at a constant
rate the average stands in for the decay. The weights sum to 1.
"""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from typing import Any, NamedTuple

from lines_cli.checkpoint.reader import ADAPTERS, weights_among
from lines_cli.errors import RecipeError, printable, some
from lines_cli.methods import find_method
from lines_cli.recipe.plain_yaml import Place
from lines_cli.recipe.schema import Recipe
from lines_cli.storage.names import MODEL_INDEX, MODULES, file_and_part, natural

KEYS = ("last", "every", "weights")
"""What an entry of `models:` may say of a pattern, beside `model` and `parameters`."""

_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
}
_EXPECTED = "expected uniform, linear (the same), cosine, 1-sqrt, or ema: D with D between 0 and 1"


def weights_of(rule: Any, number: int) -> list[float]:
    """The weights of so many checkpoints, the first one first; they sum to 1.

    Args:
        rule: `uniform`; or the decay that the average stands in for: `linear`, which comes to the same, `cosine`,
            `1-sqrt`; or `{ema: D}`, the exponential moving average `e_j = D * e_(j-1) + (1 - D) * theta_j` from
            `e_0 = theta_0` on. `ema:D` means that, too.
        number: of checkpoints, at least one.

    Raises:
        ValueError: the rule is none of these.
    """
    if rule in ("uniform", "linear"):
        return [1 / number] * number
    if isinstance(rule, str) and rule in _DECAYS:
        decay = _DECAYS[rule]
        ends = [decay(at / number) for at in range(number)] + [0.0]
        return [before - after for before, after in pairwise(ends)]
    if isinstance(rule, str) and rule.startswith("ema:"):
        rule = {"ema": rule.removeprefix("ema:")}
    if isinstance(rule, Mapping) and rule.keys() == {"ema"} and not isinstance(rule["ema"], bool):
        try:
            kept = float(rule["ema"])
        except (TypeError, ValueError, OverflowError):
            kept = math.nan
        if 0 < kept < 1:
            return [kept ** (number - 1)] + [(1 - kept) * kept ** (number - 1 - at) for at in range(1, number)]
    raise ValueError(_EXPECTED)


def is_pattern(name: Any, folder: str | os.PathLike[str]) -> bool:
    """Whether a model's name is a pattern: it has one of `*?[`, and nothing is called so.

    Args:
        name: as the recipe has it.
        folder: that relative paths count from.
    """
    if not isinstance(name, str) or not glob.has_magic(name) or "\0" in name:
        return False
    file = file_and_part(os.path.expanduser(name))[0]
    return not any(os.path.lexists(os.path.join(start, file)) for start in (folder, ""))


class Expanded(NamedTuple):
    """What became of the patterns of a recipe.

    Attributes:
        numbers: for each entry of `models:` now the number of the one that said it.
        notes: a line for everything that a person should know of what was found.
    """

    numbers: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


def expand(
    values: dict[Any, Any],
    at: Mapping[Place, str],
    folder: str | os.PathLike[str],
    *,
    where: str,
    literal: Container[str] = (),
) -> Expanded:
    """Put what each pattern under `models:` matches in its place, with weights.

    Args:
        values: of a recipe; changed.
        at: where each key was said.
        folder: that relative paths count from.
        where: what a message calls the recipe.
        literal: names that are no patterns, whatever they look like.

    Raises:
        RecipeError: a pattern matches no checkpoint; or what is said of it is impossible.
    """
    base, models = values.get("base_model"), values.get("models")

    def refuse(place: Place, error: _ImpossibleError) -> RecipeError:
        said = f"{'.'.join(map(str, place))}: {error.text}"
        while place and place not in at:
            place = place[:-1]
        return RecipeError(f"{where}: {at[place] + ': ' if place else ''}{said}", hint=error.hint)

    def matches_many(name: Any) -> bool:
        return is_pattern(name, folder) and name not in literal

    if matches_many(base):
        text, hint = f"{base!r} is a pattern, and there is one base", "Name one checkpoint, such as the run's first."
        raise refuse(("base_model",), _ImpossibleError("", text, hint))
    for place, name in _in_slices(values.get("slices")):
        if matches_many(name):
            raise refuse(place, _ImpossibleError("", f"{name!r} is a pattern, and a source is one model", _ONE_BY_ONE))
    models = models if isinstance(models, list) else []
    patterns = [isinstance(source, dict) and matches_many(source.get("model")) for source in models]
    if not any(patterns):
        return Expanded()
    notes: list[str] = []
    found: list[Any] = []
    numbers: list[int] = []
    for number, (source, matches) in enumerate(zip(models, patterns, strict=True)):
        try:
            entries = _entries(source, values, folder, notes) if matches else [source]
        except _ImpossibleError as error:
            raise refuse(("models", number, error.key), error) from None
        found += entries
        numbers += [number] * len(entries)
    values["models"] = found
    return Expanded(tuple(numbers), tuple(notes))


_ONE_BY_ONE = "Name one checkpoint for each source; patterns stand under models."


def _in_slices(slices: Any) -> Iterator[tuple[Place, Any]]:
    """The names of models in `slices`, if that is what it should be."""
    for number, one in enumerate(slices if isinstance(slices, list) else ()):
        sources = one.get("sources") if isinstance(one, dict) else None
        for at, source in enumerate(sources if isinstance(sources, list) else ()):
            if isinstance(source, dict):
                yield ("slices", number, "sources", at, "model"), source.get("model")


class _ImpossibleError(Exception):
    """What is said of a pattern cannot be: the key, why, and the way out."""

    def __init__(self, key: str, text: str, hint: str | None = None) -> None:
        self.key, self.text, self.hint = key, text, hint


def _entries(
    source: Mapping[str, Any], values: Mapping[Any, Any], folder: str | os.PathLike[str], notes: list[str]
) -> list[dict[str, Any]]:
    """The entries that stand for a pattern."""
    pattern = str(source["model"])
    matches = _matches(pattern, folder)
    if not matches:
        raise _nothing(pattern, folder)
    names = _checkpoints(pattern, matches, notes)
    every, last = _count(source, "every"), _count(source, "last")
    key = next((key for key in ("last", "every") if source.get(key) is not None), "")
    key = key or ("weights" if source.get("weights") not in (None, "uniform", "linear") else "")
    if key:
        _refuse_unordered(names, key)
    chosen = names[::-1][:: every or 1][::-1]
    if last is not None:
        if last > len(chosen):
            notes.append(f"{pattern}: last: {last:,}, and there are {len(chosen):,}: all of them")
        chosen = chosen[-last:]
    if len(chosen) == 1:
        notes.append(f"{pattern}: it comes to one checkpoint, {chosen[0]}")
    weights = _weights(source, values, len(chosen))
    if len(chosen) > 1:
        share = f"{len(chosen):,} of {len(names):,}" if len(chosen) < len(names) else f"{len(chosen):,}"
        how = "" if weights is None else f", weights {_called(source.get('weights', 'uniform'))}"
        notes.append(f"{pattern}: {share} checkpoints, {chosen[0]} to {chosen[-1]}{how}")
    others = {key: value for key, value in source.items() if key not in KEYS}
    entries = []
    for at, name in enumerate(chosen):
        entry: dict[str, Any] = {**others, "model": name}
        if weights is not None:
            of_it = {key: each[at] for key, each in weights.items()}
            entry["parameters"] = {**(others.get("parameters") or {}), **of_it}
        entries.append(entry)
    return entries


def _refuse_unordered(names: Sequence[str], key: str) -> None:
    """Refuse checkpoints whose names do not say which comes first, where that makes a difference."""
    numbers: dict[tuple[int, ...], str] = {}
    for name in names:
        own = tuple(map(int, _NUMBERS.findall(name)))
        other = numbers.setdefault(own, name)
        if other != name:
            why = f"{other} and {name} have the same number" + ("" if own else ", none")
        elif len(own) != len(next(iter(numbers))):
            why = f"{next(iter(numbers.values()))} and {name} are not numbered alike"
        else:
            continue
        raise _ImpossibleError(
            key,
            f"{why}, so which comes first is not known",
            "Let the pattern match one of them, or list the checkpoints one by one, with their weights.",
        )


_NUMBERS = re.compile(r"[0-9]+")


class _Match(NamedTuple):
    """What a pattern matches: its name as the recipe would have it, and where it is."""

    name: str
    path: str


def _matches(pattern: str, folder: str | os.PathLike[str]) -> list[_Match]:
    """Everything that a pattern matches, in natural order: also behind `BASE+`, and with a `#part` at its end."""
    file, mark, part = pattern.rpartition("#")
    if not mark or not file or not part:
        file, mark, part = pattern, "", ""
    begins = [0, *(at + 1 for at, letter in enumerate(file) if letter == "+" and not glob.has_magic(file[:at]))]
    for begin in begins:
        before, rest = file[:begin], os.path.expanduser(file[begin:])
        found = sorted(glob.glob(rest, root_dir=folder), key=natural)
        if found:
            return [_Match(f"{before}{name}{mark}{part}", os.path.join(folder, name)) for name in found]
    return []


def _nothing(pattern: str, folder: str | os.PathLike[str]) -> _ImpossibleError:
    text = f"nothing matches {pattern!r} in {os.fspath(folder) or '.'}"
    if glob.glob(os.path.expanduser(pattern)):
        return _ImpossibleError(
            "model",
            f"{text}, but in the current folder",
            "Paths in a recipe count from its own folder: correct the pattern, or give it as an absolute one.",
        )
    on_the_hub = " On the Hub there are no patterns: name each repository or revision (org/name@revision)."
    may_be = file_and_part(pattern)[0].partition("@")[0].count("/") == 1 and not pattern.startswith((".", "/", "~"))
    return _ImpossibleError("model", text, "Check the path." + (on_the_hub if may_be else ""))


def _checkpoints(pattern: str, matches: Sequence[_Match], notes: list[str]) -> list[str]:
    """The names of the matches that are checkpoints, each once."""
    left_out, twice, found = list[str](), list[str](), dict[str, str]()
    in_order = sorted(matches, key=lambda match: os.path.islink(match.path))  # what is there before links to it
    kept = set[str]()
    for match in in_order:
        real = os.path.realpath(match.path)
        if why := _unfinished(match.path, pattern) or _no_checkpoint(match.path):
            left_out.append(f"{match.name}: {why}")
        elif real in found:
            twice.append(f"{match.name} is {found[real]}")
        else:
            found[real] = match.name
            kept.add(match.name)
    if not kept:
        raise _ImpossibleError(
            "model",
            f"none of the {len(matches):,} match(es) of {pattern!r} is a checkpoint:\n{some(left_out)}",
            "A checkpoint is a folder with weights or an adapter, or a file with weights.",
        )
    if left_out:
        notes.append(f"{pattern}: {len(left_out):,} match(es) are no checkpoints, and are left out\n{some(left_out)}")
    if twice:
        notes.append(f"{pattern}: {len(twice):,} match(es) are links to others, and count once\n{some(twice)}")
    return [match.name for match in matches if match.name in kept]


def _no_checkpoint(path: str) -> str | None:
    """Why something is no checkpoint, by its name and those of the files in it; None where it is one."""
    if not os.path.isdir(path):
        name = os.path.basename(path)
        if not os.path.exists(path):
            return "a link to nothing"
        return None if weights_among([name]) or name in ADAPTERS else "no file with weights, by its name"
    try:
        names = os.listdir(path)
    except OSError as error:
        raise _ImpossibleError("model", f"{path} cannot be read: {error.strerror or error}") from error
    if weights_among(names) or {*ADAPTERS, MODEL_INDEX, MODULES}.intersection(names):
        return None
    if not names:
        return "an empty folder"
    _refuse_shards(path, names)
    state = next((name for name in sorted(names) if name.startswith(_STATE)), None)
    return "no weights in it" if state is None else f"no weights in it, only a trainer's state ({printable(state)})"


def _unfinished(path: str, pattern: str) -> str | None:
    """That a checkpoint was still being written when its run ended, as trainers call it until then; unless the pattern
    asks for such.
    """
    own, asked = (os.path.basename(os.path.normpath(name)) for name in (path, pattern))
    unfinished = own.startswith(("tmp-", "tmp_", ".")) and not asked.startswith(("tmp", "."))
    return "a checkpoint that was not finished, by its name" if unfinished else None


def _refuse_shards(path: str, names: Sequence[str]) -> None:
    """Refuse a folder that holds weights as a training across processes cuts them, and not whole: left out of an
    average it would be missed.
    """
    if os.path.basename(os.path.normpath(path)).startswith(_OPTIMIZER):
        return
    for name in sorted(name for name in names if not name.startswith(_OPTIMIZER)):
        within = os.path.join(path, name)
        held = [name]
        if os.path.isdir(within):
            with suppress(OSError):
                held = os.listdir(within)
        if any(own.endswith(".distcp") for own in held):
            kind, way = "shards of FSDP", f"accelerate merge-weights {path if held == [name] else within} OUT"
        elif any(own.endswith("_model_states.pt") for own in held):
            kind, way = "shards of DeepSpeed", "python zero_to_fp32.py . OUT, in that folder"
        else:
            continue
        raise _ImpossibleError(
            "model",
            f"{path} holds its weights as {kind} ({printable(name)}), and not whole",
            f"Put them together first: {way}; or let the pattern match only checkpoints that are whole.",
        )


_OPTIMIZER = "optimizer"

_STATE = ("optimizer", "scheduler", "trainer_state", "rng_state", "training_args", "global_step", "scaler")


def _count(source: Mapping[str, Any], key: str) -> int | None:
    """How many are meant by `last` or `every`."""
    value = source.get(key)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise _ImpossibleError(key, f"expected a whole number of 1 or more (got {value!r})")
    return value


def _weights(source: Mapping[str, Any], values: Mapping[Any, Any], number: int) -> dict[str, list[float]] | None:
    """The weight of each checkpoint, by the name that the method gives it; None where the recipe leaves that to the
    method, or says it itself.
    """
    said = source.get("weights")
    name = values.get("merge_method", Recipe.model_fields["merge_method"].default)
    try:
        key = find_method(name).counts_by
    except (TypeError, ValueError):  # it is refused later on
        return None
    if key is None and said is None:
        return None
    if key is None:
        raise _ImpossibleError(
            "weights",
            f"{name} gives all models the same weight",
            "Leave weights out; or take a method whose models have one: lines merge --help lists them.",
        )
    own, top = source.get("parameters") or {}, values.get("parameters") or {}
    whole = next((place[key] for place in (own, top) if isinstance(place, dict) and key in place), None)
    if said is None and whole is not None:
        return None
    try:
        weights = weights_of("uniform" if said is None else said, number)
    except ValueError as error:
        raise _ImpossibleError("weights", f"{error} (got {said!r})") from error
    if whole is None:
        return {key: weights}
    if isinstance(whole, bool) or not isinstance(whole, (int, float)):
        raise _ImpossibleError(
            "weights", f"it shares out one number, and parameters.{key} is {whole!r}", "Leave one of the two out."
        )
    return {key: [whole * weight for weight in weights]}


def _called(rule: Any) -> str:
    """A rule of weights, as a note says it."""
    return f"ema {rule['ema']}" if isinstance(rule, Mapping) else str(rule)
