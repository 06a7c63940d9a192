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

from lines_cli import installed
from lines_cli.methods.method import Method

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

GROUP = "lines.merge_methods"
"""Entry points of installed packages: the method's name -> an object of the class `Method`."""


def _families() -> dict[str, Method]:
    found: dict[str, Method] = {}
    package = __name__.rpartition(".")[0]
    for file in sorted(pkgutil.iter_modules([str(Path(__file__).parent)])):
        if file.name not in {"registry", "kernels"}:  # which loads numba
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
    points = _installed()
    if name not in points:
        names = [*METHODS, *points]
        near = get_close_matches(name.lower(), names, n=1, cutoff=0.6)
        mean = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"no method is called {name!r}; {mean}there are {', '.join(names)}")
    return installed.load(points[name], "method", Method, "lines_cli.methods.Method")


def package_of(name: str) -> str | None:
    """The installed package that adds a method, with its version; None where the method is one of ours."""
    point = _installed().get(name)
    return installed.package_of(point) if point is not None else None


def _installed() -> dict[str, EntryPoint]:
    return installed.added(GROUP, frozenset(METHODS))
