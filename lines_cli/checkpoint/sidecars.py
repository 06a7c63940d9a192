"""What stands beside the weights in a checkpoint folder: carried over, adapted where the weights changed it, or
written anew.

Carried over is what a loader needs: config, tokenizer, generation config, chat template, processor, custom model code,
licence, and the modules that `modules.json` names, with their weights. Never other weights, pickles or training state,
whatever they are called. What else lies there is named.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.quantised import QUANTIZATION
from lines_cli.checkpoint.reader import Checkpoint, quantisation_said
from lines_cli.errors import CheckpointError, printable, some
from lines_cli.storage.beside import beside, leads_out, read_json, read_object, refuse_link_out
from lines_cli.storage.files import FETCH_LFS, LFS_POINTER, read_small
from lines_cli.storage.names import CONFIG, MODEL_INDEX, MODULES

GENERATION = "generation_config.json"
_TOKENIZER_CONFIG, _CHAT_TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_ADDED_TOKENS = "added_tokens.json"
_ADAPTER_CONFIG = "adapter_config.json"

TOKENIZER_FILES = tuple(
    """
    *tokenizer*.json *vocab*.json vocab*.txt *merges.txt *.model *.spm *.tiktoken *.bpe bpe.codes spiece.* tekken.json
    special_tokens_map.json added_tokens.json normalizer.json chat_template* additional_chat_templates/*.jinja
    tokenization_*.py
    """.split()
)
CARRIED_FILES = (
    *TOKENIZER_FILES,
    *"*config*.json *processor*.json modules.json *_Pooling/config.json *.jinja *.py".split(),
    *"LICENSE* LICENCE* NOTICE* USE_POLICY* params.json config.y*ml".split(),
)
"""Patterns of file names, relative to the folder, that an output folder takes over from an input."""

_QUANTISED = ("quant*config*.json", "*quant_config*.json")
NEVER_CARRIED = (
    tuple(
        """
    *.safetensors *.index*.json *.bin *.pt *.pth *.ckpt *.pkl *.pickle *.joblib *.h5 *.msgpack *.onnx *.gguf *.np[yz]
    training_args* trainer_* optimizer* scheduler* rng_state* adapter_* zero_* *results*.json
    """.split()
    )
    + _QUANTISED
)
"""Weights, pickles, training state, and what says that weights are quantised, whatever pattern above they match."""

_VOCABULARY_FILES = tuple(
    """
    tokenizer.json *vocab*.json vocab*.txt *merges.txt *.model *.spm *.tiktoken *.bpe bpe.codes spiece.* tekken.json
    """.split()
)
_PROCESSOR_FILES = ("*processor*.json",)
_TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
_DEEPEST = 4  # folders within a module's

_NOT_MISSED = tuple(
    """
    .* *.md *.png *.jp*g *.gif *.webp *.svg *.pdf *.mp4 *.log *.index*.json pytorch_model* *_model.h5
    model*.safetensors pytorch_model*.safetensors diffusion_pytorch_model* consolidated*.safetensors openvino_* *.gguf
    *.onnx *.onnx_data *.msgpack *.ot training_args* trainer_* optimizer* scheduler* scaler.pt rng_state* adapter_*
    zero_* *results*.json latest events.out* mergekit_config.y*ml lines_recipe.yaml checkpoint-* global_step* onnx
    openvino runs wandb eval* logs
    """.split()
)
"""Patterns of what may lie in a checkpoint's folder and is nothing to a loader of its weights."""

_LARGEST = 512 * 2**20  # bytes: tokenizers have some 30 MB


@dataclass(frozen=True, slots=True)
class Sidecar:
    """One file beside the weights: a copy of `source`, or `content`."""

    name: str
    source: Path | None = None
    content: bytes | None = None

    def read(self) -> bytes:
        """Its content.

        Raises:
            CheckpointError: what it is to be a copy of cannot be read.
        """
        if self.source is None:
            assert self.content is not None
            return self.content
        try:
            content = read_small(self.source, _LARGEST)
        except OSError as error:
            raise CheckpointError(
                f"{self.source}: cannot be carried over: {error.strerror or error}",
                hint="Check that it is a file and that you may read it. Move it away if it is not needed.",
            ) from error
        if content.startswith(LFS_POINTER):
            raise CheckpointError(
                f"{self.source}: a Git LFS pointer, and not the file that it points to", hint=FETCH_LFS
            )
        return content


def carried_files(folder: Path, patterns: Iterable[str] = CARRIED_FILES) -> dict[str, Path]:
    """The files of `folder` that an output folder takes over: name relative to it -> where it is.

    Raises:
        CheckpointError: one is a link that leaves the folder, or lies in a subfolder that is; or a folder cannot be
            read.
    """
    patterns = tuple(patterns)
    found: dict[str, Path] = {}
    for name in _names(folder, {pattern.rpartition("/")[0] for pattern in patterns}):
        if is_carried(name, patterns) and (path := beside(folder, name)) is not None:
            found[name] = path
    for module in module_paths(folder) if patterns == CARRIED_FILES else ():
        for name in _files_below(folder, module):
            if is_of_a_module(name) and (path := beside(folder, name)) is not None:
                found[name] = path
    return found


def is_carried_with_a_component(name: str) -> bool:
    """Whether a pipeline's output takes over a file of one of its folders; the name is relative to that."""
    return name == _SCHEDULER or is_carried(name)


_SCHEDULER = "scheduler_config.json"


def files_of_component(folder: Path, *, module: bool = False) -> dict[str, Path]:
    """The files of a component's folder that go with it, its weights apart: name relative to that -> where it is.

    Args:
        folder: the component's.
        module: whether it is one of sentence-transformers: then all that lies there, as far as it may be copied.

    Raises:
        CheckpointError: as `carried_files`.
    """
    if not module:
        found = carried_files(folder)
        scheduler = beside(folder, _SCHEDULER)
        return found | ({_SCHEDULER: scheduler} if scheduler is not None else {})
    names = (name.removeprefix("./") for name in _files_below(folder, "."))
    every = ((name, beside(folder, name)) for name in names if not never_carried(name))
    return {name: path for name, path in every if path is not None}


def files_of_pipeline(folder: Path, named: Collection[str], components: Collection[str]) -> dict[str, Path]:
    """The files of a pipeline that are of none of its models: in its own folder, and in those of its other parts.

    Args:
        folder: the pipeline's.
        named: the folders that its index names.
        components: those of them that are models.

    Raises:
        CheckpointError: as `carried_files`.
    """
    found = {name: path for name, path in carried_files(folder).items() if name.partition("/")[0] not in named}
    index = beside(folder, MODEL_INDEX)
    found |= {MODEL_INDEX: index} if index is not None else {}
    for part in named:
        if part not in components and os.path.isdir(folder / part):
            found |= {f"{part}/{name}": path for name, path in files_of_component(folder / part).items()}
    return found


def code_among(names: Iterable[str]) -> list[str]:
    """Of file names, those of Python code."""
    return sorted(name for name in names if name.endswith(".py"))


def left_behind(folder: Path, carried: Collection[str], called: str, expected: Collection[str] = ()) -> Iterator[str]:
    """What is said of what lies in a folder and is not carried over.

    Args:
        folder: an input's.
        carried: what is, by its name relative to that.
        called: what to call the input.
        expected: names of folders of which nothing is to be said.
    """
    known = {name.partition("/")[0] for name in carried} | {name.partition("/")[0] for name in expected}
    left = [name for name in _listed(folder) if name not in known and not _matches(name, _NOT_MISSED)]
    left = [name if os.path.isfile(folder / name) else f"{name}/" for name in left if _may_be_read(folder / name)]
    if left:
        yield f"not carried over from {called}, and not known to be needed:\n{some(left, _MOST_LEFT)}"


def module_paths(folder: Path) -> list[str]:
    """The folders within one that its `modules.json` names (sentence-transformers): `2_Dense`. A file that cannot be
    read names none.

    Raises:
        CheckpointError: it is a link that leaves the folder.
    """
    path = beside(folder, MODULES)
    modules: Any = None
    if path is not None:
        with suppress(CheckpointError):
            modules = read_json(path)
    named = [module.get("path") for module in modules if isinstance(module, dict)] if isinstance(modules, list) else []
    return [name for name in dict.fromkeys(named) if isinstance(name, str) and not leads_out(name) and name != "."]


def is_of_a_module(name: str) -> bool:
    """Whether a file in a module's folder goes with it: its weights, too, but no pickles and no training state."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or not never_carried(name)


def _files_below(folder: Path, within: str, depth: int = 0) -> Iterator[str]:
    """The names of all files in a folder within `folder`, relative to that, hidden ones apart."""
    refuse_link_out(folder, within)
    if depth > _DEEPEST or not os.path.isdir(folder / within):
        return
    for entry in _listed(folder / within):
        name = f"{within}/{entry}"
        if os.path.isdir(folder / name):
            yield from _files_below(folder, name, depth + 1)
        elif not entry.startswith("."):
            yield name


def _names(folder: Path, subfolders: Collection[str]) -> list[str]:
    """What lies in a folder, and in those of its subfolders that have a pattern's name; of no other is it known."""
    names: list[str] = []
    for name in _listed(folder):
        names.append(name)
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in subfolders):
            refuse_link_out(folder, name)
            if os.path.isdir(folder / name):
                names += [f"{name}/{inner}" for inner in _listed(folder / name)]
    return names


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise CheckpointError(
            f"{folder}: cannot be read: {error.strerror or error}", hint="Check that you may read it."
        ) from error


def is_carried(name: str, patterns: Iterable[str] = CARRIED_FILES) -> bool:
    """Whether an output folder takes over a file of this name, which is relative to its folder."""
    return _matches(name, patterns) and not never_carried(name)


def never_carried(name: str) -> bool:
    """Whether it is weights, a pickle, training state or another's claim that weights are quantised, by its name."""
    return _matches(name.rpartition("/")[2], NEVER_CARRIED)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the whole name matches; `*` stays within one folder level."""
    return any(pattern.count("/") == name.count("/") and fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def carry_over(
    inputs: Sequence[Checkpoint],
    *,
    called: Sequence[str],
    dtype: str | None,
    stored: str | None,
    rows: Mapping[int, int],
    rows_of: Checkpoint,
    vocabularies: Sequence[Collection[int]],
    tokenizer: Checkpoint | None = None,
    extended: Mapping[str, bytes] | None = None,
    chat_template: Checkpoint | None = None,
    quantised_like: Checkpoint | None = None,
    apart: Collection[str] = (),
) -> tuple[list[Sidecar], list[str]]:
    """The carried-over files of an output folder, and what to say of them.

    They are those of the first input; where it is a lone file or has no config, the next one that has a config fills
    the gaps. `config.json` follows what changed:

    Args:
        inputs: the one that the output is like, then the others.
        called: what to call each.
        dtype: what the weights were cast to (`bfloat16`); None where they keep their own.
        stored: what most of the output's float entries are stored as, for a config of another input.
        rows: numbers of vocabulary rows that became another number.
        rows_of: the input whose number of rows that is: where there are any, its tokenizer goes with them.
        vocabularies: for each input, how many rows its token embeddings and heads have.
        tokenizer, chat_template: the inputs to take these from, if they are named.
        quantised_like: the input whose weights are stored as the output's are, in codes; None where they are whole.
        apart: folders within the first input's of which nothing is taken: those of other components.
        extended: of the tokenizer the files that know further tokens; what else lists its vocabulary is left out.

    Raises:
        CheckpointError: an input that is named for its tokenizer or chat template has none.
    """
    notes: list[str] = []
    own = _carried(inputs[0])
    own = {name: path for name, path in own.items() if not name.startswith(tuple(f"{folder}/" for folder in apart))}
    files = own
    if CONFIG not in own:
        for other, name in zip(inputs[1:], called[1:], strict=True):
            others = _carried(other)
            if CONFIG in others:
                files = others | own
                dtype = dtype or stored
                borrowed = ", ".join(map(printable, sorted(files.keys() - own.keys())))
                notes.append(f"{called[0]} has no config.json; from {name} come {borrowed}")
                break
        else:
            if not own:
                which = "neither input" if len(inputs) == 2 else "no input"
                notes.append(f"{which} is a folder with a config.json: the output folder holds weights only")
    for each, name in zip(inputs, called, strict=True):
        if each.stored_as is None and (said := quantisation_said(each.config)):
            notes.append(
                f"the config.json of {name} says quantised ({said}), but its weights are whole; the output's does not"
            )
        if each.folder is not None and beside(each.folder, _ADAPTER_CONFIG) is not None:
            notes.append(
                f"an adapter lies beside the weights of {name} ({_ADAPTER_CONFIG}), and a loader may add it to them: "
                "it is not read and not carried over. Fold it in first if it belongs to the model"
            )
    if inputs[0].folder is not None:
        notes += _left_behind(inputs[0].folder, own, called[0], apart)
    if not rows and tokenizer is None:
        files, of_others = _with_what_it_lacks(files, inputs, called, vocabularies)
        notes += of_others
    files, of_code = _with_code(files, inputs, called)
    notes += of_code
    ids: Mapping[str, Any] | None = None
    if rows or tokenizer is not None:
        kept = tokenizer or rows_of
        theirs = _of(kept)
        files = {name: path for name, path in files.items() if not _matches(name, TOKENIZER_FILES)} | theirs
        ids = kept.config or None
        if tokenizer is not None and not theirs and any(map(_of, inputs)):
            raise CheckpointError(
                f"tokenizer_source: {tokenizer.name} has no tokenizer",
                hint="Name an input that has one, or leave the key out.",
            )
        if tokenizer is not None and not theirs:
            notes.append("tokenizer_source says nothing: no input has a tokenizer")
        elif not theirs:
            notes.append(
                f"no tokenizer goes with the {next(iter(rows.values())):,} rows kept: "
                f"{kept.name} has none, and that of the others has other rows"
            )

    whose = (tokenizer or rows_of) if rows or tokenizer is not None else inputs[0]
    beside_adapter = _beside_adapter(whose)
    if beside_adapter and not extended and beside_adapter.items() <= files.items():
        adapter = whose.parts[1].name
        notes.append(f"the tokenizer is the one beside the adapter {adapter}: {', '.join(sorted(beside_adapter))}")
        for one, numbers in zip(inputs, vocabularies, strict=True):
            notes += _beyond_the_rows(one, numbers) if one is whose else ()

    written: dict[str, bytes] = {}
    if extended:
        dropped = [name for name in files if _matches(name, _VOCABULARY_FILES) and name not in extended]
        files = {name: path for name, path in files.items() if name not in dropped}
        if dropped:
            listed = ", ".join(map(printable, sorted(dropped)))
            notes.append(f"not carried over, for they list the vocabulary without its new tokens: {listed}")
    if chat_template is not None:
        files, written = _with_chat_template(files, chat_template, extended or {})
    elif not _has_template(files):
        having = [name for other, name in zip(inputs[1:], called[1:], strict=True) if _has_template(_of(other))]
        if having:
            where = " and ".join(having)
            notes.append(f"the output has no chat template, {where} has (in a recipe chat_template: takes it)")
    if quantised_like is not None and quantised_like.folder is not None:
        files = dict(files) | _claims(quantised_like.folder)
    if CONFIG in files:
        config = read_object(files[CONFIG])
        followed = _follow(config, dtype=dtype, rows=rows, ids=ids)
        for path, value in inputs[0].config_changes.items():
            followed = _with(followed, path, rows.get(value, value) if path[-1] == "vocab_size" else value)
        if quantised_like is not None:
            followed = _quantised(followed, quantised_like.config)
        if followed != config:
            written[CONFIG] = _as_json(followed)
    if GENERATION in files and ids is not None:
        own_ids = (tokenizer or rows_of).folder
        source = beside(own_ids, GENERATION) if own_ids else None
        generation = read_object(files[GENERATION])
        followed = _with_ids(generation, read_object(source) if source else ids)
        if followed != generation:
            written[GENERATION] = _as_json(followed)
    written = {**(extended or {}), **written}
    sidecars = [
        Sidecar(name, content=written[name]) if name in written else Sidecar(name, source=path)
        for name, path in files.items()
    ]
    return sorted(sidecars, key=lambda sidecar: sidecar.name == CONFIG), notes


def _with(config: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A config with another value at the end of a path of keys."""
    key, *rest = path
    inner = config.get(key)
    return {**config, key: _with(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def _carried(checkpoint: Checkpoint, patterns: Iterable[str] = CARRIED_FILES) -> dict[str, Path]:
    """The files of a checkpoint's folder that an output takes over; of an adapter on its base those of the base, with
    the tokenizer that lies beside the adapter, if one does.
    """
    found = carried_files(checkpoint.folder, patterns) if checkpoint.folder else {}
    theirs = {name: path for name, path in _beside_adapter(checkpoint).items() if is_carried(name, patterns)}
    if tokenizer_folder(checkpoint) != checkpoint.folder:
        found = {name: path for name, path in found.items() if not _matches(name, TOKENIZER_FILES)}
    return found | theirs


def tokenizer_folder(checkpoint: Checkpoint) -> Path | None:
    """The folder of the tokenizer that says which row of a checkpoint is whose; None for a lone file. That of an
    adapter on its base is the adapter's where a vocabulary lies there, else the base's.
    """
    if not checkpoint.parts or not checkpoint.path.is_dir():
        return checkpoint.folder
    theirs = carried_files(checkpoint.path, TOKENIZER_FILES)
    return checkpoint.path if any(_matches(name, _VOCABULARY_FILES) for name in theirs) else checkpoint.folder


def _beside_adapter(checkpoint: Checkpoint) -> dict[str, Path]:
    """The tokenizer that lies beside an adapter, or the chat template alone where it has no vocabulary."""
    if not checkpoint.parts or not checkpoint.path.is_dir():
        return {}
    has_vocabulary = tokenizer_folder(checkpoint) == checkpoint.path
    return carried_files(checkpoint.path, TOKENIZER_FILES if has_vocabulary else _TEMPLATE_FILES)


def _beyond_the_rows(checkpoint: Checkpoint, rows: Collection[int]) -> Iterator[str]:
    """That a tokenizer has tokens for which there are no rows."""
    tokens = special_tokens(checkpoint)
    if tokens and rows and (most := max(tokens)) >= max(rows):
        yield (
            f"the tokenizer beside {checkpoint.name} has {printable(tokens[most])} as token {most:,}, and the "
            f"embeddings have {max(rows):,} rows"
        )


def _of(checkpoint: Checkpoint) -> dict[str, Path]:
    return _carried(checkpoint, TOKENIZER_FILES)


def _has_template(files: Mapping[str, Path]) -> bool:
    """Whether there is a chat template among the files, or in the tokenizer's config."""
    if any(_matches(name, _TEMPLATE_FILES) for name in files):
        return True
    with suppress(CheckpointError):
        return _TOKENIZER_CONFIG in files and bool(read_object(files[_TOKENIZER_CONFIG]).get("chat_template"))
    return False


def _left_behind(folder: Path, carried: Mapping[str, Path], called: str, apart: Collection[str] = ()) -> Iterator[str]:
    """What is said of the modules that `modules.json` names, and of what else lies there and is not carried over."""
    modules = [module for module in module_paths(folder) if module not in apart]
    with_weights = [m for m in modules if any(n.startswith(f"{m}/") and n.endswith(".safetensors") for n in carried)]
    if with_weights:
        listed = ", ".join(map(printable, with_weights))
        yield f"modules with weights of their own are those of {called} as they are: {listed}"
    for module in modules:
        there = list(_files_below(folder, module))
        pickled = [name for name in there if not is_of_a_module(name) and _matches(name.rpartition("/")[2], _PICKLES)]
        if not os.path.isdir(folder / module):
            yield f"{MODULES} names {printable(module)}, which is not there: a loader will miss it"
        elif pickled and module not in with_weights:
            listed = ", ".join(map(printable, pickled))
            yield (
                f"the weights of {printable(module)}, which {MODULES} names, are a pickle and not copied: {listed}. "
                "The output does not load without: copy them there if you trust them"
            )
    yield from left_behind(folder, carried, called, (*modules, *apart))


_MOST_LEFT = 32
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def _may_be_read(path: Path) -> bool:
    """Whether a loader could want what lies there: a file, or a folder with a model's files or with code in it."""
    if os.path.islink(path) or not os.path.isdir(path):
        return os.path.isfile(path)
    with suppress(OSError):
        return any(name == CONFIG or name.endswith((".safetensors", ".py")) for name in os.listdir(path))
    return False


def _with_what_it_lacks(
    files: Mapping[str, Path],
    inputs: Sequence[Checkpoint],
    called: Sequence[str],
    vocabularies: Sequence[Collection[int]],
) -> tuple[dict[str, Path], list[str]]:
    """The files with a tokenizer or a processor of another input, where the first was saved without and the other's
    fits: as many rows of token embeddings; the same type of model. And what to say of it.
    """
    found, notes = dict(files), list[str]()
    lacks_tokenizer = not any(_matches(name, _VOCABULARY_FILES) for name in found)
    lacks_processor = not any(_matches(name, _PROCESSOR_FILES) for name in found)
    model_type = inputs[0].config.get("model_type")
    for other, name, rows in zip(inputs[1:], called[1:], vocabularies[1:], strict=True):
        theirs = _of(other) if lacks_tokenizer else {}
        if any(_matches(file, _VOCABULARY_FILES) for file in theirs):
            lacks_tokenizer = False
            if rows and set(rows) == set(vocabularies[0]):
                found = theirs | found
                notes.append(
                    f"{called[0]} has no tokenizer: that of {name} is taken, which has as many rows ({max(rows):,})"
                )
            else:
                differ = f"{_counts(rows)} there, {_counts(vocabularies[0])} here"
                notes.append(f"no tokenizer: {called[0]} has none, and that of {name} may not fit (rows: {differ})")
        same = model_type is not None and other.config.get("model_type") == model_type
        if lacks_processor and same and other.folder:
            processor = carried_files(other.folder, _PROCESSOR_FILES)
            if processor:
                lacks_processor = False
                found = processor | found
                notes.append(f"{called[0]} has no processor: that of {name} is taken ({', '.join(sorted(processor))})")
    return found, notes


def _with_code(
    files: Mapping[str, Path], inputs: Sequence[Checkpoint], called: Sequence[str]
) -> tuple[dict[str, Path], list[str]]:
    """The files with the model code that their configs name (`auto_map`) and that is not there, of the first input that
    has it; a loader would miss it. And what to say of it, and of modules that only another input has.
    """
    found, notes = dict(files), list[str]()
    lacking = _code_named(files) - files.keys()
    for other, name in zip(inputs[1:], called[1:], strict=True):
        theirs = carried_files(other.folder) if other.folder and lacking else {}
        if lacking and lacking <= _code_named(theirs) & theirs.keys():
            code = {file: path for file, path in theirs.items() if file.endswith(".py") and file not in found}
            found |= code
            listed = ", ".join(map(printable, sorted(code)))
            notes.append(f"{called[0]} lacks the code that its auto_map names: that of {name} is taken ({listed})")
            lacking = set()
    if lacking:
        listed = ", ".join(map(printable, sorted(lacking)))
        notes.append(f"auto_map names {listed}, which is not there: a loader will miss it")
    if files and MODULES not in files:
        having = [name for other, name in zip(inputs[1:], called[1:], strict=True) if _has(other, MODULES)]
        if having:
            notes.append(
                f"{' and '.join(having)} has {MODULES} (pooling and other modules), {called[0]} has none: the output "
                "has the transformer alone"
            )
    return found, notes


def _has(checkpoint: Checkpoint, file: str) -> bool:
    return checkpoint.folder is not None and beside(checkpoint.folder, file) is not None


def _code_named(files: Mapping[str, Path]) -> set[str]:
    """The files of code in the same folder that configs name under `auto_map`."""
    named: set[str] = set()
    for file in _WITH_CODE & files.keys():
        with suppress(CheckpointError):
            auto_map = read_object(files[file]).get("auto_map")
            values = auto_map.values() if isinstance(auto_map, dict) else ()
            for value in (one for each in values for one in (each if isinstance(each, list) else [each])):
                if isinstance(value, str) and (match := _IN_THIS_FOLDER.fullmatch(value)):
                    named.add(f"{match['module']}.py")
    return named


_WITH_CODE = frozenset({CONFIG, _TOKENIZER_CONFIG, "processor_config.json", "preprocessor_config.json"})
_IN_THIS_FOLDER = re.compile(r"(?P<module>\w+)\.\w+", re.ASCII)


def _counts(rows: Collection[int]) -> str:
    return " and ".join(f"{number:,}" for number in sorted(rows)) or "none known"


_DECIDES = re.compile(
    r"rope|rotary|alibi|(?:^|_)heads?(?:_|$)|window|(?:^|_)eps|epsilon|(?:^|_)act(?:ivation)?(?:_|$)|soft_?cap"
    r"|_scal(?:ar|e|ing)|(?:^|_)scale_|multiplier|pre_attn|layer_types|norm_type|parallel_(?:residual|attn)"
    r"|attention_bias|position_embedding_type|patch_size|tie_word_embeddings|chunk_size|tokens?_ids?$|clip_qkv|qk_norm"
    r"|stable_layer_norm|extract_norm|experts_per_tok|norm_topk|moe_topk|scoring_func|is_causal|pool(?:er|ing)?_type"
    r"|vision_feature|prediction_type"
)
"""Keys of a config that decide how weights are used."""
_TOKEN_IDS = re.compile(r"tokens?_ids?$")


def disagreements(inputs: Sequence[Checkpoint], called: Sequence[str], *, of_an_edit: bool) -> Iterator[str]:
    """What is said of configs and tokenizers that use the weights in other ways than the first input's, which the
    output has. Of an edit's base the ids of special tokens are no matter: a fine-tune may have other ones.

    Args:
        inputs: the one that the output is like, then the others.
        called: what to call each.
        of_an_edit: whether they are a fine-tune and its base.
    """
    first, own = inputs[0], dict(_deciding(inputs[0].config))
    for other, name in zip(inputs[1:], called[1:], strict=True):
        theirs = dict(_deciding(other.config))
        if not theirs or not own or first.config.get("model_type") != other.config.get("model_type"):
            continue
        keys = [key for key in own | theirs if own.get(key) != theirs.get(key)]
        keys = [key for key in keys if not (of_an_edit and _TOKEN_IDS.search(key))]
        if keys:
            differ = [f"{key}: {_shown(own.get(key))} and {_shown(theirs.get(key))}" for key in keys]
            yield f"the configs of {called[0]}, which the output has, and of {name} differ:\n{some(differ, 16)}"
    own_tokens = {} if of_an_edit else special_tokens(first)
    for other, name in zip(inputs[1:], called[1:], strict=True):
        tokens = special_tokens(other) if own_tokens else {}
        ids = [token for token in sorted(own_tokens.keys() & tokens.keys()) if own_tokens[token] != tokens[token]]
        if ids:
            differ = [f"{token}: {_shown(own_tokens[token])} and {_shown(tokens[token])}" for token in ids]
            yield (
                f"the tokenizers of {called[0]}, which the output has, and of {name} have other special tokens under "
                f"one id:\n{some(differ)}"
            )


def _deciding(config: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if key.endswith("_config") and isinstance(value, Mapping):
            if key != QUANTIZATION:
                yield from _deciding(value, f"{within}{key}.")
        elif _DECIDES.search(key):
            yield f"{within}{key}", value


def _shown(value: Any) -> str:
    text = "not there" if value is None else json.dumps(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_LONGEST_SHOWN = 80


def special_tokens(checkpoint: Checkpoint) -> dict[int, str]:
    """The tokens that a folder's tokenizer adds to its vocabulary, special ones among them, by id. None where the files
    that say so are missing or of another form.
    """
    found: dict[int, str] = {}
    files = _of(checkpoint)
    with suppress(CheckpointError):
        if "tokenizer.json" in files:
            added = read_object(files["tokenizer.json"]).get("added_tokens")
            for token in added if isinstance(added, list) else ():
                if isinstance(token, dict) and type(token.get("id")) is int and isinstance(token.get("content"), str):
                    found[token["id"]] = token["content"]
    with suppress(CheckpointError):
        if not found and _TOKENIZER_CONFIG in files:
            decoder = read_object(files[_TOKENIZER_CONFIG]).get("added_tokens_decoder")
            for number, token in decoder.items() if isinstance(decoder, dict) else ():
                if number.isdecimal() and isinstance(token, dict) and isinstance(token.get("content"), str):
                    found[int(number)] = token["content"]
    with suppress(CheckpointError):
        if not found and _ADDED_TOKENS in files:
            added = read_object(files[_ADDED_TOKENS])
            found = {number: content for content, number in added.items() if type(number) is int}
    return found


def _with_chat_template(
    files: Mapping[str, Path], source: Checkpoint, written: Mapping[str, bytes]
) -> tuple[dict[str, Path], dict[str, bytes]]:
    """The files with another input's chat template: in files of its own, or in the tokenizer's config; of some it is
    known what will be written.
    """
    patterns = _TEMPLATE_FILES
    of_source = _of(source)
    theirs = {name: path for name, path in of_source.items() if _matches(name, patterns)}
    theirs_config = of_source.get(_TOKENIZER_CONFIG)
    inside = read_object(theirs_config).get("chat_template") if theirs_config else None
    if inside is not None and not isinstance(inside, (str, list)):
        raise CheckpointError(
            f"{theirs_config}: its chat_template is {type(inside).__name__}, not text or a list of templates",
            hint="The file is damaged: copy or download it again.",
        )
    if not theirs and inside is None:
        raise CheckpointError(
            f"chat_template: {source.name} has no chat template",
            hint="Name an input that has one, or leave the key out.",
        )
    merged = {name: path for name, path in files.items() if not _matches(name, patterns)} | theirs
    if _TOKENIZER_CONFIG not in merged:
        if inside is None or theirs_config is None:
            return merged, {}
        if not isinstance(inside, str):
            raise CheckpointError(
                f"chat_template: {source.name} has several templates in its {_TOKENIZER_CONFIG}, and the output has no "
                "such file to put them in",
                hint="Take its tokenizer as well: tokenizer_source.",
            )
        merged[_CHAT_TEMPLATE] = theirs_config
        try:
            return merged, {_CHAT_TEMPLATE: inside.encode()}
        except UnicodeEncodeError as error:
            raise CheckpointError(
                f"{theirs_config}: its chat_template holds {inside[error.start]!r}, which is not valid text",
                hint="The file is damaged: copy or download it again.",
            ) from error
    config = (
        json.loads(written[_TOKENIZER_CONFIG])
        if _TOKENIZER_CONFIG in written
        else read_object(merged[_TOKENIZER_CONFIG])
    )
    config.pop("chat_template", None)
    if inside is not None:
        config["chat_template"] = inside
    return merged, {_TOKENIZER_CONFIG: _as_json(config, ascii_only=False)}


def _as_json(value: Any, *, ascii_only: bool = True) -> bytes:
    """JSON as it is written beside weights; what is no text (half a character) stays the escape that it came as."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=ascii_only).encode() + b"\n"
    except UnicodeEncodeError:
        return _as_json(value)


def _follow(
    config: Mapping[str, Any],
    *,
    dtype: str | None,
    rows: Mapping[int, int],
    ids: Mapping[str, Any] | None,
    top: bool = True,
) -> dict[str, Any]:
    """A config whose dtype and vocabulary are those of the new weights, in its nested configs too.

    Args:
        config: as it was.
        dtype: what the weights are now; None if that did not change.
        rows: numbers of vocabulary rows that became another number.
        ids: where the ids of special tokens come from, if not from `config`.
        top: whether it is the outermost.
    """
    changed = dict(config) if ids is None else _with_ids(config, ids, add=top)
    for key, value in config.items():
        if key in ("dtype", "torch_dtype") and dtype and isinstance(value, str):
            changed[key] = dtype
        elif key == QUANTIZATION:  # left behind: what was opened is whole
            del changed[key]
        elif key == "vocab_size" and type(value) is int and value in rows:
            changed[key] = rows[value]
        elif key.endswith("config") and isinstance(value, dict):
            inner = ids.get(key) if ids is not None else None
            nested = inner if isinstance(inner, Mapping) else ids
            changed[key] = _follow(value, dtype=dtype, rows=rows, ids=nested, top=False)
    if top and dtype and "model_type" in config and not {"dtype", "torch_dtype"} & config.keys():
        changed["torch_dtype"] = dtype
    return changed


def _quantised(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says what another one does of how weights are quantised, in the same place."""
    changed = dict(config)
    if QUANTIZATION in like:
        return changed | {QUANTIZATION: like[QUANTIZATION]}
    for key, inner in like.items():
        if key.endswith("_config") and isinstance(inner, Mapping) and QUANTIZATION in inner:
            own = changed.get(key)
            if isinstance(own, dict):
                changed[key] = own | {QUANTIZATION: inner[QUANTIZATION]}
    return changed


def _claims(folder: Path) -> dict[str, Path]:
    """The files beside a config that say how weights are quantised."""
    names = [name for name in _listed(folder) if name.endswith(".json") and _matches(name, _QUANTISED)]
    return {name: path for name in names if (path := beside(folder, name)) is not None}


def _with_ids(config: Mapping[str, Any], source: Mapping[str, Any], *, add: bool = True) -> dict[str, Any]:
    """A config whose ids of special tokens are those of another one: what that has, and only that.

    Args:
        config, source: parsed JSON.
        add: also those that `config` did not have.
    """
    ids = {key: value for key, value in source.items() if key.endswith(("_token_id", "_token_ids"))}
    kept = {
        key: ids.get(key, value)
        for key, value in config.items()
        if key in ids or not key.endswith(("_token_id", "_token_ids"))
    }
    return kept | ids if add else kept


def index_file(stem: str, weight_map: Mapping[str, str], *, nbytes: int, parameters: int) -> Sidecar:
    """The index of a sharded checkpoint: which file holds which tensor."""
    index = {
        "metadata": {"total_size": nbytes, "total_parameters": parameters},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return Sidecar(f"{stem}.safetensors.index.json", content=_as_json(index))
