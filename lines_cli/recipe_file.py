"""Recipes as YAML files: read with the line of every key, and written so that they give the same result again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lines_cli import __version__
from lines_cli.checkpoint.digest import FileRecord
from lines_cli.errors import RecipeError
from lines_cli.recipe import Recipe
from lines_cli.recipe_check import Place, dotted, make_recipe


class _Loader(yaml.SafeLoader):
    """Plain YAML in which every key is text (`on`, too, which YAML 1.1 reads as true), and none stands twice, since one
    of the two would be lost without a word.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A dict, as usual."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE_KEY:
                key.tag = _TEXT
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_TEXT, _MERGE_KEY = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_MOST_VALUES = 100_000


def load_recipe(path: Path, sets: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML. Relative paths in it count from the file's folder.

    Args:
        path: the file.
        sets: what overrules it, each as `lines.beta=0.4`; a number picks from a list, as in
            `models.0.parameters.weight=0.3`. Values are YAML; paths among them count from the file's folder, too.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or says something impossible.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = _own(yaml.load(text, Loader=_Loader))  # noqa: S506 - a SafeLoader
        at = dict(_lines(yaml.compose(text, Loader=_Loader), (), set()))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except _NO_YAML as error:
        what = str(error).replace('in "<unicode string>", ', "")
        raise RecipeError(f"{path}: not valid YAML: {what}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a recipe: expected keys such as base_model and models")
    for text in sets:
        _set(values, text, at)
    return make_recipe(_with_paths(path.parent, values), where=str(path), at=at)


_NO_YAML = (yaml.YAMLError, ValueError, RecursionError)


def recipe_from(values: Mapping[str, Any], sets: Iterable[str] = ()) -> Recipe:
    """A recipe from plain values, as YAML would have them. Relative paths among them count from the current folder.

    Args:
        values: the recipe; it is not changed.
        sets: what overrules it (`load_recipe`).

    Raises:
        RecipeError: it says something impossible.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"recipe: expected a path, a mapping or a Recipe, not {type(values).__name__}")
    own: dict[Any, Any] = _plain(values)
    at: dict[Place, str] = {}
    for text in sets:
        _set(own, text, at)
    return make_recipe(_with_paths(Path(), own), where="recipe", at=at)


def _plain(value: Any) -> Any:
    """A copy of what Python calls by more names than YAML does."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def set_texts(sets: Iterable[str] | Mapping[str, Any]) -> list[str]:
    """What overrules a recipe, as `--set` takes it."""
    if isinstance(sets, Mapping):
        return [f"{key}={yaml.safe_dump(_plain(value), default_flow_style=True)}" for key, value in sets.items()]
    return [sets] if isinstance(sets, str) else list(sets)


def _own(value: Any, budget: list[int] | None = None) -> Any:
    """A copy in which nothing is shared, as anchors and aliases would have it; a small file cannot make it large."""
    budget = [_MOST_VALUES] if budget is None else budget
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"more than {_MOST_VALUES:,} values")
    if isinstance(value, dict):
        return {key: _own(inner, budget) for key, inner in value.items()}
    return [_own(inner, budget) for inner in value] if isinstance(value, list) else value


def _lines(node: yaml.Node | None, place: Place, seen: set[int]) -> Iterable[tuple[Place, str]]:
    """Every key's line, from 1, by its place; what an alias repeats is left out."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, str(key.value))
            yield here, f"line {key.start_mark.line + 1}"
            yield from _lines(value, here, seen)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*place, number), f"line {item.start_mark.line + 1}"
            yield from _lines(item, (*place, number), seen)


def _set(values: dict[Any, Any], text: str, at: dict[Place, str]) -> None:
    """Overrule one value, making the mappings on the way to it."""
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {text}: expected --set KEY=VALUE, as in --set lines.beta=0.4")
    try:
        value = _own(yaml.load(raw, Loader=_Loader))  # noqa: S506 - a SafeLoader
    except _NO_YAML as error:
        raise RecipeError(f"--set {text[:200]}: the value is not valid YAML: {error}") from error
    inside: Any = values
    place: Place = ()
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        step: Any = part
        if isinstance(inside, list):
            if not part.isdecimal() or int(part) >= len(inside):
                there_are = f"{dotted(place)} is a list of {len(inside)}, numbered from 0"
                raise RecipeError(f"--set {text}: {there_are}, and {part!r} is none of them")
            step = int(part)
        elif not last and inside.get(part) is None:
            inside[part] = {}
        place = (*place, step)
        if last:
            inside[step] = value
        elif isinstance(inside[step], (dict, list)):
            inside = inside[step]
        else:
            raise RecipeError(f"--set {text}: {dotted(place)} is {inside[step]!r}, which holds no {parts[number]!r}")
    for known in [known for known in at if known[: len(place)] == place]:
        del at[known]
    at[place] = f"--set {text}"


def _with_paths(folder: Path, values: dict[Any, Any]) -> dict[Any, Any]:
    """The values with their paths as they are seen from here; one input goes by one name."""
    names: list[str] = []

    def resolved(name: Any) -> Any:
        if not isinstance(name, str) or not name or "\0" in name:
            return name  # which will be refused
        path = _beside(folder, name)
        if "+" in name and not os.path.lexists(path):
            raise RecipeError(
                f"{name}: no such file or folder; if a LoRA adapter is meant, it is not folded in here",
                hint="Fold it into its base first (peft: merge_and_unload, save_pretrained), and give that folder.",
            )
        for known in names:
            if os.path.exists(path) and os.path.exists(known) and os.path.samefile(path, known):
                return known
        names.append(path)
        return path

    def of_models(sources: Any) -> None:
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict) and "model" in source:
                source["model"] = resolved(source["model"])

    def one_of_them(holder: Any, key: str) -> None:
        name = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(name, str) and name != "base" and name and "\0" not in name:
            known = list(names)
            path = resolved(name)
            holder[key] = path if path in known else name

    if "base_model" in values:
        values["base_model"] = resolved(values["base_model"])
    of_models(values.get("models"))
    slices = values.get("slices")
    for one in slices if isinstance(slices, list) else ():
        of_models(one.get("sources") if isinstance(one, dict) else None)
    for holder, key in ((values, "tokenizer_source"), (values, "chat_template"), (values.get("tokenizer"), "source")):
        one_of_them(holder, key)
    if isinstance(values.get("output"), str) and values["output"]:
        values["output"] = os.path.join(folder, os.path.expanduser(values["output"]))
    return values


def _beside(folder: Path, name: str) -> str:
    """A path that counts from `folder`, as seen from here; what can only be a Hub id, or an absolute path, as it is."""
    name = os.path.expanduser(name)
    beside = os.path.join(folder, name)
    if os.path.isabs(name) or os.path.lexists(beside) or name.count("/") != 1 or name.startswith("."):
        # What is a path stays one: `conf/base` would be looked for on the Hub.
        return beside if os.path.isabs(beside) or beside.startswith(".") else os.path.join(".", beside)
    if os.path.lexists(name):
        raise RecipeError(
            f"{name}: not beside the recipe in {folder}, but in the current folder",
            hint="Paths in a recipe count from its own folder: correct the path, or give it as an absolute one.",
        )
    return name


_BASE_ITSELF = (("tokenizer_source", "base"), ("chat_template", "base"))


def dump_recipe(recipe: Recipe, *, named: Mapping[str, str], alpha: float | None = None, why: str = "") -> str:
    """The recipe as YAML that gives the same result again, with everything in it that was decided.

    Args:
        recipe: what was run.
        named: each input as it is to be written: seen from where the file will stand, a Hub id with its commit.
        alpha: what `auto` was measured to be; it takes its place.
        why: how it was measured, for a comment.
    """
    values = recipe.model_dump(mode="json", exclude_none=True, exclude={"notes", "output"})
    for key in ("base_model", "tokenizer_source", "chat_template"):
        if key in values and (key, values[key]) not in _BASE_ITSELF:
            values[key] = named.get(values[key], values[key])
    for source in values["models"]:
        source["model"] = named.get(source["model"], source["model"])
    if not values["parameters"]:
        del values["parameters"]
    measured = ""
    if alpha is not None and recipe.lines is not None and recipe.lines.needs_alpha:
        values["lines"]["alpha"] = alpha
        measured = f"# lines.alpha was auto: {why}\n"
    text = yaml.safe_dump(values, sort_keys=False, width=1_000)
    again = "lines merge --config lines_recipe.yaml -o OUT"
    return f"# Written by lines {__version__}. To run it again: {again}\n{measured}{text}"


def dump_record(run: str, inputs: Mapping[str, Mapping[str, Any]], files: Mapping[str, FileRecord]) -> str:
    """The recipe's `run`, `inputs` and `files` as YAML, to stand behind a dumped recipe."""
    written = {name: {"bytes": files[name].nbytes, "digest": files[name].digest} for name in sorted(files)}
    values = {"run": run, "inputs": {name: dict(told) for name, told in inputs.items()}, "files": written}
    text = yaml.safe_dump(values, sort_keys=False, width=1_000)
    return f"# What was read, and written beside this file. It plays no part when the recipe is run again.\n{text}"
