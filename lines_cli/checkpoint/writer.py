"""Output that appears whole or not at all: built in a hidden sibling of the destination, flushed, and renamed
into place.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from lines_cli.checkpoint.sidecars import RECIPE, Sidecar
from lines_cli.errors import OutputError


def check_destination(output: Path, *, inputs: Iterable[Path], nbytes: int, force: bool) -> None:
    """Refuse a destination that is taken, is one of the inputs or holds one, or has too little room.

    Args:
        output: the folder or file to be written.
        inputs: files and folders that are read.
        nbytes: what will be written.
        force: an existing checkpoint may be replaced.

    Raises:
        OutputError
    """
    target = output.resolve()
    for path in inputs:
        source = path.resolve()
        if source == target or target in source.parents:
            raise OutputError(
                f"{output}: the output would replace an input, {path}", hint="Choose another destination with -o."
            )
    if _is_taken(output):
        if not force:
            raise OutputError(
                f"{output} exists", hint="Choose another destination with -o, or replace it with --force."
            )
        _refuse_to_replace(output)
    parent = _existing_parent(target)
    if not os.access(parent, os.W_OK):
        raise OutputError(f"{output}: no permission to write in {parent}")
    free = shutil.disk_usage(parent).free
    if nbytes > free:
        raise OutputError(
            f"{output}: {nbytes:,} bytes are to be written, and {parent} has room for {free:,}",
            hint="Free some space, or choose another disk.",
        )


def _is_taken(output: Path) -> bool:
    if output.is_dir() and output.suffix != ".safetensors":
        return any(output.iterdir())
    return os.path.lexists(output)


def _refuse_to_replace(output: Path) -> None:
    """`--force` replaces a checkpoint, never a folder of other things."""
    if output.suffix == ".safetensors":
        if not output.is_file():
            raise OutputError(f"{output} is not a file, and will not be replaced by one")
        return
    if not output.is_dir():
        raise OutputError(
            f"{output} is a file, and will not be replaced by a folder",
            hint="To write one file, let its name end in .safetensors.",
        )
    names = {path.name for path in output.iterdir()}
    if RECIPE not in names and not any(name.endswith(".safetensors") for name in names):
        raise OutputError(
            f"{output} holds no checkpoint; --force will not delete it", hint="Choose another destination with -o."
        )


def _existing_parent(target: Path) -> Path:
    return next(parent for parent in target.parents if parent.is_dir())


class Staging:
    """The output in the making. Leaving the `with` block without `publish` removes all of it.

    Args:
        output: the destination, a folder; or a file, if its name ends in `.safetensors`.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._target = output.resolve()
        self._folder = self._target.parent / f".{self._target.name}.lines-{secrets.token_hex(4)}"
        self._open: dict[str, int] = {}
        self._made: list[Path] = []
        self._published = False

    def __enter__(self) -> Staging:
        with naming(self.output):
            self._made = [parent for parent in self._target.parents if not parent.exists()]
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._folder.mkdir()
        return self

    def create(self, name: str, nbytes: int) -> int:
        """Create a file of `nbytes` and return its descriptor, open for writing until `publish`."""
        with naming(self.output):
            fd = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
            self._open[name] = fd
            os.ftruncate(fd, nbytes)
        return fd

    def add(self, sidecar: Sidecar) -> None:
        """Write one of the files beside the weights."""
        with naming(self.output):
            path = self._folder / sidecar.name
            path.parent.mkdir(exist_ok=True)
            if sidecar.source is not None:
                shutil.copyfile(sidecar.source, path)
            with open(path, "r+b" if sidecar.source else "wb") as file:
                if sidecar.content is not None:
                    file.write(sidecar.content)
                file.flush()
                os.fsync(file.fileno())

    def publish(self, *, force: bool) -> None:
        """Flush everything and rename it into place."""
        with naming(self.output):
            for fd in self._open.values():
                os.fsync(fd)
            self._close()
            _sync_folder(self._folder)
            if _is_taken(self.output) and not force:
                raise OutputError(
                    f"{self.output} came into being while its replacement was written", hint="Replace it with --force."
                )
            if self._target.suffix == ".safetensors":
                os.replace(self._folder / self._target.name, self._target)
                self._folder.rmdir()
            else:
                self._replace_folder()
            self._published = True
            _sync_folder(self._target.parent)

    def _replace_folder(self) -> None:
        if not self._target.exists():
            os.rename(self._folder, self._target)
            return
        aside = self._folder.with_name(f"{self._folder.name}.old")
        os.rename(self._target, aside)
        try:
            os.rename(self._folder, self._target)
        except OSError:
            os.rename(aside, self._target)
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _close(self) -> None:
        while self._open:
            _, fd = self._open.popitem()
            os.close(fd)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()
        if self._published:
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        for parent in self._made:  # innermost first
            try:
                parent.rmdir()
            except OSError:
                break


def _sync_folder(folder: Path) -> None:
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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"{output}: no space left ({error.strerror}); nothing was kept",
                hint="Free some space, or choose another disk with -o.",
            ) from error
        raise OutputError(f"{output}: cannot be written: {error.strerror or error}") from error
