"""A checkpoint in an object store: its small files are fetched, its headers are read over ranges, and its weights stay
where they are until the engine asks for a range of them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from lines_cli.checkpoint.reader import ADAPTERS, Heads, choose_weights, is_index, is_pickle, refuse_folder, shards_of
from lines_cli.checkpoint.sidecars import is_carried
from lines_cli.errors import CheckpointError, UnsupportedError, know_as, some
from lines_cli.hub.heads import headers_of
from lines_cli.storage.beside import leads_out
from lines_cli.storage.names import CONFIG, MODEL_CARD, MODEL_INDEX, MODULES
from lines_cli.storage.object_store import RemoteFile, content_of, listed, url_of

_LARGEST = 2**28  # bytes of a file beside the weights
_LONGEST_NAME = 100  # bytes, of a folder on this machine; a key may be far longer than a name in a filesystem
_COPY_IT = "Copy it to a disk, and name the folder there."


def locate_in_a_bucket(name: str, *, also: Collection[str] = (), variant: str | None = None) -> tuple[str, Path, Heads]:
    """Find a checkpoint by its URL.

    Args:
        name: `s3://bucket/folder`, or that of a `.safetensors` file.
        also: names of files that are wanted, too, where they are there.
        variant: of several sets of weights, which.

    Returns:
        The URL of its folder; a folder on this machine with its small files, which is removed when the process ends;
        and the headers of its weights.

    Raises:
        CheckpointError: there is no such thing, it cannot be read, or holds no clear set of weights.
        UnsupportedError: it is of a kind that is read from a disk only.
    """
    url = url_of(name)
    if url is None:
        raise CheckpointError(f"{name}: not the URL of anything in a bucket", hint="As in s3://bucket/folder.")
    if url.endswith(".safetensors"):
        folder_url, _, chosen = url.rpartition("/")
        return folder_url, _folder_for(url), _heads(name, folder_url, chosen, [chosen])
    there = listed(url)
    if not there:
        raise CheckpointError(f"{name}: nothing lies there", hint="Check the spelling; or give the URL of a file.")
    top = {file for file in there if "/" not in file}
    if several := sorted(top & {MODEL_INDEX, MODULES}):
        raise UnsupportedError(f"{name} holds several models ({several[0]}), which are read from a disk", hint=_COPY_IT)
    if adapters := sorted(top & {*ADAPTERS}):
        raise UnsupportedError(f"{name} is an adapter ({adapters[0]}), which is read from a disk", hint=_COPY_IT)
    chosen = choose_weights(top, variant) or refuse_folder(name, top)
    folder = _folder_for(url)
    for file in sorted(top):
        if not leads_out(file) and (
            is_carried(file) or file in (CONFIG, MODEL_CARD, *also) or (file == chosen and is_index(file))
        ):
            (folder / file).write_bytes(content_of(f"{url}/{file}", _LARGEST))
    shards = list(shards_of(folder / chosen)) if is_index(chosen) else [chosen]
    if pickles := [shard for shard in shards if is_pickle(shard)]:
        raise UnsupportedError(
            f"{name}: {pickles[0]} was written by torch.save, and is read from a disk", hint=_COPY_IT
        )
    if missing := sorted(set(shards) - there.keys()):
        raise CheckpointError(f"{name}: its {chosen} names shards that are not there:\n{some(missing)}")
    return url, folder, _heads(name, url, chosen, shards)


def _folder_for(url: str) -> Path:
    """An empty folder on this machine, called as the last part of a URL, until the process ends."""
    made = Path(tempfile.mkdtemp(prefix="lines-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    folder = made / os.fsdecode(os.fsencode(url.rpartition("/")[2])[:_LONGEST_NAME])
    folder.mkdir()
    know_as(folder, url)
    return folder


def _heads(name: str, url: str, chosen: str, shards: list[str]) -> Heads:
    files = {shard: RemoteFile(f"{url}/{shard}") for shard in shards}

    @contextmanager
    def answer(file: str, start: int, end: int) -> Iterator[tuple[int | None, Iterator[bytes]]]:
        there = files[file]
        yield there.nbytes, iter([bytes(there.range(start, min(end, there.nbytes)))])

    found = headers_of(name, shards, answer)
    return Heads(chosen, found, url=url, times={shard: file.mtime_ns for shard, file in files.items()})
