"""Does a GPU make the bytes of the CPU, within its memory, and how fast? python benchmarks/gpu.py, or make gpu.

    python benchmarks/gpu.py                         # on cuda, in 8 minutes
    python benchmarks/gpu.py --only a d --seconds 120
    python benchmarks/gpu.py --device cpu --small    # a rehearsal without a GPU: the script, and nothing about CUDA

Prints a verdict a line: `ok`, `FAILED`, `missed` (an aim of speed), or `left out`, with why. Ends with 1 if anything
failed, and with 2 where there is no CUDA device. What is checked, in this order:

    a  every method, with every dtype and mixture of dtypes: random bits, denormals, zeros of both signs, near overflow
    b  what is measured: alpha auto, rescale l1, slerp, thresholds with ties, and all that inspect tells
    c  1, 4 and 40 workers, time after time: one digest
    d  as little of the device's memory as may be; a device that another process has filled
    e  killed on the GPU and resumed on the CPU, and the other way round
    f  seconds beside the CPU's, and beside copies of the same bytes to the device and back; memory of the host
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch

import lines_cli as lines
from lines_cli.checkpoint.header import lay_out
from lines_cli.errors import LinesError
from lines_cli.methods import METHODS
from lines_cli.plan.resources import SUM_BLOCK, Resources
from lines_cli.recipe.validate import make_recipe

Tensors = dict[str, torch.Tensor]
IN_HEADER = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
MIXTURES = {
    "float16": (torch.float16,),
    "bfloat16": (torch.bfloat16,),
    "float32": (torch.float32,),
    "float64": (torch.float64,),
    "float32 and bfloat16": (torch.float32, torch.bfloat16),
    "float16 and bfloat16": (torch.float16, torch.bfloat16),
    "float64 and float16": (torch.float64, torch.float16),
}
"""The dtypes of the base and the models, by turns."""


GIVEN: dict[str, Any] = {"density": 0.4, "gamma": 0.1, "weight": 0.7, "t": 0.3, "on": "ties"}
"""Parameters of methods."""


class LeftOutError(Exception):
    """Why a check was not made."""


class MissedError(Exception):
    """Which speed was aimed at, and which was reached."""


def no_time() -> str:
    """What is done once the time is up."""
    raise LeftOutError("no time is left")


class Checks:
    """Makes checks, one after another, until the time is up.

    Args:
        device: as `--device`.
        folder: for models and outputs.
        seconds: for all of it.
        small: whether models are small, and checks few.
    """

    def __init__(self, device: str, folder: Path, seconds: float, *, small: bool) -> None:
        self.device, self.folder, self.small = device, folder, small
        self.counts = dict.fromkeys(("ok", "FAILED", "missed", "left out"), 0)
        self._until = time.monotonic()
        self._seconds = seconds

    def begin(self, share: float) -> None:
        """What comes next may take so much of the whole time, and what was left of that before."""
        self._until += share * self._seconds

    @property
    def on_cuda(self) -> bool:
        """Whether this is no rehearsal."""
        return self.device.startswith("cuda")

    def check(self, what: str, action: Callable[[], str | None]) -> None:
        """Print a verdict on what an action finds: it raises an error, of this file or any other, or says more."""
        started, verdict, more = time.monotonic(), "ok", ""
        try:
            more = (action if started < self._until else no_time)() or ""
        except LeftOutError as why:
            verdict, more = "left out", str(why)
        except MissedError as why:
            verdict, more = "missed", str(why)
        except Exception as error:  # noqa: BLE001 - the next check is made all the same
            verdict, more = "FAILED", f"{type(error).__name__}: {error}".replace("\n", " ")
        self.counts[verdict] += 1
        print(f"{verdict:9}{what}{f': {more}' if more else ''} [{time.monotonic() - started:.1f} s]", flush=True)

    # --- runs ---

    def resources(self, device: str, **said: Any) -> Resources:
        """Of a run. A rehearsal cuts what should be a GPU's work into other chunks."""
        otherwise = {} if self.on_cuda or device == "cpu" else {"workers": 3, "chunk": SUM_BLOCK}
        return Resources(device=self.device if device == "gpu" else device, **{**otherwise, **said})

    def made(self, recipe: Mapping[str, Any], device: str, **said: Any) -> tuple[dict[str, str], lines.Outcome]:
        """The digests of the weights that a recipe makes on `gpu` or `cpu`, and its outcome."""
        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        asked = make_recipe(recipe, where="")
        outcome = lines.run(lines.make_plan(asked, lines.open_inputs(asked), out), self.resources(device, **said))
        return digests(out), outcome

    def same(self, recipe: Mapping[str, Any], *, may_refuse: bool = False) -> str | None:
        """Hold what the GPU makes of a recipe against what the CPU makes, coefficients included; or, if both may refuse
        it, what they say.
        """
        refused = {}
        for device in ("cpu", "gpu") if may_refuse else ():
            try:
                self.made(recipe, device)
            except LinesError as error:
                refused[device] = error.message
        if refused:
            assert refused.get("cpu") == refused.get("gpu"), f"refused: {refused}"
            return f"both refuse it: {refused['cpu'].rpartition('tensor ')[2]}"
        plain, on_cpu = self.made(recipe, "cpu")
        found, on_gpu = self.made(recipe, "gpu")
        assert found == plain, f"{found} is not the CPU's {plain}"
        coefficients = [[tensor.coefficient for tensor in of.plan.tensors] for of in (on_cpu, on_gpu)]
        assert coefficients[0] == coefficients[1], "coefficients differ"
        measured = [repr(of.plan.statistics) for of in (on_cpu, on_gpu)]  # in which NaN is NaN
        assert measured[0] == measured[1], "what was measured differs"
        return None

    def near(self, recipe: Mapping[str, Any], tolerance: float) -> str:
        """Hold numbers against the CPU's that a decomposition makes: no two libraries make the same bits."""
        tensors = []
        for device in ("cpu", "gpu"):
            self.made(recipe, device)
            tensors.append(read(self.folder / "out"))
        worst = 0.0
        for name, plain in tensors[0].items():
            finite = plain.isfinite()
            assert torch.equal(finite, tensors[1][name].isfinite()), f"{name}: NaN or Inf elsewhere"
            difference = (plain.double() - tensors[1][name].double())[finite]
            worst = max(worst, float(difference.norm() / plain.double()[finite].norm().clamp(min=1e-30)))
        assert worst <= tolerance, f"relative distance {worst:.1e}"
        return f"relative distance {worst:.1e}"

    def recipe(self, method: str, models: Sequence[str], **said: Any) -> dict[str, Any]:
        """A recipe for a method, of models in the folder, the first of which is the base; with what it must be told."""
        about = METHODS[method]
        base, *tuned = [str(self.folder / name) for name in models]
        tuned = tuned[: about.models[1]]
        parameters = {name: GIVEN[name] for name in about.parameters if name in GIVEN}
        for name, parameter in about.parameters.items():
            if parameter.required and name not in parameters:
                parameters[name] = next(iter(parameter.choices), 0.5)
        parameters |= said.pop("parameters", {})
        found = {"merge_method": method, "models": [{"model": model} for model in tuned], "parameters": parameters}
        if about.takes == "task vectors":
            found |= {"base_model": base, "lines": {"alpha": 0.3, "beta": 0.6}}
        return {**found, **said}

    def command(self, *arguments: object, device: str) -> list[str]:
        """`lines ARGUMENTS` as a process of its own."""
        on = self.device if device == "gpu" else device
        return [sys.executable, "-m", "lines_cli", *map(str, arguments), "--device", on, "--quiet"]


# --- models ---


def bits(count: int, dtype: torch.dtype, chance: torch.Generator, *, finite: bool) -> torch.Tensor:
    """[count] of `dtype`: random bits, of which a `finite` one leaves NaN, Inf and the greatest exponents out."""
    width = dtype.itemsize
    values = torch.randint(0, 256, (count * width,), dtype=torch.uint8, generator=chance).view(dtype)
    return values if not finite else torch.where(values.abs() < torch.finfo(dtype).max ** 0.5, values, 0.5)


def awkward(role: int, count: int, dtype: torch.dtype, *, finite: bool) -> torch.Tensor:
    """[count] entries of a model: a fifth each of random bits, denormals, zeros of both signs and few other values,
    near overflow, and what weights look like. All roles agree in scale, so that differences are finite.
    """
    chance = torch.Generator().manual_seed(7 * role + dtype.itemsize)
    limits, each = torch.finfo(dtype), count // 5
    denormal = torch.randint(-3, 4, (each,), generator=chance).to(torch.float64) * limits.smallest_normal / 4
    few = torch.tensor([0.0, -0.0, 0.5, -0.5])[torch.randint(0, 4, (each,), generator=chance)]
    huge = torch.full((each,), limits.max, dtype=torch.float64) * (0.3 + 0.01 * torch.rand(each, generator=chance))
    plain = 0.02 * torch.randn(count - 4 * each, generator=chance)
    parts = (bits(each, dtype, chance, finite=finite), *(part.to(dtype) for part in (denormal, few, huge, plain)))
    return torch.cat(parts)


def write(folder: Path, tensors: Tensors) -> None:
    """A checkpoint."""
    folder.mkdir(parents=True)
    rows = [(name, IN_HEADER[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()]
    with open(folder / "model.safetensors", "wb") as file:
        file.write(lay_out(rows, {"format": "pt"})[0])
        file.writelines(tensor.contiguous().view(-1).view(torch.uint8).numpy().data for tensor in tensors.values())


def write_awkward(folder: Path, name: str, dtypes: Sequence[torch.dtype], *, finite: bool, count: int) -> list[str]:
    """A base and three models; their names."""
    names = []
    for role, dtype in enumerate(islice(cycle(dtypes), 4)):
        tensors = {f"layers.{i}.w": awkward(10 * i + role, count, dtype, finite=finite) for i in range(3)}
        tensors["layers.1.m"] = awkward(role + 5, 48 * 40, dtype, finite=finite).view(48, 40)
        write(folder / name / str(role), tensors)
        names.append(f"{name}/{role}")
    return names


def write_plain(folder: Path, name: str, megabytes: int, *, models: int = 4) -> list[str]:
    """A base and models of matrices in bfloat16, each of so many MB; their names."""
    matrices = max(2, megabytes // 8)
    chance = torch.Generator().manual_seed(0)
    side = (2048, 2048) if megabytes >= 16 else (512, 512)
    base = 0.02 * torch.randn(side, generator=chance)
    for role in range(models):
        values = base if role == 0 else base + 0.002 * torch.randn(side, generator=chance)
        # Rolled, so that no two layers are alike; drawing all of it would take longer than all checks.
        tensors = {f"layers.{i}.w": values.roll(i, 0).bfloat16() for i in range(matrices)}
        write(folder / name / str(role), tensors)
    return [f"{name}/{role}" for role in range(models)]


def digests(folder: Path) -> dict[str, str]:
    """The digest of each weight file."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            found[path.name] = hashlib.sha256(file.read()).hexdigest()
    return found


def read(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


# --- the checks ---


def every_method(checks: Checks) -> None:
    """(a) of the list above."""
    count = 2 * SUM_BLOCK // 16 if checks.small else 2 * SUM_BLOCK + 17
    mixtures = dict(list(MIXTURES.items())[1:5:3]) if checks.small else MIXTURES
    for mixture, dtypes in mixtures.items():
        for finite in (True, False):
            kind = "any bits" if not finite else "finite"
            models = write_awkward(
                checks.folder, f"{mixture}, {kind}".replace(" ", "-"), dtypes, finite=finite, count=count
            )
            for method, about in METHODS.items():
                recipe = checks.recipe(method, models, allow_nonfinite=not finite)
                rounded = {**recipe, "dtype": "bfloat16", "rounding": "stochastic"}
                whole = about.sees == "tensors"

                def look(recipe: Any = recipe, rounded: Any = rounded, whole: bool = whole) -> str | None:
                    if whole:
                        return checks.near(recipe, 1e-3)
                    return checks.same(recipe, may_refuse=True) or checks.same(rounded, may_refuse=True)

                checks.check(f"(a) {method}, {mixture}, {kind}", look)


def what_is_measured(checks: Checks) -> None:
    """(b) of the list above."""
    models = write_plain(checks.folder, "plain", 2 if checks.small else 64)
    few = write_awkward(checks.folder, "few", (torch.bfloat16,), finite=True, count=SUM_BLOCK)
    for name in few:  # magnitudes of which many are the threshold
        path = checks.folder / name
        tensors = {key: tensor.sign().mul(0.5) for key, tensor in read(path).items()}
        shutil.rmtree(path)
        write(path, tensors)
    for method, about in METHODS.items():
        entries = about.sees == "entries"
        if about.takes == "task vectors" and entries:
            auto = checks.recipe(method, models, lines={"alpha": "auto", "beta": 0.5})
            checks.check(f"(b) {method}, alpha: auto", partial(checks.same, auto))
        for parameter, value in (("rescale", "l1"), ("trim", "global"), ("trim", "tensor")):
            if parameter in about.parameters and entries:
                recipe = checks.recipe(method, few, parameters={parameter: value})
                what = f"(b) {method}, {parameter}: {value}, ties at the threshold"
                checks.check(what, partial(checks.same, recipe))
    checks.check("(b) slerp", partial(checks.same, checks.recipe("slerp", models)))

    def inspected() -> None:
        told = []
        for device in ("cpu", "gpu"):
            base, *tuned = [str(checks.folder / name) for name in models]
            how = checks.resources(device, chunk=SUM_BLOCK)
            found = lines.compare(lines.open_inspection(tuned, base=base), how)
            told.append(replace(found, seconds=0.0))
        assert told[0] == told[1], "what inspect tells differs"

    checks.check("(b) inspect of three fine-tunes", inspected)


def one_digest(checks: Checks) -> None:
    """(c) of the list above."""
    models = write_plain(checks.folder, "workers", 2 if checks.small else 64)
    for number in (1, 4, 40):

        def often(number: int = number) -> str:
            recipe = checks.recipe("ties", models)
            plain, _ = checks.made(recipe, "cpu")
            times = 2 if checks.small else 20
            for _ in range(times):
                found, _ = checks.made(recipe, "gpu", workers=number)
                assert found == plain, f"{found} is not {plain}"
            return f"{times} times"

        checks.check(f"(c) ties with {number} workers", often)


def little_memory(checks: Checks) -> None:
    """(d) of the list above."""
    models = write_plain(checks.folder, "memory", 2 if checks.small else 256)

    def least() -> str:
        if not checks.on_cuda:
            raise LeftOutError("the CPU has no memory of its own")
        recipe = checks.recipe("ties", models)
        try:
            checks.made(recipe, "gpu", gpu_memory=1)
            needed = 0
        except LinesError as refused:
            needed = int(re.findall(r"need ([\d,]+) bytes", refused.message)[0].replace(",", ""))
        plain, _ = checks.made(recipe, "cpu")
        for share in (needed, 2 * needed):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_reserved()
            found, _ = checks.made(recipe, "gpu", gpu_memory=share)
            assert found == plain, "other bytes"
            taken = torch.cuda.max_memory_reserved() - before
            assert taken <= share, f"{taken:,} bytes of {share:,} were taken"
        kept = torch.cuda.memory_reserved() - before
        assert kept == 0, f"{kept:,} bytes are kept afterwards"
        return f"{needed:,} bytes, and twice that"

    def limit() -> None:
        if not checks.on_cuda:
            raise LeftOutError("the CPU has no memory of its own")
        torch.cuda.set_per_process_memory_fraction(0.5)
        try:
            checks.made(checks.recipe("ties", models), "gpu")
            fraction = torch.cuda.get_per_process_memory_fraction()
            assert fraction == 0.5, f"the caller's limit is {fraction} afterwards"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    checks.check("(d) --gpu-memory at its least", least)
    checks.check("(d) a caller's own limit", limit)
    for free in (0, 2**28, 2**30):
        checks.check(f"(d) a device with {free >> 20} MiB free", partial(full, checks, models, free))


FILLS = """
import sys, torch
held, size = [], 2**30
while size >= 2**20:
    try:
        held.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
    except RuntimeError:
        size //= 2
free = int(sys.argv[1])
while held and free > 0:
    free -= held.pop(0).nbytes
torch.cuda.empty_cache()
print("full", flush=True)
sys.stdin.read()
"""


def full(checks: Checks, models: Sequence[str], free: int) -> str:
    """A run beside a process that leaves so much of the device: it does it, or says why not."""
    if not checks.on_cuda:
        raise LeftOutError("the CPU has no memory of its own")
    torch.cuda.empty_cache()
    base, tuned, *_ = [checks.folder / name for name in models]
    out = checks.folder / "beside"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-c", FILLS, str(free)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        try:
            assert other.stdout.readline() == "full\n", "the device could not be filled"
            words = checks.command("edit", base, tuned, "-o", out, device="gpu")
            ran = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
        finally:
            other.kill()
    assert "Traceback" not in ran.stderr, ran.stderr[-600:]
    assert ran.returncode in (0, 1), f"ended with {ran.returncode}: {ran.stderr}"
    assert out.exists() == (ran.returncode == 0), "an output of a run that failed"
    return "done" if ran.returncode == 0 else ran.stderr.partition("\n")[0]


def killed(checks: Checks) -> None:
    """(e) of the list above."""
    models = write_plain(checks.folder, "killed", 64 if checks.small else 2048, models=2)
    base, tuned = [checks.folder / name for name in models]
    plain = checks.folder / "whole"
    subprocess.run(checks.command("edit", base, tuned, "-o", plain, device="cpu"), check=True)
    for first, second in (("gpu", "cpu"), ("cpu", "gpu")):

        def resumed(first: str = first, second: str = second) -> str:
            out = checks.folder / "resumed"
            shutil.rmtree(out, ignore_errors=True)
            words = checks.command("edit", base, tuned, "-o", out, device=first)
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as run:
                new = checks.folder / f".{out.name}.lines" / "new"
                while run.poll() is None and _written(new) < 2**20:
                    time.sleep(0.001)
                time.sleep(0.05)
                run.send_signal(signal.SIGKILL)
            if run.returncode != -signal.SIGKILL:
                raise LeftOutError("it was done before it could be killed")
            done = subprocess.run(
                [*checks.command("edit", base, tuned, "-o", out, device=second), "--resume", "--json"],
                capture_output=True,
                text=True,
                check=True,
            )
            assert digests(out) == digests(plain), "other bytes"
            return f"{json.loads(done.stdout).get('resumed', 0):,} bytes were kept"

        checks.check(f"(e) killed on the {first}, resumed on the {second}", resumed)


def _written(folder: Path) -> int:
    """Bytes that the files of a folder have on the disk."""
    try:
        return sum(512 * path.stat().st_blocks for path in folder.glob("*.safetensors"))
    except OSError:  # it went meanwhile
        return 0


AIMS = {"iso_c": 20.0, "tsv_m": 20.0, "iso_cts": 20.0}
"""How many times as fast as the CPU."""


def seconds(checks: Checks) -> None:
    """(f) of the list above."""
    megabytes = 4 if checks.small else 2048
    models = write_plain(checks.folder, "timed", megabytes, models=4)
    size = sum(path.stat().st_size for path in (checks.folder / models[0]).glob("*.safetensors"))
    shorter = write_plain(checks.folder, "matrices", 4 if checks.small else 128)
    rounds = 1 if checks.small else 3

    def copies() -> str:
        if not checks.on_cuda:
            raise LeftOutError("the CPU has no memory of its own")
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(2**28, dtype=torch.uint8, device=checks.device)

        def copy() -> None:
            for _ in range(4):
                there.copy_(host, non_blocking=True)
                host.copy_(there, non_blocking=True)
            torch.cuda.synchronize()

        copy()
        return f"{4 * 2**28 / 1e9 / median(copy, rounds):.1f} GB/s each way"

    checks.check("(f) pinned copies to the device and back", copies)
    edit = {**checks.recipe("task_arithmetic", models[:2]), "parameters": {}}
    timed: dict[str, dict[str, Any]] = {"edit": edit}
    timed |= {name: checks.recipe(name, models) for name in ("task_arithmetic", "ties", "dare_linear")}
    timed |= {name: checks.recipe(name, shorter) for name, about in METHODS.items() if about.sees == "tensors"}
    for name, recipe in timed.items():

        def beside(name: str = name, recipe: Any = recipe) -> str:
            took = {on: median(partial(checks.made, recipe, on), rounds) for on in ("cpu", "gpu")}
            ratio, of = took["cpu"] / took["gpu"], size if name not in METHODS or METHODS[name].sees != "tensors" else 0
            told = f"cpu {took['cpu']:.2f} s, {checks.device} {took['gpu']:.2f} s, {ratio:.1f} times as fast"
            told += f", {of / 1e9 / took['gpu']:.2f} GB/s of output" if of else ""
            if checks.on_cuda and ratio < AIMS.get(name, 0):
                raise MissedError(f"{told}; the aim is {AIMS[name]:g} times")
            return told

        checks.check(f"(f) {name}", beside)

    def host() -> str:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        told = f"at most {resident / 1e6:,.0f} MB resident in all of this"
        stats = getattr(torch.cuda, "host_memory_stats", None)
        if checks.on_cuda and stats is not None:
            told += f", {stats().get('allocated_bytes.peak', 0) / 1e6:,.0f} MB of pinned memory"
        return told

    checks.check("(f) memory of the host", host)


def median(action: Callable[[], object], rounds: int) -> float:
    """The seconds that an action takes, after one round that is not counted."""
    found = []
    for number in range(rounds + (rounds > 1)):
        started = time.perf_counter()
        action()
        if number or rounds == 1:
            found.append(time.perf_counter() - started)
    return statistics.median(found)


CHECKS = {
    "a": (every_method, 0.4),
    "b": (what_is_measured, 0.1),
    "c": (one_digest, 0.1),
    "d": (little_memory, 0.1),
    "e": (killed, 0.1),
    "f": (seconds, 0.2),
}
"""What is checked, and which share of the time it may take."""


def machine(device: str) -> Iterator[str]:
    """What the verdicts are of."""
    yield f"torch {torch.__version__}, {os.cpu_count()} cores"
    if device.startswith("cuda"):
        about = torch.cuda.get_device_properties(device)
        yield f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    else:
        yield "a rehearsal on the CPU: it says nothing about a GPU"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the checks; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu for a rehearsal (cuda)")
    parser.add_argument("--only", nargs="+", choices=CHECKS, default=list(CHECKS), help="these checks")
    parser.add_argument("--seconds", type=float, default=480, help="begin no check after that (480)")
    parser.add_argument("--small", action="store_true", help="small models and few rounds")
    parser.add_argument("--folder", type=Path, help="where models and outputs go (a temporary folder)")
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        print(
            f"error: torch {torch.__version__} sees no CUDA device here\n"
            "hint: --device cpu --small rehearses the script without one.",
            file=sys.stderr,
        )
        return 2
    print(*machine(options.device), sep="; ")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        checks = Checks(options.device, Path(folder), options.seconds, small=options.small)
        chosen = [CHECKS[letter] for letter in dict.fromkeys(options.only)]
        for action, share in chosen:
            checks.begin(share / sum(share for _, share in chosen))
            action(checks)
    print(", ".join(f"{number} {verdict}" for verdict, number in checks.counts.items()))
    return 1 if checks.counts["FAILED"] else 0


if __name__ == "__main__":
    sys.exit(main())
