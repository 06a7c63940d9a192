"""Where every tensor of the output goes: which file, and where in it, to the byte."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from lines_cli.checkpoint.header import TensorInfo, canonical_order, itemsize, lay_out
from lines_cli.storage.names import natural

FILE_METADATA = {"format": "pt"}
_HASH = re.compile(r"hash", re.IGNORECASE)


def metadata_like(metadata: Mapping[str, str]) -> dict[str, str]:
    """What an output's headers say beside the tensors: what the file says that it is like (`modelspec.title`), but for
    digests of that file's content.
    """
    return {key: value for key, value in metadata.items() if not _HASH.search(key)} | FILE_METADATA


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One weight file of the output.

    Attributes:
        name: its name, relative to the destination.
        head: the bytes before its data.
        nbytes: its whole size.
        prefix: what stands before the names of its tensors among those of the plan.
    """

    name: str
    head: bytes
    nbytes: int
    prefix: str = ""


def lay_out_files(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    *,
    stem: str,
    one_file: str | None,
    max_shard_size: int,
    metadata: Mapping[str, str],
) -> tuple[list[OutputFile], list[tuple[str, int, TensorInfo]]]:
    """Deal tensors out to files. Nothing depends on how the inputs are sharded.

    Files are filled layer by layer (names in natural order); inside one the order is that of the format's reference
    writer.

    Args:
        tensors: name -> dtype, shape.
        stem: what the files of a folder are called, `model` in `model-00001-of-00002.safetensors`.
        one_file: the name of the only file, where the output is no folder.
        max_shard_size: most bytes of tensors in a file of a folder.
        metadata: what the header of each file says beside the tensors.

    Returns:
        The files; and (tensor, number of its file, place in it), file by file.
    """
    groups: list[list[str]] = [[]]
    held = 0
    for name in sorted(tensors, key=natural):
        dtype, shape = tensors[name]
        nbytes = math.prod(shape) * itemsize(dtype)
        if one_file is None and groups[-1] and held + nbytes > max_shard_size:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += nbytes
    if len(groups) == 1:
        names = [one_file or f"{stem}.safetensors"]
    else:
        names = [f"{stem}-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]

    files, placed = [], []
    for number, (file, group) in enumerate(zip(names, groups, strict=True)):
        in_order = canonical_order({name: tensors[name][0] for name in group})
        head, infos = lay_out(((name, *tensors[name]) for name in in_order), metadata)
        files.append(OutputFile(file, head, len(head) + sum(info.nbytes for info in infos.values())))
        placed += [(name, number, info) for name, info in infos.items()]
    return files, placed
