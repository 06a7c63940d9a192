"""Reads gathered rows (`plan/rows`): run by run, each from the table that it is of, into one buffer.

Rows that are stored in different dtypes, or made by steps, are widened to the one that the plan says. A mean is summed
in float32 (float64 if a row is stored so) in the order of the inputs, and divided by their number.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lines_cli.checkpoint.header import itemsize
from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES, widen
from lines_cli.engine.formulas import Makers
from lines_cli.plan.rows import Gathered
from lines_cli.plan.tensors import SourceRange

Read = Callable[[SourceRange, memoryview, int], None]
"""Fills a view with the entries of a table as they are stored, from one on, wherever they lie."""

_STEP = 64 * 1024  # entries that are widened at a time
_SUMMED = 2**20  # entries that are added to a mean of rows at a time


class Gather:
    """One thread's.

    Args:
        read: reads a table whose rows are not gathered.
        makers: carries out steps.
        device: where those are carried out.
    """

    def __init__(self, read: Read, makers: Makers, device: torch.device) -> None:
        self._stored, self._makers, self._device = read, makers, device
        self._means: dict[int, tuple[Gathered, torch.Tensor]] = {}

    def read(self, view: memoryview, source: SourceRange, first: int) -> None:
        """Fill `view` with entries of gathered rows, from the entry `first` of the table on.

        Args:
            view: bytes, of whole entries in the source's dtype.
            source: whose rows are gathered.
            first: a number within the table.
        """
        gathered = source.gathered
        assert gathered is not None
        width, size = gathered.width, itemsize(source.dtype)
        end = first + len(view) // size
        for part, begin, until, row in gathered.runs.within(first // width, -(-end // width)):
            one, other = max(first, begin * width), min(end, until * width)
            into = view[(one - first) * size : (other - first) * size]
            if part == gathered.padding:
                self._padding(into, source, one)
                continue
            tables = gathered.parts[part]
            at = row * width + one - begin * width  # of a mean and of zeros that is the entry's own number
            if not tables:
                into[:] = bytes(len(into))
            elif len(tables) > 1:
                self._mean(into, source.dtype, tables, one)
            elif tables[0].dtype == source.dtype and not tables[0].steps and tables[0].gathered is None:
                self._stored(tables[0], into, at)
            else:
                _entries(into, source.dtype).copy_(self._widened(tables[0], at, other - one, source.dtype))

    def _widened(self, table: SourceRange, first: int, numel: int, dtype: str) -> torch.Tensor:
        """Entries of one table: [numel], in another dtype than they are stored in, on the CPU."""
        found = torch.empty(numel, dtype=TORCH_DTYPES[dtype])
        size = itemsize(table.dtype)
        raw = bytearray(min(numel, _STEP) * size)
        for done in range(0, numel, _STEP):
            part = found[done : done + _STEP]
            view = memoryview(raw)[: part.numel() * size]
            if table.gathered is not None:
                self.read(view, table, first + done)
            else:
                self._stored(table, view, first + done)
            entries = torch.empty(part.numel(), dtype=found.dtype)
            widen(_entries(view, table.dtype), entries)
            if table.steps:
                entries = entries.to(self._device)
                self._makers.apply(entries, table, first + done)
            part.copy_(entries)
        return found

    def _mean(self, into: memoryview, dtype: str, tables: tuple[SourceRange, ...], first: int) -> None:
        """The mean of the same entries of several tables."""
        numel = len(into) // itemsize(dtype)
        for done in range(0, numel, _STEP):
            number = min(_STEP, numel - done)
            total = self._widened(tables[0], first + done, number, dtype)
            for table in tables[1:]:
                total += self._widened(table, first + done, number, dtype)
            _entries(into, dtype)[done : done + number].copy_(total.div_(len(tables)))

    def _padding(self, into: memoryview, source: SourceRange, first: int) -> None:
        """Rows that are all the mean of the table's others, summed in float64."""
        gathered = source.gathered
        assert gathered is not None
        width = gathered.width
        known = self._means.get(id(gathered))
        if known is None:
            total = torch.zeros(width, dtype=torch.float64)
            rows = max(1, _SUMMED // width)
            raw = memoryview(bytearray(rows * width * itemsize(source.dtype)))
            for row in range(0, gathered.mean_of, rows):
                number = min(rows, gathered.mean_of - row)
                part = raw[: number * width * itemsize(source.dtype)]
                self.read(part, source, row * width)
                total += _entries(part, source.dtype).view(number, width).sum(0, dtype=torch.float64)
            known = self._means[id(gathered)] = gathered, total / max(1, gathered.mean_of)
        entries = _entries(into, source.dtype)
        at = torch.arange(first, first + entries.numel()) % width
        entries.copy_(known[1][at])


def _entries(view: memoryview, dtype: str) -> torch.Tensor:
    """Bytes as what they stand for: [n], sharing memory."""
    return torch.frombuffer(view, dtype=(TORCH_DTYPES | FLOAT8)[dtype])
