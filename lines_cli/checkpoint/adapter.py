"""Adapters: read by their config and their header; what they change, module by module.

An adapter holds small factors of which a product changes a weight. On a base it is a checkpoint like any other
(`plan/adapted`). Nothing here needs torch, and of tensor data only single numbers are read, by which kohya's files
scale.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.adapter_config import AdapterConfig, by_component, checked_config, shortened
from lines_cli.checkpoint.adapter_names import NO_COMPONENT, PREFIX, SAVED, Component, Part, component_of, parts_of
from lines_cli.checkpoint.contents import is_adapter
from lines_cli.checkpoint.header import FLOAT_DTYPES, Known, StoredTensor, itemsize, parse_header, read_header
from lines_cli.checkpoint.reader import (
    ADAPTER_CONFIG,
    ADAPTERS,
    Checkpoint,
    Heads,
    choose_weights,
    is_index,
    open_checkpoint,
)
from lines_cli.errors import CheckpointError, UnsupportedError, printable, some
from lines_cli.storage.beside import beside, read_object
from lines_cli.storage.files import open_regular, read_into
from lines_cli.storage.object_store import placed_at
from lines_cli.storage.views import FileWithViews

CONFIG = ADAPTER_CONFIG
WEIGHTS = ADAPTERS[0]
_SUFFIX = ".safetensors"
_METADATA = "lora_adapter_metadata"  # where diffusers keeps the configs of an adapter's components


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor of its base.

    Attributes:
        module: the module that holds the tensor, as the adapter calls it, without PEFT's prefix and without the
            component of a pipeline that it is in.
        parameter: the tensor's name in that module: `weight`, `bias`.
        kind: `low rank`; `rescaled` (DoRA), `hadamard` (LoHa), `kronecker` (LoKr), `difference` (a tensor that is
            added); `rows` (of an embedding, replaced); or `whole` for a tensor that the adapter holds itself.
        factors: by their roles (`checkpoint.formulas`).
        rank: of the product; None where it has none.
        scale: multiplies the product.
        transposed: whether the product is to be transposed first (an embedding's; not what `fan_in_fan_out` says).
        component: the part of a pipeline that the module is in, if the adapter says one.
        rows: which rows are replaced.
        others: of a parameter that is one of several of its module, each of which has a product: all that it may be,
            with the rank and the scale that each would have. Which it is, its shape tells.
        expected: whether the adapter's config says that a whole tensor belongs to it.
    """

    module: str
    parameter: str
    kind: str
    factors: Mapping[str, StoredTensor]
    rank: int | None = None
    scale: float = 1.0
    transposed: bool = False
    component: Component = NO_COMPONENT
    rows: tuple[int, ...] = ()
    others: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    expected: bool = True

    @property
    def name(self) -> str:
        """The tensor's name, as the adapter has it."""
        return f"{self.called}.{self.parameter}"

    @property
    def called(self) -> str:
        """The module's name with its component."""
        if not self.component.name:
            return self.module
        return f"{self.component.name}{'_' if self.component.flat else '.'}{self.module}"


@dataclass(frozen=True)
class Adapter:
    """An adapter, read by its config and its header.

    Attributes:
        checkpoint: its file and folder; its tensors by their own names.
        config: `adapter_config.json`; empty where there is none.
        changes: what it does, module by module.
        notes: what a person should know of how it was read.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    changes: tuple[Change, ...]
    notes: tuple[str, ...] = ()

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


def adapter_at(path: Path, known: Known | None = None) -> Path | None:
    """The file of weights of the adapter at `path`, a folder or a file; None where that is none, or is more than that:
    an adapter beside whole weights.
    """
    if os.path.isdir(path):
        try:
            names = os.listdir(path)
        except OSError:  # which whoever opens it will say
            return None
        chosen = choose_weights(names)
        if chosen is None:
            return next((path / name for name in ADAPTERS if name in names), None)
        path /= chosen
    if is_index(path.name) or not os.path.isfile(path):
        return None
    if path.name in ADAPTERS:
        return path
    return path if path.name.endswith(_SUFFIX) and is_adapter(read_header(path, known).tensors) else None


def is_adapter_by(heads: Heads, called: str) -> bool:
    """Whether weights that are elsewhere are an adapter, by their headers; `called` is what messages call them."""
    (name, (nbytes, raw)), *others = heads.files.items()
    return not others and is_adapter(parse_header(placed_at(called) / name, raw, nbytes).tensors)


def is_adapter_at(path: Path) -> bool:
    """Whether a path is an adapter's folder or file."""
    return adapter_at(path) is not None


def open_adapter(path: Path, *, name: str | None = None, hub_id: str | None = None) -> Adapter:
    """Open the adapter at `path`: its config and its header, no data.

    Args:
        path: the folder, or its file of weights.
        name: what messages call it; its path unless given.
        hub_id: where on the Hub it came from, if it did.

    Raises:
        CheckpointError: it is missing or malformed, or its config and its tensors disagree.
        UnsupportedError: it is of a kind that cannot be folded in.
    """
    weights = adapter_at(path) or path
    checkpoint = open_checkpoint(weights, name=name or str(path), hub_id=hub_id, to_look_at=True)
    checkpoint = replace(checkpoint, path=path, stem="adapter_model")
    config_path = beside(weights.parent, CONFIG)
    config = read_object(config_path) if config_path is not None else {}
    reading = _Reading(checkpoint, config, config_path)
    changes = tuple(reading.changes())
    if not changes:
        raise CheckpointError(f"{weights}: it has no tensor that changes a base, so it changes nothing", hint=_DAMAGED)
    reading.refuse_missing(changes)
    reading.refuse_not_targeted(changes)
    return Adapter(reading.checkpoint, config, changes, tuple(reading.notes))


_TARGETING = ("target_modules", "layers_to_transform", "layers_pattern", "exclude_modules")

Factors = dict[tuple[str, str], StoredTensor]
"""The tensors of a module, by parameter and role."""


class _Reading:
    """The changes that an adapter's tensors come to.

    Args:
        checkpoint: its weights.
        config: `adapter_config.json`, parsed; empty where there is none.
        config_path: where that is.
    """

    def __init__(self, checkpoint: Checkpoint, config: Mapping[str, Any], config_path: Path | None) -> None:
        self.checkpoint, self.file = checkpoint, checkpoint.files[0]
        self.config = checked_config(config, str(config_path)) if config_path is not None else None
        self.of_component = {} if self.config else _configs_in(checkpoint.metadata, self.file)
        self.notes: list[str] = [*(self.config.notes if self.config else ()), *checkpoint.notes]
        self.tensors = {tensor: stored.info for tensor, stored in checkpoint.tensors.items()}
        self.modules: dict[tuple[str, int], Factors] = defaultdict(dict)
        self.plain_names: set[tuple[str, int]] = set()  # of modules whose factors others than PEFT call so
        self.twice: set[tuple[str, int]] = set()  # of modules whose product PEFT adds twice
        self._read()

    def _read(self) -> None:
        parts = self._without_copies(list(parts_of(self.tensors, str(self.file))))
        adapters = dict.fromkeys(part.adapter for _, part in parts if part.adapter is not None)
        if len(adapters) > 1:
            raise UnsupportedError(
                f"{self.file} holds several adapters:\n{some(list(adapters))}",
                hint="Save them one by one (peft: save_pretrained with selected_adapters).",
            )
        ignored: list[str] = []
        for tensor, part in parts:
            if part.role == "ignored":
                ignored.append(tensor)
                continue
            self._refuse_stray(tensor, part)
            key = part.module, part.depth if part.role != "whole" else 0
            role = part.role if part.role != "whole" or not part.depth else "underneath"
            found = self.modules[key]
            if (part.parameter, role) in found:
                raise CheckpointError(
                    f"{self.file}: two tensors are the {part.role} of {printable(part.module)}, one of them "
                    f"{printable(tensor)}",
                    hint=_DAMAGED,
                )
            found[part.parameter, role] = StoredTensor(0, self.tensors[tensor])
            if part.twice:
                self.twice.add(key)
            if not part.of_peft and part.role != "whole":
                self.plain_names.add(key)
        if ignored:
            self.notes.append(
                f"{self.file}: {len(ignored):,} tensor(s) that PEFT keeps of training are not read, such as "
                f"{printable(ignored[0])}"
            )

    def _without_copies(self, parts: Sequence[tuple[str, Part]]) -> list[tuple[str, Part]]:
        """Leave out copies of whole tensors: where PEFT saves embeddings (of a grown vocabulary, say) that are in
        `modules_to_save`, they are there under two names, of which it loads the plain one.
        """
        plain = {
            (part.module, part.parameter): self.tensors[tensor].shape
            for tensor, part in parts
            if part.role == "whole" and not part.depth and SAVED not in tensor
        }
        copies = {
            tensor
            for tensor, part in parts
            if part.role == "whole"
            and SAVED in tensor
            and plain.get((part.module, part.parameter)) == self.tensors[tensor].shape
        }
        if copies:
            tensors = {name: stored for name, stored in self.checkpoint.tensors.items() if name not in copies}
            self.checkpoint = replace(self.checkpoint, tensors=tensors)
        return [(tensor, part) for tensor, part in parts if tensor not in copies]

    def _refuse_stray(self, tensor: str, part: Part) -> None:
        info = self.tensors[tensor]
        if part.role == "whole":
            if self.config is None and not tensor.startswith(PREFIX):
                raise UnsupportedError(
                    f"{self.file}: tensor {printable(tensor)} is no factor that is known, and there is no {CONFIG} "
                    "that says what it is",
                    hint="Give the adapter's folder, with its config.",
                )
            if not part.module:
                raise CheckpointError(f"{self.file}: tensor {printable(tensor)} belongs to no module", hint=_DAMAGED)
        elif not part.module:
            raise CheckpointError(f"{self.file}: tensor {printable(tensor)} belongs to no module", hint=_DAMAGED)
        elif info.dtype not in FLOAT_DTYPES and part.role != "alpha":
            raise UnsupportedError(
                f"{self.file}: tensor {printable(tensor)} is {info.dtype}, not a float that is computed with",
                hint="Save the adapter in float32, float16 or bfloat16.",
            )

    def changes(self) -> Iterator[Change]:
        """What each module's tensors come to; of a tensor first what it is, then what is added.

        Raises:
            CheckpointError: a factor is missing, or a rank is not what the config says.
        """
        for (module, depth), factors in self.modules.items():
            yield from self._wholes(module, factors)
            products = {key: stored for key, stored in factors.items() if key[1] not in ("whole", "underneath")}
            if products:
                yield from self._products(module, depth, products)

    def refuse_not_targeted(self, changes: Iterable[Change]) -> None:
        """Refuse factors of modules that the config does not name: PEFT loads none of them.

        Raises:
            CheckpointError: names the modules, and what the config says.
        """
        adapted = [one for one in changes if one.kind not in ("whole", "rows") and not one.others]
        for config in [self.config] if self.config else self.of_component.values():
            whose = {
                (change.called if self.config else change.module): change.called
                for change in adapted
                if self._config_of(change.called) is config
            }
            left = config.not_targeted(whose)
            if left:
                said = {key: config.said[key] for key in _TARGETING if config.said.get(key)}
                raise CheckpointError(
                    f"{self.file} has factors of {len(left):,} modules that {config.where} does not name, of "
                    f"{len(whose):,} in all:\n{some([printable(whose[module]) for module in left])}\nit says "
                    f"{', '.join(f'{key}: {shortened(value)}' for key, value in said.items())}",
                    hint="PEFT would load none of these factors. If they were trained, name their modules in "
                    "target_modules, in a copy of the config; else take them out of a copy of the file.",
                )

    def refuse_missing(self, changes: Iterable[Change]) -> None:
        """Refuse an adapter without what its config names: rows of embeddings, and modules that are saved whole. Of
        these one suffices: PEFT names several for the heads of classifiers, of which a model has one.

        Raises:
            CheckpointError: says what is missing.
        """
        if self.config is None:
            return
        by_name = self.config.tokens if isinstance(self.config.tokens, Mapping) else {"": self.config.tokens}
        there = [f".{change.called}" for change in changes if change.kind == "rows"]
        rows = {name for name in by_name if any(module.endswith(f".{name}" if name else "") for module in there)}
        kept = [by_name[name] for name in rows]  # of a head that is tied those of its embedding
        lacking = [name for name, tokens in by_name.items() if tokens and name not in rows and tokens not in kept]
        saved = self.config.saved_modules
        if lacking:
            of = f" of {', '.join(map(printable, lacking))}" if lacking != [""] else ""
            key = "token_indices" if self.config.kind == "TRAINABLE_TOKENS" else "trainable_token_indices"
            said, missing = key, f"no rows{of} that are replaced"
        elif saved and not any(change.kind == "whole" and change.expected for change in changes):
            said, missing = "modules_to_save", f"no tensor of {', '.join(map(printable, saved))}"
        else:
            return
        raise CheckpointError(f"{self.file} has {missing}, and {self.config.where} names them: {said}", hint=_DAMAGED)

    def _wholes(self, module: str, factors: Factors) -> Iterator[Change]:
        component, own = component_of(module)
        for (parameter, role), stored in factors.items():
            if role in ("whole", "underneath"):
                named = self.config is not None and _is_named(module, self.config.saved_modules)
                yield Change(own, parameter, "whole", {"whole": stored}, component=component, expected=named)

    def _products(self, module: str, depth: int, factors: Factors) -> Iterator[Change]:
        of_weight = {role: stored for (parameter, role), stored in factors.items() if parameter == "weight"}
        of_bias = {role: stored for (parameter, role), stored in factors.items() if parameter == "bias"}
        alpha = of_weight.pop("alpha", None)
        roles = frozenset(of_weight)
        component, own = component_of(module)
        if "rows" in roles:
            yield self._rows(module, of_weight)
            return
        for parameter, tensors in (("weight", of_weight), ("bias", of_bias)):
            if "D" in tensors:
                yield Change(own, parameter, "difference", {"D": tensors.pop("D")}, component=component)
        if not of_weight and not of_bias:
            if alpha is not None and len(factors) == 1:
                raise CheckpointError(f"{self.file}: {printable(module)} has an alpha, and no factors", hint=_DAMAGED)
            return
        kind, found, rank = self._kind(module, of_weight)
        if kind == "kronecker" and self.config is None and not {"w1_a", "w2_a"} & found.keys():
            scale = 1.0  # LyCORIS leaves its alpha out of account where nothing has a rank
        else:
            others = self._others(module, depth, found) if kind == "low rank" else {}
            if others:
                parameter = next(iter(others))
                rank, scale = others[parameter]
                yield Change(own, parameter, kind, found, rank, scale, component=component, others=others)
                return
            rank, scale = self._scale(module, depth, rank, alpha, found)
            scale *= 2 if (module, depth) in self.twice else 1
        yield Change(own, "weight", kind, found, rank, scale, "EA" in roles, component)
        self._check_bias(module, bool(of_bias), kind)
        if "B" in of_bias:
            yield Change(own, "bias", "difference", {"D": of_bias["B"]}, scale=scale, component=component)

    def _rows(self, module: str, factors: Mapping[str, StoredTensor]) -> Change:
        """Rows of an embedding that are replaced."""
        component, own = component_of(module)
        stored, numbers = factors["rows"], self.config.tokens_of(module) if self.config else None
        if len(factors) > 1:
            raise CheckpointError(
                f"{self.file}: {printable(module)} has rows that are replaced, and factors, too", hint=_DAMAGED
            )
        if numbers is None:
            raise CheckpointError(
                f"{self.file}: {printable(module)} has rows that are replaced, and no {CONFIG} says which",
                hint="Give the adapter's folder, with its config.",
            )
        if stored.info.shape[:1] != (len(numbers),):
            raise CheckpointError(
                f"{self.file}: {printable(module)} has {list(stored.info.shape)} for rows that are replaced, and "
                f"{self._where(module)} names {len(numbers):,} of them",
                hint=_DAMAGED,
            )
        return Change(own, "weight", "rows", {"rows": stored}, component=component, rows=numbers)

    def _kind(
        self, module: str, factors: Mapping[str, StoredTensor]
    ) -> tuple[str, dict[str, StoredTensor], int | None]:
        """What a module's factors are together: its kind, they by their roles in the formula, and the rank that their
        shapes have (of a batch of matrices that of all together).
        """
        roles = factors.keys()
        config = self._config_of(module)
        if any(role.startswith("hada_") for role in roles):
            self._refuse_kind(module, config, "LOHA")
            return "hadamard", *self._hadamard(module, factors)
        if any(role.startswith("lokr_") for role in roles):
            self._refuse_kind(module, config, "LOKR")
            return "kronecker", *self._kronecker(module, factors)
        self._refuse_kind(module, config, "LORA")
        prefix = "E" if {"EA", "EB"} & roles else ""
        called = "lora_embedding_" if prefix else "lora_"
        self._refuse_lacking(module, factors, {f"{prefix}A": f"{called}A", f"{prefix}B": f"{called}B"})
        self._refuse_others(module, roles - {f"{prefix}A", f"{prefix}B", "m", "mid"})
        found = {"A": factors[f"{prefix}A"], "B": factors[f"{prefix}B"]}
        a, b = (found[role].info.shape for role in "AB")
        if min(len(a), len(b)) < 2 or math.prod(b[2:]) != 1 or a[0] != b[1] or not math.prod(a) or not math.prod(b):
            raise CheckpointError(
                f"{self.file}: {printable(module)} has factors of {list(a)} and {list(b)}, which have no product",
                hint="Factors that are empty or have one side are of a run whose parts were not gathered before it was "
                "saved (DeepSpeed, FSDP)."
                if 0 in (*a, *b) or min(len(a), len(b)) < 2
                else _DAMAGED,
            )
        if "mid" in factors:
            found["mid"] = factors["mid"]
            if factors["mid"].info.shape[:2] != (a[0], a[0]) or math.prod(a[2:]) != 1:
                raise CheckpointError(
                    f"{self.file}: {printable(module)} has a factor of {list(factors['mid'].info.shape)} between those "
                    f"of {list(a)} and {list(b)}, which have no product with it",
                    hint=_DAMAGED,
                )
        if config is not None and config.rescales != ("m" in factors):
            has = "a lora_magnitude_vector" if "m" in factors else "no lora_magnitude_vector"
            raise CheckpointError(
                f"{self.file}: {printable(module)} has {has}, and {config.where} says "
                f"use_dora: {str(config.rescales).lower()}",
                hint=_DAMAGED,
            )
        if "m" not in factors:
            return "low rank", found, a[0]
        found["m"] = factors["m"]
        return "rescaled", found, a[0]

    def _hadamard(self, module: str, factors: Mapping[str, StoredTensor]) -> tuple[dict[str, StoredTensor], int]:
        wanted = {f"hada_w{n}_{half}": f"{half}{n}" for n in "12" for half in "ab"}
        self._refuse_lacking(module, factors, {role: role for role in wanted})
        kernels = {f"hada_t{n}": f"t{n}" for n in "12"}
        if kernels.keys() & factors.keys():
            self._refuse_lacking(module, factors, {role: role for role in kernels})
            wanted |= kernels
        self._refuse_others(module, factors.keys() - wanted.keys())
        found = {short: factors[role] for role, short in wanted.items()}
        shapes = {role: stored.info.shape for role, stored in found.items()}
        rank = shapes["b1"][0]
        turned = "t1" in found
        fits = all(
            len(shapes[f"a{n}"]) == len(shapes[f"b{n}"]) == 2
            and shapes[f"b{n}"][0] == shapes[f"a{n}"][0 if turned else 1]
            and (not turned or shapes[f"t{n}"][:2] == (shapes[f"a{n}"][0], shapes[f"b{n}"][0]))
            for n in "12"
        )
        outer = {(shapes[f"a{n}"][1 if turned else 0], shapes[f"b{n}"][1]) for n in "12"}
        if not fits or len(outer) > 1 or (turned and shapes["t1"][2:] != shapes["t2"][2:]):
            self._refuse_shapes(module, shapes)
        return found, rank

    def _kronecker(
        self, module: str, factors: Mapping[str, StoredTensor]
    ) -> tuple[dict[str, StoredTensor], int | None]:
        found = {role.removeprefix("lokr_"): stored for role, stored in factors.items()}
        shapes = {role: stored.info.shape for role, stored in found.items()}
        for side in ("w1", "w2"):
            halves = {f"lokr_{side}_a": f"lokr_{side}_a", f"lokr_{side}_b": f"lokr_{side}_b"}
            if side not in found:
                self._refuse_lacking(module, factors, halves)
            elif halves.keys() & factors.keys():
                self._refuse_others(module, halves.keys() & factors.keys())
        if "t2" in found and "w2" in found:
            self._refuse_others(module, {"lokr_t2"})
        self._refuse_others(module, found.keys() - {"w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2"})
        fits = "w1" in found or shapes["w1_a"][1:] == shapes["w1_b"][:1]
        if "t2" in found:
            fits &= shapes["t2"][:2] == (shapes["w2_a"][0], shapes["w2_b"][0])
        elif "w2" not in found:
            fits &= shapes["w2_a"][1:] == shapes["w2_b"][:1]
        if not fits or any(len(shape) < 2 for shape in shapes.values()):
            self._refuse_shapes(module, shapes)
        rank = shapes["w2_b"][0] if "w2_b" in shapes else shapes["w1_b"][0] if "w1_b" in shapes else None
        return found, rank

    def _scale(
        self,
        module: str,
        depth: int,
        rank: int | None,
        alpha: StoredTensor | None,
        factors: Mapping[str, StoredTensor],
    ) -> tuple[int | None, float]:
        """The rank that a module is said to have, and what its product is multiplied by."""
        config = self._config_of(module)
        if alpha is not None:
            number = _number(self.checkpoint, module, alpha)
            return rank, number / (rank or 1)
        if config is not None:
            said = self._said_by(config).ranks[module]
            if rank is not None and rank != said:
                shapes = " and ".join(str(list(stored.info.shape)) for stored in factors.values())
                raise CheckpointError(
                    f"{self.file}: {printable(module)} has factors of {shapes}, of rank {rank:,}, and {config.where} "
                    f"says rank {said:,}",
                    hint="The config is another adapter's, or is damaged: copy or download both again.",
                )
            return said, config.scale(self._said_by(config).alphas[module], said)
        if (module, depth) in self.plain_names or component_of(module)[0].name:
            return rank, 1.0  # as diffusers and ComfyUI take it: alpha is the rank
        raise UnsupportedError(
            f"{self.file}: nothing says how it is scaled: there is no {CONFIG} beside it, and {printable(module)} has "
            "no alpha",
            hint=f"Put its {CONFIG} beside it, or give the folder that it came in.",
        )

    def _others(self, module: str, depth: int, factors: Mapping[str, StoredTensor]) -> dict[str, tuple[int, float]]:
        """The parameters of a module that a product may be of, where it is of a parameter that is said by its own name;
        each with its rank and scale. The one that it is likely of stands first.
        """
        config = self._config_of(module)
        fitting = [] if config is None else [name for name in config.parameters if _holds(module, name)]
        if config is None or not fitting:
            return {}
        names = sorted({name.rpartition(".")[2] for name in fitting}, key=_as_registered)
        keys = {name: f"{module}.{name}" for name in names}
        ranks, alphas = config.ranks(keys.values()), config.alphas(keys.values())
        rows = factors["A"].info.shape[0]
        may = {
            name: (ranks[key], config.scale(alphas[key], ranks[key]))
            for name, key in keys.items()
            if rows % ranks[key] == 0
        }
        if not may:
            raise CheckpointError(
                f"{self.file}: {printable(module)} has factors of {list(factors['A'].info.shape)} and "
                f"{list(factors['B'].info.shape)}, and {config.where} says rank {min(ranks.values()):,}",
                hint="The config is another adapter's, or is damaged: copy or download both again.",
            )
        levels = sorted((level for name, level in self.modules if name == module), reverse=True)
        at = min(
            levels.index(depth), len(may) - 1
        )  # the innermost wrapper is of the parameter that is registered first
        order = list(may)
        return {name: may[name] for name in (*order[at:], *order[:at])}

    def _check_bias(self, module: str, has: bool, kind: str) -> None:
        config = self._config_of(module)
        if config is None or kind != "low rank" or has == bool(config.said.get("lora_bias")):
            return
        said = str(bool(config.said.get("lora_bias"))).lower()
        raise CheckpointError(
            f"{self.file}: {printable(module)} has {'a' if has else 'no'} bias of lora_B, and {config.where} says "
            f"lora_bias: {said}",
            hint=_DAMAGED,
        )

    def _config_of(self, module: str) -> AdapterConfig | None:
        found = self.of_component
        return self.config or found.get(component_of(module)[0].name, found.get(""))

    def _where(self, module: str) -> str:
        config = self._config_of(module)
        return config.where if config else str(self.file)

    def _said_by(self, config: AdapterConfig) -> _Said:
        for known, said in self._said:
            if known is config:
                return said
        raise AssertionError

    @cached_property
    def _said(self) -> list[tuple[AdapterConfig, _Said]]:
        """What each config says of each module that it is of, by the names that its patterns are for."""
        found: list[tuple[AdapterConfig, _Said]] = []
        for config in [self.config] if self.config else self.of_component.values():
            names = {m: component_of(m)[1] if self.config is None else m for m, _ in self.modules}
            own = {m: name for m, name in names.items() if self._config_of(m) is config}
            ranks, alphas = config.ranks(own.values()), config.alphas(own.values())
            said = _Said({m: ranks[name] for m, name in own.items()}, {m: alphas[name] for m, name in own.items()})
            found.append((config, said))
        return found

    # --- refusals ---

    def _refuse_kind(self, module: str, config: AdapterConfig | None, kind: str) -> None:
        if config is not None and config.kind != kind:
            raise CheckpointError(
                f"{self.file}: {printable(module)} has factors of {kind}, and {config.where} says {config.kind}",
                hint=_DAMAGED,
            )

    def _refuse_lacking(self, module: str, factors: Mapping[str, StoredTensor], wanted: Mapping[str, str]) -> None:
        lacking = [called for role, called in wanted.items() if role not in factors]
        if lacking:
            having = [called for role, called in wanted.items() if role in factors]
            has = f"has {', '.join(having)}, and no" if having else "lacks"
            raise CheckpointError(f"{self.file}: {printable(module)} {has} {', '.join(lacking)}", hint=_DAMAGED)

    def _refuse_others(self, module: str, roles: Iterable[str]) -> None:
        if roles := sorted(roles):
            raise CheckpointError(
                f"{self.file}: {printable(module)} has factors that do not go together, {', '.join(roles)} among them",
                hint=_DAMAGED,
            )

    def _refuse_shapes(self, module: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        listed = ", ".join(f"{role} {list(shape)}" for role, shape in shapes.items())
        raise CheckpointError(
            f"{self.file}: {printable(module)} has factors that have no product: {listed}", hint=_DAMAGED
        )


@dataclass(frozen=True, slots=True)
class _Said:
    """What a config says of its modules."""

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]


_DAMAGED = "The adapter is incomplete or damaged: copy or download it again."
_REGISTERED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w13", "w3", "down_proj", "w2")


def _as_registered(parameter: str) -> tuple[int, str]:
    """For the order in which a module of fused experts has its parameters."""
    known = parameter.removesuffix("_bias").removesuffix("_weight")
    return (_REGISTERED.index(known) if known in _REGISTERED else len(_REGISTERED), parameter)


def _holds(module: str, parameter: str) -> bool:
    """Whether a parameter, by the end of its name, may be one of a module."""
    holder = parameter.rpartition(".")[0]
    return not holder or module == holder or module.endswith(f".{holder}")


def _is_named(module: str, names: Iterable[str]) -> bool:
    """Whether one of some names is that of a module, or of one around it, or is the end of it."""
    return any(f".{name}." in f".{module}." for name in names)


def _configs_in(metadata: Mapping[str, str], file: Path) -> dict[str, AdapterConfig]:
    """The configs of a pipeline's components that a file holds itself."""
    text = metadata.get(_METADATA)
    if text is None:
        return {}
    where = f"{file}: {_METADATA}"
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON", hint=_DAMAGED) from error
    if not isinstance(said, dict):
        raise CheckpointError(f"{where} is no mapping", hint=_DAMAGED)
    if "peft_type" in said:  # of a model that was saved by itself
        return {"": checked_config(said, where)}
    return {name: checked_config(own, f"{where}: {printable(name)}") for name, own in by_component(said).items()}


_FORMATS = {"F64": "<d", "F32": "<f", "F16": "<e"}


def _number(checkpoint: Checkpoint, module: str, stored: StoredTensor) -> float:
    """A module's alpha, which is stored as a tensor.

    Raises:
        CheckpointError: it is not one number, or not finite; or cannot be read.
    """
    file, info = checkpoint.files[0], stored.info
    if info.numel != 1:
        raise CheckpointError(f"{file}: the alpha of {printable(module)} is {list(info.shape)}, not a number")
    raw = bytearray(itemsize(info.dtype))
    try:
        fd = open_regular(file)
        try:
            views = checkpoint.views[0] if checkpoint.views else {}
            got = (
                FileWithViews(fd, views).read_into(memoryview(raw), info.offset)
                if views
                else read_into(fd, memoryview(raw), info.offset)
            )
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror or error}") from error
    if got < len(raw):
        raise CheckpointError(f"{file}: ends within the alpha of {printable(module)}", hint=_DAMAGED)
    if info.dtype == "BF16":
        number = float(struct.unpack("<f", b"\0\0" + raw)[0])
    elif info.dtype in _FORMATS:
        number = float(struct.unpack(_FORMATS[info.dtype], raw)[0])
    elif info.dtype in ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"):
        number = float(int.from_bytes(raw, "little", signed=info.dtype.startswith("I")))
    else:
        raise CheckpointError(f"{file}: the alpha of {printable(module)} is {info.dtype}, not a number")
    if not math.isfinite(number):
        raise CheckpointError(f"{file}: the alpha of {printable(module)} is {number}", hint=_DAMAGED)
    return number
