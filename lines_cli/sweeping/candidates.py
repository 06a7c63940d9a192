"""`lines.candidates`: one candidate after another in a live module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.api import arguments
from lines_cli.sweeping.config import space_from
from lines_cli.sweeping.trials import combinations

if TYPE_CHECKING:
    import torch

    from lines_cli.api.calls import Config


@dataclass(frozen=True)
class Candidate:
    """What a module holds at the moment.

    Attributes:
        settings: dotted keys of the recipe -> values.
        model: the module.
    """

    settings: Mapping[str, Any]
    model: torch.nn.Module


def candidates(
    recipe: Config | Mapping[str, Any],
    grid: Mapping[str, Any],
    model: torch.nn.Module,
    *,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
) -> Iterator[Candidate]:
    """Put one candidate after another into a live module, in place: exactly the bytes that a file would hold. At the
    end, and when the loop is left, the module holds again what it held before.

    Args:
        recipe: what `lines.merge` takes; or `{"base": BASE, "ft": FT}` for an edit.
        grid: dotted keys of the recipe -> a list of values, or arithmetic over other keys (`"1 - alpha"`). Every
            combination is a candidate.
        model: of the checkpoints' architecture; each tensor contiguous, and in the dtype of the output (`dtype` of the
            recipe), on any device. A copy of it is kept on the CPU.
        workers, device, gpu_memory: as in `lines.edit`.

    Raises:
        RecipeError: the recipe, or a combination, is impossible.
        MismatchError: the module lacks a tensor, or has it in another shape or dtype.
        LinesError: as `lines.merge`.
    """
    from lines_cli.engine.candidates import Candidates
    from lines_cli.sweeping.live import restored, tensors_of

    space = space_from(recipe, grid)
    settings = list(combinations(space))
    recipes = [space.recipe_of(one) for one in settings]  # all are refused before the first is made
    making = Candidates(arguments.resources(workers, device, gpu_memory))
    into = tensors_of(model)
    with restored(model):
        for one, made in zip(settings, recipes, strict=True):
            making.put(making.plan(made, Path("candidate")), into)
            yield Candidate(one, model)
