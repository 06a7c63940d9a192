"""Adapters put onto their base: names of every spelling, shapes, heads that are tied; what fits no base is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import lines_cli as lines
from lines_cli.errors import CheckpointError, MismatchError, UnsupportedError
from support.adapters import PREFIX, factors, layers_of, updates, write_adapter
from support.files import write_checkpoint
from support.fp8 import expanded, quantise
from support.layouts import LAYOUTS
from support.run import run_lines

Tensors = dict[str, Tensor]
MODULES = layers_of(2, {"self_attn.q_proj": (12, 8), "mlp.up_proj": (20, 8)})
LLAMA = {"model_type": "llama", "num_hidden_layers": 2}


def base(prefix: str = "model.", *, head: bool = True) -> Tensors:
    """A small language model; what comes before its names may be another prefix."""
    chance = torch.Generator().manual_seed(1)
    tensors = {f"{name}.weight": torch.randn(*size, generator=chance) for name, size in MODULES.items()}
    tensors |= {f"model.layers.{i}.norm.weight": torch.ones(8) for i in range(2)}
    tensors["model.embed_tokens.weight"] = torch.randn(30, 8, generator=chance)
    named = {prefix + name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    return named | ({"lm_head.weight": torch.randn(30, 8, generator=chance)} if head else {})


def folded(folder: Path, adapter: Path | str = "adapter", **options: Any) -> Tensors:
    """What the adapter in a folder makes of the base there."""
    options = {"alpha": 1, "beta": 0, "force": True, **options}
    lines.edit(folder / "base", folder / adapter, folder / "out", **options)
    return load_file(folder / "out" / "model.safetensors")


def assert_folded(found: Tensors, before: Tensors, added: Tensors) -> None:
    """Each weight is the base's with what was added to it, in float64, to rounding; others are the base's. Two products
    that are added to one weight are rounded twice, at up to 16.
    """
    assert found.keys() == before.keys()
    assert added.keys() <= before.keys()
    for name, tensor in found.items():
        if name not in added:
            assert torch.equal(tensor, before[name]), name
        else:
            torch.testing.assert_close(tensor.double(), before[name].double() + added[name], rtol=3e-7, atol=2e-6)


# --- names ---

SPELLINGS: dict[str, Callable[[str], str]] = {
    "as peft saves it": lambda name: name,
    "without peft's prefix": lambda name: name.removeprefix(PREFIX),
    "as peft has it in memory": lambda name: name.replace(".weight", ".default.weight"),
    "of an adapter that is called otherwise": lambda name: name.replace(".weight", ".my-task.weight"),
    "of a compiled model": lambda name: name.replace(PREFIX, f"{PREFIX}_orig_mod."),
    "of a model within FSDP": lambda name: name.replace(".self_attn", "._fsdp_wrapped_module.self_attn"),
    "without model.": lambda name: name.replace("model.layers", "layers"),
    "of a vision language model": lambda name: name.replace("model.layers", "model.language_model.layers"),
    "the same, in older files": lambda name: name.replace("model.layers", "language_model.model.layers"),
}  # fmt: skip


@pytest.mark.parametrize("spelt", SPELLINGS.values(), ids=SPELLINGS)
def test_names_of_every_spelling(spelt: Callable[[str], str], tmp_path: Path) -> None:
    """The same update, whatever its file calls the modules; and so for `base+adapter`."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    made = factors(MODULES, 4, 2)
    added = updates(write_adapter(tmp_path / "plain", made))
    write_adapter(tmp_path / "adapter", {spelt(name): tensor for name, tensor in made.items()})
    assert_folded(folded(tmp_path), base(), added)
    assert_folded(folded(tmp_path, f"{tmp_path}/base+{tmp_path}/adapter"), base(), added)


@pytest.mark.parametrize("prefix", ["", "transformer.", "model.language_model.", "language_model.model."])
def test_prefixes_of_the_base(prefix: str, tmp_path: Path) -> None:
    """A base whose names have another prefix, or none, is found all the same; one rule holds for all modules."""
    write_checkpoint(tmp_path / "base", base(prefix, head=False), config=LLAMA)
    added = updates(write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2)))
    wanted = {prefix + name.removeprefix("model."): update for name, update in added.items()}
    assert_folded(folded(tmp_path), base(prefix, head=False), wanted)


def test_two_towers_that_may_both_be_meant(tmp_path: Path) -> None:
    """An adapter that fits two parts of its base alike is refused, and both are named."""
    both = base("text.", head=False) | base("vision.", head=False)
    write_checkpoint(tmp_path / "base", both, config=LLAMA)
    write_adapter(
        tmp_path / "adapter", {n.replace("model.layers", "layers"): t for n, t in factors(MODULES, 4, 2).items()}
    )
    with pytest.raises(MismatchError, match=r"several modules(?s:.*)text\.layers(?s:.*)vision\.layers"):
        folded(tmp_path)


def test_of_two_towers_the_one_that_fits(tmp_path: Path) -> None:
    """Shapes tell which of two parts is meant."""
    other = {name: torch.cat([tensor, tensor]) for name, tensor in base("vision.", head=False).items()}
    write_checkpoint(tmp_path / "base", base("text.", head=False) | other, config=LLAMA)
    made = {name.replace("model.layers", "layers"): tensor for name, tensor in factors(MODULES, 4, 2).items()}
    added = updates(write_adapter(tmp_path / "adapter", made))
    found = folded(tmp_path)
    assert_folded(found, base("text.", head=False) | other, {f"text.{name}": update for name, update in added.items()})


def test_another_architecture(tmp_path: Path) -> None:
    """Names that the base has not are refused with three of each side."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    names = {
        name.replace("model.layers", "transformer.h").replace("q_proj", "c_attn"): size
        for name, size in MODULES.items()
    }
    write_adapter(tmp_path / "adapter", factors(names, 4, 2))
    with pytest.raises(MismatchError) as refused:
        folded(tmp_path)
    assert "transformer.h.0.self_attn.c_attn.weight" in refused.value.message
    assert "lm_head.weight" in refused.value.message
    assert refused.value.message.count("\n  ") == 2 * 4 - 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("called", ["model.decoder.layers", "model.encoder.layers", "model.x.y.layers"])
@pytest.mark.parametrize("side", ["adapter", "base"])
def test_the_same_names_deeper_in_another_architecture(called: str, side: str, tmp_path: Path) -> None:
    """OPT's `model.decoder.layers` are not Llama's `model.layers`, whatever their shapes; peft finds none of them."""
    spelt = {name: name.replace("model.layers", called) for name in (*base(), *factors(MODULES, 4, 2))}
    made, before = factors(MODULES, 4, 2), base()
    if side == "adapter":
        made = {spelt[name]: tensor for name, tensor in made.items()}
    else:
        before = {spelt[name]: tensor for name, tensor in before.items()}
    write_checkpoint(tmp_path / "base", before, config=LLAMA)
    write_adapter(tmp_path / "adapter", made)
    with pytest.raises(MismatchError, match="4 of the 4 tensors that it changes are not in"):
        folded(tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("module", ["model.layers.1.mlp.down_proj", "lm_tail"])
def test_one_module_that_is_not_there(module: str, tmp_path: Path) -> None:
    """It is not left out: the adapter is refused, and the module named."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    write_adapter(tmp_path / "adapter", factors({**MODULES, module: (8, 20)}, 4, 2))
    with pytest.raises(MismatchError, match=rf"1 of the 5 tensors(?s:.*){module}"):
        folded(tmp_path)


def test_another_size(tmp_path: Path) -> None:
    """An adapter for a base of other shapes is refused with both."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    wide = {name: (out, 2 * into) for name, (out, into) in MODULES.items()}
    write_adapter(tmp_path / "adapter", factors(wide, 4, 2))
    ran = run_lines("edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out")
    assert ran.code != 0
    assert not ran.trace
    assert "mlp.up_proj.weight is [20, 16]" in ran.err
    assert "has [20, 8]" in ran.err
    assert "trained on another model" in ran.err


@pytest.mark.slow
def test_a_base_that_the_config_contradicts(tmp_path: Path) -> None:
    """It is said; a copy under the same name, one in the Hub's cache, and one that was quantised say nothing."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)

    def said(name: str | None) -> list[str]:
        write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2), base_model_name_or_path=name)
        summary = run_lines(
            "edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--dry-run", "--json"
        )
        return [note for note in summary.json["notes"] if "says that its base is" in note]

    for same in (
        None,
        "",
        "someone/base",
        "../somewhere/Base/",
        "unsloth/base-bnb-4bit",
        "/x/models--a--base/snapshots/1",
    ):
        assert not said(same)
    assert "meta/other" in said("meta/other")[0]


# --- whole tensors, rows, biases ---


@pytest.mark.parametrize("own", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("of_base", [torch.float32, torch.bfloat16])
def test_what_is_whole_is_in_the_dtype_of_the_base(own: torch.dtype, of_base: torch.dtype, tmp_path: Path) -> None:
    """An adapter in a narrower dtype does not narrow the base's tensors, nor what is added on top of its own."""
    before = {name: tensor.to(of_base) for name, tensor in base().items()}
    write_checkpoint(tmp_path / "base", before, config=LLAMA)
    norm, underneath = torch.randn(8).to(own), before["lm_head.weight"].to(own)
    made = factors(MODULES | {"lm_head": (30, 8)}, 4, 2, own) | {
        f"{PREFIX}model.layers.0.norm.weight": norm,
        f"{PREFIX}lm_head.base_layer.weight": underneath,
    }
    added = updates(write_adapter(tmp_path / "adapter", made, modules_to_save=["norm"]))
    found = folded(tmp_path)
    assert {name: tensor.dtype for name, tensor in found.items()} == dict.fromkeys(before, of_base)
    assert torch.equal(found["model.layers.0.norm.weight"], norm.to(of_base))
    wanted = underneath.double() + added["lm_head.weight"].double()
    close = {"rtol": 3e-7, "atol": 6e-7} if of_base == torch.float32 else {"rtol": 2**-8, "atol": 0}
    torch.testing.assert_close(found["lm_head.weight"].double(), wanted, **close)
    assert run_lines("verify", tmp_path / "out").code == 0


def test_what_is_whole_takes_the_base_s_place(tmp_path: Path) -> None:
    """A module that was saved whole, spelt as on disk and as in memory; what PEFT keeps beside it is not read."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    norm, head = torch.randn(8), torch.randn(30, 8)
    made = factors(MODULES, 4, 2) | {
        f"{PREFIX}model.layers.0.norm.modules_to_save.default.weight": norm,
        f"{PREFIX}model.layers.0.norm.original_module.weight": torch.zeros(8),
        f"{PREFIX}lm_head.weight": head,
    }
    added = updates(write_adapter(tmp_path / "adapter", made, modules_to_save=["norm", "lm_head"]))
    found = folded(tmp_path)
    assert torch.equal(found["model.layers.0.norm.weight"], norm)
    assert torch.equal(found["lm_head.weight"], head)
    assert_folded(found, base() | {"model.layers.0.norm.weight": norm, "lm_head.weight": head}, added)


def test_a_module_that_should_be_whole_and_is_missing(tmp_path: Path) -> None:
    """It is refused where the base has such a module; a name that the base has not either is none of its."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    made = factors(MODULES, 4, 2) | {f"{PREFIX}model.layers.{i}.norm.weight": torch.ones(8) for i in range(2)}
    write_adapter(tmp_path / "adapter", made, modules_to_save=["norm", "lm_head"])
    with pytest.raises(CheckpointError, match=r"no tensor of lm_head.*modules_to_save"):
        folded(tmp_path)
    assert not (tmp_path / "out").exists()
    write_adapter(tmp_path / "adapter", made, modules_to_save=["norm", "score"])
    assert folded(tmp_path).keys() == base().keys()


def test_what_is_saved_under_two_names(tmp_path: Path) -> None:
    """PEFT's own file of embeddings in modules_to_save has each of them twice, and what was before: one is read; scaled
    in place, the copy is not written. Of two shapes they are no copies.
    """
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    head = torch.randn(30, 8)
    made = factors(MODULES, 4, 2) | {
        f"{PREFIX}lm_head.weight": head,
        f"{PREFIX}lm_head.modules_to_save.weight": head.clone(),
        f"{PREFIX}lm_head.original_module.weight": base()["lm_head.weight"],
    }
    added = updates(write_adapter(tmp_path / "adapter", made, modules_to_save=["lm_head"]))
    assert_folded(folded(tmp_path), base() | {"lm_head.weight": head}, added)
    lines.edit_adapter(tmp_path / "adapter", tmp_path / "scaled", base=tmp_path / "base", alpha=0.5, beta=0)
    scaled = load_file(tmp_path / "scaled" / "adapter_model.safetensors")
    halfway = torch.lerp(base()["lm_head.weight"].double(), head.double(), 0.5)
    torch.testing.assert_close(scaled[f"{PREFIX}lm_head.weight"].double(), halfway, rtol=1e-6, atol=1e-6)
    assert f"{PREFIX}lm_head.modules_to_save.weight" not in scaled
    write_adapter(tmp_path / "other", made | {f"{PREFIX}lm_head.modules_to_save.weight": torch.randn(31, 8)})
    with pytest.raises(CheckpointError, match=r"two tensors are the whole of lm_head"):
        folded(tmp_path, "other")


def test_a_new_head(tmp_path: Path) -> None:
    """A module that the base has not, and the adapter was trained with, is missing on one side like a fine-tune's."""
    write_checkpoint(tmp_path / "base", base(head=False), config=LLAMA)
    made = factors(MODULES, 4, 2) | {f"{PREFIX}score.weight": torch.randn(3, 8)}
    write_adapter(tmp_path / "adapter", made, modules_to_save=["score"])
    with pytest.raises(MismatchError, match="do not hold the same tensors"):
        folded(tmp_path)
    assert torch.equal(folded(tmp_path, missing="ft")["score.weight"], made[f"{PREFIX}score.weight"])


def test_a_vocabulary_that_grew(tmp_path: Path) -> None:
    """Embedding and head with rows for new tokens are those of the adapter with --resize ft, else refused; so is a
    product on such an embedding, of which the adapter holds what is underneath.
    """
    write_checkpoint(tmp_path / "base", base(), config={**LLAMA, "vocab_size": 30})
    grown = {
        name: torch.cat([base()[name], torch.randn(3, 8)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    made = factors(MODULES, 4, 2) | {f"{PREFIX}{name}": tensor for name, tensor in grown.items()}
    write_adapter(tmp_path / "adapter", made)
    with pytest.raises(MismatchError, match="resize"):
        lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    found = folded(tmp_path, resize="ft")
    assert torch.equal(found["lm_head.weight"], grown["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 33
    a, b = torch.randn(4, 33), torch.randn(8, 4)
    made = factors(MODULES, 4, 2) | {
        f"{PREFIX}model.embed_tokens.base_layer.weight": grown["model.embed_tokens.weight"],
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
    }
    write_adapter(tmp_path / "adapter", made)
    wanted = grown["model.embed_tokens.weight"].double() + 2 * (b.double() @ a.double()).T
    torch.testing.assert_close(
        folded(tmp_path, resize="ft")["model.embed_tokens.weight"].double(), wanted, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("options", "rows"),
    [({"outside": "keep"}, 33), ({"resize": "ft"}, 33), ({"resize": "base"}, 30)],
)
def test_the_config_counts_the_rows_that_are_written(
    options: dict[str, Any], rows: int, nested: bool, tmp_path: Path
) -> None:
    """`vocab_size` is how many rows the embedding of the output has, whichever side they come from."""
    size = {"text_config": {"vocab_size": 30}} if nested else {"vocab_size": 30}
    write_checkpoint(tmp_path / "base", base(), config={**LLAMA, **size})
    names = ("model.embed_tokens.weight", "lm_head.weight")
    grown = {f"{PREFIX}{name}": torch.cat([base()[name], torch.randn(3, 8)]) for name in names}
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2) | grown, modules_to_save=["embed_tokens", "lm_head"])
    found = folded(tmp_path, **options)
    assert {found[name].shape[0] for name in names} == {rows}
    config = config_of_output(tmp_path)
    assert (config["text_config"] if nested else config)["vocab_size"] == rows


def test_rows_beyond_the_base_s(tmp_path: Path) -> None:
    """Tokens that the base has no rows for are refused."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    made = factors(MODULES, 4, 2) | {
        f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": torch.randn(2, 8)
    }
    write_adapter(tmp_path / "adapter", made, trainable_token_indices=[3, 30])
    with pytest.raises(MismatchError, match=r"row 30 of model\.embed_tokens\.weight(?s:.*)30 rows"):
        folded(tmp_path)


# --- weights that are tied ---

TIED = {**LLAMA, "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "transformers_version": "5.0.0"}


def config_of_output(folder: Path) -> Any:
    return json.loads((folder / "out" / "config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("stored", [False, True], ids=["head not stored", "head stored, too"])
def test_a_product_on_a_tied_head_changes_both(stored: bool, tmp_path: Path) -> None:
    """As where PEFT saves the two merged: one weight gets both updates, first the embedding's."""
    before = base(head=False)
    if stored:
        before["lm_head.weight"] = before["model.embed_tokens.weight"].clone()
    write_checkpoint(tmp_path / "base", before, config=TIED)
    made = factors({**MODULES, "lm_head": (30, 8)}, 4, 2)
    a, b = torch.randn(4, 30), torch.randn(8, 4)
    made |= {f"{PREFIX}model.embed_tokens.lora_embedding_A": a, f"{PREFIX}model.embed_tokens.lora_embedding_B": b}
    added = updates(write_adapter(tmp_path / "adapter", made))
    both = added.pop("lm_head.weight") + 2 * (b.double() @ a.double()).T
    added["model.embed_tokens.weight"] = both
    if stored:
        added["lm_head.weight"] = both
    assert_folded(folded(tmp_path), before, added)
    assert config_of_output(tmp_path)["tie_word_embeddings"] is True
    ran = run_lines("edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out2", "--dry-run", "--json")
    assert stored or any("one weight" in note for note in ran.json["notes"])


@pytest.mark.parametrize("whole", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_is_saved_whole_is_untied(whole: str, tmp_path: Path) -> None:
    """The other stays the base's, and the config says that they are two, as where PEFT saves them."""
    before = base(head=False)
    write_checkpoint(tmp_path / "base", before, config=TIED)
    name = "lm_head.weight" if whole == "lm_head" else "model.embed_tokens.weight"
    tensor = torch.randn(30, 8)
    made = factors(MODULES, 4, 2) | {f"{PREFIX}{name}": tensor}
    added = updates(write_adapter(tmp_path / "adapter", made, modules_to_save=[whole]))
    embedding = before["model.embed_tokens.weight"]
    wanted = before | {"lm_head.weight": embedding, name: tensor}
    assert_folded(folded(tmp_path), wanted, added)
    assert config_of_output(tmp_path)["tie_word_embeddings"] is False


@pytest.mark.parametrize(
    ("architecture", "more", "head"),
    [
        ("GPT2LMHeadModel", {}, "lm_head.weight"),
        ("BertForMaskedLM", {}, "cls.predictions.decoder.weight"),
        ("T5ForConditionalGeneration", {"is_encoder_decoder": True}, "lm_head.weight"),
        ("LlamaForSequenceClassification", {}, None),
        ("LlamaModel", {}, None),
    ],
)
def test_the_head_of_an_embedding_that_is_saved_whole(
    architecture: str, more: dict[str, Any], head: str | None, tmp_path: Path
) -> None:
    """It is stored as the class calls it; a class without a head gets none."""
    before, tensor = base(head=False), torch.randn(30, 8)
    write_checkpoint(tmp_path / "base", before, config={**TIED, "architectures": [architecture], **more})
    made = factors(MODULES, 4, 2) | {f"{PREFIX}model.embed_tokens.weight": tensor}
    added = updates(write_adapter(tmp_path / "adapter", made, modules_to_save=["embed_tokens"]))
    embedding = before["model.embed_tokens.weight"]
    wanted = before | {"model.embed_tokens.weight": tensor} | ({head: embedding} if head else {})
    assert_folded(folded(tmp_path), wanted, added)


@pytest.mark.parametrize(
    ("architecture", "more"),
    [
        ("BartForConditionalGeneration", {"is_encoder_decoder": True}),
        ("RobertaForCausalLM", {"model_type": "roberta"}),
        ("XLNetLMHeadModel", {}),
        ("SomethingForMaskedLM", {}),
    ],
)
def test_a_head_whose_name_is_not_known(architecture: str, more: dict[str, Any], tmp_path: Path) -> None:
    """No output without its head: the embedding is refused, with two ways out."""
    write_checkpoint(tmp_path / "base", base(head=False), config={**TIED, "architectures": [architecture], **more})
    made = factors(MODULES, 4, 2) | {f"{PREFIX}model.embed_tokens.weight": torch.randn(30, 8)}
    write_adapter(tmp_path / "adapter", made, modules_to_save=["embed_tokens"])
    with pytest.raises(UnsupportedError, match=f"head(?s:.*){architecture}") as caught:
        folded(tmp_path)
    assert "merge_and_unload" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


def test_a_whole_head_that_was_tied_is_scaled_from_the_embedding(tmp_path: Path) -> None:
    """Scaled in place, a head that the base does not store starts from the embedding that it is tied to."""
    before, head = base(head=False), torch.randn(30, 8)
    write_checkpoint(tmp_path / "base", before, config=TIED)
    made = factors(MODULES, 4, 2) | {f"{PREFIX}lm_head.weight": head}
    write_adapter(tmp_path / "adapter", made, modules_to_save=["lm_head"])
    lines.edit_adapter(tmp_path / "adapter", tmp_path / "scaled", base=tmp_path / "base", alpha=0.5, beta=0)
    found = load_file(tmp_path / "scaled" / "adapter_model.safetensors")[f"{PREFIX}lm_head.weight"]
    wanted = torch.lerp(before["model.embed_tokens.weight"].double(), head.double(), 0.5)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=1e-6)


def test_tied_weights_that_stay_equal(tmp_path: Path) -> None:
    """What PEFT keeps equal on both is done once."""
    before = base(head=False)
    write_checkpoint(tmp_path / "base", before, config=TIED)
    a, b = torch.randn(4, 30), torch.randn(8, 4)
    made = factors(MODULES, 4, 2) | {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": a,
        f"{PREFIX}model.embed_tokens.lora_embedding_B": b,
        f"{PREFIX}lm_head.lora_A.weight": b.T.contiguous(),
        f"{PREFIX}lm_head.lora_B.weight": a.T.contiguous(),
    }
    added = updates(write_adapter(tmp_path / "adapter", made, ensure_weight_tying=True))
    del added["lm_head.weight"]
    assert_folded(folded(tmp_path), before, added | {"model.embed_tokens.weight": 2 * (b.double() @ a.double()).T})


@pytest.mark.parametrize("others", [{}, {"self_attn.q_proj": (12, 8)}, {"mlp.down_proj": (8, 8)}])
def test_experts_say_nothing_of_a_square_layer(others: dict[str, tuple[int, int]], tmp_path: Path) -> None:
    """Experts that are stored [in, out], as gpt-oss has them, stand beside layers that are [out, in]."""
    modules = layers_of(1, {"self_attn.o_proj": (8, 8), **others})
    before = {f"{name}.weight": torch.randn(*size) for name, size in modules.items()}
    before["model.layers.0.mlp.experts.down_proj"] = torch.randn(2, 12, 8)
    write_checkpoint(tmp_path / "base", before, config={"model_type": "mixed", "num_hidden_layers": 1})
    a, b = torch.randn(2 * 4, 12), torch.randn(8, 4 * 2)
    experts = f"{PREFIX}model.layers.0.mlp.experts"
    of_experts = {f"{experts}.lora_A.weight": a, f"{experts}.lora_B.weight": b}
    folder = write_adapter(tmp_path / "adapter", factors(modules, 4, 1))
    added = updates(folder)
    write_adapter(folder, factors(modules, 4, 1) | of_experts, target_parameters=["mlp.experts.down_proj"])
    product = torch.einsum("ore,eri->eio", b.double().view(8, 4, 2), a.double().view(2, 4, 12))
    added["model.layers.0.mlp.experts.down_proj"] = 2 * product
    assert_folded(folded(tmp_path), before, added)


def of_all_experts(model: str, rank: int, seed: int) -> tuple[Tensors, Tensors]:
    """An adapter's factors of all fused experts of a small model in `support.layouts`, as PEFT has them: the parameter
    that is registered first in the inner wrapper. And the products of scale 1, by the names of the fused parameters.
    """
    chance, made, products = torch.Generator().manual_seed(seed), Tensors(), Tensors()
    of = LAYOUTS[model]
    together = of.together(of.apart(0))
    for name, tensor in together.items():
        if not (found := re.fullmatch(r"(.*\.experts)\.(\w+)", name)):
            continue
        experts, out, inputs = tensor.shape
        a = torch.randn(experts * rank, inputs, generator=chance)
        b = torch.randn(out, rank * experts, generator=chance)
        inner = "" if found[2] == "down_proj" else ".base_layer"
        made |= {f"{PREFIX}{found[1]}{inner}.lora_A.weight": a, f"{PREFIX}{found[1]}{inner}.lora_B.weight": b}
        parts = b.double().view(out, rank, experts), a.double().view(experts, rank, inputs)
        products[name] = torch.einsum("ore,eri->eoi", *parts)
    return made, products


@pytest.mark.parametrize("quantised", [False, True], ids=["", "fp8"])
@pytest.mark.parametrize("model", ["qwen3_moe", "mixtral", "jamba", "nemotron_h"])
@pytest.mark.slow
def test_fused_experts_of_small_models(model: str, quantised: bool, tmp_path: Path) -> None:
    """Each expert gets its own part of the product, by transformers' rules of how they are put together; an adapter
    that is scaled in place is the same edit.
    """
    of = LAYOUTS[model]
    before = of.apart(0)
    own, products = of_all_experts(model, 3, 1)
    stored, fp8 = Tensors(), dict[str, Any]()
    for name, tensor in before.items() if quantised else ():
        if ".experts." in name:
            stored[name], stored[f"{name}_scale_inv"] = codes, scale = quantise(tensor, (2, 2))
            before[name] = codes.double() * expanded(scale, tuple(codes.shape), (2, 2))
            fp8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]}}
    write_checkpoint(tmp_path / "base", before | stored, config={**of.config, "num_hidden_layers": 3, **fp8})
    up = "up_proj" if model == "nemotron_h" else "gate_up_proj"
    targets = {"target_parameters": [f"experts.{up}", "experts.down_proj"], "target_modules": []}
    write_adapter(tmp_path / "adapter", own, r=3, lora_alpha=6, **targets)
    for alpha, beta in ((1.0, 0.0), (0.2, 0.4)):
        found = of.together(folded(tmp_path, alpha=alpha, beta=beta, dtype="float32"))
        wanted = {name: tensor.double() for name, tensor in of.together(before).items()}
        for name, product in products.items():
            wanted[name] = wanted[name] + 2 * (alpha + beta * int(name.split("layers.")[1][0]) / 2) * product
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-6)
        assert lines.verify(tmp_path / "out").same
    lines.edit_adapter(tmp_path / "adapter", tmp_path / "scaled", base=tmp_path / "base", alpha=0.2, beta=0.4)
    scaled = load_file(tmp_path / "scaled" / "adapter_model.safetensors")
    for name, tensor in own.items():
        factor = 0.2 + 0.2 * int(name.split("layers.")[1][0]) if "lora_B" in name else 1.0
        torch.testing.assert_close(scaled[name].double(), factor * tensor.double())


def test_a_matrix_that_the_base_stores_as_rows_of_another(tmp_path: Path) -> None:
    """Of Dinov2's gate and up, which its files have in one, an adapter changes one; the rest stays. One that it holds
    whole is refused.
    """
    of = LAYOUTS["dinov2"]
    apart = of.apart(0)
    before = of.together(apart)
    write_checkpoint(tmp_path / "base", before, config=of.config)
    sizes = {"mlp.up_proj": (12, 8), "mlp.gate_proj": (12, 8), "attention.q_proj": (8, 8)}
    modules = {
        f"encoder.layer.{i}.{name}": size for i in (0, 2) for name, size in sizes.items() if i or "gate" not in name
    }
    added = updates(write_adapter(tmp_path / "adapter", factors(modules, 4, 1), target_modules=[*sizes]))
    wanted = of.together({name: tensor.double() + added.get(name, 0) for name, tensor in apart.items()})
    assert_folded(folded(tmp_path), before, {name: tensor - before[name].double() for name, tensor in wanted.items()})
    whole = {f"{PREFIX}encoder.layer.0.mlp.up_proj.weight": torch.ones(12, 8)}
    write_adapter(tmp_path / "adapter", factors(modules, 4, 1) | whole, modules_to_save=["up_proj"])
    with pytest.raises(MismatchError, match="another layout") as error:
        folded(tmp_path)
    assert "with peft" in str(error.value.hint)


def test_experts_that_the_base_stores_one_by_one(tmp_path: Path) -> None:
    """Of a model that is not known the error says that, not that the adapter is another model's."""
    names = [f"model.layers.0.mlp.experts.{i}.down_proj.weight" for i in range(2)]
    write_checkpoint(tmp_path / "base", base() | {name: torch.ones(8, 12) for name in names}, config=LLAMA)
    experts = f"{PREFIX}model.layers.0.mlp.experts"
    own = {f"{experts}.lora_A.weight": torch.ones(8, 12), f"{experts}.lora_B.weight": torch.ones(8, 8)}
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2) | own, target_parameters=["mlp.experts.down_proj"])
    with pytest.raises(MismatchError, match=r"one by one, such as model\.layers\.0\.mlp\.experts\.0\.") as error:
        folded(tmp_path)
    assert "fused" in str(error.value.hint)
    assert "another model" not in str(error.value)


EXPERTS = {  # model types -> what they call an expert's gate, up and down, and the module that they are in
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def one_by_one(model_type: str, number: int = 3) -> Tensors:
    """A base that stores its experts, [6, 8] and [8, 6], one by one."""
    chance = torch.Generator().manual_seed(3)
    module, gate, up, down = EXPERTS[model_type]
    before = base()
    for layer in range(2):
        within = f"model.layers.{layer}.{module}"
        before[f"{within}.gate.weight"] = torch.randn(number, 8, generator=chance)
        for expert in range(number):
            for name, size in ((gate, (6, 8)), (up, (6, 8)), (down, (8, 6))):
                before[f"{within}.experts.{expert}.{name}.weight"] = torch.randn(*size, generator=chance)
    return before


def of_experts(model_type: str, number: int = 3, rank: int = 4) -> tuple[Tensors, Tensors]:
    """The factors of both tensors of fused experts, as PEFT saves them, and of a router; and what they add to those
    that are stored (`ParamWrapper.get_delta_weight`: `A` [experts * r, in], `B` [out, r * experts]).
    """
    chance = torch.Generator().manual_seed(4)
    module, gate, up, down = EXPERTS[model_type]
    tensors, added = Tensors(), Tensors()
    for layer in range(2):
        called, stored = (f"model.layers.{layer}.{part}" for part in ("mlp", module))
        products = []
        for wrapper, out, inputs in (("base_layer.", 12, 8), ("", 8, 6)):
            a = torch.randn(number * rank, inputs, generator=chance)
            b = torch.randn(out, rank * number, generator=chance)
            tensors[f"{PREFIX}{called}.experts.{wrapper}lora_A.weight"] = a
            tensors[f"{PREFIX}{called}.experts.{wrapper}lora_B.weight"] = b
            product = torch.einsum("ore,eri->eoi", b.double().view(out, rank, -1), a.double().view(-1, rank, inputs))
            products.append(2 * product)
        for expert in range(number):
            both, last = products[0][expert], products[1][expert]
            for name, update in ((gate, both[:6]), (up, both[6:]), (down, last)):
                added[f"{stored}.experts.{expert}.{name}.weight"] = update
        a, b = torch.randn(rank, 8, generator=chance), torch.randn(number, rank, generator=chance)
        tensors |= {f"{PREFIX}{called}.gate.lora_A.weight": a, f"{PREFIX}{called}.gate.lora_B.weight": b}
        added[f"{stored}.gate.weight"] = 2 * b.double() @ a.double()
    return tensors, added


TWO_OF_EXPERTS: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", EXPERTS)
def test_fused_experts_on_a_base_that_stores_them_one_by_one(model_type: str, tmp_path: Path) -> None:
    """What is one tensor in the model, and many on disk, gets its part of the product, by transformers' own rules; so
    do modules that are only called otherwise there. Workers change no byte.
    """
    before = one_by_one(model_type)
    write_checkpoint(tmp_path / "base", before, config={"model_type": model_type, "num_hidden_layers": 2})
    own, added = of_experts(model_type)
    added |= updates(write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2)))
    write_adapter(tmp_path / "adapter", own | factors(MODULES, 4, 2), **TWO_OF_EXPERTS)
    assert_folded(folded(tmp_path), before, added)
    bytes_of = (tmp_path / "out" / "model.safetensors").read_bytes()
    folded(tmp_path, workers=3)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == bytes_of
    assert run_lines("verify", tmp_path / "out").code == 0
    ran = run_lines("edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--dry-run", "--json")
    (note,) = [note for note in ran.json["notes"] if "another layout" in note]
    assert note.startswith("4 tensor(s) that ")
    assert " changes are 18 of another layout in " in note
    assert "layers.0.mlp.experts.down_proj and model.layers.0." in note


@pytest.mark.slow
def test_a_merge_of_fused_experts(tmp_path: Path) -> None:
    """An adapter beside a fine-tune: the product is its task vector, in whatever chunks."""
    before = one_by_one("mixtral")
    tuned = {name: tensor + 0.1 for name, tensor in before.items()}
    own, added = of_experts("mixtral")
    config = {"model_type": "mixtral", "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "base", before, config=config)
    write_checkpoint(tmp_path / "tuned", tuned, config=config)
    write_adapter(tmp_path / "adapter", own, **TWO_OF_EXPERTS)
    said: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base")}
    said["models"] = [{"model": str(tmp_path / name), "parameters": {"weight": 0.5}} for name in ("tuned", "adapter")]
    (tmp_path / "merge.yaml").write_text(json.dumps(said))
    for out, chunk in (("out", 1000), ("other", 7)):
        recipe = lines.load_recipe(tmp_path / "merge.yaml")
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / out)
        lines.run(plan, lines.Resources(workers=2, chunk=chunk))
    written = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "other")]
    assert written[0] == written[1]
    halves = {name: 0.5 * added.get(name, 0) + 0.5 * (tuned[name] - tensor) for name, tensor in before.items()}
    assert_folded(load_file(tmp_path / "out" / "model.safetensors"), before, halves)


def test_fused_experts_that_an_adapter_holds_whole(tmp_path: Path) -> None:
    """They are refused where the base stores them one by one."""
    write_checkpoint(tmp_path / "base", one_by_one("qwen3_moe"), config={"model_type": "qwen3_moe"})
    experts = {f"{PREFIX}model.layers.{i}.mlp.experts.gate_up_proj": torch.randn(3, 12, 8) for i in range(2)}
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2) | experts, modules_to_save=["experts"])
    with pytest.raises(MismatchError, match=r"replaces or rescales .*gate_up_proj, which .*another layout") as caught:
        folded(tmp_path)
    assert "merge_and_unload" in str(caught.value.hint)


def test_a_module_that_is_called_otherwise_and_saved_whole(tmp_path: Path) -> None:
    """It takes the place of the one that the base stores by another name."""
    before = one_by_one("mixtral")
    write_checkpoint(tmp_path / "base", before, config={"model_type": "mixtral", "num_hidden_layers": 2})
    routers = {f"model.layers.{i}.{{}}.gate.weight": torch.randn(3, 8) for i in range(2)}
    whole = {PREFIX + name.format("mlp"): tensor for name, tensor in routers.items()}
    added = updates(write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2) | whole, modules_to_save=["gate"]))
    wanted = {name.format("block_sparse_moe"): tensor for name, tensor in routers.items()}
    assert_folded(folded(tmp_path), before | wanted, added)


@pytest.mark.parametrize("lacking", ["experts.1.up_proj", "experts.2"])
def test_experts_that_are_not_all_there(lacking: str, tmp_path: Path) -> None:
    """A base that lacks one of them has no such tensor."""
    before = {name: tensor for name, tensor in one_by_one("qwen3_moe").items() if lacking not in name}
    write_checkpoint(tmp_path / "base", before, config={"model_type": "qwen3_moe"})
    write_adapter(tmp_path / "adapter", of_experts("qwen3_moe")[0], **TWO_OF_EXPERTS)
    with pytest.raises(MismatchError, match=r"experts"):
        folded(tmp_path)


def test_layers_that_are_stored_as_one(tmp_path: Path) -> None:
    """What the model has as two layers, and its checkpoint as one, is changed in its own rows."""
    wide = torch.randn(2 * 24, 8)
    before = {"encoder.layer.0.mlp.weights_in.weight": wide, "encoder.layer.0.mlp.weights_out.weight": wide[:8].clone()}
    write_checkpoint(tmp_path / "base", before, config={"model_type": "dinov2", "architectures": ["Dinov2Model"]})
    modules = {"encoder.layer.0.mlp.up_proj": (24, 8), "encoder.layer.0.mlp.down_proj": (8, 8)}
    own = updates(write_adapter(tmp_path / "adapter", factors(modules, 4, 2)))
    rows = torch.cat([torch.zeros(24, 8, dtype=torch.float64), own["encoder.layer.0.mlp.up_proj.weight"]])
    added = {"encoder.layer.0.mlp.weights_in.weight": rows}
    added["encoder.layer.0.mlp.weights_out.weight"] = own["encoder.layer.0.mlp.down_proj.weight"]
    assert_folded(folded(tmp_path), before, added)


# --- an adapter where a base should be ---


@pytest.mark.parametrize("name", ["adapter", "adapter/adapter_model.safetensors"])
def test_an_adapter_is_no_base(name: str, tmp_path: Path) -> None:
    """It is refused as a base, and where there is none, with the way out."""
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2))
    write_adapter(tmp_path / "other", factors(MODULES, 4, 3))
    with pytest.raises(UnsupportedError, match="is an adapter") as refused:
        lines.edit(tmp_path / name, tmp_path / "other", tmp_path / "out")
    assert "BASE+ADAPTER" in str(refused.value.hint)
    config = tmp_path / "m.yaml"
    config.write_text(
        f"merge_method: linear\nmodels: [{{model: {tmp_path / name}}}, {{model: {tmp_path / 'other'}}}]\n"
    )
    ran = run_lines("merge", "--config", config, "-o", tmp_path / "out")
    assert ran.code == 3
    assert "is an adapter" in ran.err
    assert not (tmp_path / "out").exists()


def test_an_adapter_beside_whole_weights(tmp_path: Path) -> None:
    """A folder with whole weights is what they are, whatever lies beside them."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    write_checkpoint(tmp_path / "ft", base(), config=LLAMA)
    write_adapter(tmp_path / "ft", factors(MODULES, 4, 2))
    assert_folded(folded(tmp_path, "ft"), base(), {})


def test_an_adapter_that_torch_saved(tmp_path: Path) -> None:
    """`adapter_model.bin` is read as a pickle of which nothing is run, factors that are stored turned among them."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    made = factors(MODULES, 4, 2)
    added = updates(write_adapter(tmp_path / "adapter", made))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({n: t.T.contiguous().T for n, t in made.items()}, tmp_path / "adapter" / "adapter_model.bin")
    assert_folded(folded(tmp_path), base(), added)


def test_a_pickled_adapter_runs_nothing(tmp_path: Path) -> None:
    """A pickle that would call something else is refused."""

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "touched",))

    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"x": Evil()}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises((CheckpointError, UnsupportedError)):
        folded(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_a_quantised_base(tmp_path: Path) -> None:
    """Codes are no weights to put an adapter onto."""
    tensors = {name: tensor.to(torch.int8) if "q_proj" in name else tensor for name, tensor in base().items()}
    write_checkpoint(tmp_path / "base", tensors, config=LLAMA)
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2))
    with pytest.raises(UnsupportedError, match="quantised"):
        folded(tmp_path)


# --- the tokenizer ---


def test_the_tokenizer_beside_an_adapter(tmp_path: Path) -> None:
    """It goes with the output, in the place of the base's, and that is said."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2))
    for side in ("base", "adapter"):
        model = {"type": "BPE", "vocab": {side: 0}, "merges": []}
        added = [{"id": 30, "content": "[PAD]"}] if side == "adapter" else []
        (tmp_path / side / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": added}))
    (tmp_path / "base" / "vocab.json").write_text("{}")
    ran = run_lines("edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "adapter" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "out" / "vocab.json").exists()
    notes = "\n".join(ran.json["notes"])
    assert "the tokenizer is the one beside the adapter" in notes
    assert "[PAD] as token 30" in notes


def test_only_a_chat_template_beside_an_adapter(tmp_path: Path) -> None:
    """Without a vocabulary the tokenizer stays the base's, and the template is the adapter's."""
    write_checkpoint(tmp_path / "base", base(), config=LLAMA)
    write_adapter(tmp_path / "adapter", factors(MODULES, 4, 2))
    (tmp_path / "base" / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    for side in ("base", "adapter"):
        (tmp_path / side / "chat_template.jinja").write_text(side)
        (tmp_path / side / "special_tokens_map.json").write_text(json.dumps({"pad_token": side}))
    folded(tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter"
    assert json.loads((tmp_path / "out" / "special_tokens_map.json").read_text()) == {"pad_token": "base"}
