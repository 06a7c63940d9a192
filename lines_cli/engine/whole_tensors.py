"""What several threads need parts of, made once and kept for a while."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """Results by key. Whoever first asks for one makes it; others who ask meanwhile wait for that. Kept are the ones
    that were last asked for; an older one is made anew if it is needed again. Nothing is counted on: not on every part
    being asked for, nor on any being asked for once.

    Args:
        most: how many are kept.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._entries: dict[Hashable, _Entry[Made]] = {}  # the one that was last asked for stands last

    def get(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """The result of that key; `make` makes it."""
        while True:
            with self._lock:
                entry = self._entries.pop(key, None)
                own = entry is None
                if entry is None:
                    entry = _Entry[Made]()
                self._entries[key] = entry
                while len(self._entries) > self._most:
                    del self._entries[next(iter(self._entries))]
            if own:
                return self._make(key, entry, make)
            entry.finished.wait()
            if entry.made:
                return entry.made[0]

    def _make(self, key: Hashable, entry: _Entry[Made], make: Callable[[], Made]) -> Made:
        try:
            made = make()
            entry.made.append(made)
            return made
        finally:
            if not entry.made:  # it failed: those who wait try it themselves
                with self._lock:
                    if self._entries.get(key) is entry:
                        del self._entries[key]
            entry.finished.set()


class _Entry(Generic[Made]):
    """One result: whether its maker is done with it, and what was made, if that succeeded."""

    def __init__(self) -> None:
        self.finished = threading.Event()
        self.made: list[Made] = []


@dataclass(frozen=True, slots=True)
class Whole:
    """A segment of a tensor that was merged whole.

    Attributes:
        values: [numel], in the compute dtype, on a worker's device; not to be changed.
        squares, kept: for each model, as `merge_chunk.Merged` has them, of all of it.
        nonfinite: which input holds NaN or Inf, and where, if one does.
    """

    values: torch.Tensor
    squares: tuple[float, ...]
    kept: tuple[float, ...]
    nonfinite: str | None
