"""What LiNeS does, seen on a toy: fine-tune a small vision transformer, then undo its forgetting.

    .venv/bin/python demo/digits.py [--target inverted] [--seed 0] [--picture demo/out/picture.svg]

1. Pre-train one encoder on five image domains of scikit-learn's handwritten digits.
2. Fine-tune it on one of them, the target. It learns that one and forgets the others, the controls.
3. Run `lines edit` as a user would. It scales the change that fine-tuning made by depth: little of
   it in the shallow blocks, all of it in the last.
4. Read the results back from disk, say what they keep and what that costs, and draw it.

Nothing is downloaded. Every number is measured in this run. The checkpoints stay in demo/out/.
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
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, unfold
from torch.optim.lr_scheduler import OneCycleLR

from picture import draw

ROOT = Path(__file__).resolve().parent.parent
OUT = Path("demo/out")  # relative to ROOT, so that a command shown can be typed there again
BASE, TUNED = OUT / "pretrained", OUT / "finetuned"
LINES = shutil.which("lines", path=Path(sys.executable).parent)

SPLITS = {"pretrain": 600, "finetune": 600, "validation": 250, "test": 347}  # all 1797 images
CLASSES, SIDE, PATCH, WIDTH, HEADS, DEPTH = 10, 8, 2, 48, 4, 12
LOGIT_SCALE = 10.0  # cosines lie in -1..1, too close together for a softmax
ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)
STARTED = time.perf_counter()

Split = tuple[Tensor, Tensor]  # images [N, 8, 8] in 0..1, labels [N]
Domain = Callable[[Tensor], Tensor]  # images [N, 8, 8] -> the same digits, drawn another way
Loss = Callable[[Tensor, Tensor], Tensor]  # images, labels -> one number


def main() -> None:
    parser = argparse.ArgumentParser(description="LiNeS on scikit-learn's handwritten digits.")
    parser.add_argument("--target", default="inverted", choices=make_domains())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", type=Path, default=ROOT / OUT / "picture.svg", help="an .svg file to draw")
    args = parser.parse_args()
    if LINES is None:
        parser.error("`lines` is not installed in the environment that runs this: `make` does that")
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # how sums round depends on it; one also leaves the machine usable
    shutil.rmtree(ROOT / OUT, ignore_errors=True)
    splits, domains = load_splits(), make_domains()

    say(f"pre-training on {len(domains)} domains: {', '.join(domains)}")
    encoder = pretrain(domains, splits["pretrain"])
    save_encoder(encoder, BASE)
    heads = {name: one_shot_head(encoder, domains[name], splits["pretrain"]) for name in domains}

    say(f"fine-tuning on one: {args.target}")
    finetune(encoder, domains[args.target], heads[args.target], splits["finetune"])
    save_encoder(encoder, TUNED)

    say("editing with the defaults: first the plan, then the edit")
    edited = OUT / "edited"
    lines_edit(edited, "--dry-run")
    lines_edit(edited)

    judge = Judge(args.target, domains, heads, splits)
    say("choosing alpha on the validation images; beta is 1 - alpha")
    alpha, chosen = choose(judge, "lines", {alpha: 1 - alpha for alpha in ALPHAS})
    say("the same for a hard baseline, constant scaling (WiSE-FT); beta is 0")
    constant_alpha, constant = choose(judge, "constant", dict.fromkeys(ALPHAS, 0.0))

    say("measuring on the test images\n")
    rows = {
        "pre-trained": judge.marks(BASE),
        "fine-tuned": judge.marks(TUNED),
        "lines edit, defaults": judge.marks(edited),
        f"lines edit, alpha {alpha:g} chosen": judge.marks(chosen),
        f"constant scaling, {constant_alpha:g} chosen": judge.marks(constant),
    }
    print_table(rows, args.target)
    print_reading(*rows.values())
    stages = [rows[name] for name in ("pre-trained", "fine-tuned", "lines edit, defaults")]
    curves = [marks.target for marks in stages], [marks.control for marks in stages]
    draw(args.picture, update_norms(TUNED), update_norms(edited), *curves)
    say(f"drawn: {args.picture}")


def say(text: str) -> None:
    print(f"[{time.perf_counter() - STARTED:3.0f} s] {text}", flush=True)


def load_splits() -> dict[str, Split]:
    """The digits, shuffled and dealt into disjoint splits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    parts = torch.split(torch.randperm(len(labels)), list(SPLITS.values()))
    return {name: (images[part], labels[part]) for name, part in zip(SPLITS, parts, strict=True)}


def make_domains() -> dict[str, Domain]:
    shuffle = torch.randperm(SIDE * SIDE)
    board = (torch.arange(SIDE)[:, None] + torch.arange(SIDE)) % 2
    return {
        "plain": lambda x: x,
        "inverted": lambda x: 1 - x,
        "rotated": lambda x: x.rot90(1, (1, 2)),
        "shuffled": lambda x: x.flatten(1)[:, shuffle].view_as(x),
        "checkered": lambda x: (x - board).abs(),
    }


def make_block() -> nn.Module:
    return nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)


class Encoder(nn.Module):
    """A small vision transformer. Its tensors are named `blocks.{i}. ...`, which is how `lines` finds depth."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.pos_embed = nn.Parameter(0.5 * torch.randn((SIDE // PATCH) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(make_block() for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, images: Tensor) -> Tensor:
        """Images [N, 8, 8] -> features [N, width] of length 1."""
        patches = unfold(images[:, None], PATCH, stride=PATCH).mT  # [N, 16, 4]
        tokens = self.blocks(self.patch_embed(patches) + self.pos_embed)  # [N, 16, width]
        return normalize(self.norm(tokens.mean(1)), dim=-1)


def pretrain(domains: dict[str, Domain], split: Split) -> Encoder:
    """One encoder for all domains at once. Their trained heads are thrown away."""
    encoder = Encoder()
    heads = nn.Parameter(torch.randn(len(domains), CLASSES, WIDTH))

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        parts = zip(domains.values(), images.chunk(len(domains)), strict=True)
        features = encoder(torch.cat([domain(part) for domain, part in parts]))
        cosines = features.unflatten(0, (len(domains), -1)) @ normalize(heads, dim=-1).mT
        return cross_entropy(LOGIT_SCALE * cosines.flatten(0, 1), labels)

    fit([*encoder.parameters(), heads], loss_of, split, size=20 * len(domains), steps=360, rate=2e-3)
    return encoder


def one_shot_head(encoder: Encoder, domain: Domain, split: Split) -> Tensor:
    """Fixed prototypes [classes, width], one image each: rough, as CLIP's zero-shot heads are."""
    images, labels = split
    firsts = torch.stack([images[labels == label][0] for label in range(CLASSES)])
    with torch.no_grad():
        features: Tensor = encoder(domain(firsts))
    return normalize(features - features.mean(0), dim=-1)


def finetune(encoder: Encoder, domain: Domain, head: Tensor, split: Split) -> None:
    """Fit the encoder, in place, to one domain; the head stays as it is."""

    def loss_of(images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(LOGIT_SCALE * encoder(domain(images)) @ head.mT, labels)

    fit(list(encoder.parameters()), loss_of, split, size=64, steps=120, rate=1e-3)


def fit(weights: list[nn.Parameter], loss_of: Loss, split: Split, *, size: int, steps: int, rate: float) -> None:
    """AdamW on random batches of `size`. The rate warms up, without which some seeds learn little, then falls."""
    images, labels = split
    optimizer = torch.optim.AdamW(weights)
    schedule = OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1, cycle_momentum=False)
    for step in range(1, steps + 1):
        batch = torch.randint(len(labels), (size,))
        loss = loss_of(images[batch], labels[batch])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call, unused-ignore]
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        schedule.step()
        if step % (steps // 3) == 0:
            say(f"  step {step} of {steps}, loss {loss.item():.2f}")


def save_encoder(encoder: Encoder, folder: Path) -> None:
    (ROOT / folder).mkdir(parents=True)
    save_file(encoder.state_dict(), ROOT / folder / "model.safetensors", {"format": "pt"})
    config = {"model_type": "digits-vit", "num_hidden_layers": DEPTH, "hidden_size": WIDTH}
    (ROOT / folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def update_norms(folder: Path) -> list[float]:
    """How far a checkpoint is from the pre-trained one: the L2 norm of the difference, block by block."""
    base, other = (load_file(ROOT / each / "model.safetensors") for each in (BASE, folder))
    squares = [0.0] * DEPTH
    for name, tensor in base.items():
        if name.startswith("blocks."):
            squares[int(name.split(".")[1])] += (other[name] - tensor).double().square().sum().item()
    return [square**0.5 for square in squares]


def lines_edit(out: Path, *options: str) -> None:
    """Show a `lines edit` command and run it in the repository's root."""
    arguments = ["edit", str(BASE), str(TUNED), "-o", str(out), *options]
    print(f"\n$ lines {shlex.join(arguments)}", flush=True)
    done = subprocess.run([str(LINES), *arguments], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"that command failed with exit code {done.returncode}")


class Marks(NamedTuple):
    target: float  # per cent of the images classified correctly
    control: float  # the same, mean over the control domains


@dataclass(frozen=True)
class Judge:
    """Reads checkpoints from disk and measures them under the fixed heads."""

    target: str
    domains: dict[str, Domain]
    heads: dict[str, Tensor]
    splits: dict[str, Split]

    @torch.no_grad()
    def accuracies(self, folder: Path, split: str) -> dict[str, float]:
        """Domain -> per cent of the split's images classified correctly."""
        encoder = Encoder()
        encoder.load_state_dict(load_file(ROOT / folder / "model.safetensors"))
        images, labels = self.splits[split]
        logits = {name: encoder(domain(images)) @ self.heads[name].mT for name, domain in self.domains.items()}
        return {name: 100 * (each.argmax(-1) == labels).float().mean().item() for name, each in logits.items()}

    def marks(self, folder: Path, split: str = "test") -> Marks:
        accuracies = self.accuracies(folder, split)
        return Marks(accuracies.pop(self.target), mean(accuracies.values()))

    def score(self, folder: Path) -> float:
        """The paper's rule for one fine-tune: 2 * target / target_ft + mean(control / control_pre)."""
        edited, base, tuned = (self.accuracies(each, "validation") for each in (folder, BASE, TUNED))
        kept = [edited[name] / base[name] for name in self.domains if name != self.target]
        return 2 * edited[self.target] / tuned[self.target] + mean(kept)


def choose(judge: Judge, name: str, betas: dict[float, float]) -> tuple[float, Path]:
    """Edit with each alpha and its beta. Returns the alpha of the best validation score, and its folder."""
    folders = {alpha: OUT / f"{name}-{alpha:g}" for alpha in betas}
    scores = {}
    for alpha, folder in folders.items():
        lines_edit(folder, "--alpha", f"{alpha:g}", "--beta", f"{betas[alpha]:g}", "--quiet")
        marks, scores[alpha] = judge.marks(folder, "validation"), judge.score(folder)
        print(f"  target {marks.target:.1f}, controls {marks.control:.1f}, score {scores[alpha]:.3f}", flush=True)
    best = max(scores, key=scores.__getitem__)
    return best, folders[best]


def print_table(rows: dict[str, Marks], target: str) -> None:
    width = max(map(len, rows)) + 2
    print(f"{'% of test images right':{width}}{target:>12}{'controls':>12}")
    for name, marks in rows.items():
        print(f"{name:{width}}{marks.target:12.1f}{marks.control:12.1f}")


def print_reading(pre: Marks, tuned: Marks, default: Marks, chosen: Marks, constant: Marks) -> None:
    """Say what the table shows, whatever it shows."""
    right = tuned.target / 100
    error = 100 * (right * (1 - right) / SPLITS["test"]) ** 0.5  # one standard error, in points
    noise = 2 * error
    lost = pre.control - tuned.control

    def against_tuned(edited: Marks) -> str:
        back = edited.control - tuned.control
        share = f" ({back / lost:.0%} of that loss)" if lost > noise else ""
        return f"controls {back:+.1f}{share}, target {edited.target - tuned.target:+.1f}"

    target, control = chosen.target - constant.target, chosen.control - constant.control
    if max(abs(target), abs(control)) <= noise:
        verdict = "about as good"
    elif min(target, control) >= -error:  # better at one, and no worse at the other
        verdict = "LiNeS is ahead here"
    elif max(target, control) <= error:
        verdict = "constant scaling is ahead here"
    else:
        verdict = "a different trade, not a better one"

    print(f"""
Fine-tuning, in points:         target {tuned.target - pre.target:+.1f}, controls {-lost:+.1f}
What an edit then changes:
  lines edit, defaults          {against_tuned(default)}
  lines edit, alpha chosen      {against_tuned(chosen)}
LiNeS minus constant scaling:   target {target:+.1f}, controls {control:+.1f}: {verdict}

This is a toy: {SPLITS["test"]} test images and one seed. Less than {noise:.1f} points (two standard errors) is noise;
which edit is ahead can change with --seed and --target: try some.
For real models see the paper, arXiv 2410.17146.""")


if __name__ == "__main__":
    main()
