"""Where an output may go: what is in the way, and the system's refusals in words."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lines_cli.checkpoint.sidecars import MODEL_CARD, RECIPE, is_carried, never_carried
from lines_cli.errors import OutputError, some


def is_one_file(output: Path) -> bool:
    """Whether a destination is one file rather than a folder; its name alone decides."""
    return output.suffix == ".safetensors"


def check_destination(output: Path, *, inputs: Iterable[Path], nbytes: int, force: bool) -> None:
    """Refuse a destination that is taken, is one of the inputs or holds one, or has too little room.

    Args:
        output: the folder or file to be written.
        inputs: files and folders that are read.
        nbytes: what will be written.
        force: an existing checkpoint may be replaced.

    Raises:
        OutputError: with what is in the way.
    """
    with naming(output):
        target = output.resolve(strict=False)
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            target.lstat()  # a name may be too long for what is to be of that name
        for path in inputs:
            # A link to an input is in the way, too: replacing the folder that holds it would remove the link.
            for source in (path.resolve(), path.parent.resolve() / path.name):
                if any(_is_same(target, way) for way in (source, *source.parents)):
                    raise OutputError(
                        f"{output}: the output would replace an input, {path}",
                        hint="Choose another destination with -o.",
                    )
        if target == Path.cwd():
            raise OutputError(f"{output} is the current folder", hint="Give a folder within it, or beside it.")
        if os.path.ismount(target):
            raise OutputError(
                f"{output} is where a disk is mounted", hint="Give a folder within it, which can be renamed."
            )
        if is_taken(output):
            if not force:
                hint = "Choose another destination with -o, or replace it with --force."
                raise OutputError(f"{output} exists", hint=hint)
            _refuse_to_replace(output)
        parent = next(parent for parent in target.parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise OutputError(f"{output}: {parent} is not a folder", hint="Choose another destination with -o.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{output}: no permission to write in {parent}", hint=_ELSEWHERE)
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise OutputError(
                f"{output}: {nbytes:,} bytes are to be written, and {parent} has room for {free:,}", hint=_ELSEWHERE
            )


def _is_same(target: Path, way: Path) -> bool:
    """Whether two paths lead to one place, be it by another spelling, another mount or another case of letters."""
    try:
        return target == way or os.path.samefile(target, way)
    except OSError:
        return False


_ELSEWHERE = "Make room or get permission there, or choose another destination with -o."


def is_taken(output: Path) -> bool:
    """Whether anything stands at a destination, an empty folder apart."""
    if os.path.isdir(output) and not is_one_file(output):
        return bool(os.listdir(output))
    return os.path.lexists(output)


def _refuse_to_replace(output: Path) -> None:
    """`--force` replaces a checkpoint, never a folder of other things."""
    if is_one_file(output):
        if not os.path.isfile(output):
            raise OutputError(
                f"{output} is not a file, and will not be replaced by one", hint="Choose another destination with -o."
            )
        return
    if not os.path.isdir(output):
        raise OutputError(
            f"{output} is {'a file' if os.path.isfile(output) else 'no folder'}, and will not be replaced by a folder",
            hint="Choose another destination with -o. To write one file, let its name end in .safetensors.",
        )
    names = os.listdir(output)
    if RECIPE not in names and not any(name.endswith(".safetensors") for name in names):
        raise OutputError(f"{output} holds no checkpoint; --force will not delete it", hint=_NOT_DELETED)
    foreign = sorted(name for name in names if not _belongs_to_a_checkpoint(output, name))
    if foreign:
        raise OutputError(
            f"{output} holds more than a checkpoint; --force will not delete\n{some(foreign)}", hint=_NOT_DELETED
        )


_NOT_DELETED = "Move away what is to be kept, or choose another destination with -o."


def _belongs_to_a_checkpoint(folder: Path, name: str) -> bool:
    """Whether one would expect it in a checkpoint's folder, a folder of tokenizer or pooling files included."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        return all(is_carried(f"{name}/{inner}") for inner in os.listdir(path))
    return name in (MODEL_CARD, RECIPE, ".gitattributes") or is_carried(name) or never_carried(name)


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


@contextmanager
def naming(output: Path) -> Iterator[None]:
    """Turn the system's refusals while writing into an `OutputError` that names the destination."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "loop" not in str(error):  # how pathlib before 3.13 speaks of links
            raise
        number = error.errno if isinstance(error, OSError) else errno.ELOOP
        if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(f"{output}: no space left ({_said(error)})", hint=_ELSEWHERE) from error
        if number in (errno.EMFILE, errno.ENFILE):
            hint = "Allow more open files (ulimit -n), or write fewer shards with a larger --max-shard-size."
            raise OutputError(f"{output}: too many files are open at once", hint=hint) from error
        raise OutputError(f"{output}: cannot be written: {_said(error)}", hint=_ELSEWHERE) from error


def _said(error: OSError | RuntimeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
