"""Names of files that mean something in a checkpoint's folder."""

import os
import re
from functools import lru_cache

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


def turn(name: str) -> tuple[int, str]:
    """Sort key: the order in which the files of an output come where nothing can be renamed. Weights first; behind all
    else what a reader looks for: the config, the index, the recipe.
    """
    last = name.rpartition("/")[2]
    if name.endswith(".safetensors"):
        return 0, name
    ranks = {CONFIG: 2, "adapter_config.json": 2, MODULES: 3, MODEL_INDEX: 3, RECIPE: 4}
    return 3 if last.endswith(".index.json") else ranks.get(last, 1), name


def file_and_part(name: str) -> tuple[str, str | None]:
    """A checkpoint's name, and which part of its file is meant, if it says so: `ft.ckpt#ema`. What is there by the
    whole name is meant by it.
    """
    file, mark, part = name.rpartition("#")
    if not mark or not file or not part or os.path.lexists(os.path.expanduser(name)):
        return name, None
    return file, part


def natural(name: str) -> list[tuple[int, str]]:
    """Sort key: `layers.2` before `layers.10`."""
    return [*map(_part, _NUMBERS.split(name)), (0, name)]


_NUMBERS = re.compile(r"(\d+)")


@lru_cache(maxsize=4096)  # the names of a model are made of few parts; and what is the same thing compares at once
def _part(part: str) -> tuple[int, str]:
    digits = part.lstrip("0")
    return (len(digits), digits) if part.isdecimal() else (0, part)
