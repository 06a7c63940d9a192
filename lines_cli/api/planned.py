"""The plan of a recipe's result, and how torch is imported once there is one: of whole runs and of runs in parts."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lines_cli.plan.adapter_plan import AnyPlan
    from lines_cli.recipe.schema import Recipe


def planned(recipe: Recipe, destination: Path, *, quiet: bool, weights: bool = False) -> AnyPlan:
    """The plan of a recipe's result; without `weights` those that are on the Hub stay there, and only their headers are
    fetched.
    """
    from dataclasses import replace

    from lines_cli.plan.any_plan import planning
    from lines_cli.plan.claim import notes_of_inputs

    plan = planning(recipe, quiet=quiet, weights=weights)(destination)
    return replace(plan, notes=(*plan.notes, *notes_of_inputs(plan))) if recipe.inputs else plan


@contextmanager
def tolerant_torch_import() -> Iterator[None]:
    """Import torch: keep its warning of a missing numpy from the user, since nothing here needs it; and say what it
    means where its libraries do not fit into the memory that the process may have.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Failed to initialize NumPy")
        try:
            yield
        except Exception as error:
            reasons = [line for line in str(error).splitlines() if "map segment" in line or "allocate memory" in line]
            if not reasons and not _memory_is_limited():
                raise
            raise MemoryError(f"torch cannot be loaded: {(reasons or [type(error).__name__])[0].strip()}") from error


def _memory_is_limited() -> bool:
    """Whether the process may have so much address space only: what fails then in a library may be of any kind."""
    try:
        import resource
    except ImportError:
        return False
    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
