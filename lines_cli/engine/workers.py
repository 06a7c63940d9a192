"""A thread's device and buffers, and what it reads of a plan's inputs with them.

Memory is bounded by workers x chunk x models, whatever the model's size. What is done with an item is a job's business:
the engine's writes it, the measuring passes count or sum over it. On CUDA every worker has a stream: while one waits
for the disk, others copy and compute, and a worker reads the next input while the last one is on its way to the device.
"""

from __future__ import annotations

import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from lines_cli.checkpoint.formulas import Formula
from lines_cli.checkpoint.header import StoredTensor, itemsize
from lines_cli.engine.arithmetic import (
    FLOAT8,
    TORCH_DTYPES,
    first_nonfinite,
    is_finite,
    same_nan,
    task_vector,
    widen,
)
from lines_cli.engine.buffers import Buffer, Loaded
from lines_cli.engine.chunks import Chunk, PlanChunk, Tensor
from lines_cli.engine.devices import (
    SLOTS,
    first_line,
    give_back,
    has_own_memory,
    is_out_of_memory,
    out_of_memory_on,
)
from lines_cli.engine.formulas import Makers
from lines_cli.engine.gather import Gather
from lines_cli.engine.input_files import Opened, Sources, new_shared, read_input
from lines_cli.engine.parts import Turned, read_parts
from lines_cli.engine.shared_entries import are_shared
from lines_cli.engine.whole_tensors import Kept, Whole
from lines_cli.errors import ChangedInputError, CheckpointError, DataError, printable
from lines_cli.methods import Values
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.resources import SUM_BLOCK, BytesPerEntry
from lines_cli.plan.tensors import Segment, SourceRange
from lines_cli.storage.digest import WRITE_SIZE
from lines_cli.storage.files import in_whole_pages


class _Stored:
    """Reads what inputs store; it knows nothing of the buffers, so that these go when their worker does.

    Args:
        paths: the inputs.
        sources: the same, opened.
        device: where factors are put.
        turned: matrices that an input stores the other way round, for all workers.
    """

    def __init__(self, paths: Sequence[Path], sources: Sequence[Opened], device: torch.device, turned: Turned) -> None:
        self._paths, self._sources, self._device, self._turned = paths, sources, device, turned
        self._paces = sources.paces if isinstance(sources, Sources) else [None] * len(sources)
        self.at: str | None = None

    def entries(self, source: SourceRange, view: memoryview, first: int) -> None:
        """Fill `view` with the entries of a range as they are stored, from the `first` of it on."""
        width = itemsize(source.dtype)
        if source.parts:
            read_parts(source.parts, first, view, width, self.fill, self._turned)
        else:
            self.fill(source.file, view, source.offset + first * width)

    def factor(self, stored: StoredTensor, first: int, numel: int) -> torch.Tensor:
        """Entries of a tensor that a step needs, from `first` on: [numel], as they are stored.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        dtype, width = _OF_FACTORS[stored.info.dtype], itemsize(stored.info.dtype)
        raw = bytearray(numel * width)
        self.fill(stored.file, memoryview(raw), stored.info.offset + first * width)
        values = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        return values.to(self._device)

    def fill(self, file: int, view: memoryview, offset: int) -> None:
        """Read bytes of an input into all of `view`."""
        path, started = self._paths[file], time.perf_counter()
        try:
            got = read_input(self._sources[file], view, offset)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
        if (pace := self._paces[file]) is not None:
            pace.took(time.perf_counter() - started, got)
        if got < len(view):
            of = f" in the middle of tensor {printable(self.at)}" if self.at is not None else ""
            raise ChangedInputError(
                f"{path}: ends{of}; it was whole a moment ago",
                hint="Something shortened it. Run it again when nothing writes to it.",
            )


class Reader:
    """One thread's device and buffers: reads a chunk's entries in any input, and holds them widened.

    Args:
        paths: the inputs.
        sources: the same, opened.
        device: where entries are held. A CUDA device gets a stream of this thread's own.
        chunk: most entries of one.
        per_entry: what one entry takes.
        turned: matrices that an input stores the other way round, for all workers.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        sources: Sequence[Opened],
        device: torch.device,
        *,
        chunk: int,
        per_entry: BytesPerEntry,
        turned: Turned,
    ) -> None:
        self.paths, self.sources, self.device, self.chunk, self._room = paths, sources, device, chunk, per_entry
        if device.type == "cuda":
            with out_of_memory_on(device):
                torch.cuda.set_device(device)
                torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call] # this thread's
        self._raw: list[Buffer] = []
        self._held = torch.empty(0)
        self._views: tuple[torch.Tensor, tuple[torch.Tensor, ...]] | None = None  # of what is held: the last asked for
        self._out: list[Buffer] = []
        shared = sources.shared if isinstance(sources, Sources) else new_shared()
        self._stored = _Stored(paths, sources, device, turned)
        self._makers = Makers(self._stored.factor, device, shared)
        self._gather = Gather(self._stored.entries, self._makers, device)
        if (why := self._allocate()) is not None:
            self.halve(why)

    @property
    def at(self) -> str | None:
        """The tensor that is being worked on."""
        return self._stored.at

    @at.setter
    def at(self, tensor: str | None) -> None:
        self._stored.at = tensor

    @property
    def out(self) -> Buffer:
        """Where a chunk of the output is put."""
        return self._out[0]

    def _allocate(self) -> str | None:
        """Take the memory for the buffers; what the device says if it has none."""
        per_entry, device, chunk = self._room, self.device, self.chunk
        slots = SLOTS if has_own_memory(device) else 1
        try:
            self._raw = [Buffer(device, chunk * per_entry.stored) for _ in range(slots)]
            self._out = [Buffer(device, chunk * per_entry.written)]
            self._held = torch.empty(per_entry.held, chunk * per_entry.width, dtype=torch.uint8, device=device)
        except RuntimeError as error:
            if is_out_of_memory(error):  # of the driver's errors, those of pinned memory, too
                return first_line(error)
            nbytes = chunk * per_entry.nbytes(slots=slots)
            raise MemoryError(f"a worker's buffers are {nbytes:,} bytes") from error
        return None

    def halve(self, why: str) -> None:
        """Go on with chunks of half the size, because the device is out of memory.

        Args:
            why: what the device said.

        Raises:
            MemoryError: they are as small as may be.
        """
        said: str | None = why
        while said is not None:
            self._raw, self._out, self._held, self._views = [], [], torch.empty(0), None
            give_back(self.device)
            if self.chunk < 2 * SUM_BLOCK:
                raise MemoryError(f"{self.device} has no room for chunks of {self.chunk:,} entries: {said}")
            self.chunk = self.chunk // 2 // SUM_BLOCK * SUM_BLOCK
            said = self._allocate()

    def cut(self, chunks: Iterable[Chunk[Tensor]]) -> Iterator[Chunk[Tensor]]:
        """The same entries, in steps that fit the buffers."""
        for chunk in chunks:
            self._begin(chunk.tensor.name)
            yield from chunk.cut(self.chunk)

    def _begin(self, tensor: str) -> None:
        if tensor != self.at:
            self._makers.forget()
        self.at = tensor

    def held(self, chunk: Chunk[Tensor]) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """A place for the chunk's entries in each input, in the dtype they are widened to: all of it [inputs, numel],
        and each row.
        """
        dtype = torch.float64 if chunk.tensor.in_float64 else torch.float32
        if self._views is None or self._views[0].shape[1] != chunk.numel or self._views[0].dtype != dtype:
            every = self._held.view(dtype)[:, : chunk.numel]
            self._views = every, every.unbind()
        return self._views

    def read(self, chunk: Chunk[Tensor], source: SourceRange, buffer: Buffer | None = None) -> Loaded:
        """A chunk's entries in one input, as they are stored.

        Raises:
            CheckpointError: the file cannot be read, or is shorter than it was.
        """
        if buffer is None:
            buffer = self._raw[0]
            self._raw.append(self._raw.pop(0))  # the next input goes into the next one
        width = itemsize(source.dtype)
        view = buffer.to_fill(chunk.numel * width)
        if source.gathered is not None:
            self._gather.read(view, source, source.first + chunk.first)
        else:
            self._stored.entries(source, view, chunk.first)
        return Loaded(buffer, source.dtype, chunk.numel, view)

    def made(self, chunk: Chunk[Tensor], source: SourceRange, into: torch.Tensor) -> torch.Tensor:
        """A chunk's entries in one input, widened, made of what is stored where it has steps: `into`, [numel]."""
        return self.made_of(self.read(chunk, source), chunk, source, into)

    def made_of(self, loaded: Loaded, chunk: Chunk[Tensor], source: SourceRange, into: torch.Tensor) -> torch.Tensor:
        """The same of stored entries that were read before."""
        widen(loaded.values(), into)
        if source.steps:
            self._makers.apply(into, source, chunk.first)
        return into

    def update(self, chunk: Chunk[Tensor], source: SourceRange, steps: tuple[Formula, ...], into: torch.Tensor) -> None:
        """Put into [numel] what the last `steps` of a range add to a chunk's entries."""
        self._makers.update(into, steps, source.first + chunk.first)


class Worker(Reader):
    """One thread's device and buffers, and what it reads of a plan's inputs with them (`merge_chunk` computes).

    Args:
        plan: what is carried out.
        sources: the open inputs, as in `plan.paths`.
        device: where entries are held.
        chunk: most entries of one.
        shared: segments that were merged whole, for all workers of a pass.
        turned: matrices that were turned, likewise.

    Raises:
        MemoryError: there is not enough memory for the buffers, on the host or on the device.
    """

    def __init__(
        self,
        plan: Plan,
        sources: Sequence[Opened],
        device: torch.device,
        chunk: int,
        shared: Kept[Whole],
        turned: Turned,
    ) -> None:
        super().__init__(plan.paths, sources, device, chunk=chunk, per_entry=plan.per_entry, turned=turned)
        self.plan, self.shared = plan, shared
        self.write_buffer = in_whole_pages(WRITE_SIZE)  # of the output, on its way to the disk
        self.stays: torch.Tensor | None = None
        """[numel], boolean: entries of the chunk that was last read which are NaN or Inf, the same in
        all inputs; None where there are none.
        """
        self.alone = False
        """Whether no other worker needs a part of the segment that is worked on."""
        self.last_whole: tuple[tuple[str, int, str], Whole] | None = None
        """The segment that was last merged whole, if no other worker needed a part of it."""
        self._keywords: tuple[TensorPlan, int | None, Values] | None = None  # of the last tensor

    def cut(self, chunks: Iterable[PlanChunk]) -> Iterator[PlanChunk]:  # type: ignore[override]
        """The same entries, in steps that fit the buffers."""
        for chunk in chunks:
            self._begin(chunk.tensor.name)
            self.alone = chunk.numel == chunk.segment.numel
            yield from chunk.cut(self.chunk)

    def inputs(self, chunk: PlanChunk) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
        """What is merged: the base's entries, if there is a base, and each model's; [numel] each, in the compute dtype,
        to be overwritten. NaN and Inf that all of them share are 0 there (`stays`).
        """
        base, models = self._read_base(chunk), self._models(chunk)
        for into, source in zip(models, chunk.segment.models, strict=True):
            self.made(chunk, source, into)
        self._set_aside(chunk, base, models)
        return base, models

    def _models(self, chunk: PlanChunk) -> list[torch.Tensor]:
        """A place for each model's entries."""
        _, (_, *models) = self.held(chunk)
        return models[: len(chunk.segment.models)]

    def _set_aside(self, chunk: PlanChunk, base: torch.Tensor | None, models: list[torch.Tensor]) -> None:
        """Note NaN and Inf that all inputs of a chunk share (`stays`), and put 0 in their place."""
        every = models if base is None else [base, *models]
        self.stays = None
        if len(every) > 1 and not is_finite(every[0]):
            self.stays = self._shared(chunk, chunk.segment.sources)
            if self.stays is not None:
                for entries in every:
                    entries.masked_fill_(self.stays, 0.0)

    def base(self, chunk: PlanChunk) -> torch.Tensor | None:
        """The base's entries, as `inputs` gives them."""
        base = self._read_base(chunk)
        self.stays = None
        return base if base is None or is_finite(base) else self.inputs(chunk)[0]

    def copied(self, chunk: PlanChunk) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of a copy that is measured: its entries, the base's, and the difference; [numel] each, in the compute
        dtype.
        """
        assert chunk.segment.copy is not None
        base = self._read_base(chunk)
        assert base is not None
        values = self.made(chunk, chunk.segment.copy, self.held(chunk)[1][1])
        return values, base, values - base

    def _read_base(self, chunk: PlanChunk) -> torch.Tensor | None:
        if chunk.segment.base is None:
            return None
        _, (base, *_) = self.held(chunk)
        return self.made(chunk, chunk.segment.base, base)

    def _shared(self, chunk: PlanChunk, sources: Sequence[SourceRange]) -> torch.Tensor | None:
        """Where all inputs share NaN or Inf: [numel], boolean; None where one of them is no float that is
        computed with.
        """
        if any(source.dtype not in TORCH_DTYPES and not source.steps for source in sources):
            return None
        first = self._numbers(chunk, sources[0]).clone()
        found = ~first.isfinite()
        for source in sources[1:]:
            found &= are_shared(first, self._numbers(chunk, source))
        if not self.plan.recipe.allow_nonfinite and (own := self.as_is(chunk)) is not None:
            found &= ~own  # one input has them, whatever stands for the others
        return found

    def _numbers(self, chunk: PlanChunk, source: SourceRange) -> torch.Tensor:
        """A chunk's entries in one input: [numel], as they are stored, or in the compute dtype if they are made."""
        if not source.steps:
            return self.read(chunk, source).values()
        dtype = torch.float64 if chunk.tensor.in_float64 else torch.float32
        return self.made(chunk, source, torch.empty(chunk.numel, dtype=dtype, device=self.device))

    def _codes(self, chunk: PlanChunk, source: SourceRange) -> torch.Tensor:
        """What is stored of a chunk in one input: [numel], in a float dtype that is computed with."""
        stored = self.read(chunk, source).values()
        if source.dtype in TORCH_DTYPES:
            return stored
        wide = torch.empty(chunk.numel, dtype=torch.float32, device=self.device)
        widen(stored, wide)
        return wide

    def as_is(self, chunk: PlanChunk) -> torch.Tensor | None:
        """Which entries of a chunk one input alone has, so that they are its own: [numel], boolean; None of none."""
        rows = _segment_behind(chunk).as_is
        spans = list(rows.within(chunk.first, chunk.first + chunk.numel)) if rows is not None else []
        if not spans:
            return None
        found = torch.zeros(chunk.numel, dtype=torch.bool)
        for begin, end in spans:
            found[begin - chunk.first : end - chunk.first] = True
        return found.to(self.device)

    def put_back(self, chunk: PlanChunk, stays: torch.Tensor, stored: torch.Tensor) -> None:
        """Write the entries that stay into a chunk as the inputs have them; NaN of another dtype loses its payload.

        Args:
            chunk: which.
            stays: [numel], boolean.
            stored: [numel], in the output's dtype.
        """
        values = self._numbers(chunk, chunk.segment.sources[0])
        if values.dtype != stored.dtype:
            values = values.to(stored.dtype)
            same_nan(values)
        bits = _BITS[stored.dtype.itemsize]
        stored.view(bits).copy_(torch.where(stays, values.view(bits), stored.view(bits)))

    def task_vectors(self, chunk: PlanChunk) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The base's entries, and what each model changed of them: `f32(model) - f32(base)`, rounded; of an adapter on
        the base the update itself.
        """
        stored_base = chunk.segment.base
        assert stored_base is not None
        if not any(source.file == stored_base.file for source in chunk.segment.models):
            base, models = self.inputs(chunk)
            assert base is not None
            every, _ = self.held(chunk)
            task_vector(every[1 : 1 + len(models)], base)  # of all at once
            return base, models
        base, models = self._read_base(chunk), self._models(chunk)
        assert base is not None
        for into, source in zip(models, chunk.segment.models, strict=True):
            steps = source.update_on(stored_base)
            if steps is None:
                task_vector(self.made(chunk, source, into), base)
            else:
                self.update(chunk, source, steps, into)
        self._set_aside(chunk, base, models)
        return base, models

    def keywords(self, tensor: TensorPlan, *, majority: int | None = None) -> Values:
        """What the method's function is given beside tensors (`Plan.keywords`)."""
        if self._keywords is None or self._keywords[0] is not tensor or self._keywords[1] != majority:
            self._keywords = tensor, majority, self.plan.keywords(tensor, majority=majority)
        return self._keywords[2]

    def nonfinite(self, chunk: PlanChunk) -> str | None:
        """Which of a chunk's inputs holds NaN or Inf that not all inputs share, and where; None if none does."""
        behind = _sources_behind(chunk)
        stays = self._shared(chunk, behind) if len(behind) > 1 else None
        for source in behind if chunk.segment.copy is None else (chunk.segment.copy,):
            if source.dtype not in TORCH_DTYPES and not source.steps:
                continue
            values = self._codes(chunk, source)
            if bad := first_nonfinite(values if stays is None else values.masked_fill(stays, 0.0)):
                file, own, at = source.place_of(chunk.first + bad[0])
                if source.gathered is not None:
                    file = file_behind(source, source.first + chunk.first + bad[0])
                at += 0 if own else chunk.segment.start
                name = printable(own or chunk.tensor.name)
                return f"{self.plan.paths[file]}: tensor {name} holds {bad[1]}, first at entry {at:,}"
            if source.steps:
                values = self.made(chunk, source, torch.empty(chunk.numel, dtype=torch.float64, device=self.device))
                if bad := first_nonfinite(values if stays is None else values.masked_fill(stays, 0.0)):
                    step, at = source.steps[-1], chunk.segment.start + chunk.first + bad[0]
                    file = source.place_of(chunk.first + bad[0])[0] if source.parts else step.file
                    made = f"what {printable(step.name)} makes of tensor {printable(chunk.tensor.name)}"
                    return f"{self.plan.paths[file]}: {made} holds {bad[1]}, first at entry {at:,}"
        return None

    def refuse_nonfinite(self, chunk: PlanChunk) -> None:
        """Refuse a chunk in whose inputs something is not finite, unless that is allowed.

        Raises:
            DataError: which tensor of which file, and where.
        """
        if not self.plan.recipe.allow_nonfinite and (found := self.nonfinite(chunk)):
            raise DataError(found, hint=self.hint_of_nonfinite(chunk))

    def hint_of_nonfinite(self, chunk: PlanChunk) -> str:
        """What to do about NaN, Inf or an overflow in a chunk: of a mask one side's is what is wanted."""
        recipe, inputs = self.plan.recipe, self.plan.inputs
        sources = _sources_behind(chunk)
        if not inputs.has_base or len(sources) != len(inputs.checkpoints):
            return ALLOW_NONFINITE
        finite = []
        for source in sources:
            if source.dtype not in TORCH_DTYPES or chunk.tensor.info.dtype not in TORCH_DTYPES:
                return ALLOW_NONFINITE
            values = self.read(chunk, source).values()
            if not ((values == values.amin()) | (values == values.amax())).all():
                return ALLOW_NONFINITE  # a mask has 0, and what hides: -inf, or the least number of some dtype
            finite.append(is_finite(values.to(TORCH_DTYPES[chunk.tensor.info.dtype])))
        pattern = _pattern_of(chunk.tensor.name, self.plan)
        if inputs.of_an_edit and any(finite):
            rule, whose = ("keep", "fine-tune") if finite[1] else ("base", "base")
            way = f"--filter {shlex.quote(f'{pattern}={rule}')} takes the {whose}'s as it is."
        elif recipe.lines is not None and finite[0]:
            way = f"lines.filter: {{{json.dumps(pattern)}: base}} takes the base's as it is."
        else:
            return ALLOW_NONFINITE
        return f"It looks like a mask that the inputs write differently: {way} {ALLOW_NONFINITE}"


def file_behind(source: SourceRange, entry: int) -> int:
    """The file that an entry of a table comes from: of gathered rows that of its row, of a mean of one of them."""
    gathered = source.gathered
    if gathered is None:
        return source.place_of(entry)[0]
    row, inside = divmod(entry, gathered.width)
    ((part, _, _, there),) = gathered.runs.within(row, row + 1)
    tables = gathered.parts[part]
    return file_behind(tables[0], there * gathered.width + inside) if tables else source.file


def _sources_behind(chunk: PlanChunk) -> tuple[SourceRange, ...]:
    """Where all inputs have a chunk's entries, of a copy also those that it is no copy of."""
    return _segment_behind(chunk).sources


def _segment_behind(chunk: PlanChunk) -> Segment:
    """A chunk's segment; of a copy, what it was before it was known to be one."""
    if chunk.segment.copy is None:
        return chunk.segment
    same = [segment for segment in chunk.tensor.spec.segments if segment.start == chunk.segment.start]
    return same[0] if same else chunk.segment


def _pattern_of(name: str, plan: Plan) -> str:
    """What a filter says to take a tensor, and those that are called so in other layers, and no others."""
    of_layer = re.match(r".*\.\d+(?=\.)", name, re.DOTALL)
    pattern = name[of_layer.end() :] if of_layer else name
    alone = all(tensor.name.endswith(pattern) for tensor in plan.tensors if pattern in tensor.name)
    return pattern if alone else name


_OF_FACTORS = {**TORCH_DTYPES, **FLOAT8, "U8": torch.uint8, "F8_E8M0": torch.uint8}
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

ALLOW_NONFINITE = "allow_nonfinite: true in the recipe (--allow-nonfinite of lines edit) lets such values through."
