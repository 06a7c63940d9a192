"""Recipe and headers in, plan out. All that can be refused before the first tensor is read is refused here.

What a recipe needs to know of the numbers in the tensors (`Needs`) is measured by the engine, and `resolve` puts it
in: a plan without needs has been resolved. Of tensor data only complex numbers are read here, and nothing needs torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from lines_cli.checkpoint.contents import factors_among
from lines_cli.checkpoint.header import EXACT_DTYPES, itemsize
from lines_cli.checkpoint.reader import gc_paused
from lines_cli.errors import (
    DepthError,
    RecipeError,
    printable,
)
from lines_cli.methods import ByMagnitude
from lines_cli.plan.align import aligned_names
from lines_cli.plan.coefficients import coefficient_of, unlike_lines
from lines_cli.plan.complex_numbers import compared
from lines_cli.plan.depth import depth_of_kept, places_of_all
from lines_cli.plan.identity import named_inputs, refuse_two_names
from lines_cli.plan.inputs import Inputs, notes_of_files
from lines_cli.plan.layout import lay_out_files, metadata_like
from lines_cli.plan.match import Names, match_names, nothing_in_common, settle_missing
from lines_cli.plan.plan import Plan
from lines_cli.plan.resolve import UNSCALED, decided, settle_misfits
from lines_cli.plan.sidecars import with_sidecars
from lines_cli.plan.statistics import NOTHING_MEASURED, Needs
from lines_cli.plan.tensors import STORED, TensorSpec, refuse_empty, refuse_misfits, settle_empty, specify_tensors
from lines_cli.plan.vocabulary import find_vocabulary, notes_of
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap, Place
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
    notes += _factor_notes(inputs)
    inputs, own = aligned_names(inputs, notes, prefix=recipe.prefix, strict=recipe.missing_in_blocks is None)
    matched = match_names(inputs, own, resize=recipe.resize != "error", notes=notes)
    parameters = inputs.parameters(own)
    try:
        places = _places_of_all(recipe, inputs, parameters, matched[1])
    except DepthError:
        if recipe.missing == "error":  # which is why the names make no sense, as likely as not
            settle_missing(inputs, own, matched, {}, recipe, notes)
        if not matched[0]:
            raise nothing_in_common(inputs) from None
        raise
    rows = settle_missing(inputs, own, matched, places, recipe, notes)
    depth = _depth(recipe, inputs, parameters, rows, notes)
    rules = (recipe.lines or UNSCALED).rules(depth)
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
    vocabulary, difference = find_vocabulary(recipe, inputs, rows, depth.places, notes)
    specs_of = specify_tensors(recipe, inputs, depth, rules, rows, vocabulary or difference)
    specified = list(compared(specs_of, inputs))
    specified = settle_empty(specified, recipe, inputs, rows, notes)
    refuse_empty(inputs, {spec.name: rows[spec.name] for spec in specified if spec.misfit})
    specified = settle_misfits(specified, recipe, inputs, rows, depth, rules, notes)
    refuse_misfits(specified, recipe, inputs, difference)
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

    files, placed = lay_out_files(
        {name: (spec.dtype, spec.shape) for name, spec in specs.items()},
        stem=inputs.leading.stem,
        one_file=output.name if is_one_file(output) else None,
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


def _larger_than_the_base(plan: Plan) -> Iterator[str]:
    """That an edit's output is much larger than its base, because the fine-tune is stored in wider numbers."""
    if not plan.inputs.of_an_edit or plan.recipe.dtype is not None:
        return
    infos = (
        [stored.info for stored in plan.inputs.checkpoints[0].tensors.values()],
        [tensor.info for tensor in plan.tensors],
    )
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
    recipe: Recipe, inputs: Inputs, names: Iterable[str], incomplete: Mapping[str, Names]
) -> dict[str, Place]:
    """Which tensors lie inside blocks, if some side lacks any; none where depth is unknown and makes no difference."""
    if not incomplete:
        return {}
    try:
        return places_of_all(inputs, names, incomplete, recipe.lines.by_hand if recipe.lines else {})
    except DepthError:
        if _needs_depth(recipe):
            raise
        return {}


def _needs_depth(recipe: Recipe) -> bool:
    return bool(recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary


def _depth(
    recipe: Recipe, inputs: Inputs, parameters: Mapping[str, int], rows: Mapping[str, Names], notes: list[str]
) -> DepthMap:
    try:
        by_hand = recipe.lines.by_hand if recipe.lines else {}
        depth = depth_of_kept(parameters, rows, inputs.config_of(inputs.lead), by_hand, notes)
    except DepthError as error:
        if any(source.layer_range for source in recipe.models):
            raise RecipeError(f"layer_range cannot be checked: {error.message}", hint=error.hint) from error
        if _needs_depth(recipe):
            raise
        notes.append(f"depth is unknown, but makes no difference, for all coefficients are the same: {error.message}")
        return DepthMap((), {})
    for source in recipe.models:
        if source.layer_range and all(source.layer_range != (0, stack.layers) for stack in depth.stacks):
            there = " and ".join(f"{stack.name!r} of {stack.layers}" for stack in depth.stacks)
            raise RecipeError(
                f"layer_range {list(source.layer_range)} of {source.model} is not a whole stack; there is {there}",
                hint="lines merges whole models; it does not stack parts of them.",
            )
    return depth


def _needs(recipe: Recipe, depth: DepthMap, rules: Rules, specs: Iterable[TensorSpec]) -> Needs:
    """What has to be measured. `rules` give NaN where a coefficient depends on alpha, and alpha is not known."""
    method = recipe.method
    merged = [spec for spec in specs if spec.paired and spec.dtype not in EXACT_DTYPES]
    values = list({id(spec.values): spec.values for spec in merged}.values())
    by_rank = isinstance(method.sparsifier, ByMagnitude) and any(map(method.sparsifier.drops, values))
    statistics = frozenset[str]().union(*map(method.needs, values))
    return Needs(
        thresholds=by_rank,
        l1="l1" in statistics,
        products="angles" in statistics,
        majority=len(recipe.merged) > 1 and "majority" in statistics,
        norms=not all(map(method.plain_sum, values))
        and any(math.isnan(coefficient_of(recipe, depth, rules, spec)) for spec in merged),
    )
