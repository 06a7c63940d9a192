"""The headers of weight files that are elsewhere, without the weights: a few requests for the first bytes of each.

A server that knows ranges sends those bytes and no more. Of one that does not, and sends the whole file, the first
bytes are read, and the connection is closed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lines_cli.checkpoint.header import header_bytes
from lines_cli.errors import HubError
from lines_cli.hub.client import is_transient
from lines_cli.storage.object_store import placed_at

_FIRST = 2**16
"""Bytes that are asked for at first: most headers are shorter."""
_AT_ONCE = 8
_TIMEOUT = 30.0  # seconds without a byte
_WAITS = (1.0, 4.0)  # seconds before it is tried again
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+)")


Answer = Callable[[str, int, int], AbstractContextManager["tuple[int | None, Iterator[bytes]]"]]
"""The size of a file, by its name, and its bytes from the first number on, as far as the second or further."""


def headers_of(
    name: str,
    files: Sequence[str],
    answer: Answer,
    *,
    passes: Callable[[BaseException], bool] = lambda _: False,
) -> dict[str, tuple[int, bytes]]:
    """Fetch the headers of safetensors files.

    Args:
        name: what messages call the repository.
        files: their names.
        answer: asks for a part of one.
        passes: whether an error may pass, so that it is tried again.

    Returns:
        The size of each file, and the JSON of its header.

    Raises:
        CheckpointError: one does not begin as a safetensors file.
        HubError: the server does not say how large a file is.
        Exception: as the client raises it.
    """

    def patiently(file: str) -> tuple[int, bytes]:
        for wait in _WAITS:
            try:
                return _header_of(name, answer, file)
            except Exception as error:
                if not passes(error):
                    raise
            time.sleep(wait)
        return _header_of(name, answer, file)

    with ThreadPoolExecutor(max_workers=min(_AT_ONCE, len(files)), thread_name_prefix="lines-heads") as threads:
        return dict(zip(files, threads.map(patiently, files), strict=True))


def headers_on_the_hub(name: str, repo: str, commit: str, files: Sequence[str]) -> dict[str, tuple[int, bytes]]:
    """The same of files of a repository's commit on the Hub."""
    from huggingface_hub import hf_hub_url

    def answer(file: str, start: int, end: int) -> AbstractContextManager[tuple[int | None, Iterator[bytes]]]:
        return _answer(hf_hub_url(repo, file, revision=commit), start, end)

    return headers_of(name, files, answer, passes=is_transient)


def _header_of(name: str, answer: Answer, file: str) -> tuple[int, bytes]:
    path = placed_at(name) / file
    with answer(file, 0, _FIRST) as (size, pieces):
        if size is None:
            raise HubError(
                f"{path}: the server does not say how large the file is, so its header cannot be checked",
                hint="Download the model, and inspect the folder.",
            )
        begin = _read(pieces, 8)
        needed = header_bytes(path, begin, size)
        begin = _read(pieces, needed, begin)
    if len(begin) < needed:
        with answer(file, len(begin), needed) as (_, pieces):
            begin = _read(pieces, needed, begin)
    if len(begin) < needed:
        raise ConnectionError(f"{file}: the answer ended after {len(begin):,} of {needed:,} bytes")
    return size, begin[8:needed]


def _read(pieces: Iterator[bytes], enough: int, begin: bytes = b"") -> bytes:
    """So many bytes, or a few more; fewer where there are no more."""
    read = bytearray(begin)
    while len(read) < enough and (piece := next(pieces, None)) is not None:
        read += piece
    return bytes(read)


@contextmanager
def _answer(url: str, start: int, end: int) -> Iterator[tuple[int | None, Iterator[bytes]]]:
    """The size of a file, and its bytes from `start` on: to `end`, or to its own if the server knows no ranges."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # exported when they are asked for
        build_hf_headers,
        get_session,
        hf_raise_for_status,
    )

    headers = {**build_hf_headers(), "Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    session: Any = get_session()
    if callable(getattr(session, "stream", None)):
        asking = session.stream("GET", url, headers=headers, timeout=_TIMEOUT)
    else:  # the client had another HTTP library before 1.0
        asking = session.get(url, headers=headers, timeout=_TIMEOUT, stream=True)
    with asking as response:
        if response.status_code >= 400 and hasattr(response, "read"):
            response.read()  # which the error quotes
        hf_raise_for_status(response)
        pieces = response.iter_raw() if hasattr(response, "iter_raw") else response.iter_content(_FIRST)
        said = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status_code == 206 and said and int(said[1]) == start:
            yield int(said[2]), pieces
            return
        length = response.headers.get("Content-Length", "")
        yield int(length) if length.isdecimal() else None, _from(pieces, start)


def _from(pieces: Iterator[bytes], start: int) -> Iterator[bytes]:
    """A stream of bytes without its first."""
    for piece in pieces:
        if start < len(piece):
            yield piece[start:]
        start = max(0, start - len(piece))
