"""`calibrate: svc`: matrix by matrix against numpy, on top of every method, beneath LiNeS, and refused where it has no
place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import lines_cli as lines
from lines_cli.engine.candidates import Candidates
from lines_cli.errors import DataError, RecipeError
from lines_cli.methods import CALIBRATIONS
from lines_cli.methods.calibration import svc
from lines_cli.recipe.schema import Calibrate
from support.crossed import by_turns
from support.files import write_checkpoint
from support.method_cases import TABLE, TYPICAL, Case
from support.run import run_lines
from support.spectral_references import calibrated
from support.whole_model import Tensors, norm1, plain_sum, task_vectors

SHAPES = {
    "model.embed_tokens.weight": (19, 12),
    **{f"model.layers.{n}.mlp.experts.up": (3, 10, 7) for n in range(2)},
    **{f"model.layers.{n}.mlp.up.weight": (31, 12) for n in range(2)},
    **{f"model.layers.{n}.mlp.down.weight": (12, 31) for n in range(2)},
    **{f"model.layers.{n}.norm.weight": (12,) for n in range(2)},
    "model.scale": (),
    "model.conv.weight": (4, 3, 2, 2),
}


def model(seed: int, base: Tensors | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
    chance = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(shape, generator=chance) for name, shape in SHAPES.items()}
    made = noise if base is None else {name: base[name].float() + noise[name] / 8 for name in noise}
    return {name: tensor.to(dtype) for name, tensor in made.items()}


def family(number: int, dtype: torch.dtype = torch.float32) -> tuple[Tensors, list[Tensors]]:
    base = model(0, dtype=dtype)
    return base, [model(seed, base, dtype) for seed in range(1, number + 1)]


def recipe(method: str, said: Any, number: int, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": method,
        "base_model": "base",
        "models": [{"model": name} for name in "abcdefgh"[:number]],
        "parameters": dict(said),
        "calibrate": "svc",
        **more,
    }


def save(folder: Path, base: Tensors, models: list[Tensors]) -> None:
    for name, tensors in zip(("base", *"abcdefgh"), (base, *models), strict=False):
        write_checkpoint(folder / name, tensors)


def planned(folder: Path, asked: dict[str, Any], out: str = "out") -> lines.Plan:
    (folder / "merge.yaml").write_text(yaml.safe_dump(asked))
    loaded = lines.load_recipe(folder / "merge.yaml")
    return lines.make_plan(loaded, lines.open_inputs(loaded), folder / out)


def merged(folder: Path, asked: dict[str, Any], out: str = "out", **resources: Any) -> lines.Outcome:
    return lines.run(planned(folder, asked, out), lines.Resources(**{"device": "cpu", **resources}))


def of_method(method: str, said: Any, base: Tensors, models: list[Tensors]) -> Tensors:
    """The reference's merged task vector, `lambda` apart."""
    case = Case(method, {key: value for key, value in said.items() if key != "lambda"})
    if not TABLE[method].on_weights:
        return case.merged(task_vectors(base, models), base)
    return {name: tensor - base[name] for name, tensor in case.merged(models).items()}


def close(got: Tensors, expected: Tensors, off: float = 2e-6) -> None:
    """Relative to the norm of each tensor."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert float((got[name] - tensor).norm()) <= off * float(tensor.norm()), name


# --- matrix by matrix ---


def uneven(shape: tuple[int, ...], seed: int) -> Tensor:
    chance = np.random.default_rng(seed)
    r = min(shape)
    u, v = (np.linalg.qr(chance.normal(size=(n, r)))[0] for n in shape)
    return torch.from_numpy((u * np.arange(1, r + 1) ** -1.0) @ v.T).float()


TASKS: dict[str, list[Tensor]] = {
    "tall": [uneven((300, 40), seed) for seed in range(4)],
    "wide": [uneven((40, 300), seed) for seed in range(4)],
    "wider than a part": [uneven((40, 1200), seed) for seed in range(2)],
    "square": [uneven((64, 64), seed) for seed in range(3)],
    "with much in common": [uneven((50, 80), 9) + 0.1 * uneven((50, 80), seed) for seed in range(5)],
    "that cancel": [uneven((50, 80), 9), 0.5 * uneven((50, 80), 3) - uneven((50, 80), 9)],
    "of low rank": [uneven((60, 8), seed) @ uneven((8, 90), seed + 10) for seed in range(3)],
    "one that changed nothing": [uneven((50, 80), 1), torch.zeros(50, 80), uneven((50, 80), 2)],
    "batched": [torch.stack([uneven((20, 30), 10 * seed + n) for n in range(3)]) for seed in range(3)],
    "float64": [uneven((50, 80), seed).double() for seed in range(3)],
    "large": [1e30 * uneven((30, 40), seed) for seed in range(3)],
    "small": [1e-30 * uneven((30, 40), seed) for seed in range(3)],
}


@by_turns(tasks=TASKS, scale=[1.0, 0.3])
def test_against_numpy(tasks: str, scale: float) -> None:
    """Within 1e-6, or for float64 within 1e-9, of the formula carried out direction by direction."""
    tensors = TASKS[tasks]
    total = scale * sum(tensors[1:], tensors[0])
    before = [tensor.clone() for tensor in tensors]
    got = svc(total.clone(), tensors)
    assert all(torch.equal(tensor, as_it_was) for tensor, as_it_was in zip(tensors, before, strict=True))
    expected = calibrated({"w": total}, [{"w": tensor} for tensor in tensors])["w"]
    off = (got.double() - expected.double()).norm() / expected.double().norm()
    assert float(off) < (1e-9 if got.dtype == torch.float64 else 1e-6)
    if tasks != "of low rank":
        assert float((got - total).double().norm() / total.double().norm()) > 1e-2  # it does something


def test_what_tasks_share_counts_once() -> None:
    """The sum of T tasks that are all the same is that task again; whatever the sum is multiplied by."""
    tau = uneven((40, 60), 5)
    for shares in ((1.0, 1.0, 1.0), (2.0, 2.0, 2.0)):
        total = sum(share * tau for share in shares)
        assert isinstance(total, Tensor)
        torch.testing.assert_close(svc(total, [tau] * 3), tau, rtol=1e-5, atol=1e-7)


def test_tasks_that_do_not_meet_stay_as_they_are() -> None:
    """Their directions are their own: nothing accumulates, and a task that has no part in a direction has no say."""
    first, second = torch.zeros(60, 40), torch.zeros(60, 40)
    first[:30, :20], second[30:, 20:] = uneven((30, 20), 1), uneven((30, 20), 2)
    total = first + second
    torch.testing.assert_close(svc(total.clone(), [first, second]), total, rtol=1e-5, atol=1e-7)


def test_one_task_stays_as_it_is() -> None:
    tau = uneven((40, 60), 5)
    torch.testing.assert_close(svc(tau.clone(), [tau]), tau, rtol=1e-6, atol=1e-8)


def test_equal_singular_values_have_one_gain() -> None:
    """Whatever directions a decomposition finds among them: a rotation of the outputs rotates the result."""
    chance = np.random.default_rng(3)
    rotation = torch.from_numpy(np.linalg.qr(chance.normal(size=(40, 40)))[0]).float()
    flat = torch.linalg.qr(uneven((60, 40), 1).double()).Q.T.float() * 0.7
    tasks = [uneven((40, 60), seed) for seed in range(3)]
    got = svc(flat.clone(), tasks)
    turned = svc(rotation @ flat, [rotation @ task for task in tasks])
    torch.testing.assert_close(turned, rotation @ got, rtol=1e-4, atol=1e-6)
    ratio = got / flat
    torch.testing.assert_close(ratio, ratio[0, 0].expand_as(ratio), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(7,), (), (4, 3, 2, 2), (0, 5), (3, 0, 4)], ids=str)
def test_what_is_no_matrix_stays_as_it_is(shape: tuple[int, ...]) -> None:
    tensor = torch.randn(shape)
    assert torch.equal(svc(tensor.clone(), [tensor, tensor]), tensor)


@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)], ids=str)
def test_zero_stays_zero(shape: tuple[int, ...]) -> None:
    """Merged to nothing, of tasks that changed something or nothing."""
    assert not svc(torch.zeros(shape), [torch.ones(shape), -torch.ones(shape)]).any()
    assert not svc(torch.zeros(shape), [torch.zeros(shape)] * 2).any()
    kept = torch.ones(shape)
    assert torch.equal(svc(kept.clone(), [torch.zeros(shape)] * 2), kept)


def test_one_matrix_of_a_batch_does_not_touch_the_others() -> None:
    """NaN fills its own, in the merged one or in a task's."""
    tasks = [torch.stack([uneven((6, 9), 10 * seed + n) for n in range(3)]) for seed in range(2)]
    total = tasks[0] + tasks[1]
    alone = [svc(total[n].clone(), [task[n] for task in tasks]) for n in range(3)]
    tasks[1][1, 2, 3] = torch.inf
    got = svc(total, tasks)
    assert got[1].isnan().all()
    assert torch.equal(got[0], alone[0])
    assert torch.equal(got[2], alone[2])


# --- from file to file ---


def test_every_calibration_can_be_asked_for() -> None:
    assert set(get_args(Calibrate)) == CALIBRATIONS.keys()


QUICK = {"task_arithmetic-0", "ties-0", "dare_linear-1", "linear-0", "iso_c-0", "slerp-0"}
EVERY = [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in TYPICAL]


@pytest.mark.slow
@pytest.mark.parametrize("case", EVERY)
def test_on_top_of_every_method(case: str, tmp_path: Path) -> None:
    """What the method makes is calibrated, and that is what LiNeS scales; `alpha: auto` is measured of it."""
    method, said = TYPICAL[case]
    base, models = family(TABLE[method].models or 3)
    save(tmp_path, base, models)
    said = {key: value for key, value in said.items() if key != "lambda"}
    outcome = merged(tmp_path, recipe(method, said, len(models), lines={"beta": 0.5}), workers=2, chunk=100)
    taus = task_vectors(base, models)
    expected = of_method(method, said, base, models)
    if method != "passthrough":  # one model that is itself has nothing to be calibrated
        expected = calibrated(expected, taus)
    alpha = outcome.plan.alpha
    assert alpha is not None
    if method != "task_arithmetic":  # whose sum is that of what is kept
        assert alpha == pytest.approx(norm1(plain_sum(taus)) / norm1(expected) / len(models), rel=2e-5)
    got = load_file(tmp_path / "out" / "model.safetensors")
    depth = {name: alpha + 0.5 * ("layers.1" in name) for name in base}
    close(got, {name: base[name] + depth[name] * expected[name] for name in base}, 5e-6)


def test_weights_have_their_say(tmp_path: Path) -> None:
    """A model of weight 0 is none of the tasks; the others are calibrated against as they are, unweighted."""
    base, models = family(3)
    save(tmp_path, base, models)
    asked = recipe("task_arithmetic", {}, 3)
    for source, weight in zip(asked["models"], (0.5, 0.0, 2.0), strict=True):
        source["parameters"] = {"weight": weight}
    merged(tmp_path, asked)
    taus = task_vectors(base, models)
    total = {name: 0.5 * taus[0][name] + 2 * taus[2][name] for name in base}
    expected = calibrated(total, [taus[0], taus[2]])
    close(load_file(tmp_path / "out" / "model.safetensors"), {n: base[n] + expected[n] for n in base})


SIDE_BY_SIDE = [((12,), (31, 12)), ((31, 12), (12,)), ((12, 31), (31, 12)), ((3, 10, 7), (5,)), ((4, 5), (4, 5), (3,))]


@by_turns(shapes=SIDE_BY_SIDE, lined=[False, True])
def test_small_tensors_side_by_side(shapes: Any, lined: bool, tmp_path: Path) -> None:
    """Small tensors that are merged in one go are those that are not calibrated: each matrix stays one by itself."""
    chance = torch.Generator().manual_seed(0)

    def some(scale: float) -> Tensors:
        names = [f"layers.{layer}.w{at}" for layer in range(2) for at in range(len(shapes))]
        return {name: scale * torch.randn(shapes[int(name[-1])], generator=chance) for name in names}

    base = some(1.0)
    models = [{name: base[name] + tau for name, tau in some(0.1).items()} for _ in range(3)]
    save(tmp_path, base, models)
    merged(tmp_path, recipe("task_arithmetic", {}, 3, **({"lines": {"alpha": 0.5, "beta": 0.5}} if lined else {})))
    taus = task_vectors(base, models)
    expected = calibrated(plain_sum(taus), taus)
    depth = {name: 0.5 if lined and ".0." in name else 1.0 for name in base}
    close(load_file(tmp_path / "out" / "model.safetensors"), {n: base[n] + depth[n] * expected[n] for n in base})


@pytest.mark.parametrize("method", ["ties", "iso_c", "linear"])
@pytest.mark.some(2)
def test_the_same_bytes_for_any_workers_chunks_and_shards(method: str, tmp_path: Path) -> None:
    """On one machine; and `lines verify` computes them again."""
    base, models = family(3, torch.bfloat16)
    save(tmp_path, base, models)
    asked = recipe(method, {"density": 0.5} if method == "ties" else {}, 3, lines={"beta": 0.5})
    plain = merged(tmp_path, asked, "plain", workers=1)
    expected = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for workers, chunk in ((3, 7), (2, 100)):
        other = merged(tmp_path, asked, f"{workers}", workers=workers, chunk=chunk)
        assert other.plan.alpha == plain.plan.alpha
        assert (tmp_path / f"{workers}" / "model.safetensors").read_bytes() == expected
    merged(tmp_path, {**asked, "max_shard_size": 1000}, "sharded")
    whole = load_file(tmp_path / "plain" / "model.safetensors")
    parts = {}
    for file in (tmp_path / "sharded").glob("*.safetensors"):
        parts |= load_file(file)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    assert run_lines("verify", tmp_path / "plain", "--quiet").code == 0


@pytest.mark.slow
def test_candidates_of_a_sweep_are_calibrated(tmp_path: Path) -> None:
    """What is merged once for all of them is calibrated once; the bytes are those of a run."""
    base, models = family(3)
    save(tmp_path, base, models)
    candidates = Candidates(lines.Resources(device="cpu"), scratch=tmp_path / "scratch")
    for beta in (0.3, 0.9):
        asked = recipe("ties", {"density": 0.5}, 3, lines={"beta": beta})
        merged(tmp_path, asked, f"run-{beta}")
        plan = candidates.plan(lines.load_recipe(tmp_path / "merge.yaml"), tmp_path / "candidate")
        candidates.write(plan, tmp_path / f"candidate-{beta}")
        weights = [(tmp_path / f"{made}-{beta}" / "model.safetensors").read_bytes() for made in ("run", "candidate")]
        assert weights[0] == weights[1]
    candidates.close()


@pytest.mark.slow
def test_in_memory_it_is_the_same(tmp_path: Path) -> None:
    base, models = family(3)
    save(tmp_path, base, models)
    merged(tmp_path, recipe("task_arithmetic", {"lambda": 0.4}, 3))
    got = lines.merge_state_dicts(base, models, parameters={"lambda": 0.4}, calibrate="svc")
    expected = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_signs_are_counted_before_norms_are_taken(tmp_path: Path) -> None:
    """What is calibrated depends on the majority in every entry: a pass each, where else one finds both."""
    base, models = family(3)
    save(tmp_path, base, models)
    asked = recipe("ties", {"density": 0.5}, 3, lines={"beta": 0.5})
    assert planned(tmp_path, asked).passes == ("thresholds", "signs", "norms")
    assert planned(tmp_path, {**asked, "calibrate": None}).passes == ("thresholds", "signs and norms")
    assert planned(tmp_path, {**asked, "lines": {"alpha": 0.2, "beta": 0.5}}).passes == ("thresholds", "signs")


@pytest.mark.slow
def test_it_is_said_and_recorded(tmp_path: Path) -> None:
    """In the summary, in the recipe beside the output, in the model card, in JSON; the recipe gives the same again."""
    base, models = family(2)
    save(tmp_path, base, models)
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe("task_arithmetic", {}, 2)))
    ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    assert "calibrate svc" in ran.out
    written = yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())
    assert written["calibrate"] == "svc"
    assert "What it made was calibrated:" in (tmp_path / "out" / "README.md").read_text()
    again = run_lines("merge", "--config", tmp_path / "out" / "lines_recipe.yaml", "-o", tmp_path / "again", "--json")
    assert again.json["recipe"]["calibrate"] == "svc"
    weights = [(tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again")]
    assert weights[0] == weights[1]
    plain = run_lines(
        "merge", "--config", tmp_path / "merge.yaml", "--set", "calibrate=null", "-o", tmp_path / "plain", "--json"
    )
    assert plain.code == 0, plain.err
    assert "calibrate" not in plain.json["recipe"]
    assert "calibrate" not in (tmp_path / "plain" / "lines_recipe.yaml").read_text()


def test_the_memory_that_it_needs_is_in_the_forecast(tmp_path: Path) -> None:
    """A matrix of each model twice, the merged one, what is read of it, and the calibration's own; for each worker."""
    base, models = family(3)
    save(tmp_path, base, models)
    largest = 31 * 12 * 4 * (2 * 3 + 2) + CALIBRATIONS["svc"].workspace((31, 12), False)
    plan = planned(tmp_path, recipe("average", {}, 3))
    assert plan.whole_bytes(1) == largest
    assert plan.whole_bytes(2) == 2 * largest
    assert planned(tmp_path, recipe("average", {}, 3, calibrate=None)).whole_bytes(2) == 0
    weights = planned(tmp_path, recipe("linear", {}, 3))
    assert weights.whole_bytes(1) == largest + 31 * 12 * 4
    assert planned(tmp_path, recipe("average", {}, 1)).whole_bytes(1) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibrate": "svd"}, r"calibrate: .*'svc'"),
        ({"calibrate": True}, r"calibrate: .*'svc'"),
        ({"calibrate": ["svc"]}, r"calibrate: .*'svc'"),
        ({"calibrate": {"method": "svc"}}, r"calibrate: .*'svc'"),
        ({"parameters": {"calibrate": "svc"}, "calibrate": None}, r"calibrate"),
        ({"merge_method": "linear", "base_model": None}, r"base_model is missing: calibrate: changes task vectors"),
        ({"as_adapter": True}, r"calibrate: that is of whole models"),
    ],
    ids=str,
)
def test_what_has_no_place_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    asked = {key: value for key, value in (recipe("average", {}, 2) | changes).items() if value is not None}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(asked))
    with pytest.raises(RecipeError, match=message):
        lines.load_recipe(tmp_path / "merge.yaml")


def test_nan_in_a_matrix_names_the_input(tmp_path: Path) -> None:
    """As for methods that see whole tensors; let through, it fills its matrix and no other tensor."""
    base, models = family(2)
    name = "model.layers.0.mlp.experts.up"
    models[1][name][1, 2, 3] = torch.nan
    save(tmp_path, base, models)
    with pytest.raises(DataError, match=f"b/model.safetensors: tensor {name} holds NaN"):
        merged(tmp_path, recipe("task_arithmetic", {}, 2))
    merged(tmp_path, recipe("task_arithmetic", {}, 2, allow_nonfinite=True))
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert got[name].isnan().flatten(1).all(1).tolist() == [False, True, False]
    assert not any(tensor.isnan().any() for key, tensor in got.items() if key != name)
