"""Rows of a table that are gathered from other tables: which row of which table each of them is.

A run is a number of rows that follow one another in both. Two tokenizers that differ a little give a few long runs; two
that have nothing to do with each other give one for each row.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from lines_cli.plan.tensors import SourceRange


@dataclass(frozen=True, slots=True)
class Runs:
    """Where each row of a table comes from, run by run.

    Attributes:
        starts: of each run its first row; the first is 0.
        parts: what it comes from (a number into `Gathered.parts`).
        rows: its first row there.
        numel: how many rows there are in all.
    """

    starts: array[int]
    parts: array[int]
    rows: array[int]
    numel: int

    @classmethod
    def of(cls, pairs: Iterable[tuple[int, int]], follow: int) -> Runs:
        """The runs of rows.

        Args:
            pairs: for each row in order, what it comes from and which row of that it is.
            follow: parts from this number on are read at the row's own number.
        """
        starts, parts, rows = array("q"), array("q"), array("q")
        before, expected, number = -1, -1, 0
        for part, row in pairs:
            if part != before or (row != expected and part < follow):
                starts.append(number)
                parts.append(part)
                rows.append(row if part < follow else number)
            before, expected, number = part, row + 1, number + 1
        return cls(starts, parts, rows, number)

    def within(self, first: int, until: int) -> Iterator[tuple[int, int, int, int]]:
        """The runs that the rows from `first` on and below `until` belong to: each with its part, its first row of
        these, the row behind its last of these, and the row of the part that the first one is.
        """
        at = bisect_right(self.starts, first) - 1
        while first < until:
            end = min(until, self.starts[at + 1] if at + 1 < len(self.starts) else self.numel)
            yield self.parts[at], first, end, self.rows[at] + first - self.starts[at]
            first, at = end, at + 1


@dataclass(frozen=True, slots=True)
class Gathered:
    """What a table with gathered rows is read from.

    Attributes:
        width: how many entries a row has.
        runs: which rows it has; the same for all tables of one shape.
        parts: for each part of the runs: the one table that its rows are of; or those of whose rows each is the mean,
            read at the row's own number; or none, for rows of zeros.
        own: which part is the table that the others only fill up.
        padding: which part has for rows the mean of the first `mean_of` rows of this very table; -1 for none.
    """

    width: int
    runs: Runs
    parts: tuple[tuple[SourceRange, ...], ...]
    own: int = 0
    padding: int = -1
    mean_of: int = 0


@dataclass(frozen=True, slots=True)
class Spans:
    """Some of a table's rows, as spans.

    Attributes:
        starts, ends: of each span, in order, its first row and the row behind its last.
    """

    starts: array[int]
    ends: array[int]

    @classmethod
    def of(cls, rows: Iterable[int]) -> Spans:
        """The spans of rows that are given in order."""
        starts, ends = array("q"), array("q")
        for row in rows:
            if ends and ends[-1] == row:
                ends[-1] = row + 1
            else:
                starts.append(row)
                ends.append(row + 1)
        return cls(starts, ends)

    def within(self, first: int, until: int) -> Iterator[tuple[int, int]]:
        """The parts of the spans that lie from `first` on and below `until`."""
        at = max(0, bisect_right(self.starts, first) - 1)
        while at < len(self.starts) and self.starts[at] < until:
            begin, end = max(first, self.starts[at]), min(until, self.ends[at])
            if begin < end:
                yield begin, end
            at += 1

    @property
    def numel(self) -> int:
        """How many rows there are."""
        return sum(self.ends) - sum(self.starts)


class RowsAsIs(NamedTuple):
    """Rows of a table, and how many entries each has."""

    rows: Spans
    width: int

    def within(self, first: int, until: int) -> Iterator[tuple[int, int]]:
        """The runs of their entries that lie from the entry `first` on and below `until`."""
        width = self.width
        for begin, end in self.rows.within(first // width, -(-until // width)):
            yield max(first, begin * width), min(until, end * width)
