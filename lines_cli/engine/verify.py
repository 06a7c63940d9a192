"""Is this output what its recipe makes? Every byte is computed again, as the engine does when it writes, and compared
with what is there. Nothing is written.

A file, its computation and its record may each differ from the others. If the computation has the record's digest, the
file was changed since; if the file has it, another input or another version of lines made it.
"""

from __future__ import annotations

import fnmatch
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from lines_cli.checkpoint.header import itemsize, read_header
from lines_cli.checkpoint.sidecars import CARRIED_FILES, Sidecar
from lines_cli.engine.buffers import keep_freed_memory
from lines_cli.engine.devices import Devices
from lines_cli.engine.fast import prepare
from lines_cli.engine.input_files import Opened, opened, read_input, refuse_changed, with_views
from lines_cli.engine.jobs import job_of, sized, worker_of
from lines_cli.engine.measure import Track, measure, untracked
from lines_cli.engine.pool import Pool
from lines_cli.engine.scales import measure_scales, with_scales
from lines_cli.engine.write import OutputRange, Target, output_ranges
from lines_cli.errors import CheckpointError, DataError, LinesError, RecipeError, as_argument, as_known, printable
from lines_cli.plan.adapter_plan import AnyPlan
from lines_cli.plan.claim import Claim, InputRead, inputs_read, open_claim, plan_claim
from lines_cli.plan.identity import identity
from lines_cli.plan.plan import Plan
from lines_cli.plan.resolve import resolve
from lines_cli.plan.resources import Resources
from lines_cli.plan.statistics import Statistics
from lines_cli.recipe.yaml_file import Elsewhere
from lines_cli.storage.beside import leads_out, outside, refuse_link_out
from lines_cli.storage.destination import is_one_file
from lines_cli.storage.digest import (
    DIGEST_BLOCK,
    DIGEST_BLOCKS_ON_CUDA,
    WRITE_SIZE,
    FileRecord,
    GrowingDigest,
    file_digest,
    is_part,
    record_of,
)
from lines_cli.storage.files import in_whole_pages, read_into
from lines_cli.storage.names import MODEL_CARD, RECIPE
from lines_cli.storage.object_staging import digest_of_object
from lines_cli.storage.object_store import ObjectPath, looked_up, real_name, url_of
from lines_cli.storage.object_store import listed as objects_below
from lines_cli.storage.verified import Verified, verified_beside
from lines_cli.version import ABOUT, __version__


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a file is not what its recipe makes.

    Attributes:
        byte: the first that differs; the end of the shorter one, where the file ends there or goes on.
        block: the number of its block, from 0, of `blocks`.
        start, end: the bytes of that block.
        differing: how many blocks differ.
        blocks: how many blocks of 4 MiB the file is made of.
        tensor: which tensor that byte belongs to; None in a header, and in other files.
        entry: which of the tensor's entries.
        header: how the header differs, in words, if it does.
    """

    byte: int
    block: int
    start: int
    end: int
    differing: int
    blocks: int
    tensor: str | None = None
    entry: int | None = None
    header: str | None = None


@dataclass(frozen=True, slots=True)
class FileVerified:
    """One file of the output.

    Attributes:
        name: its name.
        nbytes: how many bytes the recipe makes.
        found: how many bytes there are; None where there is no file.
        problem: what is wrong with it, in words: it is missing, or has another size, say; None if nothing is, or if
            nothing but its content is.
        difference: where its content differs; None where it does not, or there is none.
        made_as_recorded: whether the recipe makes what the record says was written; None where that is not known.
        still_as_recorded: of a file that differs, whether it holds what the record says was written.
    """

    name: str
    nbytes: int
    found: int | None
    problem: str | None = None
    difference: Difference | None = None
    made_as_recorded: bool | None = None
    still_as_recorded: bool | None = None

    @property
    def same(self) -> bool:
        """Whether the file is what its recipe makes."""
        return self.problem is None and self.difference is None

    @property
    def as_claimed(self) -> bool:
        """Whether the recipe makes what the record says, if that says anything."""
        return self.made_as_recorded is not False


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        output: the output, as its user named it.
        recipe: the file of the recipe.
        version: of lines, which wrote that file; None if it does not say.
        inputs: the files that were read, each with how it is not the one recorded.
        files: every file that the recipe makes, but for the recipe itself and the model card; and those that are
            recorded, and neither made nor there.
        unexpected: files of the output that it does not make, and that a library may load, or that are recorded; and
            links to folders elsewhere.
        notes: what a person should know.
        resumed: how many bytes another run had compared before.
        seconds: how long it took.
    """

    output: str
    recipe: Path
    version: str | None
    inputs: tuple[InputRead, ...]
    files: tuple[FileVerified, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]
    resumed: int
    seconds: float

    @property
    def same(self) -> bool:
        """Whether the output is what its recipe makes, and its record says so."""
        return not self.unexpected and all(file.same and file.as_claimed for file in self.files)

    @property
    def nbytes(self) -> int:
        """Bytes that the recipe makes."""
        return sum(file.nbytes for file in self.files)

    def refuse(self) -> None:
        """Refuse an output that is not what its recipe makes.

        Raises:
            DataError: it is not, and what to do.
        """
        if self.same:
            return
        differing = [file for file in self.files if not file.same]
        of = f"{len(self.files)} file{'s' if len(self.files) > 1 else ''}"
        said = [f"{len(differing)} of {of} {'differs' if len(differing) == 1 else 'differ'}"] if differing else []
        said += [f"the record of {file.name} is wrong" for file in self.files if file.same and not file.as_claimed]
        said += [f"{name} was not made by the recipe" for name in self.unexpected]
        raise DataError(
            f"{self.output} is not what its recipe makes: {'; '.join(map(printable, said[:8]))}",
            hint=self._hint(differing),
        )

    def _hint(self, differing: Sequence[FileVerified]) -> str | None:
        if any(read.difference for read in self.inputs):
            return "Some inputs are not the recorded ones. If the right ones are in another place: --input NAME=PATH"
        again = f"lines merge --config {as_argument(self.recipe)} -o AGAIN"
        if as_known(str(self.recipe)) != str(self.recipe):  # a recipe is read from a disk alone
            again = f"copy {RECIPE} to a disk, and there: lines merge --config {RECIPE} -o AGAIN"
        if any(file.found is None and file.nbytes for file in differing):
            return f"A file is missing. If it was lost in copying, copy it again. To make all of them: {again}"
        if differing and all(file.made_as_recorded for file in differing):
            changed = "The recipe makes what was recorded, so the files were changed after they were written."
            return f"{changed} To make them again: {again}"
        if differing and all(file.still_as_recorded for file in differing):
            return (
                "The files are as they were written. Another input or another version of lines made them, or the "
                "recipe was edited."
            )
        return None

    def report(self) -> dict[str, Any]:
        """All of it, as plain values that JSON can hold (docs/json.md describes them)."""
        return {
            **ABOUT,
            "output": self.output,
            "recipe": as_known(str(self.recipe)),
            "same": self.same,
            "written_by": self.version,
            "inputs": [
                {"name": read.recorded, "path": as_known(str(read.path)), "difference": read.difference}
                for read in self.inputs
            ],
            "files": [asdict(file) | {"same": file.same} for file in self.files],
            "unexpected": list(self.unexpected),
            "notes": list(self.notes),
            "bytes": self.nbytes,
            "resumed": self.resumed,
            "seconds": round(self.seconds, 3),
        }


def verify(
    output: str | Path,
    *,
    config: Path | None = None,
    inputs: Elsewhere = (),
    resources: Resources | None = None,
    resume: bool = False,
    quiet: bool = True,
    track: Track = untracked,
) -> Verification:
    """Compute an output again from its recipe and inputs, and compare every byte. Nothing is written.

    Args:
        output: a folder that lines wrote, a `.safetensors` file, or a Hub id.
        config: the recipe, if it is not the one in the folder.
        inputs: where inputs are that are not where the recipe says, by their names in it.
        resources: workers, device, chunk.
        resume: keep in a hidden file beside the output what was compared, and go on from what an interrupted run kept.
        quiet: no progress bars while fetching from the Hub.
        track: wraps the stream of byte counts of each pass.

    Raises:
        LinesError: the output, its recipe or an input cannot be found or read.
    """
    claim = open_claim(output, config=config, inputs=inputs, quiet=quiet)
    return check(claim, plan_claim(claim, quiet=quiet), resources, resume=resume, track=track)


def check(
    claim: Claim,
    plan: AnyPlan,
    resources: Resources | None = None,
    *,
    resume: bool = False,
    track: Track = untracked,
) -> Verification:
    """`verify`, of a claim and its plan."""
    started = time.perf_counter()
    if resume and claim.hub_id is not None:
        where, how = (
            ("an object store", "copy it here") if claim.url else ("the Hub's cache", "download it (hf download)")
        )
        raise RecipeError(
            f"--resume keeps its progress beside the output, but {claim.name} is in {where}",
            hint=f"Leave out --resume; or {how} and verify that folder.",
        )
    devices = Devices(resources or Resources())
    keep_freed_memory()
    plan = sized(plan, devices, track)
    for sidecar in _made_beside(plan):
        if not sidecar.name.endswith(".index.json"):  # which may lie where the weights do
            refuse_link_out(claim.output, sidecar.name)
    rooms = _Rooms()
    files = [_Present(claim.weights(file.name), rooms) for file in plan.outputs]
    run = {
        "verify": 1,
        **identity(plan),
        "inputs": {
            real_name(path): [*state, *(_state(_stat(path)) if url_of(path) is None else ())]
            for path, state in zip(plan.paths, plan.states, strict=True)
        },
        "files": {file.name: there.state for file, there in zip(plan.outputs, files, strict=True)},
        "step": DIGEST_BLOCK * (DIGEST_BLOCKS_ON_CUDA if devices.has_own_memory else 1),
    }
    remark = prepare(plan, devices) if isinstance(plan, Plan) else None
    with Verified(claim.output, run) if resume else nullcontext() as kept:
        job = _compare_weights(plan, files, devices, kept, run["step"], track)
        notes = [remark] if remark is not None else []
        if kept is not None and kept.differs:
            notes.append(
                f"{verified_beside(claim.output)} was of another comparison ({', '.join(kept.differs)} differ): "
                "everything was compared again"
            )
        found = [*job.found(claim), *(_beside(claim, sidecar) for sidecar in _made_beside(job.plan))]
        read = _with_digests(inputs_read(claim, plan))
        unexpected, gone, more = _unexpected(claim, {file.name for file in found})
        result = Verification(
            claim.name,
            claim.file,
            claim.version,
            tuple(read),
            (*found, *gone),
            tuple(unexpected),
            (*notes, *more),
            job.taken_over,
            0.0,
        )
        return replace(result, notes=(*result.notes, *_about(claim, result)), seconds=time.perf_counter() - started)


# --- weights ---


class _Rooms(threading.local):
    """Each thread's buffer to read into."""

    def __init__(self) -> None:
        self.segment = in_whole_pages(WRITE_SIZE)


class _Present:
    """A weight file that is there, or is not: what is made of it is given to it as to a new file, and is compared.

    Attributes:
        path: where it is.
        problem: why there is nothing to compare, in words.
        state: size, times, and which file it is; None where there is nothing.
        differs: each block that differs, by its start -> the first byte that does.
    """

    def __init__(self, path: Path, rooms: _Rooms) -> None:
        self.path, self._rooms, self._fd = path, rooms, cast("Opened", -1)
        self.problem, self.state = _looked_up(path)
        self.differs: dict[int, int] = {}

    @property
    def nbytes(self) -> int | None:
        return self.state[0] if self.state else None

    def open_as(self, fd: Opened) -> None:
        """Read from there."""
        self._fd = fd
        self.refuse_changed()

    def refuse_changed(self) -> None:
        """Refuse a file that is not in the state in which it was found.

        Raises:
            CheckpointError: it is not.
        """
        fd = self._fd
        if (_state(os.fstat(fd)) if isinstance(fd, int) else _state_there(self.path)) != self.state:
            raise CheckpointError(
                f"{self.path}: changed while it was compared", hint="Run it again when nothing writes to it."
            )

    def write(self, view: memoryview, offset: int) -> None:
        """Compare these bytes, which belong at `offset`."""
        there = self._rooms.segment[: len(view)]
        try:
            there = there[: read_input(self._fd, there, offset)]
        except OSError as error:
            raise _unreadable(self.path, error) from error
        first = _first_difference(view, there)
        if first is not None:  # pieces of a block come one after the other
            self.differs.setdefault((offset + first) // DIGEST_BLOCK * DIGEST_BLOCK, offset + first)


class _Compare:
    """The engine's job, with files that are compared in the place of files that are written."""

    def __init__(self, plan: AnyPlan, files: Sequence[_Present], devices: Devices) -> None:
        self.plan, self.files, self.sizes = plan, files, [file.nbytes for file in plan.outputs]
        self.targets = [Target(there, GrowingDigest(f.nbytes)) for f, there in zip(plan.outputs, files, strict=True)]
        self.job = job_of(plan, self.targets, devices, measures=False)
        self.taken_over = 0

    def compared(self, span: OutputRange[Any], kept: Verified | None) -> int:
        """Write down what was found of a span; its bytes."""
        if kept is not None:
            blocks = [block.hex() for block in self.targets[span.file].digest.blocks(span.start, span.end)]
            differs = {
                start: at for start, at in self.files[span.file].differs.items() if span.start <= start < span.end
            }
            line = {"file": span.file, "start": span.start, "blocks": blocks}
            kept.add(line | ({"differs": sorted(differs.items())} if differs else {}))
        return span.end - span.start

    def go_on_from(self, lines: Iterable[Mapping[str, Any]], step: int) -> set[tuple[int, int]]:
        """Take account of what an earlier run has compared; where each part begins, and in which file."""
        done: set[tuple[int, int]] = set()
        for line in lines:
            with suppress(KeyError, TypeError, ValueError, AttributeError):  # no line of ours would
                file, start, blocks = line["file"], line["start"], [bytes.fromhex(block) for block in line["blocks"]]
                differs = dict(line.get("differs", ()))
                if not is_part(file, start, blocks, self.sizes, step):
                    continue
                end = min(start + step, self.sizes[file])
                if not all(
                    type(block) is type(at) is int
                    and block in range(start, end, DIGEST_BLOCK)
                    and block <= at < min(block + DIGEST_BLOCK, end)
                    for block, at in differs.items()
                ):
                    continue
                for number, block in enumerate(blocks):
                    self.targets[file].digest.wrote(start + number * DIGEST_BLOCK, block)
                self.files[file].differs |= differs
                self.taken_over += 0 if (file, start) in done else end - start
                done.add((file, start))
        return done

    def found(self, claim: Claim) -> Iterator[FileVerified]:
        """What there is to say of each weight file."""
        for number, (file, target, there) in enumerate(zip(self.plan.outputs, self.targets, self.files, strict=True)):
            result = FileVerified(
                claim.output.name if is_one_file(claim.output) else file.name, file.nbytes, there.nbytes
            )
            if there.problem is not None:
                yield replace(result, problem=there.problem)
                continue
            difference = None
            if there.differs:
                start = min(there.differs)
                difference = self._where(number, there.differs[start], len(there.differs))
            yield _held_against(claim, there.path, result, target.digest.record(), difference)

    def _where(self, number: int, byte: int, differing: int) -> Difference:
        """The first difference, and which tensor it lies in."""
        file = self.plan.outputs[number]
        difference = _difference(byte, differing, file.nbytes)
        if byte < len(file.head):
            return replace(difference, header=self._header(number))
        for tensor in self.plan.tensors:
            at = byte - tensor.info.offset
            if tensor.file == number and 0 <= at < tensor.info.nbytes:
                return replace(difference, tensor=tensor.name, entry=at // itemsize(tensor.info.dtype))
        return difference

    def _header(self, number: int) -> str:
        """How the header of a file differs, in words."""
        if url_of(self.files[number].path) is not None:
            return "it is not the one that the recipe makes"
        try:
            held = read_header(self.files[number].path).tensors
        except LinesError as error:
            return f"it cannot be read: {error.message}"
        prefix = self.plan.outputs[number].prefix
        made = {t.name.removeprefix(prefix): t.info for t in self.plan.tensors if t.file == number}
        kinds = {
            "lacks {}": [name for name in made if name not in held],
            "has {} more": [name for name in held if name not in made],
            "has {} in another dtype or shape": [
                name
                for name, info in made.items()
                if name in held and (held[name].dtype, held[name].shape) != (info.dtype, info.shape)
            ],
        }
        said = [
            f"it {how.format(_counted(names))} ({printable(names[0])}{', ...' if len(names) > 1 else ''})"
            for how, names in kinds.items()
            if names
        ]
        return "; ".join(said) or "it has the same tensors, but in another layout or with other metadata"


def _counted(tensors: Sequence[str]) -> str:
    return f"{len(tensors):,} tensor{'s' if len(tensors) != 1 else ''}"


def _compare_weights(
    plan: AnyPlan, files: Sequence[_Present], devices: Devices, kept: Verified | None, step: int, track: Track
) -> _Compare:
    """Compute the weights again, and compare those that are there."""
    present = [there for there in files if there.problem is None]
    step = kept.step if kept is not None else step
    if not present:
        return _Compare(plan, files, devices)
    with opened([*plan.paths, *(there.path for there in present)]) as fds, devices.bounded():
        of_inputs = fds[: len(plan.paths)]
        sources = with_views(of_inputs, plan.views)
        for there, fd in zip(present, fds[len(plan.paths) :], strict=True):
            there.open_as(fd)
        refuse_changed(plan.paths, of_inputs, plan.states)
        if isinstance(plan, Plan) and plan.needs:
            plan = resolve(plan, _statistics(plan, sources, devices, kept, track))
        if isinstance(plan, Plan) and plan.to_quantise:
            plan = _with_scales(plan, sources, devices, kept, track)
        job = _Compare(plan, files, devices)
        done_before = job.go_on_from(kept.lines, step) if kept is not None else set()
        ranges: Iterable[Any] = output_ranges(plan.outputs, plan.tensors, step)
        spans = (
            span for span in ranges if files[span.file].problem is None and (span.file, span.start) not in done_before
        )
        pool: Pool[Any, Any, Any] = Pool(worker_of(plan, sources, devices), spans, job.job, devices)
        total = sum(file.nbytes for file, there in zip(plan.outputs, files, strict=True) if there.problem is None)
        with closing(pool.in_order()) as results:
            done = (job.compared(span, kept) for span, _ in results)
            for _ in track("comparing", total - job.taken_over, done):
                pass
        refuse_changed(plan.paths, of_inputs, plan.states)
        for there in present:
            there.refuse_changed()
    return job


def _statistics(
    plan: Plan, sources: Sequence[Opened], devices: Devices, kept: Verified | None, track: Track
) -> Statistics:
    """What the plan needs to know of the numbers, from an earlier run if that has measured it."""
    for line in kept.lines if kept is not None else ():
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            return Statistics.of(line["measured"], plan.number_of_models)
    statistics = measure(plan, sources, devices, track).statistics
    if kept is not None:
        kept.add({"measured": statistics.to_json()})
    return statistics


def _with_scales(plan: Plan, sources: Sequence[Opened], devices: Devices, kept: Verified | None, track: Track) -> Plan:
    """The plan with the scales of what is stored in 8 bits, from an earlier run if that has measured them."""
    for line in kept.lines if kept is not None else ():
        with suppress(KeyError, TypeError, ValueError, AttributeError):
            known = Statistics.of(line["scales"], plan.number_of_models)
            if (found := with_scales(plan, known)) is not None:
                return found
    plan = measure_scales(plan, sources, devices, track)
    if kept is not None:
        kept.add({"scales": plan.statistics.to_json()})
    return plan


# --- what stands beside them ---


def _made_beside(plan: AnyPlan) -> list[Sidecar]:
    """Every file beside the weights, but for the recipe itself and the model card, which people edit."""
    return [sidecar for sidecar in plan.sidecars if sidecar.name not in (RECIPE, MODEL_CARD)]


def _beside(claim: Claim, sidecar: Sidecar) -> FileVerified:
    """A file beside the weights, held against what it should be."""
    path, content = claim.path(sidecar.name), sidecar.read()
    problem, state = _looked_up(path)
    result = FileVerified(sidecar.name, len(content), state[0] if state else None)
    if state is None:
        return replace(result, problem=problem)
    differs: dict[int, int] = {}
    segment = memoryview(bytearray(WRITE_SIZE))
    try:
        with open(path, "rb") as file:
            for offset in range(0, len(content), WRITE_SIZE):
                made = memoryview(content)[offset : offset + WRITE_SIZE]
                first = _first_difference(made, segment[: read_into(file.fileno(), segment[: len(made)], offset)])
                if first is not None:
                    differs.setdefault((offset + first) // DIGEST_BLOCK * DIGEST_BLOCK, offset + first)
    except OSError as error:
        raise _unreadable(path, error) from error
    difference = _difference(min(differs.values()), len(differs), len(content)) if differs else None
    return _held_against(claim, path, result, record_of(content), difference)


def _unexpected(claim: Claim, made: set[str]) -> tuple[list[str], list[FileVerified], list[str]]:
    """Files of the output's folder that its recipe does not make, and that a library may load, or that are recorded;
    recorded ones that are neither made nor there; and what to say of others.
    """
    if is_one_file(claim.output):
        return [], [], []
    names, links = _listed(claim.output) if claim.url is None else (sorted(objects_below(claim.url)), [])
    strange = [name for name in names if name not in made and name not in (RECIPE, MODEL_CARD)]
    recorded = {name for name in claim.recipe.files if name not in made and not leads_out(name)}
    # What a link of a folder leads to within the output is looked at there.
    away = [name for name in links if outside(claim.output, name) is not None]
    loaded = [name for name in strange if name in recorded or _may_be_loaded(name)]
    others = [name for name in strange if name not in loaded and not name.startswith(".")]
    others += [name for name in links if name not in away]
    notes = []
    if others:
        listed = ", ".join(map(printable, others[:8])) + (f" and {len(others) - 8:,} more" if len(others) > 8 else "")
        notes.append(f"the folder has other files, which were not compared: {listed}")
    gone = [FileVerified(name, 0, None, _GONE, None, False) for name in sorted(recorded - set(names))]
    return sorted([*loaded, *away]), gone, notes


_GONE = "is recorded, but the recipe does not make it"
_MOST_ENTRIES = 100_000


def _listed(folder: Path) -> tuple[list[str], list[str]]:
    """The files at any depth of a folder, and the links of folders in it, which are not followed.

    Raises:
        CheckpointError: it cannot be read, or holds too much.
    """
    files: list[str] = []
    links: list[str] = []
    folders, left = [""], _MOST_ENTRIES
    while folders:
        inside = folders.pop()
        try:
            with os.scandir(folder / inside) as entries:
                for entry in entries:
                    left -= 1
                    if left < 0:
                        raise CheckpointError(
                            f"{folder} holds more than {_MOST_ENTRIES:,} files and folders",
                            hint="Verify a folder that holds only the output.",
                        )
                    name = f"{inside}/{entry.name}" if inside else entry.name
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(name)
                    elif entry.is_symlink() and os.path.isdir(folder / name):
                        links.append(name)
                    else:
                        files.append(name)
        except OSError as error:
            raise _unreadable(folder / inside, error) from error
    return sorted(files), sorted(links)


_LOADED = tuple(
    """
    .safetensors .bin .pt .pth .ckpt .gguf .h5 .keras .msgpack .onnx .onnx_data .ot .pb .tflite .npy .npz
    .pkl .pickle .joblib .dill .nemo .mar .pdparams .py .pyc .pyd .pyw .so .dll .dylib .json .model .jinja
    """.split()
)
"""How names end that are weights, pickles, code or configs; whichever library asks for them."""
_LEGAL = ("license", "licence", "notice", "use_policy")
_OTHERS_LOADED = tuple(
    pattern.rpartition("/")[2].lower() for pattern in CARRIED_FILES if not pattern.lower().startswith(_LEGAL)
)
_TOLD_OF_TRAINING = ("*results*.json", "trainer_state.json")
_FOLDERS_OF_CODE = ("custom_generate",)


def _may_be_loaded(name: str) -> bool:
    """Whether a library may load a file, by its name: in whatever folder it lies, for a subfolder may be asked for, and
    in whatever case, for a disk may know none.
    """
    *folders, last = name.lower().split("/")
    if any(folder in _FOLDERS_OF_CODE for folder in folders):
        return True
    if any(fnmatch.fnmatchcase(last, pattern) for pattern in _TOLD_OF_TRAINING) and not last.endswith(".index.json"):
        return False
    return last.endswith(_LOADED) or any(fnmatch.fnmatchcase(last, pattern) for pattern in _OTHERS_LOADED)


# --- what all files have in common ---


def _looked_up(path: Path) -> tuple[str | None, list[int] | None]:
    """Why a file cannot be compared, in words; or its state.

    Raises:
        CheckpointError: it cannot be looked up.
    """
    if url_of(path) is not None:
        state = _state_there(path)
        return (None, state) if state else ("is missing", None)
    try:
        there = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return ("is a link that leads nowhere" if path.is_symlink() else "is missing"), None
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(there.st_mode):  # a pipe would be waited for
        return "is not a regular file", None
    return None, _state(there)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _state_there(url: Path) -> list[int] | None:
    """The state of an object; None where there is none."""
    there = looked_up(str(ObjectPath(url)))
    return None if there is None else [there.nbytes, there.mtime_ns]


def _state(there: os.stat_result) -> list[int]:
    """Whoever writes into a file may set its time of last change back, but not that of its inode."""
    return [there.st_size, there.st_mtime_ns, there.st_ctime_ns, there.st_ino, there.st_dev]


def _held_against(
    claim: Claim, path: Path, file: FileVerified, made: FileRecord, difference: Difference | None
) -> FileVerified:
    """What is to say of a file, now that its content has been compared as far as there is one."""
    problem = None
    if file.found != file.nbytes:
        problem = f"has {file.found:,} bytes, but the recipe makes {file.nbytes:,}"
        if difference is None:  # it goes on
            difference = _difference(file.nbytes, 0, file.nbytes)
    recorded = None if is_one_file(claim.output) else claim.recipe.files.get(file.name)
    file = replace(file, problem=problem, difference=difference)
    if recorded is None:
        return file
    still = None
    if not file.same:
        try:
            digest = file_digest if url_of(path) is None else digest_of_object
            still = recorded.nbytes == file.found and digest(path) == recorded.digest
        except OSError as error:
            raise _unreadable(path, error) from error
    return replace(file, made_as_recorded=made == recorded, still_as_recorded=still)


def _difference(byte: int, differing: int, nbytes: int) -> Difference:
    blocks = max(1, -(-nbytes // DIGEST_BLOCK))
    block = min(byte // DIGEST_BLOCK, blocks - 1)
    return Difference(byte, block, block * DIGEST_BLOCK, min((block + 1) * DIGEST_BLOCK, nbytes), differing, blocks)


def _first_difference(made: memoryview, there: memoryview) -> int | None:
    """The first byte of `made` that is not so `there`, which may end earlier; None if there is none."""
    low, high = 0, min(len(made), len(there))
    if _equal(made[:high], there[:high]):
        return None if high == len(made) else high
    while high - low > 1:
        middle = (low + high) // 2
        if _equal(made[low:middle], there[low:middle]):
            low = middle
        else:
            high = middle
    return low


def _equal(one: memoryview, other: memoryview) -> bool:
    """Whether the same bytes are in two buffers of one size; ten times as fast as comparing memoryviews."""
    if one.readonly:  # a small file's, and torch wants none
        return bytes(one) == bytes(other)
    whole = len(one) // 8 * 8
    if whole and not torch.equal(
        *(torch.frombuffer(view[:whole], dtype=torch.uint8).view(torch.int64) for view in (one, other))
    ):
        return False
    return one[whole:] == other[whole:]


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint="Check that you may read it.")


# --- why ---


def _with_digests(read: Sequence[InputRead]) -> Iterator[InputRead]:
    """The inputs, also held against the digests that were recorded of their content, where any were."""
    for file in read:
        if file.difference is not None or file.digest is None:
            yield file
            continue
        try:
            digest = (file_digest if url_of(file.path) is None else digest_of_object)(file.path)
        except OSError as error:
            raise _unreadable(file.path, error) from error
        difference = None if digest == file.digest else f"it holds {digest}, and {file.digest} is recorded"
        yield replace(file, difference=difference)


def _about(claim: Claim, result: Verification) -> Iterator[str]:
    """What a person should know of how far the comparison reaches, and of why something may differ."""
    if is_one_file(claim.output):
        pass
    elif not claim.recipe.files:
        yield f"{as_known(str(claim.file))} records no digests: the files were compared only with what it makes"
    elif unrecorded := [file.name for file in result.files if file.name not in claim.recipe.files]:
        yield f"{as_known(str(claim.file))} has no record of {', '.join(map(printable, unrecorded[:8]))}"
    if result.same:
        changed = Counter(read.difference is not None for read in result.inputs)[True]
        if changed:
            yield f"{changed} of the input files are not the recorded ones, but they give the same output"
    elif claim.version is not None and claim.version != __version__:
        yield (
            f"the recipe was written by lines {claim.version}, and this is {__version__}: another version may write "
            "the config, the index or a header differently"
        )
