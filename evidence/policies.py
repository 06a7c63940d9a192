"""Item 3, a rewarded soup: a small causal language model that is trained here, two policies of it, each rewarded for
one style of text, and mixtures of the two.
"""

from __future__ import annotations

import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import OneCycleLR

from evidence.setup import Setup, result_path, run_lines, save_result
from evidence.texts import pools

STYLES = ("packages", "sentiment")  # a reward for the style of each
CORPUS = ("verbs", "nouns", "packages", "computing", "sentiment")
EACH = 4000  # texts of each source, at most
VOCABULARY, LENGTH = 2000, 16  # words, and words in a text
LAYERS, WIDTH, HEADS = 6, 128, 4
END = 0  # begins and ends a text
WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
# As published, alpha = beta = 1; without LiNeS; and a constant with the same mean, for it extrapolates as well.
FAMILIES = {"lines": (1.0, 1.0), "plain": (1.0, 0.0), "constant": (1.5, 0.0)}
SAMPLES = 256


@dataclass(frozen=True)
class Size:
    """How long a run trains: steps of the language model, and of each policy."""

    pretrain: int = 800
    policy: int = 15  # with more both rewards saturate, and mixtures jump from one policy to the other
    batch: int = 64


@dataclass(frozen=True)
class Texts:
    """Texts as numbers of words, END for what is not there; and how much each word speaks for a style."""

    numbers: Tensor  # [texts, LENGTH + 1], int64
    rewards: dict[str, Tensor]  # style -> [vocabulary], log-odds against all texts, in nats


def texts_of(setup: Setup) -> Texts:
    """The corpus: the same for every seed."""
    found, _ = pools(Path(setup.work))
    sources = {
        name: [text.lower().split()[:LENGTH] for texts in pool.values() for text in texts][:EACH]
        for name, pool in found.items()
    }
    counts = {name: Counter(word for text in texts for word in text) for name, texts in sources.items()}
    total = sum(counts.values(), Counter())
    words = [word for word, _ in sorted(total.items(), key=lambda each: (-each[1], each[0]))[: VOCABULARY - 1]]
    known = {word: at + 1 for at, word in enumerate(words)}
    rows = []
    for texts in sources.values():
        for text in texts:
            numbers = [known[word] for word in text if word in known]
            if len(numbers) >= 3:
                rows.append([END, *numbers, *[END] * (LENGTH - len(numbers))])
    rewards = {}
    for style in [name for name in STYLES if name in sources] or list(sources)[:2]:
        own, everything = sum(counts[style].values()), sum(total.values())
        odds = [
            math.log((counts[style][word] + 1) / (own + VOCABULARY) * (everything + VOCABULARY) / (total[word] + 1))
            for word in words
        ]
        rewards[style] = torch.tensor([0.0, *odds, *[0.0] * (VOCABULARY - 1 - len(odds))])
    return Texts(torch.tensor(rows), rewards)


def reward(numbers: Tensor, odds: Tensor) -> Tensor:
    """The mean of the words' log-odds, up to the end of each text: [texts]; an empty text has none."""
    words = numbers[:, 1:]
    there = (words != END).cumprod(1).float()
    scores: Tensor = (odds[words] * there).sum(1) / there.sum(1).clamp(min=1)
    return scores


# --- the language model ---


def make_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH + 1, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS,
        bos_token_id=END, eos_token_id=END, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    model: nn.Module = GPT2LMHeadModel(config)
    return model


def load_model(folder: Path) -> nn.Module:
    from transformers import GPT2LMHeadModel

    model: nn.Module = GPT2LMHeadModel.from_pretrained(folder)
    return model.eval()


def made(folder: Path, make: Callable[[], Any]) -> Path:
    """A folder that `make` gives the model of, once; whole or not at all."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        make().save_pretrained(part)
        os.rename(part, folder)
    return folder


def pretrain(texts: Texts, size: Size, seed: int) -> nn.Module:
    """A language model of all texts."""
    torch.manual_seed(seed)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = OneCycleLR(optimizer, 1e-3, total_steps=size.pretrain, pct_start=0.1, cycle_momentum=False)
    for step in range(1, size.pretrain + 1):
        rows = texts.numbers[torch.randint(len(texts.numbers), (size.batch,))]
        loss = _loss(model, rows).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % max(1, size.pretrain // 4) == 0:
            print(f"language model: step {step} of {size.pretrain}, loss {loss.item():.2f}", flush=True)
    return model


def _loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Minus the log-likelihood of each text, up to its end: [texts]."""
    logits = model(input_ids=rows[:, :-1]).logits
    losses = cross_entropy(logits.mT, rows[:, 1:], reduction="none")
    there = torch.cat([torch.ones(len(rows), 1), (rows[:, 1:-1] != END).cumprod(1)], 1)
    return (losses * there).sum(1)


@torch.no_grad()
def sample(model: nn.Module, count: int, draw: torch.Generator) -> Tensor:
    """Texts drawn from a model: [count, LENGTH + 1]; behind an end all is END."""
    rows = torch.full((count, 1), END)
    past, open_ = None, torch.ones(count, 1, dtype=torch.bool)
    for _ in range(LENGTH):
        out = model(input_ids=rows[:, -1:], past_key_values=past, use_cache=True)
        past = out.past_key_values
        words = torch.multinomial(out.logits[:, -1].softmax(-1), 1, generator=draw)
        words = torch.where(open_, words, END)
        open_ &= words != END
        rows = torch.cat([rows, words], 1)
    return rows


def reinforce(base: Path, odds: Tensor, size: Size, seed: int) -> nn.Module:
    """A policy: policy gradients on its own samples, for one reward, less a tenth of its distance from the base."""
    policy, reference = load_model(base), load_model(base)
    draw = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(policy.parameters(), 3e-4)
    for step in range(1, size.policy + 1):
        rows = sample(policy, size.batch, draw)
        losses = _loss(policy, rows)
        with torch.no_grad():
            apart = (_loss(reference, rows) - losses) / LENGTH
            gained = reward(rows, odds) - 0.1 * apart
            advantage = (gained - gained.mean()) / gained.std().clamp(min=1e-6)
        loss = (advantage * losses).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        if step % max(1, size.policy // 3) == 0:
            print(f"policy: step {step} of {size.policy}, reward {reward(rows, odds).mean().item():.2f}", flush=True)
    return policy


# --- the item ---


def run(setup: Setup, seed: int, name: str) -> None:
    """The front of one seed, by `lines merge`; nothing where its result is there."""
    path = result_path(setup, "policies", seed, name)
    if path.exists():
        return
    torch.set_num_threads(1)
    size, texts, folder = Size(), texts_of(setup), Path(setup.work) / f"seed{seed}" / "policies"
    folder.mkdir(parents=True, exist_ok=True)
    base = made(folder / "base", lambda: pretrain(texts, size, seed))
    policies = [
        made(folder / style, lambda odds=odds, at=at: reinforce(base, odds, size, 10 * seed + at))  # type: ignore[misc]
        for at, (style, odds) in enumerate(texts.rewards.items())
    ]
    points: list[dict[str, Any]] = [{"family": "pre", "weight": None, "rewards": _rewards(base, texts, seed)}]
    for family, (alpha, beta) in FAMILIES.items():
        for weight in WEIGHTS:
            out = folder / "mixed"
            recipe = {
                "merge_method": "task_arithmetic",
                "base_model": str(base),
                "models": [
                    {"model": str(policy), "parameters": {"weight": each}}
                    for policy, each in zip(policies, (weight, 1 - weight), strict=True)
                ],
                "lines": {"alpha": alpha, "beta": beta},
            }
            (folder / "merge.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
            run_lines("merge", "--config", folder / "merge.yaml", "-o", out, "--force", "--workers", 1)
            points.append({"family": family, "weight": weight, "rewards": _rewards(out, texts, seed)})
    save_result(path, {"seed": seed, "styles": list(texts.rewards), "points": points})


def _rewards(folder: Path, texts: Texts, seed: int) -> list[float]:
    """The mean of each reward, over texts drawn from a model."""
    rows = sample(load_model(folder), SAMPLES, torch.Generator().manual_seed(seed))
    return [reward(rows, odds).mean().item() for odds in texts.rewards.values()]


def front(points: Sequence[Any], family: str) -> list[tuple[float, float]]:
    """Both rewards of a family's mixtures, from the second policy to the first."""
    own = sorted((point for point in points if point["family"] == family), key=lambda point: float(point["weight"]))
    return [(float(point["rewards"][0]), float(point["rewards"][1])) for point in own]
