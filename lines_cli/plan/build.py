"""Recipe and headers in, plan out. All that can be refused before the first tensor is read is refused here.

What a recipe needs to know of the numbers in the tensors (`Needs`) is measured by the engine, and `resolve` puts it
in: a plan without needs has been resolved. Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.header import EXACT_DTYPES, Known, TensorInfo
from lines_cli.checkpoint.reader import Checkpoint, no_collecting, open_checkpoint
from lines_cli.checkpoint.sidecars import Card, Sidecar, carry_over, index_file, model_card
from lines_cli.errors import (
    ChangedInputError,
    CheckpointError,
    DepthError,
    MismatchError,
    OutputError,
    RecipeError,
    printable,
    some,
)
from lines_cli.hub.download import locate
from lines_cli.methods import ByMagnitude, Values
from lines_cli.methods.registry import package_of
from lines_cli.plan.layout import lay_out_files
from lines_cli.plan.match import Sides, aligned_names, is_vocabulary, pair_tensors
from lines_cli.plan.plan import NOTHING_MEASURED, Needs, Plan, Statistics, TensorPlan
from lines_cli.plan.tensors import STORED, Draft, Piece, draft_tensors, refuse_misfits
from lines_cli.recipe.schema import Recipe, Scaling
from lines_cli.recipe.yaml_file import dump_recipe, dump_record, is_by_lines, load_record
from lines_cli.scaling.find_depth import DepthMap, find_depth
from lines_cli.scaling.schedule import Rules
from lines_cli.storage.beside import beside
from lines_cli.storage.destination import is_one_file, placed
from lines_cli.storage.digest import FileRecord, altered, file_digest, record_of
from lines_cli.storage.names import MODEL_CARD, RECIPE
from lines_cli.version import __version__


def open_inputs(recipe: Recipe, *, quiet: bool = False) -> Sides:
    """Open the recipe's base and models, fetching from the Hub what is no path; `quiet` without progress bars.

    Raises:
        CheckpointError: one cannot be found or read.
    """
    opened: dict[str, Checkpoint] = {}
    known: Known = {}

    def opening(name: str) -> Checkpoint:
        if name not in opened:
            found = locate(name, quiet=quiet)
            opened[name] = open_checkpoint(found.path, name=found.name, hub_id=found.hub_id, known=known)
        return opened[name]

    base = [opening(recipe.base_model)] if recipe.base_model is not None and recipe.subtracts_base else []
    return sides_of(recipe, *base, *(opening(source.model) for source in recipe.merged))


def sides_of(recipe: Recipe, *checkpoints: Checkpoint) -> Sides:
    """The inputs in their roles: the base first, if the recipe subtracts one, then the models of `recipe.merged`."""
    has_base = recipe.subtracts_base
    first_model = 1 if has_base else 0
    named = [source.model for source in recipe.merged]
    lead = 0 if has_base or recipe.base_model not in named else named.index(str(recipe.base_model))
    if recipe.like == "ft":
        lead = first_model
    return Sides(checkpoints, has_base, lead, recipe.like == "ft" and len(checkpoints) == 2 and has_base)


@no_collecting()
def make_plan(recipe: Recipe, sides: Sides, output: Path) -> Plan:
    """Decide every byte of the output, as far as it does not depend on the numbers in the inputs.

    Raises:
        MismatchError: names, shapes or dtypes of the inputs do not fit and the recipe does not say what to do.
        DepthError: which tensor stands at which depth cannot be decided.
        RecipeError: a stack or a filter names nothing there, or a coefficient is beyond float32.
    """
    notes: list[str] = list(recipe.notes)
    own = aligned_names(sides, notes)
    rows = pair_tensors(sides, own, recipe, notes)
    depth = _depth(recipe, sides, chain.from_iterable(own), notes)
    rules = (recipe.lines or UNSCALED).rules(depth)
    notes += [
        f"filter {part!r} among the parameters is part of no tensor name, and says nothing"
        for part in sorted(recipe.filters)
        if not any(part in name for name in rows)
    ]
    if recipe.scale_varies_by_name:
        notes.append(
            f"{recipe.method.scale} differs by name; the coefficients shown are those of names that no filter of it "
            "matches"
        )
    drafted = draft_tensors(recipe, sides, depth, rules, rows)
    refuse_misfits(drafted, sides)
    drafts = {draft.name: draft for draft in drafted}
    resized = {other: draft.rows[1] for draft in drafts.values() if draft.rows for other in sorted(draft.rows[0])}
    if resized:
        keeping = sides.called(0 if recipe.resize == "base" or not sides.has_base else 1)
        shared = min(*resized, *resized.values())
        kept = ", ".join(f"{rows:,}" for rows in sorted(set(resized.values())))
        others = " and ".join(f"{rows:,}" for rows in sorted(resized))
        notes.append(
            f"token embeddings and heads keep the {kept} rows of {keeping} (others: {others}): the first {shared:,} "
            "are merged, the rest is as it is there; what only others have is dropped"
        )

    files, placed = lay_out_files(
        {name: (draft.dtype, draft.shape) for name, draft in drafts.items()},
        stem=sides.leading.stem,
        one_file=output.name if is_one_file(output) else None,
        max_shard_size=recipe.max_shard_size,
    )
    plan = Plan(
        recipe,
        sides,
        tuple(file for checkpoint in sides.checkpoints for file in checkpoint.files),
        output,
        tuple(files),
        (),
        depth,
        rules,
        _needs(recipe, depth, rules, drafts.values()),
        NOTHING_MEASURED,
        (),
        (*notes, *depth.notes),
        resized,
    )
    _refuse_two_names(recipe, _named(plan))
    plan = _decided(plan, ((drafts[name], number, info) for name, number, info in placed))
    return plan if is_one_file(output) else _with_sidecars(plan)


@no_collecting()
def resolve(plan: Plan, statistics: Statistics) -> Plan:
    """The plan with what was measured in it: every coefficient a number, every operation decided.

    Raises:
        RecipeError: a coefficient is beyond float32.
        MismatchError: alpha cannot be measured, because nothing was merged, or something is not finite.
    """
    norms = statistics.norms
    if norms is not None and not (0 < norms.merged < math.inf and norms.total < math.inf):
        raise MismatchError(
            f"alpha: auto cannot be measured: the merged task vector's L1 norm is {norms.merged:g}, the sum's "
            f"{norms.total:g}",
            hint="The models are the same as their base, or the method keeps nothing of them. "
            "Else give lines.alpha as a number."
            if norms.merged == 0
            else "Are there NaN, Inf or immense weights among the inputs? Else give lines.alpha as a number.",
        )
    placed = ((tensor.draft, tensor.file, tensor.info) for tensor in plan.tensors)
    plan = _decided(replace(plan, needs=Needs(), statistics=statistics), placed)
    if norms is not None and norms.alpha > _MUCH:
        what = f"alpha: auto is {norms.alpha:.4g}: next to the sum of the task vectors hardly anything was merged"
        plan = replace(plan, notes=(*plan.notes, f"{what}. Is a density too low, or do the models cancel out?"))
    rewritten = {sidecar.name: sidecar for sidecar in _with_numbers(plan)}
    return replace(plan, sidecars=tuple(rewritten.get(sidecar.name, sidecar) for sidecar in plan.sidecars))


def _decided(plan: Plan, placed: Iterable[tuple[Draft, int, TensorInfo]]) -> Plan:
    """The plan with the coefficients that are known, and the operations that follow from them.

    Args:
        plan: with whatever tensors.
        placed: its tensors, each with the number of its file and its place there.
    """
    alpha = None
    if plan.recipe.lines is not None and plan.recipe.lines.needs_alpha and not plan.needs.norms:
        norms = plan.statistics.norms
        alpha = norms.alpha if norms else 1 / plan.number_of_models  # the merged task vector is the sum
    rules = (plan.recipe.lines or UNSCALED).rules(plan.depth, alpha=alpha)
    plan = replace(plan, rules=rules)
    return replace(plan, tensors=tuple([_decide(plan, draft, file, info) for draft, file, info in placed]))


_MUCH = 3.0  # alpha lies below 1 in the paper's uses


UNSCALED = Scaling(alpha=1.0, beta=0.0)
"""What the merged task vector is scaled by where the recipe has no `lines:`, lambda apart."""


def _depth(recipe: Recipe, sides: Sides, names: Iterable[str], notes: list[str]) -> DepthMap:
    try:
        layers = recipe.lines.layers if recipe.lines else None
        depth = find_depth(dict.fromkeys(names), config=sides.config_of(sides.lead), layers=layers)
    except DepthError as error:
        if any(source.layer_range for source in recipe.models):
            raise RecipeError(f"layer_range cannot be checked: {error.message}", hint=error.hint) from error
        if (recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary:
            raise
        notes.append(f"depth is unknown, and makes no difference with one coefficient for all: {error.message}")
        return DepthMap((), {})
    for source in recipe.models:
        if source.layer_range and all(source.layer_range != (0, stack.layers) for stack in depth.stacks):
            there = " and ".join(f"{stack.name!r} of {stack.layers}" for stack in depth.stacks)
            raise RecipeError(
                f"layer_range {list(source.layer_range)} of {source.model} is not a whole stack; there is {there}",
                hint="lines merges whole models; it does not stack parts of them.",
            )
    return depth


def _needs(recipe: Recipe, depth: DepthMap, rules: Rules, drafts: Iterable[Draft]) -> Needs:
    """What has to be measured. `rules` give NaN where a coefficient depends on alpha, and alpha is not known."""
    method = recipe.method
    merged = [draft for draft in drafts if draft.paired and draft.dtype not in EXACT_DTYPES]
    values = list({id(draft.values): draft.values for draft in merged}.values())
    by_rank = isinstance(method.sparsifier, ByMagnitude) and any(map(method.sparsifier.drops, values))
    statistics = frozenset[str]().union(*map(method.needs, values))
    return Needs(
        thresholds=by_rank,
        l1="l1" in statistics,
        products="angles" in statistics,
        majority=len(recipe.merged) > 1 and "majority" in statistics,
        norms=not all(map(method.plain_sum, values))
        and any(math.isnan(_coefficient(recipe, depth, rules, draft)) for draft in merged),
    )


# --- what follows from the coefficients ---


def _coefficient(recipe: Recipe, depth: DepthMap, rules: Rules, draft: Draft) -> float:
    """c(l), in float64; NaN if it depends on an alpha that is not known."""
    return rules.coefficient(draft.counts_as, depth, scale=recipe.method.scale_of(draft.values))


def _decide(plan: Plan, draft: Draft, file: int, info: TensorInfo) -> TensorPlan:
    """A tensor with its coefficient, and with the copies that follow from it."""
    place = plan.depth.places.get(draft.name)
    if not draft.paired:
        return TensorPlan(draft, file, info, place, 0.0 if _is_of_base(plan, draft) else 1.0, draft.pieces)
    coefficient = _coefficient(plan.recipe, plan.depth, plan.rules, draft)
    rounded = rounded_coefficient(draft.name, coefficient, in_float64=draft.in_float64)
    return TensorPlan(draft, file, info, place, coefficient, _pieces(plan, draft, rounded))


def rounded_coefficient(name: str, coefficient: float, *, in_float64: bool) -> float:
    """A tensor's coefficient as its arithmetic has it.

    Raises:
        RecipeError: that is infinite.
    """
    rounded = coefficient if in_float64 else to_float32(coefficient)
    if math.isinf(rounded):
        raise RecipeError(
            f"the coefficient of {printable(name)} is {coefficient:g}, beyond what float32 can hold",
            hint="Coefficients usually lie between 0 and 2.",
        )
    return rounded


def _is_of_base(plan: Plan, draft: Draft) -> bool:
    files_of_base = len(plan.sides.checkpoints[0].files) if plan.sides.has_base else 0
    return all(source.file < files_of_base for piece in draft.pieces for source in piece.sources)


def _pieces(plan: Plan, draft: Draft, coefficient: float) -> tuple[Piece, ...]:
    """What is done for entries that all inputs have. Where it comes to what one of them holds they are a copy; the
    formula is not exact there.

    Integers and booleans have no task vector: they are those of the input that the output is like, and of the base
    where the coefficient is 0. In a merge the others are compared.
    """
    if draft.dtype in EXACT_DTYPES:
        return tuple(_copied_whole(plan.sides, piece, of_base=coefficient == 0) for piece in draft.pieces)
    if plan.needs:  # measured is what the inputs hold, whatever becomes of it
        return draft.pieces
    has_base = plan.sides.has_base
    if has_base and coefficient == 0:
        return tuple(Piece(piece.start, piece.numel, piece.copy or piece.base) for piece in draft.pieces)
    if (not has_base or coefficient == 1) and _is_alone(plan.recipe, draft.values):
        return tuple(Piece(piece.start, piece.numel, piece.copy or piece.models[0]) for piece in draft.pieces)
    return draft.pieces


def _copied_whole(sides: Sides, piece: Piece, *, of_base: bool) -> Piece:
    """Integers or booleans: a copy of one input's."""
    if piece.copy is not None:
        return piece
    slices = (*((piece.base,) if piece.base else ()), *piece.models)
    copied = piece.base if of_base and piece.base else slices[sides.lead]
    others = () if sides.of_an_edit else tuple(source for source in slices if source is not copied)
    return Piece(piece.start, piece.numel, copy=copied, compare=others)


def _is_alone(recipe: Recipe, values: Values) -> bool:
    """Whether merging gives the one model there is as it is."""
    return len(recipe.merged) == 1 and recipe.method.one_is_itself(values)


def to_float32(value: float) -> float:
    """Round to the nearest float32, ties to even; beyond its range, infinity."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


# --- what stands beside the weights ---


def _with_sidecars(plan: Plan) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the index comes last, so that it is
    written last.
    """
    recipe, sides = plan.recipe, plan.sides
    inputs = inputs_by_name(plan)

    def named(name: str | None) -> Checkpoint | None:
        return inputs[str(recipe.base_model) if name == "base" else name] if name is not None else None

    tokenizer = named(recipe.tokenizer_source)
    if tokenizer is not None and (other_rows := plan.rows.keys() & _vocabularies(tokenizer)):
        raise RecipeError(
            f"tokenizer_source: {tokenizer.name} has {min(other_rows):,} rows of token embeddings, and "
            f"resize: {recipe.resize} keeps {plan.rows[min(other_rows)]:,}",
            hint="Take the tokenizer of the input whose rows are kept.",
        )
    order = [sides.lead, *(number for number in range(len(sides.checkpoints)) if number != sides.lead)]
    carried, notes = carry_over(
        [sides.checkpoints[number] for number in order],
        called=[sides.called(number) for number in order],
        dtype=recipe.dtype,
        stored=_most_common_dtype(plan),
        rows=plan.rows,
        rows_of=sides.checkpoints[0] if recipe.resize == "base" else sides.models[0],
        tokenizer=tokenizer,
        chat_template=named(recipe.chat_template),
    )
    sidecars = [*carried, *_with_numbers(plan)]
    if len(plan.outputs) > 1:
        weight_map = {tensor.name: plan.outputs[tensor.file].name for tensor in plan.tensors}
        nbytes = sum(tensor.info.nbytes for tensor in plan.tensors)
        sidecars.append(index_file(sides.leading.stem, weight_map, nbytes=nbytes, parameters=plan.parameters))
    return replace(plan, sidecars=tuple(sidecars), notes=(*plan.notes, *notes))


def identity(plan: Plan) -> dict[str, Any]:
    """Which run a plan is, as JSON has it: all that decides a byte of its weights, for another run to compare."""
    package = package_of(plan.recipe.merge_method)
    return {
        "lines": __version__,
        **({"package": package} if package else {}),
        "recipe": dump_recipe(plan.recipe, named=_named(plan)),
        "inputs": {os.path.realpath(path): [*stamp] for path, stamp in zip(plan.inputs, plan.stamps, strict=True)},
        "outputs": [[file.name, file.nbytes, sha256(file.head).hexdigest()] for file in plan.outputs],
    }


def run_digest(run: Mapping[str, Any]) -> str:
    """An `identity` in short."""
    own = {key: value for key, value in run.items() if key not in ("contents", "step")}
    return f"sha256:{sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()}"


def is_same_run(plan: Plan, run: Mapping[str, Any] | None) -> bool:
    """Whether a run, by its `identity`, is that of a plan."""
    return run is not None and run_digest(run) == run_digest(identity(plan))


def is_finished(plan: Plan) -> bool:
    """Whether the destination is a folder that this very run has written, and is all there, by its files' sizes."""
    try:
        path = beside(placed(plan.output), RECIPE)
        if path is None:
            return False
        recipe = load_record(path)
        sizes = {name: (path.parent / name).stat().st_size for name in recipe.files}
    except (OSError, RecipeError, CheckpointError):
        return False
    whole = bool(sizes) and all(sizes[name] == record.nbytes for name, record in recipe.files.items())
    return whole and recipe.run == run_digest(identity(plan))


def refuse_altered(plan: Plan, *, output: bool, inputs: bool) -> None:
    """Read what a finished run has written, or what it has read, and hold that against its recipe's record.

    Args:
        plan: one that `is_finished`.
        output, inputs: which of them.

    Raises:
        OutputError: the output is not what was written, or the record does not say what was read.
        ChangedInputError: an input is not what was read.
        CheckpointError: a file cannot be read.
    """
    recipe = load_record(plan.output / RECIPE)
    if output and (differing := altered(plan.output, recipe.files)):
        told = [f"{name} {difference}" for name, difference in differing.items()]
        raise OutputError(
            f"{plan.output} is finished, but is no longer what was written:\n{some(told)}",
            hint="Write it again, with --force and without --resume.",
        )
    if not inputs:
        return
    read = _inputs_read(plan, digests_of(plan.inputs))
    before = {name: record.get("digest") for name, record in recipe.inputs.items() if isinstance(record, dict)}
    if not all(before.get(name) for name in read):
        raise OutputError(
            f"{plan.output} is finished, but was written without --verify-inputs: its recipe does not say what its "
            "inputs held",
            hint="Write it again with --verify-inputs and --force; or compare what it makes now: lines verify OUT.",
        )
    told = [
        f"{name} holds {now['digest']}, {before[name]} was read"
        for name, now in read.items()
        if now["digest"] != before[name]
    ]
    if told:
        raise ChangedInputError(f"{plan.output} was made from other inputs than there are now:\n{some(told)}")


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """The digest of each input, read whole, by its real path.

    Raises:
        CheckpointError: it cannot be read.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            found[os.path.realpath(path)] = file_digest(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found


def replaceable(plan: Plan) -> frozenset[str]:
    """The names in the destination's folder that `--force` may replace: those that this run writes, and those that the
    folder's own recipe says were written into it.
    """
    own = plan.names - {MODEL_CARD, RECIPE}  # other people have these two, too
    recipe: Path | None = None
    recorded = frozenset[str]()
    with suppress(OSError, RecipeError, CheckpointError):
        recipe = beside(placed(plan.output), RECIPE)
        recorded = frozenset(load_record(recipe).files if recipe is not None else ())
    return own | recorded | {MODEL_CARD, RECIPE} if recorded or (recipe and is_by_lines(recipe)) else own


def _inputs_read(plan: Plan, contents: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the recipe records of each file that was read."""
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in plan.sides.checkpoints:
        called = recorded_as(checkpoint, _seen_from(plan.output, checkpoint))
        for name, path, stamp in zip(called, checkpoint.files, checkpoint.stamps, strict=True):
            told: dict[str, Any] = {"bytes": stamp.nbytes, "mtime_ns": stamp.mtime_ns, "header": stamp.header}
            if os.path.realpath(path) in contents:
                told["digest"] = contents[os.path.realpath(path)]
            found[name] = told
    return found


def recorded_as(checkpoint: Checkpoint, name: str) -> list[str]:
    """What the record of a recipe calls each file of an input that the recipe calls `name`. Shards may lie in folders
    within the checkpoint's, where several have one name.
    """
    if checkpoint.folder is None:
        return [name]
    return [f"{name}/{path.relative_to(checkpoint.folder).as_posix()}" for path in checkpoint.files]


def contents_beside(
    plan: Plan, run: Mapping[str, Any], written: Mapping[str, FileRecord]
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file beside the weights that is no copy, in the order to write them: the recipe now
    records what was read, and written into all the others. Not into the model card, which is there for people to edit.

    Args:
        plan: a resolved one.
        run: its identity.
        written: what was written into the weight files, and into those that are copies.
    """
    records = dict(written)
    for sidecar in plan.sidecars:  # what is known already, as the index is, which is written behind the recipe
        if sidecar.content is not None and sidecar.name not in (RECIPE, MODEL_CARD):
            records[sidecar.name] = record_of(sidecar.content)
    for sidecar in plan.sidecars:
        if sidecar.content is None:
            continue
        content = sidecar.content
        if sidecar.name == RECIPE:
            inputs = _inputs_read(plan, run.get("contents", {}))
            content += dump_record(run_digest(run), inputs, records).encode()
        yield sidecar.name, content


def inputs_by_name(plan: Plan) -> dict[str, Checkpoint]:
    """The inputs by their names in the recipe."""
    recipe, sides = plan.recipe, plan.sides
    named = dict(zip((source.model for source in recipe.merged), sides.models, strict=True))
    if recipe.base_model is not None and sides.has_base:
        named[recipe.base_model] = sides.checkpoints[0]
    return named


def _with_numbers(plan: Plan) -> tuple[Sidecar, Sidecar]:
    """The sidecars that say what was measured: the model card, and the recipe with everything resolved."""
    recipe, sides, norms = plan.recipe, plan.sides, plan.statistics.norms
    named = _named(plan, seen_from=plan.output)
    why = f"(1/{norms.models}) * {norms.total!r} / {norms.merged!r}" if norms else f"1/{plan.number_of_models}"
    text = dump_recipe(recipe, named=named, alpha=plan.alpha, why=why)
    card = model_card(
        Card(
            title=plan.output.name if plan.output.name not in ("", "..") else plan.output.resolve().name,
            method=recipe.merge_method,
            about=recipe.method.about,
            base=sides.checkpoints[0] if sides.has_base else None,
            models=sides.models,
            like=sides.leading,
            alone=_is_alone(recipe, recipe.values("", 0.0)),
            scaled=recipe.lines is not None,
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.filters(),
        )
    )
    return card, Sidecar(RECIPE, content=text.encode())


def _vocabularies(checkpoint: Checkpoint) -> set[int]:
    """How many rows its token embeddings and heads have."""
    return {n for name, stored in checkpoint.tensors.items() if is_vocabulary(name) for n in stored.info.shape[:1]}


def _most_common_dtype(plan: Plan) -> str | None:
    """What most of the output's float entries are stored as, as configs name it."""
    names = {stored: name for name, stored in STORED.items()}
    entries = Counter[str]()
    for tensor in plan.tensors:
        if tensor.info.dtype in names:
            entries[names[tensor.info.dtype]] += tensor.info.numel
    return entries.most_common(1)[0][0] if entries else None


def _named(plan: Plan, *, seen_from: Path | None = None) -> dict[str, str]:
    """What a recipe in a folder calls the inputs, by their names in the plan's; without a folder, where they are."""
    return {
        name: _seen_from(seen_from, checkpoint) if seen_from is not None else checkpoint.hub_id or str(checkpoint.real)
        for name, checkpoint in inputs_by_name(plan).items()
    }


def _refuse_two_names(recipe: Recipe, named: Mapping[str, str]) -> None:
    """Refuse one checkpoint under two names where that makes a difference: a base that is listed among the models is
    left out by its name, and when the recipe that records this run is read, it has one name.

    Raises:
        RecipeError: the two names.
    """
    again = recipe.model_copy(
        update={
            "base_model": recipe.base_model and named.get(recipe.base_model, recipe.base_model),
            "models": tuple(
                source.model_copy(update={"model": named.get(source.model, source.model)}) for source in recipe.models
            ),
        }
    )
    before = [named.get(source.model, source.model) for source in recipe.merged]
    if [source.model for source in again.merged] == before:
        return
    assert recipe.base_model is not None
    other = next(
        source.model
        for source in recipe.models
        if source.model != recipe.base_model and named.get(source.model) == again.base_model
    )
    raise RecipeError(
        f"base_model {recipe.base_model} and {other}, one of the models, are one checkpoint",
        hint="Give it one name: whether the base is among the models is told by that.",
    )


def _seen_from(folder: Path, checkpoint: Checkpoint) -> str:
    """How a recipe in `folder` names an input: a relative path stays relative, so that inputs and output can move
    together. Both ends are real paths, for `..` behind a link is not the folder that the words say.
    """
    if checkpoint.hub_id:
        return checkpoint.hub_id
    if checkpoint.path.is_absolute():
        return str(checkpoint.real)
    return os.path.relpath(checkpoint.real, os.path.realpath(folder))
