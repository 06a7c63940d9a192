"""What a run keeps and says however it ends."""

from __future__ import annotations

import contextlib
import errno
import importlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import lines_cli as lines
from lines_cli.storage import destination, renames, staging
from lines_cli.storage.files import NewFile
from support import forked
from support.files import snapshot, write_checkpoint
from support.owning import EDIT, STAGING, meanwhile, stopped
from support.run import run_lines

# --- what is kept ---


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_once(number: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network disk that hiccups in the last tensor: what was finished is kept."""
    from lines_cli.engine import input_files, workers, write
    from lines_cli.engine import run as engine

    for name in ("engine.verify", "plan.division", "storage.object_staging"):
        importlib.import_module(f"lines_cli.{name}")  # or else they would keep the small block for all tests to come

    read, calls = input_files.read_into, []

    def failing(fd: int, view: memoryview, offset: int) -> int:
        calls.append(offset)
        if len(calls) == 8:
            raise OSError(number, os.strerror(number))
        return read(fd, view, offset)

    with monkeypatch.context() as patch:
        patch.setattr(input_files, "read_into", failing)
        patch.setattr(engine, "DIGEST_BLOCK", 16384)
        patch.setattr(write, "DIGEST_BLOCK", 16384)
        patch.setattr(staging, "DIGEST_BLOCK", 16384)
        patch.setattr("lines_cli.storage.digest.DIGEST_BLOCK", 16384)
        patch.setattr(workers, "WRITE_SIZE", 4096)
        ran = run_lines(*EDIT, "--workers", "1")
        assert (ran.code, ran.trace) == (3, "")
        assert STAGING in ran.err
        assert "--resume" in ran.err
        patch.setattr(input_files, "read_into", read)
        assert run_lines(*EDIT, "--resume").code == 0
    assert run_lines(*EDIT[:-1], "again").code == 0
    for name in ("model.safetensors", "config.json", "vocab.txt"):
        assert (models / "out" / name).read_bytes() == (models / "again" / name).read_bytes()


def test_a_sidecar_that_goes_in_the_last_second(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands beside the weights is read first: it is in the output, though it has gone since."""
    meanwhile(monkeypatch, (models / "ft" / "vocab.txt").unlink)
    assert run_lines(*EDIT).code == 0
    assert (models / "out" / "vocab.txt").read_text() == "a\nb\n"


def test_a_sidecar_that_cannot_be_read_is_refused_first(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are written, not after an hour of it."""
    wrote = []
    monkeypatch.setattr(NewFile, "write", lambda *args: wrote.append(args))
    recipe = lines.edit_recipe("base", "ft")
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), Path("out"))
    (models / "ft" / "vocab.txt").unlink()
    with pytest.raises(lines.LinesError, match=r"vocab\.txt"):
        lines.run(plan)
    assert not wrote
    assert not (models / STAGING).exists()


# --- what is said, and when ---


@pytest.mark.durable
@pytest.mark.parametrize("when", ["removing", "parent", "interrupted"])
def test_what_is_said_once_it_is_in_place(when: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the destination is not as it was, and nobody says so."""
    assert run_lines(*EDIT).code == 0
    before = snapshot(models / "out")["model.safetensors"]

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "removing":
            patch.setattr(staging.Staging, "_remove_old", interrupted)
        elif when == "interrupted":
            change = renames.exchange
            patch.setattr(staging, "exchange", lambda *paths: change(*paths) and interrupted())
        else:
            sync = destination.sync_folder

            def failing(folder: Path) -> None:
                if folder == models and (models / STAGING / "new" / "README.md").exists():
                    raise OSError(errno.EIO, "Input/output error")
                sync(folder)

            patch.setattr(staging, "sync_folder", failing)
        ran = run_lines(*EDIT, "--alpha", "0.5", "--force")
    assert ran.trace == ""
    assert "as it was" not in ran.err
    assert "is in place" in ran.err or "was in place" in ran.err
    assert ran.code == (6 if when == "parent" else 0)
    assert snapshot(models / "out")["model.safetensors"] != before
    assert run_lines("inspect", "out", "--check").code == 0
    assert run_lines("clean", "out").code == 0
    assert not (models / STAGING).exists()


MOMENTS = {"a few": (0, 2, 4), "the others": (1, 3, 5, 6, 7)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moments"),
    [
        (signal.SIGINT, "a few"),
        pytest.param(signal.SIGTERM, "a few", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "a few", marks=pytest.mark.slow),
        *(
            pytest.param(number, "the others", marks=pytest.mark.slow)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        ),
    ],
)
def test_a_signal_while_it_starts(number: signal.Signals, moments: str, models: Path) -> None:
    """At any moment of the start and of torch's import: 128 + the signal and a message, never a traceback, an abort, or
    another signal's code.
    """
    program = (
        "import os, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from lines_cli.__main__ import main\n"
        "from lines_cli.cli import signals; signals.install()\n"
        "print('!', end='', file=sys.stderr, flush=True); sys.argv[0] = 'lines'; main()"
    )
    codes = Counter[int]()
    for step in MOMENTS[moments]:
        command = [sys.executable, "-c", program, "edit", "base", "ft", "-o", "out"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            assert process.stderr is not None
            assert process.stderr.read(1) == b"!"
            time.sleep(step * 0.15)
            process.send_signal(number)
            err = process.stderr.read().decode()
            codes[process.wait(60)] += 1
        assert process.returncode in (128 + number, 0), err
        assert "Traceback" not in err
        if process.returncode:
            assert f"interrupted ({number.name})" in err
            assert not (models / "out").exists()
        shutil.rmtree(models / "out", ignore_errors=True)
        shutil.rmtree(models / STAGING, ignore_errors=True)
    assert codes[128 + number] >= 2


TORN_DOWN = """
import ctypes, os, signal, sys
from lines_cli.cli import signals
signals.install()
libc = ctypes.CDLL(None)
libc.__cxa_atexit(libc.abort, None, None)  # as C++ ends a process whose threads it has not joined
import lines_cli.recipe.validate as validate
validate.edit_recipe = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)
from lines_cli.__main__ import main
sys.argv = ["lines", "edit", "base", "ft", "-o", "out"]
main()
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="calls the C library")
def test_an_interrupted_process_tears_no_library_down(models: Path) -> None:
    """Its exit code is that of the signal, whatever a library would do at its end."""
    done = subprocess.run([sys.executable, "-c", TORN_DOWN], capture_output=True, text=True, check=False, cwd=models)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert "error: interrupted (SIGTERM)" in done.stderr
    assert "Traceback" not in done.stderr


SWALLOWED = """
import os, signal, sys
from lines_cli.cli import signals
signals.install()
import lines_cli.recipe.validate as validate

def swallowing(*_, **__):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except BaseException as error:
        raise ValueError(f"Error building a schema: {type(error).__name__}") from None

validate.edit_recipe = swallowing
from lines_cli.__main__ import main
sys.argv = ["lines", "edit", "base", "ft", "-o", "out"]
main()
"""


@pytest.mark.slow
def test_a_signal_that_a_library_makes_something_else_of(models: Path) -> None:
    """As pydantic's core does while it builds a model: it is the interruption that is told."""
    ran = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False, cwd=models)
    assert ran.returncode == 128 + signal.SIGTERM
    assert "interrupted (SIGTERM); the destination is as it was" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (models / "out").exists()


IMPORTED = """
import os, signal, sys
from lines_cli.cli import signals
signals.install()

from lines_cli.__main__ import main
name, sys.argv = sys.argv[1], ["lines", "edit", "base", "ft", "-o", "out"]
assert name not in sys.modules, name

class Killing:
    def find_spec(self, sought, *_):
        if sought == name:
            os.kill(os.getpid(), signal.SIGTERM)

sys.meta_path.insert(0, Killing())
main()
"""


@pytest.mark.parametrize("module", ["yaml._yaml", "lines_cli.cli.console", "lines_cli.recipe.schema", "torch._C"])
@pytest.mark.slow
def test_a_signal_while_a_command_imports(module: str, models: Path) -> None:
    """It is minded once the import is over: until then C code would swallow it, and the module would stay half made."""
    command = [sys.executable, "-c", IMPORTED, module]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=models)
    assert ran.returncode == 128 + signal.SIGTERM, ran.stderr
    assert "interrupted (SIGTERM); the destination is as it was" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert not (models / "out").exists()


@pytest.mark.slow
def test_home(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--output=~/out` is in the home folder, as a shell would have it; so are a recipe, a plot and what is cleaned."""
    monkeypatch.setenv("HOME", str(models / "home"))
    (models / "home").mkdir()
    assert run_lines("edit", "base", "ft", "--output=~/out").code == 0
    assert (models / "home" / "out" / "config.json").exists()
    assert run_lines("merge", "--config=~/out/lines_recipe.yaml", "--output=~/again").code == 0
    assert (models / "home" / "again" / "config.json").exists()
    assert run_lines("inspect", "ft", "--base", "base", "--plot=~/plot.svg").code == 0
    assert (models / "home" / "plot.svg").exists()
    assert "nothing to remove" in run_lines("clean", "~/out").err
    ran = run_lines("edit", "base", "ft", "--output=~nobody-of-that-name/out")
    assert (ran.code, ran.trace) == (2, "")
    assert "nobody-of-that-name" in ran.err
    assert not list(models.glob("~*"))


@pytest.mark.slow
def test_a_dry_run_writes_nothing(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a lock, and a leftover stays as it is; nor does it with --resume where all is finished."""

    def times() -> dict[Path, int]:
        return {path: path.lstat().st_mtime_ns for path in [models, *models.rglob("*")]}

    before = times()
    assert run_lines(*EDIT, "--dry-run").code == 0
    assert times() == before
    stopped(monkeypatch, *EDIT)
    (models / STAGING / "lock").unlink()
    before = times()
    for flags in ([], ["--resume"], ["--force"], ["--verify"]):
        assert run_lines(*EDIT, "--dry-run", *flags).code == 0
        assert times() == before
    shutil.move(models / STAGING, models / "kept")
    assert run_lines(*EDIT).code == 0
    shutil.move(models / "kept", models / STAGING)
    before = times()
    assert run_lines(*EDIT, "--dry-run", "--resume").code == 0
    assert times() == before


@pytest.mark.slow
def test_verify_of_what_is_finished(models: Path) -> None:
    """--resume --verify --verify-inputs reads an output that is finished, and its inputs, as it would a new one."""
    flags = ["--resume", "--verify", "--verify-inputs"]
    assert run_lines(*EDIT, "--verify-inputs").code == 0
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (0, "")
    assert "reads back as it was written" in ran.err
    weights = models / "out" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"\1")
    assert run_lines(*EDIT, "--resume").code == 0, "it is not read, unless asked for"
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (6, "")
    assert "model.safetensors" in ran.err
    weights.write_bytes(content)
    source = models / "ft" / "model.safetensors"
    there = source.stat()
    source.write_bytes(source.read_bytes()[:-1] + b"\1")
    os.utime(source, ns=(there.st_atime_ns, there.st_mtime_ns))
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (3, "")
    assert "ft/model.safetensors" in ran.err
    shutil.rmtree(models / "out")
    assert run_lines(*EDIT).code == 0
    ran = run_lines(*EDIT, *flags)
    assert (ran.code, ran.trace) == (6, "")
    assert "without --verify-inputs" in ran.err


@contextlib.contextmanager
def overlay(folder: Path, lower: Path) -> Iterator[Path]:
    """A folder whose content comes from an image, as in a container."""
    for name in ("upper", "work", "merged"):
        (folder / name).mkdir()
    options = f"lowerdir={lower},upperdir={folder / 'upper'},workdir={folder / 'work'}"
    mount = ["mount", "-t", "overlay", "overlay", "-o", options, str(folder / "merged")]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no overlayfs here")
    try:
        yield folder / "merged"
    finally:
        subprocess.run(["umount", str(folder / "merged")], check=True)


@pytest.mark.durable
@pytest.mark.parametrize("what", ["a leftover", "an output", "both"])
@pytest.mark.slow
def test_folders_that_came_with_an_image(what: str, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On overlayfs these cannot be renamed or exchanged (EXDEV): their files are moved."""
    if what != "a leftover":
        assert run_lines(*EDIT, "--alpha", "0.5").code == 0
    if what != "an output":
        stopped(monkeypatch, *EDIT, "--force")
    (models / "overlay").mkdir()
    lower = models / "lower"
    lower.mkdir()
    for entry in ("base", "ft", "out", STAGING):
        if (models / entry).exists():
            shutil.move(models / entry, lower / entry)
    with overlay(models / "overlay", lower) as merged:
        monkeypatch.chdir(merged)
        ran = run_lines(*EDIT, "--force")
        assert (ran.code, ran.trace) == (0, ""), ran.err
        assert run_lines("inspect", "out", "--check").code == 0
        assert not list(merged.glob(".*"))
        assert run_lines(*EDIT, "--alpha", "0.7", "--force").code == 0
        monkeypatch.chdir(models)


@pytest.mark.durable
@pytest.mark.parametrize("after", range(1, 8))
@pytest.mark.some(5)
def test_killed_while_files_are_moved(after: int, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a folder has to be moved file by file, a kill at any of them loses none: the old output comes back."""
    assert run_lines(*EDIT).code == 0
    old = snapshot(models / "out")
    with monkeypatch.context() as patch:
        patch.setattr(staging, "exchange", lambda *_: False)
        patch.setattr(staging.Staging, "__exit__", lambda self, *_: self._lock.release())
        patch.setattr(staging, "_bring_back", lambda *_: None)
        rename, move, moved = os.rename, renames.put, []

        def cannot(source: Any, target: Any) -> None:
            if Path(source).name == "out":
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            if Path(target).name == "out":
                raise KeyboardInterrupt
            rename(source, target)

        def killed(source: Path, target: Path) -> None:
            moved.append(source)
            if len(moved) == after:
                raise KeyboardInterrupt
            move(source, target)

        patch.setattr(os, "rename", cannot)
        patch.setattr(renames, "put", killed)
        assert run_lines(*EDIT, "--alpha", "0.5", "--force").code == 130
    assert len(snapshot(models / "out") if (models / "out").exists() else {}) == max(0, len(old) - after + 1)
    assert run_lines("clean", "out").code == 0
    assert snapshot(models / "out") == old


@pytest.mark.slow
def test_more_shards_than_files_may_be_open(models: Path) -> None:
    """The soft limit of open files is raised as far as outputs need it, too."""
    tensors = {f"layers.{i}.w": torch.randn(8) for i in range(300)}
    for side in ("base", "ft"):
        write_checkpoint(models / side, tensors, config={"model_type": "tiny"})

    def program() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        forked.command(*EDIT, "--max-shard-size", "32")()

    assert resource.getrlimit(resource.RLIMIT_NOFILE)[1] > 1000
    ran = forked.run(program)
    assert ran.returncode == 0, ran.stderr
    assert len(list((models / "out").glob("*.safetensors"))) == 300


@pytest.mark.durable
def test_folders_are_flushed(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Subfolders of the output and parents that were made for it, too: else their names may be lost with the power."""
    (models / "ft" / "1_Pooling").mkdir()
    (models / "ft" / "1_Pooling" / "config.json").write_text("{}")
    flushed = []
    sync = os.fsync

    def watched(fd: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{fd}"))
        sync(fd)

    monkeypatch.setattr(os, "fsync", watched)
    assert run_lines("edit", "base", "ft", "-o", "deep/er/out").code == 0
    new = models / "deep" / "er" / STAGING / "new"
    for folder in (models, models / "deep", models / "deep" / "er", new, new / "1_Pooling"):
        assert str(folder) in flushed


@pytest.mark.durable
def test_a_bad_line_ends_the_story(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digit that changed in a journal is noticed: that line and all behind it are made again."""
    assert run_lines(*EDIT).code == 0
    expected = snapshot(models / "out")
    shutil.rmtree(models / "out")
    stopped(monkeypatch, *EDIT)
    journal = models / STAGING / "journal"
    lines_ = journal.read_bytes().splitlines(keepends=True)
    at = next(n for n, line in enumerate(lines_) if b'"blocks"' in line)
    lines_[at] = lines_[at].replace(b'"start":0', b'"start":4')
    journal.write_bytes(b"".join(lines_))
    wrote: list[int] = []
    write = NewFile.write
    monkeypatch.setattr(NewFile, "write", lambda *args: (wrote.append(1), write(*args))[1])
    assert run_lines(*EDIT, "--resume").code == 0
    assert wrote
    assert snapshot(models / "out") == expected


def test_progress_is_told(models: Path) -> None:
    """The library's own user is told of what was left behind."""

    def track(_: str, __: int, done: Iterable[int]) -> Iterable[int]:
        return done

    recipe = lines.edit_recipe("base", "ft")
    outcome = lines.run(lines.make_plan(recipe, lines.open_inputs(recipe), Path("out")), track=track)
    assert outcome.remarks == ()
