"""The plan of an output that is an adapter: what each of its tensors is made of, to the byte, once ranks are known.

Ranks are known from headers, where adapters are scaled or merged; of a whole fine-tune, or where a share of the update
says the rank, they are measured first (`needs`). Nothing here reads tensor data or needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lines_cli.checkpoint.header import StoredTensor, TensorInfo, itemsize
from lines_cli.checkpoint.reader import FileState, views_of
from lines_cli.checkpoint.sidecars import Sidecar
from lines_cli.plan.coefficients import known, layer_coefficients, outside_coefficients, scale_at
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.layout import OutputFile
from lines_cli.plan.plan import Plan
from lines_cli.plan.resources import BytesPerEntry, Resources
from lines_cli.plan.tensors import Segment, SourceRange
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap, Place
from lines_cli.scaling.schedule import Rules
from lines_cli.storage.uploads import memory_on_the_way
from lines_cli.storage.views import Views

Role = Literal["A", "B", "bias"]


class Term(NamedTuple):
    """What one adapter adds to a module: `scale * B @ A`, and `scale * bias` to what that gives.

    Attributes:
        a, b, bias: where its factors are: `A` [r, in, ...] and `B` [out, r, ...].
        scale: the adapter's own, its share in the sum, and the coefficient, multiplied.
    """

    a: StoredTensor
    b: StoredTensor
    bias: StoredTensor | None
    scale: float


@dataclass(frozen=True)
class Product:
    """A sum of products: the factors of several adapters side by side, or of fewer ranks."""

    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Difference:
    """What a fine-tune changed of a matrix: `scale * (ft - base)`.

    Attributes:
        base, ft: where both are.
        shape: of the weight; of a convolution [out, in, ...].
        transposed: whether it is stored [in, out].
        scale: its share and the coefficient, multiplied.
    """

    base: SourceRange
    ft: SourceRange
    shape: tuple[int, ...]
    transposed: bool
    scale: float

    @property
    def matrix(self) -> tuple[int, int]:
        """As it is stored, taken as a matrix."""
        return self.shape[0], math.prod(self.shape[1:])


@dataclass(frozen=True)
class AdapterModule:
    """A module that the output changes.

    Attributes:
        name: as PEFT calls it.
        tensor: the base's name of the weight that it changes; where no base is known, the module's.
        place: its stack and layer; None outside the blocks.
        coefficient: of its update, in float64.
        rank: of its factors; an upper bound as long as it is to be measured.
        side: the smaller side of the weight taken as a matrix, beyond which no rank is of use.
        made: what its factors are made of; None where they are an adapter's, scaled.
        reduced: whether ranks are fewer than what they are made of has.
        shapes: of its factors but for the rank: how `A` and `B` go on behind it, and before it.
        dtype: of its factors.
        names: of its tensors in the file, by their roles.
        matrices: how many there are in its weight, each with a product of that rank: more than 1 of fused experts.
        of_parameter: whether it is a parameter that is said by its own name (`target_parameters`).
    """

    name: str
    tensor: str
    place: Place | None
    coefficient: float
    rank: int
    side: int
    made: Product | Difference | None = None
    reduced: bool = False
    shapes: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    dtype: str = "F32"
    names: Mapping[Role, str] = field(default_factory=dict)
    matrices: int = 1
    of_parameter: bool = False

    @property
    def tensors(self) -> Iterable[tuple[Role, str, tuple[int, ...]]]:
        """Its tensors: role, name and shape."""
        out, *kernel = self.shapes[1]
        shapes: dict[Role, tuple[int, ...]] = {
            "A": (self.matrices * self.rank, *self.shapes[0]),
            "B": (out, self.matrices * self.rank, *kernel),
            "bias": (out,),
        }
        return [(role, name, shapes[role]) for role, name in self.names.items()]


class Part(NamedTuple):
    """A term of a sum of entries."""

    source: SourceRange
    factor: float


@dataclass(frozen=True)
class Entries:
    """A tensor made entry by entry: `base + sum(factor_i * (part_i - base))`; without a base the sum of the parts, each
    times its factor.
    """

    parts: tuple[Part, ...]
    base: SourceRange | None = None

    @property
    def sources(self) -> tuple[SourceRange, ...]:
        """Everything that is read for it."""
        return (*((self.base,) if self.base is not None else ()), *(part.source for part in self.parts))


class FactorOf(NamedTuple):
    """A tensor that is one of a module's factors (`AdapterPlan.modules`)."""

    module: int
    role: Role


class AdapterTensor(NamedTuple):
    """One tensor of the output.

    Attributes:
        name: its own.
        file: the output file; there is one.
        info: dtype, shape, offset, bytes.
        made: what makes it.
    """

    name: str
    file: int
    info: TensorInfo
    made: Entries | FactorOf

    @property
    def in_float64(self) -> bool:
        """What its arithmetic runs in."""
        return True

    @property
    def segments(self) -> tuple[Segment, ...]:
        """All of it, as one run of entries."""
        return (Segment(0, self.info.numel),)


@dataclass(frozen=True)
class Rest:
    """A tensor of a fine-tune that is not taken apart into factors.

    Attributes:
        name: its name there.
        saved_as: its name in the output, if it can be stored whole.
        module: that it belongs to.
        of_target: whether that is one that is taken apart, whose bias this is.
        entries: what makes it.
        ft: where the fine-tune has it, with the base's to compare it with, if that has it, too.
        why: why it is no matrix to take apart, in words.
        copies: modules that share it in the model, and are stored beside it: PEFT gives each its own.
        dtype, shape: as it is stored.
    """

    name: str
    saved_as: str | None
    module: str
    of_target: bool
    entries: Entries
    ft: SourceRange
    base: SourceRange | None
    why: str
    dtype: str
    shape: tuple[int, ...]
    copies: tuple[str, ...] = ()


class Found(NamedTuple):
    """What was measured of a module, or of a tensor of the rest.

    Attributes:
        rank: that a module gets; 0 leaves it out.
        norm: the squared norm of the update; None where it is not known.
    """

    rank: int
    norm: float | None


@dataclass(frozen=True)
class AdapterPlan:
    """Everything about an output that is an adapter but for the numbers in its tensors.

    Attributes:
        recipe: what was asked.
        inputs: the base, if one is known, and the models: adapters by their own names, or one fine-tune.
        paths: every file that is read.
        output: the destination, a folder.
        how: `scaled` in place, `merged`, or `extracted`.
        configs: a digest of the configs of all adapters: they decide its bytes, too.
        like: the config of an adapter that the output's is made after, or as much as is known of one.
        targets: what names the modules in the config; None finds it (`targets_of`) among all modules (`every`), as far
            as these are known.
        bias, lora_bias: which biases of the base it holds; whether updates have one.
        saved: modules that are stored whole, by their names.
        modules: what is changed.
        rest: of a fine-tune, what is not taken apart.
        entries: tensors that are made entry by entry: name -> dtype, shape, what makes it.
        needs: whether ranks are to be measured; until then they are upper bounds.
        found: what was measured, by module and by tensor.
        outputs, tensors, sidecars: what is written; bounds as long as ranks are.
        depth, rules: what decided the coefficients.
        notes: what a person should know.
    """

    recipe: Recipe
    inputs: Inputs
    paths: tuple[Path, ...]
    output: Path
    how: Literal["scaled", "merged", "extracted"]
    depth: DepthMap
    rules: Rules
    configs: str = ""
    like: Mapping[str, Any] = field(default_factory=dict)
    targets: Mapping[str, Any] | None = None
    every: frozenset[str] | None = None
    bias: str = "none"
    lora_bias: bool = False
    saved: tuple[str, ...] = ()
    modules: tuple[AdapterModule, ...] = ()
    rest: tuple[Rest, ...] = ()
    entries: Mapping[str, tuple[str, tuple[int, ...], Entries]] = field(default_factory=dict)
    needs: bool = False
    found: Mapping[str, Found] = field(default_factory=dict)
    outputs: tuple[OutputFile, ...] = ()
    tensors: tuple[AdapterTensor, ...] = ()
    sidecars: tuple[Sidecar, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def of_peft(self) -> bool:
        """Whether it is written as PEFT has it, with a config; else as kohya's scripts have it, without."""
        return self.how == "extracted" or bool(self.like)

    @property
    def measures(self) -> bool:
        """Whether ranks are, or were, measured."""
        return self.needs or bool(self.found)

    @property
    def read_paths(self) -> tuple[Path, ...]:
        """Everything that the output must not replace."""
        return (*(checkpoint.path for checkpoint in self.inputs.checkpoints), *self.paths)

    @property
    def names(self) -> frozenset[str]:
        """Every file that is written, by its name relative to the destination."""
        return frozenset((*(file.name for file in self.outputs), *(sidecar.name for sidecar in self.sidecars)))

    @property
    def views(self) -> list[Views]:
        """The views in each of `paths`."""
        return views_of(self.inputs.checkpoints)

    @property
    def states(self) -> tuple[FileState, ...]:
        """The state that each of `paths` was in when it was planned with."""
        return tuple(state for checkpoint in self.inputs.checkpoints for state in checkpoint.states)

    @property
    def bytes_written(self) -> int:
        """Bytes of the weight file."""
        return sum(file.nbytes for file in self.outputs)

    @cached_property
    def bytes_read(self) -> int:
        """Bytes of tensor data that are read to write it, of each module once."""
        total = 0
        for tensor in self.tensors:
            if isinstance(tensor.made, Entries):
                total += tensor.info.numel * sum(itemsize(source.dtype) for source in tensor.made.sources)
        for module in self.modules:
            if isinstance(module.made, Product):
                stored = (part for term in module.made.terms for part in term[:3] if isinstance(part, StoredTensor))
                total += sum(part.info.nbytes for part in stored)
            elif isinstance(module.made, Difference):
                made = module.made
                total += math.prod(made.shape) * (itemsize(made.base.dtype) + itemsize(made.ft.dtype))
        return total

    @property
    def passes(self) -> tuple[str, ...]:
        """What is measured while the destination is written: nothing."""
        return ()

    @property
    def per_entry(self) -> BytesPerEntry:
        """What one entry takes of a worker's buffers."""
        return BytesPerEntry(8, 8, 8, 2, 2)

    def whole_bytes(self, workers: int) -> int:
        """Bytes that modules take at most while they are made, each worker one."""
        return sum(sorted((_space_of(module) for module in self.modules), reverse=True)[:workers])

    def peak_memory(self, resources: Resources) -> int:
        """About how much resident memory a run takes at most, in bytes, on the CPU."""
        buffers = resources.threads * resources.chunk_for(self.per_entry) * self.per_entry.nbytes()
        own = _PYTHON_WITH_TORCH + buffers + self.whole_bytes(resources.threads)
        return own + memory_on_the_way(self.output, [file.nbytes for file in self.outputs])

    def coefficients(self) -> list[tuple[str, list[float]]]:
        """Each stack's name, and the coefficient of each of its layers (filters apart)."""
        return layer_coefficients(self.recipe, self.rules, self.depth)

    def outside(self) -> tuple[float, float]:
        """The coefficients outside the blocks, before and behind them (filters apart)."""
        return outside_coefficients(self.recipe, self.rules)

    def filters(self) -> list[tuple[str, float]]:
        """The patterns that fix coefficients, and the coefficient of each."""
        scale = scale_at(self.recipe, 0.0)
        return [(pattern, scale * value) for pattern, value in self.rules.filters]

    def summary(self) -> dict[str, Any]:
        """The plan as plain values that JSON can hold (docs/json.md describes them)."""
        of_stack: dict[str | None, int] = {}
        for module in self.modules:
            stack = module.place.stack if module.place else None
            of_stack[stack] = of_stack.get(stack, 0) + 1
        return {
            "output": str(self.output),
            "files": [file.name for file in self.outputs],
            "recipe": self.recipe.model_dump(mode="json", exclude_none=True),
            "how": self.how,
            "models": [{"model": source.model} for source in self.recipe.merged],
            "stacks": [
                {
                    "name": name,
                    "layers": len(values),
                    "first": known(values[0]),
                    "last": known(values[-1]),
                    "coefficients": [known(value) for value in values],
                    "modules": of_stack.get(name, 0),
                }
                for name, values in self.coefficients()
            ],
            "outside": {
                **dict(zip(("first", "last"), map(known, self.outside()), strict=True)),
                "modules": of_stack.get(None, 0),
            },
            "filters": [{"pattern": pattern, "coefficient": value} for pattern, value in self.filters()],
            "rank": [min(ranks), max(ranks)] if (ranks := [module.rank for module in self.modules]) else None,
            "saved": list(self.saved),
            "bytes": {"read": self.bytes_read, "written": self.bytes_written},
            "notes": list(self.notes),
        }


AnyPlan = Plan | AdapterPlan


def _space_of(module: AdapterModule) -> int:
    """Bytes that making a module takes, in float64."""
    if isinstance(module.made, Difference):
        rows, columns = module.made.matrix
        held = rows * columns if rows < columns else 0
        block = 2 * min(rows * columns, max(ROWS, columns))
        return 8 * (held + block + 5 * min(rows, columns) ** 2 + 3 * module.rank * (rows + columns))
    if isinstance(module.made, Product):
        factors = sum(
            part.info.numel for term in module.made.terms for part in term[:3] if isinstance(part, StoredTensor)
        )
        return 8 * (4 if module.reduced else 2) * factors
    return 0


ROWS = 4 * 2**20
"""Entries of a difference that are held at a time, where it has more rows than columns."""
_PYTHON_WITH_TORCH = 250_000_000
