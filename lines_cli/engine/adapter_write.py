"""Makes an adapter: factors scaled, put side by side, reduced to fewer ranks, or taken from a fine-tune's update; and
what has to be measured for it first.

A module is made whole, once, by the worker that first needs a part of its factors. All arithmetic is float64, rounded
once to the output's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.engine.arithmetic import TORCH_DTYPES, cast, first_nonfinite, is_finite, same_nan
from lines_cli.engine.chunks import Chunk
from lines_cli.engine.devices import Devices
from lines_cli.engine.input_files import Opened
from lines_cli.engine.low_rank import (
    balanced,
    nearest,
    rank_for,
    reduced,
    same_signs,
    spectrum_of_gram,
    spectrum_of_product,
    stacked,
)
from lines_cli.engine.measure import Track
from lines_cli.engine.parts import Turned
from lines_cli.engine.pool import Pool
from lines_cli.engine.whole_tensors import Kept
from lines_cli.engine.workers import Reader
from lines_cli.engine.write import RangeJob, Target
from lines_cli.errors import DataError, printable
from lines_cli.plan.adapter_plan import (
    ROWS,
    AdapterModule,
    AdapterPlan,
    AdapterTensor,
    Difference,
    Entries,
    FactorOf,
    Found,
    Product,
    Rest,
    Role,
)
from lines_cli.plan.tensors import Segment, SourceRange
from lines_cli.storage.digest import WRITE_SIZE
from lines_cli.storage.files import in_whole_pages

AdapterChunk = Chunk[AdapterTensor]
_NO_INFO = TensorInfo("F64", (), 0, 0)


@dataclass(frozen=True, slots=True)
class Factors:
    """A module's factors, as they are written.

    Attributes:
        tensors: by their roles, in the output's dtype, on the host.
        kept, total: the squared norms of the update that they stand for, and of the one they were made of.
    """

    tensors: Mapping[Role, Tensor]
    kept: float
    total: float


@dataclass(slots=True)
class AdapterTally:
    """What is counted while an adapter is made.

    Attributes:
        norms: of modules that were reduced (numbers into `AdapterPlan.modules`): the squared norms of what is kept, and
            of all.
        nonfinite: tensors -> what is not finite in them, let through.
    """

    norms: dict[int, tuple[float, float]] = field(default_factory=dict)
    nonfinite: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, tally: Mapping[str, object]) -> AdapterTally:
        """What a journal has of a part.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        norms, nonfinite = tally["norms"], tally["nonfinite"]
        if not isinstance(norms, dict) or not isinstance(nonfinite, dict):
            raise TypeError(tally)
        read = {int(number): (float(kept), float(total)) for number, (kept, total) in norms.items()}
        return cls(read, {str(name): str(found) for name, found in nonfinite.items()})

    def add(self, other: AdapterTally) -> None:
        """Take account of another part."""
        self.norms |= other.norms
        self.nonfinite = other.nonfinite | self.nonfinite


@dataclass(frozen=True, slots=True)
class AdapterOutcome:
    """What a run did.

    Attributes:
        plan: what was carried out, ranks measured.
        seconds: how long it took.
        norms: of each module that was reduced or extracted, by its name: the squared norms of what is kept, and of all.
        nonfinite: tensors in which NaN, Inf or an overflow was let through, and what was found first.
        remarks: what a person should know of how it ended.
        resumed: bytes of the output that an earlier run had written.
    """

    plan: AdapterPlan
    seconds: float
    norms: Mapping[str, tuple[float, float]]
    nonfinite: Mapping[str, str]
    remarks: tuple[str, ...] = ()
    resumed: int = 0


class FactorReader(Reader):
    """One thread's device and buffers, and what it reads whole."""

    def __init__(
        self, plan: AdapterPlan, sources: Sequence[Opened], device: torch.device, chunk: int, turned: Turned
    ) -> None:
        super().__init__(plan.paths, sources, device, chunk=chunk, per_entry=plan.per_entry, turned=turned)
        self.write_buffer = in_whole_pages(WRITE_SIZE)  # of the output, on its way to the disk

    def factor(self, stored: StoredTensor) -> Tensor:
        """A whole tensor in its shape, in float64."""
        return self._makers.load(stored).to(torch.float64)

    def run(
        self, tensor: AdapterTensor, source: SourceRange, first: int, numel: int, into: Tensor | None = None
    ) -> Tensor:
        """A run of entries in float64: [numel]; in `into`, if there is room."""
        into = torch.empty(numel, dtype=torch.float64, device=self.device) if into is None else into
        done = 0
        while done < numel:
            chunk = Chunk(tensor, Segment(0, first + numel), first + done, min(self.chunk, numel - done))
            self.made(chunk, source, into[done : done + chunk.numel])
            done += chunk.numel
        return into


class AdapterWrite(RangeJob[FactorReader, AdapterTensor, AdapterTally]):
    """The job of making a range of an adapter's file and writing it; and the sum of what was counted.

    Args:
        plan: what is carried out, its ranks known.
        targets: the file.
        keep: how many modules' factors are kept for other workers.
    """

    def __init__(self, plan: AdapterPlan, targets: list[Target], keep: int) -> None:
        super().__init__(plan.outputs, plan.output, targets, AdapterTally())
        self.plan = plan
        self._made: Kept[Factors] = Kept(keep)

    def nothing(self) -> AdapterTally:
        return AdapterTally()

    def tally_of(self, told: Mapping[str, object]) -> AdapterTally:
        return AdapterTally.of(told)

    def outcome(self) -> AdapterOutcome:
        """What the whole run did, but for how long it took."""
        norms = {self.plan.modules[number].name: pair for number, pair in sorted(self.tally.norms.items())}
        return AdapterOutcome(self.plan, 0.0, norms, self.tally.nonfinite, resumed=self.taken_over)

    def _make(self, worker: FactorReader, chunk: AdapterChunk, tally: AdapterTally) -> memoryview:
        """One chunk as it is to be written; what is counted is added."""
        tensor, made = chunk.tensor, chunk.tensor.made
        if isinstance(made, Entries):
            return self._entries(worker, chunk, made, tally)
        module = self.plan.modules[made.module]
        factors = self._made.get(made.module, lambda: factors_of(worker, module))
        if module.reduced or isinstance(module.made, Difference):
            tally.norms[made.module] = factors.kept, factors.total
        stored = worker.out.device_view(chunk.numel, TORCH_DTYPES[tensor.info.dtype])
        stored.copy_(factors.tensors[made.role].view(-1)[chunk.first : chunk.first + chunk.numel])
        return self._stored(worker, chunk, stored, tally)

    def _entries(self, worker: FactorReader, chunk: AdapterChunk, made: Entries, tally: AdapterTally) -> memoryview:
        """A run of a tensor that is made entry by entry."""
        name, dtype = chunk.tensor.name, chunk.tensor.info.dtype
        if made.base is None and len(made.parts) == 1:
            (part,) = made.parts
            if part.factor == 1 and part.source.dtype == dtype and not part.source.steps:
                loaded = worker.read(chunk, part.source)
                if dtype in TORCH_DTYPES and not is_finite(values := loaded.values()):
                    self._nonfinite(name, values, tally, dtype)
                return loaded.raw
        width = chunk.numel
        total = torch.zeros(width, dtype=torch.float64, device=worker.device)
        base = None
        if made.base is not None:
            base = worker.run(chunk.tensor, made.base, chunk.first, width)
            total += base
        for part in made.parts:
            values = worker.run(chunk.tensor, part.source, chunk.first, width)
            if base is not None:
                values -= base
            total += part.factor * values
        stored = worker.out.device_view(width, TORCH_DTYPES[dtype])
        cast(total, stored)
        return self._stored(worker, chunk, stored, tally)

    def _stored(self, worker: FactorReader, chunk: AdapterChunk, stored: Tensor, tally: AdapterTally) -> memoryview:
        """What is in a worker's buffer for the output: [numel], looked through, as bytes."""
        dtype = chunk.tensor.info.dtype
        if not is_finite(stored):
            self._nonfinite(chunk.tensor.name, stored, tally, dtype)
            same_nan(stored)
        return worker.out.to_host(chunk.numel * itemsize(dtype))

    def _nonfinite(self, name: str, values: Tensor, tally: AdapterTally, dtype: str) -> None:
        """Refuse what is not finite, or let it through and say so.

        Raises:
            DataError: what was found.
        """
        found = first_nonfinite(values.view(-1))
        what = "NaN or Inf" if found is None else found[1]
        said = f"tensor {printable(name)} would hold {what}: an input does, or {dtype} cannot hold a value"
        if not self.plan.recipe.allow_nonfinite:
            raise DataError(
                said,
                hint="Write a wider dtype (--dtype float32) if it is a matter of range; --allow-nonfinite (in a recipe "
                "allow_nonfinite: true) lets such values through.",
            )
        tally.nonfinite.setdefault(name, said)


def factors_of(worker: FactorReader, module: AdapterModule) -> Factors:
    """A module's factors, made whole.

    Raises:
        DataError: what they are made of is not finite, and is to be decomposed.
    """
    made = module.made
    worker.at = module.tensor
    if isinstance(made, Difference):
        down, up, kept, total = _extracted(worker, module, made)
        bias = None
    else:
        assert isinstance(made, Product)
        down, up, bias = _side_by_side(worker, made, module.matrices)
        kept = total = 0.0
        if module.reduced:
            _refuse_nonfinite(module, down, up)
            down, up, kept, total = reduced(down, up, module.rank)
    shapes = {role: shape for role, _, shape in module.tensors}
    found: dict[Role, Tensor | None] = {"A": down, "B": up, "bias": bias}
    tensors: dict[Role, Tensor] = {}
    for role, shape in shapes.items():
        values = found[role]
        values = torch.zeros(shape, dtype=torch.float64) if values is None else values
        stored = torch.empty(values.shape, dtype=TORCH_DTYPES[module.dtype], device=values.device)
        cast(values, stored)
        tensors[role] = stored.reshape(shape).contiguous().cpu()
    return Factors(tensors, kept, total)


def _side_by_side(worker: FactorReader, made: Product, matrices: int = 1) -> tuple[Tensor, Tensor, Tensor | None]:
    """The factors of several adapters, B scaled: [r, in] and [out, r], the ranks added up; and the bias [out]. Of
    several matrices [matrices * r, in], one after the other, and [out, r * matrices], those of each rank together.
    """
    downs = [worker.factor(term.a).flatten(1) for term in made.terms]
    ups = [worker.factor(term.b).flatten(1) * term.scale for term in made.terms]
    biases = [worker.factor(term.bias) * term.scale for term in made.terms if term.bias is not None]
    if matrices > 1:
        down = torch.cat([one.view(matrices, -1, one.shape[1]) for one in downs], 1).flatten(0, 1)
        up = torch.cat([one.view(one.shape[0], -1, matrices) for one in ups], 1).flatten(1, 2)
        return down, up, None
    down, up = stacked(downs, ups)
    return down, up, sum(biases[1:], biases[0]) if biases else None


def _extracted(worker: FactorReader, module: AdapterModule, made: Difference) -> tuple[Tensor, Tensor, float, float]:
    """The factors of the nearest matrix of a rank to an update, scaled; and the squared norms, unscaled, of what it
    keeps and of the update.
    """
    gram, whole = _gram(worker, module, made)
    total = float(gram.diagonal().sum())
    basis = nearest(gram, module.rank)
    del gram
    if whole is not None:
        left, right = basis, basis.T @ whole
        kept = float(right.square().sum())
        balanced(left, right)
    else:
        left, right = torch.cat([block @ basis for block in _blocks(worker, module, made)]), basis.T
        kept = float(left.square().sum())
        balanced(right.T, left.T)
    down, up = (left.T, right.T) if made.transposed else (right, left)
    same_signs(down, up)
    return down, up * made.scale, min(kept, total), total


def _gram(worker: FactorReader, module: AdapterModule, made: Difference) -> tuple[Tensor, Tensor | None]:
    """The Gram matrix over the smaller side of an update, and the update itself where that has more columns than rows.

    Raises:
        DataError: it is not finite.
    """
    rows, columns = made.matrix
    if rows < columns:
        whole = torch.empty(rows, columns, dtype=torch.float64, device=worker.device)
        for _ in _blocks(worker, module, made, whole):
            pass
        gram = whole @ whole.T
    else:
        whole = None
        gram = torch.zeros(columns, columns, dtype=torch.float64, device=worker.device)
        for block in _blocks(worker, module, made):
            gram.addmm_(block.T, block)
    if not bool(gram.diagonal().isfinite().all()):
        raise DataError(
            f"{printable(module.tensor)} holds NaN or Inf in the fine-tune or the base, and has no nearest matrix",
            hint="Look at both: lines inspect CHECKPOINT --check.",
        )
    return gram, whole


def _blocks(
    worker: FactorReader, module: AdapterModule, made: Difference, whole: Tensor | None = None
) -> Iterator[Tensor]:
    """The rows of `ft - base`, as it is stored, some at a time: [some, columns]; in their places in `whole`, if there
    is one.
    """
    rows, columns = made.matrix
    step = max(1, ROWS // max(1, columns))
    tensor = AdapterTensor(module.tensor, 0, _NO_INFO, FactorOf(0, "A"))
    for first in range(0, rows, step):
        numel = (min(rows, first + step) - first) * columns
        into = None if whole is None else whole.view(-1)[first * columns : first * columns + numel]
        values = worker.run(tensor, made.ft, first * columns, numel, into)
        values -= worker.run(tensor, made.base, first * columns, numel)
        yield values.view(-1, columns)


def _refuse_nonfinite(module: AdapterModule, *factors: Tensor) -> None:
    if not all(is_finite(factor) for factor in factors):
        raise DataError(
            f"the factors of {printable(module.name)} hold NaN or Inf, and cannot be reduced to fewer ranks",
            hint="Leave the adapter out that holds them, or merge without --rank.",
        )


# --- what is measured ---

Item = AdapterModule | Rest


def measured(plan: AdapterPlan, sources: Sequence[Opened], devices: Devices, track: Track) -> dict[str, Found]:
    """Measure the ranks of a plan that needs them: that of every module, from the spectrum of its update, or as it is
    asked for where there is any update; and how much the rest changed.
    """
    items: list[Item] = [*plan.modules, *plan.rest]
    size = devices.chunk(plan.per_entry, whole=plan.whole_bytes(len(devices.members)))
    energy = plan.recipe.energy

    def job(worker: FactorReader, item: Item) -> tuple[str, Found, int]:
        worker.at = item.name
        if isinstance(item, Rest):
            return item.name, Found(0, _squared_norm(worker, item)), _entries_of(item)
        return item.name, _found(worker, item, energy), _entries_of(item)

    found: dict[str, Found] = {}
    turned = devices.turned(1)
    pool = Pool(lambda device: FactorReader(plan, sources, device, size, turned), iter(items), job, devices)
    with closing(pool.in_order()) as results:
        done = (_noted(found, name, what, numel) for name, what, numel in results)
        for _ in track("measuring", sum(map(_entries_of, items)), done):
            pass
    return found


def _noted(found: dict[str, Found], name: str, what: Found, numel: int) -> int:
    found[name] = what
    return numel


def _entries_of(item: Item) -> int:
    if isinstance(item, Rest):
        return math.prod(item.shape)
    return math.prod(item.made.shape) if isinstance(item.made, Difference) else 1


def _found(worker: FactorReader, module: AdapterModule, energy: float | None) -> Found:
    """The rank of a module; 0 where there is no update."""
    made = module.made
    if isinstance(made, Product):
        assert energy is not None
        down, up, _ = _side_by_side(worker, made)
        _refuse_nonfinite(module, down, up)
        squares = spectrum_of_product(down, up)
        # An adapter has a module or has it not: one without an update keeps a rank.
        return Found(max(1, min(module.rank, rank_for(squares, energy))), float(squares.sum()))
    assert isinstance(made, Difference)
    if made.scale == 0:
        return Found(0, None)
    if energy is None:
        changed = any(bool(block.any()) for block in _blocks(worker, module, made))
        return Found(module.rank if changed else 0, None)
    gram, _ = _gram(worker, module, made)
    squares = spectrum_of_gram(gram)
    return Found(min(module.rank, rank_for(squares, energy)), float(gram.diagonal().sum()))


def _squared_norm(worker: FactorReader, rest: Rest) -> float | None:
    """How much a tensor changed; None where there is nothing to compare it with."""
    if rest.base is None:
        return None if rest.dtype in TORCH_DTYPES else 0.0  # whole numbers are no update
    numel, total = math.prod(rest.shape), 0.0
    tensor = AdapterTensor(rest.name, 0, _NO_INFO, FactorOf(0, "A"))
    for first in range(0, numel, ROWS):
        some = min(ROWS, numel - first)
        values = worker.run(tensor, rest.ft, first, some)
        values -= worker.run(tensor, rest.base, first, some)
        total += float(values.square().sum())
    return total
