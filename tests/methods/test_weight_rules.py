"""`weight: nan` and `weight: equal_norm`, against the norms of whole task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import LinesError
from lines_cli.methods import METHODS
from lines_cli.recipe.validate import make_recipe
from support.adapters import factors, layers_of, write_adapter
from support.files import write_checkpoint
from support.method_cases import TYPICAL
from support.run import run_lines
from support.schedules import refused

Tensors = dict[str, torch.Tensor]
SIZES = {"a": 0.01, "b": 0.2, "c": 0.05}
SHAPES = {"embed.weight": (9, 5), **{f"layers.{n}.{k}": s for n in range(3) for k, s in (("w", (6, 5)), ("b", (6,)))}}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and three fine-tunes, of which some changed much more than others."""
    chance = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "base", base)
    for name, size in SIZES.items():
        write_checkpoint(
            tmp_path / name, {key: t + size * torch.randn(t.shape, generator=chance) for key, t in base.items()}
        )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def norms() -> list[float]:
    """Of the whole task vectors, as float32 has them."""
    base, *others = (load_file(f"{name}/model.safetensors") for name in ("base", *SIZES))
    squares = [sum(float((o[name] - base[name]).double().square().sum()) for name in base) for o in others]
    return [square**0.5 for square in squares]


def expected(rule: str) -> list[float]:
    n = norms()
    if rule == "nan":
        return [1 / one / sum(1 / other for other in n) for one in n]
    return [sum(n) / len(n) / one for one in n]


def asked(weight: Any, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in SIZES],
        "parameters": {"weight": weight},
        **more,
    }


def recorded(out: str = "out") -> list[float]:
    values = yaml.safe_load(Path(out, "lines_recipe.yaml").read_text())
    assert "weight" not in values.get("parameters", {})
    return [source["parameters"]["weight"] for source in values["models"]]


def weights_of(out: str) -> bytes:
    return Path(out, "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["nan", "equal_norm"])
def test_the_weights_are_those_of_the_norms(rule: str, here: Path) -> None:
    """Recorded as numbers; the result is the weighted sum, to the bit; verify and the record make it again."""
    told = lines.merge(asked(rule), output="out")
    assert recorded() == pytest.approx(expected(rule), rel=1e-12)
    assert [model["weight"][0] for model in told["models"]] == recorded()
    base, *others = (load_file(f"{name}/model.safetensors") for name in ("base", *SIZES))
    for name, tensor in load_file("out/model.safetensors").items():
        total = torch.zeros(())
        for number, (other, weight) in enumerate(zip(others, recorded(), strict=True)):
            part = (other[name] - base[name]) * weight
            total = part if number == 0 else total + part
        assert torch.equal(tensor, base[name] + total)
    assert run_lines("verify", "out").code == 0
    assert run_lines("merge", "--config", "out/lines_recipe.yaml", "-o", "again").code == 0
    assert weights_of("out") == weights_of("again")
    assert f"# weight was {rule}" in Path("out/lines_recipe.yaml").read_text()


def test_what_they_are_for(here: Path) -> None:
    """An average of nan sums to 1; with equal_norm all weighted task vectors have the mean norm."""
    lines.merge(asked("nan"), output="nan")
    lines.merge(asked("equal_norm"), output="equal")
    assert sum(recorded("nan")) == pytest.approx(1, rel=1e-15)
    mean = sum(norms()) / 3
    assert [weight * norm for weight, norm in zip(recorded("equal"), norms(), strict=True)] == pytest.approx([mean] * 3)


@pytest.mark.parametrize("written", [".nan", "nan", "NaN", ".NaN", "'nan'", "NAN"])
def test_however_yaml_has_it(written: str, here: Path) -> None:
    """As text, or as what YAML takes for a number that is none; from --set, too."""
    Path("m.yaml").write_text(yaml.safe_dump(asked("HERE")).replace("HERE", written))
    assert run_lines("merge", "--config", "m.yaml", "-o", "out").code == 0
    assert recorded() == pytest.approx(expected("nan"), rel=1e-12)
    ran = run_lines("merge", "--config", "m.yaml", "--set", f"parameters.weight={written}", "-o", "set")
    assert ran.code == 0, ran.err
    assert weights_of("set") == weights_of("out")


WITH_RULES = [
    case
    for case, (method, _) in TYPICAL.items()
    if case.endswith("-0") and "weight" in METHODS[method].parameters and METHODS[method].parameters["weight"].rules
]


@pytest.mark.parametrize("case", WITH_RULES)
@pytest.mark.some(6)
def test_every_method_takes_them_as_numbers(case: str, here: Path) -> None:
    """What is measured after it, alpha and thresholds among it, rests on the numbers."""
    method, said = TYPICAL[case]
    lined = {"lines": {"beta": 0.3, "alpha": "auto"}}
    by_rule = asked("nan", method, **lined)
    by_rule["parameters"] = {**said, "weight": "nan"}
    lines.merge(by_rule, output="out")
    numbers = asked(1, method, **lined)
    numbers["parameters"] = {key: value for key, value in said.items() if key != "weight"}
    for source, weight in zip(numbers["models"], recorded(), strict=True):
        source["parameters"] = {"weight": weight}
    lines.merge(numbers, output="numbers")
    assert weights_of("out") == weights_of("numbers")


def test_every_sum_of_task_vectors_has_them() -> None:
    """Of methods that count models by a weight those for task vectors; nuslerp's says how far along an arc."""
    without = {name for name, method in METHODS.items() if method.counts_by and not method.parameters["weight"].rules}
    assert without == {"linear", "nuslerp"}


@pytest.mark.slow
def test_chunks_and_workers_change_no_byte(here: Path) -> None:
    """Norms are summed in one order."""
    recipe = make_recipe(asked("nan"), where="here")

    def merged(out: str, **resources: Any) -> list[float]:
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(out))
        lines.run(plan, lines.Resources(device="cpu", **resources))
        return recorded(out)

    plain = merged("plain", workers=1)
    assert merged("small", workers=3, chunk=1) == plain
    assert merged("sevens", workers=2, chunk=7) == plain
    assert weights_of("small") == weights_of("sevens") == weights_of("plain")


def test_of_some_models(here: Path) -> None:
    """A rule of some models is about these; the base among them has none; one alone is itself."""
    entry = asked("nan")
    entry["models"] = [
        {"model": "a", "parameters": {"weight": 0.25}},
        {"model": "base"},
        {"model": "b"},
        {"model": "c", "parameters": {"weight": "nan"}},
    ]
    lines.merge(entry, output="out")
    _, b, c = norms()
    values = yaml.safe_load(Path("out/lines_recipe.yaml").read_text())["models"]
    assert values[0]["parameters"]["weight"] == 0.25
    assert "parameters" not in values[1]
    assert [source["parameters"]["weight"] for source in values[2:]] == pytest.approx([c / (b + c), b / (b + c)])
    alone = asked("nan")
    alone["models"] = [{"model": "b"}]
    lines.merge(alone, output="alone")
    assert weights_of("alone") == weights_of("b")


def test_a_dry_run_says_that_they_are_measured(here: Path) -> None:
    """And reads nothing of the tensors."""
    Path("m.yaml").write_text(yaml.safe_dump(asked("equal_norm")))
    ran = run_lines("merge", "--config", "m.yaml", "--dry-run")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert "equal_norm" in ran.out
    assert "measure weights" in ran.out
    told = run_lines("merge", "--config", "m.yaml", "--dry-run", "--json").json
    assert [one["measures"] for one in told["passes"]] == ["weights"]
    assert run_lines("inspect", "--config", "m.yaml").code == 0


def test_in_memory_they_are_measured_too(here: Path) -> None:
    """Tensors in memory come to those of the files."""
    lines.merge(asked("nan"), output="out")
    base, *others = (load_file(f"{name}/model.safetensors") for name in ("base", *SIZES))
    found = lines.merge_state_dicts(base, others, parameters={"weight": "nan"})
    assert all(torch.equal(found[name], tensor) for name, tensor in load_file("out/model.safetensors").items())


# --- refused ---


def test_weights_that_sum_to_0(here: Path) -> None:
    """Of a method that divides by their sum, once the rule has its number."""
    entry = asked(1, "multislerp")
    entry["models"] = [
        {"model": "a", "parameters": {"weight": "nan"}},
        {"model": "b", "parameters": {"weight": -1.0}},
    ]
    with pytest.raises(LinesError, match="weight as it was measured"):
        lines.merge(entry, output="out")
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("weight", "method", "words"),
    [
        ("nann", "task_arithmetic", "a number or nan or equal_norm"),
        ([0, "nan"], "task_arithmetic", "a number"),
        ([{"filter": "mlp", "value": "nan"}], "task_arithmetic", "a number"),
        (float("inf"), "ties", "a number"),
        ("nan", "linear", "expected a number (got 'nan')"),
    ],
    ids=str,
)
def test_what_is_no_rule(weight: Any, method: str, words: str, here: Path) -> None:
    """Said of one value, by its name, of methods that take task vectors."""
    entry = asked(weight, method)
    if method == "linear":
        del entry["base_model"]
    with pytest.raises(LinesError) as error:
        lines.merge(entry, output="out")
    assert words in str(error.value)
    assert not Path("out").exists()


def test_a_model_that_is_its_base(here: Path) -> None:
    """It has no inverse norm; NaN has none either."""
    write_checkpoint(here / "c", load_file("base/model.safetensors"))
    for rule in ("nan", "equal_norm"):
        with pytest.raises(LinesError, match=f"weight: {rule} cannot be measured") as error:
            lines.merge(asked(rule), output="out")
        assert "task vector of ./c is 0" in str(error.value)
    broken = load_file("b/model.safetensors")
    broken["layers.1.w"][0, 0] = torch.nan
    write_checkpoint(here / "b", broken)
    with pytest.raises(LinesError, match=r"b/model.safetensors: tensor layers.1.w holds NaN"):
        lines.merge(asked("nan"), output="out")
    with pytest.raises(LinesError, match=r"squared norm of the task vector of \./b is nan"):
        lines.merge(asked("nan", allow_nonfinite=True), output="out")
    assert not Path("out").exists()


def test_of_adapters(here: Path) -> None:
    """Merged into an adapter they are refused; on their base they are task vectors."""
    modules = layers_of(2, {"self_attn.q_proj": (6, 5)})
    chance = torch.Generator().manual_seed(1)
    write_checkpoint(here / "base", {f"{n}.weight": torch.randn(s, generator=chance) for n, s in modules.items()})
    for seed, name in enumerate("xy"):
        write_adapter(here / name, factors(modules, 4, seed))
    entry = {**asked("nan"), "models": [{"model": "x"}, {"model": "y"}]}
    Path("m.yaml").write_text(yaml.safe_dump(entry))
    refused(run_lines("merge", "--config", "m.yaml", "--as-adapter", "-o", "out"), "weight: nan is measured on whole")
    assert run_lines("merge", "--config", "m.yaml", "-o", "out").code == 0
    assert sum(recorded()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["nan", "equal_norm"])
def test_beside_filters(rule: str, here: Path) -> None:
    """Where a filter gives one model a number, the rule weighs the others alone, tensor by tensor; the record makes the
    same bytes.
    """
    first, *_ = SIZES
    base = load_file("base/model.safetensors")
    name = min(base)
    recipe = asked(rule)
    recipe["models"][0]["parameters"] = {"weight": [{"filter": name, "value": 0.25}]}
    lines.merge(recipe, output="out")
    tensors = {model: load_file(f"{model}/model.safetensors") for model in SIZES}
    own = dict(zip(SIZES, norms(), strict=True))

    def weights(models: list[str]) -> dict[str, float]:
        if rule == "nan":
            return {model: 1 / own[model] / sum(1 / own[other] for other in models) for model in models}
        return {model: sum(own[other] for other in models) / len(models) / own[model] for model in models}

    for tensor, got in load_file("out/model.safetensors").items():
        found = weights(list(SIZES))
        if name in tensor:
            found = {first: 0.25, **weights([model for model in SIZES if model != first])}
        total = sum(found[model] * (tensors[model][tensor] - base[tensor]).double() for model in SIZES)
        torch.testing.assert_close(got, (base[tensor] + total).float(), rtol=1e-5, atol=1e-6)
    assert run_lines("verify", "out").code == 0
    assert run_lines("merge", "--config", "out/lines_recipe.yaml", "-o", "again").code == 0
    assert weights_of("out") == weights_of("again")


@pytest.mark.parametrize(
    "setting", [["nan", 1], [{"filter": "w", "value": "equal_norm"}, {"value": 1}], [{"value": [1, "nan"]}]]
)
def test_a_rule_stands_alone(setting: Any, here: Path) -> None:
    """In a gradient or behind a filter it is refused, and the message says why."""
    with pytest.raises(lines.LinesError, match="stands alone, in no filter and no gradient"):
        lines.merge(asked(setting), output="out")
