"""Write lines_cli/plan/conversions.json: how layouts of one model differ, by the installed transformers' own table.

transformers says for each model how the names and tensors of a checkpoint become those of its modules. lines reads that
as data, never as an import: two sides of which one has the one layout and one the other are paired by it.

python docs/conversions.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

TABLE = Path(__file__).parent.parent / "lines_cli" / "plan" / "conversions.json"

# What transformers does not convert, but other tools do: layouts that their own code says in one place.
BY_HAND: dict[str, list[list[Any]]] = {
    # Phi3Attention and Phi3MLP: rows are [query | key | value] and [gate | up]; llama-like copies have them apart
    "phi3": [
        [
            "convert",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            ["self_attn.qkv_proj"],
            [["cat", 0]],
        ],
        ["convert", ["mlp.gate_proj", "mlp.up_proj"], ["mlp.gate_up_proj"], [["cat", 0]]],
    ],
}


def table() -> dict[str, Any]:
    """The table as plain values.

    `rules` has for each model type or class the rules that a checkpoint's names go through, in order: `rename` (what is
    looked for, what takes its place), or `convert` (the patterns on the checkpoint's side, those on the model's, and
    what is done to get from the first to the second). `like` names those that have the rules of another, `of` the model
    type of each class.
    """
    import transformers
    from transformers import conversion_mapping

    build: Callable[[], dict[str, Any]] = conversion_mapping._build_checkpoint_conversion_mapping  # noqa: SLF001
    mapping = build()
    rules = {name: [list(rule) for rule in _rules(transforms)] for name, transforms in mapping.items()}
    rules |= BY_HAND
    kept: dict[str, list[list[Any]]] = {}
    like: dict[str, str] = {}
    named_after = set(conversion_mapping._MODEL_TO_CONVERSION_PATTERN.values())  # noqa: SLF001
    for name in sorted(rules, key=lambda name: (name not in named_after, name)):
        if name == "legacy" or not rules[name]:
            continue
        same = next((other for other in kept if kept[other] == rules[name]), None)
        if same is None:
            kept[name] = rules[name]
        else:
            like[name] = same
    of = _types_of([name for name in rules if name[0].isupper()])
    return {"transformers": transformers.__version__, "rules": kept, "like": like, "of": dict(sorted(of.items()))}


def _rules(transforms: Iterable[Any]) -> Iterator[tuple[Any, ...]]:
    for transform in transforms:
        kind = type(transform).__name__
        if kind == "WeightConverter":
            ops = [_operation(operation) for operation in transform.operations]
            sources, targets = (
                [_plain(pattern) for pattern in patterns]
                for patterns in (transform.source_patterns, transform.target_patterns)
            )
            yield "convert", sources, targets, ops
        elif kind in {"WeightRenaming", "PrefixChange"}:
            for source in transform.source_patterns:
                yield "rename", _as_compiled(source), transform.target_patterns[0]
        # A GroupWeightRename takes names that the other layout has, too, for other tensors; and one renames with an
        # offset. Both stay unpaired, which is an error that names them.


def _as_compiled(pattern: str) -> str:
    """A pattern of a renaming as transformers compiles it."""
    pattern = pattern.replace("*.", r".*\.")
    return pattern + r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else pattern


def _plain(pattern: str) -> str:
    """A pattern of a converter as text, in which `*` stands for a number."""
    text = pattern.replace("\\.", ".")
    if re.search(r"[\\^$()\[\]?+|]", text):
        raise ValueError(f"{pattern}: more than text and a *")
    return text


def _operation(operation: Any) -> list[Any]:
    kind = type(operation).__name__
    if kind in {"Chunk", "Concatenate"} and operation.num_shards_attribute is not None:
        return ["cat of any number", operation.dim]
    if kind in {"MergeModulelist", "Concatenate", "Chunk", "Split"}:
        return [{"MergeModulelist": "stack", "Concatenate": "cat"}.get(kind, kind.lower()), operation.dim]
    if kind == "Transpose":
        return ["transpose", operation.dim0, operation.dim1, *(["if shapes differ"] if operation.check_dims else [])]
    return [kind]  # not carried out: what such a rule is about is refused by name


def _types_of(classes: Collection[str]) -> dict[str, str]:
    """The model type of each class, as its config says it."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    types: dict[str, str] = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        text = path.read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r"^class (\w+)\(", text, re.MULTILINE)) & set(classes)):
            held = getattr(import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)
            types[name] = str(held.config_class.model_type or path.parent.name)
    return types


def main() -> None:
    TABLE.write_text(as_text(table()), encoding="utf-8")


def as_text(values: dict[str, Any]) -> str:
    """A line for each rule, so that a change shows."""
    rules = ",\n".join(
        f"  {json.dumps(name)}: [\n" + ",\n".join(f"   {json.dumps(rule)}" for rule in of) + "\n  ]"
        for name, of in values["rules"].items()
    )
    return (
        f'{{\n "transformers": {json.dumps(values["transformers"])},\n "rules": {{\n{rules}\n }},\n'
        f' "like": {json.dumps(values["like"], indent=2)},\n "of": {json.dumps(values["of"], indent=2)}\n}}\n'
    )


if __name__ == "__main__":
    main()
