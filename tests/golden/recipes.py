"""Recipes over small checkpoints: what a change of the code must not change. `digests.json` has the digest of every
weight file that they make, and of the index and config beside it; `tests/golden/test_golden.py` holds them against it.

Where a number is meant to change, its line in `digests.json` changes in the same commit, and the message says why:
`python tests/golden/record.py` writes the file anew and prints what became different.

What the inputs hold is made of SHAKE-128 and of float64 operations that IEEE 754 defines to the bit, so it is the same
on any machine and with any torch. The digests of the inputs are recorded, too: where one of them differs, the inputs
have changed, not the arithmetic. So are two things that the results rest on and that are not ours: what torch's
generator draws (DARE), and the last places of the C library's `sin`, `acos` and `pow` (`Case.libm`).

Only the public Python API is used, and recipes go through YAML, so that the code behind can be moved at will.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from hashlib import sha256, shake_128
from pathlib import Path
from typing import Any

import torch

import lines_cli as lines
from support.files import write_checkpoint
from support.method_cases import TABLE

DIGESTS = Path(__file__).with_name("digests.json")

Tensors = dict[str, torch.Tensor]
Shapes = Mapping[str, tuple[int, ...]]
Dtypes = Sequence[torch.dtype]

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
INTEGERS = {
    "ids": torch.int64,
    "codes": torch.int32,
    "short": torch.int16,
    "signs": torch.int8,
    "bytes": torch.uint8,
    "mask": torch.bool,
}
"""The last part of a tensor's name -> its dtype; all other tensors are float."""


# --- what the inputs hold ---


def bits(seed: str, shape: Sequence[int]) -> torch.Tensor:
    """32 bits for each entry, as int32: SHAKE-128 of the seed."""
    stream = bytearray(shake_128(seed.encode()).digest(4 * math.prod(shape) or 4))
    return torch.frombuffer(stream, dtype=torch.int32)[: math.prod(shape)].view(list(shape))


def numbers(seed: str, shape: Sequence[int]) -> torch.Tensor:
    """float32 numbers of eight magnitudes below 1/4, made bit by bit. A quarter has one bit behind the leading one, so
    that some sums are zero and some magnitudes the same; an eighth of all are -0.0.
    """
    drawn = bits(seed, shape)
    made = (drawn & _SIGN_AND_FRACTION) | ((drawn >> 23 & 7) + 117 << 23)
    made = torch.where((drawn & 3) == 0, made & _TO_ONE_BIT, made)
    return torch.where((drawn & 28) == 0, _MINUS_ZERO, made).view(torch.float32)


_SIGN_AND_FRACTION, _TO_ONE_BIT, _MINUS_ZERO = -(2**31) + 2**23 - 1, -(2**22), -(2**31)


def halfway(seed: str, shape: Sequence[int]) -> torch.Tensor:
    """float64 numbers next to the middle between two of bfloat16, or two of float16, so near that float32 does not tell
    them from it.
    """
    drawn = bits(seed, shape)
    leading = torch.where((drawn & 128) == 0, 1.0, -0.25).double()
    middle = torch.where((drawn & 256) == 0, 2.0**-8, 2.0**-11)
    beside = ((drawn >> 9 & 3) - 1) * 2.0**-40
    return leading * (1 + (drawn & 127).double() / 128 + middle.double() + beside.double())


def model(seed: str, shapes: Shapes, dtypes: Dtypes = (BF16,), base: Tensors | None = None) -> Tensors:
    """A model whose float tensors have these dtypes by turns; with a base, a fine-tune of it in which an eighth of the
    entries are as they were.
    """
    made = {}
    for number, (name, shape) in enumerate(shapes.items()):
        here = f"{seed}/{name}"
        if (integer := INTEGERS.get(name.rpartition(".")[2])) is not None:
            made[name] = (bits(here, shape) >> 8).bitwise_and(1 if integer == torch.bool else 127).to(integer)
            continue
        dtype = dtypes[number % len(dtypes)]
        values = numbers(here, shape)
        if dtype == torch.float64:
            values = values.double() + numbers(f"{here}/further", shape) * 2.0**-24
        if base is not None:
            values = base[name].double() + values / 4
        made[name] = values.to(dtype)
    return made


@dataclass(frozen=True)
class Checkpoint:
    """An input: its tensors, and how they are stored."""

    tensors: Tensors
    shards: int = 1
    config: Mapping[str, Any] | None = None
    files: Mapping[str, Any] = field(default_factory=dict)
    stem: str = "model"

    @property
    def digest(self) -> str:
        """Of what it holds; not of how safetensors writes that."""
        digest = sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        digest.update(json.dumps([self.shards, self.config, self.files], sort_keys=True).encode())
        return digest.hexdigest()

    def write(self, path: Path) -> None:
        write_checkpoint(path, self.tensors, shards=self.shards, config=self.config, stem=self.stem)
        for name, content in self.files.items():
            (path / name).write_text(json.dumps(content), encoding="utf-8")


def exact(seed: str, shape: Sequence[int]) -> torch.Tensor:
    """Multiples of 1/16 from -1/2 to 7/16, as float32: sums of a few of their products are exact, in whatever order
    they are added up, and so the same on any machine.
    """
    return ((bits(seed, shape) >> 8).bitwise_and(15) - 8).float() / 16


def factors(seed: str, modules: Shapes, rank: int, dtype: torch.dtype, *, kohya: bool = False) -> Tensors:
    """Of an adapter: modules with the shapes of their weights."""
    made: Tensors = {}
    for module, (out, *inner) in modules.items():
        called = f"lora_te_{module.replace('.', '_')}" if kohya else f"base_model.model.{module}"
        down, up = ("lora_down", "lora_up") if kohya else ("lora_A", "lora_B")
        made[f"{called}.{down}.weight"] = exact(f"{seed}/{module}/A", (rank, *inner)).to(dtype)
        made[f"{called}.{up}.weight"] = exact(f"{seed}/{module}/B", (out, rank)).to(dtype)
        if kohya:
            made[f"{called}.alpha"] = torch.tensor(2.0, dtype=dtype)
    return made


def llama(layers: int, width: int, rows: int, inner: int, *, head: bool = True) -> dict[str, tuple[int, ...]]:
    """The shapes of a small decoder."""
    return {
        "model.embed_tokens.weight": (rows, width),
        **{
            f"model.layers.{layer}.{name}": shape
            for layer in range(layers)
            for name, shape in {
                "input_layernorm.weight": (width,),
                "self_attn.q_proj.weight": (width, width),
                "mlp.up_proj.weight": (inner, width),
            }.items()
        },
        "model.norm.weight": (width,),
        **({"lm_head.weight": (rows, width)} if head else {}),
    }


def llama_config(layers: int, rows: int, *, tied: bool = False, dtype: str = "bfloat16") -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "vocab_size": rows,
        "tie_word_embeddings": tied,
        "bos_token_id": 1,
        "eos_token_id": rows - 1,
        "dtype": dtype,
    }


MIXED: Shapes = {
    "model.embed_tokens.weight": (21, 6),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(3)
        for name, shape in {
            "norm.weight": (6,),
            "mlp.weight": (13, 6),
            "scale": (),
            "nothing": (0, 6),
            "attn.weight": (6, 7),
            "attn.ids": (5,),
            "attn.codes": (3, 3),
            "attn.mask": (6, 6),
        }.items()
    },
    "model.position.ids": (1, 9),
    "model.none.ids": (0,),
    "model.short": (4,),
    "model.signs": (5,),
    "model.bytes": (3,),
    "model.norm.weight": (6,),
    "lm_head.weight": (21, 6),
}
TOWERS: Shapes = {
    "logit_scale": (),
    "text_model.embeddings.token_embedding.weight": (19, 8),
    **{f"text_model.encoder.layers.{layer}.mlp.fc1.weight": (12, 8) for layer in range(4)},
    **{f"text_model.encoder.layers.{layer}.layer_norm1.bias": (8,) for layer in range(4)},
    "text_model.final_layer_norm.weight": (8,),
    "text_projection.weight": (6, 8),
    "vision_model.embeddings.patch_embedding.weight": (10, 3, 2, 2),
    **{f"vision_model.encoder.layers.{layer}.mlp.fc1.weight": (14, 10) for layer in range(3)},
    "vision_model.post_layernorm.weight": (10,),
    "visual_projection.weight": (6, 10),
}
T5: Shapes = {
    "shared.weight": (23, 8),
    **{f"encoder.block.{block}.layer.0.SelfAttention.q.weight": (8, 8) for block in range(3)},
    **{f"encoder.block.{block}.layer.1.DenseReluDense.wi.weight": (12, 8) for block in range(3)},
    "encoder.final_layer_norm.weight": (8,),
    **{f"decoder.block.{block}.layer.0.SelfAttention.q.weight": (8, 8) for block in range(2)},
    **{f"decoder.block.{block}.layer.2.DenseReluDense.wi.weight": (12, 8) for block in range(2)},
    "decoder.final_layer_norm.weight": (8,),
    "lm_head.weight": (23, 8),
}
CELLS: Shapes = {
    "stem.weight": (8, 5),
    **{f"net.left_cell{cell}.weight": (8, 8) for cell in (0, 2, 3)},
    **{f"net.right_cell{cell}.weight": (7, 8) for cell in (1, 2)},
}
WIDE: Shapes = {
    "model.embed_tokens.weight": (401, 523),
    "model.layers.0.mlp.weight": (523, 401),
    "model.layers.0.norm.weight": (523,),
    "model.layers.1.mlp.weight": (523, 401),
    "model.norm.weight": (523,),
}
"""210 thousand entries a tensor: several blocks each; and of the file, too, where they are written as float64."""


_ADAPTED: Shapes = {"self_attn.q_proj": (24, 24), "mlp.up_proj": (40, 24)}


@cache
def inputs() -> dict[str, Checkpoint]:
    """Every input by its name."""
    made: dict[str, Checkpoint] = {}

    def family(
        name: str, shapes: Shapes, base: Dtypes, models: Mapping[str, Dtypes], config: Any = None, **more: Any
    ) -> None:
        pretrained = model(f"{name}/base", shapes, base)
        made[f"{name}/base"] = Checkpoint(pretrained, config=config, **more)
        for fine_tune, dtypes in models.items():
            tuned = model(f"{name}/{fine_tune}", shapes, dtypes, pretrained)
            made[f"{name}/{fine_tune}"] = Checkpoint(tuned, config=config, **more)

    layers = llama_config(4, 88)
    family("decoder", llama(4, 24, 88, 40), [BF16], {"math": [BF16], "code": [BF16], "wider": [FP32]}, layers)
    decoder = made["decoder/base"].tensors
    made["decoder/base"] = Checkpoint(decoder, 2, layers, {"tokenizer.json": {"of": "base"}})
    made["decoder/code"] = Checkpoint(made["decoder/code"].tensors, 3, layers, {"tokenizer.json": {"of": "code"}})
    made["decoder/chat.safetensors"] = Checkpoint(model("decoder/chat", llama(4, 24, 88, 40), [BF16], decoder))
    family("wide", WIDE, [FP32], {"a": [FP32], "b": [FP32]}, llama_config(2, 401, dtype="float32"))
    family("half", llama(3, 16, 30, 20), [FP16], {"a": [FP16], "b": [BF16, FP16]}, llama_config(3, 30))
    a, b = [FP16, FP32, BF16, FP32, FP64], [FP32, BF16, FP16]
    family("mixed", MIXED, [FP32, FP64, FP32, BF16, FP16, FP32, BF16], {"a": a, "b": b})
    family("double", llama(6, 9, 11, 13), [FP64], {"a": [FP64], "b": [FP64]})
    doubles = made["double/base"].tensors
    made["double/halfway"] = Checkpoint({name: halfway(name, tensor.shape) for name, tensor in doubles.items()})
    family("towers", TOWERS, [FP16], {"a": [FP16], "b": [FP16]}, {"model_type": "clip"})
    family("t5", T5, [BF16], {"a": [BF16], "b": [BF16]}, {"model_type": "t5", "tie_word_embeddings": False})
    family("cells", CELLS, [FP32], {"a": [FP32]})

    # another number of rows, with a tokenizer that goes with it
    rows = {"base": 40, "longer": 45, "shorter": 37}
    for name, number in rows.items():
        own = model(f"rows/{name}", llama(2, 12, number, 14))
        shared = model("rows/shared", llama(2, 12, number, 14))
        tensors = {part: tensor if name == "base" else tensor + own[part] / 4 for part, tensor in shared.items()}
        files = {"tokenizer.json": {"rows": number}}
        made[f"rows/{name}"] = Checkpoint(tensors, config=llama_config(2, number), files=files)

    # adapters of the decoder: on all layers, with a whole norm and other ranks; on some; and without a config
    every = {f"model.layers.{layer}.{name}": shape for layer in range(4) for name, shape in _ADAPTED.items()}
    some = {module: shape for module, shape in every.items() if ".1." in module or ".2.self" in module}
    own = factors("lora/a", every, 4, FP32) | {"base_model.model.model.norm.weight": 1 + exact("lora/a/norm", (24,))}
    own |= factors("lora/a", {"model.layers.3.mlp.up_proj": (40, 24)}, 2, FP32)
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
    whole = {"modules_to_save": ["norm"], "rank_pattern": {"3.mlp.up_proj": 2}}
    for name, tensors, more in (
        ("a", own, whole),
        ("b", factors("lora/b", some, 2, BF16), {"r": 2, "use_rslora": False}),
    ):
        config = {"adapter_config.json": {**said, **more}}
        made[f"lora/{name}"] = Checkpoint(tensors, files=config, stem="adapter_model")
    for name in ("c", "d"):
        tensors = factors(f"lora/{name}", every if name == "c" else some, 4, FP16, kohya=True)
        made[f"lora/{name}.safetensors"] = Checkpoint(tensors)

    # heads: tied and left out, tied and stored, and one of its own
    tied = model("tied/base", llama(3, 12, 33, 14, head=False))
    own_head = model(
        "tied/own", llama(3, 12, 33, 14), base={**tied, "lm_head.weight": tied["model.embed_tokens.weight"]}
    )
    both = model("tied/both", llama(3, 12, 33, 14, head=False), base=tied)
    both = {**both, "lm_head.weight": both["model.embed_tokens.weight"].clone()}
    made["tied/base"] = Checkpoint(tied, config=llama_config(3, 33, tied=True))
    made["tied/own"] = Checkpoint(own_head, config=llama_config(3, 33))
    made["tied/both"] = Checkpoint(both, config=llama_config(3, 33, tied=True))

    # tensors that not all have, and names that begin otherwise
    part = llama(3, 12, 33, 14)
    lacking = model("part/base", {**part, "model.layers.1.old.weight": (5, 3), "model.both.weight": (4,)})
    made["part/base"] = Checkpoint(lacking)
    new = {"classifier.weight": (3, 12), "model.layers.2.adapter.codes": (4,)}
    made["part/a"] = Checkpoint({**model("part/a", part, base=lacking), **model("part/new", new)})
    made["part/b"] = Checkpoint(model("part/b", {**part, "model.both.weight": (4,)}, base=lacking))
    made["part/inside"] = Checkpoint({f"outer.{name}": tensor for name, tensor in made["part/b"].tensors.items()})

    # Inf that goes through the formula, NaN that is only copied
    bad = {name: tensor.clone() for name, tensor in made["half/a"].tensors.items()}
    bad["model.layers.1.mlp.up_proj.weight"][3, 5] = math.inf
    bad["model.layers.1.mlp.up_proj.weight"][7, 0] = -math.inf
    bad["model.layers.2.mlp.up_proj.weight"][0, 1] = math.nan
    made["half/nonfinite"] = Checkpoint(bad, config=llama_config(3, 30))
    large = {name: tensor.double() * 2.0**20 for name, tensor in made["double/a"].tensors.items()}
    made["double/large"] = Checkpoint(large)
    return made


# --- the recipes ---

FILE, FOLDER = "model.safetensors", "out"
"""What outputs are called: a folder also has an index, if it has several weight files, a config and the like."""


@dataclass(frozen=True)
class Case:
    """One recipe, as its YAML has it, or the options of an edit.

    Attributes:
        recipe: keys of a recipe; of an edit base, ft and options.
        edit: which of the two it is.
        output: what the output is called.
        libm: float64 tensors hold what `sin`, `acos` or `pow` give, which the C standard does not define to the last
            bit. (In float32 the last bits do not show; a test holds that.)
        adapter: what it makes is an adapter.
    """

    recipe: Mapping[str, Any]
    edit: bool = False
    output: str = FILE
    libm: bool = False
    adapter: bool = False

    @property
    def method(self) -> str:
        return "task_arithmetic" if self.edit else self.recipe["merge_method"]

    def plan(self, folder: Path, output: Path) -> lines.Plan:
        """Read the recipe as a user would.

        Args:
            folder: of the inputs.
            output: a folder for the output.
        """
        if self.edit:
            options = dict(self.recipe)
            recipe = lines.edit_recipe(str(folder / options.pop("base")), str(folder / options.pop("ft")), **options)
        else:
            output.mkdir(parents=True, exist_ok=True)
            written = output / "merge.yaml"
            written.write_text(json.dumps(self._with_paths(folder)), encoding="utf-8")
            recipe = lines.load_recipe(written)
        return lines.make_plan(recipe, lines.open_inputs(recipe, quiet=True), output / self.output)

    def _with_paths(self, folder: Path) -> dict[str, Any]:
        paths = {name: str(folder / name) for name in inputs()}

        def seen(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: seen(inner) for key, inner in value.items()}
            if isinstance(value, list):
                return [seen(inner) for inner in value]
            return paths.get(value, value) if isinstance(value, str) else value

        return seen(self.recipe)

    def digests(self, folder: Path, output: Path, resources: lines.Resources) -> dict[str, str]:
        """Carry it out: the SHA-256 of every file that it makes, but for those that hold paths and the version."""
        if self.adapter:
            self._make_adapter(folder, output, resources)
        else:
            lines.run(self.plan(folder, output), resources)
        at = output / self.output
        made = [at] if at.is_file() else sorted(at.iterdir())
        return {
            path.name: sha256(path.read_bytes()).hexdigest()
            for path in made
            if path.name not in ("README.md", "lines_recipe.yaml")
        }

    def _make_adapter(self, folder: Path, output: Path, resources: lines.Resources) -> None:
        output.mkdir(parents=True, exist_ok=True)
        how: dict[str, Any] = {"workers": resources.workers, "device": resources.device}
        recipe = self._with_paths(folder)
        if self.edit:
            lines.edit_adapter(recipe.pop("adapter"), output / self.output, **recipe, **how)
        else:
            lines.merge(recipe, output / self.output, as_adapter=True, **how)


def edit(base: str, ft: str, *, output: str = FILE, libm: bool = False, **options: Any) -> Case:
    return Case({"base": base, "ft": ft, **options}, edit=True, output=output, libm=libm)


def merge(
    method: str,
    base: str | None,
    *models: str | tuple[str, Mapping[str, Any]],
    said: Mapping[str, Any] | None = None,
    output: str = FILE,
    libm: bool = False,
    **keys: Any,
) -> Case:
    """Models are names, or names with parameters of their own; `said` are the parameters of all."""
    named = [(source, None) if isinstance(source, str) else source for source in models]
    recipe = {
        "merge_method": method,
        **({"base_model": base} if base else {}),
        "models": [{"model": name, **({"parameters": dict(own)} if own else {})} for name, own in named],
        **({"parameters": dict(said)} if said else {}),
        **keys,
    }
    return Case(recipe, output=output, libm=libm)


DECODER = ("decoder/base", "decoder/math", "decoder/code", "decoder/chat.safetensors")
WIDE_ONES = ("wide/base", "wide/a", "wide/b")
WEIGHTED = (
    "decoder/base",
    ("decoder/math", {"weight": 0.3}),
    ("decoder/code", {"weight": -0.7}),
    ("decoder/chat.safetensors", {"weight": 1.1}),
)
AUTO = {"alpha": "auto", "beta": 0.5}
BY_DEPTH = {"alpha": 0.2, "beta": 0.6}
BY_NAME = [
    {"filter": "mlp", "value": [0.2, 0.9, 0.4]},
    {"filter": "norm", "value": 0.5},
    {"value": [1, 0.25]},
]

EDITS: dict[str, Case] = {
    "edit-defaults": edit("decoder/base", "decoder/math", output=FOLDER),
    "edit-copies": edit("decoder/base", "decoder/code", alpha=0),
    "edit-beyond-1": edit("decoder/base", "decoder/math", alpha=-0.3, beta=1.9, gamma=0.7),
    "edit-power": edit("decoder/base", "decoder/math", schedule="power:2.3"),
    "edit-power-float64": edit("double/base", "double/a", schedule="power:0.7", libm=True),
    "edit-constant": edit("decoder/base", "decoder/math", alpha=0.1, beta=0.3, schedule="constant", outside="base"),
    "edit-list": edit("decoder/base", "decoder/math", schedule=[0.1, 0.7, 0.35], outside="position", gamma=1.5),
    "edit-filter": edit(
        "decoder/base",
        "decoder/math",
        outside="keep",
        filter={"layernorm": "keep", "q_proj": 0.45, "lm_head": "base", "layers.2": 0.1},
    ),
    "edit-towers": edit(
        "towers/base", "towers/a", stacks={"text_model": {"alpha": 0.3, "beta": 0.5}, "vision_model": "keep"}
    ),
    "edit-decoder-of-t5": edit("t5/base", "t5/a", stacks={"encoder": "keep"}, outside="keep"),
    "edit-encoder-of-t5": edit("t5/base", "t5/a", stacks={"decoder": "base"}, outside="position"),
    "edit-layers": edit("cells/base", "cells/a", layers=r"net\.(?P<stack>left|right)_cell(?P<index>\d+)\."),
    "edit-mixed": edit("mixed/base", "mixed/a"),
    "edit-mixed-like-base": edit("mixed/base", "mixed/b", like="base", alpha=0),
    "edit-float16": edit("mixed/base", "mixed/a", dtype="float16"),
    "edit-float64": edit("double/base", "double/a", alpha=0.17, beta=0.83),
    "edit-float64-list": edit("double/base", "double/b", schedule=[0.3, 0.7, 0.1, 0.4], gamma=0.9),
    "edit-bfloat16": edit("double/base", "double/b", dtype="bfloat16"),
    "edit-halfway-bfloat16": edit("double/base", "double/halfway", alpha=1, dtype="bfloat16"),
    "edit-halfway-float16": edit("double/base", "double/halfway", alpha=1, dtype="float16"),
    "edit-cast-copies": edit("decoder/base", "decoder/wider", alpha=0, dtype="float16", output=FOLDER),
    "edit-missing-ft": edit("part/base", "part/a", missing_in_blocks=2, missing="ft"),
    "edit-missing-copy": edit("part/base", "part/a", missing_in_blocks=2, missing="copy"),
    "edit-missing-skip": edit("part/base", "part/a", missing_in_blocks=2, missing="skip"),
    "edit-resize-ft": edit("rows/base", "rows/longer", resize="ft", output=FOLDER),
    "edit-resize-base": edit("rows/base", "rows/longer", resize="base", output=FOLDER),
    "edit-tied-base": edit("tied/base", "tied/own", outside="position"),
    "edit-tied-ft": edit("tied/own", "tied/base"),
    "edit-prefix": edit("part/b", "part/inside", outside="position"),
    "edit-shards": edit("decoder/base", "decoder/code", max_shard_size="12KB", output=FOLDER),
    "edit-wide": edit("wide/base", "wide/a", alpha=0.25, dtype="float64"),
    "edit-inf": edit("half/base", "half/nonfinite", alpha=0.5, allow_nonfinite=True),
    "edit-overflow": edit("double/base", "double/large", dtype="float16", allow_nonfinite=True),
}

MERGES: dict[str, Case] = {
    "average": merge("average", *DECODER, said={"lambda": BY_NAME}),
    "average-wide": merge("average", *WIDE_ONES, lines=BY_DEPTH, max_shard_size="1MiB", output=FOLDER),
    "average-towers": merge(
        "average", "towers/base", "towers/a", "towers/b", lines={**BY_DEPTH, "stacks": {"vision_model": "base"}}
    ),
    "average-power": merge("average", *DECODER, lines={**BY_DEPTH, "schedule": "power:0.5"}),
    "average-layers": merge(
        "average", "cells/base", "cells/a", lines={**BY_DEPTH, "layers": r"left_cell(?P<index>\d)"}
    ),
    "sum": merge("task_arithmetic", *DECODER, lines=AUTO, tokenizer_source="decoder/code", output=FOLDER),
    "sum-normalized": merge("task_arithmetic", *WEIGHTED, said={"normalize": True, "lambda": [0.5, 1.5]}),
    "sum-gradients": merge(
        "task_arithmetic",
        "decoder/base",
        ("decoder/math", {"weight": BY_NAME}),
        ("decoder/code", {"weight": [1, 0]}),
        lines={**BY_DEPTH, "outside": "position", "gamma": 0.8, "filter": {"q_proj": "keep", "up_proj": 0.3}},
    ),
    "sum-float64": merge(
        "task_arithmetic", "double/base", "double/a", "double/b", said={"weight": BY_NAME, "lambda": [0.3, 0.9, 0.1]}
    ),
    "sum-trimmed": merge(
        "task_arithmetic", *WEIGHTED, said={"density": 0.3, "trim": "global", "normalize": False}, dtype="float32"
    ),
    "sum-trimmed-by-tensor": merge("task_arithmetic", *WEIGHTED, said={"density": 0.3, "trim": "tensor"}, lines=AUTO),
    "sum-missing-copy": merge(
        "task_arithmetic", "part/base", "part/a", "part/b", missing_in_blocks=2, missing="copy", lines=BY_DEPTH
    ),
    "ties": merge("ties", *DECODER, said={"density": 0.2}, dtype="float32", out_dtype="float16", output=FOLDER),
    "ties-wide": merge("ties", *WIDE_ONES, said={"density": 0.35}, lines=AUTO),
    "ties-wide-by-tensor": merge("ties", *WIDE_ONES, said={"density": 0.5, "trim": "tensor"}, dtype="bfloat16"),
    "ties-densities": merge(
        "ties", "decoder/base", ("decoder/math", {"density": 0.1}), ("decoder/code", {"density": 1}), "decoder/wider"
    ),
    "ties-density-gradient": merge("ties", *DECODER, said={"density": [0.1, 0.6], "weight": 0.8}),
    "ties-mean": merge("ties", *WEIGHTED, said={"density": 0.3, "rescale": True, "agreement": "mean", "lambda": 1.2}),
    "ties-l1": merge("ties", *WEIGHTED, said={"density": 0.3, "trim": "tensor", "rescale": "l1", "normalize": True}),
    "ties-sum": merge("ties", *WEIGHTED, said={"density": 0.4, "rescale": False, "agreement": "sum"}),
    "ties-max": merge(
        "ties", *WEIGHTED, said={"density": 0.4, "trim": "global", "agreement": "max", "normalize": False}
    ),
    "ties-mixed": merge("ties", "mixed/base", "mixed/a", "mixed/b", said={"density": 0.5}, lines=AUTO),
    "ties-float64": merge("ties", "double/base", "double/a", "double/b", said={"density": 0.6}, lines=AUTO),
    "ties-half": merge(
        "ties",
        "half/base",
        ("half/a", {"weight": 0.5}),
        ("half/b", {"weight": -0.5}),
        said={"density": 0.5},
        lines={"beta": 0.2},
    ),
    "ties-missing-ft": merge(
        "ties", "part/base", "part/a", "part/b", said={"density": 0.5}, missing_in_blocks=2, missing="ft"
    ),
    "ties-resize-base": merge(
        "ties", "rows/base", "rows/longer", "rows/shorter", said={"density": 0.5}, resize="base", lines=AUTO
    ),
    "ties-tied": merge("ties", "tied/base", "tied/own", "tied/both", said={"density": 0.4}, lines=AUTO, output=FOLDER),
    "ties-t5": merge(
        "ties", "t5/base", "t5/a", "t5/b", said={"density": 0.4}, lines={**AUTO, "stacks": {"encoder": "keep"}}
    ),
    "ties-list": merge("ties", *DECODER, lines={"schedule": [0.1, 0.9, 0.4], "outside": "base"}),
    "consensus": merge("consensus", *DECODER, lines=AUTO),
    "consensus-wide": merge("consensus", *WIDE_ONES, said={"k": 1, "mask_lambda": 1.3, "on": "sum"}),
    "consensus-masks": merge(
        "consensus",
        "decoder/base",
        ("decoder/math", {"mask_lambda": 0.2, "weight": 0.5}),
        ("decoder/code", {"mask_lambda": [0.6, 0.1]}),
        "decoder/chat.safetensors",
        said={"lambda": 0.9},
    ),
    "consensus-on-ties": merge("consensus", *WEIGHTED, said={"on": "ties", "density": 0.3, "trim": "global"}),
    "consensus-by-tensor": merge("consensus", *WEIGHTED, said={"on": "ties", "density": 0.3, "trim": "tensor", "k": 1}),
    "dare": merge("dare_linear", *DECODER, said={"density": 0.3, "rescale": "density", "lambda": 0.5}),
    "dare-wide": merge("dare_linear", *WIDE_ONES, said={"density": 0.7, "rescale": "l1", "seed": 7}, lines=AUTO),
    "dare-normalized": merge("dare_linear", *WEIGHTED, said={"density": 0.5, "rescale": True, "normalize": True}),
    "dare-densities": merge(
        "dare_linear",
        "decoder/base",
        ("decoder/math", {"density": 0.1, "weight": 0.5}),
        ("decoder/code", {"density": 1}),
        ("decoder/chat.safetensors", {"density": [0, 0.9]}),
        said={"rescale": False, "seed": 123456789, "normalize": False},
    ),
    "dare-tied": merge("dare_linear", "tied/base", "tied/both", "tied/own", said={"density": 0.6}),
    "dare-float64": merge("dare_linear", "double/base", "double/a", "double/b", said={"density": 0.6, "rescale": "l1"}),
    "dare-resize-ft": merge(
        "dare_linear", "rows/base", "rows/longer", "rows/shorter", said={"density": 0.5}, resize="ft"
    ),
    "dare-ties": merge("dare_ties", *DECODER, said={"density": 0.3, "rescale": "density"}),
    "dare-ties-wide": merge("dare_ties", *WIDE_ONES, said={"density": 0.6, "agreement": "mean"}, lines=BY_DEPTH),
    "dare-ties-max": merge("dare_ties", *WEIGHTED, said={"density": 0.4, "agreement": "max", "rescale": "l1"}),
    "dare-ties-sum": merge(
        "dare_ties",
        *WEIGHTED,
        said={"density": 0.4, "agreement": "sum", "normalize": False, "rescale": False, "seed": 3, "lambda": 2},
    ),
    "dare-ties-normalized": merge("dare_ties", *DECODER, said={"density": 0.4, "normalize": True}, lines=AUTO),
    "linear": merge("linear", None, ("decoder/math", {"weight": 0.3}), ("decoder/code", {"weight": 1.1})),
    "linear-wide": merge("linear", None, "wide/base", "wide/a", "wide/b", said={"weight": [0.2, 0.9]}),
    "linear-not-normalized": merge(
        "linear", None, ("mixed/a", {"weight": 0.3}), ("mixed/b", {"weight": 0.6}), said={"normalize": False}
    ),
    "linear-scaled": merge("linear", *DECODER, said={"normalize": True}, lines=AUTO, like="ft", output=FOLDER),
    "slerp": merge("slerp", "decoder/base", "decoder/base", "decoder/math", said={"t": BY_NAME}),
    "slerp-wide": merge("slerp", None, "wide/a", "wide/b", said={"t": 0.3}),
    "slerp-scaled": merge("slerp", "decoder/base", "decoder/math", "decoder/code", said={"t": 0.4}, lines=BY_DEPTH),
    "slerp-parallel": merge("slerp", None, "decoder/math", "decoder/math", said={"t": 0.7}),
    "slerp-float64": merge("slerp", None, "double/a", "double/b", said={"t": [0, 0.6, 1]}, libm=True),
    "passthrough": merge("passthrough", None, "decoder/code", dtype="float16", output=FOLDER),
    "passthrough-scaled": merge("passthrough", None, "mixed/a", said={"scale": BY_NAME}),
    "passthrough-on-base": merge("passthrough", "decoder/base", ("decoder/math", {"scale": 1.5}), lines=BY_DEPTH),
}

MERGES |= {
    f"{method}-{number}": merge(method, *DECODER[: 1 + (entry.models or 3)], said=said)
    for method, entry in TABLE.items()
    if entry.golden and not any(case.method == method for case in MERGES.values())
    for number, said in enumerate(entry.typical)
}
TWO_ADAPTERS = {
    "merge_method": "task_arithmetic",
    "models": [{"model": "lora/a", "parameters": {"weight": 0.7}}, {"model": "lora/b", "parameters": {"weight": -0.4}}],
    "base_model": "decoder/base",
    "lines": BY_DEPTH,
}
TWO_FILES = {"merge_method": "linear", "models": [{"model": "lora/c.safetensors"}, {"model": "lora/d.safetensors"}]}
ADAPTERS: dict[str, Case] = {
    "adapter-folded": edit("decoder/base", "lora/a", output=FOLDER),
    "adapter-folded-some": edit("decoder/base", "lora/b", alpha=1, beta=0),
    "adapter-folded-kohya": edit("decoder/base", "lora/c.safetensors", dtype="float32"),
    "adapter-merged-whole": merge("ties", "decoder/base", "lora/a", "decoder/math", "lora/b", said={"density": 0.3}),
    "adapter-scaled": Case({"adapter": "lora/a", "base": "decoder/base"}, edit=True, output=FOLDER, adapter=True),
    "adapter-scaled-some": Case({"adapter": "lora/b", "num_layers": 4}, edit=True, output=FOLDER, adapter=True),
    "adapter-scaled-kohya": Case({"adapter": "lora/c.safetensors", "num_layers": 4}, edit=True, adapter=True),
    "adapter-stacked": Case(TWO_ADAPTERS, output=FOLDER, adapter=True),
    "adapter-stacked-float16": Case({**TWO_ADAPTERS, "dtype": "float16"}, output=FOLDER, adapter=True),
    "adapter-stacked-kohya": Case(TWO_FILES, adapter=True),
}
"""Folded into their base; scaled in place; their ranks side by side. None is of fewer ranks, for singular vectors are
not the same on every machine.
"""
OF_MODELS = {**EDITS, **MERGES}
CASES = {**OF_MODELS, **ADAPTERS}


# --- what is recorded ---


def generator() -> str:
    """The digest of numbers that torch's generator gives for a seed, in the form in which DARE asks for them."""
    drawn = torch.empty(1000, dtype=torch.int64).random_(-(2**63), None, generator=torch.Generator().manual_seed(42))
    return sha256(drawn.numpy().tobytes()).hexdigest()


def trigonometry() -> str:
    """The digest of what the C library gives for a thousand numbers, to the last bit."""
    xs = [number / 1009 for number in range(1, 1000)]
    return sha256(repr([(math.sin(x), math.acos(x), x**0.7) for x in xs]).encode()).hexdigest()


def input_digests() -> dict[str, str]:
    """What every result rests on."""
    own = {name: checkpoint.digest for name, checkpoint in inputs().items()}
    return {**own, "torch's generator": generator(), "the C library": trigonometry()}


def write_inputs(folder: Path) -> None:
    for name, checkpoint in inputs().items():
        checkpoint.write(folder / name)


def output_digests(folder: Path, resources: lines.Resources, cases: Mapping[str, Case] = CASES) -> Iterator[Any]:
    """Each case's name, and the digest of each file that it makes.

    Args:
        folder: of the inputs; outputs go beside them.
        resources: what the runs may use.
        cases: which.
    """
    for name, case in cases.items():
        yield name, case.digests(folder, folder / "outputs" / name, resources)
