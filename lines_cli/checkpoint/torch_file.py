"""What `torch.save` wrote, as far as its pickle tells: plain values, with tensors that know where their entries lie.

There are two kinds of such files. A zip file holds the pickle as `data.pkl` and every storage as a member of its own,
uncompressed. Before torch 1.6 the pickle came first, and the storages behind it one after the other. In both a tensor
is a call of one of a few functions of torch, with a storage, an offset, a shape and strides; these are known here, and
nothing is called (`pickles`). Neither the pickle nor the zip directory is trusted: a tensor lies in its storage, a
storage in the file, and no two storages in each other, or the file is refused.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol

from lines_cli.checkpoint.header import TensorInfo, itemsize
from lines_cli.checkpoint.pickles import Global, Hooks, Made, PickleEndError, PickleError, read_pickle
from lines_cli.errors import CheckpointError, UnsupportedError, printable
from lines_cli.storage.files import FETCH_LFS, LFS_POINTER, open_regular, read_into
from lines_cli.storage.views import View, is_in_order
from lines_cli.storage.zip_members import (
    SIGNATURE,
    Directory,
    Member,
    ZipEndError,
    ZipError,
    content_of,
    read_directory,
)

LARGEST_PICKLE = 64 * 2**20
"""Bytes of a file's pickle, its tensors apart."""

_MOST_AXES = 64  # as many as torch has
_MOST_TIMES = 100  # that a file's tensors may be larger than it, because some of them share a storage
_BEGINNING = 2**20  # bytes: what is read first of a file whose pickle is of unknown length
_MAGIC = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # the first value in a file from before torch 1.6


def _pairs(text: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in text.split())


DTYPES = _pairs(
    "float64=F64 float32=F32 float16=F16 bfloat16=BF16 complex64=C64 bool=BOOL int64=I64 int32=I32 int16=I16 int8=I8 "
    "uint64=U64 uint32=U32 uint16=U16 uint8=U8 float8_e4m3fn=F8_E4M3 float8_e5m2=F8_E5M2 float8_e8m0fnu=F8_E8M0 "
    "float8_e4m3fnuz=F8_E4M3FNUZ float8_e5m2fnuz=F8_E5M2FNUZ"
)
"""torch's dtypes that safetensors has, and what it calls them."""
_SYNONYMS = _pairs(
    "double=float64 float=float32 half=float16 cfloat=complex64 cdouble=complex128 long=int64 int=int32 short=int16"
)
_OF_STORAGES = _pairs(
    "DoubleStorage=float64 FloatStorage=float32 HalfStorage=float16 BFloat16Storage=bfloat16 LongStorage=int64 "
    "IntStorage=int32 ShortStorage=int16 CharStorage=int8 ByteStorage=uint8 BoolStorage=bool UntypedStorage=uint8 "
    "ComplexFloatStorage=complex64 ComplexDoubleStorage=complex128 QInt8Storage=qint8 QUInt8Storage=quint8 "
    "QInt32Storage=qint32 QUInt4x2Storage=quint4x2 QUInt2x4Storage=quint2x4"
)
_WIDTHS = {"complex128": 16, "qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
_TYPES_OF_STORAGES = frozenset({"torch", "torch.cuda", "torch.storage"})

_REBUILT = "torch._utils._rebuild_"
_PARAMETERS = frozenset({_REBUILT + "parameter", _REBUILT + "parameter_with_state"})
_TENSORS = frozenset({_REBUILT + "tensor", _REBUILT + "tensor_v2", _REBUILT + "tensor_v3"})
_OF_A_TYPE = frozenset({"torch._tensor._rebuild_from_type", "torch._tensor._rebuild_from_type_v2"})
_PLAIN_TYPES = frozenset({"torch.Tensor", "torch._tensor.Tensor", "torch.nn.parameter.Parameter"})
_PLAIN_TYPES |= {"torch.nn.parameter.Buffer"}
_ODD = {
    _REBUILT + "sparse_tensor": "a sparse tensor",
    _REBUILT + "sparse_csr_tensor": "a sparse tensor",
    _REBUILT + "qtensor": "a quantised tensor",
    _REBUILT + "nested_tensor": "a nested tensor",
    _REBUILT + "meta_tensor_no_storage": "on the meta device, and has no entries",
    _REBUILT + "xla_tensor": "a tensor of another device, stored as numpy's",
    _REBUILT + "device_tensor_from_numpy": "a tensor of another device, stored as numpy's",
    _REBUILT + "wrapper_subclass": "a tensor of a subclass, which is stored without its entries",
    "numpy.core.multiarray._reconstruct": "an array of numpy",
    "numpy._core.multiarray._reconstruct": "an array of numpy",
    "torch.storage._load_from_bytes": "a storage with a pickle of its own",
}

# What runs commands or code. Nothing does here; but a file that asks for it is not what it seems to be.
_HARMFUL_MODULES = re.compile(
    r"(?:os|posix|nt|subprocess|_posixsubprocess|pty|shutil|socket|runpy|ctypes|webbrowser|importlib|pip|code|codeop"
    r"|commands|popen2|bdb|pdb|timeit|pydoc|cProfile)(?:\..+)?"
)
_HARMFUL_NAMES = frozenset("eval exec execfile compile open open_code FileIO __import__ input breakpoint".split())
_BUILTINS = frozenset({"builtins", "__builtin__", "__builtins__", "io", "_io", "codecs", "_pyio"})


class Storage(NamedTuple):
    """A run of bytes that tensors share.

    Attributes:
        key: its name within the file.
        dtype: torch's.
        nbytes: as the pickle says.
        skip: where it begins in the storage that is stored, in bytes; of old files, which have views of storages.
    """

    key: str
    dtype: str
    nbytes: int
    skip: int = 0


class Tensor(NamedTuple):
    """A tensor as the pickle describes it; nothing of it is checked but its types.

    Attributes:
        storage: what it lies in.
        dtype: torch's name of it.
        first: its first entry, counted in the storage.
        shape, strides: in entries.
    """

    storage: Storage
    dtype: str
    first: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Odd(NamedTuple):
    """A tensor of a kind that is not read; `what` is said of it as in "is a sparse tensor"."""

    what: str


class Place(NamedTuple):
    """Where the entries of a tensor lie: one behind the other from an offset on, or as a view."""

    info: TensorInfo
    view: View | None


class _Container(Protocol):
    """A kind of file."""

    def place_of(self, storage: Storage) -> tuple[int, int]:
        """Where a storage's content begins in the file, and how many bytes it has."""


@dataclass
class TorchFile:
    """An open file that `torch.save` wrote.

    Attributes:
        path: the file.
        value: what was saved.
        digest: the SHA-256 of all that is read of it beside tensors.
        nbytes: its size.
    """

    path: Path
    value: Any
    digest: str
    nbytes: int
    _container: _Container = field(repr=False)
    _places: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)
    _taken: int = 0

    def place(self, name: str, tensor: Tensor) -> Place:
        """Where a tensor's entries lie.

        Args:
            name: for messages, and in the output.
            tensor: one of those in `value`.

        Raises:
            CheckpointError: they do not lie in the file.
            UnsupportedError: safetensors has no such dtype.
        """
        called = f"{self.path}: tensor {printable(name)}"
        storage, shape, strides = tensor.storage, tensor.shape, tensor.strides
        dtype = DTYPES.get(tensor.dtype)
        if dtype is None:
            raise UnsupportedError(
                f"{called} is {printable(tensor.dtype)}, which safetensors does not have",
                hint="Convert it with torch, and save the state dict again.",
            )
        if len(shape) != len(strides) or len(shape) > _MOST_AXES or max((*shape, *strides, tensor.first, 0)) >= 2**63:
            raise CheckpointError(f"{called} has an impossible shape or impossible strides", hint=_DAMAGED)
        width, numel = itemsize(dtype), math.prod(shape)
        if numel == 0:
            return Place(TensorInfo(dtype, shape, 0, 0), None)
        self._taken += numel * width
        if self._taken > _MOST_TIMES * self.nbytes:
            raise CheckpointError(
                f"{called}: its tensors would take more than {_MOST_TIMES} times the bytes of the file", hint=_DAMAGED
            )
        start, stored = self._storage(storage)
        last = tensor.first + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        available = min(storage.nbytes, stored - storage.skip)
        if (last + 1) * width > available:
            raise CheckpointError(
                f"{called} reaches to byte {(last + 1) * width:,} of its storage, which has {max(0, available):,}",
                hint=_DAMAGED,
            )
        offset = start + storage.skip + tensor.first * width
        info = TensorInfo(dtype, shape, offset, numel * width)
        return Place(info, None if is_in_order(shape, strides) else View(offset, shape, strides, width))

    def _storage(self, storage: Storage) -> tuple[int, int]:
        if storage.key not in self._places:
            with _explained(self.path):
                self._places[storage.key] = self._container.place_of(storage)
        return self._places[storage.key]

    def refuse_overlaps(self) -> None:
        """Refuse the file if two of the storages that tensors were placed in have a byte in common.

        Raises:
            CheckpointError: they have.
        """
        end, before = 0, ""
        for key, (start, nbytes) in sorted(self._places.items(), key=lambda item: item[1]):
            if start < end and nbytes:
                raise CheckpointError(
                    f"{self.path}: its storages {printable(before)} and {printable(key)} overlap", hint=_DAMAGED
                )
            end, before = max(end, start + nbytes), key


@contextmanager
def opened_torch_file(path: Path) -> Iterator[TorchFile]:
    """A file that `torch.save` wrote, for the length of a `with` block. No tensor is read, and nothing is run.

    Raises:
        CheckpointError: it cannot be read, or is damaged, or was written by something else; or it asks for commands to
            be run when it is loaded.
        UnsupportedError: it is of a kind of torch's files that holds no weights as they are.
    """
    try:
        fd = open_regular(path)
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror or error}",
            hint="Check that it is a file and that you may read it.",
        ) from error
    try:
        with _explained(path):
            size = os.fstat(fd).st_size
            beginning = _read(fd, 0, min(size, _BEGINNING))
            if beginning.startswith(SIGNATURE):
                file = _of_zip(path, fd, size)
            else:
                _refuse_others(path, beginning, size)
                file = _of_old(path, fd, size)
        yield file
    finally:
        os.close(fd)


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what is wrong with a file into a refusal that names it."""
    try:
        yield
    except _HarmfulError as error:
        raise CheckpointError(
            f"{path}: its pickle names {printable(str(error))}, which runs commands or code when the file is loaded; "
            "lines ran nothing",
            hint="Weights need no such thing: do not load this file, and tell whoever gave it to you.",
        ) from error
    except (PickleEndError, ZipEndError) as error:
        raise CheckpointError(f"{path}: {error}", hint=_INCOMPLETE) from error
    except (PickleError, ZipError) as error:
        raise CheckpointError(f"{path}: {error}", hint=_DAMAGED) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error


_DAMAGED = "The file is damaged, or was not written by torch.save: copy or download it again."
_INCOMPLETE = "The file is incomplete: copy or download it again."


class _HarmfulError(Exception):
    """What a pickle names to have it run."""


class _Hooks(Hooks):
    """What torch's functions make of storages."""

    def __init__(self) -> None:
        self.storages: dict[str, Storage] = {}

    def named(self, what: Global) -> None:
        """Refuse what no checkpoint needs."""
        if _HARMFUL_MODULES.fullmatch(what.module) or (what.module in _BUILTINS and what.name in _HARMFUL_NAMES):
            raise _HarmfulError(str(what))

    def stored(self, key: Any) -> Any:
        """A storage; or of old files the class of a module, which is stored with its source."""
        if not isinstance(key, tuple) or len(key) < 2:
            raise TypeError(key)
        if key[0] == "module":
            return key[1]
        kind, of_type, name, _, numel, *view = key
        if kind != "storage" or not (isinstance(of_type, Global) and isinstance(name, str) and _is_size(numel)):
            raise TypeError(kind)
        dtype = _OF_STORAGES.get(of_type.name) if of_type.module in _TYPES_OF_STORAGES else None
        if dtype is None:
            raise PickleError(f"its pickle has a storage of an unknown kind, {str(of_type)!r}")
        storage = self.storages.setdefault(name, Storage(name, dtype, numel * _width(dtype)))
        if not view or view[0] is None:
            return storage._replace(dtype=dtype, nbytes=numel * _width(dtype))
        _, first, size = view[0]
        if not (_is_size(first) and _is_size(size)):
            raise TypeError(first)
        return Storage(name, dtype, size * _width(dtype), first * _width(dtype))

    def called(self, what: Global, arguments: Any) -> Any:
        """A tensor, where torch makes one of a storage."""
        name = str(what)
        if name in _TENSORS:
            return _tensor(name, *arguments)
        if name in _PARAMETERS:
            return arguments[0]
        if name in _OF_A_TYPE:
            function, of_type, inner, *_ = arguments
            if isinstance(function, Global) and isinstance(of_type, Global) and str(of_type) in _PLAIN_TYPES:
                return self.called(function, inner)
            return Odd(f"a tensor of a subclass{f', {of_type}' if isinstance(of_type, Global) else ''}")
        if name == "torch.Size":
            return tuple(arguments[0])
        if name in _ODD or name.startswith(_REBUILT):
            return Odd(_ODD.get(name, f"made by {name}"))
        return Made(what, arguments)


def _tensor(function: str, storage: Any, first: Any, shape: Any, strides: Any, *more: Any) -> Tensor | Odd:
    """What a function that rebuilds a tensor makes."""
    if not isinstance(storage, Storage):
        return Odd("a tensor without a storage")
    of_third_kind = function.endswith("_v3")
    dtype = storage.dtype
    if of_third_kind:
        if not isinstance(more[2], Global):
            raise TypeError(dtype)
        dtype = more[2].name
    metadata = more[3 if of_third_kind else 2 :]
    if any(metadata):
        return Odd("a view that is yet to be conjugated or negated")
    if not (_is_size(first) and all(map(_is_size, shape)) and all(map(_is_size, strides))):
        raise TypeError(shape)
    return Tensor(storage, _SYNONYMS.get(dtype, dtype), first, tuple(shape), tuple(strides))


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 <= number < 2**63


def _width(dtype: str) -> int:
    return _WIDTHS.get(dtype) or itemsize(DTYPES[dtype])


# --- zip files ---


class _Zip:
    def __init__(self, fd: int, directory: Directory, prefix: str) -> None:
        self._fd, self._directory, self._prefix = fd, directory, prefix

    def place_of(self, storage: Storage) -> tuple[int, int]:
        """As `_Container`."""
        member = self._directory.members.get(f"{self._prefix}/data/{storage.key}")
        if member is None:
            raise ZipError(f"it lacks the storage {storage.key!r}")
        return content_of(self._fd, member, self._directory), member.nbytes


def _of_zip(path: Path, fd: int, size: int) -> TorchFile:
    directory = read_directory(fd, size)
    members = directory.members
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise UnsupportedError(
            f"{path}: a zip file, but none that torch.save wrote: it has {'several' if pickles else 'no'} data.pkl",
            hint="Give the file with the weights, as torch.save wrote it.",
        )
    prefix = pickles[0].removesuffix("/data.pkl")
    if f"{prefix}/constants.pkl" in members:
        raise UnsupportedError(f"{path}: a TorchScript program, not a state dict", hint=of_torchscript(path))
    if any(not member.as_it_is for name, member in members.items() if name.startswith(f"{prefix}/data")):
        raise UnsupportedError(f"{path}: it was compressed after torch.save wrote it", hint=written_again(path))
    if (order := members.get(f"{prefix}/byteorder")) and _content(fd, order, directory, 16).strip() == b"big":
        raise UnsupportedError(f"{path}: written on a big-endian machine", hint=written_again(path))
    raw = _content(fd, members[pickles[0]], directory, LARGEST_PICKLE)
    value, _ = read_pickle(raw, 0, _Hooks())
    digest = sha256(len(raw).to_bytes(8, "little") + raw + directory.raw).hexdigest()
    return TorchFile(path, value, f"sha256:{digest}", size, _Zip(fd, directory, prefix))


def _content(fd: int, member: Member, directory: Directory, most: int) -> bytes:
    if member.nbytes > most:
        raise PickleError(f"its {member.name!r} has {member.nbytes:,} bytes; at most {most:,} are read")
    return _read(fd, content_of(fd, member, directory), member.nbytes)


# --- files from before torch 1.6 ---


class _Old:
    def __init__(self, places: Mapping[str, tuple[int, int]]) -> None:
        self._places = places

    def place_of(self, storage: Storage) -> tuple[int, int]:
        """As `_Container`."""
        if storage.key not in self._places:
            raise PickleError(f"it lacks the storage {storage.key!r}")
        return self._places[storage.key]


def _of_old(path: Path, fd: int, size: int) -> TorchFile:
    nbytes = _BEGINNING
    while True:
        raw = _read(fd, 0, min(size, nbytes))
        try:
            value, keys, storages, end = _old_pickles(path, raw)
            break
        except PickleEndError:
            if nbytes >= min(size, LARGEST_PICKLE):
                if size > LARGEST_PICKLE:
                    raise PickleError(f"its pickle has more than {LARGEST_PICKLE:,} bytes") from None
                raise
            nbytes *= 8
    places: dict[str, tuple[int, int]] = {}
    at = end
    for key in keys:
        storage = storages.get(key) if isinstance(key, str) else None
        if storage is None or key in places:
            raise PickleError("it holds a storage that its pickle does not name")
        count = _read(fd, at, 8)
        if len(count) < 8:
            raise PickleEndError("it ends before its last storage")
        (numel,) = struct.unpack("<q", count)
        content = numel * _width(storage.dtype)
        if content != storage.nbytes:
            raise PickleError(f"its storage {key!r} has {content:,} bytes, and its pickle says {storage.nbytes:,}")
        places[key] = at + 8, content
        at += 8 + content
        if at > size:
            raise PickleEndError(f"it ends within its storage {key!r}")
    return TorchFile(path, value, f"sha256:{sha256(raw[:end]).hexdigest()}", size, _Old(places))


def _old_pickles(path: Path, raw: bytes) -> tuple[Any, list[Any], dict[str, Storage], int]:
    """What was saved; the keys of the storages in the order in which they follow; what is known of each; the end."""
    hooks = _Hooks()
    _, at = read_pickle(raw, 0, hooks)
    _, at = read_pickle(raw, at, hooks)
    machine, at = read_pickle(raw, at, hooks)
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise UnsupportedError(f"{path}: written on a big-endian machine", hint=written_again(path))
    value, at = read_pickle(raw, at, hooks)
    keys, at = read_pickle(raw, at, hooks)
    return value, keys if isinstance(keys, list) else [], hooks.storages, at


def _refuse_others(path: Path, beginning: bytes, size: int) -> None:
    """Refuse what torch.save did not write, by its first bytes."""

    def refuse(what: str, hint: str) -> NoReturn:
        raise UnsupportedError(f"{path}: {what}", hint=hint)

    if beginning.startswith(LFS_POINTER):
        raise CheckpointError(f"{path}: a Git LFS pointer, and not the weights that it points to", hint=FETCH_LFS)
    if beginning[257:262] == b"ustar":
        loaded = f"torch.load({in_python(path)}, map_location='cpu', weights_only=False)"
        refuse("a tar file, as torch wrote before 2017", in_two_lines(loaded, path, of_module=False))
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") < size:
        refuse("by its content a safetensors file", "Give it a name that ends with .safetensors.")
    if not (len(beginning) > 1 and beginning[0] == 0x80 and 2 <= beginning[1] <= 5):
        # What it begins with would tell what the file holds, which may be another's.
        raise CheckpointError(
            f"{path}: torch.save did not write it, by its first bytes",
            hint="The file is damaged, or holds no weights of torch: copy or download it again.",
        )
    if _MAGIC not in beginning[:32]:
        with suppress(PickleError):
            read_pickle(beginning, 0, _Hooks())  # which finds what is harmful, if it comes soon
        loaded = f"pickle.load(open({in_python(path)}, 'rb'))"
        refuse(
            "pickled, but not by torch.save: its tensors cannot be read one by one",
            in_two_lines(loaded, path, imports="pickle, torch", of_module=False),
        )


def _read(fd: int, at: int, nbytes: int) -> bytes:
    raw = bytearray(nbytes)
    return bytes(raw[: read_into(fd, memoryview(raw), at)])


# --- ways out ---


def in_python(path: Path) -> str:
    """A path, as Python has it."""
    return json.dumps(printable(str(path)), ensure_ascii=False)


def in_two_lines(loaded: str, path: Path, *, imports: str = "torch", of_module: bool = True) -> str:
    """How to get a state dict out of a file that has to be loaded, which runs code.

    Args:
        loaded: an expression of Python that loads it.
        path: the file.
        imports: the modules that it takes.
        of_module: whether what is loaded is known to be a module.
    """
    state = "model.state_dict()" if of_module else "getattr(model, 'state_dict', lambda: model)()"
    return (
        "Save its state dict, where the code that made it can be imported. That runs what the file says: do it only if "
        "you trust it.\n"
        f"    import {imports}; model = {loaded}\n"
        f"    torch.save({state}, {_beside(path)})"
    )


def of_torchscript(path: Path) -> str:
    """How to get a state dict of a TorchScript program."""
    return (
        "Save its state dict:\n"
        f"    import torch; model = torch.jit.load({in_python(path)}, map_location='cpu')\n"
        f"    torch.save(model.state_dict(), {_beside(path)})"
    )


def written_again(path: Path) -> str:
    """How to have torch write a file again, as it writes files now."""
    return (
        "Have torch write it again:\n"
        f"    import torch; found = torch.load({in_python(path)}, map_location='cpu', weights_only=True)\n"
        f"    torch.save(found, {_beside(path)})"
    )


def _beside(path: Path) -> str:
    return in_python(path.with_name(f"{path.stem}-state.pt"))
