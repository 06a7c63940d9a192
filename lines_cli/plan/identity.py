"""Which run a plan is, what a run records of its inputs, and whether a destination holds its output."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.reader import Checkpoint, FileState
from lines_cli.errors import (
    ChangedInputError,
    CheckpointError,
    OutputError,
    RecipeError,
    as_argument,
    some,
)
from lines_cli.methods.registry import package_of
from lines_cli.plan.adapter_plan import AdapterPlan, AnyPlan
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.plan import Plan
from lines_cli.recipe.plain_yaml import LARGEST
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import dump_recipe, is_by_lines, read_record
from lines_cli.storage.beside import beside
from lines_cli.storage.destination import is_one_file, placed
from lines_cli.storage.digest import altered, file_digest
from lines_cli.storage.files import read_small
from lines_cli.storage.names import MODEL_CARD, RECIPE
from lines_cli.storage.object_staging import altered_objects
from lines_cli.storage.object_store import RemoteFile, content_of, listed, looked_up, real_name, url_of
from lines_cli.storage.staging import Unfinished
from lines_cli.version import __version__


def identity(plan: AnyPlan) -> dict[str, Any]:
    """Which run a plan is, as JSON has it: all that decides a byte of its weights, for another run to compare."""
    package = package_of(plan.recipe.merge_method)
    return {
        "lines": __version__,
        **({"package": package} if package else {}),
        **({"vocabulary": plan.vocabulary.digest} if isinstance(plan, Plan) and plan.vocabulary else {}),
        "recipe": dump_recipe(plan.recipe, named=named_inputs(plan)),
        "inputs": {real_name(path): [*state] for path, state in zip(plan.paths, plan.states, strict=True)},
        "outputs": [[file.name, file.nbytes, sha256(file.head).hexdigest()] for file in plan.outputs],
        **(_of_adapters(plan) if isinstance(plan, AdapterPlan) else {}),
        **_of_formulas(plan.inputs.checkpoints),
    }


def _of_formulas(checkpoints: Iterable[Checkpoint]) -> dict[str, str]:
    """What inputs make of what they store, and by which numbers: an adapter's scales are in no file with tensors."""
    made = [sorted(checkpoint.formulas.items()) for checkpoint in checkpoints]
    return {"formulas": f"sha256:{sha256(repr(made).encode()).hexdigest()}"} if any(made) else {}


def _of_adapters(plan: AdapterPlan) -> dict[str, str]:
    """What else decides the bytes of an adapter."""
    return {"configs": plan.configs, **({"ranks": "measured"} if plan.measures else {})}


def run_digest(run: Mapping[str, Any]) -> str:
    """An `identity` in short: before anything was measured it is the same as after."""
    apart = {"contents", "step", *(("outputs",) if "ranks" in run else ())}
    own = {key: value for key, value in run.items() if key not in apart}
    return f"sha256:{sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()}"


def is_same_run(plan: AnyPlan, run: Mapping[str, Any] | None) -> bool:
    """Whether a run, by its `identity`, is that of a plan."""
    return run is not None and run_digest(run) == run_digest(identity(plan))


def is_finished(plan: AnyPlan) -> bool:
    """Whether the destination is a folder that this very run has written, and is all there, by its files' sizes."""
    try:
        raw = _recipe_there(plan.output)
        if raw is None:
            return False
        recipe = read_record(raw, placed(plan.output) / RECIPE)
        sizes = _sizes(plan.output, recipe.files)
    except (OSError, KeyError, RecipeError, CheckpointError):
        return False
    whole = bool(sizes) and all(sizes[name] == record.nbytes for name, record in recipe.files.items())
    return whole and recipe.run == run_digest(identity(plan))


def is_done_before(plan: AnyPlan, before: Unfinished | None, *, anew: bool) -> bool:
    """Whether this very run has put its output into place, so that nothing is left to do but to tidy up.

    Args:
        plan: of the run.
        before: what a run has left beside the destination.
        anew: what the same run has begun since is to replace its output.
    """
    same = before is not None and is_same_run(plan, before.run)
    if before is not None and same and anew and not before.is_over:
        return False
    # One file has no recipe beside it.
    return is_finished(plan) or (before is not None and same and before.is_over and _is_one_file_there(plan))


def _is_one_file_there(plan: AnyPlan) -> bool:
    """Whether the destination is the one file of a plan, by its size and its header."""
    if not is_one_file(plan.output) or len(plan.outputs) != 1:
        return False
    (file,) = plan.outputs
    url = url_of(plan.output)
    if url is not None:
        there = looked_up(url)
        return (
            there is not None and there.nbytes == file.nbytes and RemoteFile(url).range(0, len(file.head)) == file.head
        )
    try:
        with open(placed(plan.output), "rb") as opened:
            return os.fstat(opened.fileno()).st_size == file.nbytes and opened.read(len(file.head)) == file.head
    except OSError:
        return False


def _recipe_there(output: Path) -> bytes | None:
    """The recipe in an output that is there, if there is any."""
    url = url_of(output)
    if url is None:
        path = beside(placed(output), RECIPE)
        return None if path is None else read_small(path, LARGEST)
    return content_of(f"{url}/{RECIPE}", LARGEST) if looked_up(f"{url}/{RECIPE}") is not None else None


def _sizes(output: Path, names: Iterable[str]) -> dict[str, int]:
    """The sizes of files of an output.

    Raises:
        OSError, KeyError: one is not there.
    """
    if url_of(output) is None:
        return {name: (placed(output) / name).stat().st_size for name in names}
    there = listed(str(output))
    return {name: there[name].nbytes for name in names}


def refuse_altered(plan: AnyPlan, *, output: bool, inputs: bool) -> None:
    """Read what a finished run has written, or what it has read, and hold that against its recipe's record.

    Args:
        plan: one that `is_finished`.
        output, inputs: which of them.

    Raises:
        OutputError: the output is not what was written, or the record does not say what was read.
        ChangedInputError: an input is not what was read.
        CheckpointError: a file cannot be read.
    """
    if is_one_file(plan.output):
        raise OutputError(
            f"{plan.output} is finished, and no record of its digest lies beside one file",
            hint="To write it again: --force without --resume.",
        )
    recipe = read_record(_recipe_there(plan.output) or b"", plan.output / RECIPE)
    unlike = altered if url_of(plan.output) is None else altered_objects
    if output and (differing := unlike(plan.output, recipe.files)):
        changes = [f"{name} {difference}" for name, difference in differing.items()]
        raise OutputError(
            f"{plan.output} is finished, but is no longer what was written:\n{some(changes)}",
            hint="To write it again: --force without --resume.",
        )
    if not inputs:
        return
    read = inputs_read(plan, digests_of(plan.paths))
    before = {name: record.get("digest") for name, record in recipe.inputs.items() if isinstance(record, dict)}
    if not all(before.get(name) for name in read):
        raise OutputError(
            f"{plan.output} is finished, but was written without --verify-inputs, so its recipe has no digests of its "
            "inputs",
            hint="Write it again with --verify-inputs and --force; or compute it again and compare: "
            f"lines verify {as_argument(plan.output)}",
        )
    changes = [
        f"{name} holds {now['digest']}, {before[name]} was read"
        for name, now in read.items()
        if now["digest"] != before[name]
    ]
    if changes:
        raise ChangedInputError(f"{plan.output} was made from other inputs than there are now:\n{some(changes)}")


def digests_of(paths: Iterable[Path]) -> dict[str, str]:
    """The digest of each input, read whole, by its real path.

    Raises:
        CheckpointError: it cannot be read.
    """
    found: dict[str, str] = {}
    for path in paths:
        try:
            if url_of(path) is not None:
                raise CheckpointError(
                    f"{url_of(path)}: no digest is taken of what lies in an object store",
                    hint="Leave out --verify-inputs: objects are known by their size, time and header.",
                )
            found[os.path.realpath(path)] = file_digest(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return found


def replaceable(plan: AnyPlan) -> frozenset[str]:
    """The names in the destination's folder that `--force` may replace: those that this run writes, those that the
    folder's own recipe says were written into it, and the model card as long as it is the one that was.

    To be asked under the destination's lock: without it, recipe and card may be those of two runs.
    """
    own = plan.names - {MODEL_CARD, RECIPE}  # other people have these two, too
    with suppress(OSError, RecipeError, CheckpointError):
        recipe = _recipe_there(plan.output)
        if recipe is None:
            return own
        if is_by_lines(recipe):
            own |= {RECIPE}
        folder = placed(plan.output)
        record = read_record(recipe, folder / RECIPE)
        if record.files:
            own |= {RECIPE, *record.files} - {MODEL_CARD}  # which a person may edit, whoever wrote the record
        unlike = altered if url_of(folder) is None else altered_objects
        linked = url_of(folder) is None and (folder / MODEL_CARD).is_symlink()
        if record.card is not None and not linked and not unlike(folder, {MODEL_CARD: record.card}):
            own |= {MODEL_CARD}
    return own


def inputs_read(plan: AnyPlan, contents: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """What the recipe records of each file that was read."""
    found: dict[str, dict[str, Any]] = {}
    for checkpoint in (*_whole(plan.inputs), *_bases_of_adapters(plan.inputs)):
        for name, path, state in recorded_files(checkpoint, path_seen_from(plan.output, checkpoint)):
            record: dict[str, Any] = {"bytes": state.nbytes, "mtime_ns": state.mtime_ns, "header": state.header}
            if real_name(path) in contents:
                record["digest"] = contents[real_name(path)]
            found[name] = record
    return found


def recorded_files(checkpoint: Checkpoint, name: str) -> Iterator[tuple[str, Path, FileState]]:
    """The files of an input that the recipe calls `name`: what its record calls each, where it is, and its state.
    Shards may lie in folders within the checkpoint's, where several have one name.
    """
    if checkpoint.parts:
        base, adapter = checkpoint.parts
        if checkpoint.base_named:
            # The base's name may have a + in it, as often as its path has; so has what is written before the sign.
            halves = name.split("+")
            at = min(len(halves) - 1, 1 + str(base.path).count("+"))
            yield from recorded_files(base, "+".join(halves[:at]))
            name = "+".join(halves[at:])
        yield from recorded_files(adapter, name)
        return
    for path, state in zip(checkpoint.files, checkpoint.states, strict=True):
        folder = checkpoint.folder if url_of(path) is None else Path(str(checkpoint.hub_id))
        within = "" if folder is None else f"/{path.relative_to(folder).as_posix()}"
        yield name + within, path, state


def _whole(inputs: Inputs) -> Iterator[Checkpoint]:
    """The inputs; of stacked ones those that their layers are of."""
    for checkpoint in inputs.checkpoints:
        yield from checkpoint.stacked or (checkpoint,)


def inputs_by_name(plan: AnyPlan) -> dict[str, Checkpoint]:
    """The inputs by their names in the recipe."""
    recipe, inputs = plan.recipe, plan.inputs
    if recipe.slices:
        named = {checkpoint.name: checkpoint for checkpoint in _whole(inputs)}
    else:
        named = dict(zip((source.model for source in recipe.merged), inputs.models, strict=True))
    if recipe.base_model is not None and inputs.has_base and not recipe.slices:
        named[recipe.base_model] = inputs.checkpoints[0]
    for base in _bases_of_adapters(inputs):
        named.setdefault(str(recipe.base_model), base)
    return named


def _bases_of_adapters(inputs: Inputs) -> list[Checkpoint]:
    """The recipe's base, where it is no input itself, but adapters among the models change it."""
    if inputs.has_base:
        return []
    return [model.parts[0] for model in inputs.models if model.parts and not model.base_named][:1]


def named_inputs(plan: AnyPlan, *, seen_from: Path | None = None) -> dict[str, str]:
    """What a recipe in a folder calls the inputs, by their names in the plan's; without a folder, where they are."""
    return {
        name: path_seen_from(seen_from, checkpoint) if seen_from is not None else _real(checkpoint)
        for name, checkpoint in inputs_by_name(plan).items()
    }


def _real(checkpoint: Checkpoint) -> str:
    parts = checkpoint.parts if checkpoint.base_named else (checkpoint,)
    return "+".join(part.with_part(part.hub_id or str(part.real)) for part in parts)


def refuse_two_names(recipe: Recipe, named: Mapping[str, str]) -> None:
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
        hint="Use one name for it: by its name lines sees that the base is among the models.",
    )


def path_seen_from(folder: Path, checkpoint: Checkpoint) -> str:
    """How a recipe in `folder` names an input: a relative path stays relative, so that inputs and output can move
    together. Both ends are real paths, for `..` behind a link is not the folder that the words say.
    """
    if checkpoint.parts and checkpoint.base_named:
        return "+".join(path_seen_from(folder, part) for part in checkpoint.parts)
    if checkpoint.hub_id:
        return checkpoint.with_part(checkpoint.hub_id)
    if checkpoint.path.is_absolute() or url_of(folder) is not None:  # from a store no path leads here
        return checkpoint.with_part(str(checkpoint.real))
    return checkpoint.with_part(os.path.relpath(checkpoint.real, os.path.realpath(folder)))
