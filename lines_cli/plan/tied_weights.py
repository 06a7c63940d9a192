"""Heads and embeddings that share their weights: which they are, by name, shape and config."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from lines_cli.checkpoint.reader import Checkpoint

# Modules with a row per vocabulary entry, by their names; and words that say an embedding is of something else.
_TOKEN_EMBEDDINGS = frozenset(
    "embed_tokens embed_tokens_per_layer wte word_embeddings word_embedding tok_embeddings token_embedding embed_in "
    "shared embeddings embedding".split()
)
_TOKEN_HEADS = frozenset(
    "lm_head lm_heads lm_loss embed_out output output_layer decoder predictions proj_out vocab_projector "
    "generator_lm_head final_logits_bias".split()
)
_NOT_OF_TOKENS = re.compile(r"pos|tile|patch|type|class|time")


def tied_partner(name: str, *, lacking: Checkpoint, having: Checkpoint, resize: bool) -> str | None:
    """The tensor that stands for `name` in the side that lacks it, because there the two are one weight.

    That is so where its config (or, of a lone file, the other side's) ties head and token embedding; and always between
    the token embeddings of an encoder-decoder and its `shared` one. `resize` allows another number of rows.
    """
    if not is_vocabulary(name):
        return None
    shape = having.tensors[name].info.shape
    alike = [
        other
        for other, stored in lacking.tensors.items()
        if is_vocabulary(other) and _same_but_rows(stored.info.shape, shape)
    ]
    same = [other for other in alike if lacking.tensors[other].info.shape == shape]
    fitting = same or (alike if resize and _module(name) in _TOKEN_HEADS else [])
    shared = [other for other in fitting if _module(other) == "shared"]
    if shared and _module(name) == "embed_tokens":
        return shared[0]
    if _module(name) not in _TOKEN_HEADS or not says_tied(lacking.config or having.config):
        return None
    embeddings = [other for other in fitting if _module(other) in _TOKEN_EMBEDDINGS] or fitting
    return embeddings[0] if len(embeddings) == 1 else shared[0] if shared else None


def _same_but_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[1:] == b[1:]


def tied_embedding(name: str, side: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The token embedding that `config` ties the head `name` to, where `side` stores both."""
    if _module(name) not in _TOKEN_HEADS or name not in side.tensors or not says_tied(config):
        return None
    shape = side.tensors[name].info.shape
    alike = [other for other in side.tensors if _module(other) in _TOKEN_EMBEDDINGS and is_vocabulary(other)]
    embeddings = [other for other in alike if side.tensors[other].info.shape == shape]
    return min(embeddings, key=lambda other: (_module(other) != "shared", other.count("."), other), default=None)


def tied_copies(names: Collection[str], side: Checkpoint, config: Mapping[str, Any]) -> set[str]:
    """Of tensors that hold the same, those that do so by design: heads that are tied to an embedding among them, and
    the token embeddings of an encoder-decoder beside its `shared` one.
    """
    embeddings = [name for name in names if _module(name) in _TOKEN_EMBEDDINGS and is_vocabulary(name)]
    tied = {name for name in names if embeddings and tied_embedding(name, side, config) is not None}
    if any(_module(name) == "shared" for name in embeddings):
        tied |= {name for name in embeddings if _module(name) == "embed_tokens"}
    return tied


def _module(name: str) -> str:
    """The module that a weight or bias belongs to, without a number at its end; a bare parameter is its own."""
    *modules, last = name.split(".")
    if last not in ("weight", "bias"):
        return last if last == "final_logits_bias" else ""
    return next((module for module in reversed(modules) if not module.isdecimal()), "")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per vocabulary entry: a token embedding, or a head over tokens, or its bias."""
    return _module(name) in _TOKEN_EMBEDDINGS | _TOKEN_HEADS and not _NOT_OF_TOKENS.search(name)


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the token embedding.

    transformers before 5 leaves `tie_word_embeddings` out where it is true, its default; from 5 on it is written.
    """
    nested = (config.get(key) for key in ("text_config", "decoder", "language_config"))
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if "tie_word_embeddings" in part:
            return part["tie_word_embeddings"] is True
    version = re.match(r"\d{1,9}", str(config.get("transformers_version", "0")))
    return "model_type" in config and version is not None and int(version[0]) < 5
