"""What installed packages add by entry points: merge methods, and depth rules.

A package is asked only for a name that is none of ours, so that none can break, or take the place of, what is here.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


@cache
def added(group: str, ours: frozenset[str]) -> dict[str, EntryPoint]:
    """The entry points of a group, by name; the first package's where two have one name, and none that is ours."""
    from importlib.metadata import entry_points

    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=group), key=lambda point: (point.name, point.value)):
        if point.name not in ours:
            found.setdefault(point.name, point)
    return found


def package_of(point: EntryPoint) -> str:
    """The package of an entry point, with its version."""
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


def load(point: EntryPoint, what: str, kind: type[T], public: str) -> T:
    """What an entry point stands for.

    Args:
        point: of `added`.
        what: what it adds, in words.
        kind: the class of which it has to be an object.
        public: that class as a package imports it.

    Raises:
        ValueError: its module fails to import, or it is something else; the message says which.
    """
    of = f"{point.name!r} is a {what} of the package {package_of(point)}"
    try:
        found = point.load()
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise ValueError(f"{of}, which fails to import: {type(error).__name__}: {error}") from error
    if not isinstance(found, kind):
        raise ValueError(f"{of}, but {point.value} is {type(found).__name__}, not {public}")
    return found
