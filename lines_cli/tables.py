"""A report as tables and sentences: what a terminal and a page of HTML show alike. Plain values; nothing is drawn here.

Names come from strangers' files: whoever shows them makes them harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lines_cli.report import Report

FOLDED = 12
"""Most rows that a stack has, unless all are asked for."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A cell that is drawn: a share of its column's width, 0 to 1."""

    share: float


Cell = str | Bar


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings. The first column is text, the others are numbers, the last may be bars."""

    headings: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading (or none), sentences with a word before each, and tables with what is to say of each."""

    title: str
    facts: tuple[tuple[str, str], ...] = ()
    tables: tuple[tuple[str, Table], ...] = ()


def sections(told: Report, *, full: bool = False) -> list[Section]:
    """A whole report.

    Args:
        told: from `lines_cli.report.make_report`.
        full: every layer and name, however many.
    """
    found = [_headers(told, full=full)]
    fine_tunes = told.get("fine_tunes", [])
    if len(fine_tunes) == 1:
        found.append(_fine_tune(told, fine_tunes[0], full=full))
    elif fine_tunes:
        found.append(_fine_tunes(told, fine_tunes, full=full))
        if told["together"]:
            found.append(_together(told["together"], full=full))
    if "map" in told:
        found.append(_map(told["map"]))
    if "health" in told:
        found.append(_health(told["health"], full=full))
    return found


# --- what headers tell ---


def _headers(told: Report, *, full: bool) -> Section:
    files = told["files"]
    held = "1 file" if len(files) == 1 else f"{len(files)} files"
    dtypes = told["dtypes"]
    by_dtype = ", ".join(
        dtype if len(dtypes) == 1 else f"{dtype} {size(counts['bytes'])}" for dtype, counts in dtypes.items()
    )
    counts = f"{told['tensors']:,} tensors, {count(told['parameters'])} parameters, {size(told['bytes'])} ({by_dtype})"
    facts = [("", f"{held}, {counts}")]
    if told["base"] is not None:
        facts.append(("base", told["base"]))
    tied = told["tied"]
    facts += [("tied", f"{head} to {embedding}, by config.json; both are stored") for head, embedding in tied["stored"]]
    if tied["config"] and not tied["stored"]:
        facts.append(("tied", "the head to the token embedding, by config.json"))
    if told["quantised"]:
        facts.append(("quantised", told["quantised"]))
    if told["recipe"]:
        facts.append(("recipe", _recipe(told["recipe"])))
    rows = [
        (
            stack["name"] or "(no prefix)",
            f"{stack['layers']}",
            *_amounts(stack),
            _coefficient(stack["first"]),
            _coefficient(stack["last"]),
        )
        for stack in told["stacks"]
    ]
    outside = told["outside"]
    for side, where in (("before", "outside, before"), ("after", "outside, behind")):
        if outside[side]["tensors"]:
            value = _coefficient(outside[side]["coefficient"])
            rows.append((where, "", *_amounts(outside[side]), value, value))
    tables = [("", Table(("stack", "layers", "tensors", "parameters", "bytes", "first", "last"), tuple(rows)))]
    if not told.get("fine_tunes"):
        tables += [_layers_of(told, stack, full=full) for stack in told["stacks"]]
    names = [f"{stack['names']}" for stack in told["stacks"] if stack["names"]]
    facts += [("names", ", ".join(names))] if names else []
    facts.append(("LiNeS", _scaling(told["lines"])))
    return Section(told["checkpoint"], tuple(facts), tuple(tables))


def _amounts(counts: Report) -> tuple[str, str, str]:
    return f"{counts['tensors']:,}", count(counts["parameters"]), size(counts["bytes"])


def _layers_of(told: Report, stack: Report, *, full: bool) -> tuple[str, Table]:
    layers = [layer for layer in told["layers"] if layer["stack"] == stack["name"]]
    most = max((abs(layer["coefficient"]) for layer in layers), default=0)
    shown, more = _folded(layers, full=full)
    rows = tuple(
        (
            f"{layer['index']}",
            *_amounts(layer),
            _coefficient(layer["coefficient"]),
            _bar(abs(layer["coefficient"]), most),
        )
        for layer in shown
    )
    return _titled(stack, more), Table(("layer", "tensors", "parameters", "bytes", "c", ""), rows)


def _titled(stack: Report, more: str) -> str:
    return f"{stack['name'] or '(no prefix)'}{more}"


def _scaling(lines: Report) -> str:
    """How the coefficients were chosen."""
    said = [f"{key} {_plain(lines[key])}" for key in ("alpha", "beta", "gamma") if key in lines]
    said += [f"{key} {_plain(lines[key])}" for key in ("schedule", "outside")]
    said += [
        f"{key} {name}={_plain(value)}" for key in ("stacks", "filter") for name, value in lines.get(key, {}).items()
    ]
    return ", ".join(said)


def _recipe(recipe: Report) -> str:
    models = ", ".join(source["model"] for source in recipe["models"])
    text = f"{recipe['merge_method']} of {models}"
    text += f" on {recipe['base_model']}" if "base_model" in recipe else ""
    said = [f"{key} {_plain(value)}" for key, value in recipe.get("parameters", {}).items()]
    said += [f"dtype {recipe['dtype']}"] if "dtype" in recipe else []
    lines = f"; LiNeS with {_scaling(recipe['lines'])}" if "lines" in recipe else "; no LiNeS"
    return text + (f" with {', '.join(said)}" if said else "") + lines


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(_plain(inner) for inner in value.values())
    if isinstance(value, list):
        return ",".join(_plain(inner) for inner in value)
    return number(value) if isinstance(value, float) else str(value)


# --- one fine-tune ---

_CHANGES = ("update", "relative", "unchanged", "largest", "c", "scaled", "")


def _fine_tune(told: Report, tune: Report, *, full: bool) -> Section:
    most = max((layer["relative_norm"] or 0 for layer in tune["layers"]), default=0)

    def row(name: str, group: Report, coefficient: float | None, *, barred: bool = True) -> tuple[Cell, ...]:
        bar = _bar(group["relative_norm"] or 0, most) if barred else Bar(0)
        cells = (number(group["update_norm"]), share(group["relative_norm"]), share(group["unchanged"]))
        value = "" if coefficient is None else _coefficient(coefficient)
        return (name, *cells, number(group["largest"]), value, number(group["scaled_norm"]), bar)

    tables = []
    for stack in tune["stacks"]:
        shown, more = _folded([layer for layer in tune["layers"] if layer["stack"] == stack["name"]], full=full)
        rows = [row(f"{layer['index']}", layer, layer["coefficient"]) for layer in shown]
        rows.append(row("all", stack, None, barred=False))
        tables.append((_titled(stack, more), Table(("layer", *_CHANGES), tuple(rows))))
    rest = [
        row(where, tune["outside"][side], tune["outside"][side]["coefficient"], barred=False)
        for side, where in (("before", "before"), ("after", "behind"))
        if told["outside"][side]["tensors"]
    ]
    if rest:
        tables.append(("outside the blocks", Table(("", *_CHANGES[:-1]), tuple(cells[:-1] for cells in rest))))
    kinds = [row(kind["kind"], kind, None, barred=False) for kind in tune["kinds"]]
    headings = ("", *_CHANGES[:4], _CHANGES[5])
    tables.append(("by kind", Table(headings, tuple((*cells[:5], cells[6]) for cells in kinds))))
    return Section(f"update of {tune['model']}", _changed(tune), tuple(tables))


def _changed(tune: Report) -> tuple[tuple[str, str], ...]:
    compared = tune["compared"]
    left_out = f"; {compared['left_out']:,} entries that are not finite left out" if compared["left_out"] else ""
    largest = f"{number(tune['largest'])} in {tune['largest_in']}" if tune["largest_in"] else "nothing"
    first, last = share(tune["first_third"]), share(tune["last_third"])
    scaled = f"norm {number(tune['scaled_norm'])}, {share(tune['scaled_relative_norm'])} of the base's"
    scaled_first, scaled_last = share(tune["scaled_first_third"]), share(tune["scaled_last_third"])
    return (
        ("compared", f"{compared['tensors']:,} tensors, {count(compared['parameters'])} parameters{left_out}"),
        ("update", f"norm {number(tune['update_norm'])}, {share(tune['relative_norm'])} of the base's"),
        ("unchanged", f"{share(tune['unchanged'])} of the entries; largest change {largest}"),
        ("depth", f"{first} of the squared norm in the first third of the layers, {last} in the last"),
        ("scaled", f"{scaled}; {scaled_first} in the first third, {scaled_last} in the last"),
    )


# --- several ---


def _fine_tunes(told: Report, tunes: Sequence[Report], *, full: bool) -> Section:
    rows = [
        (
            f"{at} {tune['model']}",
            number(tune["update_norm"]),
            share(tune["relative_norm"]),
            share(tune["unchanged"]),
            share(tune["first_third"]),
            share(tune["last_third"]),
            number(tune["scaled_norm"]),
        )
        for at, tune in enumerate(tunes, 1)
    ]
    headings = ("fine-tune", "update", "relative", "unchanged", "first 1/3", "last 1/3", "scaled")
    tables = [("", Table(headings, tuple(rows)))]
    numbered = [str(at) for at in range(1, len(tunes) + 1)]
    for at, stack in enumerate(told["stacks"]):
        layers = [layer for layer in told["layers"] if layer["stack"] == stack["name"]]
        own = [[layer for layer in tune["layers"] if layer["stack"] == stack["name"]] for tune in tunes]
        shown, more = _folded(list(zip(layers, *own, strict=True)), full=full)
        rows_of = [
            (
                f"{layer['index']}",
                _coefficient(layer["coefficient"]),
                *(share(each["relative_norm"]) for each in changes),
            )
            for layer, *changes in shown
        ]
        rows_of.append(("all", "", *(share(tune["stacks"][at]["relative_norm"]) for tune in tunes)))
        title = f"update relative to the weights, {_titled(stack, more)}"
        tables.append((title, Table(("layer", "c", *numbered), tuple(rows_of))))
    kinds = [
        (kind["kind"], *(share(tune["kinds"][at]["relative_norm"]) for tune in tunes))
        for at, kind in enumerate(tunes[0]["kinds"])
    ]
    tables.append(("update relative to the weights, by kind", Table(("", *numbered), tuple(kinds))))
    return Section(f"updates of {len(tunes)} fine-tunes", (), tuple(tables))


def _together(together: Report, *, full: bool) -> Section:
    models = together["models"]
    numbered = [str(at) for at in range(1, len(models) + 1)]
    auto = together["auto"]
    alpha = "not defined: nothing changed"
    if auto["alpha"] is not None:
        norms = f"{number(auto['sum'])} / {number(auto['merged'])}"
        alpha = (
            f"alpha {number(auto['alpha'])} = 1/{len(models)} * {norms}, L1 norms of the sum and of the merged vector"
        )
        alpha += " (task arithmetic, which merges the sum; of other methods lines merge tells it)"
    facts = (
        ("signs", f"{share(together['disagreement'])} of the entries are increased by one and decreased by another"),
        ("sum", f"norm {number(together['norm_of_sum'])}; the norms sum up to {number(together['sum_of_norms'])}"),
        ("auto", alpha),
    )
    cosines = tuple(
        (f"{at} {model}", *(_cosine(value) for value in row))
        for at, (model, row) in enumerate(zip(models, together["cosine"], strict=True), 1)
    )
    tables = [("cosine similarity of the updates", Table(("", *numbered), cosines))]
    for stack in together["stacks"]:
        shown, more = _folded([layer for layer in together["layers"] if layer["stack"] == stack["name"]], full=full)
        rows = [_interference(f"{layer['index']}", layer) for layer in shown]
        rows.append(_interference("all", stack))
        headings = ("layer", "cosine", "lowest", "disagree", "norm of sum", "sum of norms", "")
        tables.append((_titled(stack, more), Table(headings, tuple(rows))))
    return Section("how they interfere", facts, tuple(tables))


def _interference(name: str, group: Report) -> tuple[Cell, ...]:
    pairs = [value for at, row in enumerate(group["cosine"]) for value in row[:at] if value is not None]
    mean = sum(pairs) / len(pairs) if pairs else None
    return (
        name,
        _cosine(mean),
        _cosine(min(pairs, default=None)),
        share(group["disagreement"]),
        number(group["norm_of_sum"]),
        number(group["sum_of_norms"]),
        _bar(group["disagreement"] or 0, 1),
    )


def _cosine(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# --- every tensor; health ---


def _map(tensors: Sequence[Report]) -> Section:
    changed = "update_norm" in tensors[0] if tensors else False
    rows = tuple(
        (
            tensor["name"],
            tensor["dtype"],
            "x".join(map(str, tensor["shape"])) or "scalar",
            f"{tensor['index']}" if tensor["index"] is not None else tensor["side"].replace("after", "behind"),
            tensor["kind"],
            _coefficient(tensor["coefficient"]),
            *((number(tensor["update_norm"]), share(tensor["relative_norm"])) if changed else ()),
        )
        for tensor in tensors
    )
    headings = ("tensor", "dtype", "shape", "layer", "kind", "c", *(("update", "relative") if changed else ()))
    return Section("tensors", (), (("", Table(headings, rows)),))


def _health(told: Sequence[Report], *, full: bool) -> Section:
    facts: list[tuple[str, str]] = []

    def several(what: str, found: Sequence[Any], say: Callable[[Any], str]) -> None:
        shown = found if full else found[:_MOST_NAMES]
        more = [f"... and {len(found) - len(shown):,} more (--full)"] if len(found) > len(shown) else []
        if found:
            facts.append((what, "\n".join([*map(say, shown), *more])))

    for health in told:
        facts.append(("", f"{health['checkpoint']}: {health['tensors']:,} float tensors"))
        before = len(facts)
        several("NaN, Inf", health["nonfinite"], lambda e: f"{e['tensor']}: {e['nan']:,} NaN, {e['inf']:,} Inf")
        several("range", health["beyond"], _beyond)
        several("zero", health["zero"], str)
        several("same", health["same"], lambda e: f"{e['tensor']} is {e['as']}")
        several("changed", list(health["changed_files"].items()), lambda e: f"{e[0]}: {e[1]}")
        if len(facts) == before:
            facts[-1] = ("", f"{facts[-1][1]}, nothing wrong")
    return Section("health", tuple(facts))


def _beyond(entry: Report) -> str:
    return f"{entry['tensor']}: {number(entry['largest'])} is beyond {' and '.join(entry['dtypes'])}"


_MOST_NAMES = 8


# --- numbers in words ---


def _folded(rows: Sequence[Any], *, full: bool) -> tuple[Sequence[Any], str]:
    """Of many rows some at equal distances, the first and the last among them; and words that say so."""
    if full or len(rows) <= FOLDED:
        return rows, ""
    chosen = sorted({round(at * (len(rows) - 1) / (FOLDED - 1)) for at in range(FOLDED)})
    return [rows[at] for at in chosen], f": {len(chosen)} of {len(rows)} layers (--full shows all)"


def _bar(value: float, most: float) -> Bar:
    return Bar(min(1.0, value / most) if most else 0.0)


def _coefficient(value: float) -> str:
    return f"{value:.4g}"


def number(value: float | None) -> str:
    """Four digits; `-` where there is none."""
    return "-" if value is None else f"{value:.4g}"


def share(value: float | None) -> str:
    """A share in percent, three digits; what is many times the whole as a factor."""
    if value is None:
        return "-"
    percent = 100 * value
    if percent >= 1000:
        return f"{value:.4g}x"
    if percent >= 10 or percent == 0:
        return f"{percent:.1f}%"
    return f"{percent:.2f}%" if percent >= 0.01 else f"{percent:.2g}%"


def size(nbytes: float) -> str:
    """Bytes as people say them, decimal: `3.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:.3g} TB"


def count(number: float) -> str:
    """A number of parameters as people say it: `1.53 B`."""
    for unit in ("", " K", " M", " B"):
        if number < 1000:
            return f"{number}" if not unit else f"{number:.3g}{unit}"
        number = number / 1000
    return f"{number:.3g} T"
