"""What a plan puts beside the weights of a folder: copies, the index, the recipe, the model card."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lines_cli.checkpoint.model_card import Card, model_card
from lines_cli.checkpoint.pipeline import component_folders
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.checkpoint.sidecars import (
    Sidecar,
    carried_files,
    carry_over,
    code_among,
    disagreements,
    files_of_component,
    files_of_pipeline,
    index_file,
    left_behind,
    tokenizer_folder,
)
from lines_cli.checkpoint.tokenizer import with_tokens
from lines_cli.errors import RecipeError, printable
from lines_cli.plan.adapter_plan import AnyPlan
from lines_cli.plan.components import Share
from lines_cli.plan.fp8 import layout_of
from lines_cli.plan.identity import inputs_by_name, inputs_read, named_inputs, run_digest
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.plan import Plan
from lines_cli.plan.vocabulary import Vocabulary
from lines_cli.plan.weights import recorded
from lines_cli.recipe.plain_yaml import YamlError, read_yaml
from lines_cli.recipe.schema import UNION
from lines_cli.recipe.yaml_file import dump_recipe, dump_record
from lines_cli.storage.beside import beside
from lines_cli.storage.digest import FileRecord, record_of
from lines_cli.storage.files import read_small
from lines_cli.storage.names import MODEL_CARD, MODEL_INDEX, RECIPE


def with_sidecars(plan: Plan) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the indices come last, so that they are
    written last.
    """
    carried: list[Sidecar] = []
    notes: list[str] = []
    if any(share.component.folder is not None for share in plan.shares):
        carried, notes = _of_components(plan)
    else:
        carried, notes = _of_a_model(
            plan, plan.inputs, _named(plan), plan.rows, plan.vocabulary, dtype=plan.recipe.dtype
        )
    if code := code_among(sidecar.name for sidecar in carried):
        notes.append(f"custom code, carried over and never run here: {', '.join(map(printable, code))}")
    licences = {_shown_licence(front_of(checkpoint)): checkpoint.name for checkpoint in plan.inputs.checkpoints}
    if len(licences.keys() - {""}) > 1:
        each = " and ".join(f"{said or 'none'} ({name})" for said, name in licences.items())
        whose = plan.inputs.leading.name
        notes.append(f"the inputs' model cards name other licences: {each}; the card has that of {whose}")
    plan = replace(plan, sidecars=tuple(carried), notes=(*plan.notes, *notes))
    return replace(plan, sidecars=(*carried, *with_numbers(plan), *_indices(plan)))


_Sources = tuple[Checkpoint | None, Checkpoint | None]
"""The inputs that the tokenizer and the chat template are asked for from; None where none is named."""


def _named(plan: Plan) -> _Sources:
    recipe, by_name = plan.recipe, inputs_by_name(plan)

    def named(name: str | None) -> Checkpoint | None:
        return by_name[str(recipe.base_model) if name == "base" else name] if name is not None else None

    asked = recipe.vocabulary_source
    return named(asked) if asked != UNION else None, named(recipe.chat_template)


def _of_a_model(
    plan: Plan,
    inputs: Inputs,
    named: _Sources,
    rows: Mapping[int, int],
    vocabulary: Vocabulary | None,
    apart: Collection[str] = (),
    *,
    dtype: str | None,
) -> tuple[list[Sidecar], list[str]]:
    """What stands beside the weights of one model, and what to say of it.

    Args:
        plan: the whole one.
        inputs: the model's.
        named: the inputs to take the tokenizer and the chat template from, if they are named.
        rows: numbers of vocabulary rows that became another number.
        vocabulary: the model's tokens, where rows are paired by them.
        apart: folders of other models within the leading one's.
        dtype: what its weights were cast to; None where they keep their own.
    """
    recipe, (tokenizer, template) = plan.recipe, named
    extended: dict[str, bytes] = {}
    if vocabulary is not None:
        tokenizer = inputs.checkpoints[vocabulary.of]
        home = tokenizer_folder(tokenizer)
        if vocabulary.changes_tokenizer and home is not None:
            extended = with_tokens(home, vocabulary.ids, vocabulary.added)
    elif tokenizer is not None and (other_rows := rows.keys() & _vocabularies(inputs, tokenizer)):
        raise RecipeError(
            f"tokenizer_source: {tokenizer.name} has {min(other_rows):,} rows of token embeddings, and "
            f"resize: {recipe.resize} keeps {rows[min(other_rows)]:,}",
            hint="Take the tokenizer of the input whose rows are kept.",
        )
    like = layout_of(recipe, inputs)
    order = [inputs.lead, *(number for number in range(len(inputs.checkpoints)) if number != inputs.lead)]
    checkpoints, called = [inputs.checkpoints[n] for n in order], [inputs.called(n) for n in order]
    carried, notes = carry_over(
        checkpoints,
        called=called,
        dtype=None if recipe.dtype == "fp8" else dtype,
        stored=plan.dtype,
        rows=rows,
        rows_of=inputs.checkpoints[0] if recipe.resize == "base" else inputs.models[0],
        vocabularies=[_vocabularies(inputs, checkpoint) for checkpoint in checkpoints],
        tokenizer=tokenizer,
        extended=extended,
        chat_template=template,
        quantised_like=like,
        apart=apart,
    )
    return carried, [*notes, *disagreements(checkpoints, called, of_an_edit=inputs.of_an_edit)]


def _of_components(plan: Plan) -> tuple[list[Sidecar], list[str]]:
    """What stands beside the weights of several models in one folder, and what to say of it.

    Raises:
        RecipeError: a tokenizer or a chat template is asked for from an input, and they lie in folders of their own.
    """
    lead, folder = plan.inputs.leading, plan.inputs.leading.folder
    assert folder is not None
    folders = {share.component.folder or "" for share in plan.shares}
    whose, apart = plan.inputs.called(plan.inputs.lead), folders - {""}
    is_pipeline = beside(folder, MODEL_INDEX) is not None
    named = _named(plan)
    if is_pipeline and any(named):
        raise RecipeError(
            f"tokenizer_source and chat_template: {lead.name} is a pipeline, whose tokenizers are folders of their own",
            hint="Leave the two out.",
        )
    found: dict[str, Sidecar] = {}
    notes: list[str] = []
    if "" not in folders:
        own = files_of_pipeline(folder, component_folders(folder), folders) if is_pipeline else carried_files(folder)
        found = {name: Sidecar(name, source=own[name]) for name in own if not _is_in(name, apart)}
        notes += left_behind(folder, own, whose, component_folders(folder) if is_pipeline else apart)
    for share in plan.shares:
        carried, said = _of_a_share(plan, share, named, () if share.component.folder else apart)
        within = f"{share.component.folder}/" if share.component.folder else ""
        found |= {within + sidecar.name: replace(sidecar, name=within + sidecar.name) for sidecar in carried}
        notes += [f"{share.name}: {note}" for note in said]
    return list(found.values()), notes


def _is_in(name: str, folders: Collection[str]) -> bool:
    return name.startswith(tuple(f"{folder}/" for folder in folders))


def _of_a_share(plan: Plan, share: Share, named: _Sources, apart: Collection[str]) -> tuple[list[Sidecar], list[str]]:
    """What stands beside the weights of a component, in its own folder; and what to say of it."""
    folder = plan.inputs.leading.folder
    assert folder is not None
    home = share.inputs.leading.folder or folder / (share.component.folder or "")
    is_module = beside(folder, MODEL_INDEX) is None and bool(share.component.folder)
    others = files_of_component(home, module=is_module)
    carried = {name: Sidecar(name, source=path) for name, path in others.items() if not _is_in(name, apart)}
    if share.side is not None and share.inputs.leading.folder is not None:
        own, said = _of_a_model(plan, share.inputs, (None, None), {}, None, apart, dtype=None)
    elif share.side is not None:
        return list(carried.values()), []
    else:
        from_it = _own(plan, share, named[0]), _own(plan, share, named[1])
        own, said = _of_a_model(plan, share.inputs, from_it, *_rows_of(plan, share), apart, dtype=plan.recipe.dtype)
    carried = carried if is_module else {}
    return list((carried | {sidecar.name: sidecar for sidecar in own}).values()), said


def _own(plan: Plan, share: Share, named: Checkpoint | None) -> Checkpoint | None:
    """An input's component by itself."""
    each = zip(plan.inputs.checkpoints, share.inputs.checkpoints, strict=True)
    return next((own for whole, own in each if whole is named), named)


def _rows_of(plan: Plan, share: Share) -> tuple[dict[int, int], Vocabulary | None]:
    """Numbers of vocabulary rows of a component that became another number; and its tokens, if they are paired."""
    specs = [tensor.spec for tensor in plan.tensors if plan.depth.component_of(tensor.name) == share.name]
    rows = {other: spec.rows[1] for spec in specs if spec.rows for other in sorted(spec.rows[0])}
    return rows, plan.vocabulary if any(spec.table for spec in specs) else None


def _indices(plan: Plan) -> Iterator[Sidecar]:
    """The index of each set of several weight files."""
    files: dict[str, list[int]] = defaultdict(list)
    for number, file in enumerate(plan.outputs):
        files[file.name.rpartition("/")[0]].append(number)
    for within, numbers in files.items():
        if len(numbers) < 2:
            continue
        tensors = [tensor for tensor in plan.tensors if tensor.file in numbers]
        names = {number: plan.outputs[number].name.rpartition("/")[2] for number in numbers}
        prefix = plan.outputs[numbers[0]].prefix
        index = index_file(
            names[numbers[0]].partition("-00001-of-")[0],
            {tensor.name.removeprefix(prefix): names[tensor.file] for tensor in tensors},
            nbytes=sum(tensor.info.nbytes for tensor in tensors),
            parameters=sum(tensor.info.numel for tensor in tensors if not tensor.spec.of_format),
        )
        yield replace(index, name=f"{within}/{index.name}" if within else index.name)


def contents_beside(
    plan: AnyPlan, run: Mapping[str, Any], written: Mapping[str, FileRecord], layers: Sequence[Mapping[str, Any]] = ()
) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file beside the weights that is no copy, in the order to write them: the recipe now
    records what was read, and written into all the others. The model card is recorded by itself: people edit it, and an
    edited one is not a damaged output.

    Args:
        plan: a resolved one.
        run: its identity.
        written: what was written into the weight files, and into those that are copies.
        layers: what rounding left of each layer's coefficient.
    """
    records = dict(written)
    for sidecar in plan.sidecars:  # what is known already, as the index is, which is written behind the recipe
        if sidecar.content is not None and sidecar.name != RECIPE:
            records[sidecar.name] = record_of(sidecar.content)
    card = records.pop(MODEL_CARD, None)
    for sidecar in plan.sidecars:
        if sidecar.content is None:
            continue
        content = sidecar.content
        if sidecar.name == RECIPE:
            inputs = inputs_read(plan, run.get("contents", {}))
            content += dump_record(run_digest(run), inputs, records, card, layers).encode()
        yield sidecar.name, content


def with_numbers(plan: Plan) -> tuple[Sidecar, Sidecar]:
    """The sidecars that say what was measured: the model card, and the recipe with everything resolved."""
    recipe, inputs, norms = plan.recipe, plan.inputs, plan.statistics.norms
    named = named_inputs(plan, seen_from=plan.output)
    why = f"(1/{norms.models}) * {norms.total!r} / {norms.merged!r}" if norms else f"1/{plan.number_of_models}"
    weights = recorded(recipe, plan.statistics.squares)
    text = dump_recipe(recipe, named=named, alpha=plan.alpha, why=why, weights=weights)
    card = model_card(
        Card(
            title=plan.output.name if plan.output.name not in ("", "..") else plan.output.resolve().name,
            method=recipe.merge_method,
            about=recipe.method.about,
            calibrated=recipe.calibration.about if recipe.calibration is not None else "",
            base=inputs.checkpoints[0] if inputs.has_base else None,
            models=inputs.models,
            like=inputs.leading,
            alone=plan.gives_one(recipe.values("", 0.0)),
            scaled=recipe.lines is not None,
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.filters(),
            front=front_of(inputs.leading),
            whole=[(s.name, inputs.checkpoints[s.side]) for s in plan.shares if s.side is not None],
            apart=[(name, plan.outside(name)) for name in plan.rules.components],
            code=code_among(sidecar.name for sidecar in plan.sidecars),
        )
    )
    return card, Sidecar(RECIPE, content=text.encode())


_TAKEN_OVER = ("license", "license_name", "license_link", "language", "pipeline_tag")


def front_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the front matter of a checkpoint's model card says of licence, language and use."""
    path = beside(checkpoint.folder, MODEL_CARD) if checkpoint.folder else None
    values: Any = None
    if path is not None:
        with suppress(OSError, UnicodeDecodeError, YamlError):
            begin, _, rest = read_small(path, _LARGEST_CARD).decode("utf-8").replace("\r\n", "\n").partition("---\n")
            values = None if begin.strip() else read_yaml(rest.partition("\n---")[0])[0]
    found = {key: values[key] for key in _TAKEN_OVER if key in values} if isinstance(values, dict) else {}
    return {key: value for key, value in found.items() if _is_said(value)}


_LARGEST_CARD = 2**20


def _is_said(value: Any) -> bool:
    """Whether it is a word, or a list of words."""
    words = value if isinstance(value, list) else [value]
    return bool(words) and all(isinstance(word, str) and word.isprintable() for word in words)


def _shown_licence(front: Mapping[str, Any]) -> str:
    return str(front.get("license_name") or front.get("license") or "")


def _vocabularies(inputs: Inputs, checkpoint: Checkpoint) -> set[int]:
    """How many rows the token embeddings and heads of one of the inputs have."""
    each = zip(inputs.checkpoints, inputs.vocabularies, strict=True)
    return {n for one, shapes in each if one is checkpoint for shape in shapes.values() for n in shape[:1]}
