"""What makes tensors of an adapter's factors: in float64, the same for any chunk and any number of workers. And every
method on adapters and full fine-tunes side by side.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

import lines_cli as lines
from lines_cli.errors import DataError
from lines_cli.methods import METHODS
from support.adapters import PREFIX, write_adapter
from support.files import write_checkpoint
from support.method_cases import TABLE, TYPICAL, Case
from support.run import run_lines

Tensors = dict[str, Tensor]

Shapes = dict[str, tuple[int, ...]]


def shapes_of(out: int, into: int, tokens: int) -> Shapes:
    """A layer of `into` entries that makes `out`, and what else a model has."""
    return {
        "model.embed_tokens.weight": (tokens, out),
        **{f"model.layers.{n}.up.weight": (out, into) for n in range(2)},
        **{f"model.layers.{n}.turned.weight": (out, into) for n in range(2)},
        **{f"model.layers.{n}.conv.weight": (out // 5, 50, 3, 3) for n in range(2)},
        **{f"model.layers.{n}.experts.gate_up_proj": (3, 90, into // 10) for n in range(2)},
        **{f"model.layers.{n}.norm.weight": (into,) for n in range(2)},
    }


SHAPES = shapes_of(300, 700, 400)  # of several blocks, none of which ends where the tensor does
SMALL = shapes_of(60, 140, 80)
RANK = 3


def model(seed: int, dtype: torch.dtype = torch.float32, *, shapes: Shapes = SHAPES) -> Tensors:
    chance = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=chance).to(dtype) for name, shape in shapes.items()}


def drawn(seed: int, *shape: int) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_lora(folder: Path, seed: int, base: Tensors, *, dora: bool = False) -> dict[str, Any]:
    """An adapter on every kind of module, written; and what each tensor then is, in float64: the update, or with DoRA
    the whole.
    """
    file: Tensors = {}
    made: Tensors = {}
    out, into = base["model.layers.0.up.weight"].shape
    tokens = len(base["model.embed_tokens.weight"])
    kernels, inner = out // 5, into // 10

    def add(
        module: str, a: Tensor, b: Tensor, product: Tensor, *, columns: bool = False, embedding: bool = False
    ) -> None:
        kind = "lora_embedding_" if embedding else "lora_"
        end = "" if embedding else ".weight"
        file[f"{PREFIX}{module}.{kind}A{end}"], file[f"{PREFIX}{module}.{kind}B{end}"] = a, b
        name = f"{module}.weight"
        made[name] = 2 * product.view(base[name].shape)
        if dora:
            whole = base[name].double() + made[name]
            axes = tuple(range(1, whole.dim())) if not columns else (0,)
            norms = whole.square().sum(axes, keepdim=True).sqrt()
            m = norms.float() * (1 + drawn(seed, *norms.shape))
            file[f"{PREFIX}{module}.lora_magnitude_vector"] = m.flatten()
            made[name] = m.double() / norms * whole

    for n in range(2):
        at = seed + 10 * n
        a, b = drawn(at, RANK, into), drawn(at + 1, out, RANK)
        add(f"model.layers.{n}.up", a, b, b.double() @ a.double())
        a, b = drawn(at + 2, RANK, out), drawn(at + 3, into, RANK)
        add(f"model.layers.{n}.turned", a, b, (b.double() @ a.double()).T.contiguous(), columns=True)
        a, b = drawn(at + 4, RANK, 50, 3, 3), drawn(at + 5, kernels, RANK, 1, 1)
        add(f"model.layers.{n}.conv", a, b, b.double().flatten(1) @ a.double().flatten(1))
        if not dora:
            a, b = drawn(at + 6, RANK * 3, inner), drawn(at + 7, 90, RANK * 3)
            name = f"model.layers.{n}.experts"
            file[f"{PREFIX}{name}.lora_A.weight"], file[f"{PREFIX}{name}.lora_B.weight"] = a, b
            batch = b.double().view(90, RANK, 3), a.double().view(3, RANK, inner)
            made[f"{name}.gate_up_proj"] = 2 * torch.einsum("ore,eri->eoi", *batch)
    a, b = drawn(seed + 30, RANK, tokens), drawn(seed + 31, out, RANK)
    add("model.embed_tokens", a, b, (b.double() @ a.double()).T.contiguous(), columns=True, embedding=True)
    config: dict[str, Any] = {"use_dora": True} if dora else {"target_parameters": ["experts.gate_up_proj"]}
    write_adapter(folder, file, r=RANK, lora_alpha=2 * RANK, **config)
    return made


def run(
    folder: Path, models: list[str], out: str, *, method: str = "task_arithmetic", said: Any = None, **more: Any
) -> lines.Outcome:
    keys = {"workers": 2, "device": "cpu"} | {key: more.pop(key) for key in ("workers", "chunk") if key in more}
    asked: dict[str, Any] = {"merge_method": method, "models": [{"model": m} for m in models]}
    if METHODS[method].takes == "task vectors":
        asked["base_model"] = "base"
    (folder / "merge.yaml").write_text(yaml.safe_dump({**asked, "parameters": said or {}, **more}))
    loaded = lines.load_recipe(folder / "merge.yaml")
    plan = lines.make_plan(loaded, lines.open_inputs(loaded), folder / out)
    return lines.run(plan, lines.Resources(**keys), force=True)


def output(folder: Path, out: str) -> Tensors:
    return load_file(folder / out / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dora", [False, True])
def test_held_against_float64(dora: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Scaled updates, on bases of every dtype, computed from whole tensors in float64; rounded once to the output."""
    base = model(0, dtype)
    write_checkpoint(tmp_path / "base", base)
    made = write_lora(tmp_path / "adapter", 50, base, dora=dora)
    run(tmp_path, ["adapter"], "out", lines={"alpha": 0.25, "beta": 0.5}, dtype="float64", chunk=100_000)
    for name, tensor in output(tmp_path, "out").items():
        was = base[name].double()
        update = torch.zeros_like(was) if name not in made else made[name] - was if dora else made[name]
        coefficient = 0.75 if ".1." in name else 0.25
        larger = was.abs().maximum(update.abs()).maximum(made.get(name, was).abs())
        bound = 3e-7 if dtype != torch.float64 else 1e-14
        assert (
            (tensor - (was + coefficient * update)).abs() <= bound * larger + 1e-12 * (dtype != torch.float64)
        ).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("dora", [False, True])
def test_chunks_and_workers_change_no_byte(dora: bool, tmp_path: Path) -> None:
    """A chunk that begins and ends within rows, blocks and matrices, on any number of workers."""
    base = model(0)
    write_checkpoint(tmp_path / "base", base)
    write_lora(tmp_path / "adapter", 50, base, dora=dora)
    said = {"lines": {"alpha": 0.25, "beta": 0.75}}
    run(tmp_path, ["adapter"], "plain", workers=1, **said)
    plain = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for workers, chunk in ((1, 997), (4, 1_000), (2, 131_072), (4, 65_537), (3, 10_000_000)):
        run(tmp_path, ["adapter"], "other", workers=workers, chunk=chunk, **said)
        assert (tmp_path / "other" / "model.safetensors").read_bytes() == plain, (workers, chunk)


@pytest.mark.slow
def test_two_adapters_one_after_the_other(tmp_path: Path) -> None:
    """`base+adapter` may be a base, on which another adapter is put: DoRA's norms are then those of the first's."""
    base = model(0)
    write_checkpoint(tmp_path / "base", base)
    first = write_lora(tmp_path / "one", 50, base)
    between = {name: base[name] + first[name].float() if name in first else base[name] for name in base}
    second = write_lora(tmp_path / "two", 90, between, dora=True)
    both = f"{tmp_path}/base+{tmp_path}/one"
    lines.edit(both, tmp_path / "two", tmp_path / "out", alpha=1, beta=0)
    for name, tensor in output(tmp_path, "out").items():
        torch.testing.assert_close(tensor, second.get(name, between[name]).float(), rtol=2e-6, atol=2e-6)


WITH_BASE = [pytest.param(case, marks=() if case.endswith("-0") else pytest.mark.slow) for case in TYPICAL]


@pytest.mark.parametrize("shapes", [SMALL, pytest.param(SHAPES, marks=pytest.mark.slow)], ids=["small", "large"])
@pytest.mark.parametrize("case", WITH_BASE)
@pytest.mark.some(6)
def test_every_method_on_adapters_and_full_fine_tunes(case: str, shapes: Shapes, tmp_path: Path) -> None:
    """As the reference on whole models, where an adapter's task vector is its product, rounded once; its weights are
    the base with that added.
    """
    method, said = TYPICAL[case]
    base, tuned = (model(seed, shapes=shapes) for seed in range(2))
    write_checkpoint(tmp_path / "base", base)
    write_checkpoint(tmp_path / "full", tuned)
    one, two = (write_lora(tmp_path / name, seed, base) for name, seed in (("one", 50), ("two", 90)))
    entry = TABLE[method]
    models = [f"base+{tmp_path}/one" if entry.on_weights else "one", "full", f"{tmp_path}/base+{tmp_path}/two"]
    models = models[: entry.models or 3]
    zero = {name: torch.zeros_like(tensor) for name, tensor in base.items()}
    taus = [zero | {n: t.float() for n, t in one.items()}, {n: tuned[n] - base[n] for n in base}]
    taus = [*taus, zero | {n: t.float() for n, t in two.items()}][: len(models)]
    said = {key: value for key, value in said.items() if key != "lambda"}
    run(tmp_path, models, "out", method=method, said=said)
    found = output(tmp_path, "out")
    if METHODS[method].takes == "weights":
        weights = [tuned if at == 1 else {n: base[n] + tau[n] for n in base} for at, tau in enumerate(taus)]
        wanted = Case(method, said).merged(weights)
    else:
        merged = Case(method, said).merged(taus, base)
        wanted = {name: base[name] + merged[name] for name in base}
    for name, tensor in found.items():
        if entry.to_the_bit:
            assert torch.equal(tensor, wanted[name]), name
        else:
            torch.testing.assert_close(tensor, wanted[name], rtol=2e-5, atol=2e-5)


# --- files ---


@pytest.mark.slow
def test_an_adapter_s_nan_is_named(tmp_path: Path) -> None:
    """With its file, its module and the tensor; nothing is written. It may be let through."""
    base = model(0)
    write_checkpoint(tmp_path / "base", base)
    write_lora(tmp_path / "adapter", 50, base)
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    file[f"{PREFIX}model.layers.1.up.lora_B.weight"][7, 1] = torch.nan
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_adapter(tmp_path / "adapter", file, **config)
    edit = ["edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    ran = run_lines(*edit)
    assert ran.code != 0
    assert not ran.trace
    assert (
        "adapter/adapter_model.safetensors: what model.layers.1.up makes of tensor model.layers.1.up.weight" in ran.err
    )
    assert "first at entry 4,900" in ran.err
    assert not (tmp_path / "out").exists()
    assert run_lines(*edit, "--allow-nonfinite").code == 0
    found = output(tmp_path, "out")["model.layers.1.up.weight"]
    assert found.isnan().any(1).nonzero().flatten().tolist() == [7]


@pytest.mark.parametrize("rows", [True, False], ids=["a row", "a column"])
def test_a_norm_of_nothing(rows: bool, tmp_path: Path) -> None:
    """DoRA divides by the norm of a row, or column, that is all 0: as in PEFT that is no number, and it is refused."""
    base = model(0)
    name = "model.layers.0.up.weight" if rows else "model.layers.0.turned.weight"
    base[name][(5 if rows else slice(None), 5) if not rows else 5] = 0
    write_checkpoint(tmp_path / "base", base)
    write_lora(tmp_path / "adapter", 50, base, dora=True)
    file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    file[f"{PREFIX}{name.replace('weight', 'lora_B.weight')}"][5] = 0
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    write_adapter(tmp_path / "adapter", file, **config)
    with pytest.raises(DataError, match=r"what model\.layers\.0"):
        lines.edit(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", alpha=1, beta=0)


@pytest.mark.slow
def test_another_scale_is_another_run(tmp_path: Path) -> None:
    """What an adapter's config says is in no file with tensors, and is a part of which run it is."""
    base = model(0)
    write_checkpoint(tmp_path / "base", base)
    write_lora(tmp_path / "adapter", 50, base)
    edit = ["edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--resume", "--force", "--json"]
    assert run_lines(*edit).json["done_before"] is False
    assert run_lines(*edit).json["done_before"] is True
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace(f'"lora_alpha": {2 * RANK}', '"lora_alpha": 1'))
    assert run_lines(*edit).json["done_before"] is False


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["adapter_model.safetensors", "adapter_config.json"])
def test_an_output_of_an_adapter_is_verified(changed: str, tmp_path: Path) -> None:
    """`verify` computes it again; another adapter's factors or scale do not make it. Its inputs' digests are kept."""
    base = model(0)
    write_checkpoint(tmp_path / "base", base)
    write_lora(tmp_path / "adapter", 50, base)
    edit = ["edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out"]
    assert run_lines(*edit, "--verify-inputs").code == 0
    told = run_lines("verify", tmp_path / "out", "--json")
    assert told.json["same"] is True
    assert {Path(read["path"]).name for read in told.json["inputs"]} == {
        "model.safetensors",
        "adapter_model.safetensors",
    }
    if changed == "adapter_model.safetensors":
        write_lora(tmp_path / "adapter", 60, base)
    else:
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(path.read_text().replace(f'"lora_alpha": {2 * RANK}', '"lora_alpha": 1'))
    again = run_lines("verify", tmp_path / "out", "--json")
    assert again.code != 0
    assert again.json["same"] is False


@pytest.mark.slow
def test_a_run_of_an_adapter_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run has finished is taken over, and the bytes are those of an undisturbed one."""
    from lines_cli.engine import write

    base = {f"layers.{i}.w.weight": drawn(i, 1200, 1250) for i in range(4)}
    write_checkpoint(tmp_path / "base", base)
    file = {
        f"{PREFIX}layers.{i}.w.lora_{ab}.weight": drawn(i + 9, *size)
        for i in range(4)
        for ab, size in (("A", (3, 1250)), ("B", (1200, 3)))
    }
    write_adapter(tmp_path / "adapter", file, r=3)
    edit = ["edit", tmp_path / "base", tmp_path / "adapter", "-o", tmp_path / "out", "--workers", "1"]
    assert run_lines(*edit).code == 0
    plain = (tmp_path / "out" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "out")
    taken, made = write.Write.take, [0]

    def dies(self: Any, *arguments: Any) -> Any:
        made[0] += 1
        if made[0] == 3:
            raise KeyboardInterrupt
        return taken(self, *arguments)

    monkeypatch.setattr(write.Write, "take", dies)
    assert run_lines(*edit).code != 0
    monkeypatch.setattr(write.Write, "take", taken)
    ran = run_lines(*edit, "--resume", "--json")
    assert ran.code == 0, ran.err
    assert ran.json["resumed"] > 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == plain


def test_factors_are_in_the_forecast(tmp_path: Path) -> None:
    """A larger rank is a larger forecast, by what a thread holds of it; a long factor is never held whole."""
    base = {"layers.0.w.weight": torch.zeros(20_000, 64)}
    write_checkpoint(tmp_path / "base", base)

    def forecast(rank: int) -> lines.Plan:
        file = {f"{PREFIX}layers.0.w.lora_A.weight": torch.zeros(rank, 64)}
        file[f"{PREFIX}layers.0.w.lora_B.weight"] = torch.zeros(20_000, rank)
        write_adapter(tmp_path / "adapter", file, r=rank)
        (tmp_path / "m.yaml").write_text(f"base_model: {tmp_path}/base\nmodels: [{{model: {tmp_path}/adapter}}]\n")
        recipe = lines.load_recipe(tmp_path / "m.yaml")
        return lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")

    small, large = forecast(64), forecast(256)
    more = [plan.peak_memory(lines.Resources(workers=3)) for plan in (small, large)]
    assert more[1] - more[0] == 3 * 8 * 64 * (256 - 64)
    assert large.formula_bytes < 20_000 * 256 * 8 / 4
