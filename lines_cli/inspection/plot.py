"""A report in pictures: SVG, PNG, or one page of HTML. The only user of matplotlib, which is an extra.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; every line also has a
marker of its own.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.errors import OutputError, RecipeError, printable
from lines_cli.inspection.html import page

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure, SubFigure
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise RecipeError(
        "--plot draws with matplotlib, which is not installed", hint="Install it: pip install matplotlib"
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lines_cli.inspection.report import Report

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
MARKERS = "osD^vPX*"
GREY, _LIGHT, _PALE = "0.35", "0.88", "#9ecae1"
WIDTH, _ROW = 9.0, 2.5  # inches
_MOST_BARS, _MOST_PAIRED = 8, 8  # fine-tunes with bars of their own, and with a row for each pair of them
LONGEST = 28  # characters of a name
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


class Drawing:
    """A file that a report will be drawn into.

    Args:
        path: ends in .svg, .png or .html.

    Raises:
        RecipeError: it ends in something else.
        OutputError: it cannot be written there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._form = path.suffix.lower().removeprefix(".")
        if self._form not in ("svg", "png", "html"):
            raise RecipeError(
                f"--plot {path}: the formats are SVG, PNG and HTML",
                hint="Name a file that ends in .svg, .png or .html.",
            )
        if os.path.isdir(path):
            raise OutputError(f"--plot {path}: a folder", hint="Name a file.")
        self._staged = path.with_name(f".lines-{os.getpid()}.part")
        self._write(b"")  # whether that works is better known before the weights are read
        os.unlink(self._staged)
        try:
            os.lstat(path)
        except FileNotFoundError:
            pass
        except OSError as error:  # such as a name that is too long
            raise self._refusal(error) from error

    def spare(self, inputs: Iterable[Path]) -> None:
        """Refuse to replace any of the inputs.

        Raises:
            OutputError: the file is one.
        """
        if any(self.path.exists() and self.path.samefile(file) for file in inputs):
            raise OutputError(f"--plot {self.path}: an input", hint="Name another file.")

    def save(self, report: Report) -> None:
        """Draw and write it; the file appears whole or not at all, and replaces an older one.

        Raises:
            OutputError: it cannot be written.
        """
        with mpl.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
            mpl.rcdefaults()  # whatever a user prefers elsewhere
            mpl.rcParams.update(STYLE)
            shown = panels(report)
            if self._form == "html":
                content = page(report, [(panel.title, render([panel], "svg")) for panel in shown]).encode()
            else:
                content = render(shown, self._form)
        self._write(content)
        try:
            os.replace(self._staged, self.path)
        except OSError as error:
            raise self._refusal(error) from error

    def _write(self, content: bytes) -> None:
        try:
            self._staged.write_bytes(content)
        except OSError as error:
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> OutputError:
        with suppress(OSError):
            self._staged.unlink()
        return OutputError(
            f"--plot {self.path}: cannot be written: {error.strerror or error}",
            hint="Name a file in a folder that exists and that you may write to.",
        )


def render(shown: Sequence[Panel], form: str) -> bytes:
    """The panels below each other, as bytes of a file."""
    heights = [panel.height for panel in shown]
    figure = Figure(figsize=(WIDTH, sum(heights)), layout="constrained")
    below: list[Any] = list(figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0])
    for panel, part in zip(shown, below, strict=True):
        part.suptitle(panel.title)
        panel.draw(part)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axes in figure.axes:  # the layout's last digits differ from run to run
        left, bottom, width, height = (round(edge, 4) for edge in axes.get_position().bounds)
        axes.set_position((left, bottom, width, height))
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


def panels(report: Report) -> list[Panel]:
    """What there is to draw of a report."""
    tunes = report.get("fine_tunes", [])
    stacks = [stack["name"] for stack in report["stacks"]]
    if not stacks:
        return [Panel("No stack of layers was found, so there is no depth to draw over", 1.0, lambda _: None)]
    names = short_names([tune["model"] for tune in tunes])
    rows = math.ceil(len(stacks) / 2) * _ROW + 0.7 + 0.2 * math.ceil(len(names) / 3)
    of_rounding = _of_rounding(report, stacks, rows)
    if not tunes:
        first = Panel("Parameters and coefficients by depth", rows, lambda part: _parameters(part, report, stacks))
        return [first, *of_rounding]
    bars = min(len(tunes), _MOST_BARS)
    title = f"Before and after {'LiNeS' if report['scaling']['lines'] else 'scaling'}" + (
        f" (the first {bars} of {len(tunes)})" if bars < len(tunes) else ""
    )
    height = math.ceil(bars * len(stacks) / 2) * _ROW * 0.85 + 0.9
    found = [
        Panel("Norm of the update by depth", rows, lambda part: _updates(part, report, stacks, names)),
        Panel(title, height, lambda part: _before_and_after(part, report, stacks, names[:bars])),
        *of_rounding,
    ]
    if together := report.get("together"):
        lines = len(_strip_rows(names)) + 1
        strips = len(stacks) * (0.16 * max(lines, 5) + 0.9) + 0.8
        found += [
            Panel("Whole models", min(0.4 * len(names) + 1.6, 4.4), lambda part: matrices(part, together, names)),
            Panel("Layer by layer", strips, lambda part: _strips(part, together, stacks, names)),
        ]
    return found


def _of_rounding(report: Report, stacks: Sequence[str], height: float) -> list[Panel]:
    """A panel of what rounding leaves of the coefficients, if that is known: recorded, or foreseen."""
    if report.get("recorded"):
        layers, whose = report["recorded"], "as its recipe records them"
    elif report.get("rounding"):
        layers, whose = report["layers"], f"foreseen in {report['rounding']['dtype']}"
    else:
        return []
    asked, left = (
        {(layer["stack"], layer["index"]): math.nan if layer[key] is None else layer[key] for layer in layers}
        for key in ("coefficient", "realised")
    )
    shown = [stack for stack in stacks if any(name == stack for name, _ in asked)]
    if not shown:
        return []
    title = f"Coefficients as asked, and as rounding leaves them ({whose})"
    return [Panel(title, height, lambda part: _asked_and_realised(part, shown, asked, left))]


def short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, its middle cut out if it is long; numbered where there are several."""
    last = [printable(os.path.basename(os.path.normpath(model))) for model in models]
    cut = [name if len(name) <= LONGEST else f"{name[: LONGEST // 2 - 3]}…{name[-LONGEST // 2 - 2 :]}" for name in last]
    return [f"{at} {name}" for at, name in enumerate(cut, 1)] if len(cut) > 1 else cut


def _of(rows: Sequence[Report], stack: str) -> list[Report]:
    return [row for row in rows if row["stack"] == stack]


def _values(rows: Sequence[Report], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]


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
    step = max(1, math.ceil((number - 1) / ticks))
    axes.set_xticks([at for at in range(0, number - 1, step) if number - 1 - at > step / 2] + [number - 1])


def _called(stack: str) -> str:
    return printable(stack) or "(no prefix)"


def _from_zero(axes: Axes, values: Iterable[float]) -> None:
    most = max((value for value in values if math.isfinite(value)), default=0.0)
    axes.set_ylim(0, most * 1.08 or 1.0)


def _coefficients(axes: Axes, layers: Sequence[Report]) -> Any:
    """The coefficient's line, on a scale of its own at the right, over whatever else is drawn."""
    values = _values(layers, "coefficient")
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


def _legend(part: Figure | SubFigure, handles: Sequence[Any]) -> None:
    columns = min(len(handles), 3)
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _parameters(part: Figure | SubFigure, report: Report, stacks: Sequence[str]) -> None:
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        layers = _of(report["layers"], stack)
        bars = axes.bar(range(len(layers)), _values(layers, "parameters"), width=0.5, color=_PALE, label="parameters")
        axes.set_ylabel("parameters")
        _over_layers(axes, _called(stack), len(layers))
        line = _coefficients(axes, layers)
    _legend(part, [bars, line])


def _updates(part: Figure | SubFigure, report: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    handles: list[Any] = []
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        handles, every = [], []
        for at, (tune, name) in enumerate(zip(report["fine_tunes"], names, strict=True)):
            norms = _values(_of(tune["layers"], stack), "update_norm")
            style: dict[str, Any] = {"color": COLOURS[at % 8], "marker": MARKERS[at % 8]}
            style |= {"markevery": max(1, len(norms) // 12), "linestyle": ("-", ":", "-.")[at // 8 % 3]}
            handles += axes.plot(norms, label=name, markersize=4, linewidth=1.5, **style)
            every += norms
        _from_zero(axes, every)
        axes.set_ylabel("norm of the update")
        _over_layers(axes, _called(stack), len(norms))
        handles.append(_coefficients(axes, _of(report["layers"], stack)))
    _legend(part, handles)


def _before_and_after(part: Figure | SubFigure, report: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    shown = [(at, stack) for at in range(len(names)) for stack in stacks]
    rows = [row for tune in report["fine_tunes"][: len(names)] for row in tune["layers"]]
    most = {
        stack: [n for key in ("update_norm", "scaled_norm") for n in _values(_of(rows, stack), key)] for stack in stacks
    }
    for axes, (at, stack) in zip(_grid(part, len(shown)), shown, strict=True):
        layers = _of(report["fine_tunes"][at]["layers"], stack)
        norms, places = _values(layers, "update_norm"), range(len(layers))
        before = axes.bar(places, norms, color=_PALE, label="before")
        after = axes.bar(places, _values(layers, "scaled_norm"), width=0.45, color=COLOURS[0], label="after LiNeS")
        _from_zero(axes, most[stack])
        parts = ([names[at]] if len(names) > 1 else []) + (
            [_called(stack)] if len(stacks) > 1 or len(names) == 1 else []
        )
        _over_layers(axes, ", ".join(parts), len(layers))
        axes.set_ylabel("norm of the update")
    _legend(part, [before, after])


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
        _over_layers(axes, _called(stack), max(layers) + 1)
    _legend(part, [line, dots])


def _cosine_scale(together: Report) -> dict[str, Any]:
    """One scale for all cosines between two models: symmetric, and no finer than a quarter."""
    groups = [together, *together["layers"]]
    found = [
        abs(value)
        for group in groups
        for at, row in enumerate(group["cosine"])
        for value in row[:at]
        if value is not None
    ]
    most = max([0.25, *found])
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
    axes.set_xticks(range(len(names)), [name.partition(" ")[0] for name in names])
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


def _strip_rows(names: Sequence[str]) -> list[tuple[str, list[tuple[int, int]]]]:
    """What each row of a strip is: a pair of models; of very many, one model and all others."""
    models = range(len(names))
    if len(names) <= _MOST_PAIRED:
        return [(f"{a + 1}, {b + 1}", [(a, b)]) for a, b in combinations(models, 2)]
    return [(f"{a + 1}", [(a, b) for b in models if b != a]) for a in models]


def _strips(part: Figure | SubFigure, together: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    """For each pair of models a row, for each layer a column; cosines to the left, opposed signs to the right."""
    rows = _strip_rows(names)
    grid = part.subplots(len(stacks), 2, squeeze=False)
    titles = ("cosine", "opposed signs, %") if len(names) <= _MOST_PAIRED else ("mean cosine", "mean opposed signs, %")
    for at, (key, title, factor, scale) in enumerate(
        (("cosine", titles[0], 1, _cosine_scale(together)), ("opposed", titles[1], 100, _SHARE_SCALE))
    ):
        for line, stack in zip(grid, stacks, strict=True):
            axes, layers = line[at], _of(together["layers"], stack)
            values = [[_mean([layer[key][a][b] for a, b in pairs]) for layer in layers] for _, pairs in rows]
            labels = [label for label, _ in rows]
            if key == "opposed" and len(names) > 2:
                values.append([_mean([layer["disagreement"]]) for layer in layers])
                labels.append("any")
            axes.set_facecolor(_LIGHT)
            table = [[factor * value for value in row] for row in values]
            image = axes.imshow(table, aspect="auto", interpolation="nearest", **scale)
            _over_layers(axes, f"{title}, {_called(stack)}" if len(stacks) > 1 else title, len(layers), ticks=6)
            axes.set_xlim(-0.5, len(layers) - 0.5)
            axes.set_yticks(range(len(labels)), labels, size=9 if len(labels) <= 8 else 6)
            axes.set_ylabel("models")
            axes.tick_params(length=0)
        part.colorbar(image, ax=list(grid[:, at]), fraction=0.05, pad=0.02)


def _mean(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else math.nan
