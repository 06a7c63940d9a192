"""Adapters on a base: an edit of one is the edit of what the adapter makes of its base."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import lines_cli as lines


def base_and_adapter(folder: Path, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """A base and a LoRA on its matrices, written; and what the adapter makes of the base, in float64."""
    torch.manual_seed(0)
    names = [f"model.layers.{i}.{m}.weight" for i in range(3) for m in ("q_proj", "up_proj")]
    base = {name: torch.randn(48, 32, dtype=torch.float64).to(dtype) for name in names}
    base |= {f"model.layers.{i}.norm.weight": torch.ones(32, dtype=dtype) for i in range(3)}
    base["model.embed_tokens.weight"] = torch.randn(50, 32).to(dtype)
    factors: dict[str, torch.Tensor] = {}
    whole = {name: tensor.double() for name, tensor in base.items()}
    for name in names:
        a, b = torch.randn(4, 32), 0.1 * torch.randn(48, 4)
        module = name.removesuffix(".weight")
        factors[f"base_model.model.{module}.lora_A.weight"] = a
        factors[f"base_model.model.{module}.lora_B.weight"] = b
        whole[name] = whole[name] + 2.0 * (b.double() @ a.double())
    for where, tensors in ((folder / "base", base), (folder / "adapter", factors)):
        where.mkdir()
        save_file(tensors, where / ("model.safetensors" if where.name == "base" else "adapter_model.safetensors"))
    (folder / "base" / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "base"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return whole


def test_an_edit_of_an_adapter_is_that_of_what_it_makes(tmp_path: Path) -> None:
    """Held against float64 arithmetic on whole tensors; a tensor that it does not change stays as it is."""
    whole = base_and_adapter(tmp_path)
    base = load_file(tmp_path / "base" / "model.safetensors")
    for ft in (tmp_path / "adapter", f"{tmp_path}/base+{tmp_path}/adapter"):
        lines.edit(tmp_path / "base", ft, tmp_path / "out", alpha=0.1, beta=0.9, force=True)
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert found.keys() == base.keys()
        for name, tensor in found.items():
            layer = name.split(".")[2]
            coefficient = 0.1 + 0.9 * int(layer) / 2 if layer.isdigit() else 0.1
            wanted = base[name].double() + coefficient * (whole[name] - base[name].double())
            torch.testing.assert_close(tensor.double(), wanted, rtol=3e-7, atol=1e-7)
            assert torch.equal(tensor, base[name]) == torch.equal(whole[name], base[name].double())
