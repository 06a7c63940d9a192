"""`lines merge --set`: what it overrules, makes and takes back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import lines_cli as lines
from support.recipes_of_merges import said
from support.run import run_lines

# --- --set ---


PLAIN = "base_model: /x/base\nmodels:\n  - model: /x/a\n  - model: /x/b\n    parameters: {weight: 0.5, density: 0.5}\n"


def loaded(tmp_path: Path, text: str, *sets: str) -> dict[str, Any]:
    """The recipe of a text with these overrides, as plain values."""
    (tmp_path / "merge.yaml").write_text(text)
    return lines.load_recipe(tmp_path / "merge.yaml", sets).model_dump(mode="json")


def at(values: Any, key: str) -> Any:
    for part in key.split("."):
        values = values[int(part)] if isinstance(values, list) else values[part]
    return values


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("merge_method", "ties", "ties"),
        ("dtype", "bfloat16", "bfloat16"),
        ("lines.beta", "0.4", 0.4),
        ("lines.beta", "4e-1", 0.4),
        ("models.0.parameters.weight", "0.3", 0.3),
        ("models.1.parameters.weight", "0.3", 0.3),
        ("models.1.parameters.weight", "[0, 0.5]", [0.0, 0.5]),
        ("models.0.model", "/x/c", "/x/c"),
        (
            "parameters.weight",
            "[{filter: mlp, value: 0.5}, {value: 2}]",
            [{"filter": "mlp", "value": 0.5}, {"value": 2.0}],
        ),
        ("parameters.normalize", "true", True),
        ("max_shard_size", "1KB", 1000),
        ("allow_nonfinite", "yes", True),
    ],
)
def test_set_overrules(key: str, given: str, value: Any, tmp_path: Path) -> None:
    """--set KEY=VALUE puts a YAML value where the key points, and makes the mappings on the way to it."""
    text = PLAIN + ("lines: {alpha: 0.1, beta: 9}\n" if key != "merge_method" else "")
    values = loaded(tmp_path, text, f"{key}={given}")
    assert at(values, key) == value
    before = loaded(tmp_path, text)
    top = key.partition(".")[0]
    assert {name: said for name, said in values.items() if name != top} == {
        name: said for name, said in before.items() if name != top
    }


def test_set_makes_what_is_missing(tmp_path: Path) -> None:
    """lines.beta can be set where the file has no lines, and a stack's ends below that."""
    values = loaded(tmp_path, PLAIN, "lines.beta=0.5", "lines.stacks.text.alpha=0.25")
    assert values["lines"]["beta"] == 0.5
    assert values["lines"]["stacks"] == {"text": {"alpha": 0.25, "beta": 0.75}}


def test_the_last_set_counts(tmp_path: Path) -> None:
    """Of two that set one key the later one counts, and a part can be set of what an earlier one set."""
    assert at(loaded(tmp_path, PLAIN, "lines.beta=1", "lines.beta=2"), "lines.beta") == 2
    values = loaded(tmp_path, PLAIN, "models=[{model: /x/c}, {model: /x/d}]", "models.1.parameters.weight=3")
    assert values["models"] == [{"model": "/x/c"}, {"model": "/x/d", "parameters": {"weight": 3.0}}]


@pytest.mark.parametrize("output", ["a=b", "a=b=c"])
def test_set_takes_a_value_with_an_equals_sign(output: str, tmp_path: Path) -> None:
    """Only the first = parts the key from the value."""
    (tmp_path / "merge.yaml").write_text(PLAIN)
    recipe = lines.load_recipe(tmp_path / "merge.yaml", [f"output={output}"])
    assert recipe.output is not None
    assert Path(recipe.output).name == output


def test_set_can_take_back(tmp_path: Path) -> None:
    """null unsays what the file says."""
    assert loaded(tmp_path, PLAIN + "lines: {beta: 1}\ndtype: float16\n", "lines=null", "dtype=")["lines"] is None


def test_set_changes_one_of_two_that_share_an_anchor(tmp_path: Path) -> None:
    """Where two models share their parameters by a YAML alias, setting one's leaves the other's as they are."""
    text = "base_model: /x/base\nmodels:\n- {model: /x/a, parameters: &same {weight: 1}}\n"
    values = loaded(tmp_path, text + "- {model: /x/b, parameters: *same}\n", "models.0.parameters.weight=0.25")
    assert [source["parameters"]["weight"] for source in values["models"]] == [0.25, 1.0]


def test_yaml_merge_keys(tmp_path: Path) -> None:
    """`<<: *same` takes over another model's parameters, and what stands beside it overrules them."""
    text = "base_model: /x/base\nmodels:\n- {model: /x/a, parameters: &same {weight: 0.5, density: 0.25}}\n"
    values = loaded(tmp_path, text + "- {model: /x/b, parameters: {<<: *same, weight: 2}}\n")
    assert values["models"][1]["parameters"] == {"weight": 2.0, "density": 0.25}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["KEY=VALUE"]),
        ("lines.beta", ["KEY=VALUE"]),
        ("=3", ["KEY=VALUE"]),
        ("lines..beta=1", ["KEY=VALUE"]),
        (".lines=1", ["KEY=VALUE"]),
        ("lines.=1", ["KEY=VALUE"]),
        ("dtype=[", ["YAML", "dtype=["]),
        ("dtype={a: 1, a: 2}", ["twice"]),
        ("dtype=2024-13-45", ["dtype=2024-13-45"]),
        ("dtype=!!int x", ["dtype=!!int x"]),
        ("dtype=" + "[" * 2000, ["YAML"]),
        ("dtype=!!python/name:os.system", ["YAML"]),
        ("models.2.model=x", ["models", "2"]),
        ("models.-1.model=x", ["models", "-1"]),
        ("models.first.model=x", ["models", "first"]),
        ("models.0.model.name=x", ["models.0.model"]),
        ("lines.bta=1", ["lines.bta", "lines.beta"]),
        ("modles.0.weight=1", ["modles"]),
        ("models.0.weight=1", ["models.0.weight", "parameters"]),
        ("dtype=int8", ["dtype", "int8"]),
        ("parameters.density=2", ["parameters.density", "2"]),
    ],
)
def test_a_bad_set_is_refused(text: str, words: list[str], tmp_path: Path) -> None:
    """What cannot be set is refused with the words of the command line and the way to write it."""
    (tmp_path / "merge.yaml").write_text(PLAIN)
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out", "--set", text)
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    assert [word for word in words if word not in said(ran)] == [], ran.err
    assert len(said(ran)) < 4000


@pytest.mark.parametrize("key", ["lines.beta", "dtype", "models.1.parameters.density", "parameters.weight"])
def test_a_value_from_set_is_not_blamed_on_the_file(key: str, tmp_path: Path) -> None:
    """A wrong value from the command line is said to come from --set, and not from a line that does not hold it."""
    (tmp_path / "merge.yaml").write_text(PLAIN + "lines:\n  beta: 1\ndtype: float16\nparameters:\n  weight: 1\n")
    message = said(run_lines("merge", "--config", tmp_path / "merge.yaml", "--set", f"{key}=much"))
    assert key in message
    assert "--set" in message
    assert not re.search(r"line \d", message), message


def test_set_leaves_other_lines_right(tmp_path: Path) -> None:
    """After --set a mistake in the file is still found on its own line."""
    (tmp_path / "merge.yaml").write_text(PLAIN + "lines:\n  beta: 1\n  gama: 2\n")
    message = said(run_lines("merge", "--config", tmp_path / "merge.yaml", "--set", "lines.beta=2"))
    assert "line 8: lines.gama" in message
