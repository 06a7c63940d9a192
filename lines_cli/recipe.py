"""What was asked, as one frozen value: from the command line or a YAML file, and back into YAML.

The keys are mergekit's where mergekit has them; `lines:` adds the scaling over depth. One fine-tune on one base is
task arithmetic with one task vector, so that is what an edit's recipe says.
"""

from __future__ import annotations

import math
import os
import re
from decimal import Decimal
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from lines_cli import __version__
from lines_cli.depth import DepthMap
from lines_cli.errors import RecipeError
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


class Scaling(_Part):
    """The `lines:` key: how the task vector is scaled over depth.

    Attributes:
        alpha, beta: the coefficient of the first layer, and what depth adds to it; beta is 1 - alpha unless given.
        gamma: multiplies what a schedule gives.
        schedule: `linear`, `power:P`, `constant`, or the coefficients themselves, first layer to last.
        outside: what tensors outside the blocks get (`Rules.outside`).
        layers: a regular expression that overrules the detection of depth (`find_depth`).
        stacks: a stack by its name, or any part of it that names no other: `keep` (coefficient 1), `base` (0), or ends
            of its own.
        filter: part of a tensor's name -> coefficient; the first that matches has the last word.
    """

    alpha: Finite = 0.1
    beta: Finite = Field(default_factory=lambda given: 1 - given["alpha"])
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
        return self

    @model_serializer(mode="wrap")
    def _without_what_does_not_apply(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        unsaid = {"alpha", "beta"} if isinstance(self.schedule, tuple) else set()
        unsaid |= {key for key in ("stacks", "filter") if not values[key]}
        return {key: value for key, value in values.items() if key not in unsaid}

    @property
    def needs_depth(self) -> bool:
        """Whether it matters where a tensor stands at all."""
        return bool(self.stacks) or self.outside != "alpha" or not self._schedule(self.alpha, self.beta).flat

    def rules(self, depth: DepthMap) -> Rules:
        """What decides every coefficient, for the stacks of a model.

        Raises:
            RecipeError: `stacks` names a stack that is not there, or several at once.
        """
        stacks: dict[str, Schedule | float] = {}
        for part, value in self.stacks.items():
            name = depth.select(part)
            if name in stacks:
                raise RecipeError(f"stack {part!r} is {name!r}, which is named already", hint="Name each stack once.")
            stacks[name] = self._schedule(value.alpha, value.beta) if isinstance(value, Ends) else _FIXED[value]
        filters = tuple(
            (part, _FIXED[value] if isinstance(value, str) else value) for part, value in self.filter.items()
        )
        return Rules(self._schedule(self.alpha, self.beta), self.gamma, self.outside, stacks, filters)

    def _schedule(self, alpha: float, beta: float) -> Schedule:
        if isinstance(self.schedule, tuple):
            return Listed(self.schedule)
        if self.schedule == "constant":
            return Constant(alpha, beta)
        if self.schedule.startswith("power:"):
            return Power(alpha, beta, float(self.schedule.removeprefix("power:")))
        return Linear(alpha, beta)


class Source(_Part):
    """One entry of `models:`."""

    model: str


class Recipe(_Part):
    """One result: the inputs, the scaling, and how disagreements between the inputs are settled.

    Attributes:
        base_model: the pre-trained checkpoint: a path or a Hub id, `org/name[@revision]`.
        models: the fine-tune.
        lines: the scaling over depth.
        dtype: what every float tensor is written as; None keeps the fine-tune's own, tensor by tensor.
        missing: a tensor that one side lacks is an `error`; taken if it is the fine-tune's (`ft`); a `copy` of
            whichever side has it; or left out (`skip`).
        resize: token embeddings and heads with differing numbers of rows are an `error`, or take the rows of the
            fine-tune (`ft`) or the `base`.
        allow_nonfinite: let NaN and Inf through.
        max_shard_size: bytes of tensors per file of the output folder.
    """

    merge_method: Literal["task_arithmetic"] = "task_arithmetic"
    base_model: str
    models: tuple[Source]
    lines: Scaling = Scaling()
    dtype: DtypeName | None = None
    missing: Literal["error", "ft", "copy", "skip"] = "error"
    resize: Literal["error", "ft", "base"] = "error"
    allow_nonfinite: bool = False
    max_shard_size: Size = parse_size("5GB")

    @property
    def fine_tune(self) -> str:
        return self.models[0].model


def make_recipe(values: dict[str, Any], *, where: str) -> Recipe:
    """Check plain values and freeze them.

    Args:
        values: the recipe as YAML has it.
        where: what a message should call their origin.

    Raises:
        RecipeError: an unknown key or an impossible value.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        # Of the two readings of a stack, fixed or with ends, only the one that was meant is worth a complaint.
        relevant = [details for details in error.errors() if not str(details["loc"][-1]).startswith("literal[")]
        problems = [_problem(dict(details)) for details in relevant]
        raise RecipeError(f"{where}: " + "; ".join(problem for problem in problems if problem)) from error


def _problem(details: dict[str, Any]) -> str | None:
    """What one of pydantic's complaints means to whoever wrote the recipe; None if another one says it already."""
    key = ".".join(str(part) for part in details["loc"] if part != "Ends")
    match details["type"]:
        case "default_factory_not_called":  # beta has no default because alpha is wrong
            return None
        case "missing":
            return f"{key} is missing"
        case "extra_forbidden":
            known = [*Recipe.model_fields, *(f"lines.{name}" for name in Scaling.model_fields)]
            near = get_close_matches(key, known, n=1, cutoff=0.5)
            return f"{key} is not a key of a recipe" + (f"; did you mean {near[0]}?" if near else "")
        case _:
            got = "" if isinstance(details["input"], dict) else f" (got {details['input']!r})"
            return f"{key}: {details['msg'].removeprefix('Value error, ')}{got}"


def edit_recipe(base: str, ft: str, **options: Any) -> Recipe:
    """The recipe of `lines edit BASE FT` with the given options, each named as on the command line.

    Args:
        base, ft: the two checkpoints: a path or a Hub id.
        options: the fields of `Scaling` and of `Recipe`. One that is None keeps its default.

    Raises:
        RecipeError: an unknown option or an impossible value.
    """
    given = {key: value for key, value in options.items() if value is not None}
    scaling = {key: given.pop(key) for key in Scaling.model_fields if key in given}
    return make_recipe({"base_model": base, "models": [{"model": ft}], "lines": scaling, **given}, where="recipe")


class _Loader(yaml.SafeLoader):
    """Plain YAML in which no key stands twice, since one of the two would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict, as usual."""
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str):
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key!r} stands twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


def load_recipe(path: Path) -> Recipe:
    """Read a recipe from YAML. Relative paths in it count from the file's folder.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or says something impossible.
    """
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a recipe: expected keys such as base_model and models")
    recipe = make_recipe(values, where=str(path))
    models = tuple(source.model_copy(update={"model": _beside(path.parent, source.model)}) for source in recipe.models)
    return recipe.model_copy(update={"base_model": _beside(path.parent, recipe.base_model), "models": models})


def _beside(folder: Path, name: str) -> str:
    """A path that counts from `folder`, as seen from here; what can only be a Hub id, or an absolute path, as it is."""
    name = os.path.expanduser(name)
    beside = os.path.join(folder, name)
    if os.path.isabs(name) or os.path.lexists(beside) or name.count("/") != 1 or name.startswith("."):
        return beside
    if os.path.lexists(name):
        raise RecipeError(
            f"{name}: not beside the recipe in {folder}, but in the current folder",
            hint="Paths in a recipe count from its own folder: correct the path, or give it as an absolute one.",
        )
    return name


def dump_recipe(recipe: Recipe, *, base_model: str, fine_tune: str) -> str:
    """The recipe as YAML that gives the same result again.

    Args:
        recipe: what was run.
        base_model, fine_tune: the inputs as they are to be written: seen from where the file will stand, a Hub id
            with its commit.
    """
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["base_model"] = base_model
    values["models"] = [{"model": fine_tune}]
    text = yaml.safe_dump(values, sort_keys=False)
    return f"# Written by lines {__version__}. To run it again: lines edit --config lines_recipe.yaml -o OUT\n{text}"
