"""A merge takes no more memory than a dry run foretells, and says what it kept."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.checkpoint.header import lay_out
from support import forked
from support.bits import raw
from support.files import write_checkpoint
from support.merging import merge, output, refused, tensors, write
from support.run import run_lines

# --- memory ---

MB = 10**6

# VmHWM is the process's own high-water mark; a child's ru_maxrss would begin with its parent's.
PROGRAM = """
import sys
from pathlib import Path
import lines_cli as lines
from lines_cli.recipe.yaml_file import load_recipe

def peak():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

resources = lines.Resources(workers=2, device="cpu")
for size in ("small", "large"):
    recipe = load_recipe(Path(size, "merge.yaml"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(size, "out.safetensors"))
    import torch
    before = peak()
    lines.run(plan, resources)
print(peak() - before, peak(), plan.peak_memory(resources))
"""


def filled(path: Path, tensors: int, nbytes: int, seed: int | None) -> None:
    """A checkpoint of random bfloat16 numbers, one block of 2 MB over and over; of zeros without a seed."""
    names = [(f"layers.{i}.w", "BF16", (nbytes // tensors // 2,)) for i in range(tensors)]
    head, infos = lay_out(names, {})
    size = sum(info.nbytes for info in infos.values())
    with open(path, "wb") as file:
        file.write(head)
        if seed is not None:
            numbers = torch.randn(MB + seed, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
            block = raw(numbers)
            file.writelines(block[: size - at] for at in range(0, size, len(block)))
        file.truncate(len(head) + size)


def three(folder: Path, tensors: int, nbytes: int, recipe: dict[str, Any]) -> None:
    """A base, three fine-tunes of it, and the recipe that merges them."""
    folder.mkdir()
    for seed, side in enumerate(("base", "a", "b", "c")):
        filled(folder / f"{side}.safetensors", tensors, nbytes, seed or None)
    values = {
        "base_model": "base.safetensors",
        "models": [{"model": f"{side}.safetensors"} for side in "abc"],
        **recipe,
    }
    (folder / "merge.yaml").write_text(yaml.safe_dump(values))


LARGE: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "parameters": {"density": 0.2}, "lines": {"beta": 0.5}},
    "ties by tensor": {
        "merge_method": "ties",
        "parameters": {"density": 0.2, "trim": "tensor"},
        "lines": {"beta": 0.5},
    },
    "consensus on ties": {
        "merge_method": "consensus",
        "parameters": {"density": 0.2, "on": "ties"},
        "lines": {"beta": 0.5},
    },
    "dare_ties by L1": {
        "merge_method": "dare_ties",
        "parameters": {"density": 0.2, "rescale": "l1"},
        "lines": {"beta": 0.5},
    },
}


def flat(folder: Path, tensors: int, sizes: tuple[int, int], recipe: dict[str, Any]) -> None:
    """Four times the model takes no more memory (but for noise), and little more in all than a dry run foretells."""
    for size, nbytes in zip(("small", "large"), sizes, strict=True):
        three(folder / size, tensors, nbytes, recipe)
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=folder, capture_output=True, text=True, check=True)
    more, peak, foretold = map(int, ran.stdout.split())
    assert more < 20 * MB
    assert peak < 400 * MB
    assert peak < 1.1 * foretold


PROC = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@PROC
@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """TIES with alpha measured on three models of 60 MB takes as much memory as on three of 15 MB."""
    flat(tmp_path, 1, (15 * MB, 60 * MB), LARGE["ties"])


@PROC
@pytest.mark.slow
@pytest.mark.xdist_group("large")
@pytest.mark.parametrize("tensors", [1, 40], ids=["one tensor", "many tensors"])
@pytest.mark.parametrize("case", LARGE)
def test_memory_is_flat_at_size(case: str, tensors: int, tmp_path: Path) -> None:
    """Merging three models of 200 MB takes as much memory as three of 50 MB, and less than 400 MB in all."""
    flat(tmp_path, tensors, (50 * MB, 200 * MB), LARGE[case])


# --- what is told of it ---


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
@pytest.mark.parametrize("number", [1, 2])
def test_the_share_kept_where_density_varies(method: str, number: int, tmp_path: Path) -> None:
    """The share of entries kept counts tensors of density 1, too, whatever becomes of them."""
    base = {f"layers.{i}.{name}": torch.zeros(100) for i in range(2) for name in ("a", "b")}
    buffer = {"layers.0.steps": torch.arange(500)}  # whole numbers are no part of it
    models = {m: {name: torch.randn(100) for name in base} | buffer for m in "ab"[:number]}
    write(tmp_path, base=base | buffer, **models)
    parameters = {"density": [{"filter": ".a", "value": 0.5}, {"value": 1}]}
    ran = merge(tmp_path, "--json", models="ab"[:number], merge_method=method, parameters=parameters)
    for model in ran.json["models"]:
        assert model["kept"] == pytest.approx(0.75, abs=0.1 if method == "dare_linear" else 0)


def test_a_head_and_its_embedding_lose_the_same_entries(tmp_path: Path) -> None:
    """DARE draws once for a head and the embedding that it is tied to: they stay one weight."""
    config = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 2}
    models = {}
    for number, side in enumerate(("base", "a", "b")):
        shared = torch.randn(50, 4, generator=torch.Generator().manual_seed(number))
        models[side] = {f"model.layers.{i}.w": torch.randn(3) for i in range(2)}
        models[side] |= {"model.embed_tokens.weight": shared, "lm_head.weight": shared.clone()}
    write(tmp_path, configs=dict.fromkeys(models, config), **models)
    assert merge(tmp_path, merge_method="dare_linear", parameters={"density": 0.5}).code == 0
    got = output(tmp_path)
    assert torch.equal(got["lm_head.weight"], got["model.embed_tokens.weight"])
    assert not torch.equal(got["lm_head.weight"], models["base"]["lm_head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("gamma", [0, 1])
@pytest.mark.parametrize("like", ["base", "ft"])
def test_integers_do_not_depend_on_how_alpha_is_known(gamma: int, like: str, tmp_path: Path) -> None:
    """A buffer is the same whether alpha is measured or said, and when the output's own recipe is run again."""
    sides = {s: {**tensors(n), "steps": torch.tensor([n])} for n, s in enumerate(("base", "a", "b"))}
    write(tmp_path, **sides)
    recipe = {"like": like, "parameters": {"weight": 0.9}}
    for out, alpha in (("measured", "auto"), ("said", 0.5)):
        assert merge(tmp_path, out=out, lines={"alpha": alpha, "beta": 0, "gamma": gamma}, **recipe).code == 0
    again = run_lines("merge", "--config", tmp_path / "measured" / "lines_recipe.yaml", "-o", tmp_path / "again")
    assert again.code == 0
    found = {out: int(output(tmp_path, out)["steps"]) for out in ("measured", "said", "again")}
    assert set(found.values()) == {1 if like == "ft" and gamma else 0}


def test_an_infinite_norm_is_no_alpha(tmp_path: Path) -> None:
    """Weights beyond all bounds make the merged norm infinite: refused, rather than scaled to nothing."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, lines={"beta": 0}, parameters={"weight": 1e39})
    refused(ran, 4, "alpha: auto", "very large")
    assert not (tmp_path / "out").exists()


def test_alpha_is_not_measured_where_nothing_rests_on_it(tmp_path: Path) -> None:
    """Models that equal their base are no hindrance where every coefficient is fixed."""
    write(tmp_path, base=tensors(0), a=tensors(0), b=tensors(0))
    scaling = {"beta": 1, "outside": "keep", "stacks": {"layers": {"alpha": 0.5, "beta": 0.5}}}
    ran = merge(tmp_path, "--json", merge_method="average", lines=scaling)
    assert (ran.code, ran.json["norms"]) == (0, None)


def test_lambda_multiplies_fixed_coefficients(tmp_path: Path) -> None:
    """What `outside`, `stacks` or `filter` fix is scaled by lambda, as everything is; gamma is not for them."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    scaling = {"alpha": 1, "beta": 0, "gamma": 2, "outside": "keep", "filter": {"layers.1": 0.25}}
    ran = merge(tmp_path, "--dry-run", "--json", parameters={"lambda": 0.5}, lines=scaling)
    found = {row["name"]: row["coefficient"] for row in ran.json["map"]}
    expected = {"layers.0.w": 1, "layers.1.w": 0.125, "layers.2.w": 1, "embed_tokens.weight": 0.5, "norm": 0.5}
    assert found == expected
    assert ran.json["filters"][0]["coefficient"] == 0.125
    assert ran.json["outside"]["first"] == 0.5


def test_the_card_has_the_coefficients_that_were_applied(tmp_path: Path) -> None:
    """A filter's coefficient is told as it is applied, lambda included."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    scaling = {"alpha": 1, "beta": 0, "filter": {"layers.1": 0.25}}
    assert merge(tmp_path, parameters={"lambda": 0.5}, lines=scaling).code == 0
    assert "| names with `layers.1` | | 0.125 | 0.125 |" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"merge_method": "ties", "parameters": {"density": 0.5}}, ["trim: tensor"]),
        ({"merge_method": "consensus", "parameters": {"k": 3}}, ["k: 3", "there are 2"]),
        ({"parameters": {"density": 0.5}}, ["mergekit ignores it"]),
        ({"merge_method": "dare_ties", "parameters": {"density": 0.5}}, ["rescale: l1"]),
        ({"dtype": "bfloat16"}, ["bfloat16", "arithmetic is float32"]),
        ({"models": "aa"}, ["merged 2 times"]),
        ({"parameters": {"lambda": [{"filter": "w", "value": 2}]}}, ["lambda differs by name"]),
        ({"merge_method": "ties", "parameters": {"density": 0}, "lines": {"beta": 0}}, ["alpha: auto is", "density"]),
    ],
)
def test_what_a_note_says(recipe: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    """What a reader of the recipe might not expect is said in a note."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    ran = merge(tmp_path, **recipe)
    assert ran.code == 0
    assert [word for word in words if word not in ran.err] == [], ran.err


def test_rows_that_are_dropped_are_told(tmp_path: Path) -> None:
    """Whose rows of the embedding are kept, and that others go, is said."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, rows=9))
    ran = merge(tmp_path, resize="ft")
    assert ran.code == 0
    assert [word for word in ("6 rows", "9", "dropped") if word not in ran.err] == []


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ({}, "scaled over depth by"),
        ({"merge_method": "dare_linear", "parameters": {"density": 0.5}}, "One model, merged by `dare_linear`"),
        ({"lines": None}, "One model, merged by `task_arithmetic`"),
    ],
)
def test_the_card_of_one_model(recipe: dict[str, Any], says: str, tmp_path: Path) -> None:
    """The model card describes a scaled fine-tune as one only where nothing else was done to it."""
    write(tmp_path, base=tensors(0), a=tensors(1))
    assert merge(tmp_path, models="a", **{"lines": {"alpha": 0.5, "beta": 0.5}} | recipe).code == 0
    assert says in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_more_files_than_a_process_may_open_at_first(tmp_path: Path) -> None:
    """The soft limit of open files is raised as far as is needed."""
    write_checkpoint(tmp_path / "base", {f"layers.{i}.w": torch.zeros(2) for i in range(60)}, shards=60)
    for model in "ab":
        write_checkpoint(tmp_path / model, {f"layers.{i}.w": torch.ones(2) for i in range(60)}, shards=60)
    text = yaml.safe_dump({"base_model": "base", "models": [{"model": "a"}, {"model": "b"}]})
    (tmp_path / "merge.yaml").write_text(text)

    def program() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        forked.command("merge", "--config", "merge.yaml", "-o", "out", "--device", "cpu")()

    ran = forked.run(program, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr


def test_a_path_below_a_folder_is_no_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that counts from the recipe's folder is looked for there, not as conf/base on the Hub."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "merge.yaml").write_text("base_model: base\nmodels: [{model: ft}]\n")
    monkeypatch.chdir(tmp_path)
    ran = run_lines("merge", "--config", "conf/merge.yaml", "-o", "out")
    assert (ran.code, ran.trace) == (3, "")
    assert "conf/base" in ran.err
    assert "hub" not in ran.err.lower()
