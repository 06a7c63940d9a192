"""An output of lines into an object store. Nothing is renamed there, so the order says when it is whole: weights first,
then what stands beside them, the config, the index, and the recipe last. Who looks for one of these three never sees
half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.api import arguments
from lines_cli.api.push import Contents, contents_of
from lines_cli.errors import CheckpointError, PushError, RecipeError, as_argument, size, some
from lines_cli.version import ABOUT

if TYPE_CHECKING:
    from lines_cli.api.summary import Summary
    from lines_cli.engine.measure import Track


def push_to_objects(
    output: str | Path,
    url: str,
    *,
    private: bool,
    revision: str | None,
    dry_run: bool,
    track: Track | None,
    say: Callable[[str], None] = lambda _: None,
) -> Summary:
    """Put an output into an object store, as `lines push OUTPUT s3://bucket/folder` does.

    Args:
        output: a folder that lines wrote.
        url: where to. Another output there is not replaced: objects cannot be exchanged in one step.
        private, revision: what is said of the Hub alone.
        dry_run: check all, and send nothing.
        track: as in `edit`.
        say: gets what a person should know.

    Raises:
        PushError: the store does not take it, or something else is there.
        LinesError: it is no output, or is not whole.
    """
    from lines_cli.storage.object_store import put_file, url_of

    for flag, given in (("--private", private), ("--revision", revision is not None)):
        if given:
            raise RecipeError(f"{flag} is said of the Hub, and {url} is in an object store")
    target = url_of(url)
    if target is None or target.count("/") < 3:
        raise RecipeError(f"{url}: not the URL of a folder in a bucket", hint="As in s3://bucket/folder.")
    folder = arguments.path("OUT", output)
    contents = contents_of(folder, track)
    order = in_order(contents)
    command = f"lines push {as_argument(output)} {as_argument(url)}"
    there_before = _refuse_others(contents, target)
    if contents.left:
        say(f"not pushed, for lines did not write it:\n{some(contents.left)}")
    nbytes = sum(contents.files.values())
    told: Summary = {"repo": target, "revision": None, "commit": None, "url": None}
    told |= {"files": sorted(contents.files), "bytes": nbytes, "removed": []}
    if dry_run:
        return {**ABOUT, "dry_run": True, "output": str(folder), "pushed": told}

    def sent() -> Iterator[int]:
        for name in order:
            try:
                put_file(f"{target}/{name}", folder / name)
            except CheckpointError as error:
                raise PushError(
                    f"{error.message}. What is in {target} has no recipe, and is no output yet",
                    hint=f"{error.hint} Then: {command}" if error.hint else f"The same command does it: {command}",
                ) from error
            yield contents.files[name]

    if not there_before:
        say(f"pushing {folder} to {target}: {len(order)} files, {size(nbytes)}")
        for _ in sent() if track is None else track("pushing", nbytes, sent()):
            pass
    return {**ABOUT, "dry_run": False, "output": str(folder), "pushed": told | {"url": target}}


def in_order(contents: Contents) -> list[str]:
    """The files of an output as they are sent."""
    from lines_cli.storage.names import turn

    return sorted(contents.files, key=turn)


def _refuse_others(contents: Contents, target: str) -> bool:
    """Refuse to put an output where something else is. Whether this very one is there already, and whole.

    Raises:
        PushError: what is there.
    """
    from lines_cli.storage.names import RECIPE
    from lines_cli.storage.object_store import content_of, listed

    try:
        there = {name: one.nbytes for name, one in listed(target).items()}
        recipe = content_of(f"{target}/{RECIPE}", 2**30) if RECIPE in there else None
    except CheckpointError as error:
        raise PushError(error.message, hint=error.hint) from error
    if others := sorted(name for name in there if name not in contents.files):
        raise PushError(
            f"{target} holds what is not of this output:\n{some(others)}", hint="Push to another folder, or remove it."
        )
    if recipe is None:
        return False
    if recipe == (contents.folder / RECIPE).read_bytes() and there == dict(contents.files):
        return True
    raise PushError(
        f"{target} holds another output, which is not replaced: whoever reads it would see parts of both",
        hint="Push to another folder; or remove that one first.",
    )
