"""Recipe and headers in, the plan of an adapter out that is nearest to a full fine-tune: which of its tensors can be
taken apart into factors, and what becomes of the rest.

A tensor is taken apart where PEFT adds factors to what holds it: the weight of a linear layer or of a convolution. What
it is is read off names and shapes, as far as these tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lines_cli.checkpoint.adapter_output import PREFIX
from lines_cli.checkpoint.header import FLOAT_DTYPES, TensorInfo
from lines_cli.checkpoint.reader import Checkpoint, gc_paused
from lines_cli.errors import DepthError, MismatchError, as_argument, printable
from lines_cli.plan.adapter_build import Shares, modules_in, refuse_one_file
from lines_cli.plan.adapter_inputs import AdapterInputs
from lines_cli.plan.adapter_layout import laid_out
from lines_cli.plan.adapter_plan import AdapterModule, AdapterPlan, Difference, Entries, Part, Rest
from lines_cli.plan.align import aligned_names
from lines_cli.plan.coefficients import unlike_lines
from lines_cli.plan.conversions import version_of_rules
from lines_cli.plan.inputs import Inputs
from lines_cli.plan.match import nothing_in_common
from lines_cli.plan.relaid import as_loaded
from lines_cli.plan.tensors import STORED, Ranges, refuse_idle_filters
from lines_cli.plan.tied_weights import is_vocabulary, says_tied, tied_embeddings
from lines_cli.plan.vocabulary import find_vocabulary, in_words
from lines_cli.recipe.schema import Recipe
from lines_cli.scaling.find_depth import DepthMap, find_depth

_EMBEDDING = re.compile(
    r"(?!embed_out|unembed)(?:.*_)?embed(?:s|ding|dings|_tokens|_positions)?(?:_\w+)?|(?:.*_)?emb|wte|wpe|tok_embeddings"
    r"|shared|relative_attention_bias"
)
"""The last part of a module's name that is a table with a row per token, place or type."""
_ROUTER = re.compile(r"gate|router|gating|wg")
"""The same of one that chooses experts, which is no linear layer to every library."""
_FUSED = "tensors of fused experts"
_OTHERWISE = "tensors that transformers' modules hold in another layout"
_OF_EXPERTS = re.compile(r"(?:\A|\.)(?:shared_)?experts?(?:\.|\Z)")


@gc_paused()
def plan_of_extraction(opened: AdapterInputs, output: Path) -> AdapterPlan:
    """Plan the adapter that is nearest to a fine-tune, as far as it does not depend on the numbers in the inputs.

    Raises:
        RecipeError: a stack or a filter names nothing there.
        DepthError: which tensor stands at which depth makes a difference, and cannot be decided.
        MismatchError: the fine-tune and the base have no tensor in common, or none to take apart.
    """
    refuse_one_file(output)
    recipe, inputs = opened.recipe, opened.inputs
    base, ft = inputs.checkpoints
    notes = [*recipe.notes, *opened.notes, *base.notes, *ft.notes]
    inputs, otherwise = _as_modules(inputs, notes)
    inputs, (theirs, _) = aligned_names(inputs, notes, prefix=recipe.prefix)
    base, ft = inputs.checkpoints
    if theirs.keys().isdisjoint(ft.tensors):
        raise nothing_in_common(inputs)
    config = inputs.config_of(1)
    depth = _depth(recipe, ft, config)
    paired = {name: (there, name) for name, there in theirs.items() if name in ft.tensors}
    _, difference = find_vocabulary(recipe, inputs, paired, depth.places, notes)
    if difference is not None:
        again = f"lines edit {as_argument(base.name)} {as_argument(ft.name)} --resize base --alpha 1 --beta 0 -o FT"
        raise MismatchError(
            in_words(difference, inputs),
            hint=f"An adapter has its base's ids. {again} gives the fine-tune with these: extract from that FT.",
        )
    shares = Shares(recipe, depth, tied_embeddings(ft, config))
    refuse_idle_filters(shares.rules, ft.tensors)
    ranges = [Ranges(inputs, 0), Ranges(inputs, 1)]
    with_head = says_tied(config) and _ends_in_head(config)
    found = _Parts(recipe, inputs.checkpoints, ranges, theirs, shares, depth, otherwise, with_head=with_head)
    modules, rest = tuple(found.modules()), tuple(found.rest())
    if not modules:
        raise MismatchError(
            f"{ft.name} and {base.name} have no matrix in common that an adapter could change",
            hint="An adapter changes the weights of linear layers and convolutions. Are these the right checkpoints?",
        )
    beyond = sum(recipe.rank is not None and recipe.rank > module.side for module in modules)
    if beyond:
        notes.append(
            f"rank {recipe.rank:,} is more than {beyond:,} module(s) can have: there it is the smaller side, and all "
            "of the update is kept"
        )
    lacking = sorted(theirs.keys() - ft.tensors.keys())
    if lacking:
        notes.append(f"{len(lacking):,} tensor(s) of the base are not in the fine-tune, such as {lacking[0]}")
    said = unlike_lines(recipe, shares.rules, depth, of_an_edit=True)
    plan = AdapterPlan(
        recipe,
        inputs,
        tuple(file for checkpoint in inputs.checkpoints for file in checkpoint.files),
        output,
        "extracted",
        depth,
        shares.rules,
        like=_like(base, config, transposed=bool(found.transposed)),
        every=modules_in(ft.tensors),
        modules=modules,
        rest=rest,
        needs=True,
        notes=(*notes, *depth.notes, *said),
    )
    return laid_out(plan)


def _as_modules(inputs: Inputs, notes: list[str]) -> tuple[Inputs, Collection[str]]:
    """Both sides with the names and the layout of the modules that transformers makes of them, for these are what PEFT
    finds; and the fine-tune's tensors of which that is not known.
    """
    config = inputs.config_of(1)
    if not isinstance(config.get("model_type"), str):
        notes.append(
            f"{inputs.checkpoints[1].name} has no config that says its model_type: modules are called as its files "
            "call them, and where a library calls them otherwise in memory, the adapter does not find them"
        )
        return inputs, ()
    base, ft = (as_loaded(side, config) for side in inputs.checkpoints)
    for names, of in ((ft.names, "names"), ({made: owns[0] for made, owns in ft.made.items()}, "layout")):
        if names:
            there, own = min(names.items())
            notes.append(
                f"{len(names):,} tensor(s) are taken by the {of} of transformers' modules ({version_of_rules()}), such "
                f"as {printable(there)} for {printable(own)}: an older version, or another library, may have others"
            )
    return replace(inputs, checkpoints=(base.checkpoint, ft.checkpoint)), ft.problems


def _depth(recipe: Recipe, ft: Checkpoint, config: Mapping[str, Any]) -> DepthMap:
    parameters = {name: stored.info.numel for name, stored in ft.tensors.items()}
    by_hand = recipe.lines.by_hand if recipe.lines else {}
    try:
        return find_depth(parameters, config=config, parameters=parameters, **by_hand)
    except DepthError:
        if (recipe.lines and recipe.lines.needs_depth) or recipe.parameters_vary:
            raise
        return DepthMap((), {})


def _like(base: Checkpoint, config: Mapping[str, Any], *, transposed: bool) -> dict[str, Any]:
    """What the adapter's config says of the base, as PEFT would have written it."""
    repository, _, commit = (base.hub_id or "").partition("@")
    return {
        "base_model_name_or_path": repository or base.real.name,  # where it lies here is nobody's business
        "revision": commit or None,
        "task_type": "CAUSAL_LM" if _architecture(config).endswith(_CAUSAL) else None,
        "fan_in_fan_out": transposed,
        "tied": says_tied(config),
    }


_CAUSAL = ("ForCausalLM", "LMHeadModel")


def _architecture(config: Mapping[str, Any]) -> str:
    """The model's class, as its config names it."""
    named = config.get("architectures")
    return str(named[0]) if isinstance(named, list) and named else ""


def _ends_in_head(config: Mapping[str, Any]) -> bool:
    """Whether a model has a head over tokens, which libraries call `lm_head`."""
    return _architecture(config).endswith((*_CAUSAL, "ForConditionalGeneration"))


class _Parts:
    """A fine-tune's tensors: those that are taken apart, and the rest.

    Args:
        recipe: what was asked.
        checkpoints: the base and the fine-tune.
        ranges: where the tensors of each are.
        theirs: the base's names by the fine-tune's.
        shares: what multiplies each update.
        depth: where each tensor stands.
        otherwise: tensors that transformers' modules hold in another layout, which is not known here.
        with_head: whether the model has a head over tokens that is its embedding.
    """

    def __init__(
        self,
        recipe: Recipe,
        checkpoints: tuple[Checkpoint, ...],
        ranges: list[Ranges],
        theirs: Mapping[str, str],
        shares: Shares,
        depth: DepthMap,
        otherwise: Collection[str],
        *,
        with_head: bool,
    ) -> None:
        self._recipe, self._theirs, self._shares, self._depth = recipe, theirs, shares, depth
        base, ft = checkpoints
        self._base = {name: base.tensors[there].info for name, there in theirs.items()}
        self._ft = {name: stored.info for name, stored in ft.tensors.items()}
        self._of_base, self._of_ft = ranges
        self._otherwise = otherwise
        self._with_head = with_head
        self._shared = {name for name in self._ft if is_vocabulary(name) and len(self._ft[name].shape) == 2}
        self._experts = any(_OF_EXPERTS.search(name) for name in self._ft)
        self._why = {name: self._why_whole(name, info) for name, info in self._ft.items()}
        self._targets = {name.removesuffix(".weight") for name, why in self._why.items() if why is None}
        self.transposed = stored_transposed(self._ft) & self._targets
        """Modules that store their weights [in, out]."""

    def _why_whole(self, name: str, info: TensorInfo) -> str | None:
        """Why a tensor is not taken apart, in words that name several of its kind; None where it is."""
        there = self._base.get(name)
        module, _, last = name.rpartition(".")
        word = module.rpartition(".")[2]
        if info.dtype not in FLOAT_DTYPES:
            return "tensors of whole numbers"
        if there is None:
            return "tensors that the base lacks"
        if there.shape != info.shape:
            return "tensors that have another shape than the base's"
        if name in self._otherwise:
            return _OTHERWISE
        if last == "bias":
            return "biases"
        if len(info.shape) < 2:
            return "vectors (norms and the like)"
        if last != "weight" or not module:
            fused = len(info.shape) == 3 and _OF_EXPERTS.search(name)
            return _FUSED if fused else "parameters that are no layer's weight"
        if len(info.shape) == 2 and _EMBEDDING.fullmatch(word):
            return "embeddings"
        if self._experts and _ROUTER.fullmatch(word):
            return "routers of experts"
        if len(info.shape) > 2 and info.shape[1] == 1:
            return "depthwise convolutions"
        return "empty tensors" if 0 in info.shape else None

    def modules(self) -> Iterator[AdapterModule]:
        """What is taken apart."""
        for name, why in self._why.items():
            if why is None:
                yield self._module(name, self._ft[name])

    def _module(self, name: str, info: TensorInfo) -> AdapterModule:
        module = name.removesuffix(".weight")
        transposed = module in self.transposed
        rows, *inner = info.shape[::-1] if transposed else info.shape
        kernel = (1,) * (len(inner) - 1)
        side = min(rows, math.prod(inner))
        coefficient, (factor,) = self._shares(name)
        base, ft = self._of_base(self._theirs[name]), self._of_ft(name)
        wide = "F64" in (self._base[name].dtype, info.dtype)
        return AdapterModule(
            module,
            name,
            self._depth.places.get(name),
            coefficient,
            side if self._recipe.rank is None else min(self._recipe.rank, side),
            side,
            Difference(base, ft, info.shape, transposed, factor),
            shapes=(tuple(inner), (rows, *kernel)),
            dtype=STORED[self._recipe.dtype] if self._recipe.dtype else "F64" if wide else "F32",
            names={"A": f"{PREFIX}{module}.lora_A.weight", "B": f"{PREFIX}{module}.lora_B.weight"},
        )

    def rest(self) -> Iterator[Rest]:
        """What is not."""
        every = modules_in(self._ft)
        holding = {module.rpartition(".")[0] for module in every}
        for name, why in self._why.items():
            if why is None:
                continue
            info, there = self._ft[name], self._base.get(name)
            module, _, last = name.rpartition(".")
            _, (factor,) = self._shares(name)
            ft = self._of_ft(name)
            is_float = info.dtype in FLOAT_DTYPES
            comparable = there is not None and there.shape == info.shape and is_float
            base = self._of_base(self._theirs[name]) if comparable else None
            entries = (
                Entries((Part(ft, factor),), base) if factor != 1 and base is not None else Entries((Part(ft, 1.0),))
            )
            saved_as: str | None = f"{PREFIX}{name}"
            if module in self._targets:
                saved_as = f"{PREFIX}{module}.base_layer.{last}" if last == "bias" else None
            elif not module or module in holding or why in (_FUSED, _OTHERWISE) or _ends_another(module, every):
                saved_as = None
            if is_float and base is None and factor != 1:
                saved_as = None  # there is no update to scale
            dtype = STORED[self._recipe.dtype] if self._recipe.dtype and is_float else info.dtype
            copies = self._copies(module) if name in self._shared and saved_as is not None else ()
            of_target = module in self._targets
            yield Rest(name, saved_as, module, of_target, entries, ft, base, why, dtype, info.shape, copies)

    def _copies(self, module: str) -> tuple[str, ...]:
        """The modules that share an embedding in the model, by the names that libraries give them: PEFT gives each a
        copy of its own.
        """
        begin, _, word = module.rpartition(".")
        before = f"{begin}." if begin else ""
        sides = [f"{before}{side}.embed_tokens" for side in ("encoder", "decoder")] if word == "shared" else []
        heads = ["lm_head"] if self._with_head else []
        return tuple(name for name in (*sides, *heads) if f"{name}.weight" not in self._ft)


def _ends_another(module: str, every: Collection[str]) -> bool:
    """Whether another module's name ends as one does: PEFT would take it for that."""
    return any(other.endswith(module) and other != module for other in every)


def stored_transposed(tensors: Mapping[str, TensorInfo]) -> set[str]:
    """The modules whose weights are stored [in, out], as GPT-2's are: of a layer with a bias that has more or fewer
    entries than rows the bias tells. Of square ones the others decide, where all of these agree.
    """
    sure, square, other = set[str](), set[str](), set[str]()
    for name, info in tensors.items():
        module = name.removesuffix(".weight")
        bias = tensors.get(f"{module}.bias")
        if module == name or bias is None or len(info.shape) != 2 or len(bias.shape) != 1:
            continue
        rows, columns = info.shape
        if bias.shape[0] == rows == columns:
            square.add(module)
        elif bias.shape[0] == columns:
            sure.add(module)
        elif bias.shape[0] == rows:
            other.add(module)
    return sure | square if sure and not other else sure
