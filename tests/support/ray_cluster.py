"""A Ray cluster of three nodes on this machine, as `ray.cluster_utils` makes it."""

from __future__ import annotations

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
ON_A_CLUSTER = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]
"""Marks of what takes one; Ray itself warns a lot."""


@contextmanager
def three_nodes() -> Iterator[Any]:
    """Three nodes of one CPU each, and the head, which does nothing."""
    pytest.importorskip("ray")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from ray.cluster_utils import Cluster

        with socket.create_server(("", 0)) as server:
            port = server.getsockname()[1]  # which nobody has afterwards
        made = Cluster(initialize_head=False)
        try:
            add_node(made, num_cpus=0, include_dashboard=False, ray_client_server_port=port)
            for _ in range(3):
                add_node(made)
            made.wait_for_nodes()
            yield made
        finally:
            made.shutdown()


def add_node(cluster: Any, **node: Any) -> None:
    """One more; the first is the head. Ray makes them in the main thread alone, and gives each half a minute, which may
    be too short here.
    """
    for last in (False, False, True):
        try:
            cluster.add_node(**NODE | node)
        except Exception as error:
            if last or "timed out" not in str(error):
                raise
        else:
            return


def kill_node(cluster: Any, node: Any) -> None:
    """End a node with all that runs on it, at once; another takes its place."""
    cluster.remove_node(node, allow_graceful=False)
    add_node(cluster)


def nodes_of(cluster: Any) -> list[Any]:
    """All but the head."""
    return [node for node in cluster.list_all_nodes() if node is not cluster.head_node]


def renew(cluster: Any) -> None:
    """Put a node in the place of one that has ended by itself. Ray gives a node's agent 15 s to come up, which may be
    too short here; then the node ends (raylet.out: "Timed out waiting for file .../metrics_agent_port"). Where none is
    left, a merge waits for the next, as it should: for ever.
    """
    for node in nodes_of(cluster):
        if not node.remaining_processes_alive():
            kill_node(cluster, node)
