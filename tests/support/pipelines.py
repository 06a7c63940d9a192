"""Small pipelines as diffusers saves them, folders as sentence-transformers does, and files with everything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from support.files import write_checkpoint

UNET = [
    *(f"down_blocks.{i}.resnets.{j}.conv1.weight" for i in range(3) for j in range(2)),
    *("mid_block.resnets.0.conv1.weight", "conv_in.weight", "conv_out.weight"),
    *(f"up_blocks.{i}.resnets.{j}.conv1.weight" for i in range(3) for j in range(2)),
]
TEXT = [
    *("text_model.embeddings.token_embedding.weight", "text_model.final_layer_norm.weight"),
    *(f"text_model.encoder.layers.{i}.mlp.w" for i in range(4)),
]
VAE = [f"{half}.{i}.resnets.0.conv1.weight" for half in ("encoder.down_blocks", "decoder.up_blocks") for i in range(2)]
COMPONENTS: dict[str, tuple[Sequence[str], str, dict[str, Any]]] = {
    "unet": (UNET, "diffusion_pytorch_model", {"_class_name": "UNet2DConditionModel", "_diffusers_version": "0.30"}),
    "text_encoder": (TEXT, "model", {"model_type": "clip_text_model", "num_hidden_layers": 4}),
    "vae": (VAE, "diffusion_pytorch_model", {"_class_name": "AutoencoderKL", "_diffusers_version": "0.30"}),
}
"""Of each component the names of its tensors, what its weight files are called, and its config."""
DEPTHS = {
    "unet": ([[f"down_blocks.{i}."] for i in range(3)] + [["mid_block."]] + [[f"up_blocks.{i}."] for i in range(3)]),
    "text_encoder": [[f"text_model.encoder.layers.{i}."] for i in range(4)],
}
"""Of the components that are edited what the names in each layer begin with, by hand."""
FILES = {
    "scheduler/scheduler_config.json": '{"_class_name": "DDIMScheduler"}',
    "tokenizer/vocab.json": '{"a": 0}',
    "tokenizer/merges.txt": "#version: 0.2",
    "feature_extractor/preprocessor_config.json": "{}",
    "pipeline.py": "raise SystemExit('never run')\n",
    "unet/my_unet.py": "raise SystemExit('not run either')\n",
    "LICENSE.md": "mine",
}
"""What lies beside the weights."""

Tensors = dict[str, torch.Tensor]


def tensors(names: Sequence[str], seed: int, dtype: torch.dtype = torch.float32) -> Tensors:
    """A [4, 3] tensor of each name."""
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 3, generator=random).to(dtype) for name in names}


def write_pipeline(folder: Path, seed: int, *, leave_out: Sequence[str] = (), **changed: Any) -> Path:
    """Write a pipeline with a U-Net, a text encoder and a VAE.

    Args:
        folder: where.
        seed: of all its tensors.
        leave_out: components that it does not have.
        changed: by a component's name: its tensors instead; or keywords of `write_checkpoint`.
    """
    index: dict[str, Any] = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.30.0"}
    for number, (name, (names, stem, config)) in enumerate(COMPONENTS.items()):
        index[name] = [None, None] if name in leave_out else ["transformers" if stem == "model" else "diffusers", "X"]
        if name not in leave_out:
            said = changed.get(name, {})
            own = {"tensors": said} if any(isinstance(value, torch.Tensor) for value in said.values()) else dict(said)
            held = own.pop("tensors", None) or tensors(names, 100 * seed + number)
            write_checkpoint(folder / name, held, **{"stem": stem, "config": config} | own)
    for name, content in FILES.items():
        if name.partition("/")[0] not in leave_out:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(content)
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"], "safety_checker": [None, None]}
    index |= {"requires_safety_checker": False}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def loaded(folder: Path) -> dict[str, Tensors]:
    """The tensors of each component, by its folder."""
    found: dict[str, Tensors] = {}
    for path in sorted(folder.rglob("*.safetensors")):
        found.setdefault(path.parent.relative_to(folder).as_posix(), {}).update(load_file(path))
    return found


def scaled(
    base: Tensors, ft: Tensors, layers: Sequence[Sequence[str]], alpha: float = 0.1, beta: float = 0.9
) -> Tensors:
    """LiNeS by hand: `base + c * (ft - base)` in float32, rounded once; alpha outside the layers."""
    found = {}
    for name, tensor in ft.items():
        index = next((at for at, begins in enumerate(layers) if name.startswith(tuple(begins))), None)
        c = alpha if index is None else alpha + beta * index / (len(layers) - 1)
        c = alpha + beta if index == len(layers) - 1 else c
        old = base[name].float()
        made = tensor.float() if c == 1 else old if c == 0 else old + torch.tensor(c) * (tensor.float() - old)
        found[name] = made.to(tensor.dtype)
    return found


EVERYTHING = {
    "model.diffusion_model.": [
        *(f"{half}_blocks.{i}.0.w" for half in ("input", "output") for i in range(3)),
        "middle_block.0.w",
    ],
    "first_stage_model.": [f"decoder.up.{i}.block.0.conv1.weight" for i in range(3)],
    "cond_stage_model.transformer.": [f"text_model.encoder.layers.{i}.mlp.w" for i in range(4)],
    "": ["alphas_cumprod"],
}
"""Of a single file what names begin with, and how they go on."""


def write_everything(path: Path, seed: int, parts: Mapping[str, Sequence[str]] = EVERYTHING) -> Path:
    """Write a single file with everything."""
    return write_checkpoint(path, tensors([prefix + name for prefix, names in parts.items() for name in names], seed))


def write_modules(
    folder: Path, seed: int, *, within: str = "", dense: bool = True, more: Mapping[str, Any] | None = None
) -> Path:
    """Write a folder as sentence-transformers does: a transformer in it or within a folder of it, pooling, dense."""
    names = [*(f"encoder.layer.{i}.w" for i in range(3)), "embeddings.word_embeddings.weight"]
    write_checkpoint(folder / within, tensors(names, seed), config={"model_type": "bert", "num_hidden_layers": 3})
    (folder / within / "tokenizer.json").write_text("{}")
    kind = "sentence_transformers.models."
    modules = [{"idx": 0, "name": "0", "path": within, "type": f"{kind}Transformer"}]
    modules.append({"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}Pooling"})
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    (folder / "1_Pooling/config.json").write_text('{"word_embedding_dimension": 3}')
    if dense:
        modules.append({"idx": 2, "name": "2", "path": "2_Dense", "type": f"{kind}Dense"})
        held = tensors(["linear.weight", "linear.bias"], 50 + seed)
        write_checkpoint(folder / "2_Dense", held, config={"in_features": 3})
    (folder / "modules.json").write_text(json.dumps(modules))
    for name, content in (more or {}).items():
        (folder / name).write_text(content)
    return folder
