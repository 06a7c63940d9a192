"""lines: edit model checkpoints so that a model keeps what it learnt and stops forgetting what it knew (LiNeS).

    import lines_cli as lines

    lines.edit("base", "ft", "out", alpha=0.1)
    lines.merge("merge.yaml", "merged")
    tensors = lines.edit_state_dict(base, ft, alpha=0.1)

Every refusal is a `LinesError`. Importing this module loads nothing else; the first use of a name does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lines_cli.version import __version__ as __version__

if TYPE_CHECKING:
    from lines_cli.api.calls import coefficients as coefficients
    from lines_cli.api.calls import edit as edit
    from lines_cli.api.calls import edit_adapter as edit_adapter
    from lines_cli.api.calls import extract as extract
    from lines_cli.api.calls import inspect as inspect
    from lines_cli.api.calls import merge as merge
    from lines_cli.api.in_memory import edit_state_dict as edit_state_dict
    from lines_cli.api.in_memory import merge_state_dicts as merge_state_dicts
    from lines_cli.api.push import push as push
    from lines_cli.engine.run import run as run
    from lines_cli.engine.verify import Verification as Verification
    from lines_cli.engine.verify import verify as verify
    from lines_cli.engine.write import Outcome as Outcome
    from lines_cli.errors import LinesError as LinesError
    from lines_cli.inspection.compare import compare as compare
    from lines_cli.inspection.open import Inspection as Inspection
    from lines_cli.inspection.open import open_inspection as open_inspection
    from lines_cli.inspection.open import open_merge as open_merge
    from lines_cli.inspection.report import make_report as make_report
    from lines_cli.inspection.report import problems as problems
    from lines_cli.inspection.statistics import Findings as Findings
    from lines_cli.plan.build import make_plan as make_plan
    from lines_cli.plan.inputs import open_inputs as open_inputs
    from lines_cli.plan.plan import Plan as Plan
    from lines_cli.plan.resources import Resources as Resources
    from lines_cli.recipe.schema import Recipe as Recipe
    from lines_cli.recipe.validate import edit_recipe as edit_recipe
    from lines_cli.recipe.yaml_file import load_recipe as load_recipe
    from lines_cli.scaling.find_depth import DepthMap as DepthMap
    from lines_cli.scaling.find_depth import find_depth as find_depth
    from lines_cli.sweeping.call import sweep as sweep
    from lines_cli.sweeping.candidates import candidates as candidates


_HOMES = {
    "api.calls": ("coefficients", "edit", "edit_adapter", "extract", "inspect", "merge"),
    "api.push": ("push",),
    "inspection.compare": ("compare",),
    "scaling.find_depth": ("DepthMap", "find_depth"),
    "engine.run": ("run",),
    "engine.write": ("Outcome",),
    "errors": ("LinesError",),
    "inspection.statistics": ("Findings",),
    "api.in_memory": ("edit_state_dict", "merge_state_dicts"),
    "inspection.open": ("Inspection", "open_inspection", "open_merge"),
    "plan.plan": ("Plan",),
    "plan.build": ("make_plan",),
    "plan.inputs": ("open_inputs",),
    "recipe.schema": ("Recipe",),
    "recipe.validate": ("edit_recipe",),
    "recipe.yaml_file": ("load_recipe",),
    "inspection.report": ("make_report", "problems"),
    "plan.resources": ("Resources",),
    "engine.verify": ("Verification", "verify"),
    "sweeping.call": ("sweep",),
    "sweeping.candidates": ("candidates",),
}
__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lines_cli.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
