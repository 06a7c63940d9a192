"""NaN and Inf that all inputs share, bit for bit: arithmetic does not give them back, so they are kept."""

from __future__ import annotations

import torch

from lines_cli.engine.arithmetic import NAN


def are_shared(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where two inputs hold the same: bit for bit if they are stored in one dtype; else the same number, and NaN with
    any NaN, whose bits depend on how they are widened.

    Args:
        a, b: [n], as they are stored.

    Returns:
        [n], boolean.
    """
    if a.dtype == b.dtype:
        bits = NAN[a.dtype][0]
        return a.view(bits) == b.view(bits)
    a, b = a.to(torch.float64), b.to(torch.float64)
    return ((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())
