"""Tens of thousands of small tensors: those that stand side by side are merged in one go, and nothing tells."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import lines_cli as lines
from lines_cli.engine import write
from lines_cli.engine.merge_chunk import merge_chunk
from lines_cli.plan.resources import SUM_BLOCK, Resources
from support.run import run_lines

LAYERS, EXPERTS = 3, 40
Tensors = dict[str, torch.Tensor]


def model(seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    """Layers of small experts, of several shapes, an empty one and a counter among them."""
    chance = torch.Generator().manual_seed(seed)
    shapes = {"down": (5, 7), "up": (7, 5), "bias": (3,), "empty": (0, 4)}
    tensors = {
        f"layers.{layer}.experts.{expert}.{part}": torch.randn(shape, generator=chance).to(dtype)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
        for part, shape in shapes.items()
    }
    return tensors | {"embed": torch.randn(9, 4, generator=chance).to(dtype), "steps": torch.tensor(3)}


def expected(base: Tensors, ft: Tensors) -> Tensors:
    """`base + c * (ft - base)` in float32, one tensor after another; c is 0.1, 0.55 and 1, and 0.1 outside."""
    made = {}
    for name, tensor in ft.items():
        layer = int(name.split(".")[1]) if name.startswith("layers") else 0
        c = torch.tensor(0.1 + 0.9 * layer / (LAYERS - 1), dtype=torch.float64).float()
        wide, old = tensor.float(), base[name].float()
        made[name] = tensor if c == 1 or not tensor.is_floating_point() else (old + c * (wide - old)).to(tensor.dtype)
    return made


@pytest.fixture
def merged(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many entries each call merged."""
    sizes: list[int] = []

    def counted(worker: Any, chunk: Any, **said: Any) -> Any:
        sizes.append(chunk.numel)
        return merge_chunk(worker, chunk, **said)

    monkeypatch.setattr(write, "merge_chunk", counted)
    return sizes


def saved(folder: Path, base: Tensors, ft: Tensors) -> None:
    """Both, as the format's own writer lays them out."""
    for side, tensors in (("base", base), ("ft", ft)):
        save_file(tensors, folder / f"{side}.safetensors")


def edited(folder: Path, *options: object) -> Any:
    return run_lines("edit", folder / "base.safetensors", folder / "ft.safetensors", "-o", folder / "out", *options)


def output(folder: Path) -> Tensors:
    return load_file(folder / "out" / "model.safetensors")


def same(found: Tensors, wanted: Tensors) -> bool:
    """Whether both hold the same bits."""
    return found.keys() == wanted.keys() and all(
        torch.equal(found[name].view(-1).view(torch.uint8), wanted[name].view(-1).view(torch.uint8)) for name in wanted
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_side_by_side_are_merged_in_one_go(dtype: torch.dtype, merged: list[int], tmp_path: Path) -> None:
    """The bits are those of one after another, each layer with its own coefficient; and there are few calls."""
    base, ft = model(0, dtype), model(1, dtype)
    saved(tmp_path, base, ft)
    ran = edited(tmp_path)
    assert ran.code == 0
    assert same(output(tmp_path), expected(base, ft))
    of_each = EXPERTS * (35 + 35 + 3)
    assert sum(merged) == 2 * of_each + 36  # the last layer is a copy
    assert len(merged) < 2 * EXPERTS  # empty ones are made alone


def reordered(tensors: Tensors) -> Tensors:
    """The same in the other order, so that nothing stands behind what it stands behind elsewhere."""
    return dict(reversed(tensors.items()))


def in_order(folder: Path, side: str, tensors: Tensors) -> None:
    """A file whose tensors stand in the order of the mapping."""
    from lines_cli.checkpoint.header import lay_out

    names = {torch.bfloat16: "BF16", torch.int64: "I64"}
    rows = [(name, names[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    content = b"".join(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values())
    (folder / f"{side}.safetensors").write_bytes(lay_out(rows, {})[0] + content)


@pytest.mark.slow
@pytest.mark.parametrize("turned", [("ft",), ("base",), ("base", "ft")])
def test_tensors_apart_are_merged_one_by_one(turned: tuple[str, ...], merged: list[int], tmp_path: Path) -> None:
    """Where inputs have them in another order than the output, or than each other."""
    sides = {"base": model(0), "ft": model(1)}
    saved(tmp_path, **sides)
    for side in turned:
        in_order(tmp_path, side, reordered(sides[side]))
    assert edited(tmp_path).code == 0
    assert same(output(tmp_path), expected(**sides))
    assert max(merged) == 36


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
def test_views_in_a_pickle_are_merged_one_by_one(turned: bool, merged: list[int], tmp_path: Path) -> None:
    """Which only look as if they stood side by side: a view of a storage is not read on into the next one."""
    sides = {"base": model(0), "ft": model(1)}
    for side, tensors in sides.items():
        turns = {name for name, tensor in tensors.items() if turned and tensor.ndim == 2}
        stored = {name: t.t().contiguous().t() if name in turns else t for name, t in tensors.items()}
        torch.save(stored, tmp_path / f"{side}.pt")
    ran = run_lines("edit", tmp_path / "base.pt", tmp_path / "ft.pt", "-o", tmp_path / "out")
    assert ran.code == 0
    assert same(output(tmp_path), expected(**sides))
    assert max(merged) == 36 or not turned


@pytest.mark.slow
def test_what_is_calibrated_is_merged_one_by_one(tmp_path: Path) -> None:
    """A calibration sees each matrix whole: the bytes are those that other resources give."""
    for side in range(3):
        save_file(model(side), tmp_path / f"{side}.safetensors")
    config = {
        "merge_method": "task_arithmetic",
        "calibrate": "svc",
        "base_model": str(tmp_path / "0.safetensors"),
        "models": [{"model": str(tmp_path / f"{side}.safetensors")} for side in (1, 2)],
    }
    (tmp_path / "merge.yaml").write_text(json.dumps(config))
    assert run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out").code == 0
    together = output(tmp_path)
    for side in range(3):
        in_order(tmp_path, str(side), reordered(model(side)))
    assert run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "again").code == 0
    assert same(load_file(tmp_path / "again" / "model.safetensors"), together)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("chunk", [64, SUM_BLOCK])
def test_neither_workers_nor_chunks_change_a_bit(workers: int, chunk: int, tmp_path: Path) -> None:
    """A chunk holds a part of what could be merged in one go, or a part of one tensor."""
    base, ft = model(0), model(1)
    ft["layers.1.experts.7.up"] = torch.ones(7, 5)  # in another dtype than its neighbours, and than the base's
    saved(tmp_path, base, ft)
    recipe = lines.edit_recipe(str(tmp_path / "base.safetensors"), str(tmp_path / "ft.safetensors"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")
    lines.run(plan, Resources(device="cpu", workers=workers, chunk=chunk))
    assert same(output(tmp_path), expected(base, ft))


def nan_in_one(base: Tensors, ft: Tensors) -> None:
    ft["layers.1.experts.7.up"][2, 3] = torch.nan


def inf_in_the_base(base: Tensors, ft: Tensors) -> None:
    base["layers.1.experts.7.up"][2, 3] = torch.inf


def overflow(base: Tensors, ft: Tensors) -> None:
    base["layers.1.experts.7.up"][2, 3] = 3e38
    ft["layers.1.experts.7.up"][2, 3] = -3e38


@pytest.mark.slow
@pytest.mark.parametrize("damage", [nan_in_one, inf_in_the_base, overflow])
def test_what_is_not_finite_is_told_of_the_tensor(damage: Callable[..., None], tmp_path: Path) -> None:
    """Refused with its name and its place; or let through, with its name alone."""
    base, ft = model(0), model(1)
    damage(base, ft)
    saved(tmp_path, base, ft)
    ran = edited(tmp_path)
    assert (ran.code, ran.trace) == (5, "")
    assert "tensor layers.1.experts.7.up" in ran.err
    ran = edited(tmp_path, "--allow-nonfinite", "--json")
    assert ran.code == 0
    assert [*ran.json["nonfinite"]] == ["layers.1.experts.7.up"]
    others, wanted = output(tmp_path), expected(base, ft)
    for tensors in (others, wanted):
        del tensors["layers.1.experts.7.up"]
    assert same(others, wanted)


@pytest.mark.slow
def test_nan_that_all_share_stays(tmp_path: Path) -> None:
    """Its very bits, in the one tensor; the others are merged as ever."""
    base, ft = model(0), model(1)
    for side in (base, ft):
        side["layers.1.experts.7.up"].view(torch.int16)[2, 3] = 0x7FC7
    saved(tmp_path, base, ft)
    ran = edited(tmp_path, "--json")
    assert ran.code == 0
    assert [*ran.json["nonfinite"]] == ["layers.1.experts.7.up"]
    found, wanted = output(tmp_path), expected(base, ft)
    assert found["layers.1.experts.7.up"].view(torch.int16)[2, 3] == 0x7FC7
    wanted["layers.1.experts.7.up"].view(torch.int16)[2, 3] = 0x7FC7
    assert same(found, wanted)


@pytest.mark.slow
def test_a_negative_variance_is_told_of_its_tensor(tmp_path: Path) -> None:
    """Which is looked for in each by itself."""
    base, ft = model(0), model(1)
    for side, value in ((base, 1.0), (ft, -4.0)):
        for layer in range(LAYERS):
            side[f"layers.{layer}.experts.9.running_var"] = torch.full((3,), value if layer == 1 else 1.0).bfloat16()
    saved(tmp_path, base, ft)
    ran = edited(tmp_path, "--json")
    assert ran.code == 0
    assert "layers.1.experts.9.running_var" in str(ran.json)
    assert "layers.0.experts.9.running_var" not in str(ran.json)


@pytest.mark.slow
def test_an_input_that_ends_is_told_of_the_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that it ends in, not the first of those that were merged in one go."""
    base, ft = model(0), model(1)
    saved(tmp_path, base, ft)
    recipe = lines.edit_recipe(str(tmp_path / "base.safetensors"), str(tmp_path / "ft.safetensors"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")
    info = plan.inputs.checkpoints[1].tensors["layers.1.experts.7.up"].info
    from lines_cli.engine import run, workers

    monkeypatch.setattr(run, "refuse_changed", lambda *_: None)
    read = workers.read_input

    def short(source: Any, view: memoryview, offset: int) -> int:
        got = read(source, view, offset)
        return got if source != opened[1] else min(got, max(0, info.offset + 6 - offset))

    opened: list[Any] = []
    real = run.with_views

    def with_views(fds: Any, views: Any) -> Any:
        sources = real(fds, views)
        opened[:] = sources
        return sources

    monkeypatch.setattr(run, "with_views", with_views)
    monkeypatch.setattr(workers, "read_input", short)
    with pytest.raises(lines.LinesError, match=r"ends in the middle of tensor layers\.1\.experts\.7\.up;"):
        lines.run(plan, Resources(device="cpu", workers=1))
