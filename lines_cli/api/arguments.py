"""What a person writes on the command line or in a call, read: paths, NAME=VALUE pairs, sizes. Messages speak of the
command line's options, whose names Python's keywords share.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.errors import RecipeError

if TYPE_CHECKING:
    from lines_cli.hub.upload import Target
    from lines_cli.plan.resources import Resources

Pairs = Mapping[str, Any] | Iterable[str]
"""What `--stack` and `--filter` say: `NAME=VALUE` texts, or names with their values."""


Components = Mapping[str, Any] | Iterable[str]
"""What `--component` says: `NAME` and `NAME=RULE` texts, or names with their rules."""

Series = str | Sequence[str] | Sequence[Sequence[str]]
"""What `--series` says: `A,B,C`, or the names; or several of either (`parse_series`)."""


def path(flag: str, given: str | Path) -> Path:
    """A path, with `~` for the home folder: a shell leaves it as it is in `--output=~/out`, and Python everywhere."""
    found = os.path.expanduser(given)
    if not found:
        raise RecipeError(f"{flag} is empty", hint="Name a folder or a file.")
    if found.startswith("~"):
        raise RecipeError(
            f"{flag} {given}: there is no user {found.partition('/')[0][1:]!r} here",
            hint=f"To name something that begins with ~, write ./{given}.",
        )
    return Path(found)


def plan_file(flag: str, given: str | Path) -> Path:
    """Where a plan.json is: on a disk, or in an object store."""
    from lines_cli.storage.object_store import is_url, placed_at

    return placed_at(given) if is_url(str(given)) else path(flag, given)


def destination_unless(given: str | Path | None, *, dry_run: bool, unnamed: str, or_else: str = "") -> Path | None:
    """The same; None where it is not said and `dry_run` needs none.

    Raises:
        RecipeError: it is not said (`unnamed` says so), or its name is that of a file of another format.
    """
    if given is not None:
        return destination(given)
    if not dry_run:
        raise RecipeError(unnamed, hint=f"Say where with -o OUT{or_else}; only --dry-run needs none.")
    return None


def destination(given: str | Path) -> Path:
    """Where the output goes: a folder, or a .safetensors file; on a disk, or in an object store.

    Raises:
        RecipeError: its name is that of a file of another format; or of no folder in a bucket.
    """
    from lines_cli.storage.object_store import ObjectPath, is_url, url_of

    found = path("-o", given)
    url = url_of(str(given))
    if url is not None and url.count("/") > 2 and not {".", ".."} & {*url.split("/")}:
        found = ObjectPath(url)
    elif url is not None or is_url(str(given)):
        raise RecipeError(f"-o {given}: not the URL of a folder in a bucket", hint="As in -o s3://bucket/folder.")
    elif _OTHER_URL.match(str(given)):
        raise RecipeError(
            f"-o {given}: a URL of a kind that lines does not write to",
            hint="Object stores are s3://bucket/folder, gs:// and az:// (small letters); lines push writes to the Hub.",
        )
    if found.name.lower().endswith(_OTHER_FORMATS):
        raise RecipeError(
            f"-o {found}: lines writes safetensors, and no {found.suffix} file",
            hint=f"Give a folder, or one file: -o {found.with_suffix('.safetensors')}.",
        )
    return found


def on_a_disk(destination: Path | None, *, what: str, hint: str) -> None:
    """Refuse a destination in an object store.

    Args:
        destination: None where there is none.
        what: why, as in `lines sweep keeps its trials beside the output`.
        hint: what to do.

    Raises:
        RecipeError: it is in a store.
    """
    from lines_cli.storage.object_store import url_of

    if destination is not None and url_of(destination) is not None:
        raise RecipeError(f"-o {destination}: {what}, which has to be on a disk", hint=hint)


def one_that_reads_back(destination: Path | None, *, verify: bool) -> None:
    """Refuse to verify a single object before it is there.

    Raises:
        RecipeError: that is asked.
    """
    from lines_cli.storage.destination import is_one_file
    from lines_cli.storage.object_store import url_of

    if verify and destination is not None and url_of(destination) is not None and is_one_file(destination):
        raise RecipeError(
            f"-o {destination}: --verify reads an output back before anybody finds it, and an object by itself appears "
            "when it is whole",
            hint=f"Leave out --verify; or write a folder: -o {destination.with_suffix('')}.",
        )


_OTHER_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://|(?:s3|gs|az|hf):", re.IGNORECASE)
_OTHER_FORMATS = (*".bin .pt .pth .ckpt .gguf .h5 .msgpack .onnx .npz .pkl .json .safetensor .sft".split(),)


def pairs(flag: str, given: Pairs | None) -> dict[str, Any] | None:
    """`NAME=keep`, `NAME=0.5` and `NAME=alpha,beta` as the recipe has them; a mapping from Python is so already."""
    if isinstance(given, Mapping):
        return dict(given) or None
    pairs: dict[str, Any] = {}
    for text in [given] if isinstance(given, str) else given or ():
        name, equals, value = text.rpartition("=")
        ends = value.split(",")
        if not equals or not name or name in pairs:
            raise RecipeError(f"{flag} {text}: expected {flag} NAME=VALUE, and each NAME once")
        pairs[name] = {"alpha": ends[0], "beta": ends[1]} if len(ends) == 2 else value
    return pairs or None


def components(given: Components | None) -> dict[str, Any] | None:
    """`NAME`, `NAME=keep` and `NAME=alpha,beta` as the recipe has them: one that is to be edited leaves all others as
    they are. A mapping from Python is so already.
    """
    if isinstance(given, Mapping):
        return dict(given) or None
    found: dict[str, Any] = {}
    for text in [given] if isinstance(given, str) else given or ():
        name, equals, value = text.partition("=")
        ends = value.split(",")
        if not name or name in found or (equals and not all(ends)) or len(ends) > 2:
            raise RecipeError(f"--component {text}: expected --component NAME or NAME=RULE, and each NAME once")
        if not equals or value in ("edit", "keep", "base"):
            found[name] = value or "edit"
        else:
            found[name] = dict(zip(("alpha", "beta"), ends, strict=False))
    if any(rule not in ("keep", "base") for rule in found.values()):
        found.setdefault("*", "keep")
    return found or None


def num_layers(given: int | Mapping[str, int] | Iterable[str] | None) -> Any:
    """`--num-layers 12`, or `--num-layers NAME=12` for each stack, as the recipe has it.

    Raises:
        RecipeError: several without names.
    """
    if given is None or isinstance(given, (int, Mapping)):
        return given
    texts = [given] if isinstance(given, str) else list(given)
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    found: dict[str, str] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        if not equals or not name or name in found:
            raise RecipeError(f"--num-layers {text}: expected --num-layers L, or --num-layers NAME=L for each stack")
        found[name] = number
    return found


def each_series(given: Iterable[str] | None) -> list[list[str]] | None:
    """Each `--series A,B,C` of a command line as a list of names."""
    return [one.split(",") for one in given or ()] or None


def use_cache(given: str | Path | None) -> None:
    """Have what is fetched from the Hub kept in a folder; None for the one that the Hub's client chooses."""
    from lines_cli.hub.client import CACHE

    CACHE.set(None if given is None else path("--cache", given))


def target(repo: str | None, *, private: bool, revision: str | None, destination: Path | None) -> Target | None:
    """Where on the Hub the output goes, if it does.

    Raises:
        RecipeError: it cannot go there, or what is said of the Hub says nothing without `--push-to`.
    """
    if repo is None:
        for flag, given in (("--private", private), (f"--revision {revision}", revision is not None)):
            if given:
                raise RecipeError(f"{flag} is said of a push, and nothing is pushed", hint="Add --push-to org/name.")
        return None
    from lines_cli.hub.upload import target_of
    from lines_cli.storage.destination import is_one_file

    found = target_of(repo, private=private, revision=revision)
    on_a_disk(destination, what="--push-to sends what lies in the output", hint="Name a folder here, or leave it out.")
    if destination is not None and is_one_file(destination):
        raise RecipeError(
            f"-o {destination}: --push-to puts a folder on the Hub, with config and record, and no single file",
            hint=f"Write a folder: -o {destination.with_suffix('')}.",
        )
    return found


def resources(workers: int | None, device: str, gpu_memory: str | int | None) -> Resources:
    """What a run may use."""
    from lines_cli.plan.resources import Resources
    from lines_cli.recipe.schema import parse_size

    try:
        most = None if gpu_memory is None else parse_size(gpu_memory)
    except ValueError as error:
        raise RecipeError(f"--gpu-memory {gpu_memory}: {error}") from error
    return Resources(workers=workers, device=device, gpu_memory=most)
