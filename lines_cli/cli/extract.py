"""`lines extract`: the adapter that is nearest to a full fine-tune."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.api.calls import RunOptions
from lines_cli.cli import options as opt
from lines_cli.cli.run import carry_out


def extract(
    ft: opt.WholeFineTune,
    *,
    base: opt.OfBase,
    output: opt.OutputAdapter = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    save_rest: opt.SaveRest = False,
    alpha: opt.AlphaIfAsked = None,
    beta: opt.Beta = None,
    gamma: opt.Gamma = None,
    schedule: opt.Schedule = None,
    outside: opt.Outside = None,
    stack: opt.Stack = None,
    filter: opt.Filter = None,  # noqa: A002 - the option's name
    layers: opt.Layers = None,
    series: opt.Series = None,
    not_layers: opt.NotLayers = None,
    prefix: opt.Prefix = None,
    variant: opt.Variant = None,
    dtype: opt.DtypeOfFactors = None,
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
    cache: opt.Cache = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Make the adapter (LoRA) that is nearest to a full fine-tune.

    \b
      lines extract FT --base BASE --rank 32 -o ADAPTER
      lines extract FT --base BASE --energy 0.95 -o ADAPTER    # the rank that keeps 95 %
      lines extract FT --base BASE --rank 32 -o ADAPTER --alpha 0.1    # scaled by depth

    Of every matrix the best approximation of its update FT - BASE with that rank (a truncated singular value
    decomposition, in float64); the summary says what it keeps, layer by layer. Embeddings, norms and biases are no such
    matrices: they are left out, and the summary says how much of the update they are; --save-rest stores them whole.
    """
    from lines_cli.recipe.validate import extract_recipe

    recipe = extract_recipe(
        base,
        ft,
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
        series=arguments.each_series(series),
        not_layers=not_layers,
        prefix=prefix,
        variant=variant,
        dtype=dtype,
    )
    resources = arguments.resources(workers, device, gpu_memory)
    how = RunOptions(force=force, resume=resume, verify=verify, verify_inputs=verify_inputs)
    destination = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    arguments.use_cache(cache)
    target = arguments.target(push_to, private=private, revision=revision, destination=destination)
    carry_out(recipe, destination, resources, how, target=target, dry_run=dry_run, json=json, quiet=quiet)
