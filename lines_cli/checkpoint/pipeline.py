"""Checkpoints that hold several models: a pipeline of diffusers, a folder of sentence-transformers whose modules have
weights of their own, and one file with everything. Each model is a component, with a name, a config and a depth of its
own; the tensors of the whole are those of all, in a folder with the component's name before each.

As of any checkpoint only headers and configs are read. The folders that an index names lie within its own, and a link
out of that is not followed; code that lies there is never run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.formulas import Made
from lines_cli.checkpoint.header import Known, StoredTensor
from lines_cli.checkpoint.reader import (
    Checkpoint,
    Component,
    Heads,
    choose_weights,
    gc_paused,
    open_checkpoint,
    views_of,
    weights_among,
)
from lines_cli.errors import CheckpointError, printable, some
from lines_cli.storage.beside import beside, leads_out, read_json, read_object, refuse_link_out
from lines_cli.storage.names import CONFIG, MODEL_INDEX, MODULES, WEIGHT_STEMS

_OF_DIFFUSERS = ("diffusion_pytorch_model", *(stem for stem in WEIGHT_STEMS if stem != "diffusion_pytorch_model"))
_OTHERS_WEIGHTS = (".gguf", ".h5", ".msgpack", ".onnx")

Reads = Callable[[str], bool]
"""Whether a component of this name is needed."""


def open_whole(
    path: Path,
    *,
    name: str | None = None,
    hub_id: str | None = None,
    to_look_at: bool = False,
    known: Known | None = None,
    variant: str | None = None,
    reads: Reads | None = None,
    part: str | None = None,
    heads: Heads | None = None,
    heads_of: Mapping[str, Heads] | None = None,
) -> Checkpoint:
    """Open whatever is at `path` (`open_checkpoint`), with the components that it holds.

    Args:
        path, name, hub_id, to_look_at, known, variant, part, heads: as of `open_checkpoint`.
        reads: of a folder's components, those that are needed; all of them unless given.
        heads_of: of components whose weight files are elsewhere their headers, by folder: all that are needed.

    Raises:
        CheckpointError, UnsupportedError: as of `open_checkpoint`; or an index names a folder that is not there, or
            that leads out of its own.
    """

    def opened(there: Path, called: str, folder: str = "") -> Checkpoint:
        return open_checkpoint(
            there,
            name=called,
            hub_id=hub_id,
            to_look_at=to_look_at,
            known=known,
            variant=variant,
            part=part,
            heads=heads_of[folder] if heads_of is not None else heads,
            stems=stems_in(there) if folder else WEIGHT_STEMS,
        )

    called = name or str(path)
    if not os.path.isdir(path) or part is not None or heads is not None:
        return _split(opened(path, called))
    if beside(path, MODEL_INDEX) is not None:
        components = []
        held = list(heads_of) if heads_of is not None else _folders_with_weights(path, reads)
        for folder in held:
            one = opened(path / folder, f"{called}/{folder}", folder)
            components.append(Component(folder, f"{folder}.", folder, one, (f"{folder}.",)))
        return _together(path, called, hub_id, components)
    modules = {name: name for name in heads_of} if heads_of is not None else modules_with_weights(path)
    if any(folder for folder in modules.values()):
        components = []
        for module, folder in modules.items():
            prefix = f"{module.replace('/', '.')}." if folder else ""
            one = opened(path / folder, f"{called}/{folder}" if folder else called, folder)
            components.append(Component(module, prefix, folder, one, (prefix,), after=bool(components)))
        whole = _together(path, called, hub_id, components)
        own = next((one.checkpoint.config for one in components if not one.folder), {})
        return replace(whole, config=own)
    return _split(opened(path, called))


@gc_paused()
def _together(path: Path, name: str, hub_id: str | None, components: Sequence[Component]) -> Checkpoint:
    """The checkpoint that holds these.

    Raises:
        CheckpointError: two tensors would have one name.
    """
    tensors: dict[str, StoredTensor] = {}
    formulas: dict[str, Made] = {}
    beside_them: dict[str, StoredTensor] = {}
    models = [component.checkpoint for component in components]
    first = 0
    for component, model in zip(components, models, strict=True):
        prefix = component.prefix
        held = {prefix + own: _behind(stored, first) for own, stored in model.tensors.items()}
        _refuse_confused(path, component, [other for other in components if other is not component], held)
        tensors |= held
        number_of = range(first, first + len(model.files)).__getitem__
        for own, made in model.formulas.items():
            steps = tuple(replace(step.placed(number_of), name=prefix + step.name) for step in made.steps)
            formulas[prefix + own] = Made(_behind(made.stored, first), steps)
        beside_them |= {prefix + own: _behind(stored, first) for own, stored in model.beside.items()}
        first += len(model.files)
    said = dict.fromkeys(model.stored_as for model in models if model.stored_as)
    return Checkpoint(
        name=name,
        path=path,
        files=tuple(file for model in models for file in model.files),
        tensors=tensors,
        states=tuple(state for model in models for state in model.states),
        stem=models[0].stem if models else WEIGHT_STEMS[0],
        hub_id=hub_id,
        formulas=formulas,
        beside=beside_them,
        stored_as=", ".join(said) or None,
        views=tuple(views_of(models)) if any(model.views for model in models) else (),
        notes=tuple(note for model in models for note in model.notes),
        is_here=all(model.is_here for model in models),
        components=tuple(components),
    )


def _refuse_confused(path: Path, own: Component, others: Sequence[Component], names: Iterable[str]) -> None:
    """Refuse names of one component that would be taken for another's.

    Raises:
        CheckpointError: names a tensor, and both.
    """
    for other in others:
        if other.prefix.startswith(own.prefix):
            confused = next((name for name in names if name.startswith(other.prefix)), None)
            if confused is not None:
                raise CheckpointError(
                    f"{path}: tensor {printable(confused)} may be of {own.name} and of {other.name}",
                    hint="Rename the folder of one of them, or edit the two by themselves.",
                )


def _behind(stored: StoredTensor, first: int) -> StoredTensor:
    """Where a tensor is, if so many files stand before those of its own checkpoint."""
    parts = tuple(part._replace(file=first + part.file) for part in stored.parts)
    return stored._replace(file=first + stored.file, parts=parts)


def with_tensors_of(whole: Checkpoint, name: str, model: Checkpoint) -> Checkpoint:
    """A checkpoint with the tensors of one of its components as `model` has them, which has the component's files."""
    tensors, first = dict(whole.tensors), 0
    for one in whole.components:
        if one.name == name:
            for own in one.checkpoint.tensors:
                del tensors[one.prefix + own]
            tensors |= {one.prefix + own: _behind(stored, first) for own, stored in model.tensors.items()}
        first += len(one.checkpoint.files) if one.checkpoint.files != whole.files else 0
    return replace(whole, tensors=tensors)


def with_its_components(whole: Checkpoint) -> Checkpoint:
    """A checkpoint that was changed as a whole, by an adapter, with its components changed likewise."""
    components = []
    for one in whole.components:
        names = {own: one.prefix + own for own in one.checkpoint.tensors}
        changed = replace(
            one.checkpoint,
            files=whole.files,
            states=whole.states,
            views=whole.views,
            tensors={own: whole.tensors[full] for own, full in names.items()},
            formulas={own: whole.formulas[full] for own, full in names.items() if full in whole.formulas},
        )
        if one.folder == "":
            changed = replace(changed, config=whole.config, config_changes=whole.config_changes)
        components.append(replace(one, checkpoint=changed))
    return replace(whole, components=tuple(components)) if components else whole


# --- a pipeline of diffusers ---


def component_folders(folder: Path) -> list[str]:
    """The folders that a pipeline's `model_index.json` names, in its order: of models, and of what has no weights.

    Raises:
        CheckpointError: it is malformed, a link out of the folder, or names a folder elsewhere.
    """
    path = beside(folder, MODEL_INDEX)
    named = named_components(read_object(path), str(path)) if path is not None else []
    for name in named:
        refuse_link_out(folder, name)
    return named


def named_components(index: Mapping[str, Any], called: str) -> list[str]:
    """The folders that the content of a `model_index.json` names; `[null, null]` stands for none.

    Raises:
        CheckpointError: a name leads elsewhere.
    """
    named = [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == _LIBRARY_AND_CLASS and any(value)
    ]
    for name in named:
        if not _A_FOLDER.fullmatch(name) or leads_out(name):
            raise CheckpointError(
                f"{called}: a component is called {name!r}, which is no folder beside it",
                hint="Components lie in the folder of their index. Do not trust this pipeline, or correct its index.",
            )
    if len(named) > _MOST_COMPONENTS:
        raise CheckpointError(f"{called}: more than {_MOST_COMPONENTS} components", hint="The file is damaged.")
    return named


_LIBRARY_AND_CLASS = 2
_MOST_COMPONENTS = 100
_A_FOLDER = re.compile(r"\w[\w.-]*")


def _folders_with_weights(path: Path, reads: Reads | None) -> list[str]:
    """The folders of a pipeline's components that are needed; all, where none of those that are asked for has weights.

    Raises:
        CheckpointError: one is not there, or none has weights.
    """
    folders = component_folders(path)
    for wanted in ([folder for folder in folders if reads is None or reads(folder)], folders):
        _refuse_absent(path, [folder for folder in wanted if not os.path.isdir(path / folder)])
        if held := [folder for folder in wanted if _holds_weights(path / folder)]:
            return held
    others = [name for name in _listed(path) if os.path.isdir(path / name) and _holds_weights(path / name)]
    if others:
        raise CheckpointError(
            f"{path}: its {MODEL_INDEX} names no folder that holds weights; others do:\n{some(others)}",
            hint=f"Correct the index; or edit one of them by itself, as {path}/{others[0]}.",
        )
    raise CheckpointError(
        f"{path}: none of the folders that its {MODEL_INDEX} names holds weights",
        hint="The pipeline is incomplete: copy or download all of it.",
    )


def _refuse_absent(folder: Path, absent: Sequence[str]) -> None:
    if absent:
        raise CheckpointError(
            f"{folder}: its {MODEL_INDEX} names {len(absent)} folder(s) that are not there:\n{some(absent)}",
            hint="The pipeline is incomplete: copy or download all of it. Or edit one component by itself, as in "
            f"{folder}/unet.",
        )


def _holds_weights(folder: Path) -> bool:
    """Whether there are weights in a folder, in whatever format."""
    names = _listed(folder)
    return bool(weights_among(names)) or any(name.endswith(_OTHERS_WEIGHTS) for name in names)


def stems_in(folder: Path) -> Sequence[str]:
    """What the weights of a component are called, the first of these that is there: those of a model of diffusers, by
    its config, otherwise than those of transformers.
    """
    path = beside(folder, CONFIG) if os.path.isdir(folder) else None
    return _OF_DIFFUSERS if path is not None and "_class_name" in read_object(path) else WEIGHT_STEMS


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error.strerror or error}", hint="Check that you may read it."
        ) from error


# --- the modules of sentence-transformers ---


def modules_with_weights(folder: Path) -> dict[str, str]:
    """The modules that `modules.json` names and that have weights: what each is called -> its folder, empty for the
    folder itself. None where the file is missing or of another form.

    Raises:
        CheckpointError: a link leaves the folder.
    """
    return {
        name: within
        for name, within in named_modules(folder).items()
        if os.path.isdir(folder / within) and choose_weights(_files_in(folder, within)) is not None
    }


def _files_in(folder: Path, within: str) -> list[str]:
    if within:
        refuse_link_out(folder, within)
    return [name for name in _listed(folder / within) if os.path.isfile(folder / within / name)]


def named_modules(folder: Path) -> dict[str, str]:
    """The modules that `modules.json` names, in its order: what each is called -> its folder. One in the folder itself
    is called as sentence-transformers would call its folder: `0_Transformer`.

    Raises:
        CheckpointError: it is a link that leaves the folder.
    """
    path = beside(folder, MODULES)
    modules: Any = None
    if path is not None:
        with suppress(CheckpointError):
            modules = read_json(path)
    found: dict[str, str] = {}
    for number, module in enumerate(modules if isinstance(modules, list) else ()):
        within = module.get("path") if isinstance(module, dict) else None
        if (
            not isinstance(within, str)
            or (within and leads_out(within))
            or within == "."
            or len(found) >= _MOST_MODULES
        ):
            continue
        kind = module.get("type")
        last = kind.rpartition(".")[2] if isinstance(kind, str) else ""
        name = within or f"{number}_{last if _A_FOLDER.fullmatch(last) else 'Transformer'}"
        if name not in found and within not in found.values():
            found[name] = within
    return found


_MOST_MODULES = 100


# --- one file with everything ---

_PREFIXES = {
    "model.diffusion_model.": "unet",
    "first_stage_model.": "vae",
    "vae.": "vae",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.transformer.": "text_encoder",
    "conditioner.embedders.0.model.": "text_encoder_2",  # SDXL's refiner has its second one alone
    "conditioner.embedders.1.": "text_encoder_2",
    "text_encoders.clip_l.": "text_encoder",
    "text_encoders.clip_g.": "text_encoder_2",
    "text_encoders.t5xxl.": "text_encoder_3",
}
"""What names begin with in a file with everything, and what diffusers calls the component that they belong to."""
_OTHERS = "others"


def _split(checkpoint: Checkpoint) -> Checkpoint:
    """A lone file, with its components if it holds a diffusion model and more."""
    regions = regions_of(checkpoint.tensors)
    if not regions:
        return checkpoint
    held: dict[str, dict[str, StoredTensor]] = {name: {} for name in dict.fromkeys(regions.values())}
    for tensor, stored in checkpoint.tensors.items():
        prefix = next((prefix for prefix in regions if tensor.startswith(prefix)), "")
        held.setdefault(regions.get(prefix, _OTHERS), {})[tensor] = stored
    begins = {name: tuple(prefix for prefix, of in regions.items() if of == name) or ("",) for name in held}
    components = tuple(
        Component(
            name, "", None, replace(checkpoint, tensors=tensors, name=f"{checkpoint.name} ({name})"), begins[name]
        )
        for name, tensors in held.items()
    )
    return replace(checkpoint, components=components)


def regions_of(names: Iterable[str]) -> dict[str, str]:
    """What the names in a file with everything begin with -> the component; empty where they are those of one model."""
    names, denoiser = list(names), "model.diffusion_model."
    if denoiser not in "\n".join(names) or not any(name.startswith(denoiser) for name in names):
        return {}
    found = {prefix: name for prefix, name in _PREFIXES.items() if any(own.startswith(prefix) for own in names)}
    if len(set(found.values())) == 1:
        return {}
    if not any(name.startswith(f"{denoiser}input_blocks.") for name in names):
        found[denoiser] = "transformer"
    if "text_encoders.clip_g." not in found and "text_encoders.t5xxl." in found:  # FLUX has two
        found["text_encoders.t5xxl."] = "text_encoder_2"
    return found
