"""Recipes as YAML files: read with the line of every key, and written so that they give the same result again."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lines_cli.errors import RecipeError, some
from lines_cli.hub.download import base_and_adapter
from lines_cli.recipe.plain_yaml import LARGEST, Place, YamlError, anchored_keys, dump_yaml, read_yaml
from lines_cli.recipe.schema import UNION, Recipe
from lines_cli.recipe.trajectory import Expanded, expand
from lines_cli.recipe.validate import dotted, make_recipe
from lines_cli.storage.digest import FileRecord
from lines_cli.storage.files import read_small
from lines_cli.storage.names import file_and_part
from lines_cli.storage.object_store import ObjectPath, is_url, placed_at, url_of
from lines_cli.version import __version__


def load_recipe(path: Path, sets: Iterable[str] = ()) -> Recipe:
    """Read a recipe from YAML. Relative paths in it count from the file's folder.

    Args:
        path: the file.
        sets: what overrules it, each as `lines.beta=0.4`; a number picks from a list, as in
            `models.0.parameters.weight=0.3`. Values are YAML; paths among them count from the file's folder, too.

    Raises:
        RecipeError: the file cannot be read, is not YAML, or says something impossible.
    """
    file = load_recipe_file(path, sets)
    return _with_record(file.recipe, file.places)


def _with_record(recipe: Recipe, places: Mapping[str, str]) -> Recipe:
    """The recipe with its record of inputs by the names that they have in it.

    Args:
        recipe: as it was read.
        places: each input as its file names it, and the record -> as `recipe` does.
    """
    recorded: dict[str, Any] = {}
    for before, name in places.items():
        for called, record in recipe.inputs.items():
            if called == before or called.startswith(f"{before}/"):
                recorded.setdefault(name + called[len(before) :], record)
    return recipe.model_copy(update={"inputs": recorded}) if recipe.inputs else recipe


@dataclass(frozen=True, slots=True)
class RecipeFile:
    """A recipe, and what its file says beside it.

    Attributes:
        recipe: as `load_recipe` gives it.
        places: each input as the file names it -> as `recipe` does; of one input, perhaps several.
        version: of lines, which wrote the file; None if it does not say so.
    """

    recipe: Recipe
    places: dict[str, str]
    version: str | None


Elsewhere = Mapping[str, str] | Sequence[str]
"""Inputs by their names in a recipe, and where they are: pairs, or texts of the form NAME=PATH."""


def load_recipe_file(
    path: Path, sets: Iterable[str] = (), *, elsewhere: Elsewhere = (), url: str | None = None
) -> RecipeFile:
    """Read a recipe, of which some inputs may lie elsewhere than it says.

    Args:
        path: the file.
        sets: as of `load_recipe`.
        elsewhere: where these inputs are: a path, which counts from the current folder, or a Hub id.
        url: of the folder in an object store from which the file was fetched: its relative paths count from there,
            and nothing in it is a pattern.

    Raises:
        RecipeError: as of `load_recipe`; or the recipe has no input of a name.
    """
    values, at, text = _read(path)
    for one in sets:
        _set(values, one, at)
    places: dict[str, str] = {}
    given = _elsewhere(values, elsewhere)
    if url is None:
        folder, found = path.parent, expand(values, at, path.parent, where=str(path), literal=given)
    else:  # where nothing is looked for by a pattern
        folder, found = placed_at(url), Expanded()
    values = _with_paths(folder, values, places, given)
    version = _VERSION.match(text)
    constants = anchored_keys(text) if "&" in text else ()
    recipe = make_recipe(values, where=str(path), at=at, constants=constants, expanded=found)
    return RecipeFile(recipe, places, version[1] if version else None)


_VERSION = re.compile(r"# Written by lines (\d[\w.+-]{0,40})\.")


def _elsewhere(values: Mapping[Any, Any], given: Elsewhere) -> dict[str, str]:
    """Inputs by their names in a recipe, and where they are. The last part of a name will do, if no other ends so.

    Raises:
        RecipeError: the recipe has no input of that name, or several; or nothing is said of where it is.
    """
    known = list(dict.fromkeys(_input_names(values)))
    pairs = given.items() if isinstance(given, Mapping) else [_split(text, known) for text in given]
    found: dict[str, str] = {}
    for name, path in pairs:
        meant = [name] if name in known else [one for one in known if _ends_with(one, name)]
        if not meant:
            raise RecipeError(f"--input {name}: the recipe has no such input; it has\n{some(known)}")
        if len(meant) > 1:
            raise RecipeError(f"--input {name}: this may be any of\n{some(meant)}", hint="Give more of its name.")
        if not path:
            raise RecipeError(f"--input {name}: expected --input NAME=PATH")
        if found.setdefault(meant[0], path) != path:
            raise RecipeError(
                f"--input says twice where {meant[0]} is: {found[meant[0]]}, and {path}", hint="Leave one of them out."
            )
    return found


def _split(text: str, known: Sequence[str]) -> tuple[str, str]:
    """`NAME=PATH` in two, where both may hold `=`: the longest name that the recipe has, else the longest last part."""
    cuts = [at for at, letter in enumerate(text) if letter == "="]
    names = [text[:at] for at in reversed(cuts)]
    exact = [name for name in names if name in known]
    ends = [name for name in names if any(_ends_with(one, name) for one in known)]
    name = next(iter((*exact, *ends)), text.partition("=")[0])
    return name, text[len(name) + 1 :]


def _ends_with(name: str, part: str) -> bool:
    """Whether whole parts of an input's name are its end; those of a Hub id also without its revision."""
    return any(f"/{one}".endswith(f"/{part}") for one in (name, name.partition("@")[0]))


def _input_names(values: Mapping[Any, Any]) -> Iterator[str]:
    """What a recipe calls its inputs, before anything is checked."""
    slices = values.get("slices")
    sources = [one.get("sources") for one in slices if isinstance(one, dict)] if isinstance(slices, list) else []
    listed = [source for of in (values.get("models"), *sources) if isinstance(of, list) for source in of]
    for name in (values.get("base_model"), *(source.get("model") for source in listed if isinstance(source, dict))):
        if isinstance(name, str):
            yield name


def is_by_lines(recipe: Path | bytes) -> bool:
    """Whether a recipe, a file or its content, begins as those do that are written into an output, whatever it says."""
    try:
        raw = recipe if isinstance(recipe, bytes) else read_small(recipe, LARGEST)
    except OSError:
        return False
    return raw.startswith(b"# Written by lines ")


def load_record(path: Path, url: str | None = None) -> Recipe:
    """Read the recipe that stands in an output's folder. It may be a stranger's: that the paths in it lead anywhere is
    not looked at.

    Args:
        path: the file.
        url: as of `load_recipe_file`.

    Raises:
        RecipeError: as `load_recipe`.
    """
    return read_record(_raw(path), path, url)


def read_record(raw: bytes, path: Path, url: str | None = None) -> Recipe:
    """The same, of a recipe whose bytes were read before, from `path`."""
    values, at, _ = _parsed(raw, path)
    folder = path.parent if url is None else placed_at(url)
    return make_recipe(_with_paths(folder, values, {}, {}, look=False), where=str(path), at=at)


def _raw(path: Path) -> bytes:
    try:
        return read_small(path, LARGEST)
    except OSError as error:
        url = None if path.exists() else url_of(path)
        hint = None if url is None else "A recipe is read from a disk: copy it here."
        raise RecipeError(f"{url or path}: cannot be read: {error.strerror or error}", hint=hint) from error


def _read(path: Path) -> tuple[dict[str, Any], dict[Place, str], str]:
    """The values in a recipe's file, where each stands, and its text."""
    return _parsed(_raw(path), path)


def _parsed(raw: bytes, path: Path) -> tuple[dict[str, Any], dict[Place, str], str]:
    try:
        text = raw.decode("utf-8")
        values, at = read_yaml(text)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"line {line}: it is not UTF-8 text (byte {raw[error.start]:#04x})"
        raise RecipeError(f"{path}: not valid YAML: {what}", hint="Save it as UTF-8.") from error
    except YamlError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: not a recipe: expected keys such as base_model and models")
    return values, at, text


def recipe_from(
    values: Mapping[str, Any], sets: Iterable[str] = (), *, folder: Path = Path(), where: str = "recipe"
) -> Recipe:
    """A recipe from plain values, as YAML would have them.

    Args:
        values: the recipe; it is not changed.
        sets: what overrules it (`load_recipe`).
        folder: that relative paths count from.
        where: what a message calls their origin.

    Raises:
        RecipeError: it says something impossible.
    """
    if not isinstance(values, Mapping):
        raise RecipeError(f"recipe: expected a path, a mapping or a Recipe, not {type(values).__name__}")
    own: dict[Any, Any] = _plain(values)
    at: dict[Place, str] = {}
    for text in sets:
        _set(own, text, at)
    places: dict[str, str] = {}
    found = expand(own, at, folder, where=where)
    recipe = make_recipe(_with_paths(folder, own, places, {}), where=where, at=at, expanded=found)
    return _with_record(recipe, places)


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


def _with_paths(
    folder: Path,
    values: dict[Any, Any],
    places: dict[str, str],
    elsewhere: Mapping[str, str],
    *,
    look: bool = True,
) -> dict[Any, Any]:
    """The values with their paths as they are seen from here; one input goes by one name.

    Args:
        folder: where paths count from.
        values: the recipe's.
        places: is given each input's name: as it was -> as seen from here.
        elsewhere: where inputs are that are not where their names say.
        look: whether to look at what is there. Else a name is a path or a Hub id by how it is written.
    """
    files: dict[tuple[int, int, str | None], str] = {}

    def seen(half: str) -> str:
        return _beside(folder, half, look=True)

    def resolved(name: Any) -> Any:
        if not isinstance(name, str) or not name or "\0" in name:
            return name  # which will be refused
        path = os.path.expanduser(elsewhere[name]) if name in elsewhere else _beside(folder, name, look=look)
        if (
            look
            and "+" in name
            and name not in elsewhere
            and (path == name or not is_url(path))  # in a store no adapter is read
            and not os.path.lexists(file_and_part(path)[0])
            and (halves := base_and_adapter(name, seen))
        ):
            path = "+".join(map(resolved, halves))
        elif look:
            with suppress(OSError, ValueError):
                file, part = file_and_part(path)
                there = os.stat(file)
                path = files.setdefault((there.st_dev, there.st_ino, part), path)
        places.setdefault(name, path)
        return path

    def of_models(sources: Any) -> None:
        for source in sources if isinstance(sources, list) else ():
            if isinstance(source, dict) and "model" in source:
                source["model"] = resolved(source["model"])

    def one_of_them(holder: Any, key: str) -> None:
        name = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(name, str) and name not in ("base", UNION) and name and "\0" not in name:
            known = set(places.values())
            if name.startswith(_OF_A_MODEL) and name not in places:  # as mergekit once wrote it
                name = name.removeprefix(_OF_A_MODEL)
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
    tokens = values["tokenizer"].get("tokens") if isinstance(values.get("tokenizer"), dict) else None
    for rule in tokens.values() if isinstance(tokens, dict) else ():
        one_of_them(rule, "source")
        one_of_them(rule.get("source") if isinstance(rule, dict) else None, "model")
    if isinstance(values.get("output"), str) and values["output"] and look and not is_url(values["output"]):
        values["output"] = os.path.join(folder, os.path.expanduser(values["output"]))
    return values


_OF_A_MODEL = "model:"


def _beside(folder: Path, name: str, *, look: bool) -> str:
    """A path that counts from `folder`, as seen from here; what can only be a Hub id, a URL or an absolute path, as it
    is.
    """
    if is_url(name):
        return name
    name = os.path.expanduser(name) if look else name
    if isinstance(folder, ObjectPath) and not os.path.isabs(name):
        return _in_store(str(folder), name, look=look)
    beside = os.path.join(folder, name)
    if not _may_be_hub_id(name) or (look and os.path.lexists(file_and_part(beside)[0])):
        # What is a path stays one: `conf/base` would be looked for on the Hub.
        return beside if os.path.isabs(beside) or beside.startswith(".") else os.path.join(".", beside)
    if look and os.path.lexists(file_and_part(name)[0]):
        raise RecipeError(
            f"{name}: not beside the recipe in {folder}, but in the current folder",
            hint="Paths in a recipe count from its own folder: correct the path, or give it as an absolute one.",
        )
    return name


def _in_store(url: str, name: str, *, look: bool) -> str:
    """The URL of what is named from a folder in an object store, within its bucket; a Hub id as it is.

    Raises:
        RecipeError: it leads out of the bucket, and is to be looked at.
    """
    if _may_be_hub_id(name):
        return name
    scheme, _, place = url.partition("://")
    bucket, beside = place.partition("/")[0], os.path.normpath(f"{place}/{name}")
    if f"{beside}/".startswith(f"{bucket}/"):
        return f"{scheme}://{beside}"
    if look:
        raise RecipeError(
            f"{name}: leads out of the bucket, seen from {url}",
            hint=f"Say where it is: --input {shlex.quote(name)}=PATH",
        )
    return f"{url}/{name}"


def _may_be_hub_id(name: str) -> bool:
    return name.partition("@")[0].count("/") == 1 and not name.startswith((".", "/"))


_BASE_ITSELF = (("tokenizer_source", "base"), ("chat_template", "base"))


def dump_recipe(
    recipe: Recipe,
    *,
    named: Mapping[str, str],
    alpha: float | None = None,
    why: str = "",
    weights: Sequence[Sequence[float | None]] | None = None,
) -> str:
    """The recipe as YAML that gives the same result again, with everything in it that was decided.

    Args:
        recipe: what was run.
        named: each input as it is to be written: seen from where the file will stand, a Hub id with its commit.
        alpha: what `auto` was measured to be; it takes its place.
        why: how it was measured, for a comment.
        weights: for each model what its weight was measured to be, where a rule stood for it; with slices for the
            sources of each.
    """
    values = recipe.model_dump(mode="json", exclude_none=True, exclude={"notes", "output"})
    for key in ("base_model", "tokenizer_source", "chat_template"):
        if key in values and (key, values[key]) not in _BASE_ITSELF:
            values[key] = named.get(values[key], values[key])
    if "tokenizer" in values:
        _name_in(values["tokenizer"], named)
    parts = (source for one in values.get("slices", ()) for source in one["sources"])
    for source in (*values.get("models", ()), *parts):
        source["model"] = named.get(source["model"], source["model"])
    measured = ""
    if weights is not None:
        key = recipe.method.counts_by or ""
        rules = {rule for rule in recipe.settings(key) if isinstance(rule, str)}
        measured = f"# {key} was {' and '.join(sorted(rules))}: by the norms of the task vectors\n"
        places = [one["sources"] for one in values.get("slices", ())] or [values["models"]]
        for sources, of_models in zip(places, weights, strict=True):
            for source, weight in zip(sources, of_models, strict=True):
                if weight is not None:
                    source["parameters"] = {**source.get("parameters", {}), key: weight}
        for one in (values, *values.get("slices", ())):
            if isinstance(one.get("parameters", {}).get(key), str):
                del one["parameters"][key]
    if not values["parameters"]:
        del values["parameters"]
    if alpha is not None and recipe.lines is not None and recipe.lines.needs_alpha:
        values["lines"]["alpha"] = alpha
        measured += f"# lines.alpha was auto: {why}\n"
    text = dump_yaml(values)
    again = "lines merge --config lines_recipe.yaml -o OUT"
    return f"# Written by lines {__version__}. To run it again: {again}\n{measured}{text}"


def _name_in(tokenizer: dict[str, Any], named: Mapping[str, str]) -> None:
    """Call the inputs in the `tokenizer:` key as they are to be written."""
    if tokenizer["source"] != "base":
        tokenizer["source"] = named.get(tokenizer["source"], tokenizer["source"])
    for rule in tokenizer.get("tokens", {}).values():
        holder, key = (rule["source"], "model") if isinstance(rule.get("source"), dict) else (rule, "source")
        if holder.get(key) is not None:
            holder[key] = named.get(holder[key], holder[key])


def dump_record(
    run: str,
    inputs: Mapping[str, Mapping[str, Any]],
    files: Mapping[str, FileRecord],
    card: FileRecord | None,
    layers: Sequence[Mapping[str, Any]] = (),
) -> str:
    """The recipe's `layers`, `run`, `inputs`, `card` and `files` as YAML, to stand behind a dumped recipe."""
    values = {
        "run": run,
        "inputs": {name: dict(record) for name, record in inputs.items()},
        **({"card": _record_values(card)} if card is not None else {}),
        "files": {name: _record_values(files[name]) for name in sorted(files)},
    }
    text = dump_yaml(values)
    record = f"# What was read, and written beside this file. A later run of this recipe notices other inputs.\n{text}"
    if not layers:
        return record
    listed = {"layers": [dict(layer) for layer in layers]}
    realised = dump_yaml(listed, flow=None)
    return f"# What rounding left of each layer's coefficient (docs/editing.md).\n{realised}{record}"


def _record_values(record: FileRecord) -> dict[str, Any]:
    return {"bytes": record.nbytes, "digest": record.digest}
