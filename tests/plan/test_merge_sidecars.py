"""What stands beside the weights of a merge's inputs, and several stacks: configs, tokenizers, templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from support.bits import raw
from support.files import write_checkpoint
from support.merging import merge, output, refused, tensors, trimmed, write

# --- what stands beside the weights ---

BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
)


def beside(tmp_path: Path, *sides: str, **contents: Any) -> None:
    """Write the files that stand beside the weights, each saying whose it is."""
    for side in sides:
        for name in BESIDE:
            content = side if name.endswith("jinja") else json.dumps({"of": side})
            (tmp_path / side / name).write_text(content)


def whose(tmp_path: Path) -> dict[str, str]:
    """Who each of the files beside the output's weights is from."""
    found = {}
    for name in BESIDE:
        if (tmp_path / "out" / name).exists():
            text = (tmp_path / "out" / name).read_text()
            found[name] = text if name.endswith("jinja") else json.loads(text)["of"]
    return found


@pytest.mark.parametrize(
    ("method", "has_base"), [("task_arithmetic", True), ("ties", True), ("linear", False), ("linear", True)]
)
def test_files_beside_are_the_base_s(method: str, has_base: bool, tmp_path: Path) -> None:
    """Config and tokenizer are the base's, or the first model's where there is no base."""
    sides = ("base", "a", "b")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    beside(tmp_path, *sides)
    lines = {"alpha": 0.5, "beta": 0.5} if has_base else None
    ran = merge(tmp_path, merge_method=method, base_model="base" if has_base else None, lines=lines)
    assert ran.code == 0, ran.err
    lead = "base" if has_base else "a"
    assert whose(tmp_path) == dict.fromkeys(BESIDE, lead)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"model_type": lead}


@pytest.mark.parametrize("source", ["base", "a", "b"])
@pytest.mark.parametrize("key", ["tokenizer_source", "tokenizer"])
def test_the_tokenizer_of_a_named_input(key: str, source: str, tmp_path: Path) -> None:
    """The tokenizer and its chat template are the named input's, and so are token ids; all else stays the base's."""
    sides = ("base", "a", "b")
    configs = {s: {"model_type": s, "bos_token_id": n} for n, s in enumerate(sides)}
    write(tmp_path, configs=configs, **{s: tensors(i) for i, s in enumerate(sides)})
    beside(tmp_path, *sides)
    ran = merge(tmp_path, **{key: source if key == "tokenizer_source" else {"source": source}})
    assert ran.code == 0, ran.err
    assert whose(tmp_path) == dict.fromkeys(BESIDE, source) | {"generation_config.json": "base"}
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "base", "bos_token_id": sides.index(source)}


def test_ids_of_special_tokens_are_those_that_the_tokenizer_s_model_has(tmp_path: Path) -> None:
    """Ids that the named input has are set, also new ones; ids that it lacks go; the base's other settings stay."""
    configs = {
        "base": {"model_type": "x", "pad_token_id": 0, "bos_token_id": 1},
        "a": {"bos_token_id": 5, "eos_token_id": 7},
    }
    write(tmp_path, configs=configs, base=tensors(0), a=tensors(1), b=tensors(2))
    beside(tmp_path, "base", "a")
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.1, "pad_token_id": 0}')
    (tmp_path / "a" / "generation_config.json").write_text('{"temperature": 0.9, "eos_token_id": [7, 8]}')
    assert merge(tmp_path, tokenizer_source="a").code == 0
    written = {
        name: json.loads((tmp_path / "out" / name).read_text()) for name in ("config.json", "generation_config.json")
    }
    assert written["config.json"] == {"model_type": "x", "bos_token_id": 5, "eos_token_id": 7}
    assert written["generation_config.json"] == {"temperature": 0.1, "eos_token_id": [7, 8]}


def test_a_tokenizer_of_a_folder_without_config(tmp_path: Path) -> None:
    """A named input that has a tokenizer and no config says nothing of token ids: the config's own stay."""
    config = {"model_type": "x", "bos_token_id": 1, "eos_token_id": 2}
    write(tmp_path, configs={"base": config}, base=tensors(0), a=tensors(1), b=tensors(2))
    (tmp_path / "a" / "tokenizer.json").write_text("a")
    assert merge(tmp_path, tokenizer_source="a").code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("lone", [True, False])
def test_a_named_input_without_is_refused(key: str, lone: bool, tmp_path: Path) -> None:
    """An input that is named for a tokenizer or a chat template and has none is refused by name; so is a lone file."""
    write(tmp_path, configs={"base": {"model_type": "x"}}, base=tensors(0), a=tensors(1))
    beside(tmp_path, "base")
    source = "b.safetensors" if lone else "b"
    write_checkpoint(tmp_path / source, tensors(2))
    refused(merge(tmp_path, models=["a", source], **{key: source}), 3, key, tmp_path / source)
    assert not (tmp_path / "out").exists()


def with_template(folder: Path, kind: str, template: str) -> None:
    """Give a folder a chat template, in its tokenizer's config or in a file."""
    tokenizer = {"of": folder.name} | ({"chat_template": template} if kind == "inside" else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    if kind == "file":
        (folder / "chat_template.jinja").write_text(template)


def templates(folder: Path) -> set[str]:
    """Every chat template that a folder has, wherever it is kept."""
    found = {path.read_text() for path in folder.glob("chat_template.jinja")}
    if (folder / "tokenizer_config.json").exists():
        found.add(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template", ""))
    return found - {""}


@pytest.mark.parametrize("theirs", ["inside", "file"])
@pytest.mark.parametrize("own", ["inside", "file", "none", "no tokenizer"])
def test_the_chat_template_of_a_named_input(own: str, theirs: str, tmp_path: Path) -> None:
    """The output has the named input's template and no other, wherever the two keep it; its tokenizer is the base's."""
    sides = ("base", "a", "b")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    if own != "no tokenizer":
        with_template(tmp_path / "base", own, "base's")
    with_template(tmp_path / "b", theirs, "b's")
    ran = merge(tmp_path, chat_template="b")
    assert ran.code == 0, ran.err
    assert templates(tmp_path / "out") == {"b's"}
    if own != "no tokenizer":
        assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())["of"] == "base"


@pytest.mark.parametrize("key", ["tokenizer_source", "chat_template"])
@pytest.mark.parametrize("value", ["union", "c", "base"])
def test_a_source_that_is_none_of_the_inputs(key: str, value: str, tmp_path: Path) -> None:
    """Whoever is no input, and the base where there is none, is refused with the key's name."""
    write(tmp_path, a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, merge_method="linear", base_model=None, **{key: value})
    refused(ran, 2, key, value)


def test_the_model_card_lists_all(tmp_path: Path) -> None:
    """Front matter and table name the base and every model once, and the method."""
    sides = ("base", "ft-math", "ft-code", "ft-law")
    write(tmp_path, configs={s: {"model_type": s} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
    assert merge(tmp_path, models=sides[1:], merge_method="ties", lines={"beta": 0.5}).code == 0
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert "base_model" not in front  # local names are no Hub ids
    assert front["tags"] == ["lines", "merge", "ties"]
    assert [side for side in sides if card.count(f"`{side}`") != 1] == []
    assert str(tmp_path) not in card


# --- several stacks ---

_T5 = ("layer.0.SelfAttention.q.weight", "layer.1.EncDecAttention.q.weight", "layer.2.DenseReluDense.wi.weight")
STACKS = {
    "encoder and decoder": {
        "encoder": [f"encoder.block.{i}.{name}" for i in range(4) for name in (_T5[0], _T5[2].replace("2", "1"))],
        "decoder": [f"decoder.block.{i}.{name}" for i in range(3) for name in _T5],
        "": ["shared.weight", "encoder.final_layer_norm.weight", "lm_head.weight"],
    },
    "two towers": {
        "vision_model": [f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(5)],
        "text_model": [f"text_model.encoder.layers.{i}.mlp.fc1.weight" for i in range(2)],
        "": ["logit_scale", "visual_projection.weight", "text_model.embeddings.token_embedding.weight"],
    },
}
RULES: dict[str, tuple[dict[str, Any], dict[str, Callable[[float], float]]]] = {
    "all": ({}, {}),
    "one keeps": ({"stacks": {0: "keep"}}, {"0": lambda x: 1.0}),
    "one is the base": ({"stacks": {1: "base"}}, {"1": lambda x: 0.0}),
    "one of its own": (
        {"stacks": {1: {"alpha": 0.75, "beta": -0.5}}, "outside": "base"},
        {"1": lambda x: 0.75 - 0.5 * x, "": lambda x: 0.0},
    ),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.some(6)
def test_each_stack_has_a_depth_of_its_own(method: str, kind: str, rule: str, tmp_path: Path) -> None:
    """Coefficients count through each stack alone, stacks chooses which is scaled, and the merge is scaled by them."""
    stacks = STACKS[kind]
    numbered = [name for name in stacks if name]
    said, special = RULES[rule]
    lines = {"alpha": 0.25, "beta": 0.5, **said}
    if "stacks" in lines:
        lines["stacks"] = {numbered[key]: value for key, value in lines["stacks"].items()}
    coefficients: dict[str, float] = {}
    for stack, names in stacks.items():
        key = str(numbered.index(stack)) if stack else ""
        value = special.get(key, lambda x: 0.25 + 0.5 * x)
        numbers = [int(next(part for part in name.split(".") if part.isdecimal())) for name in names] if stack else []
        for position, name in enumerate(names):
            coefficients[name] = value(numbers[position] / max(numbers) if stack else 0.0)
    base = {name: torch.zeros(2) for name in coefficients}
    models = {side: {name: torch.full((2,), size) for name in base} for side, size in (("a", 1.0), ("b", 3.0))}
    write(tmp_path, base=base, **models)
    ran = merge(tmp_path, "--json", merge_method=method, lines=lines)
    assert ran.code == 0, ran.err
    assert [stack["layers"] for stack in ran.json["stacks"]] in ([4, 3], [3, 4], [5, 2], [2, 5])
    merged = 4.0 if method == "task_arithmetic" else 2.0
    got = {name: float(tensor[0]) for name, tensor in output(tmp_path).items()}
    assert got == pytest.approx({name: c * merged for name, c in coefficients.items()}, rel=1e-6)


def test_alpha_auto_is_of_the_whole_model(tmp_path: Path) -> None:
    """Alpha is measured over all stacks and what lies outside, whichever of them lines.stacks scales."""
    names = [name for group in STACKS["encoder and decoder"].values() for name in group]
    random = torch.Generator().manual_seed(0)
    models = {side: {name: torch.randn(6, generator=random) for name in names} for side in ("base", "a", "b")}
    write(tmp_path, **models)
    recipe = {"merge_method": "ties", "parameters": {"density": 0.5}}
    ran = merge(tmp_path, "--json", lines={"beta": 0.5, "stacks": {"encoder": "base"}, "outside": "base"}, **recipe)
    assert ran.code == 0, ran.err
    base = models["base"]
    both = sum((models["a"][n] - base[n] + (models["b"][n] - base[n])).abs().sum(dtype=torch.float64) for n in names)
    flat = torch.cat([base[n] for n in names])
    taus = torch.stack([torch.cat([models[side][n] for n in names]) - flat for side in "ab"])
    taus = trimmed(taus, 0.5)
    agree = taus * taus.sum(0).sign() > 0
    merged = ((taus * agree).sum(0) / agree.sum(0).clamp(min=1)).abs().sum(dtype=torch.float64)
    assert ran.json["alpha"] == pytest.approx(float(both / merged) / 2, rel=1e-6)
    got = output(tmp_path)
    assert all(raw(got[n]) == raw(base[n]) for n in names if n.startswith("encoder") or "block" not in n)
    assert all(raw(got[n]) != raw(base[n]) for n in names if n.startswith("decoder"))
