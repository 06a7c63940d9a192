"""Putting a file or a folder in another's place: in one step where the system can, never over what nobody asked about.

On overlayfs a folder that came with the image cannot be renamed (EXDEV); its files can.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from contextlib import suppress
from pathlib import Path


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one filesystem change places, in one step; False where the system cannot do that.

    Raises:
        OSError: it can, and refuses.
    """
    return _renamed(one, other, _EXCHANGE)


def put(source: Path, target: Path) -> None:
    """Rename to where nothing stands, an empty folder apart if a folder is put there.

    Raises:
        OSError: `FileExistsError` or `ENOTEMPTY` where something does.
    """
    if source.is_dir():
        os.rename(source, target)  # which replaces an empty folder alone
    elif not _renamed(source, target, _NO_REPLACE):
        try:
            os.link(source, target, follow_symlinks=False)  # refuses where something stands
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                raise
            if os.path.lexists(target):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            os.rename(source, target)
        else:
            os.unlink(source)


def move_folder(source: Path, target: Path) -> None:
    """Rename a folder to where none is; or, where a folder cannot be renamed, move what it holds. Done again after an
    interruption, it moves the rest.

    Raises:
        OSError: it cannot be moved, or a name stands there already.
    """
    if not os.path.lexists(target):
        try:
            os.rename(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
        else:
            return
    with suppress(FileExistsError):
        os.mkdir(target)
    for entry in os.listdir(source):
        here, there = source / entry, target / entry
        if here.is_dir() and not here.is_symlink():
            move_folder(here, there)
        else:
            put(here, there)
    os.rmdir(source)


def _renamed(one: Path, other: Path, how: int) -> bool:
    """Rename with a flag; False where the system knows none, or not for these."""
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], how)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*paths, how)
    else:
        return False
    number = ctypes.get_errno()
    if not failed:
        return True
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


_CURRENT_FOLDER = -100  # AT_FDCWD
_EXCHANGE = 2  # RENAME_EXCHANGE and RENAME_SWAP
_NO_REPLACE = 4 if sys.platform == "darwin" else 1  # RENAME_EXCL, RENAME_NOREPLACE
