"""A report as tables and sentences: what a terminal and a page of HTML show alike. Plain values; nothing is drawn here.

Every cell, title and line of a fact is one line of text. Names in them come from strangers' files: whoever shows them
makes them harmless.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lines_cli.errors import size as size_in_words
from lines_cli.errors import tidied
from lines_cli.inspection.adapters import is_about
from lines_cli.plan.realised import and_more, way_out

if TYPE_CHECKING:
    from lines_cli.inspection.report import Report

FOLDED = 12
"""Most rows that a stack has, unless all are asked for."""
_ABREAST = 8  # fine-tunes that have a column each, unless all are asked for
_MOST_NAMES = 8


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell that is drawn: a share of its column's width, 0 to 1."""

    share: float


class Quantity(str):
    """A cell that says a number, with the number itself; None where there is none."""

    __slots__ = ("value",)
    value: float | None

    def __new__(cls, text: str, value: float | None) -> Quantity:
        made = super().__new__(cls, text)
        made.value = value
        return made


Cell = str | Bar


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings. The first column is text, the others are numbers; one without a heading holds bars.

    Attributes:
        headings: one for each column.
        rows: as many cells each.
        total: whether the last row is of all others together.
        stack: the name of the stack that it is about, if it is about one.
        models: whether each fine-tune has a row (`rows`), a column, at the right (`columns`), or both.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    total: bool = False
    stack: str | None = None
    models: tuple[str, ...] = ()


Fact = tuple[str, tuple[str, ...]]
"""A word (or none), and lines of text."""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, facts, and tables with a title (or none) each."""

    title: str
    facts: tuple[Fact, ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()


def sections(report: Report, *, full: bool = False) -> list[Section]:
    """A whole report.

    Args:
        report: from `lines_cli.inspection.report.make_report`.
        full: every layer, fine-tune and name, however many.
    """
    found = [_headers(report, full=full)]
    if is_about(report):
        found.append(_adapter(report["adapter"], full=full))
    fine_tunes = report.get("fine_tunes", [])
    if len(fine_tunes) == 1:
        found.append(_fine_tune(report, fine_tunes[0], full=full))
    elif fine_tunes:
        found.append(_fine_tunes(report, fine_tunes, full=full))
        found.append(_together(report["together"], full=full))
    if report.get("not_compared"):
        found.append(_not_compared(report["not_compared"], full=full))
    if "map" in report:
        found.append(_map(report["map"]))
    if "health" in report:
        found.append(_health(report["health"], full=full))
    return found


# --- an adapter alone ---


def _adapter(adapter: Report, *, full: bool) -> Section:
    dora = ", with magnitudes (DoRA)" if any(target["kind"] == "rescaled" for target in adapter["targets"]) else ""
    facts: list[Fact] = [("kind", (adapter["kind"] + dora,)), ("base", (adapter["base"] or "none named",))]
    if adapter["components"]:
        facts.append(("for", (", ".join(adapter["components"]),)))
    changed = f"{adapter['tensors']:,} tensors"
    if adapter["products"] < adapter["tensors"]:
        changed += f", {adapter['tensors'] - adapter['products']:,} of them held whole, or in rows"
    facts.append(("changes", (changed,)))
    facts.append(("norm", (f"{number(adapter['norm'])}" if adapter["norm"] is not None else _BASE_HAS_A_PART,)))
    targets = Table(
        ("target", "tensors", "rank", "scale", "norm"),
        tuple((target["name"], *_of_adapter(target)) for target in adapter["targets"]),
    )
    tables = [("", targets)]
    for name in dict.fromkeys(layer["stack"] for layer in adapter["layers"]):
        stack = {"name": name}
        shown, more = _folded(_of(adapter["layers"], stack), full=full)
        rows = tuple((_index(layer["index"]), *_of_adapter(layer)) for layer in shown)
        tables.append((_titled(stack, more), Table(("layer", "tensors", "rank", "scale", "norm"), rows, stack=name)))
    if adapter["outside"]["tensors"] and adapter["layers"]:
        outside = Table(("", "tensors", "rank", "scale", "norm"), (("outside", *_of_adapter(adapter["outside"])),))
        tables.append(("", outside))
    return Section("adapter", tuple(facts), tuple(tables))


_BASE_HAS_A_PART = "not known without the base, which has a part in it: --base BASE"


def _of_adapter(row: Report) -> tuple[Cell, ...]:
    norm = row["norm"]
    return (
        f"{row['tensors']:,}",
        _span(row["rank"]),
        _span(row["scale"]),
        Quantity(number(norm) if norm is not None else "-", norm),
    )


def _span(ends: Sequence[float] | None) -> str:
    """One number, or the first and the last."""
    if ends is None:
        return "-"
    least, most = (f"{end:g}" for end in ends)
    return least if least == most else f"{least} to {most}"


# --- what headers tell ---


def _headers(report: Report, *, full: bool) -> Section:
    if is_about(report):
        return Section(report["checkpoint"], (_held(report),))
    facts = [_held(report), *_known(report)]
    rows: list[tuple[Cell, ...]] = [
        (
            stack["name"] or "(no prefix)",
            _index(stack["layers"]),
            *_amounts(stack),
            coefficient(stack["first"]),
            coefficient(stack["last"]),
        )
        for stack in report["stacks"]
    ]
    for side, where in _SIDES:
        group = report["outside"][side]
        if group["tensors"]:
            value = coefficient(group["coefficient"])
            rows.append((f"outside, {where}", "", *_amounts(group), value, value))
    tables = [("", Table(("stack", "layers", "tensors", "parameters", "bytes", "c first", "c last"), tuple(rows)))]
    if not report.get("fine_tunes"):
        tables += [_layers_of(report, stack, full=full) for stack in report["stacks"]]
        tables += _recorded(report, full=full)
    return Section(report["checkpoint"], tuple(facts), tuple(tables))


_SIDES = (("before", "before"), ("after", "behind"))


def _held(report: Report) -> Fact:
    files, dtypes = report["files"], report["dtypes"]
    by_dtype = ", ".join(
        dtype if len(dtypes) == 1 else f"{dtype} {size(counts['bytes'])}" for dtype, counts in dtypes.items()
    )
    held = f"{len(files)} file{'s' if len(files) > 1 else ''}, {report['tensors']:,} tensors"
    amounts = f"{count(report['parameters'])} parameters, {size(report['bytes'])}{f' ({by_dtype})' if by_dtype else ''}"
    tunes = len(report.get("fine_tunes", ()))
    whose = "the base" if report["checkpoint"] == report["base"] else f"the first of {tunes} fine-tunes"
    return "", (f"{held}, {amounts}", *([f"(headers of {whose})"] if tunes > 1 else []))


def _known(report: Report) -> Iterable[Fact]:
    if report["base"] is not None:
        yield "base", (report["base"],)
    if report["components"]:
        yield "models", tuple(_component(component) for component in report["components"])
    tied = report["tied"]
    if tied["stored"]:
        yield "tied", tuple(f"{head} to {to}, by config.json; both are stored" for head, to in tied["stored"])
    elif tied["config"]:
        yield "tied", ("the head to the token embedding, by config.json",)
    if report["quantised"]:
        yield "not edited", (report["quantised"],)
    if report["stored_as"]:
        yield "quantised", (report["stored_as"],)
    if names := [stack["names"] for stack in report["stacks"] if stack["names"]]:
        yield "names", (", ".join(names),)
    if report["recipe"]:
        yield "recipe", (_recipe(report["recipe"]),)
    yield "LiNeS", (settings(report["scaling"]),)


def _component(component: Report) -> str:
    layers = ", ".join(component["stacks"]) or "no layers"
    return f"{component['name']}: {count(component['parameters'])} parameters, {size(component['bytes'])} ({layers})"


def settings(scaling: Report) -> str:
    """How the coefficients are chosen, and by whom."""
    of = {"output": "as in its recipe: ", "merge": "as in the recipe: ", "asked": ""}[scaling["of"]]
    if scaling["lines"] is None:
        return f"{of}none; every coefficient is lambda, {_plain(scaling['lambda'] or 1.0)}"
    text = of + _lines(scaling["lines"])
    if scaling["lines"].get("alpha") == "auto":
        text += "; auto is to be measured" if scaling["alpha"] is None else f"; auto is {number(scaling['alpha'])}"
    return text if scaling["lambda"] is None else f"{text}; times lambda, {_plain(scaling['lambda'])}"


def _lines(lines: Report) -> str:
    said = [f"{key} {_plain(lines[key])}" for key in ("alpha", "beta", "gamma", "schedule", "outside") if key in lines]
    said += [
        f"{key} {name}={_plain(value)}" for key in ("stacks", "filter") for name, value in lines.get(key, {}).items()
    ]
    return ", ".join(said)


def _recipe(recipe: Report) -> str:
    slices = [source for one in recipe.get("slices", ()) for source in one["sources"]]
    models = ", ".join(dict.fromkeys(tidied(source["model"]) for source in slices or recipe["models"]))
    text = f"{recipe['merge_method']} of {models}"
    text += f" on {tidied(recipe['base_model'])}" if "base_model" in recipe else ""
    said = [f"{key} {_plain(value)}" for key, value in recipe.get("parameters", {}).items()]
    said += [f"{key} {recipe[key]}" for key in ("calibrate", "dtype", "rounding", "rounding_seed") if key in recipe]
    return text + (f" with {', '.join(said)}" if said else "")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(_plain(inner) for inner in value.values())
    if isinstance(value, list):
        return ",".join(_plain(inner) for inner in value)
    return number(value) if isinstance(value, float) else str(value)


def _amounts(counts: Report) -> tuple[str, str, str]:
    return _whole(counts["tensors"]), count(counts["parameters"]), size(counts["bytes"])


def _layers_of(report: Report, stack: Report, *, full: bool) -> tuple[str, Table]:
    layers = _of(report["layers"], stack)
    most = max((abs(layer["coefficient"] or 0) for layer in layers), default=0)
    shown, more = _folded(layers, full=full)
    rows = tuple(
        (
            _index(layer["index"]),
            *_amounts(layer),
            coefficient(layer["coefficient"]),
            _bar(abs(layer["coefficient"] or 0), most),
        )
        for layer in shown
    )
    headings = ("layer", "tensors", "parameters", "bytes", "c", "")
    return _titled(stack, more), Table(headings, rows, stack=stack["name"])


def _of(rows: Sequence[Report], stack: Report) -> list[Report]:
    return [row for row in rows if row["stack"] == stack["name"]]


def _titled(stack: Report, more: str) -> str:
    return f"{stack['name'] or '(no prefix)'}{more}"


# --- one fine-tune ---


def _fine_tune(report: Report, tune: Report, *, full: bool) -> Section:
    def row(name: str, group: Report, value: str, *, most: float) -> tuple[Cell, ...]:
        shares = (share(group["relative_norm"]), _bar(group["relative_norm"] or 0, most), share(group["unchanged"]))
        return (
            name,
            number(group["update_norm"]),
            *shares,
            number(group["largest"]),
            value,
            number(group["scaled_norm"]),
        )

    def largest(groups: Iterable[Report]) -> float:
        return max((group["relative_norm"] or 0.0 for group in groups), default=0.0)

    headings = ("update", "relative", "", "unchanged", "largest", "c", "scaled")
    tables = []
    of_layers = largest(tune["layers"])
    of_outside = largest(tune["outside"][side] for side, _ in _SIDES)
    for stack in tune["stacks"]:
        shown, more = _folded(_of(tune["layers"], stack), full=full)
        rows = [
            row(_index(layer["index"]), layer, coefficient(layer["coefficient"]), most=of_layers) for layer in shown
        ]
        rows.append(row("all", stack, "", most=of_layers))
        table = Table(("layer", *headings), tuple(rows), total=True, stack=stack["name"])
        tables.append((_titled(stack, more), table))
    if report["rounding"] is not None:
        tables += _rounded(report, tune, full=full)
    tables += _recorded(report, full=full)
    outside = [
        row(where, tune["outside"][side], coefficient(tune["outside"][side]["coefficient"]), most=of_outside)
        for side, where in _SIDES
        if report["outside"][side]["tensors"]
    ]
    if outside:
        tables.append(("outside the blocks", Table(("", *headings), tuple(outside))))
    for key, word, title in (("components", "name", "by model"), ("kinds", "kind", "by kind")):
        groups = (row(group[word], group, "", most=largest(tune[key])) for group in tune[key])
        without_c = tuple((*cells[:6], cells[7]) for cells in groups)
        if without_c or key == "kinds":
            tables.append((title, Table(("", *headings[:5], headings[6]), without_c)))
    return Section(f"update of {tune['model']}", (*_changed(tune), *_undone(report)), tuple(tables))


def _undone(report: Report) -> Iterable[Fact]:
    """What rounding would make of the scaling."""
    rounding = report["rounding"]
    if rounding is None:
        if len(report["fine_tunes"]) == 1 and report["merge"].get("rounding") == "stochastic":
            yield "rounding", ("stochastic, which leaves on average what is asked; no forecast",)
        return
    off = [*rounding["off"], *rounding["outside_off"], *rounding["filters_off"]]
    if not off:
        yield "rounding", (f"to {rounding['dtype']} leaves every coefficient as it is asked",)
        return
    worst = max(off, key=lambda group: abs(group["realised"] - group["coefficient"]))
    if "pattern" in worst:
        called = f"what {worst['pattern']} names"
    elif "side" in worst:
        called = f"what lies {worst['side']} the blocks"
    else:
        called = f"layer {worst['index']}" + (f" of {worst['stack']}" if worst["stack"] else "")
    what = (
        f"to {rounding['dtype']} would distort the scaling: {called} would have {worst['realised']:.3g} where "
        f"{worst['coefficient']:.3g} is asked{and_more(len(off) - 1, 'coefficient')}."
    )
    edit, in_float64 = report["scaling"]["of"] != "merge", rounding["arithmetic"] == "float64"
    command = "lines edit " if edit else ""
    helps = way_out(rounding["dtype"], in_float64=in_float64, edit=edit, drawn=False, command=command)
    yield "rounding", (what, helps)


def _rounded(report: Report, tune: Report, *, full: bool) -> Iterable[tuple[str, Table]]:
    """What rounding would leave of each layer's coefficient, and how large updates are in units in the last place."""
    headings = ("asked", "realised", "median ulp", "at 0 ulp", "at 1", "at 2")
    dtype = report["rounding"]["dtype"]

    def row(name: str, group: Report) -> tuple[Cell, ...]:
        units = group["units"] or dict.fromkeys(("median", "zero", "one", "two"))
        median = Quantity("-" if units["median"] is None else f"{units['median']:.2g}", units["median"])
        shares = (share(units[word]) for word in ("zero", "one", "two"))
        asked = coefficient(group["coefficient"]) if "coefficient" in group else ""
        return name, asked, coefficient(group["realised"]), median, *shares

    for stack in tune["stacks"]:
        shown, more = _folded(_of(tune["layers"], stack), full=full)
        rows = (*(row(_index(layer["index"]), layer) for layer in shown), row("all", stack))
        table = Table(("layer", *headings), rows, total=True, stack=stack["name"])
        yield f"{stack['name'] or '(no prefix)'} in {dtype}{more}", table
    sides = tuple(row(where, tune["outside"][side]) for side, where in _SIDES if report["outside"][side]["tensors"])
    if sides:
        yield f"outside the blocks in {dtype}", Table(("", *headings), sides)


def _recorded(report: Report, *, full: bool) -> list[tuple[str, Table]]:
    """What an output's recipe records of rounding, stack by stack."""
    tables = []
    for name in dict.fromkeys(layer["stack"] for layer in report.get("recorded", ())):
        shown, more = _folded([layer for layer in report["recorded"] if layer["stack"] == name], full=full)
        rows = tuple(
            (
                _index(layer["index"]),
                coefficient(layer["coefficient"]),
                coefficient(layer["realised"]),
                share(layer["changed"]),
            )
            for layer in shown
        )
        title = f"{name or '(no prefix)'}, as its recipe records it{more}"
        tables.append((title, Table(("layer", "asked", "realised", "changed"), rows, stack=name)))
    return tables


def _changed(tune: Report) -> Iterable[Fact]:
    compared = tune["compared"]
    left_out = f"; {compared['left_out']:,} entries that are not finite left out" if compared["left_out"] else ""
    yield "compared", (f"{compared['tensors']:,} tensors, {count(compared['parameters'])} parameters{left_out}",)
    yield "update", (f"norm {number(tune['update_norm'])}, {share(tune['relative_norm'])} of the base's",)
    largest = (
        "" if tune["largest_in"] is None else f"; largest change {number(tune['largest'])} in {tune['largest_in']}"
    )
    yield "unchanged", (f"{share(tune['unchanged'])} of the entries{largest}",)
    first, last = share(tune["first_third"]), share(tune["last_third"])
    yield "depth", (f"{first} of the squared norm in the first third of the layers, {last} in the last",)
    norm = f"norm {number(tune['scaled_norm'])}, {share(tune['scaled_relative_norm'])} of the base's"
    first, last = share(tune["scaled_first_third"]), share(tune["scaled_last_third"])
    yield "scaled", (f"{norm}; {first} in the first third, {last} in the last",)


# --- several ---


def _numbered(models: Sequence[str]) -> list[str]:
    return [f"{at} {os.path.basename(os.path.normpath(model))}" for at, model in enumerate(models, 1)]


def _fine_tunes(report: Report, tunes: Sequence[Report], *, full: bool) -> Section:
    names = _numbered([tune["model"] for tune in tunes])
    facts = tuple((f"{at}", (tune["model"],)) for at, tune in enumerate(tunes, 1))
    rows = tuple(
        (
            name,
            number(tune["update_norm"]),
            share(tune["relative_norm"]),
            share(tune["unchanged"]),
            share(tune["first_third"]),
            share(tune["last_third"]),
            number(tune["scaled_norm"]),
        )
        for name, tune in zip(names, tunes, strict=True)
    )
    headings = ("fine-tune", "update", "relative", "unchanged", "first 1/3", "last 1/3", "scaled")
    tables = [("", Table(headings, rows, models=("rows",)))]
    columns, cells = _abreast(len(tunes), share, full=full)
    each_one = ("columns",) if len(columns) == len(tunes) else ()
    for at, stack in enumerate(report["stacks"]):
        layers = list(zip(*(_of(tune["layers"], stack) for tune in tunes), strict=True))
        shown, more = _folded(layers, full=full)
        found = [
            (
                _index(each[0]["index"]),
                coefficient(each[0]["coefficient"]),
                *cells([row["relative_norm"] for row in each]),
            )
            for each in shown
        ]
        found.append(("all", "", *cells([tune["stacks"][at]["relative_norm"] for tune in tunes])))
        title = f"update relative to the weights, {_titled(stack, more)}"
        tables.append(
            (title, Table(("layer", "c", *columns), tuple(found), total=True, stack=stack["name"], models=each_one))
        )
    kinds = tuple(
        (kind["kind"], *cells([tune["kinds"][at]["relative_norm"] for tune in tunes]))
        for at, kind in enumerate(tunes[0]["kinds"])
    )
    tables.append(("update relative to the weights, by kind", Table(("", *columns), kinds, models=each_one)))
    return Section(f"updates of {len(tunes)} fine-tunes", facts, tuple(tables))


Say = Callable[[float | None], str]


def _abreast(models: int, say: Say, *, full: bool) -> tuple[list[str], Callable[[Sequence[float | None]], list[str]]]:
    """Columns for a number of models: one each; of very many their least, mean and greatest value."""
    if full or models <= _ABREAST:
        return [str(at) for at in range(1, models + 1)], lambda values: [say(value) for value in values]
    return ["lowest", "mean", "highest"], lambda values: [say(value) for value in _spread(values)]


def _spread(values: Sequence[float | None]) -> tuple[float | None, float | None, float | None]:
    known = [value for value in values if value is not None]
    return (min(known), sum(known) / len(known), max(known)) if known else (None, None, None)


def _together(together: Report, *, full: bool) -> Section:
    models = together["models"]
    columns, cells = _abreast(len(models), _cosine, full=full)
    cosines = []
    for at, (name, row) in enumerate(zip(_numbered(models), together["cosine"], strict=True)):
        others = row if full or len(models) <= _ABREAST else [value for to, value in enumerate(row) if to != at]
        cosines.append((name, *cells(others)))
    each_one = ("rows", "columns") if len(columns) == len(models) else ("rows",)
    tables = [("cosine similarity of the updates", Table(("", *columns), tuple(cosines), models=each_one))]
    headings = ("layer", "cosine", "lowest", "disagree", "", "norm of sum", "sum of norms")
    for stack in together["stacks"]:
        shown, more = _folded(_of(together["layers"], stack), full=full)
        rows = [_interference(_index(layer["index"]), layer) for layer in shown]
        rows.append(_interference("all", stack))
        tables.append((_titled(stack, more), Table(headings, tuple(rows), total=True, stack=stack["name"])))
    kinds = tuple(_interference(kind["kind"], kind) for kind in together["kinds"])
    tables.append(("by kind", Table(("", *headings[1:]), kinds)))
    return Section("how they interfere", tuple(_interfering(together)), tuple(tables))


def _interfering(together: Report) -> Iterable[Fact]:
    models, auto = len(together["models"]), together["auto"]
    by_chance = share(1 - 2 ** (1 - models))
    disagree = f"{share(together['disagreement'])} of the entries are increased by one and decreased by another"
    yield "signs", (f"{disagree} (of unrelated changes {by_chance} would be)",)
    for key, what in (("", "sum"), ("scaled_", "scaled")):
        norms = number(together[f"{key}norm_of_sum"]), number(together[f"{key}sum_of_norms"])
        yield what, (f"norm {norms[0]}, where the norms of all add up to {norms[1]}",)
    alpha = "unknown"
    if auto["alpha"] is not None:
        alpha = f"alpha {number(auto['alpha'])} = 1/{models} * {number(auto['sum'])} / {number(auto['merged'])}"
        alpha += f", the L1 norms of the sum and of what {auto['method']} merges"
    yield "auto", (alpha,)


def _interference(name: str, group: Report) -> tuple[Cell, ...]:
    lowest, mean, _ = _spread([value for at, row in enumerate(group["cosine"]) for value in row[:at]])
    return (
        name,
        _cosine(mean),
        _cosine(lowest),
        share(group["disagreement"]),
        _bar(group["disagreement"] or 0, 1),
        number(group["norm_of_sum"]),
        number(group["sum_of_norms"]),
    )


def _cosine(value: float | None) -> Quantity:
    return Quantity("-" if value is None else f"{round(value, 3) + 0.0:.3f}", value)


# --- every tensor; what is left; health ---


def _map(tensors: Sequence[Report]) -> Section:
    changed = bool(tensors) and "update_norm" in tensors[0]
    rows = tuple(
        (
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            _index(tensor["index"]) if tensor["index"] is not None else dict(_SIDES)[tensor["side"]],
            tensor["kind"],
            coefficient(tensor["coefficient"]),
            *(
                (number(tensor["update_norm"]), share(tensor["relative_norm"]), number(tensor["scaled_norm"]))
                if changed
                else ()
            ),
        )
        for tensor in tensors
    )
    headings = (
        "tensor",
        "dtype",
        "shape",
        "layer",
        "kind",
        "c",
        *(("update", "relative", "scaled") if changed else ()),
    )
    return Section("tensors", (), (("", Table(headings, rows)),))


def _not_compared(tensors: Sequence[Report], *, full: bool) -> Section:
    by_reason: dict[str, list[str]] = {}
    for tensor in tensors:
        by_reason.setdefault(tensor["why"], []).append(tensor["tensor"])
    facts = [("", (f"{why}:", *(f"  {line}" for line in _names(names, full=full)))) for why, names in by_reason.items()]
    return Section("not compared", tuple(facts))


def _health(report: Sequence[Report], *, full: bool) -> Section:
    facts: list[Fact] = []
    for health in report:
        ways: tuple[tuple[str, Sequence[Any], Callable[[Any], str]], ...] = (
            ("NaN, Inf", health["nonfinite"], lambda e: f"{e['tensor']}: {e['nan']:,} NaN, {e['inf']:,} Inf"),
            ("range", health["beyond"], _beyond),
            ("zero", health["zero"], str),
            ("empty", health["empty"], str),
            ("same", health["same"], lambda e: f"{e['tensor']} is {e['as']}"),
            ("changed", list(health["changed_files"].items()), lambda e: f"{e[0]}: {e[1]}"),
        )
        found = [(what, _names([say(each) for each in things], full=full)) for what, things, say in ways if things]
        rest = [f"{number:,} {dtype}" for dtype, number in health["not_looked_into"].items()]
        looked = f"{health['checkpoint']}: {health['tensors']:,} float tensors"
        if health["recorded_files"]:
            looked += f" and {health['recorded_files']:,} files"
        if (health["tensors"] or health["recorded_files"]) and not found:
            looked += ", nothing wrong in them"
        facts += [("", (looked + (f"; not looked into: {', '.join(rest)}" if rest else ""),)), *found]
    return Section("health", tuple(facts))


def _beyond(entry: Report) -> str:
    return f"{entry['tensor']}: {number(entry['largest'])} is beyond {' and '.join(entry['dtypes'])}"


def _names(names: Sequence[str], *, full: bool) -> tuple[str, ...]:
    """A name to a line: some of many, unless all are asked for."""
    shown = names if full else names[:_MOST_NAMES]
    more = [f"... and {len(names) - len(shown):,} more (--full)"] if len(names) > len(shown) else []
    return (*shown, *more)


# --- numbers in words ---


def _folded(rows: Sequence[Any], *, full: bool) -> tuple[Sequence[Any], str]:
    """Of many rows some at equal distances, the first and the last among them; and words that say so."""
    if full or len(rows) <= FOLDED:
        return rows, ""
    chosen = sorted({round(at * (len(rows) - 1) / (FOLDED - 1)) for at in range(FOLDED)})
    return [rows[at] for at in chosen], f": {len(chosen)} of {len(rows)} layers (--full shows all)"


def _bar(value: float, most: float) -> Bar:
    return Bar(min(1.0, value / most) if most else 0.0)


def _index(value: int) -> Quantity:
    return Quantity(str(value), value)


def _whole(value: int) -> Quantity:
    return Quantity(f"{value:,}", value)


def coefficient(value: float | None) -> Quantity:
    """Four digits; `-` where it is not known."""
    return Quantity("-" if value is None else f"{value:.4g}", value)


number = coefficient
"""Four digits; `-` where there is none."""


def share(value: float | None) -> Quantity:
    """A share in percent, three digits; what is many times the whole as a factor."""
    return Quantity(_share(value), value)


def _share(value: float | None) -> str:
    if value is None:
        return "-"
    percent = 100 * value
    if percent >= 1000:
        return f"{value:.4g}x"
    if percent >= 10 or percent == 0:
        return f"{percent:.1f}%"
    return f"{percent:.2f}%" if percent >= 0.01 else f"{percent:.2g}%"


def size(nbytes: float) -> Quantity:
    """Bytes as people say them, decimal: `3.1 GB`."""
    return Quantity(size_in_words(nbytes), nbytes)


def count(parameters: float) -> Quantity:
    """A number of parameters as people say it: `1.53 B`."""
    value = parameters
    for unit in ("", " K", " M", " B"):
        if value < 999.5:
            return Quantity(f"{value:.3g}{unit}", parameters)
        value /= 1000
    return Quantity(f"{value:.3g} T", parameters)
