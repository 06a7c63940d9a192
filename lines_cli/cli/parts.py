"""`lines plan`, `lines run`, `lines finish`: one run in parts, on as many machines as there are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.api import arguments
from lines_cli.api.calls import RunOptions, destination_of, read_recipe
from lines_cli.cli import options as opt
from lines_cli.cli.run import carry_out
from lines_cli.errors import RecipeError

if TYPE_CHECKING:
    from lines_cli.hub.upload import Target
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe


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
    OUT, by the same paths. The output is, byte for byte, what lines merge writes.
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
        arguments.path("--plan", file),
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
    opened = open_parts(arguments.path("PLAN", file), quiet=quiet)
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
    opened = open_parts(arguments.path("PLAN", file), quiet=quiet)
    refuse_missing(opened)
    divided = opened.divided
    how = RunOptions(force=divided.force, resume=True, verify=verify, verify_inputs=False)
    carry_out(divided.recipe, divided.output, resources, how, target=None, dry_run=False, json=json, quiet=quiet)


def carry_out_on_ray(
    recipe: Recipe,
    destination: Path,
    on: str,
    resources: Resources,
    how: RunOptions,
    *,
    target: Target | None,
    json: bool,
    quiet: bool,
) -> None:
    """Make a recipe's result in parts on Ray, and finish it here.

    Args:
        recipe, destination, resources, how, target, json, quiet: as of `carry_out`.
        on: what `--on` says.
    """
    from lines_cli.api.on_ray import OnRay, address_of, do_parts, is_over, plan_beside
    from lines_cli.api.parts import refuse_a_store, refuse_missing
    from lines_cli.cli import console

    refuse_a_store(destination)
    if how["verify_inputs"]:
        raise RecipeError("--verify-inputs is not done on Ray", hint="Leave it out; plan.json knows the inputs.")
    asked = OnRay(address_of(on), resources, how["force"], how["resume"])
    if not is_over(recipe, destination, how["resume"], quiet=quiet):
        opened = do_parts(
            recipe, destination, asked, quiet=quiet, track=console.progress(quiet=quiet), say=console.remark
        )
        refuse_missing(opened)
    how = RunOptions(force=how["force"], resume=True, verify=how["verify"], verify_inputs=False)
    carry_out(recipe, destination, resources, how, target=target, dry_run=False, json=json, quiet=quiet)
    plan_beside(destination).unlink(missing_ok=True)
