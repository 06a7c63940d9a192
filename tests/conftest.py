"""What holds for every test."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator

import pytest

from support import shared


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Of a test marked `some(n)`, all cases but n are slow: the first, the last, and some between, which stay the same.
    Then what builds models of transformers comes first, and so into one worker: importing and building takes seconds.
    """
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        if item.get_closest_marker("some") and not item.get_closest_marker("slow"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_one in cases.values():
        wanted, last = of_one[0].get_closest_marker("some").args[0], len(of_one) - 1
        by_default = {round(at * last / (wanted - 1)) for at in range(wanted)}
        for at, item in enumerate(of_one):
            if at not in by_default:
                item.add_marker(pytest.mark.slow)
    yield
    items.sort(key=lambda item: item.get_closest_marker("zoo") is None)


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> None:
    """The cores are pytest-xdist's; and sums come out the same on any machine."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _shared(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What all workers of a run share lies in the folder that holds theirs."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared"
    folder.mkdir(exist_ok=True)
    shared.keep_in(folder)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fifth of a small run is spent in fsync; only tests marked `durable` wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("durable") is None:
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield
