"""A candidate's weight files on the disk, in a folder that takes the place of an earlier candidate's: what both hold
stays where it is, and the rest is written over it, into pages and blocks that are there.

What another candidate's folder holds is shared where the filesystem shares blocks until one side is written to (a
reflink). Hard links are not used, least of all to inputs: an evaluation that writes into its checkpoint would change
what is behind them, too. A file that an evaluation changed is made anew.
"""

from __future__ import annotations

import os
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from lines_cli.plan.layout import OutputFile
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.storage.files import write_from

State = tuple[int, ...]
"""Of a file: device, inode, links to it, bytes, when its content and when the file itself was last changed."""

_TICK = 0.02  # seconds: more than the steps in which a system counts when a file was changed


@dataclass(frozen=True)
class Made:
    """A weight file as it was left.

    Attributes:
        file: its name, head and size.
        same: what decides its bytes beside its tensors' plans (`same_of`).
        tensors: what it holds.
        state: of the file.
    """

    file: OutputFile
    same: object
    tensors: Mapping[str, TensorPlan]
    state: State

    def holds(self, tensor: TensorPlan, same: object) -> bool:
        """Whether a tensor's bytes, and its place, are what would be written."""
        return self.tensors.get(tensor.name) == tensor and not tensor.spec.scales_of and self.same == same


@dataclass(frozen=True)
class Opened:
    """Weight files that are open, to be written.

    Attributes:
        fds: a file descriptor for each file of the plan; None where all that it should hold is there.
        tensors: those that have to be written.
    """

    fds: Sequence[int | None]
    tensors: Sequence[TensorPlan]


class CandidateFiles:
    """Folders of candidates, and what is known of the files in them."""

    def __init__(self) -> None:
        self._made: dict[Path, dict[str, Made]] = {}

    def take_over(self, before: Path, folder: Path) -> None:
        """Rename an earlier candidate's folder, and remove from it what an evaluation has left there.

        Raises:
            OSError: it cannot be renamed.
        """
        known = self._made.pop(before, {})
        if before.is_symlink() or not before.is_dir():
            _remove(before)
            return
        if before != folder:
            before.rename(folder)
        kept = {name: made for name, made in known.items() if _state(folder / name) == made.state}
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.relative_to(folder).as_posix() not in kept and (path.is_symlink() or not path.is_dir()):
                path.unlink(missing_ok=True)
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                with suppress(OSError):  # not empty
                    path.rmdir()
        self._made[folder] = kept

    def forget(self, folder: Path) -> None:
        """Remove a candidate, if it is there."""
        self._made.pop(folder, None)
        _remove(folder)

    @contextmanager
    def opened(self, plan: Plan, same: object, folder: Path) -> Iterator[Opened]:
        """A candidate's weight files, with their heads written; known of as soon as the block is left without an error.

        Raises:
            OSError: one cannot be made.
        """
        by_file: list[dict[str, TensorPlan]] = [{} for _ in plan.outputs]
        for tensor in plan.tensors:
            by_file[tensor.file][tensor.name] = tensor
        known = self._made.pop(folder, {})
        fds: list[int | None] = []
        todo: list[TensorPlan] = []
        try:
            for file, tensors in zip(plan.outputs, by_file, strict=True):
                path, made = folder / file.name, known.get(file.name)
                if made is None and (made := self._shared(file, tensors, same, path)) is None:
                    path.unlink(missing_ok=True)
                    path.parent.mkdir(parents=True, exist_ok=True)
                left = [t for t in tensors.values() if made is None or not made.holds(t, same)]
                if made is not None and not left and made.file == file:
                    fds.append(None)
                    continue
                flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT | os.O_EXCL if made is None else 0)
                fds.append(fd := os.open(path, flags, 0o666))
                os.ftruncate(fd, file.nbytes)
                write_from(fd, memoryview(file.head), 0)
                todo += left
            yield Opened(fds, todo)
        finally:
            for opened in fds:
                if opened is not None:
                    os.close(opened)
        if todo:
            time.sleep(_TICK)  # whoever changes a file from now on changes its state, too
        self._made[folder] = {
            file.name: Made(file, same, tensors, state)
            for file, tensors in zip(plan.outputs, by_file, strict=True)
            if (state := _state(folder / file.name)) is not None
        }

    def _shared(self, file: OutputFile, tensors: Mapping[str, TensorPlan], same: object, path: Path) -> Made | None:
        """A file that another candidate holds as it should be, made here of the same blocks; None where that cannot
        be.
        """
        for folder, known in list(self._made.items()):
            made = known.get(file.name)
            if made is None or made.file != file or not all(made.holds(t, same) for t in tensors.values()):
                continue
            if _state(folder / file.name) != made.state:
                continue
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if reflink(folder / file.name, path) and _state(folder / file.name) == made.state:
                return made
        return None


def same_of(plan: Plan) -> object:
    """What decides a tensor's bytes beside its own plan: the recipe but for its coefficients, and the inputs."""
    recipe = plan.recipe.model_copy(update={"lines": None}).model_dump_json()
    return recipe, plan.paths, plan.states


def _state(path: Path) -> State | None:
    """None where there is no such file."""
    with suppress(OSError):
        there = os.lstat(path)
        if stat.S_ISREG(there.st_mode):
            times = there.st_mtime_ns, there.st_ctime_ns
            return there.st_dev, there.st_ino, there.st_nlink, there.st_size, *times
    return None


_FICLONE = 0x40049409  # linux/fs.h


def reflink(source: Path, target: Path) -> bool:
    """Make a file of the same blocks as another, each written apart from then on; whether the filesystem can."""
    if sys.platform != "linux":
        return False
    import fcntl

    made = False
    try:
        with open(source, "rb") as of, open(target, "xb") as into:
            fcntl.ioctl(into.fileno(), _FICLONE, of.fileno())
            made = True
    except OSError:
        with suppress(OSError):
            target.unlink(missing_ok=True)
    return made


def _remove(folder: Path) -> None:
    if folder.is_symlink() or folder.is_file():
        folder.unlink(missing_ok=True)
    else:
        shutil.rmtree(folder, ignore_errors=True)
