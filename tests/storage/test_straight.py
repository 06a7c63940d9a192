"""Writes past the page cache: kept up on a disk that is fast, given up on one that is slow or will not have them."""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from lines_cli.storage import files
from lines_cli.storage.files import NewFile, in_whole_pages

MIB = 2**20
pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="the system writes through its page cache only")


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What takes `seconds` for each write past the page cache, in a time of its own, and counts them."""
    told = SimpleNamespace(now=0.0, seconds=lambda _: 0.0, straight=0, error=None)
    write, open_file, direct = os.pwrite, os.open, set[int]()

    def opened(path: Path, flags: int, mode: int = 0o777) -> int:
        fd = open_file(path, flags & ~os.O_DIRECT, mode)  # of a filesystem that has no such thing, too
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def pwrite(fd: int, view: memoryview, offset: int) -> int:
        if fd in direct:
            if told.error is not None:
                raise OSError(told.error, os.strerror(told.error))
            told.now += told.seconds(told.straight)
            told.straight += 1
        return write(fd, view, offset)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "pwrite", pwrite)
    monkeypatch.setattr(files, "time", SimpleNamespace(perf_counter=lambda: told.now))
    return told


def written(path: Path, pieces: int) -> bytes:
    """Write so many pieces of 1 MiB, each with bytes of its own; what the file holds then."""
    piece = in_whole_pages(MIB)
    file = NewFile(path, pieces * MIB)
    try:
        for number in range(pieces):
            piece[:] = bytes([number % 251]) * MIB
            file.write(piece, number * MIB)
    finally:
        file.close()
    return path.read_bytes()


def expected(pieces: int) -> bytes:
    return b"".join(bytes([number % 251]) * MIB for number in range(pieces))


@pytest.mark.slow
def test_a_fast_disk_that_pauses(disk: SimpleNamespace, tmp_path: Path) -> None:
    """400 MB/s, and a third of a second for one write of a hundred: all go straight to it."""
    disk.seconds = lambda number: 0.35 if number % 100 == 3 else 0.0026
    assert written(tmp_path / "file", 210) == expected(210)
    assert disk.straight == 210


@pytest.mark.slow
@pytest.mark.parametrize(("threads", "seconds"), [(2, 0.35), (4, 2.0)])
def test_a_disk_that_pauses_for_several_threads(
    disk: SimpleNamespace, tmp_path: Path, threads: int, seconds: float
) -> None:
    """All that write wait for it, each with a write of its own: that is one pause still, however long."""
    disk.seconds = lambda number: seconds if number % 100 < threads else 0.005
    assert written(tmp_path / "file", 210) == expected(210)
    assert disk.straight == 210


def test_another_thread_gives_it_up_meanwhile(
    disk: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look whether to write directly and the write; the file is whole."""

    class Meanwhile:
        @property
        def PAGESIZE(self) -> int:  # noqa: N802 - as mmap has it
            file._straight = None
            return mmap.PAGESIZE

    file, piece = NewFile(tmp_path / "file", MIB), in_whole_pages(MIB)
    piece[:] = b"x" * MIB
    try:
        with monkeypatch.context() as patch:
            patch.setattr(files, "mmap", Meanwhile())
            file.write(piece, 0)
    finally:
        file.close()
    assert (tmp_path / "file").read_bytes() == b"x" * MIB
    assert disk.straight == 1


@pytest.mark.slow
@pytest.mark.parametrize("rate", [50e6, 10e6], ids=["50 MB/s", "10 MB/s"])
def test_a_slow_disk(disk: SimpleNamespace, tmp_path: Path, rate: float) -> None:
    """It is given up within 64 writes, and the rest goes through the page cache."""
    disk.seconds = lambda _: MIB / rate
    assert written(tmp_path / "file", 80) == expected(80)
    assert 0 < disk.straight <= 64


@pytest.mark.parametrize("error", [errno.EINVAL, errno.ENOTSUP])
def test_a_disk_that_will_not(disk: SimpleNamespace, tmp_path: Path, error: int) -> None:
    """Where the system refuses the first one, nothing is missing in the file."""
    disk.error = error
    assert written(tmp_path / "file", 3) == expected(3)
    assert disk.straight == 0


def test_a_disk_that_fails(disk: SimpleNamespace, tmp_path: Path) -> None:
    """Any other error is one."""
    disk.error = errno.ENOSPC
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        written(tmp_path / "file", 3)
