"""What is compared and what is not: tensors that one side lacks, other shapes, prefixes, tied heads."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.files import write_checkpoint
from support.inspect_reference import (
    TIED,
    Reference,
    Tensors,
    check,
    inspect,
    linear,
    loaded,
    norm,
    pair_of_stacks,
    spots_of,
    toy,
    toy_reference,
    toy_spots,
    tuned,
    vector,
    written,
)
from support.run import run_lines


def test_tensors_that_one_side_lacks(tmp_path: Path) -> None:
    """What is not in all is not compared; it is named, with who has it."""
    base, extra = toy(1, 3), torch.ones(3, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    base["model.layers.0.mlp.only_base.weight"] = extra
    fts[0]["model.layers.1.mlp.only_first.weight"] = extra
    fts[1]["model.layers.1.mlp.only_second.weight"] = extra
    del fts[1]["model.layers.2.self_attn.o_proj.weight"]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    whys = {row["tensor"]: row["why"] for row in told["not_compared"]}
    first, second = (str(tmp_path / f"ft{n}.safetensors") for n in (0, 1))
    owners = {
        "model.layers.0.mlp.only_base.weight": ["the base"],
        "model.layers.1.mlp.only_first.weight": [first],
        "model.layers.1.mlp.only_second.weight": [second],
        "model.layers.2.self_attn.o_proj.weight": ["the base", first],
    }
    assert whys.keys() == owners.keys()
    for name, having in owners.items():
        assert [owner for owner in ("the base", first, second) if owner in whys[name]] == having
    assert {h["tensors"] for h in told["health"]} == {len(base)} | {len(ft) for ft in fts}


def test_every_misfit_is_named(tmp_path: Path) -> None:
    """Tensors of other shapes, or of floats against integers, are not compared; each is named, with the reason."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    ft["model.layers.0.mlp.up_proj.weight"] = torch.ones(6, 9)
    ft["model.layers.1.mlp.up_proj.weight"] = torch.ones(9, 6, 1)
    ft["model.norm.weight"] = torch.ones(6, dtype=torch.int64)
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    whys = {row["tensor"]: row["why"] for row in told["not_compared"]}
    up = "model.layers.{}.mlp.up_proj.weight".format
    assert whys.keys() == {up(0), up(1), "model.norm.weight"}
    assert [shape in whys[up(0)] for shape in ("[9, 6]", "[6, 9]")] == [True, True]
    assert [dtype in whys["model.norm.weight"] for dtype in ("F32", "I64")] == [True, True]
    assert [health["tensors"] for health in told["health"]] == [len(base), len(base) - 1]


def test_every_tensor_that_is_not_compared_is_named(tmp_path: Path) -> None:
    """However many tensors are not compared, `--json` names each."""
    base = toy(1, 12)
    ft = tuned(base, 1)
    for i in range(12):
        base[f"model.layers.{i}.mlp.extra.weight"] = torch.ones(2)
        ft[f"model.layers.{i}.mlp.up_proj.weight"] = torch.ones(3)
    told = inspect(*written(tmp_path, base, [ft]))
    named = sorted(row["tensor"] for row in told["not_compared"])
    assert named == sorted(f"model.layers.{i}.mlp.{part}.weight" for i in range(12) for part in ("extra", "up_proj"))


def test_integers_of_other_shapes_are_named(tmp_path: Path) -> None:
    """Buffers are not compared; one of another shape or dtype is told of."""
    base = toy(1, 2) | {"model.layers.0.self_attn.mask": torch.zeros(3, dtype=torch.int64)}
    base["model.layers.1.self_attn.mask"] = torch.zeros(3, dtype=torch.int64)
    ft = tuned(base, 1)
    ft["model.layers.0.self_attn.mask"] = torch.zeros(4, dtype=torch.int64)
    ft["model.layers.1.self_attn.mask"] = torch.zeros(3, dtype=torch.bool)
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert {row["tensor"] for row in told["not_compared"]} == {f"model.layers.{i}.self_attn.mask" for i in range(2)}


@pytest.mark.parametrize("rows", [(11, 13, 13), (13, 11, 13), (11, 13, 9), (9, 11, 13)])
def test_resized_vocabularies(rows: tuple[int, int, int], tmp_path: Path) -> None:
    """Of vocabularies of several sizes the rows that all have are compared; all rows are looked through for health."""
    base = toy(1, 2)
    sides = [base, *(tuned(base, seed) for seed in (1, 2))]
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    for number, (side, count) in enumerate(zip(sides, rows, strict=True)):
        for name in vocabulary:
            side[name] = torch.randn(count, 6, generator=torch.Generator().manual_seed(number))
            side[name][-1, -1] = math.nan if number == 1 else 1.0
    told = inspect(*written(tmp_path, sides[0], sides[1:]))
    cut = [side | {name: side[name][: min(rows)] for name in vocabulary} for side in sides]
    check(told, toy_reference(cut[0], cut[1:]))
    notes = "\n".join(told["notes"])
    assert all(name in notes for name in vocabulary)
    assert [health["tensors"] for health in told["health"]] == [len(base)] * 3
    assert [len(health["nonfinite"]) for health in told["health"]] == [0, 2, 0]


@pytest.mark.parametrize("prefixed", ["base", "fine-tune", "second"])
def test_names_that_differ_by_a_prefix(prefixed: str, tmp_path: Path) -> None:
    """A GPT-2 saved alone and one saved inside another are compared, told by the names of the first fine-tune."""
    random = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (9, 4), "wpe.weight": (5, 4), "ln_f.weight": (4,)}
    for i in range(3):
        shapes |= {f"h.{i}.attn.c_attn.weight": (4, 12), f"h.{i}.mlp.c_fc.weight": (4, 8), f"h.{i}.ln_1.weight": (4,)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    fts = [tuned(base, seed) for seed in (1, 2)]
    as_stored = [
        {f"transformer.{n}" if there == prefixed else n: t for n, t in side.items()}
        for there, side in zip(("base", "fine-tune", "second"), (base, *fts), strict=True)
    ]
    told = inspect(*written(tmp_path, as_stored[0], as_stored[1:]))
    mark = "transformer." if prefixed == "fine-tune" else ""
    kinds = {"attn": "attention", "mlp": "mlp", "ln_": "norm", "wte": "embedding", "wpe": "embedding"}
    spots = spots_of([mark + n for n in base], [f"{mark}h"], [f"{mark}wte", f"{mark}wpe"], kinds)
    renamed = [{mark + n: t for n, t in side.items()} for side in (base, *fts)]
    check(told, toy_reference(renamed[0], renamed[1:], spots))
    assert "begin with 'transformer.'" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base)] * 3


def test_a_head_that_the_base_ties(tmp_path: Path) -> None:
    """A fine-tune's own head is compared with the embedding that the base ties it to, and a note says so."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    del base["lm_head.weight"]
    b = write_checkpoint(tmp_path / "base", base, config=TIED)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED | {"tie_word_embeddings": False})
    told = inspect(f, "--base", b)
    check(told, toy_reference(base | {"lm_head.weight": base["model.embed_tokens.weight"]}, [ft]))
    assert "lm_head.weight" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base), len(ft)]


def test_a_head_that_the_fine_tune_ties(tmp_path: Path) -> None:
    """A head that only the base stores is left out where the fine-tune ties it, and a note says so."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    del ft["lm_head.weight"]
    b = write_checkpoint(tmp_path / "base", base, config=TIED | {"tie_word_embeddings": False})
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED)
    told = inspect(f, "--base", b)
    check(told, toy_reference(base, [ft]))
    assert "lm_head.weight" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base), len(ft)]


def test_a_tied_head_that_is_stored_has_its_embeddings_coefficient(tmp_path: Path) -> None:
    """Embedding and tied head are one weight with one coefficient, wherever they stand and whatever filters say."""
    base = toy(1, 3)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    ft = tuned(base, 1)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    b, f = (write_checkpoint(tmp_path / name, side, config=TIED) for name, side in (("base", base), ("ft", ft)))
    told = inspect(f, "--base", b, "--outside", "position", "--filter", "lm_head=5", "--tensors")
    spots = toy_spots(ft)
    c = linear(spots) | {"model.norm.weight": 1.0}
    assert c["lm_head.weight"] == 0.1
    check(told, Reference(base, [ft], spots, c))
    assert told["tied"] == {"config": True, "stored": [["lm_head.weight", "model.embed_tokens.weight"]]}
    assert [health["same"] for health in told["health"]] == [[], []]


def t5_with_copies() -> tuple[Tensors, Tensors]:
    base = pair_of_stacks(1)
    ft = tuned(base, 1)
    for seed, name in enumerate(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")):
        ft[name] = tuned({name: base["shared.weight"]}, seed)[name]
    return base, ft


def untied_and_resized() -> tuple[Tensors, Tensors]:
    base = toy(1, 3)
    ft = tuned(base, 1)
    del base["lm_head.weight"]
    for seed, name in enumerate(("lm_head.weight", "model.embed_tokens.weight")):
        ft[name] = torch.randn(13, 6, generator=torch.Generator().manual_seed(seed))
    return base, ft


def deeper_base() -> tuple[Tensors, Tensors]:
    base = toy(1, 4)
    return base, {name: tensor for name, tensor in tuned(base, 1).items() if "layers.3" not in name}


def deeper_fine_tune() -> tuple[Tensors, Tensors]:
    return deeper_base()[::-1]


@pytest.mark.parametrize("models", [t5_with_copies, untied_and_resized, deeper_base, deeper_fine_tune])
def test_every_tensor_is_scaled_as_an_edit_scales_it(
    models: Callable[[], tuple[Tensors, Tensors]], tmp_path: Path
) -> None:
    """Through ties, resizing and missing layers, each tensor's scaled norm is that of `out - base` of an edit."""
    base, ft = models()
    b = write_checkpoint(tmp_path / "base", base, config=TIED)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED | {"tie_word_embeddings": False})
    told = inspect(f, "--base", b, "--outside", "position", "--tensors", "--layers", LAYERS)
    how: tuple[object, ...] = ("--outside", "position", "--layers", LAYERS, "--missing", "ft", "--resize", "ft")
    if models in (deeper_base, deeper_fine_tune):
        how += ("--missing-in-blocks", len(base.keys() ^ ft.keys()))
    assert run_lines("edit", b, f, "-o", tmp_path / "out", "--quiet", *how).code == 0
    edited, compared = loaded(tmp_path / "out"), 0
    for row in told["map"]:
        name = row["name"]
        tied = "model.embed_tokens.weight" if "lm_head" in name else "shared.weight"
        before = base.get(name, base.get(tied) if "embed_tokens" in name or "lm_head" in name else None)
        if before is None:
            assert row["update_norm"] is None
            continue
        compared += 1
        update = vector([ft[name][: len(before)]]) - vector([before])
        left = vector([edited[name][: len(before)]]) - vector([before])
        assert row["update_norm"] == pytest.approx(norm(update), rel=1e-6)
        assert row["scaled_norm"] == pytest.approx(norm(left), rel=1e-4)
    assert told["fine_tunes"][0]["compared"]["tensors"] == compared


LAYERS = r"^(?P<stack>model\.layers|encoder\.block|decoder\.block)\.(?P<index>\d+)\."
