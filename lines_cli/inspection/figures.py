"""The figures of the page, as inline SVG: the same numbers as the pictures, in the page's own colours.

Every value stands in the page as text: each group of class `hit` has it as its `title`, which browsers show on hover,
and which page.js also shows by keyboard and touch. What belongs to a fine-tune or a stack says so in `data-model` or
`data-stack`, so that page.js can switch it off. The rest is CSS: page.css has the colours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from lines_cli.errors import printable
from lines_cli.inspection.series import (
    MOST_PAIRED,
    asked_and_realised,
    called,
    mean,
    of_stack,
    paired,
    short_names,
    ticked_layers,
    values_of,
    widest_cosine,
)
from lines_cli.inspection.tables import coefficient, count, number, share

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report

_WIDTH, _HEIGHT = 440.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 48.0, 12.0, 8.0, 36.0
_MOST = 1e300  # what is beyond is not drawn: sums and shares of such numbers are no numbers
_LOOKS = 8  # colours, and shapes of marks; then both come again, hollow

Say = Callable[[float | None], str]


@dataclass(frozen=True, slots=True)
class _Series:
    """What is drawn over the layers.

    Attributes:
        name: before each value.
        values: one for each layer; NaN where there is none.
        form: `line`, `dots`, `bars` or `thin` (narrower bars).
        look: its classes.
        model: the number of the fine-tune that it belongs to.
    """

    name: str
    values: Sequence[float]
    form: str
    look: str
    model: int | None = None


def figures(report: Report) -> list[str]:
    """Every figure of a report, as HTML."""
    tunes = report.get("fine_tunes", [])
    names = short_names([tune["model"] for tune in tunes])
    stacks = [stack["name"] for stack in report["stacks"]]
    drawn: list[str] = []
    for at, stack in enumerate(stacks):
        if len(tunes) > 1:
            drawn += _updates(report, at, stack, names)
        elif tunes:
            drawn.append(_before_and_after(report, at, stack))
        else:
            drawn.append(_parameters(report, at, stack))
        drawn.append(_coefficients(report, at, stack))
    if tunes and tunes[0]["kinds"]:
        drawn.append(_kinds(report, names))
    if together := report.get("together"):
        drawn += _matrices(together, names)
        drawn += [figure for at, stack in enumerate(stacks) for figure in _strips(together, at, stack, len(names))]
    return drawn


def look(model: int) -> str:
    """The classes of a fine-tune's colour, mark and dashes."""
    return f"m{model % _LOOKS} d{model // _LOOKS % 3}"


def key(model: int) -> str:
    """A short piece of a fine-tune's line, for a legend."""
    mark = f'<path class="mark" d="{_mark(model, 14, 6)}"/>'
    line = '<path class="line" d="M0 6h28"/>'
    return f'<svg class="key {look(model)}" viewBox="0 0 28 12" aria-hidden="true">{line}{mark}</svg>'


# --- over the layers ---


def _scaled_by(report: Report) -> str:
    return "LiNeS" if report["scaling"]["lines"] else "scaling"


def _updates(report: Report, at: int, stack: str, names: Sequence[str]) -> Iterable[str]:
    """Before and after, a line for each fine-tune, on one scale."""
    found = {
        key: [values_of(of_stack(tune["layers"], stack), key) for tune in report["fine_tunes"]]
        for key in ("update_norm", "scaled_norm")
    }
    most = _greatest(value for lines in found.values() for values in lines for value in values)
    for key, title in (("update_norm", "Norm of the update"), ("scaled_norm", f"The same after {_scaled_by(report)}")):
        series = [
            _Series(name, values, "line", look(model), model)
            for model, (name, values) in enumerate(zip(names, found[key], strict=True))
        ]
        yield _over_layers(title, at, stack, series, number, most=most)


def _before_and_after(report: Report, at: int, stack: str) -> str:
    layers, after = of_stack(report["fine_tunes"][0]["layers"], stack), f"after {_scaled_by(report)}"
    series = [
        _Series("before", values_of(layers, "update_norm"), "bars", "pale"),
        _Series(after, values_of(layers, "scaled_norm"), "thin", "m0"),
    ]
    return _over_layers("Norm of the update", at, stack, series, number, legend=True)


def _parameters(report: Report, at: int, stack: str) -> str:
    values = values_of(of_stack(report["layers"], stack), "parameters")
    series = [_Series("parameters", values, "bars", "m0")]
    return _over_layers("Parameters", at, stack, series, lambda value: count(value or 0))


def _coefficients(report: Report, at: int, stack: str) -> str:
    """As asked and, where that is known, as rounding leaves them."""
    layers = of_stack(report["layers"], stack)
    asked = _Series("asked", values_of(layers, "coefficient"), "line", "grey")
    known = asked_and_realised(report)
    if known is None:
        return _over_layers("Coefficients", at, stack, [asked], coefficient)
    how, found = known
    rows = {layer["index"]: layer for layer in of_stack(found, stack)}
    lists = [[rows[n][key] if n in rows else None for n in range(len(layers))] for key in ("coefficient", "realised")]
    wanted, left = ([math.nan if value is None else value for value in values] for values in lists)
    series = [_Series("asked", wanted, "line", "grey"), _Series("realised", left, "dots", "m0")]
    return _over_layers(f"Coefficients, {how}", at, stack, series, coefficient, legend=True)


def _over_layers(
    title: str,
    at: int,
    stack: str,
    series: Sequence[_Series],
    say: Say,
    *,
    most: float | None = None,
    legend: bool = False,
) -> str:
    """One figure with the layers of a stack from left to right."""
    layers = len(series[0].values)
    low = -_greatest(-value for each in series for value in each.values)
    high = _greatest(value for each in series for value in each.values) if most is None else most
    if low == high:
        high = low + 1.0
    ticks = _ticks(low, high)
    step = (_WIDTH - _LEFT - _RIGHT) / layers

    def x(layer: float) -> float:
        return _LEFT + (layer + 0.5) * step

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / ((high - low) * 1.06))

    parts = [_axes(ticks, y, [(x(layer), str(layer)) for layer in ticked_layers(layers, 7)], "layer")]
    for each in series:
        points = [(x(layer), y(value)) if _drawn(value) else None for layer, value in enumerate(each.values)]
        owner = "" if each.model is None else f' data-model="{each.model}"'
        parts.append(f'<g class="{each.look}"{owner}>{_shape(each, points, step, y(0.0))}</g>')
    for layer in range(layers):
        lines = [f"layer {layer}", *(f"{each.name}: {_said(say, each.values[layer])}" for each in series)]
        parts.append(_hit(lines, _LEFT + layer * step, _TOP, step, _HEIGHT - _TOP - _BOTTOM))
    keys = ",".join("" if each.model is None else str(each.model) for each in series)
    names = "".join(f'<span class="swatch {each.look} {each.form}">{_text(each.name)}</span>' for each in series)
    return _figure(f"{title}: {called(stack)}", "".join(parts), _HEIGHT, keys, stack=at, legend=names if legend else "")


def _shape(series: _Series, points: Sequence[tuple[float, float] | None], step: float, zero: float) -> str:
    """A line with marks, dots or bars."""
    known = [(at, *point) for at, point in enumerate(points) if point is not None]
    if series.form in ("bars", "thin"):
        wide = min(step, 60.0) * (0.84 if series.form == "bars" else 0.46)
        bars = "".join(f"M{_n(x - wide / 2)} {_n(zero)}V{_n(y)}h{_n(wide)}V{_n(zero)}z" for _, x, y in known)
        return f'<path class="bar" d="{bars}"/>'
    if series.form == "dots":
        return f'<path class="mark" d="{"".join(_mark(0, x, y) for _, x, y in known)}"/>'
    ends = {at for at, _, _ in known}
    line = "".join(f"{'L' if at - 1 in ends else 'M'}{_n(x)} {_n(y)}" for at, x, y in known)
    if series.model is None:
        alone = [(x, y) for at, x, y in known if not {at - 1, at + 1} & ends]
        marks = "".join(f"M{_n(x - 8)} {_n(y)}h16" for x, y in alone)
        return f'<path class="line" d="{line}{marks}"/>'
    every = max(1, len(points) // 10)
    shown = [(x, y) for at, x, y in known if at % every == 0 or not {at - 1, at + 1} & ends]
    marks = "".join(_mark(series.model, x, y) for x, y in shown)
    return f'<path class="line" d="{line}"/><path class="mark" d="{marks}"/>'


def _mark(model: int, x: float, y: float) -> str:
    """The mark of a fine-tune about a point: eight shapes in turn."""
    start, path = _MARKS[model % _LOOKS]
    return f"M{_n(x + start[0])} {_n(y + start[1])}{path}"


_MARKS: tuple[tuple[tuple[float, float], str], ...] = (
    ((-3, 0), "a3 3 0 1 0 6 0a3 3 0 1 0-6 0z"),
    ((-2.7, -2.7), "h5.4v5.4h-5.4z"),
    ((0, -3.8), "l3.8 3.8-3.8 3.8-3.8-3.8z"),
    ((0, -3.4), "l3.5 6.2h-7z"),
    ((0, 3.4), "l3.5-6.2h-7z"),
    ((-1.2, -3.6), "h2.4v2.4h2.4v2.4h-2.4v2.4h-2.4v-2.4h-2.4v-2.4h2.4z"),
    ((-3.4, 0), "l6.2 3.5v-7z"),
    ((3.4, 0), "l-6.2 3.5v-7z"),
)


# --- by kind ---


def _kinds(report: Report, names: Sequence[str]) -> str:
    """A bar for each kind; of several fine-tunes, their marks on a line for each kind."""
    tunes = report["fine_tunes"]
    kinds = [kind["kind"] for kind in tunes[0]["kinds"]]
    columns = [values_of(tune["kinds"], "relative_norm") for tune in tunes]
    high = _greatest(100 * value for values in columns for value in values) or 1.0
    left, row = 92.0, 26.0
    bottom = _TOP + row * len(kinds)

    def x(value: float) -> float:
        return left + (_WIDTH - left - 2 * _RIGHT) * value / (high * 1.04)

    parts = []
    for tick in _ticks(0.0, high):
        parts.append(f'<path class="grid" d="M{_n(x(tick))} {_n(_TOP)}V{_n(bottom)}"/>')
        parts.append(f'<text x="{_n(x(tick))}" y="{_n(bottom + 14)}" text-anchor="middle">{tick:.4g}</text>')

    def middle(at: float) -> float:
        return _TOP + row * (at + 0.5)

    for at, kind in enumerate(kinds):
        parts.append(f'<text x="{_n(left - 8)}" y="{_n(middle(at) + 4)}" text-anchor="end">{_text(kind)}</text>')
    for model, values in enumerate(columns):
        known = [(x(100 * value), middle(at)) for at, value in enumerate(values) if _drawn(100 * value)]
        if len(tunes) == 1:
            bars = "".join(f"M{_n(left)} {_n(y - 8)}H{_n(end)}v16H{_n(left)}z" for end, y in known)
            parts.append(f'<g class="m0"><path class="bar" d="{bars}"/></g>')
        else:
            marks = "".join(_mark(model, *point) for point in known)
            parts.append(f'<g class="{look(model)}" data-model="{model}"><path class="mark" d="{marks}"/></g>')
    for at, kind in enumerate(kinds):
        values = [column[at] for column in columns]
        said = [share(None if math.isnan(value) else value) for value in values]
        lines = [kind, *(f"{name}: {value}" for name, value in zip(names, said, strict=True))]
        parts.append(_hit(lines, 0, _TOP + row * at, _WIDTH, row))
    title = "Update relative to the weights, by kind, %"
    keys = ",".join(map(str, range(len(tunes)))) if len(tunes) > 1 else ""
    return _figure(title, "".join(parts), bottom + 22, keys)


# --- several together ---


def _matrices(together: Report, names: Sequence[str]) -> Iterable[str]:
    models = len(names)
    most = widest_cosine(together)
    for key, title, end in (("cosine", "Cosine similarity of the updates", most), ("opposed", _OPPOSED, 1.0)):
        left, top = 26.0, 4.0
        cell = min((_WIDTH - left - 4) / models, 64.0)
        parts = []
        for at in range(models):
            middle = (at + 0.5) * cell
            label = f'<text text-anchor="middle" data-model="{at}"'
            parts.append(f'{label} x="{_n(left / 2)}" y="{_n(top + middle + 4)}">{at + 1}</text>')
            parts.append(f'{label} x="{_n(left + middle)}" y="{_n(top + models * cell + 14)}">{at + 1}</text>')
        for a, b in ((a, b) for a in range(models) for b in range(models)):
            value = together[key][a][b] if a != b else None
            box = left + b * cell, top + a * cell, cell - 1.5, cell - 1.5
            shown = "" if value is None or models > 12 else _in_cell(value, key, box, models)
            said = f"{names[a]} and {names[b]}"
            if a == b:
                parts.append(f'<g data-model="{a}">{_cell(None, end, box, key)}</g>')
                continue
            lines = [said, _OF[key](value)]
            parts.append(_hit(lines, *box, inside=f"{_cell(value, end, box, key)}{shown}", models=(a, b)))
        yield _figure(title, "".join(parts), top + models * cell + 22, "", legend=_scale(key, end), columns=models - 1)


_OPPOSED = "Entries with opposed signs, %"


def _cosine(value: float | None) -> str:
    return f"cosine {'-' if value is None else f'{round(value, 3) + 0.0:.3f}'}"


def _opposed(value: float | None) -> str:
    return f"opposed signs {share(value)}"


_OF: dict[str, Say] = {"cosine": _cosine, "opposed": _opposed}


def _in_cell(value: float, key: str, box: tuple[float, float, float, float], models: int) -> str:
    x, y, wide, high = box
    text = f"{round(value, 2) + 0.0:.2f}" if key == "cosine" else f"{100 * value:.1f}"
    small = ' class="small"' if models > 7 else ""
    return f'<text{small} x="{_n(x + wide / 2)}" y="{_n(y + high / 2 + 4)}" text-anchor="middle">{text}</text>'


def _strips(together: Report, at: int, stack: str, models: int) -> Iterable[str]:
    """For each pair a row, for each layer a column."""
    layers, rows = of_stack(together["layers"], stack), paired(models)
    few = models <= MOST_PAIRED
    for key, end in (("cosine", widest_cosine(together)), ("opposed", 1.0)):
        shown = [
            ([mean([layer[key][a][b] for a, b in pairs]) for layer in layers], name, pairs) for name, pairs in rows
        ]
        owners = [f"{pairs[0][0]} {pairs[0][1]}" if few else str(pairs[0][0]) for _, _, pairs in shown]
        values = [each for each, _, _ in shown]
        labels = [name for _, name, _ in shown]
        if key == "opposed" and models > 2:
            values.append([mean([layer["disagreement"]]) for layer in layers])
            labels.append("any")
            owners.append("")
        left, row = 36.0, 18.0 if len(values) <= 12 else 13.0
        bottom, step = _TOP + row * len(values), (_WIDTH - left - _RIGHT) / len(layers)
        parts = []
        for line, (name, owner, numbers) in enumerate(zip(labels, owners, values, strict=True)):
            top = _TOP + row * line
            cells = [
                _cell(None if math.isnan(value) else value, end, (left + layer * step, top, step, row - 1), key)
                for layer, value in enumerate(numbers)
            ]
            small = ' class="small"' if row < 18 else ""
            label = f'<text{small} x="{_n(left - 6)}" y="{_n(top + row / 2 + 3.5)}" text-anchor="end">{name}</text>'
            owned = f' data-model="{owner}"' if owner else ""
            parts.append(f"<g{owned}>{label}{''.join(cells)}</g>")
        for layer in ticked_layers(len(layers), 7):
            x = left + (layer + 0.5) * step
            parts.append(f'<text x="{_n(x)}" y="{_n(bottom + 14)}" text-anchor="middle">{layer}</text>')
        parts.append(f'<text x="{_n(_WIDTH / 2)}" y="{_n(bottom + 28)}" text-anchor="middle">layer</text>')
        for layer in range(len(layers)):
            said = (None if math.isnan(numbers[layer]) else numbers[layer] for numbers in values)
            lines = [
                f"layer {layer}",
                *(f"{name}: {_OF[key](value)}" for name, value in zip(labels, said, strict=True)),
            ]
            parts.append(_hit(lines, left + layer * step, _TOP, step, bottom - _TOP))
        what = f"{'' if few else 'mean '}{'cosine' if key == 'cosine' else 'opposed signs'}"
        what += " of two" if few else " of each with all others"
        title = f"{what[0].upper()}{what[1:]}, layer by layer: {called(stack)}"
        keys = ",".join(owners)
        yield _figure(title, "".join(parts), bottom + 34, keys, stack=at, legend=_scale(key, end))


def _cell(value: float | None, end: float, box: tuple[float, float, float, float], key: str) -> str:
    """A rectangle whose opacity is the value's share of the end of the scale. A cosine's sign decides its colour."""
    x, y, wide, high = (_n(edge) for edge in box)
    place = f'x="{x}" y="{y}" width="{wide}" height="{high}"'
    if value is None:
        return f'<rect class="none" {place}/>'
    colour = key if key == "opposed" else "minus" if value < 0 else "plus"
    strength = _n(0.75 * min(1.0, abs(value) / end), 3)
    return f'<rect class="{colour}" fill-opacity="{strength}" {place}/>'


def _scale(key: str, end: float) -> str:
    """What the colours of a figure stand for."""
    low = -end if key == "cosine" else 0.0
    steps = [low + (end - low) * at / 8 for at in range(9)]
    cells = "".join(_cell(value, end, (at * 12.0, 0.0, 12.0, 10.0), key) for at, value in enumerate(steps))
    ends = (f"{low:.2f}", f"{end:.2f}") if key == "cosine" else ("0%", "100%")
    drawn = f'<svg class="scale" viewBox="0 0 108 10" aria-hidden="true">{cells}</svg>'
    return f'<span class="ends">{ends[0]} {drawn} {ends[1]}</span>'


# --- parts of a figure ---


def _figure(
    title: str, inside: str, height: float, keys: str, *, stack: int | None = None, legend: str = "", columns: int = 1
) -> str:
    """A figure with its title.

    Args:
        title: above it.
        inside: the SVG's content.
        height: of the SVG, in its units.
        keys: for each line of a hit but the first, the fine-tunes that it is about; page.js leaves out what is off.
        stack: the number of the stack that it is about.
        legend: HTML below the title.
        columns: how many hits are in a row.
    """
    owner = "" if stack is None else f' data-stack="{stack}"'
    below = f'<div class="legend">{legend}</div>' if legend else ""
    said = f'viewBox="0 0 {_n(_WIDTH)} {_n(height)}" role="img" aria-label="{_text(title)}"'
    svg = f'<svg class="plot" {said} data-keys="{keys}" data-columns="{columns}">{inside}</svg>'
    return f"<figure{owner}><figcaption>{_text(title)}</figcaption>{below}{svg}</figure>"


def _axes(ticks: Sequence[float], y: Callable[[float], float], layers: Sequence[tuple[float, str]], below: str) -> str:
    parts = []
    digits = _digits(ticks)
    for tick in ticks:
        kind = "zero" if tick == 0 else "grid"
        parts.append(f'<path class="{kind}" d="M{_n(_LEFT)} {_n(y(tick))}H{_n(_WIDTH - _RIGHT)}"/>')
        parts.append(f'<text x="{_n(_LEFT - 6)}" y="{_n(y(tick) + 4)}" text-anchor="end">{_tick(tick, digits)}</text>')
    for x, label in layers:
        parts.append(f'<text x="{_n(x)}" y="{_n(_HEIGHT - _BOTTOM + 15)}" text-anchor="middle">{label}</text>')
    middle = (_WIDTH + _LEFT - _RIGHT) / 2
    parts.append(f'<text x="{_n(middle)}" y="{_n(_HEIGHT - 6)}" text-anchor="middle">{below}</text>')
    return "".join(parts)


def _hit(
    lines: Sequence[str],
    x: float,
    y: float,
    wide: float,
    high: float,
    *,
    inside: str = "",
    models: Sequence[int] = (),
) -> str:
    """A place that says its values."""
    owner = f' data-model="{" ".join(map(str, models))}"' if models else ""
    title = "\n".join(map(_text, lines))
    box = f'<rect class="at" x="{_n(x)}" y="{_n(y)}" width="{_n(wide)}" height="{_n(high)}"/>'
    return f'<g class="hit"{owner}><title>{title}</title>{inside}{box}</g>'


def _text(text: str) -> str:
    """Any name as harmless text, on one line."""
    return escape(printable(text))


def _said(say: Say, value: float) -> str:
    return say(None) if math.isnan(value) else say(value)


def _drawn(value: float) -> bool:
    return abs(value) < _MOST


def _greatest(values: Iterable[float]) -> float:
    return max([0.0, *filter(_drawn, values)])


def _ticks(low: float, high: float) -> list[float]:
    """A few round numbers that cover a range which holds 0."""
    rough = (high - low) / 7
    power = 10.0 ** math.floor(math.log10(rough)) if rough > 0 else 0.0
    if not power or not math.isfinite(high - low):
        return [0.0]
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    return [at * step for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _digits(ticks: Sequence[float]) -> int:
    """Decimals that tell ticks apart; -1 where they are better written with a power of ten."""
    step = ticks[1] - ticks[0] if len(ticks) > 1 else 1.0
    if step < 1e-3 or max(map(abs, ticks)) >= 1e4:
        return -1
    return next(digits for digits in range(6) if abs(round(step, digits) - step) < step * 1e-6)


def _tick(value: float, digits: int) -> str:
    if digits < 0:
        return f"{value:.3g}"
    return f"{value + 0.0:.{digits}f}"


def _n(value: float, digits: int = 1) -> str:
    """A coordinate, as short as it can be."""
    return f"{round(value, digits) + 0.0:.{digits}f}".rstrip("0").rstrip(".")
