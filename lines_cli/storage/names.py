"""Names of files that mean something in a checkpoint's folder."""

WEIGHT_STEMS = ("model", "diffusion_pytorch_model", "open_clip_model")
"""What libraries call weight files, in the order in which we look for them."""

CONFIG = "config.json"
MODEL_INDEX = "model_index.json"
MODULES = "modules.json"
RECIPE = "lines_recipe.yaml"
MODEL_CARD = "README.md"
