"""The opened inputs of a recipe, in their roles."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lines_cli.checkpoint.header import COMPLEX, Known
from lines_cli.checkpoint.reader import Checkpoint, open_checkpoint
from lines_cli.errors import (
    CheckpointError,
    some,
)
from lines_cli.hub.download import Only, is_missing, locate
from lines_cli.plan.tied_weights import is_vocabulary
from lines_cli.recipe.schema import Recipe


def open_inputs(recipe: Recipe, *, quiet: bool = False, weights: bool = True) -> Inputs:
    """Open the recipe's base and models, fetching from the Hub what is no path.

    Args:
        recipe: which names them.
        quiet: no progress bars.
        weights: fetch the weights, too; else their headers are enough (`Checkpoint.is_here`).

    Raises:
        CheckpointError: one cannot be found or read; or several, whose paths are not there.
    """
    names = input_names(recipe)
    if len(missing := [name for name in dict.fromkeys(names) if is_missing(name)]) > 1:
        raise CheckpointError(
            f"{len(missing)} inputs are missing; there are no such files or folders:\n{some(missing)}",
            hint="Check the paths.",
        )
    opened: dict[str, Checkpoint] = {}
    known: Known = {}

    def opening(name: str, only: Only | None) -> Checkpoint:
        found = locate(name, quiet=quiet, variant=recipe.variant, only=only)
        return open_checkpoint(
            found.path,
            name=found.name,
            hub_id=found.hub_id,
            known=known,
            variant=recipe.variant,
            heads=found.heads,
        )

    for name in dict.fromkeys(names):
        opened[name] = opening(name, None if weights else "plan")
        if not opened[name].is_here and any(t.info.dtype == COMPLEX for t in opened[name].tensors.values()):
            opened[name] = opening(name, None)  # the one kind of number that a plan looks at

    inputs = inputs_of(recipe, *(opened[name] for name in names))
    refuse_variant_of_none(recipe.variant, inputs.checkpoints)
    return inputs


def refuse_variant_of_none(variant: str | None, checkpoints: Sequence[Checkpoint]) -> None:
    """Refuse a variant that no input has.

    Raises:
        CheckpointError: names it.
    """
    files = [file.name for checkpoint in checkpoints for file in checkpoint.files]
    if variant is not None and not any(re.search(rf"\.{re.escape(variant)}[.-]", name) for name in files):
        raise CheckpointError(
            f"variant {variant}: no input has weights of that variant",
            hint="Leave it out, or check its spelling.",
        )


def inputs_of(recipe: Recipe, *checkpoints: Checkpoint) -> Inputs:
    """The inputs in their roles: the base first, if the recipe subtracts one, then the models of `recipe.merged`."""
    has_base = recipe.subtracts_base
    first_model = 1 if has_base else 0
    named = [source.model for source in recipe.merged]
    lead = 0 if has_base or recipe.base_model not in named else named.index(str(recipe.base_model))
    if recipe.like == "ft":
        lead = first_model
    return Inputs(checkpoints, has_base, lead, recipe.like == "ft" and len(checkpoints) == 2 and has_base)


@dataclass(frozen=True)
class Inputs:
    """The inputs of a merge in the order of their files: the base, if there is one, and the models.

    Attributes:
        checkpoints: all of them.
        has_base: whether the first is the base.
        lead: the number of the one that the output is like: its names, dtypes, integers and config.
        of_an_edit: whether they are a base and one fine-tune that the output is like, and are called so.
    """

    checkpoints: tuple[Checkpoint, ...]
    has_base: bool
    lead: int
    of_an_edit: bool

    @property
    def leading(self) -> Checkpoint:
        return self.checkpoints[self.lead]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Those that are merged."""
        return self.checkpoints[1 if self.has_base else 0 :]

    @cached_property
    def vocabularies(self) -> tuple[dict[str, tuple[int, ...]], ...]:
        """For each side the shapes of its token embeddings and heads."""
        found: list[dict[str, tuple[int, ...]]] = []
        for checkpoint in self.checkpoints:
            tensors, first = checkpoint.tensors, self.checkpoints[0].tensors
            alike = found and tensors.keys() == first.keys()  # mostly: then no name is read twice
            names = found[0] if alike else filter(is_vocabulary, tensors)
            found.append({name: tensors[name].info.shape for name in names})
        return tuple(found)

    def called(self, side: int) -> str:
        """What a message calls one of them."""
        if self.has_base and side == 0:
            return "the base"
        return "the fine-tune" if self.of_an_edit else self.checkpoints[side].name

    def parameters(self, own: Sequence[Mapping[str, str]]) -> dict[str, int]:
        """How many parameters each tensor holds, by the leading side's names (`aligned_names`), in their order."""
        found: dict[str, int] = {}
        for checkpoint, names in zip(self.checkpoints, own, strict=True):
            for name, there in names.items():
                if name not in found:
                    found[name] = checkpoint.tensors[there].info.numel
        return found

    def config_of(self, side: int) -> Mapping[str, Any]:
        """Its config; of a lone file, the leading side's or the first that there is."""
        known = (self.checkpoints[side].config, self.leading.config, *(c.config for c in self.checkpoints))
        return next((config for config in known if config), {})


def input_names(recipe: Recipe) -> list[str]:
    """The inputs that are opened, as the recipe names them: the base first, if it is subtracted, then the models."""
    base = [recipe.base_model] if recipe.base_model is not None and recipe.subtracts_base else []
    return [*base, *(source.model for source in recipe.merged)]
