"""The commands as functions: `lines.edit`, `lines.merge`, `lines.inspect`, each keyword for keyword what the command
line says; and `lines.coefficients`. They print nothing, and return what `--json` prints.

Importing this module loads nothing heavy; the commands are made of the same parts.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from lines_cli.api import arguments, summary
from lines_cli.api.planned import planned, tolerant_torch_import
from lines_cli.errors import DataError, OutputError, RecipeError, as_argument, size

if TYPE_CHECKING:
    from lines_cli.api.arguments import Components, Pairs, Series
    from lines_cli.api.push import Push
    from lines_cli.api.summary import Summary
    from lines_cli.checkpoint.reader import Checkpoint
    from lines_cli.engine.adapter_write import AdapterOutcome
    from lines_cli.engine.measure import Track
    from lines_cli.engine.write import Outcome
    from lines_cli.hub.upload import Target
    from lines_cli.inspection.open import Inspection
    from lines_cli.inspection.report import Report
    from lines_cli.plan.adapter_plan import AnyPlan
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe
    from lines_cli.storage.staging import Unfinished

    Config = str | Path | Mapping[str, Any] | Recipe
    Sets = Iterable[str] | Mapping[str, Any]

Named = str | Path
"""A checkpoint: a path, or a Hub id."""

Outside = Literal["alpha", "position", "base", "keep"]
Missing = Literal["ft", "copy", "skip"]
Resize = Literal["ft", "base"]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "fp8"]
Rounding = Literal["nearest", "stochastic"]


def edit(
    base: Named,
    ft: Named,
    output: Named | None = None,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    component: Components | None = None,
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    prefix: str | None = None,
    missing: Missing | None = None,
    missing_in_blocks: int | None = None,
    resize: Resize | None = None,
    variant: str | None = None,
    allow_nonfinite: bool = False,
    dtype: Dtype | None = None,
    rounding: Rounding | None = None,
    rounding_seed: int | None = None,
    max_shard_size: str | int | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    on: str | None = None,
    cache: Named | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> Summary:
    """Scale a fine-tune's update over depth, as `lines edit BASE FT -o OUTPUT` does (docs/cli.md has every option).

    Args:
        base, ft: the checkpoints, each a path or a Hub id.
        output: a folder; or one file, if it ends in `.safetensors`. Only a `dry_run` needs none.
        alpha, beta, gamma, schedule, outside: the coefficients; what is not given keeps its default.
        layers, series, not_layers: where depth is not as the names say (docs/finding-depth.md); a series is `"A,B"`, or
            a list of names, or several of these.
        stack, filter: a mapping such as `{"visual": "keep"}`, or texts as on the command line.
        component: of a pipeline: a mapping as under `components:` in a recipe, such as `{"vae": "base"}`; or texts as
            on the command line, such as `"unet"`.
        prefix, missing, missing_in_blocks, resize, allow_nonfinite: what is done where inputs disagree, or hold NaN.
        variant: of folders with several sets of weights, which.
        dtype, rounding, rounding_seed, max_shard_size: how the output is stored.
        force, resume, verify, verify_inputs: as the options.
        push_to, private, revision: where on the Hub to put the output, once it is in place (`push`).
        workers, device, gpu_memory, cache: what may be used; it changes no byte.
        on: `"ray"` or `"ray://HOST:PORT"`: done in parts, as tasks of a Ray cluster (docs/scale.md).
        dry_run: return the plan, and write nothing.
        track: wraps the stream of byte counts of each pass, to show progress: called with title, total and stream.

    Returns:
        What `--json` prints (docs/json.md).

    Raises:
        LinesError: where the command would end with that message.
    """
    from lines_cli.recipe.validate import edit_recipe

    recipe = edit_recipe(
        str(base),
        str(ft),
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=arguments.pairs("--stack", stack),
        filter=arguments.pairs("--filter", filter),
        components=arguments.components(component),
        layers=layers,
        series=series,
        not_layers=not_layers,
        prefix=prefix,
        missing=missing,
        missing_in_blocks=missing_in_blocks,
        resize=resize,
        variant=variant,
        allow_nonfinite=allow_nonfinite or None,
        dtype=dtype,
        rounding=rounding,
        rounding_seed=rounding_seed,
        max_shard_size=max_shard_size,
    )
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    arguments.use_cache(cache)
    pushing = _push_to(arguments.target(push_to, private=private, revision=revision, destination=destination))
    done = carry_out(recipe, destination, resources, how, dry_run=dry_run, track=track, pushing=pushing, on=on)
    return done.summary if pushing is None or dry_run else put_on_the_hub(pushing, done)


def edit_adapter(
    adapter: Named,
    output: Named | None = None,
    *,
    base: Named | None = None,
    num_layers: int | Mapping[str, int] | Iterable[str] | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    variant: str | None = None,
    allow_nonfinite: bool = False,
    dtype: Dtype | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    cache: Named | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> Summary:
    """Scale an adapter over depth, in place, as `lines edit --adapter ADAPTER -o OUTPUT` does: what is written is an
    adapter, and no weight of a base is read.

    Args:
        adapter: a folder with PEFT's config and tensors, or a Hub id.
        output: a folder. Only a `dry_run` needs none.
        base: what it was trained on, of which headers are read, or the config; in its place
        num_layers: how many layers that has, or a mapping of the names of stacks.
        alpha, ..., dry_run, track: as in `edit`.

    Returns:
        What `--json` prints (docs/json.md).

    Raises:
        LinesError: where the command would end with that message.
    """
    from lines_cli.recipe.validate import edit_adapter_recipe

    recipe = edit_adapter_recipe(
        str(adapter),
        base_model=None if base is None else str(base),
        num_layers=arguments.num_layers(num_layers),
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=arguments.pairs("--stack", stack),
        filter=arguments.pairs("--filter", filter),
        layers=layers,
        series=series,
        not_layers=not_layers,
        variant=variant,
        allow_nonfinite=allow_nonfinite or None,
        dtype=dtype,
    )
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    arguments.use_cache(cache)
    pushing = _push_to(arguments.target(push_to, private=private, revision=revision, destination=destination))
    done = carry_out(recipe, destination, resources, how, dry_run=dry_run, track=track, pushing=pushing)
    return done.summary if pushing is None or dry_run else put_on_the_hub(pushing, done)


def extract(
    ft: Named,
    base: Named,
    output: Named | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
    save_rest: bool = False,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    dtype: Dtype | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    cache: Named | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> Summary:
    """Make the adapter that is nearest to a full fine-tune, as `lines extract FT --base BASE -o OUTPUT` does.

    Args:
        ft, base: the fine-tune and what it was trained on, each a path or a Hub id.
        output: a folder. Only a `dry_run` needs none.
        rank: of every module, at most; or
        energy: the share of a module's squared update that its rank is to keep, above 0 and at most 1.
        save_rest: also store, whole, what is no matrix and changed: embeddings, norms, biases.
        alpha, ..., not_layers: the coefficients, as in `edit`. Where none is given, the update is not scaled.
        prefix, variant, dtype, ..., track: as in `edit`. Unless `dtype` says otherwise, factors are float32.

    Returns:
        What `--json` prints (docs/json.md).

    Raises:
        LinesError: where the command would end with that message.
    """
    from lines_cli.recipe.validate import extract_recipe

    recipe = extract_recipe(
        str(base),
        str(ft),
        rank=rank,
        energy=energy,
        save_rest=save_rest or None,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=arguments.pairs("--stack", stack),
        filter=arguments.pairs("--filter", filter),
        layers=layers,
        series=series,
        not_layers=not_layers,
        prefix=prefix,
        variant=variant,
        dtype=dtype,
    )
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    arguments.use_cache(cache)
    pushing = _push_to(arguments.target(push_to, private=private, revision=revision, destination=destination))
    done = carry_out(recipe, destination, resources, how, dry_run=dry_run, track=track, pushing=pushing)
    return done.summary if pushing is None or dry_run else put_on_the_hub(pushing, done)


def merge(
    config: Config,
    output: Named | None = None,
    *,
    sets: Sets | None = None,
    as_adapter: bool = False,
    rank: int | None = None,
    energy: float | None = None,
    num_layers: int | Mapping[str, int] | Iterable[str] | None = None,
    force: bool = False,
    resume: bool = False,
    verify: bool = False,
    verify_inputs: bool = False,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    on: str | None = None,
    cache: Named | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> Summary:
    """Merge models, as `lines merge --config CONFIG -o OUTPUT` does.

    Args:
        config: a recipe: the path of a YAML file, from whose folder paths in it count; a mapping with the same keys,
            whose paths count from the current folder; or a `Recipe`.
        output: a folder, or one file; unless given, the recipe's `output`. A `dry_run` needs neither.
        sets: what overrules the recipe: a mapping such as `{"lines.beta": 0.4}`, or texts as `--set` takes them.
        as_adapter, rank, energy, num_layers: merge adapters into an adapter (docs/adapters-out.md); as the recipe's
            keys.
        force, resume, verify, verify_inputs, push_to, private, revision, workers, device, gpu_memory, on, cache,
            dry_run, track: as in `edit`.

    Returns:
        What `--json` prints (docs/json.md).

    Raises:
        LinesError: where the command would end with that message.
    """
    recipe = read_recipe(config, with_adapter_keys(sets or (), as_adapter, rank, energy, num_layers))
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = destination_of(recipe, output, called=config, dry_run=dry_run)
    arguments.use_cache(cache)
    pushing = _push_to(arguments.target(push_to, private=private, revision=revision, destination=destination))
    done = carry_out(recipe, destination, resources, how, dry_run=dry_run, track=track, pushing=pushing, on=on)
    return done.summary if pushing is None or dry_run else put_on_the_hub(pushing, done)


def inspect(
    checkpoints: Named | Iterable[Named] | None = None,
    *,
    base: Named | None = None,
    config: Config | None = None,
    alpha: float | Literal["auto"] | None = None,
    beta: float | None = None,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    component: Components | None = None,
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    prefix: str | None = None,
    variant: str | None = None,
    dtype: Dtype | None = None,
    tensors: bool = False,
    check: bool = False,
    plot: Named | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    cache: Named | None = None,
    track: Track | None = None,
) -> Report:
    """Look at checkpoints, as `lines inspect` does.

    Args:
        checkpoints: one; or with a base one fine-tune or several.
        base: what they were fine-tuned from. All weights are read then.
        config: in place of both: a recipe, as in `merge`.
        alpha, ..., not_layers: the coefficients, as in `edit`.
        prefix: what the names of one side begin with and those of the other lack; unless given, it is found.
        variant: of folders with several sets of weights, which.
        dtype: of what an edit would write: what rounding to it leaves of the coefficients is foreseen.
        tensors: also every tensor.
        check: read all weights, and refuse what is wrong with them.
        plot: also draw it, into this `.svg`, `.png` or `.html` file.
        workers, device, gpu_memory, cache, track: as in `edit`.

    Returns:
        What `--json` prints (docs/inspecting.md).

    Raises:
        DataError: `check` found something; its `report` is what would have been returned.
        LinesError: where the command would end with that message.
    """
    scaling = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "schedule": schedule,
        "outside": outside,
        "stacks": arguments.pairs("--stack", stack),
        "filter": arguments.pairs("--filter", filter),
        "components": arguments.components(component),
        "layers": layers,
        "series": series,
        "not_layers": not_layers,
        "prefix": prefix,
        "variant": variant,
        "dtype": dtype,
    }
    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
    named = [checkpoints] if isinstance(checkpoints, (str, Path)) else list(checkpoints or ())
    report = look(
        named, base, config, scaling, resources, tensors=tensors, check=check, plot=plot, quiet=True, track=track
    )
    if check:
        refuse_problems(report)
    return report


def coefficients(
    names: Any,
    alpha: float | None = None,
    beta: float | None = None,
    *,
    gamma: float | None = None,
    schedule: str | Sequence[float] | None = None,
    outside: Outside | None = None,
    stack: Pairs | None = None,
    filter: Pairs | None = None,  # noqa: A002 - the option's name
    layers: str | None = None,
    series: Series | None = None,
    not_layers: str | None = None,
    config: Any = None,
) -> dict[str, float]:
    """The coefficient that `lines edit` would scale each tensor's update by.

    Args:
        names: of tensors; or tensors by name (a `state_dict`), or a module; or the path or Hub id of a checkpoint, of
            which headers are read.
        alpha, ..., not_layers: as in `edit`.
        config: of the model, as a mapping or a transformers config: says which heads are tied. Unless given, that of
            the checkpoint or the module.

    Returns:
        Every tensor's coefficient, in float64, in the order of the names.

    Raises:
        DepthError: which tensor stands at which depth cannot be decided from the names.
        LinesError: the checkpoint cannot be read, or an option is impossible.
    """
    from lines_cli.plan.build import make_plan
    from lines_cli.plan.inputs import inputs_of
    from lines_cli.recipe.validate import edit_recipe

    recipe = edit_recipe(
        "base",
        "ft",
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=arguments.pairs("--stack", stack),
        filter=arguments.pairs("--filter", filter),
        layers=layers,
        series=series,
        not_layers=not_layers,
    )
    if recipe.measured_rules:
        raise RecipeError(
            f"schedule: {schedule} is measured on weights, and names do not tell it",
            hint="lines.inspect(FT, base=BASE, schedule=...) measures it, and so does an edit.",
        )
    checkpoint = _named_only(names, config)
    plan = make_plan(recipe, inputs_of(recipe, checkpoint, checkpoint), Path("none.safetensors"))
    found = {tensor.name: tensor.coefficient for tensor in plan.tensors}
    return {name: found[name] for name in checkpoint.tensors}


def _named_only(names: Any, config: Any) -> Checkpoint:
    """A checkpoint of which names and shapes count."""
    from dataclasses import replace

    from lines_cli.checkpoint.header import StoredTensor, TensorInfo
    from lines_cli.checkpoint.pipeline import open_whole
    from lines_cli.checkpoint.reader import Checkpoint
    from lines_cli.hub.download import locate

    said = config_values(config, names)
    if isinstance(names, (str, Path)):
        found = locate(str(names), quiet=True, only="headers")
        checkpoint = open_whole(
            found.path,
            name=found.name,
            hub_id=found.hub_id,
            to_look_at=True,
            part=found.part,
            heads=found.heads,
            heads_of=found.heads_of,
        )
        return checkpoint if config is None else replace(checkpoint, config=said)
    names = state_dict_of(names)
    tensors = names if isinstance(names, Mapping) else dict.fromkeys(names)
    shapes = {name: tuple(getattr(tensor, "shape", ())) for name, tensor in tensors.items()}
    wide = {name for name, tensor in tensors.items() if str(getattr(tensor, "dtype", "")) == "torch.float64"}
    stored = {
        name: StoredTensor(0, TensorInfo("F64" if name in wide else "F32", shape, 0, 0))
        for name, shape in shapes.items()
    }
    path = Path("names")
    return Checkpoint("the names", path, (path,), stored, (), "model", said)


def config_values(config: Any, given: Any = None) -> Mapping[str, Any]:
    """A model's config as `config.json` would have it; unless given, the one that a module has."""
    if config is None:
        own = getattr(given, "config", None)
        config = own if isinstance(own, Mapping) or hasattr(own, "to_dict") else {}
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise RecipeError(f"config: expected a mapping, or a config with to_dict(), not {type(config).__name__}")
    return values


def state_dict_of(given: Any) -> Any:
    """A module's own state_dict; anything else as it is."""
    return given.state_dict() if hasattr(given, "state_dict") else given


# --- what the commands share with these functions ---


class RunOptions(TypedDict):
    """The options of `engine.run`."""

    force: bool
    resume: bool
    verify: bool
    verify_inputs: bool


@dataclass(frozen=True, slots=True)
class Done:
    """What came of a recipe: what was done; or, without an outcome, what was planned, or was finished before."""

    plan: AnyPlan
    summary: Summary
    outcome: Outcome | AdapterOutcome | None = None
    before: bool = False


def read_recipe(config: Config, sets: Sets = ()) -> Recipe:
    """The recipe that is meant, overruled by `sets`.

    Raises:
        RecipeError: it cannot be read, or says something impossible.
    """
    from lines_cli.recipe.schema import Recipe
    from lines_cli.recipe.yaml_file import load_recipe, recipe_from, set_texts

    texts = set_texts(sets)
    if isinstance(config, (str, Path)):
        return load_recipe(arguments.path("--config", config), texts)
    if not isinstance(config, Recipe):
        return recipe_from(config, texts)
    if texts:
        raise RecipeError(
            "sets change a file or a mapping, but this is a Recipe already",
            hint="Change it with its model_copy() instead.",
        )
    return config


def with_adapter_keys(
    sets: Sets,
    as_adapter: bool,
    rank: int | None,
    energy: float | None,
    num_layers: int | Mapping[str, int] | Iterable[str] | None,
) -> list[str]:
    """What overrules a recipe, with what options of `merge` say of an adapter."""
    from lines_cli.recipe.yaml_file import set_texts

    said = {"rank": rank, "energy": energy, "num_layers": arguments.num_layers(num_layers)}
    own = {key: value for key, value in said.items() if value is not None}
    return [*set_texts(sets), *set_texts({"as_adapter": True, **own} if as_adapter else own)]


def destination_of(recipe: Recipe, output: Named | None, *, called: Any, dry_run: bool) -> Path | None:
    """Where a merge's output goes; None where neither the caller nor the recipe says so, and `dry_run` needs none.

    Raises:
        RecipeError: neither the caller nor the recipe says so.
    """
    named = called if isinstance(called, (str, Path)) else "the recipe"
    destination = output if output is not None else recipe.output
    return arguments.destination_unless(
        destination, dry_run=dry_run, unnamed=f"{named} names no output", or_else=", or with output: in the recipe"
    )


def carry_out(
    recipe: Recipe,
    destination: Path | None,
    resources: Resources,
    how: RunOptions,
    *,
    dry_run: bool = False,
    quiet: bool = True,
    track: Track | None = None,
    remark: Callable[[str], None] | None = None,
    at_last: Callable[[], None] = lambda: None,
    pushing: Push | None = None,
    on: str | None = None,
) -> Done:
    """Plan a recipe's result, and unless `dry_run` says otherwise make it.

    Args:
        recipe: what is asked.
        destination: a folder, or a file; None in a dry run for which none is named.
        resources: what may be used.
        how: the options of `engine.run`.
        dry_run: plan only.
        quiet: no progress bars of the Hub's client, and no remark about what an earlier run left.
        track: as in `edit`.
        remark: gets what a person should know by the way.
        at_last: as of `engine.run`.
        pushing: a push of the output, of which only is asked here whether it can be done; and the output is read back.
        on: the engine that does it in parts, as `--on` says it; None for this process.
    """
    make = partial(
        _made,
        recipe,
        destination,
        resources,
        dry_run=dry_run,
        quiet=quiet,
        track=track,
        remark=remark,
        at_last=at_last,
        pushing=pushing,
    )
    if on is None:
        return make(how)
    from lines_cli.api.on_ray import OnRay, address_of, do_parts, is_over, plan_beside
    from lines_cli.api.parts import refuse_missing, remove_plan

    asked = OnRay(address_of(on), resources, how["force"], how["resume"])
    if how["verify_inputs"]:
        raise RecipeError("--verify-inputs is not done on Ray", hint="Leave it out; plan.json knows the inputs.")
    if dry_run or destination is None:
        return make(how)
    if not is_over(recipe, destination, asked, quiet=quiet):
        refuse_missing(do_parts(recipe, destination, asked, quiet=quiet, track=track, say=remark or (lambda _: None)))
    done = make({**how, "resume": True})
    remove_plan(plan_beside(destination))
    return done


def _made(
    recipe: Recipe,
    destination: Path | None,
    resources: Resources,
    how: RunOptions,
    *,
    dry_run: bool,
    quiet: bool,
    track: Track | None,
    remark: Callable[[str], None] | None,
    at_last: Callable[[], None],
    pushing: Push | None,
) -> Done:
    """The same, here."""
    from dataclasses import replace

    from lines_cli.plan.claim import refuse_other_contents
    from lines_cli.plan.identity import is_done_before, is_same_run, refuse_altered, replaceable
    from lines_cli.storage.making import check_destination, clean, is_taken, leftover, recover, refuse_unfinished

    say = remark or (lambda _: None)
    arguments.one_that_reads_back(destination, verify=how["verify"])
    if destination is None:
        plan = planned(recipe, Path(UNNAMED), quiet=quiet)
        pushed = _foreseen(pushing, plan)
        return Done(plan, {**summary.of_plan(plan, resources), "output": None, "pushed": pushed})
    if pushing is not None:
        how = {**how, "verify": True}
    inputs = [name for name in (recipe.base_model, *(source.model for source in recipe.models)) if name is not None]
    named = [Path(os.path.expanduser(name)) for name in inputs]
    before = leftover(destination)
    if before is not None and before.set_aside:
        if dry_run:
            puts_back = f"lines clean {as_argument(destination)}"
            say(f"the old {destination} is in {before.folder}; a run, or {puts_back}, puts it back")
        else:
            recover(destination)
    if not dry_run:
        refuse_unfinished(destination, before, resume=how["resume"])
    # Before anything is fetched. Whether what is there already is what is asked for, a plan will tell.
    check_destination(
        destination, inputs=named, nbytes=0, force=how["force"] or how["resume"], may_exist=dry_run and not how["force"]
    )
    plan = planned(recipe, destination, quiet=quiet)
    pushed = _foreseen(pushing, plan)
    if not dry_run and not all(checkpoint.is_here for checkpoint in plan.inputs.checkpoints):
        plan = planned(recipe, destination, quiet=quiet, weights=True)  # nothing is to be refused any more
    finished = how["resume"] and is_done_before(plan, before, anew=how["force"])
    if finished and (how["verify"] or how["verify_inputs"]):
        try:
            refuse_altered(plan, output=how["verify"], inputs=how["verify_inputs"])
        except OutputError as error:
            if not how["force"] or dry_run:
                raise
            say(f"{error.message}\nso it is written again")
            finished = False
    if finished:
        # Killed after its last step, it has left the folder.
        tidied = before is not None and not dry_run and clean(destination, only_over=True)
        if before is not None and before.run is not None and not (before.is_over or tidied or quiet):
            which = "this" if is_same_run(plan, before.run) else "another"
            say(f"{before.folder} holds unfinished work of {which} run; it is left as it is")
        return Done(plan, summary.of_finished(plan), before=True)
    if dry_run:
        if before is not None and not (before.is_over or quiet):
            say(_what_becomes_of(before, how, same=is_same_run(plan, before.run)))
        needed = plan.bytes_written - (before.nbytes if before else 0)
        ours = replaceable(plan) if how["force"] else None
        check_destination(
            destination,
            inputs=plan.read_paths,
            nbytes=needed,
            force=how["force"],
            ours=ours,
            may_exist=not how["force"],
        )
        if not how["force"] and (is_taken(destination) or (before is not None and before.set_aside)):
            note = f"{destination} exists: a run replaces it with --force alone, and ends with exit code 6 without"
            plan = replace(plan, notes=(*plan.notes, note))
        return Done(plan, {**summary.of_plan(plan, resources), "pushed": pushed})
    if before is not None and before.is_over and not quiet:
        say(f"{before.folder} holds what a finished run has left; it is removed")
    elif before is not None and not quiet:
        same = is_same_run(plan, before.run)
        if how["resume"] and same and before.written == before.total:
            say(f"all weights of {destination} are written; what is left to do is done now")
        elif how["resume"]:
            kept = f": {size(before.written)} of it is kept" if same else ""
            say(f"{before.folder} holds unfinished work ({before.description}){kept}")
        else:
            say(f"discarding unfinished work in {before.folder} ({before.description}); --resume would have kept it")

    if how["verify_inputs"]:
        refuse_other_contents(plan)
    with tolerant_torch_import():
        from lines_cli.engine.run import run

    outcome = run(plan, resources, **how, **({} if track is None else {"track": track}), at_last=at_last)
    return Done(outcome.plan, summary.of_any_outcome(outcome), outcome)


UNNAMED = "OUT"
"""What a plan calls a destination that nobody has named."""


def _push_to(target: Target | None) -> Push | None:
    if target is None:
        return None
    from lines_cli.api.push import Push

    return Push(target)


def _foreseen(pushing: Push | None, plan: AnyPlan) -> Summary | None:
    """What would be pushed of a plan's output, once the Hub was asked whether it would take it."""
    if pushing is None:
        return None
    pushing.check(plan.output, plan.names)
    return pushing.told(plan.names)


def put_on_the_hub(pushing: Push, done: Done) -> Summary:
    """Push the output of a run, which has read it back; the summary.

    Raises:
        PushError: the Hub does not take it; it is in place, and whole.
    """
    from lines_cli.api.push import contents_of
    from lines_cli.errors import PushError

    output = done.plan.output
    try:
        return {**done.summary, "pushed": pushing(contents_of(output, read=False))}
    except PushError as error:
        raise PushError(
            f"{output} is in place and whole, but not on the Hub. {error.message}", hint=error.hint
        ) from error


def _what_becomes_of(left: Unfinished, how: RunOptions, *, same: bool) -> str:
    """What a run would do with what an earlier one left; `same` if that was the same run."""
    from lines_cli.storage.object_store import url_of

    if left.run is None:
        return f"{left.folder} holds nothing to continue from: a run starts over"
    if not how["resume"]:
        then = "discards it" if url_of(left.folder) is None else "refuses to begin (exit code 6)"
        return f"{left.folder} holds unfinished work ({left.description}): a run without --resume {then}"
    if same:
        return f"{left.folder} holds unfinished work ({left.description}): --resume continues it"
    then = "--resume with --force discards it" if how["force"] else "--resume refuses to run (exit code 6)"
    return f"{left.folder} holds the unfinished work of another run: {then}"


def look(
    checkpoints: Sequence[Named],
    base: Named | None,
    config: Config | None,
    scaling: Mapping[str, Any],
    resources: Resources,
    *,
    tensors: bool,
    check: bool,
    plot: Named | None,
    quiet: bool,
    track: Track | None,
) -> Report:
    """Inspect, and draw what is to be drawn; arguments as in `inspect`."""
    from lines_cli.inspection.report import make_report

    drawing = None
    if plot is not None:
        from lines_cli.inspection.drawing import Drawing

        drawing = Drawing(arguments.path("--plot", plot))
    inspection = _opened(checkpoints, base, config, scaling, quiet=quiet, weights=check)
    if drawing is not None:
        drawing.spare(inspection.inputs)
    findings = None
    if inspection.has_base or check:
        with tolerant_torch_import():
            from lines_cli.inspection.compare import compare

        findings = compare(inspection, resources, files=check, **({} if track is None else {"track": track}))
    norms = None
    if inspection.adapter is not None:
        with tolerant_torch_import():
            from lines_cli.engine.adapter_norms import update_norms

        norms = update_norms(inspection.adapter[0])
    report = make_report(inspection, findings, tensors=tensors, norms=norms)
    if drawing is not None:
        drawing.save(report)
    return report


def _opened(
    checkpoints: Sequence[Named],
    base: Named | None,
    config: Config | None,
    scaling: Mapping[str, Any],
    *,
    quiet: bool,
    weights: bool,
) -> Inspection:
    from lines_cli.inspection.open import open_inspection, open_merge

    if config is None:
        if not checkpoints:
            raise RecipeError("there is nothing to inspect", hint="Name a checkpoint; or a recipe, with --config FILE.")
        return open_inspection(checkpoints, base=base, quiet=quiet, weights=weights, **scaling)
    if checkpoints or base is not None or any(value is not None for value in scaling.values()):
        raise RecipeError(
            "--config already gives the base, the models and the coefficients",
            hint="Leave the other options out, or change the recipe.",
        )
    return open_merge(read_recipe(config), quiet=quiet)


def refuse_problems(report: Report) -> None:
    """Refuse what `check` found.

    Raises:
        DataError: every problem; it holds the report.
    """
    from lines_cli.inspection.report import problems

    if wrong := problems(report):
        error = DataError("\n".join(["--check found:", *wrong]))
        error.report = report
        raise error
