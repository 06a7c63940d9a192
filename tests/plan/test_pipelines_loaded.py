"""Real pipelines, tiny and randomly initialised: diffusers and sentence-transformers load what was written, and every
tensor is what plain torch gives for it.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from support.run import run_lines

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of what the libraries say of themselves

VOCABULARY = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}</w>" for letter in "abcdefgh")]


def coefficient(layer: int | None, layers: int) -> float:
    """LiNeS with the defaults, by the formula of the paper; 0.1 outside the blocks."""
    return 0.1 if layer is None else 0.1 + 0.9 * layer / (layers - 1)


def agrees(
    out: torch.nn.Module, base: torch.nn.Module, ft: torch.nn.Module, layer_of: Callable[[str], int | None]
) -> None:
    """Each parameter is `base + c * (ft - base)`, with the coefficient of the layer that its name says."""
    old, new = base.state_dict(), ft.state_dict()
    numbers = [number for name in new if (number := layer_of(name)) is not None]
    for name, tensor in out.state_dict().items():
        if not tensor.is_floating_point():
            continue
        c = coefficient(layer_of(name), max(numbers, default=0) + 1)
        expected = new[name] if c == 1 else old[name] + c * (new[name] - old[name])
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


def is_same(out: torch.nn.Module, other: torch.nn.Module) -> None:
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in out.state_dict().items())


def numbered(begin: str) -> Callable[[str], int | None]:
    """The layer is the number behind this, in a name."""

    def layer_of(name: str) -> int | None:
        _, found, rest = name.partition(begin)
        return int(rest.partition(".")[0]) if found else None

    return layer_of


def in_a_unet(down: int) -> Callable[[str], int | None]:
    """Down, middle, up: so many blocks down."""

    def layer_of(name: str) -> int | None:
        part, _, rest = name.partition(".")
        first = {"down_blocks": 0, "mid_block": down, "up_blocks": down + 1}
        if part not in first:
            return None
        return first[part] + (0 if part == "mid_block" else int(rest.partition(".")[0]))

    return layer_of


@pytest.fixture(scope="module")
def diffusers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("diffusers")


def tokenizer(tmp_path: Path) -> Any:
    from transformers import CLIPTokenizer

    (tmp_path / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(VOCABULARY)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"), model_max_length=77)


def text_config(**more: Any) -> Any:
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    return CLIPTextConfig(vocab_size=len(VOCABULARY), projection_dim=16, **sizes | ids | more)


def stable_diffusion(diffusers: Any, seed: int, tmp_path: Path, *, xl: bool = False) -> Any:
    """A pipeline of Stable Diffusion, of SDXL if `xl`, with random weights."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(seed)
    unet: dict[str, Any] = {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 16,
        "attention_head_dim": 8,
    }
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    )
    tokens, scheduler = tokenizer(tmp_path), diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    if not xl:
        return diffusers.StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokens,
            unet=diffusers.UNet2DConditionModel(**unet),
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + 16, "cross_attention_dim": 32}
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config()),
        text_encoder_2=CLIPTextModelWithProjection(text_config(num_hidden_layers=4)),
        tokenizer=tokens,
        tokenizer_2=tokens,
        unet=diffusers.UNet2DConditionModel(**unet | added),
        scheduler=scheduler,
    )


def saved(make: Callable[[int], Any], tmp_path: Path, **options: Any) -> dict[str, Any]:
    """A base and a fine-tune, saved to folders of these names."""
    sides = {side: make(seed) for seed, side in enumerate(("base", "ft"))}
    for side, pipeline in sides.items():
        pipeline.save_pretrained(tmp_path / side, **options)
    return sides


def edit(tmp_path: Path, *flags: object) -> Any:
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--json", *flags)
    assert ran.code == 0, ran.err
    assert run_lines("verify", tmp_path / "out").code == 0
    return ran.json


@pytest.mark.parametrize("xl", [False, True], ids=["sd", "sdxl"])
def test_stable_diffusion(xl: bool, diffusers: Any, tmp_path: Path) -> None:
    """Every component by its own depth, the VAE as it is; the output makes an image."""
    sides = saved(lambda seed: stable_diffusion(diffusers, seed, tmp_path, xl=xl), tmp_path)
    edit(tmp_path)
    out = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", **({} if xl else {"safety_checker": None}))
    base, ft = sides["base"], sides["ft"]
    agrees(out.unet, base.unet, ft.unet, in_a_unet(2))
    agrees(out.text_encoder, base.text_encoder, ft.text_encoder, numbered("encoder.layers."))
    if xl:
        agrees(out.text_encoder_2, base.text_encoder_2, ft.text_encoder_2, numbered("encoder.layers."))
    is_same(out.vae, ft.vae)
    image = out("a b", num_inference_steps=2, output_type="pt", height=16, width=16).images
    assert torch.isfinite(image).all()


def test_one_component_of_a_sharded_pipeline(diffusers: Any, tmp_path: Path) -> None:
    """Sharded in, sharded out, each in its own folder; the components that are not named are the fine-tune's."""
    sides = saved(lambda seed: stable_diffusion(diffusers, seed, tmp_path), tmp_path, max_shard_size="200KB")
    assert len(list((tmp_path / "ft/unet").glob("*.safetensors"))) > 1
    told = edit(tmp_path, "--component", "unet", "--max-shard-size", "300KB")
    assert sum(file.startswith("unet/") for file in told["files"]) > 1
    out = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    agrees(out.unet, sides["base"].unet, sides["ft"].unet, in_a_unet(2))
    is_same(out.text_encoder, sides["ft"].text_encoder)
    is_same(out.vae, sides["ft"].vae)


def test_a_half_precision_variant(diffusers: Any, tmp_path: Path) -> None:
    """--variant fp16 reads what was saved so; the output loads without a variant."""
    sides = saved(lambda seed: stable_diffusion(diffusers, seed, tmp_path).to(torch.float16), tmp_path, variant="fp16")
    edit(tmp_path, "--variant", "fp16")
    out = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None, torch_dtype=torch.float16)
    is_same(out.vae, sides["ft"].vae)
    old, new = (sides[side].unet.state_dict()["conv_in.weight"].float() for side in ("base", "ft"))
    assert torch.equal(out.unet.state_dict()["conv_in.weight"], (old + torch.tensor(0.1) * (new - old)).half())


def test_a_transformer_in_place_of_a_unet(diffusers: Any, tmp_path: Path) -> None:
    """FLUX's double blocks and then its single blocks, and a T5 beside CLIP: `transformer` and `text_encoder_2`."""
    from transformers import CLIPTextModel, T5Config, T5EncoderModel, T5TokenizerFast

    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return diffusers.FluxPipeline(
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
            vae=diffusers.AutoencoderKL(
                block_out_channels=(4,), norm_num_groups=1, latent_channels=1, sample_size=32, use_quant_conv=False
            ),
            text_encoder=CLIPTextModel(text_config()),
            tokenizer=tokenizer(tmp_path),
            text_encoder_2=T5EncoderModel(
                T5Config(
                    vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            ),
            tokenizer_2=T5TokenizerFast(
                vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("a", -1.0)], extra_ids=0
            ),
            transformer=diffusers.FluxTransformer2DModel(
                in_channels=4,
                num_layers=2,
                num_single_layers=3,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=16,
                pooled_projection_dim=16,
                axes_dims_rope=(4, 4, 8),
            ),
        )

    def layer_of(name: str) -> int | None:
        double, single = numbered("transformer_blocks.")(name), numbered("single_transformer_blocks.")(name)
        return double if single is None else 2 + single

    sides = saved(make, tmp_path)
    edit(tmp_path)
    out = diffusers.FluxPipeline.from_pretrained(tmp_path / "out")
    agrees(out.transformer, sides["base"].transformer, sides["ft"].transformer, layer_of)
    two = (sides[side].text_encoder_2 for side in ("base", "ft"))
    agrees(out.text_encoder_2, *two, numbered("encoder.block."))
    is_same(out.vae, sides["ft"].vae)


def test_a_lora_on_a_whole_pipeline(diffusers: Any, tmp_path: Path) -> None:
    """The base is a pipeline, the fine-tune a LoRA of its U-Net as diffusers saves it: the output is a pipeline."""
    peft = pytest.importorskip("peft")
    base = stable_diffusion(diffusers, 0, tmp_path)
    base.save_pretrained(tmp_path / "base")
    base.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
    state = peft.get_peft_model_state_dict(base.unet)
    factors = diffusers.utils.convert_state_dict_to_diffusers(state)
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=factors)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "lora", "-o", tmp_path / "out", "--alpha", 0.5, "--beta", 0.0)
    assert ran.code == 0, ran.err
    out = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    plain = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "base", safety_checker=None)
    plain.load_lora_weights(tmp_path / "lora")
    plain.fuse_lora(lora_scale=0.5)
    plain.unload_lora_weights()
    for name, tensor in out.unet.state_dict().items():
        torch.testing.assert_close(tensor, plain.unet.state_dict()[name], rtol=0, atol=1e-6)
    is_same(out.vae, plain.vae)


# --- sentence-transformers ---


@pytest.fixture(scope="module")
def sentence_transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("sentence_transformers")


def sentences(seed: int, tmp_path: Path, *, dense: bool = True) -> Any:
    """A small BERT with pooling and, if `dense`, a dense layer."""
    from sentence_transformers import SentenceTransformer, models
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(seed)
    home = tmp_path / f"transformer-{seed}"
    home.mkdir()
    (home / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\nc")
    BertTokenizer(str(home / "vocab.txt"), model_max_length=32).save_pretrained(home)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=8, max_position_embeddings=40, **sizes)).save_pretrained(home)
    modules = [models.Transformer(str(home), max_seq_length=32), models.Pooling(16)]
    return SentenceTransformer(modules=[*modules, *([models.Dense(16, 8)] if dense else [])], device="cpu")


def in_place_or_not(folder: Path) -> None:
    """As sentence-transformers saved it before version 2: the transformer in a folder of its own."""
    modules = json.loads((folder / "modules.json").read_text())
    within = folder / "0_Transformer"
    within.mkdir()
    for path in list(folder.iterdir()):
        if path.is_file() and path.name not in ("modules.json", "config_sentence_transformers.json", "README.md"):
            path.rename(within / path.name)
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules))


@pytest.mark.parametrize("within", [False, True], ids=["at the top", "in 0_Transformer"])
def test_sentence_transformers(within: bool, sentence_transformers: Any, tmp_path: Path) -> None:
    """The transformer by its own depth, the dense layer by 0.1; the output encodes."""
    sides: Mapping[str, Any] = {}
    for seed, side in enumerate(("base", "ft")):
        sides = {**sides, side: sentences(seed, tmp_path)}
        sides[side].save(str(tmp_path / side))
        if within:
            in_place_or_not(tmp_path / side)
    edit(tmp_path)
    out = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    agrees(out[0], sides["base"][0], sides["ft"][0], numbered("encoder.layer."))
    agrees(out[2], sides["base"][2], sides["ft"][2], lambda _: None)
    assert out.encode(["a b"]).shape == (1, 8)


def test_a_bert_as_the_base_of_sentence_transformers(sentence_transformers: Any, tmp_path: Path) -> None:
    """What most fine-tunes began from: it is paired with the transformer, the dense layer is the fine-tune's."""
    base, ft = sentences(0, tmp_path), sentences(1, tmp_path)
    ft.save(str(tmp_path / "ft"))
    (tmp_path / "transformer-0").rename(tmp_path / "base")
    edit(tmp_path)
    out = sentence_transformers.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    agrees(out[0], base[0], ft[0], numbered("encoder.layer."))
    is_same(out[2], ft[2])
