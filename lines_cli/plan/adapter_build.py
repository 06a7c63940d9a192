"""Recipe and headers in, the plan of an adapter out: one adapter scaled by depth, or several merged with their ranks
side by side. A whole fine-tune's is planned in `extraction`. No weight of a base is read for it.

    scaled    A stays, B' = c(l) * B; of LoHa and LoKr one factor        the config stays
    merged    A' = [A_1; A_2; ...], B' = [f_1 * B_1, f_2 * B_2, ...]    f_i = c(l) * share_i * scale_i; scale 1
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

from lines_cli.checkpoint.adapter import Adapter, Change
from lines_cli.checkpoint.adapter_output import PREFIX, strongest_bias, targets_in
from lines_cli.checkpoint.header import WIDER, StoredTensor
from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.errors import DepthError, MismatchError, RecipeError, UnsupportedError, printable, some
from lines_cli.methods import METHODS
from lines_cli.plan.adapter_inputs import AdapterInputs
from lines_cli.plan.adapter_layout import laid_out
from lines_cli.plan.adapter_plan import AdapterModule, AdapterPlan, Entries, Part, Product, Role, Term
from lines_cli.plan.coefficients import unlike_lines
from lines_cli.plan.components import regions_of
from lines_cli.plan.relaid import as_loaded
from lines_cli.plan.tensors import STORED, Ranges, SourceRange, TensorValues, refuse_idle_filters
from lines_cli.plan.tied_weights import is_head, is_vocabulary, says_tied, tied_embeddings, tied_partner
from lines_cli.plan.weights import rules_among
from lines_cli.recipe.schema import UNSCALED, Recipe
from lines_cli.scaling.find_depth import DepthMap, config_counts, find_depth, joined
from lines_cli.scaling.numbered_lists import read_lists
from lines_cli.scaling.partial import completed, layers_held, refuse_other_counts
from lines_cli.scaling.schedule import Rules
from lines_cli.storage.destination import is_one_file

_SCALED = {"low rank": ("B",), "hadamard": ("a1",), "kronecker": ("w1", "w1_a"), "difference": ("D",)}
"""Of each kind of change that adds an update, the factor that is scaled: the one of these that is there."""
_NO_SUM = {
    "rescaled": "it gives the rows of weights a norm (DoRA), so it adds no update",
    "rows": "it replaces rows of a table (trainable tokens)",
}
_AS_IT_IS = 1e-12  # how far from 1 a sum of shares may be that is meant to be 1


def refuse_one_file(output: Path) -> None:
    """Refuse a destination that is a file, where the output has a config.

    Raises:
        RecipeError: names the folder to give in its place.
    """
    if is_one_file(output):
        raise RecipeError(
            f"-o {output}: an adapter is a folder, for how it is scaled stands in a config beside its tensors",
            hint=f"Give a folder: -o {output.with_suffix('')}.",
        )


def plan_of_adapters(opened: AdapterInputs, output: Path) -> AdapterPlan:
    """Plan an adapter that is one scaled, or several merged.

    Raises:
        RecipeError: the method is no weighted sum; a stack or a filter names nothing there.
        DepthError: how many layers the base has is not known, or which tensor stands at which depth.
        MismatchError: adapters of different bases.
        UnsupportedError: an adapter holds what cannot be scaled, or merged, without its base.
    """
    recipe = opened.recipe
    scaled = len(opened.adapters) == 1 and recipe.rank is None and recipe.energy is None
    if any(adapter.config for adapter in opened.adapters):
        refuse_one_file(output)
    builder = _Builder(opened, output, in_place=scaled)
    return laid_out(builder.scaled() if scaled else builder.merged())


class Shares:
    """What multiplies each model's update of a tensor, and the coefficient in it.

    Args:
        recipe: what was asked.
        depth, rules: what decides the coefficients.
        heads: what head is tied to what embedding.
    """

    def __init__(self, recipe: Recipe, depth: DepthMap, heads: Mapping[str, str]) -> None:
        self._recipe, self._depth, self._heads = recipe, depth, heads
        self._values = TensorValues(recipe, depth)
        self.rules = self._rules()

    def _rules(self) -> Rules:
        """What decides the coefficients.

        Raises:
            RecipeError: alpha, or what a depth rule asks for, would have to be measured on whole tensors.
        """
        recipe, lines = self._recipe, self._recipe.lines or UNSCALED
        if lines.measured_rule and lines.needs_depth:
            raise RecipeError(
                f"lines.schedule: {lines.schedule} is measured on whole matrices, and an adapter is scaled without any",
                hint="Put the adapter onto its base first (lines edit BASE ADAPTER); or take a schedule that follows "
                "from the depth alone, such as linear or cosine.",
            )
        if rules := rules_among(recipe, recipe.values("", 0.0)):
            raise RecipeError(
                f"{recipe.method.counts_by}: {min(rules)} is measured on whole task vectors, and an adapter is merged "
                "without any",
                hint="Say numbers; or merge into a whole model (base_model, and no as_adapter).",
            )
        number, alpha = len(recipe.merged), None
        if lines.needs_alpha:
            if not recipe.plain_sum(recipe.values("", 0.0)) or recipe.filters or recipe.parameters_vary:
                raise RecipeError(
                    f"lines.alpha: auto is 1/N for a plain sum only; with {recipe.merge_method} and these parameters "
                    "it is measured on whole tensors, and an adapter is merged without any",
                    hint=f"Say a number, as in alpha: {1 / number:.4g}.",
                )
            alpha = 1 / number
        return lines.rules(self._depth, alpha=alpha)

    def __call__(self, name: str) -> tuple[float, tuple[float, ...]]:
        """The coefficient of a tensor, and what multiplies each model's update, that included; in float64.

        Raises:
            RecipeError: what the method makes is no weighted sum of task vectors; or the coefficient is no number.
        """
        recipe = self._recipe
        counts_as = name if name in self._depth.places else self._heads.get(name, name)
        values = self._values(counts_as)
        shares = recipe.method.shares(values, len(recipe.merged))
        if shares is None:
            sums = ", ".join(sorted(name for name, method in METHODS.items() if method.may_be_a_sum))
            raise RecipeError(
                f"merge_method: {recipe.merge_method} with these parameters is no weighted sum of task vectors, so "
                "what it gives has no low rank, and no adapter holds it",
                hint="Merge into a whole model (base_model, and no as_adapter); or take one of these methods, with all "
                f"entries kept: {sums}.",
            )
        scale = recipe.method.scale_of(values)
        coefficient = self.rules.coefficient(counts_as, self._depth, scale=scale)
        if not math.isfinite(coefficient):
            raise RecipeError(f"the coefficient of {printable(name)} is {coefficient:g}")
        return coefficient, tuple(coefficient * share for share in shares)


@dataclass(frozen=True)
class _Changed:
    """What all adapters change of one tensor in one way.

    Attributes:
        tensor: the base's name of it; where no base is known, the adapter's.
        changes: each model's change, by its number.
        name: the tensor of the model, which the base may store in another layout.
        others: more tensors of the base that it is, where that stores it in another layout, or ties them.
    """

    tensor: str
    changes: Mapping[int, Change]
    name: str
    others: tuple[str, ...] = ()

    @property
    def first(self) -> tuple[int, Change]:
        return next(iter(self.changes.items()))


class _Builder:
    """What is known of a plan while it is made."""

    def __init__(self, opened: AdapterInputs, output: Path, *, in_place: bool) -> None:
        self.opened, self.recipe, self.output, self.adapters = opened, opened.recipe, output, opened.adapters
        self.notes = [*self.recipe.notes, *opened.notes, *(note for one in self.adapters for note in one.notes)]
        if self.recipe.prefix is not None:
            raise RecipeError("prefix: that is of whole models, and these are adapters; leave it out")
        if not in_place:
            _refuse_two_forms(self.adapters)
        for adapter in self.adapters:
            for change in adapter.changes:
                _refuse_unknown(adapter, change, in_place=in_place)
        self.tensor_of = [opened.tensors_of(adapter) for adapter in self.adapters]
        self.changed = self._grouped()
        names = [changed.tensor for changed in self.changed]
        base = opened.base
        self.whole = base is not None and bool(base.tensors)
        self.depth = self._depth(names)
        self.notes += self.depth.notes
        heads = tied_embeddings(base, base.config) if base is not None and self.whole else {}
        self.shares = Shares(self.recipe, self.depth, heads)
        refuse_idle_filters(self.shares.rules, base.tensors if base is not None and self.whole else names)
        first_model = 1 if opened.inputs.has_base else 0
        self.ranges = [Ranges(opened.inputs, side) for side in range(len(opened.inputs.checkpoints))]
        self.file_of = [opened.inputs.file_numbers[first_model + n][0] for n in range(len(self.adapters))]
        self.spelled = [
            {stored.info.offset: name for name, stored in adapter.checkpoint.tensors.items()}
            for adapter in self.adapters
        ]
        every = [(number, change) for number, adapter in enumerate(self.adapters) for change in adapter.changes]
        self.biases = {
            (number, change.called): change.factors["D"]
            for number, change in every
            if change.kind == "difference" and ".lora_" in self.spelled[number][change.factors["D"].info.offset]
        }
        """Those of factors B, which go with their products."""

    def _grouped(self) -> list[_Changed]:
        found: dict[tuple[str, str, bool], dict[int, Change]] = {}
        stored: dict[tuple[str, str, bool], tuple[str, ...]] = {}
        for number, (adapter, tensor_of) in enumerate(zip(self.adapters, self.tensor_of, strict=True)):
            for change in adapter.changes:
                tensor = tensor_of.get(next(iter(change.factors.values())).info.offset)
                if tensor is None:
                    raise MismatchError(
                        f"{adapter.file}: {printable(change.called)} is no module of "
                        f"{self.opened.base.name if self.opened.base else 'the base'}",
                        hint="An adapter of several parts of a pipeline has depths that no one of them tells: say how "
                        "many layers each has (--num-layers NAME=L), in place of --base.",
                    )
                # a head that is one weight with the embedding is a module of its own
                key = tensor.name, change.kind, is_head(change.name)
                if number in found.setdefault(key, {}):
                    raise UnsupportedError(
                        f"{adapter.file}: {printable(tensor.name)} is changed twice",
                        hint=f"Fold it into its base: lines edit BASE {adapter.name} -o OUT.",
                    )
                found[key][number], stored[key] = change, tensor.stored
        return [_Changed(stored[key][0], changes, key[0], stored[key][1:]) for key, changes in found.items()]

    def _shares(self, changed: _Changed) -> tuple[float, tuple[float, ...]]:
        """As `Shares`, of something that adapters change.

        Raises:
            UnsupportedError: the base stores it in several tensors, whose coefficients differ.
        """
        found = self.shares(changed.tensor)
        for other in changed.others:
            if self.shares(other) != found:
                raise UnsupportedError(
                    f"{printable(changed.first[1].called)} is one product, and the coefficients of what it changes "
                    f"differ: of {printable(changed.tensor)} and {printable(other)}",
                    hint="Let filters say the same of both; or fold the adapter into its base: lines edit BASE "
                    f"{self.adapters[changed.first[0]].name} -o OUT.",
                )
        return found

    def _depth(self, names: Sequence[str]) -> DepthMap:
        """Where the tensors stand that are changed.

        Raises:
            DepthError: that makes a difference, and is not known.
        """
        recipe, base = self.recipe, self.opened.base
        needed = bool(recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary
        by_hand = recipe.lines.by_hand if recipe.lines else {}
        try:
            if base is not None and base.components:
                if any(by_hand.values()):
                    raise RecipeError(
                        f"what is said of depth is of one model, and {base.name} holds several",
                        hint="Give one of its folders as the base, and the part of the adapter that is for it.",
                    )
                return _by_component(base, names)
            if base is not None and self.whole:
                parameters = {name: stored.info.numel for name, stored in base.tensors.items()}
                return find_depth(parameters, config=base.config, parameters=parameters, **by_hand)
            layers = recipe.num_layers if base is None else _layers_in(base.config, base.name)
            if layers is None and not needed:  # as many as are numbered: it makes no difference but to the summary
                layers = {stack: max(numbers) + 1 for stack, numbers in layers_held(names).items()}
            layers = _known(layers, names)
            depth = find_depth(completed(names, layers), **by_hand)
            refuse_other_counts(depth, names, layers)
        except DepthError:
            if needed:
                raise
            return DepthMap((), {})
        places = {name: depth.places[name] for name in names if name in depth.places}
        return replace(depth, places=places, notes=())

    # --- one adapter, scaled ---

    def scaled(self) -> AdapterPlan:
        """The adapter with its factors B scaled."""
        (adapter,) = self.adapters
        entries: dict[str, tuple[str, tuple[int, ...], Entries]] = {}
        of_offset: dict[int, Entries] = {}
        modules = []
        whole: list[tuple[str, Change]] = []
        for changed in self.changed:
            change = changed.changes[0]
            coefficient, (factor,) = self._shares(changed)
            role = next((role for role in _SCALED.get(change.kind, ()) if role in change.factors), None)
            if change.kind == "whole":
                stored = change.factors["whole"]
                if self._is_underneath(changed, 0):
                    continue  # the base's own, which is copied
                made = self._whole(changed, (factor,))
                if made is None:
                    whole.append((changed.tensor, change))
                    continue
                of_offset[stored.info.offset] = made
                continue
            assert role is not None
            stored = change.factors[role]
            of_offset[stored.info.offset] = Entries((Part(self._range(0, stored), factor),))
            if change.kind != "difference":
                place = self.depth.places.get(changed.tensor)
                modules.append(AdapterModule(change.called, changed.tensor, place, coefficient, change.rank or 0, 0))
        self._refuse_whole(whole, adapter)
        for name, stored in adapter.checkpoint.tensors.items():
            copied = Entries((Part(self._range(0, stored), 1.0),))
            made = of_offset.get(stored.info.offset, copied)
            dtype = self._dtype([stored]) if stored.info.offset in self.tensor_of[0] else stored.info.dtype
            entries[name] = (dtype, stored.info.shape, made)
        return self._plan("scaled", modules, entries, like=adapter.config)

    def _is_underneath(self, changed: _Changed, number: int) -> bool:
        """Whether a whole tensor of an adapter is the base's own weight beneath a product, as PEFT saves those of
        embeddings. A bias there is trained.
        """
        own = self.spelled[number][changed.changes[number].factors["whole"].info.offset]
        return own.endswith(".base_layer.weight") and self._product_on(changed.tensor, number) is not None

    def _product_on(self, tensor: str, number: int | None = None) -> int | None:
        """Which adapter, of all or one, adds a product to a tensor; None if none does."""
        return next(
            (
                other
                for one in self.changed
                if one.tensor == tensor
                for other, change in one.changes.items()
                if change.kind not in ("whole", "difference") and number in (None, other)
            ),
            None,
        )

    def _module(self, changed: _Changed, coefficient: float, rank: int) -> AdapterModule:
        _, change = changed.first
        a, b = change.factors["A"], change.factors["B"]
        shapes = (a.info.shape[1:], (b.info.shape[0], *b.info.shape[2:]))
        side = min(math.prod(shapes[0]), shapes[1][0])
        place = self.depth.places.get(changed.tensor)
        name = self._renamed.get(change.module, change.called)
        return AdapterModule(name, changed.tensor, place, coefficient, rank, side, shapes=shapes)

    # --- several, merged ---

    def merged(self) -> AdapterPlan:
        """The adapters with their factors side by side, or with fewer ranks than these have."""
        recipe = self.recipe
        entries: dict[str, tuple[str, tuple[int, ...], Entries]] = {}
        modules: list[AdapterModule] = []
        lacking: list[tuple[str, Change]] = []
        beyond = 0
        for changed in self.changed:
            coefficient, factors = self._shares(changed)
            number, first = changed.first
            if first.kind == "difference":
                self._add_differences(changed, factors, entries)
                continue
            if first.kind == "whole":
                if self._all_underneath(changed):
                    continue
                stored = [change.factors["whole"] for change in changed.changes.values()]
                made = self._whole(changed, factors)
                if made is None:
                    lacking.append((changed.tensor, first))
                    continue
                name = self.spelled[number][first.factors["whole"].info.offset]
                entries[name] = (self._dtype(stored), stored[0].info.shape, made)
                continue
            module = self._side_by_side(changed, coefficient, factors)
            most = recipe.rank if recipe.rank is not None else module.side
            beyond += recipe.rank is not None and recipe.rank > module.side
            reduced = recipe.energy is not None or (recipe.rank is not None and module.rank > most)
            if reduced and module.matrices > 1:
                raise UnsupportedError(
                    f"{printable(module.name)} is {module.matrices:,} matrices in one, the experts', and has a product "
                    "for each: their ranks are put side by side, and not made fewer",
                    hint="Leave out rank and energy; or merge into a whole model: base_model, and no as_adapter.",
                )
            if reduced:
                module = replace(module, rank=min(module.rank, most, module.side), reduced=True)
            modules.append(module)
        self._refuse_two_of_one_name(modules)
        if beyond:
            self.notes.append(
                f"rank {recipe.rank:,} is more than {beyond:,} module(s) can have: there it is the smaller side"
            )
        self._refuse_whole(lacking, self.adapters[0])
        configs = [adapter.config for adapter in self.adapters]
        changed_by_all = all(len(changed.changes) == len(self.adapters) for changed in self.changed)
        tied = {bool(config.get("ensure_weight_tying")) for config in configs}
        like = {key: value for key, value in configs[0].items() if key != "ensure_weight_tying" or tied == {True}}
        saved = [name for config in configs for name in config.get("modules_to_save") or ()]
        plan = self._plan("merged", modules, entries, like=like)
        return replace(
            plan,
            targets=targets_in(configs) if changed_by_all and len(tied) == 1 else None,
            every=self._every() if self.whole else None,
            bias=strongest_bias(configs),
            lora_bias=any("bias" in module.names for module in modules),
            saved=tuple(dict.fromkeys(map(str, saved))),
            needs=recipe.energy is not None,
        )

    def _refuse_two_of_one_name(self, modules: Iterable[AdapterModule]) -> None:
        """Refuse parameters of a module whose factors would be called the same: PEFT wraps the module once for each,
        and which wrapper is which parameter's depends on what others there are.
        """
        owners: dict[str, AdapterModule] = {}
        for module in modules:
            other = owners.setdefault(module.names["A"], module)
            if other is not module:
                raise UnsupportedError(
                    f"{printable(other.name)} and {printable(module.name)} are changed by one adapter each, and "
                    "factors of both are called the same there",
                    hint="Merge into a whole model: base_model, and no as_adapter.",
                )

    def _add_differences(
        self,
        changed: _Changed,
        factors: Sequence[float],
        entries: dict[str, tuple[str, tuple[int, ...], Entries]],
    ) -> None:
        """The sum of tensors that are added as they are; a bias of a product goes with that."""
        parts, stored = list[Part](), list[StoredTensor]()
        for number, change in changed.changes.items():
            if self.biases.get((number, change.called)) != change.factors["D"]:
                stored.append(change.factors["D"])
                parts.append(Part(self._range(number, stored[-1]), factors[number] * change.scale))
        if parts:
            number, change = changed.first
            name = self.spelled[number][change.factors["D"].info.offset]
            entries[name] = (self._dtype(stored), stored[0].info.shape, Entries(tuple(parts)))

    def _all_underneath(self, changed: _Changed) -> bool:
        """Whether a tensor that adapters hold whole is nothing but the base's own beneath their products.

        Raises:
            UnsupportedError: one holds it whole, another adds a product to it.
        """
        underneath = [number for number in changed.changes if self._is_underneath(changed, number)]
        if len(underneath) == len(changed.changes):
            return True
        product = self._product_on(changed.tensor)
        if product is not None and not changed.tensor.endswith(".bias"):
            holder = next(number for number in changed.changes if number not in underneath)
            raise UnsupportedError(
                f"{self.adapters[holder].name} holds {printable(changed.tensor)} whole, and "
                f"{self.adapters[product].name} adds a product to it: no adapter holds the sum",
                hint="Merge into a whole model: base_model, and no as_adapter.",
            )
        return False

    def _side_by_side(self, changed: _Changed, coefficient: float, factors: Sequence[float]) -> AdapterModule:
        """A module with the factors of all adapters.

        Raises:
            MismatchError: they are of weights of different shapes.
        """
        module = self._module(changed, coefficient, 0)
        parameter = changed.name.rpartition(".")[2]
        batches, levels, of_parameter = set[int](), set[int](), False
        terms, stored, rank = [], list[StoredTensor](), 0
        for number, change in changed.changes.items():
            a, b = change.factors["A"], change.factors["B"]
            own_rank, scale = change.others.get(parameter, (change.rank or 0, change.scale))
            batches.add(a.info.shape[0] // own_rank)
            levels.add(self.spelled[number][a.info.offset].count(".base_layer."))
            of_parameter |= bool(change.others)
            own = (a.info.shape[1:], (b.info.shape[0], *b.info.shape[2:]))
            if own != module.shapes or len(batches) > 1:
                one, other = self.adapters[changed.first[0]], self.adapters[number]
                raise MismatchError(
                    f"{printable(changed.tensor)}: {one.name} changes {_shown(module.shapes)}, and {other.name} "
                    f"{_shown(own)}{' of another number of experts' if len(batches) > 1 else ''}",
                    hint="They were trained on different bases: merge adapters of one.",
                )
            bias = self.biases.get((number, change.called))
            stored += [a, b, *([bias] if bias is not None else [])]
            rank += own_rank
            placed = [None if one is None else _in_file(one, self.file_of[number]) for one in (a, b, bias)]
            assert placed[0] is not None
            assert placed[1] is not None
            terms.append(Term(placed[0], placed[1], placed[2], factors[number] * scale))
        if len(levels) > 1:
            raise self._not_side_by_side(changed, "adapters change different parameters beside it")
        if not of_parameter and levels != {0}:
            raise self._not_side_by_side(changed, "it is a module within another that PEFT changes")
        if of_parameter:
            module = replace(module, name=f"{module.name}.{parameter}", of_parameter=True, matrices=batches.pop())
        names = self._named(changed, bias=any(term.bias is not None for term in terms))
        made = Product(tuple(terms))
        return replace(module, rank=rank, made=made, dtype=self._dtype(stored), names=names)

    def _not_side_by_side(self, changed: _Changed, why: str) -> UnsupportedError:
        number, change = changed.first
        own = self.spelled[number][change.factors["A"].info.offset]
        return UnsupportedError(
            f"{self.adapters[number].file}: ranks of {printable(own)} are not put side by side: {why}",
            hint="Merge into a whole model: base_model, and no as_adapter.",
        )

    def _named(self, changed: _Changed, *, bias: bool) -> dict[Role, str]:
        """What a module's tensors are called in PEFT's files, an embedding's by its own words."""
        number, change = changed.first
        own = self.spelled[number][change.factors["A"].info.offset]
        if not self.adapters[number].config:
            others = ((n, other.called) for n, other in changed.changes.items())
            with_bias = next(
                (self.spelled[key[0]][self.biases[key].info.offset] for key in others if key in self.biases), ""
            )
            found: dict[Role, str] = {"A": own, "B": self.spelled[number][change.factors["B"].info.offset]}
            return found | ({"bias": with_bias} if bias else {})
        if "lora_embedding_A" in own:
            ends: dict[Role, str] = {"A": "lora_embedding_A", "B": "lora_embedding_B"}
        else:
            ends = {"A": "lora_A.weight", "B": "lora_B.weight", **({"bias": "lora_B.bias"} if bias else {})}
        module = self._renamed.get(change.module, change.called) + ".base_layer" * own.count(".base_layer.")
        return {role: f"{PREFIX}{module}.{end}" for role, end in ends.items()}

    @cached_property
    def _renamed(self) -> dict[str, str]:
        """Of modules that one adapter calls as files do, and another as transformers does that renames on loading, the
        names of the latter; empty where all agree, for then what loads the one loads the other.
        """
        base, old, new = self.opened.base, dict[str, str](), False
        loaded = {own: name for name, own in as_loaded(base).names.items()} if base is not None and self.whole else {}
        for changed in self.changed:
            own, name = (of.rpartition(".")[0] for of in (changed.tensor, loaded.get(changed.tensor, changed.tensor)))
            for change in changed.changes.values() if own != name else ():
                if f".{change.module}".endswith(f".{name}"):
                    new = True
                elif f".{change.module}".endswith(f".{own}"):
                    old[change.module] = change.module.removesuffix(own) + name
        return old if new else {}

    # --- what both have in common ---

    def _plan(
        self,
        how: str,
        modules: Iterable[AdapterModule],
        entries: Mapping[str, tuple[str, tuple[int, ...], Entries]],
        *,
        like: Mapping[str, object],
    ) -> AdapterPlan:
        inputs, rules = self.opened.inputs, self.shares.rules
        said = unlike_lines(self.recipe, rules, self.depth, of_an_edit=how == "scaled")
        return AdapterPlan(
            self.recipe,
            inputs,
            tuple(file for checkpoint in inputs.checkpoints for file in checkpoint.files),
            self.output,
            "scaled" if how == "scaled" else "merged",
            self.depth,
            rules,
            configs=digest_of([dict(adapter.config) for adapter in self.adapters]),
            like=dict(like),
            modules=tuple(modules),
            entries=entries,
            notes=(*self.notes, *said),
        )

    def _range(self, number: int, stored: StoredTensor) -> SourceRange:
        side = number + (1 if self.opened.inputs.has_base else 0)
        return self.ranges[side](self.spelled[number][stored.info.offset])

    def _whole(self, changed: _Changed, factors: Sequence[float]) -> Entries | None:
        """What makes a tensor that adapters hold whole; None where that takes the base, and it is not here.

        Raises:
            MismatchError: the base has it in another shape.
        """
        parts = tuple(
            Part(self._range(number, change.factors["whole"]), factors[number])
            for number, change in changed.changes.items()
        )
        if abs(sum(part.factor for part in parts) - 1) < _AS_IT_IS:
            return Entries(parts)
        base = self.opened.base
        if base is None or not self.whole:
            return None
        number, change = changed.first
        shape, name = change.factors["whole"].info.shape, changed.tensor
        if name not in base.tensors:  # a head that is one weight with the embedding
            shapes = {other: stored.info.shape for other, stored in base.tensors.items() if is_vocabulary(other)}
            name = tied_partner(name, shape, shapes, tied=says_tied(base.config), resize=True) or ""
        if name not in base.tensors:
            raise MismatchError(
                f"{self.adapters[number].file}: {base.name} has no {printable(changed.tensor)}: there is nothing to "
                "scale its update by",
                hint=f"--filter {printable(changed.tensor)}=keep takes the adapter's as it is.",
            )
        there = base.tensors[name].info.shape
        if shape != there:
            raise MismatchError(
                f"{self.adapters[number].file}: {printable(changed.tensor)} is {list(shape)}, and {base.name} has "
                f"{list(there)}: there is nothing to scale its update by",
                hint=f"--filter {printable(changed.tensor)}=keep takes the adapter's as it is.",
            )
        return Entries(parts, self.ranges[0](name))

    def _refuse_whole(self, lacking: Sequence[tuple[str, Change]], adapter: Adapter) -> None:
        """Refuse tensors that are stored whole, and whose update is to be scaled.

        Raises:
            UnsupportedError: names them, and the ways out.
        """
        if lacking:
            raise UnsupportedError(
                f"{adapter.name} holds {len(lacking):,} tensor(s) whole (modules_to_save), and what they change is "
                f"seen by the base alone:\n{some([printable(name) for name, _ in lacking])}",
                hint="Name the base, whose weights of these are read: --base BASE (in a recipe base_model). Or keep "
                f"them as they are: --filter {printable(lacking[0][0])}=keep. Or fold the adapter into its base: lines "
                f"edit BASE {adapter.name} -o OUT.",
            )

    def _dtype(self, stored: Iterable[StoredTensor]) -> str:
        """What a tensor made of these is stored as: the widest of theirs."""
        if self.recipe.dtype is not None:
            return STORED[self.recipe.dtype]
        widest = ""
        for one in stored:
            own = one.info.dtype
            if not widest or (widest, own) in WIDER:
                widest = own
            elif own != widest and (own, widest) not in WIDER:
                widest = "F32"  # float16 and bfloat16
        return widest

    def _every(self) -> frozenset[str]:
        """The base's modules, also by the names that transformers gives them on loading."""
        base = self.opened.base
        assert base is not None
        return modules_in((*base.tensors, *as_loaded(base).checkpoint.tensors))


def _by_component(base: Checkpoint, names: Sequence[str]) -> DepthMap:
    """The depth of a pipeline's components that are changed, of each by itself.

    Raises:
        DepthError: which tensor of one stands at which depth is not known.
    """
    parts = []
    for component in base.components:
        own, depth = component.checkpoint, DepthMap((), {})
        if any(name.startswith(component.begins) for name in names):
            parameters = {name: stored.info.numel for name, stored in own.tensors.items()}
            if read_lists(list(parameters)):
                depth = find_depth(parameters, config=own.config, parameters=parameters)
        parts.append((depth, regions_of(component)))
    return joined(parts)


def digest_of(configs: Sequence[Mapping[str, object]]) -> str:
    """What tells configs from others."""
    return f"sha256:{sha256(json.dumps(configs, sort_keys=True, default=str).encode()).hexdigest()}"


def modules_in(tensors: Iterable[str]) -> frozenset[str]:
    """Every module that tensors' names tell of, those that hold others among them."""
    found: set[str] = set()
    for name in tensors:
        module = name.rpartition(".")[0]
        while module and module not in found:
            found.add(module)
            module = module.rpartition(".")[0]
    return frozenset(found)


def _in_file(stored: StoredTensor, file: int) -> StoredTensor:
    """A stored tensor under another number of its file."""
    return stored._replace(file=file)


def _refuse_two_forms(adapters: Sequence[Adapter]) -> None:
    """Refuse to merge adapters whose modules and factors are called otherwise: what is written has one form.

    Raises:
        UnsupportedError: names two, and the form of either.
    """
    known: dict[str, tuple[str, Adapter]] = {}
    for adapter in adapters:
        for what, form in _forms(adapter):
            before, other = known.setdefault(what, (form, adapter))
            if before != form and other is not adapter:
                raise UnsupportedError(
                    f"{other.name} has {before}, and {adapter.name} {form}: what they are merged into has one form",
                    hint="Give all in one form (PEFT's folders, or files of one program); or merge into a whole model: "
                    "base_model, and no as_adapter.",
                )


def _forms(adapter: Adapter) -> Iterator[tuple[str, str]]:
    """How an adapter's factors and modules are called: what may be called otherwise, and how it is, in words."""
    if adapter.config:
        yield "factors", "a config, as PEFT writes it"
        return
    spelled = {stored.info.offset: name for name, stored in adapter.checkpoint.tensors.items()}
    for change in adapter.changes:
        if change.kind == "low rank":
            down = spelled[change.factors["A"].info.offset].removesuffix(".weight")
            dots = "underscores for dots" if change.component.flat else "dots"
            yield "factors", f"no config, factors called {down.rpartition('.')[2]}, and modules with {dots}"
        if match := _UNET_BLOCKS.match(change.module):
            yield "blocks", f"{'diffusers' if match[2] else 'the original'} names of blocks"


_UNET_BLOCKS = re.compile(r"((down_blocks|up_blocks|mid_block)|input_blocks|output_blocks|middle_block)[._]")


def _refuse_unknown(adapter: Adapter, change: Change, *, in_place: bool) -> None:
    """Refuse what adds no update that a factor scales; or, where several are merged, what is no product of two factors.

    Raises:
        UnsupportedError: names the module and the way out.
    """
    fold = f"Fold it into its base: lines edit BASE {adapter.name} -o OUT (in a merge: without as_adapter)."
    if change.kind not in _SCALED and change.kind != "whole":
        why = _NO_SUM.get(change.kind, f"it is changed by more than factors that are multiplied ({change.kind})")
        raise UnsupportedError(
            f"{adapter.file}: {printable(change.called)} cannot be scaled where the output stays an adapter: {why}",
            hint=fold,
        )
    if in_place or change.kind == "whole":
        return
    if change.kind == "difference":
        return
    if change.kind != "low rank":
        why = f"changed by more than a product of two matrices ({_CALLED[change.kind]})"
    elif change.factors.keys() != {"A", "B"}:
        why = "changed by more than a product of two matrices (a third one between them, as of a Tucker decomposition)"
    else:
        return
    raise UnsupportedError(
        f"{adapter.file}: {printable(change.called)} is {why}, and ranks of such are not put side by side", hint=fold
    )


_CALLED = {"hadamard": "LoHa", "kronecker": "LoKr"}


def _layers_in(config: Mapping[str, object], name: str) -> int | None:
    """How many layers a config says that there are.

    Raises:
        DepthError: several numbers.
    """
    counts = config_counts(config)
    if len(set(counts.values())) > 1:
        said = ", ".join(f"{key} is {count}" for key, count in counts.items())
        raise DepthError(
            f"the config of {name} gives several numbers of layers: {said}",
            hint="Give a base whose headers can be read, or say it of each: --num-layers NAME=L.",
        )
    return next(iter(counts.values()), None)


def _known(layers: int | dict[str, int] | None, names: Sequence[str]) -> int | dict[str, int]:
    """How many layers there are.

    Raises:
        DepthError: that is not known.
    """
    if layers is None:
        raise DepthError(
            f"how many layers the base has is not known: {_held(names)}, and an adapter cannot tell whether there are "
            "more",
            hint="Say it: --num-layers L (in a recipe num_layers); or name the base, of which headers are read: "
            "--base BASE (base_model).",
        )
    return layers


def _held(names: Sequence[str]) -> str:
    """Which layers an adapter changes, in words."""
    held = layers_held(names)
    if not held:
        return "no name in the adapter has the number of a layer"
    said = [
        f"{len(numbers):,} layer(s) of {printable(stack)}, {min(numbers):,} to {max(numbers):,}"
        for stack, numbers in held.items()
    ]
    return f"it changes {' and '.join(said[:4])}"


def _shown(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> str:
    return str([shapes[1][0], *shapes[0]])
