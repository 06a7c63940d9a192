"""What `lines inspect` tells, as plain values that JSON can hold (docs/json.md describes them). Tables and figures show
what stands here, and nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from itertools import combinations
from operator import add
from typing import Any, TypeVar

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.inspection import Change, Findings, Inspection, Joint, Part, Seen, pattern_of
from lines_cli.kinds import KINDS
from lines_cli.pairing import tied_embedding

Report = dict[str, Any]
"""Nested dicts and lists of plain values."""

Key = TypeVar("Key", bound=Hashable)
Numbers = Callable[[Sequence[Part]], Report]
"""What is told of a group of tensors."""

OVERFLOWS = {"float32": 2.0**128 - 2.0**103, "bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0}
"""Float dtypes, and the least magnitude that each rounds to infinity."""
_NARROWER = {"F64": ("float32", "bfloat16", "float16"), "F32": ("bfloat16", "float16"), "BF16": ("float16",)}


def make_report(inspection: Inspection, findings: Findings | None = None, *, tensors: bool = False) -> Report:
    """Everything about what was inspected.

    Args:
        inspection: what headers tell.
        findings: what the numbers tell, if they were read.
        tensors: also every single tensor.
    """
    changes = [_changes(findings, model) for model in range(len(inspection.models))] if findings else []
    one = changes[0] if inspection.has_base and len(changes) == 1 else None

    def own(parts: Sequence[Part]) -> Report:
        return _counts(parts) | (one(parts) if one else {})

    checkpoint = inspection.checkpoint
    told: Report = {
        "checkpoint": checkpoint.name,
        "base": inspection.checkpoints[0].name if inspection.has_base else None,
        **_counts(inspection.parts),
        "files": _files(checkpoint),
        "dtypes": {
            dtype: _counts(parts) for dtype, parts in sorted(_grouped(inspection, lambda part: part.info.dtype).items())
        },
        **_groups(inspection, own),
        "tied": {"config": inspection.tied[0], "stored": [list(pair) for pair in inspection.tied[1].items()]},
        "quantised": inspection.quantised,
        "recipe": inspection.made_by.model_dump(mode="json", exclude_none=True) if inspection.made_by else None,
        "lines": inspection.scaling.model_dump(mode="json", exclude_none=True),
        "notes": list(inspection.notes),
    }
    if tensors:
        told["map"] = [_tensor(part) | (one([part]) if one else {}) for part in inspection.parts]
    if findings is None:
        return told
    if inspection.has_base:
        told["fine_tunes"] = [_fine_tune(inspection, findings, model) for model in range(len(inspection.models))]
        told["together"] = _together(inspection, findings) if findings.joint else None
    told["health"] = [_health(findings, side, checkpoint) for side, checkpoint in enumerate(inspection.checkpoints)]
    told["bytes_read"], told["seconds"] = findings.bytes_read, round(findings.seconds, 3)
    return told


def problems(told: Report) -> list[str]:
    """What is wrong with the checkpoints, a line for each kind of it."""
    found = []
    for health in told.get("health", ()):
        for key, what in _PROBLEMS.items():
            if number := len(health[key]):
                found.append(f"{health['checkpoint']}: {what}: {number:,}")
    return found


_PROBLEMS = {
    "nonfinite": "tensors with NaN or Inf",
    "beyond": "tensors with values that a narrower dtype cannot hold",
    "zero": "tensors of zeros",
    "same": "tensors that are another's duplicate",
    "changed_files": "files that are not as lines wrote them",
}


def _files(checkpoint: Checkpoint) -> list[Report]:
    tensors = Counter(stored.file for stored in checkpoint.tensors.values())
    nbytes: Counter[int] = Counter()
    for stored in checkpoint.tensors.values():
        nbytes[stored.file] += stored.info.nbytes
    return [
        {"name": file.name, "tensors": tensors[number], "bytes": nbytes[number]}
        for number, file in enumerate(checkpoint.files)
    ]


# --- groups of tensors ---


def _grouped(inspection: Inspection, key: Callable[[Part], Key]) -> dict[Key, list[Part]]:
    groups: dict[Key, list[Part]] = defaultdict(list)
    for part in inspection.parts:
        groups[key(part)].append(part)
    return groups


def _groups(inspection: Inspection, numbers: Numbers) -> Report:
    """The stacks, their layers, what lies outside them, and the kinds of parameters, each with its numbers."""
    layers = _grouped(inspection, lambda part: part.place)
    stacks = _grouped(inspection, lambda part: part.place and part.place.stack)
    sides = _grouped(inspection, lambda part: part.side)
    kinds = _grouped(inspection, lambda part: part.kind)
    value = inspection.rules.inside_value
    by_layer = {
        (stack.name, index): value(stack.name, index, stack.layers)
        for stack in inspection.depth.stacks
        for index in range(stack.layers)
    }
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
            "before": {"coefficient": inspection.rules.outside_value("before"), **numbers(sides["before"])},
            "after": {"coefficient": inspection.rules.outside_value("after"), **numbers(sides["after"])},
        },
        "kinds": [{"kind": kind, **numbers(kinds[kind])} for kind in KINDS if kinds[kind]],
    }


def _counts(parts: Iterable[Part]) -> Report:
    infos = [part.info for part in parts]
    return {
        "tensors": len(infos),
        "parameters": sum(info.numel for info in infos),
        "bytes": sum(info.nbytes for info in infos),
    }


def _tensor(part: Part) -> Report:
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
        "coefficient": part.coefficient,
    }


# --- what a fine-tune changed ---


def _changes(findings: Findings, model: int) -> Numbers:
    """What one fine-tune changed of a group of tensors, and what LiNeS would leave of that."""

    def numbers(parts: Sequence[Part]) -> Report:
        known = [(part, findings.changes[part.name][model]) for part in parts if part.name in findings.changes]
        whole = reduce(add, (change for _, change in known), Change())
        scaled = math.sqrt(sum(part.coefficient**2 * change.squares for part, change in known))
        base, norm = math.sqrt(whole.base_squares), math.sqrt(whole.squares)
        told = {
            "update_norm": _finite(norm),
            "relative_norm": _ratio(norm, base),
            "unchanged": _ratio(whole.unchanged, whole.numel),
            "largest": _finite(whole.largest),
            "scaled_norm": _finite(scaled),
            "scaled_relative_norm": _ratio(scaled, base),
        }
        return told if whole.numel else dict.fromkeys(told)

    return numbers


def _fine_tune(inspection: Inspection, findings: Findings, model: int) -> Report:
    parts = [part for part in inspection.parts if part.name in findings.changes]
    changes = {part.name: findings.changes[part.name][model] for part in parts}
    numbers = _changes(findings, model)
    largest = max(parts, key=lambda part: changes[part.name].largest, default=None)

    def squares(third: Callable[[float], bool], *, scaled: bool) -> float:
        return sum(
            changes[part.name].squares * (part.coefficient**2 if scaled else 1)
            for part in parts
            if part.place and third((part.place.index + 0.5) / inspection.depth.layers[part.place.stack])
        )

    def thirds(*, scaled: bool) -> list[float | None]:
        whole = squares(lambda _: True, scaled=scaled)
        ends: list[Callable[[float], bool]] = [lambda depth: depth < 1 / 3, lambda depth: depth > 2 / 3]
        return [_ratio(squares(end, scaled=scaled), whole) for end in ends]

    shared = sum(tensor.piece.numel for tensor in inspection.compared)
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

    def numbers(parts: Sequence[Part]) -> Report:
        names = [part.name for part in parts if part.name in findings.joint]
        if not names:
            return _interference(None, [0.0] * models)
        joint = reduce(add, (findings.joint[name] for name in names))
        norms = [math.sqrt(sum(findings.changes[name][model].squares for name in names)) for model in range(models)]
        return _interference(joint, norms)

    l1 = sum(joint.sum_l1 for joint in findings.joint.values())
    groups = _groups(inspection, numbers)
    return {
        "models": [model.name for model in inspection.models],
        **numbers(inspection.parts),
        # For task arithmetic, whose merged task vector is the sum.
        "auto": {
            "method": "task_arithmetic",
            "alpha": _ratio(l1, models * l1),
            "sum": _finite(l1),
            "merged": _finite(l1),
        },
        **{key: groups[key] for key in ("stacks", "layers", "outside", "kinds")},
    }


def _interference(joint: Joint | None, norms: Sequence[float]) -> Report:
    models = len(norms)
    cosine: list[list[float | None]] = [
        [1.0 if norms[a] and a == b else None for b in range(models)] for a in range(models)
    ]
    opposed: list[list[float | None]] = [[0.0 if a == b else None for b in range(models)] for a in range(models)]
    for pair, (a, b) in enumerate(combinations(range(models), 2)):
        cosine[a][b] = cosine[b][a] = _ratio(joint.products[pair], norms[a] * norms[b]) if joint else None
        opposed[a][b] = opposed[b][a] = _ratio(joint.opposed[pair], joint.numel) if joint else None
    return {
        "cosine": cosine,
        "opposed": opposed,
        "disagreement": _ratio(joint.disagreeing, joint.numel) if joint else None,
        "norm_of_sum": _finite(math.sqrt(joint.sum_squares)) if joint else None,
        "sum_of_norms": _finite(sum(norms)) if joint else None,
    }


# --- health ---


def _health(findings: Findings, side: int, checkpoint: Checkpoint) -> Report:
    seen = {name: found for (where, name), found in findings.seen.items() if where == side}
    same = [
        (name, first)
        for name, first in findings.same.get(side, ())
        if tied_embedding(name, checkpoint, checkpoint.config) != first
        and tied_embedding(first, checkpoint, checkpoint.config) != name
    ]
    beyond = {name: _cannot_hold(checkpoint.tensors[name].info.dtype, found) for name, found in seen.items()}
    return {
        "checkpoint": checkpoint.name,
        "tensors": len(seen),
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
        "zero": [
            name for name, found in seen.items() if found.low == found.high == 0 and not found.nan and not found.inf
        ],
        "same": [{"tensor": name, "as": first} for name, first in same],
        "changed_files": dict(findings.changed_files.get(side, {})),
    }


def _largest(found: Seen) -> float:
    return max(-found.low, found.high)


def _cannot_hold(dtype: str, found: Seen) -> list[str]:
    """The narrower dtypes in which its largest finite entry would be infinite."""
    return [narrower for narrower in _NARROWER.get(dtype, ()) if _largest(found) >= OVERFLOWS[narrower]]


def _ratio(part: float, whole: float) -> float | None:
    return _finite(part / whole) if whole else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
