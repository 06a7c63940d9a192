"""Recipe and headers in, plan out. All that can be refused before the first tensor is read is refused here.

What a recipe needs to know of the numbers in the tensors (`Needs`) is measured by the engine, and `resolve` puts it
in: a plan without needs has been resolved. Of tensor data only complex numbers are read here, and nothing needs torch.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from lines_cli.checkpoint.contents import factors_among
from lines_cli.checkpoint.header import EXACT_DTYPES, TensorInfo, itemsize
from lines_cli.checkpoint.reader import gc_paused
from lines_cli.errors import (
    DepthError,
    LinesError,
    MismatchError,
    RecipeError,
    printable,
)
from lines_cli.methods import ByMagnitude
from lines_cli.plan.align import aligned_names
from lines_cli.plan.coefficients import coefficient_of, unlike_lines
from lines_cli.plan.complex_numbers import compared
from lines_cli.plan.components import Share, in_one_shape, shares_of, taken_whole, together, with_layouts
from lines_cli.plan.depth import depth_of_kept, places_of_all
from lines_cli.plan.fp8 import in_fp8
from lines_cli.plan.identity import named_inputs, refuse_two_names
from lines_cli.plan.inputs import Inputs, notes_of_files
from lines_cli.plan.layout import OutputFile, lay_out_files, metadata_like
from lines_cli.plan.match import Names, match_names, missing_in_blocks, nothing_in_common, settle_missing
from lines_cli.plan.plan import Plan
from lines_cli.plan.resolve import decided, settle_misfits
from lines_cli.plan.sidecars import with_sidecars
from lines_cli.plan.statistics import NOTHING_MEASURED, Needs
from lines_cli.plan.tensors import STORED, TensorSpec, refuse_empty, refuse_misfits, settle_empty, specify_tensors
from lines_cli.plan.vocabulary import Difference, Vocabulary, find_vocabulary, notes_of
from lines_cli.plan.weights import rules_among, without_rules
from lines_cli.recipe.schema import ComponentRule, Recipe, Scaling
from lines_cli.scaling.find_depth import DepthMap, Place, Region, joined
from lines_cli.scaling.numbered_lists import read_lists
from lines_cli.scaling.schedule import Rules
from lines_cli.storage.destination import is_one_file


@gc_paused()
def make_plan(recipe: Recipe, inputs: Inputs, output: Path) -> Plan:
    """Decide every byte of the output, as far as it does not depend on the numbers in the inputs.

    Raises:
        MismatchError: names, shapes or dtypes of the inputs do not fit and the recipe does not say what to do.
        DepthError: which tensor stands at which depth cannot be decided.
        RecipeError: a stack or a filter names nothing there, or a coefficient is beyond float32.
    """
    notes: list[str] = [*recipe.notes, *notes_of_files(inputs.checkpoints)]
    inputs = in_one_shape(inputs, notes)
    notes += _factor_notes(inputs)
    shares = shares_of(recipe, inputs, notes)
    vocabulary: Vocabulary | None = None
    difference: Difference | None = None
    if shares:
        found = _matched_by_component(recipe, inputs, shares, notes)
        inputs, rows, depth, vocabulary, difference = found
    else:
        inputs, rows, depth, _ = _matched(recipe, inputs, recipe.lines, notes)
    rules = recipe.rules(depth)
    notes += [
        f"filter {part!r} under parameters matches no tensor name, so it has no effect"
        for part in sorted(recipe.filters)
        if not any(part in name for name in rows)
    ]
    if recipe.scale_varies_by_name:
        notes.append(
            f"{recipe.method.scale} differs by name; the coefficients shown are those of names that no filter of it "
            "matches"
        )
    if not shares:
        vocabulary, difference = find_vocabulary(recipe, inputs, rows, depth.places, notes)
    specs_of = specify_tensors(recipe, inputs, depth, rules, rows, vocabulary or difference)
    specified = list(compared(specs_of, inputs))
    specified = settle_empty(specified, recipe, inputs, rows, notes)
    refuse_empty(inputs, {spec.name: rows[spec.name] for spec in specified if spec.misfit})
    _refuse_wrong_values(recipe, specified)
    specified = settle_misfits(specified, recipe, inputs, rows, depth, rules, notes)
    try:
        refuse_misfits(specified, recipe, inputs, difference)
    except MismatchError as error:
        wrong = {depth.component_of(spec.name) for spec in specified if spec.misfit}
        raise _in_component(error, [share for share in shares if share.name in wrong], shares) from None
    specified += taken_whole(shares, recipe, inputs)
    specs = {spec.name: spec for spec in specified}
    resized = {other: spec.rows[1] for spec in specs.values() if spec.rows for other in sorted(spec.rows[0])}
    if vocabulary is not None:
        notes += notes_of(vocabulary, inputs, [spec.table for spec in specs.values() if spec.table])
    elif resized:
        keeping = inputs.called(0 if recipe.resize == "base" or not inputs.has_base else 1)
        shared = min(*resized, *resized.values())
        kept = ", ".join(f"{rows:,}" for rows in sorted(set(resized.values())))
        others = " and ".join(f"{rows:,}" for rows in sorted(resized))
        notes.append(
            f"token embeddings and heads keep the {kept} rows of {keeping} (others: {others}): the first {shared:,} "
            "are merged, the rest is as it is there; what only others have is dropped"
        )

    specs = in_fp8(specs, recipe, inputs, rows, notes)

    tensors = {name: (spec.dtype, spec.shape) for name, spec in specs.items()}
    one_file = output.name if is_one_file(output) else None
    if one_file is None and any(share.component.folder is not None for share in shares):
        files, placed = _laid_out_by_component(shares, tensors, recipe.max_shard_size)
    else:
        files, placed = lay_out_files(
            tensors,
            stem=inputs.leading.stem,
            one_file=one_file,
            max_shard_size=recipe.max_shard_size,
            metadata=metadata_like(inputs.leading.metadata),
        )
    plan = Plan(
        recipe,
        inputs,
        tuple(file for checkpoint in inputs.checkpoints for file in checkpoint.files),
        output,
        tuple(files),
        (),
        depth,
        rules,
        _needs(recipe, depth, rules, specs.values()),
        NOTHING_MEASURED,
        (),
        (*notes, *depth.notes),
        resized,
        shares,
        vocabulary,
    )
    refuse_two_names(recipe, named_inputs(plan))
    plan = decided(plan, ((specs[name], number, info) for name, number, info in placed))
    said = (*unlike_lines(recipe, rules, depth, of_an_edit=inputs.of_an_edit), *_larger_than_the_base(plan))
    plan = replace(plan, notes=(*plan.notes, *said))
    if is_one_file(output) and vocabulary is not None and vocabulary.new:
        raise RecipeError(
            f"the output gets {vocabulary.new:,} new tokens, and a single file holds no tokenizer that knows them",
            hint="Write a folder: -o OUT.",
        )
    return plan if is_one_file(output) else with_sidecars(plan)


def _matched(
    recipe: Recipe, inputs: Inputs, scaling: Scaling | None, notes: list[str], *, of_several: bool = False
) -> tuple[Inputs, dict[str, Names], DepthMap, int]:
    """Which tensors of models belong together, and where they stand.

    Args:
        recipe: says how disagreements are settled.
        inputs: the models.
        scaling: of these; None where the recipe has none.
        notes: gets a line for everything that a person should know of.
        of_several: whether they are one component of several, which may have no layers.

    Returns:
        The inputs, in one layout; output tensor name -> where it is read from; the depth; how many tensors inside
        blocks some side lacks.
    """
    inputs, own = aligned_names(inputs, notes, prefix=recipe.prefix, strict=recipe.missing_in_blocks is None)
    resize = recipe.resize != "error" or recipe.vocabulary_source is not None or recipe.tokenizer is not None
    matched = match_names(inputs, own, resize=resize, notes=notes)
    parameters = inputs.parameters(own)
    if of_several and not read_lists(list(parameters)):
        rows = settle_missing(inputs, own, matched, {}, recipe.model_copy(update={"missing_in_blocks": None}), notes)
        notes.append("it has no layers, and is scaled as what lies outside the blocks")
        return inputs, rows, DepthMap((), {}), 0
    try:
        places = _places_of_all(recipe, inputs, scaling, parameters, matched[1])
    except DepthError:
        if recipe.missing == "error":  # which is why the names make no sense, as likely as not
            settle_missing(inputs, own, matched, {}, recipe, notes)
        if not matched[0]:
            raise nothing_in_common(inputs) from None
        raise
    inside = len(missing_in_blocks(inputs, *matched, places)) if recipe.missing_in_blocks else 0
    if of_several and not inside:
        recipe = recipe.model_copy(update={"missing_in_blocks": None})
    rows = settle_missing(inputs, own, matched, places, recipe, notes)
    return inputs, rows, _depth(recipe, inputs, scaling, parameters, rows, notes), inside


def _matched_by_component(
    recipe: Recipe, inputs: Inputs, shares: Sequence[Share], notes: list[str]
) -> tuple[Inputs, dict[str, Names], DepthMap, Vocabulary | None, Difference | None]:
    """The same of several models: each by itself, by its own config, and then all by the names of the whole; and how
    the rows of their vocabularies are paired.
    """
    edited = [share for share in shares if share.side is None]
    groups = _groups(recipe, edited)
    several = len(edited) > 1
    with_prefix = recipe if not recipe.prefix else None
    rows: dict[str, Names] = {}
    parts: list[tuple[DepthMap, Sequence[Region]]] = []
    relaid: list[tuple[Share, Inputs]] = []
    tokens: list[tuple[Vocabulary | None, Difference | None]] = []
    inside = 0
    for group in groups:
        alone = len(group) == 1
        models = group[0].inputs if alone else together(group, inputs)
        scaling = recipe.scaling_of(group[0].name if alone else None)
        said: list[str] = []
        own_recipe = recipe
        if several and recipe.prefix and not _has_prefix(models, recipe.prefix):
            own_recipe = recipe.model_copy(update={"prefix": None})
        else:
            with_prefix = own_recipe
        try:
            models, own, depth, lacking = _matched(own_recipe, models, scaling, said, of_several=True)
            tokens.append(find_vocabulary(recipe, models, own, depth.places, said if alone else []))
        except LinesError as error:
            raise _in_component(error, group, shares) from error
        inside += lacking
        relaid += [(group[0], models)] if alone and models.relaid else []
        notes += [f"{group[0].name}: {note}" if alone else note for note in said]
        parts.append((depth, [region for share in group for region in share.regions]))
        prefix, before = group[0].prefix, group[0].prefixes
        for name, row in own.items():
            rows[prefix + name] = tuple(
                None if there is None else prefix + there for prefix, there in zip(before, row, strict=True)
            )
    if edited and with_prefix is None:
        raise MismatchError(f"prefix {recipe.prefix!r}: no tensor of any component is called so on one side alone")
    if recipe.missing_in_blocks and not inside:
        key = "--missing-in-blocks" if inputs.of_an_edit else "missing_in_blocks:"
        raise MismatchError(
            f"{key} {recipe.missing_in_blocks}, but no tensor inside blocks is missing on any side",
            hint="Leave it out; or is it another checkpoint that is meant?",
        )
    regions = tuple(region for share in shares for region in share.regions)
    vocabulary, difference = next(filter(any, tokens), (None, None))  # those of one model at most have a tokenizer
    return with_layouts(inputs, relaid), rows, replace(joined(parts), regions=regions), vocabulary, difference


def _groups(recipe: Recipe, edited: Sequence[Share]) -> list[Sequence[Share]]:
    """What is looked at as one model: each component; but in one file, where its names are said by hand, all of it.

    Raises:
        RecipeError: what is said by hand is said of several models.
    """
    by_hand = any((recipe.lines.by_hand if recipe.lines else {}).values())
    if not by_hand or len(edited) < 2:
        return [[share] for share in edited]
    if any(share.component.folder is not None for share in edited):
        name = edited[0].name
        raise RecipeError(
            f"what is said of depth is of one model, and several are edited: {', '.join(s.name for s in edited)}",
            hint=f"Edit one of them, with --component {name}; or say it of one in a recipe, as in components: "
            f"{{{name}: {{not_layers: REGEX}}}}.",
        )
    return [edited]


def _has_prefix(inputs: Inputs, prefix: str) -> bool:
    """Whether names of one side begin with a prefix, and of another do not."""
    try:
        aligned_names(inputs, [], prefix=prefix)
    except MismatchError:
        return False
    return True


def _in_component(error: LinesError, group: Sequence[Share], shares: Sequence[Share]) -> LinesError:
    """The same refusal, with the name of the component that it is about, and the way to leave that as it is."""
    if len(group) == 1 and group[0].component.folder is not None:
        name = group[0].name
        error.message = f"{name}: {error.message}"
        others = [share.name for share in shares if share.side is None and share is not group[0]]
        if others:
            keep = f"To take {name} as it is: {' '.join(f'--component {other}' for other in others)}"
            said = f"{keep} (in a recipe components: {{{name}: keep}})."
            error.hint = f"{error.hint}\n{said}" if error.hint else said
    return error


def _laid_out_by_component(
    shares: Sequence[Share], tensors: Mapping[str, tuple[str, tuple[int, ...]]], max_shard_size: int
) -> tuple[list[OutputFile], list[tuple[str, int, TensorInfo]]]:
    """Each component in its own folder, under its own names (`lay_out_files`)."""
    files: list[OutputFile] = []
    placed: list[tuple[str, int, TensorInfo]] = []
    region_of = DepthMap((), {}, regions=tuple(region for share in shares for region in share.regions)).component_of
    held: dict[str | None, dict[str, tuple[str, tuple[int, ...]]]] = defaultdict(dict)
    for name, tensor in tensors.items():
        held[region_of(name)][name] = tensor
    for share in shares:
        checkpoint = share.inputs.leading
        own, at = lay_out_files(
            {name.removeprefix(share.prefix): tensor for name, tensor in held[share.name].items()},
            stem=checkpoint.stem,
            one_file=None,
            max_shard_size=max_shard_size,
            metadata=metadata_like(checkpoint.metadata),
        )
        placed += [(share.prefix + name, len(files) + number, info) for name, number, info in at]
        folder = f"{share.component.folder}/" if share.component.folder else ""
        files += [replace(file, name=folder + file.name, prefix=share.prefix) for file in own]
    return files, placed


def _larger_than_the_base(plan: Plan) -> Iterator[str]:
    """That an edit's output is much larger than its base, because the fine-tune is stored in wider numbers."""
    if not plan.inputs.of_an_edit or plan.recipe.dtype is not None:
        return
    infos = (
        [stored.info for stored in plan.inputs.checkpoints[0].tensors.values()],
        [tensor.info for tensor in plan.tensors if tensor.name not in plan.taken_whole],
    )
    if len({info.dtype for side in infos for info in side}) < 2:
        return
    names = {there: name for name, there in STORED.items()}
    most = [Counter[str]() for _ in infos]
    for entries, side in zip(most, infos, strict=True):
        for info in side:
            entries[info.dtype] += info.numel
    of_base, ours = (entries.most_common(1)[0][0] if entries else "" for entries in most)
    if of_base not in names or ours not in names or itemsize(ours) <= itemsize(of_base):
        return
    before, after = (sum(info.numel * itemsize(info.dtype) for info in side) for side in infos)
    if after >= _MUCH_LARGER * before:
        yield (
            f"the output is {after / before:.2g} times the size of the base, for the fine-tune is {names[ours]} and "
            f"the base {names[of_base]}: --dtype {names[of_base]} (in a recipe dtype:) stores it as the base is"
        )


_MUCH_LARGER = 1.5


def _factor_notes(inputs: Inputs) -> Iterator[str]:
    """A line for each input that has an adapter's factors in it."""
    for checkpoint in {one.name: one for one in inputs.checkpoints}.values():
        if factors := factors_among({name: stored.info for name, stored in checkpoint.tensors.items()}):
            yield (
                f"{len(factors):,} tensor(s) of {checkpoint.name} are factors of an adapter, such as "
                f"{printable(factors[0])}: what is done to each is not the same as to scale their product"
            )


def _places_of_all(
    recipe: Recipe,
    inputs: Inputs,
    scaling: Scaling | None,
    names: Iterable[str],
    incomplete: Mapping[str, Names],
) -> dict[str, Place]:
    """Which tensors lie inside blocks, if some side lacks any; none where depth is unknown and makes no difference."""
    if not incomplete:
        return {}
    try:
        return places_of_all(inputs, names, incomplete, scaling.by_hand if scaling else {})
    except DepthError:
        if _needs_depth(recipe, scaling):
            raise
        return {}


def _needs_depth(recipe: Recipe, scaling: Scaling | None) -> bool:
    return bool(scaling and scaling.needs_depth) or recipe.parameters_vary


def _depth(
    recipe: Recipe,
    inputs: Inputs,
    scaling: Scaling | None,
    parameters: Mapping[str, int],
    rows: Mapping[str, Names],
    notes: list[str],
) -> DepthMap:
    try:
        by_hand = scaling.by_hand if scaling else {}
        depth = depth_of_kept(parameters, rows, inputs.config_of(inputs.lead), by_hand, notes)
    except DepthError as error:
        if _needs_depth(recipe, scaling):
            raise
        notes.append(f"depth is unknown, but makes no difference, for all coefficients are the same: {error.message}")
        return DepthMap((), {})
    return depth


def _refuse_wrong_values(recipe: Recipe, specs: Sequence[TensorSpec]) -> None:
    """Refuse parameters that contradict each other where they come to a tensor.

    Raises:
        RecipeError: names the tensor.
    """
    first = {id(spec.values): spec for spec in reversed(specs) if spec.paired and spec.dtype not in EXACT_DTYPES}
    for spec in reversed(first.values()):
        if (why := recipe.method.wrong(without_rules(recipe, spec.values))) is not None:
            raise RecipeError(f"parameters of {printable(spec.name)}: {why}")


def _needs(recipe: Recipe, depth: DepthMap, rules: Rules, specs: Iterable[TensorSpec]) -> Needs:
    """What has to be measured. `rules` give NaN where a coefficient depends on alpha, and alpha is not known; or on
    what a depth rule measures.
    """
    method = recipe.method
    rules_by_alpha = _as_if_linear(recipe).rules(depth) if recipe.measured_rules else rules
    merged = [spec for spec in specs if spec.paired and spec.dtype not in EXACT_DTYPES]
    values = list({id(spec.values): spec.values for spec in merged}.values())
    by_rank = isinstance(method.sparsifier, ByMagnitude) and any(map(method.sparsifier.drops, values))
    statistics = frozenset[str]().union(*map(method.needs, values))
    return Needs(
        thresholds=by_rank,
        l1="l1" in statistics,
        sums="sums" in statistics and (len(recipe.merged) > 1 or not all(map(method.one_is_itself, values))),
        majority=len(recipe.merged) > 1 and "majority" in statistics,
        norms=not all(map(recipe.plain_sum, values))
        and any(math.isnan(coefficient_of(recipe, depth, rules_by_alpha, spec)) for spec in merged),
        weights=any(rules_among(recipe, own) for own in values),
        scores=_rules_to_measure(recipe, depth, merged),
    )


def _as_if_linear(recipe: Recipe) -> Recipe:
    """The recipe with schedules that follow from the depth alone, where they are to be measured."""
    assert recipe.lines is not None
    linear = {"schedule": "linear"}
    components = {
        name: rule.model_copy(update=linear) if isinstance(rule, ComponentRule) and rule.schedule else rule
        for name, rule in recipe.components.items()
    }
    return recipe.model_copy(update={"lines": recipe.lines.model_copy(update=linear), "components": components})


def _rules_to_measure(recipe: Recipe, depth: DepthMap, merged: Sequence[TensorSpec]) -> tuple[str, ...]:
    """The depth rules that some coefficient rests on.

    Raises:
        RecipeError: a stack whose coefficients rest on one has no matrices to look at.
    """
    asked = recipe.measured_rules
    if not asked:
        return ()
    rules = recipe.rules(depth, alpha=0.0)
    resting = {
        place.stack
        for spec in merged
        if (place := depth.places.get(spec.counts_as)) and math.isnan(coefficient_of(recipe, depth, rules, spec))
    }
    with_matrices = {place.stack for spec in merged if (place := depth.places.get(spec.name)) and len(spec.shape) > 1}
    for stack in sorted(resting - with_matrices):
        raise RecipeError(
            f"lines.schedule: {recipe.lines.schedule if recipe.lines else ''} looks at the matrices of each layer, and "
            f"{printable(stack) or 'the stack'} has none that are merged",
            hint="Take a schedule that follows from the depth alone, such as linear or cosine.",
        )
    return tuple(sorted(asked)) if resting else ()
