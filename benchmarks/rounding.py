"""What rounding makes of an edit, in the weights and in what the model computes: a small residual network is trained,
fine-tuned at several learning rates, stored in bfloat16, and edited by `lines.edit` with each way to round.

python benchmarks/rounding.py [--plot docs/rounding.svg]

Prints a table. `off` is the distance of the logits from those of the edit that was asked (computed in float64),
relative to what the fine-tune changed of them.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import lines_cli as lines

BLOCKS, WIDTH, HIDDEN, CLASSES = 6, 128, 512, 16
RATES = (1e-6, 3e-6, 1e-5, 1e-4)
WAYS: dict[str, dict[str, Any]] = {
    "nearest": {},
    "stochastic": {"rounding": "stochastic"},
    "float16": {"dtype": "float16"},
    "float32": {"dtype": "float32"},
}
SCHEDULES: dict[str, dict[str, Any]] = {"ramp": {"alpha": 0.1, "beta": 0.9}, "constant": {"alpha": 0.4, "beta": 0.0}}


class Block(torch.nn.Module):
    """Adds to its input what two matrices make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.up_proj, self.down_proj = torch.nn.Linear(WIDTH, HIDDEN), torch.nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        added: torch.Tensor = self.down_proj(torch.nn.functional.gelu(self.up_proj(self.norm(x))))
        return x + added


class Network(torch.nn.Module):
    """Residual blocks between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Linear(WIDTH, WIDTH)
        self.layers = torch.nn.ModuleList(Block() for _ in range(BLOCKS))
        self.lm_head = torch.nn.Linear(WIDTH, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        found: torch.Tensor = self.lm_head(x)
        return found


def batch(task: int, size: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points, and the class that a fixed map gives each: near that of the first task."""
    fixed = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(task)
    directions = torch.randn(WIDTH, CLASSES, generator=fixed) + 0.7 * torch.randn(WIDTH, CLASSES, generator=own)
    x = torch.randn(size, WIDTH, generator=generator)
    return x, (x @ directions).argmax(1)


def train(model: Network, task: int, rate: float, steps: int) -> None:
    """With float32 masters."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(task)
    for _ in range(steps):
        x, y = batch(task, 256, generator)
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimiser.step()


def halved(model: Network) -> dict[str, torch.Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def logits(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    model = Network().double()
    model.load_state_dict({name: tensor.double() for name, tensor in tensors.items()})
    with torch.no_grad():
        found: torch.Tensor = model(x.double())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = Network()
    train(model, 1, 1e-3, 600)
    pretrained = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base = halved(model)
    x, _ = batch(2, 4000, torch.Generator().manual_seed(99))
    drawn: dict[float, dict[str, list[float]]] = {}
    print("| learning rate | unchanged | schedule | rounding | realised | off |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        save_file(base, at / "base.safetensors")
        for rate in RATES:
            model.load_state_dict(pretrained)
            train(model, 2, rate, 200)
            ft = halved(model)
            save_file(ft, at / "ft.safetensors")
            entries = sum(tensor.numel() for tensor in base.values())
            unchanged = sum(int((base[name] == ft[name]).sum()) for name in base) / entries
            effect = logits(ft, x) - logits(base, x)
            for schedule, said in SCHEDULES.items():
                coefficients = lines.coefficients(base, **said)
                asked = logits(
                    {n: base[n].double() + c * (ft[n].double() - base[n].double()) for n, c in coefficients.items()}, x
                )
                for way, options in WAYS.items():
                    out = at / "out.safetensors"
                    summary = lines.edit(
                        at / "base.safetensors", at / "ft.safetensors", out, force=True, **said, **options
                    )
                    found = logits(load_file(out), x)
                    realised = [layer["realised"] for layer in summary["layers"]]
                    if schedule == "ramp":
                        drawn.setdefault(rate, {})[way] = realised
                    off = float((found - asked).norm() / effect.norm())
                    shown = " ".join(f"{value:.2f}" for value in realised)
                    row = (f"{rate:g}", f"{unchanged:.0%}", schedule, way, shown, f"{off:.1%}")
                    print(f"| {' | '.join(row)} |")
    if arguments.plot:
        plot(arguments.plot, drawn)


def plot(path: Path, drawn: dict[float, dict[str, list[float]]]) -> None:
    """Asked as a line, realised as dots, for each learning rate."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update({"svg.hashsalt": "rounding", "svg.fonttype": "none", "font.size": 10})
    asked = [0.1 + 0.9 * index / (BLOCKS - 1) for index in range(BLOCKS)]
    rates = list(drawn)[:3]
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    for axes, rate in zip(figure.subplots(1, len(rates), sharey=True), rates, strict=True):
        axes.plot(asked, color="0.35", linewidth=1.5, label="asked")
        axes.plot(drawn[rate]["nearest"], "o", color="#D55E00", markersize=6, label="rounded to nearest", clip_on=False)
        style = {"color": "#0072B2", "markersize": 7, "markeredgewidth": 2, "clip_on": False}
        axes.plot(drawn[rate]["stochastic"], "x", label="stochastic", **style)
        axes.set_title(f"fine-tuned at {rate:.0e}".replace("e-0", "e-"))
        axes.set_xlabel("block")
        axes.set_ylim(0, 1.05)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.axes[0].set_ylabel("coefficient realised in bfloat16")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


if __name__ == "__main__":
    main()
