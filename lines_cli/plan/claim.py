"""What an output says made it: where it lies, the recipe that it holds, and the plan that follows from that.

A recipe may be a stranger's. What it names is opened as a checkpoint is, and no file that it records lies outside of
the output's folder.
"""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines_cli.errors import ChangedInputError, CheckpointError, RecipeError, as_argument, printable, some
from lines_cli.hub.download import is_missing, locate
from lines_cli.plan.adapter_plan import AnyPlan
from lines_cli.plan.any_plan import planning
from lines_cli.plan.identity import digests_of, inputs_by_name, recorded_files
from lines_cli.plan.inputs import input_names
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import Elsewhere, load_recipe_file
from lines_cli.storage.beside import leads_out, refuse_link_out
from lines_cli.storage.destination import is_one_file
from lines_cli.storage.names import RECIPE
from lines_cli.storage.object_store import ObjectPath, is_url, url_of


@dataclass(frozen=True)
class Claim:
    """An output, and the recipe that is said to make it.

    Attributes:
        name: of the output, as its user named it.
        output: the folder or file.
        hub_id: `org/name@commit`, for one that came from the Hub; the URL of one in an object store.
        file: that holds the recipe.
        recipe: what it says, record included.
        places: each input as the file names it -> as `recipe` does.
        version: of lines, which wrote the recipe; None if it does not say.
    """

    name: str
    output: Path
    hub_id: str | None
    file: Path
    recipe: Recipe
    places: Mapping[str, str]
    version: str | None

    def path(self, file: str) -> Path:
        """Where a file of the output is."""
        return self.output if is_one_file(self.output) else self.output / file

    @property
    def url(self) -> str | None:
        """Of a folder in an object store, whose weights stay there: its URL."""
        return self.hub_id if self.hub_id is not None and is_url(self.hub_id) else None

    def weights(self, file: str) -> Path:
        """Where a weight file of the output is: a path, or a URL."""
        return self.path(file) if self.url is None or is_one_file(self.output) else ObjectPath(f"{self.url}/{file}")


def open_claim(output: str | Path, *, config: Path | None = None, inputs: Elsewhere = (), quiet: bool = False) -> Claim:
    """Find an output and its recipe; nothing that the recipe names is opened yet.

    Args:
        output: a folder, a file, or a Hub id.
        config: the recipe, if it is not the one in the folder.
        inputs: inputs that are not where the recipe says, by their names in it.
        quiet: no progress bars while fetching from the Hub.

    Raises:
        CheckpointError: the output cannot be found, or holds no recipe.
        RecipeError: a file, and no recipe; or the recipe says something impossible, or has no input of that name.
    """
    found = locate(str(output), quiet=quiet, also=(RECIPE,))
    path = found.path
    if found.hub_id is not None and is_url(found.hub_id) and is_one_file(path):
        path = ObjectPath(url_of(found.name) or found.name)
    if path.is_file() or url_of(path) is not None:
        if not is_one_file(path):
            raise CheckpointError(f"{path} is not a .safetensors file, by its name", hint=_WHAT_TO_GIVE)
        if config is None:
            raise RecipeError(f"{path}: a single file does not say what made it", hint=_hint_for_a_file(path))
    elif not path.is_dir() or is_one_file(path):
        raise CheckpointError(f"{path} is not an output of lines: neither a folder nor a file", hint=_WHAT_TO_GIVE)
    elif config is None and not (path / RECIPE).is_file():
        raise CheckpointError(
            f"{found.name} holds no {RECIPE}, so it does not say what made it",
            hint="Name the recipe that did: --config FILE.",
        )
    if config is None:
        refuse_link_out(path, RECIPE)
    file = config or path / RECIPE
    url = found.hub_id if config is None and found.hub_id is not None and is_url(found.hub_id) else None
    record = load_recipe_file(file, elsewhere=inputs, url=url)
    for name in record.recipe.files:
        if leads_out(name):
            raise CheckpointError(
                f"{file}: a file is recorded as {name!r}, which is outside the folder",
                hint="A record lists only files in its own folder: do not trust this one.",
            )
    return Claim(found.name, path, found.hub_id, file, record.recipe, record.places, record.version)


_WHAT_TO_GIVE = f"Give a folder that lines wrote, with its {RECIPE}, or a .safetensors file and --config FILE."


def _hint_for_a_file(path: Path) -> str:
    if (path.parent / RECIPE).is_file():
        return f"Verify its folder, which says so: lines verify {as_argument(path.parent)}"
    return (
        "Name the recipe that did: --config FILE. What lines edit BASE FT --alpha 0.1 does is said by\n"
        "base_model: BASE\nmodels: [{model: FT}]\nlines: {alpha: 0.1, beta: 0.9}\nlike: ft"
    )


def plan_claim(claim: Claim, *, quiet: bool = False) -> AnyPlan:
    """Open what the recipe names, and plan the output anew.

    Raises:
        CheckpointError: an input cannot be found or read.
        LinesError: as `make_plan`.
    """
    try:
        make = planning(claim.recipe, quiet=quiet)
    except CheckpointError as error:
        gone = {name for name in input_names(claim.recipe) if is_missing(name) or _is_named(name, error.message)}
        used = {name: path for name, path in claim.places.items() if path in input_names(claim.recipe)}
        missing = [name for name, path in used.items() if path in gone]
        names = map(printable, missing or used)
        given = " ".join(f"--input {shlex.quote(name)}=PATH" for name in dict.fromkeys(names))
        elsewhere = f"If an input is in another place here, say where: {given}"
        error.hint = f"{error.hint} {elsewhere}" if error.hint else elsewhere
        raise
    return make(claim.output)


def _is_named(name: str, message: str) -> bool:
    """Whether a message is of one input, or of a file in it, and of no other whose name begins so."""
    return re.match(rf"{re.escape(name)}(?=[\s:/]|$)", message) is not None


@dataclass(frozen=True, slots=True)
class InputRead:
    """A file of an input.

    Attributes:
        recorded: what the record calls it.
        path: what was read.
        difference: how it is not the file that was recorded, in words; None where it is, as far as is known.
        digest: the one that was recorded; None where none was.
    """

    recorded: str
    path: Path
    difference: str | None
    digest: str | None


def inputs_read(claim: Claim, plan: AnyPlan) -> list[InputRead]:
    """The files of all inputs, held against the record by size and header. When a file was last changed says nothing on
    another machine.
    """
    return list(_held_against(claim.recipe.inputs, plan, claim.places))


def _held_against(recorded: Mapping[str, Any], plan: AnyPlan, places: Mapping[str, str]) -> Iterator[InputRead]:
    """The files of all inputs, held against what is recorded of them, where inputs go by the names of `places`."""
    checkpoints = inputs_by_name(plan)
    names = [(name, path) for name, path in places.items() if path in checkpoints]
    names += [(path, path) for path in checkpoints if path not in places.values()]
    for name, there in names:
        checkpoint = checkpoints[there]
        for called, path, state in recorded_files(checkpoint, name):
            record = recorded.get(called)
            difference = None
            if isinstance(record, dict):
                if record.get("bytes") != state.nbytes:
                    difference = f"it has {state.nbytes:,} bytes, and {_number(record.get('bytes'))} are recorded"
                elif record.get("header") != state.header:
                    difference = f"its header is {state.header}, and {record.get('header')} is recorded"
            elif recorded:
                difference = "it is not recorded"
            digest = record.get("digest") if isinstance(record, dict) else None
            yield InputRead(called, path, difference, digest if isinstance(digest, str) else None)


def notes_of_inputs(plan: AnyPlan) -> list[str]:
    """How the inputs are not those that the plan's recipe records, if it is the record of an output."""
    recorded = plan.recipe.inputs
    notes = [
        f"{read.path} is not the file that the recipe records: {read.difference}"
        for read in _held_against(recorded, plan, {})
        if read.difference is not None
    ]
    if len(notes) > _MOST_NOTES:
        notes[_MOST_NOTES:] = [f"{len(notes) - _MOST_NOTES:,} more input files are not those that the recipe records"]
    times = []
    for name, checkpoint in inputs_by_name(plan).items():
        if checkpoint.hub_id is not None and not is_url(
            checkpoint.hub_id
        ):  # its commit says what it is, and its time when it was fetched
            continue
        for called, path, state in recorded_files(checkpoint, name):
            record = recorded.get(called)
            if isinstance(record, dict) and (record.get("bytes"), record.get("header")) == (state.nbytes, state.header):
                times += [path] if record.get("mtime_ns") != state.mtime_ns else []
    if times:
        more = f" and {len(times) - 1:,} more" if len(times) > 1 else ""
        notes.append(f"{times[0]}{more}: by the time of its last change not the file that the recipe records")
    return notes


_MOST_NOTES = 4


def refuse_other_contents(plan: AnyPlan) -> None:
    """Refuse inputs that hold something else than the plan's recipe records, as far as it has digests of them.

    Raises:
        ChangedInputError: what is not the same.
        CheckpointError: an input cannot be read.
    """
    with_digest = [read for read in _held_against(plan.recipe.inputs, plan, {}) if read.digest is not None]
    found = digests_of(read.path for read in with_digest)
    wrong = [
        f"{read.path} holds {found[os.path.realpath(read.path)]}, and {read.digest} is recorded"
        for read in with_digest
        if found[os.path.realpath(read.path)] != read.digest
    ]
    if wrong:
        raise ChangedInputError(
            f"the inputs are not those that the recipe records:\n{some(wrong)}",
            hint="Give those that were merged; or to merge these, take inputs: out of the recipe.",
        )


def _number(value: Any) -> str:
    return f"{value:,}" if type(value) is int else repr(value)
