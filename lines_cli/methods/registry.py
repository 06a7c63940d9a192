"""Every merge method by its name: those in the files of this package, and those of installed packages.

A file here that has `METHODS` (name -> `Method`) is a family of methods. An installed package adds one by an entry
point of the group `lines.merge_methods`, whose name is the method's; such packages are asked only for a name that no
file here knows, so that none of them can break, or take the place of, a method that is here.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.methods.method import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "lines.merge_methods"
"""Entry points of installed packages: the method's name -> an object of the class `Method`."""


def _families() -> dict[str, Method]:
    found: dict[str, Method] = {}
    package = __name__.rpartition(".")[0]
    for file in sorted(pkgutil.iter_modules([str(Path(__file__).parent)])):
        if file.name != "registry":
            found |= getattr(import_module(f"{package}.{file.name}"), "METHODS", {})
    return dict(sorted(found.items()))


METHODS: Mapping[str, Method] = _families()
"""Those in the files of this package."""


@cache
def find_method(name: str) -> Method:
    """A method by its name.

    Raises:
        ValueError: there is none of that name, or the package that has it cannot be imported; the message says which.
    """
    if name in METHODS:
        return METHODS[name]
    installed = _installed()
    if name not in installed:
        names = [*METHODS, *installed]
        near = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        mean = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no method is called {name!r}; {mean}there are {', '.join(names)}")
    point, package = installed[name], package_of(name)
    try:
        found = point.load()
    except Exception as error:  # whatever a stranger's module does when it is imported
        raise ValueError(
            f"{name!r} is a method of the package {package}, which fails to import: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(found, Method):
        raise ValueError(
            f"{name!r} is a method of the package {package}, but {point.value} is {type(found).__name__}, not "
            "lines_cli.methods.Method"
        )
    return found


def package_of(name: str) -> str | None:
    """The installed package that adds a method, with its version; None where the method is one of ours."""
    point = None if name in METHODS else _installed().get(name)
    if point is None:
        return None
    return f"{point.dist.name} {point.dist.version}" if point.dist else point.value


@cache
def _installed() -> dict[str, EntryPoint]:
    """The entry points of installed packages, by name; the first package's where two have one name."""
    from importlib.metadata import entry_points

    found: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        if point.name not in METHODS:
            found.setdefault(point.name, point)
    return found
