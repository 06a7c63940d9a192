"""What a merge method says about itself. Everything outside this package reads it here and knows no method by name.

A method is a plain function over tensors and one `Method` that stands below it in the same file. The registry finds
both. Nothing here loads torch: the functions use it when they are called.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from lines_cli.methods.parameters import Parameter
from lines_cli.methods.said import Remark, Said, Values
from lines_cli.methods.sparsify import Bounds, ByMagnitude, Drawn

if TYPE_CHECKING:
    from torch import Tensor

Statistic = Literal["l1", "sums", "majority"]
"""What can be measured over the inputs before anything is merged, thresholds apart."""


class CannotMergeError(ValueError):
    """Of what was measured of a tensor a method can make nothing; its `keywords` say why."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured for one tensor's merge.

    Attributes:
        bounds: for each model the magnitudes that the sparsifier asked for (`ByMagnitude`).
        majority: the sign that most elections of the whole model gave; 1 where signs are not counted.
        l1: for each model the L1 norm of this tensor's task vector, before and after entries were dropped.
        sums: over the whole tensor of what the method's `sums` gives of a run of entries.
    """

    bounds: tuple[Bounds, ...] = ()
    majority: int = 1
    l1: tuple[tuple[float, float], ...] = ()
    sums: tuple[float, ...] = ()


# --- the defaults of what a method may leave open ---


def _as_said(values: Values, _: Measured) -> Values:
    return values


def _nothing(_: Values) -> frozenset[Statistic]:
    return frozenset()


def _never(_: Values) -> bool:
    return False


def _no_sum(_values: Values, _models: int) -> None:
    return None


def _five_of_float64(shape: Sequence[int]) -> int:
    return 5 * 8 * math.prod(shape)


def _nothing_wrong(_: Values) -> None:
    return None


def _nothing_to_add(_tensors: Sequence[Tensor], _values: Values) -> Iterable[Tensor]:
    return ()


def _no_remarks(_: Said) -> Iterable[Remark]:
    return ()


_WEIGHT = "weight"

Chosen = tuple[int | None, ...]
"""Which models are merged, in which order: a number into those that a recipe lists; None is the base, unlisted."""


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method.

    Attributes:
        merge: the function: given N tensors, from which entries were dropped, and the `keywords`, it makes one of the
            same shape and dtype. It may overwrite what it is given.
        about: what it is, in a line, with its source.
        paper: that source, to be found by: an arXiv number, or empty.
        use: when to take it, in a few words, for the table in the documentation.
        takes: task vectors, which need a base; or whole weights.
        base_is_optional: whether a method of task vectors takes whole weights where a recipe names no base
            (`with_base`).
        sees: any run of a tensor's `entries` ([n]), so that tensors can be streamed; or whole `tensors` in their shape.
        streams: of a method that sees tensors: with which values any run of entries is enough after all.
        given_base: whether `merge` gets the base's entries, too, as the keyword `base`, like a task vector's.
        parameters: what its recipe may say, by name.
        models: the least and the greatest number of models; None for no bound.
        sparsifier: how entries are dropped before they are merged; None keeps all.
        needs: which statistics it needs with a tensor's values; thresholds follow from the sparsifier.
        sums: what is summed over a tensor where it needs `sums`: given what `merge` would be given, as runs of entries,
            and the tensor's values, terms of [n] each, in float64 or a mask; it overwrites nothing.
        keywords: a tensor's values, and what was measured, as keywords of `merge`.
        elect: the signs that `majority` counts: given the same as `merge`, and `waiting`, the sign of each entry ([n]),
            or the sum of these, and, if `waiting` asks for that, whether the result depends on the majority. It
            overwrites nothing.
        one_is_itself: whether with these values one model comes back as it is. Then it is copied.
        plain_sum: whether with these values the result is the sum of the task vectors, to the bit.
        shares: what each of so many task vectors is multiplied by, where with these values the result is their weighted
            sum and nothing else; None where it is not. `scale` apart. Of a method that takes whole weights: where the
            base comes out as it is.
        norm_of_kept: whether `alpha: auto` compares with the sum of what is kept of the task vectors, in place of the
            sum of whole ones.
        scale: the name of the parameter that multiplies the merged task vector, if there is one.
        choose: which models are merged, and in what order, given their names, the base's, and whether the base is
            subtracted anyway (`lines:`); None takes all, or, for task vectors, all but the base.
        wrong: why it cannot merge with a tensor's values, where they contradict each other; else None.
        review: what contradicts itself, what is worth a note, and what follows from what a recipe says.
        ignored: mergekit's parameters that are accepted and do nothing here.
        fused: whether `merge` has kernels for entries in float32 (`methods/fused`), so that a large merge loads them.
        temporaries: how many runs of its input's size `merge` needs at a time beside its input, where it sees entries.
        workspace: how many bytes it needs beside its input, given a tensor's shape, where it sees tensors.
        workspace_in_float64: the same where an input is float64, if that is more than what is computed with.
    """

    merge: Callable[..., Tensor]
    about: str
    paper: str = ""
    use: str = ""
    takes: Literal["task vectors", "weights"] = "task vectors"
    base_is_optional: bool = False
    sees: Literal["entries", "tensors"] = "entries"
    streams: Callable[[Values], bool] = _never
    given_base: bool = False
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    models: tuple[int, int | None] = (1, None)
    sparsifier: ByMagnitude | Drawn | None = None
    needs: Callable[[Values], frozenset[Statistic]] = _nothing
    sums: Callable[[Sequence[Tensor], Values], Iterable[Tensor]] = _nothing_to_add
    keywords: Callable[[Values, Measured], Values] = _as_said
    elect: Callable[..., tuple[Tensor, bool]] | None = None
    one_is_itself: Callable[[Values], bool] = _never
    plain_sum: Callable[[Values], bool] = _never
    shares: Callable[[Values, int], tuple[float, ...] | None] = _no_sum
    norm_of_kept: bool = False
    scale: str | None = None
    choose: Callable[[Sequence[str], str | None, bool], Chosen] | None = None
    wrong: Callable[[Values], str | None] = _nothing_wrong
    review: Callable[[Said], Iterable[Remark]] = _no_remarks
    ignored: frozenset[str] = frozenset({"int8_mask", "embed_slerp"})
    fused: bool = False
    temporaries: int = 5
    workspace: Callable[[Sequence[int]], int] = _five_of_float64
    workspace_in_float64: Callable[[Sequence[int]], int] | None = None

    def __post_init__(self) -> None:
        if self.sees == "tensors" and self.elect is not None:
            raise ValueError("signs are counted by entries: a method that sees whole tensors cannot elect them")
        if self.scale is not None and self.scale not in self.parameters:
            raise ValueError(f"scale: {self.scale!r} is none of the method's parameters")

    def space_for(self, shape: Sequence[int], *, in_float64: bool) -> int:
        """How many bytes it needs beside its input, where it sees tensors."""
        own = self.workspace_in_float64 if in_float64 and self.workspace_in_float64 is not None else self.workspace
        return own(shape)

    def scale_of(self, values: Values) -> float:
        """What the merged task vector is multiplied by."""
        return 1.0 if self.scale is None else float(values[self.scale])

    def sees_whole(self, values: Values) -> bool:
        """Whether with a tensor's values it has to see that whole."""
        return self.sees == "tensors" and not self.streams(values)

    def with_base(self, base: str | None) -> Method:
        """The method as it is with that base, or with none: where it is optional, it then takes whole weights, and has
        no parameter that multiplies the merged task vector.
        """
        return self if base is not None or not self.base_is_optional else _of_weights(self)

    @property
    def may_be_a_sum(self) -> bool:
        """Whether with some values the result is a weighted sum of task vectors (`shares`)."""
        return self.shares is not _no_sum

    @property
    def counts_by(self) -> str | None:
        """The parameter by which a model counts, and with 0 does not, if it has one."""
        return _WEIGHT if _WEIGHT in self.parameters and self.parameters[_WEIGHT].per_model else None

    def counting(self, values: Values, models: int) -> list[int]:
        """The numbers of the models, of so many, that count with a tensor's values."""
        weights = values[self.counts_by] if self.counts_by is not None else (1.0,) * models
        return [number for number, weight in enumerate(weights) if weight != 0]

    def chosen(self, models: Sequence[str], base: str | None, *, subtracted: bool) -> Chosen:
        """Which models are merged. A base listed among others has no task vector, and is left out."""
        if self.choose is not None:
            return self.choose(models, base, subtracted)
        every = tuple(range(len(models)))
        if self.takes == "weights":
            return every
        return tuple(number for number in every if models[number] != base) or every


_WITHOUT_BASE: dict[int, tuple[Method, Method]] = {}


def _of_weights(method: Method) -> Method:
    """The same on whole weights."""
    known = _WITHOUT_BASE.get(id(method))
    if known is None:
        left = {name: parameter for name, parameter in method.parameters.items() if name != method.scale}
        made = replace(method, takes="weights", parameters=left, scale=None, base_is_optional=False)
        known = _WITHOUT_BASE[id(method)] = method, made
    return known[1]
