"""Adapters on the Hub: what of them is fetched, and that the commits are recorded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save

from support import forked
from support.adapters import factors
from support.hub_server import HubServer, User

MODULES = {f"model.layers.{i}.self_attn.q_proj": (12, 8) for i in range(3)}
BASE = {f"{name}.weight": torch.randn(12, 8) for name in MODULES}
CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
ADAPTER = {
    "adapter_config.json": json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8}).encode(),
    "adapter_model.safetensors": save(factors(MODULES, 4, 1)),
    "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}).encode(),
    "README.md": b"an adapter",
}
UNWANTED = {"training_args.bin": b"a", "optimizer.pt": b"b", "checkpoint-10/adapter_model.safetensors": b"c"}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.push("org/base", {"config.json": CONFIG, "model.safetensors": save(BASE)})
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


@pytest.mark.parametrize("name", ["org/adapter", "org/base+org/adapter"])
@pytest.mark.slow
def test_an_adapter_is_fetched_and_pinned(name: str, hub: HubServer, user: User) -> None:
    """Its config, its weights and its tokenizer, and nothing else; the recipe names the commit, and runs offline."""
    commit = hub.push("org/adapter", ADAPTER | UNWANTED)
    done = user.runs(forked.command("edit", "org/base", name, "-o", "out", "--json"))
    assert done.returncode == 0, done.stderr
    assert set(ADAPTER) <= hub.fetched()
    assert not set(UNWANTED) & hub.fetched()
    out = user.home.parent / "out"
    recipe = yaml.safe_load((out / "lines_recipe.yaml").read_text())
    assert recipe["models"][0]["model"].endswith(f"org/adapter@{commit}")
    assert (out / "tokenizer.json").read_bytes() == ADAPTER["tokenizer.json"]
    again = forked.command("merge", "--config", "out/lines_recipe.yaml", "-o", "again")
    done = user.runs(again, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    one, other = (load_file(folder / "model.safetensors") for folder in (out, out.with_name("again")))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert not torch.equal(
        one["model.layers.2.self_attn.q_proj.weight"], BASE["model.layers.2.self_attn.q_proj.weight"]
    )


@pytest.mark.slow
def test_a_dry_run_and_a_look(hub: HubServer, user: User) -> None:
    """Of the base headers are enough; the adapter, which is small, is fetched."""
    hub.push("org/adapter", ADAPTER)
    lone = {"lora_unet_a.lora_down.weight": torch.ones(2, 8), "lora_unet_a.lora_up.weight": torch.ones(12, 2)}
    hub.push("org/lone", {"my_lora.safetensors": save(lone)})
    hub.push("org/unet", {"diffusion_pytorch_model.safetensors": save({"a.weight": torch.ones(12, 8)})})
    plan, other, look = user.commands(
        ["edit", "org/base", "org/adapter", "-o", "out", "--dry-run", "--json"],
        ["edit", "org/unet", "org/lone", "-o", "out", "--dry-run", "--json", "--alpha", "1", "--beta", "0"],
        ["inspect", "org/adapter", "--json"],
    )
    assert (plan.code, other.code, look.code) == (0, 0, 0), plan.err + other.err + look.err
    assert "read 1 header of org/base" in plan.err
    assert "fetched org/adapter" in plan.err
    assert json.loads(look.out)["adapter"]["rank"] == [4, 4]
