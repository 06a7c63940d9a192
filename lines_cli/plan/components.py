"""Inputs that hold several models: which of their components belong together, and what becomes of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from lines_cli.checkpoint.formulas import Made
from lines_cli.checkpoint.pipeline import with_tensors_of
from lines_cli.checkpoint.reader import Checkpoint, Component
from lines_cli.errors import CheckpointError, MismatchError, RecipeError, printable, some
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.tensors import Ranges, Segment, TensorSpec
from lines_cli.recipe.schema import ALL_OTHERS, Recipe
from lines_cli.scaling.find_depth import Region
from lines_cli.storage.beside import beside
from lines_cli.storage.names import CONFIG


@dataclass(frozen=True)
class Share:
    """One component of the output.

    Attributes:
        component: name and folder, as the input has them that the output is like.
        inputs: each input's component by itself, in their roles; of what is taken whole that one alone.
        prefixes: what stands before the names of each of these among those of its input.
        side: the number of the input from which it is taken whole; None of one that is edited.
    """

    component: Component
    inputs: Inputs
    prefixes: tuple[str, ...]
    side: int | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return self.component.name

    @property
    def prefix(self) -> str:
        """What stands before its tensors' names among those of the whole."""
        return self.component.prefix

    @cached_property
    def regions(self) -> tuple[Region, ...]:
        """What its tensors' names begin with."""
        return regions_of(self.component)


def regions_of(component: Component) -> tuple[Region, ...]:
    """What the names of a component's tensors begin with among those of the whole."""
    added = component.folder is not None and bool(component.prefix)
    return tuple(Region(begin, component.name, added, component.after) for begin in component.begins)


def in_one_shape(inputs: Inputs, notes: list[str]) -> Inputs:
    """The inputs with the leading one's components: a single model beside a pipeline is the component that it fits.

    Args:
        inputs: as they were opened.
        notes: gets a line for every input that is paired with a component of another, or is one.

    Raises:
        MismatchError: which component is meant is not clear; or one is a folder, and another one file with everything.
    """
    lead = inputs.leading
    if not any(checkpoint.components for checkpoint in inputs.checkpoints):
        return inputs
    found = []
    for side, checkpoint in enumerate(inputs.checkpoints):
        other = checkpoint
        if lead.components and not checkpoint.components:
            component = _fitting(checkpoint, lead)
            notes.append(f"{checkpoint.name} is one model, paired with {component.name} of {lead.name}")
            other = _as_component(checkpoint, component)
        elif checkpoint.components and not lead.components:
            component = _fitting(lead, checkpoint)
            notes.append(f"of {checkpoint.name} only {component.name} is read, with which {lead.name} is paired")
            other = component.checkpoint
        elif side != inputs.lead and checkpoint.components:
            _refuse_other_kind(lead, checkpoint)
        found.append(other)
    return replace(inputs, checkpoints=tuple(found))


def in_one_file(inputs: Inputs) -> Inputs:
    """The inputs of an output that is one file: of a folder of sentence-transformers its transformer alone.

    Raises:
        RecipeError: the output is like a pipeline, whose components need a folder each.
    """
    lead = inputs.leading
    if not lead.components or lead.components[0].folder is None:
        return inputs
    main, others = lead.components[0], [one.name for one in lead.components[1:]]
    if not all(one.after for one in lead.components[1:]):
        raise RecipeError(
            f"{lead.name} is a pipeline, and its components do not go into one file",
            hint=f"Give a folder: -o OUT. Or edit one component by itself, as {main.checkpoint.name}.",
        )
    found = []
    for checkpoint in inputs.checkpoints:
        own = next((one.checkpoint for one in checkpoint.components if one.name == main.name), checkpoint)
        said = f"one file holds {main.name} alone, without {', '.join(map(printable, others))}"
        found.append(replace(own, notes=(*own.notes, said)) if checkpoint is lead and others else own)
    return replace(inputs, checkpoints=tuple(found))


def _refuse_other_kind(lead: Checkpoint, other: Checkpoint) -> None:
    """Refuse a folder of components beside one file with everything: their tensors have other names, and other shapes.

    Raises:
        MismatchError: says how to convert.
    """
    kinds = [one.components[0].folder is None for one in (lead, other)]
    if kinds[0] != kinds[1]:
        folder, file = (other, lead) if kinds[0] else (lead, other)
        raise MismatchError(
            f"{folder.name} is a folder of components, and {file.name} one file with everything: the same model, but "
            "with other names and shapes",
            hint="Convert the file with diffusers (from_single_file, then save_pretrained), and give that folder.",
        )


def _fitting(single: Checkpoint, whole: Checkpoint) -> Component:
    """The component of a pipeline that a single model is a version of: the one with which most of its tensors have name
    and shape in common.

    Raises:
        MismatchError: none, or several.
    """
    candidates = [one for one in whole.components if not one.after]
    if len(candidates) == 1:
        return candidates[0]
    models = [one.checkpoint for one in candidates]
    scores = [(_in_common(single, model, shapes=True), _in_common(single, model)) for model in models]
    best = max(scores)
    least = min(len(single.tensors), len(candidates[scores.index(best)].checkpoint.tensors))
    if scores.count(best) == 1 and 2 * best[1] > least:
        return candidates[scores.index(best)]
    ways = [one.checkpoint.name for one in candidates]
    raise MismatchError(
        f"{single.name} is one model, and {whole.name} holds several, none of which it clearly is a version of:\n"
        f"{some([one.name for one in candidates])}",
        hint=f"Say which of them is meant, as in {ways[0]}."
        if candidates[0].folder is not None
        else "Give two files of one kind.",
    )


def _in_common(a: Checkpoint, b: Checkpoint, *, shapes: bool = False) -> int:
    return sum(
        name in b.tensors and (not shapes or b.tensors[name].info.shape == stored.info.shape)
        for name, stored in a.tensors.items()
    )


def _as_component(single: Checkpoint, of: Component) -> Checkpoint:
    """A single model as a pipeline that has nothing but this component."""
    component = replace(of, checkpoint=single)
    formulas: dict[str, Made] = {of.prefix + name: made for name, made in single.formulas.items()}
    tensors = {of.prefix + name: stored for name, stored in single.tensors.items()}
    return replace(single, tensors=tensors, formulas=formulas, components=(component,))


def shares_of(recipe: Recipe, inputs: Inputs, notes: list[str]) -> tuple[Share, ...]:
    """The components of the output, and what becomes of each; none where the inputs are single models.

    Args:
        recipe: says what becomes of a component.
        inputs: in one shape (`in_one_shape`).
        notes: gets a line for what a person should know.

    Raises:
        RecipeError: it names a component that is not there, or asks of one what cannot be done.
    """
    lead = inputs.leading
    if not lead.components:
        refuse_unknown(recipe, lead)
        return ()
    sides = [{one.name: one for one in checkpoint.components} for checkpoint in inputs.checkpoints]
    refuse_unknown(recipe, lead, inputs.checkpoints)
    shares, not_scaled, alone = [], [], []
    for component in lead.components:
        name, rule = component.name, recipe.rule_of(component.name)
        side = _asked_of(recipe, inputs, sides, name)
        if rule is None:
            side = inputs.lead
            not_scaled.append(name)
        elif side is None and not all(name in components for components in sides):
            _refuse_alone(recipe, inputs, sides, name)
            side = inputs.lead
            alone.append(name)
        if side is not None:
            own = sides[side][name]
            alone_there = Inputs((own.checkpoint,), has_base=False, lead=0, of_an_edit=False)
            shares.append(Share(component, alone_there, (own.prefix,), side))
        else:
            each = [components[name] for components in sides]
            models = replace(inputs, checkpoints=tuple(one.checkpoint for one in each))
            shares.append(Share(component, models, tuple(one.prefix for one in each)))
    _note(inputs, sides, not_scaled, alone, notes)
    if all(share.side is not None for share in shares):
        what = ", ".join(share.name for share in shares)
        notes.append(f"no component is edited: {what} are taken as they are")
    return tuple(shares)


def together(shares: Sequence[Share], inputs: Inputs) -> Inputs:
    """The inputs with the tensors of some components alone, of one file with everything."""
    held = []
    for side, checkpoint in enumerate(inputs.checkpoints):
        tensors = [share.inputs.checkpoints[side].tensors for share in shares]
        held.append(replace(checkpoint, tensors={name: at for each in tensors for name, at in each.items()}))
    return replace(inputs, checkpoints=tuple(held))


def with_layouts(inputs: Inputs, relaid: Sequence[tuple[Share, Inputs]]) -> Inputs:
    """The inputs, with the tensors of components that have another layout as the leading side has them.

    Args:
        inputs: the whole ones.
        relaid: components, and their inputs in one layout (`aligned_names`).
    """
    if not relaid:
        return inputs
    checkpoints, names = [], []
    for side, whole in enumerate(inputs.checkpoints):
        checkpoint, changed = whole, set[str]()
        for share, models in relaid:
            prefix = share.prefixes[side]
            checkpoint = with_tensors_of(checkpoint, share.name, models.checkpoints[side])
            changed |= {prefix + name for name in models.relaid[side]}
        checkpoints.append(checkpoint)
        names.append(frozenset(changed))
    return replace(inputs, checkpoints=tuple(checkpoints), relaid=tuple(names))


def taken_whole(shares: Sequence[Share], recipe: Recipe, inputs: Inputs) -> Iterator[TensorSpec]:
    """What makes the tensors of components that are taken as they are: copies, to the byte, of one input's."""
    for share in shares:
        if share.side is None:
            continue
        values = recipe.values("", 0.0, share.name)
        range_of = Ranges(inputs, share.side)
        for own, (_, info, _) in share.inputs.leading.tensors.items():
            name, whole = share.prefix + own, Segment(0, info.numel, copy=range_of(share.prefixes[0] + own))
            yield TensorSpec(name, name, values, False, info.dtype, info.shape, (whole,), paired=False)


def refuse_unknown(recipe: Recipe, lead: Checkpoint, others: Sequence[Checkpoint] = ()) -> None:
    """Refuse what is said of a component that is not there.

    Args:
        recipe: says it.
        lead: what the output is like.
        others: which may have it.

    Raises:
        RecipeError: names those that are there.
    """
    if recipe.components and not lead.components:
        raise RecipeError(
            f"components: {lead.name} is one model, and not several of which one could be named",
            hint="Leave it out (--component, or components: in the recipe).",
        )
    there = [one.name for one in lead.components]
    for name in (name for name in recipe.components if name not in (ALL_OTHERS, *there)):
        having = [other.name for other in others if name in {one.name for one in other.components}]
        if having:
            raise RecipeError(
                f"component {name!r}: {' and '.join(having)} has it, but not {lead.name}, which the output is like",
                hint="Leave it out, or add it to that pipeline and its index first.",
            )
        raise RecipeError(
            f"component {name!r}: {lead.name} has none of that name with weights; it has\n{some(there, 32)}"
        )


def _asked_of(recipe: Recipe, inputs: Inputs, sides: Sequence[dict[str, Component]], name: str) -> int | None:
    """The input from which a component is asked for as it is, if it is.

    Raises:
        RecipeError: that input does not have it.
    """
    rule = recipe.rule_of(name)
    if rule == "base":
        if not inputs.has_base or name not in sides[0]:
            raise RecipeError(
                f"component {name!r} is to be the base's, but {inputs.checkpoints[0].name} has none of that name",
                hint=f"It has {', '.join(map(printable, sides[0])) or 'none'}.",
            )
        return 0
    if rule == "keep":
        first_model = 1 if inputs.has_base else 0
        if name in sides[first_model]:
            return first_model
        if name in recipe.components:
            raise RecipeError(
                f"component {name!r} is to be kept, but {inputs.checkpoints[first_model].name} has none of that name"
            )
        return inputs.lead
    return None


def _refuse_alone(recipe: Recipe, inputs: Inputs, sides: Sequence[dict[str, Component]], name: str) -> None:
    """Refuse to edit a component by name that some input lacks."""
    if name in recipe.components:
        each = zip(inputs.checkpoints, sides, strict=True)
        lacking = [checkpoint.name for checkpoint, components in each if name not in components]
        raise RecipeError(
            f"component {name!r} cannot be edited: {' and '.join(lacking)} has none of that name",
            hint=f"keep takes it as it is: --component {name}=keep (in a recipe components: {{{name}: keep}}).",
        )


def _refuse_without_weights(inputs: Inputs, sides: Sequence[dict[str, Component]], names: Sequence[str]) -> None:
    """Refuse a folder of a model without its weights, where another input has these: it did not arrive whole.

    Raises:
        CheckpointError: names them.
    """
    folder = inputs.leading.folder
    folders = {name: held[name].folder for held in sides for name in names if name in held}
    empty = [name for name, within in folders.items() if folder and within and beside(folder, f"{within}/{CONFIG}")]
    if empty:
        raise CheckpointError(
            f"{inputs.leading.name}: no weights in its folder(s) {', '.join(map(printable, empty))}, which the other "
            "input(s) have",
            hint="The pipeline is incomplete: copy or download all of it. If it is to have no such model, remove the "
            "folder and its line in the index.",
        )


def _note(
    inputs: Inputs,
    sides: Sequence[dict[str, Component]],
    not_scaled: Sequence[str],
    alone: Sequence[str],
    notes: list[str],
) -> None:
    whose = inputs.called(inputs.lead)
    if not_scaled:
        those = ", ".join(map(printable, not_scaled))
        notes.append(
            f"{those}: as {whose} has {'it' if len(not_scaled) == 1 else 'them'}, for a codec or a filter is scaled "
            f"only if it is named (in a recipe components: {{{not_scaled[0]}: edit}})"
        )
    if alone:
        those = ", ".join(map(printable, alone))
        notes.append(f"{those}: as {whose} has {'it' if len(alone) == 1 else 'them'}, for not all inputs have one")
    others = dict.fromkeys(name for held in sides for name in held if name not in sides[inputs.lead])
    if others:
        _refuse_without_weights(inputs, sides, list(others))
        those = ", ".join(map(printable, others))
        notes.append(f"{those}: not in {whose}, which the output is like, and left out")
