"""How long the methods on singular values take and how exact they are: matrix by matrix beside what the papers' code
does, which is `torch.linalg.svd` in float32; and on a whole model of MiniLM's sizes beside FusionBench, in memory.

    python benchmarks/spectral.py                 # 768 x 3072 and the model: minutes
    python benchmarks/spectral.py --medium        # 2048 x 5632, too: several minutes more
    python benchmarks/spectral.py --large         # 4096 x 11008: iso_c both ways, the others ours alone; half an hour

FusionBench is measured where it can be imported (`pip install fusion_bench==0.2.33`). All times are seconds of the
processor on one thread, which what else the machine does changes little. Errors are relative, by the Frobenius norm,
against the same steps by numpy's decomposition in float64 (`tests/support/spectral_references.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import lines_cli as lines  # noqa: E402
from lines_cli.methods import METHODS  # noqa: E402
from lines_cli.methods.calibration import svc  # noqa: E402
from support import spectral_references  # noqa: E402

TASKS = 4
SMALL, MEDIUM, LARGE = (768, 3072), (2048, 5632), (4096, 11008)


def made(shape: Sequence[int], seed: int) -> Tensor:
    """An update as those of fine-tunes are: noise, and more of it in few directions."""
    chance = torch.Generator().manual_seed(seed)
    noise = torch.randn(*shape, generator=chance)
    rank = min(shape) // 16
    return 1e-3 * (
        noise + torch.randn(shape[0], rank, generator=chance) @ torch.randn(rank, shape[1], generator=chance)
    )


def seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """Of the processor; and what it gives."""
    begin = time.process_time()
    result = function()
    return time.process_time() - begin, result


# --- as the papers' code has it: torch, float32 ---


def plain_polar(matrix: Tensor) -> Tensor:
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    polar: Tensor = u @ vh
    return polar


def plain_iso_c(tasks: Sequence[Tensor]) -> Tensor:
    u, s, vh = torch.linalg.svd(sum(tasks[1:], tasks[0]), full_matrices=False)
    merged: Tensor = s.mean() * (u @ vh)
    return merged


def plain_tsv_m(tasks: Sequence[Tensor]) -> Tensor:
    each = min(tasks[0].shape) // len(tasks)
    found = [torch.linalg.svd(task, full_matrices=False) for task in tasks]
    u = torch.cat([u[:, :each] for u, _, _ in found], 1)
    s = torch.cat([s[:each] for _, s, _ in found])
    vh = torch.cat([vh[:each] for _, _, vh in found])
    return (plain_polar(u) * s) @ plain_polar(vh)


def plain_iso_cts(tasks: Sequence[Tensor]) -> Tensor:
    r = min(tasks[0].shape)
    each = round((r - int(0.8 * r)) / len(tasks))
    u, s, vh = torch.linalg.svd(sum(tasks[1:], tasks[0]), full_matrices=False)
    k = r - each * len(tasks)
    us: list[Tensor] = []
    ss: list[Tensor] = []
    vhs: list[Tensor] = []
    for task in tasks:
        own = torch.linalg.svd(task - u[:, :k] @ (u[:, :k].T @ task), full_matrices=False)
        us, ss, vhs = [*us, own[0][:, :each]], [*ss, own[1][:each]], [*vhs, own[2][:each]]
    both = torch.cat([*us, u[:, :k]], 1), torch.cat([*ss, s[:k]]), torch.cat([*vhs, vh[:k]])
    return both[1].mean() * (plain_polar(both[0]) @ plain_polar(both[2]))


def plain_svc(tasks: Sequence[Tensor]) -> Tensor:
    total = sum(tasks[1:], tasks[0])
    u, s, vh = torch.linalg.svd(total, full_matrices=False)
    a = u.T @ total
    shares = []
    for task in tasks:
        own = u.T @ task
        shares.append(((a * own).sum(1) / (own * own).sum(1)).clamp(min=1 / len(tasks)))
    merged: Tensor = (u * (s * len(tasks) / torch.stack(shares).sum(0))) @ vh
    return merged


def plain_wudi(tasks: Sequence[Tensor], steps: int = 300) -> Tensor:
    stacked = torch.stack(list(tasks))
    merged = torch.nn.Parameter(stacked.sum(0))
    adam = torch.optim.Adam([merged], lr=1e-5)
    squares = stacked.square().sum((1, 2))
    for _ in range(steps):
        loss = (((merged - stacked) @ stacked.mT).square() / squares[:, None, None]).sum()
        adam.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        adam.step()
    return merged.detach()


# --- matrix by matrix ---


def ours(method: str, tasks: Sequence[Tensor]) -> Tensor:
    if method == "svc":
        return svc(sum(tasks[1:], tasks[0]), tasks)
    known = METHODS[method]
    defaults = {key: parameter.default for key, parameter in known.parameters.items() if key != "lambda"}
    return known.merge([task.clone() for task in tasks], **{**defaults, "weight": [1.0] * len(tasks)})


PLAIN: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
    "iso_c": plain_iso_c,
    "iso_cts": plain_iso_cts,
    "tsv_m": plain_tsv_m,
    "svc": plain_svc,
}
STEPS = 10
"""Of 300 steps of WUDI so many are taken, and their time is multiplied."""


def exact(method: str, tasks: Sequence[Tensor]) -> Tensor:
    """In float64, and not rounded."""
    tasks = [task.double() for task in tasks]
    if method == "svc":
        total = sum(tasks[1:], tasks[0])
        found = spectral_references.calibrated({"w": total}, [{"w": task} for task in tasks])
    else:
        reference: Callable[..., dict[str, Tensor]] = getattr(spectral_references, method)
        found = reference([{"w": task} for task in tasks], weight=[1.0] * len(tasks))
    merged: Tensor = found["w"]
    return merged


def off(found: Tensor, expected: Tensor) -> str:
    return f"{float((found.double() - expected.double()).norm() / expected.double().norm()):.1e}"


def by_matrix(shape: tuple[int, int], *, with_errors: bool, plain: Iterable[str]) -> Iterable[list[str]]:
    tasks = [made(shape, seed) for seed in range(TASKS)]
    for method in (*PLAIN, "wudi"):
        taken, result = seconds(partial(ours, method, tasks))
        beside, found = None, None
        if method == "wudi" and method in plain:
            beside = seconds(lambda: plain_wudi(tasks, STEPS))[0] * 300 / STEPS
        elif method in plain:
            beside, found = seconds(partial(PLAIN[method], tasks))
        expected = exact(method, tasks) if with_errors else None
        yield [
            f"{shape[0]} x {shape[1]}",
            method,
            f"{taken:.2f}",
            "" if beside is None else f"{beside:.2f}",
            "" if beside is None else f"{beside / taken:.1f}",
            "" if expected is None else off(result, expected),
            "" if expected is None or found is None else off(found, expected),
        ]


# --- a whole model ---

MINI_LM = {
    "embeddings.word_embeddings.weight": (30522, 384),
    "embeddings.position_embeddings.weight": (512, 384),
    "embeddings.LayerNorm.weight": (384,),
    **{
        f"encoder.layer.{layer}.{name}": shape
        for layer in range(6)
        for name, shape in {
            **{f"attention.self.{part}.weight": (384, 384) for part in ("query", "key", "value")},
            "attention.output.dense.weight": (384, 384),
            "intermediate.dense.weight": (1536, 384),
            "output.dense.weight": (384, 1536),
            "output.LayerNorm.weight": (384,),
        }.items()
    },
    "pooler.dense.weight": (384, 384),
}


def fusion_bench(taus: list[dict[str, Tensor]]) -> dict[str, Callable[[], object]]:
    """What FusionBench has of these methods, on task vectors in memory; but not wudi: of an embedding it multiplies all
    rows with all rows, and wants more than 24 GiB.
    """
    try:
        from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
        from fusion_bench.method.task_singular_vector.utils.TSVM_utils import compute_and_sum_svd_mem_reduction
    except ImportError as error:
        print(f"FusionBench is left out: {error}", file=sys.stderr)
        return {}
    return {
        "iso_c": lambda: iso_c(taus, accelerator="cpu"),
        "iso_cts": lambda: iso_cts(taus, common_space_fraction=0.8, accelerator="cpu"),
        "tsv_m": lambda: compute_and_sum_svd_mem_reduction(taus, accelerator="cpu"),
    }


def on_a_model() -> Iterable[list[str]]:
    """`lines merge` of four fine-tunes from file to file, beside the same in memory."""
    names = [f"ft{number}" for number in range(TASKS)]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        base = {name: torch.randn(shape) / 20 for name, shape in MINI_LM.items()}
        taus = []
        for number, name in enumerate(["base", *names]):
            tau = {
                key: made(shape, number) if len(shape) == 2 else torch.zeros(shape) for key, shape in MINI_LM.items()
            }
            tau = tau if number else {key: torch.zeros(shape) for key, shape in MINI_LM.items()}
            (folder / name).mkdir()
            save_file({key: base[key] + tau[key] for key in base}, folder / name / "model.safetensors")
            taus += [tau] if number else []
        peers = fusion_bench(taus)
        recipes = {name: {"merge_method": name} for name in ("task_arithmetic", "iso_c", "iso_cts", "tsv_m", "wudi")}
        recipes["svc"] = {"merge_method": "task_arithmetic", "calibrate": "svc"}
        for name, said in recipes.items():
            recipe = {"base_model": "base", "models": [{"model": one} for one in names], **said}
            (folder / "merge.yaml").write_text(yaml.safe_dump(recipe))

            def run(out: Path = folder / name) -> object:
                loaded = lines.load_recipe(folder / "merge.yaml")
                plan = lines.make_plan(loaded, lines.open_inputs(loaded), out)
                return lines.run(plan, lines.Resources(device="cpu", workers=1))

            taken, _ = seconds(run)
            peer = ""
            if name in peers:
                with contextlib.redirect_stdout(sys.stderr):  # it says what it does
                    peer = f"{seconds(peers[name])[0]:.1f}"
            yield [name, f"{taken:.1f}", peer]


def show(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    print(f"| {' | '.join(headings)} |\n|{'---|' * len(headings)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--medium", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--no-model", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    headings = ("matrix", "method", "ours", "torch, float32", "times", "our error", "its error")
    rows = [by_matrix(SMALL, with_errors=True, plain=(*PLAIN, "wudi"))]
    rows += [by_matrix(MEDIUM, with_errors=False, plain=PLAIN)] if asked.medium else []
    rows += [by_matrix(LARGE, with_errors=False, plain=("iso_c",))] if asked.large else []
    show(headings, (row for part in rows for row in part))
    if not asked.no_model:
        show(("method", "lines merge, file to file", "FusionBench, in memory"), on_a_model())


if __name__ == "__main__":
    main()
