"""A report as one page of HTML that needs nothing else: figures, tables, recipe, digests. Every text in it is escaped.

It reads the same without its script, which sorts, switches and shows values (page.js). A policy in the page lets
nothing run or load but that script and its style sheet, by their digests.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING

import yaml

from lines_cli.errors import printable
from lines_cli.inspection.figures import figures, key
from lines_cli.inspection.series import called, short_names
from lines_cli.inspection.tables import Bar, Cell, Quantity, Section, Table, sections, size
from lines_cli.version import __version__

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report


def page(report: Report) -> str:
    """The page, the same for the same report.

    Args:
        report: from `lines_cli.inspection.report.make_report`.
    """
    first, *others = sections(report, full=True)
    stacks = [stack["name"] for stack in report["stacks"]]
    tunes = report.get("fine_tunes", [])
    title = _text(first.title if len(tunes) < 2 else f"{len(tunes)} fine-tunes of {report['base']}")
    style, script = (
        (files("lines_cli.inspection") / name).read_text(encoding="utf-8").strip() for name in ("page.css", "page.js")
    )
    allowed = f"script-src {_hash(script)}; style-src {_hash(style)}"
    policy = f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"
    parts = [
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}</title>\n<style>{style}</style>\n</head>\n<body>",
        f"<header><h1>{title}</h1></header>\n<main>",
        _facts(first),
        *_switches(report, stacks),
        _figures(report),
        *(_table(titled, stacks) for titled in first.tables),
        *(_section(section, stacks) for section in others),
        *_recipe(report),
        *_digests(report),
        *_notes(report["notes"]),
        f"</main>\n<footer>Drawn by lines {__version__}.</footer>\n<script>{script}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


def _text(text: str) -> str:
    """Any name as harmless text, on one line."""
    return escape(printable(text))


def _switches(report: Report, stacks: Sequence[str]) -> Iterable[str]:
    """A legend of the fine-tunes, and boxes that page.js makes work."""
    names = short_names([tune["model"] for tune in report.get("fine_tunes", [])])
    for kind, legend, found in (("model", "Fine-tunes", names), ("stack", "Stacks", [called(name) for name in stacks])):
        if len(found) < 2:
            continue
        boxes = (
            f'<label><input type="checkbox" checked hidden autocomplete="off" data-switch="{kind}" value="{at}">'
            f"{key(at) if kind == 'model' else ''}{_text(name)}</label>"
            for at, name in enumerate(found)
        )
        hidden = "" if kind == "model" else " hidden"
        yield f"<fieldset{hidden}><legend>{legend}</legend>{''.join(boxes)}</fieldset>"


def _figures(report: Report) -> str:
    drawn = "\n".join(figures(report))
    none = "" if report["stacks"] else "<p>No stack of layers was found, so there is no depth to draw over.</p>\n"
    return f'{none}<div class="figures">\n{drawn}\n</div>' if drawn else none


def _section(section: Section, stacks: Sequence[str]) -> str:
    tables = "\n".join(_table(titled, stacks) for titled in section.tables)
    return f"<h2>{_text(section.title)}</h2>\n{_facts(section)}\n{tables}"


def _facts(section: Section) -> str:
    facts = ((word, "\n".join(map(_text, lines))) for word, lines in section.facts)
    rows = "".join(f"<dt>{_text(word)}</dt><dd>{text}</dd>" for word, text in facts)
    return f"<dl>{rows}</dl>" if rows else ""


# --- tables ---


def _table(titled: tuple[str, Table], stacks: Sequence[str] = ()) -> str:
    title, table = titled
    kinds = [_kind(heading, [row[at] for row in table.rows]) for at, heading in enumerate(table.headings)]
    models = len(table.rows) if "rows" in table.models else 0
    first = len(table.headings) - (_models_across(table) if "columns" in table.models else 0)
    owners = ["" if "columns" not in table.models or at < first else _owner(at - first) for at in range(len(kinds))]
    head = "".join(
        f"<th{kind}{owner}>{_text(heading)}</th>"
        for heading, kind, owner in zip(table.headings, kinds, owners, strict=True)
    )
    rows = [
        f"<tr{_owner(at) if models else ''}>"
        + "".join(_cell(cell, kind, owner) for cell, kind, owner in zip(row, kinds, owners, strict=True))
        + "</tr>"
        for at, row in enumerate(table.rows)
    ]
    foot = f"\n<tfoot>\n{rows.pop()}\n</tfoot>" if table.total else ""
    body = "\n".join(rows)
    above = f"<h3>{_text(title)}</h3>\n" if title else ""
    stack = f' data-stack="{stacks.index(table.stack)}"' if table.stack in stacks else ""
    inside = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>{foot}\n</table>"
    return f'<div class="table"{stack}>{above}<div class="scroll">{inside}</div></div>'


def _models_across(table: Table) -> int:
    """The number of columns that are of one fine-tune each: their headings are 1, 2, ..."""
    return sum(heading.isdecimal() for heading in table.headings)


def _owner(model: int) -> str:
    return f' data-model="{model}"'


def _kind(heading: str, column: Sequence[Cell]) -> str:
    """The class of a column: numbers, bars, or digests."""
    if heading == "digest":
        return ' class="digest"'
    if any(isinstance(cell, Bar) for cell in column):
        return ' class="bar-cell"'
    return ' class="n"' if any(isinstance(cell, Quantity) for cell in column) else ""


def _cell(cell: Cell, kind: str, owner: str) -> str:
    if isinstance(cell, Bar):
        bar = f'<rect width="{100 * cell.share:.1f}" height="10"/>'
        drawn = f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">{bar}</svg>'
        return f"<td{kind}{owner}>{drawn}</td>"
    value = f' data-value="{cell.value!r}"' if isinstance(cell, Quantity) and cell.value is not None else ""
    return f"<td{kind}{owner}{value}>{_text(cell)}</td>"


# --- what stands below ---


def _recipe(report: Report) -> list[str]:
    """The recipe that made what is inspected, or that would make what is shown as scaled."""
    title, recipe = "The recipe that made it", report["recipe"]
    if "merge" in report:
        several = len(report["fine_tunes"]) > 1
        title, recipe = f"The recipe for this {'merge' if several else 'scaling'}", report["merge"]
    if recipe is None:
        return []
    lines = yaml.safe_dump(recipe, sort_keys=False, width=100).splitlines()
    return [f"<h2>{title}</h2>", "<pre>" + "\n".join(map(_text, lines)) + "</pre>"]


def _digests(report: Report) -> Iterable[str]:
    """What the recipe of an output records of the files that were read and written."""
    digests = report.get("digests")
    if digests is None:
        return
    yield "<h2>Digests, as its recipe records them</h2>"
    if digests["run"] is not None:
        yield f'<dl><dt>run</dt><dd class="digest">{_text(digests["run"])}</dd></dl>'
    for title in ("read", "written"):
        rows = tuple(
            (
                row["file"],
                Quantity("-", None) if row["bytes"] is None else size(row["bytes"]),
                row["digest"] or (f"of its header: {row['header']}" if row.get("header") else "-"),
            )
            for row in digests[title]
        )
        if rows:
            yield _table((title, Table(("file", "bytes", "digest"), rows)))


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    items = "".join(f"<li>{'<br>'.join(map(_text, note.splitlines()))}</li>" for note in notes)
    return [f"<h2>Notes</h2>\n<ul>{items}</ul>"]
