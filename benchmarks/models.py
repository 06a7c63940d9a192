"""The synthetic checkpoints that the benchmarks read, in benchmarks/models. Made when a case first needs them.

    python models.py ft1 llama-28-2048 bf16      # one of them, by hand: ROLE SHAPE DTYPE [FORM]

Values are normal, standard deviation 0.02, and a fine-tune adds an update of 0.002 to its base. They are cut out of
one stretch of PERIOD random numbers, which makes a model as fast as the disk takes it: nothing that is timed looks at
whether numbers come again 33 MB later.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import subprocess
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

from timing import WORK

from lines_cli.checkpoint.header import lay_out

PERIOD = 16_777_259  # a prime, so that no stride finds the repetition
SHARD = 1_000_000_000
RANK = 16
VOCABULARY = 32_000
DTYPES = {"bf16": ("BF16", "bfloat16", 2), "fp32": ("F32", "float32", 4)}
BLOCK, SCALE = 128, 0.25e-3  # of a model in FP8: one scale for each block, the same for all


@dataclass(frozen=True)
class Model:
    """One checkpoint: `base`, or a fine-tune of it (`ft1`, `ft2`, ...), of some shape and dtype.

    In `fp8` the projections are codes, each block of them with a scale, and the rest is bf16. Shapes are
    `llama-LAYERS-WIDTH`; `moe-LAYERS-EXPERTS`, tensors of 64 entries; `tiny-COUNT`, the same in one numbered list, in
    one file; `huge-MEGABYTES`, one tensor; and `headers-COUNT`, tensors of no entries in 50 shards. `form` is how its
    files end: `safetensors`, or `bin`, which torch.save writes; or `lora`, an adapter on every matrix of the layers, as
    PEFT saves it.
    """

    role: str
    shape: str
    dtype: str = "bf16"
    form: str = "safetensors"

    @property
    def name(self) -> str:
        """The folder in benchmarks/models."""
        return f"{self.role}-{self.shape}-{self.dtype}" + ("" if self.form == "safetensors" else f"-{self.form}")

    @property
    def files(self) -> list[Path]:
        return sorted((WORK / self.name).glob("*.bin" if self.form == "bin" else "*.safetensors"))

    @property
    def config(self) -> Path:
        """Written last: where it is, the rest is."""
        return WORK / self.name / ("adapter_config.json" if self.form == "lora" else "config.json")

    @property
    def nbytes(self) -> int:
        """Bytes of weights."""
        return sum(math.prod(shape) * width for of in self.stored().values() for _, _, shape, width in of)

    @property
    def plain(self) -> str:
        """The dtype of what is stored whole."""
        return "bf16" if self.dtype == "fp8" else self.dtype

    def stored(self) -> dict[str, list[tuple[str, str, tuple[int, ...], int]]]:
        """For each tensor what is stored of it: name, dtype, shape, bytes of an entry."""
        in_header, _, width = DTYPES[self.plain]
        found = {}
        for name, shape in self.tensors().items():
            found[name] = [(name, in_header, shape, width)]
            if self.dtype == "fp8" and name.endswith("_proj.weight"):
                grid = tuple(-(-size // BLOCK) for size in shape)
                found[name] = [(name, "F8_E4M3", shape, 1), (f"{name}_scale_inv", "F32", grid, 4)]
        return found

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, by name."""
        kind, *numbers = self.shape.split("-")
        if kind == "llama":
            whole = _llama(int(numbers[0]), int(numbers[1]))
            return _factors(whole) if self.form == "lora" else whole
        if kind == "moe":
            return _mixture(int(numbers[0]), int(numbers[1]))
        if kind == "huge":
            return {"model.layers.0.mlp.down_proj.weight": (1000 * int(numbers[0]) // DTYPES[self.plain][2], 1000)}
        shape = (8, 8) if kind == "tiny" else (0,)
        parts = [f"mlp.experts.{expert}.{part}_proj" for expert in range(99) for part in ("gate", "up", "down")]
        return {f"model.layers.{i // 297}.{parts[i % 297]}.weight": shape for i in range(int(numbers[0]))}

    def shards(self) -> list[list[str]]:
        """The names of the tensors of each file."""
        tensors = self.tensors()
        if self.shape.startswith("headers"):
            return [list(tensors)[shard::50] for shard in range(50)]
        groups: list[list[str]] = [[]]
        held = 0
        for name, of in self.stored().items():
            size = sum(math.prod(shape) * width for _, _, shape, width in of)
            if held and held + size > SHARD:
                groups.append([])
                held = 0
            groups[-1].append(name)
            held += size
        return groups

    def make(self) -> None:
        """Write it, unless it is there."""
        if not self.config.exists():
            print(f"making {self.name}, {self.nbytes / 1e9:.2f} GB", flush=True)
            shutil.rmtree(WORK / self.name, ignore_errors=True)
            # Whoever times other processes imports no torch: that is done by a process of its own.
            subprocess.run([sys.executable, __file__, self.role, self.shape, self.dtype, self.form], check=True)


def _llama(layers: int, width: int) -> dict[str, tuple[int, ...]]:
    block: dict[str, tuple[int, ...]] = {
        **{f"self_attn.{name}_proj": (width, width) for name in "qkvo"},
        **{f"mlp.{name}_proj": (3 * width, width) for name in ("gate", "up")},
        "mlp.down_proj": (width, 3 * width),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    return {
        "model.embed_tokens.weight": (VOCABULARY, width),
        **{f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in block.items()},
        "model.norm.weight": (width,),
        "lm_head.weight": (VOCABULARY, width),
    }


def _factors(tensors: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Two of each matrix of the layers."""
    factors: dict[str, tuple[int, ...]] = {}
    for name, shape in tensors.items():
        if ".layers." in name and len(shape) == 2:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            factors[f"{module}.lora_A.weight"] = (RANK, shape[1])
            factors[f"{module}.lora_B.weight"] = (shape[0], RANK)
    return factors


def _mixture(layers: int, experts: int) -> dict[str, tuple[int, ...]]:
    own = [*(f"self_attn.{name}_proj" for name in "qkvo"), "mlp.gate", "input_layernorm", "post_attention_layernorm"]
    own += [f"mlp.experts.{i}.{name}_proj" for i in range(experts) for name in ("gate_up", "down")]
    inside = [f"layers.{i}.{name}" for i in range(layers) for name in own]
    names = ["model.embed_tokens", *(f"model.{name}" for name in inside), "model.norm", "lm_head"]
    return dict.fromkeys(sorted(f"{name}.weight" for name in names), (8, 8))  # as the format's own writer has them


def _config(model: Model) -> dict[str, object]:
    """What mergekit, PEFT and lines want to know of a model: a Llama's config, also for shapes that are none."""
    if model.form == "lora":
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "target_modules": [*(f"{name}_proj" for name in "qkvo"), "gate_proj", "up_proj", "down_proj"],
        }
    kind, *numbers = model.shape.split("-")
    layers, width = map(int, numbers) if kind == "llama" else (-(-len(model.tensors()) // 297), 64)
    layers = int(numbers[0]) if kind == "moe" else layers
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 64),
        "tie_word_embeddings": False,
        "dtype": DTYPES[model.plain][1],
        **({"quantization_config": QUANTISED} if model.dtype == "fp8" else {}),
    }


QUANTISED = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


def _values(role: str, dtype: str) -> memoryview:
    """The bytes of the stretch of numbers that a model is cut out of."""
    import torch

    values = 0.02 * torch.randn(PERIOD, generator=torch.Generator().manual_seed(0))
    if role != "base":
        values += 0.002 * torch.randn(PERIOD, generator=torch.Generator().manual_seed(zlib.crc32(role.encode())))
    if dtype == "F8_E4M3":
        values = values.div_(SCALE).clamp_(-448, 448)
    kinds = {"F8_E4M3": torch.float8_e4m3fn, "BF16": torch.bfloat16, "F32": torch.float32}
    return values.to(kinds[dtype]).view(torch.uint8).numpy().data


def _save(path: Path, shapes: dict[str, tuple[int, ...]], values: memoryview, dtype: str) -> None:
    """Have torch save a file's tensors, of the same numbers as in safetensors."""
    import torch

    every = torch.frombuffer(values, dtype=getattr(torch, DTYPES[dtype][1]))
    held = {}
    for name, shape in shapes.items():
        start, numel = zlib.crc32(name.encode()) % PERIOD, math.prod(shape)
        again = -(-(start + numel) // PERIOD)
        held[name] = every.repeat(again)[start : start + numel].clone().view(shape)
    torch.save(held, path)


def _write(model: Model) -> None:
    folder = WORK / model.name
    folder.mkdir(parents=True)
    tensors, stored, shards = model.tensors(), model.stored(), model.shards()
    kinds = {in_header for of in stored.values() for name, in_header, *_ in of if name in tensors}
    values = {in_header: _values(model.role, in_header) for in_header in kinds}
    weight_map = {}
    stem = {"safetensors": "model", "bin": "pytorch_model", "lora": "adapter_model"}[model.form]
    ending = "bin" if model.form == "bin" else "safetensors"
    for number, names in enumerate(shards, 1):
        file = f"{stem}-{number:05d}-of-{len(shards):05d}.{ending}" if len(shards) > 1 else f"{stem}.{ending}"
        rows = [row for name in names for row in stored[name]]
        weight_map.update({name: file for name, *_ in rows})
        if model.form == "bin":
            _save(folder / file, {name: tensors[name] for name in names}, values[DTYPES[model.dtype][0]], model.dtype)
            continue
        head, _ = lay_out([(name, in_header, shape) for name, in_header, shape, _ in rows], {"format": "pt"})
        with open(folder / file, "wb") as out:
            out.write(head)
            for name, in_header, shape, width in rows:
                if name not in tensors:
                    out.write(struct.pack("<f", SCALE) * math.prod(shape))
                    continue
                # The same tensor starts at the same place in the base's numbers and in its fine-tunes'.
                start, left = zlib.crc32(name.encode()) % PERIOD * width, math.prod(shape) * width
                while left:
                    left -= out.write(values[in_header][start : start + left])
                    start = 0
    if len(shards) > 1:
        index = {"metadata": {"total_size": model.nbytes}, "weight_map": weight_map}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    model.config.write_text(json.dumps(_config(model), indent=2))


if __name__ == "__main__":
    _write(Model(*sys.argv[1:5]))
