"""`lines edit --adapter`, `lines merge --as-adapter`, `lines extract`: what they refuse, and what they print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.adapters import PREFIX, factors, layers_of, write_adapter
from support.files import snapshot, write_checkpoint
from support.run import run_lines

SIZES = {"q_proj": (12, 8), "up_proj": (20, 8)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two adapters, their base, a fine-tune, and recipes."""
    monkeypatch.chdir(tmp_path)
    chance = torch.Generator().manual_seed(0)
    tensors = {f"{module}.weight": torch.randn(*size, generator=chance) for module, size in layers_of(4, SIZES).items()}
    tensors["model.norm.weight"] = torch.ones(8)
    config = {"model_type": "tiny", "num_hidden_layers": 4}
    write_checkpoint(tmp_path / "base", tensors, config=config)
    write_checkpoint(tmp_path / "ft", {name: t + torch.randn(t.shape) for name, t in tensors.items()}, config=config)
    for seed, name in enumerate(("a", "b")):
        write_adapter(tmp_path / name, factors(layers_of(4, SIZES), 4, seed))
    recipe("sum", models=[{"model": "a"}, {"model": "b"}], as_adapter=True)
    return tmp_path


def recipe(name: str, **keys: Any) -> None:
    Path(f"{name}.yaml").write_text(json.dumps(keys), encoding="utf-8")


def written(**changes: Any) -> None:
    """Another config for the adapter `a`."""
    path = Path("a", "adapter_config.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


def changed(**changes: Any) -> None:
    """Other tensors for the adapter `a`: by the end of the first layer's q_proj; None leaves one out."""
    path = Path("a", "adapter_model.safetensors")
    tensors = load_file(path)
    for end, tensor in changes.items():
        name = f"{PREFIX}model.layers.0.q_proj.{end.replace('_weight', '.weight').replace('_bias', '.bias')}"
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, path)


IN_PLACE = ["edit", "--adapter", "a", "-o", "out"]
KNOWN = [*IN_PLACE, "--num-layers", "4"]
MERGE = ["merge", "--config", "sum.yaml", "-o", "out"]
EXTRACT = ["extract", "ft", "--base", "base", "-o", "out"]
RANK_OF_FT = "lines extract ft --base base --rank 16 -o OUT"  # which is a command that works


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (IN_PLACE, 4, ["how many layers the base has is not known", "0 to 3", "--num-layers L", "--base BASE"]),
        ([*KNOWN, "--base", "base"], 2, ["num_layers: the base says how many layers there are"]),
        ([*IN_PLACE, "--num-layers", "3"], 2, ["num_layers is 3", "model.layers.3.", "layer 3, counted from 0"]),
        ([*IN_PLACE, "--num-layers", "0"], 2, ["num_layers: expected how many layers"]),
        ([*IN_PLACE, "--num-layers", "x=4"], 2, ["'x' names no stack", "model.layers"]),
        ([*IN_PLACE, "--num-layers", "4", "--num-layers", "5"], 2, ["--num-layers NAME=L for each stack"]),
        ([*KNOWN, "--missing", "ft"], 2, ["missing: that is of whole models"]),
        ([*KNOWN, "--prefix", "model."], 2, ["--prefix: that is of whole models"]),
        ([*KNOWN, "--max-shard-size", "1GB"], 2, ["--max-shard-size: that is of whole models"]),
        ([*KNOWN, "--component", "unet=keep"], 2, ["components: that is of whole models"]),
        ([*KNOWN, "--dtype", "fp8"], 2, ["dtype: an adapter is stored in", "not in fp8"]),
        ([*KNOWN, "--rounding", "stochastic"], 2, ["rounding: that is of whole models"]),
        ([*KNOWN, "--filter", "nothing=keep"], 2, ["'nothing' matches none of 8 tensor names"]),
        ([*KNOWN, "--stack", "other=keep"], 2, ["names no stack"]),
        (["edit", "base", "ft", "--adapter", "a", "-o", "out"], 2, ["--adapter takes the place of BASE and FT"]),
        (["edit", "base", "ft", "--base", "base", "-o", "out"], 2, ["--base is of --adapter"]),
        (["edit", "base", "ft", "--num-layers", "4", "-o", "out"], 2, ["--num-layers is of --adapter"]),
        (["edit", "base", "-o", "out"], 2, ["FT is missing", "lines edit [OPTIONS] BASE FT"]),
        (["edit", "-o", "out"], 2, ["BASE is missing"]),
        (["edit", "--adapter", "ft", "--base", "base", "-o", "out"], 2, ["ft is a whole fine-tune", RANK_OF_FT]),
        (["edit", "--adapter", "gone", "--num-layers", "4", "-o", "out"], 3, ["gone: there is no such file or folder"]),
        ([*IN_PLACE[:-1], "a", "--num-layers", "4"], 6, ["the output would replace an input"]),
        ([*IN_PLACE[:-1], "base", "--base", "base"], 6, ["the output would replace an input"]),
        ([*IN_PLACE[:-1], "out.safetensors", "--num-layers", "4"], 2, ["an adapter is a folder", "-o out."]),
        ([*MERGE, "--set", "merge_method=ties"], 2, ["ties", "no weighted sum", "average, linear, task_arithmetic"]),
        ([*MERGE, "--set", "parameters.density=0.5"], 2, ["no weighted sum"]),
        ([*MERGE, "--set", "merge_method=linear", "--set", "parameters.normalize=false"], 2, ["no weighted sum"]),
        ([*MERGE, "--set", "lines.beta=0.5", "--set", "lines.alpha=0.1"], 4, ["how many layers the base has"]),
        ([*MERGE, "--rank", "0"], 2, ["--rank", "at least 1"]),
        ([*MERGE, "--rank", "2", "--energy", "0.5"], 2, ["two ways to say one thing"]),
        ([*MERGE, "--energy", "0"], 2, ["energy: expected greater than 0"]),
        ([*MERGE, "--energy", "1.5"], 2, ["energy: expected less than or equal to 1"]),
        ([*MERGE, "--set", "as_adapter=false", "--rank", "2"], 2, ["rank: that is of an output that is an adapter"]),
        ([*MERGE, "--set", "as_adapter=false"], 2, ["base_model is missing", "--as-adapter"]),
        ([*MERGE, "--set", "as_adapter=false", "--set", "merge_method=linear"], 3, ["--as-adapter"]),
        ([*MERGE, "--set", "models.1.model=ft"], 3, ["ft is a whole fine-tune", "lines extract ./ft --base BASE"]),
        ([*MERGE, "--set", "tokenizer_source=a"], 2, ["tokenizer_source: that is of whole models"]),
        (EXTRACT, 2, ["how large its adapter is to be is not said", RANK_OF_FT, "--energy"]),
        ([*EXTRACT, "--rank", "2", "--energy", "0.5"], 2, ["two ways to say one thing"]),
        ([*EXTRACT, "--rank", "0"], 2, ["--rank", "at least 1"]),
        ([*EXTRACT, "--energy", "1.01"], 2, ["energy"]),
        ([*EXTRACT[:2], "--base", "ft", "-o", "ft", "--rank", "2"], 6, ["the output would replace an input"]),
        ([*EXTRACT[:-1], "out.safetensors", "--rank", "2"], 2, ["an adapter is a folder"]),
        ([*EXTRACT, "--rank", "2", "--filter", "nothing=keep"], 2, ["matches none of"]),
        (["extract", "a", "--base", "base", "-o", "out"], 0, []),
    ],
    ids=str,
)  # fmt: skip
def test_bad_input(arguments: list[str], code: int, said: list[str], here: Path) -> None:
    """Each ends with its code, names what is wrong and the way out, and leaves everything as it was."""
    before = snapshot(here)
    ran = run_lines(*arguments)
    assert ran.trace == ""
    assert ran.code == code, ran.err
    for words in said:
        assert words in ran.err
    if code:
        assert snapshot(here) == before


FACTOR = torch.ones(12, 4)


@pytest.mark.parametrize(
    ("config", "tensors", "code", "said"),
    [
        ({}, {"lora_B_weight": None}, 3, ["has lora_A, and no lora_B"]),
        ({}, {"lora_B_weight": torch.ones(12, 3)}, 3, ["[4, 8] and [12, 3], which have no product"]),
        ({"r": 8}, {}, 3, ["says rank 8"]),
        ({"peft_type": "IA3"}, {}, 3, ["IA3"]),
        ({}, {"lora_C_weight": FACTOR}, 3, ["lora_C"]),
        ({}, {"lora_B_weight": torch.full((12, 4), torch.nan)}, 5, ["would hold NaN"]),
        ({}, {"lora_B_weight": torch.full((12, 4), 1e38)}, 5, ["cannot hold a value", "--dtype float32"]),
    ],
    ids=str,
)
def test_bad_adapters(config: dict[str, Any], tensors: dict[str, Any], code: int, said: list[str], here: Path) -> None:
    """Named by file and module; nothing is written."""
    written(**config)
    changed(**tensors)
    before = snapshot(here)
    how = ["--dtype", "bfloat16", "--alpha", "9", "--beta", "0"] if code == 5 else []
    ran = run_lines(*KNOWN, *how)
    assert (ran.code, ran.trace) == (code, ""), ran.err
    for words in said:
        assert words in ran.err
    assert snapshot(here) == before


def test_adapters_of_other_bases(here: Path) -> None:
    """Of another shape than each other, or than the base; with names that it lacks."""
    write_adapter(here / "b", factors(layers_of(4, {"q_proj": (12, 6), "up_proj": (20, 8)}), 4, 1))
    ran = run_lines(*MERGE)
    assert ran.code == 4
    assert "a changes [12, 8], and b [12, 6]" in ran.err.replace("./", "")
    ran = run_lines("edit", "--adapter", "b", "--base", "base", "-o", "out")
    assert ran.code == 4
    assert "[12, 6]" in ran.err
    write_adapter(here / "b", factors(layers_of(4, {"other": (12, 8)}), 4, 1))
    ran = run_lines("edit", "--adapter", "b", "--base", "base", "-o", "out")
    assert ran.code == 4
    assert "are not in base" in ran.err.replace("./", "")


@pytest.mark.slow
def test_what_adapters_say_of_their_bases(here: Path) -> None:
    """Another one than is given, or than each other's, is said; the same is not, whatever its folder."""
    written(base_model_name_or_path="org/other")
    ran = run_lines(*IN_PLACE, "--base", "base")
    assert ran.code == 0
    assert "note: a says that its base is org/other, and the base that is given is base" in ran.err
    ran = run_lines(*MERGE, "--force")
    assert ran.code == 0
    assert "bases differ" not in ran.err  # of the other it is not known
    other = json.loads(Path("b", "adapter_config.json").read_text())
    for named, differ in (("org/base", True), ("elsewhere/other", False)):
        Path("b", "adapter_config.json").write_text(json.dumps({**other, "base_model_name_or_path": named}))
        ran = run_lines(*MERGE, "--force")
        assert ran.code == 0
        assert ("bases differ" in ran.err) is differ, ran.err
    written(base_model_name_or_path="org/base-unsloth-bnb-4bit")
    ran = run_lines(*IN_PLACE, "--base", "base", "--force")
    assert (ran.code, "note: a says" in ran.err) == (0, False), ran.err


def test_bases_named_with_adapters(here: Path) -> None:
    """All have to be one: the difference of two bases is in no adapter."""
    before = snapshot(here)
    models: list[dict[str, str]]
    for base, models in (
        (None, [{"model": "base+a"}, {"model": "ft+b"}]),
        ("ft", [{"model": "base+a"}, {"model": "b"}]),
        ("ft", [{"model": "a"}, {"model": "base+b"}]),
    ):
        recipe("two", models=models, as_adapter=True, base_model=base)
        ran = run_lines("merge", "--config", "two.yaml", "-o", "out")
        assert (ran.code, ran.trace) == (2, ""), ran.err
        assert "what two bases differ by is no product of factors" in ran.err
        assert "base_model: " in ran.err
        Path("two.yaml").unlink()
    assert snapshot(here) == before
    recipe("one", models=[{"model": "base+a"}, {"model": "./base+b"}], as_adapter=True, base_model="base")
    assert run_lines("merge", "--config", "one.yaml", "-o", "out").code == 0


def test_an_existing_output_is_replaced_with_force_alone(here: Path) -> None:
    """As any other; a stranger's files in it are not."""
    assert run_lines(*KNOWN).code == 0
    ran = run_lines(*KNOWN)
    assert (ran.code, "out exists" in ran.err) == (6, True)
    assert run_lines(*KNOWN, "--force", "--alpha", "0.5").code == 0
    (here / "out" / "mine.txt").write_text("mine")
    ran = run_lines(*KNOWN, "--force")
    assert ran.code == 6
    assert "mine.txt" in ran.err


@pytest.mark.slow
def test_the_recipe_in_the_output_makes_it_again(here: Path) -> None:
    """In place, merged and extracted."""
    runs = {"one": KNOWN, "two": [*MERGE, "--rank", "2"], "three": [*EXTRACT, "--energy", "0.9", "--save-rest"]}
    for name, arguments in runs.items():
        assert (
            run_lines(*arguments[: arguments.index("-o")], "-o", name, *arguments[arguments.index("out") + 1 :]).code
            == 0
        )
        again = run_lines("merge", "--config", f"{name}/lines_recipe.yaml", "-o", f"{name}-again")
        assert again.code == 0, again.err
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (here / name / file).read_bytes() == (here / f"{name}-again" / file).read_bytes()
        assert run_lines("verify", name).code == 0


@pytest.mark.parametrize("arguments", [KNOWN, MERGE, [*MERGE, "--energy", "0.5"], [*EXTRACT, "--rank", "2"]], ids=str)
def test_a_dry_run_writes_nothing(arguments: list[str], here: Path) -> None:
    """And says what would be done, in words and as JSON with the same modules as a run."""
    before = snapshot(here)
    ran = run_lines(*arguments, "--dry-run")
    assert ran.code == 0, ran.err
    assert "model.layers" in ran.out
    assert "adapter_config.json" in ran.out
    planned = run_lines(*arguments, "--dry-run", "--json").json
    assert snapshot(here) == before
    done = run_lines(*arguments, "--json").json
    assert [one["module"] for one in planned["modules"]] == [one["module"] for one in done["modules"]]
    assert planned["bytes"]["written"] >= done["bytes"]["written"]


@pytest.mark.slow
def test_what_is_printed(here: Path) -> None:
    """Ranks and what they keep, layer by layer; and what of a fine-tune is left out."""
    ran = run_lines(*EXTRACT, "--rank", "2", "--alpha", "0.1")
    assert ran.code == 0
    for words in ("by layer", "0: 0.1", "rank", "kept", "of the squared update of these 8 modules",
                  "left    1 vectors (norms and the like): 1 changed"):  # fmt: skip
        assert words in ran.out
    assert "rank 100 is more than 8 module(s) can have" in run_lines(*EXTRACT, "--rank", "100", "--force").err
    assert run_lines(*KNOWN, "--quiet", "--force").out == ""
    card = (here / "out" / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card
    assert "lines verify ." in card


def test_a_base_beside_is_said(here: Path) -> None:
    """The adapter's own config may name a folder; of its headers depth is read, and a note says so."""
    written(base_model_name_or_path="base")
    ran = run_lines(*IN_PLACE)
    assert ran.code == 0
    assert "note: the base is base, as the adapter's config says" in ran.err
    assert "base_model: ../base" in (here / "out" / "lines_recipe.yaml").read_text(encoding="utf-8")
    written(base_model_name_or_path="org/name")
    assert run_lines(*IN_PLACE, "--force").code == 4


def test_base_and_adapter_in_one_name(here: Path) -> None:
    """`base+adapter` names the base of a merge, too."""
    recipe(
        "plus", models=[{"model": "base+a"}, {"model": "base+b"}], as_adapter=True, lines={"alpha": 0.1, "beta": 0.9}
    )
    ran = run_lines("merge", "--config", "plus.yaml", "-o", "out")
    assert ran.code == 0, ran.err
    assert run_lines("verify", "out").code == 0


@pytest.mark.parametrize(
    ("alpha", "beta", "folded"), [("1", "0", 8), ("0", "1", 2), ("0.5", "0.4", 0), ("0", "0", 0)], ids=str
)
def test_folded_tensors_are_told_from_copies(alpha: str, beta: str, folded: int) -> None:
    """A coefficient of 1 takes all of an adapter's update: `edited 0 tensors` alone would read as if it had none."""
    ran = run_lines("edit", "base", "a", "-o", "folded", "--alpha", alpha, "--beta", beta)
    assert ran.code == 0, ran.err
    lines = [line for line in ran.out.splitlines() if "update folded in" in line]
    assert lines == ([f"{folded:,} of those copied have an adapter's update folded in, all of it"] if folded else [])
