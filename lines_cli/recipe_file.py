"""Recipes as YAML files: read with the line of every key, and written so that they give the same result again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from lines_cli import __version__
from lines_cli.errors import RecipeError
from lines_cli.recipe import Recipe
from lines_cli.recipe_check import Place, dotted, make_recipe


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
        values = yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
        line = dict(_lines(yaml.compose(text, Loader=_Loader), ()))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a recipe: expected keys such as base_model and models")
    for text in sets:
        _set(values, text, line)
    return _beside_file(make_recipe(values, where=str(path), line=line), path.parent)


def _lines(node: yaml.Node | None, place: Place) -> Iterable[tuple[Place, int]]:
    """Every key's line, from 1, by its place."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*place, key.value)
            yield here, key.start_mark.line + 1
            yield from _lines(value, here)
    elif isinstance(node, yaml.SequenceNode):
        for number, item in enumerate(node.value):
            yield (*place, number), item.start_mark.line + 1
            yield from _lines(item, (*place, number))


def _set(values: dict[Any, Any], text: str, line: dict[Place, int]) -> None:
    """Overrule one value, making the mappings on the way to it; its line is no longer the file's."""
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise RecipeError(f"--set {text}: expected --set KEY=VALUE, as in --set lines.beta=0.4")
    try:
        value = yaml.load(raw, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"--set {text}: {raw!r} is not valid YAML: {error}") from error
    inside: Any = values
    place: Place = ()
    for at, part in enumerate(parts):
        last = at == len(parts) - 1
        if isinstance(inside, list):
            if not part.isdecimal() or int(part) >= len(inside):
                there_are = f"{dotted(place)} is a list of {len(inside)}, numbered from 0"
                raise RecipeError(f"--set {text}: {there_are}, and {part!r} is none of them")
            step: Any = int(part)
        elif isinstance(inside, dict):
            step = part
            if not last and not isinstance(inside.get(part), (dict, list)):
                inside[part] = {}
        else:
            raise RecipeError(f"--set {text}: {dotted(place)} is {inside!r}, which holds no {part!r}")
        place = (*place, step)
        if last:
            inside[step] = value
        else:
            inside = inside[step]
    for known in [known for known in line if known[: len(place)] == place]:
        del line[known]


def _beside_file(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with its paths as they are seen from here; one input goes by one name."""
    given: list[str] = []

    def resolved(name: str) -> str:
        path = _beside(folder, name)
        for known in given:
            if os.path.exists(path) and os.path.exists(known) and os.path.samefile(path, known):
                return known
        given.append(path)
        return path

    def named(name: str | None) -> str | None:
        return name if name is None or name == "base" else resolved(name)

    base = recipe.base_model if recipe.base_model is None else resolved(recipe.base_model)
    models = tuple(source.model_copy(update={"model": resolved(source.model)}) for source in recipe.models)
    output = recipe.output and os.path.join(folder, os.path.expanduser(recipe.output))
    of = {"tokenizer_source": named(recipe.tokenizer_source), "chat_template": named(recipe.chat_template)}
    return recipe.model_copy(update={"base_model": base, "models": models, "output": output, **of})


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
