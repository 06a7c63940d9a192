"""What a person sees: tables and JSON on stdout, progress, hints and errors on stderr. The only user of rich."""

from __future__ import annotations

import json as json_format
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

from lines_cli.api import summary
from lines_cli.errors import in_short, printable, without_secrets
from lines_cli.inspection.tables import Bar, Cell, Section, coefficient, count, sections, size
from lines_cli.inspection.tables import Table as Columns
from lines_cli.plan.realised import warning_of

if TYPE_CHECKING:
    from lines_cli.engine.measure import Track
    from lines_cli.engine.verify import FileVerified, Verification
    from lines_cli.engine.write import Outcome
    from lines_cli.inspection.report import Report
    from lines_cli.plan.claim import Claim
    from lines_cli.plan.plan import Plan
    from lines_cli.plan.realised import Row
    from lines_cli.plan.resources import Resources
    from lines_cli.storage.staging import Unfinished

_MOST_NAMES = 16
_MOST_DEPTHS = 7

# Names come from strangers' files: nothing that is printed is read as rich markup.
_out = Console(markup=False, highlight=False, emoji=False)
_err = Console(markup=False, highlight=False, emoji=False, stderr=True)


def refuse(message: str, hint: str | None = None) -> None:
    """Say why the run ends, and what to do next."""
    _err.print(Text.assemble(("error: ", "bold red"), _printable(message)), soft_wrap=True)
    if hint:
        _err.print(Text.assemble(("hint: ", "bold"), _printable(hint)), soft_wrap=True)


def remark(text: str) -> None:
    """Say something by the way."""
    _notes([text])


def wrote(path: object) -> None:
    """Name a file that was written beside what the command is about."""
    _err.print(Text(_printable(f"wrote {path}")), soft_wrap=True)


def progress(*, quiet: bool) -> Track:
    """A wrapper for each pass's stream of byte counts that draws a bar on stderr; draws nothing where stderr is no
    terminal.
    """

    def track(title: str, total: int, done: Iterable[int]) -> Iterable[int]:
        return done if quiet or not _err.is_terminal else _bar(title, total, done)

    return track


def _bar(title: str, total: int, done: Iterable[int]) -> Iterator[int]:
    columns = (TextColumn(title), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("", total=total)
        for nbytes in done:
            bar.advance(task, nbytes)
            yield nbytes


def show_plan(plan: Plan, resources: Resources, *, json: bool) -> None:
    """What would be done, for `--dry-run`."""
    if json:
        _print_json(summary.of_plan(plan, resources))
        return
    _models(plan)
    _alpha(plan)
    _stacks(plan)
    _outside(plan)
    if plan.passes:
        _out.print(f"measure {', '.join(plan.passes)}: {size(plan.bytes_measured)} each time", soft_wrap=True)
    _out.print(f"read    {size(plan.bytes_read)}")
    files = f"{len(plan.outputs)} files" if len(plan.outputs) > 1 else plan.outputs[0].name
    _out.print(f"write   {size(plan.bytes_written)} to {_printable(str(plan.output))} ({files})", soft_wrap=True)
    if plan.sidecars:
        _out.print("beside  " + ", ".join(_printable(sidecar.name) for sidecar in plan.sidecars))
    _out.print(
        f"memory  about {size(plan.peak_memory(resources))}, without CUDA; "
        f"{size(plan.buffer_bytes(resources))} of it buffers of {resources.threads} workers"
    )
    _notes(plan.notes)
    _err.print("Nothing was written (--dry-run).", style="dim")


def show_finished(plan: Plan, *, verified: bool, json: bool, quiet: bool) -> None:
    """That there is nothing left to do; `verified` if the output was read back."""
    if json:
        _print_json(summary.of_finished(plan))
    elif not quiet:
        remark(
            f"{plan.output} is finished: this recipe has written it from these inputs"
            + (", and every file reads back as it was written" if verified else "")
        )


def show_cleaned(output: str, found: Unfinished | None) -> None:
    """What was removed."""
    if found is None:
        remark(f"nothing to remove: there is no unfinished run of {output}")
    else:
        if found.set_aside:
            remark(f"{output} had been moved into it, and is back in its place")
        remark(f"removed {found.folder} ({size(found.nbytes)}, {found.description})")


def show_outcome(outcome: Outcome, *, json: bool, quiet: bool) -> None:
    """What was done."""
    plan = outcome.plan
    if json:
        _print_json(summary.of_outcome(outcome))
    for found in outcome.nonfinite.values():
        _warn(found)
    _notes(outcome.remarks)
    for model in outcome.unchanged:
        name = plan.recipe.merged[model].model
        _warn(f"{name} is the base: none of the entries that were merged differs. Is it the file you mean?")
    for name, least in outcome.negative.items():
        _warn(
            f"{name} is a variance and has entries below 0 (the least is {least:.3g}), which give NaN when the model "
            "runs. Use smaller coefficients, or keep the base's: --filter running_var=0 (in a recipe lines.filter)."
        )
    for name, files in outcome.differing.items():
        _warn(f"{name} holds whole numbers, which are copied; {', '.join(files)} hold other numbers")
    if (undone := warning_of(plan, outcome.realised)) is not None:
        _warn(undone)
    if json or quiet:
        return
    _models(plan, outcome.norms, outcome.kept)
    _alpha(plan)
    _stacks(plan, outcome.realised)
    rate = (outcome.bytes_read + plan.bytes_written) / max(outcome.seconds, 1e-9)
    passes = f" in {outcome.passes} passes" if outcome.passes > 1 else ""
    written = f"wrote {size(plan.bytes_written)} in {outcome.seconds:.1f} s ({size(rate)}/s)"
    _out.print(f"read {size(outcome.bytes_read)}{passes}, {written}")
    _out.print(f"output  {_printable(str(plan.output))}", style="bold", soft_wrap=True)
    _notes(plan.notes)


def show_claim(claim: Claim) -> None:
    """What will be read: a recipe may be a stranger's."""
    inputs = (name if name == path else f"{name} ({in_short(path)})" for name, path in claim.places.items())
    remark(f"the inputs of {claim.file}: {', '.join(inputs)}")


def show_verification(found: Verification, *, json: bool, quiet: bool) -> None:
    """Whether an output is what its recipe makes, and every difference."""
    if json:
        _print_json(found.report())
    elif not quiet:
        number = f"{len(found.files)} file{'s' if len(found.files) > 1 else ''}, {size(found.nbytes)}"
        if found.resumed:
            number += f" ({size(found.resumed)} of it by an earlier run)"
        if found.same:
            _line(f"{found.output} is what its recipe makes: {number}, compared in {found.seconds:.1f} s")
        else:
            _line(f"{found.output} is not what its recipe makes", style="bold")
            for read in found.inputs:
                if read.difference is not None:
                    _line(f"input   {in_short(read.path)}: {read.difference}")
            for file in found.files:
                for line in _differences(file):
                    _line(f"file    {file.name}: {line}")
            for name in found.unexpected:
                _line(f"file    {name}: the recipe does not make it")
            _line(f"compared {number}, in {found.seconds:.1f} s")
    if not quiet:
        _notes(found.notes)


def _differences(file: FileVerified) -> Iterator[str]:
    """What there is to say of a file, line by line; nothing of one that is as it should be."""
    if file.problem is not None:
        yield file.problem
    if (at := file.difference) is not None:
        where = f"block {at.block + 1:,} of {at.blocks:,} (bytes {at.start:,} to {max(at.start, at.end - 1):,})"
        what = f"tensor {at.tensor}, entry {at.entry:,}" if at.tensor is not None else ""
        what = f"its header; {at.header}" if at.header is not None else what
        yield f"differs first at byte {at.byte:,} in {where}{': ' if what else ''}{what}"
        if at.differing > 1:
            yield f"{at.differing:,} blocks differ"
    if file.same and not file.as_claimed:
        yield "is what the recipe makes, but the record says something else"
    elif file.made_as_recorded and file.still_as_recorded is False:
        yield "was changed after it was written: the recipe makes what is recorded"
    elif file.made_as_recorded is False and file.still_as_recorded:
        yield "is as it was written, but the recipe makes something else"
    elif file.made_as_recorded is False and file.still_as_recorded is False:
        yield "is neither what was written nor what the recipe makes, and those two differ as well"


def show_report(report: Report, *, json: bool, full: bool) -> None:
    """What was inspected."""
    if json:
        _print_json(report)
        return
    for at, section in enumerate(sections(report, full=full)):
        if at:
            _out.print()
        _section(section)
    _notes(report["notes"])


def _section(section: Section) -> None:
    _line(section.title, style="bold")
    width = max((len(word) for word, _ in section.facts), default=0)
    for word, lines in section.facts:
        for at, line in enumerate(lines):
            before = f"{'' if at else word:<{width}}   " if word else ""
            _line(before + line)
    for title, table in section.tables:
        if title:
            _out.print()
            _line(title, style="bold")
        _columns(table)


def _columns(table: Columns) -> None:
    """A table, as wide as it has to be; a first column that would not fit is broken, never a number."""
    rows = [[_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    bars = [not heading for heading in table.headings]
    widths = [_BAR if bar and at else width for at, (bar, width) in enumerate(zip(bars, widths, strict=True))]
    rest = sum(widths[1:]) + 2 * (len(widths) - 1)
    first = max(_NARROWEST, min(widths[0], _out.width - rest))
    for number, row in enumerate(rows):
        cells = [cell.ljust(w) if bar else cell.rjust(w) for cell, w, bar in zip(row, widths, bars, strict=True)][1:]
        name = [row[0][at : at + first] for at in range(0, len(row[0]), first)] or [""]
        line = "  ".join([name[0].ljust(min(first, widths[0])), *cells]).rstrip()
        _line(line, style=None if number else "bold")
        for more in name[1:]:
            _line(more)


_BAR, _NARROWEST = 12, 12  # characters


def _line(text: str, *, style: str | None = None) -> None:
    """One line that is never broken. A plain one goes by rich, which takes a while over 100,000 of them."""
    if style is None:
        _out.file.write(f"{printable(text)}\n")
    else:
        _out.print(printable(text), style=style, soft_wrap=True)


def _cell(cell: Cell) -> str:
    if not isinstance(cell, Bar):
        return printable(cell)
    eighths = round(cell.share * _BAR * 8)
    if not _out.encoding.lower().startswith("utf"):
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _warn(text: str) -> None:
    _err.print(Text.assemble(("warning: ", "bold yellow"), _printable(text)), soft_wrap=True)


def _models(plan: Plan, norms: Sequence[float] = (), kept: Sequence[float] = ()) -> None:
    """The models of a merge: what is said of each, the share of entries kept, and the L2 norm of the task vector."""
    models = plan.models()
    if len(models) == 1 and plan.inputs.of_an_edit:
        return
    for number, model in enumerate(models):
        model["kept"] = kept[number] if kept else model["kept"]
        model["norm"] = norms[number] if norms else None
    columns = [key for key in models[0] if key != "model" and any(model[key] is not None for model in models)]
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column(plan.recipe.merge_method, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right")
    shown = {"kept": "{:.2%}".format, "norm": "{:.4g}".format}
    for model in models:
        cells = ["" if model[key] is None else shown.get(key, _span)(model[key]) for key in columns]
        table.add_row(_printable(os.path.normpath(model["model"])), *cells)
    _out.print(table)
    if settings := plan.settings():
        said = (
            f"{key} {_span(value) if isinstance(value, list) else _plain(value)}" for key, value in settings.items()
        )
        _out.print(f"with    {', '.join(said)}", soft_wrap=True)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()


def _span(ends: list[float]) -> str:
    return f"{ends[0]:.4g}" if ends[0] == ends[1] else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _alpha(plan: Plan) -> None:
    """How alpha was chosen, where the recipe leaves it open."""
    if plan.recipe.lines is None or not plan.recipe.lines.needs_alpha:
        return
    models, norms, alpha = plan.number_of_models, plan.statistics.norms, plan.alpha
    if alpha is None:
        what = "L1 norm of the sum / L1 norm of the merged task vector"
        _out.print(f"alpha   auto: 1/{models} * {what}, to be measured", soft_wrap=True)
    elif norms is None:
        _out.print(f"alpha   {alpha:.6g} = 1/{models}: the merged task vector is the sum")
    else:
        _out.print(
            f"alpha   {alpha:.6g} = 1/{models} * {norms.total:.6g} / {norms.merged:.6g}: "
            "L1 norms of the sum and of the merged task vector",
            soft_wrap=True,
        )


def _stacks(plan: Plan, realised: Sequence[Row] = ()) -> None:
    """The stacks with their coefficients; and once it is known, what rounding left of these."""
    found, left = plan.summary(), summary.of_realised(plan, realised)
    layers = {(layer["stack"], layer["index"]): layer["realised"] for layer in left["layers"]}
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
    table.add_column("stack", overflow="fold")
    for heading in ("layers", "tensors", "parameters", "first", "last"):
        table.add_column(heading, justify="right")
    if realised:
        table.add_column("realised", justify="right")

    def add_row(name: str, number: str, group: Mapping[str, Any], ends: Sequence[Any], of_it: Sequence[Any]) -> None:
        cells = [number, f"{group['tensors']:,}", count(group["parameters"]), *map(_coefficient, ends)]
        table.add_row(name, *cells, *([" to ".join(dict.fromkeys(map(_realised, of_it)))] if realised else []))

    for stack in found["stacks"]:
        of_it = [layers.get((stack["name"], index)) for index in (0, stack["layers"] - 1)]
        name = _printable(stack["name"]) or "(no prefix)"
        add_row(name, f"{stack['layers']}", stack, (stack["first"], stack["last"]), of_it)
    outside = found["outside"]
    add_row(
        "outside the blocks",
        "",
        outside,
        (outside["first"], outside["last"]),
        [left["realised"]["outside"]["realised"]],
    )
    for rule, of_rule in zip(found["filters"], left["realised"]["filters"], strict=True):
        ends = (rule["coefficient"],) * 2
        add_row(f"names with {printable(rule['pattern'])}", "", rule, ends, [of_rule["realised"]])
    _out.print(table)
    for stack in found["stacks"]:
        values = stack["coefficients"]
        of_it = [layers.get((stack["name"], index)) for index in range(len(values))]
        if len(set(values)) > 2 or len({round(value, 2) for value in of_it if value is not None}) > 2:
            shown = sorted({round(at * (len(values) - 1) / (_MOST_DEPTHS - 1)) for at in range(_MOST_DEPTHS)})
            lines = [("by layer", [f"{index}: {values[index]:.3g}" for index in shown])]
            if realised:
                lines.append(("realised", [f"{index}: {_realised(of_it[index])}" for index in shown]))
            widths = [max(len(cells[at]) for _, cells in lines) for at in range(len(shown))]
            name = f"  ({printable(stack['name'])})" if len(found["stacks"]) > 1 else ""
            for word, cells in lines:
                depths = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
                _out.print(f"{word}  {depths}{name}", soft_wrap=True)
    edited, copied = found["edited"], found["copied"]
    _out.print(
        f"edited {edited['tensors']:,} tensors ({count(edited['parameters'])} parameters), "
        f"copied {copied['tensors']:,} ({count(copied['parameters'])})"
    )


def _coefficient(value: float | None) -> str:
    return "auto" if value is None else coefficient(value)


def _realised(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _outside(plan: Plan) -> None:
    """The tensors outside the blocks, each with its coefficient."""
    lines = [
        f"{_coefficient(place['coefficient']):>8}  {printable(place['name'])}"
        for place in plan.map()
        if place["stack"] is None
    ]
    if lines:
        _out.print("outside:")
    for line in lines[:_MOST_NAMES]:
        _out.print(line, soft_wrap=True)
    if len(lines) > _MOST_NAMES:
        _out.print(f"     ...  {len(lines) - _MOST_NAMES:,} more (all in --json)")


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        _err.print(Text.assemble(("note: ", "bold"), _printable(note)), soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    text = json_format.dumps(value, indent=2, allow_nan=False)
    _out.file.write(text.replace("\x7f", "\\u007f") + "\n")  # escaped is all but DEL


def _printable(text: str) -> str:
    """Text that holds no secret and cannot steer the terminal: line breaks stay, and what follows one is indented."""
    return "\n  ".join(printable(line.removeprefix("  ")) for line in without_secrets(text).split("\n"))
