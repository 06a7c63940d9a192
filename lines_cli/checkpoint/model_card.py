"""The model card of an output: what made it, from what, in the Hub's terms."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from lines_cli.checkpoint.reader import Checkpoint
from lines_cli.checkpoint.sidecars import Sidecar
from lines_cli.storage.beside import beside
from lines_cli.storage.names import MODEL_CARD, MODEL_INDEX, RECIPE
from lines_cli.storage.object_store import is_url


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card says.

    Attributes:
        title: the model's name.
        method: the merge method's name.
        about: what that is, in a line.
        calibrated: how what it made was calibrated, in a sentence; empty where it was not.
        base, models: the inputs.
        like: the one that the output is like.
        alone: whether the merged task vector is that of one fine-tune, as it is.
        scaled: whether it is scaled over depth.
        coefficients: per stack its name and the coefficient of each layer.
        outside: the coefficients outside the blocks, before and behind them.
        filters: parts of names, and the coefficient of the tensors that have them.
        front: what the card of the one that the output is like says of licence, language and use.
        whole: of several models in one folder those that are taken as an input has them: name, and that input.
        apart: of several models those that have other coefficients outside their blocks: name, and these.
        code: files of code that are carried over.
    """

    title: str
    method: str
    about: str
    calibrated: str
    base: Checkpoint | None
    models: Sequence[Checkpoint]
    like: Checkpoint
    alone: bool
    scaled: bool
    coefficients: Iterable[tuple[str, Sequence[float]]]
    outside: tuple[float, float]
    filters: Iterable[tuple[str, float]]
    front: Mapping[str, Any] = field(default_factory=dict)
    whole: Sequence[tuple[str, Checkpoint]] = ()
    apart: Sequence[tuple[str, tuple[float, float]]] = ()
    code: Sequence[str] = ()


def model_card(card: Card) -> Sidecar:
    """A model card for the Hub: front matter, what was done, and with which coefficients."""
    one = card.base is not None and len(card.models) == 1
    front = dict(card.front)
    inputs = (*((card.base,) if card.base else ()), *card.models)
    if ids := list(dict.fromkeys(hub_id for checkpoint in inputs if (hub_id := _id_on_the_hub(checkpoint)))):
        front |= {"base_model": ids, "base_model_relation": "finetune" if one else "merge"}
    front["tags"] = ["lines"] if one else ["lines", "merge", card.method.replace("_", "-")]
    if library := _library(card.like):
        front["library_name"] = library
    models = [f"| base | {_code(_public_name(card.base))} |"] if card.base else []
    models += [f"| {'fine-tune' if one else 'model'} | {_code(_public_name(model))} |" for model in card.models]
    rows = [
        f"| {_code(name)} | {len(values)} | {values[0]:.6g} | {values[-1]:.6g} |" for name, values in card.coefficients
    ]
    rows.append(f"| outside the blocks | | {card.outside[0]:.6g} | {card.outside[1]:.6g} |")
    rows += [
        f"| outside the blocks of {_code(name)} | | {first:.6g} | {last:.6g} |" for name, (first, last) in card.apart
    ]
    rows += [f"| names with {_code(pattern)} | | {value:.6g} | {value:.6g} |" for pattern, value in card.filters]
    table = ["", "| stack | layers | first coefficient | last coefficient |", "|---|---|---|---|", *rows]
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {_plain(card.title)}

{_ONE_SCALED if card.alone and card.base and card.scaled else _how(card)}

| | model |
|---|---|
{chr(10).join(models)}
{chr(10).join(table if card.base else [])}
{_beside(card)}
[`{RECIPE}`]({RECIPE}) beside this card runs it again: `lines merge --config {RECIPE} -o OUT`. In this folder,
`lines verify .` says whether the files here are what it makes.
{_SOURCE if card.scaled else ""}"""
    return Sidecar(MODEL_CARD, content=text.encode())


@dataclass(frozen=True, slots=True)
class AdapterCard:
    """What the model card of an adapter says.

    Attributes:
        title: its name.
        how: `scaled`, `merged` or `extracted`.
        base: what it changes, if that was named.
        base_said: what its config calls that.
        models: what it was made of.
        scaled: whether it is scaled over depth.
        ranks: of its modules.
        coefficients, outside, filters, front: as of `Card`.
        of_peft: whether PEFT loads it.
    """

    title: str
    how: str
    base: Checkpoint | None
    base_said: str | None
    models: Sequence[Checkpoint]
    scaled: bool
    ranks: Sequence[int]
    coefficients: Iterable[tuple[str, Sequence[float]]]
    outside: tuple[float, float]
    filters: Iterable[tuple[str, float]]
    front: Mapping[str, Any] = field(default_factory=dict)
    of_peft: bool = True


def adapter_card(card: AdapterCard) -> Sidecar:
    """A model card for the Hub, of an adapter."""
    front = dict(card.front)
    base = _id_on_the_hub(card.base) if card.base is not None else None
    if base is None and card.base_said and _HUB_ID.fullmatch(card.base_said):
        base = card.base_said
    if base is not None:
        front |= {"base_model": base, "base_model_relation": "adapter"}
    front["tags"] = ["lines", "lora", *(["merge"] if card.how == "merged" else [])]
    if card.of_peft:
        front["library_name"] = "peft"
    name = "fine-tune" if card.how == "extracted" else "adapter"
    models = [f"| base | {_code(_public_name(card.base))} |"] if card.base else []
    models += [f"| {name} | {_code(_public_name(model))} |" for model in card.models]
    rows = [
        f"| {_code(stack)} | {len(values)} | {values[0]:.6g} | {values[-1]:.6g} |"
        for stack, values in card.coefficients
    ]
    rows.append(f"| outside the blocks | | {card.outside[0]:.6g} | {card.outside[1]:.6g} |")
    rows += [f"| names with {_code(pattern)} | | {value:.6g} | {value:.6g} |" for pattern, value in card.filters]
    table = ["", "| stack | layers | first coefficient | last coefficient |", "|---|---|---|---|", *rows]
    ranks = sorted(set(card.ranks))
    said = "" if not ranks else f" Rank {ranks[0]}." if len(ranks) == 1 else f" Ranks {ranks[0]} to {ranks[-1]}."
    scaled = f" {_SCALED_BY_DEPTH}" if card.scaled else ""
    text = f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {_plain(card.title)}

{_ADAPTER[card.how]}{said}{scaled}

| | model |
|---|---|
{chr(10).join(models)}
{chr(10).join(table if card.scaled else [])}

[`{RECIPE}`]({RECIPE}) beside this card runs it again: `lines merge --config {RECIPE} -o OUT`. In this folder,
`lines verify .` says whether the files here are what it makes.
{_SOURCE if card.scaled else ""}"""
    return Sidecar(MODEL_CARD, content=text.encode())


_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+", re.ASCII)
_ADAPTER = {
    "scaled": "An adapter (LoRA) whose factors B were scaled.",
    "merged": "Several adapters (LoRA) merged into one: their weighted sum, or the nearest to it of a given rank.",
    "extracted": "An adapter (LoRA) that is the nearest to a full fine-tune's update, matrix by matrix.",
}
_SCALED_BY_DEPTH = (
    "Its update was scaled over depth by [LiNeS](https://arxiv.org/abs/2410.17146): a coefficient for each block, "
    "which grows with depth. Shallow blocks stay near the base, which keeps what it knew."
)

_ONE_SCALED = """A fine-tuned model whose update to its base was scaled over depth by
[LiNeS](https://arxiv.org/abs/2410.17146): `base + c(l) * (fine-tune - base)`, with a coefficient `c` that depends on
the depth of a block. Shallow blocks stay near the base, which keeps what it knew; deep blocks keep what the fine-tune
learnt."""

_SOURCE = """
LiNeS: Wang et al., *LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging*, ICLR 2025,
arXiv:2410.17146.
"""


def _beside(card: Card) -> str:
    """What is said of components that were taken whole, and of code; each a paragraph."""
    said = [f"`{_plain(name)}` is that of {_code(_public_name(of))}, as it is." for name, of in card.whole]
    if card.code:
        files = ", ".join(map(_code, card.code))
        said.append(
            f"Custom code lies beside the weights, as {_code(_public_name(card.like))} has it: {files}. Read it before "
            "you let a loader run it."
        )
    return "".join(f"\n{text}\n" for text in said)


def _how(card: Card) -> str:
    models = "One model" if len(card.models) == 1 else f"{len(card.models)} models"
    how = f"{models}, merged by `{card.method}`. {card.about}"
    if card.calibrated:
        how += f"\nWhat it made was calibrated: {card.calibrated}"
    if card.scaled:
        how += (
            "\nThe merged task vector was scaled over depth by [LiNeS](https://arxiv.org/abs/2410.17146):\n"
            "`base + c(l) * merged task vector`, with a coefficient `c` that depends on the depth of a block."
        )
    return how


def _public_name(checkpoint: Checkpoint) -> str:
    """A Hub id as it is, also that of a folder in the Hub's cache; of any other path only the last part, since the rest
    is nobody's business.
    """
    if checkpoint.hub_id and is_url(checkpoint.hub_id):
        return checkpoint.hub_id.rpartition("/")[2]
    return _id_on_the_hub(checkpoint) or checkpoint.real.name


def _id_on_the_hub(checkpoint: Checkpoint) -> str | None:
    if checkpoint.hub_id and is_url(checkpoint.hub_id):
        return None
    if checkpoint.hub_id:
        return checkpoint.hub_id.partition("@")[0]
    folder = checkpoint.real if checkpoint.path.is_dir() else checkpoint.real.parent
    cached = _IN_THE_CACHE.fullmatch("/".join(folder.parts[-3:]))
    return f"{cached['owner']}/{cached['name']}" if cached else None


_IN_THE_CACHE = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/[0-9a-f]{40}", re.ASCII)


def _library(ft: Checkpoint) -> str | None:
    if ft.stem == "open_clip_model":
        return "open_clip"
    if ft.components and ft.folder is not None:
        return "diffusers" if beside(ft.folder, MODEL_INDEX) is not None else "sentence-transformers"
    if "_diffusers_version" in ft.config:
        return "diffusers"
    return "transformers" if "model_type" in ft.config else None


def _plain(text: str) -> str:
    """One printable line, safe in Markdown and in a table."""
    return "".join(character if character.isprintable() else "?" for character in text).replace("|", "\\|")


def _code(text: str) -> str:
    return f"`{_plain(text).replace('`', '')}`"
