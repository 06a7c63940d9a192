"""The report of `lines inspect`, as plain values that JSON can hold (docs/inspecting.md describes them). Tables and
figures show what stands here, and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from itertools import chain, combinations
from operator import add
from typing import Any, TypeVar

from lines_cli.checkpoint.header import FLOAT8_DTYPES, FLOAT_DTYPES
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.inspection.adapters import Norms as NormsOfAdapter
from lines_cli.inspection.adapters import about
from lines_cli.inspection.kinds import KINDS
from lines_cli.inspection.open import Inspection, TensorEntry
from lines_cli.inspection.statistics import Findings, Interference, UpdateStats, ValueStats
from lines_cli.plan.coefficients import layer_coefficients, outside_coefficients
from lines_cli.plan.realised import NOTHING_REALISED, Forecast, is_off
from lines_cli.plan.statistics import Norms
from lines_cli.plan.tensors import STORED
from lines_cli.plan.tied_weights import tied_copies, tied_heads
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import Side, pattern_of
from lines_cli.storage.names import natural
from lines_cli.version import ABOUT

Report = dict[str, Any]
"""Nested dicts and lists of plain values."""

Key = TypeVar("Key", bound=Hashable)
Numbers = Callable[[Sequence[TensorEntry]], Report]
"""What is said of a group of tensors."""

OVERFLOWS = {"float32": 2.0**128 - 2.0**103, "bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0}
"""Float dtypes, and the least magnitude that each rounds to infinity."""
_NARROWER = {"F64": ("float32", "bfloat16", "float16"), "F32": ("bfloat16", "float16"), "BF16": ("float16",)}


def make_report(
    inspection: Inspection,
    findings: Findings | None = None,
    *,
    tensors: bool = False,
    norms: NormsOfAdapter | None = None,
) -> Report:
    """Everything about what was inspected.

    Args:
        inspection: what headers tell.
        findings: what the numbers tell, if they were read.
        tensors: also every single tensor.
        norms: of an adapter, what was measured of its factors.
    """
    auto = findings is not None and inspection.of == "merge" and inspection.scaling.needs_alpha
    if findings is not None and (auto or findings.scores):
        alpha = _alpha(inspection, findings.norms) if inspection.scaling.needs_alpha else None
        inspection = inspection.with_measured(alpha=alpha, scores=findings.scores)
    changes = [_changes(findings, model) for model in range(len(inspection.models))] if findings else []
    one = changes[0] if inspection.has_base and len(changes) == 1 else None

    def own(parts: Sequence[TensorEntry]) -> Report:
        return _counts(parts) | (one(parts) if one else {})

    checkpoint = inspection.checkpoint
    report: Report = {
        **ABOUT,
        "checkpoint": checkpoint.name,
        "base": inspection.checkpoints[0].name if inspection.has_base else None,
        **_counts(inspection.parts),
        "files": _files(checkpoint),
        "dtypes": {
            dtype: _counts(parts) for dtype, parts in sorted(_grouped(inspection, lambda part: part.info.dtype).items())
        },
        **_groups(inspection, own),
        "tied": {
            "config": inspection.says_tied,
            "stored": [list(pair) for pair in inspection.stored_heads.items()],
        },
        "quantised": inspection.quantised,
        "adapter": about(*inspection.adapter, norms) if inspection.adapter else None,
        "stored_as": checkpoint.stored_as,
        "recipe": inspection.made_by.model_dump(mode="json", exclude_none=True) if inspection.made_by else None,
        "scaling": _scaling(inspection),
        "notes": list(inspection.notes),
    }
    if inspection.made_by is not None and inspection.made_by.layers:
        report["recorded"] = [layer.model_dump() for layer in inspection.made_by.layers]
    if inspection.made_by is not None and (digests := _digests(inspection.made_by)):
        report["digests"] = digests
    if tensors:
        report["map"] = [_tensor(part) | (one([part]) if one else {}) for part in inspection.parts]
        for row in report["map"]:
            if findings is not None and row["name"] in findings.forecasts:
                row["realised"] = findings.forecasts[row["name"]].realised.coefficient
    if findings is None:
        return report
    if inspection.has_base:
        report["not_compared"] = [{"tensor": name, "why": why} for name, why in inspection.not_compared.items()]
        report["fine_tunes"] = [_fine_tune(inspection, findings, model) for model in range(len(inspection.models))]
        report["merge"] = _merge(inspection)
        report["rounding"] = _rounding(inspection, findings, report) if findings.forecasts else None
        report["together"] = _together(inspection, findings) if len(changes) > 1 else None
    report["health"] = [_health(inspection, findings, side) for side in range(len(inspection.checkpoints))]
    report["bytes_read"], report["seconds"] = findings.bytes_read, round(findings.seconds, 3)
    return report


def _rounding(inspection: Inspection, findings: Findings, report: Report) -> Report:
    """What rounding would make of the scaling: to which dtype, and what would be off."""
    entries: Counter[tuple[str, bool]] = Counter()
    for span in inspection.spans():
        if span.planned is not None:
            entries[span.planned.dtype, span.planned.in_float64] += span.segments[0].numel
    (most, in_float64), _ = entries.most_common(1)[0]
    keys = ("stack", "index", "coefficient", "realised")
    outside = [
        {"side": side, **{key: report["outside"][side][key] for key in keys[2:]}} for side in ("before", "after")
    ]
    filters = []
    for (pattern, coefficient), parts in _grouped(inspection, lambda part: (part.filter, part.coefficient)).items():
        if pattern is not None:
            known = (findings.forecasts[part.name].realised for part in parts if part.name in findings.forecasts)
            realised = reduce(add, known, NOTHING_REALISED).coefficient
            filters.append({"pattern": pattern, "coefficient": coefficient, "realised": realised})

    def off(groups: Iterable[Report]) -> list[Report]:
        known = (group for group in groups if group["coefficient"] is not None)
        return [group for group in known if is_off(group["coefficient"], group["realised"])]

    return {
        "dtype": next(name for name, stored in STORED.items() if stored == most),
        "arithmetic": "float64" if in_float64 else "float32",
        "off": [{key: layer[key] for key in keys} for layer in off(report["layers"])],
        "outside_off": off(outside),
        "filters_off": off(filters),
    }


def problems(report: Report) -> list[str]:
    """What is wrong with the checkpoints, a line for each kind of it."""
    found = []
    for health in report.get("health", ()):
        for key, what in _PROBLEMS.items():
            if number := len(health[key]):
                found.append(f"{health['checkpoint']}: {what}: {number:,}")
    return found


_PROBLEMS = {
    "nonfinite": "tensors with NaN or Inf",
    "beyond": "tensors with values that a narrower dtype cannot hold",
    "zero": "tensors of zeros",
    "empty": "tensors of size 0",
    "same": "tensors that are another's duplicate",
    "changed_files": "files that are not as lines wrote them",
}


def _scaling(inspection: Inspection) -> Report:
    """Where the coefficients come from: the `lines:` of a recipe, and what alpha is if that says auto."""
    recipe = inspection.recipe
    listed = isinstance(inspection.scaling.schedule, tuple)
    alpha = None if listed or recipe.lines is None else _finite(inspection.rules.schedule.first)
    return {
        "of": inspection.of,
        "lines": recipe.lines.model_dump(mode="json", exclude_none=True) if recipe.lines else None,
        "lambda": recipe.scale,
        "alpha": alpha,
    }


def _merge(inspection: Inspection) -> Report:
    """The recipe that would give what is shown as scaled; of several fine-tunes the merge of them."""
    recipe: Report = inspection.recipe.model_dump(mode="json", exclude_none=True)
    if inspection.of == "asked":
        recipe["like"] = "ft" if len(inspection.models) == 1 else "base"
        if inspection.resized:
            recipe["resize"] = "ft"
        if inspection.not_compared:
            recipe["missing"] = "ft"
        if inspection.missing_in_blocks:
            recipe["missing_in_blocks"] = inspection.missing_in_blocks
    return {key: value for key, value in recipe.items() if key == "like" or value not in ({}, *_UNSAID.get(key, ()))}


_UNSAID: dict[str, tuple[Any, ...]] = {
    "allow_nonfinite": (False,),
    "missing": ("error",),
    "resize": ("error",),
    "max_shard_size": (5_000_000_000,),
}


def _digests(recipe: Recipe) -> Report:
    """What an output's recipe records of the files that were read and written; empty if it records none."""
    written = [{"file": name, "bytes": record.nbytes, "digest": record.digest} for name, record in recipe.files.items()]
    read = []
    for name, record in recipe.inputs.items():
        said = record if isinstance(record, dict) else {}
        texts = {key: said[key] if isinstance(said.get(key), str) else None for key in ("digest", "header")}
        nbytes = said.get("bytes")
        read.append({"file": name, "bytes": nbytes if type(nbytes) is int and nbytes >= 0 else None, **texts})
    return {"run": recipe.run, "read": read, "written": written} if read or written else {}


def _files(checkpoint: Checkpoint) -> list[Report]:
    codes = (found for name in checkpoint.formulas if (found := checkpoint.codes(name)))
    plain = (stored for name, stored in checkpoint.tensors.items() if checkpoint.codes(name) is None)
    tensors: Counter[int] = Counter()
    nbytes: Counter[int] = Counter()
    for stored in (*plain, *chain.from_iterable(codes), *checkpoint.beside.values()):
        tensors[stored.file] += 1
        nbytes[stored.file] += stored.info.nbytes
    return [
        {"name": file.name, "tensors": tensors[number], "bytes": nbytes[number]}
        for number, file in enumerate(checkpoint.files)
    ]


# --- groups of tensors ---


def _grouped(inspection: Inspection, key: Callable[[TensorEntry], Key]) -> dict[Key, list[TensorEntry]]:
    groups: dict[Key, list[TensorEntry]] = defaultdict(list)
    for part in inspection.parts:
        groups[key(part)].append(part)
    return groups


def _groups(inspection: Inspection, numbers: Numbers) -> Report:
    """The stacks, their layers, what lies outside them, and the kinds of parameters, each with its numbers."""
    layers = _grouped(inspection, lambda part: part.place)
    stacks = _grouped(inspection, lambda part: part.place and part.place.stack)
    inputs = _grouped(inspection, lambda part: part.side)
    kinds = _grouped(inspection, lambda part: part.kind)
    components = _grouped(inspection, lambda part: inspection.depth.component_of(part.name))
    by_layer: dict[tuple[str, int], float | None] = {}
    known = inspection.knows_coefficients
    for stack, values in layer_coefficients(inspection.recipe, inspection.rules, inspection.depth):
        by_layer.update({(stack, index): _finite(value) if known else None for index, value in enumerate(values)})
    before, after = (_outside(inspection, side, inputs[side]) if known else None for side in _SIDES)
    places = {(place.stack, place.index): parts for place, parts in layers.items() if place}
    return {
        "stacks": [
            {
                "name": stack.name,
                "layers": stack.layers,
                "names": pattern_of(stack, inspection.depth),
                "first": by_layer[stack.name, 0],
                "last": by_layer[stack.name, stack.layers - 1],
                **numbers(stacks[stack.name]),
            }
            for stack in inspection.depth.stacks
        ],
        "layers": [
            {"stack": stack, "index": index, "coefficient": coefficient, **numbers(places.get((stack, index), []))}
            for (stack, index), coefficient in by_layer.items()
        ],
        "outside": {
            **numbers(stacks[None]),
            "before": {"coefficient": before, **numbers(inputs["before"])},
            "after": {"coefficient": after, **numbers(inputs["after"])},
        },
        "components": [
            {
                "name": name,
                "stacks": [stack.name for stack in inspection.depth.stacks if stack.component == name],
                **numbers(components[name]),
            }
            for name in dict.fromkeys(region.component for region in inspection.depth.regions)
        ],
        "kinds": [{"kind": kind, **numbers(kinds[kind])} for kind in KINDS if kinds[kind]],
    }


_SIDES: tuple[Side, Side] = ("before", "after")


def _outside(inspection: Inspection, side: Side, parts: Sequence[TensorEntry]) -> float | None:
    """The coefficient of what lies outside the blocks, on one side of them; None where several models differ in it."""
    models = dict.fromkeys(inspection.depth.component_of(part.name) for part in parts) or {None: None}
    number = _SIDES.index(side)
    values = {outside_coefficients(inspection.recipe, inspection.rules, model)[number] for model in models}
    return _finite(values.pop()) if len(values) == 1 else None


def _counts(parts: Iterable[TensorEntry]) -> Report:
    infos = [part.info for part in parts]
    return {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
    }


def _tensor(part: TensorEntry) -> Report:
    return {
        "name": part.name,
        "dtype": part.info.dtype,
        "shape": list(part.info.shape),
        "parameters": part.info.numel,
        "bytes": part.info.nbytes,
        "stack": part.place.stack if part.place else None,
        "index": part.place.index if part.place else None,
        "side": part.side,
        "kind": part.kind,
        "coefficient": _finite(part.coefficient),
    }


# --- what a fine-tune changed ---


def _changes(findings: Findings, model: int) -> Numbers:
    """What one fine-tune changed of a group of tensors, and what LiNeS would leave of that."""

    def numbers(parts: Sequence[TensorEntry]) -> Report:
        known = [(part, findings.changes[part.name][model]) for part in parts if part.name in findings.changes]
        whole = reduce(add, (change for _, change in known), UpdateStats())
        base, norm = _norm(whole.base_squares), _norm(whole.squares)
        scaled = _finite(math.hypot(*(part.coefficient * math.sqrt(change.squares) for part, change in known)))
        if _vanishes(whole):
            norm = scaled = None
        largest = [abs(part.coefficient) * change.largest for part, change in known]
        forecasts = [
            (part.by_depth, findings.forecasts[part.name]) for part, _ in known if part.name in findings.forecasts
        ]
        foreseen = reduce(add, (forecast for _, forecast in forecasts), Forecast())
        by_depth = reduce(add, (forecast.realised for shared, forecast in forecasts if shared), NOTHING_REALISED)
        report = {
            "update_norm": norm,
            "relative_norm": _ratio(norm, base),
            "unchanged": _ratio(whole.unchanged, whole.numel),
            "largest": _finite(whole.largest),
            "scaled_norm": scaled,
            "scaled_relative_norm": _ratio(scaled, base),
            "scaled_largest": max(largest, default=0.0) if all(map(math.isfinite, largest)) else None,
            "realised": by_depth.coefficient,
            "units": {"median": foreseen.median, **{word: foreseen.share(n) for n, word in enumerate(_UNITS)}}
            if foreseen.units
            else None,
        }
        return report if whole.numel else dict.fromkeys(report)

    return numbers


_UNITS = ("zero", "one", "two")


def _vanishes(change: UpdateStats) -> bool:
    """Whether it is so small that float64 cannot hold its squares."""
    return change.squares < _LEAST_SQUARES and change.unchanged < change.numel


_LEAST_SQUARES = 1e-290  # below, they lose digits


def _fine_tune(inspection: Inspection, findings: Findings, model: int) -> Report:
    parts = [part for part in inspection.parts if part.name in findings.changes]
    changes = {part.name: findings.changes[part.name][model] for part in parts}
    numbers = _changes(findings, model)
    largest = max(parts, key=lambda part: changes[part.name].largest, default=None)

    def squares(third: Callable[[float], bool], *, scaled: bool) -> float:
        return sum(
            changes[part.name].squares * (part.coefficient * part.coefficient if scaled else 1)
            for part in parts
            if part.place and third((part.place.index + 0.5) / inspection.depth.layers[part.place.stack])
        )

    def thirds(*, scaled: bool) -> list[float | None]:
        whole = squares(lambda _: True, scaled=scaled)
        ends: list[Callable[[float], bool]] = [lambda depth: depth < 1 / 3, lambda depth: depth > 2 / 3]
        return [_ratio(squares(end, scaled=scaled), whole) for end in ends]

    shared = sum(tensor.segment.numel for tensor in inspection.compared)
    finite = sum(change.numel for change in changes.values())
    first, last = thirds(scaled=False)
    scaled_first, scaled_last = thirds(scaled=True)
    return {
        "model": inspection.models[model].name,
        "compared": {"tensors": len(parts), "parameters": finite, "left_out": shared - finite},
        **numbers(parts),
        "largest_in": largest.name if largest and changes[largest.name].largest else None,
        "first_third": first,
        "last_third": last,
        "scaled_first_third": scaled_first,
        "scaled_last_third": scaled_last,
        **_groups(inspection, numbers),
    }


# --- how several go together ---


def _together(inspection: Inspection, findings: Findings) -> Report:
    models = len(inspection.models)

    def numbers(parts: Sequence[TensorEntry]) -> Report:
        known = [(findings.joint[part.name], part.coefficient) for part in parts if part.name in findings.joint]
        entries = sum(joint.numel for joint, _ in known)
        opposed = [sum(pair) for pair in zip(*(joint.opposed for joint, _ in known), strict=True)]
        report = {
            "disagreement": _ratio(sum(joint.disagreeing for joint, _ in known), entries),
            "opposed": _matrix(models, [_ratio(pair, entries) for pair in opposed], same=0.0 if entries else None),
            **_sums(models, [(joint, 1.0) for joint, _ in known]),
        }
        report |= {f"scaled_{key}": value for key, value in _sums(models, known).items()}
        for model in range(models):
            changes = (findings.changes[part.name][model] for part in parts if part.name in findings.joint)
            if _vanishes(reduce(add, changes, UpdateStats())):
                report |= dict.fromkeys(("norm_of_sum", "sum_of_norms", "scaled_norm_of_sum", "scaled_sum_of_norms"))
        return report

    return {
        "models": [model.name for model in inspection.models],
        **numbers(inspection.parts),
        "auto": _auto(inspection, findings),
        **_groups(inspection, numbers),
    }


def _sums(models: int, known: Sequence[tuple[Interference, float]]) -> Report:
    """How the updates of several tensors go together, each tensor's times a coefficient."""
    squared = [(joint, factor * factor) for joint, factor in known if joint.numel]
    if not squared:
        return {"cosine": _matrix(models, (), same=None), "norm_of_sum": None, "sum_of_norms": None}
    norms = [math.hypot(*(f * math.sqrt(joint.squares[m]) for joint, f in known)) for m in range(models)]
    cosines = []
    for pair, (a, b) in enumerate(combinations(range(models), 2)):
        ratio = _ratio(sum(square * joint.products[pair] for joint, square in squared), norms[a] * norms[b])
        cosines.append(None if ratio is None else max(-1.0, min(1.0, ratio)))
    cosine = _matrix(models, cosines, same=1.0)
    for model, norm in enumerate(norms):
        cosine[model][model] = 1.0 if norm and math.isfinite(norm) else None
    return {
        "cosine": cosine,
        "norm_of_sum": _norm(sum(square * joint.sum_squares for joint, square in squared)),
        "sum_of_norms": _finite(sum(norms)),
    }


def _matrix(models: int, pairs: Sequence[float | None], *, same: float | None) -> list[list[float | None]]:
    """Models by models, from a value for each pair and one for a model with itself."""
    found: list[list[float | None]] = [[same if a == b else None for b in range(models)] for a in range(models)]
    for (a, b), value in zip(combinations(range(models), 2), pairs, strict=False):
        found[a][b] = found[b][a] = value
    return found


def _alpha(inspection: Inspection, norms: Norms | None) -> float:
    """What `alpha: auto` is. Nothing was measured where the merged task vector is the sum."""
    if norms is None:
        return 1 / len(inspection.models)
    return norms.alpha if norms.merged and math.isfinite(norms.merged) else math.nan


def _auto(inspection: Inspection, findings: Findings) -> Report:
    """What `alpha: auto` of the recipe would be, and the L1 norms behind it."""
    recipe, models = inspection.recipe, len(inspection.models)
    norms = findings.norms
    if norms is None:  # the merged task vector is the sum
        l1 = sum(joint.sum_l1 for joint in findings.joint.values())
        norms = Norms(l1, l1, models)
    return {
        "method": recipe.merge_method,
        "alpha": _finite(_alpha(inspection, norms)),
        "sum": _finite(norms.total),
        "merged": _finite(norms.merged),
    }


# --- health ---


def _health(inspection: Inspection, findings: Findings, side: int) -> Report:
    checkpoint, config = inspection.checkpoints[side], inspection.config_of(side)
    names = sorted((name for where, name in findings.seen if where == side), key=natural)
    seen = {name: findings.seen[side, name] for name in names}
    others = [
        stored.info.dtype
        for stored in checkpoint.tensors.values()
        if stored.info.dtype not in FLOAT_DTYPES | FLOAT8_DTYPES
    ]
    same, heads = [], tied_heads(checkpoint, config)
    for group in findings.same.get(side, ()):
        tied = tied_copies(group, heads)
        first, *others = [name for name in group if name not in tied] or group[:1]
        same += [(name, first) for name in others]
    recorded, changed = findings.files.get(side, (None, {}))
    beyond = {name: _cannot_hold(checkpoint.tensors[name].info.dtype, found) for name, found in seen.items()}
    return {
        "checkpoint": checkpoint.name,
        "tensors": len(seen),
        "not_looked_into": dict(sorted(Counter(others).items())),
        "nonfinite": [
            {"tensor": name, "nan": found.nan, "inf": found.inf}
            for name, found in seen.items()
            if found.nan or found.inf
        ],
        "beyond": [
            {"tensor": name, "largest": _largest(seen[name]), "dtypes": dtypes}
            for name, dtypes in beyond.items()
            if dtypes
        ],
        "empty": [name for name, stored in checkpoint.tensors.items() if 0 in stored.info.shape],
        "zero": [
            name for name, found in seen.items() if found.low == found.high == 0 and not found.nan and not found.inf
        ],
        "same": [{"tensor": name, "as": first} for name, first in same],
        "recorded_files": recorded or None,
        "changed_files": dict(changed),
    }


def _largest(found: ValueStats) -> float:
    return max(-found.low, found.high)


def _cannot_hold(dtype: str, found: ValueStats) -> list[str]:
    """The narrower dtypes in which its largest finite entry would be infinite."""
    return [narrower for narrower in _NARROWER.get(dtype, ()) if _largest(found) >= OVERFLOWS[narrower]]


def _ratio(part: float | None, whole: float | None) -> float | None:
    return _finite(part / whole) if part is not None and whole and math.isfinite(whole) else None


def _norm(squares: float) -> float | None:
    return _finite(math.sqrt(squares))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
