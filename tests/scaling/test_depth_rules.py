"""Depth rules that read the weights (`--schedule esm`, `larv`), against numpy; and those of installed packages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli import installed as in_packages
from lines_cli.engine import measure
from lines_cli.engine.candidates import Candidates
from lines_cli.errors import RecipeError
from lines_cli.recipe.validate import make_recipe
from lines_cli.scaling import depth_rules
from lines_cli.scaling.depth_rules import DepthRule, find_rule
from support.adapters import factors, layers_of, write_adapter
from support.crossed import by_turns
from support.files import write_checkpoint
from support.pipelines import write_pipeline
from support.run import run_lines
from support.schedules import refused

Tensors = dict[str, torch.Tensor]
Matrices = Mapping[str, np.ndarray]
LAYERS = 7
SHAPES = {
    "model.embed_tokens.weight": (13, 8),
    **{
        f"model.layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "self_attn.q_proj.weight": (8, 8),
            "mlp.up_proj.weight": (20, 8),
            "mlp.experts.up": (3, 6, 8),
            "mlp.0.weight": (5, 8),
            "mlp.2.weight": (8, 5),
            "conv.weight": (6, 4, 3, 2),
            "norm.weight": (8,),
        }.items()
    },
    "lm_head.weight": (13, 8),
}


def model(seed: int, base: Tensors | None = None) -> Tensors:
    """Of a fine-tune some layers change much, others little."""
    chance = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    sizes = (0.03 * torch.rand(LAYERS, generator=chance) + 0.002).tolist()
    if base is None:
        return drawn
    return {name: base[name] + tensor * sizes[layer_of(name) or 0] for name, tensor in drawn.items()}


def layer_of(name: str) -> int | None:
    parts = name.split(".")
    return int(parts[2]) if parts[1] == "layers" else None


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and two fine-tunes, in which the process works."""
    base = model(0)
    for name, tensors in (("base", base), ("ft", model(1, base)), ("other", model(2, base))):
        write_checkpoint(tmp_path / name, tensors)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(name: str) -> dict[str, np.ndarray]:
    return {key: tensor.double().numpy() for key, tensor in load_file(Path(name) / "model.safetensors").items()}


def update(of: str = "ft", base: str = "base") -> dict[str, np.ndarray]:
    """As float32 has it."""
    a, b = (load_file(Path(name) / "model.safetensors") for name in (of, base))
    return {name: (a[name] - b[name]).double().numpy() for name in a}


# --- references, from the papers' formulas ---


def esm(_: Matrices, changes: Matrices, power: float = 2.0) -> list[float]:
    """The mean over a layer's matrices of the power of (norm / mean norm of the same matrix over the layers)."""
    kinds = sorted({name.split(".", 3)[3] for name in changes if layer_of(name) is not None})
    kinds = [kind for kind in kinds if changes[f"model.layers.0.{kind}"].ndim > 1]
    norms = np.array([[np.linalg.norm(changes[f"model.layers.{n}.{k}"]) for k in kinds] for n in range(LAYERS)])
    return list(((norms / norms.mean(0)) ** power).mean(1))


def effective_rank(matrix: np.ndarray) -> float:
    squares = np.linalg.svd(matrix, compute_uv=False) ** 2
    p = squares / squares.sum()
    return float(np.exp(-sum(x * np.log(x) for x in p if x > 0)))


def spectra(w: np.ndarray, d: np.ndarray) -> tuple[float, float, float]:
    if w.ndim == 3:
        return tuple(np.mean([spectra(one, other) for one, other in zip(w, d, strict=True)], axis=0))
    w, d = (matrix.reshape(len(matrix), -1) for matrix in (w, d))
    products = (w @ d.T - d @ w.T) if w.shape[0] <= w.shape[1] else (w.T @ d - d.T @ w)
    return effective_rank(w), effective_rank(d), np.linalg.norm(products) / np.linalg.norm(w) / np.linalg.norm(d)


def larv_score(base: Matrices, changes: Matrices) -> np.ndarray:
    contrast, commutator = np.zeros(LAYERS), np.zeros(LAYERS)
    for layer in range(LAYERS):
        names = [name for name in base if layer_of(name) == layer and base[name].ndim > 1]
        of_layer = [spectra(base[name], changes[name]) for name in names]
        contrast[layer] = np.mean([rank / own for rank, own, _ in of_layer])
        commutator[layer] = np.mean([term for _, _, term in of_layer])
    z = (commutator - commutator.mean()) / commutator.std()
    return contrast * np.sqrt(np.arange(1, LAYERS + 1) / LAYERS) / (1 + np.log1p(np.exp(z)))


def larv(base: Matrices, changes: Matrices) -> list[float]:
    scores = larv_score(base, changes)
    low, high = np.quantile(scores, [1 / 3, 2 / 3])
    return [0.0 if score < low else 1.0 if score > high else 0.5 for score in scores]


def larv_tanh(base: Matrices, changes: Matrices) -> list[float]:
    scores = larv_score(base, changes)
    return list((1 + np.tanh((scores - scores.mean()) / scores.std())) / 2)


RULES: dict[str, Callable[[Matrices, Matrices], list[float]]] = {
    "esm": esm,
    "esm:0.5": lambda base, changes: esm(base, changes, 0.5),
    "larv": larv,
    "larv-tanh": larv_tanh,
}


def layers(said: Mapping[str, Any]) -> list[float]:
    (stack,) = said["stacks"]
    return list(stack["coefficients"])


# --- against the references ---


@pytest.mark.parametrize("rule", RULES)
def test_an_edit_has_the_rule_s_coefficients(rule: str, here: Path) -> None:
    """alpha + beta * share for every layer, alpha outside the blocks; and the output holds them to the bit."""
    ran = run_lines("edit", "base", "ft", "-o", "out", "--schedule", rule, "--alpha", 0.25, "--beta", 0.5, "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    shares = RULES[rule](read("base"), update())
    found = layers(ran.json)
    assert found == pytest.approx([0.25 + 0.5 * share for share in shares], rel=1e-7)
    base, ft, got = (load_file(here / name / "model.safetensors") for name in ("base", "ft", "out"))
    for name, tensor in got.items():
        layer = layer_of(name)
        c = np.float32(0.25 if layer is None else found[layer])
        assert torch.equal(tensor, base[name] + torch.tensor(c) * (ft[name] - base[name])), name


@pytest.mark.slow
@by_turns(method=["task_arithmetic", "ties", "iso_c", "linear"], rule=["esm", "larv-tanh"])
def test_it_measures_what_the_method_makes(rule: str, method: str, here: Path) -> None:
    """The merged task vector, before lambda and gamma: that of the same recipe without `lines:`."""
    asked: dict[str, Any] = {"merge_method": method, "models": [{"model": "ft"}, {"model": "other"}]}
    if method == "ties":
        asked["parameters"] = {"density": 0.5}
    if method != "linear":
        asked["base_model"] = "base"
    lines.merge(asked, output="plain")
    scaling = {"alpha": 0.5, "beta": 0.25, "schedule": rule, "gamma": 2.0}
    said = lines.merge({**asked, "base_model": "base", "lines": scaling}, output="out")
    shares = RULES[rule](read("base"), update("plain"))
    assert layers(said) == pytest.approx([2 * (0.5 + 0.25 * share) for share in shares], rel=1e-4)


@pytest.mark.slow
def test_lambda_and_alpha_auto(here: Path) -> None:
    """What lambda multiplies is measured without it; alpha is measured, too."""
    asked = {"merge_method": "ties", "base_model": "base", "models": [{"model": "ft"}, {"model": "other"}]}
    auto = lines.merge({**asked, "lines": {"beta": 0.25}}, output="auto")
    scaling = {"beta": 0.25, "schedule": "esm"}
    one = lines.merge({**asked, "lines": scaling}, output="one")
    half = lines.merge({**asked, "lines": scaling, "parameters": {"lambda": 0.5}}, output="half")
    assert one["alpha"] == half["alpha"] == auto["alpha"]
    assert layers(half) == pytest.approx([c / 2 for c in layers(one)], rel=1e-12)
    recorded = yaml.safe_load((here / "one" / "lines_recipe.yaml").read_text())
    assert recorded["lines"]["alpha"] == one["alpha"]
    assert recorded["lines"]["schedule"] == "esm"


# --- wherever it runs, the same bytes ---


@pytest.mark.parametrize("rule", ["esm", "larv", "larv-tanh"])
@pytest.mark.slow
def test_chunks_workers_and_shards_change_no_byte(rule: str, here: Path) -> None:
    """The same coefficients, to the bit."""
    asked = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "ft"}, {"model": "other"}],
        "lines": {"alpha": 0.2, "beta": 0.7, "schedule": rule},
    }

    def merged(out: str, asked: Mapping[str, Any], **resources: Any) -> tuple[list[float], Tensors]:
        recipe = make_recipe(asked, where="here")
        plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path(out))
        outcome = lines.run(plan, lines.Resources(device="cpu", **resources))
        return layers(outcome.plan.summary()), load_file(here / out / "model.safetensors")

    plain = merged("plain", asked, workers=1)
    write_checkpoint(here / "sharded", load_file(here / "ft" / "model.safetensors"), shards=3)
    sharded = {**asked, "models": [{"model": "sharded"}, {"model": "other"}]}
    for number, (said, chunk, workers) in enumerate(((asked, 7, 3), (sharded, 64, 2), (sharded, 1, 4))):
        coefficients, tensors = merged(f"{number}", said, workers=workers, chunk=chunk)
        assert coefficients == plain[0]
        assert all(torch.equal(tensor, plain[1][name]) for name, tensor in tensors.items())


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["esm", "larv"])
def test_it_is_forecast_verified_and_made_again(rule: str, here: Path) -> None:
    """A dry run says that it is measured, and how much is read; verify and the output's recipe measure it again."""
    edit = ["edit", "base", "ft", "--schedule", rule]
    told = run_lines(*edit, "--dry-run", "--json").json
    assert [one["measures"] for one in told["passes"]] == [f"{rule} scores"]
    matrices = [math.prod(shape) for name, shape in SHAPES.items() if "layers" in name and len(shape) > 1]
    assert told["passes"][0]["bytes"] == 2 * 4 * sum(matrices)
    assert layers(told) == [None] * LAYERS
    assert f"measure {rule} scores" in run_lines(*edit, "--dry-run").out
    assert run_lines(*edit, "-o", "out").code == 0
    assert run_lines("verify", "out").code == 0
    assert run_lines("merge", "--config", "out/lines_recipe.yaml", "-o", "again").code == 0
    first, second = (Path(name, "model.safetensors").read_bytes() for name in ("out", "again"))
    assert first == second
    damaged = load_file(here / "out" / "model.safetensors")
    damaged["lm_head.weight"][0, 0] += 1
    write_checkpoint(here / "out", damaged)
    assert run_lines("verify", "out").code != 0


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--resume takes the scores from the journal."""
    edit = ["edit", "base", "ft", "-o", "out", "--schedule", "larv"]
    plain = run_lines(*edit[:3], "-o", "plain", *edit[5:], "--json").json
    with monkeypatch.context() as patch:
        patch.setattr("lines_cli.engine.run.resolve", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run_lines(*edit).code != 0
    with monkeypatch.context() as patch:
        patch.setattr(measure.Measuring, "scores", None)  # would be called
        resumed = run_lines(*edit, "--resume", "--json")
    assert (resumed.code, resumed.trace) == (0, ""), resumed.err
    assert layers(resumed.json) == layers(plain)
    assert Path("out/model.safetensors").read_bytes() == Path("plain/model.safetensors").read_bytes()


@pytest.mark.slow
def test_in_memory(here: Path) -> None:
    """Tensors in memory come to those of the files."""
    run_lines("edit", "base", "ft", "-o", "out", "--schedule", "esm", "--alpha", 0.2)
    base, ft, expected = (load_file(here / name / "model.safetensors") for name in ("base", "ft", "out"))
    found = lines.edit_state_dict(base, ft, schedule="esm", alpha=0.2)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.slow
def test_candidates_of_a_sweep(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Candidates with other ends, another power, and another rule are the merges of their recipes; each rule is
    measured once.
    """
    measured: list[str] = []
    scores = measure.Measuring.scores

    def counted(own: Any, rule: str) -> None:
        measured.append(rule)
        scores(own, rule)

    monkeypatch.setattr(measure.Measuring, "scores", counted)
    models = {"base_model": "base", "models": [{"model": "ft"}, {"model": "other"}]}
    candidates = Candidates(scratch=here / "scratch")
    for number, (rule, alpha) in enumerate((("esm", 0.2), ("esm", 0.7), ("esm:1", 0.2), ("larv", 0.2))):
        asked = {"merge_method": "ties", **models, "lines": {"alpha": alpha, "beta": 0.5, "schedule": rule}}
        lines.merge(asked, output=f"{number}")
        merges = len(measured)
        candidates.write(candidates.plan(make_recipe(asked, where="here"), here / "out"), here / f"{number} again")
        assert measured[merges:] == ([] if number in (1, 2) else [rule])
        first, second = (Path(name, "model.safetensors").read_bytes() for name in (f"{number}", f"{number} again"))
        assert first == second
    candidates.close()


# --- what there is to look at ---


@pytest.mark.slow
def test_odd_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that does not change, one with a matrix that no other has, and one without matrices: each has a share."""
    monkeypatch.chdir(tmp_path)
    chance = torch.Generator().manual_seed(0)
    names = {f"h.{n}.w": (4, 4) for n in range(4)} | {"h.2.extra": (4, 3)} | {f"h.{n}.b": (4,) for n in range(5)}
    base = {name: torch.randn(shape, generator=chance) for name, shape in names.items()}
    ft = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=chance) for name, tensor in base.items()}
    ft["h.1.w"] = base["h.1.w"]
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", ft)
    ran = run_lines("edit", "base", "ft", "-o", "out", "--schedule", "esm", "--alpha", 0, "--beta", 1, "--json")
    norms = [float((ft[f"h.{n}.w"] - base[f"h.{n}.w"]).double().norm()) for n in range(4)]
    ratios = [(norm / (sum(norms) / 4)) ** 2 for norm in norms]
    expected = [ratios[0], 0.0, (ratios[2] + 1) / 2, ratios[3], 1.0]
    assert layers(ran.json) == pytest.approx(expected, rel=1e-9)
    told = run_lines("edit", "base", "ft", "-o", "larv", "--schedule", "larv", "--alpha", 0, "--beta", 1, "--json").json
    assert layers(told)[1] == layers(told)[4] == 0.5
    write_checkpoint(tmp_path / "same", base)
    for rule, expected in (("esm", 1.0), ("larv", 0.5), ("larv-tanh", 0.5)):
        told = run_lines(
            "edit", "base", "same", "-o", f"s {rule}", "--schedule", rule, "--alpha", 0, "--beta", 1, "--json"
        )
        assert layers(told.json) == [expected] * 5


@pytest.mark.parametrize(("rule", "share"), [("esm", 1.0), ("larv", 0.5), ("larv-tanh", 0.5)])
def test_one_layer_alone(rule: str, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its own mean, and neither in the least third nor in the largest."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("base", "ft")):
        chance = torch.Generator().manual_seed(seed)
        write_checkpoint(tmp_path / name, {"layers.0.w": torch.randn(4, 4, generator=chance)})
    ran = run_lines("edit", "base", "ft", "-o", "out", "--schedule", rule, "--alpha", 0.1, "--beta", 0.6, "--json")
    assert layers(ran.json) == [pytest.approx(0.1 + 0.6 * share)]


def test_stacks_are_measured_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own mean, and may have its own ends, or be kept."""
    monkeypatch.chdir(tmp_path)
    names = [f"{side}.block.{n}.layer.0.w" for side in ("encoder", "decoder") for n in range(3)]
    base = {name: torch.zeros(2, 2, dtype=torch.float64) for name in names}
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "ft", {n: torch.full((2, 2), float(i + 1)).double() for i, n in enumerate(names)})
    options = ["--schedule", "esm:1", "--alpha", 0.0, "--beta", 1.0]
    told = run_lines("edit", "base", "ft", "-o", "out", *options, "--stack", "decoder=1,2", "--json").json
    found = {stack["name"]: stack["coefficients"] for stack in told["stacks"]}
    assert found["encoder.block"] == pytest.approx([1 / 2, 1, 3 / 2])
    assert found["decoder.block"] == pytest.approx([1 + 2 * 4 / 5, 3, 1 + 2 * 6 / 5])
    kept = run_lines("edit", "base", "ft", "-o", "kept", *options, "--stack", "decoder=keep", "--json").json
    found = {stack["name"]: stack["coefficients"] for stack in kept["stacks"]}
    assert found["encoder.block"] == pytest.approx([1 / 2, 1, 3 / 2])
    assert found["decoder.block"] == [1, 1, 1]


def test_beta_of_0_measures_nothing(here: Path) -> None:
    """Then shares make no difference; nor do they where a filter has the last word everywhere."""
    for options in (["--alpha", 0.5, "--beta", 0], ["--filter", "*=0.5"]):
        told = run_lines("edit", "base", "ft", "--dry-run", "--schedule", "esm", *options, "--json").json
        assert told["passes"] == []
        assert {row["coefficient"] for row in told["map"]} == {0.5}


# --- inspect ---


@pytest.mark.slow
def test_inspect_draws_it(here: Path) -> None:
    """With a base it is measured, and is that of the edit; of an output it is what the output records; else unknown."""
    run_lines("edit", "base", "ft", "-o", "out", "--schedule", "larv-tanh")
    shares = larv_tanh(read("base"), update())
    expected = [pytest.approx(0.1 + 0.9 * share, rel=1e-6) for share in shares]

    def shown(*arguments: object) -> list[float | None]:
        ran = run_lines("inspect", *arguments, "--json")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        return [layer["coefficient"] for layer in ran.json["layers"]]

    assert shown("ft", "--base", "base", "--schedule", "larv-tanh", "--plot", "p.svg") == expected
    assert Path("p.svg").stat().st_size > 1000
    assert shown("out") == expected
    assert shown("ft", "--schedule", "larv-tanh") == [None] * LAYERS
    assert "--base BASE" in run_lines("inspect", "ft", "--schedule", "larv-tanh").err
    assert shown("ft", "--schedule", "cosine")[0] == 0.1


@pytest.mark.slow
def test_inspect_foresees_rounding_by_it(here: Path) -> None:
    """What rounding leaves is that of the coefficients that are measured; a recipe's are, too, with its alpha."""
    told = run_lines("inspect", "ft", "--base", "base", "--schedule", "esm", "--json").json
    assert [layer["realised"] for layer in told["layers"]] == pytest.approx(
        [layer["coefficient"] for layer in told["layers"]], rel=1e-3
    )
    asked = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "ft"}, {"model": "other"}],
        "lines": {"beta": 0.25, "schedule": "esm"},
    }
    Path("m.yaml").write_text(yaml.safe_dump(asked))
    merged = lines.merge(asked, output="out")
    told = run_lines("inspect", "--config", "m.yaml", "--json").json
    assert [layer["coefficient"] for layer in told["layers"]] == layers(merged)
    assert told["scaling"]["alpha"] == merged["alpha"]


@pytest.mark.slow
def test_inspect_what_does_not_pair(here: Path) -> None:
    """Tensors inside blocks that one side lacks are passed over, as ever."""
    short = load_file(here / "ft" / "model.safetensors")
    del short["model.layers.3.mlp.up_proj.weight"]
    write_checkpoint(here / "short", short)
    ran = run_lines("inspect", "short", "--base", "base", "--schedule", "larv", "--json")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    assert all(layer["coefficient"] is not None for layer in ran.json["layers"])


@pytest.mark.slow
def test_components_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each may have a rule of its own; what is measured of one does not depend on the others."""
    monkeypatch.chdir(tmp_path)
    write_pipeline(tmp_path / "base", 1)
    write_pipeline(tmp_path / "ft", 2)

    def found(out: str, components: Any, schedule: str = "linear") -> dict[str, list[float]]:
        scaling = {"alpha": 0.1, "beta": 0.9, "schedule": schedule}
        asked = {"base_model": "base", "models": [{"model": "ft"}], "lines": scaling, "components": components}
        told = lines.merge(asked, output=out)
        assert run_lines("verify", out).code == 0
        shown = run_lines("inspect", out, "--json").json["layers"]
        for stack in told["stacks"]:
            own = [layer["coefficient"] for layer in shown if layer["stack"] == stack["name"]]
            assert own == pytest.approx(stack["coefficients"], rel=1e-12)
        return {stack["name"].partition(".")[0]: stack["coefficients"] for stack in told["stacks"]}

    every = found("every", {}, "esm")
    one = found("one", {"unet": {"schedule": "esm"}, "text_encoder": {"schedule": "larv-tanh"}})
    ends = found("ends", {"unet": {"schedule": "esm", "alpha": 0.2, "beta": 0.5}})
    assert one["unet"] == every["unet"]
    assert one["text_encoder"] != every["text_encoder"]
    assert ends["unet"] == pytest.approx([0.2 + 0.5 * (c - 0.1) / 0.9 for c in every["unet"]])
    assert ends["text_encoder"] == pytest.approx([0.1, 0.4, 0.7, 1.0])


# --- refused ---


def test_what_cannot_be_measured(here: Path) -> None:
    """An adapter, names alone, blocks without matrices: refused, with the way out."""
    modules = layers_of(3, {"self_attn.q_proj": (8, 8)})
    write_adapter(here / "adapter", factors(modules, 4, 1))
    edit = ["edit", "--adapter", "adapter", "-o", "out", "--num-layers", 3, "--schedule", "esm"]
    refused(run_lines(*edit), "esm is measured on whole matrices", "linear or cosine")
    extract = ["extract", "ft", "--base", "base", "-o", "out", "--rank", 2, "--schedule", "larv"]
    refused(run_lines(*extract), "larv is measured on whole matrices")
    with pytest.raises(RecipeError, match="esm is measured on weights"):
        lines.coefficients(SHAPES, schedule="esm")
    for name in ("flat", "flat ft"):
        write_checkpoint(here / name, {f"h.{n}.b": torch.ones(3) for n in range(2)})
    refused(
        run_lines("edit", "flat", "flat ft", "-o", "out", "--schedule", "esm"), "looks at the matrices", "h has none"
    )
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("esm:0", "a number above 0, as in esm:2"),
        ("esm:nan", "a number above 0"),
        ("esm:x", "a number above 0"),
        ("sigmoid:-1", "as in sigmoid:10"),
        ("sigmoid:", "as in sigmoid:10"),
        ("larv:2", "larv takes no number"),
        ("cosine:1", "cosine takes no number"),
        ("reversed:1", "reversed takes no number"),
        ("cosin", "did you mean cosine?"),
        ("LARV", "did you mean larv?"),
        ("larv_tanh", "did you mean larv-tanh?"),
        ("nothing-like-it" * 50, "a schedule is linear"),
    ],
)
def test_what_no_rule_is_called(said: str, words: str, here: Path) -> None:
    """A wrong name or number is said to be, with what there is."""
    refused(run_lines("edit", "base", "ft", "-o", "out", "--schedule", said), words)


@pytest.mark.slow
def test_values_that_are_not_finite(here: Path) -> None:
    """NaN in a matrix is refused; where it is let through, no share rests on it."""
    broken = load_file(here / "ft" / "model.safetensors")
    broken["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    write_checkpoint(here / "broken", broken)
    for rule in ("esm", "larv"):
        edit = ["edit", "base", "broken", "-o", "out", "--schedule", rule]
        refused(run_lines(*edit), "model.layers.2.mlp.up_proj.weight holds NaN", code=5)
        refused(run_lines(*edit, "--allow-nonfinite"), f"schedule: {rule} gives", "is not finite", code=4)
    assert not Path("out").exists()


# --- rules of installed packages ---


MIDDLE = DepthRule("The middle layers.", share=lambda x, number: 1 - abs(2 * x - 1) ** (number or 1), number=1.0)
LARGEST = DepthRule(
    "The layer with the largest entry.",
    measure=lambda base, update: (float((base + update).abs().max()),),
    scores=lambda found, number: [max((n for own in one.values() for (n,) in own), default=0.0) for one in found],
    sees="tensors",
)
WRONG = DepthRule("Too few.", measure=lambda base, update: (update,), scores=lambda found, number: [1.0])
BROKEN = DepthRule("It fails.", measure=lambda base, update: (update,), scores=lambda found, number: [found[99]])


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages that add rules."""
    said = {"middle": "MIDDLE", "largest": "LARGEST", "wrong": "WRONG", "broken-rule": "BROKEN", "esm": "WRONG"}
    points = [EntryPoint(name, f"{__name__}:{value}", depth_rules.GROUP) for name, value in said.items()]
    points += [EntryPoint("absent", "no_such_module:RULE", depth_rules.GROUP)]
    points += [EntryPoint("odd", "json:dumps", depth_rules.GROUP)]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: points if group == depth_rules.GROUP else [])
    find_rule.cache_clear()
    in_packages.added.cache_clear()
    yield
    find_rule.cache_clear()
    in_packages.added.cache_clear()


@pytest.mark.slow
def test_a_package_adds_rules(here: Path, installed: None) -> None:
    """One that follows from the depth, with its number; and one that measures."""

    def found(rule: str) -> Sequence[float]:
        ran = run_lines("edit", "base", "ft", "-o", rule, "--schedule", rule, "--alpha", 0, "--beta", 1, "--json")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        assert run_lines("verify", rule).code == 0
        return layers(ran.json)

    assert found("middle") == pytest.approx([0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3, 0])
    assert found("middle:2") == pytest.approx([1 - abs(2 * x / 6 - 1) ** 2 for x in range(7)])
    ft = load_file(here / "ft" / "model.safetensors")
    matrices = {name: tensor for name, tensor in ft.items() if tensor.ndim > 1}
    most = [max(float(t.abs().max()) for n, t in matrices.items() if layer_of(n) == layer) for layer in range(LAYERS)]
    assert found("largest") == pytest.approx(most, rel=1e-6)
    assert find_rule("esm") is depth_rules.RULES["esm"]


@pytest.mark.slow
def test_a_package_that_is_broken_is_named(here: Path, installed: None) -> None:
    """By what asks for its rule, and by nothing else."""

    def ran(rule: str) -> Any:
        return run_lines("edit", "base", "ft", "-o", "out", "--schedule", rule)

    refused(ran("absent"), "'absent' is a schedule of the package", "no_such_module")
    refused(ran("odd"), "json:dumps is function, not lines_cli.scaling.depth_rules.DepthRule")
    refused(ran("wrong"), "the rule gave 1 shares for 7 layers", code=4)
    refused(ran("broken-rule"), "IndexError", code=4)
    refused(ran("midle"), "did you mean middle?")
    assert not Path("out").exists()
    assert ran("esm").code == 0
    with pytest.raises(ValueError, match="either share, or both"):
        DepthRule("Nothing.")
