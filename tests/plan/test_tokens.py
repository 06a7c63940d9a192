"""Rows of vocabularies that are paired by token: ids that differ, unions, and what counts as another token."""

from __future__ import annotations

import json
import random
import shutil
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import lines_cli as lines
from support.bits import raw
from support.crossed import by_turns
from support.files import write_checkpoint
from support.run import Ran, run_lines
from support.tokenizers import WORDS, ids_in, sentencepiece_model, tokenizer_json, write_tokenizer

WIDTH = 4
EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"
Tensors = dict[str, torch.Tensor]
Ids = Mapping[str, int]


def model(
    folder: Path,
    words: Sequence[str] | Ids,
    extra: Sequence[str] = (),
    *,
    seed: int,
    rows: int | None = None,
    dtype: torch.dtype = torch.float32,
    config: Mapping[str, Any] | None = None,
    kind: str = "WordLevel",
) -> tuple[Tensors, Ids]:
    """Write a checkpoint with a tokenizer; its tensors, and the ids of its tokens."""
    ids = write_tokenizer(folder, words, extra, kind=kind)
    rows = max(ids.values()) + 1 if rows is None else rows
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, list[int]] = {EMBED: [rows, WIDTH], HEAD: [rows, WIDTH], BIAS: [rows]}
    shapes |= {"model.layers.0.w": [3], "model.layers.1.w": [3], "model.norm.weight": [WIDTH]}
    shapes |= {"model.embed_positions.weight": [16, WIDTH]}
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    settings = {"model_type": "llama", "vocab_size": rows, "bos_token_id": seed, "tie_word_embeddings": False}
    write_checkpoint(folder, tensors, config={**settings, **(config or {})})
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": seed, "max_length": seed}))
    return tensors, ids


def merge(folder: Path, names: Sequence[str], *args: object, out: str = "out", **recipe: Any) -> Ran:
    """Merge a base and models, all in a folder, into its `out`."""
    values = {"base_model": "base", "models": [{"model": name} for name in names], **recipe}
    values = {key: value for key, value in values.items() if value is not None}
    (folder / "merge.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    ran = run_lines("merge", "--config", folder / "merge.yaml", "-o", folder / out, "--device", "cpu", *args)
    assert not ran.trace, ran.trace
    return ran


def edit(folder: Path, *args: object) -> Ran:
    """Edit `base` and `ft` of a folder into its `out`, the same coefficient for all."""
    scaling = ("--alpha", 0.25, "--schedule", "constant", "--beta", 0, "--device", "cpu")
    ran = run_lines("edit", folder / "base", folder / "ft", "-o", folder / "out", *scaling, *args)
    assert not ran.trace, ran.trace
    return ran


def output(folder: Path) -> Tensors:
    return load_file(folder / "out" / "model.safetensors")


def row(tensors: Tensors, name: str, ids: Ids, token: str) -> torch.Tensor | None:
    """A token's row; None where there is none."""
    return tensors[name][ids[token]] if ids.get(token, len(tensors[name])) < len(tensors[name]) else None


def filled(rows: Sequence[torch.Tensor | None], *, has_base: bool = True) -> list[torch.Tensor]:
    """A token's rows, one for each input: what an input lacks is the base's, else the mean of those there are."""
    there = [one for one in rows if one is not None]
    if has_base and rows[0] is not None:
        default = rows[0].float()
    else:
        default = there[0].float()
        for one in there[1:]:
            default = default + one.float()
        default = default / len(there)
    return [default if one is None else one.float() for one in rows]


def task_arithmetic(rows: Sequence[torch.Tensor | None], weights: Sequence[float]) -> torch.Tensor:
    """`base + sum of w * (model - base)`, in float32."""
    base, *models = filled(rows)
    total = weights[0] * (models[0] - base)
    for weight, one in zip(weights[1:], models[1:], strict=True):
        total = total + weight * (one - base)
    return base + total


def swapped(words: Sequence[str], *pairs: tuple[int, int]) -> list[str]:
    """The words, some in each other's places."""
    found = list(words)
    for one, other in pairs:
        found[one], found[other] = found[other], found[one]
    return found


# --- which rows are paired by number ---

PLACEHOLDERS = [f"<|reserved_special_token_{n}|>" for n in range(4)]
HARMLESS = {
    "the same": (WORDS, (), WORDS, ()),
    "added at the end": (WORDS, (), WORDS, ("<|im_start|>", "<|im_end|>")),
    "reserved tokens renamed": (WORDS, PLACEHOLDERS, WORDS, ("<|im_start|>", "<|im_end|>", *PLACEHOLDERS[2:])),
    "reserved tokens counted anew": (WORDS, PLACEHOLDERS, WORDS, ("<|eom_id|>", *PLACEHOLDERS[:3])),
    "an unused word renamed": (("[unused1]", *WORDS), (), ("[E1]", *WORDS), ()),
    "unused words moved": ((*WORDS, "[unused1]", "[unused2]"), (), (*WORDS, "[unused2]", "[unused1]"), ()),
    "two names for two rows": ((*WORDS, "<think>"), ("<|box|>",), (*WORDS, "<|other|>"), ("<think>",)),
    "another spelling of all": (WORDS, (), [f"_{word}" for word in WORDS], ()),
}
PERMUTED = {
    "two words": (WORDS, (), swapped(WORDS, (2, 7)), ()),
    "three words": (WORDS, (), swapped(WORDS, (2, 7), (7, 5)), ()),
    "all words shifted": (WORDS, (), ("[INST]", *WORDS[:-1]), ()),
    "special tokens": (WORDS, ("<|im_start|>", "<|im_end|>"), WORDS, ("<|im_end|>", "<|im_start|>")),
    "a special token amid words": (("<pad>", *WORDS), (), WORDS, ("<pad>",)),
    "sorted": (WORDS, (), sorted(WORDS), ()),
}


@pytest.mark.parametrize("case", HARMLESS)
def test_names_of_rows_may_differ(case: str, tmp_path: Path) -> None:
    """Tokens behind the last, and rows that got another name, are what fine-tunes have: rows stay paired by number."""
    words, extra, others, more = HARMLESS[case]
    rows = len(words) + max(len(extra), len(more))
    base, _ = model(tmp_path / "base", words, extra, seed=1, rows=rows)
    ft, _ = model(tmp_path / "ft", others, more, seed=2, rows=rows)
    ran = edit(tmp_path)
    assert ran.code == 0, ran.err
    assert "token" not in ran.err.replace("tokenizer", "")
    got = output(tmp_path)
    assert all(raw(got[name]) == raw(base[name] + 0.25 * (ft[name] - base[name])) for name in got)


@pytest.mark.parametrize("case", PERMUTED)
def test_a_permutation_is_refused(case: str, tmp_path: Path) -> None:
    """Where rows of one number are of tokens that both sides have, that is an error: tokens with both ids, the tensors,
    and the way out.
    """
    words, extra, others, more = PERMUTED[case]
    rows = len(words) + len(extra)
    _, ids = model(tmp_path / "base", words, extra, seed=1, rows=rows)
    _, other_ids = model(tmp_path / "ft", others, more, seed=2, rows=rows)
    ran = edit(tmp_path)
    assert ran.code == 4, ran.err
    moved = [token for token in ids.keys() & other_ids.keys() if ids[token] != other_ids[token]]
    assert any(
        f'"{token}": {ids[token]} in the base, {other_ids[token]} in the fine-tune' in ran.err for token in moved
    )
    assert f"for {len(moved)} of {len(ids.keys() & other_ids.keys())} tokens" in ran.err
    assert EMBED in ran.err
    assert "model.embed_positions.weight" not in ran.err
    assert "--resize ft" in ran.err
    assert not (tmp_path / "out").exists()


def test_rows_that_are_taken_as_they_are_need_no_pairs(tmp_path: Path) -> None:
    """--outside keep takes the fine-tune's rows, which are those of its tokenizer; the base's would not be."""
    model(tmp_path / "base", WORDS, seed=1)
    ft, _ = model(tmp_path / "ft", sorted(WORDS), seed=2)
    ran = edit(tmp_path, "--outside", "keep")
    assert ran.code == 0, ran.err
    assert raw(output(tmp_path)[EMBED]) == raw(ft[EMBED])
    shutil.rmtree(tmp_path / "out")
    assert edit(tmp_path, "--filter", "embed_tokens=base", "--filter", "lm_head=keep").code == 4
    assert edit(tmp_path, "--filter", "embed_tokens=keep").code == 4  # the head is left


def test_without_a_tokenizer_rows_are_paired_by_number(tmp_path: Path) -> None:
    """A side without one says nothing of ids; nor does a lone file."""
    base, _ = model(tmp_path / "base", WORDS, seed=1)
    ft, _ = model(tmp_path / "ft", sorted(WORDS), seed=2)
    (tmp_path / "base" / "tokenizer.json").unlink()
    assert edit(tmp_path).code == 0
    assert raw(output(tmp_path)[EMBED]) == raw(base[EMBED] + 0.25 * (ft[EMBED] - base[EMBED]))
    model(tmp_path / "base", WORDS, seed=1)
    lone = tmp_path / "ft" / "model.safetensors"
    ran = run_lines("edit", tmp_path / "base", lone, "-o", tmp_path / "alone.safetensors")
    assert ran.code == 0, ran.err


# --- --resize, by token ---


@by_turns(
    keep=["ft", "base"],
    rows=[(12, 11), (10, 10), (10, 16)],
    kind=["WordLevel", "BPE", "Unigram", "WordPiece"],
    dtypes=[(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16)],
)
def test_resize_pairs_by_token(
    keep: str, rows: tuple[int, int], kind: str, dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path
) -> None:
    """Where ids differ, each row of the kept side is edited with the other's row of the same token; rows of tokens that
    it alone has, and rows without a token, are as they are. Tokenizer and special ids are that side's.
    """
    others = [*swapped(WORDS, (0, 9), (2, 3))[:-2], "new", "newer"]
    sides = {
        "base": model(tmp_path / "base", WORDS, seed=1, rows=rows[0], dtype=dtypes[0], kind=kind),
        "ft": model(tmp_path / "ft", others, seed=2, rows=rows[1], dtype=dtypes[1], kind=kind),
    }
    ran = edit(tmp_path, "--resize", keep)
    assert ran.code == 0, ran.err
    assert "paired by token" in ran.err
    (base, base_ids), (ft, ft_ids) = sides["base"], sides["ft"]
    kept, kept_ids = sides[keep]
    names = {number: token for token, number in kept_ids.items()}
    got = output(tmp_path)
    for name in (EMBED, HEAD, BIAS):
        dtype = ft[name].dtype
        assert got[name].dtype == dtype
        expected = []
        for number in range(len(kept[name])):
            pair = [row(base, name, base_ids, names.get(number, "")), row(ft, name, ft_ids, names.get(number, ""))]
            own = kept[name][number].to(dtype)
            expected.append(own if None in pair else task_arithmetic(pair, [0.25]).to(dtype))
        assert raw(got[name]) == raw(torch.stack(expected)), name
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    seed = 1 if keep == "base" else 2
    assert (written["vocab_size"], written["bos_token_id"]) == (len(kept[EMBED]), seed)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["bos_token_id"] == seed
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / keep / "tokenizer.json").read_bytes()


def test_resize_pairs_by_number_where_ids_agree(tmp_path: Path) -> None:
    """A fine-tune with two tokens more: rows that both have are edited, and those are as they are, to the last bit."""
    base, _ = model(tmp_path / "base", WORDS, seed=1)
    ft, _ = model(tmp_path / "ft", WORDS, ("<|im_start|>", "<|im_end|>"), seed=2)
    ft[EMBED][-1] = -0.0
    write_checkpoint(tmp_path / "ft", ft, config=json.loads((tmp_path / "ft" / "config.json").read_text()))
    ran = edit(tmp_path, "--resize", "ft")
    assert ran.code == 0, ran.err
    assert "the first 10 are merged" in ran.err
    got, number = output(tmp_path), len(WORDS)
    assert raw(got[EMBED][:number]) == raw(base[EMBED] + 0.25 * (ft[EMBED][:number] - base[EMBED]))
    assert raw(got[EMBED][number:]) == raw(ft[EMBED][number:])


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_rows_of_one_side_keep_their_bits(zero: float, tmp_path: Path) -> None:
    """A row that one side alone has is no sum of a row and nothing: its zeros keep their sign."""
    model(tmp_path / "base", WORDS, seed=1)
    ft, ids = model(tmp_path / "ft", [*sorted(WORDS)[:5], "new", *sorted(WORDS)[5:]], seed=2)
    ft[EMBED][ids["new"]] = zero
    write_checkpoint(tmp_path / "ft", ft)
    assert edit(tmp_path, "--resize", "ft").code == 0
    assert raw(output(tmp_path)[EMBED][ids["new"]]) == raw(ft[EMBED][ids["new"]])


# --- union ---


@pytest.mark.slow
@by_turns(
    kind=["WordLevel", "BPE", "Unigram", "WordPiece"],
    sizes=[(None, None, None), (16, 12, None), (None, 64, 13)],
    dtype=[torch.float32, torch.bfloat16],
)
def test_union(kind: str, sizes: tuple[int | None, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Every token of every input has a row, merged of what the inputs have for it; the base's ids stay; the output's
    tokenizer gives each token the id of its row.
    """
    vocabularies: dict[str, tuple[Sequence[str], Sequence[str]]] = {
        "base": (WORDS, ("<s>",)),
        "a": (swapped(WORDS, (1, 2)), ("<s>", "<|im_start|>", "<|im_end|>")),
        "b": (["x", "y", *WORDS[:7]], ("<|im_end|>", "<tool>")),
    }
    sides = [
        model(tmp_path / name, *vocabularies[name], seed=number, rows=rows, dtype=dtype, kind=kind)
        for number, (name, rows) in enumerate(zip(vocabularies, sizes, strict=True))
    ]
    weights = [0.7, 0.4]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip("ab", weights, strict=True)]
    ran = merge(tmp_path, (), models=models, tokenizer_source="union")
    assert ran.code == 0, ran.err
    every = list(dict.fromkeys(token for _, ids in sides for token in ids))
    out_ids = ids_in(tmp_path / "out")
    assert out_ids.keys() == set(every)
    assert all(out_ids[token] == number for token, number in sides[0][1].items())
    assert sorted(out_ids.values()) == list(range(len(every)))
    got = output(tmp_path)
    rows = max(len(every), sizes[0] or 0)
    for name in (EMBED, HEAD, BIAS):
        assert len(got[name]) == rows
        for token in every:
            found = [row(tensors, name, ids, token) for tensors, ids in sides]
            there = [one for one in found if one is not None]
            expected = there[0] if len(there) == 1 else task_arithmetic(found, weights).to(dtype)
            assert raw(got[name][out_ids[token]]) == raw(expected), (name, token)
        assert raw(got[name][len(every) :]) == raw(sides[0][0][name][len(every) :])  # without a token
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["bos_token_id"]) == (rows, 0)
    assert run_lines("verify", tmp_path / "out").code == 0
    again = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "out" / "tokenizer.json").read_bytes()
    assert all(raw(load_file(tmp_path / "again" / "model.safetensors")[n]) == raw(got[n]) for n in got)


@pytest.mark.slow
def test_a_union_of_the_same_vocabularies_changes_nothing(tmp_path: Path) -> None:
    """It is what it is without: the same weights, the base's tokenizer, byte for byte."""
    for number, name in enumerate(("base", "a", "b")):
        model(tmp_path / name, WORDS, ("<s>",), seed=number)
    assert merge(tmp_path, "ab", out="plain").code == 0
    assert merge(tmp_path, "ab", tokenizer_source="union").code == 0
    files = [
        (tmp_path / out / name).read_bytes()
        for name in ("model.safetensors", "tokenizer.json")
        for out in ("plain", "out")
    ]
    assert files[0] == files[1]
    assert files[2] == files[3]


@pytest.mark.slow
@by_turns(
    method=[
        ("ties", {"trim": "tensor", "density": 0.5}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.5}),
        ("consensus", {}),
        ("iso_c", {}),
        ("average", {}),
        ("breadcrumbs", {"density": 0.5}),
    ],
    lines=[None, {"alpha": "auto", "beta": 0.5}, {"alpha": 0.3, "beta": 0.7, "outside": "alpha"}],
)
def test_a_union_is_the_merge_of_filled_tables(
    method: tuple[str, dict[str, Any]], lines: dict[str, Any] | None, tmp_path: Path
) -> None:
    """Whatever the method does with whole tensors, it does with the tables that have the gaps filled: as a merge of
    checkpoints that were rearranged beforehand.
    """
    names = {"base": [*WORDS, "<s>"], "a": [*WORDS, "<s>", "<a>"], "b": ["<b>", *WORDS[::-1], "<s>"]}
    sides = {name: model(tmp_path / name, words, seed=n) for n, (name, words) in enumerate(names.items())}
    recipe: dict[str, Any] = {"merge_method": method[0], "parameters": method[1]}
    recipe |= {"lines": lines} if lines else {}
    ran = merge(tmp_path, "ab", tokenizer_source="union", **recipe)
    assert ran.code == 0, ran.err
    ids = ids_in(tmp_path / "out")
    order = sorted(ids, key=ids.__getitem__)
    for number, (name, (tensors, _)) in enumerate(sides.items()):
        rearranged = dict(tensors)
        for table in (EMBED, HEAD, BIAS):
            rearranged[table] = torch.stack(
                [filled([row(t, table, i, token) for t, i in sides.values()])[number] for token in order]
            )
        write_checkpoint(tmp_path / "filled" / name, rearranged)
    assert merge(tmp_path / "filled", "ab", **recipe).code == 0
    got, expected = output(tmp_path), output(tmp_path / "filled")
    assert got.keys() == expected.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-6, atol=1e-7)


@by_turns(
    method=[("dare_linear", {"density": 0.5}), ("ties", {"density": 0.5}), ("iso_c", {}), ("consensus", {})],
    rounding=["nearest", "stochastic"],
)
@pytest.mark.slow
def test_chunks_and_workers_change_no_bit(method: tuple[str, dict[str, Any]], rounding: str, tmp_path: Path) -> None:
    """However few entries are read at a time, across rows and runs and inputs of other dtypes."""
    model(tmp_path / "base", WORDS, ("<s>",), seed=0, dtype=torch.bfloat16)
    model(tmp_path / "a", WORDS[::-1], ("<p>", "<s>", "<q>"), seed=1)
    model(tmp_path / "b", ["x", *WORDS[2:]], ("<p>", "<s>"), seed=2, dtype=torch.float16)
    values = {
        "merge_method": method[0],
        "base_model": "base",
        "models": [{"model": "a"}, {"model": "b"}],
        "parameters": method[1],
        "lines": {"alpha": "auto", "beta": 0.5},
        "rounding": rounding,
        "tokenizer": {"source": "union", "pad_to_multiple_of": 8},
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(values))
    recipe = lines.load_recipe(tmp_path / "merge.yaml")
    made = []
    for workers, chunk in ((1, None), (3, 7), (2, 3)):
        out = tmp_path / f"{workers}-{chunk}"
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), out)
        lines.run(plan, lines.Resources(device="cpu", workers=workers, **({"chunk": chunk} if chunk else {})))
        made.append((out / "model.safetensors").read_bytes())
    assert made[0] == made[1] == made[2]


@pytest.mark.slow
def test_an_adapter_on_a_base_with_other_ids(tmp_path: Path) -> None:
    """An adapter that changes the head does so at its base's rows, whatever order the output has."""
    _, ids = model(tmp_path / "base", WORDS, seed=0)
    b, b_ids = model(tmp_path / "b", WORDS[::-1], ("<b>",), seed=1)
    generator = torch.Generator().manual_seed(2)
    down, up = torch.randn(2, WIDTH, generator=generator), torch.randn(len(ids), 2, generator=generator)
    (tmp_path / "adapter").mkdir()
    factors = {"base_model.model.lm_head.lora_A.weight": down, "base_model.model.lm_head.lora_B.weight": up}
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": "base"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    for source in ("union", "b"):
        ran = merge(tmp_path, ["adapter", "b"], "--force", tokenizer_source=source)
        assert ran.code == 0, ran.err
        got, out_ids = output(tmp_path), ids_in(tmp_path / "out")
        for token, number in out_ids.items():
            expected = b[HEAD][b_ids[token]]
            if token in ids:  # base + (base + update - base) + (b - base)
                expected = expected + 2.0 * (up @ down)[ids[token]]
            torch.testing.assert_close(got[HEAD][number], expected, rtol=1e-5, atol=1e-5)


def adapter_with_tables(
    folder: Path, base: Tensors, words: Sequence[str], extra: Sequence[str] = ()
) -> tuple[Tensors, Ids]:
    """Write an adapter with a tokenizer of its own, which holds token embeddings and head whole; these by name."""
    ids = write_tokenizer(folder, words, extra)
    generator = torch.Generator().manual_seed(7)
    tables = {name: torch.randn(len(ids), WIDTH, generator=generator) for name in (EMBED, HEAD)}
    factors = {"base_model.model.model.layers.0.w.lora_A.weight": torch.zeros(1, WIDTH)}
    factors |= {"base_model.model.model.layers.0.w.lora_B.weight": torch.zeros(WIDTH, 1)}
    saved = {f"base_model.model.{name}": table for name, table in tables.items()}
    save_file(factors | saved, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["w"], "base_model_name_or_path": "base"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return {**base, **tables}, ids


def adapter_and_base(
    folder: Path, words: Sequence[str], extra: Sequence[str] = ()
) -> tuple[Tensors, Ids, Tensors, Ids]:
    """Write a base, and such an adapter as `ft`."""
    base, ids = model(folder / "base", WORDS, seed=0)
    base = {name: tensor for name, tensor in base.items() if name != BIAS and not name.endswith(".w")}
    base |= {f"model.layers.{n}.w.weight": torch.ones(WIDTH, WIDTH) for n in range(2)}
    write_checkpoint(folder / "base", base, config=json.loads((folder / "base" / "config.json").read_text()))
    return base, ids, *adapter_with_tables(folder / "ft", base, words, extra)


@pytest.mark.slow
@pytest.mark.parametrize("words", [WORDS, swapped(WORDS, (2, 7))], ids=["same order", "other order"])
def test_the_tokenizer_of_an_adapter_says_whose_its_rows_are(words: Sequence[str], tmp_path: Path) -> None:
    """A union has the tokens that only the tokenizer beside an adapter knows, and pairs all others by it."""
    base, ids, ft, ft_ids = adapter_and_base(tmp_path, words, ("<a>", "<b>"))
    for source in ("union", "ft"):
        ran = merge(tmp_path, ["ft"], "--force", tokenizer_source=source, merge_method="task_arithmetic")
        assert ran.code == 0, ran.err
        got, out_ids = output(tmp_path), ids_in(tmp_path / "out")
        assert out_ids == (dict(ids) | {"<a>": len(WORDS), "<b>": len(WORDS) + 1} if source == "union" else ft_ids)
        for name in (EMBED, HEAD):
            assert len(got[name]) == len(out_ids)
            for token, number in out_ids.items():
                rows = [row(base, name, ids, token), row(ft, name, ft_ids, token)]
                torch.testing.assert_close(got[name][number], task_arithmetic(rows, [1.0]))


@pytest.mark.slow
def test_an_adapter_with_other_ids_is_refused(tmp_path: Path) -> None:
    """As a whole fine-tune with these is; with --resize rows are paired by token, and the kept side's tokenizer goes
    with them.
    """
    base, ids, ft, ft_ids = adapter_and_base(tmp_path, swapped(WORDS, (2, 7)))
    ran = edit(tmp_path)
    assert ran.code == 4
    assert '"sat": 2 in the base, 7 in the fine-tune' in ran.err
    for keep, kept in (("ft", ft_ids), ("base", ids)):
        ran = edit(tmp_path, "--resize", keep, "--force")
        assert ran.code == 0, ran.err
        assert ids_in(tmp_path / "out") == kept
        for token, number in kept.items():
            expected = task_arithmetic([base[EMBED][ids[token]], ft[EMBED][ft_ids[token]]], [0.25])
            torch.testing.assert_close(output(tmp_path)[EMBED][number], expected)


@pytest.mark.slow
def test_whose_tokenizer_is_taken_is_said(tmp_path: Path) -> None:
    """Only where the output has that of the adapter is it said to have it."""
    adapter_and_base(tmp_path, WORDS, ("<a>",))
    said = f"the tokenizer is the one beside the adapter {tmp_path / 'ft'}: tokenizer.json"
    for keep, of_adapter in (("ft", True), ("base", False)):
        ran = edit(tmp_path, "--resize", keep, "--force", "--json")
        assert ran.code == 0, ran.err
        assert any(note.startswith(said) for note in ran.json["notes"]) == of_adapter
        assert any("beside the adapter" in note for note in ran.json["notes"]) == of_adapter
        assert ("<a>" in ids_in(tmp_path / "out")) == of_adapter


def test_rows_of_a_pickle_that_lies_otherwise(tmp_path: Path) -> None:
    """Rows are those of the tensor, however torch stored it: turned, or with gaps."""
    base, ids = model(tmp_path / "base", WORDS, seed=1)
    ft, ft_ids = model(tmp_path / "ft", [*sorted(WORDS)[:4], "new", *sorted(WORDS)[4:]], seed=2)
    (tmp_path / "ft" / "model.safetensors").unlink()
    turned = {**ft, EMBED: ft[EMBED].T.contiguous().T, HEAD: torch.cat([ft[HEAD], ft[HEAD]], dim=1)[:, :WIDTH]}
    torch.save(turned, tmp_path / "ft" / "pytorch_model.bin")
    ran = edit(tmp_path, "--resize", "ft")
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    for name in (EMBED, HEAD):
        for token, number in ft_ids.items():
            pair = [row(base, name, ids, token), ft[name][number]]
            expected = ft[name][number] if None in pair else task_arithmetic(pair, [0.25])
            assert raw(got[name][number]) == raw(expected)


def test_a_union_without_a_base(tmp_path: Path) -> None:
    """Methods that take whole weights: what a model lacks is the mean of those that have it."""
    sides = [
        model(tmp_path / "a", WORDS, ("<p>",), seed=1),
        model(tmp_path / "b", WORDS, ("<q>", "<p>"), seed=2),
        model(tmp_path / "c", WORDS, ("<q>",), seed=3),
    ]
    weights = [0.5, 0.25, 0.25]
    models = [{"model": name, "parameters": {"weight": w}} for name, w in zip("abc", weights, strict=True)]
    ran = merge(tmp_path, (), base_model=None, merge_method="linear", models=models, tokenizer_source="union")
    assert ran.code == 0, ran.err
    ids, got = ids_in(tmp_path / "out"), output(tmp_path)
    for token, number in ids.items():
        found = filled([row(tensors, EMBED, own, token) for tensors, own in sides], has_base=False)
        expected = sum(weight * one for weight, one in zip(weights, found, strict=True))
        torch.testing.assert_close(got[EMBED][number], expected)


@pytest.mark.slow
def test_the_tokens_of_a_named_input(tmp_path: Path) -> None:
    """tokenizer_source: a model keeps that model's tokens and ids, and every input is read by token."""
    sides = {
        "base": model(tmp_path / "base", WORDS, seed=1),
        "a": model(tmp_path / "a", WORDS, ("<a>",), seed=2),
        "b": model(tmp_path / "b", [*WORDS[5:], "new"], seed=3),
    }
    for source in ("base", "a", "b"):
        ran = merge(tmp_path, "ab", "--force", tokenizer_source=source)
        assert ran.code == 0, ran.err
        got, (kept, ids) = output(tmp_path), sides[source]
        assert len(got[EMBED]) == len(kept[EMBED])
        for token, number in ids.items():
            found = [row(tensors, EMBED, own, token) for tensors, own in sides.values()]
            there = [one for one in found if one is not None]
            expected = there[0] if len(there) == 1 else task_arithmetic(found, [1.0, 1.0])
            assert raw(got[EMBED][number]) == raw(expected), (source, token)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["bos_token_id"] == {"base": 1, "a": 2, "b": 3}[source]
        assert ids_in(tmp_path / "out") == ids


@pytest.mark.slow
def test_rows_of_single_tokens_may_be_said(tmp_path: Path) -> None:
    """mergekit's `tokens`: a model's row, another token's, zeros, for those who lack the token or for all; and a token
    that none has. `pad_to_multiple_of` gives the rows behind them the mean of all.
    """
    sides = {
        "base": model(tmp_path / "base", WORDS, seed=1),
        "a": model(tmp_path / "a", WORDS, ("<p>", "<q>", "<r>"), seed=2),
        "b": model(tmp_path / "b", WORDS, ("<q>", "<r>"), seed=3),
    }
    tokens = {
        "<p>": {"source": {"kind": "zero"}},
        "<q>": {"source": "a", "force": True},
        "<r>": {"source": {"kind": "model_token", "model": "b", "token": "cat"}},
        "<new>": {"source": {"kind": "model_token", "model": "a", "token_id": 3}},
    }
    tokenizer = {"source": "union", "tokens": tokens, "pad_to_multiple_of": 8}
    ran = merge(tmp_path, "ab", tokenizer=tokenizer)
    assert ran.code == 0, ran.err
    got, ids = output(tmp_path), ids_in(tmp_path / "out")
    (base, base_ids), (a, a_ids), (b, b_ids) = sides.values()
    zero, cat = torch.zeros(WIDTH), b[EMBED][b_ids["cat"]]

    def merged(*rows: torch.Tensor) -> torch.Tensor:
        return task_arithmetic(rows, [1.0, 1.0])

    assert raw(got[EMBED][ids["<p>"]]) == raw(merged(zero, a[EMBED][a_ids["<p>"]], zero))
    assert raw(got[EMBED][ids["<q>"]]) == raw(a[EMBED][a_ids["<q>"]])
    assert raw(got[EMBED][ids["<r>"]]) == raw(merged(cat, a[EMBED][a_ids["<r>"]], b[EMBED][b_ids["<r>"]]))
    assert raw(got[EMBED][ids["<new>"]]) == raw(a[EMBED][3])
    assert got[EMBED].shape == (16, WIDTH)
    assert len(ids) == 14
    for name in (EMBED, BIAS):
        torch.testing.assert_close(got[name][14], got[name][:14].mean(0), rtol=1e-5, atol=1e-6)
        assert raw(got[name][15]) == raw(got[name][14])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 16
    again = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert raw(load_file(tmp_path / "again" / "model.safetensors")[EMBED]) == raw(got[EMBED])
    assert base_ids.keys() <= ids.keys()
    assert base[EMBED].shape[0] == 10


def test_a_config_s_nested_vocabulary_follows(tmp_path: Path) -> None:
    """vocab_size of a model within a model becomes the new number; that of another vocabulary stays."""
    nested = {"vocab_size": 7, "text_config": {"vocab_size": 10, "bos_token_id": 1}, "audio_config": {"vocab_size": 99}}
    model(tmp_path / "base", WORDS, seed=1, config=nested)
    model(tmp_path / "a", WORDS, ("<a>", "<b>"), seed=2, config=nested)
    ran = merge(tmp_path, "a", tokenizer_source="union")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["text_config"]["vocab_size"]) == (7, 12)
    assert config["audio_config"]["vocab_size"] == 99


def test_tables_of_other_vocabularies_are_left_alone(tmp_path: Path) -> None:
    """A codebook or another tower's embedding has no row for each token, or many more: it is merged by number."""
    sides = {}
    for number, name in enumerate(("base", "a")):
        words = WORDS if name == "base" else sorted(WORDS)
        tensors, _ = model(tmp_path / name, words, seed=number)
        generator = torch.Generator().manual_seed(number)
        tensors |= {
            "codec.shared.weight": torch.randn(4, WIDTH, generator=generator),
            "other_tower.embed_tokens.weight": torch.randn(5_000, 2, generator=generator),
        }
        write_checkpoint(tmp_path / name, tensors, config={"model_type": "x", "vocab_size": 10})
        sides[name] = tensors
    ran = merge(tmp_path, "a", tokenizer_source="union")
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    for name in ("codec.shared.weight", "other_tower.embed_tokens.weight", "model.embed_positions.weight"):
        assert raw(got[name]) == raw(sides["a"][name])  # the only model, as it is


def test_a_head_that_is_tied_on_one_side(tmp_path: Path) -> None:
    """A base without a head has its embedding for one, paired by token as that is."""
    base, ids = model(tmp_path / "base", WORDS, seed=1)
    ft, ft_ids = model(tmp_path / "ft", swapped(WORDS, (0, 4)), seed=2)
    del base[HEAD], base[BIAS], ft[BIAS]
    write_checkpoint(tmp_path / "base", base, config={"model_type": "llama", "tie_word_embeddings": True})
    write_checkpoint(tmp_path / "ft", ft, config={"model_type": "llama", "tie_word_embeddings": False})
    ran = edit(tmp_path, "--resize", "ft")
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    for token, number in ft_ids.items():
        expected = task_arithmetic([base[EMBED][ids[token]], ft[HEAD][number]], [0.25])
        assert raw(got[HEAD][number]) == raw(expected)


@pytest.mark.parametrize("has_head", ["base", "a"])
@pytest.mark.parametrize(
    "recipe",
    [{"tokenizer_source": "union"}, {"tokenizer_source": "a"}, {"tokenizer": {"tokens": {"<z>": {"source": "a"}}}}],
    ids=["union", "of one", "tokens"],
)
def test_a_tied_head_that_one_side_stores(recipe: dict[str, Any], has_head: str, tmp_path: Path) -> None:
    """A tied model may hold its head or not: where rows are paired by token the side without has its embedding for it,
    so that the two stay one weight.
    """
    words = {"base": WORDS, "a": [*swapped(WORDS, (0, 4)), "<x>", "<z>"]}
    sides, ids = {}, {}
    for seed, side in enumerate(words):
        tensors, ids[side] = model(tmp_path / side, words[side], seed=seed)
        del tensors[BIAS]
        tensors[HEAD] = tensors[EMBED].clone()
        sides[side] = dict(tensors)
        if side != has_head:
            del tensors[HEAD]
        config = {"model_type": "llama", "tie_word_embeddings": True, "vocab_size": len(words[side])}
        write_checkpoint(tmp_path / side, tensors, config=config)
    models = [{"model": "a", "parameters": {"weight": 0.5}}]
    ran = merge(tmp_path, [], merge_method="task_arithmetic", models=models, **recipe)
    assert ran.code == 0, ran.err
    got, out_ids = output(tmp_path), ids_in(tmp_path / "out")
    assert raw(got.get(HEAD, got[EMBED])) == raw(got[EMBED])
    assert (HEAD in got) == (has_head == "base")  # whose tensors the output has
    assert out_ids.keys() >= set(WORDS) | {"<z>"}
    for token, number in out_ids.items():
        rows = [row(sides[side], EMBED, ids[side], token) for side in words]
        torch.testing.assert_close(got[EMBED][number], task_arithmetic(rows, [0.5]))


def test_a_head_that_one_side_lacks_is_copied_by_token(tmp_path: Path) -> None:
    """missing: copy takes it from the one that has it, in the order of the output's tokens, with zeros for the rest."""
    base, _ = model(tmp_path / "base", WORDS, seed=1)
    ft, ids = model(tmp_path / "a", [*sorted(WORDS)[:-1], "new"], seed=2)
    del base[HEAD], base[BIAS], ft[BIAS]
    write_checkpoint(tmp_path / "base", base, config={"model_type": "llama", "tie_word_embeddings": False})
    write_checkpoint(tmp_path / "a", ft, config={"model_type": "llama", "tie_word_embeddings": False})
    ran = merge(tmp_path, "a", tokenizer_source="union", missing="copy")
    assert ran.code == 0, ran.err
    got, out_ids = output(tmp_path), ids_in(tmp_path / "out")
    for token, number in out_ids.items():
        expected = ft[HEAD][ids[token]] if token in ids else torch.zeros(WIDTH)
        assert raw(got[HEAD][number]) == raw(expected), token


# --- what cannot be done ---


@pytest.mark.slow
def test_what_a_union_needs(tmp_path: Path) -> None:
    """A folder to write the tokenizer into, a tokenizer.json to write, tokenizers that can be read, one meaning."""
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "a", WORDS, ("<a>",), seed=2)

    def refused(*words: str, **recipe: Any) -> None:
        ran = merge(tmp_path, "a", "--force", **{"tokenizer_source": "union", **recipe})
        assert ran.code in (2, 3, 4), ran.err
        assert all(word in ran.err for word in words), ran.err
        assert not (tmp_path / "out").exists()

    refused("resize", resize="ft")
    ran = merge(tmp_path, "a", out="out.safetensors", tokenizer_source="union")
    assert ran.code == 2
    assert "1 new token" in ran.err
    kept = (tmp_path / "base" / "tokenizer.json").read_bytes()
    (tmp_path / "base" / "tokenizer.json").unlink()
    refused("base", "no tokenizer", tokenizer_source="union")
    (tmp_path / "base" / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(WORDS)}))
    refused("tokenizer.json", "save_pretrained")
    (tmp_path / "base" / "vocab.json").unlink()
    (tmp_path / "base" / "tokenizer.json").write_bytes(kept)
    (tmp_path / "a" / "tokenizer.json").write_text("{")
    refused("a/tokenizer.json")
    (tmp_path / "a" / "tokenizer.json").unlink()
    refused("11 rows", "no tokenizer")
    model(tmp_path / "a", WORDS, seed=2)
    (tmp_path / "a" / "tokenizer.json").unlink()
    ran = merge(tmp_path, "a", "--force", tokenizer_source="union")
    assert ran.code == 0, ran.err
    assert "a has no tokenizer" in ran.err


HOSTILE: dict[str, Any] = {
    "no object": [],
    "no model": {"added_tokens": []},
    "a model that is a list": {"model": []},
    "no vocabulary": {"model": {}},
    "a vocabulary that is text": {"model": {"vocab": "the"}},
    "an id that is text": {"model": {"vocab": {"a": "0"}}},
    "an id that is a flag": {"model": {"vocab": {"a": True}}},
    "an id that is a fraction": {"model": {"vocab": {"a": 0.5}}},
    "an id below zero": {"model": {"vocab": {"a": -1}}},
    "an id beyond 32 bits": {"model": {"vocab": {"a": 2**40}}},
    "two tokens with one id": {"model": {"vocab": {"a": 0, "b": 0}}},
    "a list of words": {"model": {"vocab": ["a", "b"]}},
    "a list of numbers and scores": {"model": {"vocab": [[1, 2.0]]}},
    "added tokens that are none": {"model": {"vocab": {"a": 0}}, "added_tokens": {"a": 1}},
    "an added token without content": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1}]},
    "an added token that is a number": {"model": {"vocab": {"a": 0}}, "added_tokens": [7]},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_damaged_tokenizer_is_said(case: str, tmp_path: Path) -> None:
    """An edit goes by number and says why; a union refuses, and names the file."""
    base, _ = model(tmp_path / "base", WORDS, seed=1)
    ft, _ = model(tmp_path / "ft", sorted(WORDS), seed=2)
    (tmp_path / "ft" / "tokenizer.json").write_text(json.dumps(HOSTILE[case]))
    ran = edit(tmp_path)
    assert ran.code == 0, ran.err
    assert "tokenizer.json" in ran.err
    assert raw(output(tmp_path)[EMBED]) == raw(base[EMBED] + 0.25 * (ft[EMBED] - base[EMBED]))
    ran = merge(tmp_path, ["ft"], out="merged", tokenizer_source="union")
    assert ran.code == 3, ran.err
    assert "ft/tokenizer.json" in ran.err
    assert "Traceback" not in ran.err


def test_ids_beyond_the_rows(tmp_path: Path) -> None:
    """A token without a row is none of that input; ids far beyond all rows are not made room for."""
    base, ids = model(tmp_path / "base", WORDS, seed=1)
    a, _ = model(tmp_path / "a", WORDS, ("<pad>", "<x>"), seed=2, rows=11)
    ran = merge(tmp_path, "a", tokenizer_source="union")
    assert ran.code == 0, ran.err
    assert ids_in(tmp_path / "out").keys() == ids.keys() | {"<pad>"}
    got = output(tmp_path)
    assert raw(got[EMBED][10]) == raw(a[EMBED][10])
    assert len(base[EMBED]) == 10
    model(tmp_path / "base", {"a": 0, "b": 10**6}, seed=1, rows=10)
    ran = merge(tmp_path, "a", "--force", tokenizer_source="union")
    assert ran.code == 4, ran.err
    assert "1,000,000" in ran.err


def test_a_tokenizer_that_leads_out_of_the_folder(tmp_path: Path) -> None:
    """It is not followed."""
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "ft", sorted(WORDS), seed=2)
    (tmp_path / "secret.json").write_text(json.dumps(tokenizer_json(WORDS)))
    (tmp_path / "ft" / "tokenizer.json").unlink()
    (tmp_path / "ft" / "tokenizer.json").symlink_to(tmp_path / "secret.json")
    for ran in (edit(tmp_path), merge(tmp_path, ["ft"], tokenizer_source="union")):
        assert ran.code == 3
        assert "link that leaves its folder" in ran.err


def test_a_tokenizer_that_is_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes and values are counted before it is parsed."""
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "ft", WORDS, ("<a>",), seed=2)
    for limit, value in (("_LARGEST", 100), ("_MOST_VALUES", 5)):
        with monkeypatch.context() as patch:
            patch.setattr(f"lines_cli.checkpoint.tokenizer.{limit}", value)
            ran = merge(tmp_path, ["ft"], tokenizer_source="union")
            assert ran.code == 3, limit
            assert "tokenizer.json" in ran.err


# --- other files ---


def in_other_files(folder: Path, form: str, words: Sequence[str], extra: Ids) -> None:
    """Put another form in the place of a folder's tokenizer.json."""
    (folder / "tokenizer.json").unlink()
    if form == "vocab.json":
        (folder / form).write_text(json.dumps({word: number for number, word in enumerate(words)}))
        settings: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"}
    elif form == "vocab.txt":
        (folder / form).write_text("".join(f"{word}\n" for word in words))
        settings = {"tokenizer_class": "BertTokenizer"}
    else:
        (folder / form).write_bytes(sentencepiece_model(words))
        settings = {"tokenizer_class": "LlamaTokenizer"}
    if form == "vocab.json":
        (folder / "added_tokens.json").write_text(json.dumps(dict(extra)))
    else:
        settings["added_tokens_decoder"] = {str(number): {"content": token} for token, number in extra.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("form", ["vocab.json", "vocab.txt", "tokenizer.model"])
def test_vocabularies_in_other_files(form: str, tmp_path: Path) -> None:
    """A list of words, of ids, or a SentencePiece model says as much, with the tokens that are added to it."""
    model(tmp_path / "base", WORDS, ("<s>",), seed=1)
    ft, ids = model(tmp_path / "ft", swapped(WORDS, (0, 4)), ("<s>", "<ft>"), seed=2)
    in_other_files(tmp_path / "ft", form, swapped(WORDS, (0, 4)), {"<s>": 10, "<ft>": 11})
    ran = merge(tmp_path, ["ft"], tokenizer_source="union")
    assert ran.code == 0, ran.err
    out_ids = ids_in(tmp_path / "out")
    assert out_ids["<ft>"] == 11
    assert raw(output(tmp_path)[EMBED][11]) == raw(ft[EMBED][ids["<ft>"]])
    assert "paired by token" in ran.err


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sentencepiece.bpe.model", "XLMRobertaTokenizer"),
        ("vocab.txt", "PhobertTokenizer"),
        ("spiece.model", "T5Tokenizer"),
        ("qwen.tiktoken", "QWenTokenizer"),
        ("tekken.json", None),
    ],
)
def test_ids_that_other_code_moves_are_not_guessed(name: str, kind: str | None, tmp_path: Path) -> None:
    """Where a tokenizer's class gives its pieces other ids, a union is refused with the way to a tokenizer.json; an
    edit goes by number.
    """
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "ft", WORDS, seed=2)
    (tmp_path / "ft" / "tokenizer.json").unlink()
    (tmp_path / "ft" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind} if kind else {}))
    (tmp_path / "ft" / name).write_bytes(sentencepiece_model(sorted(WORDS)))
    assert edit(tmp_path).code == 0
    ran = merge(tmp_path, ["ft"], out="merged", tokenizer_source="union")
    assert ran.code == 3, ran.err
    assert name in ran.err
    assert "save_pretrained" in ran.err


@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_sentencepiece_model(seed: int, tmp_path: Path) -> None:
    """Cut short, or with other bytes in it: it is read or refused."""
    chance = random.Random(seed)
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "ft", WORDS, seed=2)
    in_other_files(tmp_path / "ft", "tokenizer.model", WORDS, {})
    raw_model = bytearray(sentencepiece_model(WORDS))
    for _ in range(3):
        raw_model[chance.randrange(len(raw_model))] = chance.randrange(256)
    (tmp_path / "ft" / "tokenizer.model").write_bytes(raw_model[: chance.randrange(len(raw_model)) + 1])
    ran = merge(tmp_path, ["ft"], tokenizer_source="union")
    assert ran.code in (0, 3, 4), ran.err


# --- the files that are written ---


def test_the_chat_template_of_another_goes_with_a_union(tmp_path: Path) -> None:
    """Both change tokenizer_config.json: it has the new tokens and the other's template."""
    model(tmp_path / "base", WORDS, ("<s>",), seed=1)
    model(tmp_path / "a", WORDS, ("<s>", "<|im_end|>"), seed=2)
    decoder = {"10": {"content": "<s>", "special": True}}
    (tmp_path / "base" / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": decoder, "chat_template": "old", "x": 1})
    )
    (tmp_path / "a" / "tokenizer_config.json").write_text(json.dumps({"chat_template": "new"}))
    (tmp_path / "base" / "vocab.json").write_text("{}")
    ran = merge(tmp_path, "a", tokenizer_source="union", chat_template="a")
    assert ran.code == 0, ran.err
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert (config["chat_template"], config["x"]) == ("new", 1)
    assert config["added_tokens_decoder"]["11"]["content"] == "<|im_end|>"
    assert config["added_tokens_decoder"]["10"]["content"] == "<s>"
    assert not (tmp_path / "out" / "vocab.json").exists()
    assert "vocab.json" in ran.err


def test_another_tokenizer_is_another_run(tmp_path: Path) -> None:
    """What decides the rows is part of what a run is: --resume does not go on under other ids."""
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "a", sorted(WORDS), seed=2)
    assert merge(tmp_path, "a", "--resume", tokenizer_source="base").code == 0
    again = merge(tmp_path, "a", "--resume", tokenizer_source="base")
    assert again.code == 0, again.err
    write_tokenizer(tmp_path / "a", sorted(WORDS, reverse=True))
    ran = merge(tmp_path, "a", "--resume", tokenizer_source="base")
    assert ran.code == 6, ran.err


def test_json_says_so(tmp_path: Path) -> None:
    """`vocabulary` says whose it is, and how many tokens are new and moved; else it is null."""
    model(tmp_path / "base", WORDS, seed=1)
    model(tmp_path / "a", swapped(WORDS, (0, 4)), ("<a>",), seed=2)
    found = merge(tmp_path, "a", "--json", "--dry-run", tokenizer_source="union").json["vocabulary"]
    assert found["union"] is True
    assert (found["tokens"], found["new"], found["moved"], found["rows"]) == (11, 1, 2, 11)
    model(tmp_path / "a", WORDS, seed=2)
    assert merge(tmp_path, "a", "--json", "--dry-run").json["vocabulary"] is None


def test_nan_in_a_row_of_one_side_is_reported_there(tmp_path: Path) -> None:
    """The file that the row comes from is named, not the one that most rows come from."""
    base, _ = model(tmp_path / "base", WORDS, seed=1)
    a, ids = model(tmp_path / "a", [*sorted(WORDS), "new"], seed=2)
    a[EMBED][ids["new"], 1] = float("nan")
    write_checkpoint(tmp_path / "a", a)
    ran = merge(tmp_path, "a", tokenizer_source="union")
    assert ran.code == 5, ran.err
    assert "a/model.safetensors" in ran.err
    assert EMBED in ran.err
    assert len(base) == len(a)


def test_inspect_compares_by_token(tmp_path: Path) -> None:
    """A fine-tune whose rows are the base's in another order has changed nothing."""
    base, ids = model(tmp_path / "base", WORDS, seed=1)
    order = [*sorted(WORDS)[:4], "new", *sorted(WORDS)[4:]]
    ft, _ = model(tmp_path / "ft", order, seed=2)
    for name in (EMBED, HEAD, BIAS):
        ft[name] = torch.stack(
            [base[name][ids[token]] if token in ids else torch.ones_like(base[name][0]) for token in order]
        )
    write_checkpoint(tmp_path / "ft", ft)
    ran = run_lines("inspect", tmp_path / "ft", "--base", tmp_path / "base", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    report = ran.json
    assert "token by token" in json.dumps(report["notes"])
    of_kind = {kind["kind"]: kind for kind in report["kinds"]}
    assert of_kind["embedding"]["unchanged"] > 0.3  # positions, of which there are more, did change
    assert of_kind["head"]["unchanged"] == 1.0
    assert report["fine_tunes"][0]["compared"]["parameters"] == 10 * (2 * WIDTH + 1) + 16 * WIDTH + 6 + WIDTH


def test_inspect_tells_the_alpha_of_a_union(tmp_path: Path) -> None:
    """`lines inspect --config` measures what the merge of that recipe measures."""
    model(tmp_path / "base", WORDS, seed=0)
    model(tmp_path / "a", WORDS[::-1], ("<p>",), seed=1)
    model(tmp_path / "b", ["x", *WORDS[2:]], ("<p>",), seed=2)
    recipe = {"merge_method": "ties", "lines": {"alpha": "auto", "beta": 0.5}, "tokenizer_source": "union"}
    made = merge(tmp_path, "ab", "--json", **recipe).json
    ran = run_lines("inspect", "--config", tmp_path / "merge.yaml", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert ran.json["scaling"]["alpha"] == made["alpha"]
    assert ran.json["fine_tunes"][0]["compared"]["parameters"] == 8 * (2 * WIDTH + 1) + 16 * WIDTH + 6 + WIDTH


def test_an_adapter_is_not_extracted_across_ids(tmp_path: Path) -> None:
    """The head's update would be one of other tokens: refused, and the way that the message gives works."""
    model(tmp_path / "base", WORDS, seed=1)
    ft, ft_ids = model(tmp_path / "ft", sorted(WORDS), seed=2)
    extract = ("extract", tmp_path / "ft", "--base", tmp_path / "base", "--rank", 2, "-o", tmp_path / "adapter")
    ran = run_lines(*extract)
    assert (ran.code, ran.trace) == (4, ""), ran.err
    assert "--resize base --alpha 1 --beta 0" in ran.err
    again = ("edit", tmp_path / "base", tmp_path / "ft", "--resize", "base", "--alpha", 1, "--beta", 0)
    assert run_lines(*again, "-o", tmp_path / "renumbered").code == 0
    got = load_file(tmp_path / "renumbered" / "model.safetensors")
    assert all(raw(got[HEAD][number]) == raw(ft[HEAD][ft_ids[word]]) for number, word in enumerate(WORDS))
    assert ids_in(tmp_path / "renumbered") == {word: number for number, word in enumerate(WORDS)}
    ran = run_lines("extract", tmp_path / "renumbered", *extract[2:])
    assert (ran.code, ran.trace) == (0, ""), ran.err


# --- runs and spans ---


@pytest.mark.parametrize("seed", range(8))
def test_runs_say_what_rows_said(seed: int) -> None:
    """Read back in any pieces, they are the rows that they were made of."""
    from lines_cli.plan.rows import Runs, Spans

    chance = random.Random(seed)
    pairs, row = [], 0
    for number in range(chance.randint(1, 60)):
        row = row + 1 if chance.random() < 0.6 else chance.randrange(50)
        part = chance.choice([0, 0, 1, 2])
        pairs.append((part, row if part < 2 else number))
    runs = Runs.of(pairs, 2)
    for _ in range(20):
        first = chance.randrange(len(pairs))
        until = chance.randint(first + 1, len(pairs))
        found = [(part, at + n) for part, begin, end, at in runs.within(first, until) for n in range(end - begin)]
        assert found == pairs[first:until]
    rows = sorted(chance.sample(range(100), 30))
    spans = Spans.of(rows)
    assert isinstance(spans.starts, array)
    for _ in range(20):
        first = chance.randrange(100)
        until = chance.randint(first, 100)
        assert [n for begin, end in spans.within(first, until) for n in range(begin, end)] == [
            n for n in rows if first <= n < until
        ]
