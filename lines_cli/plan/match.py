"""Which tensors of the inputs belong together: by name, through tied weights; and what is left over."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import MismatchError, printable, some
from lines_cli.recipe.schema import Recipe

# Modules with a row per vocabulary entry, by their names; and words that say an embedding is of something else.
_TOKEN_EMBEDDINGS = frozenset(
    "embed_tokens embed_tokens_per_layer wte word_embeddings word_embedding tok_embeddings token_embedding embed_in "
    "shared embeddings embedding".split()
)
_TOKEN_HEADS = frozenset(
    "lm_head lm_heads lm_loss embed_out output output_layer decoder predictions proj_out vocab_projector "
    "generator_lm_head final_logits_bias".split()
)
_NOT_OF_TOKENS = re.compile(r"pos|tile|patch|type|class|time")

Names = tuple[str | None, ...]
"""The names that one output tensor is read from, one for each side; None for a side that lacks it."""


@dataclass(frozen=True)
class Sides:
    """The inputs of a merge in the order of their files: the base, if there is one, and the models.

    Attributes:
        checkpoints: all of them.
        has_base: whether the first is the base.
        lead: the number of the one that the output is like: its names, dtypes, integers and config.
        of_an_edit: whether they are a base and one fine-tune that the output is like, and are called so.
    """

    checkpoints: tuple[Checkpoint, ...]
    has_base: bool
    lead: int
    of_an_edit: bool

    @property
    def leading(self) -> Checkpoint:
        return self.checkpoints[self.lead]

    @property
    def models(self) -> tuple[Checkpoint, ...]:
        """Those that are merged."""
        return self.checkpoints[1 if self.has_base else 0 :]

    def called(self, side: int) -> str:
        """What a message calls one of them."""
        if self.has_base and side == 0:
            return "the base"
        return "the fine-tune" if self.of_an_edit else self.checkpoints[side].name

    def config_of(self, side: int) -> Mapping[str, Any]:
        """Its config; of a lone file, the leading side's or the first that there is."""
        known = (self.checkpoints[side].config, self.leading.config, *(c.config for c in self.checkpoints))
        return next((config for config in known if config), {})


def pair_tensors(sides: Sides, own: Sequence[Mapping[str, str]], recipe: Recipe, notes: list[str]) -> dict[str, Names]:
    """Pair the tensors of all sides by name; see through tied weights; settle or refuse what is left over.

    Args:
        sides: the inputs.
        own: for each side, its tensors by the leading side's names for them (`aligned_names`).
        recipe: says what becomes of a tensor that some side lacks and that is not tied.
        notes: gets a line for everything that a person should know of.

    Returns:
        Output tensor name -> where it is read from. A row with a None is copied from the first that is not.

    Raises:
        MismatchError: tensors are missing on one side, and the recipe calls that an error.
    """
    rows, incomplete = match_names(sides, own, resize=recipe.resize != "error", notes=notes)
    if incomplete and recipe.missing == "error":
        raise _missing(sides, own, incomplete)
    _note_incomplete(sides, incomplete, recipe, notes)
    if recipe.missing == "copy":
        rows.update(incomplete)
    elif recipe.missing == "ft":
        rows.update({name: row for name, row in incomplete.items() if _is_in_a_model(sides, row)})
    if not rows:
        raise strangers(sides)
    return rows


def strangers(sides: Sides) -> MismatchError:
    """What is said of inputs of which no tensor is in all."""
    names = " and ".join(checkpoint.name for checkpoint in sides.checkpoints)
    return MismatchError(f"{names} have no tensor in common", hint="Are they of one model?")


def match_names(
    sides: Sides, own: Sequence[Mapping[str, str]], *, resize: bool, notes: list[str]
) -> tuple[dict[str, Names], dict[str, Names]]:
    """Pair the tensors of all sides by name, and through tied weights.

    Args:
        sides: the inputs.
        own: for each side, its tensors by the leading side's names for them (`aligned_names`).
        resize: whether tied weights may differ in their number of rows.
        notes: gets a line for every tie that was used.

    Returns:
        Tensor name -> where it is read from: of those that all sides have, and of the others.
    """
    rows: dict[str, Names] = {}
    incomplete: dict[str, Names] = {}
    ordered = dict.fromkeys(chain(own[sides.lead], *own))
    stored: Iterable[Names] = zip(*(map(names.get, ordered) for names in own), strict=True)
    for name, row in zip(ordered, stored, strict=True):
        if None not in row:
            rows[name] = row
        elif row[sides.lead] is not None:
            filled = _through_ties(sides, name, row, resize=resize, notes=notes)
            (incomplete if None in filled else rows)[name] = filled
        elif partner := _tied_in_lead(sides, row, resize=resize):
            whose = sides.called(sides.lead)
            notes.append(f"{printable(name)} is not in {whose}, whose config ties it to {printable(partner)}: left out")
        else:
            incomplete[name] = row
    return rows, incomplete


def _is_in_a_model(sides: Sides, row: Names) -> bool:
    return any(name is not None for name in row[1 if sides.has_base else 0 :])


def _having(sides: Sides, row: Names) -> tuple[Checkpoint, str]:
    """The first side that has a tensor, the leading one before all others, and its name there."""
    for side in (sides.lead, *range(len(row))):
        if (name := row[side]) is not None:
            return sides.checkpoints[side], name
    raise AssertionError


def _through_ties(sides: Sides, name: str, row: Names, *, resize: bool, notes: list[str]) -> Names:
    """The row with each gap filled by the tensor that is the same weight there."""
    filled = list(row)
    having, there = _having(sides, row)
    for side, lacking in enumerate(sides.checkpoints):
        if row[side] is None and (partner := _tied_partner(there, lacking=lacking, having=having, resize=resize)):
            filled[side] = partner
            whose = sides.called(side)
            notes.append(
                f"{printable(name)} is not in {whose}, whose config ties it to {printable(partner)}, used for it"
            )
    return tuple(filled)


def _tied_in_lead(sides: Sides, row: Names, *, resize: bool) -> str | None:
    """The tensor that the leading side has instead, because there the two are one weight."""
    having, there = _having(sides, row)
    return _tied_partner(there, lacking=sides.leading, having=having, resize=resize)


def _note_incomplete(sides: Sides, incomplete: Mapping[str, Names], recipe: Recipe, notes: list[str]) -> None:
    by_owners: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        by_owners[tuple(side for side, there in enumerate(row) if there is not None)].append(name)
    for owners, names in by_owners.items():
        kept = recipe.missing == "copy" or (recipe.missing == "ft" and _is_in_a_model(sides, incomplete[names[0]]))
        whose = " and ".join(sides.called(side) for side in owners)
        done = "left out" if not kept else "copied as they are"
        if not kept and sides.lead in owners:
            done += ", though the output's config has a place for them: a loader may fill it at random"
        if kept and len(owners) > 1:
            done += f" from {sides.called(owners[0])}"
        notes.append(f"{len(names):,} tensor(s) of {whose} alone, {done}:\n{some(sorted(names))}")


def _missing(sides: Sides, own: Sequence[Mapping[str, str]], incomplete: Mapping[str, Names]) -> MismatchError:
    strangers = len(incomplete) == len(set().union(*own))
    which = "two sides" if len(sides.checkpoints) == 2 else "inputs"
    parts = [f"the {which} {'have no tensor in common' if strangers else 'do not hold the same tensors'}."]
    lacking: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, row in incomplete.items():
        owner = next(side for side, there in enumerate(row) if there is not None)
        for side, there in enumerate(row):
            if there is None:
                lacking[owner, side].append(name)
    for (owner, side), names in sorted(lacking.items()):
        holder, lacker = sides.checkpoints[owner], sides.checkpoints[side]
        parts.append(
            f"{len(names):,} of {len(holder.tensors):,} in {holder.name} that {lacker.name} lacks:\n"
            f"{some(sorted(names), 2 if strangers else 8)}"
        )
    hint = (
        "--missing ft gives the fine-tune's set of tensors (as for a new head); --missing copy takes each from the "
        "side that has it; --missing skip leaves them out."
    )
    if not sides.of_an_edit:
        hint = (
            "In the recipe, missing: copy takes such a tensor as it is from the base, or from the first model that has "
            "it; missing: ft does so for those that a model has; missing: skip leaves them out."
        )
    if strangers:
        hint = "No tensor is on both sides. Are they of one model?"
    return MismatchError("\n".join(parts), hint=hint)


def aligned_names(sides: Sides, notes: list[str]) -> list[dict[str, str]]:
    """For each side, its own names by the leading side's names for the same tensors."""
    return [
        {name: name for name in sides.leading.tensors}
        if side == sides.lead
        else _names_in(checkpoint, sides, side, notes)
        for side, checkpoint in enumerate(sides.checkpoints)
    ]


def _names_in(other: Checkpoint, sides: Sides, side: int, notes: list[str]) -> dict[str, str]:
    """The tensors of one side by the names that the leading one has for them.

    A model saved by itself and one saved inside another (GPT-2's `h.0` and `transformer.h.0`) differ by one prefix, as
    transformers, too, sees on loading. It is taken off or put on where most names match with it, and not without it.
    """
    lead = sides.leading
    direct = sum(name in other.tensors for name in lead.tensors)
    if 2 * direct < min(len(other.tensors), len(lead.tensors)):
        for longer, shorter, where in ((lead, other, sides.lead), (other, lead, side)):
            prefix = _common_prefix(longer, shorter)
            if prefix:
                others = "those of the other side" if len(sides.checkpoints) == 2 else f"those of {shorter.name}"
                whose = sides.called(where)
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


def _tied_partner(name: str, *, lacking: Checkpoint, having: Checkpoint, resize: bool) -> str | None:
    """The tensor that stands for `name` in the side that lacks it, because there the two are one weight.

    That is so where its config (or, of a lone file, the other side's) ties head and token embedding; and always between
    the token embeddings of an encoder-decoder and its `shared` one. `resize` allows another number of rows.
    """
    if not is_vocabulary(name):
        return None
    shape = having.tensors[name].info.shape
    alike = [
        other
        for other, stored in lacking.tensors.items()
        if is_vocabulary(other) and _same_but_rows(stored.info.shape, shape)
    ]
    same = [other for other in alike if lacking.tensors[other].info.shape == shape]
    fitting = same or (alike if resize and _module(name) in _TOKEN_HEADS else [])
    shared = [other for other in fitting if _module(other) == "shared"]
    if shared and _module(name) == "embed_tokens":
        return shared[0]
    if _module(name) not in _TOKEN_HEADS or not says_tied(lacking.config or having.config):
        return None
    embeddings = [other for other in fitting if _module(other) in _TOKEN_EMBEDDINGS] or fitting
    return embeddings[0] if len(embeddings) == 1 else shared[0] if shared else None


def _same_but_rows(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    return len(a) == len(b) and a[1:] == b[1:]


def tied_embedding(name: str, side: Checkpoint, config: Mapping[str, Any]) -> str | None:
    """The token embedding that `config` ties the head `name` to, where `side` stores both."""
    if _module(name) not in _TOKEN_HEADS or name not in side.tensors or not says_tied(config):
        return None
    shape = side.tensors[name].info.shape
    alike = [other for other in side.tensors if _module(other) in _TOKEN_EMBEDDINGS and is_vocabulary(other)]
    embeddings = [other for other in alike if side.tensors[other].info.shape == shape]
    return min(embeddings, key=lambda other: (_module(other) != "shared", other.count("."), other), default=None)


def tied_copies(names: Collection[str], side: Checkpoint, config: Mapping[str, Any]) -> set[str]:
    """Of tensors that hold the same, those that do so by design: heads that are tied to an embedding among them, and
    the token embeddings of an encoder-decoder beside its `shared` one.
    """
    embeddings = [name for name in names if _module(name) in _TOKEN_EMBEDDINGS and is_vocabulary(name)]
    tied = {name for name in names if embeddings and tied_embedding(name, side, config) is not None}
    if any(_module(name) == "shared" for name in embeddings):
        tied |= {name for name in embeddings if _module(name) == "embed_tokens"}
    return tied


def _module(name: str) -> str:
    """The module that a weight or bias belongs to, without a number at its end; a bare parameter is its own."""
    *modules, last = name.split(".")
    if last not in ("weight", "bias"):
        return last if last == "final_logits_bias" else ""
    return next((module for module in reversed(modules) if not module.isdecimal()), "")


def is_vocabulary(name: str) -> bool:
    """Whether a tensor has a row per vocabulary entry: a token embedding, or a head over tokens, or its bias."""
    return _module(name) in _TOKEN_EMBEDDINGS | _TOKEN_HEADS and not _NOT_OF_TOKENS.search(name)


def says_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the head to the token embedding.

    transformers before 5 leaves `tie_word_embeddings` out where it is true, its default; from 5 on it is written.
    """
    nested = (config.get(key) for key in ("text_config", "decoder", "language_config"))
    for part in (config, *(part for part in nested if isinstance(part, dict))):
        if "tie_word_embeddings" in part:
            return part["tie_word_embeddings"] is True
    version = re.match(r"\d{1,9}", str(config.get("transformers_version", "0")))
    return "model_type" in config and version is not None and int(version[0]) < 5
