"""Which row of a token embedding or head belongs to which token, where the inputs' tokenizers do not agree.

Rows are paired by their numbers as long as these mean the same tokens. Where they do not, or the output has a
vocabulary of its own (`tokenizer_source: union`), each row of the output is that of a token, and every input is read at
the row that its own tokenizer gives this token. An input that lacks a token has, in its place, what the base has; else
the mean of those that have it.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from lines_cli.checkpoint.header import TensorInfo
from lines_cli.checkpoint.sidecars import tokenizer_folder
from lines_cli.checkpoint.tokenizer import TOKENIZER, Tokens, no_tokenizer_json, same_tokenizer, tokens_of
from lines_cli.errors import CheckpointError, MismatchError, RecipeError, UnsupportedError, printable, some
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import Names
from lines_cli.plan.rows import Runs, Spans
from lines_cli.plan.tied_weights import is_vocabulary
from lines_cli.recipe.schema import UNION, Recipe, Tokenizer, TokenRule

COMPUTED = ("F64", "F32", "F16", "BF16")
"""What rows are gathered of; others are not computed with."""


def row_axis(shape: Sequence[int]) -> int:
    """The axis of a vocabulary's rows: the first one, but for ones before it (`[1, rows]`)."""
    return next((axis for axis, size in enumerate(shape) if size != 1), 0)


def rows_in(shape: Sequence[int]) -> int:
    """How many rows a vocabulary's table has."""
    return shape[row_axis(shape)] if shape else 0


class Difference(NamedTuple):
    """Two inputs that give tokens different ids.

    Attributes:
        sides: their numbers.
        examples: tokens that both have, each with its id on either side.
        number: how many there are.
        common: how many tokens both have.
    """

    sides: tuple[int, int]
    examples: tuple[tuple[str, int, int], ...]
    number: int
    common: int


class TableRows(NamedTuple):
    """What the rows of one table of the output are.

    Attributes:
        numel: how many.
        runs: for each side where it is read for them, gaps filled.
        own: for each side the rows that it has itself, and rows of zeros for the others; empty where nothing asks.
        means: for each part behind the fixed ones, of which sides it is the mean.
        as_is: the rows that are the same on all sides, because one alone has them; they are not computed.
        merged: how many rows all sides have.
    """

    numel: int
    runs: tuple[Runs, ...]
    own: tuple[Runs, ...]
    means: tuple[tuple[int, ...], ...]
    as_is: Spans | None
    merged: int

    def in_common(self) -> tuple[Runs, ...]:
        """For each side where the rows are that all sides have, one behind the other."""
        there = []
        for side, runs in enumerate(self.runs):
            of = [(part, row + at) for part, begin, end, row in runs.within(0, self.numel) for at in range(end - begin)]
            there.append([row if part == side else -1 for part, row in of])
        common = [row for row in range(self.numel) if all(rows[row] >= 0 for rows in there)]
        return tuple(Runs.of(((0, rows[row]) for row in common), 1) for rows in there)


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of the output, and the row of each in the inputs.

    Attributes:
        of: the side whose tokenizer the output has.
        union: whether it has the others' tokens, too.
        ids: every token of the output -> its id.
        added: those that are found in text before it is split, with what is said of each.
        new: how many of `ids` are not in the tokenizer of that side.
        size: 1 + the largest id.
        own: for each side and each id its row there; -1 where it has none.
        settled: ids of which the recipe says where their rows come from: a side and its row, or None for zeros; and
            whether also on sides that have the token.
        base: the number of the base, if there is one, else None.
        pad: the number of rows is a multiple of this; None leaves it as it is.
        main: for each side how many rows its token embedding has.
        ordinary: for each side 1 + the largest id that is no added token's.
        difference: why rows are not paired by their numbers.
    """

    of: int
    union: bool
    ids: Mapping[str, int]
    added: Mapping[str, Mapping[str, Any]]
    new: int
    size: int
    own: tuple[array[int], ...]
    settled: Mapping[int, tuple[tuple[int, int] | None, bool]]
    base: int | None
    pad: int | None
    main: tuple[int, ...]
    ordinary: tuple[int, ...]
    difference: Difference | None
    known: dict[tuple[int | None, ...], TableRows] = field(default_factory=dict, compare=False)

    @property
    def changes_tokenizer(self) -> bool:
        """Whether the tokenizer has to be written anew."""
        return bool(self.new or self.added)

    @property
    def digest(self) -> str:
        """Says which rows are which: of two that are the same it is the same."""
        found = sha256(json.dumps([self.of, self.union, self.size, self.pad, self.base]).encode())
        for rows in self.own:
            found.update(rows.tobytes())
        found.update(json.dumps(sorted(self.settled.items())).encode())
        return found.hexdigest()

    def covers(self, infos: Sequence[TensorInfo | None]) -> bool:
        """Whether all sides' tables have a row for each token: those of an audio codec beside them do not."""
        return all(
            info is None
            or (info.dtype in COMPUTED and self.ordinary[side] <= rows_in(info.shape) <= self.main[side] + _NEAR)
            for side, info in enumerate(infos)
        )

    def rows(self, infos: Sequence[TensorInfo | None]) -> TableRows:
        """Where the rows of a table come from.

        Args:
            infos: of each side's table; None where it has none.
        """
        there = tuple(None if info is None else rows_in(info.shape) for info in infos)
        if there not in self.known:
            self.known[there] = self._table([0 if rows is None else rows for rows in there])
        return self.known[there]

    def _numel(self, kept: int) -> int:
        if self.pad is not None:
            return -(-self.size // self.pad) * self.pad
        return max(kept, self.size) if self.union or self.new else kept

    def _table(self, rows: Sequence[int]) -> TableRows:
        numel, sides = self._numel(rows[self.of] or self.main[self.of]), range(len(rows))
        having = sum(map(bool, rows))
        zeros, padding = len(rows), len(rows) + 1
        pairs: list[list[tuple[int, int]]] = [[] for _ in sides]
        means: dict[tuple[int, ...], int] = {}
        as_is: list[int] = []
        merged = 0
        for row in range(numel):
            there = [own[row] if row < self.size and own[row] < rows[side] else -1 for side, own in enumerate(self.own)]
            owners = [side for side in sides if there[side] >= 0]
            filled, forced = self._filling(row, rows, there, owners, means)
            if filled is None:  # no token's row
                filled = (self.of, row) if row < rows[self.of] else (padding, row)
            one = filled
            for side in sides:
                one = (side, there[side]) if there[side] >= 0 and not forced else filled
                pairs[side].append(one)
            if all(pair[-1] == one for pair in pairs) and one[0] != padding:
                as_is.append(row)
            merged += len(owners) == having
        own: tuple[Runs, ...] = ()
        if means:
            own = tuple(
                Runs.of(((0, row) if 0 <= row < rows[side] else (1, 0) for row in self.own[side]), 1) for side in sides
            )
        spans = Spans.of(as_is) if as_is else None
        return TableRows(numel, tuple(Runs.of(pair, zeros) for pair in pairs), own, tuple(means), spans, merged)

    def _filling(
        self,
        row: int,
        rows: Sequence[int],
        there: Sequence[int],
        owners: Sequence[int],
        means: dict[tuple[int, ...], int],
    ) -> tuple[tuple[int, int] | None, bool]:
        """What stands for a token on a side that lacks it, as a part and its row; and whether on all sides. None where
        the row is no token's.
        """
        zeros = len(rows)
        source, force = self.settled.get(row, (_NOT_SAID, False))
        if source is None:
            return (zeros, 0), force
        if 0 <= source[1] < rows[source[0]]:
            return source, force
        if self.base is not None and there[self.base] >= 0:
            return (self.base, there[self.base]), False
        if len(owners) == 1:
            return (owners[0], there[owners[0]]), False
        if owners:
            return (means.setdefault(tuple(owners), zeros + 2 + len(means)), row), False
        return ((zeros, 0) if row in self._taken else None), False

    @cached_property
    def _taken(self) -> frozenset[int]:
        return frozenset(self.ids.values())


_NOT_SAID = (0, -1)


_NEAR = 1024  # rows that tables of one vocabulary are apart at most, by what they are padded to


# --- which tokens there are, and whether their rows are paired by numbers ---


def find_vocabulary(
    recipe: Recipe, inputs: Inputs, rows: Mapping[str, Names], inside: Mapping[str, Any], notes: list[str]
) -> tuple[Vocabulary | None, Difference | None]:
    """Decide how the rows of token embeddings and heads are paired.

    Args:
        recipe: says what becomes of vocabularies that differ.
        inputs: the inputs.
        rows: the tensors of the output, and where each is read from.
        inside: those that lie inside blocks.
        notes: gets a line for a tokenizer that cannot be read.

    Returns:
        Where rows are paired by token, which they are. Else None, and why they are not of the same tokens, if that is
        so and the recipe does not say what to do.

    Raises:
        LinesError: a vocabulary was asked for that cannot be made.
    """
    tables = [row for name, row in rows.items() if name not in inside and is_vocabulary(name)]
    asked = recipe.vocabulary_source
    if not tables or len(inputs.checkpoints) < 2:
        if asked == UNION:
            notes.append(f"tokenizer_source: {UNION} says nothing: no token embedding or head is merged")
        return None, None
    differ = any(len(_sizes(inputs, row)) > 1 for row in tables)
    if asked is None and recipe.resize == "error" and differ:
        return None, None  # which is refused as it is
    main = [_main_rows(inputs, side, tables) for side in range(len(inputs.checkpoints))]
    rearranged = asked == UNION or recipe.tokenizer is not None
    folders = [tokenizer_folder(one) for one in inputs.checkpoints]
    if not rearranged and not differ and same_tokenizer(folders):
        return None, None
    tokens = _tokens(inputs, folders, main, notes, needed=rearranged)
    difference = _difference(tokens, main)
    rearranged = rearranged or (asked is not None and recipe.resize == "error" and differ)
    if difference is None and not rearranged:
        return None, None
    of = _whose(recipe, inputs)
    if of is None:
        return None, difference
    if tokens[of] is None:
        if asked != UNION and recipe.tokenizer is None:
            return None, difference
        raise RecipeError(
            f"tokenizer_source: {asked}, but {inputs.checkpoints[of].name} has no tokenizer, to say which row is whose",
            hint="Copy its tokenizer into its folder, or leave the key out.",
        )
    assumed = _assumed(inputs, of, tokens, main, notes)
    return _vocabulary(recipe, inputs, of, assumed, main, difference), None


def _sizes(inputs: Inputs, row: Names) -> set[int]:
    """The numbers of rows of a table on all sides."""
    return {
        rows_in(inputs.checkpoints[side].tensors[there].info.shape)
        for side, there in enumerate(row)
        if there is not None
    }


def _whose(recipe: Recipe, inputs: Inputs) -> int | None:
    """The side whose tokens the output has; None where the recipe does not say what becomes of others.

    Raises:
        RecipeError: it says two things.
    """
    asked, kept = recipe.vocabulary_source, 0 if recipe.resize == "base" or not inputs.has_base else 1
    if asked is None:
        return None if recipe.resize == "error" else kept
    name = str(recipe.base_model) if asked == "base" else asked
    named = [side for side, one in enumerate(inputs.checkpoints) if one.name == name]
    of = inputs.lead if asked == UNION or not named else named[0]
    if recipe.resize != "error" and (asked == UNION or kept != of):
        raise RecipeError(
            f"tokenizer_source: {asked}, and resize: {recipe.resize}, which keeps the rows of "
            f"{inputs.checkpoints[kept].name}",
            hint="Leave out resize: rows are paired by token.",
        )
    return of


def _main_rows(inputs: Inputs, side: int, tables: Sequence[Names]) -> int:
    """How many rows the token embedding of a side has: as many as its config says if a table has, else the most."""
    checkpoint = inputs.checkpoints[side]
    there = {rows_in(checkpoint.tensors[row[side] or ""].info.shape) for row in tables if row[side] is not None}
    config = checkpoint.config
    nested = [config.get(key) for key in ("text_config", "decoder", "language_config")]
    said = [part.get("vocab_size") for part in (*nested, config) if isinstance(part, Mapping)]
    return next((size for size in said if type(size) is int and size in there), max(there, default=0))


def _tokens(
    inputs: Inputs, folders: Sequence[Path | None], main: Sequence[int], notes: list[str], *, needed: bool
) -> list[Tokens | None]:
    """What each side's tokenizer knows; sides that have the same files share one value."""
    found: list[Tokens | None] = []
    unread: list[str] = []
    for side, checkpoint in enumerate(inputs.checkpoints):
        before = (
            other
            for other in range(side)
            if found[other] is not None and same_tokenizer([folders[other], folders[side]])
        )
        if (same := next(before, None)) is not None:
            found.append(found[same])
            continue
        read: Tokens | None = None
        try:
            read = tokens_of(folders[side], checkpoint.config.get("model_type")) if main[side] else None
        except UnsupportedError:
            if needed:
                raise
        except CheckpointError as error:
            if needed:
                raise
            unread.append(
                f"the tokenizer of {inputs.called(side)} cannot be read, so whether its rows are of the same tokens "
                f"was not seen: {error.message}"
            )
        found.append(read)
    if len(unread) + sum(one is not None for one in found) > 1:  # or there is nothing to hold it against
        notes += unread
    return found


def _assumed(
    inputs: Inputs, of: int, tokens: list[Tokens | None], main: Sequence[int], notes: list[str]
) -> list[Tokens]:
    """The same, where those that have no tokenizer are taken to have that of the output.

    Raises:
        MismatchError: one has another number of rows.
    """
    kept = tokens[of]
    assert kept is not None
    for side, one in enumerate(tokens):
        if one is None and main[side] not in (0, main[of]):
            raise MismatchError(
                f"{inputs.checkpoints[side].name} has {main[side]:,} rows of token embeddings, "
                f"{inputs.checkpoints[of].name} {main[of]:,}, and no tokenizer says which tokens the former are of",
                hint="Copy its tokenizer into its folder.",
            )
        if one is None and main[side]:
            notes.append(
                f"{inputs.called(side)} has no tokenizer: its rows are taken to be of the tokens that "
                f"{inputs.called(of)} has there"
            )
    return [one or kept for one in tokens]


# --- ids that differ ---


def _difference(tokens: Sequence[Tokens | None], main: Sequence[int]) -> Difference | None:
    """The first two sides whose rows are not of the same tokens."""
    for side, one in enumerate(tokens):
        for other in range(side):
            before = tokens[other]
            if one is not None and before is not None and one is not before:
                moved = moved_tokens(before.ids, one.ids, main[other], main[side])
                if moved:
                    common = len(before.ids.keys() & one.ids.keys())
                    return Difference((other, side), tuple(moved[:_SHOWN]), len(moved), common)
    return None


_SHOWN = 3


def moved_tokens(
    ids: Mapping[str, int], others: Mapping[str, int], rows: int, other_rows: int
) -> list[tuple[str, int, int]]:
    """The tokens that stand in the place of another one that both tokenizers know: each with its ids.

    A row may have another name in a fine-tune: a reserved token that has become `<|im_start|>`, say, is the same row.
    Then one of the two names is not known to the other side. But where a row is called A here and B there, and either
    side has a row for the other name, too, then the two rows are not of one token. Placeholders are called by their
    numbers, and all alike: which one stands where means nothing.
    """
    candidates = {
        token: (number, others[token]) for token, number in ids.items() if others.get(token, number) != number
    }
    if not candidates:
        return []
    names = {number: token for token, number in ids.items() if number < rows}
    other_names = {number: token for token, number in others.items() if number < other_rows}
    moved = set()
    for token, (number, _) in candidates.items():
        there = other_names.get(number)
        if number in names and there in ids and there != token:
            assert there is not None
            if not (_is_placeholder(token) or _is_placeholder(there)):
                moved |= {token, there}
    return sorted(((token, ids[token], others[token]) for token in moved), key=lambda found: found[1])


_PLACEHOLDER = re.compile(
    r"\W*[\w -]*(?:reserved|unused|place\W?holder|dummy|extra|madeup|special|filler|control|custom)"
    r"[\w\u2581 :-]*\d+\W*",
    re.IGNORECASE,
)
_LONGEST = 64


def _is_placeholder(token: str) -> bool:
    return len(token) <= _LONGEST and _PLACEHOLDER.fullmatch(token) is not None


# --- the output's vocabulary ---


def _vocabulary(
    recipe: Recipe,
    inputs: Inputs,
    of: int,
    tokens: Sequence[Tokens],
    main: Sequence[int],
    difference: Difference | None,
) -> Vocabulary:
    kept, said = tokens[of], recipe.tokenizer or Tokenizer()
    union = recipe.vocabulary_source == UNION
    ids = dict(kept.ids)
    following = max(ids.values(), default=-1) + 1
    new = _new_tokens(of, tokens, main) if union else []
    new += [token for token in said.tokens if token not in ids.keys() | set(new)]
    if new and kept.file.name != TOKENIZER:
        raise no_tokenizer_json(inputs.checkpoints[of].name)
    whole = bool(new) or union or said.pad_to_multiple_of is not None  # has a row for each token
    if whole and following > main[of] + _NEAR:
        raise MismatchError(
            f"{kept.file}: ids go up to {following - 1:,}, and there are {main[of]:,} rows of token embeddings",
            hint="Is it the tokenizer of this model?",
        )
    ids |= {token: following + number for number, token in enumerate(new)}
    added: dict[str, Mapping[str, Any]] = {token: {} for token in said.tokens if token not in kept.ids}
    for side, one in enumerate(tokens if union else ()):
        for token, about in one.added.items():
            # One that the output's own tokenizer finds only in words is found everywhere if it is special elsewhere.
            counts = token not in kept.ids or (token not in kept.added and about.get("special") is True)
            if counts and one.ids[token] < main[side]:
                added.setdefault(token, about)
    size = following + len(new) if whole else min(following, main[of])
    own = []
    for side, one in enumerate(tokens):
        there = array("q", [-1]) * size
        for token, number in one.ids.items():
            at = ids.get(token, size)
            if at < size and number < main[side] + _NEAR:
                there[at] = number
        own.append(there)
    rules = {
        ids[token]: _settled(inputs, token, rule, tokens, main) for token, rule in said.tokens.items() if rule.says
    }
    return Vocabulary(
        of=of,
        union=union,
        ids=ids,
        added=added,
        new=len(new),
        size=size,
        own=tuple(own),
        settled=rules,
        base=0 if inputs.has_base else inputs.lead if recipe.base_model is not None else None,
        pad=said.pad_to_multiple_of,
        main=tuple(main),
        ordinary=tuple(one.ordinary if main[side] else 0 for side, one in enumerate(tokens)),
        difference=difference,
    )


def _new_tokens(of: int, tokens: Sequence[Tokens], main: Sequence[int]) -> list[str]:
    """The tokens that the output's tokenizer lacks, and another has a row for; those together that the same have."""
    owners: dict[str, list[int]] = {}
    for side, one in enumerate(tokens):
        for token, number in one.ids.items():
            if number < main[side] and token not in tokens[of].ids:
                owners.setdefault(token, []).append(side)
    return sorted(owners, key=lambda token: (owners[token][0], owners[token], tokens[owners[token][0]].ids[token]))


def _settled(
    inputs: Inputs, token: str, rule: TokenRule, tokens: Sequence[Tokens], main: Sequence[int]
) -> tuple[tuple[int, int] | None, bool]:
    """Where a token's row comes from, as the recipe says.

    Raises:
        RecipeError: the input that it names has no such row.
    """
    if rule.zero:
        return None, rule.force
    side = next((side for side, one in enumerate(inputs.checkpoints) if one.name == rule.model), None)
    what = f"tokenizer.tokens: {printable(json.dumps(token, ensure_ascii=False))}"
    if side is None:
        raise RecipeError(f"{what}: {rule.model} is not among the inputs that are read")
    number = rule.token_id
    if number is None:
        number = tokens[side].ids.get(token if rule.token is None else rule.token, -1)
    if not 0 <= number < main[side]:
        wanted = printable(rule.token or token) if rule.token_id is None else f"id {rule.token_id}"
        raise RecipeError(f"{what}: {inputs.checkpoints[side].name} has no row for {wanted}")
    return (side, number), rule.force


# --- in words ---


def in_words(difference: Difference, inputs: Inputs) -> str:
    """That two tokenizers give tokens different ids."""
    one, other = (inputs.called(side) for side in difference.sides)
    examples = [
        f"{printable(json.dumps(token, ensure_ascii=False))}: {here:,} in {one}, {there:,} in {other}"
        for token, here, there in difference.examples
    ]
    return (
        f"the tokenizers of {one} and {other} have other ids for {difference.number:,} of {difference.common:,} tokens "
        f"that both know:\n{some(examples)}"
    )


def notes_of(vocabulary: Vocabulary, inputs: Inputs, tables: Sequence[TableRows]) -> Iterator[str]:
    """What a person should know of how rows were paired."""
    if not tables:
        return
    table = max(tables, key=lambda one: one.numel)
    whose = inputs.called(vocabulary.of)
    if vocabulary.difference is not None:
        yield f"rows of token embeddings and heads are paired by token: {in_words(vocabulary.difference, inputs)}"
    alone = Counter[int]()
    for row in range(min(vocabulary.size, table.numel)):
        owners = [side for side, own in enumerate(vocabulary.own) if own[row] >= 0]
        if len(owners) == 1:
            alone[owners[0]] += 1
    each = [f"{number:,} that {inputs.called(side)} alone has" for side, number in sorted(alone.items())]
    listed = f"{table.merged:,} that all have are merged"
    listed += f"; of {', '.join(each)}, rows are as they are there" if each else ""
    others = f" and {vocabulary.new:,} token(s) of others" if vocabulary.union else ""
    dropped = "" if vocabulary.union else "; tokens that only others have are dropped"
    yield f"the vocabulary is that of {whose}{others}, {table.numel:,} rows: {listed}{dropped}"


def report(vocabulary: Vocabulary | None, inputs: Inputs) -> dict[str, Any] | None:
    """The same, as JSON has it; None where rows are paired by their numbers."""
    if vocabulary is None:
        return None
    return {
        "of": inputs.checkpoints[vocabulary.of].name,
        "union": vocabulary.union,
        "tokens": len(vocabulary.ids),
        "rows": max((table.numel for table in vocabulary.known.values()), default=0),
        "new": vocabulary.new,
        "moved": vocabulary.difference.number if vocabulary.difference else 0,
    }
