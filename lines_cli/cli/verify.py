"""`lines verify`: is this output what its recipe makes?"""

from __future__ import annotations

from lines_cli.api.planned import tolerant_torch_import
from lines_cli.cli import options as opt


def verify(
    output: opt.Verified,
    *,
    config: opt.RecipeOf = None,
    inputs: opt.Elsewhere = None,
    resume: opt.ResumeVerify = False,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    cache: opt.Cache = None,
    json: opt.JsonVerified = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Compute an output again from its recipe and inputs, and compare every byte.

    \b
      lines verify OUT                              # a folder that lines wrote
      lines verify org/name                         # such a folder on the Hub
      lines verify OUT --input base=/models/base    # the base is elsewhere here
      lines verify out.safetensors --config merge.yaml

    Ends with 0 if the output is what its recipe makes, and with 5 if anything differs; it then names the file, the
    block and the tensor. The model card is left out, since people edit it. Nothing is written.
    """
    from lines_cli.api import arguments
    from lines_cli.cli import console
    from lines_cli.plan.claim import open_claim, plan_claim

    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
    claim = open_claim(
        output,
        config=arguments.path("--config", config) if config is not None else None,
        inputs=inputs or (),
        quiet=quiet,
    )
    if not quiet:
        console.show_claim(claim)
    plan = plan_claim(claim, quiet=quiet)
    with tolerant_torch_import():
        from lines_cli.engine.verify import check

    found = check(claim, plan, resources, resume=resume, track=console.progress(quiet=quiet))
    console.show_verification(found, json=json, quiet=quiet)
    found.refuse()
