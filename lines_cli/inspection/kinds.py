"""What kind of parameter a tensor is, read off its name.

A report groups a fine-tune's update by kind. As with depth there is one general rule and no list of architectures.
Every dotted segment of a name is read for words, and the innermost one that says something decides:

1. Inside a block a norm, an attention or an MLP claims what lies in it (`attention.output.LayerNorm` is a norm,
   `attention.output.dense` attention, `mlp.router.classifier` MLP). Next what recurs or convolves keeps its own
   parameters as `other`, and only then do projections that stand alone tell (`fc1`, `q_proj`, `output.dense`).
   Embedding or head it is only if nothing else was said (`layers.61.shared_head.head`).
2. Outside the blocks an embedder, a head or a connector claims what lies in it, all but norms: the attention of a
   pooling head is head, the MLP of a projector between towers `other`. Next come the words of rule 1 (a prediction
   layer behind the counted ones, a Q-Former), last what only the ends of a model are called (`stem`, `fc`, `proj_out`).
3. `other` is what no word names, and matrices below a norm (`norm1.linear`), which compute a modulation.

Names say what their authors call a thing: RWKV's `attention` counts as attention, a ConvNeXt's `pwconv1` as `other`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise
from typing import Literal

Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]

KINDS: tuple[Kind, ...] = ("attention", "mlp", "norm", "embedding", "head", "other")
"""Every kind, in the order of a report."""

_Words = dict[Kind, re.Pattern[str]]  # tried in turn on a segment in lower case, the whole of it


def _words(patterns: dict[Kind, str]) -> _Words:
    return {kind: re.compile(pattern, re.DOTALL) for kind, pattern in patterns.items()}


_NORM = _words(
    {"norm": r".*norm(?:(?!al)|ali[sz]ation).*|(?:.*_)?[lbg]n\d*(?:_.*)?|running_(?:mean|var)|num_batches.*"}
)
_MODULES = _words(
    {
        "mlp": r"(?:.*_)?(?:mlp|ff|ffn|ffw|feed_?forward|moe|experts?)\d*(?:_.*)?|intermediate(?:_.*)?|dense.*dense",
        "attention": r".*att(?:n|ention).*|att",
    }
)
_OWN_PARAMETERS = _words(
    {
        "other": r"(?:.*_)?(?:mamba\d?|ssm|[ms]?lstm)(?:_.*)?|(?:.*_)?conv(?:_module)?|se|.*(?:modulation|adaln).*"
        r"|mtp(?:_.*)?"
    }
)
_PROJECTIONS = _words(
    {
        "mlp": r"gate|router|(?:gate|up|down|gate_up)_proj(?:_.*)?|(?:fc|lin|linear|dense)_?[12]|fc_(?:in|out)|c_fc"
        r"|w[123]|wi(?:_\d)?|wo|dense_h_to_4h|dense_4h_to_h",
        "attention": r"(?:.*_)?(?:q|k|v|kv|qk|qkv|query|key|value)(?:_.*)?|w(?:q|k|v|qkv)|o_proj|to_out",
    }
)
_MIXER = _words({"other": r"(?:.*_)?(?:mixer|temporal_block)"})  # attention, an MLP or a recurrence
_IN_AND_OUT = _words({"attention": r"(?:in|out)_proj(?:_weight|_bias)?"})
_ENDS = _words(
    {
        "head": r"(?:.*_)?heads?(?:_.*)?|.*classifier.*|score|.*pooler.*|.*att(?:n|ention)_?pool.*|qa_outputs|lm_loss"
        r"|(?:.*_)?pred(?:ictors?|ictions?)?|(?:text|visual|vision|image|audio)_proj(?:ection)?|seq_relationship"
        r"|vocab_.*|embed_out|unembed(?:ding)?|output_projection|.*logits.*",
        "embedding": r"(?:.*_)?embed(?:s|ders?|dings?)?(?:_.*)?|(?:.*_)?embs?|wte|wpe|shared|(?:.*_)?tokens?"
        r"|(?:.*_)?positions?(?:_.*)?|rel_pos(?:_.*)?|feature_projection",
        "other": r".*(?:projector|connector|merger|aligner|resampler|adapter).*|.+_projection|prenet|.*postnet",
    }
)
_EDGES = _words(
    {
        "head": r"proj|fc|out|.*_out(?:_\d)?|output(?:_layer)?|final_layer",
        "embedding": r"input|.*_in|(?:.*_)?stem(?:_.*)?|conv\d|conv_proj",
    }
)


def kind_of(name: str, *, inside: bool) -> Kind:
    """The kind of the tensor `name`, which lies `inside` a stack of blocks or outside of all (before, after, between).

    Any string has a kind; the time it takes grows linearly with the name's length. Where no stack is known, all is
    outside: words such as `attention` tell there, too.
    """
    words = name.lower().split(".")
    if any(word in ("linear", "lin", "emb") and _first(_NORM, above) for above, word in pairwise(words)):
        return "other"  # it computes a norm's scale and shift, where a norm's own are vectors
    if not inside and (kind := _innermost(words, _NORM | _ENDS)):
        return kind
    if kind := _innermost(words, _NORM | _MODULES):
        return kind
    if any(above.startswith("output") and word == "dense" for above, word in pairwise(words)):
        return "mlp"  # the second half of BERT's, beside `intermediate`; attention has claimed its own
    for table in (_OWN_PARAMETERS, _PROJECTIONS, _MIXER, _IN_AND_OUT, _ENDS if inside else _EDGES):
        if kind := _innermost(words, table):
            return kind
    return "head" if not inside and words[-2:-1] == ["decoder"] else "other"  # a decoder that is one matrix


def _innermost(words: list[str], table: _Words) -> Kind | None:
    """What the innermost of the segments says that says anything."""
    said: Iterable[Kind | None] = (_first(table, word) for word in reversed(words))
    return next(filter(None, said), None)


def _first(table: _Words, word: str) -> Kind | None:
    return next((kind for kind, pattern in table.items() if pattern.fullmatch(word)), None)
