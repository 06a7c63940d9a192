"""What cannot be done is refused: with its exit code, with both sides named, with a next step, and without a trace."""

from __future__ import annotations

import errno
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from lines_cli.checkpoint.reader import open_checkpoint
from lines_cli.engine import run as engine
from lines_cli.engine import workers
from lines_cli.errors import CheckpointError
from lines_cli.plan.build import make_plan
from lines_cli.plan.inputs import inputs_of
from lines_cli.plan.resources import Resources
from lines_cli.recipe.validate import make_recipe
from lines_cli.storage import staging
from lines_cli.storage.files import NewFile
from lines_cli.storage.staging import Staging
from support import forked
from support.files import snapshot, without_staging, write_checkpoint, write_raw
from support.run import as_nobody, run_lines


def tensors(seed: int = 0, **changes: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """A model of three layers with an embedding, a head, a counter and a mask; `layers_1_w=None` leaves one out."""
    torch.manual_seed(seed)
    shapes = {"embed_tokens.weight": (6, 4), "layers.0.w": (4, 4), "layers.1.w": (4, 4), "layers.2.w": (4, 4)}
    model: dict[str, torch.Tensor | None] = {name: torch.randn(shape) for name, shape in shapes.items()}
    model |= {"norm": torch.ones(4), "steps": torch.tensor(3), "mask": torch.tensor([True, False])}
    model |= {
        key.replace("_", ".") if key.startswith("layers") else key.replace("__", "."): value
        for key, value in changes.items()
    }
    return {name: value for name, value in model.items() if value is not None}


def holed(at: int, value: float) -> torch.Tensor:
    """A layer's weight with one impossible entry."""
    layer = torch.ones(4, 4)
    layer.view(-1)[at] = value
    return layer


class Case(NamedTuple):
    """What is on the command line (after it was built in an empty folder), and how it ends."""

    build: Callable[[Path], Iterable[object]]
    code: int
    words: list[str]


def pair(
    *flags: object, base: dict[str, torch.Tensor] | None = None, ft: dict[str, torch.Tensor] | None = None, **kw: Any
) -> Callable[[Path], Iterable[object]]:
    """`edit BASE FT -o out FLAGS` with two folders."""

    def build(tmp: Path) -> Iterable[object]:
        a = write_checkpoint(tmp / "base", tensors() if base is None else base, **kw)
        b = write_checkpoint(tmp / "ft", tensors(1) if ft is None else ft, **kw)
        return (a, b, "-o", tmp / "out", *flags)

    return build


def damaged(header: object, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], Iterable[object]]:
    """`edit BASE bad.safetensors -o out`."""

    def build(tmp: Path) -> Iterable[object]:
        base = write_checkpoint(tmp / "base", tensors())
        return (base, write_raw(tmp / "bad.safetensors", header, data, length=length), "-o", tmp / "out")

    return build


def with_index(shard: str) -> Callable[[Path], Iterable[object]]:
    def build(tmp: Path) -> Iterable[object]:
        base = write_checkpoint(tmp / "base", tensors())
        ft = write_checkpoint(tmp / "ft", tensors(1), shards=2)
        write_checkpoint(tmp / "outside.safetensors", tensors(1))
        index = ft / "model.safetensors.index.json"
        content = json.loads(index.read_text())
        content["weight_map"]["layers.1.w"] = shard
        index.write_text(json.dumps(content))
        return (base, ft, "-o", tmp / "out")

    return build


def truncated(tmp: Path) -> Iterable[object]:
    base, ft = (write_checkpoint(tmp / f"{side}.safetensors", tensors()) for side in ("base", "ft"))
    os.truncate(ft, ft.stat().st_size - 10)
    return (base, ft, "-o", tmp / "out")


def text_file(tmp: Path) -> Iterable[object]:
    base = write_checkpoint(tmp / "base", tensors())
    (tmp / "notes.txt").write_text("These are not weights, but a longer text.\n")
    return (base, tmp / "notes.txt", "-o", tmp / "out")


def pickled(tmp: Path) -> Iterable[object]:
    base = write_checkpoint(tmp / "base", tensors())
    torch.save(torch.nn.Linear(2, 2), tmp / "model.pt")
    return (base, tmp / "model.pt", "-o", tmp / "out")


def quantised(tmp: Path) -> Iterable[object]:
    base = write_checkpoint(tmp / "base", tensors())
    config = {"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}
    codes = {"layers.0.qweight": torch.ones(4, 4, dtype=torch.int32)}
    return (base, write_checkpoint(tmp / "ft", tensors(1) | codes, config=config), "-o", tmp / "out")


def recipe(text: str, *flags: object) -> Callable[[Path], Iterable[object]]:
    def build(tmp: Path) -> Iterable[object]:
        for side in ("base", "ft"):
            write_checkpoint(tmp / side, tensors())
        (tmp / "recipe.yaml").write_text(text)
        return ("--config", tmp / "recipe.yaml", "-o", tmp / "out", *flags)

    return build


RUNS = "base_model: base\nmodels: [{model: ft}]\n"


def to(output: Callable[[Path], Path], *flags: object) -> Callable[[Path], Iterable[object]]:
    """`edit BASE FT -o OUTPUT FLAGS`, where `output` says (and prepares) the destination, given the two inputs."""

    def build(tmp: Path) -> Iterable[object]:
        base = write_checkpoint(tmp / "models" / "base", tensors())
        ft = write_checkpoint(tmp / "models" / "ft", tensors(1), shards=2)
        return (base, ft, "-o", output(tmp), *flags)

    return build


def existing_file(name: str) -> Callable[[Path], Path]:
    def output(tmp: Path) -> Path:
        (tmp / name).write_text("precious")
        return tmp / name

    return output


def existing_folder(*names: str) -> Callable[[Path], Path]:
    def output(tmp: Path) -> Path:
        for name in names:
            (tmp / "out" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp / "out" / name).write_text("precious")
        return tmp / "out"

    return output


def link(name: str, target: str) -> Callable[[Path], Path]:
    def output(tmp: Path) -> Path:
        (tmp / name).symlink_to(tmp / target)
        return tmp / name

    return output


def around_a_linked_input(tmp: Path) -> Iterable[object]:
    """The fine-tune is named through a link that stands in the folder to be replaced."""
    base = write_checkpoint(tmp / "base", tensors())
    ft = write_checkpoint(tmp / "elsewhere", tensors(1))
    write_checkpoint(tmp / "out", tensors(2))
    (tmp / "out" / "ft").symlink_to(ft)
    return (base, tmp / "out" / "ft", "-o", tmp / "out", "--force")


NAN, INF = float("nan"), float("inf")
FP8 = tensors(1) | {"layers.1.w": torch.ones(4, 4).to(torch.float8_e4m3fn)}
F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}

CASES: dict[str, Case] = {
    # What was asked for is impossible: 2
    "alpha NaN": Case(pair("--alpha", "nan"), 2, ["alpha", "finite", "nan"]),
    "alpha Inf": Case(pair("--alpha", "inf"), 2, ["alpha", "finite", "inf"]),
    "beta NaN": Case(pair("--beta", "nan"), 2, ["beta", "finite", "nan"]),
    "beta -Inf": Case(pair("--beta=-inf"), 2, ["beta", "finite", "-inf"]),
    "gamma Inf": Case(pair("--gamma", "inf"), 2, ["gamma", "finite", "inf"]),
    "a coefficient beyond float64": Case(pair("--alpha", "1e308", "--gamma", "1e308"), 2, ["coefficient"]),
    "a coefficient beyond float32": Case(pair("--alpha", "1e39", "--beta", "0"), 2, ["coefficient", "1e+39"]),
    "no such device": Case(pair("--device", "abacus"), 2, ["abacus", "cuda"]),
    "no such device, dry": Case(pair("--device", "abacus", "--dry-run"), 2, ["abacus", "cuda"]),
    "a device for no arithmetic": Case(pair("--device", "meta"), 2, ["meta", "cuda"]),
    "CUDA device 99": Case(pair("--device", "cuda:99"), 2, ["cuda:99"]),
    "no size": Case(pair("--max-shard-size", "big"), 2, ["max_shard_size", "big", "5GB"]),
    "size zero": Case(pair("--max-shard-size", "0"), 2, ["max_shard_size", "5GB"]),
    "size beyond all": Case(pair("--max-shard-size", "9" * 400 + "GB"), 2, ["max_shard_size"]),
    "layers no expression": Case(pair("--layers", "("), 2, ["--layers", "("]),
    "layers without index": Case(pair("--layers", "layers"), 2, ["--layers", "index"]),
    "recipe missing": Case(lambda tmp: ("--config", tmp / "absent.yaml", "-o", tmp / "out"), 2, ["absent.yaml"]),
    "recipe not YAML": Case(recipe("{"), 2, ["recipe.yaml", "YAML"]),
    "recipe nested too deep": Case(recipe("[" * 1200), 2, ["recipe.yaml", "YAML"]),
    "recipe a list": Case(recipe("- a"), 2, ["recipe.yaml", "base_model"]),
    "recipe empty": Case(recipe(""), 2, ["recipe.yaml", "base_model"]),
    "recipe without models": Case(recipe("base_model: base"), 2, ["recipe.yaml", "models"]),
    "recipe with an unknown key": Case(recipe(RUNS + "lines: {alhpa: 0.1}"), 2, ["recipe.yaml", "alhpa"]),
    "recipe with NaN": Case(recipe(RUNS + "lines: {alpha: .nan}"), 2, ["recipe.yaml", "alpha", "nan"]),
    # An input cannot be read, or is of another kind: 3
    "base missing": Case(lambda tmp: (tmp / "absent", tmp, "-o", tmp / "out"), 3, ["absent", "no such"]),
    "ft missing": Case(
        lambda tmp: (write_checkpoint(tmp / "base", tensors()), tmp / "absent", "-o", tmp / "out"), 3, ["absent"]
    ),
    "text": Case(text_file, 3, ["notes.txt"]),
    "a pickled module": Case(pickled, 3, ["model.pt", "state_dict()"]),
    "truncated": Case(truncated, 3, ["ft.safetensors", "ends"]),
    "header longer than the file": Case(damaged({}, length=1000), 3, ["bad.safetensors", "1,000", "only 2"]),
    "header of an absurd length": Case(damaged({}, length=2**62), 3, ["bad.safetensors", "100,000,000"]),
    "overlapping": Case(damaged({"v": F32, "w": F32}, bytes(8)), 3, ["bad.safetensors", "'v'", "'w'"]),
    "out of range": Case(damaged({"w": {**F32, "data_offsets": [8, 16]}}, bytes(8)), 3, ["bad.safetensors", "'w'"]),
    "a shard missing": Case(with_index("absent.safetensors"), 3, ["index.json", "absent.safetensors"]),
    "a shard outside": Case(with_index("../outside.safetensors"), 3, ["index.json", "../outside", "layers.1.w"]),
    "quantised": Case(quantised, 3, ["ft", "gptq", "quantised"]),
    "FP8": Case(pair(ft=FP8), 3, ["ft/model.safetensors", "layers.1.w", "F8_E4M3"]),
    # The inputs do not fit together: 4
    "no tensors": Case(pair(base={}, ft={}), 4, ["base", "ft"]),
    "nothing in common": Case(pair(base={"layers.0.a": torch.ones(1)}, ft={"layers.0.b": torch.ones(1)}), 4, ["0.a"]),
    "missing in ft": Case(
        pair(ft=tensors(1, layers_1_w=None)), 4, ["base", "ft", "layers.1.w", "--missing-in-blocks 1"]
    ),
    "missing in base": Case(
        pair(base=tensors(layers_1_w=None)), 4, ["base", "ft", "layers.1.w", "--missing-in-blocks 1"]
    ),
    "missing on both sides": Case(
        pair(base=tensors(norm=None), ft=tensors(1, layers_1_w=None)), 4, ["layers.1.w", "norm", "1 of 6"]
    ),
    "shapes": Case(pair(ft=tensors(1, layers_1_w=torch.ones(4, 5))), 4, ["layers.1.w", "[4, 4]", "[4, 5]", "ft"]),
    "shapes of embeddings": Case(
        pair(ft=tensors(1, embed_tokens__weight=torch.ones(8, 4))),
        4,
        ["embed_tokens.weight", "[6, 4]", "[8, 4]", "--resize ft"],
    ),
    "widths of embeddings": Case(
        pair("--resize", "ft", ft=tensors(1, embed_tokens__weight=torch.ones(6, 5))),
        4,
        ["embed_tokens.weight", "[6, 4]", "[6, 5]"],
    ),
    "resize is for vocabulary alone": Case(
        pair("--resize", "ft", ft=tensors(1, layers_1_w=torch.ones(5, 4))), 4, ["layers.1.w", "[4, 4]", "[5, 4]"]
    ),
    "an integer for a float": Case(
        pair(ft=tensors(1, layers_1_w=torch.ones(4, 4).long())), 4, ["layers.1.w", "F32", "I64"]
    ),
    "layers that match nothing": Case(pair("--layers", r"block(?P<index>\d+)"), 4, ["block", "layers.0.w"]),
    # The numbers themselves: 5
    "NaN in base": Case(
        pair(base=tensors(layers_1_w=holed(5, NAN))), 5, ["base/model.safetensors", "layers.1.w", "NaN", "entry 5"]
    ),
    "NaN in ft": Case(
        pair(ft=tensors(1, layers_1_w=holed(0, NAN))), 5, ["ft/model.safetensors", "layers.1.w", "NaN", "entry 0"]
    ),
    "Inf in base": Case(
        pair(base=tensors(layers_0_w=holed(15, INF))), 5, ["base/model.safetensors", "layers.0.w", "Inf", "entry 15"]
    ),
    "-Inf in ft": Case(
        pair(ft=tensors(1, layers_0_w=holed(7, -INF))), 5, ["ft/model.safetensors", "layers.0.w", "Inf", "entry 7"]
    ),
    "NaN copied from base": Case(
        pair("--alpha", "0", "--beta", "0", base=tensors(layers_1_w=holed(5, NAN))),
        5,
        ["base/model.safetensors", "layers.1.w", "NaN", "entry 5"],
    ),
    "NaN copied from ft": Case(
        pair("--alpha", "1", "--beta", "0", ft=tensors(1, layers_1_w=holed(5, NAN))),
        5,
        ["ft/model.safetensors", "layers.1.w", "NaN", "entry 5"],
    ),
    "NaN in a tensor of one side": Case(
        pair("--missing", "copy", "--missing-in-blocks", "1", ft=tensors(1, layers_3_w=holed(5, NAN))),
        5,
        ["ft/model.safetensors", "layers.3.w", "NaN", "entry 5"],
    ),
    "NaN cast": Case(
        pair("--alpha", "1", "--beta", "0", "--dtype", "bfloat16", ft=tensors(1, layers_1_w=holed(5, NAN))),
        5,
        ["ft/model.safetensors", "layers.1.w", "NaN", "entry 5"],
    ),
    "Inf in a row that only ft has": Case(
        pair(
            "--resize", "ft", ft=tensors(1, embed_tokens__weight=torch.cat([torch.ones(7, 4), torch.full((1, 4), INF)]))
        ),
        5,
        ["ft/model.safetensors", "embed_tokens.weight", "Inf", "entry 28"],
    ),
    "overflow in float16": Case(
        pair("--dtype", "float16", ft=tensors(1, layers_1_w=holed(0, 1e6))), 5, ["layers.1.w", "F16"]
    ),
    "overflow of a copy": Case(
        pair("--dtype", "float16", "--alpha", "1", "--beta", "0", ft=tensors(1, layers_1_w=holed(0, 65520.0))),
        5,
        ["layers.1.w", "F16"],
    ),
    "overflow in float32": Case(
        pair(base=tensors(layers_1_w=holed(0, -3e38)), ft=tensors(1, layers_1_w=holed(0, 3e38))), 5, ["layers.1.w"]
    ),
    # The destination: 6
    "a file there": Case(to(existing_file("out.safetensors")), 6, ["out.safetensors exists", "--force"]),
    "a file where the folder goes": Case(to(existing_file("out")), 6, ["out exists"]),
    "a file where the folder goes, forced": Case(to(existing_file("out"), "--force"), 6, ["out", "is a file"]),
    "a folder there": Case(to(existing_folder("model.safetensors")), 6, ["out exists", "--force"]),
    "a folder with a hidden file": Case(to(existing_folder(".hidden")), 6, ["out exists"]),
    "a folder where the file goes": Case(
        to(lambda tmp: existing_folder("x")(tmp).rename(tmp / "out.safetensors"), "--force"), 6, ["out.safetensors"]
    ),
    "forced on a folder of other things": Case(
        to(existing_folder("thesis.tex", "photos/a.jpg"), "--force"), 6, ["out", "no checkpoint"]
    ),
    "forced on a folder of checkpoints": Case(
        to(existing_folder("a/model.safetensors", "b/model.safetensors"), "--force"), 6, ["out", "no checkpoint"]
    ),
    "forced on a project with a stray weight file": Case(
        to(existing_folder("stray.safetensors", "thesis.tex", "src/main.py", ".git/HEAD"), "--force"), 6, ["out"]
    ),
    "a broken link": Case(to(link("out", "absent")), 6, ["out"]),
    "a link to itself": Case(to(link("out", "out")), 6, ["out"]),
    "an input": Case(to(lambda tmp: tmp / "models" / "ft", "--force"), 6, ["models/ft", "replace an input"]),
    "an input's file": Case(
        to(lambda tmp: tmp / "models" / "base" / "model.safetensors", "--force"),
        6,
        ["base/model.safetensors", "replace an input"],
    ),
    "an input's shard": Case(
        to(lambda tmp: tmp / "models" / "ft" / "model-00001-of-00002.safetensors", "--force"),
        6,
        ["ft/model-00001-of-00002.safetensors", "replace an input"],
    ),
    "an input's parent": Case(to(lambda tmp: tmp / "models", "--force"), 6, ["models", "replace an input"]),
    "an input by a roundabout way": Case(
        to(lambda tmp: tmp / "models" / "ft" / ".." / "base", "--force"), 6, ["replace an input"]
    ),
    "a link to an input": Case(to(link("out", "models/ft"), "--force"), 6, ["out", "replace an input"]),
    "a link to an input's file": Case(
        to(link("out.safetensors", "models/base/model.safetensors"), "--force"), 6, ["out", "replace an input"]
    ),
    "around a linked input": Case(around_a_linked_input, 6, ["out", "replace an input"]),
    "below a file": Case(to(lambda tmp: existing_file("note.txt")(tmp) / "out"), 6, ["note.txt"]),
    "below a file, dry": Case(to(lambda tmp: existing_file("note.txt")(tmp) / "out", "--dry-run"), 6, ["note.txt"]),
    "a name too long": Case(to(lambda tmp: tmp / ("o" * 300)), 6, ["ooo"]),
}


@pytest.mark.some(8)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_refused(case: Case, tmp_path: Path) -> None:
    """The exit code, a message with names and a next step on stderr, nothing on stdout, nothing changed on the disk."""
    arguments = list(case.build(tmp_path))
    before = snapshot(tmp_path)
    ran = run_lines("merge" if "--config" in arguments else "edit", *arguments)
    assert not ran.trace
    assert (ran.code, ran.out) == (case.code, "")
    assert ran.err.startswith("error: ")
    assert [word for word in case.words if word not in ran.err] == []
    assert snapshot(tmp_path) == before
    assert "hint: " in ran.err or case.code == 2  # what is wrong with an option says how to write it


@pytest.mark.parametrize(
    "flags", [["--alpha", "x"], ["--workers", "0"], ["--dtype", "int8"], ["--missing", "no"], ["--alhpa", "1"]]
)
def test_misspelt_options(flags: list[str], tmp_path: Path) -> None:
    """What the command line cannot parse ends with 2, names the option, and prints nothing on stdout."""
    ran = run_lines("edit", *pair(*flags)(tmp_path))
    assert (ran.code, ran.out, ran.trace) == (2, "", "")
    assert flags[0] in ran.err


def test_no_output_named(tmp_path: Path) -> None:
    """Without -o nothing is guessed."""
    assert run_lines("edit", tmp_path, tmp_path).code == 2


@pytest.mark.parametrize("build", [pair(), to(lambda tmp: tmp / "new" / "out.safetensors"), recipe(RUNS)])
def test_the_rest_of_the_table_is_sound(build: Callable[[Path], Iterable[object]], tmp_path: Path) -> None:
    """What the cases above spoil works when it is not spoilt."""
    arguments = list(build(tmp_path))
    ran = run_lines("merge" if "--config" in arguments else "edit", *arguments)
    assert (ran.code, ran.trace) == (0, "")


def test_an_empty_destination(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`-o "$UNSET"` does not write to, let alone replace, the working directory."""
    base, ft, *_ = pair()(tmp_path)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    before = snapshot(tmp_path)
    ran = run_lines("edit", base, ft, "-o", "", "--force")
    monkeypatch.undo()
    assert ran.code in (2, 6)
    assert snapshot(tmp_path) == before


# --- what is let through on request ---


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("flags", [[], ["--alpha", "1", "--beta", "0"], ["--dtype", "bfloat16"]])
def test_nonfinite_allowed(value: float, flags: list[str], tmp_path: Path) -> None:
    """With --allow-nonfinite such entries go through, all others are what they would be, and the tensor is named."""
    ft = tensors(1, layers_1_w=holed(5, value))
    ran = run_lines("edit", *pair("--allow-nonfinite", *flags, ft=ft)(tmp_path))
    assert (ran.code, ran.trace) == (0, "")
    assert "warning: " in ran.err
    assert "layers.1.w" in ran.err
    assert "layers.0.w" not in ran.err
    edited = load_file(tmp_path / "out" / "model.safetensors")["layers.1.w"].flatten()
    assert torch.equal(~edited.isfinite(), torch.arange(16) == 5)


def test_overflow_allowed(tmp_path: Path) -> None:
    """With --allow-nonfinite a value beyond float16 becomes Inf, and --json names its tensor."""
    ft = tensors(1, layers_2_w=holed(0, 1e6))
    ran = run_lines("edit", *pair("--allow-nonfinite", "--dtype", "float16", "--json", ft=ft)(tmp_path))
    assert (ran.code, ran.trace) == (0, "")
    assert list(ran.json["nonfinite"]) == ["layers.2.w"]
    assert load_file(tmp_path / "out" / "model.safetensors")["layers.2.w"][0, 0] == INF


@pytest.mark.parametrize("value", [65519.0, -65519.0, 65504.0])
def test_no_false_alarm_at_the_edge(value: float, tmp_path: Path) -> None:
    """What still rounds to float16's largest value is no overflow."""
    ft = tensors(1, layers_1_w=holed(0, value))
    ran = run_lines("edit", *pair("--dtype", "float16", "--alpha", "1", "--beta", "0", ft=ft)(tmp_path))
    assert ran.code == 0
    assert load_file(tmp_path / "out" / "model.safetensors")["layers.1.w"][0, 0].abs() == 65504


# --- the disk ---


def test_no_space_is_seen_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too little room is refused by what is to be written and what there is; a dry run says so too."""
    arguments = list(pair()(tmp_path))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=100))
    before = snapshot(tmp_path)
    for flags in ([], ["--dry-run"]):
        ran = run_lines("edit", *arguments, *flags)
        assert (ran.code, ran.out, ran.trace) == (6, "", "")
        assert all(word in ran.err for word in (str(tmp_path / "out"), "room for 100", "hint: "))
    assert snapshot(tmp_path) == before


@contextmanager
def files_of_at_most(nbytes: int) -> Iterator[None]:
    """Let the system itself refuse larger files, as a full disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("name", ["deep/er/out", "deep/er/out.safetensors"])
def test_the_system_refuses_the_bytes(name: str, existing: bool, tmp_path: Path) -> None:
    """A write that fails for want of space leaves nothing new and takes nothing old, made parents included."""
    base, ft, *_ = pair()(tmp_path)
    if existing:
        write_checkpoint(tmp_path / name, tensors(2))
    before = snapshot(tmp_path)
    with files_of_at_most(400):
        ran = run_lines("edit", base, ft, "-o", tmp_path / name, "--force")
    assert (ran.code, ran.out, ran.trace) == (6, "", "")
    assert all(word in ran.err for word in (str(tmp_path / name), "no space", "hint: "))
    assert snapshot(tmp_path) == before


def failing(real: Callable[..., Any], number: int, error: BaseException) -> Callable[..., Any]:
    """`real`, whose call `number` (from 1) raises instead."""
    calls = iter(range(1, 1000))

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == number:
            raise error
        return real(*args, **kwargs)

    return function


FULL = OSError(errno.ENOSPC, "No space left on device")
FAULTS = {
    "creating a file": (os, "ftruncate", 1, FULL),
    "the header": (NewFile, "write", 1, FULL),
    "the third chunk": (NewFile, "write", 4, FULL),
    "a quota": (NewFile, "write", 4, OSError(errno.EDQUOT, "Disk quota exceeded")),
    "a broken disk": (NewFile, "write", 4, OSError(errno.EIO, "Input/output error")),
    "writing a sidecar": (os, "fsync", 1, FULL),
    "flushing": (os, "fsync", 4, OSError(errno.EIO, "Input/output error")),
    "exchanging the folders": (staging, "exchange", 1, OSError(errno.EIO, "Input/output error")),
    "setting the old aside": (os, "rename", 1, OSError(errno.EBUSY, "Device or resource busy")),
    "putting the new in place": (os, "rename", 2, OSError(errno.EIO, "Input/output error")),
    "Ctrl-C in a chunk": (NewFile, "write", 3, KeyboardInterrupt()),
    "Ctrl-C at a sidecar": (os, "fsync", 1, KeyboardInterrupt()),
    "Ctrl-C while flushing": (os, "fsync", 4, KeyboardInterrupt()),
    "Ctrl-C before the folders are exchanged": (staging, "exchange", 1, KeyboardInterrupt()),
    "Ctrl-C before the old is aside": (os, "rename", 1, KeyboardInterrupt()),
    "Ctrl-C before the new is in place": (os, "rename", 2, KeyboardInterrupt()),
}


@pytest.mark.durable
@pytest.mark.parametrize(("module", "name", "number", "error"), FAULTS.values(), ids=FAULTS)
@pytest.mark.some(6)
def test_a_failure_at_any_point_keeps_the_old(
    module: Any, name: str, number: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever a run with --force fails or is interrupted, the old output stands as it was. What was finished is kept
    and named, if anything was, and another run goes on from it.
    """
    write_checkpoint(tmp_path / "out", tensors(2), config={"old": True})
    arguments = list(pair("--force", config={"model_type": "tiny"})(tmp_path))
    before = snapshot(tmp_path)
    monkeypatch.setattr(workers, "WRITE_SIZE", 16)  # so that small tensors are not written together
    if name == "rename":
        monkeypatch.setattr(staging, "exchange", lambda *_: False)
    monkeypatch.setattr(module, name, failing(getattr(module, name), number, error))
    ran = run_lines("edit", *arguments)
    monkeypatch.undo()
    assert not ran.trace
    assert ran.code == (6 if isinstance(error, OSError) else 130)
    assert ran.out == ""
    after = snapshot(tmp_path)
    assert without_staging(after) == before
    assert (".out.lines" in ran.err) == (".out.lines/journal" in after) == (after != before)
    ran = run_lines("edit", *arguments, "--resume")
    assert (ran.code, ran.trace) == (0, "")
    assert not list(tmp_path.glob(".*"))


def test_an_output_that_appears_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came into being at the destination during the run is not replaced without --force."""
    arguments = list(pair()(tmp_path))
    sync = staging.sync_folder

    def meanwhile(folder: Path) -> None:
        existing_folder("theirs.txt")(tmp_path)
        sync(folder)

    monkeypatch.setattr(staging, "sync_folder", meanwhile)
    ran = run_lines("edit", *arguments)
    assert (ran.code, ran.trace) == (6, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lines", "base", "ft", "out"]
    assert (tmp_path / "out" / "theirs.txt").read_text() == "precious"


def test_a_name_that_barely_fits(tmp_path: Path) -> None:
    """A destination whose name is as long as names may be is written, or refused with no parents left behind."""
    base, ft, *_ = pair()(tmp_path)
    before = snapshot(tmp_path)
    ran = run_lines("edit", base, ft, "-o", tmp_path / "new" / "er" / ("o" * 250))
    assert (ran.code, ran.trace) in ((0, ""), (6, ""))
    assert ran.code == 0 or snapshot(tmp_path) == before


@pytest.mark.slow
@pytest.mark.durable
@pytest.mark.parametrize("kind", ["a mount point", "a small disk"])
def test_a_real_disk(kind: str, tmp_path: Path) -> None:
    """On a mounted disk of its own a dry run promises what the run keeps; what does not fit leaves nothing there."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-m", "true"], check=False).returncode:
        pytest.skip("mounting is not allowed here")
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, {f"layers.{i}.w": torch.ones(100_000) for i in range(4)})
    (tmp_path / "disk").mkdir()
    size, out = ("8m", "disk") if kind == "a mount point" else ("1m", "disk/new/out")
    lines = f"{sys.executable} -m lines_cli edit base ft -o {out}"
    script = f"mount -t tmpfs -o size={size} none disk; {lines} --dry-run; echo $?; {lines}; echo $?; find disk | wc -l"
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    dry, real, files = [int(line) for line in ran.stdout.splitlines() if line.isdecimal()]
    assert dry == real, ran.stderr
    assert real == 0 or files == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "disk", "ft"]


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no other user to be")
@pytest.mark.parametrize(
    ("path", "mode", "code", "word"),
    [
        ("parent", 0o555, 6, "parent"),
        ("parent", 0o000, 6, "parent"),
        ("parent/out", 0o000, 6, "parent/out"),
        ("base/model.safetensors", 0o000, 3, "base/model.safetensors"),
        ("base/config.json", 0o000, 3, "base/config.json"),
        ("base", 0o000, 3, "base"),
        ("base", 0o311, 3, "base"),
        ("ft/tokenizer.json", 0o000, 3, "ft/tokenizer.json"),
    ],
)
@pytest.mark.slow
def test_no_permission(path: str, mode: int, code: int, word: str) -> None:
    """What an ordinary user may not read or write is refused by name, and nothing is left."""
    with as_nobody() as folder:
        for side in ("base", "ft"):
            write_checkpoint(folder / side, tensors(), config={"model_type": "tiny"})
            (folder / side / "tokenizer.json").write_text("{}")
        (folder / "parent").mkdir()
        if path.startswith("parent"):
            (folder / path).mkdir(exist_ok=True)
        before = snapshot(folder)
        (folder / path).chmod(mode)
        ran = run_lines("edit", folder / "base", folder / "ft", "-o", folder / "parent" / "out")
        (folder / path).chmod(0o777)
        assert snapshot(folder) == before
    assert (ran.code, ran.out, ran.trace) == (code, "", "")
    assert str(folder / word) in ran.err
    assert "ermission" in ran.err


# --- inputs that change under our hands ---


@pytest.mark.parametrize("change", ["truncated", "deleted"])
def test_an_input_that_changes_after_planning(change: str, tmp_path: Path) -> None:
    """An input cut short or deleted between planning and writing is named, and nothing is left."""
    base, ft, _, output = pair()(tmp_path)
    asked = make_recipe({"base_model": str(base), "models": [{"model": str(ft)}]}, where="test")
    plan = make_plan(asked, inputs_of(asked, open_checkpoint(Path(base)), open_checkpoint(Path(ft))), Path(output))
    file = Path(ft) / "model.safetensors"
    if change == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    else:
        file.unlink()
    before = snapshot(tmp_path)
    with pytest.raises(CheckpointError) as refused:
        engine.run(plan, Resources(workers=2))
    assert str(file) in refused.value.message
    assert snapshot(tmp_path) == before


# --- Ctrl-C ---


def test_an_interrupt_stops_the_workers_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while progress is drawn: no worker is at work any more when the files are closed and removed."""
    base, ft, _, output = pair()(tmp_path)
    asked = make_recipe({"base_model": str(base), "models": [{"model": str(ft)}]}, where="test")
    plan = make_plan(asked, inputs_of(asked, open_checkpoint(Path(base)), open_checkpoint(Path(ft))), Path(output))
    write = NewFile.write
    alive: list[list[str]] = []

    def slow(*args: Any) -> None:
        time.sleep(0.02)
        write(*args)

    def interrupted(title: str, total: int, done: Iterable[int]) -> Iterator[int]:
        for nbytes in done:
            yield nbytes
            raise KeyboardInterrupt

    close = Staging._close_files

    def closing(staging: Staging) -> None:
        alive.append([thread.name for thread in threading.enumerate() if thread.name.startswith("lines-worker")])
        close(staging)

    monkeypatch.setattr(NewFile, "write", slow)
    monkeypatch.setattr(Staging, "_close_files", closing)
    with pytest.raises(KeyboardInterrupt):
        engine.run(plan, Resources(workers=2, chunk=4), track=interrupted)
    assert alive == [[]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "existing"),
    [
        (signal.SIGINT, False),
        pytest.param(signal.SIGINT, True, marks=pytest.mark.slow),  # as in test_resume.py, and so is SIGTERM
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        (signal.SIGHUP, True),
    ],
)
def test_a_signal_in_the_middle_of_a_write(number: signal.Signals, existing: bool, tmp_path: Path) -> None:
    """A run of 256 MB that is asked to end: exit code 128 + signal, a word on stderr, and the disk as it was."""
    header = {
        f"layers.{i}.w": {"dtype": "F32", "shape": [2**24], "data_offsets": [i << 26, (i + 1) << 26]} for i in range(4)
    }
    for side in ("base", "ft"):
        path = write_raw(tmp_path / f"{side}.safetensors", header)
        os.truncate(path, path.stat().st_size + (4 << 26))
    if existing:
        write_checkpoint(tmp_path / "out", tensors())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    command = ["edit", "base.safetensors", "ft.safetensors", "-o", "out", "--beta", "0.5", "--workers", "1", "--force"]

    def ended() -> None:
        """A run that is told to end as it has written some pieces."""
        write, count = NewFile.write, itertools.count(1)

        def some(*args: Any) -> None:
            write(*args)
            if next(count) == 3:
                os.kill(os.getpid(), number)

        NewFile.write = some  # type: ignore[method-assign]
        forked.command(*command)()

    process = forked.run(ended, cwd=tmp_path)
    out, err = process.stdout, process.stderr
    assert (process.returncode, out) == (128 + number, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    after = {str(path): path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert without_staging(after) == {str(path): mtime for path, mtime in before.items()}
    assert (".out.lines" in err) == (tmp_path / ".out.lines").exists()


@pytest.mark.slow
def test_ctrl_c_while_torch_loads(tmp_path: Path) -> None:
    """Ctrl-C in the first second is heard, though importing torch would swallow it."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, tensors())
    program = (
        "import os, signal, sys, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Press:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch.nn': os.kill(os.getpid(), signal.SIGINT)\n"
        "sys.meta_path.insert(0, Press())\n"
        "from lines_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "edit", "base", "ft", "-o", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (130, "")
    assert "interrupted" in ran.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "ft"]


def test_an_input_by_another_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An input reached by another mount, or spelt in other letters where case does not count, is not replaced."""
    base, ft, *_ = pair()(tmp_path)
    alias = write_checkpoint(tmp_path / "alias", tensors())
    same = os.path.samefile
    monkeypatch.setattr(os.path, "samefile", lambda a, b: {Path(a), Path(b)} == {alias, Path(ft)} or same(a, b))
    before = snapshot(tmp_path)
    ran = run_lines("edit", base, ft, "-o", alias, "--force")
    assert (ran.code, ran.trace) == (6, "")
    assert "replace an input" in ran.err
    assert snapshot(tmp_path) == before


IGNORED = (signal.SIGHUP, signal.SIGINT)


@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored(tmp_path: Path) -> None:
    """A run whose parent ignores SIGHUP and SIGINT, as nohup and a script's background do, is not ended by them."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, tensors())

    def program() -> None:
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        open_files, write = Staging.__enter__, NewFile.write

        def entering(staging: Staging) -> Staging:
            send()
            return open_files(staging)

        def writing(*args: Any) -> None:
            send()
            write(*args)

        def send() -> None:
            for number in IGNORED:
                os.kill(os.getpid(), number)

        Staging.__enter__, NewFile.write = entering, writing  # type: ignore[method-assign]
        send()
        forked.command("edit", "base", "ft", "-o", "out")()

    ran = forked.run(program, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_what_nohup_ignores_stays_ignored_while_torch_loads(tmp_path: Path) -> None:
    """Nor while torch is imported, when signals are held back."""
    for side in ("base", "ft"):
        write_checkpoint(tmp_path / side, tensors())
    program = (
        "import os, signal, sys\n"
        "numbers = (signal.SIGHUP, signal.SIGINT)\n"
        "for number in numbers: signal.signal(number, signal.SIG_IGN)\n"
        "class Send:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch.nn': [os.kill(os.getpid(), number) for number in numbers]\n"
        "sys.meta_path.insert(0, Send())\n"
        "from lines_cli.cli.app import main; main()"
    )
    command = [sys.executable, "-c", program, "edit", "base", "ft", "-o", "out"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_nothing_is_said_of_a_numpy_that_is_not_needed(tmp_path: Path) -> None:
    """Where numpy is not installed, as after a plain `pip install`, torch's warning of it does not reach the user."""
    for side, seed in (("base", 0), ("ft", 1)):
        write_checkpoint(tmp_path / side, tensors(seed))
    program = "import sys; sys.modules['numpy'] = None\nfrom lines_cli.cli.app import main; main()"
    command = [sys.executable, "-c", program, "edit", "base", "ft", "-o", "out", "--beta", "0.5", "--quiet"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
