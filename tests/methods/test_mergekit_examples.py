"""What becomes of the example files that mergekit and its forks publish: each is equal, differs by design, or is
refused by name. The files here say what those say, of small models.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file

from support.files import write_checkpoint
from support.run import run_lines

LAYERS = 4
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
}


@dataclass(frozen=True)
class Example:
    """A published file.

    Attributes:
        text: what it says.
        verdict: what becomes of it.
        said: words of the note, or of the refusal.
        apart: what share of all entries may lie further from mergekit's than rounding to 16 bits explains.
        sets: what makes it equal, where it differs by design.
    """

    text: str
    verdict: Literal["equal", "differs", "refused"]
    said: tuple[str, ...] = ()
    apart: float = 0.0
    sets: tuple[str, ...] = ()


GRADIENT_SLERP = """
slices:
  - sources:
      - {model: a, layer_range: [0, 4]}
      - {model: b, layer_range: [0, 4]}
merge_method: slerp
base_model: a
parameters:
  t:
    - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
    - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
    - value: 0.5
dtype: float16
"""
TIES = """
models:
  - {model: a, parameters: {density: [1, 0.7, 0.1], weight: 1.0}}
  - {model: b, parameters: {density: 0.5, weight: [0, 0.3, 0.7, 1]}}
  - model: c
    parameters: {density: 0.33, weight: [{filter: mlp, value: 0.5}, {value: 0}]}
merge_method: ties
base_model: base
parameters: {normalize: true, int8_mask: true}
dtype: float16
"""
TWO = "models: [{model: a}, {model: b}]\n"
WEIGHTED = "models: [{model: a, parameters: {weight: 0.5}}, {model: b, parameters: {weight: 0.5}}]\n"

EXAMPLES = {
    "linear": Example(
        """
models:
  - {model: a, parameters: {weight: 1.0}}
  - {model: b, parameters: {weight: 0.3}}
  - {model: c, parameters: {weight: 0.5}}
merge_method: linear
dtype: float16
""",
        "equal",
    ),
    "gradient-slerp": Example(GRADIENT_SLERP, "equal"),
    "orcamini-platy-44layer": Example(
        """
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [2, 4]}]
merge_method: passthrough
dtype: float16
""",
        "equal",
    ),
    "gpt2-small": Example(
        "slices: [{sources: [{model: a, layer_range: [0, 2]}]}]\nmerge_method: passthrough\ndtype: float16\n", "equal"
    ),
    # Its densities vary, so that each tensor is trimmed. mergekit adds in float16, and other signs may win.
    "ties": Example(TIES, "equal", ("int8_mask",), apart=0.02),
    "bio-merge": Example(
        """
models:
  - {model: a, parameters: {density: 0.5, weight: 0.5}}
  - {model: b, parameters: {density: 0.5, weight: 0.5}}
merge_method: ties
base_model: base
parameters: {normalize: false, int8_mask: true}
dtype: float16
""",
        "differs",
        ("trims over the whole model, as published",),
        apart=0.02,
        sets=("parameters.trim=tensor",),
    ),
    # Of the same entries the other way round at the bound, as importance is measured in 16 bits there, in float64 here.
    "arcee_fusion": Example(
        "merge_method: arcee_fusion\nbase_model: a\ndtype: bfloat16\n" + TWO,
        "equal",
        ("the arithmetic is float32",),
        apart=0.5,
    ),
    "mega: several results in one file": Example(
        GRADIENT_SLERP.replace("dtype", "out_path: one\ndtype") + "---\n" + TIES, "refused", ("document",)
    ),
    "gradient-slerp with patterns, as it once was": Example(
        GRADIENT_SLERP.replace("filter:", "pattern:"), "refused", ("pattern",)
    ),
    "evolution": Example(
        "genome: {models: [a, b], merge_method: dare_ties, base_model: base}\n", "refused", ("genome",)
    ),
    "metrics": Example("metric_method: all\ndtype: float32\n" + TWO, "refused", ("metric_method",)),
    "zipit: weights aligned": Example(TIES + "align_weights: zipit\n", "refused", ("align_weights",)),
    "chipalign: a fork's nuslerp": Example(
        "merge_method: nuslerp\nparameters: {geodesic: true, lambda: 0.5, nuslerp_flatten: true}\n" + TWO,
        "refused",
        ("geodesic is not a parameter of nuslerp",),
    ),
    "whisper: a LoRA in a key of its own": Example(
        "models: [{model: a, lora: b, parameters: {weight: 0.6}}, {model: a}]\nmerge_method: slerp\n",
        "refused",
        ("models.0.lora",),
    ),
    "whisper: slerp without t": Example("merge_method: slerp\n" + TWO, "refused", ("parameters.t is missing",)),
    **{
        f"{method}: a fork's method": Example(
            f"merge_method: {method}\nbase_model: base\n{WEIGHTED}", "refused", (f"no method is called {method!r}",)
        )
        for method in ("ranked_ties", "cabs", "core_space", "lrp", "encoder_decoder_weighted")
    },
}
MADE = [name for name, example in EXAMPLES.items() if example.verdict != "refused"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three fine-tunes of it, in float16, and every file."""
    folder = tmp_path_factory.mktemp("examples")
    width, inner, words = 16, 32, 32
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, width)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{one}_proj.weight": (width, width) for one in "qkvo"}
        shapes |= {f"{prefix}mlp.{one}_proj.weight": (inner, width) for one in ("gate", "up")}
        shapes |= {f"{prefix}mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{prefix}{one}_layernorm.weight": (width,) for one in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (width,), "lm_head.weight": (words, width)}
    g = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    for name in ("base", "a", "b", "c"):
        moved = {n: t + (0 if name == "base" else 0.3) * torch.randn(t.shape, generator=g) for n, t in base.items()}
        write_checkpoint(folder / name, {n: t.half() for n, t in moved.items()}, config=CONFIG)
    for number, example in enumerate(EXAMPLES.values()):
        (folder / f"{number}.yaml").write_text(example.text.lstrip())
    return folder


def _number(name: str) -> int:
    return list(EXAMPLES).index(name)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_published_example_is_read_or_refused_by_name(name: str, world: Path, tmp_path: Path) -> None:
    """What differs by design is a note; what is refused is named, and nothing is written."""
    example = EXAMPLES[name]
    ran = run_lines("merge", "--config", world / f"{_number(name)}.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (2 if example.verdict == "refused" else 0, ""), ran.err
    assert [words for words in example.said if words not in " ".join(ran.err.split())] == [], ran.err
    assert (tmp_path / "out").exists() == (example.verdict != "refused")


@pytest.fixture(scope="module")
def theirs(world: Path) -> Path:
    """What mergekit makes of those that lines reads."""
    assert importlib.util.find_spec("mergekit") is not None, "mergekit 0.1.5 is needed: run make slow"
    program = (
        "import sys\nfrom mergekit.scripts.run_yaml import main\nfor n in sys.argv[1:]:\n"
        "    main([n + '.yaml', n + '.mergekit', '--no-copy-tokenizer', '--no-write-model-card', '--quiet'],"
        " standalone_mode=False)"
    )
    command = [sys.executable, "-c", program, *(str(_number(name)) for name in MADE)]
    subprocess.run(command, check=True, cwd=world, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    return world


def _apart(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> float:
    """The share of entries further apart than a few units in the last place of 16 bits."""
    assert ours.keys() == others.keys()
    beyond = entries = 0
    for name, tensor in ours.items():
        unit = {torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}[tensor.dtype]
        scale = float(tensor.double().abs().max())
        beyond += int(((tensor.double() - others[name].double()).abs() > 4 * unit * scale).sum())
        entries += tensor.numel()
    return beyond / entries


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_what_is_read_is_what_mergekit_makes(name: str, theirs: Path, tmp_path: Path) -> None:
    """Equal but for rounding; where it differs by design, with the key that makes it so."""
    example, number = EXAMPLES[name], _number(name)
    others = load_file(theirs / f"{number}.mergekit" / "model.safetensors")

    def made(out: str, *sets: str) -> dict[str, torch.Tensor]:
        said = [word for text in sets for word in ("--set", text)]
        assert run_lines("merge", "--config", theirs / f"{number}.yaml", "-o", tmp_path / out, *said).code == 0
        return load_file(tmp_path / out / "model.safetensors")

    assert _apart(made("equal", *example.sets), others) <= example.apart
    if example.verdict == "differs":
        assert _apart(made("as_it_is"), others) > example.apart
