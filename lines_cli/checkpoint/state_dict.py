"""Which part of what `torch.save` wrote the weights are, and where each of them lies.

Trainers save a dict of many things: the weights under one name or another (`state_dict`, `model`, `module`, `ema`),
averages of them, the state of an optimizer, an epoch. A state dict is known by what it holds, not by its name: tensors
of floats under names. Where several are there, the user says which one is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from lines_cli.checkpoint.header import FLOAT8_DTYPES, FLOAT_DTYPES, TensorInfo
from lines_cli.checkpoint.pickles import Made
from lines_cli.checkpoint.torch_file import (
    DTYPES,
    Odd,
    Storage,
    Tensor,
    TorchFile,
    in_python,
    in_two_lines,
    opened_torch_file,
)
from lines_cli.errors import CheckpointError, UnsupportedError, as_argument, printable, some
from lines_cli.storage.views import View

# Under these names lies no model, whatever there is in them. What they begin with may stand before it.
_STATE_OF_TRAINING = re.compile(
    r"(?i)(?<![a-z])(?:optim|sched|lr_|scaler|grad_scal|rng|callback|loops?$|criterion|loss|metric|meter|hparams"
    r"|hyper_?param|param_groups$|args$|config|cfg$|amp$)"
)
_DEEPEST = 6
_MOST_LOOKED_AT = 200_000  # containers


@dataclass(frozen=True)
class StateDict:
    """The weights in a file.

    Attributes:
        tensors: each by name. The offset of a view is its number in `views`.
        views: those whose entries do not stand in order.
        digest: of all that was read.
        notes: where the weights were, and what else is there.
    """

    tensors: dict[str, TensorInfo]
    views: dict[int, View]
    digest: str
    notes: tuple[str, ...]


class _Found(NamedTuple):
    """A dict of tensors, and the keys on the way to it."""

    keys: tuple[str, ...]
    items: Mapping[Any, Any]

    @property
    def called(self) -> str:
        return ".".join(self.keys)

    @property
    def tensors(self) -> int:
        return sum(isinstance(value, Tensor | Odd) for value in self.items.values())


def read_state_dict(path: Path, part: str | None = None, *, called: str | None = None) -> StateDict:
    """Find the weights in a file that `torch.save` wrote; their entries are not read, and nothing is run.

    Args:
        path: the file.
        part: which of several state dicts: the keys that lead to it, with dots between them.
        called: what is given to name a part of it, `called#part`; its path unless given.

    Raises:
        CheckpointError: the file cannot be read; or it holds several state dicts, or none of that name.
        UnsupportedError: it holds something else than weights, or weights of a kind that is not read.
    """
    called = called or str(path)
    with opened_torch_file(path) as file:
        value: Any = file.value
        keys: tuple[str, ...] = ()
        if part is not None:
            value, keys = _at(value, part) or _refuse_part(called, value, part)
        found = _state_dicts(value, keys)
        if not found:
            _refuse_none(path, value, keys, called)
        if len(found) > 1:
            raise CheckpointError(
                f"{called} holds {len(found)} state dicts, and it is not clear which one is meant:\n{_listed(found)}",
                hint=f"Name one behind it, in a recipe, too: {as_argument(f'{called}#{found[0].called}')}",
            )
        return _placed(file, found[0])


def _listed(found: Sequence[_Found]) -> str:
    return some([f"{one.called} ({one.tensors:,} tensor{'s' if one.tensors != 1 else ''})" for one in found])


def _at(value: Any, part: str) -> tuple[Any, tuple[str, ...]] | None:
    """What lies under keys with dots between them, and the keys, which may have dots themselves."""
    items = _items(value)
    if part in items:
        return items[part], (part,)
    for dot in (match.start() for match in re.finditer(r"\.", part)):
        if part[:dot] in items and (inner := _at(items[part[:dot]], part[dot + 1 :])):
            return inner[0], (part[:dot], *inner[1])
    return None


def _items(value: Any) -> Mapping[Any, Any]:
    """What a container holds, by key; of a list by number."""
    if isinstance(value, dict):
        return value
    if isinstance(value, Made):
        return value.items
    if isinstance(value, list) or type(value) is tuple:
        return {str(number): inner for number, inner in enumerate(value[:_LONGEST_LIST])}
    return {}


_LONGEST_LIST = 64


def _state_dicts(value: Any, keys: tuple[str, ...] = (), *, everything: bool = False) -> list[_Found]:
    """The state dicts in what was saved. Of a dict that holds tensors and state dicts, the one counts that has more
    tensors: a mean beside a model is no model, and what a layer keeps beside its weights is none, either. What belongs
    to training is looked for with `everything` alone.
    """
    seen: set[int] = set()

    def below(value: Any, keys: tuple[str, ...]) -> Iterator[_Found]:
        items = _items(value)
        if id(value) in seen or len(seen) > _MOST_LOOKED_AT or len(keys) > _DEEPEST or "param_groups" in items:
            return
        seen.add(id(value))
        own = _Found(keys, items)
        inner = [
            found
            for key, there in items.items()
            if isinstance(key, str) and _items(there) and (everything or not _STATE_OF_TRAINING.search(key))
            for found in below(there, (*keys, key))
        ]
        if any(isinstance(key, str) and _is_weight(there) for key, there in items.items()):
            inner = [found for found in inner if found.tensors > own.tensors] or [own]
        yield from inner

    return list(below(value, keys))


def _is_weight(value: Any) -> bool:
    """Whether it could be one of a model's: floats, more than one of them; or of a kind that is not read."""
    if isinstance(value, Tensor):
        return bool(value.shape) and DTYPES.get(value.dtype) not in _NOT_WEIGHTS
    return isinstance(value, Odd)


_NOT_WEIGHTS = frozenset(DTYPES.values()) - FLOAT_DTYPES - FLOAT8_DTYPES


def _placed(file: TorchFile, found: _Found) -> StateDict:
    """Where the weights lie, if what stands among them is plain: numbers, text, settings."""
    tensors: dict[str, TensorInfo] = {}
    views: dict[int, View] = {}
    others: list[str] = []
    end, seen = file.nbytes, set[int]()
    numbers: dict[View, int] = {}
    for name, value in found.items.items():
        if isinstance(value, Tensor):
            _refuse_name(file.path, name)
            info, view = file.place(name, value)
            if view is not None and view not in numbers:
                numbers[view], views[end] = end, view
                end += info.nbytes
            if view is not None:
                info = info._replace(offset=numbers[view])
            tensors[name] = info
        elif what := _unlike_plain(value, seen):
            raise UnsupportedError(f"{file.path}: {printable(str(name))} is {what}", hint=_MAKE_PLAIN)
        else:
            others.append(str(name))
    file.refuse_overlaps()
    return StateDict(tensors, views, file.digest, tuple(_notes(file, found, others)))


_MAKE_PLAIN = (
    "Make a plain tensor of it with torch (to_dense, dequantize, full_tensor, resolve_conj, from_numpy), and save the "
    "state dict again."
)


def _refuse_name(path: Path, name: Any) -> None:
    """Refuse a tensor that safetensors could not hold by its name."""
    if not isinstance(name, str):
        raise UnsupportedError(f"{path}: a tensor is stored under {name!r}, which is no text", hint=_RENAME)
    if name == "__metadata__" or any("\ud800" <= character <= "\udfff" for character in name):
        raise UnsupportedError(f"{path}: a tensor is called {name!r}, which safetensors does not allow", hint=_RENAME)


_RENAME = "Give it another name with torch, and save the state dict again."


def _unlike_plain(value: Any, seen: set[int]) -> str | None:
    """What something in a state dict is that must not be left out, for it may be a weight; None of what is plain.
    `seen` are the containers that were looked at before.
    """
    if isinstance(value, Odd):
        return value.what
    if isinstance(value, Storage):
        return "a storage, without a shape"
    if isinstance(value, Made) and _has_a_tensor(value, seen):
        return f"an object of {printable(str(value.of))}, with tensors in it"
    return None


def _has_a_tensor(value: Any, seen: set[int]) -> bool:
    """Whether there is a tensor in what an object was to be made of; or too much for one to tell."""
    found = [value]
    while found:
        inner = found.pop()
        if isinstance(inner, Tensor | Odd | Storage):
            return True
        if id(inner) in seen or not (isinstance(inner, Made | dict | list) or type(inner) is tuple):
            continue
        if len(seen) > _MOST_LOOKED_AT:
            return True
        seen.add(id(inner))
        if isinstance(inner, Made):
            found += (inner.arguments, inner.state, inner.items)
        else:
            found += inner.values() if isinstance(inner, dict) else inner
    return False


def _notes(file: TorchFile, found: _Found, others: Sequence[str]) -> Iterator[str]:
    """Where the weights were found, and what is left out."""
    if found.keys:
        beside = [str(key) for key in _items(file.value) if key != found.keys[0]]
        yield f"{file.path}: the weights are those under {_quoted(found.called)}" + (
            f"; left out: {_named(beside)}" if beside else ""
        )
    if others:
        number = f"{len(others):,} entries that are no tensors" if len(others) > 1 else "an entry that is no tensor"
        yield f"{file.path}: left out {number}: {_named(others)}"


def _named(names: Sequence[str]) -> str:
    shown = ", ".join(map(_quoted, names[:_SHOWN]))
    return shown + (f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else "")


_SHOWN = 6


def _quoted(name: str) -> str:
    return repr(printable(name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."))


_LONGEST_NAME = 200


def _refuse_part(called: str, value: Any, part: str) -> NoReturn:
    """Say what there is, where there is nothing under the keys that were given."""
    found = _state_dicts(value) or _state_dicts(value, everything=True)
    there = f"; it holds these state dicts:\n{_listed(found)}" if any(one.keys for one in found) else ""
    if found and not there:
        there = f": it is one state dict, of {found[0].tensors:,} tensors"
    raise CheckpointError(
        f"{called}: nothing in it is called {_quoted(part)}{there}",
        hint="Give one of these names behind the #." if any(one.keys for one in found) else f"Give {called} alone.",
    )


def _refuse_none(path: Path, value: Any, keys: tuple[str, ...], called: str) -> NoReturn:
    """Say what there is instead of a state dict.

    Raises:
        CheckpointError: state dicts that belong to training.
        UnsupportedError: a module, or something without weights.
    """
    for key, inner in (((), value), *(((key,), inner) for key, inner in _items(value).items())):
        if isinstance(inner, Made) and _has_a_tensor(inner, set()):
            way = "".join(f"[{key!r}]" for key in (*keys, *key))
            where = f", under {_quoted('.'.join(map(str, (*keys, *key))))}" if way else ""
            loaded = f"torch.load({in_python(path)}, map_location='cpu', weights_only=False){way}"
            module = isinstance(inner.state, dict) and "_modules" in inner.state
            raise UnsupportedError(
                f"{path} holds no state dict, but a whole pickled {'module' if module else 'object'}, of "
                f"{printable(str(inner.of))}{where}: to load that is to run code",
                hint=in_two_lines(loaded, path, of_module=module),
            )
    if others := _state_dicts(value, keys, everything=True):
        raise CheckpointError(
            f"{called} holds no weights but such as belong to training, by their names:\n{_listed(others)}",
            hint=f"If they are a model's all the same: {as_argument(f'{called}#{others[0].called}')}",
        )
    what = f"an object of {printable(str(value.of))}" if isinstance(value, Made) else _plainly(value)
    raise UnsupportedError(
        f"{path} holds no weights, but {what}",
        hint="Give the file with the model's state dict: tensors under their names.",
    )


def _plainly(value: Any) -> str:
    if isinstance(value, Tensor | Odd):
        return "one tensor, without a name"
    items = _items(value)
    if "param_groups" in items:
        return "the state of an optimizer"
    return f"a {type(value).__name__} of {_named(list(map(str, items)))}" if items else f"{type(value).__name__} alone"
