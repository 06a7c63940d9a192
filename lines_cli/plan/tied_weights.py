"""Heads and embeddings that share their weights: which they are, by name, shape and config."""

from __future__ import annotations

import re
from collections import defaultdict
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
_OF_VOCABULARY = _TOKEN_EMBEDDINGS | _TOKEN_HEADS
_NOT_OF_TOKENS = re.compile(r"pos|tile|patch|type|class|time")


def tied_partner(
    name: str, shape: tuple[int, ...], vocabulary: Mapping[str, tuple[int, ...]], *, tied: bool, resize: bool
) -> str | None:
    """The tensor that stands for `name` in a side that lacks it, because there the two are one weight.

    That is so where its config (or, of a lone file, the other side's) ties head and token embedding; and always between
    the token embeddings of an encoder-decoder and its `shared` one.

    Args:
        name, shape: of the tensor, where it is.
        vocabulary: the shapes of the lacking side's embeddings and heads, by name.
        tied: what the config says (`says_tied`).
        resize: whether another number of rows is allowed.
    """
    if not is_vocabulary(name):
        return None
    alike = [other for other, there in vocabulary.items() if _same_but_rows(there, shape)]
    same = [other for other in alike if vocabulary[other] == shape]
    fitting = same or (alike if resize and _module(name) in _TOKEN_HEADS else [])
    shared = [other for other in fitting if _module(other) == "shared"]
    if shared and _module(name) == "embed_tokens":
        return shared[0]
    if _module(name) not in _TOKEN_HEADS or not tied:
        return None
    embeddings = [other for other in fitting if _module(other) in _TOKEN_EMBEDDINGS] or fitting
    return embeddings[0] if len(embeddings) == 1 else shared[0] if shared else None


def _same_but_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[1:] == b[1:]


def tied_embeddings(side: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """The token embedding that `config` ties a head to, by the head's name, for every head of `side` that it stores
    beside its embedding.
    """
    if not says_tied(config):
        return {}
    by_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, stored in side.tensors.items():
        if _module(name) in _TOKEN_EMBEDDINGS and is_vocabulary(name):
            by_shape[stored.info.shape].append(name)
    embeddings = {
        shape: min(names, key=lambda name: (_module(name) != "shared", name.count("."), name))
        for shape, names in by_shape.items()
    }
    return {
        name: embeddings[stored.info.shape]
        for name, stored in side.tensors.items()
        if stored.info.shape in embeddings and _module(name) in _TOKEN_HEADS
    }


def tied_heads(side: Checkpoint, config: Mapping[str, Any]) -> dict[str, str]:
    """The same of a checkpoint that may hold several models, each with its own config; `config` is of one model."""
    if not side.components:
        return tied_embeddings(side, config)
    found: dict[str, str] = {}
    for one in side.components:
        tied = tied_embeddings(one.checkpoint, one.checkpoint.config)
        found |= {one.prefix + head: one.prefix + embedding for head, embedding in tied.items()}
    return found


def tied_copies(names: Collection[str], tied: Mapping[str, str]) -> set[str]:
    """Of tensors that hold the same, those that do so by design: heads that are tied to an embedding among them, and
    the token embeddings of an encoder-decoder beside its `shared` one. `tied` are those of `tied_embeddings`.
    """
    embeddings = [name for name in names if _module(name) in _TOKEN_EMBEDDINGS and is_vocabulary(name)]
    copies = {name for name in names if embeddings and name in tied}
    if any(_module(name) == "shared" for name in embeddings):
        copies |= {name for name in embeddings if _module(name) == "embed_tokens"}
    return copies


def _module(name: str) -> str:
    """The module that a weight or bias belongs to, without a number at its end; a bare parameter is its own."""
    before, _, last = name.rpartition(".")
    if last not in ("weight", "bias"):
        return last if last == "final_logits_bias" else ""
    before, _, module = before.rpartition(".")
    while module.isdecimal():
        before, _, module = before.rpartition(".")
    return module


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per vocabulary entry: a token embedding, or a head over tokens, or its bias."""
    return _module(name) in _OF_VOCABULARY and not _NOT_OF_TOKENS.search(name)


def is_head(name: str) -> bool:
    """Whether a tensor is of a head over tokens, by its name."""
    return _module(name) in _TOKEN_HEADS and not _NOT_OF_TOKENS.search(name)


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


def untied(config: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The key of a config that ties the head to the token embedding, as a path; and the config that does not."""
    for nested in ("text_config", "decoder", "language_config"):
        part = config.get(nested)
        if "tie_word_embeddings" not in config and isinstance(part, Mapping) and "tie_word_embeddings" in part:
            return (nested, "tie_word_embeddings"), {**config, nested: {**part, "tie_word_embeddings": False}}
    return ("tie_word_embeddings",), {**config, "tie_word_embeddings": False}
