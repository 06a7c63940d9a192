"""What wrappers of training put into tensor names, and names without it."""

from __future__ import annotations

import re
from collections.abc import Iterable

WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module", "_forward_module")


def without_wrappers(names: Iterable[str]) -> dict[str, str]:
    """Names that a wrapper of training made longer within -> the same without it; the others are left out. A wrapper
    of the whole model, before the first part of a name, stays.
    """
    return {
        name: plain
        for name in names
        if "._" in name and (plain := _WITHIN.sub(".", name)) != name  # the look that most names end with is quick
    }


_WITHIN = re.compile(rf"\.(?:(?:{'|'.join(WRAPPERS)})\.)+")
