"""Adapters that are written: scaled, merged, reduced and extracted, held against whole matrices in float64."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lines_cli as lines
from lines_cli.errors import DataError
from support.adapters import PREFIX, factors, layers_of, updates, write_adapter
from support.files import snapshot, without_staging, write_checkpoint
from support.fp8 import expanded, quantise
from support.layouts import LAYOUTS
from support.run import run_lines

SIZES = {"q_proj": (12, 8), "up_proj": (20, 8)}
LAYERS = 4
LINES = {"alpha": 0.1, "beta": 0.9}


def coefficient(name: str) -> float:
    """Of LINES, in a model of LAYERS layers."""
    parts = name.split(".")
    return 0.1 + 0.9 * int(parts[2]) / (LAYERS - 1) if parts[2:3] and parts[2].isdigit() else 0.1


def base_of(folder: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A model with such layers, and what lies outside them."""
    chance = torch.Generator().manual_seed(9)
    tensors = {
        f"{module}.weight": torch.randn(*size, generator=chance).to(dtype)
        for module, size in layers_of(LAYERS, SIZES).items()
    }
    tensors["model.embed_tokens.weight"] = torch.randn(16, 8, generator=chance).to(dtype)
    tensors["model.norm.weight"] = torch.ones(8, dtype=dtype)
    return write_checkpoint(folder, tensors, config={"model_type": "tiny", "num_hidden_layers": LAYERS})


def close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance * float(tensor.abs().max() + 1))


# --- in place ---


@pytest.mark.parametrize("only", [None, [1, 3]], ids=["all layers", "some"])
@pytest.mark.parametrize("known", ["num_layers", "base", "config", "beside"])
def test_an_adapter_is_scaled_in_place(tmp_path: Path, known: str, only: list[int] | None) -> None:
    """A is as it was, to the bit; B times the coefficient of its layer, whose number counts among the base's."""
    base = base_of(tmp_path / "base")
    modules = layers_of(LAYERS, SIZES, only)
    said = {"base_model_name_or_path": str(base)} if known == "beside" else {}
    adapter = write_adapter(tmp_path / "adapter", factors(modules, 4, 0), **said)
    (adapter / "tokenizer.json").write_text("{}")
    if known == "config":
        (base / "model.safetensors").unlink()
    how: dict[str, Any] = {"num_layers": {"num_layers": LAYERS}, "beside": {}}.get(known, {"base": base})
    summary = lines.edit_adapter(adapter, tmp_path / "out", **how)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if "lora_A" in name:
            assert torch.equal(after[name], tensor)
        else:
            layer = name.removeprefix(PREFIX)
            torch.testing.assert_close(after[name], (tensor.double() * coefficient(layer)).float(), rtol=0, atol=0)
    close(updates(tmp_path / "out"), {name: coefficient(name) * tau for name, tau in updates(adapter).items()})
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (adapter / "adapter_config.json").read_bytes()
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert summary["how"] == "scaled"
    assert summary["stacks"][0]["layers"] == LAYERS
    assert lines.verify(tmp_path / "out").same


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    """The adapter's own, rounded once; or what is asked for."""
    adapter = write_adapter(tmp_path / "adapter", factors(layers_of(LAYERS, SIZES), 4, 0, dtype))
    for asked, stored in ((None, dtype), ("float32", torch.float32)):
        lines.edit_adapter(adapter, tmp_path / "out", num_layers=LAYERS, dtype=asked, force=True)
        before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
        for name, tensor in before.items():
            factor = coefficient(name.removeprefix(PREFIX)) if "lora_B" in name else 1.0
            assert after[name].dtype == stored
            assert torch.equal(after[name], (tensor.double() * factor).float().to(stored))


def test_ranks_and_scales_that_differ(tmp_path: Path) -> None:
    """rank_pattern, alpha_pattern and rsLoRA stay in the config: the factors alone are scaled."""
    modules = layers_of(LAYERS, SIZES)
    ranks = {module: 2 if "q_proj" in module else 5 for module in modules}
    pattern = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.2.q_proj": 3}, "r": 5, "use_rslora": True}
    adapter = write_adapter(tmp_path / "adapter", factors(modules, ranks, 0), **pattern)
    lines.edit_adapter(adapter, tmp_path / "out", num_layers=LAYERS)
    close(updates(tmp_path / "out"), {name: coefficient(name) * tau for name, tau in updates(adapter).items()})


def test_options_of_an_edit(tmp_path: Path) -> None:
    """Filters, stacks, schedules and what lies outside are as in an edit of whole models."""
    modules = layers_of(LAYERS, SIZES) | {"lm_head": (16, 8)}
    adapter = write_adapter(tmp_path / "adapter", factors(modules, 4, 0))
    how = {"schedule": "0.5,1.5", "filter": {"q_proj": "keep"}, "outside": "keep"}
    lines.edit_adapter(adapter, tmp_path / "out", num_layers=LAYERS, **how)  # type: ignore[arg-type]
    wanted = {}
    for name, tau in updates(adapter).items():
        by_layer = 1.0 if "q_proj" in name or "lm_head" in name else 0.5 + int(name.split(".")[2]) / 3
        wanted[name] = by_layer * tau
    close(updates(tmp_path / "out"), wanted)


def test_what_is_stored_whole(tmp_path: Path) -> None:
    """With the base: base + c * (whole - base). Without, only where nothing of it is to be scaled."""
    base = base_of(tmp_path / "base")
    own = factors(layers_of(LAYERS, SIZES), 4, 0)
    own[f"{PREFIX}model.norm.weight"] = torch.full((8,), 3.0)
    adapter = write_adapter(tmp_path / "adapter", own, modules_to_save=["norm"])
    lines.edit_adapter(adapter, tmp_path / "out", base=base)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{PREFIX}model.norm.weight"]
    torch.testing.assert_close(found, torch.full((8,), 1 + 0.1 * 2.0))
    lines.edit_adapter(adapter, tmp_path / "kept", num_layers=LAYERS, filter={"model.norm": "keep"})
    kept = load_file(tmp_path / "kept" / "adapter_model.safetensors")
    assert torch.equal(kept[f"{PREFIX}model.norm.weight"], torch.full((8,), 3.0))
    with pytest.raises(lines.LinesError, match=r"modules_to_save.*\n.*model\.norm\.weight") as refused:
        lines.edit_adapter(adapter, tmp_path / "no", num_layers=LAYERS)
    assert "--base BASE" in str(refused.value.hint)
    assert "lines edit BASE" in str(refused.value.hint)


def test_a_base_s_own_weight_beneath_a_product(tmp_path: Path) -> None:
    """PEFT saves an embedding with its product: it stays as it is, needs no base, and B is scaled."""
    own = factors(layers_of(LAYERS, SIZES) | {"lm_head": (16, 8)}, 4, 0)
    embedding = f"{PREFIX}model.embed_tokens"
    own |= {f"{embedding}.lora_embedding_A": torch.ones(4, 16), f"{embedding}.lora_embedding_B": torch.ones(8, 4)}
    beneath = {f"{embedding}.base_layer.weight": torch.randn(16, 8)}
    beneath[f"{PREFIX}lm_head.base_layer.weight"] = torch.randn(16, 8)
    adapter = write_adapter(tmp_path / "adapter", own | beneath)
    lines.edit_adapter(adapter, tmp_path / "out", num_layers=LAYERS, **LINES)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, tensor in beneath.items():
        assert torch.equal(found[name], tensor)
    torch.testing.assert_close(found[f"{embedding}.lora_embedding_B"], torch.full((8, 4), 0.1))
    head = f"{PREFIX}lm_head.lora_B.weight"
    torch.testing.assert_close(found[head], 0.1 * own[head])


@pytest.mark.slow
@pytest.mark.parametrize("equal", [False, True], ids=["", "kept equal"])
def test_products_on_both_of_tied_weights(tmp_path: Path, equal: bool) -> None:
    """An adapter of the embedding and of the head, which the base has as one weight: both are scaled as that is. Side
    by side with one of the embedding alone, each gets its own.
    """
    base = base_of(tmp_path / "base")
    (base / "config.json").write_text('{"num_hidden_layers": 4, "tie_word_embeddings": true}')
    own = factors({"lm_head": (16, 8)}, 4, 0) | factors(layers_of(LAYERS, SIZES), 4, 1)
    head, embedding = f"{PREFIX}lm_head.", f"{PREFIX}model.embed_tokens."
    own[f"{embedding}lora_embedding_A"] = own[f"{head}lora_B.weight"].T.clone()
    own[f"{embedding}lora_embedding_B"] = own[f"{head}lora_A.weight"].T.clone()
    own |= {
        f"{module}base_layer.weight": load_file(base / "model.safetensors")["model.embed_tokens.weight"]
        for module in (head, embedding)
    }
    said: dict[str, Any] = {"target_modules": ["q_proj", "up_proj", "embed_tokens"], "ensure_weight_tying": True}
    said = said if equal else {"target_modules": ["q_proj", "up_proj", "embed_tokens", "lm_head"]}
    adapter = write_adapter(tmp_path / "adapter", own, **said)
    lines.edit_adapter(adapter, tmp_path / "out", base=base, **LINES)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name in (f"{head}lora_B.weight", f"{embedding}lora_embedding_B"):
        torch.testing.assert_close(found[name], 0.1 * own[name])
    with_others = {name: tensor for name, tensor in own.items() if ".lm_head." not in name}
    other = write_adapter(tmp_path / "other", with_others, target_modules=["q_proj", "up_proj", "embed_tokens"])
    for second, ranks in ((adapter, {"lm_head": 8, "embed_tokens": 8}), (other, {"lm_head": 4, "embed_tokens": 8})):
        models = [{"model": str(adapter)}, {"model": str(second)}]
        lines.merge({"models": models, "base_model": str(base)}, tmp_path / "merged", as_adapter=True, force=True)
        found = load_file(tmp_path / "merged" / "adapter_model.safetensors")
        assert found[f"{head}lora_A.weight"].shape[0] == ranks["lm_head"]
        assert found[f"{embedding}lora_embedding_A"].shape[0] == ranks["embed_tokens"]
        config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
        assert bool(config.get("ensure_weight_tying")) == (equal and second == adapter)
        assert "lm_head" in config["target_modules"] or config.get("ensure_weight_tying")
        assert not any("base_layer" in name for name in found)


def test_a_weight_that_one_holds_whole_and_another_adds_to(tmp_path: Path) -> None:
    """No adapter holds their sum: refused by name."""
    base = base_of(tmp_path / "base")
    added = write_adapter(tmp_path / "a", factors(layers_of(LAYERS, SIZES), 4, 0))
    whole = {f"{PREFIX}model.layers.0.q_proj.weight": torch.ones(12, 8)} | factors(
        layers_of(2, {"up_proj": (20, 8)}), 4, 0
    )
    write_adapter(tmp_path / "b", whole, modules_to_save=["q_proj"])
    models = [{"model": str(added)}, {"model": str(tmp_path / "b")}]
    with pytest.raises(
        lines.LinesError, match=r"b holds model\.layers\.0\.q_proj\.weight whole, and .*a adds a product"
    ):
        lines.merge({"models": models, "base_model": str(base)}, tmp_path / "no", as_adapter=True)


@pytest.mark.slow
def test_modules_that_the_base_stores_as_one(tmp_path: Path) -> None:
    """Dinov2's gate and up: each has its product, also where several are merged; workers change no byte."""
    of = LAYOUTS["dinov2"]
    write_checkpoint(tmp_path / "base", of.together(of.apart(0)), config=of.config)
    modules = {f"encoder.layer.{i}.mlp.{name}_proj": (12, 8) for i in range(3) for name in ("gate", "up")}
    for seed, name in enumerate(("a", "b")):
        write_adapter(tmp_path / name, factors(modules, 4, seed), target_modules=["gate_proj", "up_proj"])
    lines.edit_adapter(tmp_path / "a", tmp_path / "out", base=tmp_path / "base", **LINES)
    by = {f"{name}.weight": 0.1 + 0.45 * int(name.split(".")[2]) for name in modules}
    one, other = (updates(tmp_path / name) for name in ("a", "b"))
    close(updates(tmp_path / "out"), {name: by[name] * tau for name, tau in one.items()})
    models = [{"model": str(tmp_path / name)} for name in ("a", "b")]
    recipe = {"models": models, "base_model": str(tmp_path / "base"), "lines": LINES}
    lines.merge(recipe, tmp_path / "merged", as_adapter=True)
    close(updates(tmp_path / "merged"), {name: by[name] * (tau + other[name]) for name, tau in one.items()})


def test_experts_are_put_side_by_side_one_by_one(tmp_path: Path) -> None:
    """PEFT's layout of factors (`ParamWrapper.get_delta_weight`): A [experts * r, in], B [out, r * experts]."""
    module, products = "model.layers.0.mlp.experts", []
    for seed, rank in ((0, 4), (1, 2)):
        chance = torch.Generator().manual_seed(seed)
        a, b = torch.randn(3 * rank, 8, generator=chance), torch.randn(12, rank * 3, generator=chance)
        own = {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
        said = {"r": rank, "target_parameters": ["mlp.experts.gate_up_proj"], "target_modules": []}
        write_adapter(tmp_path / str(seed), own, **said)
        parts = b.double().view(12, rank, 3), a.double().view(3, rank, 8)
        products.append(8 / rank * torch.einsum("ore,eri->eoi", *parts))
    models = [
        {"model": str(tmp_path / name), "parameters": {"weight": weight}} for name, weight in (("0", 0.3), ("1", 2.0))
    ]
    summary = lines.merge({"models": models}, tmp_path / "out", as_adapter=True)
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    a, b = (found[f"{PREFIX}{module}.lora_{half}.weight"].double() for half in "AB")
    product = torch.einsum("ore,eri->eoi", b.view(12, 6, 3), a.view(3, 6, 8))
    torch.testing.assert_close(product, 0.3 * products[0] + 2 * products[1], rtol=1e-5, atol=1e-5)
    assert summary["rank"] == [6, 6]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert config["target_parameters"] == ["mlp.experts.gate_up_proj"]
    assert lines.verify(tmp_path / "out").same
    with pytest.raises(lines.LinesError, match="3 matrices in one"):
        lines.merge({"models": models}, tmp_path / "no", as_adapter=True, energy=0.9)


@pytest.mark.slow
def test_adapters_of_one_base_that_call_modules_otherwise(tmp_path: Path) -> None:
    """As its files do, and as transformers does in memory: they are the same modules, and the output's are the latter,
    for no model has both.
    """
    of = LAYOUTS["mixtral"]
    write_checkpoint(tmp_path / "base", of.apart(0), config=of.config)
    experts = of.apart(0)["model.layers.0.block_sparse_moe.gate.weight"].shape
    for seed, name in enumerate(("mlp", "block_sparse_moe")):
        only = range(seed, 3)  # of one layer there is but the new name, of another but the old
        modules = {f"model.layers.{i - seed}.{name}.gate": tuple(experts) for i in only}
        write_adapter(tmp_path / name, factors(modules, 4, seed), target_modules=["gate"])
    models = [{"model": str(tmp_path / name)} for name in ("block_sparse_moe", "mlp")]
    lines.merge({"models": models, "base_model": str(tmp_path / "base")}, tmp_path / "out", as_adapter=True)
    old, new = (updates(tmp_path / name) for name in ("block_sparse_moe", "mlp"))
    for name, tau in old.items():
        new[name.replace("block_sparse_moe", "mlp")] += tau
    close(updates(tmp_path / "out"), new)
    lines.merge({"models": models[:1], "base_model": str(tmp_path / "base")}, tmp_path / "one", as_adapter=True, rank=3)
    assert updates(tmp_path / "one").keys() == old.keys()


def test_experts_of_which_a_filter_means_some(tmp_path: Path) -> None:
    """They are one product, and have one coefficient: refused by name."""
    of = LAYOUTS["qwen3_moe"]
    fused = of.together(of.apart(0))["model.layers.0.mlp.experts.down_proj"]
    write_checkpoint(tmp_path / "base", of.apart(0), config={**of.config, "num_hidden_layers": 3})
    experts = f"{PREFIX}model.layers.0.mlp.experts"
    own = {f"{experts}.lora_A.weight": torch.ones(4 * fused.shape[0], fused.shape[2])}
    own[f"{experts}.lora_B.weight"] = torch.ones(fused.shape[1], 4 * fused.shape[0])
    adapter = write_adapter(tmp_path / "a", own, target_parameters=["experts.down_proj"], target_modules=[])
    for pattern, fits in (("experts.", True), ("experts.1.", False)):
        if fits:
            summary = lines.edit_adapter(adapter, tmp_path / "out", base=tmp_path / "base", filter={pattern: 0.3})
            assert [module["coefficient"] for module in summary["modules"]] == [0.3]
        else:
            with pytest.raises(lines.LinesError, match=r"experts is one product.*differ"):
                lines.edit_adapter(adapter, tmp_path / "no", base=tmp_path / "base", filter={pattern: 0.3})


def test_nothing_of_the_base_s_weights_is_read(tmp_path: Path) -> None:
    """Only its header: a base whose data are NaN gives the same."""
    base, adapter = base_of(tmp_path / "base"), write_adapter(tmp_path / "a", factors(layers_of(LAYERS, SIZES), 4, 0))
    one = lines.edit_adapter(adapter, tmp_path / "out", base=base)
    tensors = load_file(base / "model.safetensors")
    save_file({name: torch.full_like(t, torch.nan) for name, t in tensors.items()}, base / "model.safetensors")
    lines.edit_adapter(adapter, tmp_path / "again", base=base)
    assert one["bytes"]["read"] < (adapter / "adapter_model.safetensors").stat().st_size
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("out", "again")]
    assert files[0] == files[1]


# --- merged ---


def two(folder: Path) -> list[Path]:
    """Adapters with other ranks, scales, modules and dtypes."""
    first = write_adapter(folder / "a", factors(layers_of(LAYERS, SIZES), 4, 0))
    some = layers_of(LAYERS, {"q_proj": SIZES["q_proj"]}, [1, 2])
    second = write_adapter(
        folder / "b", factors(some, 3, 1, torch.bfloat16), r=3, lora_alpha=9, target_modules=["q_proj"]
    )
    return [first, second]


MERGES: dict[str, tuple[dict[str, Any], list[float]]] = {
    "task arithmetic": ({"merge_method": "task_arithmetic"}, [0.7, -0.4]),
    "normalized": ({"merge_method": "task_arithmetic", "parameters": {"normalize": True}}, [0.7 / 0.3, -0.4 / 0.3]),
    "linear": ({"merge_method": "linear"}, [0.7 / 0.3, -0.4 / 0.3]),
    "lambda": ({"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}, [0.35, -0.2]),
}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "lines"])
@pytest.mark.parametrize("name", [*MERGES, "average"])
def test_a_merge_is_the_sum_of_the_products(tmp_path: Path, name: str, scaled: bool) -> None:
    """Not the product of sums: the result is the dense sum, with scale 1 and the ranks added up."""
    a, b = two(tmp_path)
    recipe, shares = MERGES.get(name, ({"merge_method": "average"}, [0.5, 0.5]))
    weights: list[dict[str, Any]] = [{"parameters": {"weight": w}} for w in (0.7, -0.4)]
    models = [{"model": str(path), **of_it} for path, of_it in zip((a, b), weights, strict=True)]
    if name == "average":
        models = [{"model": str(path)} for path in (a, b)]
    config = {**recipe, "models": models, "as_adapter": True}
    if scaled:
        config |= {"lines": LINES, "num_layers": LAYERS}
    summary = lines.merge(config, tmp_path / "out")
    taus = [updates(path) for path in (a, b)]
    wanted = {
        key: (coefficient(key) if scaled else 1.0)
        * sum(share * tau[key] for share, tau in zip(shares, taus, strict=True) if key in tau)
        for key in taus[0]
    }
    close(updates(tmp_path / "out"), wanted)  # type: ignore[arg-type]
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"]) == (4, 4)
    assert written["rank_pattern"] == written["alpha_pattern"]
    assert set(written["rank_pattern"].values()) == {7}
    assert summary["rank"] == [4, 7]
    assert lines.verify(tmp_path / "out").same
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_peft_s_linear_is_another(tmp_path: Path) -> None:
    """Factors added up give cross-terms: ours differ from that, and not from the dense sum."""
    modules = layers_of(LAYERS, SIZES)
    a, b = (write_adapter(tmp_path / name, factors(modules, 4, seed)) for seed, name in enumerate("ab"))
    lines.merge({"merge_method": "average", "models": [{"model": str(a)}, {"model": str(b)}], "as_adapter": True},
                tmp_path / "out")  # fmt: skip
    tensors = [load_file(path / "adapter_model.safetensors") for path in (a, b)]
    module = f"{PREFIX}model.layers.0.q_proj"
    down, up = (sum(t[f"{module}.lora_{side}.weight"] for t in tensors) / 2 for side in "AB")
    ours = updates(tmp_path / "out")["model.layers.0.q_proj.weight"]
    assert float((ours - 2 * (up @ down).double()).abs().max()) > 0.5  # type: ignore[attr-defined]
    dense = sum(updates(path)["model.layers.0.q_proj.weight"] for path in (a, b)) / 2
    torch.testing.assert_close(ours, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 5, 6, 100])
def test_fewer_ranks_are_the_nearest(tmp_path: Path, rank: int) -> None:
    """Module by module the truncated decomposition of the dense sum; what is kept is said by layer."""
    a, b = two(tmp_path)
    config = {"models": [{"model": str(a)}, {"model": str(b)}], "as_adapter": True, "rank": rank}
    summary = lines.merge(config, tmp_path / "out")
    taus, found = [updates(path) for path in (a, b)], updates(tmp_path / "out")
    kept = {module["module"]: module["kept"] for module in summary["modules"]}
    for name, first in taus[0].items():
        whole = first + taus[1][name] if name in taus[1] else first
        s = torch.linalg.svdvals(whole)
        k = min(rank, 7 if name in taus[1] else 4)
        error = float((found[name] - whole).square().sum() / whole.square().sum())
        assert error == pytest.approx(float(s[k:].square().sum() / s.square().sum()), abs=1e-6)
        share = kept[name.removesuffix(".weight")]
        assert share is None or share == pytest.approx(1 - error, abs=1e-5)
    assert summary["rank"][1] == min(rank, 7)
    ranks = [module["rank"] for module in summary["modules"]]
    assert len(ranks) == len(taus[0])
    for layer in summary["layers"]:
        names = [name for name in taus[0] if f".{layer['index']}." in name]
        sums = [taus[0][name] + taus[1].get(name, 0.0) for name in names]
        spectra = [torch.linalg.svdvals(whole).square() for whole in sums]
        reduced = [s for s, name in zip(spectra, names, strict=True) if kept[name.removesuffix(".weight")] is not None]
        share = sum(float(s[:rank].sum()) for s in reduced) / sum(float(s.sum()) for s in reduced) if reduced else None
        assert layer["kept"] == (None if share is None else pytest.approx(share))
    assert len(summary["layers"]) == LAYERS


def test_energy_says_the_ranks(tmp_path: Path) -> None:
    """The smallest that keep the share, each module its own."""
    a, b = two(tmp_path)
    config = {"models": [{"model": str(a)}, {"model": str(b)}], "as_adapter": True, "energy": 0.8}
    summary = lines.merge(config, tmp_path / "out")
    taus = [updates(path) for path in (a, b)]
    for module in summary["modules"]:
        name = f"{module['module']}.weight"
        s = torch.linalg.svdvals(taus[0][name] + taus[1].get(name, 0.0)).square()
        shares = s.cumsum(0) / s.sum()
        assert module["rank"] == int((shares < 0.8).sum()) + 1
        assert module["kept"] == pytest.approx(float(shares[module["rank"] - 1]))
    assert lines.verify(tmp_path / "out").same


def test_one_adapter_of_fewer_ranks(tmp_path: Path) -> None:
    """A merge of one is that one; with a rank, the nearest to it."""
    a, _ = two(tmp_path)
    lines.merge({"models": [{"model": str(a)}]}, tmp_path / "same", as_adapter=True)
    close(updates(tmp_path / "same"), updates(a))
    lines.merge({"models": [{"model": str(a)}]}, tmp_path / "out", as_adapter=True, rank=2)
    for name, tau in updates(a).items():
        s = torch.linalg.svdvals(tau)
        error = float((updates(tmp_path / "out")[name] - tau).square().sum())
        assert error == pytest.approx(float(s[2:].square().sum()), rel=1e-4)


def test_whole_tensors_are_merged_where_they_can_be(tmp_path: Path) -> None:
    """With shares of 1 in all, as they are; else towards the base."""
    base = base_of(tmp_path / "base")
    adapters = []
    for number, name in enumerate("ab"):
        own = factors(layers_of(LAYERS, SIZES), 2, number)
        own[f"{PREFIX}model.norm.weight"] = torch.full((8,), 2.0 + number)
        adapters.append({"model": str(write_adapter(tmp_path / name, own, r=2, modules_to_save=["norm"]))})
    lines.merge({"merge_method": "average", "models": adapters}, tmp_path / "mean", as_adapter=True)
    norm = f"{PREFIX}model.norm.weight"
    assert torch.equal(load_file(tmp_path / "mean" / "adapter_model.safetensors")[norm], torch.full((8,), 2.5))
    with pytest.raises(lines.LinesError, match="modules_to_save"):
        lines.merge({"models": adapters}, tmp_path / "no", as_adapter=True)
    lines.merge({"models": adapters, "base_model": str(base)}, tmp_path / "sum", as_adapter=True)
    assert torch.equal(load_file(tmp_path / "sum" / "adapter_model.safetensors")[norm], torch.full((8,), 4.0))
    written = json.loads((tmp_path / "sum" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == ["norm"]


def test_alpha_auto_is_known_for_a_plain_sum_alone(tmp_path: Path) -> None:
    """1/N; else it would have to be measured on whole tensors."""
    models = [{"model": str(path)} for path in two(tmp_path)]
    config = {"models": models, "as_adapter": True, "num_layers": LAYERS, "lines": {"alpha": "auto", "beta": 0.3}}
    assert lines.merge(config, dry_run=True)["stacks"][0]["coefficients"] == pytest.approx([0.5, 0.6, 0.7, 0.8])
    with pytest.raises(lines.LinesError, match="measured on whole tensors"):
        lines.merge({**config, "merge_method": "average"}, dry_run=True)


# --- extracted ---


def fine_tuned(folder: Path, base: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """A full fine-tune: every tensor changes, one matrix does not."""
    chance = torch.Generator().manual_seed(4)
    tensors = load_file(base / "model.safetensors")
    for name, tensor in tensors.items():
        if name != "model.layers.1.q_proj.weight":
            tensors[name] = (tensor.double() + 0.1 * torch.randn(tensor.shape, generator=chance)).to(dtype)
    config = json.loads((base / "config.json").read_text())
    return write_checkpoint(folder, tensors, config=config)


def truncated(tau: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(tau, full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def differences(base: Path, ft: Path) -> dict[str, torch.Tensor]:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, ft))
    return {name: after[name].double() - before[name].double() for name in before}


@pytest.mark.parametrize("scaled", [False, True], ids=["", "lines"])
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_an_extracted_adapter_is_the_nearest(tmp_path: Path, rank: int, scaled: bool) -> None:
    """Of every matrix; an update that is none is left out, and so is what is no matrix, with its share."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    how = LINES if scaled else {}
    summary = lines.extract(ft, base, tmp_path / "out", rank=rank, **how)
    taus, found = differences(base, ft), updates(tmp_path / "out")
    wanted = {
        f"{module}.weight": truncated(taus[f"{module}.weight"], min(rank, 8))
        for module in layers_of(LAYERS, SIZES)
        if module != "model.layers.1.q_proj"
    }
    close(found, {name: (coefficient(name) if scaled else 1.0) * tau for name, tau in wanted.items()}, 2e-6)
    for module in summary["modules"]:
        name = f"{module['module']}.weight"
        share = wanted[name].square().sum() / taus[name].square().sum()
        assert module["kept"] == pytest.approx(float(share))
    total = sum(float(tau.square().sum()) for tau in taus.values())
    left = {one["why"]: one for one in summary["left_out"]}
    of_table = float(taus["model.embed_tokens.weight"].square().sum()) / total
    assert left["embeddings"]["share"] == pytest.approx(of_table)
    assert sum(one["saved"] for one in summary["left_out"]) == 0
    assert lines.verify(tmp_path / "out").same
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    norms = [torch.linalg.vector_norm(stored[f"{PREFIX}model.layers.0.q_proj.lora_{side}.weight"].double(), dim=dim)
             for side, dim in (("A", 1), ("B", 0))]  # fmt: skip
    torch.testing.assert_close(norms[0] * (0.1 if scaled else 1.0), norms[1], rtol=1e-5, atol=1e-5)


def test_of_full_rank_it_is_the_fine_tune(tmp_path: Path) -> None:
    """With what is no matrix stored whole, base and adapter together are the fine-tune, to rounding."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    summary = lines.extract(ft, base, tmp_path / "out", rank=8, save_rest=True)
    assert summary["kept"] == pytest.approx(1)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, ft))
    stored, taus = load_file(tmp_path / "out" / "adapter_model.safetensors"), updates(tmp_path / "out")
    for name, tensor in after.items():
        if f"{PREFIX}{name}" in stored:
            assert torch.equal(stored[f"{PREFIX}{name}"], tensor)
        elif name in taus:
            torch.testing.assert_close(before[name].double() + taus[name], tensor.double(), rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(before[name], tensor)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"model.embed_tokens", "model.norm"}
    assert config["target_modules"] == sorted(taus and [n.removesuffix(".weight") for n in taus])


def test_lines_of_what_is_stored_whole(tmp_path: Path) -> None:
    """base + c * (fine-tune - base)."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    lines.extract(ft, base, tmp_path / "out", rank=2, save_rest=True, alpha=0.25)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")[f"{PREFIX}model.norm.weight"]
    before = load_file(base / "model.safetensors")["model.norm.weight"].double()
    torch.testing.assert_close(stored.double(), before + 0.25 * differences(base, ft)["model.norm.weight"])


@pytest.mark.parametrize("base_too", [True, False], ids=["both older", "the base newer"])
@pytest.mark.parametrize("model", ["dinov2", "mixtral", "qwen3_moe"])
def test_modules_are_called_and_cut_as_transformers_has_them(tmp_path: Path, model: str, base_too: bool) -> None:
    """Names that transformers changes on loading, and matrices that it cuts or puts together: the adapter is of its
    modules, for these are what PEFT finds. Fused experts are left out.
    """
    of = LAYOUTS[model]
    if model == "dinov2":
        files = [of.together(of.apart(seed)) for seed in (0, 1)]
        modules = [of.apart(seed) for seed in (0, 1)]
    else:
        files = [of.apart(seed) for seed in (0, 1)]
        modules = [of.together(tensors) for tensors in files]
    write_checkpoint(tmp_path / "base", files[0] if base_too else modules[0], config=of.config)
    write_checkpoint(tmp_path / "ft", files[1], config=of.config)
    summary = lines.extract(tmp_path / "ft", tmp_path / "base", tmp_path / "out", rank=50)
    taus = {name: (modules[1][name] - modules[0][name]).double() for name in modules[0]}
    matrices = {
        name: tau
        for name, tau in taus.items()
        if name.endswith(".weight") and tau.dim() == 2 and not re.search(r"embed|gate\.weight", name)
    }
    assert len(matrices) > 2
    close(updates(tmp_path / "out"), matrices, 1e-5)
    assert any("transformers' modules" in note for note in summary["notes"])
    assert any("fused experts" in one["why"] for one in summary["left_out"]) == (model != "dinov2")
    assert lines.verify(tmp_path / "out").same


def test_what_no_config_says_is_called_as_in_the_files(tmp_path: Path) -> None:
    """And a note says what that means."""
    of = LAYOUTS["mixtral"]
    for seed, side in enumerate(("base", "ft")):
        write_checkpoint(tmp_path / side, of.apart(seed), config=None)
    summary = lines.extract(tmp_path / "ft", tmp_path / "base", tmp_path / "out", rank=2)
    assert any("model_type" in note and "does not find them" in note for note in summary["notes"])
    assert "model.layers.0.block_sparse_moe.experts.0.w1" in {one["module"] for one in summary["modules"]}


def test_what_cannot_be_cut_here_is_left_out(tmp_path: Path) -> None:
    """A matrix that transformers cuts into sizes that only its code has: said by name, not written as no module."""
    names = ("att_proj", "attn_out.weight")
    shapes = {f"model.layers.{i}.self_attn.{name}": (12, 8) for i in range(2) for name in names}
    for side in ("base", "ft"):
        write_checkpoint(
            tmp_path / side,
            {name: torch.randn(shape) for name, shape in shapes.items()},
            config={"model_type": "molmo2_text", "architectures": ["Molmo2TextModel"]},
        )
    summary = lines.extract(tmp_path / "ft", tmp_path / "base", tmp_path / "out", rank=2, save_rest=True)
    assert {one["module"] for one in summary["modules"]} == {f"model.layers.{i}.self_attn.o_proj" for i in range(2)}
    (left,) = summary["left_out"]
    assert (left["why"], left["changed"], left["saved"]) == (
        "tensors that transformers' modules hold in another layout",
        2,
        0,
    )


@pytest.mark.parametrize("energy", [0.3, 0.95, 1.0])
def test_energy_of_an_extraction(tmp_path: Path, energy: float) -> None:
    """Each matrix has the smallest rank that keeps its share."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    summary = lines.extract(ft, base, tmp_path / "out", energy=energy)
    taus = differences(base, ft)
    for module in summary["modules"]:
        s = torch.linalg.svdvals(taus[f"{module['module']}.weight"]).square()
        shares = s.cumsum(0) / s.sum()
        wanted = len(s) if energy == 1 else int((shares < energy).sum()) + 1
        assert module["rank"] == wanted
        assert module["kept"] >= energy - 1e-12
    assert lines.verify(tmp_path / "out").same
    ranks = {module["rank"] for module in summary["modules"]}
    assert (summary["rank"][0], summary["rank"][1]) == (min(ranks), max(ranks))


def test_weights_that_are_stored_the_other_way(tmp_path: Path) -> None:
    """[in, out], as in GPT-2, told by the biases; a square one as the others. A and B are as for any layer."""
    chance = torch.Generator().manual_seed(2)
    shapes = {"attn.c_attn": (6, 18), "attn.c_proj": (6, 6), "mlp.c_fc": (6, 24), "mlp.c_proj": (24, 6)}
    sides = []
    for side in ("base", "ft"):
        tensors = {}
        for layer in range(2):
            for module, (fan_in, fan_out) in shapes.items():
                tensors[f"h.{layer}.{module}.weight"] = torch.randn(fan_in, fan_out, generator=chance)
                tensors[f"h.{layer}.{module}.bias"] = torch.zeros(fan_out)
        sides.append(write_checkpoint(tmp_path / side, tensors, config={"model_type": "gpt2", "n_layer": 2}))
    lines.extract(sides[1], sides[0], tmp_path / "out", rank=3)
    found, taus = updates(tmp_path / "out"), differences(*sides)
    for module in shapes:
        name = f"h.1.{module}.weight"
        torch.testing.assert_close(found[name].T, truncated(taus[name], 3), rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["fan_in_fan_out"] is True


def test_convolutions_are_matrices(tmp_path: Path) -> None:
    """A has the kernel, B is 1 by 1; depthwise ones are left out."""
    chance = torch.Generator().manual_seed(2)
    names = {"conv.weight": (5, 3, 2, 2), "conv1.weight": (4, 6, 3), "dw.weight": (7, 1, 3, 3)}
    sides = [
        write_checkpoint(
            tmp_path / side,
            {f"layers.{i}.{n}": torch.randn(*s, generator=chance) for i in range(2) for n, s in names.items()},
        )
        for side in ("base", "ft")
    ]
    summary = lines.extract(sides[1], sides[0], tmp_path / "out", rank=2)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert stored[f"{PREFIX}layers.0.conv.lora_A.weight"].shape == (2, 3, 2, 2)
    assert stored[f"{PREFIX}layers.0.conv.lora_B.weight"].shape == (5, 2, 1, 1)
    assert stored[f"{PREFIX}layers.0.conv1.lora_A.weight"].shape == (2, 6, 3)
    found, taus = updates(tmp_path / "out"), differences(*sides)
    assert found.keys() == {f"layers.{i}.{name}" for i in range(2) for name in ("conv.weight", "conv1.weight")}
    for name, tau in found.items():
        flat = truncated(taus[name].flatten(1), 2).view(taus[name].shape)
        torch.testing.assert_close(tau, flat, rtol=1e-5, atol=1e-5)
    assert [one["why"] for one in summary["left_out"]] == ["depthwise convolutions"]


def test_experts_routers_and_what_is_no_weight(tmp_path: Path) -> None:
    """Are left out, each said by its kind."""
    shapes = {
        "model.layers.0.mlp.experts.gate_up_proj": (3, 4, 6),
        "model.layers.0.mlp.gate.weight": (3, 4),
        "model.layers.0.q_proj.weight": (4, 4),
        "model.layers.0.sinks": (4,),
        "model.layers.1.q_proj.weight": (4, 4),
        "model.cls": (1, 4),
    }
    chance = torch.Generator().manual_seed(0)
    sides = [
        write_checkpoint(tmp_path / s, {n: torch.randn(*shape, generator=chance) for n, shape in shapes.items()})
        for s in ("base", "ft")
    ]
    summary = lines.extract(sides[1], sides[0], tmp_path / "out", rank=2, save_rest=True)
    assert {one["why"]: (one["tensors"], one["saved"]) for one in summary["left_out"]} == {
        "tensors of fused experts": (1, 0),
        "routers of experts": (1, 1),
        "vectors (norms and the like)": (1, 0),
        "parameters that are no layer's weight": (1, 0),
    }
    assert [module["module"] for module in summary["modules"]] == ["model.layers.0.q_proj", "model.layers.1.q_proj"]


def test_tensors_that_only_one_side_has(tmp_path: Path) -> None:
    """A new head is no update: left out, or stored whole. A table that grew is neither."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    tensors = load_file(ft / "model.safetensors")
    tensors["score.weight"] = torch.ones(3, 8)
    tensors["model.embed_tokens.weight"] = torch.cat([tensors["model.embed_tokens.weight"], torch.ones(2, 8)])
    save_file(tensors, ft / "model.safetensors")
    summary = lines.extract(ft, base, tmp_path / "out", rank=2, save_rest=True)
    assert {one["why"]: (one["tensors"], one["saved"]) for one in summary["left_out"]} == {
        "tensors that have another shape than the base's": (1, 1),
        "tensors that the base lacks": (1, 1),
        "vectors (norms and the like)": (1, 1),
    }
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert torch.equal(stored[f"{PREFIX}score.weight"], torch.ones(3, 8))


def test_nan_has_no_nearest_matrix(tmp_path: Path) -> None:
    """It is refused by name, and nothing is written."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    tensors = load_file(ft / "model.safetensors")
    tensors["model.layers.2.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, ft / "model.safetensors")
    for how in ({"rank": 2}, {"energy": 0.5}):
        with pytest.raises(DataError, match=r"model\.layers\.2\.up_proj\.weight holds NaN"):
            lines.extract(ft, base, tmp_path / "out", **how)  # type: ignore[arg-type]
    assert not without_staging(snapshot(tmp_path)).keys() & {"out"}


# --- the same bytes ---


@pytest.mark.slow
@pytest.mark.parametrize("what", ["scaled", "merged", "reduced", "extracted"])
def test_workers_and_resuming_change_no_byte(tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One worker or three; and a run that goes on from what another has finished."""
    from lines_cli.engine import adapter_write

    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    models = [{"model": str(path)} for path in two(tmp_path)]

    def make(out: Path, **how: Any) -> None:
        if what == "scaled":
            lines.edit_adapter(tmp_path / "a", out, num_layers=LAYERS, **how)
        elif what == "extracted":
            lines.extract(ft, base, out, energy=0.9, save_rest=True, **how)
        else:
            lines.merge(
                {"models": models, "as_adapter": True, **({"rank": 2} if what == "reduced" else {})}, out, **how
            )

    make(tmp_path / "one", workers=1)
    wanted = (tmp_path / "one" / "adapter_model.safetensors").read_bytes()
    make(tmp_path / "three", workers=3)
    assert (tmp_path / "three" / "adapter_model.safetensors").read_bytes() == wanted
    own = adapter_write.AdapterWrite.take

    def stop(self: Any, done: Any, journal: Any) -> int:
        own(self, done, journal)
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_write.AdapterWrite, "take", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    make(tmp_path / "out", resume=True)
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == wanted
    again = (
        lines.edit_adapter(tmp_path / "a", tmp_path / "out", num_layers=LAYERS, resume=True) if what == "scaled" else {}
    )
    assert again.get("done_before", True)


@pytest.mark.slow
def test_a_finished_extraction_is_known(tmp_path: Path) -> None:
    """Before anything is measured: the ranks are no part of what tells a run from another. Another config is."""
    base = base_of(tmp_path / "base")
    ft = fine_tuned(tmp_path / "ft", base)
    lines.extract(ft, base, tmp_path / "out", energy=0.9)
    assert lines.extract(ft, base, tmp_path / "out", energy=0.9, resume=True)["done_before"]
    a, _ = two(tmp_path)
    merge = {"models": [{"model": str(a)}], "as_adapter": True, "rank": 2}
    lines.merge(merge, tmp_path / "merged")
    assert lines.merge(merge, tmp_path / "merged", resume=True)["done_before"]
    config = json.loads((a / "adapter_config.json").read_text())
    (a / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
    assert not lines.merge(merge, tmp_path / "merged", resume=True, force=True)["done_before"]


def test_an_adapter_that_was_changed_is_found(tmp_path: Path) -> None:
    """`verify` computes it again, and names the tensor."""
    a, b = two(tmp_path)
    lines.merge({"models": [{"model": str(a)}, {"model": str(b)}], "as_adapter": True, "rank": 2}, tmp_path / "out")
    path = tmp_path / "out" / "adapter_model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)
    found = lines.verify(tmp_path / "out")
    assert not found.same
    assert found.files[0].difference is not None
    assert str(found.files[0].difference.tensor).endswith("lora_B.weight")


@pytest.mark.slow
def test_a_lone_file_with_kohya_s_names(tmp_path: Path) -> None:
    """Scaled into one file with the same names and alphas, or into a folder: then its edit is the original's."""
    modules = [f"text_model.encoder.layers.{i}.{module}" for i in range(3) for module in ("mlp.fc1", "mlp.fc2")]
    chance = torch.Generator().manual_seed(0)
    base = write_checkpoint(
        tmp_path / "base",
        {f"{module}.weight": torch.randn(6, 6, generator=chance) for module in modules},
        config={"num_hidden_layers": 3},
    )
    own = {}
    for module in modules:
        flat = f"lora_te_{module.replace('.', '_')}"
        own[f"{flat}.lora_down.weight"] = torch.randn(2, 6, generator=chance)
        own[f"{flat}.lora_up.weight"] = torch.randn(6, 2, generator=chance)
        own[f"{flat}.alpha"] = torch.tensor(1.5)
    save_file(own, tmp_path / "lora.safetensors", metadata={"ss_network_dim": "2"})
    lines.edit(base, tmp_path / "lora.safetensors", tmp_path / "dense")
    wanted = load_file(tmp_path / "dense" / "model.safetensors")
    for out in ("scaled.safetensors", "scaled"):
        lines.edit_adapter(tmp_path / "lora.safetensors", tmp_path / out, base=base)
        file = tmp_path / out if out.endswith("s") else tmp_path / out / "lora.safetensors"
        stored = load_file(file)
        assert stored.keys() == own.keys()
        assert all(torch.equal(stored[name], own[name]) for name in own if "lora_up" not in name)
        lines.edit(base, file, tmp_path / "again", alpha=1, beta=0, force=True)
        close(load_file(tmp_path / "again" / "model.safetensors"), wanted)
    assert lines.verify(tmp_path / "scaled").same
    assert not (tmp_path / "scaled" / "adapter_config.json").exists()


KOHYA = {"lora_te1": (6, 6), "lora_te2": (6, 6)} | {
    f"lora_unet_down_blocks_{i}_attentions_0_{name}": shape
    for i in range(3)
    for name, shape in {"proj_in": (8, 4, 3, 3), "to_q": (8, 8)}.items()
}
"""Modules of the parts of a pipeline, of which two text encoders have the same; and the shapes of their weights."""


def of_kohya(
    path: Path, seed: int, *, rank: int = 2, alpha: float | None = 3.0, only: str = ""
) -> dict[str, torch.Tensor]:
    """A file with kohya's names; and its updates."""
    chance, own, taus = torch.Generator().manual_seed(seed), dict[str, torch.Tensor](), dict[str, torch.Tensor]()
    for name, shape in KOHYA.items():
        if only not in name:
            continue
        module = name if "unet" in name else f"{name}_text_model_encoder_layers_{seed % 2}_mlp_fc1"
        down = torch.randn(rank, *shape[1:], generator=chance)
        up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=chance)
        own |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        own |= {f"{module}.alpha": torch.tensor(alpha)} if alpha is not None else {}
        tau = (up.double().flatten(1) @ down.double().flatten(1)).view(shape)
        taus[module] = tau * (1 if alpha is None else alpha / rank)
        if "to_q" in name:
            own[f"{module}.diff_b"] = torch.randn(8, generator=chance)
            taus[f"{module} bias"] = own[f"{module}.diff_b"].double()
    save_file(own, path, metadata={"ss_network_dim": str(rank), "ss_network_alpha": str(alpha)})
    return taus


def updates_of_kohya(path: Path) -> dict[str, torch.Tensor]:
    """What such a file changes, as kohya's scripts and ComfyUI take it: without an alpha the product is not scaled."""
    stored, taus = load_file(path), dict[str, torch.Tensor]()
    for name, down in stored.items():
        module = name.partition(".")[0]
        if name.endswith(".diff_b"):
            taus[f"{module} bias"] = down.double()
        if name.endswith(".lora_down.weight"):
            up = stored[f"{module}.lora_up.weight"]
            tau = (up.double().flatten(1) @ down.double().flatten(1)).view(up.shape[0], *down.shape[1:])
            scale = float(stored[f"{module}.alpha"]) / down.shape[0] if f"{module}.alpha" in stored else 1.0
            taus[module] = tau * scale
    return taus


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
@pytest.mark.parametrize("name", [*MERGES, "average"])
def test_lone_files_are_merged_into_one(tmp_path: Path, name: str, out: str) -> None:
    """Without a base and without a config: the sum of the products, in one file with the same names."""
    one = of_kohya(tmp_path / "a.safetensors", 0)
    other = of_kohya(tmp_path / "b.safetensors", 1, rank=3, alpha=None)
    recipe, shares = MERGES.get(name, ({"merge_method": "average"}, [0.5, 0.5]))
    weights = ({}, {}) if name == "average" else ({"parameters": {"weight": 0.7}}, {"parameters": {"weight": -0.4}})
    models = [{"model": str(tmp_path / f"{x}.safetensors"), **of} for x, of in zip("ab", weights, strict=True)]
    summary = lines.merge({**recipe, "models": models}, tmp_path / out, as_adapter=True)
    wanted = {module: shares[0] * tau for module, tau in one.items()}
    for module, tau in other.items():
        wanted[module] = wanted.get(module, 0) + shares[1] * tau
    file = tmp_path / out if out.endswith("s") else tmp_path / out / "a.safetensors"
    close(updates_of_kohya(file), wanted)
    assert summary["rank"] == [2, 5]
    assert not (tmp_path / out / "adapter_config.json").exists()
    assert lines.verify(tmp_path / out).same if out == "out" else True
    with pytest.raises(lines.LinesError, match="ties with these parameters is no weighted sum"):
        lines.merge(
            {"merge_method": "ties", "models": models, "parameters": {"density": 0.5}}, tmp_path / "no", as_adapter=True
        )
    with pytest.raises(lines.LinesError) as refused:
        lines.edit(tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "no.safetensors")
    assert "--as-adapter" in str(refused.value.hint)


@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 1.0}, {"rank": 50}])
def test_lone_files_are_merged_into_one_of_fewer_ranks(tmp_path: Path, how: dict[str, Any]) -> None:
    """Every module gets the nearest matrix of that rank; those of two text encoders are two."""
    taus = [of_kohya(tmp_path / f"{name}.safetensors", seed) for seed, name in ((0, "a"), (2, "b"))]
    models = [{"model": str(tmp_path / f"{name}.safetensors")} for name in "ab"]
    lines.merge({"models": models}, tmp_path / "out.safetensors", as_adapter=True, **how)
    found = updates_of_kohya(tmp_path / "out.safetensors")
    sums = {name: tau + taus[1][name] for name, tau in taus[0].items()}
    rank = how.get("rank", 50)
    wanted = {n: truncated(s.flatten(1), rank).view(s.shape) if s.dim() > 1 else s for n, s in sums.items()}
    close(found, wanted, 1e-5)


def test_lone_files_over_depth(tmp_path: Path) -> None:
    """Underscores are read as dots, as far as numbers tell, where the number of layers is said; the base's names say it
    else.
    """
    modules = [f"text_model.encoder.layers.{i}.mlp.fc1" for i in (0, 2)]
    own = {}
    for module in modules:
        flat = f"lora_te_{module.replace('.', '_')}"
        own |= {f"{flat}.lora_down.weight": torch.randn(2, 6), f"{flat}.lora_up.weight": torch.randn(6, 2)}
    save_file(own, tmp_path / "a.safetensors")
    write_checkpoint(
        tmp_path / "base", {f"text_model.encoder.layers.{i}.mlp.fc1.weight": torch.randn(6, 6) for i in range(5)}
    )
    for known in ({"num_layers": 5}, {"base": tmp_path / "base"}):
        lines.edit_adapter(tmp_path / "a.safetensors", tmp_path / "out.safetensors", force=True, **known, **LINES)
        found = load_file(tmp_path / "out.safetensors")
        for i in (0, 2):
            name = f"lora_te_text_model_encoder_layers_{i}_mlp_fc1.lora_up.weight"
            torch.testing.assert_close(found[name], (0.1 + 0.9 * i / 4) * own[name])


def test_a_stack_of_one_layer_is_told(tmp_path: Path) -> None:
    """Of two stacks one has one layer: its rank and what is kept stand in the summary."""
    shapes = {"encoder.layers.0.fc": (8, 8), "encoder.layers.1.fc": (8, 8), "decoder.layers.0.fc": (8, 8)}
    write_checkpoint(tmp_path / "base", {f"{name}.weight": torch.randn(*shape) for name, shape in shapes.items()})
    write_adapter(tmp_path / "adapter", factors(shapes, 4, 0))
    said = {"base_model": str(tmp_path / "base"), "models": [{"model": str(tmp_path / "adapter")}], "lines": LINES}
    (tmp_path / "merge.yaml").write_text(json.dumps({**said, "rank": 2}))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "--as-adapter", "-o", tmp_path / "out")
    assert ran.code == 0
    assert re.search(r"rank +0: 2 +\(decoder\.layers\)", ran.out)


def test_adapters_of_several_forms(tmp_path: Path) -> None:
    """One output has one form: PEFT's beside kohya's, and two names of one block, are refused; either is named."""
    of_kohya(tmp_path / "a.safetensors", 0)
    peft = write_adapter(tmp_path / "peft", factors(layers_of(2, SIZES), 4, 0))
    of_original = {"lora_unet_input_blocks_1_1_to_q.lora_down.weight": torch.ones(2, 8)}
    of_original |= {"lora_unet_input_blocks_1_1_to_q.lora_up.weight": torch.ones(8, 2)}
    save_file(of_original, tmp_path / "b.safetensors")
    diffusers = {
        "text_encoder.layers.1.fc.lora_A.weight": torch.ones(2, 8),
        "text_encoder.layers.1.fc.lora_B.weight": torch.ones(8, 2),
    }
    save_file(diffusers, tmp_path / "c.safetensors")
    for other, said in (
        (peft, "a config, as PEFT writes it"),
        (tmp_path / "b.safetensors", "diffusers names of blocks, and .*b.safetensors the original names of blocks"),
        (tmp_path / "c.safetensors", "factors called lora_down, .*c.safetensors no config, factors called lora_A"),
    ):
        models = [{"model": str(path)} for path in (tmp_path / "a.safetensors", other)]
        with pytest.raises(lines.LinesError, match=said) as refused:
            lines.merge({"models": models}, tmp_path / "no", as_adapter=True)
        assert "one form" in str(refused.value.hint)


@pytest.mark.parametrize(
    "name", ["my_lora.safetensors", "adapter_model.safetensors", "pytorch_lora_weights.safetensors"]
)
def test_a_folder_with_a_lone_file(tmp_path: Path, name: str) -> None:
    """It is read for what it is; what comes of it has the same names, no config, and the file's own name."""
    (tmp_path / "folder").mkdir()
    taus = of_kohya(tmp_path / "folder" / name, 0)
    summary = lines.edit_adapter(tmp_path / "folder", tmp_path / "out", alpha=0.5, beta=0)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {name, "lines_recipe.yaml", "README.md"}
    close(updates_of_kohya(tmp_path / "out" / name), {module: 0.5 * tau for module, tau in taus.items()})
    assert "peft" not in (tmp_path / "out" / "README.md").read_text().lower()
    assert len(summary["modules"]) == len(KOHYA)
    assert lines.verify(tmp_path / "out").same
    lines.edit_adapter(tmp_path / "out", tmp_path / "again", alpha=2, beta=0)
    close(updates_of_kohya(tmp_path / "again" / name), taus)


def test_a_base_in_fp8_and_a_pickled_fine_tune(tmp_path: Path) -> None:
    """What is taken apart is the difference of the numbers that both stand for."""
    chance = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.q_proj" for i in range(2)]
    base, ft, taus = {}, {}, {}
    for name in names:
        codes, scale = quantise(torch.randn(20, 12, generator=chance), (8, 8))
        base |= {f"{name}.weight": codes, f"{name}.weight_scale_inv": scale}
        whole = codes.double() * expanded(scale, (20, 12), (8, 8))
        ft[f"{name}.weight"] = (whole + 0.1 * torch.randn(20, 12, generator=chance)).float()
        taus[f"{name}.weight"] = ft[f"{name}.weight"].double() - whole.float().double()
    said = {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e4m3", "activation_scheme": "dynamic"}
    config = {"model_type": "deepseek_v3", "num_hidden_layers": 2}
    write_checkpoint(tmp_path / "base", base, config={**config, "quantization_config": said})
    torch.save(ft, tmp_path / "ft.pt")
    lines.extract(tmp_path / "ft.pt", tmp_path / "base", tmp_path / "out", rank=3)
    close(updates(tmp_path / "out"), {name: truncated(tau, 3) for name, tau in taus.items()})
    assert lines.verify(tmp_path / "out").same
