"""An adapter put onto its base: which tensors of the base it changes, and of what each is then made.

Names are resolved by one rule for all modules of a component. Shapes are checked here; nothing reads tensor data.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from lines_cli.checkpoint.adapter import Adapter, Change
from lines_cli.checkpoint.adapter_names import Component
from lines_cli.checkpoint.formulas import (
    Difference,
    Formula,
    Hadamard,
    Kronecker,
    LowRank,
    Made,
    Rescaled,
    Rows,
)
from lines_cli.checkpoint.header import FLOAT_DTYPES, StoredTensor, itemsize
from lines_cli.checkpoint.reader import Checkpoint, views_of
from lines_cli.errors import CheckpointError, MismatchError, UnsupportedError, printable, some
from lines_cli.plan.flux_names import in_other_names
from lines_cli.plan.in_modules import InModules, in_modules
from lines_cli.plan.same_names import canonical, unwrapped
from lines_cli.plan.tied_weights import is_head, is_vocabulary, says_tied, tied_embeddings, tied_partner, untied
from lines_cli.plan.unet_names import otherwise

_HEADS = (  # classes of transformers -> what their heads are called
    (re.compile(r"Bert(?:ForMaskedLM|LMHeadModel|ForPreTraining)"), "cls.predictions.decoder.weight"),
    (re.compile(r"GPT2(?:LMHead|DoubleHeads)Model|\w+For(?:CausalLM|ConditionalGeneration)"), "lm_head.weight"),
)
_HEAD_CALLED_OTHERWISE = frozenset(
    "gpt_neox electra roberta xlm-roberta xlm-roberta-xl camembert data2vec-text roberta-prelayernorm xmod roformer "
    "rembert megatron-bert bert-generation big_bird ernie".split()
)
_WITHOUT_HEAD = re.compile(r"(?<!Head)(?<!Heads)Model\Z|(?:Classification|QuestionAnswering|MultipleChoice)\Z")
_OTHER_BASE = "It was trained on another model: give the base that it belongs to."


def on_base(adapter: Adapter, base: Checkpoint, *, name: str | None = None) -> Checkpoint:
    """The checkpoint that an adapter makes of its base.

    Args:
        adapter: which.
        base: what it is put onto.
        name: what the two are called together; unless given the base is the recipe's, and the adapter's name is
            that of both.

    Raises:
        MismatchError: the base has no tensor of a name, or one of another shape; or names mean several of its tensors.
    """
    notes = [*adapter.notes, *_note_of_base(adapter, base)]
    made = _made(adapter, base, notes)
    own = adapter.checkpoint
    return replace(
        base,
        name=name or adapter.name,
        path=own.path,
        hub_id=own.hub_id,
        files=(*base.files, *own.files),
        states=(*base.states, *own.states),
        tensors=made.tensors,
        formulas=made.formulas,
        config=made.config,
        config_changes=made.config_changes,
        metadata={},
        parts=(base, own),
        part=own.part,
        views=tuple(views_of((base, own))),
        base_named=name is not None,
        notes=(*base.notes, *notes),
    )


class Changed(NamedTuple):
    """What a tensor of an adapter changes.

    Attributes:
        name: the tensor of the model; where the base stores it in another layout, the one of its module.
        stored: the tensors of the base that it is, or is put together of.
    """

    name: str
    stored: tuple[str, ...]


def changed_by(adapter: Adapter, base: Checkpoint) -> dict[int, Changed]:
    """What each of an adapter's tensors changes of a base, by where it begins in the adapter's file.

    Raises:
        MismatchError: as `on_base`.
    """
    return _made(adapter, base, []).changed


def _made(adapter: Adapter, base: Checkpoint, notes: list[str]) -> _Making:
    """What comes of all changes, by the names by which the base's tensors are stored; or by those of modules, if more
    are known by these.
    """
    if (modules := in_other_names(base, (change.module for change in adapter.changes))) is not None:
        return _made_in(modules, adapter, _Targets(adapter, modules.checkpoint, notes), notes)
    stored: _Targets | None = None
    failed: MismatchError | None = None
    try:
        stored = _Targets(adapter, base, notes)
    except _NoSuchModulesError as error:
        failed = error
    if (stored is None or stored.new) and (modules := in_modules(base)) is not None:
        with suppress(_NoSuchModulesError):
            targets = _Targets(adapter, modules.checkpoint, notes)
            if stored is None or len(targets.new) < len(stored.new):
                return _made_in(modules, adapter, targets, notes)
    if stored is None:
        assert failed is not None
        raise failed
    return _Making(adapter, base, stored, notes)


def _made_in(modules: InModules, adapter: Adapter, targets: _Targets, notes: list[str]) -> _Making:
    """The same by the names and in the layout of modules, taken back to what is stored."""
    made = _Making(adapter, modules.checkpoint, targets, notes)
    note = modules.note(made.formulas, adapter.name)
    notes += [note] if note else []
    made.tensors, made.formulas = modules.back(made.tensors, made.formulas, adapter.name)
    made.changed = {at: Changed(*modules.stored(one.name)) for at, one in made.changed.items()}
    return made


class _NoSuchModulesError(MismatchError):
    """The base has no tensors of the names that an adapter gives."""


# --- the base that the adapter names ---


def _note_of_base(adapter: Adapter, base: Checkpoint, does: str = "and it is put onto") -> Iterator[str]:
    said = adapter.base_name
    if said is None:
        return
    called = [base.hub_id, base.name, os.fspath(base.real), base.config.get("_name_or_path")]
    known = {_last_part(name) for name in called if isinstance(name, str) and name}
    if _last_part(said) not in known:
        yield (
            f"{adapter.name} says that its base is {printable(said)}, {does} {base.name}: make sure that "
            "they are the same weights"
        )


def notes_of_bases(adapters: Sequence[Adapter], base: Checkpoint | None) -> Iterator[str]:
    """What a person should know of the bases that adapters name which stay adapters: another than the base that is
    given, or than each other's.
    """
    if base is not None:
        for adapter in adapters:
            yield from _note_of_base(adapter, base, does="and the base that is given is")
        return
    named: dict[str, Adapter] = {}
    for adapter in adapters:
        if adapter.base_name is not None:
            named.setdefault(_last_part(adapter.base_name), adapter)
    if len(named) > 1:
        said = " and ".join(f"{one.name} of {printable(one.base_name or '')}" for one in list(named.values())[:_SHOWN])
        yield f"{said}: adapters that say that their bases differ; make sure that they are the same weights"


_CACHED = re.compile(r"(?:.*/)?models--(?:[^/]+?--)?(?P<name>[^/]+)(?:/.*)?")
_QUANTISED = re.compile(r"(?:-unsloth)?-bnb-[48]bit\Z")  # copies that adapters are trained on


def _last_part(name: str) -> str:
    """What a Hub id and a folder of the same model have in common."""
    name = name.replace("\\", "/").rstrip("/")
    if match := _CACHED.fullmatch(name):
        name = match["name"]
    name = name.rpartition("/")[2].partition("@")[0].lower()
    return _QUANTISED.sub("", name)


# --- names ---

Found = dict[str, list[str]]
"""Names of the adapter -> those of the base that they may mean; one, but where dots became underscores."""


class _Targets:
    """Which tensors of the base an adapter changes.

    Args:
        adapter: which.
        base: what it is put onto.
        notes: gets a line for what is left out, and for weights that are tied.

    Raises:
        MismatchError: the base has no tensor of a name; or a name means several.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, notes: list[str]) -> None:
        self._adapter, self._base, self._notes = adapter, base, notes
        self._tied = says_tied(base.config)
        self._shapes = {name: base.tensors[name].info.shape for name in filter(is_vocabulary, base.tensors)}
        self._found: dict[int, list[str]] = {}
        self.through_ties: dict[str, str] = {}
        """Heads that are changed through the embedding that they are tied to."""
        self._resolve(list(enumerate(adapter.changes)))
        self._refuse_two_of_one()
        self._refuse_missing()

    def pairs(self) -> Iterator[tuple[Change, str]]:
        """Each change with the name of a tensor; what is whole first, for other changes come on top of it."""
        every = [(self._adapter.changes[number], targets) for number, targets in self._found.items()]
        # of a head and an embedding that are one weight the embedding's comes first, as in PEFT
        for change, targets in sorted(every, key=lambda pair: (pair[0].kind != "whole", is_head(pair[0].name))):
            for target in targets:
                yield change, target

    def said_twice(self) -> Iterator[tuple[Change, str]]:
        """Each change of a head that PEFT keeps equal to its embedding's, with what that changes."""
        changes = self._adapter.changes
        for change in (changes[number] for number, targets in self._found.items() if not targets):
            for other, target in self.pairs():
                if other.kind == change.kind and is_vocabulary(other.name) and not is_head(other.name):
                    yield change, target

    @property
    def new(self) -> list[str]:
        """Whole tensors of the adapter that the base has not."""
        return [
            target for change, target in self.pairs() if change.kind == "whole" and target not in self._base.tensors
        ]

    def _resolve(self, changes: Sequence[tuple[int, Change]]) -> None:
        """All by one rule; or those of each component by one of its own."""
        if not any(change.component.flat for _, change in changes):
            found, lacking = self._best(changes, lambda change: change.called)
            if not lacking:
                self._found = found
                return
        by_component: dict[Component, list[tuple[int, Change]]] = defaultdict(list)
        for number, change in changes:
            by_component[change.component].append((number, change))
        results = {
            component: self._best(group, lambda change: change.module) for component, group in by_component.items()
        }
        whole = [component for component, (_, lacking) in results.items() if not lacking]
        for component, (found, lacking) in results.items():
            if not lacking:
                self._found |= found
            elif whole and (not found or (_is_text(component) and any(map(_is_text, whole)))):
                self._notes.append(
                    f"{len(lacking) + len(found):,} tensors that {self._adapter.name} changes are of another part of "
                    f"the pipeline ({component.name or 'no name'}) and left out: {self._base.name} has no such modules"
                )
            else:
                self._refuse(by_component[component], lacking)

    def _best(
        self, changes: Sequence[tuple[int, Change]], called: Callable[[Change], str]
    ) -> tuple[dict[int, list[str]], list[int]]:
        """By the rule that finds most: the changes' targets by their numbers, and the numbers of those without."""
        names = {number: _names_of(change, called(change)) for number, change in changes}
        best = _Read({}, [number for number, _ in changes], 0)
        for readings in self._rules([name for those in names.values() for name in those], flat=_are_flat(changes)):
            read = [self._read(names, reading) for reading in readings]
            complete = [one for one in read if not one.lacking]
            fitting = [one for one in complete if self._fit(one.found)] or complete[:1]
            if any(one.found != fitting[0].found for one in fitting):
                self._refuse_ambiguous(fitting)
            best = max([best, *fitting, *read], key=lambda one: (not one.lacking, one.known))
            if not best.lacking and best.known == len(names):
                break
        return best.found, best.lacking

    def _rules(self, names: Sequence[str], *, flat: bool) -> Iterator[Sequence[Found]]:
        """Ways to read names, those of one kind together: as they are, with a prefix on or off, as known to be the
        same.
        """
        if not flat:
            yield [{name: [name] for name in names if name in self._base.tensors}]
        for spelling in _FLAT if flat else _DOTTED:
            plain, others = self._with_prefixes(names, spelling)
            yield [plain]
            yield others

    def _with_prefixes(self, names: Sequence[str], spelling: _Spelling) -> tuple[Found, list[Found]]:
        """The readings by which names are those of the base; and those by which they are so behind a prefix, or the
        base's are so behind one. If names of both sides have lost `model.` and the like, they are so behind none: the
        `model.layers` of one model are not the `model.decoder.layers` of another.
        """

        def may_have_one(name: str, there: str) -> bool:
            return spelling.of_adapter is not canonical or not (_is_bared(name) and _is_bared(there))

        keys: dict[str, list[str]] = defaultdict(list)
        for name in names:
            keys[spelling.of_adapter(name)].append(name)
        found: dict[tuple[str, str], Found] = defaultdict(lambda: defaultdict(list))
        of_base: dict[str, list[str]] = defaultdict(list)
        for there in self._base.tensors:
            key = spelling.of_base(there)
            of_base[key].append(there)
            for prefix, rest in _cuts(key):
                for name in keys.get(spelling.of_rest(rest), ()):
                    if not prefix or may_have_one(name, there):
                        found["base", prefix][name].append(there)
        for key, those in keys.items():
            for prefix, rest in _cuts(key):
                if prefix and rest in of_base:
                    for name in those:
                        found["adapter", prefix][name] += [one for one in of_base[rest] if may_have_one(name, one)]
        plain = found.pop(("base", ""), {})
        return plain, sorted(found.values(), key=len, reverse=True)[:_MOST_READINGS]

    def _read(self, names: Mapping[int, Sequence[str]], reading: Found) -> _Read:
        """What comes of a reading."""
        read = _Read({}, [], 0)
        for number, those in names.items():
            change = self._adapter.changes[number]
            name = next((name for name in those if reading.get(name)), None)
            target = None if name is None else self._one_of(change, name, reading[name])
            if target is None:
                target = self._tied_to(change, those[0])
                if target is not None and change.kind != "whole":
                    self.through_ties[change.called] = target
            if target is not None:
                read.found[number] = [] if self._is_said_twice(change) else self._with_twins(change, target)
                read.known += 1
            elif change.kind == "whole" and change.expected:
                read.found[number] = [those[0]]  # a new one
            else:
                read.lacking.append(number)
        return read

    def _one_of(self, change: Change, name: str, those: Sequence[str]) -> str:
        """The tensor that a name means."""
        fitting = [there for there in those if _fits(change, self._base, there)] or list(those)
        if len(fitting) > 1:
            raise MismatchError(
                f"{self._adapter.file}: {printable(name)} means several tensors of {self._base.name}:\n{some(fitting)}",
                hint="Give the adapter with dots in its names (in PEFT's or diffusers' form).",
            )
        return fitting[0]

    # --- weights that are tied ---

    def _tied_to(self, change: Change, name: str) -> str | None:
        """The embedding that a head is tied to which the base does not store. A head that is whole is untied."""
        if not self._tied or not is_vocabulary(name) or (change.kind == "whole" and not self._stays_tied(change)):
            return None
        shape = _shape_of(change)
        return tied_partner(name, shape, self._shapes, tied=True, resize=True) if shape is not None else None

    def _stays_tied(self, change: Change) -> bool:
        """Whether a whole tensor is what is underneath a product, or one of two that PEFT keeps equal."""
        return not change.expected or bool(self._adapter.config.get("ensure_weight_tying"))

    @cached_property
    def _twins(self) -> dict[str, list[str]]:
        """The tensors that are one weight with another."""
        found: dict[str, list[str]] = defaultdict(list)
        for head, embedding in tied_embeddings(self._base, self._base.config).items():
            found[head].append(embedding)
            found[embedding].append(head)
        return found

    @cached_property
    def untie(self) -> list[str]:
        """The embeddings that are weights of their own from here on, of heads that are."""
        if not self._tied:
            return []
        found: dict[str, None] = {}
        for change, target in self.pairs():
            if change.kind == "whole" and is_vocabulary(target) and not self._stays_tied(change):
                embedding = self._embedding_of(target, change) if is_head(target) else target
                found |= dict.fromkeys([embedding] if embedding else [])
        return list(found)

    def _embedding_of(self, head: str, change: Change) -> str | None:
        stored = [other for other in self._twins.get(head, ()) if not is_head(other)]
        shape = _shape_of(change)
        assert shape is not None
        return stored[0] if stored else tied_partner(head, shape, self._shapes, tied=True, resize=True)

    def head_of(self, embedding: str) -> str | None:
        """What the head is called, or would be, that is tied to an embedding; None where there is none to be seen."""
        stored = [other for other in self._twins.get(embedding, ()) if is_head(other)]
        changed = [change.name for change in self._adapter.changes if is_head(change.name)]
        if stored or changed:
            return (stored or changed)[0]
        architectures = self._base.config.get("architectures") or [""]
        architecture = str(architectures[0])
        if found := next((head for pattern, head in _HEADS if pattern.fullmatch(architecture)), None):
            several = self._base.config.get("is_encoder_decoder") is True and "T5" not in architecture
            if found != _HEAD or not (several or self._base.config.get("model_type") in _HEAD_CALLED_OTHERWISE):
                return found
        elif _WITHOUT_HEAD.search(architecture):
            return None
        raise UnsupportedError(
            f"{self._adapter.file}: it holds {printable(embedding)} whole, which {self._base.name} ties to a head that "
            f"it does not store, and what that is called is not known of {printable(architecture) or 'this class'}",
            hint="Fold it into its base with peft (merge_and_unload, then save_pretrained), and give that folder; or "
            "save the base with its head stored and tie_word_embeddings false, and give that base.",
        )

    def _is_said_twice(self, change: Change) -> bool:
        """Whether it is of a head, and PEFT keeps it equal to what the adapter does to the embedding."""
        both = self._tied and bool(self._adapter.config.get("ensure_weight_tying")) and is_head(change.name)
        return both and any(
            is_vocabulary(other.name) and not is_head(other.name) and other.kind == change.kind
            for other in self._adapter.changes
        )

    def _with_twins(self, change: Change, target: str) -> list[str]:
        if change.kind == "whole" and not self._stays_tied(change):
            return [target]
        return [target, *self._twins.get(target, ())]

    # --- refusals ---

    def _refuse_two_of_one(self) -> None:
        """Refuse an adapter of which two modules are one tensor of the base, unless they are one weight there."""
        owners: dict[tuple[str, str], int] = {}
        for number, targets in self._found.items():
            change = self._adapter.changes[number]
            for target in targets:
                other = owners.setdefault((target, change.kind), number)
                if other == number:
                    continue
                theirs = self._adapter.changes[other]
                if is_vocabulary(target) and self._tied and change.called != theirs.called:
                    continue
                raise MismatchError(
                    f"{self._adapter.file}: {printable(change.called)} and {printable(theirs.called)} are both "
                    f"{printable(target)} in {self._base.name}",
                    hint=_OTHER_BASE,
                )

    def _refuse_missing(self) -> None:
        """Refuse an adapter without a module that it is said to hold whole, where the base has that; a table that is
        tied to another has one tensor with that.
        """
        saved = self._adapter.config.get("modules_to_save") or ()
        held = [f".{change.name}" for change in self._adapter.changes if change.kind == "whole"]
        tied = self._tied and any(map(is_vocabulary, held))
        for name in (name for name in saved if not any(f".{name}." in other for other in held)):
            theirs = [there for there in self._base.tensors if f".{name}." in f".{there}"]
            if theirs and not (tied and all(map(is_vocabulary, theirs))):
                raise CheckpointError(
                    f"{self._adapter.file}: no tensor of {printable(name)}, which its config says that it holds whole "
                    f"(modules_to_save), and {self._base.name} has {printable(theirs[0])}",
                    hint="The adapter is incomplete or damaged: copy or download it again.",
                )

    def _refuse_ambiguous(self, readings: Sequence[_Read]) -> None:
        first, *others = readings
        number = next(n for n, target in first.found.items() if any(one.found[n] != target for one in others))
        meant = dict.fromkeys(reading.found[number][0] for reading in readings)
        raise MismatchError(
            f"{self._adapter.file}: {printable(self._adapter.changes[number].called)} may be one of several modules of "
            f"{self._base.name}:\n{some(list(meant))}",
            hint="Give the part of the base that the adapter is for as a checkpoint of its own.",
        )

    def _fit(self, found: Mapping[int, Sequence[str]]) -> bool:
        changes = self._adapter.changes
        return all(
            target not in self._base.tensors or _fits(changes[number], self._base, target)
            for number, targets in found.items()
            for target in targets
        )

    def _refuse(self, group: Sequence[tuple[int, Change]], lacking: Sequence[int]) -> None:
        names = sorted({self._adapter.changes[number].name for number in lacking})
        theirs = [name for name in self._base.tensors if name.endswith(".weight")] or list(self._base.tensors)
        for change in (self._adapter.changes[number] for number in lacking):
            experts = f".{change.module.rpartition('.')[2]}.0."
            single = next((there for there in self._base.tensors if experts in f".{there}"), None)
            if change.others and single is not None:
                raise _NoSuchModulesError(
                    f"{self._adapter.file}: {printable(change.called)} is changed as one tensor of all experts, and "
                    f"{self._base.name} stores them one by one, such as {printable(single)}",
                    hint="Give the base with its own config.json, whose model_type says how they are fused, or with "
                    "its experts fused, as the model has them in memory; or fold the adapter into its base with peft "
                    "(merge_and_unload, then save_pretrained), and give that folder.",
                )
        raise _NoSuchModulesError(
            f"{self._adapter.file}: {len(names):,} of the {len(group):,} tensors that it changes are not in "
            f"{self._base.name}:\n{some(names, _SHOWN)}\nNames there are\n{some(sorted(theirs), _SHOWN)}",
            hint=_OTHER_BASE,
        )


@dataclass(slots=True)
class _Read:
    """What comes of a reading of names.

    Attributes:
        found: the targets of changes, by the numbers of these.
        lacking: the changes without.
        known: how many have a target that is in the base.
    """

    found: dict[int, list[str]]
    lacking: list[int]
    known: int


_SHOWN = 3
_HEAD = "lm_head.weight"  # as transformers calls the head of a language model
_MOST_READINGS = 64
_MOST_CUTS = 64


def _are_flat(changes: Sequence[tuple[int, Change]]) -> bool:
    return changes[0][1].component.flat if changes else False


def _is_text(component: Component) -> bool:
    return "te" in component.name.split("_")[-1] or "text_encoder" in component.name


def _names_of(change: Change, module: str) -> list[str]:
    """The names that the tensor may have that a change is of, as the adapter calls modules."""
    names = [f"{module}.{parameter}" for parameter in (*change.others, change.parameter)]
    if change.others:
        names.append(f"{module}.weight")
    if change.kind == "low rank" and change.parameter == "weight":
        names.append(f"{module}.in_proj_weight")  # of torch's attention, which PEFT wraps whole
    return list(dict.fromkeys(names))


def _cuts(name: str) -> Iterator[tuple[str, str]]:
    """A name cut in two behind each of its dots; first not at all."""
    yield "", name
    at = name.find(".") + 1
    for _ in range(_MOST_CUTS):
        if not at:
            return
        yield name[:at], name[at:]
        at = name.find(".", at) + 1


def _flat(name: str) -> str:
    """A tensor's name with underscores in its module's."""
    module, dot, parameter = name.rpartition(".")
    return f"{module.replace('.', '_')}{dot}{parameter}"


def _is_bared(name: str) -> bool:
    """Whether the one name for all that it is called lacks more than wrappers of it."""
    return canonical(name) != unwrapped(name)


class _Spelling(NamedTuple):
    """How names are spelt before they are compared.

    Attributes:
        of_adapter, of_base: each side's.
        of_rest: the base's once more, behind a prefix.
    """

    of_adapter: Callable[[str], str] = str
    of_base: Callable[[str], str] = str
    of_rest: Callable[[str], str] = str


_DOTTED = (_Spelling(), _Spelling(canonical, canonical), _Spelling(of_base=otherwise))
_FLAT = (_Spelling(of_rest=_flat), _Spelling(of_base=otherwise, of_rest=_flat))


# --- formulas ---


def _matrix(change: Change) -> tuple[int, int] | None:
    """What a product of a change is as a matrix: out, and in (with a kernel). None where it is none."""
    factors = {role: stored.info.shape for role, stored in change.factors.items()}
    match change.kind:
        case "low rank" | "rescaled":
            kernel = factors["mid"][2:] if "mid" in factors else factors["A"][2:]
            matrix = factors["B"][0], math.prod((factors["A"][1], *kernel))
            return matrix[::-1] if change.transposed else matrix
        case "hadamard":
            out = factors["a1"][1 if "t1" in factors else 0]
            return out, factors["b1"][1] * math.prod(factors["t1"][2:] if "t1" in factors else ())
        case "kronecker":
            one = factors["w1"] if "w1" in factors else (factors["w1_a"][0], factors["w1_b"][1])
            if "w2" in factors:
                other = factors["w2"][0], math.prod(factors["w2"][1:])
            elif "t2" in factors:
                other = factors["w2_a"][1], factors["w2_b"][1] * math.prod(factors["t2"][2:])
            else:
                other = factors["w2_a"][0], factors["w2_b"][1]
            return one[0] * other[0], one[1] * other[1]
    return None


def _shape_of(change: Change) -> tuple[int, ...] | None:
    """The shape of a weight that a change is of, as far as it tells; None where it does not."""
    if change.kind in ("whole", "difference"):
        (stored,) = change.factors.values()
        return stored.info.shape
    if change.kind == "rows":
        return (max(change.rows) + 1, *change.factors["rows"].info.shape[1:])
    return _matrix(change)


def _fits(change: Change, base: Checkpoint, target: str) -> bool:
    """Whether a change may be of a tensor of the base, by its shape."""
    there, own = base.tensors[target].info.shape, _shape_of(change)
    if own is None:
        return True
    if is_vocabulary(target) and there[1:] == own[1:]:
        return True  # the rows may have grown
    if change.kind == "whole":
        return there == own
    if change.kind == "difference":
        return math.prod(there) == math.prod(own)
    if change.others and len(there) == 3:
        return any(_batched(change, there, rank) for rank, _ in change.others.values())
    flat = (there[0], math.prod(there[1:])) if there else ()
    return own == flat or (len(there) == 2 and own[::-1] == there)


def _batched(change: Change, shape: tuple[int, ...], rank: int) -> bool:
    """Whether a change is of a batch of matrices of that shape, each product being of that rank."""
    a, b = (change.factors[role].info.shape for role in "AB")
    sides = {b[0], a[1]} == set(shape[1:]) and b[0] * a[1] == shape[1] * shape[2]
    return len(a) == 2 and a[0] == shape[0] * rank and sides


class _Making:
    """The tensors and formulas that come of it.

    Args:
        adapter: which.
        base: what it is put onto.
        targets: which tensors it changes.
        notes: gets a line for what a person should know.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, targets: _Targets, notes: list[str]) -> None:
        self._adapter, self._base, self._targets, self._notes = adapter, base, targets, notes
        self._first = len(base.files)
        self.tensors, self.formulas = dict(base.tensors), dict(base.formulas)
        self.config, self.config_changes = base.config, base.config_changes
        self.changed: dict[int, Changed] = {}
        """What each tensor of the adapter changes, by where it begins in its file."""
        self._turned = _Turned(adapter, base, targets)
        self._heads: dict[str, str] = {}  # embeddings whose heads are weights of their own now -> these
        if targets.untie:
            self._untie()
        elif targets.through_ties:
            listed = " and ".join(f"{printable(head)} ({printable(one)})" for head, one in targets.through_ties.items())
            twice = any(True for _ in targets.said_twice())
            notes.append(
                f"{listed}: one weight in {base.name}, whose config ties them, "
                + (
                    f"and {adapter.name} keeps its products on both equal (ensure_weight_tying): they are added once, "
                    "as the adapted model computes; PEFT's merge_and_unload adds them twice"
                    if twice
                    else f"so what {adapter.name} does to one is done to both, as where PEFT saves the two merged"
                )
            )
        for change, target in targets.pairs():
            self._add(change, target)
        for change, target in targets.said_twice():
            self._note_change(change, target)

    def _untie(self) -> None:
        """Make heads weights of their own, where the adapter holds one of two that are tied whole."""
        for embedding in self._targets.untie:
            head = self._targets.head_of(embedding)
            if head is not None:
                self._heads[embedding] = head
                self.tensors.setdefault(head, self.tensors[embedding])
                if embedding in self.formulas:
                    self.formulas.setdefault(head, self.formulas[embedding])
        path, self.config = untied(self._base.config)
        self.config_changes = {**self.config_changes, path: False}
        self._notes.append(
            f"{self._adapter.name} holds a token embedding or a head that is tied to the other in {self._base.name}: "
            "from here on they are two weights, and the config says so"
        )

    def _add(self, change: Change, target: str) -> None:
        """Do one change to one tensor.

        Raises:
            MismatchError: the tensor has another shape.
        """
        factors = {role: stored._replace(file=self._first + stored.file) for role, stored in change.factors.items()}
        if is_head(change.name):
            target = self._heads.get(target, target)
        self._note_change(change, target)
        if change.kind == "whole":
            self._take_whole(target, factors["whole"])
            return
        stored = self.tensors[target]
        before = self.formulas.get(target, Made(stored, ()))
        step = self._step(change, target, tuple(factors.items()), stored.info.shape, before)
        self.formulas[target] = Made(before.stored, (*before.steps, step))

    def _take_whole(self, target: str, own: StoredTensor) -> None:
        """Let the adapter's own tensor be the base's, in the base's dtype: the adapter's is often narrower, and what is
        added on top would be rounded to it.
        """
        before = self.tensors.get(target)
        self.tensors[target] = own
        self.formulas.pop(target, None)
        if before is None:
            return
        if is_vocabulary(target):
            self._follow_rows(before.info.shape, own.info.shape)
        dtype = before.info.dtype
        if own.info.dtype != dtype and {own.info.dtype, dtype} <= FLOAT_DTYPES:
            nbytes = own.info.numel * itemsize(dtype)
            self.tensors[target] = own._replace(info=own.info._replace(dtype=dtype, nbytes=nbytes))
            self.formulas[target] = Made(own, ())

    def _note_change(self, change: Change, target: str) -> None:
        for stored in change.factors.values():
            before = self.changed.get(stored.info.offset, Changed(target, ()))
            self.changed[stored.info.offset] = Changed(before.name, (*before.stored, target))

    def _follow_rows(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        """Let the config say how many tokens there are, where a table whose rows it counts has others now."""
        for path in (("vocab_size",), *((nested, "vocab_size") for nested in ("text_config", "decoder"))):
            part = self.config if len(path) == 1 else self.config.get(path[0])
            if before[:1] != after[:1] and isinstance(part, Mapping) and part.get("vocab_size") == before[0]:
                part = {**part, "vocab_size": after[0]}
                self.config = part if len(path) == 1 else {**self.config, path[0]: part}
                self.config_changes = {**self.config_changes, path: after[0]}

    def _step(
        self,
        change: Change,
        target: str,
        factors: tuple[tuple[str, StoredTensor], ...],
        shape: tuple[int, ...],
        before: Made,
    ) -> Formula:
        called = change.called
        match change.kind:
            case "difference":
                if math.prod(shape) != factors[0][1].info.numel:
                    self._refuse_shape(change, target, shape)
                return Difference(called, factors, shape, change.scale)
            case "rows":
                self._check_rows(change, target, shape)
                return Rows(called, factors, shape, change.rows)
            case "low rank" if change.others and len(shape) == 3:
                return self._of_batch(change, target, factors, shape)
        flat = (shape[0], math.prod(shape[1:])) if shape else ()
        own = _matrix(change)
        assert own is not None
        turned = self._turned(change, target) if own == flat and own[::-1] == shape else own != flat
        if (own[::-1] if turned else own) != flat or (turned and len(shape) != 2):
            self._refuse_shape(change, target, shape)
        match change.kind:
            case "low rank":
                return LowRank(called, factors, shape, change.scale, change.transposed != turned)
            case "rescaled":
                of_columns = change.transposed != turned
                norms, wanted = factors[-1][1].info.numel, shape[1] if of_columns else shape[0]
                if norms != wanted:
                    raise MismatchError(
                        f"{self._adapter.file}: {printable(called)} has {norms:,} magnitudes, and {printable(target)} "
                        f"of {self._base.name}, {list(shape)}, {wanted:,}",
                        hint=_OTHER_BASE,
                    )
                return Rescaled(
                    called,
                    factors,
                    shape,
                    change.scale,
                    change.transposed != turned,
                    base=before.stored,
                    before=before.steps,
                    of_columns=of_columns,
                )
            case "hadamard" if not turned:
                return Hadamard(called, factors, shape, change.scale)
            case "kronecker" if not turned:
                whole = dict(factors).get("w2")
                return Kronecker(
                    called, factors, shape, change.scale, outermost=whole is not None and len(whole.info.shape) == 3
                )
        self._refuse_shape(change, target, shape)
        raise AssertionError

    def _of_batch(
        self, change: Change, target: str, factors: tuple[tuple[str, StoredTensor], ...], shape: tuple[int, ...]
    ) -> Formula:
        rank, scale = change.others.get(target.rpartition(".")[2], (0, 0.0))
        if not rank or not _batched(change, shape, rank):
            self._refuse_shape(change, target, shape)
        out, inputs = change.factors["B"].info.shape[0], change.factors["A"].info.shape[1]
        turned = shape[1:] == (inputs, out) and (out != inputs or self._turned(change, target))
        return LowRank(change.called, factors, shape, scale, turned, matrices=shape[0])

    def _check_rows(self, change: Change, target: str, shape: tuple[int, ...]) -> None:
        own = change.factors["rows"].info.shape
        if own[1:] != shape[1:]:
            self._refuse_shape(change, target, shape)
        if beyond := [row for row in change.rows if row >= shape[0]]:
            raise MismatchError(
                f"{self._adapter.file}: it replaces row {beyond[0]:,} of {printable(target)}, and {self._base.name} "
                f"has {shape[0]:,} rows",
                hint="Its base had more tokens: give the base with the vocabulary that it was trained with.",
            )

    def _refuse_shape(self, change: Change, target: str, shape: tuple[int, ...]) -> None:
        own = _shape_of(change)
        said = list(own) if own is not None else "another shape"
        hint = _OTHER_BASE
        a = change.factors.get("A")
        if a is not None and len(shape) > 2 and a.info.shape[1] != shape[1] and a.info.shape[1] % max(1, shape[1]) == 0:
            hint = (
                "It is a convolution in groups, of which such a product is no weight (PEFT does not fold it in, "
                f"either). {_OTHER_BASE}"
            )
        where = self._base.where(target) if target in self._base.tensors else self._base.name
        raise MismatchError(
            f"{self._adapter.file}: what {printable(change.called)} changes of {printable(target)} is {said}, and "
            f"{where} has {list(shape)}",
            hint=hint,
        )


_Stored = dict[tuple[int, str], bool]
"""How many sides weights have (a batch of matrices three), and what they are called -> whether they are [in, out].

A batch of experts says nothing of a layer: gpt-oss has the ones [in, out] beside the others [out, in].
"""


class _Turned:
    """Whether a square weight is stored [in, out]. Shapes do not tell; others of the same name and the adapter do.

    Args:
        adapter: which.
        base: what it is put onto.
        targets: which tensors it changes.
    """

    def __init__(self, adapter: Adapter, base: Checkpoint, targets: _Targets) -> None:
        self._adapter, self._base, self._targets = adapter, base, targets

    def __call__(self, change: Change, target: str) -> bool:
        """Whether that is so of the weight that a change is of.

        Raises:
            MismatchError: nothing tells.
        """
        if change.transposed or f"{target.removesuffix('out_proj.weight')}in_proj_weight" in self._base.tensors:
            return False  # embeddings, and torch's attention, are stored in one way
        last, model_type = _leaf(target), self._base.config.get("model_type")
        sides = len(self._base.tensors[target].info.shape)
        for votes in (self._by_bias, self._by_products):
            if (said := votes.get((sides, last))) is not None:
                return said
        if sides == 3:
            return model_type in _STORED_IN_OUT_IN_BATCHES
        if model_type in _STORED_IN_OUT:
            return last in ("c_attn", "q_attn", "c_proj", "c_fc")
        said_by_config = bool(self._adapter.config.get("fan_in_fan_out"))
        others = {said for (sides, _), said in self._by_products.items() if sides == 2}
        if others == {not said_by_config}:
            return not said_by_config
        if len(others) > 1:
            raise MismatchError(
                f"{self._adapter.file}: {printable(change.called)} is square, and whether {printable(target)} is "
                "stored [out, in] or [in, out] is not known: the adapter has weights of both kinds",
                hint="Fold it into its base with peft (merge_and_unload, then save_pretrained), and give that folder.",
            )
        return said_by_config

    @cached_property
    def _by_bias(self) -> _Stored:
        """By how many sides weights have and the last part of modules' names: whether their biases are as long as rows,
        and weights no squares.
        """
        votes: dict[tuple[int, str], Counter[bool]] = defaultdict(Counter)
        for name, stored in self._base.tensors.items():
            info = stored.info
            if len(info.shape) == 2 and info.shape[0] != info.shape[1] and name.endswith(".weight"):
                bias = self._base.tensors.get(f"{name.removesuffix('.weight')}.bias")
                if bias is not None and len(bias.info.shape) == 1 and bias.info.shape[0] in info.shape:
                    votes[2, _leaf(name)][bias.info.shape[0] == info.shape[1]] += 1
            elif len(info.shape) == 3 and info.shape[1] != info.shape[2]:
                bias = self._base.tensors.get(f"{name}_bias")
                if bias is not None and len(bias.info.shape) == 2 and bias.info.shape[1] in info.shape[1:]:
                    said = bias.info.shape[1] == info.shape[2]
                    for parameter in ("gate_up_proj", "down_proj", _leaf(name)):
                        votes[3, parameter][said] += 1
        return _agreed(votes)

    @cached_property
    def _by_products(self) -> _Stored:
        """The same by the adapter's own products that are no squares."""
        votes: dict[tuple[int, str], Counter[bool]] = defaultdict(Counter)
        for change, target in self._targets.pairs():
            if change.kind != "low rank" or change.transposed or target not in self._base.tensors:
                continue
            shape = self._base.tensors[target].info.shape
            own = change.factors["B"].info.shape[0], change.factors["A"].info.shape[1]
            if own[0] != own[1] and shape[-2:] in (own, own[::-1]):
                leaves = ("gate_up_proj", "down_proj") if len(shape) == 3 else (_leaf(target),)
                for leaf in leaves:
                    votes[len(shape), leaf][shape[-2:] != own] += 1
        return _agreed(votes)


_STORED_IN_OUT = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer"})
_STORED_IN_OUT_IN_BATCHES = frozenset({"gpt_oss", "aria", "aria_text", "openai_privacy_filter"})


def _agreed(votes: Mapping[tuple[int, str], Counter[bool]]) -> _Stored:
    return {key: next(iter(said)) for key, said in votes.items() if len(said) == 1}


def _leaf(name: str) -> str:
    """The last part of a module's name; of a bare parameter its own."""
    return name.removesuffix(".weight").rpartition(".")[2]
