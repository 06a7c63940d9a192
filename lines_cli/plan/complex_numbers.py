"""Complex numbers, which are never computed with: whether the inputs hold the same. This is the one thing that a plan
reads of tensors, so that it is known before anything is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from lines_cli.checkpoint.header import COMPLEX, itemsize
from lines_cli.checkpoint.reader import views_of
from lines_cli.errors import CheckpointError
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.tensors import Segment, TensorSpec
from lines_cli.storage.files import open_regular, read_into
from lines_cli.storage.views import FileWithViews, Views

_MOST_READ = 2**30  # bytes, of all inputs; what is beyond is compared while it is written
_STEP = 2**20


def compared(specs: Iterable[TensorSpec], inputs: Inputs) -> Iterator[TensorSpec]:
    """The specs, where complex numbers that are not the same in all inputs are misfits. Inputs in memory are compared
    when the result is made.

    Raises:
        CheckpointError: an input cannot be read.
    """
    paths = (file for checkpoint in inputs.checkpoints for file in checkpoint.files)
    files = list(zip(paths, views_of(inputs.checkpoints), strict=True))
    on_disk = all(len(checkpoint.states) == len(checkpoint.files) for checkpoint in inputs.checkpoints)
    left = _MOST_READ if on_disk else 0
    for spec in specs:
        if spec.dtype == COMPLEX and spec.paired and not spec.misfit:
            if any(source.parts for segment in spec.segments for source in segment.sources):
                yield spec  # compared while it is written
                continue
            left -= sum(segment.numel * len(segment.sources) for segment in spec.segments) * itemsize(COMPLEX)
            if left >= 0 and not all(_alike(segment, files) for segment in spec.segments):
                yield spec._replace(segments=(), misfit="complex numbers, and not the same")
                continue
        yield spec


def _alike(segment: Segment, files: Sequence[tuple[Path, Views]]) -> bool:
    """Whether all inputs hold the same."""
    nbytes = segment.numel * itemsize(COMPLEX)
    one, other = memoryview(bytearray(_STEP)), memoryview(bytearray(_STEP))
    for first, second in pairwise(segment.sources):
        for done in range(0, nbytes, _STEP):
            size = min(_STEP, nbytes - done)
            _read(*files[first.file], one[:size], first.offset + done)
            _read(*files[second.file], other[:size], second.offset + done)
            if one[:size] != other[:size]:
                return False
    return True


def _read(path: Path, views: Views, into: memoryview, offset: int) -> None:
    try:
        fd = open_regular(path)
        try:
            got = FileWithViews(fd, views).read_into(into, offset) if views else read_into(fd, into, offset)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if got < len(into):
        raise CheckpointError(f"{path} ends early: it was cut while it was read", hint="Copy or download it again.")
