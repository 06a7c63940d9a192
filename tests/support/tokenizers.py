"""Tokenizers as files, written by hand: which token has which id is what a test says."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

WORDS = ("the", "cat", "sat", "on", "mat", "dog", "ran", "in", "park", "red")


def added(content: str, number: int, *, special: bool = True) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": number, "content": content, **flags}


def tokenizer_json(
    words: Sequence[str] | Mapping[str, int], extra: Sequence[str] = (), *, kind: str = "WordLevel"
) -> dict[str, Any]:
    """A tokenizer.json.

    Args:
        words: the vocabulary, in the order of their ids, or with these.
        extra: added tokens, whose ids follow.
        kind: `BPE`, `WordPiece`, `WordLevel` or `Unigram`.
    """
    vocab: Any = dict(words) if isinstance(words, Mapping) else {word: number for number, word in enumerate(words)}
    following = len(vocab)
    model: dict[str, Any] = {"type": kind, "vocab": vocab}
    if kind == "BPE":
        model |= {"merges": [], "unk_token": None, "byte_fallback": False, "fuse_unk": False, "dropout": None}
        model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None}
    if kind == "WordPiece":
        model |= {"unk_token": "[UNK]", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
    if kind == "WordLevel":
        model |= {"unk_token": "<unk>"}
    if kind == "Unigram":
        model |= {"vocab": [[word, -float(number)] for number, word in enumerate(vocab)], "unk_id": 0}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(token, following + number) for number, token in enumerate(extra)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": model,
    }


def write_tokenizer(
    folder: Path, words: Sequence[str] | Mapping[str, int], extra: Sequence[str] = (), *, kind: str = "WordLevel"
) -> dict[str, int]:
    """Write a folder's tokenizer; each token with its id."""
    folder.mkdir(parents=True, exist_ok=True)
    values = tokenizer_json(words, extra, kind=kind)
    (folder / "tokenizer.json").write_text(json.dumps(values), encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    ids = dict(words) if isinstance(words, Mapping) else {word: number for number, word in enumerate(words)}
    return ids | {token: len(ids) + number for number, token in enumerate(extra)}


def ids_in(folder: Path) -> dict[str, int]:
    """What the `tokenizers` library makes of a folder's tokenizer.json."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()


def sentencepiece_model(pieces: Iterable[str]) -> bytes:
    """The bytes of a SentencePiece model with these pieces: a message of messages."""

    def varint(value: int) -> bytes:
        out = bytearray()
        while value > 127:
            out.append(value & 127 | 128)
            value >>= 7
        return bytes([*out, value])

    def field(number: int, content: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(content)) + content

    whole = b""
    for piece in pieces:
        text = piece.encode()
        whole += field(1, field(1, text) + b"\x15\0\0\x80\xbf" + b"\x18\x01")
    return whole + field(2, b"\x1a\x03abc") + field(3, b"")
