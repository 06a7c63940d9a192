"""What a plan needs to know of the numbers in its inputs, measured by streaming them: exactly, in bounded memory.

Counts are whole numbers, and sums are taken over fixed blocks in the order of the tensors' names, so that nothing here
depends on chunks, workers, or the way inputs and output are sharded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch

from lines_cli.arithmetic import block_sums, task_vector
from lines_cli.layout import natural
from lines_cli.methods.sums import sparse, weighted_sum
from lines_cli.methods.ties import signs
from lines_cli.plan import BINS, ROUNDS, Needs, Norms, Plan, Statistics, TensorPlan
from lines_cli.resources import BLOCK, Resources
from lines_cli.workers import PlanChunk, Pool, Worker, chunks_of

Track = Callable[[str, int, Iterable[int]], Iterable[int]]
"""Wraps the stream of byte counts of one pass, to show progress: the pass's title, its total, the stream."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def untracked(_title: str, _total: int, done: Iterable[int]) -> Iterable[int]:
    """No progress."""
    return done


def measure(plan: Plan, sources: list[int], device: torch.device, resources: Resources, track: Track) -> Statistics:
    """Measure what `plan.needs`; each pass may use what those before it found.

    Args:
        plan: not yet resolved.
        sources: the open inputs, as in `plan.inputs`.
        device: where to compute.
        resources: workers and chunk.
        track: wraps the stream of byte counts of each pass.

    Raises:
        DataError: NaN or Inf in an input.
        CheckpointError: an input ends early or cannot be read.
    """
    measuring = _Measuring(plan, sources, device, resources, track)
    needs = plan.needs
    if needs.thresholds and plan.trims_globally:
        measuring.global_thresholds()
    elif needs.thresholds:
        measuring.thresholds_by_tensor()
    if needs.l1:
        measuring.l1_norms()
    if needs.products:
        measuring.angles()
    if needs.majority or needs.norms:
        measuring.signs_and_norms()
    return measuring.plan.statistics


# --- the k-th largest magnitude ---

_ALL_BITS = 2**31


@dataclass(frozen=True, slots=True)
class Window:
    """Where a threshold is looked for: among the float32 magnitudes whose bits, read as a whole number, lie from `low`
    on, in `BINS` bins of `2**shift` each. Magnitudes sort as their bits do.
    """

    low: int
    shift: int

    @classmethod
    def over(cls, low: int, high: int) -> Window:
        """The finest that covers the bits from `low` to below `high`."""
        shift = 0
        while BINS << shift < high - low:
            shift += 1
        return cls(low, shift)

    def count(self, task_vector: torch.Tensor) -> torch.Tensor:
        """[1 + bins + 1]: how many entries of [n] lie below the window, in each of its bins, and above it."""
        bits = task_vector.abs().to(torch.float32).view(torch.int32)
        bins = bits.sub_(self.low).bitwise_right_shift_(self.shift).clamp_(-1, BINS).add_(1)
        return torch.bincount(bins, minlength=BINS + 2)

    def narrowed(self, counts: torch.Tensor, k: int) -> tuple[Window, int]:
        """The bin that holds the k-th largest entry, as a window; and how many entries lie in it or above. If it is one
        value wide (`found`), that is the threshold, and the number of entries kept.
        """
        from_above = counts.flip(0).cumsum(0)  # above, then bin by bin downwards
        at = int((from_above >= k).nonzero()[0])  # the window covers everything, so it is neither first nor last
        low = self.low + (BINS - at << self.shift)
        return Window.over(low, low + (1 << self.shift)), int(from_above[at])

    def magnitude(self) -> float:
        """The least magnitude in it."""
        return float(torch.tensor([self.low], dtype=torch.int32).view(torch.float32))


def _kept(density: float, numel: int) -> int:
    """How many entries of `numel` a density keeps (TIES, as published), ties apart."""
    return max(1, int(density * numel))


class _Measuring:
    """The passes over one plan, and what they have found so far."""

    def __init__(
        self, plan: Plan, sources: list[int], device: torch.device, resources: Resources, track: Track
    ) -> None:
        self.plan, self.sources, self.device, self.track = plan, sources, device, track
        self.threads = resources.threads
        self.models = range(plan.number_of_models)
        self.chunk = resources.chunk_for(len(self.models), whole_blocks=True)
        self.tensors = sorted((tensor for tensor in plan.tensors if tensor.edited), key=lambda t: natural(t.name))
        self.titles = iter(enumerate(plan.passes, 1))
        self.last = len(plan.passes) + 1

    def found(self, **statistics: Any) -> None:
        """Keep what a pass found."""
        self.plan = replace(self.plan, statistics=replace(self.plan.statistics, **statistics))

    def one_pass(
        self,
        items: Iterable[Item],
        job: Callable[[Worker, Item], Result],
        tally: Callable[[Result], int],
    ) -> None:
        """Do a job to every item, and tally the results in the order of the items.

        Args:
            items: chunks or tensors.
            job: in a worker's thread; gives something small.
            tally: in this thread; gives the bytes that were read.
        """
        number, (what, times) = next(self.titles)
        plan = self.plan
        pool = Pool(lambda: Worker(plan, self.sources, self.device, self.chunk), items, job, self.device)
        title = f"measuring {what} {number}/{self.last}"
        with closing(pool.in_order(self.threads)) as results:
            for _ in self.track(title, times * plan.bytes_measured, (tally(result) for result in results)):
                pass

    def chunks(self, tensors: Iterable[TensorPlan] | None = None) -> Iterable[PlanChunk]:
        """Everything that is merged, of all tensors or of some."""
        chunks = chunks_of(self.tensors if tensors is None else tensors, self.chunk)
        return (chunk for chunk in chunks if chunk.piece.models)

    def global_thresholds(self) -> None:
        """The k-th largest magnitude of each model's whole task vector, by two rounds of counting."""
        numel = sum(piece.numel for tensor in self.tensors for piece in tensor.pieces if piece.models)
        density = self.tensors[0].values["density"]
        windows = {model: Window.over(0, _ALL_BITS) for model in self.models if density[model] != 1}
        kept = dict.fromkeys(self.models, numel)
        for _ in range(ROUNDS):
            counts: dict[Worker, dict[int, torch.Tensor]] = defaultdict(dict)

            def count(worker: Worker, chunk: PlanChunk) -> int:
                own = counts[worker]  # noqa: B023 - the pass is over before the next round
                for model, fresh in _count(worker, chunk, windows).items():
                    own[model] = own[model].add_(fresh) if model in own else fresh
                return chunk.nbytes

            self.one_pass(self.chunks(), count, lambda nbytes: nbytes)
            for model, window in windows.items() if numel else ():
                total = torch.stack([own[model] for own in counts.values() if own]).sum(0)
                windows[model], kept[model] = window.narrowed(total, _kept(density[model], numel))
        thresholds = {(model, None): window.magnitude() for model, window in windows.items() if numel}
        self.found(thresholds=thresholds, kept=tuple((kept[model], numel) for model in self.models))

    def thresholds_by_tensor(self) -> None:
        """The k-th largest magnitude of each tensor of each model; a worker counts a tensor twice over."""
        thresholds: dict[tuple[int, str | None], float] = {}
        kept, total = [0] * len(self.models), 0

        def select(worker: Worker, tensor: TensorPlan) -> tuple[TensorPlan, dict[int, tuple[float, int]]]:
            density = tensor.values["density"]
            numel = sum(piece.numel for piece in tensor.pieces if piece.models)
            windows = {model: Window.over(0, _ALL_BITS) for model in self.models if density[model] != 1 and numel}
            found: dict[int, int] = {}
            for _ in range(ROUNDS):
                counts: dict[int, torch.Tensor] = {}
                for chunk in self.chunks([tensor]):
                    for model, fresh in _count(worker, chunk, windows).items():
                        counts[model] = counts[model].add_(fresh) if model in counts else fresh
                for model, window in windows.items():
                    windows[model], found[model] = window.narrowed(counts[model], _kept(density[model], numel))
            return tensor, {model: (window.magnitude(), found[model]) for model, window in windows.items()}

        def tally(result: tuple[TensorPlan, dict[int, tuple[float, int]]]) -> int:
            nonlocal total
            tensor, found = result
            numel = sum(piece.numel for piece in tensor.pieces if piece.models)
            total += numel
            for model in self.models:
                magnitude, number = found.get(model, (None, numel))
                kept[model] += number
                if magnitude is not None:
                    thresholds[model, tensor.name] = magnitude
            return ROUNDS * sum(chunk.nbytes for chunk in self.chunks([tensor]))

        self.one_pass(self.tensors, select, tally)
        self.found(thresholds=thresholds, kept=tuple((number, total) for number in kept))

    def l1_norms(self) -> None:
        """Each tensor's L1 norm in each model, of the whole task vector and of what is left after dropping."""
        sums: dict[str, list[list[float]]] = {}

        def job(worker: Worker, chunk: PlanChunk) -> tuple[PlanChunk, list[tuple[list[float], list[float]]]]:
            _, vectors = worker.task_vectors(chunk)
            _refuse_nonfinite(worker, chunk, vectors)
            masks = worker.masks(chunk, vectors)
            before = [block_sums(tau.abs(), BLOCK) for tau in vectors]
            after = [block_sums(tau.abs_(), BLOCK) for tau in sparse(vectors, masks)] if masks else before
            return chunk, list(zip(before, after, strict=True))

        def tally(result: tuple[PlanChunk, list[tuple[list[float], list[float]]]]) -> int:
            chunk, by_model = result
            totals = sums.setdefault(chunk.tensor.name, [[0.0, 0.0] for _ in self.models])
            for total, (before, after) in zip(totals, by_model, strict=True):
                for side, blocks in enumerate((before, after)):
                    total[side] = _added(total[side], blocks)
            return chunk.nbytes

        self.one_pass(self.chunks(), job, tally)
        self.found(l1={name: tuple((before, after) for before, after in totals) for name, totals in sums.items()})

    def angles(self) -> None:
        """What the angle between two models' tensors follows from: their dot product and squared norms."""
        sums: dict[str, list[float]] = {}

        def job(worker: Worker, chunk: PlanChunk) -> tuple[PlanChunk, list[list[float]]]:
            _, weights = worker.inputs(chunk)
            _refuse_nonfinite(worker, chunk, weights)
            a, b = (tensor.to(torch.float64) for tensor in weights)
            return chunk, [block_sums(product, BLOCK) for product in (a * b, a * a, b * b)]

        def tally(result: tuple[PlanChunk, list[list[float]]]) -> int:
            chunk, products = result
            totals = sums.setdefault(chunk.tensor.name, [0.0, 0.0, 0.0])
            for number, blocks in enumerate(products):
                totals[number] = _added(totals[number], blocks)
            return chunk.nbytes

        self.one_pass(self.chunks(), job, tally)
        self.found(products={name: (dot, first, second) for name, (dot, first, second) in sums.items()})

    def signs_and_norms(self) -> None:
        """The sign that most elections give; and the L1 norms of the sum of all task vectors and of the merged one.

        What is merged depends on the majority where a sum is zero. Both cases are summed, and the one that it turns out
        to be is taken.
        """
        needs = self.plan.needs
        balance, total, merged = 0, 0.0, [0.0, 0.0]

        def tally(result: _Election) -> int:
            nonlocal balance, total
            balance += result.balance
            total = _added(total, result.total)
            merged[0] = _added(merged[0], result.with_plus)
            merged[1] = _added(merged[1], result.with_minus)
            return result.nbytes

        self.one_pass(self.chunks(), lambda worker, chunk: _elect(worker, chunk, needs), tally)
        majority = (balance > 0) - (balance < 0) if needs.majority else 1
        norms = Norms(total, merged[0] if majority > 0 else merged[1], len(self.models)) if needs.norms else None
        self.found(majority=majority, norms=norms)


@dataclass(frozen=True, slots=True)
class _Election:
    """A chunk's part in the signs and norms; sums by block."""

    nbytes: int
    balance: int = 0
    total: Sequence[float] = ()
    with_plus: Sequence[float] = ()
    with_minus: Sequence[float] = ()


def _elect(worker: Worker, chunk: PlanChunk, needs: Needs) -> _Election:
    plan, tensor = worker.plan, chunk.tensor
    method, told = plan.recipe.method, dict(plan.told(tensor))
    base, vectors = worker.inputs(chunk)
    _refuse_nonfinite(worker, chunk, vectors)
    assert base is not None
    if method.takes == "weights":
        total = weighted_sum([weights - base for weights in vectors], [1.0] * len(vectors))
        merged = task_vector(worker.merge(chunk, vectors, None, told), base)
        sums = block_sums(merged.abs_(), BLOCK)
        return _Election(chunk.nbytes, 0, block_sums(total.abs_(), BLOCK), sums, sums)

    vectors = [task_vector(model, base) for model in vectors]
    masks = worker.masks(chunk, vectors)
    if method.sums:  # its own trim is part of what is given
        vectors, masks = list(sparse(vectors, masks)), None
    balance, contested = 0, False
    if needs.majority:
        elected, waiting = signs(vectors, masks=masks, weight=told["weight"], factor=told.get("factor", ()))
        balance, contested = int(elected.sum(dtype=torch.float64)), bool(waiting != 0)
    if not needs.norms:
        return _Election(chunk.nbytes, balance)
    total = weighted_sum(vectors, [1.0] * len(vectors), overwrite=False)
    again = [tau.clone() for tau in vectors] if contested else []
    with_plus = block_sums(worker.merge(chunk, vectors, masks, told | _majority(needs, 1)).abs_(), BLOCK)
    with_minus = with_plus
    if contested:
        with_minus = block_sums(worker.merge(chunk, again, masks, told | _majority(needs, -1)).abs_(), BLOCK)
    return _Election(chunk.nbytes, balance, block_sums(total.abs_(), BLOCK), with_plus, with_minus)


def _majority(needs: Needs, sign: int) -> dict[str, int]:
    return {"majority": sign} if needs.majority else {}


def _count(worker: Worker, chunk: PlanChunk, windows: dict[int, Window]) -> dict[int, torch.Tensor]:
    """Where each model's entries lie, as seen from its window; on the CPU."""
    _, vectors = worker.task_vectors(chunk)
    _refuse_nonfinite(worker, chunk, vectors)
    return {model: window.count(vectors[model]).cpu() for model, window in windows.items()}


def _refuse_nonfinite(worker: Worker, chunk: PlanChunk, tensors: Sequence[torch.Tensor]) -> None:
    if not all(bool(torch.stack(torch.aminmax(tensor)).isfinite().all()) for tensor in tensors):
        worker.refuse_nonfinite(chunk)


def _added(total: float, blocks: Sequence[float]) -> float:
    for block in blocks:
        total += block
    return total
