"""`lines inspect`: what a checkpoint is, what a fine-tune changed, and what LiNeS would do about it."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.api.calls import look, refuse_problems
from lines_cli.cli import options as opt


def inspect(
    checkpoints: opt.Checkpoints = None,
    *,
    base: opt.Against = None,
    config: opt.MergeToInspect = None,
    alpha: opt.AlphaOrAuto = None,
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
    variant: opt.Variant = None,
    dtype: opt.DtypeToForesee = None,
    tensors: opt.Tensors = False,
    full: opt.Full = False,
    check: opt.Check = False,
    plot: opt.Plot = None,
    json: opt.JsonReport = False,
    quiet: opt.NoProgress = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    cache: opt.Cache = None,
) -> None:
    """Show what a checkpoint is, what a fine-tune changed, and what LiNeS would leave of it.

    \b
      lines inspect CHECKPOINT               # from headers alone, at once
      lines inspect org/name                 # on the Hub, without a download
      lines inspect FT --base BASE           # what changed, layer by layer
      lines inspect FT FT2 --base BASE       # and how the changes interfere
      lines inspect --config merge.yaml      # the same of a merge, its auto alpha

    An output of lines also tells its recipe.
    """
    from lines_cli.cli import console

    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
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
        "series": arguments.each_series(series),
        "not_layers": not_layers,
        "prefix": prefix,
        "variant": variant,
        "dtype": dtype,
    }
    report = look(
        checkpoints or [],
        base,
        config,
        scaling,
        resources,
        tensors=tensors,
        check=check,
        plot=plot,
        quiet=quiet,
        track=console.progress(quiet=quiet),
    )
    console.show_report(report, json=json, full=full)
    if plot is not None and not quiet:
        console.wrote(plot)
    if check:
        refuse_problems(report)
