"""A run in parts, on as many machines as there are: planned, done part by part, finished."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.api.planned import planned, tolerant_torch_import
from lines_cli.errors import OF_NO_USE, LinesError, OutputError, RecipeError, UnsupportedError

if TYPE_CHECKING:
    from lines_cli.engine.measure import Track
    from lines_cli.engine.run_parts import PartDone
    from lines_cli.plan.division import DividedPlan, Division
    from lines_cli.plan.plan import Plan
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import Recipe


_ITS_COMMAND = "To go on from it, run the command that began it: lines run with its plan, or lines merge --resume. "
_AT_ONCE = 8  # parts that are asked for at once, whether they are done


@dataclass(frozen=True)
class Opened:
    """A `plan.json` that holds here: the plan of the whole run, and its parts."""

    divided: DividedPlan
    plan: Plan
    division: Division


def plan_parts(
    recipe: Recipe,
    destination: Path,
    file: Path,
    *,
    shares: int | None = None,
    at_least: int = 1,
    force: bool = False,
    anew: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Opened:
    """Cut a run into parts, write `plan.json`, and make room for their output.

    Args:
        recipe: what is asked.
        destination: a folder, or a file.
        file: where to write it.
        shares: into how many parts each stage is cut (`divide`).
        at_least: unless that is given: so many, where there is as much to cut.
        force: an existing output is replaced, in the end.
        anew: discard what parts of the same plan have done.
        quiet: no progress bars of the Hub's client.
        say: gets what a person should know.

    Raises:
        LinesError: as `lines merge`; or it makes an adapter, or `file` is something else.
    """
    from lines_cli.plan.division import divide, document_of, read_document, usual_shares
    from lines_cli.plan.identity import identity, replaceable
    from lines_cli.storage.making import check_destination, leftover, recover, refuse_unfinished
    from lines_cli.storage.shared_staging import begin, is_of_plan

    before = leftover(destination)
    if before is not None and before.set_aside:
        recover(destination)
    begun = before is not None and before.run is not None and not before.is_over
    refuse_to_replace_in_a_store(destination, unfinished=begun)
    check_destination(destination, inputs=[], nbytes=0, force=force)
    plan = _whole_model(planned(recipe, destination, quiet=quiet, weights=True))
    needed = plan.bytes_written - (before.nbytes if before else 0)
    check_destination(destination, inputs=plan.read_paths, nbytes=needed, force=force)
    _refuse_to_write(file, plan)
    division = divide(plan, max(at_least, usual_shares(plan)) if shares is None else shares)
    document = document_of(plan, division, file, force=force)
    run = {**identity(plan), "step": division.step}
    if before is not None and not before.is_over and (anew or not is_of_plan(destination, document["digest"])):
        refuse_unfinished(destination, before, resume=False, resumes="" if anew else _ITS_COMMAND)
        say(f"discarding unfinished work in {before.folder} ({before.description})")
    remarks = begin(
        destination,
        run,
        plan.names,
        document["digest"],
        replaceable=partial(replaceable, plan) if force else None,
        anew=anew,
        foreseen=[(output.name, output.nbytes) for output in plan.outputs],
    )
    for remark in remarks:
        say(remark)
    _put(file, json.dumps(document, indent=1).encode() + b"\n")
    return Opened(read_document(file), plan, division)


def refuse_to_replace_in_a_store(destination: Path, *, unfinished: bool) -> None:
    """Refuse what parts cannot do in an object store, where each puts whole files into place as they are made.

    Args:
        destination: wherever.
        unfinished: a run has left work there, which tells what of it is its own.

    Raises:
        RecipeError: it is to be one object, which would appear before all is done.
        OutputError: there is something.
    """
    from lines_cli.storage.destination import is_one_file
    from lines_cli.storage.making import is_taken
    from lines_cli.storage.object_store import url_of

    if url_of(destination) is None:
        return
    if is_one_file(destination):
        raise RecipeError(
            f"-o {destination}: parts make whole files, and this is one, which appears when it is whole",
            hint=f"Write a folder: -o {destination.with_suffix('')}. Or write it in one piece: lines merge.",
        )
    if not unfinished and is_taken(destination):
        raise OutputError(
            f"{destination} exists; parts put their files into place one by one, and replace none in a store",
            hint="Choose another destination with -o, or remove what is there by the store's own tools.",
        )


def _whole_model(plan: Any) -> Plan:
    """It, the plan of a model.

    Raises:
        UnsupportedError: what is made is an adapter.
    """
    from lines_cli.plan.plan import Plan

    if not isinstance(plan, Plan):
        raise UnsupportedError(
            f"{plan.output} is an adapter, which is made in one part",
            hint="Make it on one machine: lines merge, lines edit --adapter or lines extract.",
        )
    return plan


def _refuse_to_write(file: Path, plan: Plan) -> None:
    """Refuse to replace what is no plan.

    Raises:
        OutputError: it is something else, or in the output, or among the work that is begun.
    """
    from lines_cli.storage.making import room_of
    from lines_cli.storage.object_store import real_name

    if not is_free_for_a_plan(file):
        raise OutputError(f"{file} is not a plan of lines; it is not replaced", hint="Name another file: --plan FILE.")
    for folder, what in ((plan.output, "the output's folder"), (room_of(plan.output), "the folder of unfinished work")):
        if real_name(file).startswith(f"{real_name(folder).rstrip('/')}/"):
            raise OutputError(f"{file} is in {what}", hint="Name another file: --plan FILE.")


def is_free_for_a_plan(file: Path) -> bool:
    """Whether nothing is there, or a plan."""
    from lines_cli.storage.files import read_small
    from lines_cli.storage.object_store import asked_of_the_store, content_if_there, url_of

    url = url_of(file)
    if url is not None:
        with asked_of_the_store():
            there = content_if_there(url, _LARGEST)
        if there is None:
            return True
    elif not os.path.lexists(file):
        return True
    with suppress(OSError, ValueError, RecursionError):
        return "lines_plan" in json.loads(read_small(file, _LARGEST, follow=False) if url is None else there or b"")
    return False


_LARGEST = 2**30  # bytes of a plan.json


def remove_plan(file: Path) -> None:
    """Remove it, once it is of no more use."""
    from lines_cli.storage.object_store import asked_of_the_store, remove, url_of

    url = url_of(file)
    if url is None:
        file.unlink(missing_ok=True)
        return
    with asked_of_the_store():
        remove([url])


def _put(file: Path, content: bytes) -> None:
    """Write a file, in one step."""
    from lines_cli.storage.destination import naming
    from lines_cli.storage.object_store import asked_of_the_store, put_content, url_of

    url = url_of(file)
    if url is not None:
        with asked_of_the_store():
            put_content(url, content)
        return
    made = file.with_name(f".{file.name}.{secrets.token_hex(8)}")
    with naming(file):
        try:
            made.write_bytes(content)
            os.replace(made, file)
        finally:
            made.unlink(missing_ok=True)


def open_parts(file: Path, *, quiet: bool = True) -> Opened:
    """Read a `plan.json`, and hold it against what its recipe comes to now.

    Raises:
        RecipeError: it is none, was edited, or was made by another version.
        ChangedInputError: the inputs are others than were planned with.
        LinesError: as `lines merge`.
    """
    from lines_cli.plan.division import read_document

    divided = read_document(file)
    plan = _whole_model(planned(divided.recipe, divided.output, quiet=quiet, weights=True))
    return Opened(divided, plan, divided.divided(plan))


def run_parts(
    opened: Opened,
    part: str | None,
    resources: Resources,
    *,
    track: Track | None = None,
    resumes: str | None = None,
    done: Callable[[PartDone], None] = lambda _: None,
) -> list[PartDone]:
    """Do parts of a run.

    Args:
        opened: of `open_parts`.
        part: which: `3/16`, or several; all, unless said.
        resources: what may be used.
        track: wraps the stream of byte counts.
        resumes: after an error, how to go on, if not by the command that makes these parts.
        done: is told of each part, once it is done.

    Raises:
        LinesError: as `lines merge`; or there is no such part, or the output is not in the making.
    """
    from lines_cli.plan.division import parts_said
    from lines_cli.storage.shared_staging import Shared

    parts = opened.division.parts
    numbers = parts_said(part, len(parts)) if part is not None else tuple(one.number for one in parts)
    wanted = [parts[number - 1] for number in numbers]
    divided = opened.divided
    with Shared(divided.output, divided.digest, divided.file) as staging:
        with tolerant_torch_import():
            from lines_cli.engine.run_parts import run_parts as run

        tracked = {} if track is None else {"track": track}
        try:
            return run(opened.plan, opened.division, staging, wanted, resources, done=done, **tracked)
        except LinesError as error:
            if not isinstance(error, OF_NO_USE):
                again = resumes or f"What other parts have done is kept. To go on: {divided.command(*numbers)}"
                error.hint = error.hint or again
            raise


def _of(parts: int) -> str:
    return f"of {parts:,} parts, " if parts > 1 else ""


def refuse_missing(opened: Opened) -> None:
    """Refuse to finish what is not done.

    Raises:
        OutputError: which parts are missing, and the command that makes them.
    """
    from lines_cli.plan.identity import is_done_before
    from lines_cli.storage.making import leftover
    from lines_cli.storage.shared_staging import Shared

    divided, division = opened.divided, opened.division
    if is_done_before(opened.plan, leftover(divided.output), anew=divided.force):
        return  # by a run that may have been killed amid the removal of what its parts had written down
    shared = Shared(divided.output, divided.digest, divided.file)
    with shared, ThreadPoolExecutor(_AT_ONCE) as pool:
        last = [part.number for part in division.of_stage(len(division.stages) - 1)]
        missing = [number for number, done in zip(last, pool.map(shared.is_done, last), strict=True) if not done]
    if missing:
        from lines_cli.plan.division import in_runs

        which, verb = ("part", "is") if len(missing) == 1 else ("parts", "are")
        raise OutputError(
            f"{divided.output} cannot be finished: {_of(len(division.parts))}{which} {in_runs(missing)} {verb} missing",
            hint=f"To make what is missing: {divided.command(*missing)}",
        )
