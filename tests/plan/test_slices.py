"""`slices:`: layers of models stacked. What is expected is put together by hand, name by name."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from support.crossed import by_turns
from support.files import write_checkpoint
from support.run import run_lines

Model = dict[str, torch.Tensor]
LAYERS = 4
LLAMA = {"model_type": "llama", "num_hidden_layers": LAYERS, "tie_word_embeddings": False}


def model(seed: int, *, layers: int = LAYERS, head: bool = True, dtype: torch.dtype = torch.float32) -> Model:
    """A decoder of so many layers, whose numbers are all others."""
    g = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    found = {"model.embed_tokens.weight": some(6, 4)}
    for number in range(layers):
        found[f"model.layers.{number}.input_layernorm.weight"] = some(4)
        found[f"model.layers.{number}.mlp.down_proj.weight"] = some(4, 8)
        found[f"model.layers.{number}.self_attn.o_proj.weight"] = some(4, 4)
    found["model.norm.weight"] = some(4)
    return found | ({"lm_head.weight": some(6, 4)} if head else {})


def write(tmp: Path, config: Mapping[str, Any] = LLAMA, **models: Model) -> None:
    for name, tensors in models.items():
        write_checkpoint(tmp / name, tensors, config=config, shards=2 if name == "b" else 1)


def stacked(parts: Sequence[tuple[Model, int, int]]) -> Model:
    """Layers behind layers; outside them the first model's embedding and the last one's norm and head."""
    (first, _, _), (last, _, _) = parts[0], parts[-1]
    found = {"model.embed_tokens.weight": first["model.embed_tokens.weight"]}
    number = 0
    for tensors, begin, end in parts:
        for layer in range(begin, end):
            prefix = f"model.layers.{layer}."
            of_it = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            found |= {f"model.layers.{number}.{name.removeprefix(prefix)}": tensor for name, tensor in of_it.items()}
            number += 1
    behind = {name: last[name] for name in ("model.norm.weight", "lm_head.weight") if name in last}
    return found | behind


def passthrough(*parts: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    slices = [{"sources": [{"model": name, "layer_range": [first, end]}]} for name, first, end in parts]
    return {"merge_method": "passthrough", "slices": slices, **more}


def merge(tmp: Path, recipe: Mapping[str, Any], *more: object, out: str = "out") -> Any:
    (tmp / "m.yaml").write_text(yaml.safe_dump(dict(recipe)))
    return run_lines("merge", "--config", tmp / "m.yaml", "-o", tmp / out, "--json", *more)


def written(tmp: Path, out: str = "out") -> Model:
    return {n: t for file in sorted((tmp / out).glob("*.safetensors")) for n, t in load_file(file).items()}


def assert_same(got: Model, expected: Model) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name


# --- passthrough ---


@pytest.mark.parametrize(
    "parts",
    [
        [("a", 0, 2), ("b", 1, 4)],
        [("a", 0, 3), ("a", 1, 4)],
        [("b", 3, 4), ("a", 0, 1), ("b", 0, 4)],
        [("a", 0, 2)],
        [("b", 2, 4)],
        [("a", 0, 1)] * 6,
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.slow
def test_layers_are_stacked(parts: list[tuple[str, int, int]], dtype: torch.dtype, tmp_path: Path) -> None:
    """Every tensor is a copy of the one that it says, the config counts the layers, and the output is verified and made
    again by its own recipe.
    """
    models = {name: model(seed, dtype=dtype) for seed, name in enumerate("ab")}
    write(tmp_path, **models)
    ran = merge(tmp_path, passthrough(*parts))
    assert ran.code == 0, ran.err
    expected = stacked([(models[name], first, end) for name, first, end in parts])
    assert_same(written(tmp_path), expected)
    number = sum(end - first for _, first, end in parts)
    assert json.loads((tmp_path / "out/config.json").read_text()) == {**LLAMA, "num_hidden_layers": number}
    assert any(f"slices: {number} layers" in note for note in ran.json["notes"])
    assert run_lines("verify", tmp_path / "out").code == 0
    assert run_lines("inspect", tmp_path / "out").code == 0
    again = run_lines("merge", "--config", tmp_path / "out/lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    record = yaml.safe_load((tmp_path / "out/lines_recipe.yaml").read_text())
    assert "models" not in record
    assert {source["model"] for one in record["slices"] for source in one["sources"]} == {
        str(tmp_path / name) for name, _, _ in parts
    }


@pytest.mark.slow
def test_other_files_give_the_same_bytes(tmp_path: Path) -> None:
    """Shards, pickles, workers and chunks make no difference; nor do several files of the output."""
    models = {name: model(seed) for seed, name in enumerate("ab")}
    write(tmp_path, **models)
    recipe = passthrough(("a", 0, 3), ("b", 1, 4))
    assert merge(tmp_path, recipe).code == 0
    torch.save(models["b"], tmp_path / "b.pt")
    other = passthrough(("a", 0, 3), ("b.pt", 1, 4))
    assert merge(tmp_path, other, "--workers", "1", out="pickle").code == 0
    assert (tmp_path / "pickle/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    assert merge(tmp_path, recipe, "--set", "max_shard_size=500", out="shards").code == 0
    assert_same(written(tmp_path, "shards"), written(tmp_path))


def test_a_record_is_verified_against_every_model(tmp_path: Path) -> None:
    """The record names the files of each model once, and a model that changed is noticed."""
    write(tmp_path, a=model(0), b=model(1))
    assert merge(tmp_path, passthrough(("a", 0, 3), ("b", 1, 4), ("a", 2, 4))).code == 0
    record = yaml.safe_load((tmp_path / "out/lines_recipe.yaml").read_text())
    files = ["a/model.safetensors", *(f"b/model-0000{n}-of-00002.safetensors" for n in (1, 2))]
    assert sorted(record["inputs"]) == [str(tmp_path / file) for file in files]
    write(tmp_path, b=model(2))
    assert run_lines("verify", tmp_path / "out").code != 0


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    """A model without a head of its own is stacked as it is."""
    tied = LLAMA | {"tie_word_embeddings": True}
    models = {name: model(seed, head=False) for seed, name in enumerate("ab")}
    write(tmp_path, tied, **models)
    assert merge(tmp_path, passthrough(("a", 0, 3), ("b", 1, 4))).code == 0
    assert_same(written(tmp_path), stacked([(models["a"], 0, 3), (models["b"], 1, 4)]))


def test_whose_ends_is_said(tmp_path: Path) -> None:
    """Where embeddings and head are of two models, that is a note; of one there is none."""
    write(tmp_path, a=model(0), b=model(1))
    notes = merge(tmp_path, passthrough(("a", 0, 3), ("b", 1, 4)), "--dry-run").json["notes"]
    assert any("the same tokens" in note and "lm_head.weight" in note for note in notes)
    notes = merge(tmp_path, passthrough(("a", 0, 3), ("b", 1, 3), ("a", 3, 4)), "--dry-run").json["notes"]
    assert not any("the same tokens" in note for note in notes)


@pytest.mark.slow
def test_the_files_are_the_base_s_if_it_is_one(tmp_path: Path) -> None:
    """Config and tokenizer are those of the first model, or of base_model, or of tokenizer_source."""
    write(tmp_path, a=model(0))
    write(tmp_path, LLAMA | {"rope_theta": 5}, b=model(1))
    for name in "ab":
        (tmp_path / name / "tokenizer.json").write_text(f'"{name}"')
    parts = [("a", 0, 3), ("b", 1, 4)]
    for number, (more, config, tokenizer) in enumerate(
        [({}, "a", "a"), ({"base_model": "b"}, "b", "b"), ({"tokenizer_source": "b"}, "a", "b")]
    ):
        ran = merge(tmp_path, passthrough(*parts, **more), out=f"out{number}")
        assert ran.code == 0, ran.err
        theirs = json.loads((tmp_path / f"out{number}/config.json").read_text())
        assert ("rope_theta" in theirs, theirs["num_hidden_layers"]) == (config == "b", 6)
        assert (tmp_path / f"out{number}/tokenizer.json").read_text() == f'"{tokenizer}"'


# --- parameters ---


def layer_of(name: str) -> int | None:
    return int(name.split(".")[2]) if name.startswith("model.layers.") else None


def test_parameters_are_those_of_the_slice(tmp_path: Path) -> None:
    """What a source says goes before what its slice says, and that before the top; a gradient runs over each slice by
    itself; outside the blocks the first slice's hold before them, and the last one's behind.
    """
    a = model(0)
    write(tmp_path, a=a)
    scale = [{"filter": "down_proj", "value": [0.5, 1.5]}]
    slices = [
        {"sources": [{"model": "a", "layer_range": [0, 3], "parameters": {"scale": scale}}]},
        {"sources": [{"model": "a", "layer_range": [1, 2]}], "parameters": {"scale": 3.0}},
        {"sources": [{"model": "a", "layer_range": [2, 4]}]},
    ]
    recipe = {"merge_method": "passthrough", "slices": slices, "parameters": {"scale": [2.0, 4.0]}}
    assert merge(tmp_path, recipe).code == 0
    expected = stacked([(a, 0, 3), (a, 1, 2), (a, 2, 4)])
    by_layer = [2.0, 3.0, 4.0, 3.0, 2.0, 4.0]
    of_mlp = [0.5, 1.0, 1.5, 3.0, 2.0, 4.0]
    for name, tensor in written(tmp_path).items():
        layer = layer_of(name)
        by = 2.0 if layer is None else of_mlp[layer] if "down_proj" in name else by_layer[layer]
        assert torch.equal(tensor, expected[name] * by), name


def test_what_stands_behind_the_blocks_has_the_last_slice_s(tmp_path: Path) -> None:
    """Norm and head have the parameters of the last slice, also where the models are whole."""
    a = model(0)
    write(tmp_path, a=a)
    for number, (second, layers) in enumerate([((2, 4), LAYERS), ((1, 4), 5)]):
        slices = [
            {"sources": [{"model": "a", "layer_range": list(part), "parameters": {"scale": scale}}]}
            for part, scale in zip(((0, 2), second), (2.0, [3.0, 5.0]), strict=True)
        ]
        out = f"out{number}"
        assert merge(tmp_path, {"merge_method": "passthrough", "slices": slices}, out=out).code == 0
        made, expected = written(tmp_path, out), stacked([(a, 0, 2), (a, *second)])
        assert len({layer_of(name) for name in made} - {None}) == layers
        assert torch.equal(made["model.embed_tokens.weight"], expected["model.embed_tokens.weight"] * 2)
        assert torch.equal(made["lm_head.weight"], expected["lm_head.weight"] * 3)
        assert torch.equal(made["model.norm.weight"], expected["model.norm.weight"] * 3)


# --- other methods ---


@pytest.mark.slow
@pytest.mark.parametrize("listed", [True, False], ids=["base listed", "base not listed"])
def test_task_vectors_of_stacked_layers(listed: bool, tmp_path: Path) -> None:
    """The base's layers are those that are listed, in whatever place, or the same as the others'."""
    models = {name: model(seed) for seed, name in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    slices = []
    for first, end, order in ((0, 2, ("base", "a", "b")), (1, 4, ("b", "base", "a"))):
        sources = [{"model": name, "layer_range": [first, end]} for name in order if listed or name != "base"]
        slices.append({"sources": sources})
    slices[1]["parameters"] = {"lambda": 0.5}
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices, "parameters": {"weight": 0.5}}
    ran = merge(tmp_path, recipe)
    assert ran.code == 0, ran.err
    base, a, b = (stacked([(models[name], 0, 2), (models[name], 1, 4)]) for name in ("base", "a", "b"))
    for name, tensor in written(tmp_path).items():
        layer = layer_of(name)
        by = 0.5 if (layer is None and "embed" not in name) or (layer is not None and layer >= 2) else 1.0
        expected = base[name] + by * (0.5 * (a[name] - base[name]) + 0.5 * (b[name] - base[name]))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6)
    assert run_lines("verify", tmp_path / "out").code == 0


def test_lines_counts_the_layers_of_the_output(tmp_path: Path) -> None:
    """With `lines:` the base is stacked as the model is, and coefficients grow over the layers that come out."""
    models = {name: model(seed) for seed, name in enumerate(("base", "a"))}
    write(tmp_path, **models)
    recipe = passthrough(("a", 0, 3), ("a", 1, 4), base_model="base", lines={"alpha": 0.1, "beta": 0.8})
    ran = merge(tmp_path, recipe)
    assert ran.code == 0, ran.err
    base, a = (stacked([(models[name], 0, 3), (models[name], 1, 4)]) for name in ("base", "a"))
    for name, tensor in written(tmp_path).items():
        layer = layer_of(name)
        by = 0.1 if layer is None else 0.1 + 0.8 * layer / 5
        torch.testing.assert_close(tensor, base[name] + by * (a[name] - base[name]), rtol=1e-6, atol=1e-6)


def test_a_recipe_is_inspected_as_it_will_be_merged(tmp_path: Path) -> None:
    """`lines inspect --config` shows the layers that come out, with the updates of those that they are made of."""
    models = {name: model(seed) for seed, name in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    recipe = passthrough(("a", 0, 3), ("b", 1, 4), base_model="base", lines={"alpha": 0.1, "beta": 0.8})
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("inspect", "--config", tmp_path / "m.yaml", "--json")
    assert ran.code == 0, ran.err + ran.trace
    base = stacked([(models["base"], 0, 3), (models["base"], 1, 4)])
    ours = stacked([(models["a"], 0, 3), (models["b"], 1, 4)])
    assert [layer["index"] for layer in ran.json["layers"]] == list(range(6))
    for layer in ran.json["layers"]:
        names = [name for name in base if layer_of(name) == layer["index"]]
        norm = sum(float((ours[name] - base[name]).double().square().sum()) for name in names) ** 0.5
        assert layer["update_norm"] == pytest.approx(norm, rel=1e-6)
        assert layer["coefficient"] == pytest.approx(0.1 + 0.8 * layer["index"] / 5)


@pytest.mark.slow
def test_layers_of_one_range_onto_those_of_another(tmp_path: Path) -> None:
    """SLERP from a model's layers to other layers of another; at t = 0 and t = 1 they are the one and the other."""
    models = {name: model(seed) for seed, name in enumerate("ab")}
    write(tmp_path, **models)
    sources = [{"model": "a", "layer_range": [0, 3]}, {"model": "b", "layer_range": [1, 4]}]
    for t, parts in ((0, ("a", 0, 3)), (1, ("b", 1, 4))):
        recipe = {"merge_method": "slerp", "slices": [{"sources": sources}], "parameters": {"t": t}}
        assert merge(tmp_path, recipe, out=f"out{t}").code == 0
        expected = stacked([(models[parts[0]], *parts[1:])])
        for name, tensor in written(tmp_path, f"out{t}").items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)


# --- the config ---

TYPES = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"n_layer": 4}, {"n_layer": 5}),
        ({"num_hidden_layers": 4, "n_layers": 4}, {"num_hidden_layers": 5, "n_layers": 5}),
        (
            {"num_hidden_layers": 4, "layer_types": TYPES, "sliding_window_pattern": 3, "eos_token_id": [1, 2, 3, 4]},
            {
                "num_hidden_layers": 5,
                "layer_types": [TYPES[n] for n in (0, 1, 1, 2, 3)],
                "sliding_window_pattern": 3,
                "eos_token_id": [1, 2, 3, 4],
            },
        ),
        (
            {"text_config": {"num_hidden_layers": 4, "no_rope_layers": [1, 0, 1, 0], "no_rope_layer_interval": 2}},
            {"text_config": {"num_hidden_layers": 5, "no_rope_layers": [1, 0, 0, 1, 0], "no_rope_layer_interval": 2}},
        ),
        (
            {"num_hidden_layers": 4, "max_window_layers": 4, "use_sliding_window": False, "decoder_sparse_step": 1},
            {"num_hidden_layers": 5, "max_window_layers": 4, "use_sliding_window": False, "decoder_sparse_step": 1},
        ),
    ],
)
def test_the_config_follows(config: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    """The number of layers, wherever it stands, and every list with a value for each of them."""
    write(tmp_path, config, a=model(0))
    ran = merge(tmp_path, passthrough(("a", 0, 2), ("a", 1, 4)))
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out/config.json").read_text()) == expected
    assert run_lines("verify", tmp_path / "out").code == 0


BY_NUMBER = {
    "sliding_window_pattern": 2,
    "first_k_dense_replace": 1,
    "mlp_only_layers": [0],
    "full_attention_interval": 2,
    "attn_layer_period": 2,
    "decoder_sparse_step": 2,
    "num_nextn_predict_layers": 1,
    "max_window_layers": 2,
    "hybrid_override_pattern": "M*M*",
    "num_kv_shared_layers": 2,
    "attn_layer_indices": [1],
}


@pytest.mark.parametrize("key", BY_NUMBER)
def test_a_config_that_says_what_layers_are_by_number(key: str, tmp_path: Path) -> None:
    """Where numbers change, that is refused with the key; where layers are only left out at the end, they stay."""
    write(tmp_path, LLAMA | {key: BY_NUMBER[key]}, a=model(0))
    ran = merge(tmp_path, passthrough(("a", 0, 2), ("a", 1, 4)))
    assert (ran.code, ran.trace) == (3, "")
    assert f"{key}: {BY_NUMBER[key]}" in ran.err
    assert not (tmp_path / "out").exists()
    ran = merge(tmp_path, passthrough(("a", 0, 2)))
    assert ran.code == 0, ran.err
    assert json.loads((tmp_path / "out/config.json").read_text()) == LLAMA | {
        key: BY_NUMBER[key],
        "num_hidden_layers": 2,
    }


# --- refused ---


def _other_layer(tensors: Model) -> Model:
    return tensors | {"model.layers.2.mlp.gate.weight": torch.ones(3)}


def _wider(tensors: Model) -> Model:
    return tensors | {"model.layers.3.mlp.down_proj.weight": torch.ones(4, 9)}


def _two_stacks(tensors: Model) -> Model:
    return {
        f"{side}.{name.removeprefix('model.')}": t for side in ("encoder", "decoder") for name, t in tensors.items()
    }


def _called_otherwise(tensors: Model) -> Model:
    return {name.replace("model.layers", "transformer.h"): tensor for name, tensor in tensors.items()}


def _more_words(tensors: Model) -> Model:
    return tensors | {"model.embed_tokens.weight": torch.ones(7, 4), "lm_head.weight": torch.ones(7, 4)}


def _with_bias(tensors: Model) -> Model:
    return tensors | {"lm_head.bias": torch.ones(6)}


REFUSED: dict[str, tuple[Any, dict[str, Any], list[str]]] = {
    "fewer layers": (model(1), passthrough(("a", 0, 2), ("b", 2, 5)), ["[2, 5] of b", "4 layers"]),
    "a layer of another kind": (
        _other_layer(model(1)),
        passthrough(("a", 0, 2), ("b", 1, 4)),
        ["layer 2 of b", "mlp.gate.weight: not there and [3]"],
    ),
    "a wider layer": (
        _wider(model(1)),
        passthrough(("a", 0, 2), ("b", 1, 4)),
        ["layer 3 of b", "[4, 8] and [4, 9]"],
    ),
    "two stacks": (_two_stacks(model(1)), passthrough(("b", 0, 2), ("b", 1, 4)), ["2 stacks", "encoder", "decoder"]),
    "names of another library": (
        _called_otherwise(model(1)),
        passthrough(("a", 0, 2), ("b", 1, 4)),
        ["transformer.h.N", "model.layers.N"],
    ),
    "another vocabulary": (
        _more_words(model(1)),
        passthrough(("a", 0, 2), ("b", 1, 4)),
        ["outside their layers", "[6, 4] and [7, 4]"],
    ),
    "a bias at the end": (_with_bias(model(1)), passthrough(("a", 0, 2), ("b", 1, 4)), ["lm_head.bias", "not there"]),
    "no layers": ({"one.weight": torch.ones(2)}, passthrough(("b", 0, 2), ("b", 1, 4)), ["b", "no stack"]),
    "layers that the config does not count": (
        model(1, layers=5),
        passthrough(("b", 0, 2), ("b", 1, 4)),
        ["beyond the 4", "model.layers.4"],
    ),
    "ranges of other lengths": (
        model(1),
        {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 3]}]},
            ],
        },
        ["2 and 3 layers"],
    ),
    "other numbers of sources": (
        model(1),
        {
            "merge_method": "linear",
            "slices": [
                {"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [0, 2]}]},
                {"sources": [{"model": "a", "layer_range": [2, 4]}]},
            ],
        },
        ["slices.1.sources", "1 source", "the first slice has 2"],
    ),
    "one model twice": (
        model(1),
        {
            "merge_method": "linear",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}, {"model": "a", "layer_range": [2, 4]}]}],
        },
        ["slices.0.sources", "twice"],
    ),
    "a base that may be any": (
        model(1),
        {
            "merge_method": "task_arithmetic",
            "base_model": "a",
            "slices": [
                {"sources": [{"model": "b", "layer_range": [0, 2]}, {"model": "c", "layer_range": [2, 4]}]},
            ],
        },
        ["slices.0.sources", "which layers of the base (a)"],
    ),
    "a base in some slices": (
        model(1),
        {
            "merge_method": "task_arithmetic",
            "base_model": "a",
            "slices": [
                {"sources": [{"model": "b", "layer_range": [0, 2]}, {"model": "a", "layer_range": [0, 2]}]},
                {"sources": [{"model": "b", "layer_range": [2, 4]}, {"model": "c", "layer_range": [2, 4]}]},
            ],
        },
        ["slices.0.sources", "which layers of the base (a)"],
    ),
    "no range in one": (
        model(1),
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]}, {"sources": [{"model": "b"}]}],
        },
        ["slices.1.sources.0.layer_range", "missing"],
    ),
    "union": (
        model(1),
        passthrough(("a", 0, 2), ("b", 1, 4), tokenizer_source="union"),
        ["tokenizer_source", "not a union"],
    ),
    "an adapter out": (model(1), passthrough(("a", 0, 2), as_adapter=True), ["as_adapter", "slices"]),
    "mergekit's own base of a slice": (
        model(1),
        {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}], "base_model": "b"}],
        },
        ["slices.0.base_model", "not supported"],
    ),
    **{
        f"a range {said}": (
            model(1),
            {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": said}]}]},
            ["layer_range", "as in [0, 16]"],
        )
        for said in ([2, 2], [3, 1], [-1, 2], [0, 2.5], [0], "all", [0, 10**9], [False, True])
    },
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_makes_no_sense_is_refused(case: str, tmp_path: Path) -> None:
    """The message names the models, the layers or the keys, and nothing is written."""
    b, recipe, words = REFUSED[case]
    write(tmp_path, a=model(0), b=b, c=model(2))
    ran = merge(tmp_path, recipe)
    assert (ran.code in (2, 3, 4, 5), ran.trace) == (True, ""), ran.err
    said = " ".join(ran.err.split()).replace(f"{tmp_path}/", "")
    assert [word for word in words if word not in said] == [], said
    assert not (tmp_path / "out").exists()


def test_adapters_and_codes_are_refused_by_name(tmp_path: Path) -> None:
    """A LoRA on a base, and weights in 8 bits, cannot be taken apart; whole they can be merged all the same."""
    fp8 = model(0)
    name = "model.layers.1.mlp.down_proj.weight"
    fp8[name] = fp8[name].to(torch.float8_e4m3fn)
    fp8[f"{name}_scale"] = torch.ones(1)
    config = LLAMA | {"quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic"}}
    write(tmp_path, config, a=fp8)
    ran = merge(tmp_path, passthrough(("a", 0, 2), ("a", 1, 4)))
    assert (ran.code, "8 bits" in ran.err) == (3, True), ran.err
    assert merge(tmp_path, passthrough(("a", 0, 4))).code == 0


# --- transformers ---


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3_text", "gpt2", "bert"])
def test_transformers_loads_what_is_stacked(family: str, tmp_path: Path) -> None:
    """The loaded model computes what the models' own layers compute, put one behind the other."""
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    }
    if family == "gpt2":
        sizes = {"vocab_size": 32, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 64}
    if family in ("llama", "qwen2", "gemma3_text"):
        sizes |= {"num_key_value_heads": 1, "head_dim": 8}
    if family == "gemma3_text":
        sizes |= {"sliding_window": 4, "layer_types": TYPES}
    config = transformers.AutoConfig.for_model(family, **sizes)
    kind = transformers.AutoModelForMaskedLM if family == "bert" else transformers.AutoModelForCausalLM
    made = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        made[name] = kind.from_config(config).eval()
        made[name].save_pretrained(tmp_path / name)
    ran = merge(tmp_path, passthrough(("a", 0, 3), ("b", 1, 4)))
    assert ran.code == 0, ran.err
    loaded, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]

    def layers(of: Any) -> Any:
        lists = [module for module in of.modules() if isinstance(module, torch.nn.ModuleList)]
        return max(lists, key=len)

    expected = kind.from_pretrained(tmp_path / "b").eval()  # its head, a's embedding and the layers of both
    own, theirs = layers(made["a"]), layers(made["b"])
    stack = [*own[:3], *theirs[1:4]]
    holder = layers(expected)
    for number, layer in enumerate(stack):
        if number < len(theirs):
            holder[number] = layer
        else:
            holder.append(layer)
    expected.config.num_hidden_layers = 6
    if getattr(config, "layer_types", None) is not None:
        expected.config.layer_types = [config.layer_types[n] for n in (0, 1, 2, 1, 2, 3)]
    if family in ("llama", "qwen2", "gemma3_text", "gpt2"):
        expected.get_input_embeddings().load_state_dict(made["a"].get_input_embeddings().state_dict())
        if family == "gpt2":
            expected.transformer.wpe.load_state_dict(made["a"].transformer.wpe.state_dict())
    else:
        expected.bert.embeddings.load_state_dict(made["a"].bert.embeddings.state_dict())
    for number, layer in enumerate(layers(expected)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    ids = torch.arange(12)[None]
    with torch.no_grad():
        kept = {} if family == "bert" else {"use_cache": False}
        torch.testing.assert_close(loaded.eval()(ids, **kept).logits, expected(ids, **kept).logits)


@pytest.mark.slow
@by_turns(rule=["nan", "equal_norm"], place=["top", "slice", "source"])
def test_weights_that_are_measured(rule: str, place: str, tmp_path: Path) -> None:
    """A rule of weights, wherever it stands, is measured of the stacked task vectors, and recorded source by source:
    the record makes the same bytes.
    """
    base, a, b = model(0), model(1), model(2)
    write(tmp_path, base=base, a=a, b=b)
    ranges = ((0, 3), (1, 4))
    slices: list[dict[str, Any]] = [
        {"sources": [{"model": name, "layer_range": list(ends)} for name in ("base", "a", "b")]} for ends in ranges
    ]
    recipe: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "slices": slices}
    said = {"weight": rule}
    if place == "top":
        recipe["parameters"] = said
    for one in slices:
        if place == "slice":
            one["parameters"] = dict(said)
        if place == "source":
            for source in one["sources"][1:]:
                source["parameters"] = dict(said)
    if place != "top":
        slices[0]["sources"][1]["parameters"] = {"weight": 0.25}
    dry = merge(tmp_path, recipe, "--dry-run")
    assert dry.code == 0, dry.err + dry.trace
    shown = run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out", "--dry-run")
    assert rule in shown.out, shown.trace or shown.out
    assert ("0.25" in shown.out) == (place != "top")
    ran = merge(tmp_path, recipe)
    assert ran.code == 0, ran.err + ran.trace

    whole = [stacked([(one, *ends) for ends in ranges]) for one in (base, a, b)]
    norms = [sum(float((one[n] - whole[0][n]).double().pow(2).sum()) for n in one) ** 0.5 for one in whole[1:]]

    def by_rule(of: list[float]) -> list[float]:
        if rule == "nan":
            return [(1 / norm) / sum(1 / other for other in of) for norm in of]
        return [sum(of) / len(of) / norm for norm in of]

    both = by_rule(norms)
    expected = [both, both] if place == "top" else [[0.25, *by_rule(norms[1:])], both]
    record = yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())
    got = [[source["parameters"]["weight"] for source in one["sources"][1:]] for one in record["slices"]]
    assert [number for one in got for number in one] == pytest.approx([number for one in expected for number in one])
    assert rule not in yaml.safe_dump(record["slices"])
    assert rule not in yaml.safe_dump(record.get("parameters", {}))
    for name, tensor in written(tmp_path).items():
        later = name.startswith(("model.layers.3.", "model.layers.4.", "model.layers.5.", "model.norm", "lm_head"))
        taus = [one[name] - whole[0][name] for one in whole[1:]]
        by_hand = whole[0][name] + sum(weight * tau for weight, tau in zip(got[later], taus, strict=True))
        torch.testing.assert_close(tensor, by_hand, rtol=1e-5, atol=1e-6)
    assert run_lines("verify", tmp_path / "out").code == 0
    again = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0, again.err
    assert_same(written(tmp_path, "again"), written(tmp_path))


# --- what is of a layer by its number ---


@pytest.mark.parametrize("key", ["moe_layers", "cross_attention_layers", "some_block_ids"])
def test_a_list_of_the_numbers_of_all_layers(key: str, tmp_path: Path) -> None:
    """It stays one (Llama 4's `moe_layers` where every layer has experts): the numbers are not taken for values."""
    write(tmp_path, {**LLAMA, key: list(range(LAYERS)), "layer_types": ["a", "b", "c", "d"]}, a=model(1))
    assert merge(tmp_path, passthrough(("a", 0, 3), ("a", 1, 4))).code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config[key] == list(range(6))
    assert config["layer_types"] == ["a", "b", "c", "b", "c", "d"]


def without_first_norm(seed: int) -> Model:
    """As ModernBERT: the first layer lacks a norm that the others have."""
    found = model(seed)
    del found["model.layers.0.input_layernorm.weight"]
    return found


@pytest.mark.parametrize("types", [None, ["a", "b", "a", "b"]])
@pytest.mark.parametrize("parts", [[(1, 4)], [(1, 3), (2, 4)], [(3, 4), (1, 2)]])
def test_a_layer_in_a_place_that_holds_other_tensors(
    types: list[str] | None, parts: list[tuple[int, int]], tmp_path: Path
) -> None:
    """All layers that are stacked are alike, but the first place is of a layer that is not: refused."""
    config = LLAMA if types is None else {**LLAMA, "layer_types": types}
    write(tmp_path, config, a=without_first_norm(1))
    ran = merge(tmp_path, passthrough(*(("a", first, end) for first, end in parts)))
    assert ran.code == 4, ran.trace
    assert f"layer {parts[0][0]} of" in ran.err
    assert "layer 0 of" in ran.err
    assert "input_layernorm.weight" in ran.err
    assert not (tmp_path / "out").exists()


def test_layers_left_out_at_the_end_keep_their_places(tmp_path: Path) -> None:
    first = without_first_norm(1)
    write(tmp_path, a=first)
    assert merge(tmp_path, passthrough(("a", 0, 3))).code == 0
    assert_same(written(tmp_path), stacked([(first, 0, 3)]))


def test_a_list_that_tells_what_each_layer_is_goes_along(tmp_path: Path) -> None:
    """Layers of one type hold the same tensors; those of the other type stand in their places."""
    found = model(1)
    for number in (0, 2):
        del found[f"model.layers.{number}.input_layernorm.weight"]
    write(tmp_path, {**LLAMA, "layer_types": ["conv", "full", "conv", "full"]}, a=found)
    assert merge(tmp_path, passthrough(("a", 1, 2), ("a", 3, 4))).code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"] == ["full", "full"]
    assert_same(written(tmp_path), stacked([(found, 1, 2), (found, 3, 4)]))


@pytest.mark.parametrize("parts", [[(0, 3)], [(0, 3), (1, 4)]])
def test_tensors_with_a_part_for_each_layer(parts: list[tuple[int, int]], tmp_path: Path) -> None:
    """Gemma 3n and 4 have an embedding for every layer in one tensor outside: refused, and whole it is as it is."""
    found = {**model(1), "model.embed_tokens_per_layer.weight": torch.zeros(6, 2 * LAYERS)}
    write(tmp_path, a=found)
    ran = merge(tmp_path, passthrough(*(("a", first, end) for first, end in parts)))
    assert ran.code == 3, ran.trace
    assert "embed_tokens_per_layer" in ran.err
    assert merge(tmp_path, passthrough(("a", 0, 2), ("a", 2, 4)), out="whole").code == 0
    assert_same(written(tmp_path, "whole"), found)


# --- what is said of mistakes ---

ONE = {"model": "a", "layer_range": [0, 2]}
MISTAKES: dict[str, tuple[dict[str, Any], list[str], list[str]]] = {
    "a pattern": ({**ONE, "model": "run/checkpoint-*"}, ["slices.0.sources.0.model", "is a pattern"], ["Hub"]),
    "a key of a pattern": (
        {**ONE, "last": 2},
        ["slices.0.sources.0.last", "a pattern under models"],
        ["did you", "none"],
    ),
    "a key at the top": (
        {**ONE, "calibrate": "svc"},
        ["sources.0.calibrate", "stands at the top"],
        ["did you", "none"],
    ),
    "a typo": ({"model": "a", "layer_rang": [0, 2]}, ["did you mean layer_range?"], ["none is named"]),
    "an empty range": ({"model": "a", "layer_range": [2, 2]}, ["sources.0.layer_range", "[0, 16]"], ["none is named"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_source(mistake: str, tmp_path: Path) -> None:
    """One mistake is one message, with the line, and a way out that leads somewhere."""
    source, said, unsaid = MISTAKES[mistake]
    write(tmp_path, a=model(1))
    ran = merge(tmp_path, {"merge_method": "linear", "slices": [{"sources": [source]}]})
    assert ran.code == 2, ran.err + ran.trace
    for words in ("m.yaml: line ", *said):
        assert words in ran.err, ran.err
    for words in unsaid:
        assert words not in ran.err, ran.err
