"""Plain values in, a recipe out; or every problem in them, with its line, its key, and the nearest known key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import (
    ValidationError,
)

from lines_cli.errors import RecipeError
from lines_cli.methods import METHODS
from lines_cli.parameters import values_of
from lines_cli.recipe import Recipe, Scaling, parse_schedule

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
    """Read mergekit's `slices`, where it says no more than `models` does: one slice with the whole of every model."""
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
        return isinstance(parse_schedule(schedule), tuple)
    except ValueError:
        return False


def _rest(alpha: Any) -> float:
    try:
        return 1 - float(alpha)
    except (TypeError, ValueError, OverflowError):  # alpha will be refused
        return 0.0
