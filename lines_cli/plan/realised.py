"""What rounding left of the coefficients that were asked: the realised coefficient of layers and stacks. Plain values.

    realised = <out - base, tau> / <tau, tau>

with `tau` the task vector (of a merge the merged one, before rounding), in float64 over what the files hold. It is what
one would find who compares the output with the base: the multiple of `tau` that fits `out - base` best. Of large
tensors in blocks a part is looked at while an output is written (`engine.realised.every_for`).
"""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lines_cli.checkpoint.header import EXACT_DTYPES
from lines_cli.errors import printable
from lines_cli.plan.plan import Plan, TensorPlan
from lines_cli.plan.tensors import STORED


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

    def times(self, number: int) -> Realised:
        """The same for so many times the entries."""
        return Realised(self.product * number, self.squares * number, self.changed * number, self.entries * number)

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
        """What was realised; None where there is no task vector, nothing was computed, or float64 cannot hold it."""
        if not 0 < self.squares < math.inf:
            return None
        found = self.product / self.squares
        return found if math.isfinite(found) else None

    @property
    def share_changed(self) -> float | None:
        """The share of entries that changed; None where nothing was computed."""
        return self.changed / self.entries if self.entries else None


NOTHING_REALISED = Realised()


@dataclass(frozen=True, slots=True)
class Lost:
    """Sums over entries that were stored in 8 bits. Two of them add up.

    Attributes:
        error: the squared distance of what is stored from what it should be.
        squares: the square of that.
    """

    error: float = 0.0
    squares: float = 0.0

    def __add__(self, other: Lost) -> Lost:
        return Lost(self.error + other.error, self.squares + other.squares)

    @classmethod
    def of(cls, json: Mapping[str, Any]) -> Lost:
        """What a journal has of it.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        return cls(float(json["error"]), float(json["squares"]))

    @property
    def relative(self) -> float | None:
        """The root of the mean squared error, relative to that of the entries; None where there are none."""
        return math.sqrt(self.error / self.squares) if 0 < self.squares < math.inf else None


NOTHING_LOST = Lost()


@dataclass(frozen=True, slots=True)
class Forecast:
    """What rounding would leave of an update, before anything is written. Two of them add up.

    Attributes:
        realised: the sums, for the coefficient that is planned.
        units: how large the whole update is in units in the last place of the output dtype: of how many numbers that it
            holds an entry moved. A bin of those sizes (`unit_bin`) -> how many entries.
    """

    realised: Realised = NOTHING_REALISED
    units: Mapping[int, int] = field(default_factory=dict)

    def __add__(self, other: Forecast) -> Forecast:
        units = dict(self.units)
        for bin_, entries in other.units.items():
            units[bin_] = units.get(bin_, 0) + entries
        return Forecast(self.realised + other.realised, units)

    def share(self, size: int) -> float | None:
        """The share of entries whose update has a size below 16."""
        entries = sum(self.units.values())
        return self.units.get(unit_bin(size), 0) / entries if entries else None

    @property
    def median(self) -> float | None:
        """The median size: exact below 16, above within an eighth."""
        entries, seen = sum(self.units.values()), 0
        for bin_ in sorted(self.units):
            seen += self.units[bin_]
            if 2 * seen >= entries:
                low, end = unit_sizes(bin_)
                return float(low) if end - low <= 1 else (low + end) / 2
        return None


UNIT_BITS = 20  # of a float32, which a bin leaves out: 3 of its fraction remain, so eight bins to an octave


def unit_bin(size: int) -> int:
    """The bin of an update of so many units: 0 of none, then one for each up to 15."""
    bits = int.from_bytes(struct.pack("<f", size), "little")
    return max(0, (bits >> UNIT_BITS) - BIN_OF_ONE + 1)


def unit_sizes(bin_: int) -> tuple[float, float]:
    """The sizes in a bin: from the first up to, and without, the second."""
    if bin_ == 0:
        return 0.0, 1.0
    codes = ((bin_ - 1 + at + BIN_OF_ONE) << UNIT_BITS for at in (0, 1))
    low, end = (struct.unpack("<f", struct.pack("<I", code))[0] for code in codes)
    return low, end


BIN_OF_ONE = 0x3F800000 >> UNIT_BITS


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that were asked to have one coefficient for one reason.

    Attributes:
        stack, index: of a layer, else None.
        outside: of what lies outside the blocks: `before` or `after` them; else None.
        filter: of tensors whose coefficient a filter fixes: its pattern; else None.
        coefficient: what was asked, in float64.
        component: of what lies outside the blocks of one of several models that has rules of its own; else None.
    """

    stack: str | None
    index: int | None
    outside: str | None
    filter: str | None
    coefficient: float
    component: str | None = None


@dataclass(frozen=True, slots=True)
class Groups:
    """All groups of a plan, and which one a tensor belongs to.

    Attributes:
        groups: layers in order, stack by stack; then what lies before and behind the blocks; then filters.
        of: tensor -> a number into `groups`; one whose coefficient is its own alone is in none.
        cast: those with a tensor that is no plain copy of any input's.
        measured: those with a tensor that is computed, or that is a copy of which the base is read; or of which is
            known that no model changes it.
    """

    groups: tuple[Group, ...]
    of: Mapping[str, int]
    cast: frozenset[int]
    measured: frozenset[int]


def groups_of(plan: Plan) -> Groups:
    """The groups of a plan whose coefficients are known; none without a base, as there is no task vector."""
    if not plan.inputs.has_base:
        return Groups((), {}, frozenset(), frozenset())
    groups = [
        Group(stack, index, None, None, value)
        for stack, values in plan.coefficients()
        for index, value in enumerate(values)
    ]
    groups += [
        Group(None, None, side, None, value, component)
        for component in (None, *plan.rules.components)
        for side, value in zip(("before", "after"), plan.outside(component), strict=True)
    ]
    groups += [Group(None, None, None, pattern, value) for pattern, value in plan.filters()]
    numbers = {(g.stack, g.index, g.outside, g.filter, g.component): number for number, g in enumerate(groups)}
    of: dict[str, int] = {}
    cast, measured = set[int](), set[int]()
    for tensor in plan.tensors:
        if not tensor.spec.paired or tensor.info.dtype in EXACT_DTYPES:
            continue
        number = numbers[_key(plan, tensor)]
        if groups[number].coefficient == tensor.coefficient:
            of[tensor.name] = number
            if number not in cast and any(
                segment.copy is None or segment.copy.dtype != tensor.info.dtype for segment in tensor.segments
            ):
                cast.add(number)
            if number not in measured and (
                any(segment.numel and (segment.copy is None or segment.base is not None) for segment in tensor.segments)
                or tensor.spec.is_the_base_s
            ):
                measured.add(number)
    return Groups(tuple(groups), of, frozenset(cast), frozenset(measured))


def _key(plan: Plan, tensor: TensorPlan) -> tuple[str | None, int | None, str | None, str | None, str | None]:
    if tensor.spec.filter is not None:
        return None, None, None, tensor.spec.filter, None
    if tensor.place is not None:
        return tensor.place.stack, tensor.place.index, None, None, None
    component = plan.depth.component_of(tensor.name)
    own = component if component in plan.rules.components else None
    return None, None, plan.depth.side_of(tensor.spec.counts_as), None, own


class Row(NamedTuple):
    """A group with what became of it.

    Attributes:
        group: which.
        realised: the realised coefficient: of copies what was asked, 0 or 1; None where there is nothing to realise, or
            nothing that is finite.
        changed: the share of entries that are not the base's; None where that was not seen.
        sums: what they rest on.
        lost: what storing weights in 8 bits lost of them.
    """

    group: Group
    realised: float | None
    changed: float | None
    sums: Realised
    lost: Lost = NOTHING_LOST

    @property
    def is_off(self) -> bool:
        """Whether it is far from what was asked."""
        return is_off(self.group.coefficient, self.realised)


def is_off(asked: float, realised: float | None) -> bool:
    """Whether a realised coefficient is further than 0.05, or than a tenth of what was asked, from that."""
    if realised is None:
        return False
    off = abs(realised - asked)
    return off > _FAR or (off > abs(asked) / 10 and asked != 0)


_FAR = 0.05


def rows_of(groups: Groups, sums: Mapping[int, Realised], lost: Mapping[int, Lost]) -> tuple[Row, ...]:
    """What became of each group that has a tensor.

    Args:
        groups: of a plan.
        sums: by the group's number.
        lost: the same, of weights in 8 bits.
    """
    rows = []
    for number in sorted(set(groups.of.values())):
        group, found = groups.groups[number], sums.get(number, NOTHING_REALISED)
        in_8_bits = lost.get(number, NOTHING_LOST)
        if found.entries or number in groups.measured:
            rows.append(Row(group, found.coefficient, found.share_changed, found, in_8_bits))
        else:  # all are copies, which only coefficients of 0 and 1 give
            copied = float(round(group.coefficient))
            changed = 0.0 if copied == 0 and number not in groups.cast else None
            rows.append(Row(group, copied, changed, found, in_8_bits))
    return tuple(rows)


def layers_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The layers, as JSON has them; with what was lost in 8 bits, if any weight was rounded to them."""
    rows = list(rows)
    in_8_bits = any(row.lost.relative is not None for row in rows)
    return [
        {
            "stack": row.group.stack,
            "index": row.group.index,
            "coefficient": row.group.coefficient,
            "realised": row.realised,
            "changed": row.changed,
            **({"error": row.lost.relative} if in_8_bits else {}),
        }
        for row in rows
        if row.group.stack is not None
    ]


def record_of(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """The layers as an output's recipe records them, in four decimals; none where there are so many that the recipe
    would be slow to read, or too large.
    """
    layers = layers_of(rows)
    if len(layers) > MOST_RECORDED:
        return []
    return [
        {
            key: round(value, 4) if isinstance(value, float) and key != "coefficient" else value
            for key, value in layer.items()
            if key != "error"
        }
        for layer in layers
    ]


MOST_RECORDED = 2_000  # layers; ten thousand would be more values than a recipe may have


def warning_of(plan: Plan, rows: Sequence[Row]) -> str | None:
    """Where rounding distorted the scaling, why, and the way out; None where it did not."""
    off = [row for row in rows if row.is_off]
    if not off:
        return None
    worst = max(off, key=lambda row: abs((row.realised or 0.0) - row.group.coefficient))
    groups = groups_of(plan)
    number, entries = groups.groups.index(worst.group), Counter[tuple[str, bool]]()
    for tensor in plan.tensors:
        if groups.of.get(tensor.name) == number:
            entries[tensor.info.dtype, tensor.in_float64] += tensor.info.numel
    (stored, in_float64), _ = entries.most_common(1)[0]
    dtype = next((name for name, known in STORED.items() if known == stored), "fp8")
    drawn = plan.recipe.rounding == "stochastic"
    what = (
        f"{'stochastic ' if drawn else ''}rounding to {dtype} {'missed' if drawn else 'distorted'} the scaling: "
        f"{_called(worst.group)} has {worst.realised:.3g} where {worst.group.coefficient:.3g} was asked"
        f"{and_more(len(off) - 1, 'coefficient')}"
    )
    return f"{what}. {way_out(dtype, in_float64=in_float64, edit=plan.inputs.of_an_edit, drawn=drawn)}"


def and_more(others: int, what: str) -> str:
    """How many others are off, as the end of a sentence about the worst."""
    if others == 0:
        return ""
    return f", and {others:,} other {what}{' is' if others == 1 else 's are'} off"


def way_out(dtype: str, *, in_float64: bool, edit: bool, drawn: bool, command: str = "") -> str:
    """Why rounding distorted the scaling, and what helps.

    Args:
        dtype: of the output.
        in_float64: whether the arithmetic ran in float64, else in float32.
        edit: whether to say it as options, or as keys of a recipe.
        drawn: whether it was rounded stochastically.
        command: what has the options, if it is not the one that says this.
    """
    lost = "Updates of about one unit in the last place are lost, or kept whole"
    arithmetic = "float64" if in_float64 else "float32"
    if dtype in (arithmetic, "float64"):
        return f"{lost}. The arithmetic itself runs in {arithmetic}, so no option changes that."
    if dtype == "fp8":
        option = "--dtype bfloat16" if edit else "dtype: bfloat16"
        return f"An entry in 8 bits moves only if it is moved far: {option} holds what is asked, in twice the bytes."
    wider = "float64" if dtype == "float32" else "float32"
    option, equals, ends = ("--", " ", "") if edit else ("'", ": ", "'")
    widest = f"{option}dtype{equals}{wider}{ends}"
    if drawn:
        return (
            "Draws average out over many entries, but here few entries hold most of the update. "
            f"{widest} holds what is asked, in twice the bytes."
        )
    return (
        f"{lost}. {command}{option}rounding{equals}stochastic{ends} keeps the scale on average; {widest} keeps it, in "
        "twice the bytes."
    )


def _called(group: Group) -> str:
    if group.stack is not None:
        return f"layer {group.index}" + (f" of {printable(group.stack)}" if group.stack else "")
    if group.filter is not None:
        return f"what {printable(group.filter)} names"
    of = f" of {printable(group.component)}" if group.component is not None else ""
    return f"what lies {'before' if group.outside == 'before' else 'behind'} the blocks{of}"


def total(rows: Sequence[Row]) -> dict[str, float | None]:
    """What was asked and what was realised of several groups, as JSON has it: over the entries that were computed, each
    weighted by its squared task vector; and the share of them that changed. Where nothing was computed it is what the
    groups have in common, if they do.
    """
    found = sum((row.sums for row in rows), NOTHING_REALISED)
    if found.coefficient is not None:
        asked = sum(row.group.coefficient * row.sums.squares for row in rows) / found.squares
        return {"asked": asked, "realised": found.coefficient, "changed": found.share_changed}
    same = {(row.group.coefficient, row.realised, row.changed) for row in rows}
    return dict(zip(("asked", "realised", "changed"), same.pop() if len(same) == 1 else (None,) * 3, strict=True))
