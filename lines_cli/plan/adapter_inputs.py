"""The opened inputs of an output that is an adapter: adapters as they are, or one whole fine-tune; and a base, of which
headers are read, or no more than the config.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from lines_cli.checkpoint.adapter import Adapter, is_adapter_at, on_base, open_adapter
from lines_cli.checkpoint.reader import Checkpoint, choose_weights, open_checkpoint
from lines_cli.errors import CheckpointError, RecipeError, UnsupportedError
from lines_cli.hub.download import base_and_adapter, locate, locate_config
from lines_cli.plan.inputs import Inputs, refuse_variant_of_none
from lines_cli.recipe.schema import Recipe
from lines_cli.storage.beside import beside, read_object
from lines_cli.storage.names import CONFIG


@dataclass(frozen=True)
class AdapterInputs:
    """The inputs of an output that is an adapter.

    Attributes:
        recipe: with the base that is known from elsewhere, where it names none.
        inputs: all of them: the base first, if there is one.
        adapters: the models, where they are adapters.
        notes: how the base was found.
    """

    recipe: Recipe
    inputs: Inputs
    adapters: tuple[Adapter, ...]
    notes: tuple[str, ...]

    @property
    def base(self) -> Checkpoint | None:
        """The base, if one is known; without tensors where only its config is."""
        return self.inputs.checkpoints[0] if self.inputs.has_base else None

    def tensors_of(self, adapter: Adapter) -> dict[int, str]:
        """The base's name of what an adapter's tensors change, by where each begins in the adapter's file.

        Raises:
            MismatchError: it is the adapter of another base.
        """
        base = self.base
        if base is None or not base.tensors:
            return {f.info.offset: change.name for change in adapter.changes for f in change.factors.values()}
        whole, first = on_base(adapter, base), len(base.files)
        found = {
            factor.info.offset: name
            for name, made in whole.formulas.items()
            for step in made.steps
            for _, factor in step.factors
            if factor.file >= first
        }
        return found | {s.info.offset: name for name, s in whole.tensors.items() if s.file >= first}


def open_adapter_inputs(recipe: Recipe, *, quiet: bool = False) -> AdapterInputs:
    """Open what a recipe names whose output is an adapter; `quiet` without progress bars.

    Raises:
        CheckpointError: an input cannot be found or read.
        UnsupportedError: a whole fine-tune among several models.
        RecipeError: it is not said of which base a fine-tune is, or how large the adapter is to be.
    """
    notes: list[str] = []
    opened: list[Adapter | Checkpoint] = []
    base_name, sources = recipe.base_model, []
    for source in recipe.merged:
        name = source.model
        if halves := base_and_adapter(name):
            base_name, name = base_name or halves[0], halves[1]
        sources.append(source.model_copy(update={"model": name}))
        opened.append(_opened(name, recipe, quiet=quiet))
    adapters = tuple(one for one in opened if isinstance(one, Adapter))
    whole = [one for one in opened if isinstance(one, Checkpoint)]
    if whole and len(opened) > 1:
        raise UnsupportedError(
            f"{whole[0].name} is a whole fine-tune, and an adapter is merged of adapters",
            hint=f"Make an adapter of it first: lines extract {whole[0].name} --base BASE --rank R -o ADAPTER. Or "
            "merge into a whole model: leave out --as-adapter (as_adapter: true).",
        )
    if whole and (recipe.rank is None) == (recipe.energy is None):
        raise RecipeError(
            f"{whole[0].name} is a whole fine-tune: how large its adapter is to be is not said",
            hint="Say its rank (--rank 16), or the share of the update to keep (--energy 0.95).",
        )
    if base_name is None and recipe.num_layers is None and adapters:
        base_name = _base_beside(adapters, notes)
    if whole and base_name is None:
        raise RecipeError(
            f"{whole[0].name} is a whole fine-tune: what it changed is seen by its base, and none is named",
            hint="Name it: --base BASE, in a recipe base_model.",
        )
    base = None
    if base_name is not None:
        needed = bool(whole) or any(change.kind == "whole" for adapter in adapters for change in adapter.changes)
        base = _base(base_name, recipe, weights=needed, quiet=quiet)
    checkpoints = (*((base,) if base else ()), *(one.checkpoint if isinstance(one, Adapter) else one for one in opened))
    if whole:
        refuse_variant_of_none(recipe.variant, checkpoints)
    own = recipe.model_copy(update={"base_model": base_name, "models": tuple(sources)})
    inputs = Inputs(checkpoints, base is not None, 1 if base else 0, bool(whole))
    return AdapterInputs(own, inputs, adapters, tuple(notes))


def _opened(name: str, recipe: Recipe, *, quiet: bool) -> Adapter | Checkpoint:
    found = locate(name, quiet=quiet, variant=recipe.variant)
    if is_adapter_at(found.path):
        return open_adapter(found.path, name=found.name, hub_id=found.hub_id)
    return open_checkpoint(found.path, name=found.name, hub_id=found.hub_id, variant=recipe.variant)


def _base_beside(adapters: tuple[Adapter, ...], notes: list[str]) -> str | None:
    """The base that all adapters name, if it is a folder here; of one elsewhere nothing is fetched unasked."""
    named = {adapter.base_name for adapter in adapters}
    name = named.pop() if len(named) == 1 else None
    if name is None or not os.path.isdir(os.path.expanduser(name)):
        return None
    notes.append(f"the base is {name}, as the adapter's config says; its headers are read (--base says otherwise)")
    return name


def _base(name: str, recipe: Recipe, *, weights: bool, quiet: bool) -> Checkpoint:
    """The base, by its headers; where its weights are not needed and not here, by its config.

    Raises:
        CheckpointError: as `open_checkpoint`; or it has no config.
    """
    path = Path(os.path.expanduser(name))
    if weights or (path.exists() and not (path.is_dir() and choose_weights(os.listdir(path)) is None)):
        found = locate(name, quiet=quiet, variant=recipe.variant)
        return open_checkpoint(found.path, name=found.name, hub_id=found.hub_id, variant=recipe.variant)
    found = locate_config(name, quiet=quiet)
    if beside(found.path, CONFIG) is None:
        raise CheckpointError(
            f"{found.name} holds neither weights nor a {CONFIG}",
            hint="Give the base that the adapter was trained on, or say how many layers it has: --num-layers L.",
        )
    config = read_object(found.path / CONFIG)
    return Checkpoint(found.name, found.path, (), {}, (), "model", config, found.hub_id)
