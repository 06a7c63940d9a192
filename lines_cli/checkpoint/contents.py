"""What a checkpoint's tensors are, by what stands beside them: quantised codes and their scales; an adapter's factors.

Told by dtypes, shapes and modules, so that a format that nobody has heard of is seen, too. Names only help to tell a
scale from other floats, and codes from integers that count something.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from lines_cli.checkpoint.header import EXACT_DTYPES, FLOAT8_DTYPES, FLOAT_DTYPES, TensorInfo

Tensors = Mapping[str, TensorInfo]

# --- quantised weights ---

_CODES = frozenset({"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64"})
_WIDE = frozenset({"I64", "U64"})  # what torch counts with, and only few formats store codes in
_SIGNED = frozenset({"I8", "I16"})  # which nothing else is stored in
_SCALE_DTYPES = FLOAT_DTYPES | FLOAT8_DTYPES | {"U8"}  # the last: exponents of powers of two
_SCALE = re.compile(
    r".*scales?(?:_(?:inv|max|and_zeros?))?|.*absmax|.*quant_map|.*zeros?(?:_points?)?|.*codebooks?|scb|s|s[uv]h?",
    re.IGNORECASE | re.DOTALL,
)
_ZERO = re.compile(r".*zeros?(?:_points?)?", re.IGNORECASE | re.DOTALL)
_NO_SCALE = re.compile(r"(?:logit|layer|attn|attention|residual|res|skip|head|norm)_scales?", re.IGNORECASE)
_COUNTS = re.compile(  # integers that number entries, or say which of them count
    r"(?:.*_)?(?:ids?|idxs?|index|indices|positions?|masks?|maps?|tracked|tables?|lengths?|counts?|steps?|buckets?"
    r"|coord(?:s|inates?)?|offsets?|orders?|perm(?:utation)?s?|grids?|pos)|.*[a-z]+2[a-z]+|.*bias(?:es)?",
    re.IGNORECASE | re.DOTALL,
)
_NUMBERS_OF_ROWS = re.compile(r"(?:idxs|indices)(?:_\d+)?", re.IGNORECASE)  # in a codebook, perhaps
_NO_STEPS = re.compile(  # floats of a module that are no steps of its codes, whatever their shape
    r"(?:.*_)?(?:weight|table|embed(?:ding)?s?|pos|cls|tokens?|query|queries|keys?|values?|mean|var|gamma|beta)"
    r"|.*bias(?:es)?",
    re.IGNORECASE | re.DOTALL,
)
# Endings that say it alone.
_ENDINGS = (".qweight", ".SCB", ".absmax", ".quant_map", ".weight_packed", ".weight_scale", ".weight_scale_inv")


def quantised_tensor(tensors: Tensors) -> str | None:
    """A tensor that holds codes of weights, or scales of such; None if there is none."""
    integers = [name for name, info in tensors.items() if info.dtype in _CODES]
    beside: dict[str, list[str]] = defaultdict(list)
    if integers:
        wanted = {*map(_module, integers), *integers}
        for name in tensors:
            if (module := _module(name)) in wanted:
                beside[module].append(name)
    for name in integers:
        if _holds_codes(name, tensors, [*beside[_module(name)], *beside[name]]):
            return name
    return next((name for name in tensors if name.endswith(_ENDINGS) or ".quant_state." in name), None)


def codes_or_scales(tensors: Tensors) -> str | None:
    """Where a config says that weights are quantised: a tensor that whole weights would not have. That is a matrix of
    integers, or a run of them in a module without a weight; a narrow float; or a scale by its name. None if there is
    none: then the config was left behind.
    """
    for name, info in tensors.items():
        counts = info.dtype not in _CODES or _COUNTS.fullmatch(_last(name)) is not None
        in_place_of_weight = info.numel > 1 and f"{_module(name)}.weight" not in tensors
        codes = not counts and (len(info.shape) > 1 or in_place_of_weight)
        if codes or info.dtype not in FLOAT_DTYPES | EXACT_DTYPES or _OF_CODES.search(name):
            return name
    return None


_OF_CODES = re.compile(
    r"(?:scales?|scale_inv|zeros?|zero_points?|absmax|quant_map|codebooks?|codes|g_idx|SCB|lut|quant_state\.\S*)$"
)


def format_of(tensors: Tensors, said: str | None = None) -> str | None:
    """The name of the format that quantised weights are in, by their tensors' names and dtypes, else by what a config
    says; None if it is not known by name.
    """
    ends = {_last(name) for name in tensors}
    scales_of_8_bits = any(_last(name) == "weight_scale" and info.dtype == "F8_E4M3" for name, info in tensors.items())
    packed = {info.dtype for name, info in tensors.items() if _last(name) == "weight_packed"}
    weights = {info.dtype for name, info in tensors.items() if _last(name) == "weight"}
    by_name = {
        "GPTQ": {"qweight", "qzeros"} <= ends and ("g_idx" in ends or said == "gptq"),
        "AWQ": {"qweight", "qzeros"} <= ends and "g_idx" not in ends,
        "bitsandbytes (8 bits)": "SCB" in ends,
        "bitsandbytes (4 bits)": not ends.isdisjoint({"absmax", "quant_map"})
        or any(".quant_state." in n for n in tensors),
        "NVFP4": bool(packed | weights & {"U8"}) and scales_of_8_bits,
        "MXFP4": any(name.endswith("_blocks") and f"{name[:-7]}_scales" in tensors for name in tensors)
        or (packed == {"U8"} and not scales_of_8_bits),
        "compressed-tensors (pack-quantized)": packed == {"I32"},
        "MLX": bool(weights & {"U32"}) and {"scales", "biases"} <= ends,
        "HQQ": "W_q" in ends,
        "AQLM": {"codes", "codebooks"} <= ends,
        "EXL3": {"trellis", "svh"} <= ends,
        "EXL2": {"q_weight", "q_scale"} <= ends,
        "quanto": {"_data", "_scale"} <= ends,
        "compressed-tensors (int-quantized)": bool(weights & {"I8"}) and "weight_scale" in ends,
        UNSCALED: any(info.dtype in FLOAT8_DTYPES for info in tensors.values()),
    }
    found = next((name for name, is_so in by_name.items() if is_so), None)
    return found or _CALLED.get(said or "")


UNSCALED = "8-bit floats without scales"
_CALLED = {
    "gptq": "GPTQ",
    "awq": "AWQ",
    "hqq": "HQQ",
    "aqlm": "AQLM",
    "quanto": "quanto",
    "mxfp4": "MXFP4",
    "exl3": "EXL3",
}

_ORIGINAL = "Give the checkpoint that it was quantised from (its model card names it), and quantise the output again"
_BY_TRANSFORMERS = "transformers makes it whole: from_pretrained"
_BY_BITSANDBYTES = f"{_ORIGINAL}; or {_BY_TRANSFORMERS}, model.dequantize(), save_pretrained."
_BY_COMPRESSED_TENSORS = (
    f"{_ORIGINAL}; or {_BY_TRANSFORMERS} with CompressedTensorsConfig(dequantize=True), save_pretrained."
)
WAYS = {
    "bitsandbytes (8 bits)": _BY_BITSANDBYTES,
    "bitsandbytes (4 bits)": _BY_BITSANDBYTES,
    "MXFP4": f"{_ORIGINAL}; or {_BY_TRANSFORMERS} with Mxfp4Config(dequantize=True), save_pretrained.",
    "compressed-tensors (pack-quantized)": _BY_COMPRESSED_TENSORS,
    "compressed-tensors (int-quantized)": _BY_COMPRESSED_TENSORS,
    "GGUF": "Give the safetensors checkpoint that it was made from, and convert the output again (llama.cpp: "
    f"convert_hf_to_gguf.py); or {_BY_TRANSFORMERS} with gguf_file, save_pretrained. lines inspect "
    "shows what is in it.",
    UNSCALED: "If no scales were lost, cast them to bfloat16 and save that: then they are what "
    "they say. Else give the checkpoint that it was made from.",
}
"""Formats -> what to do in place of giving a checkpoint that is in one."""


def way_out(known: str | None) -> str:
    """What to do in place of giving a checkpoint in such a format; None stands for one that is not known by name."""
    return WAYS.get(known or "", f"{_ORIGINAL}; a sum of quantised codes means nothing.")


def _holds_codes(name: str, tensors: Tensors, beside: Iterable[str]) -> bool:
    """Whether a tensor of integers holds codes: it is a matrix, and beside it stands a scale that fits it, by its name
    and by its shape; or one that is called after it; or a scale and a zero; or floats in groups of its rows, by
    whatever name. Of narrow codes, and of what is called a weight, one scale for all will do.

    What is called like numbers of positions, a map or a mask is none, unless a scale is called after it. `beside` are
    the tensors of its module, and those behind its own name.
    """
    info, last = tensors[name], _last(name)
    if last == "weight" and info.dtype in ("I8", "U8"):
        return True
    if len(info.shape) < 2:
        return False
    near = [other for other in beside if other != name and tensors[other].dtype in _SCALE_DTYPES]
    scales = [other for other in near if _SCALE.fullmatch(_last(other)) and not _NO_SCALE.fullmatch(_last(other))]
    called_after_it = [other for other in scales if other.startswith((f"{name}_", f"{name}."))]
    fitting = [other for other in scales if _has_rows_of(tensors[other], info)]
    numbers_rows = _NUMBERS_OF_ROWS.fullmatch(last) is not None
    if _COUNTS.fullmatch(last) and not numbers_rows:
        return not set(fitting).isdisjoint(called_after_it)
    if fitting or called_after_it or (scales and (info.dtype in _SIGNED or "weight" in last.lower())):
        return True
    if len({_ZERO.fullmatch(_last(other)) is None for other in scales}) == 2:  # a scale, and where zero lies
        return True
    floats = [other for other in near if tensors[other].dtype != "U8"]
    whole = any(tensors[other].numel >= info.numel for other in floats)  # the module's weight, as it is
    if info.dtype in _WIDE or numbers_rows or whole:
        return False
    return any(_is_by_groups(tensors[other], info) and not _NO_STEPS.fullmatch(_last(other)) for other in floats)


def _has_rows_of(scale: TensorInfo, codes: TensorInfo) -> bool:
    """Whether one is as long on some side as the other, of two or more, and smaller."""
    sides = [size for size in codes.shape if size > 1]
    return len(sides) > 1 and scale.numel < codes.numel and any(size in sides for size in scale.shape)


def _is_by_groups(steps: TensorInfo, codes: TensorInfo) -> bool:
    """Whether there is one number for each row of codes, or for each group of entries in it."""
    return _has_rows_of(steps, codes) and len(steps.shape) == len(codes.shape)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _last(name: str) -> str:
    return name.rpartition(".")[2]


# --- adapters ---

_FACTOR = re.compile(
    r"(?:\A|[._])(?:lora_(?:[ABEabe]|up|down|mid|embedding_[AB]|magnitude_vector)|lora\w{0,64}\.(?:up|down)"
    r"|hada_[wt][12](?:_[ab])?|lokr_[wt][12](?:_[ab])?|dora_scale|ia3_l|b?oft_[RSrs]|oft_(?:blocks|diag)"
    r"|vera_(?:[AB]|lambda_[bd])|randlora_\w+|vblora_\w+|fourierft_spectrum|hra_u)(?=\.|\Z)"
)
# The same in other spellings: the word itself, then the part (`lora.A`, `loraA`); or more between them.
_SPELT = re.compile(r"(?:\A|(?<=[._]))q?lora\d*[._]?(?P<part>a|b|down|up|in|out|left|right)(?![a-z])", re.IGNORECASE)
_SPELT_APART = re.compile(
    r"(?:\A|(?<=[._]))lora(?P<between>[._][\w.]{1,100}?)[._](?P<part>a|b|down|up|left|right)"
    r"(?=(?:\.default)?(?:\.weight)?\Z)",
    re.IGNORECASE,
)
_OTHER_HALF = {"b": "a", "up": "down", "out": "in", "right": "left"}
_PARAMETRIZED = re.compile(r"(?<=\.parametrizations\.weight)\.\d+\Z")  # by torch: the weight is `original` beside it
_DIFFERENCE = re.compile(r"(?:lora_[a-z]|lycoris_|diffusion_model\.).*(?=\.(?:diff(?:_b)?|[wb]_norm)\Z)", re.DOTALL)
_IN_FACTORS = ("lora", "hada_", "lokr_", "dora_", "ia3_", "oft_", "vera_", "fourierft_", "hra_", ".diff", "_norm")
_ALPHA = ".alpha"  # how kohya's files scale a module's factors


def factors_among(tensors: Tensors) -> list[str]:
    """The names of factors of low rank and the like, of which a product changes a weight."""
    return [name for named in _factors(tensors).values() for name in named]


def is_adapter(tensors: Tensors) -> bool:
    """Whether most tensors are factors, and of most factors the weight that they change is not there."""
    by_module = _factors(tensors)
    factors = {name for named in by_module.values() for name in named}
    if 2 * len(factors) <= len(tensors):
        return False
    whole = set[str]()  # what has a matrix, itself or in a module of its own
    for name, info in tensors.items():
        if name not in factors and len(info.shape) > 1:
            whole |= {name, _module(name), _module(_module(name))}
    alone = [module for module in by_module if not module or _PARAMETRIZED.sub("", module) not in whole]
    return 2 * len(alone) > len(by_module)


@lru_cache(maxsize=1)  # of one model, and mostly of all, it is asked several times
def _may_be_factors(names: str) -> bool:
    names = names.lower()
    return any(word in names for word in _IN_FACTORS)


def _factors(tensors: Tensors) -> dict[str, list[str]]:
    """The factors by the module whose weight they change."""
    found: dict[str, list[str]] = defaultdict(list)
    if _may_be_factors("\n".join(tensors)):
        unknown = []
        for name in tensors:
            if match := _FACTOR.search(name):
                found[name[: match.start()]].append(name)
            elif match := _DIFFERENCE.match(name):  # of an adapter without ranks: what is added to a weight
                found[match[0]].append(name)
            else:
                unknown.append(name)
        for module, name in _pairs(unknown, tensors):
            found[module].append(name)
        for name in unknown:
            if name.endswith(_ALPHA) and (module := name.removesuffix(_ALPHA)) in found:
                found[module].append(name)
    return found


def _pairs(names: Iterable[str], tensors: Tensors) -> Iterator[tuple[str, str]]:
    """Factors that are spelt otherwise than libraries do, each with its module: two that are called alike but for the
    word that tells them apart, and of which there is a product.
    """
    halves: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name in names:
        if match := _SPELT.search(name) or _SPELT_APART.search(name):
            part = match["part"].lower()
            module = (name[: match.start()] + match.groupdict().get("between", "")).strip("._")
            both = name[: match.start("part")] + name[match.end("part") :]
            halves[module, both, _OTHER_HALF.get(part, part)].append(name)
    for (module, *_), pair in halves.items():
        if len(pair) == 2 and _have_a_product(*(tensors[name].shape for name in pair)):
            yield from ((module, name) for name in pair)


def _have_a_product(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether two matrices have a side in common by which they can be multiplied."""
    return len(one) > 1 and len(other) > 1 and (one[0] == other[1] or one[1] == other[0])
