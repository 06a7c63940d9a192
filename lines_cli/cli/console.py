"""What a person sees: tables and JSON on stdout, progress, hints and errors on stderr. The only user of rich."""

from __future__ import annotations

import json as json_format
import os
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from lines_cli.api import summary
from lines_cli.checkpoint.formulas import Dequantised
from lines_cli.checkpoint.header import EXACT_DTYPES
from lines_cli.cli import log
from lines_cli.errors import as_argument, as_known, in_short, printable, size, tidied, without_secrets
from lines_cli.inspection.tables import Bar, Section, coefficient, count, sections
from lines_cli.inspection.tables import Table as Columns
from lines_cli.plan.adapter_plan import AdapterPlan
from lines_cli.plan.adapter_report import kept_of, layers_of, left_out
from lines_cli.plan.division import in_runs
from lines_cli.plan.realised import warning_of
from lines_cli.version import ABOUT

if TYPE_CHECKING:
    from lines_cli.engine.adapter_write import AdapterOutcome
    from lines_cli.engine.measure import Track
    from lines_cli.engine.run_parts import PartDone
    from lines_cli.engine.verify import FileVerified, Verification
    from lines_cli.engine.write import Outcome
    from lines_cli.inspection.report import Report
    from lines_cli.plan.adapter_plan import AnyPlan
    from lines_cli.plan.claim import Claim
    from lines_cli.plan.division import DividedPlan, Division
    from lines_cli.plan.plan import Plan, TensorPlan
    from lines_cli.plan.realised import Row
    from lines_cli.plan.resources import Resources
    from lines_cli.storage.staging import Unfinished
    from lines_cli.sweeping.run import Found

_MOST_NAMES = 16
_MOST_DEPTHS = 7

# Names come from strangers' files: nothing that is printed is read as rich markup.
_out = Console(markup=False, highlight=False, emoji=False)
_err = Console(markup=False, highlight=False, emoji=False, stderr=True)


def refuse(message: str, hint: str | None = None, *, code: int) -> None:
    """Say why the run ends, and what to do next; `code` is what the process ends with."""
    if (told := log.active()) is not None:
        told.event("error", code=code, message=without_secrets(message), hint=hint and without_secrets(hint))
        return
    _err.print(Text.assemble(("error: ", "bold red"), _printable(message)), soft_wrap=True)
    if hint:
        _err.print(Text.assemble(("hint: ", "bold"), _printable(hint)), soft_wrap=True)


def show_error(code: int, message: str, hint: str | None) -> None:
    """The same as JSON, where nothing has been printed on stdout yet: there is one object on it.

    Args:
        code: what the process ends with.
        message, hint: as of `refuse`.
    """
    if not getattr(_out.file, "used", False):
        error = {"code": int(code), "message": without_secrets(message), "hint": hint and without_secrets(hint)}
        _print_json({**ABOUT, "error": error})


def remark(text: str) -> None:
    """Say something by the way."""
    _notes([text])


def wrote(path: object) -> None:
    """Name a file that was written beside what the command is about."""
    if (told := log.active()) is not None:
        told.event("note", message=without_secrets(f"wrote {path}"))
        return
    _err.print(Text(_printable(f"wrote {path}")), soft_wrap=True)


def progress(*, quiet: bool) -> Track:
    """A wrapper for each pass's stream of byte counts that says on stderr how far it is: a bar on a terminal;
    elsewhere, and on a terminal without a cursor to move, a line at each tenth of a pass that takes a while; in a log
    of JSON an event at its begin, its end, and every few seconds.
    """

    def track(title: str, total: int, done: Iterable[int]) -> Iterable[int]:
        if quiet or not total:
            return done
        if (told := log.active()) is not None:
            return _in_events(told, title, total, done)
        draw = _bar if _err.is_terminal and not _err.is_dumb_terminal else _in_lines
        return draw(title, total, done)

    return track


class _Pace:
    """How far a pass is, and how fast it was in the last seconds."""

    def __init__(self, total: int) -> None:
        self.total, self.done, self.started = total, 0, _clock()
        self._seen = deque([(self.started, 0)])

    def add(self, nbytes: int) -> None:
        """So many more bytes are done."""
        self.done += nbytes
        self._seen.append((_clock(), self.done))
        while len(self._seen) > 2 and self._seen[-1][0] - self._seen[1][0] >= _AVERAGED:
            self._seen.popleft()

    @property
    def rate(self) -> float:
        """Bytes a second; 0 where that is not known yet."""
        (begun, before), (now, done) = self._seen[0], self._seen[-1]
        return (done - before) / (now - begun) if now > begun else 0.0

    def values(self) -> dict[str, float | None]:
        """Bytes that are done, of how many, how fast, and how many seconds are left; None where that is not known."""
        rate, left = self.rate, max(0, self.total - self.done)
        eta = 0.0 if not left else left / rate if rate else None
        return {"done": min(self.done, self.total), "total": self.total, "rate": rate or None, "eta": eta}

    def __str__(self) -> str:
        rate = self.rate
        said = f"{size(min(self.done, self.total))} of {size(self.total)}"
        if not rate:
            return said
        left = f", {_duration((self.total - self.done) / rate)} left" if self.done < self.total else ""
        return f"{said}, {size(rate)}/s{left}"


_clock = time.monotonic
_AVERAGED = 10.0  # seconds that the speed is the average of
_LOGGED_EVERY = 5.0  # seconds
_SILENT = 2.0  # seconds that a pass takes before a line is worth while


def _duration(seconds: float) -> str:
    """A time as people say it: `40 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes < 10 and rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


class _Said(ProgressColumn):
    """Size, speed and the time that is left, as the summary says them."""

    def __init__(self, pace: _Pace) -> None:
        super().__init__()
        self._pace = pace

    def render(self, task: Task) -> Text:  # noqa: ARG002 - its own estimate jumps
        return Text(str(self._pace))


def _bar(title: str, total: int, done: Iterable[int]) -> Iterator[int]:
    pace = _Pace(total)
    columns = (TextColumn(title), BarColumn(max(8, min(40, _err.width - 60))), _Said(pace))
    with Progress(*columns, console=_err, transient=True) as bar:
        task = bar.add_task("", total=total)
        for nbytes in done:
            pace.add(nbytes)
            bar.advance(task, nbytes)
            yield nbytes


def _in_events(told: log.Log, title: str, total: int, done: Iterable[int]) -> Iterator[int]:
    pace = _Pace(total)
    said = pace.started
    told.event("progress", **{"pass": title}, **pace.values())
    for nbytes in done:
        pace.add(nbytes)
        if _clock() - said >= _LOGGED_EVERY and pace.done < total:
            said = _clock()
            told.event("progress", **{"pass": title}, **pace.values())
        yield nbytes
    told.event("progress", **{"pass": title}, **pace.values())


def _in_lines(title: str, total: int, done: Iterable[int]) -> Iterator[int]:
    pace, said = _Pace(total), 0
    for nbytes in done:
        pace.add(nbytes)
        tenth = min(10, 10 * pace.done // total)
        if tenth > said and _clock() - pace.started >= _SILENT:
            said = tenth
            _err.file.write(f"{title}: {10 * tenth}% ({pace})\n")
            _err.file.flush()
        yield nbytes


def show_plan(plan: AnyPlan, told: summary.Summary, resources: Resources, *, json: bool) -> None:
    """What would be done, for `--dry-run`; `told` is the same as plain values."""
    if json:
        _print_json(told)
        return
    if isinstance(plan, AdapterPlan):
        _show_adapter_plan(plan, told, resources)
        return
    _models(plan)
    _alpha(plan)
    _stacks(plan)
    _outside(plan)
    if plan.passes:
        each = [f"{what}: {size(plan.bytes_of_pass(what))}" for what in plan.passes]
        sizes = {plan.bytes_of_pass(what) for what in plan.passes}
        said = f"{', '.join(plan.passes)}: {size(sizes.pop())} each time" if len(sizes) == 1 else ", ".join(each)
        _out.print(f"measure {said}", soft_wrap=True)
    _line(f"read    {size(plan.bytes_read)}")
    files = f"{len(plan.outputs)} files" if len(plan.outputs) > 1 else plan.outputs[0].name
    to = f" to {_printable(str(plan.output))}" if told["output"] is not None else ""
    _out.print(f"write   {size(plan.bytes_written)}{to} ({files})", soft_wrap=True)
    if plan.sidecars:
        _line("beside  " + ", ".join(sidecar.name for sidecar in plan.sidecars))
    _line(
        f"memory  about {size(plan.peak_memory(resources))}, without CUDA; "
        f"{size(plan.buffer_bytes(resources))} of it buffers of {resources.threads} workers"
    )
    _notes(plan.notes)
    _err.print("Nothing was written (--dry-run).", style="dim")


def _show_adapter_plan(plan: AdapterPlan, told: summary.Summary, resources: Resources) -> None:
    _adapter(plan, {})
    bound = "at most " if plan.needs else ""
    _line(f"read    {size(plan.bytes_read)}{', and once more to measure ranks' if plan.needs else ''}")
    to = f" to {_printable(str(plan.output))}" if told["output"] is not None else ""
    _out.print(f"write   {bound}{size(plan.bytes_written)}{to} ({plan.outputs[0].name})", soft_wrap=True)
    _line("beside  " + ", ".join(sidecar.name for sidecar in plan.sidecars))
    _line(f"memory  about {size(plan.peak_memory(resources))}, without CUDA")
    _notes(plan.notes)
    _err.print("Nothing was written (--dry-run).", style="dim")


def _show_adapter_outcome(outcome: AdapterOutcome, told: summary.Summary, *, json: bool, quiet: bool) -> None:
    plan = outcome.plan
    if json:
        _print_json(told)
    for found in outcome.nonfinite.values():
        _warn(found)
    _notes(outcome.remarks)
    if json or quiet:
        return
    _adapter(plan, outcome.norms)
    kept = f" ({size(outcome.resumed)} of it before)" if outcome.resumed else ""
    written = f"wrote {size(plan.bytes_written)}{kept} in {outcome.seconds:.1f} s"
    _line(f"read {size(plan.bytes_read)}, {written}")
    _out.print(f"output  {_printable(str(plan.output))}", style="bold", soft_wrap=True)
    _notes(plan.notes)


def _adapter(plan: AdapterPlan, norms: Mapping[str, tuple[float, float]]) -> None:
    """An adapter's stacks with their coefficients, ranks, and what these keep; and what is left out."""
    found, layers = plan.summary(), layers_of(plan, norms)
    if len(found["models"]) > 1:
        for model in found["models"]:
            _line(f"model   {without_secrets(tidied(model['model']))}")
    rows = []
    for stack in found["stacks"]:
        of_it = [layer for layer in layers if layer["stack"] == stack["name"]]
        if of_it:
            ends = [_coefficient(stack["first"]), _coefficient(stack["last"])]
            rows.append((stack["name"], f"{stack['layers']}", f"{stack['modules']:,}", *ends, *_ranks(of_it)))
    of_it = [layer for layer in layers if layer["stack"] is None]
    if of_it:
        ends = [_coefficient(found["outside"]["first"]), _coefficient(found["outside"]["last"])]
        name = "outside the blocks" if rows else "all modules"
        rows.append((name, "", f"{found['outside']['modules']:,}", *ends, *_ranks(of_it)))
    headings = ("stack", "layers", "modules", "c first", "c last", "rank", "kept" if norms else "")
    shown = len(headings) if norms else len(headings) - 1
    _columns(Columns(headings[:shown], tuple(row[:shown] for row in rows)), gap=3)
    for stack in found["stacks"]:
        by_layer = {layer["index"]: layer for layer in layers if layer["stack"] == stack["name"]}
        values = stack["coefficients"]
        said = {}
        if len(set(values)) > 2:
            said["by layer"] = [f"{value:.3g}" for value in values]
        if norms and by_layer:
            empty: dict[str, Any] = {"kept": None, "rank": None}
            of_layers = [by_layer.get(index, empty) for index in range(len(values))]
            said["rank"] = ["-" if one["rank"] is None else _span(one["rank"]) for one in of_layers]
            said["kept"] = ["-" if one["kept"] is None else f"{one['kept']:.1%}" for one in of_layers]
        if said and by_layer:
            said = {word.ljust(max(map(len, said))): cells for word, cells in said.items()}
            name = f"  ({printable(stack['name'])})" if len(found["stacks"]) > 1 else ""
            for line in _along(said, len(values), _width() - len(name)):
                _line(line + name)
    if norms:
        kept = kept_of(norms)
        share = "-" if kept is None else f"{kept:.2%}"
        _line(f"kept    {share} of the squared update of these {len(plan.modules):,} modules")
    for reason in left_out(plan, norms):
        saved = f", {reason['saved']:,} stored whole" if reason["saved"] else ""
        measured = (
            f": {reason['changed']:,} changed, {reason['share']:.2%} of all that changed{saved}" if norms else saved
        )
        _line(f"{'rest' if saved else 'left':<7} {reason['tensors']:,} {reason['why']}{measured}")


def _ranks(layers: Sequence[Mapping[str, Any]]) -> list[str]:
    """The span of ranks in some layers, and of the shares that they keep."""
    ends = [rank for layer in layers for rank in layer["rank"]]
    kept = [layer["kept"] for layer in layers if layer["kept"] is not None]
    return [_span([min(ends), max(ends)]), f"{min(kept):.1%} to {max(kept):.1%}" if kept else "-"]


def show_finished(plan: AnyPlan, told: summary.Summary, *, verified: bool, json: bool, quiet: bool) -> None:
    """That there is nothing left to do; `verified` if the output was read back. `told` is the same as plain values."""
    if json:
        _print_json(told)
    elif not quiet:
        remark(
            f"{plan.output} is finished: this recipe has written it from these inputs"
            + (", and every file reads back as it was written" if verified else "")
        )


def show_division(divided: DividedPlan, division: Division, *, json: bool, quiet: bool) -> None:
    """The parts of a plan, stage by stage, and the commands that make them."""
    if json:
        _print_json(divided.document)
        return
    total = len(division.parts)
    for number in range(len(division.stages)):
        parts = division.of_stage(number)
        if not parts:
            continue
        numbers = in_runs([part.number for part in parts])
        read, written = sum(part.reads for part in parts), sum(part.writes for part in parts)
        wrote = f", write {size(written)}" if written else ""
        _line(f"parts {numbers}/{total}: {division.called(parts[0])}: read {size(read)}{wrote}")
    if not quiet:
        remark(
            f"planned in {divided.file}. Each part: {divided.command(total)}; "
            f"then: lines finish {as_argument(divided.file)}"
        )


def show_part(division: Division, done: PartDone) -> None:
    """That a part is done."""
    how = "was done before" if done.before else f"done in {_duration(done.seconds)}"
    remark(f"part {done.part.number}/{len(division.parts)} ({division.called(done.part)}): {how}")
    _notes([done.remark] if done.remark is not None else [])


def show_cleaned(output: str, found: Unfinished | None) -> None:
    """What was removed."""
    if found is None:
        remark(f"nothing to remove: there is no unfinished run of {output}")
    else:
        if found.set_aside:
            remark(f"{output} had been moved into it, and is back in its place")
        remark(f"removed {found.folder} ({size(found.nbytes)}, {found.description})")
        for left in found.remarks:
            remark(left)


def show_outcome(outcome: Outcome | AdapterOutcome, told: summary.Summary, *, json: bool, quiet: bool) -> None:
    """What was done; `told` is the same as plain values."""
    plan = outcome.plan
    if isinstance(plan, AdapterPlan):
        _show_adapter_outcome(outcome, told, json=json, quiet=quiet)  # type: ignore[arg-type]
        return
    _show_outcome(outcome, plan, told, json=json, quiet=quiet)  # type: ignore[arg-type]


def _show_outcome(outcome: Outcome, plan: Plan, told: summary.Summary, *, json: bool, quiet: bool) -> None:
    if json:
        _print_json(told)
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
    rate = (outcome.bytes_read + plan.bytes_written - outcome.resumed) / max(outcome.seconds, 1e-9)
    passes = f" in {outcome.passes} passes" if outcome.passes > 1 else ""
    kept = f" ({size(outcome.resumed)} of it before)" if outcome.resumed else ""
    written = f"wrote {size(plan.bytes_written)}{kept} in {outcome.seconds:.1f} s ({size(rate)}/s read and written)"
    _line(f"read {size(outcome.bytes_read)}{passes}, {written}")
    _out.print(f"output  {_printable(str(plan.output))}", style="bold", soft_wrap=True)
    _notes(plan.notes)


def show_pushed(told: summary.Summary, *, json: bool, quiet: bool) -> None:
    """What was put on the Hub, or would be."""
    if json:
        _print_json(told)
        return
    pushed = told["pushed"]
    if pushed["removed"]:
        remark(f"removed from {pushed['repo']}, for an earlier output had it: {', '.join(pushed['removed'])}")
    if quiet:
        return
    number = f"{len(pushed['files'])} file{'s' if len(pushed['files']) > 1 else ''}"
    what = f"{number}, {size(pushed['bytes'])}" if pushed["bytes"] is not None else number
    to = f"{pushed['repo']} ({pushed['revision']})" if pushed["revision"] else pushed["repo"]
    if pushed["url"] is None:
        _line(f"to push {what}, to {to}")
        for name in pushed["files"]:
            _line(f"        {name}")
        _err.print("Nothing was pushed (--dry-run).", style="dim")
    else:
        commit = f", commit {pushed['commit'][:7]}" if pushed["commit"] else ""
        _line(f"pushed  {what}, to {to}{commit}")
        _line(pushed["url"])


def said(text: str) -> None:
    """A line on stderr, as it is."""
    _err.print(Text(_printable(text)), soft_wrap=True)


def show_sweep_plan(told: dict[str, Any], *, json: bool) -> None:
    """What a sweep would try, and what that takes."""
    if json:
        _print_json({**ABOUT, "dry_run": True, **told})
        return
    for family, number in told["trials"].items():
        _line(f"{family:<10} {number:,} trial{'s' if number > 1 else ''}")
    if told["baselines"]:
        _line(f"baselines  {' and '.join(told['baselines'])}")
    _line(f"evaluate   {told['evaluations']:,} times")
    scratch = f"{size(told['scratch_bytes'])} of scratch at most" if told["scratch_bytes"] else "none on the disk"
    _line(f"candidate  {size(told['candidate_bytes'])}; {scratch}")
    _notes(told["notes"])
    _err.print("Nothing was evaluated (--dry-run).", style="dim")


def show_sweep(found: Found, *, json: bool, quiet: bool) -> None:
    """What a sweep found: the best trials of each family, the verdict, and the winner."""
    from lines_cli.sweeping.report import BASELINES, called
    from lines_cli.sweeping.trials import shown as settings_of

    if json:
        _print_json({**ABOUT, **found.to_json()})
    _notes(found.notes)
    if json or quiet:
        return
    several = len(found.sweep.objectives) > 1
    rows = []
    shown = found.shown
    for one in shown:
        values = ", ".join(f"{value:.6g}" for value in one.objectives)
        error = "" if not one.errors or one.errors[0] is None else f"{one.errors[0]:.2g}"
        mark = "winner" if one is found.winner else "front" if one in found.front else ""
        rows.append(
            (
                called(one.trial.family),
                settings_of(one.trial.settings),
                values or f"failed: {in_short(one.failure or '')}",
                error,
                mark,
            )
        )
    asked = ", ".join(objective.expression.text for objective in found.sweep.objectives)
    headings = ("family", "settings", asked if several else "objective", "+-", "chosen")
    _columns(Columns(headings, tuple(rows)), gap=3)
    left = sum(one.trial.family not in BASELINES for one in found.judged) - len(shown)
    if left:
        _line(f"and {left:,} more in {found.folder}")
    _line(str(found.said["said"]), style="bold")
    _line(f"report  {found.folder / 'report.html'}")
    if found.summary is not None:
        _out.print(f"output  {_printable(str(found.summary['output']))}", style="bold", soft_wrap=True)
    else:
        _line("no output: several objectives have no one winner; write one with lines edit or lines merge")


def show_claim(claim: Claim) -> None:
    """What will be read: a recipe may be a stranger's."""
    inputs = (name if name == path else f"{name} ({in_short(path)})" for name, path in claim.places.items())
    remark(as_known(f"the inputs of {claim.file}: {', '.join(inputs)}"))


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


def _columns(table: Columns, gap: int = 2) -> None:
    """A table that is no wider than the terminal, as long as its numbers fit: long names are elided in their middle,
    then the columns move together, then bars become shorter, then all names are elided. No number is cut.
    """
    is_bar = [not heading and bool(at) for at, heading in enumerate(table.headings)]
    texts = [
        ["" if isinstance(cell, Bar) else printable(cell) for cell in row] for row in (table.headings, *table.rows)
    ]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    name = min(widths[0], _NARROW)
    numbers = sum(widths[1:])

    def room(gap: int, bar: int) -> int:
        """What the first column may take."""
        columns = len(widths) - 1 - (0 if bar else sum(is_bar))
        return _width() - numbers - sum(is_bar) * bar - gap * columns

    bar = _BAR
    if room(gap, bar) < name:
        gap = 1
    while bar and room(gap, bar) < name:
        bar = bar - 1 if bar > _SHORTEST_BAR else 0
    widths[0] = min(widths[0], max(_NARROWEST, room(gap, bar)))
    firsts = _told_apart([shown[0] for shown in texts], widths[0])
    for number, (row, shown) in enumerate(zip((table.headings, *table.rows), texts, strict=True)):
        cells = [firsts[number].ljust(widths[0])]
        for at in range(1, len(row)):
            cell = row[at]
            if not is_bar[at]:
                cells.append(shown[at].rjust(widths[at]))
            elif bar:
                cells.append((_drawn(cell, bar) if isinstance(cell, Bar) else "").ljust(bar))
        _line((" " * gap).join(cells).rstrip(), style=None if number else "bold")


_FAILURE = 60  # characters of why a trial failed; the report has the rest
_BAR, _SHORTEST_BAR, _NARROW, _NARROWEST = 12, 4, 20, 8  # characters
_NOWHERE = 200  # columns of what is no terminal
_TIGHT = 70  # columns


def _width() -> int:
    """How many columns there are. Off a terminal there are many: whoever searches the lines finds whole names."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return _out.width if _out.is_terminal else _NOWHERE


def _gap() -> str:
    return "…" if _out.encoding.lower().startswith("utf") else "..."


def _elided(name: str, width: int) -> str:
    """A name without its middle, where it is longer than that."""
    if len(name) <= width:
        return name
    gap = _gap()
    begin = max(0, width - len(gap)) // 2
    return name[:begin] + gap + name[len(name) - max(0, width - len(gap) - begin) :]


def _told_apart(names: Sequence[str], width: int) -> list[str]:
    """Names elided to a width; those that would look alike are shown from where they begin to differ, if that helps."""
    alike: dict[str, set[str]] = {}
    for name in names:
        alike.setdefault(_elided(name, width), set()).add(name)
    shown: dict[str, str] = {}
    for short, same in alike.items():
        first, last = min(same), max(same)
        begin = next((at for at, pair in enumerate(zip(first, last, strict=False)) if len({*pair}) > 1), len(first) - 1)
        ends = {name: _gap() + name[begin:] for name in same}
        ends = {name: end if len(end) <= width else end[: width - len(_gap())] + _gap() for name, end in ends.items()}
        shown |= ends if len(set(ends.values())) == len(same) > 1 else dict.fromkeys(same, short)
    return [shown[name] for name in names]


def _line(text: str, *, style: str | None = None) -> None:
    """One line that is never broken. A plain one goes by rich, which takes a while over 100,000 of them."""
    if style is None:
        _out.file.write(f"{printable(text)}\n")
    else:
        _out.print(printable(text), style=style, soft_wrap=True)


def _drawn(bar: Bar, width: int) -> str:
    eighths = round(bar.share * width * 8)
    if not _out.encoding.lower().startswith("utf"):
        return "#" * round(eighths / 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _warn(text: str) -> None:
    if (told := log.active()) is not None:
        told.event("warning", message=without_secrets(text))
        return
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
    rows = []
    shown = {"kept": "{:.2%}".format, "norm": "{:.4g}".format}
    for model in models:
        cells = ["" if model[key] is None else shown.get(key, _span)(model[key]) for key in columns]
        rows.append((without_secrets(tidied(model["model"])), *cells))
    _columns(Columns((plan.recipe.merge_method, *columns), tuple(rows)), gap=3)
    settings = plan.settings()
    said = [f"{key} {_span(value) if isinstance(value, list) else _plain(value)}" for key, value in settings.items()]
    if plan.recipe.calibrate is not None:
        said.append(f"calibrate {plan.recipe.calibrate}")
    if said:
        _out.print(f"with    {', '.join(said)}", soft_wrap=True)


def _plain(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value).lower()


def _span(ends: list[Any]) -> str:
    if any(isinstance(end, (str, bool)) for end in ends):  # among them a rule that is yet to be measured
        return " or ".join(map(_plain, ends))
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
    lost = {(layer["stack"], layer["index"]): layer.get("error") for layer in left["layers"]}
    headings = ("stack", "layers", "tensors", "parameters", "c first", "c last", *(["realised"] if realised else []))
    rows: list[tuple[str, ...]] = []
    to = " to " if _width() > _TIGHT else ".."
    unknown = "measured" if plan.recipe.measured_rules else "auto"

    def add_row(name: str, number: str, group: Mapping[str, Any], ends: Sequence[Any], of_it: Sequence[Any]) -> None:
        shown = [_coefficient(end, unknown) for end in ends]
        cells = [number, f"{group['tensors']:,}", count(group["parameters"]), *shown]
        rows.append((name, *cells, *([to.join(dict.fromkeys(map(_realised, of_it)))] if realised else [])))

    for stack in found["stacks"]:
        of_it = [layers.get((stack["name"], index)) for index in (0, stack["layers"] - 1)]
        name = stack["name"] or "(no prefix)"
        add_row(name, f"{stack['layers']}", stack, (stack["first"], stack["last"]), of_it)
    own = {component["name"]: component["realised"] for component in left["realised"]["components"]}
    of_all = left["realised"]["outside"]["realised"]
    outside = [("outside the blocks", found["outside"], of_all)]
    if own:
        outside = [
            (f"outside the blocks of {component['name']}", component["outside"], own.get(component["name"], of_all))
            for component in found["components"]
            if component["outside"] is not None and component["outside"]["tensors"]
        ]
    for name, group, of_it in outside:
        add_row(name, "", group, (group["first"], group["last"]), [of_it])
    for component in found["components"]:
        if component["as"] is not None:
            cells = ("", f"{component['tensors']:,}", count(component["parameters"]), "", "")
            as_it_is = f"{component['name']}, as {in_short(component['as'])} has it"
            rows.append((as_it_is, *cells, *([""] if realised else [])))
    for rule, of_rule in zip(found["filters"], left["realised"]["filters"], strict=True):
        ends = (rule["coefficient"],) * 2
        add_row(f"names with {rule['pattern']}", "", rule, ends, [of_rule["realised"]])
    _columns(Columns(headings, tuple(rows)), gap=3)
    called = _told_apart([printable(stack["name"]) for stack in found["stacks"]], max(_NARROW, _width() // 3))
    for stack, short in zip(found["stacks"], called, strict=True):
        values = stack["coefficients"]
        of_it = [layers.get((stack["name"], index)) for index in range(len(values))]
        errors = [lost.get((stack["name"], index)) for index in range(len(values))]
        in_8_bits = any(error is not None for error in errors)
        if in_8_bits or len(set(values)) > 2 or len({round(value, 2) for value in of_it if value is not None}) > 2:
            name = f"  ({short})" if len(found["stacks"]) > 1 else ""
            said = {"by layer": [f"{value:.3g}" for value in values]}
            if realised:
                said["realised"] = [_realised(value) for value in of_it]
            if in_8_bits:
                said["8-bit error"] = ["-" if error is None else f"{error:.2%}" for error in errors]
            for line in _along(said, len(values), _width() - len(name)):
                _line(line + name)
    edited, copied = found["edited"], found["copied"]
    _line(
        f"edited {edited['tensors']:,} tensors ({count(edited['parameters'])} parameters), "
        f"copied {copied['tensors']:,} ({count(copied['parameters'])}){_why_copied(plan)}"
    )
    if folded := sum(not tensor.edited and _is_folded(tensor) for tensor in plan.of_model):
        _line(f"{folded:,} of those copied have an adapter's update folded in, all of it")


def _is_folded(tensor: TensorPlan) -> bool:
    """Whether a tensor that is copied is one that an adapter makes of its base's."""
    copies = [segment.copy for segment in tensor.segments if segment.copy is not None]
    return any(not isinstance(step, Dequantised) for copy in copies for step in copy.steps)


def _along(said: Mapping[str, Sequence[str]], layers: int, width: int) -> list[str]:
    """Values at equal distances along the depth, the first and the last among them, as many as fit: a line for each
    word, its cells below each other.
    """
    longest = max(map(len, said))
    for most in range(max(2, min(_MOST_DEPTHS, layers)), 1, -1):
        shown = sorted({round(at * (layers - 1) / (most - 1)) for at in range(most)})
        cells = {word: [f"{index}: {values[index]}" for index in shown] for word, values in said.items()}
        widths = [max(len(each[at]) for each in cells.values()) for at in range(len(shown))]
        rows = {
            word: "  ".join(cell.ljust(wide) for cell, wide in zip(each, widths, strict=True))
            for word, each in cells.items()
        }
        lines = [f"{word:<{longest}}  {row}".rstrip() for word, row in rows.items()]
        if max(map(len, lines)) <= width:
            break
    return lines


def _why_copied(plan: Plan) -> str:
    """Why tensors are not computed, and how many for each reason."""
    reasons = Counter(
        "is of a component that is taken as it is"
        if tensor.name in plan.taken_whole
        else "is not merged"
        if not tensor.spec.paired
        else "is not a float"
        if tensor.info.dtype in EXACT_DTYPES
        else "is the same in all inputs"
        if tensor.coefficient not in (0, 1) and tensor.spec.is_the_base_s
        else "has a coefficient of 0 or 1"
        for tensor in plan.of_model
        if not tensor.edited
    )
    number = {"is not merged": "are not merged", "is not a float": "are not floats"}
    number |= {"is the same in all inputs": "are the same in all inputs"}
    number["has a coefficient of 0 or 1"] = "have a coefficient of 0 or 1"
    number["is of a component that is taken as it is"] = "are of components that are taken as they are"
    said = [f"{many:,} {reason if many == 1 else number[reason]}" for reason, many in reasons.most_common()]
    if len(reasons) == 1:
        (only,) = reasons
        said = [only if reasons[only] == 1 else number[only]]
        return f", which {said[0]}"
    return f": {', '.join(said)}" if said else ""


def _coefficient(value: float | None, unknown: str = "auto") -> str:
    return unknown if value is None else coefficient(value)


def _realised(value: float | None) -> str:
    return "-" if value is None else f"{value:.2g}"


def _outside(plan: Plan) -> None:
    """The tensors outside the blocks, each with its coefficient."""
    lines = [
        f"{_coefficient(place['coefficient']):>8}  {printable(place['name'])}"
        for place in plan.map()
        if place["stack"] is None and place["name"] not in plan.taken_whole
    ]
    if lines:
        _out.print("outside:")
    for line in lines[:_MOST_NAMES]:
        _out.print(line, soft_wrap=True)
    if len(lines) > _MOST_NAMES:
        _out.print(f"     ...  {len(lines) - _MOST_NAMES:,} more (all in --json)")


def _notes(notes: Iterable[str]) -> None:
    for note in notes:
        if (told := log.active()) is not None:
            told.event("note", message=without_secrets(note))
            continue
        _err.print(Text.assemble(("note: ", "bold"), _printable(note)), soft_wrap=True)


def _print_json(value: dict[str, Any]) -> None:
    text = json_format.dumps(value, indent=2, allow_nan=False)
    _out.file.write(text.replace("\x7f", "\\u007f") + "\n")  # escaped is all but DEL


def _printable(text: str) -> str:
    """Text that holds no secret and cannot steer the terminal: line breaks stay, and what follows one is indented."""
    return "\n  ".join(printable(line.removeprefix("  ")) for line in without_secrets(text).split("\n"))
