"""`lines edit`: scale one fine-tune's update over depth."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.commands import options as opt

if TYPE_CHECKING:
    from lines_cli.recipe import Recipe


def edit(
    base: opt.Base = None,
    ft: opt.FineTune = None,
    *,
    output: opt.Output,
    config: opt.Config = None,
    alpha: opt.Alpha = None,
    beta: opt.Beta = None,
    gamma: opt.Gamma = None,
    schedule: opt.Schedule = None,
    outside: opt.Outside = None,
    stack: opt.Stack = None,
    filter: opt.Filter = None,  # noqa: A002 - the option's name
    layers: opt.Layers = None,
    missing: opt.Missing = None,
    resize: opt.Resize = None,
    allow_nonfinite: opt.AllowNonfinite = False,
    dtype: opt.Dtype = None,
    max_shard_size: opt.MaxShardSize = None,
    force: opt.Force = False,
    workers: opt.Workers = None,
    device: opt.Device = "auto",
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Scale a fine-tune's update over depth, so that it forgets less (LiNeS).

    \b
    Block l = 1..L becomes  base + c(l) * (ft - base),
                 where  c(l) = alpha + beta * (l-1) / (L-1).

    Shallow blocks stay near the base, which keeps what it knew; deep blocks keep what the fine-tune learnt. The result
    is streamed to disk in bounded memory, and appears whole or not at all.
    """
    from lines_cli import console
    from lines_cli.checkpoint.writer import check_destination
    from lines_cli.errors import RecipeError
    from lines_cli.plan import Resources, make_plan, open_inputs

    recipe = _recipe(
        base,
        ft,
        config,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        schedule=schedule,
        outside=outside,
        stacks=_pairs("--stack", stack),
        filter=_pairs("--filter", filter),
        layers=layers,
        missing=missing,
        resize=resize,
        allow_nonfinite=allow_nonfinite or None,
        dtype=dtype,
        max_shard_size=max_shard_size,
    )
    resources = Resources(workers=workers, device=device)
    if not output:
        raise RecipeError("-o is empty", hint="Name a folder, or a file that ends in .safetensors.")

    named = [Path(os.path.expanduser(name)) for name in (recipe.base_model, recipe.fine_tune)]
    check_destination(Path(output), inputs=named, nbytes=0, force=force)  # before anything is fetched
    plan = make_plan(recipe, *open_inputs(recipe, quiet=quiet), Path(output))
    if dry_run:
        check_destination(plan.output, inputs=plan.read_paths, nbytes=plan.bytes_written, force=force)
        console.show_plan(plan, resources, json=json)
        return

    with _interruptible_import():
        from lines_cli.engine import run

    outcome = run(plan, resources, force=force, track=console.progress(plan.bytes_written, quiet=quiet))
    console.show_outcome(plan, outcome, json=json, quiet=quiet)


@contextmanager
def _interruptible_import() -> Iterator[None]:
    """Hold Ctrl-C back until an import is over: torch's swallows it, or dies of it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a script
        yield
        return
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


def _recipe(base: str | None, ft: str | None, config: Path | None, **options: Any) -> Recipe:
    """The recipe that the command line spells out, or the file it names; never a mixture."""
    from lines_cli.errors import RecipeError
    from lines_cli.recipe import edit_recipe, load_recipe

    if config is not None:
        given = [name for name, value in (("BASE", base), ("FT", ft)) if value is not None]
        given += [
            f"--{key.replace('_', '-').replace('stacks', 'stack')}"
            for key, value in options.items()
            if value is not None
        ]
        if given:
            raise RecipeError(
                f"--config {config} already says what {', '.join(given)} would say",
                hint="Edit the file, or leave it out.",
            )
        return load_recipe(config)
    if base is None or ft is None:
        raise RecipeError(
            "two checkpoints are needed: lines edit BASE FT -o OUT",
            hint="Or a recipe: lines edit --config lines_recipe.yaml -o OUT",
        )
    return edit_recipe(base, ft, **options)


def _pairs(flag: str, given: list[str] | None) -> dict[str, Any] | None:
    """`NAME=keep`, `NAME=0.5` and `NAME=alpha,beta` as the recipe has them."""
    from lines_cli.errors import RecipeError

    pairs: dict[str, Any] = {}
    for text in given or ():
        name, equals, value = text.rpartition("=")
        ends = value.split(",")
        if not equals or not name or name in pairs:
            raise RecipeError(f"{flag} {text}: expected {flag} NAME=VALUE, and each NAME once")
        pairs[name] = {"alpha": ends[0], "beta": ends[1]} if len(ends) == 2 else value
    return pairs or None
