"""What an adapter's config says: its kind, and the rank and the scale of each module; or why it cannot be folded in.

The keys are those of PEFT's LoRA, LoHa, LoKr and trainable tokens. A key that is not known here may change what an
adapter does, and is refused unless it is off.
"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lines_cli.errors import CheckpointError, RecipeError, UnsupportedError, printable
from lines_cli.scaling.by_hand import SECONDS_TO_MATCH, found_in

if TYPE_CHECKING:
    import regex

_OF_TRAINING = frozenset(
    """
    task_type peft_version auto_mapping revision inference_mode base_model_name_or_path peft_type target_modules
    exclude_modules layers_to_transform layers_pattern modules_to_save runtime_config
    """.split()
)
_KEYS = {
    "LORA": _OF_TRAINING
    | set(
        """
        r lora_alpha lora_dropout fan_in_fan_out bias use_rslora init_lora_weights rank_pattern alpha_pattern
        megatron_config megatron_core trainable_token_indices loftq_config eva_config corda_config lora_ga_config
        use_dora velora_config alora_invocation_tokens use_qalora qalora_group_size monteclora_config layer_replication
        lora_bias target_parameters use_bdlora arrow_config kasa_config ensure_weight_tying enable_lora merge_weights
        """.split()
    ),
    "LOHA": _OF_TRAINING
    | set("r alpha rank_dropout module_dropout use_effective_conv2d init_weights rank_pattern alpha_pattern".split()),
    "LOKR": _OF_TRAINING
    | set(
        """
        r alpha rank_dropout module_dropout use_effective_conv2d init_weights rank_pattern alpha_pattern decompose_both
        decompose_factor rank_dropout_scale
        """.split()
    ),
    "TRAINABLE_TOKENS": _OF_TRAINING | {"token_indices", "init_weights"},
}
"""The kinds of adapters that are folded in, and the keys of their configs."""

_MERGE_WITH_PEFT = "Fold it into its base with peft (merge_and_unload, then save_pretrained), and give that folder."
_CONVERT = (
    "Save it with peft as plain LoRA first: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL), "
    "INITIAL being what was saved before training; or " + _MERGE_WITH_PEFT[0].lower() + _MERGE_WITH_PEFT[1:]
)
_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA acts on some tokens alone, so no weights do what it does",
    "use_qalora": "its factors belong to a base that is quantised in groups",
    "layer_replication": "it is for a model with layers of the base repeated",
    "use_bdlora": "its factors are block-diagonal, and stored as such",
    "arrow_config": "it routes each token to other adapters, so no weights do what it does",
    "kasa_config": "it takes the smallest singular values from the weights of its base, which it then is no update of",
    "enable_lora": "it is of an early form of LoRA, for fused weights",
}
"""Keys that, if they are on, make an adapter something else than an update of its base."""
_CHANGES_THE_BASE = re.compile(r"pissa(?:_niter_\d+)?|olora|corda\w*|loftq|lora_ga", re.IGNORECASE)
_LEAVES_THE_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """What a config says, checked.

    Attributes:
        where: what messages call it.
        said: all of it, as it was parsed.
        kind: `LORA`, `LOHA`, `LOKR` or `TRAINABLE_TOKENS`.
        notes: what a person should know of it.
    """

    where: str
    said: Mapping[str, Any]
    kind: str
    notes: tuple[str, ...] = ()

    def ranks(self, modules: Collection[str]) -> dict[str, int]:
        """The rank of each module that has a product: what the first pattern says that fits it, or `r`."""
        return self._by_module("rank_pattern", modules, self.said["r"])

    def alphas(self, modules: Collection[str]) -> dict[str, float]:
        """The alpha of each, likewise."""
        return self._by_module("alpha_pattern", modules, self.said[self._alpha])

    def scale(self, alpha: float, rank: int) -> float:
        """What multiplies a product of that alpha and rank."""
        return alpha / (math.sqrt(rank) if self.said.get("use_rslora") else rank)

    @property
    def rescales(self) -> bool:
        """Whether it gives the rows of weights a norm (DoRA)."""
        return bool(self.said.get("use_dora"))

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it changes beside modules' weights, by the ends of their names."""
        return tuple(self.said.get("target_parameters") or ())

    @cached_property
    def saved_modules(self) -> tuple[str, ...]:
        """The modules that it holds whole, by the ends of their names."""
        return tuple(self.said.get("modules_to_save") or ())

    @property
    def tokens(self) -> Any:
        """The rows of embeddings that it replaces: of one, or by the ends of their names; None where it says none."""
        return self.said.get("token_indices" if self.kind == "TRAINABLE_TOKENS" else "trainable_token_indices")

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Which rows of an embedding it replaces; None where it says none."""
        said = self.tokens
        if isinstance(said, Mapping):
            fitting = [rows for name, rows in said.items() if module == name or module.endswith(f".{name}")]
            said = fitting[0] if fitting else None
        return tuple(said) if said else None

    def not_targeted(self, modules: Collection[str]) -> list[str]:
        """Modules that have factors, and that PEFT adapts not, by `target_modules` and what narrows that down: it loads
        none of their factors. None where that is not said, or where names fit in no module of all, as they may where an
        expression is for the names of another version.
        """
        said = self.said.get("target_modules")
        ends = time.monotonic() + SECONDS_TO_MATCH
        if self.kind == "TRAINABLE_TOKENS" or not said or not isinstance(said, (str, list)) or said == "all-linear":
            return []
        if isinstance(said, str):
            found = self._matching("target_modules", rf"\A(?:{said})\Z", modules, ends)
        else:
            found = {module for module in modules if _ends_in(module, said)}
            found -= self._in_other_layers([module for module in found if module not in said], ends)
        excluded = self.said.get("exclude_modules")
        if isinstance(excluded, str) and excluded:
            found -= self._matching("exclude_modules", rf"\A(?:{excluded})\Z", modules, ends)
        elif isinstance(excluded, list):
            found -= {module for module in found if _ends_in(module, excluded)}
        if not found and isinstance(said, str):
            return []
        within = {module for module in modules if module.rpartition(".")[0] in found}  # as in torch's attention
        tied = {m for m in modules if self.said.get("ensure_weight_tying") and not any(map(str.isdigit, m.split(".")))}
        return [module for module in modules if module not in found | within | tied]

    def _in_other_layers(self, modules: Sequence[str], ends: float) -> set[str]:
        """Those in layers that are not among `layers_to_transform`."""
        layers, patterns = self.said.get("layers_to_transform"), self.said.get("layers_pattern")
        if layers is None or layers == []:
            return set()
        wanted = {layers} if isinstance(layers, int) else set(layers) if isinstance(layers, list) else set()
        patterns = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
        expressions = [rf"\A(?:|.*?\.)(?:{pattern})\.(?P<layer>\d+)\." for pattern in patterns if pattern]
        others, left = set[str](), list(modules)
        for expression in expressions or [r"\A.*?\.[^.]*\.(?P<layer>\d+)\."]:
            found = {
                module: int(match["layer"]) for module, match in self._found("layers_pattern", expression, left, ends)
            }
            others |= {module for module, layer in found.items() if layer not in wanted}
            left = [module for module in left if module not in found]
        return others | set(left)

    def _matching(self, key: str, expression: str, modules: Collection[str], ends: float) -> set[str]:
        return {module for module, _ in self._found(key, expression, modules, ends)}

    def _found(
        self, key: str, expression: str, modules: Collection[str], ends: float
    ) -> list[tuple[str, regex.Match[str]]]:
        """The modules in whose names an expression is found.

        Raises:
            CheckpointError: it is none, or takes too long.
        """
        try:
            return list(found_in(list(modules), expression, f"{self.where}: {key}", of="module", ends=ends))
        except RecipeError as error:
            raise CheckpointError(error.message, hint=_PATTERN) from error

    @property
    def _alpha(self) -> str:
        return "lora_alpha" if self.kind == "LORA" else "alpha"

    def _by_module(self, key: str, modules: Collection[str], default: Any) -> dict[str, Any]:
        said, left, ends = {}, dict.fromkeys(modules), time.monotonic() + SECONDS_TO_MATCH
        for pattern, value in (self.said.get(key) or {}).items():
            for module in self._fitting(key, pattern, left, ends):
                said[module] = value
                del left[module]
        return said | dict.fromkeys(left, default)

    def _fitting(self, key: str, pattern: str, modules: Collection[str], ends: float) -> list[str]:
        """The modules whose names end with what a pattern fits, behind a dot: `re.match(rf"(.*\\.)?({pattern})$")`."""
        if _PLAIN.fullmatch(pattern):  # as most are: a name, or the end of one
            name = pattern.removeprefix("^")
            behind = () if pattern.startswith("^") else (f".{name}",)
            return [module for module in modules if module == name or module.endswith(behind)]
        return [module for module, _ in self._found(key, rf"\A(?:.*\.)?(?:{pattern})$", modules, ends)]


def _ends_in(module: str, names: Collection[Any]) -> bool:
    """Whether a module is called, or its name ends in, one of some names."""
    return any(f".{module}".endswith(f".{name}") for name in names)


_PLAIN = re.compile(r"\^?[\w-]+(?:\.[\w-]+)*", re.ASCII)
_PATTERN = "Its patterns are regular expressions for names of modules: write simpler ones."


def checked_config(said: Mapping[str, Any], where: str) -> AdapterConfig:
    """The config of an adapter, its every key known and of the right kind.

    Args:
        said: `adapter_config.json`, parsed.
        where: what messages call it.

    Raises:
        CheckpointError: a key is missing, or says something impossible.
        UnsupportedError: it is of a kind that cannot be folded in, or has a key that is not known.
    """
    kind = said.get("peft_type")
    if kind is None:
        raise CheckpointError(f"{where}: no peft_type in it", hint="Is it the config of an adapter?")
    if not isinstance(kind, str):
        raise CheckpointError(f"{where}: peft_type is {shortened(kind)}, not a name", hint=_DAMAGED)
    if kind not in _KEYS:
        raise UnsupportedError(
            f"{where}: peft_type {shortened(kind)} is not folded in; {', '.join(_KEYS)} are", hint=_MERGE_WITH_PEFT
        )
    unknown = {key: value for key, value in said.items() if key not in _KEYS[kind]}
    on = [key for key, value in unknown.items() if not _is_off(value)]
    if on:
        raise UnsupportedError(
            f"{where}: {', '.join(f'{printable(key)}: {shortened(unknown[key])}' for key in on)} is not known, and may "
            "change what the adapter does",
            hint=f"If it concerns training alone, take it out of a copy of the config. Else: {_MERGE_WITH_PEFT}",
        )
    notes = [f"{where}: {', '.join(map(printable, unknown))} is not known, and off"] if unknown else []
    for key, why in _REFUSED.items():
        if not _is_off(said.get(key)):
            raise UnsupportedError(f"{where}: {key}: {shortened(said[key])}: {why}", hint=_way_out(key))
    _refuse_changed_base(said, where)
    _check_values(said, where, kind)
    return AdapterConfig(where, said, kind, tuple(notes))


def _way_out(key: str) -> str:
    if key in ("alora_invocation_tokens", "arrow_config"):
        return "There is no checkpoint that stands for it; serve it as an adapter."
    return _MERGE_WITH_PEFT


def _refuse_changed_base(said: Mapping[str, Any], where: str) -> None:
    """Refuse an adapter that was begun by taking its product from the base: it is no update of the base as it was."""
    for key in ("init_lora_weights", "init_weights"):
        value = said.get(key)
        if isinstance(value, str) and _CHANGES_THE_BASE.fullmatch(value):
            raise UnsupportedError(
                f"{where}: {key}: {shortened(value)} changed the weights of the base, so the adapter is no update of "
                "the base as it was",
                hint=_CONVERT,
            )
    value = said.get("init_lora_weights")
    if not (value is None or isinstance(value, bool) or str(value).lower() in _LEAVES_THE_BASE):
        raise UnsupportedError(
            f"{where}: init_lora_weights: {shortened(value)} is not known, and may have changed the weights of the "
            "base",
            hint=_CONVERT,
        )


def _check_values(said: Mapping[str, Any], where: str, kind: str) -> None:
    def refuse(key: str, wanted: str, value: Any = None) -> None:
        raise CheckpointError(f"{where}: {printable(key)} is {shortened(value)}, not {wanted}", hint=_DAMAGED)

    alpha = "lora_alpha" if kind == "LORA" else "alpha"
    if kind != "TRAINABLE_TOKENS":
        for key in ("r", alpha):
            if key not in said:
                raise CheckpointError(f"{where}: no {key} in it, which says how an adapter is scaled", hint=_DAMAGED)
        if not _is_rank(said["r"]):
            refuse("r", "a whole number above 0", said["r"])
        if not _is_number(said[alpha]):
            refuse(alpha, "a number", said[alpha])
    for key, fits, wanted in (
        ("rank_pattern", _is_rank, "a whole number above 0"),
        ("alpha_pattern", _is_number, "a number"),
    ):
        patterns = said.get(key)
        if patterns is not None and not isinstance(patterns, Mapping):
            refuse(key, "a mapping from names to numbers", patterns)
        for pattern, value in (patterns or {}).items():
            if not fits(value):
                refuse(f"{key}: {pattern}", wanted, value)
    for key in ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"):
        if not isinstance(said.get(key), (bool, type(None))):
            refuse(key, "true or false", said[key])
    if said.get("bias", "none") not in ("none", "all", "lora_only"):
        refuse("bias", "none, all or lora_only", said["bias"])
    for key in ("target_parameters", "modules_to_save"):
        names = said.get(key)
        if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            refuse(key, "a list of names", names)
    for key in ("trainable_token_indices", "token_indices"):
        lists = said.get(key)
        for rows in lists.values() if isinstance(lists, Mapping) else [lists]:
            if rows is not None and not (isinstance(rows, list) and all(map(_is_row, rows))):
                refuse(key, "a list of numbers of tokens", rows)
            if rows and len(set(rows)) < len(rows):
                refuse(key, "a list of tokens, each once", rows)


_DAMAGED = "Copy or download the adapter again, with its adapter_config.json."


def _is_off(value: Any) -> bool:
    return value is None or value is False or (not isinstance(value, bool) and value in (0, "", [], {}))


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MOST_RANKS


def _is_row(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # whole numbers may be greater; NaN is not


def shortened(value: Any) -> str:
    """A value of a config, as messages show it."""
    text = printable(repr(value))
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


_LONGEST_SHOWN = 80
_MOST_RANKS = 2**63 - 1


def by_component(said: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The configs of a pipeline's components that diffusers writes as one, each key behind its component's name."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in said.items():
        component, dot, own = key.partition(".")
        if dot:
            found.setdefault(component, {"peft_type": "LORA"})[own] = value
    return found
