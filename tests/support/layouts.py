"""Models in two layouts each: as a checkpoint has them (`apart`) and as a library's modules do (`together`), the one
made of the other by plain torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]

LAYERS, EXPERTS, INNER, HIDDEN = 3, 5, 6, 4


@dataclass(frozen=True)
class Layouts:
    """A model.

    Attributes:
        apart: draws it, by a seed.
        together: the same in the other layout.
        config: what its config.json says.
        needs_config: whether names alone do not say what belongs together.
    """

    apart: Callable[[int], Tensors]
    together: Callable[[Tensors], Tensors]
    config: dict[str, Any] = field(default_factory=dict)
    needs_config: bool = False


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


def _of_experts(place: str, gate: str | None, up: str, down: str) -> Callable[[int], Tensors]:
    """A model with experts one by one; `place` is where they are, `{}` the layer."""

    def draw(seed: int) -> Tensors:
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9, HIDDEN), "model.norm.weight": (HIDDEN,)}
        for i in range(LAYERS):
            shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (HIDDEN, HIDDEN)
            shapes[f"{place.format(i)}.gate.weight"] = (EXPERTS, HIDDEN)
            for e in range(EXPERTS):
                before = f"{place.format(i)}.experts.{e}"
                shapes |= {f"{before}.{name}.weight": (INNER, HIDDEN) for name in (gate, up) if name}
                shapes[f"{before}.{down}.weight"] = (HIDDEN, INNER)
        return drawn(shapes, seed)

    return draw


def fused(tensors: Tensors, gate: str | None, up: str, down: str, *, rename: Callable[[str], str] = str) -> Tensors:
    """Experts put together: [E, 2I, H] (without gates [E, I, H]) and [E, H, I]."""
    made = {rename(name): tensor for name, tensor in tensors.items() if ".experts." not in name}
    for place in dict.fromkeys(name.partition(".experts.")[0] for name in tensors if ".experts." in name):
        numbers = sorted({int(m[1]) for name in tensors if (m := re.match(rf"{place}\.experts\.(\d+)\.", name))})

        def of(number: int, what: str, place: str = place) -> torch.Tensor:
            return tensors[f"{place}.experts.{number}.{what}.weight"]

        both = [torch.cat([of(e, gate), of(e, up)]) if gate else of(e, up) for e in numbers]
        made[rename(f"{place}.experts.{'gate_up_proj' if gate else 'up_proj'}")] = torch.stack(both)
        made[rename(f"{place}.experts.down_proj")] = torch.stack([of(e, down) for e in numbers])
    return made


def _phi3(seed: int) -> Tensors:
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (9, 8)}
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        shapes |= {f"{attention}q_proj.weight": (8, 8), f"{attention}k_proj.weight": (2, 8)}
        shapes |= {f"{attention}v_proj.weight": (2, 8), f"{attention}o_proj.weight": (8, 8)}
        shapes |= {
            f"{mlp}gate_proj.weight": (12, 8),
            f"{mlp}up_proj.weight": (12, 8),
            f"{mlp}down_proj.weight": (8, 12),
        }
    return drawn(shapes, seed)


def _joined(tensors: Tensors, parts: dict[str, tuple[str, ...]]) -> Tensors:
    """Tensors put together along their rows; `parts` has the names of the new ones, and of what they are made of."""
    gone = {name for of in parts.values() for name in of}
    made = {name: tensor for name, tensor in tensors.items() if name not in gone}
    return made | {name: torch.cat([tensors[one] for one in of]) for name, of in parts.items()}


def _phi3_together(tensors: Tensors) -> Tensors:
    parts: dict[str, tuple[str, ...]] = {}
    for i in range(LAYERS):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        parts[f"{attention}qkv_proj.weight"] = tuple(f"{attention}{one}_proj.weight" for one in "qkv")
        parts[f"{mlp}gate_up_proj.weight"] = (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight")
    return _joined(tensors, parts)


def _gate_up(seed: int) -> Tensors:
    return {name: tensor for name, tensor in _phi3(seed).items() if "_proj" not in name or ".mlp." in name}


def _gate_up_together(tensors: Tensors) -> Tensors:
    mlps = [f"model.layers.{i}.mlp." for i in range(LAYERS)]
    parts = {f"{mlp}gate_up_proj.weight": (f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight") for mlp in mlps}
    return _joined(tensors, parts)


def _dinov2(seed: int) -> Tensors:
    """transformers' names come first here: what is `apart` is the newer layout."""
    shapes: dict[str, tuple[int, ...]] = {"embeddings.cls_token": (1, 1, 8)}
    for i in range(LAYERS):
        block = f"encoder.layer.{i}."
        for one in "qkv":
            shapes |= {f"{block}attention.{one}_proj.weight": (8, 8), f"{block}attention.{one}_proj.bias": (8,)}
        shapes |= {f"{block}attention.o_proj.weight": (8, 8), f"{block}mlp.down_proj.weight": (8, 12)}
        for one in ("gate", "up"):
            shapes |= {f"{block}mlp.{one}_proj.weight": (12, 8), f"{block}mlp.{one}_proj.bias": (12,)}
    return drawn(shapes, seed)


def _dinov2_together(tensors: Tensors) -> Tensors:
    parts = {
        f"encoder.layer.{i}.mlp.weights_in.{kind}": tuple(
            f"encoder.layer.{i}.mlp.{one}_proj.{kind}" for one in ("gate", "up")
        )
        for i in range(LAYERS)
        for kind in ("weight", "bias")
    }

    def older(name: str) -> str:
        name = re.sub(r"attention\.([qkv])_proj", lambda m: f"attention.attention.{_WHOLE[m[1]]}", name)
        return name.replace("attention.o_proj", "attention.output.dense").replace("mlp.down_proj", "mlp.weights_out")

    return {older(name): tensor for name, tensor in _joined(tensors, parts).items()}


_WHOLE = {"q": "query", "k": "key", "v": "value"}


def _lists(seed: int) -> Tensors:
    """Gates and ups that are stacked by themselves: they are joined expert by expert."""
    shapes: dict[str, tuple[int, ...]] = {"model.language_model.norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        moe = f"model.layers.{i}.moe."
        shapes |= {f"{moe}{one}_proj.weight": (EXPERTS, INNER, HIDDEN) for one in ("gate", "up")}
        shapes |= {f"{moe}down_proj.weight": (EXPERTS, HIDDEN, INNER), f"{moe}gate.weight": (EXPERTS, HIDDEN)}
    return drawn(shapes, seed)


def _lists_together(tensors: Tensors) -> Tensors:
    made = {"model.language_model.norm.weight": tensors["model.language_model.norm.weight"]}
    for i in range(LAYERS):
        moe, mlp = f"model.layers.{i}.moe.", f"model.language_model.layers.{i}.mlp."
        both = [tensors[f"{moe}{one}_proj.weight"] for one in ("gate", "up")]
        made[f"{mlp}experts.gate_up_proj"] = torch.cat(both, dim=1)
        made[f"{mlp}experts.down_proj"] = tensors[f"{moe}down_proj.weight"]
        made[f"{mlp}gate.weight"] = tensors[f"{moe}gate.weight"]
    return made


def turned(tensors: Tensors) -> Tensors:
    """The fused experts the other way round."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in tensors.items()
    }


def _qwen_fused(seed: int) -> Tensors:
    return fused(_qwen(seed), *_QWEN)


_QWEN = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL = ("w1", "w3", "w2")
_qwen = _of_experts("model.layers.{}.mlp", *_QWEN)


LAYOUTS = {
    "qwen3_moe": Layouts(_qwen, lambda t: fused(t, *_QWEN), {"model_type": "qwen3_moe"}),
    "mixtral": Layouts(
        _of_experts("model.layers.{}.block_sparse_moe", *_MIXTRAL),
        lambda t: fused(t, *_MIXTRAL, rename=lambda name: name.replace("block_sparse_moe", "mlp")),
        {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]},
    ),
    "phimoe": Layouts(
        _of_experts("model.layers.{}.block_sparse_moe", *_MIXTRAL),
        lambda t: fused(
            t,
            *_MIXTRAL,
            rename=lambda name: name.replace("block_sparse_moe", "mlp").replace(".gate.weight", ".router.weight"),
        ),
        {"model_type": "phimoe"},
    ),
    "nemotron_h": Layouts(
        _of_experts("backbone.layers.{}.mixer", None, "up_proj", "down_proj"),
        lambda t: fused(t, None, "up_proj", "down_proj", rename=lambda name: name.replace("backbone.", "model.")),
        {"model_type": "nemotron_h"},
    ),
    "jamba": Layouts(
        _of_experts("model.layers.{}.feed_forward", *_QWEN), lambda t: fused(t, *_QWEN), {"model_type": "jamba"}
    ),
    "gate_up": Layouts(_gate_up, _gate_up_together),
    "phi3": Layouts(_phi3, _phi3_together, {"model_type": "phi3"}, needs_config=True),
    "step3p7": Layouts(_lists, _lists_together, {"model_type": "step3p7"}, needs_config=True),
    "dinov2": Layouts(_dinov2, _dinov2_together, {"model_type": "dinov2"}, needs_config=True),
    "qwen3_vl_moe": Layouts(_qwen_fused, turned, {"model_type": "qwen3_vl_moe"}, needs_config=True),
}
"""By the name that transformers' table has for the rules, where it has one."""
