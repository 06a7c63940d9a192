"""`lines merge --on ray`: a cluster of three nodes on this machine, the same bytes; nodes and drivers that are lost."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.api import on_ray
from lines_cli.api.on_ray import Task, address_of, needs_of, plan_beside
from lines_cli.errors import ChangedInputError, OutputError, RecipeError
from lines_cli.plan.resources import Resources
from lines_cli.storage.lock import RunLock
from lines_cli.storage.staging import staging_of
from support.files import write_checkpoint
from support.ray_cluster import ON_A_CLUSTER, kill_node, nodes_of, renew, three_nodes
from support.run import Ran, run_lines

RECIPES: dict[str, dict[str, Any]] = {
    "ties": {"merge_method": "ties", "parameters": {"density": 0.3}, "lines": {"alpha": "auto", "beta": 0.5}},
    "dare": {"merge_method": "dare_ties", "parameters": {"density": 0.4, "rescale": "l1"}},
    "sum": {"merge_method": "task_arithmetic", "lines": {"alpha": 0.2, "beta": 0.3}},
}


@pytest.mark.parametrize("said", ["", "ray:", "ray://", "spark", "http://x", "RAY"])
def test_what_is_no_engine(said: str) -> None:
    with pytest.raises(RecipeError, match="not an engine"):
        address_of(said)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has not installed it reads what to install; nothing is written."""
    monkeypatch.chdir(tmp_path)
    models(tmp_path, 1000)
    write_recipe(**RECIPES["sum"])
    monkeypatch.setitem(sys.modules, "ray", None)
    ran = run_lines("merge", "--config", "merge.yaml", "-o", "out", "--on", "ray")
    assert (ran.code, ran.trace) == (2, "")
    assert "ray is not installed" in ran.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.slow
def test_a_cluster_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused at once, with the address; Ray itself would wait long, and end the process."""
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    models(tmp_path, 1000)
    write_recipe(**RECIPES["sum"])
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # who has the port, and does not listen
        port = nobody.getsockname()[1]
        for said in (f"ray://127.0.0.1:{port}", "ray"):
            monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
            ran = run_lines("merge", "--config", "merge.yaml", "-o", "out", "--on", said)
            assert (ran.code, ran.trace) == (6, ""), ran.err
            assert f"127.0.0.1:{port} cannot be reached" in ran.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, "nobody answered for 1 s"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "what answers there is not Ray"),
        (b"", "cannot be reached"),
    ],
    ids=["nothing", "http", "closed"],
)
def test_something_else_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, words: str
) -> None:
    """Whoever answers something else, or nothing for some seconds, is no cluster: it is not waited for any longer."""
    pytest.importorskip("ray")
    monkeypatch.chdir(tmp_path)
    if answer is None:
        monkeypatch.setattr(on_ray, "_WAIT", 1.0)
    models(tmp_path, 1000)
    write_recipe(**RECIPES["sum"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        said = f"ray://127.0.0.1:{server.getsockname()[1]}"
        held: list[socket.socket] = []

        def serve() -> None:
            held.append(server.accept()[0])
            if answer is not None:
                held[0].recv(100)
                held[0].sendall(answer)
                held[0].close()

        thread = threading.Thread(target=serve)
        thread.start()
        ran = run_lines("merge", "--config", "merge.yaml", "-o", "out", "--on", said)
        thread.join()
    assert (ran.code, ran.trace) == (6, ""), ran.err
    assert words in ran.err
    held[0].close()


def test_where_jobs_are_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit` reads the same variable, and takes another kind of address: that is said, and what to do."""
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(RecipeError, match="where jobs are submitted") as refused, on_ray.connected(None):
        pass
    assert "ray://HEAD:10001" in str(refused.value.hint)


def test_a_cluster_that_asks_for_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not say in its error why it is not let in; so whoever is not reads of the token."""
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "head")
    monkeypatch.setattr(ray, "init", lambda **_: (_ for _ in ()).throw(RuntimeError("Failed to connect")))
    with pytest.raises(OutputError, match="cannot be reached: Failed to connect") as refused, on_ray.connected(None):
        pass
    assert "RAY_AUTH_MODE=token" in str(refused.value.hint)
    assert "RAY_AUTH_TOKEN" in str(refused.value.hint)


def test_a_node_without_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that cannot begin where the driver could says on which node, and what all nodes need; of an input that was
    changed meanwhile it says that.
    """
    monkeypatch.chdir(tmp_path)
    models(tmp_path, 1000)
    write_recipe(**RECIPES["sum"])
    run_lines("plan", "--config", "merge.yaml", "-o", "out")
    node = socket.gethostname()
    with pytest.raises(OutputError, match=f"node {node} cannot begin part 1: .*gone.json") as refused:
        on_ray._do_part(str(tmp_path / "gone.json"), 1, 1, Resources())
    assert "by the same paths" in str(refused.value.hint)
    os.utime("ft/config.json")
    for file in Path("ft").glob("*.safetensors"):
        os.utime(file, (1, 1))
    with pytest.raises(ChangedInputError, match=f"node {node} cannot begin"):
        on_ray._do_part(str(tmp_path / "plan.json"), 1, 1, Resources())
    shutil.rmtree("ft")
    with pytest.raises(OutputError, match=f"node {node} cannot begin part 1: .*ft"):
        on_ray._do_part(str(tmp_path / "plan.json"), 1, 1, Resources())


def test_clean_removes_the_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`lines clean` removes what a run on Ray leaves: its parts, and its plan; of that name nothing that is no plan."""
    monkeypatch.chdir(tmp_path)
    models(tmp_path, 1000)
    write_recipe(**RECIPES["sum"])
    before = {path.name for path in tmp_path.iterdir()}
    run_lines("plan", "--config", "merge.yaml", "-o", "out", "--plan", ".out.lines-plan.json")
    assert plan_beside(Path("out")).exists()
    assert run_lines("clean", "out").code == 0
    assert {path.name for path in tmp_path.iterdir()} == before
    plan_beside(Path("out")).write_text("{}")
    assert run_lines("clean", "out").code == 0
    assert plan_beside(Path("out")).exists()


def models(folder: Path, entries: int) -> None:
    for seed, side in enumerate(("base", "ft", "ft2")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(entries, generator=chance) for i in range(4)}
        write_checkpoint(folder / side, tensors, shards=2, config={"model_type": "tiny"})


def write_recipe(**keys: Any) -> None:
    values = {"base_model": "base", "models": [{"model": "ft"}, {"model": "ft2"}], **keys}
    Path("merge.yaml").write_text(yaml.safe_dump(values))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with three_nodes() as made:
        yield made


@pytest.fixture
def client(cluster: Any) -> str:
    """The address at which the head lets others in."""
    return f"ray://{cluster.address.partition(':')[0]}:{cluster.head_node._ray_params.ray_client_server_port}"


@pytest.fixture
def here(cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    renew(cluster)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    models(tmp_path, 1_500_000)
    write_recipe(**RECIPES["ties"])
    return tmp_path


COMMAND = ["merge", "--config", "merge.yaml", "-o", "out"]
SAID = Path("driver.txt")


def ran(*arguments: object) -> Ran:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Ray's own
        done = run_lines(*arguments)
    assert not done.trace, done.trace
    assert done.code == 0, done.err
    return done


def in_one_piece() -> dict[str, bytes]:
    ran(*COMMAND)
    files = contents()
    shutil.rmtree("out")
    return files


def contents() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path("out").iterdir()}


@contextmanager
def a_driver() -> Iterator[subprocess.Popen[bytes]]:
    """The command on Ray, in a process of its own. What it says goes into a file: of each node that is lost Ray says
    pages, and a pipe that nobody reads is full after a few.
    """
    command = [sys.executable, "-m", "lines_cli", *COMMAND, "--on", "ray"]
    with (
        SAID.open("w") as said,
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as driver,
    ):
        try:
            yield driver
        finally:
            driver.kill()


def wait_for_a_part(records: Path) -> None:
    """Return once a part is done, or after two minutes."""
    until = time.monotonic() + 120
    while not any(path.name.isdigit() for path in records.glob("*")) and time.monotonic() < until:
        time.sleep(0.05)


class TestOnACluster:
    """What takes one."""

    pytestmark = ON_A_CLUSTER

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_the_bytes_are_those_of_one_process(self, here: Path, recipe: str) -> None:
        """Every file of the output; and nothing is left beside it."""
        write_recipe(**RECIPES[recipe])
        whole = in_one_piece()
        before = {path.name for path in here.iterdir()}
        ran(*COMMAND, "--on", "ray")
        assert contents() == whole
        assert {path.name for path in here.iterdir()} == before | {"out"}
        assert "is finished" in ran(*COMMAND, "--on", "ray", "--resume").err

    def test_by_an_address(self, here: Path, client: str) -> None:
        """`ray://HOST:PORT`, as from a machine that is no node: a merge and an edit from Python."""
        whole = in_one_piece()
        ran(*COMMAND, "--on", client)
        assert contents() == whole
        found = []
        for on in (None, client):
            shutil.rmtree("out")
            lines.edit("base", "ft", "out", alpha=0.3, on=on)
            found.append(contents())
        assert found[0] == found[1]

    @pytest.mark.parametrize("failures", [2, 3])
    def test_a_head_that_fails_to_let_in(
        self, here: Path, client: str, monkeypatch: pytest.MonkeyPatch, failures: int
    ) -> None:
        """It is asked three times in all; whoever was not let in can still run elsewhere."""
        from ray.util.client.worker import Worker

        let_in, asked = Worker._server_init, 0

        def fails(self: Any, *args: Any, **kwargs: Any) -> None:
            nonlocal asked
            asked += 1
            if asked <= failures:
                raise ConnectionAbortedError("Initialization failure from server:\nthe process is gone")
            let_in(self, *args, **kwargs)

        monkeypatch.setattr(Worker, "_server_init", fails)
        monkeypatch.setattr(on_ray, "_PAUSE", 0.01)
        done = run_lines(*COMMAND, "--on", client)
        assert asked == min(failures + 1, 3)
        if failures < 3:
            assert (done.code, done.trace) == (0, ""), done.err
            shutil.rmtree("out")
        else:
            assert (done.code, done.trace) == (6, ""), done.err
            assert "cannot be reached: Initialization failure from server: the process is gone" in done.err
        ran(*COMMAND, "--on", "ray")

    def test_a_process_that_is_a_client_already(self, here: Path, client: str) -> None:
        """Another address is refused; the connection stays."""
        with on_ray.connected(client) as cluster:
            done = run_lines(*COMMAND, "--on", client)
            assert (done.code, done.trace) == (6, ""), done.err
            assert "ray.shutdown() ends that" in done.err
            assert cluster.cpus == 3

    def test_a_driver_that_is_lost(self, here: Path) -> None:
        """What its parts have done is kept; --resume goes on with the same plan."""
        whole = in_one_piece()
        records = here / ".out.lines" / "parts"
        with a_driver() as driver:
            wait_for_a_part(records)
            driver.kill()
        done = {path.name: path.stat().st_ino for path in records.glob("*") if path.name.isdigit()}
        assert done
        assert plan_beside(Path("out")).exists()
        until = time.monotonic() + 60
        while time.monotonic() < until:  # tasks of the old driver end with it
            if not _is_busy(here):
                break
            time.sleep(0.5)
        ran(*COMMAND, "--on", "ray", "--resume")
        assert contents() == whole

    def test_two_drivers(self, here: Path) -> None:
        """The second is refused, from the first's first part to its last, and disturbs nothing."""
        whole = in_one_piece()
        records = here / ".out.lines" / "parts"
        with a_driver() as driver:
            wait_for_a_part(records)
            driver.send_signal(signal.SIGSTOP)
            done, before = len(list(records.glob("*"))), -1
            while done != before:  # the parts of this stage come to their end
                time.sleep(4)
                done, before = len(list(records.glob("*"))), done
            second = run_lines(*COMMAND, "--on", "ray")
            driver.send_signal(signal.SIGCONT)
            assert (second.code, second.trace) == (6, ""), second.err
            assert "another run" in second.err
            assert driver.wait(120) == 0, SAID.read_text()
        assert contents() == whole
        assert "by an earlier run" not in SAID.read_text()

    def test_over_an_output_of_the_same_recipe(self, here: Path) -> None:
        """It was damaged, and is made again: with --force it is no reason to be done."""
        whole = in_one_piece()
        ran(*COMMAND)
        weights = next(Path("out").glob("*.safetensors"))
        weights.write_bytes(weights.read_bytes()[:-8] + bytes(8))
        ran(*COMMAND, "--on", "ray", "--force")
        assert contents() == whole
        assert not (here / ".out.lines").exists()
        assert "is finished" in ran(*COMMAND, "--on", "ray", "--force", "--resume").err

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
    def test_a_driver_that_is_told_to_end(self, here: Path, number: signal.Signals) -> None:
        """It ends as elsewhere, though Ray has a handler of its own: exit code, message, what is kept."""
        records = here / ".out.lines" / "parts"
        for _ in range(4):
            with a_driver() as driver:
                wait_for_a_part(records)
                driver.send_signal(number)
                code = driver.wait(120)
            said = SAID.read_text()
            if "discovered a bug in Ray" not in said:
                break
            run_lines("clean", "out")  # a task that ended as it was cancelled: then Ray ends the process
        assert code == 128 + number, said
        assert f"interrupted ({number.name}); the destination is as it was" in said
        assert "the same command with --resume continues from there" in said
        assert "received at" not in said  # Ray's words, above a stack
        run_lines("clean", "out")
        assert not plan_beside(Path("out")).exists()

    def test_other_versions_of_ray(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both sides' versions are said."""
        import ray

        there = ray.__version__
        monkeypatch.setattr(ray, "__version__", "2.0.0")
        done = run_lines(*COMMAND, "--on", "ray")
        assert (done.code, done.trace) == (6, ""), done.err
        assert f"has Ray {there}, Python" in done.err
        assert "and this process Ray 2.0.0, Python" in done.err

    def test_a_node_without_a_package(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A function that a node cannot import: which package, on which node; no pages of Ray's."""
        (here / "elsewhere").mkdir()
        (here / "elsewhere" / "only_here.py").write_text("def f(): pass\n")
        monkeypatch.syspath_prepend(here / "elsewhere")
        import only_here  # type: ignore[import-not-found]

        needs = needs_of(Resources(), lambda _: 2**20)
        with on_ray.connected(None) as cluster, pytest.raises(OutputError, match="only_here") as refused:
            list(cluster.each([Task("f", only_here.f, ())], needs))
        assert "a node of the Ray cluster (" in refused.value.message
        assert "\n" not in refused.value.message
        assert "on all nodes" in str(refused.value.hint)

    def test_a_part_that_is_refused(self, here: Path) -> None:
        """What a task refuses is said as one process says it, with its exit code; nothing comes into place."""
        bad = {f"layers.{i}.w": torch.ones(1_500_000) for i in range(4)}
        bad["layers.2.w"][9] = float("inf")
        shutil.rmtree("ft")
        write_checkpoint(here / "ft", bad, config={"model_type": "tiny"})
        before = {path.name for path in here.iterdir()}
        done = run_lines(*COMMAND, "--on", "ray")
        assert (done.code, done.trace) == (5, ""), done.err
        assert "layers.2.w" in done.err
        assert "is kept" not in done.err
        assert {path.name for path in here.iterdir()} == before

    @pytest.mark.parametrize(("kills", "seed"), [(7, 1), (7, 2), (6, 3)])
    def test_nodes_that_are_lost(self, here: Path, cluster: Any, kills: int, seed: int) -> None:
        """A node that is killed costs the parts that it was doing: another does them. Twenty in all, at random moments
        of merges of three passes.
        """
        whole = in_one_piece()
        chance, killed = random.Random(seed), 0
        while killed < kills:
            with a_driver() as driver:
                while driver.poll() is None:
                    with suppress(subprocess.TimeoutExpired):
                        driver.wait(chance.uniform(0.2, 2) if killed < kills else 2)
                    renew(cluster)
                    if driver.poll() is None and killed < kills and (here / ".out.lines").exists():
                        kill_node(cluster, chance.choice(nodes_of(cluster)))
                        killed += 1
                assert driver.wait() == 0, SAID.read_text()
            assert contents() == whole
            shutil.rmtree("out")


def _is_busy(folder: Path) -> bool:
    """Whether a part is at work."""
    try:
        RunLock(staging_of(folder / "out"), folder / "out").release()
    except OutputError:
        return True
    return False
