"""The modules of FLUX, which diffusers calls and cuts otherwise than the code that it was trained with: there queries,
keys and values are one matrix, in single blocks with the MLP's beside them. There are adapters for either.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.plan.in_modules import InModules
from lines_cli.plan.pieces import Run

_BLOCKS: tuple[tuple[str, str, Mapping[str, tuple[str, ...]]], ...] = (
    (
        "double_blocks",
        "transformer_blocks",
        {
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    (
        "single_blocks",
        "single_transformer_blocks",
        {
            "modulation.lin": ("norm.linear",),
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
        },
    ),
)
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SWAPPED = "final_layer.adaLN_modulation.1"
"""Shift above scale; diffusers has scale above shift."""

_OF_THE_ORIGINAL = re.compile(r"(?P<before>(?:.*\.)?)double_blocks\.0\.img_attn\.qkv\.weight", re.DOTALL)
_OF_DIFFUSERS = re.compile(r"(?P<before>(?:.*\.)?)transformer_blocks\.0\.attn\.add_q_proj\.weight", re.DOTALL)
_ORIGINAL_IN_ADAPTERS = re.compile(r"(?:\A|[._])(?:double|single)_blocks[._]\d")
_DIFFUSERS_IN_ADAPTERS = re.compile(r"(?:\A|[._])(?:single_)?transformer_blocks[._]\d")


class _Module(NamedTuple):
    """A module of the original, and what diffusers has in its place, one below the other."""

    original: str
    parts: tuple[str, ...]


def in_other_names(base: Checkpoint, modules: Iterable[str]) -> InModules | None:
    """A base by the names of the modules that an adapter is of, where it is FLUX and stored by the others; else None.

    Args:
        base: what the adapter is put onto.
        modules: the adapter's names of what it changes.
    """
    original = next((match for name in base.tensors if (match := _OF_THE_ORIGINAL.fullmatch(name))), None)
    diffusers = next((match for name in base.tensors if (match := _OF_DIFFUSERS.fullmatch(name))), None)
    names = list(modules)
    if diffusers is not None and original is None and any(map(_ORIGINAL_IN_ADAPTERS.search, names)):
        return _view(base, diffusers["before"], to_original=True)
    if original is not None and diffusers is None and any(map(_DIFFUSERS_IN_ADAPTERS.search, names)):
        return _view(base, original["before"], to_original=False)
    return None


def _modules(base: Checkpoint, before: str) -> Iterator[_Module]:
    """The modules that a base has whose names begin so, in both ways to call them."""
    yield from (_Module(name, (there,)) for name, there in _OUTSIDE.items())
    for ours, theirs, inner in _BLOCKS:
        start = re.compile(rf"{re.escape(before)}(?:{ours}|{theirs})\.(\d+)\.", re.DOTALL)
        numbers = {int(match[1]) for name in base.tensors if (match := start.match(name))}
        for number in sorted(numbers):
            for name, parts in inner.items():
                yield _Module(f"{ours}.{number}.{name}", tuple(f"{theirs}.{number}.{part}" for part in parts))


def _view(base: Checkpoint, before: str, *, to_original: bool) -> InModules:
    tensors, parts = dict[str, StoredTensor](), dict[str, tuple[Run, ...]]()
    stored_as = {name: name for name in base.tensors}
    for module in _modules(base, before):
        for parameter in ("weight", "bias"):
            original = f"{before}{module.original}.{parameter}"
            pieces = [f"{before}{part}.{parameter}" for part in module.parts]
            stored = pieces if to_original else [original]
            if not all(name in base.tensors for name in stored):
                continue
            if len(pieces) == 1 and module.original != _SWAPPED:
                stored_as[original if to_original else pieces[0]] = stored_as.pop(stored[0])
                continue
            for name in stored:
                del stored_as[name]
            if to_original:
                shapes = [base.tensors[name].info.shape for name in pieces]
                rows = sum(shape[0] for shape in shapes)
                tensors[original] = _like(base.tensors[pieces[0]], (rows, *shapes[0][1:]))
            else:
                each = _rows(base, f"{before}{module.original}", len(pieces))
                shapes = [(number, *base.tensors[original].info.shape[1:]) for number in each]
                tensors |= {
                    name: _like(base.tensors[original], shape) for name, shape in zip(pieces, shapes, strict=True)
                }
            for source, runs in _runs(original, pieces, shapes, swapped=module.original == _SWAPPED, to=to_original):
                parts[source] = tuple(sorted((*parts.get(source, ()), *runs)))
    kept = {called: base.tensors[name] for called, name in stored_as.items()}
    formulas = {called: base.formulas[name] for called, name in stored_as.items() if name in base.formulas}
    return InModules(base, replace(base, tensors=kept | tensors, formulas=formulas), stored_as, parts)


def _like(stored: StoredTensor, shape: tuple[int, ...]) -> StoredTensor:
    nbytes = math.prod(shape) * itemsize(stored.info.dtype)
    return stored._replace(info=TensorInfo(stored.info.dtype, shape, stored.info.offset, nbytes))


def _rows(base: Checkpoint, module: str, number: int) -> list[int]:
    """How many rows of a module of the original are each of its parts': queries, keys and values are square."""
    rows, columns = base.tensors[f"{module}.weight"].info.shape[:2]
    square = [columns] * min(number, _QUERIES_KEYS_VALUES)
    return [rows] if number == 1 else [*square, *([rows - sum(square)] if number > len(square) else [])]


_QUERIES_KEYS_VALUES = 3


def _runs(
    original: str, pieces: list[str], shapes: list[tuple[int, ...]], *, swapped: bool, to: bool
) -> Iterator[tuple[str, list[Run]]]:
    """Each stored tensor with the entries of the others that its own are.

    Args:
        original, pieces: the tensor of the original, and those of diffusers.
        shapes: of the latter.
        swapped: whether the halves of a single piece have changed places.
        to: whether the original's is the one that is not stored.
    """
    at = 0
    for name, shape in zip(pieces, shapes, strict=True):
        numel = math.prod(shape)
        cuts = [(0, numel // 2, numel // 2), (numel // 2, numel - numel // 2, 0)] if swapped else [(0, numel, 0)]
        for start, number, there in cuts:  # in the piece; in the original
            if to:
                yield name, [Run(start, number, original, at + there, (number,), (1,))]
            else:
                yield original, [Run(at + there, number, name, start, (number,), (1,))]
        at += numel
