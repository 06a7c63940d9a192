"""Whatever a loader of the fine-tune's folder would read is carried over or named; what inputs disagree on is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from support.files import write_checkpoint
from support.run import run_lines

CONFIG = {"model_type": "llama", "num_hidden_layers": 3, "tie_word_embeddings": False}


def model(seed: int, rows: int = 6) -> dict[str, torch.Tensor]:
    """Three layers and an embedding of so many rows."""
    g = torch.Generator().manual_seed(seed)
    tensors = {f"model.layers.{i}.w": torch.randn(4, 4, generator=g) for i in range(3)}
    return tensors | {"model.embed_tokens.weight": torch.randn(rows, 4, generator=g)}


def write(folder: Path, seed: int, rows: int = 6, *, config: Any = CONFIG, **beside: Any) -> Path:
    """A folder with files beside its weights: a text, or what is to be JSON; `__` is a dot, `___` a slash."""
    write_checkpoint(folder, model(seed, rows), config=config)
    for name, content in beside.items():
        path = folder / name.replace("___", "/").replace("__", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def edit(tmp: Path, *flags: object) -> tuple[Path, list[str]]:
    """The output of `edit base ft`, and its notes."""
    ran = run_lines("edit", tmp / "base", tmp / "ft", "-o", tmp / "out", "--json", *flags)
    assert ran.code == 0, ran.err
    return tmp / "out", ran.json["notes"]


def merge(tmp: Path, **more: Any) -> tuple[Path, list[str]]:
    """The output of a merge of `a` and `b` on `base`, and its notes."""
    models = [{"model": "a"}, {"model": "b"}]
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": models, **more}
    (tmp / "m.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp / "m.yaml", "-o", tmp / "out", "--json")
    assert ran.code == 0, ran.err
    return tmp / "out", ran.json["notes"]


def about(notes: list[str], words: str) -> list[str]:
    return [note for note in notes if words in note]


# --- modules ---

MODULES = [{"idx": number, "path": path} for number, path in enumerate(("", "1_Pooling", "2_Dense", "3_Normalize"))]


@pytest.mark.slow
def test_modules_with_weights_of_their_own(tmp_path: Path) -> None:
    """They are scaled as what lies outside the blocks, and a note says so; an output is replaced and verified with
    them.
    """
    for seed, side in enumerate(("base", "ft")):
        write(tmp_path / side, seed, modules__json=MODULES, **{"1_Pooling___config__json": {"of": side}})
        (tmp_path / side / "2_Dense/deeper").mkdir(parents=True)
        (tmp_path / side / "3_Normalize").mkdir()
        (tmp_path / side / "2_Dense/config.json").write_text("{}")
        (tmp_path / side / "2_Dense/deeper/vocab.txt").write_text(side)
        (tmp_path / side / "2_Dense/optimizer.pt").write_text("no")
        save_file({"linear.weight": torch.full((2, 2), float(seed))}, tmp_path / side / "2_Dense/model.safetensors")
    out, notes = edit(tmp_path)
    assert load_file(out / "2_Dense/model.safetensors")["linear.weight"].unique() == torch.tensor(0.1)
    assert (out / "2_Dense/deeper/vocab.txt").read_text() == "ft"
    assert not (out / "2_Dense/optimizer.pt").exists()
    assert about(notes, "2_Dense") == ["2_Dense: it has no layers, and is scaled as what lies outside the blocks"]
    edit(tmp_path, "--force")
    assert run_lines("verify", out).code == 0


def test_a_module_that_is_a_pickle_or_missing(tmp_path: Path) -> None:
    """What torch.save wrote is read, and written as safetensors; of several pickles none is copied, and they are named;
    so is what is not there.
    """
    write(tmp_path / "base", 0)
    write(tmp_path / "ft", 1, modules__json=MODULES, **{"2_Dense___config__json": "{}"})
    dense = {"linear.weight": torch.ones(2, 2)}
    torch.save(dense, tmp_path / "ft/2_Dense/pytorch_model.bin")
    out, notes = edit(tmp_path)
    assert sorted(path.name for path in (out / "2_Dense").iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_file(out / "2_Dense/model.safetensors")["linear.weight"], dense["linear.weight"])
    assert about(notes, "3_Normalize, which is not there")
    for name in ("a.bin", "b.bin"):
        torch.save(dense, tmp_path / "ft/2_Dense" / name)
    (tmp_path / "ft/2_Dense/pytorch_model.bin").unlink()
    out, notes = edit(tmp_path, "--force")
    assert sorted(path.name for path in (out / "2_Dense").iterdir()) == ["config.json"]
    assert about(notes, "2_Dense/a.bin")


@pytest.mark.parametrize("content", ["no JSON", "{}", '[{"path": "../base"}, {"path": "/etc"}, {"path": 3}, 4]'])
def test_modules_of_a_stranger(content: str, tmp_path: Path) -> None:
    """Nothing outside the folder is looked at, and what is no list names nothing."""
    write(tmp_path / "base", 0, secret__txt="secret")
    write(tmp_path / "ft", 1, modules__json=content)
    out, _ = edit(tmp_path)
    assert [path for path in out.rglob("*") if path.is_file() and b"secret" in path.read_bytes()] == []


def test_modules_that_only_the_base_has(tmp_path: Path) -> None:
    """A trainer saves the transformer alone: that pooling is not carried over is said."""
    write(tmp_path / "base", 0, modules__json=[{"path": ""}, {"path": "1_Pooling"}])
    write(tmp_path / "ft", 1)
    assert len(about(edit(tmp_path)[1], "has modules.json")) == 1
    write(tmp_path / "ft", 1, modules__json=[{"path": ""}])
    assert about(edit(tmp_path, "--force")[1], "has modules.json") == []


CODE = {"AutoModel": "modeling_x.XModel", "AutoTokenizer": ["tokenization_x.T", None], "AutoConfig": "org/x--conf.C"}


@pytest.mark.slow
def test_code_that_auto_map_names(tmp_path: Path) -> None:
    """It is taken from the base where the fine-tune was saved without, with what it may import; else it is named."""
    config = CONFIG | {"auto_map": CODE}
    write(tmp_path / "base", 0, config=config, modeling_x__py="from .y import z", y__py="z = 1")
    write(tmp_path / "ft", 1, config=config)
    out, notes = edit(tmp_path)
    assert len(about(notes, "modeling_x.py, tokenization_x.py, which is not there")) == 1
    assert not (out / "y.py").exists()
    (tmp_path / "base" / "tokenization_x.py").write_text("t")
    (tmp_path / "ft" / "y.py").write_text("its own")
    out, notes = edit(tmp_path, "--force")
    assert len(about(notes, "that of the base is taken (modeling_x.py, tokenization_x.py)")) == 1
    assert (out / "modeling_x.py").read_text() == "from .y import z"
    assert (out / "y.py").read_text() == "its own"
    write(tmp_path / "base", 0, config=CONFIG)  # of another model: its code would not be what is named
    out, notes = edit(tmp_path, "--force")
    assert len(about(notes, "which is not there")) == 1


@pytest.mark.parametrize("auto_map", [[], "x.Y", {"AutoModel": 1}, {"AutoModel": "../x.Y"}, {"AutoModel": "a/b.c"}])
def test_an_auto_map_of_a_stranger(auto_map: Any, tmp_path: Path) -> None:
    for name in ("base", "ft"):
        write(tmp_path / name, 0 if name == "base" else 1, config=CONFIG | {"auto_map": auto_map})
    assert about(edit(tmp_path)[1], "auto_map") == []


@pytest.mark.parametrize("name", ["quantize_config", "hf_quant_config", "quantization_config", "quant_config"])
def test_a_claim_that_whole_weights_are_quantised(name: str, tmp_path: Path) -> None:
    """A server that finds it would look for codes."""
    write(tmp_path / "base", 0)
    write(tmp_path / "ft", 1, **{f"{name}__json": {"bits": 4}})
    out, notes = edit(tmp_path)
    assert len(about(notes, f"{name}.json")) == 1
    assert not (out / f"{name}.json").exists()


@pytest.mark.parametrize("where", ["base", "ft"])
def test_an_adapter_beside_whole_weights(where: str, tmp_path: Path) -> None:
    """A loader would add it to the weights, so it decides what the model is."""
    for seed, name in enumerate(("base", "ft")):
        write(tmp_path / name, seed, **({"adapter_config__json": {}} if name == where else {}))
    out, notes = edit(tmp_path)
    called = "the base" if where == "base" else "the fine-tune"
    assert len(about(notes, f"an adapter lies beside the weights of {called}")) == 1
    assert not (out / "adapter_config.json").exists()


def test_all_that_is_left_behind_is_named(tmp_path: Path) -> None:
    write(tmp_path / "base", 0)
    write(tmp_path / "ft", 1, **{f"part_{i}__dat": "" for i in range(20)})
    note = about(edit(tmp_path)[1], "not carried over")[0]
    assert [i for i in range(20) if f"part_{i}.dat" not in note] == []


def test_what_else_lies_there_is_carried_or_named(tmp_path: Path) -> None:
    """params.json is carried; a file of unknown use and a model in a subfolder are named; training state is not."""
    unknown = {
        "spk_dict__pt": "x",
        "speech_tokenizer___config__json": {},
        "optimizer__pt": "x",
        "checkpoint-1___config__json": {},
        "custom_generate___generate__py": "x",
    }
    write(tmp_path / "base", 0)
    write(tmp_path / "ft", 1, params__json={"dim": 4}, **unknown)
    for name in ("value_head", "model.fp16"):  # the second is a variant of the same weights
        shutil.copy(tmp_path / "ft" / "model.safetensors", tmp_path / "ft" / f"{name}.safetensors")
    out, notes = edit(tmp_path)
    assert json.loads((out / "params.json").read_text()) == {"dim": 4}
    (said,) = about(notes, "not carried over")
    assert said.split("\n")[1:] == [
        "  custom_generate/",
        "  speech_tokenizer/",
        "  spk_dict.pt",
        "  value_head.safetensors",
    ]


# --- tokenizer, processor, chat template ---

TOKENIZER = {"tokenizer__json": {"of": "base"}, "tokenizer_config__json": {"of": "base"}}


def test_a_fine_tune_without_its_tokenizer(tmp_path: Path) -> None:
    """The base's is taken where it has as many rows, and the fine-tune's own files stay its own."""
    write(tmp_path / "base", 0, **TOKENIZER)
    write(tmp_path / "ft", 1, tokenizer_config__json={"of": "ft"})
    out, notes = edit(tmp_path)
    assert json.loads((out / "tokenizer.json").read_text()) == {"of": "base"}
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"of": "ft"}
    assert about(notes, "that of the base is taken")


def test_a_tokenizer_that_may_not_fit(tmp_path: Path) -> None:
    """With other rows it is not taken, and that is said."""
    write(tmp_path / "base", 0, rows=8, **TOKENIZER)
    write(tmp_path / "ft", 1)
    out, notes = edit(tmp_path, "--filter", "embed_tokens=keep")
    assert not (out / "tokenizer.json").exists()
    assert about(notes, "may not fit (rows: 8 there, 6 here)")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "other"])
def test_a_fine_tune_without_its_processor(model_type: str, tmp_path: Path) -> None:
    """The base's is taken for the same type of model."""
    write(tmp_path / "base", 0, config=CONFIG | {"model_type": model_type}, preprocessor_config__json={"of": "base"})
    write(tmp_path / "ft", 1)
    out, notes = edit(tmp_path)
    assert (out / "preprocessor_config.json").exists() is (model_type == "llama")
    assert bool(about(notes, "no processor")) is (model_type == "llama")


@pytest.mark.parametrize("where", ["chat_template__jinja", "tokenizer_config__json"])
def test_a_chat_template_that_only_a_model_has(where: str, tmp_path: Path) -> None:
    """It is named with the key that takes it; and once that is said, nothing is."""
    write(tmp_path / "base", 0, tokenizer__json={})
    write(tmp_path / "a", 1)
    write(tmp_path / "b", 2, **{where: "{{ m }}" if "jinja" in where else {"chat_template": "{{ m }}"}})
    _, notes = merge(tmp_path)
    assert about(notes, "no chat template, ")[0].count("b has") == 1
    (tmp_path / "out").rename(tmp_path / "first")
    _, notes = merge(tmp_path, chat_template="b")
    assert about(notes, "no chat template") == []


# --- configs and tokenizers that disagree ---


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("rope_theta", (1e4, 1e6)),
        ("rope_scaling", (None, {"factor": 2})),
        ("num_key_value_heads", (8, 4)),
        ("sliding_window", (4096, None)),
        ("rms_norm_eps", (1e-5, 1e-6)),
        ("hidden_act", ("silu", "gelu")),
        ("eos_token_id", (2, [2, 9])),
        ("final_logit_softcapping", (30.0, None)),
        ("logits_soft_cap", (30.0, None)),
        ("num_experts_per_tok", (2, 4)),
        ("norm_topk_prob", (True, False)),
        ("do_stable_layer_norm", (True, False)),
        ("vision_feature_layer", (-2, -1)),
        ("alibi", (True, False)),
    ],
)
@pytest.mark.some(6)
def test_configs_that_use_the_weights_in_other_ways(key: str, values: tuple[Any, Any], tmp_path: Path) -> None:
    """A note with key and values; also of a config within another. Names, versions and dropout are no matter."""
    ours, theirs = ({"text_config": {key: value} if value is not None else {}} for value in values)
    write(tmp_path / "base", 0, config=CONFIG | ours | {"transformers_version": "4"})
    write(tmp_path / "a", 1, config=CONFIG | theirs | {"transformers_version": "5", "attention_dropout": 0.1})
    write(tmp_path / "b", 2, config=CONFIG | ours)
    _, notes = merge(tmp_path)
    shown = " and ".join("not there" if value is None else json.dumps(value) for value in values)
    (said,) = about(notes, "configs of the base")
    assert said.split("\n")[1:] == [f"  text_config.{key}: {shown}"]
    write(tmp_path / "ft", 1, config=CONFIG | theirs)
    (tmp_path / "out").rename(tmp_path / "first")
    assert bool(about(edit(tmp_path)[1], key)) is (key != "eos_token_id")


@pytest.mark.parametrize("form", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
def test_special_tokens_that_are_others(form: str, tmp_path: Path) -> None:
    """One id for two tokens is named, wherever tokenizers say so."""

    def said(word: str) -> dict[str, Any]:
        content = {
            "tokenizer.json": {"added_tokens": [{"id": 5, "content": word}, {"id": 0, "content": "<s>"}]},
            "tokenizer_config.json": {"added_tokens_decoder": {"5": {"content": word}, "0": {"content": "<s>"}}},
            "added_tokens.json": {word: 5, "<s>": 0},
        }[form]
        return {form.replace(".", "__"): content}

    write(tmp_path / "base", 0, **said("<unused>"))
    write(tmp_path / "a", 1, **said("<|im_end|>"))
    write(tmp_path / "b", 2, **said("<unused>"))
    _, notes = merge(tmp_path)
    (note,) = about(notes, "special tokens")
    assert note.split("\n")[1:] == ['  5: "<unused>" and "<|im_end|>"']


# --- the model card ---


def front(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    return values


def test_the_card_takes_over_licence_language_and_task(tmp_path: Path) -> None:
    """Of the fine-tune, and nothing else of its card; another licence of the base is said."""
    said = {"license": "llama3", "language": ["en", "de"], "pipeline_tag": "text-generation", "datasets": ["x"]}
    write(tmp_path / "base", 0, README__md="---\nlicense: mit\n---\n")
    write(tmp_path / "ft", 1, README__md=f"---\n{yaml.safe_dump(said)}---\n# ft\n")
    out, notes = edit(tmp_path)
    del said["datasets"]
    assert front(out) == said | {"tags": ["lines"], "library_name": "transformers"}
    assert about(notes, "other licences: mit")


@pytest.mark.parametrize(
    "text", ["", "---\n[", "---\n- a\n---\n", "---\nlicense: {a: b}\n---\n", "x\n---\nlicense: mit\n---\n"]
)
def test_a_card_without_front_matter(text: str, tmp_path: Path) -> None:
    """Nothing is taken over of what is no front matter."""
    write(tmp_path / "base", 0)
    write(tmp_path / "ft", 1, README__md=text)
    assert "license" not in front(edit(tmp_path)[0])


def test_hub_ids_in_the_card(tmp_path: Path) -> None:
    """A folder of the Hub's cache is named by its id; an edit is a fine-tune of it, no merge."""
    snapshot = tmp_path / f"models--org--base/snapshots/{'0' * 40}"
    write(snapshot, 0)
    write(tmp_path / "ft", 1)
    assert run_lines("edit", snapshot, tmp_path / "ft", "-o", tmp_path / "out").code == 0
    found = front(tmp_path / "out")
    assert (found["base_model"], found["base_model_relation"]) == (["org/base"], "finetune")


# --- the header's metadata ---


@pytest.mark.parametrize("out", ["out", "out.safetensors"])
def test_metadata_of_a_single_file(out: str, tmp_path: Path) -> None:
    """The fine-tune's is carried, but for digests of what it held, and the output says its own format."""
    said = {"modelspec.title": "mine", "ss_network": "x", "modelspec.hash_sha256": "0x1", "sshs_model_hash": "2"}
    save_file(model(0), tmp_path / "base.safetensors", metadata={"modelspec.title": "base"})
    save_file(model(1), tmp_path / "ft.safetensors", metadata=said | {"format": "mlx"})
    ran = run_lines("edit", tmp_path / "base.safetensors", tmp_path / "ft.safetensors", "-o", tmp_path / out)
    assert ran.code == 0, ran.err
    file = tmp_path / out / "model.safetensors" if out == "out" else tmp_path / out
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"modelspec.title": "mine", "ss_network": "x", "format": "pt"}
