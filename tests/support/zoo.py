"""Tiny, randomly initialised models of many families, and what is expected of them.

`ZOO` maps a family to a function that builds one in a fraction of a second; importing this module
imports neither torch nor transformers. The cases in `scaling/depth_cases/*.yaml` say, by hand, which tensor
of each belongs to which layer.

Sizes are chosen so that mistakes show: the stacks of a model differ in length, and from the number
of its experts and attention heads.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    import torch

CASES = Path(__file__).parents[1] / "scaling" / "depth_cases"

Builder = Callable[[], "torch.nn.Module"]


# The models


def _hf(class_name: str, **config: Any) -> Builder:
    """A builder of `transformers.<class_name>` from its config class; nested configs are dicts."""

    def build() -> torch.nn.Module:
        import torch
        import transformers

        cls = getattr(transformers, class_name)
        torch.manual_seed(0)
        module: torch.nn.Module = cls(cls.config_class(**config))
        module.eval()
        return module

    return build


def _mlp() -> torch.nn.Module:
    """Linear layers with activations between them: the indices that hold tensors are 0, 2, 4, 6."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    widths = [8, 16, 16, 16, 4]
    layers: list[nn.Module] = []
    for i in range(4):
        layers += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _in_data_parallel() -> torch.nn.Module:
    """A Llama as DataParallel and DistributedDataParallel name it: under `module.`."""
    import torch

    return torch.nn.DataParallel(ZOO["llama"]())


def _compiled() -> torch.nn.Module:
    """A Llama as torch.compile names it, under `_orig_mod.`; nothing is compiled."""
    import torch

    wrapper = torch.nn.Module()
    wrapper.add_module("_orig_mod", ZOO["llama"]())
    return wrapper


# What most text models share. Special tokens lie inside the vocabulary.
_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_LM: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    **_TOKENS,
}
_GQA: dict[str, Any] = _LM | {"num_key_value_heads": 2, "head_dim": 4}
_MOE: dict[str, Any] = _GQA | {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}
_GPT: dict[str, Any] = {
    "vocab_size": 64,
    "n_embd": 16,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    **_TOKENS,
}
_T5: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
    **_TOKENS,
}
_BART: dict[str, Any] = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 32,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
    **_TOKENS,
}
_TEXT_TOWER: dict[str, Any] = _LM | {"num_hidden_layers": 3, "projection_dim": 12}
_IMAGE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_SPEECH: dict[str, Any] = _LM | {
    "conv_dim": (8, 8, 8, 8),
    "conv_kernel": (3, 3, 3, 3),
    "conv_stride": (2, 2, 2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
_LLAMA_TEXT: dict[str, Any] = {"model_type": "llama", **_GQA}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
}
_MROPE: dict[str, Any] = {"rope_type": "default", "mrope_section": [1, 1, 0], "rope_theta": 10000.0}

ZOO: dict[str, Builder] = {
    # decoders
    "llama": _hf("LlamaForCausalLM", **_GQA),
    "llama_one_layer": _hf("LlamaForCausalLM", **_GQA | {"num_hidden_layers": 1}),
    "llama_tied": _hf("LlamaForCausalLM", **_GQA, tie_word_embeddings=True),
    "llama_120_layers": _hf(
        "LlamaForCausalLM",
        **_GQA | {"hidden_size": 8, "intermediate_size": 8, "head_dim": 2, "num_hidden_layers": 120},
    ),
    "llama_classifier": _hf("LlamaForSequenceClassification", **_GQA, num_labels=3),
    "llama_in_data_parallel": _in_data_parallel,
    "llama_compiled": _compiled,
    "mistral": _hf("MistralForCausalLM", **_GQA),
    "qwen2": _hf("Qwen2ForCausalLM", **_GQA),
    "qwen3": _hf("Qwen3ForCausalLM", **_GQA),
    "gemma2": _hf("Gemma2ForCausalLM", **_GQA),
    "gemma3_text": _hf("Gemma3ForCausalLM", **_GQA),
    "phi3": _hf("Phi3ForCausalLM", **_GQA),
    "olmo2": _hf("Olmo2ForCausalLM", **_GQA),
    "granite": _hf("GraniteForCausalLM", **_GQA),
    "nemotron": _hf("NemotronForCausalLM", **_GQA),
    "gpt2": _hf("GPT2LMHeadModel", **_GPT),
    "gpt2_bare": _hf("GPT2Model", **_GPT),
    "gpt_neo": _hf(
        "GPTNeoForCausalLM",
        vocab_size=64,
        hidden_size=16,
        num_layers=3,
        num_heads=4,
        attention_types=[[["global", "local", "global"], 1]],
        max_position_embeddings=32,
        **_TOKENS,
    ),
    "gpt_neox": _hf("GPTNeoXForCausalLM", **_LM),
    "gptj": _hf("GPTJForCausalLM", **_GPT, rotary_dim=4),
    "opt": _hf(
        "OPTForCausalLM",
        vocab_size=64,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
        word_embed_proj_dim=8,
        **_TOKENS,
    ),
    "bloom": _hf("BloomForCausalLM", vocab_size=64, hidden_size=16, n_layer=3, n_head=4, **_TOKENS),
    "falcon": _hf("FalconForCausalLM", **_LM, new_decoder_architecture=True, num_kv_heads=2),
    "xlnet": _hf("XLNetLMHeadModel", vocab_size=64, d_model=16, n_layer=3, n_head=4, d_inner=24, **_TOKENS),
    # state-space, recurrent and hybrid
    "mamba": _hf("MambaForCausalLM", vocab_size=64, hidden_size=16, state_size=4, num_hidden_layers=3),
    "mamba2": _hf(
        "Mamba2ForCausalLM",
        vocab_size=64,
        hidden_size=16,
        state_size=4,
        num_hidden_layers=3,
        num_heads=4,
        head_dim=8,
        n_groups=1,
        **_TOKENS,
    ),
    "rwkv": _hf("RwkvForCausalLM", vocab_size=64, hidden_size=16, num_hidden_layers=3, context_length=16),
    "jamba": _hf(
        "JambaForCausalLM",
        **_GQA | {"num_hidden_layers": 6},
        num_experts=5,
        attn_layer_period=4,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=4,
        mamba_dt_rank=4,
        use_mamba_kernels=False,
    ),
    "nemotron_h": _hf(
        "NemotronHForCausalLM",
        **_GQA,
        layers_block_type=["mamba", "attention", "mamba", "moe", "mamba"],
        ssm_state_size=4,
        mamba_num_heads=4,
        mamba_head_dim=8,
        n_groups=1,
        n_routed_experts=4,
        moe_intermediate_size=8,
        moe_shared_expert_intermediate_size=8,
        num_experts_per_tok=2,
    ),
    "qwen3_next": _hf(
        "Qwen3NextForCausalLM",
        **_MOE | {"num_hidden_layers": 6},
        shared_expert_intermediate_size=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=4,
        linear_value_head_dim=4,
        full_attention_interval=3,
    ),
    "gemma3n_text": _hf(
        "Gemma3nForCausalLM",
        **_GQA | {"num_hidden_layers": 5, "intermediate_size": [24] * 5},
        vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=4,
        altup_num_inputs=4,
        laurel_rank=4,
        num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2 + ["full_attention"],
        activation_sparsity_pattern=[0.0] * 5,
    ),
    # mixtures of experts
    "mixtral": _hf("MixtralForCausalLM", **_GQA, num_local_experts=5),
    "qwen2_moe": _hf("Qwen2MoeForCausalLM", **_MOE, shared_expert_intermediate_size=8),
    "qwen3_moe": _hf("Qwen3MoeForCausalLM", **_MOE),
    "deepseek_v3": _hf(
        "DeepseekV3ForCausalLM",
        **_LM,
        num_key_value_heads=4,
        moe_intermediate_size=8,
        n_routed_experts=6,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        n_shared_experts=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    ),
    "gpt_oss": _hf("GptOssForCausalLM", **_GQA, num_local_experts=5, num_experts_per_tok=2),
    "switch_transformers": _hf(
        "SwitchTransformersForConditionalGeneration",
        **_T5 | {"num_layers": 6},
        num_experts=5,
        num_sparse_encoder_layers=3,
        num_sparse_decoder_layers=1,
    ),
    # encoders
    "bert": _hf("BertForMaskedLM", **_LM),
    "bert_classifier": _hf("BertForSequenceClassification", **_LM, num_labels=3),
    "distilbert": _hf(
        "DistilBertForMaskedLM",
        vocab_size=64,
        dim=16,
        hidden_dim=24,
        n_layers=3,
        n_heads=4,
        max_position_embeddings=32,
    ),
    "roberta": _hf("RobertaForSequenceClassification", **_LM, num_labels=3),
    "electra": _hf("ElectraForPreTraining", **_LM, embedding_size=8),
    "deberta_v2": _hf(
        "DebertaV2ForSequenceClassification",
        **_LM,
        relative_attention=True,
        position_buckets=8,
        norm_rel_ebd="layer_norm",
        pos_att_type=["p2c", "c2p"],
        conv_kernel_size=3,
    ),
    "modernbert": _hf("ModernBertForMaskedLM", **_LM),
    "albert": _hf("AlbertForMaskedLM", **_LM, embedding_size=8),
    "funnel": _hf(
        "FunnelForMaskedLM",
        vocab_size=64,
        block_sizes=[3, 1, 1],
        num_decoder_layers=2,
        d_model=16,
        n_head=4,
        d_head=4,
        d_inner=24,
    ),
    # encoder-decoders
    "t5": _hf("T5ForConditionalGeneration", **_T5),
    "umt5": _hf("UMT5ForConditionalGeneration", **_T5),
    "longt5": _hf("LongT5ForConditionalGeneration", **_T5, local_radius=4),
    "bart": _hf("BartForConditionalGeneration", **_BART),
    "marian": _hf("MarianMTModel", **_BART),
    "pegasus": _hf("PegasusForConditionalGeneration", **_BART),
    "whisper": _hf(
        "WhisperForConditionalGeneration",
        **{k: v for k, v in _BART.items() if k not in ("max_position_embeddings", "forced_eos_token_id")},
        num_mel_bins=8,
        max_source_positions=8,
        max_target_positions=8,
    ),
    # images
    "vit": _hf("ViTForImageClassification", **_IMAGE | {"num_hidden_layers": 3}, num_labels=3),
    "dinov2": _hf(
        "Dinov2Model",
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    ),
    "beit": _hf("BeitForImageClassification", **_IMAGE | {"num_hidden_layers": 3}, num_labels=3),
    "swin": _hf(
        "SwinForImageClassification",
        image_size=16,
        patch_size=2,
        embed_dim=8,
        depths=[2, 1, 3],
        num_heads=[2, 2, 4],
        window_size=2,
        num_labels=3,
    ),
    "convnext": _hf(
        "ConvNextForImageClassification",
        hidden_sizes=[4, 8, 8],
        depths=[2, 1, 3],
        num_stages=3,
        image_size=16,
        patch_size=2,
        num_labels=3,
    ),
    "resnet": _hf(
        "ResNetForImageClassification",
        embedding_size=4,
        hidden_sizes=[8, 8, 12],
        depths=[2, 1, 3],
        layer_type="bottleneck",
        num_labels=3,
    ),
    "segformer": _hf(
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=3,
        depths=[2, 1, 2],
        hidden_sizes=[4, 8, 8],
        sr_ratios=[2, 2, 1],
        patch_sizes=[3, 3, 3],
        strides=[2, 2, 2],
        num_attention_heads=[1, 2, 2],
        mlp_ratios=[2, 2, 2],
        decoder_hidden_size=8,
        num_labels=3,
    ),
    "cvt": _hf(
        "CvtForImageClassification",
        embed_dim=[4, 8, 8],
        num_heads=[1, 2, 2],
        depth=[1, 2, 3],
        cls_token=[False, False, True],
        num_labels=3,
    ),
    "vit_mae": _hf(
        "ViTMAEForPreTraining",
        **_IMAGE | {"num_hidden_layers": 3},
        decoder_num_attention_heads=4,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=2,
        decoder_intermediate_size=24,
    ),
    "detr": _hf(
        "DetrForObjectDetection",
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config={
            "model_type": "resnet",
            "embedding_size": 4,
            "hidden_sizes": [4, 8, 8],
            "depths": [2, 1, 2],
            "layer_type": "basic",
            "out_features": ["stage3"],
        },
        num_queries=4,
        d_model=16,
        encoder_layers=5,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        num_labels=3,
    ),
    # speech
    "wav2vec2": _hf("Wav2Vec2ForCTC", **_SPEECH),
    "hubert": _hf("HubertModel", **_SPEECH),
    "speecht5": _hf(
        "SpeechT5ForTextToSpeech",
        vocab_size=64,
        hidden_size=16,
        encoder_layers=3,
        encoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_layers=2,
        decoder_attention_heads=4,
        decoder_ffn_dim=24,
        num_mel_bins=8,
        speech_decoder_prenet_units=8,
        speaker_embedding_dim=8,
        speech_decoder_postnet_units=8,
        **_TOKENS,
    ),
    "musicgen": _hf(
        "MusicgenForCausalLM",
        vocab_size=64,
        max_position_embeddings=32,
        num_hidden_layers=3,
        ffn_dim=24,
        num_attention_heads=4,
        hidden_size=16,
        num_codebooks=4,
        bos_token_id=64,
        pad_token_id=64,
    ),
    # two towers
    "clip": _hf(
        "CLIPModel",
        text_config=_TEXT_TOWER,
        vision_config=_IMAGE | {"projection_dim": 12},
        projection_dim=12,
    ),
    "siglip": _hf("SiglipModel", text_config=_TEXT_TOWER, vision_config=_IMAGE),
    # vision-language
    "llava": _hf(
        "LlavaForConditionalGeneration",
        text_config=_LLAMA_TEXT,
        vision_config={"model_type": "clip_vision_model", **_IMAGE, "projection_dim": 12},
        image_token_index=63,
    ),
    "qwen2_vl": _hf(
        "Qwen2VLForConditionalGeneration",
        text_config=_GQA | {"rope_parameters": _MROPE},
        vision_config=_QWEN_VISION | {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 2},
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
    "qwen2_5_vl": _hf(
        "Qwen2_5_VLForConditionalGeneration",
        text_config=_GQA | {"rope_parameters": _MROPE},
        vision_config=_QWEN_VISION
        | {
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
    "qwen3_vl": _hf(
        "Qwen3VLForConditionalGeneration",
        text_config=_GQA | {"rope_parameters": _MROPE, "num_hidden_layers": 5},
        vision_config=_QWEN_VISION
        | {
            "depth": 6,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 16,
            "deepstack_visual_indexes": [0, 1, 2],
            "num_position_embeddings": 4,
        },
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    ),
    "gemma3": _hf(
        "Gemma3ForConditionalGeneration",
        text_config=_GQA,
        vision_config=_IMAGE,
        mm_tokens_per_image=4,
        image_token_index=63,
    ),
    "idefics3": _hf(
        "Idefics3ForConditionalGeneration",
        text_config=_LLAMA_TEXT,
        vision_config=_IMAGE,
        scale_factor=2,
        image_token_id=63,
        pad_token_id=0,
    ),
    "paligemma": _hf(
        "PaliGemmaForConditionalGeneration",
        text_config={"model_type": "gemma", **_GQA},
        vision_config={"model_type": "siglip_vision_model", **_IMAGE, "projection_dim": 16},
        image_token_index=63,
        projection_dim=16,
    ),
    "blip2": _hf(
        "Blip2ForConditionalGeneration",
        text_config={
            "model_type": "opt",
            "vocab_size": 64,
            "hidden_size": 16,
            "ffn_dim": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 32,
            "word_embed_proj_dim": 16,
            **_TOKENS,
        },
        vision_config=_IMAGE,
        qformer_config=_LM | {"num_hidden_layers": 2, "encoder_hidden_size": 16},
        num_query_tokens=4,
    ),
    "mllama": _hf(
        "MllamaForConditionalGeneration",
        text_config=_GQA | {"num_hidden_layers": 5, "cross_attention_layers": [1, 3]},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_global_layers": 2,
            "attention_heads": 4,
            "image_size": 8,
            "patch_size": 4,
            "max_num_tiles": 2,
            "supported_aspect_ratios": [[1, 1], [1, 2]],
            "intermediate_layers_indices": [1],
            "vision_output_dim": 32,
        },
        image_token_index=63,
    ),
    "idefics2": _hf(
        "Idefics2ForConditionalGeneration",
        text_config={"model_type": "mistral", **_GQA},
        vision_config=_IMAGE,
        perceiver_config={
            "hidden_size": 16,
            "resampler_depth": 3,
            "resampler_n_latents": 4,
            "resampler_n_heads": 4,
            "resampler_head_dim": 4,
            "num_key_value_heads": 2,
        },
        image_token_id=63,
    ),
    # neither transformers nor transformer
    "mlp": _mlp,
}


def saved_names(module: torch.nn.Module, folder: Path) -> list[str]:
    """The tensor names in a user's file: as save_pretrained writes them, where there is one."""
    save: Any = getattr(module, "save_pretrained", None)
    if save is None:
        return list(module.state_dict())
    save(folder)
    names: list[str] = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            names += [name for name in json.loads(file.read(size)) if name != "__metadata__"]
    return names


# The cases

Place = tuple[str, int]

_KEYS = {"build", "names", "config", "stacks", "outside", "refuse", "notes"}


@dataclass(frozen=True)
class Case:
    """What one model's tensor names mean; `stacks` holds each layer's prefixes, usually one.

    In YAML a string with braces stands for many (see `expand`):

        t5:
          build: t5                 # a key of ZOO, or `names:`, a list, and perhaps `config:`
          stacks:                   # or `refuse:`, what the error must match
            encoder.block: encoder.block.{0..2}.    # three layers
            decoder.block:
              - decoder.block.0.                    # a string: a layer for each it expands to
              - [decoder.block.1., decoder.down.]   # a list: one layer of several prefixes
          outside:                  # every tensor that lies in no layer
            - shared.weight
          notes: for the reader
    """

    id: str
    file: str = ""
    build: str | None = None
    names: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    stacks: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    refuse: str | None = None

    def __str__(self) -> str:
        return self.id


def expand(pattern: str) -> list[str]:
    """The strings a pattern stands for, leftmost brace slowest: `a.{0..2}.{x,y}` is six."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", brace[1])
    choices = [str(i) for i in range(int(span[1]), int(span[2]) + 1)] if span else brace[1].split(",")
    head, tail = pattern[: brace.start()], expand(pattern[brace.end() :])
    return [head + choice + rest for choice in choices for rest in tail]


def _expand_all(patterns: Iterable[str]) -> tuple[str, ...]:
    return tuple(string for pattern in patterns for string in expand(pattern))


def _layers(entry: str | list[str | list[str]]) -> tuple[tuple[str, ...], ...]:
    """A stack's layers. A string is a layer for each string it expands to; a list is one layer."""
    layers: list[tuple[str, ...]] = []
    for item in [entry] if isinstance(entry, str) else entry:
        if isinstance(item, str):
            layers += [(prefix,) for prefix in expand(item)]
        else:
            layers.append(_expand_all(item))
    return tuple(layers)


def _case(name: str, fields: Mapping[str, Any], file: str) -> Case:
    if unknown := fields.keys() - _KEYS:
        raise ValueError(f"{name}: unknown keys {sorted(unknown)}")
    if ("build" in fields) == ("names" in fields) or ("stacks" in fields) == ("refuse" in fields):
        raise ValueError(f"{name}: wants build or names, and stacks or refuse")
    return Case(
        id=name,
        file=file,
        build=fields.get("build"),
        names=_expand_all(fields.get("names", [])),
        config=fields.get("config", {}),
        stacks={stack: _layers(entry) for stack, entry in fields.get("stacks", {}).items()},
        outside=_expand_all(fields.get("outside", [])),
        refuse=fields.get("refuse"),
    )


def load_cases(folder: Path = CASES) -> list[Case]:
    """Every case of every file, in the order of file names and of each file."""
    cases: dict[str, Case] = {}
    for path in sorted(folder.glob("*.yaml")):
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        for name, fields in yaml.load(path.read_text(encoding="utf-8"), loader).items():
            if name in cases:
                raise ValueError(f"{path.name}: a case named {name} exists already")
            cases[name] = _case(name, fields, path.stem)
    return list(cases.values())


def expected_places(case: Case, names: Iterable[str]) -> dict[str, Place]:
    """Stack and index (from 0) of every name that lies in a layer; those outside have no entry.

    A name that the case does not account for, or accounts for twice, is an error in the case.
    """
    outside = set(case.outside)
    places: dict[str, Place] = {}
    for name in names:
        found = [
            (stack, index)
            for stack, layers in case.stacks.items()
            for index, prefixes in enumerate(layers)
            if name.startswith(prefixes)
        ]
        if len(found) + (name in outside) != 1:
            where = found + ["outside"] * (name in outside)
            raise ValueError(f"{case.id}: {name} should be in one place, is in {where or 'none'}")
        if found:
            places[name] = found[0]
    return places


def misplaced(expected: Mapping[str, Place | None], found: Mapping[str, Place]) -> list[str]:
    """The names that a map puts elsewhere than expected, stacks told by what they hold, not by their names."""
    pairs = Counter((place[0], found[name][0]) for name, place in expected.items() if place and name in found)
    label: dict[str, str] = {}
    for (ours, theirs), _ in pairs.most_common():
        if ours not in label and theirs not in label.values():
            label[ours] = theirs
    wanted = {name: (label.get(place[0]), place[1]) if place else None for name, place in expected.items()}
    return [name for name, place in wanted.items() if found.get(name) != place]


def check_case(case: Case, names: Iterable[str]) -> dict[str, Place]:
    """`expected_places`, and that the case says nothing of tensors or layers that are not there."""
    names = list(names)
    places = expected_places(case, names)
    if absent := set(case.outside) - set(names):
        raise ValueError(f"{case.id}: no such tensors outside: {sorted(absent)}")
    for stack, layers in case.stacks.items():
        for index, prefixes in enumerate(layers):
            for prefix in prefixes:
                if not any(name.startswith(prefix) for name in names):
                    raise ValueError(f"{case.id}: {stack} layer {index} has nothing at {prefix}")
    return places


def main(paths: list[str]) -> int:
    """Print which names of maps in JSON (`expected`: name -> [stack, index] or null; `config`) come out elsewhere."""
    from lines_cli.errors import LinesError
    from lines_cli.scaling.find_depth import find_depth

    faults = 0
    for path in paths:
        case = json.loads(Path(path).read_text(encoding="utf-8"))
        expected = {name: tuple(place) if place else None for name, place in case["expected"].items()}
        try:
            depth = find_depth(expected, config=case["config"])
        except LinesError as error:
            print(f"FAULT {path}: {error.message}")
            faults += 1
            continue
        wrong = misplaced(expected, {name: (place.stack, place.index) for name, place in depth.places.items()})
        print(f"{'FAULT' if wrong else 'ok'} {path}: {len(wrong)} of {len(expected)} names", *wrong[:20], sep="\n  ")
        faults += bool(wrong)
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
