"""`lines inspect --check`: what it finds in weights, and what it does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from support.files import write_checkpoint
from support.inspecting import llama, ok, refused, told
from support.run import run_lines

NAN, INF = float("nan"), float("inf")


def sound() -> dict[str, torch.Tensor]:
    """Four layers without anything to find."""
    return {name: value + 0.0 for name, value in llama().items()}


Q0, Q1, UP0 = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.0.mlp.up_proj.weight",
)


def with_entry(name: str, value: float, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    model = sound()
    model[name] = model[name].to(dtype)
    model[name].view(-1)[5] = value
    return model


FINDINGS: dict[str, tuple[dict[str, torch.Tensor], str, Any]] = {
    "NaN": (with_entry(Q0, NAN), "nonfinite", [{"tensor": Q0, "nan": 1, "inf": 0}]),
    "Inf": (with_entry(Q0, -INF), "nonfinite", [{"tensor": Q0, "nan": 0, "inf": 1}]),
    "half Inf": (with_entry(Q0, INF, torch.half), "nonfinite", [{"tensor": Q0, "nan": 0, "inf": 1}]),
    "beyond half": (with_entry(Q0, 65520.0), "beyond", [{"tensor": Q0, "largest": 65520.0, "dtypes": ["float16"]}]),
    "beyond bfloat16": (
        with_entry(Q0, -3.4e38),
        "beyond",
        [{"tensor": Q0, "largest": float(torch.tensor(3.4e38)), "dtypes": ["bfloat16", "float16"]}],
    ),
    "beyond float32": (
        with_entry(Q0, 1e300, torch.float64),
        "beyond",
        [{"tensor": Q0, "largest": 1e300, "dtypes": ["float32", "bfloat16", "float16"]}],
    ),
    "bfloat16 beyond half": (
        with_entry(Q0, 65536.0, torch.bfloat16),
        "beyond",
        [{"tensor": Q0, "largest": 65536.0, "dtypes": ["float16"]}],
    ),
    "zeros": (sound() | {UP0: torch.zeros(6, 4)}, "zero", [UP0]),
    "negative zeros": (sound() | {UP0: -torch.zeros(6, 4)}, "zero", [UP0]),
    "a duplicate": (sound() | {Q1: sound()[Q0]}, "same", [{"tensor": Q1, "as": Q0}]),
    "a constant matrix twice": (
        sound() | {Q1: torch.ones(4, 4), Q0: torch.ones(4, 4)},
        "same",
        [{"tensor": Q1, "as": Q0}],
    ),
}


@pytest.mark.parametrize("what", FINDINGS)
@pytest.mark.parametrize("shards", [1, 3])
def test_a_check_that_finds_something(what: str, shards: int, tmp_path: Path) -> None:
    """--check tells each kind of finding in the JSON and in the table, then ends with exit code 5 and a summary."""
    model, key, expected = FINDINGS[what]
    path = write_checkpoint(tmp_path / "m", model, shards=shards)
    ran = run_lines("inspect", path, "--check", "--json")
    assert (ran.code, ran.trace) == (5, "")
    (health,) = ran.json["health"]
    assert (health["tensors"], health["checkpoint"]) == (len(model), str(path))
    if key == "same":
        assert [{found["tensor"], found["as"]} for found in health["same"]] == [{Q0, Q1}]
    else:
        assert health[key] == expected
    assert not any(health[other] for other in {"nonfinite", "beyond", "zero", "same"} - {key})
    assert ran.err.startswith("error: ")
    assert str(path) in ran.err
    table = run_lines("inspect", path, "--check")
    assert (table.code, table.err) == (5, ran.err)
    assert "nothing wrong" not in table.out
    assert "nothing wrong" in table.out or (expected[0] if key == "zero" else expected[0]["tensor"]) in table.out


NOTHING: dict[str, dict[str, torch.Tensor]] = {
    "a sound model": sound(),
    "the largest that half holds": with_entry(Q0, 65519.0),
    "new norms": sound() | {f"model.layers.{i}.input_layernorm.weight": torch.ones(4) for i in range(4)},
    "integers": sound() | {"model.steps": torch.zeros(3, dtype=torch.int64), "model.more": torch.zeros(3).long()},
    "same values, other shape": sound() | {Q1: sound()[Q0].reshape(2, 8)},
    "same values, other dtype": sound() | {Q1: sound()[Q0].half().float(), Q0: sound()[Q0].half()},
    "a permutation": sound() | {Q1: sound()[Q0].flip(0)},
}


@pytest.mark.parametrize("what", NOTHING)
def test_a_check_that_finds_nothing(what: str, tmp_path: Path) -> None:
    """--check of a sound checkpoint says so and ends with 0."""
    path = write_checkpoint(tmp_path / "m", NOTHING[what])
    (health,) = told(path, "--check")["health"]
    assert not any(health[key] for key in ("nonfinite", "beyond", "zero", "same", "changed_files"))
    assert "nothing wrong" in ok(path, "--check").out


def test_a_stored_tie_is_no_duplicate(tmp_path: Path) -> None:
    """A head stored beside the embedding it is tied to is no finding; without the tie it is."""
    model = llama()
    model["lm_head.weight"] = model["model.embed_tokens.weight"].clone()
    ok(write_checkpoint(tmp_path / "tied", model, config={"tie_word_embeddings": True}), "--check")
    loose = write_checkpoint(tmp_path / "loose", model, config={"tie_word_embeddings": False})
    assert run_lines("inspect", loose, "--check").code == 5


@pytest.mark.slow
def test_health_with_a_base(tmp_path: Path) -> None:
    """With --base the health of every checkpoint is told, the base first, and only --check makes it an error."""
    model = llama()
    bad = {name: value.clone() for name, value in model.items()}
    bad[Q0].view(-1)[0] = NAN
    bad[Q0].view(-1)[1] = INF
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", bad)
    report = told(ft, "--base", base)
    assert [health["checkpoint"] for health in report["health"]] == [str(base), str(ft)]
    assert report["health"][1]["nonfinite"] == [{"tensor": Q0, "nan": 1, "inf": 1}]
    (tune,) = report["fine_tunes"]
    assert tune["compared"]["left_out"] == 2
    assert tune["compared"]["parameters"] == sum(v.numel() for v in model.values()) - 2
    assert tune["update_norm"] == 0
    assert "2 entries that are not finite left out" in ok(ft, "--base", base).out
    ran = run_lines("inspect", ft, "--base", base, "--check", "--json")
    assert ran.code == 5
    assert ran.json["fine_tunes"] == report["fine_tunes"]
    assert str(ft) in ran.err
    assert str(base) not in ran.err.replace(str(ft), "")


def test_many_findings_are_folded(tmp_path: Path) -> None:
    """Of many findings some are shown, with how many more there are; all with --full, and in the JSON."""
    path = write_checkpoint(tmp_path / "m", {f"layers.{i}.w": torch.zeros(3) for i in range(30)})
    out = run_lines("inspect", path, "--check").out
    assert "22 more (--full)" in out
    assert run_lines("inspect", path, "--check", "--full").out.count(".w") == 30
    assert len(run_lines("inspect", path, "--check", "--json").json["health"][0]["zero"]) == 30


def test_float64_at_its_limit(tmp_path: Path) -> None:
    """Norms beyond float64 are null, not a traceback and not Infinity."""
    model = {f"layers.{i}.w": torch.full((4,), 1e200 * (i + 1), dtype=torch.float64) for i in range(3)}
    base = write_checkpoint(tmp_path / "base", model)
    fts = [
        write_checkpoint(tmp_path / f"ft{at}", {name: value * -(at + 2.0) for name, value in model.items()})
        for at in range(2)
    ]
    assert told(fts[0], "--base", base)["fine_tunes"][0]["update_norm"] is None
    assert told(*fts, "--base", base)["together"]["norm_of_sum"] is None
    ok(*fts, "--base", base)


def test_nothing_to_compare(tmp_path: Path) -> None:
    """Where the only tensors in common hold whole numbers, or have other shapes, there is nothing to compare."""
    whole, other = torch.arange(3), torch.ones(2, 3)
    for at, values in enumerate([(whole, whole, whole), (other, other.T.contiguous(), torch.ones(3, 3))]):
        base, *fts = (
            write_checkpoint(tmp_path / f"{at}{name}", {f"layers.{i}.w": value.clone() for i in range(2)})
            for name, value in zip("abc", values, strict=True)
        )
        refused(4, fts[0], "--base", base, words=("nothing can be compared", str(base), str(fts[0])))
        refused(4, *fts, "--base", base, words=("nothing can be compared",))


def test_nothing_in_what_is_compared(tmp_path: Path) -> None:
    """Tensors without entries are compared, which tells nothing, and nothing fails."""
    path, copy, third = (
        write_checkpoint(tmp_path / name, {f"layers.{i}.w": torch.zeros(0) for i in range(2)}) for name in "abc"
    )
    (tune,) = told(copy, "--base", path)["fine_tunes"]
    assert (tune["update_norm"], tune["scaled_norm"], tune["compared"]["parameters"]) == (None, None, 0)
    ok(copy, "--base", path)
    together = told(copy, third, "--base", path)["together"]
    assert (together["cosine"][0][1], together["norm_of_sum"], together["disagreement"]) == (None, None, None)
    ok(copy, third, "--base", path)
