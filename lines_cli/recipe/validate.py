"""Plain values in, a recipe out; or every problem in them, with its line, its key, and the nearest known key."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import ValidationError

from lines_cli.errors import RecipeError
from lines_cli.methods import METHODS, Method, find_method
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
        within = details["loc"]
        others = (other["loc"] for other in everything if other != details)
        if kind == "too_short" and any(other[: len(within)] == within for other in others):
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
_TOP = (*(key for key in Recipe.model_fields if key not in _NOT_FOR_PEOPLE), "out_dtype", "tokenizer")
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
    if above and word in OF_A_PATTERN:
        return f"; {word} belongs to a pattern under models, and here each checkpoint is named by itself"
    if above and word in _TOP:
        return f"; {word} stands at the top of the recipe"
    own: Iterable[str] = _TOP
    if inside_lines:
        own = Scaling.model_fields
    elif above[:1] == ["components"]:
        own = ComponentRule.model_fields
    elif above:
        own = ("model", "parameters", *(("layer_range",) if above[0] == "slices" else OF_A_PATTERN))
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
    """Read mergekit's `slices`: a single one without ranges as models; else put the sources of all slices in the order
    of the first's, by their models, where these are the same, and name the models after those of the first.
    """
    slices = own["slices"]
    if "models" in own:
        problems.append((("slices",), "slices and models both list the models: leave one out"))
        del own["slices"]
        return
    own["models"] = [{"model": "of a slice"}]
    if not isinstance(slices, list) or not slices:
        problems.append((("slices",), f"slices: expected a list, as in {_LIKE}"))
        del own["slices"]
        return
    for number, one in enumerate(slices):
        if not isinstance(one, dict) or not isinstance(one.get("sources"), list) or not one["sources"]:
            problems.append((("slices", number), f"slices.{number}: each has sources, as in {_LIKE}"))
        elif wrong := sorted(map(str, one.keys() - {"sources", "parameters"})):
            place: Place = ("slices", number, wrong[0])
            problems.append((place, f"{dotted(place)} is not supported; a slice has sources and parameters"))
    if any(place[:1] == ("slices",) for place, _ in problems):
        del own["slices"]
        return
    said = [_without_nothing(one) for one in slices]
    first = said[0]["sources"]
    if len(said) == 1 and not any(isinstance(source, dict) and "layer_range" in source for source in first):
        _as_models(own, said[0], moved)
        notes.append("slices: one slice of whole models, read as models")
        return
    names = [_model_of(source) for source in first]
    for number, one in enumerate(said):
        theirs = [_model_of(source) for source in one["sources"]]
        if len(theirs) != len(names) or len(set(theirs)) != len(theirs):
            place = ("slices", number, "sources")
            what = f"{len(theirs)} sources, and the first slice has {len(names)}"
            what = what if len(theirs) != len(names) else "one model is a source twice"
            problems.append((place, f"{dotted(place)}: {what}"))
            continue
        base, same = own.get("base_model"), set(theirs) == set(names)
        order = [theirs.index(name) for name in names] if same else list(range(len(theirs)))
        if not same and base in names and base in theirs:  # the base is what the others are merged into
            others = [at for at in order if theirs[at] != base]
            order = [theirs.index(base) if name == base else others.pop(0) for name in names]
        one["sources"] = [one["sources"][at] for at in order]
        for at, before in enumerate(order):
            moved["slices", number, "sources", at] = ("slices", number, "sources", before)
    own["slices"], own["models"] = said, [{"model": name.replace("\0", "") or "of a slice"} for name in names]
    moved["models",] = ("slices", 0, "sources")


_LIKE = "`- sources: [{model: PATH, layer_range: [0, 8]}]`"


def _without_nothing(one: Mapping[Any, Any]) -> dict[Any, Any]:
    """A slice without parameters that are there and empty."""

    def said(of: Any) -> Any:
        return {k: v for k, v in of.items() if k != "parameters" or v is not None} if isinstance(of, dict) else of

    own: dict[Any, Any] = said(one)
    return {**own, "sources": [said(source) for source in own["sources"]]}


def _model_of(source: Any) -> str:
    return str(source.get("model") if isinstance(source, dict) else source)


def _as_models(own: dict[Any, Any], one: Mapping[Any, Any], moved: dict[Place, Place]) -> None:
    """Read a slice of whole models as models."""
    del own["slices"]
    own["models"] = one["sources"]
    moved["models",] = ("slices", 0, "sources")
    top = own.get("parameters")
    parameters = one.get("parameters", {})
    if not isinstance(parameters, dict):
        own["parameters"] = parameters
        moved["parameters",] = ("slices", 0, "parameters")
        return
    for key, setting in parameters.items():
        if isinstance(top, dict) and key in top:
            setting = _then(setting, top[key])  # noqa: PLW2901 - what the slice leaves open
        own["parameters"] = {**(own.get("parameters") or {}), key: setting}
        moved["parameters", key] = ("slices", 0, "parameters", key)


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
    slices = tuple(
        one.model_copy(
            update={
                "parameters": checked(one.parameters, ("slices", number, "parameters"), of_model=False),
                "sources": tuple(
                    source.model_copy(
                        update={
                            "parameters": checked(
                                source.parameters, ("slices", number, "sources", at, "parameters"), of_model=True
                            )
                        }
                    )
                    for at, source in enumerate(one.sources)
                ),
            }
        )
        for number, one in enumerate(recipe.slices)
    )
    names = {*recipe.names, recipe.base_model}
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
    recipe = recipe.model_copy(update={"parameters": top, "models": models, "slices": slices, "components": components})
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
    problems += _of_slices(recipe)
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
        which = "lines: scales" if recipe.lines is not None else "calibrate: changes"
        why = f"{name} merges task vectors" if method.takes == "task vectors" else f"{which} task vectors"
        what = f"base_model is missing: {why}, the differences to a base; add base_model: PATH"
        what += (
            " (adapters are merged into an adapter without one, by linear methods: as_adapter: true, or --as-adapter)"
        )
        problems.append((("base_model",), what))
    is_one_of_them = recipe.base_model in (*recipe.names, *(source.model for source in recipe.merged))
    if recipe.base_model is not None and not recipe.subtracts_base and not is_one_of_them:
        what = f"base_model: {name} has no use for a base without lines: or calibrate:"
        problems.append((("base_model",), f"{what}; leave it out, or list it under models"))
    if recipe.resize == "base" and recipe.base_model is None:
        problems.append((("resize",), "resize: base, but there is no base_model"))


def _of_slices(recipe: Recipe) -> Iterator[Problem]:
    """What of slices leaves open which layers are meant, or contradicts what else is said."""
    if not recipe.slices:
        return
    if recipe.as_adapter:
        yield ("as_adapter",), "as_adapter: slices stack layers of whole models; leave one of the two out"
    if recipe.components:
        yield ("components",), "components: slices stack layers of one model; leave one of the two out"
    if recipe.vocabulary_source == UNION or recipe.tokenizer is not None:
        yield ("tokenizer_source",), "tokenizer_source: with slices, one of the models has the tokenizer, not a union"
    if recipe.lines is not None and recipe.lines.layers is not None:
        yield ("lines", "layers"), "lines.layers: with slices, layers are those that are found without an expression"
    base = recipe.base_model
    needed = recipe.subtracts_base or any(number is None for number in recipe.chosen)
    if base is None or not needed or all(base in {s.model for s in one.sources} for one in recipe.slices):
        return
    for number, one in enumerate(recipe.slices):
        if len({source.layer_range for source in one.sources}) > 1 or base in {s.model for s in one.sources}:
            place: Place = ("slices", number, "sources")
            yield (
                place,
                f"{dotted(place)}: which layers of the base ({base}) are meant is not plain; list it in every slice",
            )


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
    "calibrate": None,
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
