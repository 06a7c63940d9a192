"""Merges of one YAML file by mergekit and by lines, held against each other.

mergekit runs in a process of its own. How far the two are apart is a property of each test (`--junit-xml` keeps them,
`-rP` shows them). The unit of a difference is an ulp, in the output's dtype, of the largest number that an entry is
made of or becomes.
"""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support.files import write_checkpoint
from support.run import run_lines
from support.tokenizers import write_tokenizer

pytestmark = pytest.mark.slow

MERGE_ALL = """
import sys, traceback
from mergekit.scripts.run_yaml import main
for name in sys.argv[1:]:
    files = [name + ".yaml", name + ".mergekit"]
    try:
        main([*files, "--no-copy-tokenizer", "--no-write-model-card", "--quiet"], standalone_mode=False)
    except Exception:
        with open(name + ".failed", "w") as file:
            traceback.print_exc(file=file)
"""

# --- the cases ---

# How many ulps the two may be apart, by how the files are stored and what the recipe says of dtypes:
#   float32     float32 files. Both compute in float32.
#   widened     bfloat16 files, `dtype: float32, out_dtype: bfloat16`. Both compute in float32 and round once.
#   bfloat16    bfloat16 files, `dtype: bfloat16`. mergekit computes in it, but for linear and slerp; lines in float32.
#   narrowed    float32 files, `dtype: bfloat16`. mergekit first rounds what it reads.
DTYPES = {
    "float32": ("f32", ""),
    "widened": ("bf16", "dtype: float32\nout_dtype: bfloat16\n"),
    "bfloat16": ("bf16", "dtype: bfloat16\n"),
    "narrowed": ("f32", "dtype: bfloat16\n"),
}

# The same operations in the same order: equal bits. In bfloat16 mergekit rounds the inputs, weights, differences,
# products, sum, lambda and result; together these move an entry by less than 12 ulps as long as lambda times the sum of
# the weights' magnitudes, which multiplies most of them, is at most 1.
SUM = {"float32": 0, "widened": 0, "bfloat16": 12, "narrowed": 12}

# mergekit's linear adds products without rounding them first (fused multiply-add, where the processor has it), and its
# slerp measures angles in float32: about ten roundings of half an ulp between the two. It computes these two methods in
# float32 whatever the dtype.
WHOLE = {"float32": 6, "widened": 1, "bfloat16": 1, "narrowed": 2}

# Where each product but the first is exact (a weight is a power of two) fused or not makes no difference.
EXACT = {"float32": 0, "widened": 0, "bfloat16": 0, "narrowed": 0}
EXACT_PRODUCTS = {"float32": 0, "widened": 0, "bfloat16": 0, "narrowed": 2}

# In bfloat16 a rounded sum may have another sign, and a rounded magnitude fall on the other side of a threshold: up to
# VOTED_APART of all entries are not merged from the same models, and may be anywhere among the task vectors.
VOTED = SUM
VOTED_APART = 0.01

# mergekit measures lengths and angles in float32, or in bfloat16; lines in float64. The rest is as in a sum.
MEASURED = {"float32": 12, "widened": 1, "bfloat16": 12, "narrowed": 12}


@dataclass(frozen=True)
class Case:
    """One recipe, as mergekit and lines both read it.

    Attributes:
        ulps: how far apart the two may be, by `DTYPES`.
        yaml: the file, but for its dtype.
        sets: what lines has to be told beside it.
        votes: whether signs are elected (TIES).
        densities: of the models, where something is trimmed; empty if they vary over tensors.
        otherwise: by `DTYPES`, the share of entries that may be on the other side of a bound that mergekit measures
            less exactly, and then be anything among the models.
        stacked: whether layers have other numbers than in the models.
    """

    ulps: Mapping[str, int]
    yaml: str
    sets: tuple[str, ...] = ()
    votes: bool = False
    densities: tuple[float, ...] | None = None
    otherwise: Mapping[str, float] = field(default_factory=dict)
    stacked: bool = False


BY_TENSOR = "parameters.trim=tensor"  # which mergekit has no word for, as it does nothing else

CASES = {
    "linear": Case(
        WHOLE,
        """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.4}}
""",
    ),
    "linear, two halves": Case(
        EXACT_PRODUCTS,
        """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
""",
    ),
    "linear, not normalized": Case(
        EXACT_PRODUCTS,
        """
merge_method: linear
models:
  - {model: a, parameters: {weight: 0.9}}
  - {model: b, parameters: {weight: -0.25}}
parameters: {normalize: false}
""",
    ),
    "linear, gradients and filters": Case(
        WHOLE,
        """
merge_method: linear
models:
  - model: a
    parameters:
      weight:
        - {filter: mlp, value: [0.1, 0.9]}
        - {filter: self_attn, value: 0.3}
  - {model: b, parameters: {weight: [1, 0.2, 0.7]}}
parameters: {weight: 0.6}
""",
    ),
    "task arithmetic": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: -0.2}}
parameters: {lambda: 0.7}
""",
    ),
    "task arithmetic, one model": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
parameters: {lambda: [0, 1]}
""",
    ),
    "task arithmetic, normalized": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.2}}
parameters: {normalize: true}
""",
    ),
    "task arithmetic, gradients and filters": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - {model: a, parameters: {weight: [0.2, 0.6]}}
  - model: b
    parameters:
      weight:
        - {filter: q_proj, value: 0.4}
        - {filter: "*", value: [0.1, 0.4, 0.2]}
parameters: {lambda: [0.1, 1.0]}
""",
    ),
    "task arithmetic, slices": Case(
        SUM,
        """
slices:
  - sources:
      - {model: a, layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: 0.9}]}}
      - {model: base, layer_range: [0, 3]}
    parameters:
      weight: [{filter: self_attn, value: 0.5}]
      lambda: [{filter: mlp, value: 0.3}]
merge_method: task_arithmetic
base_model: base
parameters: {weight: 0.25, lambda: 0.8}
""",
    ),
    "task arithmetic, one layer": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: one-base
models:
  - {model: one-a, parameters: {weight: [0.2, 0.6]}}
  - {model: one-b, parameters: {weight: 0.3}}
parameters: {lambda: [0.1, 0.5, 1.0]}
""",
    ),
    "task arithmetic, lambda as LiNeS": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {lambda: [0.1, 1.0]}
""",
        sets=("parameters.lambda=1", "lines={alpha: 0.1, beta: 0.9}"),
    ),
    "ties": Case(
        VOTED,
        """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 1.0, density: 0.4}}
  - {model: b, parameters: {weight: 0.8, density: 0.6}}
  - {model: c, parameters: {weight: 0.5, density: 0.3}}
""",
        sets=(BY_TENSOR,),
        votes=True,
        densities=(0.4, 0.6, 0.3),
    ),
    "ties, not normalized": Case(
        VOTED,
        """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: -0.2}}
parameters: {normalize: false, density: 0.5, lambda: 1.1, int8_mask: true}
""",
        sets=(BY_TENSOR,),
        votes=True,
        densities=(0.5, 0.5, 0.5),
    ),
    "ties, gradients and filters": Case(
        VOTED | {"widened": 12},  # thresholds vary, and so does what lies on them
        """
merge_method: ties
base_model: base
models:
  - model: a
    parameters:
      density: [0.2, 0.9]
      weight:
        - {filter: mlp, value: [0.5, 1]}
        - {filter: norm, value: 0.2}
  - {model: b, parameters: {density: [{filter: self_attn, value: 0.5}], weight: 0.8}}
parameters: {density: 0.7, weight: 0.3, lambda: [1, 0.5, 1]}
""",
        sets=(BY_TENSOR,),
        votes=True,
        densities=(),
    ),
    "dare_linear": Case(
        SUM,
        """
merge_method: dare_linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.3}}
parameters: {density: 1, lambda: 0.9}
""",
    ),
    "dare_ties": Case(
        VOTED,
        """
merge_method: dare_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.35}}
  - {model: c, parameters: {weight: 0.25}}
parameters: {density: 1}
""",
        votes=True,
    ),
    "dare_ties, normalized": Case(
        VOTED,
        """
merge_method: dare_ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.5}}
  - {model: c, parameters: {weight: 0.3}}
parameters: {density: 1, normalize: true}
""",
        votes=True,
    ),
    "slerp": Case(
        WHOLE,
        """
merge_method: slerp
base_model: a
models:
  - model: a
  - model: b
parameters: {t: 0.35}
""",
    ),
    "slerp, base listed last": Case(
        WHOLE,
        """
merge_method: slerp
base_model: b
models:
  - model: a
  - model: b
parameters: {t: [0.2, 0.9]}
""",
    ),
    "slerp, base not listed": Case(
        WHOLE,
        """
merge_method: slerp
base_model: base
models:
  - model: a
parameters: {t: 0.6}
""",
    ),
    "slerp, slices and filters": Case(
        WHOLE,
        """
slices:
  - sources:
      - model: a
        layer_range: [0, 3]
      - model: b
        layer_range: [0, 3]
merge_method: slerp
base_model: a
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5
""",
    ),
    "passthrough": Case(
        {"float32": 0, "widened": 0, "bfloat16": 0, "narrowed": 0},
        """
merge_method: passthrough
models:
  - model: a
""",
    ),
    "passthrough, scaled": Case(
        EXACT_PRODUCTS,
        """
merge_method: passthrough
models:
  - model: a
    parameters:
      scale:
        - {filter: o_proj, value: 0}
        - {filter: down_proj, value: [0.3, 0.9]}
        - {value: 1}
""",
    ),
    "passthrough, layers stacked": Case(
        EXACT,
        """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [1, 3]}]
  - sources: [{model: a, layer_range: [0, 3]}]
""",
        stacked=True,
    ),
    "passthrough, layers that give nothing": Case(
        EXACT,
        """
slices:
  - sources: [{model: a, layer_range: [0, 2]}]
  - sources:
      - model: a
        layer_range: [1, 2]
        parameters:
          scale:
            - {filter: o_proj, value: 0.0}
            - {filter: down_proj, value: 0.0}
            - {value: 1.0}
  - sources: [{model: a, layer_range: [2, 3]}]
merge_method: passthrough
""",
        stacked=True,
    ),
    "passthrough, the last layers left out": Case(
        EXACT, "merge_method: passthrough\nslices: [{sources: [{model: c, layer_range: [0, 2]}]}]\n", stacked=True
    ),
    "slerp, layers stacked": Case(
        WHOLE,
        """
merge_method: slerp
base_model: a
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
    parameters: {t: [{filter: mlp, value: [0.1, 0.9]}]}
  - sources: [{model: b, layer_range: [0, 2]}, {model: a, layer_range: [1, 3]}]
parameters: {t: [0.2, 0.4, 0.9]}
""",
        stacked=True,
    ),
    "task arithmetic, layers stacked": Case(
        SUM,
        """
merge_method: task_arithmetic
base_model: base
slices:
  - sources:
      - {model: base, layer_range: [0, 2]}
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.7]}}
      - {model: b, layer_range: [0, 2]}
  - sources:
      - {model: c, layer_range: [1, 3]}
      - {model: base, layer_range: [1, 3]}
      - {model: b, layer_range: [1, 3], parameters: {weight: [{filter: mlp, value: 0.1}]}}
    parameters: {lambda: [{filter: self_attn, value: 0.3}]}
parameters: {weight: 0.25, lambda: [0.5, 0.9]}
""",
        stacked=True,
    ),
    "linear, slices of whole models": Case(
        WHOLE,
        """
merge_method: linear
slices:
  - sources: [{model: a, layer_range: [0, 1], parameters: {weight: 1}}, {model: b, layer_range: [0, 1]}]
  - sources: [{model: a, layer_range: [1, 3], parameters: {weight: [0, 1]}}, {model: b, layer_range: [1, 3]}]
    parameters: {weight: 0.5}
parameters: {weight: [0.3, 0.6]}
""",
    ),
    "nuslerp": Case(
        MEASURED,
        """
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.7}}
  - {model: b, parameters: {weight: 0.4}}
parameters: {int8_mask: true}
""",
    ),
    "nuslerp, no base": Case(
        MEASURED,
        """
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: [0.2, 0.8]}}
  - {model: b, parameters: {weight: [{filter: mlp, value: 0.9}, {value: 0.3}]}}
""",
    ),
    "nuslerp, rows": Case(
        MEASURED,
        """
merge_method: nuslerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.5}}
parameters: {nuslerp_flatten: false}
""",
    ),
    "nuslerp, columns": Case(
        MEASURED,
        """
merge_method: nuslerp
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 1.5}}
parameters: {nuslerp_flatten: false, nuslerp_row_wise: true}
""",
    ),
    "multislerp": Case(
        MEASURED,
        """
merge_method: multislerp
base_model: base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: [0.1, 0.9]}}
  - {model: c, parameters: {weight: [{filter: self_attn, value: 0.2}, {value: 1.3}]}}
""",
    ),
    "multislerp, no base, not normalized": Case(
        MEASURED,
        """
merge_method: multislerp
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
parameters: {normalize_weights: false, eps: 1.0e-7}
""",
    ),
    "karcher": Case(
        MEASURED,
        """
merge_method: karcher
models:
  - model: a
  - model: b
  - model: c
""",
    ),
    "karcher, a base and few steps": Case(
        MEASURED,
        """
merge_method: karcher
base_model: base
models:
  - model: a
  - model: b
parameters: {max_iter: 3, tol: 1.0e-9}
""",
    ),
    "model_stock": Case(
        MEASURED,
        """
merge_method: model_stock
base_model: base
models:
  - model: a
  - model: b
  - model: c
""",
    ),
    "model_stock, rows": Case(
        MEASURED,
        """
merge_method: model_stock
base_model: base
models:
  - model: base
  - model: a
  - model: b
parameters: {filter_wise: true}
""",
    ),
    "della, nothing dropped": Case(
        VOTED,
        """
merge_method: della
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: [0.1, 0.4]}}
  - {model: c, parameters: {weight: 0.2}}
parameters: {density: 1, epsilon: 0.2, lambda: 0.9, int8_mask: true}
""",
        votes=True,
    ),
    "della, not normalized": Case(
        VOTED,
        """
merge_method: della
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.5, density: 0}}
parameters: {density: 1, normalize: false}
""",
        votes=True,
    ),
    "della_linear, nothing dropped": Case(
        SUM,
        """
merge_method: della_linear
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
parameters: {density: 1, lambda: [0.5, 1], normalize: true}
""",
    ),
    "sce": Case(
        MEASURED,
        """
merge_method: sce
base_model: base
models:
  - model: a
  - model: b
  - model: c
parameters: {int8_mask: true}
""",
        votes=True,
        otherwise=dict.fromkeys(("bfloat16", "narrowed"), VOTED_APART),
    ),
    "sce of the most": Case(
        MEASURED,
        """
merge_method: sce
base_model: base
models:
  - model: a
  - model: b
  - model: c
parameters:
  select_topk: [{filter: mlp, value: 0.3}, {value: [0.5, 0.9]}]
""",
        votes=True,
        # of equal variances, of which bfloat16 makes many, mergekit takes any, lines all
        otherwise={"widened": VOTED_APART, "bfloat16": VOTED_APART, "narrowed": VOTED_APART},
    ),
    "ram": Case(
        MEASURED,
        """
merge_method: ram
base_model: base
models:
  - model: a
  - model: b
  - model: c
parameters: {epsilon: 0.005}
""",
        otherwise={"bfloat16": 0.02, "narrowed": 0.02},  # differences that bfloat16 rounds to the other side of epsilon
    ),
    "ramplus_tl": Case(
        MEASURED,
        """
merge_method: ramplus_tl
base_model: base
models:
  - model: a
  - model: b
  - model: c
parameters: {epsilon: 0.005, r: 0.4, alpha: 0.5}
""",
        otherwise={"bfloat16": 0.02, "narrowed": 0.02},  # differences that bfloat16 rounds to the other side of epsilon
    ),
    "nearswap": Case(
        MEASURED,
        """
merge_method: nearswap
base_model: base
models:
  - model: base
  - model: a
parameters: {t: 0.003}
""",
    ),
    "arcee_fusion": Case(
        MEASURED,
        """
merge_method: arcee_fusion
base_model: base
models:
  - model: base
  - model: b
""",
        # importance is the product of a difference and of a divergence that is nearly 0: float32 knows few digits of it
        otherwise={"float32": 0.001, "widened": 0.001, "bfloat16": 0.5, "narrowed": 0.5},
    ),
}

REFUSED = {
    "t for some tensors only": """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters:
  t: [{filter: mlp, value: 0.5}]
""",
    "slerp of three": """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}, {model: c}]
parameters: {t: 0.5}
""",
    "passthrough of two": """
merge_method: passthrough
models: [{model: a}, {model: b}]
""",
    "model_stock of one": """
merge_method: model_stock
base_model: base
models: [{model: a}]
""",
    "nuslerp of three": """
merge_method: nuslerp
models: [{model: a}, {model: b}, {model: c}]
parameters: {weight: 1}
""",
    "nearswap of two": """
merge_method: nearswap
base_model: base
models: [{model: a}, {model: b}]
parameters: {t: 0.1}
""",
    "arcee_fusion without a base": """
merge_method: arcee_fusion
models: [{model: a}, {model: b}]
""",
    "sce without a base": """
merge_method: sce
models: [{model: a}, {model: b}]
""",
    "della whose probabilities pass 1": """
merge_method: della
base_model: base
models: [{model: a, parameters: {weight: 1, density: 0.9, epsilon: 0.2}}]
""",
    "task arithmetic without a base": """
merge_method: task_arithmetic
models: [{model: a, parameters: {weight: 1}}]
""",
}

OTHERS = {
    "density": """
merge_method: task_arithmetic
base_model: base
models:
  - {model: a, parameters: {weight: 0.5, density: 0.4}}
  - {model: b, parameters: {weight: 0.5, density: 0.6}}
""",
    "widths": """
merge_method: task_arithmetic
base_model: ../bf16/base
models:
  - {model: a, parameters: {weight: 0.5}}
  - {model: b, parameters: {weight: 0.25}}
""",
    "norms": """
merge_method: dare_linear
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
parameters: {density: 0.5, rescale: true}
""",
    "ranked": """
merge_method: della_linear
base_model: base
models:
  - {model: a, parameters: {weight: 1}}
parameters: {density: 0.5, epsilon: 0.4}
""",
    "rescaled-ties": """
merge_method: ties
base_model: base
models:
  - {model: a, parameters: {weight: 0.4}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: -0.2}}
parameters: {density: 0.3, rescale: true}
""",
}


# --- what is merged, and by whom ---


@pytest.fixture(scope="session")
def mergekit() -> None:
    """The version that lines is compared with, which `make slow` installs beside the tests."""
    try:
        version = importlib.metadata.version("mergekit")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if version != "0.1.5":
        pytest.fail(f"mergekit 0.1.5 is needed, {version} is installed: run make slow", pytrace=False)


def _write_models(folder: Path) -> None:
    """The models base, a, b and c in float32 and bfloat16, of three layers and of one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    for prefix, layers in (("", 3), ("one-", 1)):
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )
        torch.manual_seed(0)
        fresh = LlamaForCausalLM(config).state_dict()
        base = {name: tensor + 0.01 * torch.randn(tensor.shape) for name, tensor in fresh.items()}
        for model in ("base", "a", "b", "c"):
            # Matrices far enough apart for slerp's arc, norms so near that it takes the line.
            moved = {
                name: tensor + (0.01 if tensor.ndim == 2 else 0.003) * torch.randn(tensor.shape)
                for name, tensor in base.items()
            }
            tensors = base if model == "base" else moved
            for stored, dtype in (("f32", torch.float32), ("bf16", torch.bfloat16)):
                write_checkpoint(
                    folder / stored / f"{prefix}{model}",
                    {name: tensor.to(dtype) for name, tensor in tensors.items()},
                    shards=3 if model == "b" else 1,
                    config=config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")},
                )


def _named(text: str) -> str:
    return text.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, mergekit: None) -> Path:
    """A folder with models and recipes, and what mergekit makes of them: NAME.mergekit, or NAME.failed."""
    folder = tmp_path_factory.mktemp("mergekit")
    _write_models(folder)
    recipes: dict[str, list[str]] = {"f32": [], "bf16": []}
    texts = {("f32", _named(name)): text for name, text in (REFUSED | OTHERS).items()}
    for dtype, (stored, says) in DTYPES.items():
        texts |= {(stored, _named(f"{name}-{dtype}")): case.yaml + says for name, case in CASES.items()}
    for (stored, name), text in texts.items():
        (folder / stored / f"{name}.yaml").write_text(text.lstrip(), encoding="utf-8")
        recipes[stored].append(name)
    for stored, names in recipes.items():  # one process each: mergekit keeps models open by their name
        ran = subprocess.run(
            [sys.executable, "-c", MERGE_ALL, *names],
            cwd=folder / stored,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if ran.returncode:
            pytest.fail(f"mergekit does not run:\n{ran.stdout[-10_000:]}", pytrace=False)
    return folder


def _load(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def _of_mergekit(world: Path, recipe: str) -> dict[str, torch.Tensor]:
    failed = world / f"{recipe}.failed"
    assert not failed.exists(), failed.read_text()
    return _load(world / f"{recipe}.mergekit")


def _of_lines(world: Path, recipe: str, out: Path, *sets: str) -> dict[str, torch.Tensor]:
    said = [word for text in sets for word in ("--set", text)]
    ran = run_lines("merge", "--config", world / f"{recipe}.yaml", "-o", out, *said)
    assert ran.code == 0, ran.err + ran.trace
    return _load(out)


def _inputs(folder: Path, models: str) -> list[dict[str, torch.Tensor]]:
    return [_load(folder / f"{models}{model}") for model in ("base", "a", "b", "c")]


# --- the comparison ---


def _ulps(one: torch.Tensor, other: torch.Tensor, made_of: list[torch.Tensor]) -> torch.Tensor:
    """The distance of two results, entry by entry, in ulps of the largest number at hand."""
    largest = torch.stack([tensor.double().abs() for tensor in (one, other, *made_of)]).amax(0)
    digits = {torch.float32: 24, torch.bfloat16: 8}[one.dtype]
    ulp = torch.exp2(torch.frexp(largest).exponent.double() - digits)
    return (one.double() - other.double()).abs() / ulp


def _on_threshold(inputs: list[torch.Tensor], densities: tuple[float, ...]) -> torch.Tensor:
    """Where any model's entry is exactly as large as the smallest that its density keeps of the tensor."""
    base, *models = (tensor.float() for tensor in inputs)
    found = torch.zeros_like(base, dtype=torch.bool)
    for model, density in zip(models, densities, strict=True):
        magnitude = (model - base).abs()
        kept = max(1, int(density * magnitude.numel()))
        found |= magnitude == magnitude.flatten().sort(descending=True).values[kept - 1]
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_one_yaml_gives_one_model(
    name: str, dtype: str, world: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    """From the same file mergekit and lines make the same tensors, apart by no more than the stated ulps."""
    case, stored = CASES[name], DTYPES[dtype][0]
    recipe = f"{stored}/{_named(f'{name}-{dtype}')}"
    theirs, ours = _of_mergekit(world, recipe), _of_lines(world, recipe, tmp_path / "out", *case.sets)
    if "dtype: bfloat16" in DTYPES[dtype][1]:  # some of its methods write float32 nevertheless
        theirs = {key: tensor.to(torch.bfloat16) for key, tensor in theirs.items()}
    base, *models = _inputs(world / stored, "one-" if "one layer" in name else "")
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in ours.items()} == {
        key: (tensor.shape, tensor.dtype) for key, tensor in theirs.items()
    }

    largest = largest_ulps = 0.0
    entries = differing = beyond = 0
    for key, one in ours.items():
        other, inputs = theirs[key], [model[key] for model in (base, *models) if key in model]
        if case.stacked:  # of which entry it is made is not that of its name
            inputs = [one.abs().max().expand_as(one)]
        difference, apart = (one.double() - other.double()).abs(), _ulps(one, other, inputs)
        if dtype == "widened" and case.densities:
            # Task vectors of bfloat16 weights have many entries of one magnitude; mergekit keeps any of those that lie
            # on the threshold, lines all.
            assert not bool(difference[~_on_threshold(inputs, case.densities)].any())
        if case.votes:  # whoever agrees, their mean (or sum, with weights of 1 in all) is no longer than the longest
            longest = torch.stack([(model.double() - inputs[0].double()).abs() for model in inputs[1:]]).amax(0)
            assert bool(((difference <= 2 * longest) | (apart <= 12)).all())
        entries += one.numel()
        differing += int((difference != 0).sum())
        beyond += int((apart > case.ulps[dtype]).sum())
        largest, largest_ulps = max(largest, float(difference.max())), max(largest_ulps, float(apart.max()))
    report = (
        f"at most {largest:.3g}, {largest_ulps:.3g} ulps; {differing / entries:.4%} of entries differ, "
        f"{beyond / entries:.4%} by more than {case.ulps[dtype]} ulps"
    )
    record_property("mergekit", report)
    print(f"{name}, {dtype}: {report}")

    undecided = case.votes and (
        dtype in ("bfloat16", "narrowed") or (dtype == "widened" and case.densities is not None)
    )
    assert beyond <= entries * case.otherwise.get(dtype, VOTED_APART if undecided else 0), report


@pytest.mark.parametrize("name", REFUSED)
def test_what_mergekit_refuses_is_an_error(name: str, world: Path, tmp_path: Path) -> None:
    """A file that leaves open what it means is refused by both; by lines as a recipe that says something impossible."""
    assert (world / "f32" / f"{_named(name)}.failed").exists()
    ran = run_lines("merge", "--config", world / "f32" / f"{_named(name)}.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (2, "")


def test_mergekit_ignores_the_density_of_task_arithmetic(world: Path, tmp_path: Path) -> None:
    """Task arithmetic with a density is in mergekit what it is in lines without one."""
    theirs = _of_mergekit(world, "f32/density")
    trimmed = _of_lines(world, "f32/density", tmp_path / "trimmed")
    dense = ("models.0.parameters.density=1", "models.1.parameters.density=1")
    ours = _of_lines(world, "f32/density", tmp_path / "dense", *dense)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert any(not torch.equal(trimmed[name], theirs[name]) for name in theirs)


def test_mergekit_writes_the_widest_dtype(world: Path, tmp_path: Path) -> None:
    """Of a bfloat16 base and float32 models mergekit makes float32, lines bfloat16; told the dtype they agree."""
    theirs = _of_mergekit(world, "f32/widths")
    as_is = _of_lines(world, "f32/widths", tmp_path / "as-is")
    told = _of_lines(world, "f32/widths", tmp_path / "told", "dtype=float32")
    assert {tensor.dtype for tensor in theirs.values()} == {torch.float32}
    assert {tensor.dtype for tensor in as_is.values()} == {torch.bfloat16}
    assert all(torch.equal(told[name], theirs[name]) for name in theirs)


def test_rescale_true_restores_norms_in_both(world: Path, tmp_path: Path) -> None:
    """DARE with `rescale: true` gives each tensor's task vector the L1 norm it had, whatever is drawn."""
    base, model = _load(world / "f32" / "base"), _load(world / "f32" / "a")
    for made in (_of_mergekit(world, "f32/norms"), _of_lines(world, "f32/norms", tmp_path / "out")):
        for name, tensor in made.items():
            before, after = ((side[name].double() - base[name].double()) for side in (model, {name: tensor}))
            assert 0.3 < float((after != 0).double().mean()) < 0.7
            assert float(after.abs().sum()) == pytest.approx(float(before.abs().sum()), rel=1e-4)


def test_entries_are_kept_by_rank_in_both(world: Path, tmp_path: Path) -> None:
    """What DELLA draws differs, by design; in both the smallest entries of rows are kept as rarely, the largest as
    often, and what is kept has the tensor's L1 norm.
    """
    base, model = _load(world / "f32" / "base"), _load(world / "f32" / "a")
    for made in (_of_mergekit(world, "f32/ranked"), _of_lines(world, "f32/ranked", tmp_path / "out")):
        kept: list[torch.Tensor] = []
        for name, tensor in made.items():
            before, after = ((side[name].double() - base[name].double()) for side in (model, {name: tensor}))
            assert float(after.abs().sum()) == pytest.approx(float(before.abs().sum()), rel=1e-4)
            if before.ndim == 2:
                in_order = before.abs().argsort(dim=1)
                kept.append((after != 0).double().gather(1, in_order).view(len(before), 8, -1).mean((0, 2)))
        eighths = torch.stack(kept).mean(0)
        expected = 0.1 + 0.8 * (torch.arange(8) + 0.5) / 8
        assert float((eighths - expected).abs().max()) < 0.03


def test_rescaled_ties(world: Path, tmp_path: Path) -> None:
    """TIES with `rescale: true` is the same in both, but for norms that mergekit adds up in float32."""
    theirs, ours = (
        _of_mergekit(world, "f32/rescaled-ties"),
        _of_lines(world, "f32/rescaled-ties", tmp_path / "out", BY_TENSOR),
    )
    plain = _of_lines(world, "f32/rescaled-ties", tmp_path / "plain", BY_TENSOR, "parameters.rescale=false")
    for name, tensor in ours.items():
        scale = float((tensor - _load(world / "f32" / "base")[name]).abs().max())
        assert float((tensor - theirs[name]).abs().max()) <= 1e-5 * scale
        assert not torch.equal(tensor, plain[name])


# --- vocabularies ---

WORDS = ["the", "cat", "sat", "on", "mat", "dog", "ran", "in", "park", "red", "blue", "green"]
VOCABULARIES = {
    "base": (WORDS, ["<s>"]),
    "a": ([*WORDS[6:], *WORDS[:6]], ["<s>", "<|im_start|>", "<|im_end|>"]),
    "b": (["x", "y", *WORDS[:9]], ["<|im_end|>", "<tool>"]),
}
SOURCES = {
    "union": "tokenizer_source: union",
    "base": "tokenizer_source: base",
    "b": "tokenizer_source: b",
    "padded": "tokenizer: {source: union, pad_to_multiple_of: 8}",
    "tokens": """
tokenizer:
  source: union
  tokens:
    <tool>: {source: {kind: zero}}
    <|im_end|>: {source: a, force: true}
    <new>: {source: {kind: model_token, model: b, token: <tool>}}
    <s>: {source: {kind: model_token, model: a, token_id: 5}, force: true}
""",
}
OF_VOCABULARIES = {
    "task arithmetic": ("merge_method: task_arithmetic\nbase_model: base", (0.6, 0.4), 0.0),
    "ties": ("merge_method: ties\nbase_model: base\nparameters: {density: 0.5}", (0.6, 0.4), 0.0),
    "linear": ("merge_method: linear", (0.5, 0.3), 2e-8),
}


@pytest.mark.parametrize(
    ("method", "source"), [*zip(cycle(OF_VOCABULARIES), SOURCES, strict=False), ("ties", "union"), ("linear", "tokens")]
)
def test_rows_of_tokens_are_mergekit_s(method: str, source: str, mergekit: None, tmp_path: Path) -> None:
    """Whatever ids the two give the tokens, each token has the same row in embedding and head; and AutoTokenizer finds
    every token under the id of its row.
    """
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    for seed, (name, (words, extra)) in enumerate(VOCABULARIES.items()):
        ids = write_tokenizer(tmp_path / name, words, extra, kind="BPE")
        torch.manual_seed(seed)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = LlamaConfig(vocab_size=len(ids), tie_word_embeddings=False, **sizes)
        LlamaForCausalLM(config).save_pretrained(tmp_path / name)
    head, weights, apart = OF_VOCABULARIES[method]
    models = "".join(
        f"  - {{model: {name}, parameters: {{weight: {w}}}}}\n" for name, w in zip("ab", weights, strict=True)
    )
    recipe = tmp_path / "merge.yaml"
    recipe.write_text(f"{head}\nmodels:\n{models}{SOURCES[source]}\ndtype: float32\n")
    by_tensor = ("--set", BY_TENSOR) if method == "ties" else ()
    ran = run_lines("merge", "--config", recipe, "-o", tmp_path / "lines", *by_tensor)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    program = "from mergekit.scripts.run_yaml import main; main()"
    command = [sys.executable, "-c", program, "merge.yaml", "mergekit", "--no-write-model-card", "--quiet"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    tokenizers = [AutoTokenizer.from_pretrained(tmp_path / by) for by in ("lines", "mergekit")]
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    assert ours.keys() == theirs.keys()
    mine, other = (load_file(tmp_path / by / "model.safetensors") for by in ("lines", "mergekit"))
    for table in ("model.embed_tokens.weight", "lm_head.weight"):
        assert len(mine[table]) == len(other[table])
        for token, number in ours.items():
            difference = (mine[table][number] - other[table][theirs[token]]).abs().max()
            assert float(difference) <= apart, (table, token)
        if method != "ties":  # which may drop an entry of a mean that differs in the last place
            torch.testing.assert_close(mine[table][len(ours) :], other[table][len(theirs) :], rtol=1e-5, atol=1e-7)
