"""Recipes as YAML files: read with the line of every key, and written so that they give the same result again."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from lines_cli import __version__
from lines_cli.checkpoint.digest import FileRecord
from lines_cli.checkpoint.positional import read_small
from lines_cli.errors import RecipeError
from lines_cli.plain_yaml import LARGEST, Place, YamlError, read_yaml
from lines_cli.recipe import Recipe
from lines_cli.recipe_check import dotted, make_recipe


def load_recipe(path: Path, sets: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML. Relative paths in it count from the file's folder.

    Args:
        path: the file.
        sets: what overrules it, each as `lines.beta=0.4`; a number picks from a list, as in
            `models.0.parameters.weight=0.3`. Values are YAML; paths among them count from the file's folder, too.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or says something impossible.
    """
    values, at = _read(path)
    for text in sets:
        _set(values, text, at)
    return make_recipe(_with_paths(path.parent, values, look=True), where=str(path), at=at)


def load_record(path: Path) -> Recipe:
    """Read the recipe that stands in an output's folder. It may be a stranger's: that the paths in it lead anywhere is
    not looked at.

    Raises:
        RecipeError: as `load_recipe`.
    """
    values, at = _read(path)
    return make_recipe(_with_paths(path.parent, values, look=False), where=str(path), at=at)


def _read(path: Path) -> tuple[dict[str, Any], dict[Place, str]]:
    """The values in a recipe's file, and where each stands."""
    try:
        raw = read_small(path, LARGEST)
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror or error}") from error
    try:
        values, at = read_yaml(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"line {line}: it is not UTF-8 text (byte {raw[error.start]:#04x})"
        raise RecipeError(f"{path}: not valid YAML: {what}", hint="Save it as UTF-8.") from error
    except YamlError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a recipe: expected keys such as base_model and models")
    return values, at


def _set(values: dict[Any, Any], text: str, at: dict[Place, str]) -> None:
    """Overrule one value, making the mappings on the way to it."""
    key, equals, raw = text.partition("=")
    parts = key.split(".")
    if not equals or not all(parts) or len(parts) > _MOST_PARTS:
        raise RecipeError(f"--set {text}: expected --set KEY=VALUE, as in --set lines.beta=0.4")
    try:
        value, _ = read_yaml(raw)
    except YamlError as error:
        raise RecipeError(f"--set {text[:200]}: the value is not valid YAML: {error}") from error
    inside: Any = values
    place: Place = ()
    for number, part in enumerate(parts, 1):
        last = number == len(parts)
        step: Any = part
        if isinstance(inside, list):
            if not part.isdecimal() or len(part) > 9 or int(part) >= len(inside):
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


_MOST_PARTS = 32


def _with_paths(folder: Path, values: dict[Any, Any], *, look: bool) -> dict[Any, Any]:
    """The values with their paths as they are seen from here; one input goes by one name.

    Args:
        folder: what they count from.
        values: the recipe's.
        look: whether to look at what is there. Else a name is a path or a Hub id by how it is written.
    """
    names: set[str] = set()
    files: dict[tuple[int, int], str] = {}

    def resolved(name: Any) -> Any:
        if not isinstance(name, str) or not name or "\0" in name:
            return name  # which will be refused
        path = _beside(folder, name, look=look)
        if look and "+" in name and not os.path.lexists(path):
            raise RecipeError(
                f"{name}: no such file or folder; if a LoRA adapter is meant, it is not folded in here",
                hint="Fold it into its base first (peft: merge_and_unload, save_pretrained), and give that folder.",
            )
        if look:
            with suppress(OSError, ValueError):
                there = os.stat(path)
                path = files.setdefault((there.st_dev, there.st_ino), path)
        names.add(path)
        return path

    def of_models(sources: Any) -> None:
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict) and "model" in source:
                source["model"] = resolved(source["model"])

    def one_of_them(holder: Any, key: str) -> None:
        name = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(name, str) and name != "base" and name and "\0" not in name:
            known = set(names)
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
    if isinstance(values.get("output"), str) and values["output"] and look:
        values["output"] = os.path.join(folder, os.path.expanduser(values["output"]))
    return values


def _beside(folder: Path, name: str, *, look: bool) -> str:
    """A path that counts from `folder`, as seen from here; what can only be a Hub id, or an absolute path, as it is."""
    name = os.path.expanduser(name) if look else name
    beside = os.path.join(folder, name)
    by_spelling = os.path.isabs(name) or name.count("/") != 1 or name.startswith(".")
    if by_spelling or (look and os.path.lexists(beside)):
        # What is a path stays one: `conf/base` would be looked for on the Hub.
        return beside if os.path.isabs(beside) or beside.startswith(".") else os.path.join(".", beside)
    if look and os.path.lexists(name):
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
