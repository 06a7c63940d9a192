"""Which token has which id: read off a tokenizer's own files, and written for a vocabulary that has become larger.

No tokenizer is run, and no library for them is needed. The ids are those that transformers gives the tokens when it
loads the same files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines_cli.errors import CheckpointError, UnsupportedError, printable
from lines_cli.storage.beside import beside, read_json, read_object
from lines_cli.storage.files import read_small

TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
ADDED_TOKENS = "added_tokens.json"

_LARGEST = 64 * 2**20  # bytes: those of vocabularies of 260,000 have 33 million
_MOST_VALUES = 4_000_000  # of these some 2 million
_DAMAGED = "The file is damaged: copy or download it again."
_CONVERT = "transformers writes one into its FOLDER: AutoTokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)"


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a tokenizer knows.

    Attributes:
        ids: each token -> its id.
        added: of these, the ones that are added to the vocabulary and found in text before it is split -> whatever is
            said of them (`special`, `lstrip`, ...).
        ordinary: 1 + the largest id of the vocabulary itself.
        file: that says so.
    """

    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    ordinary: int
    file: Path


def tokens_of(folder: Path | None, model_type: Any = None) -> Tokens | None:
    """The tokens of a checkpoint's tokenizer, by its own files; None where there is none.

    Args:
        folder: of the checkpoint; None of a lone file.
        model_type: as its config says, for files that only some models read as they are.

    Raises:
        CheckpointError: a file cannot be read, or says something impossible.
        UnsupportedError: the files are of a kind from which ids cannot be read.
    """
    if folder is None:
        return None
    if path := beside(folder, TOKENIZER):
        return _of_tokenizer_json(path, _said_of_added(folder))
    found = _without_tokenizer_json(folder, model_type)
    if found is None:
        return None
    path, ids = found
    added: dict[str, Mapping[str, Any]] = {}
    ordinary = max(ids.values(), default=-1) + 1
    names = set(ids.values())
    for number, token in _said_of_added(folder):
        content = token["content"]
        if content not in ids and number in names:
            raise CheckpointError(
                f"{path}: {printable(content)} is added under the id {number}, which another token has", hint=_DAMAGED
            )
        ids.setdefault(content, number)
        added[content] = token
    return Tokens(ids, added, ordinary, path)


def same_tokenizer(folders: Sequence[Path | None]) -> bool:
    """Whether all have the very same tokenizer.json and say the same of added tokens, so that nothing has to be read of
    it.
    """
    if None in folders or len(folders) < 2:
        return False
    with suppress(OSError, CheckpointError):
        there = [folder for folder in folders if folder is not None]
        paths = [path for folder in there if (path := beside(folder, TOKENIZER)) is not None]
        if len(paths) == len(there) and len({path.stat().st_size for path in paths}) == 1:
            first, *others = (_said_of_added(folder) for folder in there)
            if all(other == first for other in others):
                return len({read_small(path, _LARGEST) for path in paths}) == 1
    return False


# --- tokenizer.json ---


def _of_tokenizer_json(path: Path, said_of_added: list[tuple[int, dict[str, Any]]]) -> Tokens:
    values = read_tokenizer_json(path)
    ids = _ids_of(values["model"].get("vocab"), path)
    ordinary = max(ids.values(), default=-1) + 1
    own = values.get("added_tokens") or []
    if not isinstance(own, list):
        raise CheckpointError(f"{path}: added_tokens is {type(own).__name__}, not a list", hint=_DAMAGED)
    added: dict[str, Mapping[str, Any]] = {}
    # The library gives added tokens that the vocabulary has not the ids that follow, whatever the file says of these.
    following = len(ids)
    for token in (*own, *(token for _, token in said_of_added)):
        content = token.get("content") if isinstance(token, dict) else None
        if not isinstance(content, str):
            raise CheckpointError(f"{path}: an added token has no content that is text", hint=_DAMAGED)
        if content not in ids:
            ids[content] = following
        following = max(following, ids[content] + 1) if content not in added else following
        added.setdefault(content, token)
    _refuse_shared_ids(ids, path)
    return Tokens(ids, added, ordinary, path)


def read_tokenizer_json(path: Path) -> dict[str, Any]:
    """Parse a tokenizer.json.

    Raises:
        CheckpointError: it cannot be read, or is of another form.
    """
    values = read_json(path, _LARGEST, _MOST_VALUES)
    if not isinstance(values, dict) or not isinstance(values.get("model"), dict):
        raise CheckpointError(f"{path}: has no model, which a tokenizer.json has", hint=_DAMAGED)
    return values


def _ids_of(vocabulary: Any, path: Path) -> dict[str, int]:
    """Token -> id, of what a model has under `vocab`: a mapping of these, or a list of tokens and scores."""
    if isinstance(vocabulary, list):
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in vocabulary):
            raise CheckpointError(f"{path}: its vocabulary is not a list of tokens and scores", hint=_DAMAGED)
        return {pair[0]: number for number, pair in enumerate(vocabulary)}
    if not isinstance(vocabulary, dict):
        raise CheckpointError(
            f"{path}: its vocabulary is {type(vocabulary).__name__}, neither a mapping nor a list", hint=_DAMAGED
        )
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < 2**31:
            raise CheckpointError(
                f"{path}: the id of {printable(token)} is {number!r}, not a whole number", hint=_DAMAGED
            )
    _refuse_shared_ids(vocabulary, path)
    return dict(vocabulary)


def _refuse_shared_ids(ids: Mapping[str, int], path: Path) -> None:
    if len(set(ids.values())) < len(ids):
        seen: dict[int, str] = {}
        for token, number in ids.items():
            if number in seen:
                two = f"{printable(seen[number])} and {printable(token)}"
                raise CheckpointError(f"{path}: {two} have one id, {number}", hint=_DAMAGED)
            seen[number] = token


def _said_of_added(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    """The tokens that `tokenizer_config.json` says are added, or else `added_tokens.json`: in order."""
    found: dict[int, dict[str, Any]] = {}
    if path := beside(folder, TOKENIZER_CONFIG):
        decoder = read_object(path).get("added_tokens_decoder")
        for number, token in decoder.items() if isinstance(decoder, dict) else ():
            if not (number.isascii() and number.isdecimal() and len(number) < 10 and isinstance(token, dict)):
                raise CheckpointError(f"{path}: added_tokens_decoder holds {number!r}", hint=_DAMAGED)
            if not isinstance(token.get("content"), str):
                raise CheckpointError(f"{path}: the added token {number} has no content that is text", hint=_DAMAGED)
            found[int(number)] = token
    if not found and (path := beside(folder, ADDED_TOKENS)):
        for content, number in read_object(path).items():
            if type(number) is not int or not 0 <= number < 2**31:
                raise CheckpointError(f"{path}: the id of {printable(content)} is {number!r}", hint=_DAMAGED)
            found[number] = {"content": content, "special": False}
    return sorted(found.items())


# --- other files ---

# Whose SentencePiece model and word list have a token's id for its place: other tokenizers move them.
_PIECES_IN_PLACE = frozenset("llama codellama gemma albert bigbird internlm internlm2 baichuan mistral".split())
_WORDS_IN_PLACE = frozenset("bert distilbert electra mpnet esm mobilebert convbert squeezebert layoutlm funnel".split())
_IN_OTHER_FORMS = ("*.tiktoken", "tekken.json")


def _without_tokenizer_json(folder: Path, model_type: Any) -> tuple[Path, dict[str, int]] | None:
    """The vocabulary of a tokenizer that is saved in other files, and the file; None where there is none."""
    if path := beside(folder, "vocab.json"):
        return path, _ids_of(read_json(path, _LARGEST, _MOST_VALUES), path)
    kind = _kind_of(folder, model_type)
    if path := beside(folder, "vocab.txt"):
        if kind not in _WORDS_IN_PLACE:
            raise _of_unknown_kind(path)
        return path, {word: number for number, word in enumerate(_lines(path))}
    for name in ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"):
        if path := beside(folder, name):
            if kind not in _PIECES_IN_PLACE:
                raise _of_unknown_kind(path)
            return path, {piece: number for number, piece in enumerate(_pieces(path))}
    with suppress(OSError):
        for pattern in _IN_OTHER_FORMS:
            for found in sorted(folder.glob(pattern)):
                raise _of_unknown_kind(found)
    return None


def _kind_of(folder: Path, model_type: Any) -> str:
    """Which tokenizer it is: `llama` of a `LlamaTokenizerFast`, else what the config calls the model."""
    path = beside(folder, TOKENIZER_CONFIG)
    name = read_object(path).get("tokenizer_class") if path else None
    kind = re.fullmatch(r"(\w+?)Tokenizer(?:Fast)?", name) if isinstance(name, str) else None
    return kind[1].lower() if kind else str(model_type)


def _of_unknown_kind(path: Path) -> UnsupportedError:
    return UnsupportedError(f"{path}: ids of tokens are not read from it, and there is no {TOKENIZER}", hint=_CONVERT)


def no_tokenizer_json(name: str) -> UnsupportedError:
    """What is said of an input whose tokenizer is to be written anew, and is saved in other files."""
    return UnsupportedError(f"{name} has no {TOKENIZER}, into which new tokens are written", hint=_CONVERT)


def _lines(path: Path) -> list[str]:
    try:
        return read_small(path, _LARGEST).decode("utf-8").removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not text ({error})", hint=_DAMAGED) from error


def _pieces(path: Path) -> Iterator[str]:
    """The pieces of a SentencePiece model, in order: each a message in field 1 of the file's, its text in field 1."""
    try:
        raw = read_small(path, _LARGEST)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        for field, piece in _fields(raw):
            if field == 1:
                yield next((text for inner, text in _fields(piece) if inner == 1), b"").decode("utf-8")
    except (IndexError, ValueError) as error:
        raise CheckpointError(f"{path}: no SentencePiece model ({error})", hint=_DAMAGED) from error


def _fields(raw: bytes) -> Iterator[tuple[int, bytes]]:
    """Numbers and contents of the fields of a protobuf message that hold bytes; others are passed over."""
    at = 0
    while at < len(raw):
        key, at = _varint(raw, at)
        kind = key & 7
        if kind == 0:
            _, at = _varint(raw, at)
        elif kind == 2:
            size, at = _varint(raw, at)
            if size > len(raw) - at:
                raise ValueError("a field ends behind the file")
            yield key >> 3, raw[at : at + size]
            at += size
        elif kind in (1, 5):
            at += 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind}")
    if at > len(raw):
        raise ValueError("a field ends behind the file")


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of up to ten bytes, and where it ends."""
    value = shift = 0
    while True:
        byte = raw[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("a number of more than ten bytes")


# --- a larger vocabulary ---


def with_tokens(folder: Path, ids: Mapping[str, int], added: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """What a folder's tokenizer files become when its vocabulary gets further tokens, by the files' names.

    Every token stands in the vocabulary with its id, the added ones too: so no loader counts ids of its own. Ordinary
    ones get no merges and the least score, so that text is split as before (but by WordPiece and WordLevel, which take
    whatever the vocabulary has; and but for characters that were not known).

    Args:
        folder: of the tokenizer that they are added to.
        ids: every token -> its id: 0, 1, 2, ... without a gap, but for ids that the folder's own tokenizer leaves out.
        added: the tokens that are found in text before it is split -> what is said of each.

    Raises:
        CheckpointError: a file cannot be read.
    """
    path = folder / TOKENIZER
    values = read_tokenizer_json(path)
    model = values["model"]
    ordered = sorted(ids.items(), key=lambda item: item[1])
    if isinstance(vocabulary := model.get("vocab"), list):
        least = min((pair[1] for pair in vocabulary if isinstance(pair[1], (int, float))), default=0.0)
        rest = ordered[len(vocabulary) :]
        model["vocab"] = vocabulary + [[token, least - _NEVER_CHOSEN] for token, _ in rest]
    else:
        model["vocab"] = dict(ordered)
    own = {token["content"]: token for token in values.get("added_tokens") or []}
    for token in sorted(added, key=ids.__getitem__):
        own[token] = _as_added(token, ids[token], own.get(token, added[token]))
    values["added_tokens"] = sorted(own.values(), key=lambda token: ids[token["content"]])
    written = {TOKENIZER: _as_json(values)}
    if beside(folder, TOKENIZER_CONFIG):
        config = read_object(folder / TOKENIZER_CONFIG)
        if isinstance(config.get("added_tokens_decoder"), dict):
            entries = {
                str(ids[token]): {key: value for key, value in entry.items() if key != "id"}
                for token, entry in sorted(own.items(), key=lambda item: ids[item[0]])
            }
            config["added_tokens_decoder"] = config["added_tokens_decoder"] | entries
            written[TOKENIZER_CONFIG] = _as_json(config)
    if beside(folder, ADDED_TOKENS):
        written[ADDED_TOKENS] = _as_json({token: ids[token] for token in own if token in added})
    return written


_NEVER_CHOSEN = 10_000.0  # below the score of any way to split a text


def _as_added(token: str, number: int, said: Mapping[str, Any]) -> dict[str, Any]:
    flags = {flag: said.get(flag) is True for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
    return {"id": number, "content": token, **flags}


def _as_json(values: Any) -> bytes:
    try:
        return json.dumps(values, ensure_ascii=False, indent=2).encode() + b"\n"
    except UnicodeEncodeError:  # half a character, which stays the escape that it came as
        return json.dumps(values, indent=2).encode() + b"\n"
