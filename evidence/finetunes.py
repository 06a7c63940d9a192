"""Fine-tunes: each is trained once, and stays in WORK."""

from __future__ import annotations

import time
from pathlib import Path

from evidence.encoder import base_folder, finetune, write_model
from evidence.judge import make_judge
from evidence.setup import Setup


def folder_of(setup: Setup, seed: int, task: str, rate: float, order: int = 0) -> Path:
    """Where a fine-tune lies. `order` tells apart those that differ only in the order of their texts."""
    return Path(setup.work) / f"seed{seed}" / f"{task}-{rate:g}{f'-{order}' if order else ''}" / "ft"


def trained(setup: Setup, seed: int, task: str, rate: float, order: int = 0) -> Path:
    """The folder of a fine-tune, trained where it is not there yet."""
    folder = folder_of(setup, seed, task, rate, order)
    if not folder.exists():
        started = time.process_time()
        judge = make_judge(setup, seed)
        finetune(
            judge.encoder,
            judge.tasks[task],
            judge.heads[task],
            rate=rate,
            epochs=setup.epochs,
            seed=1000 * seed + order,
            say=lambda text: print(f"seed {seed}, {task}, {rate:g}: {text}", flush=True),
        )
        write_model(judge.encoder.module, folder, base_folder(Path(setup.work)))
        print(f"seed {seed}, {task}, {rate:g}: {time.process_time() - started:.0f} s of CPU time", flush=True)
    return folder
