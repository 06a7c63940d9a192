"""A checkpoint's name -> where it lies: a path as it is, or a Hub id fetched through the Hub's own client and cache.

The client decides on endpoint, token, cache, offline mode and progress bars (HF_ENDPOINT, HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE, ...). Of a repository only what an edit reads is fetched: one set of safetensors weights, and the files
that an output folder takes over. It is imported only once a name is no path: importing it takes longer than reading a
header.

An endpoint, a proxy and a token may be secret, and the client quotes them: what it says is shown and logged without.
"""

from __future__ import annotations

import glob
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lines_cli.checkpoint.reader import choose_weights, is_index, refuse_folder, shards_of
from lines_cli.checkpoint.sidecars import is_carried, is_of_a_module, module_paths
from lines_cli.errors import CheckpointError, HubError, LinesError, printable, size, some, without_secrets
from lines_cli.storage.beside import leads_out
from lines_cli.storage.names import MODEL_CARD, MODULES, WEIGHT_STEMS

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9_][\w.-]*/[\w.-]+)(?:@(?P<revision>.*))?", re.ASCII | re.DOTALL)
_NOT_IN_A_REVISION = re.compile(r"[\s\x00-\x1f\x7f\\:?*~^\[]|\.\.|//|^[/-]|/$|^$")
_WEIGHTS = ".safetensors"
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class Located:
    """Where a checkpoint lies.

    Attributes:
        path: the file or folder.
        name: as its user named it.
        hub_id: `org/name@commit`, for one that came from the Hub.
    """

    path: Path
    name: str
    hub_id: str | None


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is wanted of the Hub: the name as given, and its parts. A revision of None is the default branch. Of the
    files that are neither weights nor carried over those in `also`; of several sets of weights the `variant`. `quiet`:
    nothing is said of what is fetched.
    """

    name: str
    repo: str
    revision: str | None
    also: tuple[str, ...] = ()
    variant: str | None = None
    quiet: bool = True

    def say(self, text: str) -> None:
        """A line on stderr, unless it is quiet: fetching takes longer than all else."""
        if not self.quiet:
            sys.stderr.write(printable(without_secrets(text)) + "\n")
            sys.stderr.flush()

    def at(self, snapshot: Path) -> Located:
        """The client keeps a commit's files in a folder named after the commit."""
        return Located(snapshot, self.name, f"{self.repo}@{snapshot.name}")


def is_missing(name: str) -> bool:
    """Whether a name is a path, for it cannot be a Hub id, and nothing is there."""
    if os.path.exists(os.path.expanduser(name)) or _HUB_ID.fullmatch(name) is not None:
        return False
    return base_and_adapter(name) is None


def base_and_adapter(name: str, seen: Callable[[str], str] = str) -> tuple[str, str] | None:
    """The two halves of `base+adapter`, where no path is called so, and both are there or may be on the Hub.

    Args:
        name: as a person or a recipe gives it.
        seen: where a half lies, as seen from the current folder.
    """
    if "+" not in name or os.path.lexists(os.path.expanduser(seen(name))):
        return None
    for at in (at for at, letter in enumerate(name) if letter == "+"):
        halves = name[:at], name[at + 1 :]
        if all(half and not is_missing(seen(half)) for half in halves):
            return halves
    return None


def locate(name: str, *, quiet: bool = False, also: tuple[str, ...] = (), variant: str | None = None) -> Located:
    """Find a checkpoint by path or, where there is no such path, by its Hub id `org/name[@revision]`.

    Args:
        name: as a person or a recipe gives it. `~` is expanded.
        quiet: no progress bars; there are none where stderr is no terminal, either.
        also: names of files that are wanted, too, where the repository has them.
        variant: of several sets of weights, which, where the repository has it (`open_checkpoint`).

    Raises:
        CheckpointError: it is neither a path that exists nor a Hub id, or the repository holds no clear set of weights.
        HubError: the Hub does not have it, does not give it to this user, or cannot be reached.
    """
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Located(Path(path), name, None)
    match = _HUB_ID.fullmatch(name)
    if match is None:
        hint = "A model on the Hugging Face Hub is named org/name or org/name@revision."
        if name.startswith(("/", ".", "~")):
            hint = "Check the path: give a .safetensors file, or a folder that holds a checkpoint."
        raise CheckpointError(f"{name}: there is no such file or folder", hint=hint)
    revision = match["revision"]
    if revision is not None and _NOT_IN_A_REVISION.search(revision):
        raise HubError(
            f"{name}: {revision!r} is not a valid revision, and there is no such file or folder here",
            hint="After the @ comes a branch, a tag or a commit, as in org/name@main.",
        )
    try:
        from huggingface_hub import HfApi  # noqa: F401 - as much of it as there will be
        from huggingface_hub.utils.tqdm import disable_progress_bars
    except ValueError as error:  # it reads its settings then; what it says of them may be part of a password
        raise HubError(
            f"{name}: no such file or folder here, and the Hub's client does not accept its settings",
            hint="Check HF_ENDPOINT and the other HF_ variables in the environment.",
        ) from error
    if quiet or not sys.stderr.isatty() or os.environ.get("TERM") in ("dumb", "unknown"):
        disable_progress_bars()
    return _fetch(_Asked(name, match["repo"], revision, also, variant, quiet=quiet))


def _fetch(asked: _Asked) -> Located:
    """Fetch what is not in the cache yet. One commit, whatever is pushed meanwhile."""
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download, try_to_load_from_cache

    with _explained(asked):
        try:
            info = HfApi().model_info(asked.repo, revision=asked.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:
            if why := _unreachable(error):
                return _from_cache(asked, why)
            raise
        commit, names = info.sha or "", {file.rfilename for file in info.siblings or ()}
        if not _COMMIT.fullmatch(commit):
            raise HubError(f"{asked.name}: the Hub should name a commit of {asked.repo}, and names {commit!r}")
        chosen = _choose(asked, names)
        begun, saying = time.monotonic(), f"fetching {asked.name} from the Hub (commit {commit[:7]})"
        fetched = set() if isinstance(try_to_load_from_cache(asked.repo, chosen, revision=commit), str) else {chosen}
        if fetched:
            asked.say(saying)

        # Asked for by branch, so that the cache notes the branch's commit and finds it again offline.
        first = Path(hf_hub_download(asked.repo, chosen, revision=asked.revision))
        if first.parent.name != commit:  # pushed to since
            first = Path(hf_hub_download(asked.repo, chosen, revision=commit))
        if MODULES in names:  # which says what else is needed
            hf_hub_download(asked.repo, MODULES, revision=commit)
        wanted = _wanted(asked, names, first)
        if missing := sorted(set(wanted) - names):
            raise CheckpointError(f"{asked.name}: its {chosen} names shards that {asked.repo} lacks:\n{some(missing)}")
        lacking = _lacking(first.parent, wanted)
        if lacking and not fetched:
            asked.say(saying)
        fetched |= set(lacking)
        if lacking or _cached_listing(asked.repo, commit) is None:
            exactly = [glob.escape(name) for name in wanted]
            snapshot_download(asked.repo, revision=commit, allow_patterns=exactly)
        if lacking := _lacking(first.parent, wanted):  # where the Hub fails midway the client makes do with what it has
            raise HubError(
                f"{asked.name}: {len(lacking)} of {len(wanted)} files did not arrive:\n{some(lacking)}",
                hint="Run it again: what is in the cache already is not fetched again.",
            )
        if fetched:
            nbytes, seconds = sum((first.parent / name).stat().st_size for name in fetched), time.monotonic() - begun
            number = f"{len(fetched)} file{'s' if len(fetched) > 1 else ''}"
            rate = nbytes / max(seconds, 1e-9)
            asked.say(f"fetched {asked.name}: {number}, {size(nbytes)} in {seconds:.1f} s ({size(rate)}/s)")
        return asked.at(first.parent)


def _from_cache(asked: _Asked, why: str) -> Located:
    """What an earlier run fetched, if it is all there.

    The client remembers what the commits that it fetched hold (not before huggingface_hub 1.x). Of any other snapshot
    nobody knows what it lacks: only weights under a library's own name can then be taken for the repository's weights.

    Args:
        asked: what is wanted.
        why: why the Hub cannot be asked.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refusal(problem: str, way_out: str) -> HubError:
        once = "Run it once with a connection, and later runs use the cache"
        return HubError(f"{asked.name}: {problem}; {why}", hint=f"{once}; or {way_out}.")

    try:  # no patterns: the snapshot's folder, however full
        snapshot = Path(
            snapshot_download(asked.repo, revision=asked.revision, allow_patterns=[], local_files_only=True)
        )
    except LocalEntryNotFoundError as error:
        absent = f"no such file or folder here, and no copy of {asked.repo} in the Hub's cache"
        raise refusal(absent, "check the path") from error
    as_it_is = f"give the folder in the cache itself: {snapshot}"
    names = _cached_listing(asked.repo, snapshot.name)
    if names is None:
        names = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}
        chosen = choose_weights({name for name in names if "/" not in name}, asked.variant)
        if chosen is None or chosen.partition(".")[0] not in WEIGHT_STEMS:
            raise refusal("whether the copy in the Hub's cache is complete is not known", as_it_is)
    else:
        chosen = _choose(asked, names)
    first = snapshot / chosen
    wanted = _wanted(asked, names, first) if first.is_file() else [chosen]
    if lacking := _lacking(snapshot, wanted):
        raise refusal(f"the copy in the Hub's cache lacks {', '.join(lacking[:3])}", as_it_is)
    return asked.at(snapshot)


def _cached_listing(repo: str, commit: str) -> set[str] | None:
    """The names of all files of a commit, if the client remembers them (`snapshot_download` makes it)."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _choose(asked: _Asked, names: Collection[str]) -> str:
    """The index or the weight file that the repository's weights hang on."""
    top = {name for name in names if "/" not in name}
    components = sorted({name.partition("/")[0] for name in names if name.count("/") == 1 and name.endswith(_WEIGHTS)})
    chosen = choose_weights(top, asked.variant)
    return chosen or refuse_folder(f"{asked.name} (on the Hub)", top, components=components)


def _wanted(asked: _Asked, names: Collection[str], chosen: Path) -> list[str]:
    """The files to fetch, `chosen` (which is here already) among them. None leads out of the snapshot's folder."""
    shards = shards_of(chosen) if is_index(chosen.name) else ()
    modules = tuple(f"{path}/" for path in module_paths(chosen.parent))
    beside = sorted(
        name
        for name in names
        if is_carried(name) or name in (MODEL_CARD, *asked.also) or (name.startswith(modules) and is_of_a_module(name))
    )
    wanted = [chosen.name, *shards, *beside]
    for name in wanted:
        if leads_out(name):
            raise HubError(f"{asked.name}: refused, because it lists a file outside its own folder: {name!r}")
    return wanted


def _lacking(snapshot: Path, wanted: Collection[str]) -> list[str]:
    return [name for name in wanted if not (snapshot / name).is_file()]


@contextmanager
def _explained(asked: _Asked) -> Iterator[None]:
    """Turn whatever the client raises into a HubError, and hide what is secret in what it logs."""
    try:
        with _discreet():
            yield
    except LinesError:
        raise
    except Exception as error:
        raise _explain(error, asked) from error


@contextmanager
def _discreet() -> Iterator[None]:
    """Within it, logs and warnings hold no credentials."""

    def hide(record: logging.LogRecord) -> bool:
        record.msg, record.args, record.exc_info = _hidden(record.getMessage()), None, None
        return True

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        sys.stderr.write(_hidden(warnings.formatwarning(message, category, filename, lineno)))

    handlers = [*logging.getLogger("huggingface_hub").handlers, *logging.getLogger().handlers]
    handlers += [logging.lastResort] if logging.lastResort else []
    for handler in handlers:
        handler.addFilter(hide)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show  # type: ignore[assignment]
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(hide)


_LIKE_A_TOKEN = re.compile(r"(?<![A-Za-z0-9])hf_[A-Za-z0-9]{6,}")


def _hidden(text: str) -> str:
    """What the client says without credentials, the token that it found in its own files among them."""
    from huggingface_hub import get_token

    if token := get_token():
        text = text.replace(token, "***")
    return _LIKE_A_TOKEN.sub("hf_***", without_secrets(text))


def _explain(error: Exception, asked: _Asked) -> HubError:
    from huggingface_hub import constants, errors

    log_in = "log in (hf auth login) or set HF_TOKEN"
    name, page = asked.name, f"{constants.ENDPOINT}/{asked.repo}"
    if why := _unreachable(error):
        return HubError(
            f"{name}: no such file or folder here, and {why}", hint="Check the path, or the connection, and try again."
        )
    for cause in _chain(error):
        match cause:
            case errors.GatedRepoError():
                return HubError(
                    f"{name}: {asked.repo} is gated, and this login has no access to it",
                    hint=f"Accept its terms at {page}, then {log_in}.",
                )
            case errors.RepositoryNotFoundError():
                return HubError(
                    f"{name}: no such file or folder here, and the Hub shows no model {asked.repo}",
                    hint=f"Check the spelling; if it is private, {log_in}.",
                )
            case errors.RevisionNotFoundError():
                return HubError(
                    f"{name}: {asked.repo} is on the Hub, but has no revision {asked.revision or 'main'!r}",
                    hint=f"Its branches and tags: {page}/tree/main",
                )
            case errors.HFValidationError():
                return HubError(f"{name}: there is no such file or folder, and it is not a valid Hub id")
            case errors.HfHubHTTPError():
                status = getattr(cause.response, "status_code", "an error")
                if status in (401, 403):
                    return HubError(f"{name}: the Hub refuses access to {asked.repo} ({status})", hint=f"To {log_in}.")
                return HubError(f"{name}: the Hub answered {status} for {asked.repo}: {_one_line(cause)}")
            case OSError(errno=int(), strerror=str(reason)):
                return HubError(
                    f"{name}: the Hub's cache cannot be used: {cause.filename or constants.HF_HUB_CACHE}: {reason}",
                    hint="Set HF_HOME or HF_HUB_CACHE to another place.",
                )
    return HubError(f"{name}: {asked.repo} could not be fetched: {type(error).__name__}: {_one_line(error)}")


def _unreachable(error: BaseException) -> str | None:
    """Why the Hub could not be asked; None if it did answer, or never had to.

    The client's HTTP library has changed with its versions (requests, httpx, httpx2), so its errors are known by where
    they come from.
    """
    from huggingface_hub import constants, errors

    for cause in _chain(error):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return "the Hub is offline (HF_HUB_OFFLINE is set)"
        if isinstance(cause, errors.HfHubHTTPError):
            status = getattr(cause.response, "status_code", 0)
            return f"the Hub reports an error of its own ({status})" if status >= 500 else None
        library = type(cause).__module__.partition(".")[0]
        if library.startswith(("httpx", "httpcore", "requests", "urllib3")) or isinstance(
            cause, ConnectionError | TimeoutError
        ):
            return f"{constants.ENDPOINT} cannot be reached ({type(cause).__name__}: {_one_line(cause)})"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from, the last first."""
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(error: BaseException) -> str:
    return next((line.strip() for line in _hidden(str(error)).splitlines() if line.strip()), "no reason given")
