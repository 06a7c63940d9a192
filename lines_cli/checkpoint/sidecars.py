"""What stands beside the weights in a checkpoint folder: carried over, adapted where the weights changed it, or
written anew.

Carried over is what a loader needs: config, tokenizer, generation config, chat template, processor, custom model code,
licence. Never weights, pickles or training state, whatever they are called.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lines_cli.checkpoint.reader import Checkpoint, read_json
from lines_cli.errors import printable

CONFIG = "config.json"
RECIPE = "lines_recipe.yaml"
MODEL_CARD = "README.md"

TOKENIZER_FILES = tuple(
    """
    *tokenizer*.json *vocab*.json vocab*.txt *merges.txt *.model *.spm *.tiktoken *.bpe bpe.codes spiece.* tekken.json
    special_tokens_map.json added_tokens.json normalizer.json chat_template* additional_chat_templates/*.jinja
    tokenization_*.py
    """.split()
)
CARRIED_FILES = (
    *TOKENIZER_FILES,
    *"*config*.json *processor*.json modules.json *_Pooling/config.json *.jinja *.py".split(),
    *"LICENSE* LICENCE* NOTICE* USE_POLICY*".split(),
)
"""Patterns of file names, relative to the folder, that an output folder takes over from an input."""

NEVER_CARRIED = tuple(
    """
    *.safetensors *.index*.json *.bin *.pt *.pth *.ckpt *.pkl *.pickle *.joblib *.h5 *.msgpack *.onnx *.gguf *.np[yz]
    training_args* trainer_* optimizer* scheduler* rng_state* adapter_* zero_* *results*.json
    """.split()
)
"""Weights, pickles and training state, whatever pattern above they match."""


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file beside the weights: a copy of `source`, or `content`."""

    name: str
    source: Path | None = None
    content: bytes | None = None


def carried_files(folder: Path, patterns: Iterable[str] = CARRIED_FILES) -> dict[str, Path]:
    """The files of `folder` that an output folder takes over: name relative to it -> where it is."""
    patterns = tuple(patterns)
    found: dict[str, Path] = {}
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and is_carried(name, patterns):
            found[name] = path
    return found


def is_carried(name: str, patterns: Iterable[str] = CARRIED_FILES) -> bool:
    """Whether an output folder takes over a file of this name, which is relative to its folder."""
    return _matches(name, patterns) and not never_carried(name)


def never_carried(name: str) -> bool:
    """Whether it is weights, a pickle or training state by its name."""
    return _matches(name.rpartition("/")[2], NEVER_CARRIED)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the whole name matches; `*` stays within one folder level."""
    return any(pattern.count("/") == name.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def carry_over(
    base: Checkpoint,
    ft: Checkpoint,
    *,
    dtype: str | None,
    stored: str | None,
    rows: Mapping[int, int],
    keep_base_rows: bool,
) -> tuple[list[Sidecar], list[str]]:
    """The carried-over files of an output folder, and what to say of them.

    They are the fine-tune's; where it is a lone file or has no config, the base's fill the gaps. `config.json` follows
    what changed:

    Args:
        base, ft: the inputs.
        dtype: what the weights were cast to (`bfloat16`); None where they keep the fine-tune's.
        stored: what most of the output's float entries are stored as, for a config that is not the fine-tune's.
        rows: numbers of vocabulary rows that became another number.
        keep_base_rows: those rows are now the base's, so its tokenizer goes with them.
    """
    notes: list[str] = []
    ft_files = carried_files(ft.folder) if ft.folder else {}
    base_files = carried_files(base.folder) if base.folder else {}
    files = ft_files
    if CONFIG not in ft_files and CONFIG in base_files:
        files = base_files | ft_files
        dtype = dtype or stored
        borrowed = sorted(files.keys() - ft_files.keys())
        notes.append(f"the fine-tune has no config.json; from the base come {', '.join(map(printable, borrowed))}")
    elif not files:
        notes.append("neither input is a folder with a config.json: the output folder holds weights only")
    ids: Mapping[str, Any] | None = None
    if rows:
        kept, other = (base, ft) if keep_base_rows else (ft, base)
        of_rows = (*TOKENIZER_FILES, "generation_config.json")  # token ids, all of them
        tokenizer = carried_files(kept.folder, of_rows) if kept.folder else {}
        files = {name: path for name, path in files.items() if not _matches(name, of_rows)} | tokenizer
        ids = kept.config
        if not tokenizer:
            notes.append(
                f"no tokenizer goes with the {next(iter(rows.values())):,} rows kept: "
                f"{kept.name} has none, and {other.name}'s has other rows"
            )

    sidecars = [Sidecar(name, source=path) for name, path in files.items() if name != CONFIG]
    if CONFIG in files:
        original = read_json(files[CONFIG])
        config = _follow(original, dtype=dtype, rows=rows, ids=ids)
        if config == original:
            sidecars.append(Sidecar(CONFIG, source=files[CONFIG]))
        else:
            sidecars.append(Sidecar(CONFIG, content=json.dumps(config, indent=2).encode() + b"\n"))
    return sidecars, notes


def _follow(
    config: Any, *, dtype: str | None, rows: Mapping[int, int], ids: Mapping[str, Any] | None, top: bool = True
) -> Any:
    """A config whose dtype and vocabulary are those of the new weights, in its nested configs too.

    Args:
        config: as it was.
        dtype: what the weights are now; None if that did not change.
        rows: numbers of vocabulary rows that became another number.
        ids: where the ids of special tokens come from, if not from `config`.
        top: whether it is the outermost.
    """
    if not isinstance(config, dict):
        return config
    changed = dict(config)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and dtype and isinstance(value, str):
            changed[key] = dtype
        elif key == "vocab_size" and type(value) is int and value in rows:
            changed[key] = rows[value]
        elif ids is not None and key.endswith(("_token_id", "_token_ids")):
            changed[key] = ids.get(key)
        elif key.endswith("config") and isinstance(value, dict):
            inner = ids.get(key) if ids is not None else None
            nested = inner if isinstance(inner, Mapping) else ids
            changed[key] = _follow(value, dtype=dtype, rows=rows, ids=nested, top=False)
    if top and dtype and "model_type" in config and not {"dtype", "torch_dtype"} & config.keys():
        changed["torch_dtype"] = dtype
    return changed


def index_file(stem: str, weight_map: Mapping[str, str], *, nbytes: int, parameters: int) -> Sidecar:
    """The index of a sharded checkpoint: which file holds which tensor."""
    index = {
        "metadata": {"total_size": nbytes, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return Sidecar(f"{stem}.safetensors.index.json", content=json.dumps(index, indent=2).encode() + b"\n")


def model_card(
    base: Checkpoint,
    ft: Checkpoint,
    *,
    title: str,
    how: str,
    coefficients: Iterable[tuple[str, int, float, float]],
    outside: tuple[float, float],
    filters: Iterable[tuple[str, float]],
) -> Sidecar:
    """A model card for the Hub: front matter, what was done, and with which coefficients.

    Args:
        base, ft: the inputs.
        title: the model's name.
        how: one paragraph on what was done.
        coefficients: per stack its name, layers, first and last coefficient.
        outside: the coefficients outside the blocks, before and behind them.
        filters: parts of names, and the coefficient of the tensors that have them.
    """
    inputs = [_public_name(base), _public_name(ft)]
    front = {"base_model": inputs, "base_model_relation": "merge", "tags": ["lines", "merge", "task-arithmetic"]}
    if library := _library(ft):
        front["library_name"] = library
    rows = [f"| {_code(name)} | {layers} | {first:.6g} | {last:.6g} |" for name, layers, first, last in coefficients]
    rows.append(f"| outside the blocks | | {outside[0]:.6g} | {outside[1]:.6g} |")
    rows += [f"| names with {_code(pattern)} | | {value:.6g} | {value:.6g} |" for pattern, value in filters]
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {_plain(title)}

{how}

| | model |
|---|---|
| base | {_code(inputs[0])} |
| fine-tune | {_code(inputs[1])} |

| stack | layers | first coefficient | last coefficient |
|---|---|---|---|
{chr(10).join(rows)}

[`{RECIPE}`]({RECIPE}) beside this card runs it again: `lines edit --config {RECIPE} -o OUT`.

LiNeS: Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, ICLR 2025,
arXiv:2410.17146.
"""
    return Sidecar(MODEL_CARD, content=text.encode())


def _public_name(checkpoint: Checkpoint) -> str:
    """A Hub id as it is; of a local path only the last part, since the rest is nobody's business."""
    return checkpoint.hub_id.partition("@")[0] if checkpoint.hub_id else checkpoint.path.resolve().name


def _library(ft: Checkpoint) -> str | None:
    if ft.stem == "open_clip_model":
        return "open_clip"
    if "_diffusers_version" in ft.config:
        return "diffusers"
    return "transformers" if "model_type" in ft.config else None


def _plain(text: str) -> str:
    """One printable line, safe in Markdown and in a table."""
    return "".join(character if character.isprintable() else "?" for character in text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_plain(text).replace('`', '')}`"
