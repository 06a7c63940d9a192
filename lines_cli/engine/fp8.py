"""Numbers into FP8 codes and scales: `scale = largest / 448` for each block, in float32, and `code = number / scale`,
rounded to nearest (as DeepSeek's kernels and compressed-tensors do; E5M2 has 57344 in place of 448).

The scale is rounded to what it is stored in before numbers are divided by it, so that codes fit the scale that a reader
finds. A number beyond the largest code is stored as that.
"""

from __future__ import annotations

import ctypes
import math

import torch

from lines_cli.checkpoint.formulas import Dequantised
from lines_cli.engine.arithmetic import FLOAT8, TORCH_DTYPES, is_finite, to_float32_odd, widen
from lines_cli.engine.formulas import as_scales, parts_of

_EXPONENTS = frozenset({"U8", "F8_E8M0"})
_BIAS = 127


class Largest:
    """The largest magnitude of each block of a tensor, of entries that are finite. Two of them are put together in any
    order.

    Args:
        step: how the tensor is stored.
    """

    def __init__(self, step: Dequantised) -> None:
        matrices, down, across = step.grid
        self._step, self._found = step, torch.zeros(matrices * down, across)

    def add(self, seen: list[tuple[int, int, torch.Tensor]]) -> None:
        """Add what `look` found."""
        for row, left, largest in seen:
            into = self._found[row : row + len(largest), left : left + largest.shape[1]]
            torch.maximum(into, largest, out=into)

    def scales(self, dtype: str) -> bytes:
        """The scales, as the output stores them in that dtype; of a block of zeros 1."""
        step = self._step
        (_, (_, info, _)) = step.factors[0]
        exact = self._found / torch.finfo(FLOAT8[dtype]).max
        stored = _stored(exact, self._found, info.dtype).contiguous()
        return ctypes.string_at(stored.data_ptr(), info.nbytes)


def _stored(scales: torch.Tensor, largest: torch.Tensor, dtype: str) -> torch.Tensor:
    """Scales in the dtype that they are stored in: above 0 and finite."""
    scales = torch.where(largest > 0, scales, torch.ones(()))
    if dtype in _EXPONENTS:  # of two, rounded up
        exponents = torch.frexp(scales.to(torch.float64))
        power = exponents.exponent - (exponents.mantissa == _HALF).to(torch.int32)
        return (power + _BIAS).clamp_(0, 2 * _BIAS).to(torch.uint8)
    narrow = scales.to(TORCH_DTYPES[dtype])
    info = torch.finfo(narrow.dtype)
    smallest = info.smallest_normal * (info.eps if narrow.dtype == torch.float16 else 1.0)
    least, most = (torch.tensor(end, dtype=narrow.dtype) for end in (smallest, info.max))
    return torch.where(narrow < least, least, torch.where(narrow > most, most, narrow))


_HALF = 0.5  # the mantissa of a power of two, as `frexp` has it


def look(values: torch.Tensor, step: Dequantised, first: int) -> list[tuple[int, int, torch.Tensor]]:
    """The largest magnitudes in blocks, of some entries of a tensor.

    Args:
        values: [n], float32 or float64.
        step: how the tensor is stored.
        first: the number of the first entry.

    Returns:
        Runs of rows of blocks: the first, the first block in it, and [rows of blocks, blocks] in float32, on the CPU.
    """
    magnitudes = values.abs()
    if not is_finite(magnitudes):
        magnitudes.masked_fill_(~magnitudes.isfinite(), 0.0)
    found: list[tuple[int, int, torch.Tensor]] = []
    for part in parts_of(step, first, values.numel()):
        largest = part.of(magnitudes).amax(-1).to(dtype=torch.float32, device="cpu")
        below = part.rows_of_blocks(step)
        if step.block[0] == 1:
            found.append((int(below[0]), part.left, largest))
            continue
        numbers, counts = torch.unique_consecutive(below, return_counts=True)
        of_each = [rows.amax(0) for rows in torch.split(largest, counts.tolist())]
        found.append((int(numbers[0]), part.left, torch.stack(of_each)))
    return found


def to_codes(values: torch.Tensor, codes: torch.Tensor, step: Dequantised, scales: torch.Tensor, first: int) -> None:
    """Write the codes of some entries of a tensor, and put what they stand for in the entries' place.

    Args:
        values: [n], float32 or float64; overwritten.
        codes: [n], in 8 bits.
        step: how the tensor is stored.
        scales: [rows of blocks, blocks], in the dtype of `values`, on its device.
        first: the number of the first entry.
    """
    limit = torch.finfo(codes.dtype).max
    bad = None if is_finite(values) else ~values.isfinite()
    whole = None if bad is None else values.clone()
    parts = []
    for part in parts_of(step, first, values.numel()):
        below = part.rows_of_blocks(step).to(values.device)
        parts.append((part, scales[below, part.left : part.left + part.blocks].unsqueeze(-1)))
    for part, own in parts:
        part.of(values).div_(own)
    values.clamp_(-limit, limit)
    codes.copy_(values if values.dtype == torch.float32 else to_float32_odd(values))
    widen(codes, values)
    for part, own in parts:
        part.of(values).mul_(own)
    if bad is not None and whole is not None:
        _nonfinite(whole, codes, bad)
        values.copy_(torch.where(bad, whole, values))


def _nonfinite(values: torch.Tensor, codes: torch.Tensor, bad: torch.Tensor) -> None:
    """NaN as the quiet one, and Inf as itself; in E4M3, which has none, as NaN."""
    nan, inf = _NONFINITE[codes.dtype]
    raw = codes.view(torch.uint8)
    raw.masked_fill_(bad, nan)
    if inf is not None:
        raw.masked_fill_(values == math.inf, inf)
        raw.masked_fill_(values == -math.inf, inf | 0x80)


_NONFINITE: dict[torch.dtype, tuple[int, int | None]] = {
    torch.float8_e4m3fn: (0x7F, None),
    torch.float8_e5m2: (0x7E, 0x7C),
    torch.float8_e4m3fnuz: (0x80, None),
    torch.float8_e5m2fnuz: (0x80, None),
}
"""What NaN and Inf are stored as."""


def read_scales(stored: bytes, step: Dequantised, like: torch.Tensor) -> torch.Tensor:
    """Scales as `Largest.scales` gave them: [rows of blocks, blocks], in the dtype of `like`, on its device."""
    (_, (_, info, _)) = step.factors[0]
    matrices, down, across = step.grid
    raw = torch.frombuffer(bytearray(stored), dtype=torch.uint8)
    numbers = raw if info.dtype in _EXPONENTS else raw.view(TORCH_DTYPES[info.dtype])
    return as_scales(numbers.view(matrices * down, across), like.dtype).to(like.device)
