"""What is looked at or planned on the Hub, without its weights: headers over ranges, against a Hub on loopback."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import save

from support.hub_server import Account, Fault, HubServer, User
from support.run import Ran, run_lines

CONFIG = json.dumps({"model_type": "llama", "num_hidden_layers": 3}).encode()
NAMES = ["model.embed_tokens.weight", *(f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3))]
LARGE = 2**20
"""Bytes of each weight file, and more: what is read of it is far less."""


def tensor(seed: int, entries: int = LARGE // 4) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(entries).astype(np.float32)


def whole(seed: int, **metadata: str) -> dict[str, bytes]:
    tensors = {name: tensor(seed + at, LARGE // 16) for at, name in enumerate(NAMES)}
    return {"config.json": CONFIG, "model.safetensors": save(tensors, metadata=metadata or None)}


def sharded(seed: int) -> dict[str, bytes]:
    files = {f"model-{at + 1:05}-of-{len(NAMES):05}.safetensors": {name: tensor(seed)} for at, name in enumerate(NAMES)}
    index = {"metadata": {}, "weight_map": {name: file for file, tensors in files.items() for name in tensors}}
    return {
        "config.json": CONFIG,
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: save(tensors) for file, tensors in files.items()},
    }


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        yield server


@pytest.fixture
def user(hub: HubServer, tmp_path: Path) -> User:
    return User(hub, tmp_path / "home")


def run_all(user: User, *commands: list[str], **env: str) -> list[Ran]:
    """What `lines` says to each of these commands; no pause is waited for between tries."""

    def program() -> None:
        time.sleep = lambda _: None  # type: ignore[assignment]
        print(json.dumps([asdict(run_lines(*command)) for command in commands]))

    done = user.runs(program, **env)
    assert done.returncode == 0, done.stderr
    told = [Ran(**ran) for ran in json.loads(done.stdout)]
    assert [ran.trace for ran in told] == [""] * len(told)
    return told


def weights_sent(hub: HubServer) -> int:
    """How many bytes of weights were sent since the log was last cleared."""
    return sum(request.nbytes for request in hub.kinds("content"))


def on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@pytest.mark.slow
@pytest.mark.parametrize("model", [whole, sharded])
def test_an_inspection_downloads_no_weights(model: object, hub: HubServer, user: User) -> None:
    """`lines inspect org/name` says what it says of the folder, from the first bytes of each weight file."""
    files = model(1)  # type: ignore[operator]
    hub.push("org/model", {**files, "tokenizer.json": b"{}" * 1000, "README.md": b"# Card"})
    folder = user.home.parent / "folder"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    there, here = run_all(user, ["inspect", "org/model", "--json"], ["inspect", "folder", "--json"])
    assert (there.code, here.code) == (0, 0), there.err
    assert {**there.json, "checkpoint": ""} == {**here.json, "checkpoint": ""}
    number = sum(name.endswith(".safetensors") for name in files)
    assert weights_sent(hub) <= 65536 * number
    assert on_disk(user.home) < 100_000
    assert not {"tokenizer.json", "README.md"} & hub.fetched()
    assert f"read {number} header" in there.err


@pytest.mark.slow
def test_a_long_header_takes_a_second_request(hub: HubServer, user: User) -> None:
    """A header that is longer than what is asked for at first is read to its end, and no further."""
    files = whole(1, note="x" * 200_000)
    hub.push("org/model", files)
    [ran] = run_all(user, ["inspect", "org/model", "--json"])
    assert (ran.code, ran.json["parameters"]) == (0, LARGE // 4)
    (length,) = struct.unpack("<Q", files["model.safetensors"][:8])
    assert [request.nbytes for request in hub.kinds("content")] == [65536, 8 + length - 65536]


@pytest.mark.slow
def test_a_server_without_ranges(hub: HubServer, user: User) -> None:
    """Where the server sends the whole file, the connection is closed once the header has come."""
    hub.push("org/model", whole(1, note="x" * 200_000))
    hub.ranges = False
    [ran] = run_all(user, ["inspect", "org/model", "--json"])
    assert (ran.code, ran.json["parameters"]) == (0, LARGE // 4), ran.err
    assert on_disk(user.home) < 100_000


@pytest.mark.slow
def test_private_and_gated_models(hub: HubServer, user: User) -> None:
    """They take a token, which stays with the Hub; without it the refusal is the one of a download."""
    hub.push("org/private", whole(1), private=True)
    hub.push("org/gated", whole(1), gated=True)
    commands = [["inspect", "org/private"], ["inspect", "org/gated"]]
    for ran in run_all(user, *commands, HF_TOKEN=hub.token):
        assert ran.code == 0, ran.err
    assert {request.token for request in hub.kinds("content")} == {None}
    private, gated = run_all(user, *commands)
    assert (private.code, "shows no model org/private" in private.err) == (3, True)
    assert (gated.code, "org/gated is gated" in gated.err) == (3, True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "status"),
    [
        ("content", None),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in (("content", 503), ("file", 429), ("info", 503))),
    ],
)
def test_what_passes(kind: str, status: int | None, hub: HubServer, user: User) -> None:
    """A fault of a moment while headers are read is waited for; one that stays is said."""
    hub.push("org/model", sharded(1))
    hub.faults = {kind: Fault(status, times=1)}
    [ran] = run_all(user, ["inspect", "org/model"])
    assert (ran.code == 0) == (kind != "info"), ran.err  # without its answer the cache serves, and it is empty
    hub.faults = {kind: Fault(status)}
    [ran] = run_all(user, ["inspect", "org/model"], HF_HOME=str(user.home / "other"))
    assert ran.code == 3
    assert "org/model" in ran.err


BROKEN = {
    "no header": (b"{}", "too few for a safetensors header"),
    "not safetensors": (b"x" * 1000, "the format's limit"),
    "cut": (whole(1)["model.safetensors"][:-10], "but the file ends at"),
    "a cut header": (whole(1)["model.safetensors"][:50], "bytes, but only"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "a Git LFS pointer"),
    "no JSON": (struct.pack("<Q", 9) + b'{"a": 1]}', "not valid JSON"),
}


@pytest.mark.slow
def test_broken_files(hub: HubServer, user: User) -> None:
    """A header from the Hub is checked as one on the disk is, and messages name the file in its repository."""
    for at, (content, _) in enumerate(BROKEN.values()):
        hub.push(f"org/broken{at}", {"model.safetensors": content})
    found = run_all(user, *(["inspect", f"org/broken{at}"] for at in range(len(BROKEN))))
    for at, ((_, said), ran) in enumerate(zip(BROKEN.values(), found, strict=True)):
        assert (ran.code, said in ran.err) == (3, True), ran.err
        assert f"org/broken{at}/model.safetensors" in ran.err
        assert str(user.home) not in ran.err


@pytest.mark.slow
def test_shards_that_are_not_there(hub: HubServer, user: User) -> None:
    """An index that names more than there is, or something else than its shards hold, is refused."""
    lacking, other = sharded(1), sharded(2)
    del lacking["model-00002-of-00004.safetensors"]
    other["model-00002-of-00004.safetensors"] = other["model-00001-of-00004.safetensors"]
    hub.push("org/lacking", lacking)
    hub.push("org/other", other)
    first, second = run_all(user, ["inspect", "org/lacking"], ["inspect", "org/other"])
    assert (first.code, "names shards that org/lacking lacks" in first.err) == (3, True)
    assert (second.code, "model-00002-of-00004.safetensors" in second.err) == (3, True)


@pytest.mark.slow
def test_what_needs_the_numbers_fetches_them(hub: HubServer, user: User) -> None:
    """`--check` and `--base` read weights: those are fetched, once, and then headers come from the cache."""
    hub.push("org/base", whole(1))
    hub.push("org/ft", whole(2))
    compared, again = run_all(user, ["inspect", "org/ft", "--base", "org/base", "--json"], ["inspect", "org/ft"])
    assert (compared.code, again.code) == (0, 0), compared.err
    assert compared.json["fine_tunes"]
    assert 2 * LARGE < weights_sent(hub) < 3 * LARGE
    hub.requests.clear()
    [checked] = run_all(user, ["inspect", "org/ft", "--check"])
    assert checked.code == 0
    assert weights_sent(hub) == 0


@pytest.mark.slow
def test_coefficients_of_a_model_on_the_hub(hub: HubServer, user: User) -> None:
    """`lines.coefficients("org/name")` needs names alone."""
    hub.push("org/model", whole(1))

    def program() -> None:
        import lines_cli as lines

        print(json.dumps(lines.coefficients("org/model", alpha=0.5)))

    done = user.runs(program)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[NAMES[1]] == 0.5
    assert weights_sent(hub) <= 65536


def test_a_dry_run_downloads_no_weights(hub: HubServer, user: User) -> None:
    """`--dry-run` plans what the run does, from headers and the small files."""
    hub.push("org/base", whole(1))
    hub.push("org/ft", {**whole(2), "tokenizer.json": b"{}"})
    edit = ["edit", "org/base", "org/ft", "-o", "out", "--json"]
    [dry] = run_all(user, [*edit, "--dry-run"])
    assert dry.code == 0, dry.err
    assert weights_sent(hub) <= 2 * 65536
    assert not (user.home.parent / "out").exists()
    [ran] = run_all(user, edit)
    assert ran.code == 0, ran.err
    same = ("files", "stacks", "outside", "edited", "copied", "bytes", "notes", "recipe")
    assert {key: dry.json[key] for key in same} == {key: ran.json[key] for key in same}
    assert (user.home.parent / "out" / "tokenizer.json").is_file()


@pytest.mark.slow
def test_inputs_that_do_not_fit_are_not_downloaded(hub: HubServer, user: User) -> None:
    """What headers tell is refused before weights are fetched."""
    hub.push("org/base", whole(1))
    hub.push("org/other", {"config.json": CONFIG, "model.safetensors": save({"conv.weight": tensor(3)})})
    [ran] = run_all(user, ["edit", "org/base", "org/other", "-o", "out"])
    assert ran.code == 4
    assert weights_sent(hub) <= 2 * 65536


@pytest.mark.slow
def test_complex_numbers_are_looked_at(hub: HubServer, user: User) -> None:
    """They are the one kind of number that a plan compares: of such a model the weights are fetched for a dry run."""

    def with_table(seed: int, table: float) -> dict[str, bytes]:
        tensors = {name: tensor(seed + at, 64) for at, name in enumerate(NAMES)}
        content = save({**tensors, "model.freqs": np.full(8, table, np.complex64)})
        return {"config.json": CONFIG, "model.safetensors": content}

    hub.push("org/base", with_table(1, 1))
    hub.push("org/same", with_table(2, 1))
    hub.push("org/else", with_table(3, 2))
    same, other = run_all(
        user,
        ["edit", "org/base", "org/same", "-o", "out", "--dry-run"],
        ["edit", "org/base", "org/else", "-o", "out", "--dry-run"],
    )
    assert same.code == 0, same.err
    assert (other.code, "complex numbers" in other.err) == (4, True)


@pytest.mark.slow
def test_only_what_an_edit_reads_is_fetched(hub: HubServer, user: User) -> None:
    """Of each input the chosen weights once, and the small files; no other weights, whatever their format."""
    others = "pytorch_model.bin model.fp16.safetensors onnx/model.onnx optimizer.pt consolidated.safetensors"
    extra = dict.fromkeys(others.split(), b"x" * LARGE)
    hub.push("org/base", {**whole(1), **extra})
    hub.push("org/ft", {**whole(2), **extra, "tokenizer.json": b"{}"})
    [ran] = run_all(user, ["edit", "org/base", "org/ft", "-o", "out"])
    assert ran.code == 0, ran.err
    assert hub.fetched() == {"config.json", "model.safetensors", "tokenizer.json"}
    assert weights_sent(hub) < 2 * LARGE + 2 * 65536 + 10_000


@pytest.mark.slow
def test_the_commit_is_recorded_and_read_again(hub: HubServer, user: User) -> None:
    """Of `org/name@main` the recipe holds the commit; `lines verify` reads that, wherever the branch is by then."""
    base, ft = hub.push("org/base", whole(1)), hub.push("org/ft", whole(2))
    [ran] = run_all(user, ["edit", "org/base@main", "org/ft", "-o", "out"])
    assert ran.code == 0, ran.err
    recipe = yaml.safe_load((user.home.parent / "out" / "lines_recipe.yaml").read_text())
    assert recipe["base_model"] == f"org/base@{base}"
    assert recipe["models"] == [{"model": f"org/ft@{ft}"}]
    assert set(recipe["inputs"]) == {f"org/base@{base}/model.safetensors", f"org/ft@{ft}/model.safetensors"}
    hub.push("org/base", whole(5))
    hub.push("org/ft", whole(6))
    other = {"HF_HOME": str(user.home / "elsewhere")}
    verified, moved = run_all(user, ["verify", "out"], ["verify", "out", "--input", "org/ft=org/ft@main"], **other)
    assert verified.code == 0, verified.err
    assert moved.code == 5


@pytest.mark.slow
def test_an_output_on_the_hub_tells_its_recipe(hub: HubServer, user: User) -> None:
    """`lines inspect` of an output of lines shows its recipe from there, too."""
    hub.push("org/base", whole(1))
    hub.push("org/ft", whole(2))
    edit = ["edit", "org/base", "org/ft", "-o", "out", "--alpha", "0.25", "--push-to", "me/out"]
    ran = run_all(user, edit, ["inspect", "me/out", "--json"], HF_TOKEN=hub.token)[-1]
    assert ran.code == 0, ran.err
    assert ran.json["recipe"]["lines"]["alpha"] == 0.25


@pytest.mark.slow
def test_a_cache_of_ones_own(hub: HubServer, user: User) -> None:
    """`--cache`, or LINES_CACHE, is where everything that is fetched is kept, and looked for."""
    hub.push("org/base", whole(1))
    hub.push("org/ft", whole(2))
    edit = ["edit", "org/base", "org/ft", "-o", "out", "--cache", "own"]
    assert run_all(user, edit)[0].code == 0
    assert on_disk(user.home.parent / "own") > 2 * LARGE
    assert not user.home.exists() or on_disk(user.home) < 1000
    hub.requests.clear()
    again = [*edit[:-2], "--force"]
    assert run_all(user, again, LINES_CACHE="own", HF_HUB_OFFLINE="1")[0].code == 0
    assert hub.requests == []
    assert run_all(user, again, HF_HUB_OFFLINE="1")[0].code == 3
    (user.home.parent / "file").touch()
    [ran] = run_all(user, again, LINES_CACHE="file")
    assert (ran.code, "file" in ran.err) == (3, True)


@pytest.mark.slow
def test_a_reader_may_look(hub: HubServer, user: User) -> None:
    """A token that may only read is enough to look."""
    hub.accounts["hf_reads"] = Account(role="read")
    hub.push("org/private", whole(1), private=True)
    assert run_all(user, ["inspect", "org/private"], HF_TOKEN="hf_reads")[0].code == 0


@pytest.mark.slow
def test_an_adapter_is_scaled_by_the_headers_of_its_base(hub: HubServer, user: User) -> None:
    """No weights of the base are fetched: not for the run, nor to verify what it wrote."""
    rows, columns = 512, LARGE // 4 // 512
    modules = [f"model.layers.{layer}.mlp.up_proj" for layer in range(3)]
    base = {f"{module}.weight": tensor(at).reshape(rows, columns) for at, module in enumerate(modules)}
    hub.push("org/base", {"config.json": CONFIG, "model.safetensors": save(base)})
    factors = {}
    for at, module in enumerate(modules[1:]):
        factors[f"base_model.model.{module}.lora_A.weight"] = tensor(at, 2 * columns).reshape(2, columns)
        factors[f"base_model.model.{module}.lora_B.weight"] = tensor(at, 2 * rows).reshape(rows, 2)
    folder = user.home.parent / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(save(factors))
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    edit = ["edit", "--adapter", "adapter", "--base", "org/base", "-o", "out", "--json"]
    ran, verified, again = run_all(user, edit, ["verify", "out"], [*edit, "--resume"])
    assert (ran.code, verified.code, again.code) == (0, 0, 0), ran.err + verified.err + again.err
    assert ran.json["stacks"][0]["coefficients"] == pytest.approx([0.1, 0.55, 1.0])
    assert [module["index"] for module in ran.json["modules"]] == [1, 2]
    assert again.json["done_before"]
    assert weights_sent(hub) <= 3 * 65536
    recipe = yaml.safe_load((user.home.parent / "out" / "lines_recipe.yaml").read_text())
    assert recipe["base_model"].startswith("org/base@")
