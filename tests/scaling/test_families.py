"""What `lines edit` makes of real families: the coefficient of every tensor, and models that load and compute as they
should.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from support import zoo
from support.bits import raw
from support.depth_cases import CASES, PLACED, names_and_config
from support.files import write_checkpoint
from support.run import run_lines

pytestmark = pytest.mark.zoo
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16)]
NO_PRETRAINED = {"mlp", "llama_in_data_parallel", "llama_compiled"}
FAMILIES = [case for case in PLACED if case.build and case.build not in NO_PRETRAINED]
FLOAT32_ONLY = {"xlnet"}  # in bfloat16 its own forward pass mixes dtypes
NO_FORWARD = {"blip2"}  # wants a processor's image tokens; its state is compared
UNLIKE = {
    *("llama_one_layer", "llama_tied", "gpt2", "xlnet", "jamba", "t5", "bert", "gpt_oss", "swin", "resnet", "wav2vec2"),
    *("musicgen", "clip", "blip2"),
}
"""Those whose make is their own: tied, mixed of experts, of several stacks, with buffers, with names that change."""
EDITED = [
    pytest.param(case, id=case.id, marks=() if case.build in UNLIKE or at % 8 == 0 else pytest.mark.slow)
    for at, case in enumerate(PLACED)  # the depth of each is held by test_find_depth.py
]


def coefficients(case: zoo.Case, names: list[str], alpha: float, beta: float) -> dict[str, float]:
    """The paper's equation with the layers that the case gives by hand; alpha outside them."""
    places = zoo.expected_places(case, names)
    c = dict.fromkeys(names, alpha)
    for name, (stack, index) in places.items():
        last = len(case.stacks[stack]) - 1
        c[name] = alpha + beta * index / last if last else alpha + beta
    return c


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.9), pytest.param(0.37, -1.21, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", EDITED)
@pytest.mark.some(6)
def test_every_coefficient_of_every_family(case: zoo.Case, alpha: float, beta: float, tmp_path: Path) -> None:
    """From zeros to ones, what is written is the coefficient of each tensor, as the nearest float32."""
    names, config = names_and_config(case)
    base = write_checkpoint(tmp_path / "base", {name: torch.zeros(2) for name in names}, config=config)
    ft = write_checkpoint(tmp_path / "ft", {name: torch.ones(2) for name in names}, config=config)
    out = tmp_path / "out.safetensors"
    ran = run_lines("edit", base, ft, "-o", out, "--alpha", alpha, "--beta", beta, "--quiet", "--device", "cpu")
    assert (ran.code, ran.trace) == (0, ""), ran.err
    got = {name: tensor.tolist() for name, tensor in load_file(out).items()}
    expected = {name: float(np.float32(c)) for name, c in coefficients(case, names, alpha, beta).items()}
    assert got == {name: [c, c] for name, c in expected.items()}


@pytest.mark.parametrize("case", [case for case in CASES if case.refuse], ids=str)
@pytest.mark.some(4)
def test_what_has_no_depth_is_refused_before_anything_is_written(case: zoo.Case, tmp_path: Path) -> None:
    """Exit code 4 and no output; with one coefficient for all it is edited."""
    names, config = names_and_config(case)
    sides = [write_checkpoint(tmp_path / side, {n: torch.ones(2) for n in names}, config=config) for side in ("a", "b")]
    assert run_lines("edit", *sides, "-o", tmp_path / "out").code == 4
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
    assert run_lines("edit", *sides, "-o", tmp_path / "out", "--beta", 0).code == 0


# --- models in memory ---


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums come out the same; and the machine is shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def fine_tuned(base: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy that differs everywhere: parameters, running statistics and counters. What is tied stays tied."""
    random = torch.Generator().manual_seed(seed)
    ft = copy.deepcopy(base)
    for tensor in [*ft.parameters(), *ft.buffers()]:
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.02 * torch.rand(tensor.shape, generator=random).to(tensor.dtype))
            tensor.add_(0.01 * torch.rand(tensor.shape, generator=random).to(tensor.dtype))
    for name, tensor in ft.named_buffers():
        if name.endswith("num_batches_tracked"):
            tensor.add_(3)
    return ft


def load(cls: Any, folder: Path, **options: Any) -> Any:
    """`from_pretrained`, which must find every weight and nothing else."""
    model, info = cls.from_pretrained(folder, output_loading_info=True, local_files_only=True, **options)
    assert not any(info.values()), info
    return model.eval()


def as_loaded(cls: Any, like: Path, values: Mapping[str, float], folder: Path) -> dict[str, torch.Tensor]:
    """What every entry of a loaded model is, if each tensor in its file is one value.

    So names that a library changes on loading, and tensors that it joins, need no table here.
    """
    shutil.copytree(like, folder, ignore=lambda _, names: [name for name in names if "safetensors" in name])
    stored = load_file(like / "model.safetensors")
    filled = {n: torch.full(t.shape, values[n]) if t.is_floating_point() else t for n, t in stored.items()}
    save_file(filled, folder / "model.safetensors", metadata={"format": "pt"})
    state: dict[str, torch.Tensor] = load(cls, folder, dtype=torch.float32).state_dict()
    return state


def patched(base: torch.Tensor, ft: torch.Tensor, c: torch.Tensor, stored: torch.dtype) -> torch.Tensor:
    """The formula in plain torch, with a coefficient per entry; integers are the fine-tune's."""
    if not ft.is_floating_point():
        return ft
    edited = base.float() + c * (ft.float() - base.float())
    edited = torch.where(c == 0, base.float(), torch.where(c == 1, ft.float(), edited))
    return edited.to(stored).to(ft.dtype)  # a few parameters are float32 in memory, whatever the file says


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """What the model takes, as little of it as will do."""
    config, main, family = model.config, model.main_input_name, model.config.model_type
    ids = torch.tensor([[5, 6, 7, 8, 9]] * (4 if family == "musicgen_decoder" else 1))  # a row per codebook
    size = getattr(getattr(config, "vision_config", config), "image_size", 32)

    def ramp(*shape: int) -> torch.Tensor:
        return torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape).to(model.dtype)

    made = {
        "input_ids": ids,
        "pixel_values": ramp(1, 3, size, size),
        "input_values": ramp(1, 800),
        "input_features": ramp(1, 8, 16),
    }
    wanted = {main, "input_ids", "pixel_values"} if family in ("clip", "siglip", "blip-2") else {main}
    found = {name: made[name] for name in wanted}
    if family == "speecht5":
        found["decoder_input_values"] = ramp(1, 4, 8)
    elif config.is_encoder_decoder:
        found["decoder_input_ids"] = ids
    return found


def outputs(model: Any) -> list[torch.Tensor]:
    """Every tensor that a forward pass returns."""
    torch.manual_seed(0)
    return [value for value in model(**inputs(model), return_dict=True).values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(
    ("number", "case"),
    [
        pytest.param(number, case, id=case.id, marks=() if case.id in UNLIKE else pytest.mark.slow)
        for number, case in enumerate(FAMILIES)
    ],
)
@pytest.mark.some(3)
def test_the_output_computes_what_a_model_patched_in_memory_computes(
    number: int, case: zoo.Case, tmp_path: Path
) -> None:
    """It loads whole; parameters, ties, buffers, dtypes and forward pass are the patched model's."""
    base_dtype, ft_dtype = DTYPES[0 if case.id in FLOAT32_ONLY else number % len(DTYPES)]
    with one_thread():
        assert case.build
        base = zoo.ZOO[case.build]()
        cls: Any = type(base)
        fine_tuned(base, number).to(ft_dtype).save_pretrained(tmp_path / "ft")
        base.to(base_dtype).save_pretrained(tmp_path / "base")
        ran = run_lines("edit", tmp_path / "base", tmp_path / "ft", "-o", tmp_path / "out", "--quiet")
        assert (ran.code, ran.trace) == (0, ""), ran.err

        names = list(load_file(tmp_path / "ft" / "model.safetensors"))
        c = as_loaded(cls, tmp_path / "ft", coefficients(case, names, 0.1, 0.9), tmp_path / "c")
        base_state = load(cls, tmp_path / "base").state_dict()
        expected = load(cls, tmp_path / "ft")
        ft_state = copy.deepcopy(expected.state_dict())  # of two names for one tensor, each is patched once
        for name, tensor in expected.state_dict().items():
            tensor.copy_(patched(base_state[name], ft_state[name], c[name], ft_dtype))

        edited = load(cls, tmp_path / "out")
        got = edited.state_dict()
        assert got.keys() == expected.state_dict().keys()
        for name, tensor in expected.state_dict().items():
            assert (name, got[name].dtype) == (name, tensor.dtype)
            assert raw(got[name]) == raw(tensor), name
        if case.id in NO_FORWARD:
            return
        made = outputs(edited)
        assert made
        for one, other in zip(made, outputs(expected), strict=True):
            assert raw(one) == raw(other)
