"""A recipe in an output folder names the models that were read, whatever links lead to them or to it: run again it
gives the same bytes, or an error; never another model.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.checkpoint.header import read_header
from lines_cli.errors import ChangedInputError, RecipeError
from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.run import run_lines


def model(path: Path, seed: int) -> Path:
    """A small checkpoint that is like no other."""
    chance = torch.Generator().manual_seed(seed)
    tensors = {f"layers.{n}.w": torch.randn(40, generator=chance) for n in range(3)}
    return write_checkpoint(path, tensors, config={"model_type": "tiny"})


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`here` with base, ft and ft2; `there`, with others of the same names; each with a link into the other's depth."""
    for number, side in enumerate(("here", "there")):
        for seed, name in enumerate(("base", "ft", "ft2")):
            model(tmp_path / side / name, 10 * number + seed)
        (tmp_path / side / "deep" / "inner").mkdir(parents=True)
    (tmp_path / "here" / "link").symlink_to("../there/deep", target_is_directory=True)
    (tmp_path / "there" / "link").symlink_to("../here/deep", target_is_directory=True)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def weights(out: Path | str) -> bytes:
    return (Path(out) / "model.safetensors").read_bytes()


def record(out: Path | str) -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load((Path(out) / "lines_recipe.yaml").read_text())
    return told


def edit(base: str, ft: str, out: str) -> Path:
    ran = run_lines("edit", base, ft, "-o", out)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return Path(out)


def merge(values: dict[str, Any], out: str) -> Path:
    Path("merge.yaml").write_text(yaml.safe_dump(values))
    ran = run_lines("merge", "--config", "merge.yaml", "-o", out)
    assert (ran.code, ran.trace) == (0, ""), ran.err
    return Path(out)


def runs_again(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe gives the same bytes, from whatever folder it is run."""
    path = out.absolute()
    again = path.with_name("again")
    for folder in (Path.cwd(), Path("/")):
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            ran = run_lines("merge", "--config", path / "lines_recipe.yaml", "-o", again)
            assert (ran.code, ran.trace) == (0, ""), ran.err
            assert weights(again) == weights(path)
            shutil.rmtree(again)


@by_turns(
    ends=[
        ("link/../base", "out"),
        ("link/../../here/base", "out"),
        ("base", "link/out"),
        ("link/../base", "link/../out"),
        ("link/../base", "new/parents/out"),
        ("link/../base", "link/new/parents/out"),
        ("base/", "./out/"),
        ("deep/inner/../../base", "deep/out"),
        ("link/../base/model.safetensors", "out"),
    ],
    absolute=[False, True],
)
@pytest.mark.slow
def test_links_on_the_way(ends: tuple[str, str], absolute: bool, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands behind a link is named by where it is, not by the words of its path."""
    base, out = ends
    before = f"{here}/" if absolute else ""
    runs_again(edit(before + base, before + "ft", before + out), monkeypatch)
    named = record(out)["base_model"]
    assert os.path.isabs(named) == absolute
    assert "link" not in Path(named).parts
    assert os.path.samefile(os.path.join(os.path.realpath(out), named), base)


def test_the_output_is_a_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe counts from the folder that it comes to stand in."""
    (here / "out").symlink_to("../there/deep/inner", target_is_directory=True)
    runs_again(edit("base", "ft", "out"), monkeypatch)
    assert record("../there/deep/inner")["base_model"] == "../../../here/base"


@pytest.mark.slow
def test_the_current_folder_is_behind_a_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`..` from it is where the system goes, and so do the names."""
    (here.parent / "way").symlink_to("there/deep/inner", target_is_directory=True)
    monkeypatch.chdir(here.parent / "way")
    monkeypatch.setenv("PWD", str(here.parent / "way"))
    out = edit("../../base", "../../ft", "out")
    runs_again(out, monkeypatch)
    assert record(out)["base_model"] == "../../../base"


@pytest.mark.slow
def test_a_link_that_leads_elsewhere_later(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`latest` was one version, and that is the one recorded."""
    (here / "latest").symlink_to("base")
    for given in ("latest", f"{here}/latest"):
        out = edit(given, "ft", "out")
        (here / "latest").unlink()
        (here / "latest").symlink_to("ft2")
        runs_again(out, monkeypatch)
        (here / "latest").unlink()
        (here / "latest").symlink_to("base")
        shutil.rmtree(out)


@pytest.mark.slow
def test_inputs_and_output_move_together(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was given relatively is found again in another place, and nothing of the old place is needed."""
    out = edit("base", "ft", "out")
    expected = weights(out)
    here.rename(here.parent / "moved")
    model(here / "base", 77)
    monkeypatch.chdir(here.parent)
    runs_again(here.parent / "moved" / "out", monkeypatch)
    assert weights(here.parent / "moved" / "out") == expected


def test_a_recipe_that_was_moved_alone(here: Path) -> None:
    """Its relative names lead nowhere then, and that is an error."""
    out = edit("base", "ft", "out")
    (here.parent / "elsewhere" / "a").mkdir()
    shutil.copy(out / "lines_recipe.yaml", here.parent / "elsewhere" / "a")
    ran = run_lines("merge", "--config", here.parent / "elsewhere" / "a" / "lines_recipe.yaml", "-o", "again")
    assert (ran.code, ran.trace) == (3, "")
    assert "base" in ran.err


def recipe_elsewhere(out: Path, here: Path) -> Path:
    """The recipe, moved to where its paths lead to other models of the same names."""
    moved = here.parent / "there" / "again" / "lines_recipe.yaml"
    moved.parent.mkdir()
    shutil.copy(out / "lines_recipe.yaml", moved)
    return moved


def notes(*args: object, code: int = 0) -> str:
    ran = run_lines("merge", *args)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    return " ".join(ran.err.split())


@pytest.mark.slow
def test_a_moved_recipe_that_finds_other_models(here: Path) -> None:
    """Other sizes and headers are told; of other times alone it is only said that the times differ."""
    recipe = recipe_elsewhere(edit("base", "ft", "out"), here)
    ft = here.parent / "there" / "ft"
    told = notes("--config", recipe, "-o", "again")
    assert "and 1 more: by the time of its last change not the file that the recipe records" in told
    assert "is not the file" not in told
    shutil.rmtree(ft)
    write_checkpoint(ft, {f"layers.{n}.w": torch.ones(40, dtype=torch.bfloat16) for n in range(3)})
    told = notes("--config", recipe, "-o", "again", "--force", "--dry-run")
    assert "/again/../ft/model.safetensors is not the file that the recipe records: it has " in told
    shutil.copy("ft/model.safetensors", ft)
    for model in (ft, ft.with_name("base")):
        path = model / "model.safetensors"
        path.write_bytes(path.read_bytes().replace(b'"pt"', b'"np"'))
    assert "its header is sha256:" in notes("--config", recipe, "-o", "again", "--dry-run", "--force")
    own = notes("--config", "out/lines_recipe.yaml", "-o", "again2")
    assert "recipe records" not in own


@pytest.mark.slow
def test_a_moved_recipe_with_digests(here: Path) -> None:
    """With --verify-inputs what the record has digests of has to hold just that; from Python, too."""
    ran = run_lines("edit", "base", "ft", "-o", "out", "--verify-inputs")
    assert ran.code == 0
    recipe = recipe_elsewhere(Path("out"), here)
    notes("--config", recipe, "-o", "again")
    told = notes("--config", recipe, "-o", "again2", "--verify-inputs", code=3)
    assert "the inputs are not those that the recipe records" in told
    assert "again/../base/model.safetensors holds sha256-tree" in told
    assert not Path("again2").exists()
    with pytest.raises(ChangedInputError):
        lines.merge(recipe, output="again2", verify_inputs=True)
    notes("--config", "out/lines_recipe.yaml", "-o", "again2", "--verify-inputs")
    values = yaml.safe_load(Path("out/lines_recipe.yaml").read_text().replace("../", ""))
    shutil.copy(here.parent / "there" / "ft" / "model.safetensors", "ft")
    with pytest.raises(ChangedInputError):
        lines.merge(values, output="again3", verify_inputs=True)


@pytest.mark.slow
def test_a_record_that_a_recipe_overrules(here: Path) -> None:
    """Another model by --set is told as not recorded; a recipe of any shape of record is run."""
    out = edit("base", "ft", "out")
    told = notes("--config", out / "lines_recipe.yaml", "-o", "again", "--set", "models.0.model=../ft2")
    assert "it is not recorded" in told
    text = (out / "lines_recipe.yaml").read_text().partition("# What was read")[0]
    for number, odd in enumerate(("{x: 5}", "{../base/model.safetensors: 5}", "{../base: {bytes: x, header: []}}")):
        (out / "odd.yaml").write_text(text + f"inputs: {odd}\n")
        notes("--config", out / "odd.yaml", "-o", f"odd{number}", "--verify-inputs")


@pytest.mark.parametrize("name", ["org/name@feature/x", "org/name@refs/pr/1", "org/name@main", "org/name"])
def test_a_revision_with_a_slash(name: str, here: Path) -> None:
    """A recipe's Hub id stays one, however its revision is called."""
    Path("merge.yaml").write_text(yaml.safe_dump({"base_model": name, "models": [{"model": "ft"}]}))
    assert lines.load_recipe(Path("merge.yaml")).base_model == name
    (here / "org").mkdir()
    (here / "a@b").mkdir()
    for path in ("a@b/c", "./org/name@feature/x", "org/name/deeper", "org/name/deep@er"):
        Path("merge.yaml").write_text(yaml.safe_dump({"base_model": path, "models": [{"model": "ft"}]}))
        base = lines.load_recipe(Path("merge.yaml")).base_model
        assert base is not None
        assert base in (path, f"./{path}")


@pytest.mark.parametrize(
    "name",
    [
        "b\u00e4se \u6a21\u578b",
        "~base",
        "#x: y",
        "null",
        "*",
        "line\nbreak",
        "\udc80x",
        "'\"",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("my base", "-base", "a+b", "a@b", "1e3", "a%b")),
    ],
    ids=ascii,
)
@pytest.mark.slow
def test_odd_names(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any name that a system gives a folder comes back from the recipe as it was."""
    (here / "base").rename(here / name)
    out = edit(f"./{name}", "ft", "out")
    runs_again(out, monkeypatch)
    assert record(out)["base_model"] == f"../{name}"
    assert f"../{name}/model.safetensors" in record(out)["inputs"]
    runs_again(edit(str(here / name), "ft", "out2"), monkeypatch)


def test_shards_of_one_name_in_two_folders(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has an entry under `inputs`, with its own size and header."""
    parts = {"a": {"layers.0.w": torch.ones(40)}, "b": {"layers.1.w": torch.ones(40), "layers.2.w": torch.ones(40)}}
    for part, tensors in parts.items():
        write_checkpoint(here / "sharded" / part / "model.safetensors", tensors)
    weight_map = {name: f"{part}/model.safetensors" for part, tensors in parts.items() for name in tensors}
    (here / "sharded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    out = edit("sharded", "ft", "out")
    inputs = record(out)["inputs"]
    assert inputs.keys() == {f"../{name}/model.safetensors" for name in ("sharded/a", "sharded/b", "ft")}
    for name, told in inputs.items():
        path = out / name
        assert (told["bytes"], told["header"]) == (path.stat().st_size, read_header(path).digest)
    runs_again(out, monkeypatch)


@pytest.mark.slow
def test_one_model_twice(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It counts twice, is recorded once, and counts twice again."""
    out = merge(
        {"merge_method": "average", "base_model": "base", "models": [{"model": m} for m in ("ft", "ft2", "ft")]}, "out"
    )
    assert [source["model"] for source in record(out)["models"]] == ["../ft", "../ft2", "../ft"]
    assert len(record(out)["inputs"]) == 3
    runs_again(out, monkeypatch)


@pytest.mark.slow
def test_a_tokenizer_and_a_template_of_an_input(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are named as the input is."""
    (here / "ft2" / "tokenizer.json").write_text("{}")
    (here / "ft2" / "chat_template.jinja").write_text("{{x}}")
    values = {"base_model": "base", "models": [{"model": "ft"}, {"model": "./ft2"}], "merge_method": "average"}
    out = merge(values | {"tokenizer_source": "deep/../ft2", "chat_template": "ft2"}, "link/out")
    told = record(out)
    assert told["tokenizer_source"] == told["chat_template"] == told["models"][1]["model"] == "../../../here/ft2"
    runs_again(out, monkeypatch)


def test_a_base_under_two_names_is_refused(here: Path) -> None:
    """Read from a recipe it has one name and is left out of the models; so it must not count as one before."""
    from lines_cli.recipe.validate import make_recipe

    values = {
        "merge_method": "average",
        "base_model": "base",
        "models": [{"model": "link/../../here/base"}, {"model": "ft"}],
    }
    recipe = make_recipe(values, where="here")
    with pytest.raises(RecipeError, match="one checkpoint") as refused:
        lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    assert "base_model base and link/../../here/base" in refused.value.message
    merged = merge(values, "out")
    assert len(record(merged)["inputs"]) == 2


@pytest.mark.slow
def test_a_fine_tune_that_is_its_base(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing hangs on the name of a single model."""
    runs_again(edit("base", "./base", "out"), monkeypatch)


@pytest.fixture
def cached(here: Path) -> Path:
    """A snapshot as the Hub's cache keeps it: links to files that are called by their digests."""
    folder = here / "hub" / "models--org--the-model"
    snapshot, blobs = folder / "snapshots" / ("c0ffee" * 7)[:40], folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in (here / "base").iterdir():
        shutil.move(file, blobs / f"{len(file.name):064x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{len(file.name):064x}")
    return snapshot


@pytest.mark.slow
@pytest.mark.parametrize("lone", [False, True])
def test_a_folder_of_the_hubs_cache(lone: bool, cached: Path, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is named by its path, its files by their names there; the model card names the model."""
    given = str(cached.relative_to(here) / "model.safetensors") if lone else str(cached.relative_to(here))
    out = edit(given, "ft", "out")
    assert record(out)["base_model"] == f"../{given}"
    assert f"../{cached.relative_to(here)}/model.safetensors" in record(out)["inputs"]
    assert yaml.safe_load((out / "README.md").read_text().split("---")[1])["base_model"] == ["org/the-model"]
    runs_again(out, monkeypatch)


def test_a_lone_file_behind_a_link(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own name counts where weights are called by it; else the file's."""
    (here / "diffusion_pytorch_model.safetensors").symlink_to("ft/model.safetensors")
    (here / "mine.safetensors").symlink_to("base/model.safetensors")
    ran = run_lines("edit", "mine.safetensors", "diffusion_pytorch_model.safetensors", "-o", "out")
    assert ran.code == 0, ran.err
    told = record("out")
    assert told["base_model"] == "../base/model.safetensors"
    assert told["models"][0]["model"] == "../diffusion_pytorch_model.safetensors"
    ran = run_lines("merge", "--config", "out/lines_recipe.yaml", "-o", "again")
    assert ran.code == 0, ran.err
    assert {n: c for n, c in snapshot(here / "again").items() if "safe" in n} == {
        n: c for n, c in snapshot(here / "out").items() if "safe" in n
    }


def test_an_output_named_by_dots(here: Path) -> None:
    """The model card's title is the folder's name."""
    edit("base", "ft", "link/..//../here/deep/inner/../inner/.")
    assert "# inner\n" in (here / "deep" / "inner" / "README.md").read_text()
