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

if TYPE_CHECKING:
    from lines_cli.api import coefficients as coefficients
    from lines_cli.api import edit as edit
    from lines_cli.api import inspect as inspect
    from lines_cli.api import merge as merge
    from lines_cli.comparison import compare as compare
    from lines_cli.depth import DepthMap as DepthMap
    from lines_cli.depth import find_depth as find_depth
    from lines_cli.engine import Outcome as Outcome
    from lines_cli.engine import run as run
    from lines_cli.errors import LinesError as LinesError
    from lines_cli.findings import Findings as Findings
    from lines_cli.in_memory import edit_state_dict as edit_state_dict
    from lines_cli.in_memory import merge_state_dicts as merge_state_dicts
    from lines_cli.inspection import Inspection as Inspection
    from lines_cli.inspection import open_inspection as open_inspection
    from lines_cli.inspection import open_merge as open_merge
    from lines_cli.plan import Plan as Plan
    from lines_cli.planning import make_plan as make_plan
    from lines_cli.planning import open_inputs as open_inputs
    from lines_cli.recipe import Recipe as Recipe
    from lines_cli.recipe_check import edit_recipe as edit_recipe
    from lines_cli.recipe_file import load_recipe as load_recipe
    from lines_cli.report import make_report as make_report
    from lines_cli.report import problems as problems
    from lines_cli.resources import Resources as Resources
    from lines_cli.verification import Verification as Verification
    from lines_cli.verification import verify as verify

__version__ = "0.1.0"

_HOMES = {
    "api": ("coefficients", "edit", "inspect", "merge"),
    "comparison": ("compare",),
    "depth": ("DepthMap", "find_depth"),
    "engine": ("Outcome", "run"),
    "errors": ("LinesError",),
    "findings": ("Findings",),
    "in_memory": ("edit_state_dict", "merge_state_dicts"),
    "inspection": ("Inspection", "open_inspection", "open_merge"),
    "plan": ("Plan",),
    "planning": ("make_plan", "open_inputs"),
    "recipe": ("Recipe",),
    "recipe_check": ("edit_recipe",),
    "recipe_file": ("load_recipe",),
    "report": ("make_report", "problems"),
    "resources": ("Resources",),
    "verification": ("Verification", "verify"),
}
__all__ = ["__version__", *(name for names in _HOMES.values() for name in names)]  # noqa: PLE0604 - all are strings


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"lines_cli.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
