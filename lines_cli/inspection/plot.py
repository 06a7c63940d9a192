"""A report in pictures: SVG or PNG. The only user of matplotlib, which is an extra.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; every line also has a
marker of its own.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lines_cli.errors import RecipeError
from lines_cli.inspection.series import (
    MOST_PAIRED,
    asked_and_realised,
    called,
    elided,
    mean,
    of_stack,
    paired,
    short_names,
    ticked_layers,
    values_of,
    widest_cosine,
)
from lines_cli.inspection.tables import settings

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise RecipeError(
        "--plot draws SVG and PNG with matplotlib, which is not installed",
        hint="Install it: pip install matplotlib. Or name a file that ends in .html: a page needs nothing.",
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lines_cli.inspection.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
GREY, _LIGHT, _PALE = "0.35", "0.88", "#9ecae1"
WIDTH, _ROW = 9.0, 2.5  # inches
_LINE, _ABOUT = 0.19, 105  # of what stands above: inches of a line, and its most characters
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 12,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.hashsalt": "lines",  # the same report gives the same file
    "savefig.dpi": 150,
}


@dataclass(frozen=True)
class Panel:
    """One figure: what it shows, how high it is in inches, and what draws it."""

    title: str
    height: float
    draw: Callable[[Figure | SubFigure], None]


def picture(report: Report, form: str) -> bytes:
    """A report as bytes of a file, the same for the same report.

    Args:
        report: from `lines_cli.inspection.report.make_report`.
        form: `svg` or `png`.
    """
    with mpl.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
        mpl.rcdefaults()  # whatever a user prefers elsewhere
        mpl.rcParams.update(STYLE)
        return render([about(report), *panels(report)], form)


def render(shown: Sequence[Panel], form: str) -> bytes:
    """The panels below each other, as bytes of a file."""
    heights = [panel.height for panel in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    below: list[Any] = list(figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0])
    for panel, part in zip(shown, below, strict=True):
        if panel.title:
            part.suptitle(panel.title)
        panel.draw(part)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in below:  # the layout's last digits differ from run to run
        part.bbox_relative.set_points(part.bbox_relative.get_points().round(4))
    for axes in figure.axes:
        left, bottom, width, height = (round(edge, 4) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


def about(report: Report) -> Panel:
    """What is drawn: the checkpoint or the fine-tunes, the base, and the settings."""
    tunes = report.get("fine_tunes", [])
    what = report["checkpoint"] if len(tunes) < 2 else f"{len(tunes)} fine-tunes"
    said = [elided(what, _ABOUT)]
    if report["base"] is not None:
        said.append(f"base: {elided(report['base'], _ABOUT - 6)}")
    said += textwrap.wrap(elided(f"LiNeS: {settings(report['scaling'])}", 4 * _ABOUT), _ABOUT)
    height = _LINE * len(said) + 0.2

    def draw(part: Figure | SubFigure) -> None:
        for at, line in enumerate(said):
            style: dict[str, Any] = {"fontweight": "bold"} if at == 0 else {"color": GREY}
            part.text(0.01, 1 - (0.1 + at * _LINE) / height, line, va="top", ha="left", **style)

    return Panel("", height, draw)


def panels(report: Report) -> list[Panel]:
    """What there is to draw of a report."""
    tunes = report.get("fine_tunes", [])
    stacks = [stack["name"] for stack in report["stacks"]]
    if not stacks:
        none = Panel("No stack of layers was found, so there is no depth to draw over", 1.0, lambda _: None)
        return [none, *_by_kind(report)]
    names = short_names([tune["model"] for tune in tunes])
    rows = math.ceil(len(stacks) / 2) * _ROW + 0.7
    of_rounding = _of_rounding(report, stacks, rows + 0.2)
    if not tunes:
        first = Panel("Parameters and coefficients by depth", rows + 0.2, lambda p: _parameters(p, report, stacks))
        return [first, *of_rounding]
    legend = 0.2 * math.ceil((len(names) + 1) / 3)
    after = f"{'LiNeS' if report['scaling']['lines'] else 'scaling'}"
    found = [Panel("Norm of the update by depth", rows + legend, lambda part: _updates(part, report, stacks, names))]
    if len(names) == 1:
        height = math.ceil(len(stacks) / 2) * _ROW * 0.85 + 0.9
        draw = lambda part: _before_and_after(part, report, stacks, after)
        found.append(Panel(f"Before and after {after}", height, draw))
    else:
        draw = lambda part: _updates(part, report, stacks, names, scaled=True)
        found.append(Panel(f"After {after}, on the same scale", rows + _of_numbers(names), draw))
    found += [*of_rounding, *_by_kind(report)]
    if together := report.get("together"):
        strips = len(stacks) * (0.16 * max(len(paired(len(names))) + 1, 5) + 0.9) + 0.8
        found += [
            Panel("Whole models", min(0.4 * len(names) + 1.6, 4.4), lambda part: matrices(part, together, names)),
            Panel("Layer by layer", strips, lambda part: _strips(part, together, stacks, names)),
        ]
    return found


def _of_rounding(report: Report, stacks: Sequence[str], height: float) -> list[Panel]:
    """A panel of what rounding leaves of the coefficients, if that is known."""
    known = asked_and_realised(report)
    if known is None:
        return []
    how, layers = known
    asked, left = (
        {(layer["stack"], layer["index"]): math.nan if layer[key] is None else layer[key] for layer in layers}
        for key in ("coefficient", "realised")
    )
    shown = [stack for stack in stacks if any(name == stack for name, _ in asked)]
    if not shown:
        return []
    title = f"Coefficients asked and realised ({how})"
    return [Panel(title, height, lambda part: _asked_and_realised(part, shown, asked, left))]


def _by_kind(report: Report) -> list[Panel]:
    """A panel of the relative update of each kind of parameter."""
    tunes = report.get("fine_tunes", [])
    kinds = [kind["kind"] for kind in tunes[0]["kinds"]] if tunes else []
    if not kinds:
        return []
    names = short_names([tune["model"] for tune in tunes])
    height = 0.3 * len(kinds) + 1.0 + (_of_numbers(names) if len(names) > 1 else 0)
    return [Panel("Update relative to the weights, by kind", height, lambda part: _kinds(part, report, kinds, names))]


def _of_numbers(names: Sequence[str]) -> float:
    """The height of a legend that gives each model's number alone."""
    return 0.2 * math.ceil(len(names) / _NUMBERS_ABREAST)


_NUMBERS_ABREAST = 12


def _grid(part: Figure | SubFigure, number: int) -> list[Axes]:
    """A number of axes, two abreast."""
    columns = min(2, number)
    axes: list[Axes] = list(part.subplots(math.ceil(number / columns), columns, squeeze=False).flat)
    for spare in axes[number:]:
        spare.set_visible(False)
    return axes[:number]


def _over_layers(axes: Axes, title: str, number: int, *, ticks: int = 9) -> None:
    """Layers from left to right, the first and the last among those that are numbered."""
    axes.set_title(title)
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, number - 0.4)
    axes.set_xticks(ticked_layers(number, ticks))


def _from_zero(axes: Axes, values: Iterable[float]) -> None:
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    axes.set_ylim(0, most * 1.08 or 1.0)


def _coefficients(axes: Axes, layers: Sequence[Report]) -> Any:
    """The coefficient's line, on a scale of its own at the right, over whatever else is drawn."""
    values = values_of(layers, "coefficient")
    known = [value for value in values if math.isfinite(value)]
    right = axes.twinx()
    style: dict[str, Any] = {"color": GREY, "linestyle": "--", "linewidth": 1.2, "label": "coefficient"}
    (line,) = right.plot(range(len(values)), values, marker="_" if len(values) == 1 else None, markersize=20, **style)
    # More room above it than above the norms, or else their greatest values would lie on each other.
    right.set_ylim(min(0.0, *known, 0.0) * 1.08, max(0.0, *known, 0.0) * 1.18 or 1.0)
    right.set_ylabel("coefficient", color=GREY)
    right.spines["right"].set_visible(True)
    right.spines["right"].set_color(GREY)
    right.tick_params(axis="y", colors=GREY)
    right.fill_between(range(len(values)), values, color=GREY, alpha=0.12, linewidth=0)
    return line


def _legend(part: Figure | SubFigure, handles: Sequence[Any], most: int = 3) -> None:
    columns = min(len(handles), most)
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _look(at: int) -> dict[str, Any]:
    """How the line of a model looks; no other of 24 looks the same, nor does its marker."""
    turn = at // 8 % 3
    style = {"linestyle": ("-", ":", "-.")[turn], "fillstyle": ("full", "none", "left")[turn]}
    return style | {"color": COLOURS[at % 8], "marker": MARKERS[at % 8], "markersize": 4, "linewidth": 1.5}


def _parameters(part: Figure | SubFigure, report: Report, stacks: Sequence[str]) -> None:
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        layers = of_stack(report["layers"], stack)
        bars = axes.bar(range(len(layers)), values_of(layers, "parameters"), width=0.5, color=_PALE, label="parameters")
        axes.set_ylabel("parameters")
        _over_layers(axes, called(stack), len(layers))
        line = _coefficients(axes, layers)
    _legend(part, [bars, line])


def _updates(
    part: Figure | SubFigure, report: Report, stacks: Sequence[str], names: Sequence[str], *, scaled: bool = False
) -> None:
    """A line for each model: before scaling, with the coefficients over it; or after."""
    handles: list[Any] = []
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        handles, every = [], []
        for at, (tune, name) in enumerate(zip(report["fine_tunes"], names, strict=True)):
            layers = of_stack(tune["layers"], stack)
            before, after = (values_of(layers, key) for key in ("update_norm", "scaled_norm"))
            label = name.partition(" ")[0] if scaled else name
            norms = after if scaled else before
            handles += axes.plot(norms, label=label, markevery=max(1, len(norms) // 12), **_look(at))
            every += [*before, *after] if len(names) > 1 else before
        _from_zero(axes, every)
        axes.set_ylabel("norm of the update")
        _over_layers(axes, called(stack), len(of_stack(report["layers"], stack)))
        if not scaled:
            handles.append(_coefficients(axes, of_stack(report["layers"], stack)))
    _legend(part, handles, _NUMBERS_ABREAST if scaled else 3)


def _before_and_after(part: Figure | SubFigure, report: Report, stacks: Sequence[str], what: str) -> None:
    """The bars of one model."""
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        layers = of_stack(report["fine_tunes"][0]["layers"], stack)
        (norms, scaled), places = (values_of(layers, key) for key in ("update_norm", "scaled_norm")), range(len(layers))
        before = axes.bar(places, norms, color=_PALE, label="before")
        after = axes.bar(places, scaled, width=0.45, color=COLOURS[0], label=f"after {what}")
        _from_zero(axes, [*norms, *scaled])
        _over_layers(axes, called(stack), len(layers))
        axes.set_ylabel("norm of the update")
    _legend(part, [before, after])


def _kinds(part: Figure | SubFigure, report: Report, kinds: Sequence[str], names: Sequence[str]) -> None:
    """A bar for each kind; of several models, a mark of each on a line for each kind."""
    axes, handles, every = part.subplots(), [], []
    rows = range(len(kinds))
    for at, (tune, name) in enumerate(zip(report["fine_tunes"], names, strict=True)):
        values = [100 * value for value in values_of(tune["kinds"], "relative_norm")]
        every += values
        if len(names) == 1:
            axes.barh(rows, values, height=0.6, color=COLOURS[0])
        else:
            handles += axes.plot(values, rows, label=name.partition(" ")[0], clip_on=False, **_look(at) | _UNJOINED)
    _from_zero(axes, every)
    axes.set_xlim(axes.get_ylim())
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_yticks(rows, kinds)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("norm of the update, % of the norm of the weights")
    if handles:
        axes.grid(axis="y", color=_LIGHT)
        axes.set_axisbelow(True)
        _legend(part, handles, _NUMBERS_ABREAST)


_UNJOINED: Any = {"linestyle": "none", "markersize": 6}


def _asked_and_realised(
    part: Figure | SubFigure,
    stacks: Sequence[str],
    asked: Mapping[tuple[str, int], float],
    left: Mapping[tuple[str, int], float],
) -> None:
    """For each layer the coefficient that is asked, as a line, and the one that rounding leaves, as a dot."""
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        layers = sorted(index for name, index in asked if name == stack)
        wanted, found = ([values[stack, index] for index in layers] for values in (asked, left))
        style: dict[str, Any] = {"color": GREY, "linewidth": 1.5, "label": "asked"}
        (line,) = axes.plot(layers, wanted, marker="_" if len(layers) == 1 else None, markersize=20, **style)
        (dots,) = axes.plot(layers, found, "o", color=COLOURS[0], markersize=5, label="realised", clip_on=False)
        known = [value for value in (*wanted, *found) if math.isfinite(value)]
        axes.set_ylim(min(0.0, *known, 0.0) * 1.08, max(0.0, *known, 0.0) * 1.08 or 1.0)
        axes.set_ylabel("coefficient")
        _over_layers(axes, called(stack), max(layers) + 1)
    _legend(part, [line, dots])


def _cosine_scale(together: Report) -> dict[str, Any]:
    most = widest_cosine(together)
    return {"cmap": "PuOr_r", "vmin": -most, "vmax": most}


_SHARE_SCALE = {"cmap": "Blues", "vmin": 0, "vmax": 100}


def matrices(part: Figure | SubFigure, together: Report, names: Sequence[str]) -> None:
    left, right = part.subplots(1, 2)
    cosine = [[math.nan if value is None else value for value in row] for row in together["cosine"]]
    opposed = [[math.nan if value is None else 100 * value for value in row] for row in together["opposed"]]
    for values in (cosine, opposed):
        for at in range(len(names)):
            values[at][at] = math.nan  # a model and itself
    _heat(left, cosine, "cosine similarity", names, 2, _cosine_scale(together))
    _heat(right, opposed, "entries with opposed signs, %", names, 1, _SHARE_SCALE)
    right.set_yticklabels([])


def _heat(
    axes: Axes, values: list[list[float]], title: str, names: Sequence[str], digits: int, scale: dict[str, Any]
) -> None:
    axes.set_facecolor(_LIGHT)
    image = axes.imshow(values, aspect="equal", **scale)
    axes.set_title(title)
    small: dict[str, Any] = {"size": 6} if len(names) > 12 else {}
    axes.set_xticks(range(len(names)), [name.partition(" ")[0] for name in names], **small)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    if len(names) > 12:  # no room for numbers
        return
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                colour = "white" if _luminance(image.cmap(float(image.norm(value)))) < 0.3 else "black"  # type: ignore[arg-type]
                text = f"{round(value, digits) + 0.0:.{digits}f}"
                axes.text(x, y, text, ha="center", va="center", size=8 if len(names) <= 6 else 6, color=colour)


def _luminance(colour: Sequence[float]) -> float:
    """Relative luminance of an sRGB colour (WCAG 2.1), 0 to 1."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _strips(part: Figure | SubFigure, together: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    """For each pair of models a row, for each layer a column; cosines to the left, opposed signs to the right."""
    rows = paired(len(names))
    grid = part.subplots(len(stacks), 2, squeeze=False)
    titles = ("cosine", "opposed signs, %") if len(names) <= MOST_PAIRED else ("mean cosine", "mean opposed signs, %")
    for at, (key, title, factor, scale) in enumerate(
        (("cosine", titles[0], 1, _cosine_scale(together)), ("opposed", titles[1], 100, _SHARE_SCALE))
    ):
        for line, stack in zip(grid, stacks, strict=True):
            axes, layers = line[at], of_stack(together["layers"], stack)
            values = [[mean([layer[key][a][b] for a, b in pairs]) for layer in layers] for _, pairs in rows]
            labels = [label for label, _ in rows]
            if key == "opposed" and len(names) > 2:
                values.append([mean([layer["disagreement"]]) for layer in layers])
                labels.append("any")
            axes.set_facecolor(_LIGHT)
            table = [[factor * value for value in row] for row in values]
            image = axes.imshow(table, aspect="auto", interpolation="nearest", **scale)
            _over_layers(axes, f"{title}, {called(stack)}" if len(stacks) > 1 else title, len(layers), ticks=6)
            axes.set_xlim(-0.5, len(layers) - 0.5)
            axes.set_yticks(range(len(labels)), labels, size=9 if len(labels) <= 8 else 6)
            if at == 0:  # on the right it would lie beside the colour bar's numbers
                axes.set_ylabel("models")
            axes.tick_params(length=0)
        part.colorbar(image, ax=list(grid[:, at]), fraction=0.05, pad=0.02)
