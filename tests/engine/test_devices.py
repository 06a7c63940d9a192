"""Where a run computes: the bytes are the CPU's on any device, and its memory is bounded.

What a GPU adds to the CPU is memory of its own and the lack of it. Both are tried out here without one: buffers that
are apart from those of the host, though on the CPU too, and an allocator that says no.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lines_cli as lines
from lines_cli.engine import arithmetic, buffers, devices, pool, workers
from lines_cli.engine.devices import Devices, choose_devices
from lines_cli.engine.whole_tensors import Kept
from lines_cli.engine.workers import Worker
from lines_cli.plan.resources import SUM_BLOCK, BytesPerEntry, Resources
from lines_cli.recipe.yaml_file import load_recipe
from support.crossed import by_turns
from support.files import snapshot, write_checkpoint
from support.method_cases import TABLE
from support.run import run_lines

GB = 10**9
METHODS: dict[str, dict[str, Any]] = {
    method: {
        "merge_method": method,
        "parameters": dict(entry.typical[-1]),
        **({"base_model": None} if entry.on_weights else {}),
        **({"models": [{"model": "a"}]} if entry.models == 1 else {}),
        **({"lines": {"alpha": "auto", "beta": 0.5}} if method in ("ties", "iso_c") else {}),
    }
    for method, entry in TABLE.items()
}
"""Every method."""


def models(folder: Path) -> None:
    """Two models and a base, with tensors of several chunks, a head of other rows' dtype, a counter and a copy."""
    for seed, side in enumerate(("base", "a", "b")):
        chance = torch.Generator().manual_seed(seed)
        tensors = {f"layers.{i}.w": torch.randn(3 * SUM_BLOCK + 17, generator=chance).bfloat16() for i in range(2)}
        tensors |= {"layers.1.v": torch.randn(70, 5, generator=chance), "steps": torch.tensor(3)}
        tensors |= {"head": torch.randn(9, generator=chance).half()}
        write_checkpoint(folder / side, tensors)


def merged(folder: Path, out: str, recipe: dict[str, Any], resources: Resources) -> dict[str, bytes]:
    """The weight files of a merge."""
    values = {"base_model": "base", "models": [{"model": "a"}, {"model": "b"}], **recipe}
    (folder / "merge.yaml").write_text(yaml.safe_dump(values))
    asked = load_recipe(folder / "merge.yaml")
    lines.run(lines.make_plan(asked, lines.open_inputs(asked), folder / out), resources)
    return {path.name: path.read_bytes() for path in (folder / out).glob("*.safetensors")}


@pytest.fixture
def own_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Has the CPU treated as a device with memory of its own, so much of it."""

    def has(nbytes: int) -> None:
        for module in (devices, buffers, workers):
            monkeypatch.setattr(module, "has_own_memory", lambda _: True)
        monkeypatch.setattr(devices, "_total_memory", lambda _: nbytes)

    return has


@by_turns(method=METHODS, number=[1, 3])
@pytest.mark.some(6)
def test_memory_of_its_own_changes_no_byte(
    method: str, number: int, tmp_path: Path, own_memory: Callable[[int], None]
) -> None:
    """What goes through buffers of host and device, filled in turn, is what goes through one."""
    models(tmp_path)
    plain = merged(tmp_path, "plain", METHODS[method], Resources(device="cpu"))
    own_memory(8 * GB)
    assert merged(tmp_path, "apart", METHODS[method], Resources(device="cpu", workers=number, chunk=SUM_BLOCK)) == plain


@pytest.mark.slow
def test_edits_and_inspection_with_memory_of_its_own(tmp_path: Path, own_memory: Callable[[int], None]) -> None:
    """The other commands as well: an edit's bytes, and every number of `inspect`."""
    models(tmp_path)

    def told(out: str) -> tuple[bytes, Any]:
        assert run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / out).code == 0
        inspection = lines.open_inspection([str(tmp_path / "a"), str(tmp_path / "b")], base=str(tmp_path / "base"))
        findings = lines.compare(inspection, Resources(device="cpu", chunk=SUM_BLOCK))
        return (tmp_path / out / "model.safetensors").read_bytes(), replace(findings, seconds=0.0)

    plain = told("plain")
    own_memory(8 * GB)
    assert told("apart") == plain


@pytest.mark.parametrize("chunk", [SUM_BLOCK, 5 * SUM_BLOCK])
def test_buffers_take_what_was_accounted_for(chunk: int, tmp_path: Path, own_memory: Callable[[int], None]) -> None:
    """A worker's buffers on a device are those of `BytesPerEntry`, temporaries apart."""
    own_memory(8 * GB)
    models(tmp_path)
    recipe = lines.edit_recipe(str(tmp_path / "base"), str(tmp_path / "a"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")
    worker = Worker(plan, [], torch.device("cpu"), chunk, Kept(1), Kept(0))
    taken = [worker._held, *(buffer._device for buffer in (*worker._raw, worker.out))]
    each = replace(plan.per_entry, temporaries=0)  # which the arithmetic makes on its way
    assert sum(tensor.nbytes for tensor in taken) == chunk * each.nbytes(slots=devices.SLOTS)


def test_buffers_go_with_their_worker(tmp_path: Path) -> None:
    """At once: a next pass would else take its memory beside that of the last one, until Python looks for cycles."""
    models(tmp_path)
    recipe = lines.edit_recipe(str(tmp_path / "base"), str(tmp_path / "a"))
    plan = lines.make_plan(recipe, lines.open_inputs(recipe), tmp_path / "out")
    gc.disable()
    try:
        worker = Worker(plan, [], torch.device("cpu"), SUM_BLOCK, Kept(1), Kept(0))
        held = weakref.ref(worker)
        del worker
        assert held() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("gpu_memory", [None, 500_000_000, 3_000_000_000])
@pytest.mark.parametrize("number", [None, 1, 7])
def test_all_workers_together_stay_within_the_gpu_memory(
    gpu_memory: int | None, number: int | None, own_memory: Callable[[int], None]
) -> None:
    """An eighth of the device unless said, never more than 2 GiB; temporaries of the methods included."""
    own_memory(8 * GB)
    room = BytesPerEntry(stored=2, written=2, width=4, held=4, temporaries=9)
    crew = Devices(Resources(device="cpu", gpu_memory=gpu_memory, workers=number))
    taken = len(crew.members) * crew.chunk(room, whole_blocks=True) * room.nbytes(slots=devices.SLOTS)
    assert len(crew.members) == (number or 4)
    assert taken <= (gpu_memory or 8 * GB // 8)


def test_too_little_gpu_memory_is_refused(own_memory: Callable[[int], None], tmp_path: Path) -> None:
    """With what is needed, and what to do; nothing is written."""
    own_memory(8 * GB)
    models(tmp_path)
    before = snapshot(tmp_path)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out", "--gpu-memory", "1MB")
    assert (ran.code, ran.trace) == (2, "")
    assert "--gpu-memory 1,000,000" in ran.err
    assert "--workers" in ran.err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("size", ["much", "0", "-1GB", ""])
def test_a_size_that_is_none(size: str, tmp_path: Path) -> None:
    """The option and what it was given are named."""
    models(tmp_path)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out", f"--gpu-memory={size}")
    assert (ran.code, ran.trace) == (2, "")
    assert f"--gpu-memory {size}" in ran.err


# --- out of memory ---


_ADVICE = """\nCUDA kernel errors might be asynchronously reported at some other API call.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""
_ACCELERATOR_ERROR: type[RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)  # since torch 2.8
OUT_OF_MEMORY: dict[str, RuntimeError] = {
    "by its allocator": torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "by the driver": _ACCELERATOR_ERROR(f"CUDA error: out of memory{_ADVICE}"),
    "by the driver, of old": RuntimeError(f"CUDA error: out of memory{_ADVICE}"),
    "by the driver of HIP": RuntimeError(f"HIP error: out of memory{_ADVICE}"),
    "by cuBLAS": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "by cuSOLVER": RuntimeError(
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`"
    ),
}
"""How torch says that a device is out of memory."""


class Full:
    """A device on which nothing larger than some entries can be computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int, says: str = "by its allocator") -> None:
        self.most, self.sizes, self.error = most, list[int](), OUT_OF_MEMORY[says]
        monkeypatch.setattr(workers, "task_vector", self)

    def __call__(self, fine_tuned: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        if fine_tuned.shape[-1] > self.most:
            raise type(self.error)(*self.error.args)
        self.sizes.append(fine_tuned.shape[-1])
        return arithmetic.task_vector(fine_tuned, base)


@pytest.mark.parametrize("method", [name for name in METHODS if not TABLE[name].on_weights])
@pytest.mark.some(5)
def test_out_of_memory_halves_the_chunk(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the run goes on: nothing is counted twice, and the bytes are the same."""
    models(tmp_path)
    plain = merged(tmp_path, "plain", METHODS[method], Resources(device="cpu"))
    full = Full(monkeypatch, SUM_BLOCK)
    resources = Resources(device="cpu", workers=2, chunk=4 * SUM_BLOCK)
    assert merged(tmp_path, "halved", METHODS[method], resources) == plain
    assert max(full.sizes) == SUM_BLOCK


@pytest.mark.slow
@pytest.mark.parametrize("says", OUT_OF_MEMORY)
def test_every_way_to_say_so(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator has a kind of error of its own; the driver and the libraries have only words."""
    models(tmp_path)
    plain = merged(tmp_path, "plain", METHODS["ties"], Resources(device="cpu"))
    full = Full(monkeypatch, SUM_BLOCK, says)
    assert merged(tmp_path, "halved", METHODS["ties"], Resources(device="cpu", chunk=4 * SUM_BLOCK)) == plain
    assert max(full.sizes) == SUM_BLOCK


@pytest.mark.parametrize("said", ["an illegal memory access was encountered", "device-side assert triggered"])
def test_other_errors_of_a_device_are_no_lack_of_memory(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end the run as what they are, with the tensor's name."""
    models(tmp_path)
    monkeypatch.setitem(OUT_OF_MEMORY, "other", RuntimeError(f"CUDA error: {said}"))
    Full(monkeypatch, 0, "other")
    with pytest.raises(RuntimeError, match=said) as raised:
        merged(tmp_path, "out", METHODS["ties"], Resources(device="cpu", workers=1))
    assert raised.value.args[-1].startswith("at tensor ")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("says", OUT_OF_MEMORY)
def test_a_device_too_full_to_be_used_at_all(says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process has all of it, so that not even a context fits: exit code 1, and the device is named."""
    models(tmp_path)

    def full(_: object) -> None:
        raise OUT_OF_MEMORY[says]

    for module in (devices, buffers, workers):
        monkeypatch.setattr(module, "has_own_memory", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", full)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out", "--device", "cpu")
    assert (ran.code, ran.trace) == (1, "")
    said, _, advice = str(OUT_OF_MEMORY[says]).partition("\n")
    assert f"out of memory: cpu is too full to be used: {said}\n" in ran.err
    assert not advice or advice not in ran.err
    assert not (tmp_path / "out").exists()


class Allocator:
    """What torch keeps of CUDA devices, as far as a run asks it: the share it may take, what is taken already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, share: float, taken: int) -> None:
        self.share, self.taken, self.within = share, taken, list[float]()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.taken)
        monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: self.share, raising=False)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set)

    def set(self, share: float, _: object) -> None:
        self.share = share
        self.within.append(share)


@pytest.mark.parametrize(
    ("share", "taken", "within"), [(1.0, 0, 0.25), (1.0, 4 * GB, 0.75), (0.5, 0, 0.25), (0.5, 4 * GB, 0.5)]
)
def test_a_caller_s_own_limit_holds(
    share: float,
    taken: int,
    within: float,
    monkeypatch: pytest.MonkeyPatch,
    own_memory: Callable[[int], None],
) -> None:
    """A run takes its share beside what is taken, never beyond the caller's limit, which is the old one afterwards;
    also if the run fails.
    """
    own_memory(8 * GB)
    allocator = Allocator(monkeypatch, share, taken)
    run = Devices(Resources(device="cpu", gpu_memory=2 * GB))
    with run.bounded():
        assert allocator.share == within
    assert allocator.share == share
    with pytest.raises(KeyError), run.bounded():
        raise KeyError
    assert allocator.within == [within, share] * 2


@pytest.mark.parametrize("gpu_memory", [100_000_000, 333_333_333, GB, 3_000_000_001])
@pytest.mark.parametrize("stored", [1, 2, 4, 8])
def test_pinned_memory_is_not_rounded_up(gpu_memory: int, stored: int, own_memory: Callable[[int], None]) -> None:
    """Torch pins a power of two, whatever it is asked for: so a buffer is one."""
    own_memory(8 * GB)
    crew = Devices(Resources(device="cpu", gpu_memory=gpu_memory, workers=1))
    each = BytesPerEntry(stored=stored, written=stored, width=max(4, stored), held=3, temporaries=5)
    nbytes = crew.chunk(each) * stored
    assert nbytes & (nbytes - 1) == 0
    assert nbytes // stored >= SUM_BLOCK


@pytest.mark.slow
def test_memory_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every pass, since the next has streams of its own; and before a smaller buffer is asked for."""
    models(tmp_path)
    given = list[str]()
    monkeypatch.setattr(pool, "give_back", lambda _: given.append("pass"))
    monkeypatch.setattr(workers, "give_back", lambda _: given.append("halved"))
    merged(tmp_path, "out", METHODS["ties"], Resources(device="cpu", workers=2, chunk=SUM_BLOCK))
    assert given[-1] == "pass"
    passes = len(given)
    assert set(given) == {"pass"}
    assert passes > 1
    Full(monkeypatch, SUM_BLOCK)
    given.clear()
    merged(tmp_path, "halved", METHODS["ties"], Resources(device="cpu", workers=1, chunk=2 * SUM_BLOCK))
    assert given.count("pass") == passes
    assert "halved" in given


def test_what_torch_keeps_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CUDA it is returned, pinned memory, too; of the CPU there is none."""
    given = list[str]()
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: given.append("device"))
    if hasattr(torch, "accelerator"):
        monkeypatch.setattr(torch.accelerator, "empty_host_cache", lambda: given.append("host"), raising=False)
    devices.give_back(torch.device("cpu"))
    assert not given
    devices.give_back(torch.device("cuda", 1))
    assert given[0] == "device"
    assert given[1:] == ["host"] * hasattr(torch, "accelerator")


def test_a_device_that_is_full_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers that do not fit are halved, too, before anything is done; what they held is given back first."""
    models(tmp_path)
    plain = merged(tmp_path, "plain", METHODS["average"], Resources(device="cpu"))
    real, asked = torch.empty, list[int]()

    def empty(*size: Any, **kw: Any) -> torch.Tensor:
        if kw.get("dtype") == torch.uint8:
            asked.append(size[-1])
            if size[-1] > 16 * SUM_BLOCK:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return real(*size, **kw)

    monkeypatch.setattr(torch, "empty", empty)
    resources = Resources(device="cpu", workers=2, chunk=8 * SUM_BLOCK)
    assert merged(tmp_path, "halved", METHODS["average"], resources) == plain
    assert max(asked) > 16 * SUM_BLOCK


def test_too_little_memory_for_the_smallest_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends with the device's own words, and leaves nothing."""
    models(tmp_path)
    before = snapshot(tmp_path)
    Full(monkeypatch, SUM_BLOCK // 2)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out", "--device", "cpu")
    assert ran.trace == ""
    assert ran.code == 1
    assert "out of memory: cpu has no room for chunks of 65,536 entries" in ran.err
    assert snapshot(tmp_path) == before


# --- which devices ---


def test_devices_share_the_work(monkeypatch: pytest.MonkeyPatch, own_memory: Callable[[int], None]) -> None:
    """Several workers on each, in turn; one named twice counts once."""
    own_memory(8 * GB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert [str(device) for device in choose_devices("cuda:2,cuda:0,cuda:2")] == ["cuda:2", "cuda:0"]
    assert [str(device) for device in choose_devices("cuda")] == ["cuda:0"]
    crew = Devices(Resources(device="cuda:0,cuda:2"))
    assert [device.index for device in crew.members] == [0, 2] * 4
    assert len(Devices(Resources(device="cuda:0,cuda:2", workers=1)).members) == 2


@pytest.mark.parametrize(
    "device", ["cuda:7", "cuda:0,cuda:9", "cuda:128", "cuda:01", "gpu", "cuda:0,cpu", "cuda,", "cpu:0", ""]
)
def test_a_device_that_is_not_there(device: str, tmp_path: Path) -> None:
    """The word is named, and nothing is written."""
    models(tmp_path)
    before = snapshot(tmp_path)
    ran = run_lines("edit", tmp_path / "base", tmp_path / "a", "-o", tmp_path / "out", f"--device={device}")
    assert (ran.code, ran.trace) == (2, "")
    assert f"--device {device}" in ran.err
    assert snapshot(tmp_path) == before


# --- a real one ---

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@CUDA
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gpu_memory", [None, 400_000_000])
def test_cuda_gives_the_bytes_of_the_cpu(method: str, gpu_memory: int | None, tmp_path: Path) -> None:
    """Every method, with much memory or little."""
    models(tmp_path)
    plain = merged(tmp_path, "plain", METHODS[method], Resources(device="cpu"))
    assert merged(tmp_path, "cuda", METHODS[method], Resources(device="cuda", gpu_memory=gpu_memory)) == plain


@CUDA
def test_cuda_takes_no_more_than_it_may(tmp_path: Path) -> None:
    """torch's own high-water mark of the device stays within the share, whatever the method makes meanwhile."""
    models(tmp_path)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    merged(tmp_path, "cuda", METHODS["ties"], Resources(device="cuda", gpu_memory=400_000_000))
    assert torch.cuda.max_memory_reserved() - before <= 400_000_000
