"""Products of parameters of which the default suite runs as many combinations as cover them; the others are `slow`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations, cycle, islice, product
from typing import Any

import pytest

Combination = tuple[int, ...]


def crossed(**columns: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test over the product of the columns. By default any two values of two columns meet once at least;
    what is marked `slow` itself is left out of that.
    """
    return _parametrized(columns, pairwise)


def by_turns(**columns: Iterable[Any]) -> pytest.MarkDecorator:
    """The same for columns that do not depend on each other: by default every value of each is taken once at least."""
    return _parametrized(columns, in_turn)


def pairwise(sizes: Sequence[int]) -> set[Combination]:
    """So many combinations, of columns of these sizes, that every pair of values is in one: the one that adds the most
    pairs, over and over.
    """
    every = list(product(*map(range, sizes)))
    pairs = {one: set(combinations(enumerate(one), min(2, len(sizes)))) for one in every}
    lacking = set().union(*pairs.values())
    chosen: set[Combination] = set()
    while lacking:
        best = max(every, key=lambda one: len(pairs[one] & lacking))
        chosen.add(best)
        lacking -= pairs[best]
    return chosen


def in_turn(sizes: Sequence[int]) -> set[Combination]:
    """As many combinations as the longest column has values; the others begin again where they end."""
    return set(zip(*(islice(cycle(range(size)), max(sizes)) for size in sizes), strict=True))


def _parametrized(columns: dict[str, Iterable[Any]], cover: Any) -> pytest.MarkDecorator:
    lists = [[_as_param(value, f"{name}{at}") for at, value in enumerate(of)] for name, of in columns.items()]
    quick = [[at for at, one in enumerate(values) if not _is_slow(one)] for values in lists]
    chosen = {tuple(of[at] for of, at in zip(quick, one, strict=True)) for one in cover([len(of) for of in quick])}
    cases = []
    for one in product(*(range(len(values)) for values in lists)):
        params = [values[at] for values, at in zip(lists, one, strict=True)]
        marks = {mark.name: mark for param in params for mark in param.marks}
        if one not in chosen:
            marks["slow"] = pytest.mark.slow
        values = [value for param in params for value in param.values]
        cases.append(pytest.param(*values, marks=list(marks.values()), id="-".join(str(param.id) for param in params)))
    return pytest.mark.parametrize(list(columns), cases)


def _as_param(value: Any, name: str) -> Any:
    """With an id, as pytest would give it."""
    marked = value if hasattr(value, "marks") and hasattr(value, "values") else pytest.param(value)
    if marked.id is not None:
        return marked
    alone = marked.values[0]
    plain = alone is None or isinstance(alone, (str, int, float, bool))
    return pytest.param(*marked.values, marks=marked.marks, id=str(alone) if plain else name)


def _is_slow(param: Any) -> bool:
    return any(mark.name == "slow" for mark in param.marks)
