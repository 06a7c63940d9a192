"""`lines sweep`: coefficients chosen by an evaluation of one's own."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.api.planned import tolerant_torch_import
from lines_cli.cli import options as opt


def sweep(
    *,
    config: opt.SweepConfig,
    output: opt.OutputOfSweep = None,
    force: opt.ForceSweep = False,
    retry: opt.Retry = False,
    parallel: opt.Parallel = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    on: opt.OnForSweep = None,
    cache: opt.Cache = None,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Try coefficients, have your own evaluation judge each, and write the best.

    \b
      lines sweep --config sweep.yaml --dry-run    # how many trials, and what they take
      lines sweep --config sweep.yaml -o best      # run it; after an interruption: go on

    \b
    The file says what is tried, and by what it is judged:

    \b
      recipe: {base: BASE, ft: FT}                 # or a recipe, as lines merge takes it
      grid: {lines.alpha: [1.0, 0.5, 0.2, 0.1]}    # of an edit beta is 1 - alpha
      evaluate: "python eval.py {checkpoint}"      # prints a JSON object of metrics, in its last line
      objective: "2 * target / target_ft + mean(control / control_pre)"

    Constant scaling and reversed depth are tried as often (controls: false switches that off), and the report says
    which did best. No evaluation runs twice: the same command goes on where an earlier one ended.
    """
    from lines_cli.cli import console
    from lines_cli.sweeping.call import destination_of
    from lines_cli.sweeping.config import load_sweep
    from lines_cli.sweeping.forecast import Options, plan_sweep

    asked = load_sweep(arguments.path("--config", config))
    destination = destination_of(output, dry_run=dry_run)
    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
    options = Options(resources, parallel, on, force, retry, say=(lambda _: None) if quiet else console.said)
    if dry_run or destination is None:
        console.show_sweep_plan(plan_sweep(asked, options), json=json)
        return
    with tolerant_torch_import():
        from lines_cli.sweeping.run import Sweeping

    found = Sweeping(asked, destination, options).run()
    console.show_sweep(found, json=json, quiet=quiet)
