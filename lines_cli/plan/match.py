"""Which tensors of the inputs belong together: by name, through tied weights; and what becomes of those left over."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from itertools import chain

from lines_cli.checkpoint.contents import factors_among
from lines_cli.checkpoint.header import TensorInfo
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some
from lines_cli.plan.align import or_so, two_prefixes
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.tied_weights import says_tied, tied_partner
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import Place
from lines_cli.storage.names import natural

Names = tuple[str | None, ...]
"""The names that one output tensor is read from, one for each side; None for a side that lacks it."""


def settle_missing(
    inputs: Inputs,
    own: Sequence[Mapping[str, str]],
    matched: tuple[Mapping[str, Names], Mapping[str, Names]],
    places: Mapping[str, Place],
    recipe: Recipe,
    notes: list[str],
) -> dict[str, Names]:
    """Settle or refuse what some side lacks.

    Args:
        inputs: the inputs.
        own: for each side, its tensors by the leading side's names for them (`aligned_names`).
        matched: tensors that all sides have, and the others (`match_names`).
        places: those of them that lie inside blocks (`places_of_all`).
        recipe: says what becomes of a tensor that some side lacks.
        notes: gets a line for everything that a person should know of.

    Returns:
        Output tensor name -> where it is read from. A row with a None is copied from the first that is not.

    Raises:
        MismatchError: tensors are missing on one side, and the recipe calls that an error; or it does not know of as
            many of them inside blocks as there are.
    """
    rows, incomplete = matched
    inside = missing_in_blocks(inputs, rows, incomplete, places)
    if incomplete and recipe.missing == "error":
        raise _missing(inputs, own, matched, inside)
    if len(inside) != (recipe.missing_in_blocks or 0):
        raise _missing_in_blocks(inputs, matched, inside, recipe)
    _note_incomplete(inputs, incomplete, recipe, notes)
    staying = {**rows, **kept(inputs, incomplete, recipe.missing)}
    if not staying:
        raise nothing_in_common(inputs)
    return staying


def kept(inputs: Inputs, incomplete: Mapping[str, Names], missing: str) -> dict[str, Names]:
    """Of the tensors that some side lacks, those that an output has, by what a recipe says of them; where it says that
    they are an error, those of the leading side.
    """
    if missing == "skip":
        return {}
    if missing == "copy":
        return dict(incomplete)
    if missing == "ft":
        return {name: row for name, row in incomplete.items() if _is_in_a_model(inputs, row)}
    return {name: row for name, row in incomplete.items() if row[inputs.lead] is not None}


def nothing_in_common(inputs: Inputs) -> MismatchError:
    """What is said of inputs of which no tensor is in all."""
    names = " and ".join(checkpoint.name for checkpoint in inputs.checkpoints)
    hint = _under_two_prefixes(inputs, 0) or "Check that they are versions of one model."
    return MismatchError(f"{names} have no tensor in common", hint=hint)


def _under_two_prefixes(inputs: Inputs, paired: int) -> str | None:
    """What says that the names of each side begin with a prefix of its own; None if they do not, or if most tensors
    are paired without.
    """
    if 2 * paired >= min(len(checkpoint.tensors) for checkpoint in inputs.checkpoints):
        return None
    option = "--prefix" if inputs.of_an_edit else "prefix:"
    ways = two_prefixes(inputs)
    return f"If the two sides have the same tensors behind other prefixes: {or_so(option, ways)}" if ways else None


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
        elif partner := _tied_in(inputs, inputs.lead, row, resize=resize):
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
    for side, there in enumerate(row):
        if there is None and (partner := _tied_in(inputs, side, row, resize=resize)):
            filled[side] = partner
            whose = inputs.called(side)
            notes.append(
                f"{printable(name)} is not in {whose}, whose config ties it to {printable(partner)}, used for it"
            )
    return tuple(filled)


def _tied_in(inputs: Inputs, side: int, row: Names, *, resize: bool) -> str | None:
    """The tensor that a side has instead of one that it lacks, because there the two are one weight."""
    having, there = _having(inputs, row)
    tied = says_tied(inputs.checkpoints[side].config or having.config)
    shape = having.tensors[there].info.shape
    return tied_partner(there, shape, inputs.vocabularies[side], tied=tied, resize=resize)


def _note_incomplete(inputs: Inputs, incomplete: Mapping[str, Names], recipe: Recipe, notes: list[str]) -> None:
    by_owners: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        by_owners[tuple(side for side, there in enumerate(row) if there is not None)].append(name)
    staying = kept(inputs, incomplete, recipe.missing)
    for owners, names in by_owners.items():
        stays = names[0] in staying
        whose = " and ".join(inputs.called(side) for side in owners)
        done = "left out" if not stays else "copied as they are"
        if not stays and inputs.lead in owners:
            done += ", though the output's config has a place for them: a loader may fill it at random"
        if stays and len(owners) > 1:
            done += f" from {inputs.called(owners[0])}"
        notes.append(f"{len(names):,} tensor(s) of {whose} alone, {done}:\n{some(sorted(names))}")


# --- tensors that some side lacks ---


def missing_in_blocks(
    inputs: Inputs, rows: Mapping[str, Names], incomplete: Mapping[str, Names], places: Mapping[str, Place]
) -> dict[str, Names]:
    """Of the tensors that some side lacks, those inside blocks: there a tensor without a partner is rather one that is
    called otherwise, and would be left as it is among others that are scaled.

    Not counted are buffers that loaders make anew, and a stack that some sides have for themselves (the vision tower
    beside a language model), while the others have nothing there that could be its partner.
    """
    inside = {
        name: row
        for name, row in incomplete.items()
        if name in places and not _is_made_anew(name, _stored(inputs, row).shape)
    }
    stacks: dict[str, dict[str, Names]] = defaultdict(dict)
    for name, row in inside.items():
        stacks[places[name].stack][name] = row
    shared = {places[name].stack for name in rows if name in places}
    return {
        name: row
        for stack, held in stacks.items()
        if stack in shared or not _is_a_part_of_its_own(held, inside, incomplete)
        for name, row in held.items()
    }


def _is_a_part_of_its_own(
    held: Mapping[str, Names], inside: Mapping[str, Names], incomplete: Mapping[str, Names]
) -> bool:
    """Whether the same sides have all of a stack, and those that lack it have no tensors in blocks and few elsewhere
    that could be meant by it.
    """
    owners = {_owners(row) for row in held.values()}
    if len(owners) > 1:
        return False
    (having,) = owners

    def could_be_its(name: str) -> bool:
        others = _owners(incomplete[name])
        return name not in held and not others <= having and not having <= others

    return not any(map(could_be_its, inside)) and 2 * sum(map(could_be_its, incomplete)) < len(held)


def _owners(row: Names) -> frozenset[int]:
    """The sides that have a tensor."""
    return frozenset(side for side, there in enumerate(row) if there is not None)


def _stored(inputs: Inputs, row: Names) -> TensorInfo:
    checkpoint, name = _having(inputs, row)
    return checkpoint.tensors[name].info


# Buffers that a loader computes, and nobody learns; and what PEFT keeps of a module beside the one that is trained.
_MADE_ANEW = re.compile(
    r"(?:.*\.)?(?:(?:\w*_)?inv_freq|(?:cos|sin)_cached|masked_bias|num_batches_tracked|position_ids"
    r"|relative_position_index|relative_coords_table|original_module\..*)",
    re.DOTALL,
)
_MASK = re.compile(r"(?:.*\.)?(?:bias|(?:\w*_)?mask)", re.DOTALL)  # GPT-2 calls its causal mask a bias


def _is_made_anew(name: str, shape: tuple[int, ...]) -> bool:
    is_square = len(shape) > 2 and shape[-1] == shape[-2] and math.prod(shape[:-2]) == 1
    return _MADE_ANEW.fullmatch(name) is not None or (is_square and _MASK.fullmatch(name) is not None)


def _missing(
    inputs: Inputs,
    own: Sequence[Mapping[str, str]],
    matched: tuple[Mapping[str, Names], Mapping[str, Names]],
    inside: Mapping[str, Names],
) -> MismatchError:
    rows, incomplete = matched
    nothing_in_common = len(incomplete) == len(set().union(*own))
    which = "two sides" if len(inputs.checkpoints) == 2 else "inputs"
    parts = [f"the {which} {'have no tensor in common' if nothing_in_common else 'do not hold the same tensors'}."]
    if inside and not nothing_in_common:
        parts.append(_inside(inputs, inside, incomplete))
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
    prefixes = _under_two_prefixes(inputs, len(rows))
    if nothing_in_common:
        hint = prefixes or "No tensor is on both sides. Check that they are versions of one model."
    elif len(inside) == len(incomplete):
        hint = _hint_inside(inputs, inside)
    else:
        which = f"Of the {len(incomplete) - len(inside):,} outside the blocks, " if inside else ""
        hint = which + (_MISSING_OF_AN_EDIT if inputs.of_an_edit else _MISSING)
        hint += f"\n{_hint_inside(inputs, inside)}" if inside else ""
    if prefixes and not nothing_in_common:
        hint = f"{prefixes}\n{hint}"
    return MismatchError("\n".join(parts), hint=hint)


_MISSING_OF_AN_EDIT = (
    "--missing ft gives the fine-tune's set of tensors (as for a new head); --missing copy takes each from the "
    "side that has it; --missing skip leaves them out."
)
_MISSING = (
    "In the recipe, missing: copy takes such a tensor as it is from the base, or from the first model that has "
    "it; missing: ft does so for those that a model has; missing: skip leaves them out."
)


def _missing_in_blocks(
    inputs: Inputs,
    matched: tuple[Mapping[str, Names], Mapping[str, Names]],
    inside: Mapping[str, Names],
    recipe: Recipe,
) -> MismatchError:
    """The recipe knows of another number of them, or of none."""
    rows, incomplete = matched
    key = "--missing-in-blocks" if inputs.of_an_edit else "missing_in_blocks:"
    if not inside:
        return MismatchError(
            f"{key} {recipe.missing_in_blocks}, but no tensor inside blocks is missing on any side",
            hint="Leave it out; or is it another checkpoint that is meant?",
        )
    said = f"; {key} says {recipe.missing_in_blocks:,}" if recipe.missing_in_blocks is not None else ""
    hint = _hint_inside(inputs, inside)
    if ways := _under_two_prefixes(inputs, len(rows)):
        hint = f"{ways}\n{hint}"
    counted, colon, listed = _inside(inputs, inside, incomplete).partition(":\n")
    return MismatchError(f"{counted}{said}{colon}{listed}", hint=hint)


def _inside(inputs: Inputs, inside: Mapping[str, Names], incomplete: Mapping[str, Names]) -> str:
    """How many lie inside blocks, and a few of them, each beside what may be the same on a side that lacks it."""
    shown = []
    for name in sorted(inside, key=natural)[:_MOST_SHOWN]:
        nearest = _nearest(inputs, inside[name], incomplete)
        shown.append(f"  {printable(name)} in {_having(inputs, inside[name])[0].name}{nearest}")
    more = f"\n  ... and {len(inside) - _MOST_SHOWN:,} more" if len(inside) > _MOST_SHOWN else ""
    those = "tensor that some side lacks lies" if len(inside) == 1 else "tensors that some side lacks lie"
    return f"{len(inside):,} {those} inside blocks, where each should have a partner:\n" + "\n".join(shown) + more


_MOST_SHOWN = 4
_MOST_COMPARED = 200


def _nearest(inputs: Inputs, row: Names, incomplete: Mapping[str, Names]) -> str:
    """What the sides that lack a tensor have of its shape, with its numbers, whose name is most like its own."""
    checkpoint, name = _having(inputs, row)
    shape, numbers = checkpoint.tensors[name].info.shape, _NUMBER.findall(name)
    found: dict[str, str] = {}
    for other in incomplete.values():
        for side, there in enumerate(other):
            if there is not None and row[side] is None and len(found) < _MOST_COMPARED:
                holder = inputs.checkpoints[side]
                if holder.tensors[there].info.shape == shape and _NUMBER.findall(there) == numbers:
                    found[there] = holder.name
    nearest = next(iter(get_close_matches(name[:_LONGEST], [there[:_LONGEST] for there in found], n=1)), None)
    return f"; is it {printable(nearest)} of {found[nearest]}?" if nearest in found else ""


_NUMBER = re.compile(r"\d+")
_LONGEST = 200


def _hint_inside(inputs: Inputs, inside: Mapping[str, Names]) -> str:
    said = f"--missing-in-blocks {len(inside)}" if inputs.of_an_edit else f"missing_in_blocks: {len(inside)}"
    beside = "--missing" if inputs.of_an_edit else "missing:"
    hint = (
        "Inside blocks a tensor without a partner is mostly one that the other side calls otherwise: rename it there. "
        f"If one side really has more, {said}, beside {beside}, says so."
    )
    factors = _factors_in(inputs, inside)
    if not factors:
        return hint
    of_adapter = (
        f"{len(factors):,} of them are factors of an adapter that is not folded into its weights, such as "
        f"{printable(factors[0])}; beside weights that are scaled they would still act in full. {FOLD}"
    )
    if len(factors) == len(inside):
        return f"{of_adapter} If they are to stay as they are, {said}, beside {beside}, says so."
    return f"{of_adapter}\n{hint}"


FOLD = "Fold it into its base first (peft: merge_and_unload, then save_pretrained), and give that folder."


def _factors_in(inputs: Inputs, inside: Mapping[str, Names]) -> list[str]:
    """Those that are an adapter's factors, by the names that they have where they are."""
    found = []
    for checkpoint in {one.name: one for one in inputs.checkpoints}.values():
        factors = set(factors_among({name: stored.info for name, stored in checkpoint.tensors.items()}))
        found += [name for row in inside.values() for name in row if name in factors] if factors else []
    return list(dict.fromkeys(found))
