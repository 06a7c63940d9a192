"""What was asked, as one frozen value, and what of it is impossible whatever the checkpoints hold.

The keys are mergekit's where mergekit has them; `lines:` adds the scaling over depth. One fine-tune on one base is
task arithmetic with one task vector, so that is what an edit's recipe says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lines_cli.depth import DepthMap
from lines_cli.errors import RecipeError
from lines_cli.methods import METHODS, Method, Values
from lines_cli.parameters import evaluate, filters_of, values_of
from lines_cli.schedule import Constant, Linear, Listed, Outside, Power, Rules, Schedule

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def parse_size(text: str | int) -> int:
    """`5GB` -> 5_000_000_000. KB, MB, GB, TB are decimal, as everywhere on the Hub; KiB to TiB are binary."""
    match = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)", str(text).strip())
    if (
        match is None
        or match[2].upper() not in _UNITS
        or not (size := int(Decimal(match[1]) * _UNITS[match[2].upper()]))
    ):
        raise ValueError("a size is written 5GB, 500MB, or as a number of bytes")
    return size


Size = Annotated[int, BeforeValidator(parse_size)]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes, no, on and off as these, and Python reads these as 1 and 0
        raise ValueError("expected a number")
    return value


Finite = Annotated[float, BeforeValidator(_no_flag), Field(allow_inf_nan=False)]
DtypeName = Literal["float64", "float32", "float16", "bfloat16"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Fixed = Literal["keep", "base"]
_FIXED = {"keep": 1.0, "base": 0.0}


def _parse_schedule(value: Any) -> Any:
    """`linear`, `constant`, `power:2`; or a list of numbers, also as `0.1,0.6,1.0`."""
    if isinstance(value, str) and value in ("linear", "constant"):
        return value
    try:
        if isinstance(value, str) and value.startswith("power:"):
            if 0 < float(value.removeprefix("power:")) < float("inf"):
                return value
        else:
            if isinstance(value, (str, int, float)):
                value = str(value).split(",")
            parts = () if isinstance(value, (dict, set, bytes)) else value
            numbers = tuple(float(_no_flag(part)) for part in parts)
            if numbers and all(map(math.isfinite, numbers)):
                return numbers
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(
        "a schedule is linear, constant, power:P with P above 0, or a list of coefficients as in 0.1,0.6,1"
    )


def _parse_stack(value: Any) -> Any:
    if isinstance(value, (dict, Ends)) or (isinstance(value, str) and value in _FIXED):
        return value
    raise ValueError("a stack is keep, base, or its alpha and beta, as in --stack NAME=0.1,0.9")


def _parse_filter(value: Any) -> Any:
    if isinstance(value, str) and value in _FIXED:
        return value
    try:
        if math.isfinite(number := float(_no_flag(value))):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("a filter gives a number, keep or base")


def _named(key: str) -> str:
    if not key:
        raise ValueError("an empty name would match everything; say * for that")
    return key


class Ends(_Part):
    """A stack's own alpha and beta."""

    alpha: Finite
    beta: Finite = Field(default_factory=lambda given: 1 - given["alpha"])


Auto = Literal["auto"]


def _parse_alpha(value: Any) -> float | Auto:
    if value == "auto":
        return "auto"
    try:
        if math.isfinite(number := float(_no_flag(value))):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError("expected a finite number, or auto")


class Scaling(_Part):
    """The `lines:` key: how the task vector is scaled over depth.

    Attributes:
        alpha, beta: the coefficient of the first layer, and what depth adds to it. `auto` is the paper's heuristic for
            many tasks, `(1/N) * norm1(sum of tau_i) / norm1(tau_merged)`, measured. Only a schedule that lists its
            coefficients needs no beta.
        gamma: multiplies what a schedule gives.
        schedule: `linear`, `power:P`, `constant`, or the coefficients themselves, first layer to last.
        outside: what tensors outside the blocks get (`Rules.outside`).
        layers: a regular expression that overrules the detection of depth (`find_depth`).
        stacks: a stack by its name, or any part of it that names no other: `keep` (coefficient 1), `base` (0), or ends
            of its own.
        filter: part of a tensor's name -> coefficient; the first that matches has the last word.
    """

    alpha: Annotated[float | Auto, PlainValidator(_parse_alpha)] = "auto"
    beta: Finite | None = None
    gamma: Finite = 1.0
    schedule: Annotated[str | tuple[Finite, ...], BeforeValidator(_parse_schedule)] = "linear"
    outside: Outside = "alpha"
    layers: str | None = None
    stacks: dict[str, Annotated[Fixed | Ends, BeforeValidator(_parse_stack)]] = Field(default_factory=dict)
    filter: dict[Annotated[str, AfterValidator(_named)], Annotated[Fixed | Finite, BeforeValidator(_parse_filter)]] = (
        Field(default_factory=dict)
    )

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> Scaling:
        if isinstance(self.schedule, tuple):
            if named := sorted({"alpha", "beta"} & self.model_fields_set):
                raise ValueError(
                    f"the schedule lists the coefficients themselves; {' and '.join(named)} cannot be given too"
                )
            if any(isinstance(value, Ends) for value in self.stacks.values()):
                raise ValueError(
                    "with a schedule that lists coefficients, a stack can be keep or base, not alpha and beta"
                )
        elif self.beta is None:
            raise ValueError("beta is missing: how much the coefficient grows from the first layer to the last")
        return self

    @model_serializer(mode="wrap")
    def _without_what_does_not_apply(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        unsaid = {"alpha", "beta"} if isinstance(self.schedule, tuple) else set()
        unsaid |= {key for key in ("stacks", "filter") if not values[key]}
        return {key: value for key, value in values.items() if key not in unsaid}

    @property
    def needs_alpha(self) -> bool:
        """Whether alpha has to be measured."""
        return self.alpha == "auto" and not isinstance(self.schedule, tuple)

    @property
    def needs_depth(self) -> bool:
        """Whether it matters where a tensor stands at all."""
        return bool(self.stacks) or self.outside != "alpha" or not self._schedule(0.0, self.beta or 0.0).flat

    def rules(self, depth: DepthMap, *, alpha: float | None = None) -> Rules:
        """What decides every coefficient, for the stacks of a model.

        Args:
            depth: the stacks.
            alpha: what `auto` was measured to be; where it was not, coefficients that rest on it are NaN.

        Raises:
            RecipeError: `stacks` names a stack that is not there, or several at once.
        """
        first = math.nan if alpha is None else alpha
        first = first if isinstance(self.alpha, str) else self.alpha
        stacks: dict[str, Schedule | float] = {}
        for part, value in self.stacks.items():
            name = depth.select(part)
            if name in stacks:
                raise RecipeError(f"stack {part!r} is {name!r}, which is named already", hint="Name each stack once.")
            stacks[name] = self._schedule(value.alpha, value.beta) if isinstance(value, Ends) else _FIXED[value]
        filters = tuple(
            (part, _FIXED[value] if isinstance(value, str) else value) for part, value in self.filter.items()
        )
        schedule = self._schedule(first, self.beta or 0.0)
        return Rules(schedule, self.gamma, self.outside, stacks, filters)

    def _schedule(self, alpha: float, beta: float) -> Schedule:
        if isinstance(self.schedule, tuple):
            return Listed(self.schedule)
        if self.schedule == "constant":
            return Constant(alpha, beta)
        if self.schedule.startswith("power:"):
            return Power(alpha, beta, float(self.schedule.removeprefix("power:")))
        return Linear(alpha, beta)


class Source(_Part):
    """One entry of `models:`.

    Attributes:
        model: a path or a Hub id.
        parameters: what its method is told of this model, before what stands at the top.
        layer_range: of a source of mergekit's `slices`; only a whole stack can be meant.
    """

    model: str
    parameters: dict[str, Any] = Field(default_factory=dict)
    layer_range: tuple[int, int] | None = Field(default=None, exclude=True)

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key == "model" or value}


Like = Literal["base", "ft"]


class Recipe(_Part):
    """One result: the inputs, the method, the scaling, and how disagreements between the inputs are settled.

    Attributes:
        merge_method: a row of `lines_cli.methods.METHODS`.
        base_model: the pre-trained checkpoint: a path or a Hub id, `org/name[@revision]`. Methods that take whole
            weights need it for `lines:` alone.
        models: the fine-tunes, in the order of every sum.
        parameters: the method's, for all models.
        lines: the scaling over depth; without it the merged task vector is scaled by `lambda` alone.
        dtype: what every float tensor is written as; None keeps what the input has that the output is like.
        tokenizer_source, chat_template: `base`, or one of the models; None takes the input that the output is like.
        like: which input gives the output its names, dtypes, integer tensors, config and other files: the `base`
            (the first model where there is none), or the (first) fine-tune.
        missing: a tensor that some inputs lack is an `error`; taken as it is if a fine-tune has it (`ft`); a `copy` of
            whichever has it, the base before the models; or left out (`skip`).
        resize: token embeddings and heads with differing numbers of rows are an `error`, or take the rows of the
            (first) fine-tune (`ft`) or the `base`.
        allow_nonfinite: let NaN and Inf through.
        max_shard_size: bytes of tensors per file of the output folder.
        output: the destination, unless the command line names another.
        notes: what a person should know of how the recipe was read.
    """

    merge_method: str = "task_arithmetic"
    base_model: str | None = None
    models: tuple[Source, ...] = Field(min_length=1)
    parameters: dict[str, Any] = Field(default_factory=dict)
    lines: Scaling | None = None
    dtype: DtypeName | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    like: Like = "base"
    missing: Literal["error", "ft", "copy", "skip"] = "error"
    resize: Literal["error", "ft", "base"] = "error"
    allow_nonfinite: bool = False
    max_shard_size: Size = parse_size("5GB")
    output: str | None = Field(default=None, exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)

    @property
    def method(self) -> Method:
        """The row of the table."""
        return METHODS[self.merge_method]

    @property
    def merged(self) -> tuple[Source, ...]:
        """The models whose tensors are merged. A base that is listed among others has no task vector, and is left out."""
        if self.method.takes == "weights":
            return self._slerped if self.merge_method == "slerp" else self.models
        return tuple(source for source in self.models if source.model != self.base_model) or self.models

    @property
    def _slerped(self) -> tuple[Source, ...]:
        """As in mergekit, the base is the first of the two, where it is one of them, or the only other there is."""
        own = tuple(source for source in self.models if source.model == self.base_model)
        others = tuple(source for source in self.models if source.model != self.base_model)
        if not own and len(others) == 1 and self.base_model is not None:
            own = (Source(model=self.base_model),)
        return own + others

    @property
    def subtracts_base(self) -> bool:
        """Whether task vectors are taken: differences to the base."""
        return self.method.takes == "task vectors" or self.lines is not None

    def values(self, name: str, position: float) -> Values:
        """The method's parameters for one tensor.

        Args:
            name: the tensor's.
            position: of its layer in its stack, from 0 to 1; 0 outside the blocks.

        Returns:
            For each parameter a tuple with a value for each of `merged`, or one value.
        """
        values: dict[str, Any] = {}
        for key, parameter in self.method.parameters.items():
            if parameter.per_model:
                values[key] = tuple(
                    _first_said((source.parameters, self.parameters), key, name, position, parameter.default)
                    for source in self.merged
                )
            else:
                values[key] = _first_said((self.parameters,), key, name, position, parameter.default)
        return values

    def settings(self, key: str) -> Iterator[Any]:
        """What is said of a parameter, wherever it is said."""
        for said in (*(source.parameters for source in self.merged), self.parameters):
            if key in said:
                yield said[key]

    @property
    def parameters_vary(self) -> bool:
        """Whether any parameter is a gradient over depth."""
        return any(
            isinstance(value, list)
            for key in self.method.parameters
            for setting in self.settings(key)
            for value in _alternatives(setting)
        )

    @property
    def filters(self) -> set[str]:
        """Every part of tensor names that a parameter asks for."""
        return {
            part for key in self.method.parameters for setting in self.settings(key) for part in filters_of(setting)
        }


def _alternatives(setting: Any) -> list[Any]:
    """What a setting may come to: itself, or what stands behind its filters."""
    if isinstance(setting, list) and setting and isinstance(setting[0], dict):
        return [part["value"] for part in setting]
    return [setting]


def _first_said(places: tuple[Mapping[str, Any], ...], key: str, name: str, position: float, default: Any) -> Any:
    for said in places:
        if key in said and (value := evaluate(said[key], name, position)) is not None:
            return value
    return default


Place = tuple[str | int, ...]
"""Where a key stands in a recipe: `("models", 0, "parameters", "weight")`."""


def make_recipe(values: Any, *, where: str, line: Mapping[Place, int] | None = None) -> Recipe:
    """Check plain values and freeze them.

    Args:
        values: the recipe as YAML has it.
        where: what a message should call their origin.
        line: the line of every key there, if it is a file.

    Raises:
        RecipeError: an unknown key or an impossible value.
    """
    problems: list[tuple[Place, str]] = []
    notes: list[str] = []
    values, lines_of = _without_aliases(dict(values), problems, notes)
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate({**values, "notes": notes})
    except ValidationError as error:
        # Of the two readings of a stack, fixed or with ends, only the one that was meant is worth a complaint.
        relevant = [details for details in error.errors() if not _other_reading(details)]
        problems += [problem for details in relevant if (problem := _problem(dict(details)))]
    if recipe is not None and not problems:
        recipe = _with_parameters(recipe, problems)
    if recipe is None or problems:
        raise RecipeError(f"{where}: " + "; ".join(_at(lines_of(place), line) + what for place, what in problems))
    return recipe


def _at(place: Place, line: Mapping[Place, int] | None) -> str:
    """`line 7: ` for a key of a file: its own line, or that of what should hold it."""
    while line and place and place not in line:
        place = place[:-1]
    return f"line {line[place]}: " if line and place in line else ""


def _other_reading(details: Any) -> bool:
    return str(details["loc"][-1]).startswith("literal[")


def _problem(details: dict[str, Any]) -> tuple[Place, str] | None:
    """What one of pydantic's complaints means to whoever wrote the recipe; None if another one says it already."""
    place: Place = tuple(part for part in details["loc"] if part != "Ends")
    key = dotted(place)
    match details["type"]:
        case "default_factory_not_called":  # beta has no default because alpha is wrong
            return None
        case "missing":
            return place, f"{key} is missing"
        case "extra_forbidden":
            return place, f"{key} is not a key of a recipe{_nearest(key)}"
        case _:
            given = details["input"]
            got = "" if isinstance(given, (dict, list)) else f" (got {given!r})"
            return place, f"{key}: {details['msg'].removeprefix('Value error, ')}{got}"


def dotted(place: Place) -> str:
    """`models.0.parameters.weight`."""
    return ".".join(map(str, place))


_KNOWN_KEYS = (
    *(name for name in Recipe.model_fields if name != "notes"),
    *("out_dtype", "tokenizer", "slices"),
    *(f"lines.{name}" for name in Scaling.model_fields),
    *("models.model", "models.parameters"),
)


def _nearest(key: str, method: str | None = None) -> str:
    """Which known key may have been meant; a parameter of a method first, if it stands in the wrong place."""
    bare = re.sub(r"\.\d+", "", key)
    last = bare.rpartition(".")[2]
    parameters = sorted({name for row in METHODS.values() for name in row.parameters})
    if method is None and last in parameters:
        return f"; a method's {last} stands under parameters"
    if last in Scaling.model_fields and not bare.startswith("lines."):
        return f"; did you mean lines.{last}?"
    if method is not None and (near := get_close_matches(last, METHODS[method].parameters, n=1, cutoff=0.5)):
        return f"; did you mean {near[0]}?"
    near = get_close_matches(bare, _KNOWN_KEYS, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _without_aliases(
    values: dict[Any, Any], problems: list[tuple[Place, str]], notes: list[str]
) -> tuple[dict[Any, Any], Any]:
    """The recipe in our own keys: what mergekit says in another way is said in ours.

    Returns:
        The values; and, for a place among them, the place it had.
    """
    values = dict(values)
    moved: dict[str, Place] = {}
    out_dtype = values.pop("out_dtype", None)
    if out_dtype is not None:
        moved["dtype"] = ("out_dtype",)
        values["dtype"] = out_dtype
    tokenizer = values.pop("tokenizer", None)
    if tokenizer is not None:
        if not isinstance(tokenizer, dict) or tokenizer.keys() - {"source"} or "source" not in tokenizer:
            problems.append((("tokenizer",), "tokenizer: only {source: ...} is understood; tokens are not rearranged"))
        elif values.get("tokenizer_source") is not None:
            problems.append((("tokenizer",), "tokenizer and tokenizer_source say the same thing: leave one out"))
        else:
            moved["tokenizer_source"] = ("tokenizer", "source")
            values["tokenizer_source"] = tokenizer["source"]
    if "slices" in values:
        moved["models"] = ("slices", 0, "sources")
        _take_slices(values, problems, notes)

    def place_of(place: Place) -> Place:
        return (*moved[str(place[0])], *place[1:]) if place and place[0] in moved else place

    return values, place_of


def _take_slices(values: dict[Any, Any], problems: list[tuple[Place, str]], notes: list[str]) -> None:
    """mergekit's `slices`, where it says no more than `models` does: one slice with the whole of every model."""
    slices = values.pop("slices")
    if "models" in values:
        problems.append((("slices",), "slices and models are two ways to say it: leave one out"))
        return
    one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    if not isinstance(one, dict) or one.keys() - {"sources", "parameters"} or not isinstance(one.get("sources"), list):
        what = "slices: only one slice, of whole models, is understood; stacking parts of models is another tool's work"
        problems.append((("slices",), what))
        values["models"] = [{"model": "unknown"}]
        return
    values["models"] = one["sources"]
    if isinstance(one.get("parameters"), dict):
        above = values.get("parameters")
        values["parameters"] = {**(above if isinstance(above, dict) else {}), **one["parameters"]}
    notes.append("slices: one slice of whole models, read as models")


# --- what pydantic cannot check: the method's own terms ---


def _with_parameters(recipe: Recipe, problems: list[tuple[Place, str]]) -> Recipe | None:
    """The recipe with its parameters checked and frozen; problems are added to the list."""
    if recipe.merge_method not in METHODS:
        near = get_close_matches(recipe.merge_method, METHODS, n=1, cutoff=0.4)
        there_are = f"there are {', '.join(METHODS)}"
        mean = f"did you mean {near[0]}? " if near else ""
        problems.append(
            (("merge_method",), f"merge_method: no method is called {recipe.merge_method!r}; {mean}{there_are}")
        )
        return None
    notes = list(recipe.notes)
    top = _checked(recipe.parameters, ("parameters",), recipe.merge_method, problems, notes, of_model=False)
    models = tuple(
        source.model_copy(
            update={
                "parameters": _checked(
                    source.parameters,
                    ("models", number, "parameters"),
                    recipe.merge_method,
                    problems,
                    notes,
                    of_model=True,
                )
            }
        )
        for number, source in enumerate(recipe.models)
    )
    names = {source.model for source in models} | {recipe.base_model}
    for key in ("tokenizer_source", "chat_template"):
        problems += _wrong_source(key, getattr(recipe, key), names)
    recipe = recipe.model_copy(update={"parameters": top, "models": models})
    _check_models(recipe, problems)
    if not problems:
        _check_values(recipe, problems, notes)
        if "trim" in recipe.method.parameters and "trim" not in top and _varies(recipe, "density"):
            recipe = recipe.model_copy(update={"parameters": {**top, "trim": "tensor"}})
    return recipe.model_copy(update={"notes": tuple(dict.fromkeys(notes))})


def _checked(
    said: dict[str, Any],
    place: Place,
    method: str,
    problems: list[tuple[Place, str]],
    notes: list[str],
    *,
    of_model: bool,
) -> dict[str, Any]:
    known = METHODS[method].parameters
    checked: dict[str, Any] = {}
    for key, setting in said.items():
        here = (*place, key)
        if key == "int8_mask":
            notes.append("int8_mask is accepted and does nothing: masks never leave the processor's cache")
        elif key not in known:
            elsewhere = [name for name, row in METHODS.items() if key in row.parameters]
            of = f"; {', '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} it" if elsewhere else ""
            problems.append((here, f"{dotted(here)} is not a parameter of {method}{of or _nearest(str(key), method)}"))
        elif of_model and not known[key].per_model:
            problems.append(
                (here, f"{dotted(here)} is not said of one model, but of all: move it to the top's parameters")
            )
        else:
            try:
                checked[key] = known[key].check(setting)
            except ValueError as error:
                problems.append((here, f"{dotted(here)}: {error}"))
    return checked


def _wrong_source(key: str, value: str | None, names: set[str | None]) -> Iterator[tuple[Place, str]]:
    if value is None or (value == "base" and None not in names) or value in names:
        return
    if value == "union":
        what = f"{key}: union would rearrange every embedding; take the base's or one model's tokenizer"
    elif value == "base":
        what = f"{key}: base, but there is no base_model"
    else:
        what = f"{key}: {value!r} is neither base nor one of the models"
    yield (key,), what


def _check_models(recipe: Recipe, problems: list[tuple[Place, str]]) -> None:
    """Refuse a number of models that the method cannot take, and a base where none applies or where one is needed."""
    method, name = recipe.method, recipe.merge_method
    number, (least, most) = len(recipe.merged), method.models
    beside = " beside the base" if method.takes == "task vectors" else ""
    if number < least:
        problems.append((("models",), f"models: {name} needs {least}{beside}, and there {_are(number)}"))
    if most is not None and number > most:
        problems.append((("models",), f"models: {name} takes {most}{beside}, and there {_are(number)}"))
    if recipe.base_model is None and recipe.subtracts_base:
        why = f"{name} merges task vectors" if method.takes == "task vectors" else "lines: scales a task vector"
        problems.append((("base_model",), f"base_model is missing: {why}, the differences to a base"))
    if recipe.base_model is not None and not recipe.subtracts_base and name != "slerp":
        what = f"base_model: {name} has no use for a base without lines:"
        problems.append((("base_model",), f"{what}; leave it out, or list it under models"))
    is_one_of_them = any(source.model == recipe.base_model for source in recipe.merged)
    if recipe.base_model is not None and name == "slerp" and not recipe.subtracts_base and not is_one_of_them:
        problems.append((("base_model",), "base_model: without lines: it has to be one of the two models of slerp"))
    if recipe.resize == "base" and recipe.base_model is None:
        problems.append((("resize",), "resize: base, but there is no base_model"))


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"


def _check_values(recipe: Recipe, problems: list[tuple[Place, str]], notes: list[str]) -> None:
    """Refuse values that contradict each other; say where the reading is not mergekit's."""
    values = recipe.values("", 0.0)
    if contradiction := recipe.method.conflict(values):
        problems.append((("parameters",), f"parameters: {contradiction}"))
    for key, parameter in recipe.method.parameters.items():
        if parameter.default is None and not parameter.choices and not parameter.per_model:
            said = list(recipe.settings(key))
            if not said:
                problems.append((("parameters",), f"parameters.{key} is missing: {parameter.about}"))
    densities = [value for setting in recipe.settings("density") for value in values_of(setting)]
    trims = recipe.method.masks == "magnitude" and any(density != 1 for density in densities)
    varying = _varies(recipe, "density")
    if trims and varying and recipe.parameters.get("trim") == "global":
        what = "one density for the whole model is needed to trim globally; trim: tensor takes one for each"
        problems.append((("parameters", "trim"), f"parameters.trim: {what}"))
    if trims and "trim" not in recipe.parameters:
        here = "tensor by tensor, as its density varies" if varying else "over the whole model, as published"
        notes.append(f"trims {here}; mergekit trims tensor by tensor (trim: tensor)")
    if recipe.method.masks == "random" and "rescale" not in recipe.parameters and any(d != 1 for d in densities):
        notes.append("divides what is kept by the density, as published; mergekit restores the L1 norm (rescale: l1)")


def _varies(recipe: Recipe, key: str) -> bool:
    return any(isinstance(setting, list) for setting in recipe.settings(key))


def edit_recipe(base: str, ft: str, **options: Any) -> Recipe:
    """The recipe of `lines edit BASE FT` with the given options, each named as on the command line.

    Args:
        base, ft: the two checkpoints: a path or a Hub id.
        options: the fields of `Scaling` and of `Recipe`. One that is None keeps its default; alpha's is 0.1, beta's
            1 - alpha.

    Raises:
        RecipeError: an unknown option or an impossible value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    scaling = {key: given.pop(key) for key in Scaling.model_fields if key in given}
    if not _lists_coefficients(scaling.get("schedule")):
        alpha = scaling.setdefault("alpha", 0.1)
        if alpha != "auto":
            scaling.setdefault("beta", _rest(alpha))
    recipe = {"base_model": base, "models": [{"model": ft}], "lines": scaling, "like": "ft", **given}
    return make_recipe(recipe, where="recipe")


def _lists_coefficients(schedule: Any) -> bool:
    try:
        return isinstance(_parse_schedule(schedule), tuple)
    except ValueError:
        return False


def _rest(alpha: Any) -> float:
    try:
        return 1 - float(alpha)
    except (TypeError, ValueError, OverflowError):  # alpha will be refused
        return 0.0
