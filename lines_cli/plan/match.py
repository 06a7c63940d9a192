"""Which tensors of the inputs belong together: by name, through tied weights; and what is left over."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.tied_weights import tied_partner
from lines_cli.recipe.schema import Recipe

Names = tuple[str | None, ...]
"""The names that one output tensor is read from, one for each side; None for a side that lacks it."""


def pair_tensors(
    inputs: Inputs, own: Sequence[Mapping[str, str]], recipe: Recipe, notes: list[str]
) -> dict[str, Names]:
    """Pair the tensors of all sides by name; see through tied weights; settle or refuse what is left over.

    Args:
        inputs: the inputs.
        own: for each side, its tensors by the leading side's names for them (`aligned_names`).
        recipe: says what becomes of a tensor that some side lacks and that is not tied.
        notes: gets a line for everything that a person should know of.

    Returns:
        Output tensor name -> where it is read from. A row with a None is copied from the first that is not.

    Raises:
        MismatchError: tensors are missing on one side, and the recipe calls that an error.
    """
    rows, incomplete = match_names(inputs, own, resize=recipe.resize != "error", notes=notes)
    if incomplete and recipe.missing == "error":
        raise _missing(inputs, own, incomplete)
    _note_incomplete(inputs, incomplete, recipe, notes)
    if recipe.missing == "copy":
        rows.update(incomplete)
    elif recipe.missing == "ft":
        rows.update({name: row for name, row in incomplete.items() if _is_in_a_model(inputs, row)})
    if not rows:
        raise nothing_in_common(inputs)
    return rows


def nothing_in_common(inputs: Inputs) -> MismatchError:
    """What is said of inputs of which no tensor is in all."""
    names = " and ".join(checkpoint.name for checkpoint in inputs.checkpoints)
    return MismatchError(f"{names} have no tensor in common", hint="Check that they are versions of one model.")


def match_names(
    inputs: Inputs, own: Sequence[Mapping[str, str]], *, resize: bool, notes: list[str]
) -> tuple[dict[str, Names], dict[str, Names]]:
    """Pair the tensors of all sides by name, and through tied weights.

    Args:
        inputs: the inputs.
        own: for each side, its tensors by the leading side's names for them (`aligned_names`).
        resize: whether tied weights may differ in their number of rows.
        notes: gets a line for every tie that was used.

    Returns:
        Tensor name -> where it is read from: of those that all sides have, and of the others.
    """
    rows: dict[str, Names] = {}
    incomplete: dict[str, Names] = {}
    ordered = dict.fromkeys(chain(own[inputs.lead], *own))
    stored: Iterable[Names] = zip(*(map(names.get, ordered) for names in own), strict=True)
    for name, row in zip(ordered, stored, strict=True):
        if None not in row:
            rows[name] = row
        elif row[inputs.lead] is not None:
            filled = _through_ties(inputs, name, row, resize=resize, notes=notes)
            (incomplete if None in filled else rows)[name] = filled
        elif partner := _tied_in_lead(inputs, row, resize=resize):
            whose = inputs.called(inputs.lead)
            notes.append(f"{printable(name)} is not in {whose}, whose config ties it to {printable(partner)}: left out")
        else:
            incomplete[name] = row
    return rows, incomplete


def _is_in_a_model(inputs: Inputs, row: Names) -> bool:
    return any(name is not None for name in row[1 if inputs.has_base else 0 :])


def _having(inputs: Inputs, row: Names) -> tuple[Checkpoint, str]:
    """The first side that has a tensor, the leading one before all others, and its name there."""
    for side in (inputs.lead, *range(len(row))):
        if (name := row[side]) is not None:
            return inputs.checkpoints[side], name
    raise AssertionError


def _through_ties(inputs: Inputs, name: str, row: Names, *, resize: bool, notes: list[str]) -> Names:
    """The row with each gap filled by the tensor that is the same weight there."""
    filled = list(row)
    having, there = _having(inputs, row)
    for side, lacking in enumerate(inputs.checkpoints):
        if row[side] is None and (partner := tied_partner(there, lacking=lacking, having=having, resize=resize)):
            filled[side] = partner
            whose = inputs.called(side)
            notes.append(
                f"{printable(name)} is not in {whose}, whose config ties it to {printable(partner)}, used for it"
            )
    return tuple(filled)


def _tied_in_lead(inputs: Inputs, row: Names, *, resize: bool) -> str | None:
    """The tensor that the leading side has instead, because there the two are one weight."""
    having, there = _having(inputs, row)
    return tied_partner(there, lacking=inputs.leading, having=having, resize=resize)


def _note_incomplete(inputs: Inputs, incomplete: Mapping[str, Names], recipe: Recipe, notes: list[str]) -> None:
    by_owners: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        by_owners[tuple(side for side, there in enumerate(row) if there is not None)].append(name)
    for owners, names in by_owners.items():
        kept = recipe.missing == "copy" or (recipe.missing == "ft" and _is_in_a_model(inputs, incomplete[names[0]]))
        whose = " and ".join(inputs.called(side) for side in owners)
        done = "left out" if not kept else "copied as they are"
        if not kept and inputs.lead in owners:
            done += ", though the output's config has a place for them: a loader may fill it at random"
        if kept and len(owners) > 1:
            done += f" from {inputs.called(owners[0])}"
        notes.append(f"{len(names):,} tensor(s) of {whose} alone, {done}:\n{some(sorted(names))}")


def _missing(inputs: Inputs, own: Sequence[Mapping[str, str]], incomplete: Mapping[str, Names]) -> MismatchError:
    nothing_in_common = len(incomplete) == len(set().union(*own))
    which = "two sides" if len(inputs.checkpoints) == 2 else "inputs"
    parts = [f"the {which} {'have no tensor in common' if nothing_in_common else 'do not hold the same tensors'}."]
    lacking: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        owner = next(side for side, there in enumerate(row) if there is not None)
        for side, there in enumerate(row):
            if there is None:
                lacking[owner, side].append(name)
    for (owner, side), names in sorted(lacking.items()):
        holder, lacker = inputs.checkpoints[owner], inputs.checkpoints[side]
        parts.append(
            f"{len(names):,} of {len(holder.tensors):,} in {holder.name} that {lacker.name} lacks:\n"
            f"{some(sorted(names), 2 if nothing_in_common else 8)}"
        )
    hint = (
        "--missing ft gives the fine-tune's set of tensors (as for a new head); --missing copy takes each from the "
        "side that has it; --missing skip leaves them out."
    )
    if not inputs.of_an_edit:
        hint = (
            "In the recipe, missing: copy takes such a tensor as it is from the base, or from the first model that has "
            "it; missing: ft does so for those that a model has; missing: skip leaves them out."
        )
    if nothing_in_common:
        hint = "No tensor is on both sides. Check that they are versions of one model."
    return MismatchError("\n".join(parts), hint=hint)


def aligned_names(inputs: Inputs, notes: list[str]) -> list[dict[str, str]]:
    """For each side, its own names by the leading side's names for the same tensors."""
    return [
        {name: name for name in inputs.leading.tensors}
        if side == inputs.lead
        else _names_in(checkpoint, inputs, side, notes)
        for side, checkpoint in enumerate(inputs.checkpoints)
    ]


def _names_in(other: Checkpoint, inputs: Inputs, side: int, notes: list[str]) -> dict[str, str]:
    """The tensors of one side by the names that the leading one has for them.

    A model saved by itself and one saved inside another (GPT-2's `h.0` and `transformer.h.0`) differ by one prefix, as
    transformers, too, sees on loading. It is taken off or put on where most names match with it, and not without it.
    """
    lead = inputs.leading
    direct = sum(name in other.tensors for name in lead.tensors)
    if 2 * direct < min(len(other.tensors), len(lead.tensors)):
        for longer, shorter, where in ((lead, other, inputs.lead), (other, lead, side)):
            prefix = _common_prefix(longer, shorter)
            if prefix:
                others = "those of the other side" if len(inputs.checkpoints) == 2 else f"those of {shorter.name}"
                whose = inputs.called(where)
                notes.append(f"names of {whose} begin with {prefix!r}, {others} do not: paired without")
                if longer is lead:
                    with_it = {name: f"{prefix}{name}" for name in other.tensors}
                    # A name that the leading side has, and has only without the prefix, stands for itself.
                    return {
                        name if name in lead.tensors and there not in lead.tensors else there: name
                        for name, there in with_it.items()
                    }
                # A name that stands there with and without the prefix keeps it, so that neither is lost.
                bare = {name: name.removeprefix(prefix) for name in other.tensors}
                return {name if own != name and own in other.tensors else own: name for name, own in bare.items()}
    return {name: name for name in other.tensors}


def _common_prefix(longer: Checkpoint, shorter: Checkpoint) -> str | None:
    """The prefix with which most names of `shorter` are names of `longer`."""
    tried: set[str] = set()
    for sample in sorted(shorter.tensors, key=len, reverse=True)[:_SAMPLES]:
        for other in longer.tensors:
            prefix = other.removesuffix(sample)
            if other.endswith(f".{sample}") and prefix not in tried:
                tried.add(prefix)
                if 2 * sum(f"{prefix}{name}" in longer.tensors for name in shorter.tensors) > len(shorter.tensors):
                    return prefix
    return None


_SAMPLES = 32  # long names, any of which may be one side's own
