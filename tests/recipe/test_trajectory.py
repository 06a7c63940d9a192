"""Checkpoints of one run as one entry of `models:`: a pattern, and weights over what it matches."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import RecipeError
from lines_cli.recipe.trajectory import weights_of
from lines_cli.recipe.validate import make_recipe
from support.adapters import factors, layers_of, updates, write_adapter
from support.files import write_checkpoint
from support.merging import Tensors, output, refused, same, tensors, write
from support.run import run_lines
from support.torch_files import write_folder
from support.whole_model import added_to_base, linear, plain_sum, task_vectors, weighted

STEPS = [100, 900, 1000, 1100, 10000]


def a_run(folder: Path, steps: list[int] = STEPS, **more: Any) -> list[Tensors]:
    """A run with a checkpoint after each of so many steps."""
    models = [tensors(seed) for seed in range(1, len(steps) + 1)]
    for step, model in zip(steps, models, strict=True):
        write_checkpoint(folder / f"run/checkpoint-{step}", model, **more)
    return models


def recorded(tmp_path: Path, out: str = "out") -> list[tuple[str, Any]]:
    """The models that an output's recipe names, with their weights."""
    said = yaml.safe_load((tmp_path / out / "lines_recipe.yaml").read_text())
    return [(source["model"], source.get("parameters", {}).get("weight")) for source in said["models"]]


def average(models: list[Tensors], weight: list[float]) -> Tensors:
    """`linear` of whole models: weighted sums in order, over the sum of the weights in float32."""
    return linear(models, weight=weight)


# --- weights ---


def decayed(rule: str, number: int) -> list[float]:
    """By what they stand for: one update after another, each scaled by the decay; written as a matrix."""
    decay = {
        "linear": lambda x: 1 - x,
        "cosine": lambda x: math.cos(math.pi * x / 2) ** 2,
        "1-sqrt": lambda x: 1 - x**0.5,
    }[rule]
    weights = torch.zeros(number, dtype=torch.float64)
    weights[0] = 1.0  # theta_0, then + D(j/N) * (theta_j - theta_(j-1))
    for j in range(1, number):
        weights[j] += decay(j / number)
        weights[j - 1] -= decay(j / number)
    return weights.tolist()


def moving(decay: float, number: int) -> list[float]:
    """An exponential moving average that begins with the first checkpoint, step by step."""
    weights = torch.zeros(number, dtype=torch.float64)
    weights[0] = 1.0
    for j in range(1, number):
        weights *= decay
        weights[j] += 1 - decay
    return weights.tolist()


RULES: dict[str, tuple[Any, Any]] = {
    "uniform": ("uniform", lambda n: [1 / n] * n),
    "linear": ("linear", lambda n: decayed("linear", n)),
    "cosine": ("cosine", lambda n: decayed("cosine", n)),
    "1-sqrt": ("1-sqrt", lambda n: decayed("1-sqrt", n)),
    "ema": ({"ema": 0.8}, lambda n: moving(0.8, n)),
    "ema in words": ("ema:0.25", lambda n: moving(0.25, n)),
}


@pytest.mark.parametrize(("rule", "expected"), RULES.values(), ids=RULES)
def test_weights_over_a_run(rule: Any, expected: Any, tmp_path: Path) -> None:
    """They are what their definition says, sum to 1, stand in the record, and give the sum in their order."""
    models = a_run(tmp_path)
    source = {"model": "run/checkpoint-*", "weights": rule}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"merge_method": "linear", "models": [source]}))
    assert run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out").code == 0
    found = recorded(tmp_path)
    assert [name for name, _ in found] == [str(tmp_path / f"run/checkpoint-{step}") for step in STEPS]
    weights = [weight for _, weight in found]
    assert weights == pytest.approx(expected(len(STEPS)), rel=1e-12)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    same(output(tmp_path), average(models, weights))
    again = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0
    same(output(tmp_path, "again"), output(tmp_path))
    assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.parametrize("number", [1, 2, 7, 100])
@pytest.mark.parametrize("rule", [rule for rule, _ in RULES.values()], ids=str)
def test_weights_are_shares(rule: Any, number: int) -> None:
    """None is below 0, and together they are 1; of one checkpoint it is 1."""

    weights = weights_of(rule, number)
    assert len(weights) == number
    assert all(weight > 0 for weight in weights)
    assert math.fsum(weights) == pytest.approx(1, abs=1e-12)
    assert number > 1 or weights == [1.0]


# --- which checkpoints ---


@pytest.mark.parametrize(
    ("said", "steps"),
    [
        ({}, STEPS),
        ({"last": 2}, [1100, 10000]),
        ({"last": 1}, [10000]),
        ({"every": 2}, [100, 1000, 10000]),
        ({"every": 2, "last": 2}, [1000, 10000]),
        ({"every": 4}, [100, 10000]),
        ({"every": 50}, [10000]),
        ({"last": 99}, STEPS),
    ],
    ids=str,
)
def test_which_are_merged(said: dict[str, int], steps: list[int], tmp_path: Path) -> None:
    """In natural order; every K-th counted back from the last one, and of those the last N."""
    a_run(tmp_path)
    found = lines.load_recipe(written(tmp_path, {"model": "run/checkpoint-*", **said}))
    assert [Path(source.model).name for source in found.models] == [f"checkpoint-{step}" for step in steps]
    assert [source.parameters["weight"] for source in found.models] == [1 / len(steps)] * len(steps)
    assert (len(steps) == 1) == any("one checkpoint" in note for note in found.notes)
    assert (said == {"last": 99}) == any("there are 5" in note for note in found.notes)


def written(folder: Path, *sources: dict[str, Any], **more: Any) -> Path:
    path = folder / "m.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": list(sources), **more}))
    return path


def test_what_is_no_checkpoint_is_left_out_and_said(tmp_path: Path) -> None:
    """A trainer's state, logs, an empty folder, a dead link; a link to another checkpoint counts once."""
    a_run(tmp_path, [1, 2])
    run = tmp_path / "run"
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "optimizer.pt").write_bytes(b"")
    (run / "checkpoint-runs" / "events").mkdir(parents=True)
    (run / "checkpoint-4").mkdir()
    (run / "checkpoint.log").write_text("loss")
    (run / "checkpoint-5").symlink_to("checkpoint-0")
    (run / "checkpoint-0-best").symlink_to("checkpoint-2")
    found = lines.load_recipe(written(tmp_path, {"model": "run/checkpoint*"}))
    assert [Path(source.model).name for source in found.models] == ["checkpoint-1", "checkpoint-2"]
    said = "\n".join(found.notes)
    for words in (
        "5 match(es) are no checkpoints",
        "checkpoint-3: no weights in it, only a trainer's state (optimizer.pt)",
        "checkpoint-runs: no weights in it",
        "checkpoint-4: an empty folder",
        "checkpoint.log: no file with weights",
        "checkpoint-5: a link to nothing",
        "checkpoint-0-best is run/checkpoint-2",
    ):
        assert words in said


def test_an_unfinished_checkpoint_is_refused_by_name(tmp_path: Path) -> None:
    """Its index names shards that are not there: nobody guesses that it may be left out."""
    a_run(tmp_path, [1, 2, 3], shards=2)
    os.remove(tmp_path / "run/checkpoint-3/model-00002-of-00002.safetensors")
    ran = run_lines("merge", "--config", written(tmp_path, {"model": "run/checkpoint-*"}), "-o", tmp_path / "out")
    refused(ran, 3, "checkpoint-3", "not there", "incomplete")
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_named_twice_is_said(tmp_path: Path) -> None:
    """By a pattern and by its name."""
    a_run(tmp_path, [1, 2])
    found = lines.load_recipe(written(tmp_path, {"model": "run/*"}, {"model": "run/checkpoint-2"}))
    assert any("checkpoint-2 is merged 2 times" in note for note in found.notes)


def test_a_name_with_brackets_is_a_name(tmp_path: Path) -> None:
    """What is there by its whole name is meant, whatever characters it has."""
    write(tmp_path, **{"a[1]": tensors(1), "a1": tensors(2)})
    found = lines.load_recipe(written(tmp_path, {"model": "a[1]"}))
    assert [Path(source.model).name for source in found.models] == ["a[1]"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "no match": ({"model": "run/step-*"}, {}, ["models.0.model", "nothing matches 'run/step-*'", "On the Hub there"]),
    "no checkpoint": ({"model": "run/*.txt"}, {}, ["none of the 1 match(es)", "run/log.txt"]),
    "zero": ({"model": "run/checkpoint-*", "last": 0}, {}, ["models.0.last", "1 or more", "0"]),
    "half": ({"model": "run/checkpoint-*", "every": 1.5}, {}, ["models.0.every", "1.5"]),
    "yes": ({"model": "run/checkpoint-*", "last": True}, {}, ["models.0.last", "True"]),
    "another rule": ({"model": "run/checkpoint-*", "weights": "sqrt"}, {}, ["models.0.weights", "1-sqrt", "'sqrt'"]),
    "an ema of 1": ({"model": "run/checkpoint-*", "weights": {"ema": 1}}, {}, ["between 0 and 1"]),
    "a list": ({"model": "run/checkpoint-*", "weights": [1, 2]}, {}, ["models.0.weights"]),
    "an unknown key": ({"model": "run/checkpoint-*", "lst": 2}, {}, ["models.0.lst", "did you mean last"]),
    "of one model": ({"model": "run/checkpoint-1", "last": 2}, {}, ["models.0.last belongs to a pattern"]),
    "a gradient": (
        {"model": "run/checkpoint-*", "weights": "cosine", "parameters": {"weight": [0, 1]}},
        {},
        ["models.0.weights", "one number"],
    ),
    "an average": (
        {"model": "run/checkpoint-*", "weights": "cosine"},
        {"merge_method": "average", "base_model": "base"},
        ["average gives all models the same weight", "Leave weights out"],
    ),
    "a base": (
        {"model": "run/checkpoint-*"},
        {"merge_method": "task_arithmetic", "base_model": "run/checkpoint-*"},
        ["base_model", "there is one base"],
    ),
    "a wrong parameter, said once": (
        {"model": "run/checkpoint-*", "parameters": {"wieght": 1}},
        {},
        ["m.yaml: line 5: models.0.parameters.wieght is not a parameter of linear; did you mean weight?\n"],
    ),
}


@pytest.mark.parametrize(("source", "more", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_meant(source: Any, more: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """Refused, with the key, its line, and the way out."""
    a_run(tmp_path, [1, 2])
    write(tmp_path, base=tensors())
    (tmp_path / "run" / "log.txt").write_text("loss")
    refused(run_lines("merge", "--config", written(tmp_path, source, **more), "-o", tmp_path / "out"), 2, *words)


def test_keys_and_problems_keep_the_numbers_of_the_file(tmp_path: Path) -> None:
    """An entry behind a pattern is called by the number that its file gives it."""
    a_run(tmp_path, [1, 2, 3])
    write(tmp_path, other=tensors(9))
    path = written(tmp_path, {"model": "run/*"}, {"model": "other", "parameters": {"wieght": 1}})
    refused(run_lines("merge", "--config", path, "-o", tmp_path / "out"), 2, "models.1.parameters.wieght")


def test_it_counts_from_the_recipe_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what matches in the current folder alone is said to."""
    a_run(tmp_path, [1, 2])
    (tmp_path / "conf").mkdir()
    path = written(tmp_path / "conf", {"model": "run/*"})
    monkeypatch.chdir(tmp_path)
    refused(run_lines("merge", "--config", path, "-o", tmp_path / "out"), 2, "nothing matches", "its own folder")
    path = written(tmp_path / "conf", {"model": "../run/*"})
    assert [Path(s.model).name for s in lines.load_recipe(path).models] == ["checkpoint-1", "checkpoint-2"]
    path = written(tmp_path / "conf", {"model": str(tmp_path / "run/*")})
    assert len(lines.load_recipe(path).models) == 2


# --- what a run leaves beside its checkpoints ---


def shards_of(kind: str, folder: Path) -> Path:
    """What a training across processes leaves of one checkpoint, without the weights as a whole."""
    within = folder / {"FSDP": "pytorch_model_fsdp_0", "DCP": ".", "DeepSpeed": "global_step7"}[kind]
    within.mkdir(parents=True, exist_ok=True)
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if kind == "DeepSpeed" else "__0_0.distcp"
    (within / name).write_bytes(b"shard")
    (folder / "trainer_state.json").write_text("{}")
    (folder / "optimizer_0").mkdir()
    (folder / "optimizer_0" / "__0_0.distcp").write_bytes(b"state")
    return folder


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("FSDP", ["shards of FSDP (pytorch_model_fsdp_0)", "accelerate merge-weights"]),
        ("DCP", ["shards of FSDP (__0_0.distcp)", "accelerate merge-weights"]),
        ("DeepSpeed", ["shards of DeepSpeed (global_step7)", "zero_to_fp32.py"]),
    ],
)
def test_a_checkpoint_in_shards_is_not_passed_over(kind: str, words: list[str], tmp_path: Path) -> None:
    """Left out of an average it would be missed: it is an error that names it, and the way to make it whole."""
    models = a_run(tmp_path, [1, 2])
    shards_of(kind, tmp_path / "run/checkpoint-7")
    path = written(tmp_path, {"model": "run/checkpoint-*"})
    refused(run_lines("merge", "--config", path, "-o", tmp_path / "out"), 2, "checkpoint-7 holds its weights", *words)
    write_checkpoint(tmp_path / "run/checkpoint-7", tensors(9))  # made whole beside them
    assert run_lines("merge", "--config", path, "-o", tmp_path / "out").code == 0
    same(output(tmp_path), average([*models, tensors(9)], [1 / 3] * 3))


def test_an_optimizer_s_shards_are_no_checkpoint(tmp_path: Path) -> None:
    """A folder of them is left out, whatever else matches."""
    a_run(tmp_path, [1, 2])
    (tmp_path / "run/optimizer_0").mkdir()
    (tmp_path / "run/optimizer_0/__0_0.distcp").write_bytes(b"state")
    path = written(tmp_path, {"model": "run/*"})
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out")
    assert ran.code == 0
    assert "optimizer_0: no weights in it" in ran.err


@pytest.mark.parametrize("name", ["tmp-checkpoint-300", "tmp_checkpoint-300"])
def test_an_unfinished_checkpoint_is_left_out(name: str, tmp_path: Path) -> None:
    """As trainers call it while it is written; with a note, and unless the pattern asks for it."""
    models = a_run(tmp_path, [100, 200])
    write_checkpoint(tmp_path / "run" / name, tensors(9))
    path = written(tmp_path, {"model": "run/*checkpoint-*"})
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out")
    assert ran.code == 0
    assert f"{name}: a checkpoint that was not finished" in ran.err
    same(output(tmp_path), average(models, [0.5, 0.5]))
    assert len(lines.load_recipe(written(tmp_path, {"model": "run/tmp*"})).models) == 1


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["checkpoint-10", "checkpoint-010", "checkpoint-9"], "have the same number"),
        (["a/checkpoint-5", "b/checkpoint-5"], "have the same number"),
        (["checkpoint-final", "checkpoint-20", "checkpoint-10"], "are not numbered alike"),
        (["first", "last"], "have the same number, none"),
    ],
    ids=str,
)
def test_an_order_that_names_do_not_tell(names: list[str], words: str, tmp_path: Path) -> None:
    """Where it makes a difference it is an error; the average is the same in any order."""
    for seed, name in enumerate(names):
        write_checkpoint(tmp_path / "run" / name, tensors(seed))
    pattern = "run/*/*" if "/" in names[0] else "run/*"
    for said in ({"weights": "1-sqrt"}, {"weights": {"ema": 0.5}}, {"last": 2}, {"every": 2}):
        path = written(tmp_path, {"model": pattern, **said})
        key = f"models.0.{next(iter(said))}"
        refused(run_lines("merge", "--config", path, "-o", tmp_path / "out"), 2, words, key, "one by one")
    for said in ({}, {"weights": "uniform"}, {"weights": "linear"}):
        assert len(lines.load_recipe(written(tmp_path, {"model": pattern, **said})).models) == len(names)


# --- with a base, and LiNeS ---


def test_a_whole_is_shared_out(tmp_path: Path) -> None:
    """A run's own weight is what its checkpoints' weights sum to: two runs, each averaged, in one merge."""
    a_run(tmp_path, [1, 2, 3])
    for step in (1, 2):
        write_checkpoint(tmp_path / f"other/checkpoint-{step}", tensors(10 + step))
    sources = (
        {"model": "run/checkpoint-*", "weights": "cosine", "parameters": {"weight": 0.7}},
        {"model": "other/checkpoint-*", "weights": "uniform", "parameters": {"weight": 0.3}},
    )
    found = [source.parameters["weight"] for source in lines.load_recipe(written(tmp_path, *sources)).models]
    assert found == pytest.approx([*(0.7 * w for w in decayed("cosine", 3)), 0.15, 0.15])
    top = written(tmp_path, {"model": "run/checkpoint-*", "weights": "uniform"}, parameters={"weight": 2})
    assert [source.parameters["weight"] for source in lines.load_recipe(top).models] == [2 / 3] * 3
    said = written(tmp_path, {"model": "run/checkpoint-*", "parameters": {"weight": 0.5}})
    assert [source.parameters["weight"] for source in lines.load_recipe(said).models] == [0.5] * 3


def test_lines_on_a_run_from_its_first_checkpoint(tmp_path: Path) -> None:
    """The base is a checkpoint of the run: it has no task vector, and the others keep their weights in the average."""
    models = a_run(tmp_path, [0, 50, 100])
    more = {"merge_method": "task_arithmetic", "base_model": "run/checkpoint-0", "lines": {"alpha": 0.25, "beta": 0.5}}
    path = written(tmp_path, {"model": "run/checkpoint-*", "weights": "1-sqrt"}, **more)
    assert run_lines("merge", "--config", path, "-o", tmp_path / "out").code == 0
    weight = decayed("1-sqrt", 3)
    assert [weight for _, weight in recorded(tmp_path)] == pytest.approx(weight)
    taus = plain_sum(weighted(task_vectors(models[0], models[1:]), [w for _, w in recorded(tmp_path)][1:]))
    c = {"layers.0.w": 0.25, "layers.1.w": 0.5, "layers.2.w": 0.75}
    same(output(tmp_path), added_to_base(models[0], taus, lambda name: c.get(name, 0.25)))


def test_without_lines_it_is_the_average(tmp_path: Path) -> None:
    """`base + sum(c_j * tau_j)`, with a base of the run, is `sum(c_j * theta_j)` but for rounding."""
    models = a_run(tmp_path, [0, 50, 100])
    source = {"model": "run/checkpoint-*", "weights": "cosine"}
    path = written(tmp_path, source, merge_method="task_arithmetic", base_model="run/checkpoint-0")
    assert run_lines("merge", "--config", path, "-o", tmp_path / "out").code == 0
    expected = average(models, decayed("cosine", 3))
    for name, tensor in output(tmp_path).items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6)


# --- other kinds of checkpoints ---


def test_shards_and_pickles(tmp_path: Path) -> None:
    """Whatever their checkpoints are: shards, torch.save's folders, and lone files of which a part is meant."""
    models = [tensors(seed) for seed in range(3)]
    for step, model in enumerate(models, 8):
        write_checkpoint(tmp_path / f"sharded/checkpoint-{step}", model, shards=2)
        write_folder(tmp_path / f"pickled/checkpoint-{step}", model)
        (tmp_path / "lone").mkdir(exist_ok=True)
        torch.save({"model": model, "ema": models[-1]}, tmp_path / f"lone/step_{step}.pt")
    expected = average(models, [1 / 3] * 3)
    for number, pattern in enumerate(("sharded/checkpoint-*", "pickled/checkpoint-*", "lone/step_*.pt#model")):
        path = written(tmp_path, {"model": pattern})
        assert run_lines("merge", "--config", path, "-o", tmp_path / f"{number}").code == 0
        same(output(tmp_path, f"{number}"), expected)


SIZES = {"self_attn.q_proj": (6, 5), "mlp.up_proj": (8, 5)}


def a_run_of_adapters(folder: Path) -> None:
    modules = layers_of(3, SIZES)
    chance = torch.Generator().manual_seed(0)
    base = {f"{name}.weight": torch.randn(size, generator=chance) for name, size in modules.items()}
    write_checkpoint(folder / "base", base)
    for at, step in enumerate((90, 100, 200)):
        write_adapter(folder / f"run/checkpoint-{step}", factors(modules, 4, 7 + at))
        (folder / f"run/checkpoint-{step}" / "optimizer.pt").write_bytes(b"")


@pytest.mark.parametrize("pattern", ["run/checkpoint-*", "base+run/checkpoint-*"])
def test_adapters_on_their_base(pattern: str, tmp_path: Path) -> None:
    """A run of LoRA checkpoints is averaged on its base; also where each is written with that."""
    a_run_of_adapters(tmp_path)
    source = {"model": pattern, "weights": {"ema": 0.5}}
    path = written(
        tmp_path, source, merge_method="task_arithmetic", base_model="base", lines={"alpha": 0.5, "beta": 0.5}
    )
    ran = run_lines("merge", "--config", path, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    base = load_file(tmp_path / "base" / "model.safetensors")
    weights = moving(0.5, 3)
    added = [updates(tmp_path / f"run/checkpoint-{step}") for step in (90, 100, 200)]
    for name, tensor in output(tmp_path).items():
        c = 0.5 + 0.5 * int(name.split(".")[2]) / 2
        total = sum(weight * one[name] for weight, one in zip(weights, added, strict=True))
        torch.testing.assert_close(tensor.double(), base[name].double() + c * total, rtol=1e-5, atol=1e-5)


def test_adapters_into_an_adapter(tmp_path: Path) -> None:
    """Their ranks side by side, each by its weight."""
    a_run_of_adapters(tmp_path)
    path = written(tmp_path, {"model": "run/checkpoint-*", "weights": "cosine"}, merge_method="task_arithmetic")
    ran = run_lines("merge", "--config", path, "--as-adapter", "--num-layers", 3, "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    weights = decayed("cosine", 3)
    added = [updates(tmp_path / f"run/checkpoint-{step}") for step in (90, 100, 200)]
    for name, tensor in updates(tmp_path / "out").items():
        total = sum(weight * one[name] for weight, one in zip(weights, added, strict=True))
        torch.testing.assert_close(tensor, total, rtol=1e-4, atol=1e-5)


# --- where else recipes are read ---


def test_from_python_and_in_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lines.merge` takes the same mapping; a dry run lists the checkpoints with their weights."""
    a_run(tmp_path)
    monkeypatch.chdir(tmp_path)
    asked = {"merge_method": "linear", "models": [{"model": "run/checkpoint-*", "last": 2, "weights": "1-sqrt"}]}
    told = lines.merge(asked, dry_run=True)
    assert [Path(model["model"]).name for model in told["models"]] == ["checkpoint-1100", "checkpoint-10000"]
    assert [model["weight"][0] for model in told["models"]] == pytest.approx(decayed("1-sqrt", 2))
    assert asked["models"] == [{"model": "run/checkpoint-*", "last": 2, "weights": "1-sqrt"}]
    written(tmp_path, *asked["models"])
    shown = run_lines("merge", "--config", "m.yaml", "--dry-run")
    assert re.search(r"^run/checkpoint-1100 +0\.7071$", shown.out, re.MULTILINE)
    assert "run/checkpoint-*: 2 of 5 checkpoints, run/checkpoint-1100 to run/checkpoint-10000" in shown.err
    with pytest.raises(RecipeError, match="belongs to a pattern"):
        make_recipe(asked, where="here")


def test_a_record_holds_no_patterns(tmp_path: Path) -> None:
    """`inspect` reads an output's recipe as what it says, and looks nothing up by it."""
    a_run(tmp_path, [1, 2])
    write_checkpoint(tmp_path / "out", tensors())
    text = yaml.safe_dump({"merge_method": "linear", "models": [{"model": str(tmp_path / "run/*"), "last": 1}]})
    (tmp_path / "out" / "lines_recipe.yaml").write_text(text)
    told = run_lines("inspect", tmp_path / "out", "--json").json
    assert any("belongs to a pattern" in note for note in told["notes"])
