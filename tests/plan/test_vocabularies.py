"""Vocabularies: heads tied to embeddings, tensors that one side lacks, and rows that one side has more of."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from support import zoo
from support.bits import raw
from support.crossed import by_turns, crossed
from support.files import write_checkpoint
from support.run import Ran, run_lines

ALPHA, BETA = 0.25, 0.5
WIDTH = 4

Tensors = dict[str, torch.Tensor]


def vocabulary(*shapes: tuple[str, list[int]], seed: int) -> Tensors:
    """The named tensors and what any model has beside them; a position table of the same shape is there to mislead."""
    random = torch.Generator().manual_seed(seed)
    body = [
        ("layers.0.w", [3]),
        ("layers.1.w", [3]),
        ("position_embeddings.weight", [8, WIDTH]),
        ("norm.weight", [WIDTH]),
    ]
    return {name: torch.randn(shape, generator=random) for name, shape in [*shapes, *body]}


def by_formula(base: torch.Tensor, ft: torch.Tensor, c: float = ALPHA) -> torch.Tensor:
    return base + c * (ft - base)


def edit(
    tmp_path: Path, base: Tensors, ft: Tensors, *flags: object, config: Any = None, base_config: Any = None
) -> Ran:
    """Write both sides (the base with the fine-tune's config unless it has its own) and edit them into tmp_path/out."""
    sides = (("base", base, base_config or config), ("ft", ft, config))
    paths = [write_checkpoint(tmp_path / side, tensors, config=settings) for side, tensors, settings in sides]
    scaling = ("--alpha", ALPHA, "--beta", BETA, "--device", "cpu")
    ran = run_lines("edit", *paths, "-o", tmp_path / "out", *scaling, *flags)
    assert not ran.trace
    return ran


def output(tmp_path: Path) -> Tensors:
    return load_file(tmp_path / "out" / "model.safetensors")


# --- tied weights ---

HEADS = {
    "llama": ("model.embed_tokens.weight", "lm_head.weight"),
    "gpt2": ("transformer.wte.weight", "lm_head.weight"),
    "t5": ("shared.weight", "lm_head.weight"),
    "bert": ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"),
    "whisper": ("model.decoder.embed_tokens.weight", "proj_out.weight"),
    "mamba": ("backbone.embeddings.weight", "lm_head.weight"),
    "distilbert": ("distilbert.embeddings.word_embeddings.weight", "vocab_projector.weight"),
    "xlnet": ("transformer.word_embedding.weight", "lm_loss.weight"),
}
TIED = {
    "said": {"tie_word_embeddings": True, "transformers_version": "5.23.0"},
    "left out before 5": {"transformers_version": "4.44.2"},
    "said of the text model": {"text_config": {"tie_word_embeddings": True}, "transformers_version": "5.23.0"},
}
UNTIED = {
    "said": {"tie_word_embeddings": False, "transformers_version": "4.44.2"},
    "left out from 5 on": {"transformers_version": "5.23.0"},
    "no config": None,
}


def config_of(family: str, words: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if words is None else {"model_type": family, **words}


@crossed(family=HEADS, words=TIED, has_head=["base", "ft", "both"])
@pytest.mark.some(8)
def test_a_tied_head_on_one_side_is_understood(family: str, words: str, has_head: str, tmp_path: Path) -> None:
    """The output holds the head where the fine-tune does; a base without one has its embedding for a head."""
    embedding, head = HEADS[family]
    base, ft = (vocabulary((embedding, [8, WIDTH]), (head, [8, WIDTH]), seed=seed) for seed in (1, 2))
    expected = {name: by_formula(base[name], ft[name], ALPHA + BETA * (name == "layers.1.w")) for name in base}
    if has_head == "base":
        del ft[head], expected[head]
    if has_head == "ft":
        expected[head] = by_formula(base[embedding], ft[head])
        del base[head]
    ran = edit(tmp_path, base, ft, config=config_of(family, TIED[words]))
    assert ran.code == 0, ran.err
    assert (head in ran.err) == (has_head != "both")
    got = output(tmp_path)
    assert got.keys() == expected.keys()
    assert all(raw(got[name]) == raw(expected[name]) for name in expected)


@pytest.mark.parametrize("has_head", ["base", "ft"])
@pytest.mark.parametrize("words", UNTIED)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_untied_head_on_one_side_is_missing(family: str, words: str, has_head: str, tmp_path: Path) -> None:
    """Where no config says tied, a head that one side lacks is an error that names it and the way out."""
    embedding, head = HEADS[family]
    base, ft = (vocabulary((embedding, [8, WIDTH]), (head, [8, WIDTH]), seed=seed) for seed in (1, 2))
    del (ft if has_head == "base" else base)[head]
    ran = edit(tmp_path, base, ft, config=config_of(family, UNTIED[words]))
    assert ran.code == 4
    assert f"\n  {head}\n" in ran.err
    assert "--missing copy" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("has_head", ["base", "ft"])
def test_the_side_without_a_head_says_whether_it_is_tied(has_head: str, tmp_path: Path) -> None:
    """A base may be tied and its fine-tune not: the config of the side that lacks the head counts."""
    embedding, head = HEADS["llama"]
    base, ft = (vocabulary((embedding, [8, WIDTH]), (head, [8, WIDTH]), seed=seed) for seed in (1, 2))
    del (ft if has_head == "base" else base)[head]
    tied, untied = (config_of("llama", {"tie_word_embeddings": value}) for value in (True, False))
    configs = {"base": tied, "ft": untied} if has_head == "ft" else {"base": untied, "ft": tied}
    assert edit(tmp_path, base, ft, config=configs["ft"], base_config=configs["base"]).code == 0
    assert (head in output(tmp_path)) == (has_head == "ft")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == configs["ft"]


def test_only_a_table_of_the_vocabulary_is_taken_for_tied(tmp_path: Path) -> None:
    """A tied config excuses no other tensor: a classifier or a head with other rows that one side lacks is missing."""
    for name, shape in (("classifier.weight", [2, WIDTH]), ("output.weight", [2, WIDTH]), ("layers.1.b", [8, WIDTH])):
        base, ft = (vocabulary((HEADS["llama"][0], [8, WIDTH]), seed=seed) for seed in (1, 2))
        base[name] = torch.zeros(shape)
        ran = edit(tmp_path / name, base, ft, config=config_of("llama", TIED["said"]))
        assert ran.code == 4, name
        assert name in ran.err


TIES_IN_ZOO = [
    *("llama_tied", "gemma2", "gpt2", "gpt_neo", "opt", "bloom", "falcon", "xlnet", "mamba", "bert", "distilbert"),
    *("modernbert", "funnel", "t5", "umt5", "switch_transformers", "bart", "pegasus", "whisper"),
]


@pytest.mark.zoo
@pytest.mark.parametrize(
    ("family", "full"),
    [
        pytest.param(family, full, marks=pytest.mark.slow if (number + side) % 2 else ())
        for number, family in enumerate(TIES_IN_ZOO)
        for side, full in enumerate(("base", "ft"))
    ],  # by default each family with one of its sides
)
@pytest.mark.slow
def test_a_state_dict_saved_whole_fits_one_saved_by_transformers(family: str, full: str, tmp_path: Path) -> None:
    """One side holds every tied tensor again under its own name, the other only once; what they share is by formula."""
    model = zoo.ZOO[family]()
    names = zoo.saved_names(model, tmp_path / "saved")
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    whole = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    assert set(names) < whole.keys()
    other = {name: tensor + 0.5 if tensor.is_floating_point() else tensor for name, tensor in whole.items()}
    base = whole if full == "base" else {name: whole[name] for name in names}
    ft = other if full == "ft" else {name: other[name] for name in names}
    ran = edit(tmp_path, base, ft, "--beta", 0, config=config)
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    assert got.keys() == ft.keys()
    assert all(
        raw(got[n]) == raw(by_formula(whole[n], other[n]) if whole[n].is_floating_point() else other[n]) for n in got
    )


# --- tensors that one side lacks ---


@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("missing", ["copy", "skip"])
def test_missing_copy_and_skip(missing: str, dtype: str | None, tmp_path: Path) -> None:
    """copy takes each tensor from the side that has it, unscaled; skip leaves it out, and one layer less is counted.
    All others are by formula.
    """
    base, ft = (vocabulary(("embed_tokens.weight", [8, WIDTH]), ("lm_head.weight", [8, WIDTH]), seed=s) for s in (1, 2))
    del base["lm_head.weight"], ft["norm.weight"], ft["layers.1.w"]
    flags = ["--missing", missing, "--missing-in-blocks", "1", *(["--dtype", dtype] if dtype else [])]
    ran = edit(tmp_path, base, ft, *flags, config={"model_type": "llama", "tie_word_embeddings": False})
    assert ran.code == 0, ran.err
    last = "layers.0.w" if missing == "skip" else "layers.1.w"
    expected = {n: by_formula(base[n], ft[n], ALPHA + BETA * (n == last)) for n in base.keys() & ft.keys()}
    if missing == "copy":
        expected |= {"lm_head.weight": ft["lm_head.weight"]}
        expected |= {name: base[name] for name in ("norm.weight", "layers.1.w")}
    got = output(tmp_path)
    assert got.keys() == expected.keys()
    assert all(raw(got[name]) == raw(expected[name].to(torch.float64 if dtype else None)) for name in got)


# --- rows that one side has more of ---


def with_tokenizers(tmp_path: Path) -> None:
    """A tokenizer on both sides, each saying whose it is, and one file that is none."""
    for side in ("base", "ft"):
        (tmp_path / side).mkdir(parents=True)
        for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja", "preprocessor_config.json"):
            (tmp_path / side / name).write_text(side)


@crossed(
    tables=[
        pytest.param([("model.embed_tokens.weight", [WIDTH]), ("lm_head.weight", [WIDTH])], id="llama"),
        pytest.param(
            [("transformer.wte.weight", [WIDTH]), ("lm_head.weight", [WIDTH]), ("lm_head.bias", [])], id="gptj"
        ),
        pytest.param([("bert.embeddings.word_embeddings.weight", [WIDTH]), ("cls.predictions.bias", [])], id="bert"),
        pytest.param([("shared.weight", [WIDTH])], id="t5"),
        pytest.param([("model.shared.weight", [WIDTH]), ("final_logits_bias", [])], id="bart"),
        pytest.param([("transformer.word_embedding.weight", [WIDTH]), ("lm_loss.bias", [])], id="xlnet"),
        pytest.param(
            [("distilbert.embeddings.word_embeddings.weight", [WIDTH]), ("vocab_projector.bias", [])], id="distilbert"
        ),
    ],
    keep=["ft", "base"],
    sizes=[(6, 8), (8, 6)],
)
def test_resize(tables: list[tuple[str, list[int]]], keep: str, sizes: tuple[int, int], tmp_path: Path) -> None:
    """Rows that both have are by formula, further rows of the kept side as they are; config and tokenizer follow."""
    base_rows, ft_rows = sizes
    sides = {}
    for side, seed, rows in (("base", 1, base_rows), ("ft", 2, ft_rows)):
        leading = {"final_logits_bias": [1]}
        sides[side] = vocabulary(*((n, [*leading.get(n, []), rows, *rest]) for n, rest in tables), seed=seed)
    base, ft = sides["base"], sides["ft"]
    config = {"model_type": "x", "vocab_size": ft_rows, "text_config": {"vocab_size": ft_rows, "hidden_size": 1}}
    with_tokenizers(tmp_path)
    ran = edit(tmp_path, base, ft, "--resize", keep, config=config, base_config={**config, "vocab_size": base_rows})
    assert ran.code == 0, ran.err

    got, shared = output(tmp_path), min(base_rows, ft_rows)
    for name, _ in tables:
        axis = 1 if name == "final_logits_bias" else 0
        first = [tensor[name].narrow(axis, 0, shared) for tensor in (base, ft)]
        kept = sides[keep][name]
        extra = kept.narrow(axis, shared, kept.shape[axis] - shared)
        assert raw(got[name]) == raw(torch.cat([by_formula(*first), extra], dim=axis))
        assert got[name].shape == kept.shape
    assert raw(got["norm.weight"]) == raw(by_formula(base["norm.weight"], ft["norm.weight"]))
    rows = {"base": base_rows, "ft": ft_rows}[keep]
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (written["vocab_size"], written["text_config"]) == (rows, {"vocab_size": rows, "hidden_size": 1})
    for name in ("tokenizer.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_text() == keep
    assert (tmp_path / "out" / "preprocessor_config.json").read_text() == "ft"


def test_rows_that_differ_are_an_error_with_the_way_out(tmp_path: Path) -> None:
    """Both shapes are named, and --resize."""
    base, ft = (vocabulary(("model.embed_tokens.weight", [rows, WIDTH]), seed=rows) for rows in (6, 8))
    ran = edit(tmp_path, base, ft, config={"model_type": "llama"})
    assert ran.code == 4
    assert "model.embed_tokens.weight" in ran.err
    assert "[6, 4]" in ran.err
    assert "[8, 4]" in ran.err
    assert "--resize" in ran.err


@by_turns(
    case=[
        ("transformer.wpe.weight", [8, WIDTH], [16, WIDTH]),
        ("bert.embeddings.position_embeddings.weight", [8, WIDTH], [16, WIDTH]),
        ("bert.embeddings.token_type_embeddings.weight", [2, WIDTH], [1, WIDTH]),
        ("model.embed_positions.weight", [8, WIDTH], [16, WIDTH]),
        ("vit.embeddings.position_embeddings", [1, 5, WIDTH], [1, 17, WIDTH]),
        ("vision_model.embeddings.position_embedding", [5, WIDTH], [17, WIDTH]),
        ("vision_model.embeddings.class_embedding", [WIDTH], [WIDTH + 2]),
        ("vision_model.pre_tile_positional_embedding.embedding.weight", [9, WIDTH], [5, WIDTH]),
        ("classifier.weight", [2, WIDTH], [3, WIDTH]),
        ("classifier.bias", [2], [3]),
        ("score.weight", [2, WIDTH], [3, WIDTH]),
        ("qa_outputs.weight", [2, WIDTH], [3, WIDTH]),
        ("model.embed_tokens.weight", [8, WIDTH], [8, WIDTH + 2]),
        ("model.embed_tokens.weight", [8, WIDTH], [9, WIDTH + 2]),
        ("model.embed_tokens.weight", [8, WIDTH], [8 * WIDTH]),
        ("layers.0.mlp.decoder.weight", [8, WIDTH], [9, WIDTH]),
    ],
    keep=["ft", "base"],
)
def test_only_vocabularies_are_resized(case: tuple[str, list[int], list[int]], keep: str, tmp_path: Path) -> None:
    """Positions, classes and widths that differ are refused with or without --resize, both shapes said."""
    name, in_base, in_ft = case
    ran = edit(
        tmp_path,
        vocabulary((name, in_base), seed=1),
        vocabulary((name, in_ft), seed=2),
        "--resize",
        keep,
        config={"model_type": "x"},
    )
    assert ran.code == 4
    assert f"{name}: {in_base} and {in_ft}" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.zoo
@by_turns(family=["llama", "llama_tied", "gpt2", "t5", "bert", "bart"], keep=["ft", "base"])
@pytest.mark.slow
def test_a_resized_model_loads(family: str, keep: str, tmp_path: Path) -> None:
    """A fine-tune that got a padding token of its own: the output loads with either vocabulary, whole."""
    base = zoo.ZOO[family]()
    ft = copy.deepcopy(base)
    ft.resize_token_embeddings(66, mean_resizing=False)
    ft.config.pad_token_id = 65
    for name, model in (("base", base), ("ft", ft)):
        model.save_pretrained(tmp_path / name)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--resize", keep, "--quiet")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    loaded, info = type(base).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    rows = {"base": 64, "ft": 66}[keep]
    assert loaded.get_input_embeddings().weight.shape[0] == rows
    assert loaded.config.get_text_config().vocab_size == rows


# --- the fine-tune's set of tensors ---


def test_missing_ft_gives_the_fine_tune_s_set(tmp_path: Path) -> None:
    """With a new head in place of the base's, --missing ft keeps the one and leaves the other out, and says which."""
    base = {"bert.encoder.layer.0.w": torch.zeros(2), "cls.predictions.transform.dense.bias": torch.zeros(2)}
    ft = {"bert.encoder.layer.0.w": torch.ones(2), "classifier.weight": torch.ones(3, 2)}
    sides = [write_checkpoint(tmp_path / side, tensors) for side, tensors in (("base", base), ("ft", ft))]
    ran = run_lines("edit", *sides, "-o", tmp_path / "out", "--missing", "ft")
    assert (ran.code, ran.trace) == (0, "")
    assert "classifier.weight" in ran.err
    assert "cls.predictions.transform.dense.bias" in ran.err
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert out.keys() == ft.keys()
    assert torch.equal(out["classifier.weight"], ft["classifier.weight"])


def test_a_renamed_embedding_is_not_tied(tmp_path: Path) -> None:
    """Only a head, or a copy of `shared`, can be one weight with a token embedding of another name."""
    config = {"model_type": "x", "tie_word_embeddings": True}
    layers = {f"h.{i}.w": torch.ones(2) for i in range(2)}
    for side, name in (("base", "wte.weight"), ("ft", "embed_tokens.weight")):
        write_checkpoint(tmp_path / side, {**layers, name: torch.ones(4, 2)}, config=config)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.code == 4
    assert "wte.weight" in ran.err


# --- saved by itself, or inside another ---


@pytest.mark.parametrize("wrapped", ["base", "ft"])
def test_a_model_saved_inside_another_is_paired(wrapped: str, tmp_path: Path) -> None:
    """GPT-2 as the Hub has it, `h.0`, and a fine-tune with `transformer.h.0` are one; names are the fine-tune's."""
    names = ["wte.weight", "ln_f.weight", *(f"h.{i}.attn.weight" for i in range(3))]
    for side, value in (("base", 0.0), ("ft", 1.0)):
        prefix = "transformer." if side == wrapped else ""
        write_checkpoint(tmp_path / side, {f"{prefix}{name}": torch.full((2, 2), value) for name in names})
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert "'transformer.'" in ran.err
    out = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "transformer." if wrapped == "ft" else ""
    assert out.keys() == {f"{prefix}{name}" for name in names}
    found = [float(out[f"{prefix}h.{i}.attn.weight"][0, 0]) for i in range(3)]
    assert found == pytest.approx([0.1, 0.55, 1.0])


def test_half_a_match_is_no_prefix(tmp_path: Path) -> None:
    """Names that match as they are, are not moved, whatever else would match with a prefix."""
    shared = {f"h.{i}.w": torch.ones(2) for i in range(3)}
    write_checkpoint(tmp_path / "base", {**shared, "x.h.0.w": torch.ones(2)})
    write_checkpoint(tmp_path / "ft", shared)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert ran.code == 4
    assert "x.h.0.w" in ran.err


def test_a_prefix_taken_off_loses_no_tensor(tmp_path: Path) -> None:
    """A base that has one name with and without the prefix has a tensor too many, which is said, not dropped."""
    names = [f"h.{i}.attn.weight" for i in range(4)]
    base = {f"transformer.{name}": torch.zeros(2) for name in names} | {names[0]: torch.zeros(2)}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", {name: torch.ones(2) for name in names})
    ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (4, "")
    assert "transformer.h.0.attn.weight" in ran.err
