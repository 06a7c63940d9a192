"""Whether a run computes with kernels that numba compiles (the extra `fast`). They change no byte, only how long it
takes; so a run that is short takes none, and one for which they cannot be had goes on without them.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from lines_cli.engine.devices import Devices, first_line
from lines_cli.errors import RecipeError
from lines_cli.methods import fused
from lines_cli.plan.plan import Plan
from lines_cli.plan.resources import WORTH_COMPILING, WORTH_LOADING

VARIABLE = "LINES_FAST"
"""A variable of the environment: 0 takes no kernels, 1 takes them for the smallest run, too."""


def prepare(plan: Plan, devices: Devices, *, share: float = 1) -> str | None:
    """Load the kernels, if what is merged is worth it; what a person should know where that fails.

    Args:
        plan: what is about to be measured or written.
        devices: what computes.
        share: how much of it is this process's.

    Raises:
        RecipeError: the variable says something else.
    """
    said = os.environ.get(VARIABLE) or None
    if said not in (None, "0", "1"):
        raise RecipeError(f"{VARIABLE} says {said}; expected 0 (no compiled kernels) or 1 (for the smallest run, too)")
    if said == "0":
        fused.use(None)
        return None
    work = share * plan.fused_entries
    if fused.in_use() or devices.has_own_memory or not work:
        return None
    if (said is None and work < WORTH_LOADING) or find_spec("numba") is None:
        return None
    try:
        from lines_cli.methods import kernels

        if said is not None or work >= WORTH_COMPILING or kernels.are_cached():
            kernels.compile_all()
            fused.use(kernels)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - there is another way to the same bytes
        why = first_line(error) or repr(error)
        return f"no compiled kernels, so it took longer: numba says: {why} (docs/merging.md says where it keeps them)"
    return None
