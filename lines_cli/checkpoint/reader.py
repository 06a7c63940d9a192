"""Checkpoints as their users have them: a safetensors file, a folder with one, or a folder with shards and their index.

Opening one reads headers and `config.json` only. Nothing in a checkpoint is ever executed, and no path it names is
followed out of its folder; of links only those of weights are.
"""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lines_cli.checkpoint.contents import codes_or_scales, factors_among, is_adapter, quantised_tensor
from lines_cli.checkpoint.formulas import Made
from lines_cli.checkpoint.header import EXACT_DTYPES, FLOAT_DTYPES, Known, StoredTensor, read_header
from lines_cli.errors import CheckpointError, UnsupportedError, printable, some
from lines_cli.storage.beside import LARGEST_INDEX, beside, leads_out, read_json, read_object
from lines_cli.storage.names import CONFIG, WEIGHT_STEMS

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_ADAPTER = "adapter_model.safetensors"
_OTHER_FORMATS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
_SHARD = re.compile(r".*-(\d{5})-of-(\d{5})(?:\.[\w-]+)?\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?:\.(?P<variant>[\w-]+))?\.json")
_VARIANT = re.compile(rf"(?P<stem>{'|'.join(WEIGHT_STEMS)})\.(?P<variant>[\w-]+)\.safetensors")
_MOST_SHARDS = 100_000  # as many as five digits can number
_CONVERT = "Load it with the library that wrote it and save it as safetensors (transformers: save_pretrained)."
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
        files: the safetensors files, all of them.
        tensors: every tensor by name.
        states: the state of each file when its header was read.
        stem: what its weight files are called, `model` in `model-00001-of-00002.safetensors`.
        config: the parsed `config.json`; empty where there is none.
        hub_id: `org/name@commit`, for one that came from the Hub.
        metadata: what the header of its only file says beside the tensors; empty where there are several files.
        formulas: tensors that are not stored as they are -> what they are made of.
        parts: of one that is put together, what it is put together of: a base, and an adapter on it.
        base_named: of such a one, whether its name says both (`base+adapter`); else the base is the recipe's.
        notes: what a person should know of how it was read.
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
    parts: tuple[Checkpoint, ...] = ()
    base_named: bool = False
    notes: tuple[str, ...] = ()
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
        return sum(tensor.info.nbytes for tensor in self.tensors.values())

    def where(self, tensor: str) -> str:
        """The file that holds `tensor`, for a message."""
        return str(self.files[self.tensors[tensor].file])


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
        stems: what a folder's weights may be called, the first of these that is there.

    Raises:
        CheckpointError: it is missing, malformed, incomplete, or its index and its shards disagree.
        UnsupportedError: it is quantised, an adapter, or holds no safetensors.
    """
    name = name or str(path)
    if os.path.isdir(path):
        files, stem = _weight_files(path, variant, stems)
        config = _config_in(path)
    elif os.path.isfile(path) and is_index(path.name):
        files, stem = _shards_beside(path), _stem_of(path.name)
        config = _config_in(path.parent)
    elif os.path.isfile(path):
        _refuse_lone_shard(path.parent, path.name)
        if path.name.endswith(_OTHER_FORMATS):
            raise UnsupportedError(f"{path} is not a .safetensors file, by its name", hint=_CONVERT)
        files, stem, config = {path: None}, _stem_of_file(path), {}
    else:
        what = "neither a file nor a folder" if os.path.lexists(path) else "there is no such file or folder"
        raise CheckpointError(f"{path}: {what}", hint="Give a .safetensors file, or a folder that holds a checkpoint.")

    tensors: dict[str, StoredTensor] = {}
    states: list[FileState] = []
    metadata: Mapping[str, str] = {}
    for number, (file, expected) in enumerate(files.items()):
        there = _stat(file)  # before the header is read: what is written meanwhile shows
        header = read_header(file, known)
        held = header.tensors
        metadata = header.metadata if len(files) == 1 else {}
        states.append(FileState(there.st_size, there.st_mtime_ns, header.digest))
        if expected is not None and held.keys() != expected:
            _refuse_shard(file, held.keys(), expected)
        tensors.update({tensor: StoredTensor(number, info) for tensor, info in held.items()})
    checkpoint = Checkpoint(name, path, tuple(files), tensors, tuple(states), stem, config, hub_id, metadata)
    if not to_look_at and (unsupported := unsupported_in(checkpoint)):
        raise unsupported
    return checkpoint


def _config_in(folder: Path) -> Mapping[str, Any]:
    path = beside(folder, CONFIG)
    return read_object(path) if path is not None else {}


def is_index(name: str) -> bool:
    """Whether a file is the index of shards, by its name."""
    return _INDEX.fullmatch(name) is not None


def variants_in(names: Collection[str]) -> dict[str, str]:
    """Of a folder's file names, those of weights in a variant: `fp16` -> `model.fp16.safetensors`, or its index."""
    found: dict[str, set[str]] = {}
    for name in names:
        match = _INDEX.fullmatch(name) or (None if _SHARD.fullmatch(name) else _VARIANT.fullmatch(name))
        if match and match["variant"]:
            found.setdefault(match["variant"], set()).add(name)
    return {variant: next(iter(those)) for variant, those in sorted(found.items()) if len(those) == 1}


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
    variants = variants_in(names)
    if variant in variants:
        return variants[variant]
    indices = [name for name in names if name.endswith(_INDEX_SUFFIX)]
    files = [name for name in names if name.endswith(_SUFFIX) and name != _ADAPTER]
    for stem in stems:
        own = [name for name in (stem + _INDEX_SUFFIX, stem + _SUFFIX) if name in names]
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
            if any(inner.endswith(_SUFFIX) for inner in os.listdir(folder / name)):
                found.append(name)
    return found


_SNAPSHOTS = "snapshots"


def _stem_of(chosen: str) -> str:
    """What an index or a weight file is called, its variant apart."""
    match = _INDEX.fullmatch(chosen) or _VARIANT.fullmatch(chosen)
    return match["stem"] if match else chosen.removesuffix(_SUFFIX)


def _shards_beside(index: Path) -> dict[Path, set[str] | None]:
    """The shards that an index names, each with the tensors that it expects in it."""
    folder, shards = index.parent, shards_of(index)
    missing = sorted(shard for shard in shards if not os.path.isfile(folder / shard))  # however long a name is
    if missing:
        raise CheckpointError(
            f"{index} names {len(missing)} of {len(shards)} shards that are not there:\n{some(missing)}",
            hint="The checkpoint is incomplete: copy or download the missing files.",
        )
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
    weights = sorted(name for name in names if name.endswith((_SUFFIX, _INDEX_SUFFIX)) and name != _ADAPTER)
    if len(variants := variants_in(names)) > 1 and not any(_INDEX_SUFFIX in name for name in weights):
        raise CheckpointError(
            f"{folder} holds weights in several variants, and which one is meant is not clear:\n{some(list(variants))}",
            hint=f"Say which: --variant {next(iter(variants))} (in a recipe variant:); or give the file or index.",
        )
    if weights and all(_SHARD.fullmatch(name) for name in weights):
        raise CheckpointError(
            f"{folder} holds shards, but no index that says which belong together:\n{some(weights)}",
            hint="Copy or download the .safetensors.index.json that belongs to them.",
        )
    if weights:
        raise CheckpointError(
            f"{folder} holds several sets of weights, and it is not clear which one is meant:\n{some(weights)}",
            hint="Give the .safetensors file itself, or move the others away.",
        )
    if _ADAPTER in names:
        raise UnsupportedError(
            f"{folder} is a PEFT adapter, not a whole checkpoint",
            hint=FOLD,
        )
    if components:
        raise CheckpointError(
            f"{folder} holds no weights itself; folders in it do:\n{some(components)}",
            hint=f"Give one of them, as in {folder}/{components[0]}; each is edited by itself.",
        )
    other = sorted(name for name in names if name.endswith(_OTHER_FORMATS))
    if other:
        raise UnsupportedError(
            f"{folder} holds no safetensors, but weights in another format:\n{some(other)}",
            hint=_CONVERT,
        )
    raise CheckpointError(
        f"{folder} holds no .safetensors file", hint="Give a checkpoint: a .safetensors file or a folder with one."
    )


def _refuse_lone_shard(folder: Path, file: str) -> None:
    """A shard is a part of a model, and depth is counted over the whole."""
    if match := _SHARD.fullmatch(file):
        if match[1] == match[2] == "00001":
            return
        raise CheckpointError(
            f"{folder / file} is one shard of several, by its name, and there is no index",
            hint="Give the folder with all of its shards and their .safetensors.index.json.",
        )


def _stem_of_file(path: Path) -> str:
    """A lone file's stem where a library would look for it, else `model`."""
    stem = _stem_of(path.name)
    return stem if stem in WEIGHT_STEMS else WEIGHT_STEMS[0]


def _reads_alike(name: str, other: str) -> bool:
    """Whether a lone file would be read in the same way under another name."""
    as_it_is = other.endswith(_SUFFIX) and not _SHARD.fullmatch(other)
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


QUANTIZATION = "quantization_config"


def quantisation_said(config: Mapping[str, Any]) -> str | None:
    """The method by which a config says that weights are quantised; None if it does not. It may have been left behind
    when they were made whole again.
    """
    said = config.get(QUANTIZATION)
    method = said.get("quant_method") if isinstance(said, Mapping) else None
    return printable(str(method or "unnamed method")) if said else None


def unsupported_in(checkpoint: Checkpoint) -> UnsupportedError | None:
    """Why it cannot be computed with: it is quantised, an adapter, or holds a tensor of a dtype that there is no
    arithmetic for.
    """
    tensors = {name: stored.info for name, stored in checkpoint.tensors.items()}
    if (method := quantisation_said(checkpoint.config)) and (held := codes_or_scales(tensors)):
        return UnsupportedError(
            f"{checkpoint.name} is quantised: its config.json has a quantization_config ({method}), and it holds "
            f"{printable(held)} ({checkpoint.tensors[held].info.dtype})",
            hint=_DEQUANTISE,
        )
    for tensor, stored in checkpoint.tensors.items():
        dtype = stored.info.dtype
        if dtype not in FLOAT_DTYPES and dtype not in EXACT_DTYPES:
            kind = "quantised" if dtype.startswith("F") else "of a kind lines does not edit"
            return UnsupportedError(
                f"{checkpoint.where(tensor)} is {kind}: tensor {printable(tensor)} is {dtype}",
                hint=_DEQUANTISE if dtype.startswith("F") else None,
            )
    if (codes := quantised_tensor(tensors)) is not None:
        return UnsupportedError(
            f"{checkpoint.where(codes)} is quantised: it holds {printable(codes)} ({tensors[codes].dtype})",
            hint=_DEQUANTISE,
        )
    if is_adapter(tensors):
        factor = factors_among(tensors)[0]
        return UnsupportedError(
            f"{checkpoint.where(factor)} is an adapter, not a whole checkpoint: it holds factors, such as "
            f"{printable(factor)}, and not the weights that they change",
            hint=f"The result would be no sum of what they stand for. {FOLD}",
        )
    return None


_DEQUANTISE = (
    "Give the checkpoint it was quantised from, or dequantise it first; a sum of quantised codes means nothing."
)
FOLD = "Fold it into its base first (peft: merge_and_unload, then save_pretrained), and give that folder."
