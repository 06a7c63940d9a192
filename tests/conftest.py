"""What holds for every test."""

from __future__ import annotations

import os
import signal
from collections import defaultdict
from collections.abc import Iterator

import pytest

from support import shared

CASES = 2  # of a test, in the default suite


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> Iterator[None]:
    """Of a test with many cases, all but CASES are slow, or all but n where it is marked `some(n)`: what stays is the
    first, the last, and some between, always the same. Where some cases are marked slow by hand, it has been chosen.
    Then what builds models of transformers comes first, and so into one worker: importing and building takes seconds.
    """
    cases = defaultdict[str, list[pytest.Item]](list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for all_ in cases.values():
        of_one = [item for item in all_ if not item.get_closest_marker("slow")]
        said = all_[0].get_closest_marker("some")
        wanted, last = said.args[0] if said else CASES, len(of_one) - 1
        if len(of_one) <= wanted or (said is None and len(of_one) < len(all_)):
            continue
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


@pytest.fixture(scope="session", autouse=True)
def _nothing_takes_long() -> None:
    """Of a pass that takes some seconds stderr has lines: here only where a test is about them."""
    from lines_cli.cli import console

    console._SILENT = float("inf")


@pytest.fixture(scope="session", autouse=True)
def _minds_ctrl_c() -> None:
    """A shell has what it starts in the background ignore SIGINT; tests send it."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What a test draws does not depend on those before it."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(request: pytest.FixtureRequest) -> Iterator[None]:
    """A fifth of a small run is spent in fsync; only tests marked `durable` wait for it."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("durable") is None:
            patch.setattr(os, "fsync", os.fstat)  # which refuses what is no open file, too
        yield
