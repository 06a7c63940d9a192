"""Compiled kernels against the torch operations that they stand for, bit by bit; and when a run takes them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.engine import fast
from lines_cli.engine.threshold import Window, look
from lines_cli.methods import fused
from lines_cli.methods.consensus import consensus
from lines_cli.methods.consensus import elect as elect_before_masks
from lines_cli.methods.ties import elect, ties
from support import forked
from support.bits import raw
from support.files import write_checkpoint
from support.run import run_lines

numba = pytest.importorskip("numba")
kernels = pytest.importorskip("lines_cli.methods.kernels")

SIZES = (1, 63, 64, 65, 1023, 1025, 5000)
NUMBERS = (1, 2, 3, 8)
WEIGHTS: dict[str, Sequence[float]] = {
    "ones": [1.0] * 8,
    "thirds": [1 / 3, 1.0, 0.7, -0.2, 1e-9, 3.0, 1 / 7, 1.1],
    "cancelling": [0.5, -0.5, 5e-9, -5e-9, 1e-8, 1.0, -1.0, 0.0],
    "extreme": [3e38, 1e-46, -3e38, 1 + 1e-12, 1e-40, 1.0, 1.0, 1.0],
}


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """All kernels, ready."""
    kernels.compile_all()


@pytest.fixture(autouse=True)
def used_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No kernels to begin with, whatever the environment says."""
    monkeypatch.delenv(fast.VARIABLE, raising=False)
    fused.use(None)
    yield
    fused.use(None)


def numbers(seed: int, models: int, numel: int, kind: str) -> torch.Tensor:
    """[models, numel] of float32: any bits at all; the same with Inf for NaN; finite ones; a coarse grid, on which
    sums cancel and magnitudes are the same; or ones that differ in the last places.
    """
    random = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (models, numel), generator=random).to(torch.int32)
    found = bits.view(torch.float32)
    if kind == "any bits":
        return found
    if kind == "infinite":
        return torch.where(found.isnan(), torch.inf, found)
    if kind == "finite":
        return torch.where(found.isfinite(), found, -0.0)
    if kind == "grid":
        return torch.randint(-3, 4, (models, numel), generator=random) / 8 * torch.tensor([-1.0]).copysign(found)
    return 1 + torch.randint(0, 9, (models, numel), generator=random) * 2.0**-23 * torch.ones(1).copysign(found)


def rows(values: torch.Tensor) -> list[torch.Tensor]:
    """A copy, to be overwritten, as a worker holds it: parts of longer rows."""
    held = torch.full((len(values), values.shape[1] + 5), torch.nan)
    held[:, : values.shape[1]] = values
    return [*held[:, : values.shape[1]].unbind()]


def same(values: torch.Tensor) -> bytes:
    """The bytes, every NaN alike: which ones arithmetic gives depends on the processor."""
    return raw(torch.where(values.isnan(), torch.nan, values))


def both_ways(made: Any) -> list[Any]:
    """What a function gives without kernels and with them."""
    plain = made()
    fused.use(kernels)
    by_kernels = made()
    fused.use(None)
    return [plain, by_kernels]


@pytest.mark.slow
def test_kernels_are_what_is_called() -> None:
    """With kernels in use they do the work; of float64, of the largest, and of entries that do not lie side by side,
    torch does it, as it does without.
    """
    values = numbers(0, 3, 100, "grid")
    how: dict[str, Any] = {"factor": [1.0] * 3, "weight": [1.0] * 3}
    assert fused.ties(rows(values), **how, agreement="mean", plus=True) is None
    fused.use(kernels)
    assert fused.ties(rows(values), **how, agreement="mean", plus=True) is not None
    assert fused.signs(rows(values), **how, waiting=True) is not None
    assert fused.votes(values[0].clone(), rows(values), scale=[1.0] * 3, k=2)
    assert fused.look(values, [(0, 2**31)] * 3) is not None
    assert fused.ties(rows(values), **how, agreement="max", plus=True) is None
    assert fused.ties([*values.double()], **how, agreement="mean", plus=True) is None
    assert fused.ties([*values.T[:3]], **how, agreement="mean", plus=True) is None
    assert fused.ties(rows(values[:, :0]), **how, agreement="mean", plus=True) is None


@pytest.mark.parametrize("kind", ["any bits", "infinite", "finite", "grid", "last places"])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_ties_and_its_elections(kind: str, weights: str) -> None:
    """The merge by mean and by sum, with either majority, and the count of signs, waiting models included."""
    for at, (models, numel) in enumerate((models, numel) for models in NUMBERS for numel in SIZES):
        values = numbers(at, models, numel, kind)
        weight, factor = WEIGHTS[weights][:models], [1.0, 1.3, 1 / 3, 1.0, 2.0, 1.0, 0.1, 1.0][:models]
        for agreement, majority, by in (("mean", 1, factor), ("mean", -1, [1.0] * models), ("sum", -1, factor)):
            how: dict[str, Any] = {"weight": weight, "factor": by}
            plain, fast_one = both_ways(
                lambda how=how, agreement=agreement, majority=majority, values=values: ties(
                    rows(values), agreement=agreement, majority=majority, **how
                )
            )
            assert same(fast_one) == same(plain), (models, numel, agreement, majority)
            for waiting in (False, True):
                before, after = both_ways(
                    lambda how=how, values=values, w=waiting: elect(rows(values), **how, waiting=w)
                )
                assert [int(after[0].sum()), after[1]] == [int(before[0].sum(dtype=torch.float64)), before[1]]


@pytest.mark.parametrize("kind", ["any bits", "infinite", "finite", "grid", "last places"])
@pytest.mark.parametrize("on", ["sum", "ties"])
def test_consensus(kind: str, on: str) -> None:
    """Masks on the sum and on TIES, of any number of models that have to agree, and the count of its signs."""
    for at, (models, numel) in enumerate((models, numel) for models in NUMBERS for numel in SIZES):
        values = numbers(at, models, numel, kind)
        weight = WEIGHTS["thirds"][:models]
        least = float(values.abs().nan_to_num().flatten().sort().values[models * numel // 2])
        how: dict[str, Any] = {"weight": weight, "bounds": [(least,)] * models}
        for k, scale in ((0, 0.4), (1, 1.0), (2, 0.4), (models, 0.1), (9, 0.4)):
            plain, fast_one = both_ways(
                lambda how=how, values=values, k=k, scale=scale: consensus(
                    rows(values), **how, mask_lambda=[scale] * len(values), k=k, on=on
                )
            )
            assert same(fast_one) == same(plain), (models, numel, k)
        before, after = both_ways(lambda how=how, values=values: elect_before_masks(rows(values), **how, waiting=True))
        assert [int(after[0].sum()), after[1]] == [int(before[0].sum(dtype=torch.float64)), before[1]]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["any bits", "infinite", "finite", "grid", "last places"])
def test_windows(kind: str) -> None:
    """What lies in a window, in whatever order, and how many lie above: windows on everything, on one magnitude that
    is there, beside it, and on many.
    """
    for at, (models, numel) in enumerate((models, numel) for models in NUMBERS for numel in SIZES):
        values = numbers(at, models, numel, kind)
        some = [int(bits) for bits in values.abs()[:, numel // 2].view(torch.int32)]
        for width in (0, 1, 2, 2**16, 2**31):
            windows = [Window(max(0, bits - width // 2), min(2**31, bits + width // 2 + 1)) for bits in some]
            plain, fast_one = both_ways(lambda windows=windows, values=values: look(values.clone(), windows))
            assert fast_one[1] == plain[1] == bool(values.isfinite().all())
            for model, (found, expected) in enumerate(zip(fast_one[0], plain[0], strict=True)):
                assert found[1] == expected[1]
                assert found[0].sort().values.tolist() == expected[0].sort().values.tolist()
                bits = values[model].view(torch.int32) & 2**31 - 1
                inside = (bits >= windows[model].low) & (bits.long() < windows[model].high)
                assert found[0].numel() == int(inside.sum()) > 0


@pytest.mark.slow
def test_a_compiler_that_contracts_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a product is not rounded before it is added, the kernels are refused."""
    contracting = numba.njit(fastmath={"contract"}, error_model="numpy")(kernels._signs)
    contracting.compile(kernels._SIGNATURES[kernels._signs])
    if not any("vfmadd" in text for text in contracting.inspect_asm().values()):
        pytest.skip("this processor cannot")
    monkeypatch.setitem(kernels._KERNELS, kernels._signs, contracting)
    with pytest.raises(RuntimeError, match="rounds a product and a sum in one step"):
        kernels.compile_all()


# --- runs ---

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
SHAPES = {"embed.weight": (37, 8), **{f"layers.{i}.w.weight": (61, 9) for i in range(3)}, "norm.weight": (9,)}
RECIPES: dict[str, dict[str, Any]] = {
    "global": {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
    "weighted": {
        "merge_method": "ties",
        "parameters": {"density": 0.5, "weight": 0.3, "trim": "tensor", "rescale": "l1"},
    },
    "rescaled": {"merge_method": "ties", "parameters": {"density": 0.5, "rescale": "l1", "agreement": "sum"}},
    "drawn": {"merge_method": "dare_ties", "parameters": {"density": 0.4}},
    "outliers": {"merge_method": "breadcrumbs_ties", "parameters": {"density": 0.4, "gamma": 0.1}},
    "masks": {"merge_method": "consensus", "parameters": {"on": "ties", "density": 0.5}},
    "largest": {"merge_method": "task_arithmetic", "parameters": {"density": 0.2}},
}


def models_of(folder: Path, *dtypes: torch.dtype) -> list[str]:
    """A base and three fine-tunes, their tensors in these dtypes by turns."""
    random = torch.Generator().manual_seed(7)
    base = {name: torch.randn(shape, generator=random) for name, shape in SHAPES.items()}
    for number in range(4):
        tensors = {
            name: (values + number * 0.05 * torch.randn(values.shape, generator=random)).to(dtypes[at % len(dtypes)])
            for at, (name, values) in enumerate(base.items())
        }
        write_checkpoint(folder / f"m{number}", tensors)
    return [f"m{number}" for number in range(4)]


def merged(folder: Path, recipe: dict[str, Any], output: str, *more: object) -> bytes:
    names = [f"m{number}" for number in range(4)]
    told = {**recipe, "base_model": names[0], "models": [{"model": name} for name in names[1:]], "dtype": "bfloat16"}
    (folder / "merge.yaml").write_text(yaml.safe_dump(told))
    ran = run_lines("merge", "--config", folder / "merge.yaml", "-o", folder / output, *more)
    assert ran.code == 0, ran.err
    return (folder / output / "model.safetensors").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("dtypes", [(BF16,), (F16, BF16, F32), (F32, F64)], ids=str)
@pytest.mark.parametrize("name", RECIPES)
def test_a_merge_has_the_same_bytes(
    name: str, dtypes: tuple[torch.dtype, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every method that has kernels, or looks for thresholds, from file to file."""
    models_of(tmp_path, *dtypes)
    monkeypatch.setenv(fast.VARIABLE, "0")
    plain = merged(tmp_path, RECIPES[name], "plain")
    assert not fused.in_use()
    monkeypatch.setenv(fast.VARIABLE, "1")
    assert merged(tmp_path, RECIPES[name], "fast", "--workers", 3) == plain
    assert fused.in_use()
    assert run_lines("verify", tmp_path / "fast").code == 0


@pytest.mark.slow
def test_small_runs_take_no_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run takes them from a size on: a higher one where they have yet to be compiled."""
    models_of(tmp_path, BF16)
    entries = 3 * 3 * sum(torch.Size(shape).numel() for shape in SHAPES.values())  # of three models, in three passes
    recipe = {key: value for key, value in RECIPES["global"].items() if key != "lines"}
    for loading, compiling, cached, taken in (
        (entries + 1, entries + 1, True, False),
        (entries, entries + 1, True, True),
        (entries, entries + 1, False, False),
        (entries, entries, False, True),
    ):
        fused.use(None)
        monkeypatch.setattr(fast, "WORTH_LOADING", loading)
        monkeypatch.setattr(fast, "WORTH_COMPILING", compiling)
        monkeypatch.setattr(kernels, "are_cached", lambda cached=cached: cached)
        merged(tmp_path, recipe, "out", "--force")
        assert fused.in_use() == taken, (loading, compiling, cached)


def test_other_methods_take_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that has no kernels and looks for no thresholds loads none, whatever its size."""
    models_of(tmp_path, BF16)
    monkeypatch.setenv(fast.VARIABLE, "1")
    merged(tmp_path, {"merge_method": "task_arithmetic"}, "out")
    assert not fused.in_use()


def test_the_variable_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is 0 or 1; nothing is written for anything else."""
    models_of(tmp_path, BF16)
    monkeypatch.setenv(fast.VARIABLE, "yes")
    ran = run_lines("edit", tmp_path / "m0", tmp_path / "m1", "-o", tmp_path / "out")
    assert (ran.code, ran.trace) == (2, "")
    assert "LINES_FAST says yes; expected 0" in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_kernels_that_fail_in_parts_and_in_a_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be compiled is said once, by `lines run` and by `lines verify`, and the bytes are the same."""
    models_of(tmp_path, BF16)
    monkeypatch.setenv(fast.VARIABLE, "1")
    expected = merged(tmp_path, RECIPES["global"], "expected")
    fused.use(None)

    def fails() -> None:
        raise ValueError("no LLVM\nat all")

    monkeypatch.setattr(kernels, "compile_all", fails)
    plan = tmp_path / "plan.json"
    planned = run_lines(
        "plan", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out", "--parts", 2, "--plan", plan
    )
    assert planned.code == 0, planned.err
    for command in (("run", plan), ("verify", tmp_path / "expected")):
        ran = run_lines(*command)
        assert ran.code == 0, ran.err
        assert " ".join(ran.err.split()).count("numba says: no LLVM (docs") == 1
        assert not fused.in_use()
    assert run_lines("finish", plan).code == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected


@pytest.mark.slow
def test_merges_in_threads_and_in_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several merges at once that load the kernels, and one in a fork of a process that has: the same bytes."""
    models_of(tmp_path, BF16)
    monkeypatch.setenv(fast.VARIABLE, "0")
    expected = merged(tmp_path, RECIPES["global"], "expected")
    monkeypatch.setenv(fast.VARIABLE, "1")
    config = tmp_path / "merge.yaml"
    with ThreadPoolExecutor(4) as pool:
        outputs = [tmp_path / f"thread{number}" for number in range(4)]
        list(pool.map(lambda output: lines.merge(config, output), outputs))
    assert fused.in_use()
    ran = forked.run(forked.command("merge", "--config", config, "-o", tmp_path / "fork", "--workers", 2))
    assert ran.returncode == 0, ran.stderr
    for output in (*outputs, tmp_path / "fork"):
        assert (output / "model.safetensors").read_bytes() == expected, output


PROGRAM = """
import sys
from lines_cli.cli.app import main
try: main()
except SystemExit as end: code = end.code
print(code, "numba" in sys.modules, "lines_cli.methods.kernels" in sys.modules)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("numba_is", "variable", "says"),
    [
        ("whole", "", None),
        pytest.param("absent", "1", None, marks=pytest.mark.slow),
        ("broken", "1", "numba says: it wants another numpy"),
        pytest.param("leaving", "1", "numba says: boom", marks=pytest.mark.slow),
        pytest.param("switched off", "1", "numba says: NUMBA_DISABLE_JIT is set", marks=pytest.mark.slow),
        pytest.param("damaged", "1", "what it keeps may be damaged: remove", marks=pytest.mark.slow),
        pytest.param("something else", "1", "numba says: No module named 'numba.", marks=pytest.mark.slow),
    ],
)
def test_numba_that_is_of_no_use(numba_is: str, variable: str, says: str | None, tmp_path: Path) -> None:
    """A small merge imports no numba. Where there is none a merge says nothing, and where it fails, one remark; the
    bytes are the same.
    """
    models_of(tmp_path, BF16)
    expected = merged(tmp_path, RECIPES["global"], "expected")
    beside = tmp_path / "beside"
    beside.mkdir()
    texts = {
        "broken": "raise ImportError('it wants another numpy\\nby far')",
        "leaving": "raise SystemExit('boom')",
        "something else": "",
    }
    if numba_is in texts:
        (beside / "numba.py").write_text(texts[numba_is])
    if numba_is == "absent":
        find = "lambda name, *more: None if name == 'numba' else find_spec(name, *more)"
        hook = f"import importlib.util\nfrom importlib.util import find_spec\nimportlib.util.find_spec = {find}\n"
        (beside / "sitecustomize.py").write_text(hook)
    path = os.pathsep.join([str(beside), *sys.path])
    command = [sys.executable, "-c", PROGRAM, "merge", "--config", "merge.yaml", "-o", "out"]
    env = {**os.environ, "PYTHONPATH": path, fast.VARIABLE: variable}
    if numba_is == "switched off":
        env["NUMBA_DISABLE_JIT"] = "1"
    if numba_is == "damaged":
        env["NUMBA_CACHE_DIR"] = str(tmp_path / "cache")
        subprocess.run([*command[:-1], "first"], cwd=tmp_path, env=env, capture_output=True, check=True)
        kept = list((tmp_path / "cache").rglob("kernels.*.nbi"))
        assert kept
        for index in kept:
            index.write_bytes(b"garbage")
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=True)
    code, *imported = ran.stdout.split()[-3:]
    assert code == "0", ran.stderr
    assert "Traceback" not in ran.stderr
    assert ("compiled kernels" in ran.stderr) == (says is not None)
    if says is None:
        assert imported == ["False", "False"]
    else:
        assert " ".join(ran.stderr.split()).count(says) == 1
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == expected
