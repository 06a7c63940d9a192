"""What an adapter's folder says beside its tensors, as PEFT reads it: which modules it changes, and how each is scaled.

An adapter that is made here has scale 1 in every module: what it is scaled by is in its factors. Nothing here reads
tensor data or needs torch.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

PREFIX = "base_model.model."
"""What PEFT puts before a module's name in its files."""

_CARRIED = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "inference_mode",
    "revision",
    "task_type",
)
_TARGETS = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform", "target_parameters")
_BIASES = ("none", "lora_only", "all")


def is_full(pattern: str) -> str:
    """The expression of `rank_pattern` for one module alone."""
    return f"^{re.escape(pattern)}"


def config_of(
    ranks: Mapping[str, int],
    *,
    targets: Mapping[str, Any],
    like: Mapping[str, Any],
    bias: str = "none",
    lora_bias: bool = False,
    modules_to_save: Collection[str] = (),
) -> dict[str, Any]:
    """The config of an adapter in which every module has scale 1.

    Args:
        ranks: of each module, by its name.
        targets: what names the modules (`targets_of`, or `targets_in`).
        like: a config whose base, task and the like are taken over.
        bias: which biases of the base it holds.
        lora_bias: whether its updates have a bias.
        modules_to_save: modules that it holds whole.
    """
    usual = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {is_full(module): rank for module, rank in ranks.items() if rank != usual}
    config = {key: like[key] for key in _CARRIED if key in like}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "fan_in_fan_out": False,
        **config,
        **targets,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": others,
        "alpha_pattern": dict(others),
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "bias": bias,
        "lora_bias": lora_bias,
        "modules_to_save": list(modules_to_save) or None,
        "init_lora_weights": True,
    }


def targets_in(configs: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """What names the modules in some adapters' configs, if it is the same in all; else None."""
    first, *others = [{key: _in_order(config.get(key)) for key in _TARGETS} for config in configs]
    if any(other != first for other in others):
        return None
    return {key: value for key, value in first.items() if value is not None}


def _in_order(value: Any) -> Any:
    """A list of names is as a set."""
    return sorted(value, key=str) if isinstance(value, list) else value


def targets_of(modules: Collection[str], every: Collection[str] | None) -> dict[str, Any]:
    """What names exactly these modules in a config: by the last parts of their names, where no other module has these;
    else by whole names; else, where one of them is the end of another module's name, by an expression.

    Args:
        modules: their names.
        every: those of all modules of the model, as far as they are known; None if they are not.
    """
    chosen = set(modules)
    others = [name for name in every or () if name not in chosen]
    last = sorted({name.rpartition(".")[2] for name in modules})
    if every is not None and not any(name.rpartition(".")[2] in last for name in others):
        return {"target_modules": last}
    if not any(end in chosen for name in (*others, *chosen) for end in _ends(name)):
        return {"target_modules": list(modules)}
    return {"target_modules": "|".join(map(re.escape, modules))}


def _ends(name: str) -> Iterable[str]:
    """The ends of a dotted name that begin behind a dot."""
    segments = name.split(".")
    return (".".join(segments[at:]) for at in range(1, len(segments)))


def strongest_bias(configs: Iterable[Mapping[str, Any]]) -> str:
    """Which biases of the base any of some adapters holds."""
    said = [str(config.get("bias", "none")) for config in configs]
    return max(said, key=lambda bias: _BIASES.index(bias) if bias in _BIASES else 0, default="none")


def as_json(config: Mapping[str, Any]) -> bytes:
    """A config as it is written."""
    return json.dumps(dict(config), indent=2, sort_keys=True).encode() + b"\n"
