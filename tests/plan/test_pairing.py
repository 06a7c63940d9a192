"""Which tensors are paired: prefixes, names that are known to be the same; and what is not paired inside blocks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import lines_cli as lines
from lines_cli.errors import MismatchError, RecipeError, UnsupportedError
from lines_cli.plan.same_names import canonical
from lines_cli.scaling.find_depth import find_depth
from support.files import write_checkpoint
from support.run import Ran, run_lines

LAYERS = 4
Tensors = dict[str, torch.Tensor]
Rename = Callable[[str], str]


def drawn(names: dict[str, tuple[int, ...]], seed: int) -> Tensors:
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=random) for name, shape in names.items()}


def llama(seed: int, *, head: bool = True) -> Tensors:
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (10, 4), "model.norm.weight": (4,)}
    if head:
        names["lm_head.weight"] = (10, 4)
    for i in range(LAYERS):
        names[f"model.layers.{i}.self_attn.q_proj.weight"] = (4, 4)
        names[f"model.layers.{i}.mlp.up_proj.weight"] = (6, 4)
        names[f"model.layers.{i}.input_layernorm.weight"] = (4,)
    return drawn(names, seed)


def tower(prefix: str, seed: int, *, own: str, width: int = 4) -> Tensors:
    """A tower of four blocks; `own` is what no other tower has."""
    names: dict[str, tuple[int, ...]] = {f"{prefix}{own}.weight": (width, 3)}
    for i in range(LAYERS):
        for module in ("self_attn.q_proj", "mlp.fc1"):
            names[f"{prefix}encoder.layers.{i}.{module}.weight"] = (width, width)
    return drawn(names, seed)


def renamed(tensors: Tensors, how: Rename) -> Tensors:
    return {how(name): tensor for name, tensor in tensors.items()}


def layer_of(name: str) -> int | None:
    match = re.search(r"(?:layers?|blocks|h)\.(?:_\w+\.)?(\d+)\.", name)
    return int(match[1]) if match else None


def coefficient(name: str) -> float:
    layer = layer_of(name)
    return 0.1 if layer is None else 0.1 + 0.9 * layer / (LAYERS - 1)


def right(base: torch.Tensor, ft: torch.Tensor, name: str) -> torch.Tensor:
    return base + coefficient(name) * (ft - base)


def check(got: Tensors, base: Tensors, ft: Tensors, base_name: Rename) -> None:
    """The output has the fine-tune's names, and each tensor is scaled against the base's, which has another name."""
    assert got.keys() == ft.keys()
    for name, tensor in got.items():
        torch.testing.assert_close(tensor, right(base[base_name(name)], ft[name], name), rtol=1e-5, atol=1e-6)


# --- names that are known to be the same ---


def within(wrapper: str) -> Rename:
    """The wrapper around the parts of each block."""
    return lambda name: re.sub(r"(layers\.\d+\.)", rf"\1{wrapper}.", name)


def around_a_list(name: str) -> str:
    return name.replace("layers.", "layers._fsdp_wrapped_module.", 1)


def every_other(name: str) -> str:
    return re.sub(r"(layers\.[02]\.)", r"\1_checkpoint_wrapped_module.", name)


def replaced(pattern: str, instead: str) -> Rename:
    return lambda name: re.sub(pattern, instead, name)


def peft(name: str) -> str:
    return "base_model.model." + re.sub(r"(_proj)\.weight", r"\1.base_layer.weight", name)


LLAMAS: dict[str, Rename] = {
    "compiled blocks": within("_orig_mod"),
    "FSDP": within("_fsdp_wrapped_module"),
    "FSDP of torch 1": within("_fpw_module"),
    "checkpointed blocks": within("_checkpoint_wrapped_module"),
    "two wrappers": within("_fsdp_wrapped_module._checkpoint_wrapped_module"),
    "every other block": every_other,
    "a list": around_a_list,
    "compiled as a whole": lambda name: f"_orig_mod.{name}",
    "compiled, of which not all": lambda name: f"_orig_mod.{name}" if "layers" in name else name,
    "DataParallel": lambda name: f"module.{name}",
    "DataParallel, compiled blocks": lambda name: "module." + within("_orig_mod")(name),
    "PEFT": peft,
    "PEFT, modules to save": replaced(r"^(lm_head|model\.norm)\.", r"\1.modules_to_save.default."),
    "a vision language model since 4.52": replaced(r"^model\.", "model.language_model."),
    "a vision language model before": lambda name: f"language_model.{name}",
    "a language model without its head": replaced(r"^model\.", ""),
}


@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("kind", LLAMAS)
def test_a_llama_by_another_name(kind: str, side: str) -> None:
    """Wrappers, PEFT and versions of transformers rename tensors; each is paired, and keeps its depth."""
    how = LLAMAS[kind]
    back = {how(name): name for name in llama(0)}
    base, ft = llama(0), llama(1)
    if side == "ft":
        ft = renamed(ft, how)
        check(lines.edit_state_dict(base, ft, missing="ft"), base, ft, back.__getitem__)
    else:
        base = renamed(base, how)
        check(lines.edit_state_dict(base, ft, missing="ft"), base, ft, how)


NORMS = {"bert.encoder.layer.{}.output.LayerNorm": (4,), "bert.encoder.layer.{}.output.dense": (4, 4)}
PARAMETRIZED = {
    "weight norm": {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"},
    "weight norm of another parameter": {
        "in_proj_weight_g": "parametrizations.in_proj_weight.original0",
        "in_proj_weight_v": "parametrizations.in_proj_weight.original1",
    },
    "spectral norm": {
        "weight_orig": "parametrizations.weight.original",
        "weight_u": "parametrizations.weight.0._u",
        "weight_v": "parametrizations.weight.0._v",
    },
    "LayerNorm": {"gamma": "weight", "beta": "bias"},
}


@pytest.mark.parametrize("newer", ["base", "ft"])
@pytest.mark.parametrize("kind", PARAMETRIZED)
def test_a_parameter_by_another_name(kind: str, newer: str) -> None:
    """What older torch and TensorFlow call a parameter is paired with what is now its name."""
    names = PARAMETRIZED[kind]
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (10, 4)}
    for i in range(LAYERS):
        shapes[f"encoder.layers.{i}.dense.weight"] = (4, 4)
        for number, part in enumerate(names):
            shapes[f"encoder.layers.{i}.conv.{part}"] = (4, 2, number + 1) if kind != "LayerNorm" else (4,)

    def new(name: str) -> str:
        prefix, dot, last = name.partition(".conv.")
        return f"{prefix}.conv.{names[last]}" if dot else name

    old = {new(name): name for name in shapes}.__getitem__
    base, ft = drawn(shapes, 0), drawn(shapes, 1)
    if newer == "ft":
        ft = renamed(ft, new)
        check(lines.edit_state_dict(base, ft), base, ft, old)
    else:
        base = renamed(base, new)
        check(lines.edit_state_dict(base, ft), base, ft, new)


def vision_language(seed: int, *, new: bool, family: str) -> Tensors:
    """LLaVA's or Qwen's names, as transformers before 4.52 has them or since."""
    text = llama(seed)
    if family == "qwen":
        vision, old = "visual.blocks", ""
    else:
        vision, old = "vision_tower.vision_model.encoder.layers", "language_model."
    names: dict[str, tuple[int, ...]] = {
        f"{vision}.{i}.{part}.weight": (5, 5) for i in range(LAYERS) for part in "abcd"
    }
    names["multi_modal_projector.linear_1.weight"] = (4, 5)
    images = drawn(names, seed + 50)
    if not new:
        return renamed(text, lambda name: f"{old}{name}") | images
    inside = renamed(text, lambda name: re.sub(r"^model\.", "model.language_model.", name))
    return inside | renamed(images, lambda name: f"model.{name}")


@pytest.mark.parametrize("newer", ["base", "ft"])
@pytest.mark.parametrize("family", ["llava", "qwen"])
def test_a_vision_language_model_of_two_versions(family: str, newer: str) -> None:
    """All of it is paired, even where most names differ by one prefix and the others by another."""
    base = vision_language(0, new=newer == "base", family=family)
    ft = vision_language(1, new=newer == "ft", family=family)
    names = dict(zip(vision_language(0, new=newer == "ft", family=family), base, strict=True))
    check(lines.edit_state_dict(base, ft), base, ft, names.__getitem__)


def test_it_is_said_how_many_have_another_name(tmp_path: Path) -> None:
    """One note, with the number and an example; none where names are the same."""
    base = write_checkpoint(tmp_path / "base", llama(0))
    ft = write_checkpoint(tmp_path / "ft", renamed(llama(1), within("_orig_mod")))
    ran = run_lines("edit", base, ft, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    notes = [note for note in ran.json["notes"] if "known to be the same" in note]
    assert len(notes) == 1
    assert "12 tensor(s)" in notes[0]
    assert "model.layers.0._orig_mod." in notes[0]
    again = run_lines("edit", base, base, "-o", tmp_path / "again", "--json")
    assert not any("known to be" in note for note in again.json["notes"])


def test_a_name_of_two_tensors_is_paired_with_neither() -> None:
    """Where two tensors of one side could be the one of the other, nothing is guessed."""
    base, ft = llama(0), llama(1)
    moved = "model.layers.1.mlp.up_proj.weight"
    ft["model.layers.1._orig_mod.mlp.up_proj.weight"] = ft.pop(moved)
    ft["model.layers.1._fpw_module.mlp.up_proj.weight"] = torch.ones(6, 4)
    with pytest.raises(MismatchError, match=r"inside blocks"):
        lines.edit_state_dict(base, ft, missing="ft")


def test_a_name_of_another_shape_is_not_the_same() -> None:
    """A tensor that would be known by name, but has another shape, is missing."""
    base, ft = llama(0), llama(1)
    ft["model.layers.1._orig_mod.mlp.up_proj.weight"] = ft.pop("model.layers.1.mlp.up_proj.weight")[:5]
    with pytest.raises(MismatchError, match=r"inside blocks"):
        lines.edit_state_dict(base, ft, missing="ft")


def test_layer_scale_stays_what_it_is() -> None:
    """A gamma that both sides have is none of a LayerNorm, and paired as it is."""
    names = {f"blocks.{i}.{part}": (4,) for i in range(LAYERS) for part in ("gamma", "weight")}
    base, ft = drawn(names, 0), drawn(names, 1)
    check(lines.edit_state_dict(base, ft), base, ft, str)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.layers.0.mlp.weight", "layers.0.mlp.weight"),
        ("layers.3._orig_mod.mlp.weight", "layers.3.mlp.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "layers.0.q_proj.weight"),
        ("score.modules_to_save.default.weight", "score.weight"),
        ("score.modules_to_save.my_task.weight", "score.weight"),
        ("score.original_module.weight", "score.original_module.weight"),
        ("text_model.encoder.layers.0.w", "text_model.encoder.layers.0.w"),
        ("conv.parametrizations.weight.original0", "conv.weight_g"),
        ("blocks.0.gamma_1", "blocks.0.gamma_1"),
        ("my_module.weight", "my_module.weight"),
        ("remodel.weight", "remodel.weight"),
    ],
)
def test_the_canonical_name(name: str, plain: str) -> None:
    """What is known is taken off or replaced; what only looks like it stays."""
    assert canonical(name) == plain


@pytest.mark.parametrize(
    "pattern",
    [
        "stages.{s}._orig_mod.blocks.{b}.w",
        "stages.{s}.blocks._orig_mod.{b}.w",
        "stages._fsdp_wrapped_module.{s}.blocks.{b}._checkpoint_wrapped_module.w",
    ],
)
def test_depth_with_wrappers_inside(pattern: str) -> None:
    """Stages are counted through whatever wraps them."""
    names = [pattern.format(s=s, b=b) for s in range(3) for b in range(2)]
    depth = find_depth(names)
    assert [depth.places[name].index for name in names] == list(range(6))
    assert [stack.layers for stack in depth.stacks] == [6]


# --- prefixes ---

TEXT, VISION = "text_model.", "vision_model."


@pytest.mark.parametrize("lone", [VISION, TEXT])
@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("ft_is_lone", [True, False])
def test_a_tower_by_itself(lone: str, order: int, *, ft_is_lone: bool) -> None:
    """Of two towers of one shape a lone one is paired with that which has all of its names, whichever comes first."""
    both = [tower(TEXT, 0, own="token_embedding"), tower(VISION, 1, own="patch_embedding")][::order]
    whole = both[0] | both[1]
    alone = tower("", 2, own="patch_embedding" if lone == VISION else "token_embedding")
    if ft_is_lone:
        check(lines.edit_state_dict(whole, alone, missing="ft"), whole, alone, lambda name: f"{lone}{name}")
        return
    got = lines.edit_state_dict(alone, whole, missing="ft")
    for name in alone:
        expected = right(alone[name], whole[f"{lone}{name}"], name)
        torch.testing.assert_close(got[f"{lone}{name}"], expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(got[name], whole[name]) for name in whole if not name.startswith(lone))


def test_the_tower_that_has_the_plain_names_is_not_meant() -> None:
    """As in open_clip the text tower has no prefix; the lone vision tower's blocks are called as its blocks are."""
    base = tower("", 0, own="token_embedding") | tower("visual.", 1, own="conv1")
    ft = tower("", 2, own="conv1")
    check(lines.edit_state_dict(base, ft, missing="ft"), base, ft, lambda name: f"visual.{name}")


def test_shapes_decide() -> None:
    """Of two towers with the same names the one of equal shapes is meant."""
    base = tower("a.", 0, own="stem", width=6) | tower("b.", 1, own="stem") | tower("c.", 2, own="stem", width=5)
    ft = tower("", 3, own="stem")
    check(lines.edit_state_dict(base, ft, missing="ft"), base, ft, lambda name: f"b.{name}")


def test_a_prefix_and_wrappers() -> None:
    """The tower is found where names differ by more than the prefix."""
    base = renamed(tower(TEXT, 0, own="token_embedding") | tower(VISION, 1, own="patch_embedding"), within("_orig_mod"))
    ft = tower("", 2, own="patch_embedding")
    how = within("_orig_mod")
    check(lines.edit_state_dict(base, ft, missing="ft"), base, ft, lambda name: how(f"{VISION}{name}"))


ALIKE = {
    "an average beside the weights": ("model.", "model_ema.", ""),
    "student and teacher": ("student.backbone.", "teacher.backbone.", "backbone."),
    "momentum encoders": ("encoder_q.", "encoder_k.", ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALIKE)
def test_two_prefixes_that_fit_alike(kind: str, tmp_path: Path) -> None:
    """They are listed with their counts, and --prefix decides; the recipe holds it, so that verify agrees."""
    first, second, own = ALIKE[kind]
    base = write_checkpoint(tmp_path / "base", whole := tower(first, 0, own="stem") | tower(second, 1, own="stem"))
    ft = write_checkpoint(tmp_path / "ft", alone := tower(own, 2, own="stem"))
    command = ("edit", base, ft, "-o", tmp_path / "out", "--missing", "ft")
    ran = run_lines(*command)
    prefixes = [prefix.removesuffix(own) for prefix in (first, second)]
    assert ran.code == 4
    assert [word for word in ("9 of 9", "--prefix", *prefixes, base, ft) if str(word) not in ran.err] == []
    assert not (tmp_path / "out").exists()
    assert run_lines("inspect", ft, "--base", base).code == 4
    for prefix in prefixes:
        ran = run_lines(*command, "--force", "--prefix", prefix.removesuffix("."))
        assert ran.code == 0, ran.err
        check(load_file(tmp_path / "out" / "model.safetensors"), whole, alone, lambda name, p=prefix: f"{p}{name}")
        assert yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())["prefix"] == prefix
        assert run_lines("verify", tmp_path / "out").code == 0
        told = run_lines("inspect", ft, "--base", base, "--prefix", prefix, "--json")
        assert told.code == 0, told.err
        name = f"{prefix}{own}stem.weight"
        whole_name, norm = whole[name], told.json["fine_tunes"][0]["update_norm"]
        update = sum(((alone[n] - whole[f"{prefix}{n}"]).double() ** 2).sum().item() for n in alone)
        assert whole_name.shape == alone[f"{own}stem.weight"].shape
        assert norm == pytest.approx(update**0.5, rel=1e-6)


def test_a_prefix_of_a_merge(tmp_path: Path) -> None:
    """`prefix:` decides in a recipe, too, and only for the inputs that have it."""
    models = {
        "base": tower("a.", 0, own="stem") | tower("b.", 1, own="stem"),
        "x": tower("", 2, own="stem"),
        "y": tower("a.", 3, own="stem") | tower("b.", 4, own="stem"),
    }
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": "base",
        "models": [{"model": "x"}, {"model": "y"}],
        "missing": "skip",
    }

    def merged(**more: Any) -> Ran:
        (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe | more))
        return run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out.safetensors")

    assert "prefix: a." in merged().err
    ran = merged(prefix="b")
    assert ran.code == 0, ran.err
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == tower("b.", 1, own="stem").keys()
    base, x, y = models.values()
    for name, tensor in got.items():
        expected = base[name] + (x[name.removeprefix("b.")] - base[name]) + (y[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


SWAPPED = {
    "a sentence transformer": ("bert.", "model.0.auto_model."),
    "a backbone": ("encoder.", "backbone.model."),
    "one within the other's word": ("a.b.", "b."),
    "the fine-tune's is shorter": ("net.module.trunk.", "t."),
}


@pytest.mark.parametrize("kind", SWAPPED)
@pytest.mark.slow
def test_each_side_has_a_prefix_of_its_own(kind: str, tmp_path: Path) -> None:
    """They are not paired unasked; the hint says how, and what it says is right, also for a new head."""
    one, another = SWAPPED[kind]
    whole = tower(one, 0, own="stem") | drawn({"cls.weight": (2, 4)}, 5)
    alone = tower(another, 2, own="stem") | drawn({"head.weight": (3, 4)}, 6)
    base, ft = write_checkpoint(tmp_path / "base", whole), write_checkpoint(tmp_path / "ft", alone)
    command = ("edit", base, ft, "-o", tmp_path / "out")
    if not one.endswith(another):  # else it is one prefix, and found
        ran = run_lines(*command)
        assert (ran.code, f"--prefix {one}={another}" in ran.err.replace("\n  ", " ")) == (4, True), ran.err
        ran = run_lines(*command, "--missing", "ft")
        assert (ran.code, f"--prefix {one}={another}" in ran.err) == (4, True), ran.err
    for said in (f"{one}={another}", f"{another.removesuffix('.')}={one.removesuffix('.')}"):
        ran = run_lines(*command, "--prefix", said, "--missing", "ft", "--force")
        assert ran.code == 0, ran.err
        got = load_file(tmp_path / "out" / "model.safetensors")
        assert torch.equal(got.pop("head.weight"), alone["head.weight"])
        kept = {name: tensor for name, tensor in alone.items() if name in got}
        check(got, whole, kept, lambda name: f"{one}{name.removeprefix(another)}")
        assert run_lines("verify", tmp_path / "out").code == 0


@pytest.mark.slow
def test_two_towers_behind_two_prefixes(tmp_path: Path) -> None:
    """Where several fit alike each is listed; a pairing that is whole needs no hint."""
    whole = tower(TEXT, 0, own="stem") | tower(VISION, 1, own="stem")
    alone = tower("image_encoder.", 2, own="stem")
    base, ft = write_checkpoint(tmp_path / "base", whole), write_checkpoint(tmp_path / "ft", alone)
    command = ("edit", base, ft, "-o", tmp_path / "out.safetensors", "--missing", "ft")
    ran = run_lines(*command)
    assert ran.code == 4
    for prefix in (TEXT, VISION):
        assert f"--prefix {prefix}=image_encoder." in ran.err
        assert run_lines(*command, "--force", "--prefix", f"{prefix}=image_encoder.").code == 0
        got = load_file(tmp_path / "out.safetensors")
        check(got, whole, alone, lambda name, p=prefix: name.replace("image_encoder.", p))
    few = {name: tensor for name, tensor in whole.items() if "mlp" not in name or "3" not in name}
    with pytest.raises(MismatchError) as refusal:
        lines.edit_state_dict(whole, few, missing="ft")
    assert "prefix" not in str(refusal.value.hint)


@pytest.mark.parametrize("said", ["a=b=c", "=b", "a=", "nowhere.=b."])
def test_two_prefixes_that_are_none(said: str) -> None:
    base, ft = tower("a.", 0, own="stem"), tower("b.", 1, own="stem")
    with pytest.raises((MismatchError, RecipeError), match=r"prefix|begin with"):
        lines.edit_state_dict(base, ft, prefix=said)


def test_two_prefixes_of_a_merge(tmp_path: Path) -> None:
    """`prefix: a.=b.` serves each input that has one of them, and none that needs it not."""
    models = {"base": tower("a.", 0, own="stem"), "x": tower("b.", 1, own="stem"), "y": tower("a.", 2, own="stem")}
    for name, tensors in models.items():
        write_checkpoint(tmp_path / name, tensors)
    recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "x"}, {"model": "y"}]}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe))
    command = ("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out.safetensors")
    ran = run_lines(*command)
    assert ran.code == 4
    assert "prefix: a.=b." in ran.err
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe | {"prefix": "a.=b."}))
    ran = run_lines(*command)
    assert ran.code == 0, ran.err
    base, x, y = models.values()
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        expected = base[name] + (x[name.replace("a.", "b.", 1)] - base[name]) + (y[name] - base[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beside", ["", "mlp.extra.weight"])
def test_an_adapter_that_is_not_folded_in(beside: str, tmp_path: Path) -> None:
    """Its factors would be copied beside scaled weights, and act in full: they are named, not only counted."""
    whole = llama(0)
    ft = {f"base_model.model.{name.replace('q_proj.', 'q_proj.base_layer.')}": t for name, t in whole.items()}
    for i in range(LAYERS):
        at = f"base_model.model.model.layers.{i}"
        ft |= drawn({f"{at}.self_attn.q_proj.lora_{x}.default.weight": s for x, s in (("A", (2, 4)), ("B", (4, 2)))}, i)
        ft |= drawn({f"{at}.{beside}": (4, 4)}, i) if beside else {}
    base, unmerged = write_checkpoint(tmp_path / "base", whole), write_checkpoint(tmp_path / "ft", ft)
    for more in ((), ("--missing", "ft")):
        ran = run_lines("edit", base, unmerged, "-o", tmp_path / "out", *more)
        assert ran.code == 4
        expected = ["8 of them are factors", "merge_and_unload", f"--missing-in-blocks {12 if beside else 8}"]
        assert [word for word in expected if word not in ran.err] == []
        assert ("rename it there" in ran.err) == bool(beside)


def test_a_prefix_that_is_none() -> None:
    """One that stands before no name is refused; an empty one pairs names as they are."""
    base, ft = tower("a.", 0, own="stem"), tower("", 1, own="stem")
    with pytest.raises(MismatchError, match=r"'nowhere\.'"):
        lines.edit_state_dict(base, ft, prefix="nowhere")
    with pytest.raises(MismatchError, match="no tensor in common"):
        lines.edit_state_dict(base, ft, prefix="")
    with pytest.raises(RecipeError, match="prefix"):
        lines.inspect("x", prefix="a")


# --- what is missing inside blocks ---


def unheard_of(name: str) -> str:
    return name.replace("up_proj", "feed_forward_up")


@pytest.mark.slow
@pytest.mark.parametrize("missing", ["ft", "copy", "skip"])
def test_renamed_blocks_are_no_new_tensors(missing: str, tmp_path: Path) -> None:
    """--missing, which a new head needs, does not take along what is only called otherwise; the count does."""
    base, ft = llama(0, head=False), renamed(llama(1, head=False), unheard_of) | {"score.weight": torch.ones(2, 4)}
    paths = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", ft)
    command = ("edit", *paths, "-o", tmp_path / "out")
    ran = run_lines(*command)
    asked = run_lines(*command, "--missing", missing)
    for refused in (ran, asked):
        assert refused.code == 4
        assert "8 tensors that some side lacks lie inside blocks" in refused.err
        assert "--missing-in-blocks 8" in refused.err
        assert "model.layers.0.mlp.up_proj.weight" in refused.err
        assert "is it model.layers.0.mlp.feed_forward_up.weight" in refused.err
    assert "Of the 1 outside the blocks" in ran.err
    for number in (0, 7, 9):
        ran = run_lines(*command, "--missing", missing, "--missing-in-blocks", number)
        assert (ran.code, "--missing-in-blocks 8" in ran.err) == (4, True)
        assert ran.err.splitlines()[0].endswith(f"a partner; --missing-in-blocks says {number}:")
    ran = run_lines(*command, "--missing", missing, "--missing-in-blocks", 8)
    assert ran.code == 0, ran.err
    assert yaml.safe_load((tmp_path / "out" / "lines_recipe.yaml").read_text())["missing_in_blocks"] == 8
    assert run_lines("verify", tmp_path / "out").code == 0


def test_a_count_for_nothing_is_refused() -> None:
    """A count that was once right does not stand in a recipe for other inputs."""
    with pytest.raises(MismatchError, match="no tensor inside blocks"):
        lines.edit_state_dict(llama(0), llama(1), missing_in_blocks=3)


NEW_IN_BLOCKS = {
    "a bias": ("self_attn.q_proj.bias", (4,)),
    "a norm of queries": ("self_attn.q_norm.weight", (4,)),
    "an adapter": ("mlp.adapter.weight", (2, 4)),
    "a layer scale": ("layer_scale", (4,)),
    "another shape": ("mlp.down_proj.weight", (4, 6)),
}


@pytest.mark.parametrize("side", ["base", "ft"])
@pytest.mark.parametrize("kind", NEW_IN_BLOCKS)
def test_one_more_in_every_block(kind: str, side: str) -> None:
    """Whatever the blocks of one side have more has to be counted."""
    base, ft = llama(0), llama(1)
    last, shape = NEW_IN_BLOCKS[kind]
    more = {f"model.layers.{i}.{last}": torch.ones(shape) for i in range(LAYERS)}
    (base if side == "base" else ft).update(more)
    with pytest.raises(MismatchError) as refused:
        lines.edit_state_dict(base, ft, missing="ft")
    assert "4 tensors" in refused.value.message
    got = lines.edit_state_dict(base, ft, missing="ft", missing_in_blocks=4)
    assert got.keys() == ft.keys()


MADE_ANEW = {
    "rotary frequencies": ("self_attn.rotary_emb.inv_freq", torch.ones(2)),
    "GPT-2's mask": ("attn.bias", torch.ones(1, 1, 6, 6).tril()),
    "GPT-2's mask in 8 bits": ("attn.bias", torch.ones(1, 1, 6, 6).tril().to(torch.uint8)),
    "a masked bias": ("attn.masked_bias", torch.tensor(-1e4)),
    "a count of batches": ("norm.num_batches_tracked", torch.tensor(7)),
    "positions": ("embeddings.position_ids", torch.arange(6)[None]),
    "Swin's index": ("attn.relative_position_index", torch.ones(4, 4).long()),
}


@pytest.mark.parametrize("kind", MADE_ANEW)
def test_what_loaders_make_anew(kind: str) -> None:
    """Buffers that nobody learns need no count."""
    base, ft = llama(0), llama(1)
    last, tensor = MADE_ANEW[kind]
    extra = {f"model.layers.{i}.{last}": tensor for i in range(LAYERS)}
    check(lines.edit_state_dict(base | extra, ft, missing="ft"), base, ft, str)
    got = lines.edit_state_dict(base, ft | extra, missing="ft")
    assert all(torch.equal(got[name], tensor) for name, tensor in extra.items())


def test_a_bias_that_is_learnt_is_no_mask() -> None:
    """A bias of one axis, or a square one that is not a mask by its shape, has to be counted."""
    base, ft = llama(0), llama(1)
    for shape in ((6,), (6, 6), (2, 3, 6, 6)):
        with pytest.raises(MismatchError):
            lines.edit_state_dict(base | {"model.layers.0.attn.bias": torch.ones(shape)}, ft, missing="ft")


@pytest.mark.parametrize("missing", ["ft", "copy", "skip"])
def test_a_tower_that_one_side_has_for_itself(missing: str) -> None:
    """A vision tower beside a language model, on one side only, is no renamed block."""
    base, ft = llama(0), llama(1)
    vision = {f"vision_tower.blocks.{i}.attn.qkv.weight": torch.full((12, 5), float(i)) for i in range(3)}
    got = lines.edit_state_dict(base, ft | vision, missing=missing)
    assert got.keys() == ft.keys() | (set() if missing == "skip" else vision.keys())
    assert all(torch.equal(got[name], vision[name]) for name in vision if name in got)
    check({name: got[name] for name in ft}, base, ft, str)
    got = lines.edit_state_dict(base | vision, ft, missing=missing)
    check({name: got[name] for name in ft}, base, ft, str)


def test_towers_that_were_exchanged() -> None:
    """Each side has a tower of its own: either may be the other, renamed."""
    old = {f"vision_tower.blocks.{i}.attn.qkv.weight": torch.ones(12, 5) for i in range(3)}
    new = {f"eyes.layers.{i}.attn.qkv.weight": torch.ones(12, 5) for i in range(3)}
    with pytest.raises(MismatchError, match="6 tensors"):
        lines.edit_state_dict(llama(0) | old, llama(1) | new, missing="ft")


def test_blocks_that_are_renamed_beyond_recognition() -> None:
    """Where what the base calls otherwise is not even seen to be blocks, the fine-tune's are no tower of its own."""
    base = renamed(llama(0), replaced(r"layers\.(\d+)\.(\w+)", lambda m: f"{m[2]}_{'abcd'[int(m[1])]}"))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="12 tensors"):
        lines.edit_state_dict(base, llama(1), missing="ft")


def test_inspect_gives_a_recipe_that_runs(tmp_path: Path) -> None:
    """What is not compared inside blocks is counted in the recipe that inspect's report holds."""
    base = write_checkpoint(tmp_path / "base", llama(0))
    ft = write_checkpoint(tmp_path / "ft", llama(1) | {"model.layers.1.extra": torch.ones(3)})
    told = run_lines("inspect", ft, "--base", base, "--json")
    recipe = told.json["merge"]
    assert recipe["missing_in_blocks"] == 1
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(recipe))
    assert run_lines("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out").code == 0


# --- adapters ---

LORA = {
    f"model.layers.{i}.self_attn.q_proj.lora_{part}.weight": shape
    for i in range(4)
    for part, shape in (("A", (2, 4)), ("B", (4, 2)))
}


@pytest.mark.parametrize("command", ["edit", "merge", "inspect --base", "inspect --config", "tensors"])
def test_every_command_refuses_an_adapter(command: str, tmp_path: Path) -> None:
    """What would compute with factors refuses them by name; looked at they are, and are said to be so."""
    a, b = (write_checkpoint(tmp_path / f"{name}.safetensors", drawn(LORA, seed)) for seed, name in enumerate("ab"))
    (tmp_path / "m.yaml").write_text(f"merge_method: task_arithmetic\nbase_model: {a}\nmodels: [{{model: {b}}}]\n")
    commands: dict[str, tuple[object, ...]] = {
        "edit": ("edit", a, b, "-o", tmp_path / "out"),
        "merge": ("merge", "--config", tmp_path / "m.yaml", "-o", tmp_path / "out"),
        "inspect --base": ("inspect", b, "--base", a),
        "inspect --config": ("inspect", "--config", tmp_path / "m.yaml"),
    }
    if command == "tensors":
        with pytest.raises(UnsupportedError, match="base is an adapter"):
            lines.edit_state_dict(drawn(LORA, 0), drawn(LORA, 1))
        assert "is an adapter" in run_lines("inspect", a).out
        return
    ran = run_lines(*commands[command])
    assert ran.code == 3
    assert "is an adapter" in ran.err
    assert "hint: " in ran.err


def test_factors_inside_a_whole_model_are_noted(tmp_path: Path) -> None:
    """As in a model with an adapter for each kind of input: they are scaled one by one, and that is said."""
    paths = [write_checkpoint(tmp_path / name, llama(n) | drawn(LORA, n)) for n, name in enumerate(("base", "ft"))]
    ran = run_lines("edit", *paths, "-o", tmp_path / "out", "--json")
    assert ran.code == 0, ran.err
    notes = [note for note in ran.json["notes"] if "scale their product" in note]
    assert [note.split()[0] for note in notes] == ["8", "8"]
    base, ft = (llama(n) | drawn(LORA, n) for n in (0, 1))
    check(load_file(tmp_path / "out" / "model.safetensors"), base, ft, str)
