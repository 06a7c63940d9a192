"""`lines inspect ADAPTER`, without its base and with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from support.adapters import PREFIX, factors, layers_of, updates, write_adapter
from support.files import write_checkpoint
from support.run import run_lines

MODULES = layers_of(3, {"self_attn.q_proj": (12, 8), "mlp.up_proj": (20, 8)})
EMBEDDING = "model.embed_tokens"


def adapter(folder: Path, **config: Any) -> Path:
    ranks = {name: 2 if "layers.1" in name else 4 for name in MODULES}
    made = factors(MODULES, ranks, 1)
    made |= {f"{PREFIX}{EMBEDDING}.lora_embedding_A": torch.randn(4, 30)}
    made |= {f"{PREFIX}{EMBEDDING}.lora_embedding_B": torch.randn(8, 4)}
    config = {"rank_pattern": {r".*layers\.1\..*": 2}, "base_model_name_or_path": "someone/model"} | config
    return write_adapter(folder / "adapter", made, **config)


def told(path: Path, *more: object) -> Any:
    ran = run_lines("inspect", path, "--json", *more)
    assert ran.code == 0, ran.err
    return ran.json


@pytest.mark.parametrize("given", ["adapter", "adapter/adapter_model.safetensors"])
def test_what_is_told_without_the_base(given: str, tmp_path: Path) -> None:
    """Ranks, scales, targets, layers; and norms, which are those of the products in float64."""
    adapter(tmp_path)
    found = told(tmp_path / given)["adapter"]
    assert found["base"] == "someone/model"
    assert (found["tensors"], found["products"]) == (7, 7)
    assert (found["rank"], found["scale"]) == ([2, 4], [2, 4])
    assert [(t["name"], t["tensors"], t["rank"]) for t in found["targets"]] == [
        ("embed_tokens", 1, [4, 4]),
        ("q_proj", 3, [2, 4]),
        ("up_proj", 3, [2, 4]),
    ]
    added = updates(tmp_path / "adapter")
    for layer in found["layers"]:
        own = [update.norm() for name, update in added.items() if f".{layer['index']}." in name]
        assert layer["norm"] == pytest.approx(float(torch.stack(own).norm()), rel=1e-9)
        assert (layer["stack"], layer["tensors"]) == ("model.layers", 2)
    assert [layer["index"] for layer in found["layers"]] == [0, 1, 2]
    assert found["outside"]["tensors"] == 1
    assert found["components"] == []
    everything = [layer["norm"] for layer in found["layers"]] + [found["outside"]["norm"]]
    assert found["norm"] == pytest.approx(float(torch.tensor(everything).double().norm()), rel=1e-6)


def test_coefficients_are_not_known(tmp_path: Path) -> None:
    """An adapter does not say how many layers there are."""
    report = told(adapter(tmp_path))
    assert {layer["coefficient"] for layer in report["layers"]} == {None}
    assert report["quantised"] is None


def test_the_tables(tmp_path: Path) -> None:
    """In words, on a terminal and as a page."""
    ran = run_lines("inspect", adapter(tmp_path), "--plot", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    for words in ("someone/model", "q_proj", "2 to 4", "model.layers", "changes", "7 tensors"):
        assert words in ran.out
    assert "someone/model" in (tmp_path / "page.html").read_text()


def test_a_whole_checkpoint_is_no_adapter(tmp_path: Path) -> None:
    assert told(write_checkpoint(tmp_path / "base", {"h.0.w": torch.ones(3, 3)}))["adapter"] is None


@pytest.mark.parametrize("kind", ["DoRA", "LoHa", "LoKr", "difference", "experts", "mid"])
def test_norms_of_other_products(kind: str, tmp_path: Path) -> None:
    """Held against the product in float64; with DoRA the base has a part in it, and there is none."""
    r = torch.randn
    config: dict[str, Any] | None = None
    wanted: torch.Tensor | None
    if kind == "DoRA":
        tensors = factors({"h.0.q": (6, 5)}, 4, 1) | {f"{PREFIX}h.0.q.lora_magnitude_vector": r(6)}
        config, wanted = {"use_dora": True}, None
    elif kind == "LoHa":
        w = {"w1_a": r(6, 2), "w1_b": r(2, 5), "w2_a": r(6, 2), "w2_b": r(2, 5)}
        tensors = {f"{PREFIX}h.0.q.hada_{name}": tensor for name, tensor in w.items()}
        d = {name: tensor.double() for name, tensor in w.items()}
        config, wanted = (
            {"peft_type": "LOHA", "r": 2, "alpha": 3},
            1.5 * (d["w1_a"] @ d["w1_b"]) * (d["w2_a"] @ d["w2_b"]),
        )
    elif kind == "LoKr":
        w = {"w1": r(2, 3), "w2_a": r(4, 2), "w2_b": r(2, 5)}
        tensors = {f"{PREFIX}h.0.q.lokr_{name}": tensor for name, tensor in w.items()}
        d = {name: tensor.double() for name, tensor in w.items()}
        config, wanted = {"peft_type": "LOKR", "r": 2, "alpha": 3}, 1.5 * torch.kron(d["w1"], d["w2_a"] @ d["w2_b"])
    elif kind == "difference":
        tensors = {"lora_unet_h_0_q.diff": r(6, 5), "lora_unet_h_0_q.diff_b": torch.zeros(6)}
        tensors |= {"lora_unet_h_1_q.lora_up.weight": torch.zeros(6, 1), "lora_unet_h_1_q.lora_down.weight": r(1, 5)}
        wanted = tensors["lora_unet_h_0_q.diff"].double()
    elif kind == "experts":
        a, b = r(3 * 2, 5), r(6, 2 * 3)
        tensors = {f"{PREFIX}h.0.experts.lora_A.weight": a, f"{PREFIX}h.0.experts.lora_B.weight": b}
        wanted = 2 * torch.einsum("ore,eri->eoi", b.double().view(6, 2, 3), a.double().view(3, 2, 5))
        config = {"r": 2, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}
    else:
        down, mid, up = r(2, 5, 1, 1), r(2, 2, 3, 3), r(6, 2, 1, 1)
        tensors = {"lora_unet_h_0_q.lora_down.weight": down, "lora_unet_h_0_q.lora_up.weight": up}
        tensors |= {"lora_unet_h_0_q.lora_mid.weight": mid}
        wanted = torch.einsum("or,rskl,si->oikl", up.double().flatten(1), mid.double(), down.double().flatten(1))
    if config is None:
        save_file(tensors, tmp_path / "lora.safetensors")
        path = tmp_path / "lora.safetensors"
    else:
        path = write_adapter(tmp_path / "adapter", tensors, **config)
        if "peft_type" in config:
            (path / "adapter_config.json").write_text(json.dumps(config))
    found = told(path)["adapter"]
    assert found["norm"] == (None if wanted is None else pytest.approx(float(wanted.norm()), rel=1e-9))


def test_a_kind_that_is_not_folded_in(tmp_path: Path) -> None:
    """It is looked at all the same, and why it cannot be used is said."""
    report = told(adapter(tmp_path, peft_type="VERA"))
    assert report["adapter"] is None
    assert "VERA" in report["quantised"]


def test_nan_in_a_factor(tmp_path: Path) -> None:
    """There is no norm."""
    made = factors(MODULES, 4, 1)
    made[f"{PREFIX}model.layers.2.mlp.up_proj.lora_A.weight"][0, 0] = torch.nan
    found = told(write_adapter(tmp_path / "adapter", made))["adapter"]
    assert [layer["norm"] is None for layer in found["layers"]] == [False, False, True]


def test_with_its_base(tmp_path: Path) -> None:
    """It is compared as any fine-tune is: the norms are the same as without."""
    base = {f"{name}.weight": torch.randn(*size) for name, size in MODULES.items()}
    base[f"{EMBEDDING}.weight"] = torch.randn(30, 8)
    write_checkpoint(tmp_path / "base", base, config={"model_type": "llama", "num_hidden_layers": 3})
    adapter(tmp_path)
    alone = told(tmp_path / "adapter")["adapter"]
    against = told(tmp_path / "adapter", "--base", tmp_path / "base")
    assert against["adapter"] is None
    (tune,) = against["fine_tunes"]
    assert tune["update_norm"] == pytest.approx(alone["norm"], rel=1e-6)
    for layer, own in zip(tune["layers"], alone["layers"], strict=True):
        assert layer["update_norm"] == pytest.approx(own["norm"], rel=1e-6)
