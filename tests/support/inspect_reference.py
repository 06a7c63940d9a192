"""Every number that `lines inspect --base --json` tells, by plain float64 arithmetic on whole tensors.

The reference knows nothing of lines: tensors are loaded with safetensors' own library, joined into long vectors, and
summed. Where each tensor stands, what kind it is and what its coefficient is are written here by hand.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

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


def refused(code: int, *args: object) -> str:
    """What `lines inspect ARGS` says as it refuses with this exit code; stdout has that alone, as JSON."""
    ran = run_lines("inspect", *args, "--json", "--quiet", "--device", "cpu")
    assert (ran.code, ran.trace) == (code, ""), ran.out + ran.err + ran.trace
    assert list(ran.json) == ["schema", "lines", "error"]
    assert ran.json["error"]["code"] == code
    return ran.err


TIED = {"model_type": "llama", "tie_word_embeddings": True, "num_hidden_layers": 3}


def up(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(math.inf, dtype=dtype))


def down(value: float, dtype: torch.dtype) -> torch.Tensor:
    return torch.nextafter(torch.tensor(value, dtype=dtype), torch.tensor(-math.inf, dtype=dtype))
