"""Adapters as `peft` makes them, held against what `peft` itself folds them into, in float32."""

from __future__ import annotations

import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lines_cli as lines

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


class Block(nn.Module):
    """One of every kind of module that LoRA changes."""

    def __init__(self, conv1d: type[nn.Module]) -> None:
        super().__init__()
        self.wide, self.long = nn.Linear(16, 48), nn.Linear(48, 16, bias=False)
        self.square = nn.ModuleDict({"wide": nn.Linear(16, 16)})  # called as one that shows how it is stored
        self.turned, self.turned_square = conv1d(40, 16), nn.ModuleDict({"turned": conv1d(16, 16)})
        self.one, self.two = nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, (3, 2))
        self.three, self.point = nn.Conv3d(4, 6, (2, 1, 3)), nn.Conv2d(6, 8, 1)
        self.attention = nn.MultiheadAttention(16, 2)
        self.norm = nn.LayerNorm(16)


class Experts(nn.Module):
    """Fused experts, as newer transformers have them."""

    def __init__(self, *, square: bool = False) -> None:
        super().__init__()
        size = 8 if square else 6
        self.gate_up_proj = nn.Parameter(torch.randn(4, 2 * size, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, size))


class Model(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.embed_tokens = nn.Embedding(30, 16)
        self.layers = nn.ModuleList(Block(Conv1D) for _ in range(2))
        self.experts = nn.ModuleList([Experts(), Experts(square=True)])
        self.lm_head = nn.Linear(16, 30)

    def forward(self, *_: Any) -> None:
        raise NotImplementedError


LINEAR = ["wide", "long"]
CONVS = ["one", "two", "three", "point"]
LORA: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "all-linear": {"target_modules": "all-linear"},
    "rank 1": {"target_modules": LINEAR, "r": 1, "lora_alpha": 3},
    "rank above the sides": {"target_modules": LINEAR, "r": 64},
    "rslora": {"target_modules": LINEAR, "use_rslora": True},
    "patterns": {
        "target_modules": LINEAR,
        "rank_pattern": {r"^layers\.\d+\.l[aeiou]ng": 7, "layers.1.square.wide": 5, "wide": 2},
        "alpha_pattern": {".*square.wide": 16, "layers.0.wide": 3, "wide": 5},
    },
    "patterns and rslora": {"target_modules": LINEAR, "rank_pattern": {"wide": 2}, "use_rslora": True},
    "some layers": {"target_modules": LINEAR, "layers_to_transform": [1], "layers_pattern": "layers"},
    "left out": {"target_modules": "all-linear", "exclude_modules": ["layers.1.wide", "lm_head"]},
    "left out by an expression": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.(wide|square)\b.*"},
    "an expression": {"target_modules": r"(?:.*?layers\.[\d]{1,}\.(?:square\.)?(?:wide|long))|lm_head"},
    "some layers of any list": {"target_modules": [*LINEAR, "lm_head"], "layers_to_transform": 0},
    "lora_bias": {"target_modules": ["wide", "point"], "lora_bias": True},
    "bias all": {"target_modules": LINEAR, "bias": "all"},
    "bias lora_only": {"target_modules": LINEAR, "bias": "lora_only"},
    "Conv1D": {"target_modules": ["turned"]},
    "Conv1D, said": {"target_modules": ["turned_square.turned"], "fan_in_fan_out": True},
    "Conv1D and Linear": {"target_modules": ["turned", "wide", "lm_head"]},
    "embeddings": {"target_modules": ["embed_tokens", "wide"]},
    "convolutions": {"target_modules": CONVS},
    "attention": {"target_modules": ["attention"]},
    "modules_to_save": {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]},
    "tokens": {"target_modules": LINEAR, "trainable_token_indices": {"embed_tokens": [3, 0, 29]}},
    "head": {"target_modules": ["lm_head"]},
    "experts": {"target_modules": [], "target_parameters": ["experts.0.gate_up_proj", "experts.0.down_proj"]},
    "tokens and rslora": {"target_modules": LINEAR, "trainable_token_indices": [1, 2], "use_rslora": True},
    "experts, square": {"target_modules": [], "target_parameters": ["1.gate_up_proj", "1.down_proj"]},
    "one of the experts": {"target_modules": ["wide"], "target_parameters": ["experts.0.down_proj"]},
    "experts and patterns": {
        "target_modules": [],
        "target_parameters": ["0.gate_up_proj", "0.down_proj"],
        "rank_pattern": {"gate_up_proj": 2},
        "alpha_pattern": {"experts.0.down_proj": 1},
    },
    "a weight by its name": {"target_modules": [], "target_parameters": ["layers.0.wide.weight", "square.wide.weight"]},
    "DoRA": {"target_modules": [*LINEAR, "lm_head"], "use_dora": True},
    "DoRA, Conv1D": {"target_modules": ["turned"], "use_dora": True},
    "DoRA, embeddings": {"target_modules": ["embed_tokens"], "use_dora": True},
    "DoRA, convolutions": {"target_modules": CONVS, "use_dora": True},
    "DoRA, rslora": {"target_modules": LINEAR, "use_dora": True, "use_rslora": True, "rank_pattern": {"wide": 3}},
    "orthogonal": {"target_modules": LINEAR, "init_lora_weights": "orthogonal"},
    "mica": {"target_modules": LINEAR, "init_lora_weights": "mica"},
}  # fmt: skip
LYCORIS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": LINEAR},
    "convolutions": {"target_modules": ["one", "two", "point"]},
    "effective": {"target_modules": ["one", "two", "point"], "use_effective_conv2d": True},
    "patterns": {"target_modules": LINEAR, "rank_pattern": {"wide": 2}, "alpha_pattern": {"square.wide": 3}},
    "rank 1": {"target_modules": [*LINEAR, "two"], "r": 1},
}
LOKR: dict[str, dict[str, Any]] = {
    "both": {"target_modules": [*LINEAR, "two"], "decompose_both": True, "r": 1},
    "factor": {"target_modules": [*LINEAR, "one", "two"], "decompose_factor": 4, "r": 1},
    "effective, factor": {"target_modules": ["two"], "use_effective_conv2d": True, "decompose_factor": 2, "r": 1},
}  # fmt: skip
CASES = [
    *(("LoraConfig", {"r": 4, "lora_alpha": 8} | case) for case in LORA.values()),
    *(("LoHaConfig", {"r": 4, "alpha": 8} | case) for case in LYCORIS.values()),
    *(("LoKrConfig", {"r": 4, "alpha": 8} | case) for case in (LYCORIS | LOKR).values()),
]
NAMES = [*(f"LoRA, {name}" for name in LORA), *(f"LoHa, {name}" for name in LYCORIS)]
NAMES += [f"LoKr, {name}" for name in LYCORIS | LOKR]


Tensors = dict[str, torch.Tensor]


def moved(model: nn.Module, by: float, *, only: bool = False) -> None:
    """Parameters somewhere else; of an adapted model only those that are trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad or not only:
                parameter.add_(by * torch.randn_like(parameter))


def trained(kind: str, said: dict[str, Any], folder: Path) -> tuple[Tensors, Tensors]:
    """A base and an adapter that were trained for a while, so to speak, written; and what peft makes of both, in
    float32 and in float64.
    """
    torch.manual_seed(0)
    model = Model()
    moved(model, 0.3)
    (folder / "base").mkdir()
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "base/model.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, getattr(peft, kind)(**said))
        moved(adapted, 0.2, only=True)
        adapted.save_pretrained(folder / "adapter")
        folded = deepcopy(adapted).merge_and_unload(), adapted.double().merge_and_unload()
    narrow, wide = ({name: tensor.detach() for name, tensor in one.state_dict().items()} for one in folded)
    return narrow, wide


@pytest.mark.parametrize(("kind", "said"), CASES, ids=NAMES)
def test_as_peft_folds_it(kind: str, said: dict[str, Any], tmp_path: Path) -> None:
    """Every entry is within 1.5 units in the last place, of the larger of weight and update, of what peft makes in
    float64, for the update is rounded, and the sum. It is within 2 of what peft makes in float32, or as near as that
    is itself to the other. What is not adapted stays as it is, and something is adapted.
    """
    narrow, wide = trained(kind, said, tmp_path)
    lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=1, beta=0)
    assert_as_near(tmp_path, narrow, wide)


def assert_as_near(folder: Path, narrow: Tensors, wide: Tensors) -> None:
    base, found = (load_file(folder / side / "model.safetensors") for side in ("base", "out"))
    assert found.keys() == base.keys() == wide.keys()
    changed = {name for name in base if not torch.equal(base[name], found[name])}
    assert changed == {name for name in base if not torch.equal(base[name].double(), wide[name])}
    assert changed
    for name, tensor in found.items():
        larger = torch.maximum(base[name].abs(), (tensor - base[name]).abs())
        unit = (torch.nextafter(larger, torch.tensor(torch.inf)) - larger).double()
        apart = (tensor.double() - wide[name]).abs() / unit
        assert apart.max() <= 1.5, f"{name}: {apart.max()} units"
        own = (narrow[name].double() - wide[name]).abs() / unit
        apart = (tensor.double() - narrow[name].double()).abs() / unit
        assert bool((apart <= (own + 1.5).clamp(min=2)).all()), f"{name}: {apart.max()} units"


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 24}
MIXTURES: dict[str, dict[str, Any]] = {
    "Mixtral": {"num_local_experts": 3},
    "Qwen3Moe": {"num_experts": 3, "moe_intermediate_size": 12, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 3, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
    "DeepseekV3": {"n_routed_experts": 4, "moe_intermediate_size": 12, "first_k_dense_replace": 1, "n_group": 1}
    | {"topk_group": 1, "num_experts_per_tok": 2, "kv_lora_rank": 4, "q_lora_rank": 4}
    | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "num_key_value_heads": 2},
    "GptOss": {"num_local_experts": 3, "num_experts_per_tok": 2},
    "Olmoe": {"num_experts": 3},
}


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_of_transformers(family: str, tmp_path: Path) -> None:
    """Models of transformers whose experts are one tensor in memory, and mostly many on disk: the adapter has them as
    in memory, and the folded model is the one that `save_pretrained` writes after peft has merged.
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SMALL | MIXTURES[family])
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    moved(model, 0.3)
    model.save_pretrained(tmp_path / "base")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    said = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["o_proj"], target_parameters=parameters)
    adapted = peft.get_peft_model(model, said)
    moved(adapted, 0.2, only=True)
    adapted.save_pretrained(tmp_path / "adapter")
    found = []
    for name, one in (("narrow", deepcopy(adapted)), ("wide", adapted.double())):
        one.merge_and_unload().save_pretrained(tmp_path / name)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=1, beta=0)
    assert_as_near(tmp_path, *found)
