"""Weights in FP8, as libraries store them, and the numbers that they stand for, worked out in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LAYERS = 3
SHAPES = {"q_proj": (300, 200), "o_proj": (128, 256), "up_proj": (1, 500), "down_proj": (130, 7)}


@dataclass
class Stored:
    """A model with quantised weights.

    Attributes:
        tensors: as they are stored.
        config: what config.json says.
        whole: every tensor of the model, in float64: `code * scale`.
        beside: what the format has that is no part of the model.
    """

    tensors: Tensors
    config: dict[str, Any]
    whole: Tensors
    beside: list[str] = field(default_factory=list)


def expanded(scale: torch.Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> torch.Tensor:
    """Scales [..., R, C], one for each entry of the shape."""
    wide = scale.double().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


def quantise(
    weight: torch.Tensor, block: tuple[int, int], *, dtype: torch.dtype = E4M3, scales: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [..., rows, columns] and scales [..., R, C]: the largest magnitude of a block is the largest code."""
    rows, columns = weight.shape[-2:]
    down, across = -(-rows // block[0]), -(-columns // block[1])
    padded = torch.zeros(*weight.shape[:-2], down * block[0], across * block[1])
    padded[..., :rows, :columns] = weight
    largest = padded.unflatten(-1, (across, block[1])).unflatten(-3, (down, block[0])).abs().amax((-3, -1))
    scale = (largest / torch.finfo(dtype).max).to(scales)
    scale = torch.where(scale.float() == 0, torch.ones_like(scale), scale)
    divided = (weight / expanded(scale, tuple(weight.shape), block).float()).clamp(
        -torch.finfo(dtype).max, torch.finfo(dtype).max
    )
    return divided.to(dtype), scale


def plain(seed: int = 0, *, spread: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """A small decoder without quantised weights."""
    random = torch.Generator().manual_seed(seed)
    model = {
        f"model.layers.{layer}.{name}.weight": (spread * torch.randn(shape, generator=random)).to(dtype)
        for layer in range(LAYERS)
        for name, shape in SHAPES.items()
    }
    model |= {f"model.layers.{layer}.input_layernorm.weight": torch.ones(8, dtype=dtype) for layer in range(LAYERS)}
    model["model.embed_tokens.weight"] = torch.randn(20, 8, generator=random).to(dtype)
    return model


def near(model: Tensors, seed: int, *, spread: float = 0.004) -> Tensors:
    """The same, fine-tuned."""
    random = torch.Generator().manual_seed(seed)
    return {name: (w + spread * torch.randn(w.shape, generator=random)).to(w.dtype) for name, w in model.items()}


CONFIG = {"model_type": "llama", "num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}


def _stored(
    model: Tensors,
    of: Callable[[str, torch.Tensor], tuple[torch.Tensor, Tensors, torch.Tensor]],
    said: dict[str, Any] | None,
    beside: Tensors,
) -> Stored:
    tensors, whole = dict(beside), dict[str, torch.Tensor]()
    for name, weight in model.items():
        if "proj" not in name:
            tensors[name], whole[name] = weight, weight.double()
            continue
        codes, scales, numbers = of(name, weight.float())
        tensors |= {name: codes} | scales
        whole[name] = numbers
    return Stored(tensors, CONFIG | ({} if said is None else {"quantization_config": said}), whole, sorted(beside))


def of_blocks(
    model: Tensors,
    *,
    block: tuple[int, int] = (128, 128),
    suffix: str = "_scale_inv",
    said: dict[str, Any] | None = None,
    scales: torch.dtype = torch.float32,
    dtype: torch.dtype = E4M3,
    beside: Tensors | None = None,
    shaped: Callable[[torch.Tensor], torch.Tensor] = lambda scale: scale,
) -> Stored:
    """In blocks of a size, of all rows and columns where that is beyond them."""

    def of(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        size = min(block[0], weight.shape[0]), min(block[1], weight.shape[1])
        codes, scale = quantise(weight, size, dtype=dtype, scales=scales)
        numbers = codes.double() * expanded(scale, tuple(codes.shape), size)
        return codes, {name.removesuffix(".weight") + f".weight{suffix}": shaped(scale).contiguous()}, numbers

    return _stored(model, of, said, beside or {})


def exponents(model: Tensors, *, as_bytes: bool) -> Stored:
    """In groups of 32 with exponents for scales, as bytes; or in blocks, as E8M0."""
    block = (1, 32) if as_bytes else (128, 128)

    def of(name: str, weight: torch.Tensor) -> tuple[torch.Tensor, Tensors, torch.Tensor]:
        _, scale = quantise(weight, block)
        power = scale.log2().ceil()
        wide = expanded(power.exp2(), tuple(weight.shape), block)
        codes = (weight / wide.float()).clamp(-448, 448).to(E4M3)
        stored = (power + 127).to(torch.uint8)
        key = f"{name}_scale" if as_bytes else f"{name}_scale_inv"
        return codes, {key: stored if as_bytes else stored.view(torch.float8_e8m0fnu)}, codes.double() * wide

    weights = {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    said = {"quant_method": "compressed-tensors", "format": "mxfp8-quantized", "config_groups": groups}
    blocks = {"quant_method": "fp8", "weight_block_size": [128, 128], "scale_fmt": "ue8m0"}
    return _stored(model, of, said if as_bytes else blocks, {})


def scaled(text: str, value: float = 0.5) -> Tensors:
    """A scale of activations in every layer."""
    return {f"model.layers.{layer}.{text}": torch.tensor(value) for layer in range(LAYERS)}


def said_by_compressed_tensors(strategy: str, **more: Any) -> dict[str, Any]:
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True, "dynamic": False} | more
    groups = {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


ALL = 10**6
FORMATS: dict[str, Callable[[Tensors], Stored]] = {
    "blocks": lambda model: of_blocks(model, said={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "small blocks": lambda model: of_blocks(
        model, block=(64, 32), said={"quant_method": "fp8", "weight_block_size": [64, 32]}
    ),
    "blocks without a config": of_blocks,
    "blocks of compressed-tensors": lambda model: of_blocks(
        model,
        suffix="_scale",
        scales=torch.bfloat16,
        said=said_by_compressed_tensors("block", block_structure=[128, 128]),
    ),
    "tensors": lambda model: of_blocks(
        model,
        block=(ALL, ALL),
        suffix="_scale",
        shaped=lambda scale: scale.reshape(()),
        said={"quant_method": "fp8", "activation_scheme": "static"},
        beside=scaled("q_proj.input_scale") | scaled("k_proj.k_scale"),
    ),
    "tensors of transformers": lambda model: of_blocks(
        model,
        block=(ALL, ALL),
        shaped=lambda scale: scale.reshape(()),
        said={"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        beside=scaled("q_proj.activation_scale"),
    ),
    "tensors of modelopt": lambda model: of_blocks(
        model,
        block=(ALL, ALL),
        suffix="_scale",
        shaped=lambda scale: scale.reshape(()),
        said={"quant_method": "modelopt", "quant_algo": "FP8"},
        beside=scaled("o_proj.input_scale"),
    ),
    "tensors of E5M2": lambda model: of_blocks(
        model, block=(ALL, ALL), suffix="_scale", dtype=E5M2, scales=torch.float16, shaped=lambda scale: scale[0]
    ),
    "rows": lambda model: of_blocks(
        model,
        block=(1, ALL),
        suffix="_scale",
        scales=torch.bfloat16,
        said=said_by_compressed_tensors("channel"),
    ),
    "rows in one dimension": lambda model: of_blocks(
        model, block=(1, ALL), suffix="_scale", shaped=lambda scale: scale[:, 0]
    ),
    "columns": lambda model: of_blocks(model, block=(ALL, 1), suffix="_scale"),
    "exponents": lambda model: exponents(model, as_bytes=False),
    "exponents as bytes": lambda model: exponents(model, as_bytes=True),
}
"""Formats as libraries write them -> a model in each."""
