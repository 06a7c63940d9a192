"""The opened inputs of an output that is an adapter: adapters as they are, or one whole fine-tune; and a base, of which
headers are read, or no more than the config.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from lines_cli.checkpoint.adapter import Adapter, is_adapter_at, open_adapter
from lines_cli.checkpoint.adapter_names import with_dots
from lines_cli.checkpoint.pipeline import open_whole
from lines_cli.checkpoint.reader import Checkpoint, choose_weights, open_checkpoint
from lines_cli.errors import RecipeError, UnsupportedError
from lines_cli.hub.download import Located, Only, base_and_adapter, locate
from lines_cli.plan.adapted import Changed, changed_by, notes_of_bases
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
        base: the base, if one is known; without tensors where only its config is.
        notes: how the base was found.
    """

    recipe: Recipe
    inputs: Inputs
    adapters: tuple[Adapter, ...]
    base: Checkpoint | None
    notes: tuple[str, ...]

    def tensors_of(self, adapter: Adapter) -> dict[int, Changed]:
        """What an adapter's tensors change of the base, by where each begins in the adapter's file.

        Raises:
            MismatchError: it is the adapter of another base.
        """
        base = self.base
        if base is None or not base.tensors:
            names = [f"{with_dots(change.called)}.{change.parameter}" for change in adapter.changes]
            return {
                stored.info.offset: Changed(name, (name,))
                for name, change in zip(names, adapter.changes, strict=True)
                for stored in change.factors.values()
            }
        return changed_by(adapter, base)


def open_adapter_inputs(recipe: Recipe, *, quiet: bool = False, weights: bool = True) -> AdapterInputs:
    """Open what a recipe names whose output is an adapter.

    Args:
        recipe: which names them.
        quiet: no progress bars.
        weights: fetch weights from the Hub that are read; else their headers are enough (`open_inputs`).

    Raises:
        CheckpointError: an input cannot be found or read.
        UnsupportedError: a whole fine-tune among several models.
        RecipeError: it is not said of which base a fine-tune is, or how large the adapter is to be; or several bases
            are named.
    """
    notes: list[str] = []
    opened: list[Adapter | Checkpoint] = []
    base_name, sources = recipe.base_model, []
    for source in recipe.merged:
        name = source.model
        if halves := base_and_adapter(name):
            base_name, name = _one_base(base_name, *halves), halves[1]
        sources.append(source.model_copy(update={"model": name}))
        opened.append(_opened(name, recipe, quiet=quiet, only=None if weights else "plan"))
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
            hint=f"Say its rank: lines extract {whole[0].name} --base {base_name or 'BASE'} --rank 16 -o OUT; or, in "
            "place of that, the share of the update to keep: --energy 0.95.",
        )
    if base_name is None and recipe.num_layers is None and adapters:
        base_name = _base_beside(adapters, notes)
    if whole and base_name is None:
        raise RecipeError(
            f"{whole[0].name} is a whole fine-tune: what it changed is seen by its base, and none is named",
            hint="Name it: --base BASE, in a recipe base_model.",
        )
    base = headers = None
    if base_name is not None:
        needed = bool(whole) or any(change.kind == "whole" for adapter in adapters for change in adapter.changes)
        base = _base(base_name, recipe, quiet=quiet, only=None if weights and needed else "plan")
        if not (needed or base.is_here):
            headers, base = base, replace(base, files=(), states=(), is_here=True)  # of which nothing is read
    notes += notes_of_bases(adapters, headers or base)
    checkpoints = (*((base,) if base else ()), *(one.checkpoint if isinstance(one, Adapter) else one for one in opened))
    if whole:
        refuse_variant_of_none(recipe.variant, checkpoints)
    own = recipe.model_copy(update={"base_model": base_name, "models": tuple(sources)})
    inputs = Inputs(checkpoints, base is not None, 1 if base else 0, bool(whole))
    return AdapterInputs(own, inputs, adapters, headers or base, tuple(notes))


def _one_base(known: str | None, base: str, adapter: str) -> str:
    """The base of all adapters, one of which is named with its own.

    Raises:
        RecipeError: that is another than the one that is known.
    """
    if known is None or known == base or _is_same_place(known, base):
        return known or base
    raise RecipeError(
        f"{base}+{adapter} is on {base}, and the other base that is named is {known}: what two bases differ by is no "
        "product of factors, so no adapter holds it",
        hint=f"If the two are the same weights, name one of them. Else merge into a whole model: base_model: {known}, "
        "and no as_adapter (--as-adapter).",
    )


def _is_same_place(one: str, other: str) -> bool:
    paths = [os.path.realpath(os.path.expanduser(name)) for name in (one, other)]
    return paths[0] == paths[1]


def _opened(name: str, recipe: Recipe, *, quiet: bool, only: Only | None) -> Adapter | Checkpoint:
    found = locate(name, quiet=quiet, variant=recipe.variant, only=only)
    if is_adapter_at(found.path):
        return open_adapter(found.path, name=found.name, hub_id=found.hub_id)
    return _whole(found, recipe)


def _whole(found: Located, recipe: Recipe) -> Checkpoint:
    return open_checkpoint(
        found.path,
        name=found.name,
        hub_id=found.hub_id,
        variant=recipe.variant,
        part=found.part,
        heads=found.heads,
    )


def _base_beside(adapters: tuple[Adapter, ...], notes: list[str]) -> str | None:
    """The base that all adapters name, if it is a folder here; of one elsewhere nothing is fetched unasked."""
    named = {adapter.base_name for adapter in adapters}
    name = named.pop() if len(named) == 1 else None
    if name is None or not os.path.isdir(os.path.expanduser(name)):
        return None
    notes.append(f"the base is {name}, as the adapter's config says; its headers are read (--base says otherwise)")
    return name


def _base(name: str, recipe: Recipe, *, quiet: bool, only: Only | None) -> Checkpoint:
    """The base, by its headers; of a folder that has no weights, by its config.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    found = locate(name, quiet=quiet, variant=recipe.variant, only=only)
    if found.heads is None and found.path.is_dir() and choose_weights(os.listdir(found.path)) is None:
        config = beside(found.path, CONFIG)
        if config is not None and only == "plan":
            return Checkpoint(found.name, found.path, (), {}, (), "model", read_object(config), found.hub_id)
    return open_whole(
        found.path,
        name=found.name,
        hub_id=found.hub_id,
        variant=recipe.variant,
        part=found.part,
        heads=found.heads,
        heads_of=found.heads_of,
    )
