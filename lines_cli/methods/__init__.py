"""The merge methods: plain functions over tensors, and the one table that names them.

A row says what a method takes, what its recipe may say, and what has to be measured over whole tensors or the whole
model before it can run on a part of one. Nothing here loads torch: the functions use it when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lines_cli.methods.dare import dare_linear, dare_ties
from lines_cli.methods.sums import average, linear, passthrough, slerp, slerp_shares, task_arithmetic
from lines_cli.methods.ties import consensus, ties
from lines_cli.parameters import Parameter

Values = Mapping[str, Any]
"""A method's parameters for one tensor: a tuple with one value per model, or one value."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured for one tensor's merge.

    Attributes:
        threshold: for each model the least magnitude that is kept; None keeps all.
        majority: the sign that most elections of the whole model gave; 1 where signs are not counted.
        l1: for each model the L1 norm of this tensor's task vector, before and after entries were dropped.
        products: of two models' tensors: their dot product, and the two squared L2 norms.
    """

    threshold: tuple[float | None, ...] = ()
    majority: int = 1
    l1: tuple[tuple[float, float], ...] = ()
    products: tuple[float, float, float] = (0.0, 0.0, 0.0)


def _as_said(values: Values, _: Measured) -> Values:
    return values


@dataclass(frozen=True, slots=True)
class Method:
    """One row.

    Attributes:
        merge: the function: N tensors, from which entries were dropped, and the keywords that `told` gives, to one.
        about: what it is, in a line, with its source.
        takes: task vectors, which need a base; or whole weights.
        parameters: what its recipe may say, by name.
        told: a tensor's values, and what was measured, as keywords of `merge`.
        models: least and greatest number; None for no bound.
        between_two: whether it goes from one model to another: the angles between their tensors are measured, and a
            base that is one of the two is the first.
        masks: how entries are chosen to be kept: by `magnitude`, above a threshold; at `random`; or all are.
        trims_itself: whether the function is given the whole task vectors, and trims what it merges.
        elects: whether a zero sum takes the sign of the majority, which then has to be counted.
        conflict: what contradicts itself, in words, given every value that is said of each parameter.
        sums: whether with weights of 1 the result is the sum of the task vectors, to the bit.
        alone_is_itself: whether one model, with nothing dropped and a weight of 1, comes back as it is.
    """

    merge: Callable[..., Any]
    about: str
    takes: Literal["task vectors", "weights"] = "task vectors"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    told: Callable[[Values, Measured], Values] = _as_said
    models: tuple[int, int | None] = (1, None)
    between_two: bool = False
    masks: Literal["magnitude", "random"] | None = None
    trims_itself: bool = False
    elects: Callable[[Values], bool] = lambda _: False
    conflict: Callable[[Values], str | None] = lambda _: None
    sums: bool = False
    alone_is_itself: bool = True


_ON_OFF: dict[str | bool, bool] = {True: True, False: False}
_WEIGHT = Parameter(1.0, "of the model in the sum", per_model=True)
_DENSITY = Parameter(1.0, "share of entries kept", per_model=True, low=0, high=1)
_LAMBDA = Parameter(1.0, "scale of the merged task vector")
_NORMALIZE = Parameter(False, "divide by the sum of the weights", varies=False, choices=_ON_OFF)
_TRIM = Parameter(
    "global",
    "what the density is a share of: the whole model, as published; or each tensor, as in mergekit",
    varies=False,
    choices={"global": "global", "tensor": "tensor"},
)


def _agreement_parameter(unless_said: str) -> Parameter:
    return Parameter(
        None,
        f"over the models that agree with the sign: their weighted mean, their sum, or the largest; {unless_said} "
        "unless said",
        varies=False,
        choices={"mean": "mean", "sum": "sum", "max": "max"},
    )


_RESCALE = Parameter(
    "density",
    "what is kept is multiplied by 1/density, as published; or restores the tensor's L1 norm (l1 or true, as in "
    "mergekit); or stays (false)",
    varies=False,
    choices={"density": "density", "l1": "l1", True: "l1", False: False},
)
_RESCALE_TRIMMED = Parameter(
    False,
    "restore the tensor's L1 norm after trimming (l1 or true), as mergekit can",
    varies=False,
    choices={False: False, "l1": "l1", True: "l1"},
)
_SEED = Parameter(0.0, "of the random choice", varies=False, low=0, high=2**53, whole=True)


def _agreement_or_normalize(said: Values) -> str | None:
    (agreement, *_), (normalize, *_) = said["agreement"], said["normalize"]
    if agreement is not None and normalize is not None and (agreement == "mean") != normalize:
        return (
            f"agreement: {agreement} and normalize: {str(normalize).lower()} contradict each other; leave normalize out"
        )
    return None


def _agreement(values: Values, *, default: str) -> str:
    if values["agreement"] is not None:
        return str(values["agreement"])
    return default if values["normalize"] is None else ("mean" if values["normalize"] else "sum")


def _ties_told(values: Values, measured: Measured) -> Values:
    told = {"weight": values["weight"], "agreement": _agreement(values, default="mean")}
    return {**told, "majority": measured.majority, "factor": _factors(values, measured)}


def _consensus_told(values: Values, measured: Measured) -> Values:
    told = {key: values[key] for key in ("weight", "mask_lambda", "k", "on")}
    return {**told, "threshold": measured.threshold, "majority": measured.majority}


def _consensus_conflict(said: Values) -> str | None:
    if said["on"][0] == "sum" and any(density != 1 for density in said["density"]):
        return "density trims what on: ties merges; with on: sum nothing is trimmed"
    return None


def _factors(values: Values, measured: Measured) -> tuple[float, ...]:
    """What each model's kept entries are multiplied by."""
    if values["rescale"] == "density":
        return tuple(1 / density if density else 1.0 for density in values["density"])
    if values["rescale"] == "l1" and measured.l1:
        return tuple(before / after if after else 1.0 for before, after in measured.l1)
    return (1.0,) * len(values["density"])  # nothing is dropped, or what is kept stays


def _dare_linear_told(values: Values, measured: Measured) -> Values:
    told = {key: values[key] for key in ("weight", "normalize")}
    return {**told, "factor": _factors(values, measured)}


def _dare_ties_told(values: Values, measured: Measured) -> Values:
    agreement = _agreement(values, default="sum")
    return {"weight": values["weight"], "agreement": agreement, "factor": _factors(values, measured)}


def _slerp_told(values: Values, measured: Measured) -> Values:
    dot, *squares = measured.products
    return {"shares": slerp_shares(values["t"], dot=dot, norms=(squares[0] ** 0.5, squares[1] ** 0.5))}


_MAYBE_NORMALIZE = Parameter(None, "true is agreement: mean, false is agreement: sum", varies=False, choices=_ON_OFF)
_RANDOM = {
    "weight": _WEIGHT,
    "density": _DENSITY,
    "lambda": _LAMBDA,
    "rescale": _RESCALE,
    "seed": _SEED,
}

METHODS: Mapping[str, Method] = {
    "average": Method(
        average,
        "The mean of the task vectors: a uniform model soup (Wortsman 2022).",
        parameters={"lambda": _LAMBDA},
        told=lambda *_: {},
    ),
    "task_arithmetic": Method(
        task_arithmetic,
        "The weighted sum of the task vectors (Ilharco 2023).",
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "trim": _TRIM,
            "normalize": _NORMALIZE,
            "lambda": _LAMBDA,
        },
        told=lambda values, _: {key: values[key] for key in ("weight", "normalize")},
        masks="magnitude",
        sums=True,
    ),
    "ties": Method(
        ties,
        "Trim, elect signs, merge what agrees (TIES, Yadav 2023).",
        parameters={
            "weight": _WEIGHT,
            "density": _DENSITY,
            "trim": _TRIM,
            "rescale": _RESCALE_TRIMMED,
            "agreement": _agreement_parameter("the mean"),
            "normalize": _MAYBE_NORMALIZE,
            "lambda": _LAMBDA,
        },
        told=_ties_told,
        masks="magnitude",
        elects=lambda values: values["trim"] == "global",
        conflict=_agreement_or_normalize,
    ),
    "consensus": Method(
        consensus,
        "Keep what several models' TALL masks select (consensus merging, Wang 2024).",
        parameters={
            "weight": _WEIGHT,
            "mask_lambda": Parameter(0.4, "of a model's TALL mask; smaller keeps more", per_model=True, low=0),
            "k": Parameter(2.0, "how many masks have to agree", varies=False, low=0, whole=True),
            "on": Parameter(
                "sum",
                "what is masked: the weighted sum, or TIES by sum",
                varies=False,
                choices={"sum": "sum", "ties": "ties"},
            ),
            "density": _DENSITY,
            "trim": _TRIM,
            "lambda": _LAMBDA,
        },
        told=_consensus_told,
        masks="magnitude",
        trims_itself=True,
        elects=lambda values: values["on"] == "ties" and values["trim"] == "global",
        conflict=_consensus_conflict,
        alone_is_itself=False,
    ),
    "dare_linear": Method(
        dare_linear,
        "Task arithmetic over randomly dropped and rescaled task vectors (DARE, Yu 2024).",
        parameters={**_RANDOM, "normalize": _NORMALIZE},
        told=_dare_linear_told,
        masks="random",
    ),
    "dare_ties": Method(
        dare_ties,
        "TIES over randomly dropped and rescaled task vectors (DARE, Yu 2024).",
        parameters={**_RANDOM, "agreement": _agreement_parameter("the sum"), "normalize": _MAYBE_NORMALIZE},
        told=_dare_ties_told,
        masks="random",
        conflict=_agreement_or_normalize,
    ),
    "linear": Method(
        linear,
        "The weighted average of whole weights.",
        takes="weights",
        parameters={
            "weight": _WEIGHT,
            "normalize": Parameter(True, _NORMALIZE.about, varies=False, choices=_ON_OFF),
        },
    ),
    "slerp": Method(
        slerp,
        "The way from one model to another along an arc (Shoemake 1985).",
        takes="weights",
        parameters={
            "t": Parameter(
                None,
                "how far from the first (0; the base, if it is one of the two) to the second (1)",
                low=0,
                high=1,
                required=True,
            )
        },
        told=_slerp_told,
        models=(2, 2),
        between_two=True,
        alone_is_itself=False,
    ),
    "passthrough": Method(
        passthrough,
        "One model as it is, or times a scale.",
        takes="weights",
        parameters={"scale": Parameter(None, "of the weights", per_model=True)},
        models=(1, 1),
    ),
}
