"""Every way to say a coefficient, and edits from zeros to ones that it is read off.

With a base of zeros and a fine-tune of ones every entry of the output is its coefficient, so what is expected is
computed here from the rules that docs/editing.md gives, and never with the code under test.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from support.files import write_checkpoint
from support.run import Ran, run_lines

FIXED = {"keep": 1.0, "base": 0.0}


DTYPES = (torch.float64, torch.float32, torch.float64, torch.int32)

# --- models: every tensor's place is written by hand ---


def stack(prefix: str, layers: int, *tails: str, name: str = "", start: int = 0) -> dict[str, tuple[str, int]]:
    """The tensors of `prefix.i` for every layer i, each with its place in the stack `name`, by default the prefix."""
    return {
        f"{prefix}.{i}.{tail}": (name or prefix, start + i) for i in range(layers) for tail in tails or ("w", "norm.w")
    }


@dataclass(frozen=True)
class Model:
    """Tensor names with their places: a stack and a layer from 0, or the side of the blocks on which they stand.

    Attributes:
        places: name -> (stack, layer), "before" or "after".
        parts: stack -> what selects it on the command line.
        config: its config.json.
        tied: head -> the embedding that it is one weight with.
    """

    places: Mapping[str, tuple[str, int] | str]
    parts: Mapping[str, Sequence[str]]
    config: Mapping[str, Any] | None = None
    tied: Mapping[str, str] = field(default_factory=dict)

    def layers(self, name: str) -> int:
        return 1 + max(place[1] for place in self.places.values() if not isinstance(place, str) and place[0] == name)


def llama(layers: int) -> dict[str, tuple[str, int] | str]:
    ends = {"model.embed_tokens.weight": "before", "model.norm.weight": "after", "lm_head.weight": "after"}
    return {**ends, **stack("model.layers", layers)}


FLUX = "double_blocks+single_blocks"


MODELS = {
    "decoder": Model(llama(5), {"model.layers": ["model.layers", "model", "layers"]}),
    "one layer": Model(llama(1), {"model.layers": ["layers"]}),
    "two layers": Model(llama(2), {"model.layers": ["layers"]}),
    "tied": Model(
        llama(3),
        {"model.layers": ["layers"]},
        {"model_type": "llama", "tie_word_embeddings": True},
        {"lm_head.weight": "model.embed_tokens.weight"},
    ),
    "prediction layer": Model(
        {**llama(3), "model.layers.3.w": "after", "model.layers.3.eh_proj.w": "after"},
        {"model.layers": ["layers"]},
        {"model_type": "deepseek_v3", "num_hidden_layers": 3, "tie_word_embeddings": False},
    ),
    "encoder and decoder": Model(
        {
            "shared.weight": "before",
            **stack("encoder.block", 4, "layer.0.w", "layer.1.norm.w"),
            "encoder.final_layer_norm.weight": "after",
            **stack("decoder.block", 3, "layer.0.w", "layer.1.w", "layer.2.norm.w"),
            "decoder.final_layer_norm.weight": "after",
            "lm_head.weight": "after",
        },
        {"encoder.block": ["encoder.block", "encoder"], "decoder.block": ["decoder.block", "decoder"]},
    ),
    "towers": Model(
        {
            "text_model.embeddings.token_embedding.weight": "before",
            **stack("text_model.encoder.layers", 1),
            "text_model.final_layer_norm.weight": "after",
            "text_projection.weight": "after",
            "vision_model.pre_layrnorm.weight": "before",
            **stack("vision_model.encoder.layers", 3),
            "vision_model.post_layernorm.weight": "after",
            "logit_scale": "after",
        },
        {
            "text_model.encoder.layers": ["text_model", "text_model.encoder"],
            "vision_model.encoder.layers": ["vision_model", "vision_model.encoder.layers"],
        },
    ),
    "one after the other": Model(
        {
            "img_in.weight": "before",
            **stack("double_blocks", 2, name=FLUX),
            **stack("single_blocks", 3, name=FLUX, start=2),
            "final_layer.linear.weight": "after",
        },
        {FLUX: [FLUX]},
    ),
    "stages": Model(
        {
            "patch_embed.proj.weight": "before",
            **stack("layers.0.blocks", 2, name="layers"),
            **stack("layers.1.blocks", 2, name="layers", start=2),
            "norm.weight": "after",
            "head.fc.weight": "after",
        },
        {"layers": ["layers"]},
    ),
}

# --- running it ---


def sides(
    folder: Path, names: Sequence[str], config: Mapping[str, Any] | None = None, *, dtypes: Any = (torch.float64,)
) -> tuple[Path, Path]:
    """A base of zeros and a fine-tune of ones, as folders; the dtypes by turns."""
    of = {name: dtypes[i % len(dtypes)] for i, name in enumerate(names)}
    base = write_checkpoint(folder / "base", {n: torch.zeros(2, dtype=t) for n, t in of.items()}, config=config)
    ft = write_checkpoint(folder / "ft", {n: torch.ones(2, dtype=t) for n, t in of.items()}, config=config)
    return base, ft


def dry(paths: tuple[Path, Path], *options: object) -> Ran:
    """`lines edit BASE FT --dry-run OPTIONS`."""
    return run_lines("edit", *paths, "-o", paths[0].parent / "not written", "--dry-run", *options)


def summary(paths: tuple[Path, Path], *options: object) -> Any:
    """What `--dry-run --json` prints."""
    ran = dry(paths, "--json", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return ran.json


def planned(paths: tuple[Path, Path], *options: object) -> dict[str, float]:
    """Every tensor's coefficient as `--dry-run --json` gives it."""
    return {row["name"]: row["coefficient"] for row in summary(paths, *options)["map"]}


def written(out: Path, *arguments: object) -> dict[str, torch.Tensor]:
    """The tensors that `lines edit ARGUMENTS -o OUT` writes."""
    ran = run_lines("merge" if "--config" in arguments else "edit", *arguments, "-o", out, "--device", "cpu", "--quiet")
    assert (ran.code, ran.out, ran.trace) == (0, "", ""), ran.err
    tensors: dict[str, torch.Tensor] = {}
    for file in [out] if out.is_file() else sorted(out.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def one_value(tensor: torch.Tensor) -> float:
    """The number that all entries of a tensor are."""
    first, *others = tensor.tolist()
    assert others == [first] * len(others)
    return float(first)


def refused(ran: Ran, *words: str, code: int = 2) -> None:
    """The command ended with that code, said all of these words, and on stdout nothing, or with --json the same."""
    assert (ran.code, ran.trace) == (code, ""), ran.err
    assert not ran.out or ran.json["error"]["code"] == code, ran.out
    assert [word for word in words if word not in ran.err] == [], ran.err
    assert "function-" not in ran.err, "the message speaks of pydantic's inside"


def in_yaml(paths: tuple[Path, Path], asked: str) -> Ran:
    """A dry run of a recipe with these lines under `lines:`."""
    file = paths[0].parent / "recipe.yaml"
    try:
        said = yaml.safe_load(f"  {asked}")
    except (yaml.YAMLError, ValueError):
        said = {}
    listed = isinstance(said.get("schedule"), (list, int, float)) or "," in str(said.get("schedule", ""))
    if not listed:  # what an edit would add
        alpha = said.get("alpha", 0.1)
        rest = {"alpha": 0.1, "beta": 1 - alpha if isinstance(alpha, (int, float)) else 0.9}
        added = [f"{key}: {value!r}" for key, value in rest.items() if key not in said]
        asked = "{" + ", ".join([*added, asked[1:]]) if asked.startswith("{") else "\n  ".join([*added, asked])
    text = f"base_model: {paths[0]}\nmodels: [{{model: {paths[1]}}}]\nlike: ft\nlines:\n  {asked}\n"
    file.write_text(text)
    return run_lines("merge", "--config", file, "-o", paths[0].parent / "not written", "--dry-run", "--json")


# --- schedules ---


def over_depth(folder: Path, layers: int, *options: object, dtype: torch.dtype = torch.float64) -> list[float]:
    """The coefficients in the written file: outside the blocks, then of every layer."""
    paths = sides(folder, ["embed.weight", *(f"layers.{i}.w" for i in range(layers))], dtypes=(dtype,))
    got = written(folder / "out.safetensors", *paths, *options)
    return [one_value(got["embed.weight"]), *(one_value(got[f"layers.{i}.w"]) for i in range(layers))]
