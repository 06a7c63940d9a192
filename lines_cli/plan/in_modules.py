"""A base as transformers' modules have it, where checkpoints of them are stored in another layout: experts one by one,
that are one tensor in the model. An adapter is of the modules' tensors; what it does to them is taken back to those
that are stored.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lines_cli.checkpoint.formulas import Formula, InParts, Made, OfPart
from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable
from lines_cli.plan.conversions import Conversion, Rules, loading_rules
from lines_cli.plan.pieces import Pieced, Run, runs, whole
from lines_cli.plan.relaid import Site, sites, tensors_of
from lines_cli.storage.names import natural


@dataclass(frozen=True)
class InModules:
    """A base by the names of its modules.

    Attributes:
        base: as it is stored.
        checkpoint: the same, with the modules' tensors; those that are put together of several cannot be read.
        stored_as: by the names of modules' tensors that are stored as they are, what these are called there.
        parts: by the stored names of the others, the runs of modules' tensors that they are.
    """

    base: Checkpoint
    checkpoint: Checkpoint
    stored_as: Mapping[str, str]
    parts: Mapping[str, tuple[Run, ...]]

    def back(
        self, tensors: Mapping[str, StoredTensor], formulas: Mapping[str, Made], adapter: str
    ) -> tuple[dict[str, StoredTensor], dict[str, Made]]:
        """The stored tensors and what they are made of, after changes to those of the modules.

        Args:
            tensors, formulas: the checkpoint's, changed.
            adapter: by what, for messages.

        Raises:
            MismatchError: a change that is not a sum of entries' own.
        """
        own = {name: stored for name, stored in tensors.items() if name not in self._owns}
        found = {self.stored_as.get(name, name): stored for name, stored in own.items()}
        made = {self.stored_as.get(name, name): formulas[name] for name in own if name in formulas}
        for name in self._owns:
            steps = formulas[name].steps if name in formulas else ()
            if tensors[name] != self.checkpoint.tensors[name] or not all(step.adds for step in steps):
                raise MismatchError(
                    f"{adapter} replaces or rescales {printable(name)}, which {self.base.name} stores in "
                    f"another layout",
                    hint="Fold it into its base with peft (merge_and_unload, then save_pretrained), and give that "
                    "folder.",
                )
        for name, its in self.parts.items():
            found[name] = self.base.tensors[name]
            before = self.base.formulas.get(name, Made(found[name], ()))
            steps = tuple(_of_parts(its, formulas, found[name].info.shape))
            if steps or name in self.base.formulas:
                made[name] = Made(before.stored, (*before.steps, *steps))
        return {name: found[name] for name in [*self.base.tensors, *found]}, made

    def stored(self, name: str) -> tuple[str, tuple[str, ...]]:
        """What a module's tensor is called, where it is stored: if it is stored as it is, by its name there; and the
        stored ones that it is put together of.
        """
        if name in self._owns:
            return name, tuple(self._owns[name])
        own = self.stored_as.get(name, name)
        return own, (own,)

    def note(self, formulas: Mapping[str, Made], adapter: str) -> str | None:
        """What a person should know of changes to tensors that are stored in another layout; None if there are none.

        Args:
            formulas: the checkpoint's, changed.
            adapter: by what.
        """
        changed = [name for name in self._owns if name in formulas]
        if not changed:
            return None
        first = min(changed, key=natural)
        stored = [name for name, its in self.parts.items() if any(run.source in formulas for run in its)]
        there = min((name for name in stored if any(run.source == first for run in self.parts[name])), key=natural)
        return (
            f"{len(changed):,} tensor(s) that {adapter} changes are {len(stored):,} of another layout in "
            f"{self.base.name}, such as {printable(first)} and {printable(there)}: each gets its part of the update"
        )

    @cached_property
    def _owns(self) -> dict[str, list[str]]:
        """Of the modules' tensors that are not stored as they are, the stored ones."""
        found: dict[str, dict[str, None]] = {}
        for own, its in self.parts.items():
            for run in its:
                found.setdefault(run.source, {})[own] = None
        return {name: list(owns) for name, owns in found.items()}


def _of_parts(its: tuple[Run, ...], formulas: Mapping[str, Made], shape: tuple[int, ...]) -> Iterator[Formula]:
    """A step for each of the modules' tensors that some entries are of."""
    for source in dict.fromkeys(run.source for run in its if run.source in formulas):
        steps = formulas[source].steps
        parts = (OfPart(run.start, run.numel, run.first, steps) for run in its if run.source == source)
        yield InParts(source, (), shape, tuple(parts))


def in_modules(base: Checkpoint) -> InModules | None:
    """A base by the names of its modules; None where they are those by which it is stored, for all that is known."""
    rules = loading_rules(base.config)
    if not len(rules):
        return None
    tensors: dict[str, StoredTensor] = {}
    parts: dict[str, tuple[Run, ...]] = {}
    for (number, *_), found in sites(rules, base.tensors).items():
        conversion = rules.conversions[number]
        if len(found) == 1 and found[0].form == "sources" and conversion.puts_together:
            made = _site(conversion, rules, base, found[0])
            if made is not None and not made[0].keys() & (base.tensors.keys() | tensors.keys()):
                tensors |= made[0]
                parts |= made[1]
    stored_as: dict[str, str] = {}
    for name in base.tensors:
        if name not in parts:
            called = rules.renamed(name)
            taken = called in stored_as or called in tensors or (called != name and called in base.tensors)
            stored_as[name if taken else called] = name
    if not parts and all(called == name for called, name in stored_as.items()):
        return None
    kept = {called: base.tensors[name] for called, name in stored_as.items()}
    formulas = {called: base.formulas[name] for called, name in stored_as.items() if name in base.formulas}
    return InModules(base, replace(base, tensors=kept | tensors, formulas=formulas), stored_as, parts)


def _site(
    conversion: Conversion, rules: Rules, base: Checkpoint, site: Site
) -> tuple[dict[str, StoredTensor], dict[str, tuple[Run, ...]]] | None:
    """The modules' tensors of a place, and the runs of them that the stored ones are; None where these do not add up to
    them.
    """
    held = tensors_of(conversion, base, site)
    if len({len(of_one) for of_one, pattern in zip(held, conversion.sources, strict=True) if pattern.counts}) > 1:
        return None
    if any(
        {number for at, number in site.names if at == one} != set(range(len(held[one])))
        for one, pattern in enumerate(conversion.sources)
        if pattern.counts
    ):
        return None
    targets = conversion.forward(held, _sizes(conversion, held))
    if targets is None or not all(held):
        return None
    (at, _), name = next(iter(site.names.items()))
    place = conversion.sources[at].find(rules.renamed(name)) or conversion.sources[at].find(name)
    assert place is not None
    called = [f"{place.before}{pattern.text}{place.behind}" for pattern in conversion.targets]
    like = base.tensors[name]
    tensors = {
        one: like._replace(
            info=TensorInfo(
                like.info.dtype, made.shape, like.info.offset, math.prod(made.shape) * itemsize(like.info.dtype)
            )
        )
        for one, made in zip(called, targets, strict=True)
    }
    of_modules = conversion.backward([whole(one, tensors[one].info.shape) for one in called], held)
    if of_modules is None:
        return None
    parts: dict[str, tuple[Run, ...]] = {}
    for pattern, of_one in enumerate(of_modules):
        own = sorted((key for key in site.names if key[0] == pattern), key=lambda key: key[1] or 0)
        for key, made in zip(own, of_one, strict=True):
            found = runs(made)
            if found is None or any(run.strides != (1,) for run in found):
                return None
            parts[site.names[key]] = tuple(found)
    return tensors, parts


def _sizes(conversion: Conversion, held: Sequence[Sequence[Pieced]]) -> list[int]:
    """Of the targets, along the axis that they are cut along."""
    axes = [axis for kind, axis, *_ in conversion.operations if kind == "chunk"]
    number = len(conversion.targets)
    if not axes or not held or not held[0] or axes[0] >= len(held[0][0].shape):
        return []
    return [held[0][0].shape[axes[0]] // number] * number
