"""What an output that is an adapter tells of itself: its modules and layers, what fewer ranks keep of the update, and
what is left out. Plain values that JSON can hold.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from lines_cli.plan.adapter_plan import AdapterModule, AdapterPlan
from lines_cli.plan.coefficients import known

Norms = Mapping[str, tuple[float, float]]
"""Of modules, by their names: the squared norms of what is kept, and of the whole update."""


def modules_of(plan: AdapterPlan, norms: Norms) -> list[dict[str, Any]]:
    """Every module that is changed."""
    return [
        {
            "module": module.name,
            "stack": module.place.stack if module.place else None,
            "index": module.place.index if module.place else None,
            "coefficient": known(module.coefficient),
            "rank": module.rank,
            "kept": share(norms.get(module.name)),
        }
        for module in plan.modules
    ]


def layers_of(plan: AdapterPlan, norms: Norms) -> list[dict[str, Any]]:
    """The same of every layer, and of what lies outside (its stack and index are null)."""
    held: dict[tuple[str | None, int], list[AdapterModule]] = defaultdict(list)
    for module in plan.modules:
        held[(module.place.stack, module.place.index) if module.place else (None, -1)].append(module)
    coefficients = dict(plan.coefficients())
    return [
        {
            "stack": stack,
            "index": index if stack is not None else None,
            "coefficient": known(coefficients[stack][index]) if stack is not None else None,
            "modules": len(modules),
            "rank": [min(module.rank for module in modules), max(module.rank for module in modules)],
            "kept": share(_added(norms[module.name] for module in modules if module.name in norms)),
        }
        for (stack, index), modules in sorted(held.items(), key=lambda item: (item[0][0] is None, item[0]))
    ]


def left_out(plan: AdapterPlan, norms: Norms) -> list[dict[str, Any]]:
    """What of a fine-tune is not taken apart, and why: how many tensors, their share of the squared update, and how
    many of them are stored whole. Tensors that the base lacks have no share.
    """
    total = _added(norms.values())[1] + sum(plan.found[rest.name].norm or 0.0 for rest in plan.rest if plan.found)
    saved = {tensor.name for tensor in plan.tensors}
    by_reason: dict[str, dict[str, Any]] = {}
    for rest in plan.rest:
        norm = plan.found[rest.name].norm if plan.found else None
        one = by_reason.setdefault(rest.why, {"why": rest.why, "tensors": 0, "changed": 0, "saved": 0, "share": 0.0})
        one["tensors"] += 1
        one["changed"] += norm != 0
        one["saved"] += rest.saved_as in saved
        one["share"] += (norm or 0.0) / total if total else 0.0
    return list(by_reason.values())


def kept_of(norms: Norms) -> float | None:
    """The share of the squared update of all modules that is kept; None where none was reduced."""
    return share(_added(norms.values())) if norms else None


def _added(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    kept, total = 0.0, 0.0
    for one, other in pairs:
        kept, total = kept + one, total + other
    return kept, total


def share(pair: tuple[float, float] | None) -> float | None:
    """The part of the whole; None of nothing."""
    return pair[0] / pair[1] if pair is not None and pair[1] > 0 else None
