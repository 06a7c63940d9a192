"""What a plan puts beside the weights of a folder: copies, the index, the recipe, the model card."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from lines_cli.checkpoint.model_card import Card, model_card
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.checkpoint.sidecars import Sidecar, carry_over, disagreements, index_file
from lines_cli.checkpoint.tokenizer import with_tokens
from lines_cli.errors import (
    RecipeError,
)
from lines_cli.plan.adapter_plan import AnyPlan
from lines_cli.plan.identity import inputs_by_name, inputs_read, named_inputs, run_digest
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.plan import Plan
from lines_cli.recipe.plain_yaml import YamlError, read_yaml
from lines_cli.recipe.schema import UNION
from lines_cli.recipe.yaml_file import dump_recipe, dump_record
from lines_cli.storage.beside import beside
from lines_cli.storage.digest import FileRecord, record_of
from lines_cli.storage.files import read_small
from lines_cli.storage.names import MODEL_CARD, RECIPE


def with_sidecars(plan: Plan) -> Plan:
    """The plan with everything that stands beside the weights in a folder; the index comes last, so that it is
    written last.
    """
    recipe, inputs = plan.recipe, plan.inputs
    by_name = inputs_by_name(plan)

    def named(name: str | None) -> Checkpoint | None:
        return by_name[str(recipe.base_model) if name == "base" else name] if name is not None else None

    vocabulary, asked = plan.vocabulary, recipe.vocabulary_source
    tokenizer = named(asked) if asked != UNION else None
    extended: dict[str, bytes] = {}
    if vocabulary is not None:
        tokenizer = inputs.checkpoints[vocabulary.of]
        if vocabulary.changes_tokenizer and tokenizer.folder is not None:
            extended = with_tokens(tokenizer.folder, vocabulary.ids, vocabulary.added)
    elif tokenizer is not None and (other_rows := plan.rows.keys() & _vocabularies(inputs, tokenizer)):
        raise RecipeError(
            f"tokenizer_source: {tokenizer.name} has {min(other_rows):,} rows of token embeddings, and "
            f"resize: {recipe.resize} keeps {plan.rows[min(other_rows)]:,}",
            hint="Take the tokenizer of the input whose rows are kept.",
        )
    order = [inputs.lead, *(number for number in range(len(inputs.checkpoints)) if number != inputs.lead)]
    carried, notes = carry_over(
        [inputs.checkpoints[number] for number in order],
        called=[inputs.called(number) for number in order],
        dtype=recipe.dtype,
        stored=plan.dtype,
        rows=plan.rows,
        rows_of=inputs.checkpoints[0] if recipe.resize == "base" else inputs.models[0],
        vocabularies=[_vocabularies(inputs, inputs.checkpoints[number]) for number in order],
        tokenizer=tokenizer,
        extended=extended,
        chat_template=named(recipe.chat_template),
    )
    notes += disagreements(
        [inputs.checkpoints[number] for number in order],
        [inputs.called(number) for number in order],
        of_an_edit=inputs.of_an_edit,
    )
    licences = {_shown_licence(front_of(checkpoint)): checkpoint.name for checkpoint in inputs.checkpoints}
    if len(licences.keys() - {""}) > 1:
        each = " and ".join(f"{said or 'none'} ({name})" for said, name in licences.items())
        notes.append(f"the inputs' model cards name other licences: {each}; the card has that of {inputs.leading.name}")
    sidecars = [*carried, *with_numbers(plan)]
    if len(plan.outputs) > 1:
        weight_map = {tensor.name: plan.outputs[tensor.file].name for tensor in plan.tensors}
        nbytes = sum(tensor.info.nbytes for tensor in plan.tensors)
        sidecars.append(index_file(inputs.leading.stem, weight_map, nbytes=nbytes, parameters=plan.parameters))
    return replace(plan, sidecars=tuple(sidecars), notes=(*plan.notes, *notes))


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
    text = dump_recipe(recipe, named=named, alpha=plan.alpha, why=why)
    card = model_card(
        Card(
            title=plan.output.name if plan.output.name not in ("", "..") else plan.output.resolve().name,
            method=recipe.merge_method,
            about=recipe.method.about,
            base=inputs.checkpoints[0] if inputs.has_base else None,
            models=inputs.models,
            like=inputs.leading,
            alone=plan.gives_one(recipe.values("", 0.0)),
            scaled=recipe.lines is not None,
            coefficients=plan.coefficients(),
            outside=plan.outside(),
            filters=plan.filters(),
            front=front_of(inputs.leading),
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
