"""Plain values in, a recipe out; or every problem in them, with its line, its key, and the nearest known key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from lines_cli.errors import RecipeError
from lines_cli.methods import METHODS, Method, find_method
from lines_cli.methods.parameters import evaluate
from lines_cli.methods.said import Conflict, Note, Settled
from lines_cli.recipe.plain_yaml import Place
from lines_cli.recipe.schema import OF_ADAPTERS, UNION, ComponentRule, DtypeName, Recipe, Scaling, parse_schedule
from lines_cli.recipe.trajectory import KEYS as OF_A_PATTERN
from lines_cli.recipe.trajectory import Expanded


def make_recipe(
    values: Mapping[Any, Any],
    *,
    where: str,
    at: Mapping[Place, str] | None = None,
    constants: Collection[str] = (),
    expanded: Expanded | None = None,
) -> Recipe:
    """Check plain values and freeze them.

    Args:
        values: the recipe as YAML has it.
        where: what a message should call their origin.
        at: for every key, where it was said: `line 7`, or the `--set` that said it.
        constants: keys at the top that hold anchors, and so may stand for nothing themselves.
        expanded: what became of patterns among the models.

    Raises:
        RecipeError: an unknown key or an impossible value.
    """
    problems: list[Problem] = []
    notes = list(expanded.notes if expanded else ())
    values = _without_idle_keys(values, constants, notes)
    own, said_at = _in_our_keys(values, problems, notes, expanded.numbers if expanded else ())
    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate({**own, "notes": notes})
    except ValidationError as error:
        problems += _problems(error, said_at)
    if recipe is not None and not problems:
        recipe = _with_parameters(recipe, problems, said_at)
    if recipe is None or problems:
        problems = list(dict.fromkeys(problems))  # what is wrong with a pattern is wrong with all that it matches
        listed = [_at(place, at or {}) + what for place, what in problems[:_MOST_PROBLEMS]]
        more = f"; and {len(problems) - len(listed):,} more" if len(problems) > len(listed) else ""
        raise RecipeError(f"{where}: {'; '.join(listed)}{more}")
    return recipe


_MOST_PROBLEMS = 50

Problem = tuple[Place, str]
SaidAt = Callable[[Place], Place]
"""For a place in our own keys, the place that the recipe's writer knows."""


def _at(place: Place, at: Mapping[Place, str]) -> str:
    """`line 7: ` for a key of a file: its own line, or that of what should hold it."""
    while place and place not in at:
        place = place[:-1]
    return f"{at[place]}: " if place else ""


def _problems(error: ValidationError, said_at: SaidAt) -> list[Problem]:
    """What pydantic's complaints mean to whoever wrote the recipe."""
    found: list[Problem] = []
    everything = error.errors(include_url=False)
    if len(everything) > _MOST_PROBLEMS:  # each takes a while to explain
        found.append(((), f"{len(everything):,} of its keys and values are wrong; the first are"))
        everything = everything[:_MOST_PROBLEMS]
    for details in everything:
        place = said_at(tuple(part for part in details["loc"] if part not in ("Ends", "ComponentRule")))
        key, given, kind = dotted(place), details["input"], details["type"]
        # Of the two readings of a stack, fixed or with ends, only the one that was meant is worth a complaint; beta has
        # no default where alpha is wrong; and there are too few models where one is wrong.
        if str(details["loc"][-1]).startswith("literal[") or kind == "default_factory_not_called":
            continue
        if kind == "too_short" and any(other["loc"][:1] == ("models",) for other in everything if other != details):
            continue
        if kind == "extra_forbidden":
            found.append((place, f"{key} is not a key of a recipe{_nearest(place)}"))
        elif kind == "missing":
            found.append((place, f"{key} is missing"))
        else:
            got = "there is no value" if given is None else f"got {given!r}"
            shown = "" if isinstance(given, (dict, list)) else f" ({got})"
            found.append((place, f"{key}: {_expected(kind, place, details['msg'])}{shown}"))
    return found


def _expected(kind: str, place: Place, message: str) -> str:
    last = place[-1] if place else ""
    if kind == "too_short":
        return "none is named"
    if kind in ("tuple_type", "list_type"):
        return "expected a list, as in `- model: PATH`"
    if kind in ("model_type", "model_attributes_type", "dict_type"):
        like = "expected `- model: PATH`" if isinstance(last, int) else "expected keys and values"
        return "expected keys such as alpha and beta" if last == "lines" else like
    if kind == "string_type":
        return "expected a path or a Hub id" if last == "model" else "expected text"
    if kind == "float_parsing":
        return "expected a number"
    return message.removeprefix("Value error, ").replace("Input should be", "expected")


def dotted(place: Place) -> str:
    """`models.0.parameters.weight`."""
    return ".".join(map(str, place))


_NOT_FOR_PEOPLE = {"notes", "run", "inputs", "files", "card", "layers"}
_TOP = (*(key for key in Recipe.model_fields if key not in _NOT_FOR_PEOPLE), "out_dtype", "tokenizer", "slices")
_PARAMETERS = {name for method in METHODS.values() for name in method.parameters} - Scaling.model_fields.keys()


_LONGEST_WORD = 100


def _nearest(place: Place) -> str:
    """Which known key may have been meant, and where it stands."""
    *above, last = (part for part in place if not isinstance(part, int))
    word, inside_lines = str(last), above[:1] == ["lines"]
    if len(word) > _LONGEST_WORD:
        return ""
    if word in _PARAMETERS:
        return f"; a method's {word} stands under parameters"
    if word in Scaling.model_fields and not inside_lines:
        return f"; did you mean lines.{word}?"
    own: Iterable[str] = _TOP
    if inside_lines:
        own = Scaling.model_fields
    elif above[:1] == ["components"]:
        own = ComponentRule.model_fields
    elif above:
        own = ("model", "parameters", *OF_A_PATTERN)
    near = get_close_matches(word, own, n=1, cutoff=0.5 if inside_lines else 0.6)
    if near:
        return f"; did you mean {'lines.' if inside_lines else ''}{near[0]}?"
    return _nearest_elsewhere(word)


def _nearest_elsewhere(word: str) -> str:
    """Which key of another place may have been meant: one that is a letter or two off."""
    places = {key: key for key in _TOP} | {key: f"parameters.{key}" for key in sorted(_PARAMETERS)}
    places |= {key: f"lines.{key}" for key in Scaling.model_fields}
    near = get_close_matches(word, places, n=1, cutoff=0.7)
    return f"; did you mean {places[near[0]]}?" if near else ""


def _in_our_keys(
    values: Mapping[Any, Any], problems: list[Problem], notes: list[str], numbers: Sequence[int]
) -> tuple[dict[Any, Any], SaidAt]:
    """The recipe in our own keys: what mergekit says otherwise is said in ours, what it lets be empty is left out.
    `numbers` are those of the models as they were said (`Expanded`).
    """
    own = {key: value for key, value in values.items() if value is not None or key not in _MAY_BE_EMPTY}
    if "notes" in own:
        problems.append((("notes",), f"notes is not a key of a recipe{_nearest(('notes',))}"))
        del own["notes"]
    moved: dict[Place, Place] = {("models", now): ("models", before) for now, before in enumerate(numbers)}
    if "out_dtype" in own:
        if own.get("dtype", "float32") not in get_args(DtypeName):
            problems.append((("dtype",), f"dtype: expected {' or '.join(get_args(DtypeName))} (got {own['dtype']!r})"))
        own["dtype"] = own.pop("out_dtype")
        moved["dtype",] = ("out_dtype",)
    if "tokenizer" in own:
        tokenizer = own.pop("tokenizer")
        if isinstance(tokenizer, dict):  # mergekit lets them be empty
            tokenizer = {k: v for k, v in tokenizer.items() if v is not None or k not in _MAY_BE_EMPTY_OF_TOKENIZER}
        if "tokenizer_source" in own:
            problems.append((("tokenizer",), "tokenizer and tokenizer_source say the same thing: leave one out"))
        elif isinstance(tokenizer, dict) and tokenizer.keys() == {"source"}:
            own["tokenizer_source"] = tokenizer["source"]
            moved["tokenizer_source",] = ("tokenizer", "source")
        else:
            own["tokenizer"] = tokenizer
    if own.get("chat_template") == "auto":
        del own["chat_template"]
        notes.append("chat_template: auto takes that of the tokenizer, as without it")
    if "slices" in own:
        _take_slices(own, moved, problems, notes)
    elif isinstance(own.get("models"), list):
        for number, source in enumerate(own["models"]):
            if isinstance(source, dict) and "layer_range" in source:
                what = "layer_range belongs to the sources of slices; models are merged whole"
                problems.append((("models", number, "layer_range"), f"models.{number}.{what}"))
    if isinstance(own.get("models"), list):
        for number, source in enumerate(own["models"]):
            place = moved.get(("models", number), ("models", number))
            for key in [key for key in OF_A_PATTERN if isinstance(source, dict) and key in source]:
                what = f"{key} belongs to a pattern such as run/checkpoint-*, and {source.get('model')!r} is none"
                problems.append(((*place, key), f"{dotted(place)}.{what}"))
        own["models"] = [
            {
                key: value
                for key, value in source.items()
                if key not in OF_A_PATTERN and (key != "parameters" or value is not None)
            }
            if isinstance(source, dict)
            else source
            for source in own["models"]
        ]

    def said_at(place: Place) -> Place:
        for length in range(len(place), 0, -1):
            if place[:length] in moved:
                return (*moved[place[:length]], *place[length:])
        return place

    return own, said_at


_MAY_BE_EMPTY_OF_TOKENIZER = frozenset({"tokens", "pad_to_multiple_of"})
_MAY_BE_EMPTY = frozenset(
    "base_model dtype out_dtype tokenizer_source tokenizer chat_template parameters slices models output".split()
)


_IDLE = frozenset(
    """
    name allow_crimes async_write clone_tensors copy_tokenizer cuda gguf lazy_unpickle lora_merge_cache low_cpu_memory
    multi_gpu num_threads out_shard_size quiet random_seed read_to_gpu safe_serialization transformers_cache
    trust_remote_code verbosity write_model_card
    """.split()
)
"""mergekit's options, which people keep in its files, and a result's name."""


def _without_idle_keys(values: Mapping[Any, Any], constants: Collection[str], notes: list[str]) -> dict[Any, Any]:
    """The recipe without keys at the top that say nothing here: mergekit's options, and holders of anchors."""
    own = dict(values)
    for key in values:
        holds_anchors = key in constants and key not in {*_TOP, *_NOT_FOR_PEOPLE} and not _nearest((key,))
        if key in _IDLE or holds_anchors:
            del own[key]
            what = (
                "holds what is said elsewhere by its anchor" if holds_anchors else "is accepted, and does nothing here"
            )
            notes.append(f"{key} {what}")
    return own


def _take_slices(own: dict[Any, Any], moved: dict[Place, Place], problems: list[Problem], notes: list[str]) -> None:
    """Read mergekit's `slices`, where it says no more than `models` does: slices that together hold all layers of the
    same models.
    """
    slices = own.pop("slices")
    one = slices[0] if isinstance(slices, list) and len(slices) == 1 else None
    place: Place = ("slices",)
    what, note = "", "slices: one slice of whole models, read as models"
    if isinstance(slices, list) and len(slices) > 1 and "models" not in own:
        try:
            one = _joined(slices)
            note = (
                f"slices: {len(slices)} slices that together hold whole models, read as models whose parameters differ "
                "by layer; outside the blocks those of the first slice hold"
            )
        except ValueError as error:
            what = f"slices: {error}"
    if what:
        pass
    elif "models" in own:
        what = "slices and models both list the models: leave one out"
    elif not isinstance(one, dict) or not isinstance(one.get("sources"), list):
        what = "slices: only one slice, of whole models, is supported; lines does not stack parts of models"
    elif unknown := sorted(map(str, one.keys() - {"sources", "parameters"})):
        place = ("slices", 0, unknown[0])
        what = f"{dotted(place)} is not supported; a slice has sources and parameters"
    elif not isinstance(one.get("parameters") or {}, dict):
        place = ("slices", 0, "parameters")
        what = f"{dotted(place)}: expected keys and values (got {one['parameters']!r})"
    if what or one is None:
        problems.append((place, what))
        own.setdefault("models", [{"model": "of a slice"}])
        return
    own["models"] = one["sources"]
    moved["models",] = ("slices", 0, "sources")
    top = own.get("parameters")
    for key, setting in (one.get("parameters") or {}).items():
        if isinstance(top, dict) and key in top:
            setting = _then(setting, top[key])  # noqa: PLW2901 - what the slice leaves open
        own["parameters"] = {**(own.get("parameters") or {}), key: setting}
        moved["parameters", key] = ("slices", 0, "parameters", key)
    notes.append(note)


def _joined(slices: list[Any]) -> dict[str, Any]:
    """Several slices as one, with a value of each parameter for each layer.

    Raises:
        ValueError: they are not all layers of the same models in order, or their parameters cannot be told by layer.
    """
    end, layers, models, sources = 0, list[int](), list[Any](), list[list[dict[str, Any]]]()
    for one in slices:
        said = one.get("sources") if isinstance(one, dict) else None
        if not isinstance(said, list) or not all(isinstance(source, dict) for source in said) or not said:
            raise ValueError("each has sources, as in `- sources: [{model: PATH, layer_range: [0, 8]}]`")
        if one.keys() - {"sources", "parameters"} or any(
            s.keys() - {"model", "layer_range", "parameters"} for s in said
        ):
            raise ValueError("a slice has sources and parameters; a source model, layer_range and parameters")
        ranges = [source.get("layer_range") for source in said]
        known = isinstance(ranges[0], list) and [type(n) for n in ranges[0]] == [int, int]
        named = {str(source.get("model")): source for source in said}
        models = models or list(named)
        whole = known and ranges.count(ranges[0]) == len(ranges) and ranges[0][0] == end < ranges[0][1]
        if not whole or named.keys() != set(models) or len(named) < len(said):
            raise ValueError(
                "only slices that follow each other from layer 0 on, each with the same layers of the same models, are "
                "understood; stacking parts of models is another tool's work"
            )
        layers.append(ranges[0][1] - end)
        end = ranges[0][1]
        sources.append([named[model] for model in models])
    by_model = [
        {"model": of_it[0]["model"], "layer_range": [0, end], "parameters": _by_layer(of_it, layers)}
        for of_it in zip(*sources, strict=True)
    ]
    return {"sources": by_model, "parameters": _by_layer(slices, layers)}


def _by_layer(parts: Iterable[Mapping[str, Any]], layers: list[int]) -> dict[str, Any]:
    """The parameters of parts that stand one behind the other, as those of the whole.

    Args:
        parts: each with its `parameters`.
        layers: how many layers each has.
    """
    said = [part.get("parameters") or {} for part in parts]
    if not all(isinstance(parameters, dict) for parameters in said):
        raise ValueError("parameters: expected keys and values")
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for parameters in said for key in parameters):
        if not all(key in parameters for parameters in said):
            raise ValueError(f"{key} is said of some slices, and not of all")
        conditions = [_then(parameters[key], []) for parameters in said]
        filters = [[part.get("filter") for part in condition] for condition in conditions]
        if filters.count(filters[0]) < len(filters):
            raise ValueError(f"{key} has other filters in other slices")
        rules = []
        for number, name in enumerate(filters[0]):
            values = [condition[number].get("value") for condition in conditions]
            rules.append({"value": _layer_by_layer(key, values, layers), **({} if name is None else {"filter": name})})
        joined[key] = rules[0]["value"] if filters[0] == [None] else rules
    return joined


def _layer_by_layer(key: str, values: list[Any], layers: list[int]) -> Any:
    """One value for all layers where all are the same; else a number for each."""
    if not isinstance(values[0], list) and values.count(values[0]) == len(values):
        return values[0]
    each = []
    for value, number in zip(values, layers, strict=True):
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(one) in (int, float) for one in numbers):
            raise ValueError(f"{key} is no number, and not the same in all slices")
        each += [evaluate(numbers, "", index / (number - 1) if number > 1 else 1.0) for index in range(number)]
    return each


def _then(first: Any, second: Any) -> Any:
    """One setting that says what the first says, and where that says nothing what the second does."""
    conditions = [
        setting
        if isinstance(setting, list) and (not setting or any(isinstance(part, dict) for part in setting))
        else [{"value": setting}]
        for setting in (([part] if isinstance(part, dict) else part) for part in (first, second))
    ]
    return [*conditions[0], *conditions[1]]


# --- what pydantic cannot check: the method's own terms ---


def _with_parameters(recipe: Recipe, problems: list[Problem], said_at: SaidAt) -> Recipe | None:
    """The recipe with its parameters checked and frozen; problems are added to the list."""
    try:
        method = find_method(recipe.merge_method).with_base(recipe.base_model)
    except ValueError as error:
        problems.append((("merge_method",), f"merge_method: {error}"))
        return None
    notes = list(recipe.notes)

    def checked(said: dict[str, Any], place: Place, *, of_model: bool) -> dict[str, Any]:
        settings = {}
        for key, setting in said.items():
            here = said_at((*place, key))
            if setting is None:
                continue
            if key in method.ignored:
                notes.append(f"{key} is accepted, as in mergekit, and does nothing here")
            elif wrong := _misplaced(key, here, recipe.merge_method, method, of_model=of_model):
                problems.append((here, wrong))
            else:
                try:
                    settings[key] = method.parameters[key].check(setting)
                except ValueError as error:
                    problems.append((here, f"{dotted(here)}: {error}"))
        return settings

    top = checked(recipe.parameters, ("parameters",), of_model=False)
    models = tuple(
        source.model_copy(
            update={"parameters": checked(source.parameters, ("models", number, "parameters"), of_model=True)}
        )
        for number, source in enumerate(recipe.models)
    )
    names = {source.model for source in models} | {recipe.base_model}
    for key in ("tokenizer_source", "chat_template"):
        problems += _wrong_source((key,), getattr(recipe, key), names, said_at)
    if recipe.tokenizer is not None:
        problems += _wrong_source(("tokenizer", "source"), recipe.tokenizer.source, names, said_at)
        for token, rule in recipe.tokenizer.tokens.items():
            if rule.model is not None and rule.model not in names:
                what = f"tokenizer.tokens: {rule.model!r}, from which {token!r} is to come, is none of the models"
                problems.append((("tokenizer", "tokens"), what))
    components: dict[str, Any] = {}
    for name, of_it in recipe.components.items():
        components[name] = of_it
        if isinstance(of_it, ComponentRule):
            own = checked(of_it.parameters, ("components", name, "parameters"), of_model=False)
            components[name] = of_it.model_copy(update={"parameters": own})
    problems += _wrong_components(recipe, said_at)
    recipe = recipe.model_copy(update={"parameters": top, "models": models, "components": components})
    _check_models(recipe, problems)
    if not problems:
        settled = _check_values(recipe, problems, notes)
        recipe = recipe.model_copy(update={"parameters": {**top, **settled}})
    return recipe.model_copy(update={"notes": tuple(dict.fromkeys(notes))})


def _misplaced(key: str, here: Place, name: str, method: Method, *, of_model: bool) -> str | None:
    """Why a key cannot stand among a method's parameters, if it cannot."""
    known = method.parameters
    if key in known:
        if of_model and not known[key].per_model:
            return f"{dotted(here)} applies to all models, not to one: move it to the parameters at the top"
        return None
    elsewhere = [name for name, row in METHODS.items() if key in row.parameters]
    near = get_close_matches(key, known, n=1, cutoff=0.5)
    if key in _TOP:
        more = f"; {key} stands at the top, beside parameters"
    elif key in Scaling.model_fields:
        more = f"; did you mean lines.{key}?"
    elif elsewhere:
        more = f"; {', '.join(elsewhere)} {'has' if len(elsewhere) == 1 else 'have'} it"
    else:
        more = f"; did you mean {near[0]}?" if near else _nearest_elsewhere(key[:_LONGEST_WORD])
    return f"{dotted(here)} is not a parameter of {name}{more}"


def _wrong_source(place: Place, value: str | None, names: set[str | None], said_at: SaidAt) -> Iterator[Problem]:
    may_be = value in names or (value == UNION and place != ("chat_template",))
    if value is None or (value == "base" and None not in names) or (value != "base" and may_be):
        return
    key = dotted(place)
    if value == "base":
        what = f"{key}: base, but there is no base_model"
    else:
        or_union = "" if place == ("chat_template",) else ", nor union"
        what = f"{key}: {value!r} is neither base nor one of the models, from one of which it is taken{or_union}"
    yield said_at(place), what


def _wrong_components(recipe: Recipe, said_at: SaidAt) -> Iterator[Problem]:
    """What is said of components that cannot be."""
    for name, rule in recipe.components.items():
        place = said_at(("components", name))
        if rule == "base" and (recipe.base_model is None or not recipe.subtracts_base):
            yield place, f"{dotted(place)}: base, but no base is read"
        if isinstance(rule, ComponentRule) and rule.scaling:
            if recipe.lines is None:
                given = ", ".join(sorted(rule.scaling))
                yield place, f"{dotted(place)}: {given} say how to scale over depth; add lines: for all components"
                continue
            try:
                recipe.lines.with_own(rule)
            except ValidationError as error:
                said = "; ".join(one["msg"].removeprefix("Value error, ") for one in error.errors())
                yield place, f"{dotted(place)}: {said}"


def _check_models(recipe: Recipe, problems: list[Problem]) -> None:
    """Refuse a number of models that the method cannot take, and a base where none applies or where one is needed."""
    problems += _of_adapters(recipe)
    method, name = recipe.method, recipe.merge_method
    number, (least, most) = len(recipe.merged), method.models
    beside = " beside the base" if method.takes == "task vectors" else ""
    if number < least:
        problems.append((("models",), f"models: {name} needs {least}{beside}, and there {_are(number)}"))
    if most is not None and number > most:
        problems.append((("models",), f"models: {name} takes {most}{beside}, and there {_are(number)}"))
    if recipe.as_adapter:
        return
    if recipe.base_model is None and recipe.subtracts_base:
        why = f"{name} merges task vectors" if method.takes == "task vectors" else "lines: scales task vectors"
        what = f"base_model is missing: {why}, the differences to a base; add base_model: PATH"
        what += (
            " (adapters of PEFT, with their configs, can be merged into an adapter without one: as_adapter: true, or "
        )
        what += "--as-adapter)"
        problems.append((("base_model",), what))
    is_one_of_them = any(source.model == recipe.base_model for source in recipe.merged)
    if recipe.base_model is not None and not recipe.subtracts_base and not is_one_of_them:
        what = f"base_model: {name} has no use for a base without lines:"
        problems.append((("base_model",), f"{what}; leave it out, or list it under models"))
    if recipe.resize == "base" and recipe.base_model is None:
        problems.append((("resize",), "resize: base, but there is no base_model"))


def _of_adapters(recipe: Recipe) -> Iterator[Problem]:
    """What contradicts itself in what is said of an output that is an adapter, or is none."""
    if not recipe.as_adapter:
        for key in OF_ADAPTERS[1:]:
            if getattr(recipe, key):
                yield (key,), f"{key}: that is of an output that is an adapter; add as_adapter: true (--as-adapter)"
        return
    if recipe.rank is not None and recipe.energy is not None:
        yield ("energy",), "energy: rank and energy are two ways to say one thing; leave one out"
    if recipe.num_layers is not None and recipe.base_model is not None:
        yield ("num_layers",), "num_layers: the base says how many layers there are; leave one of the two out"
    for key, default in _NOT_OF_ADAPTERS.items():
        if getattr(recipe, key) != default:
            yield (key,), f"{key}: that is of whole models, and the output is an adapter; leave it out"
    if recipe.dtype == "fp8":
        yield ("dtype",), "dtype: an adapter is stored in float64, float32, float16 or bfloat16, not in fp8"


_NOT_OF_ADAPTERS: dict[str, Any] = {
    "rounding": "nearest",
    "missing": "error",
    "missing_in_blocks": None,
    "resize": "error",
    "tokenizer": None,
    "tokenizer_source": None,
    "chat_template": None,
    "components": {},
}


def _are(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"


def _check_values(recipe: Recipe, problems: list[Problem], notes: list[str]) -> dict[str, Any]:
    """Refuse values that contradict each other, and note what the method has to say of them; what follows from them
    for parameters that are left open.
    """
    method, said, settled = recipe.method, recipe.said, dict[str, Any]()
    for remark in method.review(said):
        if isinstance(remark, Conflict):
            place: Place = ("parameters",) if remark.key is None else ("parameters", remark.key)
            problems.append((place, f"{dotted(place)}: {remark.text}"))
        elif isinstance(remark, Note):
            notes.append(remark.text)
        elif isinstance(remark, Settled):
            settled[remark.key] = remark.value
    for key, parameter in method.parameters.items():
        if parameter.required and not said.settings[key]:
            problems.append((("parameters",), f"parameters.{key} is missing: {parameter.about}"))
    names = [source.model for source in recipe.merged]
    twice = sorted((name, times) for name, times in Counter(names).items() if times > 1)
    notes += [f"{name} is merged {times} times" for name, times in twice]
    if method.takes == "task vectors" and names == [recipe.base_model] and recipe.like == "base":
        notes.append("the only model is the base itself: its task vector is zero")
    if recipe.dtype == "fp8" and recipe.rounding != "nearest":
        text = "rounding: stochastic does not go with dtype: fp8, whose codes are rounded to nearest"
        problems.append((("rounding",), text))
    if recipe.dtype == "fp8" and recipe.as_adapter:
        problems.append((("dtype",), "dtype: fp8 is for whole models; the factors of an adapter are whole"))
    if recipe.dtype in ("bfloat16", "float16") and recipe.like == "base" and method.takes == "task vectors":
        notes.append(f"{recipe.dtype} is what the output is written in; the arithmetic is float32 all the same")
    return settled


def edit_recipe(base: str, ft: str, **options: Any) -> Recipe:
    """The recipe of `lines edit BASE FT` with the given options, each named as on the command line.

    Args:
        base, ft: the two checkpoints: a path or a Hub id.
        options: the fields of `Scaling` and of `Recipe`. One that is None keeps its default; alpha's is 0.1, beta's
            1 - alpha.

    Raises:
        RecipeError: an unknown option or an impossible value.
    """
    given, scaling = _split(options)
    recipe = {"base_model": base, "models": [{"model": ft}], "lines": _with_defaults(scaling), "like": "ft", **given}
    return make_recipe(recipe, where="recipe")


def edit_adapter_recipe(adapter: str, **options: Any) -> Recipe:
    """The recipe of `lines edit --adapter ADAPTER` with the given options, as `edit_recipe`; among them `base_model` or
    `num_layers`.
    """
    given, scaling = _split(options)
    for key in ("prefix", "max_shard_size"):
        if key in given:
            raise RecipeError(f"--{key.replace('_', '-')}: that is of whole models, and the output is an adapter")
    recipe = {"models": [{"model": adapter}], "as_adapter": True, "lines": _with_defaults(scaling), **given}
    return make_recipe(recipe, where="recipe")


def extract_recipe(base: str, ft: str, **options: Any) -> Recipe:
    """The recipe of `lines extract FT --base BASE` with the given options, as `edit_recipe`: scaled over depth only if
    an option says so.
    """
    given, scaling = _split(options)
    recipe = {"base_model": base, "models": [{"model": ft}], "as_adapter": True, **given}
    if scaling:
        recipe["lines"] = _with_defaults(scaling)
    return make_recipe(recipe, where="recipe")


def _split(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The options that are given, and those of them that are of the scaling."""
    given = {key: value for key, value in options.items() if value is not None}
    return given, {key: given.pop(key) for key in Scaling.model_fields if key in given}


def _with_defaults(scaling: dict[str, Any]) -> dict[str, Any]:
    """The scaling of an edit: alpha is 0.1 unless it is given, beta 1 - alpha."""
    if not _lists_coefficients(scaling.get("schedule")):
        alpha = scaling.setdefault("alpha", 0.1)
        if alpha != "auto":
            scaling.setdefault("beta", _rest(alpha))
    return scaling


def _lists_coefficients(schedule: Any) -> bool:
    try:
        return isinstance(parse_schedule(schedule), tuple)
    except ValueError:
        return False


def _rest(alpha: Any) -> float:
    try:
        return 1 - float(alpha)
    except (TypeError, ValueError, OverflowError):  # alpha will be refused
        return 0.0
