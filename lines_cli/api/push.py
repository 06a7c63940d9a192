"""An output of lines onto the Hub: which of its files belong to it, whether they are whole, and what there makes way.

Pushed are the files that the output's record lists, the record itself and the model card: nothing else that lies in the
folder, whatever it is called. On the Hub the rule is the one of `--force` on a disk: what lines wrote is replaced, and
weights that somebody else put there are not.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from lines_cli.api import arguments
from lines_cli.errors import (
    Aftermath,
    CheckpointError,
    DataError,
    OutputError,
    PushError,
    RecipeError,
    as_argument,
    attach_aftermath,
    size,
    some,
)
from lines_cli.version import ABOUT, __version__

if TYPE_CHECKING:
    from lines_cli.api.summary import Summary
    from lines_cli.engine.measure import Track
    from lines_cli.hub.upload import Remote, Target
    from lines_cli.recipe.schema import Recipe
    from lines_cli.storage.digest import FileRecord


def push(
    output: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    cache: str | Path | None = None,
    dry_run: bool = False,
    track: Track | None = None,
) -> Summary:
    """Put an output on the Hugging Face Hub, as `lines push OUTPUT REPO` does.

    Args:
        output: a folder that lines wrote.
        repo: `org/name`. It is made if it is not there.
        private: make it private; one that is there and public is refused.
        revision: the branch; it is made if it is not there.
        cache: the folder of what is fetched from the Hub; else the Hub's own.
        dry_run: check all, and send nothing.
        track: as in `edit`.

    Returns:
        What `--json` prints (docs/json.md).

    Raises:
        PushError: the Hub does not take it.
        LinesError: it is no output, or is not whole.
    """
    return push_output(output, repo, private=private, revision=revision, cache=cache, dry_run=dry_run, track=track)


def push_output(
    output: str | Path,
    repo: str,
    *,
    private: bool,
    revision: str | None,
    cache: str | Path | None,
    dry_run: bool,
    track: Track | None,
    quiet: bool = True,
    say: Callable[[str], None] | None = None,
) -> Summary:
    """The same for the command: `quiet` without progress bars of the client, `say` gets what a person should know."""
    from lines_cli.hub.upload import target_of

    arguments.use_cache(cache)
    target = target_of(repo, private=private, revision=revision)
    folder = arguments.path("OUT", output)
    pushing = Push(target, quiet=quiet, say=say or (lambda _: None))
    contents = contents_of(folder, track)
    return {**ABOUT, "dry_run": dry_run, "output": str(folder), "pushed": pushing(contents, dry_run=dry_run)}


# --- what is pushed ---


@dataclass(frozen=True, slots=True)
class Contents:
    """What of an output's folder is pushed.

    Attributes:
        folder: where it is.
        record: its recipe, with what was written.
        files: the size of each file, by its name relative to the folder.
        left: names that are not pushed.
        card_is_edited: whether somebody has edited the model card since it was written.
    """

    folder: Path
    record: Recipe
    files: Mapping[str, int]
    left: tuple[str, ...]
    card_is_edited: bool


def contents_of(folder: Path, track: Track | None = None, *, read: bool = True) -> Contents:
    """The files of an output, each seen to be what was written.

    Args:
        folder: the output's.
        track: as in `edit`.
        read: compare their digests, too; else they were compared a moment ago.

    Raises:
        CheckpointError: it is no output of lines, or a file cannot be read.
        OutputError: a run is at work on it, or has left it unfinished.
        DataError: a file is not what was written.
    """
    from lines_cli.recipe.yaml_file import is_by_lines, load_record
    from lines_cli.storage.beside import beside
    from lines_cli.storage.destination import is_noise, is_one_file, survey
    from lines_cli.storage.digest import altered
    from lines_cli.storage.names import MODEL_CARD, RECIPE

    if is_one_file(folder) and not folder.is_dir():
        raise CheckpointError(f"{folder}: a single file has no record and no config beside it", hint=_A_FOLDER)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: there is no such folder", hint=_A_FOLDER)
    _refuse_unfinished(folder)
    recipe = beside(folder, RECIPE)
    if recipe is None or not is_by_lines(recipe):
        raise CheckpointError(f"{folder} is no output of lines: it holds no {RECIPE} of one", hint=_A_FOLDER)
    try:
        record = load_record(recipe)
    except RecipeError as error:
        raise CheckpointError(error.message, hint=_A_FOLDER) from error
    if not record.files:
        raise CheckpointError(f"{folder}: its {RECIPE} does not say which files were written", hint=_A_FOLDER)
    there = {name: entry for name, entry in survey(folder.resolve()).items() if not stat.S_ISDIR(entry.kind)}
    wrong: dict[str, str] = {}

    def compared() -> Iterator[int]:
        for name, written in record.files.items():
            if read:
                wrong.update(altered(folder, {name: written}))
            elif not (folder / name).is_file() or (folder / name).stat().st_size != written.nbytes:
                wrong[name] = "is not what was written"
            yield written.nbytes

    nbytes = sum(written.nbytes for written in record.files.values())
    for _ in compared() if track is None or not read else track("checking", nbytes, compared()):
        pass
    if wrong:
        changes = [f"{name} {difference}" for name, difference in wrong.items()]
        raise DataError(
            f"{folder} is no longer what was written:\n{some(changes)}",
            hint="Write it again, with --force and without --resume; or put back what was written.",
        )
    files = {name: written.nbytes for name, written in record.files.items()}
    for name in (RECIPE, MODEL_CARD):
        if (path := beside(folder, name)) is not None:
            files[name] = path.stat().st_size
    left = sorted(name for name in there if name not in files and not is_noise(name))
    edited = MODEL_CARD in files and record.card is not None and bool(altered(folder, {MODEL_CARD: record.card}))
    return Contents(folder, record, files, tuple(left), edited)


_A_FOLDER = "Give a folder that lines edit or lines merge wrote. For any other there is hf upload."


def _refuse_unfinished(folder: Path) -> None:
    from lines_cli.storage.staging import leftover

    if _STAGED.fullmatch(folder.resolve().parent.name):
        raise OutputError(
            f"{folder} lies in the hidden folder of a run that is not finished",
            hint="Finish the run with --resume, and push its output.",
        )
    found = leftover(folder)
    if found is not None and not found.is_over:
        raise OutputError(
            f"{folder}: {found.folder} holds unfinished work ({found.description})",
            hint=f"Finish it with --resume, or remove it: lines clean {as_argument(folder)}",
        )


_STAGED = re.compile(r"\..+\.lines")


# --- and to where ---


@dataclass(slots=True)
class Push:
    """A push that is asked for.

    Attributes:
        target: to where.
        quiet: no progress bars of the client.
        say: gets what a person should know.
    """

    target: Target
    quiet: bool = True
    say: Callable[[str], None] = field(default=lambda _: None)

    def check(self, output: Path, names: Collection[str]) -> None:
        """Refuse, before anything is computed, what the Hub would not take.

        Args:
            output: what will be pushed; it may not be there yet.
            names: of its files.

        Raises:
            PushError: the token may not write there, or somebody else's weights are there.
        """
        remote = self._look("")
        self._refuse_others(output, names, remote, self._record(remote))

    def __call__(self, contents: Contents, *, dry_run: bool = False) -> Summary:
        """Push, and say what was pushed; or with `dry_run` what would be.

        Raises:
            PushError: the Hub does not take it.
        """
        from lines_cli.hub.upload import upload
        from lines_cli.storage.destination import survey
        from lines_cli.storage.names import MODEL_CARD, RECIPE

        target, command = self.target, self.target.command(contents.folder)
        then = f"Then: {command}"
        remote = self._look("" if dry_run else then)
        theirs = self._record(remote)
        self._refuse_others(contents.folder, contents.files, remote, theirs)
        files = dict(contents.files)
        if MODEL_CARD in remote.files and not contents.card_is_edited and not self._wrote_the_card(remote, theirs):
            files.pop(MODEL_CARD, None)
            self.say(
                f"the model card on {target} is not as lines wrote it, and stays; that of {contents.folder} does not go"
            )
        written = theirs.files if theirs is not None else ()
        removed = sorted(name for name in written if name in remote.files and name not in contents.files)
        if contents.left:
            self.say(f"not pushed, for lines did not write it:\n{some(contents.left)}")
        if paths := _paths_of(contents.record):
            self.say(f"{RECIPE} names inputs by paths, which nobody else can follow: {', '.join(paths)}")
        nbytes = sum(files.values())
        told = {**self.told(files), "bytes": nbytes, "removed": removed}
        if dry_run:
            return told
        number = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        self.say(f"pushing {contents.folder} to {target}: {number}, {size(nbytes)}")
        real = contents.folder.resolve()
        before = survey(real)
        try:
            commit = upload(
                real,
                files,
                target,
                remote,
                removed=removed,
                message=f"Upload {real.name} with lines",
                description=_description(contents.record, target),
                then=then,
            )
        except KeyboardInterrupt as interrupt:
            attach_aftermath(interrupt, Aftermath(in_place=contents.folder, unpushed=command))
            raise
        now = survey(contents.folder.resolve())
        if moved := sorted(name for name in files if now.get(name) != before.get(name)):
            raise PushError(
                f"{contents.folder} was changed while it was pushed, so {target} may hold parts of two outputs:\n"
                f"{some(moved)}",
                hint=f"Push it again: {command}",
            )
        return told | {"commit": commit.oid, "url": commit.url}

    def told(self, names: Iterable[str]) -> Summary:
        """What would be pushed, as far as the names of the files tell."""
        target = self.target
        told: Summary = {"repo": target.repo, "revision": target.branch, "commit": None, "url": None}
        return told | {"files": sorted(names), "bytes": None, "removed": []}

    def _look(self, then: str) -> Remote:
        from lines_cli.hub.upload import look

        return look(self.target, quiet=self.quiet, then=then)

    def _record(self, remote: Remote) -> Recipe | None:
        """What the target's own recipe says that lines wrote there."""
        from lines_cli.hub.upload import fetch
        from lines_cli.recipe.yaml_file import is_by_lines, load_record
        from lines_cli.storage.names import RECIPE

        if RECIPE not in remote.files:
            return None
        with suppress(RecipeError):
            path = fetch(self.target, remote, RECIPE)
            return load_record(path) if is_by_lines(path) else None
        return None

    def _wrote_the_card(self, remote: Remote, theirs: Recipe | None) -> bool:
        """Whether the model card there is as lines wrote it."""
        from lines_cli.hub.upload import fetch
        from lines_cli.storage.digest import record_of
        from lines_cli.storage.names import MODEL_CARD

        if theirs is None or theirs.card is None:
            return False
        return record_of(fetch(self.target, remote, MODEL_CARD).read_bytes()) == theirs.card

    def _refuse_others(self, output: Path, names: Iterable[str], remote: Remote, theirs: Recipe | None) -> None:
        """Refuse to put weights beside, or in the place of, weights that lines did not put there."""
        from lines_cli.hub.upload import is_weights

        written = theirs.files if theirs is not None else {}
        ours = set(names)
        others = [
            name
            for name, file in remote.files.items()
            if is_weights(name)
            and name not in written
            and not (name in ours and _is_same(output / name, file.nbytes, file.sha256))
        ]
        if others:
            raise PushError(
                f"{self.target} holds weights that lines did not write:\n{some(sorted(others))}",
                hint="Push to another repository, or to a new branch (--revision NAME), which begins empty; or delete "
                "them on the Hub.",
            )


def _is_same(path: Path, nbytes: int | None, digest: str | None) -> bool:
    """Whether a file here is one that the Hub lists: what an interrupted push has sent is ours."""
    try:
        if digest is None or path.stat().st_size != nbytes:
            return False
        found = sha256()
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
    except OSError:
        return False
    return found.hexdigest() == digest


def _inputs_of(record: Recipe) -> list[tuple[str, str]]:
    """The inputs that a record names, each with its role."""
    base = [("base", record.base_model)] if record.base_model is not None else []
    named = [*base, *(("model", name) for name in record.names)]
    return list(dict.fromkeys((role, name) for role, name in named if name != record.base_model or role == "base"))


def _paths_of(record: Recipe) -> list[str]:
    from lines_cli.hub.client import HUB_ID

    return [name for _, name in _inputs_of(record) if HUB_ID.fullmatch(name) is None or "@" not in name]


def _description(record: Recipe, target: Target) -> str:
    """What the commit says beside its first line: from what, the digests, and how to make it again."""
    from lines_cli.storage.names import RECIPE

    paths = set(_paths_of(record))
    lines = [f"Written by lines {__version__} (`{record.merge_method}`)."]
    # A path is nobody's business but its last part.
    lines += [f"- {role}: `{Path(name).name if name in paths else name}`" for role, name in _inputs_of(record)]
    weights = {name: written for name, written in record.files.items() if name.endswith(".safetensors")}
    lines += ["", "Digests:", *(_digest(name, written) for name, written in list(weights.items())[:_MOST_DIGESTS])]
    if len(weights) > _MOST_DIGESTS:
        lines.append(f"- and {len(weights) - _MOST_DIGESTS:,} more in `{RECIPE}`")
    lines += ["", f"To make it again: `lines merge --config {RECIPE} -o OUT`", f"To check it: `lines verify {target}`"]
    return "\n".join(lines)


_MOST_DIGESTS = 20


def _digest(name: str, written: FileRecord) -> str:
    return f"- `{name}`: {written.nbytes:,} bytes, `{written.digest}`"
