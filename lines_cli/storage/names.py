"""Names of files that mean something in a checkpoint's folder."""

import os

WEIGHT_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")
"""What libraries call weight files, in the order in which we look for them."""
PICKLE_STEMS = {
    "pytorch_model": "model",
    "diffusion_pytorch_model": "diffusion_pytorch_model",
    "open_clip_pytorch_model": "open_clip_model",
}
"""What they called them when they were pickles -> what they call them now."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""How files end that torch.save writes."""

CONFIG = "config.json"
MODEL_INDEX = "model_index.json"
MODULES = "modules.json"
RECIPE = "lines_recipe.yaml"
MODEL_CARD = "README.md"


def file_and_part(name: str) -> tuple[str, str | None]:
    """A checkpoint's name, and which part of its file is meant, if it says so: `ft.ckpt#ema`. What is there by the
    whole name is meant by it.
    """
    file, mark, part = name.rpartition("#")
    if not mark or not file or not part or os.path.lexists(os.path.expanduser(name)):
        return name, None
    return file, part
