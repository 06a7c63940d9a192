"""A run in parts as tasks of a Ray cluster. Ray is the engine: it places, retries and limits; what a part is, `lines
plan` says. The only user of ray, which is imported when it is asked for.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.api.calls import planned
from lines_cli.api.parts import Opened, open_parts, plan_parts, run_parts
from lines_cli.errors import LinesError, OutputError, RecipeError

if TYPE_CHECKING:
    from lines_cli.engine.measure import Track
    from lines_cli.plan.division import Part
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe

_RETRIES = 8
"""How often Ray does a part anew whose worker or node was lost."""
_INSTALL = "Install ray: the extra `ray`."


def plan_beside(destination: Path) -> Path:
    """Where the plan of a run on Ray stands until the output is in place: beside the destination."""
    return destination.parent / f".{destination.name}.lines-plan.json"


@dataclass(frozen=True)
class OnRay:
    """How a run is to be done on Ray.

    Attributes:
        address: `ray://host:port`, or None for the cluster that RAY_ADDRESS names, or that runs here; or one is started
            here.
        resources: of each part: `workers` is how many CPUs it takes, 1 unless said; a CUDA device takes a GPU.
        force: replace an existing output, in the end.
        resume: keep what parts of the same run have done.
    """

    address: str | None
    resources: Resources
    force: bool = False
    resume: bool = False


def address_of(text: str) -> str | None:
    """What `--on` says: `ray`, or `ray://host:port`; the address, or None.

    Raises:
        RecipeError: it says something else.
    """
    if text == "ray":
        return None
    if text.startswith("ray://") and len(text) > len("ray://"):
        return text
    raise RecipeError(f"--on {text}: not an engine", hint="Say ray, or ray://HOST:PORT for a cluster elsewhere.")


def is_over(recipe: Recipe, destination: Path, resume: bool, *, quiet: bool = True) -> bool:
    """Whether a run that is to be resumed has nothing left to do but what `lines merge --resume` does."""
    from lines_cli.plan.identity import is_finished

    return resume and is_finished(planned(recipe, destination, quiet=quiet))


def do_parts(
    recipe: Recipe,
    destination: Path,
    how: OnRay,
    *,
    quiet: bool = True,
    track: Track | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> Opened:
    """Do all parts of a run; then it can be finished.

    Args:
        recipe: what is asked.
        destination: a folder, or a file, that all nodes see by the same path.
        how: on what.
        quiet: no progress bars.
        track: wraps the stream of byte counts of each stage.
        say: gets what a person should know.

    Raises:
        LinesError: as `lines merge`; or ray is not there, or does not get a part done.
    """
    with _connected(how.address) as (ray, cpus):
        opened = _planned(recipe, destination, how, cpus, quiet=quiet, say=say)
        for stage in range(len(opened.division.stages)):
            _stage(ray, opened, stage, how, track)
    return opened


def _planned(
    recipe: Recipe, destination: Path, how: OnRay, cpus: int, *, quiet: bool, say: Callable[[str], None]
) -> Opened:
    file = plan_beside(destination)
    if how.resume and os.path.lexists(file):
        with suppress(LinesError):  # else it is planned anew, and what does not belong to it is discarded
            opened = open_parts(file, quiet=quiet)
            again = plan_parts(
                recipe, destination, file, shares=opened.division.shares, force=how.force, quiet=quiet, say=say
            )
            if again.divided.digest == opened.divided.digest:
                return again
    at_once = max(1, cpus // (how.resources.workers or 1))
    return plan_parts(recipe, destination, file, at_least=at_once, force=how.force, anew=True, quiet=quiet, say=say)


class _connected:  # noqa: N801 - used as a function
    """A connection to Ray, for the length of a `with` block: the module, and how many CPUs there are."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def __enter__(self) -> tuple[Any, int]:
        try:
            import ray
        except ImportError as error:
            raise RecipeError("--on ray: ray is not installed", hint=_INSTALL) from error
        self._ray: Any = ray
        where = self._address or os.environ.get("RAY_ADDRESS") or "this machine"
        if unreachable := _unreachable(where):  # for which Ray waits long, and ends the process
            raise _no_cluster(where, unreachable)
        said: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        try:
            if self._address is not None:
                ray.init(address=self._address, **said)
            else:
                try:
                    ray.init(address="auto", **said)
                except ConnectionError:
                    ray.init(include_dashboard=False, **said)  # none is running: one of this machine
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise _no_cluster(where, str(error).strip().partition("\n")[0] or type(error).__name__) from error
        return self._ray, int(self._ray.cluster_resources().get("CPU", 1))

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()


def _unreachable(where: str) -> str | None:
    """Why nobody answers at an address `HOST:PORT`; None if somebody does, or it is no such address."""
    host, _, port = where.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_WAIT).close()
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None


_WAIT = 10.0  # seconds


def _no_cluster(where: str, why: str) -> OutputError:
    return OutputError(
        f"--on ray: the cluster at {where} cannot be reached: {why}",
        hint="Check the address, and that the cluster runs: ray status.",
    )


def _stage(ray: Any, opened: Opened, stage: int, how: OnRay, track: Track | None) -> None:
    """Do all parts of a stage. Where thresholds are looked for, a part may have more to do once all have looked
    (`engine/run_parts`): the first is asked.
    """
    from lines_cli.plan.plan import THRESHOLDS

    parts = opened.division.of_stage(stage)
    left = [part for part in parts if not _is_done(opened, part)]
    while True:
        _do(ray, opened, left, how, track)
        if opened.division.stages[stage] != THRESHOLDS or not opened.plan.trims_globally or not parts:
            return
        more = list(_results(ray, [_submitted(ray, opened, parts[0], how)]))
        if all(before for _, before in more):
            return
        left = list(parts[1:])


def _is_done(opened: Opened, part: Part) -> bool:
    from lines_cli.storage.shared_staging import Shared

    divided = opened.divided
    return Shared(divided.output, divided.digest, divided.file).records.is_there(str(part.number))


def _do(ray: Any, opened: Opened, parts: Sequence[Part], how: OnRay, track: Track | None) -> None:
    if not parts:
        return
    sizes = {part.number: part.writes or part.reads for part in parts}
    tasks = [_submitted(ray, opened, part, how) for part in parts]
    done: Iterator[int] = (sizes[number] for number, _ in _results(ray, tasks))
    title = f"{opened.division.called(parts[0])} in {len(parts):,} parts on Ray"
    for _ in done if track is None else track(title, sum(sizes.values()), done):
        pass


def _submitted(ray: Any, opened: Opened, part: Part, how: OnRay) -> Any:
    """The part as a task."""
    from dataclasses import replace

    cpus = how.resources.workers or 1
    resources = replace(how.resources, workers=cpus)
    total = len(opened.division.parts)
    task = ray.remote(_do_part).options(
        name=f"lines part {part.number}/{total} ({opened.division.called(part)})",
        num_cpus=cpus,
        num_gpus=1 if resources.device.startswith("cuda") else 0,
        memory=opened.plan.peak_memory(resources),
        max_retries=_RETRIES,
        scheduling_strategy="SPREAD",
    )
    return task.remote(os.path.abspath(opened.divided.file), part.number, total, resources)


def _do_part(file: str, number: int, total: int, resources: Resources) -> tuple[int, bool]:
    """A part, in a worker of the cluster: its number, and whether it had been done before."""
    (done,) = run_parts(open_parts(Path(file)), f"{number}/{total}", resources)
    return number, done.before


def _results(ray: Any, tasks: Sequence[Any]) -> Iterator[tuple[int, bool]]:
    """What tasks give, as they end.

    Raises:
        LinesError: what a part was refused for; the others are cancelled.
    """
    waiting = list(tasks)
    try:
        while waiting:
            ended, waiting = ray.wait(waiting, num_returns=1)
            try:
                yield ray.get(ended[0])
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise cause if isinstance(cause, LinesError) else error from None
            except ray.exceptions.RayError as error:
                first = str(error).strip().partition("\n")[0]
                raise OutputError(
                    f"Ray does not get a part done: {first}",
                    hint="Look at ray status and at the logs of its workers; then the same command with --resume.",
                ) from error
    finally:
        for task in waiting:
            with suppress(Exception):
                ray.cancel(task)
