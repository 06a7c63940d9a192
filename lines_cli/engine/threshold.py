"""The exact k-th largest magnitude of a tensor or a model, in bounded memory.

Magnitudes sort as their bits do, read as whole numbers. A sample says roughly where the threshold lies; then one look
at all entries counts those above a narrow window around that place, and collects those in it. Where these are too
many, they are counted bin by bin, which is exact, too, if a bin is one number wide. If the threshold turns out to lie
elsewhere, or in a bin that is wider, it is looked for there.
"""

from __future__ import annotations

import math
import struct
import zlib
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lines_cli.engine.arithmetic import is_finite
from lines_cli.engine.chunks import Chunk, PlanChunk, items_of
from lines_cli.methods import fused
from lines_cli.methods.sparsify import Bounds, Ranks
from lines_cli.plan.plan import TensorPlan
from lines_cli.plan.tensors import Segment

_ALL_BITS = 2**31
_INF_BITS = 0x7F80_0000
_COLLECTED = 2**16  # entries of a model that a worker collects before it counts them
_EXACT = 2**18  # numbers in a window that each have a bin of their own: 2 MiB
_RUN = 4096  # entries of a sample that stand side by side
_RUNS = 2**11
_SLACK = 16.0  # standard deviations of a sample of independent entries; those of a model are not quite
_ROWS = 8


Seen = tuple[torch.Tensor, int]
"""The entries that lie in a window, as numbers of bits from its low end on; and how many lie above it, as NaN does."""


@dataclass(frozen=True, slots=True)
class Window:
    """Where a threshold is looked for: the float32 magnitudes whose bits, as a whole number, lie from `low` on and
    below `high`.
    """

    low: int
    high: int

    @property
    def is_one(self) -> bool:
        """Whether it is one number wide."""
        return self.high - self.low == 1

    @property
    def shift(self) -> int:
        """The binary logarithm of a bin's width: 0 in a window in which each number has a bin, else there are 2**16."""
        width = self.high - self.low
        return 0 if width <= _EXACT else (width - 1).bit_length() - 16

    @property
    def magnitude(self) -> float:
        """The least magnitude in it."""
        return _magnitude(self.low)

    @property
    def bounds(self) -> tuple[float, float, float]:
        """The least magnitude above it; one amidst it; and how far from that, at most, any other in it is."""
        high, middle = _magnitude(self.high), _magnitude((self.high + self.low) // 2)
        return high, middle, max(high - middle, middle - self.magnitude) * (1 + 1e-6)

    def of(self, bits: torch.Tensor) -> torch.Tensor:
        """Those of [n] that lie in it, as numbers from its low end on."""
        inside = bits >= self.low
        if self.high < _ALL_BITS:  # which no int32 can be
            inside.logical_and_(bits < self.high)
        return bits[inside] - self.low

    def above(self, bits: torch.Tensor) -> int:
        """How many of [n] lie above it."""
        return 0 if self.high == _ALL_BITS else int((bits >= self.high).sum())


def look(task_vectors: torch.Tensor, windows: Sequence[Window]) -> tuple[list[Seen], bool]:
    """What there is of each model in its window.

    Args:
        task_vectors: [N, n], in the compute dtype; overwritten.
        windows: N.

    Returns:
        N; and whether all entries are finite.
    """
    found = fused.look(task_vectors, [(window.low, window.high) for window in windows])
    if found is not None:
        return found
    magnitudes = task_vectors.abs_().to(torch.float32)
    models, width = len(windows), magnitudes.shape[1] // _ROWS
    finite = is_finite(magnitudes)
    if not finite or width == 0 or any(window.high > _INF_BITS for window in windows):
        pairs = list(zip(magnitudes.view(torch.int32), windows, strict=True))
        return [(window.of(bits), window.above(bits)) for bits, window in pairs], finite
    # All at once: with few entries to a call, the calls take longer than the work.
    high, middle, half = magnitudes.new_tensor([window.bounds for window in windows]).T.unsqueeze(2)
    below = torch.empty_like(magnitudes)
    above = magnitudes.shape[1] - torch.lt(magnitudes, high, out=below).sum(1).long()
    # Entry i stands with entries i + n/8, i + 2n/8, ... in a column. Where none of a column is near the window, none is
    # looked at: to pick some out entry by entry takes ten times as long.
    columns, distance = (of[:, : width * _ROWS].view(models, _ROWS, width) for of in (magnitudes, below))
    nearest = torch.sub(columns, middle.unsqueeze(2), out=distance).abs_().amin(1)
    model, column = nearest.le_(half).nonzero().unbind(1)
    near = columns[model, :, column].view(torch.int32)  # [columns, 8], in the order of the models
    parts = torch.split(near, torch.bincount(model, minlength=models).tolist())
    rest = magnitudes[:, width * _ROWS :].view(torch.int32)
    return [
        (window.of(torch.cat([part.flatten(), last])), number)
        for window, part, last, number in zip(windows, parts, rest, above.tolist(), strict=True)
    ], True


def _magnitude(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


class Counter:
    """What was seen of magnitudes through a window: how many lie above, and what lies in it; in bounded memory.

    Args:
        window: what is looked through.
        capacity: how many entries are collected before they are counted bin by bin.
    """

    def __init__(self, window: Window, capacity: int = _COLLECTED) -> None:
        self.window, self.above = window, 0
        # One piece of memory from the start: many small ones between large temporaries would tear holes into the heap.
        self._held = torch.empty(capacity, dtype=torch.int32)
        self._collected = 0
        self._bins: torch.Tensor | None = None  # how many of those before lie in each bin

    @property
    def bits(self) -> torch.Tensor:
        """[n]: what was collected, as numbers of bits from the window's low end on."""
        return self._held[: self._collected]

    def add(self, bits: torch.Tensor, above: int) -> None:
        """Take account of what `look` gave."""
        self.above += above
        until = self._collected + bits.numel()
        if until > len(self._held):
            self._bins, self._collected = self._binned(torch.cat([self.bits, bits])), 0
        else:
            self._held[self._collected : until] = bits
            self._collected = until

    def join(self, other: Counter) -> None:
        """Take account of what another saw through the same window."""
        if other._bins is not None:
            self._bins = other._bins if self._bins is None else self._bins + other._bins
        self.add(other.bits, other.above)

    def to_json(self) -> dict[str, Any]:
        """What was seen, as JSON has it."""
        seen = {"bits": _packed(self.bits)} if self._collected else {}
        return {"above": self.above, **seen, **({"bins": _packed(self._bins)} if self._bins is not None else {})}

    def join_json(self, seen: Mapping[str, Any]) -> None:
        """Take account of what `to_json` gave of another, which saw through the same window.

        Raises:
            KeyError, TypeError, ValueError: it gave something else.
        """
        other = Counter(self.window, 0)
        if "bins" in seen:
            nothing = other._binned(other.bits)
            other._bins = _unpacked(seen["bins"], nothing.dtype)
            if other._bins.shape != nothing.shape:
                raise ValueError("bins of another window")
        other._held = _unpacked(seen["bits"], torch.int32) if "bits" in seen else other._held
        other._collected, other.above = other._held.numel(), int(seen["above"])
        self.join(other)

    def ranked(self, k: int) -> tuple[Window, int, int]:
        """In which window the k-th largest entry lies; how many entries lie there or above, 0 if it is outside this
        one; and how many lie above. Inside, a window of one number is the answer.

        Args:
            k: 1 or more, and no more than there are entries.
        """
        if self.above >= k:
            return Window(self.window.high, _ALL_BITS), 0, 0
        from_above = self.above + self._binned(self.bits).flip(0).cumsum(0)
        at = int((from_above < k).sum())
        if at == len(from_above):
            return Window(0, self.window.low), 0, 0
        shift = self.window.shift
        low = len(from_above) - 1 - at << shift
        found = Window(self.window.low + low, min(self.window.high, self.window.low + low + (1 << shift)))
        number = int(from_above[at])
        if self._bins is None and not found.is_one:  # all are at hand: those of the bin can be put in order
            inside = self.bits[(self.bits >= low) & (self.bits < low + (1 << shift))].sort().values
            least = inside[number - k]
            low = self.window.low + int(least)
            return Window(low, low + 1), number - int((inside < least).sum()), number - int((inside <= least).sum())
        return found, number, int(from_above[at - 1]) if at else self.above

    def around(self, share: float) -> Window:
        """Where the threshold of all entries probably lies, if those seen, through a window on everything, are a sample
        of them.
        """
        seen = self._collected + (int(self._bins.sum()) if self._bins is not None else 0)
        slack = _SLACK * math.sqrt(seen * share * (1 - share)) + 1
        first, last = math.floor(share * seen - slack), math.ceil(share * seen + slack)
        low = self.ranked(last)[0].low if last <= seen else 0
        high = self.ranked(first)[0].high if first >= 1 else _ALL_BITS
        return Window(low, high)

    def _binned(self, bits: torch.Tensor) -> torch.Tensor:
        """[bins]: how many lie in each, these and those that were counted before."""
        shift = self.window.shift
        bins = torch.bincount(bits >> shift, minlength=(self.window.high - self.window.low - 1 >> shift) + 1)
        return bins if self._bins is None else self._bins + bins


def _packed(numbers: torch.Tensor) -> str:
    """[n] of whole numbers as text."""
    raw = bytearray(numbers.numel() * numbers.element_size())
    if raw:
        torch.frombuffer(raw, dtype=numbers.dtype).copy_(numbers)
    return b64encode(zlib.compress(raw, 1)).decode()


def _unpacked(text: str, dtype: torch.dtype) -> torch.Tensor:
    try:
        raw = bytearray(zlib.decompress(b64decode(text, validate=True)))
    except zlib.error as error:
        raise ValueError(str(error)) from error
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)


_EVERYWHERE = Window(0, _ALL_BITS)
_WORTH_A_SAMPLE = 2**18  # entries


Sought = tuple[int, int]
"""Which magnitude: of which model, and the how-many-th that the sparsifier asks for of it."""
Counters = dict[Sought, Counter]
Count = Callable[[Iterable[list[PlanChunk]], dict[Sought, Window], "int | None"], Counters]
"""Looks at items of work through windows; of a part of everything, the bytes of it are said, too."""


class Search:
    """The search for magnitudes by their ranks, in one tensor or in all.

    Args:
        ranks: for each model, 1 for the largest; the magnitudes that are asked for.
        numel: how many entries there are.
    """

    def __init__(self, ranks: Sequence[Ranks], numel: int) -> None:
        self.ranks, self.numel = ranks, numel
        self._wanted = {(model, n): k for model, own in enumerate(ranks) for n, k in enumerate(own)}
        self._found: dict[Sought, tuple[float, int, int]] = {}  # a magnitude; entries at it or above; above

    def run(self, segments: list[tuple[TensorPlan, Segment]], count: Count) -> None:
        """Look at all entries, as often as it takes."""
        windows = self.begin(segments, count)
        while windows:
            windows = self.settle(count(items_of(segments), windows, None))

    def begin(self, segments: list[tuple[TensorPlan, Segment]], count: Count) -> dict[Sought, Window]:
        """Where to look at all entries for the first time, for what is asked for: where a sample says."""
        windows = dict.fromkeys(self._wanted, _EVERYWHERE)
        if not windows or not (sample := sample_of(segments)):
            return windows
        counters = count(batches(sample), windows, sum(chunk.nbytes for chunk in sample))
        return {sought: counter.around(self._wanted[sought] / self.numel) for sought, counter in counters.items()}

    def settle(self, counters: Counters) -> dict[Sought, Window]:
        """Take account of a look at all entries; where to look for what it did not settle. Nothing, in the end."""
        windows: dict[Sought, Window] = {}
        for sought, counter in counters.items():
            window, number, above = counter.ranked(self._wanted[sought])
            if number and window.is_one:
                self._found[sought] = window.magnitude, number, above
            else:
                windows[sought] = window
        return windows

    def bounds(self, model: int) -> Bounds:
        """The magnitudes of a model that were asked for."""
        return tuple(self._found[model, n][0] for n in range(len(self.ranks[model])))

    def kept(self, model: int) -> int:
        """How many entries of a model lie between them, all counted that share a bound."""
        if not self.ranks[model]:
            return self.numel
        _, least, _ = self._found[model, 0]
        return least if len(self.ranks[model]) == 1 else least - self._found[model, 1][2]


def sample_of(segments: list[tuple[TensorPlan, Segment]]) -> list[PlanChunk]:
    """Runs of entries at regular distances: an eighth of all, or, where that is more than enough, `_RUNS`."""
    numel = sum(segment.numel for _, segment in segments)
    if numel < _WORTH_A_SAMPLE:
        return []
    step = _RUN * max(8, -(-numel // (_RUN * _RUNS))) + _RUN // 4 + 1  # so as not to step from row to row
    chunks, at = [], 0
    for tensor, segment in segments:
        while at < segment.numel:
            chunks.append(Chunk(tensor, segment, at, min(_RUN, segment.numel - at)))
            at += step
        at -= segment.numel
    return chunks


def batches(chunks: list[PlanChunk]) -> Iterator[list[PlanChunk]]:
    """A sample as items of work."""
    return (chunks[first : first + 16] for first in range(0, len(chunks), 16))
