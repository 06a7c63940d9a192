"""What happens to the numbers: the formula, its rounding, and the search for NaN and Inf. Plain functions over
torch tensors.

    tau_i  = f32(model_i) - f32(base)
    scaled = c * merged
    out    = round(f32(base) + scaled)

where `merged` is one model's task vector, or what a method makes of several. Three operations, each rounded to float32
(float64 where a source is float64), then one rounding to the output dtype. They are kept apart: a fused `lerp`, or
arithmetic in bfloat16, gives other bits (measured: up to 9 % of float32 entries). A kernel per operation also keeps
CUDA from fusing them.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Float dtypes of safetensors as torch names them."""

FLOAT8 = {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
"""Those of 8 bits: they can be widened, and that is all."""


def widen(values: torch.Tensor, into: torch.Tensor) -> None:
    """Put entries of any float dtype [n] into [n] of float32 or float64, exactly. Those of 8 bits are looked up: torch
    takes four times as long.
    """
    if values.dtype not in _OF_8_BITS:
        into.copy_(values)
        return
    table, codes = _table(values.dtype, into.dtype, into.device), values.view(torch.uint8)
    step = _IN_CACHE if into.device.type == "cpu" else max(1, len(codes))
    for first in range(0, len(codes), step):
        part = slice(first, first + step)
        torch.index_select(table, 0, codes[part].int(), out=into[part])


_IN_CACHE = 64 * 1024  # entries: their numbers in the table stay in a core's cache
_OF_8_BITS = frozenset(FLOAT8.values())


@lru_cache(maxsize=64)
def _table(dtype: torch.dtype, wide: torch.dtype, device: torch.device) -> torch.Tensor:
    """What each of 256 codes stands for."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).to(wide).to(device)


def task_vector(fine_tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """`fine_tuned - base` (Ilharco 2023, arXiv 2212.04089): [n], or [N, n] and [n], in the compute dtype; overwrites
    the first.
    """
    return fine_tuned.sub_(base)


def add_scaled(base: torch.Tensor, task_vector: torch.Tensor, coefficient: float) -> torch.Tensor:
    """`base + coefficient * task_vector` (LiNeS, arXiv 2410.17146, eq. 1 and 2, for one block).

    Args:
        base: [n], pre-trained entries, in the compute dtype.
        task_vector: [n], the same.
        coefficient: c(l), exact in the compute dtype.
    """
    if coefficient == 1:  # multiplying would change nothing
        return task_vector + base
    return torch.mul(task_vector, coefficient).add_(base)


def cast(values: torch.Tensor, out: torch.Tensor) -> None:
    """Write `values` into `out`, rounded once, to nearest with ties to even.

    torch takes float64 to a 16-bit dtype by way of float32, which rounds twice. Rounding that first step to odd
    makes the second one right.
    """
    if values.dtype == torch.float64 and out.dtype in (torch.float16, torch.bfloat16):
        values = to_float32_odd(values)
    out.copy_(values)


def to_float32_odd(values: torch.Tensor) -> torch.Tensor:
    """float64 -> float32, where an inexact result takes the neighbour whose last bit is 1 (Boldo and Melquiond,
    2008).
    """
    nearest = values.to(torch.float32)
    error = values - nearest.to(torch.float64)
    even = (nearest.view(torch.int32) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(torch.float32)
    move = (error != 0) & even & nearest.isfinite()
    return torch.where(move, torch.nextafter(nearest, towards), nearest)


def is_finite(values: torch.Tensor) -> bool:
    """Whether no entry of `values` [n] is NaN or Inf: these show in the sum, which takes a tenth of the time of looking
    at each. Only where the sum is not finite are the entries themselves asked.
    """
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())


def dot(a: torch.Tensor, b: torch.Tensor) -> float:
    """The sum of the products of [n] and [n], in their dtype; on CUDA without the workspaces of cuBLAS, which count
    towards the memory of every stream.
    """
    return float(torch.dot(a, b) if a.device.type == "cpu" else (a * b).sum())


def first_nonfinite(values: torch.Tensor) -> tuple[int, str] | None:
    """The position of the first NaN or Inf in `values` [n], and which it is."""
    bad = (~values.isfinite()).nonzero()
    if len(bad) == 0:
        return None
    at = int(bad[0])
    return at, "NaN" if bool(values[at].isnan()) else "Inf"


def block_sums(values: torch.Tensor, block: int) -> list[float]:
    """The sum of every `block` entries of `values` [n], in float64; the last block may be short.

    Halves are added to halves, entry by entry, so that the order of the additions is the same on every processor and
    device. `block` is a power of two above 1.
    """
    blocks = -(-values.numel() // block)
    if blocks * block > values.numel():
        values = torch.nn.functional.pad(values, (0, blocks * block - values.numel()))
    values = values.view(blocks, block)
    width = block // 2
    sums = values[:, :width].to(torch.float64).add_(values[:, width:])
    while width > 1:
        width //= 2
        sums = sums[:, :width].add_(sums[:, width : 2 * width])
    summed: list[float] = sums[:, 0].tolist()
    return summed


def same_nan(values: torch.Tensor) -> None:
    """Give every NaN of `values` [n] the same bits: quiet, positive, no payload. Which ones arithmetic gives depends on
    the processor, and on whether an entry was computed in a vector of them.
    """
    bits, nan = NAN[values.dtype]
    values.view(bits).masked_fill_(values.isnan(), nan)


NAN = {
    torch.float64: (torch.int64, 0x7FF8 << 48),
    torch.float32: (torch.int32, 0x7FC0 << 16),
    torch.float16: (torch.int16, 0x7E00),
    torch.bfloat16: (torch.int16, 0x7FC0),
}
