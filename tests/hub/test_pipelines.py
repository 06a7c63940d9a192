"""Pipelines on the Hub: of each component what is read is fetched, from a Hub on loopback by the real client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from support.hub_server import HubServer, User
from support.pipelines import FILES, write_modules, write_pipeline

UNWANTED = {
    name: name.encode()
    for name in (
        *(
            "v1-5-pruned.safetensors",
            "unet/diffusion_pytorch_model.bin",
            "unet/diffusion_pytorch_model.fp16.safetensors",
        ),
        *("vae/flax_model.msgpack", "text_encoder/model.onnx", "images/a.png", "other/model.safetensors", "x.txt"),
    )
}
WEIGHTS = {
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "vae/diffusion_pytorch_model.safetensors",
}
CONFIGS = {f"{name}/config.json" for name in ("unet", "text_encoder", "vae")}


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with HubServer() as server:
        for seed, side in enumerate(("base", "ft")):
            files = content_of(write_pipeline(tmp_path / side, seed)) | {"README.md": b"---\nlicense: mit\n---\n"}
            server.push(f"org/{side}", files | UNWANTED)
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def fetched(hub: HubServer, repo: str) -> set[str]:
    return {
        request.file for request in hub.requests if request.method == "GET" and request.file and request.repo == repo
    }


@pytest.mark.slow
def test_of_each_side_what_is_read(hub: HubServer, user: User, tmp_path: Path) -> None:
    """Of the base the components that are edited, of the fine-tune what an output has; it is what folders give."""
    commands = [["edit", "org/base", "org/ft", "-o", "out"], ["edit", "base", "ft", "-o", "local"]]
    ran, local, verified = user.commands(*commands, ["verify", "out"])
    assert (ran.code, local.code, verified.code) == (0, 0, 0), ran.err + verified.err
    components = {"unet", "text_encoder"}
    small = {name for name in FILES if "/" in name}
    of_base = {name for name in WEIGHTS | CONFIGS if name.partition("/")[0] in components}
    assert fetched(hub, "org/base") == of_base | small | {"model_index.json", "README.md"}
    assert fetched(hub, "org/ft") == WEIGHTS | CONFIGS | FILES.keys() | {"model_index.json", "README.md"}
    for name in sorted(WEIGHTS):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    recipe = (tmp_path / "out/lines_recipe.yaml").read_text()
    assert f"base_model: org/base@{hub.repositories['org/base'].refs['main']}" in recipe


@pytest.mark.slow
def test_one_component(hub: HubServer, user: User) -> None:
    """Of the base nothing else is fetched; a second run asks for no file, and works without a connection."""
    command = ["edit", "org/base", "org/ft", "-o", "out", "--component", "unet", "--force"]
    assert user.commands(command)[0].code == 0
    weights = {name for name in fetched(hub, "org/base") if name.endswith(".safetensors")}
    assert weights == {"unet/diffusion_pytorch_model.safetensors"}
    hub.requests.clear()
    assert user.commands(command)[0].code == 0
    assert hub.fetched() == set()
    hub.broken |= {"org/base", "org/ft"}
    again, other = user.commands(command, ["edit", "org/base", "org/ft", "-o", "other"])
    assert again.code == 0, again.err
    assert (other.code, "lacks text_encoder" in other.err) == (3, True), other.err


@pytest.mark.slow
def test_headers_alone(hub: HubServer, user: User) -> None:
    """An inspection and a dry run say what they say of folders, and fetch no weights."""
    there, here = user.commands(["inspect", "org/ft", "--json"], ["inspect", "ft", "--json"])
    assert there.code == 0, there.err
    assert {**there.json, "checkpoint": ""} == {**here.json, "checkpoint": ""}
    plan, local = user.commands(
        ["edit", "org/base", "org/ft", "--dry-run", "--json"], ["edit", "base", "ft", "--dry-run", "--json"]
    )
    assert plan.code == 0, plan.err
    assert (plan.json["stacks"], plan.json["map"]) == (local.json["stacks"], local.json["map"])
    stored = {path.name for path in user.home.rglob("*.safetensors")}
    assert stored == set()


def test_a_variant(hub: HubServer, user: User) -> None:
    """--variant fetches the weights of that variant, where there are any; these here are none."""
    (ran,) = user.commands(["edit", "org/base", "org/ft", "-o", "out", "--variant", "fp16", "--component", "unet"])
    assert (ran.code, "diffusion_pytorch_model.fp16" in ran.err) == (3, True)


@pytest.mark.parametrize("within", ["", "0_Transformer"])
@pytest.mark.slow
def test_modules_of_sentence_transformers(within: str, hub: HubServer, user: User, tmp_path: Path) -> None:
    """The modules' weights are fetched, wherever the transformer lies."""
    for seed, side in enumerate(("base", "ft")):
        files = content_of(write_modules(tmp_path / f"st-{side}", seed, within=within))
        hub.push(f"org/st-{side}", files | {"onnx/model.onnx": b"x", f"{within}/pytorch_model.bin".lstrip("/"): b"x"})
    commands = [["edit", f"{org}base", f"{org}ft", "-o", out] for org, out in (("org/st-", "out"), ("st-", "local"))]
    ran, local, looked = user.commands(*commands, ["inspect", "org/st-ft", "--json"])
    assert (ran.code, local.code, looked.code) == (0, 0, 0), ran.err
    for name in (f"{within}/model.safetensors".lstrip("/"), "2_Dense/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()
    assert (tmp_path / "out/1_Pooling/config.json").exists()
    assert not [name for name in hub.fetched() if name.endswith((".onnx", ".bin"))]
    assert load_file(tmp_path / "out/2_Dense/model.safetensors")


@pytest.mark.parametrize("index", [b'{"../x": ["a", "b"]}', b"[]", b"{", b'{"unet": ["a", "b"], "vae/..": ["a", "b"]}'])
@pytest.mark.slow
def test_an_index_of_a_stranger(index: bytes, hub: HubServer, user: User) -> None:
    """It is refused, and nothing but it was fetched."""
    hub.push("org/x", {"model_index.json": index, "unet/model.safetensors": b"x"})
    (ran,) = user.commands(["inspect", "org/x"])
    assert ran.code == 3
    assert fetched(hub, "org/x") == {"model_index.json"}
