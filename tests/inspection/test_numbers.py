"""Every number that `lines inspect --base --json` tells, against plain float64 arithmetic on whole tensors.

The reference knows nothing of lines: tensors are loaded with safetensors' own library, joined into long vectors, and
summed. Where each tensor stands, what kind it is and what its coefficient is are written here by hand.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from support import zoo
from support.files import write_checkpoint
from support.run import run_lines

Tensors = dict[str, torch.Tensor]
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
UPDATE = (
    "update_norm",
    "relative_norm",
    "unchanged",
    "largest",
    "scaled_norm",
    "scaled_relative_norm",
    "scaled_largest",
)
SUMS = ("cosine", "norm_of_sum", "sum_of_norms")
JOINT = ("opposed", "disagreement", *SUMS, *(f"scaled_{key}" for key in SUMS))


def inspect(*args: object) -> Any:
    """The JSON of `lines inspect ARGS`, on the CPU; its notes stand in it, too."""
    ran = run_lines("inspect", *args, "--json", "--quiet", "--device", "cpu")
    assert (ran.code, ran.trace) == (0, ""), ran.err + ran.trace
    return ran.json


def loaded(path: Path) -> Tensors:
    """All tensors of a file or a folder, by safetensors' own library."""
    files = [path] if path.suffix == ".safetensors" else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


# --- the reference ---


@dataclass(frozen=True)
class Spot:
    """Where a tensor stands and what it is, by hand: a stack and a layer from 0, or a side of the blocks."""

    kind: str
    stack: str | None = None
    index: int | None = None
    side: str | None = None


def vector(tensors: Iterable[torch.Tensor]) -> np.ndarray:
    """All entries in float64."""
    return np.concatenate([np.zeros(0), *(tensor.to(torch.float64).numpy().reshape(-1) for tensor in tensors)])


def norm(values: np.ndarray) -> float:
    """The L2 norm, scaled so that no square overflows or vanishes."""
    top = float(np.abs(values).max(initial=0.0))
    return top * math.sqrt(float(np.square(values / top).sum())) if top else 0.0


def share(part: float, whole: float) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Reference:
    """A base and fine-tunes, by the names that the first fine-tune has, of which all floats of one shape are compared.

    Attributes:
        base, fts: name -> tensor.
        spots: where each tensor of the first fine-tune stands.
        c: its coefficient.
    """

    base: Tensors
    fts: Sequence[Tensors]
    spots: Mapping[str, Spot]
    c: Mapping[str, float]

    @property
    def names(self) -> list[str]:
        sides = (self.base, *self.fts)
        return [
            name
            for name in self.spots
            if all(name in side and side[name].is_floating_point() for side in sides)
            and len({side[name].shape for side in sides}) == 1
        ]

    def only(self, wanted: Callable[[str, Spot], bool]) -> list[str]:
        return [name for name in self.names if wanted(name, self.spots[name])]

    def vectors(self, names: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
        """The base, every update, and the coefficient of each entry; NaN or Inf where a side is, or float64 ends."""
        base = vector(self.base[n] for n in names)
        with np.errstate(invalid="ignore", over="ignore"):
            taus = [vector(ft[n] for n in names) - base for ft in self.fts]
        return base, taus, np.concatenate([np.zeros(0), *(np.full(self.base[n].numel(), self.c[n]) for n in names)])

    def update(self, model: int, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Update, base and coefficients of the entries that are finite on both sides."""
        base, taus, c = self.vectors(names)
        finite = np.isfinite(taus[model])
        return taus[model][finite], base[finite], c[finite]

    def numbers(self, model: int, names: Sequence[str]) -> dict[str, float | None]:
        tau, base, c = self.update(model, names)
        if not len(tau):
            return dict.fromkeys(UPDATE)
        return {
            "update_norm": norm(tau),
            "relative_norm": share(norm(tau), norm(base)),
            "unchanged": float((tau == 0).mean()),
            "largest": float(np.abs(tau).max()),
            "scaled_norm": norm(c * tau),
            "scaled_relative_norm": share(norm(c * tau), norm(base)),
            "scaled_largest": float(np.abs(c * tau).max()),
        }

    def thirds(self, model: int, *, scaled: bool) -> list[float | None]:
        depths = {
            spot.stack: 1 + max(s.index for s in self.spots.values() if s.stack == spot.stack)
            for spot in self.spots.values()
            if spot.stack
        }

        def square(wanted: Callable[[float], bool]) -> float:
            inside = self.only(lambda _, s: s.stack is not None and wanted((s.index + 1 - 0.5) / depths[s.stack]))
            tau, _, c = self.update(model, inside)
            return norm(c * tau if scaled else tau) ** 2

        whole = square(lambda _: True)
        return [share(square(lambda x: x < 1 / 3), whole), share(square(lambda x: x > 2 / 3), whole)]

    def together(self, names: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Every update, and the coefficients, of the entries that are finite in the base and in all fine-tunes."""
        _, taus, c = self.vectors(names)
        finite = np.isfinite(taus).all(0)
        return [tau[finite] for tau in taus], c[finite]

    def joint(self, names: Sequence[str]) -> dict[str, Any]:
        taus, c = self.together(names)
        n = len(taus)
        if not len(c):
            empty = [[None] * n for _ in range(n)]
            return {key: empty if key in ("cosine", "scaled_cosine", "opposed") else None for key in JOINT} | {
                "l1": 0.0
            }
        up, down = np.any([tau > 0 for tau in taus], 0), np.any([tau < 0 for tau in taus], 0)
        return {
            "opposed": [[float((np.sign(a) * np.sign(b) < 0).mean()) for b in taus] for a in taus],
            "disagreement": float((up & down).mean()),
            **sums(taus),
            **{f"scaled_{key}": value for key, value in sums([c * tau for tau in taus]).items()},
            "l1": float(np.abs(np.sum(taus, 0)).sum()),
        }


def sums(taus: Sequence[np.ndarray]) -> dict[str, Any]:
    """Cosines of updates, the norm of their sum, and the sum of their norms."""
    n, norms = len(taus), [norm(tau) for tau in taus]
    cosine: list[list[float | None]] = [[None] * n for _ in range(n)]
    for a, b in itertools.product(range(n), repeat=2):
        if norms[a] and norms[b]:
            cosine[a][b] = float((taus[a] / norms[a]) @ (taus[b] / norms[b]))
    return {"cosine": cosine, "norm_of_sum": norm(np.sum(taus, 0)), "sum_of_norms": sum(norms)}


def agree(told: Any, expected: Any, where: str, *, absolute: float = 0.0) -> None:
    """Numbers to 1e-6, of matrices each; None only for None."""
    if isinstance(expected, list):
        assert len(told) == len(expected), where
        for number, (a, b) in enumerate(zip(told, expected, strict=True)):
            agree(a, b, f"{where}[{number}]", absolute=absolute)
    elif expected is None or told is None:
        assert told is expected, f"{where}: told {told}, expected {expected}"
    else:
        assert math.isclose(told, expected, rel_tol=1e-6, abs_tol=absolute), f"{where}: {told}, expected {expected}"


def agree_all(row: Mapping[str, Any], expected: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    for key in keys:
        agree(row[key], expected[key], f"{where} {key}", absolute=1e-9 if "cosine" in key else 0.0)


def rows_of(told: Mapping[str, Any], ref: Reference) -> list[tuple[str, Mapping[str, Any], list[str]]]:
    """Every row of a section, with the names that belong in it; no row is missing and none is too much."""
    spots = ref.spots.values()
    layers = {(s.stack, s.index) for s in spots if s.stack}
    assert {(r["stack"], r["index"]) for r in told["layers"]} == layers
    assert len(told["layers"]) == len(layers)
    assert sorted(r["name"] for r in told["stacks"]) == sorted({s.stack for s in spots if s.stack})
    assert sorted(r["kind"] for r in told["kinds"]) == sorted({s.kind for s in spots})
    found = [("outside", told["outside"], ref.only(lambda _, s: s.stack is None))]
    sides = ("before", "after")
    found += [(side, told["outside"][side], ref.only(lambda _, s, side=side: s.side == side)) for side in sides]
    for row in told["layers"]:
        at = row["stack"], row["index"]
        found.append((f"layer {at}", row, ref.only(lambda _, s, at=at: (s.stack, s.index) == at)))
    found += [(r["name"], r, ref.only(lambda _, s, name=r["name"]: s.stack == name)) for r in told["stacks"]]
    found += [(r["kind"], r, ref.only(lambda _, s, kind=r["kind"]: s.kind == kind)) for r in told["kinds"]]
    return found


def check(told: Mapping[str, Any], ref: Reference) -> None:
    """Everything about updates and how they go together is as the reference has it."""
    assert len(told["fine_tunes"]) == len(ref.fts)
    filled = [name for name in ref.names if ref.base[name].numel()]
    for model, section in enumerate(told["fine_tunes"]):
        who = f"model {model}"
        agree_all(section, ref.numbers(model, ref.names), who, UPDATE)
        tops = {}
        for name in filled:
            if len(tau := ref.update(model, [name])[0]):
                tops[name] = float(np.abs(tau).max())
        if max(tops.values(), default=0.0):
            assert tops[section["largest_in"]] == max(tops.values())
        else:
            assert section["largest_in"] is None
        finite, entries = len(ref.update(model, ref.names)[0]), sum(ref.base[name].numel() for name in ref.names)
        assert section["compared"] == {"tensors": len(filled), "parameters": finite, "left_out": entries - finite}
        agree([section["first_third"], section["last_third"]], ref.thirds(model, scaled=False), f"{who} thirds")
        scaled = [section["scaled_first_third"], section["scaled_last_third"]]
        agree(scaled, ref.thirds(model, scaled=True), f"{who} scaled thirds")
        for where, row, names in rows_of(section, ref):
            agree_all(row, ref.numbers(model, names), f"{who} {where}", UPDATE)
    if len(ref.fts) == 1:
        assert told["together"] is None
        for where, row, names in rows_of(told, ref):
            agree_all(row, ref.numbers(0, names), f"top {where}", UPDATE)
        for row in told.get("map", ()):
            names = [row["name"]] if row["name"] in ref.names else []
            agree_all(row, ref.numbers(0, names), row["name"], UPDATE)
            assert math.isclose(row["coefficient"], ref.c[row["name"]], rel_tol=1e-12, abs_tol=1e-15)
        return
    together = told["together"]
    whole = ref.joint(ref.names)
    agree_all(together, whole, "together", JOINT)
    if told["scaling"]["of"] != "merge":  # then it is the merge's method that counts
        l1, n = whole["l1"], len(ref.fts)
        assert together["auto"]["method"] == "task_arithmetic"
        agree([together["auto"][key] for key in ("alpha", "sum", "merged")], [1 / n if l1 else None, l1, l1], "auto")
    for where, row, names in rows_of(together, ref):
        agree_all(row, ref.joint(names), f"together {where}", JOINT)
    for row in told.get("map", ()):
        assert math.isclose(row["coefficient"], ref.c[row["name"]], rel_tol=1e-12, abs_tol=1e-15), row


# --- models ---

TOY_KINDS = {
    "self_attn": "attention",
    "mlp": "mlp",
    "layernorm": "norm",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "model.norm": "norm",
}


def kind_by(name: str, words: Mapping[str, str]) -> str:
    """The kind of the one word that the name contains."""
    kinds = {kind for word, kind in words.items() if word in name}
    assert len(kinds) == 1, (name, kinds)
    return kinds.pop()


def spots_of(
    names: Iterable[str], stacks: Iterable[str], before: Iterable[str], kinds: Mapping[str, str]
) -> dict[str, Spot]:
    """Where tensors stand, from hand-written beginnings of names; what is neither in a stack nor before is behind."""
    spots = {}
    for name in names:
        kind = kind_by(name, kinds)
        stack = next((stack for stack in stacks if name.startswith(f"{stack}.")), None)
        if stack:
            spots[name] = Spot(kind, stack, int(name.removeprefix(f"{stack}.").split(".")[0]))
        else:
            spots[name] = Spot(kind, side="before" if name.startswith(tuple(before)) else "after")
    return spots


def toy_spots(names: Iterable[str]) -> dict[str, Spot]:
    return spots_of(names, ["model.layers"], ["model.embed_tokens"], TOY_KINDS)


def toy(seed: int, layers: int = 4, dtype: torch.dtype = torch.float32) -> Tensors:
    """A decoder in the manner of Llama, of sizes that tell its parts from one another."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (11, 6),
        "lm_head.weight": (11, 6),
        "model.norm.weight": (6,),
    }
    for i in range(layers):
        shapes[f"model.layers.{i}.self_attn.q_proj.weight"] = (6, 6)
        shapes[f"model.layers.{i}.self_attn.o_proj.weight"] = (6, 5)
        shapes[f"model.layers.{i}.mlp.up_proj.weight"] = (9, 6)
        shapes[f"model.layers.{i}.input_layernorm.weight"] = (6,)
    return {name: torch.randn(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def tuned(base: Tensors, seed: int, size: float = 0.1, keep: float = 0.3) -> Tensors:
    """The base with most entries moved, more in each tensor than in the last; floats only."""
    random = torch.Generator().manual_seed(1000 + seed)
    out = {}
    for number, (name, tensor) in enumerate(base.items()):
        if not tensor.is_floating_point():
            out[name] = tensor.clone()
            continue
        moved = torch.rand(tensor.shape, generator=random) > keep
        by = size * (1 + 0.3 * number) * torch.randn(tensor.shape, generator=random)
        out[name] = (tensor.double() + by.double() * moved).to(tensor.dtype)
    return out


def linear(spots: Mapping[str, Spot], alpha: float = 0.1, beta: float | None = None, gamma: float = 1.0) -> dict:
    """The paper's coefficients by name, alpha outside."""
    beta = 1 - alpha if beta is None else beta
    layers = {
        s.stack: 1 + max(o.index for o in spots.values() if o.stack == s.stack) for s in spots.values() if s.stack
    }
    return {
        name: gamma
        * (alpha if s.stack is None else alpha + beta * (s.index / (layers[s.stack] - 1) if layers[s.stack] > 1 else 1))
        for name, s in spots.items()
    }


def defaults(spots: Mapping[str, Spot], models: int) -> dict:
    """What holds where nothing is asked: an edit's coefficients, or those of alpha auto, 1/N, and beta 0.5."""
    return linear(spots) if models == 1 else linear(spots, 1 / models, 0.5)


def toy_reference(base: Tensors, fts: Sequence[Tensors], spots: Mapping[str, Spot] | None = None) -> Reference:
    spots = spots or toy_spots(fts[0])
    return Reference(base, fts, spots, defaults(spots, len(fts)))


def written(folder: Path, base: Tensors, fts: Sequence[Tensors], **how: Any) -> list[object]:
    """Fine-tunes and base as the arguments of `lines inspect`."""
    paths = [write_checkpoint(folder / f"ft{n}.safetensors", ft, **how) for n, ft in enumerate(fts)]
    return [*paths, "--base", write_checkpoint(folder / "base.safetensors", base, **how)]


# --- one fine-tune ---


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 7, 12])
def test_every_number_of_one_fine_tune(layers: int, tmp_path: Path) -> None:
    """Whole, stacks, layers, sides, kinds and tensors are told as the plain computation has them, at any depth."""
    base = toy(layers, layers)
    ft = tuned(base, layers)
    told = inspect(*written(tmp_path, base, [ft]), "--tensors")
    check(told, toy_reference(base, [ft]))
    assert len(told["map"]) == len(base)
    assert told["bytes_read"] == 2 * sum(tensor.nbytes for tensor in base.values())


@pytest.mark.parametrize(
    ("layers", "first", "last"),
    [
        (1, [], []),
        (2, [0], [1]),
        (3, [0], [2]),
        (4, [0], [3]),
        (7, [0, 1], [5, 6]),
        (12, [0, 1, 2, 3], [8, 9, 10, 11]),
    ],
)
def test_which_layers_the_thirds_hold(layers: int, first: list[int], last: list[int], tmp_path: Path) -> None:
    """A third holds the layers listed here, whose squares are powers of two, so that their sum says which they are."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(1, dtype=torch.float64) for i in range(layers)}
    ft = {f"model.layers.{i}.mlp.w": torch.tensor([2.0**i], dtype=torch.float64) for i in range(layers)}
    told = inspect(*written(tmp_path, base, [ft]), "--alpha", 0.5, "--beta", 1)["fine_tunes"][0]
    c = [0.5 + i / (layers - 1) if layers > 1 else 1.5 for i in range(layers)]
    for scaled, prefix in ((False, ""), (True, "scaled_")):
        square = [4.0**i * (c[i] ** 2 if scaled else 1) for i in range(layers)]
        for key, held in (("first_third", first), ("last_third", last)):
            agree(told[prefix + key], sum(square[i] for i in held) / sum(square), key)


def pair_of_stacks(seed: int) -> Tensors:
    """An encoder of three layers and a decoder of two in the manner of T5, and what stands around them."""
    random = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {"shared.weight": (9, 4)}
    for stack, layers in (("encoder", 3), ("decoder", 2)):
        for i in range(layers):
            shapes[f"{stack}.block.{i}.layer.0.SelfAttention.q.weight"] = (4, 4)
            shapes[f"{stack}.block.{i}.layer.1.DenseReluDense.wi.weight"] = (7, 4)
            shapes[f"{stack}.block.{i}.layer.0.layer_norm.weight"] = (4,)
        shapes[f"{stack}.final_layer_norm.weight"] = (4,)
    shapes["lm_head.weight"] = (9, 4)
    return {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}


PAIR_KINDS = {"Attention": "attention", "Dense": "mlp", "layer_norm": "norm", "shared": "embedding", "lm_head": "head"}
DEPTH = {"encoder.block": 3, "decoder.block": 2}


def pair_spots(names: Iterable[str]) -> dict[str, Spot]:
    return spots_of(names, DEPTH, ["shared"], PAIR_KINDS)


def at(values: Sequence[float]) -> Callable[[float], float]:
    """A list's coefficients: straight lines between values at equal distances."""
    return lambda x: float(np.interp(x, np.linspace(0, 1, len(values)), values)) if len(values) > 1 else values[0]


def coefficients(
    inside: Callable[[float], float],
    before: float,
    after: float | None = None,
    *,
    gamma: float = 1.0,
    outside_gamma: float | None = None,
    stacks: Mapping[str, Callable[[float], float]] | None = None,
    filters: Mapping[str, float] | None = None,
) -> Callable[[str, Spot], float]:
    """By name: `inside` over x from 0 to 1, times gamma; outside a value for each side."""

    def c(name: str, spot: Spot) -> float:
        for pattern, value in (filters or {}).items():
            if pattern in name or pattern == "*":
                return value
        if spot.stack is None:
            times = gamma if outside_gamma is None else outside_gamma
            return times * (before if spot.side == "before" or after is None else after)
        if stacks and spot.stack in stacks:
            return stacks[spot.stack](spot.index / (DEPTH[spot.stack] - 1))
        return gamma * inside(spot.index / (DEPTH[spot.stack] - 1))

    return c


RULES: dict[str, Callable[[str, Spot], float]] = {
    "": coefficients(lambda x: 0.1 + 0.9 * x, 0.1),
    "--alpha 0.3": coefficients(lambda x: 0.3 + 0.7 * x, 0.3),
    "--alpha 0.2 --beta 0.5 --gamma 0.5": coefficients(lambda x: 0.2 + 0.5 * x, 0.2, gamma=0.5),
    "--alpha -0.4 --beta 2 --gamma -1.5": coefficients(lambda x: -0.4 + 2 * x, -0.4, gamma=-1.5),
    "--alpha 0 --beta 0": coefficients(lambda _: 0.0, 0.0),
    "--alpha 1 --beta 0": coefficients(lambda _: 1.0, 1.0),
    "--gamma 0": coefficients(lambda _: 0.0, 0.0),
    "--schedule power:2": coefficients(lambda x: 0.1 + 0.9 * x**2, 0.1),
    "--schedule power:0.5 --alpha 0.4 --beta 1.1 --gamma 2": coefficients(lambda x: 0.4 + 1.1 * x**0.5, 0.4, gamma=2),
    "--schedule constant --alpha 0.2 --beta 0.5": coefficients(lambda _: 0.7, 0.2),
    "--schedule 0.1,0.6,1.0": coefficients(at([0.1, 0.6, 1.0]), 0.1),
    "--schedule 0.7": coefficients(at([0.7]), 0.7),
    "--schedule 0.9,0.1,0.4,0.3,0.8 --gamma 0.5": coefficients(at([0.9, 0.1, 0.4, 0.3, 0.8]), 0.9, gamma=0.5),
    "--schedule 0.9,0.1,0.4,0.8 --outside position": coefficients(at([0.9, 0.1, 0.4, 0.8]), 0.9, 0.8),
    "--outside position --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 0.1, 1.0, gamma=0.5),
    "--outside base --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 0, gamma=0.5, outside_gamma=1),
    "--outside keep --gamma 0.5": coefficients(lambda x: 0.1 + 0.9 * x, 1, gamma=0.5, outside_gamma=1),
    "--stack encoder=keep --outside keep": coefficients(
        lambda x: 0.1 + 0.9 * x, 1, stacks={"encoder.block": lambda _: 1.0}
    ),
    "--stack decoder.block=base --gamma 3": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, gamma=3, stacks={"decoder.block": lambda _: 0.0}
    ),
    "--stack decoder=0.3,0.2 --stack encoder=0.5,-0.5 --gamma 0.5": coefficients(
        lambda _: math.nan,
        0.1,
        gamma=0.5,
        stacks={"decoder.block": lambda x: 0.5 * (0.3 + 0.2 * x), "encoder.block": lambda x: 0.5 * (0.5 - 0.5 * x)},
    ),
    "--filter layer_norm=keep --filter decoder=0.25 --gamma 0.5": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, gamma=0.5, filters={"layer_norm": 1.0, "decoder": 0.25}
    ),
    "--filter block.1=base --filter *=0.3": coefficients(
        lambda _: math.nan, math.nan, filters={"block.1": 0.0, "*": 0.3}
    ),
    "--filter lm_head=-2 --outside position --stack encoder=0,1": coefficients(
        lambda x: 0.1 + 0.9 * x, 0.1, 1.0, stacks={"encoder.block": lambda x: x}, filters={"lm_head": -2.0}
    ),
}


@pytest.mark.parametrize("options", RULES)
def test_coefficients_of_every_rule(options: str, tmp_path: Path) -> None:
    """The update that LiNeS would leave follows the rule that the options name, computed by hand."""
    base = pair_of_stacks(1)
    ft = tuned(base, 1)
    spots = pair_spots(base)
    c = {name: RULES[options](name, spot) for name, spot in spots.items()}
    told = inspect(*written(tmp_path, base, [ft]), *options.split(), "--tensors")
    check(told, Reference(base, [ft], spots, c))
    if "filter" in options:
        return
    for row in told["layers"]:  # without filters a layer's coefficient is that of any of its tensors
        inside = [c[name] for name, spot in spots.items() if (spot.stack, spot.index) == (row["stack"], row["index"])]
        agree(row["coefficient"], inside[0], "layer", absolute=1e-15)
    for row in told["stacks"]:
        ends = {spot.index: c[name] for name, spot in spots.items() if spot.stack == row["name"]}
        agree([row["first"], row["last"]], [ends[0], ends[max(ends)]], "stack", absolute=1e-15)
    agree(told["outside"]["before"]["coefficient"], c["shared.weight"], "before")
    agree(told["outside"]["after"]["coefficient"], c["lm_head.weight"], "after")


def test_coefficient_of_a_row_is_filters_apart(tmp_path: Path) -> None:
    """A layer's coefficient is that of its depth, though a filter says otherwise of all its tensors."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    told = inspect(*written(tmp_path, base, [ft]), "--filter", "layers.1=0.75", "--tensors")
    assert [row["coefficient"] for row in told["layers"]] == pytest.approx([0.1, 0.55, 1.0])
    middle = told["layers"][1]
    assert middle["scaled_norm"] == pytest.approx(0.75 * middle["update_norm"], rel=1e-12)
    assert {row["coefficient"] for row in told["map"] if row["index"] == 1} == {0.75}


@pytest.mark.parametrize(
    "options",
    [
        (),
        ("--alpha", 0.3, "--gamma", 0.7, "--outside", "position"),
        ("--schedule", "0.2,0.9,0.4", "--filter", "norm=keep", "--filter", "lm_head=base"),
    ],
)
def test_scaled_norm_is_what_an_edit_leaves(options: tuple[object, ...], tmp_path: Path) -> None:
    """The norm of `out - base` after `lines edit` is the scaled norm that was told of the layer, to 1e-4."""
    base = toy(5, 5)
    ft = tuned(base, 5)
    ft_path, _, base_path = written(tmp_path, base, [ft])
    told = inspect(ft_path, "--base", base_path, *options)
    out = tmp_path / "out.safetensors"
    assert run_lines("edit", base_path, ft_path, "-o", out, "--quiet", *options).code == 0
    edited = loaded(out)
    for row in told["layers"]:
        names = [name for name in base if name.startswith(f"model.layers.{row['index']}.")]
        left = norm(vector(edited[n] for n in names) - vector(base[n] for n in names))
        assert row["scaled_norm"] == pytest.approx(left, rel=1e-4)
    names = [name for name in base if not name.startswith("model.layers.")]
    left = norm(vector(edited[n] for n in names) - vector(base[n] for n in names))
    assert told["outside"]["scaled_norm"] == pytest.approx(left, rel=1e-4)


def test_a_fine_tune_equal_to_its_base(tmp_path: Path) -> None:
    """Nothing changed: norms of zero, all unchanged, no tensor with the largest change, and no share of nothing."""
    base = toy(1)
    told = inspect(*written(tmp_path, base, [base]))
    check(told, toy_reference(base, [base]))
    one = told["fine_tunes"][0]
    assert (one["update_norm"], one["unchanged"], one["largest"], one["largest_in"]) == (0.0, 1.0, 0.0, None)
    assert [one[f"{kind}{end}_third"] for kind in ("", "scaled_") for end in ("first", "last")] == [None] * 4


def test_a_base_of_zeros(tmp_path: Path) -> None:
    """Relative to a base of zeros nothing can be told, and the norms are those of the fine-tune."""
    ft = toy(1)
    base = {name: torch.zeros_like(tensor) for name, tensor in ft.items()}
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert told["fine_tunes"][0]["relative_norm"] is None


# --- several ---


@pytest.mark.parametrize("number", [2, 3, 5])
def test_every_number_of_several_fine_tunes(number: int, tmp_path: Path) -> None:
    """Cosines, opposed and disagreeing signs, norms and auto are told as the plain computation has them."""
    base = toy(7, 3)
    fts = [tuned(base, seed, size=0.05 * (1 + seed)) for seed in range(number)]
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


@pytest.mark.parametrize("number", [2, 3, 5])
def test_identical_updates(number: int, tmp_path: Path) -> None:
    """Equal updates have cosine 1, oppose nowhere, and the norm of their sum is the sum of their norms."""
    base = toy(1, 2)
    ft = tuned(base, 1)
    told = inspect(*written(tmp_path, base, [ft] * number))
    check(told, toy_reference(base, [ft] * number))
    together = told["together"]
    agree(together["cosine"], [[1.0] * number] * number, "cosine")
    assert together["opposed"] == [[0.0] * number] * number
    assert together["disagreement"] == 0.0
    assert together["norm_of_sum"] == pytest.approx(together["sum_of_norms"], rel=1e-12)


def test_a_cosine_is_never_above_one(tmp_path: Path) -> None:
    """Cosines lie between -1 and 1, the last bit of a division included."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(5, dtype=torch.float64) for i in range(64)}
    random = torch.Generator().manual_seed(0)
    ft = {name: torch.randn(5, generator=random, dtype=torch.float64) for name in base}
    third = {name: 0.3 * tensor for name, tensor in ft.items()}
    against = {name: -0.7 * tensor for name, tensor in ft.items()}
    together = inspect(*written(tmp_path, base, [ft, third, against]))["together"]
    cosines = [c for row in (together, *together["layers"]) for line in row["cosine"] for c in line]
    assert min(cosines) >= -1
    assert max(cosines) <= 1


def test_opposite_updates(tmp_path: Path) -> None:
    """An update and its negative have cosine -1, oppose wherever anything changed, and sum to nothing."""
    base = {name: tensor.double() for name, tensor in toy(1, 2).items()}
    step = {name: (torch.rand_like(tensor) > 0.5) * 0.25 for name, tensor in base.items()}
    base = {name: (tensor * 8).round() / 8 for name, tensor in base.items()}  # so that both differences are exact
    fts = [{name: base[name] + sign * step[name] for name in base} for sign in (1, -1)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    changed = sum(int((by != 0).sum()) for by in step.values()) / sum(by.numel() for by in step.values())
    together = told["together"]
    assert together["opposed"][0][1] == together["disagreement"] == pytest.approx(changed, rel=1e-12)
    assert together["cosine"][0][1] == pytest.approx(-1.0, rel=1e-12)
    assert together["norm_of_sum"] == 0.0
    assert together["auto"] == {"method": "task_arithmetic", "alpha": None, "sum": 0.0, "merged": 0.0}


def test_updates_of_disjoint_entries(tmp_path: Path) -> None:
    """Updates that never meet are at right angles, disagree nowhere, and their norms add up in squares."""
    base = toy(3, 3)
    moved = [tuned(base, seed, keep=0) for seed in range(3)]
    turn = {name: torch.arange(tensor.numel()).reshape(tensor.shape) % 3 for name, tensor in base.items()}
    fts = [{n: torch.where(turn[n] == i, ft[n], base[n]) for n in base} for i, ft in enumerate(moved)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    together = told["together"]
    assert together["cosine"] == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    assert together["disagreement"] == 0.0
    squares = sum(one["update_norm"] ** 2 for one in told["fine_tunes"])
    assert together["norm_of_sum"] == pytest.approx(math.sqrt(squares), rel=1e-12)


def test_one_of_several_is_the_base_itself(tmp_path: Path) -> None:
    """A fine-tune that changed nothing has no cosine with any, and opposes none."""
    base = toy(2, 2)
    fts = [tuned(base, 1), base, tuned(base, 2)]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    assert told["together"]["cosine"][1] == [None, None, None]
    assert [row[1] for row in told["together"]["opposed"]] == [0.0, 0.0, 0.0]


def test_a_layer_that_only_one_changed(tmp_path: Path) -> None:
    """Where only one of three fine-tunes changed a layer, cosines there are null, and its norm is that of the sum."""
    base = toy(2, 3)
    fts = [
        {n: t if "layers.1." in n or seed == 0 else base[n] for n, t in tuned(base, seed).items()} for seed in (0, 1)
    ]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    first = told["together"]["layers"][0]
    assert first["cosine"] == [[1.0, None], [None, None]]
    assert first["norm_of_sum"] == first["sum_of_norms"] == told["fine_tunes"][0]["layers"][0]["update_norm"]


def refused(code: int, *args: object) -> str:
    """What `lines inspect ARGS` says as it refuses with this exit code; nothing stands on stdout."""
    ran = run_lines("inspect", *args, "--json", "--quiet", "--device", "cpu")
    assert (ran.code, ran.out, ran.trace) == (code, "", ""), ran.out + ran.err + ran.trace
    return ran.err


@pytest.mark.parametrize("number", [1, 2])
def test_no_float_tensor_in_common(number: int, tmp_path: Path) -> None:
    """Where nothing can be compared at all, be it integers alone or no shape that fits, that is refused."""
    base = {"model.layers.0.steps": torch.tensor([1, 2]), "model.layers.1.steps": torch.tensor([3, 4])}
    refused(4, *written(tmp_path / "integers", base, [base] * number))
    base = {f"model.layers.{i}.mlp.w": torch.ones(2) for i in range(2)}
    fts = [{name: torch.ones(3) for name in base}, base]
    assert "layers.1.mlp.w" in refused(4, *written(tmp_path / "shapes", base, fts[:number]))


def test_one_checkpoint_twice(tmp_path: Path) -> None:
    """The same checkpoint twice, be it the base or a fine-tune, and by another path, is refused."""
    base = toy(1, 2)
    a, b, flag, c = written(tmp_path, base, [tuned(base, 1), tuned(base, 2)])
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "ft0.safetensors")
    (tmp_path / "sub").mkdir()
    for models in (
        [a, a],
        [a, b, tmp_path / "link.safetensors"],
        [b, tmp_path / "sub/../ft1.safetensors"],
        [c],
        [a, c],
    ):
        refused(2, *models, flag, c)


def test_coefficients_of_several(tmp_path: Path) -> None:
    """Of several, alpha is 1/N and beta 0.5 unless alpha or a schedule is given; what is given counts."""
    base = toy(3, 3)
    fts = [tuned(base, seed) for seed in range(4)]
    spots = toy_spots(base)
    args = written(tmp_path, base, fts)
    for options, c in (
        ((), linear(spots, 0.25, 0.5)),
        (("--beta", 1.5), linear(spots, 0.25, 1.5)),
        (("--gamma", 2), linear(spots, 0.25, 0.5, 2)),
        (("--alpha", "auto", "--beta", 0.25), linear(spots, 0.25, 0.25)),
        (("--alpha", 0.3), linear(spots, 0.3, 0.7)),
        (("--schedule", "0.2,0.7"), linear(spots, 0.2, 0.5)),
        (("--filter", "mlp=-2"), linear(spots, 0.25, 0.5) | {name: -2.0 for name in spots if ".mlp." in name}),
    ):
        told = inspect(*args, *options, "--tensors")
        check(told, Reference(base, fts, spots, c))
        alpha = None if "--schedule" in options else c["model.embed_tokens.weight"] / (2 if "--gamma" in options else 1)
        assert told["scaling"]["of"] == "asked"
        agree(told["scaling"]["alpha"], alpha, "alpha")


# --- dtypes and magnitudes ---


@pytest.mark.parametrize("base_dtype", FLOATS)
def test_every_combination_of_dtypes(base_dtype: str, tmp_path: Path) -> None:
    """Whatever dtypes the sides have, differences are those of the stored values, in float64."""
    base = toy(1, 2, FLOATS[base_dtype])
    fts = []
    for seed, dtype in enumerate(FLOATS.values()):
        moved = tuned({name: tensor.double() for name, tensor in base.items()}, seed, size=0.02)
        fts.append({name: tensor.to(dtype) for name, tensor in moved.items()})
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))
    for number, ft in enumerate(fts):
        check(inspect(*written(tmp_path / f"{number}", base, [ft])), toy_reference(base, [ft]))


def test_dtypes_that_change_from_tensor_to_tensor(tmp_path: Path) -> None:
    """Each tensor may have its own dtype on each side."""
    dtypes = itertools.cycle(itertools.product(FLOATS.values(), FLOATS.values(), FLOATS.values()))
    base, fts = toy(4, 6), [tuned(toy(4, 6), seed) for seed in (1, 2)]
    for name in base:
        base[name], fts[0][name], fts[1][name] = (
            side[name].to(dtype) for side, dtype in zip((base, *fts), next(dtypes), strict=True)
        )
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


def powers(seed: int, low: float, high: float, dtype: torch.dtype, count: int = 301) -> torch.Tensor:
    """Values of both signs, whose exponents spread evenly."""
    random = np.random.default_rng(seed)
    values = random.choice([-1.0, 1.0], count) * np.exp2(random.uniform(low, high, count))
    return torch.from_numpy(values).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        ("F32", 120, 127.999),
        ("F32", -149, -126),
        ("F32", -149, 127.999),
        ("BF16", -133, 127.99),
        ("F16", -24, 15.99),
        ("F64", -400, 400),
        ("F64", 300, 500),
        ("F64", -500, -300),
    ],
)
def test_magnitudes_of_all_sizes(dtype: str, low: float, high: float, tmp_path: Path) -> None:
    """From subnormal numbers to the greatest ones nothing overflows, vanishes or is rounded to float32."""
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    sides = [{name: powers(10 * s + i, low, high, FLOATS[dtype]) for i, name in enumerate(names)} for s in range(3)]
    base, *fts = sides
    check(inspect(*written(tmp_path, base, fts)), toy_reference(base, fts))


@pytest.mark.parametrize(("base_dtype", "ft_dtype"), [("F32", "F64"), ("F64", "F32"), ("F64", "F64"), ("F32", "BF16")])
def test_differences_that_float32_would_round(base_dtype: str, ft_dtype: str, tmp_path: Path) -> None:
    """Entries whose exponents lie far apart, and ones that nearly cancel, are subtracted in float64."""
    random = torch.Generator().manual_seed(3)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    base = {n: (1 + torch.rand(64, generator=random, dtype=torch.float64)).to(FLOATS[base_dtype]) for n in names}
    ft = {n: (t.double() * (1 + 1e-9) + 1e-12).to(FLOATS[ft_dtype]) for n, t in base.items()}
    ft[names[1]] = torch.full((64,), 1e-30, dtype=torch.float64).to(FLOATS[ft_dtype])
    check(inspect(*written(tmp_path, base, [ft])), toy_reference(base, [ft]))


def test_zeros_of_both_signs_are_equal(tmp_path: Path) -> None:
    """An entry that went from 0.0 to -0.0 is unchanged, and no direction for signs to oppose."""
    for dtype in FLOATS.values():
        base = {f"model.layers.{i}.mlp.w": torch.tensor([0.0, -0.0, 1.0, 0.0], dtype=dtype) for i in range(2)}
        fts = [
            {name: torch.tensor(v, dtype=dtype) for name in base} for v in ([-0.0, 0.0, 2.0, 1.0], [-0.0, -0.0, 0, -1])
        ]
        told = inspect(*written(tmp_path / str(dtype), base, fts))
        check(told, toy_reference(base, fts))
        assert [one["unchanged"] for one in told["fine_tunes"]] == [0.5, 0.5]
        assert told["together"]["disagreement"] == 0.5


@pytest.mark.parametrize("exponent", [200, -200])
def test_entries_whose_squares_float64_cannot_hold(exponent: int, tmp_path: Path) -> None:
    """Where squares are beyond float64 a norm is told as it is, or not at all; never as another number."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.full((4,), 10.0**exponent, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    assert [one[key] for key in ("update_norm", "relative_norm", "scaled_norm", "first_third")] == [None] * 4
    agree([one["largest"], one["unchanged"]], [10.0**exponent, 0.0], "largest")


def test_updates_of_several_whose_squares_vanish(tmp_path: Path) -> None:
    """Of several, too, a norm whose squares float64 cannot hold is null, though the sum of squares is 0."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    fts = [{name: torch.full((4,), size, dtype=torch.float64) for name in base} for size in (1e-200, 2e-200)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    for key in ("norm_of_sum", "sum_of_norms", "scaled_norm_of_sum", "scaled_sum_of_norms"):
        assert together[key] is None, key


@pytest.mark.parametrize("bad", [1.0, math.nan])
def test_differences_beyond_float64(bad: float, tmp_path: Path) -> None:
    """A difference beyond float64 is left out as NaN is, with and without a NaN nearby."""
    top = torch.finfo(torch.float64).max
    base = {f"model.layers.{i}.mlp.w": torch.tensor([top, 1.0, 1.0], dtype=torch.float64) for i in range(2)}
    ft = {name: torch.tensor([-top, 2.0, bad], dtype=torch.float64) for name in base}
    told = inspect(*written(tmp_path / "one", base, [ft]))
    check(told, toy_reference(base, [ft]))
    one = told["fine_tunes"][0]
    assert (one["compared"]["left_out"], one["largest"]) == (4 if math.isnan(bad) else 2, 1.0)
    fts = [ft, {name: tensor + 1 for name, tensor in base.items()}]
    ref = toy_reference(base, fts)
    agree_all(inspect(*written(tmp_path / "two", base, fts))["together"], ref.joint(ref.names), "together", JOINT)


def test_a_base_whose_square_is_beyond_float64(tmp_path: Path) -> None:
    """Relative to a norm that is not told, nothing is told: null and not zero."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), 1e200, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.cat([tensor[:3], torch.tensor([0.0], dtype=torch.float64)]) for name, tensor in base.items()}
    base = {name: torch.cat([tensor[:3], torch.tensor([1e150], dtype=torch.float64)]) for name, tensor in base.items()}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    assert one["update_norm"] == pytest.approx(math.sqrt(2) * 1e150)
    assert one["relative_norm"] is None


def test_a_base_whose_squares_vanish(tmp_path: Path) -> None:
    """A base too small for its squares has no norm to be relative to."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), 1e-200, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.ones(4, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]))["fine_tunes"][0]
    agree([one["update_norm"], one["relative_norm"], one["scaled_relative_norm"]], [math.sqrt(8), None, None], "one")


def test_cosines_of_updates_whose_squares_are_beyond_float64(tmp_path: Path) -> None:
    """Where a norm cannot be told there is no cosine, and no sum of norms."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    fts = [{name: torch.full((4,), size, dtype=torch.float64) for name in base} for size in (1e200, 1.0)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    assert together["cosine"] == [[None, None], [None, 1.0]]
    assert [together["norm_of_sum"], together["sum_of_norms"]] == [None, None]


@pytest.mark.parametrize("alpha", ["1e153", "1e200", "-1e300"])
def test_coefficients_whose_squares_float64_cannot_hold(alpha: str, tmp_path: Path) -> None:
    """A coefficient that float64 holds is taken as it is for float64 tensors: its scaled norm is told."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.full((4,), 0.5, dtype=torch.float64) for name in base}
    told = inspect(*written(tmp_path, base, [ft]), f"--alpha={alpha}", "--beta", 0)
    one = told["fine_tunes"][0]
    expected = pytest.approx(math.sqrt(2) * abs(float(alpha)))
    assert one["scaled_norm"] == expected
    agree(one["scaled_largest"], abs(float(alpha)) / 2, "largest")


def test_a_scaled_norm_whose_squares_vanish(tmp_path: Path) -> None:
    """A scaled norm is null, and not 0.0, where float64 cannot hold its squares."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=torch.float64) for i in range(2)}
    ft = {name: torch.ones(4, dtype=torch.float64) for name in base}
    one = inspect(*written(tmp_path, base, [ft]), "--alpha", 1e-200, "--beta", 0)["fine_tunes"][0]
    assert one["update_norm"] == pytest.approx(math.sqrt(8))
    assert one["scaled_largest"] == 1e-200
    assert one["scaled_norm"] != 0.0


@pytest.mark.parametrize(
    ("dtypes", "options", "refuses"),
    [
        (("F32", "F32"), ("--alpha", "1e39", "--beta", 0), True),
        (("F32", "F32"), ("--alpha", "3e38", "--beta", 0), False),
        (("BF16", "BF16"), ("--filter", "layers.1=-4e38"), True),
        (("F32", "F32"), ("--gamma", "1e20", "--alpha", "1e20", "--beta", 0), True),
        (("F64", "F64"), ("--alpha", "1e39", "--beta", 0), False),
        (("F64", "F64"), ("--alpha", "1e200", "--gamma", "1e200", "--beta", 0), True),
        (("F32", "F64"), ("--alpha", "1e39", "--beta", 0), False),
        (("F64", "F32"), ("--alpha", "1e39", "--beta", 0), False),
    ],
)
def test_coefficients_that_an_edit_refuses(
    dtypes: tuple[str, str], options: tuple[object, ...], refuses: bool, tmp_path: Path
) -> None:
    """A coefficient beyond float32, or for float64 tensors beyond float64, is refused as an edit refuses it."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4, dtype=FLOATS[dtypes[0]]) for i in range(2)}
    ft = {name: torch.ones(4, dtype=FLOATS[dtypes[1]]) for name in base}
    f, _, b = written(tmp_path, base, [ft])
    edit = run_lines("edit", b, f, "-o", tmp_path / "out", "--dry-run", "--json", "--quiet", *options)
    assert edit.code == (2 if refuses else 0), edit.err
    told = run_lines("inspect", f, "--base", b, "--json", "--quiet", *options)
    assert (told.code, told.trace) == (edit.code, ""), told.err


# --- shapes, chunks, shards, workers ---


def odd_shapes(seed: int) -> Tensors:
    """Scalars, empty tensors, up to four dimensions, and buffers that are no floats."""
    random = torch.Generator().manual_seed(seed)
    tensors: Tensors = {"model.embed_tokens.weight": torch.randn(5, 2, generator=random)}
    for i in range(3):
        tensors[f"model.layers.{i}.mlp.scale"] = torch.randn((), generator=random)
        tensors[f"model.layers.{i}.mlp.empty"] = torch.empty((0, 4))
        tensors[f"model.layers.{i}.mlp.hollow"] = torch.empty((3, 0, 2), dtype=torch.bfloat16)
        tensors[f"model.layers.{i}.mlp.cube"] = torch.randn(2, 3, 5, generator=random)
        tensors[f"model.layers.{i}.self_attn.kernel"] = torch.randn(2, 3, 1, 7, generator=random).half()
        tensors[f"model.layers.{i}.self_attn.mask"] = torch.rand(9, generator=random) > 0.5
        tensors[f"model.layers.{i}.self_attn.bias"] = torch.ones(1, 1, dtype=torch.uint8)
        tensors[f"model.layers.{i}.input_layernorm.num_batches"] = torch.randint(0, 99, (2,), generator=random)
    tensors["model.norm.weight"] = torch.empty(0)
    tensors["lm_head.steps"] = torch.randint(0, 9, (3,), generator=random).to(torch.int32)
    return tensors


@pytest.mark.parametrize("number", [1, 2])
def test_scalars_empty_tensors_and_buffers(number: int, tmp_path: Path) -> None:
    """Tensors of any shape are compared, integers and booleans are not, and of what holds nothing all is null."""
    base = odd_shapes(1)
    fts = [tuned(base, seed) for seed in range(number)]
    for ft in fts:
        ft["model.layers.1.self_attn.mask"] = ~base["model.layers.1.self_attn.mask"]
        ft["lm_head.steps"] = base["lm_head.steps"] + 5
    told = inspect(*written(tmp_path, base, fts), "--tensors")
    check(told, toy_reference(base, fts))
    assert all(one["outside"]["after"]["update_norm"] is None for one in told["fine_tunes"])
    assert {row["kind"]: row["tensors"] for row in told["kinds"]}["head"] == 1


def test_a_model_that_is_one_scalar(tmp_path: Path) -> None:
    """Without any stack everything lies outside, and no third of the blocks can be told."""
    told = inspect(*written(tmp_path, {"logit_scale": torch.tensor(2.0)}, [{"logit_scale": torch.tensor(3.5)}]))
    one = told["fine_tunes"][0]
    assert (told["stacks"], told["layers"]) == ([], [])
    assert [one[key] for key in UPDATE] == [1.5, 0.75, 0.0, 1.5, None, None, None]  # its depth, so its c, is unknown
    assert "depth is unknown" in "\n".join(told["notes"])
    assert (one["largest_in"], one["first_third"]) == ("logit_scale", None)


def many(seed: int) -> Tensors:
    """Tensors around and beyond the sizes of a chunk (up to 524,288 entries) and of a block (65,536)."""
    sizes = [524_288 + 65_536 + 1, 65_537, 65_536, 524_289, 699_051, 7]
    names = ["model.embed_tokens.weight", *(f"model.layers.{i}.mlp.w" for i in range(4)), "model.norm.weight"]
    dtypes = itertools.cycle((torch.bfloat16, torch.float32, torch.float16))
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=random).to(d) for n, s, d in zip(names, sizes, dtypes, strict=False)}


@pytest.mark.parametrize("number", [1, 3])
def test_chunks_shards_and_workers(number: int, tmp_path: Path) -> None:
    """However tensors are cut, sharded and shared out, the numbers are the reference's, the JSON one to the bit."""
    base = many(1)
    fts = [tuned(base, seed) for seed in range(number)]
    for ft in fts:  # the last entry of a chunk, the first of the next, and the very last
        big = ft["model.embed_tokens.weight"]
        big[524_287], big[524_288], big[-1] = 30.0, -31.0, 32.0
    fts[0]["model.layers.3.mlp.w"][600_000:600_003] = torch.tensor([math.nan, math.inf, -math.inf]).half()
    shards = [3, 1, 2]
    paths = [write_checkpoint(tmp_path / f"ft{n}", ft, shards=shards[n]) for n, ft in enumerate(fts)]
    start = [*paths, "--base", write_checkpoint(tmp_path / "base", base, shards=4)]
    runs = [inspect(*start, "--workers", workers) for workers in (1, 3)]
    assert runs[0]["fine_tunes"][0]["compared"]["left_out"] == 3
    check(runs[0], toy_reference(base, fts))
    assert len({json.dumps(run | {"seconds": 0}) for run in runs}) == 1


def test_sharding_changes_nothing(tmp_path: Path) -> None:
    """One file or many, in whatever order tensors lie: the same numbers to the bit."""
    base = toy(9, 5)
    fts = [tuned(base, seed) for seed in (1, 2)]
    tellings = []
    for number, shards in enumerate(((1, 1, 1), (3, 2, 5), (7, 1, 2))):
        folder = tmp_path / f"{number}"
        sides = [dict(reversed(side.items())) if number == 2 else side for side in (base, *fts)]
        paths = [
            write_checkpoint(folder / f"{i}", side, shards=n)
            for i, (side, n) in enumerate(zip(sides, shards, strict=True))
        ]
        told = inspect(*paths[1:], "--base", paths[0])
        tellings.append(
            json.dumps([[{**one, "model": 0} for one in told["fine_tunes"]], {**told["together"], "models": 0}])
        )
    assert len(set(tellings)) == 1


# --- NaN and Inf ---


@pytest.mark.parametrize("number", [1, 3])
def test_entries_that_are_not_finite(number: int, tmp_path: Path) -> None:
    """NaN and Inf on either side are left out and counted; all other entries count as ever."""
    base = toy(6, 3)
    fts = [tuned(base, seed) for seed in range(number)]
    base["model.layers.0.mlp.up_proj.weight"].view(-1)[:3] = torch.tensor([math.nan, math.inf, -math.inf])
    fts[0]["model.layers.0.mlp.up_proj.weight"].view(-1)[1:5] = torch.tensor([math.inf, math.inf, math.nan, math.inf])
    fts[-1]["model.layers.1.self_attn.q_proj.weight"].view(-1)[7] = -math.inf
    fts[-1]["model.layers.2.input_layernorm.weight"][:] = math.nan
    fts[0]["lm_head.weight"][:] = math.inf
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    up, q, last = (
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.input_layernorm.weight",
    )
    expected: list[dict[str, tuple[int, int]]] = [{up: (1, 2)}, *({} for _ in fts)]
    expected[1] |= {up: (1, 3), "lm_head.weight": (0, 66)}
    expected[-1] |= {q: (0, 1), last: (6, 0)}
    for health, wanted in zip(told["health"], expected, strict=True):
        assert {row["tensor"]: (row["nan"], row["inf"]) for row in health["nonfinite"]} == wanted


def test_a_layer_of_nan_tells_nothing(tmp_path: Path) -> None:
    """Where all is left out, all is null, and the fine-tune's other layers are told."""
    base = toy(6, 3)
    ft = tuned(base, 1)
    for name in ft:
        if ".layers.1." in name:
            ft[name][:] = math.nan
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert [told["layers"][1][key] for key in UPDATE] == [None] * len(UPDATE)


def test_shares_of_several_leave_out_what_is_not_finite(tmp_path: Path) -> None:
    """Where the base is NaN no sign can be compared: such entries are no part of what opposed signs are a share of."""
    base = {f"model.layers.{i}.mlp.w": torch.tensor([0.0, 0.0, math.nan, math.inf]) for i in range(2)}
    fts = [{name: torch.tensor([1.0, sign, sign, sign]) for name in base} for sign in (1.0, -1.0)]
    together = inspect(*written(tmp_path, base, fts))["together"]
    assert together["opposed"][0][1] == 0.5
    assert together["disagreement"] == 0.5


def test_shares_of_nothing_are_null_for_several(tmp_path: Path) -> None:
    """Where every entry is left out there is no share of disagreeing signs, as there are no other numbers."""
    base = {f"model.layers.{i}.mlp.w": torch.full((4,), math.nan if i else 0.0) for i in range(2)}
    fts = [{name: torch.tensor([1.0, sign, sign, sign]) for name in base} for sign in (1.0, -1.0)]
    told = inspect(*written(tmp_path, base, fts))
    assert told["fine_tunes"][0]["layers"][1]["unchanged"] is None
    last = told["together"]["layers"][1]
    empty = [[None, None], [None, None]]
    assert [last[key] for key in ("opposed", "cosine", "scaled_cosine")] == [empty] * 3
    assert [last[key] for key in JOINT if key not in ("opposed", "cosine", "scaled_cosine")] == [None] * 5


def test_entries_that_are_not_finite_in_one_alone(tmp_path: Path) -> None:
    """What is NaN in one fine-tune counts for the other's own numbers, and for none of those of both."""
    base = {f"model.layers.{i}.mlp.w": torch.zeros(4) for i in range(2)}
    fts = [{name: torch.tensor(v) for name in base} for v in ([3.0, 4.0, 100.0, 0.0], [3.0, -4.0, math.nan, math.inf])]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    assert [one["largest"] for one in told["fine_tunes"]] == [100.0, 4.0]
    assert [one["compared"]["left_out"] for one in told["fine_tunes"]] == [0, 4]
    row = told["together"]["layers"][0]
    agree([row["cosine"][0][1], row["opposed"][0][1], row["disagreement"]], [-7 / 25, 0.5, 0.5], "row")
    agree([row["norm_of_sum"], row["sum_of_norms"], told["together"]["auto"]["sum"]], [6.0, 10.0, 12.0], "norms")


# --- what is compared ---


def test_tensors_that_one_side_lacks(tmp_path: Path) -> None:
    """What is not in all is not compared; it is named, with who has it."""
    base, extra = toy(1, 3), torch.ones(3, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    base["model.layers.0.mlp.only_base.weight"] = extra
    fts[0]["model.layers.1.mlp.only_first.weight"] = extra
    fts[1]["model.layers.1.mlp.only_second.weight"] = extra
    del fts[1]["model.layers.2.self_attn.o_proj.weight"]
    told = inspect(*written(tmp_path, base, fts))
    check(told, toy_reference(base, fts))
    whys = {row["tensor"]: row["why"] for row in told["not_compared"]}
    first, second = (str(tmp_path / f"ft{n}.safetensors") for n in (0, 1))
    owners = {
        "model.layers.0.mlp.only_base.weight": ["the base"],
        "model.layers.1.mlp.only_first.weight": [first],
        "model.layers.1.mlp.only_second.weight": [second],
        "model.layers.2.self_attn.o_proj.weight": ["the base", first],
    }
    assert whys.keys() == owners.keys()
    for name, having in owners.items():
        assert [owner for owner in ("the base", first, second) if owner in whys[name]] == having
    assert {h["tensors"] for h in told["health"]} == {len(base)} | {len(ft) for ft in fts}


def test_every_misfit_is_named(tmp_path: Path) -> None:
    """Tensors of other shapes, or of floats against integers, are not compared; each is named, with the reason."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    ft["model.layers.0.mlp.up_proj.weight"] = torch.ones(6, 9)
    ft["model.layers.1.mlp.up_proj.weight"] = torch.ones(9, 6, 1)
    ft["model.norm.weight"] = torch.ones(6, dtype=torch.int64)
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    whys = {row["tensor"]: row["why"] for row in told["not_compared"]}
    up = "model.layers.{}.mlp.up_proj.weight".format
    assert whys.keys() == {up(0), up(1), "model.norm.weight"}
    assert [shape in whys[up(0)] for shape in ("[9, 6]", "[6, 9]")] == [True, True]
    assert [dtype in whys["model.norm.weight"] for dtype in ("F32", "I64")] == [True, True]
    assert [health["tensors"] for health in told["health"]] == [len(base), len(base) - 1]


def test_every_tensor_that_is_not_compared_is_named(tmp_path: Path) -> None:
    """However many tensors are not compared, `--json` names each."""
    base = toy(1, 12)
    ft = tuned(base, 1)
    for i in range(12):
        base[f"model.layers.{i}.mlp.extra.weight"] = torch.ones(2)
        ft[f"model.layers.{i}.mlp.up_proj.weight"] = torch.ones(3)
    told = inspect(*written(tmp_path, base, [ft]))
    named = sorted(row["tensor"] for row in told["not_compared"])
    assert named == sorted(f"model.layers.{i}.mlp.{part}.weight" for i in range(12) for part in ("extra", "up_proj"))


def test_integers_of_other_shapes_are_named(tmp_path: Path) -> None:
    """Buffers are not compared; one of another shape or dtype is told of."""
    base = toy(1, 2) | {"model.layers.0.self_attn.mask": torch.zeros(3, dtype=torch.int64)}
    base["model.layers.1.self_attn.mask"] = torch.zeros(3, dtype=torch.int64)
    ft = tuned(base, 1)
    ft["model.layers.0.self_attn.mask"] = torch.zeros(4, dtype=torch.int64)
    ft["model.layers.1.self_attn.mask"] = torch.zeros(3, dtype=torch.bool)
    told = inspect(*written(tmp_path, base, [ft]))
    check(told, toy_reference(base, [ft]))
    assert {row["tensor"] for row in told["not_compared"]} == {f"model.layers.{i}.self_attn.mask" for i in range(2)}


@pytest.mark.parametrize("rows", [(11, 13, 13), (13, 11, 13), (11, 13, 9), (9, 11, 13)])
def test_resized_vocabularies(rows: tuple[int, int, int], tmp_path: Path) -> None:
    """Of vocabularies of several sizes the rows that all have are compared; all rows are looked through for health."""
    base = toy(1, 2)
    sides = [base, *(tuned(base, seed) for seed in (1, 2))]
    vocabulary = ("model.embed_tokens.weight", "lm_head.weight")
    for number, (side, count) in enumerate(zip(sides, rows, strict=True)):
        for name in vocabulary:
            side[name] = torch.randn(count, 6, generator=torch.Generator().manual_seed(number))
            side[name][-1, -1] = math.nan if number == 1 else 1.0
    told = inspect(*written(tmp_path, sides[0], sides[1:]))
    cut = [side | {name: side[name][: min(rows)] for name in vocabulary} for side in sides]
    check(told, toy_reference(cut[0], cut[1:]))
    notes = "\n".join(told["notes"])
    assert all(name in notes for name in vocabulary)
    assert [health["tensors"] for health in told["health"]] == [len(base)] * 3
    assert [len(health["nonfinite"]) for health in told["health"]] == [0, 2, 0]


@pytest.mark.parametrize("prefixed", ["base", "fine-tune", "second"])
def test_names_that_differ_by_a_prefix(prefixed: str, tmp_path: Path) -> None:
    """A GPT-2 saved alone and one saved inside another are compared, told by the names of the first fine-tune."""
    random = torch.Generator().manual_seed(1)
    shapes = {"wte.weight": (9, 4), "wpe.weight": (5, 4), "ln_f.weight": (4,)}
    for i in range(3):
        shapes |= {f"h.{i}.attn.c_attn.weight": (4, 12), f"h.{i}.mlp.c_fc.weight": (4, 8), f"h.{i}.ln_1.weight": (4,)}
    base = {name: torch.randn(shape, generator=random) for name, shape in shapes.items()}
    fts = [tuned(base, seed) for seed in (1, 2)]
    as_stored = [
        {f"transformer.{n}" if there == prefixed else n: t for n, t in side.items()}
        for there, side in zip(("base", "fine-tune", "second"), (base, *fts), strict=True)
    ]
    told = inspect(*written(tmp_path, as_stored[0], as_stored[1:]))
    mark = "transformer." if prefixed == "fine-tune" else ""
    kinds = {"attn": "attention", "mlp": "mlp", "ln_": "norm", "wte": "embedding", "wpe": "embedding"}
    spots = spots_of([mark + n for n in base], [f"{mark}h"], [f"{mark}wte", f"{mark}wpe"], kinds)
    renamed = [{mark + n: t for n, t in side.items()} for side in (base, *fts)]
    check(told, toy_reference(renamed[0], renamed[1:], spots))
    assert "begin with 'transformer.'" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base)] * 3


TIED = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3}


def test_a_head_that_the_base_ties(tmp_path: Path) -> None:
    """A fine-tune's own head is compared with the embedding that the base ties it to, and a note says so."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    del base["lm_head.weight"]
    b = write_checkpoint(tmp_path / "base", base, config=TIED)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED | {"tie_word_embeddings": False})
    told = inspect(f, "--base", b)
    check(told, toy_reference(base | {"lm_head.weight": base["model.embed_tokens.weight"]}, [ft]))
    assert "lm_head.weight" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base), len(ft)]


def test_a_head_that_the_fine_tune_ties(tmp_path: Path) -> None:
    """A head that only the base stores is left out where the fine-tune ties it, and a note says so."""
    base = toy(1, 3)
    ft = tuned(base, 1)
    del ft["lm_head.weight"]
    b = write_checkpoint(tmp_path / "base", base, config=TIED | {"tie_word_embeddings": False})
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED)
    told = inspect(f, "--base", b)
    check(told, toy_reference(base, [ft]))
    assert "lm_head.weight" in "\n".join(told["notes"])
    assert [health["tensors"] for health in told["health"]] == [len(base), len(ft)]


def test_a_tied_head_that_is_stored_has_its_embeddings_coefficient(tmp_path: Path) -> None:
    """Embedding and tied head are one weight with one coefficient, wherever they stand and whatever filters say."""
    base = toy(1, 3)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    ft = tuned(base, 1)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    b, f = (write_checkpoint(tmp_path / name, side, config=TIED) for name, side in (("base", base), ("ft", ft)))
    told = inspect(f, "--base", b, "--outside", "position", "--filter", "lm_head=5", "--tensors")
    spots = toy_spots(ft)
    c = linear(spots) | {"model.norm.weight": 1.0}
    assert c["lm_head.weight"] == 0.1
    check(told, Reference(base, [ft], spots, c))
    assert told["tied"] == {"config": True, "stored": [["lm_head.weight", "model.embed_tokens.weight"]]}
    assert [health["same"] for health in told["health"]] == [[], []]


def t5_with_copies() -> tuple[Tensors, Tensors]:
    base = pair_of_stacks(1)
    ft = tuned(base, 1)
    for seed, name in enumerate(("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")):
        ft[name] = tuned({name: base["shared.weight"]}, seed)[name]
    return base, ft


def untied_and_resized() -> tuple[Tensors, Tensors]:
    base = toy(1, 3)
    ft = tuned(base, 1)
    del base["lm_head.weight"]
    for seed, name in enumerate(("lm_head.weight", "model.embed_tokens.weight")):
        ft[name] = torch.randn(13, 6, generator=torch.Generator().manual_seed(seed))
    return base, ft


def deeper_base() -> tuple[Tensors, Tensors]:
    base = toy(1, 4)
    return base, {name: tensor for name, tensor in tuned(base, 1).items() if "layers.3" not in name}


def deeper_fine_tune() -> tuple[Tensors, Tensors]:
    return deeper_base()[::-1]


@pytest.mark.parametrize("models", [t5_with_copies, untied_and_resized, deeper_base, deeper_fine_tune])
def test_every_tensor_is_scaled_as_an_edit_scales_it(
    models: Callable[[], tuple[Tensors, Tensors]], tmp_path: Path
) -> None:
    """Through ties, resizing and missing layers, each tensor's scaled norm is that of `out - base` of an edit."""
    base, ft = models()
    b = write_checkpoint(tmp_path / "base", base, config=TIED)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED | {"tie_word_embeddings": False})
    told = inspect(f, "--base", b, "--outside", "position", "--tensors", "--layers", LAYERS)
    how: tuple[object, ...] = ("--outside", "position", "--layers", LAYERS, "--missing", "ft", "--resize", "ft")
    if models in (deeper_base, deeper_fine_tune):
        how += ("--missing-in-blocks", len(base.keys() ^ ft.keys()))
    assert run_lines("edit", b, f, "-o", tmp_path / "out", "--quiet", *how).code == 0
    edited, compared = loaded(tmp_path / "out"), 0
    for row in told["map"]:
        name = row["name"]
        tied = "model.embed_tokens.weight" if "lm_head" in name else "shared.weight"
        before = base.get(name, base.get(tied) if "embed_tokens" in name or "lm_head" in name else None)
        if before is None:
            assert row["update_norm"] is None
            continue
        compared += 1
        update = vector([ft[name][: len(before)]]) - vector([before])
        left = vector([edited[name][: len(before)]]) - vector([before])
        assert row["update_norm"] == pytest.approx(norm(update), rel=1e-6)
        assert row["scaled_norm"] == pytest.approx(norm(left), rel=1e-4)
    assert told["fine_tunes"][0]["compared"]["tensors"] == compared


LAYERS = r"^(?P<stack>model\.layers|encoder\.block|decoder\.block)\.(?P<index>\d+)\."


# --- merges that are planned ---

Flat = list[np.ndarray]
Merged = Callable[[np.ndarray, Flat], np.ndarray]
"""What a method makes of a base and its models, all entries in one vector: the merged task vector."""


def recipe_file(folder: Path, base: Tensors, fts: Sequence[Tensors], said: Mapping[str, Any], **how: Any) -> Path:
    """A recipe, with its inputs beside it; what it says of models stands under `of_models`."""
    names = ["base", *(f"ft{n}" for n in range(len(fts)))]
    for name, side in zip(names, (base, *fts), strict=True):
        write_checkpoint(folder / name, side, **how)
    own = said.get("of_models", [{}] * len(fts))
    models = [{"model": name, "parameters": of} for name, of in zip(names[1:], own, strict=True)]
    recipe = {"base_model": "base", "models": models} | {k: v for k, v in said.items() if k != "of_models"}
    path = folder / "merge.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def merged_by_lines(recipe: Path, out: Path, *options: object) -> Any:
    """The JSON of `lines merge`, run or planned."""
    ran = run_lines("merge", "--config", recipe, "-o", out, "--json", "--quiet", "--device", "cpu", *options)
    assert (ran.code, ran.trace) == (0, ""), ran.err + ran.trace
    return ran.json


def coefficients_in(told: Mapping[str, Any]) -> dict[str, float | None]:
    return {row["name"]: row["coefficient"] for row in told["map"]}


def trimmed(taus: Flat, sizes: Sequence[int], density: float, trim: str) -> Flat:
    """The largest entries of each update, over the whole model or tensor by tensor."""
    bounds = [0, *np.cumsum(sizes)] if trim == "tensor" else [0, sum(sizes)]
    out = []
    for tau in taus:
        kept = np.zeros_like(tau)
        for start, end in itertools.pairwise(bounds):
            part = np.abs(tau[start:end])
            least = np.sort(part)[-max(1, int(density * len(part)))]
            kept[start:end] = np.where(part >= least, tau[start:end], 0)
        out.append(kept)
    return out


def by_ties(taus: Flat, sizes: Sequence[int], density: float, trim: str, weights: Sequence[float]) -> np.ndarray:
    """TIES: trim, elect the sign of the weighted sum, and take the weighted mean of what agrees with it."""
    kept = trimmed(taus, sizes, density, trim)
    sign = np.sign(sum(w * tau for w, tau in zip(weights, kept, strict=True)))
    if trim == "global" and not sign.all():
        sign = np.where(sign == 0, 1 if sign.sum() > 0 else -1, sign)
    sign = np.where(sign == 0, 1, sign)
    agrees = [(np.sign(w * tau) == sign) * 1.0 for w, tau in zip(weights, kept, strict=True)]
    total = sum(w * tau * yes for w, tau, yes in zip(weights, kept, agrees, strict=True))
    whole = sum(w * yes for w, yes in zip(weights, agrees, strict=True))
    return np.divide(total, whole, out=np.zeros_like(total), where=whole != 0)


def by_consensus(taus: Flat, limit: float, k: int) -> np.ndarray:
    total = np.sum(taus, 0)
    masks = [np.abs(tau) > np.abs(total - tau) * limit for tau in taus]
    return np.where(np.sum(masks, 0) >= k, total, 0.0)


def weighted(taus: Flat, weights: Sequence[float]) -> np.ndarray:
    return np.sum([w * tau for w, tau in zip(weights, taus, strict=True)], 0)


def by_slerp(a: Flat, b: Flat, t: float) -> np.ndarray:
    """Along the arc from one tensor to the other, tensor by tensor."""
    parts = []
    for x, y in zip(a, b, strict=True):
        angle = math.acos(float(x @ y) / (norm(x) * norm(y)))
        parts.append((math.sin((1 - t) * angle) * x + math.sin(t * angle) * y) / math.sin(angle))
    return np.concatenate(parts)


WEIGHTS = [{"weight": 0.5}, {"weight": 1.5}, {"weight": -0.25}]
METHODS: dict[str, tuple[dict[str, Any], Callable[..., np.ndarray]]] = {
    "TIES, global": (
        {"merge_method": "ties", "parameters": {"density": 0.2}},
        lambda taus, sizes: by_ties(taus, sizes, 0.2, "global", [1, 1, 1]),
    ),
    "TIES, tensor": (
        {"merge_method": "ties", "parameters": {"density": 0.2, "trim": "tensor"}},
        lambda taus, sizes: by_ties(taus, sizes, 0.2, "tensor", [1, 1, 1]),
    ),
    "TIES, weights": (
        {"merge_method": "ties", "parameters": {"density": 0.4}, "of_models": [*WEIGHTS[:2], {"weight": 0.75}]},
        lambda taus, sizes: by_ties(taus, sizes, 0.4, "global", [0.5, 1.5, 0.75]),
    ),
    "consensus": ({"merge_method": "consensus"}, lambda taus, _: by_consensus(taus, 0.4, 2)),
    "consensus of one": (
        {"merge_method": "consensus", "parameters": {"k": 1, "mask_lambda": 0.9}},
        lambda taus, _: by_consensus(taus, 0.9, 1),
    ),
    "average": ({"merge_method": "average"}, lambda taus, _: weighted(taus, [1 / 3] * 3)),
    "sum": ({"merge_method": "task_arithmetic"}, lambda taus, _: weighted(taus, [1, 1, 1])),
    "sum, said": (
        {"merge_method": "task_arithmetic", "parameters": {"weight": 1, "density": 1, "lambda": 0.5}},
        lambda taus, _: weighted(taus, [1, 1, 1]),
    ),
    "weighted sum": (
        {"merge_method": "task_arithmetic", "of_models": WEIGHTS},
        lambda taus, _: weighted(taus, [0.5, 1.5, -0.25]),
    ),
    "normalised sum": (
        {"merge_method": "task_arithmetic", "of_models": WEIGHTS, "parameters": {"normalize": True}},
        lambda taus, _: weighted(taus, [0.5 / 1.75, 1.5 / 1.75, -0.25 / 1.75]),
    ),
    "linear": (
        {"merge_method": "linear", "of_models": [{"weight": 1}, {"weight": 2}, {"weight": 1}]},
        lambda taus, _: weighted(taus, [0.25, 0.5, 0.25]),
    ),
}


def flat(ref: Reference) -> tuple[Flat, list[int]]:
    """Every update in one vector, and the sizes of its tensors."""
    return ref.together(ref.names)[0], [ref.base[name].numel() for name in ref.names]


@pytest.mark.parametrize(
    "lines",
    [
        pytest.param({"beta": 0.5}, marks=pytest.mark.slow),
        {"alpha": "auto", "beta": 0.25, "gamma": 2, "outside": "position"},
    ],
)
@pytest.mark.parametrize("method", METHODS)
def test_auto_alpha_of_a_merge(method: str, lines: dict[str, Any], tmp_path: Path) -> None:
    """Alpha auto, its norms, and all that is scaled by it are what the merge of the same recipe makes of them."""
    base = toy(11, 3)
    fts = [tuned(base, seed, size=0.05 * (1 + seed)) for seed in range(3)]
    said, by = METHODS[method]
    recipe = recipe_file(tmp_path, base, fts, {**said, "lines": lines})
    told = inspect("--config", recipe, "--tensors")
    auto = told["together"]["auto"]
    spots = toy_spots(base)
    taus, sizes = flat(Reference(base, fts, spots, dict.fromkeys(spots, 1.0)))
    total, merged = float(np.abs(np.sum(taus, 0)).sum()), float(np.abs(by(taus, sizes)).sum())
    assert auto["method"] == said["merge_method"]
    assert auto["sum"] == pytest.approx(total, rel=1e-5)
    assert auto["merged"] == pytest.approx(merged, rel=1e-5)
    assert auto["alpha"] == pytest.approx(total / merged / 3, rel=1e-5)
    ran = merged_by_lines(recipe, tmp_path / "out")
    assert auto["alpha"] == ran["alpha"] == told["scaling"]["alpha"]
    if ran["norms"] is not None:
        assert {key: auto[key] for key in ("sum", "merged")} == ran["norms"]
    by_layer = {(row["name"], i): c for row in ran["stacks"] for i, c in enumerate(row["coefficients"])}
    assert {(row["stack"], row["index"]): row["coefficient"] for row in told["layers"]} == by_layer
    outside = [told["outside"][side]["coefficient"] for side in ("before", "after")]
    assert outside == [ran["outside"]["first"], ran["outside"]["last"]]
    assert coefficients_in(inspect(tmp_path / "out", "--tensors")) == coefficients_in(told)
    gamma, lamda = lines.get("gamma", 1), said.get("parameters", {}).get("lambda", 1)
    c = {name: lamda * value for name, value in linear(spots, auto["alpha"], lines["beta"], gamma).items()}
    if "outside" in lines:
        behind = lamda * gamma * (auto["alpha"] + lines["beta"])
        c |= {name: behind for name, spot in spots.items() if spot.side == "after"}
    check(told, Reference(base, fts, spots, c))


@pytest.mark.parametrize("t", [0.25, 0.8])
@pytest.mark.parametrize("models", [1, 2])
def test_auto_alpha_of_slerp(models: int, t: float, tmp_path: Path) -> None:
    """Of slerp, too: between two models, or from the base to the only one there is."""
    base = toy(2, 3)
    fts = [tuned(base, seed, size=0.4) for seed in range(models)]
    said = {"merge_method": "slerp", "parameters": {"t": t}, "lines": {"beta": 0.5}}
    recipe = recipe_file(tmp_path, base, fts, said)
    told = inspect("--config", recipe, "--tensors")
    first, last = ([vector([side[n]]) for n in base] for side in ([base, *fts][-2], fts[-1]))
    merged = np.abs(by_slerp(first, last, t) - vector(base.values())).sum()
    total = np.abs(sum(vector(ft[n] for n in base) - vector(base.values()) for ft in fts)).sum()
    ran = merged_by_lines(recipe, tmp_path / "out")
    assert told["scaling"]["alpha"] == ran["alpha"] == pytest.approx(total / merged / 2, rel=1e-5)
    if models == 2:
        assert {key: told["together"]["auto"][key] for key in ("sum", "merged")} == ran["norms"]
    spots = toy_spots(base)
    check(told, Reference(base, fts, spots, linear(spots, ran["alpha"], 0.5)))


def ramp(values: Sequence[float], spot: Spot) -> float:
    """A gradient's value: over the depth of a stack, and its first outside."""
    return values[0] if spot.stack is None else at(values)(spot.index / (DEPTH[spot.stack] - 1))


PLANS: dict[str, tuple[dict[str, Any], Callable[[str, Spot], float]]] = {
    "without lines": ({}, lambda *_: 1.0),
    "lambda alone": ({"parameters": {"lambda": 0.3}}, lambda *_: 0.3),
    "a gradient alone": ({"parameters": {"lambda": [0.2, 1.0, 0.4]}}, lambda _, spot: ramp([0.2, 1.0, 0.4], spot)),
    "filters alone": (
        {
            "parameters": {
                "lambda": [
                    {"filter": "Attention", "value": [0.5, 2]},
                    {"filter": "layer_norm", "value": -1},
                    {"value": 0.75},
                ]
            }
        },
        lambda name, spot: ramp([0.5, 2], spot) if "Attention" in name else -1 if "layer_norm" in name else 0.75,
    ),
    "filters that leave some out": (
        {"parameters": {"lambda": [{"filter": "encoder", "value": 0.5}]}, "lines": {"alpha": 0.2, "beta": 0.6}},
        lambda n, s: (0.5 if "encoder" in n else 1) * coefficients(lambda x: 0.2 + 0.6 * x, 0.2)(n, s),
    ),
    "auto": ({"lines": {"beta": 0.75}}, coefficients(lambda x: 0.5 + 0.75 * x, 0.5)),
    "auto, gamma and lambda": (
        {"parameters": {"lambda": 3}, "lines": {"beta": 0.5, "gamma": 0.5}},
        coefficients(lambda x: 0.5 + 0.5 * x, 0.5, gamma=1.5),
    ),
    "a gradient on top": (
        {"parameters": {"lambda": [1, 0.5]}, "lines": {"alpha": 0.2, "beta": 0.8, "outside": "position"}},
        lambda n, s: ramp([1, 0.5], s) * coefficients(lambda x: 0.2 + 0.8 * x, 0.2, 1.0)(n, s),
    ),
    "stacks, filters and lambda": (
        {
            "parameters": {"lambda": [{"filter": "wi", "value": 2}, {"filter": "*", "value": [0.5, 1]}]},
            "lines": {
                "alpha": 0.3,
                "beta": 0.5,
                "gamma": 0.5,
                "stacks": {"decoder": {"alpha": 0, "beta": 2}, "encoder": "keep"},
                "filter": {"SelfAttention": 0.25, "shared": "base"},
                "outside": "keep",
            },
        },
        lambda n, s: (
            (2 if "wi" in n else ramp([0.5, 1], s))
            * coefficients(
                lambda _: math.nan,
                1.0,
                outside_gamma=1,
                stacks={"decoder.block": lambda x: 0.5 * (0 + 2 * x), "encoder.block": lambda _: 1.0},
                filters={"SelfAttention": 0.25, "shared": 0.0},
            )(n, s)
        ),
    ),
    "a list": (
        {"parameters": {"lambda": 0.5}, "lines": {"schedule": [0.9, 0.1, 0.4], "outside": "position"}},
        coefficients(at([0.9, 0.1, 0.4]), 0.9, 0.4, gamma=0.5),
    ),
    "a power": (
        {"merge_method": "average", "lines": {"alpha": 0.1, "beta": 0.9, "schedule": "power:2"}},
        coefficients(lambda x: 0.1 + 0.9 * x**2, 0.1),
    ),
    "linear, with a base": (
        {"merge_method": "linear", "lines": {"alpha": 0.25, "beta": 0.5}},
        coefficients(lambda x: 0.25 + 0.5 * x, 0.25),
    ),
}


@pytest.mark.parametrize("plan", PLANS)
def test_coefficients_of_a_recipe(plan: str, tmp_path: Path) -> None:
    """Each tensor's coefficient is that of the merge, `lambda` and filters included, and what is scaled follows it."""
    base = pair_of_stacks(1)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said, c = PLANS[plan]
    recipe = recipe_file(tmp_path, base, fts, {"merge_method": "task_arithmetic", **said})
    told = inspect("--config", recipe, "--tensors")
    spots = pair_spots(base)
    check(told, Reference(base, fts, spots, {name: c(name, spot) for name, spot in spots.items()}))
    planned = merged_by_lines(recipe, tmp_path / "out", "--dry-run")
    assert coefficients_in(told) == coefficients_in(planned)
    layers = {(row["name"], i): v for row in planned["stacks"] for i, v in enumerate(row["coefficients"])}
    assert {(row["stack"], row["index"]): row["coefficient"] for row in told["layers"]} == layers
    assert told["scaling"]["of"] == "merge"
    assert told["scaling"]["lambda"] == said.get("parameters", {}).get("lambda")
    assert (told["scaling"]["lines"] is None) == ("lines" not in said)
    merged_by_lines(recipe, tmp_path / "out")
    output = inspect(tmp_path / "out", "--tensors")
    assert output["scaling"]["of"] == "output"
    assert coefficients_in(output) == coefficients_in(told)


def test_what_is_told_as_merge_gives_what_is_told_as_scaled(tmp_path: Path) -> None:
    """The recipe in the report, run, changes each layer by the scaled norm of the sum."""
    base = toy(2, 4)
    fts = [tuned(base, seed) for seed in range(3)]
    told = inspect(*written(tmp_path, base, fts), "--beta", 0.8, "--filter", "mlp=0.9", "--outside", "position")
    recipe = tmp_path / "told.yaml"
    recipe.write_text(yaml.safe_dump(told["merge"]), encoding="utf-8")
    merged_by_lines(recipe, tmp_path / "out")
    out, spots = loaded(tmp_path / "out"), toy_spots(base)
    for row in told["together"]["layers"]:
        names = [name for name, spot in spots.items() if spot.index == row["index"]]
        left = norm(vector(out[n] for n in names) - vector(base[n] for n in names))
        assert row["scaled_norm_of_sum"] == pytest.approx(left, rel=1e-4)


@pytest.mark.parametrize(
    "options", [(), ("--alpha", 0.3, "--gamma", 0.5), ("--schedule", "0.1,0.8", "--filter", "mlp=2")]
)
def test_the_recipe_of_an_edit(options: tuple[object, ...], tmp_path: Path) -> None:
    """An edit's own recipe, of one model, tells the numbers that were told of that edit."""
    base = toy(3, 4)
    ft = tuned(base, 1)
    b, f = write_checkpoint(tmp_path / "base", base), write_checkpoint(tmp_path / "ft", ft)
    assert run_lines("edit", b, f, "-o", tmp_path / "out", "--quiet", *options).code == 0
    asked = inspect(f, "--base", b, *options, "--tensors")
    told = inspect("--config", tmp_path / "out/lines_recipe.yaml", "--tensors")
    differing = {key for key in asked.keys() | told.keys() if asked.get(key) != told.get(key)} - {"seconds", "merge"}
    assert differing == {"scaling"}
    assert told["scaling"] == asked["scaling"] | {"of": "merge"}
    spots = toy_spots(ft)
    check(told, Reference(base, [ft], spots, {row["name"]: row["coefficient"] for row in asked["map"]}))
    output = inspect(tmp_path / "out", "--tensors")
    assert coefficients_in(output) == coefficients_in(told)


def test_one_model_of_which_a_half_is_taken(tmp_path: Path) -> None:
    """Alpha auto of one weighted model makes up for the weight."""
    base = toy(3, 3)
    ft = tuned(base, 1)
    said = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.25}, "lines": {"beta": 0.5}}
    told = inspect("--config", recipe_file(tmp_path, base, [ft], said), "--tensors")
    assert told["together"] is None
    assert told["scaling"]["alpha"] == pytest.approx(4.0)
    check(told, Reference(base, [ft], spots := toy_spots(ft), linear(spots, told["scaling"]["alpha"], 0.5)))


def nan_in_a_model(sides: list[Tensors]) -> None:
    sides[1]["model.layers.1.mlp.up_proj.weight"][0, 0] = math.nan


def inf_in_the_base(sides: list[Tensors]) -> None:
    sides[0]["lm_head.weight"][1, 1] = math.inf


def another_shape(sides: list[Tensors]) -> None:
    sides[2]["model.layers.1.mlp.up_proj.weight"] = torch.ones(3, 3)


def a_tensor_less(sides: list[Tensors]) -> None:
    del sides[2]["model.layers.1.mlp.up_proj.weight"]


def more_rows(sides: list[Tensors]) -> None:
    sides[1]["lm_head.weight"] = torch.ones(13, 6)


def nothing_changed(sides: list[Tensors]) -> None:
    sides[1:] = [{name: tensor.clone() for name, tensor in sides[0].items()} for _ in range(2)]


@pytest.mark.parametrize("spoil", [nan_in_a_model, inf_in_the_base, another_shape, a_tensor_less, more_rows])
def test_what_a_merge_refuses(spoil: Callable[[list[Tensors]], None], tmp_path: Path) -> None:
    """Where lines merge refuses its inputs, so does inspect, with the same exit code: no alpha is told."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    spoil(sides)
    said = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": {"beta": 0.5}}
    recipe = recipe_file(tmp_path, sides[0], sides[1:], said)
    ran = run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet")
    assert ran.code in (4, 5)
    refused(ran.code, "--config", recipe)


@pytest.mark.parametrize("settled", [{"missing": "skip"}, {"missing": "copy"}, {"resize": "base"}, {"resize": "ft"}])
def test_what_a_recipe_settles(settled: dict[str, str], tmp_path: Path) -> None:
    """Where the recipe says what becomes of misfits, alpha is measured over what is merged, as by the merge."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    (a_tensor_less if "missing" in settled else more_rows)(sides)
    said = {"merge_method": "ties", "parameters": {"density": 0.5}, "lines": {"beta": 0.5}, **settled}
    said |= {"missing_in_blocks": 1} if "missing" in settled else {}
    recipe = recipe_file(tmp_path, sides[0], sides[1:], said)
    told, ran = inspect("--config", recipe, "--tensors"), merged_by_lines(recipe, tmp_path / "out")
    assert {key: told["together"]["auto"][key] for key in ("sum", "merged")} == ran["norms"]
    assert told["together"]["auto"]["alpha"] == ran["alpha"]
    cut = [side | {"lm_head.weight": side["lm_head.weight"][:11]} for side in sides]
    spots = toy_spots(sides[1])
    check(told, Reference(cut[0], cut[1:], spots, linear(spots, ran["alpha"], 0.5)))


def test_a_plain_sum_of_what_is_not_finite(tmp_path: Path) -> None:
    """Of a plain sum, whose alpha needs no measuring, 1/N is told, and norms over what is finite in all."""
    sides = [base := toy(1, 3), *(tuned(base, seed) for seed in (1, 2))]
    nan_in_a_model(sides)
    said = {"merge_method": "task_arithmetic", "lines": {"beta": 0.5}}
    told = inspect("--config", recipe_file(tmp_path, sides[0], sides[1:], said))
    spots = toy_spots(base)
    ref = Reference(sides[0], sides[1:], spots, linear(spots, 0.5, 0.5))
    check(told, ref)
    l1 = ref.joint(ref.names)["l1"]
    agree([told["together"]["auto"][key] for key in ("alpha", "sum", "merged")], [0.5, l1, l1], "auto")


FILTERED = {
    "merge_method": "average",
    "lines": {"beta": 0.5, "filter": {"embed_tokens": 0.5, "layers.0": 0.25}},
}


def test_an_alpha_that_cannot_be_measured(tmp_path: Path) -> None:
    """Where nothing is merged alpha is null, and so is all that rests on it; what a filter fixes is told."""
    sides = [base := toy(1, 3), *([] for _ in range(2))]
    nothing_changed(sides)
    recipe = recipe_file(tmp_path, sides[0], sides[1:], FILTERED)
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet").code == 4
    told = inspect("--config", recipe, "--tensors")
    assert told["together"]["auto"] == {"method": "average", "alpha": None, "sum": 0.0, "merged": 0.0}
    assert told["scaling"]["alpha"] is None
    for name, c in coefficients_in(told).items():
        assert c == (0.25 if "layers.0" in name else 0.5 if "embed_tokens" in name else None)
    assert base.keys() == coefficients_in(told).keys()


def test_what_rests_on_an_alpha_that_cannot_be_measured(tmp_path: Path) -> None:
    """Without alpha nothing that is scaled by it can be told, the largest change not either, whatever comes first."""
    base = {name: tensor.double().round() for name, tensor in toy(1, 3).items()}
    fts = [{name: tensor + by for name, tensor in base.items()} for by in (1.0, -1.0)]
    recipe = recipe_file(tmp_path, base, fts, FILTERED | {"lines": {"beta": 0.5, "filter": {"lm_head": 0.5}}})
    told = inspect("--config", recipe)
    assert told["scaling"]["alpha"] is None
    one = told["fine_tunes"][0]
    assert [one[key] for key in UPDATE[4:]] == [None] * 3


def test_recipes_that_cannot_be_inspected(tmp_path: Path) -> None:
    """A recipe without a base, with options beside it, or of one model twice is impossible: exit code 2."""
    base = toy(1, 2)
    fts = [tuned(base, 1), tuned(base, 2)]
    recipe = recipe_file(tmp_path, base, fts, {"merge_method": "task_arithmetic"})
    refused(2, "--config", recipe, "--alpha", 0.3)
    refused(2, "--config", recipe, "--base", tmp_path / "base")
    refused(2, tmp_path / "ft0", "--config", recipe)
    for models in (["ft0", "ft0"], ["ft0", "./ft0"], ["base"]):
        said = {"merge_method": "average", "base_model": "base", "models": [{"model": model} for model in models]}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
        refused(2, "--config", tmp_path / "r.yaml")
    said = {"merge_method": "linear", "models": [{"model": "ft0"}, {"model": "ft1"}]}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(said), encoding="utf-8")
    refused(2, "--config", tmp_path / "r.yaml")


def test_a_coefficient_of_a_recipe_beyond_float32(tmp_path: Path) -> None:
    """lambda counts towards what float32 has to hold, and so does an alpha that was measured."""
    base = toy(1, 2)
    fts = [tuned(base, seed) for seed in (1, 2)]
    lines = {"alpha": 1e20, "beta": 0}
    said = {"merge_method": "task_arithmetic", "parameters": {"lambda": 1e20}, "lines": lines}
    refused(2, "--config", recipe_file(tmp_path / "a", base, fts, said))
    said = {"merge_method": "task_arithmetic", "parameters": {"weight": 1e-20}, "lines": {"beta": 0, "gamma": 1e30}}
    recipe = recipe_file(tmp_path / "b", base, fts, said)
    assert run_lines("merge", "--config", recipe, "-o", tmp_path / "out", "--quiet").code == 2
    refused(2, "--config", recipe)


def test_a_base_listed_among_the_models(tmp_path: Path) -> None:
    """A base among the models has no task vector: it is no model, and N is that of the others. `linear` counts it."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    recipe = recipe_file(tmp_path, base, fts, {})
    for method, alpha in (("task_arithmetic", 0.5), ("average", 1.0), ("linear", 1.0)):
        said = yaml.safe_load(recipe.read_text(encoding="utf-8")) | {"merge_method": method, "lines": {"beta": 0.5}}
        said["models"] = [{"model": "base"}, *said["models"]]
        recipe.write_text(yaml.safe_dump(said), encoding="utf-8")
        told, ran = inspect("--config", recipe), merged_by_lines(recipe, tmp_path / method)
        assert told["together"]["models"] == [str(tmp_path / "ft0"), str(tmp_path / "ft1")]
        assert told["together"]["auto"]["alpha"] == ran["alpha"] == pytest.approx(alpha)
        said["models"] = said["models"][1:]
        recipe.write_text(yaml.safe_dump(said), encoding="utf-8")
    del said["lines"]  # then linear takes no differences, and a base listed among the models is one to compare with
    recipe.write_text(yaml.safe_dump(said | {"models": [{"model": "base"}, *said["models"]]}), encoding="utf-8")
    spots = toy_spots(base)
    check(inspect("--config", recipe), Reference(base, fts, spots, dict.fromkeys(spots, 1.0)))


def test_a_head_that_the_base_of_a_recipe_ties(tmp_path: Path) -> None:
    """A merge is like its base: a head that the base's config ties has its embedding's coefficient."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said = {"merge_method": "task_arithmetic", "lines": {"alpha": 0.1, "beta": 0.5, "outside": "position"}}
    recipe = recipe_file(tmp_path, base, fts, said, config=TIED)
    for number in (0, 1):
        (tmp_path / f"ft{number}/config.json").write_text(json.dumps(TIED | {"tie_word_embeddings": False}))
    planned = merged_by_lines(recipe, tmp_path / "out", "--dry-run")
    assert coefficients_in(inspect("--config", recipe, "--tensors")) == coefficients_in(planned)


@pytest.mark.parametrize(
    "said",
    [
        {"lines": {"alpha": 0.1, "beta": 0.5, "filter": {"text.": 0.7}}},
        {"parameters": {"lambda": [{"filter": "text.", "value": 0.7}]}},
    ],
)
def test_filters_of_a_recipe_go_by_the_names_of_its_base(said: dict[str, Any], tmp_path: Path) -> None:
    """A merge is like its base: filters match the base's names, of which the fine-tunes lack a prefix."""
    base = toy(1, 3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    prefixed = {f"text.{name}": tensor for name, tensor in base.items()}
    recipe = recipe_file(tmp_path, prefixed, fts, {"merge_method": "task_arithmetic", **said})
    planned = coefficients_in(merged_by_lines(recipe, tmp_path / "out", "--dry-run"))
    told = coefficients_in(inspect("--config", recipe, "--tensors"))
    assert {f"text.{name.removeprefix('text.')}": c for name, c in told.items()} == planned


def test_the_map_of_an_output_is_that_of_its_merge(tmp_path: Path) -> None:
    """An output tells each tensor's coefficient as the merge had it, unless options ask for others."""
    base = pair_of_stacks(3)
    fts = [tuned(base, seed) for seed in (1, 2)]
    said = {
        "merge_method": "ties",
        "parameters": {"density": 0.5, "lambda": [{"filter": "wi", "value": [0.5, 1.5]}, {"value": 2}]},
        "lines": {"beta": 0.5, "stacks": {"decoder": "keep"}, "filter": {"lm_head": "base"}},
    }
    recipe = recipe_file(tmp_path, base, fts, said)
    ran = merged_by_lines(recipe, tmp_path / "out")
    told = inspect(tmp_path / "out", "--tensors")
    spots, a = pair_spots(base), ran["alpha"]
    for name, c in coefficients_in(told).items():
        scale = ramp([0.5, 1.5], spots[name]) if "wi" in name else 2.0
        stacks = {"decoder.block": lambda _: 1.0}
        rule = coefficients(lambda x: a + 0.5 * x, a, stacks=stacks, filters={"lm_head": 0.0})
        assert c == pytest.approx(scale * rule(name, spots[name]), rel=1e-12), name
    assert told["scaling"]["of"] == "output"
    assert told["scaling"]["alpha"] == a
    assert coefficients_in(inspect("--config", recipe, "--tensors")) == coefficients_in(told)
    asked = inspect(tmp_path / "out", "--alpha", 0.5, "--tensors")
    assert asked["scaling"]["of"] == "asked"
    assert coefficients_in(asked)["shared.weight"] == 0.5


# --- health ---


def in_order(health: Mapping[str, Any]) -> dict[str, Any]:
    """What was found, whichever tensor comes first."""
    told = {key: sorted(health[key], key=str) for key in ("nonfinite", "beyond", "zero")}
    twins: dict[str, set[str]] = {}
    for row in health["same"]:
        twins.setdefault(row["as"], {row["as"]}).add(row["tensor"])
    return told | {"tensors": health["tensors"], "same": sorted(sorted(group) for group in twins.values())}


def health_of(tensors: Tensors, tmp_path: Path, **how: Any) -> Any:
    """Of one checkpoint alone by `--check`, which is the same as it gets beside a base."""
    path = write_checkpoint(tmp_path / "checked", tensors, **how)
    ran = run_lines("inspect", path, "--check", "--json", "--quiet", "--device", "cpu")
    assert (ran.code in (0, 5), ran.trace) == (True, ""), ran.err + ran.trace
    alone = ran.json["health"][0]
    found = any(alone[key] for key in ("nonfinite", "beyond", "zero", "same"))
    assert ran.code == (5 if found else 0)
    base = write_checkpoint(tmp_path / "base", {name: t.clone() for name, t in tensors.items()}, **how)
    for side in inspect(path, "--base", base)["health"]:
        assert in_order(side) == in_order(alone)
    return alone


def up(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype))


def down(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-math.inf, dtype=dtype))


def test_values_beyond_a_narrower_dtype(tmp_path: Path) -> None:
    """Told is what torch's own cast makes infinite, to the last bit before the threshold, whatever the sign."""
    half, brain, single = 65520.0, 2.0**128 - 2.0**119, torch.finfo(torch.float32).max
    values = {
        "F32": [
            65504.0,
            65519.9,
            65520.0,
            down(half, torch.float32),
            up(half, torch.float32),
            single,
            brain,
            1e30,
            down(brain, torch.float32),
            up(brain, torch.float32),
            torch.finfo(torch.bfloat16).max,
            1.0,
        ],
        "BF16": [65504.0, 65280.0, 65536.0, 66048.0, torch.finfo(torch.bfloat16).max, 1e30, 1.0],
        "F16": [65504.0, 1.0],
    }
    narrower = {"F32": {"bfloat16": torch.bfloat16, "float16": torch.float16}, "BF16": {"float16": torch.float16}}
    tensors, expected = {}, {}
    for dtype, entries in values.items():
        for number, entry in enumerate(entries):
            for sign in (1, -1):
                name = f"model.layers.{number}.mlp.{dtype}_{'plus' if sign > 0 else 'minus'}.weight"
                tensors[name] = torch.tensor([[0.5, sign * float(entry)]]).to(FLOATS[dtype])
                dtypes = [n for n, d in narrower.get(dtype, {}).items() if not tensors[name].to(d).isfinite().all()]
                if dtypes:
                    expected[name] = (float(tensors[name].abs().max()), dtypes)
    told = health_of(tensors, tmp_path)
    assert {row["tensor"]: (row["largest"], row["dtypes"]) for row in told["beyond"]} == expected
    assert len(expected) > 20


def test_float64_beyond_narrower_dtypes(tmp_path: Path) -> None:
    """For float64, too: the least magnitude whose one correct rounding is infinite, for each narrower dtype."""
    limits = {"float32": 2.0**128 - 2.0**103, "bfloat16": 2.0**128 - 2.0**119, "float16": 65520.0}
    assert down(limits["float32"], torch.float64).to(torch.float32).isfinite()
    assert not torch.tensor(limits["float32"], dtype=torch.float64).to(torch.float32).isfinite()
    for number, (name, limit) in enumerate(limits.items()):
        wide = [key for key, value in limits.items() if value <= limit]
        under = [key for key in wide if key != name]
        tensors = {
            f"model.layers.{i}.mlp.weight": torch.stack([torch.tensor(0.5, dtype=torch.float64), value])
            for i, value in enumerate(
                (
                    torch.tensor(limit, dtype=torch.float64),
                    down(limit, torch.float64),
                    -torch.tensor(limit, dtype=torch.float64),
                )
            )
        }
        told = {row["tensor"]: row["dtypes"] for row in health_of(tensors, tmp_path / str(number))["beyond"]}
        expected = [sorted(wide), sorted(under), sorted(wide)]
        assert [sorted(told.get(key, [])) for key in tensors] == expected


def test_infinities_are_not_beyond(tmp_path: Path) -> None:
    """Of a tensor that holds Inf the finite entries alone are judged by size, and of NaN alone nothing is zero."""
    tensors = {
        "model.layers.0.mlp.weight": torch.tensor([[math.inf, 1.0], [-math.inf, math.nan]]),
        "model.layers.1.mlp.weight": torch.tensor([[math.inf, -70000.0], [2.0, math.nan]]),
        "model.layers.2.mlp.weight": torch.full((2, 3), math.nan),
        "model.layers.3.mlp.weight": torch.tensor([0.0, math.nan]),
        "model.layers.4.mlp.weight": torch.tensor([0.0, math.inf]),
    }
    told = health_of(tensors, tmp_path)
    assert told["beyond"] == [{"tensor": "model.layers.1.mlp.weight", "largest": 70000.0, "dtypes": ["float16"]}]
    assert told["zero"] == []
    assert [(row["nan"], row["inf"]) for row in told["nonfinite"]] == [(1, 2), (1, 1), (6, 0), (1, 0), (0, 1)]


def test_tensors_of_zeros(tmp_path: Path) -> None:
    """Zeros of either sign make a tensor of zeros; a single subnormal, an empty tensor or integers do not."""
    tiny = torch.zeros(70_000, dtype=torch.bfloat16)
    tiny[-1] = 9.2e-41
    tensors = {
        "model.layers.0.mlp.a.weight": torch.zeros(3, 4),
        "model.layers.0.mlp.b.weight": torch.tensor([0.0, -0.0], dtype=torch.float16),
        "model.layers.0.mlp.c.weight": torch.tensor(-0.0, dtype=torch.float64),
        "model.layers.0.mlp.d.weight": torch.zeros(600_001, dtype=torch.bfloat16),
        "model.layers.1.mlp.a.weight": tiny,
        "model.layers.1.mlp.b.weight": torch.empty(0),
        "model.layers.1.mlp.c.weight": torch.zeros(3, dtype=torch.int32),
        "model.layers.1.mlp.d.weight": torch.tensor([-1e-45, 0.0]),
    }
    assert tiny[-1] != 0
    told = health_of(tensors, tmp_path, shards=3)
    assert sorted(told["zero"]) == [f"model.layers.0.mlp.{letter}.weight" for letter in "abcd"]
    assert told["same"] == []


def test_duplicates(tmp_path: Path) -> None:
    """The same bytes, dtype and shape make a duplicate, in whichever shard; the same values otherwise do not."""
    one = torch.randn(40, 30, generator=torch.Generator().manual_seed(1))
    large = torch.randn(600_001, generator=torch.Generator().manual_seed(2))
    last = large.clone()
    last[-1] += 1
    holed = torch.tensor([[1.0, math.nan], [math.inf, 2.0]])
    name = "model.layers.{}.mlp.{}.weight".format
    tensors = {
        name(0, "a"): one,
        name(0, "b"): large,
        name(0, "holed"): holed,
        name(1, "a"): one.clone(),
        name(1, "b"): large.clone(),
        name(1, "holed"): holed.clone(),
        name(2, "a"): one.double(),  # another dtype
        name(2, "half"): one.half(),
        name(2, "brain"): one.half().view(torch.bfloat16),  # the same bytes, of another dtype
        name(2, "a_t"): one.clone().reshape(30, 40),  # another shape
        name(2, "a_flipped"): one.flip(0),  # the same sum of bytes, in another order
        name(2, "b"): last,
        name(3, "a"): one.clone(),
        name(3, "ones"): torch.ones(7),  # vectors of one number, as new norms are
        name(4, "ones"): torch.ones(7),
        name(3, "full"): torch.full((5, 5), 0.25),  # but not matrices
        name(4, "full"): torch.full((5, 5), 0.25),
        name(3, "scalar"): torch.tensor(3.0),
        name(4, "scalar"): torch.tensor(3.0),
        name(3, "zeros"): torch.tensor([[0.0, 1.0]]),
        name(4, "zeros"): torch.tensor([[-0.0, 1.0]]),  # the same values, other bytes
        name(3, "steps"): torch.arange(5),
        name(4, "steps"): torch.arange(5),
    }
    expected = sorted(
        [
            [name(0, "a"), name(1, "a"), name(3, "a")],
            [name(0, "b"), name(1, "b")],
            [name(0, "holed"), name(1, "holed")],
            [name(3, "full"), name(4, "full")],
        ]
    )
    for shards in (1, 4):
        told = health_of(tensors, tmp_path / str(shards), shards=shards)
        assert in_order(told)["same"] == expected


def test_two_pairs_whose_bytes_add_up_to_the_same(tmp_path: Path) -> None:
    """Of four tensors with one sum of bytes, each duplicate is told with its own twin."""
    a = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    order = [a, a.flip(0), a.clone(), a.flip(0).clone()]
    tensors = {f"model.layers.{i}.mlp.weight": tensor for i, tensor in enumerate(order)}
    twins = in_order(health_of(tensors, tmp_path))["same"]
    assert [[int(name.split(".")[2]) for name in group] for group in twins] == [[0, 2], [1, 3]]


def test_what_health_finds_comes_in_one_order(tmp_path: Path) -> None:
    """What is found is listed alike with and without a base, and however tensors are sharded."""
    one = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    tensors = {f"model.layers.{i}.mlp.up.weight": one.clone() for i in (10, 2, 0)}
    tensors |= {f"model.layers.{i}.mlp.gate.weight": torch.zeros(2, 3) for i in (1, 11, 2)}
    tellings = []
    for shards in (1, 2, 3):
        path = write_checkpoint(tmp_path / f"{shards}", tensors, shards=shards)
        base = write_checkpoint(tmp_path / f"base{shards}", {n: t + 1 for n, t in tensors.items()}, shards=shards)
        tellings.append(run_lines("inspect", path, "--check", "--json", "--quiet").json["health"][0])
        tellings.append(inspect(path, "--base", base)["health"][1])
    told = [health | {"checkpoint": "", "recorded_files": None, "changed_files": {}} for health in tellings]
    assert len({json.dumps(health) for health in told}) == 1
    up, gate = "model.layers.{}.mlp.up.weight".format, "model.layers.{}.mlp.gate.weight".format
    assert told[0]["same"] == [{"tensor": up(i), "as": up(0)} for i in (2, 10)]
    assert told[0]["zero"] == [gate(i) for i in (1, 2, 11)]


def test_a_tied_head_is_no_duplicate(tmp_path: Path) -> None:
    """A stored head is none of its tied embedding, and is one where the config does not tie them."""
    tensors = toy(1, 2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    told = health_of(tensors, tmp_path / "tied", config=TIED)
    assert told["same"] == []
    told = health_of(tensors, tmp_path / "free", config=TIED | {"tie_word_embeddings": False})
    assert {frozenset(row.values()) for row in told["same"]} == {
        frozenset({"lm_head.weight", "model.embed_tokens.weight"})
    }


def test_a_tied_head_is_no_duplicate_in_a_lone_file(tmp_path: Path) -> None:
    """A base without a config goes by the fine-tune's, here as in all else: its tied head is no duplicate."""
    base = toy(1, 3)
    base["lm_head.weight"] = base["model.embed_tokens.weight"].clone()
    ft = tuned(base, 1)
    ft["lm_head.weight"] = ft["model.embed_tokens.weight"].clone()
    b = write_checkpoint(tmp_path / "base.safetensors", base)
    f = write_checkpoint(tmp_path / "ft", ft, config=TIED)
    told = inspect(f, "--base", b)
    assert [health["same"] for health in told["health"]] == [[], []]


def test_a_tied_head_beside_copies_of_its_embedding(tmp_path: Path) -> None:
    """Of a T5 that stores all four, the encoder's and decoder's embeddings may be duplicates, the tied head is not."""
    tensors = pair_of_stacks(1)
    for name in ("lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
        tensors[name] = tensors["shared.weight"].clone()
    config = {"model_type": "t5", "tie_word_embeddings": True}
    told = health_of(tensors, tmp_path, config=config)
    assert told["same"] == []
    # without the tie the head is a duplicate of the first, and the embeddings beside the shared one are none still
    told = health_of(tensors, tmp_path / "free", config=config | {"tie_word_embeddings": False})
    assert told["same"] == [{"tensor": "shared.weight", "as": "lm_head.weight"}]


def test_buffers_of_every_layer_are_no_duplicates(tmp_path: Path) -> None:
    """Rotary frequencies and masks that each layer stores are no duplicates; other weights named like them are."""
    one = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    kept = ("self_attn.rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "attention.bias")
    tensors = {f"h.{i}.{name}": one.clone() for i in range(3) for name in (*kept, "mlp.bias", "my_attn.bias.weight")}
    told = health_of(tensors, tmp_path)
    others = [f"h.{i}.{name}" for i in range(3) for name in ("mlp.bias", "my_attn.bias.weight")]
    assert told["same"] == [{"tensor": name, "as": others[0]} for name in others[1:]]


def test_8_bit_floats_are_looked_through(tmp_path: Path) -> None:
    """NaN and Inf of 8-bit floats are found, whatever their format; integers are counted as not looked into."""
    name = "model.layers.{}.mlp.weight".format
    tensors = {
        name(0): torch.tensor([[0x7F, 0xFF], [0x38, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(1): torch.tensor([[0x7C, 0xFC, 0x7D, 0x3C]], dtype=torch.uint8).view(torch.float8_e5m2),
        name(2): torch.tensor([[0x7E, 0x01]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(3): torch.tensor([[0x80, 0x00]], dtype=torch.uint8).view(torch.float8_e4m3fn),
        name(4): torch.tensor([[1, 2]], dtype=torch.uint8),
        name(5): torch.tensor([[1, 2]], dtype=torch.int64),
        name(6): torch.tensor([[3, 2]], dtype=torch.int64),
    }
    ran = run_lines("inspect", write_checkpoint(tmp_path / "m", tensors), "--check", "--json", "--quiet")
    told = ran.json["health"][0]
    assert ran.code == 5
    assert told["nonfinite"] == [{"tensor": name(0), "nan": 2, "inf": 0}, {"tensor": name(1), "nan": 1, "inf": 2}]
    assert (told["zero"], told["beyond"], told["same"]) == ([name(3)], [], [])
    assert (told["tensors"], told["not_looked_into"]) == (4, {"I64": 2, "U8": 1})


# --- real models ---


@dataclass(frozen=True)
class Family:
    """What stands where in a real model, by hand: beginnings of names, and words that tell kinds."""

    stacks: Mapping[str, int]
    before: tuple[str, ...]
    kinds: Mapping[str, str]


FAMILIES = {
    "llama": Family({"model.layers": 3}, ("model.embed_tokens",), TOY_KINDS),
    "mixtral": Family({"model.layers": 3}, ("model.embed_tokens",), TOY_KINDS | {"block_sparse_moe": "mlp"}),
    "t5": Family(
        {"encoder.block": 3, "decoder.block": 2},
        ("shared",),
        {"Attention.": "attention", "Dense": "mlp", "layer_norm": "norm", "shared": "embedding", "lm_head": "head"},
    ),
    "clip": Family(
        {"text_model.encoder.layers": 3, "vision_model.encoder.layers": 2},
        ("text_model.embeddings", "vision_model.embeddings", "vision_model.pre_layrnorm"),
        {
            "self_attn": "attention",
            "mlp": "mlp",
            "norm": "norm",
            "embeddings": "embedding",
            "_projection": "head",
            "logit_scale": "other",
        },
    ),
}


@pytest.mark.zoo
@pytest.mark.parametrize("family", FAMILIES)
def test_models_of_transformers(family: str, tmp_path: Path) -> None:
    """Real models, saved by transformers and perturbed, have the layers, sides, kinds and numbers written here."""
    expected = FAMILIES[family]
    module = zoo.ZOO[family]()
    module.save_pretrained(tmp_path / "base")
    for number in (1, 2):
        random = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for position, parameter in enumerate(module.parameters()):
                parameter.add_(0.001 * (position + 1) * torch.randn(parameter.shape, generator=random))
        module.to([torch.bfloat16, torch.float32][number - 1]).save_pretrained(
            tmp_path / f"ft{number}", max_shard_size="9KB"
        )
    paths = [tmp_path / "ft1", tmp_path / "ft2"]
    base, fts = loaded(tmp_path / "base"), [loaded(path) for path in paths]
    assert len(list(paths[0].glob("*.safetensors"))) > 1
    spots = spots_of(base, expected.stacks, expected.before, expected.kinds)
    for models in ([0], [1], [0, 1]):
        told = inspect(*(paths[m] for m in models), "--base", tmp_path / "base", "--tensors")
        check(told, Reference(base, [fts[m] for m in models], spots, defaults(spots, len(models))))
        assert {row["name"]: row["layers"] for row in told["stacks"]} == expected.stacks


# --- anything ---


def random_tensors(random: np.random.Generator, layers: int) -> Tensors:
    """Names of a toy with shapes of up to four dimensions, some of them empty, and the odd buffer."""
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    for i in range(layers):
        parts = ["self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight", "mlp.down_proj.bias"]
        names += [f"model.layers.{i}.{part}" for part in parts if part[0] == "s" or random.random() < 0.8]
    tensors = {}
    for name in names:
        shape = tuple(int(n) for n in random.integers(0 if random.random() < 0.1 else 1, 9, int(random.integers(0, 5))))
        values = torch.from_numpy(np.asarray(random.standard_normal(shape) * 10.0 ** random.uniform(-3, 3)))
        tensors[name] = values.to(torch.int64) if random.random() < 0.08 else values
    return tensors


@pytest.mark.parametrize("seed", [*range(10), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(10, 30))])
def test_random_checkpoints(seed: int, tmp_path: Path) -> None:
    """Whatever shapes, dtypes, shards and numbers of fine-tunes come together, the numbers are the reference's."""
    random = np.random.default_rng(seed)
    layers, number = int(random.integers(1, 7)), int(random.integers(1, 5))
    dtypes = list(FLOATS.values())
    master = random_tensors(random, layers)
    sides: list[Tensors] = []
    for side in range(number + 1):
        tensors = {}
        for name, tensor in master.items():
            if not tensor.is_floating_point():
                tensors[name] = tensor + side
                continue
            values = tensor.clone()
            if side and random.random() < 0.85:
                noise = random.standard_normal(tensor.shape) * (random.random(tensor.shape) < random.random())
                values += torch.from_numpy(np.asarray(noise)) * 10.0 ** random.uniform(-4, 1)
            values = values.to(dtypes[int(random.integers(4))])
            if seed % 3 == 0 and values.numel() and random.random() < 0.2:
                where = int(random.integers(values.numel()))
                values.reshape(-1)[where] = float(random.choice([math.nan, math.inf, -math.inf]))
            tensors[name] = values
        sides.append(tensors)
    if number > 1 and seed % 4 == 1:  # lacking in one, of another shape in another
        sides[int(random.integers(2))].pop("model.norm.weight")
        sides[2]["lm_head.weight"] = torch.ones(3, 1, 3, 1, 3)
    alpha, beta, gamma = (float(value) for value in random.uniform(-1, 2, 3).round(3))
    paths = [write_checkpoint(tmp_path / f"{i}", s, shards=int(random.integers(1, 5))) for i, s in enumerate(sides)]
    options = [f"--alpha={alpha}", f"--beta={beta}", f"--gamma={gamma}", "--workers", int(random.integers(1, 4))]
    told = inspect(*paths[1:], "--base", paths[0], *options, "--tensors")
    spots = toy_spots(sides[1])
    check(told, Reference(sides[0], sides[1:], spots, linear(spots, alpha, beta, gamma)))
    for health, side in zip(told["health"], sides, strict=True):
        floats = {name: tensor for name, tensor in side.items() if tensor.is_floating_point() and tensor.numel()}
        assert health["tensors"] == len(floats)
        bad = {n: (int(t.isnan().sum()), int(t.isinf().sum())) for n, t in floats.items() if not t.isfinite().all()}
        assert {row["tensor"]: (row["nan"], row["inf"]) for row in health["nonfinite"]} == bad
        assert set(health["zero"]) == {name for name, tensor in floats.items() if not tensor.count_nonzero()}
