"""A report as one page of HTML that needs nothing else: figures, tables, recipe. Every text in it is escaped."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

import yaml

from lines_cli.errors import printable
from lines_cli.inspection.tables import Bar, Cell, Section, Table, sections
from lines_cli.version import __version__

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.5rem; overflow-wrap: anywhere; }
h3 { font-size: 1rem; margin-bottom: .3rem; }
img { max-width: 100%; height: auto; } figure { margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-bottom: 1rem; }
th, td { padding: .1rem .8rem .1rem 0; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; overflow-wrap: anywhere; }
tbody tr:nth-child(odd) { background: #f5f5f5; }
th { border-bottom: 1px solid #999; }
.bar { width: 9rem; } .bar div { background: #0072b2; height: .7rem; margin-top: .4rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: 0 1rem; } dd { margin: 0; white-space: pre-wrap;
  overflow-wrap: anywhere; } dt { color: #666; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; }
.scroll { overflow-x: auto; }
"""


def page(report: Report, figures: Sequence[tuple[str, bytes]]) -> str:
    """The page.

    Args:
        report: from `lines_cli.inspection.report.make_report`.
        figures: each with its title, as SVG.
    """
    first, *others = sections(report, full=True)
    title = _text(first.title)
    parts = [
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style>',
        "</head>\n<body>",
        f"<h1>{title}</h1>",
        _facts(first),
        *(_figure(caption, svg) for caption, svg in figures),
        *map(_table, first.tables),
        *(f"<h2>{_text(section.title)}</h2>\n{_facts(section)}\n{_tables(section)}" for section in others),
        *_recipe(report),
        *_notes(report["notes"]),
        f"<p>Drawn by lines {__version__}.</p>\n</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _text(text: str) -> str:
    """Any name as harmless text, on one line."""
    return escape(printable(text))


def _figure(caption: str, svg: bytes) -> str:
    source = f"data:image/svg+xml;base64,{b64encode(svg).decode()}"
    return f'<figure><img src="{source}" alt="{_text(caption)}"></figure>'


def _facts(section: Section) -> str:
    facts = ((word, "\n".join(map(_text, lines))) for word, lines in section.facts)
    rows = "".join(f"<dt>{_text(word)}</dt><dd>{text}</dd>" for word, text in facts)
    return f"<dl>{rows}</dl>" if rows else ""


def _tables(section: Section) -> str:
    return "\n".join(map(_table, section.tables))


def _table(titled: tuple[str, Table]) -> str:
    title, table = titled
    head = "".join(f"<th>{_text(heading)}</th>" for heading in table.headings)
    rows = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    above = f"<h3>{_text(title)}</h3>\n" if title else ""
    body = f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table>"
    return f'{above}<div class="scroll">{body}</div>'


def _cell(cell: Cell) -> str:
    if isinstance(cell, Bar):
        return f'<td class="bar"><div style="width:{100 * cell.share:.1f}%"></div></td>'
    return f"<td>{_text(cell)}</td>"


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


def _notes(notes: Sequence[str]) -> list[str]:
    if not notes:
        return []
    items = "".join(f"<li>{'<br>'.join(map(_text, note.splitlines()))}</li>" for note in notes)
    return [f"<h2>Notes</h2>\n<ul>{items}</ul>"]
