"""FP8 weights: told by the scales that stand beside them, and read as what they stand for.

A weight of 8-bit floats has a tensor of scales beside it: one for the whole, for each row, or for each block of a
matrix. The weight is `code * scale`, in every format that is read here:

| format | scales | of |
|---|---|---|
| `quant_method: fp8` with `weight_block_size` (DeepSeek, Qwen) | `weight_scale_inv`, a name that misleads | blocks |
| `quant_method: fp8` (transformers, vLLM), `modelopt` | `weight_scale_inv`, `weight_scale` | tensor, row |
| compressed-tensors `float-quantized` | `weight_scale` | tensor, row, block |
| compressed-tensors `mxfp8-quantized` | `weight_scale`, exponents | 32 entries of a row |
| `fbgemm_fp8` | `weight_scale` | row |
| scaled FP8 of image models | `scale_weight` | tensor |

What the tensors are decides, not what a config lists as converted; where the two contradict each other, both are named.
Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from lines_cli.checkpoint.formulas import Dequantised, Made
from lines_cli.checkpoint.header import FLOAT8_DTYPES, FLOAT_DTYPES, StoredTensor, TensorInfo, itemsize
from lines_cli.errors import CheckpointError, printable, some

QUANTIZATION = "quantization_config"
_EXPONENTS = frozenset({"U8", "F8_E8M0"})
_SCALE_DTYPES = FLOAT_DTYPES | _EXPONENTS
_BLOCK = 128  # rows and columns, where no config says how many
_GROUP = 32  # columns that share an exponent (OCP microscaling formats)
_COUNTS_AS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

_NO_WEIGHTS = ("_scale", "_scale_inv", ".scale", "_zero_point")  # which other formats store in 8 bits, too
# Beside the weights and their scales: scales of activations and of cached keys and values, which only those need who
# run the model in 8 bits.
_OF_ACTIVATIONS = re.compile(
    r"(?:.*\.)?(?:(?:\w+_)?(?:input|activation|output)_(?:scale|scale_ub|zero_point)|(?:\w+_)?[qkv]_(?:scale|zero_point)"
    r"|kv_scale|prob(?:_output)?_scale|scale_input|scaled_fp8)",
    re.DOTALL,
)


class Quantised(NamedTuple):
    """A checkpoint with FP8 weights, as a model.

    Attributes:
        tensors: its tensors by name, the weights as what they stand for; scales are none of them.
        formulas: the weights -> what is stored, and the scales.
        beside: tensors that belong to the format and to no weight: scales of activations.
        stored_as: the format of most weights, in words.
    """

    tensors: dict[str, StoredTensor]
    formulas: dict[str, Made]
    beside: dict[str, StoredTensor]
    stored_as: str


def read_quantised(
    tensors: Mapping[str, StoredTensor], config: Mapping[str, Any], where: Callable[[str], str]
) -> Quantised | None:
    """The model that FP8 weights and their scales make; None where no scale stands beside any.

    Args:
        tensors: as they are stored, by name.
        config: `config.json`, or nothing.
        where: the file that holds a tensor, for a message.

    Raises:
        CheckpointError: weights, scales and config contradict each other.
    """
    codes = [
        name
        for name, stored in tensors.items()
        if stored.info.dtype in FLOAT8_DTYPES and stored.info.numel and not name.endswith(_NO_WEIGHTS)
    ]
    scales = {name: scale for name in codes if (scale := _scale_of(name, tensors)) is not None}
    said = _said_of(config)
    if not scales:
        return None
    if len(scales) < len(codes):
        lacking = [name for name in codes if name not in scales]
        first = next(iter(scales))
        raise CheckpointError(
            f"{where(lacking[0])}: {len(lacking):,} tensor(s) of 8-bit floats have no scale beside them, as "
            f"{printable(first)} has ({printable(scales[first])}):\n{some(lacking)}",
            hint="The checkpoint is incomplete, or was written by something else than it says: download it again.",
        )
    dtype = _counts_as(config)
    model, formulas = dict(tensors), dict[str, Made]()
    for name, scale in scales.items():
        stored = tensors[name]
        step = _dequantised(name, stored.info, scale, tensors[scale], said, where)
        formulas[name] = Made(stored, (step,))
        info = stored.info
        counted = TensorInfo(dtype, info.shape, info.offset, info.numel * itemsize(dtype))
        model[name] = StoredTensor(stored.file, counted)
    for scale in scales.values():
        model.pop(scale, None)
    beside = {name: model.pop(name) for name in [name for name in model if _is_of_activations(name, model)]}
    formats = Counter(
        f"{made.stored.info.dtype}, one scale for each {step.granularity}"
        for made in formulas.values()
        for step in made.steps
        if isinstance(step, Dequantised)
    )
    return Quantised(model, formulas, beside, formats.most_common(1)[0][0])


def _is_of_activations(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    return _OF_ACTIVATIONS.fullmatch(name) is not None and len(tensors[name].info.shape) < 3


def _scale_of(name: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """The tensor of scales beside a weight, by its name; None where there is none."""
    module, _, last = name.rpartition(".")
    within = f"{module}." if module else ""
    beside = [f"{name}_scale_inv", f"{name}_scale"]
    if last == "weight":
        beside += [f"{within}{scale}" for scale in ("scale_inv", "scale_weight", "qscale_weight", "scale")]
    return next((scale for scale in beside if scale in tensors), None)


# --- what the config says ---


class _Said(NamedTuple):
    """What a config says of the weights.

    Attributes:
        method: what it calls the format; None where it says nothing.
        blocks: the blocks that it names; none, where it names none.
    """

    method: str | None
    blocks: tuple[tuple[int, int], ...]


def said_to_be(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The part of a config that says how weights are quantised, if it has one; of a model of several parts it may be
    that of one of these.
    """
    if isinstance(said := config.get(QUANTIZATION), Mapping) and said:
        return said
    for key, inner in config.items():
        if key.endswith("_config") and isinstance(inner, Mapping):
            said = inner.get(QUANTIZATION)
            if isinstance(said, Mapping) and said:
                return said
    return None


def _said_of(config: Mapping[str, Any]) -> _Said:
    """Raises CheckpointError where the blocks it names are none."""
    said = said_to_be(config)
    if said is None:
        return _Said(None, ())
    return _Said(str(said.get("quant_method") or "unnamed method"), tuple(dict.fromkeys(_blocks(said))))


def _blocks(said: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    size = said.get("weight_block_size")
    if size is not None:
        if not (isinstance(size, list) and len(size) == 2 and all(type(n) is int and n > 0 for n in size)):
            raise CheckpointError(
                f"config.json: the weight_block_size of its {QUANTIZATION} is {_shown(size)}, not two sizes",
                hint="The file is damaged: copy or download it again.",
            )
        yield size[0], size[1]
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping):
            continue
        structure, size = weights.get("block_structure"), weights.get("group_size")
        if isinstance(structure, str):
            structure = [int(n) if n.isdecimal() else 0 for n in structure[:40].split("x")]
        if isinstance(structure, list) and len(structure) == 2 and all(type(n) is int and n > 0 for n in structure):
            yield structure[0], structure[1]
        elif type(size) is int and size > 0:
            yield 1, size


def _shown(value: Any) -> str:
    return printable(repr(value)[:80])


def _counts_as(config: Mapping[str, Any]) -> str:
    """The dtype that weights have when they are whole: what the config says, else bfloat16."""
    inner = [value for key, value in config.items() if key.endswith("_config") and isinstance(value, Mapping)]
    for each in (config, *inner):
        for key in ("dtype", "torch_dtype"):
            said = each.get(key)
            if isinstance(said, str) and said.removeprefix("torch.") in _COUNTS_AS:
                return _COUNTS_AS[said.removeprefix("torch.")]
    return "BF16"


# --- which entries share a scale ---


def _dequantised(
    name: str, info: TensorInfo, scale: str, scales: StoredTensor, said: _Said, where: Callable[[str], str]
) -> Dequantised:
    """The step that makes a weight of its codes.

    Raises:
        CheckpointError: the scales are of no dtype that a scale has, or do not fit.
    """
    dtype, shape = scales.info.dtype, scales.info.shape
    if dtype not in _SCALE_DTYPES:
        raise CheckpointError(
            f"{where(scale)}: {printable(scale)}, the scale of {printable(name)} ({info.dtype}), is {dtype}, which no "
            "scale is stored in",
            hint="Give the checkpoint it was quantised from, or dequantise it with the library that wrote it.",
        )
    found = _layout(info.shape, shape, _tried(said, scale, dtype), told=bool(said.blocks))
    if found is None:
        blocks = " or ".join(f"{rows} x {columns}" for rows, columns in said.blocks)
        says = f"; config.json says blocks of {blocks} ({said.method})" if blocks else ""
        raise CheckpointError(
            f"{where(scale)}: {printable(scale)} is {list(shape)}, and fits no blocks of {printable(name)}, which is "
            f"{list(info.shape)} in {where(name)}{says}",
            hint="Weights and scales are not of one save, or the config is another model's: download them again.",
        )
    matrices, block = found
    return Dequantised(scale, (("scale", scales),), info.shape, matrices, block)


def _tried(said: _Said, scale: str, dtype: str) -> tuple[tuple[tuple[int, int], ...], bool]:
    """The blocks that scales may belong to, and whether to no others: those of a config hold for what it calls so."""
    if said.blocks:
        # An embedding may have one scale where linear layers have blocks; it has another name then.
        return said.blocks, said.method == "fp8" and not scale.endswith("_scale")
    return (((1, _GROUP),) if dtype in _EXPONENTS else ()) + ((_BLOCK, _BLOCK),), False


def _layout(
    shape: tuple[int, ...], scales: tuple[int, ...], tried: tuple[tuple[tuple[int, int], ...], bool], *, told: bool
) -> tuple[int, tuple[int, int]] | None:
    """Of how many matrices a tensor consists, and which blocks of them share a scale; None where the scales do not fit.

    Args:
        shape: of the tensor.
        scales: of its scales.
        tried: blocks, and whether nothing else will do.
        told: whether a config says them; then there are no others.
    """
    blocks, strict = tried
    if len(scales) == 1 and not strict:
        blocks = ()  # one for each row or column, or for all
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    batch = math.prod(shape[:-2])
    number = math.prod(scales)
    for height, width in blocks:
        down, across = -(-rows // height), -(-columns // width)
        if number == batch * down * across and _is_grid(scales, batch, down, across):
            return batch, (height, width)
        half = -(-(rows // 2) // height)
        if (
            strict
            and rows % 2 == 0
            and number == batch * 2 * half * across
            and _is_grid(scales, batch, 2 * half, across)
        ):
            return 2 * batch, (height, width)  # two projections above each other, each with blocks of its own
    if strict:
        return None
    if number == 1:
        return 1, (max(1, batch * rows), columns)
    if len(shape) > 2 and scales and scales[0] == shape[0] and number == shape[0]:
        if shape[0] == batch:  # one for each matrix
            return batch, (rows, columns)
        return 1, (math.prod(shape[1:-1]), columns)  # of a convolution, one for each output channel
    if number == batch * rows and _is_grid(scales, batch, rows, 1):
        return batch, (1, columns)
    if number == batch * columns and _is_grid(scales, batch, 1, columns) and rows > 1:
        return batch, (rows, 1)
    if told or len(scales) < 2:
        return None
    down, across = scales[-2:]
    even = down and across and rows % down == 0 and columns % across == 0
    if even and _is_grid(scales, batch, down, across):
        return batch, (rows // down, columns // across)
    return None


def _is_grid(scales: tuple[int, ...], batch: int, down: int, across: int) -> bool:
    """Whether scales stand in these rows and columns: as a matrix in just these; those of a batch of matrices, and a
    plain row of them, with axes of one apart.
    """
    if len(scales) > 1 and (math.prod(scales[:-2]), *scales[-2:]) == (batch, down, across):
        return True
    if len(scales) > 1 and batch == 1:
        return False  # [32, 1] is a scale for each of 32 rows, not one for each of 32 blocks of columns
    return [size for size in scales if size > 1] == [size for size in (batch, down, across) if size > 1]
