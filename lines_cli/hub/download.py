"""A checkpoint's name -> where it lies: a path as it is, or a Hub id fetched through the Hub's own client and cache.

Of a repository only what an edit reads is fetched: one set of weights, safetensors if there are any, and the files that
an output folder takes over. Where headers are enough, the weights stay where they are.
"""

from __future__ import annotations

import glob
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lines_cli.checkpoint.pipeline import Reads, component_folders, stems_in
from lines_cli.checkpoint.reader import (
    ADAPTER_CONFIG,
    ADAPTERS,
    Heads,
    choose_weights,
    is_index,
    is_pickle,
    refuse_folder,
    shards_of,
    weights_among,
)
from lines_cli.checkpoint.sidecars import is_carried, is_carried_with_a_component, is_of_a_module, module_paths
from lines_cli.errors import CheckpointError, HubError, LinesError, size, some
from lines_cli.hub.buckets import locate_in_a_bucket
from lines_cli.hub.client import (
    CACHE,
    COMMIT,
    HUB_ID,
    NOT_IN_A_REVISION,
    chain,
    discreet,
    one_line,
    prepare,
    say,
    status_of,
    unreachable,
)
from lines_cli.hub.heads import headers_on_the_hub
from lines_cli.storage.beside import leads_out
from lines_cli.storage.names import (
    CONFIG,
    MODEL_CARD,
    MODEL_INDEX,
    MODULES,
    PICKLE_STEMS,
    RECIPE,
    WEIGHT_STEMS,
    file_and_part,
)
from lines_cli.storage.object_store import is_url


@dataclass(frozen=True, slots=True)
class Located:
    """Where a checkpoint lies.

    Attributes:
        path: the file or folder.
        name: as its user named it.
        hub_id: `org/name@commit`, for one that came from the Hub; the URL of one in an object store.
        part: which part of its file is meant (`file_and_part`), if the name says so.
        heads: where only headers were asked for, and the weights are not here: these.
        heads_of: the same of a pipeline, by the folder of each component that has weights.
    """

    path: Path
    name: str
    hub_id: str | None
    part: str | None = None
    heads: Heads | None = None
    heads_of: Mapping[str, Heads] | None = None


Only = Literal["headers", "plan"]
"""What is wanted of a checkpoint on the Hub, if not all that an edit reads: headers and config, to look at; or what a
plan is made of, which is headers and every file that is carried over.
"""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What is wanted of the Hub: the name as given, and its parts. A revision of None is the default branch. Of the
    files that are neither weights nor carried over those in `also`; of several sets of weights the `variant`. `quiet`:
    nothing is said of what is fetched. `only`: what is not needed of it, `reads`: which components are (`locate`).
    """

    name: str
    repo: str
    revision: str | None
    also: tuple[str, ...] = ()
    variant: str | None = None
    quiet: bool = True
    only: Only | None = None
    reads: Reads | None = None

    def say(self, text: str) -> None:
        """A line on stderr, unless it is quiet."""
        say(text, quiet=self.quiet)

    def at(self, snapshot: Path) -> Located:
        """The client keeps a commit's files in a folder named after the commit."""
        return Located(snapshot, self.name, f"{self.repo}@{snapshot.name}")


def is_missing(name: str) -> bool:
    """Whether a name is a path, for it cannot be a Hub id, and nothing is there."""
    file, _ = file_and_part(name)
    if os.path.exists(os.path.expanduser(file)) or is_url(file) or HUB_ID.fullmatch(file) is not None:
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


def locate(
    name: str,
    *,
    quiet: bool = False,
    also: tuple[str, ...] = (),
    variant: str | None = None,
    only: Only | None = None,
    reads: Reads | None = None,
) -> Located:
    """Find a checkpoint by path or, where there is no such path, by its Hub id `org/name[@revision]`.

    Args:
        name: as a person or a recipe gives it; behind a `#` the part of its file. `~` is expanded.
        quiet: no progress bars; there are none where stderr is no terminal, either.
        also: names of files that are wanted, too, where the repository has them.
        variant: of several sets of weights, which, where the repository has it (`open_checkpoint`).
        only: that the weights are not needed, if they are not in the cache already.
        reads: of a pipeline, the components that are needed, and nothing that is carried over with it; None for all.

    Raises:
        CheckpointError: it is neither a path that exists nor a Hub id, or the repository holds no clear set of weights.
        HubError: the Hub does not have it, does not give it to this user, or cannot be reached.
    """
    file, part = file_and_part(name)
    if part is not None:
        found = locate(file, quiet=quiet, also=also, variant=variant, only=only, reads=reads)
        return replace(found, name=name, part=part)
    path = os.path.expanduser(name)
    if os.path.exists(path):
        return Located(Path(path), name, None)
    if is_url(name):
        url, folder, heads = locate_in_a_bucket(name, also=also, variant=variant)
        return Located(folder, name, url, heads=heads)
    match = HUB_ID.fullmatch(name)
    if match is None:
        hint = "A model on the Hugging Face Hub is named org/name or org/name@revision."
        if name.startswith(("/", ".", "~")):
            hint = "Check the path: give a .safetensors file, or a folder that holds a checkpoint."
        raise CheckpointError(f"{name}: there is no such file or folder", hint=hint)
    revision = match["revision"]
    if revision is not None and NOT_IN_A_REVISION.search(revision):
        raise HubError(
            f"{name}: {revision!r} is not a valid revision, and there is no such file or folder here",
            hint="After the @ comes a branch, a tag or a commit, as in org/name@main.",
        )
    prepare(f"{name}: no such file or folder here, and", quiet=quiet)
    return _fetch(_Asked(name, match["repo"], revision, also, variant, quiet=quiet, only=only, reads=reads))


def _fetch(asked: _Asked) -> Located:
    """Fetch what is not in the cache yet. One commit, whatever is pushed meanwhile."""
    from huggingface_hub import HfApi, constants, hf_hub_download, try_to_load_from_cache

    with _explained(asked):
        try:
            info = HfApi().model_info(asked.repo, revision=asked.revision, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:
            if why := unreachable(error):
                return _from_cache(asked, why)
            raise
        commit, names = info.sha or "", {file.rfilename for file in info.siblings or ()}
        if not COMMIT.fullmatch(commit):
            raise HubError(f"{asked.name}: the Hub should name a commit of {asked.repo}, and names {commit!r}")
        if (index := _index_of_several(names)) is not None:
            return _fetch_several(asked, commit, names, index)
        chosen = _choose(asked, names)
        cache = CACHE.get()
        begun, saying = time.monotonic(), f"fetching {asked.name} from the Hub (commit {commit[:7]})"
        in_cache = isinstance(try_to_load_from_cache(asked.repo, chosen, cache, revision=commit), str)
        whole = asked.only is None or chosen in ADAPTERS  # of which all is small, and needed for a plan
        if not whole and (is_index(chosen) or not in_cache):
            found = _heads(asked, commit, names, chosen)
            if found is not None:
                return found
        fetched = set() if in_cache else {chosen}
        if fetched:
            asked.say(saying)

        # Asked for by branch, so that the cache notes the branch's commit and finds it again offline.
        first = Path(hf_hub_download(asked.repo, chosen, revision=asked.revision, cache_dir=cache))
        if first.parent.name != commit:  # pushed to since
            first = Path(hf_hub_download(asked.repo, chosen, revision=commit, cache_dir=cache))
        if MODULES in names:  # which says what else is needed
            hf_hub_download(asked.repo, MODULES, revision=commit, cache_dir=cache)
        wanted = _wanted(asked, names, first)
        if missing := sorted(set(wanted) - names):
            raise _lacks(asked, chosen, missing)
        lacking = _lacking(first.parent, wanted)
        if lacking and not fetched:
            asked.say(saying)
        fetched |= set(lacking)
        _bring(asked, commit, first.parent, wanted)
        _say_fetched(asked, first.parent, fetched, begun)
        return asked.at(first.parent)


def _bring(asked: _Asked, commit: str, folder: Path, wanted: Collection[str]) -> None:
    """Fetch what is lacking of these files into the snapshot's folder.

    Raises:
        HubError: some did not arrive.
    """
    from huggingface_hub import snapshot_download

    if _lacking(folder, wanted) or _cached_listing(asked.repo, commit) is None:
        exactly = [glob.escape(name) for name in wanted]
        snapshot_download(asked.repo, revision=commit, allow_patterns=exactly, cache_dir=CACHE.get())
    if lacking := _lacking(folder, wanted):  # where the Hub fails midway the client makes do with what it has
        raise HubError(
            f"{asked.name}: {len(lacking)} of {len(wanted)} files did not arrive:\n{some(lacking)}",
            hint="Run it again: what is in the cache already is not fetched again.",
        )


def _say_fetched(asked: _Asked, folder: Path, fetched: Collection[str], begun: float) -> None:
    if fetched:
        nbytes, seconds = sum((folder / name).stat().st_size for name in fetched), time.monotonic() - begun
        number = f"{len(fetched)} file{'s' if len(fetched) > 1 else ''}"
        rate = nbytes / max(seconds, 1e-9)
        asked.say(f"fetched {asked.name}: {number}, {size(nbytes)} in {seconds:.1f} s ({size(rate)}/s)")


# --- several models in one repository ---


def _index_of_several(names: Collection[str]) -> str | None:
    """The file that says which folders of a repository hold its models; None where it holds one, at its top."""
    if MODEL_INDEX in names:
        return MODEL_INDEX
    top = [name for name in names if "/" not in name]
    return MODULES if MODULES in names and not weights_among(top) else None


def _fetch_several(asked: _Asked, commit: str, names: Collection[str], index: str) -> Located:
    """Fetch a pipeline: its index, then what says which weights are meant, then these, and what is carried over."""
    from huggingface_hub import hf_hub_download

    begun, cache = time.monotonic(), CACHE.get()
    first = Path(hf_hub_download(asked.repo, index, revision=asked.revision, cache_dir=cache))
    if first.parent.name != commit:  # pushed to since
        first = Path(hf_hub_download(asked.repo, index, revision=commit, cache_dir=cache))
    folder = first.parent
    configs = [name for part in _parts(asked, folder) if (name := f"{part}/{CONFIG}") in names]
    _bring(asked, commit, folder, [index, *configs])
    chosen = _chosen_of_each(asked, names, folder)
    indices = [f"{part}/{name}" for part, name in chosen.items() if is_index(name)]
    _bring(asked, commit, folder, [index, *configs, *indices])
    wanted, weights = _wanted_of_several(asked, names, folder, chosen)
    if missing := sorted({*wanted, *weights} - set(names)):
        raise _lacks(asked, "index", missing)
    lacking = _lacking(folder, weights)
    if asked.only is not None and lacking and not any(map(is_pickle, weights)):
        if asked.only == "plan":
            _bring(asked, commit, folder, wanted)
        files = headers_on_the_hub(asked.name, asked.repo, commit, weights)
        _say_heads(asked, commit, files)
        heads = {
            part: Heads(
                name,
                {file.removeprefix(f"{part}/"): held for file, held in files.items() if file.startswith(f"{part}/")},
            )
            for part, name in chosen.items()
        }
        return Located(folder, asked.name, f"{asked.repo}@{commit}", heads_of=heads)
    lacking += _lacking(folder, wanted)
    if lacking:
        asked.say(f"fetching {asked.name} from the Hub (commit {commit[:7]})")
    _bring(asked, commit, folder, [*wanted, *weights])
    _say_fetched(asked, folder, lacking, begun)
    return asked.at(folder)


def _parts(asked: _Asked, folder: Path) -> list[str]:
    """The folders of a pipeline that are needed, by its index, which is here."""
    if (folder / MODEL_INDEX).is_file():
        return [part for part in component_folders(folder) if asked.reads is None or asked.reads(part)]
    return [part for part in module_paths(folder) if part]


def _chosen_of_each(asked: _Asked, names: Collection[str], folder: Path) -> dict[str, str]:
    """For each folder that holds weights the index or the weight file that they hang on."""
    found: dict[str, str] = {}
    for part in _parts(asked, folder):
        within = [name.removeprefix(f"{part}/") for name in names if name.startswith(f"{part}/")]
        top = [name for name in within if "/" not in name]
        chosen = choose_weights(top, asked.variant, stems_in(folder / part))
        if chosen is None and weights_among(top):
            refuse_folder(f"{asked.name}/{part} (on the Hub)", top)
        if chosen is not None:
            found[part] = chosen
    return found


def _wanted_of_several(
    asked: _Asked, names: Collection[str], folder: Path, chosen: Mapping[str, str]
) -> tuple[list[str], list[str]]:
    """The files to fetch of a pipeline: what is no weights; and the weights, by their indices, which are here."""
    weights: list[str] = []
    for part, name in chosen.items():
        shards = shards_of(folder / part / name) if is_index(name) else [name]
        weights += [f"{part}/{shard}" for shard in shards]
    parts, of_modules = _parts(asked, folder), not (folder / MODEL_INDEX).is_file()

    def is_wanted(name: str) -> bool:
        part = next((part for part in parts if name.startswith(f"{part}/")), None)
        if part is None:
            at_top = "/" not in name and (is_carried(name) or name == MODEL_INDEX)
            return name in (MODEL_CARD, MODEL_INDEX, *asked.also) or (at_top and asked.reads is None)
        own = name.removeprefix(f"{part}/")
        return is_carried_with_a_component(own) or (of_modules and is_of_a_module(own))

    indices = [f"{part}/{name}" for part, name in chosen.items() if is_index(name)]
    wanted = sorted({*filter(is_wanted, names), *indices} - set(weights))
    for name in (*wanted, *weights):
        if leads_out(name):
            raise HubError(f"{asked.name}: refused, because it lists a file outside its own folder: {name!r}")
    return wanted, weights


def _heads(asked: _Asked, commit: str, names: Collection[str], chosen: str) -> Located | None:
    """The headers of the weights, and the small files that are wanted with them; None where all weights are here, or
    in a format whose structure is not at the beginning of its files.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    cache = CACHE.get()
    small = [chosen] if is_index(chosen) else []
    small += [name for name in (CONFIG, RECIPE, MODULES) if name in names]
    folder = Path(asked.name)
    for name in small:
        folder = Path(hf_hub_download(asked.repo, name, revision=commit, cache_dir=cache)).parent
    shards = list(shards_of(folder / chosen)) if is_index(chosen) else [chosen]
    if missing := sorted(set(shards) - set(names)):
        raise _lacks(asked, chosen, missing)
    if any(map(is_pickle, shards)) or (small and not _lacking(folder, shards)):
        return None
    if asked.only == "plan":
        beside = sorted(set(_wanted(asked, names, folder / chosen)) - set(shards))
        if lacking := _lacking(folder, beside):
            exactly = [glob.escape(name) for name in lacking]
            folder = Path(snapshot_download(asked.repo, revision=commit, allow_patterns=exactly, cache_dir=cache))
    files = headers_on_the_hub(asked.name, asked.repo, commit, shards)
    _say_heads(asked, commit, files)
    return Located(folder, asked.name, f"{asked.repo}@{commit}", heads=Heads(chosen, files))


def _say_heads(asked: _Asked, commit: str, files: Mapping[str, tuple[int, bytes]]) -> None:
    read, weights = sum(len(header) for _, header in files.values()), sum(nbytes for nbytes, _ in files.values())
    number = f"{len(files)} header{'s' if len(files) > 1 else ''}"
    asked.say(f"read {number} of {asked.name} on the Hub (commit {commit[:7]}): {size(read)} of {size(weights)}")


def _lacks(asked: _Asked, chosen: str, missing: Sequence[str]) -> CheckpointError:
    return CheckpointError(f"{asked.name}: its {chosen} names shards that {asked.repo} lacks:\n{some(missing)}")


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
            snapshot_download(
                asked.repo, revision=asked.revision, allow_patterns=[], local_files_only=True, cache_dir=CACHE.get()
            )
        )
    except LocalEntryNotFoundError as error:
        absent = f"no such file or folder here, and no copy of {asked.repo} in the Hub's cache"
        raise refusal(absent, "check the path") from error
    as_it_is = f"give the folder in the cache itself: {snapshot}"
    names = _cached_listing(asked.repo, snapshot.name)
    if names is None:
        names = {file.relative_to(snapshot).as_posix() for file in snapshot.rglob("*") if file.is_file()}
        top = {name for name in names if "/" not in name}
        chosen = choose_weights(top, asked.variant) or (_adapter_among(top) if ADAPTER_CONFIG in top else None)
        if chosen is None or (
            chosen.partition(".")[0] not in (*WEIGHT_STEMS, *PICKLE_STEMS) and chosen not in ADAPTERS
        ):
            raise refusal("whether the copy in the Hub's cache is complete is not known", as_it_is)
    elif (index := _index_of_several(names)) is not None:
        if lacking := _lacking(snapshot, [index]) or _lacking_of_several(asked, names, snapshot):
            raise refusal(f"the copy in the Hub's cache lacks {', '.join(lacking[:3])}", as_it_is)
        return asked.at(snapshot)
    else:
        chosen = _choose(asked, names)
    first = snapshot / chosen
    wanted = _wanted(asked, names, first) if first.is_file() else [chosen]
    if lacking := _lacking(snapshot, wanted):
        raise refusal(f"the copy in the Hub's cache lacks {', '.join(lacking[:3])}", as_it_is)
    return asked.at(snapshot)


def _lacking_of_several(asked: _Asked, names: Collection[str], snapshot: Path) -> list[str]:
    """What is needed of a pipeline and not in the cache."""
    chosen = _chosen_of_each(asked, names, snapshot)
    indices = [f"{part}/{name}" for part, name in chosen.items() if is_index(name)]
    if lacking := _lacking(snapshot, indices):
        return lacking
    wanted, weights = _wanted_of_several(asked, names, snapshot, chosen)
    return _lacking(snapshot, [*weights, *wanted])


def _cached_listing(repo: str, commit: str) -> set[str] | None:
    """The names of all files of a commit, if the client remembers them (`snapshot_download` makes it)."""
    try:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError
    except ImportError:
        return None
    try:
        return {file.path for file in get_cached_repo_tree(repo, revision=commit, cache_dir=CACHE.get())}
    except CachedRepoTreeNotFoundError:
        return None


def _choose(asked: _Asked, names: Collection[str]) -> str:
    """The index or the weight file that the repository's weights hang on."""
    top = {name for name in names if "/" not in name}
    inside = [name.split("/") for name in names if name.count("/") == 1]
    components = sorted({folder for folder, name in inside if weights_among([name])})
    chosen = choose_weights(top, asked.variant) or _adapter_among(top)
    return chosen or refuse_folder(f"{asked.name} (on the Hub)", top, components=components)


def _adapter_among(names: Collection[str]) -> str | None:
    """The file of an adapter's weights among those of a repository that holds no others."""
    return next((name for name in ADAPTERS if name in names), None)


def _wanted(asked: _Asked, names: Collection[str], chosen: Path) -> list[str]:
    """The files to fetch, `chosen` (which is here already) among them. None leads out of the snapshot's folder."""
    shards = shards_of(chosen) if is_index(chosen.name) else ()
    modules = tuple(f"{path}/" for path in module_paths(chosen.parent))
    beside = sorted(
        name
        for name in names
        if is_carried(name) or name in (MODEL_CARD, *asked.also) or (name.startswith(modules) and is_of_a_module(name))
    )
    if chosen.name in ADAPTERS and ADAPTER_CONFIG in names:
        beside.append(ADAPTER_CONFIG)
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
        with discreet():
            yield
    except LinesError:
        raise
    except Exception as error:
        raise _explain(error, asked) from error


def _explain(error: Exception, asked: _Asked) -> HubError:
    from huggingface_hub import constants, errors

    log_in = "log in (hf auth login) or set HF_TOKEN"
    name, page = asked.name, f"{constants.ENDPOINT}/{asked.repo}"
    if why := unreachable(error):
        return HubError(
            f"{name}: no such file or folder here, and {why}", hint="Check the path, or the connection, and try again."
        )
    for cause in chain(error):
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
                status = status_of(cause) or "an error"
                if status in (401, 403):
                    return HubError(f"{name}: the Hub refuses access to {asked.repo} ({status})", hint=f"To {log_in}.")
                return HubError(f"{name}: the Hub answered {status} for {asked.repo}: {one_line(cause)}")
            case OSError(errno=int(), strerror=str(reason)):
                return HubError(
                    f"{name}: the Hub's cache cannot be used: "
                    f"{cause.filename or CACHE.get() or constants.HF_HUB_CACHE}: {reason}",
                    hint="Set HF_HOME or HF_HUB_CACHE to another place, or give one with --cache.",
                )
    return HubError(f"{name}: {asked.repo} could not be fetched: {type(error).__name__}: {one_line(error)}")
