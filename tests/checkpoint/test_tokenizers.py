"""Tokenizers with further tokens, as transformers loads them: each token has the id of its row, and text is split as
before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import yaml
from safetensors.torch import load_file

from lines_cli.checkpoint.tokenizer import tokens_of
from support.bits import raw
from support.files import write_checkpoint
from support.run import run_lines
from support.tokenizers import tokenizer_json

pytestmark = pytest.mark.zoo

TEXTS = {  # the base has every letter of the fine-tune's but for its signs
    "base": ["the cat sat on the mat", "a dog ran in the park", "these big things are for me 12 xyz ünïcode lump"] * 4,
    "ft": ["def foo(bar): return baz", "import numpy as np", "raise an error there", "import more of it"] * 4,
}
SENTENCES = ("the cat ran there", "import the mat in the park", "rise  these things", "raise an error", "12 ünïcode")
EMBED = "model.embed_tokens.weight"


def byte_level_bpe(texts: Iterable[str], special: Sequence[str]) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.BPE())
    found.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=[*special], initial_alphabet=alphabet)
    found.train_from_iterator(texts, trainer)
    return found


def llama_bpe(texts: Iterable[str], special: Sequence[str]) -> Any:
    model = tokenizers.models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    found = tokenizers.Tokenizer(model)
    prepend, replace = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
    found.normalizer = tokenizers.normalizers.Sequence([prepend, replace])
    decoders = tokenizers.decoders
    found.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    in_bytes = [f"<0x{number:02X}>" for number in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", *special, *in_bytes])
    found.train_from_iterator(texts, trainer)
    values = json.loads(found.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if not token["content"].startswith("<0x")]
    return tokenizers.Tokenizer.from_str(json.dumps(values))


def wordpiece(texts: Iterable[str], special: Sequence[str]) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    found.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True)
    found.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    found.decoder = tokenizers.decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *special]
    found.train_from_iterator(texts, tokenizers.trainers.WordPieceTrainer(vocab_size=90, special_tokens=names))
    return found


def unigram(texts: Iterable[str], special: Sequence[str]) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.Unigram())
    found.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    found.decoder = tokenizers.decoders.Metaspace()
    names = ["<pad>", "</s>", "<unk>", *special]
    trainer = tokenizers.trainers.UnigramTrainer(vocab_size=60, special_tokens=names, unk_token="<unk>")
    found.train_from_iterator(texts, trainer)
    return found


def word_level(texts: Iterable[str], special: Sequence[str]) -> Any:
    found = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    trainer = tokenizers.trainers.WordLevelTrainer(special_tokens=["[UNK]", *special])
    found.train_from_iterator(texts, trainer)
    return found


KINDS = {
    "any": (byte_level_bpe, "PreTrainedTokenizerFast", {}),
    "gpt2": (byte_level_bpe, "GPT2Tokenizer", {}),
    "qwen2": (byte_level_bpe, "Qwen2Tokenizer", {}),
    "llama": (llama_bpe, "LlamaTokenizer", {}),
    "llama-fast": (llama_bpe, "LlamaTokenizerFast", {}),
    "bert": (wordpiece, "BertTokenizer", {"pad_token": "[PAD]", "unk_token": "[UNK]"}),
    "t5": (unigram, "T5Tokenizer", {"extra_ids": 0}),
    "any-unigram": (unigram, "PreTrainedTokenizerFast", {"unk_token": "<unk>"}),
    "any-words": (word_level, "PreTrainedTokenizerFast", {"unk_token": "[UNK]"}),
}


def write_side(folder: Path, kind: str, texts: Iterable[str], added: Sequence[str], seed: int) -> dict[str, int]:
    """A checkpoint with a tokenizer as its library writes it; its tokens, as transformers sees them."""
    make, name, said = KINDS[kind]
    folder.mkdir()
    found = make(texts, ["<s>"])
    found.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in added])
    found.save(str(folder / "tokenizer.json"))
    decoder = {
        str(number): {"content": token.content, "special": token.special, "normalized": token.normalized}
        for number, token in found.get_added_tokens_decoder().items()
    }
    settings = {"tokenizer_class": name, "added_tokens_decoder": decoder, **said}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    ids: dict[str, int] = found.get_vocab()
    generator = torch.Generator().manual_seed(seed)
    tensors = {EMBED: torch.randn(len(ids), 4, generator=generator)}
    tensors |= {f"model.layers.{layer}.w": torch.ones(2) for layer in range(2)}
    write_checkpoint(folder, tensors, config={"model_type": "x", "vocab_size": len(ids)})
    return ids


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_each_token_its_row(kind: str, tmp_path: Path) -> None:
    """After a union AutoTokenizer has every token of every input, each under the id of its row; the base's tokens have
    the ids they had, text is split into them as before, and special tokens of either are found in text.
    """
    base = write_side(tmp_path / "base", kind, TEXTS["base"], ["<|a|>"], seed=1)
    ft = write_side(tmp_path / "ft", kind, TEXTS["ft"], ["<|im_start|>", "<|a|>"], seed=2)
    recipe = {"base_model": "base", "models": [{"model": "ft"}], "tokenizer_source": "union"}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    from transformers import AutoTokenizer

    before, after = (AutoTokenizer.from_pretrained(tmp_path / side) for side in ("base", "out"))
    rows = {side: load_file(tmp_path / side / "model.safetensors")[EMBED] for side in ("base", "ft", "out")}
    assert len(rows["out"]) == len(base.keys() | ft.keys())
    for token in base.keys() | ft.keys():
        number = after.convert_tokens_to_ids(token)
        assert after.convert_ids_to_tokens(number) == token
        assert token not in base or number == base[token]
        expected = rows["ft"][ft[token]] if token in ft else rows["base"][base[token]]  # the model's, as it is
        assert raw(rows["out"][number]) == raw(expected), token
    for text in SENTENCES if kind not in ("bert", "any-words") else ():
        assert after.encode(text) == before.encode(text), text
    for token in ("<|im_start|>", "<|a|>"):
        assert after.convert_tokens_to_ids(token) in after.encode(f"the {token} mat")
    if kind in ("any", "gpt2", "qwen2"):
        new = next(token for token in ft if token not in base and token.startswith("Ġ"))
        assert after.decode([after.convert_tokens_to_ids(new)]) == new.replace("Ġ", " ")


ODD = {
    "ids out of order": ([(8, "<x>"), (6, "<y>")], []),
    "an id that a word has": ([(2, "<x>"), (7, "<y>")], []),
    "two with one id": ([(6, "<x>"), (6, "<y>")], []),
    "a word that is also added": ([(1, "cat"), (6, "<x>")], []),
    "more in the config": ([(6, "<x>")], [(6, "<x>"), (7, "<z>")]),
    "one twice": ([(6, "<x>"), (7, "<x>"), (8, "<y>")], []),
}


@pytest.mark.parametrize("case", ODD)
def test_ids_are_those_that_the_library_gives(case: str, tmp_path: Path) -> None:
    """Where a file says other ids than its library gives, the library's count: that is what a model is run with."""
    own, in_config = ODD[case]
    values = tokenizer_json(["the", "cat", "sat", "on", "mat", "dog"], kind="BPE")
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    values["added_tokens"] = [{"id": number, "content": token, **flags} for number, token in own]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    decoder = {str(number): {"content": token, **flags} for number, token in in_config}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": decoder}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    from transformers import AutoTokenizer

    found = tokens_of(tmp_path)
    assert found is not None
    assert dict(found.ids) == AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    assert found.ordinary == 6
