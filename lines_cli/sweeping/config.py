"""A sweep, as its YAML says it: the recipe, what is tried, what judges it."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from lines_cli.api.calls import read_recipe
from lines_cli.errors import RecipeError, printable
from lines_cli.recipe.plain_yaml import LARGEST, YamlError, read_yaml
from lines_cli.recipe.schema import Recipe
from lines_cli.recipe.yaml_file import dump_recipe, recipe_from
from lines_cli.storage.files import read_small
from lines_cli.sweeping.expression import Expression, parse

Control = Literal["constant", "reversed"]
CONTROLS: tuple[Control, ...] = get_args(Control)
Sampler = Literal["tpe", "cmaes", "nsga2"]

_KEYS = (
    "recipe", "grid", "evaluate", "objective", "minimize", "controls", "repeats", "timeout", "tasks", "search", "model",
)  # fmt: skip
_SEARCH_KEYS = ("sampler", "trials", "seed")
_RANGE_KEYS = {"low", "high", "step", "log", "points"}
_LONGEST_COMMAND = 20_000  # characters


@dataclass(frozen=True, slots=True)
class Range:
    """Numbers from `low` to `high` that a search draws from; in steps of `step`, or evenly in their logarithms; of a
    list schedule as many as it has `points`.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    points: int | None = None


@dataclass(frozen=True, slots=True)
class Objective:
    """What is to be as large as can be, or as small."""

    expression: Expression
    minimize: bool

    def better(self, one: float, other: float) -> bool:
        """Whether one value beats another."""
        return one < other if self.minimize else one > other


@dataclass(frozen=True, slots=True)
class Search:
    """How values are drawn, in place of a grid's every combination."""

    sampler: Sampler
    trials: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Space:
    """What candidates are made of.

    Attributes:
        where: what messages call the place that says so.
        recipe: what every candidate is made by, values of the grid apart.
        of_an_edit: whether it was said as a base and a fine-tune; then beta is 1 - alpha unless it is said.
        grid: dotted keys of the recipe -> values to try, a range to draw from, or arithmetic over other keys.
    """

    where: str
    recipe: Recipe
    of_an_edit: bool
    grid: Mapping[str, tuple[Any, ...] | Range | Expression]

    def recipe_of(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe of a candidate.

        Args:
            settings: dotted keys -> values.

        Raises:
            RecipeError: they make an impossible one.
        """
        texts = [f"{key}={_one_line(value)}" for key, value in settings.items()]
        listed = isinstance(settings.get("lines.schedule"), (list, tuple))
        recipe = recipe_from(_without_ends(self._values) if listed else self._values, texts)
        if recipe.as_adapter:
            raise RecipeError(
                "as_adapter: candidates are whole models, so what is evaluated would not be what is kept",
                hint="Leave it out of the sweep, and make the adapter with the winner's numbers: "
                "lines edit --adapter, or lines merge --as-adapter.",
            )
        return recipe

    @cached_property
    def _values(self) -> dict[str, Any]:
        named = {name: name for name in (self.recipe.base_model, *(s.model for s in self.recipe.models)) if name}
        found: dict[str, Any] = read_yaml(dump_recipe(self.recipe, named=named))[0]
        return found


def _one_line(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=math.inf)
    return text.removesuffix("...\n").strip()


@dataclass(frozen=True, kw_only=True)
class Sweep(Space):
    """What a sweep does.

    Attributes:
        evaluate: a command with places to fill in, or `module:function`.
        objectives: at least one; several in a search with nsga2 only.
        controls: families that get as many trials as LiNeS.
        repeats: how often each candidate is evaluated, with another seed each time.
        timeout: seconds that one evaluation may take; None for no limit.
        tasks: what `{task}` stands for -> the model of the recipe that was trained on it.
        search: how values are drawn; None where all combinations are tried.
        model: `module:function` that makes the torch module, for an evaluation in this process.
    """

    evaluate: str
    objectives: tuple[Objective, ...]
    controls: tuple[Control, ...]
    repeats: int
    timeout: float | None
    tasks: Mapping[str, str]
    search: Search | None
    model: str | None

    @property
    def in_process(self) -> bool:
        """Whether `evaluate` names a Python function."""
        return CALLABLE.fullmatch(self.evaluate) is not None

    @property
    def by_task(self) -> bool:
        """Whether candidates are evaluated task by task."""
        return bool(self.tasks)

    @property
    def baselines(self) -> tuple[str, ...]:
        """Which of `pre` and `ft` the objectives ask for."""
        names = [name for objective in self.objectives for name in objective.expression.names]
        parts = {part for name in names for part in name.split(".")}
        return tuple(which for which in ("pre", "ft") if any(part.endswith(f"_{which}") for part in parts))


CALLABLE = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Za-z_]\w*:[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*")


def _without_ends(values: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe whose schedule may list its coefficients: alpha and beta are then not said."""
    scaling = {key: value for key, value in (values.get("lines") or {}).items() if key not in ("alpha", "beta")}
    return {**values, "lines": scaling}


def load_sweep(path: Path) -> Sweep:
    """Read a sweep from YAML. Relative paths in it count from its folder.

    Raises:
        RecipeError: it cannot be read, or says something impossible.
    """
    try:
        text = read_small(path, LARGEST).decode("utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not text in UTF-8") from error
    try:
        values, _ = read_yaml(text)
    except YamlError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    return sweep_from(values, path)


def sweep_from(values: Any, path: Path) -> Sweep:
    """A sweep from plain values.

    Args:
        values: as YAML has them.
        path: the file that they are from; relative paths count from its folder.

    Raises:
        RecipeError: they say something impossible.
    """
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a sweep: expected keys such as recipe, grid, evaluate and objective")
    _refuse_unknown(values, _KEYS, str(path))
    for key in ("recipe", "grid", "evaluate"):
        if values.get(key) is None:
            raise RecipeError(f"{path}: {key} is missing")
    recipe, of_an_edit = _recipe(values["recipe"], path)
    search = _search(values.get("search"), path)
    grid = _grid(values["grid"], path, search)
    objectives = _objectives(values, path, search)
    evaluate = values["evaluate"]
    if not isinstance(evaluate, str) or not evaluate.strip() or len(evaluate) > _LONGEST_COMMAND:
        raise RecipeError(
            f"{path}: evaluate: expected a command, as in python eval.py {{checkpoint}}; or module:function"
        )
    evaluate = evaluate.strip()
    in_process = CALLABLE.fullmatch(evaluate) is not None
    if not in_process and "{checkpoint}" not in evaluate:
        raise RecipeError(
            f"{path}: evaluate has no {{checkpoint}}, so it could not see what it judges: {printable(evaluate)}",
            hint="Write {checkpoint} where the command takes the candidate's folder. So can {task}, {seed} and {id}.",
        )
    model = values.get("model")
    if model is not None and (not isinstance(model, str) or not CALLABLE.fullmatch(model)):
        raise RecipeError(f"{path}: model: expected module:function, which makes the torch module")
    if model is not None and not in_process:
        raise RecipeError(
            f"{path}: model: says how a module is made for evaluate: module:function, and evaluate is a command"
        )
    tasks = _tasks(values.get("tasks"), recipe, path)
    if "{task}" in evaluate and not tasks:
        tasks = _tasks_of(recipe)
    return Sweep(
        where=str(path),
        recipe=recipe,
        of_an_edit=of_an_edit,
        grid=grid,
        evaluate=evaluate,
        objectives=objectives,
        controls=_controls(values.get("controls", list(CONTROLS)), path),
        repeats=_whole(values.get("repeats", 1), "repeats", path),
        timeout=_seconds(values.get("timeout"), path),
        tasks=tasks,
        search=search,
        model=model,
    )


def space_from(recipe: Any, grid: Mapping[str, Any]) -> Space:
    """What candidates are made of, from Python: a recipe, its path or its values, and a grid. Relative paths count from
    the current folder.

    Raises:
        RecipeError: they say something impossible.
    """
    where, of_an_edit = Path("candidates"), False
    if isinstance(recipe, Recipe):
        found = recipe
    elif isinstance(recipe, Path):
        found = read_recipe(recipe)
    else:
        found, of_an_edit = _recipe(dict(recipe) if isinstance(recipe, Mapping) else recipe, where)
    return Space(where=str(where), recipe=found, of_an_edit=of_an_edit, grid=_grid(dict(grid), where, None))


def _refuse_unknown(values: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in values:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise RecipeError(f"{where}: {printable(str(key))} is not a key of a sweep{hint}")


def _recipe(said: Any, path: Path) -> tuple[Recipe, bool]:
    """The recipe, and whether it is that of an edit, said by a base and a fine-tune."""
    if isinstance(said, str):
        return read_recipe(path.parent / os.path.expanduser(said)), False
    if isinstance(said, dict) and {"base", "ft"} <= said.keys():
        values = {key: value for key, value in said.items() if key not in ("base", "ft")}
        lines = values.pop("lines", None) or {}
        if not isinstance(lines, dict):
            raise RecipeError(f"{path}: recipe.lines: expected keys such as alpha and beta")
        if not isinstance(lines.get("schedule"), (list, tuple)):
            alpha = lines.get("alpha", 0.1)
            rest = 1 - alpha if isinstance(alpha, (int, float)) else 0.5
            lines = {"alpha": alpha, "beta": rest, **lines}
        values |= {"base_model": os.fspath(said["base"]), "models": [{"model": os.fspath(said["ft"])}], "lines": lines}
        return _beside(path, {"like": "ft", **values}), "beta" not in (said.get("lines") or {})
    if isinstance(said, dict):
        return _beside(path, said), False
    raise RecipeError(
        f"{path}: recipe: expected the path of a recipe, or {{base: BASE, ft: FT}} for an edit",
        hint="A recipe is what lines merge --config takes.",
    )


def _beside(path: Path, values: Mapping[str, Any]) -> Recipe:
    """A recipe that stands in the sweep's own file."""
    return recipe_from(values, folder=path.parent, where=f"{path}: recipe")


def _grid(said: Any, path: Path, search: Search | None) -> dict[str, tuple[Any, ...] | Range | Expression]:
    if not isinstance(said, dict) or not said:
        raise RecipeError(f"{path}: grid: expected keys of the recipe, as in {{lines.alpha: [1.0, 0.5, 0.1]}}")
    found: dict[str, tuple[Any, ...] | Range | Expression] = {}
    for key, values in said.items():
        where = f"{path}: grid.{key}"
        if isinstance(values, (list, tuple)):
            if not values:
                raise RecipeError(f"{where}: an empty list, so there is nothing to try")
            found[str(key)] = tuple(values)
        elif isinstance(values, str):
            found[str(key)] = parse(values, where=where)
        elif isinstance(values, dict) and values.keys() <= _RANGE_KEYS:
            found[str(key)] = _range(values, where)
            if search is None:
                raise RecipeError(f"{where}: a range is drawn from, and there is no search:", hint=_SEARCH_HINT)
        elif isinstance(values, (int, float)) and not isinstance(values, bool):
            found[str(key)] = (values,)
        else:
            raise RecipeError(
                f'{where}: expected a list of values, arithmetic as in "1 - alpha", or {{low: 0, high: 1}}'
            )
    for key, values in found.items():
        if _is_too_large(values):
            raise RecipeError(f"{path}: grid.{key}: a whole number larger than any float")
        if inner := next((other for other in found if other.startswith(f"{key}.")), None):
            raise RecipeError(
                f"{path}: grid.{printable(key)}: holds {printable(inner)}, which the grid sets as well",
                hint="Set each value by one key, the longer one.",
            )
    if all(isinstance(values, Expression) for values in found.values()):
        raise RecipeError(f"{path}: grid: nothing varies; give a list of values for some key")
    return found


def _is_too_large(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_is_too_large, value))
    return isinstance(value, int) and abs(value) >= 2**1023


_SEARCH_HINT = "Give a list of values; or search: {sampler: tpe, trials: 40}."


def _range(values: Mapping[str, Any], where: str) -> Range:
    low, high = (_number(values.get(key), f"{where}.{key}") for key in ("low", "high"))
    step = None if values.get("step") is None else _number(values["step"], f"{where}.step")
    points = values.get("points")
    if not low < high:
        raise RecipeError(f"{where}: low is {low:g}, and high {high:g}")
    if step is not None and not 0 < step <= high - low:
        raise RecipeError(f"{where}: step is {step:g}")
    if values.get("log", False) not in (True, False) or (values.get("log") and (low <= 0 or step is not None)):
        raise RecipeError(f"{where}: log: true needs a low above 0, and no step")
    if points is not None and (type(points) is not int or not 2 <= points <= 100):
        raise RecipeError(f"{where}: points: expected a whole number from 2 to 100")
    return Range(low, high, step, bool(values.get("log")), points)


def _number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise RecipeError(f"{where}: expected a number (got {value!r})")
    return float(value)


def _whole(value: Any, key: str, path: Path) -> int:
    if type(value) is not int or not 1 <= value <= 1_000_000:
        raise RecipeError(f"{path}: {key}: expected a whole number of 1 or more (got {value!r})")
    return value


_UNITS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def _seconds(value: Any, path: Path) -> float | None:
    if value is None:
        return None
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([a-z]*)", str(value))
    if isinstance(value, bool) or match is None or match[2] not in _UNITS or not float(match[1]):
        raise RecipeError(f"{path}: timeout: expected seconds, or as in 90s, 30m, 2h (got {value!r})")
    return float(match[1]) * _UNITS[match[2]]


def _objectives(values: Mapping[str, Any], path: Path, search: Search | None) -> tuple[Objective, ...]:
    found: list[Objective] = []
    for key in ("objective", "minimize"):
        said = values.get(key)
        every = said if isinstance(said, list) else [] if said is None else [said]
        found += [Objective(parse(one, where=f"{path}: {key}"), key == "minimize") for one in every]
    if not found:
        raise RecipeError(f"{path}: objective is missing: what is to be as large as can be (or minimize:)")
    if len(found) > 1 and (search is None or search.sampler != "nsga2"):
        raise RecipeError(
            f"{path}: {len(found)} objectives, and one can win",
            hint="Say one, as a sum for example; or search: {sampler: nsga2, trials: 40} for a front of several.",
        )
    return tuple(found)


def _controls(said: Any, path: Path) -> tuple[Control, ...]:
    if said in (False, None, []):
        return ()
    if said is True:
        return CONTROLS
    names = said if isinstance(said, list) else [said]
    for name in names:
        if name not in CONTROLS:
            raise RecipeError(f"{path}: controls: expected {' and '.join(CONTROLS)}, or false (got {name!r})")
    return tuple(control for control in CONTROLS if control in names)


def _search(said: Any, path: Path) -> Search | None:
    if said is None:
        return None
    if not isinstance(said, dict):
        raise RecipeError(f"{path}: search: expected {{sampler: tpe, trials: 40}}")
    for key in said:
        if key not in _SEARCH_KEYS:
            raise RecipeError(f"{path}: search.{printable(str(key))} is not a key; there is {', '.join(_SEARCH_KEYS)}")
    sampler = said.get("sampler", "tpe")
    if sampler not in get_args(Sampler):
        raise RecipeError(f"{path}: search.sampler: expected {', '.join(get_args(Sampler))} (got {sampler!r})")
    seed = said.get("seed", 0)
    if type(seed) is not int or not 0 <= seed < 2**32:
        raise RecipeError(f"{path}: search.seed: expected a whole number from 0 (got {seed!r})")
    return Search(sampler, _whole(said.get("trials"), "search.trials", path), seed)


def _tasks(said: Any, recipe: Recipe, path: Path) -> dict[str, str]:
    if said is None:
        return {}
    models = [source.model for source in recipe.merged]
    if isinstance(said, list) and len(said) == len(models) and all(isinstance(task, str) and task for task in said):
        found = dict(zip(said, models, strict=True))
        if len(found) == len(said):
            return found
    raise RecipeError(
        f"{path}: tasks: expected a list of {len(models)} different names, one for each model of the recipe, in order"
    )


def _tasks_of(recipe: Recipe) -> dict[str, str]:
    """Tasks that are called like the models, where no other names are said."""
    models = [source.model for source in recipe.merged]
    short = [os.path.basename(os.path.normpath(model)) for model in models]
    return dict(zip(short if len(set(short)) == len(short) else models, models, strict=True))
