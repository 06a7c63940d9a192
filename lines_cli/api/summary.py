"""What a run tells of itself, as plain values that JSON can hold (docs/json.md describes them): what `--json` prints,
and what `lines.edit` and `lines.merge` return.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

from lines_cli.version import ABOUT

if TYPE_CHECKING:
    from lines_cli.engine.adapter_write import AdapterOutcome
    from lines_cli.engine.write import Outcome
    from lines_cli.plan.adapter_plan import AnyPlan
    from lines_cli.plan.plan import Plan
    from lines_cli.plan.realised import Row
    from lines_cli.plan.resources import Resources

Summary = dict[str, Any]


def of_plan(plan: AnyPlan, resources: Resources) -> Summary:
    """What would be done."""
    from lines_cli.plan.adapter_plan import AdapterPlan
    from lines_cli.plan.adapter_report import modules_of

    if isinstance(plan, AdapterPlan):
        told = {**ABOUT, "dry_run": True, **plan.summary(), "peak_memory": plan.peak_memory(resources)}
        return {**told, "modules": modules_of(plan, {}), "pushed": None}
    return {
        **ABOUT,
        "dry_run": True,
        **plan.summary(),
        "peak_memory": plan.peak_memory(resources),
        "map": plan.map(),
        "pushed": None,
    }


def of_finished(plan: AnyPlan) -> Summary:
    """What an earlier run has done."""
    return {**ABOUT, "dry_run": False, **plan.summary(), "done_before": True, "pushed": None}


def of_any_outcome(outcome: Outcome | AdapterOutcome) -> Summary:
    """What was done, whatever was made."""
    from lines_cli.plan.adapter_plan import AdapterPlan

    plan = outcome.plan
    return of_adapter(outcome) if isinstance(plan, AdapterPlan) else of_outcome(outcome)  # type: ignore[arg-type]


def of_adapter(outcome: AdapterOutcome) -> Summary:
    """What was done to make an adapter."""
    from lines_cli.plan.adapter_report import kept_of, layers_of, left_out, modules_of

    plan, norms = outcome.plan, outcome.norms
    found = {
        "kept": kept_of(norms),
        "layers": layers_of(plan, norms),
        "modules": modules_of(plan, norms),
        "left_out": left_out(plan, norms),
        "nonfinite": dict(outcome.nonfinite),
        "resumed": outcome.resumed,
        "seconds": round(outcome.seconds, 3),
    }
    return {**ABOUT, "dry_run": False, **plan.summary(), "done_before": False, **found, "pushed": None}


def of_outcome(outcome: Outcome) -> Summary:
    """What was done."""
    summary = outcome.plan.summary()
    for number, model in enumerate(summary["models"]):
        norm = outcome.norms[number] if outcome.norms else None
        model["norm"] = norm if norm is not None and isfinite(norm) else None
        model["kept"] = outcome.kept[number] if outcome.kept else model["kept"]
    found = {
        **of_realised(outcome.plan, outcome.realised),
        "nonfinite": outcome.nonfinite,
        "differing": outcome.differing,
        "unchanged": [outcome.plan.recipe.merged[model].model for model in outcome.unchanged],
        "negative_variances": outcome.negative,
        "resumed": outcome.resumed,
        "seconds": round(outcome.seconds, 3),
    }
    return {**ABOUT, "dry_run": False, **summary, "done_before": False, **found, "pushed": None}


def of_realised(plan: Plan, rows: Sequence[Row]) -> Summary:
    """What rounding left of the coefficients: of each layer, and of what else shares one."""
    from lines_cli.plan.realised import layers_of, total

    return {
        "layers": layers_of(rows),
        "realised": {
            "stacks": [
                {"name": stack.name, **total([row for row in rows if row.group.stack == stack.name])}
                for stack in plan.depth.stacks
            ],
            "outside": total([row for row in rows if row.group.outside is not None and row.group.component is None]),
            "components": [
                {"name": name, **total([row for row in rows if row.group.component == name])}
                for name in plan.rules.components
            ],
            "filters": [
                {"pattern": pattern, **total([row for row in rows if row.group.filter == pattern])}
                for pattern, _ in plan.filters()
            ],
        },
    }
