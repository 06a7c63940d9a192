"""A candidate's weight files on the disk, in a folder that takes the place of an earlier candidate's: what both hold
stays where it is, and the rest is written over it, into pages and blocks that are there.

What another candidate's folder holds is shared where the filesystem shares blocks until one side is written to (a
reflink). Hard links are not used, least of all to inputs: an evaluation that writes into its checkpoint would change
what is behind them, too.

A file that an evaluation changed, or that some process can still write to, is made anew. So is every file where the
system does not tell of such changes.
"""

from __future__ import annotations

import mmap
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

TICK = 0.02  # seconds: more than the steps in which a system counts when a file was changed


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
        self._told: bool | None = None  # whether the system tells of changes; None where nobody has asked yet

    def take_over(self, before: Path, folder: Path) -> None:
        """Rename an earlier candidate's folder, and remove from it what an evaluation has left there. What cannot be
        renamed is removed.
        """
        known = self._made.pop(before, {})
        try:
            if before.is_symlink() or not before.is_dir():
                raise NotADirectoryError(before)
            _unlock(before)
            if before != folder:
                remove(folder)
                before.rename(folder)
            kept = {name: made for name, made in known.items() if self._is_as_left(folder / name, made.state)}
            for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
                if path.is_dir() and not path.is_symlink():
                    with suppress(OSError):  # not empty
                        path.rmdir()
                elif path.relative_to(folder).as_posix() not in kept:
                    path.unlink(missing_ok=True)
        except OSError:
            remove(before)
            remove(folder)
        else:
            self._made[folder] = kept

    def _is_as_left(self, path: Path, state: State) -> bool:
        inside = path.parent.resolve() == path.parent.absolute()  # no link leads to it
        return self._told is True and inside and _state(path) == state and not written_elsewhere(path)

    def forget(self, folder: Path) -> None:
        """Remove a candidate, if it is there."""
        self._made.pop(folder, None)
        remove(folder)

    @contextmanager
    def opened(self, plan: Plan, same: object, folder: Path) -> Iterator[Opened]:
        """A candidate's weight files, with their heads written; known of as soon as the block is left without an error.

        Raises:
            OSError: one cannot be made.
        """
        if self._told is None:  # asked beside candidates, where no evaluation looks
            self._told = tells_of_changes(folder.parent)
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
            time.sleep(TICK)  # whoever changes a file from now on changes its state, too
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
            if not self._is_as_left(folder / file.name, made.state):
                continue
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            if reflink(folder / file.name, path):
                if self._is_as_left(folder / file.name, made.state):
                    return made
                path.unlink()
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


def tells_of_changes(folder: Path) -> bool:
    """Whether the system tells, of a file in this folder, that it was written to (also through memory: tmpfs does not
    tell that), and that some process still could.
    """
    try:
        with open(folder / f".lines-{os.getpid()}", "x+b", buffering=0) as file:
            path = Path(file.name)
            try:
                file.write(bytes(mmap.PAGESIZE))
                with mmap.mmap(file.fileno(), mmap.PAGESIZE) as mapped:
                    for number in (1, 2):
                        before = (mapped[0], os.fstat(file.fileno()).st_mtime_ns)  # read first: so it is mapped
                        time.sleep(TICK)
                        mapped[0] = number
                        if os.fstat(file.fileno()).st_mtime_ns == before[1]:
                            return False
                        mapped.flush()
                if not written_elsewhere(path):
                    return False
                file.close()
                return not written_elsewhere(path)
            finally:
                path.unlink(missing_ok=True)
    except (OSError, ValueError):
        return False


def written_elsewhere(path: Path) -> bool:
    """Whether a process has a file open for writing, or mapped so; also where nobody can tell."""
    try:
        import fcntl

        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)  # refused while there is a writer
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
        finally:
            os.close(fd)
    except (ImportError, AttributeError, OSError):
        return True
    return False


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


def _unlock(folder: Path) -> None:
    """Take back what an evaluation has taken from the owner's rights to folders."""
    for at in (folder, *(Path(inner) / name for inner, names, _ in os.walk(folder) for name in names)):
        if not at.is_symlink():
            with suppress(OSError):
                at.chmod(at.stat().st_mode | stat.S_IRWXU)


def remove(folder: Path) -> None:
    """Remove a folder that a sweep has made, if it is there."""
    if folder.is_symlink() or folder.is_file():
        with suppress(OSError):
            folder.unlink(missing_ok=True)
    elif folder.is_dir():
        _unlock(folder)
        shutil.rmtree(folder, ignore_errors=True)
