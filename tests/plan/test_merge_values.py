"""NaN, Inf, overflow and odd tensors in the inputs of a merge."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from support.bits import raw
from support.crossed import crossed
from support.files import snapshot
from support.merging import AUTO, Tensors, merge, output, refused, same, tensors, trimmed, write

NAN, INF = float("nan"), float("inf")


def by_ties(base: Tensors, *models: Tensors, density: float) -> Tensors:
    """TIES as published, over the whole flattened model, with weights and lambda of 1."""
    flat = torch.cat([tensor.flatten() for tensor in base.values()])
    taus = torch.stack([torch.cat([m[name].flatten() for name in base]) - flat for m in models])
    taus = trimmed(taus, density)
    sign = taus.sum(0).sign()
    sign[sign == 0] = sign.sum().sign()
    sign[sign == 0] = -1
    agree = taus * sign > 0
    merged = (taus * agree).sum(0) / agree.sum(0).clamp(min=1)
    parts = (flat + merged).split([tensor.numel() for tensor in base.values()])
    return {name: part.view(base[name].shape) for name, part in zip(base, parts, strict=True)}


METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "average": ("average", {}),
    "task_arithmetic": ("task_arithmetic", {}),
    "task_arithmetic, weight 0": ("task_arithmetic", {"weight": 0}),
    "task_arithmetic, trimmed": ("task_arithmetic", {"density": 0.02}),
    "ties": ("ties", {"density": 0.02}),
    "ties by tensor": ("ties", {"density": 0.02, "trim": "tensor"}),
    "ties, untrimmed": ("ties", {}),
    "ties by sum": ("ties", {"density": 0.02, "agreement": "sum"}),
    "ties by max": ("ties", {"density": 0.02, "agreement": "max"}),
    "consensus": ("consensus", {"k": 2, "mask_lambda": 5.0}),
    "consensus that keeps nothing": ("consensus", {"k": 9}),
    "consensus on ties": ("consensus", {"on": "ties", "density": 0.02}),
    "dare_linear": ("dare_linear", {"density": 0.01}),
    "dare_linear of nothing": ("dare_linear", {"density": 0}),
    "dare_linear by L1": ("dare_linear", {"density": 0.01, "rescale": "l1"}),
    "dare_ties": ("dare_ties", {"density": 0.01}),
    "linear": ("linear", {}),
    "slerp": ("slerp", {"t": 0.5}),
    "slerp at the first": ("slerp", {"t": 0.0}),
}


def holed(seed: int, value: float) -> torch.Tensor:
    """A layer's weight with one impossible entry, the sixth."""
    layer = tensors(seed)["layers.1.w"]
    layer.view(-1)[5] = value
    return layer


def method_recipe(case: str) -> dict[str, Any]:
    method, parameters = METHODS[case]
    base = {"base_model": None} if method in ("linear", "slerp") else {}
    return {"merge_method": method, "parameters": parameters, **base}


@crossed(case=METHODS, auto=[False, True], value=[NAN, -INF])
@pytest.mark.some(7)
def test_one_impossible_entry_is_refused(case: str, auto: bool, value: float, tmp_path: Path) -> None:
    """NaN or Inf in one model, be it masked away: exit 5 with file, tensor and entry; nothing is left on the disk."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, value)))
    recipe = method_recipe(case)
    if auto:
        recipe |= {"lines": AUTO, "base_model": "base"}
    before = snapshot(tmp_path)
    ran = merge(tmp_path, **recipe)
    what = "NaN" if math.isnan(value) else "Inf"
    refused(ran, 5, tmp_path / "b" / "model.safetensors", "layers.1.w", what, "entry 5", "allow_nonfinite")
    (tmp_path / "merge.yaml").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("side", ["base", "a", "c"])
@pytest.mark.parametrize("case", ["average", "ties", "consensus", "dare_ties"])
def test_the_file_with_the_impossible_entry_is_named(case: str, side: str, tmp_path: Path) -> None:
    """Whichever of four inputs it is in, that one is named and no other."""
    models = {s: tensors(i) for i, s in enumerate(("base", "a", "b", "c"))}
    models[side]["layers.1.w"] = holed(0, NAN)
    write(tmp_path, **models)
    ran = merge(tmp_path, models="abc", **method_recipe(case))
    refused(ran, 5, tmp_path / side / "model.safetensors", "layers.1.w", "entry 5")
    assert [s for s in models if s != side and str(tmp_path / s / "model") in ran.err] == []


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("case", ["task_arithmetic", "ties"])
def test_a_refusal_of_numbers_keeps_the_old(case: str, existing: bool, tmp_path: Path) -> None:
    """With --force an output that is there stays as it was when an input turns out to hold NaN."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, NAN)))
    if existing:
        write(tmp_path, out=tensors(3))
    before = snapshot(tmp_path)
    refused(merge(tmp_path, "--force", **method_recipe(case)), 5, "layers.1.w")
    (tmp_path / "merge.yaml").unlink()
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("case", METHODS)
@pytest.mark.some(6)
def test_impossible_entries_let_through(case: str, value: float, tmp_path: Path) -> None:
    """With allow_nonfinite the entry is not finite in the output, no other tensor is touched by it, and it is named."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, value)))
    ran = merge(tmp_path, "--json", allow_nonfinite=True, **method_recipe(case))
    assert ran.code == 0, ran.err
    assert list(ran.json["nonfinite"]) == ["layers.1.w"]
    assert str(tmp_path / "b" / "model.safetensors") in ran.json["nonfinite"]["layers.1.w"]
    got = output(tmp_path)
    assert [name for name in got if not got[name].isfinite().all()] == ["layers.1.w"]
    bad = ~got["layers.1.w"].flatten().isfinite()
    assert bad[5]
    if case != "dare_linear by L1":  # whose factor is of the whole tensor
        assert int(bad.sum()) == 1


@pytest.mark.parametrize("case", ["average", "ties", "consensus on ties"])
def test_alpha_auto_of_impossible_numbers(case: str, tmp_path: Path) -> None:
    """With allow_nonfinite there is no norm for alpha: auto to rest on, which is said; a given alpha works."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2, layers_1_w=holed(2, NAN)))
    refused(merge(tmp_path, allow_nonfinite=True, lines=AUTO, **method_recipe(case)), 4, "alpha: auto", "nan")
    assert merge(tmp_path, allow_nonfinite=True, lines={"alpha": 0.5, **AUTO}, **method_recipe(case)).code == 0


OVERFLOWS = [("float16", 1e5, 5), ("float16", 65519.0, 0), ("bfloat16", 1e38, 0), ("float32", 1e38, 0)]


@pytest.mark.parametrize(("dtype", "value", "code"), OVERFLOWS)
@pytest.mark.parametrize("case", ["task_arithmetic", "ties, untrimmed", "linear"])
def test_overflow_of_the_output_dtype(case: str, dtype: str, value: float, code: int, tmp_path: Path) -> None:
    """A merged value beyond the output dtype is exit 5 with tensor and dtype; one that rounds to its largest is not."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    large = {name: tensor.clone() for name, tensor in zeros.items()}
    large["layers.1.w"].view(-1)[5] = value
    write(tmp_path, base=zeros, a=large, b=zeros if case != "linear" else large)
    ran = merge(tmp_path, dtype=dtype, **method_recipe(case))
    if code:
        refused(ran, 5, "layers.1.w", "F16", "beyond")
        ran = merge(tmp_path, "--json", dtype=dtype, allow_nonfinite=True, **method_recipe(case))
        assert (ran.code, list(ran.json["nonfinite"])) == (0, ["layers.1.w"])
        assert output(tmp_path)["layers.1.w"].flatten()[5] == INF
    else:
        assert ran.code == 0, ran.err
        assert output(tmp_path)["layers.1.w"].isfinite().all()


def test_the_way_out_of_an_overflow_is_one_of_a_merge(tmp_path: Path) -> None:
    """The hint names keys of the recipe: `lines merge` has no --dtype and no --allow-nonfinite."""
    zeros = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    write(tmp_path, base=zeros, a=zeros | {"layers.1.w": torch.full((5, 7), 1e5)}, b=zeros)
    ran = merge(tmp_path, dtype="float16")
    refused(ran, 5, "hint: ", "dtype", "allow_nonfinite: true")


@pytest.mark.slow
def test_an_overflow_of_the_difference(tmp_path: Path) -> None:
    """Finite inputs whose difference is beyond float32 are refused in either pass, not written as Inf."""
    far = torch.zeros(5, 7)
    far[0, 5] = 3e38
    write(tmp_path, base=tensors(0, layers_1_w=-far), a=tensors(1, layers_1_w=far), b=tensors(2))
    for case in ("task_arithmetic", "ties", "consensus on ties", "dare_linear by L1"):
        recipe = method_recipe(case)
        ran = merge(tmp_path, **recipe)
        refused(ran, 5, "layers.1.w")
        assert not (tmp_path / "out").exists()


def odd(seed: int) -> Tensors:
    """Empty tensors, scalars and tensors of one entry among others; empty ones first and last."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"a_first": (0,), "layers.0.e": (0, 4), "layers.0.s": (), "layers.0.w": (3, 3), "layers.1.e": (4, 0)}
    shapes |= {"layers.1.s": (), "layers.1.w": (1,), "z_last": (0, 0)}
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


@pytest.mark.parametrize("density", [1.0, 0.5, 0.05, 1e-9, 0.0])
@pytest.mark.parametrize("lines", [None, {"alpha": 1.0, "beta": 0.0}])
def test_odd_tensors_with_ties(lines: Any, density: float, tmp_path: Path) -> None:
    """Tensors of no entry or one are trimmed like all others; a density below one entry keeps one (k = 1)."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    ran = merge(tmp_path, "--json", merge_method="ties", parameters={"density": density}, lines=lines)
    assert ran.code == 0, ran.err
    same(output(tmp_path), by_ties(models[0], models[1], models[2], density=density))
    if density < 1:
        assert [model["kept"] for model in ran.json["models"]] == [max(1, int(density * 12)) / 12] * 2


@pytest.mark.parametrize("case", METHODS)
@pytest.mark.some(6)
def test_odd_tensors_with_every_method(case: str, tmp_path: Path) -> None:
    """Every method takes them, with alpha measured and without, and the shapes stay."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    recipe = method_recipe(case)
    assert merge(tmp_path, **recipe).code == 0
    got = output(tmp_path)
    assert {n: t.shape for n, t in got.items()} == {n: t.shape for n, t in models[0].items()}
    ran = merge(tmp_path, out="auto", **{**recipe, "lines": AUTO, "base_model": "base"})
    # The merged vector is 0, or may be, as where random draws keep none of twelve entries: alpha cannot be measured.
    nothing = "nothing" in case or "dare" in case or case in ("consensus", "task_arithmetic, weight 0")
    assert ran.code in ((0, 4) if nothing else (0,)), ran.err


def test_each_tensor_of_one_entry_keeps_it(tmp_path: Path) -> None:
    """With trim: tensor a tensor of one entry, scalars included, keeps it at any density."""
    models = [odd(seed) for seed in range(3)]
    write(tmp_path, base=models[0], a=models[1], b=models[2])
    assert merge(tmp_path, merge_method="ties", parameters={"density": 0.01, "trim": "tensor"}).code == 0
    parts = [by_ties(*({name: model[name]} for model in models), density=0.01)
             for name in models[0] if models[0][name].numel()]  # fmt: skip
    signs_may_differ = {name: tensor for part in parts for name, tensor in part.items() if tensor.numel() == 1}
    got = output(tmp_path)
    assert len(signs_may_differ) == 3
    assert [n for n, expected in signs_may_differ.items() if raw(got[n]) != raw(expected)] == []


@pytest.mark.parametrize("parameters", [{}, {"density": 0.5}, {"density": 0.5, "trim": "tensor"}], ids=str)
@pytest.mark.parametrize("kind", ["empty", "whole numbers", "both"])
def test_nothing_to_merge(kind: str, parameters: Any, tmp_path: Path) -> None:
    """Models without a single float entry are copied by ties as by any method, not a crash."""
    model: Tensors = {}
    if kind != "whole numbers":
        model |= {f"layers.{i}.w": torch.zeros(0, 4) for i in range(2)}
    if kind != "empty":
        model |= {f"layers.{i}.n": torch.arange(3) for i in range(2)}
    write(tmp_path, base=model, a=model, b=model)
    ran = merge(tmp_path, merge_method="ties", parameters=parameters)
    assert ran.code == 0, ran.err
    same(output(tmp_path), model)


@pytest.mark.parametrize("method", ["ties", "task_arithmetic", "consensus"])
@pytest.mark.parametrize("trim", ["global", "tensor"])
def test_a_model_that_changed_nothing(trim: str, method: str, tmp_path: Path) -> None:
    """A task vector of zeros with density below 1 adds nothing; the other's trimmed entries come through."""
    base, other = tensors(0), tensors(1)
    write(tmp_path, base=base, a=base, b=other)
    parameters: dict[str, Any] = {"density": 0.25, "trim": trim}
    if method == "consensus":
        parameters |= {"on": "ties", "k": 1}
    ran = merge(tmp_path, merge_method=method, parameters=parameters)
    assert ran.code == 0, ran.err
    if trim == "global":
        expected = by_ties(base, base, other, density=0.25)
    else:
        expected = {n: by_ties({n: base[n]}, {n: base[n]}, {n: other[n]}, density=0.25)[n] for n in base}
    got = output(tmp_path)
    assert [n for n in got if not torch.equal(got[n], expected[n])] == []


def test_k_of_one_entry_in_a_whole_model(tmp_path: Path) -> None:
    """A global density of less than one entry leaves each model its largest change alone, wherever it is."""
    base = tensors(0)
    a, b = ({name: tensor + 0.25 for name, tensor in base.items()} for _ in "ab")
    a["layers.2.w"][1, 1] = base["layers.2.w"][1, 1] + 8
    b["norm"][0] = base["norm"][0] - 9
    write(tmp_path, base=base, a=a, b=b)
    ran = merge(tmp_path, "--json", merge_method="ties", parameters={"density": 1e-6})
    assert ran.code == 0, ran.err
    got = output(tmp_path)
    changed = {name: (got[name] != base[name]).nonzero().tolist() for name in base}
    assert changed == {name: {"layers.2.w": [[1, 1]], "norm": [[0]]}.get(name, []) for name in base}
    entries = sum(tensor.numel() for tensor in base.values())
    assert [model["kept"] for model in ran.json["models"]] == [1 / entries] * 2
