"""The plan of whatever a recipe asks for: a whole model, or an adapter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from lines_cli.plan.adapter_build import plan_of_adapters
from lines_cli.plan.adapter_inputs import open_adapter_inputs
from lines_cli.plan.adapter_plan import AnyPlan
from lines_cli.plan.build import make_plan
from lines_cli.plan.components import in_one_file
from lines_cli.plan.extraction import plan_of_extraction
from lines_cli.plan.inputs import Inputs, open_inputs
from lines_cli.recipe.schema import Recipe
from lines_cli.storage.destination import is_one_file


def planning(recipe: Recipe, *, quiet: bool = False, weights: bool = True) -> Callable[[Path], AnyPlan]:
    """Open a recipe's inputs; what is given makes the plan of a destination.

    Args:
        recipe: which names them.
        quiet: no progress bars.
        weights: fetch weights from the Hub, too (`open_inputs`).

    Raises:
        LinesError: an input cannot be found or read, or is of another kind. What is given raises as `make_plan`,
            `plan_of_adapters` or `plan_of_extraction`.
    """
    if not recipe.as_adapter:
        return partial(_of_a_model, recipe, open_inputs(recipe, quiet=quiet, weights=weights))
    opened = open_adapter_inputs(recipe, quiet=quiet, weights=weights)
    return partial(plan_of_adapters if opened.adapters else plan_of_extraction, opened)


def _of_a_model(recipe: Recipe, inputs: Inputs, output: Path) -> AnyPlan:
    return make_plan(recipe, in_one_file(inputs) if is_one_file(output) else inputs, output)
