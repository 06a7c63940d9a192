"""`lines verify`: an output is computed again and compared, whoever made it and wherever it is now."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.engine import verify as verification
from lines_cli.errors import CheckpointError, OutputError, RecipeError
from lines_cli.plan.statistics import Statistics
from lines_cli.recipe.yaml_file import load_recipe_file
from lines_cli.storage.digest import file_digest
from lines_cli.storage.journal import written_line
from lines_cli.storage.verified import verified_beside
from support.files import snapshot, write_checkpoint
from support.hub_server import HubServer, User
from support.run import Ran, run_lines

MIB = 2**20
CONFIG = {"model_type": "tiny", "torch_dtype": "float32", "vocab_size": 12}
SHARDED = ["--max-shard-size", "9MB"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes, of several blocks each, in shards; and outputs of them to be spoilt."""
    folder = tmp_path_factory.mktemp("models")
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(1_100_003 + i, generator=chance) for i in range(4)}
        tensors |= {"layers.3.steps": torch.tensor(seed), "embed_tokens.weight": torch.randn(12, 4, generator=chance)}
        write_checkpoint(folder / side, tensors, shards=2, config=CONFIG)
        (folder / side / "tokenizer.json").write_text(f'{{"of": "{side}"}}')
    assert run_lines("edit", folder / "base", folder / "ft", "-o", folder / "whole").code == 0
    os.chdir(folder)
    assert run_lines("edit", "base", "ft", "-o", "out", *SHARDED).code == 0
    return folder


@pytest.fixture
def here(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fine-tune and of `out`, and links to what no test here writes to, where we are."""
    for name in ("base", "ft", "ft2", "out"):
        own = name in ("ft", "out")
        shutil.copytree(models / name, tmp_path / name, copy_function=shutil.copy2 if own else os.link)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SECOND = "model-00002-of-00002.safetensors"


def verifies(*args: object) -> Ran:
    """It is what its recipe makes, and verifying leaves nothing behind."""
    before = snapshot(Path.cwd())
    ran = run_lines("verify", *args)
    assert (ran.code, ran.trace) == (0, ""), ran.out + ran.err
    assert "is what its recipe makes" in ran.out or "--json" in args
    assert snapshot(Path.cwd()) == before
    return ran


def differs(*args: object, code: int = 5) -> Ran:
    """It is not, and verifying leaves nothing behind."""
    before = snapshot(Path.cwd())
    ran = run_lines("verify", *args)
    assert (ran.code, ran.trace) == (code, ""), ran.out + ran.err
    assert snapshot(Path.cwd()) == before
    return ran


def merged(values: dict[str, Any], out: str, *options: object) -> None:
    Path("merge.yaml").write_text(yaml.safe_dump(values))
    ran = run_lines("merge", "--config", "merge.yaml", "-o", out, *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err


def flip(path: Path, at: int) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


# --- what is as it should be ---


def test_an_edit(here: Path) -> None:
    """Shards, index, config and tokenizer; the summary counts them."""
    ran = verifies("out")
    assert "out is what its recipe makes: 5 files, 17.6 MB, compared in" in ran.out
    assert "../base" in ran.err


ONE, TWO = [{"model": "ft"}], [{"model": "ft"}, {"model": "ft2"}]
METHODS: dict[str, dict[str, Any]] = {
    "average": {"models": TWO},
    "task_arithmetic": {"models": TWO, "parameters": {"density": 0.4}, "lines": {"alpha": "auto", "beta": 0.5}},
    "ties": {"models": TWO, "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
    "consensus": {"models": TWO, "lines": {"alpha": "auto", "beta": 0.2}},
    "dare_linear": {"models": TWO, "parameters": {"density": 0.5, "rescale": "l1"}},
    "dare_ties": {"models": TWO, "parameters": {"density": 0.5}, "lines": {"alpha": "auto", "beta": 1.0}},
    "linear": {"models": TWO, "base_model": None},
    "slerp": {"models": [{"model": "base"}, {"model": "ft"}], "base_model": None, "parameters": {"t": [0.1, 0.9]}},
    "passthrough": {"models": ONE, "base_model": None},
}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and two fine-tunes of one block, where we are."""
    monkeypatch.chdir(tmp_path)
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(50_003 + i, generator=chance) for i in range(4)}
        write_checkpoint(tmp_path / side, tensors, shards=2, config=CONFIG)


@pytest.mark.slow
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str) -> None:
    """Thresholds, signs, draws and angles are found again; an alpha that was measured is a number in the recipe."""
    values = {"merge_method": method, "base_model": "base", **METHODS[method]}
    merged({key: value for key, value in values.items() if value is not None}, "new")
    verifies("new")
    verifies("new", "--workers", "1")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--filter", "embed=0.3", "--outside", "base"],
        ["--dtype", "bfloat16", *SHARDED],
        ["--layers", r"layers\.(?P<index>\d+)\.", "--schedule", "0.1,0.5,0.6,1"],
        ["--stack", "layers=0.2,0.3", "--gamma", "0.5"],
        ["--alpha", "1", "--beta", "0"],
    ],
    ids=" ".join,
)
def test_an_edit_with_options(options: list[str], here: Path) -> None:
    """The recipe has all of it."""
    assert run_lines("edit", "base", "ft", "-o", "new", *options).code == 0
    verifies("new")


@pytest.mark.slow
def test_inputs_that_disagree(here: Path) -> None:
    """`--resize`, `--missing` and `--allow-nonfinite` are in the recipe, too."""
    tensors = {f"layers.{i}.w": torch.ones(5) * i for i in range(3)}
    write_checkpoint(here / "a", tensors | {"embed_tokens.weight": torch.ones(12, 2)}, config=CONFIG)
    more = {"embed_tokens.weight": torch.zeros(14, 2), "head.weight": torch.tensor([float("nan")])}
    write_checkpoint(here / "b", tensors | more, config=CONFIG | {"vocab_size": 14})
    options = ["--resize", "base", "--missing", "copy", "--allow-nonfinite"]
    assert run_lines("edit", "a", "b", "-o", "new", *options).code == 0
    verifies("new")


@pytest.mark.slow
def test_a_lone_file(here: Path) -> None:
    """It needs the recipe that made it: of a merge, also one whose alpha is `auto`; of an edit four lines of YAML."""
    merged({"merge_method": "ties", "base_model": "base", **METHODS["ties"]}, "new.safetensors")
    verifies("new.safetensors", "--config", "merge.yaml")
    assert run_lines("edit", "base", "ft", "-o", "one.safetensors", "--alpha", "0.1").code == 0
    refused = differs("one.safetensors", code=2)
    assert "does not say what made it" in refused.err
    text = refused.err[refused.err.index("base_model: BASE") :].replace("BASE", "base").replace("FT", "ft")
    Path("edit.yaml").write_text("\n".join(line.removeprefix("  ") for line in text.splitlines()))
    verifies("one.safetensors", "--config", "edit.yaml")
    assert "differs first at byte" in differs("one.safetensors", "--config", "merge.yaml").out
    assert "lines verify out" in differs(f"out/{SECOND}", code=2).err


@pytest.mark.slow
def test_people_edit_the_model_card(here: Path) -> None:
    """The card, a licence and notes beside it are not compared; the notes are told."""
    (here / "out" / "README.md").write_text("mine")
    (here / "out" / "LICENSE").write_text("MIT")
    (here / "out" / "results.txt").write_text("good")
    (here / "out" / ".gitattributes").write_text("*")
    assert "LICENSE, results.txt" in verifies("out").err


@pytest.mark.slow
def test_an_older_output_without_a_record(here: Path) -> None:
    """Its files are compared with the computation alone, and this is said."""
    path = here / "out" / "lines_recipe.yaml"
    path.write_text(path.read_text().partition("# What was read")[0])
    assert "records no digests" in verifies("out").err
    flip(here / "out" / SECOND, 9000)
    assert "differs first at byte 9,000" in differs("out").out


@pytest.mark.slow
def test_another_version_of_lines(here: Path) -> None:
    """Its outputs are verified all the same; it is told where something differs."""
    path = here / "out" / "lines_recipe.yaml"
    path.write_text(path.read_text().replace(f"Written by lines {lines.__version__}.", "Written by lines 0.0.7."))
    assert "0.0.7" not in verifies("out").err
    (here / "out" / "config.json").write_text("{}")
    ran = differs("out")
    assert f"written by lines 0.0.7, and this is {lines.__version__}" in ran.err


# --- on another machine ---


@pytest.mark.slow
def test_the_folders_have_moved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs and output in another place, with other times."""
    (here / "x").mkdir()
    for name in ("base", "ft", "out"):
        shutil.copytree(name, f"x/{name}", copy_function=shutil.copy)
        shutil.rmtree(name)
    verifies("x/out")
    monkeypatch.chdir(here / "x" / "out")
    verifies(".")


@pytest.mark.slow
def test_inputs_that_lie_elsewhere(here: Path) -> None:
    """The error names those there are, and --input says where they lie."""
    for name in ("base", "ft"):
        (here / name).rename(here / f"my={name}")
    ran = differs("out", code=3)
    assert "--input ../base=PATH --input ../ft=PATH" in ran.err
    assert "2 inputs are missing" in ran.err
    verifies("out", "--input", "../base=my=base", "--input", f"../ft={here}/my=ft")
    verifies("out", "--input", "base=my=base", "--input", f"ft={here}/my=ft")
    ran = differs("out", "--input", "base=my=base", code=3)
    assert "2 inputs" not in ran.err
    assert "--input ../ft=PATH" in ran.err
    assert "--input ../base=PATH" not in ran.err
    ran = differs("out", "--input", "ase=my=base", code=2)
    assert "  ../base\n  ../ft" in ran.err
    assert "NAME=PATH" in differs("out", "--input", "../base=", code=2).err
    assert lines.verify("out", inputs={"../base": "my=base", "../ft": "my=ft"}).same


@pytest.mark.slow
def test_the_note_of_inputs(here: Path) -> None:
    """Each is named with where it is, without detours, before it is opened; none is hidden by another of one place."""
    assert "../base (./base), ../ft (./ft)" in " ".join(verifies("out").err.split())
    ran = differs("out", "--input", "../ft=base")
    assert "../base (./base), ../ft (./base)" in " ".join(ran.err.split())
    report = differs("out", "--input", "../ft=base", "--json").json["inputs"]
    assert sorted({read["name"].rpartition("/")[0] for read in report}) == ["../base", "../ft"]
    (here / "base").rename(here / "gone")
    assert "--input ../base=PATH --input ../ft=PATH" in differs("out", "--input", "../ft=base", code=3).err
    (here / "x/y").mkdir(parents=True)
    shutil.move(here / "out", here / "x/y/out")
    (here / "out").symlink_to("x/y/out")
    shutil.move(here / "gone", here / "x/y/base")
    ran = differs("out", code=3)  # `..` counts from where the link leads
    assert "../base (./out/../base), ../ft (./out/../ft)" in " ".join(ran.err.split())
    shutil.move(here / "ft", here / "x/y/ft")
    assert "../base (./out/../base)" in " ".join(verifies("out").err.split())
    assert "../base (./x/y/base)" in " ".join(verifies("x/y/out").err.split())


def test_the_last_part_of_an_input_s_name(here: Path) -> None:
    """It has to be whole parts of one name; of a Hub id the revision may be left out."""
    recipe = {"base_model": "a/ft", "models": [{"model": "b/ft"}, {"model": "org/x@abc"}, {"model": "c=d/e"}]}
    path = here / "names.yaml"
    path.write_text(yaml.safe_dump({**recipe, "merge_method": "task_arithmetic"}))

    def found(*given: str) -> dict[str, str]:
        places = load_recipe_file(path, elsewhere=given).places
        return {name: there for name, there in places.items() if there != name}

    assert found("b/ft=p=q", "x=r", "e=t=u") == {"b/ft": "p=q", "org/x@abc": "r", "c=d/e": "t=u"}
    assert found("x@abc=r", "c=d/e=s") == {"org/x@abc": "r", "c=d/e": "s"}
    with pytest.raises(RecipeError, match=r"--input ft: this may be any of\n  a/ft\n  b/ft"):
        found("ft=p")
    with pytest.raises(RecipeError, match="--input says twice where c=d/e is: s, and u"):
        found("c=d/e=s", "e=u")
    for wrong in ("t=p", "bc=p", "/ft=p", "=p"):
        with pytest.raises(RecipeError, match="no such input"):
            found(wrong)


@pytest.mark.slow
def test_inputs_in_other_shards(here: Path) -> None:
    """The bytes are the same, so it is that merge; the note tells of the inputs."""
    tensors = {name: read(here / "base", name) for name in open_checkpoint(here / "base").tensors}
    write_checkpoint(here / "one" / "model.safetensors", tensors)
    ran = verifies("out", "--input", "../base=one")
    assert "1 of the input files are not the recorded ones" in ran.err


def read(folder: Path, name: str) -> torch.Tensor:
    from safetensors.torch import load_file

    checkpoint = open_checkpoint(folder)
    return load_file(checkpoint.files[checkpoint.tensors[name].file])[name]


@pytest.mark.slow
def test_on_the_hub(here: Path) -> None:
    """An output of ours is fetched with its recipe, and compared; its inputs lie here. Nothing is kept beside it."""
    files = {path.name: path.read_bytes() for path in (here / "out").iterdir()}
    with HubServer() as hub:
        hub.push("org/merged", files)
        spoilt = files[SECOND][:-1] + bytes([files[SECOND][-1] ^ 1])
        hub.push("org/spoilt", files | {SECOND: spoilt})
        hub.push("org/other", {name: content for name, content in files.items() if "recipe" not in name})
        user = User(hub, here / "home")
        options = ["--input", f"../base={here}/base", "--input", f"../ft={here}/ft"]
        same, no_input, resumed, no_recipe, differing = user.commands(
            ["verify", "org/merged", *options],
            ["verify", "org/merged"],
            ["verify", "org/merged", *options, "--resume"],
            ["verify", "org/other"],
            ["verify", "org/spoilt", *options, "--json"],
        )
    assert (same.code, same.trace) == (0, ""), same.err
    assert "org/merged is what its recipe makes" in same.out
    assert no_input.code == 3
    assert (resumed.code, "Hub's cache" in resumed.err) == (2, True)
    assert (no_recipe.code, "holds no lines_recipe.yaml" in no_recipe.err) == (3, True)
    assert differing.code == 5
    assert differing.json["same"] is False
    assert not list(here.glob("home/**/*lines-verified"))


# --- what is not ---


def test_a_flipped_bit(here: Path) -> None:
    """The file, the block and the tensor's entry are named; the recipe makes what was recorded, so it was changed."""
    info = open_checkpoint(here / "out").tensors["layers.2.w"].info
    flip(here / "out" / SECOND, at := info.offset + 4 * 1_050_000 + 2)
    ran = differs("out")
    assert f"{SECOND}: differs first at byte {at:,} in block 2 of 3 (bytes 4,194,304 to 8,388,607)" in ran.out
    assert "tensor layers.2.w, entry 1,050,000" in ran.out
    assert "was changed after it was written" in ran.out
    assert "1 of 5 files differs" in ran.err
    assert "lines merge --config out/lines_recipe.yaml" in ran.err
    told = differs("out", "--json").json
    assert told["same"] is False
    (file,) = [file for file in told["files"] if not file["same"]]
    assert file["difference"] == {
        "byte": at,
        "block": 1,
        "start": 4 * MIB,
        "end": 8 * MIB,
        "differing": 1,
        "blocks": 3,
        "tensor": "layers.2.w",
        "entry": 1_050_000,
        "header": None,
    }
    assert (file["made_as_recorded"], file["still_as_recorded"]) == (True, False)


@pytest.mark.slow
def test_several_blocks(here: Path) -> None:
    """Their number is told, and the first of them."""
    for at in (8 * MIB + 5, 4 * MIB - 1, 5 * MIB, 2 * MIB):
        flip(here / "out" / SECOND, at)
    ran = differs("out")
    assert "differs first at byte 2,097,152 in block 1 of 3" in ran.out
    assert "3 blocks differ" in ran.out


@pytest.mark.slow
def test_the_first_and_the_last_byte(here: Path) -> None:
    """No byte is out of sight."""
    for name in ("model-00001-of-00002.safetensors", SECOND):
        path = here / "out" / name
        for at in (0, 7, MIB - 1, MIB, path.stat().st_size - 1):
            flip(path, at)
            assert f"differs first at byte {at:,} in" in differs("out").out
            flip(path, at)
    verifies("out")


def another_header(path: Path) -> None:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].replace(b'"pt"', b'"np"')
    path.write_bytes(content[:8] + header + content[8 + length :])


def without_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    del tensors["layers.3.steps"]
    save_file(tensors, path, metadata={"format": "pt"})


def as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_dead_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


INDEX = "model.safetensors.index.json"
CHANGES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "metadata": (
        SECOND,
        another_header,
        "its header; it has the same tensors, but in another layout or with other metadata",
    ),
    "a tensor less": (SECOND, without_a_tensor, "its header; it lacks 1 tensor (layers.3.steps)"),
    "no header": (SECOND, lambda path: path.write_bytes(b"x" * 100), "its header; it cannot be read"),
    "cut": (SECOND, lambda path: os.truncate(path, 5_000_000), "has 5,000,000 bytes, but the recipe makes 8,80"),
    "cut at a block": (SECOND, lambda path: os.truncate(path, 4 * MIB), "differs first at byte 4,194,304 in block 2"),
    "emptied": (SECOND, lambda path: os.truncate(path, 0), "has 0 bytes"),
    "longer": (SECOND, lambda path: os.truncate(path, 9_000_000), "has 9,000,000 bytes, but the recipe makes 8,80"),
    "gone": (SECOND, Path.unlink, "is missing"),
    "a pipe": (SECOND, as_pipe, "is not a regular file"),
    "a folder": (SECOND, as_folder, "is not a regular file"),
    "a dead link": (SECOND, as_dead_link, "is a link that leads nowhere"),
    "index": (INDEX, lambda path: path.write_text(path.read_text().replace("2.w", "2.v")), "differs first at byte"),
    "no index": (INDEX, Path.unlink, "is missing"),
    "config": ("config.json", lambda path: path.write_text("{}"), "has 2 bytes"),
    "config is a pipe": ("config.json", as_pipe, "is not a regular file"),
    "tokenizer": ("tokenizer.json", lambda path: path.write_text('{"of": "fu"}'), "differs first at byte"),
}


@pytest.mark.parametrize(("name", "change", "words"), CHANGES.values(), ids=CHANGES)
@pytest.mark.slow
def test_a_change_is_found(name: str, change: Callable[[Path], object], words: str, here: Path) -> None:
    """Whatever became of a file, it is named with what is wrong, and no other file is."""
    change(here / "out" / name)
    ran = differs("out")
    told = [line for line in ran.out.splitlines() if line.startswith("file")]
    assert all(line.startswith(f"file    {name}: ") for line in told)
    assert any(words in line for line in told), ran.out


def test_all_is_gone(here: Path) -> None:
    """With nothing but the recipe there, every file is missing."""
    for path in (here / "out").iterdir():
        if path.name != "lines_recipe.yaml":
            path.unlink()
    err = differs("out").err
    assert "5 of 5 files differ" in err
    assert "A file is missing" in err
    assert "lines merge --config " in err


@pytest.mark.slow
def test_a_file_that_is_not_of_its_making(here: Path) -> None:
    """What a library might load is a difference, be it recorded or not."""
    shutil.copy(here / "out" / SECOND, here / "out" / "adapter_model.safetensors")
    (here / "out" / "modeling_tiny.py").write_text("")
    ran = differs("out")
    assert "adapter_model.safetensors: the recipe does not make it" in ran.out
    assert "modeling_tiny.py was not made by the recipe" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "adapter_config.json",
        "LICENSE.py",
        "Modeling.PY",
        "kernel.so",
        "custom_generate/requirements.txt",
        "1_Dense/config.json",
        "a/b/c/d/e/model.safetensors",
        ".hidden/x.py",
        "results.index.json",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "params.json",
                "NOTICE.json",
                "LICENSE.model",
                "pytorch_model.pkl",
                "rust_model.ot",
                "x.pickle",
                "custom_generate/generate.py",
                "a/b/c/code.py",
                "tokenizer/vocab.txt",
            )
        ),
    ],
)
def test_what_a_library_may_load_at_any_depth(name: str, here: Path) -> None:
    """Weights, pickles, code and configs are found however deep they lie, and whatever else their name says."""
    path = here / "out" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}")
    assert f"{name}: the recipe does not make it" in differs("out").out


@pytest.mark.slow
def test_what_no_library_loads(here: Path) -> None:
    """Legal texts, results and notes at any depth are told as not compared."""
    names = ["LICENSE-APACHE.txt", "NOTICE.md", "a/b/c/notes.txt", "eval_results.json", "trainer_state.json"]
    for name in names:
        (here / "out" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "out" / name).write_text("x")
    told = " ".join(verifies("out").err.split())
    assert "which were not compared: " in told
    assert all(name in told for name in names)
    for number in range(9):
        (here / "out" / f"notes{number}").write_text("x")
    assert " and 6 more" in " ".join(verifies("out").err.split())


@pytest.mark.slow
def test_links_of_folders_are_not_followed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that stays is a note; one that leads away is named itself, and nothing of what lies there is."""
    (here / "out" / "loop").symlink_to(".")
    (here / "out" / "deep").mkdir()
    (here / "out" / "deep" / "loop").symlink_to("..")
    assert "not compared: deep/loop, loop" in " ".join(verifies("out").err.split())
    (here / "elsewhere").mkdir()
    (here / "elsewhere" / "secret.py").write_text("")
    (here / "out" / "custom_generate").symlink_to("../elsewhere")
    ran = differs("out")
    assert "custom_generate: the recipe does not make it" in ran.out
    assert "secret" not in ran.out + ran.err
    monkeypatch.setattr(verification, "_MOST_ENTRIES", 5)
    assert "holds more than 5 files" in differs("out", code=3).err


@pytest.mark.slow
def test_a_record_of_what_is_neither_made_nor_there(here: Path) -> None:
    """The record is wrong, then."""
    path = here / "out" / "lines_recipe.yaml"
    path.write_text(path.read_text() + "  vocab.txt:\n    bytes: 1\n    digest: x\n")
    ran = differs("out")
    assert "vocab.txt: is recorded, but the recipe does not make it" in ran.out
    (here / "out" / "vocab.txt").write_text("x")
    assert "vocab.txt: the recipe does not make it" in differs("out").out


@pytest.mark.slow
def test_another_input(here: Path) -> None:
    """An input of another size is told first; one that only holds other numbers, if its digest was recorded."""
    write_checkpoint(here / "ft", {f"layers.{i}.w": torch.ones(1_100_003 + i) for i in range(4)})
    (here / "ft" / INDEX).unlink()
    ran = differs("out", code=4)  # it lacks tensors
    assert "ft" in ran.err

    shutil.rmtree("ft")
    shutil.copytree("ft2", "ft")
    ran = differs("out")
    assert "is as it was written, but the recipe makes something else" in ran.out
    assert "Another input or another version" in ran.err

    shutil.rmtree("ft")
    shutil.copytree("base", "ft")
    flip(
        here / "ft" / "model-00001-of-00002.safetensors",
        -1 + (here / "ft" / "model-00001-of-00002.safetensors").stat().st_size,
    )
    assert run_lines("edit", "base", "ft", "-o", "new", "--verify-inputs").code == 0
    flip(here / "ft" / "model-00001-of-00002.safetensors", 5 * MIB)
    ran = differs("new")
    first = ran.out.splitlines()[1]
    assert first.startswith("input   ./ft/model-00001-of-00002.safetensors: it holds sha256-tree-4MiB:")
    assert "Some inputs are not the recorded ones" in ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("alpha: 0.1", "alpha: 0.2", "is as it was written, but the recipe makes something else"),
        ("digest: sha256-tree-4MiB:", "digest: sha256-tree-4MiB:0", "but the record says something else"),
        ("bytes: 8", "bytes: 9", "but the record says something else"),
    ],
)
def test_the_record_was_edited(old: str, new: str, words: str, here: Path) -> None:
    """Another recipe makes another file; a wrong record of the right file is a difference, too."""
    path = here / "out" / "lines_recipe.yaml"
    before, files, after = path.read_text().partition("\nfiles:")
    text = before.replace(old, new) + files + after.replace(old, new)
    path.write_text(text)
    assert words in differs("out").out


@pytest.mark.slow
def test_no_recipe(here: Path) -> None:
    """A folder without one is refused, and --config gives it one."""
    shutil.move("out/lines_recipe.yaml", "recipe.yaml")
    assert "--config FILE" in differs("out", code=3).err
    text = Path("recipe.yaml").read_text().replace("../", "")
    Path("recipe.yaml").write_text(text)
    verifies("out", "--config", "recipe.yaml")
    assert differs("nowhere", code=3).err
    assert differs("out", "--config", "nowhere.yaml", code=2).err


@pytest.mark.parametrize("name", ["/etc/passwd", "../base/config.json", "x/../../y"])
def test_a_strangers_record_leads_nowhere(name: str, here: Path) -> None:
    """A record of a file outside the folder is refused before anything is read."""
    path = here / "out" / "lines_recipe.yaml"
    path.write_text(path.read_text() + f"  {name}:\n    bytes: 1\n    digest: x\n")
    assert "outside the folder" in differs("out", code=3).err


@pytest.mark.slow
def test_a_strangers_inputs_are_read_as_checkpoints_only(here: Path) -> None:
    """What else they name is refused, and was named before it was opened."""
    (here / "secret").write_text("secret")
    path = here / "out" / "lines_recipe.yaml"
    text = path.read_text()
    path.write_text(text.replace("base_model: ../base", "base_model: ../secret"))
    ran = differs("out", code=3)
    assert "lines_recipe.yaml: ../secret" in ran.err
    assert "too few for a safetensors header" in ran.err
    for inputs in ("inputs: {../base/model-00001-of-00002.safetensors: 5}", "inputs: {x: {bytes: a}}"):
        path.write_text(text.partition("\nrun:")[0] + f"\n{inputs}\n")
        verifies("out")


@pytest.mark.slow
def test_a_file_that_changes_meanwhile(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not told as equal or as different."""
    write = verification._Present.write

    def touching(there: Any, view: memoryview, offset: int) -> None:
        write(there, view, offset)
        os.utime(here / "out" / SECOND)

    monkeypatch.setattr(verification._Present, "write", touching)
    ran = run_lines("verify", "out")
    assert (ran.code, ran.trace) == (3, "")
    assert "changed while it was compared" in ran.err


# --- what it prints ---


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lines_recipe.yaml", "config.json", "tokenizer.json"])
def test_links_out_of_the_output_are_refused(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is compared; weights and their index may be links."""
    for weights in (SECOND, INDEX):
        shutil.move(here / "out" / weights, here / f"x-{weights}")
        (here / "out" / weights).symlink_to(f"../x-{weights}")
    verifies("out")
    shutil.move(here / "out" / name, here / "elsewhere")
    (here / "out" / name).symlink_to("../elsewhere")
    monkeypatch.setattr(verification, "_compare_weights", None)
    assert f"out/{name} is a link that leaves its folder" in differs("out", code=3).err


@pytest.mark.slow
def test_recorded_digests_are_always_compared(here: Path) -> None:
    """An input that holds something else, and gives the same output, is told."""
    assert run_lines("edit", "base", "ft", "-o", "new", "--alpha", "0", "--beta", "0", "--verify-inputs").code == 0
    assert "not the recorded ones" not in verifies("new").err
    flip(here / "ft" / "model-00001-of-00002.safetensors", 5 * MIB)
    assert "1 of the input files are not the recorded ones, but they give the same output" in verifies("new").err


@pytest.mark.slow
def test_quiet(here: Path) -> None:
    """Nothing but errors."""
    ran = run_lines("verify", "out", "--quiet")
    assert (ran.code, ran.out, ran.err) == (0, "", "")
    flip(here / "out" / SECOND, 9000)
    ran = run_lines("verify", "out", "--quiet")
    assert (ran.code, ran.out) == (5, "")
    assert "is not what its recipe makes" in ran.err


@pytest.mark.slow
def test_from_python(here: Path) -> None:
    """The same as a frozen value."""
    found = lines.verify("out", resources=lines.Resources(workers=1, chunk=70_001))
    assert found.same
    assert {file.name for file in found.files} == {
        "model-00001-of-00002.safetensors",
        SECOND,
        INDEX,
        "config.json",
        "tokenizer.json",
    }
    with pytest.raises(FrozenInstanceError):
        found.seconds = 0.0  # type: ignore[misc]
    flip(here / "out" / SECOND, 9000)
    found = lines.verify(here / "out")
    assert not found.same
    assert found.files[1].difference is not None
    assert found.files[1].difference.byte == 9000
    (here / "out" / "lines_recipe.yaml").unlink()
    with pytest.raises(CheckpointError):
        lines.verify("out")


# --- interrupted, and on again ---

KEPT = ".out.lines-verified"


def stop(monkeypatch: pytest.MonkeyPatch, *options: object, after: int = 9, error: BaseException | None = None) -> Ran:
    """Verify until so many pieces of 1 MiB have been compared."""
    with monkeypatch.context() as patch:
        _count(patch, after, error or KeyboardInterrupt())
        ran = run_lines("verify", "out", "--workers", "1", *options)
    assert ran.code != 0
    assert ran.trace == ""
    return ran


def _count(patch: pytest.MonkeyPatch, most: int, error: BaseException) -> list[int]:
    seen: list[int] = []
    write = verification._Present.write

    def counting(there: Any, view: memoryview, offset: int) -> None:
        seen.append(offset)
        if len(seen) > most:
            raise error
        write(there, view, offset)

    patch.setattr(verification._Present, "write", counting)
    return seen


def compared(monkeypatch: pytest.MonkeyPatch, *options: object, code: int = 0) -> tuple[int, Ran]:
    """How many pieces a run compares."""
    with monkeypatch.context() as patch:
        seen = _count(patch, 10**9, AssertionError())
        ran = run_lines("verify", "out", *options)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    return len(seen), ran


@pytest.mark.slow
def test_interrupted_without_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is kept."""
    before = snapshot(here)
    assert stop(monkeypatch).code == 130
    assert snapshot(here) == before


@pytest.mark.slow
def test_resume(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was compared is kept in one hidden file, named, gone on from, and removed at the end."""
    before = snapshot(here)
    ran = stop(monkeypatch, "--resume")
    assert ran.code == 130
    assert str(here / KEPT) in ran.err
    assert snapshot(here).keys() - before.keys() == {KEPT}
    all_of_it, _ = compared(monkeypatch)
    rest, ran = compared(monkeypatch, "--resume", "--json")
    assert rest <= all_of_it - 8
    assert ran.json["same"] is True
    assert ran.json["resumed"] == (here / "out" / "model-00001-of-00002.safetensors").stat().st_size
    assert snapshot(here) == before
    assert compared(monkeypatch, "--resume")[0] == all_of_it


@pytest.mark.slow
def test_resume_remembers_what_differs(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A difference that was found before the interruption is told by the run that goes on."""
    flip(here / "out" / "model-00001-of-00002.safetensors", 5 * MIB)
    undisturbed = differs("out", "--json").json
    stop(monkeypatch, "--resume")
    _, ran = compared(monkeypatch, "--resume", "--json", code=5)
    told = ran.json
    assert told["resumed"] > 0
    assert told["files"] == undisturbed["files"]
    assert not (here / KEPT).exists()


@pytest.mark.slow
def test_resume_does_not_measure_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thresholds and signs are kept, too."""
    shutil.rmtree("out")
    merged({"merge_method": "ties", "base_model": "base", **METHODS["ties"]}, "out")
    stop(monkeypatch, "--resume")
    monkeypatch.setattr(verification, "measure", None)
    assert compared(monkeypatch, "--resume")[1].code == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda here: os.utime(here / "out" / SECOND, (1, 1)), "files"),
        (
            lambda here: (
                shutil.copy(here / "out" / SECOND, here / "x") and os.replace(here / "x", here / "out" / SECOND)
            ),
            "files",
        ),
        (lambda here: os.utime(here / "ft" / SECOND, (1, 1)), "inputs"),
        (
            lambda here: (here / "out" / "lines_recipe.yaml").write_text(
                (here / "out" / "lines_recipe.yaml")
                .read_text()
                .replace("allow_nonfinite: false", "allow_nonfinite: true")
            ),
            "recipe",
        ),
    ],
    ids=["a file of the output was written", "another file in its place", "an input was written", "another recipe"],
)
def test_what_is_not_the_same_is_compared_anew(
    change: Callable[[Path], object], word: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And this is said."""
    all_of_it, _ = compared(monkeypatch)
    stop(monkeypatch, "--resume")
    change(here)
    again, ran = compared(monkeypatch, "--resume")
    assert again == all_of_it
    assert f"({word} differ)" in ran.err
    assert not (here / KEPT).exists()


@pytest.mark.slow
def test_a_time_that_was_set_back(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written in place, and given its old time, is not what was compared; of outputs and of inputs."""
    for name in ("out/model-00001-of-00002.safetensors", "ft/model-00001-of-00002.safetensors"):
        stop(monkeypatch, "--resume")
        there = (here / name).stat()
        flip(here / name, 2 * MIB)
        os.utime(here / name, ns=(there.st_atime_ns, there.st_mtime_ns))
        ran = run_lines("verify", "out", "--resume")
        assert ran.code in ((5,) if "out" in name else (0, 5))  # a last bit may be lost in rounding
        assert f"({'files' if 'out' in name else 'inputs'} differ" in " ".join(ran.err.split())
        flip(here / name, 2 * MIB)
        os.utime(here / name, ns=(there.st_atime_ns, there.st_mtime_ns))


@pytest.mark.slow
def test_what_an_earlier_run_compared_is_told(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, "--resume")
    assert "(8.8 MB of it by an earlier run)" in compared(monkeypatch, "--resume")[1].out
    assert "earlier" not in verifies("out").out


ODD_LINES: list[dict[str, Any]] = [
    {"start": float("inf")},
    {"start": True},
    {"start": 1},
    {"file": -1},
    {"blocks": ["00"]},
    {"blocks": 7},
    {"differs": [[0, 10**12]]},
    {"differs": [[0, 5 * MIB]]},
    {"differs": 5},
]
ODD_LINES_MORE: list[dict[str, Any]] = [
    {"start": 4.0},
    {"start": -4 * MIB},
    {"file": float("inf")},
    {"file": 99},
    {"file": "0"},
    {"blocks": []},
    {"blocks": None},
    {"differs": [[-1, 5]]},
    {"differs": [[1, 5]]},
    {"differs": [[0, 1.5]]},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    "odd", [*ODD_LINES, *(pytest.param(odd, marks=pytest.mark.slow) for odd in ODD_LINES_MORE)], ids=str
)
def test_odd_lines_are_passed_over(odd: dict[str, Any], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A journal whose checksums are right, and which no run would have written."""
    stop(monkeypatch, "--resume")
    first, *rest = [json.loads(line) for line in (here / KEPT).read_bytes().splitlines()]
    lines_of = [first, *(line | odd for line in rest)]
    (here / KEPT).write_bytes(b"".join(written_line({k: v for k, v in x.items() if k != "crc32"}) for x in lines_of))
    ran = run_lines("verify", "out", "--resume", "--json")
    assert (ran.code, ran.trace, ran.json["resumed"]) == (0, "", 0), ran.err


@pytest.mark.slow
@pytest.mark.parametrize(
    "step",
    [0, 4 * MIB + 1, float("inf"), None]
    + [pytest.param(step, marks=pytest.mark.slow) for step in (-1, 1, 2**70, "x", True, 4.0 * MIB)],
)
def test_an_odd_step_is_nothing_to_go_on_from(step: Any, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(monkeypatch, "--resume")
    lines_of = [json.loads(line) for line in (here / KEPT).read_bytes().splitlines()]
    lines_of[0]["step"] = step
    (here / KEPT).write_bytes(b"".join(written_line({k: v for k, v in x.items() if k != "crc32"}) for x in lines_of))
    ran = run_lines("verify", "out", "--resume", "--json")
    assert (ran.code, ran.trace, ran.json["resumed"]) == (0, "", 0), ran.err


ODD_MEASURED: list[tuple[str, Any]] = [
    ("thresholds", [["x", None, [0.5]]]),
    ("thresholds", [[9, None, [0.5]]]),
    ("thresholds", [[0, None, ["x"]]]),
    ("thresholds", 5),
    ("kept", [["x", 1]]),
    ("kept", [[1, 1]]),
    ("majority", "x"),
    ("majority", 7),
    ("l1", {"layers.0.w": [["x", 1], [1, 1]]}),
    ("l1", {"layers.0.w": []}),
    ("l1", []),
    ("sums", {"layers.0.w": [1, 2, None]}),
    ("norms", [1.0, 1.0, 0]),
    ("norms", ["1", 1.0, 2]),
    ("norms", 5),
]


@pytest.mark.parametrize(("key", "odd"), ODD_MEASURED, ids=str)
def test_odd_statistics_are_none(key: str, odd: Any) -> None:
    """What no measurement gives is not gone on from."""
    good = {
        "thresholds": [[0, None, (0.5,)]],
        "kept": [],
        "majority": 1,
        "l1": {},
        "sums": {},
        "norms": [1.0, 2.0, 2],
    }
    assert Statistics.of(good, 2).to_json() == good | {"kept": ()}
    with pytest.raises((KeyError, TypeError, ValueError, AttributeError)):
        Statistics.of(good | {key: odd}, 2)


@pytest.mark.slow
def test_a_read_that_fails_once_costs_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that hiccups: what was compared is kept, and named."""
    all_of_it, _ = compared(monkeypatch)
    ran = stop(monkeypatch, "--resume", error=CheckpointError("ft: cannot be read: Input/output error"))
    assert ran.code == 3
    assert KEPT in ran.err
    rest, _ = compared(monkeypatch, "--resume")
    assert rest < all_of_it
    assert not (here / KEPT).exists()


@pytest.mark.slow
def test_a_damaged_journal(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes before the damage holds; lines of another shape are passed over."""
    all_of_it, _ = compared(monkeypatch)
    stop(monkeypatch, "--resume", after=13)
    with open(here / KEPT, "ab") as file:
        file.write(b'{"file":99,"start":0,"blocks":[]}\n{"file":0,"start":-4,"blocks":[]}\n{"x":1}\n[]\n{"file":')
    rest, _ = compared(monkeypatch, "--resume")
    assert rest <= all_of_it - 8

    stop(monkeypatch, "--resume")
    content = (here / KEPT).read_bytes()
    (here / KEPT).write_bytes(content[:30])
    assert compared(monkeypatch, "--resume")[0] == all_of_it


@pytest.mark.slow
def test_a_second_run_is_refused(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the first holds the file; `lines clean` is, too. Without --resume there is nothing to be held."""
    stop(monkeypatch, "--resume")
    with open(here / KEPT) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for command in (["verify", "out", "--resume"], ["clean", "out"]):
            ran = run_lines(*command)
            assert (ran.code, ran.trace) == (6, "")
            assert "another run is verifying" in ran.err
        verifies("out")


def test_clean(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lines clean` removes it, and nothing that is somebody else's."""
    stop(monkeypatch, "--resume")
    ran = run_lines("clean", "out")
    assert ran.code == 0
    assert f"removed {here / KEPT}" in ran.err
    assert "nothing to remove" not in ran.err
    assert not (here / KEPT).exists()
    (here / KEPT).write_text("mine")
    assert "nothing to remove" in run_lines("clean", "out").err
    assert (here / KEPT).read_text() == "mine"


def other_things(kind: str, path: Path) -> None:
    if kind == "a file":
        path.write_text("mine")
    elif kind == "a link":
        path.with_name("target").write_text('{"verify":1}\n')
        path.symlink_to("target")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["a file", "a link", "a pipe", "a folder"])
def test_what_else_stands_there_is_left_alone(kind: str, here: Path) -> None:
    """Neither read, written nor removed."""
    other_things(kind, here / KEPT)
    ran = run_lines("verify", "out", "--resume")
    assert (ran.code, ran.trace) == (6, "")
    assert "is where --resume keeps its progress" in ran.err
    assert os.path.lexists(here / KEPT)
    if kind == "a link":
        assert (here / "target").read_text() == '{"verify":1}\n'
    assert run_lines("clean", "out").code == 0
    assert os.path.lexists(here / KEPT)


def test_a_folder_that_cannot_be_written(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error says that it is --resume that writes."""
    real = os.open

    def refusing(path: Any, flags: int, *args: Any, **more: Any) -> int:
        if str(path).endswith("-verified"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **more)

    monkeypatch.setattr(os, "open", refusing)
    with pytest.raises(OutputError, match="Permission denied") as refused:
        lines.verify("out", resume=True)
    assert KEPT in refused.value.message
    assert "--resume" in (refused.value.hint or "")


def test_the_hidden_name(tmp_path: Path) -> None:
    """It stands beside what a link leads to, and is no longer than a name may be."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "link").symlink_to("deep/out")
    assert verified_beside(tmp_path / "link") == tmp_path / "deep" / ".out.lines-verified"
    for length in (230, 236, 255):
        (tmp_path / verified_beside(tmp_path / ("x" * length)).name).write_text("")


def test_impossible_options(here: Path) -> None:
    """As elsewhere."""
    assert differs("out", "--device", "tpu", code=2).err
    with pytest.raises(RecipeError, match="no such input"):
        lines.verify("out", inputs={"x": "base"})


def test_digests_agree(here: Path) -> None:
    """What the recipe records is the digest of what lies there, by the definition."""
    for name, told in yaml.safe_load((here / "out" / "lines_recipe.yaml").read_text())["files"].items():
        assert file_digest(here / "out" / name) == told["digest"]
