"""`lines.sweep`: the command as a function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.api import arguments
from lines_cli.api.planned import tolerant_torch_import
from lines_cli.sweeping.config import load_sweep, sweep_from
from lines_cli.sweeping.forecast import Options, plan_sweep
from lines_cli.version import ABOUT

if TYPE_CHECKING:
    from lines_cli.api.calls import Named


def destination_of(output: Named | None, *, dry_run: bool) -> Path | None:
    """The folder of a sweep's winner; None in a dry run for which none is named.

    Raises:
        RecipeError: none is named, or one in an object store.
    """
    found = arguments.destination_unless(output, dry_run=dry_run, unnamed="no output is named")
    hint = "Name a folder; then lines push OUT URL."
    arguments.on_a_disk(found, what="trials and report stand beside the output", hint=hint)
    return found


def sweep(
    config: Named | Mapping[str, Any],
    output: Named | None = None,
    *,
    force: bool = False,
    retry: bool = False,
    parallel: int | None = None,
    workers: int | None = None,
    device: str = "auto",
    gpu_memory: str | int | None = None,
    on: str | None = None,
    cache: Named | None = None,
    dry_run: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Try coefficients, have your own evaluation judge each, and write the best, as `lines sweep` does.

    Args:
        config: the path of a sweep's YAML, from whose folder paths in it count; or a mapping with the same keys, whose
            paths count from the current folder.
        output: a folder. Only a `dry_run` needs none.
        force, retry, parallel: as the options.
        workers, device, gpu_memory, cache, dry_run: as in `lines.edit`.
        on: `"ray"` or `"ray://HOST:PORT"`: trials are tasks of a Ray cluster (docs/scale.md).
        say: gets a line about each trial.

    Returns:
        What `--json` prints (docs/sweeping.md).

    Raises:
        LinesError: where the command would end with that message.
    """
    if isinstance(config, Mapping):
        asked = sweep_from(dict(config), Path("sweep"))
    else:
        asked = load_sweep(arguments.path("--config", config))
    destination = destination_of(output, dry_run=dry_run)
    resources = arguments.resources(workers, device, gpu_memory)
    arguments.use_cache(cache)
    options = Options(resources, parallel, on, force, retry, say=say or (lambda _: None))
    if dry_run or destination is None:
        return {**ABOUT, "dry_run": True, **plan_sweep(asked, options)}
    with tolerant_torch_import():
        from lines_cli.sweeping.run import Sweeping

    return {**ABOUT, **Sweeping(asked, destination, options).run().to_json()}
