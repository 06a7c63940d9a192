"""Tensors whose entries do not stand in order: every part of every view is what torch makes of it."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lines_cli.storage import views
from lines_cli.storage.views import FileWithViews, View, is_in_order

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]
BEFORE = 3  # bytes: nothing is aligned


@pytest.fixture(params=DTYPES, ids=str)
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[torch.Tensor, int]]:
    """Entries in a file, and the file, opened."""
    entries = torch.arange(4000).to(request.param)
    (tmp_path / "file").write_bytes(b"x" * BEFORE + entries.numpy().tobytes())
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    yield entries, fd
    os.close(fd)


def view_of(tensor: torch.Tensor) -> View:
    width = tensor.element_size()
    return View(BEFORE + tensor.storage_offset() * width, tuple(tensor.shape), tensor.stride(), width)


def read(fd: int, tensor: torch.Tensor, first: int, numel: int, *, start: int = 2**40) -> bytes:
    width = tensor.element_size()
    into = memoryview(bytearray(numel * width))
    assert FileWithViews(fd, {start: view_of(tensor)}).read_into(into, start + first * width) == len(into)
    return bytes(into)


@pytest.mark.parametrize("few", [1, views._FEW], ids=["in runs", "in one go"])
def test_any_part_of_any_view(few: int, stored: tuple[torch.Tensor, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, cut out, repeated, overlapping, of up to five axes; from any entry to any other."""
    monkeypatch.setattr(views, "_FEW", few)
    entries, fd = stored
    chance = random.Random(few)
    in_order = 0
    for _ in range(400):
        axes = chance.randint(0, 5)
        shape = [chance.choice([1, 1, 2, 3, 5, 7]) for _ in range(axes)]
        strides = [chance.choice([0, 1, 2, 3, 7, 20, 35]) for _ in range(axes)]
        tensor = entries.as_strided(shape, strides, chance.randint(0, 100))
        assert is_in_order(tuple(shape), tuple(strides)) == tensor.is_contiguous()
        in_order += tensor.is_contiguous()
        first = chance.randrange(tensor.numel())
        numel = chance.randint(0, tensor.numel() - first)
        expected = tensor.contiguous().flatten()[first : first + numel].numpy().tobytes()
        assert read(fd, tensor, first, numel) == expected, (shape, strides)
    assert 0 < in_order < 300


def test_what_lies_before_views_is_read_as_it_is(stored: tuple[torch.Tensor, int]) -> None:
    """An offset in the file is one in the file, and each view has its own numbers beyond its end."""
    entries, fd = stored
    width, end = entries.element_size(), os.fstat(fd).st_size
    one, other = entries.view(40, 100).t(), entries.view(100, 40)[:, 3:8]
    file = FileWithViews(fd, {end: view_of(one), end + one.numel() * width: view_of(other)})
    for tensor, offset in ((entries, BEFORE), (one, end), (other, end + one.numel() * width)):
        into = memoryview(bytearray(tensor.numel() * width))
        assert file.read_into(into, offset) == len(into)
        assert bytes(into) == tensor.contiguous().numpy().tobytes()


def test_a_file_that_became_shorter(stored: tuple[torch.Tensor, int], tmp_path: Path) -> None:
    """It is told as an end: fewer bytes than asked."""
    entries, fd = stored
    tensor = entries.view(40, 100).t()
    os.truncate(tmp_path / "file", BEFORE + 2000 * entries.element_size())
    into = memoryview(bytearray(tensor.numel() * entries.element_size()))
    assert FileWithViews(fd, {2**40: view_of(tensor)}).read_into(into, 2**40) < len(into)


def test_no_more_is_read_than_some_times_what_is_wanted(
    stored: tuple[torch.Tensor, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows of a large transposed matrix do not take the memory of the matrix."""
    entries, fd = stored
    monkeypatch.setattr(views, "_FEW", 1)
    lengths: list[int] = []
    reading = views.read_into
    monkeypatch.setattr(views, "read_into", lambda fd, into, at: (lengths.append(len(into)), reading(fd, into, at))[1])
    read(fd, entries.view(100, 40).t(), 0, 200)  # two rows of 100, whose entries are 40 apart
    assert sum(lengths) <= views._WASTE * 200 * entries.element_size()
