"""What an adapter's tensors are, by their names: which module's, and what to it.

Known are the names of PEFT, with and without `base_model.model.` and an adapter's name; of diffusers; and of kohya's
scripts and ComfyUI, where a module's dots may have become underscores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from lines_cli.errors import UnsupportedError, printable
from lines_cli.scaling.wrappers import WRAPPERS


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of an adapter.

    Attributes:
        module: the module of the base that it belongs to, without PEFT's prefix and wrappers.
        role: what it is: a factor (`A`, `B`, `mid`; `EA`, `EB` of an embedding; `m` of DoRA; `hada_w1_a`, ...; `D` for
            a difference), `alpha`, `whole`, `rows`, or `ignored`.
        parameter: of the module, that it changes: `weight` or `bias`; of what is whole whatever it is called.
        depth: how many of PEFT's wrappers stand around the module before this one.
        adapter: the name that PEFT gave the adapter, where the tensor's name has it.
        of_peft: whether it is a factor that PEFT calls so, by whose rule its scale stands in a config.
        twice: whether PEFT adds its product twice, as that of the last projection of torch's attention: on merging, and
            for each forward pass.
    """

    module: str
    role: str
    parameter: str = "weight"
    depth: int = 0
    adapter: str | None = None
    of_peft: bool = False
    twice: bool = False


PREFIX = "base_model.model."
"""What PEFT puts before the names of modules."""
SAVED = ".modules_to_save."
"""What PEFT puts into the names of tensors that are saved whole, in memory and of embeddings on disk."""

_WRAPPED = re.compile(rf"(?:(?<=\.)|\A)(?:{'|'.join(WRAPPERS)})\.")
_NAME = r"(?:\.(?P<adapter>(?!(?:weight|bias)\Z)[^.]+))?"  # of the adapter, as it is named in memory
_ENDINGS: tuple[tuple[str, re.Pattern[str], str, str], ...] = tuple(
    (word, re.compile(pattern + r"\Z"), role, parameter)
    for word, pattern, role, parameter in (
        ("lora_", rf"\.lora_(?P<role>[AB]){_NAME}\.weight", "", "weight"),
        ("lora_B", rf"\.lora_B{_NAME}\.bias", "B", "bias"),
        ("lora_embedding_", rf"\.lora_embedding_(?P<role>[AB]){_NAME}(?:\.weight)?", "E", "weight"),
        ("lora_magnitude_vector", rf"\.lora_magnitude_vector{_NAME}(?:\.weight)?", "m", "weight"),
        ("hada_", rf"\.hada_(?P<role>w[12]_[ab]|t[12]){_NAME}", "hada_", "weight"),
        ("lokr_", rf"\.lokr_(?P<role>w[12](?:_[ab])?|t2){_NAME}", "lokr_", "weight"),
        ("trainable_tokens_delta", rf"(?:\.token_adapter)?\.trainable_tokens_delta{_NAME}", "rows", "weight"),
        # what PEFT keeps beside what it trained
        ("trainable_tokens_original", rf"(?:\.token_adapter)?\.trainable_tokens_original{_NAME}", "ignored", "weight"),
        ("original_module.", r"\.original_module\..+", "ignored", "weight"),
        ("lora_velora_embed", rf"\.lora_velora_embed{_NAME}", "ignored", "weight"),
        ("lora_monteclora_sampler", r"\.lora_monteclora_sampler\..+", "ignored", "weight"),
        # kohya's scripts, LyCORIS, ComfyUI
        ("lora_down", r"\.lora_down(?:\.weight)?", "A", "weight"),
        ("lora_up", r"\.lora_up(?:\.weight)?", "B", "weight"),
        ("lora_up", r"\.lora_up\.bias", "B", "bias"),
        ("lora_mid", r"\.lora_mid(?:\.weight)?", "mid", "weight"),
        ("alpha", r"\.alpha", "alpha", "weight"),
        ("diff", r"\.diff", "D", "weight"),
        ("diff_b", r"\.diff_b", "D", "bias"),
        ("w_norm", r"\.w_norm", "D", "weight"),
        ("b_norm", r"\.b_norm", "D", "bias"),
        # diffusers before it used PEFT
        ("_lora.", r"(?:\.processor)?\.(?P<of>\w+)_lora\.(?P<role>down|up)\.weight", "", "weight"),
        ("lora_linear_layer", r"\.lora_linear_layer\.(?P<role>down|up)\.weight", "", "weight"),
        (".lora.", r"\.lora\.(?P<role>down|up)\.weight", "", "weight"),
    )
)
_OF_PEFT = frozenset({"lora_", "lora_B", "lora_embedding_", "lora_magnitude_vector", "hada_", "lokr_"})
_DOWN = {"down": "A", "up": "B"}
_CALLED = {"to_out": "to_out.0"}
_CALLED_IN_A_TEXT_MODEL = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_REFUSED = re.compile(
    r"(?:\A|\.)(?:lora_\w+|dora_scale|b?oft_\w+|glora_\w+|[ab][12]\.weight|on_input|vera_\w+|ia3_\w+|set_weight"
    r"|reshape_weight|bias_(?:values|indices|size)|randlora_\w+|hra_\w+)(?:\.|\Z)"
)


def parts_of(tensors: Iterable[str], file: str) -> Iterator[tuple[str, Part]]:
    """Each tensor's name, and what it is.

    Args:
        tensors: their names.
        file: what messages call it.

    Raises:
        UnsupportedError: a tensor is a factor of a kind that is not folded in.
    """
    for tensor in tensors:
        if (part := _part(tensor)) is not None:
            yield tensor, part
            continue
        if match := _REFUSED.search(tensor):
            raise UnsupportedError(
                f"{file}: tensor {printable(tensor)} ({match[0].strip('.')}) is of a kind of adapter that is not "
                "folded in",
                hint="Fold it into its base with the program that it is for, and give the result.",
            )
        yield tensor, _whole(tensor)


def _part(tensor: str) -> Part | None:
    """What a tensor is that is no whole one, by the end of its name."""
    for word, pattern, role, parameter in _ENDINGS:
        if word in tensor and (match := pattern.search(tensor)):
            groups = match.groupdict()
            found = groups.get("role") or ""
            module = tensor[: match.start()]
            if of := groups.get("of"):
                called = _CALLED_IN_A_TEXT_MODEL if module.endswith("self_attn") else _CALLED
                module += f".{called.get(of, of)}"
            twice = module.endswith(".base_layer.out_proj")
            module, depth = _module(module)
            whole_role = role + _DOWN.get(found, found)
            return Part(module, whole_role, parameter, depth, groups.get("adapter"), word in _OF_PEFT, twice)
    return None


def _whole(tensor: str) -> Part:
    """A tensor that the adapter holds in the place of the base's."""
    name, adapter = tensor, None
    if (at := name.find(SAVED)) >= 0:
        before, behind = name[:at], name[at + len(SAVED) :]
        first, dot, rest = behind.partition(".")
        if dot:
            adapter, behind = first, rest
        name = f"{before}.{behind}"
    name = name.replace(".token_adapter.base_layer.", ".base_layer.")
    module, _, parameter = name.rpartition(".")
    module, depth = _module(module)
    return Part(module, "whole", parameter, depth, adapter)


def _module(name: str) -> tuple[str, int]:
    """A module's name without what PEFT and wrappers of training put into it; and how many wrappers of PEFT's stand
    around the module within the one that is meant.
    """
    if "_" in name:
        name = _WRAPPED.sub("", f"{name}.").removesuffix(".")
    name = name.removeprefix(PREFIX)
    depth = 0
    while name.endswith(".base_layer"):
        name, depth = name.removesuffix(".base_layer"), depth + 1
    return name.replace(".base_layer.", "."), depth


# --- components of a pipeline ---

_FLAT = re.compile(r"(?P<component>lora_(?:unet|te\d?|transformer|prior_\w+?|controlnet)|lycoris)_(?P<module>[^.]+)")
_DOTTED = re.compile(
    r"(?P<component>unet|transformer(?:_\d)?|text_encoder(?:_\d)?|text_encoders\.\w+(?:\.transformer)?|diffusion_model"
    r"|controlnet)\.(?P<module>.+)",
    re.DOTALL,
)
_LANGUAGE_MODEL = re.compile(r"transformer\.(?:h|layers|blocks|encoder\.layers)\.\d+\.(?!attn1?\.to_)")
"""GPT-2 and its kin call their body as diffusers calls a component."""


@dataclass(frozen=True, slots=True)
class Component:
    """A part of a pipeline that an adapter is for, as the names of its modules say.

    Attributes:
        name: what they begin with; empty where they do not say one.
        flat: whether their dots became underscores.
    """

    name: str = ""
    flat: bool = False


NO_COMPONENT = Component()


def component_of(module: str) -> tuple[Component, str]:
    """Which component a module's name says, and the name without that."""
    if "." not in module and (match := _FLAT.fullmatch(module)):
        return Component(match["component"], flat=True), match["module"]
    if (match := _DOTTED.fullmatch(module)) and not _LANGUAGE_MODEL.match(module):
        return Component(match["component"]), match["module"]
    return NO_COMPONENT, module


def with_dots(module: str) -> str:
    """What a name whose dots became underscores was like, as far as its numbers tell: for a map of layers."""
    return _NUMBER.sub(r".\1.", module) if "." not in module else module


_NUMBER = re.compile(r"_(\d+)_")


def flattened(names: Iterable[str]) -> Mapping[str, list[str]]:
    """Names with underscores for their dots -> the names that are so."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(name.replace(".", "_"), []).append(name)
    return found
