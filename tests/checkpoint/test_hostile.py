"""Files from strangers: they are read or refused, in bounded memory and time; nothing in them is run, no path of theirs
is followed, nothing is written.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lines_cli.checkpoint.header import read_header
from lines_cli.errors import CheckpointError
from support import forked, hostile
from support.files import write_raw
from support.run import run_lines

TIMES = {"header": 400, "pickle": 400, "torch_file": 200, "index": 300, "config": 300, "recipe": 100, "record": 80}
TIMES |= {"sidecar": 80}
LONG = {"header": 30_000, "pickle": 20_000, "torch_file": 15_000, "index": 15_000, "config": 10_000}
LONG |= {"recipe": 5_000, "record": 2_500, "sidecar": 2_500}
TESTS = Path(__file__).parents[1]
ANEW = """
import sys
from pathlib import Path
from support import forked, hostile

kind, folder, number, seed = sys.argv[1:]
forked.allow_more_memory(2**30)
print(*hostile.run(kind, Path(folder), int(number), int(seed)))
"""


def mutate(kind: str, folder: Path, number: int, seed: int, *, anew: bool = False) -> None:
    """In a fork, or in a Python begun anew, that may take 1 GiB more than it begins with, and a quarter of an hour."""

    def program() -> None:
        forked.allow_more_memory(2**30)
        print(*hostile.run(kind, folder, number, seed))

    if anew:
        command = [sys.executable, "-c", ANEW, kind, str(folder), str(number), str(seed)]
        ran: Any = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900, cwd=TESTS)
    else:
        ran = forked.run(program, timeout=900)
    assert ran.returncode == 0, ran.stderr[-4000:]
    read, refused = map(int, ran.stdout.split())
    assert read + refused == number
    assert refused > number // 4, "the mutations do no harm"


@pytest.mark.parametrize("kind", hostile.KINDS)
@pytest.mark.slow
def test_mutated_files(kind: str, tmp_path: Path) -> None:
    """Some hundred files of each kind with things wrong with them."""
    mutate(kind, tmp_path, TIMES[kind], 0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", hostile.KINDS)
def test_very_many_mutated_files(kind: str, tmp_path: Path) -> None:
    """100,000 of them. What ran before them may be Ray, whose threads do not survive a fork."""
    mutate(kind, tmp_path, LONG[kind], 1, anew=True)


def test_the_rules_are_watched(tmp_path: Path) -> None:
    """The guard sees what it should."""
    outside = tmp_path / "outside"
    outside.write_text("x")
    (tmp_path / "in").mkdir()
    with pytest.raises(AssertionError, match="outside the folder"), hostile.watched(tmp_path / "in"):
        outside.read_text()
    with pytest.raises(AssertionError, match="to be written"), hostile.watched(tmp_path / "in"):
        (tmp_path / "in" / "x").write_text("x")
    with pytest.raises(AssertionError, match="subprocess"), hostile.watched(tmp_path / "in"):
        subprocess.run(["true"], check=False)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SIZES = st.lists(st.integers(-2, 2**64) | st.integers(0, 9), max_size=4)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "BOOL", "F4", "F8_E4M3", "X"]) | JSON,
        "shape": SIZES | JSON,
        "data_offsets": st.lists(st.integers(0, 64), min_size=2, max_size=2) | SIZES | JSON,
    }
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(header=st.dictionaries(st.text(max_size=6), ENTRY | JSON, max_size=4) | JSON, data=st.binary(max_size=64))
def test_any_header(header: Any, data: bytes, tmp_path: Path) -> None:
    """Whatever JSON stands there: refused, or every tensor lies in the file, and no two overlap."""
    path = write_raw(tmp_path / "x.safetensors", json.dumps(header).encode(), data)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    end = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    for info in found.tensors.values():
        assert info.offset == end
        end += info.nbytes
    assert end == path.stat().st_size


PICKLE = b"cposix\nsystem\n(S'id'\ntR."  # runs `id` when it is loaded


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt", "model.safetensors"])
def test_a_pickle_is_never_loaded(name: str, tmp_path: Path) -> None:
    """By whatever name it comes."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / name).write_bytes(PICKLE)
    run_lines("inspect", folder)  # imports all that it needs
    with hostile.watched(tmp_path):
        for path in (folder, folder / name):
            ran = run_lines("inspect", path)
            assert (ran.code, ran.trace) == (3, "")


def test_recipes_that_want_more_than_a_recipe_may(tmp_path: Path) -> None:
    """Tags that make objects, and anchors that multiply."""
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{c}: &{c} [{','.join([f'*{p}'] * 9)}]\n" for p, c in zip("abcdefghi", "bcdefghij", strict=True)
    )
    for text in (
        "models: !!python/object/apply:os.system ['id']",
        "!!python/name:os.system ''",
        bomb,
        "&a [*a]",
        "a: &a {b: *a}",
    ):
        (tmp_path / "merge.yaml").write_text(text)
        run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")  # imports all that it needs
        with hostile.watched(tmp_path):
            ran = run_lines("merge", "--config", tmp_path / "merge.yaml", "-o", tmp_path / "out")
        assert (ran.code, ran.trace) == (2, ""), text
