"""A sweep as one page of HTML that needs nothing else: the verdict, target against control, the objective over the
grid, the winner's coefficients, and every trial. Every text in it is escaped; nothing in it runs or loads.
"""

from __future__ import annotations

import math
from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from html import escape
from typing import TYPE_CHECKING, Any

from lines_cli.errors import printable
from lines_cli.sweeping.expression import Expression
from lines_cli.sweeping.report import BASELINES, Judged, better_up, called
from lines_cli.sweeping.trials import LINES, shown
from lines_cli.version import __version__

if TYPE_CHECKING:
    from lines_cli.sweeping.config import Objective
    from lines_cli.sweeping.expression import Value
    from lines_cli.sweeping.run import Found

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:56rem;padding:0 1rem;color:#1c1c1c;background:#fff}
table{border-collapse:collapse;font-size:14px;display:block;overflow-x:auto}td,th{padding:.2rem .6rem;text-align:left}
th{border-bottom:1px solid #999}td.n{text-align:right;font-variant-numeric:tabular-nums}svg{max-width:100%;height:auto}
tr.w{font-weight:bold}figure{margin:1.5rem 0}figcaption{color:#555}.said{font-size:1.15rem}text{font:12px system-ui}
@media(prefers-color-scheme:dark){body{color:#e8e8e8;background:#161616}figcaption{color:#aaa}text{fill:#e8e8e8}}
"""
_COLOURS = {LINES: "#1f77b4", "constant": "#d62728", "reversed": "#2ca02c", "pre": "#888888", "ft": "#555555"}
_MARKS = {LINES: "circle", "constant": "square", "reversed": "triangle", "pre": "cross", "ft": "cross"}
_W, _H, _LEFT, _BELOW, _TOP, _RIGHT = 640, 400, 64, 52, 30, 150


def page(found: Found) -> str:
    """The page of a sweep, the same for the same trials."""
    style = _STYLE.strip()
    policy = f"default-src 'none'; style-src {_hash(style)}; base-uri 'none'; form-action 'none'"
    title = f"A sweep of {_text(found.sweep.where)}"
    objectives = found.sweep.objectives
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>\n<h1>{title}</h1>",
        f'<p class="said">{_text(str(found.said["said"]))}.</p>',
        f"<p>{'; '.join(_objective(objective) for objective in objectives)}</p>",
        *_winner(found),
        *_against(found),
        *_over_grid(found),
        *_realised(found),
        _table(found.judged, [found.winner] if found.winner else found.front, objectives),
        *(f"<p>{_text(note)}</p>" for note in found.notes),
        f"<footer>Drawn by lines {__version__}.</footer>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    return escape(printable(text))


def _objective(objective: Objective) -> str:
    return f"{'Minimized' if objective.minimize else 'Maximized'}: <code>{_text(objective.expression.text)}</code>"


def _winner(found: Found) -> Iterable[str]:
    if found.winner is not None:
        settings, objective = shown(found.winner.trial.settings), found.winner.objectives[0]
        yield f"<p>Winner of the grid: <b>{_text(settings)}</b>, {objective:.6g}.</p>"
    if found.front:
        yield "<p>Several objectives have no one winner: the trials that none beats in every objective are in bold.</p>"


# --- figures ---


def axes_of(judged: Sequence[Judged], objectives: Sequence[Objective]) -> tuple[str, str] | None:
    """Which two metrics are drawn against each other: what an objective calls control and target; else the first two
    that it asks for. None where there are no two.
    """
    metrics = next((one.metrics for one in judged if one.metrics and one.trial.family not in BASELINES), None)
    if metrics is None:
        return None
    asked = [name.split(".")[0] for objective in objectives for name in objective.expression.names]
    names = [name for name in dict.fromkeys(asked) if name in metrics]
    names += [name for name in metrics if name not in names]
    control = next((name for name in names if "control" in name), None)
    target = next((name for name in names if "target" in name and name != control), None)
    rest = [name for name in names if name not in (control, target)]
    control, target = control or (rest.pop(0) if rest else None), target or (rest.pop(0) if rest else None)
    return (control, target) if control is not None and target is not None else None


@dataclass(frozen=True)
class _Plane:
    """Two things that are drawn against each other.

    Attributes:
        names: of what goes to the right, and up.
        points: trial's id -> where it is.
        larger: of each whether larger is better.
    """

    names: tuple[str, str]
    points: Mapping[str, tuple[float, float]]
    larger: tuple[bool, bool]

    def best(self, judged: Sequence[Judged]) -> set[str]:
        """The trials that none beats in both."""
        signs = [1 if larger else -1 for larger in self.larger]
        own = [one.trial.id for one in judged if one.trial.family not in BASELINES and one.trial.id in self.points]
        at = {name: (signs[0] * self.points[name][0], signs[1] * self.points[name][1]) for name in own}
        found: set[str] = set()
        highest, last = -math.inf, None
        for name in sorted(own, key=at.__getitem__, reverse=True):  # from the right, and from the top
            if at[name][1] > highest or at[name] == last:
                found.add(name)
                highest, last = at[name][1], at[name]
        return found


def _plane(found: Found) -> _Plane | None:
    """What is drawn: target against control; of several objectives the first two."""
    objectives = found.sweep.objectives
    if len(objectives) > 1:
        at = {one.trial.id: (one.objectives[0], one.objectives[1]) for one in found.judged if one.objectives}
        names = objectives[0].expression.text, objectives[1].expression.text
        return _Plane(names, at, (not objectives[0].minimize, not objectives[1].minimize)) if at else None
    axes = axes_of(found.judged, objectives)
    if axes is None:
        return None
    x, y = axes
    both = [one for one in found.judged if one.metrics and x in one.metrics and y in one.metrics]
    if not both:
        return None
    points = {one.trial.id: (_mean((one.metrics or {})[x]), _mean((one.metrics or {})[y])) for one in both}
    known: dict[str, Value] = {}
    for one in found.judged:
        if one.trial.family in BASELINES:
            known |= {f"{name}_{one.trial.family}": value for name, value in (one.metrics or {}).items()}
    known |= both[-1].metrics or {}
    return _Plane(axes, points, (better_up(objectives[0], known, x), better_up(objectives[0], known, y)))


def _mean(value: Any) -> float:
    numbers = list(value.values()) if isinstance(value, Mapping) else value if isinstance(value, list) else [value]
    return math.fsum(numbers) / len(numbers)


def _against(found: Found) -> Iterable[str]:
    plane = _plane(found)
    if plane is None:
        return
    (x, y), points = plane.names, plane.points
    both = [one for one in found.judged if one.trial.id in points]
    best = {one.trial.id for one in found.front} or plane.best(both)
    frame = _Frame(points.values())
    shapes = [frame.axes(x, y)]
    for family in dict.fromkeys(one.trial.family for one in both):
        own = [points[one.trial.id] for one in both if one.trial.family == family]
        if family not in BASELINES and len(own) > 1 and found.sweep.search is None:
            line = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in own)
            shapes.append(f'<polyline points="{line}" fill="none" stroke="{_COLOURS[family]}" stroke-opacity="0.5"/>')
    for one in both:
        at = points[one.trial.id]
        told = f"{called(one.trial.family)}; {shown(one.trial.settings)}; {x} {at[0]:.5g}, {y} {at[1]:.5g}"
        shapes.append(frame.mark(one.trial.family, at, told, ringed=one.trial.id in best))
    if found.winner is not None and found.winner.trial.id in points:
        a, b = points[found.winner.trial.id]
        shapes.append(f'<text x="{frame.x(a) + 9:.1f}" y="{frame.y(b) - 7:.1f}">winner</text>')
    shapes.append(_legend(dict.fromkeys(one.trial.family for one in both)))
    ends = [f"{'more' if larger else 'less'} {name}" for name, larger in zip(plane.names, plane.larger, strict=True)]
    ringed = "in every objective" if found.front else f"in both ({' and '.join(ends)} is better)"
    yield _figure(f"{y} against {x}; ringed are trials that none beats {ringed}", shapes)


def _over_grid(found: Found) -> Iterable[str]:
    """Each objective over each key of the grid that is a number."""
    valid = [one for one in found.judged if one.objectives and one.trial.family == LINES]
    several = len(found.sweep.objectives) > 1
    for key in (key for key, said in found.sweep.grid.items() if not isinstance(said, Expression)):
        own = [one for one in valid if _is_number(one.trial.settings.get(key))]
        if len({one.trial.settings[key] for one in own}) < 2:
            continue
        for number, objective in enumerate(found.sweep.objectives):
            points = [(float(one.trial.settings[key]), one.objectives[number]) for one in own]
            frame = _Frame(points)
            name = objective.expression.text if several else "objective"
            shapes = [frame.axes(key, name)]
            shapes += [frame.mark(LINES, at, shown(one.trial.settings)) for one, at in zip(own, points, strict=True)]
            yield _figure(f"{name if several else 'The objective'} over {key}", shapes)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _realised(found: Found) -> Iterable[str]:
    """What rounding left of the winner's coefficients."""
    by_stack: dict[str, list[Mapping[str, Any]]] = {}
    for layer in (found.summary or {}).get("layers") or ():
        if layer["realised"] is not None:
            by_stack.setdefault(layer["stack"], []).append(layer)
    for stack, layers in by_stack.items():
        if len(layers) < 2:
            continue
        asked = [(float(layer["index"]), float(layer["coefficient"])) for layer in layers]
        held = [(float(layer["index"]), float(layer["realised"])) for layer in layers]
        frame = _Frame([*asked, *held])
        line = " ".join(f"{frame.x(a):.1f},{frame.y(b):.1f}" for a, b in asked)
        shapes = [frame.axes("layer", "coefficient"), f'<polyline points="{line}" fill="none" stroke="#888"/>']
        shapes += [frame.mark(LINES, at, f"layer {at[0]:.0f}: {at[1]:.4g}") for at in held]
        yield _figure(f"{stack} of the winner: asked (line) and realised (points)", shapes)


class _Frame:
    """Where numbers are drawn."""

    def __init__(self, points: Iterable[tuple[float, float]]) -> None:
        listed = list(points)
        self._x, self._y = (self._ends([point[axis] for point in listed]) for axis in (0, 1))

    @staticmethod
    def _ends(values: Sequence[float]) -> tuple[float, float]:
        low, high = min(values), max(values)
        room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
        return low - room, high + room

    def x(self, value: float) -> float:
        low, high = self._x
        return _LEFT + (value - low) / (high - low) * (_W - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self._y
        return _H - _BELOW - (value - low) / (high - low) * (_H - _BELOW - _TOP)

    def axes(self, below: str, beside: str) -> str:
        right, bottom = _W - _RIGHT, _H - _BELOW
        parts = [f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#888"/>']
        parts += [
            f'<text x="{self.x(at):.1f}" y="{bottom + 18}" text-anchor="middle">{at:.6g}</text>'
            for at in _ticks(*self._x)
        ]
        parts += [
            f'<text x="{_LEFT - 6}" y="{self.y(at) + 4:.1f}" text-anchor="end">{at:.6g}</text>'
            for at in _ticks(*self._y)
        ]
        parts.append(f'<text x="{(_LEFT + right) / 2:.1f}" y="{_H - 10}" text-anchor="middle">{_text(below)}</text>')
        parts.append(f'<text x="4" y="14">{_text(beside)}</text>')
        return "".join(parts)

    def mark(self, family: str, at: tuple[float, float], told: str, *, ringed: bool = False) -> str:
        x, y = self.x(at[0]), self.y(at[1])
        ring = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8" fill="none" stroke="#888"/>' if ringed else ""
        return f"<g><title>{_text(told)}</title>{ring}{_shape(family, x, y)}</g>"


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers from one end to the other, some five of them."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw)) if raw > 0 and math.isfinite(raw) else 0.0
    if not power:
        return [low, high]
    step = next(step for step in (1.0, 2.0, 2.5, 5.0, 10.0) if step * power >= raw * 0.999) * power
    first = math.ceil(low / step)
    return [round(at * step, 12 - math.floor(math.log10(step))) for at in range(first, math.floor(high / step) + 1)]


def _shape(family: str, x: float, y: float) -> str:
    colour, mark = _COLOURS[family], _MARKS[family]
    if mark == "square":
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    if mark == "triangle":
        return f'<path d="M{x:.1f} {y - 5:.1f}l5 9h-10z" fill="{colour}"/>'
    if mark == "cross":
        return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0-10l-10 10" stroke="{colour}" stroke-width="2"/>'
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'


def _legend(families: Iterable[str]) -> str:
    parts = []
    for number, family in enumerate(families):
        y = _TOP + 12 + 20 * number
        parts.append(f'{_shape(family, _W - _RIGHT + 16, y)}<text x="{_W - _RIGHT + 28}" y="{y + 4}">')
        parts.append(f"{_text(called(family))}</text>")
    return "".join(parts)


def _figure(caption: str, shapes: Sequence[str]) -> str:
    drawing = f'<svg viewBox="0 0 {_W} {_H}" width="{_W}" height="{_H}" role="img" fill="currentColor">'
    return f"<figure>{drawing}{''.join(shapes)}</svg><figcaption>{_text(caption)}</figcaption></figure>"


# --- table ---


def _table(judged: Sequence[Judged], marked: Sequence[Judged], objectives: Sequence[Objective]) -> str:
    names = list(dict.fromkeys(name for one in judged for name in one.metrics or ()))
    heads = ["family", "settings", *(o.expression.text for o in objectives), *names, "seconds"]
    rows = ["".join(f"<th>{_text(head)}</th>" for head in heads)]
    for one in judged:
        cells = [f"<td>{_text(called(one.trial.family))}</td>", f"<td>{_text(shown(one.trial.settings))}</td>"]
        if one.failure is not None:
            cells.append(f'<td colspan="{len(objectives) + len(names)}">failed: {_text(one.failure)}</td>')
        else:
            numbers = [
                f"{value:.6g}{f' ± {error:.2g}' if error is not None else ''}"
                for value, error in zip(one.objectives, one.errors, strict=True)
            ]
            numbers += [f"{_mean((one.metrics or {})[n]):.6g}" if n in (one.metrics or {}) else "" for n in names]
            cells += [f'<td class="n">{_text(number)}</td>' for number in numbers]
        cells.append(f'<td class="n">{one.seconds:.1f}</td>')
        rows.append("".join(cells))
    ids = {one.trial.id for one in marked}
    marks = [" class=w" if one.trial.id in ids else "" for one in judged]
    body = "".join(f"<tr{mark}>{row}</tr>" for mark, row in zip(marks, rows[1:], strict=True))
    return f"<h2>Trials</h2><table><tr>{rows[0]}</tr>{body}</table>"
