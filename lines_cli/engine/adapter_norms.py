"""How large the updates of an adapter are, from their factors alone: no product is ever held.

`|B A|_F = sqrt(trace((A A^T) (B^T B)))`, in float64; of other products what they come to likewise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lines_cli.checkpoint.adapter import Adapter, Change
from lines_cli.checkpoint.formulas import BLOCK
from lines_cli.checkpoint.header import StoredTensor, itemsize
from lines_cli.engine.arithmetic import TORCH_DTYPES
from lines_cli.engine.input_files import opened, read_input, with_views
from lines_cli.errors import ChangedInputError

Read = Callable[[StoredTensor, int, int], Tensor]
"""Entries of a factor, from one on, so many: [n], in float64."""


def update_norms(adapter: Adapter) -> tuple[float | None, ...]:
    """The Frobenius norm of what each change of an adapter adds; None of one that its base has a part in (DoRA, whole
    tensors, rows).

    Raises:
        CheckpointError: the file cannot be read, or is shorter than it was.
    """
    checkpoint = adapter.checkpoint
    views = checkpoint.views or ({},) * len(checkpoint.files)
    with opened(checkpoint.files) as fds:
        source = with_views(fds, views)[0]

        def read(stored: StoredTensor, first: int, numel: int) -> Tensor:
            width = itemsize(stored.info.dtype)
            raw = bytearray(numel * width)
            if read_input(source, memoryview(raw), stored.info.offset + first * width) < len(raw):
                raise ChangedInputError(f"{adapter.file}: ends in the middle of a factor; it was whole a moment ago")
            values = torch.frombuffer(raw, dtype=TORCH_DTYPES[stored.info.dtype]) if raw else torch.empty(0)
            return values.double()

        return tuple(_norm(change, read) for change in adapter.changes)


def _norm(change: Change, read: Read) -> float | None:
    if change.kind in ("rescaled", "whole", "rows"):
        return None
    if change.kind == "difference":
        (stored,) = change.factors.values()
        starts = range(0, stored.info.numel, BLOCK)
        squares = sum(float(read(stored, at, min(BLOCK, stored.info.numel - at)).square().sum()) for at in starts)
    else:
        factors = {
            role: read(stored, 0, stored.info.numel).view(stored.info.shape) for role, stored in change.factors.items()
        }
        if change.kind == "low rank":
            squares = _low_rank(change, factors)
        else:
            squares = (_hadamard if change.kind == "hadamard" else _kronecker)(factors)
    norm = abs(change.scale) * math.sqrt(max(squares, 0.0)) if math.isfinite(squares) else math.nan
    return norm if math.isfinite(norm) else None


def _low_rank(change: Change, factors: dict[str, Tensor]) -> float:
    down, up = factors["A"].flatten(1), factors["B"].flatten(1)
    if "mid" in factors:
        down = torch.einsum("rjk,ji->rik", factors["mid"].flatten(2), down).flatten(1)
    rank = next(iter(change.others.values()))[0] if change.others else up.shape[1]
    batch = up.shape[1] // rank
    downs, ups = down.view(batch, rank, -1), up.view(-1, rank, batch).permute(2, 1, 0)
    return float(((downs @ downs.mT) * (ups @ ups.mT)).sum())


def _hadamard(factors: dict[str, Tensor]) -> float:
    """A sum over runs of rows of the squares of both products, multiplied."""
    pairs = []
    for n in "12":
        a, b, t = factors[f"a{n}"], factors[f"b{n}"], factors.get(f"t{n}")
        pairs.append((a, b) if t is None else (a.T, torch.einsum("ijk,jr->irk", t.flatten(2), b).flatten(1)))
    rows = max(1, BLOCK // max(1, pairs[0][1].shape[1]))
    squares = 0.0
    for at in range(0, pairs[0][0].shape[0], rows):
        one, other = (left[at : at + rows] @ right for left, right in pairs)
        squares += float((one * other).square().sum())
    return squares


def _kronecker(factors: dict[str, Tensor]) -> float:
    """The product of both norms."""
    one = factors["w1"] if "w1" in factors else factors["w1_a"] @ factors["w1_b"]
    if "w2" in factors:
        other = factors["w2"]
    elif "t2" in factors:
        other = torch.einsum("ijk,ip,jr->prk", factors["t2"].flatten(2), factors["w2_a"], factors["w2_b"])
    else:
        other = factors["w2_a"] @ factors["w2_b"]
    return float(one.square().sum()) * float(other.square().sum())
