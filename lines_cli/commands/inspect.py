"""`lines inspect`: what a checkpoint is, what a fine-tune changed, and what LiNeS would do about it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.commands import options as opt
from lines_cli.commands.carry_out import interruptible_import

if TYPE_CHECKING:
    from lines_cli.inspection import Inspection


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
    layers: opt.Layers = None,
    tensors: opt.Tensors = False,
    full: opt.Full = False,
    check: opt.Check = False,
    plot: opt.Plot = None,
    json: opt.JsonReport = False,
    quiet: opt.NoProgress = False,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    gpu_memory: opt.GpuMemory = None,
) -> None:
    """Show what a checkpoint is, what a fine-tune changed, and what LiNeS would leave of it.

    \b
      lines inspect CHECKPOINT                # from headers alone, at once, any size
      lines inspect FT --base BASE            # what changed, layer by layer
      lines inspect FT FT2 FT3 --base BASE    # and how the changes interfere
      lines inspect --config merge.yaml       # the same of a merge, and its auto alpha

    An output of lines also tells its recipe.
    """
    from lines_cli import console
    from lines_cli.errors import DataError
    from lines_cli.report import make_report, problems

    resources = opt.resources(workers, device, gpu_memory)
    drawing = None
    if plot is not None:
        from lines_cli.plot import Drawing

        drawing = Drawing(opt.path("--plot", str(plot)))
    scaling = {
        "alpha": alpha,
        "beta": beta,
        "gamma": gamma,
        "schedule": schedule,
        "outside": outside,
        "stacks": opt.pairs("--stack", stack),
        "filter": opt.pairs("--filter", filter),
        "layers": layers,
    }
    inspection = _opened(checkpoints or [], base, config, scaling, quiet=quiet)
    if drawing is not None:
        drawing.spare(inspection.inputs)
    findings = None
    if inspection.has_base or check:
        with interruptible_import():
            from lines_cli.comparison import compare

        findings = compare(inspection, resources, files=check, track=console.progress(quiet=quiet))
    told = make_report(inspection, findings, tensors=tensors)
    if drawing is not None:
        drawing.save(told)
    console.show_report(told, json=json, full=full)
    wrong = problems(told)
    if check and wrong:
        raise DataError("\n".join(["--check found:", *wrong]))


def _opened(
    checkpoints: list[str], base: str | None, config: Path | None, scaling: dict[str, Any], *, quiet: bool
) -> Inspection:
    from lines_cli.errors import RecipeError
    from lines_cli.inspection import open_inspection, open_merge
    from lines_cli.recipe_file import load_recipe

    if config is None:
        if not checkpoints:
            raise RecipeError("there is nothing to inspect", hint="Name a checkpoint; or a recipe, with --config FILE.")
        return open_inspection(checkpoints, base=base, quiet=quiet, **scaling)
    if checkpoints or base is not None or any(value is not None for value in scaling.values()):
        raise RecipeError(
            "--config names the base, the models and the coefficients itself",
            hint="Leave the other options out, or change the recipe.",
        )
    return open_merge(load_recipe(opt.path("--config", str(config))), quiet=quiet)
