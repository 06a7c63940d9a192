"""Draws what the demo measured, as one SVG that is readable on light and on dark pages; plain text, no library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 920, 320
TOP, BOTTOM = 84, 262  # of both panels' plots
STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #24292f }
  .title { font-size: 15px; font-weight: 600 }
  .small { font-size: 12px; fill: #57606a }
  .page { fill: #ffffff; stroke: #d0d7de }
  .grid { stroke: #d8dee4 }
  .before { fill: #d0d7de }
  .after { fill: #0969da }
  .task { stroke: #bc4c00; fill: #bc4c00 }
  .known { stroke: #0969da; fill: #0969da }
  polyline.task, polyline.known { fill: none; stroke-width: 2.5 }
  text.task, text.known { stroke: none; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3 }
    .small { fill: #9ea7b3 }
    .page { fill: #0d1117; stroke: #30363d }
    .grid { stroke: #30363d }
    .before { fill: #484f58 }
    .after { fill: #4493f8 }
    .task { stroke: #f0883e; fill: #f0883e }
    .known { stroke: #4493f8; fill: #4493f8 }
  }
"""


@dataclass(frozen=True)
class Curve:
    """Per cent of images right, at each stage: pre-trained, fine-tuned, edited."""

    name: str
    css: str
    values: Sequence[float]


def draw(
    path: Path, before: Sequence[float], after: Sequence[float], task: Sequence[float], known: Sequence[float]
) -> None:
    """Write the picture.

    Args:
        path: an .svg file.
        before: L2 norm of the fine-tune's update in each block, first to last.
        after: the same after the edit.
        task: per cent right on the task: pre-trained, fine-tuned, edited.
        known: the same on what the model knew before.
    """
    curves = [Curve("the new task", "task", task), Curve("what it knew before", "known", known)]
    body = [*_blocks(before, after), *_accuracy(curves)]
    said = (
        f"Left: the update of {len(before)} blocks, fine-tuned and after lines edit. Right: per cent of images right, "
        "pre-trained, fine-tuned, edited: "
        + "; ".join(f"{curve.name} {', '.join(f'{value:.1f}' for value in curve.values)}" for curve in curves)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'role="img" aria-label="{escape(said)}">\n<style>{STYLE}</style>\n'
        f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="8"/>\n'
        + "\n".join(body)
        + "\n</svg>\n",
        encoding="utf-8",
    )


def _text(x: float, y: float, text: str, css: str = "", anchor: str = "start") -> str:
    kind = f' class="{css}"' if css else ""
    return f'<text{kind} x="{x:g}" y="{y:g}" text-anchor="{anchor}">{escape(text)}</text>'


def _blocks(before: Sequence[float], after: Sequence[float]) -> list[str]:
    """Bars, one for each block."""
    left, right = 30, 390
    step, most = (right - left) / len(before), max(*before, *after)
    parts = [_text(left, 34, "What stays of the update", "title")]
    parts += [
        f'<rect class="before" x="{left}" y="49" width="11" height="11"/>',
        _text(left + 17, 59, "fine-tuned", "small"),
    ]
    parts += [f'<rect class="after" x="{left + 100}" y="49" width="11" height="11"/>']
    parts += [_text(left + 117, 59, "after lines edit", "small")]
    for number, sizes in enumerate(zip(before, after, strict=True)):
        x = left + number * step
        for css, value in zip(("before", "after"), sizes, strict=True):
            height = (BOTTOM - TOP) * value / most
            place = f'x="{x:.1f}" y="{BOTTOM - height:.1f}" width="{step - 6:.1f}" height="{height:.1f}"'
            parts.append(f'<rect class="{css}" {place}/>')
        parts.append(_text(round(x + (step - 6) / 2, 1), BOTTOM + 17, f"{number + 1}", "small", "middle"))
    parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{BOTTOM}" y2="{BOTTOM}"/>')
    parts.append(_text(left, BOTTOM + 40, "block, first to last; height: L2 norm of its update", "small"))
    return parts


def _accuracy(curves: Sequence[Curve]) -> list[str]:
    """A line for each curve, over the three stages; its name stands at its end."""
    left, right = 470, 744
    columns = [left + 40, (left + right) / 2, right - 40]
    low, high = 10 * int((min(min(curve.values) for curve in curves) - 4) // 10), 100

    def height(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * (value - low) / (high - low), 1)

    parts = [_text(left - 26, 34, "What the model then gets right", "title")]
    parts.append(_text(left - 26, 59, "% of test images", "small"))
    for mark in range(low, high + 1, 10):
        y = height(mark)
        parts.append(f'<line class="grid" x1="{left}" x2="{right}" y1="{y}" y2="{y}"/>')
        parts.append(_text(left - 6, y + 4, f"{mark}", "small", "end"))
    for x, name in zip(columns, ("pre-trained", "fine-tuned", "lines edit"), strict=True):
        parts.append(_text(x, BOTTOM + 17, name, anchor="middle"))
    for curve in curves:
        points = [(x, height(value)) for x, value in zip(columns, curve.values, strict=True)]
        parts.append(f'<polyline class="{curve.css}" points="{" ".join(f"{x:g},{y:g}" for x, y in points)}"/>')
        for at, (x, y) in enumerate(points):
            above = curve.values[at] == max(other.values[at] for other in curves)
            parts.append(f'<circle class="{curve.css}" cx="{x:g}" cy="{y:g}" r="4.5"/>')
            parts.append(_text(x, y + (-11 if above else 21), f"{curve.values[at]:.1f}", curve.css, "middle"))
        parts.append(_text(right + 6, points[-1][1] + 4, curve.name, curve.css))
    return parts
