"""The opened inputs of a recipe, in their roles."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.adapter import adapter_at, is_adapter_by, open_adapter
from lines_cli.checkpoint.header import COMPLEX, Known
from lines_cli.checkpoint.pipeline import Reads, open_whole, with_its_components
from lines_cli.checkpoint.reader import Checkpoint, FileState, open_checkpoint
from lines_cli.errors import CheckpointError, UnsupportedError, some
from lines_cli.hub.download import Only, base_and_adapter, is_missing, locate
from lines_cli.plan.adapted import on_base
from lines_cli.plan.stack import stack_layers
from lines_cli.plan.tied_weights import is_vocabulary, tied_heads
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
    only: Only | None = None if weights else "plan"
    reads = _read_of_the_base(recipe)
    opening = Opening(recipe.base_model, variant=recipe.variant, quiet=quiet, only=only, reads=reads)
    inputs = inputs_of(recipe, *_sides(recipe, opening))
    if inputs.checkpoints[0].components and not inputs.leading.components:  # which of them fits is to be seen
        again = Opening(recipe.base_model, variant=recipe.variant, quiet=quiet, only=only)
        inputs = inputs_of(recipe, *_sides(recipe, again))
    refuse_variant_of_none(recipe.variant, inputs.checkpoints)
    return inputs


def _sides(recipe: Recipe, opening: Callable[[str], Checkpoint]) -> list[Checkpoint]:
    """The base, if it is subtracted, and the models, each opened, or stacked of layers of those that are."""
    if not recipe.slices:
        return list(map(opening, input_names(recipe)))
    base = [recipe.stacked_base] if recipe.subtracts_base else []
    return [stack_layers(parts, opening, like=recipe.base_model) for parts in (*base, *recipe.stacked)]


def _read_of_the_base(recipe: Recipe) -> Reads | None:
    """Which components of the base are needed; None for all, as where the output is like it."""
    models = [source.model for source in recipe.merged]
    if recipe.like == "base" or not recipe.subtracts_base or recipe.base_model in models:
        return None

    def reads(component: str) -> bool:
        return recipe.rule_of(component) not in (None, "keep")

    return reads


class Opening:
    """Opens checkpoints by their names, each once; adapters on the base.

    Args:
        base: the name of what adapters are put onto that do not name their base (`base+adapter`); None for nothing.
        variant: of folders with several sets of weights, which.
        to_look_at: not to compute with (`open_checkpoint`).
        also: names of other files that are wanted of repositories on the Hub (`locate`).
        only: what is not needed of what lies on the Hub (`locate`).
        quiet: no progress bars while fetching from the Hub.
        reads: of a pipeline that is the base, the components that are needed; None for all.
    """

    def __init__(
        self,
        base: str | None,
        *,
        variant: str | None = None,
        to_look_at: bool = False,
        also: tuple[str, ...] = (),
        only: Only | None = None,
        quiet: bool = False,
        reads: Reads | None = None,
    ) -> None:
        self._base, self._variant, self._to_look_at, self._quiet = base, variant, to_look_at, quiet
        self._also, self._only, self._reads = also, only, reads
        self._opened: dict[str, Checkpoint] = {}
        self._known: Known = {}
        self._whole_base: Checkpoint | None = None

    def __call__(self, name: str) -> Checkpoint:
        """The checkpoint of that name.

        Raises:
            CheckpointError, UnsupportedError: as `open_checkpoint`; an adapter, and no base.
            MismatchError: an adapter of another base.
        """
        if name not in self._opened:
            reads = self._reads if name == self._base else None
            found = self._open(name, self._only, reads)
            if self._only == "plan" and any(tensor.info.dtype == COMPLEX for tensor in found.tensors.values()):
                found = self._open(name, None, reads)  # the one kind of number that a plan looks at
            self._opened[name] = found
        return self._opened[name]

    def _base_of_adapters(self, base: str) -> Checkpoint:
        """The base with all of its components: an adapter on it has them all."""
        if self._whole_base is None:
            self._whole_base = self(base)
            if self._reads is not None and self._whole_base.components:
                self._whole_base = self._open(base, self._only, reads=None)
        return self._whole_base

    def _open(self, name: str, only: Only | None, reads: Reads | None) -> Checkpoint:
        if halves := base_and_adapter(name):
            base = self._base_of_adapters(halves[0]) if halves[0] == self._base else self(halves[0])
            found = locate(halves[1], quiet=self._quiet)
            adapter = open_adapter(found.path, name=found.name, hub_id=found.hub_id)
            return with_its_components(on_base(adapter, base, name=name))
        found = locate(name, quiet=self._quiet, also=self._also, variant=self._variant, only=only, reads=reads)
        if found.heads is not None and is_adapter_by(
            found.heads, found.name
        ):  # which is small, and needed to plan with
            found = locate(name, quiet=self._quiet, also=self._also, variant=self._variant)
        weights = adapter_at(found.path, self._known)
        if weights is not None and self._to_look_at and self._base is None:
            alone = open_checkpoint(weights, name=found.name, hub_id=found.hub_id, to_look_at=True)
            return replace(alone, path=found.path)
        if weights is not None:
            if self._base is None or name == self._base:
                raise UnsupportedError(
                    f"{name} is an adapter, not a whole checkpoint: it changes a base, and none is named",
                    hint="If it stands in the base's place, exchange the two. As a model of its own write "
                    "BASE+ADAPTER, with the base that it was trained on. Adapters alone are merged into an adapter, by "
                    "linear methods: lines merge --as-adapter.",
                )
            adapter = open_adapter(found.path, name=found.name, hub_id=found.hub_id)
            return with_its_components(on_base(adapter, self._base_of_adapters(self._base)))
        return open_whole(
            found.path,
            name=found.name,
            hub_id=found.hub_id,
            to_look_at=self._to_look_at,
            known=self._known,
            variant=self._variant,
            reads=reads,
            part=found.part,
            heads=found.heads,
            heads_of=found.heads_of,
        )


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


def notes_of_files(checkpoints: Iterable[Checkpoint]) -> list[str]:
    """What a person should know of what was found in the checkpoints' files, each once."""
    return list(dict.fromkeys(note for checkpoint in checkpoints for note in checkpoint.notes))


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
        relaid: for each of them, the tensors that its files have in another layout; by the leading side's names, which
            are theirs in `checkpoints`, too (`plan.relaid`). Empty if there are none.
    """

    checkpoints: tuple[Checkpoint, ...]
    has_base: bool
    lead: int
    of_an_edit: bool
    relaid: tuple[frozenset[str], ...] = ()

    @property
    def leading(self) -> Checkpoint:
        return self.checkpoints[self.lead]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Those that are merged."""
        return self.checkpoints[1 if self.has_base else 0 :]

    @cached_property
    def file_numbers(self) -> tuple[tuple[int, ...], ...]:
        """For each input the numbers of its files among those of all inputs; a file of a checkpoint that is put
        together is the one that it was put together of, if that is an input, too.
        """
        numbers: list[tuple[int, ...]] = []
        known: dict[tuple[Path, FileState], int] = {}
        first = 0
        for checkpoint in self.checkpoints:
            own = range(first, first + len(checkpoint.files))
            first += len(checkpoint.files)
            if len(checkpoint.states) != len(own):  # in memory
                numbers.append(tuple(own))
                continue
            files = list(zip(checkpoint.files, checkpoint.states, strict=True))
            numbers.append(
                tuple(
                    known.get(file, n) if checkpoint.parts or checkpoint.stacked else n
                    for file, n in zip(files, own, strict=True)
                )
            )
            for file, number in zip(files, own, strict=True):
                known.setdefault(file, number)
        return tuple(numbers)

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

    @cached_property
    def tied_heads(self) -> dict[str, str]:
        """The heads of the leading side that its config ties to their embeddings, each with its embedding."""
        return tied_heads(self.leading, self.config_of(self.lead))

    def config_of(self, side: int) -> Mapping[str, Any]:
        """Its config; of a lone file, the leading side's or the first that there is."""
        known = (self.checkpoints[side].config, self.leading.config, *(c.config for c in self.checkpoints))
        return next((config for config in known if config), {})


def input_names(recipe: Recipe) -> list[str]:
    """The inputs that are opened, as the recipe names them: the base first, if it is subtracted, then the models."""
    base = [recipe.base_model] if recipe.base_model is not None and recipe.subtracts_base else []
    parts = (part.model for parts in recipe.stacked for part in parts)
    return [*base, *(parts if recipe.slices else (source.model for source in recipe.merged))]
