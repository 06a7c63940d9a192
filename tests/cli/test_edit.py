"""`lines edit` from file to file: the formula bit for bit, what comes back as it was, what may not change a byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import lines_cli as lines
from support.bits import LIMIT, nearest, raw, wide, wide_model
from support.crossed import by_turns, crossed
from support.files import write_checkpoint
from support.run import run_lines

FLOATS = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Tensors = dict[str, torch.Tensor]


def edit(base: Path, ft: Path, out: Path, resources: Mapping[str, Any] | None = None, **options: Any) -> Path:
    """`lines edit BASE FT -o OUT` by way of the Python API."""
    recipe = lines.edit_recipe(str(base), str(ft), **options)
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), out)
    lines.run(plan, lines.Resources(device="cpu", **(resources or {})))
    return out


def saved(folder: Path, base: Tensors, ft: Tensors) -> tuple[Path, Path]:
    """Both sides as files of one shard."""
    return write_checkpoint(folder / "base.safetensors", base), write_checkpoint(folder / "ft.safetensors", ft)


def coefficient(name: str, alpha: float, beta: float, gamma: float = 1.0, layers: int = 4) -> float:
    """The paper's equation, in float64, with l from 1."""
    if not name.startswith("layers."):
        return gamma * alpha
    block = int(name.split(".")[1]) + 1
    return gamma * (alpha + beta * (block - 1) / (layers - 1))


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One rounding. torch takes float64 to 16 bits by way of float32, so that is done exactly instead."""
    if values.dtype == torch.float64 and dtype in (torch.float16, torch.bfloat16):
        values = torch.tensor([nearest(value, dtype) for value in values.tolist()], dtype=torch.float64)
    return values.to(dtype)


def by_formula(base: torch.Tensor, ft: torch.Tensor, c: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The formula on whole tensors, as shared/design.md names it; bytes are copied where c is 0 or 1."""
    if not ft.is_floating_point():
        return ft if c else base
    compute = torch.float64 if torch.float64 in (base.dtype, ft.dtype) else torch.float32
    c = c if compute == torch.float64 else float(np.float32(c))
    delta = ft.to(compute) - base.to(compute)
    scaled = c * delta
    exact = base if c == 0 else ft if c == 1 else base.to(compute) + scaled
    return rounded(exact, dtype or ft.dtype)


def assert_same(got: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bytes."""
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (name, got[name].dtype, got[name].shape) == (name, tensor.dtype, tensor.shape)
        assert raw(got[name]) == raw(tensor), name


# --- the formula ---


@crossed(base_dtype=FLOATS, ft_dtype=FLOATS, out=[None, *FLOATS])
def test_formula_in_every_combination_of_dtypes(
    base_dtype: str, ft_dtype: str, out: str | None, tmp_path: Path
) -> None:
    """Every entry is the plain formula's, bit for bit, whatever the three dtypes; alpha 0.1, beta 0.9."""
    limit = min(LIMIT[FLOATS[dtype]] for dtype in (base_dtype, ft_dtype, out or ft_dtype))
    base = wide_model(1, FLOATS[base_dtype], limit=limit)
    ft = wide_model(101, FLOATS[ft_dtype], limit=limit)
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.1, beta=0.9, dtype=out))
    c = {name: coefficient(name, 0.1, 0.9) for name in base}
    assert_same(got, {name: by_formula(base[name], ft[name], c[name], out and FLOATS[out]) for name in base})


@pytest.mark.parametrize("dtype", FLOATS)
def test_formula_close_to_the_greatest_number(dtype: str, tmp_path: Path) -> None:
    """Values next to the largest finite one do not overflow where the exact result does not."""
    top = torch.finfo(FLOATS[dtype]).max
    base = {f"layers.{i}.w": torch.tensor([top, -top, top / 2, 0.75 * top], dtype=FLOATS[dtype]) for i in range(3)}
    ft = {name: tensor.flip(0) * torch.tensor([1, -1, -1, 1]).to(tensor.dtype) for name, tensor in base.items()}
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.3, beta=0.2))
    assert_same(
        got, {f"layers.{i}.w": by_formula(base["layers.0.w"], ft["layers.0.w"], 0.3 + 0.1 * i) for i in range(3)}
    )


@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"),
    [(0.1, 0.9, 1.0), (0.1, 0.9, 0.3), (0.5, 0.5, 0.7), (1.0, 2.0, 1.0), (-0.3, 1.1, -1.7), (0.1, 0.2, 3.0)],
)
@pytest.mark.parametrize("layers", [2, 3, 12])
def test_coefficients(layers: int, alpha: float, beta: float, gamma: float, tmp_path: Path) -> None:
    """From zeros to ones every entry is its coefficient: in float64 for F64, as the nearest float32 for F32."""
    names = ["embed", *(f"layers.{i}.w" for i in range(layers)), "norm"]
    shapes = {
        f"{name}{suffix}": dtype for name in names for suffix, dtype in ((".d", torch.float64), (".s", torch.float32))
    }
    base = {name: torch.zeros(3, dtype=dtype) for name, dtype in shapes.items()}
    ft = {name: torch.ones(3, dtype=dtype) for name, dtype in shapes.items()}
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=alpha, beta=beta, gamma=gamma))
    expected = {name: coefficient(name, alpha, beta, gamma, layers) for name in shapes}
    assert_same(got, {name: torch.full((3,), expected[name], dtype=shapes[name]) for name in shapes})


def test_beta_is_the_rest_unless_given(tmp_path: Path) -> None:
    """alpha 0.1 and beta 1 - alpha are the defaults; the last layer's coefficient is then exactly 1."""
    base, ft = wide_model(1, torch.float32), wide_model(2, torch.float32)
    paths = saved(tmp_path, base, ft)
    for options, alpha in (({}, 0.1), ({"alpha": 0.3}, 0.3), ({"alpha": 0.7}, 0.7)):
        got = load_file(edit(*paths, tmp_path / f"{alpha}.safetensors", **options))
        assert_same(got, {n: by_formula(base[n], ft[n], coefficient(n, alpha, 1 - alpha)) for n in base})
        assert raw(got["layers.3.weight"]) == raw(ft["layers.3.weight"])


@pytest.mark.parametrize("gamma", [1.0, 0.5])
def test_a_stack_of_one_layer(gamma: float, tmp_path: Path) -> None:
    """Where L is 1 and the paper divides by zero, lambda is alpha + beta; outside it stays alpha."""
    base = {"layers.0.w": torch.zeros(2, dtype=torch.float64), "norm.w": torch.zeros(2, dtype=torch.float64)}
    ft = {name: torch.ones(2, dtype=torch.float64) for name in base}
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.2, beta=0.3, gamma=gamma))
    assert got["layers.0.w"].tolist() == [gamma * 0.5] * 2
    assert got["norm.w"].tolist() == [gamma * 0.2] * 2


def test_a_coefficient_that_float32_takes_for_0_or_1_copies(tmp_path: Path) -> None:
    """0 and 1 are judged in the dtype of the arithmetic: 1e-60 copies F32 bytes, negative zeros too, but not F64."""
    base = {f"{dtype}.w": torch.tensor([-0.0, 1.0], dtype=FLOATS[dtype]) for dtype in FLOATS}
    ft = {f"{dtype}.w": torch.tensor([-0.0, 2.0], dtype=FLOATS[dtype]) for dtype in FLOATS}
    paths = saved(tmp_path, base, ft)
    for alpha in (1e-60, 1 + 1e-12):
        got = load_file(edit(*paths, tmp_path / f"{alpha}.safetensors", alpha=alpha, beta=0.0))
        assert_same(got, {name: by_formula(base[name], ft[name], alpha) for name in base})
        assert str(got["float32.w"][0].item()) == "-0.0"
        assert str(got["float64.w"][0].item()) == "0.0"


# --- what comes back unchanged ---


def every_dtype(seed: int) -> Tensors:
    """A tensor of every dtype that torch and safetensors share and lines reads, with a scalar and an empty one."""
    random = torch.Generator().manual_seed(seed)
    bits = [torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64]
    tensors = {
        f"layers.{i}.{str(dtype)[6:]}": torch.randint(0, 100, (3, 5), generator=random).to(dtype)
        for i, dtype in enumerate(bits)
    }
    tensors["layers.8.bool"] = torch.rand(7, generator=random) > 0.5
    for i, dtype in enumerate(FLOATS.values()):
        tensors[f"layers.{9 + i}.w"] = wide(seed + i, dtype, LIMIT[dtype])
        tensors[f"layers.{9 + i}.scalar"] = torch.randn((), generator=random).to(dtype)
        tensors[f"layers.{9 + i}.empty"] = torch.empty((0, 4), dtype=dtype)
        tensors[f"Füße.{i} \t\"'\\.w"] = torch.randn(2, 3, generator=random).to(dtype)
    return tensors


def test_alpha_1_beta_0_is_the_fine_tuned_file(tmp_path: Path) -> None:
    """The output is the file that safetensors wrote for the fine-tune, byte for byte, header and all."""
    base = write_checkpoint(tmp_path / "base.safetensors", every_dtype(1))
    ft = write_checkpoint(tmp_path / "ft", every_dtype(2))
    one = edit(base, ft, tmp_path / "out.safetensors", alpha=1.0, beta=0.0)
    folder = edit(base, ft, tmp_path / "out", alpha=1.0, beta=0.0)
    written = (ft / "model.safetensors").read_bytes()
    assert one.read_bytes() == written
    assert (folder / "model.safetensors").read_bytes() == written


@pytest.mark.parametrize("extra", range(8))
def test_headers_are_padded_as_safetensors_pads_them(extra: int, tmp_path: Path) -> None:
    """Names of any length end in the file that safetensors writes."""
    names = ["layers.0.w", f"layers.1.{'x' * extra}w"]
    base, ft = ({name: torch.full((extra,), value) for name in names} for value in (1.0, 2.0))
    out = edit(*saved(tmp_path, base, ft), tmp_path / "out.safetensors", alpha=1.0, beta=0.0)
    assert out.read_bytes() == (tmp_path / "ft.safetensors").read_bytes()


@pytest.mark.parametrize("gamma", [1.0, 0.0])
def test_coefficient_0_is_the_base(gamma: float, tmp_path: Path) -> None:
    """alpha = beta = 0, or gamma = 0, gives every tensor of the base, integers and booleans too, byte for byte."""
    base, ft = saved(tmp_path, every_dtype(1), every_dtype(2))
    alpha = 0.0 if gamma else 0.4
    out = edit(base, ft, tmp_path / "out.safetensors", alpha=alpha, beta=alpha, gamma=gamma)
    assert out.read_bytes() == base.read_bytes()


@pytest.mark.parametrize("ft_dtype", FLOATS)
@pytest.mark.parametrize("base_dtype", FLOATS)
def test_coefficient_0_casts_the_base_once(base_dtype: str, ft_dtype: str, tmp_path: Path) -> None:
    """Where dtypes disagree the base comes back in the fine-tune's dtype, rounded once."""
    base = wide_model(1, FLOATS[base_dtype], limit=13)
    ft = wide_model(2, FLOATS[ft_dtype], limit=13)
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.0, beta=0.0))
    assert_same(got, {name: rounded(base[name], FLOATS[ft_dtype]) for name in base})


def test_nan_payloads_survive_a_copy(tmp_path: Path) -> None:
    """Where nothing is computed, bytes are copied: a NaN that is let through keeps its sign and payload."""
    bits = {
        torch.float32: (torch.int32, 0x7FA0BEEF),
        torch.bfloat16: (torch.int16, 0x7F81),
        torch.float16: (torch.int16, 0x7D23),
    }
    ft = {f"{dtype}.w": torch.tensor([value, 0], dtype=integer).view(dtype) for dtype, (integer, value) in bits.items()}
    paths = saved(tmp_path, ft, ft)
    out = edit(*paths, tmp_path / "out.safetensors", alpha=1.0, beta=0.0, allow_nonfinite=True)
    assert out.read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_integers_and_booleans_are_the_fine_tunes(dtype: str | None, tmp_path: Path) -> None:
    """They have no task vector: the fine-tune's where the coefficient is not 0, the base's where it is; never cast."""
    base: Tensors = {}
    for i in range(3):
        base |= {f"layers.{i}.ids": torch.arange(4), f"layers.{i}.mask": torch.tensor([True, False])}
        base |= {f"layers.{i}.w": torch.randn(4)}
    ft = {name: tensor + 1 if tensor.dtype != torch.bool else ~tensor for name, tensor in base.items()}
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.0, beta=0.5, dtype=dtype))
    for i, side in enumerate((base, ft, ft)):
        assert torch.equal(got[f"layers.{i}.ids"], side[f"layers.{i}.ids"])
        assert torch.equal(got[f"layers.{i}.mask"], side[f"layers.{i}.mask"])
        assert got[f"layers.{i}.ids"].dtype == torch.int64
        assert got[f"layers.{i}.w"].dtype == (FLOATS[dtype] if dtype else torch.float32)


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    """A tensor without dimensions is one entry by the formula; one without entries keeps its shape."""
    base = {f"layers.{i}.{n}": t for i in range(2) for n, t in (("s", torch.tensor(3.7)), ("e", torch.empty(2, 0, 3)))}
    ft = {name: tensor + 1.3 for name, tensor in base.items()}
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.1, beta=0.2))
    c = {0: 0.1, 1: 0.1 + 0.2}
    assert_same(got, {name: by_formula(base[name], ft[name], c[int(name.split(".")[1])]) for name in base})


def test_the_inputs_are_only_read(tmp_path: Path) -> None:
    """Neither input changes by a byte."""
    paths = saved(tmp_path, wide_model(1, torch.bfloat16), wide_model(2, torch.bfloat16))
    before = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    edit(*paths, tmp_path / "out.safetensors")
    assert [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths] == before


# --- what may not change a byte ---

MIXED = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of the weight files and their index."""
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir() if "safetensors" in p.name}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, str]]:
    """Base and fine-tune in one file each, with mixed dtypes, and the digests of what the default resources make."""
    folder = tmp_path_factory.mktemp("inputs")
    base = write_checkpoint(folder / "base", every_dtype(7) | wide_model(1, *MIXED, limit=13))
    ft = write_checkpoint(folder / "ft", every_dtype(8) | wide_model(2, *MIXED[::-1], limit=13))
    return base, ft, digests(edit(base, ft, folder / "out", max_shard_size=2000))


@by_turns(chunk=[1, 7, 1000, None], workers=[1, 2, 5])
def test_chunks_and_workers_change_no_byte(
    inputs: tuple[Path, Path, dict[str, str]], chunk: int | None, workers: int, tmp_path: Path
) -> None:
    """Whole files are the same for any chunk size and number of workers."""
    base, ft, expected = inputs
    resources = {"workers": workers} | ({"chunk": chunk} if chunk else {})
    assert len(expected) > 2
    assert digests(edit(base, ft, tmp_path / "out", resources, max_shard_size=2000)) == expected


@pytest.mark.parametrize(("base_shards", "ft_shards"), [(1, 3), (4, 1), (2, 5)])
def test_sharding_and_order_change_no_byte(
    inputs: tuple[Path, Path, dict[str, str]], base_shards: int, ft_shards: int, tmp_path: Path
) -> None:
    """Whole files are the same however the inputs are cut into shards, and in whatever order they list tensors."""
    _, _, expected = inputs
    base = every_dtype(7) | wide_model(1, *MIXED, limit=13)
    ft = wide_model(2, *MIXED[::-1], limit=13) | every_dtype(8)
    ft = dict(reversed(ft.items()))
    paths = [
        write_checkpoint(tmp_path / "base", base, shards=base_shards),
        write_checkpoint(tmp_path / "ft", ft, shards=ft_shards),
    ]
    assert digests(edit(*paths, tmp_path / "out", max_shard_size=2000)) == expected


@pytest.mark.slow
def test_a_run_again_changes_no_byte(inputs: tuple[Path, Path, dict[str, str]], tmp_path: Path) -> None:
    """The same command gives every file of the folder again; its recipe does, too."""
    base, ft, _ = inputs
    first, second = (edit(base, ft, tmp_path / n / "out", alpha=0.3, gamma=0.7, dtype="bfloat16") for n in "ab")
    files = {path.name: path.read_bytes() for path in first.iterdir()}
    assert {path.name: path.read_bytes() for path in second.iterdir()} == files
    recipe = lines.load_recipe(first / "lines_recipe.yaml")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "again")
    lines.run(plan)
    assert digests(tmp_path / "again") == digests(first)


def test_entries_of_a_large_tensor(tmp_path: Path) -> None:
    """A tensor of several chunks of the default size is right at every entry, its odd end included."""
    count = 2 * 384 * 1024 + 12345
    base = {
        f"layers.{i}.w": torch.randn(count, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(2)
    }
    ft = {
        name: tensor + torch.randn(count, generator=torch.Generator().manual_seed(9)).bfloat16() * 0.01
        for name, tensor in base.items()
    }
    paths = saved(tmp_path, base, ft)
    got = load_file(edit(*paths, tmp_path / "out.safetensors", alpha=0.2, beta=0.5))
    assert_same(
        got, {f"layers.{i}.w": by_formula(base[f"layers.{i}.w"], ft[f"layers.{i}.w"], 0.2 + 0.5 * i) for i in range(2)}
    )


def test_the_command_line_says_the_same(tmp_path: Path) -> None:
    """`lines edit` with its flags gives the tensors that the formula gives, and metadata that loaders look for."""
    base, ft = wide_model(1, torch.float32), wide_model(2, torch.float32)
    paths = saved(tmp_path, base, ft)
    out = tmp_path / "out.safetensors"
    ran = run_lines(
        "edit", *paths, "-o", out, "--alpha", 0.2, "--beta", "-0.4", "--gamma", 1.5, "--dtype", "float64", "--quiet"
    )
    assert (ran.code, ran.out, ran.trace) == (0, "", "")
    c = {name: coefficient(name, 0.2, -0.4, 1.5) for name in base}
    assert_same(load_file(out), {name: by_formula(base[name], ft[name], c[name], torch.float64) for name in base})
    with safe_open(out, "pt") as file:
        assert file.metadata() == {"format": "pt"}


# --- how bytes are moved ---


def four_dtypes(seed: int) -> Tensors:
    """Twelve layers, three of each float dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{i}.w": torch.randn(3001, generator=generator).to([*FLOATS.values()][i % len(FLOATS)])
        for i in range(12)
    }


@pytest.mark.parametrize("workers", [1, 3])
def test_without_positional_reads_the_bytes_are_the_same(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where preadv and pwrite are missing, seeking and reading under a lock gives the same file."""
    sides = saved(tmp_path, four_dtypes(0), four_dtypes(1))
    resources = {"workers": workers, "chunk": 500}
    plain = edit(*sides, tmp_path / "plain.safetensors", resources).read_bytes()
    monkeypatch.setattr("lines_cli.storage.files._HAS_POSITIONAL", False)
    assert edit(*sides, tmp_path / "seeking.safetensors", resources).read_bytes() == plain


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_bytes_of_the_cpu(tmp_path: Path) -> None:
    """The device changes no byte."""
    sides = saved(tmp_path, four_dtypes(0), four_dtypes(1))
    on_cpu = edit(*sides, tmp_path / "cpu.safetensors").read_bytes()
    recipe = lines.edit_recipe(*map(str, sides))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "cuda.safetensors")
    lines.run(plan, lines.Resources(device="cuda", chunk=500))
    assert (tmp_path / "cuda.safetensors").read_bytes() == on_cpu


@pytest.mark.parametrize("settings", [{"workers": 0}, {"workers": -1}, {"chunk": 0}, {"device": "abacus"}])
def test_impossible_resources_are_refused(settings: dict[str, Any]) -> None:
    """No workers, no chunk or no such device is an error, not a run that never ends."""
    with pytest.raises(lines.LinesError):
        lines.Resources(**settings)
