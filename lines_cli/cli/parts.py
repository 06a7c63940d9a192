"""`lines plan`, `lines run`, `lines finish`: one run in parts, on as many machines as there are."""

from __future__ import annotations

from lines_cli.api import arguments
from lines_cli.api.calls import RunOptions, destination_of, read_recipe
from lines_cli.cli import options as opt
from lines_cli.cli.run import carry_out


def plan(
    *,
    config: opt.Config,
    output: opt.PlannedOutput = None,
    file: opt.PlanFile = "plan.json",
    parts: opt.Parts = None,
    sets: opt.Set = None,
    force: opt.ForceAtLast = False,
    cache: opt.Cache = None,
    json: opt.JsonPlan = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Cut a merge into parts that any machine may make, and write them into plan.json.

    \b
      lines plan --config merge.yaml -o OUT --parts 16
      lines run plan.json --part 3/16         # each part, wherever, in any order
      lines finish plan.json                  # all are there: OUT is put into place

    The parts of one stage do not depend on each other. A recipe that measures something has a stage for each pass, and
    one that writes: run the parts of a stage, then those of the next. All parts see the same inputs, and the folder of
    OUT, by the same paths or URLs. The output is, byte for byte, what lines merge writes.
    """
    from lines_cli.api.parts import plan_parts
    from lines_cli.cli import console

    recipe = read_recipe(config, sets or ())
    destination = destination_of(recipe, output, called=config, dry_run=False)
    assert destination is not None
    arguments.use_cache(cache)
    opened = plan_parts(
        recipe,
        destination,
        arguments.plan_file("--plan", file),
        shares=parts,
        force=force,
        quiet=quiet,
        say=console.remark,
    )
    console.show_division(opened.divided, opened.division, json=json, quiet=quiet)


def run(
    file: opt.ThePlan,
    *,
    part: opt.PartOfPlan = None,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
    cache: opt.Cache = None,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Do one part of a plan, or several.

    \b
      lines run plan.json --part 3/16
      lines run plan.json --part 3-5/16
      lines run plan.json               # all that are not done

    A part that was done is not done again. Of one that failed or was killed nothing counts: the same command does it.
    The same part may run twice at once. Where a part needs what others measure, and they have not, it does theirs, too.
    """
    from lines_cli.api.parts import open_parts, run_parts
    from lines_cli.cli import console

    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
    opened = open_parts(arguments.plan_file("PLAN", file), quiet=quiet)
    run_parts(
        opened,
        part,
        resources,
        track=console.progress(quiet=quiet),
        done=lambda one: None if quiet else console.show_part(opened.division, one),
    )


def finish(
    file: opt.ThePlan,
    *,
    verify: opt.Verify = False,
    workers: opt.Workers = None,
    cache: opt.Cache = None,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    log_json: opt.LogJson = False,  # noqa: ARG001 - heeded before the command line is parsed
) -> None:
    """Put the output of a plan into place, once all parts are done.

    \b
      lines finish plan.json

    If a part is missing, nothing is changed, and the command that makes it is named. The index, the model card and the
    recipe with all digests are written here. Weights are not read again, unless --verify asks for it.
    """
    from lines_cli.api.parts import open_parts, refuse_missing

    resources = arguments.resources(workers, "cpu", None)
    arguments.use_cache(cache)
    opened = open_parts(arguments.plan_file("PLAN", file), quiet=quiet)
    refuse_missing(opened)
    divided = opened.divided
    how = RunOptions(force=divided.force, resume=True, verify=verify, verify_inputs=False)
    carry_out(divided.recipe, divided.output, resources, how, target=None, dry_run=False, json=json, quiet=quiet)
