"""The output in the making: a hidden sibling of the destination, which only one run at a time may write, which outlives
a run that was killed, and which takes the destination's place in one step.

    .out.lines/
        lock       held by the run that writes
        journal    what it has finished
        new/       the output, taking shape
        old/       what `--force` replaces, for the moment between two renames, where the system cannot exchange folders
"""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from types import TracebackType

from lines_cli.checkpoint.digest import BLOCK, intact
from lines_cli.checkpoint.journal import Journal, Part, Story, Told, read_journal
from lines_cli.checkpoint.positional import NewFile
from lines_cli.checkpoint.writer import is_one_file, is_taken, naming, sync_folder
from lines_cli.errors import LinesError, OutputError, keep_in_mind

try:
    import fcntl
except ImportError:  # no Unix: runs are not kept apart
    fcntl = None  # type: ignore[assignment]


def staging_of(output: Path) -> Path:
    """Where the output is built: beside the destination, or what that is a link to."""
    target = output.resolve()
    name = target.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = (
            os.fsencode(name)[: _LONGEST_NAME - 17].decode(errors="ignore")
            + "-"
            + sha256(name.encode()).hexdigest()[:16]
        )
    return target.parent / f".{name}.lines"


_LONGEST_NAME = 240  # bytes, so that the whole fits into a file name


@dataclass(frozen=True, slots=True)
class Leftover:
    """What a run left that did not come to its end.

    Attributes:
        folder: where it is.
        written: bytes of the weight files that were finished.
        total: bytes that they have in the end; 0 where that is not known.
        nbytes: what all of it takes on the disk.
    """

    folder: Path
    written: int
    total: int
    nbytes: int

    @property
    def told(self) -> str:
        """How far it came, in words."""
        return f"{self.written / self.total:.0%} finished" if self.total else "nothing finished"


def leftover(output: Path) -> Leftover | None:
    """What an earlier run has left of this output, if there is anything. What it had set aside is put back.

    Raises:
        OutputError: a run is at work on it.
    """
    with naming(output):
        folder = staging_of(output)
        if not folder.is_dir():
            return None
        try:
            lock = _Lock(folder, output)
        except FileNotFoundError:  # the run came to its end this moment
            return None
        try:
            _put_back(folder, output.resolve())
        finally:
            lock.release()
        story = read_journal(folder / "journal")
        total = written = 0
        if story is not None:
            with suppress(KeyError, TypeError, ValueError, IndexError):  # no journal of ours would
                sizes = [int(size) for _, size, _ in story.run["outputs"]]
                written = sum(min(BLOCK * len(part.blocks), sizes[part.file] - part.start) for part in story.parts)
                total = sum(sizes)
        return Leftover(folder, written, total, _taken_by(folder))


def clean(output: Path) -> Leftover | None:
    """Remove what an earlier run has left of this output.

    Raises:
        OutputError: a run is at work on it.
    """
    found = leftover(output)
    if found is not None:
        with naming(output):
            lock = _Lock(found.folder, output)
            try:
                shutil.rmtree(found.folder)
            finally:
                lock.release()
    return found


def _taken_by(folder: Path) -> int:
    """Bytes on the disk; a file that is yet to be written has holes."""
    found = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            found += path.lstat().st_blocks * 512
    return found


class _Lock:
    """Keeps a second run away from a folder.

    Args:
        folder: the staging folder.
        output: what messages name.
        make: the folder, if it is not there.

    Raises:
        OutputError: another run has it.
        OSError: the folder is not there, or not to be written.
    """

    def __init__(self, folder: Path, output: Path, *, make: bool = False) -> None:
        path = folder / "lock"
        while True:
            if make:
                folder.mkdir(exist_ok=True)
            try:
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            except FileNotFoundError:
                if make:  # the run that had it removed it this moment
                    continue
                raise
            try:
                if fcntl is not None:
                    try:
                        fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except OSError as error:
                        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                            raise OutputError(
                                f"{output}: another run is writing it", hint=f"It is at work in {folder}. Wait for it."
                            ) from None
                        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                            raise  # else the filesystem has no locks
                if _is_at(self._fd, path):  # and was not removed by the run that had it before
                    return
            except BaseException:
                os.close(self._fd)
                raise
            os.close(self._fd)

    def release(self) -> None:
        """Let others in; once more does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False


class Staging:
    """The output in the making. Leaving the `with` block without `publish` keeps what is finished after a kill, an
    interruption or a full disk, and removes all of it after anything else.

    Args:
        output: the destination, a folder; or a file, if its name ends in `.safetensors`.
        run: which run it is; among that `outputs`, each weight file's name, size and the digest of its header, and
            `step`, how many bytes of a file are written at a time, which alone may differ from a run that is resumed.
        resume: go on from what a run of the same kind has left.

    Attributes:
        story: what such a run has left, held against its digests; None where this one begins anew.
    """

    def __init__(self, output: Path, run: Told, *, resume: bool = False) -> None:
        self.output, self._run, self._resume = output, run, resume
        self._target, self.folder = output.resolve(), staging_of(output)
        self._new = self.folder / "new"
        self._open: list[NewFile] = []
        self._made: list[Path] = []
        self._published: os.stat_result | None = None  # what the new output is, once it is to be put into place
        self._journal: Journal | None = None
        self._lock: _Lock | None = None
        self.story: Story | None = None

    def __enter__(self) -> Staging:
        with naming(self.output):
            self._made = [parent for parent in self._target.parents if not parent.exists()]
            fresh = not self.folder.exists()
            try:
                self.folder.parent.mkdir(parents=True, exist_ok=True)
                self._lock = _Lock(self.folder, self.output, make=True)
                self._begin()
            except BaseException:
                if self._journal is not None:
                    self._journal.close()
                if fresh and self._lock is not None:
                    shutil.rmtree(self.folder, ignore_errors=True)
                self._remove_parents()
                if self._lock is not None:
                    self._lock.release()
                raise
        return self

    def _begin(self) -> None:
        path = self.folder / "journal"
        if self._resume and (story := read_journal(path)) is not None:
            self._refuse_another(story.run)
            self.story = self._checked(story)
            self._journal = Journal(path, keep=story.nbytes)
            self._journal.empty = not self.story.parts and self.story.measured is None
            return
        for entry in os.listdir(self.folder):
            if entry != "lock":
                _remove(self.folder / entry)
        self._new.mkdir()
        self._journal = Journal(path, self._run)

    def _refuse_another(self, run: Told) -> None:
        """Refuse to go on with what another recipe, or other inputs, have begun.

        Raises:
            OutputError: what is not the same.
        """
        if "contents" in self._run and "contents" not in run:
            raise OutputError(
                f"{self.output}: what is finished in {self.folder} was begun without --verify-inputs, and does not "
                "say what its inputs held",
                hint="Go on without --verify-inputs, or begin anew without --resume.",
            )
        sought = (self._run.keys() | (run.keys() - {"contents"})) - {"step"}
        different = sorted(key for key in sought if run.get(key) != self._run.get(key))
        if not different:
            return
        before, now = run.get("inputs"), self._run.get("inputs")
        if "inputs" in different and isinstance(before, dict) and isinstance(now, dict):
            of_both = [path for path in now if path in before and before[path] != now[path]]
            different[different.index("inputs")] = f"inputs ({', '.join(of_both) or 'others'})"
        raise OutputError(
            f"{self.output}: what is finished in {self.folder} is of another run: {', '.join(different)} differ",
            hint="Run it without --resume to replace that, or lines clean to remove it.",
        )

    def _checked(self, story: Story) -> Story:
        """The story without the parts that are not on the disk as it says."""
        outputs = self._run["outputs"]
        parts: list[Part] = []
        self._new.mkdir(exist_ok=True)
        for entry in set(os.listdir(self._new)) - {name for name, _, _ in outputs}:
            _remove(self._new / entry)  # what stands beside the weights is made anew; all else was of another output
        for number, (name, nbytes, _) in enumerate(outputs):
            path = self._new / name
            own = [part for part in story.parts if part.file == number]
            if own and path.is_file() and path.stat().st_size == nbytes:
                blocks = {part.start + BLOCK * n: block for part in own for n, block in enumerate(part.blocks)}
                whole = intact(path, blocks)
                parts += [part for part in own if all(part.start + BLOCK * n in whole for n in range(len(part.blocks)))]
            else:
                _remove(path)
        return Story(story.run, story.measured, tuple(parts), story.nbytes)

    @property
    def step(self) -> int:
        """Bytes of a file that are written at a time: those of the run that is resumed, so that its parts fit."""
        return int((self.story.run if self.story else self._run)["step"])

    @property
    def journal(self) -> Journal:
        """Where what is finished is written down."""
        assert self._journal is not None
        return self._journal

    def create(self, name: str, nbytes: int) -> NewFile:
        """A file of `nbytes`, new or as an earlier run has left it, open for writing until `publish`."""
        with naming(self.output):
            self._open.append(NewFile(self._new / name, nbytes, begun=self.story is not None))
        return self._open[-1]

    def add(self, name: str, content: bytes) -> None:
        """Write one of the files beside the weights."""
        with naming(self.output):
            path = self._new / name
            path.parent.mkdir(exist_ok=True)
            with open(path, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def sync(self) -> None:
        """Return when all files are on the disk."""
        with naming(self.output):
            for file in self._open:
                file.sync()

    def path(self, name: str) -> Path:
        """Where a file stands until it is published."""
        return self._new / name

    def publish(self, *, force: bool) -> None:
        """Flush everything and put it into place in one step."""
        self.sync()
        with naming(self.output):
            self._close_files()
            sync_folder(self._new)
            if is_taken(self.output) and not force:
                raise OutputError(
                    f"{self.output} came into being while its replacement was written", hint="Replace it with --force."
                )
            new = self._new / self.output.name if is_one_file(self.output) else self._new
            self._published = new.stat()
            if is_one_file(self.output):
                os.replace(new, self._target)
            else:
                self._replace_folder()
            sync_folder(self._target.parent)

    @property
    def _is_in_place(self) -> bool:
        """Whether the new output stands at the destination, whatever interrupted putting it there."""
        with suppress(OSError):
            return self._published is not None and os.path.samestat(self._target.stat(), self._published)
        return False

    def _replace_folder(self) -> None:
        """Put the new folder into place. One that is there stays whole until then, and is exchanged for the new one;
        where the system cannot, it is away between two renames, and comes back if the second fails.
        """
        if not os.path.lexists(self._target):
            os.rename(self._new, self._target)
        elif not exchange(self._new, self._target):
            aside = self.folder / "old"
            try:
                os.rename(self._target, aside)
                os.rename(self._new, self._target)
            except BaseException:
                _put_back(self.folder, self._target)
                raise

    def _close_files(self) -> None:
        while self._open:
            self._open.pop().close()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close_files()
        worth_it = self._journal is not None and not self._journal.empty
        if self._journal is not None:
            self._journal.close()
        bad_input = isinstance(error, LinesError) and not isinstance(error, OutputError)
        if not self._is_in_place and worth_it and not bad_input:
            if error is not None:
                keep_in_mind(error, self.folder)
        else:
            in_place = self._is_in_place
            shutil.rmtree(self.folder, ignore_errors=True)
            if not in_place:
                self._remove_parents()
        if self._lock is not None:
            self._lock.release()

    def _remove_parents(self) -> None:
        """Those that were made for the staging folder."""
        for parent in self._made:  # innermost first
            try:
                parent.rmdir()
            except OSError:
                break


def _put_back(folder: Path, target: Path) -> None:
    """Bring back what was set aside, if a run was killed between the two renames."""
    if os.path.lexists(folder / "old") and not os.path.lexists(target):
        os.rename(folder / "old", target)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def exchange(one: Path, other: Path) -> bool:
    """Let two paths of one filesystem change places, in one step; False where the system cannot do that.

    Raises:
        OSError: it can, and refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    paths = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(libc, "renameat2"):
        failed = libc.renameat2(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], _EXCHANGE)
    elif sys.platform == "darwin" and hasattr(libc, "renamex_np"):
        failed = libc.renamex_np(*paths, _EXCHANGE)
    else:
        return False
    number = ctypes.get_errno()
    if not failed:
        return True
    if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


_CURRENT_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP
