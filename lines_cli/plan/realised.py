"""What rounding left of the coefficients that were asked: the realised coefficient of layers and stacks. Plain values.

    realised = <out - base, tau> / <tau, tau>

with `tau` the task vector (of a merge the merged one, before rounding), in float64 over what the files hold. It is what
one would find who compares the output with the base: the multiple of `tau` that fits `out - base` best.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lines_cli.checkpoint.header import EXACT_DTYPES
from lines_cli.errors import printable
from lines_cli.plan.plan import Plan, TensorPlan


@dataclass(frozen=True, slots=True)
class Realised:
    """Sums over entries that were computed. Two of them add up.

    Attributes:
        product: `<out - base, tau>`.
        squares: `<tau, tau>`.
        changed: how many entries of the output differ from the base's.
        entries: of how many.
    """

    product: float = 0.0
    squares: float = 0.0
    changed: int = 0
    entries: int = 0

    def __add__(self, other: Realised) -> Realised:
        return Realised(
            self.product + other.product,
            self.squares + other.squares,
            self.changed + other.changed,
            self.entries + other.entries,
        )

    @classmethod
    def of(cls, json: Mapping[str, Any]) -> Realised:
        """What a journal has of it.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        found = cls(float(json["product"]), float(json["squares"]), json["changed"], json["entries"])
        if type(found.changed) is not int or type(found.entries) is not int:
            raise ValueError(json)
        return found

    @property
    def coefficient(self) -> float | None:
        """What was realised; None where there is no task vector, or nothing was computed."""
        return self.product / self.squares if self.squares > 0 else None

    @property
    def share_changed(self) -> float | None:
        """The share of entries that changed; None where nothing was computed."""
        return self.changed / self.entries if self.entries else None


NOTHING_REALISED = Realised()


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that were asked to have one coefficient for one reason.

    Attributes:
        stack, index: of a layer, else None.
        outside: of what lies outside the blocks: `before` or `after` them; else None.
        filter: of tensors whose coefficient a filter fixes: its pattern; else None.
        coefficient: what was asked, in float64.
    """

    stack: str | None
    index: int | None
    outside: str | None
    filter: str | None
    coefficient: float


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of a plan, and which one a tensor belongs to.

    Attributes:
        groups: layers in order, stack by stack; then what lies before and behind the blocks; then filters.
        of: tensor -> a number into `groups`; one whose coefficient is its own alone is in none.
        cast: those with a tensor that is no plain copy of any input's.
    """

    groups: tuple[Group, ...]
    of: Mapping[str, int]
    cast: frozenset[int]


def groups_of(plan: Plan) -> Groups:
    """The groups of a plan whose coefficients are known; none without a base, as there is no task vector."""
    if not plan.inputs.has_base:
        return Groups((), {}, frozenset())
    groups = [
        Group(stack, index, None, None, value)
        for stack, values in plan.coefficients()
        for index, value in enumerate(values)
    ]
    groups += [
        Group(None, None, side, None, value) for side, value in zip(("before", "after"), plan.outside(), strict=True)
    ]
    groups += [Group(None, None, None, pattern, value) for pattern, value in plan.filters()]
    numbers = {(group.stack, group.index, group.outside, group.filter): number for number, group in enumerate(groups)}
    of: dict[str, int] = {}
    cast = set[int]()
    for tensor in plan.tensors:
        if not tensor.spec.paired or tensor.info.dtype in EXACT_DTYPES:
            continue
        number = numbers[_key(plan, tensor)]
        if groups[number].coefficient == tensor.coefficient:
            of[tensor.name] = number
            if any(segment.copy is None or segment.copy.dtype != tensor.info.dtype for segment in tensor.segments):
                cast.add(number)
    return Groups(tuple(groups), of, frozenset(cast))


def _key(plan: Plan, tensor: TensorPlan) -> tuple[str | None, int | None, str | None, str | None]:
    if tensor.spec.filter is not None:
        return None, None, None, tensor.spec.filter
    if tensor.place is not None:
        return tensor.place.stack, tensor.place.index, None, None
    return None, None, plan.depth.side_of(tensor.spec.counts_as), None


class Row(NamedTuple):
    """A group with what became of it.

    Attributes:
        group: which.
        realised: the realised coefficient: of copies what was asked, 0 or 1; None where there is nothing to realise.
        changed: the share of entries that are not the base's; None where that was not seen.
        sums: what they rest on.
    """

    group: Group
    realised: float | None
    changed: float | None
    sums: Realised

    @property
    def is_off(self) -> bool:
        """Whether more than `_FAR` or a tenth of what was asked is missing, or too much."""
        if self.realised is None:
            return False
        off, asked = abs(self.realised - self.group.coefficient), abs(self.group.coefficient)
        return off > _FAR or (off > asked / 10 and asked > 0)


_FAR = 0.05


def rows_of(groups: Groups, sums: Mapping[int, Realised]) -> tuple[Row, ...]:
    """What became of each group that has a tensor.

    Args:
        groups: of a plan.
        sums: by the group's number.
    """
    rows = []
    for number in sorted(set(groups.of.values())):
        group, found = groups.groups[number], sums.get(number, NOTHING_REALISED)
        if found.entries:
            rows.append(Row(group, found.coefficient, found.share_changed, found))
        else:  # nothing was computed: all are copies, which only coefficients of 0 and 1 give
            copied = float(round(group.coefficient))
            rows.append(Row(group, copied, 0.0 if copied == 0 and number not in groups.cast else None, found))
    return tuple(rows)


def layers_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The layers, as JSON has them."""
    return [
        {
            "stack": row.group.stack,
            "index": row.group.index,
            "coefficient": row.group.coefficient,
            "realised": row.realised,
            "changed": row.changed,
        }
        for row in rows
        if row.group.stack is not None
    ]


def record_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The layers as an output's recipe records them, in four decimals."""
    return [
        {
            key: round(value, 4) if isinstance(value, float) and key != "coefficient" else value
            for key, value in layer.items()
        }
        for layer in layers_of(rows)
    ]


def warning_of(plan: Plan, rows: Sequence[Row]) -> str | None:
    """Where rounding undid the scaling, why, and the way out; None where it did not."""
    off = [row for row in rows if row.is_off]
    if not off:
        return None
    worst = max(off, key=lambda row: abs((row.realised or 0.0) - row.group.coefficient))
    more = f" ({len(off) - 1:,} more are off, too)" if len(off) > 1 else ""
    stored = plan.dtype
    dtype, wider = stored, "float64" if stored in ("float32", "float64") else "float32"
    option = "--" if plan.inputs.of_an_edit else ""
    equals = " " if option else ": "
    what = (
        f"rounding to {dtype} undid part of the scaling: {_called(worst.group)} has {worst.realised:.3g} where "
        f"{worst.group.coefficient:.3g} was asked{more}"
    )
    if plan.recipe.rounding == "stochastic":
        return (
            f"{what}. The draw averages out over many entries only. {option}dtype{equals}{wider} holds what is asked."
        )
    return (
        f"{what}. Updates of about one unit in the last place are lost, or kept whole. "
        f"{option}rounding{equals}stochastic keeps the scale on average; {option}dtype{equals}{wider} keeps it, in "
        "twice the bytes."
    )


def _called(group: Group) -> str:
    if group.stack is not None:
        return f"layer {group.index}" + (f" of {printable(group.stack)}" if group.stack else "")
    if group.filter is not None:
        return f"what {printable(group.filter)} names"
    return f"what lies {group.outside} the blocks"


def total(rows: Sequence[Row]) -> dict[str, float | None]:
    """What was asked and what was realised of several groups, as JSON has it: over the entries that were computed, each
    weighted by its squared task vector; and the share of them that changed. Where nothing was computed it is what the
    groups have in common, if they do.
    """
    found = sum((row.sums for row in rows), NOTHING_REALISED)
    if found.squares > 0:
        asked = sum(row.group.coefficient * row.sums.squares for row in rows) / found.squares
        return {"asked": asked, "realised": found.coefficient, "changed": found.share_changed}
    same = {(row.group.coefficient, row.realised, row.changed) for row in rows}
    return dict(zip(("asked", "realised", "changed"), same.pop() if len(same) == 1 else (None,) * 3, strict=True))
