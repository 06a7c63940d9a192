"""Reads entries of a tensor that lie in several places of the inputs, because these have another layout: runs one after
the other, and matrices that are stored the other way round. The latter are turned whole, or, where they are very large,
some rows at a time, and kept for the chunks that follow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence

import torch

from lines_cli.checkpoint.header import Part
from lines_cli.engine.whole_tensors import Kept
from lines_cli.plan.resources import TURNED_AT_ONCE

Read = Callable[[int, memoryview, int], None]
"""Fills a view with the bytes of a file (a number into `Plan.paths`) from an offset on, or raises."""

Turned = Kept[torch.Tensor]
"""Rows of matrices as they are wanted: uint8 [bytes]."""


def read_parts(parts: Sequence[Part], first: int, view: memoryview, width: int, read: Read, turned: Turned) -> None:
    """Fill `view` with the entries from `first` on.

    Args:
        parts: of a tensor, in order, without a gap.
        first: the first entry that is wanted.
        view: bytes, as many as are wanted.
        width: bytes of an entry.
        read: reads an input.
        turned: what was turned already, for all workers.
    """
    at, done, numel = bisect_right(parts, first, key=lambda part: part.start) - 1, 0, len(view) // width
    while done < numel:
        part = parts[at]
        inside = first + done - part.start
        number = min(part.numel - inside, numel - done)
        into = view[done * width : (done + number) * width]
        if part.strides == (1,):
            read(part.file, into, part.offset + inside * width)
        else:
            _read_turned(part, inside, into, width, read, turned)
        done += number
        at += 1


def _read_turned(part: Part, inside: int, view: memoryview, width: int, read: Read, turned: Turned) -> None:
    """Entries of one box, from the one numbered `inside` on."""
    rows, columns = part.sizes
    step = max(1, TURNED_AT_ONCE // (columns * width))  # rows
    done, numel = 0, len(view) // width
    while done < numel:
        number, before = divmod(inside + done, step * columns)
        first, last = number * step, min(rows, (number + 1) * step)
        key = (part.file, part.offset, part.sizes, part.strides, number)
        held = turned.get(key, lambda first=first, last=last: _turn(part, first, last, width, read))  # type: ignore[misc]
        taken = min((last - first) * columns - before, numel - done)
        into = torch.frombuffer(view[done * width : (done + taken) * width], dtype=torch.uint8)
        into.copy_(held[before * width : (before + taken) * width])
        done += taken


def _turn(part: Part, first: int, last: int, width: int, read: Read) -> torch.Tensor:
    """Some rows of a box as they are wanted: uint8 [(last - first) * columns * width]."""
    rows, columns = last - first, part.sizes[1]
    row, column = part.strides
    start = part.offset + first * row * width
    extent = (rows - 1) * row + (columns - 1) * column + 1
    if extent <= _WORTH_READING * rows * columns:  # what lies between is read, too
        held = bytearray(extent * width)
        read(part.file, memoryview(held), start)
        found = torch.frombuffer(held, dtype=_OF_WIDTH[width]).as_strided((rows, columns), (row, column))
        return found.contiguous().view(-1).view(torch.uint8)
    lines, length, apart = (rows, columns, row) if column == 1 else (columns, rows, column)
    held = bytearray(lines * length * width)
    for number in range(lines):
        line = memoryview(held)[number * length * width : (number + 1) * length * width]
        read(part.file, line, start + number * apart * width)
    found = torch.frombuffer(held, dtype=_OF_WIDTH[width]).view(lines, length)
    return (found if column == 1 else found.T).contiguous().view(-1).view(torch.uint8)


_WORTH_READING = 3
_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
