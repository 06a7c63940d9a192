"""A run in parts as tasks of a Ray cluster; and the cluster, for whoever else has tasks. Ray is the engine: it places,
retries and limits; what a part is, `lines plan` says. The only user of ray, which is imported when it is asked for.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any

from lines_cli.api.parts import Opened, open_parts, plan_parts, remove_plan, run_parts
from lines_cli.api.planned import planned
from lines_cli.errors import (
    OF_NO_USE,
    Aftermath,
    ChangedInputError,
    DataError,
    LinesError,
    OutputError,
    RecipeError,
    attach_aftermath,
    size,
)

if TYPE_CHECKING:
    from lines_cli.engine.measure import Track
    from lines_cli.plan.division import Part
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe

_RETRIES = 8
"""How often Ray does a task anew whose worker or node was lost."""
_INSTALL = "Install ray: the extra `ray`."
_PAUSE = 1.0  # seconds before a head is asked again
_PATIENCE = 12.0  # seconds in which tasks that are cancelled may end what they have started


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


def is_over(recipe: Recipe, destination: Path, how: OnRay, *, quiet: bool = True) -> bool:
    """Whether a run that is to be resumed has nothing left to do but what `lines merge --resume` does."""
    from lines_cli.plan.identity import is_done_before
    from lines_cli.storage.making import leftover

    if not how.resume:
        return False
    return is_done_before(planned(recipe, destination, quiet=quiet), leftover(destination), anew=how.force)


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
        destination: a folder, or a file, that all nodes see by the same path; or a folder in an object store.
        how: on what.
        quiet: no progress bars.
        track: wraps the stream of byte counts of each stage.
        say: gets what a person should know.

    Raises:
        LinesError: as `lines merge`; or ray is not there, or does not get a part done.
    """
    with connected(how.address) as cluster:
        opened = _planned(recipe, destination, how, cluster.cpus, quiet=quiet, say=say)
        needs = needs_of(how.resources, opened.plan.peak_memory)
        cluster.say_what_is_missing(needs, say)
        try:
            with _alone(opened):
                for stage in range(len(opened.division.stages)):
                    _stage(cluster, opened, stage, needs, track)
        except BaseException as error:
            attach_aftermath(error, _what_is_left(destination, error))
            raise
    return opened


def _alone(opened: Opened) -> AbstractContextManager[Any]:
    """While stages are done, nobody else begins anew there, whether or not a part is at work just now."""
    from lines_cli.storage.object_store import url_of
    from lines_cli.storage.shared_staging import Shared

    divided = opened.divided
    on_a_disk = url_of(divided.output) is None  # a store has no locks
    return Shared(divided.output, divided.digest, divided.file) if on_a_disk else nullcontext()


def _what_is_left(destination: Path, error: BaseException) -> Aftermath:
    """What an error leaves of what parts have done; on a disk nothing, where that is of no use any more."""
    from lines_cli.storage.making import clean, room_of
    from lines_cli.storage.object_store import url_of

    if url_of(destination) is not None:
        state = f"{destination} may hold files that are whole, and is no output yet"
        return Aftermath(room_of(destination), output=destination, state=state)
    if isinstance(error, OF_NO_USE):
        with suppress(LinesError):  # a task that could not be cancelled is still at work
            clean(destination)
            remove_plan(plan_beside(destination))
            return Aftermath()
    return Aftermath(room_of(destination), output=destination)


def _planned(
    recipe: Recipe, destination: Path, how: OnRay, cpus: int, *, quiet: bool, say: Callable[[str], None]
) -> Opened:
    file = plan_beside(destination)
    if how.resume:
        with suppress(LinesError):  # else, if there is none, it is planned anew; what is of another is discarded
            opened = open_parts(file, quiet=quiet)
            again = plan_parts(
                recipe, destination, file, shares=opened.division.shares, force=how.force, quiet=quiet, say=say
            )
            if again.divided.digest == opened.divided.digest:
                return again
    at_once = max(1, cpus // (how.resources.workers or 1))
    return plan_parts(recipe, destination, file, at_least=at_once, force=how.force, anew=True, quiet=quiet, say=say)


@dataclass(frozen=True)
class Needs:
    """What a task takes.

    Attributes:
        resources: what it may use of its node.
        memory: bytes.
    """

    resources: Resources
    memory: int

    @property
    def cpus(self) -> int:
        return self.resources.workers or 1

    @property
    def gpus(self) -> int:
        return sum(device.startswith("cuda") for device in self.resources.device.split(","))


def needs_of(resources: Resources, peak_memory: Callable[[Resources], int]) -> Needs:
    """What a task takes that may use so much: `workers` CPUs, 1 unless said; a GPU for each CUDA device; memory."""
    each = replace(resources, workers=resources.workers or 1)
    return Needs(each, peak_memory(each))


@dataclass(frozen=True)
class Task:
    """A function that some node calls.

    Attributes:
        name: in Ray's own tools.
        function: that a node can import.
        arguments: which are pickled.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


class Cluster:
    """A Ray cluster that this process is connected to."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray

    @property
    def cpus(self) -> int:
        return int(self._ray.cluster_resources().get("CPU", 1))

    def say_what_is_missing(self, needs: Needs, say: Callable[[str], None]) -> None:
        """Say so, if no node has what a task needs: Ray waits until one comes."""
        wanted = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": needs.memory}
        nodes = [node["Resources"] for node in self._ray.nodes() if node.get("Alive")]
        if not any(all(has.get(key, 0) >= value for key, value in wanted.items()) for has in nodes):
            say(
                f"no node of the cluster has {needs.cpus} CPUs, {needs.gpus} GPUs and {size(needs.memory)} of memory, "
                "which a task takes: Ray waits until one comes"
            )

    def each(
        self,
        tasks: Iterable[Task],
        needs: Needs,
        *,
        at_once: int | None = None,
        lost: Callable[[Task, str], Any] | None = None,
    ) -> Generator[Any, None, None]:
        """What tasks give, as they end. Those that have not ended when this is left are cancelled.

        Args:
            tasks: spread over the nodes.
            needs: of each.
            at_once: how many Ray is given at a time; None for all.
            lost: what stands for a task that ends the process it runs in, however often Ray tries.

        Raises:
            LinesError: what a task was refused for; or Ray does not get one done.
        """
        left, running = iter(tasks), dict[Any, Task]()

        def submit() -> None:
            for task in islice(left, None if at_once is None else at_once - len(running)):
                running[self._submitted(task, needs)] = task

        errors = self._ray.exceptions
        try:
            submit()
            while running:
                (ended, *_), _ = self._ray.wait(list(running), num_returns=1)
                task = running.pop(ended)
                try:
                    found = self._ray.get(ended)
                except errors.RayTaskError as error:
                    raise _refused(error.cause, str(error)) from None
                except errors.RayError as error:
                    why = _in_a_line(error)
                    if lost is None or not isinstance(error, (errors.WorkerCrashedError, errors.OutOfMemoryError)):
                        raise OutputError(
                            f"Ray does not get {task.name} done: {why}",
                            hint="Look at ray status and at the logs of its workers; then go on: the same command"
                            f"{'' if lost else ' with --resume'}.",
                        ) from error
                    found = lost(task, why)
                submit()
                yield found
        finally:
            for reference in running:
                with suppress(Exception):
                    self._ray.cancel(reference)
            if running:
                with suppress(Exception):
                    self._ray.wait(list(running), num_returns=len(running), timeout=_PATIENCE)

    def _submitted(self, task: Task, needs: Needs) -> Any:
        options = {
            "name": task.name,
            "num_cpus": needs.cpus,
            "num_gpus": needs.gpus,
            "memory": needs.memory,
            "max_retries": _RETRIES,
            "scheduling_strategy": "SPREAD",
        }
        return self._ray.remote(task.function).options(**options).remote(*task.arguments)


def _refused(cause: BaseException, told: str = "") -> BaseException:
    """What a person is told of an exception of a task.

    Args:
        cause: the exception.
        told: what Ray says of it: pages, with the address of the node.
    """
    unknown = str(cause).startswith(_UNKNOWN)  # Ray makes something else of an ImportError of the task itself
    if isinstance(cause, ImportError) or unknown:
        node = re.search(r"\bip=([\w.:]+\w)", told)
        why = str(cause).strip().splitlines()[-1] if str(cause).strip() else type(cause).__name__
        return OutputError(
            f"a node of the Ray cluster{f' ({node[1]})' if node else ''} cannot run lines: {why}",
            hint="Install the same version of lines, and what your own functions need, on all nodes.",
        )
    return cause


_UNKNOWN = "The remote function failed to import on the worker"


@contextmanager
def connected(address: str | None) -> Iterator[Cluster]:
    """A connection to a cluster, for the length of a `with` block; one that this process has already is used, and kept.

    Raises:
        RecipeError: ray is not installed.
        OutputError: nobody answers.
    """
    try:
        import ray
    except ImportError as error:
        raise RecipeError("--on ray: ray is not installed", hint=_INSTALL) from error
    if address is None and ray.is_initialized():
        yield Cluster(ray)
        return
    where = address or os.environ.get("RAY_ADDRESS") or "this machine"
    if where.startswith("ray://"):
        address = where
    if where.startswith(("http://", "https://")):
        raise RecipeError(
            f"RAY_ADDRESS is {where}, where jobs are submitted: a cluster has another address for what runs on it",
            hint="On a node of the cluster unset RAY_ADDRESS, or set it to HEAD:6379; elsewhere say --on "
            "ray://HEAD:10001 (these are Ray's usual ports).",
        )
    if unreachable := _unreachable(where):  # for which Ray waits long, and ends the process
        raise _no_cluster(where, unreachable)
    if address is not None and ray.is_initialized():
        connected = ConnectionError("this process is connected to a cluster already, and ray.shutdown() ends that")
        raise _not_let_in(where, connected)
    ends = signal.getsignal(signal.SIGTERM)
    said: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if address is not None and find_spec("grpc") is None:
        raise RecipeError(f"--on {address}: Ray's client is not installed", hint=f"{_INSTALL[:-1]} (ray[client]).")
    with redirect_stdout(sys.stderr):  # where Ray says, whatever it is asked, what became of its workers
        try:
            if address is not None:
                _join(ray, address, said)
            else:
                try:
                    ray.init(address="auto", **said)
                except ConnectionError:
                    ray.init(include_dashboard=False, **said)  # none is running: one of this machine
        except Exception as error:
            with suppress(Exception):  # else this process stays half connected
                ray.shutdown()
            raise _not_let_in(where, error) from error
        try:
            if callable(ends):  # Ray's own prints a stack, and ends the process
                with suppress(ValueError):  # of another thread than the main one: Ray has left it, too
                    signal.signal(signal.SIGTERM, ends)
            yield Cluster(ray)
        finally:
            ray.shutdown()


def _join(ray: Any, address: str, said: dict[str, Any]) -> None:
    """Become a client of a cluster. Its head starts a process for each client, which may fail to come up."""
    for last in (False, False, True):
        try:
            ray.init(address=address, **said)
        except Exception as error:
            ray.util.client.ray.disconnect()  # else this process stays a client, though of nobody
            if last or not isinstance(error, ConnectionAbortedError):
                raise
            sleep(_PAUSE)
        else:
            return


def _unreachable(where: str) -> str | None:
    """Why no cluster answers at an address `HOST:PORT`; None if one does, or it is no such address. Both of Ray's
    servers, and no others, speak gRPC, which begins with a frame of settings.
    """
    host, _, port = where.rpartition("://")[2].rpartition(":")
    if not host or not port.isdecimal():
        return None
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_WAIT) as connection:
            if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
                return None
            connection.sendall(_PREFACE + _SETTINGS)
            frame = connection.recv(len(_SETTINGS), socket.MSG_WAITALL)
    except TimeoutError:
        return f"nobody answered for {_WAIT:.0f} s"
    except (OSError, OverflowError) as error:
        return getattr(error, "strerror", None) or str(error)
    return None if frame[3:4] == _SETTINGS[3:4] else "what answers there is not Ray"


_WAIT = 10.0  # seconds
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"  # RFC 9113: length, type 4, flags, stream


def _in_a_line(error: BaseException) -> str:
    """What an exception of Ray says, first of all."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"{lines[0]} {lines[-1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0]


def _not_let_in(where: str, error: Exception) -> OutputError:
    """What a person is told of the exception with which Ray ends an attempt to connect."""
    said = str(error)
    if "Version mismatch" in said and len(found := re.findall(r"(Ray|Python): (\S+)", said)) == 4:
        cluster, here = (", ".join(f"{name} {version}" for name, version in half) for half in (found[:2], found[2:]))
        return OutputError(
            f"--on ray: the cluster at {where} has {cluster}, and this process {here}",
            hint="Use the versions of the cluster here; or run lines on one of its nodes.",
        )
    no = _no_cluster(where, _in_a_line(error))
    no.hint = f"{no.hint} {_LETS_IN}"
    return no


_LETS_IN = (
    "A cluster that asks for a token, as one that ray start begins may, lets in who sets RAY_AUTH_MODE=token and has "
    "its token, in ~/.ray/auth_token or RAY_AUTH_TOKEN."
)


def _no_cluster(where: str, why: str) -> OutputError:
    return OutputError(
        f"--on ray: the cluster at {where} cannot be reached: {why}",
        hint="Check the address, and that the cluster runs: ray status.",
    )


def _stage(cluster: Cluster, opened: Opened, stage: int, needs: Needs, track: Track | None) -> None:
    """Do all parts of a stage. Where thresholds are looked for, a part may have more to do once all have looked
    (`engine/run_parts`): the first is asked.
    """
    from lines_cli.plan.plan import THRESHOLDS

    parts = opened.division.of_stage(stage)
    left = [part for part in parts if not _is_done(opened, part)]
    while True:
        _do(cluster, opened, left, needs, track)
        if opened.division.stages[stage] != THRESHOLDS or not opened.plan.trims_globally or not parts:
            return
        if all(before for _, before in list(cluster.each([_task(opened, parts[0], needs)], needs))):
            return
        left = list(parts[1:])


def _is_done(opened: Opened, part: Part) -> bool:
    from lines_cli.storage.shared_staging import Shared

    divided = opened.divided
    return Shared(divided.output, divided.digest, divided.file).is_done(part.number)


def _do(cluster: Cluster, opened: Opened, parts: Sequence[Part], needs: Needs, track: Track | None) -> None:
    if not parts:
        return
    sizes = {part.number: part.writes or part.reads for part in parts}
    ended = cluster.each([_task(opened, part, needs) for part in parts], needs)
    done: Iterator[int] = (sizes[number] for number, _ in ended)
    title = f"{opened.division.called(parts[0])} in {len(parts):,} parts on Ray"
    with closing(ended):
        for _ in done if track is None else track(title, sum(sizes.values()), done):
            pass


def _task(opened: Opened, part: Part, needs: Needs) -> Task:
    from lines_cli.storage.object_store import real_name

    total = len(opened.division.parts)
    name = f"lines part {part.number}/{total} ({opened.division.called(part)})"
    return Task(name, _do_part, (real_name(opened.divided.file), part.number, total, needs.resources))


def _do_part(file: str, number: int, total: int, resources: Resources) -> tuple[int, bool]:
    """A part, in a worker of the cluster: its number, and whether it had been done before.

    Raises:
        LinesError: as `run_parts`, with the node's name; or the node does not see what the driver has seen.
    """
    from lines_cli.storage.object_store import placed_at

    node = f"node {socket.gethostname()}"
    try:
        opened = open_parts(placed_at(file))
    except LinesError as error:  # the driver has read the same
        kind = ChangedInputError if isinstance(error, ChangedInputError) else OutputError
        raise kind(f"{node} cannot begin part {number}: {error.message}", hint=_ALIKE) from error
    try:
        (done,) = run_parts(opened, f"{number}/{total}", resources, resumes=_AGAIN)
    except DataError:  # wherever it is looked at
        raise
    except LinesError as error:
        raise type(error)(f"{node}: {error.message}", hint=error.hint) from error
    return number, done.before


_AGAIN = "What other parts have done is kept. To go on: the same command with --resume."
_ALIKE = (
    "All nodes need the same version of lines, and inputs and output on a disk that they see by the same paths as this "
    "machine, or in a store. If an input was changed meanwhile: the same command begins anew."
)
