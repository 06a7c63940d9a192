"""What a plan needs to know of the numbers in its inputs, measured by streaming them: exactly, in bounded memory.

Counts are whole numbers, and sums are taken over fixed blocks in the order of the tensors' names, so that nothing here
depends on chunks, workers, or the way inputs and output are sharded.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any, TypeVar

import torch

from lines_cli.engine.arithmetic import block_sums, is_finite, task_vector
from lines_cli.engine.chunks import Chunk, PlanChunk, items_of, merged_segments
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened
from lines_cli.engine.merge_chunk import drop_entries, merge_chunk, merge_entries, read_chunk
from lines_cli.engine.pool import Pool
from lines_cli.engine.threshold import _COLLECTED, Counter, Counters, Search, Seen, Sought, Window, look
from lines_cli.engine.workers import Worker
from lines_cli.methods import ByMagnitude
from lines_cli.methods.sparsify import Bounds, Ranks
from lines_cli.methods.sums import weighted_sum
from lines_cli.plan.plan import WEIGHTS, Plan, TensorPlan, bytes_of, pass_of_rule
from lines_cli.plan.resources import SUM_BLOCK
from lines_cli.plan.statistics import Needs, Norms, Statistics
from lines_cli.plan.tensors import Segment
from lines_cli.plan.weights import with_weights
from lines_cli.scaling.depth_rules import DepthRule, find_rule
from lines_cli.storage.names import natural

Track = Callable[[str, int, Iterable[int]], Iterable[int]]
"""Wraps the stream of byte counts of one pass, to show progress: the pass's title, its total, the stream."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def untracked(_title: str, _total: int, done: Iterable[int]) -> Iterable[int]:
    """No progress."""
    return done


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was found, how often everything was read for it, and how many bytes in all."""

    statistics: Statistics
    passes: int
    bytes_read: int


def measure(plan: Plan, sources: Sequence[Opened], devices: Devices, track: Track) -> Measurement:
    """Measure what `plan.needs`; each pass may use what those before it found.

    Args:
        plan: not yet resolved.
        sources: the open inputs, as in `plan.paths`.
        devices: the devices to compute on.
        track: wraps the stream of byte counts of each pass.

    Raises:
        DataError: NaN or Inf in an input.
        CheckpointError: an input ends early or cannot be read.
    """
    needs = plan.needs
    if not needs:
        return Measurement(plan.statistics, 0, 0)
    measuring = Measuring(plan, sources, devices, track)
    if needs.weights:
        measuring.weights()
    if needs.thresholds and plan.trims_globally:
        measuring.global_thresholds()
    elif needs.thresholds:
        measuring.thresholds_by_tensor()
    if needs.l1:
        measuring.l1_norms()
    if needs.sums:
        measuring.sums()
    for words in plan.elections:
        measuring.signs_and_norms(words)
    for rule in needs.scores:
        measuring.scores(rule)
    return Measurement(measuring.plan.statistics, measuring.passes, measuring.bytes_read)


class Measuring:
    """The passes over one plan, and what they have found so far.

    Args:
        plan: not yet resolved.
        sources: the open inputs, as in `plan.paths`.
        devices: the devices to compute on.
        track: wraps the stream of byte counts of each pass.
        only: the tensors that are looked at, in the order of their names; all that are merged, unless said.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Opened],
        devices: Devices,
        track: Track,
        *,
        only: Sequence[TensorPlan] | None = None,
    ) -> None:
        self.plan, self.sources, self.devices, self.track = plan, sources, devices, track
        self.models = range(plan.number_of_models)
        self.tensors = plan.merged_by_name if only is None else only
        self.total = None if only is None else bytes_of(segment for _, segment in merged_segments(only))
        self.passes = self.bytes_read = 0

    def found(self, **statistics: Any) -> None:
        """Keep what a pass found."""
        self.plan = replace(self.plan, statistics=replace(self.plan.statistics, **statistics))

    def one_pass(self, what: str, job: Callable[[Worker, PlanChunk], Result], tally: Callable[[Result], None]) -> None:
        """Do a job to everything that is merged, and tally the results in the order of the tensors' names.

        Args:
            what: is measured.
            job: in a worker's thread, with one chunk; gives something small.
            tally: in this thread.
        """

        def of_item(worker: Worker, item: list[PlanChunk]) -> tuple[int, list[Result]]:
            return sum(chunk.nbytes for chunk in item), [job(worker, chunk) for chunk in worker.cut(item)]

        def add(result: tuple[int, list[Result]]) -> int:
            for of_chunk in result[1]:
                tally(of_chunk)
            return result[0]

        self.stream(what, items_of(merged_segments(self.tensors)), of_item, add)

    def stream(
        self,
        what: str,
        items: Iterable[Item],
        job: Callable[[Worker, Item], Result],
        tally: Callable[[Result], int],
        *,
        total: int | None = None,
    ) -> None:
        """Do a job to every item, and tally the results in the order of the items; `tally` gives the bytes read.

        Args:
            what: is measured.
            items: of work.
            job: in a worker's thread.
            tally: in this thread.
            total: bytes to read; everything that is merged, unless said: then it is a pass.
        """
        plan = self.plan
        size = self.devices.chunk(plan.per_entry, whole=plan.whole_bytes(len(self.devices.members)), whole_blocks=True)
        shared, turned = self.devices.whole_tensors(), self.devices.turned(plan.turned_sides)
        pool = Pool(lambda device: Worker(plan, self.sources, device, size, shared, turned), items, job, self.devices)
        title = f"measuring {what}"
        if total is None:
            self.passes += 1
        if total is None or what in map(pass_of_rule, plan.needs.scores):
            title += f" {plan.passes.index(what) + 1}/{len(plan.passes) + 1}"
        with closing(pool.in_order()) as results:
            whole = plan.bytes_measured if self.total is None else self.total
            for nbytes in self.track(title, total or whole, (tally(result) for result in results)):
                self.bytes_read += nbytes

    def global_thresholds(self) -> None:
        """The magnitudes of each model's whole task vector that the sparsifier asks for; of a pipeline's, those of each
        component's.
        """
        searches = self.searches()
        for segments, search in searches.values():
            whole = None if len(searches) == 1 else bytes_of(segment for _, segment in segments)

            def count(
                items: Iterable[list[PlanChunk]],
                windows: dict[Sought, Window],
                nbytes: int | None,
                whole: int | None = whole,
            ) -> Counters:
                return self.count(items, windows, total=whole if nbytes is None else nbytes)

            search.run(segments, count)
        self.passes += len(searches) > 1  # each is a part of one
        self.found_by({name: search for name, (_, search) in searches.items()})

    def searches(self) -> dict[str | None, tuple[list[tuple[TensorPlan, Segment]], Search]]:
        """What is searched for together, by its name (`Plan.measured_with`): its segments, and the search."""
        groups: dict[str | None, list[TensorPlan]] = defaultdict(list)
        for tensor in self.tensors:
            groups[self.plan.measured_with(tensor)].append(tensor)
        found = {}
        for name, tensors in groups.items():
            segments = list(merged_segments(tensors))
            numel = sum(segment.numel for _, segment in segments)
            found[name] = segments, Search(self.ranks(tensors[0], numel), numel)
        return found

    def found_by(self, searches: Mapping[str | None, Search]) -> None:
        """Keep the thresholds that searches have found, all of them."""
        thresholds = {
            (model, name): search.bounds(model)
            for name, search in searches.items()
            for model in self.models
            if search.ranks[model]
        }
        kept = [sum(search.kept(model) for search in searches.values()) for model in self.models]
        total = sum(search.numel for search in searches.values())
        self.found(thresholds=thresholds, kept=tuple((number, total) for number in kept))

    def ranks(self, tensor: TensorPlan, numel: int) -> tuple[Ranks, ...]:
        """Which magnitudes are asked for of each model, largest first, of a tensor or of all of them."""
        sparsifier = self.plan.recipe.method.sparsifier
        assert isinstance(sparsifier, ByMagnitude)
        return sparsifier.ranks(tensor.values, numel) if numel else ((),) * len(self.models)

    def count(
        self, items: Iterable[list[PlanChunk]], windows: dict[Sought, Window], *, total: int | None = None
    ) -> Counters:
        """What is seen of each model's magnitudes through its windows."""
        by_worker: dict[Worker, Counters] = {}

        def job(worker: Worker, item: list[PlanChunk]) -> int:
            if worker not in by_worker:
                by_worker[worker] = {sought: Counter(window) for sought, window in windows.items()}
            _count(worker, item, by_worker[worker])
            return sum(chunk.nbytes for chunk in item)

        self.stream("thresholds", items, job, lambda nbytes: nbytes, total=total)
        capacity = _COLLECTED * max(1, len(by_worker))
        counters = {sought: Counter(window, capacity) for sought, window in windows.items()}
        for own in by_worker.values():
            for sought, counter in own.items():
                counters[sought].join(counter)
        return counters

    def thresholds_by_tensor(self) -> None:
        """The magnitudes of each tensor of each model that the sparsifier asks for; a worker looks at a tensor as often
        as it must.
        """
        thresholds: dict[tuple[int, str | None], Bounds] = {}
        kept, total = [0] * len(self.models), 0

        def select(worker: Worker, tensor: TensorPlan) -> _Selected:
            segments = list(merged_segments([tensor]))
            numel = sum(segment.numel for _, segment in segments)
            search = Search(self.ranks(tensor, numel), numel)
            nbytes = 0

            def count(items: Iterable[list[PlanChunk]], windows: dict[Sought, Window], _: int | None) -> Counters:
                nonlocal nbytes
                counters = {sought: Counter(window) for sought, window in windows.items()}
                for item in items:
                    _count(worker, item, counters)
                    nbytes += sum(chunk.nbytes for chunk in item)
                return counters

            search.run(segments, count)
            return _Selected(tensor, numel, search, nbytes)

        def tally(result: _Selected) -> int:
            nonlocal total
            total += result.numel
            for model in self.models:
                kept[model] += result.search.kept(model)
                if result.search.ranks[model]:
                    thresholds[model, result.tensor.name] = result.search.bounds(model)
            return result.nbytes

        self.stream("thresholds", self.tensors, select, tally)
        self.found(thresholds=thresholds, kept=tuple((number, total) for number in kept))

    def weights(self) -> None:
        """The squared L2 norm of each model's whole task vector; from then on weights are numbers."""
        squares = [0.0] * len(self.models)

        def tally(result: list[list[float]]) -> None:
            for model, blocks in enumerate(result):
                squares[model] = _added(squares[model], blocks)

        self.squares(tally)
        self.found_squares(squares)

    def squares(self, add: Callable[[list[list[float]]], None]) -> None:
        """Give each model's squared L2 norms of blocks to `add`, chunk by chunk, in the order of the tensors' names."""

        def job(worker: Worker, chunk: PlanChunk) -> list[list[float]]:
            _, vectors = read_chunk(worker, chunk)
            _refuse_nonfinite(worker, chunk, vectors)
            return [block_sums(tau.double().square_(), SUM_BLOCK) for tau in vectors]

        self.one_pass(WEIGHTS, job, add)

    def found_squares(self, squares: Sequence[float]) -> None:
        """Keep the squared norms of the models' whole task vectors, and the weights that rest on them."""
        self.found(squares=tuple(squares))
        self.plan = with_weights(self.plan, squares)
        numbers = {tensor.name: tensor for tensor in self.plan.tensors}
        self.tensors = [numbers[tensor.name] for tensor in self.tensors]

    def l1_norms(self) -> None:
        """Each tensor's L1 norm in each model, of the whole task vector and of what is left after dropping."""
        sums: dict[str, list[list[float]]] = {}

        def job(worker: Worker, chunk: PlanChunk) -> tuple[str, list[tuple[list[float], list[float]]]]:
            _, vectors = read_chunk(worker, chunk)
            _refuse_nonfinite(worker, chunk, vectors)
            before = [block_sums(tau.abs(), SUM_BLOCK) for tau in vectors]
            drop_entries(worker, chunk, vectors)
            after = [block_sums(tau.abs_(), SUM_BLOCK) for tau in vectors]
            return chunk.tensor.name, list(zip(before, after, strict=True))

        def tally(result: tuple[str, list[tuple[list[float], list[float]]]]) -> None:
            name, by_model = result
            totals = sums.setdefault(name, [[0.0, 0.0] for _ in self.models])
            for total, (before, after) in zip(totals, by_model, strict=True):
                for side, blocks in enumerate((before, after)):
                    total[side] = _added(total[side], blocks)

        self.one_pass("L1 norms", job, tally)
        self.found(l1={name: tuple((before, after) for before, after in totals) for name, totals in sums.items()})

    def sums(self) -> None:
        """What the method adds up over each tensor, such as the products from which angles follow."""
        method = self.plan.recipe.method
        sums: dict[str, list[float]] = {}

        def job(worker: Worker, chunk: PlanChunk) -> tuple[str, list[list[float]]]:
            if "sums" not in method.needs(chunk.tensor.values):
                return chunk.tensor.name, []
            _, tensors = read_chunk(worker, chunk)
            _refuse_nonfinite(worker, chunk, tensors)
            drop_entries(worker, chunk, tensors)
            terms = method.sums(tensors, chunk.tensor.values)
            return chunk.tensor.name, [block_sums(term.to(torch.float64), SUM_BLOCK) for term in terms]

        def tally(result: tuple[str, list[list[float]]]) -> None:
            name, terms = result
            totals = sums.setdefault(name, [0.0] * len(terms))
            for number, blocks in enumerate(terms):
                totals[number] = _added(totals[number], blocks)

        self.one_pass("sums", job, tally)
        self.found(sums={name: tuple(totals) for name, totals in sums.items()})

    def signs_and_norms(self, words: tuple[str, ...]) -> None:
        """The sign that most elections give; and the L1 norms of the sum of all task vectors and of the merged one.

        Args:
            words: which of the two this pass finds (`Plan.elections`).
        """
        found = Elected()
        self.elect(words, found.add)
        self.found_in(words, found)

    def elect(self, words: tuple[str, ...], add: Callable[[Election], None]) -> None:
        """Hold the elections, and give each chunk's to `add`, in the order of the tensors' names."""
        needs = _needs_of(words)
        self.one_pass(" and ".join(words), lambda worker, chunk: _elect(worker, chunk, needs), add)

    def found_in(self, words: tuple[str, ...], elected: Elected) -> None:
        """Keep what all elections have come to."""
        needs = _needs_of(words)
        known = self.plan.statistics.majority
        majority = (elected.balance > 0) - (elected.balance < 0) if needs.majority else known
        merged = elected.with_plus if majority > 0 or not needs.majority else elected.with_minus
        norms = Norms(elected.total, merged, len(self.models)) if needs.norms else None
        self.found(majority=majority, norms=norms)

    def scores(self, name: str) -> None:
        """What a depth rule asks to know of each matrix in the blocks and of its update."""
        rule = find_rule(name)
        looked_at = {tensor.name for tensor in self.tensors}
        in_blocks = [tensor for tensor in self.plan.in_blocks if tensor.name in looked_at]
        tensors = sorted(in_blocks, key=lambda tensor: natural(tensor.name))
        found: dict[str, list[float]] = {}

        def of_entries(worker: Worker, item: list[PlanChunk]) -> _Scored:
            found = []
            for chunk in worker.cut(item):
                numbers = _asked(rule, *_updated(worker, chunk))
                found.append((chunk.tensor.name, [block_sums(each, SUM_BLOCK) for each in numbers]))
            return found, sum(chunk.nbytes for chunk in item)

        def of_tensor(worker: Worker, tensor: TensorPlan) -> _Scored:
            each = [_whole(worker, rule, tensor, segment) for segment in tensor.segments if segment.models]
            return [(tensor.name, [[number] for number in numbers]) for numbers in each], bytes_of(tensor.segments)

        def tally(result: _Scored) -> int:
            for tensor, sums in result[0]:
                totals = found.setdefault(tensor, [0.0] * len(sums))
                totals[:] = [_added(total, blocks) for total, blocks in zip(totals, sums, strict=True)]
            return result[1]

        what = pass_of_rule(name)
        total = bytes_of(segment for _, segment in merged_segments(tensors))
        if rule.sees == "entries":
            self.stream(what, items_of(merged_segments(tensors)), of_entries, tally, total=total)
        else:
            self.stream(what, tensors, of_tensor, tally, total=total)
        self.passes += 1
        known = {tensor: tuple(numbers) for tensor, numbers in found.items()}
        self.found(scores={**self.plan.statistics.scores, name: known})


_Scored = tuple[list[tuple[str, list[list[float]]]], int]
"""Of some tensors the numbers that a rule asked for, as sums to be added up; and the bytes read."""


def _updated(worker: Worker, chunk: PlanChunk) -> tuple[torch.Tensor, torch.Tensor]:
    """The base's entries and what is merged into them, before lambda and gamma: [n] each.

    Raises:
        DataError: NaN or Inf in an input.
    """
    method = worker.plan.recipe.method

    def given(_: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        _refuse_nonfinite(worker, chunk, tensors)

    merged = merge_chunk(worker, chunk, given=given)
    assert merged.base is not None, "a task vector without a base"
    if method.takes == "weights":
        task_vector(merged.values, merged.base)
    return merged.base, merged.values


def _whole(worker: Worker, rule: DepthRule, tensor: TensorPlan, segment: Segment) -> list[float]:
    """What a rule that sees whole tensors asks to know of one."""
    dtype = torch.float64 if tensor.in_float64 else torch.float32
    base, update = (torch.empty(segment.numel, dtype=dtype, device=worker.device) for _ in range(2))
    for chunk in worker.cut([Chunk(tensor, segment, 0, segment.numel)]):
        for into, entries in zip((base, update), _updated(worker, chunk), strict=True):
            into[chunk.first : chunk.first + chunk.numel].copy_(entries)
    shape = tensor.shape_of(segment)
    return [float(f"{float(number):.9g}") for number in _asked(rule, base.view(shape), update.view(shape))]


def _asked(rule: DepthRule, base: torch.Tensor, update: torch.Tensor) -> Sequence[Any]:
    assert rule.measure is not None
    return rule.measure(base, update)


def _needs_of(words: tuple[str, ...]) -> Needs:
    return Needs(majority="signs" in words, norms="norms" in words)


class Elected:
    """What elections come to, in the order of the tensors' names.

    What is merged depends on the majority where a sum is zero. Both cases are summed, and the one that it turns out to
    be is taken.
    """

    def __init__(self) -> None:
        self.balance, self.total, self.with_plus, self.with_minus = 0, 0.0, 0.0, 0.0

    def add(self, result: Election) -> None:
        """Take account of a chunk, or of several one after the other."""
        self.balance += result.balance
        self.total = _added(self.total, result.total)
        self.with_plus = _added(self.with_plus, result.with_plus)
        self.with_minus = _added(self.with_minus, result.with_minus)


@dataclass(frozen=True, slots=True)
class _Selected:
    """What was found of a tensor, of how many entries, and the bytes read."""

    tensor: TensorPlan
    numel: int
    search: Search
    nbytes: int


def _count(worker: Worker, item: Iterable[PlanChunk], counters: Counters) -> None:
    """Count all of an item, or, if that fails, nothing."""
    windows = [counter.window for counter in counters.values()]
    seen: list[Seen] = []
    for chunk in worker.cut(item):
        _, vectors = worker.task_vectors(chunk)
        every = worker.held(chunk)[0][1 : 1 + len(vectors)]
        models = [model for model, _ in counters]
        sought = every if models == list(range(len(vectors))) else every[models]
        found, finite = look(sought, windows)
        if not finite:
            worker.refuse_nonfinite(chunk)
        seen += [(bits.cpu(), above) for bits, above in found]
    for counter, (bits, above) in zip(cycle(counters.values()), seen):
        counter.add(bits, above)


@dataclass(frozen=True, slots=True)
class Election:
    """A chunk's part in the signs and norms; sums by block."""

    balance: int = 0
    total: Sequence[float] = ()
    with_plus: Sequence[float] = ()
    with_minus: Sequence[float] = ()


def _elect(worker: Worker, chunk: PlanChunk, needs: Needs) -> Election:
    method = worker.plan.recipe.method
    whole: Sequence[float] = ()
    balance, contested = 0, False
    again: list[torch.Tensor] = []

    def given(base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        nonlocal whole
        _refuse_nonfinite(worker, chunk, tensors)
        if needs.norms and not method.norm_of_kept:
            whole = norm_of_sum(base, tensors)

    def left(base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> None:
        nonlocal whole, balance, contested
        if needs.majority:
            assert method.elect is not None, "a majority of signs that the method does not elect"
            elected, contested = method.elect(tensors, **worker.keywords(chunk.tensor), waiting=needs.norms)
            balance = int(elected.sum(dtype=torch.float64))
        if needs.norms and method.norm_of_kept:
            whole = norm_of_sum(base, tensors)
        if contested:
            again.extend(tau.clone() for tau in tensors)

    def norm_of_sum(base: torch.Tensor | None, tensors: Sequence[torch.Tensor]) -> list[float]:
        if method.takes == "weights":
            assert base is not None
            tensors = [weights - base for weights in tensors]
        return block_sums(_sum(tensors).abs_(), SUM_BLOCK)

    if not needs.norms:
        base, tensors = read_chunk(worker, chunk)
        given(base, tensors)
        drop_entries(worker, chunk, tensors)
        left(base, tensors)
        return Election(balance)
    one, other = (1, -1) if needs.majority else (None, None)
    looks = left if needs.majority or method.norm_of_kept else None
    merged = merge_chunk(worker, chunk, given=given, left=looks, majority=one)
    values = merged.values
    if method.takes == "weights":
        assert merged.base is not None
        values = task_vector(values, merged.base)
    with_plus = with_minus = block_sums(values.abs_(), SUM_BLOCK)
    if contested:
        with_minus = block_sums(merge_entries(worker, chunk, again, majority=other).abs_(), SUM_BLOCK)
    return Election(balance, whole, with_plus, with_minus)


def _sum(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    return weighted_sum(vectors, [1.0] * len(vectors), overwrite=False)


def _refuse_nonfinite(worker: Worker, chunk: PlanChunk, tensors: Sequence[torch.Tensor]) -> None:
    if not all(is_finite(tensor) for tensor in tensors):
        worker.refuse_nonfinite(chunk)


def _added(total: float, blocks: Sequence[float]) -> float:
    for block in blocks:
        total += block
    return total
