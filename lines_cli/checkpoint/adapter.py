"""PEFT adapters: read by their config and their header, and put onto a base.

An adapter holds small factors of which a product changes a weight. On a base it is a checkpoint like any other: the
base's tensors, some of which are made of what the base stores and the adapter's factors (`checkpoint/formulas`).
Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.formulas import LowRank, Made
from lines_cli.checkpoint.header import FLOAT_DTYPES, StoredTensor, read_header
from lines_cli.checkpoint.reader import Checkpoint, FileState, choose_weights, views_of
from lines_cli.errors import CheckpointError, MismatchError, UnsupportedError, printable, some
from lines_cli.storage.beside import beside, read_object

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of its base.

    Attributes:
        module: the module that holds the tensor, as the adapter calls it, without PEFT's prefix.
        parameter: the tensor's name in that module: `weight`, `bias`.
        kind: `low rank`, or `whole` for a tensor that the adapter holds itself (modules_to_save).
        factors: by their roles.
        rank: of the product; None of what is whole.
        scale: multiplies the product.
        transposed: whether the product is to be transposed first (an embedding's; not what `fan_in_fan_out` says).
    """

    module: str
    parameter: str
    kind: str
    factors: Mapping[str, StoredTensor]
    rank: int | None = None
    scale: float = 1.0
    transposed: bool = False

    @property
    def name(self) -> str:
        """The tensor's name, as the adapter has it."""
        return f"{self.module}.{self.parameter}"


@dataclass(frozen=True)
class Adapter:
    """An adapter, read by its config and its header.

    Attributes:
        checkpoint: its file and folder; its tensors by their own names.
        config: `adapter_config.json`.
        changes: what it does, module by module.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    changes: tuple[Change, ...]

    @property
    def name(self) -> str:
        """As its user named it."""
        return self.checkpoint.name

    @property
    def file(self) -> Path:
        """The file with its tensors."""
        return self.checkpoint.files[0]

    @property
    def base_name(self) -> str | None:
        """The base that it was trained on, as its config names it."""
        said = self.config.get("base_model_name_or_path")
        return said if isinstance(said, str) and said else None


def is_adapter_at(path: Path) -> bool:
    """Whether a path is an adapter's folder. Beside whole weights it is no more than that."""
    if not os.path.isdir(path) or not os.path.isfile(path / WEIGHTS):
        return False
    return choose_weights(os.listdir(path)) is None


def open_adapter(path: Path, *, name: str | None = None, hub_id: str | None = None) -> Adapter:
    """Open the adapter in the folder `path`: its config and its header, no data.

    Args:
        path: the folder.
        name: what messages call it; its path unless given.
        hub_id: where on the Hub it came from, if it did.

    Raises:
        CheckpointError: it is missing or malformed, or its config and its tensors disagree.
        UnsupportedError: it is of a kind that cannot be folded in.
    """
    config_path, weights = beside(path, CONFIG), path / WEIGHTS
    if config_path is None:
        raise CheckpointError(f"{path}: no {CONFIG}, which says how an adapter is scaled")
    config = read_object(config_path)
    there = os.stat(weights)
    header = read_header(weights)
    checkpoint = Checkpoint(
        name or str(path),
        path,
        (weights,),
        {tensor: StoredTensor(0, info) for tensor, info in header.tensors.items()},
        (FileState(there.st_size, there.st_mtime_ns, header.digest),),
        "adapter_model",
        {},
        hub_id,
        header.metadata,
    )
    changes = tuple(_changes(checkpoint, config, config_path))
    return Adapter(checkpoint, config, changes)


def _changes(checkpoint: Checkpoint, config: Mapping[str, Any], path: Path) -> Iterable[Change]:
    """What each module's tensors come to.

    Raises:
        CheckpointError: a tensor is of no known kind, a factor is missing, or a rank is not what the config says.
    """
    if config.get("peft_type") != "LORA":
        raise UnsupportedError(f"{path}: peft_type {config.get('peft_type')!r} is not known")
    file = checkpoint.files[0]
    modules: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
    for tensor, stored in checkpoint.tensors.items():
        if stored.info.dtype not in FLOAT_DTYPES:
            raise UnsupportedError(f"{file}: tensor {printable(tensor)} is {stored.info.dtype}")
        module, role = _split(tensor)
        modules[module][role] = stored
    for module, factors in modules.items():
        if whole := factors.keys() & {"weight", "bias"}:
            for parameter in sorted(whole):
                yield Change(module, parameter, "whole", {"whole": factors[parameter]})
            continue
        a, b = factors.get("A"), factors.get("B")
        if a is None or b is None:
            has, lacks = ("lora_A", "lora_B") if b is None else ("lora_B", "lora_A")
            raise CheckpointError(f"{file}: {printable(module)} has {has}, and no {lacks}")
        rank = a.info.shape[0]
        said = _of_module(config.get("rank_pattern"), module, config.get("r"))
        if rank != said or b.info.shape[1] != rank:
            raise CheckpointError(
                f"{file}: {printable(module)} has factors of {list(a.info.shape)} and {list(b.info.shape)}, "
                f"and {path} says rank {said}"
            )
        alpha = _of_module(config.get("alpha_pattern"), module, config.get("lora_alpha"))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        yield Change(module, "weight", "low rank", {"A": a, "B": b}, rank, scale)


_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+?)"
    r"\.(?:lora_(?P<role>[AB])(?:\.default)?\.weight|(?:modules_to_save\.(?:default\.)?)?(?P<whole>weight|bias))",
    re.DOTALL,
)


def _split(tensor: str) -> tuple[str, str]:
    """A tensor's module, and what it is to it."""
    match = _KEY.fullmatch(tensor)
    if match is None:
        raise CheckpointError(f"tensor {printable(tensor)} belongs to no module")
    return match["module"], match["role"] or match["whole"]


def _of_module(pattern: Any, module: str, default: Any) -> Any:
    """What a pattern of the config says of a module: the first that matches the end of its name."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def on_base(adapter: Adapter, base: Checkpoint, *, name: str | None = None) -> Checkpoint:
    """The checkpoint that an adapter makes of its base.

    Args:
        adapter: which.
        base: what it is put onto.
        name: what the two are called together; unless given the base is the recipe's, and the adapter's name is
            that of both.

    Raises:
        MismatchError: the base has no tensor of a name, or one of another shape.
    """
    first = len(base.files)
    tensors, formulas = dict(base.tensors), dict(base.formulas)
    targets = _targets(adapter, base)
    for change, target in zip(adapter.changes, targets, strict=True):
        placed = {role: stored._replace(file=first + stored.file) for role, stored in change.factors.items()}
        if change.kind == "whole":
            tensors[target] = placed["whole"]
            formulas.pop(target, None)
            continue
        stored = base.tensors[target]
        transposed = change.transposed != bool(adapter.config.get("fan_in_fan_out"))
        shape = stored.info.shape
        product = (placed["B"].info.shape[0], *placed["A"].info.shape[1:])
        product = product[::-1] if transposed else product
        if product != shape:
            raise MismatchError(
                f"{adapter.file}: what it changes of {printable(target)} is {list(product)}, and {base.where(target)} "
                f"has {list(shape)}",
                hint="It was trained on another model: give the base that it belongs to.",
            )
        step = LowRank(change.module, tuple(placed.items()), shape, change.scale, transposed)
        before = base.formulas.get(target, Made(stored, ()))
        formulas[target] = Made(before.stored, (*before.steps, step))
    own = adapter.checkpoint
    return replace(
        base,
        name=name or adapter.name,
        path=own.path,
        hub_id=own.hub_id,
        files=(*base.files, *own.files),
        states=(*base.states, *own.states),
        tensors=tensors,
        formulas=formulas,
        metadata={},
        parts=(base, own),
        part=own.part,
        views=tuple(views_of((base, own))),
        base_named=name is not None,
        notes=base.notes,
    )


def _targets(adapter: Adapter, base: Checkpoint) -> Sequence[str]:
    """The base's name of each tensor that is changed."""
    names = [change.name for change in adapter.changes]
    lacking = [name for name in names if name not in base.tensors]
    if lacking:
        raise MismatchError(
            f"{adapter.file}: {len(lacking):,} of {len(names):,} tensors that it changes are not in {base.name}:\n"
            f"{some(lacking)}",
            hint="It was trained on another model: give the base that it belongs to.",
        )
    return names
