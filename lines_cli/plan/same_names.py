"""Names that are known to be of one parameter: what wrappers, loaders and versions of libraries call it, as one table.

Names are paired by it (`plan.align`) only where they have no partner as they are. A new pair is a row of `_SAME`.
"""

from __future__ import annotations

import re

from lines_cli.scaling.wrappers import WRAPPERS

_WRAPPED = re.compile(rf"(?:(?<=\.)|\A)(?:{'|'.join(WRAPPERS)})\.")  # torch.compile, FSDP, checkpointing, Lightning

_Row = tuple[str, re.Pattern[str], str]


def _rows(*rows: tuple[str, str, str]) -> tuple[_Row, ...]:
    """What a name holds, the expression that is looked for then, and what takes its place."""
    return tuple((word, re.compile(pattern), instead) for word, pattern, instead in rows)


# Both from the first row to the last.
_WRAPPERS = _rows(
    *((word, _WRAPPED.pattern, "") for word in WRAPPERS),
    # DataParallel; PEFT's model, its wrapped layers, and modules that were trained whole beside an adapter
    ("module.", r"\A(?:module\.)+", ""),
    ("base_model.", r"\Abase_model\.model\.", ""),
    (".base_layer", r"\.base_layer(?=\.)", ""),
    (".modules_to_save.", r"\.modules_to_save\.[^.]+(?=\.)", ""),
)
_SAME = (
    *_WRAPPERS,
    *_rows(
        # a language model by itself; within a vision language model; the same from transformers 4.52 on
        ("language_model.", r"\A(?:model\.)?language_model\.(?:model\.)?", ""),
        ("text_model.", r"\A(?:model\.text_model|text_model\.model)\.", ""),
        ("model.", r"\Amodel\.", ""),
        ("vision_model.", r"\A(vision_tower|vision_encoder)\.vision_model\.", r"\1."),
        # weight norm and spectral norm of torch before its parametrizations
        ("parametrizations.", r"(?:(?<=\.)|\A)parametrizations\.([^.]+)\.original0\Z", r"\1_g"),
        ("parametrizations.", r"(?:(?<=\.)|\A)parametrizations\.([^.]+)\.original1\Z", r"\1_v"),
        ("parametrizations.", r"(?:(?<=\.)|\A)parametrizations\.([^.]+)\.original\Z", r"\1_orig"),
        ("parametrizations.", r"(?:(?<=\.)|\A)parametrizations\.([^.]+)\.\d+\.(_[uv])\Z", r"\1\2"),
        # normalisations as TensorFlow calls them
        ("gamma", r"(?:(?<=\.)|\A)gamma\Z", "weight"),
        ("beta", r"(?:(?<=\.)|\A)beta\Z", "bias"),
    ),
)


def canonical(name: str) -> str:
    """The one name for all that a parameter is known to be called. It may be that of another parameter, too: whoever
    pairs by it looks whether it is the only one of its side, and of the same shape.
    """
    return _respelt(name, _SAME)


def unwrapped(name: str) -> str:
    """The name without what wrappers of training put into it."""
    return _respelt(name, _WRAPPERS)


def _respelt(name: str, rows: tuple[_Row, ...]) -> str:
    for word, pattern, instead in rows:
        if word in name:
            name = pattern.sub(instead, name)
    return name
