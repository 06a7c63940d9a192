"""What `--check` counts, against plain loops over whole tensors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from support.files import write_checkpoint
from support.inspect_reference import FLOATS, TIED, Tensors, down, inspect, pair_of_stacks, toy, tuned, up
from support.run import run_lines


def in_order(health: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, whichever tensor comes first."""
    told = {key: sorted(health[key], key=str) for key in ("nonfinite", "beyond", "zero")}
    twins: dict[str, set[str]] = {}
    for row in health["same"]:
        twins.setdefault(row["as"], {row["as"]}).add(row["tensor"])
    return told | {"tensors": health["tensors"], "same": sorted(sorted(group) for group in twins.values())}


def health_of(tensors: Tensors, tmp_path: Path, **how: Any) -> Any:
    """Of one checkpoint alone by `--check`, which is the same as it gets beside a base."""
    path = write_checkpoint(tmp_path / "checked", tensors, **how)
    ran = run_lines("inspect", path, "--check", "--json", "--quiet", "--device", "cpu")
    assert (ran.code in (0, 5), ran.trace) == (True, ""), ran.err + ran.trace
    alone = ran.json["health"][0]
    found = any(alone[key] for key in ("nonfinite", "beyond", "zero", "same"))
    assert ran.code == (5 if found else 0)
    base = write_checkpoint(tmp_path / "base", {name: t.clone() for name, t in tensors.items()}, **how)
    for side in inspect(path, "--base", base)["health"]:
        assert in_order(side) == in_order(alone)
    return alone


def test_values_beyond_a_narrower_dtype(tmp_path: Path) -> None:
    """Told is what torch's own cast makes infinite, to the last bit before the threshold, whatever the sign."""
    half, brain, single = 65520.0, 2.0**128 - 2.0**119, torch.finfo(torch.float32).max
    values = {
        "F32": [
            65504.0,
            65519.9,
            65520.0,
            down(half, torch.float32),
            up(half, torch.float32),
            single,
            brain,
            1e30,
            down(brain, torch.float32),
            up(brain, torch.float32),
            torch.finfo(torch.bfloat16).max,
            1.0,
        ],
        "BF16": [65504.0, 65280.0, 65536.0, 66048.0, torch.finfo(torch.bfloat16).max, 1e30, 1.0],
        "F16": [65504.0, 1.0],
    }
    narrower = {"F32": {"bfloat16": torch.bfloat16, "float16": torch.float16}, "BF16": {"float16": torch.float16}}
    tensors, expected = {}, {}
    for dtype, entries in values.items():
        for number, entry in enumerate(entries):
            for sign in (1, -1):
                name = f"model.layers.{number}.mlp.{dtype}_{'plus' if sign > 0 else 'minus'}.weight"
                tensors[name] = torch.tensor([[0.5, sign * float(entry)]]).to(FLOATS[dtype])
                dtypes = [n for n, d in narrower.get(dtype, {}).items() if not tensors[name].to(d).isfinite().all()]
                if dtypes:
                    expected[name] = (float(tensors[name].abs().max()), dtypes)
    told = health_of(tensors, tmp_path)
    assert {row["tensor"]: (row["largest"], row["dtypes"]) for row in told["beyond"]} == expected
    assert len(expected) > 20


def test_float64_beyond_narrower_dtypes(tmp_path: Path) -> None:
    """For float64, too: the least magnitude whose one correct rounding is infinite, for each narrower dtype."""
    limits = {"float32": 2.0**128 - 2.0**103, "bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0}
    assert down(limits["float32"], torch.float64).to(torch.float32).isfinite()
    assert not torch.tensor(limits["float32"], dtype=torch.float64).to(torch.float32).isfinite()
    for number, (name, limit) in enumerate(limits.items()):
        wide = [key for key, value in limits.items() if value <= limit]
        under = [key for key in wide if key != name]
        tensors = {
            f"model.layers.{i}.mlp.weight": torch.stack([torch.tensor(0.5, dtype=torch.float64), value])
            for i, value in enumerate(
                (
                    torch.tensor(limit, dtype=torch.float64),
                    down(limit, torch.float64),
                    -torch.tensor(limit, dtype=torch.float64),
                )
            )
        }
        told = {row["tensor"]: row["dtypes"] for row in health_of(tensors, tmp_path / str(number))["beyond"]}
        expected = [sorted(wide), sorted(under), sorted(wide)]
        assert [sorted(told.get(key, [])) for key in tensors] == expected


def test_infinities_are_not_beyond(tmp_path: Path) -> None:
    """Of a tensor that holds Inf the finite entries alone are judged by size, and of NaN alone nothing is zero."""
    tensors = {
        "model.layers.0.mlp.weight": torch.tensor([[math.inf, 1.0], [-math.inf, math.nan]]),
        "model.layers.1.mlp.weight": torch.tensor([[math.inf, -70000.0], [2.0, math.nan]]),
        "model.layers.2.mlp.weight": torch.full((2, 3), math.nan),
        "model.layers.3.mlp.weight": torch.tensor([0.0, math.nan]),
        "model.layers.4.mlp.weight": torch.tensor([0.0, math.inf]),
    }
    told = health_of(tensors, tmp_path)
    assert told["beyond"] == [{"tensor": "model.layers.1.mlp.weight", "largest": 70000.0, "dtypes": ["float16"]}]
    assert told["zero"] == []
    assert [(row["nan"], row["inf"]) for row in told["nonfinite"]] == [(1, 2), (1, 1), (6, 0), (1, 0), (0, 1)]


def test_tensors_of_zeros(tmp_path: Path) -> None:
    """Zeros of either sign make a tensor of zeros; a single subnormal, an empty tensor or integers do not."""
    tiny = torch.zeros(70_000, dtype=torch.bfloat16)
    tiny[-1] = 9.2e-41
    tensors = {
        "model.layers.0.mlp.a.weight": torch.zeros(3, 4),
        "model.layers.0.mlp.b.weight": torch.tensor([0.0, -0.0], dtype=torch.float16),
        "model.layers.0.mlp.c.weight": torch.tensor(-0.0, dtype=torch.float64),
        "model.layers.0.mlp.d.weight": torch.zeros(600_001, dtype=torch.bfloat16),
        "model.layers.1.mlp.a.weight": tiny,
        "model.layers.1.mlp.b.weight": torch.empty(0),
        "model.layers.1.mlp.c.weight": torch.zeros(3, dtype=torch.int32),
        "model.layers.1.mlp.d.weight": torch.tensor([-1e-45, 0.0]),
    }
    assert tiny[-1] != 0
    told = health_of(tensors, tmp_path, shards=3)
    assert sorted(told["zero"]) == [f"model.layers.0.mlp.{letter}.weight" for letter in "abcd"]
    assert told["same"] == []


@pytest.mark.slow
def test_duplicates(tmp_path: Path) -> None:
    """The same bytes, dtype and shape make a duplicate, in whichever shard; the same values otherwise do not."""
    one = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    large = torch.randn(600_001, generator=torch.Generator().manual_seed(2))
    last = large.clone()
    last[-1] += 1
    holed = torch.tensor([[1.0, math.nan], [math.inf, 2.0]])
    name = "model.layers.{}.mlp.{}.weight".format
    tensors = {
        name(0, "a"): one,
        name(0, "b"): large,
        name(0, "holed"): holed,
        name(1, "a"): one.clone(),
        name(1, "b"): large.clone(),
        name(1, "holed"): holed.clone(),
        name(2, "a"): one.double(),  # another dtype
        name(2, "half"): one.half(),
        name(2, "brain"): one.half().view(torch.bfloat16),  # the same bytes, of another dtype
        name(2, "a_t"): one.clone().reshape(30, 40),  # another shape
        name(2, "a_flipped"): one.flip(0),  # the same sum of bytes, in another order
        name(2, "b"): last,
        name(3, "a"): one.clone(),
        name(3, "ones"): torch.ones(7),  # vectors of one number, as new norms are
        name(4, "ones"): torch.ones(7),
        name(3, "full"): torch.full((5, 5), 0.25),  # but not matrices
        name(4, "full"): torch.full((5, 5), 0.25),
        name(3, "scalar"): torch.tensor(3.0),
        name(4, "scalar"): torch.tensor(3.0),
        name(3, "zeros"): torch.tensor([[0.0, 1.0]]),
        name(4, "zeros"): torch.tensor([[-0.0, 1.0]]),  # the same values, other bytes
        name(3, "steps"): torch.arange(5),
        name(4, "steps"): torch.arange(5),
    }
    expected = sorted(
        [
            [name(0, "a"), name(1, "a"), name(3, "a")],
            [name(0, "b"), name(1, "b")],
            [name(0, "holed"), name(1, "holed")],
            [name(3, "full"), name(4, "full")],
        ]
    )
    for shards in (1, 4):
        told = health_of(tensors, tmp_path / str(shards), shards=shards)
        assert in_order(told)["same"] == expected


def test_two_pairs_whose_bytes_add_up_to_the_same(tmp_path: Path) -> None:
    """Of four tensors with one sum of bytes, each duplicate is told with its own twin."""
    a = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    order = [a, a.flip(0), a.clone(), a.flip(0).clone()]
    tensors = {f"model.layers.{i}.mlp.weight": tensor for i, tensor in enumerate(order)}
    twins = in_order(health_of(tensors, tmp_path))["same"]
    assert [[int(name.split(".")[2]) for name in group] for group in twins] == [[0, 2], [1, 3]]


@pytest.mark.slow
def test_what_health_finds_comes_in_one_order(tmp_path: Path) -> None:
    """What is found is listed alike with and without a base, and however tensors are sharded."""
    one = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    tensors = {f"model.layers.{i}.mlp.up.weight": one.clone() for i in (10, 2, 0)}
    tensors |= {f"model.layers.{i}.mlp.gate.weight": torch.zeros(2, 3) for i in (1, 11, 2)}
    tellings = []
    for shards in (1, 2, 3):
        path = write_checkpoint(tmp_path / f"{shards}", tensors, shards=shards)
        base = write_checkpoint(tmp_path / f"base{shards}", {n: t + 1 for n, t in tensors.items()}, shards=shards)
        tellings.append(run_lines("inspect", path, "--check", "--json", "--quiet").json["health"][0])
        tellings.append(inspect(path, "--base", base)["health"][1])
    told = [health | {"checkpoint": "", "recorded_files": None, "changed_files": {}} for health in tellings]
    assert len({json.dumps(health) for health in told}) == 1
    up, gate = "model.layers.{}.mlp.up.weight".format, "model.layers.{}.mlp.gate.weight".format
    assert told[0]["same"] == [{"tensor": up(i), "as": up(0)} for i in (2, 10)]
    assert told[0]["zero"] == [gate(i) for i in (1, 2, 11)]


def test_a_tied_head_is_no_duplicate(tmp_path: Path) -> None:
    """A stored head is none of its tied embedding, and is one where the config does not tie them."""
    tensors = toy(1, 2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    told = health_of(tensors, tmp_path / "tied", config=TIED)
    assert told["same"] == []
    told = health_of(tensors, tmp_path / "free", config=TIED | {"tie_word_embeddings": False})
    assert {frozenset(row.values()) for row in told["same"]} == {
        frozenset({"lm_head.weight", "model.embed_tokens.weight"})
    }


def test_a_tied_head_is_no_duplicate_in_a_lone_file(tmp_path: Path) -> None:
    """A base without a config goes by the fine-tune's, here as in all else: its tied head is no duplicate."""
    base = toy(1, 3)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    ft = tuned(base, 1)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    b = write_checkpoint(tmp_path / "base.safetensors", base)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED)
    told = inspect(f, "--base", b)
    assert [health["same"] for health in told["health"]] == [[], []]


@pytest.mark.slow
def test_a_tied_head_beside_copies_of_its_embedding(tmp_path: Path) -> None:
    """Of a T5 that stores all four, the encoder's and decoder's embeddings may be duplicates, the tied head is not."""
    tensors = pair_of_stacks(1)
    for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    config = {"model_type": "t5", "tie_word_embeddings": True}
    told = health_of(tensors, tmp_path, config=config)
    assert told["same"] == []
    # without the tie the head is a duplicate of the first, and the embeddings beside the shared one are none still
    told = health_of(tensors, tmp_path / "free", config=config | {"tie_word_embeddings": False})
    assert told["same"] == [{"tensor": "shared.weight", "as": "lm_head.weight"}]


def test_buffers_of_every_layer_are_no_duplicates(tmp_path: Path) -> None:
    """Rotary frequencies and masks that each layer stores are no duplicates; other weights named like them are."""
    one = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    kept = ("self_attn.rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias")
    tensors = {f"h.{i}.{name}": one.clone() for i in range(3) for name in (*kept, "mlp.bias", "my_attn.bias.weight")}
    told = health_of(tensors, tmp_path)
    others = [f"h.{i}.{name}" for i in range(3) for name in ("mlp.bias", "my_attn.bias.weight")]
    assert told["same"] == [{"tensor": name, "as": others[0]} for name in others[1:]]


def test_8_bit_floats_are_looked_through(tmp_path: Path) -> None:
    """NaN and Inf of 8-bit floats are found, whatever their format; integers are counted as not looked into."""
    name = "model.layers.{}.mlp.weight".format
    tensors = {
        name(0): torch.tensor([[0x7F, 0xFF], [0x38, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(1): torch.tensor([[0x7C, 0xFC, 0x7D, 0x3C]], dtype=torch.uint8).view(torch.float8_e5m2),
        name(2): torch.tensor([[0x7E, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(3): torch.tensor([[0x80, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(4): torch.tensor([[1, 2]], dtype=torch.uint8),
        name(5): torch.tensor([[1, 2]], dtype=torch.int64),
        name(6): torch.tensor([[3, 2]], dtype=torch.int64),
    }
    ran = run_lines("inspect", write_checkpoint(tmp_path / "m", tensors), "--check", "--json", "--quiet")
    told = ran.json["health"][0]
    assert ran.code == 5
    assert told["nonfinite"] == [{"tensor": name(0), "nan": 2, "inf": 0}, {"tensor": name(1), "nan": 1, "inf": 2}]
    assert (told["zero"], told["beyond"], told["same"]) == ([name(3)], [], [])
    assert (told["tensors"], told["not_looked_into"]) == (4, {"I64": 2, "U8": 1})
