"""The kind of a parameter is read off its name: real names of many families, by hand, and every case of depth."""

from __future__ import annotations

import re
import time
from typing import get_args

import pytest

from lines_cli.inspection.kinds import KINDS, Kind, kind_of
from support import zoo
from support.depth_cases import PLACED, names_and_config

Table = dict[Kind, str]


def read(table: Table, *, inside: bool) -> list[tuple[str, bool, Kind]]:
    """Name, whether inside, kind: for every name that a table's words expand to."""
    return [
        (name, inside, kind) for kind, words in table.items() for word in words.split() for name in zoo.expand(word)
    ]


# Of each family: what lies inside a block, and what outside.
FAMILIES: dict[str, tuple[Table, Table]] = {
    "llama": (
        {
            "attention": "model.layers.0.self_attn.{q,k,v,o}_proj.weight model.layers.0.self_attn.rotary_emb.inv_freq",
            "mlp": "model.layers.0.mlp.{gate,up,down}_proj.weight",
            "norm": "model.layers.0.{input,post_attention}_layernorm.weight",
        },
        {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight score.weight"},
    ),
    "llama as Meta names it": (
        {
            "attention": "layers.0.attention.{wq,wk,wv,wo}.weight",
            "mlp": "layers.0.feed_forward.{w1,w2,w3}.weight",
            "norm": "layers.0.{attention,ffn}_norm.weight",
        },
        {"embedding": "tok_embeddings.weight", "norm": "norm.weight", "head": "output.weight"},
    ),
    "qwen3": ({"norm": "model.layers.0.self_attn.{q,k}_norm.weight"}, {}),
    "qwen2 with biases, quantised": (
        {
            "attention": "model.layers.0.self_attn.q_proj.{bias,qweight,qzeros,scales,weight_scale_inv}",
            "mlp": "model.layers.0.mlp.down_proj.{qweight,g_idx}",
        },
        {},
    ),
    "a LoRA adapter": (
        {
            "attention": "base_model.model.model.layers.0.self_attn.q_proj.lora_{A,B}.weight",
            "mlp": "base_model.model.model.layers.0.mlp.up_proj.lora_{A,B}.weight",
        },
        {"embedding": "base_model.model.model.embed_tokens.lora_embedding_A"},
    ),
    "gemma2": ({"norm": "model.layers.0.{pre,post}_feedforward_layernorm.weight"}, {}),
    "gemma3n": (
        {
            "norm": "model.layers.0.{altup.router_norm,laurel.post_laurel_norm,post_per_layer_input_norm}.weight",
            "other": "model.layers.0.altup.{correction_coefs,prediction_coefs,modality_router}.weight"
            " model.layers.0.{laurel.linear_left,per_layer_input_gate,per_layer_projection}.weight",
        },
        {"embedding": "model.embed_tokens_per_layer.weight", "other": "model.altup_projections.0.weight"},
    ),
    "gpt2": (
        {
            "attention": "h.0.attn.{c_attn,c_proj}.{weight,bias} h.0.attn.{bias,masked_bias}",
            "mlp": "h.0.mlp.{c_fc,c_proj}.{weight,bias}",
            "norm": "h.0.ln_{1,2}.{weight,bias}",
        },
        {"embedding": "{wte,wpe}.weight", "norm": "ln_f.{weight,bias}"},
    ),
    "gpt_neo, gptj": (
        {
            "attention": "transformer.h.0.attn.attention.{k,out}_proj.weight transformer.h.0.attn.out_proj.weight",
            "mlp": "transformer.h.0.mlp.fc_{in,out}.bias",
        },
        {"head": "lm_head.bias"},
    ),
    "gpt_neox": (
        {
            "attention": "gpt_neox.layers.0.attention.{query_key_value,dense}.weight"
            " gpt_neox.layers.0.attention.{bias,masked_bias,rotary_emb.inv_freq}",
            "mlp": "gpt_neox.layers.0.mlp.dense_{h_to_4h,4h_to_h}.weight",
        },
        {"embedding": "gpt_neox.embed_in.weight", "norm": "gpt_neox.final_layer_norm.bias", "head": "embed_out.weight"},
    ),
    "falcon": (
        {
            "attention": "transformer.h.0.self_attention.{query_key_value,dense}.weight",
            "norm": "transformer.h.0.ln_{attn,mlp}.weight",
        },
        {"embedding": "transformer.word_embeddings.weight"},
    ),
    "bloom": ({}, {"norm": "word_embeddings_layernorm.weight", "embedding": "word_embeddings.weight"}),
    "mpt": (
        {
            "attention": "transformer.blocks.0.attn.{Wqkv,out_proj}.weight",
            "mlp": "transformer.blocks.0.ffn.{up,down}_proj.weight",
            "norm": "transformer.blocks.0.norm_{1,2}.weight",
        },
        {"norm": "transformer.norm_f.weight"},
    ),
    "dbrx": (
        {
            "attention": "transformer.blocks.0.norm_attn_norm.attn.{Wqkv,out_proj}.weight",
            "mlp": "transformer.blocks.0.ffn.{experts.mlp.w1,router.layer.weight}",
            "norm": "transformer.blocks.0.norm_attn_norm.norm_{1,2}.weight",
        },
        {},
    ),
    "chatglm": (
        {"attention": "transformer.encoder.layers.0.self_attention.query_key_value.bias"},
        {
            "embedding": "transformer.embedding.word_embeddings.weight transformer.rotary_pos_emb.inv_freq",
            "head": "transformer.output_layer.weight",
        },
    ),
    "opt": (
        {
            "attention": "model.decoder.layers.0.self_attn.out_proj.bias",
            "mlp": "model.decoder.layers.0.fc{1,2}.{weight,bias}",
            "norm": "model.decoder.layers.0.{self_attn_layer_norm,final_layer_norm}.weight",
        },
        {"embedding": "model.decoder.{embed_positions,project_in}.weight", "head": "model.decoder.project_out.weight"},
    ),
    "phi": (
        {
            "attention": "transformer.h.0.mixer.Wqkv.weight model.layers.0.self_attn.dense.weight",
            "mlp": "model.layers.0.mlp.fc1.weight transformer.h.0.mlp.fc2.bias",
            "other": "transformer.h.0.mixer.out_proj.weight",  # Mamba's has the same name
        },
        {"embedding": "transformer.embd.wte.weight", "norm": "lm_head.ln.weight", "head": "lm_head.linear.weight"},
    ),
    "bert": (
        {
            "attention": "bert.encoder.layer.0.attention.{self.query,self.key,self.value,output.dense}.weight",
            "mlp": "bert.encoder.layer.0.{intermediate,output}.dense.{weight,bias}",
            "norm": "bert.encoder.layer.0.{attention.output,output}.LayerNorm.{weight,bias,gamma,beta}",
        },
        {
            "embedding": "bert.embeddings.{word,position,token_type}_embeddings.weight bert.embeddings.position_ids",
            "norm": "bert.embeddings.LayerNorm.weight cls.predictions.transform.LayerNorm.bias",
            "head": "bert.pooler.dense.weight cls.predictions.{bias,decoder.weight,transform.dense.weight}"
            " cls.seq_relationship.weight classifier.bias qa_outputs.weight",
        },
    ),
    "distilbert": (
        {
            "attention": "distilbert.transformer.layer.0.attention.{q,k,v,out}_lin.weight",
            "mlp": "distilbert.transformer.layer.0.ffn.lin{1,2}.weight",
            "norm": "distilbert.transformer.layer.0.{sa,output}_layer_norm.weight",
        },
        {"head": "vocab_{projector,transform}.weight pre_classifier.weight", "norm": "vocab_layer_norm.weight"},
    ),
    "roberta": ({}, {"head": "lm_head.{bias,dense.weight} classifier.{dense,out_proj}.weight"}),
    "albert": (
        {
            "attention": "albert.encoder.albert_layer_groups.0.albert_layers.0.attention.{query,dense}.weight",
            "mlp": "albert.encoder.albert_layer_groups.0.albert_layers.0.{ffn,ffn_output}.weight",
            "norm": "albert.encoder.albert_layer_groups.0.albert_layers.0.{attention.LayerNorm,full_layer_layer_norm}"
            ".weight",
        },
        {"embedding": "albert.encoder.embedding_hidden_mapping_in.weight", "head": "predictions.{bias,dense.weight}"},
    ),
    "modernbert": (
        {
            "attention": "model.layers.0.attn.{Wqkv,Wo}.weight",
            "mlp": "model.layers.0.mlp.{Wi,Wo}.weight",
            "norm": "model.layers.0.{attn,mlp}_norm.weight",
        },
        {"norm": "model.final_norm.weight head.norm.weight", "head": "head.dense.weight decoder.{weight,bias}"},
    ),
    "deberta": (
        {"attention": "deberta.encoder.layer.0.attention.self.pos_{key,query}_proj.weight"},
        {"embedding": "deberta.encoder.rel_embeddings.weight", "other": "deberta.encoder.conv.conv.weight"},
    ),
    "mpnet": ({}, {"attention": "mpnet.encoder.relative_attention_bias.weight"}),
    "xlnet": (
        {
            "attention": "transformer.layer.0.rel_attn.{q,k,v,o,r,r_r_bias,seg_embed}",
            "mlp": "transformer.layer.0.ff.layer_{1,2}.weight",
            "norm": "transformer.layer.0.{ff,rel_attn}.layer_norm.weight",
        },
        {"embedding": "transformer.mask_emb", "head": "lm_loss.bias"},
    ),
    "t5": (
        {
            "attention": "decoder.block.0.layer.{0.SelfAttention,1.EncDecAttention}.{q,k,v,o}.weight"
            " decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "mlp": "decoder.block.0.layer.2.DenseReluDense.{wi,wi_0,wi_1,wo}.weight",
            "norm": "decoder.block.0.layer.{0..2}.layer_norm.weight",
        },
        {"embedding": "shared.weight", "norm": "encoder.final_layer_norm.weight"},
    ),
    "bart": (
        {
            "attention": "model.decoder.layers.0.{self,encoder}_attn.{q,out}_proj.weight",
            "mlp": "model.decoder.layers.0.fc{1,2}.weight",
            "norm": "model.decoder.layers.0.{self_attn,encoder_attn,final}_layer_norm.weight",
        },
        {
            "norm": "model.decoder.layernorm_embedding.weight",
            "embedding": "model.shared.weight model.encoder.embed_positions.weight",
            "head": "final_logits_bias classification_head.{dense,out_proj}.weight decoder.output_projection.weight",
        },
    ),
    "whisper": (
        {"attention": "model.encoder.layers.0.self_attn.k_proj.weight"},
        {"embedding": "model.encoder.{conv1,conv2,embed_positions}.weight", "head": "proj_out.weight"},
    ),
    "wav2vec2": (
        {
            "attention": "wav2vec2.encoder.layers.0.attention.out_proj.weight",
            "mlp": "wav2vec2.encoder.layers.0.feed_forward.{intermediate,output}_dense.weight",
        },
        {
            "norm": "wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight",
            "embedding": "wav2vec2.masked_spec_embed wav2vec2.feature_projection.projection.weight"
            " wav2vec2.encoder.pos_conv_embed.conv.parametrizations.weight.original{0,1}",
            "other": "wav2vec2.feature_extractor.conv_layers.0.conv.weight",
        },
    ),
    "conformer": (
        {
            "mlp": "encoder.layers.0.{ffn1,feed_forward2}.{intermediate_dense,linear1}.weight",
            "norm": "encoder.layers.0.{conv_module.depthwise_layer_norm,norm_feed_forward1}.weight",
            "other": "encoder.layers.0.{conv_module,conv}.pointwise_conv1.weight",
        },
        {},
    ),
    "mixtral": (
        {"mlp": "model.layers.0.block_sparse_moe.{gate,experts.7.w1,experts.7.w2,experts.7.w3}.weight"},
        {},
    ),
    "qwen moe": (
        {"mlp": "model.layers.0.mlp.{gate,shared_expert_gate,shared_expert.up_proj,experts.3.down_proj}.weight"},
        {},
    ),
    "gpt_oss": (
        {
            "attention": "model.layers.0.self_attn.sinks",
            "mlp": "model.layers.0.mlp.{router.weight,experts.gate_up_proj_blocks,experts.down_proj_bias}",
        },
        {},
    ),
    "switch": ({"mlp": "encoder.block.1.layer.1.mlp.{router.classifier,experts.expert_0.wi}.weight"}, {}),
    "deepseek": (
        {
            "attention": "model.layers.3.self_attn.{q_a_proj,q_b_proj,kv_a_proj_with_mqa,kv_b_proj}.weight",
            "mlp": "model.layers.3.mlp.{gate.e_score_correction_bias,shared_experts.up_proj.weight}",
            "norm": "model.layers.3.self_attn.{q_a,kv_a}_layernorm.weight",
        },
        {
            # the prediction layer behind those that the config counts
            "attention": "model.layers.61.self_attn.o_proj.weight",
            "mlp": "model.layers.61.mlp.experts.0.up_proj.weight",
            "norm": "model.layers.61.{enorm,hnorm,shared_head.norm,input_layernorm}.weight",
            "embedding": "model.layers.61.embed_tokens.weight",
            "head": "model.layers.61.shared_head.head.weight",
            "other": "model.layers.61.eh_proj.weight mtp.fc.weight",
        },
    ),
    "mamba": (
        {
            "norm": "backbone.layers.0.norm.weight backbone.layers.0.mixer.norm.weight",
            "other": "backbone.layers.0.mixer.{A_log,D,dt_bias,conv1d.weight,in_proj.weight,out_proj.weight}",
        },
        {"embedding": "backbone.embeddings.weight", "norm": "backbone.norm_f.weight"},
    ),
    "jamba": (
        {
            "mlp": "model.layers.0.feed_forward.{router,experts.0.up_proj}.weight",
            "norm": "model.layers.0.{mamba.dt_layernorm,pre_ff_layernorm}.weight",
            "other": "model.layers.0.mamba.{A_log,x_proj.weight,in_proj.weight,out_proj.weight}",
        },
        {},
    ),
    "nemotron_h, whose mixers are of three sorts": (
        {
            "attention": "backbone.layers.0.mixer.{q,k,v,o}_proj.weight",
            "mlp": "backbone.layers.0.mixer.{gate,up_proj,experts.0.up_proj,shared_experts.down_proj}.weight",
            "other": "backbone.layers.0.mixer.{in_proj,out_proj}.weight",
        },
        {},
    ),
    "lfm2": (
        {
            "other": "model.layers.0.conv.{conv,in_proj,out_proj}.weight",
            "norm": "model.layers.0.operator_norm.weight",
        },
        {"norm": "model.embedding_norm.weight"},
    ),
    "qwen3_next": (
        {
            "attention": "model.layers.0.linear_attn.{A_log,conv1d.weight,in_proj_qkvz.weight,out_proj.weight}",
            "norm": "model.layers.0.linear_attn.norm.weight",
        },
        {},
    ),
    "rwkv": (
        {
            "attention": "rwkv.blocks.0.attention.{receptance.weight,time_decay} blocks.0.att.key.weight",
            "mlp": "rwkv.blocks.0.feed_forward.{key.weight,time_mix_key} blocks.0.ffn.receptance.weight",
            "norm": "rwkv.blocks.0.{pre_ln,ln1,ln2}.weight blocks.0.att.ln_x.weight",
        },
        {"embedding": "rwkv.embeddings.weight emb.weight", "norm": "rwkv.ln_out.weight", "head": "head.weight"},
    ),
    "vit": (
        {
            "attention": "vit.encoder.layer.0.attention.{attention.query,output.dense}.weight",
            "mlp": "vit.encoder.layer.0.{intermediate,output}.dense.weight",
            "norm": "vit.encoder.layer.0.layernorm_{before,after}.weight",
        },
        {"embedding": "vit.embeddings.{cls_token,position_embeddings,patch_embeddings.projection.weight}"},
    ),
    "timm vit, dino": (
        {
            "attention": "blocks.0.attn.{qkv,proj}.weight",
            "mlp": "blocks.0.mlp.{fc1,fc2,w12,w3}.weight",
            "norm": "blocks.0.{norm1,norm2,attn.q_norm}.weight",
            "other": "blocks.0.ls{1,2}.gamma blocks.0.gamma_{1,2} layer.0.layer_scale1.lambda1",
        },
        {
            "embedding": "cls_token pos_embed reg_token register_tokens mask_token patch_embed.proj.weight",
            "norm": "norm.weight fc_norm.weight norm_pre.weight",
            "head": "head.weight head.mlp.{0,2}.weight head.last_layer.weight_g head.fc.weight attn_pool.latent"
            " attn_pool.kv.weight",
        },
    ),
    "torchvision vit": (
        {
            "attention": "encoder.layers.encoder_layer_0.self_attention.{in_proj_weight,out_proj.bias}",
            "mlp": "encoder.layers.encoder_layer_0.{mlp.0,mlp.linear_1}.weight",
        },
        {
            "embedding": "class_token conv_proj.weight encoder.pos_embedding",
            "norm": "encoder.ln.bias",
            "head": "heads.head.weight",
        },
    ),
    "clip": (
        {
            "norm": "vision_model.encoder.layers.0.layer_norm1.weight",
            "mlp": "text_model.encoder.layers.0.mlp.fc1.weight",
        },
        {
            "embedding": "vision_model.embeddings.{class_embedding,patch_embedding.weight,position_embedding.weight}",
            "norm": "vision_model.{pre_layrnorm,post_layernorm}.weight text_model.final_layer_norm.weight",
            "head": "{text,visual}_projection.weight",
            "other": "logit_scale",
        },
    ),
    "open_clip": (
        {
            "attention": "visual.transformer.resblocks.0.attn.{in_proj_weight,in_proj_bias,out_proj.weight}",
            "mlp": "transformer.resblocks.0.mlp.{c_fc,c_proj}.weight",
            "norm": "transformer.resblocks.0.ln_1.weight",
        },
        {
            "embedding": "token_embedding.weight positional_embedding visual.{class_embedding,conv1.weight}",
            "norm": "visual.ln_{pre,post}.weight ln_final.bias",
            "head": "text_projection visual.proj visual.attnpool.{q_proj,c_proj}.weight",
            "other": "logit_scale",
        },
    ),
    "siglip, whose head pools with attention": (
        {},
        {
            "norm": "vision_model.head.layernorm.weight",
            "head": "vision_model.head.{probe,attention.in_proj_weight,attention.out_proj.weight,mlp.fc1.weight}"
            " text_model.head.weight",
            "other": "logit_{scale,bias}",
        },
    ),
    "swin": (
        {
            "attention": "layers.0.blocks.1.attn.{relative_position_bias_table,relative_position_index,qkv.weight}"
            " encoder.layers.0.blocks.1.attention.self.relative_position_bias_table",
            "mlp": "encoder.layers.0.blocks.1.output.dense.weight",
            "norm": "layers.1.downsample.norm.weight",
            "other": "layers.1.downsample.reduction.weight",
        },
        {"embedding": "patch_embed.proj.weight", "norm": "patch_embed.norm.weight"},
    ),
    "convnext": (
        {
            "mlp": "stages.0.blocks.0.mlp.fc1.weight",
            "norm": "stages.0.blocks.0.norm.weight convnext.encoder.stages.0.layers.0.layernorm.weight",
            "other": "stages.0.blocks.0.{gamma,conv_dw.weight}"
            " convnext.encoder.stages.0.layers.0.{dwconv.weight,pwconv1.weight,layer_scale_parameter}",
        },
        {"embedding": "stem.0.weight convnext.embeddings.patch_embeddings.weight", "head": "head.fc.weight"},
    ),
    "resnet": (
        {
            "norm": "layer1.0.bn1.{weight,running_mean,num_batches_tracked} layer1.0.downsample.1.running_var"
            " resnet.encoder.stages.0.layers.0.layer.0.normalization.running_mean",
            "other": "layer1.0.conv1.weight layer1.0.se.fc1.weight"
            " resnet.encoder.stages.0.layers.0.shortcut.convolution.weight",
        },
        {
            "norm": "bn1.running_mean resnet.embedder.embedder.normalization.weight",
            "embedding": "conv1.weight resnet.embedder.embedder.convolution.weight",
            "head": "fc.weight classifier.1.weight",
        },
    ),
    "llava": (
        {},
        {
            "embedding": "language_model.model.embed_tokens.weight vision_tower.embeddings.class_embedding",
            "other": "multi_modal_projector.linear_{1,2}.weight model.mm_projector.0.weight model.image_newline",
        },
    ),
    "qwen2_vl": (
        {"mlp": "visual.blocks.0.mlp.fc1.weight"},
        {"norm": "visual.merger.ln_q.weight", "other": "visual.merger.mlp.0.weight"},
    ),
    "idefics2": (
        {},
        {
            "norm": "model.connector.perceiver_resampler.layers.0.input_latents_norm.weight",
            "other": "model.connector.perceiver_resampler.{latents,layers.0.self_attn.q_proj.weight}"
            " model.connector.modality_projection.gate_proj.weight",
        },
    ),
    "blip2": (
        {},
        {
            "embedding": "query_tokens",
            "attention": "qformer.encoder.layer.0.crossattention.{attention.key,output.dense}.weight",
            "mlp": "qformer.encoder.layer.0.{intermediate,output}_query.dense.weight",
            "norm": "qformer.encoder.layer.0.output_query.LayerNorm.weight",
            "other": "language_projection.weight",
        },
    ),
    "mllama": (
        {
            "attention": "model.layers.3.cross_attn_attn_gate model.layers.3.cross_attn.q_proj.weight",
            "mlp": "model.layers.3.cross_attn_mlp_gate",
            "norm": "model.layers.3.cross_attn.q_norm.weight",
        },
        {"embedding": "vision_model.gated_positional_embedding.gate"},
    ),
    "flux in diffusers": (
        {
            "attention": "transformer_blocks.0.attn.{to_q,to_out.0,add_k_proj,to_add_out}.weight",
            "mlp": "transformer_blocks.0.{ff,ff_context}.net.{0.proj,2}.weight"
            " single_transformer_blocks.0.proj_mlp.weight",
            "norm": "transformer_blocks.0.attn.{norm_q,norm_added_k}.weight",
            "other": "transformer_blocks.0.{norm1,norm1_context}.linear.weight"
            " single_transformer_blocks.0.{norm.linear,proj_out}.weight",
        },
        {
            "embedding": "{x,context}_embedder.weight time_text_embed.timestep_embedder.linear_1.weight",
            "head": "proj_out.weight",
            "other": "norm_out.linear.weight",
        },
    ),
    "flux": (
        {
            "attention": "double_blocks.0.img_attn.{qkv,proj}.weight",
            "mlp": "double_blocks.0.txt_mlp.{0,2}.weight",
            "norm": "double_blocks.0.img_attn.norm.query_norm.scale single_blocks.0.norm.key_norm.scale",
            "other": "double_blocks.0.img_mod.lin.weight single_blocks.0.modulation.lin.weight",
        },
        {
            "embedding": "{img_in,txt_in,time_in.out_layer,vector_in.in_layer}.weight",
            "head": "final_layer.linear.weight",
            "other": "final_layer.adaLN_modulation.1.weight",
        },
    ),
    "unet in diffusers": (
        {
            "attention": "down_blocks.0.attentions.0.{proj_in,transformer_blocks.0.attn2.to_k}.weight",
            "mlp": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj.weight",
            "norm": "down_blocks.0.{attentions.0.norm,resnets.0.norm1,attentions.0.group_norm}.weight",
            "other": "down_blocks.0.resnets.0.{conv1,time_emb_proj,conv_shortcut}.weight",
        },
        {
            "embedding": "conv_in.weight time_embedding.linear_1.weight",
            "norm": "conv_norm_out.weight",
            "head": "conv_out.weight",
        },
    ),
    "a transformer of torch.nn": (
        {
            "attention": "transformer.encoder.layers.0.self_attn.in_proj_weight",
            "mlp": "transformer.encoder.layers.0.linear{1,2}.weight",
            "norm": "transformer.encoder.layers.0.norm1.weight",
        },
        {},
    ),
    "projections that stand in no module": (
        {
            "attention": "layers.0.{q_proj,qkv,in_proj_weight,out_proj.bias,to_q.weight,query.weight,wq,to_out.0.bias}",
            "mlp": "layers.0.{gate_proj,w1,wi,wo,router,lin1,c_fc}.weight",
        },
        {},
    ),
    "words that hold others": (
        {
            "other": "layers.0.abnormal.weight layers.0.normal_map.weight",
            "norm": "layers.0.{RMSNorm,GroupNorm,rmsnorm,prenorm,bn_2}.weight",
        },
        {"embedding": "unknown_embeddings", "other": "quant_conv.weight proj_foo.weight"},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_name_of_a_family(family: str) -> None:
    """A family's parameters are of the kinds that a reader of its code gives them."""
    inside, outside = FAMILIES[family]
    expected = read(inside, inside=True) + read(outside, inside=False)
    assert [(name, side, kind_of(name, inside=side)) for name, side, _ in expected] == expected


def test_kinds_are_listed_once() -> None:
    """The order of a report holds every kind."""
    assert sorted(KINDS) == sorted(get_args(Kind))


@pytest.mark.parametrize(
    "name", ["layers.0.attention.{q_norm,output.LayerNorm,k_ln}.weight", "layers.0.mlp.norm.weight"]
)
def test_a_norm_is_a_norm_wherever_it_stands(name: str) -> None:
    """A norm in an attention or an MLP is a norm, in a block and out of it."""
    assert {kind_of(each, inside=inside) for each in zoo.expand(name) for inside in (True, False)} == {"norm"}


def test_a_block_has_neither_embedding_nor_head_but_by_name() -> None:
    """In a block a router's classifier is MLP and an attention's segment table attention; a whole head is a head."""
    assert kind_of("layers.0.mlp.router.classifier.weight", inside=True) == "mlp"
    assert kind_of("layers.0.rel_attn.seg_embed", inside=True) == "attention"
    assert kind_of("layers.0.resnet.time_emb_proj.weight", inside=True) == "other"
    assert kind_of("model.layers.61.shared_head.head.weight", inside=True) == "head"
    assert kind_of("model.layers.61.embed_tokens.weight", inside=True) == "embedding"
    assert kind_of("stages.2.cls_token", inside=True) == "embedding"


def test_the_same_name_in_a_block_and_out_of_it() -> None:
    """`proj_out` and `conv1` are something only at the ends of a model; a head's MLP is MLP only in a block."""
    assert [kind_of("proj_out.weight", inside=inside) for inside in (False, True)] == ["head", "other"]
    assert [kind_of("conv1.weight", inside=inside) for inside in (False, True)] == ["embedding", "other"]
    assert [kind_of("head.mlp.fc1.weight", inside=inside) for inside in (False, True)] == ["head", "mlp"]


# --- every case of depth ---

TOLD = [case for case in PLACED if "users" not in case.file]  # of users' families only depth was told, not every kind
NO_TRANSFORMERS = {  # convolutions, recurrences, plain matrices: most of their blocks is `other`, rightly
    *("mamba", "mamba2", "jamba", "nemotron_h"),
    *("convnext", "resnet", "open_clip_resnet", "timm_convnext", "timm_resnet", "timm_efficientnet"),
    *("torchvision_resnet", "diffusers_unet", "diffusers_autoencoder", "stable_diffusion_1"),
    *("mlp", "net", "layer_list"),
}
RIGHTLY_OTHER = {  # what else stands in the blocks of transformers
    "gemma3n_text": r"\.(altup|laurel|per_layer_input_gate|per_layer_projection)\b",  # streams and low-rank bypasses
    "dinov2": r"\.layer_scale[12]\.lambda1$",
    "beit": r"\.lambda_[12]$",  # layer scale
    "swin": r"\.downsample\.reduction\.weight$",  # merges patches between stages
    "timm_swin": r"\.downsample\.reduction\.weight$",
    "detr": r"\.convolution\.weight$",  # its backbone is a ResNet
    "diffusers_flux": r"\.norm\w*\.linear\.|\.proj_out\.",  # modulation; attention's and MLP's output in one matrix
    "diffusers_hunyuan_video": r"\.norm\w*\.linear\.|\.proj_out\.",
    "diffusers_sd3": r"\.norm\w*\.linear\.",
    "diffusers_dit": r"\.norm1\.(linear|emb)\.",
    "diffusers_wan": r"\.scale_shift_table$",
    "flux": r"mod(ulation)?\.lin\.",
    "flux_under_a_prefix": r"mod(ulation)?\.lin\.",
}


def inside(case: zoo.Case) -> list[str]:
    """The names that lie in a block."""
    return list(zoo.check_case(case, names_and_config(case)[0]))


@pytest.mark.zoo
@pytest.mark.parametrize("case", [case for case in TOLD if case.id not in NO_TRANSFORMERS], ids=str)
@pytest.mark.some(6)
def test_blocks_of_transformers_are_attention_mlp_and_norm(case: zoo.Case) -> None:
    """Of a transformer's blocks nothing is `other`, but what is listed with the reason."""
    kinds = {name: kind_of(name, inside=True) for name in inside(case)}
    rest = {name for name, kind in kinds.items() if kind not in ("attention", "mlp", "norm")}
    if case.id == "cvt":  # each of its stages begins with an embedding
        rest -= {name for name in rest if kinds[name] == "embedding"}
    assert not {name for name in rest if case.id not in RIGHTLY_OTHER or not re.search(RIGHTLY_OTHER[case.id], name)}
    assert {"attention", "mlp"} <= set(kinds.values())  # norms that are modulated may have no parameters


@pytest.mark.slow
@pytest.mark.zoo
def test_no_exemption_is_idle() -> None:
    """Every case that is exempt exists, and has something in its blocks that is `other`."""
    others = {case.id for case in TOLD if any(kind_of(name, inside=True) == "other" for name in inside(case))}
    assert NO_TRANSFORMERS | RIGHTLY_OTHER.keys() == others


PREFIXES = ["module.", "_orig_mod.", "model.", "module.0.", "encoder.", "base_model.model."]


@pytest.mark.zoo
@pytest.mark.parametrize("turn", [0, *(pytest.param(turn, marks=pytest.mark.slow) for turn in range(1, len(PREFIXES)))])
@pytest.mark.slow
def test_a_wrapper_changes_no_kind(turn: int) -> None:
    """What is put before all names says nothing of any."""
    for at, case in enumerate(PLACED):
        prefix = PREFIXES[(at + turn) % len(PREFIXES)]
        within = set(inside(case))
        for name in names_and_config(case)[0]:
            assert kind_of(prefix + name, inside=name in within) == kind_of(name, inside=name in within)


# --- any string ---


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("name", ["", ".", "...", "weight", "0.weight", "ünï.cödé", "a b\nc", "\0", "-.-", "İ.ẞ"])
def test_any_string_has_a_kind(name: str, inside: bool) -> None:
    """What says nothing is `other`; nothing is an error."""
    assert kind_of(name, inside=inside) == "other"


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "!", ".weight"])
def test_long_names_take_linear_time(end: str) -> None:
    """A hostile name of 10,000 characters takes no longer than a moment, whichever words it repeats."""
    repeated = "a _ . 0. q_ _q ln_ ln1 bn1111_ norm norm. normal attn dense dense. output. wi_ conv_ embed_ position_"
    for part in [*repeated.split(), "feed_", "proj_", "_projection", "logits", "token", "expert_", "head_", "\n", "é"]:
        name = part * (10_000 // len(part)) + end
        for inside in (True, False):
            start = time.process_time()
            assert kind_of(name, inside=inside) in KINDS
            assert time.process_time() - start < 1
