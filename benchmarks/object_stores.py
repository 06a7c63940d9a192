"""obstore beside fsspec (s3fs): range reads of a chunk, and the parts of an upload, against an S3 server on loopback.

    python benchmarks/object_stores.py [--rounds 5]

The server (moto) is a process of its own. What counts is the processor time of the client, threads included: on a
machine of few cores the server's share decides the time by the clock. Contenders run in turn.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.request import Request, urlopen

MIB = 2**20
CHUNK, PART, TOTAL, THREADS = 3 * MIB // 2, 8 * MIB, 48 * MIB, 4
ENDPOINT = "http://127.0.0.1:{port}"
KEYS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def with_obstore(endpoint: str) -> dict[str, Callable[[], object]]:
    """Reads and writes by obstore."""
    import obstore
    from obstore.store import S3Store

    store = S3Store("bench", endpoint=endpoint, client_options={"allow_http": True})

    def read() -> None:
        def one(start: int) -> None:
            view = memoryview(obstore.get_range(store, "data", start=start, length=CHUNK))
            buffer[start % (THREADS * CHUNK) :][: len(view)] = view

        buffer = memoryview(bytearray((THREADS + 1) * CHUNK))
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, range(0, TOTAL - CHUNK + 1, CHUNK)))

    def write() -> None:
        with obstore.open_writer(store, "out", buffer_size=PART, max_concurrency=THREADS) as file:
            for _ in range(TOTAL // PART):
                file.write(CONTENT)

    return {"read": read, "write": write}


def with_fsspec(endpoint: str) -> dict[str, Callable[[], object]]:
    """The same by fsspec."""
    import s3fs

    store: Any = s3fs.S3FileSystem(key="test", secret="test", endpoint_url=endpoint)  # noqa: S106 - of the server here

    def read() -> None:
        def one(start: int) -> None:
            view = store.cat_file("bench/data", start=start, end=start + CHUNK)
            buffer[start % (THREADS * CHUNK) :][: len(view)] = view

        buffer = memoryview(bytearray((THREADS + 1) * CHUNK))
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, range(0, TOTAL - CHUNK + 1, CHUNK)))

    def write() -> None:
        with store.open("bench/out", "wb", block_size=PART, cache_type="none") as file:
            for _ in range(TOTAL // PART):
                file.write(CONTENT)

    return {"read": read, "write": write}


CONTENT = os.urandom(PART)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--port", type=int, default=5995)
    asked = parser.parse_args()
    os.environ |= KEYS
    endpoint = ENDPOINT.format(port=asked.port)
    command = [sys.executable, "-m", "moto.server", "-p", str(asked.port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            measure(endpoint, asked.rounds)
        finally:
            server.terminate()


def measure(endpoint: str, rounds: int) -> None:
    """All contenders, in turn."""
    import obstore
    from obstore.store import S3Store

    for _ in range(100):
        try:
            urlopen(endpoint, timeout=1).close()  # noqa: S310 - on loopback
            break
        except OSError:
            time.sleep(0.2)
    urlopen(Request(f"{endpoint}/bench", method="PUT"), timeout=5).close()  # noqa: S310 - on loopback
    store = S3Store("bench", endpoint=endpoint, client_options={"allow_http": True})
    obstore.put(store, "data", os.urandom(TOTAL))
    contenders = {"obstore": with_obstore(endpoint), "fsspec": with_fsspec(endpoint)}
    found: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for turn in range(rounds + 1):
        for name, jobs in contenders.items():
            for job, run in jobs.items():
                begun, cpu = time.perf_counter(), time.process_time()
                run()
                if turn:  # the first warms up
                    took = time.perf_counter() - begun, time.process_time() - cpu
                    found.setdefault((name, job), []).append(took)
    print(f"{'':18}{'CPU s/GB':>10}{'GB/s':>8}")
    for (name, job), times in found.items():
        wall, cpu = (statistics.median(of) for of in zip(*times, strict=True))
        print(f"{name:10}{job:8}{cpu / TOTAL * 1e9:10.2f}{TOTAL / wall / 1e9:8.2f}")


if __name__ == "__main__":
    main()
