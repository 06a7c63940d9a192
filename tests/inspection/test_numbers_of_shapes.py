"""The numbers for any shape, chunk, sharding and number of workers, and with NaN and Inf, against the reference."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from support.files import write_checkpoint
from support.inspect_reference import JOINT, UPDATE, Tensors, agree, check, inspect, toy, toy_reference, tuned, written

# --- shapes, chunks, shards, workers ---


def odd_shapes(seed: int) -> Tensors:
    """Scalars, empty tensors, up to four dimensions, and buffers that are no floats."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {"model.embed_tokens.weight": torch.randn(5, 2, generator=random)}
    for i in range(3):
        tensors[f"model.layers.{i}.mlp.scale"] = torch.randn((), generator=random)
        tensors[f"model.layers.{i}.mlp.empty"] = torch.empty((0, 4))
        tensors[f"model.layers.{i}.mlp.hollow"] = torch.empty((3, 0, 2), dtype=torch.bfloat16)
        tensors[f"model.layers.{i}.mlp.cube"] = torch.randn(2, 3, 5, generator=random)
        tensors[f"model.layers.{i}.self_attn.kernel"] = torch.randn(2, 3, 1, 7, generator=random).half()
        tensors[f"model.layers.{i}.self_attn.mask"] = torch.rand(9, generator=random) > 0.5
        tensors[f"model.layers.{i}.self_attn.bias"] = torch.ones(1, 1, dtype=torch.uint8)
        tensors[f"model.layers.{i}.input_layernorm.num_batches"] = torch.randint(0, 99, (2,), generator=random)
    tensors["model.norm.weight"] = torch.empty(0)
    tensors["lm_head.steps"] = torch.randint(0, 9, (3,), generator=random).to(torch.int32)
    return tensors


@pytest.mark.parametrize("number", [1, 2])
def test_scalars_empty_tensors_and_buffers(number: int, tmp_path: Path) -> None:
    """Tensors of any shape are compared, integers and booleans are not, and of what holds nothing all is null."""
    base = odd_shapes(1)
    fts = [tuned(base, seed) for seed in range(number)]
    for ft in fts:
        ft["model.layers.1.self_attn.mask"] = ~base["model.layers.1.self_attn.mask"]
        ft["lm_head.steps"] = base["lm_head.steps"] + 5
    told = inspect(*written(tmp_path, base, fts), "--tensors")
    check(told, toy_reference(base, fts))
    assert all(one["outside"]["after"]["update_norm"] is None for one in told["fine_tunes"])
    assert {row["kind"]: row["tensors"] for row in told["kinds"]}["head"] == 1


def test_a_model_that_is_one_scalar(tmp_path: Path) -> None:
    """Without any stack everything lies outside, and no third of the blocks can be told."""
    told = inspect(*written(tmp_path, {"logit_scale": torch.tensor(2.0)}, [{"logit_scale": torch.tensor(3.5)}]))
    one = told["fine_tunes"][0]
    assert (told["stacks"], told["layers"]) == ([], [])
    assert [one[key] for key in UPDATE] == [1.5, 0.75, 0.0, 1.5, None, None, None]  # its depth, so its c, is unknown
    assert "depth is unknown" in "\n".join(told["notes"])
    assert (one["largest_in"], one["first_third"]) == ("logit_scale", None)


def many(seed: int) -> Tensors:
    """Tensors around and beyond the sizes of a chunk (up to 524,288 entries) and of a block (65,536)."""
    sizes = [524_288 + 65_536 + 1, 65_537, 65_536, 524_289, 699_051, 7]
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.w" for i in range(4)), "model.norm.weight"]
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=random).to(d) for n, s, d in zip(names, sizes, dtypes, strict=False)}


@pytest.mark.parametrize("number", [pytest.param(1, marks=pytest.mark.slow), 3])
@pytest.mark.slow
def test_chunks_shards_and_workers(number: int, tmp_path: Path) -> None:
    """However tensors are cut, sharded and shared out, the numbers are the reference's, the JSON one to the bit."""
    base = many(1)
    fts = [tuned(base, seed) for seed in range(number)]
    for ft in fts:  # the last entry of a chunk, the first of the next, and the very last
        big = ft["model.embed_tokens.weight"]
        big[524_287], big[524_288], big[-1] = 30.0, -31.0, 32.0
    fts[0]["model.layers.3.mlp.w"][600_000:600_003] = torch.tensor([math.nan, math.inf, -math.inf]).half()
    shards = [3, 1, 2]
    paths = [write_checkpoint(tmp_path / f"ft{n}", ft, shards=shards[n]) for n, ft in enumerate(fts)]
    start = [*paths, "--base", write_checkpoint(tmp_path / "base", base, shards=4)]
    runs = [inspect(*start, "--workers", workers) for workers in (1, 3)]
    assert runs[0]["fine_tunes"][0]["compared"]["left_out"] == 3
    check(runs[0], toy_reference(base, fts))
    assert len({json.dumps(run | {"seconds": 0}) for run in runs}) == 1


@pytest.mark.slow
def test_sharding_changes_nothing(tmp_path: Path) -> None:
    """One file or many, in whatever order tensors lie: the same numbers to the bit."""
    base = toy(9, 5)
    fts = [tuned(base, seed) for seed in (1, 2)]
    tellings = []
    for number, shards in enumerate(((1, 1, 1), (3, 2, 5), (7, 1, 2))):
        folder = tmp_path / f"{number}"
        sides = [dict(reversed(side.items())) if number == 2 else side for side in (base, *fts)]
        paths = [
            write_checkpoint(folder / f"{i}", side, shards=n)
            for i, (side, n) in enumerate(zip(sides, shards, strict=True))
        ]
        told = inspect(*paths[1:], "--base", paths[0])
        tellings.append(
            json.dumps([[{**one, "model": 0} for one in told["fine_tunes"]], {**told["together"], "models": 0}])
        )
    assert len(set(tellings)) == 1


# --- NaN and Inf ---


@pytest.mark.parametrize("number", [1, 3])
def test_entries_that_are_not_finite(number: int, tmp_path: Path) -> None:
    """NaN and Inf on either side are left out and counted; all other entries count as ever."""
    base = toy(6, 3)
    fts = [tuned(base, seed) for seed in range(number)]
    base["model.layers.0.mlp.up_proj.weight"].view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    fts[0]["model.layers.0.mlp.up_proj.weight"].view(-1)[1:5] = torch.tensor([math.inf, math.inf, math.nan, math.inf])
    fts[-1]["model.layers.1.self_attn.q_proj.weight"].view(-1)[7] = -math.inf
    fts[-1]["model.layers.2.input_layernorm.weight"][:] = math.nan
    fts[0]["lm_head.weight"][:] = math.inf
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    up, q, last = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
    )
    expected: list[dict[str, tuple[int, int]]] = [{up: (1, 2)}, *({} for _ in fts)]
    expected[1] |= {up: (1, 3), "lm_head.weight": (0, 66)}
    expected[-1] |= {q: (0, 1), last: (6, 0)}
    for health, wanted in zip(told["health"], expected, strict=True):
        assert {row["tensor"]: (row["nan"], row["inf"]) for row in health["nonfinite"]} == wanted


def test_a_layer_of_nan_tells_nothing(tmp_path: Path) -> None:
    """Where all is left out, all is null, and the fine-tune's other layers are told."""
    base = toy(6, 3)
    ft = tuned(base, 1)
    for name in ft:
        if ".layers.1." in name:
            ft[name][:] = math.nan
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert [told["layers"][1][key] for key in UPDATE] == [None] * len(UPDATE)


def test_shares_of_several_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    """Where the base is NaN no sign can be compared: such entries are no part of what opposed signs are a share of."""
    base = {f"model.layers.{i}.mlp.w": torch.tensor([0.0, 0.0, math.nan, math.inf]) for i in range(2)}
    fts = [{name: torch.tensor([1.0, sign, sign, sign]) for name in base} for sign in (1.0, -1.0)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    assert together["opposed"][0][1] == 0.5
    assert together["disagreement"] == 0.5


def test_shares_of_nothing_are_null_for_several(tmp_path: Path) -> None:
    """Where every entry is left out there is no share of disagreeing signs, as there are no other numbers."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), math.nan if i else 0.0) for i in range(2)}
    fts = [{name: torch.tensor([1.0, sign, sign, sign]) for name in base} for sign in (1.0, -1.0)]
    told = inspect(*written(tmp_path, base, fts))
    assert told["fine_tunes"][0]["layers"][1]["unchanged"] is None
    last = told["together"]["layers"][1]
    empty = [[None, None], [None, None]]
    assert [last[key] for key in ("opposed", "cosine", "scaled_cosine")] == [empty] * 3
    assert [last[key] for key in JOINT if key not in ("opposed", "cosine", "scaled_cosine")] == [None] * 5


def test_entries_that_are_not_finite_in_one_alone(tmp_path: Path) -> None:
    """What is NaN in one fine-tune counts for the other's own numbers, and for none of those of both."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4) for i in range(2)}
    fts = [{name: torch.tensor(v) for name in base} for v in ([3.0, 4.0, 100.0, 0.0], [3.0, -4.0, math.nan, math.inf])]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    assert [one["largest"] for one in told["fine_tunes"]] == [100.0, 4.0]
    assert [one["compared"]["left_out"] for one in told["fine_tunes"]] == [0, 4]
    row = told["together"]["layers"][0]
    agree([row["cosine"][0][1], row["opposed"][0][1], row["disagreement"]], [-7 / 25, 0.5, 0.5], "row")
    agree([row["norm_of_sum"], row["sum_of_norms"], told["together"]["auto"]["sum"]], [6.0, 10.0, 12.0], "norms")
