"""What was asked, as one frozen value, and what of it is impossible whatever the checkpoints hold.

The keys are mergekit's where mergekit has them; `lines:` adds the scaling over depth. One fine-tune on one base is
task arithmetic with one task vector, so that is what an edit's recipe says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from decimal import Decimal
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from lines_cli.errors import MismatchError, RecipeError, printable
from lines_cli.methods import CALIBRATIONS, Calibration, Chosen, Method, Said, Values, find_method
from lines_cli.methods.parameters import MOST_RULES, evaluate, filters_of
from lines_cli.scaling import depth_rules
from lines_cli.scaling.by_hand import member_of
from lines_cli.scaling.find_depth import DepthMap, Side, Stack
from lines_cli.scaling.schedule import (
    Constant,
    Linear,
    Listed,
    Outside,
    Power,
    Reversed,
    Rules,
    Schedule,
    Scored,
    Shaped,
    UpAndDown,
)
from lines_cli.storage.digest import FileRecord

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


def _is_series(value: Any) -> bool:
    return not isinstance(value, str) or "," in value


Size = Annotated[int, BeforeValidator(parse_size)]


def _no_flag(value: Any) -> Any:
    if isinstance(value, bool):  # YAML reads yes, no, on and off as these, and Python reads these as 1 and 0
        raise ValueError("expected a number")
    return value


Finite = Annotated[float, BeforeValidator(_no_flag), Field(allow_inf_nan=False)]
DtypeName = Literal["float64", "float32", "float16", "bfloat16", "fp8"]
Rounding = Literal["nearest", "stochastic"]
Calibrate = Literal["svc"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


Scores = Mapping[str, Mapping[str, depth_rules.Numbers]]
"""Depth rule -> matrix -> what was measured of it."""

Fixed = Literal["keep", "base"]
_FIXED = {"keep": 1.0, "base": 0.0}


_SCHEDULES: dict[str, Callable[[float, float], Schedule]] = {
    "linear": Linear,
    "constant": Constant,
    "reversed": Reversed,
    "unet": UpAndDown,
}


def parse_schedule(value: Any) -> Any:
    """`linear`, `constant`, `reversed`, `unet`, `power:2`; a depth rule, as in `sigmoid:10`; or a list of numbers, also
    as `0.1,0.6,1.0`.
    """
    if isinstance(value, str) and value in _SCHEDULES:
        return value
    if isinstance(value, str) and _A_RULE.fullmatch(value) and value.partition(":")[0] != "power":
        try:
            depth_rules.parse(value)
        except ValueError as error:
            name, names = value.partition(":")[0], (*_SCHEDULES, "power", *_rules())
            why = f"the schedule {name} takes no number" if name in _SCHEDULES else str(error)
            near = [] if name in names else get_close_matches(name.lower()[:_LONGEST_NAME], names, n=1, cutoff=0.6)
            mean = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"{why}; {mean}{_a_schedule()}") from error
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
    raise ValueError(_a_schedule())


_A_RULE = re.compile(r"(?!(?:nan|inf|infinity)$)[a-z][a-z0-9_-]*(?::.*)?", re.DOTALL | re.IGNORECASE)


_LONGEST_NAME = 100


def _rules() -> tuple[str, ...]:
    return (*depth_rules.RULES, *depth_rules.installed_names())


def _a_schedule() -> str:
    return (
        f"a schedule is linear, constant, reversed, unet, {', '.join(_rules())}, power:P with P above 0, or a list of "
        "coefficients, as in 0.1,0.6,1"
    )


def parse_series(value: Any) -> Any:
    """Every series as a tuple of names: of `A,B,C`, of a list of names, or of a list of either."""
    one_series = isinstance(value, (list, tuple)) and value and not any(map(_is_series, value))
    if one_series or isinstance(value, str):
        value = [value]
    if isinstance(value, (list, tuple)):
        value = [one.split(",") if isinstance(one, str) else one for one in value]
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, (list, tuple)) and one for one in value):
        raise ValueError("a series is a list of stacks' names, in the order in which they run; several are a list each")
    if not all(isinstance(name, str) for one in value for name in one):
        raise ValueError("a series names stacks")
    for name in (name for one in value for name in one):
        member_of(name)
    return tuple(tuple(name.strip() for name in one) for one in value)


def _parse_stack(value: Any) -> Any:
    if isinstance(value, (dict, Ends)) or (isinstance(value, str) and value in _FIXED):
        return value
    raise ValueError("a stack is keep, base, or its alpha and beta, as in --stack NAME=0.1,0.9")


def _finite(value: Any, expected: str) -> float:
    try:
        if math.isfinite(number := float(_no_flag(value))):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise ValueError(expected)


def _parse_filter(value: Any) -> Any:
    if isinstance(value, str) and value in _FIXED:
        return value
    return _finite(value, "a filter gives a number, keep or base")


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
    return _finite(value, "expected a finite number, or auto")


Schedules = Annotated[str | tuple[Finite, ...], BeforeValidator(parse_schedule)]
AllSeries = Annotated[tuple[tuple[str, ...], ...], BeforeValidator(parse_series), Field(max_length=MOST_RULES)]


class Scaling(_Part):
    """The `lines:` key: how the task vector is scaled over depth.

    Attributes:
        alpha, beta: the coefficient of the first layer, and what depth adds to it. `auto` is the paper's heuristic for
            many tasks, `(1/N) * norm1(sum of tau_i) / norm1(tau_merged)`, measured. Only a schedule that lists its
            coefficients needs no beta.
        gamma: multiplies what a schedule gives.
        schedule: `linear`, `power:P`, `constant`, `reversed`, `unet`, or a depth rule (`depth_rules`), which may be
            measured; or the coefficients themselves, from the first layer to the last.
        outside: what tensors outside the blocks get (`Rules.outside`).
        layers: a regular expression that overrules the detection of depth (`find_depth`).
        series: the names of stacks that run one after the other, a list of them for each stack that they make.
        not_layers: a regular expression; names in which it is found are outside the blocks.
        stacks: a stack by its name, or any part of it that names no other: `keep` (coefficient 1), `base` (0), or ends
            of its own.
        filter: part of a tensor's name -> coefficient; the first that matches has the last word.
    """

    alpha: Annotated[float | Auto, PlainValidator(_parse_alpha)] = "auto"
    beta: Finite | None = None
    gamma: Finite = 1.0
    schedule: Schedules = "linear"
    outside: Outside = "alpha"
    layers: str | None = None
    series: AllSeries = ()
    not_layers: str | None = None
    stacks: dict[str, Annotated[Fixed | Ends, BeforeValidator(_parse_stack)]] = Field(
        default_factory=dict, max_length=MOST_RULES
    )
    filter: dict[Annotated[str, AfterValidator(_named)], Annotated[Fixed | Finite, BeforeValidator(_parse_filter)]] = (
        Field(default_factory=dict, max_length=MOST_RULES)
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
        unsaid |= {key for key in ("stacks", "filter", "series", "not_layers") if not values.get(key)}
        return {key: value for key, value in values.items() if key not in unsaid}

    def with_own(self, own: ComponentRule) -> Scaling:
        """The same for one component, with what is said of that alone: an alpha brings the beta that belongs to it.

        Raises:
            ValueError: the two do not go together.
        """
        said = own.scaling
        if isinstance(said.get("schedule"), tuple):
            rest = self.model_dump(include=self.model_fields_set - {"alpha", "beta"})
        else:
            rest = self.model_dump(include=self.model_fields_set - said.keys())
            if isinstance(self.schedule, tuple) and {"alpha", "beta"} & said.keys():
                rest.pop("schedule", None)
        if "alpha" in said and "beta" not in said:
            said["beta"] = 1 - said["alpha"]
        return Scaling.model_validate(rest | said)

    @property
    def by_hand(self) -> dict[str, Any]:
        """What is said of depth, as `find_depth` takes it."""
        return {"layers": self.layers, "series": self.series, "not_layers": self.not_layers}

    @property
    def needs_alpha(self) -> bool:
        """Whether alpha has to be measured."""
        return self.alpha == "auto" and not isinstance(self.schedule, tuple)

    @property
    def needs_depth(self) -> bool:
        """Whether it matters where a tensor stands at all."""
        return bool(self.stacks) or self.outside != "alpha" or not self._schedule(0.0, self.beta or 0.0).flat

    @property
    def measured_rule(self) -> str | None:
        """The name of the depth rule that has to be measured; None where the schedule is none."""
        if isinstance(self.schedule, tuple) or self.schedule in _SCHEDULES or self.schedule.startswith("power:"):
            return None
        rule, name, _ = depth_rules.parse(self.schedule)
        return name if rule.measure is not None else None

    def rules(self, depth: DepthMap, *, alpha: float | None = None, scores: Scores | None = None) -> Rules:
        """What decides every coefficient, for the stacks of a model.

        Args:
            depth: the stacks.
            alpha: what `auto` was measured to be; where it was not, coefficients that rest on it are NaN.
            scores: what was measured for depth rules; where it was not, coefficients that rest on it are NaN.

        Raises:
            RecipeError: `stacks` names a stack that is not there, or several at once.
            MismatchError: what was measured makes no shares.
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
        if isinstance(schedule, Scored):
            for stack in depth.stacks:
                own = stacks.get(stack.name, schedule)
                if isinstance(own, Scored):
                    stacks[stack.name] = replace(own, shares=self._shares(stack, depth, scores))
        return Rules(schedule, self.gamma, self.outside, stacks, filters)

    def _schedule(self, alpha: float, beta: float) -> Schedule:
        if isinstance(self.schedule, tuple):
            return Listed(self.schedule)
        if self.schedule.startswith("power:"):
            return Power(alpha, beta, float(self.schedule.removeprefix("power:")))
        if self.schedule in _SCHEDULES:
            return _SCHEDULES[self.schedule](alpha, beta)
        rule, _, number = depth_rules.parse(self.schedule)
        return Scored(alpha, beta) if rule.share is None else Shaped(alpha, beta, rule.share, number)

    def _shares(self, stack: Stack, depth: DepthMap, scores: Scores | None) -> tuple[float, ...] | None:
        """The measured share of each of a stack's layers; None where it is not measured yet."""
        assert isinstance(self.schedule, str)
        rule, name, number = depth_rules.parse(self.schedule)
        measured = (scores or {}).get(name)
        if measured is None:
            return None
        places = {tensor: depth.places[tensor] for tensor in measured if tensor in depth.places}
        own = {tensor: place for tensor, place in places.items() if place.stack == stack.name}
        try:
            return depth_rules.shares_of(rule, number, measured, own, stack.layers)
        except Exception as error:  # whatever a stranger's rule does
            what = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            raise MismatchError(
                f"schedule: {self.schedule} gives the layers of {printable(stack.name)!r} no coefficients: {what}",
                hint="Look for NaN, Inf or very large weights in the inputs (lines inspect --check); or take another "
                "schedule.",
            ) from error


UNSCALED = Scaling(alpha=1.0, beta=0.0)
"""What the merged task vector is scaled by where the recipe has no `lines:`, lambda apart."""


class ComponentRule(_Part):
    """What is said of one component of a pipeline alone; what is not said is as for all.

    Attributes:
        alpha, beta, gamma, schedule, outside, layers, series, not_layers: as of `Scaling`.
        parameters: the method's, for its tensors; they go before those of the models.
    """

    alpha: Finite | None = None
    beta: Finite | None = None
    gamma: Finite | None = None
    schedule: Schedules | None = None
    outside: Outside | None = None
    layers: str | None = None
    series: AllSeries | None = None
    not_layers: str | None = None
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if value not in (None, {})}

    @property
    def scaling(self) -> dict[str, Any]:
        """What it says of the scaling."""
        said = ((key, getattr(self, key)) for key in self.model_fields_set - {"parameters"})
        return {key: value for key, value in said if value is not None}


Whole = Literal["edit", "keep", "base"]


def _parse_component(value: Any) -> Any:
    if isinstance(value, (dict, ComponentRule)) or (isinstance(value, str) and value in get_args(Whole)):
        return value
    raise ValueError("a component is edit, keep, base, or keys such as alpha and schedule")


ALL_OTHERS = "*"
"""Stands for the components of which nothing else is said."""

# Names of what turns images and sounds into latents and back, and of filters: half of one and half of another is none.
_NOT_SCALED = re.compile(
    r"(?:.*_)?(?:vae|vqvae|vqgan|movq|autoencoder)(?:_.*)?|safety_checker|watermarker|vocoder", re.DOTALL
)


def _a_name(name: str) -> str:
    if not name or "\0" in name:
        raise ValueError("expected a path or a Hub id")
    return name


InputName = Annotated[str, AfterValidator(_a_name)]


class Source(_Part):
    """One entry of `models:`.

    Attributes:
        model: a path or a Hub id.
        parameters: parameters of its method for this model; they go before those at the top.
    """

    model: InputName
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key == "model" or value}


def _parse_range(value: Any) -> Any:
    """`[FIRST, END]`: from one layer to before another."""
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(n) is int for n in value):
        first, end = value
        if 0 <= first < end <= MOST_LAYERS:
            return (first, end)
    raise ValueError("expected the first layer and the one behind the last, as in [0, 16]")


MOST_LAYERS = 10_000


class Part(Source):
    """Layers of a model, as a source of one of `slices:`.

    Attributes:
        model, parameters: as of `Source`.
        layer_range: from which layer on, and before which.
    """

    layer_range: Annotated[tuple[int, int], BeforeValidator(_parse_range)]


class Slice(_Part):
    """One entry of `slices:`: layers of the output, which stand behind those of the entries before.

    Attributes:
        sources: what is merged into them, as many layers of each.
        parameters: the method's, for these layers; they stand between those of the sources and those at the top.
    """

    sources: tuple[Part, ...] = Field(min_length=1, max_length=MOST_RULES)
    parameters: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _alike(self) -> Slice:
        lengths = {end - first for first, end in (source.layer_range for source in self.sources)}
        if len(lengths) > 1:
            raise ValueError(f"its sources have {' and '.join(map(str, sorted(lengths)))} layers, and not as many each")
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key == "sources" or value}

    @property
    def layers(self) -> int:
        first, end = self.sources[0].layer_range
        return end - first


UNION = "union"
"""The vocabulary with the tokens of all inputs."""


def _parse_token_source(value: Any) -> Any:
    """A model, or what mergekit writes for a token of one and for zeros."""
    if value is None or (isinstance(value, str) and value and "\0" not in value):
        return value
    if value == {"kind": "zero"}:
        return value
    if isinstance(value, dict) and value.get("kind") == "model_token" and isinstance(value.get("model"), str):
        of, number, token = (value.get(key) for key in ("model", "token_id", "token"))
        if of and "\0" not in of and not value.keys() - {"kind", "model", "token_id", "token"}:
            if type(number) is int and 0 <= number < 2**31 and token is None:
                return {"kind": "model_token", "model": of, "token_id": number}
            if isinstance(token, str) and number is None:
                return {"kind": "model_token", "model": of, "token": token}
    raise ValueError(
        "expected a model, {kind: zero}, or {kind: model_token, model: PATH, token: TEXT}, or token_id: NUMBER there"
    )


class TokenRule(_Part):
    """Where the row of one token comes from.

    Attributes:
        source: a model; `{kind: zero}`; `{kind: model_token, model, token}` or `token_id`; None says nothing of it.
        force: also in models that have the token themselves.
    """

    source: Annotated[Any, PlainValidator(_parse_token_source)] = None
    force: bool = False

    @model_validator(mode="after")
    def _of_something(self) -> TokenRule:
        if self.force and self.source is None:
            raise ValueError("force says that all models have the row of a source, and there is none")
        return self

    @property
    def says(self) -> bool:
        """Whether it says where the row comes from."""
        return self.source is not None

    @property
    def zero(self) -> bool:
        """Whether the row is one of zeros."""
        return isinstance(self.source, dict) and self.source["kind"] == "zero"

    @property
    def model(self) -> str | None:
        """The input that the row is of."""
        found = self.source.get("model") if isinstance(self.source, dict) else self.source
        return str(found) if found is not None else None

    @property
    def token_id(self) -> int | None:
        """Which row of it, by its number."""
        return self.source.get("token_id") if isinstance(self.source, dict) else None

    @property
    def token(self) -> str | None:
        """Of which of its tokens; None for the same."""
        return self.source.get("token") if isinstance(self.source, dict) else None


class Tokenizer(_Part):
    """The `tokenizer:` key, where it says more than whose.

    Attributes:
        source: as `tokenizer_source`.
        tokens: token -> where its row comes from; those that the tokenizer lacks are added to it.
        pad_to_multiple_of: of which number the rows of embeddings and heads are a multiple.
    """

    source: str = UNION
    tokens: dict[str, TokenRule] = Field(default_factory=dict, max_length=MOST_RULES)
    pad_to_multiple_of: Annotated[Annotated[int, Field(ge=1, le=2**16)] | None, BeforeValidator(_no_flag)] = None

    @model_serializer(mode="wrap")
    def _without_what_is_not_said(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in serialize(self).items() if key == "source" or value}


def _parse_record(value: Any) -> FileRecord:
    if isinstance(value, dict) and value.keys() == {"bytes", "digest"}:
        nbytes, digest = value["bytes"], value["digest"]
        if type(nbytes) is int and nbytes >= 0 and isinstance(digest, str):
            return FileRecord(nbytes, digest)
    raise ValueError("expected what lines writes of a file, {bytes: NUMBER, digest: TEXT}")


class RealisedLayer(_Part):
    """What an output's own recipe records of a layer (`lines_cli.plan.realised`)."""

    stack: str
    index: Annotated[int, Field(ge=0)]
    coefficient: Finite
    realised: Finite | None
    changed: Finite | None


def _parse_layers(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return value
    raise ValueError("that is what lines records of an output; did you mean lines.layers?")


Like = Literal["base", "ft"]
OF_ADAPTERS = ("as_adapter", "num_layers", "rank", "energy", "save_rest")
"""The keys of a recipe whose output is an adapter."""


def _parse_num_layers(value: Any) -> Any:
    """A number of layers; or for each stack, by its name, its own."""
    if isinstance(value, dict) and value and all(isinstance(name, str) and name for name in value):
        return {name: _count(number) for name, number in value.items()}
    return value if value is None else _count(value)


def _count(value: Any) -> int:
    text = str(_no_flag(value))
    if not text.isdecimal() or len(text) > 6 or int(text) == 0:
        raise ValueError("expected how many layers the base has, or that of each stack, as in encoder=12")
    return int(text)


def _parse_prefix(value: Any) -> Any:
    """A prefix ends at a dot, whether that is written or not; so do two, with a sign between them."""
    if value is not None and not isinstance(value, str):
        raise ValueError("expected what names begin with, as in vision_model.")
    parts = value.split("=") if value else []
    if len(parts) > 2 or (len(parts) == 2 and not all(parts)):
        raise ValueError("expected what names begin with, as in vision_model., or as in bert.=encoder.")
    return "=".join(f"{part.removesuffix('.')}." for part in parts) if parts else value


class Recipe(_Part):
    """One result: the inputs, the method, the scaling, and how disagreements between the inputs are settled.

    Attributes:
        merge_method: the name of a method (`lines_cli.methods.find_method`).
        base_model: the pre-trained checkpoint: a path or a Hub id, `org/name[@revision]`. Methods that take whole
            weights need it for `lines:` alone.
        models: the fine-tunes, in the order of every sum.
        slices: in their place, the output's layers: each slice has as many sources as there are `models`, which are
            called by the first slice's.
        parameters: the method's, for all models.
        calibrate: how what the method makes is calibrated before it is scaled (`lines_cli.methods.calibration`); None
            leaves it as it is.
        lines: the scaling over depth; without it the merged task vector is scaled by the method's own parameter alone.
        dtype: what every float tensor is written as; None keeps what the input has that the output is like; `fp8`
            stores those in 8 bits that an input stores so, as it does, and keeps the others.
        rounding: how a result is rounded to that: to the `nearest` number; or `stochastic`, up or down by a draw.
        rounding_seed: of the draw.
        tokenizer_source, chat_template: `base`, or one of the models; None takes the input that the output is like.
            `tokenizer_source` may be `union`: the tokens of all.
        tokenizer: says `tokenizer_source`, and more; then that is None.
        like: which input gives the output its names, dtypes, integer tensors, config and other files: the `base`
            (the first model where there is none), or the (first) fine-tune.
        prefix: what the names of one input begin with and those of another lack, ending at a dot; `a.=b.` where those
            of the other begin with `b.` instead; empty for none.
            Unless given, it is found.
        missing: a tensor that some inputs lack is an `error`; taken as it is if a fine-tune has it (`ft`); a `copy` of
            whichever has it, the base before the models; or left out (`skip`).
        missing_in_blocks: how many of these lie inside blocks; any other number than there are is an error.
        resize: token embeddings and heads with differing numbers of rows are an `error`, or take the rows of the
            (first) fine-tune (`ft`) or the `base`.
        variant: of a folder with several sets of weights the one of this name, as `fp16` in `model.fp16.safetensors`;
            inputs that do not have it are read as without.
        components: of inputs that hold several models what becomes of each, by its name; `*` stands for all others.
            `edit` it; or take it as the (first) fine-tune has it (`keep`) or as the `base` has it; or what is said of
            it alone (`rule_of`).
        allow_nonfinite: let NaN and Inf through.
        as_adapter: the output is an adapter (PEFT's LoRA) in place of a whole model: one adapter scaled, several merged
            with their ranks side by side, or of one whole fine-tune the nearest one. Adapters need no base then.
        num_layers: how many layers the base has, where it is not named; or of each stack, by its name.
        rank: the rank that each module of such an output has at most.
        energy: in its place, the share of a module's squared update that its rank keeps at least.
        save_rest: of a whole fine-tune also what is no matrix is stored, whole.
        max_shard_size: bytes of tensors per file of the output folder.
        output: the destination, unless the command line names another.
        run, inputs, files, card, layers: of an output's own recipe: which run it was, what it read, what it wrote into
            each of its files and into the model card, and what rounding left of each layer's coefficient. They play no
            part in the result.
        notes: what a person should know of how the recipe was read.
    """

    merge_method: str = "task_arithmetic"
    base_model: InputName | None = None
    models: tuple[Source, ...] = Field(min_length=1, max_length=MOST_RULES)
    slices: tuple[Slice, ...] = Field(default=(), max_length=MOST_RULES)
    parameters: dict[str, Any] = Field(default_factory=dict)
    calibrate: Calibrate | None = None
    lines: Scaling | None = None
    dtype: DtypeName | None = None
    rounding: Rounding = "nearest"
    rounding_seed: Annotated[Annotated[int, Field(ge=0, le=2**53)], BeforeValidator(_no_flag)] = 0
    tokenizer_source: str | None = None
    tokenizer: Tokenizer | None = None
    chat_template: str | None = None
    like: Like = "base"
    prefix: Annotated[str | None, BeforeValidator(_parse_prefix)] = None
    missing: Literal["error", "ft", "copy", "skip"] = "error"
    missing_in_blocks: Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_no_flag)] = None
    resize: Literal["error", "ft", "base"] = "error"
    variant: Annotated[str, Field(pattern=r"^[\w-]+$")] | None = None
    components: dict[
        Annotated[str, AfterValidator(_named)], Annotated[Whole | ComponentRule, BeforeValidator(_parse_component)]
    ] = Field(default_factory=dict, max_length=MOST_RULES)
    allow_nonfinite: bool = False
    as_adapter: bool = False
    num_layers: Annotated[int | dict[str, int] | None, PlainValidator(_parse_num_layers)] = None
    rank: Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_flag)] = None
    energy: Annotated[Annotated[float, Field(gt=0, le=1)] | None, BeforeValidator(_no_flag)] = None
    save_rest: bool = False
    max_shard_size: Size = parse_size("5GB")
    output: InputName | None = Field(default=None, exclude=True)
    run: str | None = Field(default=None, exclude=True)
    inputs: dict[str, Any] = Field(default_factory=dict, exclude=True)
    files: dict[str, Annotated[FileRecord, PlainValidator(_parse_record)]] = Field(default_factory=dict, exclude=True)
    card: Annotated[FileRecord | None, PlainValidator(_parse_record)] = Field(default=None, exclude=True)
    layers: Annotated[tuple[RealisedLayer, ...], BeforeValidator(_parse_layers)] = Field(default=(), exclude=True)
    notes: tuple[str, ...] = Field(default=(), exclude=True)

    @field_validator("rounding_seed")
    @classmethod
    def _of_a_draw(cls, seed: int, said: ValidationInfo) -> int:
        if seed and said.data.get("rounding") == "nearest":
            raise ValueError("rounding to nearest draws nothing; leave the seed out, or set rounding: stochastic")
        return seed

    @model_serializer(mode="wrap")
    def _without_what_says_nothing(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values: dict[str, Any] = serialize(self)
        unsaid = {"rounding", "rounding_seed"} if self.rounding == "nearest" else set()
        unsaid |= {key for key in (*OF_ADAPTERS, "calibrate", "components", "slices") if not values.get(key)}
        unsaid |= {"models"} if self.slices else set()
        return {key: value for key, value in values.items() if key not in unsaid}

    @property
    def method(self) -> Method:
        """What its method says about itself."""
        return find_method(self.merge_method).with_base(self.base_model)

    @property
    def calibration(self) -> Calibration | None:
        """What its calibration says about itself, if there is one."""
        return None if self.calibrate is None else CALIBRATIONS[self.calibrate]

    def plain_sum(self, values: Values) -> bool:
        """Whether with a tensor's values the merged task vector is the sum of all, to the bit."""
        return self.calibrate is None and self.method.plain_sum(values)

    @property
    def merged(self) -> tuple[Source, ...]:
        """The models whose tensors are merged, in the order in which the method takes them."""
        base = self.base_model or ""
        return tuple(Source(model=base) if number is None else self.models[number] for number in self.chosen)

    @property
    def chosen(self) -> Chosen:
        """The numbers of these; None is the base, where it is not listed."""
        names = [source.model for source in self.models]
        return self.method.chosen(names, self.base_model, subtracted=self.changes_difference)

    @property
    def stacked(self) -> tuple[tuple[Part, ...], ...]:
        """With `slices`, for each of `merged` what its layers are."""
        return tuple(self._parts_of(number) for number in self.chosen)

    @property
    def stacked_base(self) -> tuple[Part, ...]:
        """With `slices`, what the base's layers are: its own as it is listed, else the same as those of the others."""
        listed = next((n for n, source in enumerate(self.models) if source.model == self.base_model), None)
        return self._parts_of(listed)

    def _parts_of(self, number: int | None) -> tuple[Part, ...]:
        if number is not None:
            return tuple(one.sources[number] for one in self.slices)
        base = self.base_model or ""
        return tuple(Part(model=base, layer_range=one.sources[0].layer_range) for one in self.slices)

    @property
    def names(self) -> tuple[str, ...]:
        """Every model that is named as an input, the base apart, each once."""
        parts = (source.model for one in self.slices for source in one.sources)
        return tuple(dict.fromkeys((*(source.model for source in self.models), *parts)))

    @property
    def vocabulary_source(self) -> str | None:
        """Whose tokens the output has, if that is said: `base`, a model, or `union`."""
        return self.tokenizer.source if self.tokenizer is not None else self.tokenizer_source

    @property
    def subtracts_base(self) -> bool:
        """Whether task vectors are taken: differences to the base."""
        return self.method.takes == "task vectors" or self.changes_difference

    @property
    def changes_difference(self) -> bool:
        """Whether what the method makes is changed as a difference to the base: scaled over depth, or calibrated."""
        return self.lines is not None or self.calibrate is not None

    def rule_of(self, component: str) -> Whole | ComponentRule | None:
        """What becomes of a component. Of which nothing is said, is edited; but for codecs and filters, None: these are
        taken as the input has them that the output is like.
        """
        rule = self.components.get(component, self.components.get(ALL_OTHERS))
        if rule is not None:
            return rule
        return None if _NOT_SCALED.fullmatch(component) else "edit"

    def scaling_of(self, component: str | None) -> Scaling | None:
        """The scaling of a component, or of all where it is None or has none of its own."""
        rule = self.rule_of(component) if component is not None else None
        if self.lines is None or not isinstance(rule, ComponentRule) or not rule.scaling:
            return self.lines
        return self.lines.with_own(rule)

    def rules(self, depth: DepthMap, *, alpha: float | None = None, scores: Scores | None = None) -> Rules:
        """What decides every coefficient (`Scaling.rules`); without `lines:` it is 1, the method's own scale apart."""
        rules = (self.lines or UNSCALED).rules(depth, alpha=alpha, scores=scores)
        named = dict.fromkeys(region.component for region in depth.regions)
        own = {name: scaling for name in named if (scaling := self.scaling_of(name)) not in (None, self.lines)}
        if not own:
            return rules
        components = {name: s.rules(depth, alpha=alpha, scores=scores) for name, s in own.items() if s}
        return replace(rules, components=components)

    @property
    def measured_rules(self) -> frozenset[str]:
        """The depth rules that have to be measured, by name."""
        own = [self.scaling_of(name) for name in self.components if name != ALL_OTHERS]
        every = [self.lines, self.scaling_of(ALL_OTHERS) if ALL_OTHERS in self.components else None, *own]
        return frozenset(name for scaling in every if scaling and (name := scaling.measured_rule))

    def values(
        self, name: str, position: float, component: str | None = None, *, outside: Side | None = None
    ) -> Values:
        """The method's parameters for one tensor.

        Args:
            name: the tensor's.
            position: of its layer in its stack, from 0 to 1; 0 outside the blocks.
            component: the model that it belongs to, where there are several.
            outside: on which side of the blocks it stands, if it is in none: before them the first slice's hold,
                behind them the last's.

        Returns:
            For each parameter a tuple with a value for each of `merged`, or one value.
        """
        values: dict[str, Any] = {}
        rule = self.rule_of(component) if component is not None else None
        own = (rule.parameters,) if isinstance(rule, ComponentRule) else ()
        models = [source.parameters for source in self.merged]
        top: tuple[dict[str, Any], ...] = (self.parameters,)
        if self.slices:
            number, position = self._in_slices(position, outside)
            models = [parts[number].parameters for parts in self.stacked]
            top = (self.slices[number].parameters, self.parameters)
        for key, parameter in self.method.parameters.items():
            if parameter.per_model:
                values[key] = tuple(
                    _first_said((*own, said, *top), key, name, position, parameter.default) for said in models
                )
            else:
                values[key] = _first_said((*own, *top), key, name, position, parameter.default)
        return values

    def _in_slices(self, position: float, outside: Side | None) -> tuple[int, float]:
        """In which slice a layer is, and where in it, from 0 to 1."""
        layers = [one.layers for one in self.slices]
        if len(layers) == 1:
            return 0, position
        if outside is not None:
            return (0 if outside == "before" else len(layers) - 1), 0.0
        index = round(position * (sum(layers) - 1))
        for number, held in enumerate(layers):
            if index < held:
                return number, index / (held - 1) if held > 1 else 1.0
            index -= held
        raise AssertionError("a layer behind the last")

    def settings(self, key: str) -> Iterator[Any]:
        """What is said of a parameter, wherever it is said."""
        rules = [rule.parameters for rule in self.components.values() if isinstance(rule, ComponentRule)]
        models = [source.parameters for source in self.merged]
        slices = [said for one in self.slices for said in (*(s.parameters for s in one.sources), one.parameters)]
        for said in (*models, *slices, *rules, self.parameters):
            if key in said:
                yield said[key]

    @property
    def scale(self) -> Any:
        """What is said, of all models, of the parameter that multiplies what is merged; None if nothing is."""
        return self.parameters.get(self.method.scale) if self.method.scale is not None else None

    @property
    def scale_varies_by_name(self) -> bool:
        """Whether that parameter has filters."""
        settings = self.settings(self.method.scale) if self.method.scale is not None else ()
        return any(isinstance(setting, list) and isinstance(setting[0], dict) for setting in settings)

    @property
    def said(self) -> Said:
        """What it says of the method's parameters, for the method to review."""
        known = self.method.parameters
        settings = {key: tuple(self.settings(key)) for key in known}
        return Said(known, self.parameters, settings, self.values("", 0.0), len(self.merged))

    @property
    def parameters_vary(self) -> bool:
        """Whether any parameter is a gradient over depth, or may be another in another slice."""
        return len(self.slices) > 1 or any(
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
