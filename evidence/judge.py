"""The evaluation that `lines sweep` calls in its own process, for every candidate of this project's sweeps.

What it needs to know comes in the environment (`setup.VARIABLE`): the set-up's file, the seed, and the target, if there
is one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from evidence.encoder import Encoder, accuracy, base_folder, make_module, prototypes, read_into
from evidence.setup import VARIABLE, Setup, load_setup
from evidence.texts import RETRIEVAL, Pairs, Task, deal, deal_pairs, misspelt, pools

Metrics = dict[str, float | dict[str, float]]


@dataclass(frozen=True)
class Judge:
    """Measures encoders on everything that a seed deals, under the heads of the pre-trained encoder."""

    encoder: Encoder
    tasks: Mapping[str, Task]
    heads: Mapping[str, Tensor]
    pairs: Pairs
    seed: int

    def measurable(self, module: nn.Module) -> nn.Module | None:
        """A candidate as it is measured: where matrices are multiplied in float32, its weights in the encoder's own."""
        if self.encoder.half:
            return module
        self.encoder.module.load_state_dict(module.state_dict())
        return None

    def misspelt(self, module: nn.Module | None, name: str) -> float:
        """Per cent right of one task's test texts with typing errors in them."""
        test = self.tasks[name].test
        texts = [misspelt(text, self.seed) for text in test.texts]
        return accuracy(self.encoder.encoded(texts, module), self.heads[name], test.labels)

    def metrics(self, module: nn.Module | None, target: str | None) -> Metrics:
        """What a candidate is chosen by, of the validation texts; and `test`, which nothing is chosen by. Merges have
        none: only of the one that is chosen it is asked for (`tested`), and it takes most of the time.

        Args:
            module: that is measured; None for the encoder's own.
            target: the task whose `target` is told apart from `control`; None for a merge, where `tasks` has all.
        """
        validation = self._accuracies(module, "validation")
        if target is None:
            return {"tasks": validation}
        known = validation.pop(target)
        return {"target": known, "control": validation, "test": self._accuracies(module, "test", self.pairs)}

    def tested(self, folder: Path) -> dict[str, float]:
        """Per cent right of each task's test texts, by a model that lies in a folder."""
        read_into(self.encoder.module, folder / "model.safetensors")
        return self._accuracies(None, "test")

    def _accuracies(self, module: nn.Module | None, part: str, pairs: Pairs | None = None) -> dict[str, float]:
        """Per cent right of each task's texts; and of retrieval, where pairs are given."""
        labelled = {name: getattr(task, part) for name, task in self.tasks.items()}
        groups = [each.texts for each in labelled.values()]
        groups += [] if pairs is None else [pairs.glosses, pairs.words]
        features = self.encoder.encoded([text for group in groups for text in group], module)
        each = list(torch.split(features, [len(group) for group in groups]))
        found = {name: accuracy(each.pop(0), self.heads[name], own.labels) for name, own in labelled.items()}
        if pairs is not None:
            glosses, words = each
            found[RETRIEVAL] = accuracy(glosses, words, range(len(words)))
        return found


def make_judge(setup: Setup, seed: int, *, half: bool | None = None) -> Judge:
    """The judge of one seed. On one thread, so that sums round alike on any machine that computes alike."""
    torch.set_num_threads(1)
    work = Path(setup.work)
    found, words = pools(work)
    encoder = Encoder(base_folder(work), half=half)
    tasks = {name: deal(found[name], name, seed, setup.sizes) for name in setup.tasks}
    heads = _heads(work / f"seed{seed}" / f"heads{'-half' if encoder.half else ''}.safetensors", encoder, tasks)
    return Judge(encoder, tasks, heads, deal_pairs(words, seed, setup.sizes), seed)


def _heads(path: Path, encoder: Encoder, tasks: Mapping[str, Task]) -> dict[str, Tensor]:
    """The prototypes of each task; of the same encoder they are computed once."""
    if path.exists():
        return load_file(path)
    heads = {name: prototypes(encoder, task.prototypes) for name, task in tasks.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    save_file(heads, part)
    part.rename(path)
    return heads


# --- what a sweep calls ---


def context(path: Path, seed: int, target: str | None = None, **more: Any) -> dict[str, Any]:
    """What the functions below need to know."""
    return {"setup": str(path), "seed": seed, "target": target, **more}


@cache
def _judge() -> tuple[Judge, dict[str, Any]]:
    said = json.loads(os.environ[VARIABLE])
    return make_judge(load_setup(Path(said["setup"])), said["seed"]), said


def model() -> nn.Module:
    """The module that candidates are put into: in their dtype."""
    said = json.loads(os.environ[VARIABLE])
    module = make_module(base_folder(Path(load_setup(Path(said["setup"])).work)))
    return module.to(torch.bfloat16)


def evaluate(module: nn.Module, trial: Mapping[str, Any]) -> Metrics:  # noqa: ARG001 - what a sweep gives
    """All metrics of a candidate."""
    judge, said = _judge()
    return judge.metrics(judge.measurable(module), said["target"])


def evaluate_robustness(module: nn.Module, trial: Mapping[str, Any]) -> Metrics:  # noqa: ARG001
    """Accuracy on the target's texts as they are, and with typing errors."""
    judge, said = _judge()
    measured = judge.measurable(module)
    task, head = judge.tasks[said["target"]], judge.heads[said["target"]]
    clean = {
        part: accuracy(judge.encoder.encoded(labelled.texts, measured), head, labelled.labels)
        for part, labelled in (("validation", task.validation), ("test", task.test))
    }
    return {
        "target": clean["validation"],
        "test": {"clean": clean["test"], "misspelt": judge.misspelt(measured, task.name)},
    }
