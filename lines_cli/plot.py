"""A report in pictures: SVG, PNG, or one page of HTML. The only user of matplotlib, which is an extra.

Colours are those of Okabe and Ito (2008), which people with any colour vision can tell apart; every line also has a
marker of its own.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lines_cli.errors import OutputError, RecipeError, printable
from lines_cli.page import page
from lines_cli.report import Report

try:
    import matplotlib as mpl
    from matplotlib.figure import Figure, SubFigure
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    if error.name != "matplotlib":
        raise
    raise RecipeError(
        "--plot draws with matplotlib, which is not installed", hint='Install it: pip install "lines-cli[plot]"'
    ) from error

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D31")
_MARKERS = "osD^vPX*"
_GREY, _PALE = "0.35", "#9ecae1"
_WIDTH, _ROW = 9.0, 2.7  # inches
_STYLE: Any = {
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
        inputs: files that it must not replace.

    Raises:
        RecipeError: it ends in something else.
        OutputError: it cannot be written there, or is an input.
    """

    def __init__(self, path: Path, *, inputs: Sequence[Path] = ()) -> None:
        self.path = path
        if path.suffix not in (".svg", ".png", ".html"):
            raise RecipeError(
                f"--plot {path}: drawn is SVG, PNG or HTML", hint="Name a file that ends in .svg, .png or .html."
            )
        if not path.parent.is_dir():
            raise OutputError(f"--plot {path}: there is no folder {path.parent}", hint="Make it first.")
        if path.is_dir() or any(path.exists() and path.samefile(file) for file in inputs):
            raise OutputError(
                f"--plot {path}: {'a folder' if path.is_dir() else 'an input'}", hint="Name another file."
            )

    def save(self, told: Report) -> None:
        """Draw and write it; the file appears whole or not at all, and replaces an older one.

        Raises:
            OutputError: it cannot be written.
        """
        with mpl.rc_context(_STYLE), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a glyph that the font lacks is drawn as a box
            shown = panels(told)
            if self.path.suffix == ".html":
                figures = [(panel.title, _render([panel], "svg")) for panel in shown]
                content = page(told, figures).encode()
            else:
                content = _render(shown, self.path.suffix[1:])
        staged = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        try:
            staged.write_bytes(content)
            os.replace(staged, self.path)
        except OSError as error:
            with suppress(OSError):
                staged.unlink()
            raise OutputError(f"--plot {self.path}: cannot be written: {error.strerror or error}") from error


def _render(shown: Sequence[Panel], form: str) -> bytes:
    """The panels below each other, as bytes of a file."""
    heights = [panel.height for panel in shown]
    figure = Figure(figsize=(_WIDTH, sum(heights)), layout="constrained")
    below: list[Any] = list(figure.subfigures(len(shown), 1, height_ratios=heights, squeeze=False)[:, 0])
    for panel, part in zip(shown, below, strict=True):
        part.suptitle(panel.title)
        panel.draw(part)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=form, metadata={"Date": None} if form == "svg" else {"Software": None})
    return buffer.getvalue()


def panels(told: Report) -> list[Panel]:
    """What there is to draw of a report."""
    tunes = told.get("fine_tunes", [])
    stacks = [stack["name"] for stack in told["stacks"]]
    if not stacks:
        what = "No stack of layers was found: there is no depth to draw over"
        return [Panel(what, 1.0, lambda _: None)]
    rows = math.ceil(len(stacks) / 2) * _ROW + 0.9
    if not tunes:
        return [Panel("Parameters and coefficients by depth", rows, lambda part: _parameters(part, told, stacks))]
    names = _short_names([tune["model"] for tune in tunes])
    found = [
        Panel("Norm of the update by depth", rows, lambda part: _updates(part, told, stacks, names)),
        Panel(
            "Before and after LiNeS", len(tunes) * _ROW + 0.9, lambda part: _before_and_after(part, told, stacks, names)
        ),
    ]
    if together := told.get("together"):
        side = 0.45 * len(names) + 2.2
        pairs = len(list(combinations(names, 2)))
        strip = 0.28 * (pairs + 1) + 1.3
        found += [
            Panel("Whole models, pair by pair", side, lambda part: _matrices(part, together, names)),
            Panel("Layer by layer, pair by pair", 2 * strip + 0.3, lambda part: _strips(part, together, stacks, names)),
        ]
    return found


def _short_names(models: Sequence[str]) -> list[str]:
    """The last part of each path, not too long; numbered where there are several."""
    last = [printable(os.path.basename(os.path.normpath(model))) for model in models]
    cut = [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in last]
    return [f"{at} {name}" for at, name in enumerate(cut, 1)] if len(cut) > 1 else cut


_LONGEST = 28


def _of(rows: Sequence[Report], stack: str) -> list[Report]:
    return [row for row in rows if row["stack"] == stack]


def _values(rows: Sequence[Report], key: str) -> list[float]:
    return [math.nan if row[key] is None else row[key] for row in rows]


def _grid(part: Figure | SubFigure, number: int) -> list[Axes]:
    """Axes two abreast, for each of a number of stacks."""
    columns = min(2, number)
    rows = math.ceil(number / columns)
    axes: list[Axes] = list(part.subplots(rows, columns, squeeze=False).flat)
    for spare in axes[number:]:
        spare.set_visible(False)
    return axes[:number]


def _layers(axes: Axes, stack: str | None, number: int) -> None:
    """Layers from left to right, under their stack's name."""
    if stack is not None:
        axes.set_title(printable(stack) or "(no prefix)")
    axes.set_xlabel("layer")
    axes.set_xlim(-0.6, number - 0.4)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _coefficients(axes: Axes, layers: Sequence[Report]) -> Any:
    """The coefficient's line over what is drawn, on a scale of its own at the right."""
    values = _values(layers, "coefficient")
    right = axes.twinx()
    (line,) = right.plot(range(len(values)), values, color=_GREY, linestyle="--", linewidth=1.5, label="coefficient")
    right.set_ylim(min(0.0, *values) * 1.08, max(0.0, *values) * 1.08 or 1.0)
    right.set_ylabel("coefficient", color=_GREY)
    right.spines["right"].set_visible(True)
    right.spines["right"].set_color(_GREY)
    right.tick_params(axis="y", colors=_GREY)
    return line


def _legend(part: Figure | SubFigure, handles: Sequence[Any]) -> None:
    columns = min(len(handles), 3)
    part.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def _parameters(part: Figure | SubFigure, told: Report, stacks: Sequence[str]) -> None:
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        layers = _of(told["layers"], stack)
        bars = axes.bar(range(len(layers)), _values(layers, "parameters"), color=_PALE, label="parameters")
        axes.set_ylabel("parameters")
        _layers(axes, stack, len(layers))
        line = _coefficients(axes, layers)
    _legend(part, [bars, line])


def _updates(part: Figure | SubFigure, told: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    handles: list[Any] = []
    for axes, stack in zip(_grid(part, len(stacks)), stacks, strict=True):
        handles = []
        for at, (tune, name) in enumerate(zip(told["fine_tunes"], names, strict=True)):
            layers = _of(tune["layers"], stack)
            style: dict[str, Any] = {
                "color": _COLOURS[at % 8],
                "marker": _MARKERS[at % 8],
                "markevery": max(1, len(layers) // 12),
            }
            norms = _values(layers, "update_norm")
            dashes = "-" if at < 8 else ":"
            handles += axes.plot(norms, label=name, markersize=4, linewidth=1.5, linestyle=dashes, **style)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("norm of the update")
        _layers(axes, stack, len(_of(told["layers"], stack)))
        handles.append(_coefficients(axes, _of(told["layers"], stack)))
    _legend(part, handles)


def _before_and_after(part: Figure | SubFigure, told: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    grid = part.subplots(len(names), len(stacks), squeeze=False, sharex="col", sharey="row")
    for at, (row, tune, name) in enumerate(zip(grid, told["fine_tunes"], names, strict=True)):
        for axes, stack in zip(row, stacks, strict=True):
            layers = _of(tune["layers"], stack)
            before = axes.bar(range(len(layers)), _values(layers, "update_norm"), color=_PALE, label="before")
            scaled = _values(layers, "scaled_norm")
            after = axes.bar(range(len(layers)), scaled, width=0.45, color=_COLOURS[0], label="after LiNeS")
            _layers(axes, None if at else stack, len(layers))
            axes.label_outer()
        row[0].set_ylabel(f"{name}\nnorm of the update" if len(names) > 1 else "norm of the update")
    _legend(part, [before, after])


def _matrices(part: Figure | SubFigure, together: Report, names: Sequence[str]) -> None:
    left, right = part.subplots(1, 2)
    cosine = [[math.nan if value is None else value for value in row] for row in together["cosine"]]
    opposed = [[math.nan if value is None else 100 * value for value in row] for row in together["opposed"]]
    _heat(left, cosine, "cosine similarity", names, 2, cmap="PuOr_r", vmin=-1, vmax=1)
    most = max((value for row in opposed for value in row if value == value), default=0)  # noqa: PLR0124 - NaN is not
    title = "entries with opposed signs, %"
    _heat(right, opposed, title, names, 1, cmap="Blues", vmin=0, vmax=max(most, 1))
    right.set_yticklabels([])


def _heat(axes: Axes, values: list[list[float]], title: str, names: Sequence[str], digits: int, **scale: Any) -> None:
    image = axes.imshow(values, aspect="equal", **scale)
    axes.set_title(title)
    numbers = [name.partition(" ")[0] for name in names]
    axes.set_xticks(range(len(names)), numbers)
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(length=0)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                dark = sum(image.cmap(float(image.norm(value)))[:3]) < 1.5  # type: ignore[arg-type]
                size = 8 if len(names) <= 8 else 6
                axes.text(
                    x,
                    y,
                    f"{round(value, digits) + 0.0:.{digits}f}",
                    ha="center",
                    va="center",
                    size=size,
                    color="white" if dark else "black",
                )


def _strips(part: Figure | SubFigure, together: Report, stacks: Sequence[str], names: Sequence[str]) -> None:
    """For each pair of models a row, for each layer a column."""
    pairs = list(combinations(range(len(names)), 2))
    widths = [max(4, len(_of(together["layers"], stack))) for stack in stacks]
    grid = part.subplots(2, len(stacks), squeeze=False, width_ratios=widths)
    labels = [f"{a + 1}, {b + 1}" for a, b in pairs]
    for row, key, title, factor in zip(
        grid, ("cosine", "opposed"), ("cosine", "opposed signs, %"), (1, 100), strict=True
    ):
        found = []
        for stack in stacks:
            layers = _of(together["layers"], stack)
            table = [[layer[key][a][b] for layer in layers] for a, b in pairs]
            if key == "opposed":
                table.append([layer["disagreement"] for layer in layers])
            found.append([[math.nan if value is None else factor * value for value in line] for line in table])
        every = [abs(v) for table in found for line in table for v in line if math.isfinite(v)]
        most = max(every, default=0.0) or 1.0
        scale: dict[str, Any] = {"cmap": "Blues", "vmin": 0, "vmax": most}
        if key == "cosine":
            most = min(1.0, max(most, 0.1))
            scale = {"cmap": "PuOr_r", "vmin": -most, "vmax": most}
        for axes, stack, table in zip(row, stacks, found, strict=True):
            image = axes.imshow(table, aspect="auto", interpolation="nearest", **scale)
            _layers(axes, stack if key == "cosine" else None, len(table[0]))
            axes.set_xlim(-0.5, len(table[0]) - 0.5)
            axes.set_yticks(range(len(table)), [*labels, "any"][: len(table)])
            axes.tick_params(length=0)
            if key == "cosine":
                axes.set_xlabel("")
        part.colorbar(image, ax=list(row), label=title, fraction=0.04, pad=0.01)
        row[0].set_ylabel("models")
