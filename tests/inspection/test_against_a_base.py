"""`lines inspect --base`: what changed, one fine-tune or several; what cannot be compared."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from support.files import write_checkpoint
from support.inspecting import llama, named, ok, refused, rows_of, told, tuned


def flat(model: Mapping[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([model[name].double().flatten() for name in names])


def test_an_update_against_a_reference(tmp_path: Path) -> None:
    """Norms, shares and thirds of one update, whole, by layer and by kind, are those of plain torch in float64."""
    model = llama(7)
    ft = tuned(model, 1)
    base = write_checkpoint(tmp_path / "base", model, shards=2)
    report = told(write_checkpoint(tmp_path / "ft", ft, shards=3), "--base", base, "--filter", "mlp=0.5", "--tensors")
    (tune,) = report["fine_tunes"]
    scale = {row["name"]: row["coefficient"] for row in report["map"]}

    def check(row: Mapping[str, Any], names: list[str]) -> None:
        tau = flat(ft, names) - flat(model, names)
        scaled = torch.cat([scale[n] * (ft[n].double() - model[n].double()).flatten() for n in names])
        whole = flat(model, names).norm()
        expected = (tau.norm(), tau.norm() / whole, (tau == 0).double().mean(), tau.abs().max(), scaled.norm())
        keys = ("update_norm", "relative_norm", "unchanged", "largest", "scaled_norm")
        assert [row[key] for key in keys] == pytest.approx([float(e) for e in expected], rel=1e-12)
        assert row["scaled_relative_norm"] == pytest.approx(float(scaled.norm() / whole), rel=1e-12)

    check(tune, list(model))
    for layers in (tune["layers"], report["layers"]):
        for row in layers:
            check(row, [name for name in model if f"layers.{row['index']}." in name])
    kinds = {"attention": "self_attn", "mlp": "mlp", "norm": "norm", "embedding": "embed", "head": "lm_head"}
    for row in tune["kinds"]:
        check(row, [name for name in model if kinds[row["kind"]] in name])
    for row in report["map"]:
        check(row, [row["name"]])
    check(tune["outside"]["after"], ["model.norm.weight", "lm_head.weight"])
    squares = [row["update_norm"] ** 2 for row in tune["layers"]]
    assert tune["first_third"] == pytest.approx(sum(squares[:2]) / sum(squares))  # (l - 1/2) / 7 < 1/3: l = 1, 2
    assert tune["last_third"] == pytest.approx(sum(squares[-2:]) / sum(squares))
    scaled = [row["scaled_norm"] ** 2 for row in tune["layers"]]
    assert tune["scaled_last_third"] == pytest.approx(sum(scaled[-2:]) / sum(scaled))
    assert report["bytes_read"] == 2 * report["bytes"]


def test_several_against_a_reference(tmp_path: Path) -> None:
    """Cosines, opposed and disagreeing signs, norms of sums and alpha of three updates are those of plain torch."""
    model = llama()
    tunes = [tuned(model, at + 1, by=0.01 * (at + 1)) for at in range(3)]
    base = write_checkpoint(tmp_path / "base", model)
    paths = [write_checkpoint(tmp_path / f"ft{at}", ft) for at, ft in enumerate(tunes)]
    together = told(*paths, "--base", base)["together"]

    def check(row: Mapping[str, Any], names: list[str]) -> None:
        taus = torch.stack([flat(ft, names) - flat(model, names) for ft in tunes])
        for a, b in combinations(range(3), 2):
            cosine = float(taus[a] @ taus[b] / (taus[a].norm() * taus[b].norm()))
            assert row["cosine"][a][b] == row["cosine"][b][a] == pytest.approx(cosine, abs=1e-12)
            opposed = float((taus[a].sign() * taus[b].sign() < 0).double().mean())
            assert row["opposed"][a][b] == row["opposed"][b][a] == pytest.approx(opposed)
        disagree = ((taus > 0).any(0) & (taus < 0).any(0)).double().mean()
        assert row["disagreement"] == pytest.approx(float(disagree))
        assert row["norm_of_sum"] == pytest.approx(float(taus.sum(0).norm()))
        assert row["sum_of_norms"] == pytest.approx(float(taus.norm(dim=1).sum()))

    check(together, list(model))
    for row in together["layers"]:
        check(row, [name for name in model if f"layers.{row['index']}." in name])
    total = (sum(flat(ft, list(model)) for ft in tunes) - 3 * flat(model, list(model))).abs().sum()
    assert together["auto"]["sum"] == pytest.approx(float(total), rel=1e-9)
    assert together["auto"]["alpha"] == pytest.approx(1 / 3)


def test_a_fine_tune_that_is_the_base(tmp_path: Path) -> None:
    """Where nothing changed norms are 0, all is unchanged, and what is a share of nothing is null."""
    path = write_checkpoint(tmp_path / "a", llama())
    copy = write_checkpoint(tmp_path / "b", llama())
    (tune,) = told(copy, "--base", path)["fine_tunes"]
    keys = ("update_norm", "relative_norm", "unchanged", "largest", "largest_in", "first_third")
    assert [tune[key] for key in keys] == [0, 0, 1, 0, None, None]
    several = told(copy, write_checkpoint(tmp_path / "c", llama()), "--base", path)["together"]
    assert several["auto"]["alpha"] is None
    assert several["cosine"][0][1] is None
    assert several["scaled_norm_of_sum"] == several["norm_of_sum"] == 0
    assert re.search(r"^auto +unknown$", ok(copy, tmp_path / "c", "--base", path).out, re.MULTILINE)


def test_one_checkpoint_twice(tmp_path: Path) -> None:
    """A fine-tune named twice, or the base among the fine-tunes, is refused before anything is compared."""
    model = llama()
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    for given in ([ft, ft], [base], [ft, base], [base, ft]):
        refused(2, *given, "--base", base, words=("are one checkpoint", "hint: "))


@pytest.mark.parametrize("spelt", ["./m", "m/", "x/../m", "link"])
def test_one_checkpoint_by_another_way(spelt: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However its path is spelt, no checkpoint is compared with itself."""
    monkeypatch.chdir(tmp_path)
    write_checkpoint(tmp_path / "m", llama())
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("m")
    refused(2, spelt, "--base", "m", words=("one checkpoint",))
    write_checkpoint(tmp_path / "base", llama(seed=1))
    refused(2, "m", spelt, "--base", "base", words=("one checkpoint",))
    (tmp_path / "r.yaml").write_text(f"base_model: m\nmodels: [{{model: {spelt}}}]\nlines: {{alpha: 0, beta: 1}}\n")
    refused(2, "--config", "r.yaml")


@pytest.mark.slow
def test_strangers(tmp_path: Path) -> None:
    """Checkpoints without a tensor in common do not fit together, and no weight is read."""
    a = write_checkpoint(tmp_path / "a", llama())
    b = write_checkpoint(tmp_path / "b", named(*(f"transformer.h.{i}.c" for i in range(3))))
    refused(4, b, "--base", a, words=(str(a), str(b), "no tensor in common"))
    c = write_checkpoint(tmp_path / "c", llama())
    refused(4, c, b, "--base", a, words=("no tensor in common",))


@pytest.mark.slow
def test_another_architecture(tmp_path: Path) -> None:
    """Of a fine-tune whose shapes and names differ what fits is compared, and the rest is named."""
    model = llama(3)
    other = llama(4) | {"model.layers.1.mlp.up_proj.weight": torch.ones(9, 9), "extra.bias": torch.ones(3)}
    del other["model.layers.2.self_attn.q_proj.weight"]
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", other)
    report = told(ft, "--base", base)
    why = {entry["tensor"]: entry["why"] for entry in report["not_compared"]}
    own = {"extra.bias", "model.layers.2.self_attn.q_proj.weight", "model.layers.1.mlp.up_proj.weight"}
    assert why.keys() == own | {name for name in other if "layers.3" in name}
    assert "[6, 4] and [9, 9]" in why["model.layers.1.mlp.up_proj.weight"]
    assert "extra.bias" in ok(ft, "--base", base, "--full").out
    (tune,) = report["fine_tunes"]
    assert tune["compared"]["tensors"] == len(model) - 2
    assert [layer["update_norm"] for layer in tune["layers"]][3] is None
    assert report["tensors"] == len(other)
    assert "-" in rows_of(ok(ft, "--base", base).out, "model.layers")[3]


def test_vocabularies_of_different_sizes(tmp_path: Path) -> None:
    """Over the rows that both have embeddings are compared, and a note says so."""
    model = llama()
    grown = dict(model) | {
        name: torch.cat([model[name] + 1, torch.ones(3, 4)]) for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", grown)
    report = told(ft, "--base", base, "--tensors")
    rows = {row["name"]: row for row in report["map"]}
    assert rows["lm_head.weight"]["update_norm"] == pytest.approx(math.sqrt(40), rel=1e-6)
    assert any("lm_head.weight" in note and "13" in note for note in report["notes"])
    assert report["fine_tunes"][0]["compared"]["left_out"] == 0


def test_prefixes_and_ties(tmp_path: Path) -> None:
    """Names are paired through a prefix and through a tied head."""
    model = llama()
    bare = {name.removeprefix("model."): value for name, value in model.items() if name != "lm_head.weight"}
    base = write_checkpoint(tmp_path / "base", bare, config={"tie_word_embeddings": True})
    ft = write_checkpoint(tmp_path / "ft", model, config={"tie_word_embeddings": False})
    report = told(ft, "--base", base)
    assert report["fine_tunes"][0]["compared"]["tensors"] == len(model)
    assert any("model." in note for note in report["notes"])


def test_cuda_that_is_not_there(tmp_path: Path) -> None:
    """A device that is not there is refused by name, as an impossible option."""
    if torch.cuda.is_available():
        pytest.skip("there is one")
    path = write_checkpoint(tmp_path / "m", llama())
    refused(2, path, "--check", "--device", "cuda", words=("cuda",))


@pytest.mark.slow
def test_workers_make_no_difference(tmp_path: Path) -> None:
    """The same numbers, to the bit, whatever the number of workers."""
    model = {f"layers.{i}.w": torch.randn(300, 700) for i in range(3)}
    base, ft = write_checkpoint(tmp_path / "base", model), write_checkpoint(tmp_path / "ft", tuned(model, 1))
    other = write_checkpoint(tmp_path / "other", tuned(model, 2))
    found = [told(ft, other, "--base", base, "--workers", n) for n in (1, 2, 7)]
    for report in found:
        del report["seconds"]
    assert found[0] == found[1] == found[2]


def test_quiet(tmp_path: Path) -> None:
    """--quiet leaves what was asked for; there is no other output to leave out."""
    path = write_checkpoint(tmp_path / "m", llama())
    assert ok(path, "--quiet").out == ok(path).out
