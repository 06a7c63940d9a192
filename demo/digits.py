"""What LiNeS does, seen on a toy: fine-tune a small vision transformer, then undo its forgetting.

    .venv/bin/python demo/digits.py [--target inverted] [--seed 0]

1. Pre-train one encoder on five image domains of scikit-learn's handwritten digits.
2. Fine-tune it on one of them, the target: it learns that one and forgets the other four, the
   controls.
3. Run `lines edit` as a user would. It scales the change that fine-tuning made by depth: little in
   the shallow blocks, which all domains use, nearly all of it in the deep ones.
4. Read the results back from disk, and say what was kept and what it cost.

Nothing is downloaded. Every number printed is measured in this run. Results stay in demo/out/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo/out")  # relative to ROOT, so that a command shown can be typed there again
BASE, TUNED = OUT / "pretrained", OUT / "finetuned"

SPLITS = {"pretrain": 600, "finetune": 600, "validation": 250, "test": 347}  # all 1797 images
CLASSES, SIDE, PATCH, WIDTH, HEADS, DEPTH = 10, 8, 2, 48, 4, 12
LOGIT_SCALE = 10.0  # cosines lie in -1..1, too close together for a softmax
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
STARTED = time.perf_counter()

Split = tuple[Tensor, Tensor]  # images [N, 8, 8] in 0..1, labels [N]
Domain = Callable[[Tensor], Tensor]  # images [N, 8, 8] -> the same digits, drawn another way


def main() -> None:
    parser = argparse.ArgumentParser(description="LiNeS on scikit-learn's handwritten digits.")
    parser.add_argument("--target", default="inverted", choices=make_domains())
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(2)  # sums depend on it: the same number everywhere, the same result
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    torch.manual_seed(args.seed)
    splits, domains = load_splits(), make_domains()

    say(f"pre-training on {len(domains)} domains: {', '.join(domains)}")
    encoder = pretrain(domains, splits["pretrain"])
    save_encoder(encoder, BASE)
    heads = {name: one_shot_head(encoder, domains[name], splits["pretrain"]) for name in domains}

    say(f"fine-tuning on one: {args.target}")
    encoder = finetune(encoder, domains[args.target], heads[args.target], splits["finetune"])
    save_encoder(encoder, TUNED)

    say("editing, with the defaults")
    edited = OUT / "edited"
    lines_edit(edited, "--dry-run")
    lines_edit(edited)

    judge = Judge(args.target, domains, heads, splits)
    say("choosing alpha on the validation images, with beta = 1 - alpha")
    alpha, chosen = choose(judge, "lines", beta=lambda alpha: 1 - alpha)
    say("the same for the hard baseline, constant scaling (WiSE-FT): beta = 0")
    constant_alpha, constant = choose(judge, "constant", beta=lambda alpha: 0)

    say("done\n")
    rows = {
        "pre-trained": judge.marks(BASE),
        "fine-tuned": judge.marks(TUNED),
        "lines edit, defaults": judge.marks(edited),
        f"lines edit, alpha {alpha:g} (chosen)": judge.marks(chosen),
        f"constant scaling by {constant_alpha:g} (chosen)": judge.marks(constant),
    }
    print_table(rows, args.target)
    print_reading(*rows.values())


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:3.0f} s] {text}", flush=True)


# ------------------------------------------------------------------------------------------- data


def load_splits() -> dict[str, Split]:
    """The digits, shuffled and dealt into disjoint splits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    order = torch.randperm(len(labels))
    parts = order.split(list(SPLITS.values()))
    return {name: (images[part], labels[part]) for name, part in zip(SPLITS, parts, strict=True)}


def make_domains() -> dict[str, Domain]:
    shuffle = torch.randperm(SIDE * SIDE)
    board = torch.arange(SIDE)[:, None].add(torch.arange(SIDE)).remainder(2)
    return {
        "plain": lambda x: x,
        "inverted": lambda x: 1 - x,
        "rotated": lambda x: x.rot90(1, (1, 2)),
        "shuffled": lambda x: x.flatten(1)[:, shuffle].unflatten(1, (SIDE, SIDE)),
        "checkered": lambda x: (x - board).abs(),
    }


# ------------------------------------------------------------------------------------------ model


class Block(nn.Module):
    """A pre-norm transformer block: the unit that shares one LiNeS coefficient."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [N, T, width] -> the same shape."""
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v)  # [N, heads, T, width / heads]
        x = x + self.proj(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """A small vision transformer. `lines` finds the depth of `blocks.{i}.*` from the names alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.pos_embed = nn.Parameter(torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 8, 8] -> features [N, width] of length 1."""
        patches = F.unfold(images[:, None], PATCH, stride=PATCH).mT  # [N, 16, 4]
        x = self.blocks(self.patch_embed(patches) + self.pos_embed)
        return F.normalize(self.norm(x.mean(1)), dim=-1)


def save_encoder(encoder: Encoder, folder: Path) -> None:
    (ROOT / folder).mkdir(parents=True)
    save_file(encoder.state_dict(), ROOT / folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "digits-vit", "num_hidden_layers": DEPTH, "hidden_size": WIDTH}
    (ROOT / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def load_encoder(folder: Path) -> Encoder:
    encoder = Encoder()
    encoder.load_state_dict(load_file(ROOT / folder / "model.safetensors"))
    return encoder


# --------------------------------------------------------------------------------------- training


def pretrain(domains: dict[str, Domain], split: Split) -> Encoder:
    """One encoder for all domains at once. Their trained heads are thrown away afterwards."""
    encoder = Encoder()
    heads = nn.Parameter(torch.randn(len(domains), CLASSES, WIDTH))

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        parts = zip(domains.values(), images.chunk(len(domains)), strict=True)
        features = encoder(torch.cat([domain(part) for domain, part in parts]))
        cosines = features.unflatten(0, (len(domains), -1)) @ F.normalize(heads, dim=-1).mT
        return F.cross_entropy(LOGIT_SCALE * cosines.flatten(0, 1), labels)

    size = 20 * len(domains)
    fit([*encoder.parameters(), heads], loss_of, split, size=size, steps=450, rate=2e-3)
    return encoder


def one_shot_head(encoder: Encoder, domain: Domain, split: Split) -> Tensor:
    """Fixed prototypes [classes, width], each from one image: as rough as CLIP's zero-shot heads."""
    images, labels = split
    firsts = torch.stack([images[labels == label][0] for label in range(CLASSES)])
    with torch.no_grad():
        features: Tensor = encoder(domain(firsts))
    return F.normalize(features - features.mean(0), dim=-1)


def finetune(encoder: Encoder, domain: Domain, head: Tensor, split: Split) -> Encoder:
    """Fit the encoder, in place, to one domain; the head stays as it is."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(LOGIT_SCALE * encoder(domain(images)) @ head.mT, labels)

    fit([*encoder.parameters()], loss_of, split, size=64, steps=120, rate=1e-3)
    return encoder


def fit(
    parameters: list[nn.Parameter],
    loss_of: Callable[[Tensor, Tensor], Tensor],
    split: Split,
    size: int,
    steps: int,
    rate: float,
) -> None:
    """AdamW on random batches of `size`, a cosine schedule, gradients clipped to norm 1."""
    images, labels = split
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (size,))
        loss = loss_of(images[batch], labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 3) == 0:
            say(f"  step {step} of {steps}, loss {loss.item():.2f}")


# ---------------------------------------------------------------------------- editing and judging


def lines_edit(out: Path, *options: str) -> None:
    """Run `lines edit` from the repository's root, showing the command first."""
    command = ["lines", "edit", str(BASE), str(TUNED), "-o", str(out), *options]
    print(f"\n$ {shlex.join(command)}", flush=True)
    executable = Path(sys.executable).with_name("lines")
    done = subprocess.run([executable, *command[1:]], cwd=ROOT)
    if done.returncode:
        sys.exit(f"the command above failed (exit code {done.returncode})")


class Marks(NamedTuple):
    target: float  # per cent of the test images
    control: float  # the same, mean over the control domains


@dataclass(frozen=True)
class Judge:
    """Reads checkpoints from disk and measures them under the fixed heads."""

    target: str
    domains: dict[str, Domain]
    heads: dict[str, Tensor]
    splits: dict[str, Split]

    def accuracies(self, folder: Path, split: str) -> dict[str, float]:
        """Domain -> per cent of the split's images classified correctly."""
        encoder = load_encoder(folder)
        images, labels = self.splits[split]
        with torch.no_grad():
            guesses = {
                name: (encoder(domain(images)) @ self.heads[name].mT).argmax(-1)
                for name, domain in self.domains.items()
            }
        return {name: 100 * guess.eq(labels).float().mean().item() for name, guess in guesses.items()}

    def marks(self, folder: Path, split: str = "test") -> Marks:
        accuracies = self.accuracies(folder, split)
        return Marks(accuracies.pop(self.target), mean(accuracies.values()))

    def score(self, folder: Path) -> float:
        """The paper's rule for one fine-tune: 2 * target / target_ft + mean(control / control_pre)."""
        edited, base, tuned = (self.accuracies(f, "validation") for f in (folder, BASE, TUNED))
        kept = [edited[name] / base[name] for name in self.domains if name != self.target]
        return 2 * edited[self.target] / tuned[self.target] + mean(kept)


def choose(judge: Judge, name: str, beta: Callable[[float], float]) -> tuple[float, Path]:
    """Edit once for every alpha; return the one of the highest validation score, and its folder."""
    folders = {alpha: OUT / f"{name}-{alpha:g}" for alpha in ALPHAS}
    scores = {}
    for alpha, folder in folders.items():
        lines_edit(folder, f"--alpha={alpha:g}", f"--beta={beta(alpha):g}", "--quiet")
        marks, scores[alpha] = judge.marks(folder, "validation"), judge.score(folder)
        print(f"  target {marks.target:.1f}, control {marks.control:.1f}, score {scores[alpha]:.3f}")
    best = max(ALPHAS, key=scores.__getitem__)
    return best, folders[best]


def print_table(rows: dict[str, Marks], target: str) -> None:
    width = max(map(len, rows)) + 2
    print(f"{'% of test images right':{width}}{target:>10}{'others':>10}")
    for name, marks in rows.items():
        print(f"{name:{width}}{marks.target:10.1f}{marks.control:10.1f}")


def print_reading(pre: Marks, tuned: Marks, edited: Marks, chosen: Marks, constant: Marks) -> None:
    """Say what the table shows, whatever it shows."""
    noise = 100 * (tuned.target / 100 * (1 - tuned.target / 100) / SPLITS["test"]) ** 0.5
    forgotten = pre.control - tuned.control

    def against_tuned(marks: Marks) -> str:
        back = marks.control - tuned.control
        share = f" ({back / forgotten:.0%} of what was lost)" if forgotten > noise else ""
        return f"{back:+.1f} points on the others{share}, {marks.target - tuned.target:+.1f} on the target"

    target, control = chosen.target - constant.target, chosen.control - constant.control
    if max(abs(target), abs(control)) <= noise:
        verdict = "about as good as it, here"
    elif min(target, control) >= -noise:
        verdict = "ahead of it, here"
    elif max(target, control) <= noise:
        verdict = "behind it, here"
    else:
        verdict = "a different trade, neither better nor worse"

    print(f"""
Fine-tuning changed the target by {tuned.target - pre.target:+.1f} points and the others by {-forgotten:+.1f}.
Against the fine-tuned model, `lines edit` gives
  with its defaults:   {against_tuned(edited)};
  with alpha chosen:   {against_tuned(chosen)}.
Against constant scaling, also chosen: {target:+.1f} on the target, {control:+.1f} on the others: {verdict}.

This is a toy: {SPLITS["test"]} test images and one seed, so {noise:.1f} points are one standard error. Try --seed 1,
or another --target. The paper (arXiv 2410.17146) measures real models; this only shows the tool.""")


if __name__ == "__main__":
    main()
