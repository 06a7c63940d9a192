"""Checkpoints as their users have them: a file, a folder with one, or a folder with shards and their index. The files
are safetensors, or what `torch.save` wrote where a folder has no safetensors.

Opening one reads headers and `config.json` only. Nothing in a checkpoint is ever executed, and no path it names is
followed out of its folder; of links only those of weights are.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lines_cli.checkpoint.contents import (
    UNSCALED,
    WAYS,
    codes_or_scales,
    factors_among,
    format_of,
    is_adapter,
    quantised_tensor,
    way_out,
)
from lines_cli.checkpoint.formulas import Dequantised, Made
from lines_cli.checkpoint.gguf import SUFFIX as GGUF
from lines_cli.checkpoint.gguf import read_gguf
from lines_cli.checkpoint.header import (
    EXACT_DTYPES,
    FLOAT_DTYPES,
    Known,
    StoredTensor,
    TensorInfo,
    parse_header,
    read_header,
)
from lines_cli.checkpoint.quantised import QUANTIZATION, Quantised, read_quantised, said_to_be
from lines_cli.checkpoint.state_dict import read_state_dict
from lines_cli.errors import CheckpointError, UnsupportedError, printable, some
from lines_cli.storage.beside import LARGEST_INDEX, beside, leads_out, read_json, read_object
from lines_cli.storage.names import CONFIG, PICKLE_STEMS, PICKLES, WEIGHT_STEMS
from lines_cli.storage.object_store import placed_at
from lines_cli.storage.views import Views

_SUFFIX = ".safetensors"
_INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")
"""What PEFT calls the file with an adapter's weights; the second is a pickle, of which nothing is run."""
ADAPTER_CONFIG = "adapter_config.json"
_OTHER_FORMATS = (".gguf", ".h5", ".msgpack", ".onnx")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})(?:\.[\w-]+)?\.(?:safetensors|bin)")
_INDEX = re.compile(r"(?P<stem>.+)\.(?:safetensors|bin)\.index(?:\.(?P<variant>[\w-]+))?\.json")
_VARIANT = re.compile(
    rf"(?P<stem>{'|'.join(WEIGHT_STEMS)})\.(?P<variant>[\w-]+)\.safetensors"
    rf"|(?P<pickle>{'|'.join(PICKLE_STEMS)})\.(?P<of_pickle>[\w-]+)\.bin"
)
_TRAINING = re.compile(  # what trainers keep beside weights
    rf"(?:training_args|optimizer|scheduler|scaler|rng_state|random_states|sampler|dl_state_dict|custom_checkpoint"
    rf"|non_lora_trainables)[\w-]*(?:{'|'.join(map(re.escape, PICKLES))})"
)
_PARTS = re.compile(  # of a state that trainers write in parts, each process its own
    r"(?:mp_rank_\d+_model_states|(?:bf16_)?zero_pp_rank_\d+_mp_rank_\d+_(?:model|optim)_states"
    r"|layer_\d+-model_\d+-model_states|model_optim_rng)\.pt|.*\.distcp"
)
_FOLDERS_OF_PARTS = ("zero_to_fp32.py", "pytorch_model_fsdp_")
_MOST_SHARDS = 100_000  # as many as five digits can number
_CONVERT = "Load it with the library that wrote it and save it as safetensors (transformers: save_pretrained)."
_GATHER = (
    "Gather it first, with the tool of what wrote it: python zero_to_fp32.py FOLDER OUT (DeepSpeed), accelerate "
    "merge-weights FOLDER OUT (FSDP), python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER ft.pt."
)
_UNREADABLE = "Ask whoever owns it for permission to read it."
_NOT_JSON = "The file is damaged: copy or download it again."


class FileState(NamedTuple):
    """What tells one state of a file from another, short of reading all of it.

    Attributes:
        nbytes: its size.
        mtime_ns: when it was last written, in nanoseconds since 1970.
        header: the digest of its header.
    """

    nbytes: int
    mtime_ns: int
    header: str


@dataclass(frozen=True, slots=True)
class Heads:
    """Weight files that are elsewhere, and of which only the headers are here.

    Attributes:
        chosen: the index or the weight file that the weights hang on; an index is here.
        files: each weight file by its name, with its size and the JSON of its header.
        url: of a folder in an object store, where they are read when they are needed; None where they are not.
        times: of such a folder: when each file was last written, in nanoseconds since 1970.
    """

    chosen: str
    files: Mapping[str, tuple[int, bytes]]
    url: str | None = None
    times: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Component:
    """One model of several that a checkpoint holds: a U-Net, a text encoder, a module.

    Attributes:
        name: as people call it: `unet`.
        prefix: what stands before its tensors' names among those of the whole: `unet.`; empty where they say it
            themselves.
        folder: its folder within that of the whole; empty for that one itself; None in a single file.
        checkpoint: it by itself, with its own names, config and files.
        begins: what its tensors' names begin with among those of the whole, any of these; empty for all others.
        after: whether it runs on what another gives, as a dense layer does behind a transformer.
    """

    name: str
    prefix: str
    folder: str | None
    checkpoint: Checkpoint
    begins: tuple[str, ...]
    after: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: where every tensor lies, and what its config says.

    Attributes:
        name: as its user named it.
        path: the file or folder.
        files: the files with the weights, all of them.
        tensors: every tensor by name.
        states: the state of each file when its header was read.
        stem: what its weight files are called, `model` in `model-00001-of-00002.safetensors`.
        config: the parsed `config.json`; empty where there is none.
        hub_id: `org/name@commit`, for one that came from the Hub; the URL of one in an object store.
        metadata: what the header of its only file says beside the tensors; empty where there are several files.
        formulas: tensors that are not stored as they are -> what they are made of.
        beside: tensors of a quantised format that belong to no weight: scales of activations.
        stored_as: the format that most weights are stored in, in words, if they are quantised.
        parts: of one that is put together, what it is put together of: a base, and an adapter on it.
        base_named: of such a one, whether its name says both (`base+adapter`); else the base is the recipe's.
        stacked: of one that is stacked from layers of others, these, each once; `path` and the config are those of one.
        part: which of several state dicts in its file, if its user said so: `ema` of `ft.ckpt#ema`.
        views: for each file the tensors whose entries do not stand in order; empty where there are none.
        notes: what a person should know of how it was read.
        is_here: whether the files can be read; else only their headers were fetched.
        config_changes: what is otherwise in `config` than in the folder's file, by the path of keys.
        components: of one that holds several models, each by itself; `tensors` are those of all.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]
    states: tuple[FileState, ...]
    stem: str
    config: Mapping[str, Any] = field(default_factory=dict)
    hub_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    formulas: Mapping[str, Made] = field(default_factory=dict)
    beside: Mapping[str, StoredTensor] = field(default_factory=dict)
    stored_as: str | None = None
    parts: tuple[Checkpoint, ...] = ()
    base_named: bool = False
    stacked: tuple[Checkpoint, ...] = ()
    part: str | None = None
    views: tuple[Views, ...] = ()
    notes: tuple[str, ...] = ()
    is_here: bool = True
    config_changes: Mapping[tuple[str, ...], Any] = field(default_factory=dict)
    components: tuple[Component, ...] = ()

    @property
    def folder(self) -> Path | None:
        """The checkpoint's own folder, also where its index was named; None for a lone file, whose neighbours are not
        known to belong to it. An adapter on a base has the base's.
        """
        if self.parts:
            return self.parts[0].folder
        if self.path.is_dir():
            return self.path
        return self.path.parent if is_index(self.path.name) else None

    @cached_property
    def real(self) -> Path:
        """Where it lies, links followed: what a link leads to may change. A lone file keeps its own name where another
        would be read otherwise, as that of a file in the Hub's cache would be, which is a digest.
        """
        real = Path(os.path.realpath(self.path))
        if self.path.is_dir() or _reads_alike(self.path.name, real.name):
            return real
        return Path(os.path.realpath(self.path.parent), self.path.name)

    @cached_property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(self.as_stored(name).nbytes for name in self.tensors)

    def codes(self, tensor: str) -> tuple[StoredTensor, StoredTensor] | None:
        """What a weight that is nothing but quantised is stored as: its codes, and their scales; else None."""
        if (made := self.formulas.get(tensor)) is None:
            return None
        one = made.steps[0] if len(made.steps) == 1 else None
        return (made.stored, one.factors[0][1]) if isinstance(one, Dequantised) else None

    def as_stored(self, tensor: str) -> TensorInfo:
        """A tensor's dtype as it is stored, its shape, and its bytes, those of its scales among them."""
        codes = self.codes(tensor)
        if codes is None:
            return self.tensors[tensor].info
        stored, scales = codes
        return stored.info._replace(nbytes=stored.info.nbytes + scales.info.nbytes)

    def with_part(self, place: str) -> str:
        """The name of the place where it lies, as a recipe has it: with its part, if it is one."""
        return place if self.part is None else f"{place}#{self.part}"

    def where(self, tensor: str) -> str:
        """The file that holds `tensor`, for a message."""
        return str(self.files[self.tensors[tensor].file])


def views_of(checkpoints: Iterable[Checkpoint]) -> list[Views]:
    """The views in each file of some checkpoints, one after the other."""
    none: Views = {}
    return [views for one in checkpoints for views in (one.views or (none,) * len(one.files))]


@contextmanager
def gc_paused() -> Iterator[None]:
    """Hold the garbage collector back, for a function that makes very many objects that stay, and no cycle of them: it
    would look through all of them again and again, for half of the time that it takes to plan 100,000 tensors.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@gc_paused()
def open_checkpoint(
    path: Path,
    *,
    name: str | None = None,
    hub_id: str | None = None,
    to_look_at: bool = False,
    known: Known | None = None,
    variant: str | None = None,
    part: str | None = None,
    heads: Heads | None = None,
    stems: Sequence[str] = WEIGHT_STEMS,
) -> Checkpoint:
    """Open the checkpoint at `path`: headers, index and config, no data.

    Args:
        path: a file, a folder, or the index of shards.
        name: what messages call it; its path unless given.
        hub_id: where on the Hub it came from, if it did.
        to_look_at: not to compute with, so that it may be quantised.
        known: headers of checkpoints that were opened before (`read_header`).
        variant: of a folder with several sets of weights, which: `fp16` of `model.fp16.safetensors`. One without it is
            opened as without.
        part: which of several state dicts in a file that `torch.save` wrote.
        heads: of a folder without its weight files, their headers.
        stems: what a folder's weights may be called, the first of these that is there.

    Raises:
        CheckpointError: it is missing, malformed, incomplete, or its index and its shards disagree.
        UnsupportedError: it is quantised, an adapter, or holds no weights in a format that is read.
    """
    name = name or str(path)
    files: Mapping[Path, set[str] | None]
    if heads is not None:
        sharded = is_index(heads.chosen)
        files = _in_order(path, shards_of(path / heads.chosen)) if sharded else {path / heads.chosen: None}
        stem, config = _stem_of(heads.chosen), _config_in(path)
    elif os.path.isdir(path):
        if to_look_at and (alone := _lone_gguf(path)) is not None:
            return _open_gguf(alone, name, hub_id, to_look_at=True)
        files, stem = _weight_files(path, variant, stems)
        config = _config_in(path)
    elif os.path.isfile(path) and is_index(path.name):
        files, stem = _shards_beside(path), _stem_of(path.name)
        config = _config_in(path.parent)
    elif os.path.isfile(path):
        _refuse_lone_shard(path.parent, path.name)
        if path.name.lower().endswith(GGUF):
            return _open_gguf(path, name, hub_id, to_look_at=to_look_at)
        if path.name.endswith(_OTHER_FORMATS):
            raise UnsupportedError(f"{path} is of a format that lines does not read, by its name", hint=_CONVERT)
        if _PARTS.fullmatch(path.name):
            raise UnsupportedError(f"{path} is one part of a training state, by its name", hint=_GATHER)
        files, stem, config = {path: None}, _stem_of_file(path), {}
    else:
        what = "neither a file nor a folder" if os.path.lexists(path) else "there is no such file or folder"
        raise CheckpointError(f"{path}: {what}", hint="Give a file with weights, or a folder that holds a checkpoint.")

    elsewhere = heads.url if heads is not None else None
    held: list[_Contents] = []
    states: list[FileState] = []
    tensors: dict[str, StoredTensor] = {}
    for number, (file, expected) in enumerate(files.items()):
        if heads is None:
            there = _stat(file)  # before the header is read: what is written meanwhile shows
            nbytes, mtime_ns = there.st_size, there.st_mtime_ns
            held.append(_contents(file, known, part, name))
        else:
            contents, nbytes = _fetched(name, file.relative_to(path), heads, known)
            mtime_ns = heads.times.get(file.relative_to(path).as_posix(), 0)
            held.append(contents)
        states.append(FileState(nbytes, mtime_ns, held[-1].digest))
        if expected is not None and held[-1].tensors.keys() != expected:
            _refuse_shard(file, held[-1].tensors.keys(), expected)
        tensors.update({tensor: StoredTensor(number, info) for tensor, info in held[-1].tensors.items()})
    checkpoint = Checkpoint(
        name=name,
        path=path,
        files=tuple(files if elsewhere is None else (placed_at(elsewhere) / file.relative_to(path) for file in files)),
        tensors=tensors,
        states=tuple(states),
        stem=stem,
        config=config,
        hub_id=hub_id,
        metadata=held[0].metadata if len(held) == 1 else {},
        part=part,
        views=tuple(of.views for of in held) if any(of.views for of in held) else (),
        notes=tuple(note for of in held for note in of.notes),
        is_here=heads is None or elsewhere is not None,
    )
    return to_be_looked_at(checkpoint) if to_look_at else as_model(checkpoint)


def _open_gguf(path: Path, name: str, hub_id: str | None, *, to_look_at: bool) -> Checkpoint:
    """A GGUF file, to be looked at.

    Raises:
        UnsupportedError: it is to be computed with.
        CheckpointError: it is damaged.
    """
    there = _stat(path)
    header = read_gguf(path)
    tensors = {tensor: StoredTensor(0, info) for tensor, info in header.tensors.items()}
    state = FileState(there.st_size, there.st_mtime_ns, header.digest)
    found = Checkpoint(
        name, path, (path,), tensors, (state,), WEIGHT_STEMS[0], header.config, hub_id, stored_as=header.described
    )
    if not to_look_at and (unsupported := unsupported_in(found)):
        raise unsupported
    return found


def _lone_gguf(folder: Path) -> Path | None:
    """The only GGUF file of a folder that holds no other weights."""
    with suppress(OSError):
        names = os.listdir(folder)
        if not weights_among(names) and len(found := [name for name in names if name.lower().endswith(GGUF)]) == 1:
            return folder / found[0]
    return None


def as_model(checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint as it is stored, as the model that can be computed with: FP8 weights are what they stand for.

    Raises:
        CheckpointError: what is stored contradicts itself.
        UnsupportedError: it cannot be computed with.
    """
    found = read_quantised(checkpoint.tensors, checkpoint.config, checkpoint.where)
    if found is not None:
        checkpoint = replace(checkpoint, **found._asdict(), notes=(*checkpoint.notes, *_said_of(checkpoint, found)))
    if unsupported := unsupported_in(checkpoint):
        raise unsupported
    return checkpoint


def refusal_of(checkpoint: Checkpoint) -> CheckpointError | None:
    """Why it cannot be computed with; None where it can."""
    try:
        as_model(checkpoint)
    except CheckpointError as error:
        return error
    return None


def to_be_looked_at(checkpoint: Checkpoint) -> Checkpoint:
    """The same where it can be, else as it is stored."""
    try:
        return as_model(checkpoint)
    except CheckpointError:
        return checkpoint


def _said_of(checkpoint: Checkpoint, found: Quantised) -> Iterator[str]:
    of_them = f"{len(found.formulas):,} of {len(found.tensors):,} tensors of {checkpoint.name}"
    yield f"{of_them} are stored in 8 bits ({found.stored_as}): they are read as the numbers that these stand for"
    if found.beside:
        yield (
            f"{len(found.beside):,} tensor(s) of {checkpoint.name} scale activations in 8 bits, and are no part of the "
            f"model\n{some(list(found.beside))}"
        )


class _Contents(NamedTuple):
    """What a file says of itself, of whatever format it is."""

    tensors: dict[str, TensorInfo]
    digest: str
    metadata: Mapping[str, str]
    views: Views
    notes: tuple[str, ...]


def _contents(file: Path, known: Known | None, part: str | None, name: str) -> _Contents:
    if is_pickle(file.name):
        called = name if part is None else name.removesuffix(f"#{part}")
        found = read_state_dict(file, part, called=called)
        return _Contents(found.tensors, found.digest, {}, found.views, found.notes)
    if part is not None:
        raise CheckpointError(
            f"{name}: nothing in it is called {part!r}: {file} is no file that torch.save wrote, by its name",
            hint="Give it without the # and what follows.",
        )
    header = read_header(file, known)
    return _Contents(header.tensors, header.digest, header.metadata, {}, ())


def is_pickle(name: str) -> bool:
    """Whether a file is one that `torch.save` wrote, by its name."""
    return name.lower().endswith(PICKLES)


def _fetched(name: str, file: Path, heads: Heads, known: Known | None) -> tuple[_Contents, int]:
    """What a weight file that is elsewhere says of itself, and its size."""
    nbytes, raw = heads.files[file.as_posix()]
    header = parse_header(placed_at(heads.url or name) / file, raw, nbytes, known)
    return _Contents(header.tensors, header.digest, header.metadata, {}, ()), nbytes


def _config_in(folder: Path) -> Mapping[str, Any]:
    path = beside(folder, CONFIG)
    return read_object(path) if path is not None else {}


def is_index(name: str) -> bool:
    """Whether a file is the index of shards, by its name."""
    return _INDEX.fullmatch(name) is not None


def variants_in(names: Collection[str]) -> dict[str, str]:
    """Of a folder's file names, those of weights in a variant: `fp16` -> `model.fp16.safetensors`, or its index."""
    found: dict[str, set[str]] = {}
    for name in weights_among(names):
        if match := _INDEX.fullmatch(name) or (None if _SHARD.fullmatch(name) else _VARIANT.fullmatch(name)):
            said = match.groupdict()
            if variant := said["variant"] or said.get("of_pickle"):
                found.setdefault(variant, set()).add(name)
    return {variant: next(iter(those)) for variant, those in sorted(found.items()) if len(those) == 1}


def weights_among(names: Collection[str]) -> list[str]:
    """Of a folder's file names, those of weights and their indices, in order: safetensors, if there are any; else what
    `torch.save` wrote. Adapters and what trainers keep are no weights; beside an adapter only what a library calls so.
    """
    files = {name for name in names if name not in ADAPTERS}
    found = [name for name in files if name.endswith(_SUFFIX) or (is_index(name) and _SUFFIX in name)]
    if not found:
        stems = tuple(PICKLE_STEMS) if files != set(names) else ("",)
        found = [
            name
            for name in files
            if (is_pickle(name) or is_index(name))
            and name.startswith(stems)
            and not (_TRAINING.fullmatch(name) or _PARTS.fullmatch(name))
        ]
    return sorted(found)


def _stat(path: Path) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint=_UNREADABLE) from error


def choose_weights(
    names: Collection[str], variant: str | None = None, stems: Sequence[str] = WEIGHT_STEMS
) -> str | None:
    """Of a folder's file names, the one that says what its weights are: an index, or the only weight file. None if
    no choice is clear. The variant that is asked for comes first, if it is there; one that is the only set is taken.

    A library's own names come first (`model`, `diffusion_pytorch_model`, `open_clip_model`); adapters are not weights.
    """
    variants, weights = variants_in(names), weights_among(names)
    if variant in variants:
        return variants[variant]
    indices = [name for name in weights if name.endswith(_INDEX_SUFFIXES)]
    files = [name for name in weights if not is_index(name)]
    for stem, suffix in (*((stem, _SUFFIX) for stem in stems), *((stem, ".bin") for stem in PICKLE_STEMS)):
        own = [name for name in (f"{stem}{suffix}.index.json", stem + suffix) if name in weights]
        if own:
            return own[0] if len(own) == 1 else None
    if variants and not indices:
        return next(iter(variants.values())) if len(variants) == 1 else None
    if len(indices) == 1:
        return indices[0]
    return files[0] if len(files) == 1 and not indices else None


def shards_of(index: Path) -> dict[str, set[str]]:
    """Read an index: shard file name -> the names of its tensors.

    Raises:
        CheckpointError: it is not an index, or a shard's name leads out of the folder.
    """
    content = read_json(index, LARGEST_INDEX)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map in it", hint="This is not the index of a sharded checkpoint.")
    shards: dict[str, set[str]] = {}
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str):
            raise CheckpointError(
                f"{index}: tensor {tensor!r} is mapped to {shard!r}, not to a file name", hint=_NOT_JSON
            )
        if shard not in shards:
            if leads_out(shard):
                raise CheckpointError(
                    f"{index}: tensor {tensor!r} is mapped to {shard!r}, which is outside the folder",
                    hint="Shards belong in the folder of their index. Do not trust this checkpoint, or fix its index.",
                )
            if len(shards) == _MOST_SHARDS:
                raise CheckpointError(f"{index}: more than {_MOST_SHARDS:,} shards", hint=_NOT_JSON)
            shards[shard] = set()
        shards[shard].add(tensor)
    return shards


def _weight_files(folder: Path, variant: str | None, stems: Sequence[str]) -> tuple[dict[Path, set[str] | None], str]:
    """The folder's weight files, each with the tensors the index expects in it, and their stem."""
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be read: {error.strerror}", hint=_UNREADABLE) from error
    chosen = choose_weights(names, variant, stems)
    if chosen is None:
        refuse_folder(str(folder), names, components=_with_weights(folder, names))
    _refuse_lone_shard(folder, chosen)
    if not is_index(chosen):
        return {folder / chosen: None}, _stem_of(chosen)
    return _shards_beside(folder / chosen), _stem_of(chosen)


def _with_weights(folder: Path, names: Collection[str]) -> list[str]:
    """The subfolders that hold weights, as those of a pipeline's components do; and those of the Hub's cache."""
    found = []
    names = set(names)
    if _SNAPSHOTS in names:
        with suppress(OSError):
            names |= {f"{_SNAPSHOTS}/{commit}" for commit in os.listdir(folder / _SNAPSHOTS)}
    for name in sorted(names):
        with suppress(OSError):
            if weights_among(os.listdir(folder / name)):
                found.append(name)
    return found


_SNAPSHOTS = "snapshots"


def _stem_of(chosen: str) -> str:
    """What an index or a weight file is called, its variant apart; a pickle as it would be called now."""
    match = _INDEX.fullmatch(chosen) or _VARIANT.fullmatch(chosen)
    said = match.groupdict() if match else {}
    stem: str = said.get("stem") or said.get("pickle") or os.path.splitext(chosen)[0]
    return stem if _SUFFIX in chosen else PICKLE_STEMS.get(stem, WEIGHT_STEMS[0])


def _shards_beside(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, each with the tensors that it expects in it."""
    folder, shards = index.parent, shards_of(index)
    missing = sorted(shard for shard in shards if not os.path.isfile(folder / shard))  # however long a name is
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} of {len(shards)} shards that are not there:\n{some(missing)}",
            hint="The checkpoint is incomplete: copy or download the missing files.",
        )
    return _in_order(folder, shards)


def _in_order(folder: Path, shards: Mapping[str, set[str]]) -> dict[Path, set[str] | None]:
    return {folder / shard: tensors for shard, tensors in sorted(shards.items())}


def refuse_folder(folder: str, names: Collection[str], *, components: Sequence[str] = ()) -> NoReturn:
    """Say why there is no choice of weights among a folder's (or a repository's) file names.

    Args:
        folder: what to call it.
        names: of its files.
        components: its subfolders that hold weights.

    Raises:
        CheckpointError: several sets of weights, or none.
        UnsupportedError: an adapter, or weights in another format only.
    """
    weights = weights_among(names)
    if len(variants := variants_in(names)) > 1 and not any(name.endswith(_INDEX_SUFFIXES) for name in weights):
        raise CheckpointError(
            f"{folder} holds weights in several variants, and which one is meant is not clear:\n{some(list(variants))}",
            hint=f"Say which: --variant {next(iter(variants))} (in a recipe variant:); or give the file or index.",
        )
    if weights and all(_SHARD.fullmatch(name) for name in weights):
        raise CheckpointError(
            f"{folder} holds shards, but no index that says which belong together:\n{some(weights)}",
            hint=f"Copy or download the {Path(weights[0]).suffix}.index.json that belongs to them.",
        )
    if weights:
        raise CheckpointError(
            f"{folder} holds several sets of weights, and it is not clear which one is meant:\n{some(weights)}",
            hint="Give the file itself, or move the others away.",
        )
    if not set(ADAPTERS).isdisjoint(names):
        raise UnsupportedError(
            f"{folder} is a PEFT adapter, not a whole checkpoint",
            hint=WITH_ITS_BASE,
        )
    if parts := sorted(name for name in names if _PARTS.fullmatch(name) or name.startswith(_FOLDERS_OF_PARTS)):
        raise UnsupportedError(
            f"{folder} holds the parts of a training state, no weights:\n{some(parts)}", hint=_GATHER
        )
    if components:
        raise CheckpointError(
            f"{folder} holds no weights itself; folders in it do:\n{some(components)}",
            hint=f"Give one of them, as in {folder}/{components[0]}; each is edited by itself.",
        )
    other = sorted(name for name in names if name.lower().endswith(_OTHER_FORMATS))
    if other and all(name.lower().endswith(GGUF) for name in other):
        raise UnsupportedError(f"{folder} holds GGUF files only:\n{some(other)}", hint=WAYS["GGUF"])
    if other:
        raise UnsupportedError(
            f"{folder} holds no weights but in formats that lines does not read:\n{some(other)}",
            hint=_CONVERT,
        )
    raise CheckpointError(
        f"{folder} holds no weights: no .safetensors file, and none that torch.save wrote",
        hint="Give a checkpoint: a file with weights, or a folder with one.",
    )


def _refuse_lone_shard(folder: Path, file: str) -> None:
    """A shard is a part of a model, and depth is counted over the whole."""
    if match := _SHARD.fullmatch(file):
        if match[1] == match[2] == "00001":
            return
        raise CheckpointError(
            f"{folder / file} is one shard of several, by its name, and there is no index",
            hint="Give the folder with all of its shards and their .index.json.",
        )


def _stem_of_file(path: Path) -> str:
    """A lone file's stem where a library would look for it, else `model`."""
    stem = _stem_of(path.name)
    return stem if stem in WEIGHT_STEMS else WEIGHT_STEMS[0]


def _reads_alike(name: str, other: str) -> bool:
    """Whether a lone file would be read in the same way under another name."""
    as_it_is = (is_pickle(other) if is_pickle(name) else other.endswith(_SUFFIX)) and not _SHARD.fullmatch(other)
    return name == other or (as_it_is and _stem_of_file(Path(name)) == _stem_of_file(Path(other)))


_NOT_ONE_SAVE = "The index and the shards do not belong together: copy or download the checkpoint again."


def _refuse_shard(file: Path, held: Collection[str], expected: set[str]) -> None:
    if lacking := sorted(expected.difference(held)):
        raise CheckpointError(
            f"{file} lacks {len(lacking)} tensors that the index expects in it:\n{some(lacking)}", hint=_NOT_ONE_SAVE
        )
    extra = sorted(set(held) - expected)
    raise CheckpointError(
        f"{file} holds {len(extra)} tensors that the index does not map to it:\n{some(extra)}",
        hint=_NOT_ONE_SAVE,
    )


def quantisation_said(config: Mapping[str, Any]) -> str | None:
    """The method by which a config says that weights are quantised; None if it does not. It may have been left behind
    when they were made whole again.
    """
    said = said_to_be(config) or config.get(QUANTIZATION)
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return printable(str(method or "unnamed method")) if said else None


def unsupported_in(checkpoint: Checkpoint) -> UnsupportedError | None:
    """Why it cannot be computed with: it is quantised, an adapter, or holds a tensor of a dtype that there is no
    arithmetic for.
    """
    if checkpoint.files[0].name.lower().endswith(GGUF):
        return UnsupportedError(
            f"{checkpoint.files[0]} is quantised, or may be: it is a GGUF file ({checkpoint.stored_as})",
            hint=WAYS["GGUF"],
        )
    tensors = {name: stored.info for name, stored in checkpoint.tensors.items()}
    if (method := quantisation_said(checkpoint.config)) and (held := codes_or_scales(tensors)):
        return UnsupportedError(
            f"{checkpoint.name} is quantised: its config.json has a quantization_config ({method}), and it holds "
            f"{printable(held)} ({checkpoint.tensors[held].info.dtype}){_by_name(format_of(tensors, method))}",
            hint=way_out(format_of(tensors, method)),
        )
    for tensor, stored in checkpoint.tensors.items():
        dtype = stored.info.dtype
        if dtype not in FLOAT_DTYPES and dtype not in EXACT_DTYPES:
            kind = "quantised" if dtype.startswith("F") else "of a kind lines does not edit"
            return UnsupportedError(
                f"{checkpoint.where(tensor)} is {kind}: tensor {printable(tensor)} is {dtype}"
                f"{_by_name(format_of(tensors)) if dtype.startswith('F') else ''}",
                hint=way_out(format_of(tensors)) if dtype.startswith("F") else None,
            )
    if (codes := quantised_tensor(tensors)) is not None:
        return UnsupportedError(
            f"{checkpoint.where(codes)} is quantised: it holds {printable(codes)} ({tensors[codes].dtype})"
            f"{_by_name(format_of(tensors))}",
            hint=way_out(format_of(tensors)),
        )
    if is_adapter(tensors):
        factor = factors_among(tensors)[0]
        return UnsupportedError(
            f"{checkpoint.where(factor)} is an adapter, not a whole checkpoint: it holds factors, such as "
            f"{printable(factor)}, and not the weights that they change",
            hint=f"The result would be no sum of what they stand for. {WITH_ITS_BASE}",
        )
    return None


def _by_name(known: str | None) -> str:
    return "" if known is None or known == UNSCALED else f", as {known} does"


WITH_ITS_BASE = (
    "An adapter stands where a fine-tune does, with its base: lines edit BASE ADAPTER -o OUT, or as BASE+ADAPTER."
)
