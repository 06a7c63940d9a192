"""What is refused has a way out, and the message says which: tensors of other shapes and kinds, strangers' files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import run_lines, write_checkpoint
from safetensors.torch import load_file

VIT = {"model_type": "vit", "num_hidden_layers": 4}
BLOCK = "vit.encoder.layer.1.output.dense.weight"


def vit(seed: int, classes: int = 10, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """A vision transformer of four blocks of width 4, with a classifier of so many classes."""
    g = torch.Generator().manual_seed(seed)
    model = {"vit.embeddings.cls_token": torch.randn(1, 1, 4, generator=g)}
    model |= {"classifier.weight": torch.randn(classes, 4, generator=g), "classifier.bias": torch.randn(classes)}
    for i in range(4):
        model[f"vit.encoder.layer.{i}.output.dense.weight"] = torch.randn(4, 4, generator=g)
    return model | more


def write_pair(tmp: Path, base: dict[str, torch.Tensor], ft: dict[str, torch.Tensor]) -> tuple[Path, Path]:
    """Two folders."""
    return (
        write_checkpoint(tmp / "base", base, config=VIT),
        write_checkpoint(tmp / "ft", ft, config=VIT),
    )


def merge_file(tmp: Path, text: str) -> Path:
    """A recipe beside the checkpoints."""
    (tmp / "m.yaml").write_text(text)
    return tmp / "m.yaml"


# --- a tensor of another shape or kind ---


@pytest.mark.parametrize(
    ("flags", "whose"),
    [
        (("--filter", "classifier=keep"), "ft"),
        (("--filter", "classifier=1"), "ft"),
        (("--missing", "ft"), "ft"),
        (("--missing", "copy"), "ft"),
        (("--outside", "keep"), "ft"),
        (("--outside", "position"), "ft"),
        (("--filter", "classifier=base"), "base"),
        (("--filter", "classifier=0"), "base"),
        (("--outside", "base"), "base"),
    ],
)
def test_a_replaced_classifier(flags: tuple[str, ...], whose: str, tmp_path: Path) -> None:
    """One side's head as it is, the blocks by the formula, and a note that says so."""
    sides = {"base": vit(0, 1000), "ft": vit(50, 10)}
    ran = run_lines("edit", *write_pair(tmp_path, **sides), "-o", tmp_path / "out", *flags, "--json")
    assert ran.code == 0, ran.err
    out = load_file(tmp_path / "out/model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        assert torch.equal(out[name], sides[whose][name])
    expected = sides["base"][BLOCK] + 0.4 * (sides["ft"][BLOCK] - sides["base"][BLOCK])
    assert torch.allclose(out[BLOCK], expected, atol=1e-6)
    said = next(note for note in ran.json["notes"] if "differ in shape or kind" in note)
    assert "classifier.weight: [1000, 4] and [10, 4]" in said
    assert ("does it fit?" in said) is (whose == "base")
    assert run_lines("verify", tmp_path / "out").code == 0


def test_the_refusal_names_the_ways_out(tmp_path: Path) -> None:
    """What it offers works as it stands, and matches no tensor that fits."""
    folders = write_pair(tmp_path, vit(0, 1000), vit(1))
    ran = run_lines("edit", *folders, "-o", tmp_path / "out")
    assert (ran.code, "another model" in ran.err) == (4, False)
    assert "--filter classifier=keep" in ran.err
    assert "--filter classifier=base" in ran.err
    assert "--missing ft" in ran.err
    # A module whose name is part of others' is not offered, but its tensor is.
    odd = {"vit.weight": torch.ones(3)}, {"vit.weight": torch.ones(2)}
    ran = run_lines("edit", *write_pair(tmp_path, vit(0) | odd[0], vit(1) | odd[1]), "-o", tmp_path / "out")
    assert "--filter vit.weight=keep" in ran.err


def test_another_shape_within_a_block(tmp_path: Path) -> None:
    """--missing ft does not reach into blocks, a filter and a layer's coefficient of 1 do."""
    name = "vit.encoder.layer.3.output.dense.weight"
    base, ft = vit(0), vit(1) | {name: torch.ones(5, 4)}
    folders = write_pair(tmp_path, base, ft)
    other = "vit.encoder.layer.2.output.dense.weight"
    assert run_lines("edit", *folders, "-o", tmp_path / "last").code == 0  # alpha + beta is 1
    assert torch.equal(load_file(tmp_path / "last/model.safetensors")[name], ft[name])
    folders = write_pair(tmp_path, base, vit(1) | {other: torch.ones(5, 4)})
    ran = run_lines("edit", *folders, "-o", tmp_path / "out", "--missing", "ft")
    assert ran.code == 4
    assert "--filter vit.encoder.layer.2.output.dense=keep" in ran.err
    assert "--missing ft" not in ran.err
    way = ("--filter", "vit.encoder.layer.2.output.dense=keep")
    assert run_lines("edit", *folders, "-o", tmp_path / "out", *way).code == 0


def test_most_tensors_of_other_shapes(tmp_path: Path) -> None:
    """Then the question is whether it is one model at all."""
    wider = {name: torch.cat([tensor, tensor]) for name, tensor in vit(1).items()}
    ran = run_lines("edit", *write_pair(tmp_path, vit(0), wider), "-o", tmp_path / "out")
    assert (ran.code, "of one model?" in ran.err) == (4, True)


@pytest.mark.parametrize("rule", ["keep", "base"])
def test_whole_numbers_against_floats(rule: str, tmp_path: Path) -> None:
    """A counter that one side stores as float16 is either side's, in that side's dtype."""
    ids = torch.arange(5).reshape(1, 5)
    base, ft = vit(0) | {"vit.position_ids": ids}, vit(1) | {"vit.position_ids": ids.half() * 0.999}
    folders = write_pair(tmp_path, base, ft)
    assert run_lines("edit", *folders, "-o", tmp_path / "no").code == 4
    assert run_lines("edit", *folders, "-o", tmp_path / "out", "--filter", f"position_ids={rule}").code == 0
    got = load_file(tmp_path / "out/model.safetensors")["vit.position_ids"]
    expected = (ft if rule == "keep" else base)["vit.position_ids"]
    assert (got.dtype, torch.equal(got, expected)) == (expected.dtype, True)


@pytest.mark.parametrize(
    ("said", "whose"),
    [
        ("missing: ft", "a"),
        ("missing: copy", "base"),
        ("lines: {alpha: 0.5, beta: 0.5, filter: {classifier: base}}", "base"),
        ("parameters: {weight: [{filter: classifier, value: 0}, {value: 1}]}", "base"),
    ],
)
def test_a_merge_with_a_replaced_classifier(said: str, whose: str, tmp_path: Path) -> None:
    """The same in a recipe's words."""
    sides = {"base": vit(0, 1000), "a": vit(1, 10), "b": vit(2, 7)}
    for name, model in sides.items():
        write_checkpoint(tmp_path / name, model, config=VIT)
    recipe = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: a}, {model: b}]\n"
    refused = run_lines("merge", "--config", merge_file(tmp_path, recipe), "-o", tmp_path / "out")
    assert (refused.code, "missing: ft" in refused.err, "value: 0" in refused.err) == (4, True, True)
    ran = run_lines("merge", "--config", merge_file(tmp_path, recipe + said + "\n"), "-o", tmp_path / "out")
    assert ran.code == 0, ran.err
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["classifier.weight"], sides[whose]["classifier.weight"])


def test_one_model_has_all_the_weight_of_a_head(tmp_path: Path) -> None:
    """Without a base, a filter of 0 for the other model keeps this one's head, whatever its shape."""
    sides = {"a": vit(1, 10), "b": vit(2, 7)}
    for name, model in sides.items():
        write_checkpoint(tmp_path / name, model, config=VIT)
    weight = "[{filter: classifier, value: 0}, {value: 1}]"
    models = f"models:\n- {{model: a, parameters: {{weight: {weight}}}}}\n- {{model: b, parameters: {{weight: 1}}}}\n"
    ran = run_lines(
        "merge", "--config", merge_file(tmp_path, f"merge_method: linear\n{models}"), "-o", tmp_path / "out"
    )
    assert ran.code == 0, ran.err
    got = load_file(tmp_path / "out/model.safetensors")
    assert torch.equal(got["classifier.weight"], sides["b"]["classifier.weight"])
    assert torch.allclose(got[BLOCK], (sides["a"][BLOCK] + sides["b"][BLOCK]) / 2, atol=1e-6)


def test_empty_weights(tmp_path: Path) -> None:
    """Placeholders of size 0 are called empty, and no option passes them off as a fine-tune's."""
    ft = {name: torch.zeros(0) if "dense" in name else tensor for name, tensor in vit(1).items()}
    for flags in ((), ("--missing", "ft"), ("--outside", "keep")):
        ran = run_lines("edit", *write_pair(tmp_path, vit(0), ft), "-o", tmp_path / "out", *flags)
        assert (ran.code, "4 of 7 tensors" in ran.err, "empty" in ran.err, "ZeRO" in ran.err) == (4, True, True, True)
