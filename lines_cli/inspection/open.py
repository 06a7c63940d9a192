"""What `lines inspect` looks at, as far as headers tell: a checkpoint's tensors, each with its place, its kind and the
coefficient that LiNeS would give it; and with a base, which entries are to be compared.

Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lines_cli.checkpoint.adapter import Adapter, adapter_at, open_adapter
from lines_cli.checkpoint.header import EXACT_DTYPES, FLOAT8_DTYPES, FLOAT_DTYPES, TensorInfo
from lines_cli.checkpoint.reader import Checkpoint, gc_paused, refusal_of
from lines_cli.errors import DepthError, MismatchError, RecipeError, UnsupportedError, printable, some
from lines_cli.hub.download import Only
from lines_cli.inspection.adapters import names_of
from lines_cli.inspection.kinds import Kind, kind_of
from lines_cli.plan.align import aligned_names
from lines_cli.plan.coefficients import (
    layer_coefficients,
    outside_coefficients,
    rounded_coefficient,
    scale_at,
    unlike_lines,
)
from lines_cli.plan.components import Share, in_one_shape, refuse_unknown, with_layouts
from lines_cli.plan.depth import depth_of_kept, places_of_all
from lines_cli.plan.inputs import Inputs, Opening, inputs_of, notes_of_files, refuse_variant_of_none
from lines_cli.plan.match import Names, kept, match_names, missing_in_blocks, nothing_in_common
from lines_cli.plan.stack import stack_layers
from lines_cli.plan.tensors import (
    STORED,
    Ranges,
    Segment,
    TensorSpec,
    TensorValues,
    in_common,
    refuse_idle_filters,
    specify_tensors,
)
from lines_cli.plan.tied_weights import says_tied, tied_heads
from lines_cli.plan.vocabulary import find_vocabulary, in_words
from lines_cli.recipe.schema import UNSCALED, Like, Recipe, Scaling, Scores
from lines_cli.recipe.validate import edit_recipe, make_recipe
from lines_cli.recipe.yaml_file import load_record
from lines_cli.scaling.find_depth import DepthMap, Place, Region, Side, joined
from lines_cli.scaling.numbered_lists import read_lists
from lines_cli.scaling.schedule import Listed, Rules, Scored
from lines_cli.storage.beside import beside
from lines_cli.storage.names import RECIPE, natural
from lines_cli.storage.object_store import is_url


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of what is inspected.

    Attributes:
        name: its own.
        info: dtype, shape, bytes.
        place: its stack and layer; None outside the blocks.
        side: where it stands outside the blocks; None inside.
        kind: what it is a parameter of.
        coefficient: what its update is scaled by, in float64; NaN where that is not known.
        by_depth: whether that is its layer's, or its side's; not a filter's, or its own.
        filter: the pattern that decides it, if one does.
        dtype: what its entries count as: another than that of `info`, if it is stored in codes.
    """

    name: str
    info: TensorInfo
    place: Place | None
    side: Side | None
    kind: Kind
    coefficient: float
    by_depth: bool
    filter: str | None
    dtype: str


class Planned(NamedTuple):
    """What an edit would do to a tensor.

    Attributes:
        coefficient: rounded to the dtype of the arithmetic.
        in_float64: whether that is float64.
        dtype: of the output.
    """

    coefficient: float
    in_float64: bool
    dtype: str


@dataclass(frozen=True, slots=True)
class ReadRange:
    """A run of entries that is read: of one tensor alone, or of the base and every fine-tune, to compare them.

    Attributes:
        name: the tensor's.
        segments: one, with where its entries come from.
        counts_for: for each of its sources the checkpoint (a number into `Inspection.checkpoints`) and tensor that
            health is checked; None where another range does it.
        planned: what an edit would do to it, if that is to be foreseen.
    """

    name: str
    segments: tuple[Segment]
    counts_for: tuple[tuple[int, str] | None, ...]
    planned: Planned | None = None
    in_float64: bool = True  # all sums are taken in it

    @property
    def compares(self) -> bool:
        """Whether it is read to be compared."""
        return self.segments[0].base is not None


Origin = Literal["asked", "output", "merge"]
"""Whose coefficients are shown: those that were asked for, an output's own, or those of a merge that is planned."""


@dataclass(frozen=True, slots=True)
class Compared:
    """A tensor that the base and every fine-tune have: its name in each, and where their common entries lie."""

    name: str
    names: Names
    segment: Segment


@dataclass(frozen=True)
class Inspection:
    """A checkpoint, or fine-tunes and their base.

    Attributes:
        checkpoints: the base, if there is one; then what is inspected.
        has_base: whether there is one.
        lead: the number of the one whose headers are shown: the first that is inspected; of a merge that is planned the
            one that its output is like.
        recipe: what decides the coefficients: of an output its own; else what is asked, or an edit's defaults.
        of: where that recipe comes from.
        depth: stacks and places; no stack where depth cannot be decided.
        rules: the coefficients, with alpha where it is known.
        parts: every tensor of the leading checkpoint.
        compared: what the fine-tunes are compared with the base by.
        not_compared: tensors that are not, each with the reason in words.
        left_out: those that a merge leaves out of its output; they have no place and no coefficient.
        missing_in_blocks: how many of `not_compared` lie inside blocks, and some checkpoint lacks them.
        resized: whether only a part of the rows is compared of some.
        made_by: the recipe of an output of ours.
        says_tied: whether the config ties the head to the token embedding.
        stored_heads: heads that are stored all the same, each with its embedding.
        quantised: why it cannot be computed with.
        notes: what a person should know.
        relaid: for each checkpoint the tensors that are not stored as `checkpoints` has them (`Inputs.relaid`).
        adapter: the adapter that is inspected without its base, and the depth of what it changes.
    """

    checkpoints: tuple[Checkpoint, ...]
    has_base: bool
    lead: int
    recipe: Recipe
    of: Origin
    depth: DepthMap
    rules: Rules
    parts: tuple[TensorEntry, ...] = ()
    compared: tuple[Compared, ...] = ()
    not_compared: Mapping[str, str] = field(default_factory=dict)
    left_out: frozenset[str] = frozenset()
    missing_in_blocks: int = 0
    resized: bool = False
    made_by: Recipe | None = None
    says_tied: bool = False
    stored_heads: Mapping[str, str] = field(default_factory=dict)
    quantised: str | None = None
    notes: tuple[str, ...] = ()
    relaid: tuple[frozenset[str], ...] = ()
    adapter: tuple[Adapter, DepthMap] | None = None

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """What is inspected, the base apart."""
        return self.checkpoints[1 if self.has_base else 0 :]

    @property
    def checkpoint(self) -> Checkpoint:
        """The one whose headers are shown."""
        return self.checkpoints[self.lead]

    @property
    def scaling(self) -> Scaling:
        """alpha, beta and the like; of a recipe without LiNeS 1 throughout."""
        return self.recipe.lines or UNSCALED

    @property
    def knows_coefficients(self) -> bool:
        """Whether depth is known, or makes no difference. How deep a model is, an adapter alone does not say."""
        return self.adapter is None and self._knows_depth

    @property
    def _knows_depth(self) -> bool:
        return bool(self.depth.stacks) or not (self.scaling.needs_depth or self.recipe.parameters_vary)

    def with_measured(self, *, alpha: float | None = None, scores: Scores | None = None) -> Inspection:
        """The same with an alpha, and what depth rules rest on, that were measured."""
        rules = self.recipe.rules(self.depth, alpha=alpha, scores=scores)
        rules = replace(rules, components={**self.rules.components, **rules.components})
        inspection = replace(self, rules=rules)
        return replace(inspection, parts=tuple(_parts(inspection)))

    def config_of(self, side: int) -> Mapping[str, Any]:
        """A checkpoint's config; of a lone file, the inspected one's or the first that there is."""
        configs = (self.checkpoints[side].config, self.checkpoint.config, *(c.config for c in self.checkpoints))
        return next((config for config in configs if config), {})

    @cached_property
    def inputs(self) -> tuple[Path, ...]:
        """Every file, as `SourceRange.file` counts them."""
        return tuple(file for checkpoint in self.checkpoints for file in checkpoint.files)

    def spans(self) -> list[ReadRange]:
        """Everything that is read to compare the checkpoints, and to see what they hold: every float entry of each."""
        spans: list[ReadRange] = []
        counted: set[tuple[int, str]] = set()
        planned = self._planned()
        for tensor in sorted(self.compared, key=lambda tensor: natural(tensor.name)):
            counts_for: list[tuple[int, str] | None] = []
            for side, name in enumerate(tensor.names):
                assert name is not None
                numel = self.checkpoints[side].tensors[name].info.numel
                whole = tensor.segment.numel == numel and tensor.segment.sources[side].gathered is None
                fresh = whole and (side, name) not in counted  # two heads may be read from one embedding
                counts_for.append((side, name) if fresh else None)
                if fresh:
                    counted.add((side, name))
            spans.append(ReadRange(tensor.name, (tensor.segment,), tuple(counts_for), planned.get(tensor.name)))
        inputs = Inputs(self.checkpoints, self.has_base, self.lead, of_an_edit=False)
        for side, checkpoint in enumerate(self.checkpoints):
            range_of = Ranges(inputs, side)
            for name, stored in checkpoint.tensors.items():
                if (side, name) not in counted and stored.info.dtype in FLOAT_DTYPES | FLOAT8_DTYPES:
                    segment = Segment(0, stored.info.numel, copy=range_of(name))
                    spans.append(ReadRange(name, (segment,), ((side, name),)))
        return spans

    @property
    def forecasts(self) -> bool:
        """Whether what rounding leaves of the coefficients is foreseen: an edit is planned, of one fine-tune that
        lines did not write; and rounding draws nothing.
        """
        recipe = self.recipe
        alone = len(self.models) == len(recipe.merged) == 1 and self.made_by is None
        to_nearest = recipe.rounding == "nearest" and recipe.dtype != "fp8"
        return alone and recipe.method.takes == "task vectors" and to_nearest

    def _planned(self) -> dict[str, Planned]:
        """What an edit would do to each tensor that is compared, where that is known."""
        if not self.forecasts:
            return {}
        entries = {entry.name: entry for entry in self.parts}
        values_for = TensorValues(self.recipe, self.depth)
        found: dict[str, Planned] = {}
        for tensor in self.compared:
            entry = entries.get(tensor.name)
            counts_as = tensor.name if entry and entry.place else self.stored_heads.get(tensor.name, tensor.name)
            if not self.recipe.method.one_is_itself(values_for(counts_as)):
                continue  # something of it is dropped, or weighted
            if entry is not None and not math.isnan(entry.coefficient) and entry.dtype in FLOAT_DTYPES:
                dtype = STORED.get(self.recipe.dtype or "", entry.dtype)
                wide = any(source.dtype == "F64" for source in tensor.segment.sources)
                rounded = rounded_coefficient(tensor.name, entry.coefficient, in_float64=wide)
                found[tensor.name] = Planned(rounded, wide, dtype)
        return found


Named = str | Path
"""A checkpoint, as its user names it."""


def open_inspection(
    models: Named | Sequence[Named],
    *,
    base: Named | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    dtype: str | None = None,
    components: Mapping[str, Any] | None = None,
    quiet: bool = False,
    weights: bool = True,
    **scaling: Any,
) -> Inspection:
    """Open what is to be inspected: headers, configs, recipes.

    Args:
        models: one checkpoint; or with a base its fine-tunes, one or several.
        base: what they were fine-tuned from.
        prefix: what the names of one side begin with and those of another lack (`Recipe`).
        variant: of folders with several sets of weights, which (`Recipe`).
        dtype: what an output would be stored as (`Recipe`).
        components: of pipelines what becomes of each component (`Recipe`).
        quiet: no progress bars while fetching from the Hub.
        weights: whether tensors will be read (`compare`). If not, of one checkpoint that is on the Hub only headers are
            fetched.
        scaling: the fields of `Scaling`. One that is None keeps its default: an edit's, or for several fine-tunes those
            of a merge by task arithmetic, alpha `auto` (which is 1/N) and beta 0.5. If all are None, an output of ours
            is shown with those of its recipe.

    Raises:
        CheckpointError: one cannot be found or read.
        UnsupportedError: with a base: one is quantised.
        MismatchError: with a base: nothing in them can be compared.
        RecipeError: an impossible option; several checkpoints, and no base.
    """
    if unknown := scaling.keys() - Scaling.model_fields.keys():
        raise RecipeError(f"{', '.join(sorted(unknown))}: not a field of the scaling")
    names = [str(model) for model in ([models] if isinstance(models, (str, Path)) else models)]
    if base is None and prefix is not None:
        raise RecipeError("--prefix says how names are paired with those of a base, and there is none")
    if base is None and dtype is not None:
        raise RecipeError("--dtype says what an update is rounded to, and without a base there is none")
    if base is None and len(names) != 1:
        raise RecipeError(
            f"{len(names)} checkpoints, and no base to compare them with",
            hint="Name it with --base BASE; or inspect them one at a time.",
        )
    if base is None:
        return _alone(names[0], variant, components, scaling, quiet=quiet, weights=weights)
    given = {key: value for key, value in scaling.items() if value is not None}
    if len(names) > 1 and not {"alpha", "schedule"} & given.keys():
        given = {"alpha": "auto", "beta": 0.5} | given
    wanted = edit_recipe(str(base), names[0], **given).lines
    sources = [{"model": name} for name in names]
    said: dict[str, Any] = {"base_model": str(base), "models": sources, "lines": wanted}
    said |= {"prefix": prefix, "variant": variant, "dtype": dtype, "components": components}
    recipe = make_recipe({key: value for key, value in said.items() if value is not None}, where="inspect")
    return _against(str(base), names, recipe, "asked", quiet=quiet)


def open_merge(recipe: Recipe, *, quiet: bool = False) -> Inspection:
    """Open what a recipe merges, to see what that would come to.

    Args:
        recipe: of a merge, or of an edit; with a base.
        quiet: no progress bars while fetching from the Hub.

    Raises:
        RecipeError: it has no base.
        LinesError: as `open_inspection`.
    """
    if recipe.base_model is None:
        raise RecipeError("the recipe has no base_model, so there is nothing to compare its models with")
    names = [source.model for source in recipe.merged if source.model != recipe.base_model]
    if not names:
        raise RecipeError("the recipe's only model is its base: there is nothing to compare")
    return _against(recipe.base_model, names, recipe, "merge", quiet=quiet)


def _alone(
    name: str,
    variant: str | None,
    components: Mapping[str, Any] | None,
    scaling: Mapping[str, Any],
    *,
    quiet: bool,
    weights: bool,
) -> Inspection:
    asked = edit_recipe(name, name, variant=variant, components=components, **scaling)
    only: Only | None = None if weights else "headers"
    checkpoint = Opening(None, variant=variant, to_look_at=True, quiet=quiet, also=(RECIPE,), only=only)(name)
    refuse_variant_of_none(variant, [checkpoint])
    refuse_unknown(asked, checkpoint)
    notes = list(checkpoint.notes)
    made_by = _made_by(checkpoint, notes)
    refused = refusal_of(checkpoint)
    adapter = None
    if adapter_at(checkpoint.path) is not None:
        try:
            opened = open_adapter(checkpoint.path, name=checkpoint.name, hub_id=checkpoint.hub_id)
            adapter = opened, _depth(names_of(opened), {}, {}, [])
            notes += opened.notes
            refused = None
        except UnsupportedError as error:
            refused = UnsupportedError(f"{checkpoint.name} is an adapter: {error.message}")

    def shown(recipe: Recipe, of: Origin) -> Inspection:
        of_depth: list[str] = []
        asked_of_depth = recipe.lines.by_hand if recipe.lines else {}
        by_hand = _without_expressions(asked_of_depth, of_depth) if of == "output" else asked_of_depth
        depth = _depth_alone(checkpoint, recipe, by_hand, of_depth)
        rules = _rules(recipe, depth, {one.name for one in checkpoint.components})
        refuse_idle_filters(rules, checkpoint.tensors)
        return _complete(
            Inspection(
                checkpoints=(checkpoint,),
                has_base=False,
                lead=0,
                recipe=recipe,
                of=of,
                depth=depth,
                rules=rules,
                made_by=made_by,
                says_tied=says_tied(checkpoint.config),
                stored_heads=tied_heads(checkpoint, checkpoint.config),
                quantised=refused.message if refused else None,
                notes=(*notes, *of_depth, *depth.notes),
                adapter=adapter,
            )
        )

    if made_by is not None and components is None and all(value is None for value in scaling.values()):
        try:
            return shown(made_by, "output")
        except RecipeError as error:
            notes.append(f"its recipe does not fit its tensors: {error.message}")
    return shown(asked, "asked")


def _against(base: str, names: Sequence[str], recipe: Recipe, of: Origin, *, quiet: bool) -> Inspection:
    opening = Opening(base, variant=recipe.variant, quiet=quiet, also=(RECIPE,))
    if recipe.slices:
        opened = [stack_layers(parts, opening, like=base) for parts in (recipe.stacked_base, *recipe.stacked)]
    else:
        opened = list(map(opening, (base, *names)))
    refuse_variant_of_none(recipe.variant, opened)
    if not recipe.slices:
        _refuse_twice(opened)
    notes = notes_of_files(opened)
    pairing = _pairing(base, names, recipe, recipe.like if of == "merge" else "ft")
    inputs = in_one_shape(inputs_of(pairing, *opened), notes)
    refuse_unknown(recipe, inputs.leading)
    shared = _components_of_all(inputs)
    found = _found_by_component(inputs, shared, recipe, of, notes) if shared else _found(inputs, recipe, of, notes)
    inputs, rows, depth = found.inputs, found.rows, found.depth
    if not rows:
        raise nothing_in_common(inputs)
    config = inputs.config_of(inputs.lead)
    not_compared = dict(found.not_compared)
    rules = _rules(recipe, depth, shared.keys())
    vocabulary, difference = find_vocabulary(pairing, inputs, rows, depth.places, notes)
    specs = specify_tensors(pairing, inputs, depth, rules, rows, vocabulary or difference)
    if vocabulary is not None:
        rows_paired = max((spec.table.merged for spec in specs if spec.table), default=0)
        why = f": {in_words(vocabulary.difference, inputs)}" if vocabulary.difference else ""
        notes.append(f"the {rows_paired:,} rows of tokens that all have are compared, token by token{why}")
    not_compared |= {spec.name: f"{spec.misfit} (base first)" for spec in specs if spec.misfit}
    fitting = [spec for spec in specs if not spec.misfit]
    compared = _compared(inputs, fitting, rows, notes)
    if not compared:
        everything = some([f"{name}: {why}" for name, why in not_compared.items()])
        raise MismatchError(
            f"nothing can be compared between {' and '.join(checkpoint.name for checkpoint in opened)}\n{everything}",
            hint="Check that they are versions of one model.",
        )
    _note_dtypes(inputs, compared, notes)
    made_by = _made_by(opened[1], notes) if len(names) == 1 else None
    if made_by is not None and of == "asked":
        notes.append(f"{opened[1].name} is an output of lines already; what is shown as scaled is scaled a second time")
    return _complete(
        Inspection(
            checkpoints=inputs.checkpoints,
            relaid=inputs.relaid,
            has_base=True,
            lead=inputs.lead,
            recipe=recipe,
            of=of,
            depth=depth,
            rules=rules,
            compared=tuple(compared),
            not_compared=not_compared,
            left_out=found.left_out,
            missing_in_blocks=found.missing_in_blocks,
            resized=any(spec.rows for spec in fitting),
            made_by=made_by,
            says_tied=says_tied(config),
            stored_heads=inputs.tied_heads,
            notes=(*notes, *depth.notes),
        )
    )


@dataclass(frozen=True)
class _Found:
    """What belongs together of inputs in one layout, and where it stands; attributes as of `Inspection`."""

    inputs: Inputs
    rows: Mapping[str, Names]
    depth: DepthMap
    not_compared: Mapping[str, str]
    left_out: frozenset[str]
    missing_in_blocks: int


def _found(inputs: Inputs, recipe: Recipe, of: Origin, notes: list[str], component: str | None = None) -> _Found:
    of_several, scaling = component is not None, recipe.scaling_of(component)
    inputs, own = aligned_names(inputs, notes, prefix=recipe.prefix, strict=False)
    rows, incomplete = match_names(inputs, own, resize=True, notes=notes)
    by_hand = scaling.by_hand if scaling else {}
    parameters = inputs.parameters(own)
    staying = rows.keys() | kept(inputs, incomplete, _missing(recipe, of))
    depth = _depth(parameters, inputs.config_of(inputs.lead), by_hand, notes, kept=staying, of_several=of_several)
    return _Found(
        inputs,
        rows,
        depth,
        _lacking(inputs, incomplete),
        frozenset(incomplete.keys() - staying),
        _missing_in_blocks(inputs, parameters, (rows, incomplete), by_hand),
    )


def _components_of_all(inputs: Inputs) -> dict[str, Share]:
    """The components of the leading input that all others have, too; none of single models."""
    sides = [{one.name: one for one in checkpoint.components} for checkpoint in inputs.checkpoints]
    shared = [name for name in sides[inputs.lead] if all(name in held for held in sides)]
    found = {}
    for name in shared:
        models = replace(inputs, checkpoints=tuple(held[name].checkpoint for held in sides))
        found[name] = Share(sides[inputs.lead][name], models, tuple(held[name].prefix for held in sides))
    return found


def _found_by_component(
    inputs: Inputs, shared: Mapping[str, Share], recipe: Recipe, of: Origin, notes: list[str]
) -> _Found:
    """The same of several models, each by itself."""
    rows: dict[str, Names] = {}
    not_compared: dict[str, str] = {}
    left_out: set[str] = set()
    parts: list[tuple[DepthMap, Sequence[Region]]] = []
    relaid: list[tuple[Share, Inputs]] = []
    inside = 0
    for name, share in shared.items():
        said: list[str] = []
        one = _found(share.inputs, recipe, of, said, name)
        notes += [f"{name}: {note}" for note in said]
        parts.append((one.depth, share.regions))
        inside += one.missing_in_blocks
        relaid += [(share, one.inputs)] if one.inputs.relaid else []
        not_compared |= {share.prefix + tensor: why for tensor, why in one.not_compared.items()}
        left_out |= {share.prefix + tensor for tensor in one.left_out}
        for tensor, row in one.rows.items():
            rows[share.prefix + tensor] = tuple(
                None if there is None else prefix + there for prefix, there in zip(share.prefixes, row, strict=True)
            )
    for component in inputs.leading.components:
        if component.name not in shared:
            whose = f"in {inputs.called(inputs.lead)} alone"
            not_compared |= {component.prefix + tensor: whose for tensor in component.checkpoint.tensors}
            parts.append((DepthMap((), {}), Share(component, inputs, ()).regions))
    whole = with_layouts(inputs, relaid)
    return _Found(whole, rows, joined(parts), not_compared, frozenset(left_out), inside)


def _depth_alone(checkpoint: Checkpoint, recipe: Recipe, by_hand: Mapping[str, Any], notes: list[str]) -> DepthMap:
    """The depth of one checkpoint, of each of its components by itself."""
    if not checkpoint.components:
        return _depth(_parameters(checkpoint), checkpoint.config, by_hand, notes)
    parts = []
    for one in checkpoint.components:
        said: list[str] = []
        scaling = recipe.scaling_of(one.name) if by_hand else None
        own, own_by_hand = one.checkpoint, scaling.by_hand if scaling else {}
        depth = _depth(_parameters(own), own.config, own_by_hand, said, of_several=True)
        notes += [f"{one.name}: {note}" for note in said]
        parts.append((depth, Share(one, Inputs((), has_base=False, lead=0, of_an_edit=False), ()).regions))
    return joined(parts)


@gc_paused()
def _complete(inspection: Inspection) -> Inspection:
    """With every tensor's place, kind and coefficient, and what an edit would say of these."""
    parts, said = tuple(_parts(inspection)), list[str]()
    if inspection.of == "asked" and inspection.recipe.measured_rules and not inspection.has_base:
        rules = " and ".join(sorted(inspection.recipe.measured_rules))
        said.append(f"schedule: {rules} is measured on what a fine-tune changed: --base BASE shows the coefficients")
    if inspection.of == "asked" and inspection.knows_coefficients:
        one = len(inspection.checkpoints) <= 2
        said += unlike_lines(inspection.recipe, inspection.rules, inspection.depth, of_an_edit=one)
    return replace(inspection, parts=parts, notes=(*inspection.notes, *said))


def _parts(inspection: Inspection) -> Iterator[TensorEntry]:
    """Every tensor; a head that is tied to its embedding has that one's coefficient, as in an edit."""
    checkpoint, depth, rules = inspection.checkpoint, inspection.depth, inspection.rules
    values_for, scale_of = TensorValues(inspection.recipe, depth), inspection.recipe.method.scale_of
    kinds: dict[tuple[str, bool], Kind] = {}
    wide = {tensor.name for tensor in inspection.compared if any(s.dtype == "F64" for s in tensor.segment.sources)}
    wide |= {name for name, stored in checkpoint.tensors.items() if stored.info.dtype == "F64"}
    by_depth: dict[Place | Side, float] = {
        Place(stack, index): value
        for stack, values in layer_coefficients(inspection.recipe, rules, depth)
        for index, value in enumerate(values)
    }
    by_depth["before"], by_depth["after"] = outside_coefficients(inspection.recipe, rules)
    for name in sorted((name for name in checkpoint.tensors if name not in inspection.left_out), key=natural):
        place, info, dtype = depth.places.get(name), checkpoint.as_stored(name), checkpoint.tensors[name].info.dtype
        alike = (_LAYER_NUMBER.sub(".0.", name), place is not None)
        if alike not in kinds:
            kinds[alike] = kind_of(name, inside=place is not None)
        counts_as = name if place else inspection.stored_heads.get(name, name)
        coefficient = math.nan
        if inspection.knows_coefficients:
            coefficient = rules.coefficient(counts_as, depth, scale=scale_of(values_for(counts_as)))
            rounded_coefficient(name, coefficient, in_float64=name in wide)  # refuses what an edit would
        pattern, side = rules.filter_of(counts_as), None if place else depth.side_of(name)
        shared = pattern is None and coefficient == by_depth[place or depth.side_of(counts_as)]
        yield TensorEntry(name, info, place, side, kinds[alike], coefficient, shared, pattern, dtype)


_LAYER_NUMBER = re.compile(r"\.\d+\.")


def recipe_of(checkpoint: Checkpoint) -> Recipe | None:
    """The recipe in the folder of an output of ours; None where there is none.

    It is a record, and may be a stranger's: it is read for what it says, and nothing in it is looked up or run.

    Raises:
        RecipeError: it cannot be read.
        CheckpointError: it is a link that leaves the folder.
    """
    path = beside(checkpoint.folder, RECIPE) if checkpoint.folder else None
    url = checkpoint.hub_id if checkpoint.hub_id is not None and is_url(checkpoint.hub_id) else None
    return load_record(path, url) if path is not None else None


def _made_by(checkpoint: Checkpoint, notes: list[str]) -> Recipe | None:
    try:
        return recipe_of(checkpoint)
    except RecipeError as error:
        notes.append(f"its recipe cannot be read: {error.message}")
        return None


def _without_expressions(by_hand: Mapping[str, Any], notes: list[str]) -> Mapping[str, Any]:
    """What a stranger's recipe says of depth; without its expressions, which are not run, and what rests on them."""
    keys = [key for key in ("layers", "not_layers") if by_hand.get(key) is not None]
    if not keys:
        return by_hand
    if "layers" in keys and "(?P<index>" not in by_hand["layers"]:
        raise RecipeError(f"layers {by_hand['layers']!r} has no group `index`")
    notes += [
        f"its recipe's expression for {'the layers' if key == 'layers' else 'what is no layer'}, {by_hand[key]!r}, "
        f"is not run; --{key.replace('_', '-')} REGEX runs one"
        for key in keys
    ]
    return {}


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    return {name: tensor.info.numel for name, tensor in checkpoint.tensors.items()}


def _depth(
    parameters: Mapping[str, int],
    config: Mapping[str, Any],
    by_hand: Mapping[str, Any],
    notes: list[str],
    *,
    kept: Collection[str] | None = None,
    of_several: bool = False,
) -> DepthMap:
    """As an output that has the tensors of `kept`, or all, is scaled. One model of several may have no layers."""
    if of_several and not read_lists(list(parameters)):
        return DepthMap((), {})
    try:
        return depth_of_kept(parameters, parameters if kept is None else kept, config, by_hand, notes)
    except DepthError as error:
        notes.append(f"depth is unknown: {error.message}\n{error.hint or ''}".strip())
        return DepthMap((), {})


def _missing(recipe: Recipe, of: Origin) -> str:
    """What becomes of a tensor that some lack: as a planned merge says, else as in the recipe that the report gives."""
    return recipe.missing if of == "merge" else "ft"


def _missing_in_blocks(
    inputs: Inputs,
    parameters: Mapping[str, int],
    matched: tuple[Mapping[str, Names], Mapping[str, Names]],
    by_hand: Mapping[str, Any],
) -> int:
    """How many tensors inside blocks some side lacks, as the plan of a merge counts them."""
    try:
        return len(missing_in_blocks(inputs, *matched, places_of_all(inputs, parameters, matched[1], by_hand)))
    except DepthError:
        return 0


def _rules(recipe: Recipe, depth: DepthMap, shared: Collection[str] = ()) -> Rules:
    """The coefficients. `alpha: auto` is 1/N where the merged task vector is the sum; else it is to be measured. Of
    several models those that are taken whole have 1 or 0; so have those that are not in `shared`.
    """
    said = recipe.parameters or any(source.parameters for source in recipe.merged)
    plain = not said and recipe.plain_sum(recipe.values("", 0.0))
    rules = recipe.rules(depth, alpha=1 / len(recipe.merged) if plain else None)
    rules = _as_recorded(rules, recipe, depth)
    own = dict(rules.components)
    for name in dict.fromkeys(region.component for region in depth.regions):
        rule = recipe.rule_of(name)
        if rule is None or rule in ("keep", "base") or name not in shared:
            of_base = rule == "base" or (rule is None and recipe.like == "base" and len(recipe.merged) > 1)
            own[name] = Rules(Listed((0.0 if of_base else 1.0,)), outside="base" if of_base else "keep")
    return replace(rules, components=own)


def _as_recorded(rules: Rules, recipe: Recipe, depth: DepthMap) -> Rules:
    """The rules; where an output's recipe has a depth rule that was measured, with the coefficients that it records."""
    if not recipe.measured_rules or not recipe.layers:
        return rules
    recorded: dict[str, dict[int, float]] = {}
    for layer in recipe.layers:
        recorded.setdefault(layer.stack, {})[layer.index] = layer.coefficient

    def known(own: Rules) -> Rules:
        stacks, scale = dict(own.stacks), own.gamma * scale_at(recipe, 0.0)
        for stack in depth.stacks:
            values = recorded.get(stack.name, {})
            if scale and isinstance(stacks.get(stack.name), Scored) and values.keys() == set(range(stack.layers)):
                stacks[stack.name] = Listed(tuple(values[index] / scale for index in range(stack.layers)))
        return replace(own, stacks=stacks)

    return replace(known(rules), components={name: known(own) for name, own in rules.components.items()})


def _refuse_twice(opened: Sequence[Checkpoint]) -> None:
    paths: dict[str, str] = {}
    for checkpoint in opened:
        path = checkpoint.with_part(checkpoint.hub_id or os.path.realpath(checkpoint.path))
        if path in paths:
            raise RecipeError(f"{paths[path]} and {checkpoint.name} are one checkpoint", hint="Name it once.")
        paths[path] = checkpoint.name


def _pairing(base: str, names: Sequence[str], recipe: Recipe, like: Like) -> Recipe:
    """The recipe by which tensors are paired: whatever they have in common, by the names of the first fine-tune or of
    the base.
    """
    sources = [{"model": name} for name in names]
    settled: dict[str, Any] = {"like": like, "missing": "skip"}
    if recipe.vocabulary_source is None:
        settled["resize"] = "ft"
    else:
        settled["tokenizer_source"] = recipe.vocabulary_source
    return make_recipe({"base_model": base, "models": sources, "lines": recipe.lines, **settled}, where="inspect")


def _lacking(inputs: Inputs, incomplete: Mapping[str, Names]) -> dict[str, str]:
    """The tensors that some lack, with who has them."""
    lacking = {}
    for name, row in incomplete.items():
        owners = (inputs.called(side) for side, there in enumerate(row) if there is not None)
        lacking[name] = f"in {' and '.join(owners)} alone"
    return lacking


def _compared(
    inputs: Inputs, specs: Sequence[TensorSpec], rows: Mapping[str, Names], notes: list[str]
) -> list[Compared]:
    """Where the float entries lie that all have."""
    for spec in specs:
        if spec.rows and spec.table is None:
            others = " and ".join(f"{number:,}" for number in sorted(spec.rows[0]))
            what = f"{spec.rows[1]:,} rows in {inputs.called(1)}, {others} in others"
            notes.append(f"{printable(spec.name)}: {what}; only those that all have are compared")
    return [
        Compared(spec.name, rows[spec.name], in_common(spec))
        for spec in specs
        if not any(source.dtype in EXACT_DTYPES for source in spec.segments[0].sources)
    ]


def _note_dtypes(inputs: Inputs, compared: Sequence[Compared], notes: list[str]) -> None:
    """Say so where the base was stored in another dtype: then rounding counts as change."""
    for at, checkpoint in enumerate(inputs.models):
        pairs = {
            (tensor.segment.base.dtype, tensor.segment.models[at].dtype)
            for tensor in compared
            if tensor.segment.base is not None
        }
        differing = sorted({f"{ours} on {theirs}" for theirs, ours in pairs if ours != theirs})
        if differing:
            notes.append(f"{checkpoint.name} is {', '.join(differing)}: rounding counts as change")
