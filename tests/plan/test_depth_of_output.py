"""Models of different depth: an output is scaled over the layers that it has, and what has no partner is counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import LinesError
from support.files import write_checkpoint
from support.run import Ran, run_lines

PER_LAYER = 3
Tensors = dict[str, torch.Tensor]


def stack(begin: str, layers: int, value: float) -> Tensors:
    parts = ("input_layernorm", "mlp.up_proj", "self_attn.q_proj")
    return {f"{begin}.{i}.{part}.weight": torch.full((2,), value) for i in range(layers) for part in parts}


def model(layers: int, value: float, begin: str = "model.layers") -> Tensors:
    """`layers` layers and what stands around them; every entry has one value, so that an edit shows coefficients."""
    outside = {name: torch.full((2,), value) for name in ("model.embed_tokens.weight", "model.norm.weight")}
    return outside | stack(begin, layers, value)


def config(layers: int | None) -> dict[str, Any]:
    return {} if layers is None else {"model_type": "llama", "num_hidden_layers": layers}


def linear(layers: int, begin: str = "model.layers") -> dict[str, float]:
    """0 to 1 over so many layers, by the paper's formula."""
    return {name: (int(name.split(".")[2]) / (layers - 1)) for name in stack(begin, layers, 0.0)}


class Pair:
    """A base of zeros and a fine-tune of ones, each with a config or none."""

    def __init__(
        self, folder: Path, base: Tensors, ft: Tensors, base_config: Any = None, ft_config: Any = None
    ) -> None:
        self.out = folder / "out"
        self.base = write_checkpoint(folder / "base", base, config=base_config or {})
        self.ft = write_checkpoint(folder / "ft", ft, config=ft_config or {})

    def edit(self, *flags: object) -> Ran:
        scaled = ("--alpha", 0, "--beta", 1, "--device", "cpu", "--json")
        return run_lines("edit", self.base, self.ft, "-o", self.out, *scaled, *flags)

    def coefficients(self) -> dict[str, float]:
        """What the output holds at the names of its layers."""
        held = load_file(self.out / "model.safetensors")
        return {name: tensor[0].item() for name, tensor in held.items() if ".layers." in name}

    def inspect(self) -> dict[str, Any]:
        told: dict[str, Any] = run_lines(
            "inspect", self.ft, "--base", self.base, "--alpha", 0, "--beta", 1, "--tensors", "--json"
        ).json
        return told


CONFIGS = [(None, None), (6, 4), (6, None), (None, 4), (6, 6)]


@pytest.mark.parametrize("configs", CONFIGS, ids=str)
@pytest.mark.parametrize("missing", ["ft", "skip"])
def test_a_base_that_is_deeper(missing: str, configs: tuple[int | None, int | None], tmp_path: Path) -> None:
    """The output has the fine-tune's four layers, whatever the configs say; the base's other two have to be counted."""
    pair = Pair(tmp_path, model(6, 0.0), model(4, 1.0), *map(config, configs))
    refused = pair.edit("--missing", missing)
    assert refused.code == 4
    assert f"--missing-in-blocks {2 * PER_LAYER}" in refused.err
    ran = pair.edit("--missing", missing, "--missing-in-blocks", 2 * PER_LAYER)
    assert ran.code == 0, ran.err
    assert [found["layers"] for found in ran.json["stacks"]] == [4]
    assert pair.coefficients() == pytest.approx(linear(4))
    assert run_lines("verify", pair.out).code == 0
    told = pair.inspect()
    assert [found["layers"] for found in told["stacks"]] == [4]
    assert told["merge"]["missing_in_blocks"] == 2 * PER_LAYER
    assert {row["name"]: row["coefficient"] for row in told["map"] if row["stack"]} == pytest.approx(linear(4))


@pytest.mark.parametrize("configs", [(None, None), (4, 6), (None, 6), (4, None)], ids=str)
@pytest.mark.parametrize(("missing", "layers"), [("ft", 6), ("copy", 6), ("skip", 4)])
def test_a_fine_tune_that_is_deeper(
    missing: str, layers: int, configs: tuple[int | None, int | None], tmp_path: Path
) -> None:
    """Its two more layers are kept, and counted; left out they are not, though its config still counts them."""
    pair = Pair(tmp_path, model(4, 0.0), model(6, 1.0), *map(config, configs))
    assert f"--missing-in-blocks {2 * PER_LAYER}" in pair.edit("--missing", missing).err
    ran = pair.edit("--missing", missing, "--missing-in-blocks", 2 * PER_LAYER)
    assert ran.code == 0, ran.err
    notes = "\n".join(ran.json["notes"])
    if configs == (4, None) and layers == 6:  # the only config there is counts four
        assert "num_hidden_layers is 4, so the layers from 4 on are outside" in notes
        layers = 4
    assert [found["layers"] for found in ran.json["stacks"]] == [layers]
    expected = {n: c for n, c in linear(layers).items() if int(n.split(".")[2]) < 4}
    assert {n: c for n, c in pair.coefficients().items() if n in expected} == pytest.approx(expected)
    if missing == "skip" and configs[1] == 6:
        assert "model.layers holds 4 layers, but in the config num_hidden_layers is 6" in notes


@pytest.mark.parametrize(("ft_config", "layers"), [(None, 6), (4, 4)])
def test_layers_that_are_copied(ft_config: int | None, layers: int, tmp_path: Path) -> None:
    """What is copied from a deeper base is in the output, and a layer of it if the output's config counts it."""
    pair = Pair(tmp_path, model(6, 0.0), model(4, 1.0), config(6 if ft_config else None), config(ft_config))
    ran = pair.edit("--missing", "copy", "--missing-in-blocks", 2 * PER_LAYER)
    assert ran.code == 0, ran.err
    assert [found["layers"] for found in ran.json["stacks"]] == [layers]
    got = pair.coefficients()
    assert len(got) == 6 * PER_LAYER
    assert {name: got[name] for name in linear(4)} == pytest.approx({n: linear(layers)[n] for n in linear(4)})


def test_layers_that_are_no_part_of_their_own_model(tmp_path: Path) -> None:
    """A layer behind those that its own config counts (multi-token prediction) has not to be counted as missing."""
    pair = Pair(tmp_path, model(5, 0.0), model(4, 1.0), config(4), config(4))
    assert pair.edit("--missing", "ft", "--missing-in-blocks", PER_LAYER).code == 4
    ran = pair.edit("--missing", "ft")
    assert ran.code == 0, ran.err
    assert pair.coefficients() == pytest.approx(linear(4))


@pytest.mark.parametrize("gone", [{1}, {5}, {2, 3}], ids=str)
def test_layers_that_were_cut_out(gone: set[int], tmp_path: Path) -> None:
    """Layers that a fine-tune lacks in the middle leave a gap in the numbers, and the rest is counted without."""
    ft = {n: t for n, t in model(6, 1.0).items() if ".layers." not in n or int(n.split(".")[2]) not in gone}
    pair = Pair(tmp_path, model(6, 0.0), ft, config(6), config(6 - len(gone)))
    ran = pair.edit("--missing", "ft", "--missing-in-blocks", PER_LAYER * len(gone))
    assert ran.code == 0, ran.err
    left = [layer for layer in range(6) if layer not in gone]
    got = pair.coefficients()
    assert got == pytest.approx({name: left.index(int(name.split(".")[2])) / (len(left) - 1) for name in got})


@pytest.mark.slow
def test_a_tower_that_is_not_in_the_output(tmp_path: Path) -> None:
    """No stack of nothing: a vision tower of the base alone is not among the stacks, here and in inspect."""
    tower = stack("vision_tower.layers", 3, 0.0)
    pair = Pair(tmp_path, model(4, 0.0) | tower, model(4, 1.0))
    ran = pair.edit("--missing", "ft")
    assert ran.code == 0, ran.err
    assert [(found["name"], found["layers"]) for found in ran.json["stacks"]] == [("model.layers", 4)]
    assert [found["name"] for found in pair.inspect()["stacks"]] == ["model.layers"]
    kept = run_lines("edit", pair.base, pair.ft, "-o", tmp_path / "kept", "--missing", "copy", "--json")
    assert [found["name"] for found in kept.json["stacks"]] == ["model.layers", "vision_tower.layers"]


@pytest.mark.parametrize("vision", [2, 3, 24])
@pytest.mark.parametrize("text", [{}, {"num_hidden_layers": 4}])
def test_a_config_that_counts_a_tower_that_is_gone(text: dict[str, int], vision: int, tmp_path: Path) -> None:
    """The layers of `vision_config` are not held against a language model that is alone in the output."""
    said = {"model_type": "x", "text_config": {"hidden_size": 8, **text}, "vision_config": {"depth": vision}}
    tower = stack("visual.blocks", vision, 0.0)
    pair = Pair(tmp_path, model(4, 0.0) | tower, model(4, 1.0), said, said)
    ran = pair.edit("--missing", "ft")
    assert ran.code == 0, ran.err
    assert pair.coefficients() == pytest.approx(linear(4))
    assert [found["layers"] for found in pair.inspect()["stacks"]] == [4]


def test_no_stack_of_nothing_after_a_prefix(tmp_path: Path) -> None:
    """Where --prefix pairs a tower saved by itself, what the other side has beside it is no stack of the output."""
    base = stack("text.layers", 4, 0.0) | stack("vision.layers", 3, 0.0)
    ft = {name.removeprefix("vision."): t + 1 for name, t in base.items() if name.startswith("vision.")}
    pair = Pair(tmp_path, base, ft)
    ran = pair.edit("--prefix", "vision.", "--missing", "ft")
    assert ran.code == 0, ran.err
    assert [(found["name"], found["layers"]) for found in ran.json["stacks"]] == [("layers", 3)]


def test_an_expression_for_what_is_left_out(tmp_path: Path) -> None:
    """--not-layers that is found only in what the output lacks is no mistake; one that is found nowhere is."""
    pair = Pair(tmp_path, model(4, 0.0) | stack("adapter.layers", 3, 0.0), model(4, 1.0))
    assert pair.edit("--missing", "ft", "--not-layers", "^adapter").code == 0
    assert pair.coefficients() == pytest.approx(linear(4))
    assert (
        run_lines("edit", pair.base, pair.ft, "-o", tmp_path / "b", "--missing", "ft", "--not-layers", "x1").code == 2
    )


@pytest.mark.parametrize(("missing", "layers"), [("ft", 6), ("copy", 6), ("skip", 3)])
@pytest.mark.parametrize("like", ["base", "ft"])
def test_a_merge_of_models_of_different_depth(like: str, missing: str, layers: int, tmp_path: Path) -> None:
    """A merge, and what inspect tells of it, have the layers of their output."""
    sides = {"base": 4, "a": 6, "b": 3}
    paths = {
        side: write_checkpoint(tmp_path / side, model(depth, float(side != "base")), config={})
        for side, depth in sides.items()
    }
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(paths["base"]),
        "models": [{"model": str(paths[side]), "parameters": {"weight": 0.5}} for side in "ab"],
        "lines": {"alpha": 0.0, "beta": 1.0},
        "missing": missing,
        "missing_in_blocks": 3 * PER_LAYER,
        "like": like,
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe))
    ran = run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    assert [found["layers"] for found in ran.json["stacks"]] == [layers]
    got = load_file(tmp_path / "out" / "model.safetensors")
    shared = {name: c for name, c in linear(layers).items() if int(name.split(".")[2]) < 3}
    assert {name: got[name][0].item() for name in shared} == pytest.approx(shared)
    told = run_lines("inspect", "--config", tmp_path / "m.yaml", "--tensors", "--json").json
    assert [found["layers"] for found in told["stacks"]] == [layers]
    rows = {row["name"]: row["coefficient"] for row in told["map"] if row["stack"]}
    assert rows == pytest.approx({name: c for name, c in linear(layers).items() if name in rows})
    assert rows.keys() <= got.keys()
    assert not any(".layers." in row["name"] for row in told["map"] if row["stack"] is None)


def test_tensors_in_memory_are_scaled_likewise() -> None:
    """state_dicts of six and of four layers: L is 4."""
    got = lines.edit_state_dict(
        model(6, 0.0), model(4, 1.0), alpha=0.0, beta=1.0, missing="ft", missing_in_blocks=2 * PER_LAYER
    )
    assert {name: got[name][0].item() for name in linear(4)} == pytest.approx(linear(4))


def test_an_output_without_its_first_layers_is_refused(tmp_path: Path) -> None:
    """What is left of a model does not start in its middle."""
    ft = {n: t for n, t in model(6, 1.0).items() if ".layers." not in n or int(n.split(".")[2]) >= 3}
    with pytest.raises(LinesError, match="starts at layer 3"):
        lines.edit_state_dict(model(6, 0.0), ft, missing="ft", missing_in_blocks=3 * PER_LAYER)
    assert Pair(tmp_path, model(6, 0.0), ft).edit("--missing", "ft", "--missing-in-blocks", 9).code == 4
