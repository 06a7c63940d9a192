"""Merged task vectors that are kept, to make many candidates of one recipe from them: which, and their room."""

from __future__ import annotations

from collections.abc import Iterator

from lines_cli.checkpoint.header import EXACT_DTYPES, TensorInfo, itemsize
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.tensors import STORED, Segment


def mergeable(plan: Plan) -> Iterator[tuple[TensorPlan, Segment]]:
    """What is merged where no coefficient is 0 or 1."""
    for tensor in plan.tensors:
        if tensor.spec.paired and tensor.spec.dtype not in EXACT_DTYPES:
            yield from ((tensor, segment) for segment in tensor.spec.segments if segment.models)


def nbytes_merged(plan: Plan) -> int:
    """What merged task vectors take; 0 where it is no more work to make them each time."""
    recipe = plan.recipe
    if recipe.method.takes != "task vectors" or not plan.inputs.has_base:
        return 0
    if all(plan.gives_one(tensor.values) for tensor in plan.tensors if tensor.spec.paired):
        return 0
    return max((info.offset + info.nbytes for info in infos_of_merged(plan).values()), default=0)


def infos_of_merged(plan: Plan) -> dict[str, TensorInfo]:
    """Where each merged task vector is kept: its dtype, which is that of the arithmetic, and its offset in bytes."""
    infos: dict[str, TensorInfo] = {}
    end = 0
    for tensor, _ in mergeable(plan):
        if tensor.name not in infos:
            dtype = STORED["float64" if tensor.in_float64 else "float32"]
            nbytes = tensor.info.numel * itemsize(dtype)
            infos[tensor.name] = TensorInfo(dtype, tensor.info.shape, end, nbytes)
            end += -(-nbytes // 8) * 8
    return infos
