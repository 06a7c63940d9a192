"""Coefficients outside the blocks: --outside, on which side a name stands, tied heads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support.crossed import by_turns
from support.files import write_checkpoint
from support.schedules import MODELS, dry, llama, one_value, planned, refused, sides, stack, written

# --- outside the blocks ---


@by_turns(
    key=["decoder", "one layer", "towers", "prediction layer", "tied"],
    of=[
        (["--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "constant", "--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "power:2", "--alpha", 0.25, "--beta", 0.5], 0.25, 0.75),
        (["--schedule", "0.5,0.125,0.375"], 0.5, 0.375),
        (["--schedule", "0.5"], 0.5, 0.5),
    ],
)
def test_outside(key: str, of: tuple[list[object], float, float], saved: dict[str, tuple[Path, Path]]) -> None:
    """alpha is the first value, position the first before the blocks and the last behind them, both times gamma; base
    is 0 and keep 1, whatever gamma; the blocks have what they always have.
    """
    rule, first, last = of
    model = MODELS[key]
    always = planned(saved[key], *rule, "--gamma", 2)
    ends = {"alpha": (2 * first, 2 * first), "position": (2 * first, 2 * last), "base": (0, 0), "keep": (1, 1)}
    for outside, (before, after) in ends.items():
        got = planned(saved[key], *rule, "--gamma", 2, "--outside", outside)
        for name, place in model.places.items():
            side = model.places[model.tied.get(name, name)]
            expected = {"before": before, "after": after}[side] if isinstance(side, str) else always[name]
            assert got[name] == expected, (name, outside, place)


def test_outside_must_be_one_of_four(saved: dict[str, tuple[Path, Path]]) -> None:
    """Another word is refused with the four."""
    refused(dry(saved["decoder"], "--outside", "middle"), "'alpha', 'position', 'base', 'keep'")


# A tensor of a block, I being its number; what stands before the blocks; what stands behind them.
FAMILIES: dict[str, dict[str, str]] = yaml.safe_load("""
llama:
  block: model.layers.I.mlp.up_proj.weight
  before: model.embed_tokens.weight model.rotary_emb.inv_freq
  after: model.norm.weight lm_head.weight lm_head.bias score.weight v_head.summary.weight
mistral's own:
  block: layers.I.attention.wq.weight
  before: tok_embeddings.weight
  after: norm.weight output.weight
gpt2:
  block: transformer.h.I.mlp.c_fc.weight
  before: transformer.wte.weight transformer.wpe.weight
  after: transformer.ln_f.weight transformer.ln_f.bias lm_head.weight multiple_choice_head.summary.weight
gpt_neox:
  block: gpt_neox.layers.I.mlp.dense_h_to_4h.weight
  before: gpt_neox.embed_in.weight
  after: gpt_neox.final_layer_norm.weight embed_out.weight
bloom:
  block: transformer.h.I.input_layernorm.weight
  before: transformer.word_embeddings.weight transformer.word_embeddings_layernorm.weight
  after: transformer.ln_f.bias
opt:
  block: model.decoder.layers.I.fc1.weight
  before: model.decoder.embed_tokens.weight model.decoder.embed_positions.weight model.decoder.project_in.weight
  after: model.decoder.project_out.weight model.decoder.final_layer_norm.weight
chatglm:
  block: transformer.encoder.layers.I.mlp.dense_h_to_4h.weight
  before: transformer.embedding.word_embeddings.weight transformer.rotary_pos_emb.inv_freq
  after: transformer.encoder.final_layernorm.weight transformer.output_layer.weight
olmo's own:
  block: transformer.blocks.I.ff_proj.weight
  before: transformer.wte.weight
  after: transformer.ff_out.weight
mamba:
  block: backbone.layers.I.mixer.A_log
  before: backbone.embeddings.weight
  after: backbone.norm_f.weight lm_head.weight
rwkv:
  block: rwkv.blocks.I.ln1.weight
  before: rwkv.embeddings.weight
  after: rwkv.ln_out.weight head.weight
jamba:
  block: model.layers.I.mamba.D
  before: model.embed_tokens.weight
  after: model.final_layernorm.weight lm_head.weight
bert:
  block: bert.encoder.layer.I.output.LayerNorm.weight
  before: bert.embeddings.word_embeddings.weight bert.embeddings.position_embeddings.weight
    bert.embeddings.position_ids bert.embeddings.token_type_embeddings.weight bert.embeddings.LayerNorm.weight
  after: bert.pooler.dense.weight cls.predictions.transform.dense.weight cls.predictions.transform.LayerNorm.weight
    cls.predictions.decoder.weight cls.predictions.bias classifier.weight qa_outputs.weight
distilbert:
  block: distilbert.transformer.layer.I.ffn.lin1.weight
  before: distilbert.embeddings.LayerNorm.bias
  after: vocab_transform.weight vocab_layer_norm.weight vocab_projector.bias classifier.bias
roberta:
  block: roberta.encoder.layer.I.output.dense.weight
  before: roberta.embeddings.word_embeddings.weight
  after: lm_head.dense.weight lm_head.layer_norm.weight lm_head.decoder.bias classifier.out_proj.weight
electra:
  block: electra.encoder.layer.I.output.dense.weight
  before: electra.embeddings_project.weight electra.embeddings.LayerNorm.weight
  after: discriminator_predictions.dense.weight generator_predictions.LayerNorm.weight generator_lm_head.bias
xlnet:
  block: transformer.layer.I.ff.layer_1.weight
  before: transformer.mask_emb transformer.word_embedding.weight
  after: lm_loss.weight lm_loss.bias logits_proj.weight
modernbert:
  block: model.layers.I.mlp.Wi.weight
  before: model.embeddings.tok_embeddings.weight model.embeddings.norm.weight
  after: model.final_norm.weight head.dense.weight head.norm.weight
deberta:
  block: deberta.encoder.layer.I.output.dense.weight
  before: deberta.encoder.rel_embeddings.weight deberta.encoder.LayerNorm.weight
  after: pooler.dense.weight lm_predictions.lm_head.dense.weight
t5:
  block: encoder.block.I.layer.0.SelfAttention.q.weight
  before: shared.weight encoder.embed_tokens.weight
  after: encoder.final_layer_norm.weight lm_head.weight classification_head.dense.weight
bart:
  block: model.decoder.layers.I.fc1.weight
  before: model.shared.weight model.encoder.embed_positions.weight model.encoder.layernorm_embedding.weight
  after: final_logits_bias classification_head.out_proj.weight
whisper:
  block: model.encoder.layers.I.fc1.weight
  before: model.encoder.conv1.weight model.encoder.conv2.bias model.encoder.embed_positions.weight
  after: model.encoder.layer_norm.weight model.decoder.layer_norm.weight proj_out.weight
wav2vec2:
  block: wav2vec2.encoder.layers.I.layer_norm.weight
  before: wav2vec2.feature_extractor.conv_layers.0.conv.weight
    wav2vec2.feature_extractor.conv_layers.0.layer_norm.weight wav2vec2.feature_projection.layer_norm.weight
    wav2vec2.feature_projection.projection.weight wav2vec2.masked_spec_embed
    wav2vec2.encoder.pos_conv_embed.conv.weight_v
  after: lm_head.weight
vit:
  block: vit.encoder.layer.I.output.dense.weight
  before: vit.embeddings.cls_token vit.embeddings.position_embeddings
    vit.embeddings.patch_embeddings.projection.weight
  after: vit.layernorm.weight vit.pooler.dense.weight classifier.weight
swin:
  block: swin.encoder.layers.0.blocks.I.layernorm_after.weight
  before: swin.embeddings.norm.weight swin.embeddings.patch_embeddings.projection.weight
  after: swin.layernorm.weight classifier.weight
clip:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: text_model.embeddings.token_embedding.weight vision_model.embeddings.class_embedding
    vision_model.embeddings.patch_embedding.weight vision_model.pre_layrnorm.weight
  after: vision_model.post_layernorm.weight text_model.final_layer_norm.weight visual_projection.weight
    text_projection.weight logit_scale
siglip:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: vision_model.embeddings.position_embedding.weight
  after: vision_model.head.probe vision_model.head.attention.in_proj_weight vision_model.head.mlp.fc1.weight
    text_model.head.weight logit_bias
open_clip:
  block: visual.transformer.resblocks.I.ln_1.weight
  before: positional_embedding token_embedding.weight visual.class_embedding visual.conv1.weight
    visual.ln_pre.weight
  after: visual.ln_post.weight visual.proj ln_final.weight text_projection logit_scale
timm_vit:
  block: blocks.I.norm1.weight
  before: cls_token reg_token pos_embed patch_embed.proj.weight norm_pre.weight
  after: norm.weight fc_norm.weight head.weight attn_pool.latent attn_pool.norm.weight
timm_convnext:
  block: stages.0.blocks.I.norm.weight
  before: stem.0.weight stem.1.weight
  after: head.norm.weight head.fc.weight
resnet:
  block: layer1.I.conv1.weight
  before: conv1.weight bn1.weight bn1.running_mean
  after: fc.weight fc.bias
llava:
  block: language_model.model.layers.I.mlp.up_proj.weight
  before: multi_modal_projector.linear_1.weight image_newline vision_tower.vision_model.pre_layrnorm.weight
  after: vision_tower.vision_model.post_layernorm.weight language_model.model.norm.weight
    language_model.lm_head.weight
qwen2_vl:
  block: visual.blocks.I.norm1.weight
  before: visual.patch_embed.proj.weight visual.merger.ln_q.weight visual.merger.mlp.0.weight
  after: model.norm.weight
idefics:
  block: model.text_model.layers.I.mlp.up_proj.weight
  before: model.connector.modality_projection.proj.weight model.connector.perceiver_resampler.norm.weight
  after: model.text_model.norm.weight
blip2:
  block: vision_model.encoder.layers.I.mlp.fc1.weight
  before: query_tokens qformer.layernorm.weight language_projection.weight
  after: vision_model.post_layernorm.weight
flux:
  block: double_blocks.I.img_mlp.0.weight
  before: img_in.weight txt_in.weight time_in.in_layer.weight vector_in.out_layer.weight
    guidance_in.out_layer.weight
  after: final_layer.linear.weight final_layer.adaLN_modulation.1.weight
diffusers:
  block: transformer_blocks.I.norm1.linear.weight
  before: x_embedder.weight context_embedder.weight pos_embed.proj.weight
    time_text_embed.text_embedder.linear_1.weight
  after: norm_out.linear.weight proj_out.weight
unet:
  block: down_blocks.I.resnets.0.norm1.weight
  before: conv_in.weight time_embedding.linear_1.weight
  after: conv_norm_out.weight conv_out.weight
""")


def side(block: str, names: Sequence[str], folder: Path) -> dict[str, str]:
    """On which side `--outside position` puts the names, beside two blocks; with alpha 0 and beta 1 that is 0 or 1."""
    paths = sides(folder, [*(block.replace("I", str(i)) for i in range(2)), *names])
    found = planned(paths, "--outside", "position", "--alpha", 0, "--beta", 1)
    return {name: {0.0: "before", 1.0: "after"}[found[name]] for name in names}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.some(8)
def test_on_which_side_a_name_stands(family: str, tmp_path: Path) -> None:
    """Embeddings, stems, first norms and projectors stand before the blocks; final norms, poolers and heads behind."""
    inputs_of = {key: FAMILIES[family][key].split() for key in ("before", "after")}
    expected = {name: key for key, names in inputs_of.items() for name in names}
    assert side(FAMILIES[family]["block"], list(expected), tmp_path) == expected


def test_the_table_is_long_enough() -> None:
    """At least 100 real names outside the blocks are held to a side."""
    names = {name for family in FAMILIES.values() for key in ("before", "after") for name in family[key].split()}
    assert len(names) >= 100


MISLEADING = [  # where each stands in its model's forward pass, as transformers, open_clip or colpali run it
    ("distilbert", "distilbert.transformer.layer.I.ffn.lin1.weight", "pre_classifier.weight", "after"),
    ("bert", "bert.encoder.layer.I.output.dense.weight", "cls.seq_relationship.weight", "after"),
    ("xlnet", "transformer.layer.I.ff.layer_1.weight", "sequence_summary.summary.weight", "after"),
    ("modernbert", "model.layers.I.mlp.Wi.weight", "decoder.bias", "after"),
    ("esm", "esm.encoder.layer.I.output.dense.weight", "esm.encoder.emb_layer_norm_after.weight", "after"),
    ("blip", "text_encoder.encoder.layer.I.output.dense.weight", "text_proj.weight", "after"),
    ("clap", "audio_model.audio_encoder.layers.0.blocks.I.w", "audio_projection.linear1.weight", "after"),
    ("colpali", "model.language_model.layers.I.mlp.up_proj.weight", "custom_text_proj.weight", "after"),
    ("open_clip", "visual.layer1.I.conv1.weight", "visual.attnpool.positional_embedding", "after"),
    ("gemma3n", "model.layers.I.mlp.up_proj.weight", "model.altup_unembed_projections.0.weight", "after"),
    ("gemma3n", "model.layers.I.mlp.up_proj.weight", "model.per_layer_projection_norm.weight", "before"),
    ("janus", "model.language_model.layers.I.mlp.up_proj.weight", "model.aligner.fc1.weight", "before"),
    ("glm4v", "model.visual.blocks.I.norm1.weight", "model.visual.post_conv_layernorm.weight", "before"),
    ("qwen3_next", "model.layers.I.mlp.up_proj.weight", "mtp.layers.0.self_attn.q_proj.weight", "after"),
    ("qwen3_next", "model.layers.I.mlp.up_proj.weight", "mtp.pre_fc_norm_hidden.weight", "after"),
    ("mimo", "model.layers.I.mlp.up_proj.weight", "model.mtp_layers.0.input_proj.weight", "after"),
]


@pytest.mark.parametrize(
    ("block", "name", "expected"), [pytest.param(*row[1:], id=f"{row[0]} {row[2]}") for row in MISLEADING]
)
def test_on_which_side_a_misleading_name_stands(block: str, name: str, expected: str, tmp_path: Path) -> None:
    """Heads, final norms and prediction layers stand behind the blocks, and what feeds a tower before them, though
    their names hold a word for the other side or for none.
    """
    assert side(block, [name], tmp_path) == {name: expected}


@pytest.mark.parametrize(
    ("pattern", "prefix"),
    [(r"^(?P<stack>encoder)\.cell(?P<index>\d+)\.", "encoder"), (r"cell(?P<index>\d+)", "layers")],
)
def test_a_stack_called_as_the_user_likes_moves_no_embedding(pattern: str, prefix: str, tmp_path: Path) -> None:
    """With --layers, an embedding whose name begins with the stack's stands before the blocks all the same."""
    names = [f"{prefix}.cell{i}.w" for i in range(3)]
    ends = {f"{prefix}.embed_tokens.weight": 0.0, f"{prefix}.final_norm.weight": 1.0}
    paths = sides(tmp_path, [*names, *ends])
    got = planned(paths, "--layers", pattern, "--outside", "position", "--alpha", 0)
    assert {name: got[name] for name in ends} == ends


# --- tied heads ---


TIED = {"model_type": "llama", "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "options",
    [
        ["--outside", "position"],
        ["--outside", "position", "--schedule", "0.2,0.8", "--gamma", 0.5],
        ["--outside", "position", "--filter", "embed=0.3"],
        ["--filter", "lm_head=keep"],
        ["--filter", "lm_head=keep", "--filter", "*=base"],
        ["--outside", "keep", "--filter", "embed=base"],
    ],
)
def test_a_tied_head_has_its_embedding_s_coefficient(
    options: list[object], saved: dict[str, tuple[Path, Path]]
) -> None:
    """They are one weight, so no option, not a filter either, tells them apart."""
    got = planned(saved["tied"], *options)
    assert got["lm_head.weight"] == got["model.embed_tokens.weight"]


def test_an_untied_head_has_its_own(tmp_path: Path) -> None:
    """Where the config says they are two weights, they are."""
    paths = sides(tmp_path, list(llama(3)), {"model_type": "llama", "tie_word_embeddings": False})
    got = planned(paths, "--outside", "position")
    assert (got["model.embed_tokens.weight"], got["lm_head.weight"]) == (0.1, 1.0)


def test_a_tied_head_follows_the_config_that_the_output_gets(tmp_path: Path) -> None:
    """A fine-tune that is one file takes over the base's config; if that ties the head, the head is tied."""
    base, ft = sides(tmp_path, list(llama(3)), TIED)
    got = written(tmp_path / "out", base, ft / "model.safetensors", "--outside", "position")
    assert "tie_word_embeddings" in (tmp_path / "out" / "config.json").read_text()
    assert one_value(got["lm_head.weight"]) == one_value(got["model.embed_tokens.weight"])


def test_a_filter_is_not_said_to_have_worked_where_it_has_not(saved: dict[str, tuple[Path, Path]]) -> None:
    """A dry run counts under a filter only tensors that have its coefficient; a tied head follows its embedding."""
    assert planned(saved["tied"], "--filter", "lm_head=keep")["lm_head.weight"] == 0.1
    ran = dry(saved["tied"], "--filter", "lm_head=keep")
    assert ran.code != 0 or not re.search(r"lm_head: 1 tensor", ran.out)


@pytest.mark.parametrize(
    ("prefix", "names", "config", "options"),
    [
        (
            "encoder.block",
            ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "shared.weight", "lm_head.weight"],
            {"model_type": "t5", "tie_word_embeddings": True},
            ["--filter", "shared=0.5"],
        ),
        (
            "model.layers",
            ["model.embed_tokens.weight", "model.layers.2.embed_tokens.weight", "lm_head.weight"],
            {**TIED, "num_hidden_layers": 2},
            ["--outside", "position"],
        ),
    ],
    ids=["t5", "prediction layer"],
)
def test_sharding_does_not_choose_the_embedding_of_a_tied_head(
    prefix: str, names: list[str], config: dict[str, Any], options: list[str], tmp_path: Path
) -> None:
    """However the fine-tune is sharded, and in whatever order, the head's coefficient is the same."""
    tensors = {name: torch.ones(2) for name in [*names, *stack(prefix, 2)]}
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros(2) for name in tensors}, config=config)
    found = set()
    for number, order in enumerate((list(tensors), list(tensors)[::-1])):
        for shards in (1, len(order)):
            ordered = {name: tensors[name] for name in order}
            ft = write_checkpoint(tmp_path / f"ft{number}{shards}", ordered, shards=shards, config=config)
            found.add(planned((base, ft), *options)["lm_head.weight"])
    assert len(found) == 1
