"""Every merge method, each with a reference and cases: the one table from which the tests draw that go through all of
them: against the reference, on devices, with NaN, by `inspect`, and of the golden digests.

To add a method is to add its file to `lines_cli/methods/` and its entry here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lines_cli.methods import METHODS
from support import mergekit_references, spectral_references, whole_model
from support.whole_model import Tensors

WEIGHTS = (0.3, 1.0, -0.7, 2.5, 0.1, 1.0, -0.2, 0.9)
DENSITIES = (0.3, 1.0, 0.05, 0.5, 0.9, 0.77, 0.0, 0.2)
LAMBDAS = (0.2, 0.6, 0.4, 0.3, 0.5, 1.0, 0.0, 0.45)
GAMMAS = (0.1, 0.3, 0.0, 0.6, 0.02, 0.4, 0.25, 1.0)
DELLAS = {"weight": WEIGHTS, "density": (0.3, 1.0, 0.05, 0.5, 0.9, 0.77, 0.0, 0.2)}
SCALING = {"alpha": 0.15, "beta": 0.7, "gamma": 0.9}


@dataclass(frozen=True)
class Case:
    """A method and what its recipe says.

    Attributes:
        method: its name.
        top: parameters for all models.
        each: parameters of single models, for up to eight.
        numbers: of models that it is tried with.
    """

    method: str
    top: Mapping[str, Any] = field(default_factory=dict)
    each: Mapping[str, Sequence[float]] = field(default_factory=dict)
    numbers: Sequence[int] = (1, 2, 3, 8)

    def recipe(self, number: int, **more: Any) -> dict[str, Any]:
        models = [
            {"model": f"{n}.safetensors", "parameters": {key: values[n] for key, values in self.each.items()}}
            for n in range(number)
        ]
        scale = {"lambda": more.pop("scale")} if "scale" in more else {}
        parameters = {**self.top, **scale}
        return {"merge_method": self.method, "models": models, "parameters": parameters, **more}

    @property
    def to_the_bit(self) -> bool:
        """Whether the result is the reference's to the bit; else within a few units in the last place."""
        return TABLE[self.method].to_the_bit

    def merged(self, tensors: Sequence[Tensors], base: Tensors | None = None) -> Tensors:
        """The reference; `base` in the compute dtype is for those that take it."""
        method = TABLE[self.method].reference
        known = METHODS[self.method].parameters
        per_model = [key for key in _DEFAULTS if key in _takes(method) and known[key].per_model]
        said = {key: value for key, value in self.top.items() if key not in per_model}
        for key in per_model:
            said[key] = [
                self.each[key][n] if key in self.each else self.top.get(key, _DEFAULTS[key])
                for n in range(len(tensors))
            ]
        return method(tensors, **said, **({"base": base} if "base" in _takes(method) else {}))


_DEFAULTS = {"weight": 1.0, "density": 1.0, "gamma": 0.01, "mask_lambda": 0.4, "scale": None, "epsilon": 0.15}
"""Of the parameters that models have."""


def _takes(function: Callable[..., Any]) -> set[str]:
    return set(function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount])


@dataclass(frozen=True)
class Entry:
    """A method in the tests.

    Attributes:
        reference: what it makes of task vectors (or weights), on whole models.
        typical: parameters with which it is tried wherever all methods are. Unless golden/recipes.py has recipes of its
            own for it, they are its golden ones, and say everything that each parameter may be but a number.
        cases: what is held against the reference: name -> arguments of `Case`.
        on_weights: whether it takes whole weights.
        to_the_bit: whether it is the reference's to the bit.
        models: how many models it is tried with, where it takes no other number.
        golden: whether its bytes are the same on any machine, so that digests of them are recorded.
    """

    reference: Callable[..., Tensors]
    typical: Sequence[Mapping[str, Any]]
    cases: Mapping[str, Mapping[str, Any]]
    on_weights: bool = False
    to_the_bit: bool = True
    models: int | None = None
    golden: bool = True


# --- references that are no part of whole_model ---


def crumbs(taus: Sequence[Tensors], density: Sequence[float], gamma: Sequence[float], trim: str) -> list[Tensors]:
    """Model breadcrumbs: in order of magnitude the largest int(gamma * n) entries are left out, and all but the next
    max(1, int(density * n)), those kept that share a place with one that is kept.
    """

    def mask(magnitudes: Tensor, share: float, outliers: float) -> Tensor:
        in_order = magnitudes.sort(descending=True).values
        kept = max(1, int(share * len(in_order)))
        first = min(int(outliers * len(in_order)), len(in_order) - kept)
        return (magnitudes >= in_order[first + kept - 1]) & (magnitudes <= in_order[first])

    left = []
    for tau, share, outliers in zip(taus, density, gamma, strict=True):
        flat = {name: tensor.abs().float().flatten() for name, tensor in tau.items() if tensor.numel()}
        if share == 1:
            left.append(tau)
            continue
        if trim == "global":
            every = mask(torch.cat(list(flat.values())), share, outliers)
            masks = dict(zip(flat, every.split([len(of) for of in flat.values()]), strict=True))
        else:
            masks = {name: mask(of, share, outliers) for name, of in flat.items()}
        left.append({n: t * masks[n].view(t.shape) + 0.0 if n in masks else t for n, t in tau.items()})
    return left


def rescaled(taus: Sequence[Tensors], left: list[Tensors], rescale: object) -> list[Tensors]:
    if not rescale:
        return left
    norm_of = whole_model.with_norm_of
    return [{name: norm_of(tau[name], kept[name]) for name in tau} for tau, kept in zip(taus, left, strict=True)]


def breadcrumbs(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    trim: str = "tensor",
    rescale: object = False,
    normalize: bool = False,
) -> Tensors:
    left = rescaled(taus, crumbs(taus, density, gamma, trim), rescale)
    total = whole_model.plain_sum(whole_model.weighted(left, weight))
    return whole_model.divided(total, weight) if normalize else total


def breadcrumbs_ties(
    taus: Sequence[Tensors],
    *,
    weight: Sequence[float],
    density: Sequence[float],
    gamma: Sequence[float],
    trim: str = "tensor",
    rescale: object = False,
    agreement: str | None = None,
    normalize: bool = False,
) -> Tensors:
    left = rescaled(taus, crumbs(taus, density, gamma, trim), rescale)
    sums = whole_model.plain_sum(whole_model.weighted(left, weight)).values()
    balance = sum(int(total.sign().sum()) for total in sums)
    majority = (balance > 0) - (balance < 0) if trim == "global" else 1
    agreement = agreement or ("mean" if normalize else "sum")
    return whole_model.elected_and_merged(left, weight, agreement, majority)


# --- the table ---


def _said(
    top: Mapping[str, Any] | None = None, each: Mapping[str, Sequence[float]] | None = None, **more: Any
) -> dict[str, Any]:
    """Arguments of `Case`."""
    return {"top": top or {}, "each": each or {}, **more}


TABLE: dict[str, Entry] = {
    "average": Entry(
        whole_model.average,
        typical=({},),
        cases={
            "average": _said(),
        },
    ),
    "task_arithmetic": Entry(
        whole_model.task_arithmetic,
        typical=({}, {"density": 0.4}, {"density": 0.3, "trim": "tensor"}),
        cases={
            "sum": _said(),
            "weighted sum": _said(each={"weight": WEIGHTS}),
            "normalized sum": _said({"normalize": True}, {"weight": WEIGHTS}),
            "sum of the largest": _said({"density": 0.2}),
            "weighted sum of the largest": _said(each={"weight": WEIGHTS, "density": DENSITIES}),
            "sum of the largest, by tensor": _said({"trim": "tensor", "normalize": True, "density": 0.4}),
        },
    ),
    "ties": Entry(
        whole_model.ties,
        typical=({"density": 0.4, "trim": "tensor"}, {"density": 1.0, "normalize": False}, {"density": 0.3}),
        cases={
            "ties": _said({"density": 0.2}),
            "ties, untrimmed": _said(),
            "ties, all said": _said(each={"weight": WEIGHTS, "density": DENSITIES}),
            "ties, sum": _said({"density": 0.35, "agreement": "sum"}, {"weight": WEIGHTS}),
            "ties, max": _said({"density": 0.35, "agreement": "max"}, {"weight": WEIGHTS}),
            "ties, normalize": _said({"density": 0.6, "normalize": True}, {"weight": WEIGHTS}),
            "ties, no normalize": _said({"density": 0.6, "normalize": False}),
            "ties, rescaled": _said({"density": 0.2, "rescale": True}, {"weight": WEIGHTS}),
            "ties by tensor, rescaled": _said({"trim": "tensor", "rescale": "l1"}, {"density": DENSITIES}),
            "ties by tensor": _said({"density": 0.2, "trim": "tensor"}),
            "ties by tensor, sum": _said({"trim": "tensor", "agreement": "sum"}, {"density": DENSITIES}),
            "ties by tensor, max": _said({"density": 0.5, "trim": "tensor", "agreement": "max"}, {"weight": WEIGHTS}),
        },
    ),
    "consensus": Entry(
        whole_model.consensus,
        typical=({}, {"on": "ties", "density": 0.5}),
        cases={
            "consensus": _said(),
            "consensus of 0": _said({"k": 0}, {"weight": WEIGHTS}),
            "consensus of 1": _said({"k": 1, "mask_lambda": 0.6}, {"weight": WEIGHTS}),
            "consensus of 3": _said({"k": 3}, {"mask_lambda": LAMBDAS}),
            "consensus on ties": _said({"on": "ties", "k": 1, "density": 0.3}, {"mask_lambda": LAMBDAS}),
            "consensus on ties, all said": _said({"on": "ties"}, {"weight": WEIGHTS, "density": DENSITIES}),
            "consensus on ties by tensor": _said({"on": "ties", "trim": "tensor", "density": 0.3}),
        },
    ),
    "dare_linear": Entry(
        whole_model.dare_linear,
        typical=({"density": 0.5}, {"density": 0.5, "rescale": "l1"}),
        cases={
            "dare": _said({"density": 0.5}),
            "dare, nothing dropped": _said(each={"weight": WEIGHTS}),
            "dare, all said": _said({"seed": 7, "normalize": True}, {"weight": WEIGHTS, "density": DENSITIES}),
            "dare, l1": _said({"rescale": "l1", "seed": 2**53}, {"weight": WEIGHTS, "density": DENSITIES}),
            "dare, no rescale": _said({"rescale": False, "density": 0.3}, {"weight": WEIGHTS}),
        },
    ),
    "dare_ties": Entry(
        whole_model.dare_ties,
        typical=({"density": 0.5}, {"density": 0.3, "rescale": "l1"}),
        cases={
            "dare_ties": _said({"density": 0.5}),
            "dare_ties, nothing dropped": _said(each={"weight": WEIGHTS}),
            "dare_ties, mean": _said({"agreement": "mean", "seed": 3}, {"weight": WEIGHTS, "density": DENSITIES}),
            "dare_ties, max": _said({"agreement": "max", "rescale": "l1", "density": 0.6}, {"weight": WEIGHTS}),
            "dare_ties, normalize": _said({"normalize": True, "rescale": False, "density": 0.6}),
        },
    ),
    "linear": Entry(
        whole_model.linear,
        typical=({},),
        cases={
            "linear": _said(each={"weight": WEIGHTS}),
            "linear, no normalize": _said({"normalize": False}, {"weight": WEIGHTS}),
        },
        on_weights=True,
    ),
    "slerp": Entry(
        whole_model.slerp,
        typical=({"t": 0.3},),
        cases={
            "slerp": _said({"t": 0.3}, numbers=(2,)),
        },
        on_weights=True,
        models=2,
    ),
    "passthrough": Entry(
        whole_model.passthrough,
        typical=({},),
        cases={
            "passthrough": _said(each={"scale": WEIGHTS}, numbers=(1,)),
        },
        on_weights=True,
        models=1,
    ),
    "breadcrumbs": Entry(
        breadcrumbs,
        typical=(
            {"density": 0.5, "gamma": 0.1, "trim": "tensor", "normalize": False},
            {"density": 0.4, "gamma": 0.2, "trim": "global", "normalize": True, "weight": 0.7, "rescale": "l1"},
            {"density": 0.9, "gamma": 0.3, "rescale": False, "lambda": [0.5, 1.5]},
        ),
        cases={
            "breadcrumbs": _said({"density": 0.5, "gamma": 0.1}),
            "breadcrumbs, global": _said({"density": 0.4, "gamma": 0.2, "trim": "global"}, {"weight": WEIGHTS}),
            "breadcrumbs, nothing dropped": _said({"gamma": 0.2, "normalize": True}, {"weight": WEIGHTS}),
            "breadcrumbs, all said": _said(
                {"normalize": True}, {"weight": WEIGHTS, "density": DENSITIES, "gamma": GAMMAS}
            ),
            "breadcrumbs, global, all said": _said({"trim": "global"}, {"density": DENSITIES, "gamma": GAMMAS}),
            "breadcrumbs, rescaled": _said({"density": 0.3, "rescale": "l1"}, {"gamma": GAMMAS}),
        },
    ),
    "breadcrumbs_ties": Entry(
        breadcrumbs_ties,
        typical=(
            {"density": 0.5, "gamma": 0.1, "trim": "tensor", "normalize": True},
            {"density": 0.4, "gamma": 0.2, "trim": "global", "agreement": "mean", "weight": 0.7, "rescale": "l1"},
            {"density": 0.9, "gamma": 0.3, "rescale": False, "agreement": "sum", "lambda": [0.5, 1.5]},
            {"density": 0.3, "agreement": "max", "normalize": False},
        ),
        cases={
            "breadcrumbs_ties": _said({"density": 0.5, "gamma": 0.1}),
            "breadcrumbs_ties, global": _said({"density": 0.4, "gamma": 0.2, "trim": "global"}, {"weight": WEIGHTS}),
            "breadcrumbs_ties, all said": _said(
                {"agreement": "mean", "rescale": "l1"}, {"weight": WEIGHTS, "density": DENSITIES, "gamma": GAMMAS}
            ),
            "breadcrumbs_ties, global, max": _said(
                {"trim": "global", "agreement": "max"}, {"density": DENSITIES, "gamma": GAMMAS}
            ),
        },
    ),
    "nuslerp": Entry(
        mergekit_references.nuslerp,
        typical=(
            {"weight": 0.7, "nuslerp_flatten": True, "lambda": 0.8},
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            {"nuslerp_flatten": False, "nuslerp_row_wise": False},
        ),
        cases={
            "nuslerp": _said(each={"weight": (0.3, 1.0)}, numbers=(2,)),
            "nuslerp, rows": _said({"nuslerp_flatten": False}, {"weight": (1.3, 0.4)}, numbers=(2,)),
            "nuslerp, columns": _said({"nuslerp_flatten": False, "nuslerp_row_wise": True}, numbers=(2,)),
            "nuslerp, weights that cancel": _said(each={"weight": (0.5, -0.5)}, numbers=(2,)),
        },
        to_the_bit=False,
        models=2,
    ),
    "multislerp": Entry(
        mergekit_references.multislerp,
        typical=({"weight": 0.7, "normalize_weights": True, "lambda": 0.8}, {"normalize_weights": False, "eps": 1e-6}),
        cases={
            "multislerp": _said(),
            "multislerp, weighted": _said(each={"weight": WEIGHTS}),
            "multislerp, not normalized": _said({"normalize_weights": False, "eps": 1e-6}, {"weight": WEIGHTS}),
        },
        to_the_bit=False,
    ),
    "karcher": Entry(
        mergekit_references.karcher,
        typical=({}, {"max_iter": 3, "tol": 1e-9}),
        cases={
            "karcher": _said(),
            "karcher, a step": _said({"max_iter": 1}),
            "karcher, many": _said({"max_iter": 50, "tol": 1e-12}),
        },
        on_weights=True,
        to_the_bit=False,
    ),
    "model_stock": Entry(
        mergekit_references.model_stock,
        typical=({"filter_wise": False}, {"filter_wise": True, "lambda": 0.8}),
        cases={
            "model_stock": _said(numbers=(2, 3, 8)),
            "model_stock, rows": _said({"filter_wise": True}, numbers=(2, 3, 8)),
        },
        to_the_bit=False,
    ),
    "della": Entry(
        mergekit_references.della,
        typical=(
            {"density": 0.5, "epsilon": 0.3, "rescale": "l1", "normalize": True},
            {"density": 0.7, "rescale": "density", "agreement": "sum", "seed": 3, "weight": 0.6},
            {"density": 0.4, "epsilon": 0.1, "rescale": False, "agreement": "max", "normalize": False},
            {"density": 0.6, "agreement": "mean", "lambda": [0.5, 1.5]},
        ),
        cases={
            "della": _said({"density": 0.6, "epsilon": 0.3}),
            "della, nothing dropped": _said(each={"weight": WEIGHTS}),
            "della, all said": _said({"seed": 7, "rescale": False, "epsilon": 0.02}, DELLAS),
            "della, as published": _said({"density": 0.3, "rescale": "density", "agreement": "sum", "epsilon": 0.2}),
        },
        to_the_bit=False,
    ),
    "della_linear": Entry(
        mergekit_references.della_linear,
        typical=(
            {"density": 0.5, "rescale": "l1", "normalize": False, "lambda": 0.8},
            {"density": 0.7, "rescale": "density", "normalize": True, "weight": 0.6},
            {"density": 0.4, "epsilon": 0.1, "rescale": False, "seed": 5},
        ),
        cases={
            "della_linear": _said({"density": 0.6, "epsilon": 0.3}),
            "della_linear, all said": _said({"seed": 2**53, "normalize": True, "epsilon": 0.02}, DELLAS),
            "della_linear, as published": _said({"density": 0.3, "rescale": "density", "epsilon": 0.2}),
        },
        to_the_bit=False,
    ),
    "sce": Entry(
        mergekit_references.sce,
        typical=({}, {"select_topk": 0.4, "lambda": 0.8}),
        cases={
            "sce": _said(),
            "sce of the most": _said({"select_topk": 0.6}),
            "sce of few": _said({"select_topk": 0.1}),
            "sce of none": _said({"select_topk": 0}),
        },
        to_the_bit=False,
    ),
    "ram": Entry(
        mergekit_references.ram,
        typical=({}, {"epsilon": 0.05, "lambda": 0.8}),
        cases={"ram": _said(), "ram, large changes": _said({"epsilon": 0.06})},
        to_the_bit=False,
    ),
    "ramplus_tl": Entry(
        mergekit_references.ramplus_tl,
        typical=({}, {"epsilon": 0.05, "r": 0.4, "alpha": 2, "lambda": 0.8}),
        cases={
            "ramplus_tl": _said(),
            "ramplus_tl, large changes": _said({"epsilon": 0.06, "r": 0.5, "alpha": 1.5}),
        },
        to_the_bit=False,
    ),
    "nearswap": Entry(
        mergekit_references.nearswap,
        typical=({"t": 0.03}, {"t": 0.01, "lambda": 0.8}),
        cases={"nearswap": _said({"t": 0.02}, numbers=(1,)), "nearswap of none": _said({"t": 0}, numbers=(1,))},
        to_the_bit=False,
        models=1,
    ),
    "arcee_fusion": Entry(
        mergekit_references.arcee_fusion,
        typical=({}, {"lambda": 0.8}),
        cases={"arcee_fusion": _said(numbers=(1,))},
        to_the_bit=False,
        models=1,
    ),
    "iso_c": Entry(
        spectral_references.iso_c,
        typical=({}, {"weight": 0.7, "lambda": 1.5}),
        cases={"iso_c": _said(), "iso_c, weighted": _said(each={"weight": WEIGHTS})},
        to_the_bit=False,
    ),
    "iso_cts": Entry(
        spectral_references.iso_cts,
        typical=({}, {"common_space_fraction": 0.5, "weight": 0.7, "lambda": 1.5}),
        cases={
            "iso_cts": _said(),
            "iso_cts, nothing in common": _said({"common_space_fraction": 0}),
            "iso_cts, weighted": _said({"common_space_fraction": 0.6}, {"weight": WEIGHTS}),
        },
        to_the_bit=False,
        golden=False,
    ),
    "tsv_m": Entry(
        spectral_references.tsv_m,
        typical=({}, {"weight": 0.7, "lambda": 1.5}),
        cases={"tsv_m": _said(), "tsv_m, weighted": _said(each={"weight": WEIGHTS})},
        to_the_bit=False,
        golden=False,
    ),
    "wudi": Entry(
        spectral_references.wudi,
        typical=({}, {"ridge": 0.01, "weight": 0.7, "lambda": 1.5}),
        cases={"wudi": _said(), "wudi, weakly held to the sum": _said({"ridge": 1e-4}, {"weight": WEIGHTS})},
        to_the_bit=False,
        golden=False,
    ),
}

CASES = {name: Case(method, **said) for method, entry in TABLE.items() for name, said in entry.cases.items()}
TASK_VECTORS = {name: case for name, case in CASES.items() if not TABLE[case.method].on_weights}
WHOLE_WEIGHTS = {name: case for name, case in CASES.items() if TABLE[case.method].on_weights}
TYPICAL = {f"{method}-{n}": (method, said) for method, entry in TABLE.items() for n, said in enumerate(entry.typical)}
"""Every method with every one of its typical parameters."""
