"""A recipe: what it takes, what it refuses, and that it comes back as it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.errors import RecipeError
from lines_cli.recipe.schema import Recipe, parse_size
from lines_cli.recipe.validate import edit_recipe, make_recipe
from lines_cli.recipe.yaml_file import dump_recipe, load_recipe
from support.files import write_checkpoint
from support.run import run_lines

CONFIGS = Path(__file__).parents[2] / "configs"
PLAIN: dict[str, Any] = {"base_model": "base", "models": [{"model": "ft"}]}


# --- sizes ---

SIZES = {
    "5GB": 5_000_000_000,
    "5gb": 5_000_000_000,
    "500MB": 500_000_000,
    "1KB": 1000,
    "2TB": 2_000_000_000_000,
    "1.5 GB": 1_500_000_000,
    "0.5kb": 500,
    " 7 B ": 7,
    "2GiB": 2 * 2**30,
    "1KiB": 1024,
    "3MIB": 3 * 2**20,
    "1TiB": 2**40,
    "4096": 4096,
    4096: 4096,
    9007199254740993: 9007199254740993,
}


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str | int, size: int) -> None:
    """Decimal units, binary units with an i, and plain numbers are bytes, to the byte."""
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "5 apples", "-1GB", "0", "0GB", "0.1B", "1e9", "nan", "inf", "5GB5", "5,000", "9" * 400 + "GB"]
)
def test_no_sizes(text: str) -> None:
    """What is no size, or less than a byte, is a ValueError that shows how one is written."""
    with pytest.raises(ValueError, match="5GB"):
        parse_size(text)


# --- defaults ---


@pytest.mark.parametrize(
    ("given", "alpha", "beta"),
    [
        ({}, 0.1, 0.9),
        ({"alpha": 0.25}, 0.25, 0.75),
        ({"alpha": 1}, 1.0, 0.0),
        ({"alpha": 1.5}, 1.5, -0.5),
        ({"beta": 0.3}, 0.1, 0.3),
        ({"alpha": 0.25, "beta": 0}, 0.25, 0.0),
        ({"alpha": "2.5e-1"}, 0.25, 0.75),  # as YAML 1.1 leaves `2.5e-1`
    ],
)
def test_beta_is_what_alpha_leaves(given: dict[str, Any], alpha: float, beta: float) -> None:
    """In an edit beta is 1 - alpha unless it is given."""
    scaling = edit_recipe("base", "ft", **given).lines
    assert scaling is not None
    assert (scaling.alpha, scaling.beta, scaling.gamma) == (alpha, beta, 1.0)


def test_in_a_recipe_alpha_is_measured_and_beta_is_said() -> None:
    """`lines:` of a recipe has alpha: auto by default, and no beta; without `lines:` nothing is scaled over depth."""
    scaling = make_recipe({**PLAIN, "lines": {"beta": 0.4}}, where="test").lines
    assert scaling is not None
    assert (scaling.alpha, scaling.beta) == ("auto", 0.4)
    assert make_recipe(PLAIN, where="test").lines is None
    with pytest.raises(RecipeError, match="beta is missing"):
        make_recipe({**PLAIN, "lines": {"alpha": 0.4}}, where="test")


# --- refusals ---

WRONG: dict[str, tuple[Any, list[str]]] = {
    "empty": ({}, ["models"]),
    "no base": ({"models": [{"model": "ft"}]}, ["base_model"]),
    "no models": ({"base_model": "base"}, ["models"]),
    "models empty": ({**PLAIN, "models": []}, ["models"]),
    "models a name": ({**PLAIN, "models": "ft"}, ["models", "ft"]),
    "model without a name": ({**PLAIN, "models": [{}]}, ["models.0.model"]),
    "weights of a model": ({**PLAIN, "models": [{"model": "ft", "weight": 1}]}, ["weight"]),
    "base a date": ({**PLAIN, "base_model": yaml.safe_load("2024-01-01")}, ["base_model"]),
    "base a number": ({**PLAIN, "base_model": 7}, ["base_model", "7"]),
    "misspelt at the top": ({**PLAIN, "dtpye": "float32"}, ["dtpye", "mean dtype"]),
    "misspelt below": ({**PLAIN, "lines": {"alhpa": 0.1}}, ["lines.alhpa", "mean lines.alpha"]),
    "nothing like it": ({**PLAIN, "xyzzy": 1}, ["xyzzy"]),
    "a number for a key": ({**PLAIN, 1: 2}, ["1"]),
    "another method": ({**PLAIN, "merge_method": "tiles"}, ["merge_method", "tiles", "mean ties"]),
    "another dtype": ({**PLAIN, "dtype": "int8"}, ["dtype", "int8"]),
    "missing guessed": ({**PLAIN, "missing": "guess"}, ["missing", "guess"]),
    "NaN": ({**PLAIN, "lines": {"alpha": float("nan")}}, ["lines.alpha", "nan", "finite"]),
    "NaN spelt": ({**PLAIN, "lines": {"beta": "nan"}}, ["lines.beta", "nan"]),
    "Inf": ({**PLAIN, "lines": {"gamma": float("-inf")}}, ["lines.gamma", "inf", "finite"]),
    "a word": ({**PLAIN, "lines": {"alpha": "much"}}, ["lines.alpha", "much"]),
    "yes": ({**PLAIN, "lines": {"alpha": True}}, ["lines.alpha", "True"]),
    "null": ({**PLAIN, "lines": {"alpha": None}}, ["lines.alpha"]),
    "power zero": ({**PLAIN, "lines": {"schedule": "power:0"}}, ["lines.schedule", "power:0"]),
    "power NaN": ({**PLAIN, "lines": {"schedule": "power:nan"}}, ["lines.schedule", "power:nan"]),
    "no coefficients": ({**PLAIN, "lines": {"schedule": []}}, ["lines.schedule"]),
    "coefficients with NaN": ({**PLAIN, "lines": {"schedule": "0.1,nan"}}, ["lines.schedule", "nan"]),
    "coefficients and alpha": ({**PLAIN, "lines": {"schedule": "0,1", "alpha": 0}}, ["alpha", "schedule"]),
    "a filter's NaN": ({**PLAIN, "lines": {"filter": {"norm": "nan"}}}, ["lines.filter.norm", "nan"]),
    "a filter's word": ({**PLAIN, "lines": {"filter": {"norm": "drop"}}}, ["lines.filter.norm", "drop"]),
    "a stack's number": ({**PLAIN, "lines": {"stacks": {"text": 0.5}}}, ["lines.stacks.text", "0.5"]),
    "a stack's Inf": ({**PLAIN, "lines": {"stacks": {"text": {"alpha": "inf"}}}}, ["lines.stacks.text.alpha", "inf"]),
    "size zero": ({**PLAIN, "max_shard_size": 0}, ["max_shard_size", "5GB"]),
    "size negative": ({**PLAIN, "max_shard_size": -5}, ["max_shard_size", "-5"]),
    "size true": ({**PLAIN, "max_shard_size": True}, ["max_shard_size", "True"]),
    "lines a list": ({**PLAIN, "lines": []}, ["lines"]),
}


@pytest.mark.parametrize(("values", "words"), WRONG.values(), ids=WRONG)
def test_refuses(values: Any, words: list[str]) -> None:
    """An impossible value or an unknown key is refused by its place and its value, and no more than once."""
    with pytest.raises(RecipeError) as refused:
        make_recipe(values, where="there")
    message = refused.value.message
    assert message.startswith("there: ")
    assert [word for word in words if word not in message] == []
    assert len(message) < 500


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "not a recipe"),
        (b"just words", "not a recipe"),
        (b"a: [", "YAML"),
        (b"a: \xff", "YAML"),
        (b"a: \0", "YAML"),
        (b"[" * 1200, "YAML"),
        (b"{" * 1200, "YAML"),
        (b"a: !!python/object/apply:os.system ['true']", "YAML"),
        (b"a: 1\n---\nb: 2", "YAML"),
    ],
)
def test_refuses_a_file(content: bytes, word: str, tmp_path: Path) -> None:
    """What is no recipe in YAML is refused with the file's name, and nothing in it is run."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError) as refused:
        load_recipe(path)
    assert str(path) in refused.value.message
    assert word in refused.value.message


def test_refuses_what_cannot_be_opened(tmp_path: Path) -> None:
    """A missing file and a folder are refused by name."""
    for path in (tmp_path, tmp_path / "absent.yaml"):
        with pytest.raises(RecipeError, match=str(path)):
            load_recipe(path)


# --- there and back ---

FULL: list[dict[str, Any]] = [
    {},
    {"lines": {"alpha": 0.1 + 0.2, "beta": 1e-17, "gamma": -2.5}},
    {"lines": {"alpha": 1e-5, "beta": 0.5}},  # YAML's floats want a dot: 1.0e-05
    {"lines": {"beta": 0, "layers": r"^(?P<stack>[\w ]+): \"(?P<index>\d+)'#"}},
    {"dtype": "bfloat16", "missing": "copy", "resize": "base", "allow_nonfinite": True},
    {"lines": {"beta": 1, "schedule": "power:2.5", "outside": "position", "gamma": 0.5}},
    {"lines": {"schedule": [0.1, 0.6, 1], "filter": {"norm": 0.5, ".*": "keep", "*": "base"}}},
    {
        "lines": {
            "alpha": "auto",
            "beta": 0.5,
            "stacks": {"a": {"alpha": 0.2}, "b.c": {"alpha": 0.2, "beta": 0.1}, "d": "keep"},
        }
    },
    {"max_shard_size": "2GiB"},
    {"max_shard_size": 9007199254740993},
]
NAMES = ["base", "../a b/c: #d", "org/name@0123456789012345678901234567890123456789", "重み", "123", "no", "\udce9t\n"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("settings", FULL)
def test_round_trip(settings: dict[str, Any], name: str, tmp_path: Path) -> None:
    """A recipe that was written is read again as the same value, to the last bit; its paths count from its folder."""
    recipe = make_recipe({**PLAIN, **settings, "base_model": name}, where="test")
    path = tmp_path / "recipe.yaml"
    path.write_bytes(dump_recipe(recipe, named={}).encode())
    counted = {
        "base_model": name if name.startswith("org/") else f"{tmp_path}/{name}",
        "models": [{"model": f"{tmp_path}/ft"}],
    }
    assert load_recipe(path) == make_recipe({**PLAIN, **settings, **counted}, where="test")
    assert make_recipe(recipe.model_dump(mode="json"), where="test") == recipe


def test_what_is_written_is_plain_yaml() -> None:
    """The keys are mergekit's where mergekit has them, and beta stands there spelt out."""
    recipe = edit_recipe("base", "ft", alpha=0.25, dtype="float32")
    values = yaml.safe_load(dump_recipe(recipe, named={"base": "../base", "ft": "org/ft@main"}))
    assert values["merge_method"] == "task_arithmetic"
    assert values["base_model"] == "../base"
    assert values["models"] == [{"model": "org/ft@main"}]
    assert (values["lines"]["alpha"], values["lines"]["beta"], values["lines"]["gamma"]) == (0.25, 0.75, 1.0)
    assert values["dtype"] == "float32"
    assert values["max_shard_size"] == 5_000_000_000


def test_frozen() -> None:
    """A recipe does not change once it is made."""
    recipe = make_recipe(PLAIN, where="test")
    assert isinstance(recipe, Recipe)
    with pytest.raises(ValueError, match="frozen"):
        recipe.dtype = "float32"  # type: ignore[misc]


# --- paths in a recipe ---


@pytest.mark.parametrize(("name", "found"), [("base", "here/base"), ("../up", "here/../up"), ("./base", "here/base")])
def test_paths_count_from_the_file(name: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is one beside the recipe, wherever the command is run; there is another one to mislead it."""
    for folder in ("here/base", "up", "base"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "here" / "recipe.yaml").write_text(yaml.safe_dump({**PLAIN, "base_model": name}))
    monkeypatch.chdir(tmp_path)
    assert Path(load_recipe(Path("here/recipe.yaml")).base_model) == Path(found)


@pytest.mark.parametrize("name", ["/absent/base", "org/name", "org/name@main"])
def test_what_is_not_beside_the_file_stays_as_it_is(name: str, tmp_path: Path) -> None:
    """Absolute paths and Hub ids are not touched."""
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({**PLAIN, "base_model": name}))
    assert load_recipe(path).base_model == name


@pytest.mark.parametrize("name", ["./base", "base", "../desk/base"])
def test_what_is_not_beside_the_file_is_not_looked_for_elsewhere(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A path that is missing beside the recipe is not replaced by one that happens to fit the working directory."""
    tensors = {f"layers.{i}.w": torch.ones(2) for i in range(2)}
    write_checkpoint(tmp_path / "desk" / "base", tensors)
    write_checkpoint(tmp_path / "moved" / "far" / "ft", tensors)
    path = tmp_path / "moved" / "far" / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": name, "models": [{"model": "ft"}]}))
    monkeypatch.chdir(tmp_path / "desk")
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out", "--dry-run")
    assert (ran.code, ran.out, ran.trace) == (3, "", "")
    assert name in ran.err


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGS.glob("*.yaml")))
def test_the_configs_run(name: str, tmp_path: Path) -> None:
    """Every file in configs/ runs as it is on the checkpoints that it names, and its comment says how."""
    shutil.copy(CONFIGS / name, tmp_path / name)
    names = [f"{stack}.block.{i}.w" for stack in ("encoder", "decoder") for i in range(3)]
    said = yaml.safe_load((CONFIGS / name).read_text(encoding="utf-8"))
    for number, side in enumerate([said["base_model"], *(source["model"] for source in said["models"])]):
        write_checkpoint(tmp_path / side, {name: torch.arange(number, number + 2.0) ** 2 for name in names})
    ran = run_lines("merge", "--config", tmp_path / name, "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert f"lines merge --config {name} -o out" in (CONFIGS / name).read_text(encoding="utf-8")
