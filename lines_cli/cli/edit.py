"""`lines edit`: scale one fine-tune's update over depth."""

from __future__ import annotations

from typing import Any

from lines_cli.api import arguments
from lines_cli.api.calls import RunOptions
from lines_cli.cli import options as opt
from lines_cli.cli.run import carry_out
from lines_cli.errors import RecipeError


def edit(
    base: opt.Base = None,
    ft: opt.FineTune = None,
    *,
    output: opt.Output = None,
    adapter: opt.Adapter = None,
    base_of_adapter: opt.BaseOfAdapter = None,
    num_layers: opt.NumLayers = None,
    alpha: opt.Alpha = None,
    beta: opt.Beta = None,
    gamma: opt.Gamma = None,
    schedule: opt.Schedule = None,
    outside: opt.Outside = None,
    stack: opt.Stack = None,
    filter: opt.Filter = None,  # noqa: A002 - the option's name
    component: opt.Component = None,
    layers: opt.Layers = None,
    series: opt.Series = None,
    not_layers: opt.NotLayers = None,
    prefix: opt.Prefix = None,
    missing: opt.Missing = None,
    missing_in_blocks: opt.MissingInBlocks = None,
    resize: opt.Resize = None,
    variant: opt.Variant = None,
    allow_nonfinite: opt.AllowNonfinite = False,
    dtype: opt.Dtype = None,
    rounding: opt.Rounding = None,
    rounding_seed: opt.RoundingSeed = None,
    max_shard_size: opt.MaxShardSize = None,
    force: opt.Force = False,
    resume: opt.Resume = False,
    verify: opt.Verify = False,
    verify_inputs: opt.VerifyInputs = False,
    push_to: opt.PushTo = None,
    private: opt.Private = False,
    revision: opt.Revision = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    on: opt.On = None,
    cache: opt.Cache = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Scale a fine-tune's update over depth, so that it forgets less (LiNeS).

    \b
      lines edit BASE FT --dry-run             # what would be done, at what cost
      lines edit BASE FT -o OUT                # block 1 keeps 0.1 of its update
      lines edit BASE FT -o OUT --alpha 0.3    # more of what the fine-tune learnt
      lines edit BASE FT -o OUT --resume       # go on after an interruption
      lines edit --adapter ADAPTER -o OUT      # an adapter, scaled in place

    \b
    Block l = 1..L becomes  base + c(l) * (ft - base),
                 where  c(l) = alpha + beta * (l-1) / (L-1).

    Shallow blocks stay near the base, which keeps what it knew; deep blocks keep what the fine-tune learnt. The result
    is streamed to disk in bounded memory, and appears whole or not at all.
    """
    from lines_cli.recipe.validate import edit_adapter_recipe, edit_recipe

    options: dict[str, Any] = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "schedule": schedule,
        "outside": outside,
        "stacks": arguments.pairs("--stack", stack),
        "filter": arguments.pairs("--filter", filter),
        "components": arguments.components(component),
        "layers": layers,
        "series": arguments.each_series(series),
        "not_layers": not_layers,
        "prefix": prefix,
        "missing": missing,
        "missing_in_blocks": missing_in_blocks,
        "resize": resize,
        "variant": variant,
        "allow_nonfinite": allow_nonfinite or None,
        "dtype": dtype,
        "rounding": rounding,
        "rounding_seed": rounding_seed,
        "max_shard_size": max_shard_size,
    }
    if adapter is None:
        recipe = edit_recipe(*_both(base, ft, base_of_adapter, num_layers), **options)
    elif base is not None:
        raise RecipeError(
            f"--adapter takes the place of BASE and FT, and {base} is one of these",
            hint="Name the base of an adapter with --base. To fold one into its base: lines edit BASE ADAPTER -o OUT.",
        )
    else:
        of_it = {"base_model": base_of_adapter, "num_layers": arguments.num_layers(num_layers)}
        recipe = edit_adapter_recipe(adapter, **of_it, **options)
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    arguments.use_cache(cache)
    target = arguments.target(push_to, private=private, revision=revision, destination=destination)
    carry_out(recipe, destination, resources, how, on=on, target=target, dry_run=dry_run, json=json, quiet=quiet)


def _both(
    base: str | None, ft: str | None, base_of_adapter: str | None, num_layers: list[str] | None
) -> tuple[str, str]:
    """The base and the fine-tune.

    Raises:
        RecipeError: one is missing; or an option is there that is of an adapter.
    """
    for option, given in (("--base", base_of_adapter), ("--num-layers", num_layers)):
        if given:
            raise RecipeError(
                f"{option} is of --adapter, which is not given",
                hint="Write lines edit [OPTIONS] BASE FT, or lines edit --adapter ADAPTER.",
            )
    if base is None or ft is None:
        raise RecipeError(
            f"{'BASE' if base is None else 'FT'} is missing",
            hint="Write lines edit [OPTIONS] BASE FT.",
        )
    return base, ft
