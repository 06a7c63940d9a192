"""How layouts of one model differ: the rules by which transformers makes the names and tensors of a checkpoint those of
its modules, as data (`conversions.json`, which docs/conversions.py writes). Nothing of transformers is imported.

A rule renames, or it converts: the checkpoint's tensors on one hand (`experts.0.gate_proj.weight`, `experts.1...`), the
modules' on the other (`experts.gate_up_proj`), and what is done to get from the first to the second.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from lines_cli.plan.pieces import Pieced, cut, joined, stacked, turned, unstacked
from lines_cli.plan.same_names import canonical, unwrapped

Operation = tuple[Any, ...]
"""Its name, and the axes it is about: `stack`, `cat`, `chunk`, `split`, `transpose`, or one that is not carried out."""


class Found(NamedTuple):
    """Where a pattern stands in a name.

    Attributes:
        before, behind: what of the name stands around it.
        number: what its `*` stands for; None where it has none.
    """

    before: str
    behind: str
    number: int | None


class Pattern:
    """Text that a name holds, whole words of it; a `*` in it stands for a number."""

    def __init__(self, text: str) -> None:
        self.text, self.counts = text, "*" in text
        # The longest piece of it, to be looked for first.
        self._word = max(text.split("*"), key=len)
        begin = "" if text.startswith(".") else r"(?:(?<=\.)|\A)"
        end = "" if text.endswith(".") else r"(?=\.|\Z)"
        self._expression = re.compile(begin + re.escape(text).replace(r"\*", r"(\d{1,9})") + end)

    def find(self, name: str) -> Found | None:
        """Where it stands, if it does, and only there."""
        if self._word not in name:
            return None
        found = self._expression.search(name)
        if found is None or self._expression.search(name, found.start() + 1):
            return None
        return Found(name[: found.start()], name[found.end() :], int(found[1]) if self.counts else None)


@dataclass(frozen=True, eq=False)
class Conversion:
    """Tensors of a checkpoint on one hand, those of the modules on the other.

    Attributes:
        sources, targets: the patterns of their names.
        operations: how the sources become the targets.
        of: whose rule it is: a model type, or a class of transformers.
    """

    sources: tuple[Pattern, ...]
    targets: tuple[Pattern, ...]
    operations: tuple[Operation, ...]
    of: str

    @property
    def turns(self) -> bool:
        """Whether a tensor keeps its name, and may be stored the other way round."""
        return "if shapes differ" in self.operations[0]

    @property
    def is_plain(self) -> bool:
        """Whether names alone say what it does, whatever the model: lists of experts, and `gate_up_proj`."""
        texts = [pattern.text for pattern in (*self.sources, *self.targets)]
        gate_up = any(re.search(r"gate_up_proj(?:\.weight)?$", text) for text in texts)
        return self._kinds <= {"stack", "cat", "chunk"} and ("stack" in self._kinds or gate_up)

    @property
    def can_be_carried_out(self) -> bool:
        """Whether all of its operations are known here."""
        return self._kinds <= {"stack", "cat", "chunk", "split", "transpose"}

    @property
    def puts_together(self) -> bool:
        """Whether entries only move: tensors are put together or cut apart, and none is turned."""
        return self._kinds <= {"stack", "cat", "chunk"}

    @cached_property
    def _kinds(self) -> frozenset[str]:
        return frozenset(operation[0] for operation in self.operations)

    def forward(self, sources: Sequence[Sequence[Pieced]], sizes: Sequence[int]) -> list[Pieced] | None:
        """The targets, made of the sources; None if their shapes do not allow it.

        Args:
            sources: for each pattern those that its `*` numbers, or the only one.
            sizes: of the targets along the axis that they are cut along, if they are.
        """
        steps = self._steps(sources, sizes)
        return steps[-1] if steps else None

    def _steps(self, sources: Sequence[Sequence[Pieced]], sizes: Sequence[int]) -> list[list[Pieced]]:
        """The tensors before each operation, and behind the last; empty if their shapes do not allow it."""
        held = [list(of_one) for of_one in sources]
        steps = [_flat(held)]
        for kind, *axes in self.operations:
            made: Sequence[Pieced | None]
            if kind == "stack":
                made = [stacked(of_one) for of_one in held]
            elif kind == "cat":
                made = [joined(steps[-1], axes[0])]
            elif kind == "transpose":
                made = [turned(tensor, axes[0], axes[1]) for tensor in steps[-1]]
            else:
                made = cut(steps[-1][0], axes[0], sizes) or [None]
                if kind == "chunk" and len(set(sizes)) > 1:  # which are equal there
                    made = [None]
            held = [[tensor] for tensor in made if tensor is not None]
            if len(held) < len(made):
                return []
            steps.append(_flat(held))
        return steps

    def backward(self, targets: Sequence[Pieced], like: Sequence[Sequence[Pieced]]) -> list[list[Pieced]] | None:
        """The sources, made of the targets; None if their shapes do not allow it.

        Args:
            targets: for each pattern.
            like: sources of the shapes that are wanted, as `forward` takes them.
        """
        before = self._steps(like, ()) if "cat" in self._kinds else [[] for _ in self.operations]
        held: list[list[Pieced]] = [[tensor] for tensor in targets]
        for (kind, *axes), wanted in reversed(list(zip(self.operations, before, strict=False))):
            flat = _flat(held)
            made: Sequence[Pieced | None]
            if kind == "stack":
                held = [unstacked(tensor) for tensor in flat]
                continue
            if kind == "cat":
                made = cut(flat[0], axes[0], [tensor.shape[axes[0]] for tensor in wanted]) or [None]
            elif kind == "transpose":
                made = [turned(tensor, axes[0], axes[1]) for tensor in flat]
            else:
                alike = kind != "chunk" or len({tensor.shape for tensor in flat}) == 1
                made = [joined(flat, axes[0]) if alike else None]
            held = [[tensor] for tensor in made if tensor is not None]
            if len(held) < len(made):
                return None
        return held if before else None


def _flat(held: Sequence[Sequence[Pieced]]) -> list[Pieced]:
    return [tensor for of_one in held for tensor in of_one]


class Rules:
    """The rules of a model, or of a part of it.

    Args:
        names: whose rules, in their order.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)
        self.renames: list[tuple[re.Pattern[str], str]] = []
        self.conversions: list[Conversion] = []
        for name in names:
            for kind, *rule in _rules_of(name):
                if kind == "rename":
                    self.renames.append((re.compile(rule[0]), rule[1]))
                else:
                    sources, targets, operations = rule
                    self.conversions.append(
                        Conversion(
                            tuple(map(_pattern, sources)),
                            tuple(map(_pattern, targets)),
                            tuple(tuple(operation) for operation in operations),
                            name,
                        )
                    )

    def __len__(self) -> int:
        return len(self.renames) + len(self.conversions)

    def renamed(self, name: str) -> str:
        """The modules' name for a tensor that the checkpoint calls so; without what wrappers put into it."""
        name = unwrapped(name)
        if len(name) > _LONGEST:
            return name
        for number in range(len(self.renames)):
            name = self.renamed_once(name, number)
        return name

    def renamed_once(self, name: str, number: int) -> str:
        """What one of the renames makes of a name."""
        pattern, instead = self.renames[number]
        if len(name) <= _LONGEST and (found := pattern.search(name)):
            new = found.expand(instead) if "\\" in instead else instead
            more = new.find(found[0])
            if more < 0 or not name.startswith(new, max(found.start() - more, 0)):  # else it is called so already
                return name.replace(found[0], new, 1)
        return name

    def canonical(self, name: str) -> str:
        """The one name for all that a tensor is known to be called, by these rules, too."""
        return canonical(self.renamed(name))


_LONGEST = 1000  # of a stranger's name, that expressions are run on
_pattern = cache(Pattern)


@cache
def _table() -> Mapping[str, Any]:
    values: Mapping[str, Any] = json.loads(Path(__file__).with_name("conversions.json").read_text(encoding="utf-8"))
    return values


def version_of_rules() -> str:
    """The version of transformers that the rules are of."""
    return str(_table()["transformers"])


def _rules_of(name: str) -> Sequence[Sequence[Any]]:
    table = _table()
    rules: Sequence[Sequence[Any]] = table["rules"].get(table["like"].get(name, name), ())
    return rules


def rules_for(configs: Iterable[Mapping[str, Any]]) -> Rules:
    """The rules for what configs say of a model: its type and class, and the types of its parts."""
    table, names = _table(), dict[str, None]()
    for config in configs:
        classes = config.get("architectures")
        classes = [one for one in classes if isinstance(one, str)] if isinstance(classes, list) else []
        for kind in _types(config):
            of_type = [one for one, type_of in table["of"].items() if type_of == kind]
            names |= dict.fromkeys(one for one in classes if one in of_type)
            names[kind] = None
            names |= dict.fromkeys(one for one in of_type if one.endswith(_OF_ALL))
    return _rules_by(tuple(name for name in names if _rules_of(name)))


_rules_by = lru_cache(maxsize=64)(Rules)


class LoadingRules(Rules):
    """The rules by which transformers makes a checkpoint's names those of its modules, each where it is used: those of
    the whole everywhere; those of its parts behind what they are called in the whole.

    Args:
        names: whose rules, in their order.
        whole: which of these are of the whole.
    """

    def __init__(self, names: Sequence[str], whole: frozenset[str]) -> None:
        super().__init__(names)
        self._levels = [(name in whole, Rules([name])) for name in names]

    def renamed(self, name: str) -> str:
        """The modules' name for a tensor that the checkpoint calls so; without what wrappers put into it."""
        name = unwrapped(name)
        for of_whole, rules in self._levels:
            for number in range(len(rules.renames)):
                ends = [0] if of_whole or not rules.renames[number][0].pattern.startswith("^") else _dots(name)
                for end in ends:
                    if (new := rules.renamed_once(name[end:], number)) != name[end:]:
                        name = name[:end] + new
                        break
        return name


def _dots(name: str) -> list[int]:
    """Where what is behind the first dots of a name begins."""
    found, at = list[int](), name.find(".") + 1
    while at and len(found) < _DEEPEST_PART:
        found.append(at)
        at = name.find(".", at) + 1
    return found


_DEEPEST_PART = 3  # how far inside a model one may be that is a part of it


def loading_rules(config: Mapping[str, Any]) -> LoadingRules:
    """The rules that transformers follows where it loads a model of that config."""
    names = rules_for([config]).names
    kind, table = config.get("model_type"), _table()
    classes = config.get("architectures")
    own = classes[0] if isinstance(classes, list) and classes and classes[0] in names else None
    whole = own or (kind if isinstance(kind, str) and kind in names else None)
    # a class has its own rules in place of its type's; and none of those that stand for it as a part
    left = [name for name in names if name == own or not (own and name == kind and table["of"].get(own) == kind)]
    return LoadingRules(left, frozenset([whole] if whole else []))


def turning(configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether matrices of such a model may be stored the other way round under one name."""
    return any(conversion.turns for conversion in rules_for(configs).conversions)


_OF_ALL = ("Model", "Encoder", "Transformer")  # classes that are a part of all others of their type


def _types(config: Mapping[str, Any]) -> Iterator[str]:
    """The model type of a config, and of the configs in it."""
    inner = [config]
    for _ in range(_MOST_CONFIGS):
        if not inner:
            return
        one = inner.pop(0)
        if isinstance(one.get("model_type"), str):
            yield one["model_type"]
        inner += [value for key, value in one.items() if key.endswith("_config") and isinstance(value, dict)]


_MOST_CONFIGS = 20


@cache
def plain_rules() -> tuple[Rules, ...]:
    """The rules of each model by itself, to be tried where no config says which it is; of conversions only those about
    which names say enough.
    """
    found = []
    for name in _table()["rules"]:
        rules = Rules([name])
        rules.conversions = [conversion for conversion in rules.conversions if conversion.is_plain]
        found.append(rules)
    return tuple(sorted(found, key=len))
