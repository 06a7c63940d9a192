"""Figures as SVG, readable on light and on dark pages: plain text, no library, in the style of the demo's picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .small { font-size: 12px; fill: #57606a }
  .page { fill: #ffffff; stroke: #d0d7de }
  .grid { stroke: #d8dee4 }
  .lines { stroke: #0969da; fill: #0969da }
  .constant { stroke: #bc4c00; fill: #bc4c00 }
  .reversed { stroke: #8250df; fill: #8250df }
  .end { stroke: #57606a; fill: #57606a }
  polyline { stroke-width: 2.5 }
  polyline.lines, polyline.constant, polyline.reversed { fill: none }
  text.lines, text.constant, text.reversed { stroke: none; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #9ea7b3 }
    .page { fill: #0d1117; stroke: #30363d }
    .grid { stroke: #30363d }
    .lines { stroke: #4493f8; fill: #4493f8 }
    .constant { stroke: #f0883e; fill: #f0883e }
    .reversed { stroke: #ab7df8; fill: #ab7df8 }
    .end { stroke: #9ea7b3; fill: #9ea7b3 }
  }
"""
WIDTH, HEIGHT = 920, 420
LEFT, RIGHT, TOP, BOTTOM = 70, 690, 76, 356

Point = tuple[float, float]


def curves(
    title: str, across: str, up: str, drawn: Mapping[str, Sequence[Point]], ends: Mapping[str, Point] | None = None
) -> str:
    """Curves of one thing against another.

    Args:
        title: of the figure.
        across: what x is.
        up: what y is.
        drawn: "lines: LiNeS" -> its points: the class of a curve, and its name.
        ends: points with a name of their own.
    """
    ends = ends or {}
    everything = [point for points in drawn.values() for point in points] + list(ends.values())
    (low_x, high_x, step_x), (low_y, high_y, step_y) = (_range([point[at] for point in everything]) for at in (0, 1))

    def place(point: Point) -> Point:
        x = LEFT + (RIGHT - LEFT) * (point[0] - low_x) / (high_x - low_x)
        return round(x, 1), round(BOTTOM - (BOTTOM - TOP) * (point[1] - low_y) / (high_y - low_y), 1)

    parts = [_text(24, 34, title, "title"), _text(24, 58, up, "small")]
    for at in range(round((high_y - low_y) / step_y) + 1):
        _, y = place((low_x, low_y + at * step_y))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:g}" y2="{y:g}"/>')
        parts.append(_text(LEFT - 8, y + 4, f"{low_y + at * step_y:g}", "small", "end"))
    for at in range(round((high_x - low_x) / step_x) + 1):
        x, _ = place((low_x + at * step_x, low_y))
        parts.append(_text(x, BOTTOM + 20, f"{low_x + at * step_x:g}", "small", "middle"))
    parts.append(_text(RIGHT, BOTTOM + 44, across, "small", "end"))
    said = []
    for number, (name, points) in enumerate(drawn.items()):
        css, _, called = name.partition(": ")
        placed = [place(point) for point in points]
        parts.append(f'<polyline class="{css}" points="{" ".join(f"{x:g},{y:g}" for x, y in placed)}"/>')
        parts += [f'<circle class="{css}" cx="{x:g}" cy="{y:g}" r="4"/>' for x, y in placed]
        y = TOP + 24 * number
        parts.append(f'<circle class="{css}" cx="{RIGHT + 26}" cy="{y}" r="4"/>')
        parts.append(_text(RIGHT + 38, y + 4, called, css))
        said.append(f"{called} {', '.join(f'({x:.1f}, {y:.1f})' for x, y in points)}")
    for name, point in ends.items():
        x, y = place(point)
        parts.append(f'<circle class="end" cx="{x:g}" cy="{y:g}" r="5"/>')
        below = (TOP + BOTTOM) / 2 < y < BOTTOM - 22  # curves come to a low end from above
        parts.append(_text(x, y + 20 if below else y - 10, name, "small", "middle"))
        said.append(f"{name} ({point[0]:.1f}, {point[1]:.1f})")
    label = escape(f"{title}. {across} and {up}: {'; '.join(said)}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{label}">\n<style>{STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text{kind} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _range(values: Sequence[float]) -> tuple[float, float, float]:
    """Round numbers around some values, and the distance of marks between them."""
    spread = max(values) - min(values) or 1.0
    step = next(step for step in (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if spread / step <= 7)
    low = step * int((min(values) - 0.15 * spread) // step)
    high = -step * int(-(max(values) + 0.15 * spread) // step)
    return low, high, step
