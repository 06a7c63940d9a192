"""What lies beside the weights in a folder that may be a stranger's: which names and links leave the folder, and small
files, each read whole or refused.

Weights (safetensors files and their index) may be links to wherever their user keeps them: nothing of them is copied as
it stands. Every other file is looked up with `beside`, which follows no link out of the folder.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from lines_cli.checkpoint.positional import read_small
from lines_cli.errors import CheckpointError

LARGEST_JSON = 64 * 2**20
"""Bytes of a JSON file."""

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
        raise CheckpointError(
            f"{folder / name} is a link that leaves its folder, to {target}",
            hint="If it belongs to the model, put a copy of the file in the link's place; else remove the link.",
        )


def outside(folder: Path, name: str) -> Path | None:
    """Where a name in a folder leads, if a link on the way to it leaves the folder."""
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


def read_json(path: Path) -> Any:
    """Parse a JSON file of moderate size and depth.

    Raises:
        CheckpointError: it cannot be read, is no JSON, or is larger or deeper than such a file is.
    """
    try:
        value = json.loads(read_small(path, LARGEST_JSON).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=_UNREADABLE) from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except ValueError as error:  # which a number of 5,000 digits is, too
        raise CheckpointError(f"{path}: not valid JSON ({error})", hint=_NOT_JSON) from error
    level = [value]
    for _ in range(_DEEPEST_JSON + 1):
        level = [inner for outer in level if isinstance(outer, (dict, list)) for inner in _inside(outer)]
        if not level:
            return value
    raise _too_deep(path)


def _inside(outer: dict[str, Any] | list[Any]) -> list[Any]:
    """The containers in a container."""
    inner = outer.values() if isinstance(outer, dict) else outer
    return [value for value in inner if isinstance(value, (dict, list))]


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
