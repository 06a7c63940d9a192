"""What holds for every test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """The cores are pytest-xdist's; and sums come out the same on any machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fifth of a small run is spent in fsync; only tests marked `durable` wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("durable") is None:
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield
