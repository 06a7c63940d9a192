"""`lines inspect`: what a checkpoint is, what a fine-tune changed, and what LiNeS would do about it."""

from __future__ import annotations

from lines_cli.commands import options as opt
from lines_cli.commands.carry_out import interruptible_import


def inspect(
    checkpoints: opt.Checkpoints,
    *,
    base: opt.Against = None,
    alpha: opt.Alpha = None,
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
    json: opt.Json = False,
    quiet: opt.Quiet = False,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
) -> None:
    """Show what a checkpoint is, what a fine-tune changed, and what LiNeS would leave of it.

    \b
      lines inspect CHECKPOINT                # from headers alone, at once, any size
      lines inspect FT --base BASE            # what changed, layer by layer
      lines inspect FT FT2 FT3 --base BASE    # and how the changes interfere

    An output of lines also tells its recipe.
    """
    from lines_cli import console
    from lines_cli.errors import DataError
    from lines_cli.inspection import open_inspection
    from lines_cli.report import make_report, problems
    from lines_cli.resources import Resources

    resources = Resources(workers=workers, device=device)
    inspection = open_inspection(
        checkpoints,
        base=base,
        quiet=quiet,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=opt.pairs("--stack", stack),
        filter=opt.pairs("--filter", filter),
        layers=layers,
    )
    drawing = None
    if plot is not None:
        from lines_cli.plot import Drawing

        drawing = Drawing(plot, inputs=inspection.inputs)  # refuses what it must before the long reading
    findings = None
    if base is not None or check:
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
