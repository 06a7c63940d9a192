"""Adapters that are written, loaded by peft onto models of transformers: what these give is what whole models give."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lines_cli as lines

pytestmark = pytest.mark.slow

TOKENS = torch.arange(10)[None]


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """Both libraries warn of themselves."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("peft")
        yield


def llama(**changes: Any) -> Any:
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads, **changes))


def gpt2() -> Any:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, vocab_size=64, n_positions=32)
    )


def bert() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, vocab_size=64))


def t5() -> Any:
    import transformers

    sizes = {"d_model": 32, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "d_kv": 16}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, vocab_size=64, decoder_start_token_id=0)
    )


def vit() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    return transformers.ViTForImageClassification(
        transformers.ViTConfig(**sizes, image_size=16, patch_size=8, num_labels=5)
    )


def mixtral() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 64}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))


def dinov2() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "use_swiglu_ffn": True}
    return transformers.Dinov2ForImageClassification(
        transformers.Dinov2Config(**sizes, image_size=16, patch_size=8, num_labels=5)
    )


def qwen_vl() -> Any:
    import transformers

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 200}
    sizes |= {
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
    }
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 32}
    return transformers.Qwen2_5_VLForConditionalGeneration(
        transformers.Qwen2_5_VLConfig(
            text_config={"hidden_size": 32, "intermediate_size": 48, **sizes}, vision_config={**vision, "patch_size": 4}
        )
    )


def gemma3() -> Any:
    import transformers

    both = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    text = {"num_hidden_layers": 2, "num_key_value_heads": 2, "vocab_size": 200, "head_dim": 16}
    return transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config={**both, **text},
            vision_config={**both, "num_hidden_layers": 3, "image_size": 16, "patch_size": 8},
            image_token_index=5,
            mm_tokens_per_image=4,
        )
    )


def resnet() -> Any:
    import transformers

    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
    return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes))


def given(model: Any) -> dict[str, torch.Tensor]:
    """What the model is run on."""
    kind = model.config.model_type
    if kind in ("vit", "resnet"):
        torch.manual_seed(3)
        return {"pixel_values": torch.randn(1, 3, 32 if kind == "resnet" else 16, 32 if kind == "resnet" else 16)}
    return {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS[:, :5]} if kind == "t5" else {})}


def said(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**given(model)).logits
    return found


def save(model: Any, folder: Path) -> Path:
    """As `save_pretrained` does."""
    model.save_pretrained(folder)
    return folder


RENAMED = ("vit", "mixtral", "dinov2", "qwen2_5_vl", "gemma3", "gpt_oss")


def load(make: Callable[[], Any], folder: Path) -> Any:
    """The model as its file has it."""
    from safetensors.torch import load_file

    torch.manual_seed(0)
    model = make()
    if model.config.model_type in RENAMED:  # whose files have other names, and another layout
        return type(model).from_pretrained(folder)
    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    model.tie_weights()
    return model


def trained(make: Callable[[], Any], base: Path, folder: Path, seed: int, **config: Any) -> Path:
    """An adapter on a base, as peft saves it, both factors random."""
    import peft

    torch.manual_seed(seed)
    model = peft.get_peft_model(load(make, base), peft.LoraConfig(init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return folder


def with_adapter(make: Callable[[], Any], base: Path, adapter: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(load(make, base), adapter)


LORA: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, "layers.1.up_proj": 7},
        "alpha_pattern": {"up_proj": 3},
    },
    "some layers": {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"], "layers_to_transform": [1, 3]},
    "left out": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "exclude_modules": ["layers.1.mlp.down_proj"],
    },
    "embeddings saved": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj"],
        "modules_to_save": ["embed_tokens", "lm_head"],
        "task_type": "CAUSAL_LM",
    },
    "expression": {"r": 3, "lora_alpha": 5, "target_modules": r".*\.[02]\.self_attn\.(q|k)_proj"},
}


@pytest.mark.parametrize("name", LORA)
def test_an_adapter_scaled_in_place_is_the_edit_of_the_whole_model(tmp_path: Path, name: str) -> None:
    """peft's output of the scaled adapter is that of the model that an edit of base and adapter writes."""
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    adapter = trained(llama, base, tmp_path / "adapter", 1, **LORA[name])
    lines.edit_adapter(adapter, tmp_path / "scaled", base=base)
    lines.edit(base, adapter, tmp_path / "dense")
    wanted, found = said(load(llama, tmp_path / "dense")), said(with_adapter(llama, base, tmp_path / "scaled"))
    whole = said(with_adapter(llama, base, adapter))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert float((whole - wanted).abs().max()) > 0.01


def conv_net() -> Any:
    """Layers with an embedding, convolutions, and linear layers with biases."""

    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.conv2 = torch.nn.Conv1d(8, 8, 3, padding=1), torch.nn.Conv2d(1, 4, 3, padding=1)
            self.fc = torch.nn.Linear(8, 8)

        def forward(self, x: Any) -> Any:
            x = x + self.conv1(x.transpose(1, 2)).transpose(1, 2)
            return x + self.fc(x) + self.conv2(x.unsqueeze(1)).mean(1)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(20, 8)
            self.layers = torch.nn.ModuleList([Block() for _ in range(3)])
            self.head = torch.nn.Linear(8, 5)

        def forward(self, ids: Any) -> Any:
            x = self.embed_tokens(ids)
            for block in self.layers:
                x = block(x)
            return self.head(x)

    return Net()


def kinds() -> dict[str, Any]:
    """Configs of all that can be scaled in place."""
    import peft

    every = ["embed_tokens", "conv1", "conv2", "fc", "head"]
    return {
        "lora": peft.LoraConfig(r=3, lora_alpha=5, target_modules=every, init_lora_weights=False),
        "bias": peft.LoraConfig(r=3, lora_alpha=5, target_modules=["fc"], lora_bias=True, init_lora_weights=False),
        "loha": peft.LoHaConfig(r=3, alpha=5, target_modules=["fc", "conv1"], init_weights=False),
        "lokr": peft.LoKrConfig(r=3, alpha=5, target_modules=["fc", "conv2"], init_weights=False),
    }


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(TOKENS)
    return found


def loaded(folder: Path) -> Any:
    from safetensors.torch import load_file

    model = conv_net()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


@pytest.mark.parametrize("kind", ["lora", "bias", "loha", "lokr"])
def test_what_peft_has_beside_plain_lora(tmp_path: Path, kind: str) -> None:
    """Embeddings, convolutions, biases, LoHa and LoKr are scaled in place, and are then the dense edit."""
    import peft
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(conv_net().state_dict(), tmp_path / "base" / "model.safetensors")
    torch.manual_seed(1)
    tuned = peft.get_peft_model(loaded(tmp_path / "base"), kinds()[kind])
    for name, parameter in tuned.named_parameters():
        if name.endswith("lora_B.default.bias"):
            torch.nn.init.normal_(parameter)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lines.edit_adapter(tmp_path / "adapter", tmp_path / "scaled", base=tmp_path / "base", alpha=0.2)
    lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "dense", alpha=0.2)
    scaled = peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "scaled")
    torch.testing.assert_close(output(scaled), output(loaded(tmp_path / "dense")), rtol=1e-4, atol=2e-5)
    assert float((output(tuned) - output(scaled)).abs().max()) > 0.01


@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("kind", ["lora", "bias"])
def test_merges_of_what_peft_has_beside_plain_lora(tmp_path: Path, kind: str, rank: int | None) -> None:
    """Embeddings, convolutions and biases of lora_B are merged as their dense sum; LoHa and LoKr are refused."""
    import peft
    from safetensors.torch import save_file

    torch.manual_seed(0)
    (tmp_path / "base").mkdir()
    save_file(conv_net().state_dict(), tmp_path / "base" / "model.safetensors")
    models = []
    for number in range(2):
        torch.manual_seed(number)
        tuned = peft.get_peft_model(loaded(tmp_path / "base"), kinds()[kind])
        for name, parameter in tuned.named_parameters():
            if name.endswith("lora_B.default.bias"):
                torch.nn.init.normal_(parameter)
        tuned.save_pretrained(tmp_path / f"a{number}", save_embedding_layers=False)
        models.append({"model": str(tmp_path / f"a{number}")})
    recipe = {"models": models, "base_model": str(tmp_path / "base"), "lines": {"alpha": 0.2, "beta": 0.8}}
    summary = lines.merge(recipe, tmp_path / "merged", as_adapter=True, rank=rank)
    merged = output(peft.PeftModel.from_pretrained(loaded(tmp_path / "base"), tmp_path / "merged"))
    assert summary["rank"] == ([6, 6] if rank is None else [4, 4])
    if rank is None:
        lines.merge(recipe, tmp_path / "dense")
        torch.testing.assert_close(merged, output(loaded(tmp_path / "dense")), rtol=1e-4, atol=2e-5)
    else:
        assert 0.3 < summary["kept"] < 1
        lines.edit(tmp_path / "base", tmp_path / "merged", tmp_path / "dense", alpha=1, beta=0)
        torch.testing.assert_close(merged, output(loaded(tmp_path / "dense")), rtol=1e-4, atol=2e-5)
    for other in ("loha", "lokr"):
        tuned = peft.get_peft_model(loaded(tmp_path / "base"), kinds()[other])
        tuned.save_pretrained(tmp_path / other)
        two = {"models": [*models[:1], {"model": str(tmp_path / other)}]}
        with pytest.raises(lines.LinesError, match="more than a product of two matrices"):
            lines.merge(two, tmp_path / "no", as_adapter=True)


def test_dora_is_folded_and_not_scaled(tmp_path: Path) -> None:
    """It is refused by name, with the way out; and that works."""
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    lora = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"], "use_dora": True}
    adapter = trained(llama, base, tmp_path / "adapter", 1, **lora)
    with pytest.raises(lines.LinesError, match="DoRA") as refused:
        lines.edit_adapter(adapter, tmp_path / "no", base=base)
    assert "lines edit BASE" in str(refused.value.hint)
    lines.edit(base, adapter, tmp_path / "folded")


def test_an_adapter_of_transposed_weights(tmp_path: Path) -> None:
    """GPT-2's, with fan_in_fan_out."""
    torch.manual_seed(0)
    base = save(gpt2(), tmp_path / "base")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    adapter = trained(gpt2, base, tmp_path / "adapter", 1, **lora)
    lines.edit_adapter(adapter, tmp_path / "scaled", num_layers=4)
    lines.edit(base, adapter, tmp_path / "dense")
    wanted, found = said(load(gpt2, tmp_path / "dense")), said(with_adapter(gpt2, base, tmp_path / "scaled"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("one", "other"), [("plain", "rslora"), ("patterns", "some layers"), ("plain", "expression")])
def test_merged_adapters_are_the_dense_sum(tmp_path: Path, one: str, other: str) -> None:
    """Through peft, and not what its own `linear` gives."""
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    paths = [trained(llama, base, tmp_path / f"a{n}", n, **LORA[name]) for n, name in enumerate((one, other))]
    weights = [0.6, 0.7]
    models = [{"model": str(p), "parameters": {"weight": w}} for p, w in zip(paths, weights, strict=True)]
    scaling = {"lines": {"alpha": 0.2, "beta": 0.8}, "base_model": str(base)}
    lines.merge({"models": models, **scaling}, tmp_path / "merged", as_adapter=True)
    lines.merge({"models": models, **scaling}, tmp_path / "dense")
    wanted, found = said(load(llama, tmp_path / "dense")), said(with_adapter(llama, base, tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=5e-5)


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (vit, ["q_proj", "fc1"]),
        (mixtral, ["q_proj"]),
        (dinov2, ["q_proj", "gate_proj", "up_proj", "down_proj"]),
        (qwen_vl, ["q_proj", "qkv", "down_proj"]),
        (gemma3, ["q_proj", "fc1"]),
    ],
)
def test_modules_are_those_that_transformers_has(tmp_path: Path, make: Callable[[], Any], targets: Any) -> None:
    """Scaled and merged adapters are of the modules that peft finds, and are the dense edit and merge; so does one of a
    few of these modules adapt no others.
    """
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(0)
    base = save(make(), tmp_path / "base")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": targets}
    paths = [trained(make, base, tmp_path / "a0", 0, **lora)]
    paths.append(
        trained(make, base, tmp_path / "a1", 1, **lora, layers_to_transform=[0], layers_pattern=["layer", "layers"])
    )
    lines.edit_adapter(paths[0], tmp_path / "scaled", base=base, alpha=0.2)
    lines.edit(base, paths[0], tmp_path / "edited", alpha=0.2)
    both = {"base_model": str(base), "models": [{"model": str(p)} for p in paths], "lines": {"alpha": 0.2, "beta": 0.8}}
    lines.merge(both, tmp_path / "merged", as_adapter=True)
    lines.merge(both, tmp_path / "dense")
    lines.merge({**both, "models": both["models"][1:]}, tmp_path / "few", as_adapter=True, rank=2)
    for adapter, whole in (("scaled", "edited"), ("merged", "dense")):
        found = with_adapter(make, base, tmp_path / adapter).merge_and_unload().state_dict()
        for name, wanted in load(make, tmp_path / whole).state_dict().items():
            torch.testing.assert_close(found[name], wanted, rtol=1e-5, atol=1e-6, msg=name)
    for adapter, like in (("scaled", "a0"), ("merged", "a0"), ("few", "a1")):
        adapted, wanted = (
            {
                name
                for name, module in with_adapter(make, base, tmp_path / one).named_modules()
                if isinstance(module, LoraLayer)
            }
            for one in (adapter, like)
        )
        assert adapted == wanted
        assert len(adapted) > 0


def gpt_oss() -> Any:
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 3, "vocab_size": 64, "head_dim": 16}
    return transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_experts_per_tok=2))


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
OF_EXPERTS: dict[str, list[dict[str, Any]]] = {  # what two adapters say
    "the same": [{"target_parameters": EXPERTS}, {"target_parameters": EXPERTS}],
    "other ranks": [
        {"target_parameters": EXPERTS},
        {"target_parameters": EXPERTS, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"gate_up_proj": 3}},
    ],
    "beside layers": [
        {"target_parameters": EXPERTS, "target_modules": ["q_proj"]},
        {"target_parameters": ["experts.down_proj"], "target_modules": ["o_proj", "q_proj"]},
    ],
    "a router": [{"target_parameters": ["gate.weight", *EXPERTS]}, {"target_parameters": ["gate.weight"]}],
}


@pytest.mark.parametrize("known", [True, False], ids=["with a base", "without"])
@pytest.mark.parametrize("name", OF_EXPERTS)
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_merged_adapters_of_experts(tmp_path: Path, make: Callable[[], Any], name: str, known: bool) -> None:
    """Every expert gets the sum of its own products."""
    torch.manual_seed(0)
    before = make()
    base, said = save(before, tmp_path / "base"), OF_EXPERTS[name]
    if name == "a router" and make is gpt_oss:
        pytest.skip("its router is called otherwise")
    models, wanted = [], {name: tensor.double() for name, tensor in before.state_dict().items()}
    for n, weight in enumerate((0.6, -0.7)):
        config = {"r": 4, "lora_alpha": 8, "target_modules": [], **said[n]}
        path = trained(make, base, tmp_path / f"a{n}", n, **config)
        models.append({"model": str(path), "parameters": {"weight": weight}})
        for tensor, after in with_adapter(make, base, path).merge_and_unload().state_dict().items():
            wanted[tensor] = wanted[tensor] + weight * (after.double() - before.state_dict()[tensor].double())
    on = {"base_model": str(base)} if known else {}
    recipe = {"merge_method": "task_arithmetic", "models": models, **on}
    lines.merge(recipe, tmp_path / "merged", as_adapter=True)
    found = with_adapter(make, base, tmp_path / "merged").merge_and_unload().state_dict()
    for tensor, values in wanted.items():
        torch.testing.assert_close(found[tensor].double(), values, rtol=1e-5, atol=2e-6, msg=tensor)
    if known:
        lines.merge(recipe, tmp_path / "dense")
        for tensor, values in load(make, tmp_path / "dense").state_dict().items():
            torch.testing.assert_close(values.double(), wanted[tensor], rtol=1e-5, atol=2e-6, msg=tensor)
    with pytest.raises(lines.LinesError, match="3 matrices in one, the experts'"):
        lines.merge(recipe, tmp_path / "fewer", as_adapter=True, rank=1)


def test_parameters_of_experts_whose_factors_are_called_the_same(tmp_path: Path) -> None:
    """Of two adapters each has one parameter of a module: which wrapper is whose, the names do not say. Refused."""
    torch.manual_seed(0)
    base = save(mixtral(), tmp_path / "base")
    config = {"r": 4, "lora_alpha": 8, "target_modules": []}
    for n, parameters in enumerate((EXPERTS[:1], EXPERTS[1:], EXPERTS)):
        trained(mixtral, base, tmp_path / f"a{n}", n, **config, target_parameters=parameters)
    for one, other, said in ((0, 1, "called the same"), (0, 2, "change different parameters beside it")):
        models = [{"model": str(tmp_path / f"a{n}")} for n in (one, other)]
        with pytest.raises(lines.LinesError, match=said):
            lines.merge({"models": models, "base_model": str(base)}, tmp_path / "no", as_adapter=True)


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize(("one", "other"), [(True, True), (True, False), (False, False)])
def test_products_on_both_of_tied_weights(tmp_path: Path, one: bool, other: bool, rank: int | None) -> None:
    """On the embedding and on the head, kept equal by peft or not: what each module gets is the sum of its products,
    and peft keeps equal what all adapters do.
    """
    from peft.tuners.lora import LoraLayer

    def tied() -> Any:
        return llama(tie_word_embeddings=True)

    torch.manual_seed(0)
    base = save(tied(), tmp_path / "base")
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["embed_tokens", "lm_head", "q_proj"]}
    paths = [
        trained(tied, base, tmp_path / f"a{n}", n, **lora, ensure_weight_tying=by) for n, by in enumerate((one, other))
    ]
    models = [{"model": str(path)} for path in paths]
    lines.merge({"base_model": str(base), "models": models}, tmp_path / "merged", as_adapter=True, rank=rank)
    lines.edit_adapter(paths[0], tmp_path / "scaled", base=base, alpha=0.3, beta=0)
    lines.edit(base, paths[0], tmp_path / "dense", alpha=0.3, beta=0)
    if one:  # else the adapted model has two weights, and no checkpoint of a tied one has them
        wanted = said(with_adapter(tied, base, tmp_path / "scaled"))
        torch.testing.assert_close(said(load(tied, tmp_path / "dense")), wanted, rtol=1e-4, atol=1e-4)

    def products(folder: Path) -> dict[str, torch.Tensor]:
        layers = with_adapter(tied, base, folder).named_modules()
        return {name: one.get_delta_weight("default") for name, one in layers if isinstance(one, LoraLayer)}

    first, second = map(products, paths)
    assert len(first) == 6
    for found, wanted in (
        (products(tmp_path / "merged"), {name: tau + second[name] for name, tau in first.items()}),
        (products(tmp_path / "scaled"), {name: 0.3 * tau for name, tau in first.items()}),
    ):
        assert found.keys() == wanted.keys()
        for name, tau in wanted.items():
            torch.testing.assert_close(found[name], tau, rtol=1e-4, atol=1e-5)


def test_peft_s_own_sum_has_cross_terms(tmp_path: Path) -> None:
    """`add_weighted_adapter` with `linear` is another model than the sum of the updates, which ours is."""
    torch.manual_seed(0)
    base = save(llama(), tmp_path / "base")
    paths = [trained(llama, base, tmp_path / f"a{n}", n, **LORA["plain"]) for n in range(2)]
    models = [{"model": str(path), "parameters": {"weight": 0.5}} for path in paths]
    lines.merge({"models": models}, tmp_path / "merged", as_adapter=True)
    lines.merge({"models": models, "base_model": str(base)}, tmp_path / "dense")
    wanted, ours = said(load(llama, tmp_path / "dense")), said(with_adapter(llama, base, tmp_path / "merged"))
    model = with_adapter(llama, base, paths[0])
    model.load_adapter(paths[1], adapter_name="other")
    model.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both", combination_type="linear")
    model.set_adapter("both")
    theirs = said(model)
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=2e-5)
    assert float((theirs - wanted).abs().max()) > 100 * float((ours - wanted).abs().max())


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "llama, tied": lambda: llama(tie_word_embeddings=True),
    "llama, with biases": lambda: llama(attention_bias=True, mlp_bias=True),
    "gpt2": gpt2,
    "bert": bert,
    "t5": t5,
    "resnet": resnet,
}


def perturbed(make: Callable[[], Any]) -> Any:
    """A fine-tune of all parameters."""
    torch.manual_seed(0)
    model = make()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_an_adapter_of_full_rank_is_the_fine_tune(tmp_path: Path, name: str) -> None:
    """With what is no matrix stored whole, peft gives the fine-tune's output, and adapts exactly these modules."""
    from peft.tuners.lora import LoraLayer

    make = MODELS[name]
    torch.manual_seed(0)
    base = save(make(), tmp_path / "base")
    tuned = perturbed(make)
    ft = save(tuned, tmp_path / "ft")
    summary = lines.extract(ft, base, tmp_path / "adapter", rank=1000, save_rest=True)
    model = with_adapter(make, base, tmp_path / "adapter")
    adapted = {n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    assert adapted == {module["module"] for module in summary["modules"]}
    assert {one["changed"] for one in summary["left_out"] if one["saved"] < one["changed"]} == set()
    torch.testing.assert_close(said(model), said(tuned), rtol=1e-4, atol=2e-5)
    torch.testing.assert_close(said(model.merge_and_unload()), said(tuned), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("name", "make"), [("llama", llama), ("gpt2", gpt2), ("vit", vit), ("mixtral", mixtral)])
def test_an_extracted_adapter_is_what_peft_adapts(tmp_path: Path, name: str, make: Callable[[], Any]) -> None:
    """With a low rank and LiNeS: peft's merged weights are base + c * (the nearest of that rank)."""
    torch.manual_seed(0)
    before = make()
    base = save(before, tmp_path / "base")
    tuned = perturbed(make)
    ft = save(tuned, tmp_path / "ft")
    summary = lines.extract(ft, base, tmp_path / "adapter", rank=4, alpha=0.1)
    whole = with_adapter(make, base, tmp_path / "adapter").merge_and_unload().state_dict()
    theirs, ours = before.state_dict(), tuned.state_dict()
    assert len(summary["modules"]) > 10
    for module in summary["modules"]:
        weight = f"{module['module']}.weight"
        tau = (ours[weight].double() - theirs[weight].double()).flatten(1)
        u, s, vh = torch.linalg.svd(tau, full_matrices=False)
        nearest = (u[:, :4] @ torch.diag(s[:4]) @ vh[:4]).view(ours[weight].shape)
        wanted = theirs[weight].double() + module["coefficient"] * nearest
        torch.testing.assert_close(whole[weight].double(), wanted, rtol=1e-4, atol=1e-5)
    assert {module["coefficient"] for module in summary["modules"]} > {0.1, 1.0}
