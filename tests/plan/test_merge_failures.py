"""Inputs of a merge that cannot be read, and failures on the way."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lines_cli.checkpoint.header import lay_out
from support import forked
from support.files import snapshot, without_staging, write_checkpoint
from support.merging import AUTO, merge, output, refused, same, tensors, total, write
from support.run import as_nobody

# --- files that are none, or cannot be read ---


class WaitsForEver(BaseException):
    """Nothing that is caught on the way."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """A way out of what would wait for ever."""

    def late(*_: object) -> None:
        raise WaitsForEver

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def an_empty_file(path: Path) -> None:
    path.touch()


@pytest.mark.parametrize("side", ["base", "b"])
@pytest.mark.parametrize("kind", [a_fifo, a_folder, a_dangling_link, an_empty_file], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("place", ["lone", "inside", "shard"])
def test_something_else_in_place_of_a_file(place: str, kind: Callable[[Path], None], side: str, tmp_path: Path) -> None:
    """A FIFO, a folder, a dangling link or an empty file in place of weights is exit 3 by name, at once."""
    names = {name: name for name in ("base", "a", "b")}
    write(tmp_path, **{name: tensors(i) for i, name in enumerate(names)})
    if place == "lone":
        names[side] = f"{side}.safetensors"
        path = tmp_path / names[side]
    elif place == "inside":
        path = tmp_path / side / "model.safetensors"
        path.unlink()
    else:
        (tmp_path / side / "model.safetensors").unlink()
        write_checkpoint(tmp_path / side, tensors(0), shards=2)
        path = tmp_path / side / "model-00001-of-00002.safetensors"
        path.unlink()
    kind(path)
    before = sorted(tmp_path.rglob("*"))
    with within(2):
        ran = merge(tmp_path, base_model=names["base"], models=[names["a"], names["b"]])
    refused(ran, 3, path.name)
    (tmp_path / "merge.yaml").unlink()
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json"])
def test_a_fifo_beside_the_weights(name: str, tmp_path: Path) -> None:
    """A FIFO or folder called like a file that is carried over is no such file, and nobody waits for it."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    os.mkfifo(tmp_path / "base" / name)
    (tmp_path / "base" / "vocab.json").mkdir()
    with within(2):
        assert merge(tmp_path).code == 0
    assert not {name, "vocab.json"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("side", ["base", "a", "b"])
def test_a_missing_folder(side: str, tmp_path: Path) -> None:
    """A folder that is not there is exit 3 with its path beside the recipe."""
    write(tmp_path, **{name: tensors(i) for i, name in enumerate(("base", "a", "b")) if name != side})
    refused(merge(tmp_path), 3, tmp_path / side, "no such")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("side", ["base", "b"])
@pytest.mark.parametrize("kind", ["codes", "adapter", "pickle", "no weights"])
def test_one_of_another_kind_among_several(kind: str, side: str, tmp_path: Path) -> None:
    """A quantised model, an adapter, a pickled module or a bare folder among good ones is exit 3, and named."""
    models = {name: tensors(i) for i, name in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    weights = tmp_path / side / "model.safetensors"
    if kind == "codes":
        write(tmp_path, **{side: models[side] | {"layers.1.w": torch.ones(5, 7).to(torch.float8_e4m3fn)}})
    elif kind == "adapter":
        weights.rename(tmp_path / side / "adapter_model.safetensors")
    elif kind == "pickle":
        weights.unlink()
        torch.save(torch.nn.Linear(2, 2), tmp_path / side / "pytorch_model.bin")
    else:
        weights.unlink()
    refused(merge(tmp_path), 3, tmp_path / side)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="no other user to be")
@pytest.mark.parametrize(("path", "mode"), [
    ("b/model.safetensors", 0o000), ("b", 0o000), ("b/config.json", 0o000), ("a", 0o311), ("base/tokenizer.json", 0),
])  # fmt: skip
def test_no_permission_for_one_of_three(path: str, mode: int, tmp_path: Path) -> None:
    """What an ordinary user may not read among the inputs is exit 3 with its path, and nothing is left."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    for flags in ([], ["--dry-run"]):  # imports all it needs, which an ordinary user may not read
        merge(tmp_path, *flags, merge_method="ties", parameters={"density": 0.5}, out=f"warm{len(flags)}")
    with as_nobody() as folder:
        sides = ("base", "a", "b")
        write(folder, configs={s: {"model_type": "x"} for s in sides}, **{s: tensors(i) for i, s in enumerate(sides)})
        (folder / "base" / "tokenizer.json").write_text("{}")
        names = sorted(folder.rglob("*"))
        (folder / path).chmod(mode)
        ran = merge(folder, merge_method="ties", parameters={"density": 0.5})
        (folder / path).chmod(0o777)
        (folder / "merge.yaml").unlink()
        assert sorted(folder.rglob("*")) == names
        refused(ran, 3, folder / path, "ermission")


# --- the destination ---


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
@pytest.mark.parametrize("target", ["base", "a", "b", "b/model.safetensors", ".", "link", "b/../a"])
def test_an_output_over_any_input(target: str, method: str, tmp_path: Path) -> None:
    """Whichever of the inputs the output would replace or hold, it is refused, with --force and without."""
    folder = tmp_path / "models"
    write(folder, base=tensors(0), a=tensors(1), b=tensors(2))
    (folder / "link").symlink_to("b")
    before = snapshot(folder)
    base = {"base_model": None, "models": ["base", "a", "b"]} if method == "linear" else {}
    for flags in ([], ["--force"], ["--force", "--dry-run"]):
        ran = merge(folder, *flags, out=target, merge_method=method, **base)
        refused(ran, 6, "replace an input" if flags else "models")
        (folder / "merge.yaml").unlink()
        assert snapshot(folder) == before


def test_force_replaces_a_checkpoint(tmp_path: Path) -> None:
    """An output that exists is refused without --force, and replaced as a whole with it."""
    models = {side: tensors(seed) for seed, side in enumerate(("base", "a", "b"))}
    write(tmp_path, **models)
    write_checkpoint(tmp_path / "out", tensors(3), shards=2, config={"old": True})
    before = snapshot(tmp_path / "out")
    refused(merge(tmp_path), 6, "exists", "--force")
    assert snapshot(tmp_path / "out") == before
    assert merge(tmp_path, "--force").code == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "lines_recipe.yaml", "model.safetensors")
    ]
    same(output(tmp_path), {n: total(*(model[n] for model in models.values())) for n in models["base"]})


# --- failures on the way ---

PASSES = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": AUTO}


class Reads:
    """Stands in for `os.preadv`; of the reads of weights that of a given number raises."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None, error: BaseException | None = None):
        self.calls, self.at, self.error, self.real = 0, at, error, os.preadv
        monkeypatch.setattr(os, "preadv", self)

    def __call__(self, *args: Any) -> int:
        if not os.readlink(f"/proc/self/fd/{args[0]}").endswith("model.safetensors"):
            return self.real(*args)  # a small file
        self.calls += 1
        if self.calls == self.at and self.error is not None:
            raise self.error
        return self.real(*args)


READS = 3 * 3 * 5
"""One pass for thresholds, one for signs and norms, one that writes; three inputs of five tensors."""


@pytest.mark.parametrize(("out", "existing"), [("deep/er/out", False), ("out", True), ("out.safetensors", True)])
@pytest.mark.parametrize("at", [1, 14, 16, 30, 31, READS])
@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()], ids=["EIO", "Ctrl-C"]
)
@pytest.mark.some(8)
def test_a_read_that_fails(
    error: BaseException, at: int, out: str, existing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Wherever in the passes an input cannot be read, or Ctrl-C comes, the destination is as it was."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    if existing:
        write_checkpoint(tmp_path / out, tensors(3))
    before = snapshot(tmp_path)
    with monkeypatch.context() as patch:
        reads = Reads(patch, at, error)
        ran = merge(tmp_path, "--workers", 1, "--force", out=out, **PASSES)
    if isinstance(error, OSError):
        refused(ran, 3, "model.safetensors", "Input/output error")
    else:
        refused(ran, 130, "interrupted")
    assert reads.calls == at
    (tmp_path / "merge.yaml").unlink()
    after = snapshot(tmp_path)
    kept = at > READS * 2 // 3  # what was measured is worth to be kept
    assert (after != before) == kept
    if not (kept and "/" in out):  # the parents are there for what is kept
        assert without_staging(after) == before


@pytest.mark.parametrize("out", ["out.safetensors", "out"])
def test_how_often_inputs_are_read(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers above cover all passes: each reads every tensor of every input once. Nothing else is read."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    reads = Reads(monkeypatch)
    assert merge(tmp_path, "--workers", 1, out=out, **PASSES).code == 0
    assert reads.calls == READS


@pytest.mark.parametrize("side", ["base", "a", "b"])
def test_an_input_that_gets_shorter_between_the_passes(
    side: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An input cut short after the first pass is named with the tensor that it lost, and nothing is left."""
    write(tmp_path, base=tensors(0), a=tensors(1), b=tensors(2))
    file = tmp_path / side / "model.safetensors"
    reads = Reads(monkeypatch)
    real = reads.real

    def cutting(*args: Any) -> int:
        if reads.calls == 15:  # all of the first pass
            os.truncate(file, file.stat().st_size - 4)
        return real(*args)

    reads.real = cutting
    ran = merge(tmp_path, "--workers", 1, **PASSES)
    refused(ran, 3, file, "norm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "base", "merge.yaml"]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_while_measuring(number: signal.Signals, tmp_path: Path) -> None:
    """A run of four times 128 MB that is asked to end while it measures: 128 + signal, and the disk as it was."""
    head, infos = lay_out([(f"layers.{i}.w", "F32", (2**23,)) for i in range(4)], {})
    for side in ("base", "a", "b", "c"):
        (tmp_path / side).mkdir()
        with open(tmp_path / side / "model.safetensors", "wb") as file:
            file.write(head)
            file.truncate(len(head) + sum(info.nbytes for info in infos.values()))
    recipe = {"base_model": "base", "models": [{"model": side} for side in "abc"], **PASSES}
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(recipe))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def ended() -> None:
        """A run that is told to end as it has read some of the weights."""
        read, count = os.preadv, itertools.count(1)

        def some(fd: int, *args: Any) -> int:
            if os.readlink(f"/proc/self/fd/{fd}").endswith("model.safetensors") and next(count) == 6:
                os.kill(os.getpid(), number)
            return read(fd, *args)

        os.preadv = some
        forked.command("merge", "--config", "merge.yaml", "-o", "out", "--workers", "1")()

    process = forked.run(ended, cwd=tmp_path)
    out, err = process.stdout, process.stderr
    assert (process.returncode, out) == (128 + number, "")
    assert "interrupted" in err
    assert "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
