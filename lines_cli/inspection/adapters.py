"""What `lines inspect` tells of an adapter without its base: its kind, ranks and scales, what it changes, and how much.
Plain values.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lines_cli.checkpoint.adapter import Adapter, Change
from lines_cli.checkpoint.adapter_names import with_dots
from lines_cli.scaling.find_depth import DepthMap
from lines_cli.storage.names import natural

Norms = Sequence[float | None]
"""How large the update of each change is; None where it is not known."""


def names_of(adapter: Adapter) -> dict[str, int]:
    """The tensors that an adapter changes, by the names that it has for them, and how many entries its factors of each
    have: what its layers are seen by.
    """
    found: dict[str, int] = defaultdict(int)
    for change in adapter.changes:
        found[_name(change)] += sum(stored.info.numel for stored in change.factors.values())
    return dict(found)


def about(adapter: Adapter, depth: DepthMap, norms: Norms | None) -> dict[str, Any]:
    """The report of an adapter (docs/inspecting.md describes it).

    Args:
        adapter: which.
        depth: of `names_of`.
        norms: what was measured of it, if it was.
    """
    known = dict(zip(map(id, adapter.changes), norms or (None,) * len(adapter.changes), strict=True))
    products = [change for change in adapter.changes if change.kind not in ("whole", "rows")]

    def said(changes: Sequence[Change]) -> dict[str, Any]:
        return {
            "tensors": len(changes),
            "rank": _span([change.rank for change in changes]),
            "scale": _span([change.scale for change in changes if change.kind not in ("whole", "rows")]),
            "norm": _together([known[id(change)] for change in changes if change.kind not in ("whole", "rows")]),
        }

    by_target: dict[tuple[str, str], list[Change]] = defaultdict(list)
    by_place: dict[Any, list[Change]] = defaultdict(list)
    for change in adapter.changes:
        by_target[with_dots(change.module).rpartition(".")[2] + _of(change), change.kind].append(change)
        by_place[depth.places.get(_name(change))].append(change)
    return {
        "kind": str(adapter.config.get("peft_type") or "without a config"),
        "base": adapter.base_name,
        **said(adapter.changes),
        "products": len(products),
        "targets": [
            {"name": name, "kind": kind, **said(changes)}
            for (name, kind), changes in sorted(by_target.items(), key=lambda item: natural(item[0][0]))
        ],
        "layers": [
            {"stack": place.stack, "index": place.index, **said(changes)}
            for place, changes in sorted(
                ((place, changes) for place, changes in by_place.items() if place is not None),
                key=lambda item: (item[0].stack, item[0].index),
            )
        ],
        "outside": said(by_place.get(None, [])),
        "components": sorted({change.component.name for change in adapter.changes if change.component.name}),
    }


def _name(change: Change) -> str:
    return f"{with_dots(change.called)}.{change.parameter}"


def _of(change: Change) -> str:
    """What is behind a module's name in that of a target."""
    return "" if change.parameter == "weight" else f".{change.parameter}"


def _span(values: Sequence[float | None]) -> list[float] | None:
    """The least and the greatest."""
    known = [value for value in values if value is not None]
    return [min(known), max(known)] if known else None


def _together(norms: Sequence[float | None]) -> float | None:
    """The norm of all together; None where one is not known, or there is none."""
    if not norms or any(norm is None for norm in norms):
        return None
    total = math.sqrt(sum(norm * norm for norm in norms if norm is not None))
    return total if math.isfinite(total) else None


def is_about(report: Mapping[str, Any]) -> bool:
    """Whether a report is of an adapter."""
    return report.get("adapter") is not None
