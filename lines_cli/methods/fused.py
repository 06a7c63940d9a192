"""A method's loops in one go, by kernels that numba compiles (`kernels`), where that is installed and worth it.

Every function here does what the torch operations beside its call do, to the bit, or does nothing and says so: where no
kernels are in use, on CUDA, and for any dtype but float32. `engine/fast` says when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from types import ModuleType

    from torch import Tensor

_kernels: ModuleType | None = None


def use(kernels: ModuleType | None) -> None:
    """Use these kernels from now on, in all threads; None uses none."""
    global _kernels  # noqa: PLW0603 - as torch's own switches, one for the process: what is loaded is loaded for all
    _kernels = kernels


def in_use() -> bool:
    """Whether there are kernels in use."""
    return _kernels is not None


def look(task_vectors: Tensor, windows: Sequence[tuple[int, int]]) -> tuple[list[tuple[Tensor, int]], bool] | None:
    """`engine/threshold.look`; None does nothing.

    Args:
        task_vectors: [N, n].
        windows: N: the first number of bits in each, and the first above it.
    """
    kernels, addresses = _for(task_vectors.unbind())
    if kernels is None:
        return None
    import torch

    seen, finite = kernels.look(addresses, task_vectors.shape[1], windows)
    return [(torch.from_numpy(bits), above) for bits, above in seen], finite


def signs(
    task_vectors: Sequence[Tensor], *, factor: Sequence[float], weight: Sequence[float], waiting: bool
) -> tuple[int, bool] | None:
    """The sum of what `ties.signs` gives, and its second word; None does nothing."""
    kernels, addresses = _for(task_vectors)
    if kernels is None:
        return None
    found: tuple[int, bool] = kernels.signs(addresses, task_vectors[0].numel(), factor, weight, waiting=waiting)
    return found


def ties(
    task_vectors: Sequence[Tensor], factor: Sequence[float], weight: Sequence[float], agreement: str, *, plus: bool
) -> Tensor | None:
    """`ties.ties` by mean or sum, which overwrites the task vectors; None does nothing.

    Args:
        task_vectors, factor, weight, agreement: as there.
        plus: whether an entry whose sum is zero takes that sign.
    """
    kernels, addresses = _for(task_vectors)
    if kernels is None or agreement not in ("mean", "sum"):
        return None
    kernels.ties(addresses, task_vectors[0].numel(), factor, weight, mean=agreement == "mean", plus=plus)
    return task_vectors[0]


def votes(merged: Tensor, task_vectors: Sequence[Tensor], *, scale: Sequence[float], k: float) -> bool:
    """Set to 0 in `merged`, in place, what fewer than `k` masks of consensus select; False does nothing."""
    kernels, addresses = _for([merged, *task_vectors])
    if kernels is None:
        return False
    kernels.votes(addresses[0], addresses[1:], merged.numel(), scale, k)
    return True


def _for(tensors: Sequence[Tensor]) -> tuple[Any, list[int]]:
    """The kernels, if they can do these tensors; and where their entries are."""
    if _kernels is None:
        return None, []
    import torch

    numel = tensors[0].numel()
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return None, []
        if tensor.numel() != numel or numel == 0:
            return None, []
    return _kernels, [tensor.data_ptr() for tensor in tensors]
