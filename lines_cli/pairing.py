"""Which tensor of the base belongs to which of the fine-tune: by name, through tied weights; and what is left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from lines_cli.checkpoint.header import TensorInfo
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some

# Modules with a row per vocabulary entry, by the name of the module that holds the weight or bias.
_TOKEN_EMBEDDINGS = frozenset(
    {
        "embed_tokens",
        "wte",
        "word_embeddings",
        "word_embedding",
        "tok_embeddings",
        "token_embedding",
        "embed_in",
        "shared",
        "embeddings",
        "embedding",
    }
)
_TOKEN_HEADS = frozenset(
    {"lm_head", "embed_out", "output", "output_layer", "decoder", "predictions", "proj_out", "generator_lm_head"}
)

Pair = tuple[str | None, str | None]
"""The names that one output tensor is read from: in the base, in the fine-tune."""


def pair_tensors(
    base: Checkpoint, ft: Checkpoint, missing: Literal["error", "copy", "skip"], notes: list[str]
) -> dict[str, Pair]:
    """Pair the tensors of the two sides by name; see through tied weights; settle or refuse what is left over.

    Args:
        base, ft: the two sides.
        missing: what becomes of a tensor that one side lacks and that is not tied.
        notes: gets a line for everything that a person should know of.

    Returns:
        Output tensor name -> where it is read from.

    Raises:
        MismatchError: tensors are missing on one side, and `missing` is `error`.
    """
    pairs: dict[str, Pair] = {name: (name, name) for name in ft.tensors if name in base.tensors}
    only_ft = [name for name in ft.tensors if name not in base.tensors]
    only_base = [name for name in base.tensors if name not in ft.tensors]

    for name in list(only_ft):
        if partner := _tied_partner(name, ft.tensors[name].info, base):
            pairs[name] = (partner, name)
            only_ft.remove(name)
            notes.append(
                f"{printable(name)} is not in the base, whose config ties it to {printable(partner)}, used for it"
            )
    for name in list(only_base):
        if partner := _tied_partner(name, base.tensors[name].info, ft):
            only_base.remove(name)
            notes.append(
                f"{printable(name)} is not in the fine-tune, whose config ties it to {printable(partner)}: left out"
            )

    left = len(only_ft) + len(only_base)
    if left and missing == "error":
        raise _missing(base, ft, only_base, only_ft)
    if left and missing == "copy":
        pairs.update({name: (None, name) for name in only_ft})
        pairs.update({name: (name, None) for name in only_base})
        notes.append(
            f"{left:,} tensors stand on one side only and are copied as they are "
            f"({len(only_ft):,} fine-tune, {len(only_base):,} base)"
        )
    elif left:
        notes.append(
            f"{left:,} tensors stand on one side only and are left out "
            f"({len(only_ft):,} fine-tune, {len(only_base):,} base)"
        )
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
    hint = "--missing copy takes each from the side that has it; --missing skip leaves them out."
    prefix = _shifted(base, ft)
    if prefix is not None:
        hint = (
            f"But for the prefix {prefix!r} most would match: one side was saved from inside a wrapper. "
            "Save both from the same class."
        )
    return MismatchError("\n".join(parts), hint=hint)


def _shifted(base: Checkpoint, ft: Checkpoint) -> str | None:
    """The prefix that one side's names have and the other's lack, if that is the difference between them."""
    for shorter, longer in ((base, ft), (ft, base)):
        if not shorter.tensors:
            continue
        name = next(iter(shorter.tensors))
        for other in longer.tensors:
            if other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                shared = sum(f"{prefix}{name}" in longer.tensors for name in shorter.tensors)
                if 2 * shared > len(shorter.tensors):
                    return prefix
    return None


def _tied_partner(name: str, info: TensorInfo, side: Checkpoint) -> str | None:
    """The tensor that `side`, which lacks `name`, uses in its place, if its config ties head and token embedding."""
    if not is_vocabulary(name) or not _says_tied(side.config):
        return None
    alike = [
        other
        for other, stored in side.tensors.items()
        if is_vocabulary(other)
        and len(stored.info.shape) == len(info.shape)
        and stored.info.shape[1:] == info.shape[1:]
    ]
    embeddings = [other for other in alike if _module(other) in _TOKEN_EMBEDDINGS] or alike
    same_rows = [other for other in embeddings if side.tensors[other].info.shape == info.shape] or embeddings
    return same_rows[0] if len(same_rows) == 1 else None


def tied_embedding(name: str, names: Iterable[str], side: Checkpoint) -> str | None:
    """The token embedding among `names` that `side`'s config ties the head `name` to, where both are stored."""
    if _module(name) not in _TOKEN_HEADS or name not in side.tensors or not _says_tied(side.config):
        return None
    shape = side.tensors[name].info.shape
    embeddings = (other for other in names if _module(other) in _TOKEN_EMBEDDINGS and other in side.tensors)
    return next((other for other in embeddings if side.tensors[other].info.shape == shape), None)


def _module(name: str) -> str:
    return name.rsplit(".", 2)[-2] if "." in name else ""


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per vocabulary entry: a token embedding, or a head over tokens, or its bias."""
    return _module(name) in _TOKEN_EMBEDDINGS | _TOKEN_HEADS


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
