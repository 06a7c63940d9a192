"""Where an output may go: what is in the way, whose it is, and the system's refusals in words."""

from __future__ import annotations

import errno
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from lines_cli.errors import OutputError, some
from lines_cli.storage.files import open_regular, read_into
from lines_cli.storage.names import CONFIG, MODEL_CARD, MODEL_INDEX, RECIPE, WEIGHT_STEMS
from lines_cli.storage.object_store import url_of


def placed(output: Path) -> Path:
    """A destination without `..`: its parents may not be there yet, as in `new/../out`. A URL stays as it is."""
    if url_of(output) is not None:
        return output
    return output.parent.resolve() / output.name if output.name not in ("", "..") else output.resolve()


def is_one_file(output: Path) -> bool:
    """Whether a destination is one file rather than a folder; its name alone decides."""
    return output.suffix == ".safetensors"


def check_destination(
    output: Path,
    *,
    inputs: Iterable[Path],
    nbytes: int,
    force: bool,
    ours: Collection[str] | None = None,
    may_exist: bool = False,
) -> None:
    """Refuse a destination that is taken, is one of the inputs or holds one, or has too little room.

    Args:
        output: the folder or file to be written.
        inputs: files and folders that are read.
        nbytes: what will be written.
        force: an existing output may be replaced.
        ours: names, relative to the folder, that `force` may replace beside weights and their config; None where that
            is not known yet, and the folder is not looked into.
        may_exist: what is there is no reason to refuse: nothing will be written.

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
            raise OutputError(f"{output} is the current folder", hint="Choose a folder inside it, or beside it.")
        if os.path.ismount(target):
            raise OutputError(
                f"{output} is a mount point", hint="Choose a folder inside it: a mount point cannot be replaced."
            )
        if placed(output).is_symlink() and not target.exists():
            raise OutputError(
                f"{output} is a link to {os.readlink(placed(output))}, which is not there",
                hint="Remove the link, or choose another destination with -o.",
            )
        if is_taken(output) and not may_exist:
            if not force:
                hint = "Choose another destination with -o, or replace it with --force."
                raise OutputError(f"{output} exists", hint=hint)
            _refuse_another_kind(output)
            if ours is not None:
                refuse_to_replace(output, survey(target), ours)
        parent = next(parent for parent in target.parents if os.path.lexists(parent))
        if not parent.is_dir():
            raise OutputError(f"{output}: {parent} is not a folder", hint="Choose another destination with -o.")
        if not os.access(parent, os.W_OK | os.X_OK):
            raise OutputError(f"{output}: no permission to write in {parent}", hint=_ELSEWHERE)
        free = shutil.disk_usage(parent).free
        if nbytes > free:
            raise OutputError(
                f"{output}: {nbytes:,} bytes are needed, but {parent} has room for {free:,}", hint=_ELSEWHERE
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
    output = placed(output)
    if os.path.isdir(output) and not is_one_file(output):
        with suppress(FileNotFoundError):  # another run has moved it away this moment
            return bool(os.listdir(output))
    return os.path.lexists(output)


def _refuse_another_kind(output: Path) -> None:
    """A folder replaces a folder, and a file replaces a file. What another run moves away meanwhile is looked at again
    once no other may.
    """
    there = placed(output)
    try:
        _refuse_as_it_is(output, there)
    except FileNotFoundError:
        return
    except OutputError:
        if os.path.lexists(there):
            raise


def _refuse_as_it_is(output: Path, there: Path) -> None:
    if is_one_file(output):
        if not os.path.isfile(there):
            raise OutputError(
                f"{output} is not a file, and will not be replaced by one", hint="Choose another destination with -o."
            )
        if not _looks_like_weights(there):
            raise OutputError(f"{output} is not a safetensors file; --force will not delete it", hint=_ELSEWHERE_THEN)
    elif not os.path.isdir(there):
        raise OutputError(
            f"{output} is {'a file' if os.path.isfile(there) else 'no folder'}, and will not be replaced by a folder",
            hint="Choose another destination with -o. To write one file, let its name end in .safetensors.",
        )
    else:
        if not os.access(there, os.W_OK | os.X_OK):  # which renaming a folder takes, too
            raise OutputError(f"{output}: no permission to replace it", hint=_ELSEWHERE)
        names = os.listdir(there)
        if not {RECIPE, MODEL_INDEX} & {*names} and not any(name.endswith(".safetensors") for name in names):
            raise OutputError(f"{output} holds no checkpoint; --force will not delete it", hint=_ELSEWHERE_THEN)


def _looks_like_weights(path: Path) -> bool:
    """Whether a file begins as safetensors files do: the length of its header, which is JSON."""
    fd = open_regular(path)
    try:
        begin = bytearray(9)
        whole = read_into(fd, memoryview(begin), 0) == len(begin)
        return whole and begin[8:] == b"{" and int.from_bytes(begin[:8], "little") <= os.fstat(fd).st_size
    finally:
        os.close(fd)


class Entry(NamedTuple):
    """What stands under a name, short of its content: enough to see that it is still the same."""

    kind: int
    inode: int
    nbytes: int
    mtime_ns: int


Survey = Mapping[str, Entry]
"""Everything below a folder, by its name relative to it; a file by itself has the name ''."""


def survey(target: Path) -> Survey:
    """What stands at a destination, links not followed; nothing where there is nothing.

    Raises:
        OSError: a folder cannot be read.
    """
    found: dict[str, Entry] = {}
    names = [""]
    while names:
        name = names.pop()
        path = os.path.join(target, name) if name else target
        try:
            there = os.lstat(path)
        except FileNotFoundError:
            continue
        is_folder = stat.S_ISDIR(there.st_mode)
        if name or not is_folder:
            kind = stat.S_IFMT(there.st_mode)
            of_file = (there.st_ino, there.st_size, there.st_mtime_ns)
            found[name] = Entry(kind, *((0, 0, 0) if is_folder else of_file))
        if is_folder:
            with suppress(FileNotFoundError, NotADirectoryError):  # it has gone this moment
                names += [f"{name}/{entry}" if name else entry for entry in os.listdir(path)]
    return found


def arrivals(before: Survey, now: Survey) -> list[str]:
    """What has come since, or is another file now. What has gone is not missed."""
    return sorted(name for name, entry in now.items() if before.get(name) != entry)


def refuse_to_replace(output: Path, there: Survey, ours: Collection[str]) -> None:
    """`--force` replaces what `lines` writes, and nothing else.

    Args:
        output: the destination.
        there: what stands there.
        ours: names that this run writes, or that the folder's own recipe lists as written.

    Raises:
        OutputError: what is not ours.
    """
    if is_one_file(output):
        return
    folders = {name for name, entry in there.items() if stat.S_ISDIR(entry.kind)}
    there = {name: entry for name, entry in there.items() if not is_noise(name)}
    known = {*ours, *(name for name in there if _is_weights_or_config(name))}
    known |= {str(parent) for name in known for parent in PurePosixPath(name).parents}
    foreign = {name for name, entry in there.items() if name not in known or not _is_of_its_kind(name, entry, ours)}
    foreign = {name for name in foreign if name.rpartition("/")[0] not in foreign}  # a folder says it for its files
    if foreign:
        edited = {MODEL_CARD} & foreign - folders if RECIPE in ours else set()
        named = [f"{MODEL_CARD} (a model card, of which nothing records that it is as lines wrote it)"] * len(edited)
        named += sorted(f"{name}/" if name in folders else name for name in foreign - edited)
        raise OutputError(
            f"{output} holds files that lines did not write; --force will not delete them:\n{some(named)}",
            hint=_NOT_DELETED,
        )


_ELSEWHERE_THEN = "Choose another destination with -o."
_NOT_DELETED = "Move them out of the folder or delete them, or choose another destination with -o."


def is_noise(name: str) -> bool:
    """Whether a system has left it there by itself: a desktop, or NFS for a file that somebody still reads."""
    return _NOISE.fullmatch(name.rpartition("/")[2]) is not None


_NOISE = re.compile(r"\.DS_Store|\._.*|\.nfs[0-9a-f]+|Thumbs\.db|desktop\.ini")


def _is_of_its_kind(name: str, entry: Entry, ours: Collection[str]) -> bool:
    """Whether a file stands where we would write a file, and a folder where a folder."""
    is_file = name in ours or _is_weights_or_config(name)
    return stat.S_ISDIR(entry.kind) != is_file


_WEIGHTS = re.compile(rf"(?:{'|'.join(WEIGHT_STEMS)})(?:-\d{{5}}-of-\d{{5}})?\.safetensors(?:\.index\.json)?")


def _is_weights_or_config(name: str) -> bool:
    """Whether every output has a file of this name, or could have: weights under a library's name, index, config."""
    return name == CONFIG or _WEIGHTS.fullmatch(name) is not None


def sync_folder(folder: Path) -> None:
    """Make renames and new names in `folder` durable, where the system can."""
    try:
        fd = os.open(folder, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
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
        named = error.filename if isinstance(error, OSError) and isinstance(error.filename, str) else None
        where = f" ({named})" if named and named != str(output) else ""
        raise OutputError(f"{output}: cannot be written: {_said(error)}{where}", hint=_ELSEWHERE) from error


def _said(error: OSError | RuntimeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)
