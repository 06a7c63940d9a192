"""Candidates on the disk: what they share, and that an evaluation which writes into one harms nothing else."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

import lines_cli as lines
from lines_cli.engine.candidate_files import reflink, tells_of_changes, written_elsewhere
from support.files import snapshot
from support.run import run_lines
from support.sweeps import inputs_in, python, sweep_yaml

# Says what it sees, then does harm.
WITNESS = """
import hashlib, json, mmap, os, shutil, subprocess, sys, time

folder, harm = sys.argv[1:3]
seen, links, nodes, times = {}, {}, {}, {}
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    there = os.stat(path)
    seen[name] = int(hashlib.sha256(open(path, "rb").read()).hexdigest()[:12], 16)
    links[name], nodes[name], times[name] = there.st_nlink, there.st_ino, there.st_mtime_ns
files = [os.path.join(folder, name) for name in seen if name.endswith(".safetensors")]
first, last = files[0], files[-1]
size = os.path.getsize(last)

if harm == "overwrite":
    for path in files:
        with open(path, "r+b") as file:
            file.write(b"nonsense" * (size // 16))
elif harm == "overwrite and set the time back":
    for path in files:
        there = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(-8, 2)
            file.write(b"nonsense")
        os.utime(path, ns=(there.st_atime_ns, there.st_mtime_ns))
elif harm == "map":
    for path in files:
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            assert mapped[-1] is not None
            mapped[-8:] = b"nonsense"
elif harm == "append":
    with open(last, "ab") as file:
        file.write(b"more")
elif harm == "truncate":
    os.truncate(last, 10)
elif harm == "replace":
    for path in files:
        shutil.copyfile("base/" + os.path.basename(path), path + ".new")
        os.replace(path + ".new", path)
elif harm == "link to the base":
    for path in files:
        os.unlink(path)
        os.symlink(os.path.abspath("base/" + os.path.basename(path)), path)
elif harm == "hard link to the base":
    for path in files:
        os.unlink(path)
        os.link("base/" + os.path.basename(path), path)
elif harm == "link of its own":
    os.link(last, "kept-" + os.path.basename(folder))
elif harm == "delete a file":
    os.unlink(first)
elif harm == "delete":
    shutil.rmtree(folder)
elif harm == "delete all":
    shutil.rmtree(os.path.dirname(folder))
elif harm == "a folder in a file's place":
    os.unlink(last)
    os.makedirs(last + "/deep")
elif harm == "a link in the folder's place":
    shutil.rmtree(folder)
    os.symlink(os.path.abspath("base"), folder)
elif harm == "rights":
    os.makedirs(folder + "/cache/inner")
    open(folder + "/cache/inner/file", "w").close()
    os.chmod(folder + "/cache/inner", 0)
    for path in files:
        os.chmod(path, 0o444)
    os.chmod(folder, 0o500)
elif harm == "litter":
    os.makedirs(folder + "/results/deep")
    open(folder + "/results/deep/out.json", "w").close()
    os.symlink("/", folder + "/root")
elif harm == "a process that stays":
    code = (
        "import os, sys, time\\n"
        "files = [open(p, 'r+b') for p in sys.argv[1:]]\\n"
        "print(flush=True)\\n"
        "until = time.monotonic() + 60\\n"
        "while time.monotonic() < until and not os.path.exists('stop'):\\n"
        "    for file in files:\\n"
        "        file.seek(-8, 2)\\n"
        "        file.write(b'nonsense')\\n"
        "        file.flush()\\n"
        "    time.sleep(0.01)\\n"
    )
    stays = subprocess.Popen(
        [sys.executable, "-S", "-c", code, *files], stdout=subprocess.PIPE, start_new_session=True
    )
    stays.stdout.readline()
print(json.dumps({"seen": seen, "links": links, "nodes": nodes, "times": times}))
"""
HARMS = [
    "nothing", "overwrite", "overwrite and set the time back", "map", "append", "truncate", "replace",
    "link to the base", "hard link to the base", "link of its own", "delete a file", "delete", "delete all",
    "a folder in a file's place", "a link in the folder's place", "rights", "litter", "a process that stays",
]  # fmt: skip
QUICK = ["overwrite and set the time back", "hard link to the base", "delete all", "rights", "a process that stays"]
SHARD = 130  # bytes: one tensor
GRID = {"lines.schedule": [[0.5, 0.2, 0.7, 1.0], [0.5, 0.2, 0.3, 1.0], [0.5, 0.2, 0.3, 0.0], [0.4, 0.2, 0.3, 0.0]]}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and a fine-tune of a file for each layer, in which the process works."""
    monkeypatch.chdir(tmp_path)
    inputs_in(tmp_path, shards=True)
    (tmp_path / "witness.py").write_text(WITNESS)
    return tmp_path


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same on a filesystem in memory, which does not tell of every change."""
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("no filesystem in memory")
    folder = Path(tempfile.mkdtemp(dir="/dev/shm"))
    monkeypatch.chdir(folder)
    inputs_in(folder, shards=True)
    (folder / "witness.py").write_text(WITNESS)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep_with(harm: str, *more: object, **said: Any) -> list[dict[str, Any]]:
    """The trials of a sweep whose evaluation does harm: in each what it saw before that."""
    config = sweep_yaml(
        **{
            "recipe": {"base": "base", "ft": "ft", "max_shard_size": SHARD},
            "grid": GRID,
            "evaluate": python(f'witness.py {{checkpoint}} "{harm}"'),
            "objective": "mean(seen)",
            "controls": False,
            **said,
        }
    )
    ran = run_lines("sweep", "--config", config, "-o", "best", "--json", *more)
    Path("stop").touch()
    assert (ran.code, ran.trace) == (0, ""), ran.err
    found: list[dict[str, Any]] = ran.json["trials"]
    assert not [trial["error"] for trial in found if trial["error"]]
    return found


def digests(folder: str) -> dict[str, float]:
    return {
        path.name: float(int(hashlib.sha256(path.read_bytes()).hexdigest()[:12], 16))
        for path in Path(folder).iterdir()
        if path.name.endswith(".safetensors")
    }


@functools.cache  # every test has the same inputs
def edited(schedule: tuple[float, ...]) -> dict[str, float]:
    lines.edit("base", "ft", "reference", schedule=list(schedule), max_shard_size=SHARD, force=True)
    return digests("reference")


def weights(seen: dict[str, float]) -> dict[str, float]:
    return {name: digest for name, digest in seen.items() if name.endswith(".safetensors")}


def check(trials: list[dict[str, Any]]) -> None:
    """Each evaluation saw what `lines edit` writes at the same values."""
    assert len(trials) >= len(GRID["lines.schedule"])
    for trial in trials:
        assert weights(trial["metrics"]["seen"]) == edited(tuple(trial["settings"]["lines.schedule"]))


def quick(*harms: str, of: Sequence[str]) -> list[Any]:
    return [pytest.param(harm, marks=() if harm in harms else pytest.mark.slow) for harm in of]


@pytest.mark.parametrize("harm", quick(*QUICK, of=HARMS))
@pytest.mark.slow
def test_an_evaluation_that_harms_its_candidate_harms_no_other(here: Path, harm: str) -> None:
    """Later candidates are what `lines edit` writes; the inputs are as before, and share no file with a candidate."""
    before = {name: snapshot(here / name) for name in ("base", "ft")}
    trials = sweep_with(harm)
    check(trials)
    assert {name: snapshot(here / name) for name in ("base", "ft")} == before
    assert not Path("best.sweep/candidates").exists()
    if harm not in ("hard link to the base", "link of its own"):
        assert {number for trial in trials for number in trial["metrics"]["links"].values()} == {1}


@pytest.mark.parametrize("harm", quick("map", of=["nothing", "map", "overwrite", "a process that stays"]))
@pytest.mark.slow
def test_in_memory_too(in_memory: Path, harm: str) -> None:
    """Where the system does not tell of changes through memory, nothing is taken over."""
    check(sweep_with(harm))


@pytest.mark.parametrize("harm", quick("map", "delete", of=["nothing", "map", "delete", "a process that stays"]))
@pytest.mark.slow
def test_side_by_side(here: Path, harm: str) -> None:
    """With several evaluations at a time, and a candidate evaluated again, too."""
    check(sweep_with(harm, "--parallel", 3, repeats=2))


@pytest.mark.slow
def test_what_does_not_change_stays(here: Path) -> None:
    """A shard that two candidates have in common is the same file, not written again."""
    if not tells_of_changes(here):
        pytest.skip("this filesystem does not tell of every change")
    seen = [trial["metrics"] for trial in sweep_with("nothing")]
    names = sorted(weights(seen[0]["seen"]))
    assert len(names) == 4
    for one, other in itertools.pairwise(seen):
        assert any(one["seen"][name] == other["seen"][name] for name in names)
        for name in names:
            assert one["nodes"][name] == other["nodes"][name]
            same = one["seen"][name] == other["seen"][name]
            assert (one["times"][name] == other["times"][name]) == same, name


@pytest.mark.slow
def test_a_baseline_is_a_copy(here: Path) -> None:
    """What an evaluation of X_pre and X_ft does to its checkpoint is not done to the base and to the fine-tune."""
    before = {name: snapshot(here / name) for name in ("base", "ft")}
    objective = "mean(seen - seen_pre) + mean(seen - seen_ft)"
    harmed, whole = (sweep_with(harm, "--force", objective=objective) for harm in ("overwrite", "nothing"))
    assert [trial["metrics"]["seen"] for trial in harmed] == [trial["metrics"]["seen"] for trial in whole]
    assert {name: snapshot(here / name) for name in ("base", "ft")} == before


@pytest.mark.parametrize("harm", quick("overwrite", of=["overwrite", "delete all"]))
@pytest.mark.slow
def test_of_a_merge_too(here: Path, harm: str) -> None:
    """The merged task vector, which is kept beside the candidates, has no name that an evaluation could find."""
    shutil.copytree("ft", "ft2")
    recipe = {
        "merge_method": "ties",
        "base_model": "base",
        "models": [{"model": "ft"}, {"model": "ft2"}],
        "parameters": {"density": 0.4},
        "lines": {"alpha": 0.3, "beta": 0.5},
        "max_shard_size": SHARD,
    }
    Path("merge.yaml").write_text(yaml.safe_dump(recipe))
    trials = sweep_with(harm, recipe="merge.yaml", objective="mean(seen)")
    for trial in trials:
        values = {**recipe, "lines": {"schedule": trial["settings"]["lines.schedule"]}}
        Path("other.yaml").write_text(yaml.safe_dump(values))
        lines.merge("other.yaml", "reference", force=True)
        assert weights(trial["metrics"]["seen"]) == digests("reference"), trial["settings"]


def test_what_can_be_told_of_a_file(tmp_path: Path) -> None:
    """Somebody has it open for writing, or nobody has."""
    path = tmp_path / "file"
    path.write_bytes(b"x")
    if not tells_of_changes(tmp_path):
        pytest.skip("this filesystem does not tell of every change")
    assert not written_elsewhere(path)
    with open(path, "rb"):
        assert not written_elsewhere(path)
    with open(path, "r+b"):
        assert written_elsewhere(path)
    assert written_elsewhere(tmp_path / "none")
    assert os.listdir(tmp_path) == ["file"]


def test_reflinks(tmp_path: Path) -> None:
    """A file of the same bytes that is written to apart, or none and nothing left behind."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"x" * 10_000)
    if reflink(one, other):
        other.write_bytes(b"y")
        assert one.read_bytes() == b"x" * 10_000
    else:
        assert os.listdir(tmp_path) == ["one"]
