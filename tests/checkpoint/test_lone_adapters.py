"""Lone files of adapters, rebuilt as kohya's scripts, LyCORIS, ComfyUI and diffusers write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import lines_cli as lines
from lines_cli.errors import CheckpointError, LinesError, MismatchError, UnsupportedError
from lines_cli.plan.unet_names import otherwise
from support.adapters import PREFIX
from support.files import write_checkpoint
from support.run import run_lines

Tensors = dict[str, Tensor]

# A U-Net as diffusers has it, cut down: module -> shape of its weight, as in unet/diffusion_pytorch_model.safetensors.
UNET = {
    "conv_in": (8, 4, 3, 3),
    "time_embedding.linear_1": (16, 8),
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "down_blocks.0.resnets.0.time_emb_proj": (8, 16),
    "down_blocks.0.attentions.0.proj_in": (8, 8, 1, 1),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (8, 8),
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (32, 8),
    "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k": (8, 12),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": (8, 12),
    "mid_block.resnets.1.conv2": (8, 8, 3, 3),
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q": (8, 8),
    "up_blocks.1.upsamplers.0.conv": (8, 8, 3, 3),
}
ORIGINAL = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "down_blocks.0.resnets.0.conv1": "input_blocks.1.0.in_layers.2",
    "down_blocks.0.resnets.0.time_emb_proj": "input_blocks.1.0.emb_layers.1",
    "down_blocks.0.attentions.0.proj_in": "input_blocks.1.1.proj_in",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0":
        "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj":
        "input_blocks.1.1.transformer_blocks.0.ff.net.0.proj",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.attentions.1.transformer_blocks.0.attn2.to_k": "input_blocks.5.1.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v": "middle_block.1.transformer_blocks.0.attn2.to_v",
    "mid_block.resnets.1.conv2": "middle_block.2.out_layers.3",
    "up_blocks.1.attentions.2.transformer_blocks.0.attn1.to_q": "output_blocks.5.1.transformer_blocks.0.attn1.to_q",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
}  # fmt: skip
TEXT = {f"text_model.encoder.layers.{i}.{m}": (12, 12) for i in range(2) for m in ("self_attn.q_proj", "mlp.fc1")}


def weights(shapes: dict[str, tuple[int, ...]], seed: int = 0, before: str = "") -> Tensors:
    chance = torch.Generator().manual_seed(seed)
    return {f"{before}{name}.weight": torch.randn(*shape, generator=chance) for name, shape in shapes.items()}


def kohya(
    shapes: dict[str, tuple[int, ...]], before: str, *, rank: int = 3, seed: int = 5, alpha: float | None = 1.5
) -> Any:
    """Factors as kohya's scripts write them, with dots as underscores; and the updates, by the modules' own names."""
    chance = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    updates: Tensors = {}
    for name, shape in shapes.items():
        down = torch.randn(rank, *shape[1:], generator=chance).half()
        up = torch.randn(shape[0], rank, *([1] * len(shape[2:])), generator=chance).half()
        flat = before + name.replace(".", "_")
        tensors |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up}
        scale = 1.0
        if alpha is not None:
            tensors[f"{flat}.alpha"] = torch.tensor(alpha, dtype=torch.bfloat16)
            scale = alpha / rank
        updates[name] = scale * (up.double().flatten(1) @ down.double().flatten(1)).view(shape)
    return tensors, updates


def folded(folder: Path, base: str = "base", adapter: str = "lora.safetensors", **options: Any) -> Tensors:
    lines.edit(folder / base, folder / adapter, folder / "out", alpha=1, beta=0, force=True, **options)
    return {k: v for file in (folder / "out").glob("*.safetensors") for k, v in load_file(file).items()}


def assert_folded(found: Tensors, before: Tensors, updates: Tensors, called: Any = str) -> None:
    assert found.keys() == before.keys()
    own = {f"{called(name)}.weight": update for name, update in updates.items()}
    assert own.keys() <= before.keys()
    for name, tensor in found.items():
        wanted = before[name].double() + own.get(name, torch.zeros_like(before[name]))
        torch.testing.assert_close(tensor.double(), wanted, rtol=3e-7, atol=6e-7)
        assert torch.equal(tensor, before[name]) == (name not in own)


@pytest.mark.parametrize("alpha", [1.5, None], ids=["alpha", "no alpha"])
def test_kohya_on_diffusers(alpha: float | None, tmp_path: Path) -> None:
    """Underscores are resolved by the base's names, convolutions and all; without an alpha the product is not scaled.
    What is of the text encoder is another part's, left out and said.
    """
    write_checkpoint(tmp_path / "base", weights(UNET), stem="diffusion_pytorch_model")
    tensors, updates = kohya(UNET, "lora_unet_", alpha=alpha)
    text, _ = kohya(TEXT, "lora_te_")
    save_file(
        tensors | text, tmp_path / "lora.safetensors", {"ss_network_module": "networks.lora", "ss_network_dim": "3"}
    )
    assert_folded(folded(tmp_path), weights(UNET), updates)
    ran = run_lines(
        "edit", tmp_path / "base", tmp_path / "lora.safetensors", "-o", tmp_path / "o", "--dry-run", "--json"
    )
    assert any("lora_te" in note and "left out" in note and "4 tensors" in note for note in ran.json["notes"])


def test_kohya_on_the_text_encoder(tmp_path: Path) -> None:
    """The same file on the other part of the pipeline."""
    write_checkpoint(tmp_path / "base", weights(TEXT))
    text, updates = kohya(TEXT, "lora_te_")
    save_file(kohya(UNET, "lora_unet_")[0] | text, tmp_path / "lora.safetensors")
    assert_folded(folded(tmp_path), weights(TEXT), updates)


def test_kohya_of_two_text_encoders(tmp_path: Path) -> None:
    """Of two encoders with the same names the one whose shapes fit is taken."""
    write_checkpoint(tmp_path / "base", weights(TEXT))
    first, updates = kohya(TEXT, "lora_te1_")
    larger = {**dict.fromkeys(TEXT, (20, 20)), "text_model.encoder.layers.2.mlp.fc1": (20, 20)}
    save_file(first | kohya(larger, "lora_te2_")[0], tmp_path / "lora.safetensors")
    assert_folded(folded(tmp_path), weights(TEXT), updates)


def whole_pipeline() -> Tensors:
    return {
        **{f"model.diffusion_model.{ORIGINAL[n]}.weight": t for n, t in zip(UNET, weights(UNET).values(), strict=True)},
        **weights(TEXT, before="cond_stage_model.transformer."),
        "first_stage_model.encoder.conv_in.weight": torch.ones(4, 3, 3, 3),
    }  # fmt: skip


@pytest.mark.parametrize("original", [False, True], ids=["diffusers' names", "the original's names"])
def test_kohya_on_a_file_with_everything(original: bool, tmp_path: Path) -> None:
    """Both parts are found in one file, whichever names the adapter has for the U-Net's modules."""
    base = whole_pipeline()
    write_checkpoint(tmp_path / "base.safetensors", base)
    named = {ORIGINAL[name]: shape for name, shape in UNET.items()} if original else UNET
    unet, updates = kohya(named, "lora_unet_")
    text, text_updates = kohya(TEXT, "lora_te_")
    save_file(unet | text, tmp_path / "lora.safetensors")
    wanted = {f"model.diffusion_model.{name if original else ORIGINAL[name]}": u for name, u in updates.items()}
    wanted |= {f"cond_stage_model.transformer.{name}": update for name, update in text_updates.items()}
    assert_folded(folded(tmp_path, "base.safetensors"), base, wanted)


def test_the_original_s_names_on_diffusers(tmp_path: Path) -> None:
    """As adapters for SDXL are called."""
    write_checkpoint(tmp_path / "base", weights(UNET), stem="diffusion_pytorch_model")
    tensors, updates = kohya({ORIGINAL[name]: shape for name, shape in UNET.items()}, "lora_unet_")
    save_file(tensors, tmp_path / "lora.safetensors")
    back = {new: old for old, new in ORIGINAL.items()}
    assert_folded(folded(tmp_path), weights(UNET), updates, back.__getitem__)


@pytest.mark.parametrize(("name", "other"), ORIGINAL.items())
def test_both_names_of_a_module(name: str, other: str) -> None:
    """Each is the other's, also behind a prefix; and no other name is changed."""
    for prefix in ("", "model.diffusion_model."):
        assert otherwise(f"{prefix}{name}.weight") == f"{prefix}{other}.weight"
        assert otherwise(f"{prefix}{other}.weight") == f"{prefix}{name}.weight"
    for same in ("model.layers.0.conv1.weight", "blocks.1.norm1.weight", "text_model.final_layer_norm.bias", ""):
        assert otherwise(same) == same


@pytest.mark.parametrize("conv", [False, True])
def test_one_by_one(conv: bool, tmp_path: Path) -> None:
    """A linear module and a convolution of one by one are the same to an adapter."""
    shape, other = ((8, 6, 1, 1), (8, 6)) if conv else ((8, 6), (8, 6, 1, 1))
    write_checkpoint(tmp_path / "base", weights({"proj_in": shape}))
    tensors, updates = kohya({"proj_in": other}, "lora_unet_")
    save_file(tensors, tmp_path / "lora.safetensors")
    assert_folded(folded(tmp_path), weights({"proj_in": shape}), {"proj_in": updates["proj_in"].view(shape)})


def test_a_kernel_between_the_factors(tmp_path: Path) -> None:
    """`lora_mid`, in float64: sum over both ranks."""
    write_checkpoint(tmp_path / "base", weights({"conv_in": (8, 6, 3, 3)}))
    down, mid, up = torch.randn(2, 6, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(8, 2, 1, 1)
    flat = {"lora_unet_conv_in.lora_down.weight": down, "lora_unet_conv_in.lora_mid.weight": mid}
    save_file(
        flat | {"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.alpha": torch.tensor(1)},
        tmp_path / "lora.safetensors",
    )
    update = 0.5 * torch.einsum("or,rskl,si->oikl", up.double().flatten(1), mid.double(), down.double().flatten(1))
    assert_folded(folded(tmp_path), weights({"conv_in": (8, 6, 3, 3)}), {"conv_in": update})


def test_lycoris(tmp_path: Path) -> None:
    """LoHa, LoKr with and without ranks, and differences, by their alphas."""
    shapes = {
        "a.loha": (8, 6, 3, 3),
        "a.tucker": (8, 6, 3, 3),
        "a.lokr": (8, 6),
        "a.whole": (8, 6),
        "a.diff": (8, 6),
        "a.norm": (8,),
    }
    base = weights(shapes) | {"a.diff.bias": torch.randn(8)}
    write_checkpoint(tmp_path / "base", base)
    r = torch.randn
    file: Tensors = {
        "lycoris_a_loha.hada_w1_a": r(8, 2), "lycoris_a_loha.hada_w1_b": r(2, 54), "lycoris_a_loha.hada_w2_a": r(8, 2),
        "lycoris_a_loha.hada_w2_b": r(2, 54), "lycoris_a_loha.alpha": torch.tensor(3.0),
        "lycoris_a_tucker.hada_w1_a": r(2, 8), "lycoris_a_tucker.hada_w1_b": r(2, 6),
        "lycoris_a_tucker.hada_w2_a": r(2, 8), "lycoris_a_tucker.hada_w2_b": r(2, 6),
        "lycoris_a_tucker.hada_t1": r(2, 2, 3, 3), "lycoris_a_tucker.hada_t2": r(2, 2, 3, 3),
        "lycoris_a_tucker.alpha": torch.tensor(1.0),
        "lycoris_a_lokr.lokr_w1": r(2, 3), "lycoris_a_lokr.lokr_w2_a": r(4, 2), "lycoris_a_lokr.lokr_w2_b": r(2, 2),
        "lycoris_a_lokr.alpha": torch.tensor(6.0),
        "lycoris_a_whole.lokr_w1": r(4, 2), "lycoris_a_whole.lokr_w2": r(2, 3),
        "lycoris_a_whole.alpha": torch.tensor(9.0),
        "lycoris_a_diff.diff": r(8, 6), "lycoris_a_diff.diff_b": r(8), "lycoris_a_norm.w_norm": r(8),
    }  # fmt: skip
    save_file(file, tmp_path / "lora.safetensors")
    d = {name: tensor.double() for name, tensor in file.items()}

    def of(module: str, *names: str) -> list[Tensor]:
        return [d[f"lycoris_a_{module}.{name}"] for name in names]

    w1a, w1b, w2a, w2b = of("loha", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    loha = 1.5 * ((w1a @ w1b) * (w2a @ w2b)).view(8, 6, 3, 3)
    one, other = (
        torch.einsum("ijkl,jr,ip->prkl", *of("tucker", f"hada_t{n}", f"hada_w{n}_b", f"hada_w{n}_a")) for n in "12"
    )
    w1, a, b = of("lokr", "lokr_w1", "lokr_w2_a", "lokr_w2_b")
    updates = {
        "a.loha": loha,
        "a.tucker": 0.5 * one * other,
        "a.lokr": 3.0 * torch.kron(w1, a @ b),
        "a.whole": torch.kron(*of("whole", "lokr_w1", "lokr_w2")),
        "a.diff": of("diff", "diff")[0],
        "a.norm": of("norm", "w_norm")[0],
    }
    found = folded(tmp_path)
    torch.testing.assert_close(found.pop("a.diff.bias"), base.pop("a.diff.bias") + file["lycoris_a_diff.diff_b"])
    assert_folded(found, base, updates)


OF_DIFFUSERS = {  # N is the module's name, P that behind its block's processor
    "lora_A and lora_B": ("unet.N.lora_A.weight", "unet.N.lora_B.weight"),
    "lora.down and lora.up": ("unet.N.lora.down.weight", "unet.N.lora.up.weight"),
    "lora_linear_layer": ("unet.N.lora_linear_layer.down.weight", "unet.N.lora_linear_layer.up.weight"),
    "processors": ("unet.P_lora.down.weight", "unet.P_lora.up.weight"),
    "processors alone": ("P_lora.down.weight", "P_lora.up.weight"),
    "ComfyUI's": ("diffusion_model.N.lora_A.weight", "diffusion_model.N.lora_B.weight"),
    "ComfyUI's, down and up": ("diffusion_model.N.lora_down.weight", "diffusion_model.N.lora_up.weight"),
    "transformer": ("transformer.N.lora_A.weight", "transformer.N.lora_B.weight"),
}


@pytest.mark.parametrize("spelt", OF_DIFFUSERS.values(), ids=OF_DIFFUSERS)
def test_diffusers(spelt: tuple[str, str], tmp_path: Path) -> None:
    """Every spelling that diffusers had, in a file and in a folder; without an alpha the product is not scaled."""
    shapes = {f"transformer_blocks.{i}.attn1.{m}": (8, 8) for i in range(2) for m in ("to_q", "to_out.0")}
    write_checkpoint(tmp_path / "base", weights(shapes), stem="diffusion_pytorch_model")
    file: Tensors = {}
    updates: Tensors = {}
    for name, shape in shapes.items():
        down, up = torch.randn(2, shape[1]), torch.randn(shape[0], 2)
        of_processor = name.replace("attn1.", "attn1.processor.").removesuffix(".0")
        called = (part.replace("N", name).replace("P", of_processor) for part in spelt)
        file |= dict(zip(called, (down, up), strict=True))
        updates[name] = up.double() @ down.double()
    write_checkpoint(tmp_path / "pytorch_lora_weights.safetensors", file)
    (tmp_path / "folder").mkdir()
    save_file(file, tmp_path / "folder" / "pytorch_lora_weights.safetensors")
    for adapter in ("pytorch_lora_weights.safetensors", "folder"):
        assert_folded(folded(tmp_path, adapter=adapter), weights(shapes), updates)


def test_diffusers_with_configs_inside(tmp_path: Path) -> None:
    """The file's own metadata says how each component is scaled, and is read as strictly as a config."""
    shapes = {f"transformer_blocks.{i}.attn.to_q": (8, 8) for i in range(2)}
    write_checkpoint(tmp_path / "base", weights(shapes), stem="diffusion_pytorch_model")
    file, updates = dict[str, Tensor](), dict[str, Tensor]()
    for number, name in enumerate(shapes):
        rank = 2 + number
        down, up = torch.randn(rank, 8), torch.randn(8, rank)
        file |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
        updates[name] = 6.0 / rank * up.double() @ down.double()
    said: dict[str, Any] = {
        "r": 2,
        "lora_alpha": 6,
        "rank_pattern": {"transformer_blocks.1.attn.to_q": 3},
        "use_dora": False,
    }

    def save(**more: Any) -> None:
        metadata = {
            "lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in (said | more).items()})
        }
        save_file(file, tmp_path / "lora.safetensors", metadata | {"format": "pt"})

    save()
    assert_folded(folded(tmp_path), weights(shapes), updates)
    save(use_something=True)
    with pytest.raises(UnsupportedError, match="use_something"):
        folded(tmp_path)
    # of a model by itself, as its save_lora_adapter writes it: no component before names and keys
    alone = {name.removeprefix("transformer."): tensor for name, tensor in file.items()}
    for keys, refused in (({}, None), ({"use_something": True}, "use_something")):
        config = {"peft_type": "LORA", **said, **keys}
        save_file(alone, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(config)})
        if refused is None:
            assert_folded(folded(tmp_path), weights(shapes), updates)
        else:
            with pytest.raises(UnsupportedError, match=refused):
                folded(tmp_path)
    save_file(file, tmp_path / "lora.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(CheckpointError, match="lora_adapter_metadata is no JSON"):
        folded(tmp_path)


def test_a_file_of_peft_s_beside_its_config(tmp_path: Path) -> None:
    """The file itself may be given; its config is the one beside it."""
    write_checkpoint(tmp_path / "base", weights({"h.0.proj": (8, 6), "h.1.proj": (8, 6)}))
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{PREFIX}h.1.proj.lora_A.weight": down, f"{PREFIX}h.1.proj.lora_B.weight": up},
        tmp_path / "adapter/adapter_model.safetensors",
    )
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    found = folded(tmp_path, adapter="adapter/adapter_model.safetensors")
    assert_folded(
        found, weights({"h.0.proj": (8, 6), "h.1.proj": (8, 6)}), {"h.1.proj": 3.0 * up.double() @ down.double()}
    )


SECOND = {f"text_model.encoder.layers.{i}.{m}": (20, 20) for i in range(3) for m in ("self_attn.q_proj", "mlp.fc1")}
"""The second text encoder of SDXL: the same names, more layers, other sizes."""


def sdxl(folder: Path) -> dict[str, Tensors]:
    """A pipeline's folder; and its components."""
    parts = {"unet": weights(UNET), "text_encoder": weights(TEXT, 1), "text_encoder_2": weights(SECOND, 2)}
    classes = {"unet": ["diffusers", "UNet2DConditionModel"], "text_encoder": ["transformers", "CLIPTextModel"]}
    classes["text_encoder_2"] = ["transformers", "CLIPTextModelWithProjection"]
    write_checkpoint(folder / "unet", parts["unet"], stem="diffusion_pytorch_model", config={"in_channels": 4})
    for name, layers in (("text_encoder", 2), ("text_encoder_2", 3)):
        write_checkpoint(
            folder / name, parts[name], config={"model_type": "clip_text_model", "num_hidden_layers": layers}
        )
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline", **classes}))
    return parts


@pytest.mark.slow
@pytest.mark.parametrize("spelt", ["kohya", "diffusers"])
def test_a_pipeline_with_two_text_encoders(spelt: str, tmp_path: Path) -> None:
    """Each part of the file goes to its own component, though two have modules with the same names."""
    parts = sdxl(tmp_path / "base")
    before = {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
    file, wanted = Tensors(), dict[str, Tensors]()
    for seed, (name, every) in enumerate({"unet": UNET, "text_encoder": TEXT, "text_encoder_2": SECOND}.items()):
        shapes = {module: shape for module, shape in every.items() if spelt == "kohya" or len(shape) == 2}
        own, updates = kohya(shapes, before[name], seed=seed, alpha=1.5 if spelt == "kohya" else None)
        if spelt == "diffusers":
            names = {f"{before[name]}{module.replace('.', '_')}": f"{name}.{module}" for module in shapes}
            ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
            own = {f"{names[n.partition('.')[0]]}.{ends[n.partition('.')[2]]}": t for n, t in own.items()}
        file |= own
        wanted[name] = {f"{module}.weight": update for module, update in updates.items()}
    save_file(file, tmp_path / "lora.safetensors")
    lines.edit(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "out", alpha=1, beta=0)
    for name, tensors in parts.items():
        found = load_file(next((tmp_path / "out" / name).glob("*.safetensors")))
        assert found.keys() == tensors.keys()
        for tensor in found:
            update = wanted[name].get(tensor, torch.zeros(()))
            torch.testing.assert_close(found[tensor].double(), tensors[tensor].double() + update, rtol=3e-7, atol=6e-7)
    # scaled in place, each part by the depth of its own component: as the edit of the whole pipeline has it
    lines.edit_adapter(
        tmp_path / "lora.safetensors", tmp_path / "s.safetensors", base=tmp_path / "base", dtype="float32"
    )
    lines.edit(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "dense")
    lines.edit(tmp_path / "base", tmp_path / "s.safetensors", tmp_path / "again", alpha=1, beta=0)
    for name, tensors in parts.items():
        dense, again = (load_file(next((tmp_path / out / name).glob("*.safetensors"))) for out in ("dense", "again"))
        for tensor in tensors:
            torch.testing.assert_close(again[tensor], dense[tensor], rtol=3e-6, atol=3e-6)
    with pytest.raises(LinesError, match=r"of one model, and .* holds several"):
        lines.edit_adapter(tmp_path / "lora.safetensors", tmp_path / "no", base=tmp_path / "base", layers="fc1")


def test_a_kernel_between_the_factors_in_place_and_merged(tmp_path: Path) -> None:
    """Its product is scaled by one factor; several are no longer factors of one."""
    own = {
        "lora_down": torch.randn(2, 6, 1, 1),
        "lora_mid": torch.randn(2, 2, 3, 3),
        "lora_up": torch.randn(8, 2, 1, 1),
    }
    save_file({f"lora_unet_conv_in.{name}.weight": t for name, t in own.items()}, tmp_path / "lora.safetensors")
    lines.edit_adapter(tmp_path / "lora.safetensors", tmp_path / "out.safetensors", alpha=0.5, beta=0)
    found = load_file(tmp_path / "out.safetensors")
    for name, tensor in own.items():
        assert torch.equal(found[f"lora_unet_conv_in.{name}.weight"], tensor * (0.5 if name == "lora_up" else 1))
    with pytest.raises(UnsupportedError, match="Tucker") as error:
        lines.merge({"models": [{"model": str(tmp_path / "lora.safetensors")}] * 2}, tmp_path / "no", as_adapter=True)
    assert "lines edit BASE" in str(error.value.hint)


# --- FLUX ---

WIDTH = 8


def flux(width: int, columns: int | None = None) -> dict[str, tuple[int, ...]]:
    """The modules of the original: two double blocks, and three single ones. With columns, all have so many."""
    shapes = {"img_in": (width, 4), "txt_in": (width, 6), "final_layer.linear": (4, width)}
    shapes["final_layer.adaLN_modulation.1"] = (2 * width, width)
    for part in ("time_in", "vector_in"):
        shapes |= {f"{part}.in_layer": (width, 5), f"{part}.out_layer": (width, width)}
    for i in range(2):
        for side in ("img", "txt"):
            inner = {"attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.0": (4 * width, width)}
            inner |= {"mlp.2": (width, 4 * width), "mod.lin": (6 * width, width)}
            shapes |= {f"double_blocks.{i}.{side}_{name}": shape for name, shape in inner.items()}
    for i in range(3):
        inner = {"linear1": (7 * width, width), "linear2": (width, 5 * width), "modulation.lin": (3 * width, width)}
        shapes |= {f"single_blocks.{i}.{name}": shape for name, shape in inner.items()}
    return {name: shape if columns is None else (shape[0], columns) for name, shape in shapes.items()}


def as_diffusers(own: Tensors, width: int) -> Tensors:
    """What diffusers has in the place of each tensor, by plain torch."""
    made = Tensors()
    called = {"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}
    for part, there in (("time_in", "timestep"), ("vector_in", "text")):
        called |= {f"{part}.in_layer": f"time_text_embed.{there}_embedder.linear_1"}
        called |= {f"{part}.out_layer": f"time_text_embed.{there}_embedder.linear_2"}
    for i in range(2):
        before, there = f"double_blocks.{i}.", f"transformer_blocks.{i}."
        called |= {
            f"{before}img_attn.proj": f"{there}attn.to_out.0",
            f"{before}txt_attn.proj": f"{there}attn.to_add_out",
        }
        called |= {
            f"{before}img_mod.lin": f"{there}norm1.linear",
            f"{before}txt_mod.lin": f"{there}norm1_context.linear",
        }
        for side, ff in (("img", "ff"), ("txt", "ff_context")):
            called |= {
                f"{before}{side}_mlp.0": f"{there}{ff}.net.0.proj",
                f"{before}{side}_mlp.2": f"{there}{ff}.net.2",
            }
    for i in range(3):
        before, there = f"single_blocks.{i}.", f"single_transformer_blocks.{i}."
        called |= {f"{before}modulation.lin": f"{there}norm.linear", f"{before}linear2": f"{there}proj_out"}
    for name, tensor in own.items():
        module, _, parameter = name.rpartition(".")
        _, _, last = module.partition("_blocks.")
        number = last.partition(".")[0]
        if module.endswith("_attn.qkv"):
            kinds = ("to_q", "to_k", "to_v") if "img" in module else ("add_q_proj", "add_k_proj", "add_v_proj")
            for kind, part in zip(kinds, tensor.chunk(3), strict=True):
                made[f"transformer_blocks.{number}.attn.{kind}.{parameter}"] = part
        elif module.endswith("linear1"):
            kinds = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            for kind, part in zip(kinds, tensor.split([width, width, width, 4 * width]), strict=True):
                made[f"single_transformer_blocks.{number}.{kind}.{parameter}"] = part
        elif module.endswith("adaLN_modulation.1"):
            made[f"norm_out.linear.{parameter}"] = torch.cat(tensor.chunk(2)[::-1])
        else:
            made[f"{called[module]}.{parameter}"] = tensor
    return {name: tensor.contiguous() for name, tensor in made.items()}


@pytest.mark.slow
def test_flux_is_what_diffusers_makes_of_it() -> None:
    """Row by row, by its own conversion."""
    single_file = pytest.importorskip("diffusers.loaders.single_file_utils")
    own: Tensors = {}
    for at, (name, (rows, columns)) in enumerate(flux(3072, 1).items()):
        own[f"{name}.weight"] = (torch.arange(rows * columns).view(rows, columns) + 100_000 * at).double()
        own[f"{name}.bias"] = -own[f"{name}.weight"][:, 0]
    norms = [
        f"double_blocks.{i}.{side}_attn.norm.{kind}_norm.scale"
        for i in range(2)
        for side in ("img", "txt")
        for kind in ("query", "key")
    ]
    norms += [f"single_blocks.{i}.norm.{kind}_norm.scale" for i in range(3) for kind in ("query", "key")]
    found = single_file.convert_flux_transformer_checkpoint_to_diffusers(own | dict.fromkeys(norms, torch.ones(1)))
    wanted = as_diffusers(own, 3072)
    assert wanted.keys() == {name for name in found if ".norm_" not in name or "norm_out" in name}
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("spelt", ["kohya", "ComfyUI"])
def test_flux_with_the_original_s_names_on_diffusers(spelt: str, tmp_path: Path) -> None:
    """Fused queries, keys and values get their own rows of the update; a part of the pipeline that is not there is left
    out.
    """
    before = as_diffusers(weights(flux(WIDTH)), WIDTH)
    write_checkpoint(tmp_path / "base", before, stem="diffusion_pytorch_model")
    tensors, updates = kohya(flux(WIDTH), "lora_unet_", alpha=None)
    if spelt == "ComfyUI":
        names = {f"lora_unet_{name.replace('.', '_')}": f"diffusion_model.{name}" for name in flux(WIDTH)}
        tensors = {f"{names[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in tensors.items()}
    text, _ = kohya(TEXT, "lora_te1_")
    save_file(tensors | text, tmp_path / "lora.safetensors")
    added = as_diffusers({f"{name}.weight": update for name, update in updates.items()}, WIDTH)
    assert_folded(folded(tmp_path), before, {name.removesuffix(".weight"): tau for name, tau in added.items()})
    save_file(tensors, tmp_path / "lora.safetensors")
    lines.edit_adapter(
        tmp_path / "lora.safetensors", tmp_path / "s.safetensors", base=tmp_path / "base", dtype="float32"
    )
    lines.edit(tmp_path / "base", tmp_path / "lora.safetensors", tmp_path / "dense")
    wanted = load_file(tmp_path / "dense" / "diffusion_pytorch_model.safetensors")
    found = folded(tmp_path, adapter="s.safetensors")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=3e-6, atol=3e-6)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_flux_with_the_names_of_diffusers_on_the_original(prefix: str, tmp_path: Path) -> None:
    """Each has its own rows of what is fused there; one of three is enough."""
    before = weights(flux(WIDTH), before=prefix)
    write_checkpoint(tmp_path / "base.safetensors", before)
    own = as_diffusers(weights(flux(WIDTH), 7), WIDTH)
    shapes = {name.removesuffix(".weight"): tuple(tensor.shape) for name, tensor in own.items() if ".to_k." not in name}
    tensors, updates = kohya(shapes, "", alpha=None)
    names = {name.replace(".", "_"): f"transformer.{name}" for name in shapes}
    ends = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    parts = {name: name.partition(".") for name in tensors}
    save_file(
        {f"{names[parts[n][0]]}.{ends[parts[n][2]]}": t for n, t in tensors.items()}, tmp_path / "lora.safetensors"
    )
    lines.edit(
        tmp_path / "base.safetensors", tmp_path / "lora.safetensors", tmp_path / "out.safetensors", alpha=1, beta=0
    )
    found = load_file(tmp_path / "out.safetensors")
    wanted = as_diffusers({name.removeprefix(prefix): tensor for name, tensor in before.items()}, WIDTH)
    wanted = {n: t.double() + updates.get(n.removesuffix(".weight"), 0) for n, t in wanted.items()}
    as_they_are = as_diffusers({name.removeprefix(prefix): tensor for name, tensor in found.items()}, WIDTH)
    assert found.keys() == before.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(as_they_are[name].double(), tensor, rtol=3e-7, atol=6e-7)


def test_names_that_underscores_make_alike(tmp_path: Path) -> None:
    """Two modules of the base that would be called alike are both named."""
    shapes = {"a.b_c": (8, 6), "a_b.c": (8, 6), "d": (8, 6)}
    write_checkpoint(tmp_path / "base", weights(shapes))
    save_file(kohya({"a.b.c": (8, 6), "d": (8, 6)}, "lora_unet_")[0], tmp_path / "lora.safetensors")
    with pytest.raises(MismatchError, match=r"a\.b_c(?s:.*)a_b\.c"):
        folded(tmp_path)


def test_a_module_that_is_not_there(tmp_path: Path) -> None:
    """One module of a component that the base lacks is not left out with the others."""
    write_checkpoint(tmp_path / "base", weights(UNET), stem="diffusion_pytorch_model")
    tensors, _ = kohya({**UNET, "down_blocks.3.attentions.0.proj_in": (8, 8, 1, 1)}, "lora_unet_")
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(MismatchError, match=r"lora_unet_down_blocks_3_attentions_0_proj_in"):
        folded(tmp_path)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"lora_unet_d.lora_down.weight": torch.ones(2, 6)}, "no lora_B"),
        ({"lora_unet_d.alpha": torch.tensor(1.0)}, "has an alpha, and no factors"),
        ({"lora_unet_d.alpha": torch.tensor(float("nan"))}, "alpha of lora_unet_d is nan"),
        ({"lora_unet_d.alpha": torch.ones(3)}, "not a number"),
        ({"lora_unet_d.dora_scale": torch.ones(1, 6)}, "dora_scale"),
        ({"lora_unet_d.oft_blocks": torch.ones(2, 3, 3)}, "oft_blocks"),
        ({"emb_params": torch.ones(2, 6)}, "emb_params"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(tensors: Tensors, said: str, tmp_path: Path) -> None:
    """Each is refused with what is wrong; nothing is written."""
    write_checkpoint(tmp_path / "base", weights({"d": (8, 6), "e": (8, 6), "f": (8, 6)}))
    file, _ = kohya({"e": (8, 6), "f": (8, 6)}, "lora_unet_")
    if "nan" in said or "not a number" in said:
        file |= kohya({"d": (8, 6)}, "lora_unet_")[0]
    save_file(file | tensors, tmp_path / "lora.safetensors")
    with pytest.raises(LinesError, match=said):
        folded(tmp_path)
    assert not (tmp_path / "out").exists()
