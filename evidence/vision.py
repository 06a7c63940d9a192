"""The demo's vision transformer on handwritten digits: items 1 and 2 once more, on a pre-norm model of images."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from evidence import merging
from evidence.judge import Metrics, context
from evidence.one import RULE, points_of, sweep
from evidence.setup import ROOT, VARIABLE, Setup, load_setup, result_path, save_result, save_setup

sys.path.append(str(ROOT / "demo"))

import digits

DOMAINS = ("plain", "inverted", "rotated", "shuffled", "checkered")
LARGEST = 0.5  # of the coefficients of merges, where encoders of texts have 1: the best were the smallest of seed 0


def folder_of(setup: Setup, seed: int) -> Path:
    return Path(setup.work) / f"seed{seed}" / "digits"


def dealt(seed: int) -> tuple[dict[str, digits.Split], dict[str, digits.Domain]]:
    """The images of each split, and the domains: the first draws of a seed."""
    torch.manual_seed(seed)
    return digits.load_splits(), digits.make_domains()


def pretrained(setup: Setup, seed: int) -> Path:
    """The encoder of all domains, trained where it is not there yet."""
    folder = folder_of(setup, seed) / "pretrained"
    if not folder.exists():
        splits, domains = dealt(seed)
        _save(digits.pretrain(domains, splits["pretrain"]), folder)
    return folder


def _save(encoder: digits.Encoder, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    digits.save_encoder(encoder, part)
    os.rename(part, folder)


def _loaded(folder: Path) -> digits.Encoder:
    encoder = digits.Encoder()
    encoder.load_state_dict(load_file(folder / "model.safetensors"))
    return encoder


def trained(setup: Setup, seed: int, target: str) -> Path:
    """The encoder fine-tuned on one domain."""
    folder = folder_of(setup, seed) / target / "ft"
    if not folder.exists():
        encoder = _loaded(pretrained(setup, seed))
        splits, domains = dealt(seed)
        head = digits.one_shot_head(encoder, domains[target], splits["pretrain"])
        torch.manual_seed(1000 * seed + list(domains).index(target))
        digits.finetune(encoder, domains[target], head, splits["finetune"])
        _save(encoder, folder)
    return folder


def run(setup: Setup, seed: int, target: str) -> None:
    """One fine-tune, trained and swept; nothing where its result is there."""
    path = result_path(setup, "digits", seed, target)
    if path.exists():
        return
    torch.set_num_threads(1)
    ft = trained(setup, seed, target)
    said = {
        "recipe": {"base": str(pretrained(setup, seed)), "ft": str(ft)},
        "grid": {"lines.alpha": list(setup.grid)},
        "evaluate": "evidence.vision:evaluate",
        "model": "evidence.vision:model",
        "objective": RULE,
    }
    found = sweep(ft.parent / "one", said, context(save_setup(setup), seed, target))
    save_result(path, {"seed": seed, "task": target, "points": points_of(found)})


def run_merging(setup: Setup, seed: int, method: str) -> None:
    """One method of one seed, of all domains; nothing where its result is there."""
    path = result_path(setup, "digits-merging", seed, method)
    if not path.exists():
        torch.set_num_threads(1)
        points = _merged(setup, seed, method, DOMAINS)
        save_result(path, {"seed": seed, "method": method, "tasks": list(DOMAINS), "points": points})


def run_alone(setup: Setup, seed: int, method: str) -> None:
    """Depth alone, with one method of one seed, of all domains; nothing where its result is there."""
    path = result_path(setup, "digits-depth-alone", seed, method)
    if not path.exists():
        torch.set_num_threads(1)
        points = _merged(setup, seed, method, DOMAINS, by=merging.depth_alone)
        save_result(path, {"seed": seed, "method": method, "tasks": list(DOMAINS), "points": points})


def _merged(
    setup: Setup,
    seed: int,
    method: str,
    domains: Sequence[str],
    by: Callable[..., list[dict[str, Any]]] = merging.families,
) -> list[dict[str, Any]]:
    """A merge of some domains' fine-tunes, measured on these: by `families` of `merging`, or by `depth_alone`."""
    recipe = merging.recipe_for(method, pretrained(setup, seed), [trained(setup, seed, each) for each in domains])
    return by(
        setup,
        seed,
        folder_of(setup, seed) / f"{by.__name__}-{len(domains)}" / method,
        recipe,
        largest=LARGEST * merging.LARGEST.get(method, 1.0),
        judge="evidence.vision",
        tasks=list(domains),
    )


def run_tasks(setup: Setup, seed: int, method: str, count: float) -> None:
    """One method of one seed, of fewer domains than all; nothing where its result is there."""
    torch.set_num_threads(1)
    path = result_path(setup, "digits-tasks", seed, method, f"{count:g}")
    if path.exists():
        return
    domains = [DOMAINS[(seed + at) % len(DOMAINS)] for at in range(int(count))]  # over the seeds each has its turn
    points = _merged(setup, seed, method, domains)
    save_result(path, {"seed": seed, "method": method, "tasks": domains, "points": points})


# --- what the sweep calls ---


@cache
def _judge() -> tuple[Mapping[str, Any], digits.Judge]:
    torch.set_num_threads(1)
    said = json.loads(os.environ[VARIABLE])
    setup, seed = load_setup(Path(said["setup"])), said["seed"]
    splits, domains = dealt(seed)
    encoder = _loaded(pretrained(setup, seed))
    heads = {name: digits.one_shot_head(encoder, domain, splits["pretrain"]) for name, domain in domains.items()}
    return said, digits.Judge(said["target"] or "", domains, heads, splits)


def model() -> nn.Module:
    """The module that candidates are put into."""
    return digits.Encoder()


def evaluate(module: nn.Module, trial: Mapping[str, Any]) -> Metrics:  # noqa: ARG001 - what a sweep gives
    """All metrics of a candidate: what it is chosen by, of the validation images; and `test`."""
    said, judge = _judge()
    validation, test = (_accuracies(module, judge, split) for split in ("validation", "test"))
    if said["target"] is None:
        return {"tasks": {task: validation[task] for task in said["tasks"]}, "test": test}
    known = validation.pop(said["target"])
    return {"target": known, "control": validation, "test": test}


def _accuracies(module: nn.Module, judge: digits.Judge, split: str) -> dict[str, float]:
    images, labels = judge.splits[split]
    logits = {name: module(domain(images)) @ judge.heads[name].mT for name, domain in judge.domains.items()}
    return {name: 100 * (each.argmax(-1) == labels).float().mean().item() for name, each in logits.items()}
