"""What lies beside the weights in a folder that may be a stranger's: which names and links leave the folder, and small
files, each read whole or refused.

Weights (safetensors files, what torch.save wrote, and their index) may be links to wherever their user keeps them:
nothing of them is copied as it stands. Every other file is looked up with `beside`, which follows no link out of the
folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

from lines_cli.errors import CheckpointError, some
from lines_cli.storage.files import FETCH_LFS, LFS_POINTER, read_small
from lines_cli.storage.names import PICKLES

LARGEST_JSON = 16 * 2**20
"""Bytes of a JSON file that is parsed."""
LARGEST_INDEX = 64 * 2**20
"""Bytes of an index."""

MOST_VALUES = 2_000_000  # a value takes some 100 bytes, and as long as it takes to look at it
_DEEPEST_JSON = 100
_UNREADABLE = "Ask whoever owns it for permission to read it."
_NOT_JSON = "The file is damaged: copy or download it again."
_REPOSITORY = re.compile(r"(?:models|datasets|spaces)--.+")
_SHARED_BLOB = re.compile(r"[0-9a-f]{64}")


def leads_out(name: str) -> bool:
    """Whether a file name from a stranger's file is none within the folder that the file stands in."""
    parts = PurePosixPath(name)
    return not name or "\\" in name or "\0" in name or parts.is_absolute() or ".." in parts.parts


def beside(folder: Path, name: str) -> Path | None:
    """The regular file of that name in a folder; None if there is none. A pipe or a folder of that name is none.

    Raises:
        CheckpointError: a link on the way to it leaves the folder.
    """
    refuse_link_out(folder, name)
    path = folder / name
    return path if os.path.isfile(path) else None


def refuse_link_out(folder: Path, name: str) -> None:
    """Refuse what lies in a folder by its name and elsewhere in truth: it would be read, and copied into a folder that
    people upload. The folder itself may be a link. In the Hub's cache a file is a link to its content, in the `blobs`
    of its repository or in those that repositories share.

    Raises:
        CheckpointError: a link on the way to it leaves the folder, whether there is anything at its end or not.
    """
    if (target := outside(folder, name)) is not None:
        others = [other for other in _links_out(folder) if other not in (name, name.partition("/")[0])]
        more = f", and so are others:\n{some(others)}" if others else ""
        copied = f"cp -rL {shlex.quote(str(folder))} COPY"
        raise CheckpointError(
            f"{folder / name} is a link that leaves its folder, to {target}{more}",
            hint="If it belongs to the model, put a copy of the file in the link's place; else remove the link."
            + (f" If all of them do, {copied} makes a folder with copies in their place." if others else ""),
        )


def _links_out(folder: Path) -> list[str]:
    """The links in a folder that lead to files elsewhere, those of weights apart."""
    with suppress(OSError):
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_symlink())
        files = (name for name in names if not name.endswith(_WEIGHTS) and not os.path.isdir(folder / name))
        return [name for name in files if outside(folder, name) is not None]
    return []


_WEIGHTS = (".safetensors", ".safetensors.index.json", ".bin.index.json", *PICKLES)


def outside(folder: Path, name: str) -> Path | None:
    """Where a name in a folder leads, if a link on the way to it leaves the folder."""
    if os.sep == "/" and not leads_out(name):
        parts = PurePosixPath(name).parts
        if not any(os.path.islink(folder.joinpath(*parts[: at + 1])) for at in range(len(parts))):
            return None  # no link on the way, as nearly always: to resolve whole paths takes far longer
    home, target = Path(os.path.realpath(folder)), Path(os.path.realpath(folder / name))
    return None if target.is_relative_to(home) or _is_blob(target, home) else target


def _is_blob(target: Path, home: Path) -> bool:
    """Whether a file is content that the Hub's cache keeps for the snapshot that `home` is, or lies in."""
    for snapshots in home.parents:
        repository = snapshots.parent
        if snapshots.name == "snapshots" and _REPOSITORY.fullmatch(repository.name):
            shared = target.parent.parent == repository.parent / "blobs" and target.parent.name == target.name[:2]
            return target.parent == repository / "blobs" or (shared and bool(_SHARED_BLOB.fullmatch(target.name)))
    return False


def read_json(path: Path, most: int = LARGEST_JSON, most_values: int | None = None) -> Any:
    """Parse a JSON file of moderate size and depth.

    Args:
        path: the file.
        most: how many bytes it may have.
        most_values: and how many values; `MOST_VALUES` unless said.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or is larger or deeper, or has more values, than such a file.
    """
    try:
        raw = read_small(path, most)
        if raw.startswith(LFS_POINTER):
            raise CheckpointError(f"{path}: a Git LFS pointer, and not the file that it points to", hint=FETCH_LFS)
        containers = raw.count(b"[") + raw.count(b"{")
        limit = MOST_VALUES if most_values is None else most_values
        if containers + raw.count(b",") > limit:
            raise CheckpointError(f"{path}: JSON of more than {limit:,} values", hint=_NOT_JSON)
        value = json.loads(raw.decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=_UNREADABLE) from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:  # which a number of 5,000 digits is, too
        raise CheckpointError(f"{path}: not valid JSON ({error})", hint=_NOT_JSON) from error
    if containers > _DEEPEST_JSON and _is_deeper(value):
        raise _too_deep(path)
    return value


def _is_deeper(value: Any) -> bool:
    """Whether containers are nested too deep; one way down is held at a time."""
    way = [iter((value,))]
    while way:
        for inner in way[-1]:
            if isinstance(inner, (dict, list)) and inner:
                way.append(iter(inner.values() if isinstance(inner, dict) else inner))
                break
            if isinstance(inner, (dict, list)) and len(way) > _DEEPEST_JSON:
                return True
        else:
            way.pop()
        if len(way) > _DEEPEST_JSON + 1:
            return True
    return False


def _too_deep(path: Path) -> CheckpointError:
    return CheckpointError(f"{path}: JSON nested more than {_DEEPEST_JSON} levels deep", hint=_NOT_JSON)


def read_object(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        CheckpointError: as `read_json`; or it holds something else.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: not a JSON object", hint=_NOT_JSON)
    return value
