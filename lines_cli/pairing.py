"""Which tensor of the base belongs to which of the fine-tune: by name, through tied weights; and what is left over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some
from lines_cli.recipe import Recipe

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

Pair = tuple[str | None, str | None]
"""The names that one output tensor is read from: in the base, in the fine-tune."""


def pair_tensors(
    base: Checkpoint, ft: Checkpoint, in_base: Mapping[str, str], recipe: Recipe, notes: list[str]
) -> dict[str, Pair]:
    """Pair the tensors of the two sides by name; see through tied weights; settle or refuse what is left over.

    Args:
        base, ft: the two sides.
        in_base: the base's tensors by the fine-tune's names for them (`names_in_base`).
        recipe: says what becomes of a tensor that one side lacks and that is not tied.
        notes: gets a line for everything that a person should know of.

    Returns:
        Output tensor name -> where it is read from.

    Raises:
        MismatchError: tensors are missing on one side, and the recipe calls that an error.
    """
    pairs: dict[str, Pair] = {name: (in_base[name], name) for name in ft.tensors if name in in_base}
    only_ft = [name for name in ft.tensors if name not in in_base]
    only_base = [name for name in in_base if name not in ft.tensors]
    resize = recipe.resize != "error"

    for name in list(only_ft):
        if partner := _tied_partner(name, lacking=base, having=ft, resize=resize):
            pairs[name] = (partner, name)
            only_ft.remove(name)
            notes.append(
                f"{printable(name)} is not in the base, whose config ties it to {printable(partner)}, used for it"
            )
    for name in list(only_base):
        if partner := _tied_partner(in_base[name], lacking=ft, having=base, resize=resize):
            only_base.remove(name)
            notes.append(
                f"{printable(name)} is not in the fine-tune, whose config ties it to {printable(partner)}: left out"
            )

    if (only_ft or only_base) and recipe.missing == "error":
        raise _missing(base, ft, only_base, only_ft)
    if recipe.missing in ("copy", "ft"):
        pairs.update({name: (None, name) for name in only_ft})
    if recipe.missing == "copy":
        pairs.update({name: (in_base[name], None) for name in only_base})
    for names, side, kept in (
        (only_ft, "fine-tune", recipe.missing in ("copy", "ft")),
        (only_base, "base", recipe.missing == "copy"),
    ):
        if names:
            done = "copied as they are" if kept else "left out"
            notes.append(f"{len(names):,} tensor(s) of the {side} alone, {done}:\n{some(sorted(names))}")
    if not pairs:
        raise MismatchError(
            f"{base.name} and {ft.name} have no tensor in common",
            hint="Are they of one model?",
        )
    return pairs


def _missing(base: Checkpoint, ft: Checkpoint, only_base: list[str], only_ft: list[str]) -> MismatchError:
    parts = ["the two sides do not hold the same tensors."]
    for names, there, not_there in ((only_base, base, ft), (only_ft, ft, base)):
        if names:
            parts.append(
                f"{len(names):,} of {len(there.tensors):,} in {there.name} that {not_there.name} lacks:\n"
                f"{some(sorted(names))}"
            )
    hint = (
        "--missing ft gives the fine-tune's set of tensors (as for a new head); --missing copy takes each from the "
        "side that has it; --missing skip leaves them out."
    )
    if len(only_ft) == len(ft.tensors):
        hint = "No tensor is on both sides. Are they of one model?"
    return MismatchError("\n".join(parts), hint=hint)


def names_in_base(base: Checkpoint, ft: Checkpoint, notes: list[str]) -> dict[str, str]:
    """The base's tensors by the names that the fine-tune has for them.

    A model saved by itself and one saved inside another (GPT-2's `h.0` and `transformer.h.0`) differ by one prefix, as
    transformers, too, sees on loading. It is taken off or put on where most names match with it, and not without it.
    """
    direct = sum(name in base.tensors for name in ft.tensors)
    if 2 * direct < min(len(base.tensors), len(ft.tensors)):
        for longer, shorter, where in ((ft, base, "fine-tune"), (base, ft, "base")):
            prefix = _common_prefix(longer, shorter)
            if prefix:
                notes.append(
                    f"names of the {where} begin with {prefix!r}, those of the other side do not: paired without"
                )
                if longer is ft:
                    return {f"{prefix}{name}": name for name in base.tensors}
                # A name that stands there with and without the prefix keeps it, so that neither is lost.
                bare = {name: name.removeprefix(prefix) for name in base.tensors}
                return {name if own != name and own in base.tensors else own: name for name, own in bare.items()}
    return {name: name for name in base.tensors}


def _common_prefix(longer: Checkpoint, shorter: Checkpoint) -> str | None:
    """The prefix with which most names of `shorter` are names of `longer`."""
    sample = max(shorter.tensors, key=len, default="")
    for other in longer.tensors:
        if sample and other.endswith(f".{sample}"):
            prefix = other.removesuffix(sample)
            if 2 * sum(f"{prefix}{name}" in longer.tensors for name in shorter.tensors) > len(shorter.tensors):
                return prefix
    return None


def _tied_partner(name: str, *, lacking: Checkpoint, having: Checkpoint, resize: bool) -> str | None:
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
    if _module(name) not in _TOKEN_HEADS or not _says_tied(lacking.config or having.config):
        return None
    embeddings = [other for other in fitting if _module(other) in _TOKEN_EMBEDDINGS] or fitting
    return embeddings[0] if len(embeddings) == 1 else shared[0] if shared else None


def _same_but_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[1:] == b[1:]


def tied_embedding(name: str, side: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The token embedding that `config` ties the head `name` to, where `side` stores both."""
    if _module(name) not in _TOKEN_HEADS or name not in side.tensors or not _says_tied(config):
        return None
    shape = side.tensors[name].info.shape
    alike = [other for other in side.tensors if _module(other) in _TOKEN_EMBEDDINGS and is_vocabulary(other)]
    embeddings = [other for other in alike if side.tensors[other].info.shape == shape]
    return min(embeddings, key=lambda other: (_module(other) != "shared", other.count("."), other), default=None)


def _module(name: str) -> str:
    """The module that a weight or bias belongs to, without a number at its end; a bare parameter is its own."""
    *modules, last = name.split(".")
    if last not in ("weight", "bias"):
        return last if last == "final_logits_bias" else ""
    return next((module for module in reversed(modules) if not module.isdecimal()), "")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per vocabulary entry: a token embedding, or a head over tokens, or its bias."""
    return _module(name) in _TOKEN_EMBEDDINGS | _TOKEN_HEADS and not _NOT_OF_TOKENS.search(name)


def _says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the token embedding.

    transformers before 5 leaves `tie_word_embeddings` out where it is true, its default; from 5 on it is written.
    """
    nested = (config.get(key) for key in ("text_config", "decoder", "language_config"))
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if "tie_word_embeddings" in part:
            return part["tie_word_embeddings"] is True
    version = re.match(r"\d+", str(config.get("transformers_version", "0")))
    return "model_type" in config and version is not None and int(version[0]) < 5
